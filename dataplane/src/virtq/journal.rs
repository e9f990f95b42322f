//! Where each ring stands, in a file that outlives the process: what a crash leaves there, together with the ring
//! itself, tells the next process exactly where to go on.
//!
//! The frontends of network devices have no in-flight region for us (vhost-user, `GET_INFLIGHT_FD`), so we keep one
//! ourselves. A record says between which two positions the last batch lies. It is written
//!
//! - of a ring from which we receive: when frames were taken, before the first is delivered. What a crash interrupts is
//!   given back without being delivered again, since some may have been: a frame may be lost in a crash, never doubled.
//! - of a packed ring to which we send: with the used elements, before the first is written. What a crash interrupts is
//!   finished. (A split ring publishes by one store.)
//!
//! A process that is killed has made its stores in order; a page cache keeps them.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::FallocateFlags;

use crate::limits::{BURST, MAX_JOURNAL};
use crate::mem::Guard;
use crate::sync::lock;

/// Elements of a batch, at most.
pub const BATCH: usize = 2 * BURST;
/// Set in a record that holds something.
const VALID: u64 = 1 << 63;
/// Changes with the layout, so that nobody reads another one.
const LAYOUT: u64 = 1;

#[repr(C, align(64))]
struct Record {
    /// Whose it is: a hash of port and ring. 0 if it is free.
    key: AtomicU64,
    /// Which ring of that it is about: a hash of its memory and place.
    identity: AtomicU64,
    /// Positions before and after the last batch, and its number of elements.
    batch: AtomicU64,
    slots: [AtomicU32; BATCH],
    elements: [AtomicU64; BATCH],
}

/// The file, mapped.
#[derive(Debug)]
pub struct Journal {
    records: NonNull<Record>,
    index: Mutex<Index>,
    /// If the file cannot hold a page after all, what is in it is out of date, and no worse comes of that.
    guard: Option<Guard>,
    _file: File,
}

/// Where records are.
#[derive(Debug)]
struct Index {
    /// Records that a ring of this process has.
    taken: Vec<bool>,
    /// Places by the key that is stored there, of the first `used` ones.
    known: HashMap<u64, usize>,
    /// No place from here on was ever used: they are, one after the other, by this process or another one.
    used: usize,
}

// SAFETY: records consist of atomics; the mapping lives as long as the journal.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

/// A batch as a record tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Where it begins: an index of a split ring, a slot and wrap counter (bit 15) of a packed one.
    pub before: u16,
    /// Where it ends.
    pub after: u16,
    /// Elements written down.
    pub count: u16,
}

impl Journal {
    const LEN: usize = MAX_JOURNAL * size_of::<Record>();

    /// Opens the file, made if it is not there.
    ///
    /// # Errors
    /// If it cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(path)?;
        // It only ever grows: another build may have a longer one mapped, or want it back. And a page that a full disk has no
        // room for must not be missed by a worker.
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, Self::LEN as u64) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP) if file.metadata()?.len() >= Self::LEN as u64 => {}
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(Self::LEN as u64)?,
            Err(error) => return Err(error.into()),
        }
        let (both, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), Self::LEN, both, shared, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let records = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let guard = Some(Guard::new(base.cast(), Self::LEN));
        let index = Index { taken: vec![false; MAX_JOURNAL], known: HashMap::new(), used: 0 };
        Ok(Arc::new(Self { records, index: Mutex::new(index), guard, _file: file }))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }

    fn record(&self, place: usize) -> &Record {
        debug_assert!(place < MAX_JOURNAL);
        // SAFETY: the mapping has room for that many records, is page-aligned, and any bytes are valid atomics.
        unsafe { self.records.add(place % MAX_JOURNAL).as_ref() }
    }

    /// Whether all records are in use.
    pub fn is_full(&self) -> bool {
        self.index().taken.iter().all(|taken| *taken)
    }

    /// The record of a ring, which is that of the ring of the same name before it. `None` if that is still in use, or all
    /// are.
    pub fn entry(self: &Arc<Self>, port: &str, ring: usize, identity: u64) -> Option<Arc<Entry>> {
        let key = hash([port.as_bytes(), &ring.to_le_bytes(), &LAYOUT.to_le_bytes()]) | 1;
        let index = &mut *self.index();
        // What the process before has left, and what it adds while this one takes over.
        while index.used < MAX_JOURNAL
            && let stored = self.record(index.used).key.load(Ordering::Relaxed)
            && stored != 0
        {
            index.known.entry(stored).or_insert(index.used);
            index.used += 1;
        }
        let place = match index.known.get(&key) {
            // Two records of one ring would contradict each other.
            Some(&place) if index.taken[place] => return None,
            Some(&place) => place,
            // The last is that of a port which is no more.
            None if index.used < MAX_JOURNAL => index.used,
            None => index.taken.iter().position(|taken| !taken)?,
        };
        index.taken[place] = true;
        let record = self.record(place);
        let before = record.key.swap(key, Ordering::Relaxed);
        if before != key {
            record.batch.store(0, Ordering::Relaxed);
            if index.known.get(&before) == Some(&place) {
                index.known.remove(&before);
            }
            index.known.insert(key, place);
        }
        Some(Arc::new(Entry { journal: self.clone(), place, identity }))
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        drop(self.guard.take());
        // SAFETY: the mapping is ours, and entries keep the journal alive.
        unsafe { libc::munmap(self.records.as_ptr().cast(), Self::LEN) };
    }
}

