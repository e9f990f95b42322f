//! The corpus, and whatever a fuzzer ever found, once more: no fuzzer needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

fn inputs(folder: &str, target: &str) -> Vec<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder).join(target);
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Some targets count the descriptors of the process.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn everything_ever_found() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, target) in fuzz_targets::TARGETS {
        let corpus = inputs("corpus", name);
        assert!(!corpus.is_empty(), "{name} has no corpus");
        for path in corpus.into_iter().chain(inputs("regressions", name)) {
            let data = std::fs::read(&path).unwrap();
            assert!(std::panic::catch_unwind(|| target(&data)).is_ok(), "{name}: {}", path.display());
        }
    }
}

/// Bytes from a generator, so that the targets are tried a little wherever tests run.
#[test]
fn a_little_of_everything() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for (name, target) in fuzz_targets::TARGETS {
        for round in 0..300 {
            let mut data = Vec::new();
            for _ in 0..round % 100 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                data.extend(state.to_le_bytes());
            }
            assert!(std::panic::catch_unwind(|| target(&data)).is_ok(), "{name}: {data:?}");
        }
    }
}
