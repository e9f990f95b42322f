//! The log of dirty pages that a frontend shares while its guest migrates (vhost-user, "Migration").

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use vhost::VhostUserDirtyLogRegion;

use super::memory::Memory;

/// Bytes of guest memory for each bit.
const PAGE: usize = 4096;

/// One guest's log.
#[derive(Debug)]
pub(super) struct DirtyLog {
    bits: Memory,
    words: usize,
}

impl DirtyLog {
    /// A log for so many bytes of guest memory.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub(super) fn new(guest: usize) -> std::io::Result<Self> {
        let words = guest.div_ceil(PAGE * u64::BITS as usize);
        Ok(Self { bits: Memory::new(words * size_of::<u64>(), false)?, words })
    }

    /// As the switch is to be told of it.
    pub(super) fn region(&self) -> VhostUserDirtyLogRegion {
        let mmap_handle = self.bits.file().as_raw_fd();
        VhostUserDirtyLogRegion { mmap_size: (self.words * size_of::<u64>()) as u64, mmap_offset: 0, mmap_handle }
    }

    /// Takes all marks out, as a VMM does in each round of a migration. Returns how many there were.
    pub(super) fn sweep(&self) -> u64 {
        let words = (0..self.words).map(|word| self.bits.u64(word * size_of::<u64>()));
        // Most words are empty; to write to them would only disturb the switch.
        let marked = words.filter(|word| word.load(Ordering::Relaxed) != 0);
        marked.map(|word| u64::from(word.swap(0, Ordering::AcqRel).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn marks_are_counted_once() {
        let log = DirtyLog::new(64 << 20).unwrap();
        assert_eq!(log.region().mmap_size, 2048);
        log.bits.file().write_all_at(&[0b101], 0).unwrap();
        log.bits.file().write_all_at(&[0x80], 2047).unwrap();
        assert_eq!((log.sweep(), log.sweep()), (3, 0));
    }
}
