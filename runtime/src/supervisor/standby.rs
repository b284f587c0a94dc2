//! The standbys of a job's workers of tier 2: started when their workers run, watched, put in the
//! place of the worker that one of them took over from, and started anew then.
//!
//! A take-over needs nobody here. What the supervisor does afterwards is bookkeeping: it reads the
//! death from the copy that the standby kept, counts it as any other, and knows the standby as the
//! worker from then on.
//!
//! Invariants:
//! - while a standby is awake for a death, no other successor is started; one that does not get on
//!   within [`GRACE`] is ended first (R2);
//! - a standby that dies or cannot be started ends no job: its workers are of tier 3 then;
//! - whoever is about to end a worker's process and does not want it replaced at once calls
//!   [`Crew::dismiss_standbys`] before.
//!
//! Called by `recover`.

use super::program::Program;
use super::recover::Crew;
use super::remains::Remains;
use super::spawn::{Child, kill, reap};
use super::watch::Watch;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::Plan;
use crate::testing::standby_grace;
use crate::time::now_ns;
use crate::worker::entry::Role;
use crate::worker::standby::kept_bytes;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::header::WorkerState;
use testudo_shm::primitive::Ordering;
use testudo_shm::standby::{Seat, Standby, State};

/// How long a standby may take from the death of its worker to the claim: many times what it does
/// take where it gets the processor at once, and as long as starting a process where it does not.
const GRACE: Duration = Duration::from_millis(20);

/// Time after a take-over, or the end of a standby, until the next one is started: the worker's
/// first steps come first.
const REST: Duration = Duration::from_millis(2);

/// The same after one that was never ready.
const PAUSE: Duration = Duration::from_millis(500);

/// Standbys in a row that were never ready, after which a seat stays empty.
const TRIES: u32 = 3;

/// One standby's place, empty or not.
#[derive(Debug)]
struct Place {
    workers: Vec<usize>,
    child: Option<Child>,
    page: Option<Rc<Standby>>,
    /// What it runs: the same as its workers.
    program: Option<Rc<Program>>,
    /// When the next one may be started, monotonic nanoseconds.
    due_ns: u64,
    failures: u32,
}

impl Place {
    fn state(&self) -> State {
        match (&self.child, &self.page) {
            (Some(_), Some(page)) => page.state(),
            _ => State::Starting,
        }
    }

    /// Nobody sits here any more.
    fn empty(&mut self, pause: Duration) -> Option<Child> {
        self.page = None;
        self.due_ns = now_ns() + pause.as_nanos() as u64;
        self.child.take()
    }

    /// A standby has ended, or could not even be started.
    fn failed(&mut self, index: usize, was_ready: bool, why: &str) -> Option<Child> {
        self.failures = if was_ready { 0 } else { self.failures + 1 };
        if self.failures == TRIES {
            crate::say!(
                "testudo: standby {index} cannot be had ({why}); \
                 workers {:?} go on with tier 3: a new process after a death",
                self.workers
            );
        }
        self.empty(if was_ready { REST } else { PAUSE })
    }

    fn is_wanted(&self) -> bool {
        self.child.is_none() && self.failures < TRIES
    }
}

/// All standbys of a job.
#[derive(Debug)]
pub(super) struct Standbys {
    places: Vec<Place>,
    /// Processes that were ended or came too late, until the kernel is done with them.
    leaving: Vec<Child>,
}

impl Standbys {
    /// The places that a plan has; nobody sits there yet.
    pub(super) fn new(plan: &Plan, settings: &Settings) -> Self {
        let place = |workers| Place {
            workers,
            child: None,
            page: None,
            program: None,
            due_ns: 0,
            failures: 0,
        };
        Self {
            places: plan.standbys(settings).into_iter().map(place).collect(),
            leaving: Vec::new(),
        }
    }

    /// The one that may take a worker's place.
    pub(super) fn of(&self, worker: usize) -> Option<&Standby> {
        let place = self.places.iter().find(|place| place.workers.contains(&worker));
        place.and_then(|place| place.page.as_deref())
    }

