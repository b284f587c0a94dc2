//! What a job promises about failure and time, its SLO: completeness, the longest that a batch may
//! wait, and the longest that a recovery may take; and how often it broke its word.
//!
//! Said on the command line or in a file (`--completeness`, `--max-latency`, `--max-recovery`), or
//! by the job itself ([`Flow::completeness`] and its neighbours); what is said nearer to the start
//! of a job wins: flag, file, job. Completeness that nobody asked for follows from the sources.
//!
//! Called by the plan, which settles it in every process alike; acted on by `exchange::outlet`
//! (drops), `exchange::absent` (windows go on), `worker::latency` (how much waits) and the report.

use crate::config::{Completeness, Settings, Tier};
use crate::flow::{Draft, Flow};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::time::Duration;

/// What starting a new process may take: 15 ms on a busy machine, and some to spare.
const RESPAWN: Duration = Duration::from_millis(20);

/// A producer that stays away longer holds no window up, where the job has no `max_recovery`.
const ABSENT_AFTER: Duration = Duration::from_millis(100);

/// What a job asks for; nothing is asked for by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) completeness: Option<Completeness>,
    pub(crate) max_latency: Option<Duration>,
    pub(crate) max_recovery: Option<Duration>,
}

/// What was settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slo {
    pub(crate) completeness: Completeness,
    /// Why it is that one.
    reason: String,
    pub(crate) max_latency: Option<Duration>,
    pub(crate) max_recovery: Option<Duration>,
}

impl Slo {
    /// Settles what the settings and the job ask for.
    pub(crate) fn settle(draft: &Draft, settings: &Settings) -> Self {
        let (completeness, reason) = match settings.completeness.or(draft.wanted.completeness) {
            Some(asked) => (asked, "asked for".to_owned()),
            None => match draft.read_once.first() {
                None => (Completeness::Full, "every source can be read again".into()),
                Some((_, name)) => (Completeness::Partial, format!("{name} cannot be read again")),
            },
        };
        let max_latency = settings.max_latency.or(draft.wanted.max_latency);
        let max_recovery = settings.max_recovery.or(draft.wanted.max_recovery);
        Self { completeness, reason, max_latency, max_recovery }
    }

    pub(crate) fn is_partial(&self) -> bool {
        self.completeness == Completeness::Partial
    }

    /// How long a dead producer holds up its peers' windows, in partial completeness.
    pub(crate) fn absent_after(&self) -> Duration {
        self.max_recovery.unwrap_or(ABSENT_AFTER)
    }

    /// What takes over when a worker dies, where nobody has said so.
    pub(crate) fn tier(&self) -> Tier {
        let is_soon = self.max_recovery.is_some_and(|max| max < RESPAWN);
        if is_soon { Tier::Standby } else { Tier::Respawn }
    }

    /// What each choice means, for `--explain`.
    pub(crate) fn explain(&self, out: &mut String) -> std::fmt::Result {
        let Self { reason, .. } = self;
        match self.completeness {
            Completeness::Full => writeln!(
                out,
                "\ncompleteness full ({reason}): producers wait for a dead consumer once its ring \
                 is full; nothing is lost, nothing is doubled"
            )?,
            Completeness::Partial => writeln!(
                out,
                "\ncompleteness partial ({reason}): producers drop and count what a dead \
                 consumer's ring cannot take; after {:?} its peers' windows go on without it",
                self.absent_after()
            )?,
        }
        match self.max_latency {
            None => writeln!(out, "max latency  none: rings may fill, steps take what there is")?,
            Some(max) => writeln!(
                out,
                "max latency  {max:?}: steps end after {:?} at the latest that records allow, and \
                 no more waits in a ring than its consumer takes in {:?}; batches that wait longer \
                 than {max:?} are counted",
                max / crate::worker::latency::STEP_SHARE,
                max / crate::worker::latency::RING_SHARE,
            )?,
        }
        match self.max_recovery {
            None => writeln!(out, "max recovery none"),
            Some(max) => {
                writeln!(out, "max recovery {max:?}: recoveries that take longer are counted")
            }
        }
    }
}

/// What a job promised, as its report and its status say it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Promise {
    /// Full or partial.
    pub completeness: Completeness,
    /// Longest that a batch may wait, microseconds.
    pub max_latency_us: Option<u64>,
    /// Longest that a recovery may take, microseconds.
    pub max_recovery_us: Option<u64>,
    /// How often it was not kept.
    pub violations: Violations,
}

/// How often a promise was not kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Violations {
    /// Records that are missing although completeness is full.
    pub completeness: u64,
    /// Batches that waited longer than they may.
    pub latency: u64,
    /// Recoveries that took longer than they may.
    pub recovery: u64,
}

impl Promise {
    pub(crate) fn new(slo: &Slo, missing: u64, waited: u64, recoveries_us: &[u64]) -> Self {
        let micros = |limit: Option<Duration>| limit.map(|limit| limit.as_micros() as u64);
        let max_recovery_us = micros(slo.max_recovery);
        let is_late = |us: &&u64| max_recovery_us.is_some_and(|max| **us > max);
        let recovery = recoveries_us.iter().filter(is_late).count() as u64;
        let completeness = if slo.is_partial() { 0 } else { missing };
        Self {
            completeness: slo.completeness,
            max_latency_us: micros(slo.max_latency),
            max_recovery_us,
            violations: Violations { completeness, latency: waited, recovery },
        }
    }

    /// A line for people; nothing where nothing was promised beyond the default.
    pub(crate) fn text(&self) -> String {
        let Violations { completeness, latency, recovery } = self.violations;
        let mut text = String::new();
        let millis = |us: u64| us as f64 / 1e3;
        if completeness > 0 {
            let _ = writeln!(text, "  completeness full, but {completeness} records are missing");
        }
        if let Some(max) = self.max_latency_us {
            let max = millis(max);
            let _ = writeln!(text, "  max latency {max} ms: {latency} batches waited longer");
        }
        if let Some(max) = self.max_recovery_us {
            let max = millis(max);
            let _ = writeln!(text, "  max recovery {max} ms: {recovery} took longer");
        }
        text
    }
}

impl Flow {
    /// What producers do when a consumer is dead, unless the command line says otherwise. Unset:
    /// full if every source can be read again, else partial.
    ///
    /// ```
    /// use testudo::prelude::*;
    ///
    /// fn build(flow: &Flow, _options: &NoOptions) {
    ///     flow.completeness(Completeness::Partial);
    ///     flow.max_latency(Duration::from_millis(5));
    ///     flow.max_recovery(Duration::from_millis(20));
    ///     flow.source("numbers", Generator::new(1000, |n| n)).for_each(|_| ());
    /// }
    /// ```
    pub fn completeness(&self, completeness: Completeness) {
        self.draft.borrow_mut().wanted.completeness = Some(completeness);
    }

    /// The longest that a batch may wait between two workers, unless the command line says
    /// otherwise.
    pub fn max_latency(&self, limit: Duration) {
        self.draft.borrow_mut().wanted.max_latency = Some(limit);
    }

    /// The longest that the recovery of a worker may take, unless the command line says otherwise.
    pub fn max_recovery(&self, limit: Duration) {
        self.draft.borrow_mut().wanted.max_recovery = Some(limit);
    }
}
