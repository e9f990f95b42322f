//! The two queue traits over a guest's vrings.

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::frame::{Burst, BurstStorage};
use crate::port::stats::PortStats;
use crate::port::{RxQueue, TxQueue};
use crate::switch::Scratch;
use crate::virtq::Fault;
use crate::virtq::notify::EventFd;
use crate::virtq::split::Vring;

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

/// A guest's transmit ring: frames come from it.
#[derive(Debug)]
pub struct GuestTx(pub QueueSetup);

/// A guest's receive ring: frames go to it.
#[derive(Debug)]
pub struct GuestRx(pub QueueSetup);

impl RxQueue for GuestTx {
    fn poll(&self, _: &mut BurstStorage, _: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        Ok(0)
    }
    fn arm(&self) -> bool {
        false
    }
    fn disarm(&self) {}
    fn event_fd(&self) -> Option<RawFd> {
        None
    }
    fn drain_event(&self) {}
}

impl TxQueue for GuestRx {
    fn send(&self, _: &Burst<'_>, _: &[u8], _: &mut Scratch, _: &PortStats) -> Result<(), Fault> {
        Ok(())
    }
}
