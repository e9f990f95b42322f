//! The two queue traits over a guest's vrings: virtio-net frames with their headers (virtio 1.2, 5.1.6).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;

use crate::frame::{Burst, BurstStorage, Frame};
use crate::limits::BURST;
use crate::mem::{Marks, Segment, SourceSegment};
use crate::port::stats::PortStats;
use crate::port::{RxQueue, TxQueue};
use crate::switch::DropReason;
use crate::switch::convert::{Accepts, Scratch};
use crate::virtq::chain::Direction;
use crate::virtq::notify::EventFd;
use crate::virtq::ring::{Ahead, Chain, Ring, Work};
use crate::virtq::{Fault, Vring};
use crate::wire::offload::{Offload, VirtioNetHdr};
use crate::worker::meter::Stage;

/// All that is needed to work a ring, but the ring.
#[derive(Debug, Clone)]
pub struct QueueSetup {
    /// Index of the queue pair.
    pub pair: usize,
    /// virtio features that the driver accepted.
    pub features: u64,
    /// The guest notifies us through it. `None`: we have to poll.
    pub kick: Option<Arc<EventFd>>,
    /// We notify the guest through it. `None`: the guest polls.
    pub call: Option<Arc<EventFd>>,
    /// Counters of the port.
    pub stats: Arc<PortStats>,
}

/// Serves a guest's transmit ring.
pub fn guest_tx(setup: QueueSetup, ring: &Vring) -> Arc<dyn RxQueue> {
    match ring {
        Vring::Split(ring) => Arc::new(GuestTx::new(setup, ring.clone())),
        Vring::Packed(ring) => Arc::new(GuestTx::new(setup, ring.clone())),
    }
}

/// Serves a guest's receive ring.
pub fn guest_rx(setup: QueueSetup, ring: &Vring) -> Arc<dyn TxQueue> {
    match ring {
        Vring::Split(ring) => Arc::new(GuestRx::new(setup, ring.clone())),
        Vring::Packed(ring) => Arc::new(GuestRx::new(setup, ring.clone())),
    }
}

impl QueueSetup {
    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Length of the header before each frame (5.1.6.1: the number of buffers only with one of these).
    fn header_len(&self) -> usize {
        if self.has(VIRTIO_F_VERSION_1) || self.has(net::VIRTIO_NET_F_MRG_RXBUF) { 12 } else { 10 }
    }

    #[inline]
    fn notify<'r>(&self, work: &mut impl Work<'r>) -> bool {
        let Some(call) = &self.call else { return false };
        let wanted = work.needs_notification();
        if wanted && !call.notify() {
            self.stats.set_fault(Fault::NotifyBlocked);
        }
        wanted
    }
}

/// A guest's transmit ring: frames come from it.
#[derive(Debug)]
struct GuestTx<R> {
    setup: QueueSetup,
    ring: Arc<R>,
    header_len: usize,
}

/// What was taken from a ring.
#[derive(Default)]
struct Taken {
    chains: usize,
    bytes: u64,
}

/// A chain, and the length of its frame or why that is dropped.
type Gathered = (Chain, Result<usize, DropReason>);

impl<R: Ring> GuestTx<R> {
    fn new(setup: QueueSetup, ring: Arc<R>) -> Self {
        ring.silence();
        setup.stats.make_room(setup.pair);
        Self { header_len: setup.header_len(), ring, setup }
    }

    /// Takes chains into the burst until one of them is full or empty.
    ///
    /// # Errors
    /// The fault that ended it; what was taken before is in the burst.
    #[inline]
    fn fill<'m>(&'m self, work: &mut R::Work<'m>, burst: &mut Burst<'m>, taken: &mut Taken) -> Result<(), Fault> {
        let mut ahead = Ahead::default();
        work.look_ahead(&mut ahead, BURST)?;
        // Frames that are dropped at once leave room in the burst, but the guest's word alone must not keep us here.
        while taken.chains < BURST {
            let (chain, loaded) = match work.take_ahead(&ahead) {
                Some((chain, buffer)) => (chain, burst.load(self.header_len, buffer)),
                None if burst.has_room() => match self.gather(work, burst)? {
                    Some(gathered) => gathered,
                    None => break,
                },
                None => break,
            };
            match loaded {
                Ok(len) => taken.bytes += len as u64,
                Err(reason) => self.setup.stats.refuse(burst, reason),
            }
            work.complete(chain, 0);
            taken.chains += 1;
        }
        Ok(())
    }

    /// Takes a frame that lies in several pieces.
    #[inline(never)]
    fn gather<'m>(&self, work: &mut R::Work<'m>, burst: &mut Burst<'m>) -> Result<Option<Gathered>, Fault> {
        let mut frame = burst.start(self.header_len);
        let mut fits = true;
        let Some((chain, _)) = work.take(|buffer| fits &= frame.push(buffer.source()))? else { return Ok(None) };
        Ok(Some((chain, if fits { frame.finish() } else { frame.refuse() })))
    }
}

