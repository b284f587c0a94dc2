//! Handing over: a worker that runs is replaced at the boundary between two of its steps by a
//! process that is prepared before (`worker/successor.rs`).
//!
//! | who dies | when | what follows |
//! |---|---|---|
//! | the successor | before the worker was told | nothing: the worker goes on |
//! | the successor | after the worker gave way | the worker's place is empty: an ordinary one |
//! | the successor | after its claim | the worker's death, as any |
//! | the worker | before it has given way | the successor is killed; an ordinary one recovers |
//! | the worker | after it has released the claim | nothing: the successor claims |
//!
//! Invariants:
//! - whether a process that was told has given way is read from the claim, which it releases as its
//!   last act but for leaving;
//! - a successor that is not wanted any more is dead and waited for before another one starts, so
//!   that two never want the same claim;
//! - giving way is no death: it is not counted, and spends nothing of the restart budget.
//!
//! A part of [`Crew`], called by its turn of the loop; `renew` begins successions.

use super::program::Program;
use super::recover::Crew;
use super::spawn::{Child, Exit, kill, readable_pipe, reap};
use super::watch::Watch;
use crate::error::Error;
use crate::time::now_ns;
use crate::worker::entry::Role;
use crate::worker::successor::Word;
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::death;
use testudo_shm::header::WorkerState;
use testudo_shm::primitive::Ordering;

/// Longest time until a successor is prepared: its pages are those of the worker's state.
const PREPARING_NS: u64 = 120_000_000_000;

/// Longest time until a worker that was told has given way: it finishes its step, and its part of a
/// cut.
const GIVING_WAY_NS: u64 = 10_000_000_000;

/// How often the loop looks while a succession is under way.
const LOOK: Duration = Duration::from_millis(1);

/// Who is prepared to take a worker's place.
#[derive(Debug)]
pub(crate) struct Succession {
    child: Child,
    program: Rc<Program>,
    pipe: PipeReader,
    said: Vec<u8>,
    begun_ns: u64,
    /// When the worker was told to give way.
    told_ns: Option<u64>,
}

impl Succession {
    /// What it runs.
    pub(super) fn program(&self) -> &Rc<Program> {
        &self.program
    }
}

/// How a succession went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Succeeded {
    /// The process of this number has claimed the segment and is attaching.
    By(u32),
    /// The worker is as it was before, or is recovered as after any death.
    Not(String),
}

