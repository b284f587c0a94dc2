//! Resuming: what attaching does besides, when the job goes on from a checkpoint, and how a
//! worker's cuts are set up.
//!
//! Order: cells and counters are brought back before anything is opened; stages then find their
//! cells as if their predecessor had just died; what was in flight becomes rings of its own. All of
//! it belongs to the transaction of attaching, but for pages of state, which are put in place
//! beforehand, or missing and brought when they are touched.
//!
//! Invariants: a successor that finds the work done takes nothing again; one that finds it half
//! done does it from the start, over what is there.
//!
//! Called by `attach`.

use super::attach::{Attach, held_groups, put_pages};
use super::context::{InRing, Origin};
use super::cut::{CutPlan, Cutter, Extent, Held, Ledger};
use super::load::{Load, Loader, Target};
use super::restore::{Checkpoints, Restored, open_disk};
use super::save::Saver;
use crate::checkpoint::notes::{self, Part};
use crate::error::Error;
use crate::exchange::account;
use crate::exchange::inlet::{Channel, Rest};
use crate::exchange::route::owner_of;
use crate::flow::chain::KeyOf;
use crate::plan::layout::stride;
use crate::plan::{EdgeKind, Grouping};
use crate::source::Subtask;
use crate::supervisor::description::Description;
use crate::testing::{Point, point, spawn_armed};
use std::rc::Rc;
use std::sync::Arc;
use testudo_shm::consumer::Consumer;
use testudo_shm::hash::name_hash;
use testudo_shm::header::{ControlHeader, WorkerHeader};
use testudo_shm::last_words::LastWords;
use testudo_shm::primitive::Ordering;
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::Place;
use testudo_state::checkpoint::{RegionName, SegmentKey};
use testudo_state::disk::BLOCK;
use testudo_state::group::USED_AT;

/// What is under way after attaching.
pub(crate) struct Resuming {
    /// Helper threads that bring the rest of the state.
    pub(crate) loading: Option<Arc<Loader>>,
    /// The cell that is to say that all is loaded.
    pub(crate) loaded: Option<Place<u64>>,
    /// Something of the checkpoint is still to be read or taken.
    pub(crate) is_under_way: bool,
}

/// Has a helper thread of the loader work; its failure is the worker's.
fn helper(
    loader: &Arc<Loader>,
    work: fn(&Loader) -> Result<(), Error>,
    header: &'static WorkerHeader,
    words: &'static LastWords,
) {
    let loader = Arc::clone(loader);
    spawn_armed(move || {
        if let Err(error) = work(&loader) {
            super::step::give_up(header, words, &error);
        }
    });
}

impl Resuming {
    /// Begins to load in the background. Until here the processor was the worker's, to begin soon.
    pub(crate) fn begin_loading(&self, header: &'static WorkerHeader, words: &'static LastWords) {
        if let Some(loader) = &self.loading {
            helper(loader, Loader::stream, header, words);
        }
    }

    /// Whether state is still being loaded: its threads need the processor more than a worker that
    /// has nothing to do.
    pub(crate) fn is_loading(&self) -> bool {
        self.loading.as_ref().is_some_and(|loader| !loader.is_done())
    }
}