impl<R: Ring> RxQueue for GuestTx<R> {
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        let Some(mut work) = self.ring.try_lock(Direction::FromGuest) else { return Ok(0) };
        if !work.available()? {
            return Ok(0);
        }
        let mut burst = storage.begin();
        let mut taken = Taken::default();
        let outcome = self.fill(&mut work, &mut burst, &mut taken);
        let counters = self.setup.stats.rx(self.setup.pair);
        counters.add(burst.count() as u64, taken.bytes);
        // Of frames that are dropped, too, or what is written down would lag behind.
        if taken.chains > 0 {
            work.intend();
        }
        if burst.count() > 0 {
            forward(&mut burst);
        }
        if work.publish() && self.setup.notify(&mut work) {
            counters.notified();
        }
        outcome.map(|()| taken.chains)
    }

    fn arm(&self) -> bool {
        self.ring.enable_notification()
    }

    fn disarm(&self) {
        self.ring.disable_notification();
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.setup.kick.as_ref().map(AsFd::as_fd)
    }

    fn drain_event(&self) {
        if let Some(kick) = &self.setup.kick {
            kick.drain();
        }
    }
}

/// A guest's receive ring: frames go to it.
#[derive(Debug)]
struct GuestRx<R> {
    setup: QueueSetup,
    ring: Arc<R>,
    header_len: usize,
    mergeable: bool,
    accepts: Accepts,
}

/// A frame as it goes out: its header's meaning, its private first part, and what follows.
#[derive(Clone, Copy)]
struct Outgoing<'a, 'm> {
    offload: Offload,
    head: &'a [u8],
    tail: &'a [SourceSegment<'m>],
}

impl Outgoing<'_, '_> {
    fn len(&self) -> usize {
        self.head.len() + self.tail.iter().map(|piece| piece.len()).sum::<usize>()
    }
}

/// What became of the frames of one call, in numbers, and which pages were written while those are logged.
#[derive(Default)]
struct Sent<'r> {
    frames: u64,
    bytes: u64,
    dirty: Option<Marks<'r>>,
    /// Place of the first frame that a fault would leave where it is.
    until: usize,
}

/// Chains that one frame fills, and how far.
pub type Filled = Vec<(Chain, u32)>;

impl<R: Ring> GuestRx<R> {
    fn new(setup: QueueSetup, ring: Arc<R>) -> Self {
        setup.stats.make_room(setup.pair);
        let csum = setup.has(net::VIRTIO_NET_F_GUEST_CSUM);
        // 5.1.3.1: the others depend on it.
        let with_csum = |bit| csum && setup.has(bit);
        let accepts = Accepts {
            csum,
            tso4: with_csum(net::VIRTIO_NET_F_GUEST_TSO4),
            tso6: with_csum(net::VIRTIO_NET_F_GUEST_TSO6),
            ecn: with_csum(net::VIRTIO_NET_F_GUEST_ECN),
            uso4: with_csum(GUEST_USO4),
            uso6: with_csum(GUEST_USO6),
        };
        // We never wait for buffers, so we do not want to hear of new ones.
        ring.silence();
        let mergeable = setup.has(net::VIRTIO_NET_F_MRG_RXBUF);
        Self { header_len: setup.header_len(), mergeable, accepts, ring, setup }
    }

