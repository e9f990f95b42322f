//! Rings after a crash at any point: what was under way is finished or given back, each chain once, and the rings go on.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::chain::Direction;
use super::journal::{Entry, Journal};
use super::packed::PackedRing;
use super::packed_tests::Driver;
use super::ring::{Ring, Work};
use super::split::SplitRing;
use super::{Journaled, Vring};
use crate::testing::{self, TestGuest};

struct Book {
    _dir: tempfile::TempDir,
    journal: Arc<Journal>,
}

impl Book {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { journal: Journal::open(&dir.path().join("rings")).unwrap(), _dir: dir }
    }

    /// The entry of the only ring, which nobody else may have any more.
    fn entry(&self) -> Arc<Entry> {
        self.journal.entry("vm", 0, 1).unwrap()
    }

    fn journaled(&self, direction: Direction, recover: bool) -> Option<Journaled> {
        Some(Journaled { entry: self.entry(), direction, recover, same: false })
    }
}

const CHAINS: usize = 6;

/// Serves up to `count` chains, with lengths that tell them apart, up to where they are published.
fn serve<'r>(work: &mut impl Work<'r>, count: usize) -> usize {
    serve_with(work, count, |number| 100 + number)
}

fn serve_with<'r>(work: &mut impl Work<'r>, count: usize, len: impl Fn(u32) -> u32) -> usize {
    let mut served = 0;
    while served < count {
        let Some((chain, _)) = work.take(|_| ()).unwrap() else { break };
        work.complete(chain, len(served as u32));
        served += 1;
    }
    work.intend();
    served
}

fn slots(driver: &Driver) -> Vec<[u8; 16]> {
    (0..u64::from(driver.size)).map(|slot| driver.get(0x1000 + 16 * slot)).collect()
}

/// A packed ring that has been round, with chains posted; a crash in the midst of marking them as used: the last `written` of
/// them are, the others are not.
fn torn(direction: Direction, written: usize, lengths: &[u32]) {
    let (flags, book) = (if direction == Direction::ToGuest { crate::testing::WRITE } else { 0 }, Book::new());
    let mut driver = Driver::new(17);
    let config = driver.config(true);
    let open = |driver: &Driver, recover| {
        let journaled = book.journaled(direction, recover);
        PackedRing::with_journal(&config, driver.memory.clone(), 0x8000, journaled).unwrap()
    };
    let ring = open(&driver, false);
    for _ in 0..7 {
        assert!(driver.post(&[64, 64], false, flags) && driver.post(&[64], false, flags));
        let mut work = ring.lock(direction);
        assert_eq!(serve(&mut work, 2), 2);
        assert!(work.publish());
        drop(work);
        assert_eq!(driver.reap(), [100, 101]);
    }
    let mut posted = 0;
    while posted < CHAINS && driver.post(lengths, false, flags) {
        posted += 1;
    }
    let before = slots(&driver);
    let mut work = ring.lock(direction);
    assert_eq!(serve(&mut work, posted), posted);
    assert!(work.publish());
    drop(work);
    drop(ring);
    // Undo what the crash has not let happen: the first ones.
    let after = slots(&driver);
    let heads: Vec<usize> = (0..posted).map(|chain| (driver.used.0 as usize + chain * lengths.len()) % 17).collect();
    for &slot in &heads[..posted - written.min(posted)] {
        assert_ne!(before[slot], after[slot]);
        driver.put(0x1000 + 16 * slot as u64, &before[slot]);
    }

    // The frontend says where it began, which is wrong by now.
    let ring = open(&driver, true);
    let lengths_seen = driver.reap();
    assert_eq!(lengths_seen.len(), posted, "each comes back once");
    for (place, len) in lengths_seen.into_iter().enumerate() {
        let known = direction == Direction::ToGuest || place >= posted - written.min(posted);
        assert_eq!(len, if known { 100 + place as u32 } else { 0 });
    }
    // And the ring goes on.
    for _ in 0..20 {
        assert!(driver.post(&[64, 64], false, flags));
        let mut work = ring.lock(direction);
        assert_eq!(serve(&mut work, 9), 1);
        assert!(work.publish());
        drop(work);
        assert_eq!(driver.reap(), [100]);
    }
}

