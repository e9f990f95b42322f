//! The configuration file: TOML, with the same words as SPEC.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use toml::Spanned;

use super::{FdbConfig, InvalidPort, PortConfig, PortText, WorkerMode, check_workers, number, parse_cpu, parse_switch};
use crate::limits::{MAX_FDB_AGE_SECONDS, MAX_FDB_ENTRIES};
use crate::sandbox::{SandboxMode, parse_kinds};

/// What a configuration file says; what it leaves out is `None` or the default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileConfig {
    /// `[control] socket`.
    pub control: Option<PathBuf>,
    /// `[control] group`: name or number of the group that may use the control socket.
    pub group: Option<String>,
    /// `[control] socket_root`: folder that the sockets of all vhost-user ports have to be in.
    pub socket_root: Option<PathBuf>,
    /// `[state] dir`.
    pub state: Option<PathBuf>,
    /// `[state] keeper`: another process keeps connections over a crash.
    pub keeper: Option<bool>,
    /// `[sandbox] mode`.
    pub sandbox: Option<SandboxMode>,
    /// `[sandbox] kinds`: kinds of port that can be added.
    pub kinds: Option<Vec<String>>,
    /// `[metrics] listen`; metrics are off without it.
    pub metrics: Option<SocketAddr>,
    /// `[switch] mode`.
    pub mode: Option<WorkerMode>,
    /// `[switch] fdb_entries`, `fdb_per_port` and `fdb_age_seconds`.
    pub fdb: FdbConfig,
    /// `[switch] rebalance`.
    pub rebalance: Option<bool>,
    /// One for each `[[worker]]`; `None` is a worker without `cpu`.
    pub workers: Vec<Option<usize>>,
    /// One for each `[[port]]`.
    pub ports: Vec<PortConfig>,
}

/// Why a configuration file was refused, in one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is wrong.
    #[error("{path}:{line}:{column}: {problem} (in '{text}')")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong, and what would be right.
        problem: String,
        /// The line itself.
        text: String,
    },
}

impl FileConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(source) => Err(FileError::Read { path: path.into(), source }),
        }
    }

    /// Checks the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// [`FileError::Invalid`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, FileError> {
        let sections = toml::from_str::<Sections>(text).map_err(|error| Wrong {
            // The library's words, except that TOML has keys where Rust has fields.
            problem: error.message().replace("unknown field", "unknown key").replace("missing field", "missing key"),
            span: error.span().unwrap_or(0..0),
        });
        sections.and_then(Sections::check).map_err(|wrong| wrong.locate(path, text))
    }
}

/// A mistake and where it is.
struct Wrong {
    problem: String,
    span: Range<usize>,
}

