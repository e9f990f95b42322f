//! Sluice, a userspace vhost-user switch.

pub mod wire;
