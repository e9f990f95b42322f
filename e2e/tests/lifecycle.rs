//! Guests and switches come, go, crash and return.

use anyhow::{Context, Result, ensure};
use e2e::lab::{Lab, Shared};
use e2e::ping;
use e2e::qemu::{BOOT_LIMIT, ECHO_PORT};
use e2e::switch::Usage;
use e2e::wait;
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

static LAB: Shared = Shared::new(Lab::pair);

fn both_reachable(lab: &Lab) -> Result<()> {
    lab.wait_reachable(0, "10.0.0.2")?;
    lab.wait_reachable(1, "10.0.0.1")
}

#[test]
fn the_guest_may_be_there_before_its_port() -> Result<()> {
    LAB.test(|lab| {
        lab.del_port("vm2")?;
        lab.guests[1].respawn()?;
        let socket = lab.socket("vm2");
        wait::until_true(
            "QEMU to listen",
            BOOT_LIMIT,
            || Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok()),
        )?;
        lab.add_port("vm2", "")?;
        lab.guests[1].wait_ready(BOOT_LIMIT)?;
        lab.configure(1)?;
        both_reachable(lab)
    })
}

#[test]
fn a_guest_may_be_reset_and_reboot() -> Result<()> {
    LAB.test(|lab| {
        both_reachable(lab)?;
        lab.guests[1].qmp("system_reset")?;
        lab.guests[1].wait_ready(BOOT_LIMIT)?;
        lab.configure(1)?;
        both_reachable(lab)?;
        // Later than the answer to this very command.
        lab.guests[1].run("(usleep 300000; reboot -f) >/dev/null 2>&1 &")?;
        lab.guests[1].wait_ready(BOOT_LIMIT)?;
        lab.configure(1)?;
        both_reachable(lab)
    })
}

#[test]
fn a_guest_may_pause_and_go_on() -> Result<()> {
    LAB.test(|lab| {
        both_reachable(lab)?;
        for _ in 0..3 {
            lab.guests[1].qmp("stop")?;
            ensure!(!lab.reaches(0, "10.0.0.2"), "a paused guest answers");
            lab.guests[1].qmp("cont")?;
            both_reachable(lab)?;
        }
        Ok(())
    })
}

#[test]
fn a_guest_may_be_killed_and_return() -> Result<()> {
    LAB.test(|lab| {
        both_reachable(lab)?;
        lab.guests[1].kill();
        if let Ok(switch) = lab.switch() {
            switch.wait_port("vm2", "connecting")?;
            ensure!(switch.port("vm1")?.state() == "up", "vm1 went down with vm2");
        }
        lab.guests[1].respawn()?;
        lab.guests[1].wait_ready(BOOT_LIMIT)?;
        lab.configure(1)?;
        if let Ok(switch) = lab.switch() {
            ensure!(switch.port("vm2")?.state() == "up", "{}", switch.port("vm2")?.0);
        }
        both_reachable(lab)
    })
}

#[test]
fn a_restarted_switch_finds_its_ports_and_guests_again() -> Result<()> {
    LAB.test(|lab| {
        both_reachable(lab)?;
        for crash in [false, true] {
            let before = lab.switch()?.json(&["port", "list"])?;
            lab.switch_mut()?.restart(crash, &[])?;
            let names = |ports: &Value| -> Vec<Value> {
                ports.as_array().into_iter().flatten().map(|port| port["name"].clone()).collect()
            };
            let after = lab.switch()?.json(&["port", "list"])?;
            ensure!(names(&before) == names(&after), "{} became {}", before, after);
            lab.switch()?.wait_port("vm1", "up")?;
            lab.switch()?.wait_port("vm2", "up")?;
            both_reachable(lab)?;
            lab.check_echo(0, "tcp", "10.0.0.2", &[65_000])?;
        }
        Ok(())
    })
}

/// A stream that has to arrive whole, whatever happens meanwhile.
fn stream(seconds: f64) -> Value {
    json!({"op": "echo_check", "proto": "tcp", "to": format!("10.0.0.2:{ECHO_PORT}"),
        "sizes": [20_000, 100, 1448, 60_000], "seconds": seconds, "gap_ms": 5})
}

