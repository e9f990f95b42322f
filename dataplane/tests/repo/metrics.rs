//! Dashboard and alerts ask for series that exist, and leave no metric of ours out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use sluice::config::{PortTarget, SwitchConfig, WorkerMode};
use sluice::control::{About, Controller, StateStore};
use sluice::sandbox::DEFAULT_KINDS;
use sluice::switch::Switch;
use sluice_daemon::pages::Pages;

use crate::root;

/// Metrics that no panel and no alert needs: ports have the sums of queues, and pods that start were given devices before.
const UNSEEN: [&str; 5] = [
    "sluice_device_plugin_pre_starts",
    "sluice_queue_rx_bytes",
    "sluice_queue_rx_frames",
    "sluice_queue_tx_bytes",
    "sluice_queue_tx_frames",
];
/// Labels whose words are all known.
const LABELS: [&str; 4] = ["reason", "state", "kind", "endpoint"];

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

/// What dashboard and alerts are, by name.
fn queries() -> [(&'static str, String); 2] {
    ["dashboard.json", "alerts.yaml"].map(|file| (file, read(&format!("deploy/monitoring/{file}"))))
}

/// What a switch with one port answers.
fn exported() -> String {
    let dir = tempfile::tempdir().unwrap();
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let spec = format!("vm1=vhost-user:{}", dir.path().join("vm1.sock").display());
    switch.add_port(spec.parse().unwrap()).unwrap();
    let state_dir = dir.path().join("state");
    let store = StateStore::open(&state_dir).unwrap();
    let about = About { mode: WorkerMode::Adaptive, control: dir.path().join("ctl.sock"), state_dir };
    Controller::new(switch, store, about).metrics().unwrap()
}

/// The metrics of all programs and their types.
fn metrics() -> BTreeMap<String, String> {
    let text = exported();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let mut metrics: BTreeMap<_, _> = types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect();
    assert!(metrics.len() > 30, "{metrics:?}");
    // The device plugin's, from its code: those that have counted nothing yet are in no answer.
    let code = read("device-plugin/src/metrics.rs");
    let prefix = code.split("with_prefix(\"").nth(1).unwrap().split('"').next().unwrap();
    for registration in code.split("registry.register(").skip(1) {
        let field = registration.split("metrics.").nth(1).unwrap().split('.').next().unwrap();
        let declared =
            |line: &&str| line.trim_start().trim_start_matches("pub(crate) ").starts_with(&format!("{field}: "));
        let line = code.lines().find(declared).unwrap();
        let kind =
            ["counter", "gauge", "histogram"].into_iter().find(|kind| line.to_lowercase().contains(kind)).unwrap();
        metrics.insert(format!("{prefix}_{}", registration.split('"').nth(1).unwrap()), kind.to_owned());
    }
    metrics
}

/// What Prometheus makes of a metric.
fn series(name: &str, kind: &str) -> Vec<String> {
    let ends: &[&str] = match kind {
        "counter" => &["_total"],
        "gauge" => &[""],
        "histogram" => &["_bucket", "_sum", "_count"],
        _ => panic!("{name} is a {kind}"),
    };
    ends.iter().map(|end| format!("{name}{end}")).collect()
}

fn is_of_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

#[test]
fn dashboard_and_alerts_show_every_metric_and_no_others() {
    let metrics = metrics();
    let by_series: BTreeMap<_, _> =
        metrics.iter().flat_map(|(name, kind)| series(name, kind).into_iter().map(move |one| (one, name))).collect();
    let mut unseen: BTreeSet<_> = metrics.keys().map(String::as_str).collect();
    for (file, text) in queries() {
        for asked in text.split(|letter| !is_of_word(letter)).filter(|word| word.starts_with("sluice_")) {
            let name = by_series.get(asked).unwrap_or_else(|| panic!("{file}: no series is called {asked}"));
            unseen.remove(name.as_str());
        }
    }
    assert_eq!(unseen.into_iter().collect::<Vec<_>>(), UNSEEN);
}

/// The words that queries ask a label for.
fn asked_of(text: &str, label: &str) -> Vec<String> {
    let words = |(at, _): (usize, &str)| {
        let (before, after) = (&text[..at], &text[at + label.len()..]);
        let value = after.trim_start_matches(['=', '!', '~']);
        if before.ends_with(is_of_word) || value.len() == after.len() {
            return None;
        }
        // In JSON, quotes are escaped.
        let value = value.trim_start_matches('\\').strip_prefix('"')?;
        let end = value.find(|letter| !is_of_word(letter) && !"|-".contains(letter))?;
        Some(value[..end].split('|').filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>())
    };
    text.match_indices(label).filter_map(words).flatten().collect()
}

/// Words that a label can have.
fn words_of(answer: &str, label: &str) -> BTreeSet<String> {
    let dpdk = PortTarget::Dpdk { device: String::new() };
    let endpoint = |line: &str| line.trim().strip_prefix("- port: ").map(str::to_owned);
    match label {
        "kind" => DEFAULT_KINDS.into_iter().chain([dpdk.kind()]).map(str::to_owned).collect(),
        "endpoint" => read("deploy/monitoring/podmonitor.yaml").lines().filter_map(endpoint).collect(),
        _ => asked_of(answer, label).into_iter().collect(),
    }
}

#[test]
fn labels_are_asked_for_words_that_they_have() {
    let answer = exported();
    for label in LABELS {
        let words = words_of(&answer, label);
        let mut asked = queries().into_iter().flat_map(|(_, text)| asked_of(&text, label)).peekable();
        assert!(asked.peek().is_some(), "nothing asks for {label}");
        let unknown: Vec<_> = asked.filter(|word| !words.contains(word)).collect();
        assert!(unknown.is_empty(), "{label} is never {unknown:?}, but one of {words:?}");
    }
}
