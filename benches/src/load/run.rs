//! The generator's loop: one thread that takes turns at all ports.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sluice::worker::stats::Clock;
use vhost::vhost_user::Frontend;

use super::frontend::{self, Listener};
use super::log::DirtyLog;
use super::loopback::{End, Loopback};
use super::pace::Pace;
use super::plan::{Plan, Role};
use super::port::Port;
use super::report::{self, Latency, PortReport, Report};
use crate::cpu;

/// Frames sent at a time at least, unless nothing is in flight: small bursts would measure only us.
const BATCH: u32 = 32;
/// Ports that only stand beside are looked at every so many turns; deadlines too.
const RARELY: u32 = 256;
/// A turn that takes longer means that something else has run.
const PAUSE: Duration = Duration::from_micros(50);
/// Frames that have not arrived that long after the last that did are lost.
const LOST_AFTER: Duration = Duration::from_millis(3);
/// What is under way has arrived when nothing has for that long.
const QUIET: Duration = Duration::from_millis(20);
const QUIET_LIMIT: Duration = Duration::from_secs(2);
/// A VMM looks at a log of dirty pages that often.
const SWEEP: Duration = Duration::from_millis(50);
const LEARN_LIMIT: Duration = Duration::from_secs(30);
/// Spins after a turn with nothing to do: looking costs the switch the cache lines that we look at.
const SPINS: u32 = 8;

/// Guests that wait for a switch.
#[derive(Debug)]
pub struct Rig {
    plan: Plan,
    ports: Vec<Port>,
    logs: Vec<DirtyLog>,
    listeners: Vec<Listener>,
}

impl Rig {
    /// Makes the guests and listens on a socket for each in `folder` ([`Rig::socket`]).
    ///
    /// # Errors
    /// If the plan makes no sense, or memory or sockets cannot be had.
    pub fn listen(plan: Plan, folder: &Path) -> Result<Self> {
        let ports = guests(&plan)?;
        let listeners = (0..plan.total_ports()).map(|port| Listener::bind(&Self::socket(folder, port)));
        let listeners = listeners.collect::<Result<_>>()?;
        let logged = ports.iter().take(plan.log.into());
        let logs = logged.map(|port| DirtyLog::new(port.memory.size())).collect::<std::io::Result<_>>()?;
        Ok(Self { plan, ports, logs, listeners })
    }

    /// Where a port's socket is.
    pub fn socket(folder: &Path, port: u32) -> PathBuf {
        folder.join(format!("p{port}.sock"))
    }

    /// Waits for the switch to connect to all ports, and starts their rings.
    ///
    /// # Errors
    /// If it does not within the limit, or refuses.
    pub fn connect(self, limit: Duration) -> Result<Generator> {
        let deadline = Instant::now() + limit;
        let mut frontends = Vec::new();
        for (number, (port, listener)) in self.ports.iter().zip(&self.listeners).enumerate() {
            let stream = listener.accept(deadline)?;
            let features = self.plan.features(number as u16);
            let frontend = frontend::start(stream, &port.memory, features, &port.rings(), self.logs.get(number));
            frontends.push(frontend.with_context(|| format!("port {number}"))?);
        }
        Ok(Generator::new(self.plan, self.ports, self.logs, frontends, None))
    }
}

fn guests(plan: &Plan) -> Result<Vec<Port>> {
    plan.check()?;
    (0..plan.total_ports()).map(|port| Port::new(plan, port as u16)).collect()
}

/// Guests with running rings.
pub struct Generator {
    // Dropped in this order: the switch lets go before memory does.
    _frontends: Vec<Frontend>,
    _loopback: Option<Loopback>,
    logs: Vec<DirtyLog>,
    last_sweep: u64,
    dirtied: u64,
    plan: Plan,
    ports: Vec<Port>,
    /// Ports that are looked at in each turn, and those that are not.
    active: Vec<usize>,
    idle: Vec<usize>,
    paces: Vec<Option<Pace>>,
    clock: Clock,
    turns: u32,
    last_turn: u64,
    busy: u64,
    pauses: u64,
    discarded: u64,
    /// Stamps from before this moment say nothing, since we were held up.
    valid_from: u64,
}

