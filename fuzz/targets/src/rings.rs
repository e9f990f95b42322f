//! A ring whose driver does what it likes between two bursts, worked in the way of a worker.

use arbitrary::{Arbitrary, Unstructured};
use sluice::frame::{Burst, BurstStorage};
use sluice::limits::{BURST, MAX_FRAME, SNAPSHOT};
use sluice::mem::SourceSegment;
use sluice::port::stats::PortStats;
use sluice::port::vhost::features::{EVENT_IDX, GUEST_CSUM, GUEST_TSO4, INDIRECT_DESC, MRG_RXBUF, VERSION_1};
use sluice::port::vhost::queue::{QueueSetup, guest_rx, guest_tx};
use sluice::port::{RxQueue, TxQueue};
use sluice::switch::convert::{Accepts, Scratch};
use sluice::virtq::{RingConfig, Vring};
use std::cell::RefCell;
use std::sync::Arc;

use crate::guest::{Guest, SIZE, UVA};

const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x1800;
const DEVICE: u64 = 0x2000;
const TABLES: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;
/// More says nothing new.
const OPERATIONS: usize = 96;

#[derive(Debug, Arbitrary)]
struct Input {
    features: u8,
    size: u8,
    base: u16,
    logged: bool,
    to_guest: bool,
    operations: Vec<Operation>,
}

#[derive(Debug, Arbitrary)]
enum Operation {
    /// A descriptor of the ring.
    Desc(u8, Desc),
    /// A descriptor in a table.
    Entry(u8, Desc),
    /// A plain buffer, made available: what drivers do most.
    Plain(u8, u16),
    /// A chain made available by its head.
    Offer(u8),
    /// Anything anywhere.
    Half(u16, u16),
    /// Bytes into buffers.
    Bytes(u16, [u8; 32]),
    /// The available index.
    Index(u16),
    Poll,
    Send(u8, u16),
    Arm,
    Disarm,
    Restart,
    Move,
}

#[derive(Debug, Arbitrary)]
struct Desc {
    addr: Addr,
    len: Len,
    flags: u8,
    next: u16,
}

#[derive(Debug, Arbitrary)]
enum Addr {
    Buffer(u16),
    Table(u8),
    Edge(u8),
    Any(u64),
}

#[derive(Debug, Arbitrary)]
enum Len {
    Short(u8),
    Table(u8),
    Medium(u16),
    Any(u32),
}

impl Addr {
    fn value(&self) -> u64 {
        match *self {
            Self::Buffer(at) => BUFFERS + u64::from(at) % (SIZE - BUFFERS),
            Self::Table(index) => TABLES + 16 * u64::from(index),
            Self::Edge(back) => SIZE - u64::from(back),
            Self::Any(any) => any,
        }
    }
}

impl Len {
    fn value(&self) -> u32 {
        match *self {
            Self::Short(len) => len.into(),
            Self::Table(count) => 16 * u32::from(count),
            Self::Medium(len) => len.into(),
            Self::Any(any) => any,
        }
    }
}

/// The device's tools, made once.
struct Tools {
    guest: Guest,
    storage: BurstStorage,
    scratch: Scratch,
    /// The frames to be sent refer to these.
    bytes: Vec<u8>,
}

thread_local! {
    static TOOLS: RefCell<Tools> = RefCell::new(Tools {
        guest: Guest::new(),
        storage: BurstStorage::default(),
        scratch: Scratch::default(),
        bytes: (0..0x1_0000).map(|at| at as u8).collect(),
    });
}

pub(crate) fn split(data: &[u8]) {
    run(data, false);
}

pub(crate) fn packed(data: &[u8]) {
    run(data, true);
}

fn run(data: &[u8], packed: bool) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else { return };
    TOOLS.with_borrow_mut(|tools| {
        tools.guest.clear();
        let Some(mut device) = Device::new(tools, &input, packed) else { return };
        for operation in input.operations.iter().take(OPERATIONS) {
            device.step(tools, operation);
        }
    });
}

