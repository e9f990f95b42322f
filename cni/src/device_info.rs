//! The device-info file (specification 1.1.0), by which KubeVirt learns where the socket is.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use crate::config::goes_up;
use crate::error::CniError;

/// Where Multus has these files.
const FOLDERS: [&str; 2] = ["/var/run/k8s.cni.cncf.io/devinfo/cni", "/run/k8s.cni.cncf.io/devinfo/cni"];
/// Variable of the environment with another folder, for tests.
const FOLDER_VARIABLE: &str = "SLUICE_CNI_DEVICE_INFO_DIR";

/// Checks that a file is where Multus has them: whoever writes a network's configuration can name any.
///
/// # Errors
/// Code 7.
pub(crate) fn check_place(path: &Path) -> Result<(), CniError> {
    let for_tests = std::env::var_os(FOLDER_VARIABLE).filter(|folder| !folder.is_empty());
    let is_in_place = FOLDERS.iter().any(|folder| path.starts_with(folder))
        || for_tests.is_some_and(|folder| path.starts_with(folder));
    if is_in_place && !goes_up(path) {
        return Ok(());
    }
    Err(CniError::config(format!("\"CNIDeviceInfoFile\" must be below {}, not {}", FOLDERS[0], path.display())))
}

/// Writes the file, unless there is one already: the device plugin's.
///
/// # Errors
/// Code 5.
pub(crate) fn write_if_absent(path: &Path, socket: &str) -> Result<(), CniError> {
    // "server" is who is in the pod: QEMU makes the socket.
    let info = json!({ "type": "vhost-user", "version": "1.1.0", "vhost-user": { "mode": "server", "path": socket } });
    let failed = |error| CniError::io(format!("cannot write device-info file {}", path.display()), &error);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(mut file) => file.write_all(info.to_string().as_bytes()).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(error)),
    }
}
