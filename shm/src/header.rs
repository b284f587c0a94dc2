//! The first page of a worker's segment: who it is, whether it lives, what wakes it. Peers map it
//! read-only.
//!
//! Invariants: `#[repr(C)]`, version-stable, checked before use; each group of words that another
//! process polls stands on a line pair of its own; only the owner writes, but for the kernel, which
//! marks the death words.
//!
//! Called by `death`, `wait`, the worker and the supervisor.

use crate::primitive::{AtomicU32, AtomicU64};

/// First word of a worker segment.
pub const MAGIC: u64 = 0x7465_7374_7564_6f31;

/// Version of every shared layout; a change is a new number.
pub const LAYOUT_VERSION: u32 = 8;

/// Waiters that can each have a death word: supervisor, standby, replica, and one to spare.
pub const DEATH_WORDS: usize = 4;

/// A 32-bit word alone on its cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct LineWord {
    /// The word.
    pub word: AtomicU32,
}

/// What a worker is doing, in [`WorkerHeader::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum WorkerState {
    /// Nobody has attached yet, or a successor is attaching.
    Attaching = 0,
    /// The step loop runs.
    Running = 1,
    /// All stages ended; waiting to be told to leave.
    Finished = 2,
    /// It gave up; the last words say why.
    Failed = 3,
}

impl WorkerState {
    /// The state behind a word; an unknown one reads as `Attaching`.
    #[must_use]
    pub fn of(word: u32) -> Self {
        match word {
            1 => Self::Running,
            2 => Self::Finished,
            3 => Self::Failed,
            _ => Self::Attaching,
        }
    }
}

/// First page of a worker's segment.
#[derive(Debug)]
#[repr(C)]
pub struct WorkerHeader {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`LAYOUT_VERSION`].
    pub version: AtomicU32,
    /// Index of the worker in the job.
    pub worker: AtomicU32,
    /// Hash of the plan that this worker was attached with.
    pub plan: AtomicU64,
    /// Life of the worker: 1 for the first process.
    pub incarnation: AtomicU64,
    /// Process id, in its own namespace.
    pub pid: AtomicU32,
    /// A [`WorkerState`].
    pub state: AtomicU32,
    /// When that process started, in clock ticks since the machine did: with its id, it names one
    /// process.
    pub started: AtomicU64,
    reserved: [u64; 2],
    reserved_line: [u64; 8],
    /// Bumped and woken when something was published for a sleeper.
    pub bell: AtomicU32,
    bell_line: [u32; 31],
    /// Not zero while this worker sleeps or is about to.
    pub sleeping: AtomicU32,
    sleeping_line: [u32; 31],
    /// Steps committed by all incarnations that processed something.
    pub commits: AtomicU64,
    /// Monotonic clock at the last of them, nanoseconds.
    pub commit_ns: AtomicU64,
    /// Monotonic clock when this incarnation first committed a record, nanoseconds; 0 before.
    pub first_commit_ns: AtomicU64,
    /// Monotonic clock when this incarnation had attached, nanoseconds.
    pub attached_ns: AtomicU64,
    /// Undo entries rolled back by the last attach.
    pub rolled_back: AtomicU64,
    /// Lowest watermark that its stages have noted, milliseconds as a signed number; 0 before any.
    pub watermark: AtomicU64,
    /// Monotonic clock when an incarnation gave way to its successor, nanoseconds; 0 before any
    /// did.
    pub gave_way_ns: AtomicU64,
    /// Monotonic clock at the last commit of the incarnation before this one, nanoseconds.
    pub before_ns: AtomicU64,
    /// Turns of this incarnation's loop: who is stuck in a step takes no other.
    pub turns: AtomicU64,
    /// How many incarnations gave way in good order.
    pub gave_way: AtomicU64,
    /// Monotonic clock when values that were migrated to another type became final, nanoseconds; 0
    /// before any did. Stored before the commit that does it.
    pub migrated_ns: AtomicU64,
    commit_line: [u64; 5],
    /// Robust futexes: the thread id while alive, OWNER_DIED afterwards; one for each waiter (R1).
    pub death: [LineWord; DEATH_WORDS],
    /// Robust as well: whose turn it is to own this segment (R2).
    pub claim: LineWord,
    /// Long pauses between commits that were noted, in all; the latest are in `gaps`.
    pub gap_count: AtomicU64,
    gap_line: [u64; 7],
    /// The latest long pauses between commits.
    pub gaps: [Gap; GAPS],
    /// What this worker says about its part of the latest cut.
    pub cut: CutWords,
    /// Not zero while something of the checkpoint that the job went on from is still to be read.
    pub restoring: AtomicU64,
    /// Not zero once everything was laid out: from then on, what is empty was emptied.
    pub founded: AtomicU64,
    restoring_line: [u64; 6],
    /// What this worker has spent its time on, all incarnations together.
    pub times: TimeWords,
    /// How the systems outside of the job are that it reads from and writes to.
    pub outside: [OutsideWords; OUTSIDE],
}

