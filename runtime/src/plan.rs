//! The plan: a flow turned into stages, subtasks, rings and bytes. Pure computation from the flow
//! and the settings, so every process of a job computes the same one; its hash is compared on
//! attach.
//!
//! `layout` says where every byte lies, `explain` prints all of it, `described` compares it with
//! that of another program.

pub(crate) mod layout;

pub(crate) mod explain;

pub(crate) mod described;

use crate::checkpoint::notes::{Edge, Shape};
use crate::checkpoint::regions::Regions;
use crate::config::{Settings, Tier};
use crate::error::Error;
use crate::flow::Draft;
use crate::slo::Slo;
use crate::source::Subtask;
use layout::Layout;
use std::path::PathBuf;
use testudo_shm::hash::schema;

/// What a frame needs besides its records, and a ring to have room for a mark behind it.
pub(crate) const FRAME_BYTES: usize = 128;

/// Worker processes of a job at most: each waiter sleeps on a word for each of them.
pub const WORKERS_MAX: usize = 120;

/// A stage as drawn.
#[derive(Debug, Clone)]
pub(crate) struct StageSpec {
    pub(crate) name: String,
    pub(crate) parallelism: Option<usize>,
    pub(crate) isolated: bool,
    /// What takes over for its workers, where that is not what the job says.
    pub(crate) tier: Option<Tier>,
}

impl StageSpec {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.into(), parallelism: None, isolated: false, tier: None }
    }
}

/// An operator as drawn.
#[derive(Debug, Clone)]
pub(crate) struct OperatorSpec {
    pub(crate) stage: usize,
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) uid: Option<String>,
    /// Key groups of its state, and a hash of its key's layout.
    pub(crate) state: Option<StateSpec>,
    /// What its state depends on besides types: a window's size.
    pub(crate) detail: String,
    /// Other types that its values may be of when it begins.
    pub(crate) migrates: Vec<Migrates>,
}

/// A type that an operator's values are migrated from.
#[derive(Debug, Clone)]
pub(crate) struct Migrates {
    pub(crate) from: described::Type,
    /// Of keys and such values together.
    pub(crate) schema: u64,
}

impl OperatorSpec {
    pub(crate) fn new(stage: usize, name: &str, kind: &'static str) -> Self {
        let (name, detail) = (name.into(), String::new());
        Self { stage, name, kind, uid: None, state: None, detail, migrates: Vec::new() }
    }
}

/// The state of an operator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StateSpec {
    pub(crate) grouping: Grouping,
    /// Of keys and values together.
    pub(crate) schema: u64,
    /// Name and schema of the keys, and of the values.
    pub(crate) key: (&'static str, u64),
    pub(crate) value: (&'static str, u64),
}

impl StateSpec {
    /// What a group's segment says of itself: its keys. Each named state in it tells its own types.
    pub(crate) fn of_groups(&self) -> u64 {
        testudo_shm::hash::schema("keys", &[self.key.1])
    }
}

/// How an operator's state is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grouping {
    /// By key group.
    ByKey,
    /// One group for each subtask.
    BySubtask,
}

/// How an edge distributes records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EdgeKind {
    /// To the subtask of the same index.
    Forward,
    /// By key group.
    Hash,
    /// Each in turn.
    RoundRobin,
    /// To all.
    Broadcast,
    /// To the only subtask.
    Gather,
    /// To the launching process, which prints.
    Stdout,
    /// From the launching process, which reads standard input.
    Stdin,
}

impl EdgeKind {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Hash => "hash",
            Self::RoundRobin => "round-robin",
            Self::Broadcast => "broadcast",
            Self::Gather => "gather",
            Self::Stdout => "stdout",
            Self::Stdin => "stdin",
        }
    }
}

/// An edge as drawn; `None` is the launching process.
#[derive(Debug, Clone)]
pub(crate) struct EdgeSpec {
    pub(crate) from: Option<usize>,
    pub(crate) to: Option<usize>,
    pub(crate) kind: EdgeKind,
    pub(crate) record: String,
    pub(crate) schema: u64,
    pub(crate) record_bytes: Option<usize>,
}

/// A file or folder that a job writes, and that no other may write at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The file, or the folder of parts.
    pub path: PathBuf,
    /// Extension of the parts when it is a folder.
    pub parts: Option<String>,
    /// First line of each file.
    pub header: Option<String>,
}

/// What is counted for an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CounterKind {
    In,
    Out,
    Late,
    Rejected,
    Dropped,
    DeadLettered,
}

