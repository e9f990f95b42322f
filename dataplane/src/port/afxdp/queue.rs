//! Opening the queues of an interface: pool, socket and rings for each, and the program that feeds them.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::device::Channels;
use super::netdev;
use super::program::{Hook, Program};
use super::rx::Receiver;
use super::socket::{Access, Kick, RING, Socket};
use super::tx::Transmitter;
use super::umem::{Audit, Umem};
use super::{Options, Queue, Shared};
use crate::config::AfxdpMode;
use crate::port::stats::PortStats;
use crate::port::{Link, RxEntry, TxQueue};
use crate::status::PortState;
use crate::switch::DropReason;

/// The queues of an interface, open. Dropping it gives the interface back to the kernel.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) shared: Arc<Shared>,
    /// What the operator calls the way they were opened.
    pub(super) mode: &'static str,
    queues: Vec<(Arc<Receiver>, Arc<Transmitter>)>,
    /// So many of them send: the kernel throws away what is sent on others, without an error.
    senders: usize,
    _program: Program,
}

/// Ways to open, the fastest first: name, where the program runs, how the socket gets at frames.
const WAYS: [(&str, Hook, Access); 3] = [
    ("zerocopy", Hook::Native, Access::ZeroCopy),
    ("copy", Hook::Native, Access::Copy),
    ("skb", Hook::Generic, Access::Copy),
];

fn ways(mode: AfxdpMode) -> &'static [(&'static str, Hook, Access)] {
    match mode {
        AfxdpMode::Auto => &WAYS,
        AfxdpMode::ZeroCopy => &WAYS[..1],
        AfxdpMode::Copy => &WAYS[1..2],
        AfxdpMode::Skb => &WAYS[2..],
    }
}

/// Looks at what is unsent for one request to send it, when requests were in vain.
const LOOKS_PER_KICK: u32 = 32;
/// Looks after which a worker may sleep although something is unsent. What waits goes with the next burst then, or when
/// the port's thread looks. A driver that is merely busy is through long before that.
const MAX_LOOKS: u32 = 1 << 16;

impl Queue {
    /// Asks the kernel to send what is in the tx ring. Returns whether it wants to be asked again.
    pub(super) fn kick(&self) -> bool {
        let kick = self.socket.kick_tx();
        if kick == Kick::Refused && self.shared.copies {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        kick != Kick::Done
    }

    /// Looks after what is unsent.
    #[inline]
    pub(super) fn look_after_unsent(&self) {
        self.unsent.look(|| self.kick());
    }

    /// Counts what the kernel has lost since the last time. Only the port's thread does.
    pub(super) fn count_missed(&self) {
        if let Ok(missed) = self.socket.missed() {
            let before = self.missed.swap(missed, Ordering::Relaxed);
            self.stats.drop_frames(DropReason::Missed, missed.saturating_sub(before));
        }
    }

    /// Whether there is something unsent that a worker has to stay awake for.
    pub(super) fn is_unsent(&self) -> bool {
        (1..MAX_LOOKS).contains(&self.unsent.0.load(Ordering::Relaxed))
    }
}

/// Whether the kernel did not take all that was to be sent: not zero then, and how often that was looked at. Whoever
/// receives asks it again.
#[derive(Debug, Default)]
pub(super) struct Unsent(AtomicU32);

impl Unsent {
    /// Something is left. Release: it is in the ring for who sees the mark.
    pub(super) fn mark(&self) {
        self.0.store(1, Ordering::Release);
    }

