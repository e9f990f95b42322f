//! The keeper, as a child of the switch.

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

/// Those that the process has started, zombies among them.
fn children(pid: u32) -> Vec<i32> {
    let parent = format!("PPid:\t{pid}");
    let all =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // Others come and go meanwhile.
    let status = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    all.filter(|pid| status(pid).lines().any(|line| line == parent)).collect()
}
