//! Event file descriptors: how a ring's two sides wake each other.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// Why a descriptor was refused.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// It is something else; writing to it could block a worker.
    #[error("a ring's notification descriptor is not an eventfd")]
    NotEventFd,
    /// The kernel refused.
    #[error("cannot prepare a ring's notification descriptor: {0}")]
    Io(#[from] std::io::Error),
}

/// An eventfd received from the frontend, in non-blocking mode.
#[derive(Debug)]
pub struct EventFd(File);

impl EventFd {
    /// Checks that the descriptor is an eventfd and makes it non-blocking.
    ///
    /// # Errors
    /// [`NotifyError`] if it is none.
    pub fn from_file(file: File) -> Result<Self, NotifyError> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[eventfd]" {
            return Err(NotifyError::NotEventFd);
        }
        // SAFETY: plain flag changes on a descriptor we own.
        let done = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
        };
        if done { Ok(Self(file)) } else { Err(std::io::Error::last_os_error().into()) }
    }

    /// A new eventfd of our own.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours alone.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Wakes whoever waits for it. A full counter means that it is awake already.
    #[inline]
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: writes eight bytes from a local. The result does not matter: see above.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Resets the counter. Never waits, even if the frontend has made the descriptor, which it shares with us,
    /// blocking again.
    #[inline]
    pub fn drain(&self) {
        let mut count = 0u64;
        let buffer = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 8 };
        // SAFETY: reads eight bytes into a local; when there is nothing to read it stays as it is.
        unsafe { libc::preadv2(self.0.as_raw_fd(), &buffer, 1, -1, libc::RWF_NOWAIT) };
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eventfds() {
        assert!(matches!(EventFd::from_file(File::open("/dev/null").unwrap()), Err(NotifyError::NotEventFd)));
        let event = EventFd::from_file(EventFd::new().unwrap().0).unwrap();
        event.drain();
        event.signal();
        event.signal();
        event.drain();
    }

    #[test]
    fn draining_never_blocks() {
        let event = EventFd::new().unwrap();
        // SAFETY: plain flag change on a descriptor that is open.
        assert_eq!(unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) }, 0);
        event.signal();
        event.drain();
        event.drain();
        let mut polled = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one local, as the length says.
        assert_eq!(unsafe { libc::poll(&mut polled, 1, 0) }, 0, "drained");
    }
}
