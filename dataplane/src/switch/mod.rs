//! The switch: networks, forwarding, and the tables of ports.
//!
//! This is where the control side and the workers meet. [`Switch`] adds and removes ports, which `tables` holds; whenever
//! one changes, `publish` shows the workers a new [`snapshot::Snapshot`].

#![forbid(unsafe_code)]

mod balance;
#[cfg(test)]
mod carried_tests;
pub mod convert;
mod departed;
mod drops;
pub mod fdb;
pub mod forward;
pub mod gro;
mod handover;
#[cfg(test)]
mod hostile_tests;
mod housekeeper;
mod load;
#[cfg(test)]
mod load_tests;
mod pairs;
pub mod policer;
mod publish;
mod report;
pub mod snapshot;
mod tables;
#[cfg(test)]
mod tests;
mod totals;
pub mod vlan;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use crate::config::{PortConfig, PortTarget, SwitchConfig};
use crate::handover::StatsRecord;
use crate::keeper::Keeper;
use crate::limits::{MAX_PORTS, MAX_STATIC_VLANS, MAX_WORKERS};
use crate::port::PortId;
use crate::port::afxdp::{self, AfxdpPort};
use crate::port::stats::PortStats;
use crate::port::tap::TapPort;
use crate::port::vhost::{AdoptError, Setup, SocketPlace, VhostPort};
use crate::sync::lock;
use crate::virtq::journal::Journal;
use crate::worker::{self, WorkerShared};
use fdb::{Fdb, Learned, Station};
use housekeeper::Housekeeper;
use load::Placement;
use policer::Policers;
use tables::{Driver, Entry, Moved, Slot, Tables};

pub use drops::DropReason;
pub use handover::HandoverError;
pub(crate) use handover::{Frozen, Packed, Stations, Taken, news};
pub(crate) use tables::{carrier_of, shared_domain};

/// Why a port was not added or removed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The name is taken.
    #[error("port {0} exists already")]
    Exists(String),
    /// There is no such port.
    #[error("no port is named {0}")]
    NotFound(String),
    /// There is no such worker.
    #[error("there is no worker {worker}; this switch has {workers}, counted from 0")]
    NoWorker {
        /// The worker wanted.
        worker: usize,
        /// How many there are.
        workers: usize,
    },
    /// A queue is not pinned by hand.
    #[error("{0} is not pinned")]
    NotPinned(String),
    /// Somebody captures its frames already.
    #[error("the frames of port {0} are being captured already")]
    Captured(String),
    /// Another port uses that socket or interface.
    #[error("{target} is used by port {port} already")]
    TargetInUse {
        /// Socket path or interface.
        target: String,
        /// The other port.
        port: String,
    },
    /// A port carries its network, or is to carry another's.
    #[error("{0}")]
    Networks(String),
    /// A bound of the switch is reached.
    #[error("the switch has reached its limit of {limit} {what}")]
    Limit {
        /// What there are too many of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The port's own set-up failed.
    #[error("{0}")]
    Setup(String),
    /// Its frontend has taken away what another process got from it, so that its connection cannot go on.
    #[error("{0}")]
    Withdrawn(String),
}

/// A running switch: workers, ports and tables. Share it by `Arc`.
#[derive(Debug)]
pub struct Switch {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads of the control side share.
#[derive(Debug)]
struct Inner {
    fdb: Arc<Fdb>,
    workers: Vec<Arc<WorkerShared>>,
    tables: Mutex<Tables>,
    stopping: AtomicBool,
    socket_root: Option<PathBuf>,
    kinds: Option<Vec<String>>,
    housekeeper: Housekeeper,
    loads: Mutex<load::Loads>,
    /// Move queues by load.
    rebalance: bool,
    journal: OnceLock<Arc<Journal>>,
    keeper: OnceLock<Arc<Keeper>>,
}

impl Switch {
    /// Starts the workers.
    ///
    /// # Errors
    /// If a thread cannot be started or pinned.
    pub fn start(config: &SwitchConfig) -> std::io::Result<Arc<Self>> {
        Self::start_with(config, false)
    }

