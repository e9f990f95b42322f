//! The sending half of an uplink's queue: frames are copied once, from where they are into the frames of the pool.
//!
//! A wire carries neither partial checksums nor super-packets. Segments are cut straight into the pool: the segmenter
//! writes the headers, the data is copied behind them, and the checksum is summed over the copy, which no guest can
//! change any more; or whoever sends is asked to sum (Documentation/networking/xsk-tx-metadata.rst).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Queue;
use super::ring::{Consumer, Producer};
use super::umem::{Audit, CHUNK, Ledger, METADATA, OwnedFrame};
use crate::frame::{Burst, Frame};
use crate::mem::SourceSegment;
use crate::port::TxQueue;
use crate::switch::DropReason;
use crate::switch::convert::Scratch;
use crate::sync::{SpinGuard, SpinLock};
use crate::virtq::Fault;
use crate::wire::offload::{Csum, Offload};
use crate::wire::{MAX_SEGMENT_HEADER, Segmenter, Sum, put_be16};
use crate::worker::meter::Stage;

/// Frames of the pool that one frame may take: what the kernel puts into one socket buffer (`MAX_SKB_FRAGS` and one).
const MAX_PIECES: usize = 18;
/// Frames that one system call sends at least, before it wants to be called again.
const SENT_PER_KICK: u64 = 32;
/// Bytes before each frame where requests are made: a cache line, so that what is copied is aligned.
const REQUEST_ROOM: usize = 64;

/// A queue to send to.
#[derive(Debug)]
pub(super) struct Transmitter {
    both: Arc<Queue>,
    state: SpinLock<State>,
}

#[derive(Debug)]
struct State {
    ring: Producer<libc::xdp_desc>,
    completion: Consumer<u64>,
    ledger: Ledger,
    /// Bytes of the pool's frames before what is sent.
    margin: usize,
    /// Pieces of the frame at hand. Empty between frames.
    pieces: Vec<(OwnedFrame, usize)>,
    sent: Sent,
    /// There was no room in this burst, and asking the kernel did not help.
    stuck: bool,
}

/// What has gone out in a burst.
#[derive(Debug, Default, Clone, Copy)]
struct Sent {
    frames: u64,
    bytes: u64,
}

impl Transmitter {
    pub(super) fn new(
        both: Arc<Queue>,
        ring: Producer<libc::xdp_desc>,
        completion: Consumer<u64>,
        ledger: Ledger,
    ) -> Self {
        let pieces = Vec::with_capacity(MAX_PIECES);
        let margin = if both.shared.tx_checksum { REQUEST_ROOM } else { 0 };
        let state = State { ring, completion, ledger, margin, pieces, sent: Sent::default(), stuck: false };
        Self { both, state: SpinLock::new(state) }
    }

    /// Where the frames are. Not for a queue in use: workers would wait.
    pub(super) fn audit(&self) -> Audit {
        let mut state = self.state.lock();
        state.reclaim();
        state.ledger.audit(state.ring.pending(), state.completion.pending())
    }

    /// Puts one frame, or the segments it stands for, into the ring.
    fn put(&self, state: &mut State, burst: &Burst<'_>, frame: &Frame) -> Result<(), DropReason> {
        if !frame.fits(self.both.shared.mtu()) {
            return Err(DropReason::MtuEgress);
        }
        let Offload { csum, gso } = frame.offload();
        if gso.is_none() && !matches!(csum, Csum::Partial { .. }) && frame.len() <= state.room() {
            return self.put_plain(state, burst, frame);
        }
        let mut source = Source::new(frame.head(), burst.tail(frame));
        if frame.offload().gso.is_some() {
            return self.put_segments(state, frame, source);
        }
        self.reserve(state, state.pieces_of(frame.len()))?;
        self.write(state, &[], &mut source, frame.len(), frame.offload().csum)
    }

