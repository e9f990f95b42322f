//! The forwarding database: which station is behind which port.
//!
//! A hash table of buckets, one cache line each. Looking up takes no lock and writes nothing; workers refresh the age
//! of an entry at most once a second. New entries and moves go through a lock that workers only ever try: if it is
//! taken, the next frame of that station will do.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::config::FdbConfig;
use crate::limits::MAX_PORTS;
use crate::port::PortId;
use crate::sync::SpinLock;

const WAYS: usize = 4;
const VALID: u64 = 1 << 12;
const STATIC: u64 = 1 << 31;
const SECONDS: u64 = STATIC - 1;

/// A station: its address, and the VLAN of the network in which it was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Station {
    /// 48-bit address.
    pub mac: u64,
    /// VLAN, 0 for none.
    pub vid: u16,
    /// Bridge domain.
    pub network: u16,
}

impl Station {
    fn key(self) -> u64 {
        (self.mac << 16) | VALID | u64::from(self.vid & 0xfff)
    }
}

/// One entry, as it was when read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Who.
    pub station: Station,
    /// Where.
    pub port: PortId,
    /// Seconds since it was last heard.
    pub age: u64,
    /// Configured, not learned.
    pub is_static: bool,
}

/// Where a station is and when it was heard, packed so that it changes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place(u64);

impl Place {
    fn new(port: PortId, network: u16, second: u32, is_static: bool) -> Self {
        let flag = if is_static { STATIC } else { 0 };
        Self((u64::from(port.0) << 48) | (u64::from(network) << 32) | flag | (u64::from(second) & SECONDS))
    }
    fn port(self) -> PortId {
        PortId((self.0 >> 48) as u16)
    }
    fn network(self) -> u16 {
        (self.0 >> 32) as u16
    }
    fn is_static(self) -> bool {
        self.0 & STATIC != 0
    }
    fn second(self) -> u64 {
        self.0 & SECONDS
    }
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    keys: [AtomicU64; WAYS],
    places: [AtomicU64; WAYS],
}

impl Bucket {
    #[inline]
    fn find(&self, key: u64, network: u16) -> Option<(usize, Place)> {
        for (way, stored) in self.keys.iter().enumerate() {
            if stored.load(Ordering::Acquire) != key {
                continue;
            }
            let place = Place(self.places[way].load(Ordering::Acquire));
            // Another station may have been put here between the two loads.
            if place.network() == network && stored.load(Ordering::Relaxed) == key {
                return Some((way, place));
            }
        }
        None
    }
}

/// What learning found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// Nothing to do, or done.
    Yes,
    /// The table or the port's share of it is full, or another thread is changing it.
    No,
    /// It was behind another port until now.
    Moved(PortId),
    /// It is configured to be behind another port.
    Elsewhere,
}

/// The table.
#[derive(Debug)]
pub struct Fdb {
    buckets: Box<[Bucket]>,
    per_port: Box<[AtomicU32]>,
    ledger: Ledger,
    /// Counts entries that were moved or removed.
    moves: AtomicU64,
    now: AtomicU32,
    config: FdbConfig,
}

/// What is written for each station that is new: apart from what workers read for each burst.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Ledger {
    change: SpinLock<()>,
    count: AtomicUsize,
    additions: AtomicU64,
    /// No entry is too old before this second. Looking through a table of megabytes takes milliseconds, in which it displaces
    /// what others have in their caches.
    due: AtomicU64,
}

