//! Taps that the host has changed meanwhile, in a network of their own. As root.

use std::net::UdpSocket;
use std::process::Command;
use std::thread;

use crate::{Bench, SPLIT, alone};

pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a test in a network of its own, and what it starts, too.
pub(crate) fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // SAFETY: no pointers are passed; it changes this thread only.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test runs as root");
        test();
    });
    thread.join().unwrap();
}

#[test]
fn taps_that_are_gone_are_made_anew() {
    let _alone = alone();
    in_a_namespace(|| {
        // What the host says by itself is not for the machines.
        let ports =
            ["removed=tap:tap0", "renamed=tap:tap1", "same=tap:tap2"].map(|port| format!("{port},network=host"));
        let arguments: Vec<_> = ports.iter().flat_map(|port| ["--port", port]).collect();
        let mut bench = Bench::with(SPLIT, false, false, &arguments);
        let index = ip("-o link show tap2");
        ip("link del tap0");
        ip("link set tap1 down");
        ip("link set tap1 name other");
        bench.take_over();
        for port in ["removed", "renamed", "same"] {
            assert_eq!(bench.json(&["port", "show", port])["state"], "up", "{}", bench.log());
        }
        assert_eq!(ip("-o link show tap2").split(':').next(), index.split(':').next());
        assert!(ip("-o link show tap0").contains("UP") && ip("-o link show tap1").contains("UP"));
    });
}

#[test]
fn a_tap_gets_the_mtu_that_is_given_anew() {
    let _alone = alone();
    in_a_namespace(|| {
        let port = |mtu| format!("host=tap:tap0,network=host,mtu={mtu}");
        let mut bench = Bench::with(SPLIT, false, false, &["--port", &port(1400)]);
        let before = ip("-o link show tap0");
        assert!(before.contains(" mtu 1400 "), "{before}");
        bench.take_over_with(&["--port", &port(1300)]);
        assert_eq!(ip("-o link show tap0"), before.replace(" mtu 1400 ", " mtu 1300 "));
    });
}

/// It is the same interface, with what the host has set up there, whatever the port is called.
#[test]
fn a_tap_goes_on_under_another_name() {
    let _alone = alone();
    in_a_namespace(|| {
        let mut bench = Bench::with(SPLIT, false, false, &["--port", "host=tap:tap0,network=host"]);
        ip("addr add 10.9.0.1/24 brd + dev tap0");
        let before = ip("-o -4 addr show tap0");
        shout("10.9.0.1", "10.9.0.255");
        bench.wait_for("host", |port| port["rx_frames"] != 0);
        bench.take_over_with(&["--port", "node=tap:tap0,network=host"]);
        assert_eq!(ip("-o -4 addr show tap0"), before);
        let port = bench.json(&["port", "show", "node"]);
        assert!(port["state"] == "up" && port["rx_frames"] != 0, "{port}\n{}", bench.log());
        assert_eq!(bench.names(), ["node", "vm1", "vm2"]);
        // It is another port's that is taken over again.
        bench.take_over();
        assert_eq!(ip("-o -4 addr show tap0"), before);
        assert_eq!(bench.names(), ["node", "vm1", "vm2"]);
    });
}

/// Has a host's address send a frame to all.
pub(crate) fn shout(from: &str, to: &str) {
    let socket = UdpSocket::bind((from, 0)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.send_to(b"hello", (to, 9)).unwrap();
}
