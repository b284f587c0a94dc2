//! Checkpoints: when they are taken, what they are made of, and how they went. Pure logic: nothing
//! here reads a clock, a file or shared memory; whoever calls hands in the time and carries out
//! what comes back.
//!
//! `regions` cuts the job into parts that share no data, `schedule` says when a checkpoint is due,
//! `coordinator` leads one from its beginning to its end, `history` remembers.
//!
//! The supervisor's loop is the caller; the bench `regions` drives the same coordinator with
//! simulated workers in virtual time.

pub mod regions;

pub mod schedule;

pub mod coordinator;

pub mod history;

pub(crate) mod notes;

/// A moment, by both clocks: the monotonic one for distances, the other for people and the clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// Nanoseconds of the monotonic clock.
    pub monotonic_ns: u64,
    /// Milliseconds since 1970, UTC.
    pub unix_ms: i64,
}
