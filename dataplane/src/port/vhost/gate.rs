//! A bound for what a frontend can make us log.

use std::time::{Duration, Instant};

/// Lets a few log lines pass in each period, so that a frontend which comes and goes cannot flood the log.
#[derive(Debug, Default)]
pub(super) struct LogGate {
    since: Option<Instant>,
    passed: u32,
    suppressed: u32,
}

impl LogGate {
    const PERIOD: Duration = Duration::from_secs(10);
    const LINES: u32 = 8;

    /// Whether a line may pass; if so, how many were held back before it.
    pub(super) fn pass(&mut self) -> Option<u32> {
        if self.since.is_none_or(|since| since.elapsed() >= Self::PERIOD) {
            self.since = Some(Instant::now());
            self.passed = 0;
        }
        if self.passed >= Self::LINES {
            self.suppressed += 1;
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_bounded() {
        let mut gate = LogGate::default();
        let passed = (0..100).filter(|_| gate.pass().is_some()).count();
        assert_eq!(passed, LogGate::LINES as usize);
        gate.since = None;
        assert_eq!(gate.pass(), Some(100 - LogGate::LINES));
    }
}