impl Fdb {
    /// An empty table.
    pub fn new(config: FdbConfig) -> Self {
        // Twice as many places as entries, so that two candidate buckets are hardly ever both full.
        let buckets = (config.entries.max(WAYS) * 2 / WAYS).next_power_of_two();
        Self {
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            per_port: (0..MAX_PORTS).map(|_| AtomicU32::new(0)).collect(),
            ledger: Ledger::default(),
            moves: AtomicU64::new(0),
            now: AtomicU32::new(0),
            config,
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.ledger.count.load(Ordering::Relaxed)
    }

    /// Entries added, moved or removed so far.
    pub fn changes(&self) -> u64 {
        self.ledger.additions.load(Ordering::Acquire) + self.moves()
    }

    /// Entries moved or removed so far. While there are no more, what was found in the table holds.
    #[inline]
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells the time, in seconds since the switch started.
    pub fn set_now(&self, seconds: u32) {
        self.now.store(seconds, Ordering::Relaxed);
    }

    /// The time as it was told last, in seconds.
    #[inline]
    pub fn now(&self) -> u32 {
        self.now.load(Ordering::Relaxed)
    }

    #[inline]
    fn candidates(&self, station: Station) -> [usize; 2] {
        let mixed = (station.key() ^ (u64::from(station.network) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mask = self.buckets.len() - 1;
        let first = (mixed >> 32) as usize & mask;
        // The partner differs in some bit unless there is only one bucket.
        [first, (first ^ ((mixed >> 20) as usize | 1)) & mask]
    }

    #[inline]
    fn find(&self, station: Station) -> Option<(&Bucket, usize, Place)> {
        let key = station.key();
        let [first, second] = self.candidates(station);
        for index in [first, second] {
            let bucket = &self.buckets[index];
            if let Some((way, place)) = bucket.find(key, station.network) {
                return Some((bucket, way, place));
            }
        }
        None
    }

    /// The port behind which a station is.
    #[inline]
    pub fn lookup(&self, station: Station) -> Option<PortId> {
        self.find(station).map(|(_, _, place)| place.port())
    }

    /// Whether the place of a station is configured.
    pub fn is_static(&self, station: Station) -> bool {
        self.find(station).is_some_and(|(_, _, place)| place.is_static())
    }

    /// Notes that a station was heard behind a port.
    #[inline]
    pub fn learn(&self, station: Station, port: PortId) -> Learned {
        let now = self.now.load(Ordering::Relaxed);
        match self.find(station) {
            Some((_, _, place)) if place.port() == port && place.second() == u64::from(now) & SECONDS => Learned::Yes,
            Some((_, _, place)) if place.is_static() && place.port() == port => Learned::Yes,
            Some((_, _, place)) if place.is_static() => Learned::Elsewhere,
            Some((bucket, way, place)) if place.port() == port => {
                let fresh = Place::new(port, station.network, now, false);
                // If it fails the entry was changed just now, which makes it fresh as well.
                let _ = bucket.places[way].compare_exchange(place.0, fresh.0, Ordering::AcqRel, Ordering::Relaxed);
                Learned::Yes
            }
            _ => self.insert(station, port, false),
        }
    }

    /// Adds or moves an entry, unless somebody else is at the table: the station will be heard again.
    #[cold]
    pub fn insert(&self, station: Station, port: PortId, is_static: bool) -> Learned {
        let Some(_change) = self.ledger.change.try_lock() else { return Learned::No };
        self.put(station, port, is_static, 0)
    }

    /// Moves a station from the port behind which it is configured to be, until [`Fdb::set`] moves it back. Nothing is done if it is
    /// not there any more, or somebody else is at the table.
    #[cold]
    pub fn displace(&self, station: Station, home: PortId, port: PortId) -> Learned {
        let Some(_change) = self.ledger.change.try_lock() else { return Learned::No };
        match self.find(station) {
            Some((bucket, way, place)) if place.port() == home && self.admit(port, false) => self.remove(bucket, way),
            _ => return Learned::No,
        }
        match self.put(station, port, false, 0) {
            Learned::Yes => Learned::Moved(home),
            other => other,
        }
    }

    /// Adds or moves an entry of a station that was last heard some seconds ago. Not for workers: it waits for its turn.
    pub fn set(&self, station: Station, port: PortId, is_static: bool, age: u64) -> Learned {
        let _change = self.ledger.change.lock();
        self.put(station, port, is_static, age)
    }

    /// The same with the lock held.
    fn put(&self, station: Station, port: PortId, is_static: bool, age: u64) -> Learned {
        let second = u64::from(self.now.load(Ordering::Relaxed)).saturating_sub(age);
        let learned = self.place(station, port, Place::new(port, station.network, second as u32, is_static));
        // After the entry itself: `age`, which sets this before it looks, misses one of the two at most.
        if !is_static {
            self.ledger.due.fetch_min(second + self.config.age_seconds, Ordering::AcqRel);
        }
        learned
    }

    fn place(&self, station: Station, port: PortId, fresh: Place) -> Learned {
        let is_static = fresh.is_static();
        if let Some((bucket, way, place)) = self.find(station) {
            if place.is_static() && !is_static {
                return if place.port() == port { Learned::Yes } else { Learned::Elsewhere };
            }
            if place.port() != port && !self.admit(port, is_static) {
                return Learned::No;
            }
            if place.port() != port {
                self.owned(place.port()).fetch_sub(1, Ordering::Relaxed);
                self.owned(port).fetch_add(1, Ordering::Relaxed);
            }
            bucket.places[way].store(fresh.0, Ordering::Release);
            count_after(&self.moves);
            return if place.port() == port { Learned::Yes } else { Learned::Moved(place.port()) };
        }
        if !self.admit(port, is_static) {
            return Learned::No;
        }
        let Some((bucket, way)) = self.vacancy(station) else { return Learned::No };
        bucket.places[way].store(fresh.0, Ordering::Release);
        bucket.keys[way].store(station.key(), Ordering::Release);
        self.owned(port).fetch_add(1, Ordering::Relaxed);
        self.ledger.count.fetch_add(1, Ordering::Relaxed);
        count_after(&self.ledger.additions);
        Learned::Yes
    }

    fn admit(&self, port: PortId, is_static: bool) -> bool {
        is_static || (self.owned(port).load(Ordering::Relaxed) as usize) < self.config.per_port
    }

    /// A free place, if need be that of the entry heard longest ago. With the change lock held.
    fn vacancy(&self, station: Station) -> Option<(&Bucket, usize)> {
        let candidates = self.candidates(station);
        let ways = || candidates.iter().flat_map(|&index| (0..WAYS).map(move |way| (&self.buckets[index], way)));
        let free = ways().find(|(bucket, way)| bucket.keys[*way].load(Ordering::Relaxed) == 0);
        if free.is_some() && self.len() < self.config.entries {
            return free;
        }
        let place = |(bucket, way): &(&Bucket, usize)| Place(bucket.places[*way].load(Ordering::Relaxed));
        let taken = ways().filter(|(bucket, way)| bucket.keys[*way].load(Ordering::Relaxed) != 0);
        let oldest = taken.filter(|at| !place(at).is_static()).min_by_key(|at| place(at).second())?;
        self.remove(oldest.0, oldest.1);
        Some(oldest)
    }

    fn owned(&self, port: PortId) -> &AtomicU32 {
        &self.per_port[usize::from(port.0) % MAX_PORTS]
    }

    /// With the change lock held.
    fn remove(&self, bucket: &Bucket, way: usize) {
        let port = Place(bucket.places[way].load(Ordering::Relaxed)).port();
        bucket.keys[way].store(0, Ordering::Release);
        count_after(&self.moves);
        self.owned(port).fetch_sub(1, Ordering::Relaxed);
        self.ledger.count.fetch_sub(1, Ordering::Relaxed);
    }

    /// Removes one entry, if it is known. For the control side, as [`Fdb::retain`].
    pub fn forget(&self, station: Station) {
        let _change = self.ledger.change.lock();
        if let Some((bucket, way, _)) = self.find(station) {
            self.remove(bucket, way);
        }
    }

    /// As [`Fdb::retain`], for entries of one port. Most have none when they come and go, and the table is large.
    pub fn retain_of(&self, port: PortId, unwanted: impl Fn(&Entry) -> bool) -> usize {
        if self.owned(port).load(Ordering::Acquire) == 0 {
            return 0;
        }
        let is_gone = || self.owned(port).load(Ordering::Relaxed) == 0;
        self.retain_until(is_gone, |entry| entry.port == port && unwanted(entry))
    }

    /// Removes the entries for which `unwanted` holds; returns how many. Called by the control side only: workers
    /// never wait for it, they put off learning meanwhile.
    pub fn retain(&self, unwanted: impl FnMut(&Entry) -> bool) -> usize {
        self.retain_until(|| false, unwanted)
    }

    /// The same, until nothing can be left to remove. An entry of which nothing is to be seen yet came after the call.
    fn retain_until(&self, is_done: impl Fn() -> bool, mut unwanted: impl FnMut(&Entry) -> bool) -> usize {
        let mut removed = 0;
        for bucket in &self.buckets {
            let mut is_unwanted = |way: &usize| self.entry(bucket, *way).is_some_and(|entry| unwanted(&entry));
            // Most buckets have none, and workers want the lock.
            if !(0..WAYS).any(|way| is_unwanted(&way)) {
                continue;
            }
            let _change = self.ledger.change.lock();
            for way in (0..WAYS).filter(is_unwanted) {
                self.remove(bucket, way);
                removed += 1;
            }
            if is_done() {
                break;
            }
        }
        removed
    }

    /// Removes learned entries that were not heard for the configured time. Returns how many.
    pub fn age(&self) -> usize {
        let now = u64::from(self.now());
        if now < self.ledger.due.load(Ordering::Acquire) {
            return 0;
        }
        // Of what comes while we look, we may see nothing; a worker may still have the time of a second ago.
        self.ledger.due.swap(now.saturating_sub(1) + self.config.age_seconds, Ordering::AcqRel);
        let mut due = u64::MAX;
        let removed = self.retain(|entry| {
            let is_old = entry.age >= self.config.age_seconds;
            if !is_old && !entry.is_static {
                due = due.min(now + self.config.age_seconds - entry.age);
            }
            is_old && !entry.is_static
        });
        self.ledger.due.fetch_min(due, Ordering::AcqRel);
        removed
    }

    /// All entries, in no order.
    pub fn entries(&self) -> Vec<Entry> {
        let ways = self.buckets.iter().flat_map(|bucket| (0..WAYS).map(move |way| (bucket, way)));
        ways.filter_map(|(bucket, way)| self.entry(bucket, way)).collect()
    }

    fn entry(&self, bucket: &Bucket, way: usize) -> Option<Entry> {
        let key = Some(bucket.keys[way].load(Ordering::Acquire)).filter(|key| *key != 0)?;
        let place = Place(bucket.places[way].load(Ordering::Acquire));
        // Another station may have been put here between the two loads.
        if bucket.keys[way].load(Ordering::Relaxed) != key {
            return None;
        }
        let now = u64::from(self.now.load(Ordering::Relaxed)) & SECONDS;
        Some(Entry {
            station: Station { mac: key >> 16, vid: (key & 0xfff) as u16, network: place.network() },
            port: place.port(),
            age: now.saturating_sub(place.second()),
            is_static: place.is_static(),
        })
    }
}

/// Counts a change that has been made: whoever sees the count sees the change.
fn count_after(changes: &AtomicU64) {
    changes.fetch_add(1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn station(mac: u64) -> Station {
        Station { mac, vid: 0, network: 1 }
    }

    fn fdb(entries: usize, per_port: usize) -> Fdb {
        Fdb::new(FdbConfig { entries, per_port, age_seconds: 300 })
    }

    #[test]
    fn learns_moves_and_ages() {
        let fdb = fdb(1024, 1024);
        assert_eq!(fdb.lookup(station(1)), None);
        fdb.learn(station(1), PortId(3));
        assert_eq!(fdb.lookup(station(1)), Some(PortId(3)));
        assert_eq!(fdb.lookup(Station { network: 2, ..station(1) }), None);
        assert_eq!(fdb.lookup(Station { vid: 7, ..station(1) }), None);
        fdb.learn(station(1), PortId(4));
        assert_eq!(fdb.lookup(station(1)), Some(PortId(4)));
        fdb.set_now(299);
        assert_eq!(fdb.age(), 0);
        fdb.learn(station(1), PortId(4));
        fdb.set_now(598);
        assert_eq!(fdb.age(), 0);
        fdb.set_now(599);
        assert_eq!((fdb.age(), fdb.len()), (1, 0));
    }

    #[test]
    fn one_port_cannot_take_it_all() {
        let fdb = fdb(1024, 10);
        let learned = (0..100).filter(|&mac| fdb.learn(station(mac), PortId(1)) == Learned::Yes).count();
        assert_eq!((learned, fdb.len()), (10, 10));
        fdb.learn(station(5000), PortId(2));
        assert_eq!(fdb.lookup(station(5000)), Some(PortId(2)));
        assert_eq!(fdb.retain_of(PortId(1), |entry| entry.is_static), 0);
        assert_eq!(fdb.retain_of(PortId(1), |_| true), 10);
        assert_eq!(fdb.retain_of(PortId(1), |_| true), 0);
        assert_eq!(fdb.learn(station(7), PortId(1)), Learned::Yes);
    }

    #[test]
    fn the_whole_is_bounded() {
        let fdb = fdb(64, 10_000);
        for mac in 0..10_000 {
            fdb.learn(station(mac), PortId(1));
        }
        assert!(fdb.len() <= 64, "{}", fdb.len());
        assert!(fdb.len() >= 48, "{}", fdb.len());
    }

    /// Workers come back to a station that they hear again; what is configured comes once.
    #[test]
    fn what_is_set_waits_for_its_turn() {
        let fdb = fdb(64, 64);
        let change = fdb.ledger.change.lock();
        assert_eq!(fdb.insert(station(1), PortId(1), false), Learned::No);
        std::thread::scope(|scope| {
            let set = scope.spawn(|| fdb.set(station(1), PortId(1), true, 0));
            std::thread::sleep(std::time::Duration::from_millis(10));
            assert!(!set.is_finished());
            drop(change);
            assert_eq!(set.join().unwrap(), Learned::Yes);
        });
        assert!(fdb.is_static(station(1)));
    }

    #[test]
    fn a_look_without_a_find_takes_no_lock() {
        let fdb = fdb(64, 64);
        (0..10).for_each(|mac| assert_eq!(fdb.learn(station(mac), PortId(1)), Learned::Yes));
        let _change = fdb.ledger.change.lock();
        assert_eq!((fdb.retain(|entry| entry.port == PortId(2)), fdb.age()), (0, 0));
    }

    /// However it meets with workers, aging comes back in time for each entry, and what is counted adds up.
    #[test]
    fn ages_while_others_learn() {
        let fdb = &fdb(16_384, 16_384);
        let learn = move |port| {
            for step in 0..20_000 {
                fdb.insert(station(step * 7 % 10_000), PortId(port), false);
            }
        };
        std::thread::scope(|scope| {
            let workers = [1, 2].map(|port| scope.spawn(move || learn(port)));
            while !workers.iter().all(|worker| worker.is_finished()) {
                fdb.set_now(fdb.now() + 7);
                fdb.age();
                fdb.retain_of(PortId(2), |entry| entry.station.mac % 5 == 0);
            }
        });
        for _ in 0..43 {
            fdb.set_now(fdb.now() + 7);
            fdb.age();
            assert!(fdb.entries().iter().all(|entry| entry.age < 300));
        }
        let owned: u32 = fdb.per_port.iter().map(|owned| owned.load(Ordering::Relaxed)).sum();
        assert_eq!((fdb.entries(), fdb.len(), owned), (vec![], 0, 0));
    }

    #[test]
    fn static_entries_stay() {
        let fdb = fdb(64, 64);
        fdb.insert(station(1), PortId(1), true);
        fdb.learn(station(1), PortId(2));
        fdb.set_now(10_000);
        fdb.age();
        assert_eq!(fdb.lookup(station(1)), Some(PortId(1)));
    }

    /// What was found before need not be looked for again for the sake of who is new.
    #[test]
    fn what_is_new_is_no_move() {
        let fdb = &fdb(4, 4);
        let grown = |expected: Learned, change: &dyn Fn() -> Learned| {
            let before = (fdb.changes(), fdb.moves());
            assert_eq!(change(), expected);
            (fdb.changes() - before.0, fdb.moves() - before.1)
        };
        let learn = |mac: u64, port: u16, learned| grown(learned, &|| fdb.learn(station(mac), PortId(port)));
        assert_eq!(learn(1, 1, Learned::Yes), (1, 0));
        let other = Station { network: 2, ..station(1) };
        assert_eq!(grown(Learned::Yes, &|| fdb.learn(other, PortId(2))), (1, 0));
        assert_eq!(learn(1, 2, Learned::Moved(PortId(1))), (1, 1));
        fdb.set(station(2), PortId(1), true, 0);
        assert_eq!(learn(2, 2, Learned::Elsewhere), (0, 0));
        let [home, away] = [1, 2].map(PortId);
        assert_eq!(grown(Learned::Moved(home), &|| fdb.displace(station(2), home, away)), (2, 1));
        assert_eq!(grown(Learned::Moved(away), &|| fdb.set(station(2), home, true, 0)), (1, 1));
        // It became a configured one elsewhere while a worker was about to add it.
        assert_eq!(grown(Learned::Elsewhere, &|| fdb.insert(station(2), away, false)), (0, 0));
        fdb.forget(station(2));
        assert_eq!(fdb.changes(), fdb.moves() + 4);
        // The table is full: another one goes.
        (3..5).for_each(|mac| assert_eq!(learn(mac, 1, Learned::Yes), (1, 0)));
        assert_eq!((learn(5, 1, Learned::Yes), fdb.len()), ((2, 1), 4));
        let moves = fdb.moves();
        fdb.set_now(301);
        assert_eq!((fdb.age(), fdb.moves()), (4, moves + 4));
    }

    proptest! {
        /// Nothing that is too old stays, however long nobody looks, and whatever comes with an age of its own.
        #[test]
        fn the_old_go_when_they_are_due(steps in proptest::collection::vec((0u64..10, 0u64..400, 0u8..4), 0..100)) {
            let fdb = fdb(4096, 4096);
            let (mut now, mut heard) = (1000, HashMap::new());
            fdb.set_now(now as u32);
            for (mac, number, kind) in steps {
                match kind {
                    0 => {
                        fdb.set(station(mac), PortId(1), false, number);
                        heard.insert(mac, now - number);
                    }
                    1 => {
                        fdb.learn(station(mac), PortId(1));
                        heard.insert(mac, now);
                    }
                    _ => {
                        now += number / if kind == 2 { 1 } else { 100 };
                        fdb.set_now(now as u32);
                        fdb.age();
                        heard.retain(|_, second| now - *second < 300);
                    }
                }
                prop_assert_eq!(fdb.len(), heard.len());
            }
        }

        /// Against a plain map, as long as nothing has to be evicted.
        #[test]
        fn agrees_with_a_map(steps in proptest::collection::vec((0u64..40, 0u16..3, 0u16..2, 0u16..5, 0u8..6), 0..200)) {
            let fdb = fdb(4096, 4096);
            let mut model: HashMap<(u64, u16, u16), u16> = HashMap::new();
            for (mac, vid, network, port, kind) in steps {
                let station = Station { mac, vid, network };
                if kind == 0 {
                    fdb.retain_of(PortId(port), |_| true);
                    model.retain(|_, at| *at != port);
                } else if kind == 1 {
                    fdb.forget(station);
                    model.remove(&(mac, vid, network));
                } else {
                    fdb.learn(station, PortId(port));
                    model.insert((mac, vid, network), port);
                }
                prop_assert_eq!(fdb.len(), model.len());
            }
            for (&(mac, vid, network), &port) in &model {
                prop_assert_eq!(fdb.lookup(Station { mac, vid, network }), Some(PortId(port)));
            }
            prop_assert_eq!(fdb.entries().len(), model.len());
        }
    }
}
