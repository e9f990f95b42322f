//! The four rings of an AF_XDP socket (Documentation/networking/af_xdp.rst, "Rings").
//!
//! Each has one side that produces and one that consumes: the kernel is the other side of all of ours. Cursors are u32
//! that run freely and wrap around; entries lie at the cursor modulo the size, which is a power of two.

use std::io::{Error, ErrorKind, Result};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::mapping::Mapping;

/// Where the parts of a ring are in its mapping (`struct xdp_ring_offset`), in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offsets {
    pub(super) producer: usize,
    pub(super) consumer: usize,
    pub(super) flags: usize,
    pub(super) entries: usize,
}

/// A ring as both sides see it.
#[derive(Debug)]
struct Shared<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    size: u32,
    /// Keeps all of the above mapped.
    _memory: Arc<Mapping>,
}

// SAFETY: the cursors are atomic, and entries are touched only by the side that they belong to at the moment.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T: Copy> Shared<T> {
    fn new(memory: Arc<Mapping>, offsets: &Offsets, size: u32) -> Result<Self> {
        let wrong = || Error::new(ErrorKind::InvalidData, "the kernel describes a ring outside of its mapping");
        if !size.is_power_of_two() {
            return Err(wrong());
        }
        Ok(Self {
            producer: memory.place(offsets.producer, 1).ok_or_else(wrong)?,
            consumer: memory.place(offsets.consumer, 1).ok_or_else(wrong)?,
            flags: memory.place(offsets.flags, 1).ok_or_else(wrong)?,
            entries: memory.place(offsets.entries, size as usize).ok_or_else(wrong)?,
            size,
            _memory: memory,
        })
    }

    #[inline]
    fn atomic(&self, place: NonNull<AtomicU32>) -> &AtomicU32 {
        // SAFETY: `new` checked that the place is inside the mapping and aligned; both sides use it atomically.
        unsafe { place.as_ref() }
    }

    #[inline]
    fn entry(&self, cursor: u32) -> NonNull<T> {
        // SAFETY: the index is below `size`, and `new` checked that so many entries are inside the mapping.
        unsafe { self.entries.add((cursor & (self.size - 1)) as usize) }
    }
}

/// Our side of the fill and the tx ring.
#[derive(Debug)]
pub(super) struct Producer<T> {
    shared: Shared<T>,
    /// Where the next entry goes; ahead of what is published.
    next: u32,
    /// The consumer's cursor as last read.
    seen: u32,
}

impl<T: Copy> Producer<T> {
    pub(super) fn new(memory: Arc<Mapping>, offsets: &Offsets, size: u32) -> Result<Self> {
        let shared = Shared::new(memory, offsets, size)?;
        let next = shared.atomic(shared.producer).load(Ordering::Relaxed);
        let seen = shared.atomic(shared.consumer).load(Ordering::Acquire);
        Ok(Self { shared, next, seen })
    }

    /// Entries that can be pushed. The kernel's cursor is read only if there seem to be fewer than `wanted`.
    #[inline]
    pub(super) fn room(&mut self, wanted: u32) -> u32 {
        let size = self.shared.size;
        if size.saturating_sub(self.next.wrapping_sub(self.seen)) < wanted {
            // Acquire: the kernel has read an entry before it says so.
            self.seen = self.shared.atomic(self.shared.consumer).load(Ordering::Acquire);
        }
        size.saturating_sub(self.next.wrapping_sub(self.seen))
    }

