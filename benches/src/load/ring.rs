//! The driver's side of a ring whose buffers stay where they are: slot `n` always means buffer `n`, so a split ring's
//! descriptors and lists are written once and only indices move. A packed ring has its descriptors rewritten each lap,
//! which is how it works.
//!
//! All this relies on buffers coming back in the order in which they were given, as every switch we know does, offered
//! or not; [`Ring::returned_slot`] is there to check it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use vmm_sys_util::eventfd::EventFd;

use super::memory::Memory;

const WRITE: u16 = 2;
/// Packed ring: the driver's and the device's mark (virtio 1.2, 2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Split ring: no notification, please (virtio 1.2, 2.7.7 and 2.7.10); packed rings use the same number.
const NO_NOTIFY: u16 = 1;

/// Which way the buffers of a ring go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the guest to the switch.
    Send,
    /// From the switch to the guest.
    Receive,
}

/// Where a ring and its buffers are in a guest's memory, and what was agreed upon.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Descriptors; a power of two.
    pub(super) size: u16,
    /// Whether it is a packed ring.
    pub(super) packed: bool,
    /// Whether `IN_ORDER` was agreed upon.
    pub(super) in_order: bool,
    /// Which way buffers go.
    pub(super) direction: Direction,
    /// Offset of the descriptors; a multiple of 4096.
    pub(super) at: usize,
}

impl Layout {
    /// Bytes of the ring's three parts.
    pub(super) fn bytes(&self) -> usize {
        (self.used() - self.at + 6 + 8 * usize::from(self.size)).next_multiple_of(4096)
    }

    /// Offset of the list of available buffers, or of a packed ring's driver area.
    pub(super) fn avail(&self) -> usize {
        self.at + 16 * usize::from(self.size)
    }

    /// Offset of the list of used buffers, or of a packed ring's device area.
    pub(super) fn used(&self) -> usize {
        (self.avail() + 6 + 2 * usize::from(self.size)).next_multiple_of(64)
    }
}

/// A position that runs around a packed ring.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    slot: u16,
    wrap: bool,
}

impl Cursor {
    const START: Self = Self { slot: 0, wrap: true };

    fn advance(&mut self, count: u16, size: u16) {
        self.slot += count;
        if self.slot >= size {
            self.slot -= size;
            self.wrap = !self.wrap;
        }
    }
}

/// One ring.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<Memory>,
    layout: Layout,
    /// Packed: the next descriptor to write, and the next that comes back.
    next: Cursor,
    oldest: Cursor,
    /// Buffers given so far, and taken back so far.
    posted: u64,
    reaped: u64,
    /// Address and length of each slot's buffer.
    buffers: Vec<(u64, u32)>,
    kick: EventFd,
    call: EventFd,
    kicks: u64,
}

impl Ring {
    /// A ring over these buffers (offset and length in `memory`, which are guest addresses too).
    ///
    /// # Errors
    /// If an event descriptor cannot be had.
    ///
    /// # Panics
    /// If there is not one buffer for each slot.
    pub(super) fn new(memory: Arc<Memory>, layout: Layout, buffers: Vec<(u64, u32)>) -> io::Result<Self> {
        assert!(layout.size.is_power_of_two() && buffers.len() == usize::from(layout.size));
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let (kick, call) = (event()?, event()?);
        let (next, oldest) = (Cursor::START, Cursor::START);
        let ring = Self { memory, layout, next, oldest, posted: 0, reaped: 0, buffers, kick, call, kicks: 0 };
        if layout.packed {
            // Driver area: offset, then flags.
            ring.memory.u16(layout.avail() + 2).store(NO_NOTIFY, Ordering::Relaxed);
        } else {
            ring.memory.u16(layout.avail()).store(NO_NOTIFY, Ordering::Relaxed);
            for slot in 0..layout.size {
                ring.describe(slot);
                ring.memory.u16(layout.avail() + 4 + 2 * usize::from(slot)).store(slot, Ordering::Relaxed);
            }
        }
        Ok(ring)
    }

    /// Where it is.
    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What wakes the switch.
    pub(super) fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    /// What would wake the driver.
    pub(super) fn call_event(&self) -> &EventFd {
        &self.call
    }

    /// Times the switch wanted to be woken.
    pub(super) fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Buffers given so far.
    pub(super) fn posted(&self) -> u64 {
        self.posted
    }

    /// Buffers taken back so far.
    pub(super) fn reaped(&self) -> u64 {
        self.reaped
    }

    /// Buffers that can be given now.
    pub(super) fn free(&self) -> u16 {
        self.layout.size - (self.posted - self.reaped) as u16
    }

    /// The slot of a buffer, counted from the first that was ever given.
    pub(super) fn slot(&self, position: u64) -> u16 {
        (position & u64::from(self.layout.size - 1)) as u16
    }

