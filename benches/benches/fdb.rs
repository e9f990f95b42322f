//! The forwarding table: looking up and refreshing stations, few and many.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sluice::config::FdbConfig;
use sluice::port::PortId;
use sluice::switch::fdb::{Fdb, Station};
use std::hint::black_box;

/// Stations asked for in a row.
const ASKED: u64 = 1024;

fn station(number: u64) -> Station {
    Station { mac: 0x0200_0000_0000 | number << 8 | number >> 8, vid: 0, network: 0 }
}

fn table(stations: u64) -> Fdb {
    let fdb = Fdb::new(FdbConfig { per_port: 65_536, ..FdbConfig::default() });
    for number in 0..stations {
        fdb.learn(station(number), PortId((number % 64) as u16));
    }
    fdb
}

fn fdb(c: &mut Criterion) {
    let mut group = c.benchmark_group("fdb");
    group.throughput(Throughput::Elements(ASKED));
    for stations in [2, 1000, 50_000] {
        let fdb = table(stations);
        // A step that visits all, far from each other.
        let asked: Vec<_> = (0..ASKED).map(|turn| turn * 7919 % stations).collect();
        group.bench_function(BenchmarkId::new("look up", stations), |b| {
            b.iter(|| asked.iter().filter_map(|number| fdb.lookup(station(black_box(*number)))).count());
        });
        group.bench_function(BenchmarkId::new("hear again", stations), |b| {
            b.iter(|| {
                for number in &asked {
                    black_box(fdb.learn(station(black_box(*number)), PortId((number % 64) as u16)));
                }
            });
        });
    }
    group.bench_function("learn", |b| {
        b.iter_batched(
            || table(0),
            |fdb| {
                for number in 0..ASKED {
                    black_box(fdb.learn(station(number), PortId(1)));
                }
                fdb
            },
            criterion::BatchSize::LargeInput,
        );
    });
}

criterion_group!(all, fdb);
criterion_main!(all);
