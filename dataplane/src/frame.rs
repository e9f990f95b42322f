//! Frames on their way through the switch: what every port kind fills and takes.
//!
//! A frame is a private copy of its first bytes, on which all decisions are made and which is what gets delivered, its
//! offload metadata, and the segments of memory that hold the rest. The rest is copied once, from where it is to where
//! it goes.

#![forbid(unsafe_code)]

use crate::limits::{BURST, MAX_BURST_SEGMENTS, MAX_CHAIN, MAX_FRAME, SNAPSHOT};
use crate::mem::{Segment, SegmentArena, Segments, SourceSegment};
use crate::switch::DropReason;
use crate::wire::EthernetHeader;
use crate::wire::offload::{Offload, VirtioNetHdr};
use crate::wire::vlan::{self, TAG_LEN};

/// Bytes before the snapshot: room for a VLAN tag, and for the virtio-net header: at first the one that came, then the
/// one that goes out. What came begins at a multiple of 16, for copies that do not cross boundaries.
const HEADROOM: usize = 28;
/// Length of the virtio-net header that frames go out with.
const HEADER: usize = VirtioNetHdr::LEN;
/// Length of the Ethernet header without a tag.
pub const ETHERNET_HEADER: usize = 14;
/// Priority bits of a tag.
const PRIORITY: u16 = 0xf000;
/// The frame carries no tag of its VLAN, whatever it begins with.
const BARE: u16 = 1;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;

/// The first 14 bytes of a frame, addresses and EtherType, as two numbers that overlap: frames that begin alike go the same
/// way, unless they are tagged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Likeness(pub u64, pub u64);

impl Likeness {
    /// That of no frame: the numbers do not agree on the two bytes that both have.
    pub const NONE: Self = Self(0, 1);

    /// Whether an 802.1Q tag follows the addresses.
    #[inline]
    pub fn is_tagged(self) -> bool {
        self.1 >> 48 == 0x0081
    }
}

/// The VLAN that a frame belongs to, and what its bytes do not tell of the tag that it came with.
#[derive(Debug, Clone, Copy)]
pub struct FrameVlan {
    /// Within its network; 0 for none.
    pub vid: u16,
    priority: u16,
}

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
    /// Priority bits of the tag it came with, in place; and [`BARE`].
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

    /// The virtio-net header for a receiver that takes the frame as it is, over one buffer, and the frame's head.
    #[inline]
    pub fn wire(&self) -> &[u8] {
        self.buffer.get(usize::from(self.start).wrapping_sub(HEADER)..usize::from(self.end)).unwrap_or_default()
    }

    /// Whether all of the frame is in its head.
    #[inline]
    pub fn is_whole(&self) -> bool {
        self.tail_len == 0
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
        self.write_header();
    }

    /// The first bytes, of which the first 14 are always the frame's.
    #[inline]
    fn ethernet(&self) -> &[u8; 16] {
        const { assert!(HEADROOM + 16 <= HEADROOM + SNAPSHOT) };
        static NOTHING: [u8; 16] = [0; 16];
        self.buffer.get(usize::from(self.start)..).and_then(|bytes| bytes.first_chunk()).unwrap_or(&NOTHING)
    }

    /// What the frame began with when it came.
    #[inline]
    pub fn likeness(&self) -> Likeness {
        // Written so that it becomes two loads.
        let number = |at: usize| {
            self.buffer.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |at| u64::from_le_bytes(*at))
        };
        Likeness(number(HEADROOM), number(HEADROOM + 6))
    }

    /// Destination address as a number.
    #[inline]
    pub fn destination(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = *self.ethernet();
        u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 16
    }

    /// Source address as a number.
    #[inline]
    pub fn source(&self) -> u64 {
        let [.., a, b, c, d, e, f, g, h, _, _] = *self.ethernet();
        u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 16
    }

    /// The 802.1Q tag control information, if the frame carries a tag of its VLAN at the moment.
    #[inline]
    pub fn tag(&self) -> Option<u16> {
        // A frame that ends before the EtherType behind its tag has none: without it, it would be no frame.
        let room = self.end - self.start >= (ETHERNET_HEADER + TAG_LEN) as u16;
        match *self.ethernet() {
            [.., 0x81, 0x00, high, low] if room && self.priority & BARE == 0 => Some(u16::from_be_bytes([high, low])),
            _ => None,
        }
    }

    /// Whether the frame, without the tag of its VLAN, begins with one of its sender's own that others could take for that: even
    /// if it ends within it, since a wire pads short frames.
    pub fn bears_own_tag(&self) -> bool {
        matches!(*self.ethernet(), [.., 0x81, 0x00, _, _])
    }

    /// Where the frame belongs, to be kept with its bytes.
    pub fn vlan(&self) -> FrameVlan {
        FrameVlan { vid: self.vid, priority: self.priority }
    }

    /// What was kept of a frame with these bytes.
    pub fn set_vlan(&mut self, FrameVlan { vid, priority }: FrameVlan) {
        (self.vid, self.priority) = (vid, priority);
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
            self.priority = tci & PRIORITY;
        }
        if current.is_some()
            && let Some((stripped, _)) = vlan::strip_tag(&mut self.buffer, start)
        {
            self.start = stripped as u16;
            self.shift_offload(-(TAG_LEN as i16));
            // What comes to light behind the tag is the sender's own.
            self.priority |= BARE;
        }
        let start = usize::from(self.start);
        if tagged && let Some(inserted) = vlan::insert_tag(&mut self.buffer, start, self.priority & PRIORITY | self.vid)
        {
            self.start = inserted as u16;
            self.shift_offload(TAG_LEN as i16);
            self.priority &= !BARE;
        }
        self.write_header();
    }

    /// Puts the outgoing header in front of the frame.
    #[inline]
    fn write_header(&mut self) {
        let header = self.offload.to_virtio(1).to_bytes();
        let start = usize::from(self.start);
        if let Some(place) = self.buffer.get_mut(start - HEADER..start) {
            place.copy_from_slice(&header);
        }
    }

    /// Offsets were checked to lie behind the Ethernet header and within a frame, so they can always be moved by a tag.
    fn shift_offload(&mut self, delta: i16) {
        if let Ok(shifted) = self.offload.shift(delta) {
            self.offload = shifted;
        }
    }

    /// Whether the layer-3 packet, or each segment of a super-packet, has at most `mtu` bytes.
    #[inline]
    pub fn fits(&self, mtu: usize) -> bool {
        self.len() <= mtu.saturating_add(ETHERNET_HEADER) || self.longest() - self.l3_offset() <= mtu
    }

    /// Length of the frame, or of the longest of a super-packet's segments, in bytes.
    pub fn longest(&self) -> usize {
        match self.offload.gso {
            None => self.len(),
            Some(gso) => (self.segment_header() + usize::from(gso.size)).max(self.l3_offset()),
        }
    }

    /// Bytes before the layer-3 packet: links take two tags beside their MTU, the sender's own among them.
    fn l3_offset(&self) -> usize {
        EthernetHeader::parse(self.head()).map_or(ETHERNET_HEADER, |header| header.l3_offset.into())
    }

    /// Bytes of all headers of a super-packet, as far as its snapshot tells.
    fn segment_header(&self) -> usize {
        use crate::wire::offload::{Csum, GsoKind};
        let Csum::Partial { start, .. } = self.offload.csum else { return ETHERNET_HEADER + TAG_LEN };
        let transport = match self.offload.gso.map(|gso| gso.kind) {
            Some(GsoKind::Tcp4 | GsoKind::Tcp6) => {
                self.head().get(usize::from(start) + 12).map_or(20, |offset| usize::from(offset >> 4) * 4)
            }
            _ => 8,
        };
        (usize::from(start) + transport).max(ETHERNET_HEADER + TAG_LEN)
    }
}

