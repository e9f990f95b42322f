//! `sluice stats --cycles`: where the workers' time goes, computed from two readings of their counters.

use std::collections::BTreeMap;

use serde::Serialize;
use sluice_proto::sluice::v1 as proto;

use super::output::table;

/// The stages of a frame's way, in their order.
const STAGES: [&str; 4] = ["load", "classify", "deliver", "publish"];

/// What happened between two readings, or since the start.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Cycles per second.
    frequency: f64,
    seconds: f64,
    workers: Vec<Worker>,
    ports: Vec<Port>,
}

#[derive(Debug, Serialize)]
struct Worker {
    id: u32,
    /// Shares of the time, in percent; the rest went by polling in vain.
    busy_percent: f64,
    asleep_percent: f64,
    frames: u64,
    delivered: u64,
    /// Busy time over frames received; `None` without frames, as the quotients below.
    cycles_per_frame: Option<f64>,
    /// The same, divided as in the passes that were timed by stage.
    stages: BTreeMap<&'static str, Option<f64>>,
    copies_per_frame: Option<f64>,
    frames_per_burst: Option<f64>,
    bursts: Vec<Bucket>,
}

/// Bursts of one size.
#[derive(Debug, Serialize)]
struct Bucket {
    /// Frames at most; `None` for the last one, which has no bound.
    up_to: Option<u64>,
    bursts: u64,
}

#[derive(Debug, Serialize)]
struct Port {
    name: String,
    frames: u64,
    cycles_per_frame: Option<f64>,
}

impl Report {
    pub(crate) fn new(before: &proto::Cycles, now: &proto::Cycles) -> Self {
        let worker = |now: &proto::WorkerCycles| {
            let old = before.workers.iter().find(|old| old.id == now.id);
            Worker::new(old.unwrap_or(&proto::WorkerCycles::default()), now)
        };
        let port = |now: &proto::PortCycles| {
            let old = before.ports.iter().find(|old| old.name == now.name).cloned().unwrap_or_default();
            let (frames, cycles) = (grown(now.frames, old.frames), grown(now.cycles, old.cycles));
            Port { name: now.name.clone(), frames, cycles_per_frame: quotient(cycles, frames) }
        };
        let up = |cycles: &proto::Cycles| cycles.workers.first().map_or(0, |worker| worker.up);
        Self {
            frequency: now.frequency,
            seconds: grown(up(now), up(before)) as f64 / now.frequency.max(1.0),
            workers: now.workers.iter().map(worker).collect(),
            ports: now.ports.iter().map(port).collect(),
        }
    }

    /// For people.
    pub(crate) fn describe(&self) -> String {
        let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        let row = |worker: &Worker| {
            let mut row = vec![
                worker.id.to_string(),
                format!("{:.1} %", worker.busy_percent),
                format!("{:.1} %", worker.asleep_percent),
                worker.frames.to_string(),
                number(worker.cycles_per_frame, 1),
            ];
            row.extend(STAGES.iter().map(|stage| number(worker.stages.get(stage).copied().flatten(), 1)));
            row.extend([number(worker.copies_per_frame, 3), number(worker.frames_per_burst, 1)]);
            row
        };
        let titles = [
            ">WORKER",
            ">BUSY",
            ">ASLEEP",
            ">FRAMES",
            ">CYCLES/FRAME",
            ">LOAD",
            ">CLASSIFY",
            ">DELIVER",
            ">PUBLISH",
            ">COPIES/FRAME",
            ">FRAMES/BURST",
        ];
        let workers = table(&titles, &self.workers.iter().map(row).collect::<Vec<_>>());
        let row = |port: &Port| vec![port.name.clone(), port.frames.to_string(), number(port.cycles_per_frame, 1)];
        let ports = table(&["FROM PORT", ">FRAMES", ">CYCLES/FRAME"], &self.ports.iter().map(row).collect::<Vec<_>>());
        format!("{workers}\n{ports}\n{}\ncycles of {:.3} GHz\n", self.histogram(), self.frequency / 1e9)
    }

    /// A row for each worker, a column for each size of burst.
    fn histogram(&self) -> String {
        let titles: Vec<String> = self.workers.first().map_or(Vec::new(), |worker| {
            let title = |at: usize, up_to: Option<u64>| match (at, up_to) {
                (0 | 1, Some(up_to)) => format!(">{up_to}"),
                (_, Some(up_to)) => format!(">{}-{up_to}", up_to / 2 + 1),
                (at, None) => format!(">OVER {}", 1u64 << (at - 1)),
            };
            worker.bursts.iter().enumerate().map(|(at, bucket)| title(at, bucket.up_to)).collect()
        });
        let titles: Vec<&str> = std::iter::once("BURSTS OF").chain(titles.iter().map(String::as_str)).collect();
        let row = |worker: &Worker| {
            let name = format!("worker {}", worker.id);
            std::iter::once(name).chain(worker.bursts.iter().map(|bucket| bucket.bursts.to_string())).collect()
        };
        table(&titles, &self.workers.iter().map(row).collect::<Vec<_>>())
    }
}

