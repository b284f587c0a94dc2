//! The coordinator: leads a checkpoint from its beginning to its end. A state machine: inputs are
//! moments, workers' answers and deaths; outputs are actions to be carried out in order.
//!
//! A checkpoint is one cut of each region. Regions share no data, so their cuts need not be of the
//! same moment, and a region whose cut fails or is late contributes its last good snapshot instead.
//!
//! Invariants:
//! - at most one checkpoint is open; ids and each region's epochs only grow, and no epoch is used
//!   for two cuts;
//! - a region fails a checkpoint at most once, however many of its workers die, are late or say so;
//! - a regional checkpoint completes while its failed regions are at most `max_failed_ratio` of all
//!   and at least one region succeeded; a region without a good snapshot cannot be carried over;
//! - a region that failed `max_consecutive` checkpoints in a row makes the next one global: all
//!   regions must succeed. In a global checkpoint and in a savepoint a failed region is cut once
//!   more (`global_attempts`), since the other regions' cuts stay good meanwhile. After any of
//!   these, however it ended, counting begins anew: one forced global checkpoint, not an endless
//!   row of failing ones;
//! - with one region none of this applies: a failure is a failed checkpoint;
//! - a snapshot is good once the checkpoint that has it is sealed: root written, on disk. The sinks
//!   of a region commit only what a sealed checkpoint has fresh ([`Action::Complete`]);
//! - answers that name another epoch or another life of the worker than the present one are not
//!   heard (R15).
//!
//! Called by the supervisor's loop, and by the bench in virtual time.

use super::Now;
use super::history::{History, Kind, Measure, Record, State};
use super::regions::Regions;
use std::time::Duration;

/// What a coordinator puts up with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// A region that has not answered so long after its cut began is late.
    pub deadline: Duration,
    /// Share of the regions that may fail a regional checkpoint.
    pub max_failed_ratio: f64,
    /// Failures of a region in a row after which the next checkpoint is global; 0: all are.
    pub max_consecutive: u32,
    /// How often a region is cut in a checkpoint that needs all regions, at least once.
    pub global_attempts: u32,
    /// Checkpoints that the history keeps.
    pub history: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            max_failed_ratio: 0.3,
            max_consecutive: 2,
            global_attempts: 2,
            history: 100,
        }
    }
}

/// What earlier runs of the job left: where numbers go on, and what there is to carry over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Start {
    /// Highest checkpoint id in use, 0 for none.
    pub last_id: u64,
    /// Highest epoch in use by any region, 0 for none.
    pub last_epoch: u64,
    /// The epoch of each region's good snapshot; empty when the regions are others than before.
    pub good: Vec<Option<u64>>,
}

/// What a checkpoint has of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The region.
    pub region: usize,
    /// The epoch of its snapshot.
    pub epoch: u64,
    /// True when it was taken for this checkpoint; false when it is carried over.
    pub is_fresh: bool,
}

/// What the caller is to do, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let all workers of the region cut at this epoch.
    BeginCut {
        /// The region.
        region: usize,
        /// Names the cut.
        epoch: u64,
    },
    /// The cut counts for nothing: workers stop writing it, what they wrote is garbage, what they
    /// saved counts as changed again, their sinks do not commit it.
    AbortCut {
        /// The region.
        region: usize,
        /// Names the cut.
        epoch: u64,
    },
    /// All regions are accounted for: write manifest and root, then say
    /// [`sealed`](Coordinator::sealed).
    Seal {
        /// The checkpoint.
        id: u64,
        /// What it asked for.
        kind: Kind,
        /// Its snapshots, one for each region, in order.
        parts: Vec<Part>,
    },
    /// The checkpoint is complete and on disk. Sinks of the regions whose part is fresh commit;
    /// those of the others do not.
    Complete {
        /// The checkpoint.
        id: u64,
        /// What it asked for.
        kind: Kind,
        /// Its snapshots, one for each region, in order.
        parts: Vec<Part>,
    },
    /// The checkpoint failed; the one before stays the newest.
    Fail {
        /// The checkpoint.
        id: u64,
        /// What happened, for people.
        why: String,
    },
}

/// A checkpoint cannot begin: this one is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy {
    /// The open checkpoint.
    pub id: u64,
}

impl std::fmt::Display for Busy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "checkpoint {} is being taken; ask again when it is done", self.id)
    }
}

