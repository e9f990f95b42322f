//! Guest memory: the regions a frontend shares with us, mapped, and the translation of its addresses.
//!
//! A [`GuestMemory`] never changes; a new memory table makes a new one. Whoever holds an `Arc` of it may use the
//! addresses it hands out, and nothing is unmapped before the last holder has let go. All bytes behind those addresses
//! can change at any time under our hands, since the guest runs meanwhile: they are only ever read by volatile loads or
//! raw copies, never through references.

mod file;
mod guard;
mod log;
pub(crate) mod prefetch;
mod room;
mod segment;

pub(crate) use guard::Guard;
pub use guard::OnLoss;
pub use log::{Log, Marks};
pub use room::{Claim, Share};
pub use segment::{Segment, SegmentArena, Segments, SourceSegment};

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::limits::{MAX_GUEST_MEMORY, MAX_MAPPINGS, MAX_MEM_SLOTS, MAX_PORT_MAPPINGS};
use file::SMALL_PAGE;
use room::{Amounts, Room};

/// Why a memory region was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The file descriptor is not memory.
    #[error("the descriptor of a memory region is a {0}, not a memory file")]
    NotMemory(&'static str),
    /// The file ends before the region does.
    #[error("memory region of {len} bytes at offset {offset} lies beyond the end of its file ({size} bytes)")]
    BeyondFile {
        /// Length of the region.
        len: u64,
        /// Its offset in the file.
        offset: u64,
        /// Length of the file.
        size: u64,
    },
    /// An address range of the region wraps around.
    #[error("memory region wraps around the end of the address space")]
    Wraps,
    /// A region of zero bytes.
    #[error("memory region is empty")]
    Empty,
    /// Two regions cover the same guest or frontend address.
    #[error("memory regions overlap at {0:#x}")]
    Overlap(u64),
    /// Too many regions.
    #[error("more than {MAX_MEM_SLOTS} memory regions")]
    TooMany,
    /// More memory than any guest has.
    #[error("more than {} TiB of guest memory", MAX_GUEST_MEMORY >> 40)]
    TooLarge,
    /// A dirty log larger than any guest needs, or without a bit for some page of this one.
    #[error("a dirty log of {0} bytes does not fit the guest's memory")]
    LogSize(u64),
    /// The dirty log's words are not aligned.
    #[error("the dirty log begins at offset {0}, which is no multiple of 8")]
    LogOffset(u64),
    /// The region to remove is not in the table.
    #[error("no memory region at {0:#x}")]
    NotFound(u64),
    /// The kernel would not tell about the file.
    #[error("cannot inspect the file of a memory region: {0}")]
    Stat(#[source] std::io::Error),
    /// All ports together have mapped so much that it does not fit.
    #[error("no room for a memory region of {0} bytes beside those of all ports")]
    NoRoom(u64),
    /// The port would have too much.
    #[error("with a memory region of {0} bytes the port has more than a sixteenth of what others leave")]
    Share(u64),
    /// All ports together have mapped so many regions.
    #[error("no room for a memory region beside the {MAX_MAPPINGS} of all ports")]
    NoMappings,
    /// The port would have too many mapped, maybe since its last ones are still there.
    #[error("the port has more memory regions than {MAX_PORT_MAPPINGS}, or than a sixteenth of what others leave")]
    PortMappings,
    /// The kernel would not map the file.
    #[error("cannot map a memory region: {0}")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
}

/// One region of guest memory, mapped.
#[derive(Debug)]
pub struct Region {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// First address in the frontend's own address space; ring addresses are given in it.
    pub uva: u64,
    /// Bytes of the mapping that precede the region, since mappings begin at (huge) page boundaries.
    lead: usize,
    /// Before `map`, since it has to go first.
    guard: Guard,
    map: MmapRegion,
    room: Room,
}

impl Region {
    /// Maps `len` bytes of `file` from `offset` as the guest's memory at `gpa`, for no port.
    ///
    /// # Errors
    /// As [`Region::map_by`].
    pub fn map(file: File, gpa: u64, len: u64, uva: u64, offset: u64) -> Result<Self, MemError> {
        Self::map_by(&Arc::<Share>::default().inherit(), file, gpa, len, uva, offset)
    }

    /// Maps `len` bytes of `file` from `offset` as the guest's memory at `gpa`.
    ///
    /// # Errors
    /// [`MemError`] if the file is not a memory file that covers the range, an address wraps, or the port has no room for it.
    pub fn map_by(claim: &Claim, file: File, gpa: u64, len: u64, uva: u64, offset: u64) -> Result<Self, MemError> {
        if len == 0 {
            return Err(MemError::Empty);
        }
        if len > MAX_GUEST_MEMORY {
            return Err(MemError::TooLarge);
        }
        for first in [gpa, uva, offset] {
            first.checked_add(len).ok_or(MemError::Wraps)?;
        }
        let page = file::check(&file, offset, len)?;
        // Huge page mappings have to begin and end on huge pages.
        let lead = offset % page;
        let whole =
            if page == SMALL_PAGE { lead.checked_add(len) } else { (lead + len).checked_next_multiple_of(page) };
        let size = whole.and_then(|size| usize::try_from(size).ok()).ok_or(MemError::Wraps)?;
        let room = claim.take(size as u64)?;
        let map = MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::new(file, offset - lead))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(MemError::Map)?;
        // SAFETY: the range is the mapping just made; advice that fails changes nothing.
        unsafe { libc::madvise(map.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
        Ok(Self { gpa, len, uva, lead: lead as usize, guard: Guard::new(map.as_ptr(), size), map, room })
    }

    /// The same region; `owner` is told if its memory goes, which otherwise nobody is.
    #[must_use]
    pub fn telling(mut self, owner: Arc<dyn OnLoss>) -> Self {
        self.guard.tell(owner);
        self
    }

    /// Whether the memory behind the region has gone: its file was truncated, or the host has a page less than it
    /// promised. What is written to it since reaches nobody.
    pub fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }

    /// Its file, and where in it the region begins.
    pub fn source(&self) -> Option<(&File, u64)> {
        let source = self.map.file_offset()?;
        Some((source.file(), source.start() + self.lead as u64))
    }

    fn host(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.len);
        self.map.as_ptr().wrapping_add(self.lead + offset as usize)
    }

    fn overlaps(&self, other: &Region) -> Option<u64> {
        let hit = |a: u64, b: u64| a < b + other.len && b < a + self.len;
        if hit(self.gpa, other.gpa) {
            return Some(other.gpa);
        }
        hit(self.uva, other.uva).then_some(other.uva)
    }
}

