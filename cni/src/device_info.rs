//! The device-info file (specification 1.1.0), by which KubeVirt learns where the socket is.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use crate::error::CniError;

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
