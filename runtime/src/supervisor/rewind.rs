//! Rewinding: a region whose state cannot be gone on from goes back to the last checkpoint, or to
//! its beginning, while the other regions go on.
//!
//! ```text
//! stop    every worker of the region is killed; the store is asked for the newest whole checkpoint
//! still   no process of them is left, and what they had printed is printed
//! tell    the job's description says what their successors go on from
//! empty   their segments and key groups read as zeros: both ends of each ring begin anew (R18)
//! start   fresh workers resume: cells first, state when it is touched, then what was in flight
//! ```
//!
//! Invariants: a process of another region maps nothing of these but fronts, from which it takes
//! bells alone; sources go back to their cells, sinks take back what lies beyond them (R13); no
//! checkpoint begins, and none that is open ends, between *stop* and *start*; a supervisor that
//! ends at any moment is followed by one that goes on with it, or leaves a checkpoint that holds
//! the whole job.
//!
//! A region that goes back again within a minute waits longer each time, [`TRIES`] times; then the
//! job as a whole goes back, [`JOB_TRIES`] times in ten minutes; then it fails, and says all that.
//!
//! Called by `launch`'s loop at each turn.

pub(crate) mod asked;

pub(crate) mod job;

pub(crate) mod may;

use super::checkpoint::Checkpointer;
use super::console::Console;
use super::description::Rewound;
use super::ladder::Rung;
use super::launch::{Scene, can_load_lazily, renewed_ends};
use super::recover::Crew;
use super::recover::stop::{Fall, Fallen};
use super::resume::Chosen;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::Plan;
use crate::testing::{Point, point};
use crate::time::now_ns;
use crate::worker::restore::Restore;
use asked::Asked;
use may::{job_cannot, prints, region_cannot, region_cannot_begin_again};
use serde::Serialize;
use std::time::Duration;
use testudo_shm::header::WorkerState;
use testudo_shm::primitive::Ordering;

/// How often in a row a region goes back before the job does.
pub(crate) const TRIES: u32 = 3;

/// How often in a row the job goes back before it fails.
pub(crate) const JOB_TRIES: u32 = 2;

/// A region that went on for so long has held: the next time is the first one.
const SOUND_NS: u64 = 60_000_000_000;

/// The same for a job.
pub(crate) const JOB_SOUND_NS: u64 = 600_000_000_000;

/// Pause before a region goes back for the second time in a row; doubled each time.
const PAUSE: Duration = Duration::from_millis(100);

/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What a rewind needs to know.
pub(crate) struct Job<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) settings: &'a Settings,
    pub(crate) scene: &'a Scene,
}

/// What a rewind works with.
pub(crate) struct Hands<'h, 'c> {
    pub(crate) crew: &'h mut Crew<'c>,
    pub(crate) checkpoints: Option<&'h mut Checkpointer>,
    pub(crate) console: &'h Console,
}

/// A region that went back, for the report.
#[derive(Debug, Clone, Serialize)]
pub struct WentBack {
    /// Its number.
    pub region: usize,
    /// Its workers.
    pub workers: Vec<usize>,
    /// The checkpoint that it went back to; none: to its beginning.
    pub checkpoint: Option<u64>,
    /// Why.
    pub cause: String,
    /// From when that was seen until all its workers had attached, milliseconds.
    pub took_ms: Option<u64>,
}

/// What there is to go on from.
enum Choice {
    /// The folder of checkpoints is not open yet.
    Waiting,
    Asked(Asked),
    /// With the word for its folder.
    Made(Option<Restore>, u64),
}

/// A region that is going back.
struct Rewind {
    region: usize,
    cause: String,
    seen_ns: u64,
    due_ns: u64,
    choice: Choice,
}

/// What became of a region so far.
#[derive(Debug, Clone, Default)]
struct Past {
    /// Rewinds in a row.
    in_a_row: u32,
    /// When the last one was over.
    ended_ns: u64,
    /// Files that it went on from, and those of them that turned out to be damaged.
    files: Vec<String>,
    damaged: Vec<String>,
}

