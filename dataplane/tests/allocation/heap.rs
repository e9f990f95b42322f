//! An allocator that notices the workers.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The system's allocator, which notices the workers.
struct Watched;

static IS_ON: AtomicBool = AtomicBool::new(false);
/// Calls by workers while it was on.
static CALLS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static HEAP: Watched = Watched;

// SAFETY: everything is the system allocator's doing.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        notice();
        // SAFETY: by the caller's contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        notice();
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// Counts a call if a worker makes it. Of the first one it tells where it came from.
fn notice() {
    if !IS_ON.load(Ordering::Relaxed) {
        return;
    }
    let mut name = [0u8; 16];
    // SAFETY: there is room for a thread's name, which is 16 bytes at most.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    // What tells it allocates, too.
    if name.starts_with(b"sl-worker-") && CALLS.fetch_add(1, Ordering::Relaxed) == 0 {
        eprintln!("a worker allocates or frees:\n{}", Backtrace::force_capture());
    }
}

/// Has the workers watched meanwhile, and gives how often they have called the allocator.
pub(crate) fn watched(act: impl FnOnce()) -> u64 {
    CALLS.store(0, Ordering::Relaxed);
    IS_ON.store(true, Ordering::SeqCst);
    act();
    IS_ON.store(false, Ordering::SeqCst);
    CALLS.load(Ordering::Relaxed)
}
