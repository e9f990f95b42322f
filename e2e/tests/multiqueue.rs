//! Guests with several queues, and a switch with two workers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::lab::{Lab, Shared, mac};
use e2e::qemu::{GuestSpec, Nic};
use e2e::scratch::Scratch;
use e2e::switch::Switch;
use e2e::wait;
use serde_json::Value;

const QUEUES: u16 = 4;

static LAB: Shared = Shared::new(|| pair(""));

/// Two guests with further properties of their devices, such as `packed=on`.
fn pair(properties: &str) -> Result<Lab> {
    let scratch = Scratch::new("workers")?;
    let file = scratch.join("sluice.toml");
    std::fs::write(&file, "[[worker]]\n[[worker]]\n")?;
    let mut lab = Lab::new(&["--config", &file.to_string_lossy()])?;
    for number in 1..=2 {
        let nic = Nic::new(&lab.socket(&format!("vm{number}")), &mac(number)).queues(QUEUES).with(properties);
        lab.add_guest_with(number, "queues=4", GuestSpec::new(&format!("vm{number}")).smp(2).nic(nic))?;
    }
    lab.boot()?;
    Ok(lab)
}

/// Frames that the switch has put into each queue of a guest.
fn delivered(lab: &Lab, name: &str) -> Result<Vec<u64>> {
    let port = lab.switch()?.port(name)?;
    port.queues().iter().map(|queue| queue["tx_frames"].as_u64().context("a queue without tx_frames")).collect()
}

fn grown(before: &[u64], after: &[u64]) -> Vec<u64> {
    after.iter().enumerate().map(|(index, count)| count - before.get(index).unwrap_or(&0)).collect()
}

#[test]
fn flows_spread_over_the_queues_that_the_guest_enables() -> Result<()> {
    LAB.test(|lab| flows_spread(lab, &[4, 2, 1, 4]))
}

/// Of so many queues that the guests enable, all are used.
fn flows_spread(lab: &Lab, counts: &[usize]) -> Result<()> {
    lab.wait_reachable(0, "10.0.0.2")?;
    for &enabled in counts {
        for guest in &lab.guests {
            guest.run(&format!("ethtool -L eth0 combined {enabled}"))?;
        }
        lab.wait_reachable(0, "10.0.0.2")?;
        let before = lab.switch().ok().map(|_| delivered(lab, "vm2")).transpose()?;
        lab.iperf(0, 1, 2, "-P 16")?;
        let Some(before) = before else { continue };
        let spread = grown(&before, &delivered(lab, "vm2")?);
        println!("{enabled} queues: {spread:?}");
        let busy = spread.iter().filter(|&&frames| frames > 20).count();
        // 16 flows on 4 queues: that one queue gets none has a chance of 1 in 25.
        let expected = if enabled == 4 { 3 } else { enabled };
        ensure!(busy >= expected && busy <= enabled, "{enabled} queues are enabled, used: {spread:?}");
    }
    Ok(())
}

#[test]
fn a_flow_stays_in_its_queue() -> Result<()> {
    LAB.test(|lab| {
        for guest in &lab.guests {
            guest.run("ethtool -L eth0 combined 4")?;
        }
        lab.wait_reachable(0, "10.0.0.2")?;
        let before = delivered(lab, "vm2")?;
        lab.iperf(0, 1, 2, "")?;
        let spread = grown(&before, &delivered(lab, "vm2")?);
        let (most, sum) = (spread.iter().max().copied().unwrap_or(0), spread.iter().sum::<u64>());
        // The rest is iperf3's control connection.
        ensure!(sum > 0 && sum - most < 60 + sum / 20, "one flow, several queues: {spread:?}");
        Ok(())
    })
}

#[test]
fn everything_arrives_with_several_queues() -> Result<()> {
    LAB.test(|lab| everything_arrives(lab))
}

fn everything_arrives(lab: &Lab) -> Result<()> {
    let sizes: Vec<usize> = (60..=1514).step_by(3).collect();
    lab.check_frames(0, 1, 1, &sizes)?;
    for proto in ["udp", "tcp"] {
        lab.check_echo(0, proto, "10.0.0.2", &[64, 1472, 4096, 65_000])?;
        lab.check_echo(1, proto, "10.0.0.1", &[64, 1472, 4096, 65_000])?;
    }
    Ok(())
}

