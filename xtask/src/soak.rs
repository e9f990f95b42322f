//! Runs a soak: the switch, guests and stations that come and go, and audits.

use anyhow::{Context, Result, ensure};
use clap::Args;
use e2e::soak;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::stage::build_release;
use crate::{parse_minutes, setup};

#[derive(Args)]
pub(crate) struct Options {
    /// How long; fractions are welcome.
    #[arg(long, default_value_t = 5.0, value_parser = parse_minutes)]
    minutes: f64,
    /// Number that all that is random comes from [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Print the result as JSON, and all else to standard error.
    #[arg(long)]
    json: bool,
    /// Leave out the real guests.
    #[arg(long)]
    no_guests: bool,
    /// Never restart the switch, so that one process has all the time for a leak to show.
    #[arg(long)]
    no_restarts: bool,
}

/// Has everything that is printed from now on, by whatever we start too, go to standard error; gives the former output.
fn divert_output() -> Result<File> {
    let output = std::io::stdout().as_fd().try_clone_to_owned()?;
    // SAFETY: no pointers; both descriptors are ours for ever.
    ensure!(unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } >= 0, "cannot divert the output");
    Ok(output.into())
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let output = options.json.then(divert_output).transpose()?;
    if !options.no_guests {
        setup::ensure()?;
    }
    if std::env::var_os("SLUICE_BIN").is_none() {
        build_release(&["sluice"])?;
    }
    let seed = match options.seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() % 1_000_000,
    };
    let without = [(options.no_guests, " --no-guests"), (options.no_restarts, " --no-restarts")];
    let without: String = without.into_iter().filter(|(left_out, _)| *left_out).map(|(_, name)| name).collect();
    let again = format!("cargo xtask soak --minutes {} --seed {seed}{without}", options.minutes);
    println!("==> seed {seed}; to repeat it: {again}");
    let wanted = soak::Options {
        time: Duration::from_secs_f64(options.minutes * 60.0),
        seed,
        guests: !options.no_guests,
        restarts: !options.no_restarts,
    };
    let report = soak::run(&wanted).with_context(|| format!("THE SOAK HAS FAILED (again: {again})"))?;
    match output {
        Some(mut output) => writeln!(output, "{:#}", report.json())?,
        None => print!("{report}"),
    }
    let leaks = if report.is_memory_judged() { "nothing leaks" } else { "no descriptor leaks, memory was not judged" };
    println!("==> clean: no frame on a wrong network, none changed or doubled; counters add up; {leaks}");
    Ok(())
}
