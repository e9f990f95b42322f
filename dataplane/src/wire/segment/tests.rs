//! Super-frames that etherparse builds, cut by us, and taken apart by etherparse again.

use super::*;
use crate::wire::{Gso, complete_partial};
use etherparse::{
    Ethernet2Header, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header, Ipv6RawExtHeader,
    Ipv6RoutingExtensions, NetSlice, SlicedPacket, TcpHeader, TransportSlice, UdpHeader,
};
use proptest::prelude::*;

/// A super-frame in the making.
#[derive(Debug, Clone)]
struct Super {
    kind: GsoKind,
    tags: Vec<u16>,
    /// Words of 4 bytes.
    ip_options: usize,
    /// Bytes of the data of the hop by hop, routing and destination options headers: 6 and a multiple of 8.
    extensions: Vec<usize>,
    tcp_options: usize,
    tcp_flags: u8,
    seq: u32,
    id: u16,
    payload: Vec<u8>,
    size: u16,
}

impl Super {
    fn simple(kind: GsoKind, payload: usize, size: u16) -> Self {
        Self {
            kind,
            tags: vec![],
            ip_options: 0,
            extensions: vec![],
            tcp_options: 0,
            tcp_flags: 0x10,
            seq: 1000,
            id: 7,
            payload: (0..payload).map(|n| n as u8).collect(),
            size,
        }
    }

    fn is_v6(&self) -> bool {
        matches!(self.kind, GsoKind::Tcp6 | GsoKind::Udp6)
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = if self.kind.is_tcp() {
            let mut tcp = TcpHeader::new(4000, 5000, self.seq, 500);
            tcp.acknowledgment_number = 9;
            tcp.set_options_raw(&vec![1; self.tcp_options * 4]).unwrap();
            let mut bytes = tcp.to_bytes().to_vec();
            bytes[13] = self.tcp_flags;
            bytes
        } else {
            let length = (8 + self.payload.len()) as u16;
            UdpHeader { source_port: 4000, destination_port: 5000, length, checksum: 0 }.to_bytes().to_vec()
        };
        bytes.extend(&self.payload);
        bytes
    }

