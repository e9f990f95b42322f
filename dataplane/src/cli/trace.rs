//! `sluice trace`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sluice_proto::sluice::v1 as proto;
use tokio_stream::{StreamExt, StreamMap};
use tonic::{Code, Streaming};

use super::args::TraceArgs;
use super::client::{Client, refused, with_client};
use super::describe::{Description, describe};
use super::live::{LOOK, direction, ended_by_signal, tell};
use super::output::{emit, emit_json_line};
use super::{Failure, one_line};

/// Enough for tags, all of IPv6's usual headers and those of TCP.
const SNAP_LENGTH: u32 = 256;
/// How long a frame waits for those before it that another port's answer brings. The switch answers every 20 ms.
const WINDOW: Duration = Duration::from_millis(150);

/// From then on a frame with an earlier time is one after the clock was set back.
const SETTLED: Duration = Duration::from_secs(1);

type Streams = StreamMap<String, Streaming<proto::CaptureResponse>>;

pub(crate) fn run(args: &TraceArgs, socket: &Path, json: bool) -> Result<(), Failure> {
    let ended = ended_by_signal()?;
    let (frames, lost) = with_client(socket, async |client| trace(client, args, json, &ended).await)?;
    tell("shown", frames, lost, json, true)
}

/// Shows frames until there are enough, a signal comes or all ports are gone. Returns how many, and how many were missed.
async fn trace(mut client: Client, args: &TraceArgs, json: bool, ended: &AtomicBool) -> Result<(u64, u64), Failure> {
    let mut streams = begin(&mut client, args).await?;
    // What passed before all ports were looked at would be half a way.
    let (began, began_ns) = (Instant::now(), now_ns());
    let is_early = |frame: &proto::CapturedFrame| frame.time_ns < began_ns && began.elapsed() < SETTLED;
    let mut lost: HashMap<String, u64> = HashMap::new();
    let mut waiting = Waiting::default();
    let mut shown = 0;
    let limit = args.count.unwrap_or(u64::MAX);
    let mut is_over = false;
    while shown < limit && !is_over {
        // Frames that wait are looked at again before a signal is.
        match tokio::time::timeout(LOOK, streams.next()).await {
            Ok(Some((port, answer))) => {
                let answer = answer.map_err(refused)?;
                lost.insert(port.clone(), answer.lost);
                answer.frames.into_iter().filter(|frame| !is_early(frame)).for_each(|frame| waiting.add(&port, frame));
            }
            Ok(None) => is_over = true,
            Err(_) => {}
        }
        is_over |= ended.load(Ordering::Relaxed);
        while shown < limit
            && let Some((port, frame)) = waiting.take(is_over)
        {
            show(&port, &frame, json)?;
            shown += 1;
        }
    }
    Ok((shown, lost.values().sum()))
}

/// Nanoseconds since 1970, as in frames.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// Has the switch send the frames of all ports that were asked for, and waits until it does.
async fn begin(client: &mut Client, args: &TraceArgs) -> Result<Streams, Failure> {
    let mut names: BTreeSet<String> = args.names.iter().cloned().collect();
    if names.is_empty() {
        let ports = client.list_ports(proto::ListPortsRequest::default()).await.map_err(refused)?.into_inner().ports;
        names = ports.into_iter().map(|port| port.name).collect();
    }
    let filter = match (&args.filter, args.drops) {
        (Some(filter), true) => format!("({filter}) and dropped"),
        (Some(filter), false) => filter.to_string(),
        (None, true) => "dropped".into(),
        (None, false) => String::new(),
    };
    let mut streams = Streams::new();
    for name in names {
        let (direction, filter) = (direction(args.direction), filter.clone());
        let request = proto::CaptureRequest { name: name.clone(), snap_length: SNAP_LENGTH, direction, filter };
        match client.capture(request).await {
            Ok(answers) => drop(streams.insert(name, answers.into_inner())),
            // It went while we asked for the others; nobody has named it.
            Err(status) if args.names.is_empty() && status.code() == Code::NotFound => {}
            // Somebody captures it.
            Err(status) if args.names.is_empty() && status.code() == Code::FailedPrecondition => {
                eprintln!("without {name}: {}", one_line(status.message()));
            }
            Err(status) => return Err(refused(status)),
        }
    }
    Ok(streams)
}

