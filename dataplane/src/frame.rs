//! Frames on their way through the switch: what every port kind fills and takes.
//!
//! A frame is a private copy of its first bytes, on which all decisions are made and which is what gets delivered, its
//! offload metadata, and the segments of memory that hold the rest. The rest is copied once, from where it is to where
//! it goes.

use crate::limits::{BURST, MAX_BURST_SEGMENTS, MAX_CHAIN, MAX_FRAME, SNAPSHOT};
use crate::mem::{SegmentArena, Segments, SourceSegment};
use crate::switch::DropReason;
use crate::wire::offload::{Offload, VirtioNetHdr};

/// Bytes before the snapshot: the virtio-net header as it was received, later room for a VLAN tag.
const HEADROOM: usize = 16;
/// Length of the Ethernet header without a tag.
pub const ETHERNET_HEADER: usize = 14;
/// Length of an 802.1Q tag.
const TAG: usize = 4;
/// Ethertype of an 802.1Q tag.
const TPID: [u8; 2] = [0x81, 0x00];

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;

/// One frame.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Frame {
    buffer: [u8; HEADROOM + SNAPSHOT],
    start: u16,
    end: u16,
    tail_first: u16,
    tail_count: u16,
    tail_len: u32,
    offload: Offload,
    /// VLAN that the frame belongs to within its network; 0 for none.
    pub vid: u16,
    /// Priority bits of the tag it came with, in place.
    priority: u16,
}

impl Frame {
    const fn empty() -> Self {
        Self {
            buffer: [0; HEADROOM + SNAPSHOT],
            start: HEADROOM as u16,
            end: HEADROOM as u16,
            tail_first: 0,
            tail_count: 0,
            tail_len: 0,
            offload: Offload::NONE,
            vid: 0,
            priority: 0,
        }
    }

    /// The private copy of the frame's first bytes, Ethernet header first.
    #[inline]
    pub fn head(&self) -> &[u8] {
        self.buffer.get(usize::from(self.start)..usize::from(self.end)).unwrap_or_default()
    }

    /// Length of the whole frame, without checksum, in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        usize::from(self.end - self.start) + self.tail_len as usize
    }

    /// Never: a frame has at least an Ethernet header.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the sender left to the switch or the receiver to do.
    #[inline]
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// The frame's first bytes, to rewrite headers in.
    #[inline]
    pub fn head_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(usize::from(self.start)..usize::from(self.end)).unwrap_or_default()
    }

    /// Changes what is left to do to the frame, together with its headers.
    #[inline]
    pub fn set_offload(&mut self, offload: Offload) {
        self.offload = offload;
    }

    /// Destination address as a number.
    #[inline]
    pub fn destination(&self) -> u64 {
        mac_at(self.head(), 0)
    }

    /// Source address as a number.
    #[inline]
    pub fn source(&self) -> u64 {
        mac_at(self.head(), 6)
    }

    /// The 802.1Q tag control information, if the frame carries a tag at the moment.
    #[inline]
    pub fn tag(&self) -> Option<u16> {
        match *self.head() {
            [_, _, _, _, _, _, _, _, _, _, _, _, 0x81, 0x00, high, low, ..] => Some(u16::from_be_bytes([high, low])),
            _ => None,
        }
    }

    /// Makes the frame carry a tag of its VLAN, or none. Priority bits are kept.
    #[inline]
    pub fn set_tagged(&mut self, tagged: bool) {
        match (self.tag(), tagged) {
            (Some(tci), true) if tci & 0xfff == self.vid => {}
            (None, false) => {}
            (current, _) => self.retag(current, tagged),
        }
    }

    #[cold]
    fn retag(&mut self, current: Option<u16>, tagged: bool) {
        let start = usize::from(self.start);
        if let Some(tci) = current {
            self.priority = tci & 0xf000;
        }
        match (current.is_some(), tagged) {
            (true, false) => {
                self.buffer.copy_within(start..start + 12, start + TAG);
                self.start += TAG as u16;
                self.shift_offload(-(TAG as i16));
            }
            (false, true) => {
                self.buffer.copy_within(start..start + 12, start - TAG);
                self.start -= TAG as u16;
                self.write_tag(start - TAG);
                self.shift_offload(TAG as i16);
            }
            _ => self.write_tag(start),
        }
    }

    /// Offsets were checked to lie behind the Ethernet header and within a frame, so they can always be moved by a tag.
    fn shift_offload(&mut self, delta: i16) {
        if let Ok(shifted) = self.offload.shift(delta) {
            self.offload = shifted;
        }
    }

    fn write_tag(&mut self, start: usize) {
        let tci = (self.priority | self.vid).to_be_bytes();
        self.buffer[start + 12..start + 16].copy_from_slice(&[TPID[0], TPID[1], tci[0], tci[1]]);
    }

    /// Length of the layer-3 packet, of each segment for a super-packet, in bytes.
    #[inline]
    pub fn packet_len(&self) -> usize {
        let tag = if self.tag().is_some() { TAG } else { 0 };
        match self.offload.gso {
            None => self.len() - ETHERNET_HEADER - tag,
            Some(gso) => self.segment_header() + usize::from(gso.size) - ETHERNET_HEADER - tag,
        }
    }

    /// Bytes of all headers of a super-packet, as far as its snapshot tells.
    fn segment_header(&self) -> usize {
        use crate::wire::offload::{Csum, GsoKind};
        let Csum::Partial { start, .. } = self.offload.csum else { return ETHERNET_HEADER + TAG };
        let transport = match self.offload.gso.map(|gso| gso.kind) {
            Some(GsoKind::Tcp4 | GsoKind::Tcp6) => {
                self.head().get(usize::from(start) + 12).map_or(20, |offset| usize::from(offset >> 4) * 4)
            }
            _ => 8,
        };
        (usize::from(start) + transport).max(ETHERNET_HEADER + TAG)
    }
}

