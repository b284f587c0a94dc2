//! A replica's own memory: laid out as its worker's, filled once while that stands still.
//!
//! One sealed memfd has room for the worker's segment and its key groups; it is mapped in an arena
//! of its own at the offsets that the worker has them at, with what others write mapped around it
//! to be read. So everything that is built for a worker can be built over it.
//!
//! Invariants:
//! - nothing of the worker's is writable in that arena, and nothing of the copy is seen by anybody
//!   else;
//! - what is copied is what is committed: the undo log is left out, and is empty between two steps;
//! - bytes are read through descriptors: pages of the worker's in this process's page tables would
//!   make a take-over slower (`standby`).
//!
//! Called by `replica`.

#![expect(unsafe_code, reason = "reads files into mappings that were made here")]

use super::attach::held_groups;
use crate::error::Error;
use crate::plan::Plan;
use crate::plan::layout::{LOG_BYTES, stride};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::segment::{PAGE, Segment};
use testudo_state::group::USED_AT;

/// The descriptors that a replica has of its worker and its peers.
pub(super) struct Originals<'a> {
    /// The worker's segment.
    pub(super) own: BorrowedFd<'a>,
    /// Its groups, by arena offset.
    pub(super) groups: &'a [(usize, usize, OwnedFd)],
    /// The segments of all workers.
    pub(super) peers: &'a HashMap<usize, Rc<OwnedFd>>,
    /// The supervisor's.
    pub(super) control: BorrowedFd<'a>,
}

/// See the module.
pub(super) struct Copy {
    pub(super) arena: &'static Arena,
    /// Its memory.
    segment: Segment,
    worker: usize,
    /// Where each group begins in that memory, by arena offset.
    places: HashMap<usize, usize>,
    /// The parts of it that were filled.
    used: Vec<(usize, usize)>,
}

fn refused(error: &std::io::Error) -> Error {
    Error::Machine(format!("the state of a worker cannot be copied for its replica: {error}"))
}

impl Copy {
    /// Maps everything; nothing is copied yet.
    pub(super) fn new(plan: &Plan, worker: usize, from: &Originals<'_>) -> Result<Self, Error> {
        let layout = &plan.layout;
        let (own, supervisor) = (&layout.segments[worker], plan.supervisor());
        let laid = layout.groups.iter().flat_map(|laid| {
            let groups = held_groups(plan, laid.operator, laid.groups, worker);
            groups.into_iter().map(|group| (laid.at + group * stride(laid.bytes), laid.bytes))
        });
        let laid: Vec<(usize, usize)> = laid.collect();
        let bytes = own.bytes + laid.iter().map(|(_, bytes)| bytes).sum::<usize>();
        let segment = Segment::create(&format!("testudo-replica-{worker}"), bytes)?;
        // Stages point into it: it stays reserved.
        let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(layout.reserved_bytes)?));
        for (process, of) in layout.segments.iter().enumerate() {
            if process == worker {
                arena.map(segment.fd(), 0, of.private_end, of.at, Access::Owner)?;
            } else if process == supervisor {
                arena.map(from.control, 0, of.front, of.at, Access::Peer)?;
            } else {
                arena.map(from.peers[&process].as_fd(), 0, of.front, of.at, Access::Peer)?;
            }
        }
        for ring in layout.rings.iter().filter(|ring| ring.from == worker || ring.to == worker) {
            let (fd, access) = if ring.from == worker {
                (segment.fd(), Access::Owner)
            } else if ring.from == supervisor {
                (from.control, Access::Peer)
            } else {
                (from.peers[&ring.from].as_fd(), Access::Peer)
            };
            arena.map_mirrored(fd, ring.data, ring.bytes, ring.at, access)?;
        }
        let (mut next, mut places) = (own.bytes, HashMap::new());
        for (at, bytes) in laid {
            arena.map(segment.fd(), next, bytes, at, Access::Owner)?;
            places.insert(at, next);
            next += bytes;
        }
        Ok(Self { arena, segment, worker, places, used: Vec::new() })
    }
}