/// Frames of several ports, put in order: by time, and what came from a port before what went to one.
#[derive(Default)]
struct Waiting {
    frames: BTreeMap<(u64, bool, u64), (Instant, String, proto::CapturedFrame)>,
    count: u64,
}

impl Waiting {
    fn add(&mut self, port: &str, frame: proto::CapturedFrame) {
        self.count += 1;
        let key = (frame.time_ns, frame.direction() == proto::Direction::Tx, self.count);
        self.frames.insert(key, (Instant::now(), port.into(), frame));
    }

    /// The first one, if it has waited long enough or waiting `is_over`.
    fn take(&mut self, is_over: bool) -> Option<(String, proto::CapturedFrame)> {
        let first = self.frames.first_entry()?;
        let has_waited = is_over || first.get().0.elapsed() >= WINDOW;
        has_waited.then(|| first.remove()).map(|(_, port, frame)| (port, frame))
    }
}

fn show(port: &str, frame: &proto::CapturedFrame, json: bool) -> Result<(), Failure> {
    let description = describe(&frame.data);
    match json {
        true => emit_json_line(&as_json(port, frame, &description)),
        false => emit(&(one_line(&as_line(port, frame, &description)) + "\n")),
    }
}

fn as_line(port: &str, frame: &proto::CapturedFrame, description: &Description) -> String {
    let arrow = if frame.direction() == proto::Direction::Rx { "-> rx" } else { "<- tx" };
    let mut words = vec![time_of_day(frame.time_ns), port.into(), arrow.into(), frame.length.to_string()];
    words.extend(description.stations.map(|(src, dst)| format!("{src} > {dst}")));
    words.extend(description.vlans.iter().map(|vlan| format!("vlan {vlan}")));
    words.push(description.what.clone());
    words.extend(frame.drop_reason.as_ref().map(|reason| format!("dropped: {reason}")));
    words.join(" ")
}

/// Time of day to the microsecond, in UTC like the log's.
fn time_of_day(time_ns: u64) -> String {
    let (seconds, micros) = (time_ns / 1_000_000_000 % 86_400, time_ns / 1000 % 1_000_000);
    format!("{:02}:{:02}:{:02}.{micros:06}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn as_json(port: &str, frame: &proto::CapturedFrame, description: &Description) -> serde_json::Value {
    serde_json::json!({
        "time_ns": frame.time_ns,
        "port": port,
        "direction": if frame.direction() == proto::Direction::Rx { "rx" } else { "tx" },
        "length": frame.length,
        "source": description.stations.map(|(src, _)| src.to_string()),
        "destination": description.stations.map(|(_, dst)| dst.to_string()),
        "vlans": description.vlans,
        "what": description.what,
        "dropped": frame.drop_reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(time_ns: u64, direction: proto::Direction) -> proto::CapturedFrame {
        proto::CapturedFrame { time_ns, direction: direction.into(), length: 60, ..Default::default() }
    }

    #[test]
    fn frames_are_put_in_order() {
        let mut waiting = Waiting::default();
        waiting.add("b", frame(7, proto::Direction::Tx));
        waiting.add("a", frame(7, proto::Direction::Rx));
        waiting.add("c", frame(5, proto::Direction::Tx));
        let order: Vec<_> = std::iter::from_fn(|| waiting.take(true)).map(|(port, _)| port).collect();
        assert_eq!(order, ["c", "a", "b"]);
    }

    #[test]
    fn a_line_says_all() {
        let mut frame = frame(3_661_000_042_000, proto::Direction::Rx);
        frame.data = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x81, 0, 0, 7, 0x88, 0xb5].to_vec();
        frame.drop_reason = Some("full".into());
        let expected =
            "01:01:01.000042 vm1 -> rx 60 02:00:00:00:00:01 > 02:00:00:00:00:02 vlan 7 ethertype 0x88b5 dropped: full";
        assert_eq!(as_line("vm1", &frame, &describe(&frame.data)), expected);
    }
}
