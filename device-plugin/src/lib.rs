//! The device plugin of Sluice: gives each VM pod a private folder for its vhost-user sockets, and the switch's pod all
//! of them.
//!
//! The kubelet knows two resources. A device of `sluice.io/sockets` is a folder on the node,
//! `/var/run/sluice/sockets/sock-0007`, mounted in the VM's pod as `/var/run/vhostuser/sock-0007`; QEMU makes its socket
//! in there. The one device of `sluice.io/dataplane` is the folder of all those folders, for the switch.
//!
//! The kubelet never says when a device is given back, and mounts what it was told at the first allocation for as long
//! as the pod lives. That shapes everything here: device ids are the same for ever, folders are made before they are
//! needed and never replaced while a pod can have them, each allocation begins with an empty folder, and what pods have left behind is cleared
//! away when the kubelet's list of pods says so twice.
//!
//! What is in a VM's folder belongs to the VM. [`folder`] alone touches it, and never follows where it leads.

pub mod cdi;
pub mod config;
pub mod dataplane;
pub mod device_info;
mod files;
pub mod folder;
pub mod kubelet;
pub mod metrics;
pub mod reconcile;
pub mod run;
pub mod service;
pub mod sockets;

mod preference;
