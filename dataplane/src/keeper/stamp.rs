//! Whether a connection has changed since the keeper was told of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

/// One byte that the switch writes and the keeper reads, and that outlives the switch: a message could not be sent any more,
/// or not be taken in time.
#[derive(Debug)]
pub struct Stamp(File);

const CURRENT: u8 = 1;

impl Stamp {
    /// One that says that what is kept is out of date.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(rustix::fs::memfd_create("sluice-stamp", MemfdFlags::CLOEXEC)?.into()))
    }

    /// The same one in another process.
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Says whether what is kept is what there is.
    ///
    /// # Errors
    /// If there is no page left for the byte.
    pub fn set_current(&self, current: bool) -> io::Result<()> {
        self.0.write_all_at(&[u8::from(current) * CURRENT], 0)
    }

    /// Whether it says that what is kept is what there is.
    pub fn is_current(fd: BorrowedFd<'_>) -> bool {
        let mut byte = [0];
        rustix::io::pread(fd, &mut byte, 0).is_ok_and(|count| count == 1) && byte[0] == CURRENT
    }
}

impl AsFd for Stamp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
