//! `--explain`: the plan in words, with every limit that has a number (R24).

use super::layout::{CELLS_BYTES, LOG_BYTES, LOG_SOFT_BYTES, SPILL_BYTES};
use super::{EdgeKind, Grouping, Plan, WORKERS_MAX};
use crate::config::{Settings, Tier};
use crate::plan::layout::JOURNAL_BYTES;
use crate::worker::attach::held_groups;
use crate::worker::standby::kept_bytes;
use std::fmt::Write;
use testudo_shm::segment::PAGE;

/// The plan as text.
pub(crate) fn text(plan: &Plan, settings: &Settings) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = explain(plan, settings, &mut out);
    out
}

fn explain(plan: &Plan, settings: &Settings, out: &mut String) -> std::fmt::Result {
    writeln!(out, "job {} (plan {:016x})", settings.name, plan.hash)?;
    writeln!(out, "\nstages")?;
    for (index, stage) in plan.stages.iter().enumerate() {
        let place = if stage.isolated { "isolated, " } else { "" };
        writeln!(
            out,
            "  {index}  {}: {place}{} subtasks on workers {:?}",
            stage.name,
            stage.workers.len(),
            stage.workers
        )?;
        for operator in plan.operators.iter().filter(|operator| operator.stage == index) {
            let state = match operator.state.map(|state| state.grouping) {
                None => String::new(),
                Some(Grouping::ByKey) => format!(", state in {} key groups", plan.key_groups),
                Some(Grouping::BySubtask) => ", state by subtask".into(),
            };
            writeln!(
                out,
                "       {} {} (uid {}){state}",
                operator.kind,
                operator.name,
                operator.uid()
            )?;
        }
    }
    edges(plan, out)?;
    workers(plan, settings, out)?;
    limits(plan, settings, out)
}

fn edges(plan: &Plan, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\nedges")?;
    let end = |end: Option<usize>| end.map_or("launcher".into(), |stage| stage.to_string());
    for (index, edge) in plan.edges.iter().enumerate() {
        let rings = plan.layout.rings.iter().filter(|ring| ring.edge == index);
        let (count, bytes) =
            rings.fold((0, 0), |(count, bytes), ring| (count + 1, bytes + ring.bytes));
        let record = match edge.record_bytes {
            Some(size) => format!("{} ({size} bytes)", edge.record),
            None => format!("{} (archived)", edge.record),
        };
        writeln!(
            out,
            "  {index}  {} -> {}: {}, {record}, {count} rings of {} bytes in all",
            end(edge.from),
            end(edge.to),
            edge.kind.label(),
            bytes
        )?;
    }
    Ok(())
}

fn workers(plan: &Plan, settings: &Settings, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\nworkers")?;
    for worker in 0..plan.workers {
        let core = match settings.cores.len() {
            0 => "any core".into(),
            cores => format!("core {}", settings.cores[worker % cores]),
        };
        let fills = plan.layout.rings.iter().filter(|ring| ring.from == worker).count();
        let empties = plan.layout.rings.iter().filter(|ring| ring.to == worker).count();
        writeln!(out, "  testudo-w{worker}: {core}, fills {fills} rings, empties {empties}")?;
    }
    if plan.workers > settings.cores.len() {
        writeln!(out, "  more workers than cores: they share")?;
    }
    Ok(())
}

