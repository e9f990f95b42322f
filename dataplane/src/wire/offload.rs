//! What a sender left for others to do: checksums and segmentation, in our own terms and in virtio-net's.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::WireError;
use super::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthernetHeader};
use super::ip::{self, Ip};
use super::l4;

// The bindings are u32, the fields of the header are u8.
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// `struct virtio_net_hdr` as modern devices have it (virtio 1.2, section 5.1.6): as the guest wrote it, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VirtioNetHdr {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`, with or without the ECN bit.
    pub gso_type: u8,
    /// Bytes of all headers of a frame to segment; a hint.
    pub hdr_len: u16,
    /// Bytes of data in each segment.
    pub gso_size: u16,
    /// Where to start the checksum.
    pub csum_start: u16,
    /// Where to store it, from `csum_start`.
    pub csum_offset: u16,
    /// Buffers that a received frame spans, if those are mergeable.
    pub num_buffers: u16,
}

impl VirtioNetHdr {
    /// Bytes of the header in front of every frame.
    pub const LEN: usize = 12;

    /// Reads the little endian layout of the specification.
    #[inline]
    pub const fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    /// The inverse of [`from_bytes`](Self::from_bytes).
    #[inline]
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }
}

/// What is still to be done to a frame, and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// State of the transport checksum.
    pub csum: Csum,
    /// How to segment the frame if it is longer than a receiver or a network takes.
    pub gso: Option<Gso>,
}

/// State of the transport checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Csum {
    /// The field is as it would be on a wire, and nobody has vouched for it.
    #[default]
    None,
    /// As on a wire, and the sender says that it is right (`DATA_VALID`).
    Valid,
    /// The field holds the sum of the pseudo header; see [`complete_partial`](super::complete_partial).
    Partial {
        /// Where to start the sum: bytes from the start of the frame to the transport header.
        start: u16,
        /// Bytes from there to the field.
        offset: u16,
    },
}

impl Csum {
    /// Whether what is left open is the checksum of the TCP or UDP header behind the outermost IP header, as hardware takes it
    /// to be. `headers` are the frame's first bytes.
    pub fn is_outermost(self, headers: &[u8]) -> bool {
        let Self::Partial { start, offset } = self else { return false };
        let Some(ethernet) = EthernetHeader::parse(headers) else { return false };
        let l3 = usize::from(ethernet.l3_offset);
        let packet = headers.get(l3..).unwrap_or_default();
        let Some(transport) = Ip::parse(ethernet.ethertype, packet).and_then(|ip| ip.transport()) else { return false };
        let field = match transport.protocol {
            ip::PROTOCOL_TCP => l4::TCP_CSUM_OFFSET,
            ip::PROTOCOL_UDP => l4::UDP_CSUM_OFFSET,
            _ => return false,
        };
        l3 + transport.offset == usize::from(start) && field == offset
    }
}

/// A frame that stands for several: cut its data into segments of `size` and give each the headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// The protocols of the frame.
    pub kind: GsoKind,
    /// Bytes of data in each segment but the last, never 0.
    pub size: u16,
    /// Bytes from the start of the frame to the data; a hint to receivers, which must find it themselves.
    pub header_len: u16,
    /// The TCP flow knows explicit congestion notification (RFC 3168).
    pub ecn: bool,
}

/// Protocols that can be segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4: one datagram per segment (USO).
    Udp4,
    /// UDP over IPv6: one datagram per segment (USO).
    Udp6,
}

// It travels with every frame.
const _: () = assert!(size_of::<Offload>() <= 16);

impl GsoKind {
    /// EtherType of the network protocol.
    pub const fn ethertype(self) -> u16 {
        match self {
            Self::Tcp4 | Self::Udp4 => ETHERTYPE_IPV4,
            Self::Tcp6 | Self::Udp6 => ETHERTYPE_IPV6,
        }
    }

    /// IP protocol number of the transport protocol.
    pub const fn protocol(self) -> u8 {
        match self {
            Self::Tcp4 | Self::Tcp6 => ip::PROTOCOL_TCP,
            Self::Udp4 | Self::Udp6 => ip::PROTOCOL_UDP,
        }
    }

