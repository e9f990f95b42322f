//! Device-info files (specification 1.1.0 of the Network Plumbing Working Group): what Multus copies for the CNI plugin and
//! into the pod's network status, from where KubeVirt passes it to the binding sidecar.
//!
//! A file names the socket *as the pod sees it*. Only the folder of that path is known here: the socket is called like the
//! pod's network interface, which the CNI plugin is the first to learn. The path ends in a placeholder, and so does Multus' copy,
//! which the CNI plugin leaves as it is: readers should take the folder only.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde_json::json;

use crate::files::replace_file;

/// Version of the specification.
const VERSION: &str = "1.1.0";
/// Mode of the files, as the specification's own client has it.
const MODE: u32 = 0o444;

/// The folder of device-info files, for one resource.
#[derive(Debug)]
pub struct DeviceInfoFiles {
    dir: PathBuf,
    resource: String,
}

impl DeviceInfoFiles {
    /// Files of `resource` in `dir`.
    pub fn new(dir: PathBuf, resource: String) -> Self {
        Self { dir, resource }
    }

    /// Where the file of a device is: `<resource>-<id>-device.json`, with `-` for every `/`.
    pub fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{}-{id}-device.json", self.resource).replace('/', "-"))
    }

    /// Whether a device has a file.
    pub fn exists(&self, id: &str) -> bool {
        self.path(id).exists()
    }

    /// Writes a device's file, or replaces it in one step. Makes the folder if need be.
    ///
    /// # Errors
    /// If that is not possible. An older file is still there then.
    pub fn write(&self, id: &str, socket: &Path) -> io::Result<()> {
        // "server": the application in the pod, QEMU, makes the socket.
        let vhost_user = json!({ "mode": "server", "path": socket.display().to_string() });
        let info = json!({ "type": "vhost-user", "version": VERSION, "vhost-user": vhost_user });
        replace_file(&self.path(id), &serde_json::to_vec(&info)?, MODE)
    }

    /// Removes a device's file, if there is one.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_file_is_as_the_specification_says() {
        let dir = tempfile::tempdir().unwrap();
        let files = DeviceInfoFiles::new(dir.path().join("devinfo/dp"), "sluice.io/sockets".into());
        files.write("sock-0007", Path::new("/var/run/vhostuser/sock-0007/vhost.sock")).unwrap();
        let path = dir.path().join("devinfo/dp/sluice.io-sockets-sock-0007-device.json");
        let expected = r#"{"type":"vhost-user","version":"1.1.0","vhost-user":{"mode":"server","path":"/var/run/vhostuser/sock-0007/vhost.sock"}}"#;
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o444);
        // Again: the replacement is a new file, so whoever reads the old one reads all of it.
        files.write("sock-0007", Path::new("/elsewhere")).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("/elsewhere"));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        files.remove("sock-0007").unwrap();
        files.remove("sock-0007").unwrap();
        assert!(!files.exists("sock-0007"));
    }
}
