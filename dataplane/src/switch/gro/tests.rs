use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::frame::BurstStorage;
use crate::limits::SNAPSHOT;

const ALL: Accepts = Accepts { csum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true };

/// A segment of a stream, as a sender makes it.
#[derive(Debug, Clone)]
struct Piece {
    v6: bool,
    flow: u16,
    seq: u32,
    ack: u32,
    /// The timestamp's value.
    stamp: u32,
    id: u16,
    data: Vec<u8>,
    /// Selective acknowledgements beside the timestamp.
    sack: bool,
    /// Congestion was met.
    ece: bool,
    /// The third bit of congestion marks (RFC 9768).
    ae: bool,
    window: u16,
    push: bool,
    fin: bool,
    ttl: u8,
    vlan: Option<u16>,
    /// A bit on the way that a checksum has to find.
    corrupt: bool,
}

impl Piece {
    fn new(flow: u16, seq: u32, id: u16, len: usize) -> Self {
        let data = (0..len).map(|at| (seq as usize + at) as u8).collect();
        Self {
            v6: false,
            flow,
            seq,
            ack: 77,
            stamp: 1,
            id,
            data,
            sack: false,
            ece: false,
            ae: false,
            window: 500,
            push: false,
            fin: false,
            ttl: 64,
            vlan: None,
            corrupt: false,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        use etherparse::{TcpOptionElement, VlanId};
        let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let mut options =
            vec![TcpOptionElement::Noop, TcpOptionElement::Noop, TcpOptionElement::Timestamp(self.stamp, 2)];
        if self.sack {
            options.push(TcpOptionElement::SelectiveAcknowledgement((5, 6), [None; 3]));
        }
        let mut header = etherparse::Ipv4Header::new(0, self.ttl, 6.into(), [10; 4], [11; 4]).unwrap();
        header.identification = self.id;
        header.dont_fragment = true;
        let v6 = etherparse::IpHeaders::Ipv6(
            etherparse::Ipv6Header {
                hop_limit: self.ttl,
                source: [0xfd; 16],
                destination: [0xfe; 16],
                ..Default::default()
            },
            Default::default(),
        );
        let ip = if self.v6 { v6 } else { etherparse::IpHeaders::Ipv4(header, Default::default()) };
        let builder = match self.vlan {
            Some(vid) => link.single_vlan(VlanId::try_new(vid).unwrap()).ip(ip),
            None => link.ip(ip),
        };
        let mut tcp = builder.tcp(self.flow, 80, self.seq, self.window).ack(self.ack).options(&options).unwrap();
        if self.push {
            tcp = tcp.psh();
        }
        if self.fin {
            tcp = tcp.fin();
        }
        if self.ece {
            tcp = tcp.ece();
        }
        if self.ae {
            tcp = tcp.ns();
        }
        let mut bytes = Vec::new();
        tcp.write(&mut bytes, &self.data).unwrap();
        if self.corrupt {
            *bytes.last_mut().unwrap() ^= 1;
        }
        bytes
    }
}

/// A frame that comes out: its bytes, and what is left to do to it.
#[derive(Debug, Clone)]
struct Out {
    bytes: Vec<u8>,
    offload: Offload,
}

/// Brings frames into a burst as the receiver does, merges, and takes out what is to be delivered.
fn merge(frames: &[Vec<u8>], shared: u64, accepts: Accepts) -> Vec<Out> {
    let mut storage = BurstStorage::default();
    let mut burst = storage.begin();
    for bytes in frames {
        let head = header_len(bytes.get(..SNAPSHOT).unwrap_or(bytes)).unwrap_or(SNAPSHOT).min(bytes.len());
        // In two pieces, as jumbo frames come.
        let (head, tail) = bytes.split_at(head);
        let (one, two) = tail.split_at(tail.len() / 3);
        let mut frame = burst.start(12);
        assert!(frame.push(SourceSegment::from_slice(&[0; 12])) && frame.push(SourceSegment::from_slice(head)));
        assert!(frame.push_tail(SourceSegment::from_slice(one)) && frame.push_tail(SourceSegment::from_slice(two)));
        frame.finish().unwrap();
    }
    let mut places: Vec<u8> = (0..frames.len() as u8).collect();
    let kept = coalesce(&mut burst, &mut places, shared, accepts);
    let take = |place: &u8| {
        let frame = burst.frame(*place);
        let mut bytes = frame.head().to_vec();
        for piece in burst.tail(frame) {
            let at = bytes.len();
            bytes.resize(at + piece.len(), 0);
            piece.read(&mut bytes[at..]);
        }
        assert_eq!(bytes.len(), frame.len());
        Out { bytes, offload: *frame.offload() }
    };
    places[..kept].iter().map(take).collect()
}

/// Flow, sequence number, data and flags, as etherparse sees them.
fn tcp_of(bytes: &[u8]) -> (u16, u32, Vec<u8>, bool) {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("not TCP") };
    (tcp.source_port(), tcp.sequence_number(), tcp.payload().to_vec(), tcp.psh() || tcp.fin())
}

