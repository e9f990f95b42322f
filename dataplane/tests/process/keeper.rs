//! The keeper, as a child of the switch.

use std::process::Command;
use std::time::Duration;

use e2e::process::Process;
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::Daemon;

/// A switch goes on without its keeper, and leaves no zombie of it behind.
#[test]
fn a_keeper_that_ends_first_is_forgotten() {
    let mut daemon = Daemon::start(&[]);
    let [keeper] = children(daemon.pid())[..] else { panic!("no keeper, or more than that") };
    kill_process(Pid::from_raw(keeper).unwrap(), Signal::KILL).unwrap();
    daemon.eventually("end of the keeper", |daemon| children(daemon.pid()).is_empty());
    let (mut a, mut b) = (daemon.boot("a", 1), daemon.boot("b", 2));
    daemon.pass(&mut a, &mut b, "hello");
}

/// A signal ends a keeper by itself, also where it is process 1, as in its container: the kernel does not do it there.
#[test]
fn a_signal_ends_it_as_the_first_process_too() {
    let state = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_sluice");
    // Both go with this test, however it ends.
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", program, "keep", "--state"]).arg(state.path());
    let mut unshare = Process::start("keeper", command, &state.path().join("log"), &[]).unwrap();
    let socket = state.path().join("keeper.sock");
    let limit = Duration::from_secs(10);
    e2e::wait::until_true("the keeper to listen", limit, || Ok(socket.exists())).unwrap();
    let [keeper] = children(unshare.pid())[..] else { panic!("no keeper, or more than that") };
    kill_process(Pid::from_raw(keeper).unwrap(), Signal::TERM).unwrap();
    assert!(unshare.wait_exit(limit).unwrap().success(), "{}", unshare.log_tail());
    assert!(!socket.exists(), "it has left its socket behind");
}

/// Those that the process has started, zombies among them.
fn children(pid: u32) -> Vec<i32> {
    let parent = format!("PPid:\t{pid}");
    let all =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // Others come and go meanwhile.
    let status = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    all.filter(|pid| status(pid).lines().any(|line| line == parent)).collect()
}
