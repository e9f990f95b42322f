//! Being known to the kubelet: a socket of ours in its folder, a registration, and again whenever either is lost.
//!
//! A restarting kubelet deletes all sockets in its folder, so ours has to be made anew. Each time it gets a new name:
//! the kubelet may still hold on to the old one.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sluice_proto::kubelet::v1beta1 as proto;
use sluice_proto::kubelet::v1beta1::device_plugin_server::DevicePluginServer;
use sluice_proto::kubelet::v1beta1::registration_client::RegistrationClient;
use sluice_proto::{authority, channel};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Server};

use crate::metrics::Metrics;
use crate::service::{Resource, Service};

/// The kubelet's socket.
const KUBELET: &str = "kubelet.sock";
/// What the names of our sockets begin with.
const PREFIX: &str = "sluice-";
/// How often the folder is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long a registration may take: the kubelet takes up to 10 s to call us back.
const REGISTER_PATIENCE: Duration = Duration::from_secs(15);
/// How long a kubelet with which we are registered may be without a stream of ours.
const STREAM_PATIENCE: Duration = Duration::from_secs(5);
/// Pause after a failure, doubled up to the longest. A new kubelet ends it.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long calls under way may take when a socket is given up.
const GRACE: Duration = Duration::from_millis(300);

/// Where a resource stands with the kubelet.
#[derive(Debug, Default)]
pub struct Link {
    state: watch::Sender<LinkState>,
}

/// See [`Link`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkState {
    /// Registrations that succeeded.
    pub registrations: u64,
    /// Streams of the list of devices.
    pub streams: usize,
}

impl LinkState {
    /// Whether the kubelet knows us and listens.
    pub fn is_up(self) -> bool {
        self.registrations > 0 && self.streams > 0
    }
}

impl Link {
    /// How it is now.
    pub fn state(&self) -> LinkState {
        *self.state.borrow()
    }

    /// How it is, and becomes.
    pub fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// Counts a stream until the answer is dropped.
    pub(crate) fn stream(self: &Arc<Self>) -> Stream {
        self.state.send_modify(|state| state.streams += 1);
        Stream(self.clone())
    }
}

/// A stream that is being served.
#[derive(Debug)]
pub(crate) struct Stream(Arc<Link>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.streams -= 1);
    }
}

/// Why the kubelet does not know us.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The system refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The connection failed.
    #[error("cannot talk to the kubelet: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The kubelet refused.
    #[error("the kubelet refused the registration: {}", .0.message())]
    Refused(#[from] tonic::Status),
    /// It took too long.
    #[error("the kubelet did not answer the registration within {} s", REGISTER_PATIENCE.as_secs())]
    Silence,
}

/// Something that tells one file of a name from the next of the same name.
type Identity = (u64, u64, i64, i64);

fn identity(path: &Path) -> Option<Identity> {
    let data = path.symlink_metadata().ok().filter(|data| data.file_type().is_socket())?;
    Some((data.dev(), data.ino(), data.ctime(), data.ctime_nsec()))
}

/// Keeps one resource registered.
#[derive(Debug)]
pub struct Registrar {
    resource: Arc<dyn Resource>,
    link: Arc<Link>,
    dir: PathBuf,
    metrics: Arc<Metrics>,
    /// Sets our names apart from those of other instances.
    instance: String,
    /// Sets the names of this instance apart.
    attempts: u32,
}

impl Registrar {
    /// Keeps `resource` registered with the kubelet whose folder is `dir`.
    pub fn new(resource: Arc<dyn Resource>, link: Arc<Link>, dir: PathBuf, metrics: Arc<Metrics>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let instance = format!("{:x}-{:x}", now.as_micros(), std::process::id());
        Self { resource, link, dir, metrics, instance, attempts: 0 }
    }

