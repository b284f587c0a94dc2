//! A standby's own segment: what it says to the supervisor, and what it kept of the worker that it
//! took over from.
//!
//! ```text
//! page 0    what the standby does
//! page 1 …  the first pages of the dead worker's segment, as they were at its death
//! ```
//!
//! A successor overwrites header and last words of the dead as soon as it owns the segment, and a
//! standby is at work before the supervisor has looked: the copy is where the death is read from.
//!
//! Invariants: the standby alone writes; what it says is checked by its reader, since it ran the
//! user's code; the copy is complete before the state says that a worker was taken.
//!
//! Made by the supervisor, written by a standby.

use crate::arena::{Access, Arena};
use crate::fault::SetupError;
use crate::header::{self, LAYOUT_VERSION, MAGIC};
use crate::primitive::{AtomicU32, AtomicU64, Ordering};
use crate::segment::{PAGE, Segment};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// What a standby is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is still mapping, or has not begun.
    Starting,
    /// It sleeps on the death words of its workers.
    Ready,
    /// It saw this worker dead and is about to claim its segment.
    Taking(usize),
    /// It owns this worker's segment, and stands by no more.
    Took(usize),
}

/// The first page of a standby's segment.
#[derive(Debug)]
#[repr(C)]
pub struct StandbyHeader {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`LAYOUT_VERSION`].
    pub version: AtomicU32,
    reserved: u32,
    /// A [`State`] in the upper half, a worker in the lower.
    pub state: AtomicU64,
    /// Monotonic clock when it saw the death, nanoseconds.
    pub woken_ns: AtomicU64,
    /// Bytes of the copy.
    pub copied: AtomicU64,
}

const READY: u64 = 1;
const TAKING: u64 = 2;
const TOOK: u64 = 3;

/// A standby's segment, mapped by its writer or by a reader.
#[derive(Debug)]
pub struct Standby {
    arena: Arena,
    copy: usize,
}

impl Standby {
    /// Makes a segment with room for a copy of `copy` bytes, and maps it to be read.
    ///
    /// # Errors
    /// When the kernel refuses memory or the mapping.
    pub fn create(name: &str, copy: usize) -> Result<(Self, Segment), SetupError> {
        let copy = copy.next_multiple_of(PAGE);
        let segment = Segment::create(name, PAGE + copy)?;
        let this = Self::map(segment.fd(), copy, Access::Peer)?;
        Ok((this, segment))
    }

    /// Maps an inherited segment to be written, and says that it is this process's.
    ///
    /// # Errors
    /// When it is no segment of that size.
    pub fn adopt(fd: OwnedFd, copy: usize) -> Result<Self, SetupError> {
        let copy = copy.next_multiple_of(PAGE);
        let segment = Segment::adopt(fd, PAGE + copy)?;
        let this = Self::map(segment.fd(), copy, Access::Owner)?;
        // Its pages are there before it sleeps: none is to be made when the worker has died.
        this.write_copy(&vec![0; copy]);
        let page = this.page();
        page.version.store(LAYOUT_VERSION, Ordering::Relaxed);
        page.magic.store(MAGIC, Ordering::Release);
        Ok(this)
    }

    fn map(fd: BorrowedFd<'_>, copy: usize, access: Access) -> Result<Self, SetupError> {
        let arena = Arena::reserve(PAGE + copy)?;
        arena.map(fd, 0, PAGE + copy, 0, access)?;
        Ok(Self { arena, copy })
    }

    fn page(&self) -> &StandbyHeader {
        // SAFETY: the page is mapped as long as `self`, and all its fields are atomics or reserved.
        unsafe { header::at::<StandbyHeader>(self.arena.base()) }
    }

    /// What it says that it is doing. A state that cannot be is `Starting`.
    #[must_use]
    pub fn state(&self) -> State {
        let page = self.page();
        let word = page.state.load(Ordering::Acquire);
        let is_ours = page.magic.load(Ordering::Acquire) == MAGIC
            && page.version.load(Ordering::Relaxed) == LAYOUT_VERSION;
        let worker = (word & 0xFFFF_FFFF) as usize;
        match word >> 32 {
            READY if is_ours => State::Ready,
            TAKING if is_ours => State::Taking(worker),
            TOOK if is_ours => State::Took(worker),
            _ => State::Starting,
        }
    }

