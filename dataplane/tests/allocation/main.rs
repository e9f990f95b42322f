//! Workers allocate nothing once they run, and free nothing: not for frames of any kind, nor while ports come and go.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod heap;

use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::hostile::frontend::{
    CSUM, EVENT_IDX, Frontend, GUEST_CSUM, HEADER, HOST_TSO4, LOG_ALL, MRG_RXBUF, SPARE, Setup,
};
use e2e::hostile::message::{Message, SET_FEATURES};
use e2e::hostile::queue::{Desc, Layout};
use heap::watched;
use sluice::capture::CaptureOptions;
use sluice::config::SwitchConfig;
use sluice::switch::Switch;

/// Room for each frame that is sent.
const PLACE: u64 = 0x2_0000;
const PATIENCE: Duration = Duration::from_secs(20);
const GUEST_TSO4: u64 = 1 << 7;
const ALL: u64 = CSUM | GUEST_CSUM | HOST_TSO4 | GUEST_TSO4 | MRG_RXBUF | EVENT_IDX;

/// Stations: one with all offloads, one with none, one with all of them behind an access port.
const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const MACS: [u64; 3] = [0x0200_0000_000a, 0x0200_0000_000b, 0x0200_0000_000c];
const EVERYBODY: u64 = 0xffff_ffff_ffff;
const NOBODY: u64 = 0x0200_0000_00ee;
const RESERVED: u64 = 0x0180_c200_0000;

/// What has to have happened to frames, for the test to mean something.
const DROPS: [&str; 9] =
    ["runt", "bad_offload", "rate_rx", "vlan_denied", "spoofed", "reserved", "mtu_ingress", "same_port", "mtu_egress"];

/// Ethernet with an optional VLAN tag.
fn ethernet(to: u64, from: u64, vlan: Option<u16>, kind: u16) -> Vec<u8> {
    let mut bytes = [&to.to_be_bytes()[2..], &from.to_be_bytes()[2..]].concat();
    if let Some(vlan) = vlan {
        bytes.extend([[0x81, 0x00], vlan.to_be_bytes()].concat());
    }
    bytes.extend(kind.to_be_bytes());
    bytes
}

/// A frame of so many bytes of an experimental type, with an empty virtio-net header.
fn plain(to: u64, from: u64, vlan: Option<u16>, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend(ethernet(to, from, vlan, 0x88b5));
    bytes.resize(HEADER + len, 0x55);
    bytes
}

/// TCP over IPv4 with so many bytes of data, whose checksum is to be completed; a super-packet if there is a `gso_size`.
fn tcp(to: u64, from: u64, vlan: Option<u16>, data: u16, gso_size: u16) -> Vec<u8> {
    let frame = ethernet(to, from, vlan, 0x0800);
    let (ip, start) = (frame.len(), frame.len() as u16 + 20);
    let mut bytes = vec![1, u8::from(gso_size > 0)];
    for half in [start + 20, gso_size, start, 16, 0] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(frame);
    bytes.extend([0x45, 0]);
    bytes.extend((40 + data).to_be_bytes());
    bytes.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.resize(HEADER + ip + 40 + usize::from(data), 0x77);
    bytes
}

/// What is sent, and by whom.
fn frames() -> Vec<(usize, Vec<u8>)> {
    let [a, b, c] = MACS;
    vec![
        (A, plain(b, a, None, 60)),
        (B, plain(a, b, None, 1514)),
        (A, plain(EVERYBODY, a, None, 100)),
        (B, plain(EVERYBODY, b, Some(10), 100)),
        (A, plain(NOBODY, a, None, 100)),
        (A, plain(c, a, Some(10), 700)),
        (C, plain(a, c, None, 700)),
        (A, plain(EVERYBODY, a, Some(30), 100)),
        (A, tcp(b, a, None, 1000, 0)),
        (A, tcp(b, a, None, 20_000, 1448)),
        (A, tcp(c, a, Some(10), 60_000, 1448)),
        (C, tcp(a, c, None, 60_000, 1448)),
        (A, tcp(EVERYBODY, a, None, 8000, 1448)),
        (A, tcp(EVERYBODY, a, Some(10), 8000, 1448)),
        // Those that are dropped.
        (A, plain(b, a, None, 5)),
        (A, tcp(b, a, None, 10, 0)[..HEADER + 40].to_vec()),
        (C, plain(a, c, Some(20), 100)),
        (B, plain(a, NOBODY, None, 100)),
        (A, plain(RESERVED, a, None, 100)),
        (B, plain(a, b, None, 1600)),
        (A, plain(a, a, None, 100)),
        (A, plain(b, a, None, 1600)),
        (A, plain(EVERYBODY, a, None, 4000)),
    ]
}

