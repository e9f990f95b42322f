//! A guest's memory: a file that the switch maps too. All access is atomic and checked, so this is the only place
//! of the generator that needs `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64};

const HUGE: usize = 2 << 20;

/// Shared memory of one guest.
#[derive(Debug)]
pub(super) struct Memory {
    base: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping belongs to this value, stays where it is, and is only accessed atomically.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory of at least `len` bytes, in huge pages if there are enough of them (`huge`), else in common ones.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub(super) fn new(len: usize, huge: bool) -> io::Result<Self> {
        let len = len.next_multiple_of(HUGE);
        if huge && let Ok(memory) = Self::map(len, true) {
            return Ok(memory);
        }
        Self::map(len, false)
    }

    fn map(len: usize, huge: bool) -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | if huge { libc::MFD_HUGETLB } else { 0 };
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"loadgen".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let how = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, both, how, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, len, file })
    }

    /// Bytes of it.
    pub(super) fn size(&self) -> usize {
        self.len
    }

    /// The file behind it.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn place<T>(&self, at: usize) -> *mut T {
        assert!(at.is_multiple_of(align_of::<T>()) && at < self.len && self.len - at >= size_of::<T>());
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.base.as_ptr().add(at).cast() }
    }

    /// The 16-bit number at an even offset.
    #[inline]
    pub(super) fn u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: `place` has checked range and alignment; the mapping lives as long as `self`.
        unsafe { AtomicU16::from_ptr(self.place(at)) }
    }

    /// The 64-bit number at an offset that is a multiple of 8.
    #[inline]
    pub(super) fn u64(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `place` has checked range and alignment; the mapping lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.place(at)) }
    }

    /// Copies bytes in, before the switch knows of the memory.
    ///
    /// # Panics
    /// If they do not fit.
    pub(super) fn fill(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && self.len - at >= bytes.len());
        // SAFETY: within the mapping, as was just checked; a mapping of ours cannot overlap the slice.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(at), bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and all references to it borrow from `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_is_written_is_in_the_file() {
        use std::os::unix::fs::FileExt;
        let memory = Memory::new(1, false).unwrap();
        assert_eq!(memory.size(), HUGE);
        memory.fill(10, &[1, 2, 3, 4]);
        memory.u16(12).store(0x0605, Ordering::Relaxed);
        let mut bytes = [0; 4];
        memory.file().read_exact_at(&mut bytes, 10).unwrap();
        assert_eq!(bytes, [1, 2, 5, 6]);
    }

    #[test]
    #[should_panic]
    fn nothing_is_read_beyond_it() {
        let memory = Memory::new(1, false).unwrap();
        memory.u64(HUGE);
    }
}
