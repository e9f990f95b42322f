//! Messages that are wrong. Each ends the connection, with a reason, and nothing else.

use anyhow::{Result, ensure};
use e2e::hostile::arena::{Arena, Expect, Recover};
use e2e::hostile::frontend::{Frontend, Setup, ring_address};
use e2e::hostile::memory::UVA;
use e2e::hostile::message::*;
use e2e::hostile::queue::{Layout, Places};
use e2e::hostile::{eventfd, memfd};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

type Case = (&'static str, Message, &'static str);

/// Descriptors of all kinds.
struct Files {
    event: File,
    memory: File,
    huge: File,
    null: File,
    directory: File,
    socket: OwnedFd,
}

impl Files {
    fn new() -> Result<Self> {
        Ok(Self {
            event: eventfd()?,
            memory: memfd(MIB)?,
            huge: memfd(1 << 46)?,
            null: File::open("/dev/null")?,
            directory: File::open("/")?,
            socket: UnixStream::pair()?.0.into(),
        })
    }
}

fn try_all(arena: &mut Arena, cases: &[Case]) -> Result<()> {
    for (name, message, reason) in cases {
        let act = |evil: &mut Frontend| {
            evil.channel.send(message);
            evil.channel.wait_closed()
        };
        arena.case(name, Setup::of(Layout::Split), act, Expect::Refused(reason), Recover::Reconnect)?;
    }
    Ok(())
}

#[test]
fn messages_that_are_none() -> Result<()> {
    let files = Files::new()?;
    let mut arena = Arena::start("")?;
    try_all(&mut arena, &headers())?;
    try_all(&mut arena, &rings(&files))?;
    try_all(&mut arena, &values(&files))?;
    try_all(&mut arena, &logs(&files))?;
    // This one is answered, in the negative.
    let ask = |evil: &mut Frontend| {
        let transfer = Message::new(SET_DEVICE_STATE_FD, vec![0; 8]).with(&[files.memory.as_raw_fd()]);
        ensure!(evil.channel.ask_number(&transfer)? != 0, "a transfer of state began");
        Ok(())
    };
    arena.case("a transfer of state", Setup::of(Layout::Split), ask, Expect::Unharmed, Recover::Reset)?;
    arena.finish()
}

fn headers() -> Vec<Case> {
    vec![
        ("request 0", Message::new(0, vec![]), "request number 0 is unknown"),
        ("request 99", Message::new(99, vec![]), "request number 99 is unknown"),
        ("request u32::MAX", Message::new(u32::MAX, vec![]), "is unknown"),
        ("version 0", Message::new(GET_FEATURES, vec![]).flags(0), "flags"),
        ("a reply", Message::new(GET_FEATURES, vec![]).flags(0x5), "flags"),
        ("reserved flags", Message::new(GET_FEATURES, vec![]).flags(0xffff_fff1), "flags"),
        ("5000 bytes", Message::new(SET_MEM_TABLE, vec![0; 5000]), "more than the 4096"),
        ("4 GiB claimed", Message::new(SET_FEATURES, vec![0; 8]).claiming(u32::MAX), "more than the 4096"),
        ("7 bytes of 8", Message::new(SET_FEATURES, vec![0; 7]), "SET_FEATURES: cut short, or its size"),
        ("no payload", Message::new(SET_VRING_ADDR, vec![]), "SET_VRING_ADDR: cut short, or its size"),
        ("16 bytes of 8", Message::new(NET_SET_MTU, vec![0; 16]), "16 bytes instead of 8"),
        ("8 bytes of none", Message::new(GET_STATUS, vec![0; 8]), "8 bytes instead of 0"),
    ]
}

