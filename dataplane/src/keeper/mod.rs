//! A process beside the switch that keeps its connections while it is gone.
//!
//! A frontend whose connection ends takes its guest's link down. When it comes up again the guest has forgotten all addresses,
//! and what it asks for meanwhile is lost and asked again after a second. So the descriptors of each connection are kept by
//! another process, small and with nothing to do: should the switch die, frontends notice nothing, and the next switch goes
//! on with what it is given.
//!
//! What is kept of a port is what a takeover hands over ([`VhostRecord`](crate::handover::VhostRecord)), given anew whenever
//! the port's frontend has said something and then been quiet for a moment. In between, a [`Stamp`] says that it is out of
//! date; then it is not given to anybody, and closed when the switch dies, so that the frontend connects anew as if there
//! were no keeper.
//!
//! ```text
//!   switch ── "keep this of port vm1", descriptors ──▶ keeper      whenever something has changed
//!   switch ── "forget port vm1" ─────────────────────▶ keeper      when its connection has ended
//!   ✝
//!   next   ── hello ─────────────────────────────────▶ keeper
//!   next   ◀───────── all that is up to date, descriptors ── keeper
//! ```

#![forbid(unsafe_code)]

mod client;
mod serve;
mod stamp;

pub use client::{Keeper, KeeperError, Kept, Watch};
pub use serve::{bind, serve};
pub use stamp::Stamp;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// For how long what nobody looks after is kept. Guests' links are up meanwhile, but nothing gets through.
pub const GRACE: Duration = Duration::from_secs(5);

/// For the other side to take or send a whole record.
const LIMIT: Duration = Duration::from_millis(500);

/// Where the keeper of a state directory listens.
pub fn socket(state: &Path) -> PathBuf {
    state.join("keeper.sock")
}

/// What a switch says. Keeper and switch may be of different builds: what one does not know it leaves out.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    /// First of all: the format of its records, and whether any other switch must be dead by now. It is answered by
    /// [`Answer`].
    Hello { version: u32, alone: bool },
    /// What there is of a port, in place of what was said before. Descriptors go along; `stamp` is the place of one.
    /// `connection` is the number of the connection, by which later ones are known; an older switch has none.
    Keep {
        port: String,
        path: PathBuf,
        stamp: u32,
        #[serde(default)]
        connection: u64,
        record: Box<RawValue>,
    },
    /// The port has no connection any more, but for later ones: a thread that hung may say so when it is long gone.
    Forget {
        port: String,
        #[serde(default)]
        connection: u64,
    },
    /// Nothing is wanted but what this switch has given, and these.
    Settled { ports: Vec<String> },
    /// It ends, and nothing is to be kept.
    End,
}

/// What is up to date and has no owner.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    ports: Vec<KeptRecord>,
}

/// What there is of a port.
#[derive(Debug, Serialize, Deserialize)]
struct KeptRecord {
    port: String,
    path: PathBuf,
    /// How many of the descriptors that go along are the port's, which follow those of the port before.
    fds: u32,
    record: Box<RawValue>,
}

#[cfg(test)]
mod tests;
