//! Headers in front of frames that ask for the impossible. The frame is dropped, with a reason; the port goes on.

use anyhow::Result;
use e2e::hostile::arena::{Arena, Expect, PEER_MAC, Recover};
use e2e::hostile::frontend::*;
use e2e::hostile::queue::{Desc, Layout};

use Expect::{Dropped, Unharmed};

const NEEDS_CSUM: u8 = 1;
const TCP4: u8 = 1;
const UDP: u8 = 3;
const TCP6: u8 = 4;

/// A virtio-net header (virtio 1.2, 5.1.6).
#[derive(Clone, Copy)]
struct Header {
    flags: u8,
    gso: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    /// What a TCP super-packet over IPv4 has that is as it should be.
    const TSO: Self = Self {
        flags: NEEDS_CSUM,
        gso: TCP4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    /// No super-packet, but a checksum to be completed.
    const CSUM: Self = Self { gso: 0, gso_size: 0, hdr_len: 0, ..Self::TSO };

    fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![self.flags, self.gso];
        for half in [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers] {
            bytes.extend(half.to_le_bytes());
        }
        bytes
    }
}

/// TCP over IPv4, with so many bytes of data.
fn tcp(from: u64, data: usize) -> Vec<u8> {
    let mut frame = ethernet(PEER_MAC, from);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let total = (40 + data).min(65_535) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.resize(54 + data, 0x77);
    frame
}

type Case = (&'static str, Header, usize, Expect);

const BAD: Expect = Dropped("bad_offload");

const CASES: &[Case] = &[
    // CVE-2024-11614 and its relatives.
    ("a checksum from beyond the frame", Header { csum_start: u16::MAX, ..Header::CSUM }, 200, BAD),
    ("a checksum at its end", Header { csum_start: 254, ..Header::CSUM }, 200, BAD),
    ("a checksum field beyond it", Header { csum_offset: u16::MAX, ..Header::CSUM }, 200, BAD),
    ("a field half beyond it", Header { csum_start: 34, csum_offset: 219, ..Header::CSUM }, 200, BAD),
    ("start and offset that wrap", Header { csum_start: 0xfff0, csum_offset: 0x20, ..Header::CSUM }, 200, BAD),
    ("a checksum of the Ethernet header", Header { csum_start: 0, csum_offset: 0, ..Header::CSUM }, 200, BAD),
    ("segments of no size", Header { gso_size: 0, ..Header::TSO }, 4000, BAD),
    ("segments without a checksum", Header { flags: 0, ..Header::TSO }, 4000, BAD),
    ("a kind that is none", Header { gso: 2, ..Header::TSO }, 4000, BAD),
    ("all kinds", Header { gso: 0x7f, ..Header::TSO }, 4000, BAD),
    ("IPv6 that is IPv4", Header { gso: TCP6, ..Header::TSO }, 4000, BAD),
    ("UDP fragments", Header { gso: UDP, ..Header::TSO }, 4000, BAD),
    ("UDP segments that are TCP", Header { gso: 5, csum_offset: 6, ..Header::TSO }, 4000, BAD),
    ("TCP whose checksum is elsewhere", Header { csum_offset: 6, ..Header::TSO }, 4000, BAD),
    ("headers that begin elsewhere", Header { csum_start: 100, ..Header::TSO }, 4000, BAD),
    ("sixty thousand segments", Header { gso_size: 1, ..Header::TSO }, 60_000, Dropped("cannot_convert")),
    // What is only a hint is ignored.
    ("a header length beyond the frame", Header { hdr_len: u16::MAX, ..Header::TSO }, 4000, Unharmed),
    ("no header length", Header { hdr_len: 0, ..Header::TSO }, 4000, Unharmed),
    ("buffers in a frame that is sent", Header { num_buffers: u16::MAX, ..Header::CSUM }, 200, Unharmed),
    ("flags that nobody knows", Header { flags: 0xfd, ..Header::CSUM }, 200, Unharmed),
    ("segments larger than the frame", Header { gso_size: u16::MAX, ..Header::TSO }, 4000, Unharmed),
];

fn send(evil: &mut Frontend, header: Header, data: usize) {
    let mut bytes = header.bytes();
    bytes.extend(tcp(evil.mac, data));
    // Longer than a buffer of the usual kind, so it lies where there is room.
    evil.memory.write(SPARE, &bytes);
    evil.tx.post_chain(&[Desc::new(SPARE, bytes.len() as u32, 0)]);
}

#[test]
fn offloads_that_cannot_be() -> Result<()> {
    let mut arena = Arena::start("")?;
    for layout in [Layout::Split, Layout::Packed] {
        let setup = Setup::of(layout).with(CSUM | HOST_TSO4 | HOST_TSO6);
        for &(name, header, data, expect) in CASES {
            let act = |evil: &mut Frontend| {
                send(evil, header, data);
                Ok(())
            };
            arena.case(&format!("{layout:?}: {name}"), setup, act, expect, Recover::Reset)?;
        }
    }
    arena.finish()
}

/// As many segments as there may be, again and again, for a receiver that cannot take super-packets: the price of one
/// frame is at its highest.
#[test]
fn segments_without_end() -> Result<()> {
    let mut arena = Arena::start("")?;
    let act = |evil: &mut Frontend| {
        for _ in 0..20 {
            for _ in 0..32 {
                if evil.tx.free_slot().is_some() {
                    send(evil, Header { gso_size: 30, ..Header::TSO }, 60_000);
                }
            }
            evil.tx.notify();
            std::thread::sleep(std::time::Duration::from_millis(10));
            while evil.tx.reap().is_some() {}
        }
        Ok(())
    };
    let setup = Setup::of(Layout::Split).with(CSUM | HOST_TSO4);
    arena.case("2000 segments a frame", setup, act, Dropped("full"), Recover::Reset)?;
    arena.finish()
}
