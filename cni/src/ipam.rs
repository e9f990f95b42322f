//! Addresses from an IPAM plugin, which is executed as the specification says.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use serde_json::{Map, Value};

use crate::error::{CniError, Code};

/// An IPAM plugin and the configuration it gets, which is all of ours.
pub(crate) struct Ipam<'a> {
    pub(crate) plugin: &'a str,
    pub(crate) config: &'a [u8],
    /// `CNI_PATH`.
    pub(crate) path: &'a str,
}

impl Ipam<'_> {
    /// Runs a command and returns what it printed, which is an empty result for most. The rest of its environment is
    /// ours.
    ///
    /// # Errors
    /// The plugin's own, or code 5 or 6.
    pub(crate) fn run(&self, command: &str) -> Result<Map<String, Value>, CniError> {
        let failed = |error| CniError::io(format!("cannot run ipam plugin {}", self.plugin), &error);
        let mut process = Command::new(self.find()?);
        process.env("CNI_COMMAND", command).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process.spawn().map_err(failed)?;
        let output = thread::scope(|scope| {
            if let Some(mut stdin) = child.stdin.take() {
                // A plugin that does not read is welcome not to.
                scope.spawn(move || stdin.write_all(self.config));
            }
            child.wait_with_output().map_err(failed)
        })?;
        let printed: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        if !output.status.success() {
            let known = printed.as_ref().and_then(|printed| CniError::of_plugin(self.plugin, printed));
            let unknown = || CniError::new(Code::Io, format!("ipam plugin {} failed: {}", self.plugin, output.status));
            return Err(known.unwrap_or_else(unknown));
        }
        match printed {
            Some(Value::Object(result)) => Ok(result),
            None if output.stdout.trim_ascii().is_empty() => Ok(Map::new()),
            _ => Err(CniError::new(Code::Decode, format!("ipam plugin {} printed no result", self.plugin))),
        }
    }

    fn find(&self) -> Result<PathBuf, CniError> {
        if self.plugin.contains('/') || self.plugin.starts_with('.') {
            return Err(CniError::config(format!("\"ipam\" has a \"type\" that is not a name: {:?}", self.plugin)));
        }
        let folders = self.path.split(':').filter(|folder| !folder.is_empty());
        let found = folders.map(|folder| PathBuf::from(folder).join(self.plugin)).find(|path| path.is_file());
        found.ok_or_else(|| {
            CniError::config(format!("ipam plugin {:?} is not in CNI_PATH ({})", self.plugin, self.path))
        })
    }
}
