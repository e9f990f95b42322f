//! Two guests and the switch between them, all on the calling thread: from ring to ring with no cache line that crosses
//! between cores, so that what is left is our own work.

use std::io;
use std::sync::Arc;

use sluice::config::FdbConfig;
use sluice::frame::BurstStorage;
use sluice::port::stats::PortStats;
use sluice::port::vhost::queue::{QueueSetup, guest_rx, guest_tx};
use sluice::port::{Link, PortId, RxEntry, RxQueue};
use sluice::status::PortState;
use sluice::switch::fdb::Fdb;
use sluice::switch::forward::Forwarder;
use sluice::switch::snapshot::{PortView, Snapshot};
use sluice::switch::vlan::VlanPolicy;
use sluice::virtq::Vring;

use crate::driver::Driver;

const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;

/// A frame of `len` bytes from a station on one side (0 or 1) to the one of the same number on the other.
fn frame(from: u8, to: u8, station: u16, len: usize) -> Vec<u8> {
    let [high, low] = station.to_be_bytes();
    let mut bytes = vec![2, 0, 0, to, high, low, 2, 0, 0, from, high, low, 0x08, 0x00];
    bytes.resize(len, 0x55);
    bytes
}

struct Side {
    out: Driver,
    into: Driver,
    rx: Arc<dyn RxQueue>,
    view: Arc<PortView>,
}

/// How guests are.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// Buffers of a ring.
    pub ring: u16,
    /// Their dirty pages are logged.
    pub logged: bool,
    /// Buffers between two that follow each other in a ring.
    pub spread: u16,
    /// Stations on each side, that take turns frame by frame.
    pub stations: u16,
}

impl Default for How {
    fn default() -> Self {
        Self { ring: 1024, logged: false, spread: 1, stations: 1 }
    }
}

fn side(id: u8, len: usize, how: How) -> io::Result<Side> {
    let sent = |index: u16| frame(id, 1 - id, index % how.stations, len);
    let mut out = Driver::spread(how.ring, Some(&sent), how.spread)?;
    let mut into = Driver::spread(how.ring, None, how.spread)?;
    if how.logged {
        out.migrate();
        into.migrate();
    }
    let stats = Arc::new(PortStats::default());
    let setup = QueueSetup { pair: 0, features: VERSION_1 | MRG_RXBUF, kick: None, call: None, stats: stats.clone() };
    let ring = |driver: &Driver| Vring::new(&driver.config(), driver.memory(), 0).map_err(io::Error::other);
    let rx = guest_tx(setup.clone(), &ring(&out)?);
    let tx = guest_rx(setup, &ring(&into)?);
    let entry = RxEntry { pair: 0, queue: rx.clone() };
    let link = Link { rx: vec![entry], tx: vec![tx], ..Link::down(PortState::Up, None) };
    let view = PortView {
        id: PortId(u16::from(id)),
        network: 0,
        vlan: VlanPolicy::All,
        mtu: usize::MAX / 2,
        mac: None,
        only_source: None,
        policers: sluice::switch::policer::Policers::default(),
        stats: stats.clone(),
        link: Arc::new(link),
    };
    Ok(Side { out, into, rx, view: Arc::new(view) })
}

/// Two guests that send to each other.
pub struct Pair {
    sides: [Side; 2],
    snapshot: Snapshot,
    forwarder: Forwarder,
    storage: BurstStorage,
    /// Frames that each side sends at a time.
    frames: u16,
    learned: bool,
}

impl Pair {
    /// Guests with frames of `len` bytes.
    ///
    /// # Errors
    /// If memory cannot be had (there must be huge pages).
    pub fn new(len: usize, how: How) -> io::Result<Self> {
        let sides = [side(0, len, how)?, side(1, len, how)?];
        let ports = sides.iter().map(|side| Some(side.view.clone())).collect();
        let networks = vec![vec![PortId(0), PortId(1)]];
        let snapshot =
            Snapshot { epoch: 0, ports, networks, holding: Vec::new(), plans: Vec::new(), announcement: None };
        let forwarder = Forwarder::new(Arc::new(Fdb::new(FdbConfig::default())));
        let frames = (how.ring / 2).min(256);
        Ok(Self { sides, snapshot, forwarder, storage: BurstStorage::default(), frames, learned: false })
    }

    /// Lets both guests send their frames and make room for those of the other.
    pub fn post(&mut self) {
        for side in &mut self.sides {
            side.out.post(self.frames);
            side.into.post(self.frames);
        }
    }

    /// Switches all that was posted; gives how many frames it was.
    ///
    /// # Panics
    /// If a ring is faulty.
    pub fn switch(&mut self) -> u32 {
        let Self { sides, snapshot, forwarder, storage, .. } = self;
        let mut taken = 0;
        loop {
            let before = taken;
            for side in &*sides {
                let polled = side.rx.poll(storage, &mut |burst| forwarder.forward(snapshot, &side.view, burst));
                taken += polled.unwrap_or_else(|fault| panic!("{fault}")) as u32;
            }
            if taken == before {
                return taken;
            }
        }
    }

    /// Takes back what came back.
    ///
    /// # Panics
    /// If a frame is missing.
    pub fn reap(&mut self) {
        for side in &mut self.sides {
            assert_eq!(side.out.reap(), self.frames);
            // The very first frames are learning, and flood.
            let arrived = side.into.reap();
            assert!(!self.learned || arrived == self.frames, "{arrived} of {} arrived", self.frames);
        }
        self.learned = true;
    }
}