impl Attach {
    /// Brings back what the checkpoint has for this worker, as far as that is not done.
    pub(crate) fn resume(&mut self, description: &Description) -> Result<Resuming, Error> {
        let mut resuming = Resuming { loading: None, loaded: None, is_under_way: false };
        let Some(checkpoints @ Checkpoints { restore: Some(restore), .. }) =
            &description.checkpoints
        else {
            return Ok(resuming);
        };
        let folder = checkpoints.folder();
        let begun = self.named_cell(&format!("restored-{}/begun", restore.id), 0u64)?;
        let loaded = self.named_cell(&format!("restored-{}/loaded", restore.id), 0u64)?;
        let [is_begun, is_loaded] = [begun, loaded].map(|cell| self.cx.txn.get(cell) != 0);
        if is_loaded && self.rests_are_taken(restore.id)? {
            return Ok(resuming);
        }
        let restored = Restored::open(folder, restore, self.worker, self.settings.disk)?;
        if !is_begun {
            self.import_cells(&restored)?;
            self.cx.txn.set(begun, 1);
        }
        point(Point::Imported);
        if !is_loaded {
            let load = self.plan_load(&restored, description);
            resuming.loaded = Some(loaded);
            if restore.is_lazy && !load.targets.is_empty() {
                resuming.loading = Some(self.load_lazily(load)?);
            } else {
                let arena = self.arena;
                load.at_once(&mut |at, bytes| {
                    put_pages(arena, at, bytes);
                    Ok(())
                })?;
                self.cx.txn.set(loaded, 1);
            }
        }
        resuming.is_under_way = true;
        self.pages().0.restoring.store(1, Ordering::Release);
        self.is_first = !is_begun;
        self.restored = Some(restored);
        Ok(resuming)
    }

    /// Whether nothing of what was in flight is left to take.
    fn rests_are_taken(&mut self, restore: u64) -> Result<bool, Error> {
        let plan = Rc::clone(&self.plan);
        let mut all = true;
        for edge in &plan.edges {
            if let Some(stage) = edge.to
                && plan.subtask(stage, self.worker).is_some()
            {
                let cell = self.named_cell(&rested_name(stage, restore), 0u64)?;
                all &= self.cx.txn.get(cell) != 0;
            }
        }
        Ok(all)
    }

    /// Cells and counters of the worker that was this one. Positions of rings and spills begin
    /// anew: what they held is in flight.
    fn import_cells(&mut self, restored: &Restored) -> Result<(), Error> {
        if !restored.plan.same_shape {
            return Ok(());
        }
        let Some(old) = restored.old.iter().find(|old| old.worker == self.worker) else {
            return Ok(());
        };
        let plan = Rc::clone(&self.plan);
        let mut anew = Vec::new();
        for ring in &plan.layout.rings {
            let name = super::attach::edge_name(&plan, ring);
            anew.extend([name_hash(&format!("{name}/tail")), name_hash(&format!("{name}/head"))]);
        }
        for spill in plan.layout.spills.iter().filter(|spill| spill.worker == self.worker) {
            anew.extend(spill_cells(spill.edge, spill.lane).map(|name| name_hash(&name)));
        }
        for (name, bytes) in old.cells.iter().filter(|(name, _)| !anew.contains(name)) {
            self.cells.import(&mut self.cx.txn, *name, bytes)?;
        }
        Ok(())
    }

    /// Counters go on from what they were: only their sums over all workers mean anything.
    fn import_counters(&mut self, restored: &Restored) {
        // Where records are routed again, what was sent and taken before adds up to nothing.
        let is_kept = |label: &str| restored.plan.same_shape || !label.starts_with(account::PREFIX);
        for (label, place) in self.counters.iter().filter(|(label, _)| is_kept(label)) {
            let before = self.counted_before(restored, label);
            let now = self.cx.txn.get(*place);
            self.cx.txn.set(*place, now + before);
        }
    }

    /// What this worker's counter begins with: in another shape, each old worker's are taken over
    /// by one of those that there are now.
    pub(crate) fn counted_before(&self, restored: &Restored, label: &str) -> u64 {
        let is_ours = |old: usize| match restored.plan.same_shape {
            true => old == self.worker,
            false => old % self.plan.workers == self.worker,
        };
        let old = restored.old.iter().filter(|old| is_ours(old.worker));
        old.map(|old| old.notes.counter(label)).sum()
    }

