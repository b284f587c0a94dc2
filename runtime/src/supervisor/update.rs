//! HotUpdate: another program takes over a running job, worker by worker, between two steps of
//! each; state is kept, sources and sinks go on (R22).
//!
//! ```text
//! check    the file is a program of Testudo's; it is held by a descriptor from here on
//! ask      both programs describe their plans for this job, in processes of their own
//! compare  what must be equal is, or the update is refused: nothing was stopped so far
//! save     where values are migrated, a checkpoint is taken, and none after it until all is over
//! replace  one worker after the other: a successor is prepared, the worker gives way; each new
//!          process then has to prove itself before the next worker is replaced
//! prove    all of them, for a while
//! ```
//!
//! A program on probation that crashes by its own doing, that gives up, or that is stuck in a step
//! is rolled back: every worker that runs it gives way to the old program, or is killed and
//! recovered with it. No step is lost or doubled in any of this: a worker leaves its program
//! between two steps, or like any worker that dies, and the undo log and the cells are laid out
//! alike in both.
//!
//! Values that are migrated are the old program's until the worker commits its first step: so long
//! it is rolled back like that. Afterwards nobody knows how the new values were the old ones: the
//! worker's region goes back to the checkpoint (`rewind`), with the old program.
//!
//! Invariants:
//! - nothing is stopped before everything was compared;
//! - a worker that dies during the update is recovered with the program that it ran, and with the
//!   old one from the moment on in which the update is known to fail;
//! - the old program is held until the update is over, the new one from then on: files on disk may
//!   come and go.
//!
//! Called by `steer`. `inquiry` asks programs, `program` holds them, `handover` replaces.

use super::autopsy;
use super::checkpoint::Checkpointer;
use super::hang::HangWatch;
use super::inquiry::{Inquiry, check};
use super::program::Program;
use super::recover::Crew;
use super::renew::Turn;
use super::rewind::may::{region_cannot, region_cannot_begin_again};
use super::watch::Watch;
use crate::checkpoint::history::State;
use crate::control::protocol::{Change, Replaced, Reply, UpdateStatus};
use crate::control::socket::ReplyTo;
use crate::plan::described::migrates;
use crate::time::now_ns;
use crossbeam::channel::{Receiver, TryRecvError};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::header::WorkerState;
use testudo_shm::primitive::Ordering;

/// Steps that a new process takes before it has proven itself.
const PROOF_COMMITS: u64 = 16;

/// Where there is nothing to do, living so long is proof.
const PROOF_NS: u64 = 300_000_000;

/// Its loop must have gone round in this time: a worker that sleeps looks up more often.
const AWAKE_NS: u64 = 250_000_000;

/// All workers together, when the last one is replaced.
const LAST_PROOF_NS: u64 = 500_000_000;

/// A process on probation that ends no turn of its loop for so long is stuck.
const STUCK_NS: u64 = 3_000_000_000;

/// The same for one that attaches: it may have files to open.
const ATTACHING_NS: u64 = 30_000_000_000;

/// The same for one that has values to migrate besides.
const MIGRATING_NS: u64 = 600_000_000_000;

/// Longest time for the checkpoint before a migration.
const SAVING_NS: u64 = 60_000_000_000;

/// How often the successor of one worker is tried.
const TRIES: u32 = 3;

/// Whether a new process gets on.
#[derive(Debug)]
struct Proof {
    worker: usize,
    pid: u32,
    begun_ns: u64,
    commits: u64,
    turns: u64,
    /// When its turns were last seen to have grown.
    moved_ns: u64,
    /// Says when it is stuck: time in which the machine stood still does not count.
    watch: HangWatch,
}

