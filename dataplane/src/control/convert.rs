//! Between our types and those of the contract.

use sluice_proto::sluice::v1 as proto;

use super::ControlError;
use crate::capture::filter::InvalidFilter;
use crate::capture::{CaptureOptions, Captured, Direction};
use crate::config::{
    AfxdpMode, Carried, DEFAULT_NETWORK, InvalidPort, PortConfig, PortQueue, PortTarget, RateLimit, SocketMode,
    VlanMode, parse_mac,
};
use crate::status::{
    CyclesStatus, FdbEntryStatus, PortCycles, PortState, PortStatus, QueueLoadStatus, QueueStatus, TotalsStatus,
    WorkerCycles, WorkerStatus,
};
use crate::switch::PortError;

/// A configuration as it goes over the socket.
pub fn port_to_proto(port: &PortConfig) -> proto::PortConfig {
    let target = match &port.target {
        PortTarget::VhostUser { path, mode } => {
            let mode = match mode {
                SocketMode::Client => proto::SocketMode::Client,
                SocketMode::Server => proto::SocketMode::Server,
            };
            let path = path.to_string_lossy().into_owned();
            proto::port_config::Target::VhostUser(proto::VhostUserTarget { path, mode: mode.into() })
        }
        PortTarget::Tap { interface } => {
            proto::port_config::Target::Tap(proto::TapTarget { interface: interface.clone() })
        }
        PortTarget::Dpdk { device } => proto::port_config::Target::Dpdk(proto::DpdkTarget { device: device.clone() }),
        PortTarget::Afxdp { interface, mode, replace, busy_poll, tx_checksum } => {
            let mode = match mode {
                AfxdpMode::Auto => proto::AfxdpMode::Auto,
                AfxdpMode::ZeroCopy => proto::AfxdpMode::Zerocopy,
                AfxdpMode::Copy => proto::AfxdpMode::Copy,
                AfxdpMode::Skb => proto::AfxdpMode::Skb,
            };
            proto::port_config::Target::Afxdp(proto::AfxdpTarget {
                interface: interface.clone(),
                mode: mode.into(),
                replace: *replace,
                busy_poll: *busy_poll,
                tx_checksum: *tx_checksum,
            })
        }
    };
    let (vlan, trunk) = match &port.vlan {
        VlanMode::All => (None, None),
        VlanMode::Access(vlan) => (Some(*vlan), None),
        VlanMode::Trunk { native, allowed } => (*native, Some(allowed)),
        VlanMode::Networks(_) => (None, None),
    };
    proto::PortConfig {
        name: port.name.clone(),
        target: Some(target),
        network: port.network.clone(),
        vlan: vlan.map(u32::from),
        trunk: trunk.map(|vlans| vlan_set(vlans)),
        mtu: port.mtu.map(u32::from),
        queues: port.queues.map(u32::from),
        mac: port.mac.map(|mac| mac.to_string()),
        spoofcheck: port.spoofcheck,
        rate_rx: port.rate_rx.map(rate_limit),
        rate_tx: port.rate_tx.map(rate_limit),
        owner: port.owner.clone(),
        networks: carried_networks(port.carried()),
    }
}

fn carried_networks(networks: &[Carried]) -> Vec<proto::CarriedNetwork> {
    let convert = |one: &Carried| proto::CarriedNetwork { network: one.network.clone(), vlan: one.vlan.map(u32::from) };
    networks.iter().map(convert).collect()
}

fn vlans_from_proto(port: &proto::PortConfig) -> Result<VlanMode, InvalidPort> {
    let vlan = port.vlan.map(|vlan| small("vlan", vlan)).transpose()?;
    if !port.networks.is_empty() {
        if vlan.is_some() || port.trunk.is_some() {
            return Err(InvalidPort::new("networks", "networks takes the place of vlan and trunk; leave those out"));
        }
        let carried = |one: &proto::CarriedNetwork| {
            let vlan = one.vlan.map(|vlan| small("networks", vlan)).transpose()?;
            Ok(Carried { network: one.network.clone(), vlan })
        };
        return port.networks.iter().map(carried).collect::<Result<_, _>>().map(VlanMode::Networks);
    }
    Ok(match (vlan, &port.trunk) {
        (None, None) => VlanMode::All,
        (Some(vlan), None) => VlanMode::Access(vlan),
        (native, Some(set)) => {
            let mut allowed = set.vlans.iter().map(|vlan| small("trunk", *vlan)).collect::<Result<Vec<_>, _>>()?;
            allowed.sort_unstable();
            allowed.dedup();
            VlanMode::Trunk { native, allowed }
        }
    })
}