/// The checksum of a frame that comes out, completed if that was left to the receiver, is what etherparse computes.
fn check(out: &Out) {
    let mut bytes = out.bytes.clone();
    if let Csum::Partial { start, offset } = out.offload.csum {
        crate::wire::complete_partial(&mut bytes, start, offset).unwrap();
    }
    let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("not TCP") };
    let sum = match packet.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            assert_eq!(
                usize::from(header.total_len()),
                bytes.len() - (header.slice().as_ptr() as usize - bytes.as_ptr() as usize)
            );
            tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap()
        }
        etherparse::NetSlice::Ipv6(ip) => {
            tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap()
        }
        etherparse::NetSlice::Arp(_) => panic!("not IP"),
    };
    assert_eq!(tcp.checksum() % 0xffff, sum % 0xffff);
}

fn stream(count: usize, len: usize) -> Vec<Piece> {
    (0..count).map(|at| Piece::new(7, 1000 + (at * len) as u32, at as u16, len)).collect()
}

fn bytes_of(pieces: &[Piece]) -> Vec<Vec<u8>> {
    pieces.iter().map(Piece::bytes).collect()
}

#[test]
fn a_stream_becomes_one_frame() {
    for v6 in [false, true] {
        for vlan in [None, Some(5)] {
            let mut pieces = stream(20, 1448);
            pieces.iter_mut().for_each(|piece| (piece.v6, piece.vlan) = (v6, vlan));
            pieces[19].data.truncate(100);
            pieces[19].push = true;
            let out = merge(&bytes_of(&pieces), 0, ALL);
            assert_eq!(out.len(), 1);
            let gso = out[0].offload.gso.unwrap();
            assert_eq!((gso.size, gso.kind), (1448, if v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 }));
            let (_, seq, data, ends) = tcp_of(&out[0].bytes);
            assert_eq!((seq, ends), (1000, true));
            assert_eq!(data, pieces.iter().flat_map(|piece| piece.data.clone()).collect::<Vec<_>>());
            check(&out[0]);
        }
    }
}

#[test]
fn what_does_not_continue_is_left_alone() {
    type Change = fn(&mut Piece);
    let changes: [(&str, Change); 11] = [
        ("a gap", |piece| piece.seq += 1),
        ("longer than the first", |piece| piece.data.push(0)),
        ("another time to live", |piece| piece.ttl = 63),
        ("an identifier out of line", |piece| piece.id = 100),
        ("another flow", |piece| piece.flow = 8),
        ("another VLAN", |piece| piece.vlan = Some(9)),
        ("a wrong checksum", |piece| piece.corrupt = true),
        ("no data", |piece| piece.data.clear()),
        ("another window", |piece| piece.window = 0),
        ("another congestion mark", |piece| piece.ae = true),
        ("another protocol", |piece| piece.v6 = true),
    ];
    for (what, change) in changes {
        let mut pieces = stream(2, 100);
        change(&mut pieces[1]);
        assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 2, "{what}");
    }
    let pieces = stream(2, 100);
    assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 1);
    assert_eq!(merge(&bytes_of(&pieces), 0b10, ALL).len(), 2, "one is for others too");
    assert_eq!(merge(&bytes_of(&pieces), 0, Accepts { tso4: false, ..ALL }).len(), 2);
    assert_eq!(merge(&bytes_of(&pieces), 0, Accepts { csum: false, ..ALL }).len(), 2);
    let mut pieces = stream(2, 100);
    pieces[0].corrupt = true;
    let out = merge(&bytes_of(&pieces), 0, ALL);
    assert_eq!((out.len(), out[0].offload), (2, Offload::NONE), "the first is checked too");
    let mut pieces = stream(2, 100);
    pieces[0].push = true;
    assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 2, "a pause after the first");
}

