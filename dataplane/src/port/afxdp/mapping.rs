//! Memory that the kernel and we share.

use std::io::{Error, Result};
use std::os::fd::RawFd;
use std::ptr::NonNull;

const SMALLEST_PAGE: usize = 4096;

/// A mapping, gone when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory; who may touch which part of it is the business of ring and frame pool.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Memory of our own, zeroed, in place from the start so that no worker waits for a page; in large pages where the
    /// kernel has some.
    pub(super) fn anonymous(len: usize) -> Result<Self> {
        let mapping = Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        // SAFETY: the range is the mapping; advice that is not taken changes nothing.
        unsafe { libc::madvise(mapping.base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        for offset in (0..len).step_by(SMALLEST_PAGE) {
            // SAFETY: the offset is inside the mapping, which nobody else knows yet.
            unsafe { mapping.base.add(offset).write_volatile(0) };
        }
        Ok(mapping)
    }

    /// A ring of an AF_XDP socket.
    pub(super) fn of_socket(len: usize, socket: RawFd, offset: libc::off_t) -> Result<Self> {
        Self::map(len, libc::MAP_SHARED | libc::MAP_POPULATE, socket, offset)
    }

    fn map(len: usize, flags: libc::c_int, fd: RawFd, offset: libc::off_t) -> Result<Self> {
        // SAFETY: the kernel chooses the address, so no memory in use is touched.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        Ok(Self { base, len })
    }

    /// First byte.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The place of a `count` of `T` from byte `offset`. `None` if that is not inside, or not aligned.
    pub(super) fn place<T>(&self, offset: usize, count: usize) -> Option<NonNull<T>> {
        let end = count.checked_mul(size_of::<T>())?.checked_add(offset)?;
        if end > self.len || !offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: `offset` is inside the mapping.
        Some(unsafe { self.base.add(offset) }.cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping made by `map`, and nobody uses it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
