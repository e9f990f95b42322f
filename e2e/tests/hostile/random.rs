//! Frontends that do what comes to their mind, from a seed (`SLUICE_FUZZ_SEED`), for `SLUICE_FUZZ_SECONDS`.

use anyhow::{Context, Result};
use e2e::hostile::arena::{Arena, PEER_MAC};
use e2e::hostile::random::Random;
use std::time::{Duration, Instant};

/// Things done in a row before the port has to be of use again.
const ROUND: usize = 150;

fn variable(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text}")),
        Err(_) => Ok(otherwise),
    }
}

#[test]
fn whatever_comes_to_its_mind() -> Result<()> {
    let time = Duration::from_secs(variable("SLUICE_FUZZ_SECONDS", 4)?);
    let first = variable("SLUICE_FUZZ_SEED", 1)?;
    // Alone with its peer, since a flood of frames is nobody's fault.
    let mut arena = Arena::start(",network=dark")?;
    let (begin, mut done) = (Instant::now(), std::collections::BTreeMap::new());
    for seed in first.. {
        if begin.elapsed() >= time {
            break;
        }
        round(&mut arena, seed, &mut done).with_context(|| format!("seed {seed}"))?;
    }
    println!("done: {done:?}");
    arena.finish()
}

fn round(arena: &mut Arena, seed: u64, done: &mut std::collections::BTreeMap<&str, u64>) -> Result<()> {
    let mut random = Random::new(seed, PEER_MAC)?;
    let mark = arena.mark();
    let setup = random.setup();
    arena.evil.reconnect(setup)?;
    for _ in 0..ROUND {
        if !random.act(&mut arena.evil)? {
            break;
        }
        while arena.peer.receive().is_some() {}
    }
    for (name, count) in random.done {
        *done.entry(name).or_default() += count;
    }
    // A header that is never completed is only given up after a while.
    arena.evil.reconnect(setup)?;
    arena.judge(&format!("seed {seed}"), mark)?;
    arena.probe()
}
