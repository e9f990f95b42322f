//! A frontend with one queue pair, its guest included.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::hostile::channel::{Channel, Listener};
use crate::hostile::memory::{Memory, UVA};
use crate::hostile::message::*;
use crate::hostile::queue::{BUFFER, Layout, Places, Queue};
use crate::hostile::{eventfd, queue};
use crate::wait;

/// virtio features (virtio 1.2, 5.1.3 and 6).
pub const CSUM: u64 = 1 << 0;
/// The driver takes partial checksums.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The driver sends TCP super-packets over IPv4.
pub const HOST_TSO4: u64 = 1 << 11;
/// The driver sends TCP super-packets over IPv6.
pub const HOST_TSO6: u64 = 1 << 12;
/// Frames may fill several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// Pages that are written to are logged.
pub const LOG_ALL: u64 = 1 << 26;
/// Tables of descriptors.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Notifications by index.
pub const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;

/// Bytes of a virtio-net header.
pub const HEADER: usize = 12;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// An EtherType for experiments (IEEE 802).
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Memory of a guest. Sparse: what is never touched is never there.
const MEMORY: u64 = 256 << 20;
const RX_RING: u64 = 0x10_0000;
const TX_RING: u64 = RX_RING + Places::STRIDE;
const RX_BUFFERS: u64 = 32 << 20;
const TX_BUFFERS: u64 = 128 << 20;
/// From here on nothing lies in a guest's memory that the driver uses by itself.
pub const SPARE: u64 = 224 << 20;
/// Frames come long before that.
pub const ARRIVAL: Duration = Duration::from_secs(5);

/// What a guest's driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Shape of its queues.
    pub layout: Layout,
    /// virtio features, besides those that every driver of ours has.
    pub features: u64,
    /// Descriptors of each queue.
    pub size: u16,
}

impl Setup {
    /// The usual queues in that layout, with no further features.
    pub const fn of(layout: Layout) -> Self {
        Self { layout, features: 0, size: 256 }
    }

    /// With these features, too.
    pub const fn with(self, features: u64) -> Self {
        Self { features: self.features | features, ..self }
    }

    /// With queues of that size.
    pub const fn sized(self, size: u16) -> Self {
        Self { size, ..self }
    }

    fn accepted(&self) -> u64 {
        let packed = if self.layout == Layout::Packed { RING_PACKED } else { 0 };
        self.features | packed | PROTOCOL_FEATURES | VERSION_1
    }
}

/// A frontend and its guest.
#[derive(Debug)]
pub struct Frontend {
    /// `None` if it is the switch that listens.
    listener: Option<Listener>,
    /// The connection, once there is one.
    pub channel: Channel,
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// What the driver asked for.
    pub setup: Setup,
    /// Its station.
    pub mac: u64,
    /// Queue 0: to the guest.
    pub rx: Queue,
    /// Queue 1: from the guest.
    pub tx: Queue,
    call: File,
    /// Memory table that the rings are used with.
    pub regions: Vec<Region>,
}

impl Frontend {
    /// Listens on `path`, waits for the switch, and starts its queues.
    pub fn start(path: &Path, mac: u64, setup: Setup) -> Result<Self> {
        let listener = Listener::bind(path)?;
        let channel = listener.accept()?;
        Self::over(Some(listener), channel, mac, setup)
    }

    /// As [`Frontend::start`], over a connection that is there already.
    pub fn over(listener: Option<Listener>, channel: Channel, mac: u64, setup: Setup) -> Result<Self> {
        let memory = Arc::new(Memory::new(MEMORY)?);
        let [rx, tx] = queues(&memory, setup)?;
        let call = eventfd()?;
        let regions = vec![[0, MEMORY, UVA, 0]];
        let mut frontend = Self { listener, channel, memory, setup, mac, rx, tx, call, regions };
        frontend.bring_up()?;
        Ok(frontend)
    }

    /// Goes on with a switch that has gone and come back, rings as they are: with the connection, if it was kept, or a new
    /// one.
    pub fn resume(&mut self) -> Result<()> {
        if !self.channel.is_closed() {
            return self.settle();
        }
        self.channel = self.accept()?;
        self.bring_up()
    }

    /// Hangs up, and waits until the switch connects again: it is through with the rings then. Nobody answers it yet.
    pub fn hang_up(&mut self) -> Result<()> {
        // Gone before the next one is accepted, or the switch would serve the old one still.
        self.channel = Channel::new(std::os::unix::net::UnixStream::pair()?.0)?;
        self.channel = self.accept()?;
        Ok(())
    }

    /// Serves the connection of [`Frontend::hang_up`] with a new guest.
    pub fn renew(&mut self, setup: Setup) -> Result<()> {
        self.memory = Arc::new(Memory::new(MEMORY)?);
        self.regions = vec![[0, MEMORY, UVA, 0]];
        self.setup = setup;
        [self.rx, self.tx] = queues(&self.memory, setup)?;
        self.bring_up()
    }

    /// Gives up the connection and the guest, and comes back with new ones.
    pub fn reconnect(&mut self, setup: Setup) -> Result<()> {
        self.hang_up()?;
        self.renew(setup)
    }

    /// The switch's next connection, whether it is to be served or not.
    pub fn accept(&self) -> Result<Channel> {
        self.listener.as_ref().context("this frontend does not listen")?.accept()
    }

    /// Everything up to running queues, as QEMU does it.
    fn bring_up(&mut self) -> Result<()> {
        self.negotiate()?;
        self.share_memory();
        self.start_queues();
        self.settle()
    }

