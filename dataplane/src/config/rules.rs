//! The rules of a port's configuration, each in one place.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Carried, InvalidPort, PortConfig, PortTarget, RateLimit, VlanMode};
use crate::limits::{
    MAX_DEVICE, MAX_INTERFACE_NAME, MAX_NAME, MAX_OWNER, MAX_QUEUE_PAIRS, MAX_RATE, MAX_SOCKET_PATH, MAX_VLAN, MIN_MTU,
    MIN_RATE,
};

impl PortConfig {
    /// Checks that a port can be beside others, which are given together with it.
    ///
    /// # Errors
    /// If it has the name or the target of one of them, or [`PortConfig::network_conflict`] has.
    pub fn check_beside<'a>(&self, others: impl IntoIterator<Item = &'a Self>) -> Result<(), InvalidPort> {
        for other in others {
            if self.name == other.name {
                let problem = format!("port {} is given twice; names must be unique", self.name);
                return Err(InvalidPort::new("name", problem));
            }
            if self.target.collides(&other.target) {
                let problem = format!("ports {} and {} have the same target; give each its own", other.name, self.name);
                return Err(InvalidPort::new("target", problem));
            }
            if let Some(problem) = self.network_conflict(other) {
                let key = if matches!(self.vlan, VlanMode::Networks(_)) { "networks" } else { "network" };
                return Err(InvalidPort::new(key, problem));
            }
        }
        Ok(())
    }

    /// The networks that the port carries, if it is one that does.
    pub fn carried(&self) -> &[Carried] {
        match &self.vlan {
            VlanMode::Networks(carried) => carried,
            _ => &[],
        }
    }

    /// Why this port and another cannot be there both, if it is for the networks that one of them carries.
    pub fn network_conflict(&self, other: &Self) -> Option<String> {
        let carries = |port: &Self, network: &str| port.carried().iter().any(|carried| carried.network == network);
        if let Some(Carried { network, .. }) = self.carried().iter().find(|mine| carries(other, &mine.network)) {
            return Some(format!("network {network} is carried by port {} already", other.name));
        }
        let (carrier, inside) = if self.carried().is_empty() { (other, self) } else { (self, other) };
        let has_vlans = inside.vlan != VlanMode::All;
        (has_vlans && carries(carrier, &inside.network)).then(|| {
            let (inside, network) = (&inside.name, &inside.network);
            format!(
                "port {} carries network {network} as one VLAN, in which port {inside} cannot have VLANs of its own; \
                 leave out its vlan and trunk, or use trunk instead of networks",
                carrier.name
            )
        })
    }

    /// Checks every rule that does not depend on the state of the host.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), InvalidPort> {
        check_name("name", &self.name)?;
        match &self.target {
            PortTarget::VhostUser { path, .. } => check_socket_path(path)?,
            PortTarget::Tap { interface } | PortTarget::Afxdp { interface, .. } => check_interface(interface)?,
            PortTarget::Dpdk { device } => check_device(device)?,
        }
        self.check_vlans()?;
        if self.carried().is_empty() {
            check_name("network", &self.network)?;
        }
        if let Some(mtu) = self.mtu {
            check_range("mtu", mtu, MIN_MTU, u16::MAX)?;
        }
        if let Some(queues) = self.queues {
            check_range("queues", queues, 1, MAX_QUEUE_PAIRS as u16)?;
            if queues > 1 && matches!(self.target, PortTarget::Tap { .. }) {
                let problem = format!("a tap has one queue pair, so queues cannot be {queues}; leave it out");
                return Err(InvalidPort::new("queues", problem));
            }
        }
        self.check_mac()?;
        check_rate(["rate-rx", "burst-rx"], self.rate_rx)?;
        check_rate(["rate-tx", "burst-tx"], self.rate_tx)?;
        self.owner.as_deref().map_or(Ok(()), check_owner)
    }

    fn check_vlans(&self) -> Result<(), InvalidPort> {
        match &self.vlan {
            VlanMode::Networks(_) if !self.network.is_empty() => {
                Err(InvalidPort::new("network", "networks takes the place of network; leave one of them out"))
            }
            VlanMode::Networks(networks) => check_carried(networks),
            VlanMode::All => Ok(()),
            VlanMode::Access(vlan) => check_range("vlan", *vlan, 1, MAX_VLAN),
            VlanMode::Trunk { native, allowed } => {
                if let Some(vlan) = native {
                    check_range("vlan", *vlan, 1, MAX_VLAN)?;
                }
                if allowed.is_empty() {
                    return Err(InvalidPort::new("trunk", "trunk needs at least one VLAN, like trunk=10,20-29"));
                }
                if !allowed.is_sorted_by(|a, b| a < b) {
                    return Err(InvalidPort::new("trunk", "the VLANs of a trunk must be sorted and different"));
                }
                allowed.iter().try_for_each(|vlan| check_range("trunk", *vlan, 1, MAX_VLAN))
            }
        }
    }

    fn check_mac(&self) -> Result<(), InvalidPort> {
        match self.mac {
            None if self.spoofcheck => {
                Err(InvalidPort::new("spoofcheck", "spoofcheck needs the port's address; add mac=…"))
            }
            Some(mac) if mac.is_multicast() || mac.0 == [0; 6] => {
                Err(InvalidPort::new("mac", format!("mac must be the address of one station, not {mac}")))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the folder of a vhost-user socket is there, so that a mistyped path is found when the port is added
    /// rather than never. Ports that come from the file or the last run are not held to it: they wait.
    ///
    /// # Errors
    /// [`MissingFolder`].
    pub fn check_folder(&self) -> Result<(), MissingFolder> {
        let PortTarget::VhostUser { path, .. } = &self.target else { return Ok(()) };
        let folder = path.parent().unwrap_or(path);
        let source = match folder.metadata() {
            Ok(metadata) if metadata.is_dir() => return Ok(()),
            Ok(_) => io::ErrorKind::NotADirectory.into(),
            Err(error) => error,
        };
        Err(MissingFolder { port: self.name.clone(), folder: folder.to_owned(), source })
    }
}

fn check_carried(networks: &[Carried]) -> Result<(), InvalidPort> {
    let wrong = |problem| Err(InvalidPort::new("networks", problem));
    let (mut names, mut vlans) = (BTreeSet::new(), BTreeSet::new());
    for Carried { network, vlan } in networks {
        check_name("networks", network)?;
        if let Some(vlan) = vlan {
            check_range("networks", *vlan, 1, MAX_VLAN)?;
        }
        if !names.insert(network) {
            return wrong(format!("network {network} is given twice; it can have one VLAN"));
        }
        if !vlans.insert(vlan) {
            return wrong(match vlan {
                Some(vlan) => format!("VLAN {vlan} is given twice; each network needs its own"),
                None => format!("only one network can be without a VLAN; write {network}:VLAN"),
            });
        }
    }
    if networks.is_empty() {
        wrong("networks needs at least one, like networks=blue:100,red:200".into())
    } else {
        Ok(())
    }
}

fn check_device(device: &str) -> Result<(), InvalidPort> {
    if !cfg!(feature = "dpdk") {
        let problem = "kind dpdk is not built in; build with --features dpdk, or use vhost-user, tap or afxdp";
        return Err(InvalidPort::new("kind", problem));
    }
    let fits = (1..=MAX_DEVICE).contains(&device.len()) && device.bytes().all(|byte| byte.is_ascii_graphic());
    if fits && !device.starts_with(',') {
        return Ok(());
    }
    let problem = format!("a DPDK device is written like net_tap0,iface=up0, in at most {MAX_DEVICE} characters");
    Err(InvalidPort::new("target", problem))
}

/// The folder of a vhost-user socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("port {port}: {}", self.problem())]
pub struct MissingFolder {
    /// The port.
    pub port: String,
    /// The folder.
    pub folder: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl MissingFolder {
    fn problem(&self) -> String {
        let folder = self.folder.display();
        match self.source.kind() {
            io::ErrorKind::NotFound => format!("folder {folder} does not exist; create it, or correct the path"),
            io::ErrorKind::NotADirectory => format!("{folder} is not a folder; correct the path"),
            io::ErrorKind::PermissionDenied => {
                format!("folder {folder} is out of reach; let the switch's user search it")
            }
            _ => format!("folder {folder} cannot be used: {}", self.source),
        }
    }
}

fn check_range(key: &'static str, value: u16, low: u16, high: u16) -> Result<(), InvalidPort> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(InvalidPort::new(key, format!("{key} must be a number from {low} to {high}, not '{value}'")))
}

fn check_rate(keys: [&'static str; 2], limit: Option<RateLimit>) -> Result<(), InvalidPort> {
    let Some(limit) = limit else { return Ok(()) };
    for (key, bits) in keys.into_iter().zip([Some(limit.bits_per_second), limit.burst_bits]) {
        if bits.is_some_and(|bits| !(MIN_RATE..=MAX_RATE).contains(&bits)) {
            return Err(InvalidPort::new(key, format!("{key} must be 1K to 1000G, like 500M; the unit is bits")));
        }
    }
    Ok(())
}

fn check_owner(owner: &str) -> Result<(), InvalidPort> {
    let fits = (1..=MAX_OWNER).contains(&owner.len());
    if fits && owner.bytes().all(|b| b.is_ascii_graphic() && b != b',') {
        return Ok(());
    }
    let rule = format!("owner must be 1 to {MAX_OWNER} visible characters without ',', not '{owner}'");
    Err(InvalidPort::new("owner", rule))
}

pub(super) fn check_name(key: &'static str, name: &str) -> Result<(), InvalidPort> {
    let fits = (1..=MAX_NAME).contains(&name.len());
    if fits && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Ok(());
    }
    let rule = format!("{key} must be 1 to {MAX_NAME} letters, digits, '.', '_' or '-', not '{name}'");
    Err(InvalidPort::new(key, rule))
}

fn check_socket_path(path: &Path) -> Result<(), InvalidPort> {
    let wrong = |problem: String| Err(InvalidPort::new("target", problem));
    let shown = path.display();
    if path.as_os_str().is_empty() {
        return wrong("the path of the socket is missing, like vhost-user:/run/vm1.sock".into());
    }
    if !path.is_absolute() {
        return wrong(format!("the path of the socket must start with '/', not '{shown}'"));
    }
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return wrong(format!(
            "the path of the socket is {length} bytes long, and the kernel takes at most {MAX_SOCKET_PATH}; \
             use a shorter one than '{shown}'"
        ));
    }
    // A comma would end the target where the port is written as SPEC, which the state file does.
    if path.as_os_str().as_bytes().iter().any(|b| b.is_ascii_control() || *b == b',') || path.to_str().is_none() {
        return wrong(format!("the path of the socket must be UTF-8 without commas and control characters: '{shown}'"));
    }
    if path.file_name().is_none() || path.as_os_str().as_bytes().ends_with(b"/") {
        return wrong(format!("'{shown}' names a folder; give the path of the socket in it"));
    }
    Ok(())
}

fn check_interface(name: &str) -> Result<(), InvalidPort> {
    let fits = (1..=MAX_INTERFACE_NAME).contains(&name.len()) && name != "." && name != "..";
    // The kernel's rule, less '%' (a pattern to it) and ',' (ends the target in SPEC).
    if fits && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%,".contains(&b)) {
        return Ok(());
    }
    let rule = format!(
        "the interface must be 1 to {MAX_INTERFACE_NAME} visible characters without '/', ':', '%' and ',', not '{name}'"
    );
    Err(InvalidPort::new("target", rule))
}
