//! A successor that is prepared while its worker still runs: it maps all and brings the pages in,
//! says so, and sleeps until it is its turn. What is left to do then is what every attaching
//! process does after mapping, so a replacement costs its peers a pause of that length and no more.
//!
//! ```text
//!   successor                        supervisor                    worker
//!   map, bring pages in
//!   "ready" ───────────────────────> tells the worker ───────────> at the next boundary of a step
//!   sleeps on the claim <───────────────────────────────────────── releases it, wakes, leaves
//!   claims, rolls back nothing, opens, goes on
//! ```
//!
//! Invariants:
//! - before its turn a successor stores nothing in shared memory: whoever dies, it may be killed
//!   without a trace;
//! - its turn is a claim that was released, and nothing else: after a death the supervisor kills
//!   the whole dead process first (R2), and the ordinary way is taken;
//! - who waits for nobody's sake leaves: the pipe to the supervisor says when that has gone.
//!
//! `attach` warms what it maps and awaits the turn here; `entry` says here why there is none.

#![expect(unsafe_code, reason = "seeks the data of sparse files, polls and writes to a pipe")]

use crate::error::Error;
use crate::testing::{Point, point};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::time::Duration;
use testudo_shm::arena::Arena;
use testudo_shm::header::WorkerHeader;
use testudo_shm::primitive::Ordering;
use testudo_shm::wait::{WaitWord, wait_any};

/// What a successor says through its pipe, one JSON line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Word {
    /// All is mapped.
    Ready,
    /// It cannot take the worker's place.
    Refused(String),
}

/// How long the successor sleeps between two looks at whether anybody still wants it.
const LOOK: Duration = Duration::from_millis(20);

/// Brings what there is of a mapped part of a segment into the page tables. What the worker adds
/// from here on costs its successor a fault each.
pub(crate) fn warm(arena: &Arena, fd: BorrowedFd<'_>, from: usize, len: usize, at: usize) {
    let seek = |from: usize, whence: libc::c_int| {
        // SAFETY: a plain system call; nobody reads through the descriptor's own position.
        let found = unsafe { libc::lseek(fd.as_raw_fd(), from as libc::off_t, whence) };
        usize::try_from(found).ok()
    };
    let end = from + len;
    let mut next = from;
    while let Some(data) = seek(next, libc::SEEK_DATA).filter(|data| *data < end) {
        let hole = seek(data, libc::SEEK_HOLE).unwrap_or(end).min(end);
        arena.populate(at + data - from, hole - data);
        next = hole;
    }
}

/// Says that all is mapped, and sleeps until the worker has given way.
pub(crate) fn await_turn(fd: i32, own: &WorkerHeader, in_haste: bool) -> Result<(), Error> {
    point(Point::Prepared);
    let pipe = pipe(fd);
    say(&pipe, &Word::Ready);
    point(Point::Waiting);
    let claim = &own.claim.word;
    loop {
        let value = claim.load(Ordering::Acquire);
        if value == 0 {
            break;
        }
        wait_any(&[WaitWord { word: claim, value }], Some(LOOK));
        if is_alone(&pipe) {
            return Err(Error::Machine("nobody waits for this successor any more".into()));
        }
    }
    if in_haste {
        crate::haste::again();
    }
    point(Point::Turn);
    Ok(())
}

/// Says why there is no successor.
pub(crate) fn refuse(fd: i32, error: &Error) {
    say(&pipe(fd), &Word::Refused(error.to_string()));
}

fn pipe(fd: i32) -> std::mem::ManuallyDrop<File> {
    // SAFETY: the supervisor left this descriptor open for us; it is closed with the process.
    std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

fn say(mut pipe: &File, word: &Word) {
    let line = serde_json::to_string(word).unwrap_or_default() + "\n";
    // Nobody listens any more: then nobody waits either, which `is_alone` sees.
    let _ = pipe.write_all(line.as_bytes());
}

/// Whether the other end of the pipe is closed.
fn is_alone(pipe: &File) -> bool {
    let mut poll = libc::pollfd { fd: pipe.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one valid entry.
    let count = unsafe { libc::poll(&raw mut poll, 1, 0) };
    count > 0 && poll.revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0
}