/// A configuration as it came over the socket. Its rules are still to be checked, except that numbers fit.
pub(super) fn port_from_proto(port: proto::PortConfig) -> Result<PortConfig, InvalidPort> {
    let vlan = vlans_from_proto(&port)?;
    let target = match port.target {
        Some(proto::port_config::Target::VhostUser(target)) => PortTarget::VhostUser {
            mode: match target.mode() {
                proto::SocketMode::Server => SocketMode::Server,
                proto::SocketMode::Client | proto::SocketMode::Unspecified => SocketMode::Client,
            },
            path: target.path.into(),
        },
        Some(proto::port_config::Target::Tap(target)) => PortTarget::Tap { interface: target.interface },
        Some(proto::port_config::Target::Dpdk(target)) => PortTarget::Dpdk { device: target.device },
        Some(proto::port_config::Target::Afxdp(target)) => PortTarget::Afxdp {
            mode: match target.mode() {
                proto::AfxdpMode::Zerocopy => AfxdpMode::ZeroCopy,
                proto::AfxdpMode::Copy => AfxdpMode::Copy,
                proto::AfxdpMode::Skb => AfxdpMode::Skb,
                proto::AfxdpMode::Auto | proto::AfxdpMode::Unspecified => AfxdpMode::Auto,
            },
            interface: target.interface,
            replace: target.replace,
            busy_poll: target.busy_poll,
            tx_checksum: target.tx_checksum,
        },
        None => return Err(InvalidPort::new("target", "the target is missing, or of a kind that this switch lacks")),
    };
    Ok(PortConfig {
        name: port.name,
        target,
        network: if port.network.is_empty() && port.networks.is_empty() {
            DEFAULT_NETWORK.into()
        } else {
            port.network
        },
        vlan,
        mtu: port.mtu.map(|mtu| small("mtu", mtu)).transpose()?,
        queues: port.queues.map(|queues| small("queues", queues)).transpose()?,
        mac: port.mac.as_deref().map(parse_mac).transpose()?,
        spoofcheck: port.spoofcheck,
        rate_rx: port.rate_rx.map(rate_from_proto),
        rate_tx: port.rate_tx.map(rate_from_proto),
        owner: port.owner,
    })
}

/// Counts over all ports, as they go over the socket.
pub(super) fn totals(totals: TotalsStatus) -> proto::Totals {
    proto::Totals {
        rx_frames: totals.rx_frames,
        tx_frames: totals.tx_frames,
        made_frames: totals.made_frames,
        merged_frames: totals.merged_frames,
        held_frames: totals.held_frames,
        drops: totals.drops.into_iter().collect(),
    }
}

fn rate_limit(limit: RateLimit) -> proto::RateLimit {
    proto::RateLimit { bits_per_second: limit.bits_per_second, burst_bits: limit.burst_bits }
}

fn rate_from_proto(limit: proto::RateLimit) -> RateLimit {
    RateLimit { bits_per_second: limit.bits_per_second, burst_bits: limit.burst_bits }
}

fn small(key: &'static str, value: u32) -> Result<u16, InvalidPort> {
    value.try_into().map_err(|_| InvalidPort::new(key, format!("{key} {value} is out of range")))
}

fn vlan_set(vlans: &[u16]) -> proto::VlanSet {
    proto::VlanSet { vlans: vlans.iter().map(|vlan| u32::from(*vlan)).collect() }
}

