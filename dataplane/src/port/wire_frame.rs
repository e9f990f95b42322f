//! Frames as they come from a wire: without a virtio-net header, and with nothing left to do.

#![forbid(unsafe_code)]

use crate::frame::Burst;
use crate::limits::SNAPSHOT;
use crate::mem::SourceSegment;
use crate::switch::DropReason;
use crate::switch::gro::{header_len, may_be_tcp};
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
    let head_len = head_len(first);
    // Nearly always.
    let Some(second) = pieces.next() else { return burst.load_bare(first, head_len) };
    let (head, tail) = first.split_at(head_len);
    let mut frame = burst.start(VirtioNetHdr::LEN);
    let mut fits = frame.push(SourceSegment::from_slice(&NOTHING_TO_DO))
        && frame.push(SourceSegment::from_slice(head))
        && frame.push_tail(SourceSegment::from_slice(tail));
    for piece in std::iter::once(second).chain(pieces) {
        fits &= frame.push_tail(SourceSegment::from_slice(piece));
    }
    if fits { frame.finish() } else { frame.refuse() }
}

/// How much of a frame that begins with these bytes goes into its head. Of one that can be merged with others it is the headers
/// alone: then data is all where it was received.
#[inline]
fn head_len(first: &[u8]) -> usize {
    let first = first.get(..SNAPSHOT).unwrap_or(first);
    let headers = if may_be_tcp(first) { header_len(first) } else { None };
    headers.unwrap_or(SNAPSHOT).min(first.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::BurstStorage;
    use crate::wire::Offload;

    /// What becomes of a frame received in these pieces: its bytes, or why it is dropped.
    fn received(storage: &mut BurstStorage, pieces: &[&[u8]]) -> Result<Vec<u8>, DropReason> {
        let mut burst = storage.begin();
        let len = push(&mut burst, pieces.iter().copied())?;
        let frame = burst.frame(0);
        let mut bytes = frame.head().to_vec();
        for piece in burst.tail(frame) {
            let before = bytes.len();
            bytes.resize(before + piece.len(), 0);
            piece.read(&mut bytes[before..]);
        }
        assert_eq!((len, *frame.offload(), burst.count()), (bytes.len(), Offload::NONE, 1));
        Ok(bytes)
    }

    proptest! {
        #[test]
        fn a_frame_is_its_bytes_however_it_came(
            mut bytes in prop::collection::vec(any::<u8>(), 0..400), is_tcp: bool, cut in any::<prop::sample::Index>(),
        ) {
            if is_tcp && bytes.len() > 54 {
                let headers = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10; 4], [11; 4], 64).tcp(1, 2, 3, 4);
                let payload = bytes.split_off(54);
                bytes.clear();
                headers.write(&mut bytes, &payload).unwrap();
            }
            let mut storage = BurstStorage::default();
            let whole = received(&mut storage, &[&bytes]);
            prop_assert_eq!(&whole, &if bytes.len() < 14 { Err(DropReason::Runt) } else { Ok(bytes.clone()) });
            // The kernel begins a second piece only when the first is full, but a snapshot has to be in the first.
            let (first, second) = bytes.split_at(cut.index(bytes.len() + 1));
            if first.len() >= SNAPSHOT {
                prop_assert_eq!(received(&mut storage, &[first, second]), whole);
            }
        }
    }
}
