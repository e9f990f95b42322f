//! A guest's driver that costs next to nothing: its descriptors are written once, and only indices move.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use sluice::mem::{GuestMemory, Log, Region};
use sluice::virtq::RingConfig;

const UVA: u64 = 0x7f00_0000_0000;
const BUFFERS: u64 = 1 << 20;
/// Bytes of one buffer.
pub const BUFFER: u64 = 2048;
/// Bytes from one buffer to the next, as DPDK has it: multiples of 2048 would all fall into the same few sets of a cache.
const STRIDE: u64 = 2304;
const WRITE: u16 = 2;

/// One ring with a buffer for every descriptor, all of which are always in order.
#[derive(Debug)]
pub struct Driver {
    base: *mut u8,
    len: usize,
    file: File,
    size: u16,
    avail: u16,
    used: u16,
    log: bool,
}

// SAFETY: the mapping is its own, and what the other side sees of it is only accessed by atomic operations.
unsafe impl Send for Driver {}

impl Driver {
    /// As [`Driver::spread`], with buffers one after the other.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub fn new(size: u16, frame: Option<&[u8]>) -> std::io::Result<Self> {
        let sent = |_| frame.unwrap_or_default().to_vec();
        Self::spread(size, frame.is_some().then_some(&sent), 1)
    }

    /// A ring of `size` descriptors, a power of two, each with a buffer of its own: of a header and the frame that `sent` gives
    /// for it to send, or of [`BUFFER`] bytes to receive into. Two that follow each other in the ring are an odd number of
    /// buffers apart in memory.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub fn spread(size: u16, sent: Option<&dyn Fn(u16) -> Vec<u8>>, spread: u16) -> std::io::Result<Self> {
        let len = (BUFFERS + u64::from(size) * STRIDE).next_multiple_of(2 << 20) as usize;
        // SAFETY: the name is a C string, the descriptor that comes back is ours, and the mapping is new.
        let (file, base) = unsafe {
            let fd = libc::memfd_create(c"driver".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            let file = File::from_raw_fd(fd);
            file.set_len(len as u64)?;
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let base = libc::mmap(std::ptr::null_mut(), len, both, libc::MAP_SHARED | libc::MAP_POPULATE, fd, 0);
            if base == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            (file, base.cast::<u8>())
        };
        let mut driver = Self { base, len, file, size, avail: 0, used: 0, log: false };
        for index in 0..size {
            let at = BUFFERS + u64::from(index.wrapping_mul(spread) % size) * STRIDE;
            let frame = sent.map(|sent| sent(index));
            let (len, flags) = frame.as_ref().map_or((BUFFER as u32, WRITE), |frame| (12 + frame.len() as u32, 0));
            let descriptor = [at, u64::from(len) | (u64::from(flags) << 32)];
            driver.put(0x1000 + 16 * u64::from(index), &descriptor);
            driver.put(driver.avail_at() + 4 + 2 * u64::from(index), &index);
            for (place, byte) in frame.unwrap_or_default().iter().enumerate() {
                driver.put(at + 12 + place as u64, byte);
            }
        }
        driver.used = 0;
        Ok(driver)
    }

    fn put<T: Copy>(&mut self, at: u64, value: &T) {
        assert!(at as usize + size_of::<T>() <= self.len);
        // SAFETY: the range was just checked, and the mapping is ours.
        unsafe { self.base.add(at as usize).cast::<T>().write_unaligned(*value) };
    }

    fn avail_at(&self) -> u64 {
        0x1000 + 16 * u64::from(self.size)
    }

    fn used_at(&self) -> u64 {
        (self.avail_at() + 6 + 2 * u64::from(self.size)).next_multiple_of(64)
    }

    fn index(&self, at: u64) -> &AtomicU16 {
        // SAFETY: aligned, and within the mapping, by the layout above.
        unsafe { AtomicU16::from_ptr(self.base.add(at as usize + 2).cast()) }
    }

    /// The ring as a frontend would describe it.
    pub fn config(&self) -> RingConfig {
        let log = self.log.then_some(self.used_at());
        RingConfig {
            log,
            size: self.size.into(),
            desc: UVA + 0x1000,
            avail: UVA + self.avail_at(),
            used: UVA + self.used_at(),
            event_idx: false,
            indirect: false,
            packed: false,
        }
    }

    /// The memory as the switch maps it.
    ///
    /// # Panics
    /// If it cannot be mapped.
    pub fn memory(&self) -> Arc<GuestMemory> {
        let file = self.file.try_clone().unwrap_or_else(|e| panic!("{e}"));
        let region = Region::map(file, 0, self.len as u64, UVA, 0).unwrap_or_else(|e| panic!("{e}"));
        let memory = GuestMemory::new(vec![region]).unwrap_or_else(|e| panic!("{e}"));
        let log = self.log.then(|| Arc::new(self.dirty_log().unwrap_or_else(|e| panic!("{e}"))));
        Arc::new(memory.logged_by(log).unwrap_or_else(|e| panic!("{e}")))
    }

    fn dirty_log(&self) -> std::io::Result<Log> {
        let size = (self.len as u64 / (8 * 4096)).next_multiple_of(64);
        // SAFETY: the name is a C string, and the descriptor that comes back is ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"log".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(size)?;
        Log::map(file, size, 0).map_err(std::io::Error::other)
    }

    /// From now on what the switch writes is marked in a dirty log, as while a guest migrates.
    pub fn migrate(&mut self) {
        self.log = true;
    }

    /// Makes `count` more chains available.
    pub fn post(&mut self, count: u16) {
        self.avail = self.avail.wrapping_add(count);
        self.index(self.avail_at()).store(self.avail, Ordering::Release);
    }

    /// Takes back what came back; returns how many.
    pub fn reap(&mut self) -> u16 {
        let used = self.index(self.used_at()).load(Ordering::Acquire);
        let count = used.wrapping_sub(self.used);
        self.used = used;
        count
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
        let _ = self.file.as_raw_fd();
    }
}