    fn start_with(config: &SwitchConfig, frozen: bool) -> std::io::Result<Arc<Self>> {
        let cpus = if config.workers.is_empty() { vec![None] } else { config.workers.clone() };
        let workers: Vec<_> = cpus.into_iter().take(MAX_WORKERS).map(WorkerShared::new).collect::<Result<_, _>>()?;
        let placement = Placement::new(workers.len());
        let inner = Arc::new(Inner {
            fdb: Arc::new(Fdb::new(config.fdb)),
            workers: workers.into_iter().map(Arc::new).collect(),
            tables: Mutex::new(Tables { frozen, placement, ..Tables::default() }),
            stopping: AtomicBool::new(false),
            socket_root: config.socket_root.clone(),
            kinds: config.kinds.clone(),
            housekeeper: Housekeeper::default(),
            loads: Mutex::default(),
            rebalance: config.rebalance,
            journal: OnceLock::new(),
            keeper: OnceLock::new(),
        });
        inner.fdb.set_now(housekeeper::EPOCH);
        let switch = Arc::new(Self { inner: inner.clone(), threads: Mutex::default() });
        let first = Arc::new(inner.snapshot(&lock(&inner.tables)));
        lock(&inner.tables).shown = Some(first.clone());
        for (id, shared) in inner.workers.iter().enumerate() {
            let thread = worker::start(id, shared.clone(), config, inner.fdb.clone(), first.clone());
            let cpu = shared.cpu;
            let thread = thread.map_err(|e| match cpu {
                Some(cpu) => std::io::Error::new(e.kind(), format!("cannot run a worker on CPU {cpu}: {e}")),
                None => e,
            })?;
            lock(&switch.threads).push(thread);
        }
        let pulses = inner.workers.iter().map(|worker| worker.pulse.clone()).collect();
        let watched = inner.clone();
        let watchdog = worker::watchdog::start(pulses, move || watched.stopping.load(Ordering::Acquire))?;
        lock(&switch.threads).push(watchdog);
        let housekeeper = housekeeper::start(inner)?;
        lock(&switch.threads).push(housekeeper);
        Ok(switch)
    }

    /// Keeps the positions of all rings in this journal from now on, so that they are exact after a crash. Before ports are
    /// added.
    pub fn keep_journal(&self, journal: Arc<Journal>) {
        // A second one is ignored.
        let _ = self.inner.journal.set(journal);
    }

    /// Has the connections of all ports kept over a crash from now on. Before ports are added.
    pub fn keep_connections(&self, keeper: Arc<Keeper>) {
        // A second one is ignored.
        let _ = self.inner.keeper.set(keeper);
    }

    /// Adds a port. It connects in the background.
    ///
    /// # Errors
    /// [`PortError`]; nothing is left behind then.
    pub fn add_port(&self, config: PortConfig) -> Result<(), PortError> {
        self.add_with(config, None, Inner::start_driver)
    }

    /// Adds a port whose driver is made by `start`, to go on with these counts.
    fn add_with(
        &self,
        config: PortConfig,
        counts: Option<&StatsRecord>,
        start: impl FnOnce(Arc<Inner>, PortId, &PortConfig, &Arc<PortStats>) -> std::io::Result<Driver>,
    ) -> Result<(), PortError> {
        let name = config.name.clone();
        let (id, stats) = self.inner.reserve(&config)?;
        if let Some(counts) = counts {
            stats.restore(counts);
        }
        let driver = start(self.inner.clone(), id, &config, &stats);
        let mut tables = lock(&self.inner.tables);
        match driver {
            Ok(driver) => {
                if let Some(entry) = tables.ports.get_mut(&name) {
                    entry.driver = Some(driver);
                }
                let moved = tables.carry(&config);
                if !moved.ports.is_empty() {
                    self.inner.publish(&mut tables);
                    self.inner.forget_moved(&tables, &moved);
                }
                Ok(())
            }
            Err(e) => {
                // It has counted nothing itself, and whoever tries again has the counts still.
                stats.restore(&StatsRecord::default());
                self.inner.release(&mut tables, &name);
                let adoption = e.get_ref().and_then(|source| source.downcast_ref::<AdoptError>());
                let is_withdrawn = adoption.is_some_and(AdoptError::is_of_frontend);
                Err(if is_withdrawn { PortError::Withdrawn(e.to_string()) } else { PortError::Setup(e.to_string()) })
            }
        }
    }