    /// Bytes from the start of the transport header to its checksum.
    pub const fn csum_offset(self) -> u16 {
        match self {
            Self::Tcp4 | Self::Tcp6 => l4::TCP_CSUM_OFFSET,
            Self::Udp4 | Self::Udp6 => l4::UDP_CSUM_OFFSET,
        }
    }

    /// Is it TCP?
    pub const fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp4 | Self::Tcp6)
    }

    const fn to_virtio(self) -> u8 {
        match self {
            Self::Tcp4 => GSO_TCPV4,
            Self::Tcp6 => GSO_TCPV6,
            Self::Udp4 | Self::Udp6 => GSO_UDP_L4,
        }
    }
}

impl Offload {
    /// An ordinary frame: nothing to do, nothing known.
    pub const NONE: Self = Self { csum: Csum::None, gso: None };

    /// Makes sense of the header `hdr` that came with a frame of `frame_len` bytes, of which `headers` are the first.
    ///
    /// Flags that virtio 1.2 does not define for this direction are ignored, as it demands. What comes out holds for
    /// this frame: a partial checksum lies inside it and behind the network header, so completing it cannot change
    /// what the switch decided on; segmentation names the protocols that `headers` show.
    ///
    /// # Errors
    ///
    /// The [`WireError`] says which promise of virtio 1.2, section 5.1.6.2 the header breaks. The frame is to be
    /// dropped: nobody else could make sense of it either.
    #[inline]
    pub fn from_virtio(hdr: &VirtioNetHdr, headers: &[u8], frame_len: usize) -> Result<Self, WireError> {
        let csum = csum_from_virtio(hdr, headers, frame_len)?;
        let gso = match hdr.gso_type {
            GSO_NONE => None,
            _ => Some(gso_from_virtio(hdr, csum, headers, frame_len)?),
        };
        Ok(Self { csum, gso })
    }

    /// The header for a receiver that negotiated what this asks for; `num_buffers` is copied into it.
    #[inline]
    pub fn to_virtio(&self, num_buffers: u16) -> VirtioNetHdr {
        let mut hdr = VirtioNetHdr { num_buffers, ..VirtioNetHdr::default() };
        match self.csum {
            Csum::None => {}
            Csum::Valid => hdr.flags = DATA_VALID,
            Csum::Partial { start, offset } => {
                hdr.flags = NEEDS_CSUM;
                hdr.csum_start = start;
                hdr.csum_offset = offset;
            }
        }
        if let Some(gso) = self.gso {
            hdr.gso_type = gso.kind.to_virtio() | if gso.ecn { GSO_ECN } else { 0 };
            hdr.gso_size = gso.size;
            hdr.hdr_len = gso.header_len;
        }
        hdr
    }

    /// The same for a frame that grew (`delta` > 0) or shrank by that many bytes in front of its network header, as
    /// inserting and stripping a VLAN tag do.
    ///
    /// # Errors
    ///
    /// [`WireError::CsumOutsideFrame`] if the checksum would start where 16 bits cannot say.
    #[inline]
    pub fn shift(&self, delta: i16) -> Result<Self, WireError> {
        let mut shifted = *self;
        if let Csum::Partial { start, .. } = &mut shifted.csum {
            *start = start.checked_add_signed(delta).ok_or(WireError::CsumOutsideFrame)?;
        }
        if let Some(gso) = &mut shifted.gso {
            gso.header_len = gso.header_len.saturating_add_signed(delta);
        }
        Ok(shifted)
    }
}

