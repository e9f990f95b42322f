//! Sessions of a vhost-user port with a real frontend over real sockets: the well-behaved ones here, the others in
//! `hostile`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod hostile;
mod lost;
mod support;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use std::{fs, thread};

use e2e::hostile::channel::Channel;
use e2e::hostile::message::{GET_FEATURES, Message};
use sluice::config::SocketMode::{Client, Server};
use sluice::port::Publisher;
use sluice::status::PortState;
use sluice::virtq::Fault;
use support::*;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;

#[test]
fn negotiates_and_comes_up() {
    let _shared = shared();
    let bench = Bench::new("up", Client);
    let mut peer = bench.listen().accept();
    bench.recorder.wait("a connected port", |link| link.state == PortState::Down);
    assert_eq!(bench.recorder.connects(), 1);

    peer.negotiate();
    assert_eq!(peer.frontend.get_protocol_features().unwrap(), expected_protocol());
    assert_eq!(peer.frontend.get_max_mem_slots().unwrap(), 509);
    let guest = Guest::new(MIB);
    peer.frontend.set_mem_table(&[guest.region()]).unwrap();
    assert_eq!(bench.recorder.newest().memory, MIB);
    peer.frontend.set_vring_enable(0, true).unwrap();
    peer.frontend.set_vring_enable(1, true).unwrap();
    assert_eq!(bench.recorder.newest().state, PortState::Down, "not before the rings are started");
    peer.start_ring(0);
    let half = bench.recorder.newest();
    assert_eq!((half.state, half.rx, half.tx), (PortState::Up, 0, 1));
    peer.start_ring(1);
    let up = bench.recorder.newest();
    assert_eq!((up.state, up.rx, up.tx, up.reason.as_str()), (PortState::Up, 1, 1, ""));
    assert!(up.features.contains(&"MRG_RXBUF") && up.features.contains(&"VERSION_1"));

    assert_eq!(peer.frontend.get_queue_num().unwrap(), 256);
    let forgotten = bench.recorder.forgotten.load(Ordering::SeqCst);
    drop(peer);
    bench.recorder.wait("a hang-up", |link| link.state == PortState::Connecting && link.rx == 0 && link.memory == 0);
    assert_eq!(bench.recorder.forgotten.load(Ordering::SeqCst), forgotten + 1);
}

/// QEMU enables rings before it sets any feature.
#[test]
fn enabling_comes_before_features() {
    let _shared = shared();
    let bench = Bench::new("early", Client);
    let mut peer = bench.listen().accept();
    for index in [0u32, 1] {
        let state: Vec<u8> = [index, 1].into_iter().flat_map(u32::to_ne_bytes).collect();
        peer.raw(18, 0x1, &state, &[]);
    }
    peer.negotiate();
    let guest = Guest::new(MIB);
    peer.frontend.set_mem_table(&[guest.region()]).unwrap();
    peer.start_ring(0);
    peer.start_ring(1);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
}

#[test]
fn without_protocol_features_rings_begin_enabled() {
    let _shared = shared();
    let bench = Bench::new("legacy", Client);
    let peer = bench.listen().accept();
    let features = peer.frontend.get_features().unwrap();
    peer.frontend.set_owner().unwrap();
    peer.frontend.set_features(features & (1 << 32 | 1 << 15)).unwrap();
    let guest = Guest::new(MIB);
    peer.frontend.set_mem_table(&[guest.region()]).unwrap();
    peer.start_ring(0);
    peer.start_ring(1);
    bench.recorder.wait("rings", |link| link.state == PortState::Up && link.rx == 1 && link.tx == 1);
}

#[test]
fn disabling_and_stopping_take_rings_away() {
    let _shared = shared();
    let bench = Bench::new("stops", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(MIB);
    peer.bring_up(&guest);
    peer.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!((bench.recorder.newest().rx, bench.recorder.newest().tx), (1, 0));
    peer.frontend.set_vring_enable(1, false).unwrap();
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().rx), (PortState::Down, 0));
    peer.frontend.set_vring_enable(0, true).unwrap();
    peer.frontend.set_vring_enable(1, true).unwrap();
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().rx), (PortState::Up, 1));

    bench.recorder.stats().set_fault(Fault::ChainLoop);
    assert_eq!(peer.frontend.get_vring_base(0).unwrap(), 0);
    assert_eq!(bench.recorder.stats().fault(), None);
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().tx), (PortState::Up, 0));
    assert_eq!(peer.frontend.get_vring_base(1).unwrap(), 0);
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().rx), (PortState::Down, 0));

    // The addresses are gone with the old driver: a kick alone starts nothing.
    peer.frontend.set_vring_kick(0, &EventFd::new(0).unwrap()).unwrap();
    let kicked = bench.recorder.newest();
    assert_eq!(kicked.state, PortState::Down);
    assert!(kicked.reason.contains("ring 0: started without addresses"), "{}", kicked.reason);
    peer.start_ring(0);
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().reason.as_str()), (PortState::Up, ""));
}

