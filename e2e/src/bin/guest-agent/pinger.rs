//! Pings at a steady pace in the background. busybox's ping has a socket with room for a dozen replies, so that one that
//! has to wait for its CPU loses what comes in a burst; this one has room for all.

use serde_json::json;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use crate::{Answer, number, text};

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// "SL".
const IDENTIFIER: [u8; 2] = [0x53, 0x4c];
const HEADER: usize = 8;
const PAYLOAD: usize = 56;
/// How long replies are waited for in the end: nothing on the way keeps a frame that long.
const PATIENCE: Duration = Duration::from_secs(3);

/// What became of each request, by its sequence number.
#[derive(Default)]
struct Record {
    sent: Vec<Instant>,
    /// Round trip, and number of replies.
    answered: Vec<Option<Duration>>,
    duplicates: u64,
}

/// Pings that go on.
pub(crate) struct Pinger {
    stop: Arc<AtomicBool>,
    record: Arc<Mutex<Record>>,
    sender: JoinHandle<()>,
}

impl Pinger {
    /// Begins: `{to, gap_ms}`.
    pub(crate) fn begin(request: &serde_json::Value) -> Result<Self, Box<dyn std::error::Error>> {
        let gap = Duration::from_millis(number(request, "gap_ms")?);
        let socket = open()?;
        socket.connect((text(request, "to")?.parse::<Ipv4Addr>()?, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (stop, record) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Record::default())));
        let receiver = socket.try_clone()?;
        spawn({
            let (stop, record) = (stop.clone(), record.clone());
            move || receive(&receiver, &record, &stop)
        });
        let sender = spawn({
            let (stop, record) = (stop.clone(), record.clone());
            move || send(&socket, gap, &record, &stop)
        });
        Ok(Self { stop, record, sender })
    }

    /// Ends, and counts; times are in microseconds.
    pub(crate) fn end(self) -> Answer {
        // The receiver goes on for a while.
        self.stop.store(true, Ordering::SeqCst);
        self.sender.join().map_err(|_| "the sender failed")?;
        let (end, lock) = (Instant::now() + PATIENCE, || self.record.lock().unwrap_or_else(PoisonError::into_inner));
        while lock().answered.iter().any(Option::is_none) && Instant::now() < end {
            sleep(Duration::from_millis(10));
        }
        let record = lock();
        let lost: Vec<usize> = (0..record.sent.len()).filter(|at| record.answered[*at].is_none()).collect();
        let slowest = record.answered.iter().flatten().max().copied().unwrap_or_default();
        Ok(json!({
            "sent": record.sent.len(), "lost": lost, "duplicates": record.duplicates,
            "slowest_us": slowest.as_micros() as u64,
        }))
    }
}

fn send(socket: &UdpSocket, gap: Duration, record: &Mutex<Record>, stop: &AtomicBool) {
    let start = Instant::now();
    // The sequence number has 16 bits; nobody pings for that long.
    for sequence in 0..=u16::MAX {
        sleep((start + gap * u32::from(sequence)).saturating_duration_since(Instant::now()));
        if stop.load(Ordering::SeqCst) {
            return;
        }
        {
            let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
            record.sent.push(Instant::now());
            record.answered.push(None);
        }
        // What cannot be sent (no route while a link is down) is lost like any other.
        let _ = socket.send(&request(sequence));
    }
}

fn receive(socket: &UdpSocket, record: &Mutex<Record>, stop: &AtomicBool) {
    let (mut buffer, mut last) = ([0; 2048], Instant::now());
    while !stop.load(Ordering::SeqCst) || last.elapsed() < PATIENCE {
        if !stop.load(Ordering::SeqCst) {
            last = Instant::now();
        }
        let Some(sequence) = socket.recv(&mut buffer).ok().and_then(|length| reply(&buffer[..length])) else {
            continue;
        };
        let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sent) = record.sent.get(usize::from(sequence)).copied() else { continue };
        let slot = &mut record.answered[usize::from(sequence)];
        match slot {
            Some(_) => record.duplicates += 1,
            None => *slot = Some(sent.elapsed()),
        }
    }
}

fn request(sequence: u16) -> Vec<u8> {
    let mut packet = vec![ECHO_REQUEST, 0, 0, 0, IDENTIFIER[0], IDENTIFIER[1]];
    packet.extend(sequence.to_be_bytes());
    packet.resize(HEADER + PAYLOAD, 0x5a);
    let words = packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[2..4].copy_from_slice(&(!(folded + (folded >> 16)) as u16).to_be_bytes());
    packet
}

/// The sequence number of a reply to us, behind its IPv4 header.
fn reply(packet: &[u8]) -> Option<u16> {
    let icmp = packet.get(usize::from(packet.first()? & 0xf) * 4..)?;
    let ours = icmp.len() == HEADER + PAYLOAD && icmp[0] == ECHO_REPLY && icmp[4..6] == IDENTIFIER;
    ours.then(|| u16::from_be_bytes([icmp[6], icmp[7]]))
}

/// A raw socket of ICMP. The standard library's socket calls fit it.
fn open() -> io::Result<UdpSocket> {
    // SAFETY: no pointers; the descriptor is checked below.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let socket = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let size: libc::c_int = 16 << 20;
    let length = size_of::<libc::c_int>() as u32;
    // SAFETY: the value lives through the call and its size is given.
    let set = unsafe {
        let value = (&raw const size).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value, length)
    };
    if set == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}
