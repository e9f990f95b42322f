//! Unix sockets in directories that others can write to.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::limits::MAX_SOCKET_PATH;
use crate::port::vhost::message;
use crate::port::vhost::place::{Opened, SocketPlace};
use crate::sync::close_apart;

/// Frontends that may wait while we serve one. A port has one frontend, so more are none.
const BACKLOG: libc::c_int = 8;

/// Why there is no connection, in the operator's terms.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    #[error("waiting for {0}: there is no such socket yet")]
    Absent(PathBuf),
    #[error("waiting for {0}: nobody listens on it")]
    Refused(PathBuf),
    #[error("waiting for {0}: its queue of connections is full; is another switch connected to it?")]
    Busy(PathBuf),
    #[error(
        "waiting for {0}: no permission; run as the user or group of the socket's owner, or give its directory a \
         default ACL for this user"
    )]
    Denied(PathBuf),
    #[error("{0} leads through a symbolic link or out of the folder of sockets; it is not followed")]
    Planted(PathBuf),
    #[error("{0} is {1}, not a socket; nothing is done to it")]
    Foreign(PathBuf, &'static str),
    #[error("cannot listen on {0}: its directory does not exist")]
    NoDirectory(PathBuf),
    #[error("another process listens on {0}")]
    InUse(PathBuf),
    #[error("{0}: the path of a socket to listen on can have at most {MAX_SOCKET_PATH} bytes")]
    PathLength(PathBuf),
    #[error("waiting for {0}: {1}")]
    Io(PathBuf, #[source] io::Error),
}

impl SocketError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| match error.raw_os_error() {
            Some(libc::ENOENT) => Self::Absent(path),
            Some(libc::ECONNREFUSED) => Self::Refused(path),
            Some(libc::EAGAIN) => Self::Busy(path),
            Some(libc::EACCES | libc::EPERM) => Self::Denied(path),
            Some(libc::ELOOP | libc::EXDEV) => Self::Planted(path),
            _ => Self::Io(path, error),
        }
    }
}

/// Connects to the socket there, without waiting. What was checked is what is connected, since both go through the same
/// descriptor.
pub(super) fn connect(place: &SocketPlace) -> Result<UnixStream, SocketError> {
    connect_in(&open_folder(place)?, place)
}

fn open_folder(place: &SocketPlace) -> Result<Opened<'_>, SocketError> {
    place.open().map_err(SocketError::at(place.path()))
}

fn connect_in(folder: &Opened<'_>, place: &SocketPlace) -> Result<UnixStream, SocketError> {
    let socket = open_socket(folder, place)?;
    connect_to(&by_descriptor(&socket)).map_err(SocketError::at(place.path()))
}

/// The listening side of a port in server mode. The socket is gone when this is dropped.
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    /// Leads there through the descriptor of its folder.
    path: PathBuf,
    _folder: OwnedFd,
    /// Device and inode of what we made, so that we never remove another's.
    made: (u64, u64),
}

impl Listener {
    /// Listens there for this user and group. Removes a socket that nobody listens on any more, and nothing else.
    pub(super) fn bind(place: &SocketPlace) -> Result<Self, SocketError> {
        // Ours could be longer, but not that by which the frontend connects.
        if place.path().as_os_str().len() > MAX_SOCKET_PATH {
            return Err(SocketError::PathLength(place.path().to_owned()));
        }
        let failed = || SocketError::at(place.path());
        let folder = open_folder(place).map_err(|error| match error {
            SocketError::Absent(path) => SocketError::NoDirectory(path),
            other => other,
        })?;
        let path = by_descriptor(&folder.folder).join(folder.name);
        remove_stale(&folder, place, &path)?;
        let socket = UnixListener::bind(&path).map_err(failed())?;
        let made = open_socket(&folder, place)?;
        fs::set_permissions(by_descriptor(&made), fs::Permissions::from_mode(0o660)).map_err(failed())?;
        let meta = made.metadata().map_err(failed())?;
        socket.set_nonblocking(true).map_err(failed())?;
        // SAFETY: a plain call on a descriptor that is open. If it fails, the queue is as long as it was.
        unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) };
        Ok(Self { socket, path, _folder: folder.folder, made: (meta.dev(), meta.ino()) })
    }

    /// The next frontend that has not hung up yet; `None` if there is none. Those that connect and go again must not
    /// keep the others waiting.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        for _ in 0..=4 * BACKLOG {
            match self.socket.accept() {
                Ok((stream, _)) if hung_up(&stream)? => message::end(&stream),
                Ok((stream, _)) => return stream.set_nonblocking(false).map(|()| Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// One that another process has made and handed over, with device and inode of its file. If its folder cannot be opened,
    /// nobody waits for those who wait there.
    pub(super) fn adopt(socket: OwnedFd, place: &SocketPlace, made: (u64, u64)) -> io::Result<Self> {
        let folder = match place.open() {
            Ok(folder) => folder,
            Err(error) => {
                close_apart(socket)?;
                return Err(error);
            }
        };
        let path = by_descriptor(&folder.folder).join(folder.name);
        Ok(Self { socket: socket.into(), path, _folder: folder.folder, made })
    }

    /// Device and inode of the socket's file.
    pub(super) fn made(&self) -> (u64, u64) {
        self.made
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        remove_made(&self.path, self.made);
    }
}

/// Removes the file, of this device and inode, of a socket that another process has made and handed over.
pub(crate) fn remove_socket(place: &SocketPlace, made: (u64, u64)) {
    // Without its folder there is no file either.
    if let Ok(folder) = place.open() {
        remove_made(&by_descriptor(&folder.folder).join(folder.name), made);
    }
}

fn remove_made(path: &Path, made: (u64, u64)) {
    let ours = fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == made);
    if ours && let Err(error) = fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
    }
}

