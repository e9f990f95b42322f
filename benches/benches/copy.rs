//! The one copy, from guest memory to guest memory, over more memory than the core's own cache holds.
#![expect(clippy::expect_used, reason = "what cannot be set up cannot be measured")]

use benches::driver::{BUFFER, Driver};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const SLOTS: u64 = 1024;
/// Where the driver keeps its buffers.
const BUFFERS: u64 = 1 << 20;

fn copy(c: &mut Criterion) {
    let memories = [(); 2].map(|()| Driver::new(SLOTS as u16, None).expect("huge pages").memory());
    let mut group = c.benchmark_group("copy");
    for len in [64u32, 512, 1514, 2048] {
        group.throughput(Throughput::Bytes(len.into()));
        group.bench_function(BenchmarkId::from_parameter(len), |b| {
            let mut slot = 0;
            let mut locators = [memories[0].locator(0), memories[1].locator(0)];
            b.iter(|| {
                slot = (slot + 1) % SLOTS;
                let at = BUFFERS + slot * BUFFER;
                let [from, to] = locators.each_mut().map(|locator| locator.whole(at, len).expect("memory"));
                black_box(to.write_from(from.source()))
            });
        });
    }
}

criterion_group!(all, copy);
criterion_main!(all);
