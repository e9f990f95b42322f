//! The state of one connection, and what each message does to it.
//!
//! Rings are changed in one order only: withdraw them from the workers, publish (which returns when no worker uses
//! them any more), change, then settle, which makes what can run and publishes it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::keeper::Stamp;
use crate::limits::{MAX_GUEST_MEMORY, MAX_MEM_SLOTS, MAX_QUEUE_PAIRS, MAX_RING};
use crate::mem::{Claim, GuestMemory, Log, MemError, OnLoss, Region, Share};
use crate::port::vhost::features;
use crate::port::vhost::hold::Hold;
use crate::port::vhost::ring::{Place, Queue, Ring, Standing, Surroundings};
use crate::port::{Link, Publisher, RxEntry};
use crate::status::PortState;
use crate::virtq::notify::{EventFd, NotifyError};
use crate::virtq::{Fault, RingError};

/// Vrings of one device.
pub(super) const MAX_RINGS: usize = 2 * MAX_QUEUE_PAIRS;

/// Shown while the frontend is there and the guest's driver is not.
const WAITING: &str = "connected; waiting for the guest's driver";

/// Why a message is refused. Each of these ends the connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceError {
    #[error("ring {0} is beyond the {MAX_RINGS} rings of a device")]
    RingIndex(u32),
    #[error(transparent)]
    RingSize(#[from] RingError),
    #[error("ring {0}: next index {1:#x} does not fit a split ring")]
    Base(usize, u32),
    #[error("ring {0}: {1}")]
    Notify(usize, #[source] NotifyError),
    #[error("virtio features {0:#x} were never offered")]
    Features(u64),
    #[error("protocol features {0:#x} were never offered")]
    ProtocolFeatures(u64),
    #[error(transparent)]
    Memory(#[from] MemError),
    #[error("an MTU of {0} is not within 68 to 65535")]
    Mtu(u64),
    #[error("device status {0:#x} is more than eight bits")]
    Status(u64),
    #[error("ring {0} can be enabled or disabled, not {1}")]
    Enable(u32, u32),
    #[error("not supported")]
    Unsupported,
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        Error::ReqHandlerError(io::Error::other(error))
    }
}

/// A guest's network device, as its frontend has set it up so far.
pub(super) struct Device {
    pub(super) publisher: Arc<dyn Publisher>,
    /// Queue pairs that we spread frames over at most.
    spread: usize,
    /// MTU that the port is configured to.
    mtu: Option<u16>,
    /// The frontend's was told to be too large.
    told_mtu: bool,
    /// Shown until the link is up.
    note: String,
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) status: u8,
    pub(super) memory: Arc<GuestMemory>,
    /// What the port may map.
    pub(super) share: Arc<Share>,
    /// Where dirty pages are marked while `LOG_ALL` is among the features.
    pub(super) log: Option<Arc<Log>>,
    /// For frames that come while rings are changed, or while the guest is logged and its rings are stopped.
    hold: Option<Arc<Hold>>,
    /// As many as have been named so far.
    pub(super) rings: Vec<Ring>,
    /// The ring that `SET_VRING_NUM`, `_ADDR` or `_BASE` named last; see [`Device::full_index`].
    pub(super) focus: usize,
    /// For the keeper.
    pub(super) stamp: Option<Arc<Stamp>>,
    published: Option<Link>,
}

impl Device {
    /// A device to which nothing has been said yet. `before` is why the previous connection failed.
    pub(super) fn new(
        publisher: Arc<dyn Publisher>,
        share: Arc<Share>,
        queues: Option<u16>,
        mtu: Option<u16>,
        before: Option<&str>,
    ) -> Self {
        let mut device = Self {
            publisher,
            spread: queues.map_or(MAX_QUEUE_PAIRS, |queues| usize::from(queues.max(1))),
            mtu,
            told_mtu: false,
            note: before.map_or_else(|| WAITING.to_owned(), |reason| format!("{WAITING}; before that: {reason}")),
            features: 0,
            protocol: 0,
            status: 0,
            memory: Arc::default(),
            share,
            log: None,
            hold: None,
            rings: Vec::new(),
            focus: 0,
            stamp: None,
            published: None,
        };
        device.publish();
        device
    }

