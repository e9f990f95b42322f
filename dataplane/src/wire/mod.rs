//! Packet formats. (The wire branch replaces this file.)
pub use eth::MacAddr;
pub mod eth;
