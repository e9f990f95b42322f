//! The plugin as a runtime runs it: the real binary, against a real switch.

// Helpers of tests are not tests to the linter.
#![allow(clippy::unwrap_used)]

mod conformance;
mod libcni;
mod lifecycle;
mod support;
