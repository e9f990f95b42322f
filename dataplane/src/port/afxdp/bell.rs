//! What wakes a worker when frames arrive, for as long as it wants to be woken.
//!
//! The kernel wakes whoever waits for a socket for each frame that it receives, and again for each that it has sent. A
//! worker that polls has no use for that, and it is a tenth of what a frame costs. So the worker does not wait for the
//! socket but for an epoll instance, to which the socket belongs only while the worker is about to sleep, or asleep.

use std::io::Result;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::socket::Socket;

/// Readable while a socket that it listens to is.
#[derive(Debug)]
pub(super) struct Bell {
    epoll: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Rings from now on, and at once if there are frames.
    pub(super) fn listen(&self, socket: &Socket) {
        // It can only fail if it was done already.
        let _ = epoll::add(&self.epoll, socket, EventData::new_u64(0), EventFlags::IN);
    }

    /// Does not ring any more.
    pub(super) fn ignore(&self, socket: &Socket) {
        // As above.
        let _ = epoll::delete(&self.epoll, socket);
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
