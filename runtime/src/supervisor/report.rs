//! The final report: what went in and out, what was refused, late or dropped, who died and how soon
//! it was back.
//!
//! Called by `launch` at the end; sums come from the counters in the workers' shared pages.

#![expect(unsafe_code, reason = "reads counters in mapped pages")]

use super::launch::Scene;
use crate::checkpoint::history::{History, Record};
use crate::config::{ReportForm, Settings};
use crate::plan::layout::COUNTERS_AT;
use crate::plan::{CounterKind, Plan};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;
use testudo_shm::counters::{Counter, ENTRY};

/// A worker that died and was replaced.
#[derive(Debug, Clone, Serialize)]
pub struct Restart {
    /// Its index.
    pub worker: usize,
    /// Which of its lives ended: 1 for the first process.
    pub life: u64,
    /// Signal or exit code.
    pub cause: String,
    /// What it wrote while dying.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub last_words: String,
    /// When the supervisor saw it, in monotonic nanoseconds.
    pub seen_ns: u64,
    /// From then until its successor had attached, microseconds.
    pub recovery_us: Option<u64>,
}

/// How a job went.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the job.
    pub name: String,
    /// Worker processes.
    pub workers: usize,
    /// Records read from sources.
    pub records_in: u64,
    /// Records that reached a sink.
    pub records_out: u64,
    /// Records that came after their windows had fired.
    pub late: u64,
    /// Inputs and records that were refused.
    pub rejected: u64,
    /// Records dropped because a consumer was dead (only with partial completeness).
    pub dropped: u64,
    /// Seconds from start to end.
    pub elapsed_s: f64,
    /// Records read per second.
    pub rate_per_s: f64,
    /// The job's own counters.
    pub counters: BTreeMap<String, u64>,
    /// Workers that died.
    pub restarts: Vec<Restart>,
    /// Checkpoints of this run; `None` where none are taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<Checkpoints>,
}

/// How a job's checkpoints went.
#[derive(Debug, Clone, Serialize)]
pub struct Checkpoints {
    /// How many were completed.
    pub completed: u64,
    /// How many failed.
    pub failed: u64,
    /// The latest of them.
    pub latest: Vec<Record>,
}

impl Report {
    /// The report of a job that had nothing to do.
    pub(crate) fn nothing(plan: &Plan, settings: &Settings) -> Self {
        Self {
            name: settings.name.clone(),
            workers: plan.workers,
            records_in: 0,
            records_out: 0,
            late: 0,
            rejected: 0,
            dropped: 0,
            elapsed_s: 0.0,
            rate_per_s: 0.0,
            counters: plan.user_counters.iter().map(|name| (name.clone(), 0)).collect(),
            restarts: Vec::new(),
            checkpoints: None,
        }
    }

    /// Adds how the checkpoints went.
    pub(crate) fn with_checkpoints(mut self, history: Option<&History>) -> Self {
        self.checkpoints = history.map(|history| Checkpoints {
            completed: history.completed(),
            failed: history.failed(),
            latest: history.records().cloned().collect(),
        });
        self
    }

    pub(crate) fn new(
        plan: &Plan,
        settings: &Settings,
        scene: &Scene,
        restarts: Vec<Restart>,
        elapsed: Duration,
    ) -> Self {
        let sum = |kind, counter| counter_sum(plan, scene, kind, counter);
        let records_in = sum("source", CounterKind::Out);
        let elapsed_s = elapsed.as_secs_f64();
        let first = plan.operators.len() * CounterKind::ALL.len();
        let names = plan.user_counters.iter().enumerate();
        Self {
            name: settings.name.clone(),
            workers: plan.workers,
            records_in,
            records_out: sum("sink", CounterKind::In),
            late: sum("", CounterKind::Late),
            rejected: sum("", CounterKind::Rejected),
            dropped: sum("", CounterKind::Dropped),
            elapsed_s,
            rate_per_s: records_in as f64 / elapsed_s.max(1e-9),
            counters: names
                .map(|(i, name)| (name.clone(), sum_at(plan, scene, first + i)))
                .collect(),
            restarts,
            checkpoints: None,
        }
    }

    /// The report in the form that the settings ask for, newline included.
    #[must_use]
    pub fn text(&self, form: ReportForm) -> String {
        if form == ReportForm::Json {
            return serde_json::to_string(self).unwrap_or_default() + "\n";
        }
        let mut text = format!(
            "{}: {} records in, {} out, {} late, {} rejected, {} dropped; \
             {:.3} s, {:.0} records/s, {} workers\n",
            self.name,
            self.records_in,
            self.records_out,
            self.late,
            self.rejected,
            self.dropped,
            self.elapsed_s,
            self.rate_per_s,
            self.workers
        );
        for (name, value) in &self.counters {
            let _ = writeln!(text, "  {name}: {value}");
        }
        if let Some(checkpoints) = &self.checkpoints {
            let Checkpoints { completed, failed, .. } = checkpoints;
            let _ = writeln!(text, "  checkpoints: {completed} completed, {failed} failed");
        }
        for restart in self.restarts.iter().take(20) {
            let took = restart
                .recovery_us
                .map_or("unknown".into(), |us| format!("{:.1} ms", us as f64 / 1e3));
            let words = restart.last_words.lines().next().unwrap_or("");
            let _ = writeln!(
                text,
                "  worker {} died ({}), back after {took} {words}",
                restart.worker, restart.cause
            );
        }
        if self.restarts.len() > 20 {
            let _ = writeln!(text, "  and {} more deaths", self.restarts.len() - 20);
        }
        text
    }
}

/// Sum over all workers of a counter of all operators of a kind ("" for any).
pub(crate) fn counter_sum(plan: &Plan, scene: &Scene, kind: &str, counter: CounterKind) -> u64 {
    let position = CounterKind::ALL.iter().position(|other| *other == counter).unwrap_or(0);
    let operators = plan.operators.iter().enumerate();
    let chosen = operators.filter(|(_, operator)| {
        let is_side = operator.name == "rejects";
        !is_side && (kind.is_empty() || operator.kind == kind)
    });
    chosen.map(|(index, _)| sum_at(plan, scene, index * CounterKind::ALL.len() + position)).sum()
}

fn sum_at(plan: &Plan, scene: &Scene, index: usize) -> u64 {
    let workers = &plan.layout.segments[..plan.workers];
    let value = |at: usize| {
        // SAFETY: the fronts of all workers, counters included, are mapped for good.
        let counter = unsafe { testudo_shm::header::at::<Counter>(scene.arena.at(at)) };
        counter.value()
    };
    workers.iter().map(|segment| value(segment.at + COUNTERS_AT + index * ENTRY)).sum()
}

/// The lowest watermark that any worker has noted, in milliseconds.
pub(crate) fn lowest_watermark(plan: &Plan, scene: &Scene) -> Option<i64> {
    let noted = scene.workers[..plan.workers].iter().map(|header| {
        header.watermark.load(testudo_shm::primitive::Ordering::Relaxed).cast_signed()
    });
    noted
        .filter(|watermark| *watermark != 0 && *watermark != i64::MAX && *watermark != i64::MIN)
        .min()
}
