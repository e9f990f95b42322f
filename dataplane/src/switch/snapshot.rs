//! What workers see of the switch: immutable, replaced as a whole.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::limits::MAX_FRAME;
use crate::port::stats::PortStats;
use crate::port::{Link, PortId, RxEntry, RxQueue};
use crate::switch::policer::Policers;
use crate::switch::vlan::VlanPolicy;

/// A port as workers see it.
#[derive(Debug, Clone)]
pub struct PortView {
    /// Its place in [`Snapshot::ports`].
    pub id: PortId,
    /// Its network's place in [`Snapshot::networks`].
    pub network: u16,
    /// VLAN membership.
    pub vlan: VlanPolicy,
    /// Largest layer-3 packet in bytes.
    pub mtu: usize,
    /// The address configured for it.
    pub mac: Option<u64>,
    /// The only source address that is let in, with spoofcheck.
    pub only_source: Option<u64>,
    /// Rate limits.
    pub policers: Policers,
    /// Counters.
    pub stats: Arc<PortStats>,
    /// Its queues at the moment.
    pub link: Arc<Link>,
}

impl PortView {
    /// Whether frames pass the port as they are: no VLANs to sort out, no limit on their size.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.vlan == VlanPolicy::All && self.mtu >= MAX_FRAME
    }

    /// Whether a frame that leaves without the tag of its VLAN, and begins with one of its sender's own, would be in another
    /// VLAN beyond the port: its own others, or those of a wire that others use, too.
    #[inline]
    pub fn may_have_other_vlans(&self) -> bool {
        match self.vlan {
            VlanPolicy::All => false,
            VlanPolicy::Access(_) => self.link.is_wire,
            VlanPolicy::Trunk { .. } => true,
        }
    }
}

/// A queue that a worker serves.
#[derive(Debug)]
pub struct Served {
    /// The port it belongs to.
    pub port: Arc<PortView>,
    /// Index of its pair there.
    pub pair: usize,
    /// The queue.
    pub queue: Arc<dyn RxQueue>,
    /// What [`RxQueue::copies`] says.
    pub copies_in: u64,
    /// The other side was asked to notify us. Only its worker uses this. Plans of one worker that have the queue share it: who
    /// was asked stays asked.
    pub armed: Arc<AtomicBool>,
}

impl Served {
    /// A queue that has not been served yet by the worker.
    pub fn new(port: &Arc<PortView>, rx: &RxEntry) -> Self {
        let (queue, copies_in) = (rx.queue.clone(), rx.queue.copies());
        Self { port: port.clone(), pair: rx.pair, queue, copies_in, armed: Arc::default() }
    }
}

/// What one worker has to do.
#[derive(Debug)]
pub struct Plan {
    /// Queues to serve.
    pub queues: Vec<Served>,
    /// Epoch since which these queues are in these places.
    pub since: u64,
    /// What wakes the worker from its sleep. `None` if the process has no descriptor left: the plan holds all the same, and the
    /// worker wakes by itself.
    pub alarm: Option<Arc<Alarm>>,
}

impl Plan {
    /// Whether this has the same queues in the same places.
    pub fn has(&self, queues: &[Served]) -> bool {
        let pairs = self.queues.iter().zip(queues);
        self.queues.len() == queues.len() && { pairs }.all(|(own, other)| Arc::ptr_eq(&own.queue, &other.queue))
    }
}

/// What wakes a worker that serves some queues. Made by the control side, so that a worker makes no system calls to take a plan
/// up, and only anew for other queues, since the kernel takes a microsecond for each of them.
#[derive(Debug)]
pub struct Alarm {
    /// An epoll instance over their notifications (the event's data is the queue's place) and the worker's own wake-up
    /// (`u64::MAX`).
    pub epoll: OwnedFd,
    /// Places of those without: they can only be polled.
    pub silent: Vec<usize>,
}

/// A station that is behind a port from now on.
#[derive(Debug, Clone, Copy)]
pub struct Announcement {
    /// The port.
    pub port: PortId,
    /// The station.
    pub mac: [u8; 6],
}

/// The switch at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts publications.
    pub epoch: u64,
    /// Ports by id.
    pub ports: Vec<Option<Arc<PortView>>>,
    /// Members of each network whose link is up, for flooding.
    pub networks: Vec<Vec<PortId>>,
    /// Ports where frames are held.
    pub holding: Vec<PortId>,
    /// One for each worker.
    pub plans: Vec<Plan>,
    /// What the first worker has to say for a port when it takes this up.
    pub announcement: Option<Announcement>,
}

impl Snapshot {
    /// A port by id.
    #[inline]
    pub fn port(&self, id: PortId) -> Option<&PortView> {
        self.ports.get(usize::from(id.0))?.as_deref()
    }
}
