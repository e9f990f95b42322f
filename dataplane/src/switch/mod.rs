//! The switch: networks, forwarding, and the tables of ports.
//!
//! This is where the control side and the workers meet. [`Switch`] holds the ports; whenever one changes it builds a
//! new [`snapshot::Snapshot`], puts it into every worker's mailbox, and waits until all have taken it up.

mod balance;
pub mod convert;
mod departed;
mod drops;
pub mod fdb;
pub mod forward;
mod handover;
mod load;
#[cfg(test)]
mod load_tests;
mod pairs;
pub mod policer;
mod report;
pub mod snapshot;
#[cfg(test)]
mod tests;
mod totals;
pub mod vlan;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::{PortConfig, PortTarget, SwitchConfig};
use crate::handover::StatsRecord;
use crate::keeper::Keeper;
use crate::limits::{MAX_NETWORKS, MAX_PORTS, MAX_WORKERS};
use crate::port::afxdp::{self, AfxdpPort};
use crate::port::stats::PortStats;
use crate::port::tap::TapPort;
use crate::port::vhost::{Adopted, SocketPlace, VhostPort};
use crate::port::{Link, PortId, Publisher};
use crate::status::PortState;
use crate::virtq::journal::Journal;
use crate::worker::{self, WorkerShared};
use fdb::{Fdb, Station};
use policer::Policers;
use snapshot::{Announcement, Plan, PortView, Served, Snapshot};
use vlan::VlanPolicy;

pub use drops::DropReason;
pub use handover::HandoverError;
pub(crate) use handover::{Frozen, Packed, Stations, Taken, news};

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
    housekeeper: report::Housekeeper,
    loads: Mutex<load::Loads>,
    /// Move queues by load.
    rebalance: bool,
    journal: OnceLock<Arc<Journal>>,
    keeper: OnceLock<Arc<Keeper>>,
}

/// The ports, as the control side knows them.
#[derive(Debug, Default)]
struct Tables {
    ports: BTreeMap<String, Entry>,
    /// Names in the order they were added.
    order: Vec<String>,
    slots: Vec<Slot>,
    networks: Vec<String>,
    placement: load::Placement,
    epoch: u64,
    /// For the next snapshot.
    announcement: Option<Announcement>,
    /// Workers are shown nothing, since the ports belong to another process.
    frozen: bool,
    removed: totals::Removed,
}

/// A place for a port.
#[derive(Debug, Clone, Default)]
enum Slot {
    #[default]
    Free,
    /// Given out, not yet shown to workers, or not shown any more.
    Reserved,
    Used(Arc<PortView>),
}

#[derive(Debug)]
struct Entry {
    config: PortConfig,
    id: PortId,
    stats: Arc<PortStats>,
    policers: Policers,
    /// Its connection was kept over a crash.
    resumed: bool,
    /// The thread that looks after the other side. `None` while the port is added or removed.
    driver: Option<Driver>,
}

