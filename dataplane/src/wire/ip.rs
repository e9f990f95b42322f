//! Checked views of IPv4 (RFC 791) and IPv6 (RFC 8200) headers.

use super::be16;
use super::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};

/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// IP protocol number of SCTP.
pub const PROTOCOL_SCTP: u8 = 132;

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER_LEN: usize = 20;
/// Bytes of the fixed IPv6 header.
pub const IPV6_HEADER_LEN: usize = 40;

/// Bytes from the start of an IPv4 header to its total length.
pub const IPV4_TOTAL_LEN_OFFSET: usize = 2;
/// Bytes from the start of an IPv4 header to its identification.
pub const IPV4_ID_OFFSET: usize = 4;
/// Bytes from the start of an IPv4 header to its checksum.
pub const IPV4_CSUM_OFFSET: usize = 10;
/// Bytes from the start of an IPv6 header to its payload length.
pub const IPV6_PAYLOAD_LEN_OFFSET: usize = 4;

/// IPv6 extension headers that [`Ipv6::parse`] walks before it gives up on finding the transport header.
/// RFC 8200, section 4.1 knows seven occurrences in a sensible packet.
pub const MAX_EXTENSION_HEADERS: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// The transport header of a packet that is not a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// IP protocol number.
    pub protocol: u8,
    /// Bytes from the start of the IP header. May lie beyond the bytes that were parsed, if those are a snapshot.
    pub offset: usize,
}

/// An IP header of either version.
#[derive(Debug, Clone, Copy)]
pub enum Ip<'a> {
    /// Version 4.
    V4(Ipv4<'a>),
    /// Version 6.
    V6(Ipv6<'a>),
}

impl<'a> Ip<'a> {
    /// Reads the IP header that `ethertype` announces at the start of `bytes`; `None` if it announces none, or if
    /// [`Ipv4::parse`] or [`Ipv6::parse`] refuse it.
    #[inline]
    pub fn parse(ethertype: u16, bytes: &'a [u8]) -> Option<Self> {
        match ethertype {
            ETHERTYPE_IPV4 => Ipv4::parse(bytes).map(Self::V4),
            ETHERTYPE_IPV6 => Ipv6::parse(bytes).map(Self::V6),
            _ => None,
        }
    }

    /// The transport header; `None` in a fragment, and if the chain of extension headers does not lead to one.
    #[inline]
    pub fn transport(&self) -> Option<Transport> {
        match self {
            Self::V4(ip) => ip.transport(),
            Self::V6(ip) => ip.transport(),
        }
    }
}

/// An IPv4 header, options included, that lies inside its bytes. The total length is not checked against them:
/// they may be a snapshot of the first bytes only.
#[derive(Debug, Clone, Copy)]
pub struct Ipv4<'a> {
    fixed: &'a [u8; IPV4_HEADER_LEN],
}

impl<'a> Ipv4<'a> {
    /// Reads the header at the start of `bytes`; `None` if the version is not 4, the header length is below 20 or
    /// `bytes` end inside the header.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let ip = Self { fixed: bytes.first_chunk()? };
        let len = ip.header_len();
        let is_whole = IPV4_HEADER_LEN <= len && len <= bytes.len();
        (ip.fixed[0] >> 4 == 4 && is_whole).then_some(ip)
    }

    /// Bytes of the header with its options: 20..=60.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.fixed[0] & 0xf) * 4
    }

    /// Is this one of several fragments? True of the first one too.
    #[inline]
    pub fn is_fragment(&self) -> bool {
        const MORE_AND_OFFSET: u16 = 0x3fff;
        u16::from_be_bytes([self.fixed[6], self.fixed[7]]) & MORE_AND_OFFSET != 0
    }

    /// IP protocol number.
    #[inline]
    pub fn protocol(&self) -> u8 {
        self.fixed[9]
    }

    /// Source address.
    #[inline]
    pub fn src(&self) -> [u8; 4] {
        let [.., a, b, c, d, _, _, _, _] = *self.fixed;
        [a, b, c, d]
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self) -> [u8; 4] {
        let [.., a, b, c, d] = *self.fixed;
        [a, b, c, d]
    }

    /// The transport header; `None` in a fragment.
    #[inline]
    pub fn transport(&self) -> Option<Transport> {
        (!self.is_fragment()).then(|| Transport { protocol: self.protocol(), offset: self.header_len() })
    }
}