#[inline]
fn mac_at(head: &[u8], offset: usize) -> u64 {
    let mut bytes = [0u8; 8];
    if let Some(mac) = head.get(offset..offset + 6) {
        bytes[2..].copy_from_slice(mac);
    }
    u64::from_be_bytes(bytes)
}

/// Storage of one burst, reused. A worker has one.
#[derive(Debug)]
pub struct BurstStorage {
    frames: Box<[Frame]>,
    segments: SegmentArena,
}

impl Default for BurstStorage {
    fn default() -> Self {
        Self { frames: vec![Frame::empty(); BURST].into_boxed_slice(), segments: SegmentArena::new(MAX_BURST_SEGMENTS) }
    }
}

impl BurstStorage {
    /// Begins a new burst. The memory that its frames refer to must live as long as this borrow.
    #[inline]
    pub fn begin(&mut self) -> Burst<'_> {
        Burst { frames: &mut self.frames, count: 0, segments: self.segments.begin() }
    }
}

/// A burst of frames from one queue.
#[derive(Debug)]
pub struct Burst<'m> {
    frames: &'m mut [Frame],
    count: usize,
    segments: Segments<'m>,
}

impl<'m> Burst<'m> {
    /// Number of frames.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether another frame of any legal shape fits.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.count < self.frames.len() && self.segments.room() >= MAX_CHAIN
    }

    /// The frame at a place. Places beyond the burst hold some older frame's remains.
    #[inline]
    pub fn frame(&self, place: u8) -> &Frame {
        &self.frames[usize::from(place) % BURST]
    }

    /// The frame at a place, to change its tag or VLAN.
    #[inline]
    pub fn frame_mut(&mut self, place: u8) -> &mut Frame {
        &mut self.frames[usize::from(place) % BURST]
    }

    /// The memory that holds what follows the frame's head.
    #[inline]
    pub fn tail(&self, frame: &Frame) -> &[SourceSegment<'m>] {
        let first = usize::from(frame.tail_first);
        self.segments.get(first..first + usize::from(frame.tail_count))
    }

    /// Makes one frame of several: the first of `places` gets the tails of all of them, one after the other, and its
    /// headers are left to the caller. `false`, with nothing changed, if there is no room.
    pub fn join(&mut self, places: impl Iterator<Item = u8> + Clone) -> bool {
        let first = self.segments.used();
        let mut len = 0u64;
        for place in places.clone() {
            let (start, count, tail_len) = {
                let frame = self.frame(place);
                (usize::from(frame.tail_first), usize::from(frame.tail_count), frame.tail_len)
            };
            len += u64::from(tail_len);
            for at in start..start + count {
                let piece = self.segments.get(at..at + 1).first().copied();
                if !piece.is_some_and(|piece| self.segments.push(piece)) {
                    self.segments.truncate(first);
                    return false;
                }
            }
        }
        let count = self.segments.used() - first;
        let Some(place) = places.clone().next().filter(|_| len <= MAX_FRAME as u64) else {
            self.segments.truncate(first);
            return false;
        };
        let frame = self.frame_mut(place);
        (frame.tail_first, frame.tail_count, frame.tail_len) = (first as u16, count as u16, len as u32);
        true
    }

    /// Begins a frame whose bytes come with a virtio-net header of `header_len` (10 or 12) bytes in front.
    #[inline]
    pub fn start(&mut self, header_len: usize) -> FrameBuilder<'_, 'm> {
        let first = self.segments.used();
        let start = HEADROOM - header_len.min(HEADROOM);
        FrameBuilder { burst: self, header_len, position: start, first, tail_len: 0 }
    }
}

