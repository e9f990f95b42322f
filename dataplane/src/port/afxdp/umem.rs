//! The frame pool (UMEM) of a queue, and the books on who owns which of its frames.
//!
//! A frame is either ours, which an [`OwnedFrame`] stands for, or lent to the kernel, which the [`Ledger`] notes. Only
//! the owner gets at the bytes. Whatever address the kernel returns is looked up before it is believed, so a frame can
//! neither be used twice nor get lost without being noticed.

use std::io::Result;

use super::mapping::Mapping;
use crate::mem::prefetch::{prefetch_read, prefetch_write};

/// Bytes of one frame (chunk, in the kernel's words): a page, so that a frame never crosses one.
pub(super) const CHUNK: usize = 4096;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of a request to who sends a frame, right before it: `struct xsk_tx_metadata`.
pub(super) const METADATA: usize = 24;

/// Frames of one queue, in one piece.
#[derive(Debug)]
pub(super) struct Umem {
    memory: Mapping,
}

/// The right to use one frame. Dropping it loses the frame, which the books then show.
#[derive(Debug)]
#[must_use]
pub(super) struct OwnedFrame(u32);

impl OwnedFrame {
    /// A multiple of a cache line, at most a quarter of a frame, that is another one for neighbours.
    #[inline]
    pub(super) fn colour(&self) -> usize {
        self.0 as usize * LINE % (CHUNK / 4)
    }
}

impl Umem {
    /// A pool of `frames` frames, with a ledger for each of the shares that they are split into.
    pub(super) fn new<const N: usize>(shares: [u32; N]) -> Result<(Self, [Ledger; N])> {
        let memory = Mapping::anonymous(shares.iter().sum::<u32>() as usize * CHUNK)?;
        // SAFETY: the range is the mapping; advice that fails changes nothing.
        unsafe { libc::madvise(memory.base().as_ptr().cast(), memory.len(), libc::MADV_DONTDUMP) };
        let mut first = 0;
        let ledgers = shares.map(|count| {
            let ledger = Ledger::new(first, count);
            first += count;
            ledger
        });
        Ok((Self { memory }, ledgers))
    }

    /// Address and length, for the kernel.
    pub(super) fn area(&self) -> (u64, u64) {
        (self.memory.base().as_ptr().expose_provenance() as u64, self.memory.len() as u64)
    }

    /// The bytes of a frame of ours.
    #[inline]
    pub(super) fn bytes<'f>(&'f self, frame: &'f OwnedFrame) -> &'f [u8] {
        // SAFETY: frames of one pool have numbers below its size. One that is ours is not written by the kernel, and
        // by us only through `bytes_mut`, which borrows it uniquely.
        unsafe { std::slice::from_raw_parts(self.start_of(frame), CHUNK) }
    }

    /// The bytes of a frame of ours, to write.
    #[inline]
    pub(super) fn bytes_mut<'f>(&'f self, frame: &'f mut OwnedFrame) -> &'f mut [u8] {
        // SAFETY: as for `bytes`; there is one `OwnedFrame` for each frame, and it is borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.start_of(frame), CHUNK) }
    }

    /// Asks for what short frames take, of `len` bytes from `offset` on in a frame, to read it soon.
    #[inline]
    pub(super) fn prefetch_read(&self, frame: &OwnedFrame, offset: usize, len: usize) {
        let place = self.start_of(frame).wrapping_add(offset);
        prefetch_read(place);
        if len > LINE {
            prefetch_read(place.wrapping_add(LINE));
        }
    }

    /// The same, to write.
    #[inline]
    pub(super) fn prefetch_write(&self, frame: &OwnedFrame, offset: usize) {
        prefetch_write(self.start_of(frame).wrapping_add(offset));
    }

    #[inline]
    fn start_of(&self, frame: &OwnedFrame) -> *mut u8 {
        let offset = frame.0 as usize * CHUNK;
        debug_assert!(offset + CHUNK <= self.memory.len());
        self.memory.base().as_ptr().wrapping_add(offset)
    }
}

/// The books on a share of a pool's frames.
#[derive(Debug)]
pub(super) struct Ledger {
    first: u32,
    free: Vec<OwnedFrame>,
    /// Of each frame, whether the kernel has it.
    is_lent: Box<[bool]>,
    lent: u32,
    /// Addresses that the kernel returned although it did not have them.
    strays: u64,
}