impl Copy {
    /// Copies what the worker has. Called twice: once while it runs, for the pages to be there, and
    /// once while it stands still. Returns the bytes of state.
    pub(super) fn fill(&mut self, plan: &Plan, from: &Originals<'_>) -> Result<u64, Error> {
        let own = &plan.layout.segments[self.worker];
        let log = own.log..own.log + LOG_BYTES;
        let parts = data(from.own, own.private_end).into_iter().flat_map(|(begin, end)| {
            // What is before the log, and what is behind it.
            [(begin, end.min(log.start)), (begin.max(log.end), end)]
        });
        for (begin, end) in parts.filter(|(begin, end)| begin < end) {
            self.read(from.own, begin, end - begin, own.at + begin)?;
        }
        let mut bytes = 0;
        self.used.clear();
        for (worker, at, fd) in from.groups.iter().filter(|(worker, ..)| *worker == self.worker) {
            debug_assert_eq!(*worker, self.worker, "a replica is one worker's");
            self.read(fd.as_fd(), 0, PAGE, *at)?;
            // SAFETY: the first page of a group, mapped for this process alone, filled just now.
            let used = unsafe { self.arena.at(*at + USED_AT as usize).cast::<u64>().read() };
            let used = (used as usize).next_multiple_of(PAGE);
            if used > PAGE {
                self.read(fd.as_fd(), PAGE, used - PAGE, *at + PAGE)?;
            }
            bytes += used as u64;
            let place = self.places.get(at).copied().unwrap_or(0);
            self.used.push((place, place + used));
        }
        Ok(bytes)
    }

    /// How far each input ring was given back when the copy was made.
    pub(super) fn heads<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = u64> + 'a {
        let own = plan.layout.segments[self.worker].at;
        let rings = plan.layout.rings.iter().filter(|ring| ring.to == self.worker);
        // SAFETY: head words lie in the front of the copy, mapped for this process alone.
        rings.map(move |ring| unsafe { self.arena.at(own + ring.head_word).cast::<u64>().read() })
    }

    /// Reads `bytes` bytes of a segment to an arena offset.
    fn read(&self, fd: BorrowedFd<'_>, from: usize, bytes: usize, to: usize) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes {
            let at = self.arena.at(to + done);
            let offset = (from + done) as libc::off_t;
            // SAFETY: the range is mapped writable for this process alone: a part of the worker's
            // segment, or of a group as far as it is used. The kernel says how much it wrote.
            let got = unsafe { libc::pread(fd.as_raw_fd(), at.cast(), bytes - done, offset) };
            match usize::try_from(got) {
                Ok(0) => return Ok(()),
                Ok(got) => done += got,
                Err(_) => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(refused(&error));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Bytes that are given back at once.
const PIECE: usize = 1 << 20;

/// Before the first piece: a worker that has just taken over comes first.
const PAUSE: Duration = Duration::from_millis(20);

/// Between two pieces.
const BREAK: Duration = Duration::from_micros(300);

impl Drop for Copy {
    /// Gives the memory back, in a thread of its own and bit by bit: freeing it takes time, and
    /// keeps others of this process from their memory. Nothing may be used of it any more.
    fn drop(&mut self) {
        let Ok(fd) = self.segment.fd().try_clone_to_owned() else { return };
        let (arena, parts) = (self.arena, std::mem::take(&mut self.used));
        let free = move || {
            std::thread::sleep(PAUSE);
            for (from, to) in parts {
                for at in (from..to).step_by(PIECE) {
                    let bytes = PIECE.min(to - at);
                    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                    let (at, bytes) = (at as libc::off_t, bytes as libc::off_t);
                    // SAFETY: a plain system call on our own memfd, of which nothing is used.
                    unsafe { libc::fallocate(fd.as_raw_fd(), mode, at, bytes) };
                    std::thread::sleep(BREAK);
                }
            }
            let _ = arena.forget(0, arena.len());
        };
        // A thread that cannot be had leaves the memory to the end of the process.
        let _ = std::thread::Builder::new().name("release".into()).spawn(free);
    }
}

/// The parts of a segment's first `until` bytes that have pages.
fn data(fd: BorrowedFd<'_>, until: usize) -> Vec<(usize, usize)> {
    let seek = |from: usize, whence: libc::c_int| {
        // SAFETY: a plain system call; nobody reads through the descriptor's own position.
        let found = unsafe { libc::lseek(fd.as_raw_fd(), from as libc::off_t, whence) };
        usize::try_from(found).ok()
    };
    let (mut parts, mut next) = (Vec::new(), 0);
    while let Some(begin) = seek(next, libc::SEEK_DATA).filter(|begin| *begin < until) {
        let end = seek(begin, libc::SEEK_HOLE).unwrap_or(until).clamp(begin + PAGE, until);
        parts.push((begin, end));
        next = end;
    }
    parts
}
