//! What mappings take of the process, which all ports share: addresses, without any left of which the next allocation of
//! anybody would be the last, and places in the kernel's list of mappings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::MemError;
use crate::limits::{MAX_MAPPED, MAX_MAPPINGS, MAX_PORT_MAPPINGS};

/// One port can have at most a so manieth part of what no other one has.
const PART: u64 = 16;

/// Bytes, and mappings.
pub(super) type Amounts = [u64; 2];

/// What there is of one kind, and what is taken of it.
#[derive(Debug)]
struct Pool {
    most: u64,
    /// What one port may take, however much there is left.
    most_of_one: u64,
    taken: AtomicU64,
}

impl Pool {
    const fn of(most: u64, most_of_one: u64) -> Self {
        Self { most, most_of_one, taken: AtomicU64::new(0) }
    }
}

static POOLS: [Pool; 2] = [Pool::of(MAX_MAPPED, u64::MAX), Pool::of(MAX_MAPPINGS, MAX_PORT_MAPPINGS)];

/// What one port has.
#[derive(Debug)]
pub struct Share {
    pools: &'static [Pool; 2],
    own: [AtomicU64; 2],
}

impl Default for Share {
    fn default() -> Self {
        Self { pools: &POOLS, own: Default::default() }
    }
}

impl Share {
    /// For a change after which the port no longer has what `instead_of` says. Never less than what it has is enough.
    pub(super) fn claim(self: &Arc<Self>, instead_of: Amounts) -> Claim {
        let before = self.own.each_ref().map(|own| own.load(Ordering::Relaxed));
        Claim { share: self.clone(), bound: Some((instead_of, before)) }
    }

    /// For what the port had in another process, whose ports may have come in another order: it is not bound to its part.
    pub fn inherit(self: &Arc<Self>) -> Claim {
        Claim { share: self.clone(), bound: None }
    }
}

/// A right to map.
#[derive(Debug)]
pub struct Claim {
    share: Arc<Share>,
    /// What goes after the change, and what there was before it.
    bound: Option<(Amounts, Amounts)>,
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    /// Nothing is left.
    OfAll,
    /// The port has its part.
    OfPort,
}

impl Claim {
    /// Takes room for one more mapping of so many bytes.
    pub(super) fn take(&self, bytes: u64) -> Result<Room, MemError> {
        let mut room = Room { share: self.share.clone(), amounts: [0; 2] };
        let errors =
            [[MemError::NoRoom(bytes), MemError::Share(bytes)], [MemError::NoMappings, MemError::PortMappings]];
        for ((kind, amount), [of_all, of_port]) in [bytes, 1].into_iter().enumerate().zip(errors) {
            self.take_one(kind, amount).map_err(|lack| if lack == Lack::OfAll { of_all } else { of_port })?;
            room.amounts[kind] = amount;
        }
        Ok(room)
    }

    fn take_one(&self, kind: usize, amount: u64) -> Result<(), Lack> {
        let (pool, own) = (&self.share.pools[kind], &self.share.own[kind]);
        let has = own.load(Ordering::Relaxed);
        let check = |taken: u64| {
            let sum = taken.checked_add(amount).filter(|sum| *sum <= pool.most).ok_or(Lack::OfAll)?;
            let Some((goes, before)) = self.bound else { return Ok(sum) };
            let (wants, others) = (has + amount, taken.saturating_sub(has));
            let part = (pool.most.saturating_sub(others) / PART).max(before[kind]);
            let fits = wants <= pool.most_of_one && wants.saturating_sub(goes[kind]) <= part;
            if fits { Ok(sum) } else { Err(Lack::OfPort) }
        };
        let taken = pool.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| check(taken).ok());
        taken.map_err(|taken| check(taken).err().unwrap_or(Lack::OfAll))?;
        own.fetch_add(amount, Ordering::Relaxed);
        Ok(())
    }
}

