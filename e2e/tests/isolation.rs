//! Who may see whose frames: networks, VLANs, trunks, learned and forged addresses.

use anyhow::{Result, ensure};
use e2e::lab::{Lab, Shared, frames_seen, mac};
use e2e::qemu::{BOOT_LIMIT, GuestSpec};
use e2e::wait;
use serde_json::{Value, json};
use std::time::Duration;

const EVERYBODY: &str = "ff:ff:ff:ff:ff:ff";
const SOMEBODY: &str = "02:00:00:00:00:ee";
/// A multicast group that no protocol uses.
const GROUP: &str = "03:00:00:00:00:01";
const STREAM: u32 = 77;
const ARRIVAL_LIMIT: Duration = Duration::from_secs(10);

static LAB: Shared = Shared::new(|| {
    let mut lab = Lab::new(&[])?;
    // One of them with the other layout of rings.
    for (number, properties) in (1..).zip(["", "", "packed=on"]) {
        lab.add_guest(number, "", GuestSpec::new(&format!("vm{number}")), properties)?;
    }
    lab.boot()?;
    Ok(lab)
});

/// The lab with its ports set anew, when those that are to reach each other do.
fn arrange(lab: &mut Lab, settings: [&str; 3], reachable: &[(usize, &str)]) -> Result<()> {
    lab.set_ports(&settings)?;
    for (from, address) in reachable {
        lab.wait_reachable(*from, address)?;
    }
    Ok(())
}

fn watch_all(lab: &Lab) -> Result<()> {
    for guest in &lab.guests {
        guest.call(&json!({"op": "frames_watch", "dev": "eth0", "stream": STREAM}))?;
    }
    Ok(())
}

/// Sends one frame; `vlan` puts a tag on it.
fn send(lab: &Lab, from: usize, dst: &str, src: &str, vlan: Option<u16>) -> Result<()> {
    let request = json!({"op": "frames_send", "dev": "eth0", "dst": dst, "src": src, "vlan": vlan,
        "stream": STREAM, "first": 0, "sizes": [200]});
    lab.guests[from].call(&request).map(drop)
}

fn seen(lab: &Lab, at: usize) -> Result<Value> {
    frames_seen(&lab.guests[at], "eth0", STREAM)
}

fn wait_seen(lab: &Lab, at: usize, count: u64) -> Result<()> {
    let what = format!("{count} frames at {}", lab.guests[at].name());
    wait::until_true(&what, ARRIVAL_LIMIT, || Ok(seen(lab, at)?["received"].as_u64() >= Some(count)))?;
    let seen = seen(lab, at)?;
    ensure!(seen["received"] == count && seen["corrupt"] == 0, "{}: {seen}", lab.guests[at].name());
    Ok(())
}

/// Demands that each guest has seen exactly so many frames. Frames of one port stay in order, so a broadcast
/// that has arrived at its `hearers` proves that what was sent before it has arrived too, or never will.
fn expect(lab: &Lab, from: usize, counts: [u64; 3], hearers: &[usize]) -> Result<()> {
    send(lab, from, EVERYBODY, &mac(from + 1), None)?;
    for &at in hearers {
        wait_seen(lab, at, counts[at] + 1)?;
    }
    for (at, count) in counts.into_iter().enumerate().filter(|(at, _)| !hearers.contains(at)) {
        let seen = seen(lab, at)?;
        ensure!(seen["received"] == count, "{}: {seen}, expected {count}", lab.guests[at].name());
    }
    Ok(())
}

#[test]
fn networks_never_mix() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["network=blue", "network=blue", "network=red"], &[(0, "10.0.0.2")])?;
        ensure!(!lab.reaches(0, "10.0.0.3") && !lab.reaches(2, "10.0.0.1"), "red and blue talk");
        watch_all(lab)?;
        expect(lab, 0, [0, 0, 0], &[1])?;
        send(lab, 0, &mac(3), &mac(1), None)?;
        expect(lab, 0, [0, 2, 0], &[1])
    })
}

#[test]
fn access_vlans_are_separate_and_untagged() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["vlan=10", "vlan=10", "vlan=20"], &[(0, "10.0.0.2")])?;
        ensure!(!lab.reaches(0, "10.0.0.3") && !lab.reaches(2, "10.0.0.1"), "VLANs 10 and 20 talk");
        watch_all(lab)?;
        expect(lab, 0, [0, 0, 0], &[1])?;
        // A tag of one's own opens no door.
        send(lab, 0, EVERYBODY, &mac(1), Some(20))?;
        send(lab, 0, &mac(3), &mac(1), Some(20))?;
        expect(lab, 0, [0, 1, 0], &[1])?;
        ensure!(seen(lab, 1)?["vlans"] == json!([]), "tags at an access port: {}", seen(lab, 1)?);
        Ok(())
    })
}

