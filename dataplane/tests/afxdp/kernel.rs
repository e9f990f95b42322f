//! The kernel's own segmentation and checksums as an oracle: a super-packet goes out of one end of a wire that has no
//! offloads, and what comes in at the other is what we would have made of it, byte for byte.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use etherparse::{
    Ethernet2Header, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header, Ipv6RawExtHeader,
    TcpHeader, UdpHeader,
};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use sluice::wire::offload::VirtioNetHdr;
use sluice::wire::{
    ChecksumMode, Csum, Gso, GsoKind, MAX_SEGMENT_HEADER, Offload, Segmenter, Sum, complete_partial, insert_tag,
};

use crate::support::{Heard, Namespace, alone, hear, packet_socket};

/// Bytes of `struct virtio_net_hdr` without the number of buffers.
const HEADER: usize = 10;
const CWR: u8 = 0x80;

/// A super-packet in the making, or an ordinary one whose checksum is open.
#[derive(Debug, Clone)]
struct Shape {
    kind: GsoKind,
    payload: usize,
    /// Bytes of data in each segment; `None` for a packet that stays one.
    size: Option<u16>,
    /// Words of TCP options.
    options: usize,
    flags: u8,
    seq: u32,
    id: u16,
    vlan: Option<u16>,
    /// A hop by hop header with so many words of 8 bytes more than it needs.
    extension: Option<usize>,
    seed: u8,
}

impl Shape {
    fn is_v6(&self) -> bool {
        matches!(self.kind, GsoKind::Tcp6 | GsoKind::Udp6)
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = if matches!(self.kind, GsoKind::Tcp4 | GsoKind::Tcp6) {
            let mut tcp = TcpHeader::new(4000, 5000, self.seq, 500);
            tcp.acknowledgment_number = 9;
            tcp.set_options_raw(&vec![1; self.options * 4]).unwrap();
            let mut bytes = tcp.to_bytes().to_vec();
            bytes[13] = self.flags;
            bytes
        } else {
            let length = (8 + self.payload) as u16;
            UdpHeader { source_port: 4000, destination_port: 5000, length, checksum: 0 }.to_bytes().to_vec()
        };
        bytes.extend((0..self.payload).map(|at| ((at * 31) >> 3) as u8 ^ self.seed));
        bytes
    }

