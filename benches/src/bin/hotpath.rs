//! Nanoseconds per frame of the whole path from ring to ring, on one thread: no cache line crosses a core here, so what
//! is left is our own work. The best of many short rounds, so that a busy machine does not matter.

use std::sync::Arc;
use std::time::Instant;

use benches::driver::Driver;
use sluice::config::FdbConfig;
use sluice::frame::BurstStorage;
use sluice::port::stats::PortStats;
use sluice::port::vhost::queue::{QueueSetup, guest_rx, guest_tx};
use sluice::port::{Link, PortId, RxEntry, RxQueue};
use sluice::status::PortState;
use sluice::switch::fdb::Fdb;
use sluice::switch::forward::Forwarder;
use sluice::switch::snapshot::{PortView, Snapshot};
use sluice::switch::vlan::VlanPolicy;
use sluice::virtq::Vring;

const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;

fn frame(from: u8, to: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x08, 0x00];
    bytes.resize(len, 0x55);
    bytes
}

struct Side {
    out: Driver,
    into: Driver,
    rx: Arc<dyn RxQueue>,
    view: Arc<PortView>,
}

fn side(id: u8, len: usize, ring: u16) -> Side {
    let fail = |e: std::io::Error| -> Driver { panic!("{e}") };
    let out = Driver::new(ring, Some(&frame(id, 1 - id, len))).unwrap_or_else(fail);
    let into = Driver::new(ring, None).unwrap_or_else(fail);
    let stats = Arc::new(PortStats::default());
    let setup = QueueSetup { pair: 0, features: VERSION_1 | MRG_RXBUF, kick: None, call: None, stats: stats.clone() };
    let ring = |driver: &Driver| Vring::new(&driver.config(), driver.memory(), 0).unwrap_or_else(|e| panic!("{e}"));
    let rx = guest_tx(setup.clone(), &ring(&out));
    let tx = guest_rx(setup, &ring(&into));
    let entry = RxEntry { pair: 0, queue: rx.clone() };
    let link = Link { rx: vec![entry], tx: vec![tx], ..Link::down(PortState::Up, None) };
    let view = PortView {
        id: PortId(u16::from(id)),
        network: 0,
        vlan: VlanPolicy::All,
        mtu: usize::MAX / 2,
        mac: None,
        only_source: None,
        policers: sluice::switch::policer::Policers::default(),
        stats: stats.clone(),
        link: Arc::new(link),
    };
    Side { out, into, rx, view: Arc::new(view) }
}

fn main() {
    let lens = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect::<Vec<usize>>();
    for len in if lens.is_empty() { vec![64, 512, 1514] } else { lens } {
        let (near, far) = (measure(len, 64), measure(len, 1024));
        println!("{len:>6} B  {near:6.1} ns/frame from the core's own cache, {far:6.1} from the shared one");
    }
}

/// Rings of 64 buffers stay in the core's cache, those of 1024 do not.
fn measure(len: usize, ring: u16) -> f64 {
    let mut sides = [side(0, len, ring), side(1, len, ring)];
    let ports = sides.iter().map(|side| Some(side.view.clone())).collect();
    let snapshot =
        Snapshot { epoch: 0, ports, networks: vec![vec![PortId(0), PortId(1)]], plans: Vec::new(), announcement: None };
    let mut forwarder = Forwarder::new(Arc::new(Fdb::new(FdbConfig::default())));
    let mut storage = BurstStorage::default();
    let frames = (ring / 2).min(256);
    let mut best = f64::MAX;
    for round in 0..8000 {
        for side in &mut sides {
            side.out.post(frames);
            side.into.post(frames);
        }
        let began = Instant::now();
        let mut taken = 0;
        loop {
            let before = taken;
            for side in &sides {
                let polled = side.rx.poll(&mut storage, &mut |burst| forwarder.forward(&snapshot, &side.view, burst));
                taken += polled.unwrap_or_else(|fault| panic!("{fault}"));
            }
            if taken == before {
                break;
            }
        }
        let elapsed = began.elapsed().as_nanos() as f64;
        for side in &mut sides {
            assert_eq!(side.out.reap(), frames);
            // The very first frames are learning, and flood.
            let arrived = side.into.reap();
            assert!(round == 0 || arrived == frames, "{arrived} of {frames} arrived");
        }
        best = best.min(elapsed / f64::from(taken as u32));
    }
    best
}