    /// Delivers frames in order until the ring is full.
    #[inline]
    fn deliver_all<'r>(
        &'r self,
        work: &mut R::Work<'r>,
        sent: &mut Sent<'r>,
        burst: &Burst<'_>,
        frames: &[u8],
        scratch: &mut Scratch,
    ) -> Result<(), Fault> {
        let mut ahead = Ahead::default();
        work.look_ahead(&mut ahead, frames.len())?;
        let plain = self.header_len == VirtioNetHdr::LEN;
        for (place, &index) in frames.iter().enumerate() {
            let frame = burst.frame(index);
            if plain && self.put_plain(work, sent, burst, frame, &ahead) {
                continue;
            }
            sent.until = place;
            match self.deliver(work, sent, burst, frame, scratch)? {
                Ok(()) => {
                    sent.until = place + 1;
                    work.look_ahead(&mut ahead, frames.len() - place - 1)?;
                }
                // Nothing behind it fits either, most likely, and order is kept.
                Err(DropReason::Full) => {
                    scratch.outcomes.count_dropped(&self.setup.stats, &frames[place..], DropReason::Full);
                    break;
                }
                Err(reason) => scratch.outcomes.count_dropped(&self.setup.stats, &[index], reason),
            }
        }
        Ok(())
    }

    /// Writes a frame that the receiver takes as it is into one plain buffer: what nearly always happens.
    #[inline]
    fn put_plain<'r>(
        &self,
        work: &mut R::Work<'r>,
        sent: &mut Sent<'r>,
        burst: &Burst<'_>,
        frame: &Frame,
        ahead: &Ahead<'r>,
    ) -> bool {
        if !self.accepts.takes(frame.offload()) {
            return false;
        }
        let mark = work.mark();
        let Some((chain, buffer)) = work.take_ahead(ahead) else { return false };
        let len = frame.len() + VirtioNetHdr::LEN;
        if len > buffer.len() {
            work.rewind(mark);
            return false;
        }
        let written = buffer.write(frame.wire());
        if !frame.is_whole() {
            let mut rest = buffer.skip(written);
            for piece in burst.tail(frame) {
                rest = rest.skip(rest.write_from(*piece));
            }
        }
        if let Some(dirty) = &mut sent.dirty {
            dirty.segment(buffer, len);
        }
        work.complete(chain, len as u32);
        sent.frames += 1;
        sent.bytes += frame.len() as u64;
        true
    }

    /// Delivers one frame as it is, or the frames that it has to become for this receiver.
    #[inline(never)]
    fn deliver<'r>(
        &self,
        work: &mut R::Work<'r>,
        sent: &mut Sent<'r>,
        burst: &Burst<'_>,
        frame: &Frame,
        scratch: &mut Scratch,
    ) -> Result<Result<(), DropReason>, Fault> {
        let Scratch { rebuilt, filled, copies, .. } = scratch;
        if self.accepts.takes(frame.offload()) {
            let out = Outgoing { offload: *frame.offload(), head: frame.head(), tail: burst.tail(frame) };
            return self.put(work, sent, filled, out);
        }
        let mut outcome = Ok(Ok(()));
        let mut segments = 0;
        let converted = rebuilt.convert(burst, frame, self.accepts, |offload, head, payload| {
            copies.extra += 1;
            segments += 1;
            let tail = [SourceSegment::from_slice(payload)];
            outcome = self.put(work, sent, filled, Outgoing { offload, head, tail: &tail });
            matches!(outcome, Ok(Ok(())))
        });
        // Of one that does not get through as a whole, the rest is the one that is dropped.
        if segments > 1 {
            self.setup.stats.make_frames(segments - 1);
        }
        if converted { outcome } else { Ok(Err(DropReason::CannotConvert)) }
    }

    /// Writes a frame into the next chain, or chains if they are mergeable. None is taken if it does not fit.
    fn put<'r>(
        &self,
        work: &mut R::Work<'r>,
        sent: &mut Sent<'r>,
        filled: &mut Filled,
        out: Outgoing<'_, '_>,
    ) -> Result<Result<(), DropReason>, Fault> {
        filled.clear();
        let mark = work.mark();
        if let Err(reason) = self.copy(work, &mut sent.dirty, filled, out)? {
            work.rewind(mark);
            return Ok(Err(reason));
        }
        if filled.len() > 1 {
            work.begin_frame(filled.len());
        }
        for &(chain, len) in filled.iter() {
            work.complete(chain, len);
        }
        sent.frames += 1;
        sent.bytes += out.len() as u64;
        Ok(Ok(()))
    }

    /// Takes chains and copies a frame into them.
    fn copy<'r>(
        &self,
        work: &mut R::Work<'r>,
        dirty: &mut Option<Marks<'r>>,
        filled: &mut Filled,
        out: Outgoing<'_, '_>,
    ) -> Result<Result<(), DropReason>, Fault> {
        let header = out.offload.to_virtio(1).to_bytes();
        let mut source = Source::new(header.get(..self.header_len).unwrap_or_default(), &out);
        let mut first = None;
        loop {
            let before = source.left;
            let taken = work.take(|buffer| {
                first.get_or_insert(buffer);
                let left = source.left;
                source.copy_to(buffer);
                if let Some(dirty) = dirty {
                    dirty.segment(buffer, left - source.left);
                }
            })?;
            let Some((chain, capacity)) = taken else { return Ok(Err(DropReason::Full)) };
            filled.push((chain, (before - source.left) as u32));
            if source.left == 0 {
                break;
            }
            // A chain without room would never end; one that is not mergeable has to hold it all.
            let most = work.most_chains().min(filled.capacity());
            if !self.mergeable || capacity == 0 || filled.len() >= most {
                return Ok(Err(DropReason::BufferTooSmall));
            }
        }
        // 5.1.6.3.2 lets the device count on the first buffer holding the header.
        let count = filled.len() as u16;
        match first {
            _ if count == 1 => Ok(Ok(())),
            Some(buffer) if buffer.len() >= self.header_len => {
                buffer.skip(10).write(&count.to_le_bytes());
                if let Some(dirty) = dirty {
                    dirty.segment(buffer, self.header_len);
                }
                Ok(Ok(()))
            }
            _ => Ok(Err(DropReason::BufferTooSmall)),
        }
    }
}