impl std::error::Error for Busy {}

/// How far a region's cut is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// There is none.
    None,
    /// So many workers have not answered.
    Open { missing: usize },
    /// To be begun again as soon as all its workers run.
    Waiting,
    /// All workers' parts are on disk.
    Good,
    /// It failed this checkpoint.
    Failed,
}

#[derive(Debug, Clone)]
struct Region {
    /// The epoch of its newest cut.
    epoch: u64,
    /// The epoch of its newest snapshot in a complete checkpoint.
    good: Option<u64>,
    /// Checkpoints failed in a row.
    failures: u32,
    /// Cuts that failed, in all.
    failed_cuts: u64,
    cut: Cut,
    /// When the cut began, or began to wait, in monotonic nanoseconds.
    since_ns: u64,
    /// Cuts begun in this checkpoint.
    attempts: u32,
    /// What the workers that have answered this cut took for it.
    measure: Measure,
}

#[derive(Debug, Clone, Copy, Default)]
struct Worker {
    /// Its present or latest life.
    incarnation: Option<u64>,
    is_running: bool,
    /// The epoch that it has answered last.
    answered: u64,
}

#[derive(Debug, Clone)]
struct Open {
    id: u64,
    kind: Kind,
    begun: Now,
    is_sealing: bool,
    /// Regions whose cut is open or waiting.
    unsettled: usize,
    failed: usize,
    /// A region that cannot be carried over has failed.
    is_lost: bool,
    /// The first failure, for people.
    why: String,
    measure: Measure,
}

/// Leads the checkpoints of one job.
#[derive(Debug, Clone)]
pub struct Coordinator {
    regions: Regions,
    limits: Limits,
    states: Vec<Region>,
    workers: Vec<Worker>,
    last_id: u64,
    is_forced: bool,
    open: Option<Open>,
    history: History,
}

impl Coordinator {
    /// A coordinator for a fresh job. Workers count as not running until
    /// [`worker_began`](Self::worker_began).
    #[must_use]
    pub fn new(regions: Regions, limits: Limits) -> Self {
        Self::resume(regions, limits, &Start::default())
    }

    /// A coordinator that goes on where an earlier run of the job stopped.
    #[must_use]
    pub fn resume(regions: Regions, limits: Limits, start: &Start) -> Self {
        let region = |region| Region {
            epoch: start.last_epoch,
            good: start.good.get(region).copied().flatten(),
            failures: 0,
            failed_cuts: 0,
            cut: Cut::None,
            since_ns: 0,
            attempts: 0,
            measure: Measure::default(),
        };
        Self {
            states: (0..regions.count()).map(region).collect(),
            workers: vec![Worker::default(); regions.task_count()],
            regions,
            limits,
            last_id: start.last_id,
            is_forced: false,
            open: None,
            history: History::new(limits.history),
        }
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// What became of the latest checkpoints.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Takes over what became of checkpoints before this coordinator, oldest first; none is open.
    pub(crate) fn remember(&mut self, records: Vec<Record>) {
        self.history = History::of(self.limits.history, records);
    }

    /// The open checkpoint and its kind.
    #[must_use]
    pub fn open(&self) -> Option<(u64, Kind)> {
        self.open.as_ref().map(|open| (open.id, open.kind))
    }

    /// True when the next regional checkpoint will be a global one.
    #[must_use]
    pub fn is_global_next(&self) -> bool {
        self.states.len() > 1 && (self.is_forced || self.limits.max_consecutive == 0)
    }

    /// True when every worker runs: a checkpoint that begins otherwise has a failed region from the
    /// start. Worth a moment's wait.
    #[must_use]
    pub fn all_running(&self) -> bool {
        self.workers.iter().all(|worker| worker.is_running)
    }

    /// The epoch of a region's newest snapshot in a complete checkpoint.
    #[must_use]
    pub fn good(&self, region: usize) -> Option<u64> {
        self.states.get(region).and_then(|region| region.good)
    }

    /// Checkpoints go where nothing of this job is: no region has anything to carry over, and
    /// numbers go on behind these. To be called while none is open.
    pub fn move_on(&mut self, last_id: u64, last_epoch: u64) {
        self.last_id = self.last_id.max(last_id);
        for region in &mut self.states {
            region.good = None;
            region.epoch = region.epoch.max(last_epoch);
        }
    }

    /// How many cuts of each region have failed.
    #[must_use]
    pub fn failed_cuts(&self) -> Vec<u64> {
        self.states.iter().map(|region| region.failed_cuts).collect()
    }

    /// The lowest epoch of which any worker may still write: files of earlier ones that no
    /// checkpoint has are garbage.
    #[must_use]
    pub fn running_epoch(&self) -> u64 {
        let running = |region: &Region| match region.cut {
            // Until it is sealed, what is there is not reached by any root.
            Cut::Open { .. } | Cut::Good => region.epoch,
            Cut::None | Cut::Waiting | Cut::Failed => region.epoch + 1,
        };
        self.states.iter().map(running).min().unwrap_or(0)
    }

    /// When [`tick`](Self::tick) has something to do, in monotonic nanoseconds.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        let open = self.open.as_ref().filter(|open| !open.is_sealing && open.unsettled > 0);
        open?;
        let unsettled = self.states.iter().filter(|region| is_unsettled(region.cut));
        unsettled.map(|region| self.due_ns(region)).min()
    }

