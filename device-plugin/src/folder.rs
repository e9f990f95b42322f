//! The folders of the sockets, and how to empty them without being led astray.
//!
//! A VM's pod may put anything into its folder: links, FIFOs, device nodes, thousands of files, folders in folders. So
//! everything here works on open folders and single names, never on paths; nothing but folders is ever opened, and no
//! link or mount is followed.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Gid, Mode, OFlags, RenameFlags, ResolveFlags, StatVfsMountFlags, Uid, XattrFlags};
use rustix::io::Errno;

/// Mode of the folder of all folders: anyone may pass, none but its owner may look.
const ROOT_MODE: u32 = 0o711;
/// Mode of a VM's folder.
const FOLDER_MODE: u32 = 0o770;
/// Extended attribute of SELinux.
const LABEL: &CStr = c"security.selinux";
/// Extended attributes of access lists, which the pod, as owner of the folder, can set.
const ACCESS_LISTS: [&CStr; 2] = [c"system.posix_acl_access", c"system.posix_acl_default"];
/// Prefix of the names under which nested folders come up, see [`Purge::dissolve`].
const LIFTED: &str = ".sluice-purge-";
/// Prefix of the names of folders on their way in or out, see [`Root::replace`].
const SPARE: &str = ".sluice-spare-";

/// How many entries one purge removes at most: well below a second's work on a tmpfs, which /var/run is.
pub const PURGE_LIMIT: u64 = 50_000;

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is more in it than one purge removes. The rest is for the next one.
    #[error("{path} holds more than {PURGE_LIMIT} files and is being emptied")]
    Overfull {
        /// The folder.
        path: PathBuf,
    },
    /// The file system takes no more files.
    #[error("the file system of {path} is {problem}")]
    FileSystem {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
}

/// Who owns VM folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub user: u32,
    /// Group id.
    pub group: u32,
}

/// The folder of all folders.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    owner: Owner,
    /// What SELinux should see, if it is on.
    label: Option<String>,
    /// [`PURGE_LIMIT`], except in tests.
    purge_limit: u64,
}

impl Root {
    /// The folder at `path`, whose folders belong to `owner` and carry the SELinux label `label`, if there is one.
    pub fn new(path: PathBuf, owner: Owner, label: Option<String>) -> Self {
        Self { path, owner, label, purge_limit: PURGE_LIMIT }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder of all folders, unless it is there, and sets its mode and label. What is in it stays.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn ensure(&self) -> Result<(), FolderError> {
        let failed = |what| move |source| self.failed(what, None, source);
        match self.open() {
            Ok(_) => {}
            Err(Errno::NOENT) => {
                std::fs::create_dir_all(&self.path).map_err(|error| self.failed("create", None, error))?;
            }
            Err(error) => return Err(self.failed("open", None, error)),
        }
        let root = self.open().map_err(failed("open"))?;
        self.set_mode(&root, ROOT_MODE).map_err(failed("set the mode of"))?;
        self.set_label(&root).map_err(failed("label"))
    }

    /// Looks whether the file system takes new files.
    ///
    /// # Errors
    /// If not, or if that cannot be told.
    pub fn check_file_system(&self) -> Result<(), FolderError> {
        let failed = |error| self.failed("look at", None, error);
        let state = rustix::fs::fstatvfs(self.open().map_err(failed)?).map_err(failed)?;
        let problem = match () {
            () if state.f_flag.contains(StatVfsMountFlags::RDONLY) => "read-only",
            () if state.f_files > 0 && state.f_ffree == 0 => "out of inodes",
            () if state.f_blocks > 0 && state.f_bfree == 0 => "full",
            () => return Ok(()),
        };
        Err(FolderError::FileSystem { path: self.path.clone(), problem })
    }

    /// Makes a VM's folder, unless it is there, and sets its owner, mode and label. What is in it stays, and so does the
    /// folder itself: a pod may have it mounted. Tells whether it was made.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn ensure_folder(&self, id: &str) -> Result<bool, FolderError> {
        self.folder(id).map(|(_, made)| made)
    }

    /// Removes all that is in a VM's folder, which is made if need be. Gives the number of files and folders removed.
    ///
    /// # Errors
    /// If something cannot be removed, or there is too much of it. What could be removed is gone then.
    pub fn purge(&self, id: &str) -> Result<u64, FolderError> {
        self.purge_open(id, &self.folder(id)?.0)
    }

