//! The job's own rung: when a region has gone back as often as it may, everything is stopped and
//! the job begins again from its newest checkpoint, or from the beginning.
//!
//! Invariants: all processes of the run before are gone; a job that held for a while may go back
//! as often as at first; what was done is told at the end, however that comes.
//!
//! Called by `launch` between two runs of a job.

use super::{JOB_SOUND_NS, JOB_TRIES, Rewinds, WentBack, pause};
use crate::error::Error;
use crate::supervisor::report::Report;
use std::time::{Duration, Instant};

/// What a job's runs have come to.
#[derive(Debug, Default)]
pub(crate) struct JobRung {
    in_a_row: u32,
    count: u32,
    is_wanted: bool,
    done: Vec<WentBack>,
    taken: Vec<String>,
}

impl JobRung {
    /// A run is over that began then.
    pub(crate) fn hear(&mut self, rewinds: &mut Rewinds, has_failed: bool, begun: Instant) {
        self.is_wanted = has_failed && rewinds.wants_job();
        if begun.elapsed() > Duration::from_nanos(JOB_SOUND_NS) {
            self.in_a_row = 0;
        }
        self.done.append(&mut rewinds.done);
    }

    /// Whether the job is to begin again after this error; waits for as long as it should.
    pub(crate) fn take_up(&mut self, error: &Error) -> bool {
        if !std::mem::take(&mut self.is_wanted) || self.in_a_row >= JOB_TRIES {
            return false;
        }
        (self.in_a_row, self.count) = (self.in_a_row + 1, self.count + 1);
        if let Error::Exhausted { taken, .. } = error {
            self.taken.extend(taken.iter().cloned());
        }
        self.taken.push("the job went back".into());
        crate::say!("testudo: {error}; the job goes back");
        std::thread::sleep(pause(self.in_a_row + 1));
        true
    }

    /// The error that the job ends with, with what was done in earlier runs.
    pub(crate) fn account_for(&mut self, error: Error) -> Error {
        if self.count == 0 {
            return error;
        }
        let mut all = std::mem::take(&mut self.taken);
        match error {
            Error::Exhausted { cause, taken } => {
                all.extend(taken);
                Error::Exhausted { cause, taken: all }
            }
            other => other,
        }
    }

    /// The report, with what went back in all runs.
    pub(crate) fn added_to(&mut self, mut report: Report) -> Report {
        report.went_back = std::mem::take(&mut self.done);
        report.job_went_back = self.count;
        report
    }
}