fn check_stream(lab: &Lab, stream: &Value) -> Result<()> {
    let tally = lab.guests[0].finish(stream, Duration::from_secs(60))?;
    println!("TCP: {tally}");
    ensure!(tally["corrupt"] == 0 && tally["received"].as_u64() > Some(20), "TCP: {tally}");
    Ok(())
}

/// Writes the guests' addresses into each other's tables. QEMU takes a guest's link down when its switch is gone; Linux forgets
/// all addresses then, and asks for them while nothing gets out of it yet: where it does, the next question is a second away,
/// whatever the switch does.
fn introduce(lab: &Lab) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let (number, mac) = (to + 1, lab.guests[to].mac());
        lab.guests[from].run(&format!("arp -s 10.0.0.{number} {mac}"))?;
    }
    Ok(())
}

/// Crashes the switch in the midst of ping and TCP. Returns the time without an answer: the new process is started as
/// soon as the old one is dead.
fn crash(lab: &mut Lab) -> Result<Duration> {
    crash_with(lab, &[])
}

/// [`crash`], after which the switch has these arguments.
fn crash_with(lab: &mut Lab, arguments: &[&str]) -> Result<Duration> {
    ping::begin(&lab.guests[0], "10.0.0.2")?;
    let stream = stream(3.0);
    lab.guests[0].begin(&stream)?;
    std::thread::sleep(Duration::from_secs(1));
    lab.switch_mut()?.restart(true, arguments)?;
    check_stream(lab, &stream)?;
    let pings = ping::end(&lab.guests[0])?;
    println!("{pings:?}");
    // What was not lost was answered late.
    Ok((ping::PERIOD * pings.lost_in_a_row as u32).max(pings.slowest))
}

/// Where guests are emulated, their own turn may make one of them late, but not most.
fn crash_often(lab: &mut Lab) -> Result<()> {
    let mut away = (0..3).map(|_| crash(lab)).collect::<Result<Vec<_>>>()?;
    away.sort_unstable();
    println!("without an answer for {away:?}");
    let is_soon = away[1] <= Duration::from_millis(300) && away[2] <= Duration::from_secs(1);
    ensure!(is_soon, "without an answer for {away:?}");
    Ok(())
}

/// A crash loses what is under way, and no more: the first answer comes within 300 ms of the new process's start, and
/// nothing comes twice. Guests do not see their links change.
#[test]
fn a_crashed_switch_is_back_within_300_ms() -> Result<()> {
    LAB.test(|lab| {
        both_reachable(lab)?;
        let changes = |lab: &Lab, guest: usize| lab.guests[guest].run("cat /sys/class/net/eth0/carrier_changes");
        let before = [changes(lab, 0)?, changes(lab, 1)?];
        crash_often(lab)?;
        ensure!(before == [changes(lab, 0)?, changes(lab, 1)?], "a link went down");
        Ok(())
    })
}

/// The same where nothing keeps connections: guests see their links go down, and what they know of each other must be told
/// to them.
#[test]
fn a_crashed_switch_without_a_keeper_is_back_soon() -> Result<()> {
    LAB.test(|lab| {
        both_reachable(lab)?;
        lab.switch_mut()?.restart(false, &["--keeper", "off"])?;
        both_reachable(lab)?;
        introduce(lab)?;
        let mut away = (0..3).map(|_| crash_with(lab, &["--keeper", "off"])).collect::<Result<Vec<_>>>()?;
        lab.switch_mut()?.restart(false, &[])?;
        away.sort_unstable();
        println!("without a keeper, without an answer for {away:?}");
        ensure!(away[1] <= Duration::from_millis(300), "without an answer for {away:?}");
        both_reachable(lab)
    })
}

/// Prints for how long guests are without an answer in many crashes, in all of which they have to find each other by themselves.
/// By hand: `cargo test -p e2e --test lifecycle outages -- --ignored --nocapture`, with `CRASHES=N`.
#[test]
#[ignore = "a measurement"]
fn outages_of_many_crashes() -> Result<()> {
    let count = std::env::var("CRASHES").ok().and_then(|count| count.parse().ok()).unwrap_or(20);
    LAB.test(|lab| {
        both_reachable(lab)?;
        let mut away = (0..count).map(|_| crash(lab)).collect::<Result<Vec<_>>>()?;
        println!("in order: {away:?}");
        away.sort_unstable();
        println!("sorted: {away:?}");
        Ok(())
    })
}

