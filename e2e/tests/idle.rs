//! What a switch costs while nobody talks, and how fast it is awake.

use anyhow::{Context, Result, ensure};
use e2e::lab::{Lab, Shared};
use e2e::qemu::ECHO_PORT;
use serde_json::json;
use std::thread::sleep;
use std::time::{Duration, Instant};

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

/// After idleness guests themselves are slow to wake (emulated ones by milliseconds), whatever the switch. So the
/// switch is compared with itself: sleeping when idle, and polling.
#[test]
fn waking_up_costs_the_first_packet_less_than_a_millisecond() -> Result<()> {
    LAB.test(|lab| {
        let mut best = [u64::MAX; 2];
        for round in 0..4 {
            let mode = ["adaptive", "poll"][round % 2];
            lab.switch_mut()?.restart(false, &["--mode", mode])?;
            lab.wait_reachable(0, "10.0.0.2")?;
            let busy = round_trip(lab, 0, 300)?;
            let idle = round_trip(lab, 1000, 5)?;
            println!("{mode}: round trip {busy} us when busy, {idle} us after 1 s of idleness");
            best[round % 2] = best[round % 2].min(idle);
        }
        lab.switch_mut()?.restart(false, &[])?;
        let [adaptive, poll] = best;
        ensure!(adaptive < poll + 1000, "after idleness {adaptive} us, {poll} us with a switch that polls");
        Ok(())
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