    /// All segments of this worker that the checkpoint has.
    fn plan_load(&self, restored: &Restored, description: &Description) -> Load {
        let mut targets = Vec::new();
        for (key, _, at, reserved) in self.held_segments() {
            if let Some((chain, segment)) = restored.holder(&key) {
                let bytes = restored.old[chain].chain.segments()[segment].bytes as usize;
                let bytes = bytes.next_multiple_of(BLOCK).min(reserved);
                targets.push(Target { chain, segment, at, bytes });
            }
        }
        targets.sort_unstable_by_key(|target| target.at);
        let workers = self.plan.workers as u64;
        Load {
            folder: description
                .checkpoints
                .as_ref()
                .map_or_else(Default::default, |c| c.folder().to_owned()),
            disk: self.settings.disk,
            chains: restored.old.iter().map(|old| Arc::clone(&old.chain)).collect(),
            targets,
            bytes_per_s: self.settings.load_bandwidth.map(|bytes| (bytes / workers).max(1)),
        }
    }

    /// Pages come when they are touched; helper threads bring them.
    fn load_lazily(&mut self, load: Load) -> Result<Arc<Loader>, Error> {
        let loader = Arc::new(Loader::new(load, self.arena)?);
        let (header, words) = self.pages();
        // A helper that panics takes the process along (`dying` sees to that): who waits for a page
        // must not wait for ever, nor find zeros.
        if let Err(error) = loader.bring_fronts() {
            // The process ends with this error, and the pages are missing until it has.
            std::mem::forget(loader);
            return Err(error);
        }
        helper(&loader, Loader::answer, header, words);
        Ok(loader)
    }

    /// Segments of keyed state that this worker holds: what they are, their schema, their arena
    /// offset and reserved bytes.
    fn held_segments(&self) -> Vec<(SegmentKey, u64, usize, usize)> {
        let plan = &self.plan;
        let mut held = Vec::new();
        for laid in &plan.layout.groups {
            let spec = &plan.operators[laid.operator];
            let Some(state) = spec.state else { continue };
            let kind = match state.grouping {
                Grouping::ByKey => notes::BY_KEY,
                Grouping::BySubtask => notes::BY_SUBTASK,
            };
            for group in held_groups(plan, laid.operator, laid.groups, self.worker) {
                let (operator, groups) = (name_hash(spec.uid()), laid.groups as u32);
                let key = SegmentKey { operator, kind, group: group as u32, groups };
                held.push((key, state.schema, laid.at + group * stride(laid.bytes), laid.bytes));
            }
        }
        held
    }