#[test]
fn packed_rings_torn_anywhere() {
    for direction in [Direction::ToGuest, Direction::FromGuest] {
        for written in 0..=CHAINS {
            torn(direction, written, &[64]);
            torn(direction, written, &[12, 500]);
        }
    }
}

/// A crash before anything was published: what was taken to be delivered is not delivered again.
#[test]
fn what_may_have_been_delivered_is_given_back() {
    let book = Book::new();
    let mut driver = Driver::new(9);
    let config = driver.config(true);
    let open = |driver: &Driver| {
        let journaled = book.journaled(Direction::FromGuest, true);
        PackedRing::with_journal(&config, driver.memory.clone(), 0x8000, journaled).unwrap()
    };
    let ring = open(&driver);
    for _ in 0..3 {
        assert!(driver.post(&[64], false, 0));
        let mut work = ring.lock(Direction::FromGuest);
        serve(&mut work, 1);
        work.publish();
        drop(work);
        driver.reap();
    }
    for _ in 0..3 {
        assert!(driver.post(&[10, 20], false, 0));
    }
    let mut work = ring.lock(Direction::FromGuest);
    // Two of three are on their way when it dies.
    assert_eq!(serve(&mut work, 2), 2);
    drop(work);
    drop(ring);
    let ring = open(&driver);
    assert_eq!(driver.reap(), [0, 0]);
    let mut work = ring.lock(Direction::FromGuest);
    assert_eq!(serve(&mut work, 9), 1, "the third is still to come");
    work.publish();
    drop(work);
    assert_eq!(driver.reap(), [100]);
}

/// A driver that has set the same ring up anew is not taken for the one before.
#[test]
fn a_new_driver_begins_anew() {
    let book = Book::new();
    let mut driver = Driver::new(8);
    let config = driver.config(true);
    let ring =
        PackedRing::with_journal(&config, driver.memory.clone(), 0x8000, book.journaled(Direction::ToGuest, true));
    let ring = ring.unwrap();
    for _ in 0..13 {
        driver.post(&[64], false, crate::testing::WRITE);
        let mut work = ring.lock(Direction::ToGuest);
        serve(&mut work, 1);
        work.publish();
        drop(work);
        driver.reap();
    }
    drop(ring);
    driver.put(0x1000, &[0; 8 * 16]);
    let mut driver = Driver { next: (0, true), used: (0, true), free: 8, id: 0, ..driver };
    for _ in 0..8 {
        assert!(driver.post(&[64], false, crate::testing::WRITE));
    }
    let journaled = book.journaled(Direction::ToGuest, true);
    let ring = PackedRing::with_journal(&config, driver.memory.clone(), 0x8000, journaled).unwrap();
    let mut work = ring.lock(Direction::ToGuest);
    assert_eq!(serve(&mut work, 3), 3);
    work.publish();
    drop(work);
    assert_eq!(driver.reap(), [100, 101, 102]);
}

#[test]
fn split_rings_give_back_what_may_have_been_delivered() {
    let book = Book::new();
    let mut guest = TestGuest::new(16, testing::VERSION_1);
    let open = |guest: &TestGuest| {
        SplitRing::with_journal(&guest.config(), guest.memory.clone(), book.journaled(Direction::FromGuest, true))
            .unwrap()
    };
    let ring = open(&guest);
    let frame = testing::frame(1, 2, 60);
    for _ in 0..21 {
        guest.send(&frame, &[72]);
        let mut work = ring.lock(Direction::FromGuest);
        assert_eq!(serve_with(&mut work, 1, |_| 0), 1);
        work.publish();
        drop(work);
        assert_eq!(guest.returned().len(), 1);
    }
    for _ in 0..5 {
        guest.send(&frame, &[72]);
    }
    let mut work = ring.lock(Direction::FromGuest);
    assert_eq!(serve_with(&mut work, 3, |_| 0), 3);
    drop(work);
    drop(ring);
    let ring = open(&guest);
    assert_eq!(guest.returned().len(), 3);
    let mut work = ring.lock(Direction::FromGuest);
    assert_eq!(serve_with(&mut work, 9, |_| 0), 2);
    work.publish();
    drop(work);
    drop(ring);
    assert_eq!(guest.returned().len(), 2);
    // A record that does not fit the ring, as after a reset, changes nothing.
    guest.set_used_index(0);
    guest.set_avail_index(0);
    let ring = open(&guest);
    assert_eq!(ring.base(), 0);
    assert_eq!(guest.used_index(), 0);
}

