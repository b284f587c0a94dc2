//! All that a running job can tell in numbers: what `testudo status --json` shows and `/metrics`
//! serves.
//!
//! Invariants: what is called a number since the job began never goes back, also when workers die
//! and take back their open step, or begin anew; rates are of the last seconds.
//!
//! Made by `supervisor/board`; read by whoever asks.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The numbers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Name of the job.
    pub job: String,
    /// Seconds since it began.
    pub uptime_s: f64,
    /// By worker.
    pub workers: Vec<WorkerFigures>,
    /// By operator and the worker that runs it: what is counted there.
    pub operators: Vec<OperatorFigures>,
    /// By exchange and worker.
    pub edges: Vec<EdgeFigures>,
    /// The job's own counters, by worker.
    pub counters: Vec<UserFigure>,
    /// Deaths of workers, by cause; those whose cause is still to be found out are not among them.
    pub restarts: BTreeMap<String, u64>,
    /// Deaths of workers, in all.
    pub restarts_total: u64,
    /// How long it took until successors had attached.
    pub recovery: RecoveryFigures,
    /// Checkpoints, where the job takes any.
    pub checkpoints: Option<CheckpointFigures>,
    /// Systems outside of the job.
    pub external: Vec<External>,
    /// Replicas, by worker of tier 1.
    pub replicas: Vec<ReplicaFigures>,
}

/// What the replicas of a worker have done, all of its processes one after the other together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicaFigures {
    /// The worker.
    pub worker: usize,
    /// Whether a replica follows at the moment.
    pub follows: bool,
    /// Steps that were followed.
    pub steps: u64,
    /// Comparisons with the worker.
    pub checks: u64,
    /// Comparisons that found a difference.
    pub mismatches: u64,
    /// How often a replica could not keep up and was left behind.
    pub left_behind: u64,
    /// Bytes of the worker's journal that are still to be read.
    pub behind_bytes: u64,
    /// Bytes of state of the latest copy.
    pub state_bytes: u64,
    /// Microseconds for which the worker stood still for it.
    pub stood_us: u64,
}

impl ReplicaFigures {
    /// A line of the report, where there is something to report.
    pub(crate) fn words(&self) -> Option<String> {
        let Self { worker, mismatches, checks, .. } = self;
        (*mismatches > 0).then(|| {
            format!(
                "  worker {worker} and its replica differed {mismatches} times in {checks} \
                 comparisons\n"
            )
        })
    }
}

/// A worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerFigures {
    /// Its number.
    pub worker: usize,
    /// What it is doing: attaching, running, waiting, finished, failed.
    pub state: String,
    /// Its process.
    pub pid: u32,
    /// Which of its lives this is, from 1.
    pub life: u64,
    /// Steps that were committed.
    pub commits: u64,
    /// Milliseconds of a second that it was busy, idle, without room, waiting for the outside.
    pub busy_ms_per_s: f64,
    /// See `busy_ms_per_s`.
    pub idle_ms_per_s: f64,
    /// See `busy_ms_per_s`.
    pub back_pressured_ms_per_s: f64,
    /// See `busy_ms_per_s`.
    pub waiting_ms_per_s: f64,
    /// The same since the job began, in milliseconds.
    pub busy_ms: u64,
    /// See `busy_ms`.
    pub idle_ms: u64,
    /// See `busy_ms`.
    pub back_pressured_ms: u64,
    /// See `busy_ms`.
    pub waiting_ms: u64,
    /// Lowest watermark that it has noted, milliseconds since 1970.
    pub watermark_ms: Option<i64>,
    /// Records that its sources have read and its sinks have written.
    pub records_in: u64,
    /// See `records_in`.
    pub records_out: u64,
    /// Records of the same a second.
    pub records_in_per_s: f64,
    /// See `records_in_per_s`.
    pub records_out_per_s: f64,
    /// Bytes taken from rings of other workers and put into rings to them.
    pub bytes_in: u64,
    /// See `bytes_in`.
    pub bytes_out: u64,
    /// Bytes of the same a second.
    pub bytes_in_per_s: f64,
    /// See `bytes_in_per_s`.
    pub bytes_out_per_s: f64,
}

