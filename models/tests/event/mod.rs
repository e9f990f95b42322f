//! An eventfd: it remembers a signal until somebody has waited for it.

use loom::sync::{Condvar, Mutex};

/// A counter that is either zero or not.
#[derive(Default)]
pub(crate) struct Event {
    signalled: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    /// Makes it readable.
    pub(crate) fn signal(&self) {
        if let Ok(mut signalled) = self.signalled.lock() {
            *signalled = true;
            self.changed.notify_all();
        }
    }

    /// Waits until it is readable, and reads it. Loom reports it if nobody ever signals.
    pub(crate) fn wait(&self) {
        let mut guard = self.signalled.lock();
        loop {
            match guard {
                Ok(mut signalled) if *signalled => {
                    *signalled = false;
                    return;
                }
                Ok(signalled) => guard = self.changed.wait(signalled),
                Err(_) => return,
            }
        }
    }
}