impl CounterKind {
    pub(crate) const ALL: [Self; 6] =
        [Self::In, Self::Out, Self::Late, Self::Rejected, Self::Dropped, Self::DeadLettered];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::In => "records_in",
            Self::Out => "records_out",
            Self::Late => "late",
            Self::Rejected => "rejected",
            Self::Dropped => "dropped",
            Self::DeadLettered => "dead_lettered",
        }
    }
}

/// A stage with its place.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    pub(crate) name: String,
    /// The worker of each subtask.
    pub(crate) workers: Vec<usize>,
    pub(crate) isolated: bool,
}

/// A process of the job, as an index: the workers, then the launching process.
pub(crate) type Process = usize;

/// The whole plan.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) workers: usize,
    /// What takes over for each worker. Not a part of the hash: it changes no result.
    pub(crate) tiers: Vec<Tier>,
    pub(crate) stages: Vec<Stage>,
    pub(crate) edges: Vec<EdgeSpec>,
    pub(crate) operators: Vec<OperatorSpec>,
    pub(crate) user_counters: Vec<String>,
    /// Each with the operator that writes it.
    pub(crate) outputs: Vec<(Output, usize)>,
    /// Files that sources read.
    pub(crate) inputs: Vec<PathBuf>,
    /// Sources that cannot be read again.
    pub(crate) read_once: Vec<usize>,
    pub(crate) key_groups: usize,
    /// What the job promises.
    pub(crate) slo: Slo,
    pub(crate) layout: Layout,
    /// Workers that share no data with others: each has its own cuts.
    pub(crate) regions: Regions,
    pub(crate) hash: u64,
}

/// How many subtasks a stage has; whether it can have them, and what else it asks for.
fn subtasks(draft: &Draft, index: usize, settings: &Settings) -> Result<usize, Error> {
    let spec = &draft.stages[index];
    let subtasks = spec.parallelism.unwrap_or(settings.workers);
    if subtasks == 0 || (!spec.isolated && subtasks > settings.workers) {
        return Err(Error::Plan(format!(
            "stage {} has parallelism {subtasks}, but the job has {} workers: \
             lower it, isolate the stage, or raise --workers",
            stage_label(draft, index),
            settings.workers
        )));
    }
    if !spec.isolated && spec.tier.is_some() {
        return Err(Error::Plan(format!(
            "stage {} has a tier, but no process of its own: isolate it, \
             or set --tier for all workers",
            stage_label(draft, index)
        )));
    }
    Ok(subtasks)
}

impl Plan {
    /// What an operator that deals with the outside is called to people: the output that it writes,
    /// else its own name.
    pub(crate) fn outside_name(&self, operator: usize) -> String {
        let output = self.outputs.iter().find(|(_, of)| *of == operator);
        match (output, self.operators.get(operator)) {
            (Some((output, _)), _) => format!("output {}", output.path.display()),
            (None, Some(operator)) => format!("{} {}", operator.kind, operator.name),
            (None, None) => format!("operator {operator}"),
        }
    }

    /// Plans a drawn flow.
    pub(crate) fn new(draft: &Draft, settings: &Settings) -> Result<Self, Error> {
        check(draft)?;
        let mut stages = Vec::new();
        let mut workers = settings.workers;
        let slo = Slo::settle(draft, settings);
        let tier = settings.tier.unwrap_or(slo.tier());
        let mut tiers = vec![tier; workers];
        for (index, spec) in draft.stages.iter().enumerate() {
            let subtasks = subtasks(draft, index, settings)?;
            let first = if spec.isolated { workers } else { 0 };
            if spec.isolated {
                workers += subtasks;
                tiers.resize(workers, spec.tier.unwrap_or(tier));
            }
            let workers = (first..first + subtasks).collect();
            stages.push(Stage {
                name: stage_label(draft, index),
                workers,
                isolated: spec.isolated,
            });
        }
        if workers > WORKERS_MAX {
            return Err(Error::Plan(format!(
                "{workers} worker processes are more than the {WORKERS_MAX} that a job may have; \
                 lower --workers"
            )));
        }
        let mut operators = draft.operators.clone();
        give_uids(&mut operators)?;
        let key_groups = settings.key_groups;
        let mut layout = Layout::new(
            workers,
            &stages,
            &draft.edges,
            &operators,
            draft.user_counters.len(),
            settings,
        )?;
        check_rings(&layout, &draft.edges)?;
        check_tiers(&tiers, &slo)?;
        layout.place_follows((0..workers).filter(|worker| tiers[*worker] == Tier::Replica));
        let mut plan = Self {
            workers,
            tiers,
            stages,
            edges: draft.edges.clone(),
            operators,
            user_counters: draft.user_counters.clone(),
            outputs: draft.outputs.clone(),
            inputs: draft.inputs.clone(),
            read_once: draft.read_once.iter().map(|(source, _)| *source).collect(),
            key_groups,
            slo,
            regions: regions(workers, &layout),
            layout,
            hash: 0,
        };
        plan.hash = plan.compute_hash();
        Ok(plan)
    }