    /// Whether the frontend may ask for acknowledgements.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// Starts or stops the flow of frames through a ring. QEMU sends this before `SET_FEATURES`.
    pub(super) fn enable(&mut self, index: u32, enable: u32) -> std::result::Result<(), DeviceError> {
        let enabled = match enable {
            0 => false,
            1 => true,
            other => return Err(DeviceError::Enable(index, other)),
        };
        let index = self.ring(index)?;
        self.rings[index].enabled = enabled;
        self.settle();
        Ok(())
    }

    /// The frontend's MTU, which it tells the driver by itself.
    pub(super) fn frontend_mtu(&mut self, mtu: u64) -> std::result::Result<(), DeviceError> {
        let mtu = u16::try_from(mtu).ok().filter(|&mtu| mtu >= 68).ok_or(DeviceError::Mtu(mtu))?;
        match self.mtu {
            // The frontend may say so as often as it likes.
            Some(ours) if mtu > ours && !std::mem::replace(&mut self.told_mtu, true) => {
                tracing::warn!(frontend = mtu, port = ours, "the guest's MTU is larger than its port's");
            }
            _ => tracing::debug!(mtu, "the frontend set its MTU"),
        }
        Ok(())
    }

    /// The guest runs here from now on, after a migration, and cannot say so itself. Its address is in the first six
    /// bytes of the payload (vhost-user, `SEND_RARP`).
    pub(super) fn announce(&self, payload: u64) {
        let [a, b, c, d, e, f, ..] = payload.to_ne_bytes();
        self.publisher.announce([a, b, c, d, e, f]);
    }

    /// Status bits of the device (virtio 1.2, 2.1).
    pub(super) fn status(&self) -> u8 {
        self.status
    }

    /// Sets the status bits; none at all means that the driver resets the device.
    pub(super) fn set_status(&mut self, status: u64) -> std::result::Result<(), DeviceError> {
        self.status = u8::try_from(status).map_err(|_| DeviceError::Status(status))?;
        if self.status == 0 {
            self.stop_all();
        }
        Ok(())
    }

    /// Stops all rings and forgets what the driver negotiated. Memory stays: QEMU only tells us its changes.
    fn stop_all(&mut self) {
        self.rings.iter_mut().for_each(Ring::withdraw);
        self.publish();
        for ring in &mut self.rings {
            ring.freeze();
            ring.stop();
            ring.base = 0;
        }
        self.features &= features::PROTOCOL_FEATURES | features::LOG_ALL;
        self.clear_fault();
        self.settle();
    }

    /// Serves the guest again after a fault, now that it begins anew, unless that cannot help.
    fn clear_fault(&self) {
        let stats = self.publisher.stats();
        if stats.fault() == Some(Fault::NotifyBlocked) || self.memory.is_lost() {
            return;
        }
        stats.clear_fault();
        // It may have gone at this moment.
        if self.memory.is_lost() {
            stats.memory_lost();
        }
    }

    /// Makes sure that there is a ring with that index.
    fn ring(&mut self, index: u32) -> std::result::Result<usize, DeviceError> {
        let place = usize::try_from(index).ok().filter(|&index| index < MAX_RINGS);
        let place = place.ok_or(DeviceError::RingIndex(index))?;
        if place >= self.rings.len() {
            self.rings.resize_with(place + 1, Ring::default);
        }
        Ok(place)
    }

    /// As [`Device::ring`], for the messages that set a ring up.
    fn focused(&mut self, index: u32) -> std::result::Result<usize, DeviceError> {
        self.focus = self.ring(index)?;
        Ok(self.focus)
    }

