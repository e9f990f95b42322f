//! The switches that are compared, each started on the switch's CPU to connect to sockets that the load listens on.

mod ours;
mod ovs;
mod reference;
mod testpmd;
mod vpp;

use anyhow::{Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Peer {
    /// Ours, with its defaults.
    Ours,
    /// Open vSwitch with DPDK: one bridge, NORMAL, which learns.
    Ovs,
    /// dpdk-testpmd with vhost ports, which passes frames on without a look at them.
    Testpmd,
    /// The stock crates (`reference-switch`).
    Reference,
    /// VPP's bridge domain.
    Vpp,
}

/// What a switch is to cope with.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// Sockets to connect to, a port for each.
    pub sockets: &'a [PathBuf],
    /// A folder for its files.
    pub folder: &'a Path,
    /// CPUs to run on, with a worker on each.
    pub cpus: &'a [usize],
    /// MAC addresses that it has to know.
    pub macs: u32,
    /// Queue pairs of each port.
    pub queues: u16,
}

/// A switch that runs; ends when dropped.
pub type Running = Box<dyn std::any::Any>;

impl Peer {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ours, Self::Ovs, Self::Testpmd, Self::Reference, Self::Vpp];

    /// Why it cannot be measured here, if so.
    pub fn absence(self) -> Option<String> {
        let missing = |path: &str, package: &str| {
            (!Path::new(path).exists()).then(|| format!("{path} is not here (package {package})"))
        };
        match self {
            Self::Ours => ours::program().err().map(|error| format!("{error:#}")),
            Self::Ovs => missing(e2e::peer::VSWITCHD, "openvswitch-switch-dpdk"),
            Self::Testpmd => missing("/usr/bin/dpdk-testpmd", "dpdk-dev"),
            Self::Reference => reference::program().err().map(|error| format!("{error:#}")),
            Self::Vpp => vpp::program().err().map(|error| format!("{error:#}")),
        }
    }

    /// Whether it looks at addresses at all.
    pub fn learns(self) -> bool {
        self != Self::Testpmd
    }

    /// Whether it can have so many ports: DPDK's programs are built for 32 (`RTE_MAX_ETHPORTS`).
    pub fn has_room_for(self, ports: u16) -> bool {
        self != Self::Testpmd || ports <= 32
    }

    /// Whether it knows packed rings and in-order use.
    pub fn knows_all_rings(self) -> bool {
        self != Self::Reference
    }

    /// Starts it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(self, job: &Job<'_>) -> Result<Running> {
        if job.cpus.len() != 1 && self != Self::Ours {
            bail!("{self} is measured on one CPU only");
        }
        Ok(match self {
            Self::Ours => Box::new(ours::start(job)?),
            Self::Ovs => Box::new(ovs::start(job)?),
            Self::Testpmd => Box::new(testpmd::start(job)?),
            Self::Reference => Box::new(reference::start(job)?),
            Self::Vpp => Box::new(vpp::start(job)?),
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ours => "Sluice",
            Self::Ovs => "OVS-DPDK",
            Self::Testpmd => "testpmd io",
            Self::Reference => "reference",
            Self::Vpp => "VPP",
        })
    }
}

/// A program that was built together with us.
fn sibling(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.parent().unwrap_or(Path::new(".")).join(name);
    if !path.is_file() {
        bail!("{} is not built: cargo build --release -p sluice -p benches --bins", path.display());
    }
    Ok(path)
}
