//! Frontends that do everything wrong. Whatever they send, the port says why it hung up, and serves the next one.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use e2e::hostile::message::*;
use sluice::config::SocketMode::Client;
use sluice::status::PortState;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

use crate::support::*;

const MIB: u64 = 1 << 20;

/// What a well-behaved frontend sends from its first message to running rings.
fn handshake(guest: &Guest, event: &EventFd) -> Vec<Message> {
    let memory = guest.file.as_raw_fd();
    let event = event.as_raw_fd();
    let mut messages = vec![
        Message::new(GET_FEATURES, vec![]),
        Message::new(GET_PROTOCOL_FEATURES, vec![]),
        Message::number(SET_PROTOCOL_FEATURES, expected_protocol().bits()),
        Message::new(SET_OWNER, vec![]),
        Message::new(GET_MAX_MEM_SLOTS, vec![]),
        Message::number(SET_VRING_CALL, 0).with(&[event]),
        Message::ring(SET_VRING_ENABLE, 0, 1),
        Message::ring(SET_VRING_ENABLE, 1, 1),
        Message::number(SET_FEATURES, DRIVER),
        Message::new(GET_STATUS, vec![]),
        Message::number(SET_STATUS, 0xb),
        memory_table(&[[0, MIB, UVA, 0]]).with(&[memory]),
    ];
    for ring in [0, 1] {
        let place = ring_place(ring as usize);
        let (desc, used, avail) = (place.desc_table_addr, place.used_ring_addr, place.avail_ring_addr);
        let mut address = words(&[ring, 0]);
        address.extend(numbers(&[desc, used, avail, 0]));
        messages.extend([
            Message::ring(SET_VRING_NUM, ring, u32::from(RING_SIZE)),
            Message::ring(SET_VRING_BASE, ring, 0),
            Message::new(SET_VRING_ADDR, address),
            Message::number(SET_VRING_KICK, u64::from(ring)).with(&[event]),
            Message::number(SET_VRING_CALL, u64::from(ring)).with(&[event]),
        ]);
    }
    messages
}

#[test]
fn hang_up_after_every_message_and_within_each() {
    let _shared = shared();
    let bench = Bench::new("hangup", Client);
    let qemu = bench.listen();
    let guest = Guest::new(MIB);
    let event = EventFd::new(0).unwrap();
    let messages = handshake(&guest, &event);
    for count in 0..=messages.len() {
        let peer = qemu.accept();
        messages[..count].iter().for_each(|message| peer.channel.send(message));
    }
    for (place, message) in messages.iter().enumerate() {
        let bytes = message.bytes();
        let peer = qemu.accept();
        messages[..place].iter().for_each(|message| peer.channel.send(message));
        peer.bytes(&bytes[..bytes.len() - 3], &message.fds);
    }
    let peer = qemu.accept();
    messages.iter().for_each(|message| peer.channel.send(message));
    bench.recorder.wait("rings at last", |link| (link.state, link.rx, link.tx) == (PortState::Up, 1, 1));
}

/// Sends one message to a port that is up, and expects it to be refused for the reason given.
fn refused(bench: &Bench, qemu: &Qemu, guest: &Guest, message: &Message, reason: &str) {
    let mark = bench.recorder.mark();
    let mut peer = qemu.accept();
    peer.bring_up(guest);
    peer.channel.send(message);
    let failed = bench.recorder.wait_since(mark, reason, |link| link.state == PortState::Failed);
    assert!(failed.reason.contains(reason), "request {}: {:?} instead of {reason:?}", message.request, failed.reason);
    assert_eq!((failed.rx, failed.tx, failed.memory), (0, 0, 0));
    peer.wait_closed();
}

fn all_refused(name: &str, guest: &Guest, cases: &[(Message, &str)]) {
    let bench = Bench::new(name, Client);
    let qemu = bench.listen();
    for (message, reason) in cases {
        refused(&bench, &qemu, guest, message, reason);
    }
    let mut peer = qemu.accept();
    peer.bring_up(guest);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
}

