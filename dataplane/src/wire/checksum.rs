//! The Internet checksum (RFC 1071), its incremental update (RFC 1624) and its completion for virtio.

use super::l4::UDP_CSUM_OFFSET;
use super::{WireError, put_be16};

/// A running ones' complement sum of bytes that may come in pieces.
///
/// ```
/// use sluice::wire::checksum::Sum;
///
/// let mut sum = Sum::new();
/// sum.add(&[0x00, 0x01, 0xf2]);
/// sum.add(&[0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
/// assert_eq!(sum.fold(), 0xddf2); // the example of RFC 1071, section 3
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    /// The sum of native endian words modulo 2^64 - 1; RFC 1071 section 2(B) is why the byte order can wait.
    words: u64,
    /// An odd number of bytes so far: the next piece starts in the low half of a 16-bit word.
    odd: bool,
}

impl Sum {
    /// The sum of nothing.
    #[inline]
    pub const fn new() -> Self {
        Self { words: 0, odd: false }
    }

    /// The sum of the IPv4 pseudo header (RFC 9293, section 3.1): addresses, protocol and the length in bytes of the
    /// transport header with its data.
    pub fn pseudo_v4(src: [u8; 4], dst: [u8; 4], protocol: u8, length: u16) -> Self {
        let mut sum = Self::new();
        sum.add(&src);
        sum.add(&dst);
        sum.add(&[0, protocol]);
        sum.add(&length.to_be_bytes());
        sum
    }

    /// The sum of the IPv6 pseudo header (RFC 8200, section 8.1): like [`pseudo_v4`](Self::pseudo_v4), where `dst` is
    /// the final destination and `protocol` the upper-layer protocol.
    pub fn pseudo_v6(src: [u8; 16], dst: [u8; 16], protocol: u8, length: u32) -> Self {
        let mut sum = Self::new();
        sum.add(&src);
        sum.add(&dst);
        sum.add(&length.to_be_bytes());
        sum.add(&[0, 0, 0, protocol]);
        sum
    }

    /// Adds the next bytes, which need not be even in number nor aligned.
    #[inline]
    pub fn add(&mut self, bytes: &[u8]) {
        let mut piece = sum_words(bytes);
        if self.odd {
            // Every byte sits in the other half of its word: RFC 1071 section 2(B).
            piece = fold_native(piece).swap_bytes().into();
        }
        self.words = add_end_around(self.words, piece);
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// The sum as a 16-bit number, not complemented; a missing last byte counts as zero.
    ///
    /// Of a pseudo header, this is what a `CHECKSUM_PARTIAL` frame holds in its checksum field.
    #[inline]
    pub fn fold(&self) -> u16 {
        u16::from_be(fold_native(self.words))
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub fn checksum(&self) -> u16 {
        !self.fold()
    }

    /// The checksum as a transport header holds it whose field is `offset` bytes from its start. In UDP, where zero
    /// means "none" (RFC 768), 0xffff takes its place. Elsewhere that would be right as well, but not what a sender
    /// computes (RFC 1624).
    #[inline]
    pub fn transport_checksum(&self, offset: u16) -> u16 {
        match self.checksum() {
            0 if offset == UDP_CSUM_OFFSET => 0xffff,
            checksum => checksum,
        }
    }
}

/// Sums `bytes` as native endian words. The result is below 2^64 for any slice that fits in memory.
#[inline]
fn sum_words(bytes: &[u8]) -> u64 {
    // Four independent lanes of 64 bits, each taking 32-bit halves: no carries, so LLVM makes vectors of it.
    let (blocks, rest) = bytes.as_chunks::<32>();
    let mut lanes = [0u64; 4];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = lane.wrapping_add(halves(u64::from_ne_bytes(*word)));
        }
    }
    let mut sum = lanes.into_iter().fold(0, add_end_around);

    let (words, mut rest) = rest.as_chunks::<8>();
    for word in words {
        sum = add_end_around(sum, halves(u64::from_ne_bytes(*word)));
    }
    if let Some((word, after)) = rest.split_first_chunk() {
        sum = add_end_around(sum, u32::from_ne_bytes(*word).into());
        rest = after;
    }
    if let Some((word, after)) = rest.split_first_chunk() {
        sum = add_end_around(sum, u16::from_ne_bytes(*word).into());
        rest = after;
    }
    if let Some(last) = rest.first() {
        sum = add_end_around(sum, u16::from_ne_bytes([*last, 0]).into());
    }
    sum
}