    /// Says what it is doing.
    pub fn set(&self, state: State) {
        let word = match state {
            State::Starting => 0,
            State::Ready => READY << 32,
            State::Taking(worker) => TAKING << 32 | worker as u64,
            State::Took(worker) => TOOK << 32 | worker as u64,
        };
        self.page().state.store(word, Ordering::Release);
    }

    /// Notes when the death was seen.
    pub fn note_woken(&self, now_ns: u64) {
        self.page().woken_ns.store(now_ns, Ordering::Relaxed);
    }

    /// When the death was seen, monotonic nanoseconds.
    #[must_use]
    pub fn woken_ns(&self) -> u64 {
        self.page().woken_ns.load(Ordering::Relaxed)
    }

    /// Keeps parts of what the dead worker left, one behind the other, as far as there is room.
    ///
    /// # Safety
    /// Each part is a number of mapped bytes that nobody writes any more.
    pub unsafe fn keep(&self, parts: &[(*const u8, usize)]) {
        let mut copied = 0;
        for (part, bytes) in parts {
            let bytes = (*bytes).min(self.copy - copied);
            // SAFETY: promised by the caller; the copy is ours alone and does not overlap.
            unsafe {
                let to = self.arena.base().add(PAGE + copied);
                std::ptr::copy_nonoverlapping(*part, to, bytes);
            }
            copied += bytes;
        }
        self.page().copied.store(copied as u64, Ordering::Release);
    }

    fn write_copy(&self, bytes: &[u8]) {
        // SAFETY: the copy has `self.copy` bytes, mapped writable for this process alone.
        unsafe {
            let at = self.arena.base().add(PAGE);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len().min(self.copy));
        }
    }

    /// What was kept of the dead worker's segment.
    #[must_use]
    pub fn kept(&self) -> &[AtomicU64] {
        let kept = (self.page().copied.load(Ordering::Acquire) as usize).min(self.copy);
        // SAFETY: inside the mapping, which lives as long as `self`, and page-aligned.
        unsafe {
            let copy = self.arena.base().add(PAGE).cast_const().cast::<AtomicU64>();
            std::slice::from_raw_parts(copy, kept / size_of::<u64>())
        }
    }
}

/// A standby's place: its number and the descriptor of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// Which of the job's standbys.
    pub index: usize,
    /// Its segment, inherited.
    pub fd: RawFd,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn pair() -> (Standby, Standby) {
        let (reader, segment) = Standby::create("test-standby", 2 * PAGE).expect("a segment");
        let fd = segment.fd().as_fd().try_clone_to_owned().expect("a descriptor");
        (reader, Standby::adopt(fd, 2 * PAGE).expect("a segment of ours"))
    }

    #[test]
    fn what_a_standby_says_is_read() {
        let (reader, segment) = Standby::create("test-standby", 10).expect("a segment");
        assert_eq!(reader.state(), State::Starting, "nobody has begun");
        let fd = segment.fd().as_fd().try_clone_to_owned().expect("a descriptor");
        let writer = Standby::adopt(fd, 10).expect("a segment of ours");
        assert_eq!(reader.state(), State::Starting);
        for state in [State::Ready, State::Taking(3), State::Took(119), State::Starting] {
            writer.set(state);
            assert_eq!(reader.state(), state);
        }
    }

    #[test]
    fn what_the_dead_left_is_kept_whole_or_not_shown() {
        let (reader, writer) = pair();
        assert!(reader.kept().is_empty(), "nothing was kept yet");
        let front = vec![77u64; 2 * PAGE / 8];
        let (first, second) = (front.as_ptr(), front[8..].as_ptr());
        // SAFETY: parts of the vector, which nobody else has.
        unsafe { writer.keep(&[(first.cast(), 64), (second.cast(), PAGE - 64)]) };
        let kept: Vec<u64> =
            reader.kept().iter().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(kept, [77; PAGE / 8], "only one page was kept");
    }
}