/// Who takes over waits for the end of a message, but not for long.
#[test]
fn a_message_comes_in_one_piece_or_soon() {
    let _shared = shared();
    let bench = Bench::new("pieces", Client);
    let qemu = bench.listen();
    let guest = Guest::new(MIB);
    let mut peer = qemu.accept();
    peer.bring_up(&guest);
    let mark = bench.recorder.mark();
    let bytes = Message::ring(SET_VRING_ENABLE, 0, 1).bytes();
    let (header, payload) = bytes.split_at(12);
    peer.bytes(header, &[]);
    let sent = payload.iter().take_while(|byte| {
        std::thread::sleep(Duration::from_millis(700));
        peer.bytes(&[**byte], &[])
    });
    let sent = sent.count();
    let failed = bench.recorder.wait_since(mark, "a refusal", |link| link.state == PortState::Failed);
    assert!(failed.reason.contains("cannot read the whole message"), "{}", failed.reason);
    assert!(sent < payload.len() / 2, "{sent} of its pieces were waited for");
}

#[test]
fn more_memory_than_any_guest_has() {
    let _shared = shared();
    let guest = Guest::new(MIB);
    let sparse = memfd(6 << 40);
    let regions: Vec<_> = (0..3).map(|place: u64| [place << 44, 6 << 40, UVA + (place << 44), 0]).collect();
    let fds = [sparse.as_raw_fd(); 3];
    all_refused("large", &guest, &[(memory_table(&regions).with(&fds), "more than 16 TiB of guest memory")]);
}

#[test]
fn rings_that_are_none() {
    let _shared = shared();
    let guest = Guest::new(MIB);
    let mut cases = Vec::new();
    for index in [512, 0x1_0000, u32::MAX] {
        let mut address = words(&[index, 0]);
        address.extend(numbers(&[UVA, UVA + 0x2000, UVA + 0x1000, 0]));
        cases.extend([
            (Message::ring(SET_VRING_NUM, index, 64), "is beyond the 512 rings"),
            (Message::new(SET_VRING_ADDR, address), "is beyond the 512 rings"),
            (Message::ring(SET_VRING_BASE, index, 0), "is beyond the 512 rings"),
            (Message::ring(GET_VRING_BASE, index, 0), "is beyond the 512 rings"),
            (Message::ring(SET_VRING_ENABLE, index, 1), "is beyond the 512 rings"),
        ]);
    }
    for size in [0, 3, 32_769, 65_535, 65_536, u32::MAX] {
        cases.push((Message::ring(SET_VRING_NUM, 0, size), "is not a power of two"));
    }
    cases.push((Message::ring(SET_VRING_BASE, 0, 0x1_0000), "does not fit a split ring"));
    cases.push((Message::ring(SET_VRING_ENABLE, 0, 2), "can be enabled or disabled, not 2"));
    all_refused("norings", &guest, &cases);
}

#[test]
fn descriptors_of_the_wrong_kind() {
    let _shared = shared();
    let guest = Guest::new(MIB);
    let event = EventFd::new(0).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let directory = std::fs::File::open("/").unwrap();
    let (memory, event, null, directory) =
        (guest.file.as_raw_fd(), event.as_raw_fd(), null.as_raw_fd(), directory.as_raw_fd());
    let table = memory_table(&[[0, MIB, UVA, 0]]);
    let mut cases = Vec::new();
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for fd in [memory, null] {
            cases.push((Message::number(request, 0).with(&[fd]), "is not an eventfd"));
        }
        cases.push((Message::number(request, 0), "descriptors are not those"));
        cases.push((Message::number(request, 0x100).with(&[event]), "descriptors are not those"));
        cases.push((Message::number(request, 0).with(&[event, event]), "descriptors are not those"));
    }
    for (fd, reason) in [(event, "not a memory file"), (null, "is a device"), (directory, "is a directory")] {
        cases.push((table.clone().with(&[fd]), reason));
    }
    cases.push((table.clone(), "descriptors are not those"));
    cases.push((table.with(&[memory, memory]), "descriptors are not those"));
    cases.push((Message::number(SET_FEATURES, DRIVER).with(&[memory]), "descriptors are not those"));
    all_refused("wrongfd", &guest, &cases);
}

