//! What a worker counts of itself.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::meter::{Copies, Stage};

/// A clock that costs a few cycles to read.
#[derive(Debug, Clone)]
pub struct Clock {
    started: Instant,
    first: u64,
    ns_per_tick: f64,
}

/// The time stamp counter, or nanoseconds where there is none.
#[inline]
pub(super) fn now() -> u64 {
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

/// Places of the histogram of burst sizes: place `n` counts bursts of at most 2^n frames, and of more than the place
/// before it; the last one is without bound.
pub const BURST_BUCKETS: usize = 8;

/// Counters of one worker; it writes, the control side reads.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct WorkerStats {
    busy_ticks: AtomicU64,
    frames: AtomicU64,
    delivered: AtomicU64,
    copies: AtomicU64,
    bursts: [AtomicU64; BURST_BUCKETS],
    stage_ticks: [AtomicU64; Stage::COUNT],
    sampled_frames: AtomicU64,
    asleep: Asleep,
    sleeps: AtomicU64,
    clock: OnceLock<Clock>,
}

/// Time asleep, which also grows during a sleep: an idle worker's has no end.
#[derive(Debug, Default)]
struct Asleep {
    /// The total while awake; during a sleep [`Asleep::SLEEPS`] and when it would have begun had it been the only one. In one
    /// word, so that nobody sees a sleep twice or not at all.
    word: AtomicU64,
    /// The most that anybody was told. A reader may look at the clock later than the worker, and see the sleep end after that.
    told: AtomicU64,
}

impl Asleep {
    const SLEEPS: u64 = 1 << 63;

    fn begin(&self, now: u64) {
        let total = self.word.load(Ordering::Relaxed);
        self.word.store(Self::SLEEPS | now.saturating_sub(total), Ordering::Relaxed);
    }

    fn end(&self, now: u64) {
        self.word.store(Self::total(self.word.load(Ordering::Relaxed), now), Ordering::Relaxed);
    }

    fn total(word: u64, now: u64) -> u64 {
        if word & Self::SLEEPS == 0 { word } else { now.saturating_sub(word & !Self::SLEEPS) }
    }

    fn read(&self, now: impl FnOnce() -> u64) -> u64 {
        let word = self.word.load(Ordering::Acquire);
        let total = Self::total(word, now());
        self.told.fetch_max(total, Ordering::Relaxed).max(total)
    }
}