/// The kinds of port, running until dropped.
#[derive(Debug)]
enum Driver {
    Vhost(VhostPort),
    /// Taken over from another process, and not started yet.
    Adopted(Box<Adopted>),
    Tap(TapPort),
    Afxdp(#[expect(dead_code, reason = "held for its drop")] AfxdpPort),
    #[cfg(feature = "dpdk")]
    Dpdk(#[expect(dead_code, reason = "held for its drop")] crate::port::dpdk::DpdkPort),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere does not make tables that are replaced as a whole inconsistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let inner = Arc::new(Inner {
            fdb: Arc::new(Fdb::new(config.fdb)),
            workers: workers.into_iter().map(Arc::new).collect(),
            tables: Mutex::new(Tables { frozen, ..Tables::default() }),
            stopping: AtomicBool::new(false),
            socket_root: config.socket_root.clone(),
            kinds: config.kinds.clone(),
            housekeeper: report::Housekeeper::default(),
            loads: Mutex::default(),
            rebalance: config.rebalance,
            journal: OnceLock::new(),
            keeper: OnceLock::new(),
        });
        inner.fdb.set_now(report::EPOCH);
        let switch = Arc::new(Self { inner: inner.clone(), threads: Mutex::default() });
        let first = Arc::new(inner.snapshot(&lock(&inner.tables))?);
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
        let housekeeper = report::start(inner)?;
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
                Ok(())
            }
            Err(e) => {
                self.inner.release(&mut tables, &name);
                Err(PortError::Setup(e.to_string()))
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
        for config in self.port_configs() {
            let _ = self.remove_port(&config.name);
        }
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
        let free = tables.slots.iter().position(|slot| matches!(slot, Slot::Free)).unwrap_or(tables.slots.len());
        if free >= MAX_PORTS {
            return Err(PortError::Limit { what: "ports", limit: MAX_PORTS });
        }
        tables.network(&config.network)?;
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
        self.add_static(&tables, config, id);
        Ok((id, stats))
    }

    /// A configured address is known from the start, and nobody else can claim it. Unless another port has it already:
    /// then this one is where its guest may migrate to, and the entry stays until the guest is heard here.
    fn add_static(&self, tables: &Tables, config: &PortConfig, id: PortId) {
        let network = tables.networks.iter().position(|name| *name == config.network);
        let vid = VlanPolicy::from(&config.vlan).untagged();
        if let (Some(mac), Some(network), Some(vid)) = (config.mac, network, vid) {
            let station = Station { mac: mac.to_u64(), vid, network: network as u16 };
            if self.fdb.is_static(station) {
                return;
            }
            self.fdb.forget(station);
            self.fdb.insert(station, id, true);
        }
    }

    /// The way to the workers of a port's driver, which is connecting.
    fn publisher(self: &Arc<Self>, id: PortId, stats: &Arc<PortStats>) -> Arc<PortPublisher> {
        let publisher = Arc::new(PortPublisher { inner: Arc::downgrade(self), id, stats: stats.clone() });
        publisher.publish(Link::down(PortState::Connecting, None));
        publisher
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
                let place = self.place(path)?;
                VhostPort::start(&config.name, place, *mode, config.queues, config.mtu, publisher).map(Driver::Vhost)
            }
            PortTarget::Tap { interface } => TapPort::start(interface, config.mtu, publisher).map(Driver::Tap),
            PortTarget::Afxdp { interface, mode, replace, busy_poll } => {
                let (mode, queues, replace, busy_poll) = (*mode, config.queues, *replace, *busy_poll);
                let options = afxdp::Options { mode, queues, replace, busy_poll };
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
        self.publish(tables);
        tables.removed.add(entry.stats.clone());
        tables.placement.forget(entry.id);
        // After the last worker has forgotten the port: nobody can learn behind it any more.
        self.fdb.retain_of(entry.id, |_| true);
        for other in tables.ports.values().filter(|other| other.config.mac.is_some()) {
            self.add_static(tables, &other.config, other.id);
        }
        tables.slots[usize::from(entry.id.0)] = Slot::Free;
    }

    /// Shows the tables to the workers and waits until all use them. Returns whether they do.
    fn publish(&self, tables: &mut Tables) -> bool {
        tables.epoch += 1;
        let announcement = if tables.frozen { None } else { tables.announcement.take() };
        let snapshot = match self.snapshot(tables) {
            Ok(snapshot) => Arc::new(Snapshot { announcement, ..snapshot }),
            Err(e) => {
                tracing::error!(error = %e, "cannot publish a change to the workers; it takes effect with the next one");
                return false;
            }
        };
        for worker in &self.workers {
            worker.mailbox.put(snapshot.clone());
            worker.wake.signal();
        }
        let acknowledged = |worker: &Arc<WorkerShared>| worker.acknowledged.reached(snapshot.epoch);
        let patience = Instant::now();
        while !self.stopping.load(Ordering::Acquire) && !self.workers.iter().all(acknowledged) {
            // A worker is never away for longer than a few bursts.
            if patience.elapsed() < Duration::from_micros(50) {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        true
    }

    /// Where a port's socket is, and what of that is to be trusted.
    fn place(&self, path: &Path) -> std::io::Result<SocketPlace> {
        match &self.socket_root {
            Some(root) => SocketPlace::under(root, path.into()).map_err(std::io::Error::other),
            None => Ok(path.into()),
        }
    }

    /// Forgets the stations learned behind a port.
    fn forget_stations(&self, id: PortId) {
        self.fdb.retain_of(id, |entry| !entry.is_static);
    }

    fn snapshot(&self, tables: &Tables) -> std::io::Result<Snapshot> {
        let slots = if tables.frozen { &[][..] } else { &tables.slots };
        let ports: Vec<_> = slots.iter().map(Slot::view).collect();
        let mut networks = vec![Vec::new(); tables.networks.len()];
        for port in ports.iter().flatten().filter(|port| !port.link.tx.is_empty()) {
            if let Some(members) = networks.get_mut(usize::from(port.network)) {
                members.push(port.id);
            }
        }
        let plans = self.plans(tables)?;
        Ok(Snapshot { epoch: tables.epoch, ports, networks, plans, announcement: None })
    }

    /// Spreads the receive queues over the workers.
    fn plans(&self, tables: &Tables) -> std::io::Result<Vec<Plan>> {
        let mut queues: Vec<Vec<Served>> = self.workers.iter().map(|_| Vec::new()).collect();
        let count = queues.len();
        for (name, entry) in tables.ports.iter().filter(|_| !tables.frozen) {
            let Some(port) = tables.slots.get(usize::from(entry.id.0)).and_then(Slot::view) else { continue };
            for rx in &port.link.rx {
                let worker = tables.placement.server(name, port.id, rx.pair, count);
                if let Some(plan) = worker.and_then(|worker| queues.get_mut(worker)) {
                    plan.push(Served::new(&port, rx));
                }
            }
        }
        let with_epoll = |(shared, queues): (&Arc<WorkerShared>, Vec<Served>)| {
            let epoll = worker::epoll_for(shared, queues.iter().map(|served| served.queue.event_fd()))?;
            Ok(Plan { queues, epoll })
        };
        self.workers.iter().zip(queues).map(with_epoll).collect()
    }
}

impl Slot {
    fn view(&self) -> Option<Arc<PortView>> {
        match self {
            Self::Used(view) => Some(view.clone()),
            _ => None,
        }
    }
}

impl Tables {
    /// The place of a network, made if need be. Networks stay, since entries of the FDB may name them.
    fn network(&mut self, name: &str) -> Result<u16, PortError> {
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

/// A port's way to the workers.
#[derive(Debug)]
struct PortPublisher {
    inner: Weak<Inner>,
    id: PortId,
    stats: Arc<PortStats>,
}

impl Publisher for PortPublisher {
    fn publish(&self, mut link: Link) {
        let Some(inner) = self.inner.upgrade() else { return };
        let mut tables = lock(&inner.tables);
        departed::inherit_hold(&mut link, &tables.slots[usize::from(self.id.0)]);
        let of_port = |entry: &&Entry| entry.id == self.id;
        let Some((config, policers)) =
            tables.ports.values().find(of_port).map(|entry| (entry.config.clone(), entry.policers.clone()))
        else {
            return;
        };
        let Ok(network) = tables.network(&config.network) else { return };
        let view = PortView {
            id: self.id,
            network,
            vlan: VlanPolicy::from(&config.vlan),
            mtu: config.mtu.map_or(usize::MAX / 2, usize::from),
            mac: config.mac.map(|mac| mac.to_u64()),
            only_source: config.mac.filter(|_| config.spoofcheck).map(|mac| mac.to_u64()),
            policers,
            stats: self.stats.clone(),
            link: Arc::new(link),
        };
        let is_down = |view: &PortView| view.link.state != PortState::Up && view.link.hold.is_none();
        let down = is_down(&view);
        let slot = &mut tables.slots[usize::from(self.id.0)];
        let was_down = slot.view().is_none_or(|before| is_down(&before));
        *slot = Slot::Used(Arc::new(view));
        inner.publish(&mut tables);
        // No worker learns behind the port any more; what is known would only swallow frames.
        if down && !was_down {
            inner.forget_stations(self.id);
        }
    }

    fn forget_stations(&self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let holds = |view: Arc<PortView>| view.link.hold.is_some();
        // Frames for them are held until they are heard elsewhere.
        if !lock(&inner.tables).slots[usize::from(self.id.0)].view().is_some_and(holds) {
            inner.forget_stations(self.id);
        }
    }

    fn announce(&self, mac: [u8; 6]) {
        if let Some(inner) = self.inner.upgrade() {
            let mut tables = lock(&inner.tables);
            tables.announcement = Some(Announcement { port: self.id, mac });
            inner.publish(&mut tables);
        }
    }

    fn stats(&self) -> &Arc<PortStats> {
        &self.stats
    }

    fn keeper(&self) -> Option<Arc<Keeper>> {
        self.inner.upgrade()?.keeper.get().cloned()
    }

    fn journal(&self) -> Option<(Arc<Journal>, String)> {
        let inner = self.inner.upgrade()?;
        let journal = inner.journal.get()?.clone();
        let tables = lock(&inner.tables);
        let entry = tables.ports.values().find(|entry| entry.id == self.id)?;
        Some((journal, entry.config.name.clone()))
    }
}