/// What a mapping takes, for as long as it is there.
#[derive(Debug)]
pub(super) struct Room {
    share: Arc<Share>,
    amounts: Amounts,
}

impl Room {
    pub(super) fn amounts(&self) -> Amounts {
        self.amounts
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for ((pool, own), amount) in self.share.pools.iter().zip(&self.share.own).zip(self.amounts) {
            own.fetch_sub(amount, Ordering::Relaxed);
            pool.taken.fetch_sub(amount, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process with room for 1600 bytes in 160 mappings.
    fn pools() -> &'static [Pool; 2] {
        Box::leak(Box::new([Pool::of(1600, u64::MAX), Pool::of(160, 12)]))
    }

    fn port(pools: &'static [Pool; 2]) -> Arc<Share> {
        Arc::new(Share { pools, own: Default::default() })
    }

    fn taken(pools: &[Pool; 2]) -> Amounts {
        pools.each_ref().map(|pool| pool.taken.load(Ordering::Relaxed))
    }

    #[test]
    fn greedy_ports_leave_most_to_others() {
        let pools = pools();
        let mut rooms = Vec::new();
        for _ in 0..10 {
            let greedy = port(pools);
            while let Ok(room) = greedy.claim([0; 2]).take(10) {
                rooms.push(room);
            }
            assert!(matches!(greedy.claim([0; 2]).take(10), Err(MemError::Share(10) | MemError::PortMappings)));
        }
        assert!(taken(pools)[0] <= 1600 / 2, "{:?}", taken(pools));
        port(pools).claim([0; 2]).take(50).unwrap();
        drop(rooms);
        assert_eq!(taken(pools), [0; 2]);
    }

    #[test]
    fn a_port_keeps_what_it_has() {
        let pools = pools();
        let (first, second) = (port(pools), port(pools));
        let old = first.claim([0; 2]).take(100).unwrap();
        assert!(matches!(first.claim([0; 2]).take(1), Err(MemError::Share(1))));
        let _other = second.claim([0; 2]).take(90).unwrap();
        // Its part is smaller by now, but another table instead of the old one is no more than there was.
        let claim = first.claim(old.amounts());
        let new = [claim.take(50).unwrap(), claim.take(50).unwrap()];
        assert!(matches!(claim.take(1), Err(MemError::Share(1))));
        drop(old);
        assert_eq!(taken(pools), [190, 3]);
        drop(new);
        assert_eq!(taken(pools), [90, 1]);
        assert_eq!(first.own.each_ref().map(|own| own.load(Ordering::Relaxed)), [0; 2]);
        // After a takeover the large one may be the last one.
        let (third, claim) = (port(pools), first.inherit());
        let _rest = third.inherit().take(1400).unwrap();
        let room = claim.take(110).unwrap();
        assert!(matches!(claim.take(1), Err(MemError::NoRoom(1))));
        assert!(matches!(claim.take(u64::MAX), Err(MemError::NoRoom(u64::MAX))));
        assert_eq!(taken(pools), [1600, 3]);
        drop(room);
        let again = first.claim([0; 2]).take(7);
        assert!(matches!(again, Err(MemError::Share(7))), "{again:?}");
    }

    #[test]
    fn mappings_are_counted_too() {
        let pools = pools();
        let one = port(pools);
        let take = |claim: Claim, count: usize| (0..count).map(|_| claim.take(1)).collect::<Result<Vec<_>, _>>();
        let old = take(one.claim([0; 2]), 6).unwrap();
        // Both tables are there for a moment, but no third one.
        let new = take(one.claim([6, 6]), 6).unwrap();
        assert!(matches!(one.claim([12, 12]).take(1), Err(MemError::PortMappings)));
        assert_eq!(taken(pools), [12, 12]);
        drop((old, new));
        let _others = take(port(pools).inherit(), 160).unwrap();
        assert!(matches!(one.claim([0; 2]).take(1), Err(MemError::NoMappings)));
        assert_eq!(taken(pools), [160, 160]);
    }
}
