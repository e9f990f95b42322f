//! What a worker counts of itself.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A clock that costs a few cycles to read.
#[derive(Debug, Clone)]
pub struct Clock {
    started: Instant,
    first: u64,
    ns_per_tick: f64,
}

/// The time stamp counter, or nanoseconds where there is none.
#[inline]
fn now() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction.
    return unsafe { core::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// The same moment on the wall and in ticks. The closest of a few attempts, since a thread can be held up between the two
/// readings, and rate limits rely on the length of a tick.
fn moment() -> (Instant, u64) {
    let attempt = || {
        let (before, wall) = (now(), Instant::now());
        (now().wrapping_sub(before), wall, before)
    };
    let closest = (0..4).map(|_| attempt()).fold(attempt(), |best, next| if next.0 < best.0 { next } else { best });
    (closest.1, closest.2)
}

impl Clock {
    /// Starts, and measures the length of a tick once per process (takes 2 ms then).
    pub fn start() -> Self {
        static NS_PER_TICK: OnceLock<f64> = OnceLock::new();
        let ns_per_tick = *NS_PER_TICK.get_or_init(|| {
            let (began, first) = moment();
            std::thread::sleep(std::time::Duration::from_millis(2));
            let (ended, last) = moment();
            ended.duration_since(began).as_nanos() as f64 / last.wrapping_sub(first).max(1) as f64
        });
        Self { started: Instant::now(), first: now(), ns_per_tick }
    }

    /// Ticks, of a constant length, since some moment.
    #[inline]
    pub fn ticks(&self) -> u64 {
        now()
    }

    /// The number of ticks in a time.
    pub fn ticks_in(&self, time: std::time::Duration) -> u64 {
        (time.as_nanos() as f64 / self.ns_per_tick) as u64
    }

    /// Ticks as nanoseconds.
    #[inline]
    pub fn ns(&self, ticks: u64) -> u64 {
        (ticks as f64 * self.ns_per_tick) as u64
    }
}

/// Counters of one worker; it writes, the control side reads.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct WorkerStats {
    busy_ticks: AtomicU64,
    frames: AtomicU64,
    bursts: AtomicU64,
    sleeps: AtomicU64,
    clock: OnceLock<Clock>,
}

#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    // One writer.
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

impl WorkerStats {
    /// The worker begins.
    pub fn begin(&self, clock: &Clock) {
        let _ = self.clock.set(clock.clone());
    }

    /// A pass that found work took so long.
    #[inline]
    pub fn busy(&self, ticks: u64) {
        add(&self.busy_ticks, ticks);
    }

    /// A burst of so many frames.
    #[inline]
    pub fn burst(&self, frames: usize) {
        add(&self.frames, frames as u64);
        add(&self.bursts, 1);
    }

    /// It goes to sleep.
    pub fn slept(&self) {
        add(&self.sleeps, 1);
    }

    /// Nanoseconds busy and nanoseconds since the start.
    pub fn times(&self) -> (u64, u64) {
        let Some(clock) = self.clock.get() else { return (0, 0) };
        let up = clock.started.elapsed().as_nanos() as u64;
        // Over a long run the tick's length follows from the run itself.
        let ticks = clock.ticks().wrapping_sub(clock.first).max(1);
        let busy = self.busy_ticks.load(Ordering::Relaxed) as f64 * (up as f64 / ticks as f64);
        (busy as u64, up)
    }

    /// Frames, bursts, sleeps.
    pub fn counts(&self) -> (u64, u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.frames), read(&self.bursts), read(&self.sleeps))
    }
}
