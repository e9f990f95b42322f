//! Counters of a port. Workers write, the control side reads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::capture::CapturePoint;
use crate::frame::Burst;
use crate::handover::StatsRecord;
use crate::limits::MAX_QUEUE_PAIRS;
use crate::mem::OnLoss;
use crate::switch::DropReason;
use crate::virtq::Fault;

/// Queue pairs that every port has counters for. Hardly one has more, and whoever reads counters reads all that there are.
const FEW: usize = 8;

/// Frames and bytes of one direction of one queue, kept by whoever holds the queue.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct QueueCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    notifications: AtomicU64,
    ticks: AtomicU64,
    /// Frames that another process has counted.
    inherited: AtomicU64,
}

impl QueueCounters {
    /// Adds a burst. There is one writer at a time, so plain loads and stores do.
    #[inline]
    pub fn add(&self, frames: u64, bytes: u64) {
        self.frames.store(self.frames.load(Ordering::Relaxed) + frames, Ordering::Relaxed);
        self.bytes.store(self.bytes.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }

    /// Adds a burst where there may be several writers.
    pub fn add_shared(&self, frames: u64, bytes: u64) {
        self.frames.fetch_add(frames, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds one notification sent to the other side.
    #[inline]
    pub fn notified(&self) {
        self.notifications.store(self.notifications.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Adds time that its worker spent on a burst.
    #[inline]
    pub fn spent(&self, ticks: u64) {
        self.ticks.store(self.ticks.load(Ordering::Relaxed).wrapping_add(ticks), Ordering::Relaxed);
    }

    /// Time that was spent on it, in ticks of the workers' clock, and the frames that it was spent on.
    pub fn cost(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.ticks), read(&self.frames).saturating_sub(read(&self.inherited)))
    }

    /// Frames, bytes, notifications.
    pub fn read(&self) -> (u64, u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.frames), read(&self.bytes), read(&self.notifications))
    }
}

/// Lines of the cache of its own: several workers write to it, while others read what would be beside it.
#[derive(Debug)]
#[repr(align(64))]
struct Apart<T>(T);

impl QueueCounters {
    /// Continues the counts of another process. Before there is a writer.
    fn restore(&self, frames: u64, bytes: u64, notifications: u64) {
        self.frames.store(frames, Ordering::Relaxed);
        self.inherited.store(frames, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.notifications.store(notifications, Ordering::Relaxed);
    }
}

/// Counters of some queue pairs.
#[derive(Debug)]
struct Queues {
    rx: Box<[QueueCounters]>,
    tx: Box<[QueueCounters]>,
}

impl Queues {
    fn new(pairs: usize) -> Self {
        let counters = || (0..pairs).map(|_| QueueCounters::default()).collect();
        Self { rx: counters(), tx: counters() }
    }
}

/// All counters of a port. They outlive its links.
#[derive(Debug)]
pub struct PortStats {
    few: Queues,
    /// Of all other pairs, once there is such a one.
    more: OnceLock<Queues>,
    drops: Apart<[AtomicU64; DropReason::COUNT]>,
    /// Frames that the switch has made of others or by itself, and those it has put into others.
    changes: Apart<[AtomicU64; 2]>,
    /// Times the other side connected.
    pub connects: AtomicU64,
    /// Faults of the other side.
    pub faults: AtomicU64,
    fault: AtomicU64,
    last_fault: AtomicU64,
    /// The log has a line about rings of the port that have no record in the journal.
    pub told_of_no_record: AtomicBool,
    /// Where its frames can be looked at.
    pub capture: CapturePoint,
}

impl Default for PortStats {
    fn default() -> Self {
        Self {
            few: Queues::new(FEW),
            more: OnceLock::new(),
            drops: Apart(std::array::from_fn(|_| AtomicU64::new(0))),
            changes: Apart(Default::default()),
            connects: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            fault: AtomicU64::new(0),
            last_fault: AtomicU64::new(0),
            told_of_no_record: AtomicBool::new(false),
            capture: CapturePoint::default(),
        }
    }
}

impl PortStats {
    /// All counts, to be continued by another process.
    pub fn export(&self) -> StatsRecord {
        let used = |of: fn(&Self, usize) -> &QueueCounters| {
            let read = (0..self.pairs()).map(|pair| (pair, of(self, pair).read()));
            read.filter(|(_, counts)| *counts != (0, 0, 0)).map(|(pair, (a, b, c))| (pair, a, b, c)).collect()
        };
        let drops = DropReason::ALL.iter().map(|&reason| (reason.name().to_owned(), self.drops(reason)));
        StatsRecord {
            rx: used(Self::rx),
            tx: used(Self::tx),
            drops: drops.filter(|(_, count)| *count > 0).collect(),
            made: self.made(),
            merged: self.merged(),
            connects: self.connects.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            fault: self.fault().map(Fault::code),
        }
    }

