//! Which blocks of a worker's memory changed since its last cut, and what they held at the cut.
//!
//! A block is 4096 bytes of the arena. Every write to state passes `Txn::log` or `Txn::fresh`, and
//! both pass [`Tracker::touch`], which compares one byte of a map with the number of the present
//! interval: equal, for all but the first write to a block after a cut.
//!
//! Invariants (rule R14: a block is saved when it is copied):
//! - the map says of each block: clean (saved by a cut that still counts), changed in this interval
//!   (it is on the dirty list, once), or changed in the interval before and not saved yet, which
//!   there only is while a cut is open;
//! - the first store to a block that the open cut still has to save copies it first;
//! - the copies are bounded: when there is no room for one, the cut fails, never the job;
//! - what a cut took is dirty again unless the cut is settled as good.
//!
//! Called by `txn` (touch) and by the worker's cut (everything else). Private to one process: a
//! successor knows nothing of it and saves all that there is.

use crate::fault::SetupError;
use std::collections::VecDeque;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Its logarithm.
pub(crate) const BLOCK_LOG2: u32 = 12;

const CLEAN: u8 = 0;

/// Copies are allocated so many at a time.
const CHUNK: usize = 256;

/// One block's bytes, aligned as on disk.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Bytes([u8; BLOCK]);

/// A cut's share of the work that stores do: what copy-on-write has cost since the tracker began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyCost {
    /// Blocks copied before a store.
    pub blocks: u64,
    /// Nanoseconds that it took.
    pub nanos: u64,
}

/// The map of changed blocks, and the open cut.
pub struct Tracker {
    map: *mut u8,
    map_bytes: usize,
    /// Value of blocks that were changed in this interval: 1 or 2 in turn.
    now: u8,
    dirty: Vec<u64>,
    /// All blocks of the cut that is open or not settled.
    taken: Vec<u64>,
    /// How many of them the saver has passed.
    passed: usize,
    copies: VecDeque<(u64, u32)>,
    pool: Vec<Box<[Bytes]>>,
    free: Vec<u32>,
    copies_max: usize,
    is_open: bool,
    overflowed: bool,
    cost: CopyCost,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (dirty, taken) = (self.dirty.len(), self.taken.len());
        write!(f, "Tracker({dirty} dirty, {taken} taken, {} passed)", self.passed)
    }
}