/// Bit numbers of the UDP segmentation features (virtio 1.3, 5.1.3), which the bindings lack.
const GUEST_USO4: u32 = 54;
const GUEST_USO6: u32 = 55;

/// What is still to be written of a frame.
struct Source<'a, 'm> {
    pieces: [&'a [u8]; 2],
    current: SourceSegment<'m>,
    tail: &'a [SourceSegment<'m>],
    left: usize,
}

impl<'a, 'm> Source<'a, 'm> {
    #[inline]
    fn new(header: &'a [u8], out: &Outgoing<'a, 'm>) -> Self {
        let current = SourceSegment::from_slice(&[]);
        Self { pieces: [header, out.head], current, tail: out.tail, left: header.len() + out.len() }
    }

    /// Fills a buffer as far as both reach.
    #[inline]
    fn copy_to(&mut self, mut buffer: Segment<'_>) {
        let room = buffer.len();
        for piece in &mut self.pieces {
            let count = buffer.write(piece);
            *piece = piece.get(count..).unwrap_or_default();
            buffer = buffer.skip(count);
        }
        while !buffer.is_empty() {
            if self.current.is_empty() {
                let Some((first, rest)) = self.tail.split_first() else { break };
                (self.current, self.tail) = (*first, rest);
            }
            let count = buffer.write_from(self.current);
            self.current = self.current.skip(count);
            buffer = buffer.skip(count);
        }
        self.left -= room - buffer.len();
    }
}

impl<R: Ring> TxQueue for GuestRx<R> {
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault> {
        let Some(mut work) = self.ring.lock_in_time(Direction::ToGuest) else {
            scratch.outcomes.count_dropped(&self.setup.stats, frames, DropReason::Contended);
            return Ok(());
        };
        let mut sent = Sent { dirty: self.ring.memory().dirty(), ..Sent::default() };
        let outcome = self.deliver_all(&mut work, &mut sent, burst, frames, scratch);
        if outcome.is_err() {
            let rest = frames.get(sent.until..).unwrap_or_default();
            scratch.outcomes.count_dropped(&self.setup.stats, rest, DropReason::LinkDown);
        }
        if let Some(dirty) = sent.dirty.take() {
            dirty.finish();
        }
        scratch.probe.enter(Stage::Publish);
        scratch.copies.delivered += sent.frames;
        let mut call = None;
        if work.publish() {
            let counters = self.setup.stats.tx(self.setup.pair);
            counters.add(sent.frames, sent.bytes);
            call = self.setup.call.as_ref().filter(|_| work.needs_notification());
            if call.is_some() {
                counters.notified();
            }
        }
        // The guest that wakes may take our CPU: not while other workers wait for the ring.
        drop(work);
        if call.is_some_and(|call| !call.notify()) {
            self.setup.stats.set_fault(Fault::NotifyBlocked);
        }
        outcome
    }

    fn prefers(&self) -> Accepts {
        // Without mergeable buffers a super-packet takes a chain of 64 KiB, which drivers have few of.
        if self.mergeable { self.accepts } else { Accepts::default() }
    }
}
