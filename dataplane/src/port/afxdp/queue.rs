//! Opening the queues of an interface: pool, socket and rings for each, and the program that feeds them.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::program::{Hook, Program};
use super::rx::Receiver;
use super::socket::{Access, RING, Socket};
use super::tx::Transmitter;
use super::umem::{Audit, Umem};
use super::{Options, Queue, Shared};
use crate::config::AfxdpMode;
use crate::port::stats::PortStats;
use crate::port::{Link, RxEntry, TxQueue};
use crate::status::PortState;

/// The queues of an interface, open. Dropping it gives the interface back to the kernel.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) shared: Arc<Shared>,
    /// What the operator calls the way they were opened.
    pub(super) mode: &'static str,
    queues: Vec<(Arc<Receiver>, Arc<Transmitter>)>,
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

impl Queues {
    /// Opens the first `count` queues in the first way of the mode that works. Returns why the ways before it did not,
    /// for the operator, too.
    pub(super) fn open(
        ifindex: u32,
        count: u32,
        mtu: usize,
        options: &Options,
        stats: &Arc<PortStats>,
    ) -> Result<(Self, String)> {
        let (mut failures, mut last) = (Vec::new(), Error::from(ErrorKind::Unsupported));
        for &(name, hook, access) in ways(options.mode) {
            // A frame over several of the pool's takes support by the driver where it uses them itself.
            for multi_buffer in [true, false] {
                let shared = Arc::new(Shared::new(mtu, multi_buffer, options.busy_poll));
                match Self::open_in(ifindex, count, (name, hook, access), &shared, stats) {
                    Ok(queues) => return Ok((queues, failures.join("; "))),
                    Err(e) => last = e,
                }
                if last.raw_os_error() != Some(libc::EOPNOTSUPP) {
                    break;
                }
            }
            failures.push(format!("{name}: {last}"));
        }
        Err(Error::new(last.kind(), failures.join("; ")))
    }

    fn open_in(
        ifindex: u32,
        count: u32,
        (mode, hook, access): (&'static str, Hook, Access),
        shared: &Arc<Shared>,
        stats: &Arc<PortStats>,
    ) -> Result<Self> {
        let program = Program::attach(ifindex, hook, count)?;
        let mut queues = Vec::new();
        for queue in 0..count {
            let (umem, [rx_frames, tx_frames]) = Umem::new([RING, RING])?;
            let (socket, rings) = Socket::open(&umem, shared.busy_poll)?;
            let (pair, shared, stats) = (queue as usize, shared.clone(), stats.clone());
            let both = Arc::new(Queue { pair, socket, umem, shared, stats, unsent: AtomicBool::new(false) });
            let receiver = Receiver::new(both.clone(), rings.fill, rings.rx, rx_frames)?;
            both.socket.bind(ifindex, queue, access, both.shared.multi_buffer)?;
            program.set_socket(queue, both.socket.as_raw_fd())?;
            let transmitter = Transmitter::new(both, rings.tx, rings.completion, tx_frames);
            queues.push((Arc::new(receiver), Arc::new(transmitter)));
        }
        Ok(Self { shared: shared.clone(), mode, queues, _program: program })
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
        let rx = self.queues.iter().enumerate().map(|(pair, (rx, _))| RxEntry { pair, queue: rx.clone() });
        Link {
            rx: rx.collect(),
            tx: self.queues.iter().map(|(_, tx)| tx.clone() as Arc<dyn TxQueue>).collect(),
            features,
            coalesce: true,
            ..Link::down(PortState::Up, None)
        }
    }

    /// Where all frames are: for each queue, those to receive into and those to send from.
    pub(super) fn audit(&self) -> Vec<[Audit; 2]> {
        self.queues.iter().map(|(rx, tx)| [rx.audit(), tx.audit()]).collect()
    }
}
