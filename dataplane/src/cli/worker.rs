//! `sluice worker`.

use std::path::Path;

use sluice::config::PortQueue;
use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::args::WorkerCommand;
use super::client::ask;
use super::output::{done, emit, emit_json, or_dash, table};

pub(crate) fn run(command: WorkerCommand, socket: &Path, json: bool) -> Result<(), Failure> {
    match command {
        WorkerCommand::List => list(socket, json),
        WorkerCommand::Pin { queue, worker } => {
            let PortQueue { port, queue: pair } = queue.clone();
            let request = proto::PinQueueRequest { port, queue: pair.map(|pair| pair as u32), worker: worker as u32 };
            ask(socket, async |client| client.pin_queue(request).await)?;
            done(json, &serde_json::json!({ "pinned": queue.to_string(), "worker": worker }))
        }
        WorkerCommand::Unpin { queue } => {
            let PortQueue { port, queue: pair } = queue.clone();
            let request = proto::UnpinQueueRequest { port, queue: pair.map(|pair| pair as u32) };
            ask(socket, async |client| client.unpin_queue(request).await)?;
            done(json, &serde_json::json!({ "unpinned": queue.to_string() }))
        }
    }
}

fn list(socket: &Path, json: bool) -> Result<(), Failure> {
    let workers = ask(socket, async |client| client.list_workers(proto::ListWorkersRequest {}).await)?;
    if json { emit_json(&workers) } else { emit(&describe(&workers)) }
}

fn describe(list: &proto::ListWorkersResponse) -> String {
    let percent = |part: u64, whole: u64| format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64);
    let row = |worker: &proto::WorkerStatus| {
        vec![
            worker.id.to_string(),
            or_dash(worker.cpu),
            list.mode.clone(),
            format!("{:.1} %", worker.busy_percent),
            percent(worker.busy_ns, worker.up_ns),
            format!("{:.0}", worker.frames_per_second),
            format!("{:.0}", worker.sleeps_per_second),
            worker.queues.to_string(),
        ]
    };
    let titles = [">WORKER", ">CPU", "MODE", ">BUSY", ">SINCE START", ">FRAMES/S", ">SLEEPS/S", ">QUEUES"];
    let mut text = table(&titles, &list.workers.iter().map(row).collect::<Vec<_>>());
    let mut queues: Vec<_> = list.queues.iter().collect();
    queues.sort_by_key(|queue| queue.worker);
    let row = |queue: &&proto::QueueLoad| {
        vec![
            queue.worker.to_string(),
            queue.port.clone(),
            queue.queue.to_string(),
            format!("{:.1} %", queue.load_percent),
            format!("{:.0}", queue.frames_per_second),
            if queue.pinned { "by hand" } else { "" }.into(),
        ]
    };
    if !queues.is_empty() {
        let titles = [">WORKER", "PORT", ">QUEUE", ">LOAD", ">FRAMES/S", "PINNED"];
        text = format!("{text}\n{}", table(&titles, &queues.iter().map(row).collect::<Vec<_>>()));
    }
    if !list.rebalance && list.workers.len() > 1 {
        text.push_str("\nqueues are not moved by load ('rebalance' is off)\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_listed_by_worker() {
        let worker = |id, busy_percent| proto::WorkerStatus {
            id,
            cpu: Some(id + 2),
            busy_percent,
            busy_ns: 25,
            up_ns: 100,
            frames_per_second: 1000.4,
            sleeps_per_second: 3.0,
            queues: 1,
            ..Default::default()
        };
        let queue = |port: &str, worker, pinned| proto::QueueLoad {
            port: port.into(),
            queue: 3,
            worker,
            pinned,
            load_percent: 12.34,
            frames_per_second: 7.0,
        };
        let mut list = proto::ListWorkersResponse {
            workers: vec![worker(0, 50.0), worker(1, 0.0)],
            mode: "adaptive".into(),
            rebalance: true,
            queues: vec![queue("a", 1, true), queue("b", 0, false)],
        };
        let text = describe(&list);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["0", "2", "adaptive", "50.0", "%", "25.0", "%", "1000", "3", "1"]);
        assert_eq!(rows[5], ["0", "b", "3", "12.3", "%", "7"]);
        assert_eq!(rows[6], ["1", "a", "3", "12.3", "%", "7", "by", "hand"]);
        assert!(!text.contains("rebalance"));
        (list.rebalance, list.queues) = (false, Vec::new());
        let text = describe(&list);
        assert!(!text.contains("PINNED") && text.contains("'rebalance' is off"), "{text}");
    }
}
