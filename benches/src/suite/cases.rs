//! The questions that our own generator answers.

use anyhow::{Context, Result, ensure};
use e2e::scratch::Scratch;
use std::time::Duration;

use super::peers::{Job, Peer};
use super::results::{Metric, Plot};
use super::rounds::{Settings, Work};
use crate::load::frames::Sizes;
use crate::load::{Plan, Report, Rig};

/// How long a switch may take to connect to all ports: OVS needs its time for hundreds of them.
const CONNECT_LIMIT: Duration = Duration::from_secs(90);
/// Share of the frames that may be lost under a load that never gives more than fits.
const LOSS: f64 = 0.001;

/// One run of a plan against a switch on these CPUs.
///
/// # Errors
/// If the switch cannot be started, or what arrives is not what was sent.
pub fn run(peer: Peer, plan: &Plan, cpus: &[usize], settings: &Settings) -> Result<Report> {
    let scratch = Scratch::new("load")?;
    let plan = Plan { seconds: settings.seconds, cpu: Some(settings.load_cpu), ..plan.clone() };
    let count = plan.total_ports();
    let sockets: Vec<_> = (0..count).map(|port| Rig::socket(scratch.path(), port)).collect();
    let rig = Rig::listen(plan.clone(), scratch.path())?;
    let job = Job { sockets: &sockets, folder: scratch.path(), cpus, macs: plan.macs.max(count), queues: plan.queues };
    let running = peer.start(&job)?;
    // On a thread of its own, since it gets pinned.
    let worker = std::thread::spawn(move || {
        let mut generator = rig.connect(CONNECT_LIMIT)?;
        generator.run()
    });
    let report = worker.join().map_err(|_| anyhow::anyhow!("the generator has ended early"))?;
    drop(running);
    let report = report.with_context(|| format!("against {peer}"))?;
    ensure!(report.misplaced == 0 && report.wrong_length == 0, "frames arrived damaged: {report:?}");
    ensure!(report.received > 0 && report.verified > 0, "nothing that was sent has arrived: {report:?}");
    Ok(report)
}

fn metric(name: &str, unit: &str, plot: Plot) -> Metric {
    Metric { name: name.to_owned(), unit: unit.to_owned(), plot }
}

fn throughput_metrics() -> Vec<Metric> {
    vec![metric("throughput", "Mpps", Plot::Bars), metric("throughput", "Gbit/s", Plot::None)]
}

/// A closed loop must not lose anything; if it does, the figure is worth nothing.
fn lossless(report: &Report) -> Result<Vec<f64>> {
    let limit = (report.sent as f64 * LOSS).max(512.0);
    ensure!((report.lost as f64) < limit, "{} of {} frames were lost", report.lost, report.sent);
    Ok(vec![report.mpps, report.gbps])
}

fn sizes(quick: bool) -> Vec<Sizes> {
    let all = [64, 128, 256, 512, 1024, 1514].map(Sizes::Fixed);
    if quick { vec![all[0], all[5]] } else { all.into_iter().chain([Sizes::Imix]).collect() }
}

/// Throughput by size of frames, split rings and packed rings.
pub fn throughput(peers: &[Peer], quick: bool) -> Vec<Work> {
    let how = "Two ports, one queue each, 256 frames in flight each way, the generator on one CPU and the switch on the \
               other; frames and descriptors stand ready, and only indices move.";
    let mut split = Work::new("throughput", "Throughput by frame size, split ring", "frame", how, throughput_metrics());
    let mut packed =
        Work::new("throughput-packed", "Throughput by frame size, packed ring", "frame", how, throughput_metrics());
    for size in sizes(quick) {
        for &peer in peers {
            let plan = Plan { size, ..Plan::default() };
            let row = size.to_string();
            split.case(&row, peer.to_string(), closed(peer, plan.clone()));
            if peer.knows_all_rings() && !quick {
                packed.case(&row, peer.to_string(), closed(peer, Plan { packed: true, ..plan }));
            }
        }
    }
    let mut touching = Work::new(
        "touch",
        "Throughput with a driver that touches its frames",
        "frame",
        "As above, but the generator reads a line of each frame that it receives and writes one of each that it sends.",
        throughput_metrics(),
    );
    for size in [64, 1514].map(Sizes::Fixed) {
        for &peer in peers {
            let plan = Plan { size, touch: true, ..Plan::default() };
            touching.case(size.to_string(), peer.to_string(), closed(peer, plan));
        }
    }
    if quick { vec![split] } else { vec![split, packed, touching] }
}

fn closed(peer: Peer, plan: Plan) -> impl Fn(&Settings) -> Result<Vec<f64>> {
    move |settings| lossless(&run(peer, &plan, &[settings.switch_cpu], settings)?)
}

