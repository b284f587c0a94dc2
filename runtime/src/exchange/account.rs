//! The account of an edge: what was sent on it, dropped, taken, and put aside, by worker. At every
//! commit of everybody, sent = processed + dropped + put aside + still in rings and spills; when a
//! job has ended, nothing is in them.
//!
//! Counts are cells in the workers' counter pages: exact across crashes, readable by all. They are
//! added up in private memory during a step and written once, before its commit.
//!
//! Called by outlets and inlets; read by the report and the status.

use crate::plan::layout::{COUNTERS_AT, Layout};
use crate::plan::{CounterKind, Plan};
use crate::supervisor::launch::Scene;
use crate::worker::attach::Attach;
use crate::worker::context::{CounterPlace, Cx};
use serde::{Deserialize, Serialize};
use testudo_shm::counters::ENTRY;

/// What is counted for an edge, by each worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EdgeCount {
    /// Records for a consumer, whatever became of them; a broadcast one counts for each.
    Sent,
    /// Of those: not kept, since the consumer was dead.
    Dropped,
    /// Taken by this worker's subtask, the records put aside included.
    Taken,
    /// Of those: put aside, since they killed whoever processed them.
    Lettered,
}

impl EdgeCount {
    pub(crate) const ALL: [Self; 4] = [Self::Sent, Self::Dropped, Self::Taken, Self::Lettered];

    fn label(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Dropped => "dropped",
            Self::Taken => "taken",
            Self::Lettered => "lettered",
        }
    }
}

/// Labels of these counters begin with this.
pub(crate) const PREFIX: &str = "edge-";

/// Counters of a worker besides those of operators and of the user: four for each edge, and the
/// batches that waited too long.
pub(crate) fn counters(edges: usize) -> usize {
    edges * EdgeCount::ALL.len() + 1
}

/// Where an edge's counter stands among a worker's.
pub(crate) fn index(layout: &Layout, edge: usize, count: EdgeCount) -> usize {
    layout.edge_counters + edge * EdgeCount::ALL.len() + count as usize
}

/// Where the counter of batches that waited too long stands.
fn waited_index(plan: &Plan) -> usize {
    plan.layout.edge_counters + plan.edges.len() * EdgeCount::ALL.len()
}

impl Attach {
    /// A counter of this worker's for an edge.
    pub(crate) fn edge_count(&mut self, edge: usize, count: EdgeCount) -> CounterPlace {
        let label = format!("{PREFIX}{edge}/{}", count.label());
        self.counter_at(index(&self.plan.layout, edge, count), &label)
    }

    /// All of them, so that a reader finds every label.
    pub(crate) fn open_edge_counts(&mut self) {
        for edge in 0..self.plan.edges.len() {
            for count in EdgeCount::ALL {
                self.edge_count(edge, count);
            }
        }
        self.waited_counter();
    }

    /// The counter of batches that waited too long.
    pub(crate) fn waited_counter(&mut self) -> CounterPlace {
        let index = waited_index(&self.plan);
        self.counter_at(index, "slo/waited")
    }

    /// The sending side's account of an edge.
    pub(crate) fn sending(&mut self, edge: usize) -> Sending {
        Sending {
            sent: self.edge_count(edge, EdgeCount::Sent),
            dropped: self.edge_count(edge, EdgeCount::Dropped),
            dropped_in_all: self.edge_counter(edge, CounterKind::Dropped),
            taken: self.edge_count(edge, EdgeCount::Taken),
            open: [0; 3],
        }
    }
}

/// The account of an edge at its sending side.
#[derive(Debug)]
pub(crate) struct Sending {
    sent: CounterPlace,
    dropped: CounterPlace,
    /// The same, of the operator before the edge.
    dropped_in_all: CounterPlace,
    taken: CounterPlace,
    /// Of the open step: sent, dropped, handed over in this worker.
    open: [u64; 3],
}

impl Sending {
    /// Records that went into a ring, or wait to.
    #[inline(always)]
    pub(crate) fn sent(&mut self, records: usize) {
        self.open[0] += records as u64;
    }

    /// Records for this worker's own subtask.
    #[inline(always)]
    pub(crate) fn handed_over(&mut self, records: usize) {
        self.open[0] += records as u64;
        self.open[2] += records as u64;
    }

    /// Records that nobody will take.
    #[inline(always)]
    pub(crate) fn dropped(&mut self, records: usize) {
        self.open[0] += records as u64;
        self.open[1] += records as u64;
    }

    /// Records that were sent before, to wait for room.
    pub(crate) fn dropped_later(&mut self, records: usize) {
        self.open[1] += records as u64;
    }

