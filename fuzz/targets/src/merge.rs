//! Segments of a wire merged into super-packets, and acknowledgements into the newest: no byte of data is lost, moved or
//! made up, and what a flow has acknowledged last arrives.

use arbitrary::{Arbitrary, Unstructured};
use sluice::frame::{Burst, BurstStorage};
use sluice::limits::BURST;
use sluice::mem::SourceSegment;
use sluice::switch::convert::{Accepts, Rebuilt};
use sluice::switch::gro::coalesce;
use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::ones_complement;

#[derive(Debug, Arbitrary)]
struct Input {
    shared: u64,
    tso4: bool,
    tso6: bool,
    frames: Vec<Frame>,
}

#[derive(Debug, Arbitrary)]
struct Frame {
    flow: u8,
    /// Where its data begins in the flow, if not right behind what was last.
    jump: Option<i16>,
    len: u16,
    flags: u8,
    /// A byte to spoil, and how.
    spoiled: Option<(u8, u8)>,
}

struct Tools {
    storage: BurstStorage,
    rebuilt: Rebuilt,
}

thread_local! {
    static TOOLS: RefCell<Tools> =
        RefCell::new(Tools { storage: BurstStorage::default(), rebuilt: Rebuilt::default() });
}

/// By flow (source and destination port): data in the order of delivery, and the last frame's acknowledgement.
type Streams = BTreeMap<[u8; 4], (Vec<(u32, Vec<u8>)>, [u8; 4])>;

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else { return };
    let (mut next, mut acks) = ([1u32; 4], [1u32; 4]);
    let frames: Vec<Vec<u8>> = input.frames.iter().take(BURST).map(|frame| frame.bytes(&mut next, &mut acks)).collect();
    let accepts = Accepts { csum: true, tso4: input.tso4, tso6: input.tso6, ..Accepts::default() };
    TOOLS.with_borrow_mut(|tools| {
        let mut burst = tools.storage.begin();
        for bytes in &frames {
            // Headers go into the head, data into the tail, as the receiver of a wire does it.
            let (head, tail) = bytes.split_at(header_len(bytes));
            let mut frame = burst.start(12);
            let pushed = frame.push(SourceSegment::from_slice(&[0; 12]))
                && frame.push(SourceSegment::from_slice(head))
                && frame.push_tail(SourceSegment::from_slice(tail));
            assert!(pushed && frame.finish().is_ok());
        }
        let mut places: Vec<u8> = (0..burst.count() as u8).collect();
        let kept = coalesce(&mut burst, &mut places, input.shared, accepts);
        assert!(kept <= frames.len());
        compare(&frames, &mut burst, &places[..kept], &mut tools.rebuilt);
    });
}

/// What is delivered, cut up again, is what came: in the same order within each flow.
fn compare(frames: &[Vec<u8>], burst: &mut Burst<'_>, places: &[u8], rebuilt: &mut Rebuilt) {
    let (mut before, mut after) = (Streams::new(), Streams::new());
    frames.iter().for_each(|bytes| note(&mut before, bytes));
    for &place in places {
        let frame = burst.frame(place);
        if frame.offload().gso.is_none() {
            let mut bytes = frame.head().to_vec();
            for piece in burst.tail(frame) {
                let at = bytes.len();
                bytes.resize(at + piece.len(), 0);
                piece.read(&mut bytes[at..]);
            }
            note(&mut after, &bytes);
            continue;
        }
        let converted = rebuilt.convert(burst, frame, Accepts::default(), |_, head, payload| {
            let bytes = [head, payload].concat();
            check_sum(&bytes);
            note(&mut after, &bytes);
            true
        });
        assert!(converted, "a merged frame cannot be cut up again");
    }
    assert_eq!(before, after);
}

fn note(streams: &mut Streams, bytes: &[u8]) {
    let headers = header_len(bytes);
    let l4 = if bytes[12] == 8 { 34 } else { 54 };
    let (mut flow, mut sequence, mut ack) = ([0; 4], [0; 4], [0; 4]);
    flow.copy_from_slice(&bytes[l4..l4 + 4]);
    sequence.copy_from_slice(&bytes[l4 + 4..l4 + 8]);
    ack.copy_from_slice(&bytes[l4 + 8..l4 + 12]);
    let (data, last_ack) = streams.entry(flow).or_default();
    // A newer acknowledgement may stand for those before it.
    if headers < bytes.len() || bytes[l4 + 13] != 0x10 {
        data.push((u32::from_be_bytes(sequence), bytes[headers..].to_vec()));
    }
    *last_ack = ack;
}

fn header_len(bytes: &[u8]) -> usize {
    if bytes[12] == 8 { 54 } else { 74 }
}

fn pseudo(bytes: &[u8], l4: usize) -> Vec<u8> {
    let addresses = if bytes[12] == 8 { 26..34 } else { 22..54 };
    let mut pseudo = bytes[addresses].to_vec();
    pseudo.extend(((bytes.len() - l4) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, 6]);
    pseudo
}

fn check_sum(bytes: &[u8]) {
    let l4 = header_len(bytes) - 20;
    assert_eq!(ones_complement(&[pseudo(bytes, l4), bytes[l4..].to_vec()].concat()), 0xffff);
}

impl Frame {
    fn bytes(&self, next: &mut [u32; 4], acks: &mut [u32; 4]) -> Vec<u8> {
        let place = usize::from(self.flow) % 4;
        let len = usize::from(self.len) % 1460;
        let sequence = next[place].wrapping_add(self.jump.unwrap_or(0) as u32);
        next[place] = sequence.wrapping_add(len as u32);
        acks[place] = acks[place].wrapping_add(u32::from(self.flags >> 4) << 24);
        let v6 = place >= 2;
        let mut bytes = vec![2; 12];
        if v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend((20 + len as u16).to_be_bytes());
            bytes.extend([6, 64]);
            bytes.extend(0..32);
        } else {
            bytes.extend([8, 0, 0x45, 0]);
            bytes.extend((40 + len as u16).to_be_bytes());
            bytes.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = !ones_complement(&bytes[14..34]);
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let l4 = bytes.len();
        bytes.extend([1, place as u8, 0, 80]);
        bytes.extend(sequence.to_be_bytes());
        bytes.extend(acks[place].to_be_bytes());
        bytes.extend([0x50, 0x10 | (self.flags & 0x09), 0xff, 0xff, 0, 0, 0, 0]);
        bytes.extend((0..len).map(|at| (sequence as usize + at) as u8));
        let sum = !ones_complement(&[pseudo(&bytes, l4), bytes[l4..].to_vec()].concat());
        bytes[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
        if let Some((at, how)) = self.spoiled {
            // Anything but what tells the headers apart.
            let at = l4 + 4 + usize::from(at) % (bytes.len() - l4 - 4);
            if at != l4 + 12 {
                bytes[at] ^= how;
            }
        }
        bytes
    }
}
