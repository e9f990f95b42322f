//! Guests on two switches that a wire joins: two hosts, as far as anybody can tell. With a bridge on the wire there is a
//! plain Linux host, too, and Wireshark looks at every frame that passes.

mod rig;
mod trouble;
mod wireshark;

use anyhow::{Context, Result, ensure};
use e2e::lab::mac;
use e2e::ping;
use e2e::process::{Process, run};
use e2e::qemu::{ECHO_PORT, GuestSpec, Nic};
use e2e::scratch::Scratch;
use e2e::wait;
use rig::{HOST, MTU, Rig, Wire, is_dpdk, test};
use std::thread::sleep;
use std::time::Duration;
use wireshark::{Ear, direction_and_comment};

const LIMIT: Duration = Duration::from_secs(20);
/// VLAN of the guests' network on the wire.
const VLAN: u16 = 10;

/// Around every boundary: header, minimum frame, both MTUs, pages, the largest datagram.
const PAYLOADS: [usize; 14] = [8, 18, 63, 129, 1023, 1452, 1472, 1473, 4096, 8952, 8973, 16_384, 60_000, 65_000];

/// Everything that two guests can say to each other over the wire.
fn talk(rig: &Rig, mtu: usize) -> Result<()> {
    rig.set_mtu(mtu)?;
    let lab = &rig.near;
    for (from, address) in [(0, "10.0.0.2"), (1, "10.0.0.1"), (0, "fd00::2"), (1, "fd00::1")] {
        lab.wait_reachable(from, address)?;
        // What fits behind the headers of IPv6.
        let report = lab.guests[from].run(&format!("ping -c 5 -i 0.1 -W 2 -s {} {address}", mtu - 48))?;
        ensure!(report.contains(" 0% packet loss"), "{report}");
    }
    let sizes: Vec<usize> = (60..=mtu + 14).step_by(mtu / 200).chain([mtu + 13, mtu + 14]).collect();
    lab.check_frames(0, 1, 1, &sizes)?;
    lab.check_frames(1, 0, 2, &sizes)?;
    for (from, address) in [(0, "10.0.0.2"), (1, "[fd00::1]")] {
        lab.check_echo(from, "udp", address, &PAYLOADS)?;
        lab.check_echo(from, "tcp", address, &[&PAYLOADS[..], &[4 << 20]].concat())?;
    }
    for (what, address, options) in
        [("TCP", "10.0.0.2", "-t 1"), ("TCP", "fd00::2", "-t 1 -R"), ("UDP", "10.0.0.2", "-t 1 -u -b 10M -w 1M")]
    {
        lab.serve_iperf(1)?;
        let report = lab.guests[0].run_for(&format!("iperf3 -J -c {address} {options}"), LIMIT)?;
        let rate = rate_of(&report, what)?;
        println!("MTU {mtu}: {what} {address} {options}: {rate:.0} Mbit/s");
        // What is sent of UDP is the guest's affair, which may be emulated on a slow machine: that it arrives was judged.
        let least = if what == "TCP" { 5.0 } else { 1.0 };
        ensure!(rate > least, "only {rate} Mbit/s");
    }
    Ok(())
}

/// Mbit/s of a report of iperf3's; of UDP, if less than a hundredth was lost.
fn rate_of(report: &str, what: &str) -> Result<f64> {
    if what == "TCP" {
        return e2e::lab::iperf_rate(report);
    }
    let sum = &serde_json::from_str::<serde_json::Value>(report)?["end"]["sum"];
    let lost = sum["lost_percent"].as_f64().context("iperf3 tells no losses")?;
    ensure!(lost < 1.0, "{lost} % of the datagrams lost");
    Ok(sum["bits_per_second"].as_f64().context("iperf3 gave no rate")? / 1e6)
}