impl Tracker {
    /// A tracker of an arena of `arena_bytes`, all of it clean. Addresses are reserved, not memory.
    ///
    /// # Errors
    /// When the address space is limited.
    pub fn new(arena_bytes: usize) -> Result<Self, SetupError> {
        let map_bytes = (arena_bytes >> BLOCK_LOG2) + BLOCK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), map_bytes, access, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            let what = format!("cannot reserve {map_bytes} bytes for the map of changed blocks");
            return Err(SetupError::last(what));
        }
        Ok(Self {
            map: map.cast(),
            map_bytes,
            now: 1,
            dirty: Vec::new(),
            taken: Vec::new(),
            passed: 0,
            copies: VecDeque::new(),
            pool: Vec::new(),
            free: Vec::new(),
            copies_max: 0,
            is_open: false,
            overflowed: false,
            cost: CopyCost::default(),
        })
    }

    /// The map and the value of a block that needs no attention: what `Txn` checks by itself.
    #[inline(always)]
    pub(crate) fn fast(&self) -> (*mut u8, u8) {
        (self.map, self.now)
    }

    fn state(&mut self, block: u64) -> &mut u8 {
        assert!((block as usize) < self.map_bytes, "block {block} outside the arena");
        // SAFETY: inside the map, checked above; it is ours alone.
        unsafe { &mut *self.map.add(block as usize) }
    }

    /// Blocks `first..=last` of the arena at `base` are about to be written.
    ///
    /// # Safety
    /// They are mapped readable.
    #[cold]
    #[inline(never)]
    pub(crate) unsafe fn touch(&mut self, base: *const u8, first: u64, last: u64) {
        for block in first..=last {
            let now = self.now;
            let state = *self.state(block);
            if state == now {
                continue;
            }
            if state != CLEAN && self.is_open && !self.overflowed {
                // SAFETY: passed on.
                unsafe { self.keep_copy(base, block) };
            }
            *self.state(block) = now;
            self.dirty.push(block);
        }
    }

    unsafe fn keep_copy(&mut self, base: *const u8, block: u64) {
        let begun = clock_ns();
        let Some(slot) = self.free_slot() else {
            self.overflowed = true;
            return;
        };
        let place = &mut self.pool[slot as usize / CHUNK][slot as usize % CHUNK];
        // SAFETY: the block is mapped, by the caller's promise; the slot is ours.
        unsafe {
            let from = base.add((block as usize) << BLOCK_LOG2);
            std::ptr::copy_nonoverlapping(from, place.0.as_mut_ptr(), BLOCK);
        }
        self.copies.push_back((block, slot));
        self.cost.blocks += 1;
        self.cost.nanos += clock_ns().saturating_sub(begun);
    }

    fn free_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let first = self.pool.len() * CHUNK;
        if first >= self.copies_max {
            return None;
        }
        self.pool.push(vec![Bytes([0; BLOCK]); CHUNK].into_boxed_slice());
        self.free.extend((first as u32..(first + CHUNK) as u32).rev());
        self.free.pop()
    }

    /// Marks a block as changed: a successor finds what its predecessor wrote.
    pub fn mark(&mut self, block: u64) {
        let now = self.now;
        let state = self.state(block);
        if *state != now {
            *state = now;
            self.dirty.push(block);
        }
    }

    /// Begins a cut: all blocks changed since the last one are to be saved as they are now, and
    /// those of `also`. At most `copies_max` blocks are copied before stores. Returns how many
    /// blocks there are. The last cut must be settled.
    pub fn begin(&mut self, also: impl Iterator<Item = u64>, copies_max: usize) -> usize {
        debug_assert!(!self.is_open && self.taken.is_empty());
        let old = self.now;
        self.taken = std::mem::take(&mut self.dirty);
        for block in also {
            let state = self.state(block);
            if *state != old {
                *state = old;
                self.taken.push(block);
            }
        }
        self.now = 3 - old;
        self.passed = 0;
        self.copies_max = copies_max.next_multiple_of(CHUNK);
        self.overflowed = false;
        self.is_open = true;
        self.taken.len()
    }

    /// How many blocks of the last cut do not lie before this one.
    #[must_use]
    pub fn taken_from(&self, first: u64) -> usize {
        self.taken.iter().filter(|block| **block >= first).count()
    }

    /// Whether a cut is open.
    #[inline(always)]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// True when there was no room for a copy: what the cut has saved since is worthless.
    #[must_use]
    pub fn has_overflowed(&self) -> bool {
        self.overflowed
    }

    /// Gives out the next block of the open cut, as it was at the cut: its number in the arena at
    /// `base`, and its bytes. `None` when all are saved.
    ///
    /// # Safety
    /// All blocks of the cut are mapped readable at `base`, and written by this thread only.
    pub unsafe fn save_next<R>(
        &mut self,
        base: *const u8,
        save: impl FnOnce(u64, &[u8; BLOCK]) -> R,
    ) -> Option<R> {
        if let Some((block, slot)) = self.copies.pop_front() {
            let saved = save(block, &self.pool[slot as usize / CHUNK][slot as usize % CHUNK].0);
            self.free.push(slot);
            return Some(saved);
        }
        let old = 3 - self.now;
        while let Some(&block) = self.taken.get(self.passed) {
            self.passed += 1;
            let state = self.state(block);
            if *state == old {
                *state = CLEAN;
                // SAFETY: mapped, and not written while borrowed, by the caller's promise.
                let bytes = unsafe { &*base.add((block as usize) << BLOCK_LOG2).cast() };
                return Some(save(block, bytes));
            }
        }
        None
    }

    /// Ends saving: either all blocks were given out, or the rest is not wanted any more. The cut
    /// is to be settled later.
    pub fn close(&mut self) {
        self.is_open = false;
        let (old, now) = (3 - self.now, self.now);
        for (_, slot) in self.copies.drain(..) {
            self.free.push(slot);
        }
        for index in self.passed..self.taken.len() {
            let block = self.taken[index];
            let state = self.state(block);
            if *state == old {
                *state = now;
                self.dirty.push(block);
            }
        }
        self.passed = self.taken.len();
    }

    /// Settles the last cut: a good one counts from here on; what a bad one took is dirty again.
    pub fn settle(&mut self, is_good: bool) {
        debug_assert!(!self.is_open);
        let taken = std::mem::take(&mut self.taken);
        if !is_good {
            taken.iter().for_each(|&block| self.mark(block));
        }
    }

    /// Blocks that changed since the last cut.
    #[must_use]
    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// What copies have cost so far.
    #[must_use]
    pub fn cost(&self) -> CopyCost {
        self.cost
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped once.
        unsafe { libc::munmap(self.map.cast(), self.map_bytes) };
    }
}

