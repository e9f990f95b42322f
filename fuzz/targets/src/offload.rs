//! Checksums and segments, against an oracle that sums word by word.

use arbitrary::{Arbitrary, Unstructured};
use sluice::wire::checksum::{Sum, complete_partial, update};
use sluice::wire::offload::{Csum, Gso, GsoKind, Offload};
use sluice::wire::segment::{ChecksumMode, MAX_SEGMENT_HEADER, MAX_SEGMENTS, Segmenter, most_segments};

use crate::ones_complement;

#[derive(Debug, Arbitrary)]
struct Input<'d> {
    /// 0 for bytes as they are; else a super-packet of one of four kinds.
    kind: u8,
    size: u16,
    start: u16,
    offset: u16,
    /// IP options or TCP options, in words.
    options: u8,
    complete: bool,
    flags: u8,
    sequence: u32,
    /// Bytes of data, repeated so often.
    repeat: u16,
    data: &'d [u8],
}

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else { return };
    sums(input.data);
    if input.kind == 0 { anything(&input) } else { super_packet(&input) }
}

fn sums(bytes: &[u8]) {
    let mut sum = Sum::new();
    sum.add(bytes);
    let (ours, theirs) = (sum.fold(), ones_complement(bytes));
    assert!(ours == theirs || ours.wrapping_add(theirs) == 0xffff && ours.min(theirs) == 0, "{ours:#x} {theirs:#x}");
    // In two pieces, the first of even length.
    let (one, two) = bytes.split_at(bytes.len() / 4 * 2);
    let mut sum = Sum::new();
    sum.add(one);
    sum.add(two);
    assert_eq!(sum.fold(), ours);
    if let [a, b, c, d, ..] = *bytes {
        let (old, new) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let rest = bytes.get(4..bytes.len() / 2 * 2).unwrap_or_default();
        let whole = |word: u16| !ones_complement(&[&word.to_be_bytes(), rest].concat());
        let updated = update(whole(old), old, new);
        // Zero has two forms.
        assert!(updated == whole(new) || (updated ^ whole(new)) == 0xffff);
    }
}

/// Frames and offloads that need not fit each other: nothing but no panic is expected.
fn anything(input: &Input<'_>) {
    let mut frame = input.data.to_vec();
    if complete_partial(&mut frame, input.start, input.offset).is_ok() {
        let field = usize::from(input.start) + usize::from(input.offset);
        let changed = frame.iter().zip(input.data).enumerate().filter(|(_, (new, old))| new != old);
        assert!(changed.into_iter().all(|(at, _)| at == field || at == field + 1));
    }
    let kinds = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp4, GsoKind::Udp6];
    for kind in kinds {
        let csum = Csum::Partial { start: input.start, offset: input.offset };
        let offload = Offload { csum, gso: Some(Gso { kind, size: input.size, ecn: false, header_len: input.start }) };
        drain(input.data, &offload, ChecksumMode::Complete);
    }
}

fn drain(frame: &[u8], offload: &Offload, mode: ChecksumMode) {
    let Ok(mut segments) = Segmenter::new(frame, offload, mode) else { return };
    let (mut header, mut count) = ([0; MAX_SEGMENT_HEADER], 0);
    while let Some(segment) = segments.next_segment(&mut header) {
        assert!(segment.header_len <= header.len() && frame.get(segment.payload).is_some());
        count += 1;
        assert!(count <= MAX_SEGMENTS);
    }
}

/// A super-packet by the book: its segments, put together, are it again, and each is right by itself.
fn super_packet(input: &Input<'_>) {
    let packet = Packet::new(input);
    let frame = packet.bytes();
    let gso = Gso { kind: packet.kind, size: input.size, ecn: false, header_len: packet.headers as u16 };
    let start = packet.l4 as u16;
    let offload = Offload { csum: Csum::Partial { start, offset: packet.kind.csum_offset() }, gso: Some(gso) };
    let mode = if input.complete { ChecksumMode::Complete } else { ChecksumMode::Partial };
    let data = &frame[packet.headers..];
    let Ok(mut segments) = Segmenter::new(&frame, &offload, mode) else {
        let most = most_segments(packet.kind) * usize::from(input.size);
        assert!(input.size == 0 || data.len() > most || frame.len() > 65_000);
        return;
    };
    let (mut header, mut seen, mut index) = ([0; MAX_SEGMENT_HEADER], 0, 0u32);
    while let Some(segment) = segments.next_segment(&mut header) {
        let mut bytes = header[..segment.header_len].to_vec();
        bytes.extend(&frame[segment.payload.clone()]);
        assert_eq!(segment.payload.start, packet.headers + seen);
        seen += segment.payload.len();
        assert!(segment.payload.len() <= usize::from(input.size));
        assert!(seen == data.len() || segment.payload.len() == usize::from(input.size));
        if let Csum::Partial { start, offset } = segment.csum {
            assert!(complete_partial(&mut bytes, start, offset).is_ok());
        }
        packet.check(&bytes, index, segment.payload.start - packet.headers, seen == data.len());
        index += 1;
    }
    assert_eq!(seen, data.len());
}

