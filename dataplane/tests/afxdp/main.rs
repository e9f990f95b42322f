//! An uplink on a veth pair: a switch with a tap on one side, a plain Linux host on the other, whose kernel validates
//! every frame. Needs root; every test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is meant to panic")]

mod support;

use sluice::status::PortState;
use support::{Ear, Host, Namespace, alone, check_frame, stream, within};

/// A switch with an uplink and a tap with the address of host 1, and a plain host 2 on the wire.
fn pair(uplink: &str) -> (Host, Namespace) {
    let (host, far) = (Host::new(&[]), Namespace::new());
    host.namespace.wire("up0", &far, "far0");
    host.add("host=tap:tap0").unwrap();
    host.add(&format!("up=afxdp:up0{uplink}")).unwrap();
    host.wait_for("up", PortState::Up);
    host.namespace.address("tap0", 1);
    far.address("far0", 2);
    (host, far)
}

/// Streams both ways over both protocols; the checksums of what the plain host receives are right.
fn talk(host: &Host, far: &Namespace, mtu: usize, megabytes: usize) {
    let tap = &host.namespace;
    // What fits behind the headers of IPv6.
    let ping = mtu - 48;
    within("ping", || tap.ping(2, 56));
    assert!(tap.ping(2, ping) && far.ping(1, ping), "{host:?}");
    let ear = Ear::new(far, "far0");
    let count = megabytes << 20;
    for (to_far, to_tap) in [("10.9.0.2:7000", "10.9.0.1:7000"), ("[fd09::2]:7000", "[fd09::1]:7000")] {
        let out = stream(tap, far, to_far, count);
        let back = stream(far, tap, to_tap, count);
        eprintln!("MTU {mtu}: {to_far}: {out:.2} Gbit/s out, {back:.2} Gbit/s back");
    }
    let heard = ear.finish();
    assert!(heard.len() > count / mtu, "the ear heard {} frames only", heard.len());
    heard.iter().for_each(|frame| check_frame(frame, mtu));
    for namespace in [tap.as_ref(), far] {
        assert_eq!(namespace.counter("Tcp:", "InCsumErrors") + namespace.counter("Tcp:", "InErrs"), 0);
    }
}

#[test]
fn talks_to_a_plain_host() {
    let _alone = alone();
    let (host, far) = pair("");
    assert!(host.port("up").features.contains(&"copy"), "{:?}", host.port("up"));
    talk(&host, &far, 1500, 20);
}

#[test]
fn talks_in_the_generic_hook() {
    let _alone = alone();
    let (host, far) = pair(",mode=skb");
    assert!(host.port("up").features.contains(&"skb"));
    talk(&host, &far, 1500, 4);
}

#[test]
fn talks_in_jumbo_frames() {
    let _alone = alone();
    let (host, far) = pair("");
    host.namespace.ip("link set up0 mtu 9000");
    host.namespace.ip("link set tap0 mtu 9000");
    far.ip("link set far0 mtu 9000");
    talk(&host, &far, 9000, 20);
}
