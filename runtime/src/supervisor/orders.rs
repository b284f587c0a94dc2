//! Orders: what comes in by the control socket while the job runs, and the answers.
//!
//! Invariants: an order is answered once, at once or when what it asked for is over; an order that
//! cannot be carried out is an error with a reason, never a broken job.
//!
//! Called by `launch`'s loop at each turn.

use super::annals::{self, Annals};
use super::board::Board;
use super::checkpoint::Checkpointer;
use super::launch::Scene;
use super::report::{Restart, counter_sum, lowest_watermark, promise};
use super::steer::{Steer, is_paused};
use super::watch::Events;
use crate::checkpoint::history::{Kind, State};
use crate::config::Settings;
use crate::control::protocol::{Checkpoints, Order, Reply, Request, Status, UpdateStatus};
use crate::control::socket::{ControlSocket, Kept, ReplyTo};
use crate::error::Error;
use crate::exchange::account::accounts;
use crate::keeper::{self, Line};
use crate::plan::{CounterKind, Plan};
use crate::time::now_ns;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
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
    begun_ns: u64,
    /// Where metrics are served.
    pub(crate) metrics: Option<SocketAddr>,
}

/// What an order may look at.
pub(crate) struct Job<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) scene: &'a Scene,
    pub(crate) events: &'a Events,
    pub(crate) annals: &'a Annals,
    /// The program is the job, so that another one can take its place.
    pub(crate) is_program: bool,
    pub(crate) update: Option<UpdateStatus>,
    pub(crate) restarts: &'a [Restart],
    /// Standbys: ready, and in all.
    pub(crate) standbys: (usize, usize),
    pub(crate) board: &'a Board,
}

impl Orders {
    /// Opens the socket. A job that cannot have one runs all the same, and says so.
    pub(crate) fn open(
        settings: &Settings,
        events: &Arc<Events>,
        begun_ns: u64,
        line: Option<&Line>,
    ) -> Self {
        let wake = Arc::clone(events);
        let socket = ControlSocket::open(&settings.name, move || wake.bump());
        let socket = socket.and_then(|mut socket| {
            socket.keep(line)?;
            Ok(socket)
        });
        Self::with(socket, begun_ns)
    }

    /// Goes on with the socket of an earlier supervisor: nobody who asked meanwhile was refused.
    pub(crate) fn adopt(kept: Kept, events: &Arc<Events>, begun_ns: u64) -> Self {
        let wake = Arc::clone(events);
        Self::with(ControlSocket::adopt(kept, move || wake.bump()), begun_ns)
    }

    fn with(socket: Result<ControlSocket, Error>, begun_ns: u64) -> Self {
        let socket = socket
            .inspect_err(|error| {
                crate::say!("testudo: no control socket: {error}; the job goes on")
            })
            .ok();
        Self { socket, waiting: Vec::new(), savepoint: None, begun_ns, metrics: None }
    }

    /// What a later supervisor needs to go on with the socket.
    pub(crate) fn kept(&self) -> Option<Kept> {
        self.socket.as_ref().and_then(ControlSocket::kept)
    }

    /// Takes a turn.
    pub(crate) fn look(
        &mut self,
        job: &Job<'_>,
        steer: &mut Steer,
        mut checkpoints: Option<&mut Checkpointer>,
    ) {
        while let Some((request, answer)) =
            self.socket.as_ref().and_then(|socket| socket.requests().try_recv().ok())
        {
            if let Some((request, answer)) = steer.take(request, answer, job) {
                self.take(request, answer, job, checkpoints.as_deref_mut());
            }
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
        if request == Request::Postmortem {
            return tell(job.annals, answer);
        }
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
            Request::Postmortem => {}
            Request::Savepoint if checkpoints.held().is_some() => {
                answer.send(Reply::error(checkpoints.held().unwrap_or_default()));
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
            // `steer` has taken all others.
            _ => answer.send(Reply::error("this job does not know what that is")),
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
                    let folder = checkpoints.folder();
                    let letter = if is_savepoint { 's' } else { 'c' };
                    let path = is_complete.then(|| folder.join(format!("{letter}{id}.manifest")));
                    answer.send(Reply::Taken { checkpoint: record, path });
                }
                None => answer.send(Reply::error(format!("checkpoint {id} is forgotten"))),
            }
        }
    }

    fn status(&self, job: &Job<'_>, checkpoints: Option<&Checkpointer>) -> Status {
        let sum = |kind, counter| counter_sum(job.plan, job.scene, kind, counter);
        job.board.tell(job.restarts, checkpoints.map(Checkpointer::figures));
        let edges = accounts(job.plan, job.scene);
        Status {
            name: self.socket.as_ref().map_or_else(String::new, |socket| socket.name().into()),
            pid: keeper::job(),
            supervisor: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            is_draining: job.events.signals.load(Ordering::Acquire) > 0,
            is_paused: is_paused(job.scene),
            update: job.update.clone(),
            workers: job.plan.workers,
            elapsed_s: Duration::from_nanos(now_ns() - self.begun_ns).as_secs_f64(),
            records_in: sum("source", CounterKind::Out),
            records_out: sum("sink", CounterKind::In),
            late: sum("", CounterKind::Late),
            rejected: sum("", CounterKind::Rejected),
            dropped: sum("", CounterKind::Dropped),
            watermark_ms: lowest_watermark(job.plan, job.scene),
            dead_lettered: sum("", CounterKind::DeadLettered),
            events: job.annals.events().to_vec(),
            restarts: job.restarts.len(),
            standbys_ready: job.standbys.0,
            standbys: job.standbys.1,
            metrics: self.metrics.map(|address| format!("http://{address}/metrics")),
            figures: Some(job.board.figures()),
            slo: Some(promise(job.plan, job.scene, &edges, job.restarts)),
            edges,
            checkpoints: checkpoints.map(|checkpoints| Checkpoints {
                folder: checkpoints.folder().to_owned(),
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

/// Answers with the annals, from a thread of its own: finding the names of a stack takes longer
/// than the supervisor's loop may wait.
fn tell(annals: &Annals, answer: ReplyTo) {
    let (entries, events) = (annals.entries().to_vec(), annals.events().to_vec());
    std::thread::spawn(move || {
        let deaths = annals::with_backtraces(entries);
        answer.send(Reply::Postmortem { deaths, events });
    });
}
