//! Another shape: what a job's parts inherit when it goes on with other numbers of subtasks than it
//! was stopped with.
//!
//! A stage whose number of subtasks is what it was inherits its cells one by one. Elsewhere:
//! a watermark is the lowest of the old subtasks'; the parts of a source are dealt out, and each
//! keeps its own position; a sink's file goes on with the subtask of its number; and of a window
//! that was firing, each key group remembers how far it got.
//!
//! Invariant: what is inherited is written with the transaction of the first attach, so a successor
//! finds it in its own cells.
//!
//! Called while stages are built.

use super::attach::{Attach, readers};
use super::restore::{Restore, Restored};
use crate::error::Error;
use crate::source::Subtask;
use crate::window::keyed::{FireCells, FireCursor, Fired, NOT_FIRING};
use std::rc::Rc;
use testudo_shm::hash::name_hash;
use testudo_shm::txn::{Place, Plain, Txn};
use testudo_shm::zerocopy::{FromBytes, IntoBytes};
use testudo_state::checkpoint::{RegionName, SegmentKey};
use testudo_state::disk::BLOCK;
use testudo_state::{Gauge, Groups, StateError};

impl Restore {
    /// How many subtasks a stage had; `None` if there was no such stage.
    pub(crate) fn subtasks(&self, stage: usize) -> Option<usize> {
        self.stages.get(stage)?.as_ref().map(|(_, workers)| workers.len())
    }

    /// The worker that ran a subtask of a stage.
    pub(crate) fn worker_of(&self, stage: usize, subtask: usize) -> Option<usize> {
        let (_, workers) = self.stages.get(stage)?.as_ref()?;
        workers.get(subtask).copied()
    }
}

impl Restore {
    /// The cut that the checkpoint holds of an old worker.
    pub(crate) fn epoch_of(&self, worker: usize) -> Option<u64> {
        let (_, file) = self.files.iter().find(|(of, _)| *of == worker)?;
        RegionName::parse(&file.name).map(|name| name.epoch)
    }

    /// The last cut of any worker in the checkpoint.
    pub(crate) fn last_epoch(&self) -> u64 {
        let files = self.files.iter();
        files.filter_map(|(worker, _)| self.epoch_of(*worker)).max().unwrap_or(0)
    }
}

impl Restored {
    /// The bytes of a cell that a subtask of a stage had.
    fn cell_of(&self, stage: usize, subtask: usize, name: u64) -> Option<&[u8]> {
        let worker = self.plan.worker_of(stage, subtask)?;
        let old = self.old.iter().find(|old| old.worker == worker)?;
        old.cells.get(&name).map(Vec::as_slice)
    }

    /// The values of a cell in all old subtasks of a stage.
    fn values<T: Plain>(&self, stage: usize, name: u64) -> Vec<T> {
        let count = self.plan.subtasks(stage).unwrap_or(0);
        let cells = (0..count).filter_map(|subtask| self.cell_of(stage, subtask, name));
        cells.filter_map(|bytes| T::read_from_bytes(bytes).ok()).collect()
    }
}

impl Attach {
    /// The checkpoint, when its cells are not simply this worker's own.
    fn reshaped(&self) -> Option<&Restored> {
        self.restored.as_ref().filter(|restored| self.is_first && !restored.plan.same_shape)
    }

    /// What a cell begins with: what the subtask of the same number had, in a stage that has as
    /// many as before.
    pub(crate) fn inherited<T: Plain>(&self, stage: usize, name: &str, initial: T) -> T {
        let Some(restored) = self.reshaped() else { return initial };
        let Subtask { index, count } = self.subtask(stage);
        if restored.plan.subtasks(stage) != Some(count) {
            return initial;
        }
        let bytes = restored.cell_of(stage, index, name_hash(name));
        bytes.and_then(|bytes| T::read_from_bytes(bytes).ok()).unwrap_or(initial)
    }

    /// The same for what goes with the number of the subtask, however many there are.
    pub(crate) fn inherited_by_number<T: Plain>(&self, stage: usize, name: &str, initial: T) -> T {
        let Some(restored) = self.reshaped() else { return initial };
        let index = self.subtask(stage).index;
        if restored.plan.subtasks(stage).is_none_or(|count| index >= count) {
            return initial;
        }
        let bytes = restored.cell_of(stage, index, name_hash(name));
        bytes.and_then(|bytes| T::read_from_bytes(bytes).ok()).unwrap_or(initial)
    }

    /// The cut that the job goes on from, for this worker's subtask of a stage; `None` when it has
    /// gone on already, or begins.
    pub(crate) fn resumed_at(&self, stage: usize) -> Option<u64> {
        let restored = self.restored.as_ref().filter(|_| self.is_first)?;
        let (plan, index) = (&restored.plan, self.subtask(stage).index);
        let own = plan.worker_of(stage, index).and_then(|worker| plan.epoch_of(worker));
        Some(own.unwrap_or_else(|| plan.last_epoch()))
    }

