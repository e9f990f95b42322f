//! One burst through a split ring, from the switch's side: looking at it, taking it, giving it back.
#![expect(clippy::expect_used, reason = "what cannot be set up cannot be measured")]

use benches::driver::Driver;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sluice::limits::BURST;
use sluice::virtq::Vring;
use sluice::virtq::chain::Direction;
use sluice::virtq::ring::{Ahead, Ring, Work};
use std::hint::black_box;

fn poll_empty(c: &mut Criterion) {
    let driver = Driver::new(256, Some(&[0; 64])).expect("huge pages");
    let Ok(Vring::Split(ring)) = Vring::new(&driver.config(), driver.memory(), 0) else {
        panic!("a split ring");
    };
    c.bench_function("ring/poll empty", |b| {
        b.iter(|| ring.lock(Direction::FromGuest).available());
    });
}

fn burst(c: &mut Criterion) {
    let mut driver = Driver::new(256, Some(&[0; 64])).expect("huge pages");
    let Ok(Vring::Split(ring)) = Vring::new(&driver.config(), driver.memory(), 0) else {
        panic!("a split ring");
    };
    let mut group = c.benchmark_group("ring");
    group.throughput(Throughput::Elements(BURST as u64));
    group.bench_function("take and publish a burst", |b| {
        b.iter_batched(
            || {
                driver.reap();
                driver.post(BURST as u16);
            },
            |()| {
                let mut work = ring.lock(Direction::FromGuest);
                let mut ahead = Ahead::default();
                work.look_ahead(&mut ahead, BURST).expect("no fault");
                for _ in 0..BURST {
                    let (chain, buffer) = work.take_ahead(&ahead).expect("a chain");
                    black_box(buffer);
                    work.complete(chain, 0);
                }
                assert!(work.publish());
                black_box(work.needs_notification())
            },
            BatchSize::PerIteration,
        );
    });
}

criterion_group!(all, poll_empty, burst);
criterion_main!(all);
