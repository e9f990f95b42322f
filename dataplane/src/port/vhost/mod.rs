//! vhost-user ports: virtual machines whose virtio-net device we are the backend of.
//!
//! Each port has a thread of its own, which does nothing but talk to the frontend (QEMU); frames are the business of
//! the workers, which only ever see the [`Link`](crate::port::Link) that this thread publishes.
//!
//! ```text
//!                    ┌─────────────── retry after 50 ms to 1 s ───────────────┐
//!                    ▼                                                       │
//!   start ──▶  Connecting ── connect / accept ──▶ Down ── a ring is started  │
//!               (waits for                         │ ▲    and enabled ──▶ Up │
//!                the socket)                       │ └── the last ring ◀──┤  │
//!                    ▲                             │     stops            │  │
//!                    ├────── the frontend hangs up ┴──────────────────────┤  │
//!                    │                                                    ▼  │
//!                    └─────────────────────────────── refused message ▶ Failed
//! ```
//!
//! - `port` is what the switch starts, pauses and stops; `connection` is its thread: it finds the frontend, waits for
//!   messages, ends promptly when told to.
//! - `socket` connects and listens in directories that others can write to, which `place` finds its way in.
//! - `message` knows messages on the wire, and which of them the `vhost` crate must not see; `answer` handles those.
//! - `gate` bounds what a frontend can make us log.
//! - `handler` is the device: what each message does to features, memory and rings.
//! - `pause` has the thread end, or stand still while `parcel` takes the port to another process.
//! - [`hold`] keeps frames for a guest that migrates, or whose rings are being changed.
//! - `ring` is one vring's setup; [`queue`] is how workers use it.
//! - [`features`] is what we offer.
//!
//! Whatever a frontend does wrong ends its connection with a reason in the link, and nothing else. Reconnecting is what
//! resets a port, since all state but its counters belongs to the connection.

mod answer;
mod connection;
pub mod features;
mod gate;
mod handler;
pub mod hold;
mod message;
mod parcel;
mod pause;
mod place;
mod port;
pub mod queue;
mod ring;
mod socket;

pub use parcel::{AdoptError, Parcel};
pub use pause::Paused;
pub use place::SocketPlace;
pub use port::{Adopted, Setup, VhostPort, serve_once};
pub use ring::Standing;
pub(crate) use socket::remove_socket;
