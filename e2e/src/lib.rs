//! Harness of the systems tests: real guests, real drivers, real traffic.
//!
//! Everything started here ends with the process that started it, however that
//! process ends: see [`process`] (children) and [`scratch`] (files, links).

pub mod agent;
pub mod hostile;
pub mod image;
pub mod lab;
pub mod machine;
pub mod net;
pub mod peer;
pub mod ping;
pub mod process;
pub mod qemu;
pub mod scratch;
pub mod soak;
pub mod switch;
pub mod testpmd;
pub mod wait;