#[test]
fn a_trunk_carries_its_vlans_tagged_and_no_others() -> Result<()> {
    carried(["trunk=10,20-21", "vlan=10", "vlan=20"])
}

#[test]
fn a_port_carries_its_networks_as_vlans_and_no_others() -> Result<()> {
    if std::env::var_os("E2E_SWITCH").is_some() {
        println!("left out: OVS has no such ports");
        return Ok(());
    }
    carried(["networks=blue:10,red:20", "network=blue", "network=red"])
}

/// The first port carries VLAN 10 of the second, and VLAN 20 of the third.
fn carried(settings: [&str; 3]) -> Result<()> {
    LAB.test(|lab| {
        let tagged = "for v in 10 20 30; do ip link add link eth0 name eth0.$v type vlan id $v; \
            ip link set eth0.$v up; ip addr add 10.0.$v.1/24 dev eth0.$v; done";
        lab.guests[0].run(tagged)?;
        lab.guests[1].run("ip addr add 10.0.10.2/24 dev eth0")?;
        lab.guests[2].run("ip addr add 10.0.20.3/24 dev eth0")?;
        let result = trunk(lab, settings);
        lab.guests[0].run("for v in 10 20 30; do ip link del eth0.$v; done")?;
        lab.guests[1].run("ip addr del 10.0.10.2/24 dev eth0")?;
        lab.guests[2].run("ip addr del 10.0.20.3/24 dev eth0")?;
        result
    })
}

fn trunk(lab: &mut Lab, settings: [&str; 3]) -> Result<()> {
    arrange(lab, settings, &[(0, "10.0.10.2"), (2, "10.0.20.1")])?;
    ensure!(!lab.reaches(1, "10.0.0.3"), "VLANs 10 and 20 talk");
    watch_all(lab)?;
    send(lab, 1, EVERYBODY, &mac(2), None)?;
    wait_seen(lab, 0, 1)?;
    ensure!(seen(lab, 0)?["vlans"] == json!([10]), "{}", seen(lab, 0)?);
    send(lab, 2, EVERYBODY, &mac(3), None)?;
    wait_seen(lab, 0, 2)?;
    ensure!(seen(lab, 0)?["vlans"] == json!([10, 20]), "{}", seen(lab, 0)?);
    // VLANs that the trunk does not carry, and frames without any, end here.
    send(lab, 0, EVERYBODY, &mac(1), Some(30))?;
    send(lab, 0, EVERYBODY, &mac(1), None)?;
    send(lab, 0, EVERYBODY, &mac(1), Some(10))?;
    wait_seen(lab, 1, 1)?;
    send(lab, 0, EVERYBODY, &mac(1), Some(20))?;
    wait_seen(lab, 2, 1)?;
    ensure!(seen(lab, 1)?["received"] == 1, "{}", seen(lab, 1)?);
    ensure!(seen(lab, 1)?["vlans"] == json!([]), "{}", seen(lab, 1)?);
    Ok(())
}

#[test]
fn unknown_and_group_addresses_flood_and_learned_ones_do_not() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["", "", ""], &[(0, "10.0.0.2"), (1, "10.0.0.3")])?;
        watch_all(lab)?;
        for (count, address) in (1..).zip([SOMEBODY, EVERYBODY, GROUP]) {
            send(lab, 0, address, &mac(1), None)?;
            wait_seen(lab, 1, count)?;
            wait_seen(lab, 2, count)?;
        }
        send(lab, 0, &mac(2), &mac(1), None)?;
        wait_seen(lab, 1, 4)?;
        // The sender never got any of it back, not even what it sends to itself.
        send(lab, 0, &mac(1), &mac(1), None)?;
        expect(lab, 0, [0, 4, 3], &[1, 2])
    })
}

#[test]
fn an_address_that_moves_is_followed() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["", "", ""], &[(0, "10.0.0.2"), (1, "10.0.0.3")])?;
        watch_all(lab)?;
        send(lab, 0, EVERYBODY, SOMEBODY, None)?;
        wait_seen(lab, 2, 1)?;
        wait_seen(lab, 1, 1)?;
        send(lab, 2, SOMEBODY, &mac(3), None)?;
        wait_seen(lab, 0, 1)?;
        send(lab, 1, EVERYBODY, SOMEBODY, None)?;
        wait_seen(lab, 2, 2)?;
        wait_seen(lab, 0, 2)?;
        // OVS follows only when it next looks over its cache.
        wait::until_true("frames to follow the address", ARRIVAL_LIMIT, || {
            send(lab, 2, SOMEBODY, &mac(3), None)?;
            Ok(seen(lab, 1)?["received"].as_u64() >= Some(2))
        })?;
        watch_all(lab)?;
        send(lab, 2, SOMEBODY, &mac(3), None)?;
        expect(lab, 2, [0, 1, 0], &[0, 1])
    })
}

