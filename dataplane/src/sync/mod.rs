//! Primitives that the control side and the workers meet over. No worker ever waits here for the control side.

mod epoch;
mod mailbox;
mod spin;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use epoch::Epoch;
pub use mailbox::Mailbox;
pub use spin::{SpinGuard, SpinLock};

/// What loom puts its own in place of, when it compiles some of our modules for its models (`models/`).
pub(crate) mod primitives {
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU16, AtomicU64, Ordering, fence};
}

/// Locks what the control side's threads share. A panic of one of them elsewhere does not keep the others out: what is locked
/// is replaced as a whole, or whole after each statement.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
