//! The two places where a wake-up could get lost: when we go to sleep, and when the driver does. On both sides one
//! writes, then looks at what the other wrote; with a full fence in between, at least one of them sees the other.
//!
//! Plain functions over atomics, so that loom can try every order of events (`models/`).

use crate::sync::primitives::{AtomicU16, Ordering, fence};

/// Writes our request to be notified to `place` and looks for the last time. Returns whether chains came meanwhile, so
/// that we must not sleep. `wrote` is called in between, before the look.
#[inline]
pub(crate) fn arm(place: &AtomicU16, request: u16, index: &AtomicU16, next: u16, wrote: impl FnOnce()) -> bool {
    place.store(request.to_le(), Ordering::Release);
    wrote();
    // Our request must be visible before we look, or a chain could slip through unnoticed.
    fence(Ordering::SeqCst);
    u16::from_le(index.load(Ordering::Acquire)) != next
}

/// Whether the driver wants to hear of used buffers, by its flags. Once they have been published.
#[inline]
pub(crate) fn wanted_by_flags(flags: &AtomicU16, no_interrupt: u16) -> bool {
    // What we published must be visible before we look whether anyone waits for it.
    fence(Ordering::SeqCst);
    u16::from_le(flags.load(Ordering::Acquire)) & no_interrupt == 0
}

/// Whether the driver wants to hear of used buffers, by its event index (virtio 1.2, 2.7.10). `old` and `new` are the
/// used index at the last decision and now, once that has been published.
#[inline]
pub(crate) fn wanted_by_event(event: &AtomicU16, old: u16, new: u16) -> bool {
    // As above.
    fence(Ordering::SeqCst);
    let event = u16::from_le(event.load(Ordering::Acquire));
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
