//! Device-info files (specification 1.1.0 of the Network Plumbing Working Group): what Multus copies for the CNI plugin and
//! into the pod's network status, from where KubeVirt passes it to the binding sidecar.
//!
//! A file names the socket *as the pod sees it*. Only the folder of that path is known here: the socket is called like the
//! pod's network interface, which the CNI plugin is the first to learn. The path ends in a placeholder, and so does Multus' copy,
//! which the CNI plugin leaves as it is: readers should take the folder only.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Version of the specification.
const VERSION: &str = "1.1.0";
/// Mode of the files, as the specification's own client has it.
const MODE: u32 = 0o444;

/// A file's content.
#[derive(Serialize)]
struct DeviceInfo<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    version: &'a str,
    #[serde(rename = "vhost-user")]
    vhost_user: VhostUser<'a>,
}

#[derive(Serialize)]
struct VhostUser<'a> {
    /// "server": the application in the pod, QEMU, makes the socket.
    mode: &'a str,
    path: &'a Path,
}

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
        let vhost_user = VhostUser { mode: "server", path: socket };
        let info = DeviceInfo { kind: "vhost-user", version: VERSION, vhost_user };
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

/// Puts a file in place in one step, so that nobody reads half of it. Makes its folder if need be.
pub(crate) fn replace_file(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    fs::create_dir_all(dir)?;
    let draft = dir.join(format!(".{}.new", name.display()));
    // Left by one of us that was killed.
    let _ = fs::remove_file(&draft);
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).and_then(|mut file| {
        file.write_all(content)?;
        // Whatever the umask is.
        file.set_permissions(Permissions::from_mode(mode))
    });
    let replaced = written.and_then(|()| fs::rename(&draft, path));
    if replaced.is_err() {
        let _ = fs::remove_file(&draft);
    }
    replaced
}

#[cfg(test)]
mod tests {
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
