//! A guest's memory, shared with the switch and mapped here.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::hostile::memfd;

/// Where guest address 0 lies in the frontend's address space; different, as in QEMU.
pub const UVA: u64 = 0x7f00_0000_0000;

/// A guest's memory. Guest address N is byte N of its file.
#[derive(Debug)]
pub struct Memory {
    file: File,
    map: NonNull<u8>,
    len: u64,
}

// SAFETY: what the pointer leads to is only accessed atomically; it is mapped until the drop.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

macro_rules! cell {
    ($(#[$doc:meta])* $name:ident, $atomic:ty) => {
        $(#[$doc])*
        #[track_caller]
        pub fn $name(&self, at: u64) -> &$atomic {
            let size = size_of::<$atomic>() as u64;
            assert!(at.is_multiple_of(size) && at <= self.len - size, "{at:#x} is not in this memory");
            // SAFETY: in the mapping and aligned, as was just checked; all accesses are atomic.
            unsafe { <$atomic>::from_ptr(self.map.as_ptr().add(at as usize).cast()) }
        }
    };
}

impl Memory {
    /// `len` bytes of zeroes, a multiple of the page size.
    pub fn new(len: u64) -> Result<Self> {
        ensure!(len > 0 && len.is_multiple_of(4096), "{len} bytes of memory");
        let file = memfd(len)?;
        // SAFETY: a new mapping somewhere, of a file that we own.
        let map = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len as usize, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        ensure!(map != libc::MAP_FAILED, "cannot map a guest's memory: {}", std::io::Error::last_os_error());
        let map = NonNull::new(map.cast()).context("mapped at address zero")?;
        Ok(Self { file, map, len })
    }

    /// Bytes of it.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Its file, to be sent.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    cell!(/** A byte. */ byte, AtomicU8);
    cell!(/** A word of 16 bits, little-endian like this machine. */ half, AtomicU16);
    cell!(/** A word of 32 bits. */ word, AtomicU32);
    cell!(/** A word of 64 bits. */ long, AtomicU64);

    /// Writes bytes, eight at a time where that is possible.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let longs = if at.is_multiple_of(8) { bytes.as_chunks::<8>().0 } else { &[] };
        for (at, long) in (at..).step_by(8).zip(longs) {
            self.long(at).store(u64::from_le_bytes(*long), Ordering::Relaxed);
        }
        let done = 8 * longs.len();
        for (at, &byte) in (at + done as u64..).zip(&bytes[done..]) {
            self.byte(at).store(byte, Ordering::Relaxed);
        }
    }

    /// Reads bytes, in the same way.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let longs = if at.is_multiple_of(8) { bytes.as_chunks_mut::<8>().0 } else { &mut [] };
        let done = 8 * longs.len();
        for (at, long) in (at..).step_by(8).zip(longs) {
            *long = self.long(at).load(Ordering::Relaxed).to_le_bytes();
        }
        for (at, byte) in (at + done as u64..).zip(&mut bytes[done..]) {
            *byte = self.byte(at).load(Ordering::Relaxed);
        }
        bytes
    }

    /// Clears a range that begins and ends at multiples of 8.
    pub fn clear(&self, at: u64, len: u64) {
        (at..at + len).step_by(8).for_each(|at| self.long(at).store(0, Ordering::Relaxed));
    }

    /// Cuts the file off. Whoever has it mapped gets a SIGBUS from the lost pages; here they are private ones from now
    /// on. `len` is a multiple of the page size.
    pub fn cut_off(&self, len: u64) -> Result<()> {
        let rest = self.len.checked_sub(len).filter(|rest| *rest > 0).context("nothing to cut off")?;
        self.file.set_len(len).context("cannot cut a memory file")?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: replaces a part of our own mapping, which no reference but those of single accesses leads to.
        let map = unsafe { libc::mmap(self.map.as_ptr().add(len as usize).cast(), rest as usize, access, how, -1, 0) };
        ensure!(map != libc::MAP_FAILED, "cannot replace the lost pages: {}", std::io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody can borrow from it any more.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.len as usize) };
    }
}
