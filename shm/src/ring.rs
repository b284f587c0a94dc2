//! A ring: where its three parts lie and who may write each.
//!
//! ```text
//!   tail word    producer's segment    written by the producer, on a cache line pair of its own
//!   head words   consumer's segments   one by the consumer, one (optional) by its replica
//!   data         producer's segment    mapped twice in a row; written in [tail, head + capacity)
//! ```
//!
//! Invariants: one writer for each part; positions only grow; capacity is a power of two and a
//! whole number of pages; geometry comes from the plan, never from shared memory. Either end may be
//! a process that is no worker. Called by whoever attaches: workers and the supervisor.

use crate::fault::Fault;
use crate::frame::{HEAD, Head};
use crate::primitive::AtomicU64;
use std::ptr::NonNull;

/// Bytes between two published words: adjacent lines are prefetched in pairs.
pub const WORD_STRIDE: usize = 128;

/// Distance of the [`CutTail`] from the tail word: on the same line pair.
const CUT_AT: usize = 64;

/// Where a producer's tail stood at its latest cut: what the consumer has not taken of the bytes
/// before it at its own cut is in flight. Written by the producer, the epoch last.
#[derive(Debug)]
#[repr(C)]
pub struct CutTail {
    /// The cut.
    pub epoch: AtomicU64,
    /// The tail.
    pub tail: AtomicU64,
}

/// One end's view of where a ring lies in its own address space.
#[derive(Debug, Clone, Copy)]
pub struct RingParts {
    /// First byte of the mirrored data.
    pub data: NonNull<u8>,
    /// Bytes of data, a power of two.
    pub capacity: u64,
    /// The producer's published tail.
    pub tail: NonNull<AtomicU64>,
    /// The consumer's published head.
    pub head: NonNull<AtomicU64>,
    /// Beside the tail: the producer's latest cut, and its tail at that.
    pub cut: NonNull<CutTail>,
    /// The head of the consumer's replica, where there is one: the producer respects the lower of
    /// the two.
    pub replica_head: Option<NonNull<AtomicU64>>,
}

impl RingParts {
    /// Finds the parts from their offsets.
    ///
    /// # Safety
    /// All offsets lie in mapped parts of the arena that starts at `base`, words 8-aligned; `data`
    /// is mapped mirrored.
    #[must_use]
    pub unsafe fn at(
        base: *mut u8,
        data: usize,
        capacity: usize,
        tail: usize,
        head: usize,
    ) -> Self {
        assert!(capacity.is_power_of_two() && capacity >= 4096, "ring capacity {capacity}");
        // SAFETY: promised by the caller; none of the results is null inside a mapping.
        unsafe {
            Self {
                data: NonNull::new_unchecked(base.add(data)),
                capacity: capacity as u64,
                tail: NonNull::new_unchecked(base.add(tail).cast()),
                cut: NonNull::new_unchecked(base.add(tail + CUT_AT).cast()),
                head: NonNull::new_unchecked(base.add(head).cast()),
                replica_head: None,
            }
        }
    }

    /// Whether frames lead from one position to another: looks at what a dead process has left.
    ///
    /// # Errors
    /// What is wrong with a frame, or with the positions.
    ///
    /// # Safety
    /// The data is mapped, and nobody writes between the two positions.
    pub unsafe fn walk(&self, from: u64, to: u64) -> Result<(), Fault> {
        let is_near = from <= to && to - from <= self.capacity;
        if !is_near || !from.is_multiple_of(8) || !to.is_multiple_of(8) {
            return Err(Fault::Position { found: to, own: from, capacity: self.capacity });
        }
        let mut at = from;
        while at < to {
            // SAFETY: passed on.
            at += HEAD + unsafe { self.frame_at(at, to) }?.bytes;
        }
        Ok(())
    }

    /// The head of the frame at a position that is a multiple of eight, of those up to `to`.
    ///
    /// # Errors
    /// What is wrong with it.
    ///
    /// # Safety
    /// As [`RingParts::walk`].
    pub unsafe fn frame_at(&self, at: u64, to: u64) -> Result<Head, Fault> {
        let place = (at & (self.capacity - 1)) as usize & !7;
        // SAFETY: masked, 8-aligned, inside the data.
        let word = unsafe { self.data.as_ptr().add(place).cast::<u64>().read() };
        Head::check(word, at, to.saturating_sub(at))
    }
}