/// Everything that guests and the plain host on the wire can say to each other.
fn talk_to_host(rig: &Rig) -> Result<()> {
    let lab = &rig.near;
    for from in [0, 1] {
        for address in [format!("10.0.0.{HOST}"), format!("fd00::{HOST}")] {
            lab.wait_reachable(from, &address)?;
        }
        lab.check_echo(from, "tcp", &format!("10.0.0.{HOST}"), &[8, 1448, 1473, 65_000, 1 << 20])?;
        lab.check_echo(from, "udp", &format!("[fd00::{HOST}]"), &[8, 1452, 1453, 8952, 65_000])?;
    }
    for reverse in ["", "-R"] {
        let scratch = Scratch::new("iperf")?;
        let mut server = rig.between.command("iperf3");
        server.args(["-s", "-1", "--forceflush"]);
        let mut server = Process::start("iperf3", server, &scratch.join("log"), &[])?;
        wait::until_true("iperf3 to listen", LIMIT, || Ok(server.log().contains("Server listening")))?;
        let report = lab.guests[0].run_for(&format!("iperf3 -J -c 10.0.0.{HOST} -t 1 {reverse}"), LIMIT)?;
        let rate = rate_of(&report, "TCP")?;
        println!("guest and plain host {reverse}: {rate:.0} Mbit/s");
        ensure!(rate > 10.0, "only {rate} Mbit/s");
        server.wait_exit(LIMIT)?;
    }
    Ok(())
}

/// What Wireshark and the plain host's kernel say of the frames that the guests send meanwhile.
fn listen(rig: &Rig, mtu: usize, vlan: Option<u16>, meanwhile: impl FnOnce(&Rig) -> Result<()>) -> Result<()> {
    rig.set_mtu(mtu)?;
    let ear = Ear::new(&rig.between, &["port1", "port2"])?;
    meanwhile(rig)?;
    let heard = ear.finish()?;
    println!("MTU {mtu}, VLAN {vlan:?}: Wireshark checked {} frames", heard.len());
    ensure!(heard.len() > 500, "only {} frames heard", heard.len());
    // It must have looked: at both protocols, and at datagrams that came in fragments, of which all callers send some by IPv6.
    for (checksum, of_fragments) in [("ip", false), ("tcp", false), ("udp", true)] {
        let mut right = heard.iter().filter(|frame| frame.good_checksums.contains(&checksum));
        let is_checked = right.any(|frame| !of_fragments || frame.is_reassembled);
        ensure!(is_checked, "Wireshark has found no {checksum} checksum to be right");
    }
    let tag = if vlan.is_some() { 4 } else { 0 };
    for frame in &heard {
        ensure!(frame.bad_checksums.is_empty(), "a wrong checksum: {frame:?}");
        ensure!(frame.length <= mtu + 14 + tag, "an oversized frame: {frame:?}");
        ensure!(frame.vlan == vlan, "not in VLAN {vlan:?}: {frame:?}");
    }
    let wrong = rig.checksum_errors()?;
    ensure!(wrong == 0, "the plain host's kernel has met {wrong} wrong checksums");
    Ok(())
}

#[test]
fn guests_talk_over_a_wire() -> Result<()> {
    test(|rig| {
        rig.lay(Wire::Direct, None)?;
        talk(rig, 1500)?;
        if is_dpdk() { Ok(()) } else { talk(rig, 9000) }
    })
}

#[test]
fn guests_talk_over_a_bridge_and_to_a_plain_host() -> Result<()> {
    test(|rig| {
        rig.lay(Wire::Bridge, None)?;
        let scratch = Scratch::new("echo")?;
        let program = e2e::machine::built_program("guest-agent", "GUEST_AGENT_BIN")?;
        let mut command = rig.between.command(&program.to_string_lossy());
        command.args(["serve-echo", &ECHO_PORT.to_string()]);
        let _server = Process::start("echo", command, &scratch.join("log"), &[])?;
        listen(rig, 1500, None, |rig| talk(rig, 1500))?;
        listen(rig, 1500, None, talk_to_host)?;
        // DPDK's tap knows no jumbo frames.
        if is_dpdk() { Ok(()) } else { listen(rig, 9000, None, talk_to_host) }
    })
}

