//! Echo over UDP and TCP with checkable content: integrity, loss and duplication of any payload size.

use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread::spawn;
use std::time::{Duration, Instant};

use crate::{Answer, fill, is_filled, number, sizes, text};

/// Sequence number and length go before the content.
const HEADER: usize = 8;
/// A reply that takes longer counts as lost. If it comes after all, something on the way kept a frame that long: a queue
/// that nobody served, or a guest that asked for an address in vain.
const LOST_AFTER: Duration = Duration::from_secs(2);
const STREAM: u32 = 0xec40;

/// Echoes datagrams and TCP messages that come to `{port}`, over IPv4 and IPv6, from now on.
pub(crate) fn serve(request: &Value) -> Answer {
    let port = number(request, "port")? as u16;
    let datagrams = UdpSocket::bind(("::", port))?;
    let connections = TcpListener::bind(("::", port))?;
    spawn(move || {
        let mut buffer = vec![0; 65_536];
        loop {
            if let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
                // A lost echo is what the other side is there to notice.
                let _ = datagrams.send_to(&buffer[..length], from);
            }
        }
    });
    spawn(move || {
        for connection in connections.incoming().flatten() {
            spawn(move || echo_messages(connection));
        }
    });
    Ok(json!({}))
}

fn echo_messages(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    loop {
        let message = read_message(&mut connection)?;
        connection.write_all(&message)?;
    }
}

fn read_message(connection: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER];
    connection.read_exact(&mut message)?;
    let length = u32::from_be_bytes([message[4], message[5], message[6], message[7]]) as usize;
    message.resize(length.max(HEADER), 0);
    connection.read_exact(&mut message[HEADER..])?;
    Ok(message)
}

fn message(sequence: u32, size: usize) -> Vec<u8> {
    let mut message = vec![0; size.max(HEADER)];
    let length = message.len() as u32;
    message[..4].copy_from_slice(&sequence.to_be_bytes());
    message[4..HEADER].copy_from_slice(&length.to_be_bytes());
    fill(&mut message[HEADER..], STREAM, sequence);
    message
}

/// The sequence number, if the whole message is as it was sent.
fn verify(message: &[u8]) -> Option<u32> {
    let word = |at: usize| message[at..at + 4].iter().fold(0, |word, &byte| word << 8 | u32::from(byte));
    let whole = message.len() >= HEADER && word(4) as usize == message.len();
    (whole && is_filled(&message[HEADER..], STREAM, word(0))).then(|| word(0))
}

/// Counts of a check; `times` are round trips in microseconds.
#[derive(Default)]
struct Tally {
    sent: u64,
    received: u64,
    lost: u64,
    corrupt: u64,
    duplicates: u64,
    /// Of those lost, how many came in the end, and how long the slowest took, in microseconds.
    late: u64,
    latest: u64,
    lost_sizes: Vec<usize>,
    times: Vec<u64>,
}

/// Sends messages of the sizes in turn, at most `window` under way, and compares their echoes:
/// `{proto, to, sizes, window, seconds?, gap_ms?}`. With `seconds` the sizes are repeated that long.
pub(crate) fn check(request: &Value) -> Answer {
    let (sizes, seconds) = (sizes(request)?, request["seconds"].as_f64());
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
    let rounds = if end.is_some() { usize::MAX } else { sizes.len() };
    let sizes = sizes.into_iter().cycle().take(rounds).take_while(|_| end.is_none_or(|end| Instant::now() < end));
    let gap = Duration::from_millis(request["gap_ms"].as_u64().unwrap_or(0));
    let mut sizes = sizes.inspect(|_| std::thread::sleep(gap));
    let mut tally = match text(request, "proto")? {
        "udp" => check_udp(text(request, "to")?, &mut sizes, number(request, "window")? as usize)?,
        "tcp" => check_tcp(text(request, "to")?, &mut sizes)?,
        other => return Err(format!("unknown protocol {other}").into()),
    };
    tally.times.sort_unstable();
    Ok(json!({
        "sent": tally.sent,
        "received": tally.received,
        "lost": tally.lost,
        "lost_sizes": tally.lost_sizes,
        "corrupt": tally.corrupt,
        "duplicates": tally.duplicates,
        "late": tally.late,
        "latest_us": tally.latest,
        "min_us": tally.times.first(),
        "median_us": tally.times.get(tally.times.len() / 2),
        "max_us": tally.times.last(),
    }))
}

fn check_udp(to: &str, sizes: &mut dyn Iterator<Item = usize>, window: usize) -> io::Result<Tally> {
    let socket = UdpSocket::bind(if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(LOST_AFTER))?;
    let (mut tally, mut under_way, mut given_up) = (Tally::default(), HashMap::new(), HashMap::new());
    let mut buffer = vec![0; 65_536];
    let mut more = true;
    while more || !under_way.is_empty() {
        while more && under_way.len() < window.max(1) {
            match sizes.next() {
                Some(size) => {
                    let sequence = tally.sent as u32;
                    under_way.insert(sequence, (Instant::now(), size));
                    // What cannot be sent (no route while a link is down) is lost like any other.
                    let _ = socket.send(&message(sequence, size));
                    tally.sent += 1;
                }
                None => more = false,
            }
        }
        if under_way.is_empty() {
            continue;
        }
        match socket.recv(&mut buffer).map(|length| verify(&buffer[..length])) {
            Err(_) => {
                tally.lost += under_way.len() as u64;
                tally.lost_sizes.extend(under_way.values().map(|&(_, size)| size).take(10));
                given_up.extend(under_way.drain().map(|(sequence, (start, _))| (sequence, start)));
            }
            Ok(None) => tally.corrupt += 1,
            Ok(Some(sequence)) => match under_way.remove(&sequence) {
                Some((start, _)) => {
                    tally.received += 1;
                    tally.times.push(start.elapsed().as_micros() as u64);
                }
                None => match given_up.remove(&sequence) {
                    Some(start) => {
                        tally.late += 1;
                        tally.latest = tally.latest.max(start.elapsed().as_micros() as u64);
                    }
                    None => tally.duplicates += 1,
                },
            },
        }
    }
    Ok(tally)
}

fn check_tcp(to: &str, sizes: &mut dyn Iterator<Item = usize>) -> io::Result<Tally> {
    let mut connection = TcpStream::connect(to)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut tally = Tally::default();
    for size in sizes {
        let sequence = tally.sent as u32;
        let sent = message(sequence, size);
        let start = Instant::now();
        // The echo of a large message fills both buffers: it has to be read while we still write.
        let mut writer = connection.try_clone()?;
        let writing = spawn(move || writer.write_all(&sent));
        let echo = read_message(&mut connection)?;
        writing.join().map_err(|_| io::Error::other("the writer failed"))??;
        tally.sent += 1;
        tally.received += 1;
        tally.corrupt += u64::from(verify(&echo) != Some(sequence));
        tally.times.push(start.elapsed().as_micros() as u64);
    }
    Ok(tally)
}