    /// Of what must be equal in all processes that share the job's memory, whatever program they
    /// run: not names of stages, not operators that are code alone, and not the types of values,
    /// which each group's segment tells.
    fn compute_hash(&self) -> u64 {
        let mut parts =
            vec![self.workers as u64, self.key_groups as u64, self.layout.arena_bytes as u64];
        for stage in &self.stages {
            parts.extend(stage.workers.iter().map(|worker| *worker as u64));
            parts.push(u64::MAX);
        }
        for edge in &self.edges {
            let end = |end: Option<usize>| end.map_or(u64::MAX, |stage| stage as u64);
            parts.push(schema(edge.kind.label(), &[end(edge.from), end(edge.to), edge.schema]));
        }
        for operator in self.operators.iter().filter(|operator| operator.is_bound()) {
            let state = operator.state.map_or(0, |state| state.key.1);
            parts.push(schema(operator.uid(), &[operator.stage as u64, state]));
        }
        schema("plan", &parts)
    }

    /// Identifies stages, subtasks and edges, whatever the bytes of rings and the number of groups:
    /// cells and bytes in flight mean the same in two runs of one shape.
    pub(crate) fn shape(&self) -> u64 {
        let mut parts = vec![self.workers as u64];
        for stage in &self.stages {
            parts.extend(stage.workers.iter().map(|worker| *worker as u64));
            parts.push(u64::MAX);
        }
        for edge in &self.edges {
            let end = |end: Option<usize>| end.map_or(u64::MAX, |stage| stage as u64);
            parts.push(schema(edge.kind.label(), &[end(edge.from), end(edge.to), edge.schema]));
        }
        for operator in self.operators.iter().filter(|operator| operator.is_bound()) {
            parts.push(schema(operator.uid(), &[operator.stage as u64]));
        }
        schema("shape", &parts)
    }

    /// Stages, operators and edges, to be compared with those of a later run.
    pub(crate) fn as_shape(&self) -> Shape {
        let is_inlet = |operator: &&OperatorSpec| operator.kind == "inlet";
        let named = |operator: &OperatorSpec| (operator.uid().to_owned(), operator.stage);
        let operators = self.operators.iter();
        let own = operators.clone().filter(|operator| !is_inlet(operator)).map(named);
        Shape {
            stages: self.stages.iter().map(|stage| stage.workers.clone()).collect(),
            operators: own.chain(operators.filter(is_inlet).map(named)).collect(),
            edges: self.edges.iter().map(as_edge).collect(),
        }
    }

    /// Schema of keys and values of each operator with state, by uid.
    pub(crate) fn states(&self) -> Vec<(String, u64)> {
        let state = |operator: &OperatorSpec| {
            operator.state.map(|state| (operator.uid().to_owned(), state.schema))
        };
        self.operators.iter().filter_map(state).collect()
    }

    /// The workers that each standby of the job is for; behind them the replicas, each for one.
    pub(crate) fn standbys(&self, settings: &Settings) -> Vec<Vec<Process>> {
        let of = |tier| (0..self.workers).filter(move |worker| self.tiers[*worker] == tier);
        let workers: Vec<Process> = of(Tier::Standby).collect();
        let count = settings.standbys.min(workers.len());
        let share = |index| workers.iter().skip(index).step_by(count).copied().collect();
        (0..count).map(share).chain(of(Tier::Replica).map(|worker| vec![worker])).collect()
    }

    /// The launching process, as a process index.
    pub(crate) fn supervisor(&self) -> Process {
        self.workers
    }

    /// The processes at an edge's end: one for each subtask.
    pub(crate) fn processes(&self, end: Option<usize>) -> Vec<Process> {
        end.map_or_else(|| vec![self.workers], |stage| self.stages[stage].workers.clone())
    }

    /// The subtask of a stage that a worker runs.
    pub(crate) fn subtask(&self, stage: usize, worker: usize) -> Option<Subtask> {
        let workers = &self.stages[stage].workers;
        let index = workers.iter().position(|at| *at == worker)?;
        Some(Subtask { index, count: workers.len() })
    }