/// An upgrade loses nothing.
#[test]
fn a_new_switch_takes_over_unnoticed() -> Result<()> {
    LAB.test(taken_over_unnoticed)
}

/// All of it with rings whose position the frontend does not know after a crash.
#[test]
fn guests_with_packed_rings_survive_both() -> Result<()> {
    e2e::lab::alone(
        || Lab::pair_with("packed=on"),
        |lab| {
            both_reachable(lab)?;
            crash_often(lab)?;
            taken_over_unnoticed(lab)
        },
    )
}

fn taken_over_unnoticed(lab: &mut Lab) -> Result<()> {
    both_reachable(lab)?;
    let connects = lab.switch()?.port("vm1")?.0["connects"].clone();
    ping::begin(&lab.guests[0], "10.0.0.2")?;
    let stream = stream(4.0);
    lab.guests[0].begin(&stream)?;
    let mut still = Vec::new();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(800));
        still.push(lab.switch_mut()?.take_over()?);
    }
    check_stream(lab, &stream)?;
    let pings = ping::end(&lab.guests[0])?;
    println!("nothing forwarded for {still:?}; {pings:?}");
    ensure!(pings.lost == 0, "{pings:?}");
    still.sort_unstable();
    ensure!(still[1] <= Duration::from_millis(20), "nothing forwarded for {still:?}");
    ensure!(lab.switch()?.port("vm1")?.0["connects"] == connects, "vm1 was connected to again");
    // The new process knows the connections as well as the old one: a guest may reboot, and its port go.
    lab.guests[1].qmp("system_reset")?;
    lab.guests[1].wait_ready(BOOT_LIMIT)?;
    lab.configure(1)?;
    both_reachable(lab)
}

/// Four datagrams under way, and no more until they are answered: a frame that a ring keeps because somebody was not
/// notified has nothing behind it that would get it moving.
#[test]
fn no_ring_is_left_waiting() -> Result<()> {
    /// Datagrams under way.
    const WINDOW: u64 = 4;
    /// Crashes, and as many takeovers.
    const ROUNDS: u64 = 4;
    LAB.test(|lab| {
        both_reachable(lab)?;
        let echo = json!({"op": "echo_check", "proto": "udp", "to": format!("10.0.0.2:{ECHO_PORT}"), "window": WINDOW,
            "sizes": [64, 1400, 9000, 200, 20_000], "seconds": 1.4});
        let mut all = Vec::new();
        for round in 0..2 * ROUNDS {
            let crash = round % 2 == 1;
            lab.guests[0].begin(&echo)?;
            // In the midst of it, and at another moment each time.
            std::thread::sleep(Duration::from_millis(400 + 37 * round));
            if crash {
                lab.switch_mut()?.restart(true, &[])?;
            } else {
                lab.switch_mut()?.take_over()?;
            }
            let tally = lab.guests[0].finish(&echo, Duration::from_secs(30))?;
            let lost = if crash { WINDOW } else { 0 };
            let fine = ["corrupt", "duplicates", "late"].iter().all(|count| tally[count] == 0)
                && tally["lost"].as_u64() <= Some(lost)
                && tally["received"].as_u64() > Some(20);
            ensure!(fine, "after a {}: {tally}", if crash { "crash" } else { "takeover" });
            all.push((tally["received"].clone(), tally["lost"].clone(), tally["max_us"].clone()));
        }
        println!("received, lost, slowest: {all:?}");
        Ok(())
    })
}

/// A socket that is back gets connected to within 100 ms; we listen ourselves, which measures without QEMU's start.
#[test]
fn the_switch_reconnects_at_once_and_waits_quietly() -> Result<()> {
    LAB.test(|lab| {
        let socket = lab.socket("back");
        lab.add_port("back", "")?;
        let mut delays = Vec::new();
        for _ in 0..21 {
            let start = Instant::now();
            let listener = UnixListener::bind(&socket)?;
            listener.set_nonblocking(true)?;
            let connection =
                wait::until("the switch to connect", Duration::from_secs(5), || Ok(listener.accept().ok()))?;
            delays.push(start.elapsed());
            // Connection first: then the switch looks for the socket while it is not there.
            drop(connection);
            drop(listener);
            std::fs::remove_file(&socket)?;
        }
        delays.sort();
        println!("reconnects: median {:?}, slowest {:?}", delays[10], delays[20]);
        ensure!(delays[10] <= Duration::from_millis(100), "{delays:?}");

        let switch = lab.switch()?;
        let (log, before, start) = (switch.log().len(), switch.usage()?.cpu, Instant::now());
        std::thread::sleep(Duration::from_secs(3));
        let (spent, passed) = (switch.usage()?.cpu - before, start.elapsed());
        let share = spent.as_secs_f64() / passed.as_secs_f64();
        println!("waiting costs {:.2} % of a core", share * 100.0);
        ensure!(share < 0.05, "waiting for a socket takes {share} of a core");
        let logged = switch.log().len() - log;
        ensure!(logged < 2000, "waiting for a socket logged {logged} bytes");
        lab.del_port("back")
    })
}

