//! Kill points: named places in a step, in attaching, in rollback and in a checkpoint at which a
//! test lets a process die by SIGKILL, alone or with its whole job.
//!
//! Armed through the environment of the job (`TESTUDO_KILL_AT=who:point:times:skip:all`, where
//! `who` is a worker's number, `n` and the number for a successor that is prepared while the worker
//! runs, or `s` for the supervisor, and `all` may be left out);
//! otherwise each costs one load of a constant flag and a branch. Deaths are counted in the
//! worker's incarnation, or in supervisors, so a successor does not die at the same point for ever.
//!
//! A debugger can have a worker stop for it instead (`TESTUDO_TRAP=who`): a traced worker raises
//! SIGTRAP when it begins to attach and at the begin of each step. Nobody else ever sees that
//! signal.
//!
//! Invariant: `all` reaches only a process group that the launching process leads, never that of
//! whoever started it.
//!
//! And a refusal: a file named by `TESTUDO_REFUSE` says which paths the operating system is to
//! refuse to write at the moment, as `prefix errno` lines, for outages that no user without rights
//! can bring about otherwise; with `wait` in the errno's place, files of checkpoints stall. It is
//! looked at once a write, and only where it is named.
//!
//! Called by `attach`, `step`, `cut`, `load`, the file sinks and the supervisor's `checkpoint`.

use crate::keeper;
use std::cell::Cell;
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_state::disk::{Disk, Gated, Verdict};

/// A named place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Attaching begins, nothing mapped.
    AttachBegin,
    /// All is mapped, nothing claimed.
    Mapped,
    /// The claim is ours, the death words not yet.
    Claimed,
    /// Between two entries of a rollback.
    RollingBack,
    /// The log is empty again.
    RolledBack,
    /// Cells, rings and state are open, and that is committed.
    Opened,
    /// Positions are published again.
    Published,
    /// A step begins.
    StepBegin,
    /// All stages ran.
    Processed,
    /// Files are written.
    Saved,
    /// All cells are written.
    BeforeCommit,
    /// Committed, nothing published.
    Committed,
    /// Published, nobody woken.
    StepPublished,
    /// The snapshot of a cut is taken, nothing of it copied.
    CutBegun,
    /// A block of a cut was copied to staging memory.
    CutCopied,
    /// What was in flight is copied, its rings go on.
    CutReleased,
    /// All of a cut's file is written, not synced.
    CutWritten,
    /// It is synced, not acknowledged.
    CutSynced,
    /// It is acknowledged, nobody woken.
    CutAcknowledged,
    /// Cells of a checkpoint are taken over, its state is not.
    Imported,
    /// Some pages of a checkpoint's state are in place.
    Loading,
    /// All snapshots are acknowledged, nothing says so on disk.
    BeforeSeal,
    /// The manifest has its name, no root names it.
    ManifestWritten,
    /// The root names it, no worker knows.
    RootWritten,
    /// The checkpoint is complete, what it replaces is still there.
    BeforeRetire,
    /// Sinks have prepared for a cut, and that is not committed.
    SinksPrepared,
    /// A checkpoint is complete, sinks have not committed.
    Committing,
    /// Sinks have committed, nobody knows.
    SinksCommitted,
    /// A record is about to be taken alone.
    Alone,
    /// A record that is put aside is written into a letter, which has no number yet.
    LetterWritten,
    /// It has its number and is counted, in the open transaction.
    LetterCounted,
    /// A careful step is committed and published, nobody waited for its letter yet.
    LetterCommitted,
    /// The place that asked for care is behind the worker, which has said so.
    CarePassed,
    /// The supervisor has a letter in its file, the worker does not know.
    LetterTaken,
    /// A successor has mapped all, and nobody knows.
    Prepared,
    /// It has said so, and waits for its turn.
    Waiting,
    /// It is its turn, the segment is not claimed.
    Turn,
    /// A worker is to give way, and has not begun to.
    GivingWay,
    /// Its death words are cleared, its claim is not.
    Releasing,
    /// The segment is free, the process still there.
    GaveWay,
    /// A supervisor begins to take over a job.
    AdoptBegin,
    /// It has mapped what there is.
    AdoptMapped,
    /// Workers of the earlier one that have claimed nothing give way to it.
    AdoptReigns,
    /// It has found the workers.
    AdoptCounted,
    /// A supervisor leads, the first one or a later one.
    Adopted,
    /// All workers of a region that goes back are gone, nothing is changed.
    RegionStopped,
    /// The description says what they go on from.
    RegionTold,
    /// Their segments are empty, none of them is started.
    RegionEmptied,
    /// Lines of standard input are noted, not handed over.
    InputNoted,
    /// They are handed over, and still in the pipe.
    InputPublished,
    /// They have left the pipe, and the note stands.
    InputTaken,
    /// What is to be printed is noted.
    OutputNoted,
    /// It is in the pipe, and still in its ring.
    OutputPut,
    /// It has left the ring, and the note stands.
    OutputPublished,
    /// A key group's values are built in their new type, beside the old ones.
    Migrating,
    /// All of an operator's are, and have taken the old ones' place; nothing is committed.
    Migrated,
    /// A step is about to be committed that makes this final.
    Settling,
    /// A standby has seen its worker dead, and done nothing yet.
    StandbyWoken,
    /// It has ended the dead process, and claimed nothing.
    StandbyEnded,
    /// It has claimed, said so, and may write; nothing is rolled back.
    StandbyWritable,
    /// A worker is about to stand still for a replica that copies its state.
    JournalGranted,
    /// A step is committed and in the journal, not published.
    JournalWritten,
}

