//! Two workers and one receiver: what sharing it costs, and what happens to the rest when a worker loses its CPU while it
//! holds the receiver's ring. Needs two CPUs. The receivers' drivers run on the workers, in between.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use benches::driver::Driver;
use sluice::config::FdbConfig;
use sluice::frame::BurstStorage;
use sluice::port::stats::PortStats;
use sluice::port::vhost::queue::{QueueSetup, guest_rx, guest_tx};
use sluice::port::{Link, PortId, RxQueue};
use sluice::status::PortState;
use sluice::switch::DropReason;
use sluice::switch::fdb::{Fdb, Station};
use sluice::switch::forward::Forwarder;
use sluice::switch::snapshot::{PortView, Snapshot};
use sluice::switch::vlan::VlanPolicy;
use sluice::virtq::Vring;

const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;
const RING: u16 = 1024;
const SECONDS: f64 = 2.0;
/// Places of the receivers; those of the senders follow.
const RECEIVERS: u8 = 3;

fn mac(port: u8) -> u64 {
    0x0200_0000_0000 + u64::from(port)
}

fn frame(from: u8, to: u8, len: usize) -> Vec<u8> {
    let mut bytes = [&mac(to).to_be_bytes()[2..], &mac(from).to_be_bytes()[2..], &[8, 0]].concat();
    bytes.resize(len, 0x55);
    bytes
}

fn driver(frame: Option<&[u8]>) -> Driver {
    Driver::new(RING, frame).unwrap_or_else(|e| panic!("{e}"))
}

fn ring(driver: &Driver) -> Vring {
    Vring::new(&driver.config(), driver.memory(), 0).unwrap_or_else(|e| panic!("{e}"))
}

fn setup() -> QueueSetup {
    let stats = Arc::new(PortStats::default());
    QueueSetup { pair: 0, features: VERSION_1 | MRG_RXBUF, kick: None, call: None, stats }
}

fn view(id: u8, setup: &QueueSetup, link: Link) -> Arc<PortView> {
    Arc::new(PortView {
        id: PortId(u16::from(id)),
        network: 0,
        vlan: VlanPolicy::All,
        mtu: usize::MAX / 2,
        mac: None,
        only_source: None,
        policers: sluice::switch::policer::Policers::default(),
        stats: setup.stats.clone(),
        link: Arc::new(link),
    })
}

/// A sender: its driver, its queue and its port.
struct Sender {
    out: Driver,
    rx: Arc<dyn RxQueue>,
    view: Arc<PortView>,
}

impl Sender {
    fn new(id: u8, to: u8, len: usize) -> Self {
        let (mut out, setup) = (driver(Some(&frame(id, to, len))), setup());
        let rx = guest_tx(setup.clone(), &ring(&out));
        out.post(RING - 1);
        Self { out, rx, view: view(id, &setup, Link::down(PortState::Up, None)) }
    }
}

/// A receiver: its driver, which whoever has time runs, its port, and the frames that it has got.
struct Receiver {
    into: Mutex<Driver>,
    view: Arc<PortView>,
    frames: AtomicU64,
}

impl Receiver {
    fn new(id: u8) -> Self {
        let (mut into, setup) = (driver(None), setup());
        let tx = guest_rx(setup.clone(), &ring(&into));
        into.post(RING - 1);
        let view = view(id, &setup, Link { tx: vec![tx], ..Link::down(PortState::Up, None) });
        Self { into: Mutex::new(into), view, frames: AtomicU64::new(0) }
    }

    fn run_driver(&self) {
        if let Ok(mut into) = self.into.try_lock() {
            let count = into.reap();
            into.post(count);
            self.frames.fetch_add(u64::from(count), Ordering::Relaxed);
        }
    }
}