/// Nanoseconds by what they were spent on; each only grows, and goes on in the next incarnation.
#[derive(Debug)]
#[repr(C)]
pub struct TimeWords {
    /// Steps that took something.
    pub busy_ns: AtomicU64,
    /// Nothing to take.
    pub idle_ns: AtomicU64,
    /// Something to take, and no room for what comes of it.
    pub pressed_ns: AtomicU64,
    /// The same, because a system outside of the job does not take what a sink has.
    pub waiting_ns: AtomicU64,
    /// Monotonic clock since when that is so; 0 while it is not. A worker that waits is not hung.
    pub waiting_since_ns: AtomicU64,
    times_line: [u64; 3],
}

/// Systems outside of the job that a worker can say something about, one slot each; further ones
/// share the last.
pub const OUTSIDE: usize = 8;

/// A file, disk or other system outside of the job, as a worker finds it. All fields are stored
/// before `state`.
#[derive(Debug)]
#[repr(C)]
pub struct OutsideWords {
    /// The operator that reads or writes it, counted from 1; 0 for a slot that is not used.
    pub operator: AtomicU64,
    /// An [`OutsideState`].
    pub state: AtomicU64,
    /// Milliseconds since 1970 at which that began.
    pub since_ms: AtomicU64,
    /// The operating system's number of the last error; 0 for none.
    pub errno: AtomicU64,
    /// Tries that failed, in all.
    pub retries: AtomicU64,
    outside_line: [u64; 3],
}

/// How a system outside of the job is, in [`OutsideWords::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum OutsideState {
    /// It works.
    Ok = 0,
    /// It refuses, and the job goes on without it.
    Failing = 1,
    /// It refuses, and the worker waits for it.
    Waiting = 2,
}

impl OutsideState {
    /// The state behind a word; an unknown one reads as `Failing`.
    #[must_use]
    pub fn of(word: u64) -> Self {
        match word {
            0 => Self::Ok,
            2 => Self::Waiting,
            _ => Self::Failing,
        }
    }
}

/// A worker's word on a cut. All fields are stored before `epoch`.
#[derive(Debug)]
#[repr(C)]
pub struct CutWords {
    /// The cut that this is about.
    pub epoch: AtomicU64,
    /// The incarnation that says it.
    pub incarnation: AtomicU64,
    /// 0: its region file is complete and durable; otherwise why not: a [`CutFailure`].
    pub failure: AtomicU64,
    /// The operating system's error number, where there is one.
    pub errno: AtomicU64,
    /// Bytes of the region file.
    pub file_bytes: AtomicU64,
    /// Where its index begins.
    pub index_at: AtomicU64,
    /// Bytes of the index.
    pub index_bytes: AtomicU64,
    /// Checksum of the index.
    pub index_checksum: AtomicU64,
    /// Bytes of ring frames and spills in the file.
    pub flight_bytes: AtomicU64,
    /// 1 when the file needs no older one.
    pub is_full: AtomicU64,
    /// CPU time of the snapshot at the step boundary, nanoseconds.
    pub pause_ns: AtomicU64,
    /// From the snapshot to the acknowledgement, nanoseconds.
    pub duration_ns: AtomicU64,
    /// From the first write to the end of the sync, nanoseconds.
    pub write_ns: AtomicU64,
    /// Copy-on-write since this incarnation began: blocks.
    pub copied_blocks: AtomicU64,
    /// The same in nanoseconds.
    pub copied_ns: AtomicU64,
    /// The cut that this incarnation joined the job at: it takes no part in it.
    pub joined: AtomicU64,
    /// The latest cut in a complete checkpoint that the worker's sinks have committed.
    pub committed: AtomicU64,
    committed_line: [u64; 15],
}

/// Why a worker's part of a cut failed, in [`CutWords::failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum CutFailure {
    /// The disk refused; see the error number.
    Disk = 1,
    /// No room for another copy of a block before it was changed.
    Copies = 2,
    /// A peer of this worker died before it had taken part.
    Peer = 3,
    /// This worker began after the cut had.
    Joined = 4,
}

/// Long pauses kept in a header.
pub const GAPS: usize = 64;

/// A pause between two commits: both ends in nanoseconds of the monotonic clock.
#[derive(Debug)]
#[repr(C)]
pub struct Gap {
    /// The commit before it.
    pub from_ns: AtomicU64,
    /// The commit that ended it.
    pub to_ns: AtomicU64,
}

