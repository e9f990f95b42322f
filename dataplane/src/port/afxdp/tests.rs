//! Two ends of a wire, both ours: what is sent, what arrives, and where the pool's frames are afterwards. As root.

mod trouble;
mod watch;

use std::os::fd::BorrowedFd;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::queue::Queues;
use super::*;
use crate::frame::BurstStorage;
use crate::limits::BURST;
use crate::mem::SourceSegment;
use crate::port::stats::PortStats;
use crate::switch::DropReason;
use crate::switch::convert::Scratch;
use crate::wire::offload::{Csum, GsoKind, Offload, VirtioNetHdr};
use crate::wire::{ChecksumMode, MAX_SEGMENT_HEADER, Segmenter};

/// A command that one test starts has another's sockets open for a moment, and an interface is not free until the last
/// is closed.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a test with a wire of its own, `a` to `b`, of the MTU given. It goes with the thread.
fn on_a_wire(mtu: usize, test: impl FnOnce(&mut End, &mut End) + Send + 'static) {
    on_a_wire_with(mtu, Options::default(), test);
}

/// The same with options of both ends.
fn on_a_wire_with(mtu: usize, options: Options, test: impl FnOnce(&mut End, &mut End) + Send + 'static) {
    in_a_namespace(move || {
        ip(&format!("link add name end-a mtu {mtu} type veth peer name end-b mtu {mtu}"));
        let ends = ["end-a", "end-b"].map(|name| {
            ip(&format!("link set {name} addrgenmode none up"));
            name
        });
        let [mut a, mut b] = ends.map(|name| End::open_with(name, &options));
        test(&mut a, &mut b);
        for end in [a, b] {
            end.check_books();
        }
    });
}

/// Runs a test in a network of its own, which goes with the thread.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let thread = std::thread::spawn(|| {
        // SAFETY: no pointers are passed; it changes this thread only.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "these tests run as root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(program: &str, arguments: &str) {
    assert!(Command::new(program).args(arguments.split(' ')).status().unwrap().success(), "{program} {arguments}");
}

fn ip(arguments: &str) {
    run("ip", arguments);
}

/// One end of the wire.
struct End {
    queues: Queues,
    stats: Arc<PortStats>,
    storage: BurstStorage,
    scratch: Scratch,
}

impl End {
    fn open(name: &str) -> Self {
        Self::open_with(name, &Options::default())
    }

    fn open_with(name: &str, options: &Options) -> Self {
        let state = Device::new(name).unwrap().state().unwrap().unwrap();
        let stats = Arc::new(PortStats::default());
        let queues = Queues::open(state.index, Channels::ONE, state.mtu, options, &stats).unwrap().0;
        Self { queues, stats, storage: BurstStorage::default(), scratch: Scratch::default() }
    }

    /// Sends frames with their virtio-net headers, in one burst.
    fn send(&mut self, frames: &[(Offload, Vec<u8>)]) {
        let headers: Vec<_> = frames.iter().map(|(offload, _)| offload.to_virtio(0).to_bytes()).collect();
        let mut burst = self.storage.begin();
        for ((_, bytes), header) in frames.iter().zip(&headers) {
            let mut frame = burst.start(VirtioNetHdr::LEN);
            assert!(frame.push(SourceSegment::from_slice(header)));
            // In pieces, as guests have them.
            for piece in bytes.chunks(3000) {
                assert!(frame.push(SourceSegment::from_slice(piece)));
            }
            frame.finish().unwrap();
        }
        let places: Vec<u8> = (0..burst.count() as u8).collect();
        self.queues.link().tx[0].send(&burst, &places, &mut self.scratch).unwrap();
    }

    /// Receives until `count` frames have come, or no more come.
    fn receive(&mut self, count: usize) -> Vec<Vec<u8>> {
        let (link, mut received, mut last) = (self.queues.link(), Vec::new(), Instant::now());
        while received.len() < count && last.elapsed() < Duration::from_millis(300) {
            let taken = link.rx[0].queue.poll(&mut self.storage, &mut |burst| {
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
            });
            if taken.unwrap() > 0 {
                last = Instant::now();
            }
        }
        received
    }

