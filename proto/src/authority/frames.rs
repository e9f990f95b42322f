//! HTTP/2 frames, as far as it takes to find the header blocks in a client's bytes (RFC 9113).

use std::io;

use super::hpack::HeaderRewriter;

/// What every client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame's header.
const HEAD: usize = 9;
/// Largest payload: our side never announces more than the protocol's default.
const MAX_PAYLOAD: usize = 16 * 1024;
/// Largest header block; hyper takes 16 KiB of headers by default.
const MAX_BLOCK: usize = 64 * 1024;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Length of the priority fields of a HEADERS frame.
const PRIORITY_FIELDS: usize = 5;

/// Rewrites a client's bytes as they come in.
#[derive(Debug, Default)]
pub(super) struct Rewriter {
    /// Bytes that do not yet make a whole of anything.
    input: Vec<u8>,
    /// Whether the preface has been seen.
    greeted: bool,
    /// Bytes left of a frame that passes as it is.
    passing: usize,
    /// The header block that is being collected.
    block: Option<Block>,
    headers: HeaderRewriter,
}

/// A header block, possibly spread over several frames.
#[derive(Debug)]
struct Block {
    stream: [u8; 4],
    end_stream: u8,
    priority: Vec<u8>,
    fragments: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: [u8; 4],
}

impl Head {
    fn parse(bytes: [u8; HEAD]) -> Self {
        let [a, b, c, kind, flags, stream @ ..] = bytes;
        Self { length: u32::from_be_bytes([0, a, b, c]) as usize, kind, flags, stream }
    }

    fn write(self, output: &mut Vec<u8>) {
        let [_, length @ ..] = (self.length as u32).to_be_bytes();
        output.extend(length);
        output.extend([self.kind, self.flags]);
        output.extend(self.stream);
    }
}

impl Rewriter {
    /// Takes bytes of the client and appends to `output` what can be passed on.
    ///
    /// # Errors
    /// If they are not what a client of HTTP/2 sends. Nothing more can come out then.
    pub(super) fn push(&mut self, bytes: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut rest = input.as_slice();
        while let Some(after) = self.step(rest, output)? {
            rest = after;
        }
        self.input = rest.to_vec();
        Ok(())
    }

    /// Deals with the next thing in `input` and gives what follows it, or `None` if more bytes are needed.
    fn step<'a>(&mut self, input: &'a [u8], output: &mut Vec<u8>) -> io::Result<Option<&'a [u8]>> {
        if !self.greeted {
            return self.greet(input, output);
        }
        if self.passing > 0 {
            let count = self.passing.min(input.len());
            output.extend_from_slice(&input[..count]);
            self.passing -= count;
            return Ok((count > 0).then(|| &input[count..]));
        }
        let Some((head_bytes, after)) = input.split_first_chunk::<HEAD>() else { return Ok(None) };
        let head = Head::parse(*head_bytes);
        if head.length > MAX_PAYLOAD {
            return Err(malformed("a frame is too long"));
        }
        if head.kind != HEADERS && self.block.is_none() {
            output.extend_from_slice(head_bytes);
            self.passing = head.length;
            return Ok(Some(after));
        }
        let Some((payload, after)) = after.split_at_checked(head.length) else { return Ok(None) };
        self.collect(head, payload, output)?;
        Ok(Some(after))
    }

    fn greet<'a>(&mut self, input: &'a [u8], output: &mut Vec<u8>) -> io::Result<Option<&'a [u8]>> {
        let seen = input.len().min(PREFACE.len());
        if input[..seen] != PREFACE[..seen] {
            return Err(malformed("it does not begin like HTTP/2"));
        }
        if seen < PREFACE.len() {
            return Ok(None);
        }
        self.greeted = true;
        output.extend_from_slice(PREFACE);
        Ok(Some(&input[seen..]))
    }

    /// Takes one frame of a header block, and passes the block on when it is whole.
    fn collect(&mut self, head: Head, payload: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
        let mut block = match (self.block.take(), head.kind) {
            (None, HEADERS) => Block::begin(head, payload)?,
            (Some(mut block), CONTINUATION) if block.stream == head.stream => {
                block.fragments.extend_from_slice(payload);
                block
            }
            _ => return Err(malformed("a header block is interrupted")),
        };
        if block.fragments.len() > MAX_BLOCK {
            return Err(malformed("a header block is too long"));
        }
        if head.flags & END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(());
        }
        block.fragments =
            self.headers.rewrite(&block.fragments).ok_or_else(|| malformed("a header block is garbled"))?;
        block.write(output);
        Ok(())
    }
}

impl Block {
    /// The start of a block: a HEADERS frame without its padding.
    fn begin(head: Head, payload: &[u8]) -> io::Result<Self> {
        let short = || malformed("a header frame is too short");
        let mut rest = payload;
        if head.flags & PADDED != 0 {
            let (&padding, after) = rest.split_first().ok_or_else(short)?;
            rest = after.len().checked_sub(padding.into()).map(|length| &after[..length]).ok_or_else(short)?;
        }
        let priority = if head.flags & PRIORITY != 0 { PRIORITY_FIELDS } else { 0 };
        let (priority, fragment) = rest.split_at_checked(priority).ok_or_else(short)?;
        Ok(Self {
            stream: head.stream,
            end_stream: head.flags & END_STREAM,
            priority: priority.to_vec(),
            fragments: fragment.to_vec(),
        })
    }