struct Device {
    config: RingConfig,
    features: u64,
    base: u32,
    logged: bool,
    vring: Vring,
    rx: Arc<dyn RxQueue>,
    tx: Option<Arc<dyn TxQueue>>,
    /// The driver's position: chains offered (split), or slots written (packed).
    offered: u16,
}

impl Device {
    fn new(tools: &Tools, input: &Input, packed: bool) -> Option<Self> {
        let bits = [EVENT_IDX, INDIRECT_DESC, MRG_RXBUF, GUEST_CSUM, GUEST_TSO4];
        let chosen = bits.into_iter().enumerate().filter(|(place, _)| input.features & (1 << place) != 0);
        let features = chosen.fold(VERSION_1, |sum, (_, bit)| sum | bit);
        let size = if packed { 1 + u32::from(input.size) % 64 } else { 1 << (input.size % 7) };
        let config = RingConfig {
            size,
            desc: UVA + DESC,
            avail: UVA + DRIVER,
            used: UVA + DEVICE,
            event_idx: features & EVENT_IDX != 0,
            indirect: features & INDIRECT_DESC != 0,
            packed,
            log: input.logged.then_some(DEVICE),
        };
        let base = if packed { 0x8000 | (u32::from(input.base) % size) } else { u32::from(input.base) };
        if !packed {
            for place in [DRIVER + 2, DEVICE + 2] {
                tools.guest.write(place, &input.base.to_le_bytes());
            }
        }
        let memory = if input.logged { &tools.guest.logged } else { &tools.guest.memory };
        let vring = Vring::new(&config, memory.clone(), base).ok()?;
        let (rx, tx) = queues(&vring, features, input.to_guest);
        let offered = if packed { (base & 0x7fff) as u16 } else { input.base };
        Some(Self { config, features, base, logged: input.logged, vring, rx, tx, offered })
    }

    fn step(&mut self, tools: &mut Tools, operation: &Operation) {
        let size = self.config.size as u16;
        match operation {
            Operation::Desc(at, desc) => self.write(tools, DESC + 16 * u64::from(u16::from(*at) % size), desc, None),
            Operation::Entry(at, desc) => self.write(tools, TABLES + 16 * u64::from(*at), desc, None),
            Operation::Plain(at, len) => {
                let slot = if self.config.packed { self.offered % size } else { u16::from(*at) % size };
                let desc = Desc {
                    addr: Addr::Buffer(u16::from(*at) * 64),
                    len: Len::Medium(len % 4096),
                    flags: if self.tx.is_some() { 2 } else { 0 },
                    next: 0,
                };
                self.write(tools, DESC + 16 * u64::from(slot), &desc, Some(()));
                self.offer(tools, slot);
            }
            Operation::Offer(head) => self.offer(tools, u16::from(*head)),
            Operation::Half(at, value) => tools.guest.write(u64::from(*at), &value.to_le_bytes()),
            Operation::Bytes(at, bytes) => tools.guest.write(BUFFERS + u64::from(at % 0xb000), bytes),
            Operation::Index(index) => tools.guest.write(DRIVER + 2, &index.to_le_bytes()),
            Operation::Poll => self.poll(tools),
            Operation::Send(count, len) => self.send(tools, *count, *len),
            Operation::Arm => drop(self.rx.arm()),
            Operation::Disarm => self.rx.disarm(),
            Operation::Restart => self.replace(Vring::new(&self.config, self.memory(tools), self.base).ok()),
            Operation::Move => self.replace(self.vring.moved_to(self.memory(tools)).ok()),
        }
    }

    fn memory(&self, tools: &Tools) -> Arc<sluice::mem::GuestMemory> {
        if self.logged { tools.guest.logged.clone() } else { tools.guest.memory.clone() }
    }

    fn replace(&mut self, vring: Option<Vring>) {
        if let Some(vring) = vring {
            (self.rx, self.tx) = queues(&vring, self.features, self.tx.is_some());
            self.vring = vring;
        }
    }

