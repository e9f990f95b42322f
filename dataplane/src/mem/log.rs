//! The dirty log: a bitmap shared with the frontend in which every page of guest memory that we write to is marked
//! while the guest migrates (vhost-user, "Migration").
//!
//! A page is marked after it was written, never before: the frontend clears a mark before it copies the page, so what is
//! written and marked later gets copied again. Marks are gathered for a burst and are all in the log before its ring is
//! let go of.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::limits::MAX_DIRTY_LOG;
use crate::mem::{Claim, GuestMemory, MemError, OnLoss, Region, Segment, Share};

/// Bytes of guest memory for each bit (`VHOST_LOG_PAGE`).
const PAGE: u64 = 0x1000;
/// Words of the log that marks are gathered for.
const WORDS: usize = 32;
/// Pages for each word of the log.
const WORD: u64 = 64;

/// The bitmap, mapped: bit N of it, counted from the lowest bit of the first byte, is the page at N * 4096.
#[derive(Debug)]
pub struct Log {
    region: Region,
}

impl Log {
    /// Maps `size` bytes of `file` from `offset`, for no port.
    ///
    /// # Errors
    /// As [`Log::map_by`].
    pub fn map(file: File, size: u64, offset: u64) -> Result<Self, MemError> {
        Self::map_by(&Arc::<Share>::default().inherit(), file, size, offset)
    }

    /// For a log instead of this one, or the first one, whose port is that.
    pub fn claim(this: Option<&Self>, share: &Arc<Share>) -> Claim {
        share.claim(this.map_or([0; 2], |log| log.region.room.amounts()))
    }

    /// Maps `size` bytes of `file` from `offset`, as `SET_LOG_BASE` gives them.
    ///
    /// # Errors
    /// [`MemError`] if the file is not a memory file that covers the range, the range wraps, or the port has no room for it.
    pub fn map_by(claim: &Claim, file: File, size: u64, offset: u64) -> Result<Self, MemError> {
        if size > MAX_DIRTY_LOG {
            return Err(MemError::LogSize(size));
        }
        if !offset.is_multiple_of(align_of::<u64>() as u64) {
            return Err(MemError::LogOffset(offset));
        }
        Ok(Self { region: Region::map_by(claim, file, 0, size, 0, offset)? })
    }

    /// The same log; `owner` is told if its memory goes.
    #[must_use]
    pub fn telling(self, owner: Arc<dyn OnLoss>) -> Self {
        Self { region: self.region.telling(owner) }
    }

    /// As [`Region::is_lost`].
    pub(super) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    /// Its file, size and offset.
    pub fn source(&self) -> Option<(&File, u64, u64)> {
        self.region.source().map(|(file, offset)| (file, self.region.len, offset))
    }

    /// Pages that there are bits for.
    fn pages(&self) -> u64 {
        self.region.len * 8
    }

    /// Marks pages of one word, at once. Those beyond the log are not marked: they are no guest memory.
    fn mark(&self, word: u64, bits: u64) {
        if let Some((place, bits)) = self.place(word, bits) {
            place.fetch_or(bits, Ordering::Release);
        }
    }

    /// As [`Log::mark`], but leaves alone what is marked already. After a full fence, behind the writes: then whoever clears a
    /// mark that was seen here copies the page later than that.
    fn mark_new(&self, word: u64, bits: u64) {
        if let Some((place, bits)) = self.place(word, bits)
            && place.load(Ordering::Relaxed) & bits != bits
        {
            place.fetch_or(bits, Ordering::Release);
        }
    }

    /// A word of the log, and these bits as they are in it.
    fn place(&self, word: u64, bits: u64) -> Option<(&AtomicU64, u64)> {
        let left = self.pages().checked_sub(word.saturating_mul(WORD)).filter(|&left| left > 0)?;
        let bits = if left < WORD { bits & ((1 << left) - 1) } else { bits };
        let place = self.region.host(word * 8).cast::<u64>();
        // SAFETY: the word begins within the log, and since it is aligned (so are the offset and all pages) it ends in
        // the page in which it begins, which is mapped. The frontend changes it by atomic operations, too.
        Some((unsafe { AtomicU64::from_ptr(place) }, bits.to_le()))
    }
}