/// Storage of one burst, reused. A worker has one.
#[derive(Debug)]
pub struct BurstStorage {
    frames: Box<[Frame; BURST]>,
    segments: SegmentArena,
}

impl Default for BurstStorage {
    fn default() -> Self {
        let frames = Box::new([const { Frame::empty() }; BURST]);
        Self { frames, segments: SegmentArena::new(MAX_BURST_SEGMENTS) }
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
    frames: &'m mut [Frame; BURST],
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
        let header_len = header_len.min(HEADER);
        FrameBuilder { burst: self, header_len, position: HEADROOM - header_len, first, tail_len: 0 }
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
        let taken = piece.read(frame.buffer.get_mut(self.position..HEADROOM + SNAPSHOT).unwrap_or_default());
        self.position += taken;
        self.keep(piece.skip(taken))
    }

    /// Notes what did not go into the snapshot.
    #[inline]
    fn keep(&mut self, rest: SourceSegment<'m>) -> bool {
        if rest.is_empty() {
            return true;
        }
        self.tail_len += rest.len() as u64;
        self.burst.segments.push(rest)
    }

    /// Adds the next piece without any of it going into the frame's head, of which there must be enough already. What
    /// follows has to be added in the same way. `false` if the burst has no room for it.
    #[inline]
    pub fn push_tail(&mut self, piece: SourceSegment<'m>) -> bool {
        self.keep(piece)
    }

    /// Checks the frame, adds it to the burst, and returns its length.
    ///
    /// # Errors
    /// Why the frame has to be dropped. The burst is as it was before then.
    pub fn finish(self) -> Result<usize, DropReason> {
        self.burst.admit(self.header_len, self.position, self.first, self.tail_len)
    }

    /// Gives up on a frame for which the burst has no room.
    ///
    /// # Errors
    /// Always: the frame is oversized. The burst is as it was before.
    pub fn refuse(self) -> Result<usize, DropReason> {
        self.burst.refuse(self.position, self.first, self.tail_len, DropReason::Oversize)
    }
}

