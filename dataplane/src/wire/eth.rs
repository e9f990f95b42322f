//! Ethernet: addresses and the header up to the network layer (IEEE 802.3, tags by IEEE 802.1Q).

use std::fmt;
use std::str::FromStr;

use super::{be16, vlan};

/// VLAN tags that [`EthernetHeader::parse`] looks through: one 802.1ad service tag around one 802.1Q tag.
pub const MAX_TAGS: usize = 2;
/// Bytes of an untagged Ethernet header.
pub const HEADER_LEN: usize = 14;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A 48-bit MAC address, in the order of the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// `ff:ff:ff:ff:ff:ff`, every station.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Is this a group address? True of the broadcast address too.
    #[inline]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Is this the address of every station?
    #[inline]
    pub const fn is_broadcast(self) -> bool {
        self.to_u64() == Self::BROADCAST.to_u64()
    }

    /// The address as a 48-bit number, first byte on the wire the most significant.
    #[inline]
    pub const fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The inverse of [`to_u64`](Self::to_u64). The upper 16 bits of `value` are ignored.
    #[inline]
    pub const fn from_u64(value: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = value.to_be_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// The text is not a MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address: want six pairs of hex digits, like 02:00:00:00:00:01")]
pub struct ParseMacError;

impl FromStr for MacAddr {
    type Err = ParseMacError;

    /// Six pairs of hex digits of either case, separated by colons.
    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let mut pairs = text.split(':');
        let mut bytes = [0; 6];
        for byte in &mut bytes {
            *byte = pairs.next().and_then(hex_pair).ok_or(ParseMacError)?;
        }
        if pairs.next().is_some() {
            return Err(ParseMacError);
        }
        Ok(Self(bytes))
    }
}

fn hex_pair(text: &str) -> Option<u8> {
    // `from_str_radix` alone would take "+1" and "1".
    let digits: &[u8; 2] = text.as_bytes().try_into().ok()?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u8::from_str_radix(text, 16).ok()
}

/// What the switch needs to know of an Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EthernetHeader {
    /// Destination address.
    pub dst: MacAddr,
    /// Source address.
    pub src: MacAddr,
    /// Tag control information of the outermost VLAN tag, if there is one; see [`Tci`](super::Tci).
    pub vlan: Option<u16>,
    /// EtherType after all tags. A frame with more than [`MAX_TAGS`] tags shows the TPID of the next tag here.
    pub ethertype: u16,
    /// Bytes from the start of the frame to the network header: 14, 18 or 22.
    pub l3_offset: u8,
}

impl EthernetHeader {
    /// Reads the header at the start of `frame`; `None` if `frame` ends inside it.
    #[inline]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        // One length check; the compiler folds the following ones into it.
        let fixed = frame.get(..HEADER_LEN)?;
        let (dst, rest) = fixed.split_first_chunk()?;
        let (src, rest) = rest.split_first_chunk()?;
        let ethertype = be16(rest, 0)?;
        let untagged =
            Self { dst: MacAddr(*dst), src: MacAddr(*src), vlan: None, ethertype, l3_offset: HEADER_LEN as u8 };
        if vlan::is_tpid(ethertype) { untagged.skip_tags(frame) } else { Some(untagged) }
    }

    fn skip_tags(mut self, frame: &[u8]) -> Option<Self> {
        for _ in 0..MAX_TAGS {
            if !vlan::is_tpid(self.ethertype) {
                break;
            }
            let at = usize::from(self.l3_offset);
            let tci = be16(frame, at)?;
            self.vlan = self.vlan.or(Some(tci));
            self.ethertype = be16(frame, at + 2)?;
            self.l3_offset += vlan::TAG_LEN as u8;
        }
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNTAGGED: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];

    fn with_tags(tags: &[(u16, u16)], ethertype: u16) -> Vec<u8> {
        let mut frame = UNTAGGED[..12].to_vec();
        for (tpid, tci) in tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    #[test]
    fn untagged_header() {
        let header = EthernetHeader::parse(&UNTAGGED).unwrap();
        assert_eq!(header.dst, MacAddr([2, 0, 0, 0, 0, 1]));
        assert_eq!(header.src, MacAddr([2, 0, 0, 0, 0, 2]));
        assert_eq!((header.vlan, header.ethertype, header.l3_offset), (None, ETHERTYPE_IPV4, 14));
    }

    #[test]
    fn looks_through_two_tags_and_no_more() {
        let fields = |tags: &[(u16, u16)]| {
            EthernetHeader::parse(&with_tags(tags, ETHERTYPE_IPV6)).map(|h| (h.vlan, h.ethertype, h.l3_offset))
        };
        assert_eq!(fields(&[(0x8100, 0x2064)]), Some((Some(0x2064), ETHERTYPE_IPV6, 18)));
        assert_eq!(fields(&[(0x88a8, 7), (0x8100, 9)]), Some((Some(7), ETHERTYPE_IPV6, 22)));
        assert_eq!(fields(&[(0x88a8, 7), (0x8100, 9), (0x8100, 11)]), Some((Some(7), 0x8100, 22)));
    }

    #[test]
    fn truncated_headers_are_refused() {
        let frame = with_tags(&[(0x88a8, 7), (0x8100, 9)], ETHERTYPE_IPV4);
        for len in 0..frame.len() {
            assert_eq!(EthernetHeader::parse(&frame[..len]), None, "{len} bytes");
        }
    }

    #[test]
    fn group_addresses() {
        let kinds = |text: &str| {
            let mac: MacAddr = text.parse().unwrap();
            (mac.is_multicast(), mac.is_broadcast())
        };
        assert_eq!(kinds("02:00:00:00:00:01"), (false, false));
        assert_eq!(kinds("33:33:00:00:00:01"), (true, false));
        assert_eq!(kinds("FF:ff:ff:ff:ff:ff"), (true, true));
        assert_eq!(kinds("fe:ff:ff:ff:ff:ff"), (false, false));
    }

    #[test]
    fn text_that_is_no_address() {
        for text in [
            "",
            ":",
            "02:00:00:00:00",
            "02:00:00:00:00:01:",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
            "02-00-00-00-00-01",
            "0g:00:00:00:00:01",
            "é:00:00:00:00:01",
            " 02:00:00:00:00:01",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(ParseMacError), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_address_survives_text_and_number(bytes: [u8; 6]) {
            let mac = MacAddr(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(MacAddr::from_u64(mac.to_u64()), mac);
            prop_assert_eq!(MacAddr::from_u64(mac.to_u64() | 0xffff << 48), mac);
        }

        #[test]
        fn any_bytes_parse_or_not(
            mut frame in prop::collection::vec(any::<u8>(), 0..32),
            tpid in prop::sample::select(vec![0x8100u16, 0x88a8, 0x0800]),
        ) {
            let _ = crate::wire::put_be16(&mut frame, 12, tpid);
            match EthernetHeader::parse(&frame) {
                Some(header) => {
                    let l3 = usize::from(header.l3_offset);
                    prop_assert!(l3 <= frame.len());
                    prop_assert!([14, 18, 22].contains(&l3));
                    prop_assert_eq!(header.vlan.is_some(), l3 > 14);
                    prop_assert_eq!(be16(&frame, l3 - 2), Some(header.ethertype));
                }
                None => prop_assert!(frame.len() < 22),
            }
        }
    }
}