    /// Removes a port and returns its configuration.
    ///
    /// # Errors
    /// [`PortError::NotFound`].
    pub fn remove_port(&self, name: &str) -> Result<PortConfig, PortError> {
        let not_found = || PortError::NotFound(name.into());
        let (config, driver) = {
            let mut tables = lock(&self.inner.tables);
            let entry = tables.ports.get_mut(name).ok_or_else(not_found)?;
            // A port that has no driver is being added or removed by somebody else.
            (entry.config.clone(), entry.driver.take().ok_or_else(not_found)?)
        };
        // Ends its thread, which publishes a last time: not under the lock.
        drop(driver);
        self.inner.release(&mut lock(&self.inner.tables), name);
        Ok(config)
    }

    /// Removes all ports at once, but for those that somebody else adds or removes just now.
    fn remove_all(&self) {
        let drivers: Vec<_> = {
            let mut tables = lock(&self.inner.tables);
            let taken = tables.ports.iter_mut().map(|(name, entry)| Some((name.clone(), entry.driver.take()?)));
            taken.flatten().collect()
        };
        let (names, drivers): (Vec<_>, Vec<_>) = drivers.into_iter().unzip();
        // Their threads publish a last time: not under the lock.
        Driver::stop_all(drivers);
        for name in names {
            self.inner.release(&mut lock(&self.inner.tables), &name);
        }
    }

