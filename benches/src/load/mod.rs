//! A load generator that is the other side of any vhost-user switch: many guests on one thread, each with its own
//! memory and rings, at a cost of a few nanoseconds for a frame.

pub mod frames;
mod frontend;
mod log;
mod loopback;
mod memory;
mod pace;
mod plan;
mod port;
mod report;
mod ring;
mod run;

pub use plan::{Plan, Role};
pub use report::{Latency, PortReport, Report};
pub use run::{Generator, Rig};