/// The whole memory of one guest.
#[derive(Debug, Default, Clone)]
pub struct GuestMemory {
    /// Sorted by guest physical address, without overlap.
    regions: Vec<Arc<Region>>,
    /// Where they are, in the same order: all that translation needs, close together.
    spans: Vec<Span>,
    /// Where pages that we write to are marked, while the guest migrates.
    log: Option<Arc<Log>>,
}

/// A region's place.
#[derive(Debug, Clone, Copy)]
struct Span {
    gpa: u64,
    len: u64,
    host: *mut u8,
}

impl Span {
    #[inline]
    fn has(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.gpa) < self.len
    }
}

// SAFETY: a span is a number that leads into its region's mapping.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

// SAFETY: regions are immutable but for the guest's bytes, which are only touched through raw copies and volatile
// accesses; the raw pointer inside the mapping is what hides these traits.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// Where a guest's address lies in our address space.
#[derive(Debug, Clone, Copy)]
pub struct HostRange {
    /// First byte. Valid while the [`GuestMemory`] it came from is held.
    pub ptr: *mut u8,
    /// Contiguous bytes from there, at least 1 and at most what was asked for.
    pub len: usize,
}

/// Finds buffers, most of which lie in the region that the one before them lay in.
#[derive(Debug)]
pub struct Locator<'m> {
    memory: &'m GuestMemory,
    span: Span,
    hint: usize,
}

impl<'m> Locator<'m> {
    /// Index of the region hit last.
    #[inline]
    pub fn hint(&self) -> usize {
        self.hint
    }

    /// A buffer that lies in one region. `None` if it does not, or is empty.
    #[inline]
    pub fn whole(&mut self, gpa: u64, len: u32) -> Option<Segment<'m>> {
        if !self.span.has(gpa) {
            self.span = *self.memory.find(gpa, &mut self.hint)?;
        }
        let offset = gpa.wrapping_sub(self.span.gpa);
        if len == 0 || u64::from(len) > self.span.len - offset {
            return None;
        }
        // SAFETY: the range lies in a region, which `memory` holds for `'m`.
        unsafe { Segment::new(self.span.host.wrapping_add(offset as usize), len) }
    }
}

impl GuestMemory {
    /// A new memory table.
    ///
    /// # Errors
    /// [`MemError`] if regions overlap, are too many or too large.
    pub fn new(regions: Vec<Region>) -> Result<Self, MemError> {
        regions.into_iter().try_fold(Self::default(), |memory, region| memory.with(region))
    }

