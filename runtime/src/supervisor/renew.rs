//! Renewing workers that run, one after the other, on request: `testudo restart`.
//!
//! Invariants: one renewal at a time; at most one worker of the job is between two processes
//! because of it; a renewal that fails stops where it is, and says which workers were replaced.
//!
//! Called by `steer`, which takes the requests and gives it its turns.

use super::handover::Succeeded;
use super::recover::Crew;
use super::watch::Watch;
use crate::control::protocol::{Replaced, Reply};
use crate::control::socket::ReplyTo;
use crate::time::now_ns;
use std::collections::VecDeque;
use testudo_shm::primitive::Ordering;

/// What is being done with one worker.
#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Its successor is prepared, then it gives way.
    Preparing,
    /// The successor, of this number, is attaching.
    Attaching(u32),
}

/// The replacement of one worker.
#[derive(Debug)]
pub(super) struct Turn {
    worker: usize,
    stage: Stage,
}

impl Turn {
    pub(super) fn new(worker: usize) -> Self {
        Self { worker, stage: Stage::Preparing }
    }

    pub(super) fn worker(&self) -> usize {
        self.worker
    }

    /// The new process has claimed the worker's segment.
    pub(super) fn is_attaching(&self) -> bool {
        matches!(self.stage, Stage::Attaching(_))
    }

    /// How it went, once it has: the worker runs in its new process, or why it does not.
    pub(super) fn look(&mut self, crew: &mut Crew<'_>) -> Option<Result<Replaced, String>> {
        let worker = self.worker;
        if matches!(self.stage, Stage::Preparing) {
            match crew.take_succession(worker)? {
                Succeeded::Not(why) => return Some(Err(format!("worker {worker}: {why}"))),
                Succeeded::By(pid) => self.stage = Stage::Attaching(pid),
            }
        }
        let Stage::Attaching(pid) = self.stage else { return None };
        let header = crew.scene.workers[worker];
        if header.pid.load(Ordering::Acquire) != pid || !crew.is_alive(worker) {
            let why = "the new process died while it took over; it is replaced as after any death";
            return Some(Err(format!("worker {worker}: {why}")));
        }
        let attached = header.attached_ns.load(Ordering::Acquire);
        let gave_way = header.gave_way_ns.load(Ordering::Acquire);
        (attached != 0).then(|| {
            let pause_us = attached.saturating_sub(gave_way) / 1000;
            Ok(Replaced { worker, pid, pause_us })
        })
    }
}

/// A restart of workers, with the programs that they run.
#[derive(Debug)]
pub(super) struct Restart {
    answer: ReplyTo,
    waiting: VecDeque<usize>,
    turn: Option<Turn>,
    done: Vec<Replaced>,
    /// Since when the next worker could be replaced, if it ran.
    since_ns: u64,
}

/// How long a worker is waited for that is not running at the moment.
const NOT_RUNNING_NS: u64 = 10_000_000_000;

impl Restart {
    pub(super) fn new(answer: ReplyTo, workers: impl Iterator<Item = usize>) -> Self {
        let (turn, done) = (None, Vec::new());
        Self { answer, waiting: workers.collect(), turn, done, since_ns: now_ns() }
    }

    /// Takes a turn; gives the restart back while it goes on.
    pub(super) fn look(mut self, crew: &mut Crew<'_>, watch: &Watch) -> Option<Self> {
        if let Some(turn) = &mut self.turn {
            match turn.look(crew) {
                None => return Some(self),
                Some(Err(why)) => return self.fail(why),
                Some(Ok(replaced)) => self.done.push(replaced),
            }
            self.waiting.pop_front();
            (self.turn, self.since_ns) = (None, now_ns());
        }
        let Some(&worker) = self.waiting.front() else {
            self.answer.send(Reply::Restarted { workers: self.done });
            return None;
        };
        let program = crew.program(worker);
        match crew.prepare_successor(watch, worker, &program) {
            Ok(()) => self.turn = Some(Turn::new(worker)),
            Err(why) if now_ns() - self.since_ns > NOT_RUNNING_NS => return self.fail(why),
            Err(_) => {}
        }
        Some(self)
    }

    fn fail(self, why: String) -> Option<Self> {
        let done: Vec<_> = self.done.iter().map(|done| done.worker.to_string()).collect();
        self.answer.send(Reply::error(match done.as_slice() {
            [] => why,
            done => format!("{why}; replaced before: worker {}", done.join(", ")),
        }));
        None
    }
}