#[test]
fn the_table_tells_where_addresses_are() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["", "", ""], &[(0, "10.0.0.2"), (2, "10.0.0.2")])?;
        let switch = lab.switch()?;
        let entries = switch.json(&["fdb", "show"])?;
        for number in 1..=3 {
            let is_there = |entry: &Value| entry["mac"] == mac(number) && entry["port"] == format!("vm{number}");
            ensure!(entries.as_array().is_some_and(|list| list.iter().any(is_there)), "no vm{number} in {entries}");
        }
        switch.json(&["fdb", "flush"])?;
        let entries = switch.json(&["fdb", "show"])?;
        let of_guests = |entry: &&Value| entry["static"] == false;
        // Guests may have said something since.
        ensure!(entries.as_array().is_some_and(|list| list.iter().filter(of_guests).count() < 3), "{entries}");
        lab.wait_reachable(0, "10.0.0.2")
    })
}

#[test]
fn forged_sources_are_dropped_and_counted() -> Result<()> {
    LAB.test(|lab| {
        lab.switch()?;
        let checked = format!("mac={},spoofcheck=on", mac(1));
        arrange(lab, [&checked, "", ""], &[(0, "10.0.0.2")])?;
        watch_all(lab)?;
        let before = lab.switch()?.port("vm1")?.dropped_for("spoofed");
        send(lab, 0, EVERYBODY, SOMEBODY, None)?;
        send(lab, 0, &mac(2), &mac(3), None)?;
        expect(lab, 0, [0, 0, 0], &[1, 2])?;
        let port = lab.switch()?.port("vm1")?;
        ensure!(port.dropped_for("spoofed") == before + 2, "{before} before, now {}", port.0);
        // Nor can anybody else take the address of the checked port.
        send(lab, 1, EVERYBODY, &mac(1), None)?;
        expect_marker(lab, 1)?;
        watch_all(lab)?;
        send(lab, 2, &mac(1), &mac(3), None)?;
        expect(lab, 2, [1, 0, 0], &[0, 1])
    })
}

/// Waits until everything that the guest has sent so far has been switched.
fn expect_marker(lab: &Lab, from: usize) -> Result<()> {
    const MARKER: u32 = STREAM + 1;
    let other = (from + 1) % 3;
    lab.guests[other].call(&json!({"op": "frames_watch", "dev": "eth0", "stream": MARKER}))?;
    lab.guests[from].call(&json!({"op": "frames_send", "dev": "eth0", "dst": EVERYBODY, "src": mac(from + 1),
        "stream": MARKER, "first": 0, "sizes": [60]}))?;
    wait::until_true("the marker", ARRIVAL_LIMIT, || {
        Ok(frames_seen(&lab.guests[other], "eth0", MARKER)?["received"].as_u64() >= Some(1))
    })
}

/// The sender's kernel is made to send more than its MTU would allow.
fn send_large(lab: &Lab, sizes: &[usize]) -> Result<()> {
    lab.guests[0].run("ip link set eth0 mtu 4000")?;
    let request = json!({"op": "frames_send", "dev": "eth0", "dst": EVERYBODY, "src": mac(1),
        "stream": STREAM, "first": 0, "sizes": sizes});
    let sent = lab.guests[0].call(&request);
    lab.guests[0].run("ip link set eth0 mtu 1500")?;
    sent.map(drop)
}

#[test]
fn frames_beyond_the_mtu_are_dropped() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["mtu=1500", "", ""], &[(0, "10.0.0.2"), (1, "10.0.0.3")])?;
        watch_all(lab)?;
        send_large(lab, &[1515, 3000, 4014])?;
        expect(lab, 0, [0, 0, 0], &[1, 2])?;
        // The limit of the one who receives counts as well, for him alone.
        arrange(lab, ["", "mtu=1500", ""], &[(0, "10.0.0.2"), (1, "10.0.0.3")])?;
        watch_all(lab)?;
        send_large(lab, &[1514, 1515, 3000])?;
        expect(lab, 0, [0, 1, 3], &[1, 2])
    })
}

#[test]
fn a_port_that_goes_takes_its_addresses_along() -> Result<()> {
    LAB.test(|lab| {
        arrange(lab, ["", "", ""], &[(0, "10.0.0.2"), (0, "10.0.0.3")])?;
        lab.guests[2].kill();
        if let Ok(switch) = lab.switch() {
            wait::until_true("the addresses of vm3 to go", ARRIVAL_LIMIT, || {
                let entries = switch.json(&["fdb", "show"])?;
                Ok(entries.as_array().is_some_and(|list| list.iter().all(|entry| entry["port"] != "vm3")))
            })?;
        }
        lab.guests[2].respawn()?;
        lab.guests[2].wait_ready(BOOT_LIMIT)?;
        lab.configure(2)?;
        lab.wait_reachable(0, "10.0.0.3")
    })
}
