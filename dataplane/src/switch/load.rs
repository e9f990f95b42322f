//! How loaded workers and queues are, and who serves what because of it.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::balance::{self, QueueLoad};
use super::{Entry, Inner, PortError, Switch, Tables};
use crate::config::{Pin, PortQueue};
use crate::port::PortId;
use crate::sync::lock;
use crate::worker::stats::WorkerCounts;

/// Time between two rounds of moves at least: loads have to settle in between.
const PAUSE: Duration = Duration::from_secs(5);
/// A load in parts per million of a worker's time.
const WHOLE: f64 = 1e6;

/// A receive queue: its port and its pair.
pub(super) type QueueId = (PortId, usize);

/// Who serves which queue.
#[derive(Debug, Default)]
pub(super) struct Placement {
    workers: usize,
    /// By hand: by port name and queue; `None` is for those that have no pin of their own.
    pins: BTreeMap<String, BTreeMap<Option<usize>, usize>>,
    /// By load.
    assigned: HashMap<QueueId, usize>,
    /// Between two workers at the moment: nobody serves them.
    moving: Vec<QueueId>,
}

impl Placement {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, ..Self::default() }
    }

    /// The worker that a queue is pinned to.
    pub(super) fn pinned(&self, port: &Entry, pair: usize) -> Option<usize> {
        let pins = self.pins.get(&port.config.name)?;
        // One that this run does not have is for another run.
        pins.get(&Some(pair)).or_else(|| pins.get(&None)).copied().filter(|worker| *worker < self.workers)
    }

    /// The worker that a queue belongs to. Without load and pins neighbouring ports and pairs go to different ones.
    pub(super) fn owner(&self, port: &Entry, pair: usize) -> usize {
        let default = || (usize::from(port.id.0) + pair) % self.workers.max(1);
        let assigned = || self.assigned.get(&(port.id, pair)).copied();
        self.pinned(port, pair).or_else(assigned).unwrap_or_else(default)
    }

    /// The worker that serves a queue now.
    pub(super) fn server(&self, port: &Entry, pair: usize) -> Option<usize> {
        (!self.moving.contains(&(port.id, pair))).then(|| self.owner(port, pair))
    }

    /// A port is gone.
    pub(super) fn forget(&mut self, id: PortId) {
        self.assigned.retain(|queue, _| queue.0 != id);
    }

    fn pin(&mut self, pin: &Pin) {
        self.pins.entry(pin.queue.port.clone()).or_default().insert(pin.queue.queue, pin.worker);
    }

    fn has_pin(&self, queue: &PortQueue) -> bool {
        let of_port = self.pins.get(&queue.port);
        of_port.is_some_and(|pins| queue.queue.is_none() || pins.contains_key(&queue.queue))
    }

    /// Takes a pin back, or all of a port.
    fn unpin(&mut self, queue: &PortQueue) {
        if let Some(pins) = self.pins.get_mut(&queue.port) {
            pins.remove(&queue.queue);
            if queue.queue.is_none() || pins.is_empty() {
                self.pins.remove(&queue.port);
            }
        }
    }
}

/// What was measured in the last round.
#[derive(Debug, Default)]
pub(super) struct Loads {
    pub(super) workers: Vec<WorkerLoad>,
    pub(super) queues: HashMap<QueueId, Load>,
}

/// A worker in the last round.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct WorkerLoad {
    pub(super) busy_percent: f64,
    pub(super) frames_per_second: f64,
    pub(super) sleeps_per_second: f64,
}

/// A queue in the last round.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Load {
    /// Share of its worker's time.
    pub(super) share: f64,
    /// The same over the last rounds, the newer the more.
    average: f64,
    pub(super) frames_per_second: f64,
}

/// Measures from round to round.
#[derive(Debug)]
pub(super) struct Sampler {
    at: Instant,
    workers: Vec<WorkerCounts>,
    /// Ticks and frames.
    queues: HashMap<QueueId, (u64, u64)>,
    moved: Option<Instant>,
}

