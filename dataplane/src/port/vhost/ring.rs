//! One vring as the frontend describes it, from its first message to the queue that workers serve.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::limits::MAX_JOURNAL;
use crate::mem::GuestMemory;
use crate::port::stats::PortStats;
use crate::port::vhost::features;
use crate::port::vhost::queue::{QueueSetup, guest_rx, guest_tx};
use crate::port::{RxEntry, TxQueue};
use crate::virtq::chain::Direction;
use crate::virtq::journal::{self, Journal};
use crate::virtq::notify::EventFd;
use crate::virtq::{Fault, Journaled, RingConfig, RingError, Vring};

/// Where the parts of a ring lie, in the frontend's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    /// Guest physical address of the used ring, if writes to it are to be logged (`VHOST_VRING_F_LOG`).
    pub(super) log: Option<u64>,
}

/// What workers serve.
#[derive(Debug)]
pub(super) enum Queue {
    /// The guest sends, we receive.
    FromGuest(RxEntry),
    /// We send, the guest receives.
    ToGuest(Arc<dyn TxQueue>),
}

/// Where a ring is.
#[derive(Debug, Clone)]
pub enum Standing {
    /// Where this says, once workers have let go of it.
    Running(Vring),
    /// Here.
    Stopped(u32),
}

impl Standing {
    /// The next index, as `GET_VRING_BASE` gives it.
    pub fn base(&self) -> u32 {
        match self {
            Self::Running(vring) => vring.base(),
            Self::Stopped(base) => *base,
        }
    }
}

/// What a ring needs to know of its device to run.
pub(super) struct Surroundings<'a> {
    pub(super) features: u64,
    pub(super) memory: &'a Arc<GuestMemory>,
    /// Where positions are written down, and the port's name there.
    pub(super) journal: Option<(Arc<Journal>, String)>,
    pub(super) stats: &'a Arc<PortStats>,
}

/// One vring. It runs once it is started (by its kick message) and enabled.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Descriptors.
    pub(super) size: u32,
    /// Its addresses, if they were given since it was last stopped.
    pub(super) place: Option<Place>,
    /// Next index to process, while there is no `vring` to ask.
    pub(super) base: u32,
    /// How the guest wakes us.
    pub(super) kick: Option<Arc<EventFd>>,
    /// How we wake the guest.
    pub(super) call: Option<Arc<EventFd>>,
    /// How we tell the frontend of errors. Kept so that the frontend need not repeat it; not used, like elsewhere.
    pub(super) err: Option<EventFd>,
    /// By `SET_VRING_ENABLE`.
    pub(super) enabled: bool,
    /// By `SET_VRING_KICK`, until `GET_VRING_BASE`.
    pub(super) started: bool,
    /// Why it does not run although it was started.
    pub(super) problem: Option<String>,
    /// Its base is what we said ourselves, or what the frontend made it be: not what it remembers of a backend that it has
    /// lost.
    pub(super) known: bool,
    /// It was kept over a crash, in which its driver cannot have begun anew.
    pub(super) kept: bool,
    vring: Option<Vring>,
    queue: Option<Queue>,
}

impl Ring {
    /// Whether it should run. Without protocol features rings begin enabled (vhost-user, "Ring states").
    fn wanted(&self, features: u64) -> bool {
        self.started && (self.enabled || features & features::PROTOCOL_FEATURES == 0)
    }

    /// Whether it can pass frames, even if it is withdrawn at the moment.
    pub(super) fn runs(&self, features: u64) -> bool {
        self.wanted(features) && self.vring.is_some()
    }

    /// What workers serve, if it runs.
    pub(super) fn queue(&self) -> Option<&Queue> {
        self.queue.as_ref()
    }

    /// Notifies the guest, whatever it says: who worked the ring before us may have died between its last frames and telling
    /// the guest of them, or told somebody who has gone.
    pub(super) fn remind(&self, stats: &PortStats) {
        let Some(call) = &self.call else { return };
        // A frontend makes us wait for it once, and not for each of its rings.
        if stats.fault() != Some(Fault::NotifyBlocked) && !call.notify() {
            stats.set_fault(Fault::NotifyBlocked);
        }
    }

    /// Where it is.
    pub(super) fn standing(&self) -> Standing {
        self.vring.clone().map_or(Standing::Stopped(self.base), Standing::Running)
    }

    /// Takes the ring from the workers. They are through with it once a link without it has been published.
    pub(super) fn withdraw(&mut self) {
        self.queue = None;
    }

    /// Remembers where the ring stands and lets go of guest memory. Only after it has been withdrawn and published.
    pub(super) fn freeze(&mut self) {
        if let Some(vring) = self.vring.take() {
            self.base = vring.base();
        }
    }

    /// The ring in a new memory table. Only after it has been withdrawn and published.
    pub(super) fn move_to(&mut self, index: usize, memory: &Arc<GuestMemory>) {
        let Some(vring) = self.vring.take() else { return };
        self.base = vring.base();
        match vring.moved_to(memory.clone()) {
            Ok(moved) => self.vring = Some(moved),
            Err(error) => self.problem = Some(format!("ring {index}: {error}")),
        }
    }

