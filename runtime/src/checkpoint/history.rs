//! What became of the latest checkpoints: one record each, for `testudo checkpoint JOB history`,
//! metrics and the log.
//!
//! Invariants: records stand in the order of their ids; at most one is open, and it is the newest;
//! there are never more than the capacity says.
//!
//! Written by the coordinator; read by whoever serves the control socket.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What a checkpoint asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Regions that fail may contribute their last good snapshot.
    Regional,
    /// All regions must succeed.
    Global,
    /// All regions must succeed, with no data in flight: fit for another plan or parallelism.
    Savepoint,
}

impl Kind {
    /// True when no region may be carried over.
    #[must_use]
    pub fn needs_all(self) -> bool {
        self != Self::Regional
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Regional => "regional",
            Self::Global => "global",
            Self::Savepoint => "savepoint",
        })
    }
}

/// How far a checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "why")]
pub enum State {
    /// It is being taken.
    Open,
    /// It can be resumed from.
    Complete,
    /// It cannot, and why.
    Failed(String),
}

/// What one worker's part of a cut, or all parts together, took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measure {
    /// Bytes of the whole state that the snapshot stands for.
    pub bytes_full: u64,
    /// Bytes that were written for it: what had changed since the last good one.
    pub bytes_incremental: u64,
    /// Bytes of rings that belong to the cut.
    pub in_flight_bytes: u64,
    /// The pause of the worker's step loop; of several workers, the largest.
    pub pause_ns: u64,
}

impl Measure {
    /// Adds another worker's.
    pub fn add(&mut self, other: Self) {
        self.bytes_full = self.bytes_full.saturating_add(other.bytes_full);
        self.bytes_incremental = self.bytes_incremental.saturating_add(other.bytes_incremental);
        self.in_flight_bytes = self.in_flight_bytes.saturating_add(other.in_flight_bytes);
        self.pause_ns = self.pause_ns.max(other.pause_ns);
    }
}

/// One checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number.
    pub id: u64,
    /// What it asked for.
    pub kind: Kind,
    /// When it began, in milliseconds since 1970, UTC.
    pub begun_unix_ms: i64,
    /// Regions that contributed a fresh snapshot.
    pub regions_ok: usize,
    /// Regions that failed or were late.
    pub regions_failed: usize,
    /// From its beginning to its end, microseconds; 0 while it is open.
    pub duration_us: u64,
    /// What the workers' fresh snapshots took.
    #[serde(flatten)]
    pub measure: Measure,
    /// How far it is.
    #[serde(flatten)]
    pub state: State,
}

/// The latest checkpoints of a job.
#[derive(Debug, Clone)]
pub struct History {
    records: VecDeque<Record>,
    capacity: usize,
    completed: u64,
    failed: u64,
}

impl History {
    /// An empty history that keeps `capacity` records, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { records: VecDeque::new(), capacity: capacity.max(1), completed: 0, failed: 0 }
    }

    /// A history of checkpoints that are over, oldest first.
    #[must_use]
    pub fn of(capacity: usize, records: Vec<Record>) -> Self {
        let mut this = Self::new(capacity);
        for record in records {
            let how = record.state.clone();
            this.begin(record.id, record.kind, record.begun_unix_ms);
            this.end(|last| *last = Record { state: how, ..record });
        }
        this
    }

    /// The records, oldest first.
    pub fn records(&self) -> impl ExactSizeIterator<Item = &Record> + DoubleEndedIterator {
        self.records.iter()
    }

    /// The newest record.
    #[must_use]
    pub fn newest(&self) -> Option<&Record> {
        self.records.back()
    }

    /// Completed checkpoints of this run, those no longer remembered included.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Failed checkpoints of this run, those no longer remembered included.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Notes that a checkpoint has begun.
    pub(super) fn begin(&mut self, id: u64, kind: Kind, begun_unix_ms: i64) {
        if self.records.len() == self.capacity {
            self.records.pop_front();
        }
        self.records.push_back(Record {
            id,
            kind,
            begun_unix_ms,
            regions_ok: 0,
            regions_failed: 0,
            duration_us: 0,
            measure: Measure::default(),
            state: State::Open,
        });
    }

    /// Notes how the newest checkpoint ended.
    pub(super) fn end(&mut self, change: impl FnOnce(&mut Record)) {
        let Some(record) = self.records.back_mut() else { return };
        change(record);
        match record.state {
            State::Open => {}
            State::Complete => self.completed += 1,
            State::Failed(_) => self.failed += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_are_kept_and_all_are_counted() {
        let mut history = History::new(2);
        for id in 1..=5 {
            history.begin(id, Kind::Regional, 0);
            let state = if id % 2 == 0 { State::Failed("late".into()) } else { State::Complete };
            history.end(|record| record.state = state);
        }
        assert_eq!(history.records().map(|record| record.id).collect::<Vec<_>>(), [4, 5]);
        assert_eq!((history.completed(), history.failed()), (3, 2));
        assert_eq!(history.newest().map(|record| record.id), Some(5));
    }

    #[test]
    fn a_record_is_plain_json_and_comes_back() {
        let mut history = History::new(1);
        history.begin(9, Kind::Savepoint, 1_700_000_000_000);
        history.end(|record| {
            record.measure.pause_ns = 20_000;
            record.state = State::Failed("region 0: disk full".into());
        });
        let record = history.newest().expect("just made");
        let text = serde_json::to_string(record).expect("plain");
        assert!(text.contains(r#""kind":"savepoint""#), "{text}");
        assert!(text.contains(r#""state":"failed","why":"region 0: disk full""#), "{text}");
        assert!(text.contains(r#""pause_ns":20000"#), "{text}");
        assert_eq!(serde_json::from_str::<Record>(&text).expect("the same"), *record);
    }

    #[test]
    fn pauses_are_not_added_up() {
        let mut all = Measure::default();
        all.add(Measure { bytes_full: 1, bytes_incremental: 2, in_flight_bytes: 3, pause_ns: 50 });
        all.add(Measure {
            bytes_full: 10,
            bytes_incremental: 20,
            in_flight_bytes: 30,
            pause_ns: 4,
        });
        let sum =
            Measure { bytes_full: 11, bytes_incremental: 22, in_flight_bytes: 33, pause_ns: 50 };
        assert_eq!(all, sum);
    }
}
