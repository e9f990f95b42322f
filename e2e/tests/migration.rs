//! A guest migrates from one port of the switch to another while it talks.

use anyhow::{Result, ensure};
use e2e::lab::{self, Lab};
use e2e::ping;
use e2e::qemu::{ECHO_PORT, Guest, GuestSpec, Nic};
use e2e::wait;
use serde_json::{Value, json};
use std::time::Duration;

/// Slow enough for traffic to change memory that was copied already.
const SLOW: u64 = 20 << 20;
/// What is copied before the traffic begins, and under it: together less than a guest has, so that the migration goes on.
const BEFORE: u64 = 24 << 20;
const UNDER: u64 = 30 << 20;
const FAST: u64 = 8 << 30;
const LIMIT: Duration = Duration::from_secs(60);
/// Connections whose data stays where the switch has put it until the migration is over.
const HELD: usize = 12;

/// `vm1`, the peer; `vm2`, which migrates; and `vm3`, where it migrates to: the same guest on another port.
fn lab() -> Result<Lab> {
    lab_with("packed=off")
}

fn lab_with(properties: &str) -> Result<Lab> {
    let mut lab = Lab::pair_with(properties)?;
    lab.add_port("vm3", "")?;
    let nic = Nic::new(&lab.socket("vm3"), &lab::mac(2)).with(properties);
    lab.guests.push(GuestSpec::new("vm3").nic(nic).incoming().start()?);
    Ok(lab)
}

/// What the shell command prints, without blanks around it.
fn say(guest: &Guest, command: &str) -> Result<String> {
    Ok(guest.run(command)?.trim().to_owned())
}

/// Listens on the ports of [`HELD`] without reading, so that what arrives stays in the buffers of the ring.
fn hold(guest: &Guest) -> Result<()> {
    let each = "(nc -l -p $((9000 + n)) >/tmp/held$n </dev/null) >/dev/null 2>&1 &";
    let listening = format!("[ $(netstat -ltn | grep -c :90[01]) -ge {HELD} ]");
    guest.run(&format!(
        "for n in $(seq {HELD}); do {each} done; until {listening}; do usleep 20000; done; killall -STOP nc"
    ))?;
    Ok(())
}

/// Lets the held data be read, and checks it.
fn check_held(guest: &Guest, sum: &str) -> Result<()> {
    guest.run("killall -CONT nc; while pidof nc >/dev/null; do usleep 50000; done")?;
    let sums = say(guest, "sha256sum /tmp/held* | cut -c1-64 | uniq -c")?;
    ensure!(sums == format!("{HELD} {sum}"), "held data has changed: {sums:?} instead of {sum}");
    Ok(())
}

/// The bytes that a migration has copied; an error if none is under way.
fn copied(source: &Guest) -> Result<u64> {
    let report = source.qmp("query-migrate")?;
    let status = report["status"].as_str().unwrap_or_default();
    ensure!(["setup", "active"].contains(&status), "the migration does not run: {report}");
    Ok(report["ram"]["transferred"].as_u64().unwrap_or(0))
}

/// Waits until it has copied so many more.
fn wait_copied(source: &Guest, bytes: u64) -> Result<()> {
    let before = copied(source)?;
    wait::until_true("memory to be copied", LIMIT, || Ok(copied(source)? >= before + bytes))
}

/// Waits until the guest has all data of [`HELD`] and the end of each connection, unread.
fn wait_held(guest: &Guest) -> Result<()> {
    let ended = "netstat -tn | grep -c ':90[01].* CLOSE_WAIT' || true";
    wait::until_true("the data to be held", LIMIT, || Ok(say(guest, ended)? == HELD.to_string()))
}

