//! A guest's driver, as small as it can be: the other side of our rings in unit tests.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;

use crate::mem::tests::memfd;
use crate::mem::{GuestMemory, Log, Region};
use crate::port::stats::PortStats;
use crate::port::vhost::queue::QueueSetup;
use crate::port::{Link, Publisher};
use crate::status::PortState;
use crate::virtq::{RingConfig, Vring};

/// Bytes of memory of a test guest.
pub(crate) const MEMORY: u64 = 8 << 20;
/// Where buffers begin; rings are below.
const BUFFERS: u64 = 1 << 20;
/// Frontend addresses differ from guest addresses, as they do in QEMU.
const UVA: u64 = 0x7f00_0000_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// virtio features of the usual test guest: VERSION_1 and nothing else.
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;

/// A descriptor as the driver writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One guest with one ring.
#[derive(Debug)]
pub(crate) struct TestGuest {
    file: std::fs::File,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) size: u16,
    pub(crate) features: u64,
    avail: u16,
    used: u16,
    next_buffer: u64,
    /// Chains made available and not yet returned: head, buffers.
    posted: VecDeque<(u16, Vec<(u64, u32)>)>,
    free: VecDeque<u16>,
    /// The dirty log, if there is one.
    log: Option<std::fs::File>,
}

impl TestGuest {
    pub(crate) fn new(size: u16, features: u64) -> Self {
        let file = memfd(MEMORY);
        let region = Region::map(file.try_clone().unwrap(), 0, MEMORY, UVA, 0).unwrap();
        Self {
            file,
            memory: Arc::new(GuestMemory::new(vec![region]).unwrap()),
            size,
            features,
            avail: 0,
            used: 0,
            next_buffer: BUFFERS,
            posted: VecDeque::new(),
            free: (0..size).collect(),
            log: None,
        }
    }

    /// The same guest while it migrates.
    pub(crate) fn logged(self) -> Self {
        let log = memfd(MEMORY / 4096 / 8);
        let map = Log::map(log.try_clone().unwrap(), MEMORY / 4096 / 8, 0).unwrap();
        let memory = Arc::new(self.memory.logged_by(Some(Arc::new(map))).unwrap());
        Self { memory, log: Some(log), ..self }
    }

    /// Pages that were marked since this was last asked.
    pub(crate) fn dirty(&self) -> Vec<u64> {
        let log = self.log.as_ref().expect("a dirty log");
        let mut bits = vec![0; (MEMORY / 4096 / 8) as usize];
        log.read_exact_at(&mut bits, 0).unwrap();
        log.write_all_at(&vec![0; bits.len()], 0).unwrap();
        (0..MEMORY / 4096).filter(|page| bits[(page / 8) as usize] & (1 << (page % 8)) != 0).collect()
    }

    pub(crate) fn file(&self) -> std::fs::File {
        self.file.try_clone().unwrap()
    }

    fn desc_at(&self) -> u64 {
        0x1000
    }
    fn avail_at(&self) -> u64 {
        0x1000 + 16 * u64::from(self.size)
    }
    pub(crate) fn used_at(&self) -> u64 {
        (self.avail_at() + 6 + 2 * u64::from(self.size)).next_multiple_of(64)
    }

    pub(crate) fn config(&self) -> RingConfig {
        RingConfig {
            size: self.size.into(),
            desc: UVA + self.desc_at(),
            avail: UVA + self.avail_at(),
            used: UVA + self.used_at(),
            event_idx: self.features & EVENT_IDX != 0,
            indirect: self.features & INDIRECT_DESC != 0,
            packed: false,
            log: self.log.as_ref().map(|_| self.used_at()),
        }
    }

    pub(crate) fn setup(&self) -> QueueSetup {
        QueueSetup { pair: 0, features: self.features, kick: None, call: None, stats: Arc::new(PortStats::default()) }
    }

