//! A small learning switch as the stock crates make it easy: `vhost-user-backend` for the protocol and the threads,
//! `virtio-queue` for the rings, `vm-memory` for the guests' memory. Each frame is copied in and out. It is what we are
//! compared with, and meant to be as fast as these crates allow in the way they are meant to be used.

use anyhow::{Context, Result};
use clap::Parser;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Guest = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Guest>;

/// virtio-net queues of one pair: the guest receives from the first.
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const BURST: usize = 32;
const HEADER: usize = 12;
const ADDRESSES: usize = 12;
/// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC, MRG_RXBUF.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 15;
const RETRY: Duration = Duration::from_millis(20);

/// Learning switch over the stock rust-vmm crates, to compare with.
#[derive(Parser)]
struct Arguments {
    /// Sockets to connect to, as client; retried until they are there
    #[arg(required = true)]
    sockets: Vec<PathBuf>,
}

/// A hash that suits addresses.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }
    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

/// One guest, as the others see it.
#[derive(Default)]
struct Port {
    /// The ring to write to, and the guest's memory; there once it has started.
    receiver: OnceLock<(Vring, Guest)>,
}

struct Switch {
    ports: Vec<Port>,
    stations: RwLock<HashMap<u64, usize, BuildHasherDefault<AddressHasher>>>,
}

/// Frames on their way, one after another.
#[derive(Default)]
struct Burst {
    bytes: Vec<u8>,
    /// Where each ends, and where it goes.
    frames: Vec<(usize, Target)>,
    heads: Vec<u16>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Port(usize),
    All,
}

fn queue_error(error: QueueError) -> io::Error {
    io::Error::other(error)
}

fn address(bytes: &[u8]) -> u64 {
    bytes.iter().take(6).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

impl Switch {
    /// Learns the source, gives where the frame goes. `last` spares the table for runs between the same two stations.
    fn decide(&self, from: usize, frame: &[u8], last: &mut Option<([u8; ADDRESSES], Target)>) -> Target {
        let addresses: [u8; ADDRESSES] = match frame.first_chunk() {
            Some(addresses) => *addresses,
            None => return Target::Port(from),
        };
        if let Some((known, target)) = last
            && *known == addresses
        {
            return *target;
        }
        let (to, source) = (address(&addresses), address(&addresses[6..]));
        let stations = self.stations.read().unwrap_or_else(PoisonError::into_inner);
        let is_known = stations.get(&source) == Some(&from);
        let target = stations.get(&to).map_or(Target::All, |port| Target::Port(*port));
        drop(stations);
        if !is_known && addresses[6] & 1 == 0 {
            self.stations.write().unwrap_or_else(PoisonError::into_inner).insert(source, from);
        }
        *last = Some((addresses, target));
        target
    }

    /// Takes frames out of a guest's ring, then hands them over; gives whether there may be more.
    fn forward(&self, from: usize, ring: &Vring, guest: &Guest, burst: &mut Burst) -> io::Result<bool> {
        let memory = guest.memory();
        let memory: &GuestMemoryMmap = &memory;
        let mut state = ring.get_mut();
        burst.bytes.clear();
        burst.frames.clear();
        burst.heads.clear();
        let mut last = None;
        for chain in state.get_queue_mut().iter(memory).map_err(queue_error)?.take(BURST) {
            burst.heads.push(chain.head_index());
            let start = burst.bytes.len();
            let mut reader = chain.reader(memory).map_err(queue_error)?;
            let end = start + reader.available_bytes();
            burst.bytes.resize(end, 0);
            reader.read_exact(&mut burst.bytes[start..end])?;
            let frame = burst.bytes[start..end].get(HEADER..).unwrap_or_default();
            burst.frames.push((end, self.decide(from, frame, &mut last)));
        }
        for port in (0..self.ports.len()).filter(|port| *port != from) {
            if burst.frames.iter().any(|(_, target)| *target == Target::All || *target == Target::Port(port)) {
                self.deliver(port, burst)?;
            }
        }
        for head in &burst.heads {
            state.add_used(*head, 0).map_err(queue_error)?;
        }
        if !burst.heads.is_empty() && state.needs_notification().map_err(queue_error)? {
            state.signal_used_queue()?;
        }
        Ok(burst.heads.len() == BURST)
    }

    /// Writes a burst's frames for a port into its guest's buffers, as long as there are any.
    fn deliver(&self, port: usize, burst: &Burst) -> io::Result<()> {
        let Some((ring, guest)) = self.ports[port].receiver.get() else {
            return Ok(());
        };
        let memory = guest.memory();
        let memory: &GuestMemoryMmap = &memory;
        let mut state = ring.get_mut();
        let mut start = 0;
        let mut written = false;
        for (end, target) in &burst.frames {
            let frame = &burst.bytes[start..*end];
            start = *end;
            if *target != Target::All && *target != Target::Port(port) {
                continue;
            }
            let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory) else {
                break;
            };
            let head = chain.head_index();
            let mut writer = chain.writer(memory).map_err(queue_error)?;
            let len = if writer.available_bytes() < frame.len() { 0 } else { frame.len() };
            writer.write_all(&frame[..len])?;
            state.add_used(head, len as u32).map_err(queue_error)?;
            written = true;
        }
        if written && state.needs_notification().map_err(queue_error)? {
            state.signal_used_queue()?;
        }
        Ok(())
    }
}

