//! Primitives that the control side and the workers meet over. No worker ever waits here for the control side.

mod epoch;
mod mailbox;
mod spin;

use std::io;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

pub use epoch::Epoch;
pub use mailbox::Mailbox;
pub use spin::{SpinGuard, SpinLock};

/// Of a thread that closes.
const STACK: usize = 32 << 10;

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

/// Drops descriptors of a frontend in a thread of their own: who closes a stream closes what was sent along in unread messages,
/// too, and with a TCP socket among that it may wait for as long as the frontend likes.
///
/// # Errors
/// If the process has no thread left. They stay open then.
pub(crate) fn close_apart(fds: impl Send + 'static) -> io::Result<()> {
    let fds = ManuallyDrop::new(fds);
    let close = move || drop(ManuallyDrop::into_inner(fds));
    thread::Builder::new().name("sl-close".into()).stack_size(STACK).spawn(close).map(drop)
}
