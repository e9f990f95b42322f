//! Waiting for conditions, never for the clock.

use anyhow::{Result, bail};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often conditions are looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Looks at `condition` until it gives a value; an error of the condition ends the wait at once.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        sleep(PERIOD);
    }
}

/// [`until`] for a condition that is merely true or false.
pub fn until_true(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(condition()?.then_some(())))
}

/// Waits until a value has stayed as it is for some time; gives it.
pub fn until_stays<T: PartialEq>(
    what: &str,
    limit: Duration,
    time: Duration,
    mut read: impl FnMut() -> Result<T>,
) -> Result<T> {
    let (mut last, mut since) = (read()?, Instant::now());
    until_true(what, limit, || {
        let now = read()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        Ok(since.elapsed() >= time)
    })?;
    Ok(last)
}