impl Wrong {
    fn locate(self, path: &Path, text: &str) -> FileError {
        let before = text.get(..self.span.start).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line_text = text[line_start..].lines().next().unwrap_or_default();
        FileError::Invalid {
            path: path.into(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            problem: self.problem,
            text: line_text.trim().chars().take(100).collect(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sections {
    control: ControlSection,
    state: StateSection,
    sandbox: SandboxSection,
    metrics: MetricsSection,
    switch: SwitchSection,
    worker: Vec<WorkerSection>,
    port: Vec<PortSection>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ControlSection {
    socket: Option<Spanned<Word>>,
    group: Option<Word>,
    socket_root: Option<Spanned<Word>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StateSection {
    dir: Option<Spanned<Word>>,
    keeper: Option<Spanned<Word>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SandboxSection {
    mode: Option<Spanned<Word>>,
    kinds: Option<Spanned<Word>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MetricsSection {
    listen: Option<Spanned<Word>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SwitchSection {
    mode: Option<Spanned<Word>>,
    fdb_entries: Option<Spanned<Word>>,
    fdb_per_port: Option<Spanned<Word>>,
    fdb_age_seconds: Option<Spanned<Word>>,
    rebalance: Option<Spanned<Word>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WorkerSection {
    cpu: Option<Spanned<Word>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PortSection {
    name: Spanned<Word>,
    kind: Spanned<Word>,
    target: Spanned<Word>,
    mode: Option<Spanned<Word>>,
    network: Option<Spanned<Word>>,
    vlan: Option<Spanned<Word>>,
    trunk: Option<Spanned<Word>>,
    networks: Option<Spanned<Word>>,
    mtu: Option<Spanned<Word>>,
    queues: Option<Spanned<Word>>,
    mac: Option<Spanned<Word>>,
    spoofcheck: Option<Spanned<Word>>,
    replace: Option<Spanned<Word>>,
    #[serde(rename = "busy-poll")]
    busy_poll: Option<Spanned<Word>>,
    #[serde(rename = "tx-checksum")]
    tx_checksum: Option<Spanned<Word>>,
    #[serde(rename = "rate-rx")]
    rate_rx: Option<Spanned<Word>>,
    #[serde(rename = "burst-rx")]
    burst_rx: Option<Spanned<Word>>,
    #[serde(rename = "rate-tx")]
    rate_tx: Option<Spanned<Word>>,
    #[serde(rename = "burst-tx")]
    burst_tx: Option<Spanned<Word>>,
    owner: Option<Spanned<Word>>,
}

impl Sections {
    fn check(self) -> Result<FileConfig, Wrong> {
        let mode = |word: &Spanned<Word>| at(word, word.as_ref().0.parse());
        let rebalance = |word: &Spanned<Word>| at(word, parse_switch("rebalance", &word.as_ref().0));
        let keeper = |word: &Spanned<Word>| at(word, parse_switch("keeper", &word.as_ref().0));
        let sandbox = |word: &Spanned<Word>| at(word, word.as_ref().0.parse());
        let kinds = |word: &Spanned<Word>| at(word, parse_kinds(&word.as_ref().0));
        let listen = |word: &Spanned<Word>| {
            let text = &word.as_ref().0;
            at(word, text.parse().map_err(|_| format!("listen must be like 127.0.0.1:9090, not '{text}'")))
        };
        Ok(FileConfig {
            control: self.control.socket.as_ref().map(absolute).transpose()?,
            group: self.control.group.map(|word| word.0),
            socket_root: self.control.socket_root.as_ref().map(absolute).transpose()?,
            state: self.state.dir.as_ref().map(absolute).transpose()?,
            keeper: self.state.keeper.as_ref().map(keeper).transpose()?,
            sandbox: self.sandbox.mode.as_ref().map(sandbox).transpose()?,
            kinds: self.sandbox.kinds.as_ref().map(kinds).transpose()?,
            metrics: self.metrics.listen.as_ref().map(listen).transpose()?,
            mode: self.switch.mode.as_ref().map(mode).transpose()?,
            fdb: self.switch.fdb()?,
            rebalance: self.switch.rebalance.as_ref().map(rebalance).transpose()?,
            workers: check_worker_sections(&self.worker)?,
            ports: check_port_sections(&self.port)?,
        })
    }
}

impl SwitchSection {
    fn fdb(&self) -> Result<FdbConfig, Wrong> {
        let default = FdbConfig::default();
        let size = |key, word: &Option<Spanned<Word>>, default| match word {
            Some(word) => at(word, number(key, &word.as_ref().0, 1..=MAX_FDB_ENTRIES)),
            None => Ok(default),
        };
        Ok(FdbConfig {
            entries: size("fdb_entries", &self.fdb_entries, default.entries)?,
            per_port: size("fdb_per_port", &self.fdb_per_port, default.per_port)?,
            age_seconds: match &self.fdb_age_seconds {
                Some(word) => at(word, number("fdb_age_seconds", &word.as_ref().0, 1..=MAX_FDB_AGE_SECONDS))?,
                None => default.age_seconds,
            },
        })
    }
}

impl PortSection {
    fn text(&self) -> PortText {
        let word = |word: &Spanned<Word>| word.as_ref().0.clone();
        let options = PortText::KEYS.iter().filter_map(|key| Some((*key, word(self.option(key)?))));
        PortText {
            name: word(&self.name),
            kind: word(&self.kind),
            target: word(&self.target),
            options: options.collect(),
        }
    }

    fn option(&self, key: &str) -> Option<&Spanned<Word>> {
        match key {
            "mode" => self.mode.as_ref(),
            "network" => self.network.as_ref(),
            "vlan" => self.vlan.as_ref(),
            "trunk" => self.trunk.as_ref(),
            "networks" => self.networks.as_ref(),
            "mtu" => self.mtu.as_ref(),
            "queues" => self.queues.as_ref(),
            "mac" => self.mac.as_ref(),
            "spoofcheck" => self.spoofcheck.as_ref(),
            "replace" => self.replace.as_ref(),
            "busy-poll" => self.busy_poll.as_ref(),
            "tx-checksum" => self.tx_checksum.as_ref(),
            "rate-rx" => self.rate_rx.as_ref(),
            "burst-rx" => self.burst_rx.as_ref(),
            "rate-tx" => self.rate_tx.as_ref(),
            "burst-tx" => self.burst_tx.as_ref(),
            "owner" => self.owner.as_ref(),
            _ => None,
        }
    }

    /// Where the value of `key` is.
    fn place(&self, key: &str) -> &Spanned<Word> {
        match key {
            "kind" => &self.kind,
            "target" => &self.target,
            _ => self.option(key).unwrap_or(&self.name),
        }
    }
}

fn check_worker_sections(sections: &[WorkerSection]) -> Result<Vec<Option<usize>>, Wrong> {
    let mut workers = Vec::new();
    for section in sections {
        let parse = |word: &Spanned<Word>| at(word, parse_cpu(&word.as_ref().0));
        workers.push(section.cpu.as_ref().map(parse).transpose()?);
        // Checked one by one, so that the message points at the worker that is one too many.
        let span = section.cpu.as_ref().map_or(0..0, Spanned::span);
        check_workers(&workers).map_err(|problem| Wrong { problem, span })?;
    }
    Ok(workers)
}

fn check_port_sections(sections: &[PortSection]) -> Result<Vec<PortConfig>, Wrong> {
    let mut ports: Vec<PortConfig> = Vec::new();
    for section in sections {
        let wrong = |error: InvalidPort| Wrong { span: section.place(error.key).span(), problem: error.problem };
        let port = section.text().parse().map_err(wrong)?;
        port.check_beside(&ports).map_err(wrong)?;
        ports.push(port);
    }
    Ok(ports)
}

fn absolute(word: &Spanned<Word>) -> Result<PathBuf, Wrong> {
    let path = PathBuf::from(&word.as_ref().0);
    if path.is_absolute() {
        return Ok(path);
    }
    at(word, Err(format!("the path must start with '/', not '{}'", path.display())))
}

/// Gives a problem the place of the word that has it.
fn at<T>(word: &Spanned<Word>, result: Result<T, String>) -> Result<T, Wrong> {
    result.map_err(|problem| Wrong { problem, span: word.span() })
}

/// A value as SPEC would write it: `100`, `"100"`, `true` and `[10, "20-29"]` become `100`, `100`, `on` and `10,20-29`.
struct Word(String);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WordVisitor)
    }
}

struct WordVisitor;

impl<'de> Visitor<'de> for WordVisitor {
    type Value = Word;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string, a whole number, true or false, or a list of those")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Word, E> {
        Ok(Word(text.into()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Word, E> {
        Ok(Word(value.to_string()))
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Word, E> {
        Ok(Word(if value { "on" } else { "off" }.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Word, A::Error> {
        let mut words = Vec::new();
        while let Some(Word(word)) = items.next_element()? {
            words.push(word);
        }
        Ok(Word(words.join(",")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<FileConfig, String> {
        FileConfig::parse(Path::new("s.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn everything() {
        let config = parse(
            r#"
            [control]
            socket = "/run/x.sock"
            group = "kvm"
            [state]
            dir = "/var/lib/x"
            [metrics]
            listen = "127.0.0.1:9090"
            [switch]
            mode = "poll"
            fdb_entries = 1000
            fdb_per_port = 10
            fdb_age_seconds = 60
            rebalance = false
            [[worker]]
            cpu = 1
            [[worker]]
            [[port]]
            name = "vm1"
            kind = "vhost-user"
            target = "/run/vm1.sock"
            mode = "server"
            network = "blue"
            vlan = 7
            trunk = [10, "20-22"]
            mtu = 9000
            queues = 4
            mac = "52:54:00:12:34:56"
            spoofcheck = true
            rate-rx = "1G"
            burst-rx = 2000000
            rate-tx = "500M"
            burst-tx = "1M"
            owner = "me"
            [[port]]
            name = "host"
            kind = "tap"
            target = "sluice0"
            trunk = "10,20"
            [[port]]
            name = "up"
            kind = "afxdp"
            target = "eth1"
            mode = "copy"
            replace = true
            busy-poll = true
            tx-checksum = false
            networks = ["green:100", "red"]
            "#,
        )
        .unwrap();
        assert_eq!(config.control.as_deref(), Some(Path::new("/run/x.sock")));
        assert_eq!(config.group.as_deref(), Some("kvm"));
        assert_eq!(config.state.as_deref(), Some(Path::new("/var/lib/x")));
        assert_eq!(config.metrics, Some(([127, 0, 0, 1], 9090).into()));
        assert_eq!(config.mode, Some(WorkerMode::Poll));
        assert_eq!(config.fdb, FdbConfig { entries: 1000, per_port: 10, age_seconds: 60 });
        assert_eq!((config.workers, config.rebalance), (vec![Some(1), None], Some(false)));
        let specs: Vec<_> = config.ports.iter().map(ToString::to_string).collect();
        assert_eq!(
            specs,
            [
                "vm1=vhost-user:/run/vm1.sock,mode=server,network=blue,vlan=7,trunk=10,20-22,mtu=9000,queues=4,\
                 mac=52:54:00:12:34:56,spoofcheck=on,rate-rx=1G,burst-rx=2M,rate-tx=500M,burst-tx=1M,owner=me",
                "host=tap:sluice0,trunk=10,20",
                "up=afxdp:eth1,mode=copy,replace=on,busy-poll=on,tx-checksum=off,networks=green:100,red",
            ]
        );
    }

    #[test]
    fn nothing_is_a_file_too() {
        assert_eq!(parse(""), Ok(FileConfig::default()));
    }

    #[test]
    fn mistakes_have_a_place() {
        let port = "[[port]]\nname = \"a\"\nkind = \"tap\"\ntarget = \"t0\"\n";
        let cases = [
            ("[contrl]\n".to_owned(), "s.toml:1:2: unknown key `contrl`, expected one of `control`"),
            ("[control]\nsockt = \"/x\"\n".into(), "s.toml:2:1: unknown key `sockt`"),
            ("[control]\nsocket = \"x\"\n".into(), "s.toml:2:10: the path must start with '/'"),
            ("[metrics]\nlisten = \"here\"\n".into(), "s.toml:2:10: listen must be like 127.0.0.1:9090"),
            ("[switch]\nmode = \"fast\"\n".into(), "s.toml:2:8: mode must be adaptive, poll or interrupt"),
            ("[switch]\nrebalance = 1\n".into(), "s.toml:2:13: rebalance must be on or off, not '1'"),
            ("[switch]\nfdb_entries = 0\n".into(), "s.toml:2:15: fdb_entries must be a number from 1"),
            ("[[worker]]\ncpu = 0\n[[worker]]\ncpu = 0\n".into(), "s.toml:4:7: CPU 0 is given twice"),
            ("[[worker]]\ncpu = -1\n".into(), "s.toml:2:7: cpu must be a number from 0 to 1023"),
            ("[[port]]\nname = \"a\"\n".into(), "s.toml:1:1: missing key `kind`"),
            (
                format!("{port}  vlan = 5000 # no\n"),
                "s.toml:5:10: vlan must be a number from 1 to 4094, not '5000' (in 'vlan = 5000 # no')",
            ),
            (format!("{port}vlan = 1.5\n"), "s.toml:5:8: invalid type: floating point `1.5`, expected a string"),
            (format!("{port}colour = 1\n"), "s.toml:5:1: unknown key `colour`, expected one of `name`"),
            (format!("{port}{port}"), "s.toml:6:8: port a is given twice"),
            (format!("{port}{}", port.replace("\"a\"", "\"b\"")), "s.toml:8:10: ports a and b have the same target"),
            (format!("{port}vlan = \n"), "s.toml:5:"),
            ("x".into(), "s.toml:1:"),
        ];
        for (text, expected) in cases {
            let found = parse(&text).unwrap_err();
            assert!(found.starts_with(expected), "{text:?}: {found:?} is not {expected:?}");
            assert!(!found.contains('\n'), "{found:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_there() {
        let error = FileConfig::read(Path::new("/nonexistent/s.toml")).unwrap_err().to_string();
        assert_eq!(error, "cannot read /nonexistent/s.toml: No such file or directory (os error 2)");
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(text in "(\\[\\[?(port|worker|control|ö)\\]\\]?\n|(name|cpu|vlan|ö) ?= ?([0-9]{1,9}|\"ö\"|true|\\[1\\])?\n|.*){0,6}") {
            let _ = parse(&text);
        }
    }
}