#[test]
fn several_packed_rings_do_the_same() -> Result<()> {
    e2e::lab::alone(
        || pair("packed=on"),
        |lab| {
            flows_spread(lab, &[4])?;
            if let Ok(switch) = lab.switch() {
                ensure!(switch.port("vm1")?.has("RING_PACKED"), "{}", switch.port("vm1")?.0);
            }
            everything_arrives(lab)
        },
    )
}

/// Numbers of one kind from the workers of an answer.
fn of_workers(answer: &Value, key: &str) -> Result<Vec<u64>> {
    let workers = answer["workers"].as_array().context("no workers")?;
    workers.iter().map(|worker| worker[key].as_u64().with_context(|| format!("no {key} in {worker}"))).collect()
}

/// Has the queues of a port change their workers until told to stop. Returns how often.
fn keep_moving(switch: &Switch, stop: &AtomicBool) -> Result<usize> {
    let mut moves = 0;
    while !stop.load(Ordering::Relaxed) {
        for queue in 0..QUEUES {
            let worker = (moves / usize::from(QUEUES) + usize::from(queue)) % 2;
            switch.json(&["worker", "pin", &format!("vm1:{queue}"), &worker.to_string()])?;
            moves += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(moves)
}

#[test]
fn queues_move_between_workers_under_traffic() -> Result<()> {
    LAB.test(|lab| {
        let switch = lab.switch()?;
        for guest in &lab.guests {
            guest.run("ethtool -L eth0 combined 4")?;
        }
        lab.wait_reachable(0, "10.0.0.2")?;
        let served = of_workers(&switch.json(&["worker", "list"])?, "queues")?;
        ensure!(served == [4, 4], "queues of the workers: {served:?}");

        let stop = AtomicBool::new(false);
        let (traffic, moves) = std::thread::scope(|scope| {
            let mover = scope.spawn(|| keep_moving(switch, &stop));
            let traffic = lab
                .iperf(0, 1, 3, "-P 4")
                .and_then(|rate| lab.check_echo(0, "tcp", "10.0.0.2", &[65_000; 4]).map(|()| rate))
                .and_then(|rate| lab.check_frames(0, 1, 7, &(60..=1514).step_by(7).collect::<Vec<_>>()).map(|()| rate));
            stop.store(true, Ordering::Relaxed);
            (traffic, mover.join())
        });
        let moves = moves.map_err(|_| anyhow::anyhow!("the mover panicked"))??;
        println!("{:.0} Mbit/s over {moves} pins", traffic?);
        ensure!(moves > 20, "only {moves} moves");

        let list = switch.json(&["worker", "list"])?;
        let queues = list["queues"].as_array().context("no queues")?;
        let pinned = |port: &str| queues.iter().filter(|q| q["port"] == port && q["pinned"] == true).count();
        ensure!((pinned("vm1"), pinned("vm2")) == (4, 0), "{list}");
        switch.json(&["worker", "unpin", "vm1"])?;
        // Both guests take super-packets, so no payload was copied twice.
        let answer = switch.json(&["stats", "--cycles"])?;
        let (frames, delivered) = (of_workers(&answer, "frames")?, of_workers(&answer, "delivered")?);
        ensure!(frames.iter().chain(&delivered).all(|count| *count > 100), "{answer}");
        let workers = answer["workers"].as_array().context("no workers")?;
        ensure!(workers.iter().all(|worker| worker["copies_per_frame"] == 1.0), "{answer}");
        ensure!(workers.iter().all(|worker| worker["cycles_per_frame"].as_f64() > Some(10.0)), "{answer}");
        wait::until_true("the workers to be idle", Duration::from_secs(10), || {
            let list = switch.json(&["worker", "list"])?;
            let workers = list["workers"].as_array().context("no workers")?;
            Ok(workers.iter().all(|worker| worker["busy_percent"].as_f64() < Some(5.0)))
        })
    })
}

/// QEMU refuses to start, for ever, if the switch offers fewer queues than the guest is given.
#[test]
fn a_guest_that_asks_for_200_queue_pairs_starts() -> Result<()> {
    let make = || {
        let mut lab = Lab::new(&[])?;
        let nic = Nic::new(&lab.socket("vm1"), &mac(1)).queues(200);
        lab.add_guest_with(1, "", GuestSpec::new("vm1").memory_mib(256).nic(nic))?;
        lab.add_guest(2, "", GuestSpec::new("vm2"), "")?;
        lab.boot()?;
        Ok(lab)
    };
    e2e::lab::alone(make, |lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        lab.check_echo(1, "tcp", "10.0.0.1", &[65_000])
    })
}