    pub(super) fn is_marked(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Asks the kernel again by `kick`, which says whether it wants to be asked once more: at once, and then ever less often,
    /// since the worker's other queues wait for the call.
    #[inline]
    fn look(&self, kick: impl FnOnce() -> bool) {
        let looks = self.0.load(Ordering::Relaxed);
        if looks == 0 {
            return;
        }
        let (mut seen, next) = (looks, looks.wrapping_add(1).max(1));
        if looks.is_power_of_two() || looks.is_multiple_of(LOOKS_PER_KICK) {
            // What is left during the call is marked anew, and stays so.
            self.0.swap(0, Ordering::Acquire);
            if !kick() {
                return;
            }
            seen = 0;
        }
        let _ = self.0.compare_exchange(seen, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl Queues {
    /// Opens the first queues, so many, in the first way of the mode that works. Returns why the ways before it did not,
    /// for the operator, too.
    pub(super) fn open(
        ifindex: u32,
        channels: Channels,
        mtu: usize,
        options: &Options,
        stats: &Arc<PortStats>,
    ) -> Result<(Self, String)> {
        let (mut failures, mut last) = (Vec::new(), Error::from(ErrorKind::Unsupported));
        let asked = options.tx_checksum == Some(true);
        let driver_completes = options.tx_checksum != Some(false) && netdev::completes_checksums(ifindex);
        let takes_requests = (asked || driver_completes) && Socket::takes_requests();
        if asked && !takes_requests {
            let problem = "tx-checksum=on takes a kernel that knows XDP_UMEM_TX_METADATA_LEN, as Linux does since 6.11";
            return Err(Error::new(ErrorKind::InvalidInput, problem));
        }
        for &(name, hook, access) in ways(options.mode) {
            let copies = access == Access::Copy;
            // Where the kernel copies, it completes what the driver does not.
            let tx_checksum = takes_requests && (driver_completes || copies);
            // A frame over several of the pool's takes support by the driver where it uses them itself.
            for multi_buffer in [true, false] {
                let (mtu, busy_poll) = (AtomicUsize::new(mtu), options.busy_poll);
                let shared = Arc::new(Shared { mtu, multi_buffer, busy_poll, copies, tx_checksum });
                match Self::open_in(ifindex, channels, (name, hook, access), &shared, stats) {
                    Ok(queues) => return Ok((queues, failures.join("; "))),
                    Err(e) => last = e,
                }
                // Kernels before 6.6 do not know of such frames: the flag is an error there.
                if !matches!(last.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) {
                    break;
                }
            }
            failures.push(format!("{name}: {last}"));
        }
        Err(Error::new(last.kind(), failures.join("; ")))
    }

    fn open_in(
        ifindex: u32,
        channels: Channels,
        (mode, hook, access): (&'static str, Hook, Access),
        shared: &Arc<Shared>,
        stats: &Arc<PortStats>,
    ) -> Result<Self> {
        let program = Program::attach(ifindex, hook, channels.receive)?;
        let mut queues = Vec::new();
        for queue in 0..channels.receive {
            let (umem, [rx_frames, tx_frames]) = Umem::new([RING, RING])?;
            let (socket, rings) = Socket::open(&umem, shared.busy_poll, shared.tx_checksum)?;
            let (pair, shared, stats) = (queue as usize, shared.clone(), stats.clone());
            stats.make_room(pair);
            let (unsent, refused, missed) = (Unsent::default(), AtomicU64::new(0), AtomicU64::new(0));
            let both = Arc::new(Queue { pair, socket, umem, shared, stats, unsent, refused, missed });
            let receiver = Receiver::new(both.clone(), rings.fill, rings.rx, rx_frames)?;
            both.socket.bind(ifindex, queue, access, both.shared.multi_buffer)?;
            program.set_socket(queue, both.socket.as_raw_fd())?;
            let transmitter = Transmitter::new(both, rings.tx, rings.completion, tx_frames);
            queues.push((Arc::new(receiver), Arc::new(transmitter)));
        }
        Ok(Self { shared: shared.clone(), mode, queues, senders: channels.send as usize, _program: program })
    }

    /// For the workers.
    pub(super) fn link(&self) -> Link {
        let mut features = vec![self.mode];
        if self.shared.multi_buffer {
            features.push("multi-buffer");
        }
        if self.shared.busy_poll {
            features.push("busy-poll");
        }
        if self.shared.tx_checksum {
            features.push("tx-checksum");
        }
        let rx = self.queues.iter().enumerate().map(|(pair, (rx, _))| RxEntry { pair, queue: rx.clone() });
        Link {
            rx: rx.collect(),
            tx: self.queues.iter().take(self.senders).map(|(_, tx)| tx.clone() as Arc<dyn TxQueue>).collect(),
            features,
            is_wire: true,
            ..Link::down(PortState::Up, None)
        }
    }

    /// Asks the kernel again for what it did not send.
    pub(super) fn retry(&self) {
        for (_, tx) in &self.queues {
            tx.retry();
        }
    }

    /// Counts what the kernel has lost of what arrived.
    pub(super) fn count_missed(&self) {
        for (rx, _) in &self.queues {
            rx.count_missed();
        }
    }

    /// Where all frames are: for each queue, those to receive into and those to send from.
    pub(super) fn audit(&self) -> Vec<[Audit; 2]> {
        self.queues.iter().map(|(rx, tx)| [rx.audit(), tx.audit()]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_while_the_kernel_is_asked_stays_marked() {
        let unsent = Unsent::default();
        unsent.look(|| unreachable!("nothing is left"));
        unsent.mark();
        unsent.look(|| {
            // Another worker's.
            unsent.mark();
            false
        });
        assert!(unsent.is_marked());
        unsent.look(|| false);
        assert!(!unsent.is_marked());
    }

    #[test]
    fn the_kernel_is_asked_ever_less_often() {
        let (unsent, mut calls) = (Unsent::default(), 0);
        unsent.mark();
        for _ in 0..1000 {
            unsent.look(|| {
                calls += 1;
                true
            });
        }
        assert!((20..50).contains(&calls) && unsent.is_marked(), "{calls}");
    }
}