impl Crew<'_> {
    /// Begins to prepare a successor for a worker that runs.
    ///
    /// What became of it is found by [`Crew::take_succession`].
    pub(crate) fn prepare_successor(
        &mut self,
        watch: &Watch,
        worker: usize,
        program: &Rc<Program>,
    ) -> Result<(), String> {
        let header = self.scene.workers[worker];
        let state = WorkerState::of(header.state.load(Ordering::Acquire));
        let runs = matches!(state, WorkerState::Running | WorkerState::Finished);
        if !runs || !self.is_alive(worker) || self.members[worker].succession.is_some() {
            return Err(format!("worker {worker} is being replaced at the moment; ask again"));
        }
        if header.restoring.load(Ordering::Acquire) != 0 {
            return Err(format!(
                "worker {worker} is still loading its state from the checkpoint; ask again later"
            ));
        }
        let succession =
            self.start_successor(worker, program).map_err(|error| error.to_string())?;
        watch.watch_process(succession.child.pidfd.as_raw_fd()).map_err(|error| {
            end(&succession.child);
            error.to_string()
        })?;
        self.members[worker].succession = Some(succession);
        Ok(())
    }

    fn start_successor(
        &mut self,
        worker: usize,
        program: &Rc<Program>,
    ) -> Result<Succession, Error> {
        let (pipe, theirs) = readable_pipe()?;
        let role = Role { succession: Some(theirs.as_raw_fd()), ..self.role(worker) };
        let mut fds = self.scene.inherited(self.plan, worker);
        fds.push(theirs.as_raw_fd());
        let child = self.spawner.spawn(program, role, &fds)?;
        let (program, said) = (Rc::clone(program), Vec::new());
        Ok(Succession { child, program, pipe, said, begun_ns: now_ns(), told_ns: None })
    }

    /// Whether the job is all that its program does, so that every process finds it by itself.
    pub(crate) fn is_program(&self) -> bool {
        self.entry == 0
    }

    /// What a worker runs.
    pub(crate) fn program(&self, worker: usize) -> Rc<Program> {
        Rc::clone(&self.members[worker].program)
    }

    /// How the succession of a worker went, once.
    pub(crate) fn take_succession(&mut self, worker: usize) -> Option<Succeeded> {
        let at = self.successions.iter().position(|(of, _)| *of == worker)?;
        Some(self.successions.swap_remove(at).1)
    }

    /// Takes a turn with a worker's succession.
    pub(super) fn look_at_succession(&mut self, worker: usize) {
        self.leaving.retain(|child| reap(child.pid, false).is_none());
        let header = self.scene.workers[worker];
        let is_cutting = self.is_cutting;
        let member = &mut self.members[worker];
        let is_orphaned = member.child.is_none() && death::is_dead(&header.claim.word);
        let Some(succession) = &mut member.succession else { return };
        let pid = succession.child.pid;
        if header.pid.load(Ordering::Acquire) == pid as u32 {
            return self.succeed(worker);
        }
        let said = succession.hear();
        if let Some(Word::Refused(why)) = &said {
            let why = why.clone();
            return self.abandon(worker, &why);
        }
        if reap(pid, false).is_some() {
            let why = match succession.told_ns {
                None => "the successor ended before it was prepared",
                Some(_) => "the successor ended before it took over",
            };
            return self.end_succession(worker, why.into());
        }
        if is_orphaned {
            // The worker has left, and who claimed then died: perhaps an earlier successor than
            // this one. Nobody gives that claim up any more.
            return self.abandon(worker, "the successor ended before it took over");
        }
        let now = now_ns();
        match succession.told_ns {
            None if said == Some(Word::Ready) && !is_cutting => self.tell(worker),
            None if now - succession.begun_ns > PREPARING_NS => self.abandon(
                worker,
                "the successor was not prepared within 120 s, or checkpoints left it no turn",
            ),
            Some(told) if now - told > GIVING_WAY_NS => self.abandon(
                worker,
                "the worker did not come to the end of its step, or of its part of a checkpoint, \
                 within 10 s",
            ),
            _ => {}
        }
    }

    /// Tells the worker's process to give way.
    fn tell(&mut self, worker: usize) {
        let member = &mut self.members[worker];
        let (Some(child), Some(succession)) = (&member.child, &mut member.succession) else {
            return;
        };
        succession.told_ns = Some(now_ns());
        member.told = Some(child.pid);
        let word = &self.scene.control_header.give_way[worker];
        word.store(child.pid as u32, Ordering::Release);
        self.scene.wake_workers();
    }

    /// The successor has claimed: it is the worker from here on.
    fn succeed(&mut self, worker: usize) {
        self.scene.control_header.give_way[worker].store(0, Ordering::Release);
        let member = &mut self.members[worker];
        member.told = None;
        let Some(succession) = member.succession.take() else { return };
        let pid = succession.child.pid as u32;
        self.leaving.extend(member.child.replace(succession.child));
        member.program = succession.program;
        member.lives += 1;
        // The process that left may have been slow to.
        (member.due_ns, member.hung) = (None, None);
        self.successions.push((worker, Succeeded::By(pid)));
    }

    /// Whether a process of a worker that has ended had given way before, as it was told to: it
    /// left in good order, or the claim is not its own any more. (The kernel marks a claim that it
    /// had.)
    pub(super) fn has_given_way(&self, worker: usize, pid: i32, exit: Exit) -> bool {
        let claim = &self.scene.workers[worker].claim.word;
        let is_released = !death::is_dead(claim) && death::owner(claim) != pid as u32;
        self.members[worker].told == Some(pid) && (exit == Exit::Code(0) || is_released)
    }

    /// A worker has given way, and its process is waited for: its successor is about to claim, or
    /// there is none any more.
    pub(super) fn vacate(&mut self, worker: usize) {
        let member = &mut self.members[worker];
        member.child = None;
        member.told = None;
        if member.succession.is_none() {
            member.due_ns = Some(now_ns());
        }
    }

    /// Ends a succession that is not wanted any more, or cannot be.
    pub(super) fn abandon(&mut self, worker: usize, why: &str) {
        if let Some(succession) = &self.members[worker].succession {
            end(&succession.child);
            self.end_succession(worker, why.to_owned());
        }
    }

    /// The successor has ended without having become the worker, as far as its header says.
    fn end_succession(&mut self, worker: usize, why: String) {
        // Who reads it a moment before gives way all the same: `told` stays.
        self.scene.control_header.give_way[worker].store(0, Ordering::Release);
        let member = &mut self.members[worker];
        member.succession = None;
        if member.child.is_none() && member.due_ns.is_none() {
            member.due_ns = Some(now_ns());
        }
        self.successions.push((worker, Succeeded::Not(why)));
    }

    /// Waits for those that gave way; they have nothing left to do.
    pub(super) fn end_leaving(&mut self) {
        self.leaving.drain(..).for_each(|child| end(&child));
    }

    /// How long the loop may sleep.
    pub(super) fn succession_patience(&self) -> Option<Duration> {
        let is_open = self.members.iter().any(|member| member.succession.is_some());
        (is_open || !self.leaving.is_empty()).then_some(LOOK)
    }
}

impl Succession {
    /// What the successor has said, if it has: once it has, always the same.
    fn hear(&mut self) -> Option<Word> {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = self.pipe.read(&mut buffer) {
            if self.said.len() < 64 << 10 {
                self.said.extend_from_slice(&buffer[..count]);
            }
        }
        let line = self.said.split_inclusive(|byte| *byte == b'\n').next()?;
        serde_json::from_slice(line).ok()
    }
}

/// Ends a process and waits for it.
fn end(child: &Child) {
    kill(child.pid);
    reap(child.pid, true);
}
