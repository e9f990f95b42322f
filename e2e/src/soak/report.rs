//! What a soak tells in the end.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::soak::Options;
use crate::soak::guests::Record;
use crate::soak::ledger::Totals;
use crate::soak::watch::{Life, Watch};

/// What a soak has seen.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    time: Duration,
    audits: u64,
    /// Frames over all processes, as far as they were audited.
    received: u64,
    sent: u64,
    dropped: u64,
    drops: BTreeMap<String, u64>,
    /// Frames that crashes have left between taken and counted.
    recovered: u64,
    /// What the process that runs has counted at the last audit.
    counted: Totals,
    events: BTreeMap<&'static str, u64>,
    guests: Option<Record>,
    lives: Vec<Life>,
    warnings: BTreeMap<String, u64>,
    slowest: Duration,
    /// For how long each takeover has forwarded nothing.
    still: Vec<Duration>,
}

impl Report {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            seed: options.seed,
            time: Duration::ZERO,
            audits: 0,
            received: 0,
            sent: 0,
            dropped: 0,
            drops: BTreeMap::new(),
            recovered: 0,
            counted: Totals::default(),
            events: BTreeMap::new(),
            guests: None,
            lives: Vec::new(),
            warnings: BTreeMap::new(),
            slowest: Duration::ZERO,
            still: Vec::new(),
        }
    }

    /// A takeover has forwarded nothing for so long.
    pub(super) fn stood_still(&mut self, still: Duration) {
        self.still.push(still);
        self.still.sort_unstable();
    }

    /// An audit was passed.
    pub(super) fn audited(&mut self, totals: &Totals, recovered: u64) {
        self.audits += 1;
        self.recovered += recovered;
        self.received += totals.received() - self.counted.received();
        self.sent += totals.sent() - self.counted.sent();
        self.dropped += totals.dropped() - self.counted.dropped();
        for (reason, count) in totals.drops() {
            *self.drops.entry(reason.clone()).or_default() += count - self.counted.drops().get(reason).unwrap_or(&0);
        }
        self.counted = totals.clone();
    }

    /// The counters begin at zero again.
    pub(super) fn restarted(&mut self) {
        self.counted = Totals::default();
    }

    pub(super) fn close(
        &mut self,
        events: &BTreeMap<&'static str, u64>,
        guests: Option<Record>,
        watch: &Watch,
        slowest: Duration,
        time: Duration,
    ) {
        (self.events, self.guests, self.slowest, self.time) = (events.clone(), guests, slowest, time);
        (self.lives, self.warnings) = (watch.lives.clone(), watch.warnings.clone());
    }

    /// In one line, while it goes on.
    pub(super) fn line(&self) -> String {
        format!(
            "{} audits: {} frames received, {} sent, {} dropped",
            self.audits, self.received, self.sent, self.dropped
        )
    }

    /// Whether a process was there for long enough to tell whether its memory grows.
    pub fn is_memory_judged(&self) -> bool {
        self.lives.iter().any(Life::is_judged)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let lives = self.lives.iter().map(|life| {
            json!({"pid": life.pid, "memory_kib": life.memory, "allocated_kib": life.allocated, "fds": life.fds})
        });
        let guests = self.guests.as_ref().map(|guests| {
            json!({"migrations": guests.migrations, "boots": guests.boots, "echoes": guests.echoes,
                "lost_migrating": guests.lost.0, "lost_restarting": guests.lost.1})
        });
        json!({
            "seed": self.seed, "seconds": self.time.as_secs(), "audits": self.audits,
            "frames": {"received": self.received, "sent": self.sent, "dropped": self.dropped,
                "recovered": self.recovered, "drops": self.drops},
            "events": self.events, "guests": guests, "processes": lives.collect::<Vec<_>>(),
            "takeover_us": self.still.iter().map(|still| still.as_micros() as u64).collect::<Vec<_>>(),
            "slowest_answer_ms": self.slowest.as_millis() as u64, "warnings": self.warnings,
            "memory_judged": self.is_memory_judged(), "verdict": "clean",
        })
    }

    /// The process in which there was most time for a leak.
    fn longest(&self) -> Option<&Life> {
        self.lives.iter().max_by_key(|life| life.memory.len())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |counts: &mut dyn Iterator<Item = (&str, u64)>| {
            counts.map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(f, "  time         {} s, {} audits", self.time.as_secs(), self.audits)?;
        writeln!(f, "  events       {}", list(&mut self.events.iter().map(|(name, count)| (*name, *count))))?;
        writeln!(f, "  frames       {} received, {} sent, {} dropped", self.received, self.sent, self.dropped)?;
        writeln!(f, "  drops        {}", list(&mut self.drops.iter().map(|(name, count)| (name.as_str(), *count))))?;
        writeln!(f, "  in crashes   {} frames taken or delivered, and not counted", self.recovered)?;
        if let Some(guests) = &self.guests {
            writeln!(
                f,
                "  guests       {} migrations, {} boots, {} echoes; lost: {} migrating, {} restarting",
                guests.migrations, guests.boots, guests.echoes, guests.lost.0, guests.lost.1
            )?;
        }
        writeln!(f, "  processes    {}, descriptors {:?}", self.lives.len(), self.lives.last().map(|l| &l.fds))?;
        if let Some(life) = self.longest() {
            for (what, audits) in [("allocated", &life.allocated), ("memory", &life.memory)] {
                if let Some((first, last)) = life.growth(audits) {
                    writeln!(f, "  {what:<12} {first} KiB to {last} KiB in {} audits of one process", audits.len())?;
                }
            }
        }
        if !self.is_memory_judged() {
            writeln!(f, "  memory: not judged (that takes a quarter of an hour, or five minutes of --no-restarts)")?;
        }
        if let Some((median, longest)) = self.still.get(self.still.len() / 2).zip(self.still.last()) {
            writeln!(f, "  takeovers    stood still for {median:?}, {longest:?} at most")?;
        }
        writeln!(f, "  slowest      answer on the control socket: {:?}", self.slowest)?;
        for (warning, count) in &self.warnings {
            writeln!(f, "  warned {count:>4}  {warning}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_not_judged_is_not_praised() {
        let report = Report::new(&Options { time: Duration::ZERO, seed: 1, guests: false, restarts: true });
        assert!(report.to_string().contains("not judged"), "{report}");
        assert_eq!(report.json()["memory_judged"], false);
    }
}
