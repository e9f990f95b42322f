//! How a change reaches the workers: a new [`Snapshot`] in every mailbox, and nobody goes on before all have taken it up.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use super::snapshot::{Announcement, Plan, PortView, Served, Snapshot};
use super::tables::{Entry, Slot, Tables};
use super::{Inner, departed};
use crate::keeper::Keeper;
use crate::port::stats::PortStats;
use crate::port::{Link, PortId, Publisher};
use crate::status::PortState;
use crate::sync::lock;
use crate::virtq::journal::Journal;
use crate::worker::{self, WorkerShared};

impl Inner {
    /// Shows the tables to the workers and waits until all use them, or end.
    pub(super) fn publish(&self, tables: &mut Tables) {
        if tables.frozen && !is_blind(tables) && tables.shown.as_ref().is_some_and(|shown| shown.ports.is_empty()) {
            // They have nothing, and are to have nothing.
            return;
        }
        tables.epoch += 1;
        let announcement = if tables.frozen { None } else { tables.announcement.take() };
        let snapshot = Arc::new(Snapshot { announcement, ..self.snapshot(tables) });
        for worker in &self.workers {
            worker.mailbox.put(snapshot.clone());
            worker.wake.signal();
        }
        let acknowledged = |worker: &Arc<WorkerShared>| worker.acknowledged.reached(snapshot.epoch);
        let patience = Instant::now();
        while !self.stopping.load(Ordering::Acquire) && !self.workers.iter().all(acknowledged) {
            // A worker is never away for longer than a few bursts.
            if patience.elapsed() < Duration::from_micros(50) {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        // What nobody uses any more is freed here, and by no worker.
        tables.shown = Some(snapshot);
    }

    /// Shows the tables again if workers cannot be woken: there may be descriptors by now.
    pub(super) fn wake_the_blind(&self) {
        let mut tables = lock(&self.tables);
        if is_blind(&tables) {
            self.publish(&mut tables);
        }
    }

    pub(super) fn snapshot(&self, tables: &Tables) -> Snapshot {
        let slots = if tables.frozen { &[][..] } else { &tables.slots };
        let ports: Vec<_> = slots.iter().map(Slot::view).collect();
        let mut networks = vec![Vec::new(); tables.networks.len()];
        // Also one whose rings are just being changed: it keeps what comes.
        let is_there = |link: &Link| link.receives() || link.state == PortState::Up && link.hold.is_some();
        for port in ports.iter().flatten().filter(|port| is_there(&port.link)) {
            if let Some(members) = networks.get_mut(usize::from(port.network)) {
                members.push(port.id);
            }
        }
        let holding = ports.iter().flatten().filter(|port| port.link.hold.is_some()).map(|port| port.id).collect();
        Snapshot { epoch: tables.epoch, ports, networks, holding, plans: self.plans(tables), announcement: None }
    }

    /// Spreads the receive queues over the workers.
    fn plans(&self, tables: &Tables) -> Vec<Plan> {
        let mut queues: Vec<Vec<Served>> = self.workers.iter().map(|_| Vec::new()).collect();
        for entry in tables.ports.values().filter(|_| !tables.frozen) {
            let Some(port) = tables.view(entry.id) else { continue };
            for rx in &port.link.rx {
                let worker = tables.placement.server(entry, rx.pair);
                if let Some(plan) = worker.and_then(|worker| queues.get_mut(worker)) {
                    plan.push(Served::new(port, rx));
                }
            }
        }
        self.workers.iter().zip(queues).enumerate().map(|(id, it)| self.plan(tables, id, it)).collect()
    }

    /// What a worker does from now on, with what it has already for the queues that it goes on with.
    fn plan(&self, tables: &Tables, id: usize, (shared, mut queues): (&Arc<WorkerShared>, Vec<Served>)) -> Plan {
        let before = tables.shown.as_ref().and_then(|shown| shown.plans.get(id));
        if let Some(before) = before.filter(|before| before.alarm.is_some() && before.has(&queues)) {
            for (served, before) in queues.iter_mut().zip(&before.queues) {
                served.armed = before.armed.clone();
            }
            return Plan { queues, since: before.since, alarm: before.alarm.clone() };
        }
        let address = |served: &Served| Arc::as_ptr(&served.queue).addr();
        let known: HashMap<_, _> =
            before.iter().flat_map(|before| &before.queues).map(|served| (address(served), &served.armed)).collect();
        for served in &mut queues {
            if let Some(armed) = known.get(&address(served)) {
                served.armed = (*armed).clone();
            }
        }
        let alarm = worker::alarm_for(shared, &queues);
        if let Err(error) = &alarm
            && !is_blind(tables)
        {
            tracing::error!("workers look for frames every millisecond, as frames cannot wake them: {error}");
        }
        Plan { queues, since: tables.epoch, alarm: alarm.ok().map(Arc::new) }
    }

    /// The way to the workers of a port's driver, which is connecting.
    pub(super) fn publisher(self: &Arc<Self>, id: PortId, stats: &Arc<PortStats>) -> Arc<PortPublisher> {
        let publisher = Arc::new(PortPublisher::new(Arc::downgrade(self), id, stats.clone()));
        publisher.publish(Link::down(PortState::Connecting, None));
        publisher
    }
}

/// Whether there is a worker that was last shown a plan in which nothing wakes it.
fn is_blind(tables: &Tables) -> bool {
    tables.shown.as_ref().is_some_and(|shown| shown.plans.iter().any(|plan| plan.alarm.is_none()))
}

/// A port's way to the workers.
#[derive(Debug)]
pub(super) struct PortPublisher {
    inner: Weak<Inner>,
    id: PortId,
    stats: Arc<PortStats>,
    pace: Pace,
}

impl PortPublisher {
    pub(super) fn new(inner: Weak<Inner>, id: PortId, stats: Arc<PortStats>) -> Self {
        Self { inner, id, stats, pace: Pace::default() }
    }

    /// What the tables have of it. Its number may be another port's by now, if its thread was left behind.
    fn entry<'t>(&self, tables: &'t Tables) -> Option<&'t Entry> {
        tables.ports.values().find(|entry| entry.id == self.id && Arc::ptr_eq(&entry.stats, &self.stats))
    }
}

