//! The thread of a port: finds the frontend, serves it, and does so again.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;

use crate::config::SocketMode;
use crate::keeper::{Stamp, Watch};
use crate::mem::Share;
use crate::port::Link;
use crate::port::vhost::answer::{answer, explain};
use crate::port::vhost::gate::LogGate;
use crate::port::vhost::handler::{Device, DeviceError};
use crate::port::vhost::message::{self, HEADER, Header, MessageError};
use crate::port::vhost::parcel::{Parcel, Session};
use crate::port::vhost::pause::Orders;
use crate::port::vhost::port::Setup;
use crate::port::vhost::socket::{self, Listener, SocketError};
use crate::status::PortState;
use crate::sync::lock;
use crate::virtq::Fault;

/// Shortest and longest pause before an attempt to reach the frontend; in between, a twentieth of the time that it has been
/// away already.
const RETRY_MS: u16 = 50;
const LONGEST_RETRY_MS: u16 = 1_000;

/// The same after a frontend has held up a worker, which then is less than a hundredth of its time.
const PENALTY_MS: u16 = 15_000;

/// Pause between looks at a header of which only a part has come.
const PARTIAL_MS: u16 = 5;

/// A frontend that says nothing for that long has said all that it had to say, and the keeper is told.
const QUIET_MS: u16 = 10;

/// How long the rest of a message may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a connection ended with.
pub(super) enum End {
    /// We were told to stop.
    Stopped,
    /// The frontend closed its side between two messages.
    HungUp,
}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
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

/// A port's side of its connections, one after the other.
pub(super) struct Connection {
    pub(super) setup: Setup,
    pub(super) orders: Arc<Orders>,
    /// In server mode, once it could be made.
    pub(super) listener: Option<Listener>,
    /// What its connections may map, of which one can begin before all of the last one has gone.
    share: Arc<Share>,
    /// The link as we published it last, unless a device did since.
    shown: Option<(PortState, String)>,
    /// Why the last connection failed.
    failure: Option<String>,
    /// When it ended, or the port began.
    alone_since: Instant,
    /// Whether the last frontend held up a worker.
    penalty: bool,
    log: LogGate,
}

impl Connection {
    pub(super) fn new(setup: Setup, orders: Arc<Orders>) -> Self {
        let (listener, share, shown, failure, log) = Default::default();
        Self { setup, orders, listener, share, shown, failure, alone_since: Instant::now(), penalty: false, log }
    }

    /// The port's whole life. Begins with a connection if one was handed over.
    pub(super) fn run(&mut self, adopted: Option<Session>) {
        self.orders.begin();
        if let Some(session) = adopted {
            self.serve(|port| port.session(session));
        }
        while !self.stopped(0) {
            match self.setup.mode {
                SocketMode::Client => match socket::connect(&self.setup.place) {
                    Ok(stream) => self.connected(stream),
                    Err(error) => self.waiting(&error),
                },
                SocketMode::Server => self.accept(),
            }
            let pause =
                if std::mem::take(&mut self.penalty) { PENALTY_MS } else { pause_after(self.alone_since.elapsed()) };
            if self.stopped(pause) {
                break;
            }
        }
        self.show(PortState::Down, "stopped".to_owned());
    }

    /// Waits for a frontend and serves it.
    fn accept(&mut self) {
        if self.listener.is_none() {
            self.listener = Listener::bind(&self.setup.place).map_err(|error| self.waiting(&error)).ok();
        }
        let Some(listener) = &self.listener else { return };
        let fds = [self.orders.as_raw_fd(), listener.socket.as_raw_fd()];
        let waiting = format!("waiting for a frontend on {}", self.setup.place.path().display());
        self.show(PortState::Connecting, self.told(waiting));
        // Orders are looked at right after this.
        if !socket::wait(fds, None).is_ok_and(|[_, ready]| ready) {
            return;
        }
        match self.listener.as_ref().map(Listener::accept) {
            Some(Ok(Some(stream))) => self.connected(stream),
            Some(Ok(None)) | None => {}
            Some(Err(error)) => self.waiting(&SocketError::Io(self.setup.place.path().to_owned(), error)),
        }
    }

    /// Waits, and obeys orders, for that long at most. Returns whether we are to stop.
    fn stopped(&self, milliseconds: u16) -> bool {
        self.stopped_in(milliseconds, None)
    }

    /// As [`Connection::stopped`], within a connection.
    fn stopped_in(&self, milliseconds: u16, session: Option<(&UnixStream, &Mutex<Device>)>) -> bool {
        // The signal to end may have been taken before, in a connection.
        if self.orders.ended() {
            return true;
        }
        if socket::wait([self.orders.as_raw_fd()], Some(milliseconds)).is_ok_and(|[woken]| woken) {
            self.orders.obey(|| self.pack(session));
        }
        self.orders.ended()
    }

    /// What the port consists of.
    fn pack(&self, session: Option<(&UnixStream, &Mutex<Device>)>) -> io::Result<Parcel> {
        let mut parcel = Parcel::default();
        if let Some((stream, device)) = session {
            let device = lock(device);
            parcel.record.device = Some(device.export(stream.as_fd(), &mut parcel.fds)?);
            parcel.standing = device.standing();
        }
        if let Some(listener) = &self.listener {
            let (device, inode) = listener.made();
            parcel.record.listener = Some((parcel.fds.put(listener.socket.as_fd())?, device, inode));
        }
        Ok(parcel)
    }

    /// A device for a new connection.
    pub(super) fn device(&self) -> Device {
        let (publisher, share) = (self.setup.publisher.clone(), self.share.clone());
        Device::new(publisher, share, self.setup.queues, self.setup.mtu, self.failure.as_deref())
    }

