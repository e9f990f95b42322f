//! The thread of a port: finds the frontend, serves it, and does so again.

use std::borrow::Cow;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::config::SocketMode;
use crate::port::vhost::handler::{Device, DeviceError};
use crate::port::vhost::message::{self, HEADER, Header, MessageError};
use crate::port::vhost::place::SocketPlace;
use crate::port::vhost::socket::{self, Listener, SocketError};
use crate::port::{Link, Publisher};
use crate::status::PortState;
use crate::virtq::Fault;
use crate::virtq::notify::EventFd;

/// Pause before each attempt to reach the frontend.
const RETRY_MS: u16 = 50;

/// The same after a frontend has held up a worker, which then is less than a hundredth of its time.
const PENALTY_MS: u16 = 15_000;

/// Pause between looks at a header of which only a part has come.
const PARTIAL_MS: u16 = 5;

/// How long the rest of a message may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Stack of a port's thread.
const STACK: usize = 256 * 1024;

/// A vhost-user port: the thread that looks after one frontend.
#[derive(Debug)]
pub struct VhostPort {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// How the thread is told to end, whatever it waits for.
#[derive(Debug)]
struct Stop {
    /// Readable from the moment of the request on.
    event: EventFd,
    /// The connection, while there is one; shutting it down ends a wait within a message.
    stream: Mutex<Option<UnixStream>>,
}

impl VhostPort {
    /// Starts the port's thread, which connects to the socket at `place` (or listens there) and serves the frontend until
    /// [`VhostPort::stop`]. `queues` bounds the queue pairs that frames to the guest are spread over, `mtu` is what the
    /// port is configured to. A socket that is not there, or not ours to use, is no error: the port waits for it and
    /// says so in its link.
    ///
    /// # Errors
    /// If the process has no thread or descriptor left.
    pub fn start(
        name: &str,
        place: impl Into<SocketPlace>,
        mode: SocketMode,
        queues: Option<u16>,
        mtu: Option<u16>,
        publisher: Arc<dyn Publisher>,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop { event: EventFd::new()?, stream: Mutex::new(None) });
        let mut connection = Connection::new(place.into(), queues, mtu, publisher, stop.clone());
        let port = name.to_owned();
        let run = move || {
            let _span = tracing::info_span!("vhost-user", port).entered();
            match mode {
                SocketMode::Client => connection.run_client(),
                SocketMode::Server => connection.run_server(),
            }
        };
        let thread = thread::Builder::new().name(format!("sl-{name}")).stack_size(STACK).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends the thread, whatever it is doing, and waits for it. The port's link is down afterwards.
    pub fn stop(self) {}
}

impl Drop for VhostPort {
    fn drop(&mut self) {
        self.stop.event.signal();
        if let Some(stream) = &*self.stop.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            // It fails only if the other side has already hung up.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of a vhost-user port panicked");
        }
    }
}

/// Serves one frontend over a connection that is there already, until it hangs up. Returns why the connection failed, if
/// it did. For fuzzers: there is no thread, and nothing is tried again.
#[doc(hidden)]
pub fn serve_once(stream: UnixStream, publisher: Arc<dyn Publisher>) -> Option<String> {
    let stop = match EventFd::new() {
        Ok(event) => Arc::new(Stop { event, stream: Mutex::new(None) }),
        Err(error) => return Some(error.to_string()),
    };
    let mut connection = Connection::new(std::path::PathBuf::new().into(), None, None, publisher, stop);
    connection.session(stream).err().map(|failure| failure.to_string())
}