impl Point {
    /// Those of every job, in order.
    pub const ALL: [Self; 25] = [
        Self::AttachBegin,
        Self::Mapped,
        Self::Claimed,
        Self::RollingBack,
        Self::RolledBack,
        Self::Opened,
        Self::Published,
        Self::StepBegin,
        Self::Processed,
        Self::Saved,
        Self::BeforeCommit,
        Self::Committed,
        Self::StepPublished,
        Self::CutBegun,
        Self::CutCopied,
        Self::CutReleased,
        Self::CutWritten,
        Self::CutSynced,
        Self::CutAcknowledged,
        Self::Imported,
        Self::Loading,
        Self::BeforeSeal,
        Self::ManifestWritten,
        Self::RootWritten,
        Self::BeforeRetire,
    ];

    /// Those of sinks, in jobs with checkpoints.
    pub const SINKS: [Self; 3] = [Self::SinksPrepared, Self::Committing, Self::SinksCommitted];

    /// Those of careful steps; the last one is the launching process's.
    pub const CAREFUL: [Self; 6] = [
        Self::Alone,
        Self::LetterWritten,
        Self::LetterCounted,
        Self::LetterCommitted,
        Self::CarePassed,
        Self::LetterTaken,
    ];

    /// Those of a worker's replacement between two steps, in order: three of the successor, three
    /// of the worker that gives way.
    pub const HANDOVER: [Self; 6] = [
        Self::Prepared,
        Self::Waiting,
        Self::Turn,
        Self::GivingWay,
        Self::Releasing,
        Self::GaveWay,
    ];

    /// Those of a take-over by a standby, before what every attaching process does.
    pub const STANDBY: [Self; 3] = [Self::StandbyWoken, Self::StandbyEnded, Self::StandbyWritable];

    /// Those of a worker with a replica.
    pub const REPLICA: [Self; 2] = [Self::JournalGranted, Self::JournalWritten];

    /// Those of supervisors; in jobs that have a keeper.
    pub const ADOPTION: [Self; 5] =
        [Self::AdoptBegin, Self::AdoptMapped, Self::AdoptReigns, Self::AdoptCounted, Self::Adopted];

    /// Those of a worker that migrates values.
    pub const MIGRATION: [Self; 3] = [Self::Migrating, Self::Migrated, Self::Settling];

    /// Those of a region that goes back, in the supervisor.
    pub const REWIND: [Self; 3] = [Self::RegionStopped, Self::RegionTold, Self::RegionEmptied];
    /// Those of supervisors that move standard input and output.
    pub const CONSOLE: [Self; 6] = [
        Self::InputNoted,
        Self::InputPublished,
        Self::InputTaken,
        Self::OutputNoted,
        Self::OutputPut,
        Self::OutputPublished,
    ];

    /// All of them, in the order of their numbers.
    fn all() -> impl Iterator<Item = &'static Self> {
        let all = Self::ALL.iter().chain(&Self::SINKS).chain(&Self::ADOPTION);
        let all = all.chain(&Self::HANDOVER).chain(&Self::CONSOLE).chain(&Self::CAREFUL);
        all.chain(&Self::STANDBY).chain(&Self::REWIND).chain(&Self::REPLICA).chain(&Self::MIGRATION)
    }

    /// What an order calls this point.
    #[must_use]
    pub fn number(self) -> usize {
        Self::all().take_while(|point| **point != self).count()
    }
}

/// The environment variable that arms a kill point.
pub const KILL_AT: &str = "TESTUDO_KILL_AT";

/// What a thread was told.
#[derive(Debug, Clone, Copy)]
struct Order {
    point: Point,
    /// Passages before the one that ends it.
    skip: u64,
    /// The whole job is to end.
    all: bool,
    /// Nothing ends: the thread stops for its tracer, here and where each step begins.
    trap: bool,
}

/// The environment variable that names a worker which is to stop for its tracer.
pub const TRAP: &str = "TESTUDO_TRAP";

thread_local! {
    static ARMED: Cell<Option<Order>> = const { Cell::new(None) };
}

/// The keeper of the job that this process is a worker of.
static KEEPER: AtomicU32 = AtomicU32::new(0);

/// Says who leads the process group of this worker's job, perhaps.
pub(crate) fn tied_to(keeper: u32) {
    KEEPER.store(keeper, Ordering::Relaxed);
}

/// Arms this thread, if the environment says so for this worker and incarnation.
pub(crate) fn arm(worker: usize, incarnation: u64) {
    arm_as(&worker.to_string(), incarnation);
}

