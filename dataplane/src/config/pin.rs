//! Queues that an operator has pinned to a worker, as text: `PORT[:QUEUE]=WORKER`.

use std::fmt;
use std::str::FromStr;

use super::{number, rules};
use crate::limits::{MAX_QUEUE_PAIRS, MAX_WORKERS};

/// A queue of a port, or all of them: `PORT[:QUEUE]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortQueue {
    /// Name of the port.
    pub port: String,
    /// Index of the queue pair; `None` for all.
    pub queue: Option<usize>,
}

/// A queue that one worker serves, whatever the load. That of one queue goes before that of all of its port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// Which.
    pub queue: PortQueue,
    /// Index of the worker.
    pub worker: usize,
}

impl fmt::Display for PortQueue {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.port)?;
        self.queue.map_or(Ok(()), |queue| write!(out, ":{queue}"))
    }
}

impl FromStr for PortQueue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (port, queue) = match text.split_once(':') {
            Some((port, queue)) => (port, Some(number("queue", queue, 0..=MAX_QUEUE_PAIRS - 1)?)),
            None => (text, None),
        };
        rules::check_name("name", port).map_err(|error| error.problem)?;
        Ok(Self { port: port.into(), queue })
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}={}", self.queue, self.worker)
    }
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (queue, worker) =
            text.split_once('=').ok_or_else(|| format!("'{text}' is not of the form PORT[:QUEUE]=WORKER"))?;
        Ok(Self { queue: queue.parse()?, worker: parse_worker(worker)? })
    }
}

/// The index of a worker.
///
/// # Errors
/// One line for the operator.
pub fn parse_worker(text: &str) -> Result<usize, String> {
    number("worker", text, 0..=MAX_WORKERS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read_again() {
        for text in ["vm1=0", "vm1:0=1", "a.b-c_d:255=63"] {
            assert_eq!(text.parse::<Pin>().unwrap().to_string(), text);
        }
        let pin: Pin = "vm1:3=2".parse().unwrap();
        assert_eq!((pin.queue.port.as_str(), pin.queue.queue, pin.worker), ("vm1", Some(3), 2));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("vm1", "not of the form"),
            ("=1", "name must be"),
            ("a b=1", "name must be"),
            ("vm1:=1", "queue must be a number from 0 to 255"),
            ("vm1:256=1", "queue must be a number from 0 to 255"),
            ("vm1:-1=1", "queue must be a number"),
            ("vm1=64", "worker must be a number from 0 to 63"),
            ("vm1=", "worker must be a number"),
        ] {
            let found = text.parse::<Pin>().unwrap_err();
            assert!(found.contains(expected), "{text}: {found}");
        }
    }
}
