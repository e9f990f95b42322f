//! What the switch tells about itself: plain snapshots for the control service and metrics.
//! `rx` is what the switch receives from a port, `tx` what it sends to it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::{Carried, RateLimit};

/// State of a port's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PortState {
    /// Waiting for the other side's socket.
    Connecting,
    /// Connected; the guest's driver is not running.
    Down,
    /// Frames can flow.
    Up,
    /// Stopped after a fault of the other side; see `reason`.
    Failed,
}

/// One port.
#[derive(Debug, Clone, Serialize)]
pub struct PortStatus {
    /// Name as configured.
    pub name: String,
    /// `vhost-user`, `tap`, `afxdp` or `dpdk`.
    pub kind: &'static str,
    /// Socket path or interface.
    pub target: String,
    /// Bridge domain; empty for one that carries several.
    pub network: String,
    /// Access or native VLAN.
    pub vlan: Option<u16>,
    /// Tagged VLANs that pass; `None` for all.
    pub trunk: Option<Vec<u16>>,
    /// Networks that it carries.
    pub networks: Vec<Carried>,
    /// Configured MTU.
    pub mtu: Option<u16>,
    /// Queue pairs to use at most: as configured, or the switch's bound.
    pub max_queues: u16,
    /// Configured station address.
    pub mac: Option<String>,
    /// Whether other source addresses are dropped.
    pub spoofcheck: bool,
    /// Limit of what is received from the port.
    pub rate_rx: Option<RateLimit>,
    /// Limit of what is sent to the port.
    pub rate_tx: Option<RateLimit>,
    /// Whose port it is.
    pub owner: Option<String>,
    /// Link state.
    pub state: PortState,
    /// Why it is not up, or the last fault.
    pub reason: Option<String>,
    /// Names of the virtio features the guest's driver accepted.
    pub features: Vec<&'static str>,
    /// Guest memory mapped, in bytes.
    pub memory_bytes: u64,
    /// Times the other side connected.
    pub connects: u64,
    /// Faults since the port was added.
    pub faults: u64,
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received, Ethernet header included.
    pub rx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames dropped, by reason; the names are those of `DropReason`.
    pub drops: BTreeMap<&'static str, u64>,
    /// Queue pairs in use.
    pub queues: Vec<QueueStatus>,
}

/// One queue pair.
#[derive(Debug, Clone, Serialize)]
pub struct QueueStatus {
    /// Index of the pair.
    pub index: usize,
    /// Worker that serves its receive side.
    pub worker: Option<usize>,
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Notifications sent to the guest.
    pub notifications: u64,
    /// Cycles of the time stamp counter that its worker spent on frames received from it.
    pub rx_cycles: u64,
}

/// Frames of all ports that there are or were. Once nothing moves,
/// `rx + made = tx + merged + held + drops`, but for drops of what is not counted as received (`missed`, `runt`,
/// `oversize`, `bad_offload`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TotalsStatus {
    /// Received from ports.
    pub rx_frames: u64,
    /// Sent to ports.
    pub tx_frames: u64,
    /// Came into being in the switch: further copies for further receivers, further segments of a super-packet,
    /// announcements.
    pub made_frames: u64,
    /// Were put into others.
    pub merged_frames: u64,
    /// Are kept for guests that migrate.
    pub held_frames: u64,
    /// Dropped, by reason; the names are those of `DropReason`.
    pub drops: BTreeMap<String, u64>,
}

/// One entry of the forwarding table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FdbEntryStatus {
    /// Station address.
    pub mac: String,
    /// Bridge domain.
    pub network: String,
    /// VLAN, 0 for untagged.
    pub vlan: u16,
    /// Port behind which the station is.
    pub port: String,
    /// Seconds since it was last heard.
    pub age_seconds: u64,
    /// Configured rather than learned.
    #[serde(rename = "static")]
    pub is_static: bool,
}

/// One worker.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerStatus {
    /// Index.
    pub id: usize,
    /// CPU it is pinned to.
    pub cpu: Option<usize>,
    /// Share of the last second spent on frames, in percent.
    pub busy_percent: f64,
    /// Nanoseconds spent on frames since start.
    pub busy_ns: u64,
    /// Nanoseconds since start.
    pub up_ns: u64,
    /// Frames received by this worker.
    pub rx_frames: u64,
    /// Non-empty bursts.
    pub bursts: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Queues it serves.
    pub queues: usize,
    /// Frames received in the last second.
    pub frames_per_second: f64,
    /// Times it slept in the last second.
    pub sleeps_per_second: f64,
    /// Nanoseconds asleep since start.
    pub asleep_ns: u64,
    /// Frames written to receivers.
    pub delivered: u64,
    /// Times that the payload of one of those was copied.
    pub copies: u64,
}

/// A receive queue and its worker.
#[derive(Debug, Clone, Serialize)]
pub struct QueueLoadStatus {
    /// Name of the port.
    pub port: String,
    /// Index of the pair.
    pub queue: usize,
    /// Worker that serves it.
    pub worker: usize,
    /// It is pinned to that worker by hand.
    pub pinned: bool,
    /// Share of its worker's time in the last second, in percent.
    pub load_percent: f64,
    /// Frames received in the last second.
    pub frames_per_second: f64,
}

/// Where the workers' time has gone, in cycles of the time stamp counter since the start.
#[derive(Debug, Clone, Serialize)]
pub struct CyclesStatus {
    /// Cycles per second.
    pub frequency: f64,
    /// By worker.
    pub workers: Vec<WorkerCycles>,
    /// By port that the frames came from, sorted by name.
    pub ports: Vec<PortCycles>,
}

/// Where a worker's time has gone.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerCycles {
    /// Index.
    pub id: usize,
    /// Cycles since start.
    pub up: u64,
    /// Cycles of passes over its queues that found frames.
    pub busy: u64,
    /// Cycles asleep.
    pub asleep: u64,
    /// Frames received.
    pub frames: u64,
    /// Frames written to receivers.
    pub delivered: u64,
    /// Times that the payload of one of those was copied.
    pub copies: u64,
    /// Frames of the passes that were timed by stage.
    pub sampled_frames: u64,
    /// Cycles of those passes, by stage.
    pub stages: BTreeMap<&'static str, u64>,
    /// Bursts by size: place `n` counts those of at most 2^n frames that are not counted before it.
    pub bursts: Vec<u64>,
}

/// What a port's frames cost.
#[derive(Debug, Clone, Serialize)]
pub struct PortCycles {
    /// Name of the port.
    pub name: String,
    /// Frames received from it.
    pub frames: u64,
    /// Cycles spent on them, from taking to delivering.
    pub cycles: u64,
}
