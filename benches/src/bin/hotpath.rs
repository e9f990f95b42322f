//! Nanoseconds per frame of the whole path from ring to ring, on one thread: the best of many short rounds, so that a
//! busy machine does not matter.

use std::time::Instant;

use benches::pair::{How, Pair};

const ROUNDS: u32 = 8000;

fn main() -> std::io::Result<()> {
    let lens = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect::<Vec<usize>>();
    let mixed = std::env::args().any(|arg| arg == "mixed");
    let migrating = std::env::args().any(|arg| arg == "migrating");
    for len in if lens.is_empty() { vec![64, 512, 1514] } else { lens } {
        let how = |ring| How { ring, ..How::default() };
        let (near, far) = (measure(len, how(64))?, measure(len, how(1024))?);
        println!("{len:>6} B  {near:6.1} ns/frame from the core's own cache, {far:6.1} from the shared one");
        for stations in [2, 8, 64, 512].into_iter().filter(|_| mixed) {
            let cost = measure(len, How { stations, ..How::default() })?;
            println!("{len:>6} B  {cost:6.1} ns/frame with {stations} pairs of stations in turn");
        }
        for (name, spread) in [("in a row", 1), ("anywhere", 37)].into_iter().filter(|_| migrating) {
            for ring in [64, 1024] {
                let normal = measure(len, How { ring, spread, ..How::default() })?;
                let logged = measure(len, How { ring, spread, logged: true, ..How::default() })?;
                let share = 100.0 * normal / logged;
                println!(
                    "{len:>6} B  {ring} buffers {name}: {logged:.1} ns/frame while logged, {share:.0} % of normal"
                );
            }
        }
    }
    Ok(())
}

/// Rings of 64 buffers stay in the core's cache, those of 1024 do not. Returns nanoseconds per frame.
fn measure(len: usize, how: How) -> std::io::Result<f64> {
    let mut pair = Pair::new(len, how)?;
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        pair.post();
        let began = Instant::now();
        let taken = pair.switch();
        let elapsed = began.elapsed().as_nanos() as f64;
        pair.reap();
        best = best.min(elapsed / f64::from(taken));
    }
    Ok(best)
}
