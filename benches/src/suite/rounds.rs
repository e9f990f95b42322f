//! Runs in turn. Each lies between two looks at how near the CPUs are, and is made again if they are not, or if the
//! hypervisor kept a noticeable share of the time to itself.

use anyhow::Result;
use std::time::{Duration, Instant};

use super::results::{Cell, Metric, Set};
use crate::cpu;

/// Share of a CPU that the hypervisor may keep from us during a run.
const STOLEN: f64 = 0.02;

/// How to go about it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Rounds of everything.
    pub rounds: u32,
    /// Seconds of each measurement.
    pub seconds: f64,
    /// Runs made for one figure while they are disturbed.
    pub tries: u32,
    /// Looks at the CPUs, half a second apart, before a run is made although they are far.
    pub patience: u32,
    /// CPU of the switch.
    pub switch_cpu: usize,
    /// CPU of the load.
    pub load_cpu: usize,
}

/// Does one run, and gives a number for each metric; the first is the one by which runs are judged.
pub type Run = Box<dyn Fn(&Settings) -> Result<Vec<f64>>>;

/// One kind of run.
pub struct Case {
    /// Its row.
    pub row: String,
    /// Its column.
    pub column: String,
    /// How to do it.
    pub run: Run,
}

/// A set to be measured.
pub struct Work {
    /// Name, title and the rest; cells are to be filled.
    pub set: Set,
    /// The runs.
    pub cases: Vec<Case>,
}

impl Work {
    /// A set of this name, without cases yet.
    pub fn new(name: &str, title: &str, row: &str, how: &str, metrics: Vec<Metric>) -> Self {
        let own = str::to_owned;
        let set = Set { name: own(name), title: own(title), how: own(how), row: own(row), metrics, cells: Vec::new() };
        Self { set, cases: Vec::new() }
    }

    /// Adds a kind of run.
    pub fn case(
        &mut self,
        row: impl Into<String>,
        column: impl Into<String>,
        run: impl Fn(&Settings) -> Result<Vec<f64>> + 'static,
    ) {
        self.cases.push(Case { row: row.into(), column: column.into(), run: Box::new(run) });
    }

    /// Runs all, round after round; `told` hears of each run.
    pub fn measure(mut self, settings: &Settings, mut told: impl FnMut(&str)) -> Set {
        let metrics = self.set.metrics.len();
        self.set.cells = (self.cases.iter())
            .map(|case| Cell {
                row: case.row.clone(),
                column: case.column.clone(),
                samples: vec![Vec::new(); metrics],
                ..Cell::default()
            })
            .collect();
        for round in 1..=settings.rounds {
            for (case, cell) in self.cases.iter().zip(&mut self.set.cells) {
                let what =
                    format!("{} {round}/{}  {:>12}  {:<12}", self.set.name, settings.rounds, case.row, case.column);
                match run_near(&case.run, settings) {
                    Ok((values, near)) => {
                        if !near {
                            cell.disturbed.push(cell.samples.first().map_or(0, Vec::len));
                        }
                        cell.samples.iter_mut().zip(&values).for_each(|(samples, value)| samples.push(*value));
                        told(&format!("{what} {}{}", numbers(&values), if near { "" } else { "  (disturbed)" }));
                    }
                    Err(error) => {
                        cell.failures.push(format!("{error:#}"));
                        told(&format!("{what} failed: {error:#}"));
                    }
                }
            }
        }
        self.set
    }
}

fn numbers(values: &[f64]) -> String {
    values.iter().map(|value| format!(" {value:9.2}")).collect()
}

/// One undisturbed run; the best of the disturbed ones if none was.
fn run_near(run: &Run, settings: &Settings) -> Result<(Vec<f64>, bool)> {
    let is_near = || cpu::line_ns(settings.switch_cpu, settings.load_cpu).is_ok_and(|ns| ns <= cpu::NEAR_NS);
    let mut best: Option<Vec<f64>> = None;
    for _ in 0..settings.tries.max(1) {
        let mut before = is_near();
        for _ in 1..settings.patience {
            if before {
                break;
            }
            std::thread::sleep(Duration::from_millis(500));
            before = is_near();
        }
        let (stolen, began) = (cpu::stolen(), Instant::now());
        let values = run(settings)?;
        let taken = cpu::stolen().saturating_sub(stolen).as_secs_f64() / began.elapsed().as_secs_f64();
        if before && taken < STOLEN && is_near() {
            return Ok((values, true));
        }
        if best.as_ref().is_none_or(|best| best.first() < values.first()) {
            best = Some(values);
        }
    }
    Ok((best.unwrap_or_default(), false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use std::cell::Cell as Counter;

    fn settings() -> Settings {
        Settings { rounds: 2, seconds: 0.1, tries: 1, patience: 0, switch_cpu: 0, load_cpu: 0 }
    }

    #[test]
    fn rounds_take_turns_and_failures_are_kept() {
        let metric = Metric { name: "throughput".into(), unit: "Mpps".into(), ..Metric::default() };
        let mut work = Work::new("x", "X", "frame", "", vec![metric]);
        let runs = Counter::new(0.0);
        work.case("64", "good", move |_| {
            runs.set(runs.get() + 1.0);
            Ok(vec![runs.get()])
        });
        work.case("64", "bad", |_| bail!("no"));
        let mut told = Vec::new();
        let set = work.measure(&settings(), |line| told.push(line.to_owned()));
        assert_eq!(told.len(), 4);
        assert!(told[0].contains("good") && told[1].contains("bad") && told[2].contains("good"), "{told:?}");
        assert_eq!(set.cell("64", "good").unwrap().samples, [[1.0, 2.0]]);
        assert_eq!(set.cell("64", "bad").unwrap().failures, ["no", "no"]);
    }
}
