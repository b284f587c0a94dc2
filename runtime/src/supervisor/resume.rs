//! Resuming: which checkpoint a job goes on from, whether it may, and what its workers must know.
//!
//! Invariants: nothing is changed before everything was checked: job, schemas, files; the older
//! checkpoint is used only when the newer one is damaged, and that is said; before any output is
//! taken back, the chosen checkpoint is made the newest, so that a crash cannot find the other one
//! again.
//!
//! Called by `launch`.

use super::checkpoint::{RUN, StoreThread};
use super::folders::Folders;
use crate::checkpoint::notes::{Edge, Notes, Part, Shape};
use crate::config::Settings;
use crate::error::Error;
use crate::plan::{Grouping, Plan};
use crate::sink::SinkHooks;
use crate::worker::restore::{OldWorker, Restore};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use testudo_shm::hash::name_hash;
use testudo_state::checkpoint::{Manifest, ManifestName, Store, StoreError};

/// What a worker of the earlier run has left.
#[derive(Debug)]
pub(crate) struct Old {
    pub(crate) worker: usize,
    pub(crate) notes: Notes,
    pub(crate) cells: HashMap<u64, Vec<u8>>,
}

/// A checkpoint that was chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// The number of its folder.
    pub(crate) folder: usize,
    /// Its manifest's file, where the folder has a newer checkpoint: that must not be found again
    /// once outputs are taken back to this one.
    pub(crate) past: Option<String>,
    pub(crate) manifest: Manifest,
    pub(crate) old: Vec<Old>,
}

/// A checkpoint that fits the plan.
#[derive(Debug)]
pub(crate) struct Resumed {
    /// See [`Chosen`].
    pub(crate) past: Option<String>,
    /// The run that it was taken in.
    pub(crate) run: u64,
    pub(crate) restore: Restore,
    pub(crate) old: Vec<Old>,
}