    fn audit(&self) -> [umem::Audit; 2] {
        self.queues.audit()[0]
    }

    /// Every frame is in one place, and the kernel has none but those it may receive into.
    fn check_books(&self) {
        let began = Instant::now();
        loop {
            let [rx, tx] = self.audit();
            assert!(rx.is_balanced() && tx.is_balanced(), "{rx:?} {tx:?}");
            // The kernel takes frames out of the fill ring as it needs them, and keeps what it took and did not use.
            if tx.free == tx.total && rx.free == 0 && rx.kernel <= 1 {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(5), "{rx:?} {tx:?}");
            std::thread::yield_now();
        }
    }
}

/// A TCP frame with `len` bytes of data, its checksum left open.
fn tcp(v6: bool, len: usize, gso: Option<u16>) -> (Offload, Vec<u8>) {
    let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = if v6 { link.ipv6([0xfd; 16], [0xfe; 16], 64) } else { link.ipv4([10; 4], [11; 4], 64) };
    let data: Vec<u8> = (0..len).map(|at| (at * 7) as u8).collect();
    let mut bytes = Vec::new();
    ip.tcp(1, 2, 3, 4).ack(5).write(&mut bytes, &data).unwrap();
    let start: u16 = if v6 { 54 } else { 34 };
    let pseudo = if v6 {
        crate::wire::Sum::pseudo_v6([0xfd; 16], [0xfe; 16], 6, 20 + len as u32)
    } else {
        crate::wire::Sum::pseudo_v4([10; 4], [11; 4], 6, 20 + len as u16)
    };
    bytes[usize::from(start) + 16..][..2].copy_from_slice(&pseudo.fold().to_be_bytes());
    let kind = if v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 };
    let gso = gso.map(|size| crate::wire::Gso { kind, size, header_len: start + 20, ecn: false });
    (Offload { csum: Csum::Partial { start, offset: 16 }, gso }, bytes)
}

fn plain(len: usize) -> (Offload, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at ^ len) as u8).collect();
    bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    (Offload::NONE, bytes)
}

/// What has to arrive, by the segmentation and checksums that are checked against etherparse elsewhere.
fn expected((offload, bytes): &(Offload, Vec<u8>)) -> Vec<Vec<u8>> {
    let mut bytes = bytes.clone();
    if offload.gso.is_some() {
        let mut segments = Segmenter::new(&bytes, offload, ChecksumMode::Complete).unwrap();
        let mut header = [0; MAX_SEGMENT_HEADER];
        let mut all = Vec::new();
        while let Some(segment) = segments.next_segment(&mut header) {
            all.push([&header[..segment.header_len], &bytes[segment.payload]].concat());
        }
        return all;
    }
    if let Csum::Partial { start, offset } = offload.csum {
        crate::wire::complete_partial(&mut bytes, start, offset).unwrap();
    }
    vec![bytes]
}

/// Sends and checks what arrives.
fn deliver(from: &mut End, to: &mut End, frames: &[(Offload, Vec<u8>)]) {
    from.send(frames);
    let wanted: Vec<_> = frames.iter().flat_map(expected).collect();
    let arrived = to.receive(wanted.len());
    assert_eq!(arrived.len(), wanted.len());
    for (at, (arrived, wanted)) in arrived.iter().zip(&wanted).enumerate() {
        assert!(arrived == wanted, "frame {at} of {}: {} and {} bytes", wanted.len(), arrived.len(), wanted.len());
    }
}

#[test]
fn frames_arrive_as_they_are_and_pools_stay_whole() {
    on_a_wire(1500, |a, b| {
        for round in 0..100 {
            let frames: Vec<_> = (0..BURST).map(|at| plain(60 + (round * 37 + at * 101) % 1455)).collect();
            deliver(a, b, &frames);
            deliver(b, a, &frames[..round % BURST]);
        }
        assert_eq!(a.stats.tx(0).read().0, 100 * BURST as u64);
    });
}

