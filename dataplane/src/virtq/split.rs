//! The split virtqueue (virtio 1.2, 2.7), the device's side.
//!
//! The three areas are translated once and their host pointers kept. Work is done in bursts: look how many chains are
//! available, take some of them, write their used elements, and publish all with one store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::limits::{BURST, MAX_RING};
use crate::mem::prefetch::{prefetch_read, prefetch_write};
use crate::mem::{GuestMemory, Segment};
use crate::sync::{SpinGuard, SpinLock};
use crate::virtq::chain::{DESCRIPTOR, Direction, Hints, Table, Walk};
use crate::virtq::journal::Entry;
use crate::virtq::ring::{Ahead, Chain, Ring, Walked, Work};
use crate::virtq::{Fault, Journaled, RingConfig, RingError, suppress};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver polls.
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: we poll.
const NO_NOTIFY: u16 = 1;
/// Bytes before the rings' elements: flags and index, 16 bits each.
const RING_HEADER: usize = 4;
const USED_ELEMENT: usize = 8;
/// What fits into a cache line of 64 bytes.
const DESCRIPTORS_PER_LINE: usize = 4;
const USED_PER_LINE: usize = 8;

/// A split ring over host pointers.
#[derive(Debug)]
pub struct SplitRing {
    config: RingConfig,
    memory: Arc<GuestMemory>,
    table: Table,
    avail: *mut u16,
    used: *mut u16,
    mask: u16,
    position: SpinLock<Position>,
    journal: Option<Arc<Entry>>,
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
unsafe impl Send for SplitRing {}
// SAFETY: as above.
unsafe impl Sync for SplitRing {}

impl SplitRing {
    /// Sets a ring up to continue where the driver's used index says, which is also where a previous backend that
    /// completed all that it took has left off. What the frontend remembers may lag after a crash of ours, and frames
    /// would be sent twice; hence no base is taken.
    ///
    /// # Errors
    /// [`RingError`] if its size or place is invalid.
    pub fn new(config: &RingConfig, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        Self::with_journal(config, memory, None)
    }

    /// As [`SplitRing::new`], with positions that are written down.
    ///
    /// # Errors
    /// As [`SplitRing::new`].
    pub fn with_journal(
        config: &RingConfig,
        memory: Arc<GuestMemory>,
        journal: Option<Journaled>,
    ) -> Result<Self, RingError> {
        let mut ring = Self::map(config, memory, Position::default())?;
        let mut next = ring.load(ring.used_index());
        // A ring to which we send is published by one store, so that there is nothing to know of it.
        if let Some(Journaled { entry, recover, .. }) = journal.filter(|it| it.direction == Direction::FromGuest) {
            if let Some(batch) = entry.last().filter(|_| recover) {
                next = ring.give_back(next, batch.after);
            }
            entry.begin(next);
            ring.journal = Some(entry);
        }
        *ring.position.lock() = Position { next, seen: next, decided: next, hints: Hints::default() };
        Ok(ring)
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
            journal: None,
            memory,
        })
    }

    /// Gives chains back that were taken before a crash, from `next` to `after`. Returns where the ring is then.
    fn give_back(&self, next: u16, after: u16) -> u16 {
        let count = after.wrapping_sub(next);
        let available = self.load(self.avail_index()).wrapping_sub(next);
        // Anything else is of a time before the driver started anew.
        if usize::from(count) > BURST || count > available || available > self.mask + 1 {
            return next;
        }
        for offset in 0..count {
            let index = next.wrapping_add(offset);
            let head = self.load(self.avail_element(index));
            // SAFETY: as in `load`; the place is aligned to the four bytes that the area is, and eight bytes are inside.
            unsafe { self.used_element(index).write_unaligned(u64::from(head).to_le()) };
        }
        self.store(self.used_index(), after);
        self.mark_published(next, u32::from(count));
        after
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
    fn atomic(&self, place: *mut u16) -> &AtomicU16 {
        // SAFETY: every `place` comes from the methods above: inside an area that `map` checked, and aligned.
        unsafe { AtomicU16::from_ptr(place) }
    }

    #[inline]
    fn load(&self, place: *mut u16) -> u16 {
        u16::from_le(self.atomic(place).load(Ordering::Acquire))
    }

    #[inline]
    fn store(&self, place: *mut u16, value: u16) {
        self.atomic(place).store(value.to_le(), Ordering::Release);
    }
}