    /// Stops all ports and workers and waits for them. Idempotent.
    pub fn stop(&self) {
        // First the frames: those that are sent to a port that goes before others would be lost. They wait in the guests'
        // rings for the next switch.
        {
            let mut tables = lock(&self.inner.tables);
            if !tables.ports.is_empty() && !tables.frozen {
                tables.frozen = true;
                self.inner.publish(&mut tables);
            }
        }
        self.remove_all();
        self.inner.stopping.store(true, Ordering::Release);
        self.inner.housekeeper.wake();
        for worker in &self.inner.workers {
            worker.stop.store(true, Ordering::Release);
            worker.wake.signal();
        }
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    /// Gives a new port its name and place.
    fn reserve(&self, config: &PortConfig) -> Result<(PortId, Arc<PortStats>), PortError> {
        let mut tables = lock(&self.tables);
        if tables.ports.contains_key(&config.name) {
            return Err(PortError::Exists(config.name.clone()));
        }
        if let Some(other) = tables.ports.values().find(|entry| entry.config.target.collides(&config.target)) {
            let (target, port) = (config.target.to_string(), other.config.name.clone());
            return Err(PortError::TargetInUse { target, port });
        }
        if let Some(problem) = tables.ports.values().find_map(|entry| config.network_conflict(&entry.config)) {
            return Err(PortError::Networks(problem));
        }
        let free = tables.slots.iter().position(|slot| matches!(slot, Slot::Free)).unwrap_or(tables.slots.len());
        if free >= MAX_PORTS {
            return Err(PortError::Limit { what: "ports", limit: MAX_PORTS });
        }
        let (domain, _) = tables.domain(config);
        tables.network(&domain)?;
        if free == tables.slots.len() {
            tables.slots.push(Slot::Free);
        }
        tables.slots[free] = Slot::Reserved;
        let (id, stats) = (PortId(free as u16), Arc::new(PortStats::default()));
        let entry = Entry {
            config: config.clone(),
            id,
            stats: stats.clone(),
            policers: Policers::from(config),
            resumed: false,
            driver: None,
        };
        tables.order.push(config.name.clone());
        tables.ports.insert(config.name.clone(), entry);
        Ok((id, stats))
    }

    /// Forgets what is known of ports in the bridge domain that they have left, but for their configured addresses. After the
    /// last worker has seen it: nobody learns there any more.
    fn forget_moved(&self, tables: &Tables, moved: &Moved) {
        moved.clear_holds();
        // Of two ports with one address, that where its guest was heard last.
        let is_static = |entry: &fdb::Entry| entry.is_static && moved.ports.contains(&entry.port);
        let heard: BTreeSet<_> = self.fdb.entries().into_iter().filter(is_static).map(|entry| entry.port).collect();
        self.fdb.retain(|entry| moved.ports.contains(&entry.port));
        let of_moved = || tables.ports.values().filter(|entry| moved.ports.contains(&entry.id));
        let (first, others): (Vec<_>, Vec<_>) = of_moved().partition(|entry| heard.contains(&entry.id));
        for entry in first.into_iter().chain(others) {
            self.add_static(tables, &entry.config, entry.id);
        }
    }

    /// Adds the configured address of a port as a static entry, which no other guest can claim, once the port can receive: until
    /// then its guest may be on another host, behind an uplink. If another port has the entry already, the guest migrates, and the
    /// entry stays there until the guest is heard here.
    fn add_static(&self, tables: &Tables, config: &PortConfig, id: PortId) {
        if !tables.view(id).is_some_and(|view| view.link.receives()) {
            return;
        }
        let (domain, vlan) = tables.domain(config);
        let (Some(mac), Some(network)) = (config.mac, tables.place(&domain)) else { return };
        let own = vlan.own();
        let stations = own.iter().take(MAX_STATIC_VLANS).map(|&vid| Station { mac: mac.to_u64(), vid, network });
        let refused = stations.filter(|station| !self.fdb.is_static(*station)).filter(|station| {
            self.fdb.forget(*station);
            self.fdb.set(*station, id, true, 0) == Learned::No
        });
        if refused.count() > 0 {
            tracing::warn!(port = config.name, "no room for its address in the table of stations, others can claim it");
        }
    }

    fn start_driver(
        self: Arc<Self>,
        id: PortId,
        config: &PortConfig,
        stats: &Arc<PortStats>,
    ) -> std::io::Result<Driver> {
        let kind = config.target.kind();
        if self.kinds.as_ref().is_some_and(|kinds| kinds.iter().all(|known| known != kind)) {
            return Err(std::io::Error::other(format!(
                "this switch has given up what {kind} ports need; add '{kind}' to kinds of [sandbox] in its file and \
                 restart it"
            )));
        }
        let publisher = self.publisher(id, stats);
        match &config.target {
            PortTarget::VhostUser { path, mode } => {
                let (name, place, mode) = (config.name.clone(), self.place(path)?, *mode);
                let (queues, mtu) = (config.queues, config.mtu);
                VhostPort::start(Setup { name, place, mode, queues, mtu, publisher }).map(Driver::Vhost)
            }
            PortTarget::Tap { interface } => TapPort::start(interface, config.mtu, publisher).map(Driver::Tap),
            PortTarget::Afxdp { interface, mode, replace, busy_poll, tx_checksum } => {
                let (mode, queues, replace, busy_poll) = (*mode, config.queues, *replace, *busy_poll);
                let options = afxdp::Options { mode, queues, replace, busy_poll, tx_checksum: *tx_checksum };
                AfxdpPort::start(&config.name, interface, options, publisher).map(Driver::Afxdp)
            }
            #[cfg(feature = "dpdk")]
            PortTarget::Dpdk { device } => {
                crate::port::dpdk::DpdkPort::start(&config.name, device, config.queues, config.mtu, publisher)
                    .map(Driver::Dpdk)
            }
            #[cfg(not(feature = "dpdk"))]
            PortTarget::Dpdk { .. } => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }

    /// Takes a port out of everything.
    fn release(&self, tables: &mut Tables, name: &str) {
        let Some(entry) = tables.ports.remove(name) else { return };
        tables.order.retain(|other| other != name);
        tables.slots[usize::from(entry.id.0)] = Slot::Reserved;
        let moved = tables.carry_no_more(&entry.config);
        self.publish(tables);
        tables.removed.add(entry.stats.clone());
        tables.placement.forget(entry.id);
        // After the last worker has forgotten the port: nobody can learn behind it any more.
        self.fdb.retain_of(entry.id, |_| true);
        if !moved.ports.is_empty() {
            self.forget_moved(tables, &moved);
        }
        self.add_statics_but(tables, entry.id);
        tables.slots[usize::from(entry.id.0)] = Slot::Free;
    }

    /// Where a port's socket is, and what of that is to be trusted.
    fn place(&self, path: &Path) -> std::io::Result<SocketPlace> {
        match &self.socket_root {
            Some(root) => SocketPlace::under(root, path.into()).map_err(std::io::Error::other),
            None => Ok(path.into()),
        }
    }

    /// Forgets the stations behind a port. An address that another one has, too, is that one's now.
    fn forget_stations(&self, tables: &Tables, id: PortId) {
        self.fdb.retain_of(id, |_| true);
        self.add_statics_but(tables, id);
    }

    fn add_statics_but(&self, tables: &Tables, id: PortId) {
        for other in tables.ports.values().filter(|other| other.config.mac.is_some() && other.id != id) {
            self.add_static(tables, &other.config, other.id);
        }
    }
}
