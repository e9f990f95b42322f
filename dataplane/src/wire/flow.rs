//! The flow hash: which queue a frame belongs to.

use super::eth::EthernetHeader;
use super::ip::Ip;
use super::l4;

// Random looking bits that nobody chose: the fractional part of pi.
const PI: [u64; 4] = [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89];

/// A hash of the flow that the frame belongs to; `frame_headers` are its first bytes.
///
/// Both directions of a flow have the same hash. It covers the IP addresses, the protocol and the ports of TCP, UDP and
/// SCTP, looking through [`MAX_TAGS`](super::MAX_TAGS) VLAN tags. All fragments of a packet stay together, so they hash
/// without ports. Anything else hashes the MAC addresses. Low and high bits are equally good. It is not keyed: whoever
/// chooses the addresses can choose the hash, and with it only the queue of his own frames.
#[inline]
pub fn flow_hash(frame_headers: &[u8]) -> u32 {
    EthernetHeader::parse(frame_headers).map_or(0, |ethernet| flow_hash_after(&ethernet, frame_headers))
}

/// [`flow_hash`] for who has already parsed the Ethernet header of `frame_headers`.
#[inline]
pub fn flow_hash_after(ethernet: &EthernetHeader, frame_headers: &[u8]) -> u32 {
    let packet = frame_headers.get(usize::from(ethernet.l3_offset)..).unwrap_or_default();
    let Some(ip) = Ip::parse(ethernet.ethertype, packet) else {
        return hash_pair(ethernet.src.to_u64(), ethernet.dst.to_u64(), 0);
    };
    let (src_port, dst_port) = ip.transport().and_then(|transport| l4::ports(packet, transport)).unwrap_or_default();
    match ip {
        Ip::V4(ip) => hash_pair(endpoint_v4(ip.src(), src_port), endpoint_v4(ip.dst(), dst_port), ip.protocol()),
        Ip::V6(ip) => hash_pair(endpoint_v6(ip.src(), src_port), endpoint_v6(ip.dst(), dst_port), ip.protocol()),
    }
}

#[inline]
fn endpoint_v4(address: [u8; 4], port: u16) -> u64 {
    u64::from(u32::from_be_bytes(address)) << 16 | u64::from(port)
}

#[inline]
fn endpoint_v6(address: [u8; 16], port: u16) -> u64 {
    let address = u128::from_be_bytes(address);
    mix((address >> 64) as u64 ^ PI[0], address as u64 ^ PI[1]).wrapping_add(u64::from(port))
}

/// Hashes two endpoints, in whichever order, and the protocol between them.
#[inline]
fn hash_pair(a: u64, b: u64, protocol: u8) -> u32 {
    let protocol = u64::from(protocol) << 56;
    let hash = mix(a.min(b) ^ PI[2], a.max(b) ^ PI[3] ^ protocol);
    (hash ^ hash >> 32) as u32
}

