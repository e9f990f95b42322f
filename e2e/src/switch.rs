//! The switch under test: `sluice run`, its command line, and what it costs.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::net::Namespace;
use crate::process::Process;
use crate::scratch::Scratch;
use crate::{machine, wait};

/// The switch answers long before that.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A socket that is there gets connected well before that.
const UP_LIMIT: Duration = Duration::from_secs(30);

/// The switch's program.
pub fn program() -> Result<PathBuf> {
    machine::built_program("sluice", "SLUICE_BIN")
}

/// Runs the command line with exactly these arguments, to its end.
pub fn sluice(arguments: &[&str]) -> Result<Output> {
    let program = program()?;
    Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// A running switch; ended with SIGTERM at drop.
#[derive(Debug)]
pub struct Switch {
    process: Process,
    arguments: Vec<String>,
    /// Network namespace that it runs in.
    namespace: Option<String>,
    scratch: Scratch,
}

impl Switch {
    /// Starts `sluice run` on the switch's CPU with a control socket and state of its own and these
    /// further arguments, and waits until it answers.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        Self::start_at(None, arguments)
    }

    /// [`Switch::start`] in a network namespace.
    pub fn start_in(namespace: &Namespace, arguments: &[&str]) -> Result<Self> {
        Self::start_at(Some(namespace.name().to_owned()), arguments)
    }

    fn start_at(namespace: Option<String>, arguments: &[&str]) -> Result<Self> {
        let scratch = Scratch::new("sw")?;
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let process = spawn(&scratch, &arguments, namespace.as_deref())?;
        let mut switch = Self { process, arguments, namespace, scratch };
        switch.wait_ready()?;
        Ok(switch)
    }

    /// Ends the switch (SIGTERM, or SIGKILL if `crash`) and starts it again with the same state and these arguments.
    pub fn restart(&mut self, crash: bool, arguments: &[&str]) -> Result<()> {
        self.end(crash)?;
        self.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.begin_again()
    }

    /// Ends the switch: by SIGTERM, or SIGKILL if `crash`.
    pub fn end(&mut self, crash: bool) -> Result<()> {
        if crash {
            self.process.kill();
            return Ok(());
        }
        let status = self.process.terminate(START_LIMIT)?;
        if !status.success() {
            bail!("the switch ended with {status} upon SIGTERM:\n{}", self.process.log_tail());
        }
        Ok(())
    }

    /// Starts the switch that has ended, with the same state and arguments.
    pub fn begin_again(&mut self) -> Result<()> {
        self.process = spawn(&self.scratch, &self.arguments, self.namespace.as_deref())?;
        self.wait_ready()
    }

    /// An error if the switch is no longer running.
    pub fn check_alive(&mut self) -> Result<()> {
        self.process.check_alive()
    }

    /// Starts a new process that takes over from the running one, and waits for the old one's end. Returns for how long
    /// nothing was forwarded, as the new one says. If the new one fails the old one goes on.
    pub fn take_over(&mut self) -> Result<Duration> {
        let logged = self.log().len();
        let arguments = [&self.arguments[..], &["--takeover".to_owned()]].concat();
        let mut new = spawn(&self.scratch, &arguments, self.namespace.as_deref())?;
        let old = &mut self.process;
        let status = wait::until("the old process to end", START_LIMIT, || {
            new.check_alive()?;
            old.exited()
        })?;
        self.process = new;
        if !status.success() {
            bail!("the old process ended with {status}:\n{}", self.process.log_tail());
        }
        self.wait_ready()?;
        let log = self.log();
        let still = log[logged..].split("still_us=").nth(1).and_then(|rest| rest.split_whitespace().next());
        Ok(Duration::from_micros(still.context("the new process does not say how long it took")?.parse()?))
    }

    fn wait_ready(&mut self) -> Result<()> {
        let (process, control) = (&mut self.process, control_path(&self.scratch));
        let control = control.to_string_lossy();
        wait::until_true("the switch to answer", START_LIMIT, || {
            process.check_alive()?;
            Ok(sluice(&["status", "--json", "--socket", &control])?.status.success())
        })
    }

    /// Path of its control socket.
    pub fn control(&self) -> PathBuf {
        control_path(&self.scratch)
    }

    /// Its directory of state.
    pub fn state(&self) -> PathBuf {
        self.scratch.join("state")
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The end of what it has logged, for error messages.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// Runs a command of the command line against this switch, whatever comes of it.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        let control = self.control();
        sluice(&[arguments, &["--socket", &control.to_string_lossy()]].concat())
    }

    /// Runs a command that has to succeed; gives what it printed with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.command(&[arguments, &["--json"]].concat())?;
        if !output.status.success() {
            bail!("sluice {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        let text = || format!("sluice {} printed {}", arguments.join(" "), String::from_utf8_lossy(&output.stdout));
        serde_json::from_slice(&output.stdout).with_context(text)
    }

    /// Adds a port.
    pub fn add_port(&self, spec: &str) -> Result<()> {
        self.json(&["port", "add", spec]).map(drop)
    }

    /// Removes a port.
    pub fn del_port(&self, name: &str) -> Result<()> {
        self.json(&["port", "del", name]).map(drop)
    }

    /// A port as the switch sees it.
    pub fn port(&self, name: &str) -> Result<Port> {
        self.json(&["port", "show", name]).map(Port)
    }

    /// Waits until a port is in a state.
    pub fn wait_port(&self, name: &str, state: &str) -> Result<()> {
        self.wait_port_for(name, state, UP_LIMIT)
    }

    /// [`Switch::wait_port`] with a limit of one's own.
    pub fn wait_port_for(&self, name: &str, state: &str, limit: Duration) -> Result<()> {
        let what = format!("port {name} to be {state}");
        wait::until_true(&what, limit, || Ok(self.port(name)?.state() == state))
    }

    /// What the switch costs now.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.pid())
    }

    /// Bytes that the switch has allocated and not freed, as it says itself.
    pub fn allocated(&self) -> Result<u64> {
        self.json(&["status"])?["memory_bytes"].as_u64().context("no memory_bytes in the status")
    }
}

