//! The tables of ports, as the control side knows them. Workers see them as a [`Snapshot`](super::snapshot::Snapshot).

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::policer::Policers;
use super::snapshot::{Announcement, PortView, Snapshot};
use super::{PortError, load, totals};
use crate::config::PortConfig;
use crate::limits::MAX_NETWORKS;
use crate::port::PortId;
use crate::port::afxdp::AfxdpPort;
use crate::port::stats::PortStats;
use crate::port::tap::TapPort;
use crate::port::vhost::{Adopted, VhostPort};

/// The ports, as the control side knows them.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) ports: BTreeMap<String, Entry>,
    /// Names in the order they were added.
    pub(super) order: Vec<String>,
    pub(super) slots: Vec<Slot>,
    pub(super) networks: Vec<String>,
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

impl Slot {
    pub(super) fn view(&self) -> Option<Arc<PortView>> {
        match self {
            Self::Used(view) => Some(view.clone()),
            _ => None,
        }
    }
}

impl Tables {
    /// The place of a network, made if need be. Networks stay, since entries of the FDB may name them.
    pub(super) fn network(&mut self, name: &str) -> Result<u16, PortError> {
        if let Some(place) = self.networks.iter().position(|known| known == name) {
            return Ok(place as u16);
        }
        let used = |place: &usize| self.ports.values().any(|entry| entry.config.network == self.networks[*place]);
        if self.networks.len() >= MAX_NETWORKS {
            // One that no port uses any more has no entries either: they went with their ports.
            let unused = (0..self.networks.len()).find(|place| !used(place));
            let place = unused.ok_or(PortError::Limit { what: "networks", limit: MAX_NETWORKS })?;
            self.networks[place] = name.into();
            return Ok(place as u16);
        }
        self.networks.push(name.into());
        Ok((self.networks.len() - 1) as u16)
    }
}
