//! The control plane: what changes a running switch, and what tells about it. Never on a worker.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::config::{InvalidPort, MissingFolder, Pin, PortConfig, PortQueue, WorkerMode};
use crate::handover::{GiveError, Listeners, give};
use crate::status::PortStatus;
use crate::switch::{PortError, Switch};
use crate::sync::lock;
use gone::Note;

mod convert;
mod gone;
mod metrics;
mod server;
mod socket;
mod start;
mod state;

pub use convert::port_to_proto;
pub use server::{ServerHandle, serve};
pub use socket::{ControlSocket, SocketError};
pub use state::{StateError, StateStore};

/// Why a change was refused. Nothing is left behind then.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A rule of the configuration is broken.
    #[error("port {name}: {source}")]
    Invalid {
        /// The port.
        name: String,
        /// The rule.
        source: InvalidPort,
    },
    /// The folder of the socket is missing.
    #[error(transparent)]
    Folder(#[from] MissingFolder),
    /// The switch refused.
    #[error("{source}{}", hint(source))]
    Port {
        /// Why.
        #[from]
        source: PortError,
    },
    /// The port is somebody else's.
    #[error("port {name} belongs to {}, not to {wanted}; nothing was removed", owner.as_deref().unwrap_or("nobody"))]
    OtherOwner {
        /// The port.
        name: String,
        /// Whose it is.
        owner: Option<String>,
        /// Whose it was said to be.
        wanted: String,
    },
    /// The change could not be written down.
    #[error(transparent)]
    State(#[from] StateError),
    /// Who asked for the port has gone.
    #[error("the caller did not wait for the port; nothing was added")]
    GivenUp,
}

/// What to do about a refusal of the switch.
fn hint(error: &PortError) -> String {
    match error {
        PortError::Exists(name) => format!("; choose another name, or remove it with 'sluice port del {name}'"),
        PortError::NotFound(_) => "; see 'sluice port list'".into(),
        PortError::TargetInUse { port, .. } => format!("; remove that with 'sluice port del {port}' first"),
        PortError::Limit { .. } => "; remove some first".into(),
        PortError::Captured(_) => "; end that first".into(),
        PortError::NoWorker { .. } | PortError::NotPinned(_) => "; see 'sluice worker list'".into(),
        PortError::Setup(_) | PortError::Withdrawn(_) | PortError::Networks(_) => String::new(),
    }
}

/// The pins written down, but for those of a queue, or of a whole port.
fn without_pins(store: &StateStore, queue: &PortQueue) -> Vec<Pin> {
    let other = |pin: &&Pin| pin.queue != *queue && !(queue.queue.is_none() && pin.queue.port == queue.port);
    store.pins().iter().filter(other).cloned().collect()
}

/// Writes pins down where there is nothing to be taken back if that fails.
fn keep_pins(store: &mut StateStore, pins: Vec<Pin>) {
    if let Err(error) = store.replace_pins(pins) {
        tracing::warn!("{error}");
    }
}

/// What does not change while the switch runs.
#[derive(Debug, Clone)]
pub struct About {
    /// How workers wait.
    pub mode: WorkerMode,
    /// The control socket.
    pub control: PathBuf,
    /// The state directory.
    pub state_dir: PathBuf,
}

/// The switch together with what is kept about it on disk. Servers share it.
#[derive(Debug)]
pub struct Controller {
    switch: Arc<Switch>,
    /// Held for the whole of a change, so that changes come one after the other.
    store: Mutex<StateStore>,
    about: About,
    started: Instant,
    ready: AtomicBool,
}

impl Controller {
    /// A controller of `switch` that keeps its ports in `store`.
    pub fn new(switch: Arc<Switch>, store: StateStore, about: About) -> Arc<Self> {
        Arc::new(Self {
            switch,
            store: Mutex::new(store),
            about,
            started: Instant::now(),
            ready: AtomicBool::new(false),
        })
    }

    /// The switch.
    pub fn switch(&self) -> &Switch {
        &self.switch
    }

    /// What does not change.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Time since start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether all ports were brought up and the switch is not stopping.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Says whether the switch is ready.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Has one worker serve a queue, or all of a port, and writes that down: both or neither.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn pin(&self, pin: Pin) -> Result<(), ControlError> {
        let mut store = self.lock();
        let old = store.pins().to_vec();
        let mut pins = old.clone();
        pins.retain(|other| other.queue != pin.queue);
        pins.push(pin.clone());
        // First what can be refused and taken back.
        store.replace_pins(pins)?;
        if let Err(error) = self.switch.pin(&pin) {
            keep_pins(&mut store, old);
            return Err(error.into());
        }
        tracing::info!("{} pinned to worker {}", pin.queue, pin.worker);
        Ok(())
    }

    /// Takes that back, without a queue all of the port's.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn unpin(&self, queue: &PortQueue) -> Result<(), ControlError> {
        let mut store = self.lock();
        let old = store.pins().to_vec();
        let pins = without_pins(&store, queue);
        store.replace_pins(pins)?;
        if let Err(error) = self.switch.unpin(queue) {
            keep_pins(&mut store, old);
            return Err(error.into());
        }
        tracing::info!("{queue} is no longer pinned");
        Ok(())
    }

    /// Adds a port and writes it down: both or neither. An owner that repeats itself changes nothing, and with
    /// `replace_owner` the port takes the place of one that has another owner.
    ///
    /// Who asks may have given up by the time that it is done, as with a disk that hangs: if it `is_wanted` no more, all is as it
    /// was before.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn add_port(
        &self,
        port: PortConfig,
        replace_owner: bool,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Option<PortStatus>, ControlError> {
        port.validate().map_err(|source| ControlError::Invalid { name: port.name.clone(), source })?;
        port.check_folder()?;
        let name = port.name.clone();
        let mut store = self.lock();
        if !is_wanted() {
            return Err(ControlError::GivenUp);
        }
        // What was noted before is about the port of before.
        for note in Note::read(&self.about.control).iter().filter(|note| note.is_about(&port)) {
            note.take();
        }
        let mut replaced = self.switch.port_config(&name).filter(|old| old.owner.is_some());
        if replaced.as_ref() == Some(&port) {
            return Ok(self.switch.port(&name));
        }
        if replaced.as_ref().is_some_and(|old| !replace_owner || old.owner == port.owner) {
            replaced = None;
        }
        if replaced.is_some() {
            self.switch.remove_port(&name)?;
        }
        let before = store.before();
        if let Err(error) = self.add_and_keep(&mut store, port) {
            self.put_back(replaced);
            return Err(error);
        }
        if !is_wanted() {
            store.put_back(before)?;
            let removed = self.switch.remove_port(&name);
            self.put_back(replaced);
            removed?;
            tracing::info!(port = name, "taken back, since the caller did not wait for it");
            return Err(ControlError::GivenUp);
        }
        if replaced.is_some() {
            // They were for the port that has gone.
            self.forget_pins(&mut store, &name);
        }
        match replaced.and_then(|old| old.owner) {
            Some(old) => tracing::info!(port = name, "added in place of that of {old}"),
            None => tracing::info!(port = name, "added"),
        }
        Ok(self.switch.port(&name))
    }

    fn add_and_keep(&self, store: &mut StateStore, port: PortConfig) -> Result<(), ControlError> {
        let mut ports = store.without(&port.name);
        ports.push(port.clone());
        let name = port.name.clone();
        self.switch.add_port(port)?;
        if let Err(error) = store.replace(ports) {
            // Nobody else removes it meanwhile, since the store is locked.
            let _ = self.switch.remove_port(&name);
            return Err(error.into());
        }
        Ok(())
    }

    /// Adds a port again that was to make way for another, which did not come to be. It is still written down if it was.
    fn put_back(&self, replaced: Option<PortConfig>) {
        let Some(old) = replaced else { return };
        let name = old.name.clone();
        if let Err(error) = self.switch.add_port(old) {
            tracing::error!(port = name, "cannot be put back, remove and add it: {error}");
        }
    }

    /// Removes a port, if it is that of `owner` where one is given; first from what is written down: if that fails,
    /// nothing has changed.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn remove_port(&self, name: &str, owner: Option<&str>) -> Result<(), ControlError> {
        self.remove_kept(&mut self.lock(), name, owner)
    }

    fn remove_kept(&self, store: &mut StateStore, name: &str, owner: Option<&str>) -> Result<(), ControlError> {
        // One that could not be restored is only in the store.
        let stored = store.ports().iter().find(|port| port.name == name).cloned();
        if let (Some(wanted), Some(port)) = (owner, self.switch.port_config(name).or(stored))
            && port.owner.as_deref() != Some(wanted)
        {
            return Err(ControlError::OtherOwner { name: name.into(), owner: port.owner, wanted: wanted.into() });
        }
        let kept = store.remove(name, owner)?;
        self.remove_running(store, name, kept)
    }

    /// Removes a port that is not written down any more; `kept` says that it was, and need not be running.
    fn remove_running(&self, store: &mut StateStore, name: &str, kept: bool) -> Result<(), ControlError> {
        match self.switch.remove_port(name) {
            Err(PortError::NotFound(_)) if kept => {}
            result => drop(result?),
        }
        self.forget_pins(store, name);
        tracing::info!(port = name, "removed");
        Ok(())
    }

    fn forget_pins(&self, store: &mut StateStore, port: &str) {
        let all = PortQueue { port: port.into(), queue: None };
        if self.switch.unpin(&all).is_ok() {
            let pins = without_pins(store, &all);
            keep_pins(store, pins);
        }
    }

    /// Hands everything over to another process. If this succeeds, ours has to exit at once without any clean-up.
    ///
    /// # Errors
    /// [`GiveError`]; all goes on as before.
    pub(crate) fn hand_over(&self, stream: &UnixStream, listeners: &Listeners) -> Result<(), GiveError> {
        let store = self.lock();
        let result = give(stream, &self.switch, store.place(), listeners);
        if result.is_ok() {
            // No change may begin in what is left of our life.
            std::mem::forget(store);
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, StateStore> {
        lock(&self.store)
    }
}