fn control_path(scratch: &Scratch) -> PathBuf {
    scratch.join("ctl.sock")
}

fn spawn(scratch: &Scratch, arguments: &[String], namespace: Option<&str>) -> Result<Process> {
    let mut command = match namespace {
        // It becomes the program.
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", namespace]).arg(program()?);
            command
        }
        None => Command::new(program()?),
    };
    command.arg("run").arg("--control").arg(control_path(scratch)).arg("--state").arg(scratch.join("state"));
    command.args(arguments);
    Process::start("sluice", command, &scratch.join("sluice.log"), &machine::cpus()?.switch)
}

/// A port as `sluice port show --json` gives it.
#[derive(Debug, Clone)]
pub struct Port(pub Value);

impl Port {
    /// `connecting`, `up`, `down` or `failed`.
    pub fn state(&self) -> &str {
        self.0["state"].as_str().unwrap_or("unknown")
    }

    /// Whether the guest's driver accepted a feature, such as `RING_PACKED`.
    pub fn has(&self, feature: &str) -> bool {
        self.0["features"].as_array().is_some_and(|names| names.iter().any(|name| name == feature))
    }

    /// Sum over the queues of one counter, such as `rx_frames`.
    pub fn count(&self, counter: &str) -> u64 {
        self.queues().iter().filter_map(|queue| queue[counter].as_u64()).sum()
    }

    /// Its queues.
    pub fn queues(&self) -> &[Value] {
        self.0["queues"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Frames dropped, for one reason.
    pub fn dropped_for(&self, reason: &str) -> u64 {
        self.0["drops"][reason].as_u64().unwrap_or(0)
    }

    /// Frames dropped, for any reason.
    pub fn dropped(&self) -> u64 {
        let reasons = self.0["drops"].as_object();
        reasons.into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum()
    }
}

/// What a process costs at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// CPU time of all its threads so far.
    pub cpu: Duration,
    /// Resident memory in KiB, without what it shares with guests.
    pub resident_kib: u64,
    /// Memory in KiB that is the process's alone and no file's: not its program, not what guests share with it.
    pub private_kib: u64,
    /// Number of threads.
    pub threads: usize,
    /// Number of open file descriptors.
    pub fds: usize,
}

impl Usage {
    /// Reads it from `/proc`.
    pub fn of(pid: u32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let (mut nanoseconds, mut threads) = (0, 0);
        for task in fs::read_dir(proc.join("task")).with_context(|| format!("no process {pid}"))?.flatten() {
            // A thread may end while we look.
            let Ok(statistics) = fs::read_to_string(task.path().join("schedstat")) else {
                continue;
            };
            threads += 1;
            nanoseconds += statistics.split(' ').next().and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Self {
            cpu: Duration::from_nanos(nanoseconds),
            resident_kib: resident_kib(&proc.join("smaps"))?,
            private_kib: private_kib(&proc.join("status"))?,
            threads,
            fds: fs::read_dir(proc.join("fd"))?.count(),
        })
    }
}

/// Sums the resident size of all mappings but those of guests' memory files.
fn resident_kib(smaps: &Path) -> Result<u64> {
    let text = fs::read_to_string(smaps).with_context(|| format!("cannot read {}", smaps.display()))?;
    let (mut sum, mut is_guest) = (0, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if !is_guest => sum += words.next().and_then(|size| size.parse::<u64>().ok()).unwrap_or(0),
            Some(range) if range.contains('-') => is_guest = line.contains("/memfd:"),
            _ => (),
        }
    }
    Ok(sum)
}

fn private_kib(status: &Path) -> Result<u64> {
    let text = fs::read_to_string(status).with_context(|| format!("cannot read {}", status.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.context("no RssAnon in the status of a process")?.parse().context("RssAnon is no number")
}
