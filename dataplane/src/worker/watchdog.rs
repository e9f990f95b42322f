//! Gets threads out of writes that a frontend makes them wait in; see [`crate::virtq::notify`].

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::virtq::notify::{Pulse, allow_interrupts, sleep_until_write};

/// Pause between two looks while guests are notified. A write takes a few hundred nanoseconds.
const BUSY: Duration = Duration::from_millis(10);
/// The same while none are. With [`BUSY`], how long a frontend can hold up a worker, once.
const IDLE: Duration = Duration::from_millis(100);
/// After so many looks that found nothing, the next write wakes the watchdog: an idle switch wakes nobody up.
const QUIET_LOOKS: u32 = 20;
/// Longest sleep without a write.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Watches the workers, and who else notifies, until `stop` says to end. Unparking the thread makes it look.
///
/// # Errors
/// If the process has no thread left.
pub fn start(pulses: Vec<Arc<Pulse>>, stop: impl Fn() -> bool + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    allow_interrupts();
    let watch = move || {
        let look = || pulses.iter().chain(&Pulse::passing()).fold(false, |busy, pulse| busy | pulse.look());
        let mut quiet = QUIET_LOOKS;
        while !stop() {
            let busy = if quiet < QUIET_LOOKS {
                thread::park_timeout(if quiet == 0 { BUSY } else { IDLE });
                look()
            } else {
                sleep_until_write(look, LONGEST_SLEEP)
            };
            quiet = if busy { 0 } else { quiet + 1 };
        }
    };
    thread::Builder::new().name("sl-watchdog".into()).stack_size(64 << 10).spawn(watch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtq::notify::{EventFd, is_asleep};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    #[test]
    fn a_frontend_cannot_hold_up_a_worker() {
        let (pulse, stop): (Arc<Pulse>, Arc<AtomicBool>) = Default::default();
        let watchdog = {
            let stop = stop.clone();
            start(vec![pulse.clone()], move || stop.load(Ordering::Acquire)).unwrap()
        };
        // It sleeps by now, unless another test has just written something.
        let began = Instant::now();
        while !is_asleep(watchdog.thread()) && began.elapsed() < Duration::from_secs(5) {
            thread::yield_now();
        }
        let event = EventFd::new().unwrap();
        let full = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: a flag change on a descriptor that is open, and a write of eight bytes from a local.
        unsafe {
            assert_eq!(libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0), 0);
            assert_eq!(libc::write(event.as_raw_fd(), full.as_ptr().cast(), 8), 8);
        }
        let notify = move |event: &EventFd| {
            for _ in 0..3 {
                let began = Instant::now();
                assert!(!event.notify());
                // The bound of the design, and what a loaded machine adds.
                assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
            }
        };
        // A thread that is no worker, and one that is.
        thread::scope(|scope| scope.spawn(|| notify(&event)).join()).unwrap();
        let worker = thread::spawn(move || {
            pulse.begin();
            notify(&event);
            event.drain();
            assert!(event.notify());
        });
        worker.join().unwrap();
        stop.store(true, Ordering::Release);
        watchdog.thread().unpark();
        watchdog.join().unwrap();
    }
}
