//! The split virtqueue (virtio 1.2, 2.7), the device's side.
//!
//! The three areas are translated once and their host pointers kept. Work is done in bursts: look how many chains are
//! available, take some of them, write their used elements, and publish all with one store.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::limits::{BURST, MAX_RING};
use crate::mem::{GuestMemory, Segment, Wide};
use crate::sync::{SpinGuard, SpinLock};
use crate::virtq::chain::{DESCRIPTOR, Direction, Hints, Table, Walk};
use crate::virtq::{Fault, RingConfig, RingError};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver polls.
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: we poll.
const NO_NOTIFY: u16 = 1;
/// Bytes before the rings' elements: flags and index, 16 bits each.
const RING_HEADER: usize = 4;
const USED_ELEMENT: usize = 8;

/// A split ring over host pointers.
#[derive(Debug)]
pub struct Vring {
    config: RingConfig,
    memory: Arc<GuestMemory>,
    table: Table,
    avail: *mut u16,
    used: *mut u16,
    mask: u16,
    position: SpinLock<Position>,
}

/// How far we are.
#[derive(Debug, Default)]
struct Position {
    /// Next available index to take; used elements follow in step, since we complete in order.
    next: u16,
    /// The available index as it was last seen.
    seen: u16,
    /// Used index at the last decision about notifying.
    decided: u16,
    hints: Hints,
}

// SAFETY: the pointers lead into `memory`, which is held as long; what they point to is only touched by volatile and
// atomic accesses, and by the holder of `position`.
unsafe impl Send for Vring {}
// SAFETY: as above.
unsafe impl Sync for Vring {}

impl Vring {
    /// Sets a ring up to continue where the driver's used index says, which is also where a previous backend that
    /// completed all that it took has left off. `base` is what the frontend remembers; after a crash of ours it may
    /// lag, and frames would be sent twice.
    ///
    /// # Errors
    /// [`RingError`] if its size or place is invalid.
    pub fn new(config: &RingConfig, memory: Arc<GuestMemory>, base: u16) -> Result<Self, RingError> {
        let ring = Self::map(config, memory, Position::default())?;
        let _ = base;
        let next = ring.load(ring.used_index());
        *ring.position.lock() = Position { next, seen: next, decided: next, hints: Hints::default() };
        Ok(ring)
    }

    /// The same ring after a change of the memory table, continuing where it is. Not while it is published.
    ///
    /// # Errors
    /// [`RingError`] if it is no longer within guest memory.
    pub fn moved_to(&self, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        let old = self.position.lock();
        let position = Position { next: old.next, seen: old.seen, decided: old.decided, hints: Hints::default() };
        Self::map(&self.config, memory, position)
    }

    /// Next available index to process: the answer to `GET_VRING_BASE`. Not while it is published.
    pub fn base(&self) -> u16 {
        self.position.lock().next
    }

    fn map(config: &RingConfig, memory: Arc<GuestMemory>, position: Position) -> Result<Self, RingError> {
        let size = u16::try_from(config.size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_RING);
        let size = size.ok_or(RingError::Size(config.size))?;
        let entries = usize::from(size);
        let area = |name, uva: u64, len: usize, align: usize| {
            let place = memory.translate_uva(uva, len).ok_or(RingError::Unmapped(name))?;
            if place.addr().is_multiple_of(align) { Ok(place) } else { Err(RingError::Unaligned(name)) }
        };
        let desc = area("descriptor", config.desc, entries * DESCRIPTOR, 16)?;
        // Both rings are followed by an event index, whether it is used or not.
        let avail = area("available", config.avail, RING_HEADER + entries * 2 + 2, 2)?;
        let used = area("used", config.used, RING_HEADER + entries * USED_ELEMENT + 2, 4)?;
        // SAFETY: the area was translated over its whole length, is aligned, and `memory` is held by the ring.
        let table = unsafe { Table::new(desc, u32::from(size)) };
        Ok(Self {
            config: *config,
            table,
            avail: avail.cast(),
            used: used.cast(),
            mask: size - 1,
            position: SpinLock::new(position),
            memory,
        })
    }

