//! The switch: networks, forwarding and the ports' tables.

use std::sync::Arc;

use crate::config::{PortConfig, SwitchConfig};
use crate::status::{FdbEntryStatus, PortStatus, WorkerStatus};

mod drops;
pub use drops::DropReason;

/// Private memory of a worker for frames that have to be rebuilt.
#[derive(Debug)]
pub struct Scratch {}

/// Why a port was not added or removed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The name is taken.
    #[error("port {0} exists already")]
    Exists(String),
    /// There is no such port.
    #[error("no port is named {0}")]
    NotFound(String),
    /// Another port uses that socket or interface.
    #[error("{target} is used by port {port} already")]
    TargetInUse {
        /// Socket path or interface.
        target: String,
        /// The other port.
        port: String,
    },
    /// A bound of the switch is reached.
    #[error("the switch has reached its limit of {limit} {what}")]
    Limit {
        /// What there are too many of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The port's own set-up failed.
    #[error("{0}")]
    Setup(String),
}

/// A running switch: workers, ports and tables. Cheap to share.
#[derive(Debug)]
pub struct Switch {}

impl Switch {
    /// Starts the workers.
    ///
    /// # Errors
    /// If a thread cannot be started or pinned.
    pub fn start(_config: &SwitchConfig) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {}))
    }

    /// Adds a port. It connects in the background.
    ///
    /// # Errors
    /// [`PortError`]; nothing is left behind then.
    pub fn add_port(&self, _config: PortConfig) -> Result<(), PortError> {
        Ok(())
    }

    /// Removes a port.
    ///
    /// # Errors
    /// [`PortError::NotFound`].
    pub fn remove_port(&self, name: &str) -> Result<PortConfig, PortError> {
        Err(PortError::NotFound(name.into()))
    }

    /// Configurations of all ports, in the order they were added.
    pub fn port_configs(&self) -> Vec<PortConfig> {
        Vec::new()
    }

    /// All ports, sorted by name.
    pub fn ports(&self) -> Vec<PortStatus> {
        Vec::new()
    }

    /// One port.
    pub fn port(&self, _name: &str) -> Option<PortStatus> {
        None
    }

    /// The forwarding table, sorted by network, VLAN and address.
    pub fn fdb(&self) -> Vec<FdbEntryStatus> {
        Vec::new()
    }

    /// Forgets learned addresses, of one network or of all. Returns how many.
    pub fn flush_fdb(&self, _network: Option<&str>) -> usize {
        0
    }

    /// The workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        Vec::new()
    }

    /// Stops all ports and workers and waits for them. Idempotent.
    pub fn stop(&self) {}
}
