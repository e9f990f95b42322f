//! Chains, buffers and tables that are wrong, in both layouts.

use anyhow::Result;
use e2e::hostile::arena::{Expect, PEER_MAC};
use e2e::hostile::frontend::*;
use e2e::hostile::queue::*;

use Expect::{Dropped, Refused, Unharmed};
use Layout::Packed;

const PAGE: u64 = 4096;

type Act = fn(&mut Frontend) -> Result<()>;
/// Name, features, size of the rings, what is done, what comes of it.
pub(crate) type Case = (&'static str, u64, u16, Act, Expect);

/// Posts a chain to send.
pub(crate) fn send(evil: &mut Frontend, descs: &[Desc]) -> Result<()> {
    evil.tx.post_chain(descs);
    Ok(())
}

/// A frame to the peer, header included, at that place of memory.
pub(crate) fn frame_at(evil: &Frontend, at: u64, len: usize) {
    let mut bytes = vec![0; HEADER];
    bytes.extend(ethernet(PEER_MAC, evil.mac));
    bytes.resize(HEADER + len, 0x5a);
    evil.memory.write(at, &bytes);
}

/// Posts a table of descriptors as one indirect descriptor.
pub(crate) fn send_table(evil: &mut Frontend, at: u64, descs: &[Desc], len: u32) -> Result<()> {
    let layout = evil.setup.layout;
    for (place, desc) in (0..).zip(descs) {
        let end = at + 16 * (place + 1);
        if end <= evil.memory.size() {
            evil.memory.write(at + 16 * place, &desc.entry(layout));
        }
    }
    send(evil, &[Desc::new(at, len, INDIRECT)])
}

pub(crate) const OUTSIDE: u64 = 1 << 40;
pub(crate) const UNMAPPED: Expect = Refused("a descriptor points outside of guest memory");
pub(crate) const INDIRECT_WRONG: Expect = Refused("an indirect descriptor where none is allowed");
pub(crate) const INDIRECT_LENGTH: Expect = Refused("the length of an indirect table is invalid");
pub(crate) const TOO_LONG: Expect = Refused("a descriptor chain has more than 1024 buffers");

/// Chains to send.
pub(crate) const CHAINS: &[Case] = &[
    ("a buffer outside of memory", 0, 256, |evil| send(evil, &[Desc::new(OUTSIDE, 64, 0)]), UNMAPPED),
    ("a buffer that wraps around", 0, 256, |evil| send(evil, &[Desc::new(u64::MAX - 8, 64, 0)]), UNMAPPED),
    ("a buffer of 4 GiB", 0, 256, |evil| send(evil, &[Desc::new(SPARE, u32::MAX, 0)]), UNMAPPED),
    (
        "a second buffer outside",
        0,
        256,
        |evil| send(evil, &[Desc::new(SPARE, 64, 0), Desc::new(OUTSIDE, 64, 0)]),
        UNMAPPED,
    ),
    // CVE-2018-1059.
    (
        "a buffer across the end of memory",
        0,
        256,
        |evil| send(evil, &[Desc::new(evil.memory.size() - 32, 64, 0)]),
        UNMAPPED,
    ),
    ("a buffer one past the end", 0, 256, |evil| send(evil, &[Desc::new(evil.memory.size(), 1, 0)]), UNMAPPED),
    (
        "a frame on the last bytes",
        0,
        256,
        |evil| {
            let at = evil.memory.size() - 72;
            frame_at(evil, at, 60);
            send(evil, &[Desc::new(at, 71, 0), Desc::new(at + 71, 1, 0)])
        },
        Unharmed,
    ),
    ("a buffer to write to", 0, 256, |evil| send(evil, &[Desc::new(SPARE, 64, WRITE)]), Refused("direction is wrong")),
    // CVE-2020-10725: lengths of zero, in groups.
    (
        "empty buffers outside of memory",
        0,
        256,
        |evil| {
            (0..8).for_each(|_| evil.tx.post_chain(&[Desc::new(OUTSIDE, 0, 0)]));
            Ok(())
        },
        Dropped("runt"),
    ),
    // CVE-2022-2132.
    (
        "a header over three buffers",
        0,
        256,
        |evil| {
            frame_at(evil, SPARE, 60);
            send(evil, &[Desc::new(SPARE, 5, 0), Desc::new(SPARE + 5, 5, 0), Desc::new(SPARE + 10, 62, 0)])
        },
        Unharmed,
    ),
    ("half a header", 0, 256, |evil| send(evil, &[Desc::new(SPARE, 6, 0)]), Dropped("runt")),
    ("a header alone", 0, 256, |evil| send(evil, &[Desc::new(SPARE, 12, 0)]), Dropped("runt")),
    ("a header and 13 bytes", 0, 256, |evil| send(evil, &[Desc::new(SPARE, 25, 0)]), Dropped("runt")),
    ("nothing", 0, 256, |evil| send(evil, &[Desc::new(SPARE, 0, 0)]), Dropped("runt")),
    ("a frame of 16 MiB", 0, 256, |evil| send(evil, &[Desc::new(SPARE, 16 << 20, 0)]), Dropped("oversize")),
];

/// Chains that are long, of buffers that are short.
pub(crate) const LONG: &[Case] = &[
    (
        "1024 buffers",
        0,
        32_768,
        |evil| {
            frame_at(evil, SPARE, 1012);
            let descs: Vec<Desc> = (0..1024).map(|at| Desc::new(SPARE + at, 1, 0)).collect();
            send(evil, &descs)
        },
        Unharmed,
    ),
    ("1025 buffers", 0, 32_768, |evil| send(evil, &[Desc::new(SPARE, 1, 0); 1025]), TOO_LONG),
    ("a chain of 32,768", 0, 32_768, |evil| send(evil, &vec![Desc::new(SPARE, 1, 0); 32_768]), TOO_LONG),
    ("a chain of 32,768 empty buffers", 0, 32_768, |evil| send(evil, &vec![Desc::new(SPARE, 0, 0); 32_768]), TOO_LONG),
    (
        "receive chains of empty buffers",
        MRG_RXBUF | INDIRECT_DESC,
        256,
        |evil| {
            // Each frame that comes would walk a thousand tables of a thousand descriptors, in vain.
            let mut table = vec![Desc::new(SPARE, 0, WRITE | NEXT); 1024];
            (1..).zip(&mut table).for_each(|(next, desc)| desc.next = next);
            table[1023] = Desc::new(SPARE, 1, WRITE);
            let layout = evil.setup.layout;
            if layout == Packed {
                table.iter_mut().for_each(|desc| (desc.flags, desc.next) = (WRITE, 0));
            }
            for (place, desc) in (0..).zip(&table) {
                evil.memory.write(SPARE + 16 * place, &desc.entry(layout));
            }
            evil.stop_queues()?;
            evil.rx.reset_with(Desc::new(SPARE, 16 * 1024, INDIRECT));
            evil.start_queues();
            evil.settle()
        },
        Refused("more than 32768 buffers"),
    ),
];

/// Tables of descriptors.
pub(crate) const TABLES: &[Case] = &[
    (
        "a table that was not negotiated",
        0,
        256,
        |evil| send_table(evil, SPARE, &[Desc::new(SPARE + PAGE, 64, 0)], 16),
        INDIRECT_WRONG,
    ),
    (
        "a table in a table",
        INDIRECT_DESC,
        256,
        |evil| send_table(evil, SPARE, &[Desc::new(SPARE, 16, INDIRECT)], 16),
        INDIRECT_WRONG,
    ),
    (
        "a table with a next one",
        INDIRECT_DESC,
        256,
        |evil| send(evil, &[Desc::new(SPARE, 16, INDIRECT), Desc::new(SPARE, 64, 0)]),
        INDIRECT_WRONG,
    ),
    ("an empty table", INDIRECT_DESC, 256, |evil| send_table(evil, SPARE, &[], 0), INDIRECT_LENGTH),
    ("a table of 15 bytes", INDIRECT_DESC, 256, |evil| send_table(evil, SPARE, &[], 15), INDIRECT_LENGTH),
    ("a table of 17 bytes", INDIRECT_DESC, 256, |evil| send_table(evil, SPARE, &[], 17), INDIRECT_LENGTH),
    ("a table of 4 GiB", INDIRECT_DESC, 256, |evil| send_table(evil, SPARE, &[], 0xffff_fff0), INDIRECT_LENGTH),
    ("a table of 1025", INDIRECT_DESC, 256, |evil| send_table(evil, SPARE, &[], 16 * 1025), INDIRECT_LENGTH),
    ("a table outside of memory", INDIRECT_DESC, 256, |evil| send_table(evil, OUTSIDE, &[], 16), UNMAPPED),
    (
        "a table across the end of memory",
        INDIRECT_DESC,
        256,
        |evil| send_table(evil, evil.memory.size() - 16, &[], 32),
        UNMAPPED,
    ),
    ("an unaligned table", INDIRECT_DESC, 256, |evil| send_table(evil, SPARE + 1, &[], 16), UNMAPPED),
    (
        "a buffer of a table outside of memory",
        INDIRECT_DESC,
        256,
        |evil| send_table(evil, SPARE, &[Desc::new(OUTSIDE, 64, 0)], 16),
        UNMAPPED,
    ),
    (
        "a table on the last bytes",
        INDIRECT_DESC,
        256,
        |evil| {
            frame_at(evil, SPARE, 60);
            send_table(evil, evil.memory.size() - 16, &[Desc::new(SPARE, 72, 0)], 16)
        },
        Unharmed,
    ),
];