impl Ledger {
    fn new(first: u32, count: u32) -> Self {
        // The last in is the first out, so that the memory used most is in the cache.
        let free = (first..first + count).rev().map(OwnedFrame).collect();
        Self { first, free, is_lent: vec![false; count as usize].into_boxed_slice(), lent: 0, strays: 0 }
    }

    /// Takes a free frame.
    #[inline]
    pub(super) fn take(&mut self) -> Option<OwnedFrame> {
        self.free.pop()
    }

    /// The free frames that are taken next, at most `count`.
    #[inline]
    pub(super) fn next(&self, count: usize) -> impl Iterator<Item = &OwnedFrame> {
        self.free.iter().rev().take(count)
    }

    /// Puts a frame back that was not needed.
    #[inline]
    pub(super) fn put(&mut self, frame: OwnedFrame) {
        self.free.push(frame);
    }

    /// Number of free frames.
    #[inline]
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Notes that the kernel has a frame from now on. Returns the frame's address in the pool.
    #[inline]
    pub(super) fn lend(&mut self, frame: OwnedFrame) -> u64 {
        if let Some(lent) = self.is_lent.get_mut((frame.0 - self.first) as usize) {
            *lent = true;
            self.lent += 1;
        }
        u64::from(frame.0) * CHUNK as u64
    }

    /// Takes a frame back from the kernel, by any address in it. `None` if the kernel did not have it.
    #[inline]
    pub(super) fn take_back(&mut self, address: u64) -> Option<OwnedFrame> {
        let frame = u32::try_from(address / CHUNK as u64).ok();
        let place = frame.and_then(|frame| frame.checked_sub(self.first));
        match (frame, place.and_then(|place| self.is_lent.get_mut(place as usize))) {
            (Some(frame), Some(lent)) if *lent => {
                *lent = false;
                self.lent -= 1;
                Some(OwnedFrame(frame))
            }
            _ => {
                self.strays += 1;
                None
            }
        }
    }

    /// Closes the books: where all frames are, given how many lie in the ring towards the kernel and in the one back.
    pub(super) fn audit(&self, outbound: u32, inbound: u32) -> Audit {
        Audit {
            total: self.is_lent.len() as u32,
            free: self.free.len() as u32,
            outbound,
            inbound,
            kernel: i64::from(self.lent) - i64::from(outbound) - i64::from(inbound),
            strays: self.strays,
        }
    }
}

/// Where the frames of a share are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Audit {
    /// All of them.
    pub(super) total: u32,
    /// Free.
    pub(super) free: u32,
    /// In the ring towards the kernel: fill for receiving, tx for sending.
    pub(super) outbound: u32,
    /// In the ring back: rx for receiving, completion for sending.
    pub(super) inbound: u32,
    /// Taken by the kernel and not returned yet.
    pub(super) kernel: i64,
    /// Addresses returned that were not lent.
    pub(super) strays: u64,
}

impl std::fmt::Display for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { total, free, outbound, inbound, kernel, .. } = self;
        write!(f, "{total}: {free} free, {outbound} to the kernel, {kernel} with it, {inbound} back")
    }
}

impl Audit {
    /// Whether every frame is in exactly one place.
    pub(super) fn is_balanced(&self) -> bool {
        let known = i64::from(self.free) + i64::from(self.outbound) + i64::from(self.inbound) + self.kernel;
        known == i64::from(self.total) && self.kernel >= 0 && self.strays == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_in_one_place() {
        let (umem, [mut a, mut b]) = Umem::new([2, 3]).unwrap();
        let mut frame = b.take().unwrap();
        umem.bytes_mut(&mut frame)[..3].copy_from_slice(b"abc");
        assert_eq!(&umem.bytes(&frame)[..4], b"abc\0");
        let address = b.lend(frame);
        assert_eq!(address, 2 * CHUNK as u64);
        assert!(b.audit(1, 0).is_balanced() && !b.audit(2, 0).is_balanced());

        assert!(a.take_back(address).is_none(), "another share's frame");
        assert!(b.take_back(u64::MAX).is_none() && b.take_back(5 * CHUNK as u64).is_none());
        let frame = b.take_back(address + 256).unwrap();
        assert_eq!(&umem.bytes(&frame)[..3], b"abc");
        assert!(b.take_back(address).is_none(), "returned twice");
        b.put(frame);
        assert_eq!((b.free(), b.audit(0, 0).kernel, b.audit(0, 0).strays), (3, 0, 3));
        let _lost = a.take();
        assert!(!a.audit(0, 0).is_balanced());
    }
}