impl GuestMemory {
    /// The same memory, marking what is written in that log, or in none.
    ///
    /// # Errors
    /// [`MemError::LogSize`] if the log has no bit for some page of it.
    pub fn logged_by(&self, log: Option<Arc<Log>>) -> Result<Self, MemError> {
        let end = self.regions.iter().map(|region| region.gpa + region.len).max().unwrap_or(0);
        if let Some(log) = log.as_ref().filter(|log| log.pages() < end.div_ceil(PAGE)) {
            return Err(MemError::LogSize(log.region.len));
        }
        Ok(Self { log, ..self.clone() })
    }

    /// Marks all of it, if that is wanted.
    pub fn mark_all(&self) {
        let Some(mut marks) = self.dirty() else { return };
        for region in &self.regions {
            marks.range(region.gpa, region.len as usize);
        }
        marks.finish();
    }

    /// Where to mark what is written, while that is wanted.
    #[inline]
    pub fn dirty(&self) -> Option<Marks<'_>> {
        self.log.as_ref().map(|log| Marks { memory: self, log, words: [(0, 0); WORDS] })
    }

    /// The guest physical address of a place in our address space.
    fn gpa_of(&self, place: *const u8) -> Option<u64> {
        self.spans.iter().find_map(|span| {
            let offset = place.addr().wrapping_sub(span.host.addr()) as u64;
            (offset < span.len).then(|| span.gpa + offset)
        })
    }
}

/// Marks on their way into the log. [`Marks::finish`] brings them there.
#[derive(Debug)]
#[must_use = "marks that are not finished are lost"]
pub struct Marks<'m> {
    memory: &'m GuestMemory,
    log: &'m Log,
    /// Words of the log, by their last digits, and bits that go to them: a page is marked once for a burst, and what is
    /// marked already, as most pages are, costs no atomic operation.
    words: [(u64, u64); WORDS],
}

