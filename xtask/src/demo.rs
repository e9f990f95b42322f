//! Two guests talk through the switch, for people to watch.

use anyhow::{Context, Result, ensure};
use clap::Args;
use e2e::lab::{Lab, iperf_rate};
use e2e::machine;
use e2e::switch::{Port, Switch, Usage, program};
use serde_json::json;
use std::time::{Duration, Instant};

use crate::setup;
use crate::stage::build_release;

#[derive(Args)]
pub(crate) struct Options {
    /// Leave everything running at the end, and tell the commands to type.
    #[arg(long)]
    keep: bool,
    /// Seconds of TCP in each direction.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
}

/// What one direction of TCP has shown.
struct Flow {
    name: String,
    mbits: f64,
    /// Share of a core that the switch took meanwhile.
    cpu: f64,
    /// Share of the time that its busiest worker spent on frames.
    busy: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    println!("==> building the switch (release)");
    build_release(&["sluice"])?;

    let _turn = machine::exclusive()?;
    let cpus = machine::cpus()?;
    println!(
        "==> booting two guests with {} on CPU {:?}, the switch on CPU {:?}",
        machine::accelerator()?,
        cpus.load,
        cpus.switch
    );
    let start = Instant::now();
    let lab = Lab::pair()?;
    println!(
        "    {} connects to the sockets of both; up in {:.1} s",
        program()?.display(),
        start.elapsed().as_secs_f64()
    );

    lab.wait_reachable(0, "10.0.0.2")?;
    let ping = ping(&lab)?;
    let flows = [(0, 1), (1, 0)].map(|(from, to)| tcp(&lab, from, to, options.seconds));
    let flows = flows.into_iter().collect::<Result<Vec<_>>>()?;
    summary(&lab, &ping, &flows)?;
    if options.keep {
        keep(&lab)?;
    }
    Ok(())
}

/// Gives the line with the round trip times.
fn ping(lab: &Lab) -> Result<String> {
    println!("==> vm1 pings vm2");
    let report = lab.guests[0].run("ping -c 10 -i 0.2 -W 2 10.0.0.2")?;
    for line in report.lines().filter(|line| line.contains("packet loss") || line.contains("round-trip")) {
        println!("    {line}");
    }
    ensure!(report.contains(" 0% packet loss"), "ping lost packets:\n{report}");
    let times = report.lines().find_map(|line| line.strip_prefix("round-trip min/avg/max = "));
    Ok(times.context("ping gave no times")?.to_owned())
}

/// One direction of TCP, with the ports' counters each second.
fn tcp(lab: &Lab, from: usize, to: usize, seconds: u32) -> Result<Flow> {
    let name = format!("vm{} to vm{}", from + 1, to + 1);
    println!("==> TCP {name}, {seconds} s; what the ports count:");
    println!("    {:>4} {:>24} {:>24} {:>8} {:>8}", "s", "vm1 in / out", "vm2 in / out", "drops", "CPU");
    lab.serve_iperf(to)?;
    let request = json!({"op": "run", "seconds": seconds + 30,
        "command": format!("iperf3 -J -c 10.0.0.{} -t {seconds}", to + 1)});
    let switch = lab.switch()?;
    let (usage, start) = (switch.usage()?, Instant::now());
    lab.guests[from].begin(&request)?;
    let busy = show_counters(switch, seconds)?;
    let spent = (switch.usage()?.cpu - usage.cpu).as_secs_f64() / start.elapsed().as_secs_f64();
    let answer = lab.guests[from].finish(&request, Duration::from_secs(60))?;
    let mbits = iperf_rate(answer["out"].as_str().unwrap_or_default())?;
    println!("    iperf3: {mbits:.0} Mbit/s");
    Ok(Flow { name, mbits, cpu: spent, busy })
}

