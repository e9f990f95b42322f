//! Where a port's socket is, and how to get there without being led astray.
//!
//! Folders of sockets belong to virtual machines' pods, which can plant anything in them. What the operator named, the
//! root, is trusted, and so are links on the way to it; from there on no link is followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

/// The place of a socket: a path, and how much of that is to be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketPlace {
    path: PathBuf,
    /// What comes before the part that is not trusted.
    root: PathBuf,
}

impl SocketPlace {
    /// A socket somewhere under `root`.
    ///
    /// # Errors
    /// One line for the operator, if it is not there.
    pub fn under(root: &Path, path: PathBuf) -> Result<Self, String> {
        if !path.starts_with(root) {
            return Err(format!(
                "socket {} is not under {}, where all sockets of this switch have to be (socket_root)",
                path.display(),
                root.display()
            ));
        }
        Ok(Self { path, root: root.to_owned() })
    }

    /// The whole path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the folder that the socket is in.
    pub(super) fn open(&self) -> io::Result<Opened<'_>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut folder = open(&self.root, flags, Mode::empty())?;
        let rest = self.path.strip_prefix(&self.root).map_err(io::Error::other)?;
        let name = rest.file_name().ok_or_else(|| io::Error::other("the path of a socket ends in its name"))?;
        if let Some(between) = rest.parent().filter(|between| !between.as_os_str().is_empty()) {
            folder = beneath(&folder, between.as_os_str(), flags)?;
        }
        Ok(Opened { folder, name })
    }
}

impl<P: Into<PathBuf>> From<P> for SocketPlace {
    /// A socket anywhere: its folder is trusted.
    fn from(path: P) -> Self {
        let path = path.into();
        let root = path.parent().unwrap_or(&path).to_owned();
        Self { path, root }
    }
}

/// The folder that a socket is in, and its name there.
pub(super) struct Opened<'p> {
    pub(super) folder: OwnedFd,
    pub(super) name: &'p OsStr,
}

impl Opened<'_> {
    /// A handle on what has that name, whatever it is. Nothing is done to it.
    pub(super) fn entry(&self) -> io::Result<File> {
        Ok(beneath(&self.folder, self.name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)?.into())
    }
}

fn beneath(folder: &impl AsFd, path: &OsStr, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(folder, path, flags, Mode::empty(), resolve)?)
}
