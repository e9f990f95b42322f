//! The untrusted walk along a descriptor chain (virtio 1.2, 2.7.5 and 2.7.7).

use crate::limits::MAX_CHAIN;
use crate::mem::prefetch::prefetch_read;
use crate::mem::{GuestMemory, Locator, Segment};
use crate::virtq::Fault;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// Size of a descriptor, in bytes.
pub(crate) const DESCRIPTOR: usize = 16;

/// Which way the buffers of a queue go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The guest sends: we read its buffers.
    FromGuest,
    /// The guest receives: we write its buffers.
    ToGuest,
}

impl Direction {
    /// What descriptors of such buffers have set.
    #[inline]
    pub(crate) fn flag(self) -> u16 {
        match self {
            Self::FromGuest => 0,
            Self::ToGuest => WRITE,
        }
    }
}

/// A descriptor, read once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A table of descriptors in guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    first: *const u64,
    len: u32,
}

impl Table {
    /// # Safety
    /// `len` descriptors from `first`, aligned to 8 bytes, must stay mapped while the table is in use.
    pub(crate) unsafe fn new(first: *const u8, len: u32) -> Self {
        Self { first: first.cast(), len }
    }

    /// Asks for a descriptor, to read it soon.
    #[inline]
    pub(crate) fn prefetch(self, index: u16) {
        prefetch_read(self.first.wrapping_add(usize::from(index) * 2));
    }

    #[inline]
    fn read(self, index: u16) -> Result<Descriptor, Fault> {
        if u32::from(index) >= self.len {
            return Err(Fault::DescriptorIndex);
        }
        // SAFETY: the index was checked, and the table is mapped by the contract of `new`. The guest may write
        // meanwhile, hence volatile; each word is read once, so what was checked is what is used.
        let (addr, rest) = unsafe {
            let place = self.first.add(usize::from(index) * 2);
            (place.read_volatile(), place.add(1).read_volatile())
        };
        Ok(Descriptor {
            addr: u64::from_le(addr),
            len: u64::from_le(rest) as u32,
            flags: (u64::from_le(rest) >> 32) as u16,
            next: (u64::from_le(rest) >> 48) as u16,
        })
    }
}

/// Indices of the memory regions hit last, for the tables and for the buffers of a ring.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hints {
    pub(crate) buffers: usize,
    tables: usize,
}

/// What a walk needs to know about its ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk<'m> {
    pub(crate) table: Table,
    pub(crate) memory: &'m GuestMemory,
    pub(crate) indirect: bool,
    pub(crate) direction: Direction,
}

