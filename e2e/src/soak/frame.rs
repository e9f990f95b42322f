//! Frames that tell where they belong: one that is seen on another network, twice, or changed is noticed by whoever
//! receives it.

/// What a frame says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// Where it belongs: a network, or a VLAN of one.
    pub domain: u16,
    /// The sender's place in its domain, which gives its address.
    pub place: u16,
    /// The sender, and whom it is for: numbers that are given once in a soak. 0 is everybody.
    pub from: u32,
    /// See `from`.
    pub to: u32,
    /// Counts the frames from one to the other.
    pub number: u32,
}

const MAGIC: u32 = 0x51d0_50a6;
/// Bytes of a tag in a payload.
pub const TAG: usize = 28;

impl Tag {
    /// Appends a payload of `len` bytes (at least [`TAG`]).
    pub fn write(&self, len: usize, bytes: &mut Vec<u8>) {
        let len = len.max(TAG);
        let begin = bytes.len();
        let place = u32::from(self.domain) << 16 | u32::from(self.place);
        let words = [MAGIC, len as u32, place, self.from, self.to, self.number];
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend((sum(&words)).to_le_bytes());
        let mut filler = self.filler();
        while bytes.len() < begin + len {
            let next = filler.next().to_le_bytes();
            bytes.extend(&next[..next.len().min(begin + len - bytes.len())]);
        }
    }

    /// Reads a payload: `None` if it is not one of these, or no longer what was written.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let (words, rest) = payload.split_at_checked(TAG)?;
        let mut words = words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        let head: [u32; 6] = std::array::from_fn(|_| words.next().unwrap_or(0));
        let [magic, len, place, from, to, number] = head;
        if magic != MAGIC || len as usize != payload.len() || words.next() != Some(sum(&head)) {
            return None;
        }
        let tag = Self { domain: (place >> 16) as u16, place: place as u16, from, to, number };
        let mut filler = tag.filler();
        rest.chunks(8).all(|chunk| filler.next().to_le_bytes()[..chunk.len()] == *chunk).then_some(tag)
    }

    fn filler(&self) -> Filler {
        let seed = u64::from(self.from) << 32 ^ u64::from(self.to) << 40 ^ u64::from(self.number);
        Filler(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
}

fn sum(words: &[u32]) -> u32 {
    words.iter().fold(0x811c_9dc5, |sum, word| (sum ^ word).wrapping_mul(0x0100_0193).rotate_left(5))
}

/// Bytes that differ from frame to frame.
struct Filler(u64);

impl Filler {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_no_change_is_missed() {
        let tag = Tag { domain: 3, place: 2, from: 17, to: 0, number: 123_456 };
        for len in [0, TAG, TAG + 1, 60, 1400] {
            let mut bytes = Vec::new();
            tag.write(len, &mut bytes);
            assert_eq!(bytes.len(), len.max(TAG));
            assert_eq!(Tag::read(&bytes), Some(tag));
            assert_eq!(Tag::read(&bytes[..bytes.len() - 1]), None);
            for at in 0..bytes.len() {
                bytes[at] ^= 0x10;
                assert_eq!(Tag::read(&bytes), None, "byte {at} of {len}");
                bytes[at] ^= 0x10;
            }
        }
    }
}
