//! What is handed over, as it is written down. Descriptors are places in the list that goes along.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::status::TotalsStatus;

/// What the new process says first, after the greeting.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// [`VERSION`](super::VERSION). Comes first in every version of the format, and the rest may change.
    pub(super) version: u32,
}

/// The old process's answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Why it goes on.
    Refused(String),
    /// All that it has.
    Offer(Offer),
}

/// All that a switch has but where its rings stand, and its frames.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Offer {
    pub(super) pid: u32,
    /// The state directory, and its lock's descriptor.
    pub(super) state_dir: String,
    pub(super) state_lock: u32,
    /// Listening sockets.
    pub(super) control: u32,
    pub(super) metrics: Option<u32>,
    /// Descriptors of all of these; those of the ports follow, port by port.
    pub(super) fds: u32,
    pub(super) ports: Vec<PortRecord>,
    pub(super) networks: Vec<String>,
    pub(super) fdb: Vec<FdbRecord>,
}

/// One port.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PortRecord {
    /// Its configuration, as a SPEC.
    pub(super) spec: String,
    /// Descriptors of it.
    pub(super) fds: u32,
    pub(super) kind: KindRecord,
}

/// What there is of a port beside its configuration.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum KindRecord {
    Vhost(VhostRecord),
    /// The descriptor of the tap.
    Tap(u32),
    /// It is made anew from its configuration.
    Anew,
}

/// A vhost-user port.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostRecord {
    /// The connection, if there is one.
    pub device: Option<DeviceRecord>,
    /// The listening socket in server mode, with device and inode of its file.
    pub listener: Option<(u32, u64, u64)>,
}

/// A connection and what its frontend has said.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// The connected socket.
    pub stream: u32,
    /// virtio features that were accepted.
    pub features: u64,
    /// vhost-user protocol features that were accepted.
    pub protocol: u64,
    /// Device status.
    pub status: u8,
    /// The memory table.
    pub memory: Vec<RegionRecord>,
    /// The dirty log.
    pub(crate) log: Option<LogRecord>,
    /// Every ring that was named.
    pub rings: Vec<RingRecord>,
    /// The ring that was named last.
    pub focus: usize,
    /// What says whether the keeper is up to date ([`Stamp`](crate::keeper::Stamp)).
    #[serde(default)]
    pub(crate) stamp: Option<u32>,
}

/// A region of guest memory.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRecord {
    /// Its file.
    pub file: u32,
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Address in the frontend's space.
    pub uva: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// The dirty log.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogRecord {
    pub(crate) file: u32,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

/// One vring.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingRecord {
    /// Descriptors.
    pub size: u32,
    pub(crate) place: Option<PlaceRecord>,
    /// Event descriptors.
    pub kick: Option<u32>,
    pub(crate) call: Option<u32>,
    pub(crate) err: Option<u32>,
    /// Where it began, or stood when it was last stopped; of one that runs, a better account is given later.
    #[serde(default)]
    pub(crate) base: u32,
    /// By `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// By `SET_VRING_KICK`.
    pub started: bool,
    /// Whether it passes frames: then it has to in the new process, too.
    pub runs: bool,
}

/// Addresses of a ring's parts.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlaceRecord {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) log: Option<u64>,
}

/// A station: address, VLAN, network and port by their places, seconds since it was heard, whether it is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct FdbRecord(
    pub(crate) u64,
    pub(crate) u16,
    pub(crate) u16,
    pub(crate) u16,
    pub(crate) u64,
    pub(crate) bool,
);

/// Where things stand once nothing moves any more.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Standing {
    /// Nanoseconds since 1970 at which the last frame was forwarded.
    pub(super) since_ns: u64,
    /// In the order of the offer.
    pub(super) ports: Vec<PortStanding>,
    /// Stations that are elsewhere than in the offer.
    pub(super) fdb: Vec<FdbRecord>,
    /// What was counted at ports that are no more.
    #[serde(default)]
    pub(super) removed: TotalsStatus,
}

/// Where a port stands.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PortStanding {
    /// The next index of each ring, as `GET_VRING_BASE` gives it.
    pub(super) bases: Vec<u32>,
    pub(super) stats: StatsRecord,
}

/// A port's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatsRecord {
    /// Queue pair, frames, bytes, notifications; pairs that counted nothing are left out.
    pub rx: Vec<(usize, u64, u64, u64)>,
    /// As `rx`.
    pub tx: Vec<(usize, u64, u64, u64)>,
    /// By reason.
    pub drops: BTreeMap<String, u64>,
    /// Frames that came into being in the switch.
    #[serde(default)]
    pub made: u64,
    /// Frames that were put into others.
    #[serde(default)]
    pub merged: u64,
    /// Times the other side connected.
    pub connects: u64,
    /// Faults of the other side.
    pub faults: u64,
    /// The fault that stops the port, by its number.
    pub fault: Option<u8>,
}
