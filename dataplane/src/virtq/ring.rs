//! What both layouts of a virtqueue have in common, for those who work them.
//!
//! A [`Ring`] is held for one burst as its [`Work`]. Chains are taken one after the other, completed in the same order,
//! and published together; chains that were taken but not completed can be given back by going back to a mark.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::Arc;

use crate::limits::{BURST, MAX_BURST_BUFFERS};
use crate::mem::{GuestMemory, Segment};
use crate::virtq::chain::Direction;
use crate::virtq::{Fault, RingError};

/// A chain taken from a ring. Not in smaller numbers, which would be written apart and read together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chain {
    /// Index of its first descriptor (split), or its buffer id (packed).
    pub(super) id: u16,
    /// Position in the ring that it was taken from (packed).
    pub(super) at: u32,
    /// Ring slots it takes (packed).
    pub(super) slots: u32,
}

/// One side of a queue pair, in either layout.
pub trait Ring: Send + Sync + std::fmt::Debug + Sized + 'static {
    /// The ring, held.
    type Work<'r>: Work<'r>;

    /// The memory that it lies in, and its buffers.
    fn memory(&self) -> &GuestMemory;

    /// Takes the ring for one burst, if no other worker has it.
    fn try_lock(&self, direction: Direction) -> Option<Self::Work<'_>>;

    /// Takes the ring for one burst, after another worker that has it, however long that takes.
    fn lock(&self, direction: Direction) -> Self::Work<'_>;

    /// Takes the ring for one burst, after another worker that has it, unless that one does not come to an end.
    fn lock_in_time(&self, direction: Direction) -> Option<Self::Work<'_>>;

    /// Asks the driver to notify us of the next chain, and returns whether there is one already.
    fn enable_notification(&self) -> bool;

    /// Asks the driver not to notify us, since we poll.
    fn disable_notification(&self);

    /// Asks the driver not to notify us for as long as that can be asked. Not while the ring is published.
    fn silence(&self);

    /// Where it stands, in the form of `GET_VRING_BASE` (vhost-user, "Ring states"). Not while it is published.
    fn base(&self) -> u32;

    /// The same ring after a change of the memory table, continuing where it is. Not while it is published.
    ///
    /// # Errors
    /// [`RingError`] if it is no longer within guest memory.
    fn moved_to(&self, memory: Arc<GuestMemory>) -> Result<Self, RingError>;
}

