use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use serde_json::value::to_raw_value;

use super::{Answer, Keeper, LIMIT, Said, Stamp, Watch, bind, serve, socket};
use crate::handover::{self, DeviceRecord, Fds, VhostRecord, wire};
use crate::port::vhost::Parcel;
use crate::testing::lingering;

/// A keeper of its own, in a thread.
struct Bench {
    dir: tempfile::TempDir,
    thread: JoinHandle<std::io::Result<()>>,
    stop: UnixStream,
}

impl Bench {
    fn new(stays: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = bind(&socket(dir.path())).unwrap();
        let (stop, told) = UnixStream::pair().unwrap();
        Self { dir, thread: std::thread::spawn(move || serve(&listener, told.as_fd(), stays)), stop }
    }

    fn switch(&self, version: u32, alone: bool) -> (UnixStream, Answer, Fds) {
        let stream = UnixStream::connect(socket(self.dir.path())).unwrap();
        wire::send(&stream, &Said::Hello { version, alone }, &Fds::default(), LIMIT).unwrap();
        let (answer, fds) = wire::receive(&stream, 10 * LIMIT).unwrap();
        (stream, answer, fds)
    }
}

fn names(answer: &Answer) -> Vec<&str> {
    answer.ports.iter().map(|port| &*port.port).collect()
}

/// A connection as its port gives it away; and its other end, and its stamp.
fn parcel() -> (Parcel, UnixStream, Arc<Stamp>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stamp = Arc::new(Stamp::new().unwrap());
    let mut fds = Fds::default();
    let device = DeviceRecord { stream: fds.put(ours.as_fd()).unwrap(), ..DeviceRecord::default() };
    let device = DeviceRecord { stamp: Some(fds.put(stamp.as_fd()).unwrap()), ..device };
    let record = VhostRecord { device: Some(device), listener: None };
    (Parcel { record, fds, standing: Vec::new() }, theirs, stamp)
}

/// Has a connection kept; returns its other end, and its stamp.
fn keep(switch: &UnixStream, port: &str) -> (UnixStream, Arc<Stamp>) {
    let (Parcel { record, fds, .. }, theirs, stamp) = parcel();
    let (place, record) = (record.device.as_ref().unwrap().stamp.unwrap(), to_raw_value(&record).unwrap());
    // As a switch of an older build says it.
    let kept = json!({ "port": port, "path": "/s", "stamp": place, "record": record });
    wire::send(switch, &json!({ "Keep": kept }), &fds, LIMIT).unwrap();
    (theirs, stamp)
}

/// As a switch of an older build says it, or of a later one that has more to say.
fn forget(switch: &UnixStream, port: &str) {
    wire::send(switch, &json!({ "Forget": { "port": port, "more": 1 } }), &Fds::default(), LIMIT).unwrap();
}

/// Whether the other side has been closed, within a time.
fn closes(stream: &UnixStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).unwrap();
    matches!(std::io::Read::read(&mut &*stream, &mut [0]), Ok(0))
}

#[test]
fn only_what_is_up_to_date_outlives_a_crash() {
    let bench = Bench::new(true);
    let (old, answer, _) = bench.switch(1, true);
    assert!(answer.ports.is_empty());
    let (good, stamp) = keep(&old, "good");
    stamp.set_current(true).unwrap();
    let (stale, _stamp) = keep(&old, "stale");
    let (changed, stamp) = keep(&old, "changed");
    stamp.set_current(true).unwrap();
    stamp.set_current(false).unwrap();
    let (ended, stamp) = keep(&old, "ended");
    stamp.set_current(true).unwrap();
    forget(&old, "ended");
    assert!(closes(&ended, 10 * LIMIT));
    drop(old);
    for gone in [&stale, &changed] {
        assert!(closes(gone, 10 * LIMIT));
    }
    let (new, answer, mut fds) = bench.switch(1, true);
    assert_eq!(names(&answer), ["good"]);
    let record: VhostRecord = serde_json::from_str(answer.ports[0].record.get()).unwrap();
    let stream = UnixStream::from(fds.take(record.device.unwrap().stream).unwrap());
    std::io::Write::write_all(&mut &stream, b"x").unwrap();
    std::io::Read::read_exact(&mut &good, &mut [0]).unwrap();
    // The next one gets it, too, unless this one has not taken it up.
    drop((new, stream, fds));
    let (new, answer, fds) = bench.switch(1, true);
    assert_eq!(names(&answer), ["good"]);
    drop(fds);
    wire::send(&new, &Said::Settled { ports: Vec::new() }, &Fds::default(), LIMIT).unwrap();
    assert!(closes(&good, 10 * LIMIT));
}

/// Words that were said right before the end, and a next switch that is there before that was noticed.
#[test]
fn last_words_are_heard() {
    let bench = Bench::new(true);
    let (old, ..) = bench.switch(1, true);
    let mut frontends = Vec::new();
    for port in 0..50 {
        let (frontend, stamp) = keep(&old, &format!("vm{port}"));
        stamp.set_current(true).unwrap();
        frontends.push(frontend);
    }
    drop(old);
    let (_new, answer, fds) = bench.switch(1, true);
    assert_eq!((answer.ports.len(), fds.len()), (50, 100));
}

#[test]
fn another_format_is_not_given() {
    let bench = Bench::new(true);
    let (old, ..) = bench.switch(1, true);
    let (frontend, stamp) = keep(&old, "vm");
    stamp.set_current(true).unwrap();
    drop(old);
    let (_new, answer, _) = bench.switch(2, true);
    assert!(answer.ports.is_empty());
    assert!(closes(&frontend, 10 * LIMIT));
}

