//! What wakes a worker when frames arrive, for as long as it wants to be woken, and when frames have to be sent once more.
//!
//! The kernel wakes whoever waits for a socket for each frame that it receives, and again for each that it has sent. A
//! worker that polls has no use for that, and it is a tenth of what a frame costs. So the worker does not wait for the
//! socket but for an epoll instance, to which the socket belongs only while the worker is about to sleep, or asleep.

use std::io::Result;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::socket::Socket;
use crate::virtq::notify::EventFd;

/// Readable while a socket that it listens to is, or the alarm is raised.
#[derive(Debug)]
pub(super) struct Bell {
    epoll: OwnedFd,
}

impl Bell {
    /// One that also rings when the alarm is raised.
    pub(super) fn new(alarm: &EventFd) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, alarm, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self { epoll })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rings(bell: &Bell) -> bool {
        let mut polled = libc::pollfd { fd: bell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one local, as the length says.
        unsafe { libc::poll(&mut polled, 1, 0) == 1 }
    }

    #[test]
    fn an_alarm_rings_until_it_is_heard() {
        let alarm = EventFd::new().unwrap();
        let bell = Bell::new(&alarm).unwrap();
        for _ in 0..3 {
            assert!(!rings(&bell));
            alarm.signal();
            alarm.signal();
            assert!(rings(&bell) && rings(&bell));
            alarm.drain();
        }
    }
}
