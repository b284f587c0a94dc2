//! The workers of a supervisor that died: who lives is watched, who has died meanwhile is replaced,
//! who was only being started is ended.
//!
//! Invariants: a worker is believed to live only when its claim names a process that has not died
//! (R1), whose id and start time are those in its header, and whose parent is the keeper;
//! everything else of an earlier supervisor's is killed before a successor is started (R2). Nobody
//! is signalled by number: an adopted process is the keeper's to wait for, so its number may be
//! another's.
//!
//! Called by `launch::adopt`, after the reign was taken.

use super::{Crew, Member};
use crate::config::Settings;
use crate::error::Error;
use crate::keeper::{self, Line};
use crate::plan::Plan;
use crate::supervisor::chronicle::Past;
use crate::supervisor::ladder::Account;
use crate::supervisor::launch::Scene;
use crate::supervisor::program::Program;
use crate::supervisor::report::Restart;
use crate::supervisor::spawn::{Child, Spawner};
use crate::supervisor::watch::Watch;
use crate::time::now_ns;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::{Duration, Instant};
use testudo_shm::death;
use testudo_shm::header::{WorkerHeader, WorkerState, control};
use testudo_shm::primitive::Ordering;

/// How long a worker may take between its claim and its name.
const NAMING: Duration = Duration::from_secs(1);

/// Whose a worker's segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// Nobody has ever claimed it.
    Nobody,
    /// This process works on it.
    Lives(i32),
    /// This process has died.
    Died(i32),
    /// All was done, and its worker has left.
    Left,
}

