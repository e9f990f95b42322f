//! The new process's side.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::config::{PortConfig, PortTarget};
use crate::handover::record::{Answer, Hello, KindRecord, Offer, Standing};
use crate::handover::wire::{self, Fds, GREETING, WireError};
use crate::handover::{FdbRecord, VERSION};
use crate::switch::{self, HandoverError, PortError, Switch, Taken};

/// For the old process to answer: longer than it waits for its own ports and a migrating guest.
const ANSWER_LIMIT: Duration = Duration::from_secs(6);
/// For the old process to be gone after it said so.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// For the kernel to let go of what the old process had, and the pause between attempts.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);
const RELEASE_PAUSE: Duration = Duration::from_millis(20);

/// Why nothing was taken over. The old process goes on.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The control socket cannot be connected to.
    #[error("cannot connect to control socket {0}: {1}")]
    Connect(PathBuf, std::io::Error),
    /// Somebody else listens there.
    #[error("the process at control socket {0} is neither this user's nor root's")]
    Stranger(PathBuf),
    /// The old process refuses.
    #[error("the running switch does not hand over: {0}")]
    Refused(String),
    /// It fell silent, or is not understood. An older one hangs up.
    #[error("{0}; if the running switch knows no takeover, stop it first")]
    Wire(#[from] WireError),
    /// It keeps its ports elsewhere.
    #[error("the running switch keeps its ports in {0}, not in {1}; say so with --state")]
    State(PathBuf, PathBuf),
    /// A port cannot go on.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A port cannot go on.
    #[error(transparent)]
    Switch(#[from] HandoverError),
}

/// A port of the old process.
struct Old {
    config: PortConfig,
    taken: Option<Taken>,
    /// The port that goes on with it.
    heir: Option<String>,
}

impl Old {
    /// Whether it is that port, whatever its other settings are. An interface can have one port only, so it is known by that,
    /// not by its name.
    fn is(&self, config: &PortConfig) -> bool {
        let (old, new) = (&self.config.target, &config.target);
        match new {
            PortTarget::VhostUser { .. } => self.config.name == config.name && old == new,
            _ => old.kind() == new.kind() && old.collides(new),
        }
    }
}

/// A takeover under way. Up to [`Takeover::commit`] the old process can go on.
pub struct Takeover {
    stream: UnixStream,
    offer: Offer,
    fds: Fds,
    ports: Vec<Old>,
    standing: Standing,
}

impl Takeover {
    /// Asks the switch at a control socket for all that it has. `None` if there is none.
    ///
    /// # Errors
    /// [`TakeError`].
    pub fn ask(control: &Path, state_dir: &Path) -> Result<Option<Self>, TakeError> {
        let mut stream = match UnixStream::connect(control) {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(TakeError::Connect(control.into(), error)),
        };
        // Whoever it is gets to see the frames of every guest, or already does.
        match wire::peer_uid(&stream) {
            Ok(uid) if uid == 0 || uid == wire::own_uid() => {}
            _ => return Err(TakeError::Stranger(control.into())),
        }
        stream.write_all(&GREETING).map_err(|error| TakeError::Connect(control.into(), error))?;
        wire::send(&stream, &Hello { version: VERSION }, &Fds::default(), ANSWER_LIMIT)?;
        let (answer, mut fds) = wire::receive(&stream, ANSWER_LIMIT)?;
        let offer: Offer = match answer {
            Answer::Offer(offer) => offer,
            Answer::Refused(why) => return Err(TakeError::Refused(why)),
        };
        if Path::new(&offer.state_dir) != state_dir {
            return Err(TakeError::State(offer.state_dir.into(), state_dir.into()));
        }
        let (offer, ports) = sort(offer, &mut fds)?;
        Ok(Some(Self { stream, offer, fds, ports, standing: Standing::default() }))
    }

    /// The old process.
    pub fn pid(&self) -> u32 {
        self.offer.pid
    }

    /// Its control socket's listener.
    pub fn control(&mut self) -> Option<OwnedFd> {
        self.fds.take(self.offer.control)
    }

    /// Its metrics listener.
    pub fn metrics(&mut self) -> Option<OwnedFd> {
        self.fds.take(self.offer.metrics?)
    }

    /// The lock of the state directory, which is held as long as either process has this.
    pub fn state_lock(&mut self) -> Option<OwnedFd> {
        self.fds.take(self.offer.state_lock)
    }

    /// Puts a port together from what the old process has of it, if it has one that can be. Its other settings are those
    /// given.
    ///
    /// # Errors
    /// [`TakeError::Port`].
    pub fn adopt(&mut self, switch: &Switch, config: &PortConfig) -> Result<(), TakeError> {
        let Some(old) = self.ports.iter_mut().find(|old| old.is(config)) else { return Ok(()) };
        let Some(taken) = old.taken.take() else { return Ok(()) };
        match switch.adopt_port(config.clone(), taken) {
            Ok(()) => old.heir = Some(config.name.clone()),
            // No frontend may keep a new process from taking over, so its port begins anew.
            Err(PortError::Withdrawn(problem)) => {
                tracing::warn!(port = config.name, "cannot be taken over, and begins anew: {problem}");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The ports of the old process, as it had them.
    pub fn ports(&self) -> impl Iterator<Item = &PortConfig> {
        self.ports.iter().map(|old| &old.config)
    }

    /// Whether the old process has this port, whatever its other settings are.
    pub fn has(&self, config: &PortConfig) -> bool {
        self.ports.iter().any(|old| old.is(config))
    }

    /// Has the old process stop, and takes its ports over. When this returns it is exiting and `switch` forwards.
    /// Returns the nanoseconds for which nothing was forwarded.
    ///
    /// # Errors
    /// [`TakeError`]; the old process goes on then.
    pub fn commit(&mut self, switch: &Switch) -> Result<Duration, TakeError> {
        // All that can be done while the old one forwards.
        switch.restore_stations(&self.networks(), &self.names(), &self.offer.fdb, true);
        self.say("prepared")?;
        self.standing = self.hear()?;
        if self.standing.ports.len() != self.ports.len() {
            return Err(WireError::Invalid("the number of ports has changed".into()).into());
        }
        for (old, standing) in self.ports.iter_mut().zip(&self.standing.ports) {
            if let Some(name) = &old.heir
                && !switch.adopted_go_on(name, &standing.bases, &standing.stats)?
            {
                let _ = switch.remove_port(name);
                old.heir = None;
            }
        }
        switch.restore_stations(&self.networks(), &self.names(), &self.standing.fdb, true);
        switch.forget_absent_stations();
        switch.restore_totals(&self.standing.removed);
        self.say("ready")?;
        let go: String = self.hear()?;
        if go != "go" {
            return Err(WireError::Invalid(go).into());
        }
        switch.thaw();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        switch.start_adopted();
        // What nobody goes on with is not to be in the way of who makes it anew.
        for old in &mut self.ports {
            if let Some(taken) = old.taken.take() {
                switch.discard(&old.config, taken);
            }
        }
        Ok(now.saturating_sub(Duration::from_nanos(self.standing.since_ns)))
    }

    /// After [`Takeover::commit`], and when the old process is gone: adds a port that it had in a form that cannot be handed
    /// over, or did not have.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn add_rest(&mut self, switch: &Switch, config: &PortConfig) -> Result<(), PortError> {
        let place = self.ports.iter().position(|old| old.is(config));
        let standing = place.and_then(|place| self.standing.ports.get(place));
        let counts = standing.map(|standing| standing.stats.clone()).unwrap_or_default();
        let end = Instant::now() + RELEASE_LIMIT;
        // As whatever kind of port the old process had it.
        let was_there = || self.ports.iter().any(|old| old.config.target.collides(&config.target));
        let was_held = !matches!(config.target, PortTarget::VhostUser { .. }) && was_there();
        loop {
            match switch.add_port_again(config.clone(), &counts) {
                // The kernel lets go of an interface a moment after the process that had it.
                Err(PortError::Setup(_)) if was_held && Instant::now() < end => std::thread::sleep(RELEASE_PAUSE),
                Ok(()) => break,
                Err(error) => return Err(error),
            }
        }
        let Some((place, old)) = place.and_then(|place| Some((place, self.ports.get_mut(place)?))) else {
            return Ok(());
        };
        old.heir = Some(config.name.clone());
        // The port's own, and those of networks that could not be carried before. Others know better by now.
        let domain = switch::shared_domain(&old.config.name);
        let shared = self.offer.networks.iter().position(|name| *name == domain);
        let of_port = |entry: &&FdbRecord| usize::from(entry.3) == place || Some(usize::from(entry.2)) == shared;
        let told = self.offer.fdb.iter().chain(&self.standing.fdb).filter(of_port);
        let last: BTreeMap<_, _> = told.map(|entry| ((entry.0, entry.1, entry.2), *entry)).collect();
        let stations: Vec<_> = last.into_values().collect();
        switch.restore_stations(&self.networks(), &self.names(), &stations, false);
        Ok(())
    }

    /// After all ports were added: counts those that nobody goes on with as removed.
    pub fn count_rest(&self, switch: &Switch) {
        let gone = self.ports.iter().zip(&self.standing.ports).filter(|(old, _)| old.heir.is_none());
        gone.for_each(|(_, standing)| switch.count_removed(&standing.stats));
    }

    /// Waits until the old process is gone, with all that it had open.
    pub fn wait_gone(&self) {
        let limit = self.stream.set_read_timeout(Some(EXIT_LIMIT));
        let gone = limit.and_then(|()| std::io::Read::read(&mut &self.stream, &mut [0]));
        if !matches!(gone, Ok(0)) {
            tracing::warn!(pid = self.offer.pid, "the old process does not exit");
        }
    }

    /// What the old process's ports are called here. No port is called nothing.
    fn names(&self) -> Vec<String> {
        self.ports.iter().map(|old| old.heir.clone().unwrap_or_default()).collect()
    }

    /// What the old process's networks are called here. What those share that a port carries is called after the port, and
    /// is no more if nobody goes on with that.
    fn networks(&self) -> Vec<String> {
        let heirs: BTreeMap<_, _> =
            self.ports.iter().map(|old| (old.config.name.as_str(), old.heir.as_deref())).collect();
        let here = |network: &String| match switch::carrier_of(network) {
            Some(carrier) => heirs.get(carrier).copied().flatten().map(switch::shared_domain).unwrap_or_default(),
            None => network.clone(),
        };
        self.offer.networks.iter().map(here).collect()
    }

    fn say(&self, word: &str) -> Result<(), WireError> {
        wire::send(&self.stream, &word, &Fds::default(), ANSWER_LIMIT)
    }

    /// Receives a record, or why there is none.
    fn hear<T: serde::de::DeserializeOwned>(&self) -> Result<T, TakeError> {
        let (value, _) = wire::receive::<serde_json::Value>(&self.stream, ANSWER_LIMIT)?;
        if let Some(why) = value.get("Refused").and_then(serde_json::Value::as_str) {
            return Err(TakeError::Refused(why.into()));
        }
        serde_json::from_value(value).map_err(|error| WireError::Invalid(error.to_string()).into())
    }
}

/// Gives each port its descriptors.
fn sort(mut offer: Offer, fds: &mut Fds) -> Result<(Offer, Vec<Old>), WireError> {
    let invalid = |what: String| WireError::Invalid(what);
    let too_few = || invalid("there are fewer descriptors than were announced".into());
    let own = fds.split_first(offer.fds as usize).ok_or_else(too_few)?;
    let mut rest = std::mem::replace(fds, own);
    let mut ports = Vec::new();
    for port in std::mem::take(&mut offer.ports) {
        let config: PortConfig = port.spec.parse().map_err(|error| invalid(format!("port {}: {error}", port.spec)))?;
        let fds = rest.split_first(port.fds as usize).ok_or_else(too_few)?;
        let taken = match port.kind {
            KindRecord::Anew => None,
            kind => Some(Taken { kind, fds }),
        };
        ports.push(Old { config, taken, heir: None });
    }
    Ok((offer, ports))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SwitchConfig;
    use crate::handover::StatsRecord;
    use crate::handover::record::PortStanding;

    /// What an old process with these ports says, each with the port here that goes on with it.
    fn takeover(ports: &[(&str, Option<&str>)], networks: &[&str], fdb: &[FdbRecord]) -> Takeover {
        let old = |(spec, heir): &(&str, Option<&str>)| Old {
            config: spec.parse().unwrap(),
            taken: None,
            heir: heir.map(str::to_owned),
        };
        let networks = networks.iter().map(|network| (*network).to_owned()).collect();
        Takeover {
            stream: UnixStream::pair().unwrap().0,
            offer: Offer { networks, fdb: fdb.to_vec(), ..Offer::default() },
            fds: Fds::default(),
            ports: ports.iter().map(old).collect(),
            standing: Standing::default(),
        }
    }

    #[test]
    fn what_is_carried_is_called_after_what_goes_on_with_its_carrier() {
        let ports = [
            ("up1=tap:t1,networks=blue:100", Some("up2")),
            ("up2=tap:t2,networks=red:100", Some("up1")),
            ("gone=tap:t3,networks=green:7", None),
            ("b=tap:t4,network=blue", Some("other")),
        ];
        let takeover = takeover(&ports, &["b", "=up1", "=up2", "=gone", "=removed"], &[]);
        assert_eq!(takeover.networks(), ["b", "=up2", "=up1", "", ""]);
    }

    /// One station behind the carrier, and one behind a port that it carries the network of.
    #[test]
    fn stations_follow_a_carrier_and_do_not_outlive_it() {
        const UP: &str = "up=vhost-user:/nonexistent/up,networks=blue:100";
        const B: &str = "b=vhost-user:/nonexistent/b,network=blue";
        let stations = [FdbRecord(1, 100, 1, 0, 0, false), FdbRecord(2, 100, 1, 1, 0, false)];
        let renamed = UP.replacen("up", "uplink", 1);
        let another = UP.replacen("/up", "/another", 1);
        let both = |name: &str| vec![("blue".to_owned(), name.to_owned()), ("blue".to_owned(), "b".to_owned())];
        let cases: [(&[&str], Option<&str>, _); 4] = [
            (&[UP, B], Some("up"), both("up")),
            (&[&renamed, B], Some("uplink"), both("uplink")),
            (&[B], None, vec![]),
            // Another port of the name.
            (&[&another, B], None, vec![]),
        ];
        for (specs, heir, expected) in cases {
            let switch = Switch::start(&SwitchConfig::default()).unwrap();
            specs.iter().for_each(|spec| switch.add_port(spec.parse().unwrap()).unwrap());
            let takeover = takeover(&[(UP, heir), (B, Some("b"))], &["blue", "=up"], &stations);
            switch.restore_stations(&takeover.networks(), &takeover.names(), &takeover.offer.fdb, true);
            let found: Vec<_> = switch.fdb().into_iter().map(|entry| (entry.network, entry.port)).collect();
            assert_eq!(found, expected, "{specs:?}");
            switch.stop();
        }
    }

    /// What is tried again, or of a port that nobody goes on with, is counted once.
    #[test]
    fn counts_of_ports_that_do_not_go_on_are_counted_once() {
        let config = SwitchConfig { kinds: Some(vec!["vhost-user".into()]), ..SwitchConfig::default() };
        let switch = Switch::start(&config).unwrap();
        let mut takeover = takeover(&[("t=tap:t0", None), ("gone=tap:t1", None)], &[], &[]);
        let of = |frames| StatsRecord { rx: vec![(0, frames, 60, 0)], ..StatsRecord::default() };
        takeover.standing.ports =
            [5, 7].map(|frames| PortStanding { stats: of(frames), ..PortStanding::default() }).into();
        assert!(takeover.add_rest(&switch, &"t=tap:t0".parse().unwrap()).is_err());
        assert_eq!(switch.totals().rx_frames, 0);
        takeover.count_rest(&switch);
        assert_eq!(switch.totals().rx_frames, 12);
        switch.stop();
    }
}
