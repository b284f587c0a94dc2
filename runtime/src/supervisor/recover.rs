//! The crew: the worker processes of a job, and what is done when one dies.
//!
//! A death is seen in the worker's death word (R1) or, for one before its claim, by the end of the
//! process. The whole dead process is killed before its successor runs (R2): helper threads may
//! outlive the data thread. The successor is a fresh process that attaches to the same segments.
//!
//! Only deaths with no commit in between count against the budget; they are also spaced out.
//!
//! Called by `launch`.

mod adopt;

pub(crate) mod stop;

use self::stop::{Fallen, UNSOUND, has_failed};
use super::annals::{Annals, Entry};
use super::autopsy::{self, Finding, Subject};
use super::care::Care;
use super::dead_letters::{self, DeadLetters};
use super::handover::{Succeeded, Succession};
use super::hang::HangWatch;
use super::ladder::{Cause, Death, Decision, Ladder, PAUSE_MAX_NS, Rung};
use super::launch::Scene;
use super::memory_events::MemoryEvents;
use super::probation::Probation;
use super::program::Program;
use super::remains::Remains;
use super::replicas::Replicas;
use super::report::Restart;
use super::rewind::may::rungs;
use super::spawn::{Child, Exit, Spawner, kill, reap};
use super::standby::Standbys;
use super::watch::Watch;
use crate::config::Settings;
use crate::control::history::PostMortem;
use crate::error::Error;
use crate::haste::Haste;
use crate::plan::Plan;
use crate::time::now_ns;
use crate::worker::attach::last_words;
use crate::worker::entry::{EXIT_FAILED, Role};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::{Duration, Instant};
use testudo_shm::death;
use testudo_shm::header::{WorkerHeader, WorkerState};
use testudo_shm::primitive::Ordering;

/// Time that a hung worker has to say where it is.
const TELLING_NS: u64 = 50_000_000;

/// How often a worker that is held down is looked at again.
const HELD: Duration = Duration::from_millis(2);

/// Time that workers have to leave when all is done: one may be stopped, or stuck in code that runs
/// at its exit.
const LEAVING: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Member {
    pub(super) child: Option<Child>,
    pub(super) lives: u64,
    /// Commits in its header when it last died.
    commits: u64,
    ladder: Ladder,
    /// When the next life may begin, in monotonic nanoseconds.
    pub(super) due_ns: Option<u64>,
    /// What it runs.
    pub(super) program: Rc<Program>,
    /// Who is prepared to take its place, and the process that was told to give way.
    pub(super) succession: Option<Succession>,
    pub(super) told: Option<i32>,
    /// The restart whose recovery time is not known yet.
    pub(super) recovering: Option<usize>,
    /// The hang watch ends it: after so many seconds, and when it is killed if it does not end by
    /// itself.
    pub(super) hung: Option<(f64, u64)>,
}

/// Last words of a worker that found a checkpoint damaged begin with this.
pub(crate) const DAMAGED: &str = "damaged: ";

/// What a worker gave up with, as an error of the operator that it names.
fn failure(worker: usize, words: &str) -> Error {
    if let Some(damage) = words.strip_prefix(DAMAGED) {
        return Error::Damaged(damage.into());
    }
    if let Some(what) = words.strip_prefix(UNSOUND) {
        let what = what.lines().next().unwrap_or_default();
        return Error::Unsound(format!("worker {worker}: {what}"));
    }
    match words.strip_prefix("operator ").and_then(|words| words.split_once(": ")) {
        Some((name, message)) => Error::job(&format!("{name} (worker {worker})"), message),
        None => Error::job(&format!("(worker {worker})"), words),
    }
}

/// How long a process has lived once it had attached; who dies before that has not lived at all.
fn lived_ns(header: &WorkerHeader, pid: i32, seen_ns: u64) -> u64 {
    let attached = header.attached_ns.load(Ordering::Acquire);
    let is_its_own = header.pid.load(Ordering::Relaxed) == pid as u32;
    if is_its_own && attached > 0 { seen_ns.saturating_sub(attached) } else { 0 }
}

/// A worker could not even begin: it has no page for its last words yet.
fn unfit(worker: usize) -> Error {
    Error::Plan(format!("worker {worker} could not begin; it says why above"))
}

