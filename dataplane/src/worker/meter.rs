//! Where the time of a burst goes: a probe that is carried along with it, and looks at the clock between two stages in
//! one pass of many.

use super::stats::now;

/// Passes with frames between two that are timed by stage. A prime, so as not to keep step with a rhythm of the traffic.
const EVERY: u32 = 61;

/// What is done with a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stage {
    /// Looking for frames, in vain too, and loading them.
    #[default]
    Load,
    /// Deciding where they go.
    Classify,
    /// Bringing them into their receivers' buffers.
    Deliver,
    /// Showing what was done to receivers and sender, and notifying them.
    Publish,
}

impl Stage {
    /// All, in their order.
    pub const ALL: [Self; Self::COUNT] = [Self::Load, Self::Classify, Self::Deliver, Self::Publish];
    /// Number of stages.
    pub const COUNT: usize = 4;

    /// Name in counters and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Classify => "classify",
            Self::Deliver => "deliver",
            Self::Publish => "publish",
        }
    }
}

/// Tells the time of the stages apart while it is on; costs a branch while it is not.
#[derive(Debug)]
pub struct Probe {
    on: bool,
    stage: Stage,
    since: u64,
    /// Ticks that a look at the clock takes itself.
    cost: u64,
    ticks: [u64; Stage::COUNT],
    countdown: u32,
}

impl Default for Probe {
    fn default() -> Self {
        let ticks = [0; Stage::COUNT];
        let mut probe = Self { on: true, stage: Stage::Load, since: now(), cost: 0, ticks, countdown: EVERY - 1 };
        let look = |probe: &mut Self| {
            let before = probe.since;
            probe.enter(Stage::Load);
            probe.since.wrapping_sub(before)
        };
        let cost = (0..64).map(|_| look(&mut probe)).min().unwrap_or(0);
        Self { on: false, cost, ticks, ..probe }
    }
}

impl Probe {
    /// A pass begins.
    #[inline]
    pub fn begin(&mut self, now: u64) {
        (self.stage, self.since) = (Stage::Load, now);
    }

    /// The stage that was going on is over, and this one begins.
    #[inline(always)]
    pub fn enter(&mut self, stage: Stage) {
        if self.on {
            self.note(stage);
        }
    }

    #[cold]
    #[inline(never)]
    fn note(&mut self, stage: Stage) {
        let now = now();
        self.ticks[self.stage as usize] += now.wrapping_sub(self.since).saturating_sub(self.cost);
        (self.stage, self.since) = (stage, now);
    }

    /// A pass that found frames is over. Returns what it spent on each stage, if it was timed.
    #[inline]
    pub fn finish(&mut self) -> Option<[u64; Stage::COUNT]> {
        self.countdown -= 1;
        if self.countdown > 0 {
            return None;
        }
        // The last of a round is timed, from its beginning on.
        let timed = self.on;
        self.on = !timed;
        self.countdown = if timed { EVERY - 1 } else { 1 };
        timed.then(|| std::mem::take(&mut self.ticks))
    }
}

/// Payload copies of a worker, counted where they are made, in frames as receivers see them.
#[derive(Debug, Default, Clone, Copy)]
pub struct Copies {
    /// Frames written to receivers: one copy each.
    pub delivered: u64,
    /// Copies besides: into private memory, to be rebuilt or held, and out of the kernel.
    pub extra: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_of_many_is_timed() {
        let mut probe = Probe::default();
        let mut timed = 0;
        for _ in 0..10 * EVERY {
            probe.begin(now());
            probe.enter(Stage::Deliver);
            let end = now() + 10_000;
            while now() < end {}
            probe.enter(Stage::Load);
            if let Some(ticks) = probe.finish() {
                timed += 1;
                assert!(ticks[Stage::Deliver as usize] >= 9_000, "{ticks:?}");
                assert_eq!(ticks[Stage::Classify as usize], 0);
            }
        }
        assert_eq!(timed, 10);
    }
}