/// An IPv6 header, and where its chain of extension headers ends.
#[derive(Debug, Clone, Copy)]
pub struct Ipv6<'a> {
    fixed: &'a [u8; IPV6_HEADER_LEN],
    upper: Upper,
}

/// The end of a chain of extension headers.
#[derive(Debug, Clone, Copy)]
struct Upper {
    protocol: u8,
    offset: usize,
    end: ChainEnd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChainEnd {
    Transport,
    Fragment,
    /// More headers than the bound, or than the bytes at hand show.
    Lost,
}

impl<'a> Ipv6<'a> {
    /// Reads the header at the start of `bytes` and walks at most [`MAX_EXTENSION_HEADERS`] extension headers;
    /// `None` if the version is not 6 or `bytes` end inside the fixed header. A chain that does not end well leaves a
    /// packet without [`transport`](Self::transport).
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let fixed: &[u8; IPV6_HEADER_LEN] = bytes.first_chunk()?;
        (fixed[0] >> 4 == 6).then(|| Self { fixed, upper: Upper::find(fixed[6], bytes) })
    }

    /// Is this one of several fragments? True of the first one too, false of an atomic fragment (RFC 6946).
    #[inline]
    pub fn is_fragment(&self) -> bool {
        self.upper.end == ChainEnd::Fragment
    }

    /// IP protocol number of the transport; in a fragment, the one of its first fragmentable header, which all
    /// fragments of a packet share.
    #[inline]
    pub fn protocol(&self) -> u8 {
        self.upper.protocol
    }

    /// Source address.
    #[inline]
    pub fn src(&self) -> [u8; 16] {
        address(self.fixed, 8)
    }

    /// Destination address of the fixed header; with a routing header (RFC 8200, section 4.4) the next hop of several.
    #[inline]
    pub fn dst(&self) -> [u8; 16] {
        address(self.fixed, 24)
    }

    /// The transport header; `None` in a fragment, and if the chain of extension headers is longer than
    /// [`MAX_EXTENSION_HEADERS`] or than the bytes that were parsed.
    #[inline]
    pub fn transport(&self) -> Option<Transport> {
        let Upper { protocol, offset, end } = self.upper;
        (end == ChainEnd::Transport).then_some(Transport { protocol, offset })
    }
}

#[inline]
fn address(header: &[u8; IPV6_HEADER_LEN], at: usize) -> [u8; 16] {
    header.get(at..).and_then(|rest| rest.first_chunk().copied()).unwrap_or_default()
}

impl Upper {
    #[inline]
    fn find(protocol: u8, packet: &[u8]) -> Self {
        if is_extension(protocol) {
            Self::walk(protocol, packet)
        } else {
            Self { protocol, offset: IPV6_HEADER_LEN, end: ChainEnd::Transport }
        }
    }

    fn walk(mut protocol: u8, packet: &[u8]) -> Self {
        let mut offset = IPV6_HEADER_LEN;
        for _ in 0..MAX_EXTENSION_HEADERS {
            if !is_extension(protocol) {
                break;
            }
            // Only the start of each header is read: the rest may be beyond a snapshot.
            let Some([next, length, ..]) = packet.get(offset..).and_then(|rest| rest.first_chunk::<4>()) else {
                break;
            };
            let length = usize::from(*length);
            let len = match protocol {
                FRAGMENT if is_fragment(packet, offset) => {
                    return Self { protocol: *next, offset, end: ChainEnd::Fragment };
                }
                FRAGMENT => 8,
                AUTHENTICATION => 8 + 4 * length,
                _ => 8 + 8 * length,
            };
            (protocol, offset) = (*next, offset + len);
        }
        let end = if is_extension(protocol) { ChainEnd::Lost } else { ChainEnd::Transport };
        Self { protocol, offset, end }
    }
}

