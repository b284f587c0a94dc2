//! What a worker writes down of its steps for a replica, and what the replica says back.
//!
//! ```text
//! in the worker's own segment     page 0 | JournalHeader      written by the worker
//!                                 page 1 … | entries, a ring of words
//! in a segment of the replica's   FollowerHeader | one head for each input ring
//! ```
//!
//! An entry is so many words, the first of which is their number. What the words mean is known to
//! those who write and read them.
//!
//! Invariants:
//! - the worker writes the journal, the replica its own segment, nobody else either of them;
//! - an entry is whole before the tail says that it is there, and stays until the replica has said
//!   that it has read it;
//! - a wish is a number that only grows: what belongs to an earlier one is nobody's any more;
//! - what the replica says is no more than advice: a position that cannot be true makes the worker
//!   go on without it.
//!
//! Called by the worker's step loop and by its replica; read by the supervisor.

use crate::primitive::{AtomicU64, Ordering, fence};
use crate::segment::PAGE;
use std::ptr::NonNull;

/// The first page of a journal. Written by the worker.
#[derive(Debug)]
#[repr(C)]
pub struct JournalHeader {
    /// The wish for which the worker stands still between two steps, to be copied; 0 for none.
    pub granted: AtomicU64,
    /// The wish of the replica that the journal is written for; 0 for none.
    pub active: AtomicU64,
    /// A [`Parting`]: why it is written for nobody any more.
    pub parting: AtomicU64,
    /// Where the journal of the present wish begins, in words.
    pub begin: AtomicU64,
    /// How long the worker stood still for the copy, nanoseconds.
    pub stood_ns: AtomicU64,
    /// How often a replica was left behind, over all lives of the worker.
    pub left_behind: AtomicU64,
    line: [u64; 10],
    /// Words written.
    pub tail: AtomicU64,
}

/// Why a worker goes on without its replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Parting {
    /// It does not: nothing was said.
    None = 0,
    /// The replica did not get on for too long, or the journal had no room.
    Behind = 1,
    /// It took too long to copy the state.
    Large = 2,
    /// The worker does what no replica can follow: it takes records one by one, or waits for an
    /// output.
    Apart = 3,
}

impl Parting {
    /// What a word says.
    #[must_use]
    pub fn of(word: u64) -> Self {
        match word {
            1 => Self::Behind,
            2 => Self::Large,
            3 => Self::Apart,
            _ => Self::None,
        }
    }
}

/// The beginning of a replica's segment. Written by the replica that there is at the moment.
#[derive(Debug)]
#[repr(C)]
pub struct FollowerHeader {
    /// The worker is asked to stand still, to be copied: a greater number each time.
    pub wish: AtomicU64,
    /// The wish for which the copy is done.
    pub copied: AtomicU64,
    /// Process id of the replica.
    pub pid: AtomicU64,
    /// Bytes of state that were copied.
    pub state_bytes: AtomicU64,
    /// Not 0 while it follows.
    pub follows: AtomicU64,
    /// Copies that it found to differ from the worker's state, over all replicas.
    pub mismatches: AtomicU64,
    /// The step of the latest one, counted as the worker's commits are.
    pub mismatch_step: AtomicU64,
    /// Where, as an arena offset; 0 when it was no place in memory.
    pub mismatch_at: AtomicU64,
    line: [u64; 8],
    /// Words of the journal that it has read.
    pub read: AtomicU64,
    /// Steps that it has followed, over all replicas.
    pub steps: AtomicU64,
    /// Comparisons with the worker's state, over all replicas.
    pub checks: AtomicU64,
    read_line: [u64; 13],
}

/// Offset of the heads behind a [`FollowerHeader`].
pub const HEADS_AT: usize = 512;

/// Bytes of a replica's segment for so many input rings.
#[must_use]
pub const fn follower_bytes(rings: usize) -> usize {
    (HEADS_AT + rings * size_of::<AtomicU64>()).next_multiple_of(PAGE)
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<JournalHeader>() <= PAGE);
    assert!(std::mem::offset_of!(JournalHeader, tail) == 128);
    assert!(size_of::<FollowerHeader>() <= HEADS_AT);
    assert!(std::mem::offset_of!(FollowerHeader, read) == 128);
};

/// A journal as either side has it mapped.
#[derive(Debug, Clone, Copy)]
pub struct Journal {
    base: NonNull<u8>,
    words: u64,
}

impl Journal {
    /// The journal of `bytes` bytes at `base`.
    ///
    /// # Safety
    /// The bytes are mapped for good, to be written if this is the worker that owns them;
    /// page-aligned; one page and a power of two.
    #[must_use]
    pub unsafe fn at(base: *mut u8, bytes: usize) -> Self {
        assert!(bytes > PAGE && (bytes - PAGE).is_power_of_two(), "a journal of {bytes} bytes");
        let base = NonNull::new(base).expect("a mapping is never at address zero");
        Self { base, words: ((bytes - PAGE) / 8) as u64 }
    }

    /// Its first page.
    #[must_use]
    pub fn header(&self) -> &JournalHeader {
        // SAFETY: mapped by the promise of `at`; all fields are atomics or reserved.
        unsafe { self.base.cast::<JournalHeader>().as_ref() }
    }