#[inline]
fn csum_from_virtio(hdr: &VirtioNetHdr, headers: &[u8], frame_len: usize) -> Result<Csum, WireError> {
    if hdr.flags & NEEDS_CSUM == 0 {
        return Ok(if hdr.flags & DATA_VALID == 0 { Csum::None } else { Csum::Valid });
    }
    let (start, offset) = (hdr.csum_start, hdr.csum_offset);
    if usize::from(start) + usize::from(offset) + 2 > frame_len {
        return Err(WireError::CsumOutsideFrame);
    }
    let ethernet = EthernetHeader::parse(headers).ok_or(WireError::Truncated)?;
    let network_len = match ethernet.ethertype {
        ETHERTYPE_IPV4 => ip::IPV4_HEADER_LEN,
        ETHERTYPE_IPV6 => ip::IPV6_HEADER_LEN,
        _ => 0,
    };
    if usize::from(start) < usize::from(ethernet.l3_offset) + network_len {
        return Err(WireError::CsumBeforeTransport);
    }
    Ok(Csum::Partial { start, offset })
}

fn gso_from_virtio(hdr: &VirtioNetHdr, csum: Csum, headers: &[u8], frame_len: usize) -> Result<Gso, WireError> {
    let ecn = hdr.gso_type & GSO_ECN != 0;
    let is_v6 = EthernetHeader::parse(headers).ok_or(WireError::Truncated)?.ethertype == ETHERTYPE_IPV6;
    let kind = match hdr.gso_type & !GSO_ECN {
        GSO_TCPV4 => GsoKind::Tcp4,
        GSO_TCPV6 => GsoKind::Tcp6,
        GSO_UDP_L4 if !ecn && is_v6 => GsoKind::Udp6,
        GSO_UDP_L4 if !ecn => GsoKind::Udp4,
        // Also legacy UFO (3), which makes IP fragments; we never offer it.
        _ => return Err(WireError::UnknownGsoType(hdr.gso_type)),
    };
    if hdr.gso_size == 0 {
        return Err(WireError::ZeroGsoSize);
    }
    let layout = Layout::find(kind, csum, headers, frame_len)?;
    // The guest's hint is not needed, so a wrong one goes no further.
    let header_len = u16::try_from(layout.header_len).map_err(|_| WireError::HeaderTooLong)?;
    Ok(Gso { kind, size: hdr.gso_size, header_len, ecn })
}

/// Where the headers of a frame that asks for segmentation are, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// The network header.
    pub(super) l3: usize,
    /// The transport header.
    pub(super) l4: usize,
    /// The data. Within the frame.
    pub(super) header_len: usize,
}

impl Layout {
    /// Finds the headers that `kind` promises, of a frame of `frame_len` bytes that starts with `headers`, and checks
    /// that `csum` leaves their checksum open. With a TCP header beyond `headers`, it is assumed to have no options.
    pub(super) fn find(kind: GsoKind, csum: Csum, headers: &[u8], frame_len: usize) -> Result<Self, WireError> {
        let Csum::Partial { start, offset } = csum else {
            return Err(WireError::GsoWithoutCsum);
        };
        let ethernet = EthernetHeader::parse(headers).ok_or(WireError::Truncated)?;
        let l3 = usize::from(ethernet.l3_offset);
        let packet = headers.get(l3..).unwrap_or_default();
        let transport = Ip::parse(kind.ethertype(), packet)
            .filter(|_| ethernet.ethertype == kind.ethertype())
            .and_then(|ip| ip.transport())
            .filter(|transport| transport.protocol == kind.protocol())
            .ok_or(WireError::GsoMismatch)?;
        let l4 = l3 + transport.offset;
        if usize::from(start) != l4 || offset != kind.csum_offset() {
            return Err(WireError::GsoMismatch);
        }
        let header_len = l4 + transport_header_len(kind, headers.get(l4..).unwrap_or_default())?;
        if header_len > frame_len {
            return Err(WireError::Truncated);
        }
        Ok(Self { l3, l4, header_len })
    }
}