/// Prints a line per second; gives the highest busy share of a worker.
fn show_counters(switch: &Switch, seconds: u32) -> Result<f64> {
    let start = Instant::now();
    let (mut before, mut usage, mut at, mut busiest) = (ports(switch)?, switch.usage()?, Instant::now(), 0.0_f64);
    for second in 1..=seconds {
        let next = start + Duration::from_secs(u64::from(second));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let (now, now_usage, passed) = (ports(switch)?, switch.usage()?, at.elapsed().as_secs_f64());
        let cells: Vec<String> = before.iter().zip(&now).map(|(before, now)| rates(before, now, passed)).collect();
        let drops: u64 = now.iter().map(Port::dropped).sum::<u64>() - before.iter().map(Port::dropped).sum::<u64>();
        let cpu = (now_usage.cpu - usage.cpu).as_secs_f64() / passed * 100.0;
        println!("    {second:>4} {:>24} {:>24} {drops:>8} {cpu:>6.0} %", cells[0], cells[1]);
        busiest = busiest.max(busy_share(switch)?);
        (before, usage, at) = (now, now_usage, Instant::now());
    }
    Ok(busiest)
}

fn ports(switch: &Switch) -> Result<Vec<Port>> {
    ["vm1", "vm2"].into_iter().map(|name| switch.port(name)).collect()
}

fn rates(before: &Port, now: &Port, seconds: f64) -> String {
    let mbits = |counter: &str| (now.count(counter) - before.count(counter)) as f64 * 8.0 / 1e6 / seconds;
    format!("{:.1} / {:.1} Mbit/s", mbits("rx_bytes"), mbits("tx_bytes"))
}

fn busy_share(switch: &Switch) -> Result<f64> {
    let status = switch.json(&["status"])?;
    let workers = status["workers"].as_array().into_iter().flatten();
    Ok(workers.filter_map(|worker| worker["busy_percent"].as_f64()).fold(0.0, f64::max))
}

fn summary(lab: &Lab, ping: &str, flows: &[Flow]) -> Result<()> {
    let switch = lab.switch()?;
    let usage: Usage = switch.usage()?;
    println!("==> summary");
    println!("    ping          0 % loss, min/avg/max {ping}");
    for flow in flows {
        let (cpu, busy) = (flow.cpu * 100.0, flow.busy);
        println!(
            "    TCP {}  {:.0} Mbit/s; the switch took {cpu:.0} % of a core, its worker was busy {busy:.0} %",
            flow.name, flow.mbits
        );
    }
    let drops: Vec<String> = ports(switch)?.iter().flat_map(named_drops).collect();
    println!("    drops         {}", if drops.is_empty() { "none".to_owned() } else { drops.join(", ") });
    println!("    memory        {:.1} MiB resident, no hugepages", usage.resident_kib as f64 / 1024.0);
    Ok(())
}

/// A port's drops in words, such as `3 link_down at vm1` (a guest that has not started its driver yet).
fn named_drops(port: &Port) -> Vec<String> {
    let name = port.0["name"].as_str().unwrap_or_default();
    let reasons = port.0["drops"].as_object().into_iter().flatten();
    reasons
        .filter(|(_, count)| count.as_u64() != Some(0))
        .map(|(reason, count)| format!("{count} {reason} at {name}"))
        .collect()
}

/// Waits for Ctrl-C; whatever runs ends with us.
fn keep(lab: &Lab) -> Result<()> {
    let (sluice, control) = (program()?.display().to_string(), lab.switch()?.control().display().to_string());
    println!("==> everything keeps running; to look around, type in another terminal:");
    for command in ["stats --watch", "port list", "port show vm1", "fdb show", "status"] {
        println!("    {sluice} {command} --socket {control}");
    }
    println!("    the guests' consoles (vm1 is 10.0.0.1, vm2 is 10.0.0.2; leave with Ctrl-]):");
    for guest in &lab.guests {
        println!(
            "    socat -,raw,echo=0,escape=0x1d UNIX-CONNECT:{}   # {}",
            guest.console_socket().display(),
            guest.name()
        );
    }
    println!("    Ctrl-C here ends it all");
    loop {
        std::thread::park();
    }
}
