//! Looking at a port's frames while they pass.
//!
//! A worker that finds a port's capture on copies its frames into one of a few buffers, the control side empties them.
//! A worker never waits for it: a buffer that is being emptied is passed over, one that is full loses the frame, and
//! both are counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::frame::{Burst, Frame};
use crate::limits::MAX_FRAME;
use crate::port::stats::PortStats;
use crate::switch::DropReason;
use crate::sync::SpinLock;

/// Buffers: enough for some workers and the control side to find one each.
const LANES: usize = 4;
/// Bytes of each.
const LANE: usize = 2 << 20;
/// Bytes of a record before those of the frame: time, direction, reason, length, bytes captured.
const HEADER: usize = 8 + 1 + 1 + 4 + 4;
/// Stands for "not dropped" in a record.
const DELIVERED: u8 = u8::MAX;
const _: () = assert!(DropReason::COUNT < DELIVERED as usize);

/// Which way a frame went, in the switch's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the port.
    Rx = 0,
    /// To the port.
    Tx = 1,
}

/// What to capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureOptions {
    /// Bytes kept of each frame, from its start.
    pub snap_length: usize,
    /// One direction only.
    pub direction: Option<Direction>,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self { snap_length: MAX_FRAME, direction: None }
    }
}

/// A frame that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// Which way it went.
    pub direction: Direction,
    /// Why it was dropped, if that was decided when it was looked at. A frame for a port that has no buffers left
    /// counts as delivered here; one beyond a rate limit is not seen at all.
    pub drop_reason: Option<DropReason>,
    /// Length of the whole frame, in bytes.
    pub length: usize,
    /// Its first bytes.
    pub bytes: Vec<u8>,
}

/// A port's place to be looked at. Off unless somebody looks.
#[derive(Debug, Default)]
pub struct CapturePoint {
    is_taken: AtomicBool,
    is_on: AtomicBool,
    snap_length: AtomicU32,
    skips: [AtomicBool; 2],
    lost: AtomicU64,
    lanes: [SpinLock<Vec<u8>>; LANES],
}

