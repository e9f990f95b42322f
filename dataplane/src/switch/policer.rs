//! Rate limits: a token bucket per port and direction, shared by all workers.
//!
//! The bucket is one number, the moment at which it would be full again; what is missing from it now is how far that
//! moment lies ahead. A frame passes as long as anything is left and may take more than that, so that a super-packet
//! larger than the bucket is not stopped for ever; the long-run rate is exact all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{PortConfig, RateLimit};
use crate::worker::stats::Clock;

/// Binary digits after the point of the cost of a byte: at the largest rate it is a small fraction of a tick.
const FRACTION: u32 = 20;

/// The rate limits of a port. They outlive its links.
#[derive(Debug, Clone, Default)]
pub struct Policers {
    /// Of what is received from the port.
    pub rx: Option<Arc<Policer>>,
    /// Of what is sent to the port.
    pub tx: Option<Arc<Policer>>,
}

impl From<&PortConfig> for Policers {
    fn from(config: &PortConfig) -> Self {
        let policer = |limit: RateLimit| Arc::new(Policer::new(limit));
        Self { rx: config.rate_rx.map(policer), tx: config.rate_tx.map(policer) }
    }
}

/// A token bucket that counts in ticks of the workers' clock.
#[derive(Debug)]
#[repr(align(64))]
pub struct Policer {
    full_at: AtomicU64,
    /// Ticks that a byte costs, with [`FRACTION`].
    per_byte: u64,
    /// Ticks to fill the empty bucket.
    depth: u64,
    clock: Clock,
}

impl Policer {
    /// A full bucket.
    pub fn new(limit: RateLimit) -> Self {
        let clock = Clock::start();
        let ticks_per_second = u128::from(clock.ticks_in(std::time::Duration::from_secs(1)));
        Self::with_clock(limit, ticks_per_second, clock)
    }

    fn with_clock(limit: RateLimit, ticks_per_second: u128, clock: Clock) -> Self {
        let rate = u128::from(limit.bits_per_second.max(1));
        let burst = u128::from(limit.burst_bits.unwrap_or_else(|| limit.default_burst_bits()));
        let narrow = |ticks: u128| u64::try_from(ticks).unwrap_or(u64::MAX).clamp(1, u64::MAX / 4);
        Self {
            full_at: AtomicU64::new(0),
            per_byte: narrow(((8 * ticks_per_second) << FRACTION) / rate),
            depth: narrow(burst * ticks_per_second / rate),
            clock,
        }
    }

    /// Takes frames of these lengths in bytes, in order, and returns how many may pass. It is the first ones: within a
    /// burst no time passes, so once the bucket is empty it stays so.
    #[inline]
    pub fn admit(&self, lengths: impl Iterator<Item = usize>) -> u8 {
        self.admit_at(self.clock.ticks(), lengths)
    }

