//! DPDK's own virtio driver as a second, independent guest: dpdk-testpmd with virtio-user ports.

use anyhow::{Context, Result};
use std::io::Write;
use std::path::PathBuf;
use std::process::{ChildStdin, Command};
use std::time::Duration;

use crate::process::Process;
use crate::scratch::Scratch;
use crate::{machine, peer, wait};

const PROMPT: &str = "testpmd> ";
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// In server mode it starts only when the switch has connected to every port.
const START_LIMIT: Duration = Duration::from_secs(40);
const MEMORY_MIB: u32 = 256;
const RING: u32 = 256;

/// What one port has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// What the ports are to be like.
#[derive(Debug, Clone)]
pub struct TestpmdSpec {
    /// Sockets to listen on, each with the port's MAC address. Port n sends to the one after it.
    pub ports: Vec<(PathBuf, String)>,
    /// Further virtio-user settings, such as `in_order=1` or `mrg_rxbuf=0`.
    pub driver: String,
    /// Queue pairs per port.
    pub queues: u16,
    /// Length of the frames, without checksum.
    pub length: u16,
}

/// A running testpmd; ended at drop.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
    stdin: ChildStdin,
    ports: usize,
    _scratch: Scratch,
}

impl Testpmd {
    /// Starts it on a CPU for load; it listens, and [`Testpmd::wait_ready`] waits for the switch.
    pub fn start(spec: &TestpmdSpec) -> Result<Self> {
        peer::reserve_hugepages(MEMORY_MIB)?;
        for (socket, _) in &spec.ports {
            // Unlike QEMU it does not replace what a crashed one has left.
            let _ = std::fs::remove_file(socket);
        }
        let scratch = Scratch::new("testpmd")?;
        let cpu = machine::cpus()?.load[0];
        let log = scratch.join("testpmd.log");
        let (process, stdin) = Process::start_interactive("dpdk-testpmd", command(spec, cpu), &log, &[])?;
        Ok(Self { process, stdin, ports: spec.ports.len(), _scratch: scratch })
    }

    /// Waits until the switch has connected to all ports.
    pub fn wait_ready(&mut self) -> Result<()> {
        let process = &mut self.process;
        wait::until_true("testpmd to start", START_LIMIT, || {
            process.check_alive()?;
            Ok(process.log().contains(PROMPT))
        })
    }

    /// Types a command and gives what it printed.
    pub fn say(&mut self, command: &str) -> Result<String> {
        let before = self.process.log().len();
        writeln!(self.stdin, "{command}").context("cannot talk to testpmd")?;
        let process = &mut self.process;
        wait::until(&format!("testpmd to answer `{command}`"), COMMAND_LIMIT, || {
            process.check_alive()?;
            let log = process.log();
            let answer = log.get(before..).unwrap_or_default();
            Ok(answer.contains(PROMPT).then(|| answer.to_owned()))
        })
        .with_context(|| format!("testpmd said: {}", self.process.log_tail()))
    }

    /// Sends bursts of 32 frames from each queue of each port; from then on what arrives is sent back.
    pub fn start_circulating(&mut self, bursts: u32) -> Result<()> {
        self.say("set fwd macswap")?;
        self.say(&format!("start tx_first {bursts}")).map(drop)
    }

    /// Ends what it does, and sends frames of another length from then on.
    pub fn set_length(&mut self, length: u16) -> Result<()> {
        self.say("stop")?;
        self.say(&format!("set txpkts {length}")).map(drop)
    }

    /// From now on takes what arrives and sends nothing.
    pub fn start_draining(&mut self) -> Result<()> {
        self.say("stop")?;
        self.say("set fwd rxonly")?;
        self.say("start").map(drop)
    }

    /// The counters of all ports.
    pub fn counts(&mut self) -> Result<Vec<Counts>> {
        (0..self.ports).map(|port| Ok(parse(&self.say(&format!("show port stats {port}"))?))).collect()
    }

    /// The end of what it has printed.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // It takes its time for SIGTERM while a port is not connected; nothing here is worth waiting for.
        self.process.kill();
    }
}

fn command(spec: &TestpmdSpec, cpu: usize) -> Command {
    // Its output goes to a file, and would come in blocks.
    let mut command = Command::new("stdbuf");
    command.args(["-oL", "dpdk-testpmd", "--lcores", &format!("0@{cpu},1@{cpu}"), "-m", &MEMORY_MIB.to_string()]);
    command.args(["--no-pci", "--in-memory", "--single-file-segments", "--file-prefix"]);
    command.arg(format!("sl-e2e-{}", std::process::id()));
    for (index, (socket, mac)) in spec.ports.iter().enumerate() {
        let comma = if spec.driver.is_empty() { "" } else { "," };
        let (socket, queues, driver) = (socket.display(), spec.queues, &spec.driver);
        let device = format!(
            "net_virtio_user{index},path={socket},server=1,queues={queues},queue_size={RING},mac={mac}{comma}{driver}"
        );
        command.args(["--vdev", &device]);
    }
    command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384", "--no-lsc-interrupt", "--port-topology=loop"]);
    // Another thread would print them into the midst of an answer, or of the prompt that ends it.
    command.args(["--mask-event", "all"]);
    command.args([format!("--rxq={}", spec.queues), format!("--txq={}", spec.queues)]);
    command.args([format!("--rxd={RING}"), format!("--txd={RING}"), format!("--txpkts={}", spec.length)]);
    for index in 0..spec.ports.len() {
        let next = &spec.ports[(index + 1) % spec.ports.len()].1;
        command.arg(format!("--eth-peer={index},{next}"));
    }
    command
}

fn parse(text: &str) -> Counts {
    let number = |label: &str| -> u64 {
        let rest = text.split(label).nth(1).unwrap_or_default();
        rest.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    Counts {
        rx_frames: number("RX-packets:"),
        rx_bytes: number("RX-bytes:"),
        tx_frames: number("TX-packets:"),
        tx_bytes: number("TX-bytes:"),
    }
}
