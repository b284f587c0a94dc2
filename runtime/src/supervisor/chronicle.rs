//! The chronicle: what a supervisor knows and nobody else would, for the one that follows it. It is
//! a list of notes in a segment of the supervisor's own, which the keeper holds.
//!
//! Invariants: notes are only added, each whole before the length that counts it; the reader
//! believes nothing beyond the length and its limits (R23: the writer is dead by then); what does
//! not fit any more is not noted, and nothing depends on it but reports and counts. What a job
//! needs to be exact is never here: it is in the workers' segments and in the checkpoint folder.
//!
//! ```text
//! 0        magic, then bytes in use (one word each)
//! 256      words of the console (`console::gate`)
//! 4096     notes: length (4 bytes), then JSON
//! ```
//!
//! Called by `launch` at each turn of its loop, and on adoption.

#![expect(unsafe_code, reason = "reads and writes a mapping of its own")]

mod scribe;

pub(crate) use scribe::{Past, Scribe};

use super::console::{Ends, Words};
use super::ladder::Account;
use super::report::Restart;
use crate::checkpoint::history::Record;
use crate::checkpoint::schedule::Schedule;
use crate::control::socket::Kept;
use crate::error::Error;
use crate::keeper::{Line, place};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use testudo_shm::arena::{Access, Arena};
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_shm::segment::Segment;

/// Bytes for all notes. Sparse: what is not written costs nothing.
const BYTES: usize = 64 << 20;

/// First word of a chronicle; its last digits are the version of the notes.
const MAGIC: u64 = 0x7465_7374_6368_0001;

/// Where the console's words are.
const CONSOLE_AT: usize = 256;

/// Where notes begin.
const NOTES_AT: usize = 4096;

/// What there is to remember.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Note {
    /// The job began at this time of the monotonic clock; the locks of its outputs are held by
    /// these descriptors, and so are the pipes of its console and the listener of its metrics.
    Begun { ns: u64, locks: Vec<RawFd>, console: Option<Ends>, metrics: Option<RawFd> },
    /// The job's control socket.
    Socket(Kept),
    /// A worker died, or more is known about it now (the number is the restart's).
    Restart {
        number: usize,
        restart: Restart,
        /// Commits of the worker at that time, and how its deaths count.
        commits: u64,
        account: Account,
    },
    /// A checkpoint began or ended.
    Checkpoint(Record),
    /// Checkpoints are taken at these times from now on.
    Schedule(Schedule),
    /// Sources are stopped for a savepoint, or go on.
    Pausing(bool),
}

/// A chronicle that is being written; one without a segment remembers nothing.
#[derive(Debug)]
pub(crate) struct Chronicle {
    segment: Option<Segment>,
    arena: &'static Arena,
    used: usize,
}

impl Chronicle {
    /// A new chronicle, for a job that has a keeper.
    pub(crate) fn create(line: Option<&Line>) -> Result<Self, Error> {
        let Some(line) = line else {
            return Ok(Self { segment: None, arena: Self::arena(4096)?, used: 0 });
        };
        let fd = Segment::create("testudo-chronicle", BYTES)?.fd().try_clone_to_owned();
        let fd = fd.map_err(|error| Error::Machine(format!("the chronicle: {error}")))?;
        let this = Self::map(place(fd, Some(line))?)?;
        this.word(0).store(MAGIC, Ordering::Relaxed);
        Ok(this)
    }

    /// The chronicle of a supervisor that is gone, and what it noted.
    pub(crate) fn open(fd: OwnedFd) -> Result<(Self, Vec<Note>), Error> {
        let mut this = Self::map(fd)?;
        if this.word(0).load(Ordering::Acquire) != MAGIC {
            return Err(Error::Machine("the chronicle is of another version".into()));
        }
        let used = this.word(8).load(Ordering::Acquire);
        let used = usize::try_from(used).unwrap_or(BYTES).min(BYTES - NOTES_AT);
        // SAFETY: so many bytes are mapped, and the only process that wrote them is dead.
        let bytes = unsafe { std::slice::from_raw_parts(this.arena.at(NOTES_AT), used) };
        let (notes, read) = read(bytes);
        this.used = read;
        Ok((this, notes))
    }

