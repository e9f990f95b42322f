//! `sluice port`.

use std::path::Path;

use sluice::config::{Carried, bits, network_list, vlan_list};
use sluice::control::port_to_proto;
use sluice::switch::DropReason;
use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::args::PortCommand;
use super::client::ask;
use super::output::{done, emit, emit_json, fields, or_dash, size, table};

pub(crate) fn run(command: PortCommand, socket: &Path, json: bool) -> Result<(), Failure> {
    match command {
        PortCommand::Add { spec } => {
            let request = proto::AddPortRequest { config: Some(port_to_proto(&spec)), replace_owner: false };
            done(json, &ask(socket, async |client| client.add_port(request).await)?.port)
        }
        PortCommand::Del { name, owner } => {
            let request = proto::RemovePortRequest { name: name.clone(), owner };
            ask(socket, async |client| client.remove_port(request).await)?;
            done(json, &serde_json::json!({ "removed": name }))
        }
        PortCommand::List => list(socket, json),
        PortCommand::Show { name } => show(name, socket, json),
    }
}

fn list(socket: &Path, json: bool) -> Result<(), Failure> {
    let ports = ask(socket, async |client| client.list_ports(proto::ListPortsRequest::default()).await)?.ports;
    if json {
        return emit_json(&ports);
    }
    let rows: Vec<_> = ports.iter().map(row).collect();
    let titles = ["NAME", "KIND", "STATE", "NETWORK", "VLAN", ">QUEUES", ">RX", ">TX", ">DROPS", "TARGET"];
    emit(&table(&titles, &rows))
}

fn row(port: &proto::PortStatus) -> Vec<String> {
    vec![
        port.name.clone(),
        port.kind.clone(),
        port.state().word().into(),
        network(port),
        vlans(port),
        port.queues.len().to_string(),
        port.rx_frames.to_string(),
        port.tx_frames.to_string(),
        port.drops.values().sum::<u64>().to_string(),
        port.target.clone(),
    ]
}

/// The network, or those that the port carries, as SPEC has them.
fn network(port: &proto::PortStatus) -> String {
    let carried = |one: &proto::CarriedNetwork| {
        let vlan = one.vlan.and_then(|vlan| u16::try_from(vlan).ok());
        Carried { network: one.network.clone(), vlan }
    };
    let carried: Vec<_> = port.networks.iter().map(carried).collect();
    if carried.is_empty() { port.network.clone() } else { network_list(&carried) }
}

/// VLAN membership as SPEC has it.
fn vlans(port: &proto::PortStatus) -> String {
    let vlan = or_dash(port.vlan);
    let Some(set) = &port.trunk else { return vlan };
    let allowed: Vec<u16> = set.vlans.iter().filter_map(|vlan| u16::try_from(*vlan).ok()).collect();
    match port.vlan {
        Some(native) => format!("{native},trunk={}", vlan_list(&allowed)),
        None => format!("trunk={}", vlan_list(&allowed)),
    }
}

fn show(name: String, socket: &Path, json: bool) -> Result<(), Failure> {
    let answer = ask(socket, async |client| client.get_port(proto::GetPortRequest { name }).await)?;
    let port = answer.port.unwrap_or_default();
    if json { emit_json(&port) } else { emit(&describe(&port)) }
}

fn describe(port: &proto::PortStatus) -> String {
    let state = match &port.reason {
        Some(reason) => format!("{} ({reason})", port.state().word()),
        None => port.state().word().into(),
    };
    let features = if port.features.is_empty() { "-".into() } else { port.features.join(" ") };
    let mut text = fields(&[
        ("name", port.name.clone()),
        ("kind", port.kind.clone()),
        ("target", port.target.clone()),
        ("state", state),
        ("network", network(port)),
        ("vlan", vlans(port)),
        ("mtu", or_dash(port.mtu)),
        ("max-queues", or_dash(port.max_queues)),
        ("mac", or_dash(port.mac.as_ref())),
        ("spoofcheck", if port.spoofcheck { "on" } else { "off" }.into()),
        ("rate-rx", rate(port.rate_rx)),
        ("rate-tx", rate(port.rate_tx)),
        ("owner", or_dash(port.owner.as_ref())),
        ("features", features),
        ("memory", size(port.memory_bytes)),
        ("connects", port.connects.to_string()),
        ("faults", port.faults.to_string()),
        ("received", format!("{} frames, {} bytes", port.rx_frames, port.rx_bytes)),
        ("sent", format!("{} frames, {} bytes", port.tx_frames, port.tx_bytes)),
        ("dropped", format!("{} frames", port.drops.values().sum::<u64>())),
    ]);
    if port.drops.values().any(|count| *count > 0) {
        text.push('\n');
        text.push_str(&drops(port));
    }
    if !port.queues.is_empty() {
        text.push('\n');
        text.push_str(&queues(port));
    }
    text
}

/// A rate limit in the units of SPEC.
fn rate(limit: Option<proto::RateLimit>) -> String {
    or_dash(limit.map(|limit| match limit.burst_bits {
        Some(burst) => format!("{}bit/s, burst {}bit", bits(limit.bits_per_second), bits(burst)),
        None => format!("{}bit/s", bits(limit.bits_per_second)),
    }))
}

fn drops(port: &proto::PortStatus) -> String {
    let meaning = |name: &str| {
        let reason = DropReason::ALL.iter().find(|reason| reason.name() == name);
        reason.map_or("", |reason| reason.describe())
    };
    let counted = port.drops.iter().filter(|(_, count)| **count > 0);
    let rows: Vec<_> =
        counted.map(|(name, count)| vec![name.clone(), count.to_string(), meaning(name).into()]).collect();
    table(&["DROPS", ">FRAMES", "MEANING"], &rows)
}

fn queues(port: &proto::PortStatus) -> String {
    let row = |queue: &proto::QueueStatus| {
        vec![
            queue.index.to_string(),
            or_dash(queue.worker),
            queue.rx_frames.to_string(),
            queue.rx_bytes.to_string(),
            queue.tx_frames.to_string(),
            queue.tx_bytes.to_string(),
            queue.notifications.to_string(),
        ]
    };
    let titles = [">QUEUE", ">WORKER", ">RX FRAMES", ">RX BYTES", ">TX FRAMES", ">TX BYTES", ">NOTIFICATIONS"];
    table(&titles, &port.queues.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_port_is_shown() {
        let port = proto::PortStatus {
            name: "vm1".into(),
            state: proto::PortState::Failed.into(),
            reason: Some("bad descriptor".into()),
            vlan: Some(5),
            max_queues: Some(4),
            trunk: Some(proto::VlanSet { vlans: vec![10, 20, 21] }),
            rate_tx: Some(proto::RateLimit { bits_per_second: 500_000_000, burst_bits: Some(1_000_000) }),
            owner: Some("me".into()),
            drops: [("full".to_owned(), 3), ("runt".into(), 0)].into(),
            queues: vec![proto::QueueStatus { index: 7, worker: Some(1), ..Default::default() }],
            ..Default::default()
        };
        let text = describe(&port);
        for expected in [
            "state       failed (bad descriptor)",
            "vlan        5,trunk=10,20-21",
            "max-queues  4",
            "rate-rx     -",
            "rate-tx     500Mbit/s, burst 1Mbit",
            "owner       me",
            "dropped     3 frames",
            "full        3  To the port: the receiver has no buffers left.",
            "    7       1",
        ] {
            assert!(text.contains(expected), "{text}");
        }
        assert!(!text.contains("runt"), "{text}");
    }
}