/// Latency by offered load.
pub fn latency(peers: &[Peer], quick: bool) -> Vec<Work> {
    let how = "64 B, two ports, each offering half of the load at a steady pace; the time from when a frame was due to \
               when the generator sees it, of one frame in sixteen. Where less arrives than was offered, the point is \
               beyond what the switch can do.";
    let metrics = vec![
        metric("received", "Mpps", Plot::None),
        metric("p50", "µs", Plot::Log),
        metric("p99", "µs", Plot::Log),
        metric("p99.9", "µs", Plot::Log),
        metric("lost", "% of sent", Plot::None),
    ];
    let mut work = Work::new("latency", "Latency by offered load", "Mpps offered", how, metrics);
    let loads: &[f64] = if quick { &[1.0] } else { &[0.1, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0] };
    for &load in loads {
        for &peer in peers {
            work.case(load.to_string(), peer.to_string(), move |settings| {
                let plan = Plan { rate: Some(load), latency: Some(16), ..Plan::default() };
                let report = run(peer, &plan, &[settings.switch_cpu], settings)?;
                let latency = report.latency.context("no latencies were sampled")?;
                let us = |ns: u64| ns as f64 / 1e3;
                let lost = report.lost as f64 / report.sent.max(1) as f64 * 100.0;
                Ok(vec![report.mpps, us(latency.p50), us(latency.p99), us(latency.p999), lost])
            });
        }
    }
    vec![work]
}

/// Throughput by number of ports, of addresses, and of ports that only stand beside.
pub fn scaling(peers: &[Peer], quick: bool) -> Vec<Work> {
    let how = "64 B, split rings, ports in pairs, 256 frames in flight each way.";
    let throughput = || vec![metric("throughput", "Mpps", Plot::Lines)];
    let mut ports = Work::new("ports", "Throughput by number of ports", "ports", how, throughput());
    let mut macs = Work::new("macs", "Throughput by number of MAC addresses", "addresses", how, throughput_metrics());
    let mut idle = Work::new("idle", "Throughput beside idle ports", "idle ports", how, throughput_metrics());
    let only = |plan: Plan, peer| {
        let run = closed(peer, plan);
        move |settings: &Settings| Ok(run(settings)?[..1].to_vec())
    };
    for &peer in peers {
        let counts: &[u16] = if quick { &[2, 16] } else { &[2, 4, 8, 16, 32, 64] };
        for &count in counts.iter().filter(|count| peer.has_room_for(**count)) {
            ports.case(count.to_string(), peer.to_string(), only(Plan { ports: count, ..Plan::default() }, peer));
        }
    }
    for &peer in peers.iter().filter(|peer| peer.learns()) {
        let plans: &[(u16, u32)] = if quick {
            &[(2, 2), (2, 1000)]
        } else {
            &[(2, 2), (2, 1000), (2, 10_000), (64, 64), (64, 10_000), (2, 100_000)]
        };
        for &(count, addresses) in plans {
            let plan = Plan { ports: count, macs: addresses, ..Plan::default() };
            macs.case(format!("{addresses} over {count} ports"), peer.to_string(), closed(peer, plan));
        }
        let counts: &[u16] = if quick { &[0, 32] } else { &[0, 64, 256] };
        for &count in counts {
            idle.case(count.to_string(), peer.to_string(), closed(peer, Plan { idle: count, ..Plan::default() }));
        }
    }
    vec![ports, macs, idle]
}

/// Throughput beside a receiver that takes nothing.
pub fn stalled(peers: &[Peer], quick: bool) -> Vec<Work> {
    let how = "64 B, two ports as above; a third sends a million frames per second (or a tenth of that as broadcast) to \
               a fourth, which takes them or has stopped doing so.";
    let metrics = vec![metric("throughput", "Mpps", Plot::Bars)];
    let mut work = Work::new("stalled", "Throughput beside a stalled receiver", "fourth port", how, metrics);
    let kinds: &[(&str, f64, bool)] =
        if quick { &[("1 Mpps", 1.0, false)] } else { &[("1 Mpps", 1.0, false), ("broadcast", 0.1, true)] };
    for &peer in peers.iter().filter(|peer| peer.learns()) {
        for &(name, rate, broadcast) in kinds {
            for stalled in [false, true] {
                let row = format!("{name}, {}", if stalled { "stalled" } else { "taken" });
                work.case(row, peer.to_string(), move |settings| {
                    let plan = Plan { flood: Some(rate), stalled, broadcast, ..Plan::default() };
                    Ok(vec![run(peer, &plan, &[settings.switch_cpu], settings)?.mpps])
                });
            }
        }
    }
    vec![work]
}

/// One worker and two, with four ports.
pub fn workers(peers: &[Peer]) -> Vec<Work> {
    if !peers.contains(&Peer::Ours) {
        return Vec::new();
    }
    // As many frames in flight as the workers move between two moments of the generator, or they would wait for it.
    let how = "64 B, four ports, 2048 frames in flight each way, rings of 4096. With two CPUs the generator shares one \
               with the second worker: it wakes up for a moment each 30 µs, in real time, and the share of a CPU that \
               it takes is accounted for: per free CPU means throughput over CPUs that are left to the workers.";
    let metrics = vec![
        metric("throughput", "Mpps", Plot::None),
        metric("generator", "% of a CPU", Plot::None),
        metric("per free CPU, times workers", "Mpps", Plot::Bars),
    ];
    let mut work = Work::new("workers", "Throughput by number of workers", "workers", how, metrics);
    for count in [1, 2] {
        work.case(count.to_string(), Peer::Ours.to_string(), move |settings| {
            let plan = Plan { ports: 4, ring: 4096, window: 2048, nap: Some(30), ..Plan::default() };
            let cpus = [settings.switch_cpu, settings.load_cpu];
            let report = run(Peer::Ours, &plan, &cpus[..count], settings)?;
            lossless(&report)?;
            let workers = count as f64;
            let free = if count == 1 { 1.0 } else { workers - report.generator_cpu };
            Ok(vec![report.mpps, report.generator_cpu * 100.0, report.mpps / free * workers])
        });
    }
    vec![work]
}
