//! Frames that a receiver cannot take as they are: checksums are completed and super-packets segmented in software.
//!
//! The receiver decides: what its driver accepted at its last reset is what it gets. Most frames pass as they are.

use crate::capture::Outcomes;
use crate::frame::{Burst, Frame};
use crate::limits::{MAX_CHAIN, MAX_FRAME};
use crate::port::vhost::queue::Filled;
use crate::wire::checksum;
use crate::wire::offload::{Csum, GsoKind, Offload};
use crate::wire::segment::{ChecksumMode, MAX_SEGMENT_HEADER, Segmenter};
use crate::worker::meter::{Copies, Probe};

/// Offloads that a receiver accepts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Checksums left to it.
    pub csum: bool,
    /// TCP super-packets over IPv4.
    pub tso4: bool,
    /// TCP super-packets over IPv6.
    pub tso6: bool,
    /// TCP super-packets with ECN's CWR bit.
    pub ecn: bool,
    /// UDP super-packets over IPv4.
    pub uso4: bool,
    /// UDP super-packets over IPv6.
    pub uso6: bool,
}

impl Accepts {
    /// Whether the receiver takes such a frame as it is.
    #[inline]
    pub fn takes(self, offload: &Offload) -> bool {
        let Some(gso) = offload.gso else {
            return self.csum || !matches!(offload.csum, Csum::Partial { .. });
        };
        let kind = match gso.kind {
            GsoKind::Tcp4 => self.tso4,
            GsoKind::Tcp6 => self.tso6,
            GsoKind::Udp4 => self.uso4,
            GsoKind::Udp6 => self.uso6,
        };
        kind && self.csum && (self.ecn || !gso.ecn)
    }
}

/// Private memory of a worker for frames that are not simple.
#[derive(Debug)]
pub struct Scratch {
    /// Where frames are rebuilt.
    pub rebuilt: Rebuilt,
    /// Chains that one frame fills.
    pub filled: Filled,
    /// Tells the time of stages apart.
    pub probe: Probe,
    /// Payload copies made.
    pub copies: Copies,
    /// What a queue has dropped of the burst that it was given.
    pub outcomes: Outcomes,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            rebuilt: Rebuilt::default(),
            filled: Filled::with_capacity(MAX_CHAIN),
            probe: Probe::default(),
            copies: Copies::default(),
            outcomes: Outcomes::default(),
        }
    }
}

/// Private memory in which frames are rebuilt.
#[derive(Debug)]
pub struct Rebuilt {
    frame: Box<[u8]>,
}

impl Default for Rebuilt {
    fn default() -> Self {
        Self { frame: vec![0; MAX_FRAME].into_boxed_slice() }
    }
}

impl Rebuilt {
    /// Hands to `emit` what the frame has to become: its offload, its first bytes and the rest. `emit` returns whether
    /// it wants more. `false` if the frame's headers are not what its offload claims.
    pub fn convert(
        &mut self,
        burst: &Burst<'_>,
        frame: &Frame,
        accepts: Accepts,
        mut emit: impl FnMut(Offload, &[u8], &[u8]) -> bool,
    ) -> bool {
        let Some(bytes) = gather(&mut self.frame, burst, frame) else { return false };
        if frame.offload().gso.is_none() {
            let Csum::Partial { start, offset } = frame.offload().csum else { return false };
            if checksum::complete_partial(bytes, start, offset).is_err() {
                return false;
            }
            emit(Offload::NONE, bytes, &[]);
            return true;
        }
        let bytes: &[u8] = bytes;
        let mode = if accepts.csum { ChecksumMode::Partial } else { ChecksumMode::Complete };
        let Ok(mut segments) = Segmenter::new(bytes, frame.offload(), mode) else { return false };
        let mut header = [0u8; MAX_SEGMENT_HEADER];
        while let Some(segment) = segments.next_segment(&mut header) {
            let head = header.get(..segment.header_len).unwrap_or_default();
            let payload = bytes.get(segment.payload).unwrap_or_default();
            if !emit(Offload { csum: segment.csum, gso: None }, head, payload) {
                break;
            }
        }
        true
    }
}

/// Copies a frame into one piece.
fn gather<'s>(to: &'s mut [u8], burst: &Burst<'_>, frame: &Frame) -> Option<&'s mut [u8]> {
    let head = frame.head();
    to.get_mut(..head.len())?.copy_from_slice(head);
    let mut filled = head.len();
    for piece in burst.tail(frame) {
        filled += piece.read(to.get_mut(filled..)?);
    }
    to.get_mut(..filled).filter(|bytes| bytes.len() == frame.len())
}