#[test]
fn a_network_is_a_vlan_on_the_wire() -> Result<()> {
    test(|rig| {
        rig.lay(Wire::Bridge, Some(VLAN))?;
        listen(rig, 1500, Some(VLAN), |rig| talk(rig, 1500))?;
        if !is_dpdk() {
            talk(rig, 9000)?;
        }
        // The plain host is on the same wire, but in no VLAN.
        ensure!(!rig.near.reaches(0, &format!("10.0.0.{HOST}")), "a frame left its VLAN");
        Ok(())
    })
}

/// Migrates a guest from one host to the other while the first one pings it.
fn migrate(rig: &mut Rig, from: usize, to: usize) -> Result<()> {
    let [peer, source, target] = [0, from, to].map(|place| &rig.near.guests[place]);
    ping::begin(peer, "10.0.0.2")?;
    // The target's port has been there for a while, with the guest's address.
    sleep(Duration::from_millis(500));
    source.begin_migration(target, 8 << 30)?;
    let report = source.wait_migration(&["completed"], Duration::from_secs(60))?;
    sleep(Duration::from_millis(500));
    let pings = ping::end(peer)?;
    println!("migrated in {} ms, standing still for {} ms; {pings:?}", report["total-time"], report["downtime"]);
    rig.near.guests[to].adopt()?;
    rig.near.check_echo(0, "tcp", "10.0.0.2", &[100, 65_000])?;
    // What is on the wire when the guest announces itself meets a switch that knows it to be where that comes from.
    ensure!(pings.lost <= 10, "{pings:?}");
    rig.near.guests[from].respawn_incoming()
}

/// Ports with the guest's address are on both hosts for as long as both pods are there, which is longer than the migration.
#[test]
fn a_guest_migrates_to_the_other_host_and_back() -> Result<()> {
    test(|rig| {
        rig.lay(Wire::Bridge, None)?;
        rig.set_mtu(1500)?;
        rig.far.del_port("vm2")?;
        let address = format!(",mac={}", mac(2));
        rig.far.add_port(&format!("vm2=vhost-user:{}{address}", rig.near.socket("vm2").display()))?;
        rig.near.wait_reachable(0, "10.0.0.2")?;
        rig.near.add_port("vm3", &address[1..])?;
        let nic = Nic::new(&rig.near.socket("vm3"), &mac(2)).with(&format!("host_mtu={MTU}"));
        rig.near.guests.push(GuestSpec::new("vm3").nic(nic).incoming().start()?);
        migrate(rig, 1, 2)?;
        migrate(rig, 2, 1)?;
        rig.near.guests.pop();
        rig.near.del_port("vm3")?;
        rig.near.wait_reachable(0, "10.0.0.2")
    })
}

#[test]
fn the_wire_goes_and_comes_under_guests() -> Result<()> {
    test(|rig| {
        rig.lay(Wire::Direct, None)?;
        rig.set_mtu(1500)?;
        for _ in 0..3 {
            rig.near.wait_reachable(0, "10.0.0.2")?;
            rig.cut()?;
            rig.near.switch()?.wait_port("up", "connecting")?;
            rig.wire()?;
            rig.wait_up()?;
        }
        rig.near.wait_reachable(0, "10.0.0.2")?;
        rig.near.check_echo(0, "tcp", "10.0.0.2", &[1 << 20])?;
        // Uplinks close their books when an interface is gone.
        for log in [rig.near.switch()?.log(), rig.far.log()] {
            ensure!(log.contains("there is no interface up0") && !log.contains("not accounted for"), "{log}");
        }
        Ok(())
    })
}