#[test]
fn checksums_are_completed_and_super_packets_cut() {
    on_a_wire(1500, |a, b| {
        for v6 in [false, true] {
            let supers = [tcp(v6, 40_000, Some(1440)), tcp(v6, 1440, Some(1440)), tcp(v6, 1441, Some(1440))];
            let ordinary = [tcp(v6, 0, None), tcp(v6, 1, None), tcp(v6, 1400, None)];
            deliver(a, b, &[&supers[..], &ordinary[..]].concat());
        }
        // A burst of the longest that there are.
        let frames: Vec<_> = (0..BURST).map(|_| tcp(false, 65_000, Some(1460))).collect();
        deliver(a, b, &frames);
    });
}

#[test]
fn jumbo_frames_span_frames_of_the_pool() {
    on_a_wire(9000, |a, b| {
        let lens = [1500, 4095, 4096, 4097, 8191, 8192, 8193, 9014];
        let frames: Vec<_> = lens.into_iter().map(plain).collect();
        deliver(a, b, &frames);
        deliver(b, a, &[tcp(true, 8900, None), tcp(false, 60_000, Some(8960)), tcp(true, 30_000, Some(1400))]);
    });
}

#[test]
fn any_super_packet_is_cut_as_the_oracle_says() {
    on_a_wire(9000, any_super_packet);
}

