//! A guest's ping in the background, every 10 ms, and what it saw. By the agent: busybox's ping has room for a dozen answers,
//! and loses what comes in a burst while it waits for its CPU.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::Duration;

use crate::qemu::Guest;

/// Time between two pings.
pub const PERIOD: Duration = Duration::from_millis(10);

/// What became of the pings.
#[derive(Debug, Clone)]
pub struct Pings {
    /// Sent.
    pub sent: u64,
    /// Of those, not answered.
    pub lost: u64,
    /// The most that were lost in a row.
    pub lost_in_a_row: u64,
    /// The longest time that an answer took.
    pub slowest: Duration,
}

/// Begins to ping an address.
///
/// # Errors
/// If the guest does not answer.
pub fn begin(guest: &Guest, address: &str) -> Result<()> {
    guest.call(&begin_request(address)).map(drop)
}

/// Ends the ping.
///
/// # Errors
/// If a ping was answered twice, or none was.
pub fn end(guest: &Guest) -> Result<Pings> {
    read(&guest.call(&end_request())?)
}

/// What asks an agent to begin.
pub fn begin_request(address: &str) -> Value {
    json!({"op": "ping_begin", "to": address, "gap_ms": PERIOD.as_millis() as u64})
}

/// What asks an agent to end.
pub fn end_request() -> Value {
    json!({"op": "ping_end"})
}

/// Reads an agent's answer to [`end_request`].
///
/// # Errors
/// If a ping was answered twice, or none was.
pub fn read(tally: &Value) -> Result<Pings> {
    let number = |name: &str| tally[name].as_u64().with_context(|| format!("no {name} in {tally}"));
    ensure!(number("duplicates")? == 0, "pings were answered twice: {tally}");
    let lost: Vec<u64> = serde_json::from_value(tally["lost"].clone()).context("which pings were lost")?;
    let sent = number("sent")?;
    ensure!(sent > lost.len() as u64, "no ping was answered: {tally}");
    let rows = lost.chunk_by(|a, b| a + 1 == *b).map(|row| row.len() as u64);
    Ok(Pings {
        sent,
        lost: lost.len() as u64,
        lost_in_a_row: rows.max().unwrap_or(0),
        slowest: Duration::from_micros(number("slowest_us")?),
    })
}
