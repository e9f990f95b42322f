//! `sluice status`.

use std::path::Path;

use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::client::ask;
use super::output::{duration, emit, emit_json, fields, or_dash, table};

pub(crate) fn run(socket: &Path, json: bool) -> Result<(), Failure> {
    let status = ask(socket, async |client| client.get_status(proto::GetStatusRequest {}).await)?;
    if json { emit_json(&status) } else { emit(&describe(&status)) }
}

fn frames(totals: Option<&proto::Totals>) -> String {
    let Some(totals) = totals else { return "-".into() };
    let dropped: u64 = totals.drops.values().sum();
    format!("{} received, {} sent, {dropped} dropped", totals.rx_frames, totals.tx_frames)
}

fn describe(status: &proto::GetStatusResponse) -> String {
    let fields = fields(&[
        ("version", status.version.clone()),
        ("pid", status.pid.to_string()),
        ("up", duration(status.uptime_seconds)),
        ("mode", status.mode.clone()),
        ("control", status.control.clone()),
        ("state", status.state_dir.clone()),
        ("ports", status.ports.to_string()),
        ("addresses", status.fdb_entries.to_string()),
        ("frames", frames(status.totals.as_ref())),
        ("memory", format!("{:.1} MiB of its own", status.memory_bytes as f64 / f64::from(1 << 20))),
    ]);
    let row = |worker: &proto::WorkerStatus| {
        vec![
            worker.id.to_string(),
            or_dash(worker.cpu),
            format!("{:.1} %", worker.busy_percent),
            worker.queues.to_string(),
            worker.rx_frames.to_string(),
            worker.bursts.to_string(),
            worker.sleeps.to_string(),
        ]
    };
    let rows: Vec<_> = status.workers.iter().map(row).collect();
    let titles = [">WORKER", ">CPU", ">BUSY", ">QUEUES", ">FRAMES", ">BURSTS", ">SLEEPS"];
    format!("{fields}\n{}", table(&titles, &rows))
}