impl Worker {
    fn new(old: &proto::WorkerCycles, now: &proto::WorkerCycles) -> Self {
        let (busy, up, frames) = (grown(now.busy, old.busy), grown(now.up, old.up), grown(now.frames, old.frames));
        let delivered = grown(now.delivered, old.delivered);
        let share = |part: u64| 100.0 * part as f64 / up.max(1) as f64;
        let of = |counts: &proto::WorkerCycles, stage: &str| counts.stages.get(stage).copied().unwrap_or(0);
        let sampled = STAGES.map(|stage| grown(of(now, stage), of(old, stage)));
        let (cycles_per_frame, sum) = (quotient(busy, frames), sampled.iter().sum::<u64>());
        // The whole is exact and the parts are samples: these say how it divides.
        let part = |part: u64| cycles_per_frame.filter(|_| sum > 0).map(|whole| whole * part as f64 / sum as f64);
        let last = now.bursts.len().saturating_sub(1);
        let bucket = |(at, count): (usize, &u64)| Bucket {
            up_to: (at < last).then_some(1 << at.min(63)),
            bursts: grown(*count, old.bursts.get(at).copied().unwrap_or(0)),
        };
        let bursts: Vec<_> = now.bursts.iter().enumerate().map(bucket).collect();
        Self {
            id: now.id,
            busy_percent: share(busy),
            asleep_percent: share(grown(now.asleep, old.asleep)),
            frames,
            delivered,
            cycles_per_frame,
            stages: STAGES.into_iter().zip(sampled.map(part)).collect(),
            copies_per_frame: quotient(grown(now.copies, old.copies), delivered),
            frames_per_burst: quotient(frames, bursts.iter().map(|bucket| bucket.bursts).sum()),
            bursts,
        }
    }
}

/// What began anew meanwhile started from zero.
fn grown(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn quotient(dividend: u64, divisor: u64) -> Option<f64> {
    (divisor > 0).then(|| dividend as f64 / divisor as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(times: u64) -> proto::Cycles {
        let stages = STAGES.iter().zip([1, 2, 4, 3]).map(|(stage, part)| ((*stage).into(), part * times)).collect();
        let worker = proto::WorkerCycles {
            id: 0,
            up: 10_000 * times,
            busy: 2500 * times,
            asleep: 5000 * times,
            frames: 50 * times,
            delivered: 40 * times,
            copies: 60 * times,
            sampled_frames: times,
            stages,
            bursts: vec![times, 0, 0, 2 * times],
        };
        let port = proto::PortCycles { name: "vm1".into(), frames: 50 * times, cycles: 2500 * times };
        proto::Cycles { frequency: 2e9, workers: vec![worker], ports: vec![port] }
    }

    #[test]
    fn quotients_are_those_of_the_interval() {
        let mut first = reading(7);
        // Whatever happened before does not count.
        first.workers[0].busy += 1_000_000;
        let mut second = reading(9);
        second.workers[0].busy += 1_000_000;
        let report = Report::new(&first, &second);
        let worker = &report.workers[0];
        assert_eq!((worker.busy_percent, worker.asleep_percent), (25.0, 50.0));
        assert_eq!((worker.frames, worker.cycles_per_frame), (100, Some(50.0)));
        assert_eq!((worker.copies_per_frame, worker.frames_per_burst), (Some(1.5), Some(100.0 / 6.0)));
        let stages: Vec<_> = STAGES.iter().map(|stage| worker.stages[stage].unwrap()).collect();
        assert_eq!(stages, [5.0, 10.0, 20.0, 15.0]);
        assert_eq!(report.ports[0].cycles_per_frame, Some(50.0));
        assert!((report.seconds - 1e-5).abs() < 1e-9);
        let text = report.describe();
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let row = ["0", "25.0", "%", "50.0", "%", "100", "50.0", "5.0", "10.0", "20.0", "15.0", "1.500", "16.7"];
        assert_eq!(rows[1], row);
        assert_eq!(rows[4], ["vm1", "100", "50.0"]);
        assert_eq!(rows[6], ["BURSTS", "OF", "1", "2", "3-4", "OVER", "4"]);
        assert_eq!(rows[7], ["worker", "0", "2", "0", "0", "4"]);
    }

    #[test]
    fn without_frames_there_is_nothing_to_divide() {
        let report = Report::new(&reading(7), &reading(7));
        assert_eq!(report.workers[0].cycles_per_frame, None);
        assert!(report.describe().contains(" - "));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["workers"][0]["stages"]["load"], serde_json::Value::Null);
        assert_eq!(json["workers"][0]["bursts"][0], serde_json::json!({ "up_to": 1, "bursts": 0 }));
    }
}
