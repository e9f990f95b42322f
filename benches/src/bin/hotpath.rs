//! Nanoseconds per frame of the whole path from ring to ring, on one thread: the best of many short rounds, so that a
//! busy machine does not matter.

use std::time::Instant;

use benches::pair::Pair;

const ROUNDS: u32 = 8000;

fn main() -> std::io::Result<()> {
    let lens = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect::<Vec<usize>>();
    for len in if lens.is_empty() { vec![64, 512, 1514] } else { lens } {
        let (near, far) = (measure(len, 64)?, measure(len, 1024)?);
        println!("{len:>6} B  {near:6.1} ns/frame from the core's own cache, {far:6.1} from the shared one");
    }
    Ok(())
}

/// Rings of 64 buffers stay in the core's cache, those of 1024 do not.
fn measure(len: usize, ring: u16) -> std::io::Result<f64> {
    let mut pair = Pair::new(len, ring)?;
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