    /// A frame to which nothing is left to do, and that fits into one of the pool's, as nearly all do.
    #[inline]
    fn put_plain(&self, state: &mut State, burst: &Burst<'_>, frame: &Frame) -> Result<(), DropReason> {
        self.reserve(state, 1)?;
        let mut place = state.ledger.take().ok_or(DropReason::Full)?;
        let start = match state.start_in(&place) {
            start if start + frame.len() <= CHUNK => start,
            _ => state.margin,
        };
        let (before, bytes) = self.both.umem.bytes_mut(&mut place).split_at_mut(start.min(CHUNK));
        if state.margin > 0 {
            request_nothing(before);
        }
        let mut filled = SourceSegment::from_slice(frame.head()).read(bytes);
        for piece in burst.tail(frame) {
            filled += piece.read(bytes.get_mut(filled..).unwrap_or_default());
        }
        state.push_one(place, start, filled, 0);
        Ok(())
    }

    /// All segments of a super-packet, or none.
    fn put_segments(&self, state: &mut State, frame: &Frame, mut source: Source<'_, '_>) -> Result<(), DropReason> {
        let mut headers = [0u8; MAX_SEGMENT_HEADER];
        let count = source.clone().read(&mut headers);
        let headers = headers.get(..count).unwrap_or_default();
        let segments = Segmenter::of_headers(headers, frame.len(), frame.offload());
        let mut segments = segments.map_err(|_| DropReason::CannotConvert)?;
        self.reserve(state, segments.remaining() * state.pieces_of(frame.longest()))?;
        let mut header = [0u8; MAX_SEGMENT_HEADER];
        let mut written = 0;
        while let Some(segment) = segments.next_segment(&mut header) {
            if written == 0 {
                source.skip(segment.header_len);
            }
            let header = header.get(..segment.header_len).unwrap_or_default();
            if let Err(reason) = self.write(state, header, &mut source, segment.payload.len(), segment.csum) {
                self.both.stats.make_frames(written);
                return Err(reason);
            }
            written += 1;
        }
        self.both.stats.make_frames(written.saturating_sub(1));
        Ok(())
    }

    /// Makes sure of `pieces` free frames and room for them, without waiting for anybody.
    #[inline]
    fn reserve(&self, state: &mut State, pieces: usize) -> Result<(), DropReason> {
        if state.has_room(pieces) { Ok(()) } else { self.make_room(state, pieces) }
    }

    /// The same, where there is no room.
    #[cold]
    fn make_room(&self, state: &mut State, pieces: usize) -> Result<(), DropReason> {
        if pieces > super::socket::RING as usize {
            return Err(DropReason::CannotConvert);
        }
        // A kernel that does not give frames back is not asked again for each of a burst.
        if state.stuck {
            return Err(DropReason::Full);
        }
        state.reclaim();
        if state.has_room(pieces) {
            return Ok(());
        }
        // More than a ring full in one burst: what is in it may go at once.
        state.ring.publish();
        self.both.stats.tx(self.both.pair).notified();
        state.stuck = self.both.kick();
        state.reclaim();
        let has_room = state.has_room(pieces);
        state.stuck |= !has_room;
        if has_room { Ok(()) } else { Err(DropReason::Full) }
    }

    /// Copies `header` and the next `data_len` bytes of `source` into reserved frames and sees to the checksum.
    fn write(
        &self,
        state: &mut State,
        header: &[u8],
        source: &mut Source<'_, '_>,
        data_len: usize,
        csum: Csum,
    ) -> Result<(), DropReason> {
        let len = header.len() + data_len;
        if len <= state.room() {
            return self.write_one(state, header, source, len, csum);
        }
        let count = state.pieces_of(len);
        if count > MAX_PIECES || count > 1 && !self.both.shared.multi_buffer {
            return Err(DropReason::CannotConvert);
        }
        let (mut header, mut left) = (header, len);
        for _ in 0..count {
            let Some(mut frame) = state.ledger.take() else { break };
            let size = left.min(state.room());
            let bytes = self.both.umem.bytes_mut(&mut frame).get_mut(..state.margin + size).unwrap_or_default();
            let (before, bytes) = bytes.split_at_mut(state.margin.min(bytes.len()));
            request_nothing(before);
            let (front, rest) = bytes.split_at_mut(header.len().min(size));
            front.copy_from_slice(header.get(..front.len()).unwrap_or_default());
            header = header.get(front.len()..).unwrap_or_default();
            let filled = front.len() + source.read(rest);
            state.pieces.push((frame, filled));
            left -= filled;
            if filled < size {
                break;
            }
        }
        let options = if left == 0 { self.complete(state, csum) } else { None };
        state.finish(options, len)
    }

