//! Tools for measuring the switch.

pub mod cpu;
pub mod driver;
pub mod load;
pub mod pair;
pub mod suite;
