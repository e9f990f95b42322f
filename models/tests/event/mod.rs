//! An eventfd: it remembers a signal until somebody has waited for it.

use loom::sync::Notify;

/// A counter that is either zero or not.
pub(crate) struct Event(Notify);

impl Default for Event {
    fn default() -> Self {
        Self(Notify::new())
    }
}

impl Event {
    /// Makes it readable.
    pub(crate) fn signal(&self) {
        self.0.notify();
    }

    /// Waits until it is readable, and reads it. Loom reports it if nobody ever signals.
    pub(crate) fn wait(&self) {
        self.0.wait();
    }
}