    /// How long a worker's death is a standby's business before a new process is started.
    pub(super) fn grace(&self, worker: usize) -> Duration {
        let place = self.places.iter().find(|place| place.workers.contains(&worker));
        match place.map_or(State::Starting, Place::state) {
            State::Taking(other) | State::Took(other) if other != worker => Duration::ZERO,
            State::Starting => Duration::ZERO,
            State::Ready | State::Taking(_) | State::Took(_) => standby_grace(GRACE),
        }
    }

    /// A new process is about to be started for this worker: a standby that has had its time is
    /// ended first.
    pub(super) fn withdraw(&mut self, worker: usize) {
        for place in self.places.iter_mut().filter(|place| place.workers.contains(&worker)) {
            let is_late = match place.state() {
                State::Ready => true,
                State::Taking(other) => other == worker,
                State::Starting | State::Took(_) => false,
            };
            if is_late && let Some(child) = place.empty(REST) {
                kill(child.pid);
                self.leaving.push(child);
            }
        }
    }

    /// Ends one that runs another program than its workers do, or will.
    fn dismiss(&mut self, index: usize) {
        if let Some(child) = self.places[index].empty(REST) {
            self.end_one(child);
        }
    }

    /// Ends a process that is neither a worker nor a standby any more.
    fn end_one(&mut self, child: Child) {
        kill(child.pid);
        self.leaving.push(child);
    }

    /// Ends all of them; none of their processes is left after this.
    pub(super) fn end(&mut self) {
        for place in &mut self.places {
            if let Some(child) = place.empty(REST) {
                kill(child.pid);
                self.leaving.push(child);
            }
        }
        for child in self.leaving.drain(..) {
            reap(child.pid, true);
        }
    }

    /// How long the loop may sleep before a seat is looked at again.
    pub(super) fn patience(&self) -> Option<Duration> {
        let is_open = self.places.iter().any(Place::is_wanted) || !self.leaving.is_empty();
        is_open.then_some(Duration::from_millis(5))
    }

    /// How many are ready, and how many there should be.
    pub(super) fn count(&self) -> (usize, usize) {
        let ready = self.places.iter().filter(|place| place.state() == State::Ready).count();
        (ready, self.places.len())
    }
}

