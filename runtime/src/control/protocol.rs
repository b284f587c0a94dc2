//! What is said over the control socket: one JSON object a line in each direction.
//!
//! ```text
//! {"request":"status"}
//! {"request":"checkpoint","order":"now"}
//! {"request":"checkpoint","order":{"schedule":"5s"}}      "never", "200ms", "0 * * * *"
//! {"request":"checkpoint","order":"history"}
//! {"request":"savepoint"}
//! {"request":"postmortem"}
//! {"request":"kill-worker","worker":1}
//! {"request":"restart","worker":1}                         without one: all, one after the other
//! {"request":"update","program":"/opt/jobs/flights-2"}
//! {"request":"pause"}
//! {"request":"resume"}
//! {"request":"stop","now":false}
//! ```
//!
//! Replies carry the request's answer under `reply`, or `{"reply":"error","message":…}`. Readers
//! leave fields that they do not know alone: job and tool may be of different builds.
//!
//! Called by both ends.

use super::history::{Event, PostMortem};
use crate::checkpoint::history::Record;
use crate::checkpoint::schedule::Schedule;
use crate::exchange::account::EdgeAccount;
use crate::metrics::figures::Figures;
use crate::slo::Promise;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Longest request in bytes, its line end included.
pub const REQUEST_MAX: usize = 16 << 10;

/// Longest reply that a client takes, in bytes.
pub const REPLY_MAX: usize = 16 << 20;

/// What a job can be asked and told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How is it going? Answered with [`Reply::Status`].
    Status,
    /// About checkpoints.
    Checkpoint {
        /// What about them.
        order: Order,
    },
    /// How did workers die? Answered with [`Reply::Postmortem`].
    Postmortem,
    /// Take a savepoint now; answered with [`Reply::Taken`] when it is complete or has failed.
    Savepoint,
    /// End a worker's process by SIGKILL, to see it replaced; answered with [`Reply::Killed`].
    KillWorker {
        /// Which worker.
        worker: usize,
    },
    /// Replace a worker, or all of them one after the other, by a new process of the same program
    /// between two steps; answered with [`Reply::Restarted`].
    Restart {
        /// Which worker; all, when none is named.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        worker: Option<usize>,
    },
    /// Let another program take the job over, worker by worker; answered with [`Reply::Updated`].
    Update {
        /// Its file, as an absolute path.
        program: PathBuf,
    },
    /// Let another program lead the job, while its workers go on; answered with
    /// [`Reply::Upgrading`].
    UpgradeSupervisor {
        /// Its file, as an absolute path; without one, what lies where the present one was started.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        program: Option<PathBuf>,
    },
    /// Sources take nothing more until they are told to go on. Answered with [`Reply::Paused`]
    /// once all that they had taken is processed.
    Pause,
    /// Sources go on; answered with [`Reply::Resumed`].
    Resume,
    /// The job ends: what sources have taken is processed first, unless it is to be now. Answered
    /// with [`Reply::Stopping`].
    Stop {
        /// At once, as a second Ctrl-C does.
        #[serde(default)]
        now: bool,
    },
}

/// What to do about checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Take one; answered with [`Reply::Taken`] when it is complete or has failed.
    Now,
    /// Take them at these times from now on; answered with [`Reply::Schedule`].
    Schedule(Schedule),
    /// What became of the latest ones? Answered with [`Reply::History`].
    History,
}

impl Request {
    /// How long the job may take to answer.
    #[must_use]
    pub fn patience(&self) -> Duration {
        match self {
            // The disk may be slow, and a region's cut may be begun twice.
            Self::Savepoint | Self::Checkpoint { order: Order::Now } => Duration::from_secs(900),
            // The names in a large program's stack take a while to be found.
            Self::Postmortem => Duration::from_secs(60),
            Self::Pause => Duration::from_secs(60),
            Self::Restart { .. } | Self::Update { .. } => Duration::from_secs(3600),
            Self::UpgradeSupervisor { .. } => Duration::from_secs(60),
            Self::Status
            | Self::Checkpoint { .. }
            | Self::KillWorker { .. }
            | Self::Resume
            | Self::Stop { .. } => Duration::from_secs(10),
        }
    }
}