    /// The last cut before this worker's subtask of a stage joined; `None` when it was there.
    pub(crate) fn joined_at(&self, stage: usize) -> Option<u64> {
        let plan = &self.reshaped()?.plan;
        let index = self.subtask(stage).index;
        let is_new = plan.subtasks(stage).is_none_or(|count| index >= count);
        is_new.then(|| plan.last_epoch())
    }

    /// The watermark of a stage or, where one is given, of its end of an edge.
    pub(crate) fn watermark_cell(
        &mut self,
        stage: usize,
        edge: Option<usize>,
    ) -> Result<Place<i64>, Error> {
        let name = |stage: usize, edge: Option<usize>| match edge {
            Some(edge) => format!("edge-{edge}/watermark"),
            None => format!("stage-{stage}/watermark"),
        };
        let restored = self.restored.as_ref().map(|restored| &restored.plan);
        let then = restored.and_then(|was| {
            let (number, _) = was.stages.get(stage)?.as_ref()?;
            let edge = match edge {
                Some(edge) => Some(*was.edges.get(edge)?.first()?),
                None => None,
            };
            Some(name(*number, edge))
        });
        let now = name(stage, edge);
        self.event_time_cell(stage, &now, then.as_deref().unwrap_or(""))
    }

    /// A cell of a stage that holds event time, by its name now and then: of several, the lowest
    /// counts.
    fn event_time_cell(
        &mut self,
        stage: usize,
        name: &str,
        then: &str,
    ) -> Result<Place<i64>, Error> {
        let mut initial = self.inherited(stage, then, i64::MIN);
        if let Some(restored) = self.reshaped()
            && restored.plan.subtasks(stage) != Some(self.subtask(stage).count)
        {
            let values = restored.values::<i64>(stage, name_hash(then));
            initial = values.into_iter().min().unwrap_or(i64::MIN);
        }
        self.named_cell(name, initial)
    }

    /// The same for an operator's.
    pub(crate) fn operator_watermark(
        &mut self,
        operator: usize,
        name: &str,
    ) -> Result<Place<i64>, Error> {
        let spec = &self.plan.operators[operator];
        let (stage, name) = (spec.stage, format!("{}/{name}", spec.uid()));
        self.event_time_cell(stage, &name, &name)
    }

    /// The parts of its source that this worker's subtask of a stage reads; none if the stage has
    /// no source.
    pub(crate) fn parts_of(&self, stage: usize) -> Vec<Subtask> {
        let mut sources = self.plan.operators.iter().filter(|operator| operator.kind == "source");
        let Some(source) = sources.find(|operator| operator.stage == stage) else {
            return Vec::new();
        };
        let own = self.subtask(stage);
        let dealt = self.dealt.iter().find(|(operator, _)| operator == source.uid());
        dealt.map_or_else(
            || vec![own],
            |(_, subtasks)| {
                let parts = subtasks.get(own.index).into_iter().flatten();
                parts.map(|part| Subtask { index: part.index, count: part.count }).collect()
            },
        )
    }

    /// Which of those subtasks this worker's is that read parts of a source, and how many they are.
    pub(crate) fn reader(&self, operator: usize) -> Subtask {
        let spec = &self.plan.operators[operator];
        let own = self.subtask(spec.stage);
        let dealt = self.dealt.iter().find(|(operator, _)| operator == spec.uid());
        dealt.map_or(own, |(_, subtasks)| Subtask {
            index: readers(&subtasks[..own.index.min(subtasks.len())]),
            count: readers(subtasks).max(1),
        })
    }

    /// A cell of a part of a source, whoever read it before.
    pub(crate) fn part_cell<T: Plain>(
        &mut self,
        operator: usize,
        part: Subtask,
        name: &str,
        initial: T,
    ) -> Result<Place<T>, Error> {
        let uid = self.plan.operators[operator].uid();
        let name = format!("{uid}/part-{}-of-{}/{name}", part.index, part.count);
        let mut initial = initial;
        if let Some(restored) = self.reshaped() {
            let hash = name_hash(&name);
            let found = restored.old.iter().find_map(|old| old.cells.get(&hash));
            initial = found.and_then(|bytes| T::read_from_bytes(bytes).ok()).unwrap_or(initial);
        }
        self.named_cell(&name, initial)
    }

    /// Records that a source's subtasks had read when the job was last dealt out anew: all of them,
    /// and as this worker's counter says, which goes on from there.
    pub(crate) fn read_before(&mut self, operator: usize) -> Result<[u64; 2], Error> {
        let uid = self.plan.operators[operator].uid().to_owned();
        let label = format!("{uid}/{}", crate::plan::CounterKind::Out.label());
        let initial = self.reshaped().map_or([0; 2], |restored| {
            let all = restored.old.iter().map(|old| old.notes.counter(&label)).sum();
            [all, self.counted_before(restored, &label)]
        });
        let cell = self.named_cell(&format!("{uid}/read-before"), initial)?;
        Ok(self.cx.txn.get(cell))
    }