/// What the crate runs for one guest.
struct Backend {
    switch: Arc<Switch>,
    port: usize,
    guest: Guest,
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        32_768
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Guest) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        if usize::from(event) == TO_GUEST {
            // Whether the guest has given buffers is seen when there is something to write.
            let receiver = &vrings[TO_GUEST];
            let _ = receiver.disable_notification();
            self.switch.ports[self.port].receiver.get_or_init(|| (receiver.clone(), self.guest.clone()));
            return Ok(());
        }
        let ring = &vrings[FROM_GUEST];
        let mut burst = Burst::default();
        loop {
            ring.disable_notification().map_err(queue_error)?;
            while self.switch.forward(self.port, ring, &self.guest, &mut burst)? {}
            if !ring.enable_notification().map_err(queue_error)? {
                return Ok(());
            }
        }
    }
}

/// Connects to one guest, again and again.
fn serve(switch: &Arc<Switch>, port: usize, socket: &str, ended: &AtomicBool) -> Result<()> {
    let guest = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    while !ended.load(Ordering::Relaxed) {
        let backend = Arc::new(Backend { switch: switch.clone(), port, guest: guest.clone() });
        let mut daemon = VhostUserDaemon::new(format!("port{port}"), backend, guest.clone())
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        if daemon.start_client(socket).is_err() {
            thread::sleep(RETRY);
            continue;
        }
        // A guest that hangs up ends this program: it is there for one measurement.
        return match daemon.wait() {
            Ok(()) | Err(DaemonError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => {
                Ok(())
            }
            Err(error) => Err(anyhow::anyhow!("{error}")),
        };
    }
    Ok(())
}

fn run(arguments: &Arguments) -> Result<()> {
    let ports = arguments.sockets.iter().map(|_| Port::default()).collect();
    let switch = Arc::new(Switch { ports, stations: RwLock::default() });
    let ended = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let ends = arguments.sockets.iter().enumerate().map(|(port, socket)| {
            let (switch, ended) = (&switch, &ended);
            let path = socket.to_str().context("a socket's path is no text")?;
            Ok(scope.spawn(move || serve(switch, port, path, ended)))
        });
        let threads = ends.collect::<Result<Vec<_>>>()?;
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a thread has ended early"))??;
        }
        Ok(())
    })
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reference-switch: {error:#}");
            ExitCode::FAILURE
        }
    }
}
