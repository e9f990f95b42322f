//! A kubelet that is not one, but speaks the same wire protocol in the same order, and a node to run the plugin on.
//!
//! Other crates' tests can use it by path.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "tests of several crates use it, and none uses all of it"
)]

pub mod authority;
mod fake_kubelet;
mod node;

pub use fake_kubelet::{FakeKubelet, Pod};
pub use node::{Node, Plugin};

use std::time::{Duration, Instant};

/// How long anything may take before a test fails. Nothing that works comes near it.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const SOCKETS: &str = "sluice.io/sockets";
pub const DATAPLANE: &str = "sluice.io/dataplane";

/// Waits until `ready` gives something.
pub async fn until<T>(what: &str, mut ready: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready().await {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
