//! Every check, in stages, with one closing line.

use anyhow::{Result, bail, ensure};
use clap::Args;
use e2e::machine;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::sanitizer;
use crate::setup;
use crate::stage::{self, Beside, cargo};

/// All of it together ends by then.
const LIMIT: Duration = Duration::from_secs(29 * 60);
/// Builds with a sanitizer begin with every crate, and are slow; nobody waits for a landing meanwhile.
const SANITIZED_LIMIT: Duration = Duration::from_secs(90 * 60);

/// For the database of advisories to come over the network.
const FETCH_LIMIT: Duration = Duration::from_secs(30);
/// The stage that needs it.
const ADVISORIES: &str = "advisories";

#[derive(Args)]
pub(crate) struct Options {
    /// Leave out the systems tests.
    #[arg(long)]
    fast: bool,
    /// Run the tests of memory and of hostile guests under the address sanitizer, and nothing else.
    #[arg(long, conflicts_with_all = ["fast", "only"])]
    asan: bool,
    /// Run the tests of what threads share under the thread sanitizer, and nothing else.
    #[arg(long, conflicts_with_all = ["fast", "only", "asan"])]
    tsan: bool,
    /// Run one stage only, or one file of the systems tests (such as `traffic`).
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Sums over all that `cargo test` has said.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    failed_stages: Vec<String>,
    left_out: Vec<String>,
}

impl Tally {
    /// Takes a line such as `test result: ok. 5 passed; 0 failed; 0 ignored; …`.
    fn take(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        let number = |label: &str| -> u64 {
            let before = counts.split(label).next().unwrap_or_default();
            before.split_whitespace().next_back().and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        self.passed += number(" passed");
        self.failed += number(" failed");
    }

    /// Whether all is well; a stage that was asked for has to have been run.
    fn verdict(&self, only: Option<&str>) -> Result<()> {
        ensure!(self.failed == 0, "not everything is well");
        if let Some(name) = only {
            ensure!(
                !self.left_out.iter().any(|left_out| left_out == name),
                "{name} was left out; see above what it wants"
            );
        }
        Ok(())
    }
}

/// The files of the systems tests, shortest first, so that simple mistakes show early.
const SYSTEMS: [&str; 14] = [
    "errors",
    "traffic",
    "isolation",
    "tap",
    "upgrade",
    "hostile",
    "testpmd",
    "idle",
    "multiqueue",
    "offloads",
    "uplink",
    "kubevirt",
    "lifecycle",
    "migration",
];
/// Our programs, beside the switch, that systems tests run.
const PARTS: [&str; 3] = ["sluice-device-plugin", "sluice-cni", "sluice-binding-sidecar"];

/// All tests but the systems tests.
const UNIT: &str = "unit";

/// The tests of what the systems tests rely on.
const HARNESS: &str = "harness";

/// The check of what is in `deploy/`, and what it exits with if it could not check anything: by itself, or for want of Python.
const DEPLOY: &str = "deploy";
const SKIPPED: [i32; 2] = [77, 127];

/// A command, all of whose tests have to pass.
pub(crate) struct Stage {
    pub(crate) name: &'static str,
    pub(crate) command: Command,
}

fn stages(options: &Options) -> Result<Vec<Stage>> {
    let target = machine::target()?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--quiet"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    let mut stages = vec![
        Stage { name: "fmt", command: cargo(&["fmt", "--all", "--check"]) },
        Stage {
            name: "clippy",
            command: cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
        },
        Stage { name: "doc", command: doc },
    ];
    if cargo(&["deny", "--version"]).output().is_ok_and(|output| output.status.success()) {
        stages.push(Stage { name: "deny", command: cargo(&["deny", "check", "licenses", "bans", "sources"]) });
        let wanted = options.only.as_deref().is_none_or(|only| only == ADVISORIES);
        stages.extend(wanted.then(advisories).flatten());
    } else {
        println!("cargo-deny is not installed; `unit` checks licences, sources and build scripts by itself");
    }
    if !options.fast {
        let xtask = std::env::current_exe().unwrap_or_else(|_| "xtask".into());
        let mut setup = Command::new(xtask);
        setup.arg("setup");
        stages.push(Stage { name: "setup", command: setup });
    }
    // `setup` installs its Python.
    let mut deploy = Command::new(machine::repository().join("deploy/check"));
    deploy.env("CARGO_TARGET_DIR", &target);
    stages.push(Stage { name: DEPLOY, command: deploy });
    let mut unit = cargo(&["test", "--workspace", "--exclude", "e2e", "--no-fail-fast", "--quiet"]);
    // It is built before the first of them runs.
    unit.env("SLUICE_BIN", target.join("debug/sluice"));
    stages.push(Stage { name: UNIT, command: unit });
    // The library of the systems tests has tests of its own. Of the whole workspace, with whose features all else is built.
    let harness = cargo(&["test", "--workspace", "--lib", "--quiet", "--", "soak::", "machine::", "process::"]);
    stages.push(Stage { name: HARNESS, command: harness });
    if !options.fast {
        stages.push(Stage { name: "build", command: release_build() });
        if options.only.is_some() {
            // Otherwise they are there: their own tests run them.
            let mut parts = cargo(&["build", "--quiet", "--bins"]);
            parts.args(PARTS.iter().flat_map(|part| ["-p", part]));
            stages.push(Stage { name: "parts", command: parts });
        }
        for name in SYSTEMS {
            // Of the whole workspace, with whose features all dependencies are built by now.
            let mut command = cargo(&["test", "--workspace", "--test", name, "--quiet", "--", "--test-threads=1"]);
            // The release build is what people run; backtraces of a failed test are those of the harness.
            command.env("SLUICE_BIN", target.join("release/sluice")).env("RUST_LIB_BACKTRACE", "0");
            stages.push(Stage { name, command });
        }
        stages.extend(dpdk_stages(&target));
    }
    Ok(stages)
}