    fn ip(&self, transport_len: usize) -> IpHeaders {
        let protocol = IpNumber(self.kind.protocol());
        let mut ip = if self.is_v6() {
            let header =
                Ipv6Header { hop_limit: 64, source: [0xfd; 16], destination: [0xfe; 16], ..Default::default() };
            let raw = |index: usize| {
                let len = self.extensions.get(index)?;
                Some(Ipv6RawExtHeader::new_raw(protocol, &vec![0; *len]).unwrap())
            };
            let mut extensions =
                Ipv6Extensions { hop_by_hop_options: raw(0), destination_options: raw(2), ..Default::default() };
            extensions.routing =
                raw(1).map(|routing| Ipv6RoutingExtensions { routing, final_destination_options: None });
            IpHeaders::Ipv6(header, extensions)
        } else {
            let mut header = Ipv4Header::new(0, 64, protocol, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
            header.identification = self.id;
            header.options = vec![1; self.ip_options * 4].as_slice().try_into().unwrap();
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        };
        ip.set_next_headers(protocol);
        // Too long is fine: a super-frame's length is not looked at.
        let _ = ip.set_payload_len(transport_len);
        ip
    }

    /// The frame as a guest hands it over: with the sum of the pseudo header in the checksum field.
    fn build(&self) -> (Vec<u8>, Offload) {
        let transport = self.transport();
        let mut frame =
            Ethernet2Header { source: [2; 6], destination: [4; 6], ..Default::default() }.to_bytes()[..12].to_vec();
        for tci in &self.tags {
            frame.extend([0x81, 0x00]);
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(self.kind.ethertype().to_be_bytes());
        self.ip(transport.len()).write(&mut frame).unwrap();
        let start = frame.len();
        frame.extend(&transport);
        let pseudo = if self.is_v6() {
            Sum::pseudo_v6([0xfd; 16], [0xfe; 16], self.kind.protocol(), transport.len() as u32)
        } else {
            Sum::pseudo_v4([10, 0, 0, 1], [10, 0, 0, 2], self.kind.protocol(), transport.len() as u16)
        };
        let offset = self.kind.csum_offset();
        put_be16(&mut frame, start + usize::from(offset), pseudo.fold()).unwrap();
        let gso = Gso { kind: self.kind, size: self.size, header_len: 0, ecn: false };
        (frame, Offload { csum: Csum::Partial { start: start as u16, offset }, gso: Some(gso) })
    }

    /// Cuts it and returns whole frames, their checksums finished in either mode.
    fn cut(&self, mode: ChecksumMode) -> Vec<Vec<u8>> {
        let (frame, offload) = self.build();
        let mut segmenter = Segmenter::new(&frame, &offload, mode).unwrap();
        let mut header = [0xee; MAX_SEGMENT_HEADER];
        let mut segments = Vec::new();
        let expected = segmenter.remaining();
        while let Some(segment) = segmenter.next_segment(&mut header) {
            let mut bytes = header[..segment.header_len].to_vec();
            assert!(header[segment.header_len..].iter().all(|byte| *byte == 0xee), "nothing behind the header");
            bytes.extend(&frame[segment.payload.clone()]);
            match (mode, segment.csum) {
                (ChecksumMode::Complete, csum) => assert_eq!(csum, Csum::None),
                (ChecksumMode::Partial, csum) => {
                    assert_eq!(csum, offload.csum);
                    let Csum::Partial { start, offset } = csum else { unreachable!() };
                    complete_partial(&mut bytes, start, offset).unwrap();
                }
            }
            segments.push(bytes);
        }
        assert_eq!(segments.len(), expected);
        assert_eq!(segmenter.next_segment(&mut header), None, "and stays at the end");
        segments
    }
}

/// 0 and 0xffff are one number in ones' complement.
fn same_checksum(a: u16, b: u16) -> bool {
    a % 0xffff == b % 0xffff
}

/// Checks everything about `segments` of `original` that etherparse can see.
fn verify(original: &Super, segments: &[Vec<u8>]) {
    let mut payload: Vec<u8> = Vec::new();
    for (index, bytes) in segments.iter().enumerate() {
        let sliced = SlicedPacket::from_ethernet(bytes).unwrap();
        let tags: Vec<u16> = sliced.vlan_ids().iter().map(|vid| vid.value()).collect();
        assert_eq!(tags, original.tags.iter().map(|tci| tci & 0xfff).collect::<Vec<_>>());

        let l4_len = bytes.len() - sliced_l4(original);
        let pseudo = match sliced.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                assert_eq!(header.identification(), original.id.wrapping_add(index as u16));
                assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
                assert_eq!(header.options(), vec![1; original.ip_options * 4]);
                assert_eq!(usize::from(header.total_len()), header.slice().len() + l4_len);
                Sum::pseudo_v4(header.source(), header.destination(), original.kind.protocol(), l4_len as u16)
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                assert_eq!(usize::from(header.payload_length()), ip.extensions().slice().len() + l4_len);
                Sum::pseudo_v6(header.source(), header.destination(), original.kind.protocol(), l4_len as u32)
            }
            other => panic!("{other:?}"),
        };
        // Ours and theirs: a sum over pseudo header and everything is "minus zero".
        let mut sum = pseudo;
        sum.add(&bytes[bytes.len() - l4_len..]);
        assert_eq!(sum.fold(), 0xffff);

        let data = match sliced.transport.as_ref().unwrap() {
            TransportSlice::Tcp(tcp) => {
                let expected = match sliced.net.as_ref().unwrap() {
                    NetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
                    NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
                    other => panic!("{other:?}"),
                };
                assert!(same_checksum(tcp.checksum(), expected.unwrap()));
                assert_eq!(tcp.sequence_number(), original.seq.wrapping_add(payload.len() as u32));
                assert_eq!(tcp.options(), vec![1; original.tcp_options * 4]);
                let (first, last) = (index == 0, index + 1 == segments.len());
                let flag = |bit| original.tcp_flags & bit != 0;
                assert_eq!((tcp.fin(), tcp.psh()), (last && flag(0x01), last && flag(0x08)));
                assert_eq!((tcp.cwr(), tcp.ece()), (first && flag(0x80), flag(0x40)));
                assert_eq!((tcp.ack(), tcp.urg()), (flag(0x10), flag(0x20)));
                assert_eq!((tcp.acknowledgment_number(), tcp.window_size()), (9, 500));
                tcp.payload()
            }
            TransportSlice::Udp(udp) => {
                let header = udp.to_header();
                let expected = match sliced.net.as_ref().unwrap() {
                    NetSlice::Ipv4(ip) => {
                        header.calc_checksum_ipv4_raw(ip.header().source(), ip.header().destination(), udp.payload())
                    }
                    NetSlice::Ipv6(ip) => {
                        header.calc_checksum_ipv6_raw(ip.header().source(), ip.header().destination(), udp.payload())
                    }
                    other => panic!("{other:?}"),
                };
                assert_eq!(udp.checksum(), expected.unwrap());
                assert_eq!(usize::from(udp.length()), l4_len);
                udp.payload()
            }
            other => panic!("{other:?}"),
        };
        assert!(data.len() <= usize::from(original.size));
        assert!(index + 1 == segments.len() || data.len() == usize::from(original.size), "only the last is short");
        payload.extend(data);
    }
    assert_eq!(payload, original.payload);
}

