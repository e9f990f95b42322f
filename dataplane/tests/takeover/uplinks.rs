//! AF_XDP uplinks whose settings change with the process, in a network of their own. As root.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::taps::{in_a_namespace, ip, shout};
use crate::{Bench, PATIENCE, Process, SPLIT, alone};

/// A wire between two ends in this network.
fn lay() {
    ip("link add up0 type veth peer name far0");
    for end in ["up0", "far0"] {
        ip(&format!("link set {end} addrgenmode none up"));
    }
}

#[test]
fn an_uplink_gets_what_is_given_anew() {
    let _alone = alone();
    in_a_namespace(|| {
        lay();
        ip("addr add 10.9.0.2/24 brd + dev far0");
        let mut bench = Bench::with(SPLIT, false, false, &["--port", "up=afxdp:up0,network=wire"]);
        bench.wait_for("up", |port| port["state"] == "up");
        shout("10.9.0.2", "10.9.0.255");
        bench.wait_for("up", |port| port["rx_frames"] != 0);
        let others =
            ["up=afxdp:up0,busy-poll=on", "up=afxdp:up0,mode=skb", "uplink=afxdp:up0", "up=afxdp:up0,replace=on"];
        for (round, spec) in others.into_iter().enumerate() {
            bench.take_over_with(&["--port", &format!("{spec},network=wire")]);
            let name = spec.split('=').next().unwrap();
            assert_eq!(bench.names(), [name, "vm1", "vm2"], "{}", bench.log());
            bench.wait_for(name, |port| port["state"] == "up");
            // It is the same interface, so what was counted goes on, and so does what was heard.
            let port = bench.json(&["port", "show", name]);
            assert_eq!(port["connects"], round + 2, "{port}");
            assert_ne!(port["rx_frames"], 0, "{port}");
            assert_eq!(port["features"].as_array().unwrap().contains(&json!("busy-poll")), round == 0, "{port}");
            let stations = bench.json(&["fdb", "show"]);
            assert!(stations.as_array().unwrap().iter().any(|station| station["port"] == name), "{stations}");
        }
    });
}

/// It is the same port, so what was heard behind it, and behind ports whose network it carries, is known still.
#[test]
fn a_carrier_goes_on_under_another_name() {
    let _alone = alone();
    in_a_namespace(|| {
        lay();
        ip("addr add 10.9.0.2/24 brd + dev far0");
        for (target, end) in [("afxdp:up0", "far0"), ("tap:tap0", "tap0")] {
            let carrier = |name: &str| format!("{name}={target},networks=blue");
            let ports = [carrier("up"), "b=tap:tap1,network=blue".to_owned()];
            let arguments: Vec<_> = ports.iter().flat_map(|port| ["--port", port]).collect();
            let mut bench = Bench::with(SPLIT, false, false, &arguments);
            if end == "tap0" {
                ip("addr flush dev far0");
                ip("addr add 10.9.0.2/24 brd + dev tap0");
            }
            ip("addr add 10.9.1.2/24 brd + dev tap1");
            ["up", "b"].iter().for_each(|port| bench.wait_for(port, |port| port["state"] == "up"));
            shout("10.9.0.2", "10.9.0.255");
            shout("10.9.1.2", "10.9.1.255");
            wait_for_stations(&bench, ["up", "b"]);
            bench.take_over_with(&["--port", &carrier("uplink")]);
            assert_eq!(bench.names(), ["b", "uplink", "vm1", "vm2"], "{}", bench.log());
            wait_for_stations(&bench, ["uplink", "b"]);
        }
    });
}

/// Waits until some station is known behind each of these ports.
fn wait_for_stations(bench: &Bench, ports: [&str; 2]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stations = bench.json(&["fdb", "show"]);
        let is_known = |port: &str| stations.as_array().unwrap().iter().any(|station| station["port"] == port);
        if ports.into_iter().all(is_known) {
            return;
        }
        assert!(Instant::now() < deadline, "{ports:?}: {stations}\n{}", bench.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The kernel lets go of the old process's interface when it likes; here another switch has it for a while.
#[test]
fn an_interface_that_is_let_go_of_late_is_waited_for() {
    let _alone = alone();
    in_a_namespace(|| {
        lay();
        let mut bench = Bench::with(SPLIT, false, false, &["--port", "up=afxdp:up0,network=wire"]);
        bench.wait_for("up", |port| port["state"] == "up");
        let mut other = bench.command();
        other.arg("run").arg("--control").arg(bench.path("other.sock")).arg("--state").arg(bench.path("other"));
        // To detach the first one's program takes rights that the sandbox takes away.
        other.args(["--keeper", "off", "--sandbox", "off", "--port", "up=afxdp:up0,replace=on"]);
        let other = Process(other.stderr(Stdio::null()).spawn().unwrap());
        bench.wait_for("up", |port| port["state"] != "up");
        let ends = std::thread::spawn(move || {
            // Well within the time for which an interface is waited for, and after the first try, unless that comes late: then
            // there is nothing to wait for.
            std::thread::sleep(Duration::from_millis(500));
            drop(other);
        });
        bench.take_over_with(&["--port", "up=afxdp:up0,network=wire,mode=copy"]);
        ends.join().unwrap();
        bench.wait_for("up", |port| port["state"] == "up");
    });
}
