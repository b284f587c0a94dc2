//! The allocator in a group's segment: power-of-two size classes, a bump pointer, and free lists
//! that keep what a step freed apart until the freeing is committed.
//!
//! Invariants:
//! - a block handed out was free at the last commit, so its owner may write it without undo
//!   (`write_fresh`); only the lists and the links in free blocks are logged;
//! - a freed block waits on its class's `deferred` chain and is handed out only in a later step
//!   (rule R12): its bytes, but for the link, are what they were, so rolling the step back finds
//!   them intact;
//! - `touched` is the furthest that was ever handed out, rolled back or not: memory beyond it is
//!   zero;
//! - before the heap takes a new chunk of its reservation, the gauge says whether there is memory
//!   for it (rule R12);
//! - while something is moved (`moving`), blocks come from behind the heap's end; none is freed.
//!
//! Blocks carry no header: who frees one says how long it is. Called by tables, lists, maps, slices
//! and timers.

use crate::error::StateError;
use crate::group::{ClassLists, GroupHeader, Shared};
use crate::raw::Seg;
use crate::slots::Cell;
use std::cell::Cell as Local;
use std::mem::offset_of;
use testudo_shm::txn::Txn;

/// Size classes: 32 bytes, doubling.
pub(crate) const CLASSES: usize = 32;
const SMALLEST_LOG2: u32 = 5;
const CHUNK_MIN: u64 = 64 << 10;
const CHUNK_MAX: u64 = 16 << 20;
/// Freed blocks of this size may have their pages given back.
const PUNCH_MIN: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// What this process remembers of a group's heap: which deferred chains hold blocks of the step
/// that runs. A new process remembers nothing, since all that it finds is committed.
#[derive(Debug, Default)]
pub(crate) struct HeapCache {
    step: Local<u64>,
    classes: Local<u32>,
}

impl HeapCache {
    fn is_current(&self, step: u64, class: usize) -> bool {
        self.step.get() == step && self.classes.get() & (1 << class) != 0
    }

    fn mark(&self, step: u64, class: usize) {
        let kept = if self.step.get() == step { self.classes.get() } else { 0 };
        self.step.set(step);
        self.classes.set(kept | 1 << class);
    }
}

/// A block just handed out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub(crate) at: u64,
    /// It is known to hold zeros only.
    pub(crate) zeroed: bool,
}

/// Blocks of these sizes get their pages at once; larger ones would stop the step for too long.
const POPULATED_MIN: u64 = 64 << 10;
const POPULATED_MAX: u64 = 1 << 20;

/// The class that holds `bytes`.
fn class_of(bytes: u64) -> usize {
    (bytes.max(1).next_power_of_two().trailing_zeros().max(SMALLEST_LOG2) - SMALLEST_LOG2) as usize
}

/// Bytes that a block of at least `bytes` really has.
pub(crate) fn size_of_block(bytes: u64) -> u64 {
    1 << (class_of(bytes) as u32 + SMALLEST_LOG2)
}

fn list(class: usize, field: usize) -> u64 {
    (offset_of!(GroupHeader, classes) + class * size_of::<ClassLists>() + field) as u64
}

fn free_at(class: usize) -> u64 {
    list(class, offset_of!(ClassLists, free))
}

fn deferred_at(class: usize) -> u64 {
    list(class, offset_of!(ClassLists, deferred))
}

fn deferred_end_at(class: usize) -> u64 {
    list(class, offset_of!(ClassLists, deferred_end))
}

impl Shared {
    /// Hands out a block of at least `bytes` bytes, 32-aligned (64 from 64 bytes on). It was free
    /// at the last commit.
    pub(crate) fn alloc(&self, txn: &mut Txn, group: u32, bytes: u64) -> Result<Block, StateError> {
        let seg = self.seg(group)?;
        if bytes > seg.len() {
            return Err(self.full(seg, group, bytes));
        }
        let class = class_of(bytes);
        if self.is_moving.get() {
            return self.extend(txn, seg, group, 1 << (class as u32 + SMALLEST_LOG2));
        }
        let mut at: u64 = seg.read(free_at(class));
        if at == 0 {
            at = self.ripe(txn, seg, group, class);
        }
        if at == 0 {
            return self.extend(txn, seg, group, 1 << (class as u32 + SMALLEST_LOG2));
        }
        let next: u64 = seg.read(at);
        seg.write(txn, free_at(class), next);
        // The owner writes over the link without undo, and a rolled-back list needs it.
        seg.log(txn, at, 8);
        if 32 << class >= PUNCH_MIN {
            self.punchable.borrow_mut().retain(|&(of, from, _)| of != group || from != at + PAGE);
        }
        Ok(Block { at, zeroed: false })
    }

    /// As `alloc`, holding zeros.
    pub(crate) fn alloc_zeroed(
        &self,
        txn: &mut Txn,
        group: u32,
        bytes: u64,
    ) -> Result<u64, StateError> {
        let block = self.alloc(txn, group, bytes)?;
        if !block.zeroed {
            self.seg(group)?.zero(txn, block.at, bytes as usize);
        }
        Ok(block.at)
    }