/// Closing one may wait for as long as its sender likes.
#[test]
fn sockets_whose_close_waits() {
    let _shared = shared();
    let mut bench = Bench::new("linger", Client);
    let qemu = bench.listen();
    let kick = |socket: &dyn AsRawFd| Message::number(SET_VRING_KICK, 0).with(&[socket.as_raw_fd()]);

    // As a descriptor of a message.
    let mark = bench.recorder.mark();
    let (socket, _end) = lingering();
    qemu.accept().channel.send(&kick(&socket));
    drop(socket);
    bench.recorder.wait_since(mark, "a refusal", |link| link.reason.contains("is a socket"));

    // Behind a message that is refused itself.
    let mark = bench.recorder.mark();
    let (socket, _other_end) = lingering();
    let peer = qemu.accept();
    peer.channel.send(&Message::new(99, vec![]));
    peer.channel.send(&kick(&socket));
    drop(socket);
    bench.recorder.wait_since(mark, "a refusal", |link| link.state == PortState::Failed);
    let mut peer = qemu.accept();
    peer.negotiate();
    bench.stop();
}

/// In another socket it is not seen. It does not hold up who takes over or ends the port.
#[test]
fn hidden_sockets_whose_close_waits() {
    let _shared = shared();
    let mut bench = Bench::new("hidden", Client);
    let qemu = bench.listen();
    let wedge = || wedge(&qemu, std::process::id(), "sl-hidden");
    let _wedged = wedge();
    let paused = bench.port.as_ref().unwrap().pause();
    assert!(paused.parcel(Instant::now() + Duration::from_secs(2)).unwrap().is_some());
    drop(paused);
    let _wedged_again = wedge();
    let began = Instant::now();
    bench.stop();
    // A thread that waits for nothing ends at once, and this one is left alone for that long.
    assert!(began.elapsed() >= Duration::from_millis(100), "{:?}", began.elapsed());
}

#[test]
fn memory_that_is_none() {
    let _shared = shared();
    let guest = Guest::new(MIB);
    let memory = guest.file.as_raw_fd();
    let huge = memfd(1 << 46);
    let mut cases = Vec::new();
    let two = |a: [u64; 4], b: [u64; 4]| memory_table(&[a, b]).with(&[memory, memory]);
    cases.push((two([0, 0x2000, UVA, 0], [0x1000, 0x1000, 2 * UVA, 0]), "overlap"));
    cases.push((two([0, 0x2000, UVA, 0], [0x9000, 0x1000, UVA + 0x1fff, 0]), "overlap"));
    for region in [[u64::MAX, 2, UVA, 0], [0, 2, u64::MAX, 0], [0, 0x1000, UVA, u64::MAX], [0, 0, UVA, 0]] {
        cases.push((memory_table(&[region]).with(&[memory]), "fields"));
    }
    for region in [[0, MIB + 1, UVA, 0], [0, MIB, UVA, 1]] {
        cases.push((memory_table(&[region]).with(&[memory]), "beyond the end of its file"));
    }
    cases.push((memory_table(&[[0, 1 << 46, UVA, 0]]).with(&[huge.as_raw_fd()]), "16 TiB"));
    cases.push((memory_table(&[]), "fields"));
    cases.push((Message::ring(SET_MEM_TABLE, 200, 0).with(&[memory]), "fields"));
    cases.push((Message::new(SET_MEM_TABLE, words(&[1])).with(&[memory]), "cut short"));
    cases.push((memory_region(ADD_MEM_REG, [0, 0x1000, UVA + MIB, 0]).with(&[memory]), "overlap"));
    cases.push((memory_region(ADD_MEM_REG, [MIB, 0x1000, UVA + MIB, 0]), "invalid parameters"));
    cases.push((memory_region(ADD_MEM_REG, [MIB, 2 * MIB, UVA + MIB, 0]).with(&[memory]), "beyond the end"));
    cases.push((memory_region(REM_MEM_REG, [0, 0x1000, UVA, 0]), "no memory region at 0x0"));
    all_refused("nomemory", &guest, &cases);
}

