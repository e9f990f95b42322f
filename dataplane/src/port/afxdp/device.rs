//! A network interface of the host: what it is like at the moment, and the settings that an uplink needs.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::netdev::Family;
use super::netlink::{NESTED, attribute};
use crate::port::{check, interface_socket};

/// `ETHTOOL_GFLAGS`, `ETHTOOL_SFLAGS`, `ETHTOOL_GCHANNELS` (`linux/ethtool.h`).
const GET_FLAGS: u32 = 0x25;
const SET_FLAGS: u32 = 0x26;
const GET_CHANNELS: u32 = 0x3c;
/// `ETH_FLAG_RXVLAN`: the driver takes tags out of frames, where XDP does not see them.
const FLAG_RX_VLAN: u32 = 1 << 8;
/// `ETH_FLAG_LRO`: the driver merges frames in a way that cannot be undone.
const FLAG_LRO: u32 = 1 << 15;

/// `ETHTOOL_MSG_FEATURES_SET` of the kernel's `ethtool` netlink family (`linux/ethtool_netlink.h`), and its attributes.
const SET_FEATURES: u8 = 12;
const FEATURES_HEADER: u16 = 1;
const FEATURES_WANTED: u16 = 3;
const HEADER_INDEX: u16 = 1;
const HEADER_FLAGS: u16 = 3;
/// `ETHTOOL_FLAG_OMIT_REPLY`
const OMIT_REPLY: u32 = 2;
const BITSET_BITS: u16 = 3;
const BITS_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
/// As `FLAG_RX_VLAN`, of tags of ethertype 0x88a8, for which that call has no flag.
const RX_STAG: &[u8] = b"rx-vlan-stag-hw-parse\0";

/// An interface at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    /// Number of the interface; another one of the same name has another.
    pub(super) index: u32,
    /// Largest layer-3 packet, in bytes.
    pub(super) mtu: usize,
    /// The administrator wants it up.
    pub(super) is_up: bool,
    /// It has a carrier.
    pub(super) is_running: bool,
}

/// Numbers of queues, which begin at 0 for both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Channels {
    pub(super) receive: u32,
    pub(super) send: u32,
}

impl Channels {
    /// What an interface has whose driver does not tell.
    pub(super) const ONE: Self = Self { receive: 1, send: 1 };

    /// The first queues, so many to receive from, and those of them that send.
    pub(super) fn first(self, receive: u32) -> Self {
        Self { receive, send: self.send.min(receive) }
    }
}

/// Asks about one interface, by name, in the network namespace of the thread that made it.
#[derive(Debug)]
pub(super) struct Device {
    name: String,
    socket: OwnedFd,
}

impl Device {
    pub(super) fn new(name: &str) -> Result<Self> {
        Ok(Self { name: name.into(), socket: interface_socket()? })
    }

    /// How it is. `None` if there is no such interface.
    pub(super) fn state(&self) -> Result<Option<State>> {
        let mut request = self.request()?;
        if let Err(e) = self.call(libc::SIOCGIFINDEX, &mut request) {
            let gone = matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO));
            return if gone { Ok(None) } else { Err(e) };
        }
        // SAFETY: the call has filled in this member of the union, and so below.
        let index = unsafe { request.ifr_ifru.ifru_ifindex } as u32;
        self.call(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: as above.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: as above.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        Ok(Some(State {
            index,
            mtu: usize::try_from(mtu).unwrap_or(0),
            is_up: flags & libc::IFF_UP != 0,
            is_running: flags & libc::IFF_RUNNING != 0,
        }))
    }

    /// Brings it up, and makes the driver leave frames as they are.
    pub(super) fn prepare(&self) -> Result<()> {
        let mut request = self.request()?;
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the call has filled in this member of the union.
        unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
        self.call(libc::SIOCSIFFLAGS, &mut request)?;
        // A driver that cannot has not changed the frames before either.
        let mut flags = [GET_FLAGS, 0];
        if self.ethtool(&mut flags).is_ok() && flags[1] & (FLAG_RX_VLAN | FLAG_LRO) != 0 {
            let _ = self.ethtool(&mut [SET_FLAGS, flags[1] & !(FLAG_RX_VLAN | FLAG_LRO)]);
        }
        self.call(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: as above.
        let _ = switch_off(unsafe { request.ifr_ifru.ifru_ifindex } as u32, RX_STAG);
        Ok(())
    }

    /// Queues in use. `None` if the driver does not tell.
    pub(super) fn channels(&self) -> Option<Channels> {
        // `struct ethtool_channels`: four maxima, then the four in use: rx, tx, other, combined.
        let mut channels = [GET_CHANNELS, 0, 0, 0, 0, 0, 0, 0, 0];
        self.ethtool(&mut channels).ok()?;
        let [rx, tx, combined] = [channels[5], channels[6], channels[8]];
        Some(Channels { receive: (rx + combined).max(1), send: (tx + combined).max(1) })
    }

    fn ethtool<const N: usize>(&self, command: &mut [u32; N]) -> Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_data = command.as_mut_ptr().cast();
        // SAFETY: the request names a command of the length that the kernel expects for it, borrowed uniquely.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut request) })
    }

    fn call(&self, number: libc::Ioctl, request: &mut libc::ifreq) -> Result<()> {
        // SAFETY: a valid request with a terminated name, borrowed uniquely; the calls used hold no pointers in it.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), number, std::ptr::from_mut(request)) })
    }

    fn request(&self) -> Result<libc::ifreq> {
        // SAFETY: an all-zero request is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if self.name.len() >= request.ifr_name.len() {
            return Err(Error::new(ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(request)
    }
}

/// Switches a feature of an interface off, by its terminated name, as `ethtool -K` does.
fn switch_off(ifindex: u32, feature: &[u8]) -> Result<()> {
    let header = [attribute(HEADER_INDEX, &ifindex.to_ne_bytes()), attribute(HEADER_FLAGS, &OMIT_REPLY.to_ne_bytes())];
    // A bit that is named and has no value is to be 0.
    let bit = attribute(BITS_BIT | NESTED, &attribute(BIT_NAME, feature));
    let wanted = attribute(BITSET_BITS | NESTED, &bit);
    let attributes =
        [attribute(FEATURES_HEADER | NESTED, &header.concat()), attribute(FEATURES_WANTED | NESTED, &wanted)];
    Family::named(c"ethtool")?.order(SET_FEATURES, &attributes.concat())
}

/// Makes an interface receive what is sent to other addresses, as long as this lives.
#[derive(Debug)]
pub(super) struct Promiscuous {
    _socket: OwnedFd,
}

impl Promiscuous {
    pub(super) fn new(ifindex: u32) -> Result<Self> {
        // SAFETY: no pointers are passed, and the descriptor that comes back is ours alone. Protocol 0 receives nothing.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            check(fd)?;
            OwnedFd::from_raw_fd(fd)
        };
        let membership = libc::packet_mreq {
            mr_ifindex: ifindex as libc::c_int,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        let len = size_of_val(&membership) as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes of the local.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const membership).cast(),
                len,
            )
        })?;
        Ok(Self { _socket: socket })
    }
}
