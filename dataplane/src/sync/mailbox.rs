//! A slot for the newest value: the writer overwrites, the reader takes. Neither waits.

use std::ptr;

use crate::sync::primitives::{Arc, AtomicPtr, Ordering};

/// Hands the newest `Arc<T>` from the control side to one worker without a lock.
#[derive(Debug)]
pub struct Mailbox<T> {
    slot: AtomicPtr<T>,
    /// An `Arc<T>` travels through the slot.
    owns: std::marker::PhantomData<Arc<T>>,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self { slot: AtomicPtr::new(ptr::null_mut()), owns: std::marker::PhantomData }
    }
}

impl<T> Mailbox<T> {
    /// Puts a value, dropping one that was not taken yet.
    pub fn put(&self, value: Arc<T>) {
        let old = self.slot.swap(Arc::into_raw(value).cast_mut(), Ordering::AcqRel);
        drop(Self::own(old));
    }

    /// Takes the value if there is a new one. One load when there is none.
    #[inline]
    pub fn take(&self) -> Option<Arc<T>> {
        if self.slot.load(Ordering::Relaxed).is_null() {
            return None;
        }
        Self::own(self.slot.swap(ptr::null_mut(), Ordering::AcqRel))
    }

    fn own(raw: *mut T) -> Option<Arc<T>> {
        // SAFETY: a non-null pointer in the slot came from `Arc::into_raw` in `put`, and the swap that
        // returned it to us removed it, so nobody else will turn it back into an `Arc`.
        (!raw.is_null()).then(|| unsafe { Arc::from_raw(raw) })
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_wins_and_nothing_leaks() {
        let mailbox = Mailbox::default();
        assert!(mailbox.take().is_none());
        let (a, b) = (Arc::new(1), Arc::new(2));
        mailbox.put(a.clone());
        mailbox.put(b.clone());
        assert_eq!(Arc::strong_count(&a), 1);
        assert_eq!(mailbox.take().as_deref(), Some(&2));
        assert!(mailbox.take().is_none());
        mailbox.put(a.clone());
        drop(mailbox);
        assert_eq!(Arc::strong_count(&a), 1);
    }
}
