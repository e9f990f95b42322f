//! The bars that the project has set itself, and how what was measured stands to them.

use super::dpdk::KINDS;
use super::markdown::number;
use super::peers::Peer;
use super::results::{Outcome, Set, Spread, Verdict};

/// What a ratio, or a figure, is to be.
#[derive(Debug, Clone, Copy)]
enum Limit {
    AtLeast(f64),
    Above(f64),
    AtMost(f64),
}

impl Limit {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::Above(bound) => value > bound,
            Self::AtMost(most) => value <= most,
        }
    }

    /// The better end of a range.
    fn best(self, spread: Spread) -> f64 {
        match self {
            Self::AtLeast(_) | Self::Above(_) => spread.max,
            Self::AtMost(_) => spread.min,
        }
    }

    fn words(self) -> String {
        match self {
            Self::AtLeast(least) => format!("at least {least}"),
            Self::Above(bound) => format!("more than {bound}"),
            Self::AtMost(most) => format!("at most {most}"),
        }
    }
}

/// A row and a column.
type Place = (String, String);

struct Bar {
    /// What is judged, in words.
    what: String,
    set: &'static str,
    metric: &'static str,
    place: Place,
    /// What it is divided by, in words, and where that is; nothing if the figure itself is judged, and its unit.
    beside: (String, Option<Place>),
    limit: Limit,
}

fn ours(row: &str) -> Place {
    (row.to_owned(), Peer::Ours.to_string())
}

/// We beside another column of the same row.
fn beside(what: &str, (set, metric): (&'static str, &'static str), row: &str, limit: Limit, column: &str) -> Bar {
    let other = (row.to_owned(), column.to_owned());
    Bar { what: what.to_owned(), set, metric, place: ours(row), beside: (format!("× {column}"), Some(other)), limit }
}

/// We in one row beside ourselves in another.
fn within(what: &str, (set, metric): (&'static str, &'static str), rows: [&str; 2], limit: Limit, words: &str) -> Bar {
    let other = Some(ours(rows[1]));
    Bar { what: what.to_owned(), set, metric, place: ours(rows[0]), beside: (format!("× {words}"), other), limit }
}

/// With DPDK's driver.
fn driver() -> Vec<Bar> {
    let (ovs, testpmd) = (Peer::Ovs.to_string(), Peer::Testpmd.to_string());
    let mut all = Vec::new();
    for (length, least, column) in [(64, 1.5, &ovs), (512, 1.5, &ovs), (1514, 1.6, &ovs), (1514, 1.2, &testpmd)] {
        for (kind, _) in KINDS {
            let what = format!("DPDK's driver, {kind}, {length} B");
            let row = format!("{kind} {length}");
            all.push(beside(&what, ("driver", "throughput"), &row, Limit::AtLeast(least), column));
        }
    }
    // Level: both wait for the driver.
    for kind in ["default", "in-order"] {
        let what = format!("DPDK's driver, {kind}, 64 B");
        let row = format!("{kind} 64");
        all.push(beside(&what, ("driver", "throughput"), &row, Limit::AtLeast(1.0), &testpmd));
    }
    all
}

/// With our own generator.
fn generator() -> Vec<Bar> {
    let macs = ("macs", "throughput");
    let many = "10000 over 64 ports";
    let mut all = vec![
        Bar {
            what: "Our generator, split ring, 64 B, one worker".to_owned(),
            set: "throughput",
            metric: "throughput",
            place: ours("64"),
            beside: ("Mpps".to_owned(), None),
            limit: Limit::AtLeast(28.0),
        },
        within("1,000 addresses", macs, ["1000 over 2 ports", "2 over 2 ports"], Limit::AtLeast(0.95), "two"),
        within("10,000 over 64 ports", macs, [many, "2 over 2 ports"], Limit::AtLeast(0.75), "two over two ports"),
        within("10,000 over 64 ports", macs, [many, "64 over 64 ports"], Limit::AtLeast(0.75), "64 over 64 ports"),
        within("256 idle ports", ("idle", "throughput"), ["256", "0"], Limit::AtLeast(0.95), "none"),
        beside("p99 at 1 Mpps", ("latency", "p99"), "1", Limit::AtMost(1.0), &Peer::Ovs.to_string()),
    ];
    for load in ["1 Mpps", "broadcast"] {
        let (what, rows) =
            (format!("Stalled receiver, {load}"), [format!("{load}, stalled"), format!("{load}, taken")]);
        let rows = rows.each_ref().map(String::as_str);
        all.push(within(&what, ("stalled", "throughput"), rows, Limit::Above(0.97), "one that takes all"));
    }
    let workers = ("workers", "per free CPU, times workers");
    all.push(within("Two workers, four ports", workers, ["2", "1"], Limit::AtLeast(1.7), "one worker"));
    all
}

/// Between real guests: one stream each way, wherever guests run.
fn guests() -> Vec<Bar> {
    let mut all = Vec::new();
    for flow in ["TCP", "TCP back", "TCP, guests on any CPU", "TCP back, guests on any CPU"] {
        let row = format!("{flow}, MTU 1500");
        for (least, column) in [(3.0, "OVS-DPDK"), (1.3, "OVS with TSO")] {
            all.push(beside(&row, ("iperf", "throughput"), &row, Limit::AtLeast(least), column));
        }
    }
    all
}