    /// Takes back the block at `at` that was asked for with `bytes`. Its bytes stay readable, but
    /// for the first eight, until the step ends.
    pub(crate) fn free(&self, txn: &mut Txn, group: u32, at: u64, bytes: u64) {
        let Some(seg) = self.try_seg(group) else { return };
        if self.is_moving.get() {
            // What lies behind the mark goes as a whole, or stays.
            return;
        }
        let class = class_of(bytes);
        let (cache, step) = (&self.heaps[group as usize], self.step.get());
        let mut newest: u64 = seg.read(deferred_at(class));
        if newest != 0 && !cache.is_current(step, class) {
            // What an earlier step freed is ripe: hang the free list behind it.
            let oldest: u64 = seg.read(deferred_end_at(class));
            let free: u64 = seg.read(free_at(class));
            seg.write(txn, oldest, free);
            seg.write(txn, free_at(class), newest);
            newest = 0;
        }
        if newest == 0 {
            seg.write(txn, deferred_end_at(class), at);
        }
        seg.write(txn, at, newest);
        seg.write(txn, deferred_at(class), at);
        cache.mark(step, class);
        let size = 32u64 << class;
        if size >= PUNCH_MIN {
            // The first page keeps the link.
            self.punchable.borrow_mut().push((group, at + PAGE, size - PAGE));
        }
    }

    /// Makes the deferred chain the free list, if an earlier step filled it: its first block, or
    /// zero.
    fn ripe(&self, txn: &mut Txn, seg: Seg, group: u32, class: usize) -> u64 {
        let newest: u64 = seg.read(deferred_at(class));
        if newest == 0 || self.heaps[group as usize].is_current(self.step.get(), class) {
            return 0;
        }
        seg.write(txn, deferred_at(class), 0u64);
        seg.write(txn, free_at(class), newest);
        newest
    }

    /// A block from memory that was never used since the last commit.
    #[cold]
    #[inline(never)]
    fn extend(&self, txn: &mut Txn, seg: Seg, group: u32, size: u64) -> Result<Block, StateError> {
        let bump_at = offset_of!(GroupHeader, bump) as u64;
        let at = seg.read::<u64>(bump_at).next_multiple_of(size.min(64));
        let end = at + size;
        if end > seg.len() {
            return Err(self.full(seg, group, size));
        }
        self.grant(txn, seg, end)?;
        seg.write(txn, bump_at, end);
        let touched_at = offset_of!(GroupHeader, touched) as u64;
        let touched: u64 = seg.read(touched_at);
        if end > touched {
            // Not undone: the memory below is dirty whether or not the step commits.
            seg.write_fresh(txn, touched_at, end);
            if (POPULATED_MIN..=POPULATED_MAX).contains(&size) {
                seg.populate(at, size);
            }
        }
        Ok(Block { at, zeroed: at >= touched })
    }

    /// Lets the heap reach `end`, in chunks, if there is memory for it.
    fn grant(&self, txn: &mut Txn, seg: Seg, end: u64) -> Result<(), StateError> {
        let granted_at = offset_of!(GroupHeader, granted) as u64;
        let granted: u64 = seg.read(granted_at);
        if end <= granted {
            return Ok(());
        }
        let needed = (end - granted).next_multiple_of(PAGE).min(seg.len() - granted);
        let chunk = granted.clamp(CHUNK_MIN, CHUNK_MAX).max(needed).min(seg.len() - granted);
        let taken = match self.gauge.take(chunk) {
            Ok(()) => chunk,
            Err(_) => match self.gauge.take(needed) {
                Ok(()) => needed,
                Err(short) => {
                    return Err(StateError::OutOfMemory {
                        operator: self.operator.clone(),
                        wanted: needed,
                        free: short.free,
                        reserve: short.reserve,
                        limit: short.limit,
                        limited_by: short.limited_by.into(),
                    });
                }
            },
        };
        seg.write(txn, granted_at, granted + taken);
        Ok(())
    }

    /// Stores a variable-length value: in place of the old one when it fits, else in a block of its
    /// own, after which the old block is freed. The caller then stores the cell.
    pub(crate) fn put_bytes(
        &self,
        txn: &mut Txn,
        group: u32,
        old: Option<Cell>,
        bytes: &[u8],
    ) -> Result<Cell, StateError> {
        let seg = self.seg(group)?;
        let Ok(len) = u32::try_from(bytes.len()) else { return Err(self.too_long(bytes.len())) };
        if let Some(old) = old
            && old.room >= len
        {
            seg.log(txn, old.at, bytes.len());
            seg.fill(txn, old.at, bytes);
            return Ok(Cell { bytes: len, ..old });
        }
        let room = size_of_block(u64::from(len));
        let Ok(room) = u32::try_from(room) else { return Err(self.too_long(bytes.len())) };
        let at = self.alloc(txn, group, u64::from(room))?.at;
        seg.fill(txn, at, bytes);
        if let Some(old) = old {
            self.free_cell(txn, group, old);
        }
        Ok(Cell { at, bytes: len, room })
    }

    /// Frees what a cell owns.
    pub(crate) fn free_cell(&self, txn: &mut Txn, group: u32, cell: Cell) {
        if cell.room != 0 {
            self.free(txn, group, cell.at, u64::from(cell.room));
        }
    }

    fn too_long(&self, bytes: usize) -> StateError {
        let (operator, limit) = (self.operator.clone(), 1 << 31);
        StateError::TooLong { operator, bytes: bytes as u64, limit }
    }

    fn full(&self, seg: Seg, group: u32, wanted: u64) -> StateError {
        StateError::SegmentFull { operator: self.operator.clone(), group, wanted, len: seg.len() }
    }
}