#[inline]
fn halves(word: u64) -> u64 {
    (word & 0xffff_ffff) + (word >> 32)
}

#[inline]
fn add_end_around(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    // After a carry the sum is at most 2^64 - 2.
    sum + u64::from(carry)
}

#[inline]
fn fold_native(sum: u64) -> u16 {
    let sum = halves(sum);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    // At most 0x1fffe by now: no carry is left after this.
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum of data of which one 16-bit word changed from `old` to `new` (RFC 1624, equation 3).
#[inline]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = !checksum as u32 + !old as u32 + new as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Finishes a frame whose sender left the transport checksum to others (virtio 1.2, section 5.1.6.2,
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`): the field holds the sum of the pseudo header; the checksum of everything from
/// `start` to the end of `frame` replaces it, `offset` bytes after `start`.
///
/// # Errors
///
/// [`WireError::CsumOutsideFrame`] if the field is not inside `frame`, which then is unchanged.
pub fn complete_partial(frame: &mut [u8], start: u16, offset: u16) -> Result<(), WireError> {
    let covered = frame.get_mut(usize::from(start)..).ok_or(WireError::CsumOutsideFrame)?;
    let mut sum = Sum::new();
    sum.add(covered);
    put_be16(covered, usize::from(offset), sum.transport_checksum(offset)).ok_or(WireError::CsumOutsideFrame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{Ipv4Header, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    /// RFC 1071 word by word, as slow as it gets.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    fn fold_of(bytes: &[u8]) -> u16 {
        let mut sum = Sum::new();
        sum.add(bytes);
        sum.fold()
    }

    #[test]
    fn known_vectors() {
        assert_eq!(fold_of(&[]), 0);
        assert_eq!(fold_of(&[0x12]), 0x1200);
        assert_eq!(fold_of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
        assert_eq!(fold_of(&[0xff; 65535]), 0xff00 ^ 0x00ff ^ 0x00ff, "all ones stays all ones, and an odd byte");
        // The IPv4 header of every textbook, checksum b861 zeroed.
        let header = *b"\x45\x00\x00\x73\x00\x00\x40\x00\x40\x11\x00\x00\xc0\xa8\x00\x01\xc0\xa8\x00\xc7";
        let mut sum = Sum::new();
        sum.add(&header);
        assert_eq!(sum.checksum(), 0xb861);
    }

    #[test]
    fn carries_of_large_sums_are_kept() {
        let ones = vec![0xff; 1 << 20];
        assert_eq!(fold_of(&ones), 0xffff);
        let full = Sum { words: u64::MAX, odd: false };
        let mut sum = full;
        sum.add(&[0, 1]);
        assert_eq!(sum.fold(), 1, "all ones is zero");
    }

    #[test]
    fn update_of_rfc_1624_section_4() {
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
        assert_eq!(update(0, 0, 1), 0xfffe, "a carry out of the first fold");
    }

    #[test]
    fn zero_becomes_all_ones_in_udp() {
        // Pseudo header sum 0xffff and a header of zeros: the checksum computes to zero.
        for (offset, expected) in [(6, [0xff, 0xff]), (16, [0, 0])] {
            let mut frame = [0u8; 20];
            frame[offset..offset + 2].fill(0xff);
            complete_partial(&mut frame, 0, offset as u16).unwrap();
            assert_eq!(frame[offset..offset + 2], expected);
        }
    }

    #[test]
    fn field_outside_frame_is_an_error() {
        let mut frame = [7u8; 40];
        for (start, offset) in [(40, 0), (39, 0), (30, 9), (41, 0), (0xffff, 0), (0, 0xffff), (0xffff, 0xffff)] {
            assert_eq!(complete_partial(&mut frame, start, offset), Err(WireError::CsumOutsideFrame));
        }
        assert_eq!(frame, [7; 40]);
        assert_eq!(complete_partial(&mut frame, 30, 8), Ok(()));
    }

    proptest! {
        #[test]
        fn fold_is_the_remainder(sum: u64, high_ones in 0u32..64, low_ones in 0u32..64) {
            for sum in [sum, !(u64::MAX >> high_ones) | !(u64::MAX << low_ones), u64::MAX] {
                prop_assert_eq!(u64::from(fold_native(sum)) % 0xffff, sum % 0xffff);
                prop_assert_eq!(fold_native(sum) == 0, sum == 0);
            }
        }

        #[test]
        fn equals_the_naive_sum(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(fold_of(&bytes), naive(&bytes));
        }

        #[test]
        fn pieces_make_no_difference(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            cuts in prop::collection::vec(0usize..300, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.sort_unstable();
            let mut sum = Sum::new();
            let mut from = 0;
            for cut in cuts {
                sum.add(&bytes[from..cut]);
                from = cut;
            }
            sum.add(&bytes[from..]);
            prop_assert_eq!(sum.fold(), naive(&bytes));
        }

        #[test]
        fn update_equals_a_new_checksum(
            mut header in prop::collection::vec(any::<u8>(), 20), word in 0usize..10, new: u16,
        ) {
            // A version nibble, as in every real header: the sum of data is never zero.
            header[0] |= 0x40;
            let word = if word == 0 { 2 } else { word * 2 };
            let before = !naive(&header);
            let old = u16::from_be_bytes([header[word], header[word + 1]]);
            header[word..word + 2].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(update(before, old, new), !naive(&header));
        }

        #[test]
        fn ipv4_header_as_etherparse_sums_it(src: [u8; 4], dst: [u8; 4], id: u16, len in 0u16..1500, ttl: u8) {
            let mut header = Ipv4Header::new(len, ttl, 6.into(), src, dst).unwrap();
            header.identification = id;
            header.header_checksum = 0;
            let mut sum = Sum::new();
            sum.add(&header.to_bytes());
            prop_assert_eq!(sum.checksum(), header.calc_header_checksum());
        }

        #[test]
        fn completes_what_etherparse_built(
            is_v6: bool, is_udp: bool, src: [u8; 16], dst: [u8; 16], ports: (u16, u16),
            payload in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let v4 = |ip: &[u8; 16]| [ip[0], ip[1], ip[2], ip[3]];
            let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let ip = if is_v6 { link.ipv6(src, dst, 64) } else { link.ipv4(v4(&src), v4(&dst), 64) };
            let mut frame = Vec::new();
            if is_udp {
                ip.udp(ports.0, ports.1).write(&mut frame, &payload).unwrap();
            } else {
                ip.tcp(ports.0, ports.1, 1, 2).write(&mut frame, &payload).unwrap();
            }
            let start = if is_v6 { 54 } else { 34 };
            let (protocol, offset) = if is_udp { (17, 6) } else { (6, 16) };
            let length = frame.len() - start;
            let pseudo = if is_v6 {
                Sum::pseudo_v6(src, dst, protocol, length as u32)
            } else {
                Sum::pseudo_v4(v4(&src), v4(&dst), protocol, length as u16)
            };
            let mut completed = frame.clone();
            put_be16(&mut completed, start + offset, pseudo.fold()).unwrap();
            complete_partial(&mut completed, start as u16, offset as u16).unwrap();

            prop_assert_eq!(&completed, &frame);
            let sliced = SlicedPacket::from_ethernet(&completed).unwrap();
            prop_assert!(matches!(sliced.transport, Some(TransportSlice::Udp(_) | TransportSlice::Tcp(_))));
        }

        #[test]
        fn completing_random_bytes(mut frame in prop::collection::vec(any::<u8>(), 0..100), start: u16, offset: u16) {
            let inside = usize::from(start) + usize::from(offset) + 2 <= frame.len();
            prop_assert_eq!(complete_partial(&mut frame, start, offset).is_ok(), inside);
            let (start, offset) = (start % 64, offset % 64);
            let inside = usize::from(start) + usize::from(offset) + 2 <= frame.len();
            prop_assert_eq!(complete_partial(&mut frame, start, offset).is_ok(), inside);
        }
    }
}
