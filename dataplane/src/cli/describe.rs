//! A frame in a few words.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice::wire::eth::ETHERTYPE_ARP;
use sluice::wire::ip::{PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};
use sluice::wire::{EthernetHeader, Ip, MacAddr, Tci, Tcp, l4, vlan};

const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMPV6: u8 = 58;
/// Bytes before the first tag or EtherType.
const ADDRESSES_LEN: usize = 12;
/// From CWR, the highest bit, down to FIN (RFC 9293).
const TCP_FLAGS: [&str; 8] = ["CWR", "ECE", "URG", "ACK", "PSH", "RST", "SYN", "FIN"];

/// What the first bytes of a frame say.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Description {
    /// Sender and receiver; none if the frame ends before.
    pub(crate) stations: Option<(MacAddr, MacAddr)>,
    /// VLAN identifiers, the outermost first.
    pub(crate) vlans: Vec<u16>,
    /// What is inside: one line of printable ASCII.
    pub(crate) what: String,
}

/// Describes the frame that begins with `frame`; never fails, whatever a guest has sent.
pub(crate) fn describe(frame: &[u8]) -> Description {
    let Some(ethernet) = EthernetHeader::parse(frame) else {
        return Description { stations: None, vlans: Vec::new(), what: "no whole Ethernet header".into() };
    };
    let l3_offset = usize::from(ethernet.l3_offset);
    let packet = frame.get(l3_offset..).unwrap_or_default();
    let tags = frame.get(ADDRESSES_LEN..l3_offset.saturating_sub(2)).unwrap_or_default();
    let vlans = tags.chunks_exact(vlan::TAG_LEN).filter_map(|tag| be16(tag, 2)).map(|tci| Tci(tci).vid()).collect();
    let what = match Ip::parse(ethernet.ethertype, packet) {
        Some(ip) => describe_ip(&ip, packet),
        None if ethernet.ethertype == ETHERTYPE_ARP => describe_arp(packet).unwrap_or_else(|| "ARP".into()),
        None if ethernet.ethertype < 0x600 => "802.3".into(),
        None => format!("ethertype 0x{:04x}", ethernet.ethertype),
    };
    Description { stations: Some((ethernet.src, ethernet.dst)), vlans, what }
}

/// ARP for IPv4 (RFC 826); `None` if it is for others, or ends early.
fn describe_arp(packet: &[u8]) -> Option<String> {
    let address = |at: usize| packet.get(at..)?.first_chunk::<4>().copied().map(Ipv4Addr::from);
    let hardware = MacAddr(*packet.get(8..)?.first_chunk()?);
    let (sender, target) = (address(14)?, address(24)?);
    match be16(packet, 6)? {
        1 => Some(format!("ARP who-has {target} tell {sender}")),
        2 => Some(format!("ARP {sender} is-at {hardware}")),
        operation => Some(format!("ARP operation {operation}")),
    }
}

fn describe_ip(ip: &Ip<'_>, packet: &[u8]) -> String {
    let (version, src, dst, protocol, is_fragment) = match ip {
        Ip::V4(ip) => ("IPv4", IpAddr::from(ip.src()), IpAddr::from(ip.dst()), ip.protocol(), ip.is_fragment()),
        Ip::V6(ip) => {
            let (src, dst) = (Ipv6Addr::from(ip.src()), Ipv6Addr::from(ip.dst()));
            ("IPv6", src.into(), dst.into(), ip.protocol(), ip.is_fragment())
        }
    };
    let mut text = format!("{version} {} ", protocol_name(protocol));
    let transport = ip.transport();
    // Writing to a string cannot fail.
    let _ = match transport.and_then(|transport| l4::ports(packet, transport)) {
        Some((from, to)) => write!(text, "{src} port {from} > {dst} port {to}"),
        None => write!(text, "{src} > {dst}"),
    };
    let inner = transport.and_then(|transport| packet.get(transport.offset..));
    match (protocol, inner) {
        _ if is_fragment => text.push_str(" fragment"),
        (PROTOCOL_TCP, Some(inner)) => text.push_str(&tcp_flags(inner)),
        (PROTOCOL_ICMP | PROTOCOL_ICMPV6, Some([kind, code, ..])) => text.push_str(&icmp(protocol, *kind, *code)),
        _ => {}
    }
    text
}

fn protocol_name(protocol: u8) -> String {
    match protocol {
        PROTOCOL_ICMP => "ICMP".into(),
        PROTOCOL_TCP => "TCP".into(),
        PROTOCOL_UDP => "UDP".into(),
        PROTOCOL_ICMPV6 => "ICMPv6".into(),
        PROTOCOL_SCTP => "SCTP".into(),
        other => format!("protocol {other}"),
    }
}

