//! The two queue traits over a guest's vrings: virtio-net frames with their headers (virtio 1.2, 5.1.6).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;

use crate::frame::{Burst, BurstStorage, Frame};
use crate::limits::BURST;
use crate::mem::{Segment, SourceSegment};
use crate::port::stats::PortStats;
use crate::port::{RxQueue, TxQueue};
use crate::switch::DropReason;
use crate::switch::convert::{Accepts, Scratch};
use crate::virtq::Fault;
use crate::virtq::chain::Direction;
use crate::virtq::notify::EventFd;
use crate::virtq::split::{Vring, Work};
use crate::wire::offload::Offload;

/// A running ring and all that is needed to work it.
#[derive(Debug, Clone)]
pub struct QueueSetup {
    /// Index of the queue pair.
    pub pair: usize,
    /// The ring.
    pub vring: Arc<Vring>,
    /// virtio features that the driver accepted.
    pub features: u64,
    /// The guest notifies us through it. `None`: we have to poll.
    pub kick: Option<Arc<EventFd>>,
    /// We notify the guest through it. `None`: the guest polls.
    pub call: Option<Arc<EventFd>>,
    /// Counters of the port.
    pub stats: Arc<PortStats>,
}

impl QueueSetup {
    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Length of the header before each frame (5.1.6.1: the number of buffers only with one of these).
    fn header_len(&self) -> usize {
        if self.has(VIRTIO_F_VERSION_1) || self.has(net::VIRTIO_NET_F_MRG_RXBUF) { 12 } else { 10 }
    }

    fn notify(&self, ring: &mut Work<'_>) -> bool {
        let Some(call) = &self.call else { return false };
        let wanted = ring.needs_notification();
        if wanted {
            call.signal();
        }
        wanted
    }
}

/// A guest's transmit ring: frames come from it.
#[derive(Debug)]
pub struct GuestTx {
    setup: QueueSetup,
    header_len: usize,
}

impl GuestTx {
    /// Serves a transmit ring.
    pub fn new(setup: QueueSetup) -> Self {
        setup.vring.silence();
        Self { header_len: setup.header_len(), setup }
    }

    /// Takes chains into the burst until one of them is full or empty. Returns how many were taken, and the fault
    /// that ended it if one did.
    fn fill<'m>(&'m self, ring: &mut Work<'m>, available: u16, burst: &mut Burst<'m>) -> (u16, Option<Fault>) {
        let mut taken = 0;
        while taken < available && burst.has_room() {
            let head = ring.head(taken);
            let mut frame = burst.start(self.header_len);
            let mut fits = true;
            if let Err(fault) = ring.chain(head, |buffer| fits &= frame.push(buffer.source())) {
                return (taken, Some(fault));
            }
            let done = if fits { frame.finish() } else { Err(DropReason::Oversize) };
            if let Err(reason) = done {
                self.setup.stats.drop_frames(reason, 1);
            }
            ring.set_used(taken, head, 0);
            taken += 1;
        }
        (taken, None)
    }
}

impl RxQueue for GuestTx {
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        let Some(mut ring) = self.setup.vring.try_lock(Direction::FromGuest) else { return Ok(0) };
        let available = ring.available(1)?.min(BURST as u16);
        if available == 0 {
            return Ok(0);
        }
        let mut burst = storage.begin();
        let (taken, fault) = self.fill(&mut ring, available, &mut burst);
        let bytes: usize = (0..burst.count()).map(|place| burst.frame(place as u8).len()).sum();
        self.setup.stats.rx(self.setup.pair).add(burst.count() as u64, bytes as u64);
        if burst.count() > 0 {
            forward(&mut burst);
        }
        ring.publish(taken);
        if self.setup.notify(&mut ring) {
            self.setup.stats.rx(self.setup.pair).notified();
        }
        fault.map_or(Ok(usize::from(taken)), Err)
    }

    fn arm(&self) -> bool {
        self.setup.vring.enable_notification()
    }

    fn disarm(&self) {
        self.setup.vring.disable_notification();
    }

    fn event_fd(&self) -> Option<RawFd> {
        self.setup.kick.as_ref().map(|kick| kick.as_raw_fd())
    }

    fn drain_event(&self) {
        if let Some(kick) = &self.setup.kick {
            kick.drain();
        }
    }
}

/// A guest's receive ring: frames go to it.
#[derive(Debug)]
pub struct GuestRx {
    setup: QueueSetup,
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

/// What became of the frames of one call, in numbers.
#[derive(Default)]
struct Sent {
    frames: u64,
    bytes: u64,
    /// Chains filled, not yet published.
    chains: u16,
}

impl GuestRx {
    /// Serves a receive ring.
    pub fn new(setup: QueueSetup) -> Self {
        let mut accepts = Accepts::default();
        accepts.csum = setup.has(net::VIRTIO_NET_F_GUEST_CSUM);
        accepts.tso4 = accepts.csum && setup.has(net::VIRTIO_NET_F_GUEST_TSO4);
        accepts.tso6 = accepts.csum && setup.has(net::VIRTIO_NET_F_GUEST_TSO6);
        accepts.ecn = setup.has(net::VIRTIO_NET_F_GUEST_ECN);
        accepts.uso4 = accepts.csum && setup.has(GUEST_USO4);
        accepts.uso6 = accepts.csum && setup.has(GUEST_USO6);
        let mergeable = setup.has(net::VIRTIO_NET_F_MRG_RXBUF);
        // We never wait for buffers, so we do not want to hear of new ones.
        setup.vring.silence();
        Self { header_len: setup.header_len(), mergeable, accepts, setup }
    }