    /// The same for a frame that fits into one of the pool's, as nearly all do.
    fn write_one(
        &self,
        state: &mut State,
        header: &[u8],
        source: &mut Source<'_, '_>,
        len: usize,
        csum: Csum,
    ) -> Result<(), DropReason> {
        let mut place = state.ledger.take().ok_or(DropReason::Full)?;
        let bytes = self.both.umem.bytes_mut(&mut place).get_mut(..state.margin + len).unwrap_or_default();
        let (before, bytes) = bytes.split_at_mut(state.margin.min(bytes.len()));
        let (front, rest) = bytes.split_at_mut(header.len().min(bytes.len()));
        front.copy_from_slice(header);
        let filled = front.len() + source.read(rest);
        let Some(options) = complete_in(before, bytes, [], csum).filter(|_| filled == len) else {
            state.ledger.put(place);
            return Err(DropReason::CannotConvert);
        };
        state.push_one(place, state.margin, len, options);
        Ok(())
    }

    /// Writes the checksum that was left open, if one was, or asks for it. Returns the options of the frame's first descriptor.
    fn complete(&self, state: &mut State, csum: Csum) -> Option<u32> {
        let (umem, margin) = (&self.both.umem, state.margin);
        let ((first, size), rest) = state.pieces.split_first_mut()?;
        let (before, bytes) = umem.bytes_mut(first).get_mut(..margin + *size)?.split_at_mut(margin);
        let rest = rest.iter().map(|(frame, size)| umem.bytes(frame).get(margin..margin + *size).unwrap_or_default());
        complete_in(before, bytes, rest, csum)
    }

    /// Shows the kernel what was put, and asks it to send where it waits to be asked.
    fn flush(&self, mut state: SpinGuard<'_, State>) {
        let sent = std::mem::take(&mut state.sent);
        if sent.frames == 0 {
            return;
        }
        let counters = self.both.stats.tx(self.both.pair);
        let refused = self.settle(sent.frames);
        counters.add(sent.frames - refused, sent.bytes - sent.bytes * refused / sent.frames);
        state.ring.publish();
        let wakeup = state.ring.needs_wakeup();
        if wakeup {
            counters.notified();
        }
        // Where the kernel copies, the call sends: other workers can fill the ring meanwhile.
        drop(state);
        let mut calls = 1 + sent.frames / SENT_PER_KICK;
        while wakeup && self.both.kick() {
            calls -= 1;
            if calls == 0 {
                self.both.unsent.mark();
                break;
            }
        }
    }

    /// Counts frames that the driver has refused since, at most `sent`: they counted as sent, so that many of these do
    /// not. Returns how many.
    fn settle(&self, sent: u64) -> u64 {
        let refused = &self.both.refused;
        let count = refused.load(Ordering::Relaxed).min(sent);
        if count > 0 {
            refused.fetch_sub(count, Ordering::Relaxed);
            self.both.stats.drop_frames(DropReason::Refused, count);
        }
        count
    }

    /// Asks the kernel again for what it did not send.
    pub(super) fn retry(&self) {
        if self.both.unsent.is_marked() {
            self.both.kick();
        }
    }
}

impl TxQueue for Transmitter {
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault> {
        let Some(mut state) = self.state.lock_in_time() else {
            scratch.outcomes.count_dropped(&self.both.stats, frames, DropReason::Contended);
            return Ok(());
        };
        state.reclaim();
        state.stuck = false;
        state.ledger.next(frames.len()).for_each(|frame| self.both.umem.prefetch_write(frame, state.start_in(frame)));
        for &place in frames {
            if let Err(reason) = self.put(&mut state, burst, burst.frame(place)) {
                scratch.outcomes.count_dropped(&self.both.stats, &[place], reason);
            }
        }
        scratch.probe.enter(Stage::Publish);
        scratch.copies.delivered += state.sent.frames;
        self.flush(state);
        Ok(())
    }
}

