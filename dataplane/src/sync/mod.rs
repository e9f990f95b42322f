//! Primitives that the control side and the workers meet over. No worker ever waits here for the control side.

mod epoch;
mod mailbox;
mod spin;

pub use epoch::Epoch;
pub use mailbox::Mailbox;
pub use spin::{SpinGuard, SpinLock};

/// What loom puts its own in place of, when it compiles some of our modules for its models (`models/`).
pub(crate) mod primitives {
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU16, AtomicU64, Ordering, fence};
}
