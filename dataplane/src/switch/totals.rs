//! Counts over all ports, those included that are no more: what has to add up.

use std::sync::Arc;

use crate::handover::StatsRecord;
use crate::port::stats::PortStats;
use crate::status::TotalsStatus;
use crate::switch::{DropReason, Slot, Switch};
use crate::sync::lock;

/// Counters of ports that were removed.
#[derive(Debug, Default)]
pub(super) struct Removed {
    /// Of those that nobody counts with any more.
    settled: TotalsStatus,
    /// What was held for a guest may be dropped a moment after its port.
    recent: Vec<Arc<PortStats>>,
}

impl Removed {
    /// Takes in a port that workers do not see any more.
    pub(super) fn add(&mut self, stats: Arc<PortStats>) {
        self.settle();
        self.recent.push(stats);
    }

    fn settle(&mut self) {
        let Self { settled, recent } = self;
        recent.retain(|stats| {
            let in_use = Arc::strong_count(stats) > 1;
            if !in_use {
                count(settled, stats);
            }
            in_use
        });
    }

    fn totals(&mut self) -> TotalsStatus {
        self.settle();
        let mut totals = self.settled.clone();
        self.recent.iter().for_each(|stats| count(&mut totals, stats));
        totals
    }
}

fn count(totals: &mut TotalsStatus, stats: &PortStats) {
    let (rx, tx) = stats.frames();
    totals.rx_frames += rx;
    totals.tx_frames += tx;
    totals.made_frames += stats.made();
    totals.merged_frames += stats.merged();
    for reason in DropReason::ALL {
        let drops = stats.drops(*reason);
        if drops > 0 {
            *totals.drops.entry(reason.name().to_owned()).or_default() += drops;
        }
    }
}

impl Switch {
    /// Frames of all ports that there are or were.
    pub fn totals(&self) -> TotalsStatus {
        let mut tables = lock(&self.inner.tables);
        let mut totals = tables.removed.totals();
        tables.ports.values().for_each(|entry| count(&mut totals, &entry.stats));
        let holds = tables.slots.iter().filter_map(|slot| match slot {
            Slot::Used(view) => view.link.hold.as_ref(),
            _ => None,
        });
        totals.held_frames = holds.map(|hold| hold.len() as u64).sum();
        totals
    }

    /// Of ports that were removed.
    pub(crate) fn removed_totals(&self) -> TotalsStatus {
        lock(&self.inner.tables).removed.totals()
    }

    /// Goes on with the counts of another process.
    pub(crate) fn restore_totals(&self, totals: &TotalsStatus) {
        lock(&self.inner.tables).removed.settled = totals.clone();
    }

    /// Counts a port of another process that nobody goes on with.
    pub(crate) fn count_removed(&self, counts: &StatsRecord) {
        let stats = PortStats::default();
        stats.restore(counts);
        lock(&self.inner.tables).removed.add(Arc::new(stats));
    }
}