fn remove_stale(folder: &Opened<'_>, place: &SocketPlace, path: &Path) -> Result<(), SocketError> {
    match connect_in(folder, place) {
        Err(SocketError::Absent(_)) => Ok(()),
        Err(SocketError::Refused(_)) => fs::remove_file(path).map_err(SocketError::at(place.path())),
        Ok(_) | Err(SocketError::Busy(_)) => Err(SocketError::InUse(place.path().to_owned())),
        Err(other) => Err(other),
    }
}

/// A handle on the socket file itself, not on what listens there.
fn open_socket(folder: &Opened<'_>, place: &SocketPlace) -> Result<File, SocketError> {
    let file = folder.entry().map_err(SocketError::at(place.path()))?;
    let kind = file.metadata().map_err(SocketError::at(place.path()))?.file_type();
    let other = match () {
        () if kind.is_socket() => return Ok(file),
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_file() => "a file",
        () => "a device",
    };
    Err(SocketError::Foreign(place.path().to_owned(), other))
}

fn by_descriptor(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// `connect(2)` that never waits: a blocking one would, for room in the listener's queue.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: an all-zero address is a valid value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The zip ends within `sun_path`; paths here are a few bytes long.
    for (place, &byte) in address.sun_path.iter_mut().zip(bytes) {
        *place = byte as libc::c_char;
    }
    // SAFETY: the address is a local of the size given.
    let done = unsafe { libc::connect(fd, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Waits until one of the descriptors is readable or hung up, or the time has passed. `None` waits without end.
/// Returns for each whether it is ready. A signal ends the wait early.
pub(super) fn wait<const N: usize>(fds: [RawFd; N], milliseconds: Option<u16>) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let timeout = milliseconds.map_or(-1, libc::c_int::from);
    // SAFETY: the array is a local of the length given.
    let count = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout) };
    if count < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|polled| polled.revents != 0))
}

/// Waits until the longest reply can be sent without waiting, or the frontend has hung up. `false` if it cannot be when
/// the time is over.
pub(super) fn has_room(stream: &UnixStream, limit: Duration) -> bool {
    let mut polled = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one local, as the length says.
    let count = unsafe { libc::poll(&mut polled, 1, limit.as_millis() as libc::c_int) };
    // A signal cuts it short, and the next message will wait again.
    count != 0
}

