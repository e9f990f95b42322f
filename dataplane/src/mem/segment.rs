//! Pieces of memory that a frame consists of: the guest's, or our own.
//!
//! A [`Segment`] is a range that was validated once and stays mapped for the lifetime it carries. Its bytes may change
//! at any time, so they are only copied, never referred to.

use std::marker::PhantomData;
use std::ops::{Range, RangeInclusive};
use std::ptr::NonNull;

use crate::mem::prefetch::{prefetch_read, prefetch_write, write_hints_pay};

/// A validated range of memory that stays mapped for `'m`, to write to as well as to read from.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'m>(SourceSegment<'m>);

impl<'m> Segment<'m> {
    /// A piece of guest memory.
    ///
    /// # Safety
    /// `len` bytes from `ptr` must be mapped, readable and writable for `'m`, and no Rust reference may cover them.
    #[inline]
    pub unsafe fn new(ptr: *mut u8, len: u32) -> Option<Self> {
        Some(Self(SourceSegment { ptr: NonNull::new(ptr)?, len, memory: PhantomData }))
    }

    /// As an address and a length, to be kept.
    #[inline]
    pub fn into_parts(self) -> (*mut u8, u32) {
        (self.start(), self.0.len)
    }

    /// Asks for the first two cache lines, to read them soon.
    #[inline]
    pub fn prefetch_read(self) {
        prefetch_read(self.start());
        prefetch_read(self.start().wrapping_add(64));
    }

    /// Asks for the first two cache lines, to write them soon.
    #[inline]
    pub fn prefetch_write(self) {
        prefetch_write(self.start());
        prefetch_write(self.start().wrapping_add(64));
    }

    /// Where it is.
    #[inline]
    pub(super) fn start(self) -> *mut u8 {
        self.0.ptr.as_ptr()
    }

    /// Length in bytes.
    #[inline]
    pub fn len(self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing in it.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// What is left after the first `count` bytes, at most all.
    #[inline]
    pub fn skip(self, count: usize) -> Self {
        Self(self.0.skip(count))
    }

    /// Copies bytes from private memory to the beginning; as many as there is room for. Returns how many.
    #[inline]
    pub fn write(self, from: &[u8]) -> usize {
        let count = from.len().min(self.len());
        // SAFETY: the range is writable by the contract of `new` and at least `count` long, so is `from`; they do not
        // overlap since no reference covers the range.
        unsafe { copy(from.as_ptr(), self.start(), count) };
        count
    }

    /// Copies bytes from another segment to the beginning; as many as both have. Returns how many.
    #[inline]
    pub fn write_from(self, from: SourceSegment<'_>) -> usize {
        let count = from.len().min(self.len());
        if HINTED.contains(&count) && write_hints_pay() {
            lines(self.start(), count).for_each(|line| prefetch_write(line));
        }
        // SAFETY: both ranges are mapped and at least `count` long. They are distinct mappings, since a frame never goes
        // back to the port it came from.
        unsafe { std::ptr::copy_nonoverlapping(from.ptr.as_ptr(), self.start(), count) };
        count
    }

    /// The same range, to read from.
    #[inline]
    pub fn source(self) -> SourceSegment<'m> {
        self.0
    }
}

/// A validated range of memory to copy from; stays mapped for `'m`.
#[derive(Debug, Clone, Copy)]
pub struct SourceSegment<'m> {
    ptr: NonNull<u8>,
    len: u32,
    memory: PhantomData<&'m [u8]>,
}

impl<'m> SourceSegment<'m> {
    /// Private memory as the source of a copy.
    #[inline]
    pub fn from_slice(bytes: &'m [u8]) -> Self {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Self { ptr: NonNull::from(bytes).cast(), len, memory: PhantomData }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(self) -> usize {
        self.len as usize
    }