/// Counters of a port of either switch: frames from it, frames to it, frames dropped as `full`.
fn counters(rig: &Rig, far: bool, port: &str) -> Result<[u64; 3]> {
    let switch = if far { &rig.far } else { rig.near.switch()? };
    let port = switch.port(port)?;
    Ok([port.count("rx_frames"), port.count("tx_frames"), port.dropped_for("full")])
}

#[test]
fn wireshark_reads_captures() -> Result<()> {
    test(|rig| {
        rig.lay(Wire::Direct, None)?;
        rig.set_mtu(1500)?;
        rig.near.wait_reachable(0, "10.0.0.2")?;
        let scratch = Scratch::new("capture")?;
        let file = scratch.join("x.pcapng");

        // What passes the uplink is what the counters say. Guests send by themselves, too: what passes while the capture
        // begins or ends may be in it or not.
        let outer = counters(rig, false, "up")?;
        let capture = rig.capture(rig.near.switch()?, "up", &file, &[])?;
        let before = counters(rig, false, "up")?;
        rig.near.guests[0].run("ping -c 10 -i 0.1 -W 2 10.0.0.2")?;
        rig.near.check_frames(0, 1, 7, &[60, 1514, 200])?;
        let after = counters(rig, false, "up")?;
        rig.end(capture)?;
        let end = counters(rig, false, "up")?;
        let seen = direction_and_comment(&file, "")?;
        for (at, direction) in ["1", "2"].into_iter().enumerate() {
            let count = seen.iter().filter(|(way, _)| way == direction).count() as u64;
            let counted = after[at] - before[at]..=end[at] - outer[at];
            ensure!(counted.contains(&count), "direction {direction}: {count} captured, {counted:?} counted, {seen:?}");
        }
        ensure!(direction_and_comment(&file, "icmp.type == 8")?.len() == 10, "echo requests");

        // A filter leaves out the rest, and a snap length the ends.
        let options = ["--filter", "icmp and dst host 10.0.0.2", "--snaplen", "60", "--count", "5"];
        let mut capture = rig.capture(rig.near.switch()?, "up", &file, &options)?;
        rig.near.guests[0].run("ping -c 6 -i 0.1 -s 200 -W 2 10.0.0.2")?;
        capture.wait_exit(LIMIT)?;
        let wanted = "icmp.type == 8 && ip.dst == 10.0.0.2 && frame.cap_len == 60 && frame.len == 242";
        ensure!(direction_and_comment(&file, wanted)?.len() == 5 && direction_and_comment(&file, "")?.len() == 5);

        // A guest that stands still has no buffers: what it misses is in the capture, with the reason.
        let capture = rig.capture(&rig.far, "vm2", &file, &["--filter", "ether proto 0x88b5"])?;
        let before = counters(rig, true, "vm2")?;
        let pid = rig.near.guests[1].pid().to_string();
        run("kill", &["-STOP", &pid])?;
        let request = serde_json::json!({"op": "frames_send", "dev": "eth0", "dst": mac(2), "src": mac(1), "stream": 9,
            "first": 0, "sizes": vec![60; 600]});
        let sent = rig.near.guests[0].call(&request).and_then(|_| {
            wait::until("all frames to be dealt with", LIMIT, || {
                let now = counters(rig, true, "vm2")?;
                let (delivered, full) = (now[1] - before[1], now[2] - before[2]);
                Ok((delivered + full >= 600 && full > 0).then_some((delivered, full)))
            })
        });
        run("kill", &["-CONT", &pid])?;
        let (delivered, full) = sent?;
        rig.end(capture)?;
        let dropped = direction_and_comment(&file, "frame.comment == \"dropped: full\"")?.len() as u64;
        let all = direction_and_comment(&file, "")?.len() as u64;
        println!("{delivered} delivered, {full} dropped; captured {all}, {dropped} of them with the reason");
        ensure!(dropped == full && all == 600, "captured {all}, {dropped} dropped, of {full} dropped by the counters");
        Ok(())
    })
}
