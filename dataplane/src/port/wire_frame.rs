//! Frames as they come from a wire: without a virtio-net header, and with nothing left to do.

#![forbid(unsafe_code)]

use crate::frame::Burst;
use crate::limits::SNAPSHOT;
use crate::mem::SourceSegment;
use crate::switch::DropReason;
use crate::switch::gro::header_len;
use crate::wire::VirtioNetHdr;

/// What the header that is missing would say.
const NOTHING_TO_DO: [u8; VirtioNetHdr::LEN] = [0; VirtioNetHdr::LEN];

/// Adds a frame that was received in these pieces to the burst, and returns its length.
///
/// # Errors
/// Why the frame has to be dropped.
#[inline]
pub(super) fn push<'m>(burst: &mut Burst<'m>, mut pieces: impl Iterator<Item = &'m [u8]>) -> Result<usize, DropReason> {
    let first = pieces.next().ok_or(DropReason::Oversize)?;
    // Of a frame that can be merged with others, the head has the headers alone: then data is all where it was received.
    let head = header_len(first.get(..SNAPSHOT).unwrap_or(first)).unwrap_or(SNAPSHOT).min(first.len());
    let (head, tail) = first.split_at(head);
    let mut frame = burst.start(VirtioNetHdr::LEN);
    let mut fits = frame.push(SourceSegment::from_slice(&NOTHING_TO_DO))
        && frame.push(SourceSegment::from_slice(head))
        && frame.push_tail(SourceSegment::from_slice(tail));
    for piece in pieces {
        fits &= frame.push_tail(SourceSegment::from_slice(piece));
    }
    if fits { frame.finish() } else { frame.refuse() }
}
