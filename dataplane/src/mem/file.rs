//! Which files are taken for memory.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::mem::MemError;

/// Size of an ordinary page, in bytes.
pub(super) const SMALL_PAGE: u64 = 4096;

/// File systems whose pages the kernel has or gets by itself (`linux/magic.h`). Pages of any other, such as FUSE or NFS,
/// come from somebody who may be the guest's accomplice and never send them, and a worker would wait for them.
const MEMORY: [i64; 3] = [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC, RAMFS_MAGIC];
/// Those of local disks, which virtual persistent memory lies on.
const DISKS: [i64; 3] = [libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC];
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// Refuses what is no memory file or too short; returns its page size.
pub(super) fn check(file: &File, offset: u64, len: u64) -> Result<u64, MemError> {
    let meta = file.metadata().map_err(MemError::Stat)?;
    let kind = meta.file_type();
    if !kind.is_file() {
        return Err(MemError::NotMemory(match () {
            () if kind.is_dir() => "directory",
            () if kind.is_fifo() => "pipe",
            () if kind.is_socket() => "socket",
            () if kind.is_char_device() || kind.is_block_device() => "device",
            () => "special file",
        }));
    }
    if offset.checked_add(len).is_none_or(|end| end > meta.size()) {
        return Err(MemError::BeyondFile { len, offset, size: meta.size() });
    }
    // SAFETY: an all-zero statfs is a valid value, and the kernel fills it.
    let (done, fs) = unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &mut fs), fs)
    };
    if done != 0 {
        return Err(MemError::Stat(std::io::Error::last_os_error()));
    }
    if !MEMORY.contains(&fs.f_type) && !DISKS.contains(&fs.f_type) {
        return Err(MemError::NotMemory("file of a file system that is not this host's own"));
    }
    let huge = (fs.f_type == libc::HUGETLBFS_MAGIC).then_some(fs.f_bsize);
    Ok(huge.and_then(|size| u64::try_from(size).ok()).filter(|size| size.is_power_of_two()).unwrap_or(SMALL_PAGE))
}