    /// Continues the counts of another process: what its record lacks is zero. Before workers count.
    pub fn restore(&self, record: &StatsRecord) {
        let restore = |counts: &[(usize, u64, u64, u64)], of: fn(&Self, usize) -> &QueueCounters| {
            (0..self.pairs()).for_each(|pair| of(self, pair).restore(0, 0, 0));
            for &(pair, frames, bytes, notifications) in counts.iter().filter(|counts| counts.0 < MAX_QUEUE_PAIRS) {
                of(self, pair).restore(frames, bytes, notifications);
            }
        };
        restore(&record.rx, Self::rx);
        restore(&record.tx, Self::tx);
        for reason in DropReason::ALL {
            let count = record.drops.get(reason.name()).copied().unwrap_or(0);
            self.drops.0[*reason as usize].store(count, Ordering::Relaxed);
        }
        for (count, value) in self.changes.0.iter().zip([record.made, record.merged]) {
            count.store(value, Ordering::Relaxed);
        }
        self.connects.store(record.connects, Ordering::Relaxed);
        self.faults.store(record.faults, Ordering::Relaxed);
        self.fault.store(record.fault.unwrap_or(0).into(), Ordering::Release);
        self.last_fault.store(record.fault.unwrap_or(0).into(), Ordering::Release);
    }

    /// Receive counters of a queue pair. Pairs beyond the limit share the last place.
    #[inline]
    pub fn rx(&self, pair: usize) -> &QueueCounters {
        let (queues, place) = self.queues(pair);
        &queues.rx[place]
    }

    /// Transmit counters of a queue pair. Pairs beyond the limit share the last place.
    #[inline]
    pub fn tx(&self, pair: usize) -> &QueueCounters {
        let (queues, place) = self.queues(pair);
        &queues.tx[place]
    }

    /// Where the counters of a queue pair are.
    #[inline]
    fn queues(&self, pair: usize) -> (&Queues, usize) {
        if pair < FEW { (&self.few, pair) } else { (self.more(), pair.min(MAX_QUEUE_PAIRS - 1) - FEW) }
    }

    #[inline]
    fn more(&self) -> &Queues {
        self.more.get_or_init(|| Queues::new(MAX_QUEUE_PAIRS - FEW))
    }

    /// Makes room for the counts of a queue pair: for who makes its queues, since workers allocate nothing.
    pub fn make_room(&self, pair: usize) {
        self.queues(pair);
    }

    /// Queue pairs that there is room for: no other has counted anything.
    pub fn pairs(&self) -> usize {
        if self.more.get().is_some() { MAX_QUEUE_PAIRS } else { FEW }
    }

    /// Counts frames dropped.
    #[inline]
    pub fn drop_frames(&self, reason: DropReason, frames: u64) {
        self.drops.0[reason as usize].fetch_add(frames, Ordering::Relaxed);
    }

    /// Counts a frame that the burst has refused, and shows it to who looks at the port.
    #[cold]
    pub fn refuse(&self, burst: &Burst<'_>, reason: DropReason) {
        self.drop_frames(reason, 1);
        if self.capture.is_on() {
            self.capture.record_refused(burst, reason);
        }
    }

    /// Frames dropped for a reason.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops.0[reason as usize].load(Ordering::Relaxed)
    }

    /// Counts frames that came into being here: further copies for further receivers, further segments of a super-packet,
    /// announcements.
    #[inline]
    pub fn make_frames(&self, frames: u64) {
        self.changes.0[0].fetch_add(frames, Ordering::Relaxed);
    }

    /// Counts frames that were put into others.
    #[inline]
    pub fn merge_frames(&self, frames: u64) {
        self.changes.0[1].fetch_add(frames, Ordering::Relaxed);
    }

    /// Frames that came into being here.
    pub fn made(&self) -> u64 {
        self.changes.0[0].load(Ordering::Relaxed)
    }

    /// Frames that were put into others.
    pub fn merged(&self) -> u64 {
        self.changes.0[1].load(Ordering::Relaxed)
    }

    /// Frames received and sent, over all queues.
    pub fn frames(&self) -> (u64, u64) {
        let pairs = || 0..self.pairs();
        (pairs().map(|pair| self.rx(pair).read().0).sum(), pairs().map(|pair| self.tx(pair).read().0).sum())
    }