    /// The block as one HEADERS frame and as many CONTINUATION frames as it needs.
    fn write(&self, output: &mut Vec<u8>) {
        let first = self.fragments.len().min(MAX_PAYLOAD - self.priority.len());
        let (first, rest) = self.fragments.split_at(first);
        let end = |is_last| if is_last { END_HEADERS } else { 0 };
        let priority = if self.priority.is_empty() { 0 } else { PRIORITY };
        let flags = self.end_stream | priority | end(rest.is_empty());
        let length = self.priority.len() + first.len();
        Head { length, kind: HEADERS, flags, stream: self.stream }.write(output);
        output.extend_from_slice(&self.priority);
        output.extend_from_slice(first);
        let mut pieces = rest.chunks(MAX_PAYLOAD).peekable();
        while let Some(piece) = pieces.next() {
            let flags = end(pieces.peek().is_none());
            Head { length: piece.len(), kind: CONTINUATION, flags, stream: self.stream }.write(output);
            output.extend_from_slice(piece);
        }
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("this is no HTTP/2 client: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `:method POST`, `:authority /a/b.sock` to be remembered.
    const BLOCK: &[u8] = b"\x83\x41\x09/a/b.sock";
    const REWRITTEN: &[u8] = b"\x83\x41\x01u";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        Head { length: payload.len(), kind, flags, stream: [0, 0, 0, 1] }.write(&mut bytes);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Pushes in pieces of every size; the result must not depend on it.
    fn rewrite(frames: &[Vec<u8>]) -> io::Result<Vec<u8>> {
        let bytes = [PREFACE, &frames.concat()].concat();
        let with = |size| {
            let (mut rewriter, mut output) = (Rewriter::default(), Vec::new());
            bytes.chunks(size).try_for_each(|piece| rewriter.push(piece, &mut output))?;
            Ok::<_, io::Error>(output)
        };
        let whole = with(bytes.len());
        for size in 1..40.min(bytes.len()) {
            assert_eq!(with(size).ok(), whole.as_ref().ok().cloned(), "in pieces of {size}");
        }
        whole.map(|output| output[PREFACE.len()..].to_vec())
    }

    #[test]
    fn other_frames_pass_as_they_are() {
        let frames = [frame(4, 0, &[0, 3, 0, 0, 0, 1]), frame(0, 1, &[7; 700]), frame(6, 0, b"01234567")];
        assert_eq!(rewrite(&frames).unwrap(), frames.concat());
    }

    #[test]
    fn a_block_in_one_frame_is_rewritten() {
        let after = frame(0, END_STREAM, b"data");
        let output = rewrite(&[frame(HEADERS, END_HEADERS, BLOCK), after.clone()]).unwrap();
        assert_eq!(output, [frame(HEADERS, END_HEADERS, REWRITTEN), after].concat());
    }

    #[test]
    fn padding_goes_and_priority_stays() {
        let payload = [&[2][..], b"prior", BLOCK, &[0, 0]].concat();
        let flags = END_HEADERS | END_STREAM | PADDED | PRIORITY;
        let output = rewrite(&[frame(HEADERS, flags, &payload)]).unwrap();
        let expected = [b"prior", REWRITTEN].concat();
        assert_eq!(output, frame(HEADERS, END_HEADERS | END_STREAM | PRIORITY, &expected));
    }

    #[test]
    fn a_block_in_pieces_is_joined() {
        let (a, rest) = BLOCK.split_at(2);
        let (b, c) = rest.split_at(4);
        let frames = [frame(HEADERS, 0, a), frame(CONTINUATION, 0, b), frame(CONTINUATION, END_HEADERS, c)];
        assert_eq!(rewrite(&frames).unwrap(), frame(HEADERS, END_HEADERS, REWRITTEN));
    }

    #[test]
    fn a_long_block_is_split_again() {
        // A literal of 20000 bytes: name "x", length 127 + 19873.
        let long = [b"\x00\x01x\x7f\xa1\x9b\x01".as_slice(), &[b'y'; 20000]].concat();
        let (a, b) = long.split_at(16000);
        let output = rewrite(&[frame(HEADERS, 0, a), frame(CONTINUATION, END_HEADERS, b)]).unwrap();
        let (a, b) = long.split_at(MAX_PAYLOAD);
        assert_eq!(output, [frame(HEADERS, 0, a), frame(CONTINUATION, END_HEADERS, b)].concat());
    }

    #[test]
    fn what_no_client_sends_is_an_error() {
        assert!(Rewriter::default().push(b"GET / HTTP/1.1\r\n", &mut Vec::new()).is_err());
        let too_long = Head { length: MAX_PAYLOAD + 1, kind: 0, flags: 0, stream: [0; 4] };
        let mut bytes = Vec::new();
        too_long.write(&mut bytes);
        assert!(rewrite(&[bytes]).is_err());
        assert!(rewrite(&[frame(HEADERS, 0, BLOCK), frame(0, 0, b"data")]).is_err(), "interrupted");
        assert!(rewrite(&[frame(HEADERS, END_HEADERS, b"\x41\x09/a")]).is_err(), "cut off");
        assert!(rewrite(&[frame(HEADERS, END_HEADERS | PADDED, &[9, 0])]).is_err(), "more padding than frame");
        assert!(rewrite(&[frame(HEADERS, END_HEADERS | PRIORITY, b"pri")]).is_err(), "no room for priority");
        let endless: Vec<_> =
            (0..6).map(|i| frame(if i == 0 { HEADERS } else { CONTINUATION }, 0, &[0; 16000])).collect();
        assert!(rewrite(&endless).is_err());
    }
}