/// A takeover: the old switch still has its ports when the new one comes.
#[test]
fn a_switch_that_lives_keeps_its_own() {
    let bench = Bench::new(true);
    let (old, ..) = bench.switch(1, true);
    let (frontend, stamp) = keep(&old, "vm");
    stamp.set_current(true).unwrap();
    let (new, answer, _) = bench.switch(1, false);
    assert!(answer.ports.is_empty());
    let (again, stamp) = keep(&new, "vm");
    stamp.set_current(true).unwrap();
    assert!(closes(&frontend, 10 * LIMIT), "what was there before");
    drop(old);
    wire::send(&new, &Said::Settled { ports: vec!["vm".into()] }, &Fds::default(), LIMIT).unwrap();
    drop(new);
    let (_next, answer, _) = bench.switch(1, true);
    assert_eq!(names(&answer), ["vm"]);
    assert!(!closes(&again, Duration::from_millis(1)));
}

/// The thread of a port that was removed hung, and ends when a port of the same name has a connection.
#[test]
fn last_words_of_a_connection_are_not_about_the_next_one() {
    let bench = Bench::new(true);
    let (keeper, _) = Keeper::find(bench.dir.path(), true).unwrap();
    let begin = || {
        let (parcel, frontend, stamp) = parcel();
        (Watch::new(keeper.clone(), "vm", Path::new("/s"), stamp), parcel, frontend)
    };
    let (mut late, first, gone) = begin();
    let (mut watch, second, frontend) = begin();
    late.update(Ok(first));
    watch.update(Ok(second));
    assert!(closes(&gone, 10 * LIMIT), "what was there before");
    let (more, unheard, _) = parcel();
    late.changing();
    late.update(Ok(more));
    drop(late);
    assert!(closes(&unheard, 10 * LIMIT), "it has come too late");
    // The switch has nothing more to say, so it is as good as dead.
    let (next, kept) = Keeper::find(bench.dir.path(), true).unwrap();
    assert_eq!(kept.len(), 1);
    assert!(!closes(&frontend, Duration::from_millis(1)));
    drop(kept);
    // Whoever has taken it up may forget it, whatever its own number is.
    drop(Watch::new(next, "vm", Path::new("/s"), Arc::new(Stamp::new().unwrap())));
    assert!(closes(&frontend, 10 * LIMIT));
    drop(watch);
}

#[test]
fn it_ends_with_its_switch() {
    let bench = Bench::new(false);
    let (keeper, kept) = Keeper::find(bench.dir.path(), true).unwrap();
    assert!(kept.is_empty());
    keeper.end();
    bench.thread.join().unwrap().unwrap();
}

#[test]
fn it_ends_when_it_is_told_to() {
    let bench = Bench::new(true);
    let (_switch, ..) = bench.switch(handover::VERSION, true);
    std::io::Write::write_all(&mut &bench.stop, b"x").unwrap();
    bench.thread.join().unwrap().unwrap();
}

#[test]
fn who_does_without_has_it_let_go() {
    let bench = Bench::new(true);
    let (old, ..) = bench.switch(handover::VERSION, true);
    let (frontend, stamp) = keep(&old, "vm");
    stamp.set_current(true).unwrap();
    drop(old);
    Keeper::dismiss(bench.dir.path());
    assert!(closes(&frontend, super::GRACE / 2));
}

/// One that is not needed any more lets go of everything and ends; nonsense ends a connection only.
#[test]
fn it_ends_when_nobody_comes() {
    let bench = Bench::new(false);
    let start = Instant::now();
    let (old, ..) = bench.switch(handover::VERSION, true);
    let (frontend, stamp) = keep(&old, "vm");
    stamp.set_current(true).unwrap();
    let nonsense = UnixStream::connect(socket(bench.dir.path())).unwrap();
    std::io::Write::write_all(&mut &nonsense, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    assert!(closes(&nonsense, 10 * LIMIT));
    drop(old);
    assert!(!closes(&frontend, super::GRACE / 2));
    assert!(closes(&frontend, super::GRACE));
    bench.thread.join().unwrap().unwrap();
    assert!(start.elapsed() >= super::GRACE);
}

/// A frontend has sent sockets whose `close` waits in messages that nobody has read, and all connections end at once.
#[test]
fn closing_one_connection_does_not_hold_up_the_others() {
    let bench = Bench::new(true);
    let (old, ..) = bench.switch(1, true);
    let frontends: Vec<_> = (0..3).map(|port| keep(&old, &format!("vm{port}"))).collect();
    let mut others = Vec::new();
    for (frontend, _) in &frontends {
        let (socket, other) = lingering();
        let mut fds = Fds::default();
        fds.put(socket.as_fd()).unwrap();
        wire::send(frontend, &"unread", &fds, LIMIT).unwrap();
        others.push(other);
    }
    drop(old);
    let mut byte = [0];
    for (frontend, _) in &frontends {
        frontend.set_read_timeout(Some(10 * LIMIT)).unwrap();
        // It says, too, that something was not read.
        let end = std::io::Read::read(&mut &*frontend, &mut byte).map_err(|error| error.kind());
        assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
    }
    let (_new, answer, _) = bench.switch(1, true);
    assert!(answer.ports.is_empty());
}
