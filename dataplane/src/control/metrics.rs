//! Metrics in the OpenMetrics text format. Counters are read when asked for; nothing is counted here.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, EncodeMetric,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use sluice_daemon::pages::Pages;

use super::Controller;
use crate::status::{CyclesStatus, PortState, PortStatus, QueueStatus, TotalsStatus, WorkerCycles, WorkerStatus};
use crate::switch::DropReason;

/// Name, help and value of a metric of each `T`. The format adds `_total` to the names of counters.
type Metric<T, V> = (&'static str, &'static str, fn(&T) -> V);

const PORT_COUNTERS: &[Metric<PortStatus, u64>] = &[
    ("sluice_port_rx_frames", "Frames received from the port", |port| port.rx_frames),
    ("sluice_port_rx_bytes", "Bytes received from the port", |port| port.rx_bytes),
    ("sluice_port_tx_frames", "Frames sent to the port", |port| port.tx_frames),
    ("sluice_port_tx_bytes", "Bytes sent to the port", |port| port.tx_bytes),
    ("sluice_port_connects", "Times the other side connected", |port| port.connects),
    ("sluice_port_faults", "Faults of the other side", |port| port.faults),
];

const QUEUE_COUNTERS: &[Metric<QueueStatus, u64>] = &[
    ("sluice_queue_rx_frames", "Frames received from the queue pair", |queue| queue.rx_frames),
    ("sluice_queue_rx_bytes", "Bytes received from the queue pair", |queue| queue.rx_bytes),
    ("sluice_queue_tx_frames", "Frames sent to the queue pair", |queue| queue.tx_frames),
    ("sluice_queue_tx_bytes", "Bytes sent to the queue pair", |queue| queue.tx_bytes),
    ("sluice_queue_notifications", "Notifications sent to the guest", |queue| queue.notifications),
    ("sluice_queue_rx_cycles", "Time stamp counter cycles spent on frames received", |queue| queue.rx_cycles),
];

const WORKER_COUNTERS: &[Metric<WorkerStatus, u64>] = &[
    ("sluice_worker_rx_frames", "Frames received by the worker", |worker| worker.rx_frames),
    ("sluice_worker_bursts", "Bursts that were not empty", |worker| worker.bursts),
    ("sluice_worker_delivered_frames", "Frames written to receivers", |worker| worker.delivered),
    ("sluice_worker_copies", "Times that the payload of a delivered frame was copied", |worker| worker.copies),
    ("sluice_worker_sleeps", "Times the worker slept", |worker| worker.sleeps),
];

const WORKER_SECONDS: &[Metric<WorkerStatus, f64>] = &[
    ("sluice_worker_busy_seconds", "Time spent on frames", |worker| seconds(worker.busy_ns)),
    ("sluice_worker_asleep_seconds", "Time asleep", |worker| seconds(worker.asleep_ns)),
    ("sluice_worker_up_seconds", "Time since the worker started", |worker| seconds(worker.up_ns)),
];

const STATES: &[(PortState, &str)] = &[
    (PortState::Connecting, "connecting"),
    (PortState::Down, "down"),
    (PortState::Up, "up"),
    (PortState::Failed, "failed"),
];

impl Pages for Controller {
    fn metrics(&self) -> Result<String, fmt::Error> {
        let switch = self.switch();
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Snapshot {
            ports: switch.ports(),
            workers: switch.workers(),
            cycles: switch.cycles(),
            fdb_entries: switch.fdb_len() as u64,
            totals: switch.totals(),
            uptime: self.uptime().as_secs_f64(),
        }));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn ready(&self) -> Result<(), &'static str> {
        if self.is_ready() { Ok(()) } else { Err("not ready") }
    }
}

/// What is told in one answer.
#[derive(Debug)]
struct Snapshot {
    ports: Vec<PortStatus>,
    workers: Vec<WorkerStatus>,
    cycles: CyclesStatus,
    fdb_entries: u64,
    totals: TotalsStatus,
    uptime: f64,
}

impl Collector for Snapshot {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_switch(&mut out)?;
        self.encode_ports(&mut out)?;
        self.encode_queues(&mut out)?;
        self.encode_workers(&mut out)?;
        self.encode_cycles(&mut out)
    }
}

impl Snapshot {
    fn encode_switch(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        gauges(out, "sluice_build", "The switch, always 1", [(version, 1)])?;
        let unlabelled = [("", ""); 0];
        gauges(out, "sluice_up_seconds", "Time since the switch started", [(unlabelled, self.uptime)])?;
        let entries = [(unlabelled, self.fdb_entries)];
        gauges(out, "sluice_fdb_entries", "Addresses in the forwarding table", entries)?;
        let held = [(unlabelled, self.totals.held_frames)];
        gauges(out, "sluice_held_frames", "Frames kept for guests that migrate", held)?;
        let help = "Frames that came into being in the switch: copies for further receivers, segments, announcements";
        counters(out, "sluice_made_frames", help, [(unlabelled, self.totals.made_frames)])?;
        let merged = [(unlabelled, self.totals.merged_frames)];
        counters(out, "sluice_merged_frames", "Frames put into others", merged)
    }

