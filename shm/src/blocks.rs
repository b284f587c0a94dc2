//! Which blocks of a worker's memory changed since its last cut, and what they held at the cut.
//!
//! A block is 4096 bytes of the arena. Every write to state passes `Txn::log` or `Txn::fresh`, and
//! both pass `Tracker::touch`, which compares one byte of a map with the number of the present
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
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Its logarithm.
pub(crate) const BLOCK_LOG2: u32 = 12;

const CLEAN: u8 = 0;

/// Copies are allocated so many at a time: a huge page of them.
const CHUNK: usize = 512;

/// Blocks that one call looks at in search of one to be saved.
const LOOKED_AT_ONCE: u64 = 64 << 10;

/// Entries of the list of changed blocks that one call looks at.
const LISTED_AT_ONCE: usize = 1024;

/// One block's bytes, aligned as on disk.
#[repr(C, align(4096))]
struct Bytes([u8; BLOCK]);

/// Room for copies. A process that begins to copy takes thousands of pages within milliseconds:
/// huge ones are there in a fraction of the time.
#[repr(C, align(0x20_0000))]
struct Chunk([MaybeUninit<Bytes>; CHUNK]);

impl Chunk {
    fn new() -> Box<Self> {
        // SAFETY: bytes of `MaybeUninit` need not be initialised.
        let chunk = unsafe { Box::<Self>::new_uninit().assume_init() };
        let (at, bytes) = (std::ptr::from_ref(&*chunk), size_of::<Self>());
        // SAFETY: advice about memory of our own; where it is refused, pages stay small.
        unsafe { libc::madvise(at.cast_mut().cast(), bytes, libc::MADV_HUGEPAGE) };
        chunk
    }
}

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
    /// How many of them do not lie before `counted_from`.
    counted: usize,
    counted_from: u64,
    /// All blocks of the cut that is open or not settled.
    taken: Vec<u64>,
    /// How many of them the saver has passed.
    passed: usize,
    /// What is saved first, in this order, and where in it the saver is.
    wanted: Vec<Range<u64>>,
    looking: usize,
    copies: VecDeque<(u64, u32)>,
    pool: Vec<Box<Chunk>>,
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
            counted: 0,
            counted_from: 0,
            taken: Vec::new(),
            passed: 0,
            wanted: Vec::new(),
            looking: 0,
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
            self.list(block);
        }
    }

    fn list(&mut self, block: u64) {
        self.dirty.push(block);
        self.counted += usize::from(block >= self.counted_from);
    }

    unsafe fn keep_copy(&mut self, base: *const u8, block: u64) {
        let begun = clock_ns();
        let Some(slot) = self.free_slot() else {
            self.overflowed = true;
            return;
        };
        let place = &mut self.pool[slot as usize / CHUNK].0[slot as usize % CHUNK];
        // SAFETY: the block is mapped, by the caller's promise; the slot is ours.
        unsafe {
            let from = base.add((block as usize) << BLOCK_LOG2);
            std::ptr::copy_nonoverlapping(from, place.as_mut_ptr().cast::<u8>(), BLOCK);
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
        self.pool.push(Chunk::new());
        self.free.extend((first as u32..(first + CHUNK) as u32).rev());
        self.free.pop()
    }

    /// Marks a block as changed: a successor finds what its predecessor wrote.
    pub fn mark(&mut self, block: u64) {
        let now = self.now;
        let state = self.state(block);
        if *state != now {
            *state = now;
            self.list(block);
        }
    }

    /// Begins a cut: all blocks changed since the last one are to be saved as they are now, and
    /// those of `also`. Those in `wanted`, ranges of blocks in ascending order, come first, in that
    /// order: they lie behind each other in the file as they do in memory. At most
    /// `copies_max` blocks are copied before stores. Returns how many blocks there are. The last
    /// cut must be settled.
    pub fn begin(
        &mut self,
        also: impl Iterator<Item = u64>,
        wanted: Vec<Range<u64>>,
        copies_max: usize,
    ) -> usize {
        debug_assert!(!self.is_open && self.taken.is_empty());
        let old = self.now;
        // The two lists change places: neither is freed, nor grown again.
        std::mem::swap(&mut self.taken, &mut self.dirty);
        self.counted = 0;
        let map_bytes = self.map_bytes as u64;
        assert!(wanted.iter().all(|blocks| blocks.end <= map_bytes), "blocks outside the arena");
        self.wanted = wanted;
        self.looking = 0;
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

    /// From here on, [`Tracker::counted`] counts changed blocks that do not lie before this one.
    pub fn count_from(&mut self, first: u64) {
        self.counted_from = first;
        self.counted = self.dirty.iter().filter(|block| **block >= first).count();
    }

    /// How many blocks of those that [`Tracker::count_from`] names changed since the last cut.
    #[must_use]
    pub fn counted(&self) -> usize {
        self.counted
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
    /// `base`, and its bytes. `Some(None)` when there was nothing to give out where it looked, and
    /// there is more to look at; `None` when all are saved.
    ///
    /// # Safety
    /// All blocks of the cut are mapped readable at `base`, and written by this thread only.
    pub unsafe fn save_next<R>(
        &mut self,
        base: *const u8,
        save: impl FnOnce(u64, &[u8; BLOCK]) -> R,
    ) -> Option<Option<R>> {
        if let Some((block, slot)) = self.copies.pop_front() {
            // SAFETY: `keep_copy` filled the slot before it listed it.
            let bytes = unsafe {
                self.pool[slot as usize / CHUNK].0[slot as usize % CHUNK].assume_init_ref()
            };
            let saved = save(block, &bytes.0);
            self.free.push(slot);
            return Some(Some(saved));
        }
        let found = match self.wanted.get(self.looking) {
            Some(_) => self.look(),
            None if self.passed < self.taken.len() => self.look_at_rest(),
            None => return None,
        };
        let Some(block) = found else { return Some(None) };
        *self.state(block) = CLEAN;
        // SAFETY: mapped, and not written while borrowed, by the caller's promise.
        let bytes = unsafe { &*base.add((block as usize) << BLOCK_LOG2).cast() };
        Some(Some(save(block, bytes)))
    }

    /// The next block of the wanted ranges that is not saved yet.
    fn look(&mut self) -> Option<u64> {
        let old = 3 - self.now;
        let mut left = LOOKED_AT_ONCE;
        while left > 0
            && let Some(blocks) = self.wanted.get_mut(self.looking)
        {
            let count = (blocks.end.saturating_sub(blocks.start)).min(left);
            // SAFETY: inside the map, as `begin` has checked; it is ours alone.
            let states = unsafe {
                std::slice::from_raw_parts(self.map.add(blocks.start as usize), count as usize)
            };
            if let Some(at) = find(states, old) {
                let block = blocks.start + at as u64;
                blocks.start = block + 1;
                return Some(block);
            }
            blocks.start += count;
            left -= count;
            self.looking += usize::from(blocks.start >= blocks.end);
        }
        None
    }

    /// The next block that is in none of the wanted ranges.
    fn look_at_rest(&mut self) -> Option<u64> {
        let (old, end) = (3 - self.now, self.taken.len().min(self.passed + LISTED_AT_ONCE));
        while self.passed < end {
            let block = self.taken[self.passed];
            self.passed += 1;
            if *self.state(block) == old {
                return Some(block);
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
                self.list(block);
            }
        }
        self.passed = self.taken.len();
        self.looking = self.wanted.len();
    }

    /// Settles the last cut: a good one counts from here on; what a bad one took is dirty again.
    pub fn settle(&mut self, is_good: bool) {
        debug_assert!(!self.is_open);
        let mut taken = std::mem::take(&mut self.taken);
        if !is_good {
            taken.iter().for_each(|&block| self.mark(block));
        }
        taken.clear();
        self.taken = taken;
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

/// Where a value first is. Chunk by chunk, which the compiler does for many at a time.
fn find(states: &[u8], value: u8) -> Option<usize> {
    const CHUNK: usize = 64;
    let has = |chunk: &[u8]| chunk.iter().fold(false, |has, state| has | (*state == value));
    let clean = states.chunks(CHUNK).take_while(|chunk| !has(chunk)).count() * CHUNK;
    let rest = states.get(clean..)?;
    Some(clean + rest.iter().position(|state| *state == value)?)
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
    const ALL: &[Range<u64>] = &[Range { start: 0, end: BLOCKS as u64 }];

    struct Memory(Box<[Bytes]>);

    impl Memory {
        fn new() -> Self {
            Self((0..BLOCKS).map(|_| Bytes([0; BLOCK])).collect())
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
                all.extend(one);
            }
            all
        }
    }

    fn tracker() -> Tracker {
        Tracker::new(BLOCKS * BLOCK).unwrap()
    }

    #[test]
    fn r14_a_cut_holds_what_was_there_when_it_began() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        for block in 0..4 {
            memory.store(&mut tracker, block, 1);
        }
        tracker.begin(std::iter::empty(), ALL.to_vec(), 100);
        memory.store(&mut tracker, 2, 9);
        memory.store(&mut tracker, 2, 10);
        memory.store(&mut tracker, 6, 9);
        // The one that was stored to comes first: its copy is wanted back.
        assert_eq!(memory.saved(&mut tracker), [(2, 1), (0, 1), (1, 1), (3, 1)]);
        tracker.close();
        tracker.settle(true);
        tracker.begin(std::iter::empty(), ALL.to_vec(), 100);
        assert_eq!(memory.saved(&mut tracker), [(2, 10), (6, 9)]);
    }

    #[test]
    fn r14_what_a_failed_cut_took_is_saved_by_the_next() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        memory.store(&mut tracker, 0, 1);
        memory.store(&mut tracker, 1, 1);
        tracker.begin(std::iter::empty(), ALL.to_vec(), 100);
        let base = memory.base();
        // SAFETY: the blocks are this test's.
        unsafe { tracker.save_next(base, |_, _| ()) };
        memory.store(&mut tracker, 0, 2);
        memory.store(&mut tracker, 5, 2);
        tracker.close();
        tracker.settle(false);
        tracker.begin(std::iter::empty(), ALL.to_vec(), 100);
        assert_eq!(memory.saved(&mut tracker), [(0, 2), (1, 1), (5, 2)]);
    }

    #[test]
    fn r14_without_room_for_copies_the_cut_fails_and_nothing_is_lost() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        memory.store(&mut tracker, 0, 1);
        tracker.begin(std::iter::empty(), ALL.to_vec(), 0);
        memory.store(&mut tracker, 0, 2);
        assert!(tracker.has_overflowed());
        tracker.close();
        tracker.settle(false);
        tracker.begin(std::iter::empty(), ALL.to_vec(), 100);
        assert_eq!(memory.saved(&mut tracker), [(0, 2)]);
    }

    #[test]
    fn a_clean_block_is_saved_again_when_asked_for() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        memory.store(&mut tracker, 3, 1);
        tracker.begin(std::iter::empty(), ALL.to_vec(), 100);
        memory.saved(&mut tracker);
        tracker.close();
        tracker.settle(true);
        tracker.begin([3].into_iter(), ALL.to_vec(), 100);
        memory.store(&mut tracker, 3, 4);
        assert_eq!(memory.saved(&mut tracker), [(3, 1)]);
    }

    #[test]
    fn wanted_blocks_come_in_order_and_the_others_after_them() {
        let (mut memory, mut tracker) = (Memory::new(), tracker());
        tracker.count_from(4);
        for block in [7, 2, 5, 0, 4] {
            memory.store(&mut tracker, block, block as u8);
        }
        assert_eq!(tracker.counted(), 3);
        tracker.begin(std::iter::empty(), vec![1..3, 4..6], 100);
        assert_eq!(memory.saved(&mut tracker), [(2, 2), (4, 4), (5, 5), (7, 7), (0, 0)]);
        tracker.close();
        tracker.settle(true);
        assert_eq!((tracker.dirty(), tracker.counted()), (0, 0));
    }
}
