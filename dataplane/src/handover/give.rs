//! The old process's side.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::handover::VERSION;
use crate::handover::record::{Answer, Hello, Offer, PortRecord, PortStanding, Standing};
use crate::handover::wire::{self, Fds, GREETING, WireError};
use crate::switch::{Frozen, HandoverError, Packed, Stations, Switch, news};

/// For the new process to say what it wants.
const GREETING_LIMIT: Duration = Duration::from_secs(1);
/// For ports to finish the message they are at.
const PACK_LIMIT: Duration = Duration::from_secs(3);
/// For the new process to take the offer, and to prepare. Frames flow meanwhile; frontends wait for answers.
const PREPARE_LIMIT: Duration = Duration::from_secs(5);
/// For the new process to make its queues. Nothing flows meanwhile.
const READY_LIMIT: Duration = Duration::from_millis(500);
/// Attempts at a moment in which no frame is held for a migrating guest, and the pause between them.
const QUIET_ATTEMPTS: u32 = 50;
const QUIET_PAUSE: Duration = Duration::from_millis(20);

/// The sockets that a switch listens on.
#[derive(Debug)]
pub struct Listeners {
    /// Control.
    pub control: OwnedFd,
    /// Metrics.
    pub metrics: Option<OwnedFd>,
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub enum GiveError {
    /// The switch refuses.
    #[error(transparent)]
    Switch(#[from] HandoverError),
    /// The new process failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The new process has another format.
    #[error("the new process hands over by version {0} of the format, this one by version {VERSION}")]
    Version(u32),
    /// What was to be sent could not be collected.
    #[error("cannot collect what there is: {0}")]
    Io(#[from] std::io::Error),
}

/// Hands the switch over to the process at the other end of `stream`. When this returns `Ok` it is the other's: nothing
/// may be touched any more, and this process has to exit at once, without any clean-up. If it fails, all goes on as before.
///
/// No port may be added or removed meanwhile.
///
/// # Errors
/// [`GiveError`]; the other process was told, if it still listens.
pub fn give(
    stream: &UnixStream,
    switch: &Switch,
    state: (&Path, &impl AsFd),
    listeners: &Listeners,
) -> Result<(), GiveError> {
    let result = try_give(stream, switch, state, listeners);
    if let Err(error) = &result {
        // In whatever state the other process is: it fails or it reads this.
        let _ = wire::send(stream, &Answer::Refused(error.to_string()), &Fds::default(), GREETING_LIMIT);
    }
    result
}

fn try_give(
    stream: &UnixStream,
    switch: &Switch,
    state: (&Path, &impl AsFd),
    listeners: &Listeners,
) -> Result<(), GiveError> {
    greet(stream)?;
    let mut ports = switch.pack(Instant::now() + PACK_LIMIT)?;
    let known = switch.stations(&ports);
    let (offer, fds) = offer(&known, state, listeners, &mut ports)?;
    wire::send(stream, &Answer::Offer(offer), &fds, PREPARE_LIMIT)?;
    drop(fds);
    expect(stream, "prepared", PREPARE_LIMIT)?;
    let since = SystemTime::now();
    let frozen = quiet(switch)?;
    wire::send(stream, &standing(switch, &ports, &known, since), &Fds::default(), READY_LIMIT)?;
    expect(stream, "ready", READY_LIMIT)?;
    wire::send(stream, &"go", &Fds::default(), READY_LIMIT)?;
    // From here on the ports are the other's. Neither may go on here.
    std::mem::forget((frozen, ports));
    Ok(())
}

/// Reads what a new process says first.
fn greet(mut stream: &UnixStream) -> Result<(), GiveError> {
    let mut greeting = [0; GREETING.len()];
    let limit = stream.set_read_timeout(Some(GREETING_LIMIT));
    limit.and_then(|()| stream.read_exact(&mut greeting))?;
    if greeting != GREETING {
        return Err(WireError::Invalid("no greeting".into()).into());
    }
    let (Hello { version }, _) = wire::receive(stream, GREETING_LIMIT)?;
    if version == VERSION { Ok(()) } else { Err(GiveError::Version(version)) }
}

fn expect(stream: &UnixStream, word: &str, limit: Duration) -> Result<(), WireError> {
    let (said, _) = wire::receive::<String>(stream, limit)?;
    if said == word { Ok(()) } else { Err(WireError::Invalid(format!("{said:?} instead of {word:?}"))) }
}

/// Writes everything down but where the rings stand.
fn offer(
    stations: &Stations,
    (dir, lock): (&Path, &impl AsFd),
    listeners: &Listeners,
    ports: &mut [Packed],
) -> std::io::Result<(Offer, Fds)> {
    let mut fds = Fds::default();
    let mut offer = Offer {
        pid: std::process::id(),
        state_dir: dir.to_string_lossy().into_owned(),
        state_lock: fds.put(lock.as_fd())?,
        control: fds.put(listeners.control.as_fd())?,
        metrics: listeners.metrics.as_ref().map(|metrics| fds.put(metrics.as_fd())).transpose()?,
        networks: stations.networks.clone(),
        fdb: stations.entries.clone(),
        ..Offer::default()
    };
    offer.fds = fds.len() as u32;
    for port in ports {
        let (spec, count) = (port.config.to_string(), port.fds.len() as u32);
        let kind = std::mem::replace(&mut port.kind, super::record::KindRecord::Anew);
        offer.ports.push(PortRecord { spec, fds: count, kind });
        fds.append(std::mem::take(&mut port.fds));
    }
    Ok((offer, fds))
}

/// Stops the workers at a moment at which nothing is held for a guest that migrates.
fn quiet(switch: &Switch) -> Result<Frozen<'_>, HandoverError> {
    for _ in 1..QUIET_ATTEMPTS {
        match switch.freeze() {
            Err(HandoverError::Migrating(_)) => std::thread::sleep(QUIET_PAUSE),
            other => return other,
        }
    }
    switch.freeze()
}

/// Where everything stands, with the workers stopped.
fn standing(switch: &Switch, ports: &[Packed], known: &Stations, since: SystemTime) -> Standing {
    let of_port = |port: &Packed| PortStanding {
        bases: port.standing.iter().map(|ring| ring.base()).collect(),
        stats: port.stats.export(),
    };
    // To look at all of them takes a while; mostly nothing has changed.
    let unchanged = switch.station_changes() == known.changes;
    let fdb = if unchanged { Vec::new() } else { news(&known.entries, switch.stations(ports).entries) };
    let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
    Standing {
        since_ns: u64::try_from(since.as_nanos()).unwrap_or_default(),
        ports: ports.iter().map(of_port).collect(),
        fdb,
        removed: switch.removed_totals(),
    }
}