    /// This table and one more region, without a log.
    ///
    /// # Errors
    /// [`MemError`] if the region overlaps another, or there are too many or too much memory.
    pub fn with(&self, region: Region) -> Result<Self, MemError> {
        if self.regions.len() >= MAX_MEM_SLOTS {
            return Err(MemError::TooMany);
        }
        if self.bytes() + region.len > MAX_GUEST_MEMORY {
            return Err(MemError::TooLarge);
        }
        if let Some(at) = self.regions.iter().find_map(|other| region.overlaps(other)) {
            return Err(MemError::Overlap(at));
        }
        let mut regions = self.regions.clone();
        let place = regions.partition_point(|other| other.gpa < region.gpa);
        regions.insert(place, Arc::new(region));
        Ok(Self::of(regions))
    }

    /// This table without the region that has exactly these bounds, and without a log.
    ///
    /// # Errors
    /// [`MemError::NotFound`] if there is none.
    pub fn without(&self, gpa: u64, len: u64, uva: u64) -> Result<Self, MemError> {
        let place = self.regions.iter().position(|r| (r.gpa, r.len, r.uva) == (gpa, len, uva));
        let mut regions = self.regions.clone();
        regions.remove(place.ok_or(MemError::NotFound(gpa))?);
        Ok(Self::of(regions))
    }