impl Crew<'_> {
    /// Takes notice of take-overs, and starts the standbys that are missing.
    pub(super) fn look_at_standbys(&mut self, watch: &Watch) -> Result<(), Error> {
        self.standbys.leaving.retain(|child| reap(child.pid, false).is_none());
        for index in 0..self.standbys.places.len() {
            let place = &mut self.standbys.places[index];
            let state = place.state();
            if let State::Took(worker) = state
                && place.workers.contains(&worker)
                && let Some(page) = place.page.take()
                && let Some(child) = place.empty(REST)
            {
                place.failures = 0;
                let workers = place.workers.clone();
                self.adopt_standby(worker, child, page)?;
                // It stands by for the others no more.
                self.hurry(&workers);
            } else if let Some(child) = &place.child {
                if let Some(exit) = reap(child.pid, false) {
                    place.failed(index, state != State::Starting, &exit.to_string());
                    let workers = place.workers.clone();
                    self.hurry(&workers);
                } else if !self.is_of_one_program(index) {
                    self.standbys.dismiss(index);
                }
            } else if place.is_wanted() && place.due_ns <= now_ns() && self.may_stand_by(index) {
                self.start_standby(watch, index);
            }
        }
        Ok(())
    }

    /// Whether the workers of a place all run what its standby would run, and are to go on so.
    fn is_of_one_program(&self, index: usize) -> bool {
        let place = &self.standbys.places[index];
        self.probation.is_none()
            && place.workers.iter().all(|&worker| {
                let member = &self.members[worker];
                let is = |program| Rc::ptr_eq(program, &member.program);
                let next = member.succession.as_ref().map(|next| next.program());
                place.program.as_ref().is_some_and(is)
                    && next.is_none_or(|next| Rc::ptr_eq(next, &member.program))
            })
    }

    /// Whoever waits for a standby to take over waits no more.
    fn hurry(&mut self, workers: &[usize]) {
        let now = now_ns();
        for &worker in workers {
            let member = &mut self.members[worker];
            member.due_ns = member.due_ns.map(|due| due.min(now));
        }
    }

    /// The workers of a place run, and what there is to map of them is there: pages that are still
    /// to be brought from a checkpoint must not be made by whoever looks at them.
    fn may_stand_by(&self, index: usize) -> bool {
        let workers = &self.standbys.places[index].workers;
        let program = &self.members[workers[0]].program;
        let is_settled = self.probation.is_none();
        is_settled
            && workers.iter().all(|&worker| {
                let (header, member) = (self.scene.workers[worker], &self.members[worker]);
                let state = WorkerState::of(header.state.load(Ordering::Acquire));
                self.is_alive(worker)
                    && member.succession.is_none()
                    && Rc::ptr_eq(&member.program, program)
                    && matches!(state, WorkerState::Running | WorkerState::Finished)
                    && header.restoring.load(Ordering::Acquire) == 0
            })
    }

    fn start_standby(&mut self, watch: &Watch, index: usize) {
        let started = self.spawn_standby(watch, index);
        let program = self.program(self.standbys.places[index].workers[0]);
        let place = &mut self.standbys.places[index];
        match started {
            Ok((child, page)) => {
                (place.child, place.page) = (Some(child), Some(Rc::new(page)));
                place.program = Some(program);
            }
            Err(error) => _ = place.failed(index, false, &error.to_string()),
        }
    }

    fn spawn_standby(&self, watch: &Watch, index: usize) -> Result<(Child, Standby), Error> {
        let name = format!("{}-s{index}", self.scene.description.settings.name);
        let (page, segment) = Standby::create(super::launch::short(&name), kept_bytes(self.plan))?;
        let workers = &self.standbys.places[index].workers;
        let role = Role {
            worker: workers[0],
            control_fd: self.scene.control_peer.as_raw_fd(),
            control_bytes: self.scene.control.len(),
            entry: self.entry,
            life: 0,
            in_haste: self.haste.is_some(),
            small_pages: false,
            standby: Some(Seat { index, fd: segment.raw_fd() }),
            tie: None,
            succession: None,
        };
        let mut fds = self.scene.inherited_by_standby(self.plan, workers);
        fds.push(segment.raw_fd());
        let child = self.spawner.spawn(&self.members[workers[0]].program, role, &fds)?;
        watch.watch_process(child.pidfd.as_raw_fd())?;
        Ok((child, page))
    }

    /// A standby is a worker now. Its predecessor's death is noted from what it kept of it, unless
    /// the supervisor saw it first.
    fn adopt_standby(
        &mut self,
        worker: usize,
        standby: Child,
        page: Rc<Standby>,
    ) -> Result<(), Error> {
        let kept = Remains::kept_by(&page);
        let dead = kept.as_ref().and_then(Remains::header);
        let dead = dead.map(|header| header.pid.load(Ordering::Relaxed));
        let is_unnoticed =
            self.members[worker].child.as_ref().is_some_and(|child| Some(child.pid as u32) == dead);
        let woken_ns = page.woken_ns();
        let mut noted = Ok(());
        if is_unnoticed {
            noted = self.note_death(worker, None, kept);
        }
        let member = &mut self.members[worker];
        // A new process that was started as well has lost the claim, or is about to.
        let late = member.child.replace(standby);
        member.lives += 1;
        member.due_ns = None;
        if let Some(restart) = member.recovering {
            let restart = &mut self.restarts[restart];
            restart.tier = self.plan.tiers[worker];
            restart.seen_ns = restart.seen_ns.min(woken_ns);
        }
        if let Some(late) = late {
            self.standbys.end_one(late);
        }
        noted
    }

    /// Ends all standbys, so that a worker whose process is ended on purpose is not replaced at
    /// once. They are started again when all their workers run.
    pub(crate) fn dismiss_standbys(&mut self) {
        self.standbys.end();
    }

    /// How many standbys are ready, and how many there should be.
    pub(crate) fn standbys(&self) -> (usize, usize) {
        self.standbys.count()
    }
}
