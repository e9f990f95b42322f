//! What the switch and the device plugin have in common as processes: [`pages`] for those who watch over them, and
//! [`capabilities`] that they give up.

pub mod capabilities;
pub mod pages;
