//! Tools for measuring the switch.

pub mod driver;
