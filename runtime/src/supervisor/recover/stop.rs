//! The crew while a region goes back: its workers are stopped for good, and started again once
//! everything they had is what it is to be.
//!
//! Invariants: nobody of a stopped worker lives, not even a helper thread, once [`Crew::is_still`]
//! says so (R2, R18); nobody is started before [`Crew::start_again`].
//!
//! Called by `rewind`.

use super::Crew;
use crate::error::Error;
use crate::supervisor::ladder::{Decision, Rung};
use crate::supervisor::remains::Remains;
use crate::supervisor::spawn::{Exit, kill, reap};
use crate::time::now_ns;
use crate::worker::entry::{EXIT_FAILED, EXIT_UNSOUND};
use std::time::Duration;
use testudo_shm::header::{WorkerHeader, WorkerState};
use testudo_shm::primitive::Ordering;

/// Last words of a worker whose own memory does not verify begin with this.
pub(crate) const UNSOUND: &str = "unsound: ";

/// More lives than that are none: the word was overwritten.
const LIVES_MAX: u64 = 1 << 31;

/// Why a worker cannot go on from what it left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fall {
    /// What it left does not verify.
    Unsound,
    /// A file of the checkpoint that it went on from does not.
    Damaged,
    /// It died by its own doing, again and again.
    Deaths(Rung),
    /// Its values are those of a program that is taken back.
    Updated,
}

/// A worker that attaching does not bring back.
#[derive(Debug)]
pub(crate) struct Fallen {
    pub(crate) worker: usize,
    pub(crate) fall: Fall,
    /// What the job ends with, if nothing else helps.
    pub(crate) error: Error,
}

/// Whether a process that died had given up, and how it ended, if that is known by now. What its
/// memory says of it does not end a job alone.
pub(super) fn has_failed(
    header: &WorkerHeader,
    pid: i32,
    exit: Option<Exit>,
) -> (bool, Option<Exit>) {
    let is_own = header.pid.load(Ordering::Relaxed) == pid as u32;
    let says_so = header.state.load(Ordering::Acquire) == WorkerState::Failed as u32;
    if !is_own || !says_so {
        return (false, exit);
    }
    let exit = exit.or_else(|| reap(pid, true));
    (matches!(exit, Some(Exit::Code(EXIT_FAILED) | Exit::Unknown)), exit)
}

/// What kind of fall last words tell of.
fn fall_of(words: &str) -> Option<Fall> {
    if words.starts_with(super::DAMAGED) {
        return Some(Fall::Damaged);
    }
    words.starts_with(UNSOUND).then_some(Fall::Unsound)
}

/// Whether a worker that died says that what it has does not verify: in its last words, if they are
/// its own, or by its exit code, if it could not even claim its segment.
fn fell(worker: usize, pid: i32, left: &Remains, exit: Option<Exit>) -> Option<Fallen> {
    let is_own = left.header().is_some_and(|own| own.pid.load(Ordering::Relaxed) == pid as u32);
    let words = if is_own { left.last_words() } else { String::new() };
    let error = if exit == Some(Exit::Code(EXIT_UNSOUND)) {
        Error::Unsound(format!("worker {worker}: the claim word of its segment is damaged"))
    } else if fall_of(&words) == Some(Fall::Unsound) {
        super::failure(worker, &words)
    } else {
        return None;
    };
    Some(Fallen { worker, fall: Fall::Unsound, error })
}

impl Crew<'_> {
    /// Whether a worker that died is not to be started again by itself. `gave_up` is told of one
    /// that did: whether it could still say why.
    pub(super) fn has_fallen(
        &mut self,
        (worker, pid): (usize, i32),
        left: &Remains,
        exit: Option<Exit>,
        gave_up: Option<bool>,
    ) -> Result<bool, Error> {
        if self.goes_back(worker) {
            return Ok(true);
        }
        let fallen = match gave_up {
            None => fell(worker, pid, left, exit),
            Some(false) => return Err(super::unfit(worker)),
            Some(true) => {
                let words = left.last_words();
                let error = super::failure(worker, &words);
                let Some(fall) = fall_of(&words) else { return Err(error) };
                Some(Fallen { worker, fall, error })
            }
        };
        let Some(fallen) = fallen else { return Ok(false) };
        let _ = exit.or_else(|| reap(pid, true));
        self.fallen.push(fallen);
        Ok(true)
    }

    /// Workers that attaching does not bring back, since the last call. None of them is started
    /// again by itself.
    pub(crate) fn take_fallen(&mut self) -> Vec<Fallen> {
        std::mem::take(&mut self.fallen)
    }

    /// The ladder's decision about a worker that died: whether attaching is what comes next.
    pub(super) fn climb(&mut self, worker: usize, decision: Decision, restart: usize) {
        if decision.rung < Rung::Cold {
            return;
        }
        self.members[worker].due_ns = None;
        let error = self.give_up(worker, decision.in_a_row, restart);
        self.fallen.push(Fallen { worker, fall: Fall::Deaths(decision.rung), error });
    }

    /// Kills a worker, if it lives, and starts no successor.
    pub(crate) fn stop(&mut self, worker: usize) {
        // None of them is to take its place.
        self.dismiss_standbys();
        self.abandon(worker, "its region goes back to a checkpoint");
        let member = &mut self.members[worker];
        member.due_ns = None;
        member.recovering = None;
        if let Some(child) = member.child.take() {
            kill(child.pid);
            self.stopped.push((worker, child));
            self.deaths.push(worker);
        }
        // The next life's number is above all that there were; not all that is said is believed.
        let lives = self.scene.workers[worker].incarnation.load(Ordering::Acquire);
        let member = &mut self.members[worker];
        member.lives = if lives < LIVES_MAX { member.lives.max(lives) } else { member.lives };
    }

    /// Whether nothing is left of the processes of these workers.
    pub(crate) fn is_still(&mut self, workers: &[usize]) -> bool {
        self.reap_dying();
        self.stopped.retain(|(_, child)| reap(child.pid, false).is_none());
        let is_meant = |worker: usize| workers.contains(&worker);
        let restarts = &self.restarts;
        let mut dying = self.dying.iter().map(|(_, restart)| restarts[*restart].worker);
        !dying.any(is_meant) && !self.stopped.iter().any(|(worker, _)| is_meant(*worker))
    }

    /// The segments of these workers are about to be emptied: see [`Care::forget`].
    pub(crate) fn forget(&mut self, workers: &[(usize, u64)]) -> Result<(), Error> {
        self.care.forget(self.plan, self.scene, workers)
    }

    /// Starts a worker whose segment is empty, at the next look.
    pub(crate) fn start_again(&mut self, worker: usize) {
        let member = &mut self.members[worker];
        member.due_ns = Some(now_ns());
        member.commits = 0;
    }

    /// How soon it should be looked whether stopped processes have ended.
    pub(super) fn stop_patience(&self) -> Option<Duration> {
        (!self.stopped.is_empty()).then_some(Duration::from_millis(1))
    }

    /// Waits for processes that were stopped.
    pub(super) fn end_stopped(&mut self) {
        for (_, child) in std::mem::take(&mut self.stopped) {
            reap(child.pid, true);
        }
    }
}
