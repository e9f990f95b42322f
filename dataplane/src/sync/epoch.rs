//! How far a worker is with what the control side publishes.

use crate::sync::primitives::{AtomicU64, Ordering};

/// The number of the newest publication that a worker has taken up.
#[derive(Debug, Default)]
pub struct Epoch(AtomicU64);

impl Epoch {
    /// The worker uses this publication from now on, and nothing of those before it any more.
    #[inline]
    pub fn acknowledge(&self, epoch: u64) {
        self.0.store(epoch, Ordering::Release);
    }

    /// Whether the worker has got as far as that. If so, all that it did before is over.
    pub fn reached(&self, epoch: u64) -> bool {
        self.0.load(Ordering::Acquire) >= epoch
    }
}