    /// Subtasks of all sources: they share the job's rate.
    pub(crate) fn source_subtasks(&self) -> usize {
        let sources = self.operators.iter().filter(|operator| operator.kind == "source");
        sources.map(|operator| self.stages[operator.stage].workers.len()).sum()
    }
}

impl OperatorSpec {
    /// Whether something outlives a process by its uid: positions, state, or its end of an
    /// exchange. Others are code alone.
    pub(crate) fn is_bound(&self) -> bool {
        self.state.is_some() || matches!(self.kind, "source" | "sink" | "inlet")
    }

    /// The identity by which its state is found.
    pub(crate) fn uid(&self) -> &str {
        self.uid.as_deref().unwrap_or(&self.name)
    }
}

/// Two workers are in one region when a ring connects them. All subtasks of a worker are in its
/// region: they share one transaction and one fate.
fn regions(workers: usize, layout: &Layout) -> Regions {
    let rings = layout.rings.iter().map(|ring| (ring.from, ring.to));
    let edges: Vec<_> = rings.filter(|(from, to)| *from < workers && *to < workers).collect();
    Regions::of(workers, &edges)
}

fn as_edge(edge: &EdgeSpec) -> Edge {
    let EdgeSpec { from, to, schema, .. } = *edge;
    Edge { from, to, kind: edge.kind.label().to_owned(), schema }
}

/// The name of a stage: its first operator's, which may have been renamed since.
fn stage_label(draft: &Draft, stage: usize) -> String {
    let mut names = draft.operators.iter().filter(|operator| operator.stage == stage);
    let first = names.next().map_or(draft.stages[stage].name.clone(), |op| op.name.clone());
    let rest: Vec<&str> = names.map(|operator| operator.name.as_str()).collect();
    if rest.is_empty() { first } else { format!("{first}+{}", rest.join("+")) }
}

fn check(draft: &Draft) -> Result<(), Error> {
    if let Some(message) = draft.errors.first() {
        return Err(Error::Plan(message.clone()));
    }
    if draft.stages.is_empty() {
        return Err(Error::Plan("the flow is empty: add a source".into()));
    }
    for (stage, factory) in draft.factories.iter().enumerate() {
        if factory.is_none() {
            let name = stage_label(draft, stage);
            return Err(Error::Plan(format!(
                "the stream behind {name} goes nowhere: end it with sink, for_each or print"
            )));
        }
    }
    for edge in &draft.edges {
        if edge.record_bytes.is_some_and(|bytes| bytes == 0) {
            return Err(Error::Plan(format!("record type {} has no bytes", edge.record)));
        }
    }
    Ok(())
}

/// A replica can follow what its worker says that it did; what is dropped because a peer is down is
/// not said.
fn check_tiers(tiers: &[Tier], slo: &Slo) -> Result<(), Error> {
    if slo.is_partial() && tiers.contains(&Tier::Replica) {
        return Err(Error::Plan(
            "tier 1 needs --completeness full: when peers drop records, no replica can do as its \
             worker did; use --tier 2"
                .into(),
        ));
    }
    Ok(())
}

/// Plain records have their size now: one that no ring can take would never be sent.
fn check_rings(layout: &Layout, edges: &[EdgeSpec]) -> Result<(), Error> {
    for ring in &layout.rings {
        let edge = &edges[ring.edge];
        let Some(bytes) = edge.record_bytes.filter(|bytes| bytes + FRAME_BYTES > ring.bytes) else {
            continue;
        };
        let wanted = (bytes + FRAME_BYTES).next_power_of_two();
        return Err(Error::Plan(format!(
            "a record of {bytes} bytes ({}) does not fit into a ring of {}; \
             raise --ring-bytes to at least {wanted}",
            edge.record, ring.bytes
        )));
    }
    Ok(())
}

/// Numbers operators that have the same name and no uid; refuses the same uid twice.
fn give_uids(operators: &mut [OperatorSpec]) -> Result<(), Error> {
    let mut taken = std::collections::HashSet::new();
    for operator in operators.iter().filter(|operator| operator.uid.is_some()) {
        if !taken.insert(operator.uid().to_owned()) {
            return Err(Error::Plan(format!("two operators have the uid {}", operator.uid())));
        }
    }
    for operator in operators.iter_mut().filter(|operator| operator.uid.is_none()) {
        let numbered = (1..).map(|n| match n {
            1 => operator.name.clone(),
            n => format!("{}-{n}", operator.name),
        });
        operator.uid = numbered.into_iter().find(|uid| taken.insert(uid.clone()));
    }
    Ok(())
}
