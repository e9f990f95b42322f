//! What one frontend does to the process must not harm the others.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::daemon::Daemon;
use crate::support::{Qemu, wedge};

#[test]
fn truncated_memory_stops_one_port_and_not_the_process() {
    let mut daemon = Daemon::start(&[]);
    let (mut a, mut b, mut c) = (daemon.boot("a", 1), daemon.boot("b", 2), daemon.boot("c", 3));
    daemon.pass(&mut a, &mut b, "hello");
    daemon.pass(&mut b, &mut a, "hello yourself");
    daemon.pass(&mut c, &mut a, "me too");

    // The sender's memory goes: the worker meets that when it looks for frames.
    a.truncate(0);
    daemon.wait_failed("a", "memory of the guest has gone");
    daemon.pass(&mut b, &mut c, "is a gone?");
    daemon.pass(&mut c, &mut b, "it is");

    // The receiver's memory goes, but for its rings: the worker meets that when it delivers.
    b.truncate(0x8_0000);
    c.send(None, "to all");
    daemon.wait_failed("b", "memory of the guest has gone");

    a.boot();
    b.boot();
    daemon.wait_up("a");
    daemon.wait_up("b");
    daemon.pass(&mut a, &mut b, "here again");
    daemon.pass(&mut b, &mut c, "and me");
    daemon.eventually("line in the log", |daemon| daemon.log().contains("port stopped after a fault"));
}

/// Workers cannot be woken by frames then, but what changes for them holds all the same.
#[test]
fn changes_hold_where_no_descriptors_are_left() {
    let mut daemon = Daemon::start(&["--mode", "interrupt"]);
    let (mut a, mut b) = (daemon.boot("a", 1), daemon.boot("b", 2));
    daemon.pass(&mut a, &mut b, "hello");
    let pid = Pid::from_raw(daemon.pid() as i32);
    let limit = |current| prlimit(pid, Resource::Nofile, Rlimit { current, maximum: Some(1024) }).unwrap();
    daemon.eventually("line in the log", |daemon| {
        // The lowest number that is free is the next one: connections of ours may only just have been closed.
        let is_open = |fd: &u64| Path::new(&format!("/proc/{}/fd/{fd}", daemon.pid())).exists();
        limit((0..).find(|fd| !is_open(fd)));
        b.change_ring();
        daemon.log().contains("look for frames every millisecond")
    });
    daemon.pass(&mut a, &mut b, "through the new one");
    daemon.pass(&mut b, &mut a, "and back");
    limit(Some(1024));
    b.change_ring();
    daemon.pass(&mut a, &mut b, "as it was");
    daemon.wait_up("a");
}

#[test]
fn a_notification_that_waits_stops_one_port() {
    let mut daemon = Daemon::start(&[]);
    let (mut a, mut b, mut c) = (daemon.boot("a", 1), daemon.boot("b", 2), daemon.boot("c", 3));
    daemon.pass(&mut a, &mut b, "hello");
    a.received();
    let _ = a.call().read();
    // SAFETY: a flag change on a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(a.call().as_raw_fd(), libc::F_SETFL, 0) }, 0);
    a.call().write(u64::MAX - 1).unwrap();
    b.send(Some(&a), "are you there?");
    daemon.wait_failed("a", "notification descriptor block");
    daemon.pass(&mut b, &mut c, "a sleeps");
    daemon.pass(&mut c, &mut b, "let it");
}

/// Nor what it makes the thread of its port wait for.
#[test]
fn a_descriptor_whose_close_waits_does_not_keep_the_process() {
    let mut daemon = Daemon::start(&[]);
    let path = daemon.path("a.sock");
    let qemu = Qemu::listen(&path);
    let wedge = |daemon: &Daemon| {
        daemon.add("a", &path);
        wedge(&qemu, daemon.pid(), "sl-a")
    };
    let _wedged = wedge(&daemon);
    let began = Instant::now();
    assert!(daemon.call(&["port", "del", "a"]).status.success());
    // A thread that waits for nothing ends at once, and this one is left alone for a while.
    let time = Duration::from_millis(100)..Duration::from_secs(2);
    assert!(time.contains(&began.elapsed()), "{:?}", began.elapsed());
    let _wedged_again = wedge(&daemon);
    let (mut b, mut c) = (daemon.boot("b", 2), daemon.boot("c", 3));
    daemon.pass(&mut b, &mut c, "hello");
    daemon.end(Duration::from_secs(5));
}