    /// Forgets everything but size and base: what `GET_VRING_BASE` leaves. Addresses and descriptors of the old
    /// driver must not be used when the next one starts fewer rings.
    pub(super) fn stop(&mut self) {
        *self = Self { size: self.size, base: self.base, enabled: self.enabled, known: self.known, ..Self::default() };
    }

    /// Makes what is missing for the ring to run, or withdraws it if it should not.
    pub(super) fn settle(&mut self, index: usize, around: &Surroundings<'_>) {
        if !self.wanted(around.features) {
            self.withdraw();
            return;
        }
        if self.vring.is_none() {
            self.problem = self.open(index, around).err().map(|error| format!("ring {index}: {error}"));
        }
        if self.queue.is_none() {
            self.queue = self.vring.as_ref().map(|vring| self.serve(index, vring, around));
        }
    }

    fn open(&mut self, index: usize, around: &Surroundings<'_>) -> Result<(), String> {
        let place = self.place.ok_or("started without addresses")?;
        let config = RingConfig {
            size: self.size,
            desc: place.desc,
            avail: place.avail,
            used: place.used,
            event_idx: around.features & features::EVENT_IDX != 0,
            indirect: around.features & features::INDIRECT_DESC != 0,
            packed: around.features & features::RING_PACKED != 0,
            log: place.log,
        };
        let direction = if index.is_multiple_of(2) { Direction::ToGuest } else { Direction::FromGuest };
        // Of a split ring to which we send there is nothing to write down.
        let writes = config.packed || direction == Direction::FromGuest;
        let journal = around.journal.as_ref().filter(|_| writes).and_then(|(journal, port)| {
            let entry = journal.entry(port, index, identity(&config, around.memory)?);
            if entry.is_none() && journal.is_full() {
                tell_of_no_record(port, around.stats);
            }
            Some(Journaled { entry: entry?, direction, recover: !self.known, same: self.kept })
        });
        if self.kept && config.packed && journal.is_none() {
            return Err(RingError::Lost.to_string());
        }
        let vring = Vring::with_journal(&config, around.memory.clone(), self.base, journal);
        let vring = vring.map_err(|error| error.to_string())?;
        (self.known, self.kept) = (true, false);
        self.vring = Some(vring);
        self.remind(around.stats);
        Ok(())
    }

    fn serve(&self, index: usize, vring: &Vring, around: &Surroundings<'_>) -> Queue {
        let pair = index / 2;
        let setup = QueueSetup {
            pair,
            features: around.features,
            kick: self.kick.clone(),
            call: self.call.clone(),
            stats: around.stats.clone(),
        };
        // virtio 1.2, 5.1.2: receive queues are even, transmit queues odd, as the guest sees them.
        if index.is_multiple_of(2) {
            Queue::ToGuest(guest_rx(setup, vring))
        } else {
            Queue::FromGuest(RxEntry { pair, queue: guest_tx(setup, vring) })
        }
    }
}

/// Once for each port, however often its driver starts anew.
fn tell_of_no_record(port: &str, stats: &PortStats) {
    if !stats.told_of_no_record.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            port,
            "where some of its rings stand is not written down, for which there is room for {MAX_JOURNAL} rings: after a crash of \
             the switch their frames may come twice, and packed ones begin anew; VMs with fewer queues leave room"
        );
    }
}

/// Tells a ring from all others, so that no record is taken for that of another machine. `None` if its place is unknown.
fn identity(config: &RingConfig, memory: &GuestMemory) -> Option<u64> {
    let (device, inode) = memory.file_of_uva(config.desc)?;
    let numbers = [device, inode, config.desc, config.avail, config.used, config.size.into(), config.packed.into()];
    let bytes = numbers.map(u64::to_le_bytes);
    Some(journal::hash(bytes.iter().map(|bytes| &bytes[..])))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::{TestGuest, VERSION_1};

    #[test]
    fn a_port_whose_rings_have_no_record_says_so_once() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("rings")).unwrap();
        let mut others: Vec<_> = (0..MAX_JOURNAL - 1).map(|ring| journal.entry("others", ring, 1).unwrap()).collect();
        let guest = TestGuest::new(8, VERSION_1);
        let config = guest.config();
        let place = Place { desc: config.desc, avail: config.avail, used: config.used, log: None };
        let start = |port: &str, stats: &Arc<PortStats>| -> Vec<Ring> {
            let journal = Some((journal.clone(), port.to_owned()));
            let around = Surroundings { features: VERSION_1, memory: &guest.memory, journal, stats };
            let run = |index| {
                let mut ring = Ring { size: config.size, place: Some(place), started: true, ..Ring::default() };
                ring.settle(index, &around);
                assert!(ring.runs(VERSION_1), "{:?}", ring.problem);
                ring
            };
            (0..4).map(run).collect()
        };
        let log = Arc::new(tempfile::tempfile_in(dir.path()).unwrap());
        let read = || fs::read_to_string(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*log))).unwrap();
        let lines = || read().lines().filter(|line| line.contains("WARN")).count();
        let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let (a, b) = (Arc::default(), Arc::default());
            // One record is left for two rings from which we receive.
            (0..3).for_each(|_| drop(start("a", &a)));
            assert_eq!(lines(), 1, "{}", read());
            drop(start("b", &b));
            assert_eq!(lines(), 2, "{}", read());
            others.pop();
            drop(start("c", &Arc::default()));
            assert_eq!(lines(), 2, "{}", read());
        });
    }
}
