//! The control socket: who listens on it, and who may call.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};

use crate::handover::own_uid;
use crate::limits::MAX_SOCKET_PATH;

/// Why the control socket cannot be made, in one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another switch answers there.
    #[error("control socket {path} is in use{}; stop that switch, or choose another with --control", by_pid(.pid))]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Who listens, if that can be told.
        pid: Option<i32>,
    },
    /// Something else is there.
    #[error("{0} is there and is not a socket; remove it, or choose another with --control")]
    NotASocket(PathBuf),
    /// The folder is missing.
    #[error("folder {0} of the control socket does not exist; create it, or choose another with --control")]
    MissingFolder(PathBuf),
    /// The group is unknown.
    #[error("group '{0}' is not in /etc/group; correct 'group' in the file")]
    UnknownGroup(String),
    /// The kernel refused.
    #[error("cannot make control socket {path}: {source}; correct that, or choose another with --control")]
    Unusable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn by_pid(pid: &Option<i32>) -> String {
    pid.map_or(String::new(), |pid| format!(" by pid {pid}"))
}

/// Who may call, besides root: the user that runs the switch, and members of a group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerRule {
    uid: u32,
    gids: [u32; 2],
}

impl PeerRule {
    /// Whether the process at the other end may have everything, guests' memory included: root and the switch's user, whatever
    /// group the socket is open to.
    pub(crate) fn trusts(&self, peer: &UCred) -> bool {
        peer.uid() == 0 || peer.uid() == self.uid
    }

    /// Whether the process at the other end may call.
    pub(crate) fn allows(&self, peer: &UCred) -> bool {
        let has_gid = |gid: u32| self.gids.contains(&gid);
        peer.uid() == 0
            || peer.uid() == self.uid
            || has_gid(peer.gid())
            // The credentials have the primary group only. The kernel has already checked the socket's mode against all
            // groups of the process, so a pid that was reused meanwhile opens nothing.
            || peer.pid().is_some_and(|pid| supplementary_groups(pid).into_iter().any(has_gid))
    }
}

fn supplementary_groups(pid: i32) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    groups.split_whitespace().filter_map(|gid| gid.parse().ok()).collect()
}

/// The listening control socket. Its file goes when this does.
#[derive(Debug)]
pub struct ControlSocket {
    pub(crate) listener: UnixListener,
    pub(crate) rule: PeerRule,
    /// `None` if the file is missing.
    pub(crate) file: Option<SocketFile>,
}

impl ControlSocket {
    /// Listens at `path`, with mode 0660 and the given group. What a dead switch left there is replaced. Under `/run`,
    /// which is empty after a boot, the folder is made too.
    ///
    /// # Errors
    /// [`SocketError`].
    pub async fn bind(path: &Path, gid: Option<u32>) -> Result<Self, SocketError> {
        let unusable = |source| SocketError::Unusable { path: path.into(), source };
        make_folder(path)?;
        clear_stale(path).await?;
        let listener = UnixListener::bind(path).map_err(unusable)?;
        let file = SocketFile { path: path.into(), identity: identity(path).map_err(unusable)? };
        let own = fs::symlink_metadata(path).map_err(unusable)?;
        // Whoever connects before this is still held to the rule.
        chown(path, None, gid).map_err(unusable)?;
        fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(unusable)?;
        let rule = PeerRule { uid: own.uid(), gids: [own.gid(), gid.unwrap_or(own.gid())] };
        Ok(Self { listener, rule, file: Some(file) })
    }

    /// Goes on listening on a socket that another process has made and handed over; its group stays. To be called within the
    /// runtime. The other process is gone, so nothing here can fail.
    pub fn adopt(listener: UnixListener, path: &Path, gid: Option<u32>) -> Self {
        let listener = if path.exists() { listener } else { Self::anew(listener, path) };
        let own = fs::symlink_metadata(path).ok();
        let (uid, own_gid) = own.map_or_else(|| (own_uid(), own_gid()), |own| (own.uid(), own.gid()));
        if let Some(gid) = gid.filter(|gid| *gid != own_gid) {
            tracing::warn!("the control socket stays with group {own_gid}; a restart gives it to group {gid}");
        }
        let file = identity(path).ok().map(|identity| SocketFile { path: path.into(), identity });
        Self { listener, rule: PeerRule { uid, gids: [own_gid, gid.unwrap_or(own_gid)] }, file }
    }

    /// In place of a socket whose file is missing, one that can be connected to.
    fn anew(listener: UnixListener, path: &Path) -> UnixListener {
        let bound = UnixListener::bind(path);
        let made = bound.and_then(|new| fs::set_permissions(path, Permissions::from_mode(0o660)).map(|()| new));
        match &made {
            Ok(_) => tracing::warn!("the control socket was missing, and is made anew"),
            Err(error) => tracing::error!("the control socket is missing, and cannot be made anew: {error}"),
        }
        made.unwrap_or(listener)
    }