fn pin(cpu: usize) {
    // SAFETY: an all-zero set is valid, and the kernel copies it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// Runs workers, each with senders that send to the receivers given, for a while; returns Mpps by receiver, and the
/// frames dropped at each because its ring was full and for any other reason.
fn run(plans: &[&[u8]], disturb: bool, len: usize) -> Vec<(f64, u64, u64)> {
    let receivers: Vec<_> = (0..RECEIVERS).map(Receiver::new).collect();
    let fdb = Arc::new(Fdb::new(FdbConfig::default()));
    let mut id = RECEIVERS;
    let mut workers: Vec<Vec<Sender>> = Vec::new();
    for plan in plans {
        let mut senders = Vec::new();
        for &to in *plan {
            senders.push(Sender::new(id, to, len));
            id += 1;
        }
        workers.push(senders);
    }
    for port in 0..RECEIVERS {
        fdb.insert(Station { mac: mac(port), vid: 0, network: 0 }, PortId(u16::from(port)), true);
    }
    let views = receivers.iter().map(|receiver| &receiver.view);
    let ports: Vec<_> = views.chain(workers.iter().flatten().map(|sender| &sender.view)).cloned().map(Some).collect();
    let networks = vec![(0..RECEIVERS).map(|port| PortId(u16::from(port))).collect()];
    let snapshot = Snapshot { epoch: 0, ports, networks, holding: Vec::new(), plans: Vec::new(), announcement: None };
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for (cpu, senders) in workers.iter_mut().enumerate() {
            let (snapshot, receivers, fdb, stop) = (&snapshot, &receivers, fdb.clone(), &stop);
            scope.spawn(move || {
                pin(cpu);
                let (mut forwarder, mut storage) = (Forwarder::new(fdb), BurstStorage::default());
                while !stop.load(Ordering::Relaxed) {
                    for sender in senders.iter_mut() {
                        let view = &sender.view;
                        let polled =
                            sender.rx.poll(&mut storage, &mut |burst| forwarder.forward(snapshot, view, burst));
                        polled.unwrap_or_else(|fault| panic!("{fault}"));
                        let count = sender.out.reap();
                        sender.out.post(count);
                    }
                    receivers.iter().for_each(Receiver::run_driver);
                }
            });
        }
        if disturb {
            scope.spawn(|| {
                pin(0);
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        std::thread::sleep(Duration::from_secs_f64(SECONDS));
        stop.store(true, Ordering::Relaxed);
    });
    let seconds = began.elapsed().as_secs_f64();
    let describe = |receiver: &Receiver| {
        let full = receiver.view.stats.drops(DropReason::Full);
        let all: u64 = DropReason::ALL.iter().map(|reason| receiver.view.stats.drops(*reason)).sum();
        (receiver.frames.load(Ordering::Relaxed) as f64 / seconds / 1e6, full, all - full)
    };
    receivers.iter().map(describe).collect()
}

/// A name, the workers with the receivers of their senders, and whether the first one has to share its CPU.
type Case = (&'static str, &'static [&'static [u8]], bool);

const CASES: [Case; 6] = [
    ("one worker", &[&[0]], false),
    ("two workers, a receiver each", &[&[0], &[1]], false),
    ("two workers, one receiver", &[&[0], &[0]], false),
    ("the second one with another receiver", &[&[0], &[0, 1]], false),
    ("the same, the first one disturbed", &[&[0], &[0, 1]], true),
    ("apart, the first one disturbed", &[&[0], &[2, 1]], true),
];

fn main() {
    let lens = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect::<Vec<usize>>();
    for len in if lens.is_empty() { vec![64, 1514] } else { lens } {
        println!("{len} B, Mpps at each receiver (frames dropped: full, other)");
        for (name, plans, disturb) in CASES {
            let mut rounds: Vec<_> = (0..3).map(|_| run(plans, disturb, len)).collect();
            rounds.sort_by(|a, b| a.iter().map(|r| r.0).sum::<f64>().total_cmp(&b.iter().map(|r| r.0).sum()));
            let median = rounds[1].iter().map(|(rate, full, other)| format!("{rate:5.2} ({full}, {other})"));
            println!("  {name:<38} {}", median.collect::<Vec<_>>().join("  "));
        }
    }
}
