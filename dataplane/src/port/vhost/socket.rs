//! Unix sockets in directories that others can write to.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::limits::MAX_SOCKET_PATH;

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
            _ => Self::Io(path, error),
        }
    }
}

/// Connects to the socket at `path`, without waiting. The last component must be a socket itself: whoever owns the
/// directory may have planted a link in its place. What was checked is what is connected, since both go through the
/// same descriptor.
pub(super) fn connect(path: &Path) -> Result<UnixStream, SocketError> {
    let socket = open_socket(path)?;
    connect_to(&by_descriptor(&socket)).map_err(SocketError::at(path))
}

/// The listening side of a port in server mode. The socket is gone when this is dropped.
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    path: PathBuf,
    /// Device and inode of what we made, so that we never remove another's.
    made: (u64, u64),
}

impl Listener {
    /// Listens on `path` for this user and group. Removes a socket that nobody listens on any more, and nothing else.
    pub(super) fn bind(path: &Path) -> Result<Self, SocketError> {
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(SocketError::PathLength(path.to_owned()));
        }
        remove_stale(path)?;
        let socket = UnixListener::bind(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => SocketError::NoDirectory(path.to_owned()),
            _ => SocketError::at(path)(error),
        })?;
        let made = open_socket(path)?;
        let permissions = fs::Permissions::from_mode(0o660);
        fs::set_permissions(by_descriptor(&made), permissions).map_err(SocketError::at(path))?;
        let meta = made.metadata().map_err(SocketError::at(path))?;
        socket.set_nonblocking(true).map_err(SocketError::at(path))?;
        Ok(Self { socket, path: path.to_owned(), made: (meta.dev(), meta.ino()) })
    }

    /// One that another process has made and handed over, with device and inode of its file.
    pub(super) fn adopt(socket: OwnedFd, path: &Path, made: (u64, u64)) -> Self {
        Self { socket: socket.into(), path: path.to_owned(), made }
    }

    /// Device and inode of the socket's file.
    pub(super) fn made(&self) -> (u64, u64) {
        self.made
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.made);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match connect(path) {
        Err(SocketError::Absent(_)) => Ok(()),
        Err(SocketError::Refused(_)) => fs::remove_file(path).map_err(SocketError::at(path)),
        Ok(_) | Err(SocketError::Busy(_)) => Err(SocketError::InUse(path.to_owned())),
        Err(other) => Err(other),
    }
}

/// A handle on the socket file itself, not on what listens there.
fn open_socket(path: &Path) -> Result<File, SocketError> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(SocketError::at(path))?;
    let kind = file.metadata().map_err(SocketError::at(path))?.file_type();
    let other = match () {
        () if kind.is_socket() => return Ok(file),
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_file() => "a file",
        () => "a device",
    };
    Err(SocketError::Foreign(path.to_owned(), other))
}

fn by_descriptor(file: &File) -> PathBuf {
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
        assert!(matches!(Listener::bind(&deep.join("t")), Err(SocketError::PathLength(_))));
    }

    #[test]
    fn listens_only_where_nobody_else_does() {
        let dir = directory();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(Listener::bind(&path), Err(SocketError::InUse(_))));
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path), Err(SocketError::Foreign(..))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn removes_only_its_own_socket() {
        let dir = directory();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