/// What people run. Much of it is done on one CPU.
fn release_build() -> Command {
    cargo(&["build", "--release", "-p", "sluice", "--bins"])
}

/// Looks known vulnerabilities of dependencies up, where their database can be had.
fn advisories() -> Option<Stage> {
    let fetched = stage::run(cargo(&["deny", "fetch", "db"]), Some(Instant::now() + FETCH_LIMIT), |_| ());
    if fetched.is_ok_and(|outcome| outcome.status.success()) {
        let check = cargo(&["deny", "check", "--disable-fetch", "advisories"]);
        return Some(Stage { name: ADVISORIES, command: check });
    }
    println!("the database of advisories cannot be had; known vulnerabilities are not looked up");
    None
}

/// Whether a stage can only be run with libdpdk.
fn needs_dpdk(stage: &str) -> bool {
    stage.contains("dpdk")
}

/// Asked only when its stages come, since the stage `setup` installs it.
fn has_dpdk() -> bool {
    let query = Command::new("pkg-config").args(["--exists", "libdpdk >= 22.11"]).status();
    query.is_ok_and(|status| status.success())
}

/// The feature `dpdk`, last, since it leaves a switch of its own in the target folder.
fn dpdk_stages(target: &Path) -> [Stage; 3] {
    let mut lint = cargo(&["clippy", "--workspace", "--features", "sluice/dpdk", "--all-targets", "--quiet"]);
    lint.args(["--", "-D", "warnings"]);
    // The test of the repository has nothing to do with it: with a test beside it, the program is built as well.
    let mut unit = cargo(&["test", "--workspace", "--exclude", "e2e", "--features", "sluice/dpdk", "--quiet"]);
    unit.args(["--lib", "--test", "repo", "dpdk"]);
    let mut systems = cargo(&["test", "--workspace", "--test", "uplink", "--quiet", "--", "--test-threads=1"]);
    // Not those in which the wire goes, or the uplink is in trouble: a tap's link stays, and trouble is AF_XDP's own.
    systems.args(["over_a_wire", "over_a_bridge", "a_network_is_a_vlan", "migrates", "wireshark_reads_captures"]);
    systems.env("SLUICE_BIN", target.join("debug/sluice")).env("SLUICE_UPLINK", "dpdk").env("RUST_LIB_BACKTRACE", "0");
    [
        Stage { name: "dpdk-clippy", command: lint },
        Stage { name: "dpdk", command: unit },
        Stage { name: "uplink-dpdk", command: systems },
    ]
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    let mut tally = Tally::default();
    let mut stages = match options {
        Options { asan: true, .. } => sanitizer::addresses()?,
        Options { tsan: true, .. } => sanitizer::threads()?,
        _ => stages(options)?,
    };
    if let Some(only) = &options.only {
        let names: Vec<&str> = stages.iter().map(|stage| stage.name).collect();
        if !names.contains(&only.as_str()) {
            bail!("no stage is called {only}; there are {}", names.join(", "));
        }
        if needs_dpdk(only) && !has_dpdk() {
            bail!("there is no libdpdk for the stage {only}; `cargo xtask setup` installs it");
        }
        let is_system = SYSTEMS.contains(&only.as_str());
        stages.retain(|stage| match stage.name {
            "setup" | "build" | "parts" if is_system => true,
            // It builds the switch that the other one runs.
            "dpdk" if only == "uplink-dpdk" => true,
            name => name == only,
        });
    }
    let limit = if options.asan || options.tsan { SANITIZED_LIMIT } else { LIMIT };
    let count = stages.len();
    // Beside the stages before its own, which then finds all done, or waits for the rest of it.
    let builds = stages.iter().skip(1).any(|stage| stage.name == "build");
    let beside = builds.then(|| Beside::start(release_build())).transpose()?;
    for (number, stage) in (1..).zip(stages) {
        if !run_stage(stage, &format!("[{number}/{count}]"), start + limit, &mut tally)? {
            break;
        }
    }
    drop(beside);
    if !tally.failed_stages.is_empty() {
        println!("failed: {}", tally.failed_stages.join(", "));
    }
    if !tally.left_out.is_empty() {
        println!("left out, for want of something (see above): {}", tally.left_out.join(", "));
    }
    println!("all stages took {} s", start.elapsed().as_secs());
    println!("{} passed, {} failed", tally.passed, tally.failed);
    tally.verdict(options.only.as_deref())
}

