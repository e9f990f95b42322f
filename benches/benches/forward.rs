//! The whole way from ring to ring, on one thread: load, classify, look up, copy, publish.
#![expect(clippy::expect_used, reason = "what cannot be set up cannot be measured")]

use benches::pair::{How, Pair};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::{Duration, Instant};

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring to ring");
    for len in [64, 512, 1514] {
        let mut pair = Pair::new(len, How::default()).expect("huge pages");
        pair.post();
        let frames = pair.switch();
        pair.reap();
        group.throughput(Throughput::Elements(frames.into()));
        group.bench_function(BenchmarkId::from_parameter(len), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    pair.post();
                    let began = Instant::now();
                    pair.switch();
                    spent += began.elapsed();
                    pair.reap();
                }
                spent
            });
        });
    }
}

criterion_group!(all, forward);
criterion_main!(all);
