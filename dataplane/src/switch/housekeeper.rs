//! The thread that keeps house once a second: it ages the FDB, measures and balances the workers' load and logs faults.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::limits::MAX_FDB_AGE_SECONDS;
use crate::switch::load::Sampler;
use crate::switch::{Inner, Tables};
use crate::sync::lock;
use crate::virtq::Fault;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SwitchConfig;
    use crate::handover::StatsRecord;
    use crate::switch::Switch;

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