    /// Takes the ring for one burst, if no other worker has it.
    #[inline]
    pub fn try_lock(&self, direction: Direction) -> Option<Work<'_>> {
        Some(Work { ring: self, direction, position: self.position.try_lock()? })
    }

    /// Takes the ring for one burst, after another worker that has it.
    #[inline]
    pub fn lock(&self, direction: Direction) -> Work<'_> {
        Work { ring: self, direction, position: self.position.lock() }
    }

    /// Whether the driver has made chains available that we have not taken. For the worker that serves the ring.
    pub fn has_work(&self) -> bool {
        self.position.try_lock().is_some_and(|position| self.load(self.avail_index()) != position.next)
    }

    /// Asks the driver to notify us of the next chain, and returns whether there is one already.
    pub fn enable_notification(&self) -> bool {
        let Some(position) = self.position.try_lock() else { return true };
        if self.config.event_idx {
            self.store(self.avail_event(), position.next);
        } else {
            self.store(self.used_flags(), 0);
        }
        // Our request must be visible before we look for the last time, or a chain could slip through unnoticed.
        fence(Ordering::SeqCst);
        self.load(self.avail_index()) != position.next
    }

    /// Asks the driver not to notify us, since we poll.
    pub fn disable_notification(&self) {
        // With event indices a request fires once and is then spent: nothing to take back.
        if !self.config.event_idx {
            self.store(self.used_flags(), NO_NOTIFY);
        }
    }

    /// Asks the driver not to notify us for as long as that can be asked. Not while it is published.
    pub fn silence(&self) {
        self.store(self.used_flags(), NO_NOTIFY);
        if self.config.event_idx {
            // The index just passed, which is the farthest ahead.
            self.store(self.avail_event(), self.base().wrapping_sub(1));
        }
    }

    fn avail_flags(&self) -> *mut u16 {
        self.avail
    }

    fn avail_index(&self) -> *mut u16 {
        self.avail.wrapping_add(1)
    }

    fn avail_element(&self, index: u16) -> *mut u16 {
        self.avail.wrapping_add(2 + usize::from(index & self.mask))
    }

    fn used_event(&self) -> *mut u16 {
        self.avail.wrapping_add(2 + usize::from(self.mask) + 1)
    }

    fn used_flags(&self) -> *mut u16 {
        self.used
    }

    fn used_index(&self) -> *mut u16 {
        self.used.wrapping_add(1)
    }

    fn used_element(&self, index: u16) -> *mut u64 {
        self.used.wrapping_add(2 + 4 * usize::from(index & self.mask)).cast()
    }

    fn avail_event(&self) -> *mut u16 {
        self.used.wrapping_add(2 + 4 * (usize::from(self.mask) + 1))
    }

    #[inline]
    fn load(&self, place: *mut u16) -> u16 {
        // SAFETY: every `place` comes from the methods above: inside an area that `map` checked, and aligned.
        u16::from_le(unsafe { AtomicU16::from_ptr(place) }.load(Ordering::Acquire))
    }

    #[inline]
    fn store(&self, place: *mut u16, value: u16) {
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(place) }.store(value.to_le(), Ordering::Release);
    }
}

/// A look at the next chains, so that their buffers are on the way to our cache while we work on those before them.
///
/// Kept as plain numbers in arrays of their own: values that are written in parts and read as a whole right after
/// stall the processor.
#[derive(Debug)]
pub struct Ahead<'r> {
    first: u16,
    count: u16,
    heads: [u16; BURST],
    places: [*mut u8; BURST],
    sizes: [u64; BURST],
    ring: PhantomData<&'r Vring>,
}

impl Default for Ahead<'_> {
    fn default() -> Self {
        let places = [std::ptr::null_mut(); BURST];
        Self { first: 0, count: 0, heads: [0; BURST], places, sizes: [0; BURST], ring: PhantomData }
    }
}

impl<'r> Ahead<'r> {
    /// The head of the chain at an offset from where the ring stands, and its buffer if it is one in one piece;
    /// anything else is for [`Work::chain`]. `None` if it was not looked at.
    #[inline]
    pub fn get(&self, offset: u16) -> Option<(u16, Option<Wide<'r>>)> {
        let index = usize::from(offset.wrapping_sub(self.first));
        if index >= usize::from(self.count) || index >= BURST {
            return None;
        }
        // SAFETY: what `Wide::into_parts` gave for this ring's memory, which is held for `'r`.
        let single = unsafe { Wide::from_parts(self.places[index], self.sizes[index]) };
        Some((self.heads[index], single))
    }
}

