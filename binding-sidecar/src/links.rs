//! Links to the pod's socket directories, whose paths are the same on each node.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// A link to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The directory that it is in, as the sidecar sees it.
    pub dir: PathBuf,
    /// Its name: that of the network.
    pub name: String,
    /// What it leads to in the compute container. The sidecar cannot see that, so nobody looks whether it is there.
    pub target: PathBuf,
}

/// A link could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make link {link}: {source}")]
pub struct LinkError {
    link: PathBuf,
    source: io::Error,
}

impl Link {
    /// Where the link is, as the sidecar sees it.
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Makes the link, or changes it in one step: whoever follows it meanwhile finds the old target or the new one.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn make(&self) -> Result<(), LinkError> {
        let link = self.path();
        if fs::read_link(&link).is_ok_and(|target| target == self.target) {
            return Ok(());
        }
        self.replace(&link).map_err(|source| LinkError { link, source })
    }

    fn replace(&self, link: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o755).create(&self.dir)?;
        // A network's name cannot start with a dot, so this is no link of another network.
        let new = self.dir.join(format!(".{}.new", self.name));
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(&self.target, &new)?;
        fs::rename(&new, link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_changes_and_keeps() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("userdata");
        let link = |target: &str| Link { dir: dir.clone(), name: "blue".into(), target: target.into() };
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::symlink_metadata(dir.join("blue")).unwrap());
        link("/var/run/vhostuser/s1").make().unwrap();
        let first = inode();
        link("/var/run/vhostuser/s1").make().unwrap();
        assert_eq!(inode(), first);
        // What an interrupted change left is no obstacle.
        symlink("/nowhere", dir.join(".blue.new")).unwrap();
        link("/var/run/vhostuser/s2").make().unwrap();
        assert_eq!(fs::read_link(dir.join("blue")).unwrap(), Path::new("/var/run/vhostuser/s2"));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn says_what_is_in_the_way() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("blue")).unwrap();
        let link = Link { dir: root.path().into(), name: "blue".into(), target: "/t".into() };
        assert!(link.make().unwrap_err().to_string().starts_with("cannot make link"));
    }
}
