//! A vhost-user frontend of our own, with every byte of its messages and of its memory under control.
//!
//! It is no virtual machine: the "guest" is this process, which drives the rings by itself, by the book or against it.
//! [`arena`] brings such a frontend to a running switch, beside two well-behaved ones whose traffic is measured all the
//! while ([`pair`]).
//!
//! - [`memory`] is a guest's memory, [`queue`] a virtqueue's driver in it, split or packed.
//! - [`channel`] is the socket, [`message`] what goes over it.
//! - [`frontend`] puts them together.

pub mod arena;
pub mod channel;
pub mod frontend;
pub mod memory;
pub mod message;
pub mod pair;
pub mod queue;
pub mod random;

use anyhow::{Context, Result};
use std::fs::File;
use std::os::fd::FromRawFd;

use crate::{machine, process};

/// A new eventfd, non-blocking.
pub fn eventfd() -> Result<File> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    owned(fd, "eventfd")
}

/// A memory file of `len` bytes.
pub fn memfd(len: u64) -> Result<File> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    let file = owned(fd, "memory file")?;
    file.set_len(len).context("cannot size a memory file")?;
    Ok(file)
}

fn owned(fd: i32, what: &str) -> Result<File> {
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot make a new {what}"));
    }
    // SAFETY: the descriptor is new and ours alone.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Keeps this thread, and those that it starts, away from the switch's CPU.
pub fn leave_the_switch_alone() -> Result<()> {
    let cpus = machine::cpus()?.load;
    process::set_cpus(0, &cpus).context("cannot leave the switch's CPU")
}

/// A small generator of numbers (xorshift64*), so that every run can be repeated from its seed.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.any() % bound.max(1)
    }

    /// Whether something of that probability, in percent, happens.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> Option<T> {
        items.get(self.below(items.len() as u64) as usize).copied()
    }

    /// A number that breaks things more often than others: small, at an edge, or anything.
    pub fn nasty(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => 1u64.checked_shl(self.below(64) as u32).unwrap_or(0).wrapping_sub(self.below(3)),
            2 => u64::MAX - self.below(3),
            3 => 1u64.checked_shl(self.below(64) as u32).unwrap_or(0),
            4 => self.below(1 << 16),
            _ => self.any(),
        }
    }
}
