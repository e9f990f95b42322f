use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn built(builder: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    builder(&mut bytes);
    bytes
}

/// Frames by a name: every kind that the tests ask about.
fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let v4 = || PacketBuilder::ethernet2(A, B).ipv4([10, 0, 0, 1], [10, 0, 1, 2], 64);
    let fd = |last: u8| {
        let mut address = [0; 16];
        (address[0], address[15]) = (0xfd, last);
        address
    };
    let v6 = || PacketBuilder::ethernet2(A, B).ipv6(fd(1), fd(2), 64);
    let tagged = PacketBuilder::ethernet2(A, B).single_vlan(10.try_into().unwrap());
    let tagged = tagged.ipv4([10, 0, 0, 1], [10, 0, 0, 9], 1);
    let (ends, fixed) = ([[0xff; 6], A].concat(), [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    let mut arp = [&ends, &fixed[..], &A, &[10, 0, 0, 1], &[0; 6], &[10, 0, 1, 2]].concat();
    arp.resize(60, 0);
    vec![
        ("tcp4", built(|to| v4().tcp(4000, 80, 1, 2).write(to, b"data").unwrap())),
        ("udp4", built(|to| v4().udp(53, 4000).write(to, b"data").unwrap())),
        ("ping4", built(|to| v4().icmpv4_echo_request(1, 2).write(to, b"data").unwrap())),
        ("tcp6", built(|to| v6().tcp(80, 4000, 1, 2).write(to, b"data").unwrap())),
        ("ping6", built(|to| v6().icmpv6_echo_request(1, 2).write(to, b"data").unwrap())),
        ("tagged", built(|to| tagged.udp(1, 2).write(to, &[0; 1000]).unwrap())),
        ("arp", arp),
    ]
}

/// The frames that a filter wants. The second, the fourth and so on were dropped, as `full`.
fn wanted(filter: &str) -> Vec<&'static str> {
    let filter: Filter = filter.parse().unwrap_or_else(|e| panic!("{filter}: {e}"));
    let of = |(at, (name, bytes)): (usize, (&'static str, Vec<u8>))| {
        let dropped = (at % 2 == 1).then_some(DropReason::Full);
        filter.matches(&bytes, bytes.len(), dropped).then_some(name)
    };
    frames().into_iter().enumerate().filter_map(of).collect()
}

#[test]
fn a_runt_has_a_length_and_a_reason_and_nothing_else() {
    for len in 0..14 {
        let holds =
            |filter: &str| filter.parse::<Filter>().unwrap().matches(&[0xff; 14][..len], len, Some(DropReason::Runt));
        assert!(["dropped", "dropped runt", "less 14", "not arp", "not vlan"].into_iter().all(holds));
        let of_others = ["ip", "broadcast", "multicast", "vlan", "tcp", "ether host ff:ff:ff:ff:ff:ff", "dropped full"];
        assert!(!of_others.into_iter().any(holds));
    }
}

#[test]
fn every_test_finds_its_frames() {
    let cases: &[(&str, &[&str])] = &[
        ("tcp", &["tcp4", "tcp6"]),
        ("udp", &["udp4", "tagged"]),
        ("icmp", &["ping4"]),
        ("icmp6", &["ping6"]),
        ("ip", &["tcp4", "udp4", "ping4", "tagged"]),
        ("ip6", &["tcp6", "ping6"]),
        ("arp", &["arp"]),
        ("vlan", &["tagged"]),
        ("vlan 10", &["tagged"]),
        ("vlan 11", &[]),
        ("host 10.0.0.1", &["tcp4", "udp4", "ping4", "tagged", "arp"]),
        ("host 10.0.1.2 and not arp", &["tcp4", "udp4", "ping4"]),
        ("dst host 10.0.0.1", &[]),
        ("src 10.0.0.1 and dst 10.0.0.9", &["tagged"]),
        ("host fd00::2", &["tcp6", "ping6"]),
        ("dst host fd00::2 and tcp", &["tcp6"]),
        ("net 10.0.0.0/24", &["tcp4", "udp4", "ping4", "tagged", "arp"]),
        ("dst net 10.0.0.0/24", &["tagged"]),
        ("net fd00::/8", &["tcp6", "ping6"]),
        ("net 0.0.0.0/0", &["tcp4", "udp4", "ping4", "tagged", "arp"]),
        ("port 80", &["tcp4", "tcp6"]),
        ("tcp dst port 80", &["tcp4"]),
        ("tcp src port 80 or udp src port 53", &["udp4", "tcp6"]),
        ("port 53 && ip", &["udp4"]),
        ("portrange 1-2", &["tagged"]),
        ("udp portrange 50-60", &["udp4"]),
        ("ip host 10.0.1.2 and tcp", &["tcp4"]),
        ("ether host 02:00:00:00:00:02", &["tcp4", "udp4", "ping4", "tcp6", "ping6", "tagged"]),
        ("ether src 02:00:00:00:00:02", &[]),
        ("ether dst host ff:ff:ff:ff:ff:ff", &["arp"]),
        ("ether proto 0x0806", &["arp"]),
        ("broadcast", &["arp"]),
        ("ether multicast", &["arp"]),
        ("greater 1000", &["tagged"]),
        ("less 60", &["tcp4", "udp4", "ping4", "arp"]),
        ("dropped", &["udp4", "tcp6", "tagged"]),
        ("dropped full and tcp", &["tcp6"]),
        ("dropped mtu_egress", &[]),
        ("!(tcp or udp) and !arp", &["ping4", "ping6"]),
        ("not ( tcp || udp ||arp ) and ip6", &["ping6"]),
        ("! ! arp", &["arp"]),
        ("tcp or udp and port 53", &["tcp4", "udp4", "tcp6"]),
    ];
    for (filter, expected) in cases {
        // Parentheses need no space around them, words do.
        assert_eq!(wanted(&filter.replace("||arp", "|| arp")), *expected, "{filter}");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let test = "a test such as 'host 10.0.0.1', 'tcp port 80', 'vlan 10' or 'arp'";
    let cases = [
        ("", format!("expected {test} at the end")),
        ("tcp and", format!("expected {test} at the end")),
        ("tcp[13] & 2 != 0", format!("expected {test}, not 'tcp[13]'")),
        ("host 10.0.0.1 or 10.0.0.2", "expected 'host' before '10.0.0.2'".into()),
        ("host vm1", "expected an IP address, not 'vm1'".into()),
        ("tcp port http", "expected a port from 0 to 65535, not 'http'".into()),
        ("port 65536", "expected a port from 0 to 65535, not '65536'".into()),
        ("vlan 4095", "expected a VLAN from 0 to 4094, not '4095'".into()),
        ("net 10.0.0.0/33", "expected a network like 10.0.0.0/8, not '10.0.0.0/33'".into()),
        ("portrange 9-8", "expected ports like 6000-6010, not '9-8'".into()),
        ("ether host 10.0.0.1", "expected an address like 52:54:00:12:34:56, not '10.0.0.1'".into()),
        ("ether proto ip", "expected an EtherType like 0x88b5, not 'ip'".into()),
        ("(tcp", "a '(' without its ')'".into()),
        ("tcp)", "a ')' without its '('".into()),
        ("tcp udp", "expected 'and' or 'or' before 'udp'".into()),
    ];
    for (filter, expected) in cases {
        assert_eq!(filter.parse::<Filter>().unwrap_err().to_string(), format!("filter: {expected}"));
    }
    assert!("!".repeat(17).parse::<Filter>().unwrap_err().to_string().contains("16 levels"));
    assert!("a".repeat(1025).parse::<Filter>().unwrap_err().to_string().contains("1024 bytes"));
}

const WORDS: [&str; 12] =
    ["tcp", "udp", "arp", "host 10.0.0.1", "net fd00::/8", "port 1", "vlan", "not", "and", "or", "(", ")"];

proptest! {
    #[test]
    fn any_text_is_understood_or_refused(text in "[a-z0-9()!/.: ]{0,60}", bytes in prop::collection::vec(any::<u8>(), 0..140)) {
        if let Ok(filter) = text.parse::<Filter>() {
            filter.matches(&bytes, bytes.len(), None);
        }
    }

    #[test]
    fn any_frame_can_be_asked_about(
        words in prop::collection::vec(prop::sample::select(&WORDS[..]), 1..12),
        mut bytes in prop::collection::vec(any::<u8>(), 0..140),
        kind in prop::sample::select(vec![[8u8, 0], [0x86, 0xdd], [8, 6], [0x81, 0], [0x88, 0xa8]]),
    ) {
        if let Some(place) = bytes.get_mut(12..14) {
            place.copy_from_slice(&kind);
        }
        if let Ok(filter) = words.join(" ").parse::<Filter>() {
            filter.matches(&bytes, 2000, Some(DropReason::Full));
        }
    }

    #[test]
    fn a_negation_is_the_other_frames(at in 0..7usize, filter in prop::sample::select(vec!["tcp", "port 80", "vlan 10"])) {
        let (_, bytes) = frames().remove(at);
        let holds = |text: &str| text.parse::<Filter>().unwrap().matches(&bytes, bytes.len(), None);
        prop_assert_ne!(holds(filter), holds(&format!("not ({filter})")));
    }
}