#[test]
fn messages_that_are_none() {
    let _shared = shared();
    let guest = Guest::new(MIB);
    let memory = guest.file.as_raw_fd();
    let cases = [
        (Message::new(1, vec![]).with(&[memory; 33]), "more than 32 descriptors"),
        (Message::new(0, vec![]), "request number 0 is unknown"),
        (Message::new(99, vec![]), "request number 99 is unknown"),
        (Message::new(1, vec![]).flags(0), "flags"),
        (Message::new(1, vec![]).flags(0x5), "flags"),
        (Message::new(1, vec![]).flags(0xffff_fff1), "flags"),
        (Message::new(SET_MEM_TABLE, vec![0; 5000]), "more than the 4096"),
        (Message::new(SET_FEATURES, vec![0; 7]), "SET_FEATURES: cut short, or its size"),
        (Message::new(SET_STATUS, vec![0; 4]), "SET_STATUS: 4 bytes instead of 8"),
        (Message::new(GET_STATUS, vec![0; 8]), "GET_STATUS: 8 bytes instead of 0"),
        (Message::new(NET_SET_MTU, vec![0; 16]), "16 bytes instead of 8"),
        (Message::number(SET_STATUS, 256), "more than eight bits"),
        (Message::number(NET_SET_MTU, 67), "an MTU of 67"),
        (Message::number(NET_SET_MTU, 65_536), "an MTU of 65536"),
        (Message::ring(SET_VRING_ENDIAN, 0, 1), "not supported"),
        (Message::number(SET_FEATURES, DRIVER | 1 << 33), "virtio features 0x200000000 were never offered"),
        (Message::number(SET_FEATURES, u64::MAX), "were never offered"),
        (Message::number(SET_PROTOCOL_FEATURES, 1 << 8), "protocol features 0x100 were never offered"),
        (Message::new(SET_LOG_BASE, numbers(&[u64::MAX, 1])).with(&[memory]), "fields"),
        (Message::new(SET_LOG_BASE, numbers(&[u64::MAX - 8, 8])).with(&[memory]), "dirty log"),
        (Message::new(SET_LOG_BASE, numbers(&[8, u64::MAX - 7])).with(&[memory]), "fields"),
        (Message::new(SET_LOG_BASE, numbers(&[0, 0])).with(&[memory]), "fields"),
        (Message::new(SET_LOG_BASE, numbers(&[MIB, 8])).with(&[memory]), "beyond the end"),
        (Message::new(SET_LOG_BASE, numbers(&[64, 3])).with(&[memory]), "no multiple of 8"),
        (Message::new(SET_LOG_BASE, numbers(&[64, 0])), "SET_LOG_BASE"),
        (Message::new(GET_INFLIGHT_FD, vec![0; 24]), "INFLIGHT_SHMFD"),
        (Message::new(SET_INFLIGHT_FD, vec![0; 24]).with(&[memory]), "INFLIGHT_SHMFD"),
        (Message::new(GET_CONFIG, vec![0; 12]), "CONFIG"),
        (Message::new(CREATE_CRYPTO_SESSION, vec![0; 8]), "CREATE_CRYPTO_SESSION"),
    ];
    all_refused("nomessage", &guest, &cases);
}

#[test]
fn refusals_are_acknowledged_when_asked() {
    let _shared = shared();
    let bench = Bench::new("nack", Client);
    let qemu = bench.listen();
    let guest = Guest::new(MIB);
    for message in
        [Message::number(NET_SET_MTU, 1), Message::ring(SET_VRING_ENABLE, 9999, 1), Message::number(SET_STATUS, 999)]
    {
        let mut peer = qemu.accept();
        peer.bring_up(&guest);
        assert_eq!(peer.channel.ask_number(&message.flags(NEED_REPLY)).unwrap(), 1);
        peer.wait_closed();
    }
    let mut peer = qemu.accept();
    peer.bring_up(&guest);
    assert!(peer.frontend.set_vring_num(0, 3).is_err());
    peer.wait_closed();
}