    pub(crate) fn ring(&self) -> Vring {
        Vring::new(&self.config(), self.memory.clone(), 0).unwrap()
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn read_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    pub(crate) fn set_desc(&self, index: u16, desc: Desc) {
        self.write(self.desc_at() + 16 * u64::from(index), &desc.bytes());
    }

    /// Makes a chain available by its head, whatever it is.
    pub(crate) fn make_available(&mut self, head: u16) {
        self.write(self.avail_at() + 4 + 2 * u64::from(self.avail % self.size), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    pub(crate) fn set_avail_index(&self, index: u16) {
        self.write(self.avail_at() + 2, &index.to_le_bytes());
    }

    /// Chains made available and not seen to return.
    pub(crate) fn outstanding(&self) -> usize {
        self.posted.len()
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.read_u16(self.used_at() + 2)
    }

    pub(crate) fn set_used_index(&mut self, index: u16) {
        self.write(self.used_at() + 2, &index.to_le_bytes());
        (self.avail, self.used) = (index, index);
        self.set_avail_index(index);
    }

    /// Number of buffers' bytes that `count` more would take, wrapping around in the buffer area.
    fn buffer(&mut self, len: u32) -> u64 {
        if self.next_buffer + u64::from(len) > MEMORY {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(64);
        at
    }

    /// Posts one chain of buffers of these lengths.
    pub(crate) fn post(&mut self, lengths: &[u32], flags: u16) -> Vec<(u64, u32)> {
        let buffers: Vec<_> = lengths.iter().map(|&len| (self.buffer(len), len)).collect();
        let descs: Vec<u16> = lengths.iter().map(|_| self.free.pop_front().expect("room in the ring")).collect();
        for (place, &(addr, len)) in buffers.iter().enumerate() {
            let next = descs.get(place + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.set_desc(descs[place], Desc { addr, len, flags, next: next.unwrap_or(0) });
        }
        self.posted.push_back((descs[0], buffers.clone()));
        self.make_available(descs[0]);
        // Returned in order by the device; give the descriptors back then.
        self.free.extend(descs);
        buffers
    }

    /// Sends bytes (header and frame) over buffers of these lengths, the last one taking the rest.
    pub(crate) fn send(&mut self, bytes: &[u8], split: &[u32]) {
        let mut lengths: Vec<u32> = Vec::new();
        let mut left = bytes.len() as u32;
        for &len in split {
            lengths.push(len.min(left));
            left -= len.min(left);
        }
        lengths.push(left);
        lengths.retain(|len| *len > 0);
        let mut at = 0;
        for (addr, len) in self.post(&lengths, 0) {
            self.write(addr, &bytes[at..at + len as usize]);
            at += len as usize;
        }
    }

    /// Chains that came back, with what was written to each.
    pub(crate) fn returned(&mut self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while self.used != self.used_index() {
            let element = self.read(self.used_at() + 4 + 8 * u64::from(self.used % self.size), 8);
            let head = u32::from_le_bytes(element[..4].try_into().unwrap());
            let mut len = u32::from_le_bytes(element[4..].try_into().unwrap()) as usize;
            let (posted, buffers) = self.posted.pop_front().expect("only what was posted comes back");
            assert_eq!(head, u32::from(posted), "chains come back in order");
            let mut bytes = Vec::new();
            for (addr, size) in buffers {
                let part = len.min(size as usize);
                bytes.extend(self.read(addr, part));
                len -= part;
            }
            assert_eq!(len, 0, "no more is written than there is room");
            all.push(bytes);
            self.used = self.used.wrapping_add(1);
        }
        all
    }

    /// Frames received into mergeable or single buffers: header and frame.
    pub(crate) fn received(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let header_len = if self.features & (VERSION_1 | MRG_RXBUF) != 0 { 12 } else { 10 };
        let mut chains = self.returned().into_iter();
        let mut frames = Vec::new();
        while let Some(mut first) = chains.next() {
            let rest = first.split_off(header_len);
            let count = if header_len == 12 { u16::from_le_bytes([first[10], first[11]]) } else { 1 };
            let more: Vec<u8> = chains.by_ref().take(usize::from(count).saturating_sub(1)).flatten().collect();
            frames.push((first, [rest, more].concat()));
        }
        frames
    }
}

/// A header of zeroes and an Ethernet frame.
pub(crate) fn frame(dst: u64, src: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; 12];
    bytes.extend(&dst.to_be_bytes()[2..]);
    bytes.extend(&src.to_be_bytes()[2..]);
    bytes.extend([0x88, 0xb5]);
    bytes.extend((14..len).map(|at| (at * 7 + len) as u8));
    bytes.truncate(12 + len);
    bytes
}

/// Stands for the workers of a port: what they were told last.
#[derive(Default)]
pub(crate) struct Told {
    link: Mutex<Option<Link>>,
    pub(crate) stats: Arc<PortStats>,
}

impl Publisher for Told {
    fn publish(&self, link: Link) {
        *self.link.lock().unwrap() = Some(link);
    }

    fn forget_stations(&self) {}

    fn announce(&self, _mac: [u8; 6]) {}

    fn stats(&self) -> &Arc<PortStats> {
        &self.stats
    }
}

impl Told {
    /// How the port is, and why.
    pub(crate) fn state(&self) -> Option<(PortState, Option<String>)> {
        self.link.lock().unwrap().as_ref().map(|link| (link.state, link.reason.clone()))
    }

    pub(crate) fn wait_for(&self, wanted: PortState) {
        let began = Instant::now();
        while self.state().is_none_or(|(state, _)| state != wanted) {
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", self.state());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Queues to receive from, and to send to.
    pub(crate) fn queues(&self) -> (usize, usize) {
        self.link.lock().unwrap().as_ref().map(|link| (link.rx.len(), link.tx.len())).unwrap()
    }
}

/// A TCP socket whose last `close` waits: it has data to send that nobody takes. And its other end.
pub(crate) fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    set_socket_linger(&ours, Some(Duration::from_secs(1000))).unwrap();
    ours.set_nonblocking(true).unwrap();
    while (&ours).write(&[0; 1 << 16]).is_ok() {}
    (ours, theirs)
}