impl CapturePoint {
    /// Whether somebody looks.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Copies a frame for who looks, or counts it as lost. For workers.
    #[cold]
    pub fn record(&self, burst: &Burst<'_>, frame: &Frame, direction: Direction, reason: Option<DropReason>) {
        if self.skips[direction as usize].load(Ordering::Relaxed) {
            return;
        }
        let lane = self.lanes.iter().find_map(|lane| lane.try_lock());
        let size = frame.len().min(self.snap_length.load(Ordering::Relaxed) as usize);
        match lane {
            // Never beyond its capacity, so that a worker does not allocate.
            Some(mut lane) if lane.capacity() - lane.len() >= HEADER + size => {
                let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
                lane.extend_from_slice(&time.to_ne_bytes());
                lane.extend_from_slice(&[direction as u8, reason.map_or(DELIVERED, |reason| reason as u8)]);
                lane.extend_from_slice(&(frame.len() as u32).to_ne_bytes());
                lane.extend_from_slice(&(size as u32).to_ne_bytes());
                copy(burst, frame, size, &mut lane);
            }
            _ => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Appends the first `size` bytes of a frame.
fn copy(burst: &Burst<'_>, frame: &Frame, size: usize, to: &mut Vec<u8>) {
    let end = to.len() + size;
    to.extend_from_slice(frame.head().get(..size).unwrap_or(frame.head()));
    for piece in burst.tail(frame) {
        let at = to.len();
        if at == end {
            break;
        }
        to.resize(end.min(at + piece.len()), 0);
        piece.read(&mut to[at..]);
    }
    to.resize(end, 0);
}

/// A running capture of a port. It ends when dropped.
#[derive(Debug)]
pub struct Capture {
    stats: Arc<PortStats>,
}

impl Capture {
    /// Begins. `None` if somebody looks already.
    pub fn start(stats: Arc<PortStats>, options: CaptureOptions) -> Option<Self> {
        let point = &stats.capture;
        if point.is_taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        point.lost.store(0, Ordering::Relaxed);
        point.snap_length.store(options.snap_length.min(MAX_FRAME) as u32, Ordering::Relaxed);
        for direction in [Direction::Rx, Direction::Tx] {
            let skip = options.direction.is_some_and(|only| only != direction);
            point.skips[direction as usize].store(skip, Ordering::Relaxed);
        }
        point.lanes.iter().for_each(|lane| *lane.lock() = Vec::with_capacity(LANE));
        point.is_on.store(true, Ordering::Release);
        Some(Self { stats })
    }

    /// Takes the frames that have passed since the last time, in order.
    pub fn drain(&self) -> Vec<Captured> {
        let mut frames = Vec::new();
        for lane in &self.stats.capture.lanes {
            if lane.lock().is_empty() {
                continue;
            }
            // Made before the lock is taken, for the length of which workers pass this buffer over.
            let mut bytes = Vec::with_capacity(LANE);
            std::mem::swap(&mut *lane.lock(), &mut bytes);
            let mut rest = bytes.as_slice();
            frames.extend(std::iter::from_fn(|| parse(&mut rest)));
        }
        frames.sort_by_key(|frame| frame.time_ns);
        frames
    }

    /// Frames lost to it so far, for want of room.
    pub fn lost(&self) -> u64 {
        self.stats.capture.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let point = &self.stats.capture;
        point.is_on.store(false, Ordering::Release);
        point.lanes.iter().for_each(|lane| drop(std::mem::take(&mut *lane.lock())));
        point.is_taken.store(false, Ordering::Release);
    }
}

/// Takes the first record off.
fn parse(rest: &mut &[u8]) -> Option<Captured> {
    let time_ns = u64::from_ne_bytes(take(rest)?);
    let [direction, reason] = take(rest)?;
    let length = u32::from_ne_bytes(take(rest)?) as usize;
    let size = u32::from_ne_bytes(take(rest)?) as usize;
    let bytes = rest.split_off(..size)?.to_vec();
    let direction = if direction == Direction::Rx as u8 { Direction::Rx } else { Direction::Tx };
    Some(Captured { time_ns, direction, drop_reason: DropReason::ALL.get(usize::from(reason)).copied(), length, bytes })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::BurstStorage;
    use crate::mem::SourceSegment;

    fn record(stats: &PortStats, len: usize, direction: Direction, reason: Option<DropReason>) {
        let bytes: Vec<u8> = (0..len).map(|at| at as u8).collect();
        let mut storage = BurstStorage::default();
        let mut burst = storage.begin();
        let mut frame = burst.start(0);
        let (a, b) = bytes.split_at(len / 2);
        assert!(frame.push(SourceSegment::from_slice(a)) && frame.push(SourceSegment::from_slice(b)));
        frame.finish().unwrap();
        stats.capture.record(&burst, burst.frame(0), direction, reason);
    }

    #[test]
    fn what_passes_is_seen() {
        let stats = Arc::new(PortStats::default());
        assert!(!stats.capture.is_on());
        let capture = Capture::start(stats.clone(), CaptureOptions::default()).unwrap();
        assert!(Capture::start(stats.clone(), CaptureOptions::default()).is_none(), "one at a time");
        record(&stats, 60, Direction::Rx, None);
        record(&stats, 5000, Direction::Tx, Some(DropReason::MtuEgress));
        let frames = capture.drain();
        let seen: Vec<_> = frames.iter().map(|frame| (frame.direction, frame.drop_reason, frame.length)).collect();
        assert_eq!(seen, [(Direction::Rx, None, 60), (Direction::Tx, Some(DropReason::MtuEgress), 5000)]);
        assert!(
            frames[1].bytes.iter().enumerate().all(|(at, byte)| *byte == at as u8) && frames[1].bytes.len() == 5000
        );
        assert!(capture.drain().is_empty());
        drop(capture);
        assert!(!stats.capture.is_on());

        let options = CaptureOptions { snap_length: 20, direction: Some(Direction::Tx) };
        let capture = Capture::start(stats.clone(), options).unwrap();
        record(&stats, 60, Direction::Rx, None);
        record(&stats, 61, Direction::Tx, None);
        let frames = capture.drain();
        assert_eq!(frames.iter().map(|frame| (frame.bytes.len(), frame.length)).collect::<Vec<_>>(), [(20, 61)]);
    }

    #[test]
    fn what_does_not_fit_is_lost_and_counted() {
        let stats = Arc::new(PortStats::default());
        let capture = Capture::start(stats.clone(), CaptureOptions::default()).unwrap();
        let fit = LANE / (HEADER + 9000);
        (0..fit + 3).for_each(|_| record(&stats, 9000, Direction::Rx, None));
        assert_eq!((capture.drain().len(), capture.lost()), (fit, 3));
        record(&stats, 60, Direction::Rx, None);
        assert_eq!(capture.drain().len(), 1);
    }
}
