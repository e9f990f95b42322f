//! Header blocks, as far as it takes to replace the value of `:authority` (RFC 7541).
//!
//! No value needs to be decoded, and the compression state needs no change: the stand-in is never longer than what it
//! replaces, so the receiver's table keeps at least the entries that the sender's keeps, at the same places.

use std::collections::VecDeque;

/// What every authority becomes: of one letter, so that it is never longer than what was there.
const STAND_IN: &[u8] = b"\x01u";
/// The name, as it is and in Huffman's code.
const NAME: &[u8] = b":authority";
const NAME_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Its place in the static table.
const NAME_INDEX: usize = 1;
/// Entries of the static table; the dynamic one comes after it.
const STATIC_ENTRIES: usize = 61;
/// Entries that the dynamic table can have: 4096 bytes (the protocol's default, which our side never raises) of at
/// least 32 each.
const DYNAMIC_ENTRIES: usize = 128;

/// Rewrites the header blocks of one connection, in order.
#[derive(Debug, Default)]
pub(super) struct HeaderRewriter {
    /// For each entry of the dynamic table, newest first, whether its name is `:authority`.
    dynamic: VecDeque<bool>,
}

impl HeaderRewriter {
    /// The block with every non-empty authority replaced; `None` if it is malformed.
    pub(super) fn rewrite(&mut self, block: &[u8]) -> Option<Vec<u8>> {
        let mut output = Vec::with_capacity(block.len());
        let mut rest = Reader(block);
        while let Some(&first) = rest.0.first() {
            let start = rest.0;
            let remembered = first & 0xc0 == 0x40;
            let name_bits = match first {
                // A whole entry of a table, or a change of the table's size: nothing to replace.
                0x80.. => {
                    rest.number(7)?;
                    output.extend_from_slice(rest.since(start));
                    continue;
                }
                0x20..=0x3f => {
                    rest.number(5)?;
                    output.extend_from_slice(rest.since(start));
                    continue;
                }
                _ if remembered => 6,
                _ => 4,
            };
            let is_authority = match rest.number(name_bits)? {
                0 => matches!(rest.string()?, (false, NAME) | (true, NAME_HUFFMAN)),
                index => self.is_authority(index),
            };
            output.extend_from_slice(rest.since(start));
            let start = rest.0;
            let (_, value) = rest.string()?;
            let replace = is_authority && !value.is_empty();
            output.extend_from_slice(if replace { STAND_IN } else { rest.since(start) });
            if remembered {
                self.dynamic.push_front(is_authority);
                self.dynamic.truncate(DYNAMIC_ENTRIES);
            }
        }
        Some(output)
    }

    fn is_authority(&self, index: usize) -> bool {
        let dynamic = |index: usize| self.dynamic.get(index).copied().unwrap_or(false);
        index == NAME_INDEX || index.checked_sub(STATIC_ENTRIES + 1).is_some_and(dynamic)
    }
}

/// What is left to read of a block.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// What has been read since `start` was left.
    fn since(&self, start: &'a [u8]) -> &'a [u8] {
        &start[..start.len() - self.0.len()]
    }

    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    /// A number in the last `bits` of the next byte, and in more bytes if it does not fit (section 5.1).
    fn number(&mut self, bits: u32) -> Option<usize> {
        let limit = (1 << bits) - 1;
        let mut value = usize::from(self.byte()?) & limit;
        if value < limit {
            return Some(value);
        }
        // Four bytes are 2^28, more than any block.
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A string (section 5.2), and whether it is in Huffman's code.
    fn string(&mut self) -> Option<(bool, &'a [u8])> {
        let huffman = self.0.first()? & 0x80 != 0;
        let length = self.number(7)?;
        let (string, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some((huffman, string))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn once(block: &[u8]) -> Option<Vec<u8>> {
        HeaderRewriter::default().rewrite(block)
    }

    #[test]
    fn every_way_to_write_the_name_is_found() {
        // By index: remembered, not remembered, never to be remembered.
        for first in [0x41, 0x01, 0x11] {
            assert_eq!(once(&[&[first, 4][..], b"/tmp"].concat()).unwrap(), [first, 1, b'u']);
        }
        // By letters, plain and coded.
        for name in [&[&[10], NAME].concat(), &[&[0x88], NAME_HUFFMAN].concat()] {
            let head = [&[0x40], name.as_slice()].concat();
            assert_eq!(once(&[&head, b"\x04/tmp".as_slice()].concat()).unwrap(), [&head, STAND_IN].concat());
        }
        // A coded value.
        assert_eq!(once(&[0x41, 0x82, 0x60, 0xff]).unwrap(), [0x41, 1, b'u']);
    }

    #[test]
    fn a_remembered_name_is_found_at_its_place() {
        let mut headers = HeaderRewriter::default();
        headers.rewrite(b"\x41\x04/tmp").unwrap();
        // 62 is the newest entry; a newer one ("x: y") moves it to 63.
        assert_eq!(headers.rewrite(b"\x0f\x2f\x05/tmp2").unwrap(), b"\x0f\x2f\x01u");
        headers.rewrite(b"\x40\x01x\x01y").unwrap();
        assert_eq!(headers.rewrite(b"\x0f\x2f\x05/tmp2").unwrap(), b"\x0f\x2f\x05/tmp2");
        assert_eq!(headers.rewrite(b"\x0f\x30\x05/tmp2").unwrap(), b"\x0f\x30\x01u");
    }

    #[test]
    fn nothing_else_is_touched() {
        // Size update, indexed fields, :path, an empty authority, a name that only resembles.
        let block = b"\x3f\xe1\x1f\x83\xbe\x44\x05/path\x01\x00\x00\x0a:authoritz\x04/tmp";
        assert_eq!(once(block).unwrap(), block);
    }

    #[test]
    fn a_garbled_block_is_refused() {
        for block in [&b"\x41"[..], b"\x41\x05/tmp", b"\xff\xff\xff\xff\xff\xff", b"\x40\x0a:auth", b"\x3f"] {
            assert_eq!(once(block), None, "{block:x?}");
        }
    }
}
