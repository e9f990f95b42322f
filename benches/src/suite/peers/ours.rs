//! Ours.

use anyhow::{Context, Result};
use e2e::process::Process;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;

use super::Job;

/// The program: what SLUICE_BIN names, else the one that was built with us.
pub(super) fn program() -> Result<PathBuf> {
    match std::env::var_os("SLUICE_BIN") {
        Some(path) => Ok(e2e::machine::repository().join(path)),
        None => super::sibling("sluice"),
    }
}

pub(super) fn start(job: &Job<'_>) -> Result<Process> {
    let file = job.folder.join("sluice.toml");
    std::fs::write(&file, config(job)?).with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = Command::new(program()?);
    command.arg("run").arg("--config").arg(&file);
    command.arg("--control").arg(job.folder.join("ctl.sock")).arg("--state").arg(job.folder.join("state"));
    Process::start("sluice", command, &job.folder.join("sluice.log"), job.cpus)
}

/// A configuration with nothing but what the job asks for.
fn config(job: &Job<'_>) -> Result<String> {
    let mut text = String::new();
    // Room for all addresses twice over; the default is enough for most.
    if job.macs > 8192 {
        writeln!(
            text,
            "[switch]\nfdb_entries = {0}\nfdb_per_port = {0}",
            (2 * job.macs).next_power_of_two().min(1 << 20)
        )?;
    }
    for cpu in job.cpus {
        writeln!(text, "[[worker]]\ncpu = {cpu}")?;
    }
    for (number, socket) in job.sockets.iter().enumerate() {
        writeln!(text, "[[port]]\nname = \"p{number}\"\nkind = \"vhost-user\"\ntarget = \"{}\"", socket.display())?;
    }
    Ok(text)
}
