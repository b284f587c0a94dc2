//! Probation: while an update is under way, the deaths of workers that run the new program speak
//! against it.
//!
//! Invariants: only what a program does by itself convicts it (R17): a crash, giving up, an exit. A
//! SIGKILL comes from outside; but nobody is killed so often by chance. Once convicted, whoever
//! dies or is respawned runs the old program.
//!
//! What a program on probation has migrated is final with its first step: until then the old
//! program recovers its workers as after any death, afterwards its region goes back.
//!
//! A part of [`Crew`]: `died` asks here; `update` begins and ends it.

use super::program::Program;
use super::recover::Crew;
use super::recover::stop::{Fall, Fallen};
use super::spawn::{Child, Exit, reap};
use crate::error::Error;
use crate::time::now_ns;
use std::rc::Rc;
use testudo_shm::primitive::Ordering;

/// SIGKILLs of workers on probation that are taken for chance.
const CHANCES: u32 = 2;

/// A program that has to prove itself.
#[derive(Debug)]
pub(super) struct Probation {
    old: Rc<Program>,
    new: Rc<Program>,
    kills: u32,
    /// Since when values may have been migrated, if they are.
    migrates_since_ns: Option<u64>,
    /// What speaks against it.
    why: Option<String>,
}

impl Crew<'_> {
    pub(super) fn begin_probation(
        &mut self,
        old: &Rc<Program>,
        new: Option<&Rc<Program>>,
        migrates: bool,
    ) {
        self.probation = new.map(|new| Probation {
            old: Rc::clone(old),
            new: Rc::clone(new),
            kills: 0,
            migrates_since_ns: migrates.then(now_ns),
            why: None,
        });
    }

    /// Whether the new program has failed, and by what.
    pub(super) fn probation_failed(&self) -> Option<String> {
        self.probation.as_ref()?.why.clone()
    }

    /// Something else speaks against the new program.
    pub(super) fn fail_probation(&mut self, why: &str) {
        if let Some(probation) = &mut self.probation {
            probation.why.get_or_insert(why.to_owned());
        }
    }

    pub(super) fn end_probation(&mut self) {
        self.probation = None;
    }

    /// Whether a worker runs this program.
    pub(super) fn runs(&self, worker: usize, program: &Rc<Program>) -> bool {
        Rc::ptr_eq(&self.members[worker].program, program)
    }

    /// Whether a worker of a program that is convicted, which has just died, has values that the
    /// old one does not know, for good: then its whole region goes back, with the old program.
    pub(super) fn goes_back(&mut self, worker: usize) -> bool {
        let Some(Probation { old, why: Some(why), migrates_since_ns: Some(since), .. }) =
            &self.probation
        else {
            return false;
        };
        if self.scene.workers[worker].migrated_ns.load(Ordering::Acquire) < *since {
            return false;
        }
        let (old, why) = (Rc::clone(old), format!("the update is rolled back: {why}"));
        for &other in self.plan.regions.tasks(self.plan.regions.of_task(worker)) {
            self.members[other].program = Rc::clone(&old);
        }
        self.fallen.push(Fallen { worker, fall: Fall::Updated, error: Error::Machine(why) });
        true
    }

    /// A worker on probation has died, `gave_up` with last words: how, and which program its
    /// successor runs is settled. `None` for any other worker.
    pub(super) fn died_on_probation(
        &mut self,
        worker: usize,
        child: &Child,
        exit: Option<Exit>,
        gave_up: Option<String>,
    ) -> Option<Exit> {
        let is_new = self.probation.as_ref().is_some_and(|of| self.runs(worker, &of.new));
        if !is_new {
            return None;
        }
        let exit = exit.or_else(|| reap(child.pid, true)).unwrap_or(Exit::Signal(libc::SIGKILL));
        let words = gave_up.unwrap_or_else(|| self.last_words(worker));
        let (Some(probation), member) = (&mut self.probation, &mut self.members[worker]) else {
            return None;
        };
        let from_outside = exit == Exit::Signal(libc::SIGKILL);
        probation.kills += u32::from(from_outside);
        if !from_outside || probation.kills > CHANCES {
            // A panic's place, and its message.
            let words = words.lines().take(2).collect::<Vec<_>>().join(" ");
            let said = if words.is_empty() { String::new() } else { format!(": {words}") };
            probation.why.get_or_insert(format!("worker {worker} died ({exit}){said}"));
        }
        if probation.why.is_some() {
            member.program = Rc::clone(&probation.old);
        }
        Some(exit)
    }
}