#[derive(Debug)]
enum Stage {
    /// A thread reads the file.
    Checking(Receiver<Result<Program, String>>),
    Asking {
        old: Box<Inquiry>,
        new: Box<Inquiry>,
    },
    Replacing {
        waiting: VecDeque<usize>,
        turn: Option<(Turn, u64)>,
        tries: u32,
    },
    /// Values are migrated: there is to be something to go back to.
    Saving {
        id: Option<u64>,
        tries: u32,
        since_ns: u64,
    },
    /// All are replaced.
    Proving {
        since_ns: u64,
    },
    /// Back to the old program.
    Reverting {
        why: String,
        turn: Option<Turn>,
    },
}

/// An update that is under way.
#[derive(Debug)]
pub(super) struct Update {
    answer: ReplyTo,
    path: PathBuf,
    old: Rc<Program>,
    new: Option<Rc<Program>>,
    stage: Stage,
    changes: Vec<Change>,
    /// Some of them are migrations of values.
    migrates: bool,
    done: Vec<Replaced>,
    proofs: Vec<Proof>,
}

/// What the job could go back to.
#[derive(Debug)]
pub(crate) struct Past<'a> {
    pub(crate) checkpoints: Option<&'a mut Checkpointer>,
    /// Checkpoints are taken, if perhaps not yet.
    pub(crate) has_folder: bool,
}

/// What a turn leaves: the update, or how it ended.
pub(super) type Turned = Result<Update, UpdateStatus>;

impl Update {
    /// Begins with the file.
    pub(super) fn begin(answer: ReplyTo, path: PathBuf, crew: &Crew<'_>) -> Self {
        let (send, checked) = crossbeam::channel::bounded(1);
        let file = path.clone();
        // It may be large, and on a slow disk.
        std::thread::spawn(move || send.send(check(&file)));
        Self {
            answer,
            path,
            old: crew.program(0),
            new: None,
            stage: Stage::Checking(checked),
            changes: Vec::new(),
            migrates: false,
            done: Vec::new(),
            proofs: Vec::new(),
        }
    }

    /// Takes a turn.
    pub(super) fn look(mut self, crew: &mut Crew<'_>, watch: &Watch, past: Past<'_>) -> Turned {
        let stage = std::mem::replace(&mut self.stage, Stage::Proving { since_ns: 0 });
        let next = match stage {
            Stage::Checking(checked) => match checked.try_recv() {
                Err(TryRecvError::Empty) => Ok(Stage::Checking(checked)),
                Err(TryRecvError::Disconnected) => Err("it cannot be read".into()),
                Ok(program) => program.and_then(|program| self.ask(crew, program)),
            },
            Stage::Asking { old, new } => self.compare(old, new, crew, &past),
            Stage::Saving { id, tries, since_ns } => self.save(id, (tries, since_ns), crew, past),
            Stage::Replacing { waiting, turn, tries } => {
                Ok(self.replace(waiting, turn, tries, crew, watch))
            }
            Stage::Proving { since_ns } => match self.trouble(crew) {
                Some(why) => Ok(revert(crew, why)),
                None if now_ns() - since_ns > LAST_PROOF_NS && self.is_awake() => {
                    return self.end(None, crew);
                }
                None => Ok(Stage::Proving { since_ns }),
            },
            Stage::Reverting { why, turn } => match self.go_back(turn, crew, watch) {
                Some(turn) => Ok(Stage::Reverting { why, turn }),
                None => return self.end(Some(why), crew),
            },
        };
        match next {
            Err(why) => self.refuse(why),
            Ok(stage) => {
                self.stage = stage;
                Ok(self)
            }
        }
    }

    /// Asks both programs what they would do.
    fn ask(&mut self, crew: &Crew<'_>, program: Program) -> Result<Stage, String> {
        let text = |error: crate::error::Error| error.to_string();
        let ask = |program, who| Inquiry::begin(crew, program, who).map(Box::new).map_err(text);
        let program = Rc::new(program);
        let (old, new) =
            (ask(&self.old, "the program that runs")?, ask(&program, "the new program")?);
        self.new = Some(program);
        Ok(Stage::Asking { old, new })
    }