impl Sampler {
    pub(super) fn new(inner: &Inner) -> Self {
        let workers = inner.workers.iter().map(|worker| worker.stats.counts()).collect();
        Self { at: Instant::now(), workers, queues: HashMap::new(), moved: None }
    }

    /// Measures what happened since the last round.
    pub(super) fn round(&mut self, inner: &Inner) {
        let seconds = self.at.elapsed().as_secs_f64().max(1e-6);
        self.at = Instant::now();
        let now: Vec<_> = inner.workers.iter().map(|worker| worker.stats.counts()).collect();
        let workers = now.iter().zip(&self.workers).map(|(now, old)| worker_load(now, old, seconds)).collect();
        self.workers = now;
        let ticks = seconds * inner.frequency();
        let tables = lock(&inner.tables);
        let mut loads = lock(&inner.loads);
        let (mut counts, mut queues) = (HashMap::new(), HashMap::new());
        for (entry, pair) in tables.queues() {
            let (id, count) = ((entry.id, pair), entry.stats.rx(pair).cost());
            counts.insert(id, count);
            // What is new here starts with the next round.
            let old = self.queues.get(&id).copied().unwrap_or(count);
            // A port that was added again began anew.
            let grown = |now: u64, old: u64| now.checked_sub(old).unwrap_or(now) as f64;
            let share = (grown(count.0, old.0) / ticks).min(1.0);
            let before = loads.queues.get(&id).map_or(share, |load| load.average);
            let average = (before + share) / 2.0;
            queues.insert(id, Load { share, average, frames_per_second: grown(count.1, old.1) / seconds });
        }
        self.queues = counts;
        *loads = Loads { workers, queues };
    }

    /// Moves queues from busy workers to idle ones, if it is time for that and worth it.
    pub(super) fn rebalance(&mut self, inner: &Inner) {
        if !inner.rebalance || inner.workers.len() < 2 || self.moved.is_some_and(|moved| moved.elapsed() < PAUSE) {
            return;
        }
        let mut tables = lock(&inner.tables);
        let planned = inner.plan_by_load(&tables);
        if planned.is_empty() {
            return;
        }
        self.moved = Some(Instant::now());
        inner.reassign(&mut tables, "to balance load", |placement| placement.assigned.extend(planned));
    }
}

fn worker_load(now: &WorkerCounts, old: &WorkerCounts, seconds: f64) -> WorkerLoad {
    let up = now.up.saturating_sub(old.up).max(1) as f64;
    WorkerLoad {
        busy_percent: (100.0 * now.busy.saturating_sub(old.busy) as f64 / up).min(100.0),
        frames_per_second: now.frames.saturating_sub(old.frames) as f64 / seconds,
        sleeps_per_second: now.sleeps.saturating_sub(old.sleeps) as f64 / seconds,
    }
}

impl Tables {
    /// All receive queues that can be served: their port's entry, and the pair.
    pub(super) fn queues(&self) -> impl Iterator<Item = (&Entry, usize)> {
        self.ports.values().flat_map(|entry| {
            let rx = self.view(entry.id).map(|view| view.link.rx.as_slice());
            rx.unwrap_or_default().iter().map(move |rx| (entry, rx.pair))
        })
    }
}

impl Inner {
    /// Ticks of the workers' clock in a second.
    pub(super) fn frequency(&self) -> f64 {
        self.workers.first().map_or(0.0, |worker| worker.stats.frequency()).max(1.0)
    }