/// Arms this thread of a prepared successor, which orders call `n` and the worker's number: in each
/// replacement the same, so the successor of one that has died like that is not told to.
pub(crate) fn arm_successor(worker: usize) {
    arm_as(&format!("n{worker}"), 0);
}

/// Arms this thread of a supervisor, if the environment says so.
pub(crate) fn arm_supervisor() {
    arm_as("s", keeper::line().map_or(0, |line| u64::from(line.role().reign)));
}

fn arm_as(who: &str, incarnation: u64) {
    if std::env::var(TRAP).is_ok_and(|named| named == who) && is_traced() {
        let point = Point::AttachBegin;
        return ARMED.set(Some(Order { point, skip: 0, all: false, trap: true }));
    }
    let Ok(text) = std::env::var(KILL_AT) else {
        return;
    };
    for order in text.split(',') {
        let mut parts = order.split(':');
        let is_meant = parts.next() == Some(who);
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (index, times, skip) = (number(), number(), number());
        let point = index.and_then(|index| Point::all().nth(index as usize));
        if let (true, Some(&point), Some(times)) = (is_meant, point, times)
            && incarnation < times
        {
            let (skip, all) = (skip.unwrap_or(0), parts.next() == Some("all"));
            ARMED.set(Some(Order { point, skip, all, trap: false }));
        }
    }
}

/// Starts a thread that is armed as this one is.
pub(crate) fn spawn_armed(work: impl FnOnce() + Send + 'static) {
    let armed = ARMED.get();
    std::thread::spawn(move || {
        ARMED.set(armed);
        work();
    });
}

/// The environment variable that names the file of refusals.
pub const REFUSE: &str = "TESTUDO_REFUSE";

fn refusals() -> Option<&'static std::path::Path> {
    static FILE: std::sync::OnceLock<Option<std::path::PathBuf>> = std::sync::OnceLock::new();
    FILE.get_or_init(|| std::env::var_os(REFUSE).map(Into::into)).as_deref()
}

/// The error that a test wants a write to this path to get.
#[inline]
pub(crate) fn refused(path: &std::path::Path) -> std::io::Result<()> {
    let Some(file) = refusals() else { return Ok(()) };
    match judge(file, path) {
        Verdict::Fail(errno) => Err(std::io::Error::from_raw_os_error(errno)),
        Verdict::Pass | Verdict::Wait => Ok(()),
    }
}

/// The disk of checkpoints, with the same in front of it.
pub(crate) fn gated(disk: Box<dyn Disk>) -> Box<dyn Disk> {
    match refusals() {
        None => disk,
        Some(file) => Box::new(Gated::new(disk, move |path| judge(file, path))),
    }
}

#[cold]
fn judge(file: &std::path::Path, path: &std::path::Path) -> Verdict {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let meant = text.lines().filter_map(|line| line.rsplit_once(' '));
    match meant.into_iter().find(|(prefix, _)| path.starts_with(prefix)) {
        Some((_, "wait")) => Verdict::Wait,
        Some((_, errno)) => errno.parse().map_or(Verdict::Pass, Verdict::Fail),
        None => Verdict::Pass,
    }
}

/// The environment variable that has supervisors wait so many milliseconds for a standby that is to
/// take over, instead of their own bound: for tests of its taking over.
pub const STANDBY_GRACE: &str = "TESTUDO_STANDBY_GRACE_MS";

/// How long a supervisor waits for a standby.
pub(crate) fn standby_grace(usual: std::time::Duration) -> std::time::Duration {
    static ASKED: std::sync::OnceLock<Option<u64>> = std::sync::OnceLock::new();
    let asked = ASKED.get_or_init(|| std::env::var(STANDBY_GRACE).ok()?.parse().ok());
    asked.map_or(usual, std::time::Duration::from_millis)
}

/// A place where this process may be told to die.
#[inline(always)]
pub(crate) fn point(at: Point) {
    if let Some(armed) = ARMED.get() {
        reached(at, armed);
    }
}

#[cold]
fn reached(at: Point, armed: Order) {
    if armed.trap {
        if at == armed.point || at == Point::StepBegin {
            stop_for_tracer();
        }
        return;
    }
    if at != armed.point {
        return;
    }
    if armed.skip > 0 {
        ARMED.set(Some(Order { skip: armed.skip - 1, ..armed }));
        return;
    }
    kill_self(armed.all);
}

/// Whether this process has a tracer: without one, the signal would end it.
fn is_traced() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_some_and(|pid| pid.trim() != "0")
}

#[expect(unsafe_code, reason = "raises a signal")]
fn stop_for_tracer() {
    // SAFETY: a signal to the calling thread; its tracer takes it away.
    unsafe { libc::raise(libc::SIGTRAP) };
}

#[expect(unsafe_code, reason = "raises a signal")]
fn kill_self(all: bool) {
    // SAFETY: kill on our own process id, or on our group if this process or its parent leads it.
    unsafe {
        let group = libc::getpgrp();
        let keeper = KEEPER.load(Ordering::Relaxed).cast_signed();
        if all && [libc::getpid(), libc::getppid(), keeper].contains(&group) {
            libc::kill(0, libc::SIGKILL);
        }
        libc::kill(libc::getpid(), libc::SIGKILL);
    }
}
