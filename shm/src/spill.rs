//! The spill: where records go that one input record emitted beyond the free space of a ring (R7).
//!
//! A run of records in batch form, in the worker's own segment: [head, tail) of a sparse area. It
//! is filled within one step and drained by the following ones; until it is empty its edge takes
//! nothing else, so order is kept and the area never wraps. Head and tail are cells, so the spill
//! belongs to the transaction (and to a cut).
//!
//! Invariants: bytes at and after the committed tail are free, so they are written without undo;
//! positions are reset to zero only when the area is empty; what lies below the tail is used again,
//! and its pages are given back, only after that reset is committed (R12).
//!
//! Called by the exchange's outlets.

use crate::cell::{CellError, Cells};
use crate::producer::Producer;
use crate::record::{Batch, Item, Record};
use crate::txn::{Place, Txn};

/// Pages beyond this many bytes are given back once the spill is empty.
const KEEP: u64 = 1 << 20;

/// One edge lane's spill.
#[derive(Debug)]
pub struct Spill {
    base: *mut u8,
    len: u64,
    head: Place<u64>,
    tail: Place<u64>,
    /// No page at or behind this holds memory, as far as this process knows.
    high_water: u64,
    /// The transaction that last emptied the area, and how far it was filled then: until that
    /// commits, a rollback brings the bytes below back.
    emptied: Option<u64>,
    floor: u64,
}

/// The area is full: a single record emitted more than it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpillFull {
    /// Bytes that the area holds.
    pub bytes: u64,
}

impl Spill {
    /// Opens the spill called `name` on `base..base + len`.
    ///
    /// # Safety
    /// The area is mapped writable by this process until it ends, 8-aligned, inside the arena, used
    /// by nothing else.
    ///
    /// # Errors
    /// When the cells cannot be opened.
    pub unsafe fn attach(
        txn: &mut Txn,
        cells: &Cells,
        name: &str,
        base: *mut u8,
        len: usize,
    ) -> Result<Self, CellError> {
        let head = cells.cell(txn, &format!("{name}/head"), 0u64)?;
        let tail = cells.cell(txn, &format!("{name}/tail"), 0u64)?;
        // How far earlier lives filled it, and whether they gave the pages back, is not known.
        let (len, high_water) = (len as u64, len as u64);
        Ok(Self { base, len, head, tail, high_water, emptied: None, floor: 0 })
    }

    /// True when nothing waits here.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(&self, txn: &Txn) -> bool {
        txn.get(self.tail) == 0
    }

    /// Bytes that wait here.
    #[must_use]
    pub fn backlog(&self, txn: &Txn) -> u64 {
        txn.get(self.tail) - txn.get(self.head)
    }

    /// Appends an item.
    ///
    /// # Errors
    /// When the area is full.
    pub fn push<T: Record>(&mut self, txn: &mut Txn, item: Item<'_, T>) -> Result<(), SpillFull> {
        let was_empty = self.is_empty(txn);
        let tail = if was_empty { self.first_free(txn) } else { txn.get(self.tail) };
        let bytes = T::item_len(item);
        if tail + bytes as u64 > self.len {
            return Err(SpillFull { bytes: self.len });
        }
        // SAFETY: tail + bytes <= len; bytes after the committed tail belong to nobody.
        let used = unsafe {
            let at = self.base.add(tail as usize);
            txn.fresh(at, bytes);
            T::put_item(item, std::slice::from_raw_parts_mut(at, bytes))
        };
        let used = used.ok_or(SpillFull { bytes: self.len })? as u64;
        if was_empty && tail > 0 {
            txn.set(self.head, tail);
        }
        txn.set(self.tail, tail + used);
        self.high_water = self.high_water.max(tail + used);
        Ok(())
    }

    /// Where an empty area may be written: not where a rollback of the open transaction would bring
    /// bytes back.
    fn first_free(&self, txn: &Txn) -> u64 {
        if self.emptied == Some(txn.serial()) { self.floor } else { 0 }
    }

    /// Up to `limit` of the oldest records (at least one, if there is any), with their bytes for
    /// [`Spill::drained`].
    #[must_use]
    pub fn front<T: Record>(&self, txn: &Txn, limit: usize) -> Batch<'_, T> {
        let (head, tail) = (txn.get(self.head), txn.get(self.tail));
        // SAFETY: head..tail holds records in batch form, written by `push` and not written again
        // before the reset.
        unsafe {
            let all =
                std::slice::from_raw_parts(self.base.add(head as usize), (tail - head) as usize);
            let (mut rest, mut count) = (all, 0);
            while count < limit.max(1) && !rest.is_empty() {
                T::take_trusted(&mut rest);
                count += 1;
            }
            Batch::trusted(&all[..all.len() - rest.len()], count)
        }
    }

    /// Says that the oldest `bytes` were delivered.
    pub fn drained(&mut self, txn: &mut Txn, bytes: usize) {
        let head = txn.get(self.head) + bytes as u64;
        if head == txn.get(self.tail) {
            self.floor = head;
            self.emptied = Some(txn.serial());
            txn.set(self.head, 0);
            txn.set(self.tail, 0);
        } else {
            txn.set(self.head, head);
        }
    }

    /// Moves as many of the oldest records as fit into a ring. Returns how many.
    pub fn drain_into<T: Record>(&mut self, txn: &mut Txn, producer: &mut Producer) -> usize {
        let backlog = self.backlog(txn) as usize;
        let room = producer.room(backlog.min(64 << 10));
        // No record takes less than its size, or its prefix: what cannot fit is not even looked at.
        let batch = self.front::<T>(txn, room / T::SIZE.unwrap_or(crate::record::PREFIX).max(1));
        let (mut bytes, mut count) = (0, 0);
        for item in batch {
            let next = bytes + T::item_len(item);
            if next > room {
                break;
            }
            (bytes, count) = (next, count + 1);
        }
        if count == 0 {
            return 0;
        }
        let from = &batch.bytes()[..bytes];
        let Some(mut frame) = producer.reserve(bytes) else {
            return 0;
        };
        frame.space().copy_from_slice(from);
        frame.close(bytes, count);
        self.drained(txn, bytes);
        count
    }

    /// Forgets everything that waits here, for a consumer that is not waited for. Returns how many
    /// records that were.
    pub fn discard<T: Record>(&mut self, txn: &mut Txn) -> usize {
        let batch = self.front::<T>(txn, usize::MAX);
        let (bytes, count) = (batch.bytes().len(), batch.len());
        self.drained(txn, bytes);
        count
    }

    /// Gives memory back when the spill was large and is empty, as of an earlier commit.
    pub fn trim(&mut self, txn: &Txn) {
        let is_free = self.is_empty(txn) && self.first_free(txn) == 0;
        if self.high_water > KEEP && is_free && !txn.is_cutting() {
            // SAFETY: the area is ours, empty as of a commit; whole pages of it are dropped.
            unsafe { libc::madvise(self.base.cast(), self.len as usize, libc::MADV_REMOVE) };
            self.high_water = 0;
        }
    }
}
