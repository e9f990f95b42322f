//! What the switch and the other daemons have in common as processes: [`pages`] for those who watch over them, the
//! [`listener`] and [`connections`] for that, and [`capabilities`] that they give up.

pub mod capabilities;
pub mod connections;
pub mod listener;
pub mod pages;
