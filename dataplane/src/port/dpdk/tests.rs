//! DPDK's own ring as a device: what is sent comes back. As root, like DPDK itself.

use etherparse::PacketBuilder;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use super::*;
use crate::frame::BurstStorage;
use crate::limits::BURST;
use crate::mem::SourceSegment;
use crate::switch::DropReason;
use crate::switch::convert::Scratch;
use crate::wire::{Csum, Gso, GsoKind, Offload, Sum, VirtioNetHdr};

/// A device whose two ends are ours.
struct Loop {
    link: Link,
    stats: Arc<PortStats>,
    scratch: Scratch,
    storage: BurstStorage,
}

impl Loop {
    fn open(name: &str) -> Self {
        let device = Device::open(name, 1, None).unwrap();
        assert_eq!((device.queues(), device.driver().as_str(), device.is_up().unwrap()), (1, "net_ring", true));
        let stats = Arc::new(PortStats::default());
        let link = link(&Arc::new(device), &stats);
        Self { link, stats, scratch: Scratch::default(), storage: BurstStorage::default() }
    }

    /// Sends frames in one burst. Returns why the last of them was dropped, if it was.
    fn send(&mut self, frames: &[(Offload, Vec<u8>)]) -> Option<DropReason> {
        let headers: Vec<_> = frames.iter().map(|(offload, _)| offload.to_virtio(0).to_bytes()).collect();
        let mut burst = self.storage.begin();
        for ((_, bytes), header) in frames.iter().zip(&headers) {
            let mut frame = burst.start(VirtioNetHdr::LEN);
            assert!(frame.push(SourceSegment::from_slice(header)));
            for piece in bytes.chunks(700) {
                assert!(frame.push(SourceSegment::from_slice(piece)));
            }
            frame.finish().unwrap();
        }
        self.scratch.outcomes.clear();
        let places: Vec<u8> = (0..burst.count() as u8).collect();
        self.link.tx[0].send(&burst, &places, &mut self.scratch).unwrap();
        self.scratch.outcomes.reason(frames.len() as u8 - 1)
    }

    /// All frames that are there.
    fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut received = Vec::new();
        let queue = &self.link.rx[0].queue;
        let mut take = |burst: &mut crate::frame::Burst<'_>| {
            for place in 0..burst.count() {
                let frame = burst.frame(place as u8);
                let mut bytes = frame.head().to_vec();
                for piece in burst.tail(frame) {
                    let at = bytes.len();
                    bytes.resize(at + piece.len(), 0);
                    piece.read(&mut bytes[at..]);
                }
                received.push(bytes);
            }
        };
        while queue.poll(&mut self.storage, &mut take).unwrap() > 0 {}
        received
    }
}

fn plain(len: usize) -> (Offload, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at ^ len) as u8).collect();
    bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    (Offload::NONE, bytes)
}

/// A TCP frame with `len` bytes of data, its checksum left open, to be cut at `size`.
fn tcp(len: usize, size: u16) -> (Offload, Vec<u8>) {
    let mut bytes = Vec::new();
    let data: Vec<u8> = (0..len).map(|at| (at * 7) as u8).collect();
    let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    link.ipv4([10; 4], [11; 4], 64).tcp(1, 2, 3, 4).ack(5).write(&mut bytes, &data).unwrap();
    let pseudo = Sum::pseudo_v4([10; 4], [11; 4], 6, 20 + len as u16);
    bytes[50..52].copy_from_slice(&pseudo.fold().to_be_bytes());
    let gso = Some(Gso { kind: GsoKind::Tcp4, size, header_len: 54, ecn: false });
    (Offload { csum: Csum::Partial { start: 34, offset: 16 }, gso }, bytes)
}

#[test]
fn what_is_sent_comes_back() {
    let mut device = Loop::open("net_ring0");
    // More frames than there are buffers, all in all: none of them is lost.
    for round in 0..200 {
        let frames: Vec<_> = (0..BURST).map(|at| plain(60 + (round * 37 + at * 101) % 1455)).collect();
        assert_eq!(device.send(&frames), None);
        assert_eq!(device.receive(), frames.into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>());
    }
    assert_eq!(device.stats.tx(0).read().0, 200 * BURST as u64);

    // Super-packets are cut, and their checksums are right.
    let (offload, bytes) = tcp(20_000, 1400);
    device.send(&[(offload, bytes.clone())]);
    let (mut data, segments) = (Vec::new(), device.receive());
    for segment in &segments {
        let packet = SlicedPacket::from_ethernet(segment).unwrap();
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) = (packet.net, packet.transport) else {
            panic!("{segment:?}")
        };
        assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
        assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv4([10; 4], [11; 4]).unwrap());
        data.extend_from_slice(tcp.payload());
    }
    assert_eq!((segments.len(), data), (15, bytes[54..].to_vec()));
    assert_eq!(device.stats.made(), 14);

    // What cannot be is counted and noted; the device goes on.
    assert_eq!(device.send(&[plain(1515)]), Some(DropReason::MtuEgress));
    let mut rounds = 0;
    while device.send(&vec![plain(60); BURST]).is_none() {
        rounds += 1;
        assert!(rounds < 1000, "a ring without an end");
    }
    let full = device.stats.drops(DropReason::Full);
    assert!((1..=BURST as u64).contains(&full), "{full}");
    assert_eq!(device.receive().len(), (rounds + 1) * BURST - full as usize);
    assert_eq!(device.send(&[plain(60)]), None);
    assert_eq!(device.receive().len(), 1);
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    for device in ["net_nothing0", "net_af_packet7,iface=nothing0"] {
        let error = Device::open(device, 1, None).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }
    let error = Device::open("net_tap5,iface=sl-test5", 1, Some(9000)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ERANGE), "{error}");
}

#[test]
fn a_device_takes_its_mtu() {
    for (name, mtu) in [("net_ring11", 1400), ("net_ring12", 9000)] {
        let opened = Device::open(name, 1, Some(mtu as u16));
        let Ok(device) = opened else {
            // A driver may have a limit, but not on less than what all links take.
            assert_eq!((mtu, opened.unwrap_err().raw_os_error()), (9000, Some(libc::ERANGE)));
            continue;
        };
        assert_eq!(device.mtu(), mtu);
        let stats = Arc::new(PortStats::default());
        let link = link(&Arc::new(device), &stats);
        let mut device = Loop { link, stats, scratch: Scratch::default(), storage: BurstStorage::default() };
        assert_eq!(device.send(&[plain(mtu + 15)]), Some(DropReason::MtuEgress));
        assert_eq!(device.send(&[plain(mtu + 14)]), None);
        assert_eq!(device.receive().len(), 1);
    }
    let device = Device::open("net_tap6,iface=sl-test6", 1, Some(1400)).unwrap();
    assert_eq!((device.mtu(), interface_mtu("sl-test6").as_str()), (1400, "1400"));
}

fn interface_mtu(name: &str) -> String {
    std::fs::read_to_string(format!("/sys/class/net/{name}/mtu")).unwrap().trim().into()
}

/// Devices have several names.
#[test]
fn what_runs_is_not_opened_again() {
    let mut device = Loop::open("net_ring13");
    for _ in 0..2 {
        let error = Device::open("vdev:net_ring13", 1, None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}");
        assert_eq!(device.send(&[plain(100)]), None);
        assert_eq!(device.receive().len(), 1);
    }
}

#[test]
fn a_device_can_be_had_again() {
    for _ in 0..3 {
        let mut device = Loop::open("net_ring9");
        assert_eq!(device.send(&[plain(100)]), None);
    }
}
