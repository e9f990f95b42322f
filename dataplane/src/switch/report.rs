//! What the switch tells of ports, addresses, workers and their load.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::capture::{Capture, CaptureOptions};
use crate::config::{PortConfig, VlanMode};
use crate::limits::MAX_QUEUE_PAIRS;
use crate::port::Link;
use crate::port::stats::PortStats;
use crate::status::{
    CyclesStatus, FdbEntryStatus, PortCycles, PortState, PortStatus, QueueLoadStatus, QueueStatus, WorkerCycles,
    WorkerStatus,
};
use crate::switch::{DropReason, Entry, PortError, Switch, Tables, fdb};
use crate::sync::lock;
use crate::wire::MacAddr;
use crate::worker::WorkerShared;
use crate::worker::meter::Stage;

impl Switch {
    /// Configurations of all ports, in the order they were added.
    pub fn port_configs(&self) -> Vec<PortConfig> {
        let tables = lock(&self.inner.tables);
        tables.order.iter().filter_map(|name| tables.ports.get(name)).map(|entry| entry.config.clone()).collect()
    }

    /// All ports, sorted by name.
    pub fn ports(&self) -> Vec<PortStatus> {
        self.ports_where(|_| true)
    }

    /// Ports whose configuration is as wanted, sorted by name.
    pub fn ports_where(&self, wanted: impl Fn(&PortConfig) -> bool) -> Vec<PortStatus> {
        let tables = lock(&self.inner.tables);
        let entries = tables.ports.values().filter(|entry| wanted(&entry.config));
        entries.map(|entry| self.describe(&tables, entry)).collect()
    }

    /// The configuration of one port.
    pub fn port_config(&self, name: &str) -> Option<PortConfig> {
        lock(&self.inner.tables).ports.get(name).map(|entry| entry.config.clone())
    }

    /// Begins to capture a port's frames.
    ///
    /// # Errors
    /// [`PortError::NotFound`], or [`PortError::Captured`] if somebody does already.
    pub fn capture(&self, name: &str, options: CaptureOptions) -> Result<Capture, PortError> {
        let stats = lock(&self.inner.tables).ports.get(name).map(|entry| entry.stats.clone());
        let stats = stats.ok_or_else(|| PortError::NotFound(name.into()))?;
        Capture::start(stats, options).ok_or_else(|| PortError::Captured(name.into()))
    }

    /// Whether the port that is captured is there. Another one of its name is not that.
    pub fn has_captured(&self, name: &str, capture: &Capture) -> bool {
        lock(&self.inner.tables).ports.get(name).is_some_and(|entry| capture.is_of(&entry.stats))
    }

    /// One port.
    pub fn port(&self, name: &str) -> Option<PortStatus> {
        let tables = lock(&self.inner.tables);
        tables.ports.get(name).map(|entry| self.describe(&tables, entry))
    }

    fn describe(&self, tables: &Tables, entry: &Entry) -> PortStatus {
        let link = tables.view(entry.id).map(|view| view.link.clone());
        let link = link.unwrap_or_else(|| Arc::new(Link::down(PortState::Connecting, None)));
        let fault = entry.stats.fault();
        let (vlan, trunk) = match &entry.config.vlan {
            VlanMode::All => (None, None),
            VlanMode::Access(vid) => (Some(*vid), None),
            VlanMode::Trunk { native, allowed } => (*native, Some(allowed.clone())),
            VlanMode::Networks(_) => (None, None),
        };
        let queues = self.queues(tables, entry, &link);
        let sum = |read: fn(&QueueStatus) -> u64| queues.iter().map(read).sum();
        PortStatus {
            name: entry.config.name.clone(),
            kind: entry.config.target.kind(),
            target: entry.config.target.to_string(),
            network: entry.config.network.clone(),
            vlan,
            trunk,
            networks: entry.config.carried().to_vec(),
            mtu: entry.config.mtu,
            max_queues: entry.config.queues.unwrap_or(MAX_QUEUE_PAIRS as u16),
            mac: entry.config.mac.map(|mac| mac.to_string()),
            spoofcheck: entry.config.spoofcheck,
            rate_rx: entry.config.rate_rx,
            rate_tx: entry.config.rate_tx,
            owner: entry.config.owner.clone(),
            state: if fault.is_some() { PortState::Failed } else { link.state },
            reason: fault.map(|fault| fault.to_string()).or_else(|| link.reason.clone()),
            features: link.features.clone(),
            memory_bytes: link.memory_bytes,
            connects: entry.stats.connects.load(Ordering::Relaxed),
            faults: entry.stats.faults.load(Ordering::Relaxed),
            rx_frames: sum(|queue| queue.rx_frames),
            rx_bytes: sum(|queue| queue.rx_bytes),
            tx_frames: sum(|queue| queue.tx_frames),
            tx_bytes: sum(|queue| queue.tx_bytes),
            drops: drops(&entry.stats),
            queues,
        }
    }

    /// The pairs in use, and those that were: counters never go backwards.
    fn queues(&self, tables: &Tables, entry: &Entry, link: &Link) -> Vec<QueueStatus> {
        let describe = |index: usize| {
            let served = link.rx.iter().any(|rx| rx.pair == index);
            let (rx, tx) = (entry.stats.rx(index).read(), entry.stats.tx(index).read());
            let used = served || index < link.tx.len() || rx.0 + tx.0 > 0;
            let server = || tables.placement.server(entry, index);
            used.then(|| QueueStatus {
                index,
                worker: if served { server() } else { None },
                rx_frames: rx.0,
                rx_bytes: rx.1,
                tx_frames: tx.0,
                tx_bytes: tx.1,
                notifications: rx.2 + tx.2,
                rx_cycles: entry.stats.rx(index).cost().0,
            })
        };
        (0..entry.stats.pairs()).filter_map(describe).collect()
    }