/// Chooses the checkpoint that the settings ask for: the newest whole one in any folder, or the one
/// that is named. `unusable` are those that turned out to be damaged. `None`: there is none yet.
pub(crate) fn choose(
    folders: &Folders,
    settings: &Settings,
    unusable: &[u64],
) -> Result<Option<Chosen>, Error> {
    let (mut found, mut failure): (Vec<Chosen>, _) = (Vec::new(), None);
    for (folder, store) in folders.usable() {
        match choose_in(store, settings, unusable) {
            Ok(chosen) => found.extend(chosen.map(|chosen| Chosen { folder, ..chosen })),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match (newest(found), failure) {
        (None, Some(error)) => Err(error),
        (Some(chosen), Some(error)) => {
            if settings.resume_from.is_none() {
                crate::say!("testudo: {error}; checkpoint {} is used", chosen.manifest.id);
            }
            Ok(Some(chosen))
        }
        (newest, None) => Ok(newest),
    }
}

/// The newest of what several folders have. Numbers are those of one line of checkpoints; a later
/// run may have gone on from an earlier one of them, while the other folder was not there.
pub(crate) fn newest(found: Vec<Chosen>) -> Option<Chosen> {
    found.into_iter().max_by_key(|chosen| {
        (run_of(&chosen.manifest), chosen.manifest.id, std::cmp::Reverse(chosen.folder))
    })
}

/// When the run began that a checkpoint was taken in.
fn run_of(manifest: &Manifest) -> u64 {
    manifest.figures.get(RUN).copied().unwrap_or(0)
}

fn choose_in(
    store: &StoreThread,
    settings: &Settings,
    unusable: &[u64],
) -> Result<Option<Chosen>, Error> {
    let named = settings.resume_from.clone();
    let unusable = unusable.to_vec();
    store.ask(move |store| match named {
        Some(name) => open_named(store, &name).map(Some),
        None => open_newest(store, |manifest| !unusable.contains(&manifest.id)),
    })?
}

/// Opens the newest whole checkpoint that is usable.
pub(crate) fn open_newest(
    store: &mut Store,
    is_usable: impl Fn(&Manifest) -> bool,
) -> Result<Option<Chosen>, Error> {
    let failed = |error: StoreError| Error::Checkpoint(error.to_string());
    let mut damages = Vec::new();
    // The lists of blocks are the workers' to read: a damaged one brings the job back here.
    for candidate in store.named().map_err(failed)? {
        let Some(manifest) = &candidate.manifest else {
            damages.extend(candidate.damage.map(|damage| damage.to_string()));
            continue;
        };
        if !is_usable(manifest) {
            damages.push(format!("checkpoint {} has a damaged block", manifest.id));
            continue;
        }
        let opened = match &candidate.damage {
            Some(damage) => Err(Error::Damaged(damage.to_string())),
            None => open(store, manifest.clone()),
        };
        match opened {
            Ok(chosen) => {
                for damage in &damages {
                    crate::say!("testudo: {damage}");
                }
                if !damages.is_empty() {
                    crate::say!("testudo: going on from checkpoint {} instead", manifest.id);
                }
                let past = (!damages.is_empty()).then_some(candidate.name);
                return Ok(Some(Chosen { past, ..chosen }));
            }
            Err(error) => damages.push(error.to_string()),
        }
    }
    if damages.is_empty() {
        return Ok(None);
    }
    Err(Error::Checkpoint(format!(
        "no checkpoint in {} can be used: {}; begin afresh without --resume",
        store.folder().display(),
        damages.join("; ")
    )))
}

fn open_named(store: &mut Store, name: &str) -> Result<Chosen, Error> {
    let names = match name.parse::<u64>() {
        Ok(id) => {
            [false, true].map(|savepoint| ManifestName { id, savepoint }.to_string()).to_vec()
        }
        Err(_) => {
            let path = Path::new(name);
            let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let canonical = |path: &Path| path.canonicalize().ok();
            if folder.is_some_and(|folder| canonical(folder) != canonical(store.folder())) {
                return Err(Error::Checkpoint(format!(
                    "{name} does not lie in the checkpoint folder {}; \
                     give its folder as --checkpoint-dir",
                    store.folder().display()
                )));
            }
            vec![path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())]
        }
    };
    let folder = store.folder().to_owned();
    let found = names.iter().find(|name| folder.join(name).is_file());
    let Some(found) = found else {
        return Err(Error::Checkpoint(format!(
            "there is no checkpoint {name} in {}; `testudo checkpoint list {}` shows what there is",
            folder.display(),
            folder.display()
        )));
    };
    let (disk, pool) = store.disk();
    let manifest = Manifest::read(disk, pool, &folder, found)?;
    let chosen = open(store, manifest)?;
    Ok(Chosen { past: Some(found.clone()), ..chosen })
}

/// Reads what all workers have noted.
fn open(store: &mut Store, manifest: Manifest) -> Result<Chosen, Error> {
    let folder = store.folder().to_owned();
    let mut old = Vec::new();
    for region in &manifest.regions {
        for file in &region.workers {
            let worker = file.worker as usize;
            let chain = Arc::new(store.chain_end(&file.file)?);
            let (disk, pool) = store.disk();
            let OldWorker { notes, cells, .. } =
                OldWorker::read(worker, chain, disk, pool, &folder)?;
            old.push(Old { worker, notes, cells });
        }
    }
    Ok(Chosen { folder: 0, past: None, manifest, old })
}

impl Chosen {
    /// What it has of these workers alone, where they are the same as then.
    pub(crate) fn of_workers(mut self, plan: &Plan, workers: &[usize]) -> Self {
        let shape = plan.shape();
        let is_same = self.manifest.workers as usize == plan.workers;
        if !is_same || self.old.iter().any(|old| old.notes.shape != shape) {
            return self;
        }
        self.old.retain(|old| workers.contains(&old.worker));
        for region in &mut self.manifest.regions {
            region.workers.retain(|file| workers.contains(&(file.worker as usize)));
        }
        self.manifest.regions.retain(|region| !region.workers.is_empty());
        self
    }

    /// Checks that the job may go on from this, and says what its workers must know.
    pub(crate) fn fit(
        self,
        plan: &Plan,
        settings: &Settings,
        lazy: bool,
    ) -> Result<Resumed, Error> {
        check(&self.manifest, plan, settings)?;
        check_types(&self.manifest, &self.old, plan)?;
        self.fit_again(plan, settings, lazy)
    }

    /// The same while the job runs: its workers may run another program than the supervisor, and
    /// check the types of values themselves.
    pub(crate) fn fit_again(
        self,
        plan: &Plan,
        settings: &Settings,
        lazy: bool,
    ) -> Result<Resumed, Error> {
        let Self { past, manifest, old, .. } = self;
        self::check(&manifest, plan, settings)?;
        let shape = plan.shape();
        let same_shape = manifest.workers as usize == plan.workers
            && old.iter().all(|old| old.notes.shape == shape);
        let was = old.first().map(|old| old.notes.was.clone()).unwrap_or_default();
        let (stages, edges) = compare(&was, plan);
        check_flights(&manifest, &old, &edges, settings)?;
        let files = manifest.regions.iter().flat_map(|region| &region.workers);
        let restore = Restore {
            id: manifest.id,
            same_shape,
            is_lazy: lazy,
            files: files.map(|file| (file.worker as usize, file.file.clone())).collect(),
            spillers: old.iter().filter(|o| !o.notes.spills.is_empty()).map(|o| o.worker).collect(),
            stages,
            edges,
            parts: deal_parts(&old, plan, same_shape),
        };
        let run = run_of(&manifest);
        Ok(Resumed { past, run, restore, old })
    }
}

impl Resumed {
    /// The position that a subtask of a sink had, and the cut at which it had it.
    pub(crate) fn sink_position(
        &self,
        plan: &Plan,
        sink: &SinkHooks,
        subtask: usize,
    ) -> Option<(&[u8], u64)> {
        let worker = self.restore.worker_of(sink.stage, subtask)?;
        let old = self.old.iter().find(|old| old.worker == worker)?;
        let uid = plan.operators[sink.operator].uid();
        let cell = old.cells.get(&name_hash(&format!("{uid}/position")))?;
        Some((cell, self.restore.epoch_of(worker)?))
    }
}

fn check(manifest: &Manifest, plan: &Plan, settings: &Settings) -> Result<(), Error> {
    let refuse = |message: String| Err(Error::Checkpoint(message));
    if manifest.job != settings.name {
        return refuse(format!(
            "checkpoint {} is of job {:?}, this is job {:?}; \
             choose another --checkpoint-dir, give --name {:?}, or begin afresh without --resume",
            manifest.id, manifest.job, settings.name, manifest.job
        ));
    }
    for was in &manifest.operators {
        let now = plan.operators.iter().find(|operator| operator.uid() == was.uid);
        let Some(state) = now.and_then(|operator| operator.state) else {
            if settings.allow_dropped_state {
                continue;
            }
            return refuse(format!(
                "checkpoint {} has state of operator {} (uid {}), which this job does not have; \
                 give the operator that uid, drop its state with --allow-dropped-state, or begin \
                 afresh without --resume",
                manifest.id, was.name, was.uid
            ));
        };
        let grouping = match state.grouping {
            Grouping::ByKey => "key",
            Grouping::BySubtask => "subtask",
        };
        if grouping != was.grouping {
            return refuse(format!(
                "operator {} (uid {}) has state by {grouping}, in checkpoint {} by {}: give it \
                 another uid, or begin afresh without --resume",
                was.name, was.uid, manifest.id, was.grouping
            ));
        }
    }
    Ok(())
}

/// Keys and values have the types that they have in the checkpoint, or are migrated from them. What
/// an operator declares by name is checked by the worker that opens it.
fn check_types(manifest: &Manifest, old: &[Old], plan: &Plan) -> Result<(), Error> {
    for was in &manifest.operators {
        let now = plan.operators.iter().find(|operator| operator.uid() == was.uid);
        let Some((now, state)) = now.and_then(|now| Some((now, now.state?))) else { continue };
        // An update may have brought another program than the supervisor's, which wrote the
        // manifest.
        let said = old.iter().flat_map(|old| &old.notes.states).filter(|(uid, _)| *uid == was.uid);
        let mut said: Vec<u64> = said.map(|(_, schema)| *schema).collect();
        if said.is_empty() {
            said.push(was.schema);
        }
        let is_known = |schema: u64| {
            state.schema == schema || now.migrates.iter().any(|from| from.schema == schema)
        };
        if let Some(other) = said.into_iter().find(|schema| !is_known(*schema)) {
            return Err(Error::Checkpoint(format!(
                "operator {} (uid {}) has keys or values of another type (schema {:016x}, {} by \
                 {}) than in checkpoint {} ({other:016x}); its state cannot be read as what it is \
                 now: run the program that wrote it, say how its values are migrated \
                 (.migrate_from), give the operator another uid, or begin afresh without --resume",
                was.name, was.uid, state.schema, state.value.0, state.key.0, manifest.id
            )));
        }
    }
    Ok(())
}

/// What a plan's stages and edges were in the earlier run: by stage its number and workers, by edge
/// the numbers of those whose records in flight it takes.
type Then = (Vec<Option<(usize, Vec<usize>)>>, Vec<Vec<usize>>);

/// Stages are known by the uids of their operators. An edge is what it was when it has the same
/// ends; what was in flight on an edge that is gone goes on from the same producer to whoever takes
/// its records now, else to the same consumer.
fn compare(was: &Shape, plan: &Plan) -> Then {
    let now = plan.as_shape();
    let known = |stage: usize| {
        let own = now.operators.iter().filter(|(_, of)| *of == stage);
        let mut found = own.filter_map(|(uid, _)| was.operators.iter().find(|(old, _)| old == uid));
        let (_, old) = found.next()?;
        Some((*old, was.stages.get(*old)?.clone()))
    };
    let stages: Vec<_> = (0..now.stages.len()).map(known).collect();
    // An end that is not known is like no other.
    let then = |end: Option<usize>| match end {
        None => Some(None),
        Some(stage) => stages[stage].as_ref().map(|(number, _)| Some(*number)),
    };
    let mut edges = vec![Vec::new(); now.edges.len()];
    let is_same = |old: &Edge, new: &Edge, rule: usize| {
        let (from, to) = (then(new.from) == Some(old.from), then(new.to) == Some(old.to));
        old.schema == new.schema
            && match rule {
                0 => from && to && old.kind == new.kind,
                1 => from,
                _ => to,
            }
    };
    for (number, old) in was.edges.iter().enumerate() {
        let alike = |rule: usize| {
            let mut places = now.edges.iter().enumerate();
            // Two edges between the same stages keep their order.
            let is_free = |place: usize| rule > 0 || edges[place].is_empty();
            places.find(|(place, new)| is_same(old, new, rule) && is_free(*place))
        };
        if let Some((place, _)) = (0..3).find_map(alike) {
            edges[place].push(number);
        }
    }
    (stages, edges)
}

/// What was in flight on an edge that the job does not have any more has nowhere to go.
fn check_flights(
    manifest: &Manifest,
    old: &[Old],
    edges: &[Vec<usize>],
    settings: &Settings,
) -> Result<(), Error> {
    let flights = old.iter().flat_map(|old| &old.notes.flights).map(|flight| flight.edge);
    let spills = old.iter().flat_map(|old| &old.notes.spills).map(|spill| spill.edge);
    let mut lost =
        flights.chain(spills).filter(|edge| !edges.iter().any(|then| then.contains(edge)));
    match lost.next() {
        Some(edge) if !settings.allow_dropped_state => Err(Error::Checkpoint(format!(
            "checkpoint {} has records in flight on exchange {edge} of the job as it was, which it \
             does not have any more: take a savepoint of the job as it was (it has none), or drop \
             them with --allow-dropped-state",
            manifest.id
        ))),
        _ => Ok(()),
    }
}

/// Who reads which part of each source: as it was, or dealt out in turn.
fn deal_parts(old: &[Old], plan: &Plan, same_shape: bool) -> Vec<(String, Vec<Vec<Part>>)> {
    let sources = plan.operators.iter().filter(|operator| operator.kind == "source");
    let deal = sources.map(|operator| {
        let stage = &plan.stages[operator.stage];
        let mut subtasks = vec![Vec::new(); stage.workers.len()];
        let mut next = 0;
        for old in old {
            for part in old.notes.parts.iter().filter(|part| part.operator == operator.uid()) {
                let own = stage.workers.iter().position(|worker| *worker == old.worker);
                let subtask = match own {
                    Some(own) if same_shape => own,
                    _ => next % subtasks.len(),
                };
                subtasks[subtask].push(part.clone());
                next += 1;
            }
        }
        if next == 0 {
            // A source that the job did not have: each subtask reads its own part, from the start.
            for (index, parts) in subtasks.iter_mut().enumerate() {
                let (operator, count) = (operator.uid().to_owned(), stage.workers.len());
                parts.push(Part { operator, index, count });
            }
        }
        (operator.uid().to_owned(), subtasks)
    });
    deal.collect()
}
