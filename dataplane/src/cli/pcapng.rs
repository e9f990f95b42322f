//! The capture file format pcapng (draft-ietf-opsawg-pcapng), as much of it as a capture of one port needs.

use std::io::{Result, Write};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const ETHERNET: u16 = 1;

const OPT_COMMENT: u16 = 1;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const ISB_IFDROP: u16 = 5;
/// Value of `if_tsresol`: ten to the minus ninth.
const NANOSECONDS: u8 = 9;

/// One frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet<'a> {
    /// Nanoseconds since 1970.
    pub(crate) time_ns: u64,
    /// From the port to the switch.
    pub(crate) inbound: bool,
    /// For people.
    pub(crate) comment: Option<&'a str>,
    /// Length on the wire.
    pub(crate) length: u32,
    /// What was kept of it.
    pub(crate) data: &'a [u8],
}

/// A capture file that is being written. Every block is whole when it returns.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// Begins a file for the frames of one interface.
    pub(crate) fn new(mut out: W, interface: &str, snap_length: u32) -> Result<Self> {
        let mut section = Vec::new();
        section.extend(BYTE_ORDER.to_ne_bytes());
        section.extend([1u16, 0].map(u16::to_ne_bytes).concat());
        // Its length is not known.
        section.extend(u64::MAX.to_ne_bytes());
        option(&mut section, SHB_USERAPPL, concat!("sluice ", env!("CARGO_PKG_VERSION")).as_bytes());
        end_options(&mut section);
        block(&mut out, SECTION, &section)?;

        let mut body = Vec::new();
        body.extend([ETHERNET, 0].map(u16::to_ne_bytes).concat());
        body.extend(snap_length.to_ne_bytes());
        option(&mut body, IF_NAME, interface.as_bytes());
        option(&mut body, IF_TSRESOL, &[NANOSECONDS]);
        end_options(&mut body);
        block(&mut out, INTERFACE, &body)?;
        Ok(Self { out })
    }

    /// Adds a frame.
    pub(crate) fn packet(&mut self, packet: &Packet<'_>) -> Result<()> {
        let mut body = Vec::with_capacity(packet.data.len() + 64);
        body.extend(0u32.to_ne_bytes());
        time(&mut body, packet.time_ns);
        body.extend((packet.data.len() as u32).to_ne_bytes());
        body.extend(packet.length.to_ne_bytes());
        body.extend(packet.data);
        pad(&mut body);
        let direction: u32 = if packet.inbound { 1 } else { 2 };
        option(&mut body, EPB_FLAGS, &direction.to_ne_bytes());
        if let Some(comment) = packet.comment {
            option(&mut body, OPT_COMMENT, comment.as_bytes());
        }
        end_options(&mut body);
        block(&mut self.out, PACKET, &body)
    }

    /// Ends with what was not seen.
    pub(crate) fn statistics(&mut self, time_ns: u64, lost: u64) -> Result<()> {
        let mut body = Vec::new();
        body.extend(0u32.to_ne_bytes());
        time(&mut body, time_ns);
        option(&mut body, ISB_IFDROP, &lost.to_ne_bytes());
        end_options(&mut body);
        block(&mut self.out, STATISTICS, &body)
    }

    /// Brings what was written to its place.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }
}

fn time(body: &mut Vec<u8>, ns: u64) {
    body.extend(((ns >> 32) as u32).to_ne_bytes());
    body.extend((ns as u32).to_ne_bytes());
}

fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_ne_bytes());
    body.extend((value.len() as u16).to_ne_bytes());
    body.extend(value);
    pad(body);
}

fn end_options(body: &mut Vec<u8>) {
    body.extend([0; 4]);
}

fn block(out: &mut impl Write, kind: u32, body: &[u8]) -> Result<()> {
    let length = (body.len() as u32 + 12).to_ne_bytes();
    out.write_all(&[&kind.to_ne_bytes()[..], &length, body, &length].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks by their framing: kind and body.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, &[u8])> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            let (kind, length) = (word(0), word(4) as usize);
            assert!(length.is_multiple_of(4) && word(length - 4) as usize == length);
            all.push((kind, &bytes[8..length - 4]));
            bytes = &bytes[length..];
        }
        all
    }

    #[test]
    fn blocks_are_framed() {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, "up", 96).unwrap();
        let packet =
            Packet { time_ns: 5 << 32 | 7, inbound: true, comment: Some("dropped"), length: 100, data: &[1; 5] };
        writer.packet(&packet).unwrap();
        writer.packet(&Packet { inbound: false, comment: None, data: &[], ..packet }).unwrap();
        writer.statistics(9, 3).unwrap();
        writer.flush().unwrap();
        let blocks = blocks(&file);
        assert_eq!(
            blocks.iter().map(|block| block.0).collect::<Vec<_>>(),
            [SECTION, INTERFACE, PACKET, PACKET, STATISTICS]
        );
        let packet = blocks[2].1;
        let words: Vec<u32> = packet.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words[..5], [0, 5, 7, 5, 100]);
        assert_eq!(packet[20..28], [1, 1, 1, 1, 1, 0, 0, 0]);
        let option = |code: u16, len: u16| {
            u32::from_ne_bytes([code.to_ne_bytes(), len.to_ne_bytes()].concat().try_into().unwrap())
        };
        assert_eq!(words[7..10], [option(EPB_FLAGS, 4), 1, option(OPT_COMMENT, 7)]);
        assert_eq!(packet[40..], *b"dropped\0\0\0\0\0");
    }
}
