//! Ports: where frames come from and go to.
//!
//! Every kind of port is a set of queues behind two traits. A [`RxQueue`] fills bursts with frames, a [`TxQueue`]
//! takes the frames of a burst; the switch between them knows nothing else of a port. What a port offers at the moment
//! is its [`Link`]; the port's own control thread makes a new one whenever the other side changes something, and
//! publishes it to the workers through [`Publisher`].

pub mod afxdp;
#[cfg(feature = "dpdk")]
pub mod dpdk;
mod netlink;
pub mod stats;
pub mod tap;
pub mod vhost;
mod watch;
mod wire_frame;

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::frame::{Burst, BurstStorage};
use crate::keeper::Keeper;
use crate::port::stats::PortStats;
use crate::port::vhost::hold::Hold;
use crate::status::PortState;
use crate::switch::convert::{Accepts, Scratch};
use crate::virtq::Fault;
use crate::virtq::journal::Journal;

/// Index of a port in the switch's tables. Reused after a port is gone, never while a worker knows the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u16);

/// Fills bursts with frames received from the other side. Served by one worker at a time.
pub trait RxQueue: Send + Sync + std::fmt::Debug {
    /// Takes up to a burst of frames, hands them to `forward`, and gives their buffers back to the other side.
    /// Returns the number of frames taken.
    ///
    /// # Errors
    /// The [`Fault`] of the other side that ends this port's service until it resets.
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault>;

    /// Asks the other side to notify us of new frames. Returns whether some came meanwhile, so that the caller must
    /// not sleep.
    fn arm(&self) -> bool;

    /// Asks the other side not to notify us, since we poll.
    fn disarm(&self);

    /// What becomes readable when there are frames. `None` for a queue that can only be polled.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Clears the readable state of [`RxQueue::event_fd`], if that is not done by taking the frames.
    fn drain_event(&self);

    /// Copies of each frame's payload that receiving it takes. None unless said.
    fn copies(&self) -> u64 {
        0
    }
}

/// Takes frames to the other side. Workers share it.
pub trait TxQueue: Send + Sync + std::fmt::Debug {
    /// Delivers the frames of `burst` whose indices are listed, in order. Frames that do not fit are dropped and
    /// counted, and noted in [`Scratch::outcomes`]; this never waits for the other side.
    ///
    /// # Errors
    /// The [`Fault`] of the other side that ends this port's service until it resets.
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault>;

    /// Super-packets that it would rather have than many segments, of whatever size they come. None unless said.
    fn prefers(&self) -> Accepts {
        Accepts::default()
    }
}

/// One receive queue of a link.
#[derive(Debug, Clone)]
pub struct RxEntry {
    /// Index of the queue pair.
    pub pair: usize,
    /// The queue.
    pub queue: Arc<dyn RxQueue>,
}

/// What a port offers at the moment. Immutable.
#[derive(Debug, Clone)]
pub struct Link {
    /// For the operator.
    pub state: PortState,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Queues that workers poll.
    pub rx: Vec<RxEntry>,
    /// Queues that frames are spread over, by flow.
    pub tx: Vec<Arc<dyn TxQueue>>,
    /// Where frames go while there is no such queue, if the port's guest is migrating or a ring of it is being changed;
    /// what it holds is for the guest.
    pub hold: Option<Arc<Hold>>,
    /// Names of the features that the other side accepted.
    pub features: Vec<&'static str>,
    /// Guest memory mapped, in bytes.
    pub memory_bytes: u64,
    /// Behind it is a wire. What comes from there has been cut up: it pays to merge it for receivers that prefer that.
    pub is_wire: bool,
}

impl Link {
    /// Whether frames can be sent over it now.
    #[inline]
    pub fn receives(&self) -> bool {
        !self.tx.is_empty()
    }

    /// A link over which nothing passes.
    pub fn down(state: PortState, reason: Option<String>) -> Self {
        Self {
            state,
            reason,
            rx: Vec::new(),
            tx: Vec::new(),
            hold: None,
            features: Vec::new(),
            memory_bytes: 0,
            is_wire: false,
        }
    }
}

/// A port's way to the workers, held by the thread that looks after the port's other side.
pub trait Publisher: Send + Sync {
    /// Replaces the port's link. Returns when no worker uses the previous one any more, so that its rings may be
    /// read and its memory may be unmapped.
    fn publish(&self, link: Link);

    /// Forgets the stations learned behind the port.
    fn forget_stations(&self);

    /// Tells the port's network that the station of that address is behind the port from now on.
    fn announce(&self, mac: [u8; 6]);

    /// Counters of the port.
    fn stats(&self) -> &Arc<PortStats>;

    /// What keeps the port's connection over a crash.
    fn keeper(&self) -> Option<Arc<Keeper>> {
        None
    }

    /// Where the positions of the port's rings are kept over a crash, and the name that it has there.
    fn journal(&self) -> Option<(Arc<Journal>, String)> {
        None
    }
}

/// The error of a call that failed.
fn check(result: libc::c_int) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A socket for requests about interfaces (`netdevice(7)`).
fn interface_socket() -> std::io::Result<OwnedFd> {
    // SAFETY: no pointers are passed, and the descriptor that comes back is ours alone.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        check(fd)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