    /// Addresses, for the rest of the process: the console's thread looks into them.
    fn arena(bytes: usize) -> Result<&'static Arena, Error> {
        Ok(Box::leak(Box::new(Arena::reserve(bytes)?)))
    }

    fn map(fd: OwnedFd) -> Result<Self, Error> {
        let segment = Segment::adopt(fd, BYTES)?;
        let arena = Self::arena(BYTES)?;
        arena.map(segment.fd().as_fd(), 0, BYTES, 0, Access::Owner)?;
        Ok(Self { segment: Some(segment), arena, used: 0 })
    }

    /// The descriptor, for the keeper.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.segment.as_ref().map(Segment::raw_fd)
    }

    /// The words of the console; where nobody is to find them again, they are only this process's.
    pub(crate) fn console(&self) -> &'static Words {
        if self.segment.is_none() {
            return Box::leak(Box::default());
        }
        // SAFETY: the first page is mapped for good, the place is aligned, and all bytes of it are
        // words that any value is valid for.
        unsafe { &*self.arena.at(CONSOLE_AT).cast::<Words>() }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: the first page is mapped for as long as the arena, and the place is aligned.
        unsafe { &*self.arena.at(at).cast::<AtomicU64>() }
    }

    /// Notes something.
    pub(crate) fn note(&mut self, note: &Note) {
        if self.segment.is_none() {
            return;
        }
        // Numbers and texts: there is nothing that JSON has no form for.
        let text = serde_json::to_vec(note).unwrap_or_default();
        let at = NOTES_AT + self.used;
        if text.is_empty() || at + 4 + text.len() > BYTES {
            return;
        }
        let length = (text.len() as u32).to_ne_bytes();
        // SAFETY: the bytes lie behind all that is in use and in front of the end of the mapping,
        // which only this process writes.
        unsafe {
            std::ptr::copy_nonoverlapping(length.as_ptr(), self.arena.at(at), 4);
            std::ptr::copy_nonoverlapping(text.as_ptr(), self.arena.at(at + 4), text.len());
        }
        self.used += 4 + text.len();
        self.word(8).store(self.used as u64, Ordering::Release);
    }
}

/// The notes in these bytes, as far as they are sound, and how far that is.
fn read(bytes: &[u8]) -> (Vec<Note>, usize) {
    let (mut notes, mut at) = (Vec::new(), 0);
    while let Some((length, rest)) = bytes[at..].split_first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        let Some(text) = rest.get(..length).filter(|text| !text.is_empty()) else { break };
        // A note of another build is passed over.
        notes.extend(serde_json::from_slice(text).ok());
        at += 4 + length;
    }
    (notes, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(fd: OwnedFd) -> (Chronicle, Vec<Note>) {
        Chronicle::open(fd).expect("our own")
    }

    fn created() -> (Chronicle, OwnedFd) {
        let segment = Segment::create("chronicle-test", BYTES).expect("room");
        let fd = segment.fd().try_clone_to_owned().expect("room");
        let again = fd.try_clone().expect("room");
        let this = Chronicle::map(fd).expect("room");
        this.word(0).store(MAGIC, Ordering::Relaxed);
        (this, again)
    }

    #[test]
    fn a_successor_reads_what_was_noted_and_goes_on() {
        let (mut first, fd) = created();
        first.note(&Note::Begun { ns: 7, locks: vec![64], console: None, metrics: None });
        first.note(&Note::Pausing(true));
        drop(first);
        let (mut second, notes) = open(fd.try_clone().expect("room"));
        assert_eq!(notes.len(), 2);
        second.note(&Note::Pausing(false));
        drop(second);
        let (_, notes) = open(fd);
        assert!(matches!(notes[0], Note::Begun { ns: 7, .. }), "{notes:?}");
        assert!(matches!(notes[2], Note::Pausing(false)), "{notes:?}");
    }

    #[test]
    fn r23_a_damaged_chronicle_is_read_within_its_limits() {
        let (mut first, fd) = created();
        first.note(&Note::Pausing(true));
        first.word(8).store(u64::MAX, Ordering::Relaxed);
        let (_, notes) = open(fd.try_clone().expect("room"));
        assert_eq!(notes.len(), 1, "the rest is zeros: {notes:?}");
        // SAFETY: the first note's length, in a mapping of our own.
        unsafe { first.arena.at(NOTES_AT).cast::<u32>().write(u32::MAX) };
        let (_, notes) = open(fd);
        assert!(notes.is_empty(), "{notes:?}");
    }

    #[test]
    fn what_does_not_fit_is_not_noted() {
        let (mut first, fd) = created();
        let locks = vec![1_000_000_000; BYTES / 20];
        for _ in 0..3 {
            let locks = locks.clone();
            first.note(&Note::Begun { ns: 0, locks, console: None, metrics: None });
        }
        first.note(&Note::Pausing(false));
        let (_, notes) = open(fd);
        assert_eq!(notes.len(), 2);
        assert!(matches!(notes[1], Note::Pausing(false)));
    }
}
