//! Runs the set of measurements, and writes results.json, results.md and plots.

use anyhow::{Context, Result, bail, ensure};
use benches::cpu;
use benches::suite::peers::Peer;
use benches::suite::results::{Outcome, Plot, Results, Set};
use benches::suite::rounds::{Settings, Work};
use benches::suite::{bars, cases, dpdk, host, iperf, markdown, plot};
use clap::Parser;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Sets in the order in which they are measured.
const SETS: [&str; 7] = ["throughput", "driver", "latency", "scaling", "stalled", "workers", "iperf"];
/// Those of a quick run.
const QUICK: [&str; 4] = ["throughput", "latency", "scaling", "stalled"];
/// Hugepages for the load's memory, which does without where there are none.
const LOAD_MIB: u32 = 256;

/// Measures Sluice beside its peers.
///
/// `cargo xtask bench` builds everything and passes its options on to this program.
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// One short round of a few sets, to see whether all works: its figures are rough
    #[arg(long)]
    quick: bool,
    /// Only these sets: throughput, driver, latency, scaling, stalled, workers, iperf
    #[arg(long, value_name = "SET", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these switches
    #[arg(long, value_name = "PEER", value_delimiter = ',')]
    peers: Vec<Peer>,
    /// Where results go [default: bench in the target folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Rounds of everything [default: 5, or 1 if quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Seconds of each measurement [default: 1, or 0.4 if quick; iperf: whole ones, 5, or 2 if quick]
    #[arg(long, value_parser = parse_seconds)]
    seconds: Option<f64>,
    /// Fail if a bar is missed; what was not measured does not count
    #[arg(long)]
    strict: bool,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds from 0.01 to 3600".into()),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let names = names(arguments)?;
    let cpus = e2e::machine::cpus()?;
    ensure!(cpus.switch != cpus.load, "measuring needs two CPUs: one for the switch, one for the load");
    if let Err(error) = e2e::peer::reserve_hugepages(LOAD_MIB) {
        println!("the load may have to do without hugepages: {error:#}");
    }
    let settings = settings(arguments, cpus.switch[0], cpus.load[0]);
    let began = Instant::now();
    let mut results = Results { machine: host::describe(), ..Results::default() };
    let near = cpu::line_ns(settings.switch_cpu, settings.load_cpu)?;
    results.machine.push(("cache line between the CPUs".to_owned(), format!("{near:.0} ns at the beginning")));
    let peers = present(arguments, &mut results.notes);
    let out = match &arguments.out {
        Some(folder) => folder.clone(),
        None => e2e::machine::target()?.join("bench"),
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    for name in names {
        println!("==> {name}");
        for set in measure(name, &peers, &settings, arguments)?.into_iter().filter(|set| !set.cells.is_empty()) {
            results.sets.push(set);
            results.verdicts = bars::judge(&results.sets);
            // What was measured is worth keeping, whatever happens to the rest.
            write(&results, &out)?;
        }
    }
    let took = began.elapsed().as_secs();
    println!("==> verdicts");
    results.verdicts.iter().for_each(|verdict| println!("    {}", bars::line(verdict)));
    println!("==> {}, {took} s", out.join("results.md").display());
    judge(&results, arguments.strict)
}

/// Whether there is something to look at, and nothing has failed; if `strict`, no bar is missed either.
fn judge(results: &Results, strict: bool) -> Result<()> {
    let cells = || results.sets.iter().flat_map(|set| &set.cells);
    let failures: usize = cells().map(|cell| cell.failures.len()).sum();
    ensure!(failures == 0, "{failures} runs failed; results.md tells which");
    ensure!(cells().any(|cell| cell.samples.iter().any(|samples| !samples.is_empty())), "nothing was measured");
    let missed = results.verdicts.iter().filter(|verdict| verdict.outcome == Outcome::Missed).count();
    ensure!(!strict || missed == 0, "{missed} bars are missed; results.md tells which");
    Ok(())
}

fn names(arguments: &Arguments) -> Result<Vec<&'static str>> {
    for name in &arguments.only {
        if !SETS.contains(&name.as_str()) {
            bail!("no set is called {name}; there are {}", SETS.join(", "));
        }
    }
    let default = if arguments.quick { &QUICK[..] } else { &SETS[..] };
    let wanted = |name: &&str| {
        if arguments.only.is_empty() { default.contains(name) } else { arguments.only.iter().any(|only| only == name) }
    };
    Ok(SETS.into_iter().filter(wanted).collect())
}