/// All workers of a job.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    pub(super) plan: &'a Plan,
    pub(super) scene: &'a Scene,
    pub(super) spawner: Spawner,
    pub(super) entry: isize,
    pub(super) members: Vec<Member>,
    pub(super) standbys: Standbys,
    /// What the replicas among them say.
    replicas: Replicas,
    /// What became of successions, until it is asked for; and who gave way and has not ended yet.
    pub(super) successions: Vec<(usize, Succeeded)>,
    pub(super) leaving: Vec<Child>,
    /// A cut is open: nobody gives way before it is closed.
    pub(crate) is_cutting: bool,
    /// The program that an update brings, while it has to prove itself.
    pub(super) probation: Option<Probation>,
    /// Dead processes whose end the kernel has not finished yet, with the restart that they caused.
    dying: Vec<(Child, usize)>,
    pub(crate) restarts: Vec<Restart>,
    /// Workers that died since this was last asked for.
    deaths: Vec<usize>,
    /// Workers that attaching does not bring back.
    pub(super) fallen: Vec<Fallen>,
    /// Processes that were killed because their region goes back.
    stopped: Vec<(usize, Child)>,
    /// Held from the first look on: a death is to be seen at once.
    pub(super) haste: Option<Haste>,
    is_watching: bool,
    hangs: HangWatch,
    memory: MemoryEvents,
    care: Care,
    pub(crate) annals: Annals,
}

impl<'a> Crew<'a> {
    /// Starts all workers.
    pub(crate) fn start(
        plan: &'a Plan,
        settings: &'a Settings,
        scene: &'a Scene,
        watch: &Watch,
        spawner: Spawner,
        entry: isize,
    ) -> Result<Self, Error> {
        let mut crew = Self::unborn(plan, settings, scene, spawner, entry);
        for worker in 0..plan.workers {
            if let Err(error) = crew.spawn(watch, worker) {
                crew.end(true);
                return Err(error);
            }
        }
        Ok(crew)
    }

    /// A crew of which nobody was started yet.
    fn unborn(
        plan: &'a Plan,
        settings: &'a Settings,
        scene: &'a Scene,
        spawner: Spawner,
        entry: isize,
    ) -> Self {
        let program = Rc::new(Program::own());
        let members = (0..plan.workers)
            .map(|worker| Member {
                program: Rc::clone(&program),
                succession: None,
                told: None,
                child: None,
                lives: 0,
                commits: 0,
                ladder: Ladder::new(settings.restarts(), rungs(plan, settings, worker)),
                due_ns: None,
                recovering: None,
                hung: None,
            })
            .collect();
        let (dying, restarts) = (Vec::new(), Vec::new());
        let letters = DeadLetters::new(dead_letters::path(plan, settings), &settings.name);
        Self {
            plan,
            scene,
            spawner,
            entry,
            members,
            standbys: Standbys::new(plan, settings),
            replicas: Replicas::new(plan, scene),
            successions: Vec::new(),
            leaving: Vec::new(),
            is_cutting: false,
            probation: None,
            dying,
            restarts,
            deaths: Vec::new(),
            fallen: Vec::new(),
            stopped: Vec::new(),
            haste: None,
            is_watching: false,
            hangs: HangWatch::new(settings.hang_timeout, plan.workers),
            memory: MemoryEvents::open(),
            care: Care::new(letters, &settings.name, plan.workers),
            annals: Annals::default(),
        }
    }

    /// What a worker's next process is told.
    pub(super) fn role(&self, worker: usize) -> Role {
        Role {
            worker,
            control_fd: self.scene.control_peer.as_raw_fd(),
            control_bytes: self.scene.control.len(),
            entry: self.entry,
            life: self.members[worker].lives,
            in_haste: self.haste.is_some(),
            small_pages: false,
            standby: None,
            succession: None,
            tie: None,
        }
    }

    fn spawn(&mut self, watch: &Watch, worker: usize) -> Result<(), Error> {
        let role = self.role(worker);
        let fds = self.scene.inherited(self.plan, worker);
        let child = self.spawner.spawn(&self.members[worker].program, role, &fds)?;
        let pidfd = child.pidfd.as_raw_fd();
        let member = &mut self.members[worker];
        // From here on the process is ours to end, whatever fails.
        member.child = Some(child);
        member.lives += 1;
        member.due_ns = None;
        watch.watch_process(pidfd)
    }