    /// What was in flight on an edge, as channels that come before the present ones, of which
    /// `first` is the edge's first.
    pub(crate) fn rests<T: Record>(
        &mut self,
        edge: usize,
        first: usize,
        key: Option<&KeyOf<T>>,
        rests: &mut Vec<Rest>,
    ) -> Result<(), Error> {
        let Some(mut restored) = self.restored.take() else { return Ok(()) };
        let plan = Rc::clone(&self.plan);
        let Some(stage) = plan.edges[edge].to else { return Ok(()) };
        let Subtask { index, count } = self.subtask(stage);
        let groups = plan.key_groups;
        let mut is_ours = key.map(|key| {
            move |item: Item<'_, T>| {
                let group = key(item.view).group(groups as u32) as usize;
                owner_of(group, groups, count) == index
            }
        });
        let wanted = is_ours.as_mut().map(|f| f as &mut dyn FnMut(Item<'_, T>) -> bool);
        for (number, rest) in
            restored.rests::<T>(edge, (index, count), wanted)?.into_iter().enumerate()
        {
            let name = format!("restored-{}/edge-{edge}/rest-{number}", restored.plan.id);
            let start = [0, rest.inner.0, rest.inner.1];
            let cell = self.named_cell(&format!("{name}/head"), start)?;
            let position = self.cx.txn.get(cell);
            let present = (!rest.is_past).then(|| self.present(edge, first, rest.from)).flatten();
            let origin = if present.is_some() { Origin::Present } else { Origin::Past };
            self.cx.in_rings.push(InRing {
                ring: Some(Consumer::over(&rest.frames, position[0])),
                cell,
                committed: position,
                inner_bytes: position[1],
                inner_count: position[2],
                peer: self.worker,
                name: name.clone(),
                edge,
                from: rest.from,
                to: index,
                rest: Some(origin),
                is_held: false,
                follower: None,
            });
            let channel = Channel {
                ring: Some(self.cx.in_rings.len() - 1),
                watermark: self.named_cell(&format!("{name}/watermark"), i64::MIN)?,
                ended: self.named_cell(&format!("{name}/ended"), 0u64)?,
            };
            rests.push(Rest { channel, present });
        }
        self.restored = Some(restored);
        Ok(())
    }

    /// Whether what is taken of rests was counted when it was sent.
    pub(crate) fn counts_rests(&self) -> bool {
        self.restored.as_ref().is_none_or(|restored| restored.plan.same_shape)
    }

    /// The number of the channel that a producing subtask feeds.
    fn present(&self, edge: usize, first: usize, from: usize) -> Option<usize> {
        let plan = &self.plan;
        let to = plan.processes(plan.edges[edge].to);
        let producers = 0..plan.processes(plan.edges[edge].from).len();
        let reaching = producers.filter(|&producer| {
            let lanes = crate::plan::layout::lanes(plan.edges[edge].kind, producer, &to);
            lanes.iter().any(|(_, to)| *to == self.worker)
        });
        reaching.into_iter().position(|producer| producer == from).map(|place| first + place)
    }

    /// The name of the cell that says that a stage has taken all that was in flight.
    pub(crate) fn rested_cell(&mut self, stage: usize) -> Result<Place<u64>, Error> {
        let restore = self.restored.as_ref().map_or(0, |restored| restored.plan.id);
        self.named_cell(&rested_name(stage, restore), 0u64)
    }

    /// Notes which part of a source this worker reads.
    pub(crate) fn note_part(&mut self, operator: usize, subtask: Subtask) {
        let operator = self.plan.operators[operator].uid().to_owned();
        self.parts.push(Part { operator, index: subtask.index, count: subtask.count });
    }

    /// Sets up this worker's cuts, where the job takes checkpoints.
    pub(crate) fn cutter(
        &mut self,
        description: &Description,
        own: &'static WorkerHeader,
        control: &'static ControlHeader,
    ) -> Result<Option<Cutter>, Error> {
        let Some(checkpoints) = &description.checkpoints else { return Ok(None) };
        let restored = self.restored.take();
        let incarnation = own.incarnation.load(Ordering::Relaxed);
        let held = self.held()?;
        let mut ledger = Ledger::new(held.len());
        if let Some(restored) = &restored
            && self.is_first
        {
            self.import_counters(restored);
        }
        let is_known = incarnation == 1 || self.is_first;
        if !is_known || restored.as_ref().is_some_and(|restored| !restored.plan.same_shape) {
            self.mark_all(&held, restored.as_ref());
        } else if let Some(restored) = &restored {
            self.fill_ledger(&held, restored, &mut ledger);
        }
        let plan = CutPlan {
            job: checkpoints.job,
            worker: self.worker,
            incarnation,
            shape: self.plan.shape(),
            was: self.plan.as_shape(),
            checkpoints: checkpoints.clone(),
            copies_max: self.settings.checkpoint_memory / BLOCK,
            cells: Rc::clone(&self.cells),
            counters: self.counters.clone(),
            parts: std::mem::take(&mut self.parts),
            states: self.plan.states(),
            held,
            producers: self.producers(),
        };
        let (disk, _) = open_disk(self.settings.disk)?;
        let workers = self.plan.workers as u64;
        let bandwidth = self.settings.checkpoint_bandwidth.map(|all| (all / workers).max(1));
        let saver = Saver::new(disk, bandwidth);
        let region = &control.regions[self.plan.regions.of_task(self.worker)];
        let txn = &mut self.cx.txn;
        let words = (region, &own.cut, &control.folder);
        Ok(Some(Cutter::new(plan, words, saver, ledger, txn)))
    }

    /// Everything that this worker saves, by arena offset.
    fn held(&mut self) -> Result<Vec<Held>, Error> {
        let mut held = Vec::new();
        for (key, schema, at, bytes) in self.held_segments() {
            let used = self.cx.txn.place(at as u64 + USED_AT);
            let (at, bytes) = (at as u64, bytes as u64);
            held.push(Held { key, schema, at, bytes, extent: Extent::Group { used } });
        }
        let plan = Rc::clone(&self.plan);
        let worker = self.worker;
        let segment = plan.layout.segments[worker].at;
        for spill in plan.layout.spills.iter().filter(|spill| spill.worker == worker) {
            let edge = &plan.edges[spill.edge];
            if edge.kind == EdgeKind::Stdout {
                continue;
            }
            let from = edge.from.map_or(0, |stage| self.subtask(stage).index);
            let lanes = crate::plan::layout::lanes(edge.kind, from, &plan.processes(edge.to));
            let [head, tail] = spill_cells(spill.edge, spill.lane);
            let extent = Extent::Spill {
                head: self.named_cell(&head, 0u64)?,
                tail: self.named_cell(&tail, 0u64)?,
                from,
                to: lanes[spill.lane].0,
            };
            let (operator, group) = (spill.edge as u64, spill.lane as u32);
            let groups = lanes.len() as u32;
            held.push(Held {
                key: SegmentKey { operator, kind: notes::SPILL, group, groups },
                schema: edge.schema,
                at: (segment + spill.offset) as u64,
                bytes: crate::plan::layout::SPILL_BYTES as u64,
                extent,
            });
        }
        held.sort_unstable_by_key(|held| held.at);
        Ok(held)
    }

    /// Nothing is known of what a predecessor has saved: everything that is there is saved again.
    fn mark_all(&mut self, held: &[Held], restored: Option<&Restored>) {
        for held in held {
            let Extent::Group { used } = held.extent else { continue };
            let used = self.cx.txn.get(used).min(held.bytes);
            let first = held.at / BLOCK as u64;
            for (from, to) in self.resident(held.at as usize, used as usize) {
                let blocks = from as u64 / BLOCK as u64..(to as u64).div_ceil(BLOCK as u64);
                self.cx.txn.with_tracker(|tracker| {
                    blocks.for_each(|block| tracker.mark(first + block));
                });
            }
            let found = restored.and_then(|restored| Some((restored, restored.holder(&held.key)?)));
            if let Some((restored, (chain, segment))) = found {
                self.cx.txn.with_tracker(|tracker| {
                    let pages = restored.old[chain].chain.pages(segment);
                    pages.for_each(|(page, _)| tracker.mark(first + u64::from(page)));
                });
            }
        }
    }

    /// The files of the checkpoint hold what is there: later cuts add to them.
    fn fill_ledger(&self, held: &[Held], restored: &Restored, ledger: &mut Ledger) {
        let Some(old) = restored.old.iter().find(|old| old.worker == self.worker) else { return };
        let mut numbers = Vec::new();
        for (number, file) in old.chain.files() {
            let epoch = RegionName::parse(&file.name).map_or(0, |name| name.epoch);
            numbers.resize(number as usize + 1, 0);
            numbers[number as usize] = ledger.add_first_file(epoch, file.clone());
        }
        for (index, held) in held.iter().enumerate() {
            let is_group = matches!(held.extent, Extent::Group { .. });
            if let (true, Some(segment)) = (is_group, old.chain.segment(&held.key)) {
                ledger.make_room(index, old.chain.segments()[segment].pages());
                for (page, place) in old.chain.pages(segment) {
                    ledger.note(index, u64::from(page), numbers[place.file as usize]);
                }
            }
        }
    }
}

fn rested_name(stage: usize, restore: u64) -> String {
    format!("restored-{restore}/stage-{stage}/rested")
}

/// The cells of a lane's spill: head and tail.
fn spill_cells(edge: usize, lane: usize) -> [String; 2] {
    ["head", "tail"].map(|end| format!("edge-{edge}/spill-{lane}/{end}"))
}