#[test]
fn nothing_overtakes_within_a_flow() {
    // The second is an acknowledgement only: the third may not go before it.
    let mut pieces = stream(4, 100);
    pieces[1].data.clear();
    (pieces[2].seq, pieces[3].seq) = (1100, 1200);
    (pieces[2].id, pieces[3].id) = (1, 2);
    let out = merge(&bytes_of(&pieces), 0, ALL);
    let data: Vec<usize> = out.iter().map(|out| tcp_of(&out.bytes).2.len()).collect();
    assert_eq!(data, [100, 0, 200]);
}

/// Acknowledgements of one flow, each of two segments more, padded to the shortest frame that there is.
fn acks(count: u32) -> Vec<Piece> {
    (0..count).map(|at| Piece { ack: 5000 + at * 2896, ..Piece::new(7, 1000, at as u16, 0) }).collect()
}

fn ack_of(bytes: &[u8]) -> u32 {
    let Some(TransportSlice::Tcp(tcp)) = SlicedPacket::from_ethernet(bytes).unwrap().transport else {
        panic!("not TCP")
    };
    tcp.acknowledgment_number()
}

#[test]
fn the_newest_acknowledgement_stands_for_those_before_it() {
    for v6 in [false, true] {
        for padding in [0, 7] {
            let mut pieces = acks(20);
            pieces.iter_mut().for_each(|piece| piece.v6 = v6);
            // Another flow's is in between.
            pieces.insert(10, Piece { v6, ..Piece::new(8, 1, 1, 0) });
            let mut frames = bytes_of(&pieces);
            frames.iter_mut().for_each(|frame| frame.resize(frame.len() + padding, 0));
            let out = merge(&frames, 0, ALL);
            assert_eq!(out.iter().map(|out| ack_of(&out.bytes)).collect::<Vec<_>>(), [77, 5000 + 19 * 2896]);
            assert!(out.iter().all(|out| out.offload == Offload::NONE && frames.contains(&out.bytes)));
        }
    }
    let mut pieces = acks(4);
    pieces.iter_mut().for_each(|piece| piece.ack = piece.ack.wrapping_sub(5000 + 2896));
    assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 1, "numbers begin again at zero");
}

#[test]
fn an_acknowledgement_that_tells_more_stays() {
    type Change = fn(&mut Piece);
    let changes: [(&str, Change); 13] = [
        ("a duplicate", |piece| piece.ack = 5000),
        ("an older one", |piece| piece.ack = 4000),
        ("an older timestamp", |piece| piece.stamp = 0),
        ("selective ones", |piece| piece.sack = true),
        ("congestion", |piece| piece.ece = true),
        ("a probe", |piece| piece.seq -= 1),
        ("the end", |piece| piece.fin = true),
        ("data", |piece| piece.data.push(1)),
        ("another time to live", |piece| piece.ttl = 63),
        ("another flow", |piece| piece.flow = 8),
        ("another VLAN", |piece| piece.vlan = Some(9)),
        ("a wrong checksum", |piece| piece.corrupt = true),
        ("another protocol", |piece| piece.v6 = true),
    ];
    for (what, change) in changes {
        let mut pieces = acks(2);
        change(&mut pieces[1]);
        assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 2, "{what}");
    }
    for (what, change) in &changes[3..11] {
        let mut pieces = acks(2);
        change(&mut pieces[0]);
        assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 2, "{what}, in the older one");
    }
    // A duplicate stays also if a newer one follows.
    let mut pieces = acks(3);
    pieces[1].ack = pieces[0].ack;
    assert_eq!(merge(&bytes_of(&pieces), 0, ALL).len(), 3);
    let pieces = acks(2);
    assert_eq!(merge(&bytes_of(&pieces), 0b01, ALL).len(), 2, "the older is for others too");
    assert_eq!(merge(&bytes_of(&pieces), 0, Accepts { tso4: false, ..ALL }).len(), 2, "not asked for");
}

#[test]
fn a_packet_has_at_most_64_kib() {
    let out = merge(&bytes_of(&stream(12, 9000 - 72)), 0, ALL);
    assert_eq!(out.len(), 2);
    out.iter().for_each(check);
    assert!(out.iter().all(|out| out.bytes.len() <= 65_535 + 14));
}

