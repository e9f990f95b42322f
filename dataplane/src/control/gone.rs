//! Notes beside the control socket about ports that are to go, from owners that found no switch to tell ([`sluice_proto::gone`]).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sluice_proto::gone;

use super::Controller;
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
            let uid = entry.metadata().ok()?.uid();
            (uid == 0 || uid == own_uid()).then(|| Self { file: entry.path(), owner })
        };
        entries.flatten().filter_map(note).collect()
    }

    /// Whether a port is to go.
    pub(super) fn is_about(&self, port: &PortConfig) -> bool {
        port.owner.as_deref().is_some_and(|owner| owner.starts_with(&self.owner))
    }

    /// Its ports are gone.
    pub(super) fn done(self) {
        tracing::info!(owner = self.owner, "its ports are removed, as was noted while no switch was there to be told");
        if let Err(error) = fs::remove_file(&self.file) {
            tracing::warn!("cannot remove {}: {error}", self.file.display());
        }
    }
}

impl Controller {
    /// Removes the ports that there are notes about. One can come late: from an owner that found no switch just before this
    /// one began to listen.
    pub(super) fn remove_gone(&self) {
        for note in Note::read(&self.about.control) {
            let of_note: Vec<_> = self.switch.port_configs().into_iter().filter(|port| note.is_about(port)).collect();
            let removed = of_note.iter().map(|port| self.remove_port(&port.name, port.owner.as_deref()));
            match removed.collect::<Result<Vec<_>, _>>() {
                Ok(_) => note.done(),
                Err(error) => tracing::warn!("a port of {} that is gone cannot be removed: {error}", note.owner),
            }
        }
    }
}
