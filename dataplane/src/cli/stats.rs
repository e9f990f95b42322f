//! `sluice stats`.

use std::io::IsTerminal;
use std::path::Path;

use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::args::StatsArgs;
use super::client::{Client, ask, refused, with_client};
use super::cycles::Report;
use super::output::{emit, emit_json, emit_json_line, table};

/// Moves a terminal's cursor home and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

pub(crate) fn run(args: &StatsArgs, socket: &Path, json: bool) -> Result<(), Failure> {
    if args.watch {
        return with_client(socket, async |client| watch(client, args, json).await);
    }
    let request = proto::GetStatsRequest { cycles: args.cycles };
    let stats = ask(socket, async |client| client.get_stats(request).await)?.stats.unwrap_or_default();
    if args.cycles {
        let report = Report::new(&proto::Cycles::default(), &stats.cycles.unwrap_or_default());
        return if json { emit_json(&report) } else { emit(&report.describe()) };
    }
    if json { emit_json(&stats) } else { emit(&totals(&stats)) }
}

fn totals(stats: &proto::Stats) -> String {
    let row = |port: &proto::PortStats| {
        vec![
            port.name.clone(),
            port.state().word().into(),
            port.rx_frames.to_string(),
            port.rx_bytes.to_string(),
            port.tx_frames.to_string(),
            port.tx_bytes.to_string(),
            port.drops.values().sum::<u64>().to_string(),
        ]
    };
    let titles = ["PORT", "STATE", ">RX FRAMES", ">RX BYTES", ">TX FRAMES", ">TX BYTES", ">DROPS"];
    let mut text = table(&titles, &stats.ports.iter().map(row).collect::<Vec<_>>());
    for port in &stats.ports {
        let reasons = port.drops.iter().filter(|(_, count)| **count > 0);
        push_reasons(&mut text, &port.name, reasons.map(|(reason, count)| format!("{reason} {count}")));
    }
    text
}

async fn watch(mut client: Client, args: &StatsArgs, json: bool) -> Result<(), Failure> {
    let request = proto::WatchStatsRequest { interval_ms: args.interval, cycles: args.cycles };
    let mut answers = client.watch_stats(request).await.map_err(refused)?.into_inner();
    let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
    let mut before: Option<proto::Stats> = None;
    while let Some(answer) = answers.message().await.map_err(refused)? {
        let now = answer.stats.unwrap_or_default();
        if args.cycles {
            let cycles = |stats: &proto::Stats| stats.cycles.clone().unwrap_or_default();
            let report = before.as_ref().map(|before| Report::new(&cycles(before), &cycles(&now)));
            match report {
                Some(report) if json => emit_json_line(&report)?,
                Some(report) => emit(&format!("{clear}{}\n", report.describe()))?,
                None => {}
            }
        } else if json {
            emit_json_line(&now)?;
        } else if let Some(before) = &before {
            emit(&format!("{clear}{}\n", rates(before, &now)))?;
        }
        before = Some(now);
    }
    Err(Failure::Failed("the switch hung up; see its log".into()))
}

/// What happened between two moments, per second.
fn rates(before: &proto::Stats, now: &proto::Stats) -> String {
    let seconds = (now.time_ns.saturating_sub(before.time_ns) as f64 / 1e9).max(1e-9);
    // A port that was added meanwhile started from zero, and so did one that was added again.
    let per_second = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now) as f64 / seconds;
    let mut rows = Vec::new();
    let mut reasons = String::new();
    for port in &now.ports {
        let old = before.ports.iter().find(|old| old.name == port.name).cloned().unwrap_or_default();
        let drops: Vec<(&String, f64)> = port
            .drops
            .iter()
            .map(|(reason, count)| (reason, per_second(*count, old.drops.get(reason).copied().unwrap_or(0))))
            .filter(|(_, rate)| *rate > 0.0)
            .collect();
        let megabits = |now, before| format!("{:.1}", per_second(now, before) * 8.0 / 1e6);
        rows.push(vec![
            port.name.clone(),
            port.state().word().into(),
            format!("{:.0}", per_second(port.rx_frames, old.rx_frames)),
            megabits(port.rx_bytes, old.rx_bytes),
            format!("{:.0}", per_second(port.tx_frames, old.tx_frames)),
            megabits(port.tx_bytes, old.tx_bytes),
            // Not `sum`, which gives -0 for none.
            format!("{:.0}", drops.iter().fold(0.0, |sum, (_, rate)| sum + rate)),
        ]);
        push_reasons(&mut reasons, &port.name, drops.iter().map(|(reason, rate)| format!("{reason} {rate:.0}/s")));
    }
    let titles = ["PORT", "STATE", ">RX FRAMES/S", ">RX MBIT/S", ">TX FRAMES/S", ">TX MBIT/S", ">DROPS/S"];
    table(&titles, &rows) + &reasons
}

/// One line with why a port drops, if it does.
fn push_reasons(text: &mut String, port: &str, reasons: impl Iterator<Item = String>) {
    let reasons: Vec<_> = reasons.collect();
    if !reasons.is_empty() {
        text.push_str(&format!("{port} drops: {}\n", reasons.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(time_ns: u64, rx: u64, full: u64) -> proto::Stats {
        let port = proto::PortStats {
            name: "vm1".into(),
            state: proto::PortState::Up.into(),
            rx_frames: rx,
            rx_bytes: rx * 1000,
            drops: [("full".to_owned(), full), ("runt".into(), 0)].into(),
            ..Default::default()
        };
        proto::Stats { time_ns, ports: vec![port], ..Default::default() }
    }

    #[test]
    fn rates_are_per_second() {
        let text = rates(&stats(1_000_000_000, 100, 5), &stats(3_000_000_000, 2100, 15));
        let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["vm1", "up", "1000", "8.0", "0", "0.0", "5"]);
        assert_eq!(text.lines().nth(2), Some("vm1 drops: full 5/s"));
    }

    #[test]
    fn a_port_that_is_new_starts_from_zero() {
        let before = proto::Stats { time_ns: 0, ..Default::default() };
        assert!(rates(&before, &stats(1_000_000_000, 7, 0)).contains(" 7 "));
        let again = rates(&stats(0, 100, 0), &stats(1_000_000_000, 7, 0));
        assert!(again.contains(" 7 ") && !again.contains("drops:"), "{again}");
    }

    #[test]
    fn totals_tell_why() {
        assert!(totals(&stats(0, 1, 5)).ends_with("vm1 drops: full 5\n"));
        assert_eq!(totals(&stats(0, 1, 0)).lines().count(), 2);
    }
}