fn rings(files: &Files) -> Vec<Case> {
    let event = files.event.as_raw_fd();
    let mut cases = Vec::new();
    // CVE-2020-10723: an index that loses its upper half somewhere.
    for index in [512, 0x1_0001] {
        for request in [SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE] {
            cases.push(("ring index", Message::ring(request, index, 1), "is beyond the 512 rings"));
        }
        cases.push(("ring index", ring_address(index, Places::at(MIB)), "is beyond the 512 rings"));
    }
    for size in [0, 3, 32_769, 65_536, u32::MAX] {
        cases.push(("ring size", Message::ring(SET_VRING_NUM, 0, size), "is not a power of two"));
    }
    cases.push(("ring base", Message::ring(SET_VRING_BASE, 0, 0x1_0000), "does not fit a split ring"));
    cases.push(("enable twice", Message::ring(SET_VRING_ENABLE, 0, 2), "can be enabled or disabled, not 2"));
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for fd in [&files.memory, &files.null, &files.directory].map(AsRawFd::as_raw_fd) {
            cases.push(("wrong kind of event", Message::number(request, 0).with(&[fd]), "is not an eventfd"));
        }
        let socket = [files.socket.as_raw_fd()];
        cases.push(("a socket for an event", Message::number(request, 0).with(&socket), "is a socket"));
        cases.push(("no event", Message::number(request, 0), "descriptors are not those"));
        cases.push(("two events", Message::number(request, 0).with(&[event, event]), "descriptors are not those"));
        cases.push(("an event too many", Message::number(request, 0x100).with(&[event]), "descriptors are not those"));
    }
    cases
}

fn values(files: &Files) -> Vec<Case> {
    let memory = files.memory.as_raw_fd();
    let crowd = vec![memory; 200];
    vec![
        ("a feature not offered", Message::number(SET_FEATURES, 1 << 32 | 1 << 33), "were never offered"),
        ("all features", Message::number(SET_FEATURES, u64::MAX), "were never offered"),
        ("a protocol feature", Message::number(SET_PROTOCOL_FEATURES, 1 << 8), "were never offered"),
        ("a status of nine bits", Message::number(SET_STATUS, 256), "more than eight bits"),
        ("an MTU of 67", Message::number(NET_SET_MTU, 67), "an MTU of 67"),
        ("an MTU of 65536", Message::number(NET_SET_MTU, 65_536), "an MTU of 65536"),
        ("endianness", Message::ring(SET_VRING_ENDIAN, 0, 1), "not supported"),
        // CVE-2019-14818: descriptors that nobody asked for.
        ("a descriptor too many", Message::number(SET_FEATURES, 0).with(&[memory]), "descriptors are not those"),
        ("200 descriptors", Message::new(GET_FEATURES, vec![]).with(&crowd), "more than 32 descriptors"),
        // CVE-2020-10724, CVE-2020-14374 and after: there is no crypto here.
        ("crypto", Message::new(CREATE_CRYPTO_SESSION, vec![0xff; 512]), "CREATE_CRYPTO_SESSION"),
        // CVE-2020-10726, CVE-2021-3839, CVE-2022-0669: nor are there buffers in flight to remember.
        ("inflight get", Message::new(GET_INFLIGHT_FD, vec![0xff; 24]), "INFLIGHT_SHMFD"),
        ("inflight set", Message::new(SET_INFLIGHT_FD, vec![0xff; 24]).with(&[memory]), "INFLIGHT_SHMFD"),
        ("inflight without", Message::new(SET_INFLIGHT_FD, vec![0; 24]), "SET_INFLIGHT_FD"),
        ("configuration", Message::new(GET_CONFIG, vec![0; 12]), "CONFIG"),
        ("postcopy", Message::new(POSTCOPY_ADVISE, vec![]), "POSTCOPY_ADVISE"),
        ("IOTLB", Message::new(IOTLB_MSG, vec![0xff; 40]), "IOTLB_MSG"),
    ]
}

fn logs(files: &Files) -> Vec<Case> {
    let log = |size, offset, fd: &File| Message::new(SET_LOG_BASE, numbers(&[size, offset])).with(&[fd.as_raw_fd()]);
    vec![
        // CVE-2020-10722: size and offset that wrap around.
        ("a log that wraps", log(u64::MAX, 1, &files.memory), "SET_LOG_BASE"),
        ("a log at the end", log(PAGE, u64::MAX - PAGE + 1, &files.memory), "SET_LOG_BASE"),
        ("a huge log", log(1 << 40, 0, &files.huge), "dirty log"),
        ("no log", log(0, 0, &files.memory), "SET_LOG_BASE"),
        ("a log beyond its file", log(MIB, PAGE, &files.memory), "beyond the end"),
        ("an unaligned log", log(PAGE, 3, &files.memory), "no multiple of 8"),
        ("a log on no memory", log(PAGE, 0, &files.null), "not a memory file"),
        ("a log without a file", Message::new(SET_LOG_BASE, numbers(&[PAGE, 0])), "SET_LOG_BASE"),
    ]
}

