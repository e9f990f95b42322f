//! An uplink on a veth pair: a switch with a tap on one side, a plain Linux host on the other, whose kernel validates
//! every frame. Needs root; every test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is meant to panic")]

#[path = "../allocation/heap.rs"]
mod heap;
mod kernel;
mod support;

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use e2e::process::wait_output;
use sluice::status::PortState;
use support::{DEADLINE, Ear, Heard, Host, Mouth, Namespace, alone, check_frame, hear, packet_socket, stream, within};

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
    let before = (host.port("host").tx_frames, host.port("up").rx_frames);
    let count = megabytes << 20;
    for (to_far, to_tap) in [("10.9.0.2:7000", "10.9.0.1:7000"), ("[fd09::2]:7000", "[fd09::1]:7000")] {
        let out = stream(tap, far, to_far, count);
        let back = stream(far, tap, to_tap, count);
        eprintln!("MTU {mtu}: {to_far}: {out:.2} Gbit/s out, {back:.2} Gbit/s back");
    }
    let heard = ear.finish();
    assert!(heard.len() > count / mtu, "the ear heard {} frames only", heard.len());
    heard.iter().for_each(|frame| check_frame(frame, mtu));
    let (merged, received) = (host.port("host").tx_frames - before.0, host.port("up").rx_frames - before.1);
    assert!(merged < received, "the tap got all of {received} frames one by one");
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
    assert_eq!(heap::watched(|| talk(&host, &far, 1500, 2)), 0, "workers call the allocator");
}

#[test]
fn talks_in_the_generic_hook() {
    let _alone = alone();
    let (host, far) = pair(",mode=skb");
    assert!(host.port("up").features.contains(&"skb"));
    talk(&host, &far, 1500, 4);
}

#[test]
fn talks_while_workers_poll_the_driver() {
    let _alone = alone();
    let (host, far) = pair(",busy-poll=on,queues=2");
    assert!(host.port("up").features.contains(&"busy-poll"));
    talk(&host, &far, 1500, 4);
}

