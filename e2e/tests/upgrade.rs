//! A new process takes over taps and AF_XDP uplinks, and so does one sandboxed process from another.

use anyhow::{Context, Result, ensure};
use e2e::machine;
use e2e::net::Namespace;
use e2e::ping::PERIOD;
use e2e::process::Process;
use e2e::scratch::Scratch;
use e2e::switch::Switch;
use e2e::wait;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);
/// An AF_XDP socket is opened anew, which may take as long as its driver does; a veth's is quick.
const REOPENED: Duration = Duration::from_secs(2);

/// A switch in the middle, two hosts on taps, one behind a wire.
struct Rig {
    // Ends first.
    switch: Switch,
    hosts: [Namespace; 3],
    _middle: Namespace,
    scratch: Scratch,
}

const ADDRESSES: [&str; 3] = ["10.9.0.1", "10.9.0.2", "10.9.0.3"];

impl Rig {
    fn new() -> Result<Self> {
        let (middle, hosts) = (Namespace::new()?, [Namespace::new()?, Namespace::new()?, Namespace::new()?]);
        middle.run("for k in all default; do echo 1 >/proc/sys/net/ipv6/conf/$k/disable_ipv6; done")?;
        middle.wire("up0", &hosts[2], "eth0", 1500)?;
        let switch = Switch::start_in(&middle, &["--sandbox", "strict"])?;
        for (host, (name, tap)) in hosts.iter().zip([("one", "sl-up1"), ("two", "sl-up2")]) {
            switch.add_port(&format!("{name}=tap:{tap}"))?;
            middle.run(&format!("ip link set {tap} netns {}", host.name()))?;
        }
        for (host, (device, address)) in hosts.iter().zip(["sl-up1", "sl-up2", "eth0"].into_iter().zip(ADDRESSES)) {
            host.run(&format!("ip addr add {address}/24 dev {device} && ip link set {device} up"))?;
        }
        switch.add_port("up=afxdp:up0")?;
        for port in ["one", "two", "up"] {
            switch.wait_port(port, "up")?;
        }
        Ok(Self { switch, hosts, _middle: middle, scratch: Scratch::new("upgrade")? })
    }

    fn reach(&self, to: usize) -> Result<()> {
        wait::until_true("a host to reach another", PATIENCE, || {
            Ok(self.hosts[0].run(&format!("busybox ping -c 1 -W 1 {}", ADDRESSES[to])).is_ok())
        })
    }

    /// Begins to ping a host from the first one.
    fn ping(&self, to: usize) -> Result<Ping> {
        let log = self.scratch.join(format!("ping{to}"));
        let _ = fs::remove_file(&log);
        let mut command = self.hosts[0].command("busybox");
        command.args(["ping", "-i", "0.01", "-W", "1", ADDRESSES[to]]);
        Ok(Ping { process: Process::start("ping", command, &log, &[])?, log })
    }
}

struct Ping {
    process: Process,
    log: PathBuf,
}

impl Ping {
    fn answers(&self) -> Result<Vec<u64>> {
        let text = fs::read_to_string(&self.log)?;
        let number = |line: &str| line.split("seq=").nth(1)?.split(' ').next()?.parse().ok();
        Ok(text.lines().filter_map(number).collect())
    }

    /// Waits until there are some more answers.
    fn goes_on(&self) -> Result<()> {
        let before = self.answers()?.len();
        wait::until_true("answers to ping", PATIENCE, || Ok(self.answers()?.len() > before + 20))
    }

    /// Ends it. Returns the longest time without an answer; none came twice.
    fn end(mut self) -> Result<Duration> {
        self.goes_on()?;
        self.process.kill();
        let mut seen = self.answers()?;
        seen.sort_unstable();
        ensure!(seen.windows(2).all(|pair| pair[0] != pair[1]), "pings were answered twice");
        let first = *seen.first().context("no ping was answered")?;
        let lost = seen.windows(2).map(|pair| pair[1] - pair[0] - 1).chain([first]).max().unwrap_or(0);
        Ok(PERIOD * lost as u32)
    }
}

/// All threads of a process are confined.
fn check_confined(switch: &Switch) -> Result<()> {
    let tasks = format!("/proc/{}/task", switch.pid());
    for task in fs::read_dir(&tasks).context(tasks)? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        ensure!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "not confined: {status}");
    }
    Ok(())
}

#[test]
fn taps_and_uplinks_go_on_in_a_confined_successor() -> Result<()> {
    let _turn = machine::exclusive()?;
    let mut rig = Rig::new()?;
    let result = take_over(&mut rig);
    if result.is_err() {
        println!("{}", rig.switch.log_tail());
    }
    result
}

fn take_over(rig: &mut Rig) -> Result<()> {
    rig.reach(1)?;
    rig.reach(2)?;
    let (tap, wire) = (rig.ping(1)?, rig.ping(2)?);
    for _ in 0..3 {
        tap.goes_on()?;
        wire.goes_on()?;
        let before = rig.switch.port("one")?.count("rx_frames");
        check_confined(&rig.switch)?;
        let still = rig.switch.take_over()?;
        println!("nothing forwarded for {still:?}");
        check_confined(&rig.switch)?;
        ensure!(rig.switch.port("one")?.count("rx_frames") >= before, "counters began anew");
        rig.switch.wait_port("up", "up")?;
    }
    let (tap, wire) = (tap.end()?, wire.end()?);
    println!("without an answer: {tap:?} between taps, {wire:?} over the wire");
    ensure!(tap.is_zero(), "between taps, without an answer for {tap:?}");
    ensure!(wire <= REOPENED, "over the wire, without an answer for {wire:?}");
    // The last one can do all that the first one could.
    for (port, target) in [("one", "tap:sl-up1"), ("up", "afxdp:up0")] {
        rig.switch.del_port(port)?;
        rig.switch.add_port(&format!("{port}={target}"))?;
        rig.switch.wait_port(port, "up")?;
    }
    rig.hosts[1].run(&format!("busybox ping -c 3 -W 2 {}", ADDRESSES[2]))?;
    Ok(())
}
