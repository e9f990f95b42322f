//! Builds the switch and what measures it, as releases, and runs the measurements.

use anyhow::Result;
use clap::Args;
use std::process::Command;

use crate::setup;
use crate::stage::{build_release, must};

#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// `--quick`, `--only SET,…`, `--peers PEER,…`, `--out DIR`, `--rounds N`, `--strict`; `--help` tells all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let only_asks = options.arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if !only_asks {
        setup::ensure()?;
    }
    build_release(&["sluice", "benches"])?;
    let mut suite = Command::new(e2e::machine::target()?.join("release/suite"));
    suite.args(&options.arguments).current_dir(e2e::machine::repository());
    must("the measurement", suite)
}
