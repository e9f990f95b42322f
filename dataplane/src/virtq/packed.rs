//! The packed virtqueue (virtio 1.2, 2.8), the device's side.
//!
//! One ring of descriptors serves both ways: the driver marks a slot available, we mark it used. A slot's flags are read
//! first and written last, and of several slots the first one is marked last, so that the driver sees all or nothing.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use crate::limits::{BURST, MAX_RING};
use crate::mem::{GuestMemory, Locator, Segment};
use crate::sync::{SpinGuard, SpinLock};
use crate::virtq::chain::{Buffers, DESCRIPTOR, Direction, Hints, INDIRECT, NEXT, WRITE};
use crate::virtq::journal::Entry;
use crate::virtq::ring::{Ahead, Chain, Ring, Walked, Work};
use crate::virtq::{Fault, Journaled, RingConfig, RingError};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Event suppression (2.8.10): notify always, never, or at a certain slot.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_AT: u16 = 2;
const EVENT_BYTES: usize = 4;
/// The wrap counter within an index.
const WRAP: u16 = 1 << 15;
/// Chains completed and not yet published, at most.
const PENDING: usize = 2 * BURST;

/// A packed ring over host pointers.
#[derive(Debug)]
pub struct PackedRing {
    config: RingConfig,
    memory: Arc<GuestMemory>,
    slots: *mut u64,
    driver: *mut u16,
    device: *mut u16,
    size: u32,
    position: SpinLock<Position>,
    journal: Option<Arc<Entry>>,
}

/// A slot, and how often the ring has been round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    slot: u32,
    wrap: bool,
}

/// Where a driver and a device begin.
const START: Cursor = Cursor { slot: 0, wrap: true };

impl Cursor {
    #[inline]
    fn advance(self, slots: u32, size: u32) -> Self {
        let slot = self.slot + slots;
        if slot >= size { Self { slot: slot - size, wrap: !self.wrap } } else { Self { slot, wrap: self.wrap } }
    }

    /// What [`Cursor::index`] gave.
    fn of(index: u16) -> Self {
        Self { slot: u32::from(index & !WRAP), wrap: index & WRAP != 0 }
    }

    fn index(self) -> u16 {
        self.slot as u16 | if self.wrap { WRAP } else { 0 }
    }
}

#[derive(Debug)]
struct Position {
    /// Next slot to take. Used slots follow in step, since we complete in order.
    next: Cursor,
    /// Where it stood at the last decision about notifying.
    decided: u16,
    hints: Hints,
}

// SAFETY: the pointers lead into `memory`, which is held as long; what they point to is only touched by volatile and
// atomic accesses, and by the holder of `position`.
unsafe impl Send for PackedRing {}
// SAFETY: as above.
unsafe impl Sync for PackedRing {}

impl PackedRing {
    /// Sets a ring up to continue at `base`: the next slot in bits 0 to 14, the wrap counter in bit 15. The used
    /// position above them is the same for a device that completes all that it takes.
    ///
    /// # Errors
    /// [`RingError`] if its size, place or base is invalid.
    pub fn new(config: &RingConfig, memory: Arc<GuestMemory>, base: u32) -> Result<Self, RingError> {
        Self::with_journal(config, memory, base, None)
    }

    /// As [`PackedRing::new`], with positions that are written down.
    ///
    /// # Errors
    /// As [`PackedRing::new`].
    pub fn with_journal(
        config: &RingConfig,
        memory: Arc<GuestMemory>,
        base: u32,
        journal: Option<Journaled>,
    ) -> Result<Self, RingError> {
        let next = Cursor::of(base as u16);
        if next.slot >= config.size {
            return Err(RingError::Base(base));
        }
        let at = |next: Cursor| Position { next, decided: next.slot as u16, hints: Hints::default() };
        let mut ring = Self::map(config, memory, at(next))?;
        if let Some(Journaled { entry, direction, recover, same }) = journal {
            let found = if recover { ring.recover(&entry, direction, same) } else { Some(next) };
            let next = found.or((!same).then_some(next)).ok_or(RingError::Lost)?;
            *ring.position.lock() = at(next);
            entry.begin(next.index());
            ring.journal = Some(entry);
        }
        Ok(ring)
    }

