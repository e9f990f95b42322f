//! Real guests: TCP and UDP between two virtual machines, by iperf3.

use anyhow::{Context, Result};
use e2e::lab::{Fabric, Lab};
use e2e::peer::Ovs;
use e2e::qemu::GuestSpec;
use e2e::switch::Switch;
use serde_json::Value;
use std::time::{Duration, Instant};

use super::peers::Peer;
use super::results::{Cell, Metric, Plot, Set};

/// A switch between guests, and its name.
pub(super) const FABRICS: [(Peer, &str); 3] =
    [(Peer::Ours, "Sluice"), (Peer::Ovs, "OVS-DPDK"), (Peer::Ovs, "OVS with TSO")];
/// Jumbo frames, which all three have to be told of.
const JUMBO: u32 = 9000;

/// One flow.
pub(super) struct Flow {
    pub(super) name: String,
    /// What iperf3 is told beside time and target.
    arguments: String,
    offloads: bool,
    from: usize,
    /// Whether guests run wherever the kernel puts them, the switch's CPU included.
    anywhere: bool,
}

pub(super) fn flows(quick: bool) -> Vec<Flow> {
    let flow = |name: &str, arguments: &str, offloads, from| Flow {
        name: name.to_owned(),
        arguments: arguments.to_owned(),
        offloads,
        from,
        anywhere: false,
    };
    let mut flows = vec![flow("TCP", "", true, 0), flow("TCP back", "", true, 1)];
    if !quick {
        flows.push(Flow { anywhere: true, ..flow("TCP, guests on any CPU", "", true, 0) });
        flows.push(Flow { anywhere: true, ..flow("TCP back, guests on any CPU", "", true, 1) });
        flows.push(flow("TCP, 4 streams", "-P 4", true, 0));
        flows.push(flow("TCP, no offloads", "", false, 0));
        flows.push(flow("UDP", "-u -b 0 -l 1400", true, 0));
    }
    flows
}

/// Measures all of it with those of the peers that are for guests; `told` hears of each flow. Guests are booted for each switch and MTU, in turn.
///
/// # Errors
/// If guests cannot be started at all; what fails with one switch is in its cells.
pub fn measure(peers: &[Peer], rounds: u32, seconds: u32, quick: bool, mut told: impl FnMut(&str)) -> Result<Set> {
    let _turn = e2e::machine::exclusive()?;
    let metrics = [("throughput", "Mbit/s", Plot::Bars), ("switch", "% of a CPU", Plot::None)];
    let metrics = metrics.map(|(name, unit, plot)| Metric { name: name.to_owned(), unit: unit.to_owned(), plot });
    let how = format!(
        "Two guests ({} acceleration) on one CPU, the switch on the other; iperf3, what the receiver got. \"On any CPU\": \
         guests share the switch's CPU with it; OVS, which polls, never gives it up by itself.",
        e2e::machine::accelerator()?
    );
    let mut set = Set {
        name: "iperf".to_owned(),
        title: "Between real guests".to_owned(),
        how,
        row: "flow".to_owned(),
        metrics: metrics.into(),
        cells: Vec::new(),
    };
    let mtus: &[u32] = if quick { &[1500] } else { &[1500, JUMBO] };
    for round in 1..=rounds {
        for &mtu in mtus {
            for (_, fabric) in FABRICS.into_iter().filter(|(peer, _)| peers.contains(peer)) {
                let got = with_guests(fabric, mtu, seconds, quick, |row, values| {
                    told(&format!(
                        "iperf {round}/{rounds}  {row:>38}  {fabric:<12} {:9.0} {:9.1}",
                        values[0], values[1]
                    ));
                    let cell = cell(&mut set, row, fabric);
                    cell.samples.iter_mut().zip(values).for_each(|(samples, value)| samples.push(value));
                });
                if let Err(error) = got {
                    told(&format!("iperf {round}/{rounds}  {fabric}, MTU {mtu} failed: {error:#}"));
                    cell(&mut set, &format!("MTU {mtu}"), fabric).failures.push(format!("{error:#}"));
                }
            }
        }
    }
    Ok(set)
}

