//! The transaction: one undo log per worker, through which every change of shared state goes.
//!
//! A step writes old bytes to the log, then bumps the log's length, then stores the new bytes.
//! Commit is one store: length 0. After a process crash all retired stores are in memory, so
//! program order is all that is needed, and no cache flush: the successor walks the log backwards
//! and puts the old bytes back.
//!
//! Invariants (rule R11):
//! - the length is an atomic with compiler fences on *both* sides of each bump and of the commit,
//!   because a release store does not keep later stores from moving up;
//! - rollback never consumes the log: it restores, then zeroes the length last; a crash in it just
//!   repeats it;
//! - only the length commits, however long the log has become;
//! - a part of a transaction may be kept by itself (`keep_since`): the length goes back to where
//!   that part began, in one store as well;
//! - the length is stored with its seal: of a damaged one nothing is undone;
//! - an entry can be walked from its end: `[old bytes, padded to 8][offset << 16 | bytes]`.
//!
//! Every write to state passes `log` (undone on rollback) or `fresh` (to memory that nothing
//! committed refers to): these two are the hook at which checkpoints learn what changed, and keep
//! what a cut still has to save (`blocks`).
//!
//! Called by `cell`, by the tables of the state crate and by the worker's step.

use crate::blocks::{BLOCK, BLOCK_LOG2, Tracker};
use crate::primitive::{AtomicU64, Ordering, compiler_fence};
use std::ptr::NonNull;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Longest old value in one entry; longer ones take several entries.
const ENTRY_BYTES_MAX: usize = 0xFF00;

/// What may live in a cell or a table slot by value: any bit pattern valid, no padding.
pub trait Plain: FromBytes + IntoBytes + Immutable + Copy + 'static {}
impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> Plain for T {}

/// The undo log of one worker, as its owner sees it.
///
/// ```
/// use testudo_shm::txn::Txn;
/// let mut memory = vec![0u64; 1024];
/// let mut txn = Txn::on_heap(memory.as_mut_slice(), 512);
/// let place = txn.place::<u64>(4096);
/// txn.set(place, 7);
/// txn.commit();
/// txn.set(place, 8);
/// txn.roll_back();
/// assert_eq!(txn.get(place), 7);
/// ```
#[derive(Debug)]
pub struct Txn {
    base: NonNull<u8>,
    root: NonNull<AtomicU64>,
    entries: NonNull<u8>,
    len: u64,
    soft_limit: u64,
    capacity: u64,
    arena_len: u64,
    serial: u64,
    /// Length of the log when the stages of this step began.
    begun: u64,
    /// The tracker's map and present value, or null and zero when nothing is tracked.
    map: *mut u8,
    now: u8,
    tracker: Option<Box<Tracker>>,
}

/// The place of a `T` in the arena.
#[derive(Debug)]
pub struct Place<T> {
    offset: u64,
    of: std::marker::PhantomData<fn() -> T>,
}

impl<T> Clone for Place<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Place<T> {}

impl<T> Place<T> {
    /// Offset in the arena, in bytes.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.offset
    }
}

/// A length as the root holds it, sealed by its product with an odd number in the upper half: a
/// damaged root is not taken for another length. (Entries of earlier transactions stand where they
/// stood.)
#[inline(always)]
const fn sealed(len: u64) -> u64 {
    len.wrapping_mul(0x9E37_79B9_0000_0001)
}