/// What a job answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// How it is going.
    Status(Box<Status>),
    /// A checkpoint or savepoint was taken, or failed: the record says so.
    Taken {
        /// What became of it.
        checkpoint: Record,
        /// Where it can be resumed from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
    },
    /// The schedule that holds from now on.
    Schedule {
        /// The schedule.
        schedule: Schedule,
        /// Until the next checkpoint, milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        next_in_ms: Option<u64>,
    },
    /// The latest checkpoints, oldest first.
    History {
        /// The schedule.
        schedule: Schedule,
        /// One record each.
        checkpoints: Vec<Record>,
    },
    /// Deaths and what followed, oldest first.
    Postmortem {
        /// One for each death; of many, the first and the latest ones.
        deaths: Vec<PostMortem>,
        /// What was done about them.
        events: Vec<Event>,
    },
    /// A worker's process got SIGKILL.
    Killed {
        /// The worker.
        worker: usize,
        /// The process that it was.
        pid: u32,
    },
    /// Workers were replaced by new processes of the same program.
    Restarted {
        /// Each of them.
        workers: Vec<Replaced>,
    },
    /// Another program has taken the job over, or has not.
    Updated {
        /// Its file.
        program: PathBuf,
        /// What changes with it, besides code.
        changes: Vec<Change>,
        /// Workers that were replaced.
        workers: Vec<Replaced>,
        /// Why the old program was brought back; not there when the new one runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rolled_back: Option<String>,
    },
    /// Sources take nothing.
    Paused {
        /// Nothing moves any more. False: something was still being processed when the job had
        /// waited long enough for it.
        still: bool,
    },
    /// Sources go on.
    Resumed {
        /// They had been paused.
        was_paused: bool,
    },
    /// The job is ending.
    Stopping {
        /// Without processing what sources have taken.
        now: bool,
    },
    /// The supervisor leaves for one of another program, which plans the same job.
    Upgrading {
        /// The process that leaves.
        supervisor: u32,
        /// The program.
        program: PathBuf,
    },
    /// The request cannot be carried out.
    Error {
        /// Why, and what to do.
        message: String,
    },
}

impl Reply {
    /// An error.
    #[must_use]
    pub fn error(message: impl Into<String>) -> Self {
        Self::Error { message: message.into() }
    }
}

/// A worker that was replaced between two of its steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    /// The worker.
    pub worker: usize,
    /// Its new process.
    pub pid: u32,
    /// From the last moment of the old process until the new one had attached, microseconds.
    pub pause_us: u64,
}

/// What an update changes in the plan. Code may change wherever it likes and is not told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The operator's uid.
    pub operator: String,
    /// What changes: its name; or it was added to a stage, or removed from one.
    pub what: String,
    /// What it was, or the stage that it was in.
    pub from: String,
    /// What it is, or the stage that it is in.
    pub to: String,
}

/// How an update goes, or went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateStatus {
    /// The new program's file.
    pub program: PathBuf,
    /// Checking, replacing, on probation, rolling back; refused, done, rolled back.
    pub state: String,
    /// Workers that were given the new program.
    pub replaced: usize,
    /// What changes with it, besides code.
    pub changes: Vec<Change>,
    /// What speaks against it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// How a job is going.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The job's name, as its socket has it.
    pub name: String,
    /// The launched process: signals for the job go to it.
    pub pid: u32,
    /// The supervisor's process.
    pub supervisor: u32,
    /// The program's version.
    pub version: String,
    /// True once it was asked to end.
    pub is_draining: bool,
    /// True while sources take nothing because somebody asked for it.
    pub is_paused: bool,
    /// Worker processes.
    pub workers: usize,
    /// Seconds since it started.
    pub elapsed_s: f64,
    /// Records read from sources.
    pub records_in: u64,
    /// Records that reached a sink.
    pub records_out: u64,
    /// Records that came after their windows had fired.
    pub late: u64,
    /// Inputs and records that were refused.
    pub rejected: u64,
    /// Records dropped because a consumer was dead.
    pub dropped: u64,
    /// The lowest watermark, milliseconds since 1970, UTC.
    pub watermark_ms: Option<i64>,
    /// Records that killed their worker again and again, and were put aside.
    pub dead_lettered: u64,
    /// Workers that died and were replaced.
    pub restarts: usize,
    /// What was done about failures: of many events, the first and the latest ones.
    pub events: Vec<Event>,
    /// Standbys that are ready to take over at once.
    pub standbys_ready: usize,
    /// Standbys that the job should have.
    pub standbys: usize,
    /// How the latest update of its program goes or went.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update: Option<UpdateStatus>,
    /// What the job promised, and how often it did not keep that.
    pub slo: Option<Promise>,
    /// The account of each edge between workers.
    pub edges: Vec<EdgeAccount>,
    /// About checkpoints, where the job takes any.
    pub checkpoints: Option<Checkpoints>,
    /// Where metrics are served, if they are.
    pub metrics: Option<String>,
    /// The same numbers as there.
    pub figures: Option<Figures>,
}