    /// Runs until `stop` becomes true, then removes the socket.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
        let mut stopped = std::pin::pin!(stopped);
        let mut pause = FIRST_PAUSE;
        loop {
            let mut socket = None;
            let ended = tokio::select! {
                () = &mut stopped => None,
                ended = self.session(&mut socket) => Some(ended),
            };
            if let Some(socket) = socket {
                socket.close().await;
            }
            let Some(Ended { kubelet, was_watched }) = ended else { return };
            pause = if was_watched { FIRST_PAUSE } else { pause };
            let is_same = tokio::select! {
                () = &mut stopped => return,
                is_same = self.pause(pause, kubelet) => is_same,
            };
            pause = if is_same { (pause * 2).min(LONGEST_PAUSE) } else { FIRST_PAUSE };
        }
    }

    /// Waits for a kubelet, registers with it, and stays as long as that holds.
    async fn session(&mut self, socket: &mut Option<Socket>) -> Ended {
        let kubelet = self.kubelet().await;
        let result = self.register(socket).await;
        let name = self.resource.name();
        self.metrics.count_registration(name, &result);
        let (why, was_watched) = match result {
            Ok(path) => {
                tracing::info!(resource = name, socket = %path.display(), "registered");
                self.link.state.send_modify(|state| state.registrations += 1);
                self.watch(&path, kubelet).await
            }
            Err(error) => (error.to_string(), false),
        };
        tracing::warn!(resource = name, "registering again: {why}");
        Ended { kubelet, was_watched }
    }

    async fn kubelet(&self) -> Identity {
        let path = self.dir.join(KUBELET);
        let mut said = false;
        loop {
            if let Some(identity) = identity(&path) {
                return identity;
            }
            if !std::mem::replace(&mut said, true) {
                tracing::info!(resource = self.resource.name(), "waiting for {}", path.display());
            }
            sleep(LOOK).await;
        }
    }

    /// Waits, but not any longer once the kubelet is another one. Whether it still is the same.
    async fn pause(&self, pause: Duration, kubelet: Identity) -> bool {
        let path = self.dir.join(KUBELET);
        let end = Instant::now() + pause;
        while identity(&path) == Some(kubelet) {
            if Instant::now() >= end {
                return true;
            }
            sleep(LOOK.min(pause)).await;
        }
        false
    }

    /// Serves on a new socket, and tells the kubelet. The socket is there even if that fails. Gives its path.
    async fn register(&mut self, socket: &mut Option<Socket>) -> Result<PathBuf, RegisterError> {
        self.attempts += 1;
        let short = self.resource.name().rsplit('/').next().unwrap_or_default();
        let name = format!("{PREFIX}{short}-{}-{}.sock", self.instance, self.attempts);
        let path = self.dir.join(&name);
        *socket = Some(Socket::open(path.clone(), self.resource.clone(), self.link.clone())?);
        let request = proto::RegisterRequest {
            version: proto::VERSION.into(),
            endpoint: name,
            resource_name: self.resource.name().into(),
            options: Some(self.resource.options()),
        };
        let register = async {
            RegistrationClient::new(connect(&self.dir.join(KUBELET)).await?).register(request).await?;
            Ok(path)
        };
        timeout(REGISTER_PATIENCE, register).await.unwrap_or(Err(RegisterError::Silence))
    }

    /// Gives the reason when it is time to register again, and whether the kubelet has watched meanwhile.
    async fn watch(&self, path: &Path, kubelet: Identity) -> (String, bool) {
        let kubelet_path = self.dir.join(KUBELET);
        let own = identity(path);
        let (mut last_watched, mut was_watched) = (Instant::now(), false);
        let why = loop {
            match identity(&kubelet_path) {
                // A kubelet that is gone comes back as another one.
                Some(now) if now != kubelet => break "the kubelet has restarted",
                _ if own.is_none() || identity(path) != own => break "our socket has been removed",
                _ => {}
            }
            if self.link.state().streams > 0 {
                (last_watched, was_watched) = (Instant::now(), true);
            } else if last_watched.elapsed() > STREAM_PATIENCE {
                break "the kubelet has stopped watching";
            }
            sleep(LOOK).await;
        };
        (why.into(), was_watched)
    }
}

/// How a registration ended.
#[derive(Debug)]
struct Ended {
    /// The kubelet it was with.
    kubelet: Identity,
    /// Whether that kubelet ever asked for our devices.
    was_watched: bool,
}

/// A socket of ours in the kubelet's folder, and its server.
#[derive(Debug)]
struct Socket {
    path: PathBuf,
    identity: Identity,
    closing: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Socket {
    fn open(path: PathBuf, resource: Arc<dyn Resource>, link: Arc<Link>) -> Result<Self, RegisterError> {
        let failed = |source| RegisterError::System { what: "listen on", path: path.clone(), source };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let identity = identity(&path).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let (closing, mut closed) = watch::channel(false);
        let service = DevicePluginServer::new(Service { resource, link, closing: closed.clone() });
        let until = async move { drop(closed.wait_for(|closing| *closing).await) };
        let incoming = authority::incoming(listener);
        let server = tokio::spawn(Server::builder().serve_with_incoming_shutdown(service, incoming, until));
        Ok(Self { path, identity, closing, server })
    }

    /// Removes the socket and ends streams and calls.
    async fn close(mut self) {
        self.remove();
        self.closing.send_replace(true);
        if timeout(GRACE, &mut self.server).await.is_err() {
            self.server.abort();
        }
    }

    fn remove(&self) {
        // Never another one's of the same name.
        if identity(&self.path) == Some(self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Connects to a service on a unix socket.
pub(crate) async fn connect(path: &Path) -> Result<Channel, RegisterError> {
    let stream = UnixStream::connect(path).await;
    let stream =
        stream.map_err(|source| RegisterError::System { what: "connect to", path: path.to_owned(), source })?;
    Ok(channel::over(stream, None).await?)
}

/// Removes sockets of earlier instances of ours that were killed: those that nobody listens on.
pub async fn remove_stale_sockets(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let is_ours =
            entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(".sock"));
        if !is_ours || !entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            continue;
        }
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if UnixStream::connect(entry.path()).await.is_err_and(refused) {
            tracing::info!("removing {}, left by an earlier instance", entry.path().display());
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
