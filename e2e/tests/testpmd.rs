//! A second, independent driver: DPDK's virtio-user in server mode.

use anyhow::{Result, ensure};
use e2e::lab::{Lab, alone, mac};
use e2e::testpmd::{Counts, Testpmd, TestpmdSpec};
use e2e::wait;
use std::time::Duration;

const SETTLE_LIMIT: Duration = Duration::from_secs(20);

fn spec(lab: &Lab, driver: &'static str, queues: u16, length: u16) -> TestpmdSpec {
    let ports = (1..=2).map(|number| (lab.socket(&format!("vm{number}")), mac(number))).collect();
    TestpmdSpec { ports, driver, queues, length }
}

fn lab() -> Result<Lab> {
    let mut lab = Lab::new(&[])?;
    lab.add_port("vm1", "")?;
    lab.add_port("vm2", "")?;
    Ok(lab)
}

/// Waits until the counters stand still.
fn settled(testpmd: &mut Testpmd) -> Result<Vec<Counts>> {
    let mut last = testpmd.counts()?;
    let mut still = 0;
    wait::until("the counters to stand still", SETTLE_LIMIT, || {
        let now = testpmd.counts()?;
        still = if now == last { still + 1 } else { 0 };
        last.clone_from(&now);
        Ok((still >= 10).then_some(now))
    })
}

/// Lets frames circulate until `frames` have arrived.
fn circulate(testpmd: &mut Testpmd, frames: u64) -> Result<()> {
    let start: u64 = testpmd.counts()?.iter().map(|port| port.rx_frames).sum();
    testpmd.start_circulating(2)?;
    wait::until_true("frames to circulate", SETTLE_LIMIT, || {
        Ok(testpmd.counts()?.iter().map(|port| port.rx_frames).sum::<u64>() >= start + frames)
    })
}

fn counts_agree(lab: &Lab, testpmd: &mut Testpmd) -> Result<()> {
    testpmd.start_draining()?;
    let counts = settled(testpmd)?;
    println!("{counts:?}");
    ensure!(counts[0].tx_frames == counts[1].rx_frames, "frames from 1 to 2: {counts:?}");
    ensure!(counts[1].tx_frames == counts[0].rx_frames, "frames from 2 to 1: {counts:?}");
    ensure!(counts[0].tx_bytes == counts[1].rx_bytes, "bytes from 1 to 2: {counts:?}");
    let Ok(switch) = lab.switch() else {
        return Ok(());
    };
    for (name, port) in ["vm1", "vm2"].into_iter().zip(&counts) {
        let ours = switch.port(name)?;
        let seen = [ours.count("rx_frames"), ours.count("rx_bytes"), ours.count("tx_frames"), ours.count("tx_bytes")];
        let theirs = [port.tx_frames, port.tx_bytes, port.rx_frames, port.rx_bytes];
        ensure!(seen == theirs, "{name}: the switch has {seen:?}, the driver {theirs:?}");
    }
    Ok(())
}

fn forward(driver: &'static str, queues: u16) -> Result<()> {
    alone(lab, |lab| {
        for length in [64, 1514] {
            let mut testpmd = Testpmd::start(&spec(lab, driver, queues, length))?;
            let result = testpmd.wait_ready().and_then(|()| circulate(&mut testpmd, 50_000));
            let result = result.and_then(|()| counts_agree(lab, &mut testpmd));
            if result.is_err() {
                println!("{}", testpmd.log_tail());
            }
            result?;
            drop(testpmd);
            // The counters of the next round start from nothing.
            lab.set_ports(&["", ""])?;
        }
        Ok(())
    })
}

#[test]
fn default_driver() -> Result<()> {
    forward("", 1)
}

#[test]
fn in_order_driver() -> Result<()> {
    forward("mrg_rxbuf=0,in_order=1", 1)
}

#[test]
fn driver_without_mergeable_buffers() -> Result<()> {
    forward("mrg_rxbuf=0", 1)
}

#[test]
fn driver_with_packed_rings_if_we_offer_them() -> Result<()> {
    forward("packed_vq=1", 1)
}

#[test]
fn driver_with_two_queues() -> Result<()> {
    forward("", 2)
}

#[test]
fn a_driver_that_crashes_returns() -> Result<()> {
    alone(lab, |lab| {
        for _ in 0..3 {
            let mut testpmd = Testpmd::start(&spec(lab, "", 1, 64))?;
            testpmd.wait_ready()?;
            circulate(&mut testpmd, 20_000)?;
            testpmd.kill();
        }
        Ok(())
    })
}

#[test]
fn a_switch_that_restarts_under_traffic_goes_on() -> Result<()> {
    alone(lab, |lab| {
        let mut testpmd = Testpmd::start(&spec(lab, "", 1, 64))?;
        testpmd.wait_ready()?;
        circulate(&mut testpmd, 20_000)?;
        for crash in [false, true] {
            lab.switch_mut()?.restart(crash, &[])?;
            testpmd.say("stop")?;
            wait::until_true("testpmd to accept the switch again", SETTLE_LIMIT, || {
                // It looks after its sockets only when somebody asks for the links' state.
                testpmd.say("show port info all")?;
                let ports = lab.switch()?.json(&["port", "list"])?;
                Ok(ports.as_array().is_some_and(|ports| ports.iter().all(|port| port["state"] == "up")))
            })?;
            circulate(&mut testpmd, 20_000)?;
        }
        Ok(())
    })
}

/// Frames circulate on while new processes take over, and the counters of both sides agree to the last one.
fn taken_over(driver: &'static str) -> Result<()> {
    alone(lab, |lab| {
        let mut testpmd = Testpmd::start(&spec(lab, driver, 1, 64))?;
        testpmd.wait_ready()?;
        circulate(&mut testpmd, 20_000)?;
        for _ in 0..3 {
            let still = lab.switch_mut()?.take_over()?;
            let start: u64 = testpmd.counts()?.iter().map(|port| port.rx_frames).sum();
            println!("nothing forwarded for {still:?}");
            wait::until_true("frames to circulate on", SETTLE_LIMIT, || {
                Ok(testpmd.counts()?.iter().map(|port| port.rx_frames).sum::<u64>() >= start + 20_000)
            })?;
        }
        counts_agree(lab, &mut testpmd)
    })
}

#[test]
fn a_default_driver_is_taken_over() -> Result<()> {
    taken_over("")
}

#[test]
fn an_in_order_driver_is_taken_over() -> Result<()> {
    taken_over("mrg_rxbuf=0,in_order=1")
}

#[test]
fn a_packed_driver_is_taken_over() -> Result<()> {
    taken_over("packed_vq=1")
}
