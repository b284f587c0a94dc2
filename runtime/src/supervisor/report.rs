//! The final report: what went in and out, what was refused, late or dropped, who died and how soon
//! it was back.
//!
//! Called by `launch` at the end; sums come from the counters in the workers' shared pages.

pub use crate::exchange::account::{EdgeAccount, WorkerAccount};

use super::dead_letters;
use super::launch::Scene;
use super::replicas::Replicas;
use super::rewind::WentBack;
use crate::checkpoint::history::{History, Record};
use crate::config::{Completeness, ReportForm, Settings, Tier};
use crate::control::history::PostMortem;
use crate::error::Error;
use crate::exchange::account;
use crate::metrics::figures::ReplicaFigures;
use crate::plan::layout::{COUNTERS_AT, SegmentPlan};
use crate::plan::{CounterKind, Plan};
use crate::slo::Promise;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;
use testudo_shm::counters::ENTRY;

/// A worker that died and was replaced.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Restart {
    /// Its index.
    pub worker: usize,
    /// Which of its lives ended: 1 for the first process.
    pub life: u64,
    /// The process that died.
    #[serde(default)]
    pub pid: u32,
    /// Signal or exit code.
    pub cause: String,
    /// What ended it, where it was its own doing: a fault, a panic, a hang.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The operators whose code ran.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub operator: String,
    /// What they ran with.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub record: String,
    /// The rung of the ladder that followed.
    #[serde(default)]
    pub rung: String,
    /// What it wrote while dying.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_words: String,
    /// When the supervisor saw it, in monotonic nanoseconds.
    pub seen_ns: u64,
    /// From then until its successor had attached, microseconds.
    pub recovery_us: Option<u64>,
    /// What took over.
    #[serde(default)]
    pub tier: Tier,
}

impl Restart {
    /// From what the autopsy found.
    pub(crate) fn new(found: &PostMortem, last_words: String, seen_ns: u64) -> Self {
        let is_told = found.own_doing;
        let told = |text: &String| if is_told { text.clone() } else { String::new() };
        Self {
            worker: found.worker,
            life: found.life,
            pid: found.pid.cast_unsigned(),
            cause: found.exit.clone(),
            why: told(&found.cause),
            operator: told(&found.operator),
            record: told(&found.record),
            rung: found.rung.clone(),
            last_words,
            seen_ns,
            recovery_us: None,
            tier: Tier::Respawn,
        }
    }
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
    /// Records that killed their worker again and again, and were put aside.
    pub dead_lettered: u64,
    /// The file that has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letters: Option<std::path::PathBuf>,
    /// Nothing may be missing from the results.
    #[serde(skip)]
    pub(crate) is_full: bool,
    /// Sent records of which nobody knows what became of them: none, or the engine is wrong.
    pub unaccounted: u64,
    /// The account of each edge between workers.
    pub edges: Vec<EdgeAccount>,
    /// What the job promised, and how often it did not keep that.
    pub slo: Promise,
    /// It was asked to end (SIGINT, SIGTERM, `testudo stop`), and did so: what it had read was
    /// finished, the rest of its input was not read.
    pub drained: bool,
    /// Seconds from start to end.
    pub elapsed_s: f64,
    /// Records read per second.
    pub rate_per_s: f64,
    /// The job's own counters.
    pub counters: BTreeMap<String, u64>,
    /// Workers that died.
    pub restarts: Vec<Restart>,
    /// What replicas did, by worker of tier 1.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<ReplicaFigures>,
    /// Regions that went back to a checkpoint, or to their beginning.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub went_back: Vec<WentBack>,
    /// How often the whole job went back.
    #[serde(skip_serializing_if = "is_zero")]
    pub job_went_back: u32,
    /// Checkpoints of this run; `None` where none are taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<Checkpoints>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(count: &u32) -> bool {
    *count == 0
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
            dead_lettered: 0,
            dead_letters: None,
            is_full: false,
            unaccounted: 0,
            edges: Vec::new(),
            slo: Promise::new(&plan.slo, 0, 0, &[]),
            drained: false,
            elapsed_s: 0.0,
            rate_per_s: 0.0,
            counters: plan.user_counters.iter().map(|name| (name.clone(), 0)).collect(),
            restarts: Vec::new(),
            replicas: Vec::new(),
            went_back: Vec::new(),
            job_went_back: 0,
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
        let dead_lettered = sum("", CounterKind::DeadLettered);
        let elapsed_s = elapsed.as_secs_f64();
        let edges = account::accounts(plan, scene);
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
            dead_lettered,
            dead_letters: (dead_lettered > 0).then(|| dead_letters::path(plan, settings)),
            is_full: plan.slo.completeness == Completeness::Full,
            // All rings are empty now.
            unaccounted: edges.iter().map(|edge| edge.in_rings).sum(),
            slo: promise(plan, scene, &edges, &restarts),
            edges,
            drained: false,
            elapsed_s,
            rate_per_s: records_in as f64 / elapsed_s.max(1e-9),
            counters: names
                .map(|(i, name)| (name.clone(), sum_at(plan, scene, first + i)))
                .collect(),
            restarts,
            replicas: Replicas::new(plan, scene).figures(),
            went_back: Vec::new(),
            job_went_back: 0,
            checkpoints: None,
        }
    }

    /// What is missing, where nothing may be.
    #[must_use]
    pub fn put_aside(&self) -> Option<Error> {
        let file = self.dead_letters.clone().filter(|_| self.is_full)?;
        Some(Error::PutAside { records: self.dead_lettered, file })
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
        if self.drained {
            text += "  ended on request: what was read is finished, the rest of the input is not \
                     read\n";
        }
        for (name, value) in &self.counters {
            let _ = writeln!(text, "  {name}: {value}");
        }
        if self.unaccounted > 0 {
            let _ = writeln!(text, "  {} records are unaccounted for", self.unaccounted);
        }
        text += &self.slo.text();
        if let Some(checkpoints) = &self.checkpoints {
            let Checkpoints { completed, failed, .. } = checkpoints;
            let _ = writeln!(text, "  checkpoints: {completed} completed, {failed} failed");
        }
        if let Some(file) = &self.dead_letters {
            let file = file.display();
            let _ = writeln!(text, "  {} records put aside: {file}", self.dead_lettered);
        }
        text += &self.replicas.iter().filter_map(ReplicaFigures::words).collect::<String>();
        for restart in self.restarts.iter().take(20) {
            let took = restart
                .recovery_us
                .map_or("unknown".into(), |us| format!("{:.1} ms", us as f64 / 1e3));
            let words = restart.last_words.lines().next().unwrap_or("");
            let by = match restart.tier {
                Tier::Replica => "by a replica ",
                Tier::Standby => "by a standby ",
                Tier::Respawn => "",
            };
            let _ = writeln!(
                text,
                "  worker {} died ({}), back after {took} {by}{words}",
                restart.worker, restart.cause
            );
            if !restart.operator.is_empty() {
                let Restart { why, operator, record, rung, .. } = restart;
                let _ = writeln!(text, "    {why} in {operator}: {record}; then {rung}");
            }
        }
        for back in &self.went_back {
            let took = back.took_ms.map_or("unknown".into(), |ms| format!("{ms} ms"));
            let _ = writeln!(text, "  {back}, back after {took}: {}", back.cause);
        }
        if self.job_went_back > 0 {
            let _ = writeln!(text, "  the job went back {} times", self.job_went_back);
        }
        if self.restarts.len() > 20 {
            let _ = writeln!(text, "  and {} more deaths", self.restarts.len() - 20);
        }
        text
    }
}