impl<'m> Burst<'m> {
    /// Adds a frame that lies in one piece, with its header, and returns its length.
    ///
    /// # Errors
    /// Why the frame has to be dropped. The burst is as it was before then.
    #[inline]
    pub fn load(&mut self, header_len: usize, piece: Segment<'m>) -> Result<usize, DropReason> {
        let first = self.segments.used();
        let begin = HEADROOM - header_len.min(HEADER);
        let frame = &mut self.frames[self.count];
        let taken = piece.source().read(&mut frame.buffer[begin..]);
        let rest = piece.source().skip(taken);
        if !rest.is_empty() && !self.segments.push(rest) {
            return self.refuse(begin + taken, first, rest.len() as u64, DropReason::Oversize);
        }
        self.admit(header_len, begin + taken, first, rest.len() as u64)
    }

    /// Adds a frame that lies in one piece and came without a header, since nothing is left to do to it. Its first `head_len`
    /// bytes, at most as many as fit, go into its head. Returns its length.
    ///
    /// # Errors
    /// As [`Burst::load`].
    #[inline]
    pub fn load_bare(&mut self, bytes: &'m [u8], head_len: usize) -> Result<usize, DropReason> {
        let first = self.segments.used();
        let (head, tail) = bytes.split_at(head_len.min(SNAPSHOT).min(bytes.len()));
        let frame = &mut self.frames[self.count];
        frame.buffer[HEADROOM - HEADER..HEADROOM].fill(0);
        let taken = SourceSegment::from_slice(head).read(&mut frame.buffer[HEADROOM..]);
        if !tail.is_empty() && !self.segments.push(SourceSegment::from_slice(tail)) {
            return self.refuse(HEADROOM + taken, first, tail.len() as u64, DropReason::Oversize);
        }
        self.admit(HEADER, HEADROOM + taken, first, tail.len() as u64)
    }

    /// Checks what was put at the next frame's place: its header and its first bytes, up to `end` in its buffer, and
    /// `tail_len` bytes in the segments from `first`.
    #[inline]
    fn admit(&mut self, header_len: usize, end: usize, first: usize, tail_len: u64) -> Result<usize, DropReason> {
        let used = self.segments.used();
        let frame = &mut self.frames[self.count];
        let head = end.wrapping_sub(HEADROOM);
        let len = (head as u64).wrapping_add(tail_len);
        let checked = if end < HEADROOM + ETHERNET_HEADER {
            Err(DropReason::Runt)
        } else if len > MAX_FRAME as u64 {
            Err(DropReason::Oversize)
        } else {
            let begin = HEADROOM - header_len.min(HEADER);
            let (flags, gso) = (frame.buffer[begin], frame.buffer[begin + 1]);
            frame.start = HEADROOM as u16;
            frame.end = end as u16;
            frame.tail_first = first as u16;
            frame.tail_count = (used - first) as u16;
            frame.tail_len = tail_len as u32;
            frame.vid = 0;
            frame.priority = 0;
            // Nothing is left to do, as most frames say. That its checksum was verified is not for a sender to say.
            if flags & NEEDS_CSUM == 0 && gso == 0 {
                // `write_header` for what nearly every frame is.
                const PLAIN: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
                frame.buffer[HEADROOM - HEADER..HEADROOM].copy_from_slice(&PLAIN);
                frame.offload = Offload::NONE;
                Ok(())
            } else {
                frame.take_offload(header_len, len as usize)
            }
        };
        if let Err(reason) = checked {
            return self.refuse(end, first, tail_len, reason);
        }
        self.count += 1;
        Ok(len as usize)
    }

    /// Leaves what was put at the next frame's place out of the burst. Until another one comes to that place, its first
    /// bytes can be looked at there.
    #[cold]
    fn refuse(&mut self, end: usize, first: usize, tail_len: u64, reason: DropReason) -> Result<usize, DropReason> {
        self.segments.truncate(first);
        let frame = &mut self.frames[self.count];
        frame.start = HEADROOM as u16;
        frame.end = end.max(HEADROOM) as u16;
        (frame.tail_first, frame.tail_count) = (first as u16, 0);
        frame.tail_len = u32::try_from(tail_len).unwrap_or(u32::MAX);
        Err(reason)
    }
}

impl Frame {
    /// Takes over what the header that came with the frame asks for.
    fn take_offload(&mut self, header_len: usize, len: usize) -> Result<(), DropReason> {
        let mut header = [0u8; HEADER];
        let header_len = header_len.min(HEADER);
        header[..header_len].copy_from_slice(&self.buffer[HEADROOM - header_len..HEADROOM]);
        self.offload = Offload::from_virtio(&VirtioNetHdr::from_bytes(&header), self.head(), len)
            .map_err(|_| DropReason::BadOffload)?;
        self.write_header();
        Ok(())
    }
}
