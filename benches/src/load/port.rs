//! One guest: its memory, its rings, what it sends and what it makes of what it receives.

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::frames::{HEADER, MARK, Mark, STAMP, Stream};
use super::memory::Memory;
use super::pace::Pace;
use super::plan::{Plan, Role};
use super::ring::{Direction, Layout, Ring};

/// Bytes of a receive buffer, unless frames are longer.
const RECEIVE_BUFFER: usize = 2048;
const LINE: usize = 64;
/// Descriptors of a ring that has little to do.
const SMALL_RING: u16 = 256;

/// Bytes between two buffers: an odd number of cache lines, so that all of a cache's sets are used.
fn stride(len: usize) -> usize {
    (len.div_ceil(LINE) | 1) * LINE
}

/// A ring that is sent from, and the frames that go through it in turn.
#[derive(Debug)]
pub(super) struct Sender {
    /// The ring.
    pub(super) ring: Ring,
    memory: Arc<Memory>,
    /// Offset and length of each frame; a multiple of the ring's size.
    frames: Vec<(u64, u32)>,
    sample: u64,
    touch: bool,
}

impl Sender {
    /// Number of different frames.
    pub(super) fn frames(&self) -> u64 {
        self.frames.len() as u64
    }

    /// Sends the next `count` frames. Those that are sampled carry what `time` gives for them, the first being 0.
    #[inline]
    pub(super) fn send(&mut self, count: u16, time: impl Fn(u64) -> u64) {
        let first = self.ring.posted();
        let end = first + u64::from(count);
        if self.frames.len() > usize::from(self.ring.layout().size) {
            for position in first..end {
                let (at, len) = self.frames[(position % self.frames.len() as u64) as usize];
                self.ring.set_buffer(self.ring.slot(position), at, len);
            }
        }
        if self.touch {
            for position in first..end {
                self.memory.u64(self.ring.buffer(self.ring.slot(position)) + STAMP).store(0, Ordering::Relaxed);
            }
        }
        let mut position = first.next_multiple_of(self.sample);
        while position < end {
            let stamp = time(position - first);
            if stamp != 0 {
                self.memory.u64(self.ring.buffer(self.ring.slot(position)) + STAMP).store(stamp, Ordering::Relaxed);
            }
            position += self.sample;
        }
        self.ring.post(count);
    }
}

/// What was found in the frames that were looked at.
#[derive(Debug, Clone, Default)]
pub(super) struct Findings {
    /// Frames that were what was expected.
    pub(super) good: u64,
    /// Frames that are not the peer's.
    pub(super) foreign: u64,
    /// Frames of the peer that are missing between two that were looked at.
    pub(super) missing: u64,
    /// Buffers that did not come back in order.
    pub(super) misplaced: u64,
    /// Frames that arrived with another length.
    pub(super) wrong_length: u64,
    /// Samples of latency that were left out, because the generator itself was held up.
    pub(super) discarded: u64,
}

/// A ring that is received into.
#[derive(Debug)]
pub(super) struct Receiver {
    /// The ring.
    pub(super) ring: Ring,
    memory: Arc<Memory>,
    /// What is to arrive, and the number of different frames of it.
    expected: Stream,
    frames: u64,
    /// Whether frames arrive in the order in which they were sent, all in this ring.
    ordered: bool,
    sample: u64,
    touch: bool,
    /// Position of the next frame to look at, and of the last that was right, with its number.
    look: u64,
    last: Option<(u64, u32)>,
    /// What was found.
    pub(super) findings: Findings,
    sink: u64,
}

impl Receiver {
    /// Takes what has arrived, looks at a sample, and makes the buffers available again; gives how many arrived.
    /// `latency` gets the stamp of each sampled frame that has one.
    #[inline]
    pub(super) fn drain(&mut self, refill: bool, latency: impl FnMut(u64)) -> u16 {
        let count = self.ring.reap();
        if count == 0 {
            return 0;
        }
        let end = self.ring.reaped();
        if self.touch {
            for position in end - u64::from(count)..end {
                let at = self.ring.buffer(self.ring.slot(position)) + STAMP;
                self.sink = self.sink.wrapping_add(self.memory.u64(at).load(Ordering::Relaxed));
            }
        }
        if self.look < end {
            self.sample(end, latency);
        }
        if refill {
            self.ring.post(count);
        }
        count
    }

