//! What is said over the control socket: one JSON object a line in each direction.
//!
//! ```text
//! {"request":"status"}
//! {"request":"checkpoint","order":"now"}
//! {"request":"checkpoint","order":{"schedule":"5s"}}      "never", "200ms", "0 * * * *"
//! {"request":"checkpoint","order":"history"}
//! {"request":"savepoint"}
//! ```
//!
//! Replies carry the request's answer under `reply`, or `{"reply":"error","message":…}`. Readers
//! leave fields that they do not know alone: job and tool may be of different builds.
//!
//! Called by both ends.

use crate::checkpoint::history::Record;
use crate::checkpoint::schedule::Schedule;
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
    /// Take a savepoint now; answered with [`Reply::Taken`] when it is complete or has failed.
    Savepoint,
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
            Self::Status | Self::Checkpoint { .. } => Duration::from_secs(10),
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

/// How a job is going.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The job's name, as its socket has it.
    pub name: String,
    /// The supervisor's process.
    pub pid: u32,
    /// The program's version.
    pub version: String,
    /// True once it was asked to end.
    pub is_draining: bool,
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
    /// Workers that died and were replaced.
    pub restarts: usize,
    /// About checkpoints, where the job takes any.
    pub checkpoints: Option<Checkpoints>,
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
            Reply::error("no"),
        ];
        for reply in replies {
            let line = line(&reply);
            assert_eq!(serde_json::from_slice::<Reply>(&line).expect("its own"), reply);
        }
    }
}
