//! Guests with several queues.

use anyhow::{Context, Result, ensure};
use e2e::lab::{Lab, Shared, mac};
use e2e::qemu::{GuestSpec, Nic};

const QUEUES: u16 = 4;

static LAB: Shared = Shared::new(|| {
    let mut lab = Lab::new(&[])?;
    for number in 1..=2 {
        let nic = Nic::new(&lab.socket(&format!("vm{number}")), &mac(number)).queues(QUEUES);
        lab.add_guest_with(number, "queues=4", GuestSpec::new(&format!("vm{number}")).smp(2).nic(nic))?;
    }
    lab.boot()?;
    Ok(lab)
});

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
    LAB.test(|lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        for enabled in [4, 2, 1, 4] {
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
    })
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
    LAB.test(|lab| {
        let sizes: Vec<usize> = (60..=1514).step_by(3).collect();
        lab.check_frames(0, 1, 1, &sizes)?;
        for proto in ["udp", "tcp"] {
            lab.check_echo(0, proto, "10.0.0.2", &[64, 1472, 4096, 65_000])?;
            lab.check_echo(1, proto, "10.0.0.1", &[64, 1472, 4096, 65_000])?;
        }
        Ok(())
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