    /// Records a fault, unless there is one: what follows from it is not worth telling. The port serves no frame until
    /// [`PortStats::clear_fault`].
    pub fn set_fault(&self, fault: Fault) {
        let code = u64::from(fault.code());
        if self.fault.compare_exchange(0, code, Ordering::Release, Ordering::Relaxed).is_ok() {
            self.remember_fault(code);
        }
    }

    /// For the operator, who may look when it is over. The count goes last: whoever sees it has the reason, too.
    fn remember_fault(&self, code: u64) {
        self.last_fault.store(code, Ordering::Release);
        self.faults.fetch_add(1, Ordering::Release);
    }

    /// The last fault that there was, whether the port still stands for it or its guest has begun anew since.
    pub fn last_fault(&self) -> Option<Fault> {
        Fault::from_code(self.last_fault.load(Ordering::Acquire) as u8)
    }

    /// The fault that stopped the port, if one did.
    #[inline]
    pub fn fault(&self) -> Option<Fault> {
        Fault::from_code(self.fault.load(Ordering::Acquire) as u8)
    }

    /// The other side has reset: serve it again.
    pub fn clear_fault(&self) {
        self.fault.store(0, Ordering::Release);
    }
}

impl OnLoss for PortStats {
    /// Takes the place of any other fault, since it outlives them: a reset of the driver does not bring memory back.
    fn memory_lost(&self) {
        let code = u64::from(Fault::MemoryLost.code());
        self.fault.store(code, Ordering::Release);
        self.remember_fault(code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another process goes on with all counts, wherever they are, and has no more room than it needs.
    #[test]
    fn counts_of_all_pairs_go_on() {
        for (pairs, room) in [(&[0, FEW - 1][..], FEW), (&[1, FEW, MAX_QUEUE_PAIRS - 1], MAX_QUEUE_PAIRS)] {
            let stats = PortStats::default();
            stats.make_room(FEW - 1);
            assert_eq!(stats.pairs(), FEW);
            pairs.iter().for_each(|&pair| stats.rx(pair).add(1 + pair as u64, 60));
            pairs.iter().for_each(|&pair| stats.tx(pair).add(2 + pair as u64, 60));
            let frames: u64 = pairs.iter().map(|&pair| 1 + pair as u64).sum();
            assert_eq!(stats.frames(), (frames, frames + pairs.len() as u64));
            let (heir, mut record) = (PortStats::default(), stats.export());
            assert_eq!(record.rx.iter().map(|counts| counts.0).collect::<Vec<_>>(), pairs);
            record.rx.push((MAX_QUEUE_PAIRS, 1, 1, 1));
            heir.restore(&record);
            assert_eq!((heir.pairs(), heir.frames()), (room, stats.frames()));
            assert!(pairs.iter().all(|&pair| heir.rx(pair).read() == stats.rx(pair).read()));
        }
        let stats = PortStats::default();
        stats.make_room(FEW);
        assert_eq!((stats.pairs(), stats.frames()), (MAX_QUEUE_PAIRS, (0, 0)));
        stats.rx(usize::MAX).add(1, 60);
        assert_eq!(stats.rx(MAX_QUEUE_PAIRS - 1).read().0, 1);
    }

    /// What one record has said is not left over when another one is restored that lacks it.
    #[test]
    fn what_a_record_lacks_is_zero() {
        let stats = PortStats::default();
        for pair in [0, 1, FEW] {
            stats.rx(pair).add(3, 60);
            stats.tx(pair).add(4, 60);
            stats.tx(pair).notified();
        }
        stats.drop_frames(DropReason::Full, 5);
        stats.make_frames(6);
        stats.merge_frames(7);
        stats.connects.store(8, Ordering::Relaxed);
        stats.set_fault(Fault::MemoryLost);
        let heir = PortStats::default();
        // Once more sets, and does not add.
        (0..2).for_each(|_| heir.restore(&stats.export()));
        assert_eq!((heir.export(), heir.frames()), (stats.export(), (9, 12)));
        assert_eq!(heir.rx(0).cost().1, 0);
        let fewer = StatsRecord { rx: vec![(1, 2, 60, 0)], connects: 1, ..StatsRecord::default() };
        heir.restore(&fewer);
        assert_eq!((heir.export(), heir.frames()), (fewer, (2, 0)));
        heir.restore(&StatsRecord::default());
        assert_eq!((heir.export(), heir.last_fault()), (StatsRecord::default(), None));
        heir.rx(0).add(1, 60);
        assert_eq!(heir.rx(0).cost().1, 1);
    }

    #[test]
    fn shared_counters_lose_nothing() {
        let counters = QueueCounters::default();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..100_000).for_each(|_| counters.add_shared(1, 60)));
            }
        });
        assert_eq!((counters.read().0, counters.read().1), (200_000, 12_000_000));
    }
}
