//! Notes beside the control socket about ports that are to go, from owners that found no switch to tell ([`sluice_proto::gone`]).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sluice_proto::gone;

use super::{Controller, StateError, StateStore};
use crate::config::PortConfig;
use crate::handover::own_uid;

/// A note.
#[derive(Debug)]
pub(super) struct Note {
    file: PathBuf,
    /// What the owners of the ports begin with.
    owner: String,
}

impl Note {
    /// All that there are, but for those of users who could not use the control socket either.
    pub(super) fn read(control: &Path) -> Vec<Self> {
        let Some(entries) = control.parent().and_then(|folder| fs::read_dir(folder).ok()) else { return Vec::new() };
        let note = |entry: fs::DirEntry| {
            let owner = gone::owner_of(control, entry.file_name().to_str()?)?;
            // Not of what a link leads to.
            let metadata = entry.metadata().ok()?;
            let is_trusted = metadata.uid() == 0 || metadata.uid() == own_uid();
            (is_trusted && metadata.is_file()).then(|| Self { file: entry.path(), owner })
        };
        entries.flatten().filter_map(note).collect()
    }

    /// Whether a port is to go.
    pub(super) fn is_about(&self, port: &PortConfig) -> bool {
        port.owner.as_deref().is_some_and(|owner| owner.starts_with(&self.owner))
    }

    /// Takes the note away. Only if that can be done, and was not done before, it is to be followed: never twice.
    pub(super) fn take(&self) -> bool {
        let taken = fs::remove_file(&self.file);
        if let Err(error) = &taken
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!("cannot remove {}, which is not followed: {error}", self.file.display());
        }
        taken.is_ok()
    }

    /// Removes the ports from what is written down, and takes the note away: both or neither. Returns whether it is to be
    /// followed for the switch.
    pub(super) fn follow(&self, store: &mut StateStore) -> Result<bool, StateError> {
        // Whoever was before us may have added a port that the note is not about.
        if !self.file.exists() {
            return Ok(false);
        }
        let before = store.remove_owned(&self.owner)?;
        let taken = self.take();
        if !taken {
            store.put_back(before)?;
        }
        Ok(taken)
    }
}

impl Controller {
    /// Removes the ports that these notes are about. One can come late: from an owner that found no switch just before this
    /// one began to listen.
    pub(super) fn remove_gone(&self, notes: Vec<Note>) {
        for note in notes {
            let mut store = self.lock();
            let stored = store.ports().to_vec();
            match note.follow(&mut store) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    tracing::warn!("ports of an owner that is gone stay for now: {error}");
                    continue;
                }
            }
            let running = self.switch.port_configs();
            let stored = stored.iter().filter(|port| running.iter().all(|other| other.name != port.name));
            for port in running.iter().chain(stored).filter(|port| note.is_about(port)) {
                tracing::info!(port = port.name, "its owner went while no switch was there to be told");
                if let Err(error) = self.remove_running(&mut store, &port.name, true) {
                    tracing::warn!(port = port.name, "cannot be removed: {error}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    #[test]
    fn only_files_of_those_who_may_are_notes() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("c.sock");
        let place = |owner: &str| gone::note(&control, owner).unwrap();
        fs::write(place("cni/a/if/"), "").unwrap();
        fs::create_dir(place("cni/b/if/")).unwrap();
        symlink(place("cni/a/if/"), place("cni/c/if/")).unwrap();
        fs::write(folder.path().join("d.sock.gone.cni:d:if:"), "").unwrap();
        fs::write(place("cni/e/if/"), "").unwrap();
        // Only root can give files away.
        let foreign = chown(place("cni/e/if/"), Some(12_345), None).is_ok();
        let mut notes = Note::read(&control);
        assert!(foreign || own_uid() != 0);
        notes.retain(|note| foreign || note.owner != "cni/e/if/");
        let [note] = &notes[..] else { panic!("{notes:?}") };
        assert_eq!(note.owner, "cni/a/if/");
        let port = |owner: &str| format!("p=tap:t0,owner={owner}").parse().unwrap();
        assert!(note.is_about(&port("cni/a/if/uid/net")) && !note.is_about(&port("cni/ab/if/uid/net")));
        assert!(note.take() && !note.take());
    }

    /// Otherwise a full disk would leave the ports of a pod behind for ever.
    #[test]
    fn a_note_stays_until_what_it_says_is_written_down() {
        let folder = tempfile::tempdir().unwrap();
        let file = gone::note(&folder.path().join("c.sock"), "cni/a/if/").unwrap();
        fs::write(&file, "").unwrap();
        let note = Note { file, owner: "cni/a/if/".into() };
        let mut store = StateStore::open(folder.path()).unwrap();
        let port: PortConfig = "p=tap:t0,owner=cni/a/if/uid/net".parse().unwrap();
        store.replace(vec![port.clone()]).unwrap();
        let obstacle = folder.path().join("ports.json.new");
        fs::create_dir(&obstacle).unwrap();
        note.follow(&mut store).unwrap_err();
        assert_eq!(store.ports(), std::slice::from_ref(&port));
        fs::remove_dir(&obstacle).unwrap();
        assert!(note.follow(&mut store).unwrap() && store.ports().is_empty());
        store.replace(vec![port.clone()]).unwrap();
        assert!(!note.follow(&mut store).unwrap());
        assert_eq!(store.ports(), [port]);
    }
}
