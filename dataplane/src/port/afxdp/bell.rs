//! What wakes a worker when frames arrive, for as long as it wants to be woken.
//!
//! The kernel wakes whoever waits for a socket for each frame that it receives, and again for each that it has sent. A
//! worker that polls has no use for that, and it is a tenth of what a frame costs. So the worker does not wait for the
//! socket but for an epoll instance, to which the socket belongs only while the worker is about to sleep, or asleep.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::socket::Socket;

/// Readable while a socket that it listens to is.
#[derive(Debug)]
pub(super) struct Bell {
    epoll: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> Result<Self> {
        // SAFETY: no pointers are passed, and the descriptor that comes back is ours alone.
        unsafe {
            let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            if fd < 0 { Err(Error::last_os_error()) } else { Ok(Self { epoll: OwnedFd::from_raw_fd(fd) }) }
        }
    }

    /// Rings from now on, and at once if there are frames.
    pub(super) fn listen(&self, socket: &Socket) {
        self.control(libc::EPOLL_CTL_ADD, socket);
    }

    /// Does not ring any more.
    pub(super) fn ignore(&self, socket: &Socket) {
        self.control(libc::EPOLL_CTL_DEL, socket);
    }

    fn control(&self, operation: libc::c_int, socket: &Socket) {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        // What can fail here is to do what was done already.
        // SAFETY: the kernel reads the local; both descriptors are open as long as their owners live.
        unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, socket.as_raw_fd(), &raw mut event) };
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
