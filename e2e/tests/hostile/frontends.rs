//! Frontends that behave badly without a single wrong byte, or with only a part of one.

use anyhow::{Context, Result, ensure};
use e2e::hostile::arena::{Arena, EVIL_MAC, Expect, PAIR_MACS, PEER_MAC, Recover};
use e2e::hostile::channel::Channel;
use e2e::hostile::frontend::*;
use e2e::hostile::memory::UVA;
use e2e::hostile::message::*;
use e2e::hostile::queue::{Layout, Places};
use e2e::hostile::{eventfd, memfd};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use Expect::{Refused, Unharmed};

const PLAIN: Setup = Setup::of(Layout::Split);

/// Does something over and over for so long.
fn keep_on(limit: Duration, mut act: impl FnMut() -> Result<()>) -> Result<u64> {
    let (begin, mut count) = (Instant::now(), 0);
    while begin.elapsed() < limit {
        act()?;
        count += 1;
    }
    Ok(count)
}

#[test]
fn silence_and_haste() -> Result<()> {
    let mut arena = Arena::start("")?;
    let half_header = |evil: &mut Frontend| say(evil, &[1, 0, 0, 0, 1]);
    arena.case("half a header", PLAIN, half_header, Refused("half a header"), Recover::Reconnect)?;
    let half = |evil: &mut Frontend| say(evil, &words(&[SET_FEATURES, 1, 8]));
    arena.case("half a message", PLAIN, half, Refused("half a message"), Recover::Reconnect)?;
    arena.case("a frontend that does not read", PLAIN, never_read, Refused("does not read"), Recover::Reconnect)?;
    let flap = |evil: &mut Frontend| -> Result<()> { (0..5).try_for_each(|_| evil.accept().map(drop)) };
    let act = |evil: &mut Frontend| {
        evil.channel = Channel::new(UnixStream::pair()?.0)?;
        flap(evil)
    };
    arena.case("connecting again and again", PLAIN, act, Unharmed, Recover::Reconnect)?;
    // Where a driver stops and another one starts fewer rings, the addresses of the first must be gone.
    let again = |evil: &mut Frontend| {
        evil.stop_queues()?;
        evil.channel.send(&Message::number(SET_VRING_KICK, 1).with(&[evil.tx.kick.as_raw_fd()]));
        evil.settle()
    };
    arena.case("a ring without addresses", PLAIN, again, Refused("started without addresses"), Recover::Reset)?;
    hang_up_anywhere(&mut arena)?;
    descriptors_with_everything(&mut arena)?;
    arena.finish()
}

/// Descriptors along with every request there is (CVE-2019-14818). None may be left in the switch.
fn descriptors_with_everything(arena: &mut Arena) -> Result<()> {
    let (memory, event) = (memfd(4096)?, eventfd()?);
    let fds = [&memory, &event, &memory, &event].map(AsRawFd::as_raw_fd);
    let mark = arena.mark();
    arena.evil.channel = Channel::new(UnixStream::pair()?.0)?;
    for &request in REQUESTS {
        let channel = arena.evil.accept()?;
        // The second one comes with the payload rather than with the header.
        channel.send(&Message::new(request, vec![0; 8]).with(&fds));
        let _ = channel.bytes(&words(&[request, 1, 8]), &[]);
        let _ = channel.bytes(&[0; 8], &fds);
    }
    arena.judge("descriptors with everything", mark)?;
    arena.evil.reconnect(PLAIN)?;
    arena.probe()
}

fn say(evil: &mut Frontend, bytes: &[u8]) -> Result<()> {
    evil.channel.bytes(bytes, &[]).map(drop).context("cannot send")
}

