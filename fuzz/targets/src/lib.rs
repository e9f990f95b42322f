//! What the fuzzers run. Each target takes bytes, makes of them what it needs, and panics if the switch does.
//!
//! The fuzzers proper are in `fuzz/fuzz_targets`, one line each, and need libFuzzer; this crate does not, so the corpus
//! and everything ever found are replayed by ordinary tests (`tests/replay.rs`).

mod config;
mod domain;
mod guest;
mod merge;
mod messages;
mod offload;
mod parsing;
mod rings;

/// A target: its name, which is that of its corpus, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("split", rings::split),
    ("packed", rings::packed),
    ("messages", messages::run),
    ("parsing", parsing::run),
    ("offload", offload::run),
    ("merge", merge::run),
    ("config", config::run),
    ("domain", domain::run),
];

/// Runs a target by its name.
///
/// # Panics
/// If there is none of that name, or it found something.
pub fn run(name: &str, data: &[u8]) {
    match TARGETS.iter().find(|target| target.0 == name) {
        Some((_, target)) => target(data),
        None => panic!("no target is called {name}"),
    }
}

/// RFC 1071 word by word, as slow as it gets: the oracle for checksums.
fn ones_complement(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