struct Packet {
    kind: GsoKind,
    l4: usize,
    headers: usize,
    sequence: u32,
    flags: u8,
    ip_options: usize,
    data: Vec<u8>,
}

const L3: usize = 14;

impl Packet {
    fn new(input: &Input<'_>) -> Self {
        let kinds = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp4, GsoKind::Udp6];
        let kind = kinds[usize::from(input.kind) % 4];
        let v6 = kind.ethertype() == 0x86dd;
        let ip_options = if v6 { 0 } else { usize::from(input.options % 11) * 4 };
        let l4 = L3 + if v6 { 40 } else { 20 + ip_options };
        let headers = l4 + if kind.is_tcp() { 20 + usize::from(input.options >> 4) % 11 * 4 } else { 8 };
        let count = (usize::from(input.repeat) + 1).min(60_000 / input.data.len().max(1));
        let (sequence, flags) = (input.sequence, input.flags);
        Self { kind, l4, headers, sequence, flags, ip_options, data: input.data.repeat(count) }
    }

    fn is_v6(&self) -> bool {
        self.kind.ethertype() == 0x86dd
    }

    /// The addresses and the rest of the pseudo header, with that length.
    fn pseudo(&self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = if self.is_v6() { (0..32).collect() } else { vec![10, 0, 0, 1, 10, 0, 0, 2] };
        bytes.extend((length as u32).to_be_bytes());
        bytes.extend([0, 0, 0, self.kind.protocol()]);
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        let length = self.headers - self.l4 + self.data.len();
        let mut bytes = vec![2; 12];
        bytes.extend(self.kind.ethertype().to_be_bytes());
        if self.is_v6() {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((length.min(65_535) as u16).to_be_bytes());
            bytes.extend([self.kind.protocol(), 64]);
            bytes.extend(0..32);
        } else {
            let total = 20 + self.ip_options + length;
            bytes.extend([0x40 | (5 + self.ip_options / 4) as u8, 0]);
            bytes.extend((total.min(65_535) as u16).to_be_bytes());
            bytes.extend([0, 7, 0x40, 0, 64, self.kind.protocol(), 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            bytes.extend(vec![1; self.ip_options]);
        }
        bytes.extend([0x12, 0x34, 0x56, 0x78]);
        // The sum of the pseudo header, as senders leave it.
        let sum = ones_complement(&self.pseudo(length)).to_be_bytes();
        if self.kind.is_tcp() {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([0, 0, 0, 1, ((self.headers - self.l4) * 4) as u8, self.flags, 0xff, 0xff]);
            bytes.extend(sum);
            bytes.extend([0, 0]);
        } else {
            bytes.extend((length.min(65_535) as u16).to_be_bytes());
            bytes.extend(sum);
        }
        bytes.resize(self.headers, 1);
        bytes.extend(&self.data);
        bytes
    }

    /// One segment, with its checksum completed.
    fn check(&self, bytes: &[u8], index: u32, offset: usize, is_last: bool) {
        let length = bytes.len() - self.l4;
        let half = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        if self.is_v6() {
            assert_eq!(usize::from(half(L3 + 4)), length);
        } else {
            assert_eq!(usize::from(half(L3 + 2)), bytes.len() - L3);
            assert_eq!(half(L3 + 4), 7u16.wrapping_add(index as u16));
            assert_eq!(ones_complement(&bytes[L3..self.l4]), 0xffff, "header checksum");
        }
        if self.kind.is_tcp() {
            let sequence = self.sequence.wrapping_add(offset as u32).to_be_bytes();
            assert_eq!(bytes[self.l4 + 4..self.l4 + 8], sequence);
            // FIN and PSH only at the end, CWR only at the beginning.
            let (at_the_end, at_the_start) = (if is_last { 0x09 } else { 0 }, if index == 0 { 0x80 } else { 0 });
            assert_eq!(bytes[self.l4 + 13], self.flags & (0x76 | at_the_end | at_the_start));
        } else {
            assert_eq!(usize::from(half(self.l4 + 4)), length);
        }
        let covered = [self.pseudo(length), bytes[self.l4..].to_vec()].concat();
        let field = half(self.l4 + usize::from(self.kind.csum_offset()));
        assert_eq!(ones_complement(&covered), 0xffff);
        // Zero would say that there is none.
        assert!(field != 0 || self.kind.is_tcp());
    }
}
