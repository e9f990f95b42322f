//! The tap device of the kernel.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::limits::MAX_CHAIN;
use crate::mem::SourceSegment;
use crate::port::{check, interface_socket};
use crate::switch::DropReason;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_TSO_ECN: libc::c_uint = 8;

/// An open tap.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
}

impl Tap {
    /// Opens an interface, made if it is not there, and brings it up.
    pub(super) fn open(interface: &str, mtu: Option<u16>) -> Result<Self> {
        let advice = |what: &str, e: Error| {
            let hint = match e.kind() {
                ErrorKind::PermissionDenied => "; run as root or with CAP_NET_ADMIN",
                ErrorKind::NotFound => "; load the tun module",
                ErrorKind::ResourceBusy => "; another process has it open",
                _ => "",
            };
            Error::new(e.kind(), format!("cannot {what} tap interface {interface}: {e}{hint}"))
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|e| advice("open", e))?;
        let mut request = named(interface)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the request is a valid local ifreq with a terminated name.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) }).map_err(|e| advice("open", e))?;
        let size = super::HEADER as libc::c_int;
        // SAFETY: the kernel reads one int from a local.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
            .map_err(|e| advice("configure", e))?;
        let offloads = libc::c_ulong::from(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN);
        // SAFETY: the argument is passed by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offloads) }).map_err(|e| advice("configure", e))?;
        bring_up(interface, mtu).map_err(|e| advice("bring up", e))?;
        Ok(Self { file })
    }

    /// A tap that another process had open.
    pub(super) fn adopt(fd: OwnedFd, interface: &str) -> Result<Self> {
        let tap = Self { file: fd.into() };
        if tap.is(interface)? {
            return Ok(tap);
        }
        Err(Error::new(ErrorKind::InvalidInput, format!("the descriptor is not that of tap {interface}")))
    }

    /// Whether it is the interface of that name.
    ///
    /// # Errors
    /// If the interface is no more.
    pub(super) fn is(&self, interface: &str) -> Result<bool> {
        let mut request = named(interface)?;
        let wanted = request.ifr_name;
        // SAFETY: the kernel fills a valid local ifreq.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
        Ok(request.ifr_name == wanted)
    }

    /// Its descriptor, duplicated.
    pub(super) fn duplicate(&self) -> Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Reads one frame with its header. `None` if there is none.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Option<usize> {
        // SAFETY: the kernel writes at most the buffer's length into it.
        let count = unsafe { libc::read(self.file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        usize::try_from(count).ok().filter(|count| *count > 0)
    }

    /// Writes one frame with its header, from where its pieces are.
    pub(super) fn write(
        &self,
        header: &[u8],
        head: &[u8],
        tail: &[SourceSegment<'_>],
    ) -> std::result::Result<(), DropReason> {
        const FEW: usize = 32;
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let (mut few, mut many);
        // Nearly every frame has few pieces; 16 KiB of stack are not filled for those.
        let pieces: &mut [libc::iovec] = if tail.len() + 2 <= FEW {
            few = [empty; FEW];
            &mut few
        } else {
            many = [empty; MAX_CHAIN + 2];
            &mut many
        };
        let sources = [SourceSegment::from_slice(header), SourceSegment::from_slice(head)];
        let mut count = 0;
        for (piece, source) in pieces.iter_mut().zip(sources.iter().chain(tail)) {
            *piece = source.iovec();
            count += 1;
        }
        // SAFETY: the first `count` pieces describe memory that is mapped while the segments live; the kernel reads it.
        let written = unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr(), count) };
        match written {
            0.. => Ok(()),
            _ => Err(match Error::last_os_error().raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => DropReason::Full,
                // The interface is down or was removed, as the host's administrator wants.
                Some(libc::EIO | libc::EBADFD) => DropReason::LinkDown,
                _ => DropReason::CannotConvert,
            }),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn named(interface: &str) -> Result<libc::ifreq> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() || interface.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn bring_up(interface: &str, mtu: Option<u16>) -> Result<()> {
    let socket = interface_socket()?;
    if let Some(mtu) = mtu {
        set_mtu_by(&socket, interface, mtu)?;
    }
    let mut request = named(interface)?;
    // SAFETY: a valid local ifreq with a terminated name; the flags are those that the first call filled in.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request))
    }
}

/// Whether there is an interface of that name.
pub(super) fn exists(interface: &str) -> bool {
    let ask = || {
        let (socket, mut request) = (interface_socket()?, named(interface)?);
        // SAFETY: a valid local ifreq with a terminated name.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) })
    };
    ask().is_ok()
}

/// Sets the MTU of an interface.
pub(super) fn set_mtu(interface: &str, mtu: u16) -> Result<()> {
    set_mtu_by(&interface_socket()?, interface, mtu)
}

fn set_mtu_by(socket: &OwnedFd, interface: &str, mtu: u16) -> Result<()> {
    let mut request = named(interface)?;
    request.ifr_ifru.ifru_mtu = i32::from(mtu);
    // SAFETY: a valid local ifreq with a terminated name.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &raw mut request) })
}
