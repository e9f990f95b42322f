//! Raw Ethernet frames with checkable content: send them, and record what arrives.

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Answer, fill, is_filled, number, sizes, text};

/// "Local experimental" (IEEE 802): nobody else sends it.
const ETHERTYPE: u16 = 0x88b5;
const ETHERNET: usize = 14;
/// Stream, sequence number and untagged length of the frame follow the Ethernet header.
const HEADER: usize = ETHERNET + 12;
const LARGEST: usize = 65_536;

/// Sends one frame per size: `{dev, dst, src, stream, first, sizes, vlan?}`.
pub(crate) fn send(request: &Value) -> Answer {
    let socket = Packet::open(text(request, "dev")?)?;
    let (stream, first) = (number(request, "stream")? as u32, number(request, "first")? as u32);
    let mut addresses = mac(text(request, "dst")?)?;
    addresses.extend(mac(text(request, "src")?)?);
    let tag: Vec<u8> = match request["vlan"].as_u64() {
        Some(vlan) => [0x8100_u16.to_be_bytes(), (vlan as u16).to_be_bytes()].concat(),
        None => Vec::new(),
    };
    for (sequence, size) in (first..).zip(sizes(request)?) {
        let mut frame = vec![0; size.max(HEADER)];
        frame[..12].copy_from_slice(&addresses);
        frame[12..ETHERNET].copy_from_slice(&ETHERTYPE.to_be_bytes());
        let words = [stream, sequence, frame.len() as u32].map(u32::to_be_bytes).concat();
        frame[ETHERNET..HEADER].copy_from_slice(&words);
        fill(&mut frame[HEADER..], stream, sequence);
        frame.splice(12..12, tag.iter().copied());
        socket.send(&frame)?;
    }
    Ok(json!({}))
}

fn mac(text: &str) -> Result<Vec<u8>, String> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes.filter(|bytes| bytes.len() == 6).ok_or_else(|| format!("{text} is no MAC address"))
}

/// What has arrived of one stream on one interface.
#[derive(Default)]
struct Record {
    sequences: BTreeSet<u32>,
    received: u64,
    corrupt: u64,
    vlans: BTreeSet<u16>,
}

/// Records by interface and stream.
#[derive(Default)]
pub(crate) struct Watches(BTreeMap<(String, u32), Arc<Mutex<Record>>>);

impl Watches {
    /// Starts recording, from nothing: `{dev, stream}`.
    pub(crate) fn start(&mut self, request: &Value) -> Answer {
        let (dev, stream) = (text(request, "dev")?.to_owned(), number(request, "stream")? as u32);
        let key = (dev.clone(), stream);
        if let Some(known) = self.0.get(&key) {
            *known.lock().unwrap_or_else(PoisonError::into_inner) = Record::default();
            return Ok(json!({}));
        }
        let socket = Packet::open(&dev)?;
        socket.receive_all()?;
        let record = Arc::new(Mutex::new(Record::default()));
        self.0.insert(key, Arc::clone(&record));
        std::thread::spawn(move || watch(&socket, stream, &record));
        Ok(json!({}))
    }

    /// What has been recorded so far: `{dev, stream}`.
    pub(crate) fn seen(&self, request: &Value) -> Answer {
        let key = (text(request, "dev")?.to_owned(), number(request, "stream")? as u32);
        let record = self.0.get(&key).ok_or("nobody watches this stream")?;
        let record = record.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(json!({
            "received": record.received,
            "distinct": record.sequences.len(),
            "corrupt": record.corrupt,
            "vlans": record.vlans,
        }))
    }
}

fn watch(socket: &Packet, stream: u32, record: &Mutex<Record>) {
    let mut buffer = vec![0; LARGEST];
    loop {
        let Ok((length, vlan)) = socket.receive(&mut buffer) else {
            continue;
        };
        let frame = &buffer[..length];
        let word = |at: usize| frame[at..at + 4].iter().fold(0, |word, &byte| word << 8 | u32::from(byte));
        if frame.len() < HEADER || frame[12..ETHERNET] != ETHERTYPE.to_be_bytes() || word(ETHERNET) != stream {
            continue;
        }
        let sequence = word(ETHERNET + 4);
        let whole = word(ETHERNET + 8) as usize == frame.len() && is_filled(&frame[HEADER..], stream, sequence);
        let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
        record.received += 1;
        record.sequences.insert(sequence);
        record.corrupt += u64::from(!whole);
        record.vlans.extend(vlan);
    }
}

/// A packet socket on one interface.
struct Packet {
    fd: OwnedFd,
    interface: i32,
}

impl Packet {
    /// Opens without a protocol, so that it can send and receives nothing yet.
    fn open(dev: &str) -> io::Result<Self> {
        let name = CString::new(dev)?;
        // SAFETY: `name` is a C string that lives through the call.
        let interface = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        if interface == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: no pointers; the descriptor is checked and owned from here on.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        check(fd as isize)?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let socket = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, interface };
        socket.bind(0)?;
        Ok(socket)
    }

    fn bind(&self, protocol: u16) -> io::Result<()> {
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = self.interface;
        let size = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address lives through the call and its size is given.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), size) } as isize)?;
        Ok(())
    }

    /// Receives frames to anybody, and their VLAN tags; a large buffer, for losses here are not the switch's.
    fn receive_all(&self) -> io::Result<()> {
        self.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(32 << 20))?;
        self.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1)?;
        let membership = libc::packet_mreq {
            mr_ifindex: self.interface,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        self.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
        self.bind(libc::ETH_P_ALL as u16)
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let (fd, size) = (self.fd.as_raw_fd(), size_of::<T>() as u32);
        // SAFETY: the value lives through the call and its size is given.
        let result = unsafe { libc::setsockopt(fd, level, option, (&raw const *value).cast(), size) };
        check(result as isize).map(drop)
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame lives through the call and its length is given.
        check(unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) })?;
        Ok(())
    }

    /// The next frame's length, and its VLAN if it came with a tag (which the kernel has taken off).
    /// Frames that this machine sends do not count.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Option<u16>)> {
        #[repr(align(8))]
        struct Control([u8; 64]);
        let mut control = Control([0; 64]);
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: all-zero is a valid value of both.
        let (mut message, mut from) =
            unsafe { (std::mem::zeroed::<libc::msghdr>(), std::mem::zeroed::<libc::sockaddr_ll>()) };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len();
        // SAFETY: all that the message points to lives through the call, with its size.
        let length = check(unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, 0) })? as usize;
        if from.sll_pkttype == libc::PACKET_OUTGOING {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok((length, vlan_of(&message)))
    }
}

fn vlan_of(message: &libc::msghdr) -> Option<u16> {
    // SAFETY: the message was filled by recvmsg; the macro gives null or a header inside the control buffer,
    // whose payload is the auxdata if level and type say so.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(message).as_ref()?;
        if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            return None;
        }
        let data: libc::tpacket_auxdata = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast());
        let valid = data.tp_status & libc::TP_STATUS_VLAN_VALID != 0;
        valid.then_some(data.tp_vlan_tci & 0x0fff)
    }
}

fn check(result: isize) -> io::Result<isize> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
