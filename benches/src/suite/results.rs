//! What was measured, in the form of the JSON file.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Everything.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// What it was measured on: name and value.
    pub machine: Vec<(String, String)>,
    /// What was said but not measured, such as peers that are not here.
    pub notes: Vec<String>,
    /// The measurements.
    pub sets: Vec<Set>,
    /// How they stand to the bars.
    #[serde(default)]
    pub verdicts: Vec<Verdict>,
}

/// How we stand to one bar.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// What it asks for.
    pub bar: String,
    /// What was measured, of medians: a ratio, or the figure itself where the bar is one.
    pub median: Option<f64>,
    /// The same of the best runs.
    pub best: Option<f64>,
    /// Undisturbed runs behind it, of whichever has fewer.
    pub runs: usize,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was not measured, if so.
    pub why: Option<String>,
}

/// Whether a bar is met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// By medians and by the best runs.
    Met,
    /// By either of them.
    Missed,
    /// Something that it takes is not there.
    #[default]
    #[serde(rename = "not measured")]
    NotMeasured,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Met => "met",
            Self::Missed => "missed",
            Self::NotMeasured => "not measured",
        })
    }
}

/// One question, and its answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Set {
    /// Short name, also of files.
    pub name: String,
    /// What it is about.
    pub title: String,
    /// How it was measured.
    pub how: String,
    /// What the rows are, such as `frame`.
    pub row: String,
    /// What was measured in each run.
    pub metrics: Vec<Metric>,
    /// Rows and columns (peers, mostly) in their order, with all samples.
    pub cells: Vec<Cell>,
}

/// A number that each run gives.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Name, such as `throughput`.
    pub name: String,
    /// Unit, such as `Mpps`.
    pub unit: String,
    /// How it is drawn.
    pub plot: Plot,
}

/// How a metric is drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plot {
    /// Not at all.
    #[default]
    None,
    /// A group of bars for each row.
    Bars,
    /// A line for each column.
    Lines,
    /// The same on a logarithmic scale.
    Log,
}

/// All runs of one kind.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Which row.
    pub row: String,
    /// Which column.
    pub column: String,
    /// What each run gave: by metric, in the order of the runs.
    pub samples: Vec<Vec<f64>>,
    /// Which of these runs were disturbed after all: the CPUs were far from each other, or kept from us by the hypervisor.
    pub disturbed: Vec<usize>,
    /// Runs that failed, with the reason.
    pub failures: Vec<String>,
}

impl Cell {
    /// What undisturbed runs gave of a metric (by place).
    pub fn near(&self, metric: usize) -> Vec<f64> {
        let samples = self.samples.get(metric).map(Vec::as_slice).unwrap_or_default();
        let near = samples.iter().enumerate().filter(|(run, _)| !self.disturbed.contains(run));
        near.map(|(_, sample)| *sample).collect()
    }
}

/// Middle and range of some samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of these samples; nothing if there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] };
        Some(Self { median, min, max })
    }
}

impl Set {
    /// The rows in the order in which they came.
    pub fn rows(&self) -> Vec<&str> {
        in_order(self.cells.iter().map(|cell| cell.row.as_str()))
    }

    /// The columns in the order in which they came.
    pub fn columns(&self) -> Vec<&str> {
        in_order(self.cells.iter().map(|cell| cell.column.as_str()))
    }

    /// One cell.
    pub fn cell(&self, row: &str, column: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.row == row && cell.column == column)
    }

    /// Median and range of a metric (by place) in one cell.
    pub fn spread(&self, row: &str, column: &str, metric: usize) -> Option<Spread> {
        Spread::of(self.cell(row, column)?.samples.get(metric)?)
    }
}

fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = BTreeMap::new();
    names.enumerate().for_each(|(place, name)| {
        seen.entry(name).or_insert(place);
    });
    let mut all: Vec<_> = seen.into_iter().collect();
    all.sort_by_key(|(_, place)| *place);
    all.into_iter().map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ends_are_found() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }

    #[test]
    fn rows_and_columns_keep_their_order() {
        let cell = |row: &str, column: &str| Cell { row: row.into(), column: column.into(), ..Cell::default() };
        let set = Set { cells: vec![cell("64", "b"), cell("64", "a"), cell("128", "b")], ..Set::default() };
        assert_eq!(set.rows(), ["64", "128"]);
        assert_eq!(set.columns(), ["b", "a"]);
        assert!(set.cell("128", "a").is_none());
    }

    #[test]
    fn results_survive_json() {
        let set = Set {
            metrics: vec![Metric { name: "throughput".into(), unit: "Mpps".into(), plot: Plot::Log }],
            cells: vec![Cell { samples: vec![vec![1.5, 2.0]], disturbed: vec![1], ..Cell::default() }],
            ..Set::default()
        };
        assert_eq!(set.cells[0].near(0), [1.5]);
        let verdicts = vec![Verdict::default()];
        let machine = vec![("CPU".into(), "two".into())];
        let results = Results { machine, sets: vec![set], verdicts, ..Results::default() };
        let text = serde_json::to_string(&results).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), results);
        assert!(text.contains("\"log\"") && text.contains("\"not measured\""), "{text}");
    }
}