    /// Writes a descriptor. In a packed ring, `available` marks it so for the present round.
    fn write(&self, tools: &Tools, at: u64, desc: &Desc, available: Option<()>) {
        let mut flags = u16::from(desc.flags & 7);
        if desc.flags & 0xf8 == 0xf8 {
            flags = 0xffff;
        }
        if available.is_some() && self.config.packed {
            flags |= if (self.offered / self.config.size as u16).is_multiple_of(2) { 1 << 7 } else { 1 << 15 };
        }
        let halves = if self.config.packed { [desc.next, flags] } else { [flags, desc.next] };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.value().to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.value().to_le_bytes());
        bytes[12..14].copy_from_slice(&halves[0].to_le_bytes());
        bytes[14..].copy_from_slice(&halves[1].to_le_bytes());
        tools.guest.write(at, &bytes);
    }

    fn offer(&mut self, tools: &Tools, head: u16) {
        let size = self.config.size as u16;
        if !self.config.packed {
            tools.guest.write(DRIVER + 4 + 2 * u64::from(self.offered % size), &head.to_le_bytes());
        }
        self.offered = self.offered.wrapping_add(1);
        if !self.config.packed {
            tools.guest.write(DRIVER + 2, &self.offered.to_le_bytes());
        }
    }

    /// Takes a burst. Of the guest's memory nothing may change but what belongs to the device.
    fn poll(&self, tools: &mut Tools) {
        if self.tx.is_some() {
            return;
        }
        let before = tools.guest.read();
        let scratch = &mut tools.scratch;
        let mut frames = 0;
        let outcome = self.rx.poll(&mut tools.storage, &mut |burst| frames = check(burst, scratch));
        assert!(frames <= BURST && outcome.is_ok_and(|taken| taken >= frames) | outcome.is_err());
        let after = tools.guest.read();
        let size = u64::from(self.config.size);
        let ours = match self.config.packed {
            true => [DESC..DESC + 16 * size, DEVICE..DEVICE + 4],
            false => [DEVICE..DEVICE + 6 + 8 * size, 0..0],
        };
        for (at, (old, new)) in (0u64..).zip(before.iter().zip(&after)) {
            assert!(old == new || ours.iter().any(|range| range.contains(&at)), "wrote to {at:#x}");
        }
    }

    fn send(&self, tools: &mut Tools, count: u8, len: u16) {
        let Some(tx) = &self.tx else { return };
        let mut burst = tools.storage.begin();
        let len = usize::from(len).max(14);
        for _ in 0..usize::from(count) % (BURST + 1) {
            let mut frame = burst.start(12);
            let pushed = frame.push(SourceSegment::from_slice(&[0; 12]))
                && frame.push(SourceSegment::from_slice(&tools.bytes[..len / 2]))
                && frame.push(SourceSegment::from_slice(&tools.bytes[len / 2..len]));
            assert!(pushed && frame.finish().is_ok());
        }
        let places: Vec<u8> = (0..burst.count() as u8).collect();
        // A fault is for the port to be stopped by.
        let _ = tx.send(&burst, &places, &mut tools.scratch);
    }
}

fn queues(vring: &Vring, features: u64, to_guest: bool) -> (Arc<dyn RxQueue>, Option<Arc<dyn TxQueue>>) {
    let setup = QueueSetup { pair: 0, features, kick: None, call: None, stats: Arc::new(PortStats::default()) };
    (guest_tx(setup.clone(), vring), to_guest.then(|| guest_rx(setup, vring)))
}

/// What the switch relies on of a frame, and what it does for a receiver that takes no offloads.
fn check(burst: &mut Burst<'_>, scratch: &mut Scratch) -> usize {
    for place in 0..burst.count() as u8 {
        let frame = burst.frame(place);
        let head = frame.head().len();
        assert!((14..=SNAPSHOT).contains(&head) && frame.len() <= MAX_FRAME);
        assert_eq!(frame.len(), head + burst.tail(frame).iter().map(|piece| piece.len()).sum::<usize>());
        let accepts = Accepts::default();
        if !accepts.takes(frame.offload()) {
            scratch.rebuilt.convert(burst, frame, accepts, |_, head, payload| head.len() + payload.len() <= MAX_FRAME);
        }
        for tagged in [true, false, true] {
            burst.frame_mut(place).set_tagged(tagged);
        }
    }
    burst.count()
}
