//! Ports whose frontends, or whose own threads, make whoever ends them wait.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::handover::{DeviceRecord, Fds, KindRecord, VhostRecord, wire};
use crate::port::vhost::Setup;
use crate::port::{Link, Publisher};
use crate::testing::lingering;

const DEADLINE: Duration = Duration::from_secs(10);

/// A frontend has sent a socket whose `close` waits, in a message that nobody has read.
fn hide(frontend: &UnixStream, socket: &impl AsFd) {
    let mut fds = Fds::default();
    fds.put(socket.as_fd()).unwrap();
    wire::send(frontend, &"unread", &fds, DEADLINE).unwrap();
}

fn is_closed(frontend: &UnixStream) {
    frontend.set_read_timeout(Some(DEADLINE)).unwrap();
    // It says, too, that something was not read.
    let end = Read::read(&mut &*frontend, &mut [0]).map_err(|error| error.kind());
    assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
}

/// A port in server mode as it is handed over, with a connection that was served and one that was still to be accepted. Both
/// frontends make whoever closes theirs wait.
struct Handed {
    config: PortConfig,
    taken: Taken,
    served: UnixStream,
    /// Keep the closing waiting.
    _others: Vec<TcpStream>,
    _queued: UnixStream,
}

fn hand(path: &Path) -> Handed {
    let listener = UnixListener::bind(path).unwrap();
    let served = UnixStream::connect(path).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let queued = UnixStream::connect(path).unwrap();
    let mut fds = Fds::default();
    let device = DeviceRecord { stream: fds.put(stream.as_fd()).unwrap(), ..DeviceRecord::default() };
    let made = std::fs::metadata(path).unwrap();
    let listening = (fds.put(listener.as_fd()).unwrap(), made.dev(), made.ino());
    let (sockets, others): (Vec<_>, Vec<_>) = (0..2).map(|_| lingering()).unzip();
    hide(&served, &sockets[0]);
    hide(&queued, &sockets[1]);
    let kind = KindRecord::Vhost(VhostRecord { device: Some(device), listener: Some(listening) });
    let config = format!("p=vhost-user:{},mode=server", path.display()).parse().unwrap();
    Handed { config, taken: Taken { kind, fds }, served, _others: others, _queued: queued }
}

/// Whatever a frontend does, this ends.
fn in_time<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, over) = mpsc::channel();
    thread::spawn(move || done.send(act()));
    over.recv_timeout(DEADLINE).unwrap()
}

#[test]
fn nobody_waits_for_the_frontend_of_a_port_that_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let handed = hand(&path);
    let (discarding, config, taken) = (switch.clone(), handed.config, handed.taken);
    in_time(move || discarding.discard(&config, taken));
    assert!(!path.exists());
    is_closed(&handed.served);
    switch.stop();
}

#[test]
fn nobody_waits_for_the_frontend_of_a_port_whose_folder_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("gone");
    std::fs::create_dir(&folder).unwrap();
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let handed = hand(&folder.join("s"));
    std::fs::remove_dir_all(&folder).unwrap();
    switch.adopt_port(handed.config, handed.taken).unwrap();
    let starting = switch.clone();
    assert_eq!(in_time(move || starting.start_adopted()), ["p"]);
    is_closed(&handed.served);
    switch.stop();
}

/// Has the port's thread hang in its first publication until the other end of `over` goes.
struct Hanging {
    begun: Sender<()>,
    over: Mutex<Receiver<()>>,
    stats: Arc<PortStats>,
}

impl Publisher for Hanging {
    fn publish(&self, _: Link) {
        let _ = self.begun.send(());
        let _ = lock(&self.over).recv();
    }

    fn forget_stations(&self) {}

    fn announce(&self, _: [u8; 6]) {}

    fn stats(&self) -> &Arc<PortStats> {
        &self.stats
    }
}

#[test]
fn a_switch_that_stops_waits_for_all_ports_that_hang_together() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let (begun, hangs) = mpsc::channel();
    let mut ends = Vec::new();
    for name in ["a", "b", "c"] {
        let (end, over) = mpsc::channel();
        ends.push(end);
        let config: PortConfig = format!("{name}=vhost-user:/nonexistent/{name}").parse().unwrap();
        let start = |inner: Arc<Inner>, _, config: &PortConfig, stats: &Arc<PortStats>| {
            let PortTarget::VhostUser { path, mode } = &config.target else { panic!() };
            let publisher = Arc::new(Hanging { begun: begun.clone(), over: over.into(), stats: stats.clone() });
            let (name, place) = (config.name.clone(), inner.place(path)?);
            let setup = Setup { name, place, mode: *mode, queues: None, mtu: None, publisher };
            VhostPort::start(setup).map(Driver::Vhost)
        };
        switch.add_with(config, None, start).unwrap();
        hangs.recv_timeout(DEADLINE).unwrap();
    }
    let began = Instant::now();
    switch.stop();
    // Each is waited for 5 s.
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    assert!(switch.ports().is_empty());
}
