//! Rings that are wrong, in both layouts, and some that are only strange.

use anyhow::{Result, ensure};
use e2e::hostile::arena::{Arena, Expect, PEER_MAC, Recover};
use e2e::hostile::frontend::*;
use e2e::hostile::memory::UVA;
use e2e::hostile::message::{ADD_MEM_REG, memory_region};
use e2e::hostile::queue::*;
use std::sync::atomic::Ordering;

use crate::chains::*;

use Expect::{Dropped, Refused, Unharmed};
use Layout::{Packed, Split};

const PAGE: u64 = 4096;

fn try_all(arena: &mut Arena, layout: Layout, cases: &[Case]) -> Result<()> {
    for &(name, features, size, act, expect) in cases {
        let setup = Setup::of(layout).with(features).sized(size);
        arena.case(&format!("{layout:?}: {name}"), setup, act, expect, Recover::Reset)?;
    }
    Ok(())
}

#[test]
fn split_rings() -> Result<()> {
    let mut arena = Arena::start("")?;
    try_all(&mut arena, Split, INDICES)?;
    try_all(&mut arena, Split, CHAINS)?;
    try_all(&mut arena, Split, LONG)?;
    try_all(&mut arena, Split, TABLES)?;
    try_all(&mut arena, Split, RECEIVE)?;
    try_all(&mut arena, Split, EVENTS)?;
    arena.finish()
}

#[test]
fn packed_rings() -> Result<()> {
    let mut arena = Arena::start("")?;
    try_all(&mut arena, Packed, SLOTS)?;
    try_all(&mut arena, Packed, CHAINS)?;
    try_all(&mut arena, Packed, LONG)?;
    try_all(&mut arena, Packed, TABLES)?;
    try_all(&mut arena, Packed, RECEIVE)?;
    try_all(&mut arena, Packed, EVENTS)?;
    arena.finish()
}

/// Indices of a split ring.
const INDICES: &[Case] = &[
    (
        "the available index runs ahead",
        0,
        256,
        |evil| {
            evil.tx.set_avail_index(evil.tx.avail_index().wrapping_add(257));
            Ok(())
        },
        Refused("the available index moved by more"),
    ),
    (
        "the available index goes back",
        0,
        256,
        |evil| {
            evil.tx.set_avail_index(evil.tx.avail_index().wrapping_sub(1));
            Ok(())
        },
        Refused("the available index moved by more"),
    ),
    (
        "the available index of the receive ring runs ahead",
        0,
        256,
        |evil| {
            evil.rx.set_avail_index(evil.rx.avail_index().wrapping_add(0x8000));
            Ok(())
        },
        Refused("the available index moved by more"),
    ),
    (
        "a head beyond the ring",
        0,
        256,
        |evil| {
            evil.tx.offer(256);
            Ok(())
        },
        Refused("a descriptor index lies outside"),
    ),
    (
        "a head of 65535",
        0,
        256,
        |evil| {
            evil.tx.offer(u16::MAX);
            Ok(())
        },
        Refused("a descriptor index lies outside"),
    ),
    (
        "a next beyond the ring",
        0,
        256,
        |evil| {
            let desc = Desc { next: 256, ..Desc::new(SPARE, 64, NEXT) };
            send(evil, &[desc])
        },
        Refused("a descriptor index lies outside"),
    ),
    (
        "a descriptor that is its own next",
        0,
        256,
        |evil| {
            evil.tx.set(7, Desc { next: 7, ..Desc::new(SPARE, 1, NEXT) });
            evil.tx.offer(7);
            Ok(())
        },
        Refused("a descriptor chain is longer than its ring, or loops"),
    ),
    (
        "two descriptors that follow each other",
        0,
        32_768,
        |evil| {
            evil.tx.set(7, Desc { next: 8, ..Desc::new(SPARE, 0, NEXT) });
            evil.tx.set(8, Desc { next: 7, ..Desc::new(SPARE, 0, NEXT) });
            evil.tx.offer(7);
            Ok(())
        },
        TOO_LONG,
    ),
    (
        "a chain again and again",
        0,
        256,
        |evil| {
            frame_at(evil, SPARE, 60);
            evil.tx.set(3, Desc::new(SPARE, 72, 0));
            (0..256).for_each(|_| evil.tx.offer(3));
            Ok(())
        },
        Unharmed,
    ),
];

/// Slots of a packed ring.
const SLOTS: &[Case] = &[
    (
        "a chain of which only the head is there",
        0,
        256,
        |evil| {
            evil.tx.write_slot(Desc::new(SPARE, 64, NEXT), true);
            Ok(())
        },
        Refused("a descriptor index lies outside"),
    ),
    (
        "a chain around the whole ring",
        0,
        8,
        |evil| {
            for _ in 0..8 {
                evil.tx.write_slot(Desc::new(SPARE, 64, NEXT), true);
                evil.tx.skip(1);
            }
            Ok(())
        },
        Refused("a descriptor chain is longer than its ring, or loops"),
    ),
    (
        "any buffer id",
        0,
        256,
        |evil| {
            frame_at(evil, SPARE, 60);
            for id in [0xffff, 0x8000, 256, 7, 7] {
                evil.tx.write_slot(Desc { next: id, ..Desc::new(SPARE, 72, 0) }, true);
                evil.tx.skip(1);
            }
            Ok(())
        },
        Unharmed,
    ),
    (
        "wrap counters of the last round",
        0,
        256,
        |evil| {
            (0..256).for_each(|slot| evil.tx.set(slot, Desc::new(SPARE, 72, 1 << 15)));
            Ok(())
        },
        Unharmed,
    ),
    (
        "slots marked both ways",
        0,
        256,
        |evil| {
            (0..256).for_each(|slot| evil.tx.set(slot, Desc::new(SPARE, 72, 1 << 15 | 1 << 7)));
            Ok(())
        },
        Unharmed,
    ),
];

