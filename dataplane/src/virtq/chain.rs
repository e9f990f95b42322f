//! The untrusted walk along a descriptor chain (virtio 1.2, 2.7.5 and 2.7.7).

use crate::limits::MAX_CHAIN;
use crate::mem::{GuestMemory, Segment, Wide};
use crate::virtq::Fault;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
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
    buffers: usize,
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
    /// Hands every buffer of the chain at `head` to `sink`, in order, and returns their bytes in sum.
    /// Buffers that cross from one memory region into an adjacent one come in pieces; empty ones do not come at all.
    ///
    /// # Errors
    /// [`Fault`] if the chain breaks a rule. The sink may have got some of it.
    #[inline]
    pub(crate) fn run(self, head: u16, hints: &mut Hints, sink: impl FnMut(Segment<'m>)) -> Result<u64, Fault> {
        let descriptor = self.table.read(head)?;
        let mut sink = Sink { walk: self, segments: 0, bytes: 0, put: sink };
        if !descriptor.has(INDIRECT | NEXT) {
            sink.buffer(descriptor, hints)?;
            return Ok(sink.bytes);
        }
        sink.chain(descriptor, hints)?;
        Ok(sink.bytes)
    }

    /// The chain at `head` if it is what most chains are: one buffer in one piece. `None` for all else, faults
    /// included, which [`Walk::run`] will tell apart.
    #[inline]
    pub(crate) fn single(self, head: u16, hints: &mut Hints) -> Option<Wide<'m>> {
        let descriptor = self.table.read(head).ok()?;
        let wanted = if self.direction == Direction::ToGuest { WRITE } else { 0 };
        if descriptor.flags & (INDIRECT | NEXT | WRITE) != wanted {
            return None;
        }
        let range = self.memory.locate(descriptor.addr, &mut hints.buffers)?;
        if descriptor.len as usize > range.len {
            return None;
        }
        // SAFETY: a range of guest memory that was just translated, of memory held for `'m`, and what follows it.
        unsafe { Some(Wide::new(Segment::new(range.ptr, descriptor.len)?, range.len)) }
    }

    /// Enters the indirect table that a descriptor stands for.
    fn enter(self, descriptor: Descriptor, hints: &mut Hints) -> Result<Table, Fault> {
        // 2.7.5.3.1: not with a next one, and only where negotiated.
        if !self.indirect || descriptor.has(NEXT) {
            return Err(Fault::BadIndirect);
        }
        let bytes = descriptor.len as usize;
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR) || bytes / DESCRIPTOR > MAX_CHAIN {
            return Err(Fault::IndirectLength);
        }
        let first = self.memory.translate_whole(descriptor.addr, bytes, &mut hints.tables);
        let first = first.ok_or(Fault::UnmappedAddress)?;
        if !first.addr().is_multiple_of(align_of::<u64>()) {
            return Err(Fault::UnmappedAddress);
        }
        // SAFETY: translated over its whole length from memory held for `'m`, and aligned.
        Ok(unsafe { Table::new(first, (bytes / DESCRIPTOR) as u32) })
    }
}

/// A walk in progress.
struct Sink<'m, F> {
    walk: Walk<'m>,
    segments: usize,
    bytes: u64,
    put: F,
}

impl<'m, F: FnMut(Segment<'m>)> Sink<'m, F> {
    fn chain(&mut self, first: Descriptor, hints: &mut Hints) -> Result<(), Fault> {
        let mut descriptor = first;
        let mut table = self.walk.table;
        let mut nested = false;
        let mut left = table.len;
        loop {
            if descriptor.has(INDIRECT) {
                if nested {
                    return Err(Fault::BadIndirect);
                }
                nested = true;
                table = self.walk.enter(descriptor, hints)?;
                left = table.len;
                descriptor = table.read(0)?;
                continue;
            }
            self.buffer(descriptor, hints)?;
            left -= 1;
            if !descriptor.has(NEXT) {
                return Ok(());
            }
            // As many descriptors as the table has, all different, would have ended by now.
            if left == 0 {
                return Err(Fault::ChainLoop);
            }
            descriptor = table.read(descriptor.next)?;
        }
    }

    #[inline]
    fn buffer(&mut self, descriptor: Descriptor, hints: &mut Hints) -> Result<(), Fault> {
        if descriptor.has(WRITE) != (self.walk.direction == Direction::ToGuest) {
            return Err(Fault::WrongDirection);
        }
        let (mut addr, mut left) = (descriptor.addr, descriptor.len as usize);
        while left > 0 {
            let range = self.walk.memory.translate(addr, left, &mut hints.buffers).ok_or(Fault::UnmappedAddress)?;
            self.segments += 1;
            if self.segments > MAX_CHAIN {
                return Err(Fault::ChainTooLong);
            }
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
}
