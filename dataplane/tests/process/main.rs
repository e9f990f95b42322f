//! The real process under attack, and under its own restrictions.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod daemon;
mod faults;
mod keeper;
mod memory;
mod restrictions;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "../vhost_session/support.rs"]
mod support;
mod trace;
mod vm;