/// Migrates the guest at `from` to `to` under ping, a TCP stream and data that is held. Returns the pings lost.
fn migrate(lab: &mut Lab, from: usize, to: usize) -> Result<u64> {
    let (peer, source, target) = (&lab.guests[0], &lab.guests[from], &lab.guests[to]);
    let pattern =
        say(source, "dd if=/dev/urandom of=/tmp/pattern bs=1M count=16 2>/dev/null; sha256sum </tmp/pattern")?;
    let data =
        say(peer, "dd if=/dev/urandom of=/tmp/data bs=1k count=50 2>/dev/null; sha256sum </tmp/data | cut -c1-64")?;
    hold(source)?;
    ping::begin(peer, "10.0.0.2")?;
    source.begin_migration(target, SLOW)?;
    wait_copied(source, BEFORE)?;
    peer.run(&format!("for n in $(seq {HELD}); do (nc 10.0.0.2 $((9000 + n)) </tmp/data) >/dev/null 2>&1 & done"))?;
    let stream = json!({"op": "echo_check", "proto": "tcp", "to": format!("10.0.0.2:{ECHO_PORT}"),
        "sizes": [20_000, 100, 1448, 60_000], "seconds": 4.0, "gap_ms": 5});
    peer.begin(&stream)?;
    wait_copied(source, UNDER)?;
    wait_held(source)?;
    // Until then, the migration has to go on.
    copied(source)?;
    source.limit_migration(FAST)?;
    let report = source.wait_migration(&["completed"], LIMIT)?;
    let tally = peer.finish(&stream, LIMIT)?;
    ensure!(tally["corrupt"] == 0 && tally["received"].as_u64() > Some(20), "TCP under migration: {tally}");
    let pings = ping::end(peer)?;
    let (total, still) = (&report["total-time"], &report["downtime"]);
    println!("migrated in {total} ms, standing still for {still} ms; {pings:?}; TCP: {tally}");
    if pings.lost > 0
        && let Ok(switch) = lab.switch()
    {
        for port in ["vm1", "vm2", "vm3"] {
            println!("{port} dropped: {}", switch.port(port)?.0["drops"]);
        }
    }

    let target = &mut lab.guests[to];
    target.adopt()?;
    let after = say(target, "sha256sum </tmp/pattern")?;
    ensure!(pattern == after, "memory has changed: {pattern} became {after}");
    check_held(target, &data)?;
    lab.wait_reachable(to, "10.0.0.1")?;
    lab.check_echo(0, "tcp", "10.0.0.2", &[100, 65_000])?;
    lab.guests[from].respawn_incoming()?;
    Ok(pings.lost)
}

/// The features that a port shows.
fn features(lab: &Lab, port: &str) -> Result<Vec<Value>> {
    Ok(lab.switch()?.port(port)?.0["features"].as_array().cloned().unwrap_or_default())
}

#[test]
fn a_guest_migrates_there_and_back_while_it_talks() -> Result<()> {
    lab::alone(lab, |lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        let mut all = Vec::new();
        // To show it more often: E2E_MIGRATIONS=20.
        let count = std::env::var("E2E_MIGRATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(3);
        for (from, to) in [(1, 2), (2, 1)].into_iter().cycle().take(count) {
            all.push(migrate(lab, from, to)?);
        }
        println!("pings lost: {all:?}");
        ensure!(all.iter().all(|&lost| lost == 0), "pings lost: {all:?}");
        Ok(())
    })
}

#[test]
fn a_guest_with_packed_rings_migrates() -> Result<()> {
    lab::alone(
        || lab_with("packed=on"),
        |lab| {
            lab.wait_reachable(0, "10.0.0.2")?;
            ensure!(features(lab, "vm2")?.contains(&json!("RING_PACKED")), "{:?}", features(lab, "vm2")?);
            let lost = migrate(lab, 1, 2)?;
            ensure!(lost == 0, "{lost} pings lost");
            Ok(())
        },
    )
}

#[test]
fn a_cancelled_migration_goes_on_at_the_source() -> Result<()> {
    lab::alone(lab, |lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        let logging = |lab: &Lab| Ok::<_, anyhow::Error>(features(lab, "vm2")?.contains(&json!("LOG_ALL")));
        let (source, target) = (&lab.guests[1], &lab.guests[2]);
        ping::begin(&lab.guests[0], "10.0.0.2")?;
        source.begin_migration(target, 4 << 20)?;
        // For about a second, under ping.
        wait_copied(source, 4 << 20)?;
        wait::until_true("the port to log", LIMIT, || logging(lab))?;
        source.qmp("migrate_cancel")?;
        source.wait_migration(&["cancelled"], LIMIT)?;
        ensure!(!logging(lab)?, "the port logs on");
        let pings = ping::end(&lab.guests[0])?;
        println!("{pings:?}");
        ensure!(pings.lost == 0, "{pings:?}");
        lab.check_echo(0, "tcp", "10.0.0.2", &[100, 65_000, 1 << 20])
    })
}
