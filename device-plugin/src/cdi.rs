//! The Container Device Interface's specification of our devices, as an alternative to mounts in the kubelet's answer.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::device_info::replace_file;

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

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Specification<'a> {
    cdi_version: &'a str,
    kind: &'a str,
    devices: Vec<Device<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Device<'a> {
    name: &'a str,
    container_edits: Edits<'a>,
}

#[derive(Serialize)]
struct Edits<'a> {
    mounts: [Mount<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount<'a> {
    host_path: &'a Path,
    container_path: &'a Path,
    options: [&'a str; 2],
}

/// Writes the specification of all devices of `resource` to `dir`.
///
/// # Errors
/// If that is not possible.
pub fn write(dir: &Path, resource: &str, mounts: &[CdiMount<'_>]) -> io::Result<()> {
    let devices = mounts.iter().map(|mount| Device {
        name: mount.id,
        container_edits: Edits {
            mounts: [Mount {
                host_path: &mount.host_path,
                container_path: &mount.container_path,
                options: ["bind", "rw"],
            }],
        },
    });
    let specification = Specification { cdi_version: VERSION, kind: resource, devices: devices.collect() };
    let path = dir.join(format!("{}.json", resource.replace('/', "-")));
    replace_file(&path, &serde_json::to_vec_pretty(&specification)?, MODE)
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