    /// The frame as a guest hands it over.
    fn build(&self) -> (Vec<u8>, Offload) {
        let (transport, protocol) = (self.transport(), IpNumber(self.kind.protocol()));
        let mut ip = if self.is_v6() {
            let header = Ipv6Header { hop_limit: 9, source: [0xfd; 16], destination: [0xfe; 16], ..Default::default() };
            let extra = |words: usize| Ipv6RawExtHeader::new_raw(protocol, &pad_options(6 + 8 * words)).unwrap();
            let extensions = Ipv6Extensions { hop_by_hop_options: self.extension.map(extra), ..Default::default() };
            IpHeaders::Ipv6(header, extensions)
        } else {
            let mut header = Ipv4Header::new(0, 9, protocol, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
            header.identification = self.id;
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        };
        ip.set_next_headers(protocol);
        ip.set_payload_len(transport.len()).unwrap();
        let link = Ethernet2Header {
            source: [2, 0, 0, 0, 0, 1],
            destination: [2, 0, 0, 0, 0, 2],
            ether_type: self.kind.ethertype().into(),
        };
        let mut frame = link.to_bytes().to_vec();
        ip.write(&mut frame).unwrap();
        let start = frame.len();
        frame.extend(&transport);
        let len = transport.len();
        let pseudo = if self.is_v6() {
            Sum::pseudo_v6([0xfd; 16], [0xfe; 16], protocol.0, len as u32)
        } else {
            Sum::pseudo_v4([10, 0, 0, 1], [10, 0, 0, 2], protocol.0, len as u16)
        };
        let offset = if protocol == IpNumber::TCP { 16 } else { 6 };
        frame[start + offset..][..2].copy_from_slice(&pseudo.fold().to_be_bytes());
        let header_len = (start + if protocol == IpNumber::TCP { 20 + 4 * self.options } else { 8 }) as u16;
        let ecn = protocol == IpNumber::TCP && self.flags & CWR != 0;
        let gso = self.size.map(|size| Gso { kind: self.kind, size, header_len, ecn });
        let mut offload = Offload { csum: Csum::Partial { start: start as u16, offset: offset as u16 }, gso };
        if let Some(tci) = self.vlan {
            let mut room = [&[0; 4][..], &frame].concat();
            let start = insert_tag(&mut room, 4, tci).unwrap();
            frame = room.split_off(start);
            offload = offload.shift(4).unwrap();
        }
        (frame, offload)
    }
}

/// Options of an IPv6 header that mean nothing (PadN).
fn pad_options(len: usize) -> Vec<u8> {
    let mut options = vec![0; len];
    (options[0], options[1]) = (1, len as u8 - 2);
    options
}

/// What becomes of it on a wire, by our own code.
fn ours(frame: &[u8], offload: &Offload) -> Vec<Vec<u8>> {
    if offload.gso.is_none() {
        let mut frame = frame.to_vec();
        if let Csum::Partial { start, offset } = offload.csum {
            complete_partial(&mut frame, start, offset).unwrap();
        }
        return vec![frame];
    }
    let mut segments = Segmenter::new(frame, offload, ChecksumMode::Complete).unwrap();
    let (mut header, mut all) = ([0; MAX_SEGMENT_HEADER], Vec::new());
    while let Some(segment) = segments.next_segment(&mut header) {
        all.push([&header[..segment.header_len], &frame[segment.payload]].concat());
    }
    all
}

/// Where the kernel completes a checksum outside of segmentation, it writes 0xffff for zero in TCP, too, which to TCP is
/// the same number.
fn plain_zero(frame: &mut [u8], offload: &Offload) {
    let Csum::Partial { start, offset: offset @ 16 } = offload.csum else { return };
    let field = &mut frame[usize::from(start + offset)..][..2];
    if field == [0xff, 0xff] {
        field.fill(0);
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    let kinds = prop::sample::select(vec![GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp4, GsoKind::Udp6]);
    // Flags that segments can have: no SYN, no RST, no URG.
    let flags = any::<u8>().prop_map(|flags| flags & 0xd9 | 0x10);
    let sizes = prop::option::weighted(0.8, 64..8800u16);
    let headers = (0..=10usize, flags, any::<u32>(), any::<u16>());
    let around = (prop::option::of(1..4095u16), prop::option::of(0..2usize), any::<u8>());
    (kinds, 1..60_000usize, sizes, headers, around).prop_map(
        |(kind, payload, size, (options, flags, seq, id), (vlan, extension, seed))| {
            // An ordinary one fits the wire. What is super is longer than one segment, and has at most as many as the
            // kernel makes of a datagram.
            let payload = match size {
                None => payload % 8000,
                Some(size) => payload.clamp(usize::from(size) + 1, usize::from(size) * 100),
            };
            Shape { kind, payload: payload.min(60_000), size, options, flags, seq, id, vlan, extension, seed }
        },
    )
}

#[test]
fn super_packets_and_checksums_are_the_kernels() {
    let _alone = alone();
    let (near, far) = (Namespace::new(), Namespace::new());
    near.wire("near0", &far, "far0");
    for (namespace, name) in [(&near, "near0"), (&far, "far0")] {
        namespace.ip(&format!("link set {name} mtu 9000"));
    }
    near.command("ethtool", "-K near0 tx-udp-segmentation off sg off");
    let (sender, receiver) = (near.run(|| packet_socket("near0")), far.run(|| packet_socket("far0")));
    // SAFETY: the kernel reads an int of the length given.
    let done = unsafe {
        let (on, len) = (1i32, size_of::<i32>() as u32);
        libc::setsockopt(sender.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), len)
    };
    assert_eq!(done, 0);
    let total = std::cell::Cell::new(0);
    let result = TestRunner::new(ProptestConfig { cases: 300, ..ProptestConfig::default() }).run(&shapes(), |shape| {
        let (frame, offload) = shape.build();
        let header = VirtioNetHdr::to_bytes(offload.to_virtio(0));
        let message = [&header[..HEADER], &frame].concat();
        // SAFETY: the kernel reads the message, of the length given.
        let sent = unsafe { libc::send(sender.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        prop_assert_eq!(sent, message.len() as isize, "{}", std::io::Error::last_os_error());
        let wanted = ours(&frame, &offload);
        let mut arrived = Vec::new();
        let began = Instant::now();
        while arrived.len() < wanted.len() && began.elapsed() < Duration::from_secs(2) {
            arrived.extend(hear(&receiver).map(Heard::tagged).filter(|bytes| bytes[..6] == frame[..6]));
        }
        if arrived.len() != wanted.len() {
            return Err(TestCaseError::fail(format!("{} frames, not {}", arrived.len(), wanted.len())));
        }
        for (at, (theirs, ours)) in arrived.iter_mut().zip(&wanted).enumerate() {
            if shape.size.is_none() {
                plain_zero(theirs, &offload);
            }
            let differs = theirs.iter().zip(ours).position(|(a, b)| a != b);
            prop_assert!(theirs == ours, "frame {at}: {} and {} bytes, from {differs:?}", theirs.len(), ours.len());
        }
        total.set(total.get() + arrived.len());
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}"));
    eprintln!("{} frames of the kernel's were ours", total.get());
    assert!(total.get() > 1000);
}
