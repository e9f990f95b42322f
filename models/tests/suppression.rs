//! Notifications that are suppressed are never missed: whoever sleeps is woken if there is work.
//!
//! The other side is a driver by the book (virtio 1.2, 2.7.7 and 2.7.10): publish, full fence, look whether the other
//! wants to be notified. A lost wake-up leaves a thread asleep for ever, which loom reports as a deadlock.

use loom::thread;
use models::sync::primitives::{AtomicU16, Ordering, fence};
use models::{arm, wanted_by_event, wanted_by_flags};

mod event;

use event::Event;

/// Chains that are sent.
const COUNT: u16 = 2;
/// `VIRTQ_USED_F_NO_NOTIFY` and `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const SILENT: u16 = 1;

/// What driver and device share, in one direction: an index that one side moves, and the other side's request.
#[derive(Default)]
struct Ring {
    index: AtomicU16,
    flags: AtomicU16,
    event: AtomicU16,
    bell: Event,
}

impl Ring {
    /// A ring at its beginning, whose sleeper-to-be polls. It is never dropped: when a model ends in a deadlock, as some
    /// have to, loom takes no more calls.
    fn new() -> &'static Self {
        let ring = Box::leak(Box::new(Self::default()));
        ring.flags.store(SILENT, Ordering::Relaxed);
        // The index just passed, which asks for nothing.
        ring.event.store(u16::MAX, Ordering::Relaxed);
        ring
    }
}

#[derive(Clone, Copy)]
enum How {
    Flags,
    Index,
    /// By index, but the look does not come after a fence: this must fail, or the model shows nothing.
    Careless,
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// The driver makes chains available, one by one.
fn drive(ring: &Ring, how: How) {
    for index in 1..=COUNT {
        ring.index.store(index, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = match how {
            How::Flags => ring.flags.load(Ordering::Acquire) & SILENT == 0,
            _ => ring.event.load(Ordering::Acquire) == index - 1,
        };
        if wanted {
            ring.bell.signal();
        }
    }
}

/// A worker takes them, and sleeps whenever there are none.
fn work(ring: &Ring, how: How) {
    let mut next = 0;
    while next != COUNT {
        let seen = ring.index.load(Ordering::Acquire);
        if seen != next {
            next = seen;
            continue;
        }
        let came = match how {
            How::Flags => arm(&ring.flags, 0, &ring.index, next),
            How::Index => arm(&ring.event, next, &ring.index, next),
            How::Careless => {
                ring.event.store(next, Ordering::Release);
                ring.index.load(Ordering::Acquire) != next
            }
        };
        if !came {
            ring.bell.wait();
        }
        if matches!(how, How::Flags) {
            ring.flags.store(SILENT, Ordering::Release);
        }
    }
}

fn kicks(how: How) {
    check(move || {
        let ring = Ring::new();
        let driver = thread::spawn(move || drive(ring, how));
        work(ring, how);
        driver.join().ok();
    });
}

#[test]
fn no_kick_is_missed_with_flags() {
    kicks(How::Flags);
}

#[test]
fn no_kick_is_missed_with_event_indices() {
    kicks(How::Index);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_fence_kicks_are_missed() {
    kicks(How::Careless);
}

/// We use buffers, one by one or two at a time, and call the driver as it wants it.
fn complete(ring: &Ring, how: How, bursts: &[u16]) {
    let mut old = 0;
    for &new in bursts {
        ring.index.store(new, Ordering::Release);
        let wanted = match how {
            How::Flags => wanted_by_flags(&ring.flags, SILENT),
            How::Index => wanted_by_event(&ring.event, old, new),
            How::Careless => {
                let event = ring.event.load(Ordering::Acquire);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
        };
        old = new;
        if wanted {
            ring.bell.signal();
        }
    }
}

/// The driver polls while there are used buffers, then asks to be called, looks once more, and sleeps.
fn reap(ring: &Ring, how: How) {
    let mut seen = 0;
    while seen != COUNT {
        let index = ring.index.load(Ordering::Acquire);
        if index != seen {
            seen = index;
            continue;
        }
        match how {
            How::Flags => ring.flags.store(0, Ordering::Release),
            _ => ring.event.store(seen, Ordering::Release),
        }
        fence(Ordering::SeqCst);
        if ring.index.load(Ordering::Acquire) == seen {
            ring.bell.wait();
        }
        if matches!(how, How::Flags) {
            ring.flags.store(SILENT, Ordering::Release);
        }
    }
}

fn calls(how: How, bursts: &'static [u16]) {
    check(move || {
        let ring = Ring::new();
        let driver = thread::spawn(move || reap(ring, how));
        complete(ring, how, bursts);
        driver.join().ok();
    });
}

#[test]
fn no_call_is_missed_with_flags() {
    calls(How::Flags, &[1, 2]);
}

#[test]
fn no_call_is_missed_with_event_indices() {
    calls(How::Index, &[1, 2]);
    calls(How::Index, &[2]);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_fence_calls_are_missed() {
    calls(How::Careless, &[1, 2]);
}