/// A ring held for one burst.
pub trait Work<'r>: Sized {
    /// Where taking stands, to go back to.
    type Mark: Copy;

    /// Whether there is a chain to take.
    ///
    /// # Errors
    /// [`Fault`] if there are more than the ring can hold.
    fn available(&mut self) -> Result<bool, Fault>;

    /// Looks at up to `wanted` of the next chains, at most a burst.
    ///
    /// # Errors
    /// As [`Work::available`].
    fn look_ahead(&mut self, ahead: &mut Ahead<'r>, wanted: usize) -> Result<(), Fault>;

    /// Takes the next chain if it was looked at and is one buffer in one piece; anything else is for [`Work::take`].
    fn take_ahead(&mut self, ahead: &Ahead<'r>) -> Option<(Chain, Segment<'r>)>;

    /// Takes the next chain and hands its buffers to `sink`. Returns it and its bytes in sum; `None` if there is none.
    ///
    /// # Errors
    /// [`Fault`] if the chain breaks a rule.
    fn take(&mut self, sink: impl FnMut(Segment<'r>)) -> Result<Option<(Chain, u64)>, Fault>;

    /// Where taking stands.
    fn mark(&self) -> Self::Mark;

    /// Gives back what was taken after the mark. None of it may have been completed.
    fn rewind(&mut self, mark: Self::Mark);

    /// Chains that one frame may take: as many as can become visible to the driver at the same time.
    fn most_chains(&self) -> usize {
        usize::MAX
    }

    /// Sees to it that the driver sees nothing of the next `chains`, at most [`Work::most_chains`], before all of them are
    /// completed: they are one frame. What was completed before may become visible now.
    fn begin_frame(&mut self, chains: usize) {
        let _ = chains;
    }

    /// Completes a chain, into which `len` bytes were written. In the order in which chains were taken. The driver need not
    /// see it before [`Work::publish`].
    fn complete(&mut self, chain: Chain, len: u32);

    /// Writes down that what was completed is about to be delivered, for the next process should this one die.
    fn intend(&self);

    /// Gives everything completed back to the driver. Returns whether there was anything.
    fn publish(&mut self) -> bool;

    /// Whether the driver wants to be notified of what was published since the last call.
    fn needs_notification(&mut self) -> bool;
}

/// Buffers looked at since the ring was locked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Walked(u32);

impl Walked {
    /// Adds those of one chain.
    #[inline]
    pub(super) fn add(&mut self, buffers: u32) -> Result<(), Fault> {
        self.0 += buffers;
        if self.0 > MAX_BURST_BUFFERS { Err(Fault::Wasteful) } else { Ok(()) }
    }
}

/// A look at the next chains, so that their buffers are on the way to our cache while we work on those before them.
///
/// Kept as plain numbers in arrays of their own: values that are written in parts and read as a whole right after
/// stall the processor. For the same reason counters here and in the rings' works have 32 bits.
#[derive(Debug)]
pub struct Ahead<'r> {
    /// Count of chains taken before the first one.
    first: u32,
    /// Chains that were looked at. What is noted of others is never written, not even cleared: there is one of these for each
    /// burst.
    count: u32,
    ids: [MaybeUninit<u16>; BURST],
    places: [MaybeUninit<*mut u8>; BURST],
    lens: [MaybeUninit<u32>; BURST],
    memory: PhantomData<&'r GuestMemory>,
}

impl Default for Ahead<'_> {
    #[inline]
    fn default() -> Self {
        Self {
            first: 0,
            count: 0,
            ids: [MaybeUninit::uninit(); BURST],
            places: [MaybeUninit::uninit(); BURST],
            lens: [MaybeUninit::uninit(); BURST],
            memory: PhantomData,
        }
    }
}

impl<'r> Ahead<'r> {
    /// Forgets all, to begin with the chain after `first` ones.
    #[inline]
    pub(super) fn begin(&mut self, first: u32) {
        (self.first, self.count) = (first, 0);
    }

    /// Notes the next chain, and asks for its buffer if it is a single one.
    #[inline]
    pub(super) fn push(&mut self, id: u16, buffer: Option<Segment<'r>>, direction: Direction) {
        let index = self.count as usize;
        if index >= BURST {
            return;
        }
        if let Some(buffer) = buffer {
            match direction {
                Direction::FromGuest => buffer.prefetch_read(),
                Direction::ToGuest => buffer.prefetch_write(),
            }
        }
        let (place, len) = buffer.map_or((std::ptr::null_mut(), 0), Segment::into_parts);
        self.ids[index].write(id);
        self.places[index].write(place);
        self.lens[index].write(len);
        self.count += 1;
    }

    /// The chain after `taken` ones, if it was looked at and is a single buffer.
    #[inline]
    pub(super) fn get(&self, taken: u32) -> Option<(u16, Segment<'r>)> {
        let index = taken.wrapping_sub(self.first) as usize;
        if index >= self.count as usize || index >= BURST {
            return None;
        }
        // SAFETY: `push` wrote everything before `count`.
        let (id, place, len) = unsafe {
            (self.ids[index].assume_init(), self.places[index].assume_init(), self.lens[index].assume_init())
        };
        // SAFETY: what `Segment::into_parts` gave for memory that is held for `'r`, or null.
        let single = unsafe { Segment::new(place, len) };
        Some((id, single?))
    }
}
