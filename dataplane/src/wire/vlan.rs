//! VLAN tags (IEEE 802.1Q-2022, clause 9) in a header buffer.
//!
//! The switch keeps the headers of a frame in a fixed buffer with [`TAG_LEN`] spare bytes before them. Inserting or
//! stripping a tag then moves only the two addresses; everything after them stays where it is.

use super::{be16, put_be16};

/// Tag protocol identifier of a customer tag (802.1Q).
pub const TPID_8021Q: u16 = 0x8100;
/// Tag protocol identifier of a service tag (802.1ad, "QinQ").
pub const TPID_8021AD: u16 = 0x88a8;
/// Bytes of one tag: TPID and TCI.
pub const TAG_LEN: usize = 4;
/// Bytes before the first tag: the two addresses.
const ADDRESSES_LEN: usize = 12;

/// Does an EtherType of this value announce a VLAN tag?
#[inline]
pub const fn is_tpid(ethertype: u16) -> bool {
    ethertype == TPID_8021Q || ethertype == TPID_8021AD
}

/// Tag control information: priority (3 bits), drop eligible (1 bit), VLAN identifier (12 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tci(pub u16);

impl Tci {
    /// A tag for VLAN `vid` with priority `pcp`. Bits beyond 12 and 3 are ignored.
    pub const fn new(vid: u16, pcp: u8) -> Self {
        Self((pcp as u16 & 7) << 13 | vid & 0xfff)
    }

    /// VLAN identifier, 0..=4095. 0 means "priority only, no VLAN", 4095 is reserved.
    #[inline]
    pub const fn vid(self) -> u16 {
        self.0 & 0xfff
    }

    /// Priority code point, 0..=7.
    #[inline]
    pub const fn pcp(self) -> u8 {
        (self.0 >> 13) as u8
    }
}

/// Puts an 802.1Q tag around the frame that starts at `start` in `buf`, outside of any tag that is there.
///
/// Returns the new start, `start - TAG_LEN`. `None`, and `buf` unchanged, if there are fewer than [`TAG_LEN`] bytes
/// before the frame or fewer than 14 of it.
pub fn insert_tag(buf: &mut [u8], start: usize, tci: u16) -> Option<usize> {
    let new_start = start.checked_sub(TAG_LEN)?;
    let header = buf.get_mut(new_start..)?;
    if header.len() < TAG_LEN + ADDRESSES_LEN + 2 {
        return None;
    }
    header.copy_within(TAG_LEN..TAG_LEN + ADDRESSES_LEN, 0);
    put_be16(header, ADDRESSES_LEN, TPID_8021Q)?;
    put_be16(header, ADDRESSES_LEN + 2, tci)?;
    Some(new_start)
}

/// Removes the outermost tag of the frame that starts at `start` in `buf`.
///
/// Returns the new start, `start + TAG_LEN`, and the tag control information that the tag held. `None`, and `buf`
/// unchanged, if the frame has no tag or ends inside it.
pub fn strip_tag(buf: &mut [u8], start: usize) -> Option<(usize, u16)> {
    let header = buf.get_mut(start..)?;
    let tpid = be16(header, ADDRESSES_LEN)?;
    let tci = be16(header, ADDRESSES_LEN + 2)?;
    // What follows the tag becomes the EtherType, so it has to be there.
    be16(header, ADDRESSES_LEN + TAG_LEN)?;
    if !is_tpid(tpid) {
        return None;
    }
    header.copy_within(..ADDRESSES_LEN, TAG_LEN);
    Some((start + TAG_LEN, tci))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::EthernetHeader;
    use proptest::prelude::*;

    /// 4 spare bytes, then an untagged ARP frame.
    fn buffer() -> [u8; 24] {
        let mut buf = [0xee; 24];
        buf[4..18].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x06]);
        buf
    }

    #[test]
    fn insert_writes_the_tag_between_source_and_ethertype() {
        let mut buf = buffer();
        assert_eq!(insert_tag(&mut buf, 4, 0x6064), Some(0));
        assert_eq!(buf[..18], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0x00, 0x60, 0x64, 0x08, 0x06]);
        assert_eq!(buf[18..], buffer()[18..]);
    }

    #[test]
    fn strip_undoes_insert() {
        let mut buf = buffer();
        insert_tag(&mut buf, 4, 0x6064);
        assert_eq!(strip_tag(&mut buf, 0), Some((4, 0x6064)));
        assert_eq!(buf[4..], buffer()[4..]);
        assert_eq!(strip_tag(&mut buf, 4), None, "no tag left");
    }

    #[test]
    fn strip_takes_the_outer_tag_of_two() {
        let mut frame = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xa8, 0, 7, 0x81, 0, 0, 9, 8, 0];
        assert_eq!(strip_tag(&mut frame, 0), Some((4, 7)));
        assert_eq!(EthernetHeader::parse(&frame[4..]).map(|h| (h.vlan, h.ethertype)), Some((Some(9), 0x0800)));
    }

    #[test]
    fn no_room_changes_nothing() {
        let mut buf = buffer();
        assert_eq!(insert_tag(&mut buf, 3, 1), None, "only 3 spare bytes");
        assert_eq!(insert_tag(&mut buf, 11, 1), None, "frame of 13 bytes");
        assert_eq!(insert_tag(&mut buf, 25, 1), None, "start outside");
        assert_eq!(insert_tag(&mut buf, usize::MAX, 1), None);
        assert_eq!(strip_tag(&mut buf, usize::MAX), None);
        assert_eq!(buf, buffer());

        let mut ends_in_tag = *b"ddddddssssss\x81\x00\x00\x01\x08";
        assert_eq!(strip_tag(&mut ends_in_tag, 0), None);
        assert_eq!(&ends_in_tag, b"ddddddssssss\x81\x00\x00\x01\x08");
    }

    #[test]
    fn tci_fields() {
        let tci = Tci::new(100, 5);
        assert_eq!((tci.0, tci.vid(), tci.pcp()), (0xa064, 100, 5));
        assert_eq!(Tci(0x1fff).vid(), 4095, "drop eligible is no part of the identifier");
        assert_eq!(Tci::new(0xffff, 0xff), Tci(0xefff));
    }

    proptest! {
        #[test]
        fn any_buffer_and_start(bytes in prop::collection::vec(any::<u8>(), 0..40), start in 0usize..48, tci: u16) {
            let mut buf = bytes.clone();
            match insert_tag(&mut buf, start, tci) {
                Some(new_start) => {
                    prop_assert_eq!(strip_tag(&mut buf, new_start), Some((start, tci)));
                    prop_assert_eq!(&buf[start..], &bytes[start..]);
                }
                None => prop_assert_eq!(&buf, &bytes),
            }
        }

        #[test]
        fn strip_of_any_bytes(mut buf in prop::collection::vec(any::<u8>(), 0..40), start in 0usize..48) {
            let _ = put_be16(&mut buf, start + 12, TPID_8021AD);
            let before = buf.clone();
            let is_tagged = be16(&buf, start + 12).is_some_and(is_tpid) && buf.len() >= start + 18;
            prop_assert_eq!(strip_tag(&mut buf, start).is_some(), is_tagged);
            if !is_tagged {
                prop_assert_eq!(&buf, &before);
            }
        }
    }
}
