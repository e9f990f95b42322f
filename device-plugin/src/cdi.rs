//! The Container Device Interface's specification of our devices, as an alternative to mounts in the kubelet's answer.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde_json::json;

use crate::files::replace_file;

/// Version of the CDI specification; the oldest one with all we need, so that every runtime reads it.
const VERSION: &str = "0.6.0";
/// Mode of the file.
const MODE: u32 = 0o644;

/// One device: a folder on the node, and where it is in the container.
#[derive(Debug, Clone)]
pub struct CdiMount<'a> {
    /// The device's id.
    pub id: &'a str,
    /// On the node.
    pub host_path: PathBuf,
    /// In the container.
    pub container_path: PathBuf,
}

/// Writes the specification of all devices of `resource` to `dir`.
///
/// # Errors
/// If that is not possible.
pub fn write(dir: &Path, resource: &str, mounts: &[CdiMount<'_>]) -> io::Result<()> {
    let device = |mount: &CdiMount<'_>| {
        let (host, container) = (mount.host_path.display().to_string(), mount.container_path.display().to_string());
        let bind = json!({ "hostPath": host, "containerPath": container, "options": ["bind", "rw"] });
        json!({ "name": mount.id, "containerEdits": { "mounts": [bind] } })
    };
    let devices: Vec<_> = mounts.iter().map(device).collect();
    let specification = json!({ "cdiVersion": VERSION, "kind": resource, "devices": devices });
    replace_file(&path(dir, resource), &serde_json::to_vec_pretty(&specification)?, MODE)
}

/// Removes the specification of `resource` from `dir`, if it is there: a runtime mounts by it for whoever names its devices.
///
/// # Errors
/// If that is not possible.
pub fn remove(dir: &Path, resource: &str) -> io::Result<()> {
    match fs::remove_file(path(dir, resource)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn path(dir: &Path, resource: &str) -> PathBuf {
    dir.join(format!("{}.json", resource.replace('/', "-")))
}

/// The full name of a device.
pub fn name(resource: &str, id: &str) -> String {
    format!("{resource}={id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_each_device() {
        let dir = tempfile::tempdir().unwrap();
        let mount = CdiMount { id: "sock-0000", host_path: "/h/0".into(), container_path: "/c/0".into() };
        write(dir.path(), "sluice.io/sockets", &[mount]).unwrap();
        let text = std::fs::read_to_string(dir.path().join("sluice.io-sockets.json")).unwrap();
        let expected = serde_json::json!({
            "cdiVersion": "0.6.0",
            "kind": "sluice.io/sockets",
            "devices": [{
                "name": "sock-0000",
                "containerEdits": {
                    "mounts": [{"hostPath": "/h/0", "containerPath": "/c/0", "options": ["bind", "rw"]}]
                }
            }]
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), expected);
        assert_eq!(name("sluice.io/sockets", "sock-0000"), "sluice.io/sockets=sock-0000");
    }
}
