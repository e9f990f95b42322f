//! Frames on their way through the switch.

/// Storage of one burst, reused.
#[derive(Debug)]
pub struct BurstStorage {}

/// A burst of frames from one queue.
#[derive(Debug)]
pub struct Burst<'m> {
    _storage: &'m mut BurstStorage,
}
