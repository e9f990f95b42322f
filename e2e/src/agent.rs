//! The host's end of the agent in a guest.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// What the agent needs beyond the time of the work itself.
const SLACK: Duration = Duration::from_secs(20);

/// A connection to a guest's agent; one request at a time.
#[derive(Debug)]
pub struct Agent {
    reader: BufReader<UnixStream>,
    /// A line whose end has not come yet.
    partial: Vec<u8>,
}

impl Agent {
    /// Connects to the socket of the guest's agent port.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        Ok(Self { reader: BufReader::new(stream), partial: Vec::new() })
    }

    /// The next line, if it comes within a moment.
    fn poll_line(&mut self) -> Result<Option<Value>> {
        match self.reader.read_until(b'\n', &mut self.partial) {
            Ok(0) => bail!("the guest's agent port is closed"),
            Ok(_) => {
                let line = std::mem::take(&mut self.partial);
                let said = || format!("the agent said: {}", String::from_utf8_lossy(&line));
                Ok(Some(serde_json::from_slice(&line).with_context(said)?))
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e).context("cannot read from the agent"),
        }
    }

    /// Whether the agent has announced itself since we last asked, which it does once per boot.
    pub fn poll_hello(&mut self) -> Result<bool> {
        Ok(self.poll_line()?.is_some_and(|line| line["hello"].is_string()))
    }

    /// Sends a request; the answer has to come within `limit` plus some slack.
    pub fn call(&mut self, request: &Value, limit: Duration) -> Result<Value> {
        self.send(request)?;
        self.receive(request, limit)
    }

    /// Sends a request without waiting for its answer.
    pub fn send(&mut self, request: &Value) -> Result<()> {
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes()).context("cannot write to the agent")
    }

    /// Waits for the answer to a request sent before.
    pub fn receive(&mut self, request: &Value, limit: Duration) -> Result<Value> {
        let start = Instant::now();
        while start.elapsed() < limit + SLACK {
            let Some(mut line) = self.poll_line()? else {
                continue;
            };
            if line["hello"].is_string() {
                bail!("the guest rebooted during {request}");
            }
            if let Some(error) = line["error"].as_str() {
                bail!("{error} ({request})");
            }
            return Ok(line["ok"].take());
        }
        bail!("no answer from the agent in {} s to {request}", (limit + SLACK).as_secs())
    }

    /// Runs a shell command in the guest; gives its exit code and output.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<(i64, String)> {
        let request = json!({"op": "run", "command": command, "seconds": limit.as_secs().max(1)});
        let answer = self.call(&request, limit)?;
        let output = [&answer["out"], &answer["err"]].map(|text| text.as_str().unwrap_or_default()).concat();
        Ok((answer["code"].as_i64().unwrap_or(-1), output))
    }
}