    /// Finishes the batch that a crash has interrupted, if it has. Returns where the ring is then; `None` if nothing is known
    /// of it.
    fn recover(&self, entry: &Entry, direction: Direction, same: bool) -> Option<Cursor> {
        let batch = entry.last()?;
        let (before, after) = (Cursor::of(batch.before), Cursor::of(batch.after));
        if before.slot >= self.size || after.slot >= self.size {
            return None;
        }
        if !same && self.is_new() {
            // So does a ring look that has been round an even number of times, where the next batch was not begun to be marked.
            // What may have been delivered is not delivered again; a new ring loses a burst by that, once.
            let torn = before == START && direction == Direction::FromGuest && self.read(before).is_some();
            return torn.then(|| self.give_back(before, after));
        }
        // Its first slot is marked last: if that is no longer available, the driver has got all of it.
        if before == after || self.read(before).is_none() {
            return Some(after);
        }
        match direction {
            Direction::ToGuest => {
                self.finish(entry.elements(batch.count).filter(|(slot, _)| *slot < self.size).collect());
                Some(after)
            }
            Direction::FromGuest => Some(self.give_back(before, after)),
        }
    }

    /// Marks what was taken and not marked; returns where the ring is then.
    fn give_back(&self, before: Cursor, after: Cursor) -> Cursor {
        self.finish(self.untouched(before, after));
        after
    }

    /// Marks slots as used, the first one last.
    fn finish(&self, mut rest: Vec<(u32, u64)>) {
        while let Some((slot, element)) = rest.pop() {
            self.tail(slot).store(element.to_le(), Ordering::Release);
            self.mark_slots([slot]);
        }
    }

    /// Chains from `at` on that were taken and not marked as used, with the elements that do it. Those that were marked are the
    /// last ones of the batch.
    fn untouched(&self, mut at: Cursor, after: Cursor) -> Vec<(u32, u64)> {
        let mut chains = Vec::new();
        while at != after && chains.len() < BURST {
            let Some(first) = self.read(at) else { break };
            let (mut slot, mut next) = (first, at.advance(1, self.size));
            for _ in 0..self.size {
                if slot.flags & NEXT == 0 || slot.flags & INDIRECT != 0 {
                    break;
                }
                let Some(following) = self.read(next) else { break };
                (slot, next) = (following, next.advance(1, self.size));
            }
            chains.push((at.slot, element(slot.id, 0, used_flags(at, Direction::FromGuest))));
            at = next;
        }
        chains
    }

    /// Whether no slot was ever used since the driver has set the ring up: none has the used bit, which it is only given by us
    /// in the first round, or by the driver in the second.
    fn is_new(&self) -> bool {
        (0..self.size).all(|slot| (u64::from_le(self.tail(slot).load(Ordering::Relaxed)) >> 48) as u16 & USED == 0)
    }

    fn map(config: &RingConfig, memory: Arc<GuestMemory>, position: Position) -> Result<Self, RingError> {
        let size = u16::try_from(config.size).ok().filter(|size| *size > 0 && *size <= MAX_RING);
        let size = size.ok_or(RingError::Size(config.size))?;
        let area = |name, uva: u64, len: usize, align: usize| {
            let place = memory.translate_uva(uva, len).ok_or(RingError::Unmapped(name))?;
            if place.addr().is_multiple_of(align) { Ok(place) } else { Err(RingError::Unaligned(name)) }
        };
        let slots = area("descriptor", config.desc, usize::from(size) * DESCRIPTOR, 16)?;
        let driver = area("driver event", config.avail, EVENT_BYTES, 4)?;
        let device = area("device event", config.used, EVENT_BYTES, 4)?;
        Ok(Self {
            config: *config,
            slots: slots.cast(),
            driver: driver.cast(),
            device: device.cast(),
            size: size.into(),
            position: SpinLock::new(position),
            journal: None,
            memory,
        })
    }

    /// A slot's first half, its address; the second one follows.
    #[inline]
    fn place(&self, slot: u32) -> *mut u64 {
        debug_assert!(slot < self.size);
        // A division would cost as much as all else that is done to a slot.
        let inside = if slot < self.size { slot } else { 0 };
        self.slots.wrapping_add(inside as usize * 2)
    }

    /// The second half of a slot: length, id and flags.
    #[inline]
    fn tail(&self, slot: u32) -> &AtomicU64 {
        // SAFETY: the slot is within the ring, whose area `map` checked and which is aligned to 16.
        unsafe { AtomicU64::from_ptr(self.place(slot).wrapping_add(1)) }
    }