fn transport_header_len(kind: GsoKind, transport: &[u8]) -> Result<usize, WireError> {
    if !kind.is_tcp() {
        return Ok(l4::UDP_HEADER_LEN);
    }
    match l4::tcp_header_len(transport) {
        None => Ok(l4::TCP_HEADER_LEN),
        Some(len) if len >= l4::TCP_HEADER_LEN => Ok(len),
        Some(_) => Err(WireError::GsoMismatch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{insert_tag, strip_tag};
    use etherparse::PacketBuilder;
    use proptest::prelude::*;
    use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_RSC_INFO, VIRTIO_NET_HDR_GSO_UDP};

    fn frame(is_v6: bool, is_tcp: bool) -> Vec<u8> {
        let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let ip = if is_v6 { link.ipv6([0xfd; 16], [0xfe; 16], 64) } else { link.ipv4([10; 4], [11; 4], 64) };
        let mut frame = Vec::new();
        if is_tcp {
            ip.tcp(1, 2, 3, 4).write(&mut frame, &[7; 1000]).unwrap();
        } else {
            ip.udp(1, 2).write(&mut frame, &[7; 1000]).unwrap();
        }
        frame
    }

    /// What Linux sends for `frame(is_v6, is_tcp)`.
    fn header(is_v6: bool, is_tcp: bool) -> VirtioNetHdr {
        VirtioNetHdr {
            flags: 1,
            gso_type: match (is_v6, is_tcp) {
                (false, true) => 1,
                (true, true) => 4,
                (_, false) => 5,
            },
            hdr_len: 0,
            gso_size: 100,
            csum_start: if is_v6 { 54 } else { 34 },
            csum_offset: if is_tcp { 16 } else { 6 },
            num_buffers: 0,
        }
    }

    fn check(hdr: VirtioNetHdr, frame: &[u8]) -> Result<Offload, WireError> {
        Offload::from_virtio(&hdr, &frame[..frame.len().min(128)], frame.len())
    }

    #[test]
    fn layout_of_the_specification() {
        let hdr = VirtioNetHdr {
            flags: 1,
            gso_type: 2,
            hdr_len: 0x0403,
            gso_size: 0x0605,
            csum_start: 0x0807,
            csum_offset: 0x0a09,
            num_buffers: 0x0c0b,
        };
        assert_eq!(hdr.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(VirtioNetHdr::from_bytes(&hdr.to_bytes()), hdr);
    }

    #[test]
    fn checksum_flags() {
        let csum = |flags| {
            check(VirtioNetHdr { flags, gso_type: 0, ..header(false, true) }, &frame(false, true)).unwrap().csum
        };
        let partial = Csum::Partial { start: 34, offset: 16 };
        assert_eq!(csum(0), Csum::None);
        assert_eq!(csum(VIRTIO_NET_HDR_F_RSC_INFO as u8 | 0xf0), Csum::None, "unknown flags are ignored");
        assert_eq!(csum(DATA_VALID), Csum::Valid);
        assert_eq!(csum(NEEDS_CSUM), partial);
        assert_eq!(csum(NEEDS_CSUM | DATA_VALID), partial, "what needs work is not valid");
        assert_eq!(Offload::from_virtio(&VirtioNetHdr::default(), &[], 0), Ok(Offload::NONE));
    }

    #[test]
    fn checksum_must_be_inside_the_frame_and_behind_the_network_header() {
        let csum = |is_v6, csum_start, csum_offset| {
            let hdr = VirtioNetHdr { gso_type: 0, csum_start, csum_offset, ..header(is_v6, true) };
            check(hdr, &frame(is_v6, true)).map(|offload| offload.csum)
        };
        let len = frame(false, true).len() as u16;
        assert!(csum(false, 34, len - 36).is_ok());
        assert!(csum(false, 40, 6).is_ok(), "a tunnel's inner header, say");
        for (start, offset) in [(34, len - 35), (len, 0), (len - 1, 0), (0xffff, 0xffff)] {
            assert_eq!(csum(false, start, offset), Err(WireError::CsumOutsideFrame));
        }
        for start in [0, 13, 14, 33] {
            assert_eq!(csum(false, start, 16), Err(WireError::CsumBeforeTransport));
        }
        assert_eq!(csum(true, 53, 16), Err(WireError::CsumBeforeTransport));

        let mut arp = frame(false, true);
        arp[13] = 6;
        let hdr = |csum_start| VirtioNetHdr { gso_type: 0, csum_start, csum_offset: 0, ..header(false, true) };
        assert!(check(hdr(14), &arp).is_ok());
        assert_eq!(check(hdr(13), &arp), Err(WireError::CsumBeforeTransport));
        assert_eq!(check(hdr(2), &arp[..10]), Err(WireError::Truncated));
    }

    #[test]
    fn every_kind_of_segmentation() {
        for (is_v6, is_tcp, kind, header_len) in [
            (false, true, GsoKind::Tcp4, 54),
            (true, true, GsoKind::Tcp6, 74),
            (false, false, GsoKind::Udp4, 42),
            (true, false, GsoKind::Udp6, 62),
        ] {
            let hdr = VirtioNetHdr { hdr_len: 0xffff, ..header(is_v6, is_tcp) };
            let offload = check(hdr, &frame(is_v6, is_tcp)).unwrap();
            assert_eq!(offload.gso, Some(Gso { kind, size: 100, header_len, ecn: false }));
            assert_eq!(offload.csum, Csum::Partial { start: hdr.csum_start, offset: hdr.csum_offset });
            let out = VirtioNetHdr { hdr_len: header_len, num_buffers: 3, ..hdr };
            assert_eq!(offload.to_virtio(3), out, "only the hint changed");
        }
    }

    #[test]
    fn ecn_is_for_tcp() {
        let with_ecn = |hdr: VirtioNetHdr| VirtioNetHdr { gso_type: hdr.gso_type | GSO_ECN, ..hdr };
        let offload = check(with_ecn(header(true, true)), &frame(true, true)).unwrap();
        assert!(offload.gso.unwrap().ecn);
        assert_eq!(offload.to_virtio(0).gso_type, GSO_TCPV6 | GSO_ECN);
        for is_v6 in [false, true] {
            let udp = check(with_ecn(header(is_v6, false)), &frame(is_v6, false));
            assert_eq!(udp, Err(WireError::UnknownGsoType(0x85)));
        }
    }

    #[test]
    fn gso_types_that_are_refused() {
        for gso_type in (0..=255).filter(|t| ![0, 1, 4, 5, 0x81, 0x84].contains(t)) {
            let result = check(VirtioNetHdr { gso_type, ..header(false, true) }, &frame(false, true));
            assert_eq!(result, Err(WireError::UnknownGsoType(gso_type)));
        }
        let ufo = VirtioNetHdr { gso_type: VIRTIO_NET_HDR_GSO_UDP as u8, ..header(false, false) };
        assert_eq!(check(ufo, &frame(false, false)), Err(WireError::UnknownGsoType(3)));
    }

    #[test]
    fn gso_that_contradicts_itself() {
        let tcp = frame(false, true);
        let hdr = header(false, true);
        assert_eq!(check(VirtioNetHdr { gso_size: 0, ..hdr }, &tcp), Err(WireError::ZeroGsoSize));
        assert_eq!(check(VirtioNetHdr { flags: 0, ..hdr }, &tcp), Err(WireError::GsoWithoutCsum));
        assert_eq!(check(VirtioNetHdr { flags: DATA_VALID, ..hdr }, &tcp), Err(WireError::GsoWithoutCsum));
        for bad in [
            VirtioNetHdr { gso_type: GSO_TCPV6, ..hdr },
            VirtioNetHdr { gso_type: GSO_UDP_L4, csum_offset: 6, ..hdr },
            VirtioNetHdr { csum_start: 38, ..hdr },
            VirtioNetHdr { csum_offset: 6, ..hdr },
        ] {
            assert_eq!(check(bad, &tcp), Err(WireError::GsoMismatch), "{bad:?}");
        }
        assert_eq!(check(header(true, true), &tcp), Err(WireError::GsoMismatch));
        assert_eq!(check(hdr, &frame(true, true)), Err(WireError::CsumBeforeTransport));
        let mut other = tcp.clone();
        other[12..14].copy_from_slice(&[0x88, 0xb5]);
        assert_eq!(check(hdr, &other), Err(WireError::GsoMismatch), "IPv4 in all but the ethertype");
    }

    #[test]
    fn gso_of_headers_that_are_bad() {
        let hdr = header(false, true);
        let patched = |at: usize, byte: u8| {
            let mut frame = frame(false, true);
            frame[at] = byte;
            check(hdr, &frame)
        };
        assert_eq!(patched(20, 0x20), Err(WireError::GsoMismatch), "a fragment");
        assert_eq!(patched(14, 0x65), Err(WireError::GsoMismatch), "version 6 in an IPv4 frame");
        assert_eq!(patched(46, 0x40), Err(WireError::GsoMismatch), "TCP header of 16 bytes");
        let tcp = frame(false, true);
        assert_eq!(check(hdr, &tcp[..53]), Err(WireError::Truncated));
        assert!(check(hdr, &tcp[..54]).is_ok(), "no data at all is one segment");
    }

    #[test]
    fn transport_beyond_the_snapshot() {
        let mut long = frame(true, true);
        long[20] = 43;
        let mut routing = vec![6, 9];
        routing.resize(80, 0);
        long.splice(54..54, routing);
        let hdr = VirtioNetHdr { csum_start: 134, ..header(true, true) };
        assert_eq!(check(hdr, &long).unwrap().gso.unwrap().header_len, 154);
        assert_eq!(check(hdr, &long[..153]), Err(WireError::Truncated));
    }

    #[test]
    fn shift_follows_a_tag() {
        let untagged = frame(false, true);
        let before = check(header(false, true), &untagged).unwrap();
        let mut buf = vec![0; 4];
        buf.extend(&untagged);
        insert_tag(&mut buf, 4, 100).unwrap();
        let tagged = before.shift(4).unwrap();
        assert_eq!(check(tagged.to_virtio(0), &buf), Ok(tagged));
        let (start, _) = strip_tag(&mut buf, 0).unwrap();
        assert_eq!(check(tagged.shift(-4).unwrap().to_virtio(0), &buf[start..]), Ok(before));

        let at = |start| Offload { csum: Csum::Partial { start, offset: 16 }, gso: None };
        assert_eq!(at(0xfffd).shift(4), Err(WireError::CsumOutsideFrame));
        assert_eq!(at(3).shift(-4), Err(WireError::CsumOutsideFrame));
        assert_eq!(Offload::NONE.shift(i16::MIN), Ok(Offload::NONE));
    }

    proptest! {
        #[test]
        fn any_header_on_any_bytes(
            bytes: [u8; 12], frame in prop::collection::vec(any::<u8>(), 0..200), snapshot in 0usize..128,
        ) {
            let hdr = VirtioNetHdr::from_bytes(&bytes);
            prop_assert_eq!(hdr.to_bytes(), bytes);
            let _ = Offload::from_virtio(&hdr, &frame[..snapshot.min(frame.len())], frame.len());
        }

        /// Whatever is accepted holds, and says the same when it is sent on.
        #[test]
        fn any_header_on_a_good_frame(
            is_v6: bool, is_tcp: bool, flags in 0u8..4, gso_type in prop::sample::select(vec![0u8, 1, 3, 4, 5, 0x81, 0x84]),
            gso_size in 0u16..3, csum_start in 0u16..80, csum_offset in 0u16..20, likely: bool, len in 0usize..1100,
        ) {
            let mut frame = frame(is_v6, is_tcp);
            frame.truncate(len);
            let mut hdr = VirtioNetHdr { flags, gso_type, gso_size, csum_start, csum_offset, ..VirtioNetHdr::default() };
            if likely {
                let good = header(is_v6, is_tcp);
                hdr = VirtioNetHdr { gso_size, ..good };
            }
            if let Ok(offload) = check(hdr, &frame) {
                prop_assert_eq!(check(offload.to_virtio(1), &frame), Ok(offload));
                if let Csum::Partial { start, offset } = offload.csum {
                    prop_assert!(usize::from(start + offset) + 2 <= frame.len());
                    prop_assert!(start >= 34);
                }
                if let Some(gso) = offload.gso {
                    prop_assert!(gso.size > 0 && usize::from(gso.header_len) <= frame.len());
                    prop_assert_eq!((gso.kind.is_tcp(), gso.kind.ethertype() == 0x86dd), (is_tcp, is_v6));
                }
            }
        }
    }
}
