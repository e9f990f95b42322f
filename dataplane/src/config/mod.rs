//! What an operator asks for, as validated types.
//!
//! The command line's `SPEC`, the TOML file and the control service all end here, so that every rule is checked once.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use crate::limits::{MAX_CPUS, MAX_WORKERS};
use crate::wire::MacAddr;

mod file;
mod pin;
mod rules;
mod spec;

pub use file::{FileConfig, FileError};
pub use pin::{Pin, PortQueue, parse_worker};
pub use rules::MissingFolder;
pub(crate) use spec::parse_mac;
pub use spec::{PortText, bits, network_list, vlan_list};

/// The network of ports that name none.
pub const DEFAULT_NETWORK: &str = "default";

/// A rule of a port's configuration that is broken, in one line for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct InvalidPort {
    /// The key whose value is wrong, as SPEC and the file call it.
    pub key: &'static str,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl InvalidPort {
    pub(crate) fn new(key: &'static str, problem: impl Into<String>) -> Self {
        Self { key, problem: problem.into() }
    }
}

/// A port as configured: everything that is needed to bring it up again after a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Unique name; 1 to 64 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// What the port connects to.
    pub target: PortTarget,
    /// Bridge domain; ports of different networks never exchange a frame. Empty if the port carries several.
    pub network: String,
    /// VLAN membership, or the networks it carries.
    pub vlan: VlanMode,
    /// Largest layer-3 packet in bytes, 68 to 65,535; `None` means that the port imposes no limit.
    pub mtu: Option<u16>,
    /// Queue pairs to use at most, of a tap one; `None` means as many as the other side asks for.
    pub queues: Option<u16>,
    /// The station's address: while the port can receive, frames to it do not flood and no other guest can claim it; with
    /// `spoofcheck` no other source is accepted.
    pub mac: Option<MacAddr>,
    /// Drop frames whose source address is not `mac`.
    pub spoofcheck: bool,
    /// Limit of what is received from the port.
    pub rate_rx: Option<RateLimit>,
    /// Limit of what is sent to the port.
    pub rate_tx: Option<RateLimit>,
    /// Whose port it is, in the owner's own terms; `None` for the operator's.
    pub owner: Option<String>,
}

/// How much may pass in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RateLimit {
    /// Bits per second, [`MIN_RATE`](crate::limits::MIN_RATE) to [`MAX_RATE`](crate::limits::MAX_RATE).
    pub bits_per_second: u64,
    /// Bits that may pass at once after a pause, within the same bounds; `None` for
    /// [`RateLimit::default_burst_bits`].
    pub burst_bits: Option<u64>,
}

impl RateLimit {
    /// What the rate gives in 250 ms. TCP that has lost a window pauses for 200 ms, and reaches the rate only if the bucket
    /// holds what came in meanwhile (with 50 ms it reaches a quarter of it).
    pub fn default_burst_bits(self) -> u64 {
        (self.bits_per_second / 4).max(1_000_000)
    }
}

/// The kinds of port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortTarget {
    /// A virtual machine's virtio-net device, over the vhost-user protocol.
    VhostUser {
        /// The unix socket, absolute.
        path: PathBuf,
        /// Who listens.
        mode: SocketMode,
    },
    /// A tap interface of the host.
    Tap {
        /// Interface name, made if it is not there; 1 to 15 bytes.
        interface: String,
    },
    /// A network interface of the host as an uplink, over AF_XDP.
    Afxdp {
        /// Interface name; 1 to 15 bytes. It need not be there yet.
        interface: String,
        /// How frames get to us.
        mode: AfxdpMode,
        /// Take the place of an XDP program that the interface has.
        replace: bool,
        /// Let the workers poll the driver.
        busy_poll: bool,
        /// Leave checksums to who sends the frame, the driver or the kernel before it; `None` means if the driver says that
        /// it completes them.
        tx_checksum: Option<bool>,
    },
    /// A device that DPDK has a driver for, as an uplink. Needs a switch that was built with it.
    Dpdk {
        /// In DPDK's own words, like `net_tap0,iface=up0`; 1 to 256 visible ASCII characters.
        device: String,
    },
}

impl PortTarget {
    /// Name of the kind, as in a SPEC.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::VhostUser { .. } => "vhost-user",
            Self::Tap { .. } => "tap",
            Self::Afxdp { .. } => "afxdp",
            Self::Dpdk { .. } => "dpdk",
        }
    }

    /// Whether two ports with these targets would be in each other's way.
    pub fn collides(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::VhostUser { path: a, .. }, Self::VhostUser { path: b, .. }) => a == b,
            (
                Self::Tap { interface: a } | Self::Afxdp { interface: a, .. },
                Self::Tap { interface: b } | Self::Afxdp { interface: b, .. },
            ) => a == b,
            // A device is known to DPDK by what is before its arguments.
            (Self::Dpdk { device: a }, Self::Dpdk { device: b }) => a.split(',').next() == b.split(',').next(),
            _ => false,
        }
    }
}

impl std::fmt::Display for PortTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::VhostUser { path, .. } => path.display().fmt(f),
            Self::Tap { interface } | Self::Afxdp { interface, .. } => f.write_str(interface),
            Self::Dpdk { device } => f.write_str(device),
        }
    }
}

/// Who listens on a vhost-user socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SocketMode {
    /// The frontend (QEMU) listens, we connect and retry.
    #[default]
    Client,
    /// We listen.
    Server,
}

