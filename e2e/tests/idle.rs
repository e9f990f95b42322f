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

#[test]
fn the_first_packet_after_idleness_is_answered_almost_as_fast_as_a_busy_one() -> Result<()> {
    LAB.test(|lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        let median = |gap_ms: u64, count: usize| -> Result<u64> {
            let request = json!({"op": "echo_check", "proto": "udp", "to": format!("10.0.0.2:{ECHO_PORT}"),
                "sizes": vec![64; count], "window": 1, "gap_ms": gap_ms});
            let tally = lab.guests[0].call_for(&request, Duration::from_secs(60))?;
            ensure!(tally["lost"] == 0, "{tally}");
            tally["median_us"].as_u64().context("no median")
        };
        let busy = median(0, 500)?;
        let idle = median(2000, 7)?;
        println!("round trip: busy {busy} us, after 2 s of idleness {idle} us");
        ensure!(idle < busy + 1000, "busy {busy} us, after idleness {idle} us");
        Ok(())
    })
}