/// Finds out whose a segment is. Once the reign is taken, it can only become nobody's.
fn owner(header: &WorkerHeader, is_leaving: bool) -> Owner {
    let until = Instant::now() + NAMING;
    loop {
        let claim = &header.claim.word;
        let is_dead = death::is_dead(claim);
        let by = death::owner(claim).cast_signed();
        let named = header.pid.load(Ordering::Acquire).cast_signed();
        let is_finished = header.state.load(Ordering::Acquire) == WorkerState::Finished as u32;
        if named == 0 && (is_dead || by == 0) {
            return Owner::Nobody;
        }
        if is_dead || by == 0 {
            return if is_finished && is_leaving { Owner::Left } else { Owner::Died(named) };
        }
        if by == named {
            return Owner::Lives(by);
        }
        // It has just claimed: it names itself, or sees the new reign and gives way, or dies.
        if Instant::now() > until {
            return Owner::Died(by);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

impl<'a> Crew<'a> {
    /// The crew of an earlier supervisor.
    pub(crate) fn adopt(
        plan: &'a Plan,
        settings: &'a Settings,
        scene: &'a Scene,
        watch: &Watch,
        spawner: Spawner,
        (line, past): (&Line, &Past),
    ) -> Result<Self, Error> {
        let mut crew = Self::unborn(plan, settings, scene, spawner, 0);
        crew.restarts = past.restarts.clone();
        crew.annals.go_on(&past.restarts);
        crew.care.go_on(plan, scene);
        let is_leaving = scene.control_header.control.load(Ordering::Acquire) & control::LEAVE != 0;
        let mut living = Vec::new();
        let mut programs = vec![None; plan.workers];
        for (worker, program) in programs.iter_mut().enumerate() {
            // Nobody is prepared for it any more.
            scene.control_header.give_way[worker].store(0, Ordering::Release);
            let owner = owner(scene.workers[worker], is_leaving);
            if let Some((commits, account)) = past.accounts.get(&worker) {
                crew.members[worker].commits = *commits;
                crew.members[worker].ladder.go_on(account);
            }
            crew.note_missed(worker, owner);
            match owner {
                Owner::Nobody => crew.members[worker].due_ns = Some(0),
                Owner::Left => {}
                Owner::Lives(pid) | Owner::Died(pid) => {
                    if owner == Owner::Lives(pid) {
                        living.push(pid);
                        *program = Program::of_process(pid).map(Rc::new);
                    }
                    let child = crew.hold(worker, pid, line)?;
                    if past.has_noted(pid) {
                        // Its death was seen, its successor was not.
                        super::kill(pid);
                        crew.members[worker].due_ns = Some(0);
                        continue;
                    }
                    watch.watch_process(child.pidfd.as_raw_fd())?;
                    crew.members[worker].child = Some(child);
                }
            }
        }
        // The number of one that has died may be anybody's by now: it ran what the others run.
        let known = programs.iter().flatten().next().cloned();
        for (member, program) in crew.members.iter_mut().zip(programs) {
            if let Some(program) = program.or_else(|| known.clone()) {
                member.program = program;
            }
        }
        end_strays(line, &living)?;
        Ok(crew)
    }

    /// Holds a process by a descriptor that means it and no other.
    fn hold(&mut self, worker: usize, pid: i32, line: &Line) -> Result<Child, Error> {
        let header = self.scene.workers[worker];
        let keeper = line.role().keeper;
        let known = (keeper, header.started.load(Ordering::Acquire));
        // Opened before it is looked at: what is read then belongs to the process that is held.
        let held = Child::open(pid).filter(|_| {
            let now = keeper::stat(&pid.to_string());
            now.is_some_and(|now| now == known || (known.1 == 0 && now.0 == keeper))
        });
        let child = held.map_or_else(|| Child::gone(pid), Ok)?;
        let again = child.pidfd.try_clone();
        let again = again.map_err(|e| Error::Machine(format!("worker {worker}: {e}")))?;
        line.adopt(pid, again);
        Ok(child)
    }

    /// Notes deaths that the earlier supervisor saw, or nobody did, and that it could not note any
    /// more: each life but the last has ended.
    fn note_missed(&mut self, worker: usize, owner: Owner) {
        let header = self.scene.workers[worker];
        let lives = header.incarnation.load(Ordering::Acquire);
        let known = |restart: &&Restart| restart.worker == worker;
        let noted = self.restarts.iter().filter(known).count() as u64;
        let present = header.pid.load(Ordering::Acquire);
        let is_noted = self.restarts.iter().any(|r| r.worker == worker && r.pid == present);
        let ended = if is_noted || owner == Owner::Nobody { lives } else { lives.max(1) - 1 };
        // Who gave way to a successor has not died.
        let noted = noted + header.gave_way.load(Ordering::Acquire);
        for life in noted..ended {
            self.restarts.push(Restart {
                worker,
                life: life + 1,
                cause: "unknown: the supervisor had died".into(),
                seen_ns: now_ns(),
                ..Restart::default()
            });
        }
        let member: &mut Member = &mut self.members[worker];
        member.lives = lives.max(noted);
    }

    /// The job's plan.
    pub(crate) fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// Commits of a worker at its latest death, and how its deaths count.
    pub(crate) fn account(&self, worker: usize) -> (u64, Account) {
        let member = &self.members[worker];
        (member.commits, member.ladder.account())
    }
}

impl Past {
    /// Whether the death of a process was noted.
    fn has_noted(&self, pid: i32) -> bool {
        self.restarts.iter().any(|restart| restart.pid == pid.cast_unsigned())
    }
}

/// Ends what an earlier supervisor started and what owns nothing: a worker that was about to claim,
/// or one that waits for a death.
fn end_strays(line: &Line, living: &[i32]) -> Result<(), Error> {
    let own = std::process::id().cast_signed();
    let keeper = line.role().keeper;
    for pid in keeper::children_of(keeper) {
        if pid == own || living.contains(&pid) {
            continue;
        }
        if let Some(child) = Child::open(pid)
            && keeper::stat(&pid.to_string()).is_some_and(|(parent, _)| parent == keeper)
        {
            let again = child.pidfd.try_clone();
            line.adopt(pid, again.map_err(|e| Error::Machine(format!("process {pid}: {e}")))?);
            line.kill(pid);
        }
    }
    Ok(())
}
