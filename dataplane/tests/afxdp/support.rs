//! Network namespaces that vanish, hosts in them, and an ear on the wire.

use std::fs::File;
use std::io::{Error, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sluice::config::SwitchConfig;
use sluice::status::{PortState, PortStatus};
use sluice::switch::Switch;

/// How long anything may take before a test gives up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// The tests share two CPUs with the kernel's side of the wire; one at a time keeps their deadlines honest.
static ALONE: Mutex<()> = Mutex::new(());

pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A network namespace of its own. It goes, with all interfaces in it, when nothing refers to it any more, however a
/// test ends.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let made = std::thread::spawn(|| {
            // SAFETY: no pointers are passed; it changes this thread only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "these tests run as root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = Self { file: made.join().unwrap() };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs something in it. Threads and processes that it starts stay in it.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: no pointers are passed; it changes this thread only.
                assert_eq!(unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a command in it, and returns whether it succeeded, with what it said.
    pub(crate) fn try_command(&self, program: &str, arguments: &str) -> (bool, String) {
        let output = self.run(|| Command::new(program).args(arguments.split_whitespace()).output().unwrap());
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    }

    pub(crate) fn command(&self, program: &str, arguments: &str) -> String {
        let (done, text) = self.try_command(program, arguments);
        assert!(done, "{program} {arguments}: {text}");
        text
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.command("ip", arguments)
    }

    /// A path to it, for other commands.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Joins two namespaces by a wire: a veth pair without the offloads that a wire does not have either.
    pub(crate) fn wire(&self, name: &str, other: &Self, other_name: &str) {
        let queues = "numtxqueues 2 numrxqueues 2";
        self.ip(&format!("link add {name} {queues} type veth peer name {other_name} {queues} netns {}", other.path()));
        for (namespace, name) in [(self, name), (other, other_name)] {
            namespace.ip(&format!("link set {name} addrgenmode none up"));
            namespace.command("ethtool", &format!("-K {name} tx off txvlan off tx-vlan-stag-hw-insert off gro off"));
        }
    }

    /// Gives an interface addresses: 10.9.0.HOST and fd09::HOST.
    pub(crate) fn address(&self, interface: &str, host: u8) {
        self.ip(&format!("addr add 10.9.0.{host}/24 dev {interface}"));
        self.ip(&format!("addr add fd09::{host}/64 dev {interface} nodad"));
    }

    /// Whether a host answers to echo requests with `size` bytes of data, on its IPv4 and its IPv6 address.
    pub(crate) fn ping(&self, host: u8, size: usize) -> bool {
        self.run(|| echo(&format!("10.9.0.{host}:0"), size) && echo(&format!("[fd09::{host}]:0"), size))
    }

    /// A counter of the kernel's stack, such as `TcpInCsumErrors`.
    pub(crate) fn counter(&self, group: &str, name: &str) -> u64 {
        let text = self.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
        let mut lines = text.lines().filter(|line| line.starts_with(group));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let place = names.split(' ').position(|known| known == name).unwrap();
        values.split(' ').nth(place).unwrap().parse().unwrap()
    }
}

/// A switch in a namespace.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) namespace: Arc<Namespace>,
    pub(crate) switch: Arc<Switch>,
}

impl Host {
    pub(crate) fn new(ports: &[&str]) -> Self {
        let namespace = Arc::new(Namespace::new());
        let switch = namespace.run(|| Switch::start(&SwitchConfig::default()).unwrap());
        let host = Self { namespace, switch };
        for port in ports {
            host.add(port).unwrap();
        }
        host
    }

    pub(crate) fn add(&self, spec: &str) -> Result<(), String> {
        self.namespace.run(|| self.switch.add_port(spec.parse().unwrap()).map_err(|e| e.to_string()))
    }

    pub(crate) fn port(&self, name: &str) -> PortStatus {
        self.switch.port(name).unwrap()
    }

