//! Packed rings against a driver that follows the specification, and against some that do not.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::chain::Direction;
use super::packed::PackedRing;
use super::ring::{Ahead, Ring, Work};
use super::{Fault, RingConfig, RingError};
use crate::mem::tests::memfd;
use crate::mem::{GuestMemory, Region};
use crate::testing::{INDIRECT, NEXT, WRITE};

const MEMORY: u64 = 1 << 20;
const UVA: u64 = 0x7f00_0000_0000;
const DRIVER_EVENT: u64 = 0x8000;
const DEVICE_EVENT: u64 = 0x8100;
const TABLES: u64 = 0x9000;
const BUFFERS: u64 = 0x1_0000;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A driver (virtio 1.2, 2.8.21), one descriptor at a time.
pub(super) struct Driver {
    pub(super) file: std::fs::File,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) size: u16,
    pub(super) next: (u16, bool),
    pub(super) used: (u16, bool),
    pub(super) free: u16,
    /// Chains out: id, slots.
    pub(super) out: VecDeque<(u16, u16)>,
    pub(super) id: u16,
}

impl Driver {
    pub(super) fn new(size: u16) -> Self {
        let file = memfd(MEMORY);
        let region = Region::map(file.try_clone().unwrap(), 0, MEMORY, UVA, 0).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region]).unwrap());
        Self { file, memory, size, next: (0, true), used: (0, true), free: size, out: VecDeque::new(), id: 0 }
    }

    pub(super) fn config(&self, event_idx: bool) -> RingConfig {
        let (desc, avail, used) = (UVA + 0x1000, UVA + DRIVER_EVENT, UVA + DEVICE_EVENT);
        RingConfig { size: self.size.into(), desc, avail, used, event_idx, indirect: true, packed: true, log: None }
    }

    fn ring(&self) -> PackedRing {
        PackedRing::new(&self.config(true), self.memory.clone(), 0x8000).unwrap()
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    pub(super) fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn slot(&self, slot: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.put(0x1000 + 16 * u64::from(slot), &bytes);
    }

    fn advance(&self, at: (u16, bool), by: u16) -> (u16, bool) {
        let slot = at.0 + by;
        if slot >= self.size { (slot - self.size, !at.1) } else { (slot, at.1) }
    }

    fn mark(wrap: bool) -> u16 {
        if wrap { AVAIL } else { USED }
    }

    /// Posts a chain of buffers of these lengths; `false` if there is no room.
    pub(super) fn post(&mut self, lengths: &[u32], indirect: bool, flags: u16) -> bool {
        let slots = if indirect { 1 } else { lengths.len() as u16 };
        if slots > self.free {
            return false;
        }
        let id = self.id;
        self.id = (self.id + 1) % self.size;
        if indirect {
            let table = TABLES + u64::from(id) * 64;
            for (index, len) in lengths.iter().enumerate() {
                let mut entry = BUFFERS.to_le_bytes().to_vec();
                entry.extend(len.to_le_bytes());
                // The id of an entry means nothing, nor does its next flag.
                entry.extend(0xffffu16.to_le_bytes());
                entry.extend((flags | NEXT).to_le_bytes());
                self.put(table + 16 * index as u64, &entry);
            }
            self.slot(self.next.0, table, 16 * lengths.len() as u32, id, INDIRECT | Self::mark(self.next.1));
        } else {
            // The first one last.
            for (index, len) in lengths.iter().enumerate().rev() {
                let (slot, wrap) = self.advance(self.next, index as u16);
                let next = if index + 1 < lengths.len() { NEXT } else { 0 };
                self.slot(slot, BUFFERS, *len, id, flags | next | Self::mark(wrap));
            }
        }
        self.next = self.advance(self.next, slots);
        self.free -= slots;
        self.out.push_back((id, slots));
        true
    }

    /// Takes back what was used: lengths, in order.
    pub(super) fn reap(&mut self) -> Vec<u32> {
        let mut lengths = Vec::new();
        loop {
            let bytes: [u8; 16] = self.get(0x1000 + 16 * u64::from(self.used.0));
            let flags = u16::from_le_bytes([bytes[14], bytes[15]]);
            let is = |bit| flags & bit != 0;
            if is(AVAIL) != self.used.1 || is(USED) != self.used.1 {
                return lengths;
            }
            let (id, slots) = self.out.pop_front().expect("only what was posted comes back");
            assert_eq!(u16::from_le_bytes([bytes[12], bytes[13]]), id, "chains come back in order");
            lengths.push(u32::from_le_bytes(bytes[8..12].try_into().unwrap()));
            self.used = self.advance(self.used, slots);
            self.free += slots;
        }
    }
}

