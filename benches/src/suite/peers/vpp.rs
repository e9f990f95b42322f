//! FD.io VPP, where its program is.

use anyhow::{Result, bail};
use e2e::process::Process;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Job;

/// The program: what VPP_BIN names, else where packages put it.
pub(super) fn program() -> Result<PathBuf> {
    let named = std::env::var_os("VPP_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| PathBuf::from("/usr/bin/vpp"));
    if !path.is_file() {
        bail!("{} is not here (VPP_BIN can name another)", path.display());
    }
    Ok(path)
}

pub(super) fn start(job: &Job<'_>) -> Result<Process> {
    let program = program()?;
    let (commands, config) = (job.folder.join("vpp.cli"), job.folder.join("vpp.conf"));
    let mut text = String::new();
    for (number, socket) in job.sockets.iter().enumerate() {
        let interface = format!("VirtualEthernet0/0/{number}");
        writeln!(text, "create vhost-user socket {}", socket.display())?;
        writeln!(text, "set interface state {interface} up\nset interface l2 bridge {interface} 1")?;
    }
    std::fs::write(&commands, text)?;
    let (folder, cpu) = (job.folder.display(), job.cpus[0]);
    let text = format!(
        "unix {{ nodaemon cli-listen {folder}/vppcli.sock startup-config {} runtime-dir {folder} }}\n\
         cpu {{ main-core {cpu} }}\nstatseg {{ socket-name {folder}/stats.sock }}\n",
        commands.display()
    );
    std::fs::write(&config, text)?;
    let mut command = Command::new(&program);
    // A build that was not installed has its libraries beside it.
    let libraries = program.parent().unwrap_or(Path::new("/")).join("../lib/x86_64-linux-gnu");
    command.arg("-c").arg(&config).env("LD_LIBRARY_PATH", libraries);
    Process::start("vpp", command, &job.folder.join("vpp.log"), job.cpus)
}