    pub(crate) fn wait_for(&self, name: &str, state: PortState) {
        within(&format!("{name} becomes {state:?}"), || self.port(name).state == state);
    }
}

/// Waits until something is so.
pub(crate) fn within(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends an echo request and waits for the reply.
fn echo(address: &str, size: usize) -> bool {
    let address: SocketAddr = address.parse().unwrap();
    let (family, protocol, request, reply) = match address {
        SocketAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0),
        SocketAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129),
    };
    // SAFETY: no pointers are passed, and the descriptor that comes back is ours alone. Sending to and receiving from
    // an address are the same for a raw socket as for one of UDP.
    let socket = unsafe { UdpSocket::from_raw_fd(libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol)) };
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut message = vec![request, 0, 0, 0, 0x51, 0x1c, 0, 1];
    message.extend((0..size).map(pattern));
    if address.is_ipv4() {
        let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&message).ones_complement();
        message[2..4].copy_from_slice(&sum.to_ne_bytes());
    }
    if socket.send_to(&message, address).is_err() {
        return false;
    }
    let mut buffer = vec![0; 70_000];
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        let Ok((count, _)) = socket.recv_from(&mut buffer) else { return false };
        // IPv4 delivers the IP header too.
        let answer = &buffer[if address.is_ipv4() { 20 } else { 0 }..count];
        if answer[0] == reply && answer[4..] == message[4..] {
            return true;
        }
    }
    false
}

/// Bytes that show where they belong.
fn pattern(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

/// Sends `count` bytes over TCP from one namespace to an address in another, checks them, and returns Gbit/s.
pub(crate) fn stream(from: &Namespace, to: &Namespace, address: &str, count: usize) -> f64 {
    let listener = to.run(|| TcpListener::bind(address).unwrap());
    let address: SocketAddr = listener.local_addr().unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut buffer = vec![0; 256 << 10];
            let mut at = 0;
            loop {
                let read = stream.read(&mut buffer).unwrap();
                if read == 0 {
                    return at;
                }
                for (offset, byte) in buffer[..read].iter().enumerate() {
                    assert_eq!(*byte, pattern(at + offset), "byte {} of the stream", at + offset);
                }
                at += read;
            }
        });
        let mut stream = from.run(|| TcpStream::connect_timeout(&address, DEADLINE).unwrap());
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        let block: Vec<u8> = (0..1 << 24).map(pattern).collect();
        let mut left = count;
        while left > 0 {
            let part = left.min(block.len());
            stream.write_all(&block[..part]).unwrap();
            left -= part;
        }
        drop(stream);
        assert_eq!(receiver.join().unwrap(), count);
    });
    count as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9
}

/// A frame as it was on the wire.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    /// Without its outermost tag.
    pub(crate) bytes: Vec<u8>,
    pub(crate) vlan: Option<u16>,
    /// Ethertype of that tag.
    tag_type: u16,
}

impl Heard {
    /// The frame with its tag.
    pub(crate) fn tagged(self) -> Vec<u8> {
        let Some(tci) = self.vlan else { return self.bytes };
        let mut bytes = [&[0; 4][..], &self.bytes].concat();
        let start = sluice::wire::insert_tag(&mut bytes, 4, tci).expect("room for a tag");
        let mut bytes = bytes.split_off(start);
        bytes[12..14].copy_from_slice(&self.tag_type.to_be_bytes());
        bytes
    }
}

/// Listens to what an interface receives.
#[derive(Debug)]
pub(crate) struct Ear {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Heard>>>,
}

