//! The planned upgrade: a new process takes over from a running one, over its control socket.
//!
//! ```text
//!   new                                             old
//!    │ greeting, version ───────────────────────────▶ │ ports' threads stand still, frames flow
//!    │ ◀────────────────── offer: all that there is, descriptors │
//!    │ maps memory, makes rings                       │
//!    │ prepared ─────────────────────────────────────▶ │ workers let go of all queues
//!    │ ◀──────────────────────── standing: where each ring is │
//!    │ makes its queues                               │
//!    │ ready ────────────────────────────────────────▶ │
//!    │ ◀────────────────────────────────────────── go │ exits, touching nothing
//!    │ its workers begin                              ▼
//! ```
//!
//! Until it has said `go` the old process can go back: if the new one fails, hangs up or is silent for too long, its ports
//! and workers go on as if nothing had been. Before it has heard `go` the new one changes nothing that the old one would miss: it
//! opens the metrics listener if that is another, asks the keeper to be heard, and shares the rings' journal. So there is never
//! a moment at which both forward.

mod give;
mod record;
mod take;
pub(crate) mod wire;

pub use give::{GiveError, Listeners, give};
pub use record::{DeviceRecord, RegionRecord, RingRecord, StatsRecord, VhostRecord};
pub(crate) use record::{FdbRecord, KindRecord, LogRecord, PlaceRecord};
pub use take::{TakeError, Takeover};
pub use wire::{Fds, WireError};
pub(crate) use wire::{is_greeting, own_uid};

/// Format of the records. Another one is refused, and the old process goes on.
pub const VERSION: u32 = 1;
