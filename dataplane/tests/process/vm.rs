//! A machine without a machine: a frontend with a driver, just good enough to send and receive frames.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use e2e::hostile::message::{SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, words};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::{Guest, Peer, Qemu, RING_SIZE, UVA, ring_place};

const MEMORY: u64 = 1 << 20;
/// The guest's rings: it receives from the first, and sends with the second.
const RX: usize = 0;
const TX: usize = 1;
/// Where buffers begin, and how far they are apart.
const BUFFERS: [u64; 2] = [0x8_0000, 0xc_0000];
const BUFFER: u64 = 2048;
/// Length of the virtio-net header.
const HEADER: usize = 12;
const WRITE: u16 = 2;

/// A virtual machine with one queue pair.
pub(crate) struct Vm {
    mac: [u8; 6],
    qemu: Qemu,
    session: Option<Session>,
}

struct Session {
    peer: Peer,
    guest: Guest,
    kick: EventFd,
    call: EventFd,
    sent: u16,
    received: u16,
}

impl Vm {
    /// Listens at `path`, like QEMU.
    pub(crate) fn listen(path: &Path, number: u8) -> Self {
        Self { mac: [2, 0, 0, 0, 0, number], qemu: Qemu::listen(path), session: None }
    }

    /// Serves the switch's next connection, with fresh memory.
    pub(crate) fn boot(&mut self) {
        self.session = None;
        let (kick, call) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let mut peer = self.qemu.accept();
        let guest = Guest::new(MEMORY);
        peer.negotiate();
        peer.frontend.set_mem_table(&[guest.region()]).unwrap();
        let session = Session { peer, guest, kick, call, sent: 0, received: 0 };
        session.offer(0, RING_SIZE);
        session.start();
        self.session = Some(session);
    }

    fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }

    /// Makes its memory end after so many bytes.
    pub(crate) fn truncate(&self, len: u64) {
        self.session().guest.file.set_len(len).unwrap();
        self.kick();
    }

    /// What the switch notifies it by.
    pub(crate) fn call(&self) -> &EventFd {
        &self.session().call
    }

    /// Has its transmit ring taken from the workers and given back.
    pub(crate) fn change_ring(&self) {
        let peer = &self.session().peer;
        for enabled in [0, 1] {
            peer.raw(SET_VRING_ENABLE, 0x1, &words(&[TX as u32, enabled]), &[]);
        }
        peer.settle();
    }

    pub(crate) fn kick(&self) {
        self.session().kick.write(1).unwrap();
    }

    /// Sends a frame that carries `text` to another machine, or to all.
    pub(crate) fn send(&mut self, to: Option<&Vm>, text: &str) {
        let mut frame = vec![0; HEADER];
        frame.extend(to.map_or([0xff; 6], |vm| vm.mac));
        frame.extend(self.mac);
        frame.extend([0x88, 0xb5, text.len() as u8]);
        frame.extend(text.as_bytes());
        frame.resize(HEADER + 64, 0);
        let session = self.session.as_mut().unwrap();
        let slot = session.sent % RING_SIZE;
        let place = BUFFERS[TX] + u64::from(slot) * BUFFER;
        session.put(place, &frame);
        session.descriptor(TX, slot, place, frame.len() as u32, 0);
        session.sent = session.sent.wrapping_add(1);
        session.publish(TX, session.sent.wrapping_sub(1), session.sent);
        self.kick();
    }

    /// The texts that came meanwhile.
    pub(crate) fn received(&mut self) -> Vec<String> {
        let session = self.session.as_mut().unwrap();
        let used = session.number(ring_place(RX).used_ring_addr - UVA + 2);
        let first = session.received;
        let count = used.wrapping_sub(first);
        let texts = (0..count).map(|index| session.text(first.wrapping_add(index))).collect();
        session.offer(first.wrapping_add(RING_SIZE), count);
        session.received = used;
        // Notify us of the next one.
        session.put(ring_place(RX).avail_ring_addr - UVA + 4 + 2 * u64::from(RING_SIZE), &used.to_le_bytes());
        texts
    }
}

impl Session {
    fn start(&self) {
        for ring in [RX, TX] {
            self.peer.raw(SET_VRING_ENABLE, 0x1, &words(&[ring as u32, 1]), &[]);
            self.peer.frontend.set_vring_num(ring, RING_SIZE).unwrap();
            self.peer.frontend.set_vring_base(ring, 0).unwrap();
            self.peer.frontend.set_vring_addr(ring, &ring_place(ring)).unwrap();
            for (request, event) in [(SET_VRING_KICK, &self.kick), (SET_VRING_CALL, &self.call)] {
                self.peer.raw(request, 0x1, &(ring as u64).to_ne_bytes(), &[event.as_raw_fd()]);
            }
            self.peer.settle();
        }
    }

    fn put(&self, place: u64, bytes: &[u8]) {
        self.guest.file.write_all_at(bytes, place).unwrap();
    }

    fn number(&self, place: u64) -> u16 {
        let mut bytes = [0; 2];
        self.guest.file.read_exact_at(&mut bytes, place).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn descriptor(&self, ring: usize, slot: u16, place: u64, len: u32, flags: u16) {
        let mut bytes = place.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(u32::from(flags).to_le_bytes());
        self.put(ring_place(ring).desc_table_addr - UVA + u64::from(slot) * 16, &bytes);
    }

    /// Makes the available slots from `first` to before `end` known; each names the descriptor of its own number.
    fn publish(&self, ring: usize, first: u16, end: u16) {
        let avail = ring_place(ring).avail_ring_addr - UVA;
        for index in 0..end.wrapping_sub(first) {
            let slot = first.wrapping_add(index) % RING_SIZE;
            self.put(avail + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        }
        self.put(avail + 2, &end.to_le_bytes());
    }

    /// Gives the switch `count` buffers to fill.
    fn offer(&self, first: u16, count: u16) {
        for index in 0..count {
            let slot = first.wrapping_add(index) % RING_SIZE;
            self.descriptor(RX, slot, BUFFERS[RX] + u64::from(slot) * BUFFER, BUFFER as u32, WRITE);
        }
        self.publish(RX, first, first.wrapping_add(count));
    }

    fn text(&self, used: u16) -> String {
        let place = ring_place(RX).used_ring_addr - UVA + 4 + 8 * u64::from(used % RING_SIZE);
        let buffer = BUFFERS[RX] + u64::from(self.number(place)) * BUFFER + HEADER as u64 + 14;
        let mut bytes = vec![0; 50];
        self.guest.file.read_exact_at(&mut bytes, buffer).unwrap();
        String::from_utf8(bytes[1..=usize::from(bytes[0])].to_vec()).unwrap()
    }
}
