//! Which frames a capture wants, in the words of tcpdump (pcap-filter(7)), as far as people type them.
//!
//! A filter is parsed by the command line, for its errors, and again by the switch. Workers only walk the finished
//! tree. Other than with tcpdump, what is behind VLAN tags is found whether or not the filter mentions `vlan`.

mod parse;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::switch::DropReason;
use crate::wire::{EthernetHeader, Ip, MacAddr, eth, l4};

pub use parse::InvalidFilter;

/// Longest filter, in bytes.
pub const MAX_LENGTH: usize = 1024;
/// A VLAN's number in a tag.
const VID: u16 = 0xfff;

/// Which frames are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    text: String,
    root: Expr,
}

impl Filter {
    /// Whether a frame is wanted. `head` are its first bytes, `len` is its whole length.
    pub fn matches(&self, head: &[u8], len: usize, dropped: Option<DropReason>) -> bool {
        self.root.holds(&Fields::of(head, len, dropped))
    }
}

impl FromStr for Filter {
    type Err = InvalidFilter;

    fn from_str(text: &str) -> Result<Self, InvalidFilter> {
        Ok(Self { text: text.into(), root: parse::parse(text)? })
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}

/// An expression. Its depth is bounded by the parser.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Expr {
    Any(Vec<Expr>),
    All(Vec<Expr>),
    Not(Box<Expr>),
    Is(Term),
}

impl Expr {
    fn holds(&self, fields: &Fields) -> bool {
        match self {
            Self::Any(list) => list.iter().any(|expr| expr.holds(fields)),
            Self::All(list) => list.iter().all(|expr| expr.holds(fields)),
            Self::Not(expr) => !expr.holds(fields),
            Self::Is(term) => term.holds(fields),
        }
    }
}

/// Which end of a frame is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Either,
    Source,
    Destination,
}

impl Side {
    fn holds<T: Copy>(self, (source, destination): (T, T), is_it: impl Fn(T) -> bool) -> bool {
        match self {
            Self::Either => is_it(source) || is_it(destination),
            Self::Source => is_it(source),
            Self::Destination => is_it(destination),
        }
    }
}

/// One question about a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Term {
    EtherType(u16),
    /// An IP protocol.
    Protocol(u8),
    Station(Side, MacAddr),
    Broadcast,
    Multicast,
    Vlan(Option<u16>),
    Address(Side, Prefix),
    /// First and last.
    Ports(Side, u16, u16),
    /// At least so many bytes.
    Longer(usize),
    /// At most so many bytes.
    Shorter(usize),
    Dropped(Option<DropReason>),
}

impl Term {
    fn holds(self, fields: &Fields) -> bool {
        match self {
            Self::EtherType(wanted) => fields.ethernet.is_some_and(|header| header.ethertype == wanted),
            Self::Protocol(wanted) => fields.protocol == Some(wanted),
            Self::Station(side, wanted) => {
                let is_it = |address| address == wanted;
                fields.ethernet.is_some_and(|header| side.holds((header.src, header.dst), is_it))
            }
            Self::Broadcast => fields.ethernet.is_some_and(|header| header.dst.is_broadcast()),
            Self::Multicast => fields.ethernet.is_some_and(|header| header.dst.is_multicast()),
            Self::Vlan(wanted) => {
                let tci = fields.ethernet.and_then(|header| header.vlan);
                tci.is_some_and(|tci| wanted.is_none_or(|wanted| tci & VID == wanted))
            }
            Self::Address(side, prefix) => {
                fields.addresses.is_some_and(|both| side.holds(both, |address| prefix.contains(address)))
            }
            Self::Ports(side, first, last) => {
                fields.ports.is_some_and(|both| side.holds(both, |port| (first..=last).contains(&port)))
            }
            Self::Longer(bytes) => fields.len >= bytes,
            Self::Shorter(bytes) => fields.len <= bytes,
            Self::Dropped(wanted) => fields.dropped.is_some_and(|reason| wanted.is_none_or(|wanted| reason == wanted)),
        }
    }
}

/// Addresses that begin with the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    bits: u32,
}

impl Prefix {
    fn contains(self, address: IpAddr) -> bool {
        let rest = |width: u32| width.saturating_sub(self.bits);
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                (own.to_bits() ^ other.to_bits()).checked_shr(rest(32)).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                (own.to_bits() ^ other.to_bits()).checked_shr(rest(128)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

/// What filters ask about.
#[derive(Debug)]
struct Fields {
    /// `None` of a runt.
    ethernet: Option<EthernetHeader>,
    /// Source and destination, of an ARP packet sender and target.
    addresses: Option<(IpAddr, IpAddr)>,
    protocol: Option<u8>,
    ports: Option<(u16, u16)>,
    len: usize,
    dropped: Option<DropReason>,
}

impl Fields {
    fn of(head: &[u8], len: usize, dropped: Option<DropReason>) -> Self {
        let ethernet = EthernetHeader::parse(head);
        let mut fields = Self { ethernet, addresses: None, protocol: None, ports: None, len, dropped };
        let Some(ethernet) = ethernet else { return fields };
        let packet = head.get(usize::from(ethernet.l3_offset)..).unwrap_or_default();
        if ethernet.ethertype == eth::ETHERTYPE_ARP {
            fields.addresses = arp_addresses(packet);
        }
        let Some(ip) = Ip::parse(ethernet.ethertype, packet) else { return fields };
        let transport = ip.transport();
        let (addresses, protocol): ((IpAddr, IpAddr), u8) = match ip {
            Ip::V4(ip) => ((ip.src().into(), ip.dst().into()), ip.protocol()),
            Ip::V6(ip) => ((ip.src().into(), ip.dst().into()), ip.protocol()),
        };
        fields.addresses = Some(addresses);
        fields.protocol = Some(transport.map_or(protocol, |transport| transport.protocol));
        fields.ports = transport.and_then(|transport| l4::ports(packet, transport));
        fields
    }
}

/// Protocol addresses of sender and target (RFC 826, of Ethernet and IPv4).
fn arp_addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let address = |at: usize| packet.get(at..)?.first_chunk::<4>().map(|bytes| IpAddr::from(*bytes));
    Some((address(14)?, address(24)?))
}
