//! A virtual machine: a frontend, two rings, and frames that can be told apart and checked.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};

use crate::driver::{HEADER, Kind, Memory, Ring, SLOTS, SPARE};

const UVA: u64 = 0x7f00_0000_0000;
const PATIENCE: Duration = Duration::from_secs(20);
/// Writes to memory are logged (`VHOST_F_LOG_ALL`).
const LOG_ALL: u64 = 1 << 26;
/// Frames under way at once, so that no ring ever overflows.
const WINDOW: u64 = 96;

/// What has not come for that long is lost: every sender finds that out in the end.
const GIVE_UP: Duration = Duration::from_millis(100);

/// How the switch is reached.
pub(crate) enum Socket {
    /// The machine listens, as QEMU does.
    Listens(UnixListener),
    /// The switch listens.
    Connects,
}

/// One virtual machine.
pub(crate) struct Station {
    pub(crate) number: u8,
    kind: Kind,
    memory: Rc<Memory>,
    socket: Socket,
    frontend: Option<Frontend>,
    rx: Ring,
    tx: Ring,
    pub(crate) sent: u64,
    /// Frames before this are not waited for any more.
    given_up: u64,
    /// How long they are waited for: [`GIVE_UP`] unless told.
    pub(crate) patience: Duration,
    /// The next frame that is expected of the other one, and those that did not come.
    pub(crate) expected: u64,
    pub(crate) lost: u64,
    pub(crate) duplicates: u64,
    /// The last time something came, and the longest time in which nothing did.
    last: Instant,
    pub(crate) gap: Duration,
    /// The same for its sender, which begins anew.
    silent: Instant,
}

