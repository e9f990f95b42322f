//! Deciding where the frames of a burst go, all of them to a port that takes frames and does nothing with them.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sluice::config::FdbConfig;
use sluice::frame::{Burst, BurstStorage};
use sluice::limits::BURST;
use sluice::mem::SourceSegment;
use sluice::port::stats::PortStats;
use sluice::port::{Link, PortId, TxQueue};
use sluice::status::PortState;
use sluice::switch::convert::Scratch;
use sluice::switch::fdb::{Fdb, Station};
use sluice::switch::forward::Forwarder;
use sluice::switch::policer::Policers;
use sluice::switch::snapshot::{PortView, Snapshot};
use sluice::switch::vlan::VlanPolicy;
use sluice::virtq::Fault;
use std::hint::black_box;
use std::sync::Arc;

/// Bursts in turn.
const BURSTS: usize = 32;
const HEADER: usize = 12;
const VLAN: u16 = 100;

#[derive(Debug)]
struct Sink;

impl TxQueue for Sink {
    fn send(&self, _: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault> {
        scratch.copies.delivered += frames.len() as u64;
        Ok(())
    }
}

fn port(id: u16) -> Arc<PortView> {
    Arc::new(PortView {
        id: PortId(id),
        network: 0,
        vlan: VlanPolicy::All,
        mtu: usize::MAX / 2,
        mac: None,
        only_source: None,
        policers: Policers::default(),
        stats: Arc::new(PortStats::default()),
        link: Arc::new(Link { tx: vec![Arc::new(Sink)], ..Link::down(PortState::Up, None) }),
    })
}

fn mac(side: u64, station: usize) -> u64 {
    0x0200_0000_0000 | side << 16 | station as u64
}

/// A frame of 64 bytes behind its header, from a station of one side to that of the same number on the other.
fn frame(station: usize, vlan: Option<u16>) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    for side in [1, 0] {
        bytes.extend(&mac(side, station).to_be_bytes()[2..]);
    }
    if let Some(vid) = vlan {
        bytes.extend([0x81, 0x00]);
        bytes.extend(vid.to_be_bytes());
    }
    bytes.extend([0x08, 0x00]);
    bytes.resize(HEADER + 64, 0x55);
    bytes
}

fn load<'m>(storage: &'m mut BurstStorage, frames: &'m [Vec<u8>]) -> Burst<'m> {
    let mut burst = storage.begin();
    for bytes in frames {
        let mut frame = burst.start(HEADER);
        assert!(frame.push(SourceSegment::from_slice(bytes)) && frame.finish().is_ok());
    }
    burst
}

fn classify(c: &mut Criterion) {
    let mut group = c.benchmark_group("classify");
    group.throughput(Throughput::Elements(BURST as u64));
    let kinds =
        [("one flow", 1, None), ("2 stations", 2, None), ("1000 stations", 1000, None), ("tagged", 1, Some(VLAN))];
    for (name, stations, vlan) in kinds {
        let fdb = Arc::new(Fdb::new(FdbConfig::default()));
        for station in 0..stations {
            fdb.learn(Station { mac: mac(1, station), vid: vlan.unwrap_or(0), network: 0 }, PortId(1));
        }
        // A third one would get what is flooded.
        let ports = [0, 1, 2].map(port);
        let snapshot = Snapshot {
            epoch: 0,
            ports: ports.iter().cloned().map(Some).collect(),
            networks: vec![vec![PortId(0), PortId(1), PortId(2)]],
            holding: Vec::new(),
            plans: Vec::new(),
            announcement: None,
        };
        let mut forwarder = Forwarder::new(fdb);
        let frames: Vec<_> = (0..BURSTS * BURST).map(|number| frame(number % stations, vlan)).collect();
        let mut storage: Vec<_> = (0..BURSTS).map(|_| BurstStorage::default()).collect();
        let mut bursts: Vec<_> =
            storage.iter_mut().zip(frames.chunks(BURST)).map(|(storage, frames)| load(storage, frames)).collect();
        // Stations are learned, and from then on known.
        bursts.iter_mut().for_each(|burst| forwarder.forward(&snapshot, &ports[0], burst));
        assert_eq!(forwarder.meters().1.delivered, frames.len() as u64, "{name}: each frame goes to one port");
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                next = (next + 1) % BURSTS;
                forwarder.forward(&snapshot, &ports[0], black_box(&mut bursts[next]));
            });
        });
    }
}

criterion_group!(all, classify);
criterion_main!(all);