#[test]
fn talks_through_a_bridge() {
    let _alone = alone();
    // Two switches, each with a host on a tap, and a bridge of the kernel's between their uplinks.
    let (near, far, between) = (Host::new(&[]), Host::new(&[]), Namespace::new());
    between.ip("link add br0 type bridge");
    between.ip("link set br0 addrgenmode none up");
    for (host, number) in [(&near, 1), (&far, 2)] {
        host.namespace.wire("up0", &between, &format!("port{number}"));
        between.ip(&format!("link set port{number} master br0"));
        host.add("host=tap:tap0").unwrap();
        host.add("up=afxdp:up0").unwrap();
        host.wait_for("up", PortState::Up);
        host.namespace.address("tap0", number);
    }
    within("ping", || near.namespace.ping(2, 1452) && far.namespace.ping(1, 1452));
    for address in ["10.9.0.2:7000", "[fd09::2]:7000"] {
        let rate = stream(&near.namespace, &far.namespace, address, 8 << 20);
        eprintln!("switch to switch over a bridge: {rate:.2} Gbit/s");
    }
    assert_eq!(far.namespace.counter("Tcp:", "InCsumErrors"), 0);
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

#[test]
fn carries_vlans_of_a_network() {
    let _alone = alone();
    apart("trunk=10,20", ["vlan=10", "vlan=20"], [Some(10), Some(20)]);
}

#[test]
fn carries_networks_as_vlans() {
    let _alone = alone();
    apart("networks=blue:10,red:20", ["network=blue", "network=red"], [Some(10), Some(20)]);
}

#[test]
fn carries_one_of_its_networks_untagged() {
    let _alone = alone();
    apart("networks=red,blue:10", ["network=blue", "network=red"], [Some(10), None]);
}

/// Sends a frame until it is heard elsewhere, exactly as it was.
fn passes(from: (&Namespace, &str), to: (&Namespace, &str), frame: &[u8]) {
    let [mouth, ear] = [from, to].map(|(namespace, interface)| namespace.run(|| packet_socket(interface)));
    within(&format!("{frame:02x?} from {} to {}", from.1, to.1), || {
        // SAFETY: the kernel reads the frame, of the length given.
        unsafe { libc::send(mouth.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        let heard: Vec<_> = std::iter::from_fn(|| hear(&ear)).map(Heard::tagged).collect();
        // Others have something to say, too.
        let of_ours = heard.iter().filter(|heard| heard[..12] == frame[..12]);
        of_ours.inspect(|heard| assert_eq!(*heard, frame, "from {} to {}", from.1, to.1)).count() > 0
    });
}

#[test]
fn tags_within_tags_pass_as_they_are() {
    let _alone = alone();
    // A bridge of the kernel's on the wire takes tags out of frames, and leaves them aside for a port that may insert them.
    let (host, between, far) = (Host::new(&[]), Namespace::new(), Namespace::new());
    between.ip("link add br0 type bridge");
    between.ip("link set br0 addrgenmode none up");
    host.namespace.wire("up0", &between, "port1");
    far.wire("far0", &between, "port2");
    between.ip("link set port1 master br0");
    between.ip("link set port2 master br0");
    for mode in ["copy", "skb"] {
        host.namespace.command("ethtool", "-K up0 rxvlan on rx-vlan-stag-hw-parse on");
        host.add("host=tap:tap0").unwrap();
        host.add(&format!("up=afxdp:up0,mode={mode}")).unwrap();
        host.wait_for("up", PortState::Up);
        let settings = host.namespace.command("ethtool", "-k up0");
        for left in ["rx-vlan-offload: off", "rx-vlan-stag-hw-parse: off"] {
            assert!(settings.contains(left), "no {left:?} in mode {mode}: {settings}");
        }
        for tags in [&[0x88, 0xa8, 0x20, 100, 0x81, 0, 0x40, 5][..], &[0x88, 0xa8, 0, 100], &[0x81, 0, 0, 5]] {
            let frame = [&[255; 6], &[2, 0, 0, 0, 9, 9], tags, &[0x88, 0xb5], &[0x5a; 60][..]].concat();
            passes((&far, "far0"), (&host.namespace, "tap0"), &frame);
            passes((&host.namespace, "tap0"), (&far, "far0"), &frame);
        }
        host.switch.remove_port("up").unwrap();
        host.switch.remove_port("host").unwrap();
    }
}

/// Two switches, each with the taps of two groups of stations, joined by an uplink: each group talks over the wire with the
/// tag it is to have, and never to the other.
fn apart(uplink: &str, groups: [&str; 2], tags: [Option<u16>; 2]) {
    let (near, far) = (Host::new(&[]), Host::new(&[]));
    near.namespace.wire("up0", &far.namespace, "far0");
    let add_taps = |host: &Host| {
        for (tap, group) in ["tap1", "tap2"].into_iter().zip(groups) {
            host.add(&format!("{tap}=tap:{tap},{group}")).unwrap();
        }
    };
    // The uplink comes before them here, and after them there.
    near.add(&format!("up=afxdp:up0,{uplink}")).unwrap();
    add_taps(&near);
    add_taps(&far);
    far.add(&format!("up=afxdp:far0,{uplink}")).unwrap();
    for (host, number) in [(&near, 1), (&far, 2)] {
        host.namespace.address("tap1", number);
        host.wait_for("up", PortState::Up);
    }
    within("ping", || near.namespace.ping(2, 56));
    let rate = stream(&near.namespace, &far.namespace, "10.9.0.2:7000", 4 << 20);
    eprintln!("switch to switch, {uplink}: {rate:.2} Gbit/s");
    let drops = [near.port("up").drops, far.port("up").drops];
    // The same address in the other group is out of reach.
    far.namespace.ip("link set tap1 down");
    far.namespace.ip("addr flush dev tap1");
    far.namespace.address("tap2", 2);
    assert!(!near.namespace.ping(2, 56), "a frame changed its network: {drops:?}");

    // On the wire, with the far switch gone: with the tag of its group.
    far.switch.remove_port("up").unwrap();
    let heard = || {
        let ear = Ear::new(&far.namespace, "far0");
        near.namespace.ip("neigh flush all");
        let _ = near.namespace.ping(2, 56);
        ear.finish().iter().map(|frame| frame.vlan.map(|tci| tci & 0xfff)).collect::<BTreeSet<_>>()
    };
    near.namespace.ip("link set tap2 down");
    assert_eq!(heard(), [tags[0]].into());
    near.namespace.ip("link set tap1 down");
    near.namespace.ip("addr flush dev tap1");
    near.namespace.ip("link set tap2 up");
    near.namespace.address("tap2", 1);
    assert_eq!(heard(), [tags[1]].into());
}

#[test]
fn the_interface_vanishes_and_returns() {
    let _alone = alone();
    let (host, far) = pair("");
    within("ping", || host.namespace.ping(2, 56));
    for round in 0..3 {
        host.namespace.ip("link del up0");
        host.wait_for("up", PortState::Connecting);
        within("the reason", || host.port("up").reason.as_deref() == Some("there is no interface up0"));
        host.namespace.wire("up0", &far, "far0");
        far.address("far0", 2);
        host.wait_for("up", PortState::Up);
        // The new interface has a new address.
        host.namespace.ip("neigh flush all");
        within(&format!("ping in round {round}"), || host.namespace.ping(2, 56));
    }
    assert_eq!(host.port("up").connects, 4);
    let rate = stream(&far, &host.namespace, "10.9.0.1:7000", 4 << 20);
    eprintln!("after its return: {rate:.2} Gbit/s");
}

#[test]
fn the_link_flaps_and_the_mtu_changes() {
    let _alone = alone();
    let (host, far) = pair("");
    within("ping", || host.namespace.ping(2, 56));
    for _ in 0..3 {
        far.ip("link set far0 down");
        host.wait_for("up", PortState::Down);
        assert_eq!(host.port("up").reason.as_deref(), Some("the interface has no carrier"));
        far.ip("link set far0 up");
        host.wait_for("up", PortState::Up);
        host.namespace.ip("link set up0 down");
        host.wait_for("up", PortState::Down);
        assert_eq!(host.port("up").reason.as_deref(), Some("the interface is down"));
        host.namespace.ip("link set up0 up");
        host.wait_for("up", PortState::Up);
    }
    far.ip("addr replace fd09::2/64 dev far0 nodad");
    within("ping after the flaps", || host.namespace.ping(2, 56));
    assert_eq!(host.port("up").connects, 1, "the queues stay open");

    host.namespace.ip("link set tap0 mtu 4000");
    far.ip("link set far0 mtu 4000");
    assert!(!host.namespace.ping(2, 2000), "larger than the uplink's MTU");
    assert!(host.port("up").drops["mtu_egress"] > 0);
    host.namespace.ip("link set up0 mtu 4000");
    within("ping with the new MTU", || host.namespace.ping(2, 2000));
}

/// For how long a thread of that name has had a CPU.
fn cpu_time(name: &str) -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let ns = threads.filter_map(|thread| {
        let read = |file| std::fs::read_to_string(thread.path().join(file)).ok();
        (read("comm")?.trim() == name).then(|| read("schedstat")?.split(' ').next()?.parse::<u64>().ok())?
    });
    Duration::from_nanos(ns.sum())
}

#[test]
fn an_interface_that_flaps_takes_no_time_from_others() {
    let _alone = alone();
    let (host, far) = pair("");
    let before = cpu_time("sl-afxdp");
    let (mut flaps, mut spent) = (0, Duration::ZERO);
    // It takes a rest after a flap, in which many others may fit.
    within("a look at what flaps", || {
        for _ in 0..10 {
            far.ip("link set far0 down");
            far.ip("link set far0 up");
            flaps += 1;
        }
        spent = cpu_time("sl-afxdp") - before;
        flaps >= 100 && spent > Duration::ZERO
    });
    eprintln!("{flaps} flaps: {spent:?} of a CPU");
    // What the port's thread does is what a flap may cost frames between other ports. It takes some 15 µs.
    assert!(spent < flaps * Duration::from_micros(400), "{spent:?}");
    assert_eq!(host.port("up").connects, 1, "the queues stay open");
    host.wait_for("up", PortState::Up);
    far.ip("addr replace fd09::2/64 dev far0 nodad");
    within("ping after the flaps", || host.namespace.ping(2, 56));
}

#[test]
fn networks_stay_apart_while_wires_come_and_go() {
    let _alone = alone();
    let (host, far) = (Host::new(&[]), Arc::new(Namespace::new()));
    // Two networks, each with a wire, on which somebody talks, and a tap, on which somebody listens.
    let (networks, wires, taps) = (["blue", "red"], ["up0", "up1"], ["tap0", "tap1"]);
    let lay = |at: usize| host.namespace.wire(wires[at], &far, ["far0", "far1"][at]);
    for at in 0..2 {
        lay(at);
        host.add(&format!("tap{at}=tap:{},network={}", taps[at], networks[at])).unwrap();
        host.add(&format!("up{at}=afxdp:{},network={}", wires[at], networks[at])).unwrap();
        host.namespace.ip(&format!("link set {} addrgenmode none", taps[at]));
    }
    let ears = taps.map(|tap| Ear::new(&host.namespace, tap));
    let _mouths = [("far0", 0), ("far1", 1)].map(|(interface, mark)| Mouth::new(&far, interface, mark));
    let given = |at: usize| host.port(&format!("tap{at}")).tx_frames;
    for round in 0..4 {
        for (at, wire) in wires.iter().enumerate() {
            let name = format!("up{at}");
            match round {
                0 => drop(far.ip(&format!("link set far{at} down"))),
                1 => drop(host.namespace.ip(&format!("link set {wire} down"))),
                2 => drop(host.namespace.ip(&format!("link del {wire}"))),
                // The other port gets the place that this one had in the switch's tables.
                _ => drop(host.switch.remove_port(&name).unwrap()),
            }
            if round < 3 {
                within("the link down", || host.port(&name).state != PortState::Up);
            }
        }
        for at in [1, 0] {
            match round {
                0 => drop(far.ip(&format!("link set far{at} up"))),
                1 => drop(host.namespace.ip(&format!("link set {} up", wires[at]))),
                2 => lay(at),
                _ => host.add(&format!("up{at}=afxdp:{},network={}", wires[at], networks[at])).unwrap(),
            }
            host.wait_for(&format!("up{at}"), PortState::Up);
        }
        let before = [given(0), given(1)];
        within("frames again", || given(0) > before[0] + 100 && given(1) > before[1] + 100);
    }
    for (mark, ear) in (0u8..).zip(ears) {
        let heard = ear.finish();
        let theirs: Vec<_> = heard.iter().filter(|frame| frame.bytes[12..14] == [0x88, 0xb5]).collect();
        assert!(theirs.len() > 400, "{} frames", theirs.len());
        assert!(
            theirs.iter().all(|frame| frame.bytes[14..].iter().all(|byte| *byte == mark)),
            "a frame of the other network"
        );
    }
}

/// The id of the XDP program on an interface, by another way than the switch's own.
fn program_on(namespace: &Namespace, interface: &str) -> Option<String> {
    let text = namespace.ip(&format!("-o link show {interface}"));
    text.split("prog/xdp id ").nth(1).and_then(|rest| rest.split(' ').next()).map(String::from)
}

#[test]
fn a_killed_switch_leaves_the_interface_as_it_was() {
    let _alone = alone();
    let (namespace, far, folder) = (Namespace::new(), Namespace::new(), tempfile::tempdir().unwrap());
    namespace.wire("up0", &far, "far0");
    let mut switch = Killed(namespace.run(|| {
        let (control, state) = (folder.path().join("control.sock"), folder.path().join("state"));
        Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["run", "--port", "up=afxdp:up0"])
            .args([std::path::Path::new("--control"), &control, std::path::Path::new("--state"), &state])
            .spawn()
            .unwrap()
    }));
    within("the program", || program_on(&namespace, "up0").is_some());
    switch.0.kill().unwrap();
    switch.0.wait().unwrap();
    within("the program gone", || program_on(&namespace, "up0").is_none());
    assert!(!namespace.ip("-d link show up0").contains("promiscuity 1"));
    // The kernel has the wire back.
    namespace.address("up0", 1);
    far.address("far0", 2);
    within("ping", || namespace.ping(2, 56));
}

#[test]
fn a_program_of_somebody_else_is_respected() {
    let _alone = alone();
    let ((host, far), other) = (pair(",replace=on"), Host::new(&[]));
    let theirs = program_on(&host.namespace, "up0").unwrap();
    // Another switch in the same namespace.
    let other_switch = host.namespace.run(|| other.switch.add_port("up=afxdp:up0".parse().unwrap()));
    let problem = other_switch.unwrap_err().to_string();
    assert!(problem.contains(&format!("has an XDP program already (id {theirs})")), "{problem}");
    assert!(problem.contains("replace=on") && !problem.contains('\n'), "{problem}");
    assert_eq!(program_on(&host.namespace, "up0"), Some(theirs.clone()));
    assert!(host.namespace.ping(2, 56), "the first goes on undisturbed");

    host.namespace.run(|| other.switch.add_port("up=afxdp:up0,replace=on".parse().unwrap())).unwrap();
    assert_ne!(program_on(&host.namespace, "up0"), Some(theirs));
    // The first one notices, and does not take it back.
    within("the first gives up", || host.port("up").state != PortState::Up);
    within("the second is up", || other.port("up").state == PortState::Up);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!((other.port("up").connects, host.port("up").connects), (1, 1));
    other.switch.remove_port("up").unwrap();
    host.wait_for("up", PortState::Up);
    within("ping", || far.ping(1, 56));
}

#[test]
fn what_cannot_be_is_said() {
    let _alone = alone();
    let host = Host::new(&[]);
    let far = Namespace::new();
    host.namespace.wire("up0", &far, "far0");
    let problem = host.add("up=afxdp:up0,queues=3").unwrap_err();
    assert_eq!(problem, "interface up0 has 2 queues, fewer than queues=3");
    // A wire made of memory has no hardware to share frames with.
    host.add("up=afxdp:up0,mode=zerocopy").unwrap();
    let reason = host.port("up").reason.unwrap_or_default();
    assert!(reason.contains("zerocopy: Operation not supported"), "{reason}");
    // It goes on trying, but not all the time.
    within("no program", || program_on(&host.namespace, "up0").is_none());
    host.switch.remove_port("up").unwrap();
    // One that comes later.
    host.add("later=afxdp:later0").unwrap();
    assert_eq!(host.port("later").reason.as_deref(), Some("there is no interface later0"));
}

#[test]
fn the_log_tells_the_mode_and_what_did_not_work() {
    let _alone = alone();
    let (namespace, far, folder) = (Namespace::new(), Namespace::new(), tempfile::tempdir().unwrap());
    namespace.wire("up0", &far, "far0");
    namespace.wire("up1", &far, "far1");
    // Its driver runs no programs.
    namespace.ip("link add br0 type bridge");
    let [control, state, log] = ["c", "s", "log"].map(|name| folder.path().join(name));
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.arg("run").arg("--control").arg(&control).arg("--state").arg(&state);
    command.args(["--port", "a=afxdp:up0", "--port", "b=afxdp:br0,mode=auto", "--port", "c=afxdp:up1,mode=skb"]);
    command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let _switch = Killed(namespace.run(|| command.spawn().unwrap()));
    let opened = || -> Vec<String> {
        let log = std::fs::read_to_string(&log).unwrap();
        log.lines().filter(|line| line.contains("uplink open")).map(Into::into).collect()
    };
    within("three uplinks", || opened().len() >= 3);
    let zerocopy = "zerocopy: Operation not supported (os error 95)";
    for (port, mode, rejected) in [
        ("a", "copy", Some(zerocopy.to_owned())),
        ("b", "skb", Some(format!("{zerocopy}; copy: Operation not supported (os error 95)"))),
        ("c", "skb", None),
    ] {
        let lines: Vec<_> = opened().into_iter().filter(|line| line.contains(&format!("port=\"{port}\""))).collect();
        let [line] = lines.as_slice() else { panic!("one line for port {port}, not {lines:?}") };
        assert!(line.contains(&format!("mode=\"{mode}\"")), "{line}");
        let told = line.split_once("rejected=").map(|(_, rest)| rest.trim_matches('"').to_owned());
        assert_eq!(told, rejected, "{line}");
    }
}

/// The bodies of a capture file's blocks, by their type.
fn blocks(file: &[u8], wanted: u32) -> Vec<&[u8]> {
    let (mut rest, mut bodies) = (file, Vec::new());
    while let Some((kind, length)) = rest.first_chunk::<8>().map(|head| head.split_at(4)) {
        let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap());
        let length = word(length) as usize;
        if word(kind) == wanted {
            bodies.push(&rest[8..length - 4]);
        }
        rest = &rest[length..];
    }
    bodies
}