    /// Queues that should be served by another worker, and by which.
    fn plan_by_load(&self, tables: &Tables) -> Vec<(QueueId, usize)> {
        let loads = lock(&self.loads);
        let (mut ids, mut queues) = (Vec::new(), Vec::new());
        for (entry, pair) in tables.queues() {
            let id = (entry.id, pair);
            let load = loads.queues.get(&id).map_or(0.0, |load| load.average);
            ids.push(id);
            queues.push(QueueLoad {
                worker: tables.placement.owner(entry, pair),
                pinned: tables.placement.pinned(entry, pair).is_some(),
                load: (load * WHOLE) as u64,
            });
        }
        let planned = balance::plan(&queues, self.workers.len());
        let moves = ids.into_iter().zip(planned).zip(&queues);
        moves.filter(|((_, to), queue)| *to != queue.worker).map(|(moved, _)| moved).collect()
    }

    /// Changes who serves what. A queue that moves is served by nobody until all workers have let go of it, so that its
    /// frames stay in order, and neither a request for notifications nor a notification gets lost between two workers.
    fn reassign(&self, tables: &mut Tables, why: &str, change: impl FnOnce(&mut Placement)) {
        let owners = |tables: &Tables| -> BTreeMap<QueueId, (String, usize)> {
            let describe = |(entry, pair): (&Entry, usize)| {
                ((entry.id, pair), (entry.config.name.clone(), tables.placement.owner(entry, pair)))
            };
            tables.queues().map(describe).collect()
        };
        let before = owners(tables);
        change(&mut tables.placement);
        let mut moves = owners(tables);
        moves.retain(|id, (_, to)| before.get(id).is_none_or(|(_, from)| from != to));
        if moves.is_empty() {
            return;
        }
        tables.placement.moving = moves.keys().copied().collect();
        self.publish(tables);
        tables.placement.moving.clear();
        self.publish(tables);
        for (id, (port, to)) in moves {
            let from = before.get(&id).map(|(_, from)| *from);
            tracing::info!(port, queue = id.1, from, to, "queue moved to another worker {why}");
        }
    }
}

impl Switch {
    /// Whether queues are moved by load.
    pub fn rebalances(&self) -> bool {
        self.inner.rebalance
    }

    /// Has one worker serve a queue, or all queues of a port.
    ///
    /// # Errors
    /// [`PortError::NotFound`], [`PortError::NoWorker`]; nothing has changed then.
    pub fn pin(&self, pin: &Pin) -> Result<(), PortError> {
        let workers = self.inner.workers.len();
        let mut tables = lock(&self.inner.tables);
        if !tables.ports.contains_key(&pin.queue.port) {
            return Err(PortError::NotFound(pin.queue.port.clone()));
        }
        if pin.worker >= workers {
            return Err(PortError::NoWorker { worker: pin.worker, workers });
        }
        self.inner.reassign(&mut tables, "by hand", |placement| placement.pin(pin));
        Ok(())
    }

    /// Takes a pin back; without a queue all those of the port. The queues stay where they are until load moves them.
    ///
    /// # Errors
    /// [`PortError::NotPinned`].
    pub fn unpin(&self, queue: &PortQueue) -> Result<(), PortError> {
        let mut tables = lock(&self.inner.tables);
        if !tables.placement.has_pin(queue) {
            return Err(PortError::NotPinned(queue.to_string()));
        }
        let owner = |(entry, pair): (&Entry, usize)| {
            let of_port = entry.config.name == queue.port && queue.queue.is_none_or(|only| only == pair);
            of_port.then(|| ((entry.id, pair), tables.placement.owner(entry, pair)))
        };
        let stay: Vec<_> = tables.queues().filter_map(owner).collect();
        self.inner.reassign(&mut tables, "by hand", |placement| {
            placement.unpin(queue);
            // A queue that falls under the pin of its port moves all the same.
            placement.assigned.extend(stay);
        });
        Ok(())
    }

    /// Pins of an earlier run, before there are ports. Returns those to workers that this run does not have, which
    /// have no effect.
    pub fn restore_pins(&self, pins: &[Pin]) -> Vec<Pin> {
        let mut tables = lock(&self.inner.tables);
        pins.iter().for_each(|pin| tables.placement.pin(pin));
        pins.iter().filter(|pin| pin.worker >= self.inner.workers.len()).cloned().collect()
    }
}
