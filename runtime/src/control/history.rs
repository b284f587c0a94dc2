//! What became of a job's workers: a post-mortem for each death, and an event for each rung of the
//! ladder that was taken. As they are shown by `testudo postmortem` and `status --json`.
//!
//! Called by the supervisor, which fills them, and by the tool, which prints them.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is known of a worker's death.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PostMortem {
    /// When it was seen, milliseconds since 1970, UTC.
    pub unix_ms: i64,
    /// The worker.
    pub worker: usize,
    /// Which of its lives ended: 1 for the first process.
    pub life: u64,
    /// The process.
    pub pid: i32,
    /// What ended it, such as `SIGSEGV at 0x0`, `panic`, `out of memory`, `hung for 10.0 s`.
    pub cause: String,
    /// The worker did it itself: a record or its state may be to blame.
    pub own_doing: bool,
    /// How the process ended, once the kernel has said so.
    pub exit: String,
    /// The panic's message, or what else it said.
    pub message: String,
    /// The operators whose code ran, empty when none did.
    pub operator: String,
    /// What they were doing.
    pub doing: String,
    /// The record, or the part of an input, that they were doing it with.
    pub record: String,
    /// The first bytes of the record, where it was taken alone: as text if they are some, else in
    /// hexadecimal digits.
    pub bytes: String,
    /// Steps that the worker had committed, in all its lives.
    pub commits: u64,
    /// From its last commit to the moment that its death was seen, milliseconds.
    pub since_commit_ms: f64,
    /// The worker's counters at its last commit; those of zero are left out.
    pub counters: BTreeMap<String, u64>,
    /// The rung of the ladder that followed.
    pub rung: String,
    /// The stack, innermost frame first.
    pub backtrace: Vec<String>,
}

/// Something that was done about a failure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Event {
    /// When, milliseconds since 1970, UTC.
    pub unix_ms: i64,
    /// The rung that was taken, or `hang`, `convicted`, `dead-letter`, `passed`.
    pub kind: String,
    /// The worker.
    pub worker: usize,
    /// Why.
    pub cause: String,
}