/// What a connection ended with.
enum End {
    /// We were told to stop.
    Stopped,
    /// The frontend closed its side between two messages.
    HungUp,
}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the frontend sent half a header")]
    HalfHeader,
    #[error("the frontend does not read our replies")]
    Unread,
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("{0:?}: {1}")]
    Request(FrontendReq, Cow<'static, str>),
    #[error("{0:?}: {1}")]
    Device(FrontendReq, #[source] DeviceError),
    #[error("internal error; the log has the details")]
    Panicked,
    #[error("connection: {0}")]
    Io(#[from] io::Error),
}

struct Connection {
    place: SocketPlace,
    queues: Option<u16>,
    mtu: Option<u16>,
    publisher: Arc<dyn Publisher>,
    stop: Arc<Stop>,
    /// The link as we published it last, unless a device did since.
    shown: Option<(PortState, String)>,
    /// Why the last connection failed.
    failure: Option<String>,
    /// Pause before the next attempt, in milliseconds.
    pause: u16,
    log: LogGate,
}

impl Connection {
    fn new(
        place: SocketPlace,
        queues: Option<u16>,
        mtu: Option<u16>,
        publisher: Arc<dyn Publisher>,
        stop: Arc<Stop>,
    ) -> Self {
        let (shown, failure) = (None, None);
        Self { place, queues, mtu, publisher, stop, shown, failure, pause: RETRY_MS, log: LogGate::default() }
    }

    fn run_client(&mut self) {
        loop {
            match socket::connect(&self.place) {
                Ok(stream) => self.serve(stream),
                Err(error) => self.waiting(&error),
            }
            if self.rest() {
                return self.show(PortState::Down, "stopped".to_owned());
            }
        }
    }

    fn run_server(&mut self) {
        let mut listener = None;
        loop {
            listener = listener.or_else(|| Listener::bind(&self.place).map_err(|error| self.waiting(&error)).ok());
            if let Some(listener) = &listener {
                self.accept(listener);
            }
            if self.rest() {
                return self.show(PortState::Down, "stopped".to_owned());
            }
        }
    }

    /// Waits for a frontend and serves it.
    fn accept(&mut self, listener: &Listener) {
        self.show(
            PortState::Connecting,
            self.told(format!("waiting for a frontend on {}", self.place.path().display())),
        );
        if socket::wait([self.stop.event.as_raw_fd(), listener.socket.as_raw_fd()], None).is_err() {
            return;
        }
        match listener.accept() {
            Ok(Some(stream)) => self.serve(stream),
            Ok(None) => {}
            Err(error) => self.waiting(&SocketError::Io(self.place.path().to_owned(), error)),
        }
    }

    /// Pauses before the next attempt. Returns whether we are to stop.
    fn rest(&mut self) -> bool {
        let pause = std::mem::replace(&mut self.pause, RETRY_MS);
        self.stopped(pause)
    }

    fn stopped(&self, milliseconds: u16) -> bool {
        socket::wait([self.stop.event.as_raw_fd()], Some(milliseconds)).is_ok_and(|[stop]| stop)
    }

    fn show(&mut self, state: PortState, reason: String) {
        if !self.shown.as_ref().is_some_and(|shown| shown.0 == state && shown.1 == reason) {
            self.publisher.publish(Link::down(state, Some(reason.clone())));
            self.shown = Some((state, reason));
        }
    }

    /// Adds why the last connection failed, which the operator would miss otherwise.
    fn told(&self, reason: String) -> String {
        match &self.failure {
            Some(failure) => format!("{reason}; before that: {failure}"),
            None => reason,
        }
    }

    fn waiting(&mut self, error: &SocketError) {
        let reason = self.told(error.to_string());
        let new = self.shown.as_ref().is_none_or(|shown| shown.1 != reason);
        self.show(PortState::Connecting, reason);
        if new && let Some(suppressed) = self.log.pass() {
            tracing::info!(suppressed, "{error}");
        }
    }

    /// Serves one frontend until it goes, and cleans up after it.
    fn serve(&mut self, stream: UnixStream) {
        self.publisher.stats().connects.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.log.pass() {
            tracing::info!(path = %self.place.path().display(), suppressed, "connected");
        }
        self.shown = None;
        // A fault of ours, provoked by this frontend, must cost no more than one of its own.
        let end = panic::catch_unwind(AssertUnwindSafe(|| self.session(stream))).unwrap_or(Err(Failure::Panicked));
        *self.stop.stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.publisher.forget_stations();
        let fault = self.publisher.stats().fault();
        self.publisher.stats().clear_fault();
        if fault == Some(Fault::NotifyBlocked) {
            self.pause = PENALTY_MS;
        }
        let (state, reason) = match end {
            Ok(End::Stopped) => return,
            Ok(End::HungUp) if fault == Some(Fault::NotifyBlocked) => {
                (PortState::Failed, Fault::NotifyBlocked.to_string())
            }
            Ok(End::HungUp) => (PortState::Connecting, "the frontend hung up".to_owned()),
            Err(failure) => (PortState::Failed, failure.to_string()),
        };
        if let Some(suppressed) = self.log.pass() {
            tracing::info!(suppressed, "disconnected: {reason}");
        }
        self.failure = (state == PortState::Failed).then(|| reason.clone());
        self.show(state, reason);
    }

    /// The life of one connection. When this returns, workers have let go of its rings and its memory is unmapped.
    fn session(&mut self, stream: UnixStream) -> Result<End, Failure> {
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        *self.stop.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
        let device = Device::new(self.publisher.clone(), self.queues, self.mtu, self.failure.as_deref());
        let device = Arc::new(Mutex::new(device));
        let mut handler = BackendReqHandler::from_stream(stream.try_clone()?, device.clone());
        loop {
            let Some(header) = self.next(&stream)? else {
                let stopped = self.stopped(0);
                return Ok(if stopped { End::Stopped } else { End::HungUp });
            };
            // The crate would try for ever.
            if !socket::has_room(&stream, MESSAGE_TIMEOUT) {
                return Err(Failure::Unread);
            }
            if !answer(header, &stream, &device)? {
                handler.handle_request().map_err(|error| Failure::Request(header.request, explain(error)))?;
            }
        }
    }

    /// Waits for a message and returns its header, which stays in the stream. `None` if the frontend has hung up or we
    /// are to stop.
    fn next(&self, stream: &UnixStream) -> Result<Option<Header>, Failure> {
        let fds = [self.stop.event.as_raw_fd(), stream.as_raw_fd()];
        loop {
            let [stop, readable] = socket::wait(fds, None)?;
            if stop {
                return Ok(None);
            }
            if readable {
                return self.whole_header(stream);
            }
        }
    }

    fn whole_header(&self, stream: &UnixStream) -> Result<Option<Header>, Failure> {
        let deadline = Instant::now() + MESSAGE_TIMEOUT;
        let mut bytes = [0; HEADER];
        loop {
            match message::peek(stream, &mut bytes) {
                Ok(0) => return Ok(None),
                Ok(HEADER) => return Ok(Some(Header::parse(bytes)?)),
                // The kernel does not wait for more when it peeks, so look again a little later.
                Ok(_) if Instant::now() > deadline || socket::hung_up(stream)? => return Err(Failure::HalfHeader),
                Ok(_) => {}
                // Closed with our replies unread: gone all the same.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Err(MessageError::Descriptors.into());
                }
                Err(error) => return Err(error.into()),
            }
            if self.stopped(PARTIAL_MS) {
                return Ok(None);
            }
        }
    }
}

/// Handles the requests that the `vhost` crate does not. Returns whether this was one of them.
fn answer(header: Header, stream: &UnixStream, device: &Mutex<Device>) -> Result<bool, Failure> {
    let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
    let result = match header.request {
        FrontendReq::GET_STATUS => {
            header.take::<0>(stream)?;
            header.reply(stream, u64::from(device.status()))?;
            return Ok(true);
        }
        FrontendReq::SET_STATUS => device.set_status(number(header, stream)?),
        FrontendReq::NET_SET_MTU => device.frontend_mtu(number(header, stream)?),
        FrontendReq::SET_VRING_ENABLE => {
            let state = number(header, stream)?.to_ne_bytes();
            let word = |at: usize| u32::from_ne_bytes([state[at], state[at + 1], state[at + 2], state[at + 3]]);
            device.enable(word(0), word(4))
        }
        FrontendReq::SEND_RARP => {
            device.announce(number(header, stream)?);
            Ok(())
        }
        FrontendReq::SET_LOG_FD => header.take::<0>(stream).map(|_| Ok(()))?,
        FrontendReq::SET_VRING_ENDIAN => number(header, stream).map(|_| Err(DeviceError::Unsupported))?,
        _ => return Ok(false),
    };
    if header.need_reply && device.acknowledges() {
        header.reply(stream, u64::from(result.is_err()))?;
    }
    result.map(|()| true).map_err(|error| Failure::Device(header.request, error))
}

fn number(header: Header, stream: &UnixStream) -> Result<u64, MessageError> {
    Ok(u64::from_ne_bytes(header.take::<8>(stream)?))
}

/// The crate's errors in an operator's words.
fn explain(error: Error) -> Cow<'static, str> {
    match error {
        Error::ReqHandlerError(error) => error.to_string().into(),
        Error::InvalidMessage => "cut short, or its size, fields or descriptors are not those of the request".into(),
        Error::InactiveOperation(feature) => format!("{feature:?} was not negotiated").into(),
        Error::SocketRetry(_) | Error::PartialMessage | Error::Disconnected => {
            "the frontend sent half a message".into()
        }
        other => other.to_string().into(),
    }
}

/// Lets a few log lines pass in each period, so that a frontend which comes and goes cannot flood the log.
#[derive(Debug, Default)]
struct LogGate {
    since: Option<Instant>,
    passed: u32,
    suppressed: u32,
}

impl LogGate {
    const PERIOD: Duration = Duration::from_secs(10);
    const LINES: u32 = 8;

    /// Whether a line may pass; if so, how many were held back before it.
    fn pass(&mut self) -> Option<u32> {
        if self.since.is_none_or(|since| since.elapsed() >= Self::PERIOD) {
            self.since = Some(Instant::now());
            self.passed = 0;
        }
        if self.passed >= Self::LINES {
            self.suppressed += 1;
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_bounded() {
        let mut gate = LogGate::default();
        let passed = (0..100).filter(|_| gate.pass().is_some()).count();
        assert_eq!(passed, LogGate::LINES as usize);
        gate.since = None;
        assert_eq!(gate.pass(), Some(100 - LogGate::LINES));
    }
}