    /// Delivers one frame as it is, or the frames that it has to become for this receiver.
    fn deliver(
        &self,
        ring: &mut Work<'_>,
        sent: &mut Sent,
        burst: &Burst<'_>,
        frame: &Frame,
        scratch: &mut Scratch,
    ) -> Result<Result<(), DropReason>, Fault> {
        if self.accepts.takes(frame.offload()) {
            let out = Outgoing { offload: *frame.offload(), head: frame.head(), tail: burst.tail(frame) };
            return self.put(ring, sent, out);
        }
        let mut outcome = Ok(Ok(()));
        let converted = scratch.convert(burst, frame, self.accepts, |offload, head, payload| {
            let tail = [SourceSegment::from_slice(payload)];
            outcome = self.put(ring, sent, Outgoing { offload, head, tail: &tail });
            matches!(outcome, Ok(Ok(())))
        });
        if converted { outcome } else { Ok(Err(DropReason::CannotConvert)) }
    }

    /// Writes a frame into the next chain, or chains if they are mergeable. Nothing is taken if it does not fit.
    fn put(
        &self,
        ring: &mut Work<'_>,
        sent: &mut Sent,
        out: Outgoing<'_, '_>,
    ) -> Result<Result<(), DropReason>, Fault> {
        let len = out.len();
        let header = out.offload.to_virtio(1).to_bytes();
        let mut source = Source::new(header.get(..self.header_len).unwrap_or_default(), &out, len);
        let mut chains = 0u16;
        let mut buffers_at = None;
        loop {
            if ring.available(sent.chains + chains + 1)? <= sent.chains + chains {
                return Ok(Err(DropReason::Full));
            }
            let offset = sent.chains + chains;
            let head = ring.head(offset);
            let before = source.left;
            let mut first = None;
            let capacity = ring.chain(head, |buffer| {
                first.get_or_insert(buffer);
                source.copy_to(buffer);
            })?;
            ring.set_used(offset, head, (before - source.left) as u32);
            buffers_at = buffers_at.or(first);
            chains += 1;
            if source.left == 0 {
                break;
            }
            // A chain without room would never end; one that is not mergeable has to hold it all.
            if !self.mergeable || capacity == 0 {
                return Ok(Err(DropReason::BufferTooSmall));
            }
        }
        if chains > 1 {
            // 5.1.6.3.2 lets the device count on the first buffer holding the header.
            match buffers_at {
                Some(buffer) if buffer.len() >= self.header_len => buffer.skip(10).write(&chains.to_le_bytes()),
                _ => return Ok(Err(DropReason::BufferTooSmall)),
            };
        }
        sent.frames += 1;
        sent.bytes += len as u64;
        sent.chains += chains;
        Ok(Ok(()))
    }
}

/// First bit numbers of the UDP segmentation features (virtio 1.3, 5.1.3), which the bindings lack.
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
    fn new(header: &'a [u8], out: &Outgoing<'a, 'm>, len: usize) -> Self {
        let current = SourceSegment::from_slice(&[]);
        Self { pieces: [header, out.head], current, tail: out.tail, left: header.len() + len }
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

impl TxQueue for GuestRx {
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch, stats: &PortStats) -> Result<(), Fault> {
        let mut ring = self.setup.vring.lock(Direction::ToGuest);
        let mut sent = Sent::default();
        let mut fault = None;
        for (place, &index) in frames.iter().enumerate() {
            match self.deliver(&mut ring, &mut sent, burst, burst.frame(index), scratch) {
                Ok(Ok(())) => {}
                // Nothing behind it fits either, most likely, and order is kept.
                Ok(Err(DropReason::Full)) => {
                    stats.drop_frames(DropReason::Full, (frames.len() - place) as u64);
                    break;
                }
                Ok(Err(reason)) => stats.drop_frames(reason, 1),
                Err(broken) => {
                    fault = Some(broken);
                    break;
                }
            }
        }
        if sent.chains > 0 {
            let counters = stats.tx(self.setup.pair);
            counters.add(sent.frames, sent.bytes);
            ring.publish(sent.chains);
            if self.setup.notify(&mut ring) {
                counters.notified();
            }
        }
        fault.map_or(Ok(()), Err)
    }

    fn prefers(&self) -> Accepts {
        // Without mergeable buffers a super-packet takes a chain of 64 KiB, which drivers have few of.
        if self.mergeable { self.accepts } else { Accepts::default() }
    }
}
