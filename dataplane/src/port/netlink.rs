//! The little of rtnetlink (`linux/rtnetlink.h`) that ports need: news of interfaces, and who has an XDP program.

use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::port::check;

const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
/// Flags of a message.
pub(super) const REQUEST: u16 = 1;
const ACK: u16 = 4;
const ERROR: u16 = 2;
const GROUP_LINK: u32 = 1;
/// Lengths of `struct nlmsghdr` and `struct ifinfomsg`, and of a `struct nlattr`.
pub(super) const HEADER: usize = 16;
const IFINFO: usize = 16;
const ATTRIBUTE: usize = 4;

const IFLA_XDP: u16 = 43;
/// Marks an attribute that holds others.
pub(super) const NESTED: u16 = 1 << 15;
const XDP_FD: u16 = 1;
const XDP_ATTACHED: u16 = 2;
const XDP_FLAGS: u16 = 3;
const XDP_PROG_ID: u16 = 4;

/// A netlink socket, of rtnetlink unless it is generic.
#[derive(Debug)]
pub(super) struct Netlink {
    fd: OwnedFd,
}

/// An XDP program on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attached {
    /// `XDP_ATTACHED_*`: 1 native, 2 generic, 3 in hardware, 4 several.
    pub(super) mode: u8,
    /// Its id, as in `bpftool prog show`; 0 if there are several.
    pub(super) id: u32,
}

impl Netlink {
    /// For requests.
    pub(super) fn open() -> Result<Self> {
        Self::with_groups(libc::NETLINK_ROUTE, 0, 0)
    }

    /// For requests to families with a name (`linux/genetlink.h`).
    pub(super) fn open_generic() -> Result<Self> {
        Self::with_groups(libc::NETLINK_GENERIC, 0, 0)
    }

    /// For news: readable whenever an interface changes.
    pub(super) fn subscribe() -> Result<Self> {
        Self::with_groups(libc::NETLINK_ROUTE, GROUP_LINK, libc::SOCK_NONBLOCK)
    }

    fn with_groups(protocol: libc::c_int, groups: u32, flags: libc::c_int) -> Result<Self> {
        // SAFETY: no pointers are passed, and the descriptor that comes back is ours alone.
        let fd = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags;
            let fd = libc::socket(libc::AF_NETLINK, kind, protocol);
            check(fd)?;
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: an all-zero address is valid.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = groups;
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes of the local.
        check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
        Ok(Self { fd })
    }

    /// Throws away what has arrived: that something did is the news.
    pub(super) fn drain(&self) {
        let mut buffer = [0u8; 4096];
        while self.receive(&mut buffer).is_ok() {}
    }

    /// The XDP program of an interface, if it has one.
    pub(super) fn xdp(&self, ifindex: u32) -> Result<Option<Attached>> {
        self.send(&message(RTM_GETLINK, REQUEST, &interface(ifindex), &[]))?;
        let mut buffer = vec![0u8; 64 << 10];
        let len = self.receive(&mut buffer)?;
        let reply = buffer.get(..len).unwrap_or_default();
        check_error(reply)?;
        let xdp = find(reply.get(HEADER + IFINFO..).unwrap_or_default(), IFLA_XDP).unwrap_or_default();
        let mode = find(xdp, XDP_ATTACHED).and_then(|value| value.first().copied()).unwrap_or(0);
        let id = find(xdp, XDP_PROG_ID).and_then(|value| value.first_chunk()).copied();
        Ok((mode != 0).then(|| Attached { mode, id: id.map_or(0, u32::from_ne_bytes) }))
    }

    /// Takes a program off an interface that was put there without a link, as `ip link set … xdp` does.
    pub(super) fn clear_xdp(&self, ifindex: u32, mode: u8) -> Result<()> {
        self.put_xdp(ifindex, mode, -1)
    }

    /// Puts a program there, or none if the descriptor is -1.
    pub(super) fn put_xdp(&self, ifindex: u32, mode: u8, program: RawFd) -> Result<()> {
        // `XDP_FLAGS_SKB_MODE` for generic, `XDP_FLAGS_DRV_MODE` for native.
        let flags: u32 = if mode == 2 { 1 << 1 } else { 1 << 2 };
        let mut xdp = attribute(XDP_FD, &program.to_ne_bytes());
        xdp.extend(attribute(XDP_FLAGS, &flags.to_ne_bytes()));
        self.order(RTM_SETLINK, &interface(ifindex), &attribute(IFLA_XDP | NESTED, &xdp))
    }

    /// Has something done, and waits until it is.
    pub(super) fn order(&self, kind: u16, subject: &[u8], attributes: &[u8]) -> Result<()> {
        self.send(&message(kind, REQUEST | ACK, subject, attributes))?;
        let mut buffer = [0u8; 4096];
        let len = self.receive(&mut buffer)?;
        check_error(buffer.get(..len).unwrap_or_default())
    }

    pub(super) fn send(&self, message: &[u8]) -> Result<()> {
        // SAFETY: the kernel reads the message.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<usize> {
        // SAFETY: the kernel writes at most the buffer's length into it.
        let count = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        usize::try_from(count).map_err(|_| Error::last_os_error())
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An attribute, padded.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ATTRIBUTE + value.len() + 3);
    bytes.extend(((ATTRIBUTE + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A message: its header, the family's own, and attributes.
pub(super) fn message(kind: u16, flags: u16, subject: &[u8], attributes: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(((HEADER + subject.len() + attributes.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(subject);
    bytes.extend(attributes);
    bytes
}

/// A `struct ifinfomsg` that only names an interface.
fn interface(index: u32) -> [u8; IFINFO] {
    let mut bytes = [0; IFINFO];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes
}

/// The value of the first attribute of a kind.
pub(super) fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(&[a, b, c, d]) = attributes.first_chunk() {
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]) & !NESTED);
        let value = attributes.get(ATTRIBUTE..len)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
    None
}

/// The error that a reply stands for, if it does.
pub(super) fn check_error(reply: &[u8]) -> Result<()> {
    let kind = reply.get(4..6).and_then(|bytes| bytes.first_chunk()).copied().map(u16::from_ne_bytes);
    let code = reply.get(HEADER..).and_then(|bytes| bytes.first_chunk()).copied().map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(ERROR), Some(code)) if code != 0 => Err(Error::from_raw_os_error(-code)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_are_found_where_they_are() {
        let nested = attribute(XDP_PROG_ID, &7u32.to_ne_bytes());
        let mut all = attribute(3, b"eth0\0");
        all.extend(attribute(IFLA_XDP | NESTED, &nested));
        assert_eq!(find(&all, IFLA_XDP).and_then(|xdp| find(xdp, XDP_PROG_ID)), Some(&7u32.to_ne_bytes()[..]));
        assert_eq!(find(&all, 4), None);
    }

    #[test]
    fn the_loopback_interface_has_no_program() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.xdp(1).unwrap(), None);
        assert!(netlink.xdp(0x7fff_ffff).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..60), kind: u16) {
            let _ = (find(&bytes, kind), check_error(&bytes));
        }
    }
}
