//! A steady rate.

/// When frames are due. Times are in ticks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    per_tick: f64,
    origin: u64,
    /// Frames that were due so far and have been dealt with.
    done: u64,
}

impl Pace {
    pub(super) fn new(per_tick: f64, origin: u64) -> Self {
        Self { per_tick, origin, done: 0 }
    }

    /// Frames that are due by now and have not been dealt with.
    #[inline]
    pub(super) fn due(&self, now: u64) -> u64 {
        ((now.saturating_sub(self.origin) as f64 * self.per_tick) as u64).saturating_sub(self.done)
    }

    /// When the frame after `ahead` more is due: the first is after one interval.
    pub(super) fn time_of(&self, ahead: u64) -> u64 {
        self.origin + ((self.done + ahead + 1) as f64 / self.per_tick) as u64
    }

    pub(super) fn advance(&mut self, count: u64) {
        self.done += count;
    }

    /// Moves all that is to come by so many ticks.
    pub(super) fn shift(&mut self, ticks: u64) {
        self.origin += ticks;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_due_in_time() {
        let mut pace = Pace::new(0.25, 1000);
        assert_eq!((pace.due(900), pace.due(1003), pace.due(1004), pace.due(1017)), (0, 0, 1, 4));
        assert_eq!((pace.time_of(0), pace.time_of(2)), (1004, 1012));
        pace.advance(3);
        assert_eq!((pace.due(1017), pace.time_of(0)), (1, 1016));
        pace.shift(100);
        assert_eq!((pace.due(1017), pace.due(1117)), (0, 1));
    }
}
