//! Fuzzers: libFuzzer over the targets of `fuzz/`, and a hostile frontend with a will of its own against a live switch.
//!
//! libFuzzer wants coverage and a sanitizer, which are not for sale on the stable toolchain; `RUSTC_BOOTSTRAP` opens
//! the shop. The flags are those of `cargo fuzz`, which works here as well where it is installed.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use e2e::machine;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::parse_minutes;
use crate::stage::{self, build_release, cargo, must};

pub(crate) const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// The hostile frontend, among the names of targets.
const FRONTEND: &str = "frontend";
/// The variable with its first seed.
const SEED: &str = "SLUICE_FUZZ_SEED";
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address";

#[derive(Args)]
pub(crate) struct Options {
    /// One target only, or `frontend` for the hostile frontend against a live switch.
    target: Option<String>,
    /// Minutes for each of them; fractions are welcome.
    #[arg(long, default_value_t = 1.0, value_parser = parse_minutes)]
    minutes: f64,
    /// Afterwards, bring what reaches new code into the corpus that is committed.
    #[arg(long)]
    keep: bool,
}

fn folder() -> PathBuf {
    machine::repository().join("fuzz")
}

fn targets() -> Result<Vec<String>> {
    let entries = fs::read_dir(folder().join("fuzz_targets")).context("cannot list the targets")?;
    let stem = |entry: fs::DirEntry| Some(entry.path().file_stem()?.to_string_lossy().into_owned());
    let mut names: Vec<_> = entries.flatten().filter_map(stem).collect();
    names.sort();
    names.push(FRONTEND.to_owned());
    Ok(names)
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut names = targets()?;
    if let Some(only) = &options.target {
        ensure!(names.contains(only), "no target is called {only}; there are {}", names.join(", "));
        names.retain(|name| name == only);
    }
    if names.iter().any(|name| name != FRONTEND) {
        println!("==> building the fuzzers, with the address sanitizer");
        must("building the fuzzers", build())?;
    }
    // Never 0, which libFuzzer takes for no end.
    let (seconds, seed) = ((options.minutes * 60.0).ceil() as u64, seed(std::env::var(SEED).ok())?);
    let mut failed = Vec::new();
    for name in &names {
        println!("==> {name}, {} min", options.minutes);
        let command = if name == FRONTEND { frontend(seconds, seed)? } else { fuzzer(name, seconds)? };
        if !stage::run(command, None, |_| ())?.status.success() {
            failed.push(name.as_str());
        } else if options.keep && name != FRONTEND {
            must("merging the corpus", merge(name)?)?;
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    let mut advice = String::new();
    if failed.contains(&FRONTEND) {
        advice += &format!(". {SEED}={seed} repeats what `{FRONTEND}` did");
    }
    if failed.iter().any(|name| *name != FRONTEND) {
        advice += ". Inputs are in fuzz/artifacts; with the mistake mended, move them to fuzz/regressions/TARGET, where \
                   ordinary tests replay them";
    }
    bail!("found something: {}{advice}", failed.join(", "))
}

/// The hostile frontend's first seed: the one that is wanted, or another one each time.
fn seed(wanted: Option<String>) -> Result<u64> {
    match wanted {
        Some(text) => text.parse().with_context(|| format!("{SEED}={text}")),
        None => Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()),
    }
}

fn build() -> Command {
    let mut command = cargo(&["build", "--release", "--target", TRIPLE]);
    command.current_dir(folder()).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", FLAGS);
    // Where we look for them, whatever the workspace's own is.
    command.env("CARGO_TARGET_DIR", folder().join("target"));
    command
}

fn binary(name: &str) -> Command {
    Command::new(folder().join("target").join(TRIPLE).join("release").join(name))
}

/// What was found so far, in a folder that is not committed, and what is.
fn corpora(name: &str) -> Result<[PathBuf; 2]> {
    let folders = [folder().join("target/corpus").join(name), folder().join("corpus").join(name)];
    for folder in &folders {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    Ok(folders)
}

fn fuzzer(name: &str, seconds: u64) -> Result<Command> {
    let artifacts = folder().join("artifacts").join(name);
    fs::create_dir_all(&artifacts).with_context(|| format!("cannot create {}", artifacts.display()))?;
    let mut command = binary(name);
    command.args(corpora(name)?).arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.arg(format!("-max_total_time={seconds}"));
    command.args(["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"]);
    Ok(command)
}

/// Adds to the committed corpus what reaches more than it does.
fn merge(name: &str) -> Result<Command> {
    let [found, kept] = corpora(name)?;
    let mut command = binary(name);
    command.args(["-merge=1", "-max_len=1024"]).args([kept, found]);
    Ok(command)
}

fn frontend(seconds: u64, seed: u64) -> Result<Command> {
    build_release(&["sluice"])?;
    println!("seeds from {seed} on");
    let mut command = cargo(&["test", "-p", "e2e", "--test", "hostile", "--quiet", "--", "random", "--nocapture"]);
    command.env("SLUICE_BIN", machine::target()?.join("release/sluice")).env("RUST_LIB_BACKTRACE", "0");
    command.env("SLUICE_FUZZ_SECONDS", seconds.to_string()).env(SEED, seed.to_string());
    Ok(command)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_wanted_seed_is_taken() {
        assert_eq!(super::seed(Some("42".into())).unwrap(), 42);
        assert!(super::seed(Some("x".into())).is_err() && super::seed(None).unwrap() > 42);
    }
}