/// How often a port may disturb the workers. A frontend can have its port change something with each of its messages, and each
/// change has all workers look up.
#[derive(Debug, Default)]
struct Pace(Mutex<Option<Instant>>);

impl Pace {
    /// Time for each change in the long run.
    const EACH: Duration = Duration::from_millis(2);
    /// Changes at once: more than a guest makes that starts with 256 queue pairs.
    const BURST: u32 = 4000;

    /// Has those who change too much wait, before they have anything locked.
    fn keep(&self) {
        std::thread::sleep(self.wait(Instant::now()));
    }

    fn wait(&self, now: Instant) -> Duration {
        let mut next = lock(&self.0);
        let due = next.unwrap_or(now).max(now) + Self::EACH;
        *next = Some(due);
        (due - now).saturating_sub(Self::EACH * Self::BURST)
    }
}

impl Publisher for PortPublisher {
    fn publish(&self, mut link: Link) {
        let Some(inner) = self.inner.upgrade() else { return };
        self.pace.keep();
        let mut tables = lock(&inner.tables);
        let Some((config, policers)) = self.entry(&tables).map(|entry| (entry.config.clone(), entry.policers.clone()))
        else {
            return;
        };
        departed::inherit_hold(&mut link, &tables.slots[usize::from(self.id.0)]);
        let receives = link.receives();
        let (domain, vlan) = tables.domain(&config);
        let Ok(network) = tables.network(&domain) else { return };
        let view = PortView {
            id: self.id,
            network,
            vlan,
            mtu: config.mtu.map_or(usize::MAX / 2, usize::from),
            mac: config.mac.map(|mac| mac.to_u64()),
            only_source: config.mac.filter(|_| config.spoofcheck).map(|mac| mac.to_u64()),
            policers,
            stats: self.stats.clone(),
            link: Arc::new(link),
        };
        let is_down = |view: &PortView| view.link.state != PortState::Up && view.link.hold.is_none();
        let down = is_down(&view);
        let slot = &mut tables.slots[usize::from(self.id.0)];
        let before = slot.view();
        let was_down = before.as_ref().is_none_or(|before| is_down(before));
        let comes = receives && !before.is_some_and(|before| before.link.receives());
        *slot = Slot::Used(Arc::new(view));
        inner.publish(&mut tables);
        if comes {
            inner.add_static(&tables, &config, self.id);
        }
        // No worker learns behind the port any more; what is known would only swallow frames.
        if down && !was_down {
            inner.forget_stations(&tables, self.id);
        }
    }

    fn forget_stations(&self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let tables = lock(&inner.tables);
        let holds = |view: &Arc<PortView>| view.link.hold.is_some();
        // Frames for them are held until they are heard elsewhere.
        if self.entry(&tables).is_some() && !tables.view(self.id).is_some_and(holds) {
            inner.forget_stations(&tables, self.id);
        }
    }

    fn announce(&self, mac: [u8; 6]) {
        if let Some(inner) = self.inner.upgrade() {
            self.pace.keep();
            let mut tables = lock(&inner.tables);
            if self.entry(&tables).is_none() {
                return;
            }
            tables.announcement = Some(Announcement { port: self.id, mac });
            inner.publish(&mut tables);
        }
    }

    fn stats(&self) -> &Arc<PortStats> {
        &self.stats
    }

    fn keeper(&self) -> Option<Arc<Keeper>> {
        self.inner.upgrade()?.keeper.get().cloned()
    }

    fn journal(&self) -> Option<(Arc<Journal>, String)> {
        let inner = self.inner.upgrade()?;
        let journal = inner.journal.get()?.clone();
        let tables = lock(&inner.tables);
        let name = self.entry(&tables)?.config.name.clone();
        Some((journal, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_changes_too_much_waits() {
        let (pace, now) = (Pace::default(), Instant::now());
        assert!((0..Pace::BURST).all(|_| pace.wait(now).is_zero()));
        assert_eq!([pace.wait(now), pace.wait(now)], [Pace::EACH, 2 * Pace::EACH]);
        let later = now + Pace::EACH * (Pace::BURST + 2);
        assert!((0..Pace::BURST).all(|_| pace.wait(later).is_zero()));
        assert_eq!(pace.wait(later), Pace::EACH);
    }
}