    /// Compares the answers, once both are there.
    fn compare(
        &mut self,
        mut old: Box<Inquiry>,
        mut new: Box<Inquiry>,
        crew: &mut Crew<'_>,
        past: &Past<'_>,
    ) -> Result<Stage, String> {
        let (Some(was), Some(is)) = (old.look().transpose()?, new.look().transpose()?) else {
            return Ok(Stage::Asking { old, new });
        };
        self.changes = was.allows(&is)?;
        self.migrates = migrates(&self.changes);
        if self.migrates {
            may_go_back(crew, past.has_folder)?;
            return Ok(Stage::Saving { id: None, tries: 0, since_ns: now_ns() });
        }
        Ok(self.begin_replacing(crew))
    }

    fn begin_replacing(&self, crew: &mut Crew<'_>) -> Stage {
        crew.begin_probation(&self.old, self.new.as_ref(), self.migrates);
        let waiting = (0..crew.plan.workers).collect();
        Stage::Replacing { waiting, turn: None, tries: 0 }
    }

    /// Takes a checkpoint, and holds all others until the update is over: what they hold would be
    /// the new program's.
    fn save(
        &mut self,
        id: Option<u64>,
        (tries, since_ns): (u32, u64),
        crew: &mut Crew<'_>,
        past: Past<'_>,
    ) -> Result<Stage, String> {
        if !past.has_folder {
            return Ok(self.begin_replacing(crew));
        }
        let failed = |why: &str| {
            format!("it migrates values, and no checkpoint to go back to could be taken: {why}")
        };
        let is_late = now_ns() - since_ns > SAVING_NS;
        let Some(own) = past.checkpoints else {
            let waiting = Stage::Saving { id, tries, since_ns };
            return if is_late { Err(failed("the folder is not open")) } else { Ok(waiting) };
        };
        own.hold(true);
        let Some(id) = id else {
            return match own.take_held(crew.plan, crew.scene) {
                Ok(id) => Ok(Stage::Saving { id: Some(id), tries, since_ns }),
                Err(why) if is_late => Err(failed(&why)),
                Err(_) => Ok(Stage::Saving { id: None, tries, since_ns }),
            };
        };
        match own.history().records().rev().find(|record| record.id == id).map(|own| &own.state) {
            Some(State::Open) => Ok(Stage::Saving { id: Some(id), tries, since_ns }),
            Some(State::Complete) => Ok(self.begin_replacing(crew)),
            Some(State::Failed(why)) if tries + 1 >= TRIES || is_late => Err(failed(why)),
            _ => Ok(Stage::Saving { id: None, tries: tries + 1, since_ns }),
        }
    }

    /// Replaces the next worker once the one before has proven itself.
    fn replace(
        &mut self,
        mut waiting: VecDeque<usize>,
        turn: Option<(Turn, u64)>,
        tries: u32,
        crew: &mut Crew<'_>,
        watch: &Watch,
    ) -> Stage {
        if let Some(why) = self.trouble(crew) {
            return revert(crew, why);
        }
        let Some((mut turn, begun_ns)) = turn else {
            if !self.proofs.last().is_none_or(|proof| proof.is_given(crew)) {
                return Stage::Replacing { waiting, turn: None, tries };
            }
            let (Some(&worker), Some(new)) = (waiting.front(), &self.new) else {
                return Stage::Proving { since_ns: now_ns() };
            };
            if crew.runs(worker, new) && crew.is_alive(worker) {
                // The successor died after its claim, and was recovered with its own program.
                waiting.pop_front();
                self.proofs.push(Proof::begin(crew, worker));
                return Stage::Replacing { waiting, turn: None, tries: 0 };
            }
            // One that is being recovered at the moment is replaced when it runs.
            let turn = crew
                .prepare_successor(watch, worker, new)
                .ok()
                .map(|()| (Turn::new(worker), now_ns()));
            return Stage::Replacing { waiting, turn, tries };
        };
        match turn.look(crew) {
            None if turn.is_attaching() && now_ns() - begun_ns > self.attaching_ns() => {
                let (worker, seconds) = (turn.worker(), self.attaching_ns() / 1_000_000_000);
                crew.kill_worker(worker);
                revert(crew, format!("worker {worker}: it did not attach within {seconds} s"))
            }
            None => Stage::Replacing { waiting, turn: Some((turn, begun_ns)), tries },
            Some(Ok(replaced)) => {
                waiting.pop_front();
                self.proofs.push(Proof::begin(crew, replaced.worker));
                self.done.push(replaced);
                Stage::Replacing { waiting, turn: None, tries: 0 }
            }
            Some(Err(why)) if tries + 1 >= TRIES => revert(crew, why),
            Some(Err(_)) => Stage::Replacing { waiting, turn: None, tries: tries + 1 },
        }
    }