fn tcp_flags(header: &[u8]) -> String {
    let Some(tcp) = Tcp::parse(header) else { return String::new() };
    let set = |(bit, name): (usize, &&'static str)| (tcp.flags() & 0x80 >> bit != 0).then_some(*name);
    let names: Vec<_> = TCP_FLAGS.iter().enumerate().filter_map(set).collect();
    format!(" [{}]", names.join(","))
}

/// Type of an ICMP message (RFC 792), or ICMPv6 (RFC 4443, RFC 4861).
fn icmp(protocol: u8, kind: u8, code: u8) -> String {
    let name = match (protocol, kind) {
        (PROTOCOL_ICMP, 0) | (PROTOCOL_ICMPV6, 129) => "echo reply",
        (PROTOCOL_ICMP, 8) | (PROTOCOL_ICMPV6, 128) => "echo request",
        (PROTOCOL_ICMP, 3) | (PROTOCOL_ICMPV6, 1) => "unreachable",
        (PROTOCOL_ICMP, 11) | (PROTOCOL_ICMPV6, 3) => "time exceeded",
        (PROTOCOL_ICMPV6, 2) => "packet too big",
        (PROTOCOL_ICMPV6, 133) => "router solicitation",
        (PROTOCOL_ICMPV6, 134) => "router advertisement",
        (PROTOCOL_ICMPV6, 135) => "neighbor solicitation",
        (PROTOCOL_ICMPV6, 136) => "neighbor advertisement",
        _ => return format!(" type {kind} code {code}"),
    };
    format!(" {name}")
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    const SRC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const DST: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn raw(rest: &[u8]) -> Vec<u8> {
        [&DST[..], &SRC, rest].concat()
    }

    #[test]
    fn packets_of_ip() {
        let build = || PacketBuilder::ethernet2(SRC, DST);
        let v6 = |last| {
            let mut a = [0; 16];
            a[0] = 0xfd;
            a[15] = last;
            a
        };
        let mut frames = [const { Vec::new() }; 4];
        let v4 = || build().ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        v4().tcp(4000, 80, 1, 100).syn().ack(5).write(&mut frames[0], &[]).unwrap();
        v4().icmpv4_echo_request(1, 1).write(&mut frames[1], &[0; 8]).unwrap();
        build().ipv6(v6(1), v6(2), 64).udp(53, 5353).write(&mut frames[2], &[0; 8]).unwrap();
        build().ipv6(v6(1), v6(2), 64).icmpv6_echo_reply(1, 1).write(&mut frames[3], &[]).unwrap();
        let expected = [
            "IPv4 TCP 10.0.0.1 port 4000 > 10.0.0.2 port 80 [ACK,SYN]",
            "IPv4 ICMP 10.0.0.1 > 10.0.0.2 echo request",
            "IPv6 UDP fd00::1 port 53 > fd00::2 port 5353",
            "IPv6 ICMPv6 fd00::1 > fd00::2 echo reply",
        ];
        assert_eq!(frames.each_ref().map(|frame| describe(frame).what), expected);
        // More fragments to come.
        frames[0][20] |= 0x20;
        assert_eq!(describe(&frames[0]).what, "IPv4 TCP 10.0.0.1 > 10.0.0.2 fragment");
    }

    #[test]
    fn arp_tags_and_others() {
        let mut arp = raw(&[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend([&SRC[..], &[10, 0, 0, 1], &[0; 6], &[10, 0, 0, 2]].concat());
        assert_eq!(describe(&arp).what, "ARP who-has 10.0.0.2 tell 10.0.0.1");
        arp[21] = 2;
        assert_eq!(describe(&arp).what, "ARP 10.0.0.1 is-at 02:00:00:00:00:01");
        let tagged = describe(&raw(&[0x88, 0xa8, 0x20, 7, 0x81, 0, 0, 100, 0x88, 0xb5]));
        assert_eq!((tagged.vlans, tagged.what), (vec![7, 100], "ethertype 0x88b5".into()));
        assert_eq!(tagged.stations, Some((MacAddr(SRC), MacAddr(DST))));
        assert_eq!(describe(&SRC).stations, None);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_one_clean_line(
            kind in prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd, 0x8100, 0x88a8, 0x88b5, 3]),
            first in prop::sample::select(vec![0x45u8, 0x4f, 0x60, 0]),
            rest in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0usize..216,
        ) {
            let mut frame = raw(&kind.to_be_bytes());
            frame.push(first);
            frame.extend(rest);
            frame.truncate(cut);
            let what = describe(&frame).what;
            prop_assert!(!what.is_empty() && what.chars().all(|c| c == ' ' || c.is_ascii_graphic()), "{what:?}");
        }
    }
}
