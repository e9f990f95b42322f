//! A virtqueue as its driver works it, in either layout (virtio 1.2, 2.7 and 2.8), and ways to break it.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::hostile::memory::Memory;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes to the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Bytes of each buffer: all that these guests need for a frame and its header.
pub const BUFFER: u64 = 2048;

/// Shape of a virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Three areas.
    Split,
    /// One ring.
    Packed,
}

/// Guest addresses of a queue's three areas. For a packed one the second and third are those of event suppression.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// Descriptors.
    pub desc: u64,
    /// The driver's area.
    pub driver: u64,
    /// The device's area.
    pub device: u64,
}

impl Places {
    /// From `base` on, with room for a queue of any size.
    pub fn at(base: u64) -> Self {
        Self { desc: base, driver: base + 0x8_0000, device: base + 0xc_0000 }
    }

    /// Bytes from the first area's beginning to where the next queue can begin.
    pub const STRIDE: u64 = 0x20_0000;
}

/// A descriptor as it is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Desc {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Its bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Next descriptor (split), or buffer id (packed).
    pub next: u16,
}

impl Desc {
    /// A buffer alone.
    pub fn new(addr: u64, len: u32, flags: u16) -> Self {
        Self { addr, len, flags, next: 0 }
    }

    /// What follows the address. A packed ring's descriptor has its flags last.
    fn tail(self, layout: Layout) -> u64 {
        let (third, fourth) = match layout {
            Layout::Split => (self.flags, self.next),
            Layout::Packed => (self.next, self.flags),
        };
        u64::from(self.len) | u64::from(third) << 32 | u64::from(fourth) << 48
    }

    /// As it lies in an indirect table.
    pub fn entry(self, layout: Layout) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..].copy_from_slice(&self.tail(layout).to_le_bytes());
        bytes
    }
}

/// Position in a ring and how often it has been round.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    slot: u16,
    wrap: bool,
}

impl Cursor {
    const START: Self = Self { slot: 0, wrap: true };

    fn advance(&mut self, by: u16, size: u16) {
        let slot = u32::from(self.slot) + u32::from(by);
        self.wrap ^= slot >= u32::from(size);
        self.slot = (slot % u32::from(size)) as u16;
    }
}

/// A queue and its driver. Buffer N belongs to descriptor N.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<Memory>,
    /// Its shape.
    pub layout: Layout,
    /// Its place.
    pub places: Places,
    /// Descriptors.
    pub size: u16,
    /// Whether the device writes to its buffers.
    writable: bool,
    buffers: u64,
    /// How the device is woken.
    pub kick: File,
    /// Whether it says by index when it wants to be (split).
    pub event_idx: bool,
    /// Chains made available when it was last decided whether to.
    told: u16,
    next: Cursor,
    done: Cursor,
    /// Chains made available, and given back, since the start; modulo 65,536.
    offered: u16,
    returned: u16,
}

impl Queue {
    /// A queue whose areas begin at `base` and whose buffers begin at `buffers`.
    pub fn new(
        memory: Arc<Memory>,
        layout: Layout,
        base: u64,
        size: u16,
        buffers: u64,
        writable: bool,
    ) -> anyhow::Result<Self> {
        let (places, kick) = (Places::at(base), crate::hostile::eventfd()?);
        let (next, done) = (Cursor::START, Cursor::START);
        let mut queue = Self {
            memory,
            layout,
            places,
            size,
            writable,
            buffers,
            kick,
            event_idx: false,
            told: 0,
            next,
            done,
            offered: 0,
            returned: 0,
        };
        queue.reset();
        Ok(queue)
    }

    /// Begins anew, as a driver does that has reset the device. The device must not use the queue now.
    pub fn reset(&mut self) {
        let size = u64::from(self.size);
        let [driver, device] = match self.layout {
            Layout::Split => [6 + 2 * size, 6 + 8 * size],
            Layout::Packed => [4, 4],
        };
        self.memory.clear(self.places.desc, 16 * size);
        self.memory.clear(self.places.driver, driver.next_multiple_of(8));
        self.memory.clear(self.places.device, device.next_multiple_of(8));
        (self.next, self.done, self.offered, self.returned) = (Cursor::START, Cursor::START, 0, 0);
        self.told = 0;
        // These drivers poll, and say so.
        match self.layout {
            Layout::Split => self.memory.half(self.places.driver).store(1, Ordering::Relaxed),
            Layout::Packed => self.memory.half(self.places.driver + 2).store(1, Ordering::Relaxed),
        }
        if self.writable {
            self.fill();
        }
    }

    /// As [`Queue::reset`], with that descriptor in place of every buffer.
    pub fn reset_with(&mut self, desc: Desc) {
        let writable = std::mem::replace(&mut self.writable, false);
        self.reset();
        self.writable = writable;
        (0..self.size).for_each(|_| self.post_chain(&[desc]));
    }

    /// Where a queue of this kind starts, in the form of `SET_VRING_BASE`.
    pub fn base(&self) -> u32 {
        if self.layout == Layout::Packed { 0x8000_8000 } else { 0 }
    }

    /// Guest address of a descriptor's own buffer.
    pub fn buffer(&self, slot: u16) -> u64 {
        self.buffers + u64::from(slot) * BUFFER
    }

    /// Chains that the device has.
    pub fn outstanding(&self) -> u16 {
        self.offered.wrapping_sub(self.returned)
    }

    /// Descriptor that the next chain will begin with, if it is free.
    pub fn free_slot(&self) -> Option<u16> {
        (self.outstanding() < self.size).then_some(self.next.slot)
    }