    fn due_ns(&self, region: &Region) -> u64 {
        let deadline = u64::try_from(self.limits.deadline.as_nanos()).unwrap_or(u64::MAX);
        region.since_ns.saturating_add(deadline)
    }

    /// Begins a checkpoint. A regional one becomes global where that is overdue
    /// ([`is_global_next`](Self::is_global_next)).
    ///
    /// # Errors
    /// One is open already.
    pub fn begin(&mut self, now: Now, kind: Kind) -> Result<(u64, Vec<Action>), Busy> {
        if let Some(open) = &self.open {
            return Err(Busy { id: open.id });
        }
        let is_forced = kind == Kind::Regional && self.is_global_next();
        let kind = if is_forced { Kind::Global } else { kind };
        self.last_id += 1;
        let id = self.last_id;
        self.history.begin(id, kind, now.unix_ms);
        self.open = Some(Open {
            id,
            kind,
            begun: now,
            is_sealing: false,
            unsettled: self.states.len(),
            failed: 0,
            is_lost: false,
            why: String::new(),
            measure: Measure::default(),
        });
        let mut actions = Vec::with_capacity(self.states.len());
        for region in 0..self.states.len() {
            self.states[region].attempts = 0;
            self.states[region].cut = Cut::Waiting;
            self.states[region].since_ns = now.monotonic_ns;
        }
        for region in 0..self.states.len() {
            match self.absent(region) {
                None => self.begin_cut(now, region, &mut actions),
                Some(worker) => {
                    self.states[region].attempts = 1;
                    let why = format!("worker {worker} is not running");
                    self.fail_region(now, region, why, &mut actions);
                }
            }
        }
        self.judge(now, &mut actions);
        Ok((id, actions))
    }

    /// A worker answers: its part of the cut is on disk, or why not.
    pub fn acknowledged(
        &mut self,
        now: Now,
        worker: usize,
        epoch: u64,
        incarnation: u64,
        result: Result<Measure, String>,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(state) = self.workers.get_mut(worker) else { return actions };
        let region = self.regions.of_task(worker);
        let Cut::Open { missing } = self.states[region].cut else { return actions };
        let is_present = state.is_running && state.incarnation == Some(incarnation);
        if !is_present || self.states[region].epoch != epoch || state.answered == epoch {
            return actions;
        }
        state.answered = epoch;
        match result {
            Ok(measure) => {
                let region = &mut self.states[region];
                region.measure.add(measure);
                if missing > 1 {
                    region.cut = Cut::Open { missing: missing - 1 };
                    return actions;
                }
                region.cut = Cut::Good;
                if let Some(open) = &mut self.open {
                    open.unsettled -= 1;
                    open.measure.add(region.measure);
                }
            }
            Err(why) => {
                self.fail_region(now, region, format!("worker {worker}: {why}"), &mut actions);
            }
        }
        self.judge(now, &mut actions);
        actions
    }