    /// Offset of a slot's buffer.
    pub(super) fn buffer(&self, slot: u16) -> usize {
        self.buffers[usize::from(slot)].0 as usize
    }

    /// Lets a slot mean another buffer from its next use on.
    pub(super) fn set_buffer(&mut self, slot: u16, at: u64, len: u32) {
        self.buffers[usize::from(slot)] = (at, len);
        if !self.layout.packed {
            self.describe(slot);
        }
    }

    fn flags(&self) -> u16 {
        if self.layout.direction == Direction::Receive { WRITE } else { 0 }
    }

    /// Writes a split ring's descriptor.
    fn describe(&self, slot: u16) {
        let (at, len) = self.buffers[usize::from(slot)];
        self.put(slot, at, u64::from(len) | u64::from(self.flags()) << 32);
    }

    fn put(&self, slot: u16, address: u64, rest: u64) {
        let at = self.layout.at + 16 * usize::from(slot);
        self.memory.u64(at).store(address, Ordering::Relaxed);
        self.memory.u64(at + 8).store(rest, Ordering::Release);
    }

    /// Gives the next `count` buffers, of which there have to be as many ([`Ring::free`]). The switch is woken if it
    /// sleeps.
    pub(super) fn post(&mut self, count: u16) {
        debug_assert!(count <= self.free());
        self.posted += u64::from(count);
        if self.layout.packed {
            self.post_packed(count);
        } else {
            self.memory.u16(self.layout.avail() + 2).store(self.posted as u16, Ordering::Release);
        }
        // Makes the index visible before we look whether the switch sleeps (virtio 1.2, 2.7.13.4).
        fence(Ordering::SeqCst);
        if self.wants_kick().load(Ordering::Relaxed) & NO_NOTIFY == 0 {
            self.kicks += 1;
            // Fails only when it is pending for ever already.
            let _ = self.kick.write(1);
        }
    }

    fn post_packed(&mut self, count: u16) {
        for _ in 0..count {
            let Cursor { slot, wrap } = self.next;
            let (at, len) = self.buffers[usize::from(slot)];
            let marks = if wrap { AVAIL } else { USED };
            let rest = u64::from(len) | u64::from(slot) << 32 | u64::from(self.flags() | marks) << 48;
            self.put(slot, at, rest);
            self.next.advance(1, self.layout.size);
        }
    }

    fn wants_kick(&self) -> &AtomicU16 {
        // Flags come first in a split ring's list, and second in a packed ring's device area.
        self.memory.u16(self.layout.used() + if self.layout.packed { 2 } else { 0 })
    }

    /// Takes back what came back; gives how many.
    #[inline]
    pub(super) fn reap(&mut self) -> u16 {
        let count = if self.layout.packed { self.reap_packed() } else { self.reap_split() };
        self.reaped += u64::from(count);
        count
    }

    fn reap_split(&self) -> u16 {
        self.memory.u16(self.layout.used() + 2).load(Ordering::Acquire).wrapping_sub(self.reaped as u16)
    }

    fn reap_packed(&mut self) -> u16 {
        let outstanding = (self.posted - self.reaped) as u16;
        let mut count = 0;
        while count < outstanding {
            let Cursor { slot, wrap } = self.oldest;
            let rest = self.memory.u64(self.layout.at + 16 * usize::from(slot) + 8).load(Ordering::Acquire);
            let marks = (rest >> 48) as u16 & (AVAIL | USED);
            if marks != if wrap { AVAIL | USED } else { 0 } {
                break;
            }
            // In order, one descriptor may stand for all before it (virtio 1.2, 2.8.7).
            let last = (rest >> 32) as u16;
            let step = if self.layout.in_order { (last.wrapping_sub(slot) & (self.layout.size - 1)) + 1 } else { 1 };
            let step = step.min(outstanding - count);
            self.oldest.advance(step, self.layout.size);
            count += step;
        }
        count
    }

    /// Slot and length of the buffer that came back at this position, if the ring's kind and the agreement tell. Only
    /// of use before the slot is given again.
    pub(super) fn returned_slot(&self, position: u64) -> Option<(u16, u32)> {
        let slot = self.slot(position);
        if self.layout.packed {
            let rest = self.memory.u64(self.layout.at + 16 * usize::from(slot) + 8).load(Ordering::Acquire);
            return (!self.layout.in_order).then_some(((rest >> 32) as u16, rest as u32));
        }
        // Elements begin 4 bytes off, so each is read in four pieces of 16 bits.
        let at = self.layout.used() + 4 + 8 * usize::from(slot);
        let part = |place: usize| self.memory.u16(at + 2 * place).load(Ordering::Relaxed);
        let len = u32::from(part(2)) | u32::from(part(3)) << 16;
        Some((part(0), len))
    }
}
