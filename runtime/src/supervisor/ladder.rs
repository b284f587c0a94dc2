//! The ladder: which rung a worker's death leads to. Pure logic, one [`Ladder`] for each worker;
//! it is told what is known of a death and says what to do.
//!
//! - *warm*, always first: the successor attaches to what is there; nothing is lost or repeated;
//! - *careful*, when its own doing ended it twice at the same place of the same input (R17): one
//!   record a transaction until that place is behind it; a record that ends it three times alone
//!   is put aside;
//! - *cold*, when the state does not verify, or after [`TRIES_WARM`] deaths by its own doing
//!   without a commit: the worker's state comes from the checkpoint;
//! - *region*, after [`TRIES_ABOVE`] more: its region goes back to the checkpoint;
//! - *job*, after [`TRIES_ABOVE`] more: the whole job does;
//! - *failure*, when the budget of restarts is used up, or no rung is left: the job ends and says
//!   why.
//!
//! Invariants (R17): only deaths by the worker's own doing convict a record or climb; SIGKILL from
//! outside and unknown causes never do, they only count against the budget. A rung that the job
//! does not have is passed over. Time comes in as nanoseconds; nothing here waits or looks.
//!
//! Called by `recover` at each death.

use crate::config::RestartBudget;
use std::collections::VecDeque;
use testudo_shm::marker::{Place, Spot};

/// Deaths alone after which a record is put aside.
pub(crate) const CONVICTED: u32 = 3;

/// Deaths by its own doing, without a commit in between, that lead from warm or careful to cold.
pub(crate) const TRIES_WARM: u32 = 3;

/// The same from cold to region, from region to job, and from job to failure.
pub(crate) const TRIES_ABOVE: u32 = 1;

/// Deaths with care, but without a record, after which no record is looked for any more.
const TRIES_FIRED: u32 = 1;

/// A life this long was sound, even if there was nothing to commit in it.
pub(crate) const SOUND_LIFE_NS: u64 = 10_000_000_000;

/// Pause before a worker that died twice without a commit is started again; doubled each time.
const PAUSE_NS: u64 = 2_000_000;

/// Longest such pause.
pub(crate) const PAUSE_MAX_NS: u64 = 500_000_000;

/// Suspected records that are kept apart at once: one for each input that holds one, at most.
const SUSPECTS: usize = 16;

/// What ended a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A fault of its own: the signal's number.
    Fault(i32),
    /// It called abort.
    Abort,
    /// It panicked.
    Panic,
    /// The kernel killed it because its cgroup had no memory left.
    OutOfMemory,
    /// The hang watch killed it.
    Hang,
    /// It left by itself with this exit code.
    Exit(i32),
    /// A signal from outside.
    Killed,
    /// Nobody knows, or not yet.
    Unknown,
}

impl Cause {
    /// Whether the worker did it itself (R17).
    pub(crate) fn is_own_doing(self) -> bool {
        matches!(self, Self::Fault(_) | Self::Abort | Self::Panic | Self::OutOfMemory | Self::Hang)
    }
}

/// What there is to do for the successor, in the order of the ladder.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rung {
    Warm,
    Careful,
    Cold,
    Region,
    Job,
    Failure,
}

impl Rung {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Careful => "careful",
            Self::Cold => "cold",
            Self::Region => "region",
            Self::Job => "job",
            Self::Failure => "failure",
        }
    }
}

/// The rungs above careful that a job has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rungs {
    pub(crate) cold: bool,
    pub(crate) region: bool,
    pub(crate) job: bool,
}

impl Rungs {
    fn has(self, rung: Rung) -> bool {
        match rung {
            Rung::Warm | Rung::Careful | Rung::Failure => true,
            Rung::Cold => self.cold,
            Rung::Region => self.region,
            Rung::Job => self.job,
        }
    }

    /// The lowest rung of the job's at or above `rung`, failure aside.
    fn at_least(self, rung: Rung) -> Option<Rung> {
        let above = [Rung::Cold, Rung::Region, Rung::Job].into_iter();
        above.filter(|other| *other >= rung).find(|other| self.has(*other))
    }
}

