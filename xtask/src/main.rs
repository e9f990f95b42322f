//! `cargo xtask …`: the only entry point people need.

mod bench;
mod demo;
mod fuzz;
mod sanitizer;
mod setup;
mod soak;
mod stage;
mod supply;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Set up, demonstrate, test and measure Sluice.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what demo and tests need, and make the guests' image.
    Setup {
        /// Only tell what is missing.
        #[arg(long)]
        check: bool,
    },
    /// Boot two guests, let them talk through the switch, and show it.
    Demo(demo::Options),
    /// Let fuzzers look for inputs that break the switch.
    Fuzz(fuzz::Options),
    /// Have guests come, go and migrate while the switch is killed and upgraded, and look for leaks and lost frames.
    Soak(soak::Options),
    /// Write the bill of materials of the programs (CycloneDX, JSON).
    Sbom(supply::sbom::Options),
    /// Run every check: format, lints, docs, unit tests, and systems tests with real guests.
    Test(test::Options),
    /// Measure the switch beside its peers; writes tables and plots.
    Bench(bench::Options),
}

/// How long a task that could go on for ever is to take.
fn parse_minutes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes > 0.0 && minutes <= 7.0 * 24.0 * 60.0 => Ok(minutes),
        _ => Err("give minutes above 0, a week at most".into()),
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup { check: true } => setup::check(),
        Task::Setup { check: false } => setup::ensure_all(),
        Task::Demo(options) => demo::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Sbom(options) => supply::sbom::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_go_on_for_ever_ends() {
        for task in ["fuzz", "soak"] {
            let parse = |minutes| Arguments::try_parse_from(["xtask", task, "--minutes", minutes]);
            for wrong in ["0", "0.0", "nan", "inf", "10081", "soon", ""] {
                let error = parse(wrong).err().map(|error| error.to_string()).unwrap_or_default();
                assert!(error.contains("give minutes above 0, a week at most"), "{task} {wrong}: {error}");
            }
            assert!(parse("0.1").is_ok() && parse("10080").is_ok(), "{task}");
        }
    }
}
