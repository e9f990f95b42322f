//! `sluice capture`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use sluice::limits::MAX_FRAME;
use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::args::CaptureArgs;
use super::client::{Client, refused, with_client};
use super::live::{LOOK, direction, ended_by_signal, tell};
use super::pcapng::{Packet, Writer};

type Output = Writer<BufWriter<Box<dyn Write>>>;

pub(crate) fn run(args: &CaptureArgs, socket: &Path, json: bool) -> Result<(), Failure> {
    let ended = ended_by_signal()?;
    let (frames, lost) = with_client(socket, async |client| capture(client, args, &ended).await)?;
    tell("captured", frames, lost, json, args.write.as_os_str() == "-")
}

/// Writes frames until there are enough, a signal comes or the port goes. Returns how many, and how many were missed.
async fn capture(mut client: Client, args: &CaptureArgs, ended: &AtomicBool) -> Result<(u64, u64), Failure> {
    let snap_length = args.snap_length.min(MAX_FRAME as u32);
    let filter = args.filter.as_ref().map(ToString::to_string).unwrap_or_default();
    let request =
        proto::CaptureRequest { name: args.name.clone(), snap_length, direction: direction(args.direction), filter };
    let mut answers = client.capture(request).await.map_err(refused)?.into_inner();
    // Only now: a refusal leaves an old file alone.
    let broken = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::OutputClosed,
        _ => Failure::Failed(format!("cannot write {}: {error}", args.write.display())),
    };
    let mut out = open(args, snap_length).map_err(broken)?;
    let (mut frames, mut lost) = (0, 0);
    let limit = args.count.unwrap_or(u64::MAX);
    while frames < limit && !ended.load(Ordering::Relaxed) {
        let Ok(answer) = tokio::time::timeout(LOOK, answers.message()).await else { continue };
        let Some(answer) = answer.map_err(refused)? else { break };
        lost = answer.lost;
        for frame in answer.frames.iter().take(usize::try_from(limit - frames).unwrap_or(usize::MAX)) {
            write(&mut out, frame).map_err(broken)?;
            frames += 1;
        }
        out.flush().map_err(broken)?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    out.statistics(now, lost).and_then(|()| out.flush()).map_err(broken)?;
    Ok((frames, lost))
}

fn open(args: &CaptureArgs, snap_length: u32) -> std::io::Result<Output> {
    let out: Box<dyn Write> = match args.write.as_os_str() == "-" {
        true => Box::new(std::io::stdout()),
        false => Box::new(File::create(&args.write)?),
    };
    let mut out = Writer::new(BufWriter::new(out), &args.name, snap_length)?;
    out.flush()?;
    Ok(out)
}

fn write(out: &mut Output, frame: &proto::CapturedFrame) -> std::io::Result<()> {
    let comment = frame.drop_reason.as_ref().map(|reason| format!("dropped: {reason}"));
    out.packet(&Packet {
        time_ns: frame.time_ns,
        inbound: frame.direction() == proto::Direction::Rx,
        comment: comment.as_deref(),
        length: frame.length,
        data: &frame.data,
    })
}