fn settings(arguments: &Arguments, switch_cpu: usize, load_cpu: usize) -> Settings {
    let (rounds, seconds, tries, patience) = if arguments.quick { (1, 0.4, 1, 2) } else { (5, 1.0, 4, 20) };
    Settings {
        rounds: arguments.rounds.unwrap_or(rounds),
        seconds: arguments.seconds.unwrap_or(seconds),
        tries,
        patience,
        switch_cpu,
        load_cpu,
    }
}

/// The switches that are here; a line for each that is not.
fn present(arguments: &Arguments, notes: &mut Vec<String>) -> Vec<Peer> {
    let wanted = if arguments.peers.is_empty() { &Peer::ALL[..] } else { &arguments.peers };
    let mut here = Vec::new();
    for &peer in wanted {
        match peer.absence() {
            None => here.push(peer),
            Some(why) => {
                println!("without {peer}: {why}");
                notes.push(format!("{peer} was not measured: {why}"));
            }
        }
    }
    here
}

fn measure(name: &str, peers: &[Peer], settings: &Settings, arguments: &Arguments) -> Result<Vec<Set>> {
    let quick = arguments.quick;
    let told = |line: &str| println!("    {line}");
    let work: Vec<Work> = match name {
        "throughput" => cases::throughput(peers, quick),
        "driver" => match Peer::Testpmd.absence() {
            None => dpdk::driver(peers, quick),
            Some(why) => {
                told(&format!("left out: {why}"));
                Vec::new()
            }
        },
        "latency" => cases::latency(peers, quick),
        "scaling" => cases::scaling(peers, quick),
        "stalled" => cases::stalled(peers, quick),
        "workers" => cases::workers(peers),
        "iperf" => {
            let seconds = arguments.seconds.map_or(if quick { 2 } else { 5 }, |seconds| seconds.ceil() as u32);
            return Ok(vec![iperf::measure(peers, settings.rounds, seconds, quick, told)?]);
        }
        _ => bail!("no set is called {name}"),
    };
    Ok(work.into_iter().map(|work| work.measure(settings, told)).collect())
}

fn write(results: &Results, folder: &Path) -> Result<()> {
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    put("results.json", serde_json::to_string_pretty(results)?.as_bytes())?;
    put("results.md", markdown::page(results).as_bytes())?;
    for set in &results.sets {
        for (place, _) in set.metrics.iter().enumerate().filter(|(_, metric)| metric.plot != Plot::None) {
            let svg = plot::svg(set, place);
            put(&plot::file_name(set, place, "svg"), svg.as_bytes())?;
            put(&plot::file_name(set, place, "png"), &plot::png(&svg)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use benches::suite::results::{Cell, Verdict};

    #[test]
    fn what_measures_nothing_is_refused() {
        for wrong in [["--rounds", "0"], ["--seconds", "-1"], ["--seconds", "0"], ["--seconds", "nan"]] {
            assert!(Arguments::try_parse_from([&["suite"], &wrong[..]].concat()).is_err(), "{wrong:?}");
        }
        assert!(Arguments::try_parse_from(["suite", "--rounds", "1", "--seconds", "0.4"]).is_ok());
        let with = |samples: Vec<f64>| {
            let cells = vec![Cell { samples: vec![samples], ..Cell::default() }];
            judge(&Results { sets: vec![Set { cells, ..Set::default() }], ..Results::default() }, false)
        };
        assert!(judge(&Results::default(), false).is_err() && with(vec![]).is_err() && with(vec![1.0]).is_ok());
    }
    #[test]
    fn only_a_strict_run_fails_for_a_missed_bar() {
        let cells = vec![Cell { samples: vec![vec![1.0]], ..Cell::default() }];
        let with = |outcome| {
            let verdicts = vec![Verdict { outcome, ..Verdict::default() }];
            let sets = vec![Set { cells: cells.clone(), ..Set::default() }];
            [false, true].map(|strict| {
                judge(&Results { sets: sets.clone(), verdicts: verdicts.clone(), ..Results::default() }, strict).is_ok()
            })
        };
        assert_eq!(with(Outcome::Missed), [true, false]);
        assert_eq!(with(Outcome::Met), [true, true]);
        assert_eq!(with(Outcome::NotMeasured), [true, true]);
    }
}
