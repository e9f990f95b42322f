//! How long an adaptive worker polls in vain before it sleeps: as long as has paid lately. Going to sleep and being woken
//! costs a guest more than it costs us, so that it pays to wait for frames that come soon; polling through gaps that are
//! longer than that is time taken from others. The same as what KVM does for idle virtual CPUs (`halt_poll_ns`).

/// Longest wait. Frames of guests under emulation come at most this far apart while they are busy.
const LONGEST_NS: u64 = 200_000;
/// Shortest wait, so that there is something to double.
const SHORTEST_NS: u64 = 10_000;

/// The wait, in nanoseconds.
#[derive(Debug)]
pub(super) struct Patience {
    ns: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self { ns: LONGEST_NS }
    }
}

impl Patience {
    /// Whether polling in vain for so long was enough.
    #[inline]
    pub(super) fn is_over(&self, idle_ns: u64) -> bool {
        idle_ns > self.ns
    }

    /// Frames came after so long a sleep: would waiting for them have paid?
    pub(super) fn slept(&mut self, ns: u64) {
        let wanted = if ns.saturating_add(self.ns) <= LONGEST_NS { self.ns * 2 } else { self.ns / 2 };
        self.ns = wanted.clamp(SHORTEST_NS, LONGEST_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sleeps through gaps of that length until the wait does not change any more, or for long enough.
    fn settled(gap: u64) -> Patience {
        let mut patience = Patience::default();
        for _ in 0..50 {
            if patience.is_over(gap) {
                patience.slept(gap - patience.ns);
            }
        }
        patience
    }

    #[test]
    fn waits_for_what_comes_soon() {
        for gap in [1_000, 50_000, 190_000] {
            assert!(!settled(gap).is_over(gap), "{gap}");
        }
        for gap in [400_000, 1_000_000, u64::MAX] {
            assert_eq!(settled(gap).ns, SHORTEST_NS, "{gap}");
        }
        let mut patience = settled(1_000_000);
        while patience.is_over(100_000) {
            patience.slept(100_000 - patience.ns);
        }
        assert!(patience.ns >= 100_000);
    }
}