/// The counters of one worker at a moment. Times are in ticks of the [`Clock`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct WorkerCounts {
    /// Time since the start.
    pub up: u64,
    /// Time in passes that found frames.
    pub busy: u64,
    /// Time asleep.
    pub asleep: u64,
    /// Frames received.
    pub frames: u64,
    /// Frames written to receivers.
    pub delivered: u64,
    /// Times that the payload of one of those was copied.
    pub copies: u64,
    /// Frames of the passes that were timed by stage.
    pub sampled_frames: u64,
    /// Time that those took, by [`Stage`].
    pub stages: [u64; Stage::COUNT],
    /// Bursts by size, see [`BURST_BUCKETS`].
    pub bursts: [u64; BURST_BUCKETS],
    /// Times it went to sleep.
    pub sleeps: u64,
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

    /// A pass that found frames took so long.
    #[inline]
    pub fn busy(&self, ticks: u64) {
        add(&self.busy_ticks, ticks);
    }

    /// What has been copied since the start.
    #[inline]
    pub fn copied(&self, copies: Copies) {
        self.delivered.store(copies.delivered, Ordering::Relaxed);
        self.copies.store(copies.delivered + copies.extra, Ordering::Relaxed);
    }

    /// A burst of so many frames, at least one.
    #[inline]
    pub fn burst(&self, frames: usize) {
        add(&self.frames, frames as u64);
        let bucket = (usize::BITS - frames.saturating_sub(1).leading_zeros()) as usize;
        add(&self.bursts[bucket.min(BURST_BUCKETS - 1)], 1);
    }

    /// A pass over so many frames was timed by stage.
    #[cold]
    pub fn sampled(&self, frames: usize, stages: [u64; Stage::COUNT]) {
        add(&self.sampled_frames, frames as u64);
        for (counter, ticks) in self.stage_ticks.iter().zip(stages) {
            add(counter, ticks);
        }
    }

    /// It goes to sleep.
    pub fn falls_asleep(&self, now: u64) {
        add(&self.sleeps, 1);
        self.asleep.begin(now);
    }

    /// It is awake again.
    pub fn wakes(&self, now: u64) {
        self.asleep.end(now);
    }

    /// All counters.
    pub fn counts(&self) -> WorkerCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WorkerCounts {
            busy: read(&self.busy_ticks),
            asleep: self.asleep.read(now),
            frames: read(&self.frames),
            delivered: read(&self.delivered),
            copies: read(&self.copies),
            sampled_frames: read(&self.sampled_frames),
            stages: std::array::from_fn(|stage| read(&self.stage_ticks[stage])),
            bursts: std::array::from_fn(|bucket| read(&self.bursts[bucket])),
            sleeps: read(&self.sleeps),
            // Last, so that no part is longer than the whole.
            up: self.clock.get().map_or(0, |clock| clock.ticks().wrapping_sub(clock.first)),
        }
    }

    /// Ticks of its counters as nanoseconds; 0 before the start. What grows in ticks never shrinks in these, so the length of a
    /// tick is that of the start.
    pub fn ns(&self, ticks: u64) -> u64 {
        self.clock.get().map_or(0, |clock| clock.ns(ticks))
    }

    /// Ticks per second; 0 before the start. Over a long run they follow from the run itself.
    pub fn frequency(&self) -> f64 {
        let Some(clock) = self.clock.get() else { return 0.0 };
        let (ticks, seconds) = (clock.ticks().wrapping_sub(clock.first), clock.started.elapsed().as_secs_f64());
        if seconds < 0.1 { 1e9 / clock.ns_per_tick } else { ticks as f64 / seconds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_sorted_by_size() {
        let stats = WorkerStats::default();
        for frames in [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 1000] {
            stats.burst(frames);
        }
        assert_eq!(stats.counts().bursts, [1, 1, 2, 2, 2, 2, 2, 2]);
    }

    #[test]
    fn a_sleep_counts_while_it_lasts_and_only_once() {
        let asleep = Asleep::default();
        let at = |now: u64| asleep.read(|| now);
        assert_eq!(at(1000), 0);
        asleep.begin(1000);
        assert_eq!((at(1000), at(1300)), (0, 300));
        // A clock that is behind, as another processor's may be.
        assert_eq!(at(900), 300);
        asleep.end(1500);
        assert_eq!((at(1500), at(9000)), (500, 500));
        asleep.begin(9000);
        assert_eq!((at(9000), at(9001)), (500, 501));
        // Seen asleep when the worker has looked at the clock already.
        assert_eq!(at(9200), 700);
        asleep.end(9100);
        assert_eq!(at(9200), 700);
        asleep.begin(9200);
        assert_eq!((at(9250), at(9400)), (700, 800));
    }

    /// Metrics are counters, to which going back is a restart.
    #[test]
    fn times_never_go_back() {
        let stats = WorkerStats::default();
        assert_eq!(stats.ns(1), 0);
        stats.begin(&Clock::start());
        let ticks = 1 << 50;
        let first = stats.ns(ticks);
        for _ in 0..100 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(stats.ns(ticks), first);
        }
    }

    #[test]
    fn the_clock_has_a_frequency() {
        let stats = WorkerStats::default();
        assert_eq!(stats.frequency(), 0.0);
        stats.begin(&Clock::start());
        let early = stats.frequency();
        std::thread::sleep(std::time::Duration::from_millis(150));
        let late = stats.frequency();
        assert!(early > 1e8 && (early / late - 1.0).abs() < 0.05, "{early} {late}");
    }
}