    /// Empties a VM's folder and puts a new one in its place, for when no pod can have it mounted: who still has the old one
    /// open has a folder that nobody looks into any more, and once that is removed nothing can be made in it. Gives the
    /// number of files and folders removed.
    ///
    /// # Errors
    /// If something cannot be made or removed, or there is too much of it. What could be removed is gone then.
    pub fn replace(&self, id: &str) -> Result<u64, FolderError> {
        let removed = self.purge(id)?;
        let root = self.open().map_err(|error| self.failed("open", None, error))?;
        let spare = format!("{SPARE}{id}");
        // An earlier attempt may have left one.
        let left = self.remove_spare(&root, &spare)?;
        let failed = |what| move |source| self.failed(what, Some(id), source);
        rustix::fs::mkdirat(&root, &spare, Mode::from_raw_mode(0o700)).map_err(failed("create"))?;
        self.furnish(id, &open_folder(&root, &spare).map_err(failed("open"))?)?;
        rustix::fs::renameat_with(&root, &spare, &root, id, RenameFlags::EXCHANGE).map_err(failed("replace"))?;
        Ok(removed + left + self.remove_spare(&root, &spare)?)
    }

    /// Removes a folder that is nobody's any more. Gives the number of files and folders removed from it.
    fn remove_spare(&self, root: &OwnedFd, name: &str) -> Result<u64, FolderError> {
        let failed = |error| self.failed("remove", Some(name), error);
        let folder = match open_folder(root, name) {
            Err(Errno::NOENT) => return Ok(0),
            folder => folder.map_err(failed)?,
        };
        // So that its old owner, who may have it open, does not fill it meanwhile.
        rustix::fs::fchown(&folder, Some(rustix::process::geteuid()), None).map_err(failed)?;
        self.set_mode(&folder, 0o700).map_err(failed)?;
        let removed = self.purge_open(name, &folder)?;
        rustix::fs::unlinkat(root, name, AtFlags::REMOVEDIR).map_err(failed)?;
        Ok(removed)
    }

    fn purge_open(&self, name: &str, folder: &OwnedFd) -> Result<u64, FolderError> {
        let mut purge = Purge { folder, limit: self.purge_limit, seen: 0, lifted: 0 };
        match purge.run() {
            Ok(true) => Ok(purge.seen),
            Ok(false) => Err(FolderError::Overfull { path: self.path.join(name) }),
            Err(error) => Err(self.failed("empty", Some(name), error)),
        }
    }

    fn open(&self) -> Result<OwnedFd, Errno> {
        // What leads here is the administrator's, and may well go through a link, as /var/run does.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
    }

    /// A VM's folder, and whether it was made just now.
    fn folder(&self, id: &str) -> Result<(OwnedFd, bool), FolderError> {
        let failed = |what| move |source| self.failed(what, Some(id), source);
        let root = self.open().map_err(|error| self.failed("open", None, error))?;
        let (folder, made) = match open_folder(&root, id) {
            Ok(folder) => (folder, false),
            Err(error) => {
                if matches!(error, Errno::NOTDIR | Errno::LOOP) {
                    // Not a folder, so no pod can have it mounted as one. The link goes, not what it leads to.
                    tracing::warn!(device = id, "something that is no folder was in the folder's place; removed");
                    rustix::fs::unlinkat(&root, id, AtFlags::empty()).map_err(failed("replace"))?;
                } else if error != Errno::NOENT {
                    return Err(failed("open")(error));
                }
                rustix::fs::mkdirat(&root, id, Mode::from_raw_mode(FOLDER_MODE)).map_err(failed("create"))?;
                (open_folder(&root, id).map_err(failed("open"))?, true)
            }
        };
        self.furnish(id, &folder)?;
        Ok((folder, made))
    }

    /// Sets owner, mode and label of a VM's folder.
    fn furnish(&self, id: &str, folder: &OwnedFd) -> Result<(), FolderError> {
        let failed = |what| move |source| self.failed(what, Some(id), source);
        self.set_owner(folder).map_err(failed("set the owner of"))?;
        // A pod's access list shows in the mode, so it goes first.
        for list in ACCESS_LISTS {
            ignore_absent(rustix::fs::fremovexattr(folder, list)).map_err(failed("set the mode of"))?;
        }
        self.set_mode(folder, FOLDER_MODE).map_err(failed("set the mode of"))?;
        self.set_label(folder).map_err(failed("label"))
    }

