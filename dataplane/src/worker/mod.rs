//! Workers: threads that own disjoint sets of receive queues and run every burst to completion.
//!
//! A worker takes up a new [`Snapshot`] between two bursts and acknowledges it; the control side waits for that before
//! it takes anything away. A worker allocates nothing, logs nothing, and waits for nobody but, in its sleep, for work.

pub mod meter;
mod patience;
pub mod stats;
mod turns;
pub mod watchdog;

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::config::{SwitchConfig, WorkerMode};
use crate::frame::BurstStorage;
use crate::switch::fdb::Fdb;
use crate::switch::forward::Forwarder;
use crate::switch::snapshot::{Alarm, Plan, Served, Snapshot};
use crate::sync::{Epoch, Mailbox};
use crate::virtq::notify::{EventFd, Pulse};
use meter::Stage;
use patience::Patience;
use stats::{Clock, WorkerStats};
use turns::Turns;

/// How long a worker sleeps that nothing wakes.
const BLIND_SLEEP: Duration = Duration::from_millis(1);
/// Event data of a worker's own wake-up in its epoll instance.
pub const WAKE: u64 = u64::MAX;
/// Events taken from the kernel at a time.
const EVENTS: usize = 64;

/// What the control side and one worker share.
#[derive(Debug)]
pub struct WorkerShared {
    /// The newest snapshot, if the worker has not taken it up yet.
    pub mailbox: Mailbox<Snapshot>,
    /// Epoch of the snapshot that the worker uses.
    pub acknowledged: Epoch,
    /// Wakes the worker from its sleep.
    pub wake: EventFd,
    /// Tells the worker to end.
    pub stop: AtomicBool,
    /// Counters.
    pub stats: WorkerStats,
    /// For the watchdog.
    pub pulse: Arc<Pulse>,
    /// CPU it is pinned to.
    pub cpu: Option<usize>,
}

impl WorkerShared {
    /// State for one worker.
    ///
    /// # Errors
    /// If the process has no descriptors left.
    pub fn new(cpu: Option<usize>) -> std::io::Result<Self> {
        Ok(Self {
            mailbox: Mailbox::default(),
            acknowledged: Epoch::default(),
            wake: EventFd::new()?,
            stop: AtomicBool::new(false),
            stats: WorkerStats::default(),
            pulse: Arc::default(),
            cpu,
        })
    }
}

/// Makes what wakes a worker that serves these queues.
///
/// # Errors
/// If the process has no descriptors left.
pub fn alarm_for(shared: &WorkerShared, queues: &[Served]) -> std::io::Result<Alarm> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &shared.wake, EventData::new_u64(WAKE), EventFlags::IN)?;
    let mut silent = Vec::new();
    for (place, served) in queues.iter().enumerate() {
        let Some(fd) = served.queue.event_fd() else {
            silent.push(place);
            continue;
        };
        // Each new event counts, not that there was one: a guest can give us an eventfd that stays readable however often
        // it is read (`EFD_SEMAPHORE`), and a worker would never sleep again. Queues are empty when it goes to sleep.
        match epoll::add(&epoll, fd, EventData::new_u64(place as u64), EventFlags::IN | EventFlags::ET) {
            // Two queues may share a descriptor; the first one then stands for both.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Alarm { epoll, silent })
}

/// Starts a worker. It ends after `stop` was set and it was woken.
///
/// # Errors
/// If the thread cannot be started, or not on that CPU, or not be confined.
pub fn start(
    id: usize,
    shared: Arc<WorkerShared>,
    config: &SwitchConfig,
    fdb: Arc<Fdb>,
    first: Arc<Snapshot>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let (mode, confined) = (config.mode, config.confine_workers);
    let (ready, started) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("sl-worker-{id}")).spawn(move || {
        let pinned = shared.cpu.map_or(Ok(()), pin);
        let pinned = pinned.and_then(|()| if confined { crate::sandbox::confine_worker() } else { Ok(()) });
        let failed = pinned.is_err();
        if ready.send(pinned).is_err() || failed {
            return;
        }
        shared.pulse.begin();
        let worker = Worker {
            id,
            shared: &shared,
            mode,
            forwarder: Forwarder::new(fdb),
            storage: BurstStorage::default(),
            turns: Turns::default(),
            since: None,
            patience: Patience::default(),
        };
        // A panic is a bug of ours. Frames would stop silently; a supervisor can restart the process.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run(first))).is_err() {
            std::process::abort();
        }
    })?;
    started.recv().unwrap_or_else(|_| Err(std::io::Error::other("the worker ended at once")))?;
    Ok(thread)
}

fn pin(cpu: usize) -> std::io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(Errno::INVAL.into());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

struct Worker<'s> {
    id: usize,
    shared: &'s WorkerShared,
    mode: WorkerMode,
    forwarder: Forwarder,
    storage: BurstStorage,
    turns: Turns,
    /// [`Plan::since`] of the plan that the turns are about.
    since: Option<u64>,
    patience: Patience,
}

