//! Runs inside the guests: does what the test on the host asks for, one JSON line each way.
//!
//! Requests come over the virtio-serial port "agent" as `{"op": …}` and are answered in order by
//! `{"ok": …}` or `{"error": …}`. At start it says `{"hello": BOOT_ID}`, so that the host notices reboots.

mod echo;
mod frames;
mod pinger;

use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

type Answer = Result<Value, Box<dyn std::error::Error>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // On the host: nothing but the echo service.
    if let Some(port) = std::env::args().skip_while(|argument| argument != "serve-echo").nth(1) {
        echo::serve(&json!({"port": port.parse::<u16>()?}))?;
        loop {
            std::thread::park();
        }
    }
    let port = open_port("agent")?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    writeln!(&port, "{}", json!({"hello": boot.trim()}))?;
    let mut running = Running::default();
    let mut requests = BufReader::new(Connected(&port));
    loop {
        let mut line = String::new();
        requests.read_line(&mut line)?;
        let answer = match serde_json::from_str(&line).map_err(Into::into).and_then(|r| perform(&r, &mut running)) {
            Ok(value) => json!({"ok": value}),
            Err(error) => json!({"error": error.to_string()}),
        };
        // One write for the line: the host reads lines.
        (&port).write_all(format!("{answer}\n").as_bytes())?;
    }
}

/// The port reads as ended while nobody on the host is connected; we just wait for somebody.
struct Connected<'a>(&'a File);

impl Read for Connected<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => sleep(Duration::from_millis(20)),
                other => return other,
            }
        }
    }
}

fn open_port(name: &str) -> io::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == name) {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            return OpenOptions::new().read(true).write(true).open(device);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "this guest has no agent port"))
}

/// What goes on between requests.
#[derive(Default)]
struct Running {
    watches: frames::Watches,
    pinger: Option<pinger::Pinger>,
}

fn perform(request: &Value, running: &mut Running) -> Answer {
    match text(request, "op")? {
        "run" => run(request),
        "frames_watch" => running.watches.start(request),
        "frames_seen" => running.watches.seen(request),
        "frames_send" => frames::send(request),
        "echo_serve" => echo::serve(request),
        "echo_check" => echo::check(request),
        "ping_begin" => {
            running.pinger = Some(pinger::Pinger::begin(request)?);
            Ok(json!({}))
        }
        "ping_end" => running.pinger.take().ok_or("nobody pings")?.end(),
        other => Err(format!("unknown request {other}").into()),
    }
}

/// Runs a shell command to its end.
fn run(request: &Value) -> Answer {
    let seconds = number(request, "seconds")?.to_string();
    let output =
        Command::new("timeout").args(["-s", "KILL", &seconds, "sh", "-c", text(request, "command")?]).output()?;
    Ok(json!({
        "code": output.status.code(),
        "out": String::from_utf8_lossy(&output.stdout),
        "err": String::from_utf8_lossy(&output.stderr),
    }))
}

fn text<'a>(request: &'a Value, key: &str) -> Result<&'a str, String> {
    request[key].as_str().ok_or_else(|| format!("{key} is missing"))
}

fn number(request: &Value, key: &str) -> Result<u64, String> {
    request[key].as_u64().ok_or_else(|| format!("{key} is missing"))
}

/// The list `sizes`, repeated over and over.
fn sizes(request: &Value) -> Result<Vec<usize>, String> {
    let list = request["sizes"].as_array().ok_or("sizes is missing")?;
    let sizes: Vec<usize> = list.iter().filter_map(Value::as_u64).map(|size| size as usize).collect();
    if sizes.is_empty() { Err("sizes is empty".to_owned()) } else { Ok(sizes) }
}

/// Bytes that differ for every stream, sequence number and place, so that any mix-up shows.
fn fill(bytes: &mut [u8], stream: u32, sequence: u32) {
    let mut state = (u64::from(stream) << 32 | u64::from(sequence)).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

fn is_filled(bytes: &[u8], stream: u32, sequence: u32) -> bool {
    let mut expected = vec![0; bytes.len()];
    fill(&mut expected, stream, sequence);
    expected == bytes
}