/// Is this the number of an extension header that can precede a transport header (RFC 8200, section 4)?
#[inline]
const fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION)
}

/// Has the fragment header at `offset` an offset or "more fragments"?
fn is_fragment(packet: &[u8], offset: usize) -> bool {
    const OFFSET_AND_MORE: u16 = 0xfff9;
    be16(packet, offset + 2).is_some_and(|field| field & OFFSET_AND_MORE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{IpHeaders, IpNumber, Ipv6FlowLabel, Ipv6Header};
    use proptest::prelude::*;

    fn ipv6_packet(first: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[6] = first;
        packet[8] = 0xfd;
        packet[24] = 0xfe;
        packet.extend(rest);
        packet
    }

    fn transport_of(first: u8, rest: &[u8]) -> Option<Transport> {
        Ipv6::parse(&ipv6_packet(first, rest)).unwrap().transport()
    }

    #[test]
    fn ipv4_fields() {
        let mut packet =
            *b"\x46\x00\x00\x73\x12\x34\x40\x00\x40\x11\xb8\x61\xc0\xa8\x00\x01\xc0\xa8\x00\xc7\x01\x01\x01\x01";
        let ip = Ipv4::parse(&packet).unwrap();
        assert_eq!((ip.header_len(), ip.protocol()), (24, 17));
        assert_eq!((ip.src(), ip.dst()), ([192, 168, 0, 1], [192, 168, 0, 199]));
        assert!(!ip.is_fragment(), "don't fragment is no fragment");
        assert_eq!(ip.transport(), Some(Transport { protocol: 17, offset: 24 }));

        packet[6] = 0x20;
        assert!(Ipv4::parse(&packet).unwrap().is_fragment(), "first fragment");
        packet[6..8].copy_from_slice(&[0, 1]);
        assert_eq!(Ipv4::parse(&packet).unwrap().transport(), None, "last fragment");
    }

    #[test]
    fn ipv4_bad_headers() {
        let good = *b"\x45\x00\x00\x73\x00\x00\x40\x00\x40\x11\xb8\x61\xc0\xa8\x00\x01\xc0\xa8\x00\xc7";
        assert!(Ipv4::parse(&good).is_some());
        assert!(Ipv4::parse(&good[..19]).is_none());
        for first in [0x44, 0x46, 0x40, 0x55, 0x65] {
            let mut bad = good;
            bad[0] = first;
            assert!(Ipv4::parse(&bad).is_none(), "{first:#x}");
        }
    }

    #[test]
    fn ipv6_without_extensions() {
        let packet = ipv6_packet(PROTOCOL_TCP, &[]);
        let ip = Ipv6::parse(&packet).unwrap();
        assert_eq!((ip.src()[0], ip.dst()[0], ip.protocol()), (0xfd, 0xfe, PROTOCOL_TCP));
        assert_eq!(ip.transport(), Some(Transport { protocol: PROTOCOL_TCP, offset: 40 }));
        assert!(Ipv6::parse(&packet[..39]).is_none());
        assert!(Ipv6::parse(&[0x45; 40]).is_none());
    }

    #[test]
    fn ipv6_extension_chain() {
        let mut chain = Vec::new();
        chain.extend([ROUTING, 0, 0, 0, 0, 0, 0, 0]); // hop by hop
        chain.extend([AUTHENTICATION, 1].into_iter().chain([0; 14])); // routing, 16 bytes
        chain.extend([DESTINATION, 4].into_iter().chain([0; 22])); // authentication, 24 bytes
        chain.extend([PROTOCOL_UDP, 0, 0, 0, 0, 0, 0, 0]); // destination options
        assert_eq!(transport_of(HOP_BY_HOP, &chain), Some(Transport { protocol: PROTOCOL_UDP, offset: 40 + 56 }));
        // The snapshot may end inside the last extension header.
        assert!(transport_of(HOP_BY_HOP, &chain[..52]).is_some());
        assert_eq!(transport_of(HOP_BY_HOP, &chain[..50]), None);
    }

    #[test]
    fn ipv6_fragments() {
        let fragment = |offset_and_more: u16| {
            let [high, low] = offset_and_more.to_be_bytes();
            ipv6_packet(FRAGMENT, &[PROTOCOL_UDP, 0, high, low, 0, 0, 0, 1])
        };
        for field in [1, 8, 0xfff9] {
            let packet = fragment(field);
            let ip = Ipv6::parse(&packet).unwrap();
            assert!(ip.is_fragment());
            assert_eq!((ip.protocol(), ip.transport()), (PROTOCOL_UDP, None));
        }
        let atomic = fragment(6);
        let ip = Ipv6::parse(&atomic).unwrap();
        assert!(!ip.is_fragment(), "reserved bits do not count");
        assert_eq!(ip.transport(), Some(Transport { protocol: PROTOCOL_UDP, offset: 48 }));
    }

    #[test]
    fn ipv6_chain_is_bounded() {
        let chain = |count: usize| {
            let mut headers: Vec<u8> = [DESTINATION, 0, 0, 0, 0, 0, 0, 0].repeat(count);
            headers[(count - 1) * 8] = PROTOCOL_TCP;
            headers
        };
        assert!(transport_of(DESTINATION, &chain(MAX_EXTENSION_HEADERS)).is_some());
        assert_eq!(transport_of(DESTINATION, &chain(MAX_EXTENSION_HEADERS + 1)), None);
    }

    proptest! {
        #[test]
        fn any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..160), version in 4u8..=6, next in 0u8..64) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 0xf;
            }
            if let Some(next_header) = bytes.get_mut(6) {
                *next_header = next;
            }
            for ethertype in [ETHERTYPE_IPV4, ETHERTYPE_IPV6, 0x0806] {
                if let Some(transport) = Ip::parse(ethertype, &bytes).and_then(|ip| ip.transport()) {
                    prop_assert!(transport.offset >= IPV4_HEADER_LEN);
                    prop_assert!(transport.offset <= IPV6_HEADER_LEN + MAX_EXTENSION_HEADERS * 2048);
                }
            }
        }

        #[test]
        fn agrees_with_etherparse(
            flow in 0u32..1 << 20, src: [u8; 16], dst: [u8; 16],
            extensions in prop::collection::vec((0usize..4, 0usize..3), 0..4),
        ) {
            // Hop by hop must come first to etherparse, so it is not among these.
            let mut rest = Vec::new();
            let kinds: Vec<u8> = extensions.iter().map(|(kind, _)| [ROUTING, DESTINATION, AUTHENTICATION, FRAGMENT][*kind]).collect();
            for (index, (_, size)) in extensions.iter().enumerate() {
                let kind = kinds[index];
                let next = kinds.get(index + 1).copied().unwrap_or(PROTOCOL_UDP);
                let (length, bytes) = match kind {
                    FRAGMENT => (0, 8),
                    AUTHENTICATION => (*size as u8 + 1, 12 + 4 * size),
                    _ => (*size as u8, 8 + 8 * size),
                };
                rest.extend([next, length]);
                rest.resize(rest.len() + bytes - 2, 0);
            }
            let first = kinds.first().copied().unwrap_or(PROTOCOL_UDP);
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::try_new(flow).unwrap(),
                payload_length: rest.len() as u16 + 8,
                next_header: IpNumber(first),
                hop_limit: 64,
                source: src,
                destination: dst,
            };
            let mut packet = header.to_bytes().to_vec();
            packet.extend(&rest);
            packet.extend([0; 8]);

            let ip = Ipv6::parse(&packet).unwrap();
            prop_assert_eq!((ip.src(), ip.dst()), (src, dst));
            let ours = ip.transport().map(|t| (t.protocol, t.offset));
            prop_assert_eq!(ours, Some((PROTOCOL_UDP, 40 + rest.len())));
            if let Ok((_, payload)) = IpHeaders::from_slice(&packet) && payload.ip_number == IpNumber::UDP {
                prop_assert_eq!(payload.payload.len(), packet.len() - 40 - rest.len());
            }
        }
    }
}