/// FNV-1a: the same in every build.
pub fn hash<'b>(pieces: impl IntoIterator<Item = &'b [u8]>) -> u64 {
    let bytes = pieces.into_iter().flatten();
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The record of one ring, written by whoever holds the ring.
#[derive(Debug)]
pub struct Entry {
    journal: Arc<Journal>,
    place: usize,
    identity: u64,
}

impl Entry {
    fn record(&self) -> &Record {
        self.journal.record(self.place)
    }

    /// What was written last of this very ring, by this process or the one before.
    pub fn last(&self) -> Option<Batch> {
        let record = self.record();
        let batch = record.batch.load(Ordering::Acquire);
        let ours = batch & VALID != 0 && record.identity.load(Ordering::Relaxed) == self.identity;
        let count = ((batch >> 32) as u16).min(BATCH as u16);
        ours.then_some(Batch { before: batch as u16, after: (batch >> 16) as u16, count })
    }

    /// The elements of the last batch, with their slots.
    pub fn elements(&self, count: u16) -> impl DoubleEndedIterator<Item = (u32, u64)> + ExactSizeIterator {
        let record = self.record();
        (0..usize::from(count).min(BATCH))
            .map(|place| (record.slots[place].load(Ordering::Relaxed), record.elements[place].load(Ordering::Relaxed)))
    }

    /// From now on the ring is at this position.
    pub fn begin(&self, at: u16) {
        let record = self.record();
        record.batch.store(0, Ordering::Release);
        record.identity.store(self.identity, Ordering::Release);
        self.intend(at, at);
    }

    /// Chains were taken, which end at `after`, and are about to be delivered.
    #[inline]
    pub fn intend(&self, before: u16, after: u16) {
        self.write(Batch { before, after, count: 0 });
    }

    #[inline]
    fn write(&self, batch: Batch) {
        let Batch { before, after, count } = batch;
        let word = VALID | u64::from(before) | (u64::from(after) << 16) | (u64::from(count) << 32);
        self.record().batch.store(word, Ordering::Release);
        // Nothing that comes after this in the program may be done before it.
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }

    /// These elements are about to be written to these slots. What was written down before is done with by now, so
    /// overwriting it in parts does no harm.
    pub fn redo(&self, before: u16, after: u16, elements: impl IntoIterator<Item = (u32, u64)>) {
        let record = self.record();
        let mut count = 0;
        for (place, (slot, element)) in elements.into_iter().take(BATCH).enumerate() {
            record.slots[place].store(slot, Ordering::Relaxed);
            record.elements[place].store(element, Ordering::Relaxed);
            count += 1;
        }
        self.write(Batch { before, after, count });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.journal.index().taken[self.place] = false;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rings");
        let journal = Journal::open(&path).unwrap();
        let entry = journal.entry("vm1", 0, 7).unwrap();
        assert_eq!(entry.last(), None);
        entry.begin(3);
        assert_eq!(entry.last(), Some(Batch { before: 3, after: 3, count: 0 }));
        entry.redo(3, 0x8001, [(3, 30), (5, 50)]);
        let other = journal.entry("vm1", 1, 7).unwrap();
        assert_eq!(other.last(), None);
        drop((entry, other, journal));

        let journal = Journal::open(&path).unwrap();
        let entry = journal.entry("vm1", 0, 7).unwrap();
        assert_eq!(entry.last(), Some(Batch { before: 3, after: 0x8001, count: 2 }));
        assert_eq!(entry.elements(2).collect::<Vec<_>>(), [(3, 30), (5, 50)]);
        drop(entry);
        let another_ring = journal.entry("vm1", 0, 8).unwrap();
        assert_eq!(another_ring.last(), None);
        another_ring.begin(0);
        assert!(another_ring.last().is_some());
    }

    /// As in a takeover: each ring has one record, whoever made it and when.
    #[test]
    fn what_another_process_adds_meanwhile_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = [(); 2].map(|()| Journal::open(&dir.path().join("rings")).unwrap());
        let late: Vec<_> = (0..3).map(|ring| old.entry("late", ring, 7).unwrap()).collect();
        late.iter().for_each(|entry| entry.begin(5));
        let other = new.entry("other", 0, 7).unwrap();
        assert!(late.iter().all(|entry| entry.place != other.place && entry.last().is_some()));
        for (ring, entry) in late.iter().enumerate() {
            assert_eq!(new.entry("late", ring, 7).unwrap().place, entry.place);
        }
    }

    /// A build with room for more has it mapped, or has left it.
    #[test]
    fn a_longer_file_is_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rings");
        let longer = Journal::LEN as u64 + 8192;
        let file = File::create(&path).unwrap();
        file.set_len(longer).unwrap();
        file.write_all_at(b"kept", longer - 4).unwrap();
        let journal = Journal::open(&path).unwrap();
        journal.entry("vm", 0, 7).unwrap().begin(3);
        assert_eq!(file.metadata().unwrap().len(), longer);
        let mut end = [0; 4];
        File::open(&path).unwrap().read_exact_at(&mut end, longer - 4).unwrap();
        assert_eq!(&end, b"kept");
        drop(journal);

        // A shorter one grows.
        file.set_len(4096).unwrap();
        Journal::open(&path).unwrap().entry("vm", 1, 7).unwrap().begin(3);
        assert_eq!(file.metadata().unwrap().len(), Journal::LEN as u64);
    }

    #[test]
    fn old_ports_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("rings")).unwrap();
        let mut all: Vec<_> = (0..MAX_JOURNAL).map(|ring| journal.entry("vm", ring, 1).unwrap()).collect();
        assert!(journal.entry("late", 0, 1).is_none() && journal.is_full());
        all.pop();
        assert!(!journal.is_full());
        let late = journal.entry("late", 0, 1).unwrap();
        assert_eq!(late.last(), None);
        // Who had it before has none any more, and each other one its own.
        assert!(journal.entry("vm", MAX_JOURNAL - 1, 1).is_none());
        let places: HashSet<_> = all.iter().map(|entry| entry.place).collect();
        assert!(places.len() == MAX_JOURNAL - 1 && !places.contains(&late.place));
        drop(late);
        assert!(journal.entry("vm", 0, 1).is_none() && journal.entry("late", 0, 1).is_some());
    }

    #[test]
    fn whatever_is_in_the_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rings");
        std::fs::write(&path, vec![0xff; 4096]).unwrap();
        let journal = Journal::open(&path).unwrap();
        // Each keeps its record.
        let mut entries = Vec::new();
        for ring in 0..MAX_JOURNAL {
            let entry = journal.entry("vm", ring, u64::MAX).unwrap();
            if let Some(batch) = entry.last() {
                assert!(usize::from(batch.count) <= BATCH);
                assert!(entry.elements(batch.count).count() <= BATCH);
            }
            entries.push(entry);
        }
    }
}
