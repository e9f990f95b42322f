//! What the process costs, and what it has logged.

use anyhow::{Result, bail, ensure};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::soak::audit::open_files;
use crate::switch::{Switch, Usage};

/// Growth that is no leak of what the switch has allocated, in percent.
const TOLERANCE: u64 = 5;
/// The same of all its private memory. The C library keeps for each thread what that has freed, and holes: what a profiler saw in
/// use stayed within 1 % while that grew by 6 % in minutes.
const LOOSE: u64 = 10;
/// After that time the heap is about as large as it gets: while ports come and go the most that was ever used at once sets its
/// size.
const WARM_UP: Duration = Duration::from_secs(150);
/// Words of a log that nobody wants to read.
const NEVER: [&str; 4] = ["panicked at", "ERROR", "memory allocation of", "assertion"];

/// One process of the switch, as the audits have seen it.
#[derive(Debug, Clone)]
pub struct Life {
    /// Its number.
    pub pid: u32,
    /// When it was seen first.
    since: Instant,
    /// Private memory in KiB, at each audit.
    pub memory: Vec<u64>,
    /// What the switch says that it has allocated, in KiB.
    pub allocated: Vec<u64>,
    /// Audits in its warm-up.
    early: usize,
    /// Descriptors, at each audit.
    pub fds: Vec<usize>,
    /// What they were at the first.
    pub open: BTreeMap<String, u64>,
}

impl Life {
    fn of(pid: u32) -> Self {
        Self {
            pid,
            since: Instant::now(),
            memory: Vec::new(),
            allocated: Vec::new(),
            early: 0,
            fds: Vec::new(),
            open: open_files(pid),
        }
    }

    /// Demands that memory stays.
    pub fn check(&self) -> Result<()> {
        for (what, audits, tolerance) in [("allocated", &self.allocated, TOLERANCE), ("private", &self.memory, LOOSE)] {
            if let Some((first, last)) = self.growth(audits) {
                let allowed = first + first * tolerance / 100;
                ensure!(last <= allowed, "process {}: KiB of {what} memory at the audits: {audits:?}", self.pid);
            }
        }
        Ok(())
    }

    /// Whether there were enough audits to tell a leak.
    pub fn is_judged(&self) -> bool {
        self.growth(&self.allocated).is_some()
    }

    /// What the `audits` have seen after the warm-up and at the end, if there were enough of them to tell.
    pub fn growth(&self, audits: &[u64]) -> Option<(u64, u64)> {
        let warm = audits.get(self.early..).filter(|warm| warm.len() >= 4)?;
        let median = |part: &[u64]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part.get(part.len() / 2).copied()
        };
        let third = (warm.len() / 3).max(2);
        Some((median(warm.get(..third)?)?, median(warm.get(warm.len() - third..)?)?))
    }
}

/// All processes so far, and the log.
#[derive(Debug, Default)]
pub struct Watch {
    /// The processes, in their order.
    pub lives: Vec<Life>,
    read: usize,
    /// Warnings, without their figures, and how often each came.
    pub warnings: BTreeMap<String, u64>,
}

impl Watch {
    /// Looks at the process, which is in the same state at each audit.
    ///
    /// # Errors
    /// What has grown.
    pub fn audit(&mut self, switch: &Switch) -> Result<()> {
        let pid = switch.pid();
        let usage = Usage::of(pid)?;
        let allocated = switch.allocated()? >> 10;
        if self.lives.last().is_none_or(|life| life.pid != pid) {
            self.lives.push(Life::of(pid));
        }
        let Some(life) = self.lives.last_mut() else { return Ok(()) };
        life.memory.push(usage.private_kib);
        life.allocated.push(allocated);
        life.fds.push(usage.fds);
        if life.since.elapsed() < WARM_UP {
            life.early = life.memory.len();
        }
        life.check()
    }

    /// Reads what was logged since it was last asked.
    ///
    /// # Errors
    /// A line that must not be there.
    pub fn read_log(&mut self, switch: &Switch) -> Result<()> {
        let log = switch.log();
        let new = log.get(self.read..).unwrap_or_default();
        // A line that is not whole yet is read the next time.
        let whole = new.rfind('\n').map_or(0, |end| end + 1);
        for line in new.get(..whole).unwrap_or_default().lines() {
            if NEVER.iter().any(|word| line.contains(word)) {
                bail!("the switch has logged: {line}");
            }
            if line.contains("WARN") {
                *self.warnings.entry(shape(line)).or_default() += 1;
            }
        }
        self.read += whole;
        Ok(())
    }
}

/// A line without its time and its figures.
fn shape(line: &str) -> String {
    let text = line.split_once("WARN").map_or(line, |(_, text)| text);
    let mut shape = String::new();
    for c in text.chars() {
        let c = if c.is_ascii_digit() { '#' } else { c };
        if c != '#' || !shape.ends_with('#') {
            shape.push(c);
        }
    }
    shape.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(memory: &[u64]) -> Life {
        Life { allocated: memory.to_vec(), early: 1, ..Life::of(std::process::id()) }
    }

    #[test]
    fn growth_is_noticed_noise_is_not() {
        assert!(life(&[5000, 9000, 9100, 9000, 9200, 9100]).check().is_ok());
        assert!(life(&[5000, 9000, 9100, 9500, 10_200, 10_300]).check().is_err());
        assert!(life(&[50_000, 90_000, 91_000, 93_000, 94_000, 95_000]).check().is_ok());
        assert!(life(&[50_000, 90_000, 91_000, 93_000, 96_000, 97_000]).check().is_err());
        assert!(life(&[5000, 9000, 9100, 9000, 9200]).is_judged());
        let short = life(&[5000, 9000, 12_000, 15_000]);
        assert!(short.check().is_ok() && !short.is_judged());
        let private = |memory: &[u64]| Life { allocated: vec![], memory: memory.to_vec(), ..life(&[]) };
        assert!(private(&[50_000, 90_000, 91_000, 93_000, 96_000, 97_000]).check().is_ok());
        assert!(private(&[50_000, 90_000, 91_000, 93_000, 100_000, 101_000]).check().is_err());
    }

    #[test]
    fn lines_are_alike_but_for_figures() {
        assert_eq!(shape("2026-01-01T10:00:00Z  WARN x: port=j12 after 3.5 s"), "x: port=j# after #.# s");
    }
}
