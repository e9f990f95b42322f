//! The dataplane's `sync`, over loom.

/// Loom's primitives.
pub mod primitives {
    pub use loom::sync::Arc;
    pub use loom::sync::atomic::{AtomicPtr, AtomicU16, AtomicU64, Ordering, fence};
}

#[path = "../../../dataplane/src/sync/epoch.rs"]
pub mod epoch;

#[path = "../../../dataplane/src/sync/mailbox.rs"]
pub mod mailbox;