impl Marks<'_> {
    /// The first `len` bytes of a segment were written, or all of it.
    pub fn segment(&mut self, segment: Segment<'_>, len: usize) {
        self.place(segment.start(), len.min(segment.len()));
    }

    /// `len` bytes at a place in our address space were written.
    pub fn place(&mut self, place: *const u8, len: usize) {
        if let Some(gpa) = self.memory.gpa_of(place) {
            self.range(gpa, len);
        }
    }

    /// `len` bytes at a guest physical address were written.
    pub fn range(&mut self, gpa: u64, len: usize) {
        let Some(more) = (len as u64).checked_sub(1) else { return };
        let (mut page, last) = (gpa / PAGE, gpa.saturating_add(more) / PAGE);
        while page <= last {
            let end = last.min(page | (WORD - 1));
            self.add(page / WORD, (u64::MAX >> (WORD - 1 - (end - page))) << (page % WORD));
            page = end + 1;
        }
    }

    #[inline]
    fn add(&mut self, word: u64, bits: u64) {
        let place = &mut self.words[(word % WORDS as u64) as usize];
        if place.0 != word {
            if place.1 != 0 {
                self.log.mark(place.0, place.1);
            }
            *place = (word, 0);
        }
        place.1 |= bits;
    }

    /// Brings all marks into the log.
    pub fn finish(self) {
        fence(Ordering::SeqCst);
        for (word, bits) in self.words {
            if bits != 0 {
                self.log.mark_new(word, bits);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::tests::memfd;
    use std::os::unix::fs::FileExt;

    fn logged(size: u64, offset: u64) -> (GuestMemory, File) {
        let file = memfd(offset + size);
        let log = Arc::new(Log::map(file.try_clone().unwrap(), size, offset).unwrap());
        let region = |gpa, len, uva| Region::map(memfd(len), gpa, len, uva, 0).unwrap();
        let memory = GuestMemory::new(vec![region(0, 0x40_0000, 0), region(0x100_0000, 0x2_0000, 0x100_0000)]);
        (memory.unwrap().logged_by(Some(log)).unwrap(), file)
    }

    fn pages(file: &File, offset: u64) -> Vec<u64> {
        let mut bytes = vec![0; (file.metadata().unwrap().len() - offset) as usize];
        file.read_exact_at(&mut bytes, offset).unwrap();
        let bit = |page: &u64| bytes[(*page / 8) as usize] & (1 << (page % 8)) != 0;
        (0..bytes.len() as u64 * 8).filter(bit).collect()
    }

    #[test]
    fn marks_every_page_of_a_range() {
        let (memory, file) = logged(0x300, 64);
        let mut marks = memory.dirty().unwrap();
        marks.range(0x0fff, 1);
        marks.range(0x2fff, 2);
        marks.range(0x3_f000, 0x2000);
        marks.range(0x5000, 0);
        let far = memory.locate(0x101_0ffe, &mut 0).unwrap();
        marks.place(far.ptr, 3);
        marks.finish();
        assert_eq!(pages(&file, 64), [0, 2, 3, 63, 64, 0x1010, 0x1011]);
        memory.dirty().unwrap().finish();
        let mut marks = memory.dirty().unwrap();
        marks.range(0x10_0000, 130 * 0x1000);
        marks.finish();
        assert_eq!(pages(&file, 64).iter().filter(|page| (256..386).contains(*page)).count(), 130);
    }

    #[test]
    fn all_of_it_is_what_the_regions_have() {
        let (memory, file) = logged(0x300, 0);
        memory.mark_all();
        assert_eq!(pages(&file, 0), (0..0x400).chain(0x1000..0x1020).collect::<Vec<_>>());
        memory.logged_by(None).unwrap().mark_all();
    }

    #[test]
    fn what_was_cleared_is_marked_again() {
        let (memory, file) = logged(0x300, 0);
        // More words than are gathered, in each two bits that come apart.
        let all: Vec<u64> = (0..0x80).map(|number| number * 5).collect();
        for _ in 0..2 {
            let mut marks = memory.dirty().unwrap();
            all.iter().step_by(2).for_each(|page| marks.range(page * PAGE, 1));
            all.iter().skip(1).step_by(2).for_each(|page| marks.range(page * PAGE + 7, 1));
            marks.finish();
            assert_eq!(pages(&file, 0), all);
            file.write_all_at(&[0; 0x300], 0).unwrap();
        }
    }

    #[test]
    fn nothing_is_marked_beyond_the_log() {
        // 517 bytes: the last word is not whole.
        let (memory, file) = logged(517, 0);
        file.set_len(4096).unwrap();
        for gpa in [517 * 8 * 0x1000, 1 << 40, u64::MAX - 10, u64::MAX] {
            let mut marks = memory.dirty().unwrap();
            marks.range(gpa, 100);
            marks.place(std::ptr::null(), 100);
            marks.finish();
        }
        assert!(pages(&file, 0).is_empty());
        let mut marks = memory.dirty().unwrap();
        marks.range((517 * 8 - 1) * 0x1000, 0x2000);
        marks.finish();
        assert_eq!(pages(&file, 0), [517 * 8 - 1]);
    }

    #[test]
    fn a_truncated_log_is_survived() {
        let (memory, file) = logged(0x300, 64);
        file.set_len(0).unwrap();
        assert!(!memory.is_lost());
        let mut marks = memory.dirty().unwrap();
        marks.range(0, 1);
        marks.finish();
        assert!(memory.is_lost());
        assert!(!memory.logged_by(None).unwrap().is_lost());
    }

    #[test]
    fn refuses_a_bad_log() {
        assert!(matches!(Log::map(memfd(4096), 0, 0), Err(MemError::Empty)));
        assert!(matches!(Log::map(memfd(4096), 4096, 8), Err(MemError::BeyondFile { .. })));
        assert!(matches!(Log::map(memfd(4096), 64, 4), Err(MemError::LogOffset(4))));
        assert!(matches!(Log::map(memfd(4096), 64, u64::MAX - 7), Err(MemError::Wraps)));
        assert!(matches!(Log::map(memfd(4096), u64::MAX, 8), Err(MemError::LogSize(_))));
        assert!(matches!(Log::map(File::open("/dev/zero").unwrap(), 64, 0), Err(MemError::NotMemory(_))));
        let short = Arc::new(Log::map(memfd(4096), 127, 0).unwrap());
        let memory = GuestMemory::new(vec![Region::map(memfd(0x40_0000), 0, 0x40_0000, 0, 0).unwrap()]).unwrap();
        assert!(matches!(memory.logged_by(Some(short)), Err(MemError::LogSize(127))));
        assert!(memory.logged_by(None).unwrap().dirty().is_none());
    }
}