/// Whether the other side has closed the connection, even if there is something left to read.
pub(super) fn hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one local, as the length says.
    match unsafe { libc::poll(&mut polled, 1, 0) } {
        0.. => Ok(polled.revents != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn connect(path: &Path) -> Result<UnixStream, SocketError> {
        super::connect(&path.into())
    }

    fn bind(path: &Path) -> Result<Listener, SocketError> {
        Listener::bind(&path.into())
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn tells_apart_why_there_is_no_connection() {
        let dir = directory();
        let path = dir.path().join("s");
        assert!(matches!(connect(&path), Err(SocketError::Absent(_))));
        fs::write(&path, "x").unwrap();
        assert!(matches!(connect(&path), Err(SocketError::Foreign(_, "a file"))));
        fs::remove_file(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(connect(&path), Err(SocketError::Refused(_))));
        fs::remove_file(&path).unwrap();
        let _listener = UnixListener::bind(&path).unwrap();
        connect(&path).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(connect(&link), Err(SocketError::Foreign(_, "a symbolic link"))));
    }

    #[test]
    fn a_full_backlog_does_not_block() {
        let dir = directory();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: plain call on a descriptor that is open.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let mut held = Vec::new();
        let full = (0..8).find_map(|_| connect(&path).map(|stream| held.push(stream)).err());
        assert!(matches!(full, Some(SocketError::Busy(_))), "{full:?}");
    }

    #[test]
    fn a_long_path_can_be_connected_to() {
        let dir = directory();
        let deep = dir.path().join("d".repeat(150));
        fs::create_dir(&deep).unwrap();
        let short = dir.path().join("s");
        let _listener = UnixListener::bind(&short).unwrap();
        fs::rename(&short, deep.join("s")).unwrap();
        connect(&deep.join("s")).unwrap();
        assert!(matches!(bind(&deep.join("t")), Err(SocketError::PathLength(_))));
    }

    #[test]
    fn listens_only_where_nobody_else_does() {
        let dir = directory();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        // A process that another test starts has the closed listener until it becomes another program.
        let end = Instant::now() + Duration::from_secs(5);
        let listener = loop {
            match bind(&path) {
                Err(SocketError::InUse(_)) if Instant::now() < end => std::thread::yield_now(),
                bound => break bound.unwrap(),
            }
        };
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::Foreign(..))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn those_who_left_do_not_keep_others_waiting() {
        let dir = directory();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path.clone().into()).unwrap();
        let mut gone = 0;
        while let Ok(stream) = connect(&path) {
            drop(stream);
            gone += 1;
        }
        assert!(gone <= BACKLOG + 1, "the queue is short");
        assert!(listener.accept().unwrap().is_none());
        let stays = connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(stays);
    }

    #[test]
    fn removes_only_its_own_socket() {
        let dir = directory();
        let path = dir.path().join("s");
        let listener = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(listener);
        assert!(path.exists());
    }

    /// Everything that the owner of a folder of sockets can plant there.
    #[test]
    fn nothing_planted_under_the_root_is_followed() {
        let (dir, outside) = (directory(), directory());
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("vm")).unwrap();
        let foreign = outside.path().join("s");
        let _foreign = UnixListener::bind(&foreign).unwrap();
        let under = |path: &str| SocketPlace::under(&root, root.join(path));
        let check = |path: &str| super::connect(&under(path).unwrap());
        let link = |target: &Path, path: &str| std::os::unix::fs::symlink(target, root.join(path)).unwrap();

        link(&foreign, "vm/link");
        assert!(matches!(check("vm/link"), Err(SocketError::Foreign(_, "a symbolic link"))));
        link(outside.path(), "out");
        assert!(matches!(check("out/s"), Err(SocketError::Planted(_))));
        link(Path::new("vm"), "inside");
        let _socket = UnixListener::bind(root.join("vm/s")).unwrap();
        assert!(matches!(check("inside/s"), Err(SocketError::Planted(_))), "not even inside");
        link(Path::new("/proc/self/cwd"), "magic");
        assert!(matches!(check("magic/s"), Err(SocketError::Planted(_))));
        assert!(matches!(check("vm/../../root/vm/s"), Err(SocketError::Planted(_))));
        assert!(matches!(check("vm"), Err(SocketError::Foreign(_, "a directory"))));
        fs::write(root.join("vm/file"), "").unwrap();
        assert!(matches!(check("vm/file"), Err(SocketError::Foreign(_, "a file"))));
        let fifo = std::ffi::CString::new(root.join("vm/fifo").into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: the path is a C string.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        assert!(matches!(check("vm/fifo"), Err(SocketError::Foreign(_, "a pipe"))));
        assert!(matches!(
            super::connect(&SocketPlace::from(Path::new("/dev/null"))),
            Err(SocketError::Foreign(_, "a device"))
        ));
        assert!(matches!(check("vm/none"), Err(SocketError::Absent(_))));
        check("vm/s").unwrap();
        assert!(under("../other").is_ok_and(|place| super::connect(&place).is_err()));
        assert!(SocketPlace::under(&root, foreign.clone()).is_err(), "outside");

        // Neither is anything made or removed outside.
        assert!(matches!(Listener::bind(&under("out/t").unwrap()), Err(SocketError::Planted(_))));
        assert!(matches!(Listener::bind(&under("vm/link").unwrap()), Err(SocketError::Foreign(..))));
        assert!(foreign.exists() && !outside.path().join("t").exists());
        drop(Listener::bind(&under("vm/t").unwrap()).unwrap());
        assert!(!root.join("vm/t").exists());

        // A link to the root is the operator's own.
        let alias = dir.path().join("alias");
        std::os::unix::fs::symlink(&root, &alias).unwrap();
        super::connect(&SocketPlace::under(&alias, alias.join("vm/s")).unwrap()).unwrap();
    }
}