/// What takes over from whom, and what that costs while nobody dies.
fn tiers(plan: &Plan, settings: &Settings, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\nafter a death")?;
    let of = |tier| (0..plan.workers).filter(move |worker| plan.tiers[*worker] == tier);
    let respawned: Vec<usize> = of(Tier::Respawn).collect();
    if !respawned.is_empty() {
        writeln!(
            out,
            "  workers {respawned:?}, tier 3    a new process is started: some milliseconds, \
             and nothing beforehand"
        )?;
    }
    for (index, workers) in plan.standbys(settings).iter().enumerate() {
        let groups: usize = plan
            .layout
            .groups
            .iter()
            .flat_map(|laid| workers.iter().map(move |worker| (laid, *worker)))
            .map(|(laid, worker)| held_groups(plan, laid.operator, laid.groups, worker).len())
            .sum();
        if plan.tiers[workers[0]] == Tier::Replica {
            writeln!(
                out,
                "  workers {workers:?}, tier 1    testudo-s{index} follows every step on a copy of \
                 its own and takes over: well below a millisecond; it takes a core, as much memory \
                 as the state has, and {} KiB of journal; the worker stands still while it is \
                 copied, a quarter of a second at most",
                JOURNAL_BYTES >> 10
            )?;
            continue;
        }
        writeln!(
            out,
            "  workers {workers:?}, tier 2    testudo-s{index} takes over: no process is started, \
             whatever the size of the state; it is one more process, asleep, with no memory of its \
             own but page tables, {} descriptors while it starts, and about {} KiB of the \
             supervisor's",
            2 * plan.workers + workers.len() + groups + 2,
            (PAGE + kept_bytes(plan)) >> 10
        )?;
        if workers.len() > 1 {
            writeln!(
                out,
                "    shared by {} workers: while it takes over from one, or the next one starts, \
                 the others are of tier 3; --standbys N for more",
                workers.len()
            )?;
        }
    }
    Ok(())
}

fn checkpoints(plan: &Plan, settings: &Settings, out: &mut String) -> std::fmt::Result {
    let Some(folder) = &settings.checkpoint_dir else {
        return writeln!(
            out,
            "\ncheckpoints none (no --checkpoint-dir): a crash of the machine loses the state"
        );
    };
    let limit =
        |bytes: Option<u64>| bytes.map_or("none".into(), |bytes| format!("{bytes} bytes/s"));
    writeln!(out, "\ncheckpoints in {}", folder.display())?;
    writeln!(out, "  schedule                   {}", settings.checkpoints)?;
    writeln!(out, "  regions                    {}", plan.regions.count())?;
    writeln!(
        out,
        "  memory of a worker         {} bytes of staging, {} bytes for blocks that change meanwhile",
        crate::worker::save::STAGING_BYTES,
        settings.checkpoint_memory
    )?;
    writeln!(out, "  bandwidth, all workers     {}", limit(settings.checkpoint_bandwidth))?;
    writeln!(out, "  bandwidth of loading       {}", limit(settings.load_bandwidth))?;
    writeln!(out, "  deadline of a region       {:?}", settings.checkpoint_deadline)
}

fn limits(plan: &Plan, settings: &Settings, out: &mut String) -> std::fmt::Result {
    let layout = &plan.layout;
    let groups: usize = layout.groups.iter().map(|groups| groups.groups).sum();
    writeln!(out, "\nlimits")?;
    writeln!(out, "  workers                    {} of {WORKERS_MAX}", plan.workers)?;
    writeln!(out, "  edges, rings               {}, {}", plan.edges.len(), layout.rings.len())?;
    writeln!(out, "  bytes of a ring            {}", settings.ring_bytes)?;
    writeln!(
        out,
        "  words a worker sleeps on   {} of {}",
        plan.workers,
        testudo_shm::wait::FUTEX_WAITV_MAX
    )?;
    writeln!(
        out,
        "  undo log                   step ends after {}, at most {} bytes",
        LOG_SOFT_BYTES * 3 / 4,
        LOG_BYTES
    )?;
    writeln!(
        out,
        "  cells of a worker          {CELLS_BYTES} bytes, {} names",
        testudo_shm::cell::ENTRIES
    )?;
    writeln!(out, "  spill of a lane            {SPILL_BYTES} bytes")?;
    writeln!(
        out,
        "  key groups                 {groups} segments in all, {} bytes reserved for each",
        layout.groups.first().map_or(0, |groups| groups.bytes)
    )?;
    writeln!(out, "  descriptors                {}", layout.descriptors())?;
    writeln!(out, "  addresses                  {} MiB", layout.reserved_bytes >> 20)?;
    writeln!(
        out,
        "  restart budget             {} deaths in a row without a commit{}",
        settings.restart_budget,
        settings.restart_period.map_or(String::new(), |period| format!(", within {period:?}"))
    )?;
    tiers(plan, settings, out)?;
    checkpoints(plan, settings, out)?;
    plan.slo.explain(out)?;
    if plan.edges.iter().any(|edge| edge.kind == EdgeKind::Stdin) {
        writeln!(
            out,
            "standard input is read by the launching process: \
             its death loses the lines that are in its rings"
        )?;
    }
    Ok(())
}