#[test]
fn a_stopped_ring_keeps_its_base() {
    let _shared = shared();
    let bench = Bench::new("base", Client);
    let mut peer = bench.listen().accept();
    peer.negotiate();
    peer.frontend.set_vring_base(3, 0xfedc).unwrap();
    assert_eq!(peer.frontend.get_vring_base(3).unwrap(), 0xfedc);
    assert_eq!(peer.frontend.get_vring_base(3).unwrap(), 0xfedc);
    peer.frontend.reset_device().unwrap();
    assert_eq!(peer.frontend.get_vring_base(3).unwrap(), 0);
}

#[test]
fn a_reset_stops_everything_but_keeps_memory() {
    let _shared = shared();
    let bench = Bench::new("reset", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(MIB);
    peer.bring_up(&guest);
    peer.frontend.reset_device().unwrap();
    let reset = bench.recorder.newest();
    assert_eq!((reset.state, reset.rx, reset.tx, reset.memory), (PortState::Down, 0, 0, MIB));
    assert_eq!(reset.features, ["PROTOCOL_FEATURES"]);
    peer.frontend.set_features(DRIVER).unwrap();
    peer.start_pair(0);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
    peer.frontend.reset_owner().unwrap();
    assert_eq!(bench.recorder.newest().state, PortState::Down);
}

#[test]
fn the_requests_that_the_crate_does_not_know() {
    let _shared = shared();
    let bench = Bench::new("own", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(MIB);
    peer.bring_up(&guest);

    peer.raw(40, 0x1, &[], &[]);
    assert_eq!(peer.reply(40), 0);
    peer.raw(39, 0x1, &0x0fu64.to_ne_bytes(), &[]);
    peer.raw(39, 0x9, &0x0fu64.to_ne_bytes(), &[]);
    assert_eq!(peer.reply(39), 0);
    peer.raw(40, 0x9, &[], &[]);
    assert_eq!(peer.reply(40), 0x0f);

    peer.raw(20, 0x1, &9000u64.to_ne_bytes(), &[]);
    peer.raw(20, 0x9, &65535u64.to_ne_bytes(), &[]);
    assert_eq!(peer.reply(20), 0);
    peer.raw(19, 0x9, &0x5634_1200_5452u64.to_ne_bytes(), &[]);
    assert_eq!(peer.reply(19), 0);
    assert_eq!(*bench.recorder.announced.lock().unwrap(), [[0x52, 0x54, 0x00, 0x12, 0x34, 0x56]]);
    peer.frontend.set_log_fd(guest.file.as_raw_fd()).unwrap();

    assert_eq!(bench.recorder.newest().state, PortState::Up);
    bench.recorder.stats().set_fault(Fault::AvailIndex);
    peer.raw(39, 0x9, &0u64.to_ne_bytes(), &[]);
    assert_eq!(peer.reply(39), 0);
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().memory), (PortState::Down, MIB));
    assert_eq!(bench.recorder.stats().fault(), None);
    peer.frontend.set_features(DRIVER).unwrap();
    peer.start_pair(0);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
}

