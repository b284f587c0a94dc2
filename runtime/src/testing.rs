//! Kill points: named places in a step, in attaching and in rollback at which a test lets a worker
//! die by SIGKILL.
//!
//! Armed through the environment of the job (`TESTUDO_KILL_AT=worker:point:times:skip`, and `:1` if
//! its whole process group is to die); otherwise each costs one load of a constant flag and a
//! branch. Deaths are counted in the worker's incarnation, so a successor does not die at the same
//! point for ever.
//!
//! Called by `attach` and `step`.

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
    /// Sinks have prepared for a cut, and that is not committed.
    SinksPrepared,
    /// A checkpoint is complete, sinks have not committed.
    Committing,
    /// Sinks have committed, nobody knows.
    SinksCommitted,
}

impl Point {
    /// Those of every job, in order.
    pub const ALL: [Self; 13] = [
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

thread_local! {
    static ARMED: Cell<Option<(Point, u64)>> = const { Cell::new(None) };
    /// The whole process group dies with this process.
    static TAKES_ALL: Cell<bool> = const { Cell::new(false) };
}

/// Arms this process, if the environment says so for this worker and incarnation.
pub(crate) fn arm(worker: usize, incarnation: u64) {
    let Ok(text) = std::env::var(KILL_AT) else {
        return;
    };
    for order in text.split(',') {
        let mut parts = order.split(':');
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (of, index, times, skip) = (number(), number(), number(), number());
        let takes_all = number() == Some(1);
        let mut points = Point::ALL.iter().chain(&Point::SINKS);
        let point = index.and_then(|index| points.nth(index as usize));
        if let (Some(of), Some(point), Some(times)) = (of, point, times)
            && of == worker as u64
            && incarnation < times
        {
            ARMED.set(Some((*point, skip.unwrap_or(0))));
            TAKES_ALL.set(takes_all);
        }
    }
}

/// A place where this process may be told to die.
#[inline(always)]
pub(crate) fn point(at: Point) {
    if let Some((armed, skip)) = ARMED.get() {
        reached(at, armed, skip);
    }
}

#[cold]
fn reached(at: Point, armed: Point, skip: u64) {
    if at != armed {
        return;
    }
    if skip > 0 {
        ARMED.set(Some((armed, skip - 1)));
        return;
    }
    kill_self();
}

#[expect(unsafe_code, reason = "raises a signal")]
fn kill_self() {
    // SAFETY: kill on our own process id, or on our own process group.
    unsafe { libc::kill(if TAKES_ALL.get() { 0 } else { libc::getpid() }, libc::SIGKILL) };
}