    fn of(regions: Vec<Arc<Region>>) -> Self {
        let spans = regions.iter().map(|region| Span { gpa: region.gpa, len: region.len, host: region.host(0) });
        Self { spans: spans.collect(), regions, log: None }
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.len).sum()
    }

    /// For a table instead of this one, whose port is that.
    pub fn claim(&self, share: &Arc<Share>) -> Claim {
        let add = |[bytes, count]: Amounts, [more, one]: Amounts| [bytes + more, count + one];
        share.claim(self.regions.iter().map(|region| region.room.amounts()).fold([0; 2], add))
    }

    /// Whether some of it has gone, or its dirty log; see [`Region::is_lost`].
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.is_lost()) || self.log.as_ref().is_some_and(|log| log.is_lost())
    }

    /// Its regions, by guest physical address.
    pub fn each_region(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().map(AsRef::as_ref)
    }

    /// Device and inode of the memory file that an address of the frontend's lies in.
    pub fn file_of_uva(&self, uva: u64) -> Option<(u64, u64)> {
        let region = self.regions.iter().find(|region| uva.wrapping_sub(region.uva) < region.len)?;
        let meta = region.source()?.0.metadata().ok()?;
        Some((meta.dev(), meta.ino()))
    }

    /// Number of regions.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Translates a guest physical range as far as it is contiguous. `hint` is the index of the region that was hit
    /// last by this caller; most often it is hit again.
    ///
    /// `None` if `len` is zero or the first byte belongs to no region.
    #[inline]
    pub fn translate(&self, gpa: u64, len: usize, hint: &mut usize) -> Option<HostRange> {
        let range = self.locate(gpa, hint)?;
        (len > 0).then(|| HostRange { ptr: range.ptr, len: len.min(range.len) })
    }

    #[cold]
    fn find(&self, gpa: u64, hint: &mut usize) -> Option<&Span> {
        let place = self.spans.partition_point(|span| span.gpa <= gpa).checked_sub(1)?;
        let span = self.spans.get(place).filter(|span| span.has(gpa))?;
        *hint = place;
        Some(span)
    }

    /// Translates a guest physical address: where it is, and how many bytes are contiguous from there, at least 1.
    #[inline]
    pub fn locate(&self, gpa: u64, hint: &mut usize) -> Option<HostRange> {
        let span = match self.spans.get(*hint) {
            Some(span) if span.has(gpa) => span,
            _ => self.find(gpa, hint)?,
        };
        let offset = gpa - span.gpa;
        Some(HostRange { ptr: span.host.wrapping_add(offset as usize), len: (span.len - offset) as usize })
    }

    /// For many translations in a row, beginning with the region of index `hint`.
    #[inline]
    pub fn locator(&self, hint: usize) -> Locator<'_> {
        const NOWHERE: Span = Span { gpa: 0, len: 0, host: std::ptr::null_mut() };
        Locator { memory: self, span: self.spans.get(hint).copied().unwrap_or(NOWHERE), hint }
    }

    /// Translates a whole guest physical range that must lie in one region, such as an indirect table.
    #[inline]
    pub fn translate_whole(&self, gpa: u64, len: usize, hint: &mut usize) -> Option<*mut u8> {
        self.translate(gpa, len, hint).filter(|range| range.len == len).map(|range| range.ptr)
    }

    /// Translates a whole range of the frontend's address space, such as a ring.
    pub fn translate_uva(&self, uva: u64, len: usize) -> Option<*mut u8> {
        let len = len as u64;
        let inside = |r: &&Arc<Region>| uva >= r.uva && uva - r.uva < r.len && len <= r.len - (uva - r.uva);
        let region = self.regions.iter().find(inside)?;
        (len > 0).then(|| region.host(uva - region.uva))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    /// A memory file of `len` bytes.
    pub(crate) fn memfd(len: u64) -> File {
        // SAFETY: the name is a C string and the descriptor that comes back is ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(len).unwrap();
        file
    }

    fn region(gpa: u64, len: u64, uva: u64) -> Region {
        Region::map(memfd(len), gpa, len, uva, 0).unwrap()
    }

    #[test]
    fn translates_at_every_edge() {
        let memory =
            GuestMemory::new(vec![region(0x10000, 0x2000, 0x7000_0000), region(0, 0x1000, 0x8000_0000)]).unwrap();
        let mut hint = 0;
        assert_eq!(memory.translate(0x10000, 0x2000, &mut hint).unwrap().len, 0x2000);
        assert_eq!(hint, 1);
        assert_eq!(memory.translate(0x11fff, 2, &mut hint).unwrap().len, 1);
        assert!(memory.translate(0x12000, 1, &mut hint).is_none());
        assert!(memory.translate(0xffff, 1, &mut hint).is_none());
        assert!(memory.translate(0x10000, 0, &mut hint).is_none());
        assert!(memory.translate(u64::MAX, 8, &mut hint).is_none());
        assert!(memory.translate_whole(0x11fff, 2, &mut hint).is_none());
        assert!(memory.translate_whole(0xff8, 8, &mut hint).is_some());
        assert!(memory.translate_uva(0x7000_0000, 0x2000).is_some());
        assert!(memory.translate_uva(0x7000_0001, 0x2000).is_none());
        assert!(memory.translate_uva(0x7000_1000, usize::MAX).is_none());
        assert!(memory.translate_uva(0x9000_0000, 1).is_none());
    }

    #[test]
    fn refuses_bad_regions() {
        let pipe = {
            let mut fds = [0; 2];
            // SAFETY: `fds` has room for the two descriptors, which are ours afterwards.
            unsafe {
                assert_eq!(libc::pipe(fds.as_mut_ptr()), 0);
                drop(File::from_raw_fd(fds[1]));
                File::from_raw_fd(fds[0])
            }
        };
        assert!(matches!(Region::map(pipe, 0, 4096, 0, 0), Err(MemError::NotMemory("pipe"))));
        let foreign = File::open("/sys/kernel/notes").unwrap();
        assert!(matches!(
            Region::map(foreign, 0, 8, 0, 0),
            Err(MemError::NotMemory("file of a file system that is not this host's own"))
        ));
        assert!(matches!(Region::map(memfd(4096), 0, 4097, 0, 0), Err(MemError::BeyondFile { .. })));
        assert!(matches!(Region::map(memfd(4096), 0, 4096, 0, 1), Err(MemError::BeyondFile { .. })));
        assert!(matches!(Region::map(memfd(4096), u64::MAX, 4096, 0, 0), Err(MemError::Wraps)));
        assert!(matches!(Region::map(memfd(4096), 0, 0, 0, 0), Err(MemError::Empty)));
        let sparse = MAX_GUEST_MEMORY / 2 + 4096;
        assert!(matches!(Region::map(memfd(2 * sparse), 0, 2 * sparse, 0, 0), Err(MemError::TooLarge)));
        let half = GuestMemory::new(vec![region(0, sparse, 0)]).unwrap();
        assert!(matches!(half.with(region(sparse, sparse, sparse)), Err(MemError::TooLarge)));
        let memory = GuestMemory::new(vec![region(0, 0x2000, 0)]).unwrap();
        assert!(matches!(memory.with(region(0x1000, 0x1000, 0x9000)), Err(MemError::Overlap(0))));
        assert!(matches!(memory.with(region(0x9000, 0x1000, 0x1000)), Err(MemError::Overlap(0))));
        assert!(matches!(memory.without(0, 0x1000, 0), Err(MemError::NotFound(0))));
        assert_eq!(memory.without(0, 0x2000, 0).unwrap().regions(), 0);
    }

    #[test]
    fn maps_an_unaligned_offset() {
        use std::os::unix::fs::FileExt;
        let file = memfd(0x3000);
        file.write_all_at(b"x", 0x1234).unwrap();
        let memory = GuestMemory::new(vec![Region::map(file, 0, 0x1000, 0, 0x1234).unwrap()]).unwrap();
        // SAFETY: the address is inside the mapping that `memory` holds.
        assert_eq!(unsafe { memory.translate(0, 1, &mut 0).unwrap().ptr.read_volatile() }, b'x');
    }
}