    /// As `dropped_later`, for those that were handed over after all.
    pub(crate) fn handed_over_later(&mut self, records: usize) {
        self.open[2] += records as u64;
    }

    /// Before the commit.
    #[inline]
    pub(crate) fn save(&mut self, cx: &mut Cx) {
        let [sent, dropped, taken] = std::mem::take(&mut self.open);
        for (place, count) in [
            (self.sent, sent),
            (self.dropped, dropped),
            (self.dropped_in_all, dropped),
            (self.taken, taken),
        ] {
            if count > 0 {
                cx.count(place, count);
            }
        }
    }
}

/// The account of an edge at its receiving side.
#[derive(Debug)]
pub(crate) struct Taking {
    taken: CounterPlace,
    open: u64,
}

impl Taking {
    pub(crate) fn new(taken: CounterPlace) -> Self {
        Self { taken, open: 0 }
    }

    #[inline(always)]
    pub(crate) fn taken(&mut self, records: usize) {
        self.open += records as u64;
    }

    /// Before the commit.
    #[inline]
    pub(crate) fn save(&mut self, cx: &mut Cx) {
        if self.open > 0 {
            cx.count(self.taken, std::mem::take(&mut self.open));
        }
    }
}

/// The account of an edge, for people and programs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EdgeAccount {
    /// Its number in the plan (`--explain`).
    pub edge: usize,
    /// The stage before it.
    pub from: String,
    /// The stage behind it.
    pub to: String,
    /// Records for a consumer; a broadcast one counts for each.
    pub sent: u64,
    /// Records that a consumer has processed.
    pub processed: u64,
    /// Records dropped because their consumer was dead.
    pub dropped: u64,
    /// Records put aside because they killed whoever processed them.
    pub dead_lettered: u64,
    /// Records on their way: what is left of the sent ones.
    pub in_rings: u64,
    /// The same by worker: those that it sent, processed, dropped and put aside itself.
    pub workers: Vec<WorkerAccount>,
}

/// What one worker did on an edge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerAccount {
    /// Records that it sent.
    pub sent: u64,
    /// Records that it processed.
    pub processed: u64,
    /// Records that it dropped because their consumer was dead.
    pub dropped: u64,
    /// Records that it put aside.
    pub dead_lettered: u64,
}

/// The accounts of all edges between workers.
pub(crate) fn accounts(plan: &Plan, scene: &Scene) -> Vec<EdgeAccount> {
    let between = plan.edges.iter().enumerate().filter_map(|(edge, spec)| {
        let (from, to) = (spec.from?, spec.to?);
        Some((edge, plan.stages[from].name.clone(), plan.stages[to].name.clone()))
    });
    between.map(|(edge, from, to)| account(plan, scene, edge, from, to)).collect()
}

fn account(plan: &Plan, scene: &Scene, edge: usize, from: String, to: String) -> EdgeAccount {
    let read = |worker: usize, count| {
        let at = COUNTERS_AT + index(&plan.layout, edge, count) * ENTRY;
        scene.counter(plan.layout.segments[worker].at + at)
    };
    // What was taken is read before what was sent: what is on its way is then never less than
    // nothing, however fast both go on meanwhile.
    let mut workers = vec![WorkerAccount::default(); plan.workers];
    for (worker, account) in workers.iter_mut().enumerate() {
        account.dead_lettered = read(worker, EdgeCount::Lettered);
        account.processed = read(worker, EdgeCount::Taken).saturating_sub(account.dead_lettered);
        account.dropped = read(worker, EdgeCount::Dropped);
    }
    for (worker, account) in workers.iter_mut().enumerate() {
        account.sent = read(worker, EdgeCount::Sent);
    }
    let sum = |of: fn(&WorkerAccount) -> u64| workers.iter().map(of).sum::<u64>();
    let (sent, processed) = (sum(|w| w.sent), sum(|w| w.processed));
    let (dropped, dead_lettered) = (sum(|w| w.dropped), sum(|w| w.dead_lettered));
    let in_rings = sent.saturating_sub(processed + dropped + dead_lettered);
    EdgeAccount { edge, from, to, sent, processed, dropped, dead_lettered, in_rings, workers }
}

/// Batches that waited longer than the job allows, by all workers.
pub(crate) fn waited(plan: &Plan, scene: &Scene) -> u64 {
    let at = COUNTERS_AT + waited_index(plan) * ENTRY;
    (0..plan.workers).map(|worker| scene.counter(plan.layout.segments[worker].at + at)).sum()
}
