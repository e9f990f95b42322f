//! A thread that looks after the interface of a port.

use std::io::Result;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::netlink::Netlink;
use crate::virtq::notify::EventFd;

/// The thread. It is told to end, and waited for, when this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

/// Whether the thread is to end.
#[derive(Debug)]
pub(super) struct End {
    is_set: AtomicBool,
    wake: EventFd,
}

impl Watch {
    pub(super) fn start(name: &str, run: impl FnOnce(&End) + Send + 'static) -> Result<Self> {
        let end = Arc::new(End { is_set: AtomicBool::new(false), wake: EventFd::new()? });
        let told = end.clone();
        let thread = std::thread::Builder::new().name(name.into()).stack_size(256 << 10);
        let thread = thread.spawn(move || run(&told))?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end.is_set.store(true, Ordering::Release);
        self.end.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl End {
    pub(super) fn has_come(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// Waits for it, for news, if any is wanted, or for a while, if not for ever.
    pub(super) fn wait(&self, news: Option<&Netlink>, time: Option<Duration>) {
        let news = news.map_or(self.wake.as_fd(), AsFd::as_fd);
        let mut fds = [self.wake.as_fd(), news].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let time = time.map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() });
        // Whatever it returns, who waits looks.
        let _ = poll(&mut fds, time.as_ref());
    }
}
