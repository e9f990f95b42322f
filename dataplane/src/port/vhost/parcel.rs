//! A connection on its way from one process to another: what it consists of, and how it is put together again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::mmap::MmapRegionError;

use crate::handover::{DeviceRecord, Fds, LogRecord, PlaceRecord, RegionRecord, RingRecord, VhostRecord};
use crate::keeper::Stamp;
use crate::limits::{MAX_MEM_SLOTS, MAX_RING};
use crate::mem::{GuestMemory, Log, MemError, Region};
use crate::port::vhost::features;
use crate::port::vhost::handler::{Device, MAX_RINGS};
use crate::port::vhost::message;
use crate::port::vhost::ring::{Place, Ring, Standing};
use crate::sync::lock;
use crate::virtq::notify::{EventFd, NotifyError};

/// A port as its thread gives it away while it stands still.
#[derive(Debug, Default)]
pub struct Parcel {
    /// What there is.
    pub record: VhostRecord,
    /// The descriptors that the record refers to.
    pub fds: Fds,
    /// Where each ring is. Final once no worker has them.
    pub standing: Vec<Standing>,
}

/// Why a port that was handed over cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A descriptor is missing, or not what it should be.
    #[error("a descriptor is missing or of the wrong kind: {0}")]
    Descriptor(&'static str),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemError),
    /// A notification descriptor.
    #[error(transparent)]
    Notify(#[from] NotifyError),
    /// A bound is broken.
    #[error("{0} is out of bounds")]
    Bounds(&'static str),
    /// The protocol's state could not be repeated.
    #[error("cannot repeat the negotiation: {0}")]
    Protocol(String),
    /// A ring that ran does not.
    #[error("a ring that ran cannot go on: {0}")]
    Ring(String),
    /// The kernel refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl AdoptError {
    /// Whether a frontend can bring it about, by taking away what it has given.
    pub fn is_of_frontend(&self) -> bool {
        match self {
            // The kernel's own troubles are those of all ports; a seal on the file is its maker's.
            Self::Memory(MemError::Map(MmapRegionError::Mmap(error))) => {
                error.kind() == io::ErrorKind::PermissionDenied
            }
            Self::Memory(MemError::Map(_) | MemError::Stat(_)) => false,
            Self::Memory(_) | Self::Ring(_) => true,
            _ => false,
        }
    }
}

impl Device {
    /// Writes down everything but where the rings stand.
    pub(super) fn export(&self, stream: BorrowedFd<'_>, fds: &mut Fds) -> io::Result<DeviceRecord> {
        let region = |region: &Region, fds: &mut Fds| {
            let (file, offset) = region.source().ok_or(io::ErrorKind::NotFound)?;
            let file = fds.put(file.as_fd())?;
            Ok(RegionRecord { file, gpa: region.gpa, len: region.len, uva: region.uva, offset })
        };
        let memory = self.memory.each_region().map(|place| region(place, fds)).collect::<io::Result<_>>()?;
        let log = self.log.as_ref().map(|log| {
            let (file, size, offset) = log.source().ok_or(io::ErrorKind::NotFound)?;
            Ok::<_, io::Error>(LogRecord { file: fds.put(file.as_fd())?, size, offset })
        });
        let rings = self.rings.iter().map(|ring| ring.export(self.features, fds)).collect::<io::Result<_>>()?;
        Ok(DeviceRecord {
            stream: fds.put(stream)?,
            features: self.features,
            protocol: self.protocol,
            status: self.status,
            memory,
            log: log.transpose()?,
            rings,
            focus: self.focus,
            stamp: self.stamp.as_ref().map(|stamp| fds.put(stamp.as_fd())).transpose()?,
        })
    }

    /// Where each ring is.
    pub(super) fn standing(&self) -> Vec<Standing> {
        self.rings.iter().map(Ring::standing).collect()
    }

    /// Takes up what [`Device::export`] wrote down, but the features, which the protocol's handler has repeated. Nothing
    /// runs yet.
    fn import(&mut self, record: &DeviceRecord, fds: &mut Fds) -> Result<(), AdoptError> {
        if record.rings.len() > MAX_RINGS || record.memory.len() > MAX_MEM_SLOTS || record.focus >= MAX_RINGS {
            return Err(AdoptError::Bounds("the number of rings or memory regions"));
        }
        self.status = record.status;
        self.focus = record.focus;
        let stamp = record.stamp.map(|place| fds.take(place).ok_or(AdoptError::Descriptor("a keeper's stamp")));
        self.stamp = stamp.transpose()?.map(|fd| Arc::new(Stamp::of(fd)));
        let claim = self.share.inherit();
        let regions = record.memory.iter().map(|region| {
            let file = fds.take(region.file).ok_or(AdoptError::Descriptor("guest memory"))?;
            let region = Region::map_by(&claim, file.into(), region.gpa, region.len, region.uva, region.offset)?;
            Ok(region.telling(self.publisher.stats().clone()))
        });
        let memory = GuestMemory::new(regions.collect::<Result<_, AdoptError>>()?)?;
        if let Some(log) = &record.log {
            let file = fds.take(log.file).ok_or(AdoptError::Descriptor("dirty log"))?;
            let log = Log::map_by(&claim, file.into(), log.size, log.offset)?;
            self.log = Some(Arc::new(log.telling(self.publisher.stats().clone())));
        }
        let log = self.log.clone().filter(|_| self.features & features::LOG_ALL != 0);
        self.memory = Arc::new(memory.logged_by(log)?);
        self.rings = record.rings.iter().map(|ring| Ring::import(ring, fds)).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Lets the rings go on from where they stand; workers get them with the next publication.
    fn go_on(&mut self, record: &DeviceRecord, bases: &[u32]) -> Result<(), AdoptError> {
        if bases.len() != self.rings.len() {
            return Err(AdoptError::Bounds("the number of rings"));
        }
        for (ring, base) in self.rings.iter_mut().zip(bases) {
            (ring.base, ring.known) = (*base, true);
        }
        self.settle();
        self.check_running(record)
    }

    /// Lets the rings go on after a crash, from where the journal, or the ring itself, says that they stand.
    fn resume(&mut self, record: &DeviceRecord) -> Result<(), AdoptError> {
        for (ring, before) in self.rings.iter_mut().zip(&record.rings) {
            // A ring that does not run yet has not moved either.
            (ring.base, ring.known, ring.kept) = (before.base, !before.runs, before.runs);
        }
        // Who died may have written to pages without having marked them.
        self.memory.mark_all();
        self.settle();
        self.check_running(record)
    }

    fn check_running(&self, record: &DeviceRecord) -> Result<(), AdoptError> {
        for (ring, before) in self.rings.iter().zip(&record.rings) {
            if before.runs && !ring.runs(self.features) {
                return Err(AdoptError::Ring(ring.problem.clone().unwrap_or_default()));
            }
        }
        Ok(())
    }
}

impl Ring {
    fn export(&self, features: u64, fds: &mut Fds) -> io::Result<RingRecord> {
        let mut put = |event: Option<BorrowedFd<'_>>| event.map(|event| fds.put(event)).transpose();
        let place = self.place.map(|place| PlaceRecord {
            desc: place.desc,
            avail: place.avail,
            used: place.used,
            log: place.log,
        });
        Ok(RingRecord {
            size: self.size,
            place,
            kick: put(self.kick.as_ref().map(|event| event.as_fd()))?,
            call: put(self.call.as_ref().map(|event| event.as_fd()))?,
            err: put(self.err.as_ref().map(|event| event.as_fd()))?,
            base: self.standing().base(),
            enabled: self.enabled,
            started: self.started,
            runs: self.runs(features),
        })
    }

    fn import(record: &RingRecord, fds: &mut Fds) -> Result<Self, AdoptError> {
        if record.size > u32::from(MAX_RING) {
            return Err(AdoptError::Bounds("the size of a ring"));
        }
        let mut event = |place: Option<u32>| {
            let mut fd = |place| fds.take(place).ok_or(AdoptError::Descriptor("a ring's notification"));
            place.map(|place| Ok::<_, AdoptError>(EventFd::from_file(fd(place)?.into())?)).transpose()
        };
        let place =
            record.place.map(|place| Place { desc: place.desc, avail: place.avail, used: place.used, log: place.log });
        let mut ring = Self::default();
        (ring.size, ring.place) = (record.size, place);
        ring.kick = event(record.kick)?.map(Arc::new);
        ring.call = event(record.call)?.map(Arc::new);
        ring.err = event(record.err)?;
        (ring.enabled, ring.started) = (record.enabled, record.started);
        Ok(ring)
    }
}

/// A connection that was handed over, put together, and not served yet.
pub(super) struct Session {
    pub(super) stream: UnixStream,
    pub(super) device: Arc<Mutex<Device>>,
    pub(super) handler: BackendReqHandler<Mutex<Device>>,
    record: DeviceRecord,
}

impl Session {
    /// Puts a connection together.
    pub(super) fn adopt(device: Device, record: DeviceRecord, fds: &mut Fds) -> Result<Self, AdoptError> {
        let stream = fds.take(record.stream).ok_or(AdoptError::Descriptor("a frontend's socket"))?;
        check_socket(&stream)?;
        let stream = UnixStream::from(stream);
        let device = Arc::new(Mutex::new(device));
        let handler = handler_for(&stream, &device, &record)?;
        lock(&device).import(&record, fds)?;
        Ok(Self { stream, device, handler, record })
    }

    /// As [`Device::go_on`].
    pub(super) fn go_on(&self, bases: &[u32]) -> Result<(), AdoptError> {
        lock(&self.device).go_on(&self.record, bases)
    }

    /// As [`Device::resume`].
    pub(super) fn resume(&self) -> Result<(), AdoptError> {
        lock(&self.device).resume(&self.record)
    }
}

fn check_socket(fd: &OwnedFd) -> Result<(), AdoptError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let is_socket = link.to_string_lossy().starts_with("socket:");
    if is_socket { Ok(()) } else { Err(AdoptError::Descriptor("a frontend's socket")) }
}

/// A handler of the protocol that has seen the frontend's negotiation. It keeps to itself what was negotiated, so that is
/// repeated to it over another socket, whose place the real one takes then.
fn handler_for(
    stream: &UnixStream,
    device: &Arc<Mutex<Device>>,
    record: &DeviceRecord,
) -> Result<BackendReqHandler<Mutex<Device>>, AdoptError> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let mut handler = BackendReqHandler::from_stream(ours, device.clone());
    let requests = [
        (FrontendReq::GET_FEATURES, None),
        (FrontendReq::SET_PROTOCOL_FEATURES, Some(record.protocol)),
        (FrontendReq::SET_FEATURES, Some(record.features)),
    ];
    for (request, payload) in requests {
        message::request(&mut theirs, request, payload)?;
        handler.handle_request().map_err(|error| AdoptError::Protocol(error.to_string()))?;
    }
    // SAFETY: both descriptors are open and ours; the handler's is replaced at once, and keeps its number.
    let done = unsafe { libc::dup3(stream.as_raw_fd(), handler.as_raw_fd(), libc::O_CLOEXEC) };
    if done < 0 { Err(io::Error::last_os_error().into()) } else { Ok(handler) }
}