    #[inline]
    fn admit_at(&self, now: u64, lengths: impl Iterator<Item = usize>) -> u8 {
        let missing = self.full_at.load(Ordering::Relaxed).saturating_sub(now);
        let (mut admitted, mut cost) = (0u8, 0u64);
        for len in lengths {
            if missing.saturating_add(cost) >= self.depth {
                break;
            }
            cost = cost.saturating_add((len as u64).saturating_mul(self.per_byte) >> FRACTION);
            admitted = admitted.saturating_add(1);
        }
        if admitted > 0 {
            // Another worker may have taken from the bucket since we looked, so that it goes a burst too deep; that is
            // made up for later. Nothing else is ordered by this.
            let take = |full_at: u64| Some(full_at.max(now).saturating_add(cost));
            let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ticks are nanoseconds here.
    fn policer(bits_per_second: u64, burst_bits: Option<u64>) -> Policer {
        Policer::with_clock(RateLimit { bits_per_second, burst_bits }, 1_000_000_000, Clock::start())
    }

    const START: u64 = 1 << 40;
    const SECOND: u64 = 1_000_000_000;

    fn admit(policer: &Policer, now: u64, lengths: &[usize]) -> u8 {
        policer.admit_at(START + now, lengths.iter().copied())
    }

    #[test]
    fn a_burst_then_the_rate() {
        // 1 Mbyte/s, 10 kbyte at once.
        let policer = policer(8_000_000, Some(80_000));
        assert_eq!(admit(&policer, 0, &[1000; 32]), 10);
        assert_eq!(admit(&policer, 0, &[1000; 32]), 0);
        assert_eq!(admit(&policer, 1_000_000, &[1000; 32]), 1);
        assert_eq!(admit(&policer, SECOND, &[1000; 32]), 10);
    }

    #[test]
    fn a_super_packet_larger_than_the_bucket_passes_and_is_paid_for() {
        let policer = policer(8_000_000, Some(80_000));
        assert_eq!(admit(&policer, 0, &[60_000, 60]), 1);
        // 60 kbyte at 1 Mbyte/s, of which 10 kbyte were there.
        assert_eq!(admit(&policer, 49_000_000, &[60]), 0);
        assert_eq!(admit(&policer, 51_000_000, &[60]), 1);
    }

    #[test]
    fn the_defaults_are_a_quarter_of_a_second_and_enough_for_a_super_packet() {
        let fast = policer(8_000_000_000, None);
        assert_eq!(fast.depth, SECOND / 4);
        let slow = policer(1_000_000, None);
        assert_eq!(admit(&slow, 0, &[65_549, 65_549]), 2);
        assert_eq!(admit(&slow, 0, &[60]), 0);
    }

    #[test]
    fn extremes_do_not_overflow() {
        for (rate, burst) in [(1000, 1_000_000_000_000), (1_000_000_000_000, 1000), (1000, 1000)] {
            let policer = Policer::with_clock(
                RateLimit { bits_per_second: rate, burst_bits: Some(burst) },
                5_000_000_000,
                Clock::start(),
            );
            for now in [0, 1, u64::MAX / 2, u64::MAX] {
                policer.admit_at(now, std::iter::repeat_n(65_549, 32));
            }
        }
    }

    /// The workers' clock, threads, and real time.
    #[test]
    fn the_rate_holds_over_workers() {
        let policer = Policer::new(RateLimit { bits_per_second: 800_000_000, burst_bits: Some(800_000) });
        let began = std::time::Instant::now();
        let run = || {
            let mut bytes = 0u64;
            while began.elapsed() < std::time::Duration::from_millis(300) {
                bytes += 1500 * u64::from(policer.admit(std::iter::repeat_n(1500, 8)));
            }
            bytes
        };
        let bytes: u64 = std::thread::scope(|scope| {
            let threads = [scope.spawn(run), scope.spawn(run)];
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        let allowed = began.elapsed().as_secs_f64() * 100e6 + 100e3 + 2.0 * 8.0 * 1500.0;
        // No lower bound in time: the threads may not get to run.
        assert!(bytes > 1_000_000 && (bytes as f64) < allowed * 1.02, "{bytes} of {allowed}");
    }

    proptest! {
        /// Whatever is offered whenever, no more passes than the rate, the burst and one frame allow, and nothing is
        /// held back while the bucket has anything.
        #[test]
        fn never_more_than_allowed(offers in proptest::collection::vec((0u64..20_000_000, 60usize..65_000), 1..300)) {
            let policer = policer(80_000_000, Some(800_000));
            let (mut now, mut passed, mut left) = (0u64, 0u64, 100_000f64);
            for (pause, len) in offers {
                now += pause;
                left = (left + pause as f64 / 100.0).min(100_000.0);
                let admitted = admit(&policer, now, &[len]) == 1;
                prop_assert!(admitted == (left > 0.0) || left.abs() < 2.0, "{left}");
                if admitted {
                    passed += len as u64;
                    left -= len as f64;
                }
                prop_assert!(passed <= 100_000 + now / 100 + 65_000);
            }
        }
    }
}
