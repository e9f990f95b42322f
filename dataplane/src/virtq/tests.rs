//! Rings against hostile drivers, and against rust-vmm's `virtio-queue` as the oracle.

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, mmap::GuestRegionMmap};

use super::chain::Direction;
use super::ring::{Ring, Work};
use super::split::SplitRing;
use super::{Fault, RingError};
use crate::testing::*;

fn one(guest: &TestGuest, direction: Direction) -> Result<Vec<usize>, Fault> {
    let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
    let mut work = ring.lock(direction);
    assert!(work.available()?);
    let mut lengths = Vec::new();
    work.take(|buffer| lengths.push(buffer.len()))?;
    Ok(lengths)
}

fn hostile(descs: &[Desc]) -> Fault {
    let mut guest = TestGuest::new(8, VERSION_1 | INDIRECT_DESC);
    for (index, desc) in descs.iter().enumerate() {
        guest.set_desc(index as u16, *desc);
    }
    // Index 0 is the head; a used index of zero means that nothing was taken yet.
    guest.make_available(0);
    one(&guest, Direction::FromGuest).unwrap_err()
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

#[test]
fn every_rule_of_a_chain() {
    const A: u64 = 0x10_0000;
    assert_eq!(hostile(&[desc(A, 4, NEXT, 0)]), Fault::ChainLoop);
    assert_eq!(hostile(&[desc(A, 4, NEXT, 8)]), Fault::DescriptorIndex);
    assert_eq!(hostile(&[desc(A, 4, WRITE, 0)]), Fault::WrongDirection);
    assert_eq!(hostile(&[desc(MEMORY - 1, 2, 0, 0)]), Fault::UnmappedAddress);
    assert_eq!(hostile(&[desc(u64::MAX - 1, 4, 0, 0)]), Fault::UnmappedAddress);
    assert_eq!(hostile(&[desc(0, u32::MAX, 0, 0)]), Fault::UnmappedAddress);
    assert_eq!(hostile(&[desc(A, 24, INDIRECT, 0)]), Fault::IndirectLength);
    assert_eq!(hostile(&[desc(A, 0, INDIRECT, 0)]), Fault::IndirectLength);
    assert_eq!(hostile(&[desc(A, 0xffff_fff0, INDIRECT, 0)]), Fault::IndirectLength);
    assert_eq!(hostile(&[desc(MEMORY - 8, 16, INDIRECT, 0)]), Fault::UnmappedAddress);
    assert_eq!(hostile(&[desc(A + 4, 16, INDIRECT, 0)]), Fault::UnmappedAddress);
    assert_eq!(hostile(&[desc(A, 16, INDIRECT | NEXT, 1)]), Fault::BadIndirect);
}

#[test]
fn indirect_tables_end_and_do_not_nest() {
    let table = |descs: &[Desc]| {
        let mut guest = TestGuest::new(8, VERSION_1 | INDIRECT_DESC);
        for (index, desc) in descs.iter().enumerate() {
            guest.write(0x20_0000 + 16 * index as u64, &desc.bytes());
        }
        guest.set_desc(0, desc(0x20_0000, 16 * descs.len() as u32, INDIRECT, 0));
        guest.make_available(0);
        one(&guest, Direction::FromGuest)
    };
    const A: u64 = 0x10_0000;
    assert_eq!(table(&[desc(A, 4, NEXT, 1), desc(A, 8, 0, 0)]), Ok(vec![4, 8]));
    assert_eq!(table(&[desc(A, 4, NEXT, 1), desc(A, 16, INDIRECT, 0)]), Err(Fault::BadIndirect));
    assert_eq!(table(&[desc(A, 4, NEXT, 1), desc(A, 4, NEXT, 0)]), Err(Fault::ChainLoop));
    assert_eq!(table(&[desc(A, 4, NEXT, 2)]), Err(Fault::ChainLoop));
    assert_eq!(table(&[desc(A, 4, NEXT, 9), desc(A, 4, 0, 0)]), Err(Fault::DescriptorIndex));
}

/// Buffers without a byte cost as much as others, so they count: in a chain, and in all chains of a burst.
#[test]
fn empty_buffers_are_bounded() {
    let mut guest = TestGuest::new(2048, VERSION_1);
    (0..2048).for_each(|index| guest.set_desc(index, desc(u64::MAX, 0, NEXT, (index + 1) % 2048)));
    guest.make_available(0);
    assert_eq!(one(&guest, Direction::FromGuest), Err(Fault::ChainTooLong));

    let mut guest = TestGuest::new(64, VERSION_1 | INDIRECT_DESC);
    for index in 0..1024 {
        let last = index == 1023;
        let entry = desc(0x10_0000, u32::from(last), if last { WRITE } else { WRITE | NEXT }, index + 1);
        guest.write(0x20_0000 + 16 * u64::from(index), &entry.bytes());
    }
    guest.set_desc(0, desc(0x20_0000, 16 * 1024, INDIRECT, 0));
    (0..64).for_each(|_| guest.make_available(0));
    let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
    let mut work = ring.lock(Direction::ToGuest);
    for _ in 0..crate::limits::BURST {
        let mark = work.mark();
        assert_eq!(work.take(|_| ()).map(|taken| taken.unwrap().1), Ok(1));
        work.rewind(mark);
    }
    assert_eq!(work.take(|_| ()).map(drop), Err(Fault::Wasteful));
}

#[test]
fn indirect_only_where_negotiated() {
    let mut guest = TestGuest::new(8, VERSION_1);
    guest.set_desc(0, desc(0x10_0000, 16, INDIRECT, 0));
    guest.make_available(0);
    assert_eq!(one(&guest, Direction::FromGuest), Err(Fault::BadIndirect));
}

#[test]
fn an_available_index_may_not_jump() {
    let guest = TestGuest::new(8, VERSION_1);
    let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
    guest.set_avail_index(8);
    assert_eq!(ring.lock(Direction::FromGuest).available(), Ok(true));
    guest.set_avail_index(9);
    let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
    assert_eq!(ring.lock(Direction::FromGuest).available(), Err(Fault::AvailIndex));
    guest.set_avail_index(u16::MAX);
    assert_eq!(ring.lock(Direction::FromGuest).available(), Err(Fault::AvailIndex));
}

#[test]
fn rings_have_to_be_in_memory() {
    let guest = TestGuest::new(8, VERSION_1);
    let with = |change: fn(&mut super::RingConfig)| {
        let mut config = guest.config();
        change(&mut config);
        SplitRing::new(&config, guest.memory.clone()).map(drop)
    };
    assert_eq!(with(|_| ()), Ok(()));
    for size in [0, 3, 65_536, u32::MAX] {
        let mut config = guest.config();
        config.size = size;
        assert_eq!(SplitRing::new(&config, guest.memory.clone()).unwrap_err(), RingError::Size(size));
    }
    assert_eq!(with(|c| c.size = 32_768 * 2), Err(RingError::Size(65_536)));
    assert_eq!(with(|c| c.desc += MEMORY), Err(RingError::Unmapped("descriptor")));
    assert_eq!(with(|c| c.avail += MEMORY), Err(RingError::Unmapped("available")));
    assert_eq!(with(|c| c.used = c.desc - 0x1000 + MEMORY - 8), Err(RingError::Unmapped("used")));
    assert_eq!(with(|c| c.used = u64::MAX - 3), Err(RingError::Unmapped("used")));
    assert_eq!(with(|c| c.desc += 8), Err(RingError::Unaligned("descriptor")));
    assert_eq!(with(|c| c.used += 2), Err(RingError::Unaligned("used")));
}

#[test]
fn continues_where_the_driver_has_seen_it() {
    let mut guest = TestGuest::new(8, VERSION_1);
    guest.set_used_index(65_534);
    let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
    assert_eq!(ring.base(), 65_534);
    for _ in 0..4 {
        guest.post(&[64], 0);
    }
    let mut work = ring.lock(Direction::FromGuest);
    for _ in 0..3 {
        let (chain, bytes) = work.take(|_| ()).unwrap().unwrap();
        assert_eq!(bytes, 64);
        work.complete(chain, 0);
    }
    assert!(work.publish());
    drop(work);
    assert_eq!((guest.returned().len(), ring.base()), (3, 1));
    let moved = ring.moved_to(guest.memory.clone()).unwrap();
    assert_eq!((moved.base(), moved.lock(Direction::FromGuest).available()), (1, Ok(true)));
}

#[test]
fn notifies_when_asked() {
    // Flags: always, unless the driver polls.
    let mut guest = TestGuest::new(8, VERSION_1);
    guest.post(&[64], 0);
    guest.post(&[64], 0);
    let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
    let mut work = ring.lock(Direction::FromGuest);
    let mut one = || {
        let (chain, _) = work.take(|_| ()).unwrap().unwrap();
        work.complete(chain, 0);
        assert!(work.publish());
        work.needs_notification()
    };
    assert!(one());
    guest.write(guest.config().avail - guest.config().desc + 0x1000, &[1, 0]);
    assert!(!one());
}

#[test]
fn arming_sees_what_came_before() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut guest = TestGuest::new(8, features);
        let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
        ring.silence();
        assert!(!ring.enable_notification());
        guest.post(&[64], 0);
        assert!(ring.enable_notification());
    }
}

