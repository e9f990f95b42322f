//! The heap: how the C library's allocator is set for a daemon that lives long, and how much of it is in use.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Larger pieces of memory, such as the counters of a port, are mapped by themselves, and go back to the system when they
/// are freed. As holes in the heap they would make it grow while ports come and go.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 16 << 10;

/// Bytes that are allocated and not freed.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// Sets the C library's allocator. It keeps freed memory, and more the longer it runs, for each heap what its threads once
/// needed. One heap is enough: what a port's thread leaves behind is used again by the next, and workers do not allocate.
/// To be called before there is another thread.
pub fn settle() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: takes no pointers.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Bytes that are allocated and not freed, if the program's allocator is [`Counting`]; else 0. The process holds more: holes,
/// and what the C library keeps for each thread.
pub fn in_use() -> u64 {
    IN_USE.load(Ordering::Relaxed) as u64
}

/// The system's allocator, with what is in use counted. Workers do not allocate, so that the counter costs them nothing.
#[derive(Debug)]
pub struct Counting;

// SAFETY: everything is the system allocator's doing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract, which is the same.
        counted(unsafe { System.alloc(layout) }, layout.size(), 0)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        counted(unsafe { System.alloc_zeroed(layout) }, layout.size(), 0)
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        counted(unsafe { System.realloc(ptr, layout, size) }, size, layout.size())
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// Counts what `ptr` is, if it is anything, instead of what was there before.
fn counted(ptr: *mut u8, now: usize, before: usize) -> *mut u8 {
    if !ptr.is_null() {
        // Wraps around when it shrinks, which is right.
        IN_USE.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
    }
    ptr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_is_counted() {
        let before = in_use();
        let (small, large) = (Layout::new::<[u64; 5]>(), Layout::new::<[u64; 50_000]>());
        // SAFETY: each piece of memory is freed, or resized, once, with the layout that it has then.
        unsafe {
            let ptr = Counting.alloc(small);
            assert_eq!(in_use() - before, 40);
            let ptr = Counting.realloc(ptr, small, large.size());
            assert_eq!(in_use() - before, 400_000);
            let ptr = Counting.realloc(ptr, large, 40);
            let zeroed = Counting.alloc_zeroed(small);
            assert_eq!(in_use() - before, 80);
            Counting.dealloc(ptr, small);
            Counting.dealloc(zeroed, small);
        }
        assert_eq!(in_use(), before);
    }
}