impl<'m> Walk<'m> {
    /// Hands every buffer of the chain at `head` to `sink`, in order. Returns their bytes in sum and how many they are.
    /// Buffers that cross from one memory region into an adjacent one come in pieces; empty ones do not come at all.
    ///
    /// # Errors
    /// [`Fault`] if the chain breaks a rule. The sink may have got some of it.
    #[inline]
    pub(crate) fn run(self, head: u16, hints: &mut Hints, sink: impl FnMut(Segment<'m>)) -> Result<(u64, u32), Fault> {
        let mut descriptor = self.table.read(head)?;
        let mut buffers = Buffers::new(self.memory, self.direction, sink);
        let mut table = self.table;
        let mut nested = false;
        let mut left = table.len;
        loop {
            if descriptor.has(INDIRECT) {
                // 2.7.5.3.1: not within a table, not with a next one, and only where negotiated.
                if nested || !self.indirect || descriptor.has(NEXT) {
                    return Err(Fault::BadIndirect);
                }
                nested = true;
                table = enter(self.memory, descriptor.addr, descriptor.len, hints)?;
                left = table.len;
                descriptor = table.read(0)?;
                continue;
            }
            buffers.buffer(descriptor.addr, descriptor.len, descriptor.flags, hints)?;
            left -= 1;
            if !descriptor.has(NEXT) {
                return Ok((buffers.bytes, buffers.count));
            }
            // As many descriptors as the table has, all different, would have ended by now.
            if left == 0 {
                return Err(Fault::ChainLoop);
            }
            descriptor = table.read(descriptor.next)?;
        }
    }

    /// The chain at `head` if it is what most chains are: one buffer in one piece. `None` for all else, faults
    /// included, which [`Walk::run`] will tell apart.
    #[inline]
    pub(crate) fn single(&self, head: u16, locator: &mut Locator<'m>) -> Option<Segment<'m>> {
        let descriptor = self.table.read(head).ok()?;
        if descriptor.flags & (INDIRECT | NEXT | WRITE) != self.direction.flag() {
            return None;
        }
        locator.whole(descriptor.addr, descriptor.len)
    }
}

/// Enters the indirect table that a descriptor stands for.
fn enter(memory: &GuestMemory, addr: u64, len: u32, hints: &mut Hints) -> Result<Table, Fault> {
    let bytes = len as usize;
    if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR) || bytes / DESCRIPTOR > MAX_CHAIN {
        return Err(Fault::IndirectLength);
    }
    let first = memory.translate_whole(addr, bytes, &mut hints.tables).ok_or(Fault::UnmappedAddress)?;
    if !first.addr().is_multiple_of(align_of::<u64>()) {
        return Err(Fault::UnmappedAddress);
    }
    // SAFETY: translated over its whole length, and aligned; the caller holds the memory while it reads the table.
    Ok(unsafe { Table::new(first, (bytes / DESCRIPTOR) as u32) })
}

/// Checks buffers one by one and hands them on.
pub(crate) struct Buffers<'m, F> {
    memory: &'m GuestMemory,
    direction: Direction,
    count: u32,
    bytes: u64,
    put: F,
}

impl<'m, F: FnMut(Segment<'m>)> Buffers<'m, F> {
    pub(crate) fn new(memory: &'m GuestMemory, direction: Direction, put: F) -> Self {
        Self { memory, direction, count: 0, bytes: 0, put }
    }

    /// Bytes handed on so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Buffers so far, empty ones included; one in several pieces counts as several.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// All buffers of a packed ring's indirect table: every entry, in order, without next (2.8.7).
    pub(crate) fn table(&mut self, addr: u64, len: u32, hints: &mut Hints) -> Result<(), Fault> {
        let table = enter(self.memory, addr, len, hints)?;
        for index in 0..table.len as u16 {
            let entry = table.read(index)?;
            // In this layout the flags come last, where a split ring's descriptor has its next index.
            let flags = entry.next;
            if flags & INDIRECT != 0 {
                return Err(Fault::BadIndirect);
            }
            self.buffer(entry.addr, entry.len, flags, hints)?;
        }
        Ok(())
    }

    /// One buffer.
    #[inline]
    pub(crate) fn buffer(&mut self, addr: u64, len: u32, flags: u16, hints: &mut Hints) -> Result<(), Fault> {
        if flags & WRITE != self.direction.flag() {
            return Err(Fault::WrongDirection);
        }
        let (mut addr, mut left) = (addr, len as usize);
        if left == 0 {
            // It counts: a chain of nothing must not keep us for as long as its ring is.
            self.one_more()?;
        }
        while left > 0 {
            let range = self.memory.translate(addr, left, &mut hints.buffers).ok_or(Fault::UnmappedAddress)?;
            self.one_more()?;
            // SAFETY: a range of guest memory that was just translated, of memory held for `'m`. Its length is at
            // most the descriptor's, a u32.
            let segment = unsafe { Segment::new(range.ptr, range.len as u32) };
            (self.put)(segment.ok_or(Fault::UnmappedAddress)?);
            self.bytes += range.len as u64;
            addr = addr.wrapping_add(range.len as u64);
            left -= range.len;
        }
        Ok(())
    }

    #[inline]
    fn one_more(&mut self) -> Result<(), Fault> {
        self.count += 1;
        if self.count as usize > MAX_CHAIN { Err(Fault::ChainTooLong) } else { Ok(()) }
    }
}