/// A ring held for one burst.
#[derive(Debug)]
pub struct Work<'r> {
    ring: &'r Vring,
    direction: Direction,
    position: SpinGuard<'r, Position>,
}

impl<'r> Work<'r> {
    /// Chains available, looking anew only if fewer than `wanted` are known of.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if there are more than the ring can hold.
    #[inline]
    pub fn available(&mut self, wanted: u16) -> Result<u16, Fault> {
        let known = self.position.seen.wrapping_sub(self.position.next);
        if known >= wanted {
            return Ok(known);
        }
        let seen = self.ring.load(self.ring.avail_index());
        let count = seen.wrapping_sub(self.position.next);
        if count > self.ring.mask + 1 {
            return Err(Fault::AvailIndex);
        }
        self.position.seen = seen;
        Ok(count)
    }

    /// Index of the first descriptor of the `offset`th available chain.
    #[inline]
    pub fn head(&self, offset: u16) -> u16 {
        self.ring.load(self.ring.avail_element(self.position.next.wrapping_add(offset)))
    }

    /// Looks at up to `wanted` chains, at most a burst, beginning with the `first`th available one.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`].
    #[inline]
    pub fn look_ahead(&mut self, ahead: &mut Ahead<'r>, first: u16, wanted: usize) -> Result<(), Fault> {
        let wanted = wanted.min(BURST) as u16;
        ahead.first = first;
        ahead.count = self.available(first + wanted)?.saturating_sub(first).min(wanted);
        let (walk, mut hints) = (self.walk(), self.position.hints);
        let next = self.position.next.wrapping_add(first);
        for index in 0..usize::from(ahead.count).min(BURST) {
            let head = self.ring.load(self.ring.avail_element(next.wrapping_add(index as u16)));
            ahead.heads[index] = head;
            ahead.places[index] = std::ptr::null_mut();
            if let Some(buffer) = walk.single(head, &mut hints) {
                match self.direction {
                    Direction::FromGuest => buffer.prefetch_read(),
                    Direction::ToGuest => buffer.prefetch_write(),
                }
                (ahead.places[index], ahead.sizes[index]) = buffer.into_parts();
            }
        }
        self.position.hints = hints;
        Ok(())
    }

    #[inline]
    fn walk(&self) -> Walk<'r> {
        Walk {
            table: self.ring.table,
            memory: &self.ring.memory,
            indirect: self.ring.config.indirect,
            direction: self.direction,
        }
    }

    /// Hands the buffers of the chain at `head` to `sink` and returns their bytes in sum.
    ///
    /// # Errors
    /// [`Fault`] if the chain breaks a rule.
    #[inline]
    pub fn chain(&mut self, head: u16, sink: impl FnMut(Segment<'r>)) -> Result<u64, Fault> {
        self.walk().run(head, &mut self.position.hints, sink)
    }

    /// Writes the used element of the `offset`th available chain: `len` bytes were written to it.
    /// The driver does not see it before [`Work::publish`].
    #[inline]
    pub fn set_used(&mut self, offset: u16, head: u16, len: u32) {
        let place = self.ring.used_element(self.position.next.wrapping_add(offset));
        let element = u64::from(head) | (u64::from(len) << 32);
        // SAFETY: inside the used ring by construction, which is aligned to 4; hence unaligned.
        unsafe { place.write_unaligned(element.to_le()) };
    }

    /// Gives `count` chains, whose used elements were written, back to the driver.
    #[inline]
    pub fn publish(&mut self, count: u16) {
        self.position.next = self.position.next.wrapping_add(count);
        // 2.7.8.2.1: elements before the index, which the Release store sees to.
        self.ring.store(self.ring.used_index(), self.position.next);
    }

    /// Whether the driver wants to be notified of what was published since the last call (2.7.7.2).
    #[inline]
    pub fn needs_notification(&mut self) -> bool {
        let (old, new) = (self.position.decided, self.position.next);
        self.position.decided = new;
        // The used index must be visible before we look whether anyone waits for it.
        fence(Ordering::SeqCst);
        if !self.ring.config.event_idx {
            return self.ring.load(self.ring.avail_flags()) & NO_INTERRUPT == 0;
        }
        let event = self.ring.load(self.ring.used_event());
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}
