//! The generator against our switch, in this process, and against the reference, as programs: what is sent arrives,
//! once, whole, and in order, and the counts say so.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use benches::load::frames::Sizes;
use benches::load::{Generator, Plan, Report, Rig};
use sluice::config::{PortConfig, SwitchConfig};
use sluice::switch::Switch;

const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// Small and short, for machines that do other things as well.
fn plan() -> Plan {
    Plan { ring: 256, window: 64, seconds: 0.3, warmup: 0.1, small_pages: true, ..Plan::default() }
}

struct Stop(Arc<Switch>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Runs a plan against a switch of this process.
fn run(plan: Plan) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::listen(plan.clone(), folder.path()).unwrap();
    let switch = Stop(Switch::start(&SwitchConfig { workers: vec![None], ..SwitchConfig::default() }).unwrap());
    for port in 0..plan.total_ports() {
        let spec = format!("p{port}=vhost-user:{}", Rig::socket(folder.path(), port).display());
        switch.0.add_port(spec.parse::<PortConfig>().unwrap()).unwrap();
    }
    rig.connect(CONNECT_LIMIT).unwrap().run().unwrap()
}

/// All that was looked at was what it had to be, and nothing is missing.
fn assert_whole(report: &Report) {
    assert!(report.received > 0 && report.verified > 0, "{report:?}");
    let wrong = [report.lost, report.foreign, report.misplaced, report.wrong_length, report.missing];
    assert_eq!(wrong, [0; 5], "{report:?}");
    let total: u64 = report.ports.iter().map(|port| port.received).sum();
    assert!(total >= report.received, "{report:?}");
}

#[test]
fn nothing_is_lost_with_any_kind_of_ring() {
    for (packed, in_order, no_mergeable) in
        [(false, false, false), (false, true, true), (true, false, false), (true, true, true)]
    {
        let report = run(Plan { packed, in_order, no_mergeable, ..plan() });
        assert_whole(&report);
        assert!(report.mpps > 0.0 && report.generator_busy > 0.0, "{report:?}");
    }
}

#[test]
fn nothing_is_lost_of_any_size_and_from_many_stations() {
    let imix = run(Plan { size: Sizes::Imix, touch: true, ..plan() });
    assert_whole(&imix);
    let mean = imix.gbps * 1e9 / 8.0 / (imix.mpps * 1e6);
    assert!((mean - 360.2).abs() < 1.0, "{mean} bytes a frame");
    assert_whole(&run(Plan { size: Sizes::Fixed(9014), ports: 4, ..plan() }));
    // More stations than buffers, so that frames go round.
    assert_whole(&run(Plan { macs: 2000, ports: 4, ..plan() }));
}

#[test]
fn several_queues_and_ports_beside_do_not_disturb() {
    let report = run(Plan { queues: 2, flows: 64, idle: 6, ..plan() });
    assert_whole(&report);
    assert_eq!(report.ports.len(), 8);
    assert!(report.ports[2..].iter().all(|port| port.sent == 0), "{report:?}");
}

#[test]
fn an_offered_rate_is_kept_and_latency_is_measured() {
    let report = run(Plan { rate: Some(0.02), latency: Some(1), ..plan() });
    assert_whole(&report);
    assert!(report.mpps < 0.021, "{report:?}");
    let latency = report.latency.unwrap();
    assert!(latency.count > 0 && latency.min > 0, "{latency:?}");
    assert!(latency.p50 <= latency.p99 && latency.p99 <= latency.max, "{latency:?}");
}

#[test]
fn a_stalled_receiver_gets_nothing_and_the_others_all() {
    let flood = Plan { flood: Some(0.05), ..plan() };
    let (taken, stalled) = (run(flood.clone()), run(Plan { stalled: true, ..flood }));
    for report in [&taken, &stalled] {
        assert_whole(report);
        assert!(report.ports[2].sent > 0, "{report:?}");
    }
    assert!(taken.ports[3].received > 0, "{taken:?}");
    assert_eq!(stalled.ports[3].received, 0, "{stalled:?}");
}

#[test]
fn looped_back_all_arrives() {
    for packed in [false, true] {
        let report = Generator::loopback(Plan { packed, ..plan() }, 0).unwrap().run().unwrap();
        assert!(report.received > 0 && report.lost == 0 && report.misplaced == 0, "{report:?}");
    }
}

/// A program that ends with the test.
struct Program(Child);

impl Program {
    fn start(path: &str, arguments: &[&str]) -> Self {
        Self(Command::new(path).args(arguments).stdout(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_reference_switches_what_the_program_sends() {
    let folder = tempfile::tempdir().unwrap();
    let socket = |port| Rig::socket(folder.path(), port).display().to_string();
    let short = ["--small-pages", "--ring", "256", "--seconds", "0.3", "--warmup", "0.1", "--wait", "20"];
    let directory = path_text(folder.path());
    let mut generator = Program::start(env!("CARGO_BIN_EXE_loadgen"), &[&["--dir", directory][..], &short].concat());
    let _reference = Program::start(env!("CARGO_BIN_EXE_reference-switch"), &[&socket(0), &socket(1)]);
    let output = std::io::read_to_string(generator.0.stdout.take().unwrap()).unwrap();
    assert!(generator.0.wait().unwrap().success());
    let answer: serde_json::Value = serde_json::from_str(&output).unwrap();
    let report: Report = serde_json::from_value(answer["report"].clone()).unwrap();
    assert_whole(&report);
    assert_eq!(answer["plan"]["size"], "64");
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}
