//! What the bytes of a frame mean.
//!
//! Two kinds of types live here, apart from each other as in smoltcp: *checked views* ([`Ipv4`], [`Ipv6`], [`Tcp`])
//! that borrow bytes and read fields on demand, and *validated representations* ([`EthernetHeader`], [`Offload`]) that
//! own what the switch has decided to believe. Whoever holds one of either has passed its checks.
//!
//! # Contract
//!
//! Every byte that comes in here was chosen by a guest or by somebody on the network. Therefore
//!
//! * nothing in this module panics, whatever the input: lengths are checked where bytes are taken, never assumed;
//! * nothing loops longer than a named bound ([`MAX_TAGS`], [`MAX_EXTENSION_HEADERS`], [`MAX_SEGMENTS`]) or the length
//!   of the slice that was passed in;
//! * nothing allocates, locks or blocks, and nothing is `unsafe`.
//!
//! Offsets count bytes from the start of the frame (the first byte of the destination MAC) unless said otherwise.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::expect_used))]

pub mod checksum;
pub mod eth;
pub mod flow;
pub mod ip;
pub mod l4;
pub mod offload;
pub mod rarp;
pub mod segment;
pub mod vlan;

pub use checksum::{Sum, complete_partial};
pub use eth::{EthernetHeader, MAX_TAGS, MacAddr, ParseMacError};
pub use flow::flow_hash;
pub use ip::{Ip, Ipv4, Ipv6, MAX_EXTENSION_HEADERS, Transport};
pub use l4::Tcp;
pub use offload::{Csum, Gso, GsoKind, Offload, VirtioNetHdr};
pub use segment::{ChecksumMode, MAX_SEGMENT_HEADER, MAX_SEGMENTS, Segment, Segmenter};
pub use vlan::{Tci, insert_tag, strip_tag};

/// Why the switch refuses what a frame or its virtio-net header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The frame ends inside its headers.
    #[error("frame ends inside its headers")]
    Truncated,
    /// The checksum to complete lies beyond the end of the frame.
    #[error("checksum field outside of the frame")]
    CsumOutsideFrame,
    /// The checksum to complete covers the headers that the switch decides on, and might overwrite them.
    #[error("checksum starts before the transport header")]
    CsumBeforeTransport,
    /// `gso_type` is not among those we offer.
    #[error("unknown gso_type {0:#x}")]
    UnknownGsoType(u8),
    /// Segments without data.
    #[error("gso_size is 0")]
    ZeroGsoSize,
    /// Segmentation without a partial checksum, which virtio 1.2, section 5.1.6.2 demands with it.
    #[error("segmentation without NEEDS_CSUM")]
    GsoWithoutCsum,
    /// The frame's headers are not those that its segmentation promises.
    #[error("headers do not match the requested segmentation")]
    GsoMismatch,
    /// The headers are longer than [`MAX_SEGMENT_HEADER`].
    #[error("headers too long to segment")]
    HeaderTooLong,
    /// More segments than [`MAX_SEGMENTS`].
    #[error("too many segments")]
    TooManySegments,
    /// A segment would be longer than its IP header can say.
    #[error("segments longer than 65535 bytes")]
    SegmentTooLong,
    /// The frame does not ask for segmentation.
    #[error("frame does not ask for segmentation")]
    NoGso,
}

/// The 16-bit big endian field `at` bytes into `bytes`, if it lies inside.
#[inline]
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// Writes `value` big endian at `at`; `None` and no change if that is not inside `bytes`.
#[inline]
pub(crate) fn put_be16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}
