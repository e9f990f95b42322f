//! An AF_XDP socket and its rings (Documentation/networking/af_xdp.rst, `linux/if_xdp.h`).

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::mapping::Mapping;
use super::ring::{Consumer, Offsets, Producer};
use super::umem::{CHUNK, METADATA, Umem};
use crate::port::check;

/// Entries of each ring, and frames of each direction.
pub(super) const RING: u32 = 2048;

/// `XDP_MAX_TX_SKB_BUDGET`: frames sent by one system call where the kernel makes socket buffers of them.
const MAX_TX_SKB_BUDGET: libc::c_int = 9;
/// Bytes that the kernel may have in socket buffers for one queue: a ring full of frames with what it keeps about each.
/// With its usual bound of some hundred, frames would wait in the ring for a call that may never come.
const SEND_BUFFER: libc::c_int = RING as libc::c_int * 2 * CHUNK as libc::c_int;
/// Microseconds that one system call polls the driver with `busy-poll=on`.
const BUSY_POLL_US: libc::c_int = 20;
/// Frames that it takes at most.
const BUSY_POLL_BUDGET: libc::c_int = 64;

/// How a socket gets at frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// The driver uses our frames itself.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

/// What came of asking the kernel to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kick {
    /// It has nothing left to send, or cannot at all.
    Done,
    /// It wants to be asked again: it sends so many at a time, or something was busy or short for the moment.
    More,
    /// It wants to be asked again. The last frame that it took it has dropped, where it copies: the driver did not want
    /// it (`NET_XMIT_DROP`).
    Refused,
}

/// An open socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

/// The rings of a socket.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) fill: Producer<u64>,
    pub(super) rx: Consumer<libc::xdp_desc>,
    pub(super) tx: Producer<libc::xdp_desc>,
    pub(super) completion: Consumer<u64>,
}