    /// The cells of a window operator that fires by key group, and how far each group had got.
    pub(crate) fn fire_cells_by_group(
        &mut self,
        operator: usize,
        groups: u32,
    ) -> Result<(FireCells, Vec<Fired>), Error> {
        let cells = FireCells {
            watermark: self.operator_watermark(operator, "watermark")?,
            passed: self.operator_watermark(operator, "passed")?,
            fired: self.operator_watermark(operator, "fired")?,
            cursor: self.cell(operator, "cursor", NOT_FIRING)?,
        };
        let stage = self.plan.operators[operator].stage;
        let was = self.reshaped().and_then(|restored| restored.plan.subtasks(stage));
        let count = self.subtask(stage).count;
        let is_new = was.is_some_and(|was| was != count);
        let known = self.cell(operator, "fired-by-group", u64::from(is_new))?;
        if self.cx.txn.get(known) == 0 {
            return Ok((cells, Vec::new()));
        }
        let mut fired = Vec::new();
        for group in 0..groups {
            let was = was.filter(|_| is_new).map(|was| self.fired_before(operator, group, was));
            let was = was.unwrap_or(Fired::default().words());
            let cell = self.cell(operator, &format!("fired-{group}"), was)?;
            fired.push(Fired::of(self.cx.txn.get(cell)));
        }
        Ok((cells, fired))
    }

    /// How far a key group had fired with its old owner, one of `was`.
    fn fired_before(&self, operator: usize, group: u32, was: usize) -> FireCursor {
        let Some(restored) = self.reshaped() else { return Fired::default().words() };
        let spec = &self.plan.operators[operator];
        let groups = self.plan.key_groups;
        let owner = crate::exchange::route::owner_of(group as usize, groups, was);
        let cell = |name: &str| {
            let name = name_hash(&format!("{}/{name}", spec.uid()));
            restored.cell_of(spec.stage, owner, name)
        };
        let number = |name: &str| cell(name).and_then(|bytes| i64::read_from_bytes(bytes).ok());
        let cursor = |name: &str| cell(name).and_then(|b| FireCursor::read_from_bytes(b).ok());
        let mut fired = cursor(&format!("fired-{group}")).map(Fired::of).unwrap_or_default();
        fired.upto = fired.upto.max(number("fired").unwrap_or(i64::MIN));
        let [end, at, slice, slot] = cursor("cursor").unwrap_or(NOT_FIRING);
        if end != i64::MIN && i64::from(group) < at {
            fired.upto = fired.upto.max(end);
        } else if end != i64::MIN && i64::from(group) == at {
            (fired.end, fired.slice, fired.slot) = (end, slice, slot);
        }
        fired.words()
    }

    /// Opens the state of all old subtasks of an operator whose subtasks each had a whole state of
    /// their own, one after the other, to be taken over by somebody else.
    pub(crate) fn visit_subtasks(
        &mut self,
        operator: usize,
        mut visit: impl FnMut(&mut Txn, &Groups, &mut Self) -> Result<(), StateError>,
    ) -> Result<(), Error> {
        let plan = Rc::clone(&self.plan);
        let spec = &plan.operators[operator];
        let Some(restored) = self.reshaped() else { return Ok(()) };
        if restored.plan.subtasks(spec.stage) == Some(plan.stages[spec.stage].workers.len()) {
            return Ok(());
        }
        let uid = name_hash(spec.uid());
        let is_wanted = |key: &SegmentKey| {
            key.operator == uid && key.kind == crate::checkpoint::notes::BY_SUBTASK
        };
        let mut found = Vec::new();
        for (index, old) in restored.old.iter().enumerate() {
            let keys = old.chain.segments().iter().map(|segment| (segment.key(), segment.bytes));
            found.extend(keys.filter(|(key, _)| is_wanted(key)).map(|(key, b)| (index, key, b)));
        }
        let failed = |error: StateError| Error::job(&spec.name, error.to_string());
        // A segment that was never formatted has nothing to take over.
        for (old, key, bytes) in found.into_iter().filter(|(_, _, bytes)| *bytes > 0) {
            let Some(mut restored) = self.restored.take() else { break };
            let read = restored.segment_bytes(old, &key, 0, bytes);
            self.restored = Some(restored);
            // The log first, then the segment with room to be looked at.
            let (read, log) = (read?, 16 << 10);
            let room = read.len() + BLOCK;
            let mut memory = vec![0u64; log + room.div_ceil(8)];
            let end = log * 8 + read.len();
            memory.as_mut_bytes()[log * 8..end].copy_from_slice(&read);
            let mut txn = Txn::on_heap(&mut memory, log);
            let schema = spec.state.map_or(0, |state| state.of_groups());
            let groups = Groups::new(&spec.name, 1, schema, Rc::new(Gauge::unlimited()));
            super::attach::attach_private(&groups, &mut txn, log * 8, room).map_err(failed)?;
            visit(&mut txn, &groups, self).map_err(failed)?;
        }
        Ok(())
    }
}
