//! Generates load for any vhost-user switch that connects, and prints what came of it as JSON.

use anyhow::{Context, Result};
use benches::cpu;
use benches::load::{Generator, Plan, Rig};
use clap::Parser;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Load for a vhost-user switch.
///
/// Plays guests that listen on DIR/p0.sock, DIR/p1.sock, ... as QEMU does; the switch connects to them as client. Once
/// it has, all ports announce their addresses, run for a while, are measured, and the result is printed as JSON.
///
/// For example, on CPU 1, with a switch on CPU 0:
///
///   loadgen --dir /tmp/x --cpu 1 --probe 0 &
///   sluice run --cpu 0 --mode poll --port a=vhost-user:/tmp/x/p0.sock --port b=vhost-user:/tmp/x/p1.sock
#[derive(Parser)]
#[command(verbatim_doc_comment)]
struct Arguments {
    /// Where to listen
    #[arg(long, required_unless_present = "loopback")]
    dir: Option<PathBuf>,
    /// Seconds to wait for the switch to connect
    #[arg(long, default_value_t = 30)]
    wait: u64,
    /// Time the way of a cache line to this CPU, the switch's, before and after
    #[arg(long, value_name = "CPU", requires = "cpu")]
    probe: Option<usize>,
    /// No switch: a thread on this CPU says that all has arrived, which shows what the generator itself can do
    #[arg(long, value_name = "CPU")]
    loopback: Option<usize>,
    #[command(flatten)]
    plan: Plan,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loadgen: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let plan = &arguments.plan;
    let before = probe(arguments)?;
    let mut generator = match (arguments.loopback, &arguments.dir) {
        (Some(cpu), _) => Generator::loopback(plan.clone(), cpu)?,
        (None, Some(dir)) => {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            Rig::listen(plan.clone(), dir)?.connect(Duration::from_secs(arguments.wait))?
        }
        (None, None) => unreachable!("clap requires one of the two"),
    };
    let report = generator.run()?;
    drop(generator);
    let near_ns: Vec<f64> = [before, probe(arguments)?].into_iter().flatten().collect();
    println!("{:#}", json!({"plan": plan, "near_ns": near_ns, "report": report}));
    Ok(())
}

fn probe(arguments: &Arguments) -> Result<Option<f64>> {
    let pair = arguments.plan.cpu.zip(arguments.probe);
    pair.map(|(own, other)| cpu::line_ns(own, other).context("cannot time the way between the CPUs")).transpose()
}