impl Txn {
    /// A transaction on `base..base + arena_len` whose log is at `log`: 64 bytes of root, then the
    /// entries.
    ///
    /// # Safety
    /// `log..log + log_len` is mapped writable by this process alone, 8-aligned, and lives as long
    /// as `self`; every pointer later given to `log`, `set` and the like lies in `base..base +
    /// arena_len`.
    #[must_use]
    pub unsafe fn attach(
        base: *mut u8,
        arena_len: usize,
        log: *mut u8,
        log_len: usize,
        soft_limit: usize,
    ) -> Self {
        assert!(
            log_len > 64 && log_len < 1 << 32 && log.addr().is_multiple_of(8),
            "a log has a root line and room for entries, and its length fits into half a word"
        );
        // SAFETY: the caller promises that log..log + log_len is ours.
        let (root, entries) = unsafe {
            (NonNull::new_unchecked(log.cast::<AtomicU64>()), NonNull::new_unchecked(log.add(64)))
        };
        // SAFETY: base is the start of a mapping, never null.
        let base = unsafe { NonNull::new_unchecked(base) };
        let mut txn = Self {
            base,
            root,
            entries,
            len: 0,
            soft_limit: soft_limit as u64,
            capacity: (log_len - 64) as u64,
            arena_len: arena_len as u64,
            serial: 0,
            begun: 0,
            map: std::ptr::null_mut(),
            now: 0,
            tracker: None,
        };
        txn.len = txn.stored_len().unwrap_or(0);
        txn
    }

    /// A transaction over ordinary memory, for tests and examples: the first `log_words` words hold
    /// the log.
    #[must_use]
    pub fn on_heap(memory: &mut [u64], log_words: usize) -> Self {
        let len = std::mem::size_of_val(memory);
        let base = memory.as_mut_ptr().cast::<u8>();
        assert!(log_words * 8 < len);
        // SAFETY: the slice is exclusively borrowed now; tests keep it alive and untouched as long
        // as the result.
        unsafe { Self::attach(base, len, base, log_words * 8, log_words * 4) }
    }

    fn root(&self) -> &AtomicU64 {
        // SAFETY: root points into the log, which the creator promised to outlive self.
        unsafe { self.root.as_ref() }
    }

    /// The length that the root says; the root itself where it says none.
    fn stored_len(&self) -> Result<u64, u64> {
        let root = self.root().load(Ordering::Acquire);
        let len = root & u64::from(u32::MAX);
        let is_sound = root == sealed(len) && len <= self.capacity && len.is_multiple_of(8);
        if is_sound { Ok(len) } else { Err(root) }
    }

    /// From here on, keeps account of the blocks that are written.
    ///
    /// # Errors
    /// When the address space is limited.
    pub fn track(&mut self) -> Result<(), crate::fault::SetupError> {
        self.tracker = Some(Box::new(Tracker::new(self.arena_len as usize)?));
        self.with_tracker(|_| ());
        Ok(())
    }

    /// Works on the account of written blocks; `None` when there is none.
    pub fn with_tracker<R>(&mut self, work: impl FnOnce(&mut Tracker) -> R) -> Option<R> {
        let tracker = self.tracker.as_mut()?;
        let done = work(tracker);
        (self.map, self.now) = tracker.fast();
        Some(done)
    }

    /// Gives out the next block of the open cut, as it was when the cut began: its number and its
    /// bytes. `Some(None)` when it found nothing where it looked; `None` when all are saved, or
    /// there is no cut.
    pub fn save_next<R>(&mut self, save: impl FnOnce(u64, &[u8; BLOCK]) -> R) -> Option<Option<R>> {
        let base = self.base.as_ptr();
        let tracker = self.tracker.as_mut()?;
        // SAFETY: the tracker's blocks were all written through this transaction, or named by who
        // began the cut: they are mapped, and only this thread writes them.
        unsafe { tracker.save_next(base, save) }
    }