impl Worker<'_> {
    fn run(mut self, mut snapshot: Arc<Snapshot>) {
        let clock = Clock::start();
        self.shared.stats.begin(&clock);
        let mut idle_since = None;
        let mut now = clock.ticks();
        self.begin_plan(&snapshot);
        while !self.shared.stop.load(Ordering::Relaxed) {
            if let Some(newer) = self.shared.mailbox.take() {
                snapshot = newer;
                self.shared.acknowledged.acknowledge(snapshot.epoch);
                self.begin_plan(&snapshot);
                // Before anything that comes later; and what this worker has kept, others may not have seen.
                self.forwarder.release_returned(&snapshot);
                if let Some(announcement) = snapshot.announcement.as_ref().filter(|_| self.id == 0) {
                    self.forwarder.announce(&snapshot, &mut self.storage, announcement);
                }
                now = clock.ticks();
            }
            let Some(plan) = snapshot.plans.get(self.id) else { break };
            let began = now;
            let frames = self.pass(&snapshot, plan, &clock, &mut now);
            if frames > 0 {
                idle_since = None;
                self.account(frames, now.wrapping_sub(began));
                continue;
            }
            now = clock.ticks();
            let since = *idle_since.get_or_insert(began);
            if self.may_sleep(clock.ns(now.wrapping_sub(since))) && arm(plan) {
                self.shared.stats.falls_asleep(now);
                sleep(plan, &self.shared.wake, &mut self.turns);
                idle_since = None;
                let woken = clock.ticks();
                self.shared.stats.wakes(woken);
                self.patience.slept(clock.ns(woken.wrapping_sub(now)));
                now = woken;
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// A new snapshot may bring a new plan.
    fn begin_plan(&mut self, snapshot: &Snapshot) {
        let Some(plan) = snapshot.plans.get(self.id) else { return };
        if self.since != Some(plan.since) {
            self.since = Some(plan.since);
            self.turns.begin(plan.queues.len());
        }
    }

    /// A pass over frames is done.
    #[inline]
    fn account(&mut self, frames: usize, ticks: u64) {
        let (probe, copies) = self.forwarder.meters();
        self.shared.stats.busy(ticks);
        self.shared.stats.copied(*copies);
        if let Some(stages) = probe.finish() {
            self.shared.stats.sampled(frames, stages);
        }
    }

    fn may_sleep(&self, idle_ns: u64) -> bool {
        match self.mode {
            WorkerMode::Poll => false,
            WorkerMode::Interrupt => true,
            WorkerMode::Adaptive => self.patience.is_over(idle_ns),
        }
    }

    /// Serves the active queues once, and some of the others. Returns the number of frames taken. `now` is when it begins,
    /// and becomes when the last burst was done; what lies between two bursts counts for the port of the second one.
    fn pass(&mut self, snapshot: &Snapshot, plan: &Plan, clock: &Clock, now: &mut u64) -> usize {
        let mut frames = 0;
        self.forwarder.meters().0.begin(*now);
        for word in 0..self.turns.words() {
            for place in self.turns.active(word) {
                frames += self.serve(snapshot, plan, place, clock, now);
            }
        }
        for _ in 0..self.turns.looks(frames) {
            if let Some(place) = self.turns.next_other() {
                frames += self.serve(snapshot, plan, place, clock, now);
            }
        }
        if frames > 0 {
            self.turns.passed();
        }
        frames
    }

    /// Serves one queue, by its place in the plan. Returns the number of frames taken.
    #[inline]
    fn serve(&mut self, snapshot: &Snapshot, plan: &Plan, place: usize, clock: &Clock, now: &mut u64) -> usize {
        let Some(served) = plan.queues.get(place) else { return 0 };
        if served.port.stats.fault().is_some() {
            return 0;
        }
        let (forwarder, port) = (&mut self.forwarder, &*served.port);
        match served.queue.poll(&mut self.storage, &mut |burst| forwarder.forward(snapshot, port, burst)) {
            Ok(0) => 0,
            Ok(taken) => {
                self.turns.hear(place);
                self.shared.stats.burst(taken);
                let ended = clock.ticks();
                port.stats.rx(served.pair).spent(ended.wrapping_sub(*now));
                *now = ended;
                let (probe, copies) = self.forwarder.meters();
                probe.enter(Stage::Load);
                copies.extra += served.copies_in * taken as u64;
                disarm(served);
                taken
            }
            Err(fault) => {
                port.stats.set_fault(fault);
                0
            }
        }
    }
}

/// A queue that has work is polled: notifications would only disturb.
#[inline]
fn disarm(served: &Served) {
    if served.armed.load(Ordering::Relaxed) {
        served.armed.store(false, Ordering::Relaxed);
        served.queue.disarm();
    }
}

/// Asks for notifications from every queue. Returns whether all are quiet, so that the worker may sleep.
fn arm(plan: &Plan) -> bool {
    let mut quiet = true;
    for served in &plan.queues {
        if served.armed.load(Ordering::Relaxed) || served.port.stats.fault().is_some() {
            continue;
        }
        served.armed.store(true, Ordering::Relaxed);
        if served.queue.arm() {
            disarm(served);
            quiet = false;
        }
    }
    quiet
}

/// Sleeps until something of the plan, or the control side, wants attention.
fn sleep(plan: &Plan, wake: &EventFd, turns: &mut Turns) {
    let Some(alarm) = &plan.alarm else {
        std::thread::sleep(BLIND_SLEEP);
        return wake.drain();
    };
    let can_send = |place: &usize| plan.queues.get(*place).is_some_and(|served| served.port.stats.fault().is_none());
    let blind = alarm.silent.iter().any(can_send);
    let timeout = Timespec { tv_sec: 0, tv_nsec: BLIND_SLEEP.subsec_nanos().into() };
    let mut events = [const { MaybeUninit::uninit() }; EVENTS];
    let Ok((events, _)) = epoll::wait(&alarm.epoll, &mut events, blind.then_some(&timeout)) else { return };
    for event in events {
        let data = event.data.u64();
        if data == WAKE {
            wake.drain();
        } else if let Some((place, served)) =
            usize::try_from(data).ok().and_then(|place| Some((place, plan.queues.get(place)?)))
        {
            turns.hear(place);
            served.queue.drain_event();
            // Without event indices a request stays in force; with them it is spent now.
            disarm(served);
        }
    }
}
