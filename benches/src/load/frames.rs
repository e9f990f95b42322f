//! What is sent: Ethernet frames with IPv4 and UDP, built once, and told apart by a mark.

use anyhow::{Result, ensure};
use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// Bytes of the virtio-net header before each frame (`VERSION_1`).
pub const HEADER: usize = 12;
/// Where in a buffer the time of sending is: in its first cache line.
pub const STAMP: usize = 56;
/// Where in a buffer the mark is.
pub const MARK: usize = 64;
/// Shortest frame that has room for the mark.
pub const SHORTEST: usize = MARK + 8 - HEADER;
/// Longest frame: a jumbo frame's MTU and an Ethernet header.
pub const LONGEST: usize = 9014;

/// Simple IMIX without the checksum at the end: 7 of 64 B, 4 of 590 B, 1 of 1514 B, spread out.
const IMIX: [usize; 12] = [64, 590, 64, 64, 590, 64, 1514, 64, 590, 64, 64, 590];
const MAGIC: u16 = 0x51ce;

/// Lengths of frames, in bytes without the checksum at their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// All alike.
    Fixed(usize),
    /// The mixture that stands for the internet.
    Imix,
}

impl Sizes {
    /// Length of the frame with this number.
    pub fn of(self, number: usize) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::Imix => IMIX[number % IMIX.len()],
        }
    }

    /// The longest of them.
    pub fn longest(self) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::Imix => 1514,
        }
    }
}

impl FromStr for Sizes {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.eq_ignore_ascii_case("imix") {
            return Ok(Self::Imix);
        }
        let size = text.parse()?;
        ensure!((SHORTEST..=LONGEST).contains(&size), "frames have {SHORTEST} to {LONGEST} bytes");
        Ok(Self::Fixed(size))
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Imix => f.write_str("imix"),
        }
    }
}

impl Serialize for Sizes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Who sent a frame, and which of the sender's it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The sending port.
    pub port: u16,
    /// Number of the frame among all that the port has.
    pub number: u32,
}

impl Mark {
    /// As it is found in a buffer, read as a little-endian number.
    pub fn word(self) -> u64 {
        u64::from(self.number) | u64::from(self.port) << 32 | u64::from(MAGIC) << 48
    }

    /// Reads one; nothing if this is no frame of ours.
    pub fn read(word: u64) -> Option<Self> {
        ((word >> 48) as u16 == MAGIC).then_some(Self { port: (word >> 32) as u16, number: word as u32 })
    }
}

/// Address of a station behind a port.
pub fn mac(port: u16, station: u32) -> [u8; 6] {
    let (port, station) = (port.to_be_bytes(), station.to_be_bytes());
    [0x02, port[0], port[1], station[1], station[2], station[3]]
}

/// What a port sends.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// The sending port.
    pub from: u16,
    /// The receiving port; nothing for broadcast.
    pub to: Option<u16>,
    /// Stations behind each port.
    pub stations: u32,
    /// UDP source ports per station.
    pub flows: u32,
    /// Lengths.
    pub sizes: Sizes,
}

impl Stream {
    /// The buffer with the frame of this number: header and frame.
    pub fn buffer(&self, number: u32) -> Vec<u8> {
        let size = self.sizes.of(number as usize);
        let station = number % self.stations;
        let flow = number / self.stations % self.flows;
        let mut bytes = vec![0; HEADER];
        bytes.extend(self.to.map_or([0xff; 6], |to| mac(to, station)));
        bytes.extend(mac(self.from, station));
        bytes.extend([0x08, 0x00]);
        bytes.extend(ipv4((size - 14) as u16, self.from, self.to.unwrap_or(u16::MAX), station));
        bytes.extend((1024 + (flow % 60_000) as u16).to_be_bytes());
        bytes.extend(9u16.to_be_bytes());
        bytes.extend(((size - 34) as u16).to_be_bytes());
        bytes.extend([0, 0]);
        bytes.resize(HEADER + size, 0x55);
        bytes[STAMP..STAMP + 8].fill(0);
        let mark = Mark { port: self.from, number };
        bytes[MARK..MARK + 8].copy_from_slice(&mark.word().to_le_bytes());
        bytes
    }
}

/// A header whose checksum is right; the address tells port and station.
fn ipv4(len: u16, from: u16, to: u16, station: u32) -> [u8; 20] {
    let mut header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&len.to_be_bytes());
    let station = (station as u16).to_be_bytes();
    header[12..16].copy_from_slice(&[10, from as u8, station[0], station[1]]);
    header[16..20].copy_from_slice(&[10, to as u8, station[0], station[1]]);
    let sum: u32 = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    header[10..12].copy_from_slice(&(!folded as u16).to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(sizes: Sizes) -> Stream {
        Stream { from: 2, to: Some(3), stations: 4, flows: 2, sizes }
    }

    #[test]
    fn frames_have_their_sizes_and_marks() {
        for sizes in [Sizes::Fixed(60), Sizes::Fixed(64), Sizes::Fixed(9014), Sizes::Imix] {
            for number in 0..24 {
                let buffer = stream(sizes).buffer(number);
                assert_eq!(buffer.len(), HEADER + sizes.of(number as usize));
                let word = u64::from_le_bytes(buffer[MARK..MARK + 8].try_into().unwrap());
                assert_eq!(Mark::read(word), Some(Mark { port: 2, number }));
            }
        }
        assert_eq!(Mark::read(0), None);
    }

    #[test]
    fn stations_and_flows_go_round() {
        let distinct = |from: usize, to: usize| {
            let all: std::collections::HashSet<_> = (0..64)
                .map(|number| stream(Sizes::Fixed(64)).buffer(number)[HEADER + from..HEADER + to].to_vec())
                .collect();
            all.len()
        };
        assert_eq!(distinct(0, 6), 4);
        assert_eq!(distinct(6, 12), 4);
        assert_eq!(distinct(0, 42), 8);
    }

    #[test]
    fn headers_add_up() {
        let buffer = stream(Sizes::Fixed(100)).buffer(5);
        let header = &buffer[HEADER + 14..HEADER + 34];
        let sum: u32 = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        assert_eq!(header[2..4], 86u16.to_be_bytes());
    }

    #[test]
    fn sizes_are_checked() {
        assert!("59".parse::<Sizes>().is_err());
        assert!("9015".parse::<Sizes>().is_err());
        assert_eq!("IMIX".parse::<Sizes>().unwrap(), Sizes::Imix);
        assert_eq!("1514".parse::<Sizes>().unwrap().to_string(), "1514");
    }
}