impl SplitRing {
    /// Marks ranges of the used ring's area, by offset and length, if that is wanted.
    fn mark_used<const N: usize>(&self, ranges: [(usize, usize); N]) {
        let (Some(used), Some(mut marks)) = (self.config.log, self.memory.dirty()) else { return };
        for (offset, len) in ranges {
            marks.range(used.wrapping_add(offset as u64), len);
        }
        marks.finish();
    }

    /// Marks the used index and `count` elements from the one of index `first` on.
    #[cold]
    fn mark_published(&self, first: u16, count: u32) {
        let first = usize::from(first & self.mask);
        let straight = (count as usize).min(usize::from(self.mask) + 1 - first);
        self.mark_used([
            (0, RING_HEADER),
            (RING_HEADER + first * USED_ELEMENT, straight * USED_ELEMENT),
            (RING_HEADER, (count as usize - straight) * USED_ELEMENT),
        ]);
    }

    /// Stores the request for notifications, or against them, that goes with the used ring.
    fn store_flags(&self, flags: u16) {
        self.store(self.used_flags(), flags);
        self.mark_used([(0, RING_HEADER)]);
    }

    fn store_event(&self, index: u16) {
        self.store(self.avail_event(), index);
        self.mark_used([self.event_range()]);
    }

    /// Where the available event is in the used ring's area.
    fn event_range(&self) -> (usize, usize) {
        (RING_HEADER + (usize::from(self.mask) + 1) * USED_ELEMENT, 2)
    }
}

impl Ring for SplitRing {
    type Work<'r> = SplitWork<'r>;

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    #[inline]
    fn try_lock(&self, direction: Direction) -> Option<SplitWork<'_>> {
        Some(SplitWork::new(self, direction, self.position.try_lock()?))
    }

    #[inline]
    fn lock(&self, direction: Direction) -> SplitWork<'_> {
        SplitWork::new(self, direction, self.position.lock())
    }

    #[inline]
    fn lock_in_time(&self, direction: Direction) -> Option<SplitWork<'_>> {
        Some(SplitWork::new(self, direction, self.position.lock_in_time()?))
    }

    fn enable_notification(&self) -> bool {
        let Some(position) = self.position.try_lock() else { return true };
        let (place, request, mark) = if self.config.event_idx {
            (self.avail_event(), position.next, self.event_range())
        } else {
            (self.used_flags(), 0, (0, RING_HEADER))
        };
        let (place, index) = (self.atomic(place), self.atomic(self.avail_index()));
        suppress::arm(place, request, index, position.next, || self.mark_used([mark]))
    }

    fn disable_notification(&self) {
        // With event indices a request fires once and is then spent: nothing to take back.
        if !self.config.event_idx {
            self.store_flags(NO_NOTIFY);
        }
    }

    fn silence(&self) {
        // With event indices the flag must be 0 (virtio 1.2, 2.7.10.2).
        self.store_flags(if self.config.event_idx { 0 } else { NO_NOTIFY });
        if self.config.event_idx {
            // The index just passed, which is the farthest ahead.
            let next = self.position.lock().next;
            self.store_event(next.wrapping_sub(1));
        }
    }

    fn base(&self) -> u32 {
        self.position.lock().next.into()
    }

    fn moved_to(&self, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        let old = self.position.lock();
        let position = Position { next: old.next, seen: old.seen, decided: old.decided, hints: Hints::default() };
        Ok(Self { journal: self.journal.clone(), ..Self::map(&self.config, memory, position)? })
    }
}

/// A split ring held for one burst.
#[derive(Debug)]
pub struct SplitWork<'r> {
    ring: &'r SplitRing,
    direction: Direction,
    position: SpinGuard<'r, Position>,
    /// Chains taken since the last publication.
    taken: u32,
    /// Of those, chains completed.
    completed: u32,
    walked: Walked,
}

impl<'r> SplitWork<'r> {
    #[inline]
    fn new(ring: &'r SplitRing, direction: Direction, position: SpinGuard<'r, Position>) -> Self {
        Self { ring, direction, position, taken: 0, completed: 0, walked: Walked::default() }
    }

    /// Chains left to take, looking anew only if fewer than `wanted` are known of.
    #[inline]
    fn left(&mut self, wanted: u32) -> Result<u32, Fault> {
        let known = u32::from(self.position.seen.wrapping_sub(self.position.next));
        if known >= wanted + self.taken {
            return Ok(known - self.taken);
        }
        let seen = self.ring.load(self.ring.avail_index());
        let count = seen.wrapping_sub(self.position.next);
        if count > self.ring.mask + 1 {
            return Err(Fault::AvailIndex);
        }
        self.position.seen = seen;
        Ok(u32::from(count).saturating_sub(self.taken))
    }

