//! A switch that hands over to another process, and one that takes over. See [`crate::handover`].

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{PortConfig, PortTarget, SwitchConfig};
use crate::handover::{FdbRecord, Fds, KindRecord, StatsRecord, VhostRecord};
use crate::keeper::Kept;
use crate::port::PortId;
use crate::port::stats::PortStats;
use crate::port::tap::TapPort;
use crate::port::vhost::{Adopted, Paused, Setup, Standing, remove_socket};
use crate::status::PortState;
use crate::switch::fdb::Station;
use crate::switch::{Driver, Inner, PortError, Slot, Switch};
use crate::sync::{close_apart, lock};

/// For guests that are there at the start to come up, before the first frame is forwarded.
const COMING_LIMIT: Duration = Duration::from_millis(150);
/// For them to notice that their link is up.
const NOTICE: Duration = Duration::from_millis(80);
/// Between two looks at whether all ports are up.
const OPEN_PAUSE: Duration = Duration::from_millis(2);

/// Why a switch cannot hand over, or take over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A port's thread did not stand still in time.
    #[error("port {0} is in the midst of a message from its frontend; try again")]
    Busy(String),
    /// Frames are kept for a guest that is on its way to another port, or whose rings are being changed.
    #[error("frames are being kept for the guest of port {0}, which migrates; try again, or remove the port")]
    Migrating(String),
    /// A port cannot be handed over or taken over.
    #[error("port {0}: {1}")]
    Port(String, String),
}

/// A port that stands still, as its driver gives it away.
pub(crate) struct Packed {
    pub(crate) config: PortConfig,
    pub(crate) stats: Arc<PortStats>,
    pub(crate) kind: KindRecord,
    pub(crate) fds: Fds,
    pub(crate) standing: Vec<Standing>,
    /// Lets its thread go on when dropped.
    _paused: Option<Paused>,
}

/// The workers have nothing to do until this is dropped.
pub(crate) struct Frozen<'s>(&'s Switch);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.thaw();
    }
}

/// The stations that are known at some moment, and what their records refer to.
pub(crate) struct Stations {
    pub(crate) networks: Vec<String>,
    pub(crate) entries: Vec<FdbRecord>,
    /// What [`Switch::station_changes`] said before.
    pub(crate) changes: u64,
}

/// What another process has said of a port, to take it over.
pub(crate) struct Taken {
    pub(crate) kind: KindRecord,
    pub(crate) fds: Fds,
}

impl Switch {
    /// Has the threads of all ports stand still, between two messages of their frontends. Frames flow on.
    ///
    /// # Errors
    /// [`HandoverError`]; everything goes on then, as it does when the ports are dropped.
    pub(crate) fn pack(&self, deadline: Instant) -> Result<Vec<Packed>, HandoverError> {
        let tables = lock(&self.inner.tables);
        let names = tables.order.iter().filter_map(|name| tables.ports.get(name));
        // All are asked before the first is waited for.
        let asked = names.map(|entry| {
            let failed = |error: io::Error| HandoverError::Port(entry.config.name.clone(), error.to_string());
            let mut fds = Fds::default();
            let (kind, paused) = match &entry.driver {
                Some(Driver::Vhost(port)) => (KindRecord::Anew, Some(port.pause())),
                Some(Driver::Tap(port)) => match port.duplicate().map_err(failed)? {
                    Some(fd) => (KindRecord::Tap(fds.put(std::os::fd::AsFd::as_fd(&fd)).map_err(failed)?), None),
                    None => (KindRecord::Anew, None),
                },
                _ => (KindRecord::Anew, None),
            };
            let (config, stats) = (entry.config.clone(), entry.stats.clone());
            Ok(Packed { config, stats, kind, fds, standing: Vec::new(), _paused: paused })
        });
        let mut asked = asked.collect::<Result<Vec<_>, HandoverError>>()?;
        // Their threads may be waiting for the tables.
        drop(tables);
        for packed in &mut asked {
            let Some(paused) = &packed._paused else { continue };
            let name = || packed.config.name.clone();
            let parcel = paused.parcel(deadline).map_err(|error| HandoverError::Port(name(), error.to_string()))?;
            let parcel = parcel.ok_or_else(|| HandoverError::Busy(name()))?;
            (packed.kind, packed.fds, packed.standing) =
                (KindRecord::Vhost(parcel.record), parcel.fds, parcel.standing);
        }
        Ok(asked)
    }