/// 64 ports come and go while two guests talk: nothing of theirs is lost, nothing of ours is left.
#[test]
fn ports_come_and_go_under_traffic_without_loss_or_leak() -> Result<()> {
    const PORTS: usize = 64;
    const ROUNDS: usize = 12;
    LAB.test(|lab| {
        both_reachable(lab)?;
        let traffic = json!({"op": "echo_check", "proto": "udp", "to": format!("10.0.0.2:{ECHO_PORT}"),
            "sizes": [64, 1400, 200, 4000], "window": 4, "seconds": 2.0});
        let (mut usage, mut allocated) = (vec![], vec![]);
        for _ in 0..ROUNDS {
            lab.guests[0].begin(&traffic)?;
            let churned = churn(lab, PORTS);
            let tally = lab.guests[0].finish(&traffic, Duration::from_secs(30))?;
            churned?;
            ensure!(tally["lost"] == 0 && tally["corrupt"] == 0 && tally["duplicates"] == 0, "{tally}");
            ensure!(tally["received"].as_u64() > Some(100), "hardly any traffic: {tally}");
            usage.push(at_rest(lab)?);
            allocated.push(lab.switch()?.allocated()? as i64);
        }
        println!("{usage:?}, {allocated:?}");
        // The first round starts what is kept.
        let (first, last) = (usage[0], usage[ROUNDS - 1]);
        ensure!(last.fds <= first.fds, "{} descriptors became {}", first.fds, last.fds);
        // The control plane's pool may just have a few more at work; a leak would be one per port.
        ensure!(last.threads <= first.threads + 8, "{} threads became {}", first.threads, last.threads);
        // What a process holds grows for a while, in steps, as its heap finds its form, and now and then a table of it grows;
        // a leak shows in every round.
        let mut grown: Vec<i64> = allocated.windows(2).skip(1).map(|pair| pair[1] - pair[0]).collect();
        grown.sort_unstable();
        let (usual, all) = (grown[grown.len() / 2], allocated[ROUNDS - 1] - allocated[1]);
        ensure!(usual < PORTS as i64, "{PORTS} ports usually leave {usual} bytes: {allocated:?}");
        ensure!(all < 32 << 10, "{ROUNDS} rounds left {all} bytes: {allocated:?}");
        ensure!(last.resident_kib < 40 * 1024, "{} KiB resident", last.resident_kib);
        Ok(())
    })
}

/// What the switch uses once that stays: the connections of the last commands take a moment to end.
fn at_rest(lab: &Lab) -> Result<Usage> {
    let switch = lab.switch()?;
    wait::until_stays("a switch at rest", Duration::from_secs(10), Duration::from_millis(500), || {
        Ok(switch.usage()?.fds)
    })?;
    switch.usage()
}

/// Adds ports and removes them; behind every other there is something that accepts.
fn churn(lab: &mut Lab, ports: usize) -> Result<()> {
    let names: Vec<String> = (0..ports).map(|index| format!("churn{index}")).collect();
    let sockets: Vec<_> = names.iter().map(|name| lab.socket(name)).collect();
    let listeners = sockets.iter().step_by(2).map(UnixListener::bind).collect::<Result<Vec<_>, _>>()?;
    for name in &names {
        lab.add_port(name, "").with_context(|| name.clone())?;
    }
    for name in &names {
        lab.del_port(name)?;
    }
    drop(listeners);
    for socket in sockets.iter().step_by(2) {
        std::fs::remove_file(socket)?;
    }
    Ok(())
}
