//! The two queue traits over a queue of a DPDK device.

#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::ffi::{Batch, Device};
use crate::frame::{Burst, BurstStorage};
use crate::limits::BURST;
use crate::mem::SourceSegment;
use crate::port::stats::PortStats;
use crate::port::{RxQueue, TxQueue, wire_frame};
use crate::switch::DropReason;
use crate::switch::convert::{Accepts, Scratch};
use crate::sync::SpinLock;
use crate::virtq::Fault;
use crate::worker::meter::Stage;

/// A queue to receive from.
#[derive(Debug)]
pub(super) struct Receiver {
    queue: u16,
    // Before the device, which must outlive its frames.
    held: SpinLock<Batch>,
    device: Arc<Device>,
    stats: Arc<PortStats>,
}

impl Receiver {
    pub(super) fn new(queue: u16, device: Arc<Device>, stats: Arc<PortStats>) -> Self {
        stats.make_room(queue.into());
        Self { queue, held: SpinLock::new(Batch::default()), device, stats }
    }
}

impl RxQueue for Receiver {
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        let Some(mut held) = self.held.try_lock() else { return Ok(0) };
        self.device.receive(self.queue, &mut held);
        let taken = held.len();
        if taken == 0 {
            return Ok(0);
        }
        {
            let mut burst = storage.begin();
            let mut bytes = 0;
            for index in 0..taken {
                match wire_frame::push(&mut burst, held.pieces(index)) {
                    Ok(len) => bytes += len as u64,
                    Err(reason) => self.stats.refuse(&burst, reason),
                }
            }
            self.stats.rx(self.queue.into()).add(burst.count() as u64, bytes);
            if burst.count() > 0 {
                forward(&mut burst);
            }
        }
        held.free(0);
        Ok(taken)
    }

    fn arm(&self) -> bool {
        false
    }

    fn disarm(&self) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn drain_event(&self) {}
}

/// A queue to send to.
#[derive(Debug)]
pub(super) struct Transmitter {
    queue: u16,
    state: SpinLock<Outgoing>,
    device: Arc<Device>,
    stats: Arc<PortStats>,
}

/// Frames that are about to be sent.
#[derive(Debug, Default)]
struct Outgoing {
    batch: Batch,
    /// Of each, its place in the burst and its length.
    of: [(u8, u32); BURST],
    /// Frames and bytes sent of the burst so far.
    sent: (u64, u64),
}

impl Transmitter {
    pub(super) fn new(queue: u16, device: Arc<Device>, stats: Arc<PortStats>) -> Self {
        stats.make_room(queue.into());
        Self { queue, state: SpinLock::new(Outgoing::default()), device, stats }
    }

    /// Copies a frame into a buffer of the device's.
    fn put(
        &self,
        out: &mut Outgoing,
        outcomes: &mut crate::capture::Outcomes,
        place: u8,
        head: &[u8],
        tail: &[SourceSegment<'_>],
    ) -> Result<(), DropReason> {
        if out.batch.len() == BURST {
            self.flush(out, outcomes);
        }
        let len = head.len() + tail.iter().map(|piece| piece.len()).sum::<usize>();
        let count = out.batch.len();
        let bytes = self.device.add(&mut out.batch, len).ok_or(DropReason::Full)?;
        let (front, mut rest) = bytes.split_at_mut(head.len());
        front.copy_from_slice(head);
        for piece in tail {
            let filled = piece.read(rest);
            rest = rest.get_mut(filled..).unwrap_or_default();
        }
        if let Some(of) = out.of.get_mut(count) {
            *of = (place, len as u32);
        }
        Ok(())
    }

    /// Sends what is there. What the device does not take is dropped.
    fn flush(&self, out: &mut Outgoing, outcomes: &mut crate::capture::Outcomes) {
        let count = out.batch.len();
        let sent = self.device.send(self.queue, &mut out.batch);
        let (done, left) = out.of.get(..count).and_then(|of| of.split_at_checked(sent)).unwrap_or_default();
        out.sent.0 += done.len() as u64;
        out.sent.1 += done.iter().map(|(_, len)| u64::from(*len)).sum::<u64>();
        self.stats.drop_frames(DropReason::Full, left.len() as u64);
        left.iter().for_each(|(place, _)| outcomes.dropped(*place, DropReason::Full));
    }
}

impl TxQueue for Transmitter {
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault> {
        let Some(mut out) = self.state.lock_in_time() else {
            scratch.outcomes.count_dropped(&self.stats, frames, DropReason::Contended);
            return Ok(());
        };
        let Scratch { rebuilt, outcomes, copies, probe, .. } = scratch;
        // A wire carries neither partial checksums nor super-packets.
        let wire = Accepts::default();
        for &place in frames {
            let frame = burst.frame(place);
            let (mut outcome, mut segments) = (Ok(()), 0);
            if !frame.fits(self.device.mtu()) {
                outcome = Err(DropReason::MtuEgress);
            } else if wire.takes(frame.offload()) {
                outcome = self.put(&mut out, outcomes, place, frame.head(), burst.tail(frame));
            } else if !rebuilt.convert(burst, frame, wire, |_, head, payload| {
                copies.extra += 1;
                outcome = self.put(&mut out, outcomes, place, head, &[SourceSegment::from_slice(payload)]);
                segments += u64::from(outcome.is_ok());
                outcome.is_ok()
            }) {
                outcome = Err(DropReason::CannotConvert);
            }
            // What became of the frame itself is one of them, or that it was dropped.
            if segments > 1 || outcome.is_err() {
                self.stats.make_frames(segments.saturating_sub(u64::from(outcome.is_ok())));
            }
            if let Err(reason) = outcome {
                outcomes.count_dropped(&self.stats, &[place], reason);
            }
        }
        probe.enter(Stage::Publish);
        if out.batch.len() > 0 {
            self.flush(&mut out, outcomes);
        }
        let (count, bytes) = std::mem::take(&mut out.sent);
        self.stats.tx(self.queue.into()).add(count, bytes);
        copies.delivered += count;
        Ok(())
    }
}
