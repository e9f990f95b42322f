//! What the switch tells of ports and addresses, and the thread that keeps house: it ages the FDB, measures and balances
//! the workers' load and logs faults.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::capture::{Capture, CaptureOptions};
use crate::config::{PortConfig, VlanMode};
use crate::limits::MAX_FDB_AGE_SECONDS;
use crate::port::Link;
use crate::port::stats::PortStats;
use crate::status::{FdbEntryStatus, PortState, PortStatus, QueueStatus};
use crate::switch::load::Sampler;
use crate::switch::{DropReason, Entry, Inner, PortError, Switch, Tables, fdb};
use crate::sync::lock;
use crate::virtq::Fault;
use crate::wire::MacAddr;

/// The FDB's time at the start, in seconds: so that what another process has learned before can be older than that.
pub(super) const EPOCH: u32 = MAX_FDB_AGE_SECONDS as u32;

/// Time between two rounds.
const ROUND: Duration = Duration::from_secs(1);

/// The housekeeper's sleep.
#[derive(Debug, Default)]
pub(super) struct Housekeeper {
    woken: Mutex<bool>,
    alarm: Condvar,
}

impl Housekeeper {
    pub(super) fn wake(&self) {
        *lock(&self.woken) = true;
        self.alarm.notify_all();
    }

    fn sleep(&self) {
        if let Ok((mut woken, _)) = self.alarm.wait_timeout_while(lock(&self.woken), ROUND, |woken| !*woken) {
            *woken = false;
        }
    }
}

pub(super) fn start(inner: Arc<Inner>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("sl-housekeeper".into()).stack_size(256 << 10).spawn(move || {
        let began = Instant::now();
        let mut sampler = Sampler::new(&inner);
        let mut faults = HashMap::new();
        while !inner.stopping.load(Ordering::Acquire) {
            inner.housekeeper.sleep();
            inner.fdb.set_now(EPOCH + began.elapsed().as_secs() as u32);
            inner.fdb.age();
            inner.end_holds();
            inner.wake_the_blind();
            sampler.round(&inner);
            sampler.rebalance(&inner);
            log_faults(&lock(&inner.tables), &mut faults);
        }
    })
}

fn log_faults(tables: &Tables, known: &mut HashMap<String, u64>) {
    for (port, faults, reason) in new_faults(tables, known) {
        tracing::warn!(port, faults, %reason, "port stopped after a fault of its guest");
    }
}

/// Ports that have had a fault since they were last looked at: how many by now, and the last. It may be over: guests reset
/// their devices. Of those that another process counted before a takeover there is none to tell.
fn new_faults<'t>(tables: &'t Tables, known: &mut HashMap<String, u64>) -> Vec<(&'t str, u64, Fault)> {
    known.retain(|name, _| tables.ports.contains_key(name));
    let news = tables.ports.iter().filter_map(|(name, entry)| {
        let count = entry.stats.faults.load(Ordering::Acquire);
        let is_new = known.insert(name.clone(), count).unwrap_or(0) != count;
        is_new.then(|| entry.stats.last_fault()).flatten().map(|fault| (name.as_str(), count, fault))
    });
    news.collect()
}

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
        let workers = self.inner.workers.len();
        let describe = |index: usize| {
            let served = link.rx.iter().any(|rx| rx.pair == index);
            let (rx, tx) = (entry.stats.rx(index).read(), entry.stats.tx(index).read());
            let used = served || index < link.tx.len() || rx.0 + tx.0 > 0;
            let server = || tables.placement.server(&entry.config.name, entry.id, index, workers);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SwitchConfig;
    use crate::handover::StatsRecord;

    #[test]
    fn a_fault_is_told_once_and_with_its_reason() {
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        switch.add_port("a=vhost-user:/nonexistent/a".parse().unwrap()).unwrap();
        let tables = lock(&switch.inner.tables);
        let (stats, mut known) = (tables.ports["a"].stats.clone(), HashMap::new());
        let mut news = || new_faults(&tables, &mut known);
        // Of another process, which has told it.
        stats.restore(&StatsRecord { faults: 3, ..StatsRecord::default() });
        assert_eq!(news(), []);
        stats.set_fault(Fault::MemoryLost);
        stats.clear_fault();
        assert_eq!(news(), [("a", 4, Fault::MemoryLost)]);
        assert_eq!(news(), []);
    }
}
