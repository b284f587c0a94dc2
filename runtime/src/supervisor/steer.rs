//! Steering: what the control socket asks for besides checkpoints: a worker killed for a drill, the
//! job paused, resumed, stopped, its workers renewed, its program replaced.
//!
//! Invariants: what is asked for lies in the control segment, not here, so a worker's death or a
//! new supervisor changes nothing about it; every request is answered once.
//!
//! `orders` hands requests over; `launch`'s loop gives it a turn after that.

use super::launch::Scene;
use super::orders::Job;
use super::recover::Crew;
use super::renew::Restart;
use super::update::{Past, Update};
use super::upgrade::Upgrade;
use super::watch::Watch;
use crate::control::protocol::{Reply, Request, UpdateStatus};
use crate::control::socket::ReplyTo;
use crate::keeper;
use crate::time::now_ns;
use std::path::PathBuf;
use std::time::Duration;
use testudo_shm::header::control;
use testudo_shm::primitive::Ordering;

/// Nothing moves any more when nothing was committed for so long.
const STILL_NS: u64 = 20_000_000;

/// Longest wait for that, before the answer says that something still moves.
const PATIENCE_NS: u64 = 30_000_000_000;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// The same while workers are renewed.
const RENEWING: Duration = Duration::from_millis(1);

/// Whether sources take nothing because somebody asked for it.
pub(crate) fn is_paused(scene: &Scene) -> bool {
    scene.control_header.control.load(Ordering::Acquire) & control::HOLD != 0
}

/// Who waits for the job to stand still.
#[derive(Debug)]
struct Pausing {
    answer: ReplyTo,
    begun_ns: u64,
    /// Commits of all workers, and since when there were so many.
    commits: u64,
    since_ns: u64,
}

/// What is being carried out.
#[derive(Debug, Default)]
pub(crate) struct Steer {
    pausing: Vec<Pausing>,
    /// Workers to be killed.
    drills: Vec<(usize, ReplyTo)>,
    restart: Option<Restart>,
    /// Where the program to update to is.
    wanted: Option<(PathBuf, ReplyTo)>,
    update: Option<Update>,
    /// The program that is to lead, or what lies now where this one was started from.
    leader: Option<(Option<PathBuf>, ReplyTo)>,
    upgrade: Option<Upgrade>,
    /// How the latest update ended.
    updated: Option<UpdateStatus>,
}

impl Steer {
    /// Takes a request that is not about checkpoints; gives others back.
    pub(crate) fn take(
        &mut self,
        request: Request,
        answer: ReplyTo,
        job: &Job<'_>,
    ) -> Option<(Request, ReplyTo)> {
        match request {
            Request::KillWorker { worker } => match no_worker(job, worker) {
                Some(error) => answer.send(error),
                None => self.drills.push((worker, answer)),
            },
            Request::Restart { worker } => {
                self.begin_restart(worker, answer, job);
            }
            Request::Update { program } => self.begin_update(program, answer, job),
            Request::UpgradeSupervisor { program } => match self.is_renewing() {
                Some(error) => answer.send(error),
                None if keeper::line().is_none() => answer.send(Reply::error(
                    "this job is inside another program; its supervisor is a thread of that",
                )),
                None => self.leader = Some((program, answer)),
            },
            Request::Pause => {
                job.scene.set_control(control::HOLD);
                let begun_ns = now_ns();
                self.pausing.push(Pausing { answer, begun_ns, commits: 0, since_ns: begun_ns });
            }
            Request::Resume => {
                let was_paused = is_paused(job.scene);
                job.scene.clear_control(control::HOLD);
                answer.send(Reply::Resumed { was_paused });
                for pausing in self.pausing.drain(..) {
                    pausing.answer.send(Reply::error("the job was told to go on meanwhile"));
                }
            }
            Request::Stop { now } => {
                answer.send(Reply::Stopping { now });
                job.events.stop(now);
            }
            other => return Some((other, answer)),
        }
        None
    }

    fn begin_restart(&mut self, worker: Option<usize>, answer: ReplyTo, job: &Job<'_>) {
        if let Some(error) = worker.and_then(|worker| no_worker(job, worker)) {
            return answer.send(error);
        }
        if let Some(error) = self.is_renewing() {
            return answer.send(error);
        }
        let all = 0..job.plan.workers;
        let workers = all.filter(|index| worker.is_none_or(|only| only == *index));
        self.restart = Some(Restart::new(answer, workers));
    }

