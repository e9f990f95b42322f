//! Tests against builds that notice what compilers do not: accesses to memory that is not ours, and data races.

use anyhow::{Context, Result, ensure};
use e2e::machine;
use std::path::Path;
use std::process::Command;

use crate::fuzz::TRIPLE;
use crate::stage::cargo;
use crate::test::Stage;

/// What is linked in for the thread sanitizer, and what it keeps to itself.
const THREADS: &str = "xtask/src/sanitizer/threads.c";
const SUPPRESSIONS: &str = "xtask/src/sanitizer/threads.supp";

/// The dataplane's tests that touch guest memory or have threads meet.
const DATAPLANE: [&str; 9] =
    ["test", "-p", "sluice", "--lib", "--test", "vhost_session", "--test", "control", "--quiet"];

/// Cargo, for a build with a sanitizer in a target folder of its own.
fn sanitized(arguments: &[&str], folder: &Path, flags: &str) -> Command {
    let mut command = cargo(arguments);
    command.env("CARGO_BUILD_TARGET", TRIPLE).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags);
    // Code that is not optimised at all is too slow for the time limits of the tests.
    command.env("CARGO_TARGET_DIR", folder).env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    command
}

/// Of the address sanitizer, for programs that run on behind a system call filter: it finds leaks at the exit by a fork and
/// ptrace, which are not to be had there. Freed memory is kept for a while to notice its use, not so much that it
/// passes for a leak.
const BEHIND_A_FILTER: &str = "detect_leaks=0:quarantine_size_mb=2:thread_local_quarantine_size_kb=64";
/// Tests that such a build cannot pass: starts within 300 ms, which it is too slow for, and memory given back to the
/// system, which its allocator keeps.
const NOT_SANITIZED: [&str; 3] =
    ["split_rings_survive_crashes", "packed_rings_survive_crashes", "memory::captures_leave_no_memory_behind"];

/// The tests of memory and of hostile guests under the address sanitizer.
pub(crate) fn addresses() -> Result<Vec<Stage>> {
    let (folder, flags) = (&machine::target()?.join("asan"), "-Zsanitizer=address");
    let mut programs = sanitized(
        &["test", "-p", "sluice", "--test", "takeover", "--test", "process", "--quiet", "--", "--exact"],
        folder,
        flags,
    );
    programs.args(NOT_SANITIZED.iter().flat_map(|name| ["--skip", name])).env("ASAN_OPTIONS", BEHIND_A_FILTER);
    let mut hostile = cargo(&["test", "-p", "e2e", "--test", "hostile", "--quiet", "--", "--test-threads=1"]);
    hostile.env("SLUICE_BIN", folder.join(TRIPLE).join("debug/sluice")).env("RUST_LIB_BACKTRACE", "0");
    hostile.env("ASAN_OPTIONS", BEHIND_A_FILTER);
    Ok(vec![
        Stage { name: "dataplane", command: sanitized(&DATAPLANE, folder, flags) },
        Stage { name: "programs", command: programs },
        Stage { name: "build", command: sanitized(&["build", "-p", "sluice", "--bins"], folder, flags) },
        Stage { name: "hostile", command: hostile },
    ])
}

/// The test that maps half of what a guest may have at most, for which there is no room beside this sanitizer's notes.
const TERABYTES: &str = "mem::tests::refuses_bad_regions";

/// The tests of what threads share under the thread sanitizer.
pub(crate) fn threads() -> Result<Vec<Stage>> {
    let folder = &machine::target()?.join("tsan");
    let flags = format!("-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer {}", wrap(folder)?);
    let mut dataplane = sanitized(&DATAPLANE, folder, &flags);
    dataplane.args(["--", "--exact", "--skip", TERABYTES]);
    let suppressions = machine::repository().join(SUPPRESSIONS);
    dataplane.env("TSAN_OPTIONS", format!("suppressions={}", suppressions.display()));
    Ok(vec![Stage { name: "dataplane", command: dataplane }])
}

/// Compiles the wrappers of the standard library's functions; gives the flags that link them in.
fn wrap(folder: &Path) -> Result<String> {
    let (object, source) = (folder.join("threads.o"), machine::repository().join(THREADS));
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    run(Command::new("cc").args(["-O2", "-Wall", "-Werror", "-c", "-o"]).arg(&object).arg(source))?;
    let symbols = run(Command::new("nm").arg("-j").arg(&object))?;
    Ok(wrapped(&symbols).fold(link(&object), |flags, symbol| format!("{flags} -Clink-arg=-Wl,--wrap={symbol}")))
}

fn link(object: &Path) -> String {
    format!("-Clink-arg={}", object.display())
}

/// The functions that wrappers are there for, of the symbols in their object file.
fn wrapped(symbols: &str) -> impl Iterator<Item = &str> {
    symbols.lines().filter_map(|symbol| symbol.strip_prefix("__wrap_"))
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    ensure!(output.status.success(), "{program} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wrapper_is_linked_in() {
        let symbols = "__real__RNvA\n__tsan_acquire\n__wrap__RNvA\n__wrap__RNvB\ncall_and_release\n";
        assert_eq!(wrapped(symbols).collect::<Vec<_>>(), ["_RNvA", "_RNvB"]);
    }
}