    fn set_owner(&self, folder: &OwnedFd) -> Result<(), Errno> {
        let Owner { user, group } = self.owner;
        let stat = rustix::fs::fstat(folder)?;
        if (stat.st_uid, stat.st_gid) == (user, group) {
            return Ok(());
        }
        rustix::fs::fchown(folder, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))
    }

    fn set_mode(&self, folder: &OwnedFd, mode: u32) -> Result<(), Errno> {
        if rustix::fs::fstat(folder)?.st_mode & 0o7777 == mode {
            return Ok(());
        }
        rustix::fs::fchmod(folder, Mode::from_raw_mode(mode))
    }

    fn set_label(&self, folder: &OwnedFd) -> Result<(), Errno> {
        let Some(label) = &self.label else { return Ok(()) };
        // The kernel's own tools end it with a zero byte.
        let label = [label.as_bytes(), b"\0"].concat();
        let mut now = [0; 256];
        match rustix::fs::fgetxattr(folder, LABEL, &mut now) {
            Ok(length) if now.get(..length) == Some(label.as_slice()) => Ok(()),
            _ => rustix::fs::fsetxattr(folder, LABEL, &label, XattrFlags::empty()),
        }
    }

    fn failed(&self, what: &'static str, id: Option<&str>, error: impl Into<io::Error>) -> FolderError {
        let path = id.map_or_else(|| self.path.clone(), |id| self.path.join(id));
        FolderError::System { what, path, source: error.into() }
    }
}

/// Opens the folder `name` in `parent`, if it is one and on the same file system.
fn open_folder(parent: &OwnedFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)
}

/// No attribute, or a file system that has none, is fine.
fn ignore_absent(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        result => result,
    }
}

/// The removal of all that is in a folder, in bounded work and with two open folders however deep they are nested.
struct Purge<'a> {
    folder: &'a OwnedFd,
    limit: u64,
    /// Entries removed or moved.
    seen: u64,
    /// Folders brought up, for their names.
    lifted: u64,
}

impl Purge<'_> {
    /// Whether the folder is empty now; if not, the bound was met.
    fn run(&mut self) -> Result<bool, Errno> {
        // A listing may miss entries that come and go meanwhile, so the last one must show nothing.
        loop {
            let before = self.seen;
            let mut entries = Dir::read_from(self.folder)?;
            while let Some(entry) = entries.read() {
                let entry = entry?;
                if is_self_or_parent(entry.file_name()) {
                    continue;
                }
                if !self.count() || !self.remove(entry.file_name())? {
                    return Ok(false);
                }
            }
            if self.seen == before {
                return Ok(true);
            }
        }
    }

    /// Counts an entry; false if the bound is met.
    fn count(&mut self) -> bool {
        self.seen += 1;
        self.seen <= self.limit
    }

    fn remove(&mut self, name: &CStr) -> Result<bool, Errno> {
        match rustix::fs::unlinkat(self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::ISDIR) => self.dissolve(name),
            Err(error) => Err(error),
        }
    }

    /// Removes a nested folder. Folders in it are brought up to the folder that is being purged, where their turn comes:
    /// so neither the stack nor the number of open folders depends on how deep a pod has nested them.
    fn dissolve(&mut self, name: &CStr) -> Result<bool, Errno> {
        let nested = open_folder(self.folder, name)?;
        loop {
            let mut found = false;
            let mut entries = Dir::read_from(&nested)?;
            while let Some(entry) = entries.read() {
                let entry = entry?;
                let inner = entry.file_name();
                if is_self_or_parent(inner) {
                    continue;
                }
                if !self.count() {
                    return Ok(false);
                }
                found = true;
                match rustix::fs::unlinkat(&nested, inner, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(Errno::ISDIR) => self.lift(&nested, inner)?,
                    Err(error) => return Err(error),
                }
            }
            if !found {
                break;
            }
        }
        match rustix::fs::unlinkat(self.folder, name, AtFlags::REMOVEDIR) {
            // Somebody was faster, or puts things there still: then the next listing shows it.
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::NOTDIR) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn lift(&mut self, nested: &OwnedFd, inner: &CStr) -> Result<(), Errno> {
        loop {
            self.lifted += 1;
            let name = format!("{LIFTED}{}", self.lifted);
            match rustix::fs::renameat_with(nested, inner, self.folder, name, RenameFlags::NOREPLACE) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                // The pod has the name already. It cannot have all of them.
                Err(Errno::EXIST) if self.lifted <= 2 * self.limit => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_self_or_parent(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

#[cfg(test)]
mod tests;
