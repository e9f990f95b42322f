//! The start: ports of the configuration file, of the command line and of the last run come up, or go on from a process
//! before this one.

use std::collections::BTreeSet;

use crate::config::{Pin, PortConfig, PortTarget};
use crate::control::gone::Note;
use crate::control::{ControlError, Controller, StateStore, keep_pins};
use crate::handover::{TakeError, Takeover};
use crate::keeper::Kept;
use crate::switch::PortError;

impl Controller {
    /// Adds the ports of the file and of the command line, then those of the last run. A name that is given now beats
    /// one of the last run. Ports of the file are not kept in the state, so that they go when they leave the file.
    /// Connections that were kept over a crash go on. Returns the names of their ports.
    ///
    /// # Errors
    /// If a given port is refused, or one of the command line cannot be written down. The caller then stops the switch.
    pub fn bring_up(
        &self,
        file: &[PortConfig],
        arguments: &[PortConfig],
        mut kept: Vec<Kept>,
    ) -> Result<Vec<String>, ControlError> {
        let mut resumed = Vec::new();
        let mut add = |port: &PortConfig| {
            if !self.resume(port, &mut kept) {
                return self.switch.add_port(port.clone());
            }
            resumed.push(port.name.clone());
            Ok(())
        };
        let mut store = self.lock();
        let before = store.ports().len();
        for note in Note::read(&self.about.control) {
            if let Err(error) = note.follow(&mut store) {
                tracing::warn!("ports of an owner that is gone stay for now: {error}");
            }
        }
        let gone = before - store.ports().len();
        if gone > 0 {
            tracing::info!(ports = gone, "removed, since their owners went while no switch was there to be told");
        }
        let pins = self.restore_pins(&store, file, arguments);
        keep_pins(&mut store, pins);
        let given = || file.iter().chain(arguments);
        for port in given() {
            add(port)?;
        }
        let mut keep = Vec::new();
        for port in store.ports().iter().filter(|port| given().all(|other| other.name != port.name)) {
            match add(port) {
                Ok(()) => keep.push(port.clone()),
                Err(error @ PortError::TargetInUse { .. }) => {
                    tracing::warn!(port = port.name, "forgotten, since {error}");
                }
                // The host may be ready for it next time.
                Err(error) => {
                    tracing::error!(port = port.name, "not restored, and tried again at the next start only: {error}");
                    keep.push(port.clone());
                }
            }
        }
        kept.into_iter().for_each(Kept::let_go);
        keep.extend_from_slice(arguments);
        let are_stored = arguments.iter().all(|port| store.ports().contains(port));
        match store.replace(keep) {
            // What is lost is tidiness, which is no reason not to start.
            Err(error) if are_stored => tracing::warn!("{error}"),
            result => result?,
        }
        Ok(resumed)
    }

    /// Goes on with a port's connection if it was kept. Otherwise, or if it cannot be, the port is to connect anew.
    fn resume(&self, port: &PortConfig, kept: &mut Vec<Kept>) -> bool {
        let PortTarget::VhostUser { path, .. } = &port.target else { return false };
        let Some(place) = kept.iter().position(|kept| kept.port == port.name && kept.path == *path) else {
            return false;
        };
        match self.switch.resume_port(port.clone(), kept.swap_remove(place)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(port = port.name, "its connection was kept, but cannot go on: {error}");
                false
            }
        }
    }

    /// Gives the switch the pins of the last run, and returns them, those of ports that are gone left out. Before ports are
    /// added.
    fn restore_pins(&self, store: &StateStore, file: &[PortConfig], arguments: &[PortConfig]) -> Vec<Pin> {
        let known: BTreeSet<&str> =
            file.iter().chain(arguments).map(|port| port.name.as_str()).chain(store.names()).collect();
        let pins: Vec<Pin> = store.pins().iter().filter(|pin| known.contains(&*pin.queue.port)).cloned().collect();
        for pin in self.switch.restore_pins(&pins) {
            tracing::warn!("{} is pinned to worker {}, which this run does not have", pin.queue, pin.worker);
        }
        pins
    }

    /// As [`Controller::bring_up`] for the ports that another process hands over, which nothing is done with yet.
    ///
    /// # Errors
    /// [`TakeError`].
    pub fn adopt(
        &self,
        takeover: &mut Takeover,
        file: &[PortConfig],
        arguments: &[PortConfig],
    ) -> Result<(), TakeError> {
        let store = self.lock();
        // Nothing is written: the old process may yet go on.
        self.restore_pins(&store, file, arguments);
        let ports: Vec<_> = wanted(&store, file, arguments).collect();
        // Otherwise one of two that do not go together would be lost, and only be missed later. One that is only written down
        // was lost before.
        let given = || file.iter().chain(arguments);
        let goes_on = |port: &&&PortConfig| given().any(|given| given == **port) || takeover.has(port);
        let going_on: Vec<_> = ports.iter().filter(goes_on).collect();
        for (place, port) in going_on.iter().enumerate() {
            if let Some(problem) = going_on[..place].iter().find_map(|other| port.network_conflict(other)) {
                return Err(PortError::Networks(problem).into());
            }
        }
        ports.into_iter().try_for_each(|port| takeover.adopt(&self.switch, port))
    }

    /// Adds the ports that could not be adopted, tells of those that nobody goes on with, and writes all down. The old process
    /// is gone, so nothing here can fail but for a single port.
    pub fn complete(&self, takeover: &mut Takeover, file: &[PortConfig], arguments: &[PortConfig]) {
        let mut store = self.lock();
        for port in wanted(&store, file, arguments).filter(|port| self.switch.port_config(&port.name).is_none()) {
            if let Err(error) = takeover.add_rest(&self.switch, port) {
                tracing::error!(port = port.name, "not taken over: {error}");
            }
        }
        takeover.count_rest(&self.switch);
        for old in takeover.ports().filter(|old| !wanted(&store, file, arguments).any(|port| gives_way(old, port))) {
            tracing::warn!(
                port = old.name,
                "gone, since this process was not given it: if --config was forgotten, take over again with it; otherwise \
                 'sluice port add {old}' brings it back"
            );
        }
        let keep = left(&store, file, arguments).chain(arguments).cloned().collect();
        let written = store.replace(keep).map_err(|error| error.to_string());
        if let Err(error) = written.and_then(|()| store.sign().map_err(|error| error.to_string())) {
            tracing::error!("the ports that were taken over may not be found again after a restart: {error}");
        }
    }
}

/// The ports of the file, of the command line, and of the last run but for those that are given anew.
fn wanted<'p>(
    store: &'p StateStore,
    file: &'p [PortConfig],
    arguments: &'p [PortConfig],
) -> impl Iterator<Item = &'p PortConfig> {
    file.iter().chain(arguments).chain(left(store, file, arguments))
}

/// The ports of the last run but for those that are given anew, or whose target is.
fn left<'p>(
    store: &'p StateStore,
    file: &'p [PortConfig],
    arguments: &'p [PortConfig],
) -> impl Iterator<Item = &'p PortConfig> {
    store.ports().iter().filter(move |port| !file.iter().chain(arguments).any(|given| gives_way(port, given)))
}

/// Whether a given port takes the place of another: it has its name, or its target.
fn gives_way(port: &PortConfig, given: &PortConfig) -> bool {
    given.name == port.name || given.target.collides(&port.target)
}