    /// What speaks against the new program, if anything does.
    fn trouble(&mut self, crew: &mut Crew<'_>) -> Option<String> {
        if let Some(why) = crew.probation_failed() {
            return Some(why);
        }
        let now = now_ns();
        for proof in &mut self.proofs {
            if proof.is_stuck(crew, now) {
                let worker = proof.worker;
                // It would not give way.
                crew.kill_worker(worker);
                let seconds = STUCK_NS / 1_000_000_000;
                return Some(format!("worker {worker} was stuck in a step for {seconds} s"));
            }
        }
        None
    }

    fn attaching_ns(&self) -> u64 {
        if self.migrates { MIGRATING_NS } else { ATTACHING_NS }
    }

    fn is_awake(&self) -> bool {
        self.proofs.iter().all(Proof::is_awake)
    }

    /// Gives each worker of the new program back to the old one; `None` when all are back.
    fn go_back(
        &mut self,
        turn: Option<Turn>,
        crew: &mut Crew<'_>,
        watch: &Watch,
    ) -> Option<Option<Turn>> {
        if self.migrates {
            return (!self.is_taken_back(crew)).then_some(None);
        }
        if let Some(mut turn) = turn {
            match turn.look(crew) {
                None => return Some(Some(turn)),
                Some(Ok(_)) => {}
                // It does not give way: what it has committed is kept in any case.
                Some(Err(_)) => drop(crew.kill_worker(turn.worker())),
            }
        }
        let mut all_run = true;
        for worker in 0..crew.plan.workers {
            let state = WorkerState::of(crew.scene.workers[worker].state.load(Ordering::Acquire));
            let runs = matches!(state, WorkerState::Running | WorkerState::Finished);
            let runs = runs && crew.is_alive(worker);
            all_run &= runs;
            let is_new = self.new.as_ref().is_some_and(|new| crew.runs(worker, new));
            if runs && is_new {
                let old = Rc::clone(&self.old);
                return Some(match crew.prepare_successor(watch, worker, &old) {
                    Ok(()) => Some(Turn::new(worker)),
                    Err(_) => {
                        crew.kill_worker(worker);
                        None
                    }
                });
            }
            all_run &= !is_new;
        }
        (!all_run).then_some(None)
    }

    /// Ends whoever runs the new program, until all run the old one again. Only of a process that
    /// has ended it is known whether its values are still the old program's.
    fn is_taken_back(&self, crew: &mut Crew<'_>) -> bool {
        let mut all_run = true;
        for worker in 0..crew.plan.workers {
            crew.abandon(worker, "the update is rolled back");
            let state = WorkerState::of(crew.scene.workers[worker].state.load(Ordering::Acquire));
            let runs = matches!(state, WorkerState::Running | WorkerState::Finished);
            let is_new = self.new.as_ref().is_some_and(|new| crew.runs(worker, new));
            if is_new {
                crew.kill_worker(worker);
            }
            all_run &= runs && !is_new && crew.is_alive(worker);
        }
        all_run
    }

