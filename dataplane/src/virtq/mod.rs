//! Virtqueues, the device's side: rings over cached host pointers, worked in bursts.
//!
//! Everything read here is written by a hostile guest: each field is read once, bounded, and only then used.

pub mod chain;
pub mod journal;
pub mod notify;
pub mod packed;
pub mod ring;
pub mod split;
mod suppress;

use std::sync::Arc;

use crate::limits::MAX_RING;
use crate::mem::GuestMemory;
use packed::PackedRing;
use ring::Ring;
use split::SplitRing;

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// What a guest or its VMM did so wrong that its port is stopped until it resets.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Fault { $($(#[$doc])* $name = $code,)* }

        impl Fault {
            /// Every fault there is.
            pub const ALL: &'static [Fault] = &[$(Fault::$name),*];
        }

        impl std::fmt::Display for Fault {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Fault::$name => $text,)* })
            }
        }
    };
}

faults! {
    /// The available index ran ahead of the ring.
    AvailIndex = 1, "the available index moved by more than the ring's size";
    /// A descriptor index beyond the ring or table.
    DescriptorIndex = 2, "a descriptor index lies outside its ring or table";
    /// A chain that does not end.
    ChainLoop = 3, "a descriptor chain is longer than its ring, or loops";
    /// An address that no memory region covers.
    UnmappedAddress = 4, "a descriptor points outside of guest memory";
    /// An indirect descriptor within an indirect table, or with a next one, or where none was negotiated.
    BadIndirect = 5, "an indirect descriptor where none is allowed";
    /// An indirect table whose length is no multiple of 16, or zero, or too large.
    IndirectLength = 6, "the length of an indirect table is invalid";
    /// A buffer to write to among those to read from, or the reverse.
    WrongDirection = 7, "a descriptor's direction is wrong for its queue";
    /// More buffers in one chain than any driver makes.
    ChainTooLong = 8, "a descriptor chain has more than 1024 buffers";
    /// The file behind guest memory or the dirty log was truncated, or the host has a page less than it promised.
    MemoryLost = 9, "memory of the guest has gone: its file was truncated, or the host ran out of pages for it; restart the VM";
    /// A write to the notification descriptor had to wait.
    NotifyBlocked = 10, "the frontend made its notification descriptor block; connect it anew";
    /// Chains whose many buffers hold next to nothing, so that frames cost far more than their bytes.
    Wasteful = 11, "it takes more than 32768 buffers to receive one burst of frames";
}

impl Fault {
    /// A non-zero number for it.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The fault with that number.
    pub fn from_code(code: u8) -> Option<Self> {
        if code == 0 {
            return None;
        }
        Self::ALL.iter().copied().find(|fault| fault.code() == code)
    }
}

impl std::error::Error for Fault {}

/// Why a ring cannot be set up as the frontend asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Size zero, above 32,768, or no power of two in a split ring.
    #[error("ring size {0} is not a power of two of at most {MAX_RING}")]
    Size(u32),
    /// A packed ring's base beyond its size.
    #[error("base {0:#x} lies beyond the ring")]
    Base(u32),
    /// One of the ring's areas lies outside of guest memory.
    #[error("the {0} area of a ring lies outside of guest memory")]
    Unmapped(&'static str),
    /// A packed ring goes on after a crash, and nothing says where.
    #[error("nothing is known of where the ring stands")]
    Lost,
    /// One of the ring's areas is not aligned.
    #[error("the {0} area of a ring is not aligned")]
    Unaligned(&'static str),
}

/// Where a ring lies and how it is worked, as set by the frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Descriptors.
    pub size: u32,
    /// Descriptor table, in the frontend's address space.
    pub desc: u64,
    /// Driver area (available ring).
    pub avail: u64,
    /// Device area (used ring).
    pub used: u64,
    /// `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// `VIRTIO_F_RING_PACKED` was negotiated. Then the areas are the descriptor ring, and the driver's and the device's
    /// event suppression.
    pub packed: bool,
    /// Guest physical address of the used ring, if writes to it are to be marked in the dirty log
    /// (`VHOST_VRING_F_LOG`). A packed ring's slots are marked where they are.
    pub log: Option<u64>,
}

/// How a ring's positions are written down.
#[derive(Debug, Clone)]
pub struct Journaled {
    /// Where.
    pub entry: Arc<journal::Entry>,
    /// What the ring is for.
    pub direction: chain::Direction,
    /// Go on where the record says, which knows better than a frontend that has lost its backend.
    pub recover: bool,
    /// The driver cannot have begun anew since.
    pub same: bool,
}

/// A ring of either layout.
#[derive(Debug, Clone)]
pub enum Vring {
    /// virtio 1.2, 2.7.
    Split(Arc<SplitRing>),
    /// virtio 1.2, 2.8.
    Packed(Arc<PackedRing>),
}

impl Vring {
    /// Sets a ring up. `base` is where the frontend remembers it to stand; a split ring knows better by itself.
    ///
    /// # Errors
    /// [`RingError`] if its size or place is invalid.
    pub fn new(config: &RingConfig, memory: Arc<GuestMemory>, base: u32) -> Result<Self, RingError> {
        Self::with_journal(config, memory, base, None)
    }

    /// As [`Vring::new`], for a ring whose positions are written down, and that may have been left in the midst of a batch.
    ///
    /// # Errors
    /// As [`Vring::new`].
    pub fn with_journal(
        config: &RingConfig,
        memory: Arc<GuestMemory>,
        base: u32,
        journal: Option<Journaled>,
    ) -> Result<Self, RingError> {
        Ok(if config.packed {
            Self::Packed(Arc::new(PackedRing::with_journal(config, memory, base, journal)?))
        } else {
            Self::Split(Arc::new(SplitRing::with_journal(config, memory, journal)?))
        })
    }

    /// As [`Ring::moved_to`].
    ///
    /// # Errors
    /// [`RingError`] if it is no longer within guest memory.
    pub fn moved_to(&self, memory: Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(match self {
            Self::Split(ring) => Self::Split(Arc::new(ring.moved_to(memory)?)),
            Self::Packed(ring) => Self::Packed(Arc::new(ring.moved_to(memory)?)),
        })
    }

    /// As [`Ring::base`].
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => ring.base(),
            Self::Packed(ring) => ring.base(),
        }
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod packed_tests;
#[cfg(test)]
mod tests;
