//! DPDK's own virtio driver as the load: dpdk-testpmd with two ports that swap the addresses of what they receive and
//! send it back, so that a fixed number of frames goes round.

use anyhow::{Context, Result, ensure};
use e2e::process::Process;
use e2e::scratch::Scratch;
use e2e::wait;
use std::io::Write;
use std::path::PathBuf;
use std::process::{ChildStdin, Command};
use std::time::{Duration, Instant};

use super::peers::{Job, Peer};
use super::results::{Metric, Plot};
use super::rounds::{Settings, Work};

const PROMPT: &str = "testpmd> ";
const MEMORY_MIB: u32 = 512;
const RING: u16 = 1024;
/// Bursts of 32 frames that each port keeps in flight.
const BURSTS: u32 = 8;
const MACS: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
const START_LIMIT: Duration = Duration::from_secs(40);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Until frames go round steadily.
const WARMUP: Duration = Duration::from_millis(800);

/// Ring kinds, and how the driver is told of them.
pub(super) const KINDS: [(&str, &str); 4] = [
    ("default", ""),
    ("in-order", ",mrg_rxbuf=0,in_order=1"),
    ("packed", ",packed_vq=1"),
    ("packed in-order", ",packed_vq=1,mrg_rxbuf=0,in_order=1"),
];

/// Throughput with DPDK's driver, by kind of ring and size.
pub fn driver(peers: &[Peer], quick: bool) -> Vec<Work> {
    let how = "Two virtio-user ports of one dpdk-testpmd, which swaps the addresses of what it receives and sends it \
               back; 256 frames in flight each way. With split rings the driver itself is most of what limits it.";
    let metrics = ["Mpps", "Gbit/s"].map(|unit| Metric {
        name: "throughput".to_owned(),
        unit: unit.to_owned(),
        plot: if unit == "Mpps" { Plot::Bars } else { Plot::None },
    });
    let mut work = Work::new("driver", "Throughput with DPDK's driver", "ring, frame", how, metrics.into());
    let lengths: &[u16] = if quick { &[64] } else { &[64, 512, 1514] };
    let kinds = if quick { &KINDS[..1] } else { &KINDS[..] };
    for &length in lengths {
        for &(kind, settings) in kinds {
            for &peer in peers.iter().filter(|peer| peer.knows_all_rings() || kind == "default") {
                let row = format!("{kind} {length}");
                work.case(row, peer.to_string(), move |rig| run(peer, settings, length, rig));
            }
        }
    }
    vec![work]
}

/// Mpps and Gbit/s of both ports together.
fn run(peer: Peer, kind: &str, length: u16, settings: &Settings) -> Result<Vec<f64>> {
    e2e::peer::reserve_hugepages(2 * MEMORY_MIB)?;
    let scratch = Scratch::new("driver")?;
    let sockets = [scratch.join("a.sock"), scratch.join("b.sock")];
    let mut driver = Driver::start(&scratch, &sockets, kind, length, settings.load_cpu)?;
    let job = Job { sockets: &sockets, folder: scratch.path(), cpus: &[settings.switch_cpu], macs: 2, queues: 1 };
    let running = peer.start(&job)?;
    let counted = driver.measure(Duration::from_secs_f64(settings.seconds));
    // The driver hangs when its peer goes first.
    driver.process.kill();
    drop(running);
    counted.with_context(|| format!("against {peer}"))
}

struct Driver {
    process: Process,
    stdin: ChildStdin,
}

impl Driver {
    fn start(scratch: &Scratch, sockets: &[PathBuf; 2], kind: &str, length: u16, cpu: usize) -> Result<Self> {
        // Its output goes to a file, and would come in blocks.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd", "--lcores", &format!("0@{cpu},1@{cpu}"), "-m", &MEMORY_MIB.to_string()]);
        command.args(["--no-pci", "--in-memory", "--single-file-segments", "--huge-unlink=always", "--file-prefix"]);
        command.arg(format!("sl-front-{}", std::process::id()));
        for (number, (socket, mac)) in sockets.iter().zip(MACS).enumerate() {
            let socket = socket.display();
            command.args([
                "--vdev",
                &format!("net_virtio_user{number},path={socket},server=1,queues=1,queue_size={RING},mac={mac}{kind}"),
            ]);
        }
        command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=32768", "--no-lsc-interrupt"]);
        command.args(["--forward-mode=macswap", "--port-topology=loop"]);
        command.args([format!("--rxd={RING}"), format!("--txd={RING}"), format!("--txpkts={length}")]);
        command.args([format!("--eth-peer=0,{}", MACS[1]), format!("--eth-peer=1,{}", MACS[0])]);
        let log = scratch.join("testpmd-front.log");
        let (mut process, stdin) = Process::start_interactive("dpdk-testpmd", command, &log, &[])?;
        // It listens on the second once the switch has connected to the first.
        wait::until_true("testpmd to listen", START_LIMIT, || {
            process.check_alive()?;
            Ok(sockets[0].exists())
        })?;
        Ok(Self { process, stdin })
    }

    /// Types a command and gives what it printed, once all of it is there.
    fn say(&mut self, command: &str, complete: &str) -> Result<String> {
        let before = self.process.log().len();
        writeln!(self.stdin, "{command}").context("cannot talk to testpmd")?;
        self.answer(before, complete, ANSWER_LIMIT)
    }

    fn answer(&mut self, before: usize, complete: &str, limit: Duration) -> Result<String> {
        let process = &mut self.process;
        wait::until(&format!("testpmd to print `{complete}`"), limit, || {
            process.check_alive()?;
            let log = process.log();
            let answer = log.get(before..).unwrap_or_default();
            Ok(answer.contains(complete).then(|| answer.to_owned()))
        })
    }

    fn measure(&mut self, time: Duration) -> Result<Vec<f64>> {
        self.answer(0, PROMPT, START_LIMIT)?;
        std::thread::sleep(WARMUP);
        self.say(&format!("start tx_first {BURSTS}"), PROMPT)?;
        std::thread::sleep(WARMUP);
        let before = self.received()?;
        let began = Instant::now();
        std::thread::sleep(time);
        let after = self.received()?;
        let seconds = began.elapsed().as_secs_f64();
        let rate = |index: usize| (after[index] - before[index]) / seconds;
        ensure!(rate(0) > 0.0, "no frame goes round:\n{}", self.process.log_tail());
        Ok(vec![rate(0) / 1e6, rate(1) * 8.0 / 1e9])
    }

    /// Frames and bytes that both ports have received.
    fn received(&mut self) -> Result<[f64; 2]> {
        let text = self.say("show port stats all", PROMPT)?;
        let sum = |label: &str| -> f64 {
            let numbers =
                text.split(label).skip(1).filter_map(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
            numbers.sum()
        };
        Ok([sum("RX-packets:"), sum("RX-bytes:")])
    }
}