/// What was promised, and how it went so far.
pub(crate) fn promise(
    plan: &Plan,
    scene: &Scene,
    edges: &[EdgeAccount],
    restarts: &[Restart],
) -> Promise {
    let missing = edges.iter().map(|edge| edge.dropped + edge.dead_lettered).sum();
    let recoveries: Vec<u64> = restarts.iter().filter_map(|restart| restart.recovery_us).collect();
    Promise::new(&plan.slo, missing, account::waited(plan, scene), &recoveries)
}

/// Sum over all workers of a counter of all operators of a kind ("" for any).
pub(crate) fn counter_sum(plan: &Plan, scene: &Scene, kind: &str, counter: CounterKind) -> u64 {
    let position = CounterKind::ALL.iter().position(|other| *other == counter).unwrap_or(0);
    let operators = plan.operators.iter().enumerate();
    let chosen = operators.filter(|(_, operator)| {
        let is_side = operator.name == "rejects";
        !is_side && (kind.is_empty() || operator.kind == kind)
    });
    let sum: u64 = chosen
        .map(|(index, _)| sum_at(plan, scene, index * CounterKind::ALL.len() + position))
        .sum();
    sum + if kind.is_empty() { added_sum(plan, scene, counter) } else { 0 }
}

/// The same for operators that only a program has that took the job over: their counters stand
/// behind those of this plan, or at the very end.
fn added_sum(plan: &Plan, scene: &Scene, counter: CounterKind) -> u64 {
    let own = plan.layout.edge_counters + account::counters(plan.edges.len());
    let suffix = format!("/{}", counter.label());
    let of_worker = |segment: &SegmentPlan| {
        let at = |index: usize| segment.at + COUNTERS_AT + index * ENTRY;
        let is_used = |index: &usize| !scene.counter_label(at(*index)).is_empty();
        let behind = (own..plan.layout.counters).take_while(is_used);
        let last = (own..plan.layout.counters).rev().take_while(is_used);
        let counts = behind.chain(last).filter(|index| {
            let label = scene.counter_label(at(*index));
            label.ends_with(&suffix) && !label.starts_with(account::PREFIX)
        });
        counts.map(|index| scene.counter(at(index))).sum::<u64>()
    };
    plan.layout.segments[..plan.workers].iter().map(of_worker).sum()
}

fn sum_at(plan: &Plan, scene: &Scene, index: usize) -> u64 {
    let workers = &plan.layout.segments[..plan.workers];
    workers.iter().map(|segment| scene.counter(segment.at + COUNTERS_AT + index * ENTRY)).sum()
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
