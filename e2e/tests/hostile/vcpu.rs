//! A second CPU of the guest rewrites descriptors, indices and headers while the switch reads them (CVE-2020-14375).

use anyhow::Result;
use e2e::hostile::Dice;
use e2e::hostile::arena::{Arena, PEER_MAC};
use e2e::hostile::frontend::*;
use e2e::hostile::memory::Memory;
use e2e::hostile::queue::{INDIRECT, Layout, NEXT, Places, WRITE};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const TIME: Duration = Duration::from_millis(500);

/// What the other CPU rewrites: the rings, or also whatever they have led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Rings,
    Headers,
    Lengths,
}

/// What a rewriter needs to know of a queue.
#[derive(Clone, Copy)]
struct Ring {
    places: Places,
    layout: Layout,
    size: u64,
    buffers: u64,
}

fn rewrite(memory: &Memory, rings: [Ring; 2], target: Target, seed: u64, stop: &AtomicBool) {
    let mut dice = Dice::new(seed);
    while !stop.load(Ordering::Relaxed) {
        let Some(ring) = dice.pick(&rings) else { return };
        let slot = dice.below(ring.size);
        let desc = ring.places.desc + 16 * slot;
        match target {
            Target::Headers => {
                let at = ring.buffers + slot * 2048 + 2 * dice.below(40);
                memory.half(at).store(dice.nasty() as u16, Ordering::Relaxed);
            }
            Target::Lengths => {
                let len = dice.pick(&[0, 1, 11, 26, 60, 200, 1500, 2048]).unwrap_or(0);
                memory.word(desc + 8).store(len, Ordering::Relaxed);
            }
            Target::Rings => {
                let flags = dice.pick(&[0, NEXT, WRITE, INDIRECT, INDIRECT | NEXT]).unwrap_or(0);
                let at = if ring.layout == Layout::Split { desc + 12 } else { desc + 14 };
                match dice.below(5) {
                    0 => memory.half(at).store(flags, Ordering::Relaxed),
                    1 => memory.long(desc).store(dice.nasty(), Ordering::Relaxed),
                    2 => memory.word(desc + 8).store(dice.nasty() as u32, Ordering::Relaxed),
                    3 => memory.half(desc + 14).store(dice.nasty() as u16, Ordering::Relaxed),
                    _ => {
                        memory.half(ring.places.driver + 2 * dice.below(64)).store(dice.any() as u16, Ordering::Relaxed)
                    }
                }
            }
        }
        if dice.chance(10) {
            // Two CPUs of the guest and all other guests share one here.
            thread::yield_now();
        }
    }
}

/// Sends, receives, and resets whenever the switch has had enough.
fn drive(arena: &mut Arena) -> Result<u64> {
    let (begin, mut faults) = (Instant::now(), 0);
    while begin.elapsed() < TIME {
        for _ in 0..100 {
            let evil = &mut arena.evil;
            evil.send(PEER_MAC, &[0x99; 120]);
            while evil.rx.reap().is_some() {
                evil.rx.fill();
            }
            evil.tx.wake();
            while arena.peer.receive().is_some() {}
            arena.peer.send(evil.mac, &[0x99; 120]);
            arena.peer.tx.notify();
        }
        if arena.switch.port("evil")?.state() == "failed" {
            faults += 1;
            arena.evil.reset()?;
        }
    }
    Ok(faults)
}

#[test]
fn a_second_cpu_rewrites_everything() -> Result<()> {
    let mut arena = Arena::start("")?;
    let mut faults = 0;
    for (round, layout) in [Layout::Split, Layout::Packed].into_iter().enumerate() {
        for target in [Target::Rings, Target::Headers, Target::Lengths] {
            let features = MRG_RXBUF | INDIRECT_DESC | CSUM | HOST_TSO4 | HOST_TSO6;
            arena.evil.reconnect(Setup::of(layout).with(features))?;
            let (memory, stop) = (arena.evil.memory.clone(), Arc::new(AtomicBool::new(false)));
            let rings = [&arena.evil.rx, &arena.evil.tx].map(|queue| Ring {
                places: queue.places,
                layout,
                size: queue.size.into(),
                buffers: queue.buffer(0),
            });
            let theirs = stop.clone();
            let second = thread::spawn(move || rewrite(&memory, rings, target, round as u64, &theirs));
            let mark = arena.mark();
            let driven = drive(&mut arena);
            stop.store(true, Ordering::Relaxed);
            let _ = second.join();
            faults += driven?;
            arena.judge(&format!("{layout:?}: a second CPU rewrites {target:?}"), mark)?;
            arena.evil.reset()?;
            arena.probe()?;
        }
    }
    println!("{faults} faults");
    anyhow::ensure!(faults > 0, "whatever was rewritten, the switch never saw it");
    arena.finish()
}