    /// The messages that carry a descriptor have only eight bits for the ring's index. With more than 128 queue pairs
    /// the frontend lets it wrap, but it has just named the ring in full.
    fn full_index(&mut self, index: u8) -> std::result::Result<usize, DeviceError> {
        let full = if self.focus % 256 == usize::from(index) { self.focus } else { usize::from(index) };
        self.ring(full as u32)
    }

    /// Changes a ring's size, place or base. It continues where it was, if it ran.
    fn rebuild(&mut self, index: usize, change: impl FnOnce(&mut Ring)) {
        self.suspend(index..index + 1);
        let ring = &mut self.rings[index];
        ring.freeze();
        change(ring);
        self.settle();
    }

    /// A ring, and a descriptor for it.
    fn wire(&mut self, index: u8, file: Option<File>) -> std::result::Result<(usize, Option<EventFd>), DeviceError> {
        let index = self.full_index(index)?;
        let event = file.map(EventFd::from_file).transpose().map_err(|error| DeviceError::Notify(index, error))?;
        Ok((index, event))
    }

    /// Changes a ring's descriptors.
    fn rewire(&mut self, index: usize, change: impl FnOnce(&mut Ring)) {
        self.suspend(index..index + 1);
        change(&mut self.rings[index]);
        self.settle();
    }

    /// Takes rings from the workers for a change, after which [`Device::settle`] brings them back. What comes for the guest
    /// meanwhile is kept.
    fn suspend(&mut self, rings: Range<usize>) {
        let could_receive = self.can_receive();
        self.rings[rings].iter_mut().for_each(Ring::withdraw);
        if could_receive && !self.can_receive() {
            self.hold();
        }
        self.publish();
    }

    fn can_receive(&self) -> bool {
        self.rings.iter().any(|ring| matches!(ring.queue(), Some(Queue::ToGuest(_))))
    }

    fn suspend_all(&mut self) {
        self.suspend(0..self.rings.len());
    }

    /// Has what comes for the guest while it has no ring to receive with be kept, from the next link on.
    fn hold(&mut self) {
        let stats = self.publisher.stats();
        self.hold.get_or_insert_with(|| Arc::new(Hold::new(stats.clone())));
    }

    /// Whether writes to the guest's memory are logged, as they are when it migrates.
    fn is_logged(&self) -> bool {
        self.features & features::LOG_ALL != 0
    }

    /// Brings another memory table, or another dirty log, into use. Rings go on where they are; the old log is let go
    /// of by the last of them.
    fn change_memory(&mut self, memory: &GuestMemory) -> std::result::Result<(), DeviceError> {
        let log = self.log.clone().filter(|_| self.is_logged());
        let memory = memory.logged_by(log)?;
        self.suspend_all();
        self.memory = Arc::new(memory);
        for (index, ring) in self.rings.iter_mut().enumerate() {
            ring.move_to(index, &self.memory);
        }
        // Nobody uses the memory that was lost any more.
        if self.publisher.stats().fault() == Some(Fault::MemoryLost) {
            self.clear_fault();
        }
        self.settle();
        Ok(())
    }

    /// Maps a region of guest memory, for whose loss this port is to blame.
    fn map(&self, claim: &Claim, region: &VhostUserMemoryRegion, file: File) -> std::result::Result<Region, MemError> {
        let (gpa, len, uva) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let region = Region::map_by(claim, file, gpa, len, uva, region.mmap_offset)?;
        Ok(region.telling(self.publisher.stats().clone()))
    }

    /// Makes and publishes whatever can run now.
    pub(super) fn settle(&mut self) {
        let journal = self.publisher.journal();
        let (features, stats) = (self.features, self.publisher.stats());
        let around = Surroundings { features, memory: &self.memory, journal, stats };
        for (index, ring) in self.rings.iter_mut().enumerate() {
            ring.settle(index, &around);
        }
        self.publish();
        // By now every worker has been told to deliver what was kept. Rings that are stopped, as in a migration that failed in
        // the end, may still come back.
        let is_over = self.can_receive() || self.rings.iter().any(|ring| ring.problem.is_some());
        if is_over && !self.is_logged() && self.hold.take().is_some() {
            self.publish();
        }
    }