impl State {
    /// Bytes to send that one frame of the pool has room for.
    fn room(&self) -> usize {
        CHUNK - self.margin
    }

    fn pieces_of(&self, len: usize) -> usize {
        len.div_ceil(self.room()).max(1)
    }

    fn has_room(&mut self, pieces: usize) -> bool {
        self.ledger.free() >= pieces && self.ring.room(pieces as u32) as usize >= pieces
    }

    /// Where a short frame begins in one of the pool's: not in all at the same place, since what lies a page apart shares a few
    /// places in a cache.
    #[inline]
    fn start_in(&self, place: &OwnedFrame) -> usize {
        self.margin + place.colour()
    }

    /// Puts a frame that lies in one of the pool's into the ring: `reserve` made sure of the room.
    #[inline]
    fn push_one(&mut self, place: OwnedFrame, start: usize, len: usize, options: u32) {
        let addr = self.ledger.lend(place) + start as u64;
        self.ring.push(libc::xdp_desc { addr, len: len as u32, options });
        self.sent.frames += 1;
        self.sent.bytes += len as u64;
    }

    /// Takes back the frames that have been sent.
    fn reclaim(&mut self) {
        let count = self.completion.available(super::socket::RING);
        for offset in 0..count {
            if let Some(frame) = self.ledger.take_back(self.completion.get(offset)) {
                self.ledger.put(frame);
            }
        }
        if count > 0 {
            self.completion.release(count);
        }
    }

    /// Puts the pieces at hand into the ring, the first with `options`, or back if they are no frame.
    fn finish(&mut self, options: Option<u32>, len: usize) -> Result<(), DropReason> {
        let Some(mut options) = options else {
            self.pieces.drain(..).for_each(|(frame, _)| self.ledger.put(frame));
            return Err(DropReason::CannotConvert);
        };
        let mut left = self.pieces.len();
        for (frame, size) in self.pieces.drain(..) {
            left -= 1;
            options |= if left > 0 { libc::XDP_PKT_CONTD } else { 0 };
            let addr = self.ledger.lend(frame) + self.margin as u64;
            // There is room: `reserve` made sure of it.
            self.ring.push(libc::xdp_desc { addr, len: size as u32, options });
            options = 0;
        }
        self.sent.frames += 1;
        self.sent.bytes += len as u64;
        Ok(())
    }
}

/// Writes the checksum that was left open in a frame, if one was; asks for it where there is room for that `before` the frame,
/// which is `bytes` and goes on in `rest`. Returns the options of the frame's first descriptor.
fn complete_in<'a>(
    before: &mut [u8],
    bytes: &mut [u8],
    rest: impl IntoIterator<Item = &'a [u8]>,
    csum: Csum,
) -> Option<u32> {
    request_nothing(before);
    let Csum::Partial { start, offset } = csum else { return Some(0) };
    let field = usize::from(start) + usize::from(offset);
    if field + 2 > bytes.len() {
        return None;
    }
    if !before.is_empty() && csum.is_outermost(bytes) {
        return request_checksum(before, start, offset);
    }
    let mut sum = Sum::new();
    sum.add(bytes.get(usize::from(start)..)?);
    rest.into_iter().for_each(|piece| sum.add(piece));
    put_be16(bytes, field, sum.transport_checksum(offset)).map(|()| 0)
}

/// Leaves no request before a frame that one was made for before: drivers look at that, whatever the descriptor says.
fn request_nothing(before: &mut [u8]) {
    if let Some(request) = before.last_chunk_mut::<METADATA>() {
        request[..8].fill(0);
    }
}

