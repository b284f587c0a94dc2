//! Orders: what comes in by the control socket while the job runs, and the answers.
//!
//! Invariants: an order is answered once, at once or when what it asked for is over; an order that
//! cannot be carried out is an error with a reason, never a broken job.
//!
//! Called by `launch`'s loop at each turn.

use super::checkpoint::Checkpointer;
use super::launch::Scene;
use super::report::{counter_sum, lowest_watermark};
use super::watch::Events;
use crate::checkpoint::history::{Kind, State};
use crate::config::Settings;
use crate::control::protocol::{Checkpoints, Order, Reply, Request, Status};
use crate::control::socket::{ControlSocket, ReplyTo};
use crate::plan::{CounterKind, Plan};
use std::sync::Arc;
use std::time::Instant;
use testudo_shm::primitive::Ordering;

/// Who waits for which checkpoint.
#[derive(Debug)]
struct Waiting {
    id: u64,
    answer: ReplyTo,
}

/// The job's control socket and what is still to be answered.
#[derive(Debug)]
pub(crate) struct Orders {
    socket: Option<ControlSocket>,
    waiting: Vec<Waiting>,
    /// A savepoint that waits for the rings to run empty.
    savepoint: Option<ReplyTo>,
    begun: Instant,
}

/// What an order may look at.
pub(crate) struct Job<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) settings: &'a Settings,
    pub(crate) scene: &'a Scene,
    pub(crate) events: &'a Events,
    pub(crate) restarts: usize,
}

impl Orders {
    /// Opens the socket. A job that cannot have one runs all the same, and says so.
    pub(crate) fn open(settings: &Settings, events: &Arc<Events>) -> Self {
        let wake = Arc::clone(events);
        let socket = ControlSocket::open(&settings.name, move || wake.bump());
        let socket = socket
            .inspect_err(|error| {
                crate::say!("testudo: no control socket: {error}; the job goes on")
            })
            .ok();
        Self { socket, waiting: Vec::new(), savepoint: None, begun: Instant::now() }
    }

    /// Takes a turn.
    pub(crate) fn look(&mut self, job: &Job<'_>, mut checkpoints: Option<&mut Checkpointer>) {
        while let Some((request, answer)) =
            self.socket.as_ref().and_then(|socket| socket.requests().try_recv().ok())
        {
            self.take(request, answer, job, checkpoints.as_deref_mut());
        }
        let Some(checkpoints) = checkpoints else { return };
        if self.savepoint.is_some() && checkpoints.is_still(job.scene) {
            self.begin(Kind::Savepoint, job, checkpoints);
        }
        self.answer(job, checkpoints);
    }

    fn take(
        &mut self,
        request: Request,
        answer: ReplyTo,
        job: &Job<'_>,
        checkpoints: Option<&mut Checkpointer>,
    ) {
        let Some(checkpoints) = checkpoints else {
            return answer.send(match request {
                Request::Status => Reply::Status(Box::new(self.status(job, None))),
                _ => Reply::error("this job takes no checkpoints; start it with --checkpoint-dir"),
            });
        };
        match request {
            Request::Status => {
                answer.send(Reply::Status(Box::new(self.status(job, Some(checkpoints)))));
            }
            Request::Savepoint if self.savepoint.is_some() || checkpoints.is_pausing() => {
                answer.send(Reply::error("a savepoint is being taken; ask again when it is done"));
            }
            Request::Savepoint => {
                self.savepoint = Some(answer);
                checkpoints.pause_sources(job.scene);
            }
            Request::Checkpoint { order: Order::Now } => {
                match checkpoints.take(Kind::Regional, job.plan, job.scene) {
                    Ok(id) => self.waiting.push(Waiting { id, answer }),
                    Err(why) => answer.send(Reply::error(why)),
                }
            }
            Request::Checkpoint { order: Order::Schedule(schedule) } => {
                checkpoints.set_schedule(schedule.clone());
                answer.send(Reply::Schedule { schedule, next_in_ms: checkpoints.next_in_ms() });
            }
            Request::Checkpoint { order: Order::History } => answer.send(Reply::History {
                schedule: checkpoints.schedule().clone(),
                checkpoints: checkpoints.history().records().cloned().collect(),
            }),
        }
    }

    fn begin(&mut self, kind: Kind, job: &Job<'_>, checkpoints: &mut Checkpointer) {
        let Some(answer) = self.savepoint.take() else { return };
        match checkpoints.take(kind, job.plan, job.scene) {
            Ok(id) => self.waiting.push(Waiting { id, answer }),
            // Another one is being sealed: this one comes next.
            Err(_) => self.savepoint = Some(answer),
        }
    }

    /// Answers whoever waited for a checkpoint that is over.
    fn answer(&mut self, job: &Job<'_>, checkpoints: &mut Checkpointer) {
        for Waiting { id, answer } in std::mem::take(&mut self.waiting) {
            let records = checkpoints.history().records();
            let record = records.rev().find(|record| record.id == id).cloned();
            match record {
                Some(record) if record.state == State::Open => {
                    self.waiting.push(Waiting { id, answer });
                }
                Some(record) => {
                    let is_complete = record.state == State::Complete;
                    let is_savepoint = record.kind == Kind::Savepoint;
                    if is_savepoint {
                        checkpoints.resume_sources(job.scene);
                    }
                    let folder = job.settings.checkpoint_dir.as_ref();
                    let letter = if is_savepoint { 's' } else { 'c' };
                    let path = folder.map(|folder| folder.join(format!("{letter}{id}.manifest")));
                    let path = path.filter(|_| is_complete);
                    answer.send(Reply::Taken { checkpoint: record, path });
                }
                None => answer.send(Reply::error(format!("checkpoint {id} is forgotten"))),
            }
        }
    }

    fn status(&self, job: &Job<'_>, checkpoints: Option<&Checkpointer>) -> Status {
        let sum = |kind, counter| counter_sum(job.plan, job.scene, kind, counter);
        Status {
            name: self.socket.as_ref().map_or_else(String::new, |socket| socket.name().into()),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            is_draining: job.events.signals.load(Ordering::Acquire) > 0,
            workers: job.plan.workers,
            elapsed_s: self.begun.elapsed().as_secs_f64(),
            records_in: sum("source", CounterKind::Out),
            records_out: sum("sink", CounterKind::In),
            late: sum("", CounterKind::Late),
            rejected: sum("", CounterKind::Rejected),
            dropped: sum("", CounterKind::Dropped),
            watermark_ms: lowest_watermark(job.plan, job.scene),
            restarts: job.restarts,
            checkpoints: checkpoints.map(|checkpoints| Checkpoints {
                folder: job.settings.checkpoint_dir.clone().unwrap_or_default(),
                schedule: checkpoints.schedule().clone(),
                next_in_ms: checkpoints.next_in_ms(),
                regions: job.plan.regions.count(),
                completed: checkpoints.history().completed(),
                failed: checkpoints.history().failed(),
                newest: checkpoints.history().newest().cloned(),
            }),
        }
    }
}
