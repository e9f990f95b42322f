//! A guest's memory in which everything may be written.

use sluice::mem::{GuestMemory, Log, Region};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes of it: two regions next to each other for the guest, and not for us.
pub(crate) const SIZE: u64 = 0x1_0000;
/// Where the second region begins.
pub(crate) const SECOND: u64 = 0xc000;
/// Frontend address of guest address 0.
pub(crate) const UVA: u64 = 0x7f00_0000_0000;

/// The memory, and its file to write to it from the guest's side.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) logged: Arc<GuestMemory>,
}

/// A memory file of `len` bytes.
pub(crate) fn memfd(len: u64) -> File {
    e2e::hostile::memfd(len).unwrap_or_else(|error| panic!("{error:#}"))
}

impl Guest {
    pub(crate) fn new() -> Self {
        let build = || -> Result<Self, Box<dyn std::error::Error>> {
            let file = memfd(SIZE);
            let regions = vec![
                Region::map(file.try_clone()?, 0, SECOND, UVA, 0)?,
                Region::map(file.try_clone()?, SECOND, SIZE - SECOND, UVA + (1 << 40), SECOND)?,
            ];
            let memory = GuestMemory::new(regions)?;
            let log = Log::map(memfd(4096), 4096, 0)?;
            let logged = Arc::new(memory.logged_by(Some(Arc::new(log)))?);
            Ok(Self { file, memory: Arc::new(memory), logged })
        };
        build().unwrap_or_else(|error| panic!("no memory for a guest: {error}"))
    }

    /// Zeroes everywhere.
    pub(crate) fn clear(&self) {
        self.write(0, &[0; SIZE as usize]);
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let room = SIZE.saturating_sub(at).min(bytes.len() as u64) as usize;
        assert!(self.file.write_all_at(&bytes[..room], at).is_ok(), "fd {}", self.file.as_raw_fd());
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        assert!(self.file.read_exact_at(&mut bytes, 0).is_ok());
        bytes
    }
}