/// What an operator has counted in one worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OperatorFigures {
    /// Its name.
    pub operator: String,
    /// Its uid.
    pub uid: String,
    /// What it is: source, sink, and so on.
    pub kind: String,
    /// The worker.
    pub worker: usize,
    /// Numbers by what was counted, such as `records_in`.
    pub counts: BTreeMap<String, u64>,
    /// The same a second.
    pub per_s: BTreeMap<String, f64>,
}

/// What one worker has sent and taken on an exchange.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EdgeFigures {
    /// Kind and number of the exchange, such as `hash-0`.
    pub edge: String,
    /// The worker; empty for the launching process.
    pub worker: Option<usize>,
    /// Records that it has sent, whatever became of them.
    pub sent: u64,
    /// Records that it has taken.
    pub taken: u64,
    /// Records that it has not sent after all, since the consumer was dead.
    pub dropped: u64,
    /// Of those that it has taken: put aside.
    pub dead_lettered: u64,
    /// Bytes that it has put into rings to others.
    pub bytes_out: u64,
    /// Bytes that it has taken from others' rings.
    pub bytes_in: u64,
    /// Bytes that lie in its rings from others, not taken yet.
    pub backlog_bytes: u64,
    /// The fullest of these rings: 0 empty, 1 full.
    pub fill: f64,
}

/// A counter of the job's own in one worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserFigure {
    /// Its name.
    pub name: String,
    /// The worker.
    pub worker: usize,
    /// What was counted.
    pub value: u64,
}

/// Recoveries.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecoveryFigures {
    /// How many are over.
    pub count: u64,
    /// All of them together, microseconds.
    pub sum_us: u64,
    /// The latest, microseconds.
    pub last_us: Option<u64>,
}

/// Checkpoints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointFigures {
    /// How many were completed.
    pub completed: u64,
    /// How many failed.
    pub failed: u64,
    /// Number of the latest complete one.
    pub last_id: Option<u64>,
    /// How long it took, microseconds.
    pub last_duration_us: u64,
    /// Bytes that were written for it.
    pub last_bytes: u64,
    /// Bytes of it that were in flight.
    pub last_in_flight_bytes: u64,
    /// Failures by region.
    pub failures_by_region: Vec<u64>,
    /// The folder that they go to at the moment.
    pub folder: String,
}

/// How a system outside of the job is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExternalState {
    /// It works.
    #[default]
    Ok,
    /// It refuses, and the job goes on without it.
    Failing,
    /// It refuses, and what needs it waits.
    Waiting,
}

/// A file, folder, disk or stream outside of the job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct External {
    /// What it is: `output out.csv`, `checkpoint folder ck`.
    pub name: String,
    /// The worker that says so; empty for the launching process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<usize>,
    /// How it is.
    pub state: ExternalState,
    /// Since when, milliseconds since 1970.
    pub since_ms: u64,
    /// What was wrong last; empty if nothing was.
    pub last_error: String,
    /// Tries that failed, in all.
    pub retries: u64,
}

impl External {
    /// A try failed: the error, and whether somebody waits.
    pub(crate) fn failed(&mut self, state: ExternalState, error: String) {
        if self.state == ExternalState::Ok {
            self.since_ms = crate::time::unix_ms().unsigned_abs();
        }
        (self.state, self.last_error) = (state, error);
        self.retries += 1;
    }

    /// It works again.
    pub(crate) fn works(&mut self) {
        if self.state != ExternalState::Ok || self.since_ms == 0 {
            self.state = ExternalState::Ok;
            self.since_ms = crate::time::unix_ms().unsigned_abs();
        }
    }
}
