//! Looking at a port's frames while they pass.
//!
//! A worker that finds a port's capture on copies its frames into one of a few buffers, the control side empties them.
//! A worker never waits for it: a buffer that is full or being emptied is passed over, and a frame for which none is left
//! is lost and counted. Frames that are not wanted cost a look at their headers and are not copied.

#![forbid(unsafe_code)]

pub mod filter;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::frame::{Burst, Frame};
use crate::limits::{BURST, MAX_FRAME};
use crate::port::stats::PortStats;
use crate::switch::DropReason;
use crate::sync::{SpinGuard, SpinLock};
use filter::Filter;

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

/// What became of the frames of a burst, by their places.
#[derive(Debug, Clone)]
pub struct Outcomes([u8; BURST]);

impl Default for Outcomes {
    fn default() -> Self {
        Self([DELIVERED; BURST])
    }
}

impl Outcomes {
    /// Nothing was dropped.
    #[inline]
    pub fn clear(&mut self) {
        self.0 = [DELIVERED; BURST];
    }

    /// Notes that a frame was dropped.
    #[inline]
    pub fn dropped(&mut self, place: u8, reason: DropReason) {
        self.0[usize::from(place) % BURST] = reason as u8;
    }

    /// Counts frames that a queue has dropped, and notes what became of them.
    pub fn count_dropped(&mut self, stats: &PortStats, places: &[u8], reason: DropReason) {
        stats.drop_frames(reason, places.len() as u64);
        places.iter().for_each(|&place| self.dropped(place, reason));
    }

    /// Why a frame was dropped, if it was.
    #[inline]
    pub fn reason(&self, place: u8) -> Option<DropReason> {
        DropReason::ALL.get(usize::from(self.0[usize::from(place) % BURST])).copied()
    }
}

/// What to capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureOptions {
    /// Bytes kept of each frame, from its start.
    pub snap_length: usize,
    /// One direction only.
    pub direction: Option<Direction>,
    /// These frames only.
    pub filter: Option<Filter>,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self { snap_length: MAX_FRAME, direction: None, filter: None }
    }
}

/// A frame that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// Nanoseconds since 1970, when its burst had been dealt with.
    pub time_ns: u64,
    /// Which way it went.
    pub direction: Direction,
    /// Why it was dropped, if it was. Of a frame that was not even let in (`runt`, `oversize`, `bad_offload`) there are
    /// its first 128 bytes at most.
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
    /// Workers try to read it and never wait; it is written when a capture begins and ends.
    wanted: RwLock<Option<CaptureOptions>>,
    lost: AtomicU64,
    lanes: [SpinLock<Lane>; LANES],
}

/// A buffer for records. Its memory is there from the start, so that a worker neither waits for it nor clears it first.
#[derive(Debug, Default)]
struct Lane {
    bytes: Box<[u8]>,
    used: usize,
}

impl Lane {
    fn new() -> Self {
        Self { bytes: vec![0xff; LANE].into_boxed_slice(), used: 0 }
    }

    /// The records.
    fn records(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }

    /// Whether a record of so many bytes fits.
    fn has_room(&self, size: usize) -> bool {
        self.bytes.len() - self.used >= HEADER + size
    }

    /// Adds a record: a header, made for the number of bytes that follow, and those, up to the first `size` bytes of a
    /// frame. `false` if there is no room.
    fn add(
        &mut self,
        header: impl FnOnce(usize) -> [u8; HEADER],
        burst: &Burst<'_>,
        frame: &Frame,
        size: usize,
    ) -> bool {
        let Some(room) = self.bytes.get_mut(self.used..).and_then(|rest| rest.get_mut(..HEADER + size)) else {
            return false;
        };
        let (begin, mut rest) = room.split_at_mut(HEADER);
        let head = frame.head().get(..size).unwrap_or(frame.head());
        let (front, tail) = rest.split_at_mut(head.len());
        front.copy_from_slice(head);
        rest = tail;
        for piece in burst.tail(frame) {
            if rest.is_empty() {
                break;
            }
            let count = piece.read(rest);
            rest = rest.get_mut(count..).unwrap_or_default();
        }
        // Of a frame that was refused there is no more than its head.
        let size = size - rest.len();
        begin.copy_from_slice(&header(size));
        self.used += HEADER + size;
        true
    }
}