    /// Looks at every worker, replaces the dead, and returns the death words to sleep on, with
    /// their values.
    pub(crate) fn look(&mut self, watch: &Watch) -> Result<Vec<(usize, u32)>, Error> {
        if !self.is_watching {
            (self.is_watching, self.haste) = (true, Haste::begin());
        }
        self.reap_dying();
        self.hangs.begin(now_ns());
        self.look_at_standbys(watch)?;
        self.replicas.look(&mut self.annals);
        let mut words = Vec::with_capacity(self.members.len());
        for worker in 0..self.members.len() {
            let word = &self.scene.workers[worker].death[0].word;
            let value = word.load(Ordering::Acquire);
            self.note_recovery(worker);
            let ladder = &mut self.members[worker].ladder;
            self.care.look(self.plan, self.scene, worker, ladder, &mut self.annals);
            self.look_at_succession(worker);
            if let Some(child) = &self.members[worker].child {
                let pid = child.pid;
                // A word of an earlier life stays marked until the successor has claimed; only its
                // own end counts.
                let is_own = self.scene.workers[worker].pid.load(Ordering::Acquire) == pid as u32;
                if is_own && death::is_dead(word) {
                    self.died(worker, None)?;
                } else if let Some(exit) = reap(pid, false) {
                    if self.has_given_way(worker, pid, exit) {
                        self.vacate(worker);
                    } else {
                        self.died(worker, Some(exit))?;
                    }
                } else if is_own {
                    self.watch_for_hang(worker, pid);
                }
            }
            let due = self.members[worker].due_ns.is_some_and(|due| due <= now_ns());
            if due && watch.events.is_held(worker) {
                self.members[worker].due_ns = Some(now_ns() + HELD.as_nanos() as u64);
            } else if due {
                self.respawn(watch, worker)?;
            }
            words.push((worker, value));
        }
        Ok(words)
    }

    /// Starts a successor. A machine that has no process or memory to spare at the moment is asked
    /// again, as often as the budget allows.
    fn respawn(&mut self, watch: &Watch, worker: usize) -> Result<(), Error> {
        self.standbys.withdraw(worker);
        let Err(error) = self.spawn(watch, worker) else {
            return Ok(());
        };
        let (member, now) = (&mut self.members[worker], now_ns());
        if member.ladder.unborn(now) || member.child.is_some() {
            return Err(error);
        }
        member.due_ns = Some(now + PAUSE_MAX_NS);
        Ok(())
    }

    /// A worker died: `exit` says how, when that is known already.
    pub(super) fn died(&mut self, worker: usize, exit: Option<Exit>) -> Result<(), Error> {
        self.note_death(worker, exit, None)
    }

    /// What a worker left that died just now, as this process.
    fn remains(&self, worker: usize, pid: u32) -> Remains {
        let standby = self.standbys.of(worker);
        Remains::take(self.plan, self.scene, (worker, pid), standby)
    }

    /// As [`Self::died`], where what it left is known already.
    pub(super) fn note_death(
        &mut self,
        worker: usize,
        exit: Option<Exit>,
        left: Option<Remains>,
    ) -> Result<(), Error> {
        let seen_ns = now_ns();
        self.abandon(worker, "the worker died meanwhile and is replaced as after any death");
        // It may have recovered from the death before since it was last looked at.
        self.note_recovery(worker);
        let Some(child) = self.members[worker].child.take() else {
            return Ok(());
        };
        if exit.is_none() {
            kill(child.pid);
        }
        let left = left.unwrap_or_else(|| self.remains(worker, child.pid as u32));
        let header = left.header().unwrap_or(self.scene.workers[worker]);
        self.deaths.push(worker);
        let (failed, exit) = has_failed(header, child.pid, exit);
        let words = failed.then(|| left.last_words());
        let tried = self.died_on_probation(worker, &child, exit, words);
        let exit = tried.or(exit);
        let gave_up = failed || exit == Some(Exit::Code(EXIT_FAILED));
        let gave_up = (gave_up && tried.is_none()).then_some(failed);
        if self.has_fallen((worker, child.pid), &left, exit, gave_up)? {
            return Ok(());
        }
        let lived_ns = lived_ns(header, child.pid, seen_ns);
        let member = &mut self.members[worker];
        let commits = header.commits.load(Ordering::Acquire);
        let subject = Subject {
            worker,
            pid: child.pid,
            life: member.lives,
            exit,
            hung_s: member.hung.take().map(|(seconds, _)| seconds),
            seen_ns,
        };
        let memory = &mut self.memory;
        let has_committed = commits != std::mem::replace(&mut member.commits, commits);
        let mut found = autopsy::perform(self.plan, &left, &subject, || memory.has_moved());
        let death = Death {
            cause: if tried.is_some() { Cause::Unknown } else { found.cause },
            // What a program on probation does counts against it, not against the job.
            has_committed: has_committed || tried.is_some(),
            lived_ns,
            at_ns: seen_ns,
            place: found.place,
            is_state_damaged: false,
        };
        let decision = member.ladder.died(&death);
        self.care.order(self.plan, self.scene, worker, &decision);
        let grace = self.standbys.grace(worker).as_nanos() as u64;
        member.due_ns = Some(seen_ns + decision.pause_ns.max(grace));
        let restart = self.restarts.len();
        member.recovering = Some(restart);
        found.post_mortem.rung = decision.rung.label().into();
        self.restarts.push(Restart::new(&found.post_mortem, left.last_words(), seen_ns));
        self.write_down(found, &decision, restart);
        if exit.is_none() {
            self.dying.push((child, restart));
        }
        if decision.rung == Rung::Failure {
            return Err(self.give_up(worker, decision.in_a_row, restart));
        }
        self.climb(worker, decision, restart);
        Ok(())
    }