/// How an AF_XDP uplink gets at frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AfxdpMode {
    /// The fastest that works, in the order of the others.
    #[default]
    Auto,
    /// The driver uses our frames itself.
    ZeroCopy,
    /// The driver runs our program, the kernel copies.
    Copy,
    /// The kernel's stack runs our program: works with every driver, slowly.
    Skb,
}

impl AfxdpMode {
    const ALL: [Self; 4] = [Self::Auto, Self::ZeroCopy, Self::Copy, Self::Skb];

    /// As SPEC writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "zerocopy",
            Self::Copy => "copy",
            Self::Skb => "skb",
        }
    }

    /// The mode that SPEC writes like this.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// VLAN membership of a port, in the way of Open vSwitch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VlanMode {
    /// Every VLAN passes as it is; untagged frames are VLAN 0.
    #[default]
    All,
    /// Untagged (and priority-tagged) frames belong to this VLAN, 1 to 4094; tagged ones are dropped.
    Access(u16),
    /// Tagged frames of these VLANs pass; untagged ones belong to `native` if there is one.
    Trunk {
        /// VLAN of untagged frames.
        native: Option<u16>,
        /// VLANs that pass with their tag, sorted, without duplicates.
        allowed: Vec<u16>,
    },
    /// Whole networks pass, each as a VLAN: the trunk of an uplink.
    Networks(Vec<Carried>),
}

/// A network that a port carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Carried {
    /// The network.
    pub network: String,
    /// Its VLAN there; `None` for untagged.
    pub vlan: Option<u16>,
}

impl fmt::Display for Carried {
    /// As SPEC writes it: `blue:100`, or `blue`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.network)?;
        self.vlan.map_or(Ok(()), |vlan| write!(out, ":{vlan}"))
    }
}

/// How workers wait for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WorkerMode {
    /// Poll while there is work, then arm notifications and sleep.
    #[default]
    Adaptive,
    /// Always poll.
    Poll,
    /// Sleep after every empty pass.
    Interrupt,
}

impl fmt::Display for WorkerMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Adaptive => "adaptive",
            Self::Poll => "poll",
            Self::Interrupt => "interrupt",
        })
    }
}

impl FromStr for WorkerMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "adaptive" => Ok(Self::Adaptive),
            "poll" => Ok(Self::Poll),
            "interrupt" => Ok(Self::Interrupt),
            _ => Err(format!("mode must be adaptive, poll or interrupt, not '{text}'")),
        }
    }
}

/// Bounds of the forwarding table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbConfig {
    /// Addresses held at most.
    pub entries: usize,
    /// Addresses learned from one port at most.
    pub per_port: usize,
    /// Seconds until an unheard address is forgotten.
    pub age_seconds: u64,
}

impl Default for FdbConfig {
    fn default() -> Self {
        Self {
            entries: crate::limits::DEFAULT_FDB_ENTRIES,
            per_port: crate::limits::DEFAULT_FDB_PER_PORT,
            age_seconds: crate::limits::DEFAULT_FDB_AGE_SECONDS,
        }
    }
}

/// What `Switch::start` needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// One worker for each entry, pinned to that CPU if one is given; empty means one unpinned worker.
    pub workers: Vec<Option<usize>>,
    /// How they wait.
    pub mode: WorkerMode,
    /// Bounds of the forwarding table.
    pub fdb: FdbConfig,
    /// Move queues from busy workers to idle ones.
    pub rebalance: bool,
    /// Folder that the sockets of all vhost-user ports have to be in, where no link is followed. Without it they can be
    /// anywhere.
    pub socket_root: Option<PathBuf>,
    /// Kinds of port that can be added; all without it.
    pub kinds: Option<Vec<String>>,
    /// Workers confine themselves; see [`crate::sandbox`].
    pub confine_workers: bool,
}

impl Default for SwitchConfig {
    fn default() -> Self {
        Self {
            workers: Vec::new(),
            mode: WorkerMode::default(),
            fdb: FdbConfig::default(),
            rebalance: true,
            socket_root: None,
            kinds: None,
            confine_workers: false,
        }
    }
}

/// Checks that workers can be placed as asked: not too many, and no two on one CPU.
///
/// # Errors
/// One line for the operator.
pub fn check_workers(workers: &[Option<usize>]) -> Result<(), String> {
    if workers.len() > MAX_WORKERS {
        return Err(format!("there can be at most {MAX_WORKERS} workers, not {}", workers.len()));
    }
    for (place, cpu) in workers.iter().enumerate() {
        let Some(number) = cpu else { continue };
        if *number >= MAX_CPUS {
            return Err(format!("cpu must be 0 to {}, not {number}", MAX_CPUS - 1));
        }
        if workers[..place].contains(cpu) {
            return Err(format!("CPU {number} is given twice; give each worker its own"));
        }
    }
    Ok(())
}

/// `on` or `off`.
///
/// # Errors
/// One line for the operator.
pub fn parse_switch(key: &str, text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key} must be on or off, not '{text}'")),
    }
}

/// The number of a CPU.
///
/// # Errors
/// One line for the operator.
pub fn parse_cpu(text: &str) -> Result<usize, String> {
    number("cpu", text, 0..=MAX_CPUS - 1)
}

/// A number in plain decimal digits within `range`, as every source writes them.
fn number<N>(key: &str, text: &str, range: std::ops::RangeInclusive<N>) -> Result<N, String>
where
    N: FromStr + PartialOrd + fmt::Display,
{
    // `FromStr` alone would take a sign too.
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<N>() {
        Ok(value) if digits && range.contains(&value) => Ok(value),
        _ => Err(format!("{key} must be a number from {} to {}, not '{text}'", range.start(), range.end())),
    }
}