fn connect(path: &Path) -> UnixStream {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "cannot connect: {error}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

impl Station {
    pub(crate) fn new(number: u8, kind: Kind, path: &Path, listens: bool) -> Self {
        let memory = Memory::new();
        let socket = if listens {
            let listener = UnixListener::bind(path).unwrap();
            listener.set_nonblocking(true).unwrap();
            Socket::Listens(listener)
        } else {
            Socket::Connects
        };
        let mut rx = Ring::new(&memory, 0, kind);
        while rx.give(None) {}
        let tx = Ring::new(&memory, 1, kind);
        let (sent, given_up, expected, lost, duplicates) = (0, 0, 0, 0, 0);
        let (last, gap, silent) = (Instant::now(), Duration::ZERO, Instant::now());
        Self {
            number,
            kind,
            memory,
            socket,
            frontend: None,
            rx,
            tx,
            sent,
            given_up,
            patience: GIVE_UP,
            expected,
            lost,
            duplicates,
            last,
            gap,
            silent,
        }
    }

    /// Lets the switch connect (again), and tells it what a frontend does; of where the rings stand, what one that has lost
    /// its backend knows.
    pub(crate) fn connect(&mut self, path: &Path) {
        self.frontend = None;
        let stream = match &self.socket {
            Socket::Connects => connect(path),
            Socket::Listens(listener) => {
                let end = Instant::now() + PATIENCE;
                loop {
                    match listener.accept() {
                        Ok((stream, _)) => break stream,
                        Err(error) => assert!(Instant::now() < end, "nobody connects: {error}"),
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            }
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frontend = Frontend::from_stream(stream, 2);
        let offered = frontend.get_features().unwrap();
        let wanted = self.wanted();
        assert_eq!(offered & wanted, wanted);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_owner().unwrap();
        frontend.set_features(wanted).unwrap();
        frontend.set_mem_table(&[region(&self.memory.file, self.memory.len)]).unwrap();
        for (index, ring) in [(0, &self.rx), (1, &self.tx)] {
            frontend.set_vring_num(index, SLOTS).unwrap();
            base(&frontend, index as u32, ring.stale_base());
            frontend.set_vring_addr(index, &config(ring.areas(), false)).unwrap();
            frontend.set_vring_kick(index, &ring.kick).unwrap();
            frontend.set_vring_call(index, &ring.call).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
        // Answered once all of that has been done.
        frontend.get_features().unwrap();
        self.frontend = Some(frontend);
        self.last = Instant::now();
    }

    /// Features that the driver accepts.
    fn wanted(&self) -> u64 {
        let layout = if self.kind.packed { 1 << 34 } else { 0 } | if self.kind.event_idx { 1 << 29 } else { 0 };
        1 << 32 | 1 << 30 | 1 << 15 | 1 << 28 | layout
    }

    /// Changes what a frontend may while frames flow: how either side is notified, the dirty log, where writes to it are
    /// logged, the memory table, a memory slot. For another thread.
    pub(crate) fn changes(&self) -> impl FnMut() + Send + use<> {
        let mut frontend = self.frontend.clone().unwrap();
        let rings = [&self.rx, &self.tx]
            .map(|ring| (ring.kick.try_clone().unwrap(), ring.call.try_clone().unwrap(), ring.areas()));
        let (memory, len, wanted) = (self.memory.file.try_clone().unwrap(), self.memory.len, self.wanted());
        let (log, slot) = (e2e::hostile::memfd(4096).unwrap(), e2e::hostile::memfd(4096).unwrap());
        move || {
            let mut more = region(&slot, 4096);
            (more.guest_phys_addr, more.userspace_addr) = (1 << 30, UVA + (1 << 30));
            for (index, (kick, call, _)) in rings.iter().enumerate() {
                frontend.set_vring_kick(index, kick).unwrap();
                frontend.set_vring_call(index, call).unwrap();
            }
            let dirty = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
            frontend.set_log_base(0, Some(dirty)).unwrap();
            frontend.set_features(wanted | LOG_ALL).unwrap();
            for logged in [true, false] {
                for (index, (.., areas)) in rings.iter().enumerate() {
                    frontend.set_vring_addr(index, &config(*areas, logged)).unwrap();
                }
            }
            frontend.set_features(wanted).unwrap();
            frontend.add_mem_region(&more).unwrap();
            frontend.remove_mem_region(&more).unwrap();
            frontend.set_mem_table(&[region(&memory, len)]).unwrap();
            // Answered once all of that has been done.
            frontend.get_features().unwrap();
        }
    }

    /// Asks something of the switch over the connection.
    pub(crate) fn features(&self) -> u64 {
        self.frontend.as_ref().unwrap().get_features().unwrap()
    }

    /// Takes memory away that nobody uses.
    pub(crate) fn shorten_memory(&self) {
        self.memory.file.set_len((self.memory.len - SPARE) as u64).unwrap();
    }

    /// Seals its memory, so that it can be mapped for writing no more.
    pub(crate) fn seal_memory(&self) {
        // SAFETY: plain flags on a descriptor that is open.
        let done = unsafe { libc::fcntl(self.memory.file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE) };
        assert_eq!(done, 0);
    }

    /// Whether the switch has closed the connection.
    pub(crate) fn is_hung_up(&self) -> bool {
        let mut polled =
            libc::pollfd { fd: self.frontend.as_ref().unwrap().as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one local, as the length says.
        unsafe { libc::poll(&mut polled, 1, 1000) == 1 && polled.revents & libc::POLLRDHUP != 0 }
    }

    /// Where the switch says that a ring stands; it stops then.
    pub(crate) fn stop_ring(&self, index: usize) -> u32 {
        self.frontend.as_ref().unwrap().get_vring_base(index).unwrap()
    }

    /// Sends what the window has room for.
    pub(crate) fn pump(&mut self, other: &mut Self) {
        while self.tx.take().is_some() {}
        let mut count = 0;
        // Those of a whole window may be gone, and nothing would ever be sent again.
        if self.sent > other.expected && other.silent.elapsed() > self.patience {
            (self.given_up, other.silent) = (self.sent, Instant::now());
        }
        while self.sent - other.expected.max(self.given_up) < WINDOW && count < 16 && self.tx.outstanding() < 100 {
            if !self.tx.give(Some(&frame(self.number, other.number, self.sent))) {
                break;
            }
            self.sent += 1;
            count += 1;
        }
        if count > 0 {
            self.tx.notify();
        }
        other.receive();
    }

    /// Takes what has come.
    pub(crate) fn receive(&mut self) {
        let mut came = false;
        while let Some((at, len)) = self.rx.take() {
            assert!(len >= HEADER + 60, "a frame of {len} bytes");
            let bytes = self.memory.bytes(at + HEADER, len - HEADER);
            let number = u64::from_le_bytes(bytes[14..22].try_into().unwrap());
            let sender = bytes[11];
            assert_eq!(bytes, frame(sender, self.number, number), "frame {number} is corrupt");
            if number < self.expected {
                self.duplicates += 1;
            } else {
                self.lost += number - self.expected;
                self.expected = number + 1;
            }
            came = true;
            assert!(self.rx.give(None));
        }
        if came {
            self.gap = self.gap.max(self.last.elapsed());
            (self.last, self.silent) = (Instant::now(), Instant::now());
            self.rx.notify();
        }
    }

    /// Chains that the switch has of each ring.
    pub(crate) fn rings(&self) -> [usize; 2] {
        [self.rx.outstanding(), self.tx.outstanding()]
    }

    /// Measures gaps anew.
    pub(crate) fn reset_gap(&mut self) {
        self.last = Instant::now();
        self.gap = Duration::ZERO;
    }
}

/// Where a ring lies, by the offsets of its areas, and whether writes to it are logged.
fn config([desc, avail, used]: [u64; 3], logged: bool) -> VringConfigData {
    VringConfigData {
        queue_max_size: SLOTS,
        queue_size: SLOTS,
        flags: u32::from(logged),
        desc_table_addr: UVA + desc,
        avail_ring_addr: UVA + avail,
        used_ring_addr: UVA + used,
        log_addr: logged.then_some(used),
    }
}

/// The whole of a guest's memory.
fn region(file: &File, len: usize) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: len as u64,
        userspace_addr: UVA,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn base(frontend: &Frontend, index: u32, base: u32) {
    // The crate takes 16 bits only.
    let mut bytes = Vec::new();
    for word in [10u32, 1, 8, index, base] {
        bytes.extend(word.to_ne_bytes());
    }
    // SAFETY: the bytes are a local of the length given.
    let sent = unsafe { libc::send(frontend.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
    assert_eq!(sent, bytes.len() as isize);
}

/// A frame whose length and content follow from its number; one in 16 goes to all.
fn frame(from: u8, to: u8, number: u64) -> Vec<u8> {
    let to = if number % 16 == 15 { [0xff; 6] } else { [2, 0, 0, 0, 0, to] };
    let mut bytes = to.to_vec();
    bytes.extend([2, 0, 0, 0, 0, from, 0x88, 0xb5]);
    bytes.extend(number.to_le_bytes());
    let len = 60 + (number.wrapping_mul(0x9e37_79b9) % 1300) as usize;
    let byte = |at: usize| (number as usize).wrapping_mul(31).wrapping_add(at) as u8;
    bytes.extend((bytes.len()..len).map(byte));
    bytes
}