#[test]
fn what_passes_can_be_captured() {
    let _alone = alone();
    let (namespace, far, folder) = (Namespace::new(), Namespace::new(), tempfile::tempdir().unwrap());
    namespace.wire("up0", &far, "far0");
    let control = folder.path().join("control.sock");
    let sluice = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.arg("--socket").arg(&control).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let mut switch = Killed(namespace.run(|| {
        Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["run", "--port", "up=afxdp:up0", "--port", "host=tap:tap0,mtu=1300"])
            .args([
                std::path::Path::new("--control"),
                &control,
                std::path::Path::new("--state"),
                &folder.path().join("s"),
            ])
            .spawn()
            .unwrap()
    }));
    within("the switch", || sluice(&["status"]).output().unwrap().status.success());
    namespace.address("tap0", 1);
    far.address("far0", 2);
    within("ping", || namespace.ping(2, 56));

    let file = folder.path().join("x.pcapng");
    let path = file.to_str().unwrap();
    let capture = sluice(&["capture", "host", "--write", path, "--count", "40"]).spawn().unwrap();
    within("the file", || std::fs::metadata(&file).is_ok_and(|file| file.len() > 0));
    let second = sluice(&["capture", "host", "--write", "/dev/null"]).output().unwrap();
    let complaint = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(complaint.contains("are being captured already"), "{complaint}");
    within("pings", || {
        // Too large for the tap's port, in one direction.
        let _ = far.ping(1, 1300);
        namespace.ping(2, 56);
        std::fs::metadata(&file).is_ok_and(|file| file.len() > 12_000)
    });
    within("the last ping", || namespace.ping(2, 56));
    let output = wait_output(capture, "the capture", DEADLINE).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("40 frames captured, 0 lost"));
    let bytes = std::fs::read(&file).unwrap();
    let packets = blocks(&bytes, 6);
    assert_eq!(packets.len(), 40);
    let contains = |what: &[u8]| packets.iter().any(|packet| packet.windows(what.len()).any(|part| part == what));
    assert!(contains(b"dropped: mtu_egress"));
    for packet in &packets {
        let length = u32::from_ne_bytes(packet[12..16].try_into().unwrap()) as usize;
        etherparse::SlicedPacket::from_ethernet(&packet[20..20 + length]).unwrap();
    }
    assert_eq!(blocks(&bytes, 5).len(), 1, "what was lost is noted at the end");
    switch.0.kill().unwrap();
}