/// A multiplication folded onto itself, as in wyhash: every bit of the result depends on every bit of both.
#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::insert_tag;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    struct Flow {
        v6: bool,
        protocol: u8,
        src: [u8; 16],
        dst: [u8; 16],
        ports: (u16, u16),
        macs: ([u8; 6], [u8; 6]),
    }

    impl Flow {
        fn reversed(self) -> Self {
            let Self { src, dst, ports, macs, .. } = self;
            Self { src: dst, dst: src, ports: (ports.1, ports.0), macs: (macs.1, macs.0), ..self }
        }

        fn frame(self) -> Vec<u8> {
            let v4 = |ip: [u8; 16]| [ip[0], ip[1], ip[2], ip[3]];
            let link = PacketBuilder::ethernet2(self.macs.0, self.macs.1);
            let ip =
                if self.v6 { link.ipv6(self.src, self.dst, 64) } else { link.ipv4(v4(self.src), v4(self.dst), 64) };
            let mut frame = Vec::new();
            ip.udp(self.ports.0, self.ports.1).write(&mut frame, b"data").unwrap();
            frame[if self.v6 { 20 } else { 23 }] = self.protocol;
            frame
        }

        fn hash(self) -> u32 {
            flow_hash(&self.frame())
        }
    }

    const V4: Flow = Flow {
        v6: false,
        protocol: 6,
        src: [10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        dst: [10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        ports: (40000, 5201),
        macs: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
    };
    const V6: Flow = Flow { v6: true, ..V4 };

    fn flows() -> impl Strategy<Value = Flow> {
        let protocol = prop::sample::select(vec![1u8, 6, 17, 47, 132]);
        (
            any::<bool>(),
            protocol,
            any::<[u8; 16]>(),
            any::<[u8; 16]>(),
            any::<(u16, u16)>(),
            any::<([u8; 6], [u8; 6])>(),
        )
            .prop_map(|(v6, protocol, src, dst, ports, macs)| Flow { v6, protocol, src, dst, ports, macs })
    }

    proptest! {
        #[test]
        fn both_directions_are_one_flow(flow in flows()) {
            prop_assert_eq!(flow.hash(), flow.reversed().hash());
        }

        #[test]
        fn tags_and_payload_do_not_matter(flow in flows(), tcis in prop::collection::vec(any::<u16>(), 0..=2)) {
            let mut buf = vec![0; 8];
            buf.extend(flow.frame());
            buf.extend([9; 40]);
            let mut start = 8;
            for tci in tcis {
                start = insert_tag(&mut buf, start, tci).unwrap();
            }
            prop_assert_eq!(flow_hash(&buf[start..]), flow.hash());
        }

        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
            flow_hash(&bytes);
        }

        #[test]
        fn any_prefix_of_a_frame(flow in flows(), len in 0usize..80) {
            let frame = flow.frame();
            flow_hash(&frame[..len.min(frame.len())]);
        }
    }

    #[test]
    fn every_field_counts() {
        for flow in [V4, V6] {
            let others = [
                Flow { protocol: 17, ..flow },
                Flow { ports: (40001, 5201), ..flow },
                Flow { ports: (40000, 5202), ..flow },
                Flow { src: [11; 16], ..flow },
                Flow { dst: [11; 16], ..flow },
                Flow { v6: !flow.v6, ..flow },
            ];
            for other in others {
                assert_ne!(flow.hash(), other.hash(), "{other:?}");
            }
            assert_eq!(flow.hash(), Flow { macs: ([8; 6], [4; 6]), ..flow }.hash(), "MACs do not count in IP");
        }
    }

    #[test]
    fn without_ports_only_addresses_and_protocol() {
        let icmp = Flow { protocol: 1, ..V4 };
        assert_eq!(icmp.hash(), Flow { ports: (1, 2), ..icmp }.hash());
    }

    #[test]
    fn fragments_of_a_packet_stay_together() {
        let mut first = V4.frame();
        first[20] = 0x20; // more fragments
        let mut last = V4.frame();
        last[21] = 0x01; // offset
        last[34..38].fill(0xaa); // payload where the ports were
        assert_eq!(flow_hash(&first), flow_hash(&last));
        assert_ne!(flow_hash(&first), V4.hash());

        let fragment_v6 = |offset_and_more: u8, data: u8| {
            let mut frame = V6.frame();
            frame[20] = 44;
            frame.splice(54..54, [17, 0, 0, offset_and_more, 0, 0, 0, 1]);
            frame[62..].fill(data);
            frame
        };
        assert_eq!(flow_hash(&fragment_v6(1, 3)), flow_hash(&fragment_v6(8, 5)));
    }

    #[test]
    fn other_ethertypes_hash_the_addresses() {
        let arp = |dst: u8, src: u8, body: u8| {
            let mut frame = vec![2, 0, 0, 0, 0, dst, 2, 0, 0, 0, 0, src, 0x08, 0x06];
            frame.extend([body; 28]);
            flow_hash(&frame)
        };
        assert_eq!(arp(1, 2, 7), arp(2, 1, 8));
        assert_ne!(arp(1, 2, 7), arp(1, 3, 7));
        assert_eq!(flow_hash(&[0; 13]), 0, "not even Ethernet");
    }

    /// Pearson's chi-square, per degree of freedom: about 1 if `picks` are uniform over the buckets.
    fn chi_square(picks: impl Iterator<Item = usize>, buckets: usize) -> f64 {
        let mut counts = vec![0f64; buckets];
        for pick in picks {
            counts[pick] += 1.0;
        }
        let expected = counts.iter().sum::<f64>() / buckets as f64;
        let squares: f64 = counts.iter().map(|count| (count - expected).powi(2) / expected).sum();
        squares / (buckets - 1) as f64
    }

    fn assert_spread(hashes: &[u32], what: &str) {
        for buckets in [2, 3, 4, 8, 16, 64] {
            let low = hashes.iter().map(|hash| *hash as usize % buckets);
            let high = hashes.iter().map(|hash| ((u64::from(*hash) * buckets as u64) >> 32) as usize);
            let (low, high) = (chi_square(low, buckets), chi_square(high, buckets));
            assert!(low < 4.0 && high < 4.0, "{what} over {buckets}: low bits {low}, high bits {high}");
        }
    }

    type Vary = fn(Flow, u16) -> Flow;

    #[test]
    fn spreads_over_low_and_high_bits() {
        let count = 4096u16;
        // The ways in which real flows differ from each other.
        let patterns: [(&str, Vary); 7] = [
            ("source port", |flow, n| Flow { ports: (32768 + n, 5201), ..flow }),
            ("even source port", |flow, n| Flow { ports: (32768 + 2 * n, 443), ..flow }),
            ("both ports", |flow, n| Flow { ports: (1024 + n, 1024 + n), ..flow }),
            ("last bytes of source", |mut flow, n| {
                flow.src[2..4].copy_from_slice(&n.to_be_bytes());
                flow.src[14..].copy_from_slice(&n.to_be_bytes());
                flow
            }),
            ("first bytes of source", |mut flow, n| {
                flow.src[..2].copy_from_slice(&n.to_be_bytes());
                flow
            }),
            ("both addresses", |mut flow, n| {
                flow.src[2..4].copy_from_slice(&n.to_be_bytes());
                flow.dst[2..4].copy_from_slice(&n.rotate_left(5).to_be_bytes());
                flow
            }),
            ("address and port", |mut flow, n| {
                flow.src[3] = n as u8;
                flow.src[15] = n as u8;
                flow.ports.0 = 50000 + (n >> 8);
                flow
            }),
        ];
        for base in [V4, V6] {
            for (name, vary) in patterns {
                let hashes: Vec<u32> = (0..count).map(|n| vary(base, n).hash()).collect();
                assert_spread(&hashes, &format!("{name}, v6 {}", base.v6));
            }
        }
    }

    #[test]
    fn spreads_mac_addresses() {
        let hashes: Vec<u32> = (0..4096u16)
            .map(|n| {
                let mut frame = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0x88, 0xb5];
                frame[10..12].copy_from_slice(&n.to_be_bytes());
                flow_hash(&frame)
            })
            .collect();
        assert_spread(&hashes, "source MAC");
    }
}
