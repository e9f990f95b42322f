//! Event file descriptors: how a ring's two sides wake each other.
//!
//! The frontend shares the descriptors that it gives us, and with them the mode they are in. It can make one blocking
//! again and fill its counter at any moment, so that a write to it waits, and the kernel has no way of writing to one
//! that never does. Therefore a thread shows in its [`Pulse`] when it is within such a write, and a watchdog
//! (`worker/watchdog.rs`) gets it out again by a signal.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::Duration;

use crate::sync::lock;

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

    /// Goes on as another one. Who notifies through it at that moment has notified one of the two.
    ///
    /// # Errors
    /// The kernel's.
    pub fn go_on_as(&self, other: Self) -> std::io::Result<()> {
        // SAFETY: no pointers; both descriptors are ours, and the number of this one stays so.
        let done = unsafe { libc::dup3(other.0.as_raw_fd(), self.0.as_raw_fd(), libc::O_CLOEXEC) };
        if done >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    /// Wakes whoever waits for it, which must be ourselves: see [`EventFd::notify`]. A full counter means that it is
    /// awake already.
    #[inline]
    pub fn signal(&self) {
        self.write();
    }

    /// Wakes the frontend, or the guest. `false` if the frontend made us wait, and the watchdog ended that.
    #[inline]
    pub fn notify(&self) -> bool {
        PULSE.with_borrow(|pulse| match pulse {
            Some(pulse) => pulse.around(|| self.write()),
            None => self.notify_in_passing(),
        })
    }

    /// The same by a thread that is no worker, and has a pulse for as long as this takes.
    #[cold]
    fn notify_in_passing(&self) -> bool {
        let pulse = Arc::new(Pulse::of_this_thread());
        lock(&PASSING).push(pulse.clone());
        let done = pulse.around(|| self.write());
        lock(&PASSING).retain(|other| !Arc::ptr_eq(other, &pulse));
        done
    }

    /// Adds one to the counter. `false` if that was interrupted.
    #[inline]
    fn write(&self) -> bool {
        let one = 1u64;
        // SAFETY: writes eight bytes from a local.
        let written = unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
        // Only a write that has to wait can be interrupted.
        written == 8 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted
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

thread_local! {
    /// Of this thread, if it is a worker's.
    static PULSE: RefCell<Option<Arc<Pulse>>> = const { RefCell::new(None) };
}

/// Those of threads that are no workers, and are within a write now.
static PASSING: Mutex<Vec<Arc<Pulse>>> = Mutex::new(Vec::new());

/// Watchdogs that sleep until there is a write, and whether there are any.
static ASLEEP: Mutex<Vec<Thread>> = Mutex::new(Vec::new());
static ANY_ASLEEP: AtomicBool = AtomicBool::new(false);

/// For a watchdog that has seen no write for a while: looks, sleeps until there is one or for that long, and looks again.
/// Returns what the looks found.
pub fn sleep_until_write(mut look: impl FnMut() -> bool, longest: Duration) -> bool {
    let this = thread::current();
    let mut asleep = lock(&ASLEEP);
    asleep.push(this.clone());
    ANY_ASLEEP.store(true, Ordering::Relaxed);
    drop(asleep);
    // With the one in `Pulse::around`: we see the write, or it sees that we sleep.
    fence(Ordering::SeqCst);
    let busy = look() || {
        thread::park_timeout(longest);
        look()
    };
    lock(&ASLEEP).retain(|thread| thread.id() != this.id());
    busy
}

#[cold]
fn wake_watchdogs() {
    let mut asleep = lock(&ASLEEP);
    ANY_ASLEEP.store(false, Ordering::Relaxed);
    asleep.drain(..).for_each(|thread| thread.unpark());
}

/// What a thread shows of its writes to descriptors of frontends. Each writes to its own for each notification: apart from
/// others', by the two lines that caches fetch together.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Pulse {
    /// Its kernel id; 0 until it runs.
    thread: AtomicI32,
    /// Begun and ended writes in sum: odd within one.
    writes: AtomicU32,
    /// What the watchdog saw of that last.
    seen: AtomicU32,
}

impl Pulse {
    /// One that shows nothing yet.
    pub fn of_this_thread() -> Self {
        // SAFETY: the call has no conditions.
        Self { thread: AtomicI32::new(unsafe { libc::gettid() }), ..Self::default() }
    }

    /// Makes it that of this thread.
    pub fn begin(self: &Arc<Self>) {
        // SAFETY: the call has no conditions.
        self.thread.store(unsafe { libc::gettid() }, Ordering::Release);
        PULSE.set(Some(self.clone()));
    }

    /// Those of threads that are no workers.
    pub fn passing() -> Vec<Arc<Self>> {
        lock(&PASSING).clone()
    }

    /// Shows a write.
    #[inline]
    fn around(&self, write: impl FnOnce() -> bool) -> bool {
        let writes = self.writes.load(Ordering::Relaxed);
        self.writes.store(writes.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if ANY_ASLEEP.load(Ordering::Relaxed) {
            wake_watchdogs();
        }
        let done = write();
        self.writes.store(writes.wrapping_add(2), Ordering::Relaxed);
        done
    }

    /// For the watchdog, from time to time: interrupts a write that was there the last time. Returns whether there is one, or
    /// was one since.
    pub fn look(&self) -> bool {
        let now = self.writes.load(Ordering::Relaxed);
        let before = self.seen.swap(now, Ordering::Relaxed);
        let is_within = now % 2 == 1;
        if is_within && now == before {
            self.interrupt();
        }
        is_within || now != before
    }

    /// Interrupts the thread, should it be waiting; once it has ended, nobody or another one. Any other system call that
    /// this hits is either not one that waits or one that is repeated.
    pub fn interrupt(&self) {
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: sends a signal, which has a handler, to a thread of our own.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, INTERRUPT) };
        }
    }
}

/// A signal that nobody else sends: by default it is ignored.
const INTERRUPT: libc::c_int = libc::SIGURG;

/// Lets the signal by which [`Pulse::interrupt`] works end a wait, and do nothing else.
pub fn allow_interrupts() {
    extern "C" fn nothing(_signal: libc::c_int) {}
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let handler: extern "C" fn(libc::c_int) = nothing;
        // SAFETY: an all-zero action is valid: no flags, so that calls are not restarted. The handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigaction(INTERRUPT, &action, std::ptr::null_mut());
        }
    });
}

/// Whether that thread is a watchdog that sleeps.
#[cfg(test)]
pub fn is_asleep(thread: &Thread) -> bool {
    lock(&ASLEEP).iter().any(|asleep| asleep.id() == thread.id())
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