    /// Reads a slot if it is available, its flags first.
    #[inline]
    fn read(&self, at: Cursor) -> Option<Slot> {
        let tail = u64::from_le(self.tail(at.slot).load(Ordering::Acquire));
        let flags = (tail >> 48) as u16;
        if (flags & AVAIL != 0) != at.wrap || (flags & USED != 0) == at.wrap {
            return None;
        }
        // SAFETY: as in `tail`; volatile, since the guest may write meanwhile.
        let addr = unsafe { self.place(at.slot).read_volatile() };
        Some(Slot { addr: u64::from_le(addr), len: tail as u32, id: (tail >> 32) as u16, flags })
    }

    #[inline]
    fn event(&self, place: *mut u16) -> &AtomicU16 {
        // SAFETY: `place` is one of the two words of an event area, which `map` checked and which is aligned to 4.
        unsafe { AtomicU16::from_ptr(place) }
    }

    /// Marks the device's event area if its changes are logged.
    fn mark_event(&self) {
        if self.config.log.is_some()
            && let Some(mut marks) = self.memory.dirty()
        {
            marks.place(self.device.cast(), EVENT_BYTES);
            marks.finish();
        }
    }

    /// Marks slots that were changed.
    #[cold]
    fn mark_slots(&self, slots: impl IntoIterator<Item = u32>) {
        let Some(mut marks) = self.memory.dirty() else { return };
        for slot in slots {
            marks.place(self.place(slot).cast(), DESCRIPTOR);
        }
        marks.finish();
    }

    fn has_next(&self, position: &Position) -> bool {
        self.read(position.next).is_some()
    }
}

/// A descriptor, read once.
#[derive(Debug, Clone, Copy)]
struct Slot {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

impl Ring for PackedRing {
    type Work<'r> = PackedWork<'r>;

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    #[inline]
    fn try_lock(&self, direction: Direction) -> Option<PackedWork<'_>> {
        Some(PackedWork::new(self, direction, self.position.try_lock()?))
    }

    #[inline]
    fn lock(&self, direction: Direction) -> PackedWork<'_> {
        PackedWork::new(self, direction, self.position.lock())
    }

    #[inline]
    fn lock_in_time(&self, direction: Direction) -> Option<PackedWork<'_>> {
        Some(PackedWork::new(self, direction, self.position.lock_in_time()?))
    }

    fn enable_notification(&self) -> bool {
        let Some(position) = self.position.try_lock() else { return true };
        if self.config.event_idx {
            self.event(self.device).store(position.next.index().to_le(), Ordering::Release);
        }
        let how = if self.config.event_idx { EVENT_AT } else { EVENT_ENABLE };
        self.event(self.device.wrapping_add(1)).store(how.to_le(), Ordering::Release);
        self.mark_event();
        // Our request must be visible before we look for the last time, or a chain could slip through unnoticed.
        fence(Ordering::SeqCst);
        self.has_next(&position)
    }

    fn disable_notification(&self) {
        self.event(self.device.wrapping_add(1)).store(EVENT_DISABLE.to_le(), Ordering::Release);
        self.mark_event();
    }

    fn silence(&self) {
        self.disable_notification();
    }

    fn base(&self) -> u32 {
        let index = u32::from(self.position.lock().next.index());
        index | (index << 16)
    }

    fn moved_to(&self, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        let old = self.position.lock();
        let position = Position { next: old.next, decided: old.decided, hints: Hints::default() };
        Ok(Self { journal: self.journal.clone(), ..Self::map(&self.config, memory, position)? })
    }
}

/// A used element: what is written over the second half of a slot.
fn element(id: u16, len: u32, flags: u16) -> u64 {
    u64::from(len) | (u64::from(id) << 32) | (u64::from(flags) << 48)
}

/// The flags of a used element of the chain at `at`.
fn used_flags(at: Cursor, direction: Direction) -> u16 {
    let wrap = if at.wrap { AVAIL | USED } else { 0 };
    wrap | direction.flag()
}

/// Chains completed and not yet marked as used, each in one number: length, id, and the position that it was taken from.
#[derive(Debug)]
struct Pending {
    /// Only the first `count` are written; there is one of these for each burst.
    chains: [MaybeUninit<u64>; PENDING],
    count: usize,
}

impl Pending {
    #[inline]
    fn new() -> Self {
        Self { chains: [MaybeUninit::uninit(); PENDING], count: 0 }
    }

