//! TCP (RFC 9293) and UDP (RFC 768) headers: a checked view of the former, and where the fields are.

use super::ip::{PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, Transport};

/// Bytes of a TCP header without options.
pub const TCP_HEADER_LEN: usize = 20;
/// Bytes of a UDP header.
pub const UDP_HEADER_LEN: usize = 8;

/// Bytes from the start of a TCP header to its sequence number.
pub const TCP_SEQ_OFFSET: usize = 4;
/// Bytes from the start of a TCP header to its own length in words, in the upper half of the byte.
pub const TCP_DATA_OFFSET: usize = 12;
/// Bytes from the start of a TCP header to its flags.
pub const TCP_FLAGS_OFFSET: usize = 13;
/// Bytes from the start of a TCP header to its checksum.
pub const TCP_CSUM_OFFSET: u16 = 16;
/// Bytes from the start of a UDP header to its length.
pub const UDP_LENGTH_OFFSET: usize = 4;
/// Bytes from the start of a UDP header to its checksum.
pub const UDP_CSUM_OFFSET: u16 = 6;

/// TCP flag: no more data from the sender.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag: push.
pub const TCP_PSH: u8 = 0x08;
/// TCP flag: congestion window reduced (RFC 3168).
pub const TCP_CWR: u8 = 0x80;

/// A TCP header, options included, that lies inside its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Tcp<'a> {
    fixed: &'a [u8; TCP_HEADER_LEN],
}

impl<'a> Tcp<'a> {
    /// Reads the header at the start of `bytes`; `None` if the data offset is below 5 words or `bytes` end inside the
    /// header.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let tcp = Self { fixed: bytes.first_chunk()? };
        let len = tcp.header_len();
        (TCP_HEADER_LEN <= len && len <= bytes.len()).then_some(tcp)
    }

    /// Bytes of the header with its options: 20..=60.
    pub fn header_len(&self) -> usize {
        usize::from(self.fixed[TCP_DATA_OFFSET] >> 4) * 4
    }

    /// Sequence number of the first byte of data.
    pub fn seq(&self) -> u32 {
        let [_, _, _, _, a, b, c, d, ..] = *self.fixed;
        u32::from_be_bytes([a, b, c, d])
    }

    /// Sequence number of the next byte that the sender expects; means nothing without the flag ACK.
    pub fn ack(&self) -> u32 {
        let [_, _, _, _, _, _, _, _, a, b, c, d, ..] = *self.fixed;
        u32::from_be_bytes([a, b, c, d])
    }

    /// The eight flags from CWR (highest bit) to FIN.
    pub fn flags(&self) -> u8 {
        self.fixed[TCP_FLAGS_OFFSET]
    }
}

/// The length in bytes, 0..=60, that the TCP header at the start of `bytes` claims to have. `None` if `bytes` end before
/// it says so.
pub fn tcp_header_len(bytes: &[u8]) -> Option<usize> {
    bytes.get(TCP_DATA_OFFSET).map(|byte| usize::from(byte >> 4) * 4)
}

/// Source and destination port of the `transport` of `packet`, which starts with its IP header. `None` unless it is
/// TCP, UDP or SCTP and `packet` is long enough.
#[inline]
pub fn ports(packet: &[u8], transport: Transport) -> Option<(u16, u16)> {
    if !matches!(transport.protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP) {
        return None;
    }
    let [a, b, c, d] = *packet.get(transport.offset..)?.first_chunk()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::TcpHeader;
    use proptest::prelude::*;

    #[test]
    fn tcp_bad_headers() {
        let mut header = [0; 24];
        for (words, len, good) in [(5, 24, true), (6, 24, true), (7, 24, false), (4, 24, false), (5, 19, false)] {
            header[12] = words << 4;
            assert_eq!(Tcp::parse(&header[..len]).is_some(), good, "{words} words in {len} bytes");
        }
    }

    #[test]
    fn ports_of_the_three_protocols_that_have_them() {
        let packet = [0, 0, 0x12, 0x34, 0x56, 0x78];
        for protocol in 0..=255 {
            let expected = matches!(protocol, 6 | 17 | 132).then_some((0x1234, 0x5678));
            assert_eq!(ports(&packet, Transport { protocol, offset: 2 }), expected);
            assert_eq!(ports(&packet, Transport { protocol, offset: 3 }), None);
            assert_eq!(ports(&packet, Transport { protocol, offset: usize::MAX }), None);
        }
    }

    proptest! {
        #[test]
        fn tcp_agrees_with_etherparse(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let ours = Tcp::parse(&bytes).map(|tcp| (tcp.header_len(), tcp.seq(), tcp.ack()));
            let theirs = TcpHeader::from_slice(&bytes).ok().map(|(tcp, _)| (tcp.header_len(), tcp.sequence_number, tcp.acknowledgment_number));
            prop_assert_eq!(ours, theirs);
            if let Some((tcp, (theirs, _))) = Tcp::parse(&bytes).zip(TcpHeader::from_slice(&bytes).ok()) {
                let flag = |bit| tcp.flags() & bit != 0;
                prop_assert_eq!((flag(TCP_FIN), flag(TCP_PSH), flag(TCP_CWR)), (theirs.fin, theirs.psh, theirs.cwr));
            }
        }
    }
}
