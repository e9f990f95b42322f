//! The tables of ports, as the control side knows them. Workers see them as a [`Snapshot`](super::snapshot::Snapshot).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::policer::Policers;
use super::snapshot::{Announcement, PortView, Snapshot};
use super::vlan::{CARRIED_UNTAGGED, VlanPolicy};
use super::{PortError, load, totals};
use crate::config::{Carried, PortConfig};
use crate::limits::MAX_NETWORKS;
use crate::port::afxdp::AfxdpPort;
use crate::port::stats::PortStats;
use crate::port::tap::TapPort;
use crate::port::vhost::hold::Hold;
use crate::port::vhost::{Adopted, VhostPort};
use crate::port::{Link, PortId};

/// The ports, as the control side knows them.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) ports: BTreeMap<String, Entry>,
    /// Names in the order they were added.
    pub(super) order: Vec<String>,
    pub(super) slots: Vec<Slot>,
    /// Names of the bridge domains: networks, and what those share that a port carries.
    pub(super) networks: Vec<String>,
    /// Networks that a port carries.
    pub(super) carried: BTreeMap<String, Carrier>,
    pub(super) placement: load::Placement,
    pub(super) epoch: u64,
    /// What workers use, kept so that it is not a worker that frees it.
    pub(super) shown: Option<Arc<Snapshot>>,
    /// For the next snapshot.
    pub(super) announcement: Option<Announcement>,
    /// Workers are shown nothing, since the ports belong to another process.
    pub(super) frozen: bool,
    pub(super) removed: totals::Removed,
}

/// What carries a network.
#[derive(Debug)]
pub(super) struct Carrier {
    /// Bridge domain that all networks of the port share, each as a VLAN of it.
    domain: String,
    vid: u16,
}

/// What is in another bridge domain now.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub(super) ports: BTreeSet<PortId>,
    /// What was kept for their guests, by VLANs of the old one. No worker has it from the next snapshot on.
    holds: Vec<Arc<Hold>>,
}

impl Moved {
    /// Drops what was kept. Once the snapshot is shown.
    pub(super) fn clear_holds(&self) {
        self.holds.iter().for_each(|hold| hold.clear());
    }
}

/// A place for a port.
#[derive(Debug, Clone, Default)]
pub(super) enum Slot {
    #[default]
    Free,
    /// Given out, not yet shown to workers, or not shown any more.
    Reserved,
    Used(Arc<PortView>),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) config: PortConfig,
    pub(super) id: PortId,
    pub(super) stats: Arc<PortStats>,
    pub(super) policers: Policers,
    /// Its connection was kept over a crash.
    pub(super) resumed: bool,
    /// The thread that looks after the other side. `None` while the port is added or removed.
    pub(super) driver: Option<Driver>,
}