/// All rewinds of a job.
pub(crate) struct Rewinds {
    past: Vec<Past>,
    open: Vec<Rewind>,
    /// Those whose workers are starting: the place in `done`, and when it was seen.
    starting: Vec<(usize, u64)>,
    told: Vec<Rewound>,
    is_lazy: Option<bool>,
    /// The last rung that is left is the job's.
    wants_job: bool,
    pub(crate) done: Vec<WentBack>,
}

impl Rewinds {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            past: vec![Past::default(); plan.regions.count()],
            open: Vec::new(),
            starting: Vec::new(),
            told: Vec::new(),
            is_lazy: None,
            wants_job: false,
            done: Vec::new(),
        }
    }

    /// Those of a supervisor that died: what it had begun to empty is emptied again.
    pub(crate) fn adopt(plan: &Plan, told: &[Rewound], crew: &mut Crew<'_>) -> Self {
        let mut this = Self::new(plan);
        for told in told.iter().filter(|told| told.is_emptying) {
            told.workers.iter().for_each(|worker| crew.stop(*worker));
            let cause = format!("the supervisor died while region {} went back", told.region);
            let (now, choice) = (now_ns(), Choice::Made(told.restore.clone(), told.from));
            let rewind = Rewind { region: told.region, cause, seen_ns: now, due_ns: now, choice };
            this.open.push(rewind);
        }
        this.told = told.to_vec();
        this
    }

    /// Takes a turn: stops the regions of workers that have fallen, and goes on with those that
    /// are stopped.
    pub(crate) fn look(
        &mut self,
        job: &Job<'_>,
        hands: &mut Hands<'_, '_>,
        fallen: Vec<Fallen>,
    ) -> Result<(), Error> {
        for fallen in fallen {
            self.fall(job, hands, fallen)?;
        }
        let mut at = 0;
        while at < self.open.len() {
            if self.is_ready(job, hands, at)? {
                let rewind = self.open.remove(at);
                self.carry_out(job, hands, rewind)?;
            } else {
                at += 1;
            }
        }
        self.note_started(job, hands);
        Ok(())
    }

    /// How soon the loop should look again.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let now = now_ns();
        let due = self.open.iter().map(|open| open.due_ns).min();
        let due = due.map(|due| Duration::from_nanos(due.saturating_sub(now)));
        let due = due.map(|due| due.max(Duration::from_millis(1)));
        due.or_else(|| (!self.starting.is_empty()).then_some(Duration::from_millis(5)))
    }

    /// Whether the error that ended the job leaves the job's own rung.
    pub(crate) fn wants_job(&self) -> bool {
        self.wants_job
    }

    /// A worker cannot go on from what it left: its region is stopped.
    fn fall(
        &mut self,
        job: &Job<'_>,
        hands: &mut Hands<'_, '_>,
        fallen: Fallen,
    ) -> Result<(), Error> {
        let region = job.plan.regions.of_task(fallen.worker);
        if self.open.iter().any(|open| open.region == region) {
            return Ok(());
        }
        let is_told = self.told.iter().any(|told| told.region == region);
        let now = now_ns();
        let past = &mut self.past[region];
        if fallen.fall == Fall::Damaged {
            if !is_told {
                // The checkpoint that the job itself went on from.
                return Err(fallen.error);
            }
            past.damaged.append(&mut past.files);
        }
        let has_held = now.saturating_sub(past.ended_ns) > SOUND_NS;
        past.in_a_row = if has_held { 1 } else { past.in_a_row + 1 };
        let cause = fallen.error.to_string();
        if past.in_a_row > TRIES || fallen.fall == Fall::Deaths(Rung::Job) {
            let mut why = format!("region {region} went back {} times", past.in_a_row - 1);
            match job_cannot(job.plan, job.settings) {
                None => self.wants_job = true,
                Some(reason) => why += &format!(", and the job cannot: {reason}"),
            }
            return Err(self.exhausted(&cause, why));
        }
        let is_printed = prints(job.plan, region) && hands.console.is_drained();
        let why = is_printed.then(|| "all that it prints is printed, up to its end".to_owned());
        if let Some(why) = region_cannot(job.plan, region).or(why) {
            return Err(self.exhausted(&cause, format!("region {region} cannot go back: {why}")));
        }
        let pause = pause(self.past[region].in_a_row);
        let damaged = &self.past[region].damaged;
        let choice = match &mut hands.checkpoints {
            Some(own) => Choice::Asked(own.choose(region, damaged, job.plan, job.scene)),
            None if job.settings.checkpoint_dir.is_some() => Choice::Waiting,
            None => Choice::Made(None, 0),
        };
        for &worker in job.plan.regions.tasks(region) {
            hands.crew.stop(worker);
        }
        let due_ns = now + u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        self.open.push(Rewind { region, cause, seen_ns: now, due_ns, choice });
        Ok(())
    }

    /// Whether nothing of the region moves any more, and it is known what it goes on from.
    fn is_ready(
        &mut self,
        job: &Job<'_>,
        hands: &mut Hands<'_, '_>,
        at: usize,
    ) -> Result<bool, Error> {
        let (region, due_ns) = (self.open[at].region, self.open[at].due_ns);
        if matches!(self.open[at].choice, Choice::Waiting) {
            let Some(own) = &mut hands.checkpoints else { return Ok(false) };
            let damaged = &self.past[region].damaged;
            let asked = own.choose(region, damaged, job.plan, job.scene);
            self.open[at].choice = Choice::Asked(asked);
        }
        let workers = job.plan.regions.tasks(region);
        if let Choice::Asked(asked) = &mut self.open[at].choice {
            let Some(answer) = asked.answer() else { return Ok(false) };
            let folders = hands.checkpoints.as_deref();
            let choice = self.fit(job, region, answer, folders);
            self.open[at].choice = choice.map_err(|why| self.refused(at, &why.to_string()))?;
        }
        let is_afresh = matches!(self.open[at].choice, Choice::Made(None, _));
        if is_afresh && let Some(why) = region_cannot_begin_again(job.plan, region) {
            return Err(self.refused(at, &why));
        }
        let is_still = hands.crew.is_still(workers);
        Ok(is_still && now_ns() >= due_ns && (!prints(job.plan, region) || hands.console.hold()))
    }

    /// What the region's workers must know of the checkpoint.
    fn fit(
        &mut self,
        job: &Job<'_>,
        region: usize,
        answer: Result<Option<Chosen>, Error>,
        folders: Option<&Checkpointer>,
    ) -> Result<Choice, Error> {
        let Some(chosen) = answer? else { return Ok(Choice::Made(None, 0)) };
        let from = folders.map_or(0, |folders| folders.word_of(chosen.folder));
        let chosen = chosen.of_workers(job.plan, job.plan.regions.tasks(region));
        let is_lazy = *self.is_lazy.get_or_insert_with(can_load_lazily);
        let restore = chosen.fit_again(job.plan, job.settings, is_lazy)?.restore;
        Ok(Choice::Made(Some(restore), from))
    }

    /// Nobody of the region lives: it begins anew, from the checkpoint.
    fn carry_out(
        &mut self,
        job: &Job<'_>,
        hands: &mut Hands<'_, '_>,
        rewind: Rewind,
    ) -> Result<(), Error> {
        let Rewind { region, cause, seen_ns, choice, .. } = rewind;
        let Choice::Made(restore, from) = choice else { return Ok(()) };
        let workers = job.plan.regions.tasks(region).to_vec();
        point(Point::RegionStopped);
        let checkpoint = restore.as_ref().map(|restore| restore.id);
        let good = restore.as_ref().map_or(0, Restore::last_epoch);
        let past = &mut self.past[region];
        let files = restore.iter().flat_map(|restore| &restore.files);
        past.files = files.map(|(_, file)| file.name.clone()).collect();
        past.ended_ns = now_ns();
        let epoch = |worker| restore.as_ref().and_then(|restore| restore.epoch_of(worker));
        let epochs: Vec<_> = workers.iter().map(|own| (*own, epoch(*own).unwrap_or(0))).collect();
        hands.crew.forget(&epochs).map_err(|why| {
            let why = format!("region {region} cannot go back: {why}");
            self.exhausted(&cause, why)
        })?;
        if let Some(own) = &mut hands.checkpoints {
            own.rewound(job.plan, job.scene, region, restore.as_ref());
        }
        self.told.retain(|told| told.region != region);
        let is_emptying = true;
        let own = Rewound { region, workers: workers.clone(), restore, from, is_emptying };
        self.told.push(own);
        // Said before it is done: a supervisor that follows this one does it again.
        job.scene.tell(job.plan, &self.told)?;
        point(Point::RegionTold);
        job.scene.empty(job.plan, &workers)?;
        point(Point::RegionEmptied);
        job.scene.control_header.regions[region].good.store(good, Ordering::Release);
        // Their heads are words of the supervisor's: a successor of it finds them at the beginning.
        let renewed = renewed_ends(job.plan, job.scene, &workers);
        self.told.iter_mut().for_each(|told| told.is_emptying &= told.region != region);
        job.scene.tell(job.plan, &self.told)?;
        if prints(job.plan, region) {
            hands.console.let_go(renewed);
        }
        workers.iter().for_each(|worker| hands.crew.start_again(*worker));
        // Bells have other values now: whoever sleeps on one looks again.
        job.scene.wake_workers();
        let done = WentBack { region, workers, checkpoint, cause, took_ms: None };
        crate::say!("testudo: {}", done.cause);
        crate::say!("testudo: {done}");
        self.starting.push((self.done.len(), seen_ns));
        self.done.push(done);
        Ok(())
    }

    /// Writes down how long it took, once all workers of a region have attached.
    fn note_started(&mut self, job: &Job<'_>, hands: &Hands<'_, '_>) {
        let (done, crew) = (&mut self.done, &hands.crew);
        self.starting.retain(|(at, seen_ns)| {
            let back = &mut done[*at];
            let headers = back.workers.iter().map(|worker| (*worker, job.scene.workers[*worker]));
            let attached = headers.map(|(worker, header)| {
                let state = WorkerState::of(header.state.load(Ordering::Acquire));
                let is_running = matches!(state, WorkerState::Running | WorkerState::Finished);
                let attached = header.attached_ns.load(Ordering::Acquire);
                (is_running && crew.is_alive(worker)).then_some(attached)
            });
            let last: Option<Vec<u64>> = attached.collect();
            let last = last.and_then(|all| all.into_iter().max());
            back.took_ms = last.map(|last| last.saturating_sub(*seen_ns) / 1_000_000);
            back.took_ms.is_none()
        });
    }

    /// An open rewind cannot be carried out.
    fn refused(&self, at: usize, why: &str) -> Error {
        let Rewind { region, cause, .. } = &self.open[at];
        self.exhausted(cause, format!("region {region} cannot go back: {why}"))
    }

    /// The end of the ladder: what was wrong, and all that was done about it.
    fn exhausted(&self, cause: &str, why: String) -> Error {
        let taken = self.done.iter().map(|done| format!("{done} ({})", done.cause));
        Error::Exhausted { cause: cause.into(), taken: taken.chain([why]).collect() }
    }
}

impl std::fmt::Display for WentBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { region, workers, checkpoint, .. } = self;
        let numbers: Vec<String> = workers.iter().map(usize::to_string).collect();
        let many = if workers.len() == 1 { "worker" } else { "workers" };
        write!(f, "region {region} ({many} {}) went back to ", numbers.join(", "))?;
        match checkpoint {
            Some(id) => write!(f, "checkpoint {id}"),
            None => write!(f, "its beginning"),
        }
    }
}

/// The pause before a region's rewind, of so many in a row.
pub(crate) fn pause(in_a_row: u32) -> Duration {
    match in_a_row {
        0 | 1 => Duration::ZERO,
        many => (PAUSE * (1 << (many - 2).min(16))).min(PAUSE_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_rewinds_double_up_to_five_seconds() {
        let pauses = [1, 2, 3, 4, 7, 8, 9, 60].map(|in_a_row| pause(in_a_row).as_millis());
        assert_eq!(pauses, [0, 100, 200, 400, 3200, 5000, 5000, 5000]);
    }
}
