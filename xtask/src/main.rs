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