/// Where a worker was when it died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    /// In the user's code, with a batch of an input.
    Batch(Place),
    /// In the user's code, with this record alone.
    Record(Spot),
    /// In the user's code without a record: a window or a timer that fired. With care it is seen
    /// whether that is so, or whether a record was behind it.
    Fired(Place),
    /// Not in the user's code, or nobody knows.
    Elsewhere,
}

/// What is known of a death.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Death {
    pub(crate) cause: Cause,
    /// A step was committed since the worker's last death.
    pub(crate) has_committed: bool,
    /// How long it lived once it had attached.
    pub(crate) lived_ns: u64,
    /// When it was seen.
    pub(crate) at_ns: u64,
    pub(crate) place: Where,
    /// Its state was looked at and is not what it should be.
    pub(crate) is_state_damaged: bool,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) rung: Rung,
    /// Until the successor is started.
    pub(crate) pause_ns: u64,
    /// With [`Rung::Careful`]: the input is taken record by record up to the end of this place.
    pub(crate) careful: Option<Place>,
    /// The record that the successor is to put aside.
    pub(crate) convicted: Option<Spot>,
    /// Deaths in a row without a commit in between.
    pub(crate) in_a_row: u32,
}

/// What of a ladder goes on under another supervisor: its counts. Where a worker died is found out
/// again: a record is convicted a little later.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Account {
    row: VecDeque<u64>,
    in_a_row: u32,
    tries: u32,
    level: Rung,
}

/// One worker's way up and down.
#[derive(Debug)]
pub(crate) struct Ladder {
    budget: RestartBudget,
    rungs: Rungs,
    /// When it died without a commit since the death before, the first death of the row included.
    row: VecDeque<u64>,
    in_a_row: u32,
    /// Deaths by its own doing at this level, without a commit or a sound life in between.
    tries: u32,
    /// The highest rung taken since it last lived soundly.
    level: Rung,
    /// Where its own doing last ended it.
    last: Option<Place>,
    careful: Option<Place>,
    suspects: Vec<(Spot, u32)>,
    convicted: Option<Spot>,
}

impl Ladder {
    /// What another supervisor is to know.
    pub(crate) fn account(&self) -> Account {
        let Self { row, in_a_row, tries, level, .. } = self;
        Account { row: row.clone(), in_a_row: *in_a_row, tries: *tries, level: *level }
    }

    /// Goes on as an earlier supervisor's.
    pub(crate) fn go_on(&mut self, account: &Account) {
        self.row.clone_from(&account.row);
        (self.in_a_row, self.tries, self.level) = (account.in_a_row, account.tries, account.level);
    }

    pub(crate) fn new(budget: RestartBudget, rungs: Rungs) -> Self {
        Self {
            budget,
            rungs,
            row: VecDeque::new(),
            in_a_row: 0,
            tries: 0,
            level: Rung::Warm,
            last: None,
            careful: None,
            suspects: Vec::new(),
            convicted: None,
        }
    }

    /// A worker died: what is to be done.
    pub(crate) fn died(&mut self, death: &Death) -> Decision {
        let is_progress = death.has_committed || death.lived_ns > SOUND_LIFE_NS;
        self.count(is_progress, death.at_ns);
        if death.lived_ns > SOUND_LIFE_NS {
            self.level = Rung::Warm;
        }
        if is_progress && self.level < Rung::Cold {
            self.tries = 0;
        }
        if self.is_spent() {
            return self.decide(Rung::Failure);
        }
        if death.is_state_damaged {
            return self.climb(Rung::Cold);
        }
        if !death.cause.is_own_doing() {
            return self.stay();
        }
        self.tries += 1;
        match death.place {
            Where::Batch(place) => self.note_place(place),
            Where::Record(spot) => self.note_record(spot),
            Where::Fired(place) if self.level < Rung::Cold => self.note_place(place),
            Where::Fired(_) | Where::Elsewhere => {}
        }
        // With care, each record has its three deaths, whatever was restored before.
        let tries = match death.place {
            Where::Fired(_) if self.careful.is_some() => TRIES_FIRED,
            _ if self.careful.is_some() || self.level < Rung::Cold => TRIES_WARM,
            _ => TRIES_ABOVE,
        };
        if self.tries > tries {
            let above = match self.level {
                Rung::Warm | Rung::Careful => Rung::Cold,
                Rung::Cold => Rung::Region,
                _ => Rung::Job,
            };
            let was_last = self.level == Rung::Job;
            return if was_last { self.decide(Rung::Failure) } else { self.climb(above) };
        }
        self.stay()
    }

