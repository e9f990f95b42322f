//! What a worker found out about pairs of stations, so that the next frame between them needs one look instead of two
//! in the large table that all workers share.

use super::fdb::Fdb;
use super::snapshot::Snapshot;
use crate::frame::Frame;
use crate::limits::MAX_PORTS;
use crate::mem::prefetch::prefetch_read;
use crate::port::PortId;

/// Pairs remembered; a newer one takes the place of an older one that happens to share it.
const PAIRS: usize = 1 << 15;

/// Who sends to whom, as a frame says it, and where from. Frames that have this in common go the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pair {
    /// Addresses and EtherType.
    likeness: (u64, u64),
    /// Ingress port, and the tag if there is one.
    way: u32,
}

impl Pair {
    /// That of no frame.
    pub(super) const NONE: Self = Self { likeness: (0, 0), way: u32::MAX };

    #[inline]
    pub(super) fn of(frame: &Frame, ingress: PortId) -> Self {
        const { assert!(MAX_PORTS < 1 << 15) };
        let tag = frame.tag().map_or(0, |tci| 1 << 16 | u32::from(tci));
        Self { likeness: frame.likeness(), way: u32::from(ingress.0) << 17 | tag }
    }

    #[inline]
    pub(super) fn is_tagged(self) -> bool {
        self.way & 1 << 16 != 0
    }

    #[inline]
    fn place(self) -> usize {
        const { assert!(PAIRS.is_power_of_two()) };
        // Both halves of the product, since addresses often differ in few bits, and in both stations at once.
        let (first, second) = (self.likeness.0 ^ 0x9e37_79b9_7f4a_7c15, self.likeness.1 ^ 0xd6e8_feb8_6659_fd93);
        let product = u128::from(first) * u128::from(second);
        ((product >> 64) as u64 ^ product as u64) as usize % PAIRS
    }
}

/// Where frames of a pair go, and the VLAN that they belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) egress: PortId,
    pub(super) vid: u16,
}

/// One pair, good while `generation` is the present one.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct Known {
    pair: Pair,
    generation: u32,
    path: Path,
}

/// The memory of one worker.
#[derive(Debug)]
pub(super) struct Pairs {
    known: Box<[Known]>,
    generation: u32,
    /// What the present generation rests on: the ports, the stations, and the second, as sources must stay fresh.
    basis: (u64, u64, u32),
}

impl Default for Pairs {
    fn default() -> Self {
        let nobody = Known { pair: Pair::NONE, generation: 0, path: Path { egress: PortId(0), vid: 0 } };
        Self { known: vec![nobody; PAIRS].into_boxed_slice(), generation: 1, basis: (0, 0, 0) }
    }
}

impl Pairs {
    /// A burst begins: forgets all if anything has changed since the last one.
    #[inline]
    pub(super) fn refresh(&mut self, snapshot: &Snapshot, fdb: &Fdb) {
        let basis = (snapshot.epoch, fdb.changes(), fdb.now());
        if basis != self.basis {
            self.forget(basis);
        }
    }

    #[cold]
    fn forget(&mut self, basis: (u64, u64, u32)) {
        self.basis = basis;
        self.generation = self.generation.wrapping_add(1);
        // Once in four thousand million times, what is left of an age long past would look fresh.
        if self.generation == 0 {
            self.known.fill(Known { generation: 0, ..self.known[0] });
            self.generation = 1;
        }
    }

    /// Fetches what [`Pairs::get`] will look at for an untagged frame.
    #[inline]
    pub(super) fn prefetch(&self, frame: &Frame) {
        prefetch_read(&raw const self.known[Pair { likeness: frame.likeness(), way: 0 }.place()]);
    }

    /// Where frames of a pair go, if they may: what was remembered of one holds for all, but for their length.
    #[inline]
    pub(super) fn get(&self, pair: Pair) -> Option<Path> {
        let place = pair.place();
        let is_it = |known: &Known| known.pair == pair && known.generation == self.generation;
        let first = &self.known[place];
        if is_it(first) {
            return Some(first.path);
        }
        // Neighbours share a cache line.
        let second = &self.known[place ^ 1];
        is_it(second).then_some(second.path)
    }

    /// Remembers where frames of a pair go. Only after its source was learned.
    #[inline]
    pub(super) fn put(&mut self, pair: Pair, path: Path) {
        let first = pair.place();
        let place = if self.known[first].generation == self.generation { first ^ 1 } else { first };
        self.known[place] = Known { pair, generation: self.generation, path };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FdbConfig;
    use crate::switch::fdb::{Learned, Station};

    fn snapshot(epoch: u64) -> Snapshot {
        Snapshot { epoch, ports: vec![], networks: vec![], plans: vec![], announcement: None }
    }

    /// Of stations 02:00:00:xx:xx:xx and 02:00:01:xx:xx:xx.
    fn pair(number: u64) -> Pair {
        let [.., a, b] = (number as u16).to_be_bytes();
        let likeness = ([2, 0, 1, 0, a, b, 2, 0].map(u64::from), [2, 0, 0, 0, a, b, 8, 0].map(u64::from));
        let join = |bytes: [u64; 8]| bytes.iter().rev().fold(0, |all, byte| all << 8 | byte);
        Pair { likeness: (join(likeness.0), join(likeness.1)), way: (number % 7) as u32 }
    }

    fn path(number: u64) -> Path {
        Path { egress: PortId((number % 1000) as u16), vid: (number % 5) as u16 }
    }

    #[test]
    fn remembers_until_something_changes() {
        let fdb = Fdb::new(FdbConfig { entries: 64, per_port: 64, age_seconds: 300 });
        let mut pairs = Pairs::default();
        pairs.refresh(&snapshot(1), &fdb);
        assert_eq!(pairs.get(pair(0)), None);
        let station = Station { mac: 1, vid: 0, network: 0 };
        let changes: [&dyn Fn(); 4] = [
            &|| assert_eq!(fdb.learn(station, PortId(1)), Learned::Yes),
            &|| assert_eq!(fdb.learn(station, PortId(2)), Learned::Moved(PortId(1))),
            &|| fdb.forget(station),
            &|| fdb.set_now(7),
        ];
        for change in changes {
            pairs.put(pair(0), path(3));
            pairs.refresh(&snapshot(1), &fdb);
            assert_eq!(pairs.get(pair(0)), Some(path(3)));
            change();
            pairs.refresh(&snapshot(1), &fdb);
            assert_eq!(pairs.get(pair(0)), None);
        }
        pairs.put(pair(0), path(3));
        pairs.refresh(&snapshot(2), &fdb);
        assert_eq!(pairs.get(pair(0)), None);
        // What was put before the numbers begin anew is not taken for fresh.
        pairs.put(pair(0), path(3));
        pairs.generation = u32::MAX;
        pairs.forget((0, 0, 0));
        assert_eq!((pairs.generation, pairs.get(pair(0))), (1, None));
    }

    #[test]
    fn many_find_room() {
        let mut pairs = Pairs::default();
        let stations = 10_000;
        (0..stations).for_each(|number| pairs.put(pair(number), path(number)));
        let known = (0..stations).filter(|&number| {
            let known = pairs.get(pair(number));
            assert!(known.is_none_or(|known| known == path(number)));
            known.is_some()
        });
        // With two places for each two, by chance: 0.94.
        assert!(known.count() as u64 > stations * 9 / 10);
    }
}
