//! The KubeVirt network binding plugin of Sluice.
//!
//! KubeVirt starts it as a sidecar of `virt-launcher` and asks it about each libvirt domain before it is defined. It
//! gives the VM's interfaces vhost-user sockets, through links that lead to the same place before and after a migration.

pub mod config;
pub mod domain;
pub mod edit;
pub mod links;
mod mtu;
pub mod network_info;
pub mod plan;
pub mod server;
pub mod vmi;