    /// Writes a death and what follows from it into the chronicle.
    fn write_down(&mut self, found: Finding, decision: &Decision, restart: usize) {
        let Finding { post_mortem, base, frames, .. } = found;
        let (worker, cause) = (post_mortem.worker, post_mortem.cause.clone());
        let at = if post_mortem.operator.is_empty() { "" } else { " in " };
        let cause = format!("{cause}{at}{}", post_mortem.operator);
        if decision.convicted.is_some() {
            let record = format!("{cause}: {}", post_mortem.record);
            self.annals.note("convicted", worker, record);
        }
        self.annals.note(decision.rung.label(), worker, cause);
        self.annals.add(Entry { post_mortem, base, frames, restart });
    }

    /// Ends a worker that has something to do and does not get on. First by a signal that lets it
    /// keep its stack, then for certain.
    fn watch_for_hang(&mut self, worker: usize, pid: i32) {
        if let Some((_, kill_ns)) = self.members[worker].hung {
            if now_ns() >= kill_ns {
                kill(pid);
            }
            return;
        }
        let state = self.scene.workers[worker].state.load(Ordering::Acquire);
        if WorkerState::of(state) != WorkerState::Running {
            return;
        }
        let (plan, scene) = (self.plan, self.scene);
        // A slow step shows in the batches that it takes.
        let (turns, from) = (&scene.workers[worker].turns, scene.marker(plan, worker).from());
        let turns = turns.load(Ordering::Relaxed).wrapping_add(from[0] ^ from[1].rotate_left(32));
        let is_suspect = || autopsy::is_stuck(plan, scene, worker, pid);
        let doing = || autopsy::activity(pid);
        if let Some(seconds) = self.hangs.look(worker, pid, turns, is_suspect, doing) {
            self.members[worker].hung = Some((seconds, now_ns() + TELLING_NS));
            self.annals.note("hang", worker, format!("no step finished for {seconds:.1} s"));
            if let Some(child) = &self.members[worker].child {
                super::spawn::abort(child);
            }
        }
    }

    fn give_up(&mut self, worker: usize, deaths: u32, restart: usize) -> Error {
        if let Some(at) = self.dying.iter().position(|(_, of)| *of == restart) {
            let (child, _) = self.dying.swap_remove(at);
            if let Some(exit) = reap(child.pid, true) {
                self.restarts[restart].cause = exit.to_string();
            }
        }
        let restart = &self.restarts[restart];
        let mut cause = restart.cause.clone();
        if let Some(PostMortem { operator, doing, record, own_doing: true, .. }) =
            self.annals.latest(worker)
            && !operator.is_empty()
        {
            let with = if record.is_empty() { "" } else { ", " };
            cause = format!("{cause} in {operator}, {doing}{with}{record}");
        }
        if !restart.last_words.is_empty() {
            cause = format!("{cause}; its last words: {}", restart.last_words);
        }
        Error::Budget { worker, deaths, cause }
    }

    /// Kills a worker's process, as whoever asks for a drill would: its number. `None` while there
    /// is none.
    pub(crate) fn kill_worker(&self, worker: usize) -> Option<u32> {
        let child = self.members.get(worker)?.child.as_ref()?;
        kill(child.pid);
        Some(child.pid as u32)
    }

