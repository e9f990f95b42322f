//! Merging what a wire has cut up: TCP segments of a burst that follow each other become one super-packet (GRO), for
//! receivers that take those. What it costs to receive a stream is then paid per burst rather than per segment.
//!
//! The rules are those of Linux (`tcp_gro_receive`, `inet_gro_receive`): same flow, same headers, next sequence number,
//! all segments of one size but the last, and checksums that were verified, since the receiver will not look at them.
//! Order within a flow is kept. Whoever has to send a merged frame to a wire again cuts it at the same places.
//!
//! Of acknowledgements that follow each other and carry nothing else, the newest stands for all, as in receive segment
//! coalescing (virtio 1.2, 5.1.6.4: `VIRTIO_NET_F_RSC_EXT`; Linux leaves them alone). One that tells anything more stays:
//! a duplicate, selective acknowledgements, congestion marks.

use std::ops::Range;

use crate::frame::{Burst, Frame};
use crate::limits::BURST;
use crate::mem::SourceSegment;
use crate::switch::convert::Accepts;
use crate::wire::offload::{Csum, Gso, GsoKind, Offload};
use crate::wire::{EthernetHeader, Ip, Sum, Tcp, be16, eth, ip, l4, put_be16};

/// TCP flag: the acknowledgement number counts.
const ACK: u8 = 0x10;
/// How the only TCP option begins that an acknowledgement may have which gives way to a newer one: a timestamp.
const TIMESTAMP: [u8; 4] = [1, 1, 8, 10];
/// Longest IP packet, in bytes.
const MAX_PACKET: usize = 65_535;
/// IPv4 flag: do not fragment, in the upper byte of its word.
const DONT_FRAGMENT: u8 = 0x40;
const BURST_BITS: u32 = 64;
const _: () = assert!(BURST <= BURST_BITS as usize, "one bit for each frame of a burst");

/// Bytes of all headers of a frame that starts with `bytes`, if it is TCP in an unfragmented IP packet without options
/// or extension headers, and `bytes` show all of it.
pub(crate) fn header_len(bytes: &[u8]) -> Option<usize> {
    Headers::find(bytes).map(|headers| headers.len)
}

/// Whether a frame that starts with `bytes` can have headers for [`header_len`]: a look at what most frames are.
#[inline]
pub(crate) fn may_be_tcp(bytes: &[u8]) -> bool {
    match (bytes.get(12..14), bytes.get(23)) {
        // UDP and ICMP over IPv4 without tags, ARP.
        (Some([0x08, 0x00]), Some(protocol)) => *protocol == ip::PROTOCOL_TCP,
        (Some([0x08, 0x06]), _) => false,
        _ => true,
    }
}

/// Whether both have these bytes, and they are the same.
fn same(a: &[u8], b: &[u8], range: Range<usize>) -> bool {
    a.get(range.clone()).is_some_and(|part| b.get(range) == Some(part))
}

/// Where the headers of a TCP frame are, in bytes from its start.
#[derive(Debug, Clone, Copy)]
struct Headers {
    is_v6: bool,
    l3: usize,
    l4: usize,
    /// Of all of them.
    len: usize,
}

impl Headers {
    fn find(bytes: &[u8]) -> Option<Self> {
        let ethernet = EthernetHeader::parse(bytes)?;
        let l3 = usize::from(ethernet.l3_offset);
        let packet = bytes.get(l3..)?;
        let transport = Ip::parse(ethernet.ethertype, packet)?.transport()?;
        let is_v6 = ethernet.ethertype == eth::ETHERTYPE_IPV6;
        let plain = if is_v6 { ip::IPV6_HEADER_LEN } else { ip::IPV4_HEADER_LEN };
        if transport.protocol != ip::PROTOCOL_TCP || transport.offset != plain {
            return None;
        }
        let l4 = l3 + plain;
        let len = l4 + Tcp::parse(bytes.get(l4..)?)?.header_len();
        Some(Self { is_v6, l3, l4, len })
    }

    /// Bytes of the IP packet as its header says.
    fn packet_len(&self, head: &[u8]) -> Option<usize> {
        if self.is_v6 {
            return Some(ip::IPV6_HEADER_LEN + usize::from(be16(head, self.l3 + ip::IPV6_PAYLOAD_LEN_OFFSET)?));
        }
        be16(head, self.l3 + ip::IPV4_TOTAL_LEN_OFFSET).map(usize::from)
    }

