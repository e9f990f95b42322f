//! dpdk-testpmd with vhost ports: what vhost itself costs, with no switching at all.

use anyhow::Result;
use e2e::process::Process;
use std::process::{ChildStdin, Command};

use super::Job;

const MEMORY_MIB: u32 = 512;

/// Ends with its input.
pub(super) struct Testpmd {
    _process: Process,
    _stdin: ChildStdin,
}

pub(super) fn start(job: &Job<'_>) -> Result<Testpmd> {
    e2e::peer::reserve_hugepages(MEMORY_MIB)?;
    let cpu = job.cpus[0];
    let mut command = Command::new("dpdk-testpmd");
    command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "-m", &MEMORY_MIB.to_string()]);
    command.args(["--no-pci", "--in-memory", "--file-prefix", &format!("sl-back-{}", std::process::id())]);
    for (number, socket) in job.sockets.iter().enumerate() {
        let queues = job.queues;
        command.args(["--vdev", &format!("net_vhost{number},iface={},client=1,queues={queues}", socket.display())]);
    }
    command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=65536", "--txd=1024", "--rxd=1024"]);
    command.args(["--auto-start", "--forward-mode=io", "--no-lsc-interrupt"]);
    command.args([format!("--rxq={}", job.queues), format!("--txq={}", job.queues)]);
    let log = job.folder.join("testpmd-back.log");
    // It needs the threads of DPDK everywhere but its lcore; those are pinned by --lcores.
    let (process, stdin) = Process::start_interactive("dpdk-testpmd", command, &log, job.cpus)?;
    Ok(Testpmd { _process: process, _stdin: stdin })
}
