//! The switch's side.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::value::to_raw_value;

use super::{Answer, LIMIT, Said, Stamp, bind, socket};
use crate::handover::{self, Fds, VhostRecord, WireError, wire};
use crate::port::vhost::Parcel;
use crate::sync::{close_apart, lock};

/// Name of the keeper's process.
const PROCESS: &str = "sl-keeper";

/// Between two attempts to find one.
const PAUSE: Duration = Duration::from_millis(5);

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// It cannot be started.
    #[error("cannot start a keeper: {0}")]
    Start(#[source] io::Error),
    /// Somebody else listens there.
    #[error("the process at {0} is neither this user's nor root's")]
    Stranger(PathBuf),
    /// It does not do its part.
    #[error("the keeper at {0}: {1}")]
    Wire(PathBuf, #[source] WireError),
}

/// What was kept of a port.
#[derive(Debug)]
pub struct Kept {
    /// The port's name.
    pub port: String,
    /// Its socket.
    pub path: PathBuf,
    pub(crate) record: VhostRecord,
    pub(crate) fds: Fds,
}

impl Kept {
    /// Lets go of it, without a wait for its frontend.
    pub(crate) fn let_go(self) {
        if let Err(error) = close_apart(self.fds) {
            tracing::error!(port = self.port, "its frontend stays connected to nobody, restart that: {error}");
        }
    }
}

/// The way to the keeper, which all ports share. If it fails, nothing is kept any more, and all else goes on.
#[derive(Debug)]
pub struct Keeper {
    stream: Mutex<Option<UnixStream>>,
    /// Counts connections.
    connections: AtomicU64,
}

impl Keeper {
    /// Finds the keeper of a state directory, or starts one. Returns what it has kept for us; `alone` says that any switch
    /// before us must be dead by now, and nothing is given otherwise.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn find(state: &Path, alone: bool) -> Result<(Arc<Self>, Vec<Kept>), KeeperError> {
        let path = socket(state);
        let end = Instant::now() + LIMIT;
        loop {
            let stream = match UnixStream::connect(&path) {
                Ok(stream) => stream,
                Err(_) => start(&path).and_then(|()| UnixStream::connect(&path)).map_err(KeeperError::Start)?,
            };
            match greet(stream, &path, alone) {
                // That of a switch that has just ended, on its way out.
                Err(KeeperError::Wire(_, WireError::HungUp)) if Instant::now() < end => std::thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    /// Has a keeper that may be there let go of everything, for a switch that does without. Any before it must be dead by now.
    pub fn dismiss(state: &Path) {
        let path = socket(state);
        let keeper = UnixStream::connect(&path).map(|stream| greet(stream, &path, true));
        if let Ok(Ok((keeper, _))) = keeper {
            keeper.settled(Vec::new());
            keeper.end();
        }
    }

    /// Says that of what was kept before, these ports have been taken up, and nothing else is wanted.
    pub fn settled(&self, ports: Vec<String>) {
        self.say(&Said::Settled { ports }, &Fds::default());
    }

    /// Says that nothing is to be kept: the switch ends by itself.
    pub fn end(&self) {
        self.say(&Said::End, &Fds::default());
    }

    /// Returns whether it was said.
    fn say(&self, said: &Said, fds: &Fds) -> bool {
        let mut slot = lock(&self.stream);
        let Some(stream) = &*slot else { return false };
        match wire::send(stream, said, fds, LIMIT) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("the keeper is gone, and connections end with the switch from now on: {error}");
                *slot = None;
                false
            }
        }
    }
}

/// Asks the keeper at the other end for what it has.
fn greet(stream: UnixStream, path: &Path, alone: bool) -> Result<(Arc<Keeper>, Vec<Kept>), KeeperError> {
    match wire::peer_uid(&stream) {
        Ok(uid) if uid == 0 || uid == wire::own_uid() => {}
        _ => return Err(KeeperError::Stranger(path.to_owned())),
    }
    let hello = Said::Hello { version: handover::VERSION, alone };
    let talk = wire::send(&stream, &hello, &Fds::default(), LIMIT).and_then(|()| wire::receive(&stream, 3 * LIMIT));
    let (answer, fds) = talk.map_err(|error| KeeperError::Wire(path.to_owned(), error))?;
    let keeper = Keeper { stream: Mutex::new(Some(stream)), connections: AtomicU64::new(0) };
    Ok((Arc::new(keeper), sort(answer, fds)))
}

/// Starts a keeper that listens there, by the time that this returns.
fn start(path: &Path) -> io::Result<()> {
    let listener = bind(path)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(PROCESS).args(["keep", "--inherited", "--state"]).arg(path.parent().unwrap_or(path));
    // Not in our group, so that what a terminal sends us does not end it.
    command.process_group(0).stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map(drop)
}

/// Gives each port its descriptors; one that is not understood is left out.
fn sort(answer: Answer, mut fds: Fds) -> Vec<Kept> {
    let mut all = Vec::new();
    for kept in answer.ports {
        let Some(fds) = fds.split_first(kept.fds as usize) else { break };
        match serde_json::from_str(kept.record.get()) {
            Ok(record) => all.push(Kept { port: kept.port, path: kept.path, record, fds }),
            Err(error) => tracing::warn!(port = kept.port, "what the keeper has is not understood: {error}"),
        }
    }
    all
}

/// Sees to it that the keeper has what there is of one connection.
#[derive(Debug)]
pub struct Watch {
    keeper: Arc<Keeper>,
    port: String,
    path: PathBuf,
    stamp: Arc<Stamp>,
    /// Its number: later ones have higher ones.
    connection: u64,
    current: bool,
}

impl Watch {
    /// Begins; nothing is kept yet.
    pub fn new(keeper: Arc<Keeper>, port: &str, path: &Path, stamp: Arc<Stamp>) -> Self {
        let connection = keeper.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let mut watch = Self { keeper, port: port.to_owned(), path: path.to_owned(), stamp, connection, current: true };
        watch.changing();
        watch
    }

    /// The connection is about to change: what is kept is out of date from now on.
    pub fn changing(&mut self) {
        if self.current {
            self.current = false;
            if self.stamp.set_current(false).is_err() {
                self.forget();
            }
        }
    }

    /// Whether what is kept is what there is.
    pub fn is_current(&self) -> bool {
        self.current
    }

    /// This is what there is, until it changes again. If it cannot be kept, it is not tried again before that.
    pub fn update(&mut self, parcel: io::Result<Parcel>) {
        self.current = true;
        let Ok(parcel) = parcel else { return };
        let stamp = parcel.record.device.as_ref().and_then(|device| device.stamp);
        let (Some(stamp), Ok(record)) = (stamp, to_raw_value(&parcel.record)) else { return };
        let (port, path, connection) = (self.port.clone(), self.path.clone(), self.connection);
        let said = Said::Keep { port, path, stamp, connection, record };
        if self.keeper.say(&said, &parcel.fds) {
            // If this fails it stays out of date, which costs no more than a connection.
            let _ = self.stamp.set_current(true);
        }
    }

    /// Nothing is to be kept of this connection, nor of those before it.
    fn forget(&self) {
        let said = Said::Forget { port: self.port.clone(), connection: self.connection };
        self.keeper.say(&said, &Fds::default());
    }
}

impl Drop for Watch {
    /// The connection has ended, and must end for its frontend, too.
    fn drop(&mut self) {
        self.forget();
    }
}