    /// The sum of the pseudo header for a TCP segment of `len` bytes.
    fn pseudo(&self, head: &[u8], len: usize) -> Option<Sum> {
        let packet = head.get(self.l3..)?;
        let ethertype = if self.is_v6 { eth::ETHERTYPE_IPV6 } else { eth::ETHERTYPE_IPV4 };
        Some(match Ip::parse(ethertype, packet)? {
            Ip::V4(ip) => Sum::pseudo_v4(ip.src(), ip.dst(), ip::PROTOCOL_TCP, len as u16),
            Ip::V6(ip) => Sum::pseudo_v6(ip.src(), ip.dst(), ip::PROTOCOL_TCP, len as u32),
        })
    }

    /// The addresses of Ethernet and IP, tags and ports.
    fn same_flow(&self, a: &[u8], b: &[u8]) -> bool {
        let addresses = if self.is_v6 { self.l3 + 8..self.l4 } else { self.l3 + 12..self.l4 };
        same(a, b, self.l4..self.l4 + 4) && same(a, b, addresses) && same(a, b, 0..self.l3)
    }

    /// What IP says of both but for their lengths and identifiers.
    fn same_network(&self, a: &[u8], b: &[u8]) -> bool {
        let l3 = self.l3;
        if self.is_v6 {
            // Class and flow label; hop limit.
            same(a, b, l3..l3 + 4) && same(a, b, l3 + 6..l3 + 8)
        } else {
            // Type of service; flags; time to live.
            same(a, b, l3..l3 + 2) && same(a, b, l3 + 6..l3 + 10)
        }
    }

    /// Whether the timestamps of two headers that are simple and of the same length, if they have any, do not go back (RFC 7323).
    fn timestamps_fit(&self, older: &[u8], newer: &[u8]) -> bool {
        let at = self.l4 + l4::TCP_HEADER_LEN + TIMESTAMP.len();
        let value = |head: &[u8]| head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        match (value(older), value(newer)) {
            (Some(older), Some(newer)) => newer.wrapping_sub(older) < 1 << 31,
            _ => true,
        }
    }

    /// Whether TCP has no options, or a timestamp only.
    fn is_simple(&self, head: &[u8]) -> bool {
        let options = head.get(self.l4 + l4::TCP_HEADER_LEN..self.len).unwrap_or_default();
        options.is_empty() || options.len() == 12 && options.starts_with(&TIMESTAMP)
    }
}

/// What can become of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It is data and nothing else, so that it can be merged.
    Data,
    /// It acknowledges and does nothing else, so that a newer one can stand for it.
    Ack,
    /// It stays as it is.
    Other,
}

/// A frame that might be merged with others.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    headers: Headers,
    seq: u32,
    ack: u32,
    flags: u8,
    /// Bytes of it.
    data: usize,
    kind: Kind,
}

impl Candidate {
    fn of(frame: &Frame) -> Option<Self> {
        let head = frame.head();
        let headers = Headers::find(head)?;
        let tcp = Tcp::parse(head.get(headers.l4..)?)?;
        let (behind, packet_len) = (frame.len() - headers.len, headers.packet_len(head)?);
        let is_whole = headers.len == head.len()
            && frame.offload().gso.is_none()
            && !matches!(frame.offload().csum, Csum::Partial { .. });
        let is_data = behind > 0
            && tcp.flags() & !(l4::TCP_PSH | l4::TCP_FIN) == ACK
            && packet_len == headers.len - headers.l3 + behind;
        let is_ack = tcp.flags() == ACK && packet_len == headers.len - headers.l3 && headers.is_simple(head);
        let (kind, data) = match (is_whole, is_data, is_ack) {
            (true, true, _) => (Kind::Data, behind),
            // What is behind is padding.
            (true, _, true) => (Kind::Ack, 0),
            _ => (Kind::Other, behind),
        };
        Some(Self { headers, seq: tcp.seq(), ack: tcp.ack(), flags: tcp.flags(), data, kind })
    }

    /// Whether a stream pauses behind it, so that nothing should wait for more.
    fn is_last(&self) -> bool {
        self.flags & (l4::TCP_PSH | l4::TCP_FIN) != 0
    }

    /// Whether an acknowledgement of the same flow, with the headers `head`, makes this one, with the headers `own`,
    /// needless.
    fn gives_way(&self, own: &[u8], newer: &Self, head: &[u8]) -> bool {
        let advance = newer.ack.wrapping_sub(self.ack);
        self.kind == Kind::Ack
            && newer.kind == Kind::Ack
            && (1..1 << 31).contains(&advance)
            && newer.seq == self.seq
            && self.headers.same_network(own, head)
            // The header's length, and a bit of congestion marks (RFC 9768).
            && own.get(self.headers.l4 + l4::TCP_DATA_OFFSET) == head.get(self.headers.l4 + l4::TCP_DATA_OFFSET)
            && self.headers.timestamps_fit(own, head)
    }
}

