//! Kill points: named places in a step, in attaching, in rollback and in a checkpoint at which a
//! test lets a process die by SIGKILL, alone or with its whole job.
//!
//! Armed through the environment of the job (`TESTUDO_KILL_AT=who:point:times:skip:all`, where
//! `who` is a worker's number or `s` for the launching process, and `all` may be left out);
//! otherwise each costs one load of a constant flag and a branch. Deaths are counted in the
//! worker's incarnation, so a successor does not die at the same point for ever.
//!
//! Invariant: `all` reaches only a process group that the launching process leads, never that of
//! whoever started it.
//!
//! Called by `attach`, `step`, `cut`, `load` and the supervisor's `checkpoint`.

use std::cell::Cell;

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

    /// What an order calls this point.
    #[must_use]
    pub fn number(self) -> usize {
        let all = Self::ALL.iter().chain(&Self::SINKS);
        all.into_iter().take_while(|point| **point != self).count()
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
}

thread_local! {
    static ARMED: Cell<Option<Order>> = const { Cell::new(None) };
}

/// Arms this thread, if the environment says so for this worker and incarnation.
pub(crate) fn arm(worker: usize, incarnation: u64) {
    arm_as(&worker.to_string(), incarnation);
}

/// Arms this thread of the launching process, if the environment says so.
pub(crate) fn arm_supervisor() {
    arm_as("s", 0);
}

fn arm_as(who: &str, incarnation: u64) {
    let Ok(text) = std::env::var(KILL_AT) else {
        return;
    };
    for order in text.split(',') {
        let mut parts = order.split(':');
        let is_meant = parts.next() == Some(who);
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (index, times, skip) = (number(), number(), number());
        let mut points = Point::ALL.iter().chain(&Point::SINKS);
        let point = index.and_then(|index| points.nth(index as usize));
        if let (true, Some(&point), Some(times)) = (is_meant, point, times)
            && incarnation < times
        {
            let (skip, all) = (skip.unwrap_or(0), parts.next() == Some("all"));
            ARMED.set(Some(Order { point, skip, all }));
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

/// A place where this process may be told to die.
#[inline(always)]
pub(crate) fn point(at: Point) {
    if let Some(armed) = ARMED.get() {
        reached(at, armed);
    }
}

#[cold]
fn reached(at: Point, armed: Order) {
    if at != armed.point {
        return;
    }
    if armed.skip > 0 {
        ARMED.set(Some(Order { skip: armed.skip - 1, ..armed }));
        return;
    }
    kill_self(armed.all);
}

#[expect(unsafe_code, reason = "raises a signal")]
fn kill_self(all: bool) {
    // SAFETY: kill on our own process id, or on our group if this process or its parent leads it.
    unsafe {
        let group = libc::getpgrp();
        if all && (group == libc::getpid() || group == libc::getppid()) {
            libc::kill(0, libc::SIGKILL);
        }
        libc::kill(libc::getpid(), libc::SIGKILL);
    }
}
