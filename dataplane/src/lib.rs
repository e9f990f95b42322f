//! Sluice, a userspace vhost-user switch.
//!
//! Data flows one way: port → frame → switch → frame → port.

pub mod capture;
pub mod config;
pub mod control;
pub mod frame;
pub mod handover;
pub mod heap;
pub mod keeper;
pub mod limits;
pub mod mem;
pub mod port;
pub mod sandbox;
pub mod status;
pub mod switch;
pub mod sync;
pub mod virtq;
pub mod wire;
pub mod worker;

#[cfg(test)]
mod testing;
