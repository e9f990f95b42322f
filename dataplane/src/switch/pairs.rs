//! What a worker found out about pairs of stations, so that the next frame between them needs one look instead of two
//! in the large table that all workers share.

use super::fdb::Fdb;
use super::snapshot::Snapshot;
use crate::frame::Likeness;
use crate::limits::MAX_PORTS;
use crate::port::PortId;

/// Pairs remembered; a newer one takes the place of an older one that happens to share it.
const PAIRS: usize = 1 << 16;

/// Places that a pair can have.
const WAYS: usize = 4;

/// Who sends to whom, as a frame says it, and where from. Frames that have this in common go the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) likeness: Likeness,
    pub(super) origin: Origin,
}

/// Where frames come from: their port and their tag, if there is one; and the generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin(u64);

impl Origin {
    const NOWHERE: Self = Self(0);

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl Pair {
    #[inline]
    fn place(self) -> usize {
        const { assert!(PAIRS.is_power_of_two()) };
        // Turned against each other, since addresses often differ in few bits, and in both stations at once.
        let Likeness(first, last) = self.likeness;
        let product = u128::from(first ^ last.rotate_left(37)) * 0x9e37_79b9_7f4a_7c15;
        (((product >> 64) as u64 ^ product as u64) >> 20) as usize % PAIRS
    }
}

/// Where frames of a pair go, and the VLAN that they belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) egress: PortId,
    pub(super) vid: u16,
}

/// One pair, good while its generation is the present one.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct Known {
    pair: Pair,
    path: Path,
}

/// The memory of one worker.
#[derive(Debug)]
pub(super) struct Pairs {
    known: Box<[Known; PAIRS]>,
    generation: u32,
    /// What the present generation rests on: the ports, the stations, and the second, as sources must stay fresh. Not on who
    /// is new: both stations of a pair were in the table, which has each of them once, until one is moved or removed.
    basis: (u64, u64, u32),
}

impl Default for Pairs {
    fn default() -> Self {
        let nobody = Known {
            pair: Pair { likeness: Likeness::NONE, origin: Origin::NOWHERE },
            path: Path { egress: PortId(0), vid: 0 },
        };
        let known = vec![nobody; PAIRS].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!());
        Self { known, generation: 1, basis: (0, 0, 0) }
    }
}

impl Pairs {
    /// A burst begins: forgets all if what it rests on has changed since the last one.
    #[inline]
    pub(super) fn refresh(&mut self, snapshot: &Snapshot, fdb: &Fdb) {
        let basis = (snapshot.epoch, fdb.moves(), fdb.now());
        if basis != self.basis {
            self.forget(basis);
        }
    }

    /// Whether a station moved or went since the burst began: what was known in it may be elsewhere now.
    pub(super) fn is_outdated(&self, fdb: &Fdb) -> bool {
        fdb.moves() != self.basis.1
    }

    #[cold]
    fn forget(&mut self, basis: (u64, u64, u32)) {
        self.basis = basis;
        self.generation = self.generation.wrapping_add(1);
        // Once in four thousand million times, what is left of an age long past would look fresh.
        if self.generation == 0 {
            self.known.iter_mut().for_each(|known| known.pair.origin = Origin::NOWHERE);
            self.generation = 1;
        }
    }

    /// Where frames come from in this burst.
    #[inline]
    pub(super) fn origin(&self, ingress: PortId, tag: Option<u16>) -> Origin {
        const { assert!(MAX_PORTS < 1 << 15) };
        let tag = tag.map_or(0, |tci| 1 << 16 | u64::from(tci));
        Origin(u64::from(self.generation) << 32 | u64::from(ingress.0) << 17 | tag)
    }

    /// Where frames of a pair go, if they may: what was remembered of one holds for all, but for their length.
    #[inline]
    pub(super) fn get(&self, pair: Pair) -> Option<Path> {
        let place = pair.place();
        // Neighbours share a cache line.
        let known = [&self.known[place], &self.known[place ^ 1]];
        match known.into_iter().find(|known| known.pair == pair) {
            Some(known) => Some(known.path),
            None => self.get_nearby(pair, place),
        }
    }

    /// What found both of its places taken is in the neighbouring cache line.
    #[inline(never)]
    fn get_nearby(&self, pair: Pair, place: usize) -> Option<Path> {
        let known = [&self.known[place ^ 2], &self.known[place ^ 3]];
        known.into_iter().find(|known| known.pair == pair).map(|known| known.path)
    }