    /// Whether there is nothing in it.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// What is left after the first `count` bytes, at most all.
    #[inline]
    pub fn skip(self, count: usize) -> Self {
        let count = count.min(self.len());
        // SAFETY: `count` is within the range or one past its end.
        Self { ptr: unsafe { self.ptr.add(count) }, len: self.len - count as u32, memory: PhantomData }
    }

    /// Copies the first bytes into private memory; as many as both have. Returns how many.
    #[inline]
    pub fn read(self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.len());
        // SAFETY: the range is mapped and at least `count` long, so is `to`; `to` is borrowed uniquely, and no
        // reference covers guest memory, so they do not overlap.
        unsafe { copy(self.ptr.as_ptr(), to.as_mut_ptr(), count) };
        count
    }

    /// As the kernel wants it, for `writev`.
    pub fn iovec(self) -> libc::iovec {
        libc::iovec { iov_base: self.ptr.as_ptr().cast(), iov_len: self.len() }
    }
}

/// Unit of short copies, in bytes.
const CHUNK: usize = 16;
/// Copies longer than this are left to the library, which is better at them.
const SHORT: usize = 160;
/// Copies of so many bytes may ask for all that they will write; longer ones were not measured.
const HINTED: RangeInclusive<usize> = 256..=2048;
/// Bytes of a cache line.
const LINE: usize = 64;

/// A place in each cache line of a range.
#[inline]
fn lines(start: *mut u8, count: usize) -> impl Iterator<Item = *mut u8> {
    let skew = start.addr() % LINE;
    (0..skew + count).step_by(LINE).map(move |at| start.wrapping_sub(skew).wrapping_add(at))
}

/// Copies bytes. A few moves of fixed size are faster than a call for 76 bytes; the last move overlaps the one before it, so
/// that no byte beyond `count` is touched: it might lie in a cache line that somebody else has.
///
/// # Safety
/// `count` bytes must be readable at `from` and writable at `to`, without overlap.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: by the contract; each move ends at `count` at the latest.
    unsafe {
        let Some(last) = count.checked_sub(CHUNK).filter(|_| count <= SHORT) else {
            return std::ptr::copy_nonoverlapping(from, to, count);
        };
        let move_at = |at: usize| {
            let chunk = from.add(at).cast::<[u8; CHUNK]>().read_unaligned();
            to.add(at).cast::<[u8; CHUNK]>().write_unaligned(chunk);
        };
        let mut done = 0;
        // Most frames are either as short as they can be or long.
        if count >= 4 * CHUNK {
            (0..4).for_each(|chunk| move_at(chunk * CHUNK));
            done = 4 * CHUNK;
        }
        while done < last {
            move_at(done);
            done += CHUNK;
        }
        move_at(last);
    }
}

/// Storage for the segments of a burst, reused. Between bursts it holds nothing that anyone can reach.
#[derive(Debug)]
pub struct SegmentArena {
    store: Box<[SourceSegment<'static>]>,
}

// SAFETY: segments left over from the last burst are unreachable; the pointers in them are plain data by then.
unsafe impl Send for SegmentArena {}

impl SegmentArena {
    /// Room for `capacity` segments.
    pub fn new(capacity: usize) -> Self {
        let empty = SourceSegment { ptr: NonNull::dangling(), len: 0, memory: PhantomData };
        Self { store: vec![empty; capacity].into_boxed_slice() }
    }

    /// Begins a new burst: empty, for segments that live as long as this borrow.
    #[inline]
    pub fn begin(&mut self) -> Segments<'_> {
        Segments { store: &mut self.store, used: 0 }
    }
}

/// The segments of one burst.
#[derive(Debug)]
pub struct Segments<'m> {
    store: &'m mut [SourceSegment<'static>],
    used: usize,
}

impl<'m> Segments<'m> {
    /// Room left.
    #[inline]
    pub fn room(&self) -> usize {
        self.store.len() - self.used
    }