/// virtio 1.2, 2.7.10.2: a driver that goes by the flag alone would never wake us.
#[test]
fn with_event_indices_the_flag_stays_clear() {
    for (features, flags) in [(VERSION_1, [1, 0]), (VERSION_1 | EVENT_IDX, [0, 0])] {
        let guest = TestGuest::new(8, features);
        let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
        ring.silence();
        assert_eq!(guest.read(guest.used_at(), 2), [flags[0], 0]);
        ring.enable_notification();
        assert_eq!(guest.read(guest.used_at(), 2), [flags[1], 0]);
    }
}

/// rust-vmm's view of the same memory and ring.
fn oracle(guest: &TestGuest) -> (GuestMemoryMmap, Queue) {
    let file = vm_memory::FileOffset::new(guest.file(), 0);
    let map = vm_memory::MmapRegion::<()>::from_file(file, MEMORY as usize).unwrap();
    let region = GuestRegionMmap::new(map, GuestAddress(0)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let mut queue = Queue::new(guest.size).unwrap();
    let (config, base) = (guest.config(), guest.config().desc - 0x1000);
    queue.set_size(guest.size);
    queue.set_desc_table_address(Some((config.desc - base) as u32), Some(0));
    queue.set_avail_ring_address(Some((config.avail - base) as u32), Some(0));
    queue.set_used_ring_address(Some((config.used - base) as u32), Some(0));
    queue.set_ready(true);
    (memory, queue)
}

fn any_desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        8 => (0u64..MEMORY).prop_map(|at| at & !15),
        1 => Just(MEMORY - 4),
        1 => any::<u64>(),
    ];
    // Mostly sane, so that walks get somewhere.
    let flags = prop_oneof![4 => Just(0u16), 6 => Just(NEXT), 1 => Just(INDIRECT), 1 => Just(WRITE), 1 => any::<u16>()];
    (addr, prop_oneof![0u32..4096, any::<u32>(), (0u32..8).prop_map(|n| n * 16)], flags, 0u16..9)
        .prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Where we accept a chain, rust-vmm sees the same buffers. Where we refuse one, its walk ends early, loops, or
    /// shows the very thing that we refuse.
    #[test]
    fn chains_agree_with_virtio_queue(
        descs in proptest::collection::vec(any_desc(), 8),
        table in proptest::collection::vec(any_desc(), 4),
        head in 0u16..8,
    ) {
        let mut guest = TestGuest::new(8, VERSION_1 | INDIRECT_DESC);
        for (index, desc) in descs.iter().enumerate() {
            // Indirect ones lead to the table now and then.
            let desc = if desc.flags == INDIRECT { Desc { addr: 0x40_0000, len: 64, ..*desc } } else { *desc };
            guest.set_desc(index as u16, desc);
        }
        for (index, desc) in table.iter().enumerate() {
            guest.write(0x40_0000 + 16 * index as u64, &Desc { next: desc.next & 3, ..*desc }.bytes());
        }
        guest.make_available(head);

        let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
        let mut work = ring.lock(Direction::FromGuest);
        prop_assert_eq!(work.available(), Ok(true));
        let mut lengths = Vec::new();
        let ours = work.take(|buffer| lengths.push(buffer.len() as u32)).map(|taken| taken.unwrap().1);

        let (memory, mut queue) = oracle(&guest);
        let chain = queue.pop_descriptor_chain(&memory).unwrap();
        let theirs: Vec<_> = chain.take(64).collect();
        match ours {
            Ok(bytes) => {
                let sizes: Vec<u32> = theirs.iter().map(|desc| desc.len()).filter(|len| *len > 0).collect();
                prop_assert_eq!(&lengths, &sizes);
                prop_assert_eq!(bytes, sizes.iter().map(|len| u64::from(*len)).sum::<u64>());
                prop_assert!(theirs.iter().all(|desc| !desc.is_write_only()));
            }
            Err(Fault::WrongDirection) => prop_assert!(theirs.iter().any(|desc| desc.is_write_only())),
            Err(Fault::UnmappedAddress) => {
                let outside = |addr: u64, len: u32| addr.checked_add(len.into()).is_none_or(|end| end > MEMORY);
                let shown = theirs.iter().any(|desc| outside(desc.addr().0, desc.len()));
                let hidden = descs.iter().any(|desc| desc.flags & INDIRECT != 0);
                prop_assert!(shown || hidden);
            }
            Err(_) => {}
        }
    }

    /// Whatever index the driver writes and whatever stands in its ring, nothing is handed out that it did not post.
    #[test]
    fn bursts_never_exceed_the_ring(index in any::<u16>(), used in any::<u16>()) {
        let mut guest = TestGuest::new(16, VERSION_1);
        guest.set_used_index(used);
        let ring = SplitRing::new(&guest.config(), guest.memory.clone()).unwrap();
        guest.set_avail_index(index);
        match ring.lock(Direction::FromGuest).available() {
            Ok(any) => prop_assert_eq!(any, index != used),
            Err(fault) => {
                prop_assert_eq!(fault, Fault::AvailIndex);
                prop_assert!(index.wrapping_sub(used) > 16);
            }
        }
    }
}