    /// How many words it holds.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.words
    }

    #[inline(always)]
    fn word(&self, position: u64) -> &AtomicU64 {
        let at = PAGE + ((position & (self.words - 1)) * 8) as usize;
        // SAFETY: masked, so inside the words behind the first page; aligned.
        unsafe { self.base.add(at).cast::<AtomicU64>().as_ref() }
    }

    /// Writes a word that no reader looks at yet. The writer alone.
    #[inline(always)]
    pub fn put(&self, position: u64, word: u64) {
        self.word(position).store(word, Ordering::Relaxed);
    }

    /// Reads a word before the tail.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, position: u64) -> u64 {
        self.word(position).load(Ordering::Relaxed)
    }

    /// Everything before `position` is there to be read. The writer alone.
    #[inline(always)]
    pub fn publish(&self, position: u64) {
        // SYNC journal-tail: pairs with the acquire load in `tail`.
        self.header().tail.store(position, Ordering::Release);
    }

    /// Words that are there.
    #[inline(always)]
    #[must_use]
    pub fn tail(&self) -> u64 {
        // SYNC journal-tail: pairs with the release store in `publish`.
        self.header().tail.load(Ordering::Acquire)
    }

    /// Whether the journal is still written for that wish. To be asked *after* words, or bytes of
    /// input, were read, before anything is concluded from them.
    #[inline]
    #[must_use]
    pub fn is_for(&self, wish: u64) -> bool {
        // SYNC journal-active: pairs with the fence in `leave`: what was read before is what was
        // there while the journal was ours, if it still is.
        fence(Ordering::SeqCst);
        self.header().active.load(Ordering::SeqCst) == wish
    }

    /// From here on the journal is for nobody, and what only a replica still had to read may be
    /// written over. The writer alone.
    pub fn leave(&self, why: Parting) {
        let header = self.header();
        header.parting.store(why as u64, Ordering::Relaxed);
        header.granted.store(0, Ordering::Relaxed);
        // SYNC journal-active: pairs with the load in `is_for`; what follows comes after it.
        header.active.store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

// SAFETY: the mapping lives as long as the process, and all of it is reached through atomics.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

/// A replica's segment as anybody has it mapped.
#[derive(Debug, Clone, Copy)]
pub struct Follower {
    base: NonNull<u8>,
    rings: usize,
}

impl Follower {
    /// The segment of a replica with so many input rings.
    ///
    /// # Safety
    /// [`follower_bytes`] bytes are mapped there for good, page-aligned.
    #[must_use]
    pub unsafe fn at(base: *mut u8, rings: usize) -> Self {
        let base = NonNull::new(base).expect("a mapping is never at address zero");
        Self { base, rings }
    }

    /// Its first words.
    #[must_use]
    pub fn header(&self) -> &'static FollowerHeader {
        // SAFETY: mapped for good by the promise of `at`; all fields are atomics or reserved.
        unsafe { self.base.cast::<FollowerHeader>().as_ref() }
    }

    /// How far the replica has read an input ring.
    ///
    /// # Panics
    /// When there is no such ring.
    #[must_use]
    pub fn head(&self, ring: usize) -> &'static AtomicU64 {
        assert!(ring < self.rings, "ring {ring} of {}", self.rings);
        // SAFETY: `follower_bytes` has a word for each ring behind the header, mapped for good.
        unsafe { self.base.add(HEADS_AT + ring * 8).cast::<AtomicU64>().as_ref() }
    }
}

// SAFETY: as for the journal.
unsafe impl Send for Follower {}
// SAFETY: as above.
unsafe impl Sync for Follower {}

/// Mixes a word into a running checksum.
#[inline(always)]
#[must_use]
pub fn mix(sum: u64, word: u64) -> u64 {
    let product = u128::from(sum ^ word) * u128::from(0x9E37_79B9_7F4A_7C15_u64);
    (product as u64) ^ ((product >> 64) as u64) ^ sum.rotate_left(23)
}

/// Checksum of some bytes.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn memory(pages: usize) -> *mut u8 {
        let layout = std::alloc::Layout::from_size_align(pages * PAGE, PAGE).expect("a layout");
        // SAFETY: not of size zero; leaked, so there for good.
        unsafe { std::alloc::alloc_zeroed(layout) }
    }

    #[test]
    fn words_are_read_as_they_were_written_however_often_the_journal_goes_round() {
        // SAFETY: leaked memory of that size.
        let journal = unsafe { Journal::at(memory(2), 2 * PAGE) };
        assert_eq!(journal.capacity(), 512);
        for position in 0..2000 {
            journal.put(position, position * 3);
            journal.publish(position + 1);
            assert_eq!((journal.tail(), journal.get(position)), (position + 1, position * 3));
        }
    }

    #[test]
    fn a_journal_that_was_left_is_for_nobody() {
        // SAFETY: as above.
        let journal = unsafe { Journal::at(memory(2), 2 * PAGE) };
        journal.header().active.store(7, Ordering::SeqCst);
        assert!(journal.is_for(7) && !journal.is_for(6));
        journal.leave(Parting::Behind);
        assert!(!journal.is_for(7));
        assert_eq!(Parting::of(journal.header().parting.load(Ordering::Relaxed)), Parting::Behind);
    }

    #[test]
    fn every_ring_has_a_head_of_its_own() {
        // SAFETY: as above; a page has room for these heads.
        let follower = unsafe { Follower::at(memory(1), 400) };
        assert_eq!(follower_bytes(400), PAGE);
        for ring in 0..400 {
            follower.head(ring).store(ring as u64, Ordering::Relaxed);
        }
        assert!((0..400).all(|ring| follower.head(ring).load(Ordering::Relaxed) == ring as u64));
        assert_eq!(follower.header().read.load(Ordering::Relaxed), 0);
    }
}