#[test]
fn one_after_the_other() {
    let mut driver = Driver::new(4);
    let ring = driver.ring();
    for round in 0..10u32 {
        assert!(driver.post(&[100 + round], false, 0));
        let mut work = ring.lock(Direction::FromGuest);
        let mut ahead = Ahead::default();
        work.look_ahead(&mut ahead, 32).unwrap();
        let (chain, buffer) = work.take_ahead(&ahead).unwrap();
        assert_eq!(buffer.len(), 100 + round as usize);
        assert!(work.take_ahead(&ahead).is_none() && work.take(|_| ()).unwrap().is_none());
        work.complete(chain, round);
        assert!(work.publish() && !work.publish());
        drop(work);
        assert_eq!(driver.reap(), [round]);
    }
    let (slot, wrap) = (2, true);
    assert_eq!(ring.base(), slot | u32::from(wrap) << 15 | slot << 16 | u32::from(wrap) << 31);
    assert_eq!(ring.moved_to(driver.memory.clone()).unwrap().base(), ring.base());
}

/// A frame in several buffers is seen as a whole or not at all, however many came before it in the burst.
#[test]
fn a_frame_becomes_visible_at_once() {
    let mut driver = Driver::new(256);
    let ring = driver.ring();
    for index in 0..130u32 {
        assert!(driver.post(&[100], false, WRITE), "{index}");
    }
    let mut work = ring.lock(Direction::ToGuest);
    let complete = |work: &mut <PackedRing as Ring>::Work<'_>, count: usize| {
        let chains: Vec<_> = (0..count).map(|_| work.take(|_| ()).unwrap().unwrap().0).collect();
        work.begin_frame(count);
        chains.into_iter().for_each(|chain| work.complete(chain, 1));
    };
    let mut seen = 0;
    for (frame, before) in [(43, 0), (43, 43), (work.most_chains().min(44), 86)] {
        complete(&mut work, frame);
        seen += driver.reap().len();
        assert_eq!(seen, before, "of frames before the one at hand");
    }
    assert!(work.publish());
    assert_eq!(seen + driver.reap().len(), 130);
}

#[test]
fn chains_that_break_rules() {
    let fault = |slots: &[(u64, u32, u16)]| {
        let driver = Driver::new(4);
        for (index, (addr, len, flags)) in slots.iter().enumerate() {
            driver.slot(index as u16, *addr, *len, 0, flags | AVAIL);
        }
        driver.ring().lock(Direction::FromGuest).take(|_| ()).unwrap_err()
    };
    assert_eq!(fault(&[(BUFFERS, 4, WRITE)]), Fault::WrongDirection);
    assert_eq!(fault(&[(MEMORY - 1, 2, 0)]), Fault::UnmappedAddress);
    assert_eq!(fault(&[(u64::MAX, 2, 0)]), Fault::UnmappedAddress);
    assert_eq!(fault(&[(TABLES, 15, INDIRECT)]), Fault::IndirectLength);
    assert_eq!(fault(&[(TABLES, 16, INDIRECT | NEXT)]), Fault::BadIndirect);
    assert_eq!(fault(&[(BUFFERS, 4, NEXT), (TABLES, 16, INDIRECT)]), Fault::BadIndirect);
    assert_eq!(fault(&[(BUFFERS, 4, NEXT)]), Fault::DescriptorIndex);
    let endless = [(BUFFERS, 4, NEXT); 4];
    // The fifth would be the first again, of the next round.
    assert_eq!(fault(&endless), Fault::ChainLoop);
}

#[test]
fn a_place_and_a_base_are_checked() {
    let driver = Driver::new(4);
    let with = |change: fn(&mut RingConfig), base| {
        let mut config = driver.config(true);
        change(&mut config);
        PackedRing::new(&config, driver.memory.clone(), base).map(drop)
    };
    assert_eq!(with(|_| (), 3), Ok(()));
    assert_eq!(with(|_| (), 4), Err(RingError::Base(4)));
    assert_eq!(with(|config| config.size = 3, 2), Ok(()));
    assert_eq!(with(|config| config.size = 40_000, 0), Err(RingError::Size(40_000)));
    assert_eq!(with(|config| config.desc += MEMORY, 0), Err(RingError::Unmapped("descriptor")));
    assert_eq!(with(|config| config.avail = UVA + MEMORY - 2, 0), Err(RingError::Unmapped("driver event")));
    assert_eq!(with(|config| config.used += 1, 0), Err(RingError::Unaligned("device event")));
}