/// How a job's checkpoints are going.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoints {
    /// Where they lie.
    pub folder: PathBuf,
    /// When they are taken.
    pub schedule: Schedule,
    /// Until the next one, milliseconds.
    pub next_in_ms: Option<u64>,
    /// Regions of the job.
    pub regions: usize,
    /// Completed ones of this run.
    pub completed: u64,
    /// Failed ones of this run.
    pub failed: u64,
    /// The newest one, which may be open.
    pub newest: Option<Record>,
}

/// A value as one line of JSON, its end included.
pub(crate) fn line<T: Serialize>(value: &T) -> Vec<u8> {
    // Numbers, texts and lists of them; a path that is not UTF-8 is the only thing that JSON has
    // no form for.
    let mut line = serde_json::to_vec(value).unwrap_or_else(|error| {
        format!("{{\"reply\":\"error\",\"message\":\"cannot be written: {error}\"}}").into_bytes()
    });
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        let schedule = |text: &str| Order::Schedule(text.parse().expect(text));
        let checkpoint = |order| Request::Checkpoint { order };
        let cases = [
            (r#"{"request":"status"}"#, Request::Status),
            (r#"{"request":"savepoint"}"#, Request::Savepoint),
            (r#"{"request":"postmortem"}"#, Request::Postmortem),
            (r#"{"request":"kill-worker","worker":1}"#, Request::KillWorker { worker: 1 }),
            (r#"{"request":"restart"}"#, Request::Restart { worker: None }),
            (r#"{"request":"restart","worker":0}"#, Request::Restart { worker: Some(0) }),
            (r#"{"request":"update","program":"/b"}"#, Request::Update { program: "/b".into() }),
            (r#"{"request":"pause"}"#, Request::Pause),
            (r#"{"request":"resume"}"#, Request::Resume),
            (r#"{"request":"stop","now":true}"#, Request::Stop { now: true }),
            (r#"{"request":"checkpoint","order":"now"}"#, checkpoint(Order::Now)),
            (r#"{"request":"checkpoint","order":"history"}"#, checkpoint(Order::History)),
            (r#"{"request":"checkpoint","order":{"schedule":"5s"}}"#, checkpoint(schedule("5s"))),
            (
                r#"{"request":"checkpoint","order":{"schedule":"0 * * * *"}}"#,
                checkpoint(schedule("0 * * * *")),
            ),
        ];
        for (text, request) in cases {
            assert_eq!(serde_json::from_str::<Request>(text).expect(text), request);
            assert_eq!(line(&request), format!("{text}\n").into_bytes());
        }
    }

    #[test]
    fn replies_come_back_as_they_were() {
        let history = crate::checkpoint::history::Kind::Regional;
        let record = Record {
            id: 3,
            kind: history,
            begun_unix_ms: 1,
            regions_ok: 2,
            regions_failed: 0,
            duration_us: 5,
            measure: Default::default(),
            state: crate::checkpoint::history::State::Complete,
        };
        let checkpoints = Checkpoints { newest: Some(record.clone()), ..Checkpoints::default() };
        let status = Status { checkpoints: Some(checkpoints), ..Status::default() };
        let replies = [
            Reply::Status(Box::new(status)),
            Reply::Taken { checkpoint: record.clone(), path: Some("/ck".into()) },
            Reply::Schedule { schedule: Schedule::Never, next_in_ms: None },
            Reply::History { schedule: Schedule::Never, checkpoints: vec![record] },
            Reply::Postmortem {
                deaths: vec![PostMortem { life: 3, ..PostMortem::default() }],
                events: vec![Event { worker: 2, ..Event::default() }],
            },
            Reply::Killed { worker: 1, pid: 77 },
            Reply::Restarted { workers: vec![Replaced { worker: 1, pid: 78, pause_us: 400 }] },
            Reply::Updated {
                program: "/b".into(),
                changes: vec![Change {
                    operator: "count".into(),
                    what: "name".into(),
                    from: "a".into(),
                    to: "b".into(),
                }],
                workers: Vec::new(),
                rolled_back: Some("worker 0 died".into()),
            },
            Reply::Paused { still: true },
            Reply::Resumed { was_paused: false },
            Reply::Stopping { now: false },
            Reply::error("no"),
        ];
        for reply in replies {
            let line = line(&reply);
            assert_eq!(serde_json::from_slice::<Reply>(&line).expect("its own"), reply);
        }
    }
}