fn cell<'a>(set: &'a mut Set, row: &str, column: &str) -> &'a mut Cell {
    let place = set.cells.iter().position(|cell| cell.row == row && cell.column == column).unwrap_or_else(|| {
        set.cells.push(Cell {
            row: row.to_owned(),
            column: column.to_owned(),
            samples: vec![Vec::new(); 2],
            ..Cell::default()
        });
        set.cells.len() - 1
    });
    &mut set.cells[place]
}

/// The row of a flow.
pub(super) fn row(flow: &Flow, mtu: u32) -> String {
    format!("{}, MTU {mtu}", flow.name)
}

fn with_guests(fabric: &str, mtu: u32, seconds: u32, quick: bool, mut got: impl FnMut(&str, [f64; 2])) -> Result<()> {
    let switch = match fabric {
        "OVS-DPDK" => Fabric::Ovs(Ovs::start(false)?),
        "OVS with TSO" => Fabric::Ovs(Ovs::start(true)?),
        _ => Fabric::Sluice(Switch::start(&[])?),
    };
    let mut lab = Lab::around(switch)?;
    let (port, device) =
        if mtu == 1500 { (String::new(), String::new()) } else { (format!("mtu={mtu}"), format!("host_mtu={mtu}")) };
    for number in 1..=2 {
        lab.add_guest(number, &port, GuestSpec::new(&format!("vm{number}")), &device)?;
    }
    lab.boot()?;
    for guest in &lab.guests {
        guest.run(&format!("ip link set eth0 mtu {mtu}"))?;
    }
    lab.wait_reachable(0, "10.0.0.2")?;
    for flow in flows(quick) {
        let state = if flow.offloads { "on" } else { "off" };
        for guest in &lab.guests {
            guest.run(&format!("ethtool -K eth0 tx {state} sg {state} tso {state} gso {state} gro {state}"))?;
            guest.spread(flow.anywhere)?;
        }
        let values = flow_between(&lab, &flow, seconds).with_context(|| flow.name.clone())?;
        got(&row(&flow, mtu), values);
    }
    Ok(())
}

/// What the receiver got, in Mbit/s, and what the switch took meanwhile.
fn flow_between(lab: &Lab, flow: &Flow, seconds: u32) -> Result<[f64; 2]> {
    let (from, to) = (flow.from, 1 - flow.from);
    lab.serve_iperf(to)?;
    let usage = || match &lab.fabric {
        Fabric::Sluice(switch) => switch.usage().map(|usage| usage.cpu),
        Fabric::Ovs(ovs) => ovs.usage().map(|usage| usage.cpu),
    };
    let (before, began) = (usage()?, Instant::now());
    let limit = Duration::from_secs(u64::from(seconds) + 30);
    let command = format!("iperf3 -J -c 10.0.0.{} -t {seconds} {}", to + 1, flow.arguments);
    let text = lab.guests[from].run_for(&command, limit)?;
    let share = (usage()? - before).as_secs_f64() / began.elapsed().as_secs_f64();
    Ok([received(&text)?, share * 100.0])
}

/// The Mbit/s that arrived, by what `iperf3 -J` says of TCP or UDP.
fn received(text: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(text).with_context(|| format!("iperf3 printed no JSON: {text}"))?;
    let end = &report["end"];
    let (tcp, udp) = (&end["sum_received"]["bits_per_second"], &end["sum"]);
    let lost = udp["lost_percent"].as_f64().unwrap_or(0.0);
    let rate = tcp.as_f64().or_else(|| Some(udp["bits_per_second"].as_f64()? * (1.0 - lost / 100.0)));
    Ok(rate.with_context(|| format!("iperf3 gave no rate: {text}"))? / 1e6)
}

#[cfg(test)]
mod tests {
    use super::received;

    #[test]
    fn rates_of_both_protocols_are_read() {
        let tcp = r#"{"end": {"sum_received": {"bits_per_second": 5e6}}}"#;
        assert_eq!(received(tcp).unwrap(), 5.0);
        let udp = r#"{"end": {"sum": {"bits_per_second": 8e6, "lost_percent": 25}}}"#;
        assert_eq!(received(udp).unwrap(), 6.0);
        assert!(received("{}").is_err());
        assert!(received("iperf3: error").is_err());
    }
}
