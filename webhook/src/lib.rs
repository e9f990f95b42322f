//! The mutating admission webhook of Sluice.
//!
//! KubeVirt before 1.6 gives a hook sidecar no directory that the compute container sees too. This webhook adds one to
//! `virt-launcher` pods, for the links of the binding sidecar. Later versions of KubeVirt do not need it.

pub mod review;
pub mod server;
pub mod tls;
