//! `cargo xtask …`: the only entry point people need.
fn main() {}
