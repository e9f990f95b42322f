//! Software segmentation, for receivers and networks that did not ask for super-frames.

use std::ops::Range;

use super::checksum::Sum;
use super::offload::{Csum, GsoKind, Layout, Offload};
use super::{Tcp, WireError, be16, eth, ip, l4, put_be16};

/// Bytes that a [`Segmenter`] needs for the headers of a segment: Ethernet with two tags, IP with options or extension
/// headers, TCP with options. The longest without IPv6 extension headers have 142.
pub const MAX_SEGMENT_HEADER: usize = 256;

/// Segments that one super-frame may become. 64 KiB at the smallest segment size that Linux ever sends (48 bytes less
/// 12 of timestamps) make 1821; a guest that asks for more wants to keep the switch busy.
pub const MAX_SEGMENTS: usize = 2048;

/// The same of UDP, where Linux sends no more (`UDP_MAX_SEGMENTS`).
pub const MAX_UDP_SEGMENTS: usize = 128;

/// What a super-frame of that kind may become.
pub const fn most_segments(kind: GsoKind) -> usize {
    if kind.is_tcp() { MAX_SEGMENTS } else { MAX_UDP_SEGMENTS }
}

/// What the headers of a segment hold as transport checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChecksumMode {
    /// The checksum.
    Complete,
    /// The sum of the pseudo header, for receivers that finish it themselves (`VIRTIO_NET_F_GUEST_CSUM`).
    Partial,
}

/// One segment: the headers that were written for it, and where in the super-frame its data is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Bytes of the header buffer in use.
    pub header_len: usize,
    /// The data, as bytes of the super-frame.
    pub payload: Range<usize>,
    /// State of its transport checksum.
    pub csum: Csum,
}

/// Cuts one super-frame into segments.
///
/// As in Linux, the data is everything behind the headers: the length fields of a super-frame are not looked at, since
/// they cannot say more than 64 KiB and some systems leave them zero. The pseudo header sum that the sender left in the
/// checksum field is trusted, because only the sender knows the final destination behind an IPv6 routing header; a
/// wrong one makes segments that nobody accepts.
#[derive(Debug, Clone)]
pub struct Segmenter<'a> {
    /// The super-frame, or as much of it as there is in one piece: at least the headers.
    frame: &'a [u8],
    /// Bytes of the super-frame.
    len: usize,
    kind: GsoKind,
    size: usize,
    mode: ChecksumMode,
    layout: Layout,
    /// The sum of the pseudo header without its length.
    pseudo: Sum,
    /// Where the data of the next segment starts.
    next: usize,
    index: usize,
    count: usize,
}

impl<'a> Segmenter<'a> {
    /// Prepares to cut `frame`, which is the whole super-frame in one piece, as `offload` asks.
    ///
    /// The headers are checked again, so `frame` may have changed since `offload` was made.
    ///
    /// # Errors
    ///
    /// [`WireError::NoGso`] if `offload` does not ask for it, [`WireError::GsoMismatch`], [`WireError::GsoWithoutCsum`]
    /// or [`WireError::Truncated`] if `frame` is not what it describes, and [`WireError::HeaderTooLong`],
    /// [`WireError::TooManySegments`] or [`WireError::SegmentTooLong`] if a bound is exceeded.
    pub fn new(frame: &'a [u8], offload: &Offload, mode: ChecksumMode) -> Result<Self, WireError> {
        Self::with_len(frame, frame.len(), offload, mode)
    }

