//! Whether a region, or the whole job, may go back: only where what it gives is the same as if it
//! never had. Input must be there once more, and output that nobody can take back must not come
//! twice from the very beginning. (From a checkpoint, the lines since then may: see README.)
//!
//! Called by `rewind`, and by `recover` for what the ladder of each worker has.

use crate::config::Settings;
use crate::plan::{EdgeKind, Output, Plan};
use crate::supervisor::ladder::Rungs;
use std::path::Path;

/// Whether some worker of a region has an edge of this kind with the launching process.
fn has_edge(plan: &Plan, region: usize, kind: EdgeKind) -> bool {
    let workers = plan.regions.tasks(region);
    let mut rings = plan.layout.rings.iter().filter(|ring| plan.edges[ring.edge].kind == kind);
    rings.any(|ring| workers.contains(&ring.from) || workers.contains(&ring.to))
}

/// Whether an operator has a subtask in the region.
fn has_operator(plan: &Plan, region: usize, operator: usize) -> bool {
    let workers = plan.regions.tasks(region);
    plan.stages[plan.operators[operator].stage].workers.iter().any(|own| workers.contains(own))
}

/// Whether a region prints.
pub(crate) fn prints(plan: &Plan, region: usize) -> bool {
    has_edge(plan, region, EdgeKind::Stdout)
}

/// Why the input of a region cannot be read again.
pub(crate) fn region_cannot(plan: &Plan, region: usize) -> Option<String> {
    if has_edge(plan, region, EdgeKind::Stdin) {
        return Some("standard input cannot be read again".into());
    }
    if plan.slo.is_partial() {
        return None;
    }
    let mut once = plan.read_once.iter().filter(|source| has_operator(plan, region, **source));
    let name = &plan.operators[*once.next()?].name;
    Some(format!("source {name} cannot be read again, and completeness is full"))
}

/// Why a region cannot begin again from nothing.
pub(crate) fn region_cannot_begin_again(plan: &Plan, region: usize) -> Option<String> {
    const HELP: &str = "(give the job a --checkpoint-dir)";
    if plan.slo.is_partial() {
        return None;
    }
    if prints(plan, region) {
        let what = "there is no checkpoint, and what it printed cannot be taken back";
        return Some(format!("{what} {HELP}"));
    }
    let own = plan.outputs.iter().filter(|(_, sink)| has_operator(plan, region, *sink));
    let (output, _) = own.into_iter().find(|(output, _)| keeps_nothing(output))?;
    Some(format!(
        "there is no checkpoint, and what it wrote to {} cannot be taken back {HELP}",
        output.path.display()
    ))
}

/// Whether what is written to an output is gone: to a pipe or a terminal, say.
fn keeps_nothing(output: &Output) -> bool {
    let is_null = output.path == Path::new("/dev/null");
    let meta = std::fs::metadata(&output.path);
    output.parts.is_none() && !is_null && meta.is_ok_and(|meta| !meta.is_file())
}

/// Why the job as a whole cannot go back.
pub(crate) fn job_cannot(plan: &Plan, settings: &Settings) -> Option<String> {
    let has_past = settings.checkpoint_dir.is_some();
    (0..plan.regions.count()).find_map(|region| {
        let cannot_begin = || region_cannot_begin_again(plan, region).filter(|_| !has_past);
        let why = region_cannot(plan, region).or_else(cannot_begin)?;
        Some(format!("region {region}: {why}"))
    })
}

/// The rungs above careful that a worker has.
pub(crate) fn rungs(plan: &Plan, settings: &Settings, worker: usize) -> Rungs {
    let region = plan.regions.of_task(worker);
    let has_past =
        settings.checkpoint_dir.is_some() || region_cannot_begin_again(plan, region).is_none();
    let has_region = region_cannot(plan, region).is_none() && has_past;
    Rungs { cold: false, region: has_region, job: job_cannot(plan, settings).is_none() }
}