    /// A successor could not even be started. True when the job may not try again.
    pub(crate) fn unborn(&mut self, at_ns: u64) -> bool {
        self.count(false, at_ns);
        self.is_spent()
    }

    /// The place is behind it: the worker takes whole batches again.
    pub(crate) fn passed(&mut self) {
        self.careful = None;
        self.last = None;
        self.suspects.clear();
    }

    /// The convicted record is put aside, and that is written down.
    pub(crate) fn put_aside(&mut self) {
        if let Some(spot) = self.convicted.take() {
            self.suspects.retain(|(other, _)| *other != spot);
        }
        self.tries = 0;
    }

    /// The deaths that count against the budget now, the latest included.
    fn count(&mut self, is_progress: bool, at_ns: u64) {
        if is_progress {
            self.row.clear();
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.row.push_back(at_ns);
        while self.row.len() > self.budget.deaths as usize + 1 {
            self.row.pop_front();
        }
    }

    /// More deaths in a row than the budget has, in its period if it has one.
    fn is_spent(&self) -> bool {
        if self.row.len() <= self.budget.deaths as usize {
            return false;
        }
        let (Some(first), Some(last)) = (self.row.front(), self.row.back()) else { return false };
        self.budget.period.is_none_or(|period| u128::from(last - first) <= period.as_nanos())
    }

    /// Twice at the same place of the same input: with care from there on.
    fn note_place(&mut self, place: Place) {
        if self.careful.is_none() {
            self.careful = self.last.and_then(|last| last.overlap(&place));
            if self.careful.is_some() {
                self.tries = 0;
            }
        }
        self.last = Some(place);
    }

    fn note_record(&mut self, spot: Spot) {
        let known = self.suspects.iter().position(|(other, _)| *other == spot);
        let at = known.unwrap_or_else(|| {
            if self.suspects.len() == SUSPECTS {
                self.suspects.remove(0);
            }
            self.suspects.push((spot, 0));
            self.suspects.len() - 1
        });
        self.suspects[at].1 += 1;
        if self.suspects[at].1 >= CONVICTED {
            self.convicted = Some(spot);
        }
    }

    /// On the rung that it is on.
    fn stay(&self) -> Decision {
        self.decide(if self.careful.is_some() { Rung::Careful } else { Rung::Warm })
    }

    /// Onto this rung or the next one that the job has; without any, it goes on where it is, as
    /// long as the budget lasts.
    fn climb(&mut self, rung: Rung) -> Decision {
        let Some(rung) = self.rungs.at_least(rung) else { return self.stay() };
        (self.level, self.tries) = (rung, 0);
        // What comes from the checkpoint is taken in whole batches at first.
        self.passed();
        self.convicted = None;
        self.decide(rung)
    }

    fn decide(&self, rung: Rung) -> Decision {
        let pause = PAUSE_NS.checked_shl(self.in_a_row.min(16)).unwrap_or(PAUSE_MAX_NS);
        let pause_ns = if self.in_a_row > 1 { pause.min(PAUSE_MAX_NS) } else { 0 };
        let (careful, convicted) = (self.careful, self.convicted);
        Decision { rung, pause_ns, careful, convicted, in_a_row: self.in_a_row }
    }
}

#[cfg(test)]
mod tests;
