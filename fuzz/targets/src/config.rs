//! Texts that operators write: configuration files and port specifications.

use sluice::config::{FileConfig, PortText};
use std::path::Path;

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(error) = FileConfig::parse(Path::new("/etc/sluice.toml"), text) {
        assert!(!error.to_string().is_empty());
    }
    for spec in text.lines() {
        let port = PortText::from_spec(spec).and_then(|port| port.relative_to(Path::new("/run")).parse());
        match port {
            // What is accepted once can be checked again.
            Ok(port) => assert!(port.validate().is_ok(), "{spec}"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
