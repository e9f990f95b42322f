//! Two well-behaved guests that send each other numbered frames without end, and notice everything that is wrong.

use anyhow::{Result, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::hostile::frontend::{Frontend, HEADER, ethernet};
use crate::hostile::leave_the_switch_alone;
use crate::wait;

/// Frames on their way in each direction at most: far fewer than the rings hold, so that none can be dropped for want
/// of room.
const WINDOW: u64 = 64;
/// One of so many frames goes to everybody.
const BROADCASTS: u64 = 64;
const EVERYBODY: u64 = 0xffff_ffff_ffff;
/// Bytes of a frame's payload.
const PAYLOAD: usize = 102;
/// Frames on their way arrive well within that.
const DRAIN: Duration = Duration::from_secs(3);

/// What the pair has seen, over both directions.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    sent: u64,
    received: u64,
    at: Instant,
}

/// What the pair has seen since a mark.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// Frames sent, all of which were received, in order, unchanged.
    pub frames: u64,
    /// Frames received per second.
    pub rate: f64,
    /// Longest time without any frame.
    pub stall: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    pause: AtomicBool,
    paused: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
    wrong: AtomicU64,
    /// Microseconds, since it was last asked.
    stall: AtomicU64,
}

/// The pair, at work until it is dropped.
#[derive(Debug)]
pub struct Pair {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Pair {
    /// Sets two running guests to work.
    pub fn start(guests: [Frontend; 2]) -> Self {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = thread::spawn(move || {
            let _ = leave_the_switch_alone();
            work(guests, &theirs);
        });
        Self { shared, thread: Some(thread) }
    }

    /// The present, to report from.
    pub fn mark(&self) -> Mark {
        self.shared.stall.store(0, Ordering::Relaxed);
        let count = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        Mark { received: count(&self.shared.received), sent: count(&self.shared.sent), at: Instant::now() }
    }

    /// Pauses the pair, waits for the frames that are on their way, and demands that all were received once, in order
    /// and unchanged.
    pub fn report(&self, since: Mark) -> Result<Report> {
        let count = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        let (received, seconds) = (count(&self.shared.received), since.at.elapsed().as_secs_f64());
        let stall = Duration::from_micros(count(&self.shared.stall));
        self.shared.pause.store(true, Ordering::Release);
        let paused =
            wait::until_true("the pair's frames to arrive", DRAIN, || Ok(self.shared.paused.load(Ordering::Acquire)));
        let (sent, all) = (count(&self.shared.sent), count(&self.shared.received));
        self.shared.pause.store(false, Ordering::Release);
        let wrong = count(&self.shared.wrong);
        ensure!(
            paused.is_ok() && sent == all && wrong == 0,
            "the pair sent {sent} frames, received {all}, {wrong} wrong ones"
        );
        Ok(Report { frames: sent - since.sent, rate: (received - since.received) as f64 / seconds, stall })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One direction.
#[derive(Debug, Default)]
struct Way {
    next: u64,
    expected: u64,
}

fn work(mut guests: [Frontend; 2], shared: &Shared) {
    let macs = [guests[0].mac, guests[1].mac];
    let headers = [0, 1].map(|from: usize| Templates::new(macs[1 - from], macs[from]));
    let body = body();
    let mut ways = [Way::default(), Way::default()];
    let mut last = Instant::now();
    while !shared.stop.load(Ordering::Acquire) {
        let paused = shared.pause.load(Ordering::Acquire);
        let mut progress = 0;
        for from in [0, 1] {
            let (way, to) = (&mut ways[from], 1 - from);
            if !paused {
                send(&mut guests[from], way, &headers[from], shared);
            }
            progress += receive(&mut guests[to], way, macs[from], &body, shared);
        }
        let idle = paused && ways.iter().all(|way| way.next == way.expected);
        shared.paused.store(idle, Ordering::Release);
        if progress > 0 || idle {
            let gap = last.elapsed().as_micros() as u64;
            shared.stall.fetch_max(if idle { 0 } else { gap }, Ordering::Relaxed);
            last = Instant::now();
        }
        if progress == 0 {
            shared.stall.fetch_max(if idle { 0 } else { last.elapsed().as_micros() as u64 }, Ordering::Relaxed);
            thread::yield_now();
        }
    }
}

/// Frames, complete but for their number: to the other one, and to everybody.
struct Templates([Vec<u8>; 2]);

impl Templates {
    fn new(to: u64, from: u64) -> Self {
        Self([to, EVERYBODY].map(|to| {
            let mut frame = vec![0; HEADER];
            frame.extend(ethernet(to, from));
            frame.extend(body());
            frame
        }))
    }
}

/// A frame's payload but for the number at its end.
fn body() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..PAYLOAD - 8).map(|at| at as u8).collect();
    bytes.extend([0; 8]);
    bytes
}

fn send(guest: &mut Frontend, way: &mut Way, templates: &Templates, shared: &Shared) {
    let mut posted = false;
    while guest.tx.reap().is_some() {}
    while way.next - way.expected < WINDOW {
        let Some(slot) = guest.tx.free_slot() else { break };
        let template = &templates.0[usize::from(way.next.is_multiple_of(BROADCASTS))];
        let at = guest.tx.buffer(slot);
        guest.memory.write(at, template);
        guest.memory.write(at + template.len() as u64 - 8, &way.next.to_le_bytes());
        way.next += 1;
        shared.sent.fetch_add(1, Ordering::Release);
        guest.tx.post(template.len() as u32);
        posted = true;
    }
    if posted {
        guest.tx.notify();
    }
}

fn receive(guest: &mut Frontend, way: &mut Way, from: u64, template: &[u8], shared: &Shared) -> u64 {
    let mut count = 0;
    while let Some((source, payload)) = guest.receive() {
        if source != from || payload.is_empty() {
            continue;
        }
        let number = payload.last_chunk::<8>().map(|number| u64::from_le_bytes(*number));
        let intact = payload.len() == PAYLOAD && payload[..PAYLOAD - 8] == template[..PAYLOAD - 8];
        if number == Some(way.expected) && intact {
            way.expected += 1;
            shared.received.fetch_add(1, Ordering::Release);
            count += 1;
        } else {
            shared.wrong.fetch_add(1, Ordering::Relaxed);
        }
    }
    count
}
