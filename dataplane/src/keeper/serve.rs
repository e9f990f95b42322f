//! The keeper's side: one thread, which waits, and one for each connection that is let go of.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::value::RawValue;

use super::{Answer, GRACE, KeptRecord, LIMIT, Said, Stamp};
use crate::handover::{Fds, WireError, wire};
use crate::limits::MAX_PORTS;
use crate::sync::close_apart;

/// Switches that are connected at once: the old and the new one, and some that fail.
const MAX_SWITCHES: usize = 8;

/// Listens there. Removes a socket that nobody listens on any more.
///
/// # Errors
/// If another keeper listens there, or the folder cannot be written to.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "a keeper runs there already"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

/// Keeps what switches give. Returns once `stop` is readable; and unless it `stays`, when one has ended by itself, or none has
/// come back in time, and there is no other.
///
/// # Errors
/// If the listener fails.
pub fn serve(listener: &UnixListener, stop: BorrowedFd<'_>, stays: bool) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut keeper = Keeper::default();
    let mut lonely = Some(Instant::now());
    loop {
        let ready = keeper.wait(listener, stop, lonely)?;
        if ready[1] {
            return Ok(());
        }
        let gone = keeper.hear_all(&ready[2..]);
        if ready[0] {
            keeper.accept(listener);
        }
        keeper.expire();
        lonely = keeper.switches.is_empty().then(|| lonely.unwrap_or_else(Instant::now));
        let over = gone || lonely.is_some_and(|since| since.elapsed() >= GRACE);
        if lonely.is_some() && over && !stays {
            return Ok(());
        }
    }
}

/// What is kept of a port.
struct Entry {
    port: String,
    path: PathBuf,
    /// As it came: taken apart it would be several times as large.
    record: Box<RawValue>,
    version: u32,
    fds: Fds,
    stamp: u32,
    /// Number of the connection, by its owner; 0 of one that this has not given.
    connection: u64,
    /// Whose it is, or since when it is nobody's.
    owner: Result<u64, Instant>,
    /// Its owner has given it, and not just taken it up.
    given: bool,
}

impl Entry {
    fn is_current(&self) -> bool {
        self.fds.get(self.stamp).is_some_and(Stamp::is_current)
    }
}

impl Drop for Entry {
    /// Closes the descriptors where nobody waits for what a frontend can draw out.
    fn drop(&mut self) {
        if close_apart(mem::take(&mut self.fds)).is_err() {
            // A process that ends closes everything, and waits for nothing.
            std::process::exit(1);
        }
    }
}

struct Switch {
    id: u64,
    version: u32,
    stream: UnixStream,
}

#[derive(Default)]
struct Keeper {
    switches: Vec<Switch>,
    entries: Vec<Entry>,
    /// Counts switches.
    count: u64,
}