/// Options of an uplink that leaves checksums to the kernel, if that can do it.
fn without_checksums() -> Option<Options> {
    if Socket::takes_requests() {
        return Some(Options { tx_checksum: Some(true), ..Options::default() });
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let version: Vec<u32> = release.split('.').map_while(|number| number.parse().ok()).collect();
    assert!(version < vec![6, 11], "Linux {release} takes requests with frames to send, from root");
    eprintln!("left out: Linux {release} takes no requests with frames to send");
    None
}

/// The kernel's own checksums as an oracle: it completes them for an interface that does not.
#[test]
fn checksums_left_to_the_kernel_are_those_that_we_would_have_made() {
    let Some(options) = without_checksums() else { return };
    on_a_wire_with(9000, options, |a, b| {
        assert!(a.queues.link().features.contains(&"tx-checksum"));
        run("ethtool", "-K end-a tx off");
        let lens = [60, 4031, 4032, 4033, 8064, 8065, 9014];
        deliver(a, b, &lens.map(plain));
        deliver(a, b, &[tcp(true, 0, None), tcp(false, 8900, None), tcp(false, 60_000, Some(8960))]);
        any_super_packet(a, b);
    });
}

#[test]
fn checksums_are_left_to_a_driver_that_completes_them() {
    let Some(options) = without_checksums() else { return };
    on_a_wire_with(1500, options, |a, b| {
        // Beside frames that have nothing to complete. A veth pair passes on what it would complete on a wire.
        let frames = [tcp(false, 1000, None), plain(100), tcp(true, 1001, None)];
        a.send(&frames);
        assert!(b.receive(3) == frames.map(|(_, bytes)| bytes));
        // Hardware would not know what to do about a header within a tunnel's.
        let mut inner = tcp(false, 1000, None);
        inner.1.splice(34..34, [0; 8]);
        inner.1[23] = 17;
        inner.0.csum = Csum::Partial { start: 42, offset: 16 };
        deliver(a, b, &[inner]);
    });
}

#[test]
fn a_veth_pair_does_not_say_that_it_completes_checksums() {
    on_a_wire(1500, |a, _| assert!(!a.queues.link().features.contains(&"tx-checksum")));
}

fn any_super_packet(a: &mut End, b: &mut End) {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    let shapes = (any::<[bool; 3]>(), 0..60_000usize, 500..8800u16);
    let mut runner = TestRunner::new(ProptestConfig { cases: 100, ..ProptestConfig::default() });
    let ends = std::cell::RefCell::new((a, b));
    let result = runner.run(&shapes, |([v6, udp, tagged], len, size)| {
        let (a, b) = &mut *ends.borrow_mut();
        deliver(a, b, &[super_packet(v6, udp, tagged, len, size), plain(100)]);
        Ok(())
    });
    result.unwrap();
}

/// A super-packet of TCP or UDP, with a tag or without.
fn super_packet(v6: bool, udp: bool, tagged: bool, len: usize, size: u16) -> (Offload, Vec<u8>) {
    let (mut offload, mut bytes) = tcp(v6, len, Some(size));
    let (Csum::Partial { start, .. }, Some(mut gso)) = (offload.csum, offload.gso) else { unreachable!() };
    let l4 = usize::from(start);
    if udp {
        let data = bytes.split_off(l4 + 20);
        bytes.truncate(l4);
        bytes[if v6 { 20 } else { 23 }] = 17;
        let udp_len = (8 + data.len()) as u16;
        let pseudo = if v6 {
            crate::wire::Sum::pseudo_v6([0xfd; 16], [0xfe; 16], 17, udp_len.into())
        } else {
            crate::wire::Sum::pseudo_v4([10; 4], [11; 4], 17, udp_len)
        };
        for field in [7, 9, udp_len, pseudo.fold()] {
            bytes.extend(field.to_be_bytes());
        }
        bytes.extend(data);
        gso.kind = if v6 { GsoKind::Udp6 } else { GsoKind::Udp4 };
        gso.header_len = start + 8;
        offload = Offload { csum: Csum::Partial { start, offset: 6 }, gso: Some(gso) };
    }
    if tagged {
        bytes.splice(12..12, [0x81, 0, 0, 7]);
        offload = offload.shift(4).unwrap();
    }
    (offload, bytes)
}

#[test]
fn what_the_interface_cannot_take_is_dropped() {
    on_a_wire(1500, |a, b| {
        a.send(&[plain(1515), tcp(false, 60_000, Some(1461))]);
        assert_eq!(a.stats.drops(DropReason::MtuEgress), 2);
        // The headers belie what was promised of them: another guest's offset into the data.
        let mut lying = tcp(false, 1000, None);
        lying.0.csum = Csum::Partial { start: 34, offset: 2000 };
        assert!(Offload::from_virtio(&lying.0.to_virtio(0), &lying.1, lying.1.len()).is_err());
        // More segments than a ring has places for.
        a.send(&[tcp(false, 60_000, Some(8))]);
        assert_eq!(a.stats.drops(DropReason::CannotConvert), 1);
        assert!(b.receive(1).is_empty());
        deliver(a, b, &[plain(1514)]);
    });
}

#[test]
fn a_receiver_that_does_not_look_loses_frames_and_nothing_else() {
    on_a_wire(1500, |a, b| {
        let frames: Vec<_> = (0..BURST).map(|_| plain(100)).collect();
        for _ in 0..300 {
            a.send(&frames);
        }
        let sent = a.stats.tx(0).read().0;
        assert_eq!(sent + a.stats.drops(DropReason::Full), 300 * BURST as u64);
        let arrived = b.receive(usize::MAX).len();
        assert!(arrived > 0 && arrived as u64 <= sent, "{arrived} of {sent}");
        deliver(a, b, &frames);
    });
}

#[test]
fn a_link_that_is_down_fills_the_ring_and_nothing_else() {
    on_a_wire(1500, |a, b| {
        ip("link set end-a down");
        let frames: Vec<_> = (0..BURST).map(|_| plain(100)).collect();
        for _ in 0..100 {
            a.send(&frames);
        }
        let [rx, tx] = a.audit();
        assert!(rx.is_balanced() && tx.is_balanced());
        assert_eq!(a.stats.tx(0).read().0 + a.stats.drops(DropReason::Full), 100 * BURST as u64);
        assert!(a.stats.drops(DropReason::Full) > 0, "{tx:?}");
        ip("link set end-a up");
        // What waited goes with the next burst.
        a.send(&frames);
        b.receive(usize::MAX);
        deliver(a, b, &frames);
    });
}

#[test]
fn an_interface_that_vanishes_takes_no_frames_with_it() {
    on_a_wire(1500, |a, b| {
        let frames: Vec<_> = (0..BURST).map(|_| plain(100)).collect();
        deliver(a, b, &frames);
        a.send(&frames);
        ip("link del end-a");
        for _ in 0..100 {
            a.send(&frames);
        }
        for end in [&a, &b] {
            assert!(end.audit().iter().all(umem::Audit::is_balanced), "{:?}", end.audit());
        }
        // What is left in the rings of sockets without an interface is of no interest to `check_books`.
        ip("link add name end-a type veth peer name end-b");
        ip("link set end-a up");
        ip("link set end-b up");
        (*a, *b) = (End::open("end-a"), End::open("end-b"));
        deliver(a, b, &frames);
    });
}

/// Whether a descriptor becomes readable within some time.
fn is_readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&within)).unwrap() == 1
}