    /// Writes a descriptor to its place, without making it available.
    pub fn set(&self, slot: u16, desc: Desc) {
        let at = self.places.desc + 16 * u64::from(slot);
        self.memory.long(at).store(desc.addr, Ordering::Relaxed);
        self.memory.long(at + 8).store(desc.tail(self.layout), Ordering::Relaxed);
    }

    /// Posts one buffer of `len` bytes, at the free descriptor's own place.
    pub fn post(&mut self, len: u32) {
        let slot = self.next.slot;
        self.post_chain(&[Desc::new(self.buffer(slot), len, if self.writable { WRITE } else { 0 })]);
    }

    /// Posts buffers as one chain, in descriptors that follow each other. Flags are taken as they are, but for `NEXT`
    /// of all but the last, which is added.
    pub fn post_chain(&mut self, descs: &[Desc]) {
        let last = descs.len().saturating_sub(1);
        let chain =
            |place: usize, desc: &Desc| Desc { flags: desc.flags | if place < last { NEXT } else { 0 }, ..*desc };
        match self.layout {
            Layout::Split => {
                let head = self.next.slot;
                for (place, desc) in descs.iter().enumerate() {
                    let slot = ((u32::from(head) + place as u32) % u32::from(self.size)) as u16;
                    let next = ((u32::from(slot) + 1) % u32::from(self.size)) as u16;
                    let next = if place < last { next } else { desc.next };
                    self.set(slot, Desc { next, ..chain(place, desc) });
                }
                self.next.advance(descs.len() as u16, self.size);
                self.offer(head);
            }
            Layout::Packed => {
                let head = self.next;
                for (place, desc) in descs.iter().enumerate() {
                    self.write_slot(Desc { next: head.slot, ..chain(place, desc) }, place > 0);
                    self.next.advance(1, self.size);
                }
                self.publish_slot(head);
                self.offered = self.offered.wrapping_add(1);
            }
        }
    }

    /// Makes a chain available by the index of its head (split).
    pub fn offer(&mut self, head: u16) {
        let element = self.places.driver + 4 + 2 * u64::from(self.offered % self.size);
        self.memory.half(element).store(head, Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
        self.set_avail_index(self.offered);
    }

    /// Sets the available index (split), however far that is.
    pub fn set_avail_index(&self, index: u16) {
        self.memory.half(self.places.driver + 2).store(index, Ordering::Release);
    }

    /// The available index as it should be.
    pub fn avail_index(&self) -> u16 {
        self.offered
    }

    /// Writes the slot at the position (packed), available at once or still not.
    pub fn write_slot(&self, desc: Desc, available: bool) {
        let Cursor { slot, wrap } = self.next;
        let marks = match (wrap, available) {
            (true, true) | (false, false) => AVAIL,
            _ => USED,
        };
        let at = self.places.desc + 16 * u64::from(slot);
        self.memory.long(at).store(desc.addr, Ordering::Relaxed);
        let marked = Desc { flags: (desc.flags & !(AVAIL | USED)) | marks, ..desc };
        self.memory.long(at + 8).store(marked.tail(Layout::Packed), Ordering::Release);
    }

    fn publish_slot(&self, at: Cursor) {
        let tail = self.memory.long(self.places.desc + 16 * u64::from(at.slot) + 8);
        let marks = if at.wrap { AVAIL } else { USED };
        let value = tail.load(Ordering::Relaxed) & !(u64::from(AVAIL | USED) << 48);
        tail.store(value | u64::from(marks) << 48, Ordering::Release);
    }

    /// Moves the driver's position (packed), for those who write slots one by one.
    pub fn skip(&mut self, slots: u16) {
        self.next.advance(slots, self.size);
    }

    /// Takes the next chain that the device has given back: its first descriptor and the bytes written to it.
    pub fn reap(&mut self) -> Option<(u16, u32)> {
        match self.layout {
            Layout::Split => {
                let index = self.memory.half(self.places.device + 2).load(Ordering::Acquire);
                if index == self.returned {
                    return None;
                }
                let element = self.places.device + 4 + 8 * u64::from(self.returned % self.size);
                let id = self.memory.word(element).load(Ordering::Relaxed);
                let len = self.memory.word(element + 4).load(Ordering::Relaxed);
                self.returned = self.returned.wrapping_add(1);
                Some((id as u16, len))
            }
            Layout::Packed => {
                let tail =
                    self.memory.long(self.places.desc + 16 * u64::from(self.done.slot) + 8).load(Ordering::Acquire);
                let flags = (tail >> 48) as u16;
                if (flags & USED != 0) != self.done.wrap || (flags & AVAIL != 0) != self.done.wrap {
                    return None;
                }
                self.done.advance(1, self.size);
                self.returned = self.returned.wrapping_add(1);
                Some(((tail >> 32) as u16, tail as u32))
            }
        }
    }

    /// Posts buffers until the device has them all.
    pub fn fill(&mut self) {
        while self.free_slot().is_some() {
            self.post(BUFFER as u32);
        }
    }

    /// Wakes the device, if it wants to be.
    pub fn notify(&mut self) {
        fence(Ordering::SeqCst);
        let told = std::mem::replace(&mut self.told, self.offered);
        if self.event_idx && self.layout == Layout::Split {
            let event = self.places.device + 4 + 8 * u64::from(self.size);
            let event = self.memory.half(event).load(Ordering::Relaxed);
            if self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(told) {
                self.wake();
            }
            return;
        }
        let (at, silent) = match self.layout {
            Layout::Split => (self.places.device, 1),
            Layout::Packed => (self.places.device + 2, 1),
        };
        if self.memory.half(at).load(Ordering::Relaxed) != silent {
            self.wake();
        }
    }

    /// Wakes the device.
    pub fn wake(&mut self) {
        // A full counter means that it is awake.
        let _ = self.kick.write(&1u64.to_ne_bytes());
    }
}