// Loom's atomics have other sizes; nothing is shared with another process there.
#[cfg(not(loom))]
const _: () = {
    assert!(std::mem::offset_of!(WorkerHeader, bell) == 128);
    assert!(std::mem::offset_of!(WorkerHeader, sleeping) == 256);
    assert!(std::mem::offset_of!(WorkerHeader, commits) == 384);
    assert!(std::mem::offset_of!(WorkerHeader, death) == 512);
    assert!(std::mem::offset_of!(WorkerHeader, claim) == 768);
    assert!(std::mem::offset_of!(WorkerHeader, cut) == 1920);
    assert!(std::mem::offset_of!(WorkerHeader, times) == 2240);
    assert!(std::mem::offset_of!(WorkerHeader, outside) == 2304);
    assert!(size_of::<OutsideWords>() == 64);
    assert!(size_of::<WorkerHeader>() <= 4096);
};

/// The first page of the control segment: the supervisor writes, all read.
#[derive(Debug)]
#[repr(C)]
pub struct ControlHeader {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`LAYOUT_VERSION`].
    pub version: AtomicU32,
    reserved_half: u32,
    /// Hash of the plan.
    pub plan: AtomicU64,
    /// Process id of the supervisor.
    pub supervisor: AtomicU32,
    /// How many supervisors the job had before the one that leads it now. A worker that was started
    /// by an earlier one gives its claim up again (R2).
    pub reign: AtomicU32,
    /// Zero: a worker has its process id there, and readers tell the two by that.
    no_worker: u64,
    /// When that supervisor had taken the lead, in nanoseconds of the monotonic clock.
    pub led_ns: AtomicU64,
    /// How often the job's description was written; its lowest bit is the slot that counts, of the
    /// two that follow this page. The other one may be being written.
    pub description: AtomicU64,
    /// Bytes of the description in each slot.
    pub description_bytes: [AtomicU64; 2],
    reserved_words: [u64; 7],
    /// The control word: epoch and routing version (R5, R19), the drain and stop bits of
    /// [`control`].
    pub control: AtomicU64,
    /// The folder that cuts are written to: a number that grows with each change, times two, plus
    /// 1 for the second folder. Stored before the epoch of the first cut that goes there.
    pub folder: AtomicU64,
    control_line: [u64; 14],
    /// Bumped and woken when the control word changed or the supervisor published something.
    pub bell: AtomicU32,
    bell_line: [u32; 31],
    /// Not zero while the supervisor's ring thread sleeps.
    pub sleeping: AtomicU32,
    sleeping_line: [u32; 31],
    /// The regions' epochs, by number of the region.
    pub regions: [RegionWords; REGIONS],
    /// By worker: the process that is to give way to its successor at the next boundary between two
    /// steps; 0 for none.
    pub give_way: [AtomicU32; REGIONS],
}

/// Regions of a job at most: each has at least one worker.
pub const REGIONS: usize = 120;

/// How far a region's cuts are. A worker loads `epoch` after the tails of its input rings (R5).
#[derive(Debug)]
#[repr(C)]
pub struct RegionWords {
    /// The latest cut that was begun, from 1; 0 before any.
    pub epoch: AtomicU64,
    /// The latest cut that a complete checkpoint refers to; 0 before any.
    pub good: AtomicU64,
    /// The latest cut that is not wanted any more.
    pub aborted: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    assert!(std::mem::offset_of!(ControlHeader, control) == 128);
    assert!(std::mem::offset_of!(ControlHeader, regions) == 512);
    assert!(std::mem::offset_of!(ControlHeader, bell) == 256);
    assert!(std::mem::offset_of!(ControlHeader, sleeping) == 384);
    assert!(size_of::<ControlHeader>() <= 4096);
};

/// Bits of the control word.
pub mod control {
    /// Sources stop, everything in flight is processed, then the job ends.
    pub const DRAIN: u64 = 1 << 63;
    /// Sources do not read for the moment.
    pub const PAUSE: u64 = 1 << 61;
    /// The same, because somebody asked for it: until the job is told to go on.
    pub const HOLD: u64 = 1 << 60;
    /// All workers are finished and may leave.
    pub const LEAVE: u64 = 1 << 62;
}

/// Views a page as a header.
///
/// # Safety
/// `at` is the page-aligned start of a mapped page that stays mapped for `'static` (the arena is
/// never unmapped while its process works), holding a `T` whose fields are all atomics or reserved
/// words.
#[must_use]
pub unsafe fn at<T>(at: *mut u8) -> &'static T {
    // SAFETY: promised by the caller.
    unsafe { &*at.cast::<T>() }
}