/// Takes the bytes of a new frame, piece by piece.
#[derive(Debug)]
pub struct FrameBuilder<'b, 'm> {
    burst: &'b mut Burst<'m>,
    header_len: usize,
    position: usize,
    first: usize,
    tail_len: u64,
}

impl<'m> FrameBuilder<'_, 'm> {
    /// Adds the next piece. `false` if the burst has no room for it.
    #[inline]
    pub fn push(&mut self, piece: SourceSegment<'m>) -> bool {
        let frame = &mut self.burst.frames[self.burst.count];
        let taken = piece.read(&mut frame.buffer[self.position..]);
        self.position += taken;
        if taken == piece.len() {
            return true;
        }
        let rest = piece.skip(taken);
        self.tail_len += rest.len() as u64;
        self.burst.segments.push(rest)
    }

    /// Adds the next piece without any of it going into the frame's head, of which there must be enough already. What
    /// follows has to be added in the same way. `false` if the burst has no room for it.
    #[inline]
    pub fn push_tail(&mut self, piece: SourceSegment<'m>) -> bool {
        if piece.is_empty() {
            return true;
        }
        self.tail_len += piece.len() as u64;
        self.burst.segments.push(piece)
    }

    /// Checks the frame and adds it to the burst.
    ///
    /// # Errors
    /// Why the frame has to be dropped. The burst is as it was before then.
    #[inline]
    pub fn finish(self) -> Result<(), DropReason> {
        let result = self.check();
        match result {
            Ok(offload) => {
                let frame = &mut self.burst.frames[self.burst.count];
                frame.start = HEADROOM as u16;
                frame.end = self.position as u16;
                frame.tail_first = self.first as u16;
                frame.tail_count = (self.burst.segments.used() - self.first) as u16;
                frame.tail_len = self.tail_len as u32;
                frame.offload = offload;
                frame.vid = 0;
                frame.priority = 0;
                self.burst.count += 1;
                Ok(())
            }
            Err(reason) => {
                self.burst.segments.truncate(self.first);
                Err(reason)
            }
        }
    }

    #[inline]
    fn check(&self) -> Result<Offload, DropReason> {
        if self.position < HEADROOM + ETHERNET_HEADER {
            return Err(DropReason::Runt);
        }
        let head = self.position - HEADROOM;
        let len = head as u64 + self.tail_len;
        if len > MAX_FRAME as u64 {
            return Err(DropReason::Oversize);
        }
        let frame = &self.burst.frames[self.burst.count];
        let mut header = [0u8; 12];
        header[..self.header_len].copy_from_slice(&frame.buffer[HEADROOM - self.header_len..HEADROOM]);
        // Nothing is left to do, as most frames say. That its checksum was verified is not for a sender to say.
        if header[0] & NEEDS_CSUM == 0 && header[1] == 0 {
            return Ok(Offload::NONE);
        }
        Offload::from_virtio(&VirtioNetHdr::from_bytes(&header), &frame.buffer[HEADROOM..self.position], len as usize)
            .map_err(|_| DropReason::BadOffload)
    }
}