/// Asks for ever and takes no answer.
fn never_read(evil: &mut Frontend) -> Result<()> {
    evil.channel.set_patience(Duration::from_millis(300))?;
    let question = Message::new(GET_FEATURES, vec![]).bytes();
    for _ in 0..1_000_000 {
        if evil.channel.bytes(&question, &[]).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Hangs up after every message of a start, and in the midst of each.
fn hang_up_anywhere(arena: &mut Arena) -> Result<()> {
    let event = eventfd()?;
    let mark = arena.mark();
    let evil = &mut arena.evil;
    let mut start = vec![Message::new(GET_FEATURES, vec![]), Message::new(SET_OWNER, vec![])];
    start.push(Message::number(SET_FEATURES, 1 << 32 | 1 << 30));
    start.push(memory_table(&evil.regions).with(&[evil.memory.fd()]));
    start.extend(evil.ring_messages(1, &evil.tx));
    start.push(Message::number(SET_VRING_ERR, 0).with(&[event.as_raw_fd()]));
    evil.channel = Channel::new(UnixStream::pair()?.0)?;
    for count in 0..start.len() {
        let channel = evil.accept()?;
        let (last, before) = start[..=count].split_last().context("no messages")?;
        before.iter().for_each(|message| channel.send(message));
        let bytes = last.bytes();
        let _ = channel.bytes(&bytes[..bytes.len() - 1 - count % 3], &last.fds);
    }
    arena.judge("hanging up anywhere", mark)?;
    arena.evil.reconnect(PLAIN)?;
    arena.probe()
}

#[test]
fn messages_without_end() -> Result<()> {
    let mut arena = Arena::start("")?;
    let (log, event) = (memfd(1 << 20)?, eventfd()?);
    let toggle = |evil: &mut Frontend| {
        let flips = [0, 1].map(|on| Message::ring(SET_VRING_ENABLE, 1, on));
        storm(evil, &flips)
    };
    arena.case("enabling and disabling", PLAIN, toggle, Unharmed, Recover::Reset)?;
    let map = |evil: &mut Frontend| {
        let table = memory_table(&evil.regions).with(&[evil.memory.fd()]);
        storm(evil, &[table])
    };
    arena.case("memory tables", PLAIN, map, Unharmed, Recover::Reset)?;
    let logs = |evil: &mut Frontend| {
        let log = Message::new(SET_LOG_BASE, numbers(&[1 << 20, 0])).with(&[log.as_raw_fd()]);
        storm(evil, &[log, Message::number(SET_FEATURES, 1 << 32 | 1 << 30 | LOG_ALL)])
    };
    arena.case("dirty logs", PLAIN, logs, Unharmed, Recover::Reconnect)?;
    let calls = |evil: &mut Frontend| {
        let calls = [SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ERR]
            .map(|request| Message::number(request, 1).with(&[event.as_raw_fd()]));
        storm(evil, &calls)
    };
    arena.case("events", PLAIN, calls, Unharmed, Recover::Reset)?;
    let sizes = |evil: &mut Frontend| {
        // CVE-2019-14818: whatever a size allocates must not pile up.
        let sizes: Vec<Message> = (0..16).map(|bits| Message::ring(SET_VRING_NUM, 0, 1 << bits)).collect();
        storm(evil, &sizes)
    };
    arena.case("sizes", PLAIN, sizes, Unharmed, Recover::Reset)?;
    let rarp = |evil: &mut Frontend| storm(evil, &[Message::number(SEND_RARP, EVIL_MAC.swap_bytes() >> 16)]);
    arena.case("announcements", PLAIN, rarp, Unharmed, Recover::Reset)?;
    arena.finish()
}

/// Sends messages for a while, as fast as the switch takes them, while frames flow through the rings in question.
fn storm(evil: &mut Frontend, messages: &[Message]) -> Result<()> {
    let mut frames = 0u64;
    let count = keep_on(Duration::from_millis(400), || {
        for message in messages {
            match message.request {
                SET_LOG_BASE => drop(evil.channel.ask(message)?),
                _ => evil.channel.send(message),
            }
        }
        frames += u64::from(evil.send(PEER_MAC, &[0x22; 100]));
        evil.tx.wake();
        // Lets go of the CPU until the switch has caught up.
        evil.settle()
    })?;
    println!("    {} messages, {frames} frames", count * messages.len() as u64);
    Ok(())
}

#[test]
fn rings_that_change_in_use() -> Result<()> {
    let mut arena = Arena::start("")?;
    for layout in [Layout::Split, Layout::Packed] {
        let moving = |evil: &mut Frontend| {
            keep_on(Duration::from_millis(400), || {
                for _ in 0..40 {
                    evil.send(PEER_MAC, &[0x33; 200]);
                }
                evil.tx.wake();
                let elsewhere = Places::at(evil.tx.places.desc + 64);
                evil.channel.send(&ring_address(1, elsewhere));
                evil.channel.send(&Message::ring(SET_VRING_NUM, 1, 64));
                evil.channel.send(&Message::ring(SET_VRING_NUM, 1, 256));
                evil.channel.send(&ring_address(1, evil.tx.places));
                evil.channel.send(&Message::ring(SET_VRING_BASE, 0, 17));
                evil.settle()
            })
            .map(drop)
        };
        arena.case(&format!("{layout:?}: moving and resizing"), Setup::of(layout), moving, Unharmed, Recover::Reset)?;
        let shrinking = |evil: &mut Frontend| {
            let size = evil.memory.size();
            keep_on(Duration::from_millis(400), || {
                for _ in 0..40 {
                    evil.send(PEER_MAC, &[0x44; 200]);
                }
                evil.tx.wake();
                // The buffers are gone, then the rings, then both are back.
                for len in [100 << 20, 1 << 20, size] {
                    let table = memory_table(&[[0, len, UVA, 0]]).with(&[evil.memory.fd()]);
                    evil.channel.send(&table);
                }
                evil.settle()
            })
            .map(drop)
        };
        arena.case(
            &format!("{layout:?}: memory comes and goes"),
            Setup::of(layout),
            shrinking,
            Unharmed,
            Recover::Reset,
        )?;
    }
    arena.finish()
}

#[test]
fn claims_and_wakes() -> Result<()> {
    let mut arena = Arena::start("")?;
    let claim = |evil: &mut Frontend| {
        let own = evil.mac;
        keep_on(Duration::from_millis(300), || {
            for mac in PAIR_MACS {
                evil.channel.send(&Message::number(SEND_RARP, mac.swap_bytes() >> 16));
                evil.mac = mac;
                evil.send(PEER_MAC, &[0x55; 100]);
                evil.tx.wake();
            }
            evil.settle()
        })?;
        evil.mac = own;
        Ok(())
    };
    arena.case("claiming the addresses of others", PLAIN, claim, Unharmed, Recover::Reset)?;
    let kicks = |evil: &mut Frontend| {
        let kick = || {
            evil.tx.wake();
            Ok(())
        };
        keep_on(Duration::from_millis(300), kick).map(drop)
    };
    arena.case("waking without work", PLAIN, kicks, Unharmed, Recover::Reset)?;
    arena.case("waking without end", PLAIN, wake_without_end, Unharmed, Recover::Reset)?;
    arena.finish()
}

/// Gives the switch an eventfd to be woken by of which each read takes one, and there are 2^63.
fn wake_without_end(evil: &mut Frontend) -> Result<()> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    ensure!(fd >= 0, "no eventfd");
    // SAFETY: the descriptor is new and ours alone.
    let mut event = unsafe { <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    std::io::Write::write_all(&mut event, &(1u64 << 63).to_ne_bytes())?;
    evil.channel.send(&Message::number(SET_VRING_KICK, 1).with(&[event.as_raw_fd()]));
    evil.settle()
}

/// Nor does it keep a worker awake that has nothing else to do.
#[test]
fn waking_without_end_costs_nothing() -> Result<()> {
    let _turn = e2e::machine::exclusive()?;
    let scratch = e2e::scratch::Scratch::new("awake")?;
    let switch = e2e::switch::Switch::start(&[])?;
    let path = scratch.join("evil");
    switch.add_port(&format!("evil=vhost-user:{}", path.display()))?;
    let mut evil = Frontend::start(&path, EVIL_MAC, PLAIN)?;
    wake_without_end(&mut evil)?;
    let (begin, before) = (Instant::now(), switch.usage()?.cpu);
    std::thread::sleep(Duration::from_secs(1));
    // Threads that end take their time along.
    let share = switch.usage()?.cpu.saturating_sub(before).as_secs_f64() / begin.elapsed().as_secs_f64();
    println!("an idle switch costs {:.1} % of a CPU", share * 100.0);
    ensure!(share < 0.2, "an idle switch costs {:.0} % of a CPU", share * 100.0);
    Ok(())
}

/// A port that listens is connected to as fast as this machine can; a frontend that means it gets in all the same.
#[test]
fn thousands_of_connects() -> Result<()> {
    let mut arena = Arena::start("")?;
    let path = arena.path("door");
    arena.switch.add_port(&format!("door=vhost-user:{},mode=server", path.display()))?;
    e2e::wait::until_true("the port to listen", Duration::from_secs(5), || Ok(path.exists()))?;
    let mark = arena.mark();
    let (mut connects, mut refused) = (0u64, 0u64);
    keep_on(Duration::from_millis(1500), || {
        match connect_now(&path) {
            Ok(stream) if connects.is_multiple_of(3) => Channel::new(stream)?.send(&Message::new(GET_FEATURES, vec![])),
            Ok(_) => {}
            Err(_) => {
                refused += 1;
                std::thread::yield_now();
            }
        }
        connects += 1;
        Ok(())
    })?;
    println!("{connects} connects, {refused} of them refused");
    ensure!(connects - refused > 10, "nobody could connect");
    arena.judge("thousands of connects", mark)?;
    let begin = Instant::now();
    let stream = e2e::wait::until("room to connect", Duration::from_secs(5), || Ok(connect_now(&path).ok()))?;
    let mut guest =
        Frontend::over(None, Channel::new(stream)?, 0x0200_0000_00d0, PLAIN).context("a frontend that means it")?;
    println!("a frontend that means it was served after {:?}", begin.elapsed());
    ensure!(begin.elapsed() < Duration::from_secs(2), "it took {:?} to be served", begin.elapsed());
    ensure!(guest.send(PEER_MAC, &[0x66; 100]), "no room");
    guest.tx.notify();
    arena.peer.wait_frame(&[0x66; 100])?;
    drop(guest);
    arena.switch.del_port("door")?;
    arena.finish()
}

/// `connect(2)` that does not wait for room in the listener's queue.
fn connect_now(path: &std::path::Path) -> io::Result<UnixStream> {
    use std::os::fd::FromRawFd;
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours alone; an all-zero address is a valid value.
    let (stream, mut address) = unsafe { (UnixStream::from_raw_fd(fd), std::mem::zeroed::<libc::sockaddr_un>()) };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (place, &byte) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
        *place = byte as libc::c_char;
    }
    // SAFETY: the address is a local of the size given.
    let done = unsafe { libc::connect(fd, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The memory that the guest's rings and buffers lie in is gone from under the switch.
#[test]
fn memory_cut_off() -> Result<()> {
    let mut arena = Arena::start("")?;
    for layout in [Layout::Split, Layout::Packed] {
        for (name, len) in [("no memory left", 0), ("buffers cut off", 100 << 20)] {
            let act = |evil: &mut Frontend| {
                evil.memory.cut_off(len)?;
                evil.send(PEER_MAC, &[0x77; 100]);
                evil.tx.wake();
                Ok(())
            };
            let gone = Refused("memory of the guest has gone");
            arena.case(&format!("{layout:?}: {name}"), Setup::of(layout), act, gone, Recover::Reconnect)?;
        }
    }
    arena.finish()
}

/// Has the ring's guest called through an eventfd that is blocking and full.
fn blocking_call(evil: &mut Frontend) -> Result<File> {
    let mut call = eventfd()?;
    evil.channel.send(&Message::number(SET_VRING_CALL, 1).with(&[call.as_raw_fd()]));
    evil.settle()?;
    // The switch calls once at every new descriptor, in case a call got lost; if so, that is taken out again.
    let _ = std::io::Read::read(&mut call, &mut [0; 8]);
    std::io::Write::write_all(&mut call, &(u64::MAX - 1).to_ne_bytes())?;
    // SAFETY: a plain flag change on a descriptor that is open.
    ensure!(unsafe { libc::fcntl(call.as_raw_fd(), libc::F_SETFL, 0) } == 0, "still non-blocking");
    Ok(call)
}

/// The eventfd through which the guest is called is made blocking after it was checked, and its counter is full.
#[test]
fn a_call_that_blocks() -> Result<()> {
    let mut arena = Arena::start("")?;
    let reason = "made its notification descriptor block";
    // Rings begin anew, for which the guest is called by the port's own thread, and waited for once.
    let act = |evil: &mut Frontend| {
        let _call = blocking_call(evil)?;
        let begin = Instant::now();
        for _ in 0..50 {
            evil.channel.send(&Message::ring(SET_VRING_BASE, 1, 0));
        }
        evil.settle()?;
        ensure!(begin.elapsed() < Duration::from_secs(1), "50 messages took {:?}", begin.elapsed());
        Ok(())
    };
    arena.case("a call that blocks the port", PLAIN, act, Refused(reason), Recover::Later)?;
    arena.renew_port()?;
    let act = |evil: &mut Frontend| {
        let _call = blocking_call(evil)?;
        // The guest asks to be called.
        evil.memory.half(evil.tx.places.driver).store(0, std::sync::atomic::Ordering::SeqCst);
        for _ in 0..10 {
            evil.send(PEER_MAC, &[0x88; 100]);
            evil.tx.wake();
        }
        // It costs others a tenth of a second, once in 15 s: that is what a longer look has to show.
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    };
    arena.case("a call that blocks", PLAIN, act, Refused(reason), Recover::Later)?;
    // Such a frontend has to wait before it is served again, so that it cannot do so all the time.
    arena.renew_port()?;
    arena.finish()
}
