//! Frames for a guest that cannot take them for a moment: kept until it goes on, here or on another port.
//!
//! A guest whose dirty pages are logged and whose receive rings are stopped is about to appear somewhere else, within
//! milliseconds; one whose frontend changes a ring, or the memory that it lies in, goes on at once. What comes for it
//! meanwhile is kept, bounded in frames, bytes and time, and delivered in order. Only frames for stations known behind the
//! port are; what goes to all goes to all who are there, as a guest is whose rings are changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::frame::{Burst, FrameVlan};
use crate::limits::{MAX_FRAME, MAX_HELD_BYTES, MAX_HELD_FRAMES};
use crate::port::stats::PortStats;
use crate::switch::DropReason;
use crate::sync::SpinLock;

/// How long a guest may be away.
const LIFE: Duration = Duration::from_secs(2);

/// How long another worker may take to deliver all of it. Who does not wait for that may overtake it.
const RELEASE: Duration = Duration::from_millis(20);

/// The frames kept for one guest.
#[derive(Debug)]
pub struct Hold {
    held: SpinLock<Held>,
    /// Frames that are kept, for who only wants to know.
    count: AtomicUsize,
    stats: Arc<PortStats>,
}

#[derive(Debug)]
struct Held {
    frames: Vec<HeldFrame>,
    bytes: Vec<u8>,
    /// When the first of them came.
    since: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct HeldFrame {
    label: Label,
    first: usize,
    len: usize,
}

/// Whom a frame that is kept is for.
#[derive(Debug, Clone, Copy)]
pub struct Label {
    /// Its destination.
    pub mac: u64,
    /// Its VLAN.
    pub vlan: FrameVlan,
    /// It goes to all; others have got it.
    pub is_flooded: bool,
}

impl Hold {
    /// Room for frames; drops are counted at the port.
    pub fn new(stats: Arc<PortStats>) -> Self {
        let (frames, bytes) = (Vec::with_capacity(MAX_HELD_FRAMES), Vec::with_capacity(MAX_HELD_BYTES));
        Self { held: SpinLock::new(Held { frames, bytes, since: None }), count: AtomicUsize::new(0), stats }
    }

    /// Whether the guest may still be heard in time. Its time begins now if no frame has come for it yet.
    pub fn goes_on(&self) -> bool {
        // While a worker is at it, it goes on.
        self.held.try_lock().is_none_or(|mut held| held.since.get_or_insert_with(Instant::now).elapsed() <= LIFE)
    }

    /// Frames that are kept.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops all that is kept.
    pub fn clear(&self) {
        let mut held = self.held.lock();
        self.stats.drop_frames(DropReason::LinkDown, held.frames.len() as u64);
        held.since = None;
        held.frames.clear();
        held.bytes.clear();
        self.count.store(0, Ordering::Relaxed);
    }

    /// Keeps the frames at these places of the burst, or drops and counts what there is no room for. `flooded` has a bit for
    /// each place whose frame goes to all.
    pub fn keep(&self, burst: &Burst<'_>, places: &[u8], flooded: u64) {
        let Some(mut held) = self.held.lock_in_time() else {
            return self.stats.drop_frames(DropReason::Contended, places.len() as u64);
        };
        let late = held.since.get_or_insert_with(Instant::now).elapsed() > LIFE;
        let kept = places.iter().take_while(|&&place| !late && held.push(burst, place, flooded)).count();
        self.count.store(held.frames.len(), Ordering::Relaxed);
        self.stats.drop_frames(DropReason::LinkDown, (places.len() - kept) as u64);
    }

    /// Hands the frames for which `whither` knows a place to `deliver`: place, VLAN, and bytes with the virtio-net header in
    /// front. Those that are too old are dropped instead. Nothing is done if another worker is at it and does not come to an end:
    /// it delivers, or the housekeeper has it done again.
    pub fn release<T>(&self, whither: impl Fn(Label) -> Option<T>, mut deliver: impl FnMut(T, FrameVlan, &[u8])) {
        let Some(mut held) = self.held.lock_within(RELEASE) else { return };
        let Held { frames, bytes, since } = &mut *held;
        let late = since.is_some_and(|since| since.elapsed() > LIFE);
        frames.retain(|frame| {
            let Some(place) = whither(frame.label) else { return true };
            match bytes.get(frame.first..frame.first + frame.len).filter(|_| !late) {
                Some(bytes) => deliver(place, frame.label.vlan, bytes),
                None => self.stats.drop_frames(DropReason::LinkDown, 1),
            }
            false
        });
        self.count.store(frames.len(), Ordering::Relaxed);
        if frames.is_empty() {
            bytes.clear();
            *since = None;
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Held {
    /// Adds a frame; `false` if there is no room.
    fn push(&mut self, burst: &Burst<'_>, place: u8, flooded: u64) -> bool {
        let frame = burst.frame(place);
        let wire = frame.wire();
        let first = self.bytes.len();
        if self.frames.len() >= MAX_HELD_FRAMES || first + wire.len() + MAX_FRAME > MAX_HELD_BYTES {
            return false;
        }
        self.bytes.extend_from_slice(wire);
        for piece in burst.tail(frame) {
            let begin = self.bytes.len();
            self.bytes.resize(begin + piece.len(), 0);
            piece.read(self.bytes.get_mut(begin..).unwrap_or_default());
        }
        let len = self.bytes.len() - first;
        let is_flooded = flooded & 1 << (u32::from(place) % u64::BITS) != 0;
        let label = Label { mac: frame.destination(), vlan: frame.vlan(), is_flooded };
        self.frames.push(HeldFrame { label, first, len });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::BurstStorage;
    use crate::port::vhost::queue::guest_tx;
    use crate::testing::{TestGuest, VERSION_1};

    /// A guest can make the one that delivers to it wait.
    #[test]
    fn nobody_waits_for_who_delivers() {
        let hold = Hold::new(Arc::default());
        let mut guest = TestGuest::new(8, VERSION_1);
        guest.send(&[0; 72], &[]);
        let queue = guest_tx(guest.setup(), &guest.ring());
        queue.poll(&mut BurstStorage::default(), &mut |burst| hold.keep(burst, &[0], 0)).unwrap();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let hold = &hold;
            scope.spawn(move || {
                hold.release(Some, |_, _, _| {
                    begun.send(()).unwrap();
                    may_go_on.recv().unwrap();
                });
            });
            has_begun.recv().unwrap();
            hold.release(Some, |_, _, _| panic!("it is delivered by the first"));
            assert_eq!(hold.len(), 1);
            go_on.send(()).unwrap();
        });
        assert!(hold.is_empty());
    }
}