impl Keeper {
    /// Waits for the listener, the end and the switches, at most until something is over. Returns which are ready.
    fn wait(&self, listener: &UnixListener, stop: BorrowedFd<'_>, lonely: Option<Instant>) -> io::Result<Vec<bool>> {
        let since = self.entries.iter().filter_map(|entry| entry.owner.err()).chain(lonely).min();
        let left = since.map(|since| (since + GRACE).saturating_duration_since(Instant::now()));
        // A little longer, so that it is over then.
        let left = left.and_then(|left| Timespec::try_from(left + Duration::from_millis(1)).ok());
        let streams = self.switches.iter().map(|switch| switch.stream.as_fd());
        let mut polled: Vec<_> = [listener.as_fd(), stop]
            .into_iter()
            .chain(streams)
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut polled, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes one record of each switch that has said something. Returns whether one has ended by itself.
    fn hear_all(&mut self, ready: &[bool]) -> bool {
        let ids: Vec<u64> =
            self.switches.iter().zip(ready).filter(|(_, ready)| **ready).map(|(switch, _)| switch.id).collect();
        // All of them, even if the first has ended.
        ids.into_iter().filter(|id| self.hear(*id) == Heard::End).count() > 0
    }

    /// Takes one record of a switch. It is forgotten if it has gone, or says what no switch says.
    fn hear(&mut self, id: u64) -> Heard {
        let Some(place) = self.switches.iter().position(|switch| switch.id == id) else { return Heard::Gone };
        let heard = match wire::receive(&self.switches[place].stream, LIMIT) {
            Ok((said, fds)) => self.obey(place, said, fds),
            Err(_) => Heard::Gone,
        };
        if heard != Heard::Record {
            self.leave(id);
        }
        heard
    }

    fn obey(&mut self, place: usize, said: Said, fds: Fds) -> Heard {
        let (id, version) = (self.switches[place].id, self.switches[place].version);
        match said {
            Said::Hello { version, alone } => {
                self.switches[place].version = version;
                if alone {
                    // They are dead, and their last words may be still to be heard.
                    let others: Vec<u64> =
                        self.switches.iter().map(|other| other.id).filter(|other| *other != id).collect();
                    for other in others {
                        while self.hear(other) == Heard::Record {}
                    }
                }
                if self.answer(id, version).is_err() {
                    return Heard::Gone;
                }
            }
            Said::Keep { port, path, stamp, connection, record } => {
                let entry = Entry { port, path, record, version, fds, stamp, connection, owner: Ok(id), given: true };
                self.keep(entry);
            }
            Said::Forget { port, connection } => {
                let is_meant = |entry: &Entry| entry.port == port && entry.owner == Ok(id);
                self.entries.retain(|entry| !is_meant(entry) || entry.connection > connection);
            }
            Said::Settled { ports } => {
                self.entries.retain(|entry| entry.owner == Ok(id) && (entry.given || ports.contains(&entry.port)));
            }
            Said::End => {
                self.entries.retain(|entry| entry.owner != Ok(id));
                return Heard::End;
            }
        }
        Heard::Record
    }

    /// Takes an entry in place of what there is of its port, unless its owner has given a later one.
    fn keep(&mut self, entry: Entry) {
        let is_later = |other: &Entry| other.owner == entry.owner && other.connection > entry.connection;
        if self.entries.iter().any(|other| other.port == entry.port && is_later(other)) {
            return;
        }
        self.entries.retain(|other| other.port != entry.port);
        if self.entries.len() < MAX_PORTS {
            self.entries.push(entry);
        }
    }

    /// Gives a switch all that is current, nobody's, and of its format. It stays here, too, as the switch's.
    fn answer(&mut self, id: u64, version: u32) -> Result<(), WireError> {
        let (mut answer, mut all) = (Answer::default(), Fds::default());
        self.entries.retain(|entry| entry.owner.is_ok() || entry.version == version && entry.is_current());
        for entry in self.entries.iter_mut().filter(|entry| entry.owner.is_err()) {
            let Ok(fds) = entry.fds.duplicate() else { continue };
            let (port, path, record) = (entry.port.clone(), entry.path.clone(), entry.record.clone());
            answer.ports.push(KeptRecord { port, path, fds: fds.len() as u32, record });
            all.append(fds);
            (entry.owner, entry.given, entry.connection) = (Ok(id), false, 0);
        }
        let switch = self.switches.iter().find(|switch| switch.id == id).ok_or(WireError::HungUp)?;
        wire::send(&switch.stream, &answer, &all, LIMIT)
    }

    /// Forgets a switch that has gone. What it had is nobody's, and what is not up to date is of no use.
    fn leave(&mut self, id: u64) {
        self.switches.retain(|switch| switch.id != id);
        self.entries.retain(|entry| entry.owner != Ok(id) || entry.is_current());
        for entry in self.entries.iter_mut().filter(|entry| entry.owner == Ok(id)) {
            entry.owner = Err(Instant::now());
        }
    }

    fn accept(&mut self, listener: &UnixListener) {
        let Ok((stream, _)) = listener.accept() else { return };
        let ours = wire::peer_uid(&stream).is_ok_and(|uid| uid == 0 || uid == wire::own_uid());
        if ours && self.switches.len() < MAX_SWITCHES && stream.set_nonblocking(false).is_ok() {
            self.count += 1;
            self.switches.push(Switch { id: self.count, version: 0, stream });
        }
    }

    /// Lets go of what was nobody's for too long.
    fn expire(&mut self) {
        self.entries.retain(|entry| entry.owner.map_or_else(|since| since.elapsed() < GRACE, |_| true));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Record,
    End,
    Gone,
}