#[test]
fn the_bell_rings_for_who_listens() {
    on_a_wire(1500, |a, b| {
        let link = b.queues.link();
        let queue = &link.rx[0].queue;
        let bell = queue.event_fd().unwrap();
        let (now, soon) = (Duration::ZERO, Duration::from_secs(5));
        a.send(&[plain(100)]);
        assert_eq!(a.audit()[1].outbound, 0, "the kernel has delivered it");
        assert!(!is_readable(bell, now), "nobody listens");
        assert!(!queue.arm());
        assert!(is_readable(bell, soon), "what is there already");
        queue.disarm();
        assert!(!is_readable(bell, now), "though the frame is still there");
        assert_eq!(b.receive(1).len(), 1);
        queue.arm();
        assert!(!is_readable(bell, now));
        deliver(a, b, &[plain(100)]);
        a.send(&[plain(100)]);
        assert!(is_readable(bell, soon), "a frame that comes while somebody listens");
        queue.disarm();
        // Twice does no harm.
        queue.disarm();
        assert_eq!(b.receive(1).len(), 1);
    });
}

#[test]
fn a_driver_waits_to_be_polled_while_it_is_ours() {
    on_a_wire(1500, |a, b| {
        let index = Device::new("end-b").unwrap().state().unwrap().unwrap().index;
        let before = match napi::settings(index) {
            Ok(settings) if !settings.is_empty() => settings,
            other => return eprintln!("this kernel does not tell: {other:?}"),
        };
        let deferral = Deferral::new(index).unwrap();
        let during = napi::settings(index).unwrap();
        assert!(during.len() == before.len() && during != before);
        assert!(during.iter().all(|setting| setting.rounds == 2 && setting.timeout == 50_000), "{during:?}");
        let frames: Vec<_> = (0..BURST).map(|_| plain(100)).collect();
        deliver(a, b, &frames);
        drop(deferral);
        assert_eq!(napi::settings(index).unwrap(), before);
        deliver(a, b, &frames);
        // Processes that end without putting it back: the next one does.
        let left = || std::mem::forget(Deferral::new(index).unwrap());
        left();
        drop(Deferral::new(index).unwrap());
        assert_eq!(napi::settings(index).unwrap(), before);
        left();
        Deferral::end_left(index).unwrap();
        assert_eq!(napi::settings(index).unwrap(), before);
    });
}

/// Not a test: frames per second of 64 bytes over the wire, one way.
#[test]
#[ignore = "a measurement"]
fn rate() {
    on_a_wire(1500, |a, b| {
        let frames: Vec<_> = (0..BURST).map(|_| plain(64)).collect();
        let (began, time, mut received) = (Instant::now(), Duration::from_secs(3), 0);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                while began.elapsed() < time {
                    a.send(&frames);
                }
            });
            let link = b.queues.link();
            while !sender.is_finished() {
                received += link.rx[0].queue.poll(&mut b.storage, &mut |_| {}).unwrap();
            }
        });
        let per_second = |count: u64| count as f64 / time.as_secs_f64() / 1e6;
        let (sent, full) = (a.stats.tx(0).read().0, a.stats.drops(DropReason::Full));
        eprintln!("sent {:.2} Mpps, received {:.2}", per_second(sent), per_second(received as u64));
        eprintln!("no room for {:.2} Mpps", per_second(full));
        b.receive(usize::MAX);
    });
}