    #[inline(never)]
    fn sample(&mut self, end: u64, mut latency: impl FnMut(u64)) {
        while self.look < end {
            let at = self.ring.buffer(self.ring.slot(self.look));
            let mark = self.check(at);
            // The next to look at is the next that carries a time.
            let off = mark.map_or(0, |mark| u64::from(mark.number) % self.sample);
            if mark.is_some() && off == 0 {
                let stamp = self.memory.u64(at + STAMP).load(Ordering::Relaxed);
                if stamp != 0 {
                    latency(stamp);
                }
            }
            self.look += self.sample - off;
        }
    }

    /// Looks at the frame that arrived at the position `look`.
    fn check(&mut self, at: usize) -> Option<Mark> {
        let returned = self.ring.returned_slot(self.look);
        if returned.is_some_and(|(slot, _)| slot != self.ring.slot(self.look)) {
            self.findings.misplaced += 1;
            return None;
        }
        let mark = Mark::read(self.memory.u64(at + MARK).load(Ordering::Relaxed));
        let Some(mark) = mark.filter(|mark| mark.port == self.expected.from) else {
            self.findings.foreign += 1;
            return None;
        };
        if self.ordered
            && let Some((position, number)) = self.last
        {
            let expected = (u64::from(number) + self.look - position) % self.frames;
            self.findings.missing += (u64::from(mark.number) + self.frames - expected) % self.frames;
        }
        self.last = Some((self.look, mark.number));
        let len = HEADER + self.expected.sizes.of(mark.number as usize);
        match returned {
            Some((_, returned)) if returned as usize != len => self.findings.wrong_length += 1,
            _ => self.findings.good += 1,
        }
        Some(mark)
    }

    /// Forgets what came before, as after learning.
    pub(super) fn reset(&mut self) {
        self.findings = Findings::default();
        self.last = None;
        self.look = self.look.max(self.ring.reaped());
    }
}

/// One guest.
#[derive(Debug)]
pub(super) struct Port {
    /// What it is there for.
    pub(super) role: Role,
    /// Its peer's number.
    pub(super) peer: usize,
    /// Its memory.
    pub(super) memory: Arc<Memory>,
    /// Rings that it sends from.
    pub(super) senders: Vec<Sender>,
    /// Rings that it receives into.
    pub(super) receivers: Vec<Receiver>,
    /// Latencies of what it received, in nanoseconds.
    pub(super) latency: Histogram<u64>,
    /// Frames sent and received since the last reset, and those given up since.
    pub(super) sent: u64,
    /// See `sent`.
    pub(super) received: u64,
    /// See `sent`.
    pub(super) written_off: u64,
    /// Frames that were due but found no room in the ring.
    pub(super) held_back: u64,
    /// When something arrived last, in ticks.
    pub(super) heard: u64,
    /// The queue whose turn it is to send.
    pub(super) turn: usize,
}

/// Where the parts of a queue pair go in memory.
struct Places {
    next: usize,
}

impl Places {
    fn take(&mut self, len: usize, align: usize) -> usize {
        let at = self.next.next_multiple_of(align);
        self.next = at + len;
        at
    }
}

/// What a queue pair needs.
struct QueuePlaces {
    receive: Layout,
    send: Layout,
    receive_buffers: Vec<(u64, u32)>,
    frames: Vec<(u64, u32)>,
}

