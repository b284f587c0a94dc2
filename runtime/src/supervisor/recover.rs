//! The crew: the worker processes of a job, and what is done when one dies.
//!
//! A death is seen in the worker's death word (R1) or, for one before its claim, by the end of the
//! process. The whole dead process is killed before its successor runs (R2): helper threads may
//! outlive the data thread. The successor is a fresh process that attaches to the same segments.
//!
//! Only deaths with no commit in between count against the budget; they are also spaced out.
//!
//! Called by `launch`.

use super::launch::Scene;
use super::report::Restart;
use super::spawn::{Child, Exit, Spawner, kill, reap};
use super::watch::Watch;
use crate::config::Settings;
use crate::error::Error;
use crate::haste::Haste;
use crate::plan::Plan;
use crate::time::now_ns;
use crate::worker::attach::last_words;
use crate::worker::entry::{EXIT_FAILED, Role};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use testudo_shm::death;
use testudo_shm::header::WorkerState;
use testudo_shm::primitive::Ordering;

/// Pause before a worker that died twice without a commit is started again; doubled each time.
const PAUSE: Duration = Duration::from_millis(2);

/// A life this long was sound, even if there was nothing to commit in it.
const SOUND_LIFE_NS: u64 = 10_000_000_000;

/// Time that workers have to leave when all is done: one may be stopped, or stuck in code that runs
/// at its exit.
const LEAVING: Duration = Duration::from_secs(5);

/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Deaths of a worker in a row, without a commit or a long life in between: what counts against the
/// budget.
#[derive(Debug, Default)]
struct Deaths {
    /// Commits in its header when it last died.
    commits: u64,
    in_a_row: u32,
}

impl Deaths {
    /// Takes in another death, after so many commits in all and a last life of so many nanoseconds.
    /// Returns how many there are in a row now.
    fn note(&mut self, commits: u64, lived_ns: u64) -> u32 {
        let is_repeated = commits == self.commits && lived_ns <= SOUND_LIFE_NS;
        self.in_a_row = if is_repeated { self.in_a_row + 1 } else { 1 };
        self.commits = commits;
        self.in_a_row
    }

    /// A successor could not even be started.
    fn note_unborn(&mut self) -> u32 {
        self.in_a_row += 1;
        self.in_a_row
    }
}

#[derive(Debug)]
struct Member {
    child: Option<Child>,
    lives: u64,
    deaths: Deaths,
    /// When the next life may begin, in monotonic nanoseconds.
    due_ns: Option<u64>,
    /// The restart whose recovery time is not known yet.
    recovering: Option<usize>,
}

/// Last words of a worker that found a checkpoint damaged begin with this.
pub(crate) const DAMAGED: &str = "damaged: ";

/// What a worker gave up with, as an error of the operator that it names.
fn failure(worker: usize, words: &str) -> Error {
    if let Some(damage) = words.strip_prefix(DAMAGED) {
        return Error::Damaged(damage.into());
    }
    match words.strip_prefix("operator ").and_then(|words| words.split_once(": ")) {
        Some((name, message)) => Error::job(&format!("{name} (worker {worker})"), message),
        None => Error::job(&format!("(worker {worker})"), words),
    }
}

/// A worker could not even begin: it has no page for its last words yet.
fn unfit(worker: usize) -> Error {
    Error::Plan(format!("worker {worker} could not begin; it says why above"))
}