    /// Whether blocks that were freed must keep their bytes: an open cut may still have to save
    /// them.
    #[inline(always)]
    #[must_use]
    pub fn is_cutting(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.is_open())
    }

    /// Notes that `at..at + bytes` is about to be written.
    ///
    /// # Safety
    /// As [`Txn::log`].
    #[inline(always)]
    unsafe fn touch(&mut self, at: *const u8, bytes: usize) {
        if self.map.is_null() {
            return;
        }
        let from = at.addr() - self.base.addr().get();
        let (first, last) = (from >> BLOCK_LOG2, (from + bytes).wrapping_sub(1) >> BLOCK_LOG2);
        // SAFETY: the range lies in the arena, and the map has a byte for each of its blocks.
        if first != last || unsafe { *self.map.add(first) } != self.now {
            // SAFETY: passed on.
            unsafe { self.touch_slow(first, last) };
        }
    }

    #[cold]
    #[inline(never)]
    unsafe fn touch_slow(&mut self, first: usize, last: usize) {
        let base = self.base.as_ptr();
        if let Some(tracker) = &mut self.tracker {
            // SAFETY: blocks of the arena that the caller is about to write are mapped. (Nothing
            // at all at a block's begin gives last < first, and does nothing.)
            unsafe { tracker.touch(base, first as u64, last as u64) };
        }
    }

    /// Address of arena offset 0.
    #[inline(always)]
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes in the log of the open transaction.
    #[inline(always)]
    #[must_use]
    pub fn logged(&self) -> u64 {
        self.len
    }

    /// Number of the open transaction, in this process: tells what was changed in it from what is
    /// committed.
    #[inline(always)]
    #[must_use]
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// True when the step should end at the next record boundary: three quarters of the log's
    /// normal size are used.
    #[inline(always)]
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        self.len - self.begun > self.soft_limit - self.soft_limit / 4
    }

    /// Says that the stages of a step begin. What was logged before them (a cut) shortens no step:
    /// one that a replica takes again ends where the worker's did.
    #[inline(always)]
    pub fn begin_stages(&mut self) {
        self.begun = self.len;
    }

    /// Where the newest change of the open step is; 0 where there is none.
    #[must_use]
    pub fn newest(&self) -> u64 {
        if self.len <= self.begun {
            return 0;
        }
        // SAFETY: the log's length is the end of an entry, where its header word stands.
        unsafe { self.entries.as_ptr().add(self.len as usize - 8).cast::<u64>().read() >> 16 }
    }

    /// Checksum of bytes that are mapped, by arena offset.
    ///
    /// # Panics
    /// When they lie outside the arena: offsets come from our own plan.
    #[must_use]
    pub fn checksum(&self, offset: u64, bytes: u64) -> u64 {
        if bytes == 0 {
            return 0;
        }
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.arena_len), "{offset}");
        // SAFETY: inside the arena, and mapped as every place that is named by an offset.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.base.as_ptr().add(offset as usize), bytes as usize)
        };
        crate::follow::checksum(bytes)
    }

    /// Checksum of the newest changes of the open step, at most `max`: where they are, and what is
    /// there now. Nothing of what was logged before the stages began.
    #[must_use]
    pub fn digest(&self, max: usize) -> u64 {
        let (mut at, mut sum) = (self.len, 0);
        for _ in 0..max {
            if at <= self.begun {
                break;
            }
            // SAFETY: `at` is the end of an entry, where its header word stands.
            let head = unsafe { self.entries.as_ptr().add(at as usize - 8).cast::<u64>().read() };
            let (offset, bytes) = (head >> 16, head & 0xFFFF);
            sum = crate::follow::mix(sum, head);
            // SAFETY: the place of an entry of this step lies in the arena and is mapped.
            let now = unsafe {
                let place = self.base.as_ptr().add(offset as usize);
                std::slice::from_raw_parts(place, bytes as usize)
            };
            sum = crate::follow::mix(sum, crate::hash::key_hash(now));
            at = at.saturating_sub(((bytes + 7) & !7) + 8);
        }
        sum
    }

    /// The place of a `T` at an arena offset.
    ///
    /// # Panics
    /// When it would lie outside the arena or be misaligned: offsets come from our own plan.
    #[must_use]
    pub fn place<T: Plain>(&self, offset: u64) -> Place<T> {
        let end = offset.checked_add(size_of::<T>() as u64);
        assert!(end.is_some_and(|end| end <= self.arena_len), "place {offset} outside the arena");
        assert!((self.base.addr().get() as u64 + offset).is_multiple_of(align_of::<T>() as u64));
        Place { offset, of: std::marker::PhantomData }
    }

    /// Reads a place.
    #[inline(always)]
    #[must_use]
    pub fn get<T: Plain>(&self, place: Place<T>) -> T {
        // SAFETY: `place` checked bounds and alignment; this process is the only writer, so no
        // store races.
        unsafe { self.base.as_ptr().add(place.offset as usize).cast::<T>().read() }
    }

    /// Logs the old value of a place, then stores the new one.
    #[inline(always)]
    pub fn set<T: Plain>(&mut self, place: Place<T>, new: T) {
        // SAFETY: `place` checked bounds and alignment against the arena.
        unsafe { self.store(self.base.as_ptr().add(place.offset as usize).cast::<T>(), new) };
    }

    /// Logs the old value at `at`, then stores the new one.
    ///
    /// # Safety
    /// `at` is aligned, inside the arena, and mapped writable by this process.
    #[inline(always)]
    pub unsafe fn store<T: Plain>(&mut self, at: *mut T, new: T) {
        // SAFETY: passed on.
        unsafe {
            self.log(at.cast(), size_of::<T>());
            at.write(new);
        }
    }

    /// Logs `bytes` old bytes at `at`; afterwards the caller may change them in place until commit.
    ///
    /// # Safety
    /// `at..at + bytes` is inside the arena and mapped writable by this process.
    #[inline(always)]
    pub unsafe fn log(&mut self, at: *mut u8, bytes: usize) {
        if bytes <= ENTRY_BYTES_MAX {
            // SAFETY: passed on.
            unsafe { self.log_entry(at, bytes) };
        } else {
            // SAFETY: passed on.
            unsafe { self.log_long(at, bytes) };
        }
    }

    #[inline(always)]
    unsafe fn log_entry(&mut self, at: *mut u8, bytes: usize) {
        let padded = (bytes + 7) & !7;
        let next = self.len + padded as u64 + 8;
        if next > self.capacity {
            self.overflow(next);
        }
        let offset = at.addr() as u64 - self.base.addr().get() as u64;
        // SAFETY: passed on.
        unsafe { self.touch(at, bytes) };
        // SAFETY: next <= capacity, so the entry lies inside the log; `at` is valid by the caller's
        // promise.
        unsafe {
            let entry = self.entries.as_ptr().add(self.len as usize);
            std::ptr::copy_nonoverlapping(at, entry, bytes);
            entry.add(padded).cast::<u64>().write((offset << 16) | bytes as u64);
        }
        self.len = next;
        compiler_fence(Ordering::SeqCst);
        self.root().store(sealed(next), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// Begins a run of up to `entries` log entries of `bytes` each, which come into force together:
    /// one bump of the length for all of them. `crosses` says whether a place may begin in one
    /// block and end in the next. `None` when the log has no room for that many, or they are too
    /// long.
    #[inline(always)]
    pub fn run(&mut self, entries: usize, bytes: usize, crosses: bool) -> Option<LogRun<'_>> {
        let need = entries as u64 * (((bytes + 7) & !7) as u64 + 8);
        if self.len + need > self.capacity || bytes > ENTRY_BYTES_MAX {
            return None;
        }
        // SAFETY: len <= capacity, so the place is inside the log.
        let cursor = unsafe { self.entries.as_ptr().add(self.len as usize) };
        Some(LogRun {
            base: self.base.addr().get() as u64,
            map: self.map,
            now: self.now,
            unlisted: 0,
            begun: self.len,
            cursor,
            bytes,
            crosses,
            left: entries,
            txn: self,
        })
    }

    #[cold]
    unsafe fn log_long(&mut self, at: *mut u8, bytes: usize) {
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(ENTRY_BYTES_MAX);
            // SAFETY: part of the range that the caller vouches for.
            unsafe { self.log_entry(at.add(done), part) };
            done += part;
        }
    }

    /// Says that memory which nothing committed refers to is about to be written: no undo is needed
    /// (rule R12 keeps freed memory out of here until its freeing is committed).
    ///
    /// # Safety
    /// `at..at + bytes` is inside the arena and mapped writable by this process.
    #[inline(always)]
    pub unsafe fn fresh(&mut self, at: *mut u8, bytes: usize) {
        // SAFETY: passed on.
        unsafe { self.touch(at, bytes) };
    }

    #[cold]
    fn overflow(&self, need: u64) -> ! {
        // No unwinding: a half-done step must never be committed by a destructor (R11).
        eprintln!(
            "testudo: one record changed more state than the undo log holds \
             ({need} bytes, limit {}); \
             split the change over several records",
            self.capacity
        );
        std::process::abort();
    }

    /// Ends the transaction: everything since the last commit stays. One store.
    #[inline(always)]
    pub fn commit(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.root().store(0, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        (self.len, self.begun) = (0, 0);
        self.serial += 1;
    }

    /// What was logged since the log had `len` bytes stays, whatever becomes of the transaction: a
    /// part of it that is right by itself, and needs a log only while it is half done. What was
    /// logged before is undone as before, so both parts must not change the same places.
    ///
    /// ```
    /// use testudo_shm::txn::Txn;
    /// let mut memory = vec![0u64; 1024];
    /// let mut txn = Txn::on_heap(memory.as_mut_slice(), 512);
    /// let (open, kept) = (txn.place::<u64>(4096), txn.place::<u64>(4104));
    /// txn.set(open, 1);
    /// let since = txn.logged();
    /// txn.set(kept, 2);
    /// txn.keep_since(since);
    /// txn.roll_back();
    /// assert_eq!((txn.get(open), txn.get(kept)), (0, 2));
    /// ```
    ///
    /// # Panics
    /// When the log is shorter than that.
    pub fn keep_since(&mut self, len: u64) {
        assert!(len <= self.len && len.is_multiple_of(8), "the log has {} bytes", self.len);
        self.len = len;
        compiler_fence(Ordering::SeqCst);
        self.root().store(sealed(len), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// Whether a range of the arena touches the log itself, which no entry can have been made from.
    fn is_log(&self, offset: u64, bytes: u64) -> bool {
        let from = self.base.addr().get() as u64 + offset;
        let log = self.root.addr().get() as u64;
        from < log + 64 + self.capacity && log < from + bytes
    }

    /// Puts back everything since the last commit, newest first, then empties the log. Idempotent:
    /// a crash anywhere in here leaves a log that can be rolled back again.
    ///
    /// Returns the number of entries undone. An entry that points outside the arena or into the log
    /// (the memory was damaged by what killed the process) ends the walk with `Err` and leaves the
    /// log as it is.
    ///
    /// # Errors
    /// The offending header word.
    pub fn roll_back(&mut self) -> Result<u64, u64> {
        self.roll_back_with(|_, _| true, || {})
    }

    /// As [`Txn::roll_back`] of a log that a dead process left: an entry that goes to a range
    /// (arena offset, bytes) that is not `is_own` ends the walk like one that leads out of the
    /// arena. What was put back before it stays: such memory is not gone on from. Calls `between`
    /// after each entry (a test's kill point).
    ///
    /// # Errors
    /// The offending header word.
    pub fn roll_back_with(
        &mut self,
        is_own: impl Fn(u64, u64) -> bool,
        mut between: impl FnMut(),
    ) -> Result<u64, u64> {
        let mut at = self.stored_len()?;
        let mut undone = 0;
        while at > 0 {
            // SAFETY: 8 <= at <= capacity, and `at` is the end of an entry, where its header word
            // stands.
            let head = unsafe { self.entries.as_ptr().add(at as usize - 8).cast::<u64>().read() };
            let (offset, bytes) = (head >> 16, head & 0xFFFF);
            let padded = (bytes + 7) & !7;
            let is_inside = offset + bytes <= self.arena_len && padded + 8 <= at;
            if !is_inside || self.is_log(offset, bytes) || !is_own(offset, bytes) {
                return Err(head);
            }
            // SAFETY: both ranges were checked; the entry was made from a writable range of this
            // worker.
            unsafe {
                let old = self.entries.as_ptr().add((at - 8 - padded) as usize);
                let place = self.base.as_ptr().add(offset as usize);
                std::ptr::copy_nonoverlapping(old, place, bytes as usize);
            }
            at -= padded + 8;
            undone += 1;
            between();
        }
        compiler_fence(Ordering::SeqCst);
        self.root().store(0, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
        (self.len, self.begun) = (0, 0);
        self.serial += 1;
        Ok(undone)
    }
}

/// A run of log entries that is being written. Several entries for the same place are right as long
/// as nothing is stored between them: rollback ends with the oldest.
#[derive(Debug)]
pub struct LogRun<'a> {
    txn: &'a mut Txn,
    base: u64,
    // The transaction's, where stores to the log cannot make the compiler load them again.
    map: *mut u8,
    now: u8,
    /// Not 0 when a block of a place was not changed before: one branch for the whole run.
    unlisted: u8,
    /// Length of the log before it.
    begun: u64,
    cursor: *mut u8,
    bytes: usize,
    crosses: bool,
    left: usize,
}

impl LogRun<'_> {
    /// Adds the old bytes at `at`, which must not be changed before [`LogRun::close`].
    ///
    /// # Safety
    /// The run's number of bytes at `at` is inside the arena and mapped writable by this process.
    #[inline(always)]
    pub unsafe fn add(&mut self, at: *const u8) {
        assert!(self.left > 0, "more entries than the run was begun for");
        self.left -= 1;
        let padded = (self.bytes + 7) & !7;
        if !self.map.is_null() {
            let from = (at.addr() as u64 - self.base) as usize;
            // SAFETY: the range lies in the arena, and the map has a byte for each of its blocks.
            unsafe {
                self.unlisted |= *self.map.add(from >> BLOCK_LOG2) ^ self.now;
                if self.crosses {
                    let last = (from + self.bytes - 1) >> BLOCK_LOG2;
                    self.unlisted |= *self.map.add(last) ^ self.now;
                }
            }
        }
        // SAFETY: `run` checked the room for this many entries; `at` is vouched for by the caller.
        unsafe {
            std::ptr::copy_nonoverlapping(at, self.cursor, self.bytes);
            let head = ((at.addr() as u64 - self.base) << 16) | self.bytes as u64;
            self.cursor.add(padded).cast::<u64>().write(head);
            self.cursor = self.cursor.add(padded + 8);
        }
    }

    /// Puts all entries into force: from here on their places may be changed.
    #[inline(always)]
    pub fn close(mut self) {
        let next = (self.cursor.addr() - self.txn.entries.addr().get()) as u64;
        if self.unlisted != 0 {
            self.touch_all(next);
        }
        self.txn.len = next;
        compiler_fence(Ordering::SeqCst);
        self.txn.root().store(sealed(next), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// Tells the account of written blocks about all places of the run. Nothing was stored there
    /// yet: a copy that the open cut needs is still what it has to be.
    #[cold]
    #[inline(never)]
    fn touch_all(&mut self, next: u64) {
        let padded = ((self.bytes + 7) & !7) as u64;
        let mut at = self.begun;
        while at < next {
            // SAFETY: `add` wrote an entry here, whose header word stands behind its bytes.
            let head = unsafe {
                self.txn.entries.as_ptr().add((at + padded) as usize).cast::<u64>().read()
            };
            let from = (head >> 16) as usize;
            // SAFETY: the place is one that was vouched for.
            unsafe {
                self.txn.touch_slow(from >> BLOCK_LOG2, (from + self.bytes - 1) >> BLOCK_LOG2);
            }
            at += padded + 8;
        }
    }
}