    /// Number of segments so far.
    #[inline]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Adds one; `false` if there is no room.
    #[inline]
    pub fn push(&mut self, segment: SourceSegment<'m>) -> bool {
        let Some(place) = self.store.get_mut(self.used) else { return false };
        // The lifetime is only forgotten in storage: `get` gives it back, and `begin` drops what was stored.
        *place = SourceSegment { ptr: segment.ptr, len: segment.len, memory: PhantomData };
        self.used += 1;
        true
    }

    /// Takes back what was added after `used` was read.
    #[inline]
    pub fn truncate(&mut self, used: usize) {
        self.used = self.used.min(used);
    }

    /// Some of the segments; empty if the range is not of this burst.
    #[inline]
    pub fn get(&self, range: Range<usize>) -> &[SourceSegment<'m>] {
        self.store[..self.used].get(range).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_what_fits() {
        let mut memory = [0u8; 8];
        // SAFETY: the array outlives the segment and is not touched while it lives.
        let segment = unsafe { Segment::new(memory.as_mut_ptr(), 8) }.unwrap();
        assert_eq!(segment.write(b"abc"), 3);
        assert_eq!(segment.skip(6).write(b"xyz"), 2);
        assert_eq!(segment.skip(3).write_from(SourceSegment::from_slice(b"12")), 2);
        assert!(segment.skip(9).is_empty());
        let mut out = [0u8; 16];
        assert_eq!(segment.source().read(&mut out), 8);
        assert_eq!(&out[..8], b"abc12\0xy");
    }

    /// What is written to so many bytes, with nothing beside them touched.
    fn written(len: usize, write: impl FnOnce(Segment<'_>)) -> Vec<u8> {
        let mut memory = vec![0xee; len + 40];
        // SAFETY: the vector is long enough and is not touched while the segment is in use.
        write(unsafe { Segment::new(memory[20..].as_mut_ptr(), len as u32) }.unwrap());
        assert!(memory[..20].iter().chain(&memory[20 + len..]).all(|byte| *byte == 0xee));
        memory[20..20 + len].to_vec()
    }

    #[test]
    fn copies_touch_nothing_else() {
        let source: Vec<u8> = (0..400u32).map(|at| at as u8).collect();
        for len in 0..=SHORT + 20 {
            let mut back = vec![0xdd; len + 20];
            let memory = written(len, |segment| {
                assert_eq!(segment.write(&source), len);
                assert_eq!(segment.source().read(&mut back), len);
            });
            assert_eq!((&memory[..], &back[..len]), (&source[..len], &source[..len]));
            assert!(back[len..].iter().all(|byte| *byte == 0xdd));
        }
    }

    #[test]
    fn each_line_of_a_range_is_named_once() {
        for (start, count) in [(0, 1), (0, 64), (0, 65), (63, 1), (63, 2), (12, 384), (140, 450), (1, 2048)] {
            let named: Vec<usize> =
                lines(std::ptr::without_provenance_mut(start), count).map(|at| at.addr() / LINE).collect();
            assert_eq!(named, (start / LINE..=(start + count - 1) / LINE).collect::<Vec<_>>(), "{start}, {count}");
        }
    }

    #[test]
    fn long_copies_touch_nothing_else() {
        let source: Vec<u8> = (0..3000u32).map(|at| at as u8).collect();
        for len in [255, 256, 257, 1450, 2048, 2049, 3000] {
            let memory = written(len, |segment| {
                assert_eq!(segment.write_from(SourceSegment::from_slice(&source)), len);
            });
            assert_eq!(memory, source[..len]);
        }
    }

    #[test]
    fn an_arena_keeps_to_its_burst() {
        let mut arena = SegmentArena::new(2);
        let mut burst = arena.begin();
        assert!(burst.push(SourceSegment::from_slice(b"a")) && burst.push(SourceSegment::from_slice(b"bc")));
        assert!(!burst.push(SourceSegment::from_slice(b"d")));
        assert_eq!(burst.get(1..2)[0].len(), 2);
        assert!(burst.get(1..3).is_empty());
        burst.truncate(1);
        assert_eq!(burst.room(), 1);
        assert_eq!(arena.begin().used(), 0);
    }
}
