//! A guest's driver of one ring in either layout: fixed buffers, one frame in each.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use vmm_sys_util::eventfd::EventFd;

/// Chains of each ring; a chain has up to two descriptors.
pub(crate) const CHAINS: u16 = 128;
/// Descriptors of each ring.
pub(crate) const SLOTS: u16 = 256;
const BUFFER: usize = 2048;
const AREA: usize = 0x1000;
const STRIDE: usize = 3 * AREA + CHAINS as usize * BUFFER;
/// The virtio-net header.
pub(crate) const HEADER: usize = 12;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Bytes at the end that no ring and no buffer is in.
pub(crate) const SPARE: usize = 4096;

/// Shared memory of a guest.
pub(crate) struct Memory {
    pub(crate) file: File,
    pub(crate) len: usize,
    base: *mut u8,
}

impl Memory {
    pub(crate) fn new() -> Rc<Self> {
        let len = 2 * STRIDE + SPARE;
        // SAFETY: the name is a C string, the descriptor that comes back is ours, and the mapping is new.
        unsafe {
            let file =
                File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING));
            file.set_len(len as u64).unwrap();
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let base = libc::mmap(std::ptr::null_mut(), len, both, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(base, libc::MAP_FAILED);
            Rc::new(Self { file, len, base: base.cast() })
        }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.len && offset.is_multiple_of(align_of::<T>()));
        self.base.wrapping_add(offset).cast()
    }

    fn put<T>(&self, offset: usize, value: T) {
        // SAFETY: `at` has checked the place.
        unsafe { self.at::<T>(offset).write_volatile(value) };
    }

    fn get<T>(&self, offset: usize) -> T {
        // SAFETY: as above.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above; the mapping lives as long as `self`.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    pub(crate) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len).map(|at| self.get(at)).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// What kind of ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) packed: bool,
    pub(crate) event_idx: bool,
    /// Header and payload of what is sent in descriptors of their own.
    pub(crate) chained: bool,
}

/// One ring, from the driver's side.
pub(crate) struct Ring {
    memory: Rc<Memory>,
    kind: Kind,
    sends: bool,
    first: usize,
    /// Next index or slot to make available, and its wrap counter.
    next: u16,
    next_wrap: bool,
    /// Next index or slot to look for a used chain at.
    seen: u16,
    seen_wrap: bool,
    /// Chains that are free, and which were made available in which order.
    free: Vec<u16>,
    given: std::collections::VecDeque<u16>,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// What was made available when the device was last told.
    told: u16,
}