    /// The workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let mut served = vec![0; self.inner.workers.len()];
        let tables = lock(&self.inner.tables);
        for (entry, pair) in tables.queues() {
            let server = tables.placement.server(entry, pair);
            if let Some(count) = server.and_then(|worker| served.get_mut(worker)) {
                *count += 1;
            }
        }
        drop(tables);
        let loads = lock(&self.inner.loads);
        let describe = |(id, worker): (usize, &Arc<WorkerShared>)| {
            let counts = worker.stats.counts();
            let ns = |ticks| worker.stats.ns(ticks);
            let load = loads.workers.get(id).copied().unwrap_or_default();
            WorkerStatus {
                id,
                cpu: worker.cpu,
                busy_percent: load.busy_percent,
                busy_ns: ns(counts.busy),
                up_ns: ns(counts.up),
                rx_frames: counts.frames,
                bursts: counts.bursts.iter().sum(),
                sleeps: counts.sleeps,
                queues: served.get(id).copied().unwrap_or(0),
                frames_per_second: load.frames_per_second,
                sleeps_per_second: load.sleeps_per_second,
                asleep_ns: ns(counts.asleep),
                delivered: counts.delivered,
                copies: counts.copies,
            }
        };
        self.inner.workers.iter().enumerate().map(describe).collect()
    }

    /// The queues that are served, by port and pair, with their load.
    pub fn queue_loads(&self) -> Vec<QueueLoadStatus> {
        let tables = lock(&self.inner.tables);
        let loads = lock(&self.inner.loads);
        let describe = |(entry, pair): (&Entry, usize)| {
            let load = loads.queues.get(&(entry.id, pair)).copied().unwrap_or_default();
            QueueLoadStatus {
                port: entry.config.name.clone(),
                queue: pair,
                worker: tables.placement.owner(entry, pair),
                pinned: tables.placement.pinned(entry, pair).is_some(),
                load_percent: load.share * 100.0,
                frames_per_second: load.frames_per_second,
            }
        };
        tables.queues().map(describe).collect()
    }

    /// Where the workers' time has gone since the start.
    pub fn cycles(&self) -> CyclesStatus {
        let worker = |(id, worker): (usize, &Arc<WorkerShared>)| {
            let counts = worker.stats.counts();
            WorkerCycles {
                id,
                up: counts.up,
                busy: counts.busy,
                asleep: counts.asleep,
                frames: counts.frames,
                delivered: counts.delivered,
                copies: counts.copies,
                sampled_frames: counts.sampled_frames,
                stages: Stage::ALL.iter().map(|stage| stage.name()).zip(counts.stages).collect(),
                bursts: counts.bursts.to_vec(),
            }
        };
        let port = |entry: &Entry| {
            let queues = (0..entry.stats.pairs()).map(|pair| entry.stats.rx(pair));
            let (cycles, frames) = queues.fold((0, 0), |sum, rx| (sum.0 + rx.cost().0, sum.1 + rx.cost().1));
            PortCycles { name: entry.config.name.clone(), frames, cycles }
        };
        CyclesStatus {
            frequency: self.inner.frequency(),
            workers: self.inner.workers.iter().enumerate().map(worker).collect(),
            ports: lock(&self.inner.tables).ports.values().map(port).collect(),
        }
    }

    /// The forwarding table, sorted by network, VLAN and address.
    pub fn fdb(&self) -> Vec<FdbEntryStatus> {
        let tables = lock(&self.inner.tables);
        let configs = tables.configs();
        let describe = |entry: &fdb::Entry| {
            let config = configs.get(&entry.port)?;
            let (network, vlan) = tables.network_of(config, entry.station.vid)?;
            Some(FdbEntryStatus {
                mac: MacAddr::from_u64(entry.station.mac).to_string(),
                network: network.into(),
                vlan,
                port: config.name.clone(),
                age_seconds: entry.age,
                is_static: entry.is_static,
            })
        };
        let mut entries: Vec<_> = self.inner.fdb.entries().iter().filter_map(describe).collect();
        drop(tables);
        entries.sort_by(|a, b| (&a.network, a.vlan, &a.mac).cmp(&(&b.network, b.vlan, &b.mac)));
        entries
    }

    /// Number of entries of the forwarding table.
    pub fn fdb_len(&self) -> usize {
        self.inner.fdb.len()
    }

    /// Forgets learned addresses, of one network or of all. Returns how many.
    pub fn flush_fdb(&self, network: Option<&str>) -> usize {
        let tables = lock(&self.inner.tables);
        let configs = tables.configs();
        let of_network = |entry: &fdb::Entry| {
            let config = configs.get(&entry.port)?;
            tables.network_of(config, entry.station.vid).map(|(of, _)| of)
        };
        self.inner.fdb.retain(|entry| !entry.is_static && (network.is_none() || of_network(entry) == network))
    }
}

fn drops(stats: &PortStats) -> std::collections::BTreeMap<&'static str, u64> {
    let read = |reason: &DropReason| (reason.name(), stats.drops(*reason));
    DropReason::ALL.iter().map(read).filter(|(_, count)| *count > 0).collect()
}