prop_compose! {
    /// Three flows, mostly in order, with accidents.
    fn traffic()(
        picks in prop::collection::vec((0..3u16, 1..6usize, any::<[bool; 4]>(), 0..12u8), 1..32),
        mss in 20..400usize, v6: bool, start: u32,
    ) -> Vec<Piece> {
        let (mut seq, mut id, mut acks) = ([start; 3], [u16::MAX - 3; 3], [start; 3]);
        picks.into_iter().map(|(flow, fifths, [push, fin, short, gap], accident)| {
            let at = usize::from(flow);
            let len = if short && accident == 0 { mss * fifths / 5 } else { mss };
            let mut piece = Piece::new(flow, seq[at], id[at], len);
            piece.v6 = v6;
            piece.push = push && accident == 1;
            piece.fin = fin && accident == 2;
            piece.corrupt = accident == 3 && len > 0;
            if accident >= 10 {
                (piece.data, acks[at]) = (Vec::new(), acks[at].wrapping_add(u32::from(accident - 9) * 1000));
            }
            piece.ack = acks[at];
            let len = piece.data.len();
            if gap && accident == 4 {
                piece.seq = piece.seq.wrapping_add(1);
            }
            seq[at] = piece.seq.wrapping_add(len as u32);
            id[at] = id[at].wrapping_add(1);
            piece
        }).collect()
    }
}

proptest! {
    #[test]
    fn the_streams_are_what_they_were(pieces in traffic()) {
        let frames = bytes_of(&pieces);
        let outs = merge(&frames, 0, ALL);
        for flow in 0..3 {
            // Cut into single bytes with their sequence numbers, in order of delivery, both are the same.
            let bytes = |frames: Vec<&Vec<u8>>| -> Vec<(u32, u8)> {
                let tcps = frames.into_iter().map(|frame| tcp_of(frame)).filter(|tcp| tcp.0 == flow);
                tcps.flat_map(|(_, seq, data, _)| {
                    data.into_iter().enumerate().map(move |(at, byte)| (seq.wrapping_add(at as u32), byte))
                }).collect()
            };
            prop_assert_eq!(bytes(frames.iter().collect()), bytes(outs.iter().map(|out| &out.bytes).collect()));
            let newest = |frames: Vec<&Vec<u8>>| frames.into_iter().rev().find(|frame| tcp_of(frame).0 == flow).map(|frame| ack_of(frame));
            prop_assert_eq!(newest(frames.iter().collect()), newest(outs.iter().map(|out| &out.bytes).collect()));
        }
        for out in outs.iter().filter(|out| out.offload.gso.is_some()) {
            check(out);
            prop_assert!(Offload::from_virtio(&out.offload.to_virtio(0), &out.bytes, out.bytes.len()).is_ok());
        }
        // What was not merged is untouched.
        for out in outs.iter().filter(|out| out.offload.gso.is_none()) {
            prop_assert!(frames.contains(&out.bytes));
        }
    }

    #[test]
    fn a_merged_frame_is_cut_at_the_same_places(count in 2..20usize, mss in 20..1448usize, last in 1..1448usize) {
        let mut pieces = stream(count, mss);
        pieces[count - 1].data.truncate(last);
        pieces[count - 1].push = true;
        let frames = bytes_of(&pieces);
        let outs = merge(&frames, 0, ALL);
        prop_assert_eq!(outs.len(), 1);
        let mode = crate::wire::ChecksumMode::Complete;
        let mut segments = crate::wire::Segmenter::new(&outs[0].bytes, &outs[0].offload, mode).unwrap();
        let mut header = [0; crate::wire::MAX_SEGMENT_HEADER];
        let mut cut = Vec::new();
        while let Some(segment) = segments.next_segment(&mut header) {
            cut.push([&header[..segment.header_len], &outs[0].bytes[segment.payload]].concat());
        }
        prop_assert_eq!(cut.len(), frames.len());
        for (cut, frame) in cut.iter_mut().zip(&frames) {
            // Zero and 0xffff are the same number to TCP.
            let field = 14 + 20 + 16;
            if frame[field..field + 2] == [0, 0] {
                cut[field..field + 2].fill(0);
            }
            prop_assert_eq!(&*cut, frame);
        }
    }

    #[test]
    fn any_bytes(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 14..200), 1..32)) {
        let mut frames = frames;
        for (at, frame) in frames.iter_mut().enumerate().filter(|(at, _)| at % 2 == 0) {
            // Something that looks like TCP at first.
            frame[12..14].copy_from_slice(if at % 4 == 0 { &[0x08, 0x00] } else { &[0x86, 0xdd] });
            if let Some(version) = frame.get_mut(14) {
                *version = if at % 4 == 0 { 0x45 } else { 0x60 };
            }
            if let Some(protocol) = frame.get_mut(if at % 4 == 0 { 23 } else { 20 }) {
                *protocol = 6;
            }
        }
        let outs = merge(&frames, 0, ALL);
        prop_assert!(outs.len() <= frames.len());
        prop_assert!(frames.iter().all(|frame| header_len(frame).is_none() || may_be_tcp(frame)));
    }
}