impl From<ControlError> for tonic::Status {
    fn from(error: ControlError) -> Self {
        let code = match &error {
            ControlError::Invalid { .. } => tonic::Code::InvalidArgument,
            ControlError::Port { source: PortError::Exists(_) | PortError::TargetInUse { .. } } => {
                tonic::Code::AlreadyExists
            }
            ControlError::Port { source: PortError::NotFound(_) | PortError::NotPinned(_) } => tonic::Code::NotFound,
            ControlError::Port { source: PortError::NoWorker { .. } } => tonic::Code::InvalidArgument,
            ControlError::Port { source: PortError::Limit { .. } } => tonic::Code::ResourceExhausted,
            ControlError::GivenUp => tonic::Code::Cancelled,
            ControlError::Folder(_)
            | ControlError::OtherOwner { .. }
            | ControlError::Port {
                source: PortError::Setup(_) | PortError::Withdrawn(_) | PortError::Captured(_) | PortError::Networks(_),
            } => tonic::Code::FailedPrecondition,
            ControlError::State(_) => tonic::Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<PortState> for proto::PortState {
    fn from(state: PortState) -> Self {
        match state {
            PortState::Connecting => Self::Connecting,
            PortState::Down => Self::Down,
            PortState::Up => Self::Up,
            PortState::Failed => Self::Failed,
        }
    }
}

fn drops(port: &PortStatus) -> std::collections::BTreeMap<String, u64> {
    port.drops.iter().map(|(reason, count)| ((*reason).into(), *count)).collect()
}

pub(super) fn port_status(port: PortStatus) -> proto::PortStatus {
    proto::PortStatus {
        drops: drops(&port),
        name: port.name,
        kind: port.kind.into(),
        target: port.target,
        network: port.network,
        vlan: port.vlan.map(u32::from),
        trunk: port.trunk.as_deref().map(vlan_set),
        networks: carried_networks(&port.networks),
        mtu: port.mtu.map(u32::from),
        max_queues: Some(port.max_queues.into()),
        mac: port.mac,
        spoofcheck: port.spoofcheck,
        rate_rx: port.rate_rx.map(rate_limit),
        rate_tx: port.rate_tx.map(rate_limit),
        owner: port.owner,
        state: proto::PortState::from(port.state).into(),
        reason: port.reason,
        features: port.features.into_iter().map(String::from).collect(),
        memory_bytes: port.memory_bytes,
        connects: port.connects,
        faults: port.faults,
        rx_frames: port.rx_frames,
        rx_bytes: port.rx_bytes,
        tx_frames: port.tx_frames,
        tx_bytes: port.tx_bytes,
        queues: port.queues.into_iter().map(queue_status).collect(),
    }
}

fn queue_status(queue: QueueStatus) -> proto::QueueStatus {
    proto::QueueStatus {
        index: queue.index as u32,
        worker: queue.worker.map(|worker| worker as u32),
        rx_frames: queue.rx_frames,
        rx_bytes: queue.rx_bytes,
        tx_frames: queue.tx_frames,
        tx_bytes: queue.tx_bytes,
        notifications: queue.notifications,
        rx_cycles: queue.rx_cycles,
    }
}

pub(super) fn port_stats(port: PortStatus) -> proto::PortStats {
    proto::PortStats {
        drops: drops(&port),
        name: port.name,
        state: proto::PortState::from(port.state).into(),
        rx_frames: port.rx_frames,
        rx_bytes: port.rx_bytes,
        tx_frames: port.tx_frames,
        tx_bytes: port.tx_bytes,
    }
}

pub(super) fn captured(frame: Captured) -> proto::CapturedFrame {
    proto::CapturedFrame {
        time_ns: frame.time_ns,
        direction: match frame.direction {
            Direction::Rx => proto::Direction::Rx,
            Direction::Tx => proto::Direction::Tx,
        }
        .into(),
        drop_reason: frame.drop_reason.map(|reason| reason.name().into()),
        length: frame.length as u32,
        data: frame.bytes,
    }
}

pub(super) fn capture_options(request: &proto::CaptureRequest) -> Result<CaptureOptions, InvalidFilter> {
    let default = CaptureOptions::default();
    let filter = (!request.filter.is_empty()).then(|| request.filter.parse()).transpose()?;
    Ok(CaptureOptions {
        snap_length: if request.snap_length == 0 { default.snap_length } else { request.snap_length as usize },
        direction: match request.direction() {
            proto::Direction::Unspecified => None,
            proto::Direction::Rx => Some(Direction::Rx),
            proto::Direction::Tx => Some(Direction::Tx),
        },
        filter,
    })
}

pub(super) fn fdb_entry(entry: FdbEntryStatus) -> proto::FdbEntry {
    proto::FdbEntry {
        mac: entry.mac,
        network: entry.network,
        vlan: entry.vlan.into(),
        port: entry.port,
        age_seconds: entry.age_seconds,
        r#static: entry.is_static,
    }
}

pub(super) fn worker_status(worker: WorkerStatus) -> proto::WorkerStatus {
    proto::WorkerStatus {
        id: worker.id as u32,
        cpu: worker.cpu.map(|cpu| cpu as u32),
        busy_percent: worker.busy_percent,
        busy_ns: worker.busy_ns,
        up_ns: worker.up_ns,
        rx_frames: worker.rx_frames,
        bursts: worker.bursts,
        sleeps: worker.sleeps,
        queues: worker.queues as u32,
        frames_per_second: worker.frames_per_second,
        sleeps_per_second: worker.sleeps_per_second,
        asleep_ns: worker.asleep_ns,
        delivered: worker.delivered,
        copies: worker.copies,
    }
}

pub(super) fn queue_load(queue: QueueLoadStatus) -> proto::QueueLoad {
    proto::QueueLoad {
        port: queue.port,
        queue: queue.queue as u32,
        worker: queue.worker as u32,
        pinned: queue.pinned,
        load_percent: queue.load_percent,
        frames_per_second: queue.frames_per_second,
    }
}

pub(super) fn cycles(cycles: CyclesStatus) -> proto::Cycles {
    let worker = |worker: WorkerCycles| proto::WorkerCycles {
        id: worker.id as u32,
        up: worker.up,
        busy: worker.busy,
        asleep: worker.asleep,
        frames: worker.frames,
        delivered: worker.delivered,
        copies: worker.copies,
        sampled_frames: worker.sampled_frames,
        stages: worker.stages.into_iter().map(|(stage, cycles)| (stage.into(), cycles)).collect(),
        bursts: worker.bursts,
    };
    let port = |port: PortCycles| proto::PortCycles { name: port.name, frames: port.frames, cycles: port.cycles };
    proto::Cycles {
        frequency: cycles.frequency,
        workers: cycles.workers.into_iter().map(worker).collect(),
        ports: cycles.ports.into_iter().map(port).collect(),
    }
}

/// A queue, or all of a port, as it came over the socket.
pub(super) fn port_queue(port: String, queue: Option<u32>) -> Result<PortQueue, tonic::Status> {
    let queue = PortQueue { port, queue: queue.map(|queue| queue as usize) };
    // The rules are those of what can be typed.
    match queue.to_string().parse() {
        Ok(parsed) if parsed == queue => Ok(parsed),
        Ok(_) => Err(tonic::Status::invalid_argument(format!("no port can be named '{}'", queue.port))),
        Err(problem) => Err(tonic::Status::invalid_argument(problem)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status;

    fn full_port() -> PortStatus {
        PortStatus {
            name: "vm1".into(),
            kind: "vhost-user",
            target: "/run/vm1.sock".into(),
            network: "blue".into(),
            vlan: Some(1),
            trunk: Some(vec![2, 3]),
            networks: vec![Carried { network: "blue".into(), vlan: Some(7) }],
            mtu: Some(9000),
            max_queues: 23,
            mac: Some("52:54:00:00:00:01".into()),
            spoofcheck: true,
            rate_rx: Some(RateLimit { bits_per_second: 19, burst_bits: Some(20) }),
            rate_tx: Some(RateLimit { bits_per_second: 21, burst_bits: None }),
            owner: Some("me".into()),
            state: PortState::Failed,
            reason: Some("why".into()),
            features: vec!["VIRTIO_F_VERSION_1"],
            memory_bytes: 4,
            connects: 5,
            faults: 6,
            rx_frames: 7,
            rx_bytes: 8,
            tx_frames: 9,
            tx_bytes: 10,
            drops: [("full", 11)].into(),
            queues: vec![QueueStatus {
                index: 12,
                worker: Some(13),
                rx_frames: 14,
                rx_bytes: 15,
                tx_frames: 16,
                tx_bytes: 17,
                notifications: 18,
                rx_cycles: 22,
            }],
        }
    }

    /// What `--json` prints is what the types of `status` say.
    #[test]
    fn json_is_the_same_on_both_sides_of_the_socket() {
        let json = |value: &dyn erased::Json| value.json();
        let mut bare = full_port();
        (bare.vlan, bare.trunk, bare.mtu, bare.mac, bare.reason) = (None, None, None, None, None);
        bare.queues[0].worker = None;
        for port in [full_port(), bare] {
            assert_eq!(json(&port), json(&port_status(port.clone())));
        }
        let entry = FdbEntryStatus {
            mac: "52:54:00:00:00:01".into(),
            network: "blue".into(),
            vlan: 1,
            port: "vm1".into(),
            age_seconds: 2,
            is_static: true,
        };
        assert_eq!(json(&entry), json(&fdb_entry(entry.clone())));
        let worker = status::WorkerStatus {
            id: 1,
            cpu: Some(2),
            busy_percent: 3.5,
            busy_ns: 4,
            up_ns: 5,
            rx_frames: 6,
            bursts: 7,
            sleeps: 8,
            queues: 9,
            frames_per_second: 10.5,
            sleeps_per_second: 11.5,
            asleep_ns: 12,
            delivered: 13,
            copies: 14,
        };
        assert_eq!(json(&worker), json(&worker_status(worker.clone())));
    }

    #[test]
    fn json_of_loads_and_cycles_is_the_same_too() {
        let queue = QueueLoadStatus {
            port: "vm1".into(),
            queue: 1,
            worker: 2,
            pinned: true,
            load_percent: 3.5,
            frames_per_second: 4.5,
        };
        let json = |value: &dyn erased::Json| value.json();
        assert_eq!(json(&queue), json(&queue_load(queue.clone())));
        let worker = WorkerCycles {
            id: 1,
            up: 2,
            busy: 3,
            asleep: 4,
            frames: 5,
            delivered: 6,
            copies: 7,
            sampled_frames: 8,
            stages: [("load", 9), ("classify", 10)].into(),
            bursts: vec![11, 12],
        };
        let port = PortCycles { name: "vm1".into(), frames: 13, cycles: 14 };
        let all = CyclesStatus { frequency: 15.5, workers: vec![worker], ports: vec![port] };
        assert_eq!(json(&all), json(&cycles(all.clone())));
    }

    #[test]
    fn queues_are_checked() {
        assert_eq!(port_queue("vm1".into(), Some(3)).unwrap().to_string(), "vm1:3");
        assert!(port_queue("vm1".into(), Some(256)).is_err());
        assert!(port_queue("a b".into(), None).is_err());
        assert!(port_queue("vm1:1".into(), None).is_err());
    }

    #[test]
    fn worker_errors_have_codes() {
        let code = |source| tonic::Status::from(ControlError::Port { source }).code();
        assert_eq!(code(PortError::NoWorker { worker: 2, workers: 1 }), tonic::Code::InvalidArgument);
        assert_eq!(code(PortError::NotPinned("vm1".into())), tonic::Code::NotFound);
    }

    mod erased {
        pub(super) trait Json {
            fn json(&self) -> serde_json::Value;
        }
        impl<T: serde::Serialize> Json for T {
            fn json(&self) -> serde_json::Value {
                serde_json::to_value(self).unwrap()
            }
        }
    }

    #[test]
    fn configurations_survive_the_socket() {
        for spec in [
            "vm1=vhost-user:/run/a.sock",
            "vm1=vhost-user:/run/a.sock,mode=server,network=blue,vlan=7,trunk=10,20-22,mtu=9000,queues=4,\
             mac=52:54:00:12:34:56,spoofcheck=on,rate-rx=1G,rate-tx=2G,burst-tx=3M,owner=me",
            "host=tap:sluice0,trunk=5",
            "host=tap:sluice0,vlan=5",
            "up=afxdp:eth1",
            "up=afxdp:eth1,mode=zerocopy,replace=on,trunk=5",
            "up=afxdp:eth1,networks=blue:100,red",
            "up=afxdp:eth1,mode=copy,busy-poll=on",
            "up=afxdp:eth1,tx-checksum=on",
            "up=afxdp:eth1,tx-checksum=off",
            "up=afxdp:eth1,mode=skb",
        ] {
            let port: PortConfig = spec.parse().unwrap();
            assert_eq!(port_from_proto(port_to_proto(&port)), Ok(port));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let tap = port_to_proto(&"host=tap:t0".parse().unwrap());
        let wrong = |change: fn(&mut proto::PortConfig)| {
            let mut port = tap.clone();
            change(&mut port);
            port_from_proto(port).unwrap_err().key
        };
        assert_eq!(wrong(|port| port.target = None), "target");
        assert_eq!(wrong(|port| port.vlan = Some(65_537)), "vlan");
        assert_eq!(wrong(|port| port.trunk = Some(proto::VlanSet { vlans: vec![65_537] })), "trunk");
        assert_eq!(wrong(|port| port.mtu = Some(70_000)), "mtu");
        assert_eq!(wrong(|port| port.queues = Some(70_000)), "queues");
        assert_eq!(wrong(|port| port.mac = Some("x".into())), "mac");
    }
}
