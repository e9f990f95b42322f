//! A frontend's whole conversation: messages, true and false, with descriptors of all kinds, and then silence.

use arbitrary::{Arbitrary, Unstructured};
use e2e::hostile::channel::send;
use e2e::hostile::eventfd;
use e2e::hostile::message::words;
use sluice::port::stats::PortStats;
use sluice::port::vhost::serve_once;
use sluice::port::{Link, Publisher};
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use crate::guest::memfd;

/// More would fill the socket with answers that nobody reads.
const MESSAGES: usize = 32;
const MEMORY: u64 = 1 << 20;
const UVA: u64 = 0x7f00_0000_0000;

#[derive(Debug, Arbitrary)]
struct Input {
    messages: Vec<Message>,
    rest: Vec<u8>,
}

#[derive(Debug, Arbitrary)]
enum Message {
    /// What every frontend says first.
    Start,
    Features(u64),
    Table(Vec<[Number; 4]>),
    Region(bool, [Number; 4]),
    Log(Number, Number),
    Num(u8, Number),
    Base(u8, Number),
    Address(u8, [Number; 3]),
    GetBase(u8),
    Event(u8, u8, Kind),
    Enable(u8, u8),
    Any {
        request: u8,
        flags: u8,
        payload: Vec<Number>,
        cut: u8,
        fds: Vec<Kind>,
    },
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Number {
    Page(u8),
    Uva(u8),
    Power(u8),
    Small(u8),
    Any(u64),
}

impl Number {
    fn value(self) -> u64 {
        match self {
            Self::Page(page) => u64::from(page) << 12,
            Self::Uva(page) => UVA + (u64::from(page) << 12),
            Self::Power(bit) => 1 << (bit % 64),
            Self::Small(small) => small.into(),
            Self::Any(any) => any,
        }
    }
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Kind {
    Memory,
    Event,
    Null,
    Folder,
    Socket,
}

/// Descriptors to be sent, made once.
struct Files {
    memory: File,
    event: File,
    null: File,
    folder: File,
    socket: UnixStream,
}

impl Files {
    fn new() -> Self {
        let open = |path| File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let event = eventfd().unwrap_or_else(|error| panic!("{error:#}"));
        let (socket, _) = UnixStream::pair().unwrap_or_else(|error| panic!("no sockets: {error}"));
        Self { memory: memfd(MEMORY), event, null: open("/dev/null"), folder: open("/"), socket }
    }

    fn fd(&self, kind: Kind) -> RawFd {
        match kind {
            Kind::Memory => self.memory.as_raw_fd(),
            Kind::Event => self.event.as_raw_fd(),
            Kind::Null => self.null.as_raw_fd(),
            Kind::Folder => self.folder.as_raw_fd(),
            Kind::Socket => self.socket.as_raw_fd(),
        }
    }
}

thread_local! {
    static FILES: RefCell<Files> = RefCell::new(Files::new());
}

/// Keeps the last link, as workers would.
#[derive(Default)]
struct Recorder {
    last: Mutex<Option<Link>>,
    stats: Arc<PortStats>,
}

impl Publisher for Recorder {
    fn publish(&self, link: Link) {
        assert!(link.rx.len() <= 256 && link.tx.len() <= 256);
        if let Ok(mut last) = self.last.lock() {
            *last = Some(link);
        }
    }

    fn forget_stations(&self) {}

    fn announce(&self, _mac: [u8; 6]) {}

    fn stats(&self) -> &Arc<PortStats> {
        &self.stats
    }
}

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else { return };
    FILES.with_borrow(|files| {
        let before = descriptors();
        converse(&input, files);
        assert_eq!(descriptors(), before, "descriptors are left behind");
    });
}

fn converse(input: &Input, files: &Files) {
    let Ok((ours, theirs)) = UnixStream::pair() else { return };
    // Whatever does not fit is not sent.
    if ours.set_nonblocking(true).is_err() {
        return;
    }
    for message in input.messages.iter().take(MESSAGES) {
        let (bytes, fds) = message.encode();
        let fds: Vec<RawFd> = fds.into_iter().take(64).map(|kind| files.fd(kind)).collect();
        let _ = send(&ours, &bytes, &fds);
    }
    let _ = send(&ours, input.rest.get(..input.rest.len().min(8192)).unwrap_or_default(), &[]);
    if ours.shutdown(std::net::Shutdown::Write).is_err() {
        return;
    }
    let recorder = Arc::new(Recorder::default());
    let reason = serve_once(theirs, recorder.clone());
    assert!(reason.is_none_or(|reason| !reason.is_empty() && !reason.contains("internal error")));
    let last = recorder.last.lock().ok().and_then(|mut last| last.take());
    assert!(last.is_none_or(|link| link.rx.is_empty() && link.tx.is_empty() && link.memory_bytes == 0));
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn numbers<'n>(numbers: impl IntoIterator<Item = &'n Number>) -> Vec<u8> {
    numbers.into_iter().flat_map(|number| number.value().to_ne_bytes()).collect()
}

fn message(request: u32, payload: Vec<u8>) -> Vec<u8> {
    let mut bytes = words(&[request, 1, payload.len() as u32]);
    bytes.extend(payload);
    bytes
}

impl Message {
    fn encode(&self) -> (Vec<u8>, Vec<Kind>) {
        let ring = |request, index: u8, number: u64| message(request, words(&[index.into(), number as u32]));
        let plain = |bytes| (bytes, Vec::new());
        match self {
            Self::Start => {
                let mut bytes = message(1, vec![]);
                bytes.extend(message(16, 0xffffu64.to_ne_bytes().map(|_| 0).to_vec()));
                bytes.extend(message(3, vec![]));
                plain(bytes)
            }
            Self::Features(bits) => plain(message(2, (bits | 1 << 30 | 1 << 32).to_ne_bytes().to_vec())),
            Self::Table(regions) => {
                let regions = &regions[..regions.len().min(9)];
                let mut payload = words(&[regions.len() as u32, 0]);
                payload.extend(numbers(regions.iter().flatten()));
                (message(5, payload), vec![Kind::Memory; regions.len()])
            }
            Self::Region(add, region) => {
                let mut payload = vec![0; 8];
                payload.extend(numbers(region));
                (message(if *add { 37 } else { 38 }, payload), vec![Kind::Memory; usize::from(*add)])
            }
            Self::Log(size, offset) => (message(6, numbers([size, offset])), vec![Kind::Memory]),
            Self::Num(index, number) => plain(ring(8, *index, number.value())),
            Self::Base(index, number) => plain(ring(10, *index, number.value())),
            Self::Address(index, places) => {
                let mut payload = words(&[(*index).into(), 0]);
                payload.extend(numbers(places));
                payload.extend([0; 8]);
                plain(message(9, payload))
            }
            Self::GetBase(index) => plain(ring(11, *index, 0)),
            Self::Event(request, index, kind) => {
                (message(12 + u32::from(request % 3), u64::from(*index).to_ne_bytes().to_vec()), vec![*kind])
            }
            Self::Enable(index, on) => plain(ring(18, *index, u64::from(on & 1))),
            Self::Any { request, flags, payload, cut, fds } => {
                let payload = numbers(payload.iter().take(40));
                let mut bytes = words(&[(*request).into(), (*flags).into(), payload.len() as u32]);
                bytes.extend(payload);
                bytes.truncate(bytes.len() - usize::from(cut >> 5).min(bytes.len()));
                (bytes, fds.clone())
            }
        }
    }
}
