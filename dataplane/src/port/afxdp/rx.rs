//! The receiving half of an uplink's queue: frames stay in the pool until they have been forwarded.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::Queue;
use super::bell::Bell;
use super::ring::{Consumer, Producer};
use super::socket::RING;
use super::umem::{Audit, CHUNK, Ledger, OwnedFrame, Umem};
use crate::frame::{Burst, BurstStorage};
use crate::limits::BURST;
use crate::port::{RxQueue, wire_frame};
use crate::sync::SpinLock;
use crate::virtq::Fault;

/// Frames of the pool that are looked at for one burst: as many as it takes for jumbo frames, with room for the longest
/// frame that the kernel can make.
const TAKE: usize = 128;

/// Looks at an empty ring for one call that polls or wakes the driver.
const EMPTY_POLLS: u32 = 32;

/// A queue to receive from.
#[derive(Debug)]
pub(super) struct Receiver {
    both: Arc<Queue>,
    bell: Bell,
    state: SpinLock<State>,
}

#[derive(Debug)]
struct State {
    fill: Producer<u64>,
    ring: Consumer<libc::xdp_desc>,
    ledger: Ledger,
    /// Frames of the burst at hand. Empty between bursts.
    held: Vec<Piece>,
    /// Looks at an empty ring since the last frame.
    empty: u32,
}

/// A frame of the pool with what was received into it.
#[derive(Debug)]
struct Piece {
    frame: OwnedFrame,
    offset: u32,
    len: u32,
    /// The received frame goes on in the next piece.
    continues: bool,
}

impl Receiver {
    pub(super) fn new(
        both: Arc<Queue>,
        fill: Producer<u64>,
        ring: Consumer<libc::xdp_desc>,
        ledger: Ledger,
    ) -> std::io::Result<Self> {
        let mut state = State { fill, ring, ledger, held: Vec::with_capacity(TAKE), empty: 0 };
        while let Some(frame) = state.ledger.take() {
            let address = state.ledger.lend(frame);
            state.fill.push(address);
        }
        state.fill.publish();
        Ok(Self { both, bell: Bell::new()?, state: SpinLock::new(state) })
    }

    pub(super) fn count_missed(&self) {
        self.both.count_missed();
    }

    /// Where the frames are. Not for a queue in use: it would miss a turn.
    pub(super) fn audit(&self) -> Audit {
        let state = self.state.lock();
        state.ledger.audit(state.fill.pending(), state.ring.pending())
    }

    /// Makes frames of the pieces.
    fn build<'m>(&'m self, pieces: &'m [Piece], burst: &mut Burst<'m>) -> u64 {
        let mut bytes = 0;
        for pieces in pieces.split_inclusive(|piece| !piece.continues) {
            match wire_frame::push(burst, pieces.iter().map(|piece| self.bytes(piece))) {
                Ok(len) => bytes += len as u64,
                Err(reason) => self.both.stats.refuse(burst, reason),
            }
        }
        bytes
    }

    #[inline]
    fn bytes<'m>(&'m self, piece: &'m Piece) -> &'m [u8] {
        let (offset, len) = (piece.offset as usize, piece.len as usize);
        self.both.umem.bytes(&piece.frame).get(offset..offset + len).unwrap_or_default()
    }
}

impl RxQueue for Receiver {
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        let Some(mut state) = self.state.try_lock() else { return Ok(0) };
        let Queue { pair, socket, shared, stats, .. } = &*self.both;
        self.both.look_after_unsent();
        let mut taken = state.take(&self.both.umem);
        // A driver that had run out of frames does not look for those that were given back before it said so.
        let waits = taken == 0 && state.fill.needs_wakeup();
        if taken == 0 && (shared.busy_poll || waits) && state.is_time_to_poll() {
            if waits {
                stats.rx(*pair).notified();
            }
            socket.kick_rx();
            taken = state.take(&self.both.umem);
        }
        if taken == 0 {
            return Ok(0);
        }
        state.empty = 0;
        {
            let mut burst = storage.begin();
            let bytes = self.build(&state.held, &mut burst);
            stats.rx(*pair).add(burst.count() as u64, bytes);
            if burst.count() > 0 {
                forward(&mut burst);
            }
        }
        state.give_back();
        if state.fill.needs_wakeup() {
            stats.rx(*pair).notified();
            socket.kick_rx();
        }
        Ok(taken)
    }

    fn arm(&self) -> bool {
        // What waits to be sent has to be looked after.
        if self.both.is_unsent() {
            return true;
        }
        // The bell rings at once if there is something in the ring: nothing can be missed, unless it cannot ring.
        !self.bell.listen(&self.both.socket)
    }

    fn disarm(&self) {
        self.bell.ignore(&self.both.socket);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }

    fn drain_event(&self) {}
}

impl State {
    /// Whether to call the driver, having found nothing: at once, and then ever less often, since the worker's other
    /// queues wait for the call.
    fn is_time_to_poll(&mut self) -> bool {
        self.empty = self.empty.wrapping_add(1);
        self.empty.is_power_of_two() || self.empty.is_multiple_of(EMPTY_POLLS)
    }