    fn refuse(self, why: String) -> Turned {
        let path = self.path.display();
        let status = UpdateStatus {
            program: self.path.clone(),
            state: "refused".into(),
            why: Some(why.clone()),
            ..UpdateStatus::default()
        };
        self.answer.send(Reply::error(format!("{path}: {why}; the job goes on as it was")));
        Err(status)
    }

    /// All workers run the new program, or the old one again, and why.
    fn end(self, rolled_back: Option<String>, crew: &mut Crew<'_>) -> Turned {
        crew.end_probation();
        let state = if rolled_back.is_some() { "rolled back" } else { "done" };
        let status =
            UpdateStatus { state: state.into(), why: rolled_back.clone(), ..self.status() };
        let Self { answer, path, changes, done, .. } = self;
        answer.send(Reply::Updated { program: path, changes, workers: done, rolled_back });
        Err(status)
    }

    /// How it is going.
    pub(super) fn status(&self) -> UpdateStatus {
        let (state, why) = match &self.stage {
            Stage::Checking(_) | Stage::Asking { .. } => ("checking", None),
            Stage::Saving { .. } => ("saving", None),
            Stage::Replacing { .. } => ("replacing", None),
            Stage::Proving { .. } => ("on probation", None),
            Stage::Reverting { why, .. } => ("rolling back", Some(why.clone())),
        };
        UpdateStatus {
            program: self.path.clone(),
            state: state.into(),
            replaced: self.done.len(),
            changes: self.changes.clone(),
            why,
        }
    }
}

/// Whether all regions could go back, if a program that migrates values fails.
fn may_go_back(crew: &Crew<'_>, has_folder: bool) -> Result<(), String> {
    let plan = crew.plan;
    for region in 0..plan.regions.count() {
        let cannot_begin = || region_cannot_begin_again(plan, region).filter(|_| !has_folder);
        if let Some(why) = region_cannot(plan, region).or_else(cannot_begin) {
            return Err(format!(
                "it migrates values, and if it failed region {region} could not go back to the old \
                 ones: {why}; take a savepoint, stop the job, and start the new program with \
                 --resume-from, which migrates them as well"
            ));
        }
    }
    Ok(())
}

fn revert(crew: &mut Crew<'_>, why: String) -> Stage {
    crew.fail_probation(&why);
    Stage::Reverting { why, turn: None }
}

impl Proof {
    fn begin(crew: &Crew<'_>, worker: usize) -> Self {
        let header = crew.scene.workers[worker];
        let now = now_ns();
        Self {
            worker,
            pid: header.pid.load(Ordering::Acquire),
            begun_ns: now,
            commits: header.commits.load(Ordering::Acquire),
            turns: header.turns.load(Ordering::Acquire),
            moved_ns: now,
            watch: HangWatch::new(Duration::from_nanos(STUCK_NS), 1),
        }
    }

    /// It has taken some steps, or lived for a while without any to take.
    fn is_given(&self, crew: &Crew<'_>) -> bool {
        let commits = crew.scene.workers[self.worker].commits.load(Ordering::Acquire);
        let has_lived = now_ns() - self.begun_ns > PROOF_NS && self.is_awake();
        commits >= self.commits + PROOF_COMMITS || has_lived
    }

    fn is_awake(&self) -> bool {
        now_ns() - self.moved_ns < AWAKE_NS
    }

    fn is_stuck(&mut self, crew: &Crew<'_>, now: u64) -> bool {
        let header = crew.scene.workers[self.worker];
        let turns = header.turns.load(Ordering::Acquire);
        let pid = header.pid.load(Ordering::Acquire);
        if turns != self.turns || pid != self.pid {
            // A successor after a death is watched from its begin.
            (self.turns, self.pid, self.moved_ns) = (turns, pid, now);
        }
        self.watch.begin(now);
        let pid = pid.cast_signed();
        self.watch.look(0, pid, turns, || true, || autopsy::activity(pid)).is_some()
    }
}
