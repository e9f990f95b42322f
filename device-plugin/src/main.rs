//! The `sluice-device-plugin` command.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use rustix::thread::CapabilitySet;
use sluice_daemon::capabilities;
use sluice_device_plugin::config::Config;
use sluice_device_plugin::run::run;
use tracing_subscriber::EnvFilter;

/// Threads for calls that wait for files; they come one after the other anyway.
const FILE_THREADS: usize = 4;

/// What it takes to own and empty other users' folders.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN.union(CapabilitySet::FOWNER).union(CapabilitySet::DAC_OVERRIDE);

fn main() -> ExitCode {
    match start(Config::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-device-plugin: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> Result<()> {
    config.check()?;
    start_log(&config)?;
    let kept =
        capabilities::gain_no_more().and_then(|()| capabilities::keep(NEEDED)).context("cannot give up privileges")?;
    let missing = NEEDED - kept;
    if !missing.is_empty() {
        tracing::warn!("without capabilities {missing:?}, folders of other users cannot be made or emptied");
    }
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(FILE_THREADS).build().context("cannot start")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), sockets = config.sockets, root = %config.root.display(), "starting");
    runtime.block_on(run(config))
}

fn start_log(config: &Config) -> Result<()> {
    let default = match config.verbose {
        0 => "info",
        1 => "info,sluice_device_plugin=debug",
        _ => "trace",
    };
    let filter = match std::env::var("SLUICE_LOG") {
        Ok(text) => EnvFilter::try_new(&text).with_context(|| format!("SLUICE_LOG={text} is not understood"))?,
        Err(_) => EnvFilter::new(default),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let is_terminal = std::io::stderr().is_terminal();
    let started = if config.json { log.json().try_init() } else { log.with_ansi(is_terminal).try_init() };
    started.map_err(|error| anyhow::anyhow!("cannot log: {error}"))
}