/// A switch with two workers between three stations.
struct Bench {
    dir: tempfile::TempDir,
    switch: Arc<Switch>,
    stations: Vec<Frontend>,
    /// Who sends, where the frame lies, and its length.
    frames: Vec<(usize, u64, u32)>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let switch = Switch::start(&SwitchConfig { workers: vec![None, None], ..SwitchConfig::default() }).unwrap();
        let none = Setup::of(Layout::Packed).with(CSUM);
        let all = Setup::of(Layout::Split).with(ALL);
        let settings = [
            ("a", "", all),
            ("b", ",mtu=1500,mac=02:00:00:00:00:0b,spoofcheck=on", none),
            ("c", ",vlan=10,rate-rx=100M", all),
        ];
        let mut bench = Self { dir, switch, stations: Vec::new(), frames: Vec::new() };
        for ((name, settings, setup), mac) in settings.into_iter().zip(MACS) {
            bench.stations.push(bench.join(name, settings, mac, setup));
        }
        for ((from, bytes), place) in frames().into_iter().zip(0..) {
            let at = SPARE + place * PLACE;
            bench.stations[from].memory.write(at, &bytes);
            bench.frames.push((from, at, bytes.len() as u32));
        }
        bench
    }

    /// Adds a port, and a station behind it.
    fn join(&self, name: &str, settings: &str, mac: u64, setup: Setup) -> Frontend {
        let path = self.dir.path().join(name);
        self.switch.add_port(format!("{name}=vhost-user:{}{settings}", path.display()).parse().unwrap()).unwrap();
        Frontend::start(&path, mac, setup).unwrap()
    }

    /// Every kind of frame once, if the ring has room, and all that has come.
    fn round(&mut self) {
        for &(from, at, len) in &self.frames {
            let sender = &mut self.stations[from];
            while sender.tx.reap().is_some() {}
            if sender.tx.free_slot().is_some() {
                sender.tx.post_chain(&[Desc::new(at, len, 0)]);
            }
        }
        for station in &mut self.stations {
            station.tx.notify();
            receive(station);
        }
    }

    /// Lets frames flow until something is so, or tells what is missing.
    fn until(&mut self, done: impl Fn(&Switch) -> Result<(), String>) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.round();
            match done(&self.switch) {
                Ok(()) => return,
                Err(missing) => assert!(Instant::now() < end, "{missing} after {PATIENCE:?}"),
            }
        }
    }

    /// Lets frames flow until all kinds of things have happened to them, and workers have slept a few times.
    fn run(&mut self) {
        let (totals, slept) = (self.switch.totals(), sleeps(&self.switch));
        (0..100).for_each(|_| self.round());
        self.until(|switch| {
            let now = switch.totals();
            let missing = DROPS.into_iter().find(|reason| now.drops.get(*reason) <= totals.drops.get(*reason));
            ensure(missing.is_none(), &format!("no {missing:?}"))?;
            ensure(now.made_frames > totals.made_frames + 100, "no segments")?;
            ensure(sleeps(switch) > slept + 5, "no sleep")
        });
    }

    /// A guest is away and comes back, as in a migration that fails. What comes for it meanwhile is held.
    fn be_away(&mut self) {
        let station = &mut self.stations[C];
        let features = 1 << 32 | 1 << 30 | station.setup.features;
        station.channel.send(&Message::number(SET_FEATURES, features | LOG_ALL));
        station.stop_queues().unwrap();
        self.until(|switch| ensure(switch.totals().held_frames > 0, "nothing is held"));
        let station = &mut self.stations[C];
        station.rx.reset();
        station.tx.reset();
        station.start_queues();
        station.settle().unwrap();
        self.until(|switch| ensure(switch.totals().held_frames == 0, "something is held still"));
        self.stations[C].channel.send(&Message::number(SET_FEATURES, features));
        self.stations[C].settle().unwrap();
    }
}

fn ensure(is_so: bool, otherwise: &str) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(otherwise.to_owned()) }
}

fn sleeps(switch: &Switch) -> u64 {
    switch.workers().iter().map(|worker| worker.sleeps).sum()
}

fn receive(station: &mut Frontend) {
    while station.receive().is_some() {}
    station.rx.notify();
}

/// One test: what the allocator notices is one for the whole process.
#[test]
fn workers_allocate_and_free_nothing() {
    let mut bench = Bench::new();
    bench.run();
    assert_eq!(watched(|| bench.run()), 0, "calls while frames of every kind flow");
    assert_eq!(watched(|| changes(&mut bench)), 0, "calls while ports come and go");
    bench.switch.stop();
}

/// Frames flow while everything changes that can.
fn changes(bench: &mut Bench) {
    for turn in 0..8 {
        let layout = if turn % 2 == 0 { Layout::Split } else { Layout::Packed };
        let mut guest = bench.join("x", "", NOBODY, Setup::of(layout));
        let mut capture = bench.switch.capture("a", CaptureOptions::default()).unwrap();
        for worker in 0..2 {
            bench.switch.pin(&format!("a={worker}").parse().unwrap()).unwrap();
            (0..20).for_each(|_| bench.round());
            receive(&mut guest);
        }
        assert!(!capture.drain().is_empty());
        drop(capture);
        bench.stations[A].share_memory();
        bench.round();
        bench.stations[A].settle().unwrap();
        bench.be_away();
        guest.reconnect(Setup::of(layout)).unwrap();
        bench.round();
        bench.switch.flush_fdb(None);
        // It hangs up before its port goes, or after.
        let guest = Some(guest).filter(|_| turn % 4 < 2);
        bench.round();
        bench.switch.remove_port("x").unwrap();
        drop(guest);
    }
}