#[test]
fn garbage_and_silence() {
    let _shared = shared();
    let bench = Bench::new("garbage", Client);
    let qemu = bench.listen();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for round in 0..100 {
        let peer = qemu.accept();
        let mut bytes = Vec::new();
        for _ in 0..40 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_ne_bytes());
        }
        // Every other round begins with a valid header, so that the payload is what is wrong.
        if round % 2 == 1 {
            let size = (state % 64) as u32;
            bytes.splice(..12, words(&[1 + round % 44, 0x1, size]));
        }
        peer.bytes(&bytes, &[]);
    }
    // Half a header, and then nothing.
    let mark = bench.recorder.mark();
    let mut peer = qemu.accept();
    assert!(peer.bytes(&[1, 0, 0, 0, 1], &[]));
    bench.recorder.wait_since(mark, "impatience", |link| link.reason.contains("half a header"));
    peer.wait_closed();
    let mark = bench.recorder.mark();
    let mut peer = qemu.accept();
    assert!(peer.bytes(&words(&[SET_FEATURES, 1, 8]), &[]));
    bench.recorder.wait_since(mark, "impatience", |link| link.reason.contains("half a message"));
    peer.wait_closed();
    let guest = Guest::new(MIB);
    let mut peer = qemu.accept();
    peer.bring_up(&guest);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
}

/// A frontend that asks and never listens is told so. Its queue of answers is full after a while.
#[test]
fn answers_that_are_not_read() {
    let _shared = shared();
    let bench = Bench::new("unread", Client);
    let qemu = bench.listen();
    let mark = bench.recorder.mark();
    let peer = qemu.accept();
    peer.channel.set_patience(std::time::Duration::from_millis(100)).unwrap();
    let question = Message::new(GET_FEATURES, vec![]).bytes();
    while peer.bytes(&question, &[]) {}
    bench.recorder.wait_since(mark, "impatience", |link| link.reason.contains("does not read our replies"));
}

/// The reason of a failure stays visible while the port is connected again, until it works.
#[test]
fn the_reason_outlives_the_reconnect() {
    let _shared = shared();
    let bench = Bench::new("reason", Client);
    let qemu = bench.listen();
    let guest = Guest::new(MIB);
    qemu.accept().channel.send(&Message::number(SET_FEATURES, 1 << 33));
    let mut peer = qemu.accept();
    bench.recorder.wait("the reason", |link| {
        link.state == PortState::Down && link.reason.contains("before that: SET_FEATURES: virtio features")
    });
    peer.bring_up(&guest);
    peer.frontend.get_vring_base(0).unwrap();
    peer.frontend.get_vring_base(1).unwrap();
    assert!(!bench.recorder.newest().reason.contains("before that"));
}

#[test]
fn a_planted_link_is_not_followed() {
    let _shared = shared();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("other.sock");
    let listener = UnixListener::bind(&target).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut bench = Bench::new("planted", Client);
    bench.stop();
    bench.path = directory.path().join("vm.sock");
    std::os::unix::fs::symlink(&target, &bench.path).unwrap();
    bench.start("planted", Client, None);
    bench.recorder.wait("a refusal", |link| link.reason.contains("is a symbolic link, not a socket"));
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    std::fs::remove_file(&bench.path).unwrap();
    let mut peer = bench.listen().accept();
    peer.negotiate();

    // A link on the way there is how KubeVirt's directories are joined.
    bench.stop();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(directory.path(), &link).unwrap();
    let _ = std::fs::remove_file(&bench.path);
    let qemu = bench.listen();
    bench.path = link.join("vm.sock");
    bench.start("planted", Client, None);
    qemu.accept().negotiate();
}

/// Connecting and dropping as fast as possible does not make the port run faster.
#[test]
fn a_flapping_frontend_is_paced() {
    let _shared = shared();
    let bench = Bench::new("flap", Client);
    let qemu = bench.listen();
    drop(qemu.accept());
    let begin = std::time::Instant::now();
    for _ in 0..10 {
        drop(qemu.accept());
    }
    assert!(begin.elapsed() >= std::time::Duration::from_millis(450), "{:?}", begin.elapsed());
}