    /// Publishes the link if it differs from the one that workers have.
    fn publish(&mut self) {
        let link = self.link();
        if self.published.as_ref().is_some_and(|old| same(old, &link)) {
            return;
        }
        if link.state == PortState::Up {
            self.note = WAITING.to_owned();
        }
        self.publisher.publish(link.clone());
        self.published = Some(link);
    }

    /// What the port offers now. A ring that is only withdrawn for a change still counts for the state, lest the
    /// switch forget the port's stations.
    fn link(&self) -> Link {
        let up = self.rings.iter().any(|ring| ring.runs(self.features));
        let problem = self.rings.iter().find_map(|ring| ring.problem.clone());
        let mut link = Link::down(PortState::Down, problem);
        if up {
            link.state = PortState::Up;
        } else {
            link.reason.get_or_insert_with(|| self.note.clone());
        }
        for queue in self.rings.iter().filter_map(Ring::queue) {
            match queue {
                Queue::FromGuest(entry) => link.rx.push(entry.clone()),
                Queue::ToGuest(queue) if link.tx.len() < self.spread => link.tx.push(queue.clone()),
                Queue::ToGuest(_) => {}
            }
        }
        link.hold = self.hold.clone();
        link.features = features::names(self.features);
        link.memory_bytes = self.memory.bytes();
        link
    }
}

/// Whether two links are the same to workers and operators.
fn same(a: &Link, b: &Link) -> bool {
    let queue = |(a, b): (&RxEntry, &RxEntry)| Arc::ptr_eq(&a.queue, &b.queue);
    a.state == b.state
        && a.hold.is_some() == b.hold.is_some()
        && a.reason == b.reason
        && a.features == b.features
        && a.memory_bytes == b.memory_bytes
        && a.rx.len() == b.rx.len()
        && a.rx.iter().zip(&b.rx).all(queue)
        && a.tx.len() == b.tx.len()
        && a.tx.iter().zip(&b.tx).all(|(a, b)| Arc::ptr_eq(a, b))
}

