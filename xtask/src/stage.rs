//! One step of a task: a command whose output people see as it comes, ended when we are.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Process group of the command that runs now; 0 for none.
static GROUP: AtomicI32 = AtomicI32::new(0);
/// The same of the one that runs beside it.
static BESIDE: AtomicI32 = AtomicI32::new(0);

/// Ends the running commands with all that they have started, then us. Only async-signal-safe calls.
extern "C" fn end_with_command(signal: libc::c_int) {
    for group in [&GROUP, &BESIDE].map(|group| group.load(Ordering::SeqCst)) {
        if group > 0 {
            // SAFETY: kill may be called in a signal handler and takes no pointers.
            unsafe { libc::kill(-group, libc::SIGTERM) };
        }
    }
    // SAFETY: as above, for _exit.
    unsafe { libc::_exit(128 + signal) };
}

fn watch_signals() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let handler = end_with_command as extern "C" fn(libc::c_int) as libc::sighandler_t;
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: the handler is async-signal-safe and lives for ever.
            let before = unsafe { libc::signal(signal, handler) };
            if before == libc::SIG_IGN {
                // Whoever started us wants that, as nohup does.
                // SAFETY: no pointers.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
        }
    });
}

/// How a command has ended.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    /// Whether it was ended because its time was over.
    pub(crate) late: bool,
}

/// Runs a command in a process group of its own, which takes its children along when it must end early.
/// `line` sees each line of its standard output.
pub(crate) fn run(mut command: Command, deadline: Option<Instant>, mut line: impl FnMut(&str)) -> Result<Outcome> {
    watch_signals();
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    let group = child.id() as i32;
    GROUP.store(group, Ordering::SeqCst);
    let output = child.stdout.take().context("no pipe to the command's output")?;
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let Some(deadline) = deadline else {
            return false;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let late = is_done.recv_timeout(left) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late {
            // SAFETY: no pointers; the group is that of our child, which is not reaped before `done`.
            unsafe { libc::kill(-group, libc::SIGTERM) };
            if is_done.recv_timeout(Duration::from_secs(10)).is_err() {
                // SAFETY: as above.
                unsafe { libc::kill(-group, libc::SIGKILL) };
            }
        }
        late
    });
    for text in BufReader::new(output).split(b'\n') {
        let text = text.context("cannot read the command's output")?;
        let text = String::from_utf8_lossy(&text);
        // Nobody may be reading our own output any more.
        let _ = writeln!(std::io::stdout(), "{text}");
        line(&text);
    }
    let status = child.wait()?;
    GROUP.store(0, Ordering::SeqCst);
    drop(done);
    let late = watchdog.join().unwrap_or(false);
    Ok(Outcome { status, late })
}

/// A command that does its work silently beside others, with what these leave of the CPUs, and is ended when this is dropped.
pub(crate) struct Beside(Child);

impl Beside {
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        watch_signals();
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.process_group(0).spawn().context("cannot start a command beside others")?;
        BESIDE.store(child.id() as i32, Ordering::SeqCst);
        // SAFETY: no pointers; the group is our child's. If it fails the child is merely not as modest.
        unsafe { libc::setpriority(libc::PRIO_PGRP, child.id(), 19) };
        Ok(Self(child))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        BESIDE.store(0, Ordering::SeqCst);
        if let Ok(None) = self.0.try_wait() {
            // SAFETY: no pointers; the group is that of our child, which is not reaped yet.
            unsafe { libc::kill(-(self.0.id() as i32), libc::SIGTERM) };
        }
        let _ = self.0.wait();
    }
}

/// The cargo that runs us.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(e2e::machine::repository());
    // One that was given relative to another folder.
    if let Ok(target) = e2e::machine::target() {
        command.env("CARGO_TARGET_DIR", target);
    }
    command
}

/// Runs a command that has to succeed.
pub(crate) fn must(what: &str, command: Command) -> Result<()> {
    let outcome = run(command, None, |_| ())?;
    anyhow::ensure!(outcome.status.success(), "{what} failed ({})", outcome.status);
    Ok(())
}

/// Builds packages as releases, the switch among them, and has tests and measurements use that switch: they take the newest
/// build, and cargo leaves the time of one that needs no building.
pub(crate) fn build_release(packages: &[&str]) -> Result<()> {
    let mut command = cargo(&["build", "--release", "--bins"]);
    command.args(packages.iter().flat_map(|package| ["-p", package]));
    must("the build", command)?;
    let switch = e2e::machine::target()?.join("release/sluice");
    let newest = File::open(&switch).and_then(|file| file.set_modified(SystemTime::now()));
    newest.with_context(|| format!("cannot set the time of {}", switch.display()))
}