    /// Adds an entry, for the kernel to see with the next [`Producer::publish`]. `false` if there is no room.
    #[inline]
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.room(1) == 0 {
            return false;
        }
        // SAFETY: the kernel does not touch entries that are not published, and there is room.
        unsafe { self.shared.entry(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Shows the kernel what was pushed.
    #[inline]
    pub(super) fn publish(&mut self) {
        self.shared.atomic(self.shared.producer).store(self.next, Ordering::Release);
    }

    /// Entries that the kernel has not taken yet, published or not.
    #[inline]
    pub(super) fn pending(&self) -> u32 {
        self.next.wrapping_sub(self.shared.atomic(self.shared.consumer).load(Ordering::Acquire))
    }

    /// What the kernel does when it waits for a system call.
    #[cfg(test)]
    pub(super) fn ask_for_wakeup(&self) {
        self.shared.atomic(self.shared.flags).store(libc::XDP_RING_NEED_WAKEUP, Ordering::Relaxed);
    }

    /// Whether the kernel waits for a system call before it looks at the ring (`XDP_RING_NEED_WAKEUP`).
    #[inline]
    pub(super) fn needs_wakeup(&self) -> bool {
        self.shared.atomic(self.shared.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// Our side of the rx and the completion ring.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    shared: Shared<T>,
    /// Next entry to take; what is before it is released at once or later.
    next: u32,
    /// The producer's cursor as last read.
    seen: u32,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn new(memory: Arc<Mapping>, offsets: &Offsets, size: u32) -> Result<Self> {
        let shared = Shared::new(memory, offsets, size)?;
        let next = shared.atomic(shared.consumer).load(Ordering::Relaxed);
        let seen = shared.atomic(shared.producer).load(Ordering::Acquire);
        Ok(Self { shared, next, seen })
    }

    /// Entries that can be taken. The kernel's cursor is read only if there seem to be fewer than `wanted`.
    #[inline]
    pub(super) fn available(&mut self, wanted: u32) -> u32 {
        if self.seen.wrapping_sub(self.next) < wanted {
            // Acquire: the kernel has written an entry before it says so.
            self.seen = self.shared.atomic(self.shared.producer).load(Ordering::Acquire);
        }
        self.seen.wrapping_sub(self.next).min(self.shared.size)
    }

    /// The entry `offset` places behind the next one, which must be available.
    #[inline]
    pub(super) fn get(&self, offset: u32) -> T {
        debug_assert!(offset < self.seen.wrapping_sub(self.next));
        // SAFETY: the place is inside the ring, and the kernel does not touch entries that it has published.
        unsafe { self.shared.entry(self.next.wrapping_add(offset)).read() }
    }

    /// Gives the places of the next `count` entries, which must be available, back to the kernel.
    #[inline]
    pub(super) fn release(&mut self, count: u32) {
        self.next = self.next.wrapping_add(count);
        self.shared.atomic(self.shared.consumer).store(self.next, Ordering::Release);
    }

    /// Entries that we have not taken yet.
    #[inline]
    pub(super) fn pending(&self) -> u32 {
        self.shared.atomic(self.shared.producer).load(Ordering::Acquire).wrapping_sub(self.next)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const OFFSETS: Offsets = Offsets { producer: 0, consumer: 64, flags: 128, entries: 192 };

    /// A ring without a kernel: both ends are ours. Cursors start at `start`.
    pub(in super::super) fn ring<T: Copy>(size: u32, start: u32) -> (Producer<T>, Consumer<T>, Arc<Mapping>) {
        let memory = Arc::new(Mapping::anonymous(192 + size as usize * size_of::<T>()).unwrap());
        for offset in [OFFSETS.producer, OFFSETS.consumer] {
            // SAFETY: the place is inside the mapping, and nobody else uses it yet.
            unsafe { memory.place::<AtomicU32>(offset, 1).unwrap().as_ref() }.store(start, Ordering::Relaxed);
        }
        let producer = Producer::new(memory.clone(), &OFFSETS, size).unwrap();
        let consumer = Consumer::new(memory.clone(), &OFFSETS, size).unwrap();
        (producer, consumer, memory)
    }

    #[test]
    fn what_the_kernel_describes_is_checked() {
        let memory = Arc::new(Mapping::anonymous(4096).unwrap());
        for (offsets, size) in [
            (OFFSETS, 3),
            (OFFSETS, 1024),
            (Offsets { producer: 4094, ..OFFSETS }, 8),
            (Offsets { consumer: 66, ..OFFSETS }, 8),
            (Offsets { entries: usize::MAX - 7, ..OFFSETS }, 8),
        ] {
            assert!(Producer::<u64>::new(memory.clone(), &offsets, size).is_err());
        }
    }

    #[test]
    fn wakeup_flag() {
        let (producer, _consumer, memory) = ring::<u64>(4, 0);
        assert!(!producer.needs_wakeup());
        // SAFETY: the place is inside the mapping and used atomically.
        unsafe { memory.place::<AtomicU32>(OFFSETS.flags, 1).unwrap().as_ref() }.store(1, Ordering::Relaxed);
        assert!(producer.needs_wakeup());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(u8),
        Publish,
        Take(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![(0..20u8).prop_map(Step::Push), Just(Step::Publish), (0..20u8).prop_map(Step::Take)]
    }

    proptest! {
        #[test]
        fn is_a_bounded_queue(
            order in 0..5u32, start in prop_oneof![Just(0u32), any::<u32>(), u32::MAX - 20..=u32::MAX],
            steps in prop::collection::vec(step(), 0..60),
        ) {
            let size = 1 << order;
            let (mut producer, mut consumer, _memory) = ring(size, start);
            let (mut hidden, mut shown) = (VecDeque::new(), VecDeque::new());
            let mut value = 0;
            for step in steps {
                match step {
                    Step::Push(count) => for _ in 0..count {
                        let fits = hidden.len() + shown.len() < size as usize;
                        prop_assert_eq!(producer.push(value), fits);
                        if fits {
                            hidden.push_back(value);
                        }
                        value += 1;
                    },
                    Step::Publish => {
                        producer.publish();
                        shown.append(&mut hidden);
                    }
                    Step::Take(count) => {
                        let available = consumer.available(count.into());
                        prop_assert!(available as usize <= shown.len());
                        prop_assert!(available as usize >= shown.len().min(count.into()));
                        let count = available.min(count.into());
                        for offset in 0..count {
                            prop_assert_eq!(Some(consumer.get(offset)), shown.pop_front());
                        }
                        consumer.release(count);
                    }
                }
                prop_assert_eq!(producer.pending() as usize, hidden.len() + shown.len());
                prop_assert_eq!(consumer.pending() as usize, shown.len());
            }
        }
    }

    #[test]
    fn two_threads_see_the_same() {
        const COUNT: u64 = 100_000;
        let (mut producer, mut consumer, _memory) = ring(64, u32::MAX - 1000);
        let pushing = std::thread::spawn(move || {
            for value in 0..COUNT {
                while !producer.push(value) {
                    std::thread::yield_now();
                }
                producer.publish();
            }
        });
        let mut expected = 0;
        while expected < COUNT {
            let available = consumer.available(1);
            for offset in 0..available {
                assert_eq!(consumer.get(offset), expected);
                expected += 1;
            }
            consumer.release(available);
            if available == 0 {
                std::thread::yield_now();
            }
        }
        pushing.join().unwrap();
    }
}
