//! What wakes a worker when frames arrive, for as long as it wants to be woken.
//!
//! The kernel wakes whoever waits for a socket for each frame that it receives, and again for each that it has sent. A
//! worker that polls has no use for that, and it is a tenth of what a frame costs. So the worker does not wait for the
//! socket but for an epoll instance, to which the socket belongs only while the worker is about to sleep, or asleep.

use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

/// Readable while a socket that it listens to is.
#[derive(Debug)]
pub(super) struct Bell {
    epoll: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Rings from now on, and at once if there are frames. `false` if the kernel has no room for that.
    pub(super) fn listen(&self, socket: &impl AsFd) -> bool {
        let done = epoll::add(&self.epoll, socket, EventData::new_u64(0), EventFlags::IN);
        matches!(done, Ok(()) | Err(Errno::EXIST))
    }

    /// Does not ring any more.
    pub(super) fn ignore(&self, socket: &impl AsFd) {
        // It can only fail if it did not listen.
        let _ = epoll::delete(&self.epoll, socket);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtq::notify::EventFd;

    #[test]
    fn a_bell_that_cannot_ring_says_so() {
        let (bell, event) = (Bell::new().unwrap(), EventFd::new().unwrap());
        assert!(bell.listen(&event));
        assert!(bell.listen(&event), "it does already");
        // What epoll takes no descriptors into.
        let mute = Bell { epoll: event.as_fd().try_clone_to_owned().unwrap() };
        assert!(!mute.listen(&bell.epoll));
    }
}