    #[inline]
    fn head(&self, taken: u32) -> u16 {
        self.ring.load(self.ring.avail_element(self.position.next.wrapping_add(taken as u16)))
    }

    /// Asks for what the next burst, from available index `first` on, needs of the ring: the driver's CPU had it last.
    #[inline]
    fn foresee(&self, first: u16) {
        let ring = self.ring;
        let known = self.position.seen.wrapping_sub(first).min(BURST as u16);
        // One burst farther, so that reading the elements below does not wait.
        prefetch_read(ring.avail_element(first.wrapping_add(BURST as u16)));
        // Drivers mostly hand descriptors out in order.
        for index in (0..known).step_by(DESCRIPTORS_PER_LINE) {
            ring.table.prefetch(ring.load(ring.avail_element(first.wrapping_add(index))));
        }
        for index in (0..known).step_by(USED_PER_LINE) {
            prefetch_write(ring.used_element(first.wrapping_add(index)));
        }
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
}

impl<'r> Work<'r> for SplitWork<'r> {
    type Mark = u32;

    #[inline]
    fn available(&mut self) -> Result<bool, Fault> {
        Ok(self.left(1)? > 0)
    }

    #[inline]
    fn look_ahead(&mut self, ahead: &mut Ahead<'r>, wanted: usize) -> Result<(), Fault> {
        ahead.begin(self.taken);
        let wanted = wanted.min(BURST) as u32;
        let count = self.left(wanted)?.min(wanted);
        let (walk, mut locator) = (self.walk(), self.ring.memory.locator(self.position.hints.buffers));
        let first = self.position.next.wrapping_add(self.taken as u16);
        for offset in 0..count as u16 {
            let head = self.ring.load(self.ring.avail_element(first.wrapping_add(offset)));
            ahead.push(head, walk.single(head, &mut locator), self.direction);
        }
        self.position.hints.buffers = locator.hint();
        self.foresee(first.wrapping_add(count as u16));
        Ok(())
    }

    #[inline]
    fn take_ahead(&mut self, ahead: &Ahead<'r>) -> Option<(Chain, Segment<'r>)> {
        let (id, buffer) = ahead.get(self.taken)?;
        self.taken += 1;
        Some((Chain { id, ..Chain::default() }, buffer))
    }

    #[inline]
    fn take(&mut self, sink: impl FnMut(Segment<'r>)) -> Result<Option<(Chain, u64)>, Fault> {
        if self.left(1)? == 0 {
            return Ok(None);
        }
        let id = self.head(self.taken);
        let (bytes, buffers) = self.walk().run(id, &mut self.position.hints, sink)?;
        self.walked.add(buffers)?;
        self.taken += 1;
        Ok(Some((Chain { id, ..Chain::default() }, bytes)))
    }

    fn mark(&self) -> u32 {
        self.taken
    }

    fn rewind(&mut self, mark: u32) {
        self.taken = mark;
    }

    #[inline]
    fn complete(&mut self, chain: Chain, len: u32) {
        let place = self.ring.used_element(self.position.next.wrapping_add(self.completed as u16));
        let element = u64::from(chain.id) | (u64::from(len) << 32);
        // SAFETY: inside the used ring by construction, which is aligned to 4; hence unaligned.
        unsafe { place.write_unaligned(element.to_le()) };
        self.completed += 1;
    }

    #[inline]
    fn intend(&self) {
        if let Some(entry) = &self.ring.journal {
            let next = self.position.next;
            entry.intend(next, next.wrapping_add(self.completed as u16));
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let count = std::mem::take(&mut self.completed);
        self.taken -= count.min(self.taken);
        if count == 0 {
            return false;
        }
        let first = self.position.next;
        self.position.next = first.wrapping_add(count as u16);
        // 2.7.8.2.1: elements before the index, which the Release store sees to.
        self.ring.store(self.ring.used_index(), self.position.next);
        if self.ring.config.log.is_some() {
            self.ring.mark_published(first, count);
        }
        true
    }

    #[inline]
    fn needs_notification(&mut self) -> bool {
        let (old, new) = (self.position.decided, self.position.next);
        self.position.decided = new;
        if !self.ring.config.event_idx {
            return suppress::wanted_by_flags(self.ring.atomic(self.ring.avail_flags()), NO_INTERRUPT);
        }
        suppress::wanted_by_event(self.ring.atomic(self.ring.used_event()), old, new)
    }
}