impl Ring {
    pub(crate) fn new(memory: &Rc<Memory>, index: usize, kind: Kind) -> Self {
        Self {
            memory: memory.clone(),
            kind,
            sends: index == 1,
            first: index * STRIDE,
            next: 0,
            next_wrap: true,
            seen: 0,
            seen_wrap: true,
            free: (0..CHAINS).collect(),
            given: std::collections::VecDeque::new(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            told: 0,
        }
    }

    /// Offsets of the three areas.
    pub(crate) fn areas(&self) -> [u64; 3] {
        [0, 1, 2].map(|area| (self.first + area * AREA) as u64)
    }

    /// What a frontend that has lost its backend says of where the ring stands: where it began.
    pub(crate) fn stale_base(&self) -> u32 {
        if self.kind.packed { 0x8000_8000 } else { 0 }
    }

    fn buffer(&self, chain: u16) -> usize {
        self.first + 3 * AREA + usize::from(chain) * BUFFER
    }

    /// Makes the next free buffer available: with a frame to send, or to receive one. `false` if there is none.
    pub(crate) fn give(&mut self, frame: Option<&[u8]>) -> bool {
        let Some(chain) = self.free.pop() else { return false };
        let at = self.buffer(chain);
        for (offset, byte) in frame.unwrap_or_default().iter().enumerate() {
            self.memory.put(at + HEADER + offset, *byte);
        }
        for offset in 0..if self.sends { HEADER } else { 0 } {
            self.memory.put(at + offset, 0u8);
        }
        let len = frame.map_or(BUFFER, |frame| HEADER + frame.len());
        let pieces: &[(usize, usize)] =
            if self.kind.chained && self.sends { &[(at, HEADER), (at + HEADER, len - HEADER)] } else { &[(at, len)] };
        if self.kind.packed {
            self.give_packed(chain, pieces)
        } else {
            self.give_split(chain, pieces)
        }
        self.given.push_back(chain);
        true
    }

    fn flags(&self, last: bool) -> u16 {
        (if self.sends { 0 } else { WRITE }) | if last { 0 } else { NEXT }
    }

    fn give_split(&mut self, chain: u16, pieces: &[(usize, usize)]) {
        for (place, &(at, len)) in pieces.iter().enumerate() {
            let (index, last) = (2 * chain + place as u16, place + 1 == pieces.len());
            let descriptor = self.first + 16 * usize::from(index);
            self.memory.put(descriptor, at as u64);
            self.memory.put(descriptor + 8, len as u32);
            self.memory.put(descriptor + 12, self.flags(last));
            self.memory.put(descriptor + 14, index + 1);
        }
        let avail = self.first + AREA;
        self.memory.put(avail + 4 + 2 * usize::from(self.next % SLOTS), 2 * chain);
        self.next = self.next.wrapping_add(1);
        self.memory.word(avail + 2).store(self.next, Ordering::Release);
    }

    fn give_packed(&mut self, chain: u16, pieces: &[(usize, usize)]) {
        let mut first = None;
        for (place, &(at, len)) in pieces.iter().enumerate() {
            let descriptor = self.first + 16 * usize::from(self.next);
            self.memory.put(descriptor, at as u64);
            self.memory.put(descriptor + 8, len as u32);
            self.memory.put(descriptor + 12, chain);
            let wrap = if self.next_wrap { AVAIL } else { USED };
            let flags = self.flags(place + 1 == pieces.len()) | wrap;
            match first {
                None => first = Some((descriptor + 14, flags)),
                Some(_) => self.memory.put(descriptor + 14, flags),
            }
            self.next += 1;
            if self.next == SLOTS {
                (self.next, self.next_wrap) = (0, !self.next_wrap);
            }
        }
        let (place, flags) = first.unwrap();
        self.memory.word(place).store(flags, Ordering::Release);
    }

    /// Tells the device of what was made available, if it wants to be told.
    pub(crate) fn notify(&mut self) {
        fence(Ordering::SeqCst);
        let (avail, used) = (self.first + AREA, self.first + 2 * AREA);
        let old = std::mem::replace(&mut self.told, self.next);
        let wanted = match (self.kind.packed, self.kind.event_idx) {
            (false, false) => self.memory.get::<u16>(used) & 1 == 0,
            (false, true) => {
                let event: u16 = self.memory.get(used + 4 + 8 * usize::from(SLOTS));
                self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
            }
            // What is asked for may lie anywhere between two looks; telling too often does no harm here.
            (true, _) => self.memory.get::<u16>(used + 2) != 1,
        };
        let _ = avail;
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// Takes a used chain back: its buffer's offset and how much was written to it.
    pub(crate) fn take(&mut self) -> Option<(usize, usize)> {
        let (chain, len) = if self.kind.packed { self.take_packed()? } else { self.take_split()? };
        let expected = self.given.pop_front();
        assert_eq!(expected, Some(chain), "chains are used in order");
        self.free.insert(0, chain);
        Some((self.buffer(chain), len))
    }

    fn take_split(&mut self) -> Option<(u16, usize)> {
        let used = self.first + 2 * AREA;
        let index = self.memory.word(used + 2).load(Ordering::Acquire);
        let ahead = index.wrapping_sub(self.seen);
        assert!(usize::from(ahead) <= self.given.len(), "used index {index} at {}", self.seen);
        if ahead == 0 {
            return None;
        }
        let element = used + 4 + 8 * usize::from(self.seen % SLOTS);
        self.seen = self.seen.wrapping_add(1);
        Some((self.memory.get::<u32>(element) as u16 / 2, self.memory.get::<u32>(element + 4) as usize))
    }

    fn take_packed(&mut self) -> Option<(u16, usize)> {
        let descriptor = self.first + 16 * usize::from(self.seen);
        let flags = self.memory.word(descriptor + 14).load(Ordering::Acquire);
        if (flags & AVAIL != 0) != self.seen_wrap || (flags & USED != 0) != self.seen_wrap {
            return None;
        }
        let pieces = if self.kind.chained && self.sends { 2 } else { 1 };
        self.seen += pieces;
        if self.seen >= SLOTS {
            (self.seen, self.seen_wrap) = (self.seen - SLOTS, !self.seen_wrap);
        }
        Some((self.memory.get(descriptor + 12), self.memory.get::<u32>(descriptor + 8) as usize))
    }

    /// Chains that the device has.
    pub(crate) fn outstanding(&self) -> usize {
        self.given.len()
    }
}