#[test]
fn notifies_as_asked() {
    let mut driver = Driver::new(4);
    let ring = driver.ring();
    let one = |ring: &PackedRing, driver: &mut Driver| {
        assert!(driver.post(&[64], false, 0));
        let mut work = ring.lock(Direction::FromGuest);
        let (chain, _) = work.take(|_| ()).unwrap().unwrap();
        work.complete(chain, 0);
        work.publish();
        let wanted = work.needs_notification();
        drop(work);
        driver.reap();
        wanted
    };
    assert!(one(&ring, &mut driver), "always");
    driver.put(DRIVER_EVENT + 2, &1u16.to_le_bytes());
    assert!(!one(&ring, &mut driver), "never");
    // At the fourth slot of this round.
    driver.put(DRIVER_EVENT, &(3u16 | 1 << 15).to_le_bytes());
    driver.put(DRIVER_EVENT + 2, &2u16.to_le_bytes());
    assert!(!one(&ring, &mut driver));
    assert!(one(&ring, &mut driver));
    assert!(!one(&ring, &mut driver));
}

#[test]
fn arming_sees_what_came_before() {
    let mut driver = Driver::new(4);
    let ring = driver.ring();
    ring.silence();
    assert_eq!(driver.get::<2>(DEVICE_EVENT + 2), [1, 0]);
    assert!(!ring.enable_notification());
    assert_eq!(driver.get::<4>(DEVICE_EVENT), [0, 0x80, 2, 0]);
    driver.post(&[64], false, 0);
    assert!(ring.enable_notification());
}

#[derive(Debug, Clone)]
enum Step {
    Post(Vec<u32>, bool),
    /// Take up to so many, give back so many of them, complete the rest.
    Serve(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (proptest::collection::vec(1u32..3000, 1..4), any::<bool>()).prop_map(|(l, i)| Step::Post(l, i)),
        2 => (0u8..80, 0u8..4).prop_map(|(take, back)| Step::Serve(take, back)),
    ]
}

proptest! {
    /// Whatever the order of posting, taking, giving back and completing, each chain is seen whole and once, in order.
    #[test]
    fn agrees_with_a_queue(size in 1u16..140, steps in proptest::collection::vec(step(), 1..200)) {
        let mut driver = Driver::new(size);
        let ring = driver.ring();
        let mut posted: VecDeque<u32> = VecDeque::new();
        for step in steps {
            match step {
                Step::Post(lengths, indirect) => {
                    if driver.post(&lengths, indirect, 0) {
                        posted.push_back(lengths.iter().sum());
                    }
                }
                Step::Serve(take, back) => {
                    let mut work = ring.lock(Direction::FromGuest);
                    let mut ahead = Ahead::default();
                    work.look_ahead(&mut ahead, usize::from(take)).unwrap();
                    let mut expected = Vec::new();
                    for index in 0..take {
                        let mark = work.mark();
                        let single = work.take_ahead(&ahead).map(|(chain, buffer)| (chain, buffer.len() as u64));
                        let taken = match single {
                            Some(taken) => Some(taken),
                            None => work.take(|_| ()).unwrap(),
                        };
                        let Some((chain, bytes)) = taken else {
                            prop_assert!(posted.is_empty());
                            break;
                        };
                        prop_assert_eq!(Some(bytes), posted.front().map(|bytes| u64::from(*bytes)));
                        if index % 5 < back {
                            work.rewind(mark);
                            let (again, same) = work.take(|_| ()).unwrap().unwrap();
                            prop_assert_eq!(same, bytes);
                            work.complete(again, bytes as u32);
                        } else {
                            work.complete(chain, bytes as u32);
                        }
                        posted.pop_front();
                        expected.push(bytes as u32);
                    }
                    prop_assert_eq!(work.publish(), !expected.is_empty());
                    drop(work);
                    prop_assert_eq!(driver.reap(), expected);
                }
            }
        }
    }
}