/// Counters at one moment.
struct Mark {
    at: Instant,
    cpu: Duration,
    busy: u64,
    ticks: u64,
    sent: Vec<u64>,
    received: Vec<u64>,
}

impl Generator {
    fn new(
        plan: Plan,
        ports: Vec<Port>,
        logs: Vec<DirtyLog>,
        frontends: Vec<Frontend>,
        loopback: Option<Loopback>,
    ) -> Self {
        let of = |idle: bool| (0..ports.len()).filter(|&port| (ports[port].role == Role::Idle) == idle).collect();
        let (active, idle) = (of(false), of(true));
        Self {
            _frontends: frontends,
            _loopback: loopback,
            logs,
            last_sweep: 0,
            dirtied: 0,
            paces: ports.iter().map(|_| None).collect(),
            clock: Clock::start(),
            plan,
            ports,
            active,
            idle,
            turns: 0,
            last_turn: 0,
            busy: 0,
            pauses: 0,
            discarded: 0,
            valid_from: 0,
        }
    }

    /// Guests whose frames "arrive" by doing of a thread on `cpu`: to see what the generator itself can do.
    ///
    /// # Errors
    /// If the plan makes no sense, or memory cannot be had.
    pub fn loopback(plan: Plan, cpu: usize) -> Result<Self> {
        ensure!(plan.queues == 1 && plan.idle == 0 && plan.flood.is_none(), "only ports in pairs can be looped back");
        let ports = guests(&plan)?;
        let end = |port: &Port, send: bool| {
            let layout = if send { port.senders[0].ring.layout() } else { port.receivers[0].ring.layout() };
            End::new(port.memory.clone(), *layout)
        };
        let pairs = ports.iter().map(|port| (end(port, true), end(&ports[port.peer], false)));
        let loopback = Loopback::start(pairs, cpu);
        Ok(Self::new(plan, ports, Vec::new(), Vec::new(), Some(loopback)))
    }

    /// Makes all addresses known, warms up, measures, and waits for the last frames. Runs on the calling thread, which
    /// it pins as planned.
    ///
    /// # Errors
    /// If the CPU cannot be had, or the switch stands still.
    pub fn run(&mut self) -> Result<Report> {
        if let Some(cpu) = self.plan.cpu {
            cpu::pin(cpu).with_context(|| format!("cannot run on CPU {cpu}"))?;
        }
        if self.plan.nap.is_some() {
            cpu::run_first().context("cannot take real-time priority")?;
        }
        self.learn()?;
        self.set_paces();
        self.load_for(Duration::from_secs_f64(self.plan.warmup));
        self.settle();
        for port in &mut self.ports {
            port.reset();
        }
        self.set_paces();
        self.load_for(Duration::from_millis(20));
        self.ports.iter_mut().for_each(|port| port.latency.reset());
        (self.pauses, self.discarded, self.dirtied) = (0, 0, 0);
        let before = self.mark();
        self.load_for(Duration::from_secs_f64(self.plan.seconds));
        let after = self.mark();
        self.settle();
        Ok(self.report(&before, &after))
    }

    /// Lets each port send all that it has once, so that the switch has heard all addresses.
    fn learn(&mut self) -> Result<()> {
        for port in &mut self.ports {
            for receiver in &mut port.receivers {
                let room = receiver.ring.free();
                receiver.ring.post(room);
            }
        }
        self.last_turn = self.clock.ticks();
        let deadline = Instant::now() + LEARN_LIMIT;
        let mut left: Vec<Vec<u64>> = (0..self.ports.len()).map(|port| self.lessons(port)).collect();
        while left.iter().flatten().any(|left| *left > 0) {
            ensure!(Instant::now() < deadline, "the switch does not take the first frames; does it run?");
            for (port, left) in self.ports.iter_mut().zip(&mut left) {
                for (sender, left) in port.senders.iter_mut().zip(left) {
                    sender.ring.reap();
                    let outstanding = sender.ring.posted() - sender.ring.reaped();
                    // One burst at a time, so that floods do not fill everybody's rings.
                    if *left > 0 && outstanding == 0 {
                        let count = (*left).min(BATCH.into());
                        sender.send(count as u16, |_| 0);
                        *left -= count;
                    }
                }
            }
            self.receive_all();
        }
        self.settle();
        Ok(())
    }