/// Where the transport header of `original` starts.
fn sliced_l4(original: &Super) -> usize {
    let Csum::Partial { start, .. } = original.build().1.csum else { unreachable!() };
    usize::from(start)
}

fn kinds() -> impl Strategy<Value = GsoKind> {
    prop::sample::select(vec![GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp4, GsoKind::Udp6])
}

fn supers() -> impl Strategy<Value = Super> {
    let headers = (
        prop::collection::vec(any::<u16>(), 0..=2),
        0usize..=10,
        prop::collection::vec(prop::sample::select(vec![6usize, 14, 30]), 0..=3),
        0usize..=10,
    );
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        (0usize..40_000, any::<u8>()).prop_map(|(len, x)| (0..len).map(|n| (n >> 3) as u8 ^ x).collect()),
    ];
    (kinds(), headers, any::<(u8, u32, u16)>(), payload, prop_oneof![1u16..50, 50u16..1500, 1500u16..=9000]).prop_map(
        |(kind, (tags, ip_options, extensions, tcp_options), (tcp_flags, seq, id), payload, size)| {
            // Stay within the bound on segments.
            let size = size.max((payload.len() / most_segments(kind)) as u16 + 1);
            Super { kind, tags, ip_options, extensions, tcp_options, tcp_flags, seq, id, payload, size }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn segments_make_the_original(original in supers()) {
        verify(&original, &original.cut(ChecksumMode::Complete));
        verify(&original, &original.cut(ChecksumMode::Partial));
    }

    /// Whatever a guest changed after the offload was validated: no panic, and bounds hold.
    #[test]
    fn damaged_super_frames(
        original in supers(), damage in prop::collection::vec((0usize..120, any::<u8>()), 0..4), len in 0usize..2000,
        size: u16,
    ) {
        let (mut frame, mut offload) = original.build();
        for (at, byte) in damage {
            if let Some(target) = frame.get_mut(at) {
                *target = byte;
            }
        }
        frame.truncate(len);
        if let Some(gso) = &mut offload.gso {
            gso.size = size % 64;
        }
        check_bounds(&frame, &offload);
    }

    #[test]
    fn random_super_frames(
        frame in prop::collection::vec(any::<u8>(), 0..300), kind in kinds(), start in 0u16..80, size in 0u16..4,
    ) {
        let gso = Some(Gso { kind, size, header_len: 0, ecn: false });
        check_bounds(&frame, &Offload { csum: Csum::Partial { start, offset: kind.csum_offset() }, gso });
    }
}

fn check_bounds(frame: &[u8], offload: &Offload) {
    let Ok(mut segmenter) = Segmenter::new(frame, offload, ChecksumMode::Complete) else {
        return;
    };
    let mut header = [0; MAX_SEGMENT_HEADER];
    let mut count = 0;
    let mut end = None;
    let expected = segmenter.remaining();
    while let Some(segment) = segmenter.next_segment(&mut header) {
        count += 1;
        assert!(segment.header_len <= MAX_SEGMENT_HEADER && segment.payload.end <= frame.len());
        assert!(segment.payload.len() <= usize::from(offload.gso.unwrap().size));
        assert_eq!(segment.payload.start, end.unwrap_or(segment.header_len));
        end = Some(segment.payload.end);
    }
    assert_eq!(end, Some(frame.len()));
    assert!(count == expected && count <= MAX_SEGMENTS);
}

fn error_of(frame: &[u8], offload: &Offload) -> Option<WireError> {
    Segmenter::new(frame, offload, ChecksumMode::Complete).err()
}

#[test]
fn one_segment_is_fine() {
    for payload in [0, 1, 99, 100] {
        for kind in [GsoKind::Tcp4, GsoKind::Udp6] {
            let original = Super { tcp_flags: 0x99, ..Super::simple(kind, payload, 100) };
            let segments = original.cut(ChecksumMode::Complete);
            assert_eq!(segments.len(), 1);
            verify(&original, &segments);
        }
    }
}

#[test]
fn udp_never_says_that_it_has_no_checksum() {
    // Choose the first two bytes of data so that the checksum of the first segment comes out as zero.
    let mut original = Super::simple(GsoKind::Udp4, 20, 10);
    original.payload[..2].fill(0);
    let csum_field = sliced_l4(&original) + 6;
    let first = &original.cut(ChecksumMode::Complete)[0];
    let missing: [u8; 2] = first[csum_field..csum_field + 2].try_into().unwrap();
    original.payload[..2].copy_from_slice(&missing);
    let segments = original.cut(ChecksumMode::Complete);
    assert_eq!(segments[0][csum_field..csum_field + 2], [0xff, 0xff]);
    verify(&original, &segments);
}

#[test]
fn sequence_number_and_identification_wrap() {
    let original = Super { seq: u32::MAX - 50, id: u16::MAX, ..Super::simple(GsoKind::Tcp4, 300, 100) };
    let segments = original.cut(ChecksumMode::Complete);
    assert_eq!(segments.len(), 3);
    verify(&original, &segments);
}

#[test]
fn length_fields_of_the_super_frame_do_not_matter() {
    let original = Super::simple(GsoKind::Tcp4, 5000, 1448);
    let (mut frame, offload) = original.build();
    put_be16(&mut frame, 16, 0).unwrap();
    let mut segmenter = Segmenter::new(&frame, &offload, ChecksumMode::Complete).unwrap();
    let mut header = [0; MAX_SEGMENT_HEADER];
    let lengths: Vec<usize> =
        std::iter::from_fn(|| segmenter.next_segment(&mut header)).map(|segment| segment.payload.len()).collect();
    assert_eq!(lengths, [1448, 1448, 1448, 656]);
}

#[test]
fn final_destination_of_a_routing_header_is_kept() {
    // The pseudo header names another destination than the IPv6 header, as RFC 8200 section 8.1 wants.
    let original = Super { extensions: vec![6, 22], ..Super::simple(GsoKind::Tcp6, 250, 100) };
    let (mut frame, offload) = original.build();
    let start = sliced_l4(&original);
    let length = |bytes: usize| (bytes - start) as u32;
    let pseudo = |bytes: usize| Sum::pseudo_v6([0xfd; 16], [0x11; 16], 6, length(bytes));
    let frame_len = frame.len();
    put_be16(&mut frame, start + 16, pseudo(frame_len).fold()).unwrap();
    let mut segmenter = Segmenter::new(&frame, &offload, ChecksumMode::Complete).unwrap();
    let mut header = [0; MAX_SEGMENT_HEADER];
    while let Some(segment) = segmenter.next_segment(&mut header) {
        let mut sum = pseudo(segment.header_len + segment.payload.len());
        sum.add(&header[start..segment.header_len]);
        sum.add(&frame[segment.payload]);
        assert_eq!(sum.fold(), 0xffff);
    }
}

#[test]
fn number_of_segments_is_bounded() {
    for (kind, count) in [(GsoKind::Tcp4, MAX_SEGMENTS), (GsoKind::Udp6, MAX_UDP_SEGMENTS)] {
        let most = Super::simple(kind, count, 1);
        verify(&most, &most.cut(ChecksumMode::Complete));
        let (frame, offload) = Super::simple(kind, count + 1, 1).build();
        assert_eq!(error_of(&frame, &offload), Some(WireError::TooManySegments));
    }
}

#[test]
fn header_is_bounded() {
    // 14 + 40 + 3 extension headers + 20.
    let with = |last: usize| Super { extensions: vec![54, 54, last], ..Super::simple(GsoKind::Tcp6, 300, 100) };
    let longest = with(54);
    let segments = longest.cut(ChecksumMode::Partial);
    assert_eq!(segments[0].len() - 100, 14 + 40 + 3 * 56 + 20);
    verify(&longest, &segments);
    let (frame, offload) = with(54 + 16).build();
    assert_eq!(error_of(&frame, &offload), Some(WireError::HeaderTooLong));
}

#[test]
fn segment_length_fits_its_field() {
    let fits = Super::simple(GsoKind::Tcp4, 65535 - 40, 65535);
    verify(&fits, &fits.cut(ChecksumMode::Complete));
    let (frame, offload) = Super::simple(GsoKind::Tcp4, 65535 - 39, 65535).build();
    assert_eq!(error_of(&frame, &offload), Some(WireError::SegmentTooLong));
    // A super-frame beyond 64 KiB is fine as long as its segments are not.
    let big = Super::simple(GsoKind::Tcp6, 150_000, 9000);
    verify(&big, &big.cut(ChecksumMode::Complete));
}

#[test]
fn what_is_not_to_be_segmented() {
    let (frame, offload) = Super::simple(GsoKind::Tcp4, 300, 100).build();
    assert_eq!(error_of(&frame, &Offload { gso: None, ..offload }), Some(WireError::NoGso));
    assert_eq!(error_of(&frame, &Offload { csum: Csum::None, ..offload }), Some(WireError::GsoWithoutCsum));
    assert_eq!(error_of(&frame[..53], &offload), Some(WireError::Truncated));
    let gso = |kind, size| Offload { gso: Some(Gso { kind, size, header_len: 0, ecn: false }), ..offload };
    assert_eq!(error_of(&frame, &gso(GsoKind::Tcp4, 0)), Some(WireError::ZeroGsoSize));
    assert_eq!(error_of(&frame, &gso(GsoKind::Tcp6, 100)), Some(WireError::GsoMismatch));
    assert_eq!(error_of(&frame, &gso(GsoKind::Udp4, 100)), Some(WireError::GsoMismatch));
}