/// The kinds of port, running until dropped.
#[derive(Debug)]
pub(super) enum Driver {
    Vhost(VhostPort),
    /// Taken over from another process, and not started yet.
    Adopted(Box<Adopted>),
    Tap(TapPort),
    Afxdp(#[expect(dead_code, reason = "held for its drop")] AfxdpPort),
    #[cfg(feature = "dpdk")]
    Dpdk(#[expect(dead_code, reason = "held for its drop")] crate::port::dpdk::DpdkPort),
}

impl Driver {
    /// Ends all of these. Those whose other side can draw that out are waited for together.
    pub(super) fn stop_all(drivers: Vec<Self>) {
        let (mut ports, mut others) = (Vec::new(), Vec::new());
        for driver in drivers {
            match driver {
                Self::Vhost(port) => ports.push(port),
                other => others.push(other),
            }
        }
        VhostPort::stop_all(ports);
        drop(others);
    }
}

impl Slot {
    pub(super) fn view(&self) -> Option<Arc<PortView>> {
        match self {
            Self::Used(view) => Some(view.clone()),
            _ => None,
        }
    }
}

impl Tables {
    /// What workers see of a port, if the port has begun.
    pub(super) fn view(&self, id: PortId) -> Option<&Arc<PortView>> {
        match self.slots.get(usize::from(id.0)) {
            Some(Slot::Used(view)) => Some(view),
            _ => None,
        }
    }

    /// The place of a network, if there is one of that name.
    pub(super) fn place(&self, name: &str) -> Option<u16> {
        self.networks.iter().position(|known| known == name).map(|place| place as u16)
    }

    /// The place of a network, made if need be. Networks stay, since entries of the FDB may name them.
    pub(super) fn network(&mut self, name: &str) -> Result<u16, PortError> {
        if let Some(place) = self.place(name) {
            return Ok(place);
        }
        if self.networks.len() >= MAX_NETWORKS {
            let used: BTreeSet<_> = self.ports.values().map(|entry| self.domain(&entry.config).0).collect();
            // One that no port uses any more has no entries either: they went with their ports.
            let unused = self.networks.iter().position(|known| !used.contains(known));
            let place = unused.ok_or(PortError::Limit { what: "networks", limit: MAX_NETWORKS })?;
            self.networks[place] = name.into();
            return Ok(place as u16);
        }
        self.networks.push(name.into());
        Ok((self.networks.len() - 1) as u16)
    }

    /// Where a port's frames are switched: the bridge domain, and the port's VLANs there. That is its network, unless a port
    /// carries this as a VLAN.
    pub(super) fn domain(&self, config: &PortConfig) -> (String, VlanPolicy) {
        if !config.carried().is_empty() {
            (shared_domain(&config.name), VlanPolicy::from(&config.vlan))
        } else if let Some(Carrier { domain, vid }) = self.carried.get(&config.network) {
            (domain.clone(), VlanPolicy::Access(*vid))
        } else {
            (config.network.clone(), VlanPolicy::from(&config.vlan))
        }
    }

    /// The network, and the VLAN there, of a VLAN that a port has in its bridge domain.
    pub(super) fn network_of<'t>(&self, config: &'t PortConfig, vid: u16) -> Option<(&'t str, u16)> {
        if !config.carried().is_empty() {
            let network = config.carried().iter().find(|carried| vid_of(carried) == vid)?;
            Some((&network.network, 0))
        } else if self.carried.contains_key(&config.network) {
            Some((&config.network, 0))
        } else {
            Some((&config.network, vid))
        }
    }

    /// The configurations of the ports, by their places.
    pub(super) fn configs(&self) -> HashMap<PortId, &PortConfig> {
        self.ports.values().map(|entry| (entry.id, &entry.config)).collect()
    }

    /// Lets a port that comes carry its networks from now on. Returns what has moved.
    pub(super) fn carry(&mut self, carrier: &PortConfig) -> Moved {
        for carried in carrier.carried() {
            let entry = Carrier { domain: shared_domain(&carrier.name), vid: vid_of(carried) };
            self.carried.insert(carried.network.clone(), entry);
        }
        self.move_ports(carrier.carried())
    }

    /// Gives the networks of a port that goes back to themselves. Returns what has moved.
    pub(super) fn carry_no_more(&mut self, carrier: &PortConfig) -> Moved {
        // One that could not start has carried nothing.
        let (before, domain) = (self.carried.len(), shared_domain(&carrier.name));
        self.carried.retain(|_, by| by.domain != domain);
        if self.carried.len() == before { Moved::default() } else { self.move_ports(carrier.carried()) }
    }

    /// Shows the ports of these networks where they belong by now, from the next snapshot on.
    fn move_ports(&mut self, networks: &[Carried]) -> Moved {
        let names: BTreeSet<_> = networks.iter().map(|carried| carried.network.as_str()).collect();
        let inside = |entry: &&Entry| names.contains(entry.config.network.as_str());
        let place = |entry: &Entry| {
            let (domain, vlan) = self.domain(&entry.config);
            (entry.id, domain, vlan)
        };
        let moves: Vec<_> = self.ports.values().filter(inside).map(place).collect();
        let mut moved = Moved::default();
        for (id, domain, vlan) in &moves {
            moved.ports.insert(*id);
            // There is room: each port uses one network at most.
            let (Ok(network), Some(slot)) = (self.network(domain), self.slots.get_mut(usize::from(id.0))) else {
                continue;
            };
            if let Slot::Used(view) = slot {
                moved.holds.extend(view.link.hold.clone());
                let link = Arc::new(Link { hold: None, ..Link::clone(&view.link) });
                *view = Arc::new(PortView { network, vlan: vlan.clone(), link, ..PortView::clone(view) });
            }
        }
        moved
    }
}

/// The bridge domain of all networks that the port of this name carries: a name that no network can have.
pub(crate) fn shared_domain(carrier: &str) -> String {
    format!("={carrier}")
}

/// The name of the port that carries what is in this bridge domain, if that is such a one.
pub(crate) fn carrier_of(domain: &str) -> Option<&str> {
    domain.strip_prefix('=')
}

fn vid_of(carried: &Carried) -> u16 {
    carried.vlan.unwrap_or(CARRIED_UNTAGGED)
}