/// Each slot and the event area that we write are marked while a guest with packed rings migrates.
#[test]
fn packed_rings_mark_what_they_write() {
    let mut driver = Driver::new(512);
    let log = crate::mem::tests::memfd(64);
    let file = log.try_clone().unwrap();
    let log = Arc::new(crate::mem::Log::map(log, 64, 0).unwrap());
    let memory = Arc::new(driver.memory.logged_by(Some(log)).unwrap());
    let config = super::RingConfig { log: Some(0x8100), ..driver.config(true) };
    let Vring::Packed(ring) = Vring::new(&config, memory, 0x8000).unwrap() else { unreachable!() };
    let marked = || {
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, 0).unwrap();
        file.write_all_at(&[0; 64], 0).unwrap();
        (0..512).filter(|page| bytes[page / 8] & (1 << (page % 8)) != 0).collect::<Vec<_>>()
    };
    assert_eq!(marked(), [0usize; 0]);
    ring.silence();
    assert_eq!(marked(), [8], "the device's event area");
    for (first, page) in [(0, 1), (256, 2)] {
        for _ in 0..256 {
            assert!(driver.post(&[64], false, 0));
        }
        let mut work = ring.lock(Direction::FromGuest);
        assert_eq!(serve(&mut work, 256), 256);
        assert!(work.publish());
        drop(work);
        assert_eq!(marked(), [page], "slots from {first} on");
        driver.reap();
    }
}

/// A packed ring that has been round twice looks like a new one. What is under way then is found all the same, and only what
/// may have been delivered is given back.
#[test]
fn packed_rings_torn_where_they_look_new() {
    for (direction, same) in [(Direction::FromGuest, false), (Direction::FromGuest, true), (Direction::ToGuest, true)] {
        let (flags, book) = (if direction == Direction::ToGuest { crate::testing::WRITE } else { 0 }, Book::new());
        let mut driver = Driver::new(8);
        let config = driver.config(true);
        let open = |driver: &Driver, recover, same| {
            let journaled = Some(Journaled { entry: book.entry(), direction, recover, same });
            PackedRing::with_journal(&config, driver.memory.clone(), 0x8000, journaled)
        };
        let ring = open(&driver, false, false).unwrap();
        for _ in 0..16 {
            assert!(driver.post(&[64], false, flags));
            let mut work = ring.lock(direction);
            assert_eq!(serve(&mut work, 1), 1);
            work.publish();
            drop(work);
            driver.reap();
        }
        for _ in 0..3 {
            assert!(driver.post(&[64], false, flags));
        }
        let before = slots(&driver);
        let mut work = ring.lock(direction);
        assert_eq!(serve(&mut work, 2), 2);
        // Everything up to the first mark, which a write to the guest's ring comes before.
        if direction == Direction::ToGuest {
            work.publish();
            (0..2).for_each(|slot| driver.put(0x1000 + 16 * slot as u64, &before[slot]));
        }
        drop(work);
        drop(ring);
        let ring = open(&driver, true, same).unwrap();
        let expected: &[u32] = if direction == Direction::ToGuest { &[100, 101] } else { &[0, 0] };
        assert_eq!(driver.reap(), expected);
        let mut work = ring.lock(direction);
        assert_eq!(serve(&mut work, 9), 1, "the third is still to come");
    }
}

/// Of a ring that goes on for sure, something has to be known.
#[test]
fn a_packed_ring_does_not_go_on_by_guess() {
    let (driver, book) = (Driver::new(8), Book::new());
    let journaled = Journaled { entry: book.entry(), direction: Direction::ToGuest, recover: true, same: true };
    let ring = PackedRing::with_journal(&driver.config(true), driver.memory.clone(), 0x8000, Some(journaled));
    assert!(matches!(ring, Err(super::RingError::Lost)));
}