impl CapturePoint {
    /// Whether somebody looks.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Copies the frames at `places` for who looks, or counts them as lost. For workers.
    #[cold]
    pub fn record(
        &self,
        burst: &Burst<'_>,
        places: &[u8],
        direction: Direction,
        reason: impl Fn(u8) -> Option<DropReason>,
    ) {
        // Refused only while a capture begins or ends.
        let Ok(wanted) = self.wanted.try_read() else { return };
        let Some(wanted) = wanted.as_ref().filter(|wanted| wanted.direction.is_none_or(|only| only == direction))
        else {
            return;
        };
        // One buffer and one look at the clock for the whole burst, if it fits, and none if nothing of it is wanted.
        let mut lane: Option<(SpinGuard<'_, Lane>, u64)> = None;
        for &place in places {
            let (frame, reason) = (burst.frame(place), reason(place));
            if wanted.filter.as_ref().is_some_and(|filter| !filter.matches(frame.head(), frame.len(), reason)) {
                continue;
            }
            let size = frame.len().min(wanted.snap_length);
            if !lane.as_ref().is_some_and(|(lane, _)| lane.has_room(size)) {
                lane = self.lane(size);
            }
            let kept = lane.as_mut().is_some_and(|(lane, time)| {
                lane.add(|size| header(*time, direction, reason, frame.len(), size), burst, frame, size)
            });
            if !kept {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Copies what there is of the frame that the burst has refused last. For workers.
    #[cold]
    pub fn record_refused(&self, burst: &Burst<'_>, reason: DropReason) {
        self.record(burst, &[burst.count() as u8], Direction::Rx, |_| Some(reason));
    }

    /// A buffer that nobody uses at the moment with room for `size` bytes, and the time.
    fn lane(&self, size: usize) -> Option<(SpinGuard<'_, Lane>, u64)> {
        let lane = self.lanes.iter().filter_map(|lane| lane.try_lock()).find(|lane| lane.has_room(size))?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        Some((lane, time))
    }

    fn want(&self, options: Option<CaptureOptions>) {
        *self.wanted.write().unwrap_or_else(PoisonError::into_inner) = options;
    }
}

/// What a record begins with; see [`parse`].
fn header(time: u64, direction: Direction, reason: Option<DropReason>, len: usize, size: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&time.to_ne_bytes());
    header[8] = direction as u8;
    header[9] = reason.map_or(DELIVERED, |reason| reason as u8);
    header[10..14].copy_from_slice(&(len as u32).to_ne_bytes());
    header[14..].copy_from_slice(&(size as u32).to_ne_bytes());
    header
}

/// A running capture of a port. It ends when dropped.
#[derive(Debug)]
pub struct Capture {
    stats: Arc<PortStats>,
    /// A buffer to put in the place of a full one.
    spare: Lane,
}

impl Capture {
    /// Begins. `None` if somebody looks already.
    pub fn start(stats: Arc<PortStats>, options: CaptureOptions) -> Option<Self> {
        let point = &stats.capture;
        if point.is_taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        point.lost.store(0, Ordering::Relaxed);
        point.lanes.iter().for_each(|lane| *lane.lock() = Lane::new());
        let snap_length = options.snap_length.min(MAX_FRAME);
        point.want(Some(CaptureOptions { snap_length, ..options }));
        point.is_on.store(true, Ordering::Release);
        Some(Self { stats, spare: Lane::new() })
    }

    /// Takes the frames that have passed since the last time, in order.
    pub fn drain(&mut self) -> Vec<Captured> {
        let mut frames = Vec::new();
        for lane in &self.stats.capture.lanes {
            if lane.lock().used == 0 {
                continue;
            }
            // For the length of the swap, workers pass this buffer over.
            std::mem::swap(&mut *lane.lock(), &mut self.spare);
            let mut rest = self.spare.records();
            frames.extend(std::iter::from_fn(|| parse(&mut rest)));
            self.spare.used = 0;
        }
        frames.sort_by_key(|frame| frame.time_ns);
        frames
    }

    /// Whether it is of the port with these counters.
    pub fn is_of(&self, stats: &Arc<PortStats>) -> bool {
        Arc::ptr_eq(&self.stats, stats)
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
        point.want(None);
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
        stats.capture.record(&burst, &[0], direction, |_| reason);
    }

    #[test]
    fn what_passes_is_seen() {
        let stats = Arc::new(PortStats::default());
        assert!(!stats.capture.is_on());
        let mut capture = Capture::start(stats.clone(), CaptureOptions::default()).unwrap();
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
    }

    #[test]
    fn what_is_not_wanted_is_left_out() {
        let stats = Arc::new(PortStats::default());
        let filter = Some("greater 61 or dropped".parse().unwrap());
        let options = CaptureOptions { snap_length: 20, direction: Some(Direction::Tx), filter };
        let mut capture = Capture::start(stats.clone(), options).unwrap();
        record(&stats, 70, Direction::Rx, None);
        record(&stats, 61, Direction::Tx, None);
        record(&stats, 60, Direction::Tx, None);
        record(&stats, 59, Direction::Tx, Some(DropReason::Full));
        let frames = capture.drain();
        assert_eq!(
            frames.iter().map(|frame| (frame.bytes.len(), frame.length)).collect::<Vec<_>>(),
            [(20, 61), (20, 59)]
        );
        assert_eq!(capture.lost(), 0);
    }

    #[test]
    fn what_does_not_fit_is_lost_and_counted() {
        let stats = Arc::new(PortStats::default());
        let mut capture = Capture::start(stats.clone(), CaptureOptions::default()).unwrap();
        // All of the buffers, though there is one worker only.
        let fit = LANES * (LANE / (HEADER + 9000));
        // Buffers are used again.
        for round in 1..4 {
            (0..fit + 3).for_each(|_| record(&stats, 9000, Direction::Rx, None));
            assert_eq!((capture.drain().len(), capture.lost()), (fit, 3 * round));
        }
        record(&stats, 60, Direction::Rx, None);
        assert_eq!(capture.drain().len(), 1);
    }
}