    fn is_full(&self) -> bool {
        self.count >= PENDING
    }

    /// Adds one, if there is room.
    #[inline]
    fn push(&mut self, chain: Chain, len: u32) {
        if let Some(place) = self.chains.get_mut(self.count) {
            place.write(u64::from(len) | u64::from(chain.id) << 32 | u64::from(chain.at) << 48);
            self.count += 1;
        }
    }

    /// Slots and used elements, in the order of completion.
    #[inline]
    fn elements(&self, direction: Direction) -> impl DoubleEndedIterator<Item = (u32, u64)> {
        let written = self.chains.iter().take(self.count);
        written.map(move |chain| {
            // SAFETY: `push` has written the first `count`.
            let chain = unsafe { chain.assume_init() };
            let at = Cursor::of((chain >> 48) as u16);
            (at.slot, element((chain >> 32) as u16, chain as u32, used_flags(at, direction)))
        })
    }
}

/// A packed ring held for one burst.
#[derive(Debug)]
pub struct PackedWork<'r> {
    ring: &'r PackedRing,
    direction: Direction,
    position: SpinGuard<'r, Position>,
    /// Next slot to take.
    cursor: Cursor,
    /// Chains taken since the ring was locked.
    taken: u32,
    /// The chain completed last; at first one of no slots before the next.
    last: Chain,
    /// Where what is marked as used next was taken from.
    flushed: Cursor,
    pending: Pending,
    published: bool,
    walked: Walked,
}

/// Where taking stood.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    cursor: Cursor,
    taken: u32,
}

impl<'r> PackedWork<'r> {
    #[inline]
    fn new(ring: &'r PackedRing, direction: Direction, position: SpinGuard<'r, Position>) -> Self {
        let cursor = position.next;
        Self {
            ring,
            direction,
            position,
            cursor,
            taken: 0,
            last: Chain { id: 0, at: cursor.index().into(), slots: 0 },
            flushed: cursor,
            pending: Pending::new(),
            published: false,
            walked: Walked::default(),
        }
    }

    /// The slot's buffer if it is a chain of its own, in one piece.
    #[inline]
    fn single(&self, slot: Slot, locator: &mut Locator<'r>) -> Option<Segment<'r>> {
        if slot.flags & (INDIRECT | NEXT | WRITE) != self.direction.flag() {
            return None;
        }
        locator.whole(slot.addr, slot.len)
    }

    /// Follows a chain from its first slot. Returns its buffer id and its number of slots.
    fn follow(
        &self,
        first: Slot,
        buffers: &mut Buffers<'r, impl FnMut(Segment<'r>)>,
        hints: &mut Hints,
    ) -> Result<(u16, u32), Fault> {
        let (mut slot, mut at, mut slots) = (first, self.cursor, 1u32);
        loop {
            if slot.flags & INDIRECT != 0 {
                // 2.8.7: neither with a next one nor within a chain.
                if slot.flags & NEXT != 0 || slots > 1 || !self.ring.config.indirect {
                    return Err(Fault::BadIndirect);
                }
                buffers.table(slot.addr, slot.len, hints)?;
                return Ok((slot.id, 1));
            }
            buffers.buffer(slot.addr, slot.len, slot.flags, hints)?;
            if slot.flags & NEXT == 0 {
                return Ok((slot.id, slots));
            }
            if slots >= self.ring.size {
                return Err(Fault::ChainLoop);
            }
            at = at.advance(1, self.ring.size);
            // 2.8.6: the driver marks the first slot of a chain last, so all of it has to be there.
            slot = self.ring.read(at).ok_or(Fault::DescriptorIndex)?;
            slots += 1;
        }
    }

    /// Where what is completed next was taken from.
    #[inline]
    fn completing(&self) -> Cursor {
        Cursor::of(self.last.at as u16).advance(self.last.slots, self.ring.size)
    }

    /// Marks everything completed as used, the first one last.
    fn flush(&mut self) {
        let (ring, direction) = (self.ring, self.direction);
        let elements = || self.pending.elements(direction);
        if let Some(entry) = ring.journal.as_ref().filter(|_| direction == Direction::ToGuest && self.pending.count > 0)
        {
            let completing = self.completing();
            entry.redo(self.flushed.index(), completing.index(), elements());
            self.flushed = completing;
        }
        let mut rest = elements();
        let first = rest.next();
        for (slot, element) in rest.rev() {
            ring.tail(slot).store(element.to_le(), Ordering::Relaxed);
        }
        if let Some((slot, element)) = first {
            ring.tail(slot).store(element.to_le(), Ordering::Release);
            self.published = true;
        }
        if ring.config.log.is_some() {
            ring.mark_slots(elements().map(|(slot, _)| slot));
        }
        self.pending.count = 0;
    }
}

