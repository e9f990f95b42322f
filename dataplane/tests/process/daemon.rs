//! The real program, in a folder of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::DEADLINE;
use crate::vm::Vm;

/// A running switch. Ended, and its folder removed, when it goes out of scope.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) dir: TempDir,
}

impl Daemon {
    /// `sluice run` with more arguments.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), args)
    }

    /// The same in a folder that is there already.
    pub(crate) fn start_in(dir: TempDir, args: &[&str]) -> Self {
        Self::start_by(dir, &[], Path::new(env!("CARGO_BIN_EXE_sluice")), args)
    }

    /// The same by another command, and from another place.
    pub(crate) fn start_by(dir: TempDir, by: &[&str], program: &Path, args: &[&str]) -> Self {
        let words: Vec<_> = by.iter().copied().chain(program.to_str()).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg("run").args(args).env_remove("SLUICE_SOCKET").env_remove("SLUICE_LOG");
        command.arg("--control").arg(dir.path().join("ctl.sock")).arg("--state").arg(dir.path().join("state"));
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut daemon = Self { child, dir };
        daemon.eventually("ready", |daemon| daemon.log().contains("ready"));
        daemon
    }

    /// Ends it as an operator does, and waits for that.
    pub(crate) fn end(&mut self, limit: Duration) {
        kill_process(Pid::from_raw(self.pid() as i32).unwrap(), Signal::TERM).unwrap();
        let end = Instant::now() + limit;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "not ended in time: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until something is so.
    pub(crate) fn eventually(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(self.child.try_wait().unwrap().is_none(), "ended before {what}: {}", self.log());
            assert!(Instant::now() < end, "no {what} in time: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A client's command.
    pub(crate) fn call(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(args).arg("--socket").arg(self.path("ctl.sock")).env_remove("SLUICE_LOG").output().unwrap()
    }

    /// Adds a port for a machine that listens in the folder, and boots that.
    pub(crate) fn boot(&mut self, name: &str, number: u8) -> Vm {
        let path = self.path(&format!("{name}.sock"));
        let mut vm = Vm::listen(&path, number);
        self.add(name, &path);
        vm.boot();
        self.wait_up(name);
        vm
    }

    pub(crate) fn add(&self, name: &str, path: &Path) {
        let added = self.call(&["port", "add", &format!("{name}=vhost-user:{}", path.display())]);
        assert!(added.status.success(), "{added:?}");
    }

    fn port(&self, name: &str) -> Value {
        let output = self.call(&["port", "show", name, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// One of its counters.
    pub(crate) fn number(&self, name: &str, key: &str) -> u64 {
        let port = self.port(name);
        port[key].as_u64().unwrap_or_else(|| panic!("no {key} in {port}"))
    }

    /// State and reason of a port.
    pub(crate) fn state(&self, name: &str) -> (String, String) {
        let port = self.port(name);
        let word = |key: &str| port[key].as_str().unwrap_or_default().to_owned();
        (word("state"), word("reason"))
    }

    pub(crate) fn wait_up(&mut self, name: &str) {
        self.eventually("link", |daemon| daemon.state(name).0 == "up");
    }

    /// Waits until a port has failed for a reason.
    pub(crate) fn wait_failed(&mut self, name: &str, reason: &str) {
        self.eventually(reason, |daemon| {
            let (state, why) = daemon.state(name);
            state == "failed" && why.contains(reason)
        });
    }

    /// Sends frames until one arrives, and nothing else does.
    pub(crate) fn pass(&mut self, from: &mut Vm, to: &mut Vm, text: &str) {
        from.send(Some(to), text);
        self.eventually("frame", |_| to.received().iter().any(|got| got == text));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