/// Buffers to receive into. Frames come from the pair, which sends one of 64 to everybody.
const RECEIVE: &[Case] = &[
    ("a receive buffer outside of memory", 0, 256, |evil| refill(evil, Desc::new(OUTSIDE, 2048, WRITE)), UNMAPPED),
    (
        "a receive buffer across the end",
        0,
        256,
        |evil| refill(evil, Desc::new(evil.memory.size() - 8, 2048, WRITE)),
        UNMAPPED,
    ),
    (
        "a receive buffer to read from",
        0,
        256,
        |evil| refill(evil, Desc::new(SPARE, 2048, 0)),
        Refused("direction is wrong"),
    ),
    ("empty receive buffers", 0, 256, |evil| refill(evil, Desc::new(SPARE, 0, WRITE)), Dropped("buffer_too_small")),
    (
        "receive buffers of 11 bytes",
        0,
        256,
        |evil| refill(evil, Desc::new(SPARE, 11, WRITE)),
        Dropped("buffer_too_small"),
    ),
    (
        "mergeable buffers of one byte",
        MRG_RXBUF,
        256,
        |evil| refill(evil, Desc::new(SPARE, 1, WRITE)),
        Dropped("buffer_too_small"),
    ),
    (
        "mergeable buffers of nothing",
        MRG_RXBUF,
        256,
        |evil| refill(evil, Desc::new(SPARE, 0, WRITE)),
        Dropped("buffer_too_small"),
    ),
    (
        "receive buffers that are the rings themselves",
        MRG_RXBUF,
        256,
        |evil| {
            let rings = evil.rx.places.desc;
            refill(evil, Desc::new(rings, 2048, WRITE))
        },
        Unharmed,
    ),
];

/// Restarts the receive ring with that descriptor everywhere.
fn refill(evil: &mut Frontend, desc: Desc) -> Result<()> {
    evil.stop_queues()?;
    evil.rx.reset_with(desc);
    evil.start_queues();
    evil.settle()
}

/// Event indices and flags that make no sense.
const EVENTS: &[Case] = &[
    ("event indices without sense", EVENT_IDX, 256, nonsense_events, Unharmed),
    ("event flags without sense", 0, 256, nonsense_events, Unharmed),
];

fn nonsense_events(evil: &mut Frontend) -> Result<()> {
    let payload = [0x11; 64];
    for round in 0..200u16 {
        for queue in [&evil.rx, &evil.tx] {
            let Places { driver, device, .. } = queue.places;
            let (event, size) = (round.wrapping_mul(0x9e37), u64::from(queue.size));
            let places = match queue.layout {
                Split => [driver, driver + 4 + 2 * size, device, device + 4 + 8 * size],
                Packed => [driver, driver + 2, device, device + 2],
            };
            places.into_iter().for_each(|at| evil.memory.half(at).store(event, Ordering::Relaxed));
        }
        evil.send(PEER_MAC, &payload);
        evil.tx.wake();
    }
    Ok(())
}

/// A frame that is allowed, however strange, arrives.
#[test]
fn strange_but_allowed() -> Result<()> {
    let mut arena = Arena::start("")?;
    for layout in [Split, Packed] {
        arena.evil.reconnect(Setup::of(layout).with(INDIRECT_DESC).sized(1024))?;
        let mut expected = Vec::new();
        let end = arena.evil.memory.size();
        for (round, pieces) in [vec![1; 72], vec![0, 72, 0], vec![12, 14, 46], vec![72]].into_iter().enumerate() {
            let at = end - 72 * (round as u64 + 1);
            frame_at(&arena.evil, at, 60);
            arena.evil.memory.byte(at + 71).store(round as u8, Ordering::Relaxed);
            let mut next = at;
            let descs: Vec<Desc> = pieces
                .iter()
                .map(|&len| {
                    next += u64::from(len);
                    Desc::new(next - u64::from(len), len, 0)
                })
                .collect();
            arena.evil.tx.post_chain(&descs);
            let mut payload = vec![0x5a; 46];
            payload[45] = round as u8;
            expected.push(payload);
        }
        arena.evil.tx.notify();
        for payload in &expected {
            arena.peer.wait_frame(payload)?;
        }
        over_a_gap(&mut arena)?;
        ensure!(arena.switch.port("evil")?.state() == "up", "a strange chain was taken for a wrong one");
    }
    arena.finish()
}

/// Guest addresses that go on where mappings do not (CVE-2018-1059): the frame is put together from both.
fn over_a_gap(arena: &mut Arena) -> Result<()> {
    let evil = &mut arena.evil;
    let (end, far) = (evil.memory.size(), UVA + (1 << 40));
    evil.channel.send(&memory_region(ADD_MEM_REG, [end, PAGE, far, 0]).with(&[evil.memory.fd()]));
    evil.settle()?;
    let mut bytes = vec![0; HEADER];
    bytes.extend(ethernet(PEER_MAC, evil.mac));
    bytes.extend(0..64);
    let (first, second) = bytes.split_at(50);
    evil.memory.write(end - 50, first);
    // The second region is the file's first page again.
    evil.memory.write(0, second);
    evil.tx.post_chain(&[Desc::new(end - 50, bytes.len() as u32, 0)]);
    evil.tx.notify();
    arena.peer.wait_frame(&bytes[HEADER + 14..])
}
