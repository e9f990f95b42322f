//! A publisher that records, a guest's memory, and a frontend that listens like QEMU does.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use e2e::hostile::channel::{Channel, Listener};
use e2e::hostile::message::{Message, SET_LOG_BASE, SET_VRING_CALL, SET_VRING_KICK, numbers};
use rustix::net::sockopt::set_socket_linger;
use sluice::config::SocketMode;
use sluice::port::stats::PortStats;
use sluice::port::vhost::{Setup, VhostPort};
use sluice::port::{Link, Publisher};
use sluice::status::PortState;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// How long anything may take before a test gives up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// Where the guest's memory begins in the frontend's address space.
pub(crate) const UVA: u64 = 0x7f00_0000_0000;

/// Descriptors of each ring.
pub(crate) const RING_SIZE: u16 = 64;

/// Bytes between two rings.
const RING_STRIDE: u64 = 0x4000;

/// Tests that count descriptors run alone.
pub(crate) static ALONE: RwLock<()> = RwLock::new(());

/// Held by every other test.
pub(crate) fn shared() -> RwLockReadGuard<'static, ()> {
    ALONE.read().unwrap_or_else(PoisonError::into_inner)
}

/// What is kept of a published link. Not the link itself, which would keep memory mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) state: PortState,
    pub(crate) reason: String,
    pub(crate) rx: usize,
    pub(crate) tx: usize,
    /// What comes while there is no queue to send to is kept.
    pub(crate) holds: bool,
    pub(crate) features: Vec<&'static str>,
    pub(crate) memory: u64,
}

#[derive(Default)]
pub(crate) struct Recorder {
    seen: Mutex<Vec<Seen>>,
    last: Mutex<Option<Link>>,
    changed: Condvar,
    stats: Arc<PortStats>,
    pub(crate) forgotten: AtomicUsize,
    pub(crate) announced: Mutex<Vec<[u8; 6]>>,
}

impl Publisher for Recorder {
    fn publish(&self, link: Link) {
        let seen = Seen {
            state: link.state,
            reason: link.reason.clone().unwrap_or_default(),
            rx: link.rx.len(),
            tx: link.tx.len(),
            holds: link.hold.is_some(),
            features: link.features.clone(),
            memory: link.memory_bytes,
        };
        *self.last.lock().unwrap() = Some(link);
        self.seen.lock().unwrap().push(seen);
        self.changed.notify_all();
    }

    fn forget_stations(&self) {
        self.forgotten.fetch_add(1, Ordering::SeqCst);
    }

    fn announce(&self, mac: [u8; 6]) {
        self.announced.lock().unwrap().push(mac);
    }

    fn stats(&self) -> &Arc<PortStats> {
        &self.stats
    }
}

