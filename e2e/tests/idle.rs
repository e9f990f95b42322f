//! What a switch costs while nobody talks, and how fast it is awake.

use anyhow::{Context, Result, bail, ensure};
use e2e::hostile::frontend::{Frontend, Setup};
use e2e::hostile::queue::Layout;
use e2e::lab::{Lab, Shared};
use e2e::qemu::ECHO_PORT;
use e2e::switch::Switch;
use e2e::{machine, process};
use serde_json::json;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Stations without a guest.
const FROM: u64 = 0x0266_0000_0001;
const TO: u64 = 0x0266_0000_0002;
const ARRIVAL_LIMIT: Duration = Duration::from_secs(5);
/// What waking up may cost.
const WAKING: Duration = Duration::from_millis(1);
/// Of both modes, until the shortest times show that.
const ROUNDS: usize = 4;

static LAB: Shared = Shared::new(Lab::pair);

#[test]
fn an_idle_switch_takes_next_to_nothing() -> Result<()> {
    LAB.test(|lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        let switch = lab.switch()?;
        // Ageing and the like may still be settling.
        sleep(Duration::from_secs(2));
        let (before, start) = (switch.usage()?, Instant::now());
        sleep(Duration::from_secs(10));
        let (after, passed) = (switch.usage()?, start.elapsed());
        let share = (after.cpu - before.cpu).as_secs_f64() / passed.as_secs_f64();
        println!(
            "idle: {:.2} % of a core, {} KiB resident, {} threads",
            share * 100.0,
            after.resident_kib,
            after.threads
        );
        ensure!(share <= 0.02, "an idle switch takes {:.1} % of a core", share * 100.0);
        ensure!(after.resident_kib <= 40 * 1024, "{} KiB resident", after.resident_kib);
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", switch.pid()))?;
        let huge = maps.lines().find(|line| line.starts_with("Private_Hugetlb:")).context("no smaps_rollup")?;
        ensure!(huge.split_whitespace().nth(1) == Some("0"), "hugepages of its own: {huge}");
        Ok(())
    })
}

/// Between frontends of our own, which wait for the frame without sleep. Some machines are slow by themselves after a pause, so
/// the switch is compared with itself: sleeping when idle, and polling.
#[test]
fn waking_up_costs_the_first_frame_less_than_a_millisecond() -> Result<()> {
    let _turn = machine::exclusive()?;
    costs_less_than(WAKING, first_frame)
}

/// Demands that what takes a time after idleness takes hardly longer with a switch that sleeps than with one that polls.
fn costs_less_than(bound: Duration, mut measure: impl FnMut(&str) -> Result<Duration>) -> Result<()> {
    let mut best = [Duration::MAX; 2];
    for _ in 0..ROUNDS {
        for (mode, best) in ["adaptive", "poll"].into_iter().zip(&mut best) {
            *best = measure(mode)?.min(*best);
        }
        if best[0] < best[1] + bound {
            return Ok(());
        }
    }
    bail!("after idleness {:?}, and {:?} with a switch that polls", best[0], best[1]);
}

/// How long a frame takes after idleness, in the median.
fn first_frame(mode: &str) -> Result<Duration> {
    let mut lab = Lab::around(Switch::start(&["--mode", mode])?)?;
    let cpus = machine::cpus()?;
    let mut join = |name: &str, mac: u64| {
        lab.add_port(name, "")?;
        Frontend::start(&lab.socket(name), mac, Setup::of(Layout::Split))
    };
    let (mut from, mut to) = (join("from", FROM)?, join("to", TO)?);
    // Not where the worker is: of two that poll on one CPU, one waits for the other.
    process::set_cpus(0, &cpus.load)?;
    let mut took = Vec::new();
    for number in 0..15u8 {
        // Far longer than a worker polls in vain.
        sleep(Duration::from_millis(300));
        let start = Instant::now();
        ensure!(from.send(TO, &[number; 64]), "the ring is full");
        from.tx.notify();
        while !to.takes(&[number; 64]) {
            ensure!(start.elapsed() < ARRIVAL_LIMIT, "frame {number} does not arrive");
        }
        took.push(start.elapsed());
    }
    process::set_cpus(0, &[cpus.switch, cpus.load].concat())?;
    took.sort();
    let [fastest, median, slowest] = [took[0], took[took.len() / 2], took[took.len() - 1]];
    println!("{mode}: a frame passes in {median:?} after 300 ms of idleness ({fastest:?} to {slowest:?})");
    Ok(median)
}

/// After idleness guests themselves are slow to wake (emulated ones by milliseconds), whatever the switch. So the
/// switch is compared with itself: sleeping when idle, and polling. A round trip wakes it twice, since it has long been asleep
/// again when such a guest answers. The shortest times of each come near to what there is no way around; how many it takes for
/// that depends on the machine.
#[test]
fn waking_up_costs_guests_less_than_a_millisecond_each_way() -> Result<()> {
    LAB.test(|lab| {
        let outcome = costs_less_than(2 * WAKING, |mode| {
            lab.switch_mut()?.restart(false, &["--mode", mode])?;
            lab.wait_reachable(0, "10.0.0.2")?;
            let busy = round_trip(lab, 0, 300)?;
            let idle = round_trip(lab, 1000, 5)?;
            println!("{mode}: round trip {busy} us when busy, {idle} us after 1 s of idleness");
            Ok(Duration::from_micros(idle))
        });
        lab.switch_mut()?.restart(false, &[])?;
        outcome
    })
}

/// The shortest of some round trips, which says most about the path and least about what else the machine does.
fn round_trip(lab: &Lab, gap_ms: u64, count: usize) -> Result<u64> {
    let request = json!({"op": "echo_check", "proto": "udp", "to": format!("10.0.0.2:{ECHO_PORT}"),
        "sizes": vec![64; count], "window": 1, "gap_ms": gap_ms});
    let tally = lab.guests[0].call_for(&request, Duration::from_secs(60))?;
    ensure!(tally["lost"] == 0, "{tally}");
    tally["min_us"].as_u64().context("no round trip")
}