    /// Frames that each of a port's rings has to send for its addresses to be known.
    fn lessons(&self, port: usize) -> Vec<u64> {
        let stations = u64::from(self.plan.stations(port as u16));
        let senders = self.ports[port].senders.iter();
        // The first ring's frames have all addresses if there are so many.
        senders.map(|sender| stations.clamp(1, sender.frames())).collect()
    }

    fn receive_all(&mut self) -> u32 {
        let (mut idle, mut active) = (std::mem::take(&mut self.idle), std::mem::take(&mut self.active));
        let count = idle.iter().chain(&active).map(|&port| self.receive(port)).sum();
        std::mem::swap(&mut self.idle, &mut idle);
        std::mem::swap(&mut self.active, &mut active);
        count
    }

    fn set_paces(&mut self) {
        let now = self.clock.ticks();
        let per_second = self.clock.ticks_in(Duration::from_secs(1)) as f64;
        let senders = f64::from(self.plan.ports);
        self.paces = (self.ports.iter())
            .map(|port| {
                let rate = match port.role {
                    Role::Pair => self.plan.rate.map(|rate| rate / senders),
                    Role::Flooder => self.plan.flood,
                    Role::Idle | Role::Sink => None,
                };
                rate.map(|mpps| Pace::new(mpps * 1e6 / per_second, now))
            })
            .collect();
        self.last_turn = now;
    }

    /// Sends and receives for a time.
    fn load_for(&mut self, time: Duration) {
        let end = self.clock.ticks() + self.clock.ticks_in(time);
        self.last_turn = self.clock.ticks();
        while self.last_turn < end {
            self.turn(true);
        }
    }

    /// Receives until nothing comes any more.
    fn settle(&mut self) {
        let (began, mut heard) = (Instant::now(), Instant::now());
        while heard.elapsed() < QUIET && began.elapsed() < QUIET_LIMIT {
            if self.receive_all() > 0 {
                heard = Instant::now();
            }
        }
        for port in &mut self.ports {
            for sender in &mut port.senders {
                sender.ring.reap();
            }
        }
    }

    /// Looks at all ports once.
    fn turn(&mut self, sending: bool) {
        let began = self.begin_turn();
        let mut count = 0;
        for index in 0..self.active.len() {
            count += self.receive(self.active[index]);
        }
        if sending {
            for index in 0..self.active.len() {
                count += self.send(self.active[index], began);
            }
        }
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(RARELY) {
            self.look_after(began);
        }
        if count > 0 {
            self.busy += self.clock.ticks() - began;
        } else {
            (0..SPINS).for_each(|_| std::hint::spin_loop());
        }
        if let Some(nap) = self.plan.nap {
            std::thread::sleep(Duration::from_micros(nap));
        }
    }

    /// The time now. If we were held up, paces continue from here and stamps of before count no more.
    fn begin_turn(&mut self) -> u64 {
        let now = self.clock.ticks();
        let gap = now - self.last_turn;
        if gap > self.clock.ticks_in(PAUSE) && self.plan.nap.is_none() {
            self.pauses += 1;
            self.valid_from = now;
            self.paces.iter_mut().flatten().for_each(|pace| pace.shift(gap));
        }
        self.last_turn = now;
        now
    }

    #[inline]
    fn receive(&mut self, index: usize) -> u32 {
        let refill = !(self.plan.stalled && self.ports[index].role == Role::Sink);
        let Port { receivers, latency, received, heard, .. } = &mut self.ports[index];
        let (clock, valid_from, discarded) = (&self.clock, self.valid_from, &mut self.discarded);
        let mut count = 0;
        for receiver in receivers {
            count += u32::from(receiver.drain(refill, |stamp| {
                if stamp < valid_from {
                    *discarded += 1;
                } else {
                    latency.saturating_record(clock.ns(clock.ticks().saturating_sub(stamp)));
                }
            }));
        }
        if count > 0 {
            *received += u64::from(count);
            *heard = self.last_turn;
        }
        count
    }

