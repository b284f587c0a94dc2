//! The memory of one key group, reached by offsets that are checked against the segment's end.
//!
//! Invariants:
//! - a group's segment is written by this process alone, and only through the transaction: `write`
//!   (undone on rollback) or `write_fresh` and the like (memory that was free at the last commit);
//! - each block of the heap belongs to one structure, which is borrowed as long as a reference into
//!   it lives. This module cannot check that (its references have free lifetimes): it is the
//!   discipline of the crate's modules, whose public signatures bind each reference to `&self`, and
//!   why nothing here is public.
//!
//! Called by every module of this crate but `slots`, which has pointers of its own for speed.

use std::ptr::NonNull;
use testudo_shm::record::{Batch, Item, Record};
use testudo_shm::txn::{Plain, Txn};

/// A mapped key-group segment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seg {
    base: NonNull<u8>,
    len: u64,
}

impl Seg {
    /// The segment mapped at `base..base + len`; `None` when `base` is null.
    ///
    /// # Safety
    /// The range is mapped writable by this process alone, inside the transaction's arena, and
    /// stays so.
    pub(crate) unsafe fn new(base: *mut u8, len: u64) -> Option<Self> {
        Some(Self { base: NonNull::new(base)?, len })
    }

    /// Address of offset 0.
    #[inline(always)]
    pub(crate) fn base(self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes of the segment.
    pub(crate) fn len(self) -> u64 {
        self.len
    }

    /// Address of a range. An offset that leads out of the segment means that the state is damaged:
    /// stopping is all that is left, the successor restores the group.
    #[inline(always)]
    fn range(self, at: u64, bytes: usize) -> *mut u8 {
        let inside = at <= self.len && bytes as u64 <= self.len - at;
        if !inside {
            self.leads_out(at, bytes);
        }
        // SAFETY: the sum was checked to lie inside the mapping.
        unsafe { self.base.as_ptr().add(at as usize) }
    }

    #[cold]
    #[inline(never)]
    fn leads_out(self, at: u64, bytes: usize) -> ! {
        let what = format!("offset {at} + {bytes} leads out of its {} bytes", self.len);
        crate::verify::unsound(self.base(), &what)
    }

    /// Reads a value.
    #[inline(always)]
    pub(crate) fn read<T: Plain>(self, at: u64) -> T {
        // SAFETY: the range is inside the mapping and any bit pattern is a T.
        unsafe { self.range(at, size_of::<T>()).cast::<T>().read_unaligned() }
    }

    /// Logs the old value, then stores the new one.
    #[inline(always)]
    pub(crate) fn write<T: Plain>(self, txn: &mut Txn, at: u64, new: T) {
        let place = self.range(at, size_of::<T>());
        // SAFETY: the range is inside the mapping, which `new` promised to be ours and in the
        // arena.
        unsafe {
            txn.log(place, size_of::<T>());
            place.cast::<T>().write_unaligned(new);
        }
    }

    /// Stores into memory that nothing committed refers to.
    #[inline(always)]
    pub(crate) fn write_fresh<T: Plain>(self, txn: &mut Txn, at: u64, new: T) {
        let place = self.range(at, size_of::<T>());
        // SAFETY: as in `write`.
        unsafe {
            txn.fresh(place, size_of::<T>());
            place.cast::<T>().write_unaligned(new);
        }
    }

    /// Logs a range that is about to be changed.
    pub(crate) fn log(self, txn: &mut Txn, at: u64, bytes: usize) {
        // SAFETY: as in `write`.
        unsafe { txn.log(self.range(at, bytes), bytes) };
    }

    /// Copies bytes into memory that nothing committed refers to, or that was logged.
    #[inline]
    pub(crate) fn fill(self, txn: &mut Txn, at: u64, bytes: &[u8]) {
        let place = self.range(at, bytes.len());
        // SAFETY: as in `write`; `copy` allows a source in the same segment.
        unsafe {
            txn.fresh(place, bytes.len());
            std::ptr::copy(bytes.as_ptr(), place, bytes.len());
        }
    }

    /// Asks the kernel for the pages of a range at once, which costs a quarter of taking a fault
    /// for each. Without effect where it cannot (before Linux 5.14): then they come one by one.
    pub(crate) fn populate(self, at: u64, bytes: u64) {
        let place = self.range(at, bytes as usize);
        // SAFETY: advice on a range of our own mapping; contents do not change.
        unsafe {
            let page = place.map_addr(|address| address & !4095);
            let length = bytes as usize + (place.addr() - page.addr());
            libc::madvise(page.cast(), length, libc::MADV_POPULATE_WRITE);
        }
    }

    /// Gives the whole pages of a free range back: they read as zeros afterwards, and cost nothing.
    pub(crate) fn give_back(self, at: u64, bytes: u64) {
        let place = self.range(at, bytes as usize);
        // SAFETY: the range is free as of the last commit, so nobody reads what was in it.
        unsafe { libc::madvise(place.cast(), bytes as usize, libc::MADV_REMOVE) };
    }

    /// Zeroes memory that nothing committed refers to.
    pub(crate) fn zero(self, txn: &mut Txn, at: u64, bytes: usize) {
        let place = self.range(at, bytes);
        // SAFETY: as in `write`.
        unsafe {
            txn.fresh(place, bytes);
            place.write_bytes(0, bytes);
        }
    }

    /// Memory that nothing committed refers to, to be written by the caller.
    pub(crate) fn fresh_slice<'a>(self, txn: &mut Txn, at: u64, bytes: usize) -> &'a mut [u8] {
        let place = self.range(at, bytes);
        // SAFETY: as in `write`; the block belongs to the calling structure alone.
        unsafe {
            txn.fresh(place, bytes);
            std::slice::from_raw_parts_mut(place, bytes)
        }
    }

    /// Bytes in place.
    #[inline(always)]
    pub(crate) fn bytes<'a>(self, at: u64, bytes: usize) -> &'a [u8] {
        // SAFETY: the range is inside the mapping; the structure that owns the block is borrowed.
        unsafe { std::slice::from_raw_parts(self.range(at, bytes), bytes) }
    }

    /// A record in place, stored from its item's bytes.
    #[inline(always)]
    pub(crate) fn item<'a, T: Record>(self, at: u64, bytes: usize) -> Item<'a, T> {
        // SAFETY: structures store a record's bytes unchanged, 8-aligned, and remember their
        // number.
        unsafe { T::from_stored(self.bytes(at, bytes)) }
    }
}

/// A record from bytes that this crate copied, 8-aligned, out of an item of the same type.
#[inline(always)]
pub(crate) fn stored<T: Record>(bytes: &[u8]) -> Item<'_, T> {
    // SAFETY: see above; callers are this crate's structures only.
    unsafe { T::from_stored(bytes) }
}

/// Records that this crate put one after another, 8-aligned.
pub(crate) fn stored_batch<T: Record>(bytes: &[u8], count: usize) -> Batch<'_, T> {
    // SAFETY: see above; `put_item` wrote exactly `count` records.
    unsafe { Batch::trusted(bytes, count) }
}
