//! How a port's thread is told to end, or to stand still, whatever it waits for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::port::vhost::parcel::Parcel;
use crate::sync::lock;
use crate::virtq::notify::{EventFd, Pulse, allow_interrupts};

/// Pause between two interruptions of a thread that does not answer.
pub(super) const INSIST: Duration = Duration::from_millis(10);

/// How long before the deadline a thread that is to stand still is interrupted. By then the rest of a message has come, or
/// never will.
const LAST: Duration = Duration::from_millis(900);

/// What others say to the thread.
#[derive(Debug)]
pub(super) struct Orders {
    /// Readable when there is something new.
    event: EventFd,
    end: AtomicBool,
    pause: Mutex<Option<Pause>>,
    /// The connection, while there is one; shutting it down ends a wait within a message.
    stream: Mutex<Option<UnixStream>>,
    /// To interrupt it: closing a descriptor that a frontend has sent can wait for as long as that likes.
    thread: OnceLock<Pulse>,
}

/// The thread's side of a request to stand still.
#[derive(Debug)]
struct Pause {
    parcel: Sender<io::Result<Parcel>>,
    over: Receiver<()>,
}

/// A thread that was asked to stand still. It goes on when this is dropped.
#[derive(Debug)]
pub struct Paused {
    parcel: Receiver<io::Result<Parcel>>,
    orders: Arc<Orders>,
    _over: Sender<()>,
}

impl Paused {
    /// What the port consists of, once its thread stands still. `None` if that takes too long.
    ///
    /// # Errors
    /// If the process has no descriptors left to duplicate.
    pub fn parcel(&self, deadline: Instant) -> io::Result<Option<Parcel>> {
        let last = deadline.checked_sub(LAST).unwrap_or(deadline);
        match self.orders.insist(&self.parcel, last, deadline) {
            Ok(parcel) => parcel.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the port's thread has ended")),
        }
    }
}

impl Orders {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new()?,
            end: AtomicBool::new(false),
            pause: Mutex::default(),
            stream: Mutex::default(),
            thread: OnceLock::new(),
        })
    }

    /// For the thread, before anything else.
    pub(super) fn begin(&self) {
        allow_interrupts();
        // There is one thread only.
        let _ = self.thread.set(Pulse::of_this_thread());
    }

    /// Waits for the thread to say something until the deadline, and from `since` on gets it out of whatever it waits in.
    pub(super) fn insist<T>(
        &self,
        said: &Receiver<T>,
        since: Instant,
        deadline: Instant,
    ) -> Result<T, RecvTimeoutError> {
        let mut until = since;
        loop {
            match said.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                outcome => return outcome,
            }
            self.interrupt();
            until = Instant::now() + INSIST;
        }
    }

    /// Gets the thread out of whatever it waits in.
    pub(super) fn interrupt(&self) {
        self.thread.get().inspect(|thread| thread.interrupt());
    }

    /// Notes the connection that [`Orders::end`] is to shut down.
    pub(super) fn connected(&self, stream: Option<UnixStream>) {
        *lock(&self.stream) = stream;
    }

    /// Tells the thread to end.
    pub(super) fn end(&self) {
        self.end.store(true, Ordering::Release);
        self.event.signal();
        if let Some(stream) = &*lock(&self.stream) {
            // It fails only if the other side has already hung up.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Whether the thread is to end.
    pub(super) fn ended(&self) -> bool {
        self.end.load(Ordering::Acquire)
    }

    /// Asks the thread to stand still between two messages.
    pub(super) fn pause(self: &Arc<Self>) -> Paused {
        let ((send_parcel, parcel), (send_over, over)) = (mpsc::channel(), mpsc::channel());
        *lock(&self.pause) = Some(Pause { parcel: send_parcel, over });
        self.event.signal();
        Paused { parcel, orders: self.clone(), _over: send_over }
    }

    /// For the thread when it was woken: stands still if that was asked for.
    pub(super) fn obey(&self, pack: impl FnOnce() -> io::Result<Parcel>) {
        self.event.drain();
        let Some(pause) = lock(&self.pause).take() else { return };
        // Nobody may be waiting any more.
        if pause.parcel.send(pack()).is_ok() {
            let _ = pause.over.recv();
        }
    }
}

impl AsRawFd for Orders {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
