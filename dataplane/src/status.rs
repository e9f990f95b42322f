//! What the switch tells about itself: plain snapshots for the control service, metrics and `--json`.
//! `rx` is what the switch receives from a port, `tx` what it sends to it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::RateLimit;

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
    /// `vhost-user`, `tap` or `afxdp`.
    pub kind: &'static str,
    /// Socket path or interface.
    pub target: String,
    /// Bridge domain.
    pub network: String,
    /// Access or native VLAN.
    pub vlan: Option<u16>,
    /// Tagged VLANs that pass; `None` for all.
    pub trunk: Option<Vec<u16>>,
    /// Configured MTU.
    pub mtu: Option<u16>,
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
}