impl Recorder {
    /// The present, to wait from.
    pub(crate) fn mark(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// Everything published since.
    pub(crate) fn since(&self, mark: usize) -> Vec<Seen> {
        self.seen.lock().unwrap()[mark..].to_vec()
    }

    /// Waits for a link published since `mark`.
    pub(crate) fn wait_since(&self, mark: usize, what: &str, accept: impl Fn(&Seen) -> bool) -> Seen {
        let end = Instant::now() + DEADLINE;
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(found) = seen[mark.min(seen.len())..].iter().find(|seen| accept(seen)) {
                return found.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not come; published: {:#?}", &seen[mark.min(seen.len())..]);
            seen = self.changed.wait_timeout(seen, left).unwrap().0;
        }
    }

    /// Waits until the newest link is as wanted.
    pub(crate) fn wait(&self, what: &str, accept: impl Fn(&Seen) -> bool) -> Seen {
        let end = Instant::now() + DEADLINE;
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(last) = seen.last().filter(|last| accept(last)) {
                return last.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not come; the last is {:#?}", seen.last());
            seen = self.changed.wait_timeout(seen, left).unwrap().0;
        }
    }

    pub(crate) fn newest(&self) -> Seen {
        self.seen.lock().unwrap().last().cloned().unwrap()
    }

    pub(crate) fn connects(&self) -> u64 {
        self.stats.connects.load(Ordering::SeqCst)
    }
}

/// A port under test.
pub(crate) struct Bench {
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) path: PathBuf,
    pub(crate) port: Option<VhostPort>,
    _directory: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new(name: &str, mode: SocketMode) -> Self {
        Self::with_queues(name, mode, None)
    }

    pub(crate) fn with_queues(name: &str, mode: SocketMode, queues: Option<u16>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut bench = Self {
            recorder: Arc::default(),
            path: directory.path().join("vm.sock"),
            port: None,
            _directory: directory,
        };
        bench.start(name, mode, queues);
        bench
    }

    pub(crate) fn start(&mut self, name: &str, mode: SocketMode, queues: Option<u16>) {
        let (name, place, publisher) = (name.into(), self.path.clone().into(), self.recorder.clone());
        self.port = Some(VhostPort::start(Setup { name, place, mode, queues, mtu: None, publisher }).unwrap());
    }

    pub(crate) fn listen(&self) -> Qemu {
        Qemu::listen(&self.path)
    }

    /// Stops the port, which has to be prompt.
    pub(crate) fn stop(&mut self) {
        let port = self.port.take().unwrap();
        let (done, finished) = std::sync::mpsc::channel();
        thread::spawn(move || {
            port.stop();
            done.send(()).unwrap();
        });
        finished.recv_timeout(Duration::from_secs(1)).expect("the port did not stop within a second");
        assert_eq!(self.recorder.newest().state, PortState::Down);
        assert_eq!((self.recorder.newest().rx, self.recorder.newest().tx), (0, 0));
    }
}

/// The frontend's listening socket.
pub(crate) struct Qemu(Listener);

impl Qemu {
    pub(crate) fn listen(path: &Path) -> Self {
        Self(Listener::bind(path).unwrap())
    }

    pub(crate) fn accept(&self) -> Peer {
        Peer::over(self.0.accept().unwrap())
    }
}

/// Shared memory of a guest.
pub(crate) struct Guest {
    pub(crate) file: File,
    len: u64,
}

impl Guest {
    pub(crate) fn new(len: u64) -> Self {
        Self { file: memfd(len), len }
    }

    /// The whole of it as one region, so that guest address 0 is at [`UVA`].
    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        self.region_at(0, self.len)
    }

    pub(crate) fn region_at(&self, offset: u64, len: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: offset,
            memory_size: len,
            userspace_addr: UVA + offset,
            mmap_offset: offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

pub(crate) fn memfd(len: u64) -> File {
    e2e::hostile::memfd(len).unwrap()
}

pub(crate) fn ring_place(index: usize) -> VringConfigData {
    let base = UVA + index as u64 * RING_STRIDE;
    VringConfigData {
        queue_max_size: RING_SIZE,
        queue_size: RING_SIZE,
        flags: 0,
        desc_table_addr: base,
        avail_ring_addr: base + 0x1000,
        used_ring_addr: base + 0x2000,
        log_addr: None,
    }
}

/// Features as a Linux guest on QEMU accepts them.
pub(crate) const DRIVER: u64 = 1 << 32 | 1 << 30 | 1 << 28 | 1 << 29 | 1 << 15 | 1 << 22 | 0b11;

/// Writes to memory are logged (`VHOST_F_LOG_ALL`).
pub(crate) const LOG_ALL: u64 = 1 << 26;

/// Our end of a connection.
pub(crate) struct Peer {
    pub(crate) frontend: Frontend,
    pub(crate) channel: Channel,
}

impl Peer {
    pub(crate) fn over(channel: Channel) -> Self {
        Self { frontend: Frontend::from_stream(channel.stream.try_clone().unwrap(), 512), channel }
    }

    /// Negotiates the way QEMU does, and has every later message acknowledged.
    pub(crate) fn negotiate(&mut self) {
        let features = self.frontend.get_features().unwrap();
        assert_eq!(features & DRIVER, DRIVER);
        let offered = self.frontend.get_protocol_features().unwrap();
        self.frontend.set_protocol_features(offered).unwrap();
        self.frontend.set_owner().unwrap();
        self.frontend.set_features(DRIVER).unwrap();
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    pub(crate) fn start_ring(&self, index: usize) {
        self.frontend.set_vring_num(index, RING_SIZE).unwrap();
        self.frontend.set_vring_base(index, 0).unwrap();
        self.frontend.set_vring_addr(index, &ring_place(index)).unwrap();
        self.wire(SET_VRING_KICK, index);
        self.wire(SET_VRING_CALL, index);
    }

    /// Gives a ring a descriptor in the way of QEMU, which lets the index wrap at 256. (The crate's frontend does not,
    /// and so sets the bit that says that there is no descriptor.)
    fn wire(&self, request: u32, index: usize) {
        let event = EventFd::new(0).unwrap();
        self.raw(request, 0x1, &(index as u64 & 0xff).to_ne_bytes(), &[event.as_raw_fd()]);
        self.settle();
    }

    pub(crate) fn start_pair(&mut self, pair: usize) {
        for index in [2 * pair, 2 * pair + 1] {
            self.frontend.set_vring_enable(index, true).unwrap();
            self.start_ring(index);
        }
    }

    /// Everything up to a running queue pair.
    pub(crate) fn bring_up(&mut self, guest: &Guest) {
        self.negotiate();
        self.frontend.set_mem_table(&[guest.region()]).unwrap();
        self.start_pair(0);
    }

    /// Sends a message exactly as given. The other side may have gone already.
    pub(crate) fn raw(&self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        self.channel.send(&Message::new(request, payload.to_vec()).flags(flags).with(fds));
    }

    /// Sends bytes. `false` if that was not possible.
    pub(crate) fn bytes(&self, bytes: &[u8], fds: &[RawFd]) -> bool {
        self.channel.bytes(bytes, fds).is_ok_and(|count| count > 0)
    }

    /// Reads a reply to `request` that carries a number.
    pub(crate) fn reply(&mut self, request: u32) -> u64 {
        u64::from_ne_bytes(self.channel.answer(request).unwrap().try_into().unwrap())
    }

    /// Gives a dirty log of `size` bytes, and reads the reply.
    pub(crate) fn set_log(&mut self, log: &File, size: u64) {
        let message = Message::new(SET_LOG_BASE, numbers(&[size, 0])).with(&[log.as_raw_fd()]);
        assert_eq!(self.channel.ask(&message).unwrap().len(), 16);
    }

    /// Waits until everything sent so far has been handled.
    pub(crate) fn settle(&self) {
        self.frontend.get_features().unwrap();
    }

    /// Waits until the other side has closed the connection.
    pub(crate) fn wait_closed(&mut self) {
        self.channel.wait_closed().unwrap();
    }
}

/// Protocol features that the port has to offer.
pub(crate) fn expected_protocol() -> VhostUserProtocolFeatures {
    use VhostUserProtocolFeatures as P;
    P::MQ | P::REPLY_ACK | P::MTU | P::RESET_DEVICE | P::CONFIGURE_MEM_SLOTS | P::STATUS | P::LOG_SHMFD | P::RARP
}

/// A socket whose last `close` waits for some seconds, since what it has sent is not read, and the other end. Not for ever: a
/// process that another test starts at that moment may be the last one to close it.
pub(crate) fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    // Until there is room for nothing more, neither here nor there.
    while socket.write(&[0; 1 << 16]).is_ok() || {
        thread::sleep(Duration::from_millis(20));
        socket.write(&[0; 1 << 16]).is_ok()
    } {}
    set_socket_linger(&socket, Some(DEADLINE * 8 / 10)).unwrap();
    (socket, listener.accept().unwrap().0)
}

/// Sends such a socket within another one, so that the port's thread of that process waits for it. Returns what keeps it
/// waiting.
pub(crate) fn wedge(qemu: &Qemu, pid: u32, thread: &str) -> (Peer, TcpStream) {
    // We, or a process that another test starts, may be the last one to close the socket: then once more.
    for _ in 0..10 {
        let peer = qemu.accept();
        let end = send_hidden(&peer);
        let closes = || Ok(is_closing(pid, thread));
        if e2e::wait::until_true("the thread to wait", Duration::from_secs(1), closes).is_ok() {
            return (peer, end);
        }
    }
    panic!("nothing makes {thread} wait");
}

fn send_hidden(peer: &Peer) -> TcpStream {
    let (socket, end) = lingering();
    let (inner, outer) = UnixStream::pair().unwrap();
    Channel::new(outer).unwrap().bytes(&[0], &[socket.as_raw_fd()]).unwrap();
    drop(socket);
    let channel = Channel::new(peer.channel.stream.try_clone().unwrap()).unwrap();
    // Should the port be quicker, it is this thread that waits, until the other end goes.
    thread::spawn(move || {
        channel.send(&Message::number(SET_VRING_KICK, 0).with(&[inner.as_raw_fd()]));
        drop(inner);
    });
    end
}

/// Whether a thread is in the midst of closing a descriptor, and is so still a moment later.
fn is_closing(pid: u32, name: &str) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().map(|task| task.path());
    let read = |task: &Path, file| std::fs::read_to_string(task.join(file)).unwrap_or_default();
    let closes = |task: &Path| read(task, "syscall").starts_with(&format!("{} ", libc::SYS_close));
    tasks.filter(|task| read(task, "comm").trim() == name).any(|task| {
        closes(&task) && {
            thread::sleep(Duration::from_millis(20));
            closes(&task)
        }
    })
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