/// Segments that follow each other.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Where in the list the first and the last one are.
    first: u8,
    last: u8,
    candidate: Candidate,
    count: u16,
    next_seq: u32,
    /// Bytes of the merged packet.
    packet_len: usize,
    flags: u8,
    is_verified: bool,
    is_open: bool,
}

impl Run {
    fn new(index: u8, candidate: Candidate) -> Self {
        Self {
            first: index,
            last: index,
            candidate,
            count: 1,
            next_seq: candidate.seq.wrapping_add(candidate.data as u32),
            packet_len: candidate.headers.len - candidate.headers.l3 + candidate.data,
            flags: candidate.flags,
            is_verified: false,
            is_open: candidate.kind == Kind::Data && !candidate.is_last(),
        }
    }

    /// Whether a segment with the headers `head` continues the run that begins with the headers `first`.
    fn fits(&self, first: &[u8], head: &[u8], candidate: &Candidate) -> bool {
        let Headers { is_v6, l3, l4, len } = self.candidate.headers;
        self.is_open
            && candidate.kind == Kind::Data
            && candidate.headers.len == len
            && candidate.seq == self.next_seq
            && candidate.data <= self.candidate.data
            && self.packet_len + candidate.data <= MAX_PACKET
            && self.candidate.headers.same_network(first, head)
            && (is_v6 || self.id_fits(first, head, l3))
            // Acknowledgement; header length and a bit of congestion marks (RFC 9768); window; options.
            && same(first, head, l4 + 8..l4 + 13)
            && same(first, head, l4 + 14..l4 + 16)
            && same(first, head, l4 + 20..len)
    }

    /// Identifiers that count up, or, of packets that are never fragmented, stay the same.
    fn id_fits(&self, first: &[u8], head: &[u8], l3: usize) -> bool {
        let id = |head| be16(head, l3 + ip::IPV4_ID_OFFSET);
        let (Some(begin), Some(this)) = (id(first), id(head)) else { return false };
        let fixed = first.get(l3 + 6).is_some_and(|flags| flags & DONT_FRAGMENT != 0);
        this == begin.wrapping_add(self.count) || fixed && this == begin
    }

    fn add(&mut self, index: u8, candidate: &Candidate) {
        self.last = index;
        self.count += 1;
        self.next_seq = self.next_seq.wrapping_add(candidate.data as u32);
        self.packet_len += candidate.data;
        self.flags |= candidate.flags;
        self.is_open = !candidate.is_last() && candidate.data == self.candidate.data;
    }
}

/// Merges what can be merged among the frames of a burst at `places`, which are in the order of their arrival and all go
/// to a receiver that takes what `accepts` says. Frames whose bits are set in `shared` are left alone, since others get
/// them too. Returns how many of `places`, from the front, are still to be delivered.
pub fn coalesce(burst: &mut Burst<'_>, places: &mut [u8], shared: u64, accepts: Accepts) -> usize {
    let mut table = Table::new();
    for index in 0..places.len().min(BURST) {
        let frame = burst.frame(places[index]);
        let Some(mut candidate) = Candidate::of(frame) else { continue };
        let wanted = if candidate.headers.is_v6 { accepts.tso6 } else { accepts.tso4 };
        if !(accepts.csum && wanted) || shared & (1 << (u32::from(places[index]) % BURST_BITS)) != 0 {
            candidate.kind = Kind::Other;
        }
        table.add(burst, places, index as u8, candidate);
    }
    let absorbed = table.merge(burst, places);
    let mut kept = 0;
    for index in 0..places.len() {
        if index >= BURST || absorbed & (1 << index) == 0 {
            places[kept] = places[index];
            kept += 1;
        }
    }
    kept
}

/// The runs of a burst.
#[derive(Debug)]
struct Table {
    runs: [Option<Run>; BURST],
    count: usize,
    /// Of each member of a run, the index of the next one.
    next: [u8; BURST],
    /// Bits of the acknowledgements that newer ones stand for.
    outdated: u64,
}

impl Table {
    fn new() -> Self {
        Self { runs: [None; BURST], count: 0, next: [0; BURST], outdated: 0 }
    }