    #[inline]
    fn send(&mut self, index: usize, now: u64) -> u32 {
        if let Some(pace) = &mut self.paces[index] {
            return self.ports[index].send_due(pace, now);
        }
        if self.ports[index].role != Role::Pair {
            return 0;
        }
        let broadcasts =
            if self.plan.broadcast { self.ports.iter().rev().nth(1).map_or(0, |port| port.sent) } else { 0 };
        let heard = self.ports[self.ports[index].peer].received.saturating_sub(broadcasts);
        let in_flight = self.ports[index].in_flight(heard);
        let window = u64::from(self.plan.window);
        let allowed = if window == 0 { u64::MAX } else { window.saturating_sub(in_flight) };
        if allowed < u64::from(BATCH.min(self.plan.window)) {
            return 0;
        }
        let stamped = self.plan.latency.is_some();
        self.ports[index].send(allowed, |_| if stamped { now } else { 0 })
    }

    /// What needs no looking at each time: logs, ports beside, and frames that got lost.
    #[cold]
    fn look_after(&mut self, now: u64) {
        if now.saturating_sub(self.last_sweep) > self.clock.ticks_in(SWEEP) {
            self.dirtied += self.logs.iter().map(DirtyLog::sweep).sum::<u64>();
            self.last_sweep = now;
        }
        for index in 0..self.idle.len() {
            self.receive(self.idle[index]);
        }
        let patience = self.clock.ticks_in(LOST_AFTER);
        for index in 0..self.ports.len() {
            let heard = self.ports[self.ports[index].peer].heard;
            let (received, port) = (self.ports[self.ports[index].peer].received, &mut self.ports[index]);
            let is_silent = port.role == Role::Pair && now.saturating_sub(heard.max(port.heard)) > patience;
            // What the switch has not taken yet is late, not lost.
            if is_silent && port.all_taken() {
                port.written_off += port.in_flight(received);
                port.heard = now;
            }
        }
    }

    fn mark(&self) -> Mark {
        Mark {
            at: Instant::now(),
            cpu: cpu::thread_time(),
            busy: self.busy,
            ticks: self.clock.ticks(),
            sent: self.ports.iter().map(|port| port.sent).collect(),
            received: self.ports.iter().map(|port| port.received).collect(),
        }
    }

    fn report(&self, before: &Mark, after: &Mark) -> Report {
        let seconds = (after.at - before.at).as_secs_f64();
        let pairs = 0..usize::from(self.plan.ports);
        let sum = |counts: &[u64]| counts[pairs.clone()].iter().sum::<u64>();
        let received = sum(&after.received) - sum(&before.received);
        let (all, found) = (&self.ports[pairs.clone()], report::findings(&self.ports));
        let mut latency = all[0].latency.clone();
        all[1..].iter().for_each(|port| latency.add(&port.latency).unwrap_or_default());
        let total = |count: fn(&Port) -> u64| all.iter().map(count).sum::<u64>();
        let busy = after.busy - before.busy;
        let port = |port: usize| PortReport {
            sent: after.sent[port] - before.sent[port],
            received: after.received[port] - before.received[port],
        };
        let rings = self.ports.iter().flat_map(Port::rings);
        Report {
            seconds,
            received,
            sent: sum(&after.sent) - sum(&before.sent),
            mpps: received as f64 / seconds / 1e6,
            gbps: received as f64 * mean_size(&self.plan) * 8.0 / seconds / 1e9,
            lost: total(|port| port.sent).saturating_sub(total(|port| port.received)),
            held_back: total(|port| port.held_back),
            verified: found.good,
            foreign: found.foreign,
            misplaced: found.misplaced,
            wrong_length: found.wrong_length,
            missing: found.missing,
            kicks: rings.map(|ring| ring.kicks()).sum(),
            generator_busy: busy as f64 / (after.ticks - before.ticks).max(1) as f64,
            generator_ns: self.clock.ns(busy) as f64 / received.max(1) as f64,
            generator_cpu: (after.cpu - before.cpu).as_secs_f64() / seconds,
            generator_pauses: self.pauses,
            discarded: self.discarded,
            dirtied: self.dirtied,
            latency: Latency::of(&latency),
            ports: (0..self.ports.len()).map(port).collect(),
        }
    }
}

/// Average length of a frame.
fn mean_size(plan: &Plan) -> f64 {
    let count = 12;
    (0..count).map(|number| plan.size.of(number) as f64).sum::<f64>() / count as f64
}