impl Port {
    /// A guest with memory, rings and frames, all ready.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub(super) fn new(plan: &Plan, number: u16) -> Result<Self> {
        let (role, stream) = (plan.role(number), plan.stream(number));
        let queues = if role == Role::Pair { plan.queues } else { 1 };
        let mut places = Places { next: 4096 };
        let queue_places: Vec<_> =
            (0..queues).map(|queue| QueuePlaces::new(plan, role, &stream, queue, &mut places)).collect();
        let memory = Memory::new(places.next, !plan.small_pages).context("cannot get memory for a port")?;
        let memory = Arc::new(memory);
        let mut port = Self {
            role,
            peer: plan.peer(number).into(),
            memory: memory.clone(),
            senders: Vec::new(),
            receivers: Vec::new(),
            latency: Histogram::new_with_bounds(1, 10_000_000_000, 3)?,
            sent: 0,
            received: 0,
            written_off: 0,
            held_back: 0,
            heard: 0,
            turn: 0,
        };
        let expected = plan.stream(plan.peer(number));
        for (queue, places) in (0u32..).zip(queue_places) {
            let frames = places.frames.len() as u32;
            for (number, (at, _)) in (queue * frames..).zip(&places.frames) {
                memory.fill(*at as usize, &stream.buffer(number));
            }
            port.receivers.push(Receiver {
                ring: Ring::new(memory.clone(), places.receive, places.receive_buffers)?,
                memory: memory.clone(),
                expected,
                frames: u64::from(frames),
                ordered: queues == 1 && role != Role::Idle && !plan.broadcast,
                sample: plan.sample().into(),
                touch: plan.touch,
                look: 0,
                last: None,
                findings: Findings::default(),
                sink: 0,
            });
            let first = places.frames[..usize::from(places.send.size)].to_vec();
            port.senders.push(Sender {
                ring: Ring::new(memory.clone(), places.send, first)?,
                memory: memory.clone(),
                frames: places.frames,
                sample: plan.sample().into(),
                touch: plan.touch,
            });
        }
        Ok(port)
    }

    /// Its rings as vhost-user numbers them.
    pub(super) fn rings(&self) -> Vec<&Ring> {
        self.receivers.iter().zip(&self.senders).flat_map(|(receiver, sender)| [&receiver.ring, &sender.ring]).collect()
    }

    /// Frames that are on their way, as far as this port and its peer know.
    pub(super) fn in_flight(&self, peer_received: u64) -> u64 {
        self.sent.saturating_sub(self.written_off + peer_received)
    }

    /// Whether the switch has given back all that was sent.
    pub(super) fn all_taken(&mut self) -> bool {
        self.senders.iter_mut().all(|sender| {
            sender.ring.reap();
            sender.ring.posted() == sender.ring.reaped()
        })
    }

    /// Sends what is due by now. What finds no room is left out, and counted.
    pub(super) fn send_due(&mut self, pace: &mut Pace, now: u64) -> u32 {
        let due = pace.due(now);
        if due == 0 {
            return 0;
        }
        let begun = *pace;
        let sent = self.send(due, |ahead| begun.time_of(ahead));
        pace.advance(due);
        self.held_back += due - u64::from(sent);
        sent
    }

    /// Sends at most `allowed` frames, as many as the rings have room for; `time` as for [`Sender::send`].
    pub(super) fn send(&mut self, allowed: u64, time: impl Fn(u64) -> u64) -> u32 {
        let mut sent = 0;
        for _ in 0..self.senders.len() {
            let queues = self.senders.len();
            let sender = &mut self.senders[self.turn];
            if u64::from(sender.ring.free()) < (allowed - sent).min(sender.ring.layout().size.into()) {
                sender.ring.reap();
            }
            let count = u64::from(sender.ring.free()).min(allowed - sent);
            if count > 0 {
                let before = sent;
                sender.send(count as u16, |ahead| time(before + ahead));
                sent += count;
            }
            self.turn = (self.turn + 1) % queues;
            if sent == allowed {
                break;
            }
        }
        self.sent += sent;
        sent as u32
    }

    /// Counts from here on.
    pub(super) fn reset(&mut self) {
        (self.sent, self.received, self.written_off, self.held_back) = (0, 0, 0, 0);
        self.latency.reset();
        self.receivers.iter_mut().for_each(Receiver::reset);
    }
}

impl QueuePlaces {
    fn new(plan: &Plan, role: Role, stream: &Stream, queue: u16, places: &mut Places) -> Self {
        let size = if role == Role::Idle { SMALL_RING.min(plan.ring) } else { plan.ring };
        let mut layout = |direction| {
            let (packed, in_order) = (plan.packed, plan.in_order);
            let mut layout = Layout { size, packed, in_order, direction, at: 0 };
            layout.at = places.take(layout.bytes(), 4096);
            layout
        };
        let (receive, send) = (layout(Direction::Receive), layout(Direction::Send));
        let room = RECEIVE_BUFFER.max(HEADER + plan.size.longest());
        let receive_buffers = (0..size).map(|_| (places.take(stride(room), LINE) as u64, room as u32)).collect();
        let wanted = (stream.stations * stream.flows).div_ceil(u32::from(plan.queues));
        let count = wanted.next_multiple_of(u32::from(size));
        let frame = |number: u32| {
            let len = HEADER + stream.sizes.of(number as usize);
            (places.take(stride(len), LINE) as u64, len as u32)
        };
        let first = u32::from(queue) * count;
        Self { receive, send, receive_buffers, frames: (first..first + count).map(frame).collect() }
    }
}