/// All workers of a job.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    plan: &'a Plan,
    settings: &'a Settings,
    scene: &'a Scene,
    spawner: Spawner,
    entry: isize,
    members: Vec<Member>,
    /// Dead processes whose end the kernel has not finished yet, with the restart that they caused.
    dying: Vec<(Child, usize)>,
    pub(crate) restarts: Vec<Restart>,
    /// Workers that died since this was last asked for.
    deaths: Vec<usize>,
    /// Held from the first look on: a death is to be seen at once.
    haste: Option<Haste>,
    is_watching: bool,
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
        let members = (0..plan.workers)
            .map(|_| Member {
                child: None,
                lives: 0,
                deaths: Deaths::default(),
                due_ns: None,
                recovering: None,
            })
            .collect();
        let (dying, restarts) = (Vec::new(), Vec::new());
        let mut crew = Self {
            plan,
            settings,
            scene,
            spawner,
            entry,
            members,
            dying,
            restarts,
            deaths: Vec::new(),
            haste: None,
            is_watching: false,
        };
        for worker in 0..plan.workers {
            if let Err(error) = crew.spawn(watch, worker) {
                crew.end(true);
                return Err(error);
            }
        }
        Ok(crew)
    }

    fn spawn(&mut self, watch: &Watch, worker: usize) -> Result<(), Error> {
        let role = Role {
            worker,
            control_fd: self.scene.control.raw_fd(),
            control_bytes: self.scene.control.len(),
            entry: self.entry,
            life: self.members[worker].lives,
            in_haste: self.haste.is_some(),
            small_pages: false,
        };
        let fds = self.scene.inherited(self.plan, worker);
        let child = self.spawner.spawn(role, &fds)?;
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
        let mut words = Vec::with_capacity(self.members.len());
        for worker in 0..self.members.len() {
            let word = &self.scene.workers[worker].death[0].word;
            let value = word.load(Ordering::Acquire);
            self.note_recovery(worker);
            if let Some(child) = &self.members[worker].child {
                let pid = child.pid;
                // A word of an earlier life stays marked until the successor has claimed; only its
                // own end counts.
                let is_own = self.scene.workers[worker].pid.load(Ordering::Acquire) == pid as u32;
                if is_own && death::is_dead(word) {
                    self.died(worker, None)?;
                } else if let Some(exit) = reap(pid, false) {
                    self.died(worker, Some(exit))?;
                }
            }
            let due = self.members[worker].due_ns.is_some_and(|due| due <= now_ns());
            if due {
                self.respawn(watch, worker)?;
            }
            words.push((worker, value));
        }
        Ok(words)
    }

    /// Starts a successor. A machine that has no process or memory to spare at the moment is asked
    /// again, as often as the budget allows.
    fn respawn(&mut self, watch: &Watch, worker: usize) -> Result<(), Error> {
        let Err(error) = self.spawn(watch, worker) else {
            return Ok(());
        };
        let member = &mut self.members[worker];
        if member.deaths.note_unborn() > self.settings.restart_budget || member.child.is_some() {
            return Err(error);
        }
        member.due_ns = Some(now_ns() + PAUSE_MAX.as_nanos() as u64);
        Ok(())
    }

    /// A worker died: `exit` says how, when that is known already.
    fn died(&mut self, worker: usize, exit: Option<Exit>) -> Result<(), Error> {
        let seen_ns = now_ns();
        let header = self.scene.workers[worker];
        let Some(child) = self.members[worker].child.take() else {
            return Ok(());
        };
        if exit.is_none() {
            kill(child.pid);
        }
        self.deaths.push(worker);
        let failed = header.state.load(Ordering::Acquire) == WorkerState::Failed as u32
            && header.pid.load(Ordering::Relaxed) == child.pid as u32;
        if failed || exit == Some(Exit::Code(EXIT_FAILED)) {
            let words = self.last_words(worker);
            let _ = exit.or_else(|| reap(child.pid, true));
            return Err(if failed { failure(worker, &words) } else { unfit(worker) });
        }
        let member = &mut self.members[worker];
        let commits = header.commits.load(Ordering::Acquire);
        let attached = header.attached_ns.load(Ordering::Acquire);
        let is_its_own = header.pid.load(Ordering::Relaxed) == child.pid as u32;
        // `attached` is 0 until it is: who dies before that has not lived at all.
        let has_lived = is_its_own && attached > 0;
        let lived_ns = if has_lived { seen_ns.saturating_sub(attached) } else { 0 };
        let deaths = member.deaths.note(commits, lived_ns);
        let pause = if deaths > 1 {
            (PAUSE * (1 << deaths.min(16))).min(PAUSE_MAX)
        } else {
            Duration::ZERO
        };
        member.due_ns = Some(seen_ns + pause.as_nanos() as u64);
        let restart = self.restarts.len();
        member.recovering = Some(restart);
        self.restarts.push(Restart {
            worker,
            life: member.lives,
            cause: exit.map_or(String::new(), |exit| exit.to_string()),
            last_words: self.last_words(worker),
            seen_ns,
            recovery_us: None,
        });
        if exit.is_none() {
            self.dying.push((child, restart));
        }
        if deaths > self.settings.restart_budget {
            return Err(self.give_up(worker, deaths, restart));
        }
        Ok(())
    }

    fn give_up(&mut self, worker: usize, deaths: u32, restart: usize) -> Error {
        if let Some(at) = self.dying.iter().position(|(_, of)| *of == restart) {
            let (child, _) = self.dying.swap_remove(at);
            if let Some(exit) = reap(child.pid, true) {
                self.restarts[restart].cause = exit.to_string();
            }
        }
        let restart = &self.restarts[restart];
        let cause = if restart.last_words.is_empty() {
            restart.cause.clone()
        } else {
            format!("{}; its last words: {}", restart.cause, restart.last_words)
        };
        Error::Budget { worker, deaths, cause }
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

    fn last_words(&self, worker: usize) -> String {
        let page = last_words(self.scene.arena, self.plan.layout.segments[worker].at);

        page.read()
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
        let restarts = &mut self.restarts;
        self.dying.retain(|(child, restart)| match reap(child.pid, false) {
            None => true,
            Some(exit) => {
                restarts[*restart].cause = exit.to_string();
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
        let is_open =
            self.members.iter().any(|member| member.recovering.is_some()) || !self.dying.is_empty();
        let soon = is_open.then_some(Duration::from_millis(5));
        due.into_iter().chain(soon).min()
    }

    /// Waits for all processes to end, for a bounded time, killing them first when the job failed.
    /// After this none of ours is left.
    pub(crate) fn end(&mut self, at_once: bool) {
        self.haste = None;
        for worker in 0..self.members.len() {
            self.note_recovery(worker);
        }
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

#[cfg(test)]
mod tests {
    use super::{Deaths, SOUND_LIFE_NS};

    #[test]
    fn deaths_without_a_commit_are_in_a_row() {
        let mut deaths = Deaths::default();
        assert_eq!(deaths.note(5, 1000), 1, "it had committed");
        assert_eq!(deaths.note(5, 1000), 2);
        assert_eq!(deaths.note_unborn(), 3);
        assert_eq!(deaths.note(5, SOUND_LIFE_NS), 4);
        assert_eq!(deaths.note(6, 1000), 1);
    }

    #[test]
    fn a_worker_that_lived_long_without_work_does_not_spend_the_budget() {
        let mut deaths = Deaths::default();
        for _ in 0..100 {
            assert_eq!(deaths.note(0, SOUND_LIFE_NS + 1), 1);
        }
        assert_eq!(deaths.note(0, 1000), 2);
    }
}