/// A process that does not outlive its test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: TCP rates, from a tap to a plain host and back. `cargo test --release -- --ignored --nocapture rates`
#[test]
#[ignore = "a measurement"]
fn rates() {
    let _alone = alone();
    for mtu in [1500, 9000] {
        let (host, far) = pair("");
        for interface in ["up0", "tap0"] {
            host.namespace.ip(&format!("link set {interface} mtu {mtu}"));
        }
        far.ip(&format!("link set far0 mtu {mtu}"));
        within("ping", || host.namespace.ping(2, 56));
        for (what, options) in [("to the wire", ""), ("from the wire", "-R")] {
            // One client, then it ends.
            let mut server =
                far.run(|| Command::new("iperf3").args(["-s", "-1"]).stdout(Stdio::null()).spawn().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(300));
            let before = (host.port("host"), host.port("up"));
            let report = host.namespace.command("iperf3", &format!("-c 10.9.0.2 -t 5 -J {options}"));
            server.wait().unwrap();
            let report: serde_json::Value = serde_json::from_str(&report).unwrap();
            let rate = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9;
            let (tap, up) = (host.port("host"), host.port("up"));
            eprintln!(
                "MTU {mtu}, {what}: {rate:.2} Gbit/s; up received {} and sent {} frames, tap was given {} and gave {}",
                up.rx_frames - before.1.rx_frames,
                up.tx_frames - before.1.tx_frames,
                tap.tx_frames - before.0.tx_frames,
                tap.rx_frames - before.0.rx_frames,
            );
        }
    }
}