impl Drop for Device {
    /// Takes the rings from the workers before memory goes. The connection says why right after.
    fn drop(&mut self) {
        self.publisher.publish(Link::down(PortState::Down, None));
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; disables all rings, as the specification recommends.
    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for ring in &mut self.rings {
            ring.enabled = false;
        }
        self.status = 0;
        self.stop_all();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(features::OFFERED)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let foreign = features & !features::OFFERED;
        if foreign != 0 {
            return Err(DeviceError::Features(foreign).into());
        }
        if features != self.features {
            self.suspend_all();
            // Where logging alone is switched on or off, rings just go on.
            if (features ^ self.features) & !features::LOG_ALL != 0 {
                self.rings.iter_mut().for_each(Ring::freeze);
            }
            let was_logged = self.is_logged();
            self.features = features;
            if self.is_logged() {
                self.hold();
            } else if was_logged {
                // The next migration brings another one.
                self.log = None;
            }
            self.change_memory(&self.memory.clone())?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        // Before any is mapped: all of them together could take up the addresses of the process.
        let bytes = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.memory_size));
        if bytes > MAX_GUEST_MEMORY {
            return Err(DeviceError::Memory(MemError::TooLarge).into());
        }
        let claim = self.memory.claim(&self.share);
        let regions = regions.iter().zip(files).map(|(region, file)| self.map(&claim, region, file));
        let regions = regions.collect::<std::result::Result<_, _>>().map_err(DeviceError::Memory)?;
        self.change_memory(&GuestMemory::new(regions).map_err(DeviceError::Memory)?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let index = self.focused(index)?;
        // Packed rings may have any size.
        let shape = num.is_power_of_two() || self.features & features::RING_PACKED != 0;
        if num == 0 || num > u32::from(MAX_RING) || !shape {
            return Err(DeviceError::RingSize(RingError::Size(num)).into());
        }
        if num != self.rings[index].size {
            self.rebuild(index, |ring| ring.size = num);
        }
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let index = self.focused(index)?;
        let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let place = Some(Place { desc: descriptor, avail: available, used, log });
        if place != self.rings[index].place {
            self.rebuild(index, |ring| ring.place = place);
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = self.focused(index)?;
        // Split rings have 16 bits of it, packed ones also the used position.
        let packed = self.features & features::RING_PACKED != 0;
        if !packed && base > u32::from(u16::MAX) {
            return Err(DeviceError::Base(index, base).into());
        }
        self.rebuild(index, |ring| ring.base = base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let place = self.ring(index)?;
        self.rings[place].withdraw();
        self.rings[place].started = false;
        self.publish();
        self.rings[place].freeze();
        self.rings[place].stop();
        // The frontend will start it from what we say now.
        self.rings[place].known = true;
        self.clear_fault();
        self.publish();
        Ok(VhostUserVringState::new(index, self.rings[place].base))
    }

    /// Starts the ring. Without a descriptor it is polled.
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, event) = self.wire(index, fd)?;
        self.rewire(index, |ring| {
            ring.kick = event.map(Arc::new);
            ring.started = true;
        });
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, event) = self.wire(index, fd)?;
        // QEMU exchanges it whenever the guest masks an interrupt: no reason to disturb the workers.
        match (self.rings[index].call.clone(), event) {
            (Some(call), Some(event)) => {
                call.go_on_as(event).map_err(|error| DeviceError::Notify(index, error.into()))?;
            }
            (_, event) => self.rewire(index, |ring| ring.call = event.map(Arc::new)),
        }
        // One that was not started has nothing to tell; it will when it is.
        let ring = &self.rings[index];
        if matches!(ring.standing(), Standing::Running(_)) {
            ring.remind(self.publisher.stats());
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, event) = self.wire(index, fd)?;
        self.rings[index].err = event;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let foreign = features & !features::protocol().bits();
        if foreign != 0 {
            return Err(DeviceError::ProtocolFeatures(foreign).into());
        }
        self.protocol = features;
        Ok(())
    }

    /// Always all of them: a frontend with more queues than we say would not start.
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(MAX_QUEUE_PAIRS as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable(index, u32::from(enable))?;
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        if self.memory.bytes().saturating_add(region.memory_size) > MAX_GUEST_MEMORY {
            return Err(DeviceError::Memory(MemError::TooLarge).into());
        }
        // Beside all that there is.
        let claim = GuestMemory::default().claim(&self.share);
        let region = self.map(&claim, region, fd).map_err(DeviceError::Memory)?;
        self.change_memory(&self.memory.with(region).map_err(DeviceError::Memory)?)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(region.guest_phys_addr, region.memory_size, region.user_addr);
        self.change_memory(&memory.map_err(DeviceError::Memory)?)?;
        Ok(())
    }

    /// Gives us the dirty log, or a larger one instead (vhost-user, "Migration"). The reply, which the crate sends,
    /// means that the old one is not written to any more.
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let claim = Log::claim(self.log.as_deref(), &self.share);
        let log = Log::map_by(&claim, file, log.mmap_size, log.mmap_offset).map_err(DeviceError::Memory)?;
        self.log = Some(Arc::new(log.telling(self.publisher.stats().clone())));
        self.change_memory(&self.memory.clone())?;
        Ok(())
    }

    // What follows belongs to features that we do not offer.

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(DeviceError::Unsupported.into())
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(DeviceError::Unsupported.into())
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(DeviceError::Unsupported.into())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(DeviceError::Unsupported.into())
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(DeviceError::Unsupported.into())
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(DeviceError::Unsupported.into())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(DeviceError::Unsupported.into())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(DeviceError::Unsupported.into())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(DeviceError::Unsupported.into())
    }
}