    /// Prepares to cut a super-frame of `len` bytes of which only the first are at hand, with all headers among them.
    /// Segments come with partial checksums, since their data is not looked at.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn of_headers(headers: &'a [u8], len: usize, offload: &Offload) -> Result<Self, WireError> {
        Self::with_len(headers, len, offload, ChecksumMode::Partial)
    }

    fn with_len(frame: &'a [u8], len: usize, offload: &Offload, mode: ChecksumMode) -> Result<Self, WireError> {
        let gso = offload.gso.ok_or(WireError::NoGso)?;
        let layout = Layout::find(gso.kind, offload.csum, frame, len)?;
        if layout.header_len > frame.len() {
            return Err(WireError::Truncated);
        }
        if layout.header_len > MAX_SEGMENT_HEADER {
            return Err(WireError::HeaderTooLong);
        }
        let size = usize::from(gso.size);
        if size == 0 {
            return Err(WireError::ZeroGsoSize);
        }
        let data = len.saturating_sub(layout.header_len);
        if layout.header_len - layout.l3 + data.min(size) > usize::from(u16::MAX) {
            return Err(WireError::SegmentTooLong);
        }
        // Headers alone are a segment too.
        let count = data.div_ceil(size).max(1);
        if count > most_segments(gso.kind) {
            return Err(WireError::TooManySegments);
        }
        let pseudo = pseudo_without_length(frame, len, gso.kind, layout).ok_or(WireError::Truncated)?;
        Ok(Self { frame, len, kind: gso.kind, size, mode, layout, pseudo, next: layout.header_len, index: 0, count })
    }

    /// Segments still to come; at least one before the first.
    pub fn remaining(&self) -> usize {
        self.count - self.index
    }

    /// Writes the headers of the next segment to the start of `header` and says which data follows them; `None` after
    /// the last.
    pub fn next_segment(&mut self, header: &mut [u8; MAX_SEGMENT_HEADER]) -> Option<Segment> {
        if self.remaining() == 0 {
            return None;
        }
        let header_len = self.layout.header_len;
        let end = self.len.min(self.next + self.size);
        let payload = self.next..end;
        let header = header.get_mut(..header_len)?;
        header.copy_from_slice(self.frame.get(..header_len)?);

        self.write_network(header, payload.len())?;
        if self.kind.is_tcp() {
            self.write_tcp(header)?;
        } else {
            put_be16(header, self.layout.l4 + l4::UDP_LENGTH_OFFSET, (l4::UDP_HEADER_LEN + payload.len()) as u16)?;
        }
        let csum = self.write_checksum(header, &payload)?;
        self.next = end;
        self.index += 1;
        Some(Segment { header_len, payload, csum })
    }

    fn write_network(&self, header: &mut [u8], data_len: usize) -> Option<()> {
        let Layout { l3, l4, header_len } = self.layout;
        // `new` made sure that it fits in 16 bits.
        let total_len = header_len - l3 + data_len;
        if self.kind.ethertype() == eth::ETHERTYPE_IPV6 {
            let payload_len = total_len.checked_sub(ip::IPV6_HEADER_LEN)?;
            return put_be16(header, l3 + ip::IPV6_PAYLOAD_LEN_OFFSET, payload_len as u16);
        }
        let id = be16(header, l3 + ip::IPV4_ID_OFFSET)?.wrapping_add(self.index as u16);
        put_be16(header, l3 + ip::IPV4_TOTAL_LEN_OFFSET, total_len as u16)?;
        put_be16(header, l3 + ip::IPV4_ID_OFFSET, id)?;
        put_be16(header, l3 + ip::IPV4_CSUM_OFFSET, 0)?;
        let mut sum = Sum::new();
        sum.add(header.get(l3..l4)?);
        put_be16(header, l3 + ip::IPV4_CSUM_OFFSET, sum.checksum())
    }

    fn write_tcp(&self, header: &mut [u8]) -> Option<()> {
        let original = Tcp::parse(self.frame.get(self.layout.l4..)?)?;
        let advance = (self.next - self.layout.header_len) as u32;
        let mut flags = original.flags();
        if self.index > 0 {
            flags &= !l4::TCP_CWR;
        }
        if self.remaining() > 1 {
            flags &= !(l4::TCP_FIN | l4::TCP_PSH);
        }
        let tcp = header.get_mut(self.layout.l4..)?;
        *tcp.get_mut(l4::TCP_SEQ_OFFSET..)?.first_chunk_mut()? = original.seq().wrapping_add(advance).to_be_bytes();
        *tcp.get_mut(l4::TCP_FLAGS_OFFSET)? = flags;
        Some(())
    }

    fn write_checksum(&self, header: &mut [u8], payload: &Range<usize>) -> Option<Csum> {
        let transport = header.get_mut(self.layout.l4..)?;
        let field = usize::from(self.kind.csum_offset());
        let mut sum = self.pseudo;
        sum.add(&((transport.len() + payload.len()) as u16).to_be_bytes());
        put_be16(transport, field, sum.fold())?;
        if self.mode == ChecksumMode::Partial {
            return Some(Csum::Partial { start: self.layout.l4 as u16, offset: self.kind.csum_offset() });
        }
        // Like `complete_partial`, over two pieces.
        let mut sum = Sum::new();
        sum.add(transport);
        sum.add(self.frame.get(payload.clone())?);
        put_be16(transport, field, sum.transport_checksum(self.kind.csum_offset()))?;
        Some(Csum::None)
    }
}

fn pseudo_without_length(frame: &[u8], len: usize, kind: GsoKind, layout: Layout) -> Option<Sum> {
    let field = be16(frame, layout.l4 + usize::from(kind.csum_offset()))?;
    // At most MAX_SEGMENTS * 64 KiB, so it fits.
    let length = len.checked_sub(layout.l4)? as u32;
    let mut sum = Sum::new();
    sum.add(&field.to_be_bytes());
    // The ones' complement is the negative: this subtracts.
    sum.add(&(!length).to_be_bytes());
    Some(sum)
}

#[cfg(test)]
mod tests;