/// Whether a stage selects tests by their names, which may change.
fn selects_by_name(name: &str) -> bool {
    matches!(name, HARNESS | "dpdk" | "uplink-dpdk")
}

/// Runs a stage; gives whether the later ones make sense.
fn run_stage(stage: Stage, place: &str, deadline: Instant, tally: &mut Tally) -> Result<bool> {
    let Stage { name, mut command } = stage;
    if needs_dpdk(name) && !has_dpdk() {
        println!("==> {place} {name}: left out, since there is no libdpdk");
        tally.left_out.push(name.to_owned());
        return Ok(true);
    }
    println!("==> {place} {name}");
    if name == UNIT {
        command.envs(setup::foreign().iter().filter(|foreign| foreign.is_here).map(|foreign| (foreign.variable, "1")));
    }
    let (start, passed, failed) = (Instant::now(), tally.passed, tally.failed);
    let outcome = stage::run(command, Some(deadline), |line| tally.take(line))?;
    let seconds = start.elapsed().as_secs();
    if name == UNIT {
        // Its tests themselves get what can be had.
        let missing = setup::foreign().into_iter().filter(|foreign| !foreign.is_here);
        tally.left_out.extend(missing.map(|foreign| foreign.name.to_owned()));
    }
    let is_vain = outcome.status.success() && selects_by_name(name) && tally.passed == passed;
    if outcome.status.success() && !is_vain {
        println!("==> {place} {name}: ok, {seconds} s");
        return Ok(true);
    }
    if name == DEPLOY && outcome.status.code().is_some_and(|code| SKIPPED.contains(&code)) {
        println!("==> {place} {name}: left out, since there is no python3 or its packages cannot be had");
        tally.left_out.push(name.to_owned());
        return Ok(true);
    }
    let why = if outcome.late {
        "out of time".to_owned()
    } else if is_vain {
        "no test has the names that it asks for".to_owned()
    } else {
        outcome.status.to_string()
    };
    println!("==> {place} {name}: FAILED ({why}), {seconds} s");
    tally.failed_stages.push(name.to_owned());
    if tally.failed == failed {
        // What does not even get to its tests counts as one that failed.
        tally.failed += 1;
    }
    Ok(!outcome.late && !matches!(name, "setup" | "build" | "parts"))
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn summaries_of_cargo_test_add_up() {
        let mut tally = Tally::default();
        tally.take("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        tally.take("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        tally.take("running 5 tests");
        assert_eq!((tally.passed, tally.failed), (15, 2));
    }

    #[test]
    fn what_was_asked_for_is_not_left_out() {
        let tally = Tally { left_out: vec!["deploy".into()], ..Tally::default() };
        assert!(tally.verdict(None).is_ok() && tally.verdict(Some("unit")).is_ok());
        assert!(tally.verdict(Some("deploy")).is_err());
        assert!(Tally { failed: 1, ..Tally::default() }.verdict(None).is_err());
    }
}