/// Asks who sends the frame behind these bytes to complete its checksum: what is there now is the sum of the pseudo-header.
/// `struct xsk_tx_metadata`: flags, where the checksum starts, and where from there it lies.
fn request_checksum(before: &mut [u8], start: u16, offset: u16) -> Option<u32> {
    let request = before.last_chunk_mut::<METADATA>()?;
    *request = [0; METADATA];
    request[..8].copy_from_slice(&u64::from(libc::XDP_TXMD_FLAGS_CHECKSUM).to_ne_bytes());
    request[8..10].copy_from_slice(&start.to_ne_bytes());
    request[10..12].copy_from_slice(&offset.to_ne_bytes());
    Some(libc::XDP_TX_METADATA)
}

/// The bytes of a frame that are still to be copied.
#[derive(Debug, Clone)]
struct Source<'a, 'm> {
    head: &'a [u8],
    current: SourceSegment<'m>,
    tail: &'a [SourceSegment<'m>],
}

impl<'a, 'm> Source<'a, 'm> {
    fn new(head: &'a [u8], tail: &'a [SourceSegment<'m>]) -> Self {
        Self { head, current: SourceSegment::from_slice(&[]), tail }
    }

    /// Copies the next bytes; as many as there are and fit. Returns how many.
    fn read(&mut self, to: &mut [u8]) -> usize {
        let count = self.head.len().min(to.len());
        let (front, rest) = self.head.split_at(count);
        SourceSegment::from_slice(front).read(to);
        self.head = rest;
        let mut filled = count;
        while filled < to.len() && self.advance() {
            let count = self.current.read(&mut to[filled..]);
            self.current = self.current.skip(count);
            filled += count;
        }
        filled
    }

    /// Passes over the next bytes.
    fn skip(&mut self, mut count: usize) {
        let front = self.head.len().min(count);
        self.head = &self.head[front..];
        count -= front;
        while count > 0 && self.advance() {
            let part = self.current.len().min(count);
            self.current = self.current.skip(part);
            count -= part;
        }
    }

    /// Whether there is a current segment with bytes in it, the next one if need be.
    fn advance(&mut self) -> bool {
        while self.current.is_empty() {
            let Some((first, rest)) = self.tail.split_first() else { return false };
            (self.current, self.tail) = (*first, rest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_made_for_one_frame_each() {
        let headers = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10; 4], [11; 4], 64).udp(1, 2);
        let (mut before, mut bytes) = ([0xff; REQUEST_ROOM], Vec::new());
        headers.write(&mut bytes, &[7; 20]).unwrap();
        let mut flags = |csum| {
            let options = complete_in(&mut before, &mut bytes, [], csum).unwrap();
            (options, u64::from_ne_bytes(*before[REQUEST_ROOM - METADATA..].first_chunk().unwrap()))
        };
        assert_eq!(flags(Csum::None), (0, 0));
        assert_eq!(flags(Csum::Partial { start: 34, offset: 6 }), (libc::XDP_TX_METADATA, 2));
        assert_eq!(flags(Csum::Partial { start: 42, offset: 6 }), (0, 0));
        assert_eq!(complete_in(&mut before, &mut bytes, [], Csum::Partial { start: 34, offset: 60 }), None);
        assert_eq!(before[REQUEST_ROOM - METADATA..][..8], [0; 8]);
    }

    proptest! {
        #[test]
        fn a_source_is_its_bytes_in_order(
            head in prop::collection::vec(any::<u8>(), 0..40),
            tail in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..5),
            steps in prop::collection::vec((any::<bool>(), 0..30usize), 0..12),
        ) {
            let all = [head.clone(), tail.concat()].concat();
            let segments: Vec<_> = tail.iter().map(|piece| SourceSegment::from_slice(piece)).collect();
            let mut source = Source::new(&head, &segments);
            let mut at = 0;
            for (read, count) in steps {
                let end = (at + count).min(all.len());
                if read {
                    let mut bytes = vec![0; count];
                    prop_assert_eq!(source.read(&mut bytes), end - at);
                    prop_assert_eq!(&bytes[..end - at], &all[at..end]);
                } else {
                    source.skip(count);
                }
                at = end;
            }
        }
    }
}
