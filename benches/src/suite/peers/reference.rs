//! The stock crates.

use anyhow::Result;
use e2e::process::Process;
use std::path::PathBuf;
use std::process::Command;

use super::Job;

pub(super) fn program() -> Result<PathBuf> {
    super::sibling("reference-switch")
}

pub(super) fn start(job: &Job<'_>) -> Result<Process> {
    let mut command = Command::new(program()?);
    command.args(job.sockets);
    Process::start("reference-switch", command, &job.folder.join("reference.log"), job.cpus)
}