fn all() -> Vec<Bar> {
    [driver(), generator(), guests()].into_iter().flatten().collect()
}

/// How these sets stand to all bars.
pub fn judge(sets: &[Set]) -> Vec<Verdict> {
    all().iter().map(|bar| bar.judge(sets)).collect()
}

/// A verdict in one line.
pub fn line(verdict: &Verdict) -> String {
    let measured = match (verdict.median, verdict.best) {
        (Some(median), Some(best)) => format!("{} by medians, {} by best: ", number(median), number(best)),
        _ => String::new(),
    };
    let why = verdict.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    format!("{}: {measured}{}{why}", verdict.bar, verdict.outcome)
}

impl Bar {
    fn judge(&self, sets: &[Set]) -> Verdict {
        let bar = format!("{}: {} {}", self.what, self.limit.words(), self.beside.0);
        let (median, best, runs) = match self.measured(sets) {
            Ok(measured) => measured,
            Err(why) => return Verdict { bar, why: Some(why), ..Verdict::default() },
        };
        let met = self.limit.holds(median) && self.limit.holds(best);
        let outcome = if met { Outcome::Met } else { Outcome::Missed };
        Verdict { bar, median: Some(median), best: Some(best), runs, outcome, why: None }
    }

    /// By medians, by best, and how many runs; or why there is nothing.
    fn measured(&self, sets: &[Set]) -> Result<(f64, f64, usize), String> {
        let set = sets.iter().find(|set| set.name == self.set).ok_or_else(|| format!("no set {}", self.set))?;
        let (own, own_runs) = near(set, self.metric, &self.place)?;
        let Some(other) = &self.beside.1 else {
            return Ok((own.median, self.limit.best(own), own_runs));
        };
        let (other, other_runs) = near(set, self.metric, other)?;
        let best = [own, other].map(|spread| self.limit.best(spread));
        if other.median <= 0.0 || best[1] <= 0.0 {
            return Err("what it is divided by is zero".to_owned());
        }
        Ok((own.median / other.median, best[0] / best[1], own_runs.min(other_runs)))
    }
}

/// What undisturbed runs gave, and how many they were; or why there are none.
fn near(set: &Set, metric: &str, (row, column): &Place) -> Result<(Spread, usize), String> {
    let cell = set.cell(row, column).ok_or_else(|| format!("no {column}, {row}"))?;
    let place = set.metrics.iter().position(|known| known.name == metric).ok_or_else(|| format!("no {metric}"))?;
    let samples = cell.near(place);
    let why = if cell.disturbed.is_empty() { "failed" } else { "were disturbed" };
    let spread = Spread::of(&samples).ok_or_else(|| format!("all runs of {column}, {row} {why}"))?;
    Ok((spread, samples.len()))
}

#[cfg(test)]
mod tests {
    use super::super::results::{Cell, Metric};
    use super::super::{cases, dpdk, iperf};
    use super::*;
    use std::collections::BTreeSet;

    fn set(name: &str, metric: &str, cells: &[(&str, &str, &[f64])]) -> Set {
        let cells = cells.iter().map(|(row, column, samples)| Cell {
            row: (*row).into(),
            column: (*column).into(),
            samples: vec![samples.to_vec()],
            ..Cell::default()
        });
        let metrics = vec![Metric { name: metric.into(), ..Metric::default() }];
        Set { name: name.into(), metrics, cells: cells.collect(), ..Set::default() }
    }

    fn verdict(sets: &[Set], bar: &str) -> Verdict {
        let mut all = judge(sets).into_iter().filter(|verdict| verdict.bar == bar);
        let found = all.next().unwrap_or_else(|| panic!("no bar {bar}"));
        assert!(all.next().is_none(), "two bars {bar}");
        found
    }

    #[test]
    fn medians_and_best_must_both_reach_it() {
        let bar = "DPDK's driver, in-order, 64 B: at least 1.5 × OVS-DPDK";
        let of = |ours: &[f64], ovs: &[f64]| {
            let cells = [("in-order 64", "Sluice", ours), ("in-order 64", "OVS-DPDK", ovs)];
            verdict(&[set("driver", "throughput", &cells)], bar)
        };
        let met = of(&[30.0, 20.0, 24.0], &[10.0, 16.0, 12.0]);
        assert_eq!((met.median, met.best, met.runs), (Some(2.0), Some(30.0 / 16.0), 3));
        assert_eq!((met.outcome, met.why.clone()), (Outcome::Met, None));
        assert!(line(&met).ends_with("2.00 by medians, 1.88 by best: met"), "{}", line(&met));
        assert_eq!(of(&[15.0], &[10.0]).outcome, Outcome::Met);
        assert_eq!(of(&[14.9], &[10.0]).outcome, Outcome::Missed);
        // By medians twice as much, by the best 1.2 times; and the other way round.
        assert_eq!(of(&[20.0, 20.0, 24.0], &[10.0, 10.0, 20.0]).outcome, Outcome::Missed);
        assert_eq!(of(&[12.0, 12.0, 24.0], &[10.0, 10.0, 10.0]).outcome, Outcome::Missed);
    }