    /// Features, owner, protocol features.
    pub fn negotiate(&mut self) -> Result<()> {
        let wanted = self.setup.accepted();
        let offered = self.channel.ask_number(&Message::new(GET_FEATURES, vec![]))?;
        ensure!(offered & wanted == wanted, "the switch offers {offered:#x}, not {wanted:#x}");
        let protocol = self.channel.ask_number(&Message::new(GET_PROTOCOL_FEATURES, vec![]))?;
        self.channel.send(&Message::number(SET_PROTOCOL_FEATURES, protocol));
        self.channel.send(&Message::new(SET_OWNER, vec![]));
        self.channel.send(&Message::number(SET_FEATURES, wanted));
        Ok(())
    }

    /// The memory table.
    pub fn share_memory(&self) {
        let fds = vec![self.memory.fd(); self.regions.len()];
        self.channel.send(&memory_table(&self.regions).with(&fds));
    }

    /// Both queues, from their beginning.
    pub fn start_queues(&self) {
        for (index, queue) in [(0, &self.rx), (1, &self.tx)] {
            for message in self.ring_messages(index, queue) {
                self.channel.send(&message);
            }
        }
    }

    /// All that it takes to start a ring.
    pub fn ring_messages(&self, index: u32, queue: &Queue) -> Vec<Message> {
        vec![
            Message::ring(SET_VRING_ENABLE, index, 1),
            Message::ring(SET_VRING_NUM, index, queue.size.into()),
            Message::ring(SET_VRING_BASE, index, queue.base()),
            ring_address(index, queue.places),
            Message::number(SET_VRING_KICK, index.into()).with(&[queue.kick.as_raw_fd()]),
            Message::number(SET_VRING_CALL, index.into()).with(&[self.call.as_raw_fd()]),
        ]
    }

    /// Waits until the switch has handled everything sent so far.
    pub fn settle(&mut self) -> Result<()> {
        self.channel.ask_number(&Message::new(GET_FEATURES, vec![])).map(drop)
    }

    /// Stops both queues; the switch leaves their memory alone afterwards.
    pub fn stop_queues(&mut self) -> Result<()> {
        for index in [0, 1] {
            self.channel.ask(&Message::ring(GET_VRING_BASE, index, 0))?;
        }
        Ok(())
    }

    /// What a guest does that reboots: the driver resets the device and starts anew.
    pub fn reset(&mut self) -> Result<()> {
        self.stop_queues()?;
        self.rx.reset();
        self.tx.reset();
        self.start_queues();
        self.settle()
    }

    /// Sends a frame to a station, with a header of zeroes. `false` if the ring is full.
    pub fn send(&mut self, to: u64, payload: &[u8]) -> bool {
        let mut bytes = vec![0; HEADER];
        bytes.extend(ethernet(to, self.mac));
        bytes.extend(payload);
        self.send_bytes(&bytes)
    }

    /// Sends a header and a frame as they are, in one buffer. `false` if the ring is full.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> bool {
        while self.tx.reap().is_some() {}
        let Some(slot) = self.tx.free_slot() else { return false };
        self.memory.write(self.tx.buffer(slot), bytes);
        self.tx.post(bytes.len() as u32);
        true
    }

    /// The next frame received: where it came from, and what follows its Ethernet header; nothing if it is not of our
    /// own EtherType.
    pub fn receive(&mut self) -> Option<(u64, Vec<u8>)> {
        let (slot, len) = self.rx.reap()?;
        let from = self.rx.buffer(slot % self.rx.size);
        let frame = self.memory.read(from, (len as usize).min(BUFFER as usize));
        self.rx.post(BUFFER as u32);
        let source = frame
            .get(HEADER + 6..HEADER + 12)
            .unwrap_or_default()
            .iter()
            .fold(0, |mac, &byte| mac << 8 | u64::from(byte));
        let payload =
            frame.get(HEADER + ETHERNET..).filter(|_| frame.get(HEADER + 12..HEADER + ETHERNET) == Some(&ETHERTYPE));
        Some((source, payload.unwrap_or_default().to_vec()))
    }

    /// Takes what has come, up to a frame with that payload. Whether there was one.
    pub fn takes(&mut self, payload: &[u8]) -> bool {
        std::iter::from_fn(|| self.receive()).any(|(_, found)| found == payload)
    }

    /// Waits for a frame with that payload, passing over all others.
    pub fn wait_frame(&mut self, payload: &[u8]) -> Result<()> {
        wait::until_true("a frame", ARRIVAL, || Ok(self.takes(payload)))
            .with_context(|| format!("station {:012x}", self.mac))
    }
}

fn queues(memory: &Arc<Memory>, setup: Setup) -> Result<[Queue; 2]> {
    let queue = |base, buffers, writable| {
        let mut queue = Queue::new(memory.clone(), setup.layout, base, setup.size, buffers, writable)?;
        queue.event_idx = setup.features & EVENT_IDX != 0;
        Ok::<_, anyhow::Error>(queue)
    };
    Ok([queue(RX_RING, RX_BUFFERS, true)?, queue(TX_RING, TX_BUFFERS, false)?])
}

/// Where a ring is.
pub fn ring_address(index: u32, places: queue::Places) -> Message {
    let mut payload = words(&[index, 0]);
    payload.extend(numbers(&[UVA + places.desc, UVA + places.device, UVA + places.driver, 0]));
    Message::new(SET_VRING_ADDR, payload)
}

/// An Ethernet header.
pub fn ethernet(to: u64, from: u64) -> Vec<u8> {
    let mut bytes = to.to_be_bytes()[2..].to_vec();
    bytes.extend(&from.to_be_bytes()[2..]);
    bytes.extend(ETHERTYPE);
    bytes
}