    /// Takes all queues from the workers. Where rings stand is final while this is held.
    ///
    /// # Errors
    /// [`HandoverError::Migrating`] if frames are held just now.
    pub(crate) fn freeze(&self) -> Result<Frozen<'_>, HandoverError> {
        let mut tables = lock(&self.inner.tables);
        tables.frozen = true;
        self.inner.publish(&mut tables);
        let mut views = tables.slots.iter().filter_map(Slot::view);
        let held = views.find(|view| view.link.hold.as_ref().is_some_and(|hold| !hold.is_empty()));
        let port = held.map(|view| tables.configs().get(&view.id).map_or_else(String::new, |port| port.name.clone()));
        drop(views);
        drop(tables);
        let frozen = Frozen(self);
        port.map_or(Ok(frozen), |port| Err(HandoverError::Migrating(port)))
    }

    /// Gives the workers their queues, all at once.
    pub(crate) fn thaw(&self) {
        let mut tables = lock(&self.inner.tables);
        tables.frozen = false;
        self.inner.publish(&mut tables);
    }

    /// The stations that are known, by the places of their ports among `ports`.
    pub(crate) fn stations(&self, ports: &[Packed]) -> Stations {
        let changes = self.station_changes();
        let tables = lock(&self.inner.tables);
        let by_name: HashMap<_, _> =
            ports.iter().zip(0u16..).map(|(packed, place)| (&packed.config.name, place)).collect();
        let mut places = vec![None; tables.slots.len()];
        for entry in tables.ports.values() {
            if let Some(slot) = places.get_mut(usize::from(entry.id.0)) {
                *slot = by_name.get(&entry.config.name).copied();
            }
        }
        let entries = self.inner.fdb.entries().into_iter().filter_map(|entry| {
            let port = (*places.get(usize::from(entry.port.0))?)?;
            let Station { mac, vid, network } = entry.station;
            Some(FdbRecord(mac, vid, network, port, entry.age, entry.is_static))
        });
        Stations { entries: entries.collect(), networks: tables.networks.clone(), changes }
    }

    /// Counts the stations that came, moved or were forgotten.
    pub(crate) fn station_changes(&self) -> u64 {
        self.inner.fdb.changes()
    }

    /// Starts the workers without anything to do, for ports that are taken over, until it is opened.
    ///
    /// # Errors
    /// As [`Switch::start`].
    pub fn start_frozen(config: &SwitchConfig) -> io::Result<Arc<Self>> {
        Self::start_with(config, true)
    }

    /// Ends the wait of [`Switch::start_frozen`] for ports whose frontends are there and come up just now. QEMU has shown
    /// its guest a link that went down and came up, upon which a guest forgets all addresses and asks for them. A question
    /// that finds the other port down is lost, and so is the answer of a guest that has not noticed its link yet; either is
    /// repeated only after a second.
    pub fn open(&self) {
        let end = Instant::now() + COMING_LIMIT;
        // Whether some port is about to come up, and whether one is up.
        let look = || {
            let tables = lock(&self.inner.tables);
            // Guests whose connections were kept have not noticed anything.
            let ports = tables.ports.values().filter(|entry| !entry.resumed);
            let views = ports.filter_map(|entry| tables.view(entry.id));
            let links = views.map(|view| view.link.clone());
            links.fold((false, false), |(coming, up), link| match link.state {
                PortState::Connecting => (coming || link.reason.is_none(), up),
                PortState::Down => (true, up),
                PortState::Up => (coming, up || link.memory_bytes > 0),
                PortState::Failed => (coming, up),
            })
        };
        while Instant::now() < end && look().0 {
            std::thread::sleep(OPEN_PAUSE);
        }
        if look().1 {
            std::thread::sleep(NOTICE);
        }
        self.thaw();
    }

    /// Adds a port that another process hands over. It does nothing before [`Switch::start_adopted`].
    ///
    /// # Errors
    /// [`PortError`].
    pub(crate) fn adopt_port(&self, config: PortConfig, taken: Taken) -> Result<(), PortError> {
        let Taken { kind, mut fds } = taken;
        self.add_with(config, None, |inner, id, config, stats| {
            let publisher = inner.publisher(id, stats);
            match (&config.target, kind) {
                (PortTarget::VhostUser { path, mode }, KindRecord::Vhost(record)) => {
                    let (name, place, mode) = (config.name.clone(), inner.place(path)?, *mode);
                    let setup = Setup { name, place, mode, queues: config.queues, mtu: config.mtu, publisher };
                    let adopted = Adopted::new(setup, record, &mut fds).map_err(io::Error::other)?;
                    Ok(Driver::Adopted(Box::new(adopted)))
                }
                (PortTarget::Tap { interface }, KindRecord::Tap(fd)) => {
                    let fd = fds.take(fd).ok_or_else(|| io::Error::other("the descriptor of the tap is missing"))?;
                    TapPort::adopt(fd, interface, config.mtu, publisher).map(Driver::Tap)
                }
                _ => Err(io::Error::other("it was handed over as another kind of port")),
            }
        })
    }

    /// Lets go of a port that another process hands over and nobody goes on with, without a wait for its frontend. The file of
    /// its socket goes, too.
    pub(crate) fn discard(&self, config: &PortConfig, taken: Taken) {
        let Taken { kind, fds } = taken;
        if let (PortTarget::VhostUser { path, .. }, KindRecord::Vhost(VhostRecord { listener: Some(listener), .. })) =
            (&config.target, kind)
            && let Ok(place) = self.inner.place(path)
        {
            remove_socket(&place, (listener.1, listener.2));
        }
        if let Err(error) = close_apart(fds) {
            tracing::error!(port = config.name, "its frontend stays connected to nobody, restart that: {error}");
        }
    }

    /// Adds a port whose connection was kept over a crash. Its frontend is served from [`Switch::start_adopted`] on.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn resume_port(&self, config: PortConfig, kept: Kept) -> Result<(), PortError> {
        let name = config.name.clone();
        self.adopt_port(config, Taken { kind: KindRecord::Vhost(kept.record), fds: kept.fds })?;
        let driver = self.exchange(&name, |driver| driver.take());
        let outcome = match &driver {
            Some(Driver::Adopted(adopted)) => adopted.resume().map_err(|error| PortError::Setup(error.to_string())),
            _ => Ok(()),
        };
        self.exchange(&name, |place| *place = driver);
        if outcome.is_err() {
            let _ = self.remove_port(&name);
        } else if let Some(entry) = lock(&self.inner.tables).ports.get_mut(&name) {
            entry.resumed = true;
        }
        outcome
    }

    /// Makes the queues of a port that was taken over, from where its rings stand, and goes on with its counts. Returns whether
    /// that could be done, or its frontend has seen to it that not.
    ///
    /// # Errors
    /// [`HandoverError::Port`].
    pub(crate) fn adopted_go_on(&self, name: &str, bases: &[u32], counts: &StatsRecord) -> Result<bool, HandoverError> {
        let driver = self.exchange(name, |driver| driver.take());
        // Before, since a fault that it has had is among them.
        let stats = self.port_stats(name);
        if let Some(stats) = &stats {
            stats.restore(counts);
        }
        let outcome = match &driver {
            Some(Driver::Adopted(adopted)) => adopted.go_on(bases),
            _ => Ok(()),
        };
        self.exchange(name, |place| *place = driver);
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if error.is_of_frontend() => {
                tracing::warn!(port = name, "cannot be taken over, and begins anew: {error}");
                // They are that port's.
                if let Some(stats) = &stats {
                    stats.restore(&StatsRecord::default());
                }
                Ok(false)
            }
            Err(error) => Err(HandoverError::Port(name.into(), error.to_string())),
        }
    }

    /// Lets the ports that were taken over serve their frontends. Returns those that cannot: they begin anew.
    pub fn start_adopted(&self) -> Vec<String> {
        let mut anew = Vec::new();
        for config in self.port_configs() {
            let name = config.name.clone();
            let driver = match self.exchange(&name, |driver| driver.take()) {
                Some(Driver::Adopted(adopted)) => match adopted.start() {
                    Ok(port) => Some(Driver::Vhost(port)),
                    Err(error) => {
                        tracing::error!(
                            port = name,
                            "cannot go on serving its frontend, which has to connect anew: {error}"
                        );
                        self.begin_anew(config);
                        anew.push(name);
                        continue;
                    }
                },
                Some(Driver::Tap(tap)) => {
                    // Whoever had it may have had another.
                    if let Err(error) = tap.set_mtu() {
                        tracing::warn!(port = name, mtu = config.mtu, "cannot set the MTU of its interface: {error}");
                    }
                    Some(Driver::Tap(tap))
                }
                other => other,
            };
            self.exchange(&name, |place| *place = driver);
        }
        anew
    }

    /// Removes a port that has no driver, and adds it as if it were new.
    fn begin_anew(&self, config: PortConfig) {
        let name = config.name.clone();
        self.inner.release(&mut lock(&self.inner.tables), &name);
        if let Err(error) = self.add_port(config) {
            tracing::error!(port = name, "cannot be added again, remove and add it: {error}");
        }
    }

    /// Adds a port that another process had and that is made anew, with its counts.
    ///
    /// # Errors
    /// [`PortError`].
    pub(crate) fn add_port_again(&self, config: PortConfig, counts: &StatsRecord) -> Result<(), PortError> {
        self.add_with(config, Some(counts), Inner::start_driver)
    }

    /// Learns what another process knew of the stations behind these ports, if it is `newer` in place of what is known.
    pub(crate) fn restore_stations(&self, networks: &[String], ports: &[String], entries: &[FdbRecord], newer: bool) {
        let tables = lock(&self.inner.tables);
        let networks: Vec<_> = networks.iter().map(|name| tables.place(name)).collect();
        let port = |name: &String| {
            let entry = tables.ports.get(name)?;
            let (domain, vlan) = tables.domain(&entry.config);
            Some((entry, tables.place(&domain)?, vlan))
        };
        let ports: Vec<_> = ports.iter().map(port).collect();
        for &FdbRecord(mac, vid, network, port, age, is_static) in entries {
            let network = networks.get(usize::from(network)).copied().flatten();
            let port = ports.get(usize::from(port)).and_then(Option::as_ref);
            let (Some(network), Some((entry, domain, vlan))) = (network, port) else { continue };
            let station = Station { mac, vid, network };
            let is_known = || !is_static && self.inner.fdb.lookup(station).is_some();
            // Its configuration may have changed.
            if network != *domain || vlan.egress(vid).is_none() || (!newer && is_known()) {
                continue;
            }
            // Of several ports that have a configured one, it is behind this. Who comes late gets its own when it can receive.
            let is_own = || newer && entry.config.mac.is_some_and(|own| own.to_u64() == mac);
            if if is_static { is_own() } else { !self.inner.fdb.is_static(station) } {
                self.inner.fdb.set(station, entry.id, is_static, age);
            }
        }
    }

    /// Forgets stations behind ports that cannot receive. Another build may have had configured ones there; and nothing would
    /// forget what was restored there later.
    pub(crate) fn forget_absent_stations(&self) {
        let tables = lock(&self.inner.tables);
        let is_absent =
            |id: PortId| tables.view(id).is_none_or(|view| !view.link.receives() && view.link.hold.is_none());
        self.inner.fdb.retain(|entry| is_absent(entry.port));
    }

    fn port_stats(&self, name: &str) -> Option<Arc<PortStats>> {
        lock(&self.inner.tables).ports.get(name).map(|entry| entry.stats.clone())
    }

    /// Does something with the place of a port's driver. Drivers publish, which needs the tables, so what they do must
    /// not happen in here.
    fn exchange<T>(&self, name: &str, change: impl FnOnce(&mut Option<Driver>) -> T) -> T
    where
        T: Default,
    {
        let mut tables = lock(&self.inner.tables);
        tables.ports.get_mut(name).map(|entry| change(&mut entry.driver)).unwrap_or_default()
    }
}

/// The entries that are not among those given, but for their ages.
pub(crate) fn news(before: &[FdbRecord], now: Vec<FdbRecord>) -> Vec<FdbRecord> {
    let ageless = |entry: &FdbRecord| FdbRecord(entry.0, entry.1, entry.2, entry.3, 0, entry.5);
    let known: HashSet<_> = before.iter().map(ageless).collect();
    now.into_iter().filter(|entry| !known.contains(&ageless(entry))).collect()
}