    /// A worker's process has ended, so its region's open cut has failed.
    pub fn task_failed(&mut self, now: Now, worker: usize) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(state) = self.workers.get_mut(worker) else { return actions };
        state.is_running = false;
        let region = self.regions.of_task(worker);
        if matches!(self.states[region].cut, Cut::Open { .. }) {
            self.fail_region(now, region, format!("worker {worker} died"), &mut actions);
            self.judge(now, &mut actions);
        }
        actions
    }

    /// A region is about to go back to a checkpoint that is on disk: no cut of it that is not
    /// sealed yet may become part of one.
    pub fn rewind(&mut self, now: Now, region: usize) -> Vec<Action> {
        let is_sealing = self.open.as_ref().is_some_and(|open| open.is_sealing);
        if is_sealing || self.open.is_none() {
            return Vec::new();
        }
        self.abandon(now, &format!("region {region} goes back to a checkpoint"))
    }

    /// A region goes on from the cut `good` again, or from its beginning.
    pub fn rewound(&mut self, region: usize, good: Option<u64>) {
        self.states[region].good = good;
    }

    /// A worker runs: its first process or a successor. A life that is not newer than the one known
    /// is not heard, so this may be said again and again.
    pub fn worker_began(&mut self, now: Now, worker: usize, incarnation: u64) -> Vec<Action> {
        let Some(state) = self.workers.get(worker).copied() else { return Vec::new() };
        if state.incarnation.is_some_and(|known| known >= incarnation) {
            return Vec::new();
        }
        // The death of the one before may not have been noticed.
        let mut actions = if state.is_running { self.task_failed(now, worker) } else { Vec::new() };
        let state = &mut self.workers[worker];
        state.incarnation = Some(incarnation);
        state.is_running = true;
        let region = self.regions.of_task(worker);
        if self.states[region].cut == Cut::Waiting && self.absent(region).is_none() {
            self.begin_cut(now, region, &mut actions);
        }
        actions
    }

    /// Time has passed: regions that have not answered by their deadline are late.
    pub fn tick(&mut self, now: Now) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.deadline_ns().is_none_or(|due| now.monotonic_ns < due) {
            return actions;
        }
        for region in 0..self.states.len() {
            let state = &self.states[region];
            if is_unsettled(state.cut) && self.due_ns(state) <= now.monotonic_ns {
                let why = format!("late: no answer within {:?}", self.limits.deadline);
                self.fail_region(now, region, why, &mut actions);
            }
        }
        self.judge(now, &mut actions);
        actions
    }

    /// Manifest and root of a checkpoint are on disk, or why not. Another id than the one that is
    /// being sealed is not heard.
    pub fn sealed(&mut self, now: Now, id: u64, result: Result<(), String>) -> Vec<Action> {
        let mut actions = Vec::new();
        if !self.open.as_ref().is_some_and(|open| open.id == id && open.is_sealing) {
            return actions;
        }
        if let Err(why) = result {
            self.fail(now, format!("cannot be sealed: {why}"), &mut actions);
            return actions;
        }
        let parts = self.parts();
        for part in &parts {
            self.states[part.region].good = Some(part.epoch);
        }
        let Some(open) = self.end(now, State::Complete) else { return actions };
        actions.push(Action::Complete { id, kind: open.kind, parts });
        actions
    }

    /// Gives up the open checkpoint, if there is one: the job ends, or is about to change.
    pub fn abandon(&mut self, now: Now, why: &str) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.open.is_some() {
            self.fail(now, why.to_owned(), &mut actions);
        }
        actions
    }

    /// A worker of the region that does not run.
    fn absent(&self, region: usize) -> Option<usize> {
        let mut tasks = self.regions.tasks(region).iter().copied();
        tasks.find(|worker| !self.workers[*worker].is_running)
    }

    /// Begins the cut of a region whose workers all run.
    fn begin_cut(&mut self, now: Now, region: usize, actions: &mut Vec<Action>) {
        let missing = self.regions.tasks(region).len();
        let state = &mut self.states[region];
        state.epoch += 1;
        // A cut that waited for a successor is the attempt that was counted when it began to wait.
        state.attempts = state.attempts.max(1);
        state.cut = Cut::Open { missing };
        state.since_ns = now.monotonic_ns;
        state.measure = Measure::default();
        actions.push(Action::BeginCut { region, epoch: state.epoch });
    }

    /// A region's cut has failed: it is begun once more where all regions are needed, else the
    /// region has failed this checkpoint.
    fn fail_region(&mut self, now: Now, region: usize, why: String, actions: &mut Vec<Action>) {
        let Some(open) = &mut self.open else { return };
        let is_only = self.states.len() == 1;
        let state = &mut self.states[region];
        state.failed_cuts += 1;
        if matches!(state.cut, Cut::Open { .. }) {
            actions.push(Action::AbortCut { region, epoch: state.epoch });
        }
        if open.kind.needs_all() && !is_only && state.attempts < self.limits.global_attempts {
            state.attempts += 1;
            state.cut = Cut::Waiting;
            state.since_ns = now.monotonic_ns;
            if self.absent(region).is_none() {
                self.begin_cut(now, region, actions);
            }
            return;
        }
        state.cut = Cut::Failed;
        open.unsettled -= 1;
        open.failed += 1;
        open.is_lost |= state.good.is_none();
        if open.why.is_empty() {
            open.why = format!("region {region}: {why}");
        }
    }

    /// Ends the open checkpoint when nothing can change its end any more.
    fn judge(&mut self, now: Now, actions: &mut Vec<Action>) {
        let count = self.states.len();
        let Some(open) = &mut self.open else { return };
        if open.is_sealing {
            return;
        }
        // A product such as 0.29 x 100 falls a little short of what it says.
        let allowed = (self.limits.max_failed_ratio * count as f64 + 1e-9).floor() as usize;
        let first = &open.why;
        let why = match open.failed {
            0 => None,
            _ if count == 1 => Some(first.clone()),
            _ if open.kind.needs_all() => Some(format!("{first}; all regions must succeed")),
            _ if open.is_lost => {
                Some(format!("{first}; a failed region has no good snapshot to carry over yet"))
            }
            failed if failed > allowed => {
                Some(format!("{first}; {failed} of {count} regions failed, {allowed} may"))
            }
            failed if failed == count => Some(format!("{first}; no region succeeded")),
            _ => None,
        };
        if let Some(why) = why {
            self.fail(now, why, actions);
        } else if open.unsettled == 0 {
            open.is_sealing = true;
            let (id, kind) = (open.id, open.kind);
            actions.push(Action::Seal { id, kind, parts: self.parts() });
        }
    }

    /// What the open checkpoint has of each region, once all are settled.
    fn parts(&self) -> Vec<Part> {
        let part = |(region, state): (usize, &Region)| {
            let is_fresh = state.cut == Cut::Good;
            let epoch = if is_fresh { Some(state.epoch) } else { state.good };
            epoch.map(|epoch| Part { region, epoch, is_fresh })
        };
        self.states.iter().enumerate().filter_map(part).collect()
    }

    /// The open checkpoint has failed, with all cuts that were begun for it.
    fn fail(&mut self, now: Now, why: String, actions: &mut Vec<Action>) {
        for (region, state) in self.states.iter().enumerate() {
            if matches!(state.cut, Cut::Open { .. } | Cut::Good) {
                actions.push(Action::AbortCut { region, epoch: state.epoch });
            }
        }
        if let Some(open) = self.end(now, State::Failed(why.clone())) {
            actions.push(Action::Fail { id: open.id, why });
        }
    }

    /// Closes the open checkpoint: counts the regions' failures, notes how it ended.
    fn end(&mut self, now: Now, how: State) -> Option<Open> {
        let open = self.open.take()?;
        let mut good = 0;
        for state in &mut self.states {
            match std::mem::replace(&mut state.cut, Cut::None) {
                Cut::Good => {
                    state.failures = 0;
                    good += 1;
                }
                Cut::Failed => state.failures += 1,
                // The checkpoint ended before the region could show anything.
                Cut::None | Cut::Open { .. } | Cut::Waiting => {}
            }
            if open.kind.needs_all() {
                state.failures = 0;
            }
        }
        let limit = self.limits.max_consecutive.max(1);
        self.is_forced = self.states.iter().any(|state| state.failures >= limit);
        self.history.end(|record| {
            record.regions_ok = good;
            record.regions_failed = open.failed;
            let ns = now.monotonic_ns.saturating_sub(open.begun.monotonic_ns);
            record.duration_us = ns / 1000;
            record.measure = open.measure;
            record.state = how;
        });
        Some(open)
    }
}

/// True when a region's end in the open checkpoint is not known yet.
fn is_unsettled(cut: Cut) -> bool {
    matches!(cut, Cut::Open { .. } | Cut::Waiting)
}

#[cfg(test)]
mod tests;