impl Socket {
    /// Opens a socket over a pool. It receives nothing before it is bound. `metadata`: frames to send may have requests
    /// before them, for which there is room then.
    pub(super) fn open(umem: &Umem, busy_poll: bool, metadata: bool) -> Result<(Self, Rings)> {
        // SAFETY: no pointers are passed, and the descriptor that comes back is ours alone.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let socket = Self { fd };
        socket.register(umem, metadata)?;
        for ring in [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_RX_RING, libc::XDP_TX_RING] {
            socket.set(libc::SOL_XDP, ring, &RING)?;
        }
        // Older kernels do not know it: then it takes more calls, of 32 frames each.
        let _ = socket.set(libc::SOL_XDP, MAX_TX_SKB_BUDGET, &RING);
        let _ = socket.set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER);
        if busy_poll {
            socket.set(libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL, &1)?;
            socket.set(libc::SOL_SOCKET, libc::SO_BUSY_POLL, &BUSY_POLL_US)?;
            socket.set(libc::SOL_SOCKET, libc::SO_BUSY_POLL_BUDGET, &BUSY_POLL_BUDGET)?;
        }
        let rings = socket.rings()?;
        Ok((socket, rings))
    }

    /// Whether the kernel takes requests with frames to send.
    pub(super) fn takes_requests() -> bool {
        Umem::new([1]).and_then(|(umem, _)| Self::open(&umem, false, true)).is_ok()
    }

    fn register(&self, umem: &Umem, metadata: bool) -> Result<()> {
        let (addr, len) = umem.area();
        // SAFETY: an all-zero value is valid: no headroom, no flags.
        let mut request: libc::xdp_umem_reg = unsafe { std::mem::zeroed() };
        request.addr = addr;
        request.len = len;
        request.chunk_size = CHUNK as u32;
        if metadata {
            request.flags = libc::XDP_UMEM_TX_METADATA_LEN;
            request.tx_metadata_len = METADATA as u32;
        }
        self.set(libc::SOL_XDP, libc::XDP_UMEM_REG, &request).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOBUFS) => {
                let advice = "its frames cannot be kept in memory; raise RLIMIT_MEMLOCK, or add CAP_IPC_LOCK";
                Error::new(ErrorKind::OutOfMemory, advice)
            }
            _ => e,
        })
    }

    fn rings(&self) -> Result<Rings> {
        let offsets = self.offsets()?;
        let tx = libc::XDP_PGOFF_TX_RING;
        let fill = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
        let completion = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
        let (memory, at) = self.map::<u64>(&offsets.fr, fill)?;
        let fill = Producer::new(memory, &at, RING)?;
        let (memory, at) = self.map::<u64>(&offsets.cr, completion)?;
        let completion = Consumer::new(memory, &at, RING)?;
        let (memory, at) = self.map::<libc::xdp_desc>(&offsets.rx, libc::XDP_PGOFF_RX_RING)?;
        let rx = Consumer::new(memory, &at, RING)?;
        let (memory, at) = self.map::<libc::xdp_desc>(&offsets.tx, tx)?;
        let tx = Producer::new(memory, &at, RING)?;
        Ok(Rings { fill, rx, tx, completion })
    }

    fn map<T>(&self, ring: &libc::xdp_ring_offset, page: libc::off_t) -> Result<(Arc<Mapping>, Offsets)> {
        let at = Offsets {
            producer: ring.producer as usize,
            consumer: ring.consumer as usize,
            flags: ring.flags as usize,
            entries: ring.desc as usize,
        };
        let len = at.entries + RING as usize * size_of::<T>();
        Ok((Arc::new(Mapping::of_socket(len, self.fd.as_raw_fd(), page)?), at))
    }

    fn offsets(&self) -> Result<libc::xdp_mmap_offsets> {
        // SAFETY: an all-zero value is valid.
        let mut offsets: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
        self.get(libc::XDP_MMAP_OFFSETS, &mut offsets)?;
        Ok(offsets)
    }

    /// Frames that the kernel had for the socket and has thrown away: for want of a free one of the pool, or since it fits none
    /// (`rx_dropped`), or of room in the rx ring. How often the fill ring was found empty says nothing: where the kernel copies
    /// these are counted already, and a driver of its own asks as often as it likes.
    pub(super) fn missed(&self) -> Result<u64> {
        // SAFETY: an all-zero value is valid, also for what older kernels leave out; they add it to the first.
        let mut counts: libc::xdp_statistics = unsafe { std::mem::zeroed() };
        self.get(libc::XDP_STATISTICS, &mut counts)?;
        Ok(counts.rx_dropped + counts.rx_ring_full)
    }

    /// For plain data of which any bytes are valid.
    fn get<T: Copy>(&self, option: libc::c_int, value: &mut T) -> Result<()> {
        let mut len = size_of::<T>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes into `value`.
        check(unsafe {
            libc::getsockopt(self.fd.as_raw_fd(), libc::SOL_XDP, option, std::ptr::from_mut(value).cast(), &raw mut len)
        })
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> Result<()> {
        let len = size_of::<T>() as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes of `value`, which is plain data.
        check(unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), len) })
    }

    /// Binds to a queue of an interface. `multi_buffer`: a frame may take several of the pool's.
    pub(super) fn bind(&self, ifindex: u32, queue: u32, access: Access, multi_buffer: bool) -> Result<()> {
        let access = match access {
            Access::ZeroCopy => libc::XDP_ZEROCOPY,
            Access::Copy => libc::XDP_COPY,
        };
        let sg = if multi_buffer { libc::XDP_USE_SG } else { 0 };
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: access | libc::XDP_USE_NEED_WAKEUP | sg,
            sxdp_ifindex: ifindex,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: 0,
        };
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes of the local.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), len) })
    }

    /// Makes the kernel look at the tx ring.
    #[inline]
    pub(super) fn kick_tx(&self) -> Kick {
        // SAFETY: nothing is sent from memory of ours but what the tx ring names.
        let sent =
            unsafe { libc::sendto(self.fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
        if sent >= 0 {
            return Kick::Done;
        }
        match Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS) => Kick::More,
            Some(libc::EBUSY) => Kick::Refused,
            // The interface is down or gone, which the port's thread finds out.
            _ => Kick::Done,
        }
    }

    /// Makes the driver look at the fill ring, and with busy polling for frames.
    #[inline]
    pub(super) fn kick_rx(&self) {
        // SAFETY: a buffer of no bytes; frames arrive through the rx ring. Errors show on the link, or pass.
        unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
