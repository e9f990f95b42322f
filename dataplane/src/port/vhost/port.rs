//! A vhost-user port as the switch has it: started, paused, taken over, stopped.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::parcel::{AdoptError, Session};
use super::pause::{INSIST, Orders, Paused};
use super::place::SocketPlace;
use super::socket::Listener;
use crate::config::SocketMode;
use crate::handover::{Fds, VhostRecord};
use crate::port::Publisher;
use crate::status::PortState;
use crate::sync::close_apart;

/// Stack of a port's thread.
const STACK: usize = 256 * 1024;

/// How long a thread that is to end is left alone, and how long it is waited for.
const ALONE: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(5);

/// A vhost-user port: the thread that looks after one frontend.
#[derive(Debug)]
pub struct VhostPort {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
    /// Hung up once the thread is done.
    done: Mutex<Receiver<()>>,
}

/// What a port is started with.
pub struct Setup {
    /// Its name.
    pub name: String,
    /// The socket that it connects to, or listens on.
    pub place: SocketPlace,
    /// Which of the two.
    pub mode: SocketMode,
    /// Bounds the queue pairs that frames to the guest are spread over.
    pub queues: Option<u16>,
    /// What the port is configured to.
    pub mtu: Option<u16>,
    /// Its way to the workers.
    pub publisher: Arc<dyn Publisher>,
}

impl VhostPort {
    /// Starts the port's thread, which connects to the socket (or listens there) and serves the frontend until
    /// [`VhostPort::stop`]. A socket that is not there, or not ours to use, is no error: the port waits for it and says so
    /// in its link.
    ///
    /// # Errors
    /// If the process has no thread or descriptor left.
    pub fn start(setup: Setup) -> io::Result<Self> {
        Self::spawn(Connection::new(setup, Arc::new(Orders::new()?)), None)
    }

    fn spawn(connection: Connection, session: Option<Session>) -> io::Result<Self> {
        let (orders, port) = (connection.orders.clone(), connection.setup.name.clone());
        let thread = thread::Builder::new().name(format!("sl-{port}")).stack_size(STACK);
        let (is_done, done) = mpsc::channel();
        let thread = thread.spawn(move || {
            // Dropped after the connection.
            let (_is_done, mut connection) = (is_done, connection);
            let _span = tracing::info_span!("vhost-user", port).entered();
            connection.run(session);
        })?;
        Ok(Self { orders, thread: Some(thread), done: done.into() })
    }

    /// Has the port's thread stand still between two messages until what this returns is dropped, and say what the
    /// port consists of. Frames flow on.
    pub fn pause(&self) -> Paused {
        self.orders.pause()
    }

    /// Ends the thread, whatever it is doing, and waits for it, but not for ever. The port's link is down afterwards.
    pub fn stop(self) {}

    /// Stops all of these, and waits no longer than for one.
    pub fn stop_all(mut ports: Vec<Self>) {
        end_all(&mut ports.iter_mut().collect::<Vec<_>>());
    }

    /// Waits for the thread to end, and returns whether it has.
    fn ends_by(&mut self, until: Instant) -> bool {
        let Some(thread) = self.thread.take() else { return true };
        let done = self.done.get_mut().unwrap_or_else(PoisonError::into_inner);
        if done.recv_timeout(until.saturating_duration_since(Instant::now())) == Err(RecvTimeoutError::Timeout) {
            self.thread = Some(thread);
            return false;
        }
        if thread.join().is_err() {
            tracing::error!("the thread of a vhost-user port panicked");
        }
        true
    }
}

impl Drop for VhostPort {
    fn drop(&mut self) {
        end_all(&mut [self]);
    }
}

/// Ends the threads of all of these, and waits for them until the same moment: whoever stops ports must not wait for what their
/// frontends can draw out.
fn end_all(ports: &mut [&mut VhostPort]) {
    ports.iter().for_each(|port| port.orders.end());
    let now = Instant::now();
    let (mut until, deadline) = (now + ALONE, now + PATIENCE);
    loop {
        // All of them, even if the first hangs.
        let hanging = ports.iter_mut().filter_map(|port| (!port.ends_by(until)).then_some(&port.orders));
        let hanging: Vec<_> = hanging.collect();
        if hanging.is_empty() || Instant::now() >= deadline {
            break;
        }
        hanging.into_iter().for_each(|orders| orders.interrupt());
        until = Instant::now() + INSIST;
    }
    for port in ports {
        if port.thread.take().is_some() {
            tracing::error!("the thread of a vhost-user port hangs and is left behind");
        }
    }
}