    /// Takes whole frames out of the ring, at most a burst, and asks for their first bytes. Returns how many.
    fn take(&mut self, umem: &Umem) -> usize {
        // What was seen before may end within a frame.
        let available = self.ring.available(TAKE as u32).min(TAKE as u32);
        let (mut frames, mut broken) = (0, false);
        // Entries up to the end of the last whole frame, and what is held of them.
        let (mut whole, mut held) = (0, 0);
        for offset in 0..available {
            let entry = self.ring.get(offset);
            broken |= !self.hold(entry, umem);
            if entry.options & libc::XDP_PKT_CONTD == 0 {
                (frames, whole, held) = (frames + 1, offset + 1, self.held.len());
                if frames == BURST {
                    break;
                }
            }
        }
        if frames == 0 && available == TAKE as u32 {
            // No frame is that long. The ring must not be stuck on it.
            (whole, held) = (available, self.held.len());
        }
        // A frame of which the kernel has not shown all stays in the ring.
        self.held.drain(held..).for_each(|piece| _ = self.ledger.lend(piece.frame));
        if whole > 0 {
            self.ring.release(whole);
        }
        if frames == 0 || broken {
            // The kernel's mistake, never seen. What cannot be trusted is not forwarded.
            self.give_back();
            return 0;
        }
        frames
    }

    #[inline]
    fn hold(&mut self, entry: libc::xdp_desc, umem: &Umem) -> bool {
        let Some(frame) = self.ledger.take_back(entry.addr) else { return false };
        let offset = (entry.addr % CHUNK as u64) as u32;
        umem.prefetch_read(&frame, offset as usize, entry.len as usize);
        self.held.push(Piece { frame, offset, len: entry.len, continues: entry.options & libc::XDP_PKT_CONTD != 0 });
        u64::from(offset) + u64::from(entry.len) <= CHUNK as u64
    }

    /// Lends the frames at hand to the kernel again.
    fn give_back(&mut self) {
        for piece in self.held.drain(..) {
            let address = self.ledger.lend(piece.frame);
            // There is room: the ring is as large as the share.
            self.fill.push(address);
        }
        self.fill.publish();
    }
}

const _: () = assert!(TAKE >= BURST && TAKE <= RING as usize);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize};

    use super::super::Shared;
    use super::super::queue::Unsent;
    use super::super::ring::tests::ring;
    use super::super::socket::{Rings, Socket};
    use super::*;
    use crate::port::stats::PortStats;

    #[test]
    fn a_frame_that_is_not_all_there_waits_in_the_ring() {
        let (umem, [mut ledger, _]) = Umem::new([8, 8]).unwrap();
        let (mut fill, mut lent, _memory) = ring(8, 0);
        while let Some(frame) = ledger.take() {
            fill.push(ledger.lend(frame));
        }
        fill.publish();
        let (mut kernel, rx, _memory) = ring(8, u32::MAX - 3);
        let mut state = State { fill, ring: rx, ledger, held: Vec::with_capacity(TAKE), empty: 0 };
        let mut receive = |continues: &[bool]| {
            assert!(lent.available(8) as usize >= continues.len());
            for (at, continues) in (0..).zip(continues) {
                let options = if *continues { libc::XDP_PKT_CONTD } else { 0 };
                assert!(kernel.push(libc::xdp_desc { addr: lent.get(at) + 256, len: 1000, options }));
            }
            lent.release(continues.len() as u32);
            kernel.publish();
        };
        let check = |state: &State| {
            let audit = state.ledger.audit(state.fill.pending(), state.ring.pending());
            (audit.kernel, audit.inbound, audit.total - audit.free - audit.outbound, state.held.len())
        };
        receive(&[false, true, true]);
        assert_eq!(state.take(&umem), 1);
        assert_eq!(check(&state), (0, 2, 3, 1));
        state.give_back();
        assert_eq!(state.take(&umem), 0, "the rest of it has not been shown yet");
        assert_eq!(check(&state), (0, 2, 2, 0));
        receive(&[true, false, false]);
        assert_eq!(state.take(&umem), 2);
        let continues: Vec<_> = state.held.iter().map(|piece| piece.continues).collect();
        assert_eq!(continues, [true, true, true, false, false]);
        state.give_back();
        assert_eq!(check(&state), (0, 0, 0, 0));
        assert!(state.ledger.audit(state.fill.pending(), state.ring.pending()).is_balanced());
    }

    /// As root.
    #[test]
    fn a_driver_that_has_run_out_is_woken_and_no_other() {
        let (umem, [frames, _]) = Umem::new([RING, RING]).unwrap();
        let (socket, Rings { fill, rx, .. }) = Socket::open(&umem, false, false).unwrap();
        let mtu = AtomicUsize::new(1500);
        let shared = Shared { mtu, multi_buffer: false, busy_poll: false, copies: false, tx_checksum: false };
        let (stats, unsent, refused) = (Arc::new(PortStats::default()), Unsent::default(), AtomicU64::new(0));
        let both = Queue {
            pair: 0,
            socket,
            umem,
            shared: Arc::new(shared),
            stats: stats.clone(),
            unsent,
            refused,
            missed: AtomicU64::new(0),
        };
        let receiver = Receiver::new(Arc::new(both), fill, rx, frames).unwrap();
        let mut storage = BurstStorage::default();
        let mut calls_in = |looks: u64| {
            let before = stats.rx(0).read().2;
            (0..looks).for_each(|_| assert_eq!(receiver.poll(&mut storage, &mut |_| {}).unwrap(), 0));
            stats.rx(0).read().2 - before
        };
        assert_eq!(calls_in(1000), 0);
        receiver.state.lock().fill.ask_for_wakeup();
        assert_eq!(calls_in(1), 1);
        assert!((20..50).contains(&calls_in(1000)));
    }
}
