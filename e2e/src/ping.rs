//! A guest's ping in the background, every 10 ms, and what it saw.

use anyhow::{Context, Result, ensure};
use std::time::Duration;

use crate::qemu::Guest;

/// Time between two pings.
pub const PERIOD: Duration = Duration::from_millis(10);

/// What became of the pings.
#[derive(Debug, Clone)]
pub struct Pings {
    /// Sent up to the last one that was answered (one may still be under way).
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
    guest.run(&format!("(ping -i 0.01 -W 1 {address} >/tmp/ping) >/dev/null 2>&1 &")).map(drop)
}

/// Ends the ping.
///
/// # Errors
/// If a ping was answered twice, or none was.
pub fn end(guest: &Guest) -> Result<Pings> {
    guest.run("killall -INT ping; usleep 300000")?;
    let text = guest.run("sed -n 's/.*seq=\\([0-9]*\\) .*time=\\([0-9.]*\\) ms.*/\\1 \\2/p' /tmp/ping")?;
    let mut seen = Vec::new();
    let mut slowest = 0f64;
    for line in text.lines() {
        let (number, time) = line.trim().split_once(' ').with_context(|| format!("ping printed {line:?}"))?;
        seen.push(number.parse::<u64>()?);
        slowest = slowest.max(time.parse()?);
    }
    seen.sort_unstable();
    ensure!(seen.windows(2).all(|pair| pair[0] != pair[1]), "pings were answered twice");
    let sent = seen.last().context("no ping was answered")? + 1;
    let first = seen.first().copied().unwrap_or(0);
    let gaps = seen.windows(2).map(|pair| pair[1] - pair[0] - 1);
    Ok(Pings {
        sent,
        lost: sent - seen.len() as u64,
        lost_in_a_row: gaps.chain([first]).max().unwrap_or(0),
        slowest: Duration::from_secs_f64(slowest / 1e3),
    })
}