/// Serves one frontend over a connection that is there already, until it hangs up. Returns why the connection failed, if
/// it did. For fuzzers: there is no thread, and nothing is tried again.
#[doc(hidden)]
pub fn serve_once(stream: UnixStream, publisher: Arc<dyn Publisher>) -> Option<String> {
    let orders = match Orders::new() {
        Ok(orders) => Arc::new(orders),
        Err(error) => return Some(error.to_string()),
    };
    let place = std::path::PathBuf::new().into();
    let setup = Setup { name: String::new(), place, mode: SocketMode::Client, queues: None, mtu: None, publisher };
    Connection::new(setup, orders).begin(stream).err().map(|failure| failure.to_string())
}

/// A port that was handed over by another process, which it does not disturb: nothing is said to the frontend before
/// [`Adopted::start`], and if this is dropped instead, the other process can go on.
pub struct Adopted {
    connection: Connection,
    session: Option<Session>,
    listener: Option<(OwnedFd, (u64, u64))>,
}

impl std::fmt::Debug for Adopted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adopted").field("name", &self.connection.setup.name).finish_non_exhaustive()
    }
}

impl Adopted {
    /// Maps the guest's memory and puts the connection together.
    ///
    /// # Errors
    /// [`AdoptError`] if the record is not what a port can be made of.
    pub fn new(setup: Setup, record: VhostRecord, fds: &mut Fds) -> Result<Self, AdoptError> {
        let listener = record.listener.map(|(socket, device, inode)| {
            let socket = fds.take(socket).ok_or(AdoptError::Descriptor("a listening socket"))?;
            Ok::<_, AdoptError>((socket, (device, inode)))
        });
        let listener = listener.transpose()?.filter(|_| setup.mode == SocketMode::Server);
        let mut connection = Connection::new(setup, Arc::new(Orders::new()?));
        let session = record.device.map(|device| Session::adopt(connection.device(), device, fds)).transpose()?;
        if session.is_none() {
            connection.show(PortState::Connecting, "taken over without a connection".to_owned());
        }
        Ok(Self { connection, session, listener })
    }

    /// Makes the rings' queues, from where each ring stands now. The workers must not serve them yet.
    ///
    /// # Errors
    /// [`AdoptError`] if a ring cannot go on.
    pub fn go_on(&self, bases: &[u32]) -> Result<(), AdoptError> {
        self.session.as_ref().map_or(Ok(()), |session| session.go_on(bases))
    }

    /// As [`Adopted::go_on`] when the other process has died and not said where each ring stands.
    ///
    /// # Errors
    /// As [`Adopted::go_on`].
    pub fn resume(&self) -> Result<(), AdoptError> {
        self.connection.setup.publisher.stats().connects.fetch_add(1, Ordering::Relaxed);
        self.session.as_ref().map_or(Ok(()), Session::resume)
    }

    /// Serves the frontend from now on.
    ///
    /// # Errors
    /// If the folder of its socket is gone, or the process has no thread left.
    pub fn start(mut self) -> io::Result<VhostPort> {
        if let Some((socket, made)) = self.listener.take() {
            match Listener::adopt(socket, &self.connection.setup.place, made) {
                Ok(listener) => self.connection.listener = Some(listener),
                Err(error) => {
                    self.end()?;
                    return Err(error);
                }
            }
        }
        VhostPort::spawn(self.connection, self.session)
    }

    /// Ends the connection, without a wait for its frontend.
    fn end(self) -> io::Result<()> {
        let stream = self.session.as_ref().map(|session| session.stream.try_clone()).transpose()?;
        // First all but the last descriptor of the stream: it is the last one whose closing waits.
        drop(self);
        close_apart(stream)
    }
}