    /// Remembers where frames of a pair go. Only after its source was learned.
    #[inline]
    pub(super) fn put(&mut self, pair: Pair, path: Path) {
        let first = pair.place();
        let suits = |place: &usize| {
            let known = self.known[*place].pair;
            // The pair of a frame that is too long to be looked up is there already.
            known.origin.generation() != self.generation || known == pair
        };
        let place = (0..WAYS).map(|way| first ^ way).find(suits).unwrap_or(first);
        self.known[place] = Known { pair, path };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FdbConfig;
    use crate::switch::fdb::{Learned, Station};

    fn snapshot(epoch: u64) -> Snapshot {
        Snapshot { epoch, ports: vec![], networks: vec![], holding: vec![], plans: vec![], announcement: None }
    }

    /// Of stations 02:00:00:xx:xx:xx and 02:00:01:xx:xx:xx.
    fn pair(pairs: &Pairs, number: u64) -> Pair {
        let [.., a, b] = (number as u16).to_be_bytes();
        let (first, last) = ([2, 0, 1, 0, a, b, 2, 0], [2, 0, 0, 0, a, b, 8, 0]);
        let likeness = Likeness(u64::from_le_bytes(first), u64::from_le_bytes(last));
        Pair { likeness, origin: pairs.origin(PortId((number % 7) as u16), None) }
    }

    fn path(number: u64) -> Path {
        Path { egress: PortId((number % 1000) as u16), vid: (number % 5) as u16 }
    }

    #[test]
    fn remembers_until_something_changes() {
        let fdb = Fdb::new(FdbConfig { entries: 64, per_port: 64, age_seconds: 300 });
        let mut pairs = Pairs::default();
        let get = |pairs: &Pairs| pairs.get(pair(pairs, 0));
        let put = |pairs: &mut Pairs| pairs.put(pair(pairs, 0), path(3));
        pairs.refresh(&snapshot(1), &fdb);
        assert_eq!(get(&pairs), None);
        let station = Station { mac: 1, vid: 0, network: 0 };
        // Who is new is not in any pair yet.
        put(&mut pairs);
        assert_eq!(fdb.learn(station, PortId(1)), Learned::Yes);
        assert!(!pairs.is_outdated(&fdb));
        pairs.refresh(&snapshot(1), &fdb);
        assert_eq!(get(&pairs), Some(path(3)));
        let changes: [&dyn Fn(); 3] = [
            &|| assert_eq!(fdb.learn(station, PortId(2)), Learned::Moved(PortId(1))),
            &|| fdb.forget(station),
            &|| fdb.set_now(7),
        ];
        for change in changes {
            put(&mut pairs);
            pairs.refresh(&snapshot(1), &fdb);
            assert_eq!(get(&pairs), Some(path(3)));
            change();
            pairs.refresh(&snapshot(1), &fdb);
            assert_eq!(get(&pairs), None);
        }
        put(&mut pairs);
        pairs.refresh(&snapshot(2), &fdb);
        assert_eq!(get(&pairs), None);
        // What was put before the numbers begin anew is not taken for fresh.
        put(&mut pairs);
        pairs.generation = u32::MAX;
        pairs.forget((0, 0, 0));
        assert_eq!((pairs.generation, get(&pairs)), (1, None));
    }

    #[test]
    fn many_find_room() {
        let mut pairs = Pairs::default();
        let stations = 10_000;
        (0..stations).for_each(|number| pairs.put(pair(&pairs, number), path(number)));
        let known = (0..stations).filter(|&number| {
            let known = pairs.get(pair(&pairs, number));
            assert!(known.is_none_or(|known| known == path(number)));
            known.is_some()
        });
        assert!(known.count() as u64 > stations * 99 / 100);
    }

    #[test]
    fn a_pair_takes_one_place() {
        let mut pairs = Pairs::default();
        let known = pair(&pairs, 0);
        (0..10).for_each(|number| pairs.put(known, path(number)));
        assert_eq!(pairs.get(known), Some(path(9)));
        assert_eq!(pairs.known.iter().filter(|it| it.pair == known).count(), 1);
    }

    #[test]
    fn ports_and_tags_are_told_apart() {
        let mut pairs = Pairs::default();
        let from = |pairs: &Pairs, port, tag| Pair { origin: pairs.origin(PortId(port), tag), ..pair(pairs, 0) };
        let known = from(&pairs, 3, Some(5));
        pairs.put(known, path(1));
        assert_eq!(pairs.get(known), Some(path(1)));
        for (port, tag) in [(3, None), (3, Some(6)), (2, Some(5)), (3, Some(0))] {
            assert_eq!(pairs.get(from(&pairs, port, tag)), None, "{port} {tag:?}");
        }
    }
}
