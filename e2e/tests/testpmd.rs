//! A second, independent driver: DPDK's virtio-user in server mode.

use anyhow::{Context, Result, ensure};
use e2e::lab::{Lab, alone, mac};
use e2e::testpmd::{Counts, Testpmd, TestpmdSpec};
use e2e::wait;
use std::time::Duration;

const SETTLE_LIMIT: Duration = Duration::from_secs(20);

fn spec(lab: &Lab, driver: &str, queues: u16, length: u16) -> TestpmdSpec {
    let ports = (1..=2).map(|number| (lab.socket(&format!("vm{number}")), mac(number))).collect();
    TestpmdSpec { ports, driver: driver.to_owned(), queues, length }
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

/// The driver really uses what it was told to: most of these settings are on unless they are off.
fn is_negotiated(lab: &Lab, driver: &str) -> Result<()> {
    let Ok(switch) = lab.switch() else {
        return Ok(());
    };
    let port = switch.port("vm1")?;
    for (feature, setting) in [("RING_PACKED", "packed_vq=1"), ("MRG_RXBUF", "mrg_rxbuf=1"), ("IN_ORDER", "in_order=1")]
    {
        ensure!(port.has(feature) == driver.contains(setting), "{feature} with {driver}: {}", port.0["features"]);
    }
    Ok(())
}

fn forward(lab: &mut Lab, driver: &str, queues: u16) -> Result<()> {
    let mut testpmd = Testpmd::start(&spec(lab, driver, queues, 64))?;
    let mut run = || {
        testpmd.wait_ready()?;
        is_negotiated(lab, driver)?;
        circulate(&mut testpmd, 50_000)?;
        counts_agree(lab, &mut testpmd)?;
        testpmd.set_length(1514)?;
        circulate(&mut testpmd, 50_000)?;
        counts_agree(lab, &mut testpmd)
    };
    let result = run();
    if result.is_err() {
        println!("{}", testpmd.log_tail());
    }
    drop(testpmd);
    // The counters of the next round start from nothing.
    lab.set_ports(&["", ""])?;
    result
}

/// DPDK has code of its own for nearly each of these.
fn drivers_with(layout: &str) -> Result<()> {
    alone(lab, |lab| {
        for (buffers, order, queues) in [(1, 1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1), (1, 1, 2), (0, 1, 2)] {
            let driver = format!("{layout},mrg_rxbuf={buffers},in_order={order}");
            forward(lab, &driver, queues).with_context(|| format!("{driver}, {queues} queues"))?;
        }
        Ok(())
    })
}

#[test]
fn drivers_with_split_rings() -> Result<()> {
    drivers_with("packed_vq=0")
}

#[test]
fn drivers_with_packed_rings() -> Result<()> {
    drivers_with("packed_vq=1")
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
fn taken_over(driver: &str) -> Result<()> {
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
