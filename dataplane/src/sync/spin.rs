//! A spin lock for state that workers share for the length of one burst.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a worker waits for another one: several times what the slowest burst takes, of super-packets that have to be
/// segmented.
const PATIENCE: Duration = Duration::from_millis(1);
/// Turns between two looks at the clock.
const TURNS: u32 = 64;

/// Mutual exclusion among workers. The control side takes it only for rings that are no longer published.
#[derive(Debug, Default)]
pub struct SpinLock<T> {
    /// Counts takings and releases: odd while it is held.
    state: AtomicU64,
    /// The `state` that somebody has waited for in vain.
    given_up: AtomicU64,
    value: UnsafeCell<T>,
}

// SAFETY: an odd state admits one holder at a time, so `T` moves between threads but is never shared.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self { state: AtomicU64::new(0), given_up: AtomicU64::new(0), value: UnsafeCell::new(value) }
    }

    /// Takes the lock if it is free.
    #[inline]
    pub fn try_lock(&self) -> Option<SpinGuard<'_, T>> {
        let free = self.state.load(Ordering::Relaxed);
        if free & 1 == 1 {
            return None;
        }
        let held = free + 1;
        self.state.compare_exchange(free, held, Ordering::Acquire, Ordering::Relaxed).ok()?;
        Some(SpinGuard { lock: self, held })
    }

    /// Takes the lock, spinning until its holder has finished its burst.
    #[inline]
    pub fn lock(&self) -> SpinGuard<'_, T> {
        loop {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            std::hint::spin_loop();
        }
    }

    /// As [`SpinLock::lock`], but not for longer than that.
    pub fn lock_within(&self, patience: Duration) -> Option<SpinGuard<'_, T>> {
        let begun = Instant::now();
        loop {
            match self.try_lock() {
                None if begun.elapsed() <= patience => std::hint::spin_loop(),
                outcome => return outcome,
            }
        }
    }

    /// Takes the lock, spinning while its holder finishes its burst, but not for long: a holder that has lost its CPU must
    /// not take the others' time with it. Who has waited in vain once is not followed by others: nobody waits for
    /// the same hold again, who comes later gets `None` at once.
    #[inline]
    pub fn lock_in_time(&self) -> Option<SpinGuard<'_, T>> {
        self.try_lock().or_else(|| self.wait())
    }

    #[cold]
    #[inline(never)]
    fn wait(&self) -> Option<SpinGuard<'_, T>> {
        let first = self.state.load(Ordering::Relaxed);
        let begun = Instant::now();
        for turn in 1u32.. {
            if let Some(guard) = self.try_lock() {
                return Some(guard);
            }
            let state = self.state.load(Ordering::Relaxed);
            if state & 1 == 1 && state == self.given_up.load(Ordering::Relaxed) {
                return None;
            }
            if turn.is_multiple_of(TURNS) && begun.elapsed() > PATIENCE {
                if state == first {
                    self.given_up.store(state, Ordering::Relaxed);
                }
                return None;
            }
            std::hint::spin_loop();
        }
        None
    }
}

/// Access to the value of a [`SpinLock`].
#[derive(Debug)]
pub struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    held: u64,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while this thread holds the lock.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard exists only while this thread holds the lock, and it is borrowed uniquely.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.lock.state.store(self.held + 1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_hold_that_takes_too_long_is_waited_for_once() {
        let lock = SpinLock::new(0u64);
        let held = lock.lock();
        let begun = Instant::now();
        assert!(lock.lock_in_time().is_none());
        assert!(begun.elapsed() >= PATIENCE);
        // Many times at once, not one millisecond each.
        let begun = Instant::now();
        assert!((0..1000).all(|_| lock.lock_in_time().is_none()));
        assert!(begun.elapsed() < 500 * PATIENCE);
        drop(held);
        *lock.lock_in_time().unwrap() += 1;
        // The next hold is waited for again.
        let held = lock.lock();
        let begun = Instant::now();
        assert!(lock.lock_in_time().is_none());
        assert!(begun.elapsed() >= PATIENCE);
        drop(held);
        assert_eq!(*lock.lock(), 1);
    }

    #[test]
    fn a_short_hold_is_waited_for() {
        let lock = Arc::new(SpinLock::new(0u64));
        let other = lock.clone();
        let held = lock.lock();
        let waiting = std::thread::spawn(move || {
            let begun = Instant::now();
            // On a busy machine the holder may lose its CPU, as this is made for.
            while begun.elapsed() < Duration::from_secs(10) {
                if let Some(mut guard) = other.lock_in_time() {
                    *guard += 1;
                    return true;
                }
            }
            false
        });
        std::thread::sleep(Duration::from_micros(300));
        drop(held);
        assert!(waiting.join().unwrap());
        assert_eq!(*lock.lock(), 1);
    }

    #[test]
    fn excludes() {
        let lock = Arc::new(SpinLock::new(0u64));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let lock = lock.clone();
                std::thread::spawn(move || (0..10_000).for_each(|_| *lock.lock() += 1))
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*lock.lock(), 40_000);
        let held = lock.lock();
        assert!(lock.try_lock().is_none());
        drop(held);
        assert!(lock.try_lock().is_some());
    }
}
