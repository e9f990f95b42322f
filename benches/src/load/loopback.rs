//! A switch that does nothing: it says that what was sent has arrived. What the generator reaches against it is the
//! generator's own limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::memory::Memory;
use super::ring::Layout;
use crate::cpu;

/// Most that it moves at a time, like a switch.
const BURST: u64 = 32;

/// One ring as the switch sees it.
#[derive(Debug)]
pub(super) struct End {
    /// Where it is.
    pub(super) memory: Arc<Memory>,
    /// What it is.
    pub(super) layout: Layout,
    done: u64,
}

impl End {
    /// The other end of a ring.
    pub(super) fn new(memory: Arc<Memory>, layout: Layout) -> Self {
        // Nobody has to wake us.
        let flags = layout.used() + if layout.packed { 2 } else { 0 };
        memory.u16(flags).store(1, Ordering::Relaxed);
        if !layout.packed {
            for slot in 0..layout.size {
                memory.u16(layout.used() + 4 + 8 * usize::from(slot)).store(slot, Ordering::Relaxed);
            }
        }
        Self { memory, layout, done: 0 }
    }

    /// Buffers that wait, at most [`BURST`].
    fn waiting(&self) -> u64 {
        if !self.layout.packed {
            let avail = self.memory.u16(self.layout.avail() + 2).load(Ordering::Acquire);
            return u64::from(avail.wrapping_sub(self.done as u16)).min(BURST);
        }
        (0..BURST).take_while(|ahead| self.is_available(self.done + ahead)).count() as u64
    }

    fn descriptor(&self, position: u64) -> usize {
        self.layout.at + 16 * (position % u64::from(self.layout.size)) as usize + 8
    }

    fn lap_is_even(&self, position: u64) -> bool {
        (position / u64::from(self.layout.size)).is_multiple_of(2)
    }

    fn is_available(&self, position: u64) -> bool {
        let marks = self.memory.u64(self.descriptor(position)).load(Ordering::Acquire) >> 48;
        let (avail, used) = (marks & 1 << 7 != 0, marks & 1 << 15 != 0);
        avail != used && avail == self.lap_is_even(position)
    }

    fn finish(&mut self, count: u64) {
        if self.layout.packed {
            for position in self.done..self.done + count {
                let place = self.memory.u64(self.descriptor(position));
                let word = place.load(Ordering::Relaxed) & !(1 << 63 | 1 << 55);
                let marks = if self.lap_is_even(position) { 1 << 63 | 1 << 55 } else { 0 };
                place.store(word | marks, Ordering::Release);
            }
        }
        self.done += count;
        if !self.layout.packed {
            self.memory.u16(self.layout.used() + 2).store(self.done as u16, Ordering::Release);
        }
    }
}

/// The thread that says so.
#[derive(Debug)]
pub(super) struct Loopback {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loopback {
    /// Starts it on a CPU: each pair is a ring that is sent into, and the one where it arrives.
    pub(super) fn start(pairs: impl Iterator<Item = (End, End)>, cpu: usize) -> Self {
        let mut pairs: Vec<_> = pairs.collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            if let Err(error) = cpu::pin(cpu) {
                eprintln!("the loopback runs on any CPU: {error}");
            }
            while !stopped.load(Ordering::Relaxed) {
                pairs.iter_mut().for_each(|(from, to)| pass(from, to));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pass(from: &mut End, to: &mut End) {
    let count = from.waiting().min(to.waiting());
    if count > 0 {
        to.finish(count);
        from.finish(count);
    }
}