impl Ear {
    pub(crate) fn new(namespace: &Namespace, interface: &str) -> Self {
        let socket = namespace.run(|| packet_socket(interface));
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut heard = Vec::new();
            while !ended.load(Ordering::Acquire) {
                heard.extend(std::iter::from_fn(|| hear(&socket)));
                std::thread::sleep(Duration::from_millis(1));
            }
            heard
        });
        Self { stop, thread: Some(thread) }
    }

    /// All frames so far.
    pub(crate) fn finish(mut self) -> Vec<Heard> {
        std::thread::sleep(Duration::from_millis(50));
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// A packet socket on an interface, for all protocols.
pub(crate) fn packet_socket(interface: &str) -> OwnedFd {
    try_packet_socket(interface).expect("the interface")
}

/// [`packet_socket`], if the interface is there.
pub(crate) fn try_packet_socket(interface: &str) -> Option<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: the name is terminated, the address a local of the length given, the options are ints.
    unsafe {
        let fd =
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, i32::from(all));
        assert!(fd >= 0, "{}", Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        for (option, value) in [(libc::PACKET_AUXDATA, 1i32), (libc::PACKET_IGNORE_OUTGOING, 1)] {
            let len = size_of::<i32>() as u32;
            assert_eq!(libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const value).cast(), len), 0);
        }
        let (buffer, len) = (64i32 << 20, size_of::<i32>() as u32);
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (&raw const buffer).cast(), len);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        // Zero would be all of them.
        if address.sll_ifindex == 0 {
            return None;
        }
        (libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) == 0).then_some(socket)
    }
}

/// The next frame, if one is there.
pub(crate) fn hear(socket: &OwnedFd) -> Option<Heard> {
    #[repr(C, align(8))]
    struct Control([u8; 128]);
    let mut bytes = vec![0u8; 70_000];
    let mut control = Control([0; 128]);
    let mut piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the kernel writes to locals of the lengths given, and the control messages are walked as it left them.
    let (count, vlan, tag_type) = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        let count = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        if count < 0 {
            return None;
        }
        let (mut vlan, mut tag_type) = (None, 0);
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_PACKET && (*header).cmsg_type == libc::PACKET_AUXDATA {
                let auxiliary: libc::tpacket_auxdata = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast());
                let is_tagged = auxiliary.tp_status & libc::TP_STATUS_VLAN_VALID != 0;
                (vlan, tag_type) = (is_tagged.then_some(auxiliary.tp_vlan_tci), auxiliary.tp_vlan_tpid);
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        (count as usize, vlan, tag_type)
    };
    bytes.truncate(count);
    Some(Heard { bytes, vlan, tag_type })
}

/// Checks with an independent parser that an IP frame's lengths and checksums are right.
pub(crate) fn check_frame(heard: &Heard, mtu: usize) {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    assert!(heard.bytes.len() <= mtu + 14, "{} bytes on a wire of MTU {mtu}", heard.bytes.len());
    let packet = SlicedPacket::from_ethernet(&heard.bytes).expect("a frame that can be parsed");
    let Some(net) = packet.net else { return };
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return };
    let sum = match net {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap()
        }
        NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap(),
        NetSlice::Arp(_) => return,
    };
    // Zero and 0xffff are the same number to TCP.
    assert_eq!(tcp.checksum() % 0xffff, sum % 0xffff);
}

/// Sends broadcasts and frames to nobody in particular, all marked with `mark`, until it is dropped. Interfaces may come
/// and go.
#[derive(Debug)]
pub(crate) struct Mouth {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mouth {
    pub(crate) fn new(namespace: &Arc<Namespace>, interface: &'static str, mark: u8) -> Self {
        let (stop, namespace) = (Arc::new(AtomicBool::new(false)), namespace.clone());
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let frames = [0xff, 0x02].map(|first| {
                let mut frame = vec![mark; 100];
                frame[..14].copy_from_slice(&[first, 255, 255, 255, 255, 255, 2, 0, 0, 0, 9, mark, 0x88, 0xb5]);
                frame
            });
            while !ended.load(Ordering::Acquire) {
                let Some(socket) = namespace.run(|| try_packet_socket(interface)) else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                // Until the interface is gone or down.
                let send = |frame: &Vec<u8>| {
                    // SAFETY: the kernel reads the frame, of the length given.
                    unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) > 0 }
                };
                while !ended.load(Ordering::Acquire) && frames.iter().all(send) {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Mouth {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