    fn begin_update(&mut self, program: PathBuf, answer: ReplyTo, job: &Job<'_>) {
        if let Some(error) = self.is_renewing() {
            return answer.send(error);
        }
        if !job.is_program {
            return answer.send(Reply::error(
                "this job is inside another program; only programs of testudo::main can be updated",
            ));
        }
        self.wanted = Some((program, answer));
    }

    /// What a second renewal gets.
    fn is_renewing(&self) -> Option<Reply> {
        if self.restart.is_some() {
            return Some(Reply::error("workers are being restarted; ask again when it is done"));
        }
        if self.upgrade.is_some() || self.leader.is_some() {
            return Some(Reply::error("another supervisor is being brought; ask again then"));
        }
        (self.update.is_some() || self.wanted.is_some()).then(|| {
            Reply::error("the job is being updated; ask again when it is done (testudo status)")
        })
    }

    /// How the latest update goes, or went.
    pub(crate) fn update_status(&self) -> Option<UpdateStatus> {
        self.update.as_ref().map(Update::status).or_else(|| self.updated.clone())
    }

    fn look_at_update(&mut self, crew: &mut Crew<'_>, watch: &Watch, past: Past<'_>) {
        if let Some((program, answer)) = self.wanted.take() {
            self.update = Some(Update::begin(answer, program, crew));
        }
        let Some(update) = self.update.take() else { return };
        let Past { mut checkpoints, has_folder } = past;
        let past = Past { checkpoints: checkpoints.as_deref_mut(), has_folder };
        match update.look(crew, watch, past) {
            Ok(update) => self.update = Some(update),
            Err(ended) => {
                self.updated = Some(ended);
                checkpoints.into_iter().for_each(|own| own.hold(false));
            }
        }
    }

    /// Takes a turn.
    pub(crate) fn look(&mut self, crew: &mut Crew<'_>, watch: &Watch, past: Past<'_>) {
        for (worker, answer) in self.drills.drain(..) {
            answer.send(match crew.kill_worker(worker) {
                Some(pid) => Reply::Killed { worker, pid },
                None => Reply::error(format!("worker {worker} is being replaced at the moment")),
            });
        }
        if !self.pausing.is_empty() {
            self.answer_still(crew.scene);
        }
        self.restart = self.restart.take().and_then(|restart| restart.look(crew, watch));
        self.look_at_update(crew, watch, past);
        if let Some((program, answer)) = self.leader.take() {
            self.upgrade = Upgrade::begin(program, answer, crew);
        }
        if let (Some(upgrade), Some(line)) = (self.upgrade.take(), keeper::line()) {
            self.upgrade = upgrade.look(crew, line);
        }
    }

    /// Answers whoever waits for the job to stand still, once it does.
    fn answer_still(&mut self, scene: &Scene) {
        let now = now_ns();
        let headers = scene.workers.iter();
        let commits = headers.map(|header| header.commits.load(Ordering::Acquire)).sum();
        for mut pausing in std::mem::take(&mut self.pausing) {
            if commits != pausing.commits {
                (pausing.commits, pausing.since_ns) = (commits, now);
            }
            let still = now - pausing.since_ns > STILL_NS;
            if still || now - pausing.begun_ns > PATIENCE_NS {
                pausing.answer.send(Reply::Paused { still });
            } else {
                self.pausing.push(pausing);
            }
        }
    }

    /// How long the loop may sleep.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let is_renewing = self.restart.is_some() || self.update.is_some() || self.upgrade.is_some();
        let soon = is_renewing.then_some(RENEWING);
        soon.or((!self.pausing.is_empty()).then_some(LOOK))
    }
}

/// What a request gets that names a worker that there is not.
fn no_worker(job: &Job<'_>, worker: usize) -> Option<Reply> {
    let workers = job.plan.workers;
    (worker >= workers).then(|| {
        Reply::error(format!(
            "there is no worker {worker}: the job has workers 0 to {}",
            workers - 1
        ))
    })
}