#[test]
fn memory_that_is_none() -> Result<()> {
    let files = Files::new()?;
    let mut arena = Arena::start("")?;
    try_all(&mut arena, &tables(&files))?;
    try_all(&mut arena, &slots(&files))?;
    arena.finish()
}

fn tables(files: &Files) -> Vec<Case> {
    let memory = files.memory.as_raw_fd();
    let table = |regions: &[Region]| memory_table(regions).with(&vec![memory; regions.len().min(32)]);
    let many: Vec<Region> = (0..60).map(|part| [part * PAGE, PAGE, UVA + part * PAGE, 0]).collect();
    let mut cases = vec![
        ("overlap", table(&[[0, 2 * PAGE, UVA, 0], [PAGE, PAGE, 2 * UVA, 0]]), "overlap"),
        ("overlap in the frontend", table(&[[0, PAGE, UVA, 0], [MIB, PAGE, UVA + PAGE - 1, 0]]), "overlap"),
        ("the same twice", table(&[[0, PAGE, UVA, 0], [0, PAGE, UVA, 0]]), "overlap"),
        ("too many", table(&many), "SET_MEM_TABLE"),
        ("no regions", table(&[]), "SET_MEM_TABLE"),
        ("beyond its file", table(&[[0, MIB + 1, UVA, 0]]), "beyond the end of its file"),
        ("offset beyond its file", table(&[[0, MIB, UVA, 1]]), "beyond the end of its file"),
        ("cut short", Message::new(SET_MEM_TABLE, words(&[1])).with(&[memory]), "SET_MEM_TABLE"),
        ("more regions than said", Message::new(SET_MEM_TABLE, words(&[200, 0])).with(&[memory]), "SET_MEM_TABLE"),
        ("no file", memory_table(&[[0, MIB, UVA, 0]]), "descriptors are not those"),
        ("two files", memory_table(&[[0, MIB, UVA, 0]]).with(&[memory, memory]), "descriptors are not those"),
    ];
    for region in [[u64::MAX, 2, UVA, 0], [0, 2, u64::MAX, 0], [0, PAGE, UVA, u64::MAX], [0, 0, UVA, 0]] {
        cases.push(("wraps or is empty", table(&[region]), "SET_MEM_TABLE"));
    }
    for (fd, reason) in
        [(&files.event, "not a memory file"), (&files.null, "is a device"), (&files.directory, "is a directory")]
    {
        cases.push(("no memory", memory_table(&[[0, PAGE, UVA, 0]]).with(&[fd.as_raw_fd()]), reason));
    }
    cases.push(("a socket", memory_table(&[[0, PAGE, UVA, 0]]).with(&[files.socket.as_raw_fd()]), "is a socket"));
    let huge = [files.huge.as_raw_fd()];
    cases.push(("64 TiB", memory_table(&[[0, 1 << 46, UVA, 0]]).with(&huge), "16 TiB"));
    cases
}

fn slots(files: &Files) -> Vec<Case> {
    let (memory, huge) = (files.memory.as_raw_fd(), files.huge.as_raw_fd());
    // The guest has 256 MiB at 0.
    let far = 1 << 32;
    let add = |region, fd| memory_region(ADD_MEM_REG, region).with(&[fd]);
    vec![
        ("add overlapping", add([0, PAGE, UVA + far, 0], memory), "overlap"),
        ("add overlapping in the frontend", add([far, PAGE, UVA + PAGE, 0], memory), "overlap"),
        ("add nothing", add([far, 0, UVA + far, 0], memory), "ADD_MEM_REG"),
        ("add beyond its file", add([far, 2 * MIB, UVA + far, 0], memory), "beyond the end"),
        ("add wrapping", add([u64::MAX - 4095, 2 * PAGE, UVA + far, 0], memory), "ADD_MEM_REG"),
        ("add without a file", memory_region(ADD_MEM_REG, [far, PAGE, UVA + far, 0]), "ADD_MEM_REG"),
        ("add too much", add([far, 1 << 44, UVA + far, 0], huge), "16 TiB"),
        ("remove a part", memory_region(REM_MEM_REG, [0, PAGE, UVA, 0]), "no memory region at 0x0"),
        ("remove another", memory_region(REM_MEM_REG, [far, PAGE, UVA + far, 0]), "no memory region at 0x100000000"),
    ]
}