    #[test]
    fn smaller_is_better_where_it_is_and_some_bars_are_figures() {
        let latency = |ours: &[f64], ovs: &[f64]| {
            let cells = [("1", "Sluice", ours), ("1", "OVS-DPDK", ovs)];
            verdict(&[set("latency", "p99", &cells)], "p99 at 1 Mpps: at most 1 × OVS-DPDK")
        };
        let met = latency(&[8.0, 4.0, 9.0], &[10.0, 8.0, 30.0]);
        assert_eq!((met.median, met.best, met.outcome), (Some(0.8), Some(0.5), Outcome::Met));
        assert_eq!(latency(&[10.5], &[10.0]).outcome, Outcome::Missed);
        let rate = |ours| {
            let sets = [set("throughput", "throughput", &[("64", "Sluice", ours)])];
            verdict(&sets, "Our generator, split ring, 64 B, one worker: at least 28 Mpps")
        };
        assert_eq!((rate(&[28.0]).outcome, rate(&[28.0]).best), (Outcome::Met, Some(28.0)));
        assert_eq!(rate(&[27.9, 28.5, 20.0]).outcome, Outcome::Missed);
        let stalled = |share| {
            let cells = [("1 Mpps, taken", "Sluice", &[100.0][..]), ("1 Mpps, stalled", "Sluice", &[share])];
            let bar = "Stalled receiver, 1 Mpps: more than 0.97 × one that takes all";
            verdict(&[set("stalled", "throughput", &cells)], bar).outcome
        };
        assert_eq!((stalled(97.5), stalled(97.0)), (Outcome::Met, Outcome::Missed));
    }

    #[test]
    fn what_is_missing_is_not_measured() {
        let bar = "DPDK's driver, packed, 64 B: at least 1.5 × OVS-DPDK";
        assert!(judge(&[]).iter().all(|verdict| verdict.outcome == Outcome::NotMeasured && verdict.runs == 0));
        let of = |set: Set| {
            let verdict = verdict(&[set], bar);
            assert_eq!((verdict.outcome, verdict.median, verdict.best), (Outcome::NotMeasured, None, None));
            verdict.why.unwrap()
        };
        let ours = ("packed 64", "Sluice", &[30.0][..]);
        assert_eq!(of(set("driver", "throughput", &[ours])), "no OVS-DPDK, packed 64");
        let failed = set("driver", "throughput", &[ours, ("packed 64", "OVS-DPDK", &[])]);
        assert_eq!(of(failed), "all runs of OVS-DPDK, packed 64 failed");
        let nothing = set("driver", "throughput", &[ours, ("packed 64", "OVS-DPDK", &[0.0])]);
        assert_eq!(of(nothing), "what it is divided by is zero");
    }

    #[test]
    fn disturbed_runs_do_not_count() {
        let bar = "DPDK's driver, packed, 64 B: at least 1.5 × OVS-DPDK";
        let cells = [("packed 64", "Sluice", &[20.0, 10.0][..]), ("packed 64", "OVS-DPDK", &[10.0, 10.0])];
        let mut set = set("driver", "throughput", &cells);
        assert_eq!(verdict(std::slice::from_ref(&set), bar).median, Some(1.5));
        set.cells[0].disturbed = vec![1];
        let near = verdict(std::slice::from_ref(&set), bar);
        assert_eq!((near.median, near.runs), (Some(2.0), 1));
        set.cells[0].disturbed = vec![0, 1];
        let none = verdict(&[set], bar);
        assert_eq!(none.outcome, Outcome::NotMeasured);
        assert_eq!(none.why.unwrap(), "all runs of Sluice, packed 64 were disturbed");
    }

    /// What a whole run measures: set, metric, row, column.
    fn measured() -> BTreeSet<[String; 4]> {
        let peers = &Peer::ALL;
        let works = [
            cases::throughput(peers, false),
            dpdk::driver(peers, false),
            cases::latency(peers, false),
            cases::scaling(peers, false),
            cases::stalled(peers, false),
            cases::workers(peers),
        ];
        let mut all = BTreeSet::new();
        for work in works.iter().flatten() {
            for (case, metric) in work.cases.iter().flat_map(|case| work.set.metrics.iter().map(move |m| (case, m))) {
                all.insert([&work.set.name, &metric.name, &case.row, &case.column].map(Clone::clone));
            }
        }
        for flow in iperf::flows(false) {
            for (_, fabric) in iperf::FABRICS {
                all.insert(["iperf".into(), "throughput".into(), iperf::row(&flow, 1500), fabric.into()]);
            }
        }
        all
    }

    #[test]
    fn a_whole_run_measures_what_each_bar_needs() {
        let measured = measured();
        for bar in all() {
            for (row, column) in [Some(bar.place), bar.beside.1].into_iter().flatten() {
                let needed = [bar.set.to_owned(), bar.metric.to_owned(), row, column];
                assert!(measured.contains(&needed), "{}: {needed:?}", bar.what);
            }
        }
    }
}