    pub(super) fn show(&mut self, state: PortState, reason: String) {
        if !self.shown.as_ref().is_some_and(|shown| shown.0 == state && shown.1 == reason) {
            self.setup.publisher.publish(Link::down(state, Some(reason.clone())));
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

    /// Serves a frontend that has just connected.
    fn connected(&mut self, stream: UnixStream) {
        self.setup.publisher.stats().connects.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.log.pass() {
            tracing::info!(path = %self.setup.place.path().display(), suppressed, "connected");
        }
        self.serve(|port| port.begin(stream));
    }

    /// The whole life of a connection.
    pub(super) fn begin(&self, stream: UnixStream) -> Result<End, Failure> {
        let device = Arc::new(Mutex::new(self.device()));
        let handler = BackendReqHandler::from_stream(stream.try_clone()?, device.clone());
        self.converse(stream, &device, handler)
    }

    /// Serves one frontend until it goes, and cleans up after it.
    fn serve(&mut self, session: impl FnOnce(&Self) -> Result<End, Failure>) {
        self.shown = None;
        // A fault of ours, provoked by this frontend, must cost no more than one of its own.
        let end = panic::catch_unwind(AssertUnwindSafe(|| session(self))).unwrap_or(Err(Failure::Panicked));
        self.orders.connected(None);
        self.setup.publisher.forget_stations();
        let fault = self.setup.publisher.stats().fault();
        self.setup.publisher.stats().clear_fault();
        self.penalty = fault == Some(Fault::NotifyBlocked);
        self.alone_since = Instant::now();
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

    /// The rest of the life of a connection that was handed over.
    fn session(&self, session: Session) -> Result<End, Failure> {
        let Session { stream, device, handler, .. } = session;
        self.converse(stream, &device, handler)
    }

    /// The life of one connection. When it is over, workers have let go of its rings and its memory is unmapped.
    fn converse(
        &self,
        stream: UnixStream,
        device: &Mutex<Device>,
        handler: BackendReqHandler<Mutex<Device>>,
    ) -> Result<End, Failure> {
        let mut watch = self.watch(device);
        let end = self.talk(&stream, device, handler, &mut watch);
        // The keeper may have it, too, and the frontend is to know now.
        message::end(&stream);
        end
    }

    /// Has the connection kept over a crash.
    fn watch(&self, device: &Mutex<Device>) -> Option<Watch> {
        let mut device = lock(device);
        let keeper = self.setup.publisher.keeper();
        if device.stamp.is_none() && keeper.is_some() {
            device.stamp = Stamp::new().ok().map(Arc::new);
        }
        // Whoever has it is told, even if we do without.
        let stamp = device.stamp.clone().inspect(|stamp| drop(stamp.set_current(false)))?;
        Some(Watch::new(keeper?, &self.setup.name, self.setup.place.path(), stamp))
    }

    fn talk(
        &self,
        stream: &UnixStream,
        device: &Mutex<Device>,
        mut handler: BackendReqHandler<Mutex<Device>>,
        watch: &mut Option<Watch>,
    ) -> Result<End, Failure> {
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        self.orders.connected(Some(stream.try_clone()?));
        loop {
            let Some(header) = self.next(stream, device, watch)? else {
                return Ok(if self.orders.ended() { End::Stopped } else { End::HungUp });
            };
            // The crate would try for ever.
            if !socket::has_room(stream, MESSAGE_TIMEOUT) {
                return Err(Failure::Unread);
            }
            if let Some(watch) = watch {
                watch.changing();
            }
            if !answer(header, stream, device)? {
                handler.handle_request().map_err(|error| Failure::Request(header.request, explain(error)))?;
            }
        }
    }

    /// Waits for a message and returns its header, which stays in the stream. `None` if the frontend has hung up or we
    /// are to stop.
    fn next(
        &self,
        stream: &UnixStream,
        device: &Mutex<Device>,
        watch: &mut Option<Watch>,
    ) -> Result<Option<Header>, Failure> {
        let fds = [self.orders.as_raw_fd(), stream.as_raw_fd()];
        loop {
            let stale = watch.as_mut().filter(|watch| !watch.is_current());
            let [woken, readable] = socket::wait(fds, stale.is_some().then_some(QUIET_MS))?;
            if let Some(watch) = stale.filter(|_| !woken && !readable) {
                watch.update(self.pack(Some((stream, device))));
            }
            if woken && self.stopped_in(0, Some((stream, device))) {
                return Ok(None);
            }
            if readable && !woken {
                return self.whole_header(stream, device);
            }
        }
    }

    fn whole_header(&self, stream: &UnixStream, device: &Mutex<Device>) -> Result<Option<Header>, Failure> {
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
                Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => return Err(MessageError::Socket.into()),
                Err(error) => return Err(error.into()),
            }
            if self.stopped_in(PARTIAL_MS, Some((stream, device))) {
                return Ok(None);
            }
        }
    }
}

/// How long to wait before the next attempt, in milliseconds.
fn pause_after(alone: Duration) -> u16 {
    let twentieth = u16::try_from(alone.as_millis() / 20).unwrap_or(u16::MAX);
    twentieth.clamp(RETRY_MS, LONGEST_RETRY_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frontend_is_looked_for_less_often_the_longer_it_is_away() {
        let pauses = [0, 999, 4_000, 20_000, u64::MAX].map(|alone| pause_after(Duration::from_millis(alone)));
        assert_eq!(pauses, [50, 50, 200, 1_000, 1_000]);
    }
}