#[test]
fn memory_changes_under_running_rings() {
    let _shared = shared();
    let bench = Bench::new("memory", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(4 * MIB);
    peer.negotiate();
    peer.frontend.set_mem_table(&[guest.region_at(0, MIB)]).unwrap();
    peer.start_pair(0);

    let mark = bench.recorder.mark();
    peer.frontend.add_mem_region(&guest.region_at(2 * MIB, MIB)).unwrap();
    let steps = bench.recorder.since(mark);
    assert!(steps.iter().all(|link| link.state == PortState::Up), "stations would be forgotten: {steps:#?}");
    assert_eq!((steps[0].rx, steps[0].tx), (0, 0), "withdrawn before memory changes");
    let last = steps.last().unwrap();
    assert_eq!((last.rx, last.tx, last.memory), (1, 1, 2 * MIB));

    // Unsorted, like the guest's low memory after its high memory.
    peer.frontend
        .set_mem_table(&[guest.region_at(3 * MIB, MIB), guest.region_at(0, MIB), guest.region_at(2 * MIB, MIB)])
        .unwrap();
    assert_eq!((bench.recorder.newest().rx, bench.recorder.newest().memory), (1, 3 * MIB));
    peer.frontend.remove_mem_region(&guest.region_at(3 * MIB, MIB)).unwrap();
    assert_eq!((bench.recorder.newest().rx, bench.recorder.newest().memory), (1, 2 * MIB));
}

#[test]
fn a_ring_outside_of_memory_stops_until_memory_is_back() {
    let _shared = shared();
    let bench = Bench::new("outside", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(2 * MIB);
    peer.negotiate();
    peer.frontend.set_mem_table(&[guest.region_at(0, MIB), guest.region_at(MIB, MIB)]).unwrap();
    peer.start_pair(0);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
    peer.frontend.remove_mem_region(&guest.region_at(0, MIB)).unwrap();
    let gone = bench.recorder.newest();
    assert_eq!((gone.state, gone.rx, gone.tx, gone.memory), (PortState::Down, 0, 0, MIB));
    assert!(gone.reason.starts_with("ring 0: the ") && gone.reason.contains("outside"), "{}", gone.reason);
    peer.frontend.add_mem_region(&guest.region_at(0, MIB)).unwrap();
    let back = bench.recorder.newest();
    assert_eq!((back.state, back.rx, back.tx, back.reason.as_str()), (PortState::Up, 1, 1, ""));
    // Kicked before its memory is there.
    peer.frontend.remove_mem_region(&guest.region_at(0, MIB)).unwrap();
    peer.start_pair(1);
    assert_eq!(bench.recorder.newest().state, PortState::Down);
    peer.frontend.add_mem_region(&guest.region_at(0, MIB)).unwrap();
    assert_eq!((bench.recorder.newest().rx, bench.recorder.newest().tx), (2, 2));
}

#[test]
fn a_running_ring_resumes_exactly_where_it_was() {
    let _shared = shared();
    let bench = Bench::new("resume", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(MIB);
    peer.bring_up(&guest);
    for (index, base) in [(0, 41u16), (1, 0xffff)] {
        peer.frontend.get_vring_base(index).unwrap();
        // A driver and a device that have both come as far as `base`.
        let place = ring_place(index);
        for area in [place.avail_ring_addr, place.used_ring_addr] {
            guest.file.write_all_at(&base.to_le_bytes(), area - UVA + 2).unwrap();
        }
        peer.frontend.set_vring_num(index, RING_SIZE).unwrap();
        peer.frontend.set_vring_base(index, base).unwrap();
        peer.frontend.set_vring_addr(index, &place).unwrap();
        peer.frontend.set_vring_kick(index, &EventFd::new(0).unwrap()).unwrap();
        // Neither a change of memory nor one of features moves it.
        peer.frontend.set_mem_table(&[guest.region()]).unwrap();
        peer.frontend.set_features(DRIVER & !(1 << 29)).unwrap();
        peer.frontend.set_features(DRIVER).unwrap();
        assert_eq!(peer.frontend.get_vring_base(index).unwrap(), u32::from(base));
    }
}

/// The first byte of a dirty log, which is cleared: the pages of both used rings are 2 and 6.
fn marks(log: &fs::File) -> u8 {
    let mut byte = [0];
    log.read_exact_at(&mut byte, 0).unwrap();
    log.write_all_at(&[0], 0).unwrap();
    byte[0]
}

/// Whether this process, in which the port is, maps the file.
fn is_mapped(file: &fs::File) -> bool {
    let inode = format!(" {} ", file.metadata().unwrap().ino());
    fs::read_to_string("/proc/self/maps").unwrap().contains(&inode)
}

#[test]
fn logging_begins_changes_and_ends_under_running_rings() {
    const USED: u8 = 1 << 2 | 1 << 6;
    let _shared = shared();
    let bench = Bench::new("log", Client);
    let mut peer = bench.listen().accept();
    let guest = Guest::new(MIB);
    peer.bring_up(&guest);
    for (index, base) in [(0, 7u16), (1, 9)] {
        guest.file.write_all_at(&base.to_le_bytes(), ring_place(index).used_ring_addr - UVA + 2).unwrap();
        peer.frontend.set_vring_base(index, base).unwrap();
    }
    let address = |index: usize, logged: bool| {
        let mut place = ring_place(index);
        place.flags = u32::from(logged);
        place.log_addr = logged.then_some(place.used_ring_addr - UVA);
        place
    };
    let (first, second) = (memfd(4096), memfd(4096));
    for _ in 0..3 {
        peer.set_log(&first, 32);
        assert_eq!(marks(&first), 0, "not before it is asked for");
        peer.frontend.set_features(DRIVER | LOG_ALL).unwrap();
        assert!(bench.recorder.newest().features.contains(&"LOG_ALL"));
        for index in [0, 1] {
            peer.frontend.set_vring_addr(index, &address(index, true)).unwrap();
        }
        // To begin with a ring, we tell the driver that we poll: a write to the used ring.
        assert_eq!(marks(&first), USED);
        peer.set_log(&second, 32);
        assert_eq!((marks(&first), marks(&second)), (0, USED));
        peer.frontend.set_features(DRIVER).unwrap();
        for index in [0, 1] {
            peer.frontend.set_vring_addr(index, &address(index, false)).unwrap();
        }
        let link = bench.recorder.newest();
        assert_eq!((link.state, link.rx, link.tx), (PortState::Up, 1, 1));
        assert_eq!((marks(&first), marks(&second)), (0, 0));
        assert!([&first, &second].iter().all(|log| !is_mapped(log)), "a log is kept that nobody wants");
    }
    assert_eq!((peer.frontend.get_vring_base(0).unwrap(), peer.frontend.get_vring_base(1).unwrap()), (7, 9));

    // A log that is too short for the memory would hide changes.
    let mark = bench.recorder.mark();
    peer.frontend.set_features(DRIVER | LOG_ALL).unwrap();
    peer.raw(6, 0x1, &[31u64.to_ne_bytes(), [0; 8]].concat(), &[first.as_raw_fd()]);
    let failed = bench.recorder.wait_since(mark, "a refusal", |link| link.state == PortState::Failed);
    assert!(failed.reason.contains("a dirty log of 31 bytes does not fit"), "{}", failed.reason);
}

#[test]
fn what_comes_while_a_migration_fails_in_the_end_is_kept() {
    let _shared = shared();
    let bench = Bench::new("failed", Client);
    let mut peer = bench.listen().accept();
    peer.bring_up(&Guest::new(MIB));
    assert!(!bench.recorder.newest().holds);
    peer.set_log(&memfd(4096), 32);
    peer.frontend.set_features(DRIVER | LOG_ALL).unwrap();
    let stopped = [0, 1].map(|index| peer.frontend.get_vring_base(index).unwrap());
    assert!(bench.recorder.newest().holds);
    // The guest goes on where it was.
    let mark = bench.recorder.mark();
    peer.frontend.set_features(DRIVER).unwrap();
    assert_eq!(stopped, [0, 0]);
    peer.start_pair(0);
    let seen = bench.recorder.since(mark);
    let returned = seen.iter().position(|link| link.tx == 1).unwrap();
    assert!(seen[..=returned].iter().all(|link| link.holds), "{seen:#?}");
    let newest = bench.recorder.newest();
    assert_eq!((newest.state, newest.tx, newest.holds), (PortState::Up, 1, false));
}

#[test]
fn takes_509_memory_regions() {
    let _shared = shared();
    let bench = Bench::new("slots", Client);
    let mut peer = bench.listen().accept();
    peer.negotiate();
    let guest = Guest::new(510 * 4096);
    for slot in 0..509 {
        peer.frontend.add_mem_region(&guest.region_at(slot * 4096, 4096)).unwrap();
    }
    assert_eq!(bench.recorder.newest().memory, 509 * 4096);
    let mark = bench.recorder.mark();
    assert!(peer.frontend.add_mem_region(&guest.region_at(509 * 4096, 4096)).is_err());
    bench.recorder.wait_since(mark, "a refusal", |link| link.reason.contains("more than 509 memory regions"));
}

#[test]
fn two_hundred_queue_pairs() {
    let _shared = shared();
    let bench = Bench::with_queues("many", Client, Some(150));
    let mut peer = bench.listen().accept();
    let guest = Guest::new(16 * MIB);
    peer.negotiate();
    peer.frontend.set_mem_table(&[guest.region()]).unwrap();
    for pair in 0..200 {
        peer.start_pair(pair);
    }
    let up = bench.recorder.newest();
    assert_eq!((up.rx, up.tx), (200, 150), "all of the guest's queues are served, 150 are spread over");
    assert_eq!(peer.frontend.get_vring_base(399).unwrap(), 0);
    assert_eq!(bench.recorder.newest().rx, 199);
}

#[test]
fn comes_back_whenever_the_socket_does() {
    let _shared = shared();
    let bench = Bench::new("returns", Client);
    bench.recorder.wait("a waiting port", |link| link.reason.contains("no such socket"));
    let mut took = Vec::new();
    for round in 1..=9 {
        // The pause puts each return at another phase of the port's own clock.
        thread::sleep(Duration::from_millis(7 * round));
        let begin = Instant::now();
        let qemu = bench.listen();
        let mut peer = qemu.accept();
        took.push(begin.elapsed());
        peer.negotiate();
        drop(peer);
        drop(qemu);
        bench.recorder.wait("a waiting port", |link| link.reason.contains("no such socket"));
        assert_eq!(bench.recorder.connects(), round);
    }
    took.sort();
    assert!(took[took.len() / 2] < Duration::from_millis(100), "{took:?}");
}

#[test]
fn the_frontend_may_be_there_first() {
    let _shared = shared();
    let directory = tempfile::tempdir().unwrap();
    let qemu = Qemu::listen(&directory.path().join("vm.sock"));
    let mut bench = Bench::new("second", Client);
    bench.stop();
    bench.path = directory.path().join("vm.sock");
    bench.start("second", Client, None);
    for _ in 0..3 {
        let mut peer = qemu.accept();
        peer.bring_up(&Guest::new(MIB));
        bench.recorder.wait("rings", |link| link.state == PortState::Up);
    }
}

#[test]
fn waiting_costs_nothing_and_says_why_once() {
    let _shared = shared();
    let bench = Bench::new("idlewait", Client);
    bench.recorder.wait("a waiting port", |link| link.state == PortState::Connecting);
    let mark = bench.recorder.mark();
    let before = cpu_ticks("sl-idlewait");
    thread::sleep(Duration::from_millis(600));
    let ticks = cpu_ticks("sl-idlewait") - before;
    assert!(ticks <= 3, "waiting took {ticks} of 60 ticks");
    assert_eq!(bench.recorder.mark(), mark, "nothing changed, nothing is published");
    drop(UnixListener::bind(&bench.path).unwrap());
    bench.recorder.wait("the new reason", |link| link.reason.contains("nobody listens on it"));
}

/// Hundredths of a second that the thread of that name has used.
fn cpu_ticks(name: &str) -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    let task = tasks
        .into_iter()
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name))
        .expect("the thread is named after its port");
    let stat = fs::read_to_string(task.join("stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn stops_in_every_state() {
    let _shared = shared();
    // Waiting for a socket.
    let mut bench = Bench::new("s1", Client);
    bench.recorder.wait("a waiting port", |link| link.state == PortState::Connecting);
    bench.stop();
    // Waiting for a message.
    bench.start("s2", Client, None);
    let qemu = bench.listen();
    let mut peer = qemu.accept();
    let guest = Guest::new(MIB);
    peer.bring_up(&guest);
    bench.stop();
    // Within a header, and within a message.
    for part in [&[1u8, 0, 0][..], &[5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0], &[39, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]] {
        bench.start("s3", Client, None);
        let peer = qemu.accept();
        peer.settle();
        assert!(peer.bytes(part, &[]));
        thread::sleep(Duration::from_millis(20));
        bench.stop();
    }
    // Writing replies that nobody reads.
    bench.start("s4", Client, None);
    let peer = qemu.accept();
    peer.channel.set_patience(Duration::from_millis(200)).unwrap();
    let ask = Message::new(GET_FEATURES, vec![]).bytes();
    while peer.bytes(&ask, &[]) {}
    bench.stop();
    drop(qemu);
    // Listening, and serving a frontend that connected.
    bench.start("s5", Server, None);
    bench.recorder.wait("a listening port", |link| link.reason.contains("waiting for a frontend"));
    bench.stop();
    assert!(!bench.path.exists());
    bench.start("s6", Server, None);
    bench.recorder.wait("a listening port", |link| link.reason.contains("waiting for a frontend"));
    let mut peer = Peer::over(Channel::new(UnixStream::connect(&bench.path).unwrap()).unwrap());
    peer.negotiate();
    bench.stop();
    assert!(!bench.path.exists());
}

/// It would not if it paused before it looked for its frontend again.
#[test]
fn a_connected_port_stops_at_once() {
    let _shared = shared();
    let mut bench = Bench::new("prompt", Client);
    let qemu = bench.listen();
    let took = |bench: &mut Bench| {
        let mut peer = qemu.accept();
        peer.negotiate();
        let begin = Instant::now();
        bench.stop();
        let took = begin.elapsed();
        bench.start("prompt", Client, None);
        took
    };
    // A machine may be busy for a moment, but not each time.
    let quickest = (0..10).map(|_| took(&mut bench)).min().unwrap();
    assert!(quickest < Duration::from_millis(40), "{quickest:?}");
}

#[test]
fn server_mode_serves_one_after_the_other() {
    let _shared = shared();
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new("server", Server);
    bench.stop();
    // A socket that an earlier process left behind.
    bench.path = directory.path().join("vm.sock");
    drop(UnixListener::bind(&bench.path).unwrap());
    bench.start("server", Server, None);
    bench.recorder.wait("a listening port", |link| link.reason.contains("waiting for a frontend"));
    for _ in 0..3 {
        let mut peer = Peer::over(Channel::new(UnixStream::connect(&bench.path).unwrap()).unwrap());
        peer.bring_up(&Guest::new(MIB));
        assert_eq!(bench.recorder.newest().state, PortState::Up);
        drop(peer);
        bench.recorder.wait("a listening port", |link| link.reason.contains("waiting for a frontend"));
    }
    bench.stop();
    assert!(!bench.path.exists());
}

#[test]
fn server_mode_leaves_other_files_alone() {
    let _shared = shared();
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new("polite", Server);
    bench.stop();
    bench.path = directory.path().join("vm.sock");
    fs::write(&bench.path, "precious").unwrap();
    bench.start("polite", Server, None);
    bench.recorder.wait("a refusal", |link| link.reason.contains("is a file, not a socket"));
    bench.stop();
    assert_eq!(fs::read_to_string(&bench.path).unwrap(), "precious");
    fs::remove_file(&bench.path).unwrap();
    let _other = UnixListener::bind(&bench.path).unwrap();
    bench.start("polite", Server, None);
    bench.recorder.wait("a refusal", |link| link.reason.contains("another process listens"));
}

#[test]
fn no_descriptor_is_lost() {
    let _alone = ALONE.write().unwrap_or_else(PoisonError::into_inner);
    let bench = Bench::new("leaks", Client);
    let qemu = bench.listen();
    let guest = Guest::new(MIB);
    let mut before = 0;
    for round in 0..200 {
        let mut peer = qemu.accept();
        peer.bring_up(&guest);
        if round == 5 {
            before = descriptors();
        } else if round > 5 {
            assert_eq!(descriptors(), before, "round {round}");
        }
    }
    let mut peer = qemu.accept();
    peer.bring_up(&guest);
    assert_eq!(descriptors(), before);
    let event = EventFd::new(0).unwrap();
    for _ in 0..200 {
        peer.frontend.set_vring_num(0, RING_SIZE).unwrap();
        peer.frontend.set_vring_kick(0, &event).unwrap();
        peer.frontend.set_vring_call(0, &event).unwrap();
        peer.frontend.set_vring_err(0, &event).unwrap();
        // A descriptor with a message that has none, and is ours to read.
        peer.raw(20, 0x1, &1500u64.to_ne_bytes(), &[event.as_raw_fd()]);
    }
    peer.settle();
    // Our own event, and the error descriptor of the ring.
    assert_eq!(descriptors(), before + 2);
    peer.frontend.get_vring_base(0).unwrap();
    // Kick, call and error are gone.
    assert_eq!(descriptors(), before - 1);
}