impl<'r> Work<'r> for PackedWork<'r> {
    type Mark = Mark;

    #[inline]
    fn available(&mut self) -> Result<bool, Fault> {
        Ok(self.ring.read(self.cursor).is_some())
    }

    #[inline]
    fn look_ahead(&mut self, ahead: &mut Ahead<'r>, wanted: usize) -> Result<(), Fault> {
        ahead.begin(self.taken);
        let (mut at, mut locator) = (self.cursor, self.ring.memory.locator(self.position.hints.buffers));
        for _ in 0..wanted.min(BURST) {
            let Some(slot) = self.ring.read(at) else { break };
            // Where the chain after a longer one begins is not known yet.
            let Some(buffer) = self.single(slot, &mut locator) else { break };
            ahead.push(slot.id, Some(buffer), self.direction);
            at = at.advance(1, self.ring.size);
        }
        self.position.hints.buffers = locator.hint();
        Ok(())
    }

    #[inline]
    fn take_ahead(&mut self, ahead: &Ahead<'r>) -> Option<(Chain, Segment<'r>)> {
        let (id, buffer) = ahead.get(self.taken)?;
        let chain = Chain { id, at: self.cursor.index().into(), slots: 1 };
        self.cursor = self.cursor.advance(1, self.ring.size);
        self.taken += 1;
        Some((chain, buffer))
    }

    fn take(&mut self, sink: impl FnMut(Segment<'r>)) -> Result<Option<(Chain, u64)>, Fault> {
        let Some(first) = self.ring.read(self.cursor) else { return Ok(None) };
        let mut buffers = Buffers::new(&self.ring.memory, self.direction, sink);
        let mut hints = self.position.hints;
        let (id, slots) = self.follow(first, &mut buffers, &mut hints)?;
        self.position.hints = hints;
        let (bytes, count) = (buffers.bytes(), buffers.count());
        self.walked.add(count)?;
        let chain = Chain { id, at: self.cursor.index().into(), slots };
        self.cursor = self.cursor.advance(slots, self.ring.size);
        self.taken += 1;
        Ok(Some((chain, bytes)))
    }

    fn mark(&self) -> Mark {
        Mark { cursor: self.cursor, taken: self.taken }
    }

    fn rewind(&mut self, mark: Mark) {
        (self.cursor, self.taken) = (mark.cursor, mark.taken);
    }

    fn most_chains(&self) -> usize {
        PENDING
    }

    fn begin_frame(&mut self, chains: usize) {
        if self.pending.count + chains > PENDING {
            self.flush();
        }
    }

    #[inline]
    fn complete(&mut self, chain: Chain, len: u32) {
        if self.pending.is_full() {
            self.flush();
        }
        self.pending.push(chain, len);
        self.last = chain;
    }

    #[inline]
    fn intend(&self) {
        if let Some(entry) = &self.ring.journal {
            entry.intend(self.position.next.index(), self.completing().index());
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        self.flush();
        self.position.next = self.completing();
        std::mem::take(&mut self.published)
    }

    #[inline]
    fn needs_notification(&mut self) -> bool {
        let (mut old, new) = (self.position.decided, self.position.next.slot as u16);
        self.position.decided = new;
        // The slots must be seen as used before we look whether anyone waits for them.
        fence(Ordering::SeqCst);
        let how = u16::from_le(self.ring.event(self.ring.driver.wrapping_add(1)).load(Ordering::Acquire));
        if how != EVENT_AT || !self.ring.config.event_idx {
            return how != EVENT_DISABLE;
        }
        let event = u16::from_le(self.ring.event(self.ring.driver).load(Ordering::Acquire));
        if new <= old {
            old = old.wrapping_sub(self.ring.size as u16);
        }
        let mut at = event & !WRAP;
        if (event & WRAP != 0) != self.position.next.wrap {
            at = at.wrapping_sub(self.ring.size as u16);
        }
        new.wrapping_sub(at).wrapping_sub(1) < new.wrapping_sub(old)
    }
}