    /// Continues the newest run of the frame's flow, or begins a new one.
    fn add(&mut self, burst: &Burst<'_>, places: &[u8], index: u8, mut candidate: Candidate) {
        let frame_at = |index: u8| burst.frame(places[usize::from(index)]);
        let frame = frame_at(index);
        let of_flow = |run: &&mut Run| candidate.headers.same_flow(frame_at(run.first).head(), frame.head());
        if let Some(run) = self.runs[..self.count].iter_mut().rev().flatten().find(of_flow) {
            let first = frame_at(run.first);
            if run.fits(first.head(), frame.head(), &candidate) && is_valid(burst, frame, &candidate) {
                if !run.is_verified {
                    run.is_verified = is_valid(burst, first, &run.candidate);
                }
                if run.is_verified {
                    self.next[usize::from(run.last)] = index;
                    run.add(index, &candidate);
                    return;
                }
            }
            if run.candidate.gives_way(first.head(), &candidate, frame.head()) && is_valid(burst, frame, &candidate) {
                self.outdated |= 1 << run.first;
                *run = Run::new(index, candidate);
                return;
            }
            // A duplicate tells its receiver that something was lost.
            if candidate.kind == Kind::Ack && candidate.ack == run.candidate.ack {
                candidate.kind = Kind::Other;
            }
            // Nothing may overtake this frame.
            run.is_open = false;
        }
        // A frame that cannot begin a run closes those before it all the same.
        let run = Run::new(index, candidate);
        if let Some(slot) = self.runs.get_mut(self.count) {
            *slot = Some(run);
            self.count += 1;
        }
    }

    /// Makes one frame of each run. Returns the bits of the frames that went into others.
    fn merge(&self, burst: &mut Burst<'_>, places: &[u8]) -> u64 {
        let mut absorbed = self.outdated;
        for run in self.runs[..self.count].iter().flatten().filter(|run| run.count > 1) {
            let step = |index: &u8| (*index != run.last).then(|| self.next[usize::from(*index)]);
            let members = std::iter::successors(Some(run.first), step);
            if burst.join(members.clone().map(|index| places[usize::from(index)])) {
                let frame = burst.frame_mut(places[usize::from(run.first)]);
                rewrite(frame, run);
                absorbed |= members.skip(1).fold(0, |bits, index| bits | 1 << index);
            }
        }
        absorbed
    }
}

/// Whether the checksums of a segment are right.
fn is_valid(burst: &Burst<'_>, frame: &Frame, candidate: &Candidate) -> bool {
    let (head, headers) = (frame.head(), candidate.headers);
    if !headers.is_v6 {
        let mut sum = Sum::new();
        sum.add(head.get(headers.l3..headers.l4).unwrap_or_default());
        if sum.checksum() != 0 {
            return false;
        }
    }
    let Some(mut sum) = headers.pseudo(head, headers.len - headers.l4 + candidate.data) else { return false };
    sum.add(head.get(headers.l4..headers.len).unwrap_or_default());
    if candidate.data > 0 {
        for piece in burst.tail(frame) {
            add_piece(&mut sum, *piece);
        }
    }
    sum.checksum() == 0
}

/// Sums over memory that may change, by way of a copy that stays in the cache.
fn add_piece(sum: &mut Sum, mut piece: SourceSegment<'_>) {
    let mut block = [0u8; 1024];
    while !piece.is_empty() {
        let count = piece.read(&mut block);
        sum.add(&block[..count]);
        piece = piece.skip(count);
    }
}

/// Gives the first frame of a run the headers of the whole.
fn rewrite(frame: &mut Frame, run: &Run) {
    let Headers { is_v6, l3, l4, len } = run.candidate.headers;
    let head = frame.head_mut();
    if is_v6 {
        put_be16(head, l3 + ip::IPV6_PAYLOAD_LEN_OFFSET, (run.packet_len - ip::IPV6_HEADER_LEN) as u16);
    } else {
        put_be16(head, l3 + ip::IPV4_TOTAL_LEN_OFFSET, run.packet_len as u16);
        put_be16(head, l3 + ip::IPV4_CSUM_OFFSET, 0);
        let mut sum = Sum::new();
        sum.add(head.get(l3..l4).unwrap_or_default());
        put_be16(head, l3 + ip::IPV4_CSUM_OFFSET, sum.checksum());
    }
    if let Some(flags) = head.get_mut(l4 + l4::TCP_FLAGS_OFFSET) {
        *flags = run.flags;
    }
    if let Some(sum) = run.candidate.headers.pseudo(head, run.packet_len - (l4 - l3)) {
        put_be16(head, l4 + usize::from(l4::TCP_CSUM_OFFSET), sum.fold());
    }
    let kind = if is_v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 };
    frame.set_offload(Offload {
        csum: Csum::Partial { start: l4 as u16, offset: l4::TCP_CSUM_OFFSET },
        gso: Some(Gso { kind, size: run.candidate.data as u16, header_len: len as u16, ecn: false }),
    });
}

#[cfg(test)]
mod tests;