    /// Workers that died since the last call, in the order in which it was seen.
    pub(crate) fn take_deaths(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.deaths)
    }

    /// Whether the words in a worker's header are those of a process that is not known to be dead.
    pub(crate) fn is_alive(&self, worker: usize) -> bool {
        let child = self.members[worker].child.as_ref().map(|child| child.pid as u32);
        child == Some(self.scene.workers[worker].pid.load(Ordering::Acquire))
    }

    pub(super) fn last_words(&self, worker: usize) -> String {
        last_words(self.scene.arena, self.plan.layout.segments[worker].at).read()
    }

    /// Writes down how long a recovery took, once the successor has processed something or found
    /// nothing to do.
    fn note_recovery(&mut self, worker: usize) {
        let Some(restart) = self.members[worker].recovering else {
            return;
        };
        let header = self.scene.workers[worker];
        let child = self.members[worker].child.as_ref().map(|child| child.pid as u32);
        if child != Some(header.pid.load(Ordering::Acquire)) {
            return;
        }
        let state = WorkerState::of(header.state.load(Ordering::Acquire));
        if state == WorkerState::Running || state == WorkerState::Finished {
            let attached = header.attached_ns.load(Ordering::Acquire);
            let entry = &mut self.restarts[restart];
            entry.recovery_us = Some(attached.saturating_sub(entry.seen_ns) / 1000);
            self.members[worker].recovering = None;
        }
    }

    fn reap_dying(&mut self) {
        let (restarts, annals) = (&mut self.restarts, &mut self.annals);
        self.dying.retain(|(child, restart)| match reap(child.pid, false) {
            None => true,
            Some(exit) => {
                restarts[*restart].cause = exit.to_string();
                annals.ended(*restart, &restarts[*restart].cause);
                false
            }
        });
    }

    /// True when every worker says that its stages are done.
    pub(crate) fn all_finished(&self) -> bool {
        self.members.iter().zip(&self.scene.workers).all(|(member, header)| {
            member
                .child
                .as_ref()
                .is_some_and(|child| child.pid as u32 == header.pid.load(Ordering::Acquire))
                && header.state.load(Ordering::Acquire) == WorkerState::Finished as u32
        })
    }

    /// How long the loop may sleep before a pause ends or a recovery should be looked at.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let now = now_ns();
        let due = self.members.iter().filter_map(|member| member.due_ns).min();
        let due = due.map(|due| Duration::from_nanos(due.saturating_sub(now)));
        let is_open = !self.dying.is_empty() || self.care.is_waiting(self.plan, self.scene);
        let is_open = is_open
            || self
                .members
                .iter()
                .any(|member| member.recovering.is_some() || member.hung.is_some());
        let soon = is_open.then_some(Duration::from_millis(5));
        let others = self.succession_patience().into_iter().chain(self.standbys.patience());
        due.into_iter().chain(soon).chain(others).chain(self.stop_patience()).min()
    }

    /// Waits for all processes to end, for a bounded time, killing them first when the job failed.
    /// After this none of ours is left.
    pub(crate) fn end(&mut self, at_once: bool) {
        self.haste = None;
        self.standbys.end();
        for worker in 0..self.members.len() {
            self.abandon(worker, "the job ended");
            self.note_recovery(worker);
        }
        self.end_leaving();
        for member in &self.members {
            if let (true, Some(child)) = (at_once, &member.child) {
                kill(child.pid);
            }
        }
        let begun = Instant::now();
        for (worker, member) in self.members.iter_mut().enumerate() {
            if let Some(child) = member.child.take() {
                // Nothing but the end of the process is missing: all that it did is committed.
                if !at_once && !child.ends_within(LEAVING.saturating_sub(begun.elapsed())) {
                    crate::say!(
                        "testudo: worker {worker} (process {}) was done but did not leave within \
                         {} s; it was killed, and nothing is lost",
                        child.pid,
                        LEAVING.as_secs()
                    );
                    kill(child.pid);
                }
                reap(child.pid, true);
            }
        }
        self.end_stopped();
        for (child, restart) in std::mem::take(&mut self.dying) {
            if let Some(exit) = reap(child.pid, true) {
                self.restarts[restart].cause = exit.to_string();
            }
        }
    }
}

impl Drop for Crew<'_> {
    /// However the job ends, no process of it is left.
    fn drop(&mut self) {
        self.end(true);
    }
}
