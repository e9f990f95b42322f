//! Primitives that the control side and the workers meet over. No worker ever waits here for the control side.

mod mailbox;
mod spin;

pub use mailbox::Mailbox;
pub use spin::{SpinGuard, SpinLock};