fn clock_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(all(test, not(miri), not(loom)))]
mod tests {
    use super::*;

    const BLOCKS: usize = 8;

    struct Memory(Box<[Bytes]>);

    impl Memory {
        fn new() -> Self {
            Self(vec![Bytes([0; BLOCK]); BLOCKS].into_boxed_slice())
        }

        fn base(&mut self) -> *mut u8 {
            self.0.as_mut_ptr().cast()
        }

        fn store(&mut self, tracker: &mut Tracker, block: usize, value: u8) {
            // SAFETY: the blocks are this test's.
            unsafe { tracker.touch(self.base(), block as u64, block as u64) };
            self.0[block].0[7] = value;
        }

        fn saved(&mut self, tracker: &mut Tracker) -> Vec<(u64, u8)> {
            let mut all = Vec::new();
            let base = self.base();
            // SAFETY: as above.
            while let Some(one) = unsafe { tracker.save_next(base, |block, b| (block, b[7])) } {
                all.push(one);
            }
            all.sort_unstable();
            all
        }
    }

    fn tracker() -> Tracker {
        Tracker::new(BLOCKS * BLOCK).unwrap()
    }

    #[test]
    fn a_cut_holds_what_was_there_when_it_began() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        for block in 0..4 {
            memory.store(&mut tracker, block, 1);
        }
        tracker.begin(std::iter::empty(), 100);
        memory.store(&mut tracker, 2, 9);
        memory.store(&mut tracker, 2, 10);
        memory.store(&mut tracker, 6, 9);
        assert_eq!(memory.saved(&mut tracker), [(0, 1), (1, 1), (2, 1), (3, 1)]);
        tracker.close();
        tracker.settle(true);
        tracker.begin(std::iter::empty(), 100);
        assert_eq!(memory.saved(&mut tracker), [(2, 10), (6, 9)]);
    }

    #[test]
    fn what_a_failed_cut_took_is_saved_by_the_next() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        memory.store(&mut tracker, 0, 1);
        memory.store(&mut tracker, 1, 1);
        tracker.begin(std::iter::empty(), 100);
        let base = memory.base();
        // SAFETY: the blocks are this test's.
        unsafe { tracker.save_next(base, |_, _| ()) };
        memory.store(&mut tracker, 0, 2);
        memory.store(&mut tracker, 5, 2);
        tracker.close();
        tracker.settle(false);
        tracker.begin(std::iter::empty(), 100);
        assert_eq!(memory.saved(&mut tracker), [(0, 2), (1, 1), (5, 2)]);
    }

    #[test]
    fn without_room_for_copies_the_cut_fails_and_nothing_is_lost() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        memory.store(&mut tracker, 0, 1);
        tracker.begin(std::iter::empty(), 0);
        memory.store(&mut tracker, 0, 2);
        assert!(tracker.has_overflowed());
        tracker.close();
        tracker.settle(false);
        tracker.begin(std::iter::empty(), 100);
        assert_eq!(memory.saved(&mut tracker), [(0, 2)]);
    }

    #[test]
    fn a_clean_block_is_saved_again_when_asked_for() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        memory.store(&mut tracker, 3, 1);
        tracker.begin(std::iter::empty(), 100);
        memory.saved(&mut tracker);
        tracker.close();
        tracker.settle(true);
        tracker.begin([3].into_iter(), 100);
        memory.store(&mut tracker, 3, 4);
        assert_eq!(memory.saved(&mut tracker), [(3, 1)]);
    }
}
