//! The rules of a port's configuration, each in one place.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{InvalidPort, PortConfig, PortTarget, VlanMode};
use crate::limits::{MAX_INTERFACE_NAME, MAX_NAME, MAX_QUEUE_PAIRS, MAX_SOCKET_PATH, MAX_VLAN, MIN_MTU};

impl PortConfig {
    /// Checks every rule that does not depend on the state of the host.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), InvalidPort> {
        check_name("name", &self.name)?;
        match &self.target {
            PortTarget::VhostUser { path, .. } => check_socket_path(path)?,
            PortTarget::Tap { interface } | PortTarget::Afxdp { interface, .. } => check_interface(interface)?,
        }
        check_name("network", &self.network)?;
        self.check_vlans()?;
        if let Some(mtu) = self.mtu {
            check_range("mtu", mtu, MIN_MTU, u16::MAX)?;
        }
        if let Some(queues) = self.queues {
            check_range("queues", queues, 1, MAX_QUEUE_PAIRS as u16)?;
        }
        self.check_mac()
    }

    fn check_vlans(&self) -> Result<(), InvalidPort> {
        match &self.vlan {
            VlanMode::All => Ok(()),
            VlanMode::Access(vlan) => check_range("vlan", *vlan, 1, MAX_VLAN),
            VlanMode::Trunk { native, allowed } => {
                if let Some(vlan) = native {
                    check_range("vlan", *vlan, 1, MAX_VLAN)?;
                }
                if allowed.is_empty() {
                    return Err(InvalidPort::new("trunk", "trunk needs at least one VLAN, like trunk=10,20-29"));
                }
                if !allowed.is_sorted_by(|a, b| a < b) {
                    return Err(InvalidPort::new("trunk", "the VLANs of a trunk must be sorted and different"));
                }
                allowed.iter().try_for_each(|vlan| check_range("trunk", *vlan, 1, MAX_VLAN))
            }
        }
    }

    fn check_mac(&self) -> Result<(), InvalidPort> {
        match self.mac {
            None if self.spoofcheck => {
                Err(InvalidPort::new("spoofcheck", "spoofcheck needs the port's address; add mac=…"))
            }
            Some(mac) if mac.is_multicast() || mac.0 == [0; 6] => {
                Err(InvalidPort::new("mac", format!("mac must be the address of one station, not {mac}")))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the folder of a vhost-user socket is there, so that a mistyped path is found when the port is added
    /// rather than never. Ports that come from the file or the last run are not held to it: they wait.
    ///
    /// # Errors
    /// [`MissingFolder`].
    pub fn check_folder(&self) -> Result<(), MissingFolder> {
        let PortTarget::VhostUser { path, .. } = &self.target else { return Ok(()) };
        let folder = path.parent().unwrap_or(path);
        let source = match folder.metadata() {
            Ok(metadata) if metadata.is_dir() => return Ok(()),
            Ok(_) => io::ErrorKind::NotADirectory.into(),
            Err(error) => error,
        };
        Err(MissingFolder { port: self.name.clone(), folder: folder.to_owned(), source })
    }
}

/// The folder of a vhost-user socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("port {port}: {}", self.problem())]
pub struct MissingFolder {
    /// The port.
    pub port: String,
    /// The folder.
    pub folder: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl MissingFolder {
    fn problem(&self) -> String {
        let folder = self.folder.display();
        match self.source.kind() {
            io::ErrorKind::NotFound => format!("folder {folder} does not exist; create it, or correct the path"),
            io::ErrorKind::NotADirectory => format!("{folder} is not a folder; correct the path"),
            io::ErrorKind::PermissionDenied => {
                format!("folder {folder} is out of reach; let the switch's user search it")
            }
            _ => format!("folder {folder} cannot be used: {}", self.source),
        }
    }
}

fn check_range(key: &'static str, value: u16, low: u16, high: u16) -> Result<(), InvalidPort> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(InvalidPort::new(key, format!("{key} must be a number from {low} to {high}, not '{value}'")))
}

fn check_name(key: &'static str, name: &str) -> Result<(), InvalidPort> {
    let fits = (1..=MAX_NAME).contains(&name.len());
    if fits && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Ok(());
    }
    let rule = format!("{key} must be 1 to {MAX_NAME} letters, digits, '.', '_' or '-', not '{name}'");
    Err(InvalidPort::new(key, rule))
}

fn check_socket_path(path: &Path) -> Result<(), InvalidPort> {
    let wrong = |problem: String| Err(InvalidPort::new("target", problem));
    let shown = path.display();
    if path.as_os_str().is_empty() {
        return wrong("the path of the socket is missing, like vhost-user:/run/vm1.sock".into());
    }
    if !path.is_absolute() {
        return wrong(format!("the path of the socket must start with '/', not '{shown}'"));
    }
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return wrong(format!(
            "the path of the socket is {length} bytes long, and the kernel takes at most {MAX_SOCKET_PATH}; \
             use a shorter one than '{shown}'"
        ));
    }
    // A comma would end the target where the port is written as SPEC, which the state file does.
    if path.as_os_str().as_bytes().iter().any(|b| b.is_ascii_control() || *b == b',') || path.to_str().is_none() {
        return wrong(format!("the path of the socket must be UTF-8 without commas and control characters: '{shown}'"));
    }
    if path.file_name().is_none() || path.as_os_str().as_bytes().ends_with(b"/") {
        return wrong(format!("'{shown}' names a folder; give the path of the socket in it"));
    }
    Ok(())
}

fn check_interface(name: &str) -> Result<(), InvalidPort> {
    let fits = (1..=MAX_INTERFACE_NAME).contains(&name.len()) && name != "." && name != "..";
    // The kernel's rule, less '%' (a pattern to it) and ',' (ends the target in SPEC).
    if fits && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%,".contains(&b)) {
        return Ok(());
    }
    let rule = format!(
        "the interface must be 1 to {MAX_INTERFACE_NAME} visible characters without '/', ':', '%' and ',', not '{name}'"
    );
    Err(InvalidPort::new("target", rule))
}