    /// A listener that another process hands over, by its descriptor. To be called within the runtime.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn listener(listener: OwnedFd, path: &Path) -> Result<UnixListener, SocketError> {
        let listener = std::os::unix::net::UnixListener::from(listener);
        let made = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
        made.map_err(|source| SocketError::Unusable { path: path.into(), source })
    }

    /// The number of a group that is given by number, or by name as `/etc/group` has it.
    ///
    /// # Errors
    /// [`SocketError::UnknownGroup`].
    pub fn group_id(group: &str) -> Result<u32, SocketError> {
        if let Ok(gid) = group.parse() {
            return Ok(gid);
        }
        let table = fs::read_to_string("/etc/group").unwrap_or_default();
        let find = |line: &str| {
            let mut fields = line.split(':');
            (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
        };
        table.lines().find_map(find).ok_or_else(|| SocketError::UnknownGroup(group.into()))
    }

    /// Whether a path is short enough for a socket.
    ///
    /// # Errors
    /// One line for the operator.
    pub fn check_path(path: &Path) -> Result<(), String> {
        let length = path.as_os_str().len();
        if length <= MAX_SOCKET_PATH {
            return Ok(());
        }
        Err(format!(
            "the path of the control socket is {length} bytes long, and the kernel takes at most {MAX_SOCKET_PATH}; \
             use a shorter one than '{}'",
            path.display()
        ))
    }
}

/// The file of a socket that is ours, to be removed unless somebody has put another in its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn make_folder(path: &Path) -> Result<(), SocketError> {
    let folder = path.parent().unwrap_or(path);
    if folder.is_dir() {
        return Ok(());
    }
    if !folder.starts_with("/run") && !folder.starts_with("/var/run") {
        return Err(SocketError::MissingFolder(folder.into()));
    }
    let made = DirBuilder::new().recursive(true).mode(0o755).create(folder);
    made.map_err(|source| SocketError::Unusable { path: path.into(), source })
}

/// Removes a socket on which nobody listens any more.
async fn clear_stale(path: &Path) -> Result<(), SocketError> {
    let unusable = |source| SocketError::Unusable { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(SocketError::NotASocket(path.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unusable(error)),
    }
    match UnixStream::connect(path).await {
        Ok(stream) => {
            let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
            Err(SocketError::InUse { path: path.into(), pid })
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(unusable),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(unusable(error)),
        // A full backlog, for example: somebody is there.
        Err(_) => Err(SocketError::InUse { path: path.into(), pid: None }),
    }
}

fn own_gid() -> u32 {
    rustix::process::getegid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    async fn bind(path: &Path) -> Result<ControlSocket, String> {
        ControlSocket::bind(path, None).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let socket = bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let error = bind(&path).await.unwrap_err();
        assert!(error.contains(&format!("in use by pid {};", std::process::id())), "{error}");
        assert!(path.exists());
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn replaces_what_is_dead_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = bind(&path).await.unwrap();
        // Somebody else's file in our place stays.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(socket);
        assert!(path.exists());
        assert!(bind(&path).await.unwrap_err().contains("is not a socket"));
        assert!(bind(Path::new("/nonexistent/c.sock")).await.unwrap_err().contains("does not exist; create it"));
    }

    #[tokio::test]
    async fn who_may_call() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = one.peer_cred().unwrap();
        assert!(PeerRule { uid: peer.uid(), gids: [9999; 2] }.allows(&peer));
        assert!(PeerRule { uid: 9999, gids: [9999, peer.gid()] }.allows(&peer));
        let strangers = PeerRule { uid: 9999, gids: [9998, 9999] };
        assert_eq!(strangers.allows(&peer), peer.uid() == 0);
    }

    #[tokio::test]
    async fn is_taken_over_whatever_has_become_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        for is_missing in [false, true] {
            let socket = bind(&path).await.unwrap();
            let handed_over = ControlSocket::listener(socket.listener.as_fd().try_clone_to_owned().unwrap(), &path);
            // As a process that exits leaves it.
            std::mem::forget(socket);
            if is_missing {
                fs::remove_file(&path).unwrap();
            }
            let socket = ControlSocket::adopt(handed_over.unwrap(), &path, Some(12_345));
            let (client, served) = tokio::join!(UnixStream::connect(&path), socket.listener.accept());
            assert!(client.is_ok() && served.is_ok());
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
            drop(socket);
            assert!(!path.exists());
        }
    }

    #[test]
    fn groups() {
        assert_eq!(ControlSocket::group_id("1234").unwrap(), 1234);
        assert_eq!(ControlSocket::group_id("root").unwrap(), 0);
        assert!(ControlSocket::group_id("no such group").unwrap_err().to_string().contains("not in /etc/group"));
    }
}