    fn encode_ports(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let labels = |port: &PortStatus| [("port", port.name.clone()), ("network", port.network.clone())];
        let with = |port: &PortStatus, key: &'static str, value: &str| {
            let [name, network] = labels(port);
            [name, network, (key, value.to_owned())]
        };
        for (name, help, value) in PORT_COUNTERS {
            counters(out, name, help, self.ports.iter().map(|port| (labels(port), value(port))))?;
        }
        // Those that never happened too, since a rate needs a zero to start from.
        let drops = self.ports.iter().flat_map(|port| {
            DropReason::ALL.iter().map(move |reason| {
                let count = port.drops.get(reason.name()).copied().unwrap_or(0);
                (with(port, "reason", reason.name()), count)
            })
        });
        counters(out, "sluice_port_drops", "Frames dropped, by reason", drops)?;
        let memory = self.ports.iter().map(|port| (labels(port), port.memory_bytes));
        gauges(out, "sluice_port_memory_bytes", "Guest memory mapped", memory)?;
        let states = self.ports.iter().flat_map(|port| {
            STATES.iter().map(move |(state, word)| {
                let [name, network, state_label] = with(port, "state", word);
                ([name, network, ("kind", port.kind.to_owned()), state_label], u64::from(port.state == *state))
            })
        });
        gauges(out, "sluice_port_state", "1 for the state the port is in, 0 for the others", states)
    }

    fn encode_queues(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in QUEUE_COUNTERS {
            let samples = self.ports.iter().flat_map(|port| {
                port.queues
                    .iter()
                    .map(move |queue| ([("port", port.name.clone()), ("queue", queue.index.to_string())], value(queue)))
            });
            counters(out, name, help, samples)?;
        }
        Ok(())
    }

    fn encode_workers(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let labels = |worker: &WorkerStatus| self.worker_labels(worker.id);
        for (name, help, value) in WORKER_COUNTERS {
            counters(out, name, help, self.workers.iter().map(|worker| (labels(worker), value(worker))))?;
        }
        for (name, help, value) in WORKER_SECONDS {
            counters(out, name, help, self.workers.iter().map(|worker| (labels(worker), value(worker))))?;
        }
        let queues = self.workers.iter().map(|worker| (labels(worker), worker.queues as u64));
        gauges(out, "sluice_worker_queues", "Queues the worker serves", queues)
    }

    /// The same for all metrics of workers, so that queries can divide one by another.
    fn worker_labels(&self, id: usize) -> [(&'static str, String); 2] {
        let cpu = self.workers.iter().find(|worker| worker.id == id).and_then(|worker| worker.cpu);
        [("worker", id.to_string()), ("cpu", cpu.map_or(String::new(), |cpu| cpu.to_string()))]
    }

    fn encode_cycles(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let worker = |worker: &WorkerCycles| self.worker_labels(worker.id);
        let stages = self.cycles.workers.iter().flat_map(|counts| {
            counts.stages.iter().map(move |(stage, cycles)| {
                let [id, cpu] = worker(counts);
                ([id, cpu, ("stage", (*stage).to_owned())], *cycles)
            })
        });
        let help = "Time stamp counter cycles of the passes that were timed, by stage";
        counters(out, "sluice_worker_stage_cycles", help, stages)?;
        let sampled = self.cycles.workers.iter().map(|counts| (worker(counts), counts.sampled_frames));
        counters(out, "sluice_worker_sampled_frames", "Frames of the passes that were timed by stage", sampled)?;
        let cycles = self.cycles.workers.iter().map(|counts| (worker(counts), counts.busy));
        counters(out, "sluice_worker_busy_cycles", "Time stamp counter cycles spent on frames", cycles)?;
        let help = "Frames of the bursts that were not empty";
        let mut metric = out.encode_descriptor("sluice_worker_burst_frames", help, None, MetricType::Histogram)?;
        for counts in &self.cycles.workers {
            let last = counts.bursts.len().saturating_sub(1);
            let bound = |place: usize| if place == last { f64::INFINITY } else { (1u64 << place) as f64 };
            let buckets: Vec<_> =
                counts.bursts.iter().enumerate().map(|(place, count)| (bound(place), *count)).collect();
            let (sum, count) = (counts.frames as f64, counts.bursts.iter().sum());
            metric.encode_family(&worker(counts))?.encode_histogram::<[(&str, &str); 0]>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

fn counters<L: EncodeLabelSet, V: EncodeCounterValue + Clone>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, V)>,
) -> fmt::Result {
    let mut metric = out.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, V)>,
) -> fmt::Result {
    let mut metric = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}
