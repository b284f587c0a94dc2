//! Attaching: how a worker process takes its place, the first one and every successor alike. This
//! is recovery.
//!
//! Order (each step has a kill point, see `testing`):
//! 1. map: the control segment and peers' fronts read-only, one's own segment and key groups
//!    writable;
//! 2. claim the segment: exactly one process wins (R2); from here on this thread's death is seen in
//!    the death words;
//! 3. roll the undo log back, before anything looks at state (R11);
//! 4. open cells, ring ends, tables and stages from what is there, or make them: one transaction;
//! 5. publish every position again and ring every bell, since the dead may have committed without
//!    doing so.
//!
//! Called by `entry`; `Attach` is what stages are built with.

#![expect(unsafe_code, reason = "maps segments and makes ring ends, places and state from them")]

use super::StageRef;
use super::context::{CounterPlace, Cx, InRing, OutRing};
use super::cut::Cutter;
use super::entry::Role;
use super::idle::Peer;
use super::restore::Restored;
use super::resume::Resuming;
use super::step;
use crate::checkpoint::notes::Part;
use crate::config::{Completeness, Settings};
use crate::error::Error;
use crate::exchange::inlet::Channel;
use crate::exchange::outlet::{Lane, Outlet};
use crate::exchange::route::{Route, owner_of};
use crate::flow::Flow;
use crate::operator::Intake;
use crate::plan::layout::{
    CELLS_BYTES, COUNTERS_AT, LAST_WORDS_AT, LOG_BYTES, LOG_SOFT_BYTES, RingPlan, SPILL_BYTES,
    lanes, stride,
};
use crate::plan::{CounterKind, Grouping, Plan};
use crate::source::Subtask;
use crate::supervisor::description::Description;
use crate::testing::{Point, point};
use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::cell::Cells;
use testudo_shm::consumer::Consumer;
use testudo_shm::death;
use testudo_shm::header::{self, ControlHeader, CutWords, WorkerHeader, WorkerState};
use testudo_shm::last_words::LastWords;
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::record::Record;
use testudo_shm::ring::RingParts;
use testudo_shm::scatter::Scatter;
use testudo_shm::segment::Segment;
use testudo_shm::spill::Spill;
use testudo_shm::txn::{Place, Plain, Txn};
use testudo_state::{Gauge, Groups, Table};

/// A worker that has attached.
pub struct Worker {
    pub(crate) cx: Cx,
    pub(crate) header: &'static WorkerHeader,
    pub(crate) control: &'static ControlHeader,
    pub(crate) last_words: &'static LastWords,
    pub(crate) peers: Vec<Peer>,
    pub(crate) groups: Vec<Groups>,
    pub(crate) settings: Rc<Settings>,
    /// Core to run on, once the first steps are taken.
    pub(crate) core: Option<usize>,
    /// Where the user's counters are.
    pub(crate) user_counters: Vec<CounterPlace>,
    /// The eventfd by which the supervisor is told to look.
    pub(crate) notice: i32,
    /// Whether a ring of this worker leads to the supervisor's ring thread, which sleeps even if
    /// workers spin.
    pub(crate) feeds_supervisor: bool,
    /// The descriptor to sleep on, where the kernel cannot wait on words.
    pub(crate) event: Option<i32>,
    /// This worker's part of checkpoints, where the job takes any.
    pub(crate) cutter: Option<Cutter>,
    /// What of a checkpoint is still being loaded.
    pub(crate) resuming: Resuming,
}

/// The state of attaching, handed to everything that is built for this worker.
pub struct Attach {
    pub(crate) cx: Cx,
    pub(crate) cells: Rc<Cells>,
    pub(crate) plan: Rc<Plan>,
    pub(crate) settings: Rc<Settings>,
    pub(crate) worker: usize,
    pub(crate) arena: &'static Arena,
    intakes: HashMap<usize, (usize, Box<dyn Any>)>,
    groups: HashMap<usize, Groups>,
    gauge: Rc<Gauge>,
    pub(crate) counters: Vec<(String, CounterPlace)>,
    /// The parts of sources that this worker reads.
    pub(crate) parts: Vec<Part>,
    /// The checkpoint that the job goes on from, while something of it is still to be taken.
    pub(crate) restored: Option<Restored>,
    /// This process brings it back first.
    pub(crate) is_first: bool,
    /// Parts of sources by source and subtask, where the job goes on from a checkpoint.
    pub(crate) dealt: Vec<(String, Vec<Vec<Part>>)>,
    /// Descriptors of the group segments, by arena offset: they tell which pages are there.
    pub(crate) files: Vec<(usize, OwnedFd)>,
}

/// What is mapped once a process has found its place.
struct Mapped {
    arena: &'static Arena,
    own: &'static WorkerHeader,
    control: &'static ControlHeader,
    files: Vec<(usize, OwnedFd)>,
}

impl Attach {
    /// Attaches this process as the worker of its role and builds its stages.
    pub(crate) fn worker(
        role: Role,
        description: &Description,
        control: Segment,
        flow: &Flow,
    ) -> Result<(Worker, Vec<StageRef>), Error> {
        let plan = Rc::new(Plan::new(&flow.draft.borrow(), &flow.settings)?);
        if plan.hash != description.plan {
            return Err(Error::Plan(format!(
                "this process plans another job ({:016x}) than its supervisor ({:016x}): \
                 the flow must depend on the options alone",
                plan.hash, description.plan
            )));
        }
        point(Point::AttachBegin);
        let worker = role.worker;
        // The arena lives as long as the process: ring ends and places point into it.
        let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(plan.layout.arena_bytes)?));
        let files = map_segments(arena, &plan, description, worker, &control)?;
        let segment = &plan.layout.segments[worker];
        // SAFETY: both pages were mapped just now and stay so.
        let (own, control) = unsafe {
            let control = plan.layout.segments[plan.supervisor()].at;
            (
                header::at::<WorkerHeader>(arena.at(segment.at)),
                header::at::<ControlHeader>(arena.at(control)),
            )
        };
        point(Point::Mapped);
        death::claim(own, || point(Point::Claimed))
            .map_err(|error| Error::Machine(error.to_string()))?;
        announce(own, worker, description);
        let words = last_words(arena, segment.at);
        words.clear();
        // A successor would fail in the same way: the job ends, and these are the words that it
        // ends with.
        let mapped = Mapped { arena, own, control, files };
        Self::take_over(role, description, flow, plan, mapped)
            .or_else(|error| step::give_up(own, words, &error))
    }

    /// The segment is ours: rolls back, opens what is there and publishes it again.
    fn take_over(
        role: Role,
        description: &Description,
        flow: &Flow,
        plan: Rc<Plan>,
        mapped: Mapped,
    ) -> Result<(Worker, Vec<StageRef>), Error> {
        let Mapped { arena, own, control, files } = mapped;
        let worker = role.worker;
        let segment = &plan.layout.segments[worker];
        let mut txn = rolled_back(arena, segment.at + segment.log, description, own)?;
        let cells = Cells::open(&mut txn, (segment.at + segment.cells) as u64, CELLS_BYTES as u64)?;
        let mut attach = Self {
            cx: Cx::new(txn, !flow.settings.trust_records),
            cells: Rc::new(cells),
            plan: Rc::clone(&plan),
            settings: Rc::clone(&flow.settings),
            worker,
            arena,
            intakes: HashMap::new(),
            groups: HashMap::new(),
            gauge: Rc::new(Gauge::new(testudo_state::memory::GaugePaths::default(), None)),
            counters: Vec::new(),
            parts: Vec::new(),
            restored: None,
            is_first: false,
            dealt: description.dealt(),
            files,
        };
        let resuming = attach.resume(description)?;
        attach.open_rings()?;
        let stages = attach.build_stages(flow)?;
        let user_counters = attach.open_counters();
        let cutter = attach.cutter(description, own, control)?;
        attach.cx.txn.commit();
        point(Point::Opened);
        let peers = attach.peers(description);
        let mut this = Worker {
            cx: attach.cx,
            header: own,
            control,
            last_words: last_words(arena, segment.at),
            peers,
            groups: attach.groups.into_values().collect(),
            core: core_of(&flow.settings, worker),
            settings: Rc::clone(&flow.settings),
            user_counters,
            notice: description.notice,
            feeds_supervisor: plan.layout.rings.iter().any(|ring| {
                let ends = [ring.from, ring.to];
                ends.contains(&worker) && ends.contains(&plan.supervisor())
            }),
            event: description.events.as_ref().map(|events| events[worker]),
            cutter,
            resuming,
        };
        this.cx.publish_all();
        point(Point::Published);
        testudo_shm::wait::ring_bell(&own.bell);
        this.wake_everyone();
        own.attached_ns.store(crate::time::now_ns(), Ordering::Relaxed);
        own.state.store(WorkerState::Running as u32, Ordering::Release);
        // A checkpoint may be due and waiting for this.
        if this.cutter.is_some() {
            this.notice();
        }
        this.resuming.begin_loading(own, this.last_words);
        Ok((this, stages))
    }

    /// Builds the stages of this worker, consumers before producers, so that hand-overs find their
    /// intake.
    fn build_stages(&mut self, flow: &Flow) -> Result<Vec<StageRef>, Error> {
        let factories: Vec<_> =
            flow.draft.borrow_mut().factories.iter_mut().map(Option::take).collect();
        let order = downstream_first(&self.plan);
        let mut factories: HashMap<usize, _> = factories.into_iter().enumerate().collect();
        let mut stages = Vec::new();
        for stage in order {
            let factory = factories.remove(&stage).flatten();
            if self.plan.subtask(stage, self.worker).is_some()
                && let Some(factory) = factory
            {
                stages.push(factory(self)?);
            }
        }
        Ok(stages)
    }

    /// The ends of all rings that this worker fills or empties.
    fn open_rings(&mut self) -> Result<(), Error> {
        let (plan, worker) = (Rc::clone(&self.plan), self.worker);
        for ring in plan.layout.rings.iter().filter(|ring| ring.from == worker) {
            let name = edge_name(&plan, ring);
            let cell = self.named_cell(&format!("{name}/tail"), 0u64)?;
            let position = self.cx.txn.get(cell);
            // SAFETY: mapped by `map_segments` for good; the claim makes this the only live
            // producer.
            let end = unsafe { Producer::attach(self.parts(ring), position) };
            let death = self.death_word(ring.to);
            let out = OutRing { ring: end, cell, committed: position, peer: ring.to, death, name };
            self.cx.out_rings.push(out);
        }
        for ring in plan.layout.rings.iter().filter(|ring| ring.to == worker) {
            let name = edge_name(&plan, ring);
            let cell = self.named_cell(&format!("{name}/head"), [0u64; 3])?;
            let position = self.cx.txn.get(cell);
            // SAFETY: as above, for the consumer.
            let end = unsafe { Consumer::attach(self.parts(ring), position[0]) };
            self.cx.in_rings.push(InRing {
                ring: Some(end),
                cell,
                committed: position,
                inner_bytes: position[1],
                inner_count: position[2],
                peer: ring.from,
                name,
                edge: ring.edge,
                from: ring.from_subtask,
                to: ring.to_subtask,
                rest: None,
                is_held: false,
            });
        }
        Ok(())
    }

    /// The death word of a consumer for which records may be dropped.
    fn death_word(&self, process: usize) -> Option<&'static AtomicU32> {
        let is_partial = self.settings.completeness == Completeness::Partial;
        if !is_partial || process == self.plan.supervisor() {
            return None;
        }
        let at = self.arena.at(self.plan.layout.segments[process].at);
        // SAFETY: the fronts of all workers are mapped for good and begin with their header.
        Some(unsafe { &header::at::<WorkerHeader>(at).death[0].word })
    }

    fn parts(&self, ring: &RingPlan) -> RingParts {
        ring_parts(self.arena, &self.plan, ring)
    }

    fn peers(&self, description: &Description) -> Vec<Peer> {
        let supervisor = self.plan.supervisor();
        let peers = (0..=supervisor).map(|process| {
            let at = self.arena.at(self.plan.layout.segments[process].at);
            let event = description.events.as_ref().map(|events| events[process]);
            // SAFETY: every process's front is mapped by `map_segments` for good.
            unsafe {
                if process == supervisor {
                    let header = header::at::<ControlHeader>(at);
                    Peer { bell: &header.bell, sleeping: &header.sleeping, event }
                } else {
                    let header = header::at::<WorkerHeader>(at);
                    Peer { bell: &header.bell, sleeping: &header.sleeping, event }
                }
            }
        });
        peers.collect()
    }

    /// Counters of operators and of the user, all of them, so that a reader finds every label.
    fn open_counters(&mut self) -> Vec<CounterPlace> {
        for operator in 0..self.plan.operators.len() {
            for kind in CounterKind::ALL {
                self.counter(operator, kind);
            }
        }
        let first = self.plan.operators.len() * CounterKind::ALL.len();
        let names = self.plan.user_counters.clone();
        names.iter().enumerate().map(|(index, name)| self.counter_at(first + index, name)).collect()
    }

    /// The place of an operator's counter.
    pub(crate) fn counter(&mut self, operator: usize, kind: CounterKind) -> CounterPlace {
        let position = CounterKind::ALL.iter().position(|other| *other == kind).unwrap_or(0);
        let label = format!("{}/{}", self.plan.operators[operator].uid(), kind.label());
        self.counter_at(operator * CounterKind::ALL.len() + position, &label)
    }

    /// A counter of an edge: that of the last operator before it.
    fn edge_counter(&mut self, edge: usize, kind: CounterKind) -> CounterPlace {
        let from = self.plan.edges[edge].from;
        let before = self.plan.operators.iter().rposition(|operator| Some(operator.stage) == from);
        self.counter(before.unwrap_or(0), kind)
    }

    fn counter_at(&mut self, index: usize, label: &str) -> CounterPlace {
        let at = self.plan.layout.segments[self.worker].at + COUNTERS_AT;
        let at = at + index * testudo_shm::counters::ENTRY;
        let place = testudo_shm::counters::open(&mut self.cx.txn, at as u64, label);
        if self.counters.iter().all(|(_, known)| known.offset() != place.offset()) {
            self.counters.push((label.to_owned(), place));
        }
        place
    }

    pub(crate) fn settings(&self) -> Rc<Settings> {
        Rc::clone(&self.settings)
    }

    pub(crate) fn source_subtasks(&self) -> usize {
        self.plan.source_subtasks()
    }

    /// The subtask of a stage that this worker runs.
    pub(crate) fn subtask(&self, stage: usize) -> Subtask {
        self.plan.subtask(stage, self.worker).unwrap_or(Subtask { index: 0, count: 1 })
    }

    pub(crate) fn operator_name(&self, operator: usize) -> String {
        self.plan.operators[operator].name.clone()
    }

    /// An operator's cell.
    pub(crate) fn cell<T: Plain>(
        &mut self,
        operator: usize,
        name: &str,
        initial: T,
    ) -> Result<Place<T>, Error> {
        let spec = &self.plan.operators[operator];
        let (stage, name) = (spec.stage, format!("{}/{name}", spec.uid()));
        let initial = self.inherited(stage, &name, initial);
        self.named_cell(&name, initial)
    }

    pub(crate) fn named_cell<T: Plain>(
        &mut self,
        name: &str,
        initial: T,
    ) -> Result<Place<T>, Error> {
        Ok(self.cells.cell(&mut self.cx.txn, name, initial)?)
    }

    /// How many lanes this worker's outlet of an edge has.
    pub(crate) fn lanes(&self, edge: usize) -> usize {
        self.lane_targets(edge).len()
    }

    /// The consuming (subtask, process) of each lane.
    fn lane_targets(&self, edge: usize) -> Vec<(usize, usize)> {
        let spec = &self.plan.edges[edge];
        let from = spec.from.map_or(0, |stage| self.subtask(stage).index);
        lanes(spec.kind, from, &self.plan.processes(spec.to))
    }

    /// The routing table of a hash edge.
    pub(crate) fn lane_of_group(&self, edge: usize) -> Vec<u16> {
        let (groups, lanes) = (self.plan.key_groups, self.lanes(edge));
        (0..groups).map(|group| owner_of(group, groups, lanes) as u16).collect()
    }

    /// The outlet of this worker's subtask on an edge.
    pub(crate) fn outlet<T: Record, R: Route<T>>(
        &mut self,
        edge: usize,
        route: R,
    ) -> Result<Outlet<T, R>, Error> {
        let plan = Rc::clone(&self.plan);
        let name = format!("edge-{edge}");
        let targets = self.lane_targets(edge);
        let mut lanes = Vec::new();
        for &(_, process) in &targets {
            lanes.push(if process == self.worker {
                let (channel, intake) = self.intake::<T>(edge)?;
                Lane::Local { intake, channel }
            } else {
                Lane::Ring(self.out_ring(edge, process)?)
            });
        }
        let segment = plan.layout.segments[self.worker].at;
        let mut spills = Vec::new();
        for spill in plan.layout.spills.iter().filter(|s| s.edge == edge && s.worker == self.worker)
        {
            let base = self.arena.at(segment + spill.offset);
            let name = format!("{name}/spill-{}", spill.lane);
            // SAFETY: the plan gives this range of our own segment to this lane alone.
            let spill =
                unsafe { Spill::attach(&mut self.cx.txn, &self.cells, &name, base, SPILL_BYTES) };
            spills.push(spill?);
        }
        Ok(Outlet {
            marked: vec![i64::MIN; lanes.len()],
            scatter: Scatter::new(lanes.len()),
            lanes,
            spills,
            route,
            is_open: false,
            watermark: match plan.edges[edge].from {
                Some(stage) => self.watermark_cell(stage, Some(edge))?,
                None => self.named_cell(&format!("{name}/watermark"), i64::MIN)?,
            },
            ended: self.named_cell(&format!("{name}/ended"), 0u64)?,
            dropped: self.edge_counter(edge, CounterKind::Dropped),
            name: format!("exchange to {}", edge_target(&plan, edge)),
        })
    }

    fn out_ring(&self, edge: usize, to: usize) -> Result<usize, Error> {
        let own = self.plan.layout.rings.iter().filter(|ring| ring.from == self.worker);
        own.into_iter()
            .position(|ring| ring.edge == edge && ring.to == to)
            .ok_or_else(|| Error::Plan(format!("edge {edge} has no ring to process {to}")))
    }

    /// The channels of an inlet for an edge; which of them is fed by this worker itself goes to
    /// `local`.
    pub(crate) fn channels(
        &mut self,
        edge: usize,
        channels: &mut Vec<Channel>,
        local: &mut Vec<(usize, usize)>,
    ) -> Result<(), Error> {
        let plan = Rc::clone(&self.plan);
        let spec = &plan.edges[edge];
        let to = plan.processes(spec.to);
        for (subtask, &process) in plan.processes(spec.from).iter().enumerate() {
            let reaches = lanes(spec.kind, subtask, &to).iter().any(|(_, to)| *to == self.worker);
            if !reaches {
                continue;
            }
            let ring = if process == self.worker {
                local.push((edge, channels.len()));
                None
            } else {
                let mut own = plan.layout.rings.iter().filter(|ring| ring.to == self.worker);
                own.position(|ring| ring.edge == edge && ring.from == process)
            };
            let name = format!("edge-{edge}/from-{subtask}");
            let watermark = self.named_cell(&format!("{name}/watermark"), i64::MIN)?;
            let ended = self.named_cell(&format!("{name}/ended"), 0u64)?;
            channels.push(Channel { ring, watermark, ended });
        }
        Ok(())
    }

    /// Says where an edge's local producer hands over.
    pub(crate) fn offer_intake<T: Record>(
        &mut self,
        edge: usize,
        channel: usize,
        intake: Rc<RefCell<dyn Intake<T>>>,
    ) {
        self.intakes.insert(edge, (channel, Box::new(intake)));
    }

    fn intake<T: Record>(&self, edge: usize) -> Result<(usize, Rc<RefCell<dyn Intake<T>>>), Error> {
        let found = self.intakes.get(&edge).and_then(|(channel, intake)| {
            let intake = intake.downcast_ref::<Rc<RefCell<dyn Intake<T>>>>()?;
            Some((*channel, Rc::clone(intake)))
        });
        found.ok_or_else(|| Error::Plan(format!("edge {edge} has no consumer in this worker")))
    }

    /// The key groups of an operator that this worker holds.
    pub(crate) fn groups(&mut self, operator: usize) -> Result<Groups, Error> {
        if let Some(groups) = self.groups.get(&operator) {
            return Ok(groups.clone());
        }
        let plan = Rc::clone(&self.plan);
        let spec = &plan.operators[operator];
        let laid = plan.layout.groups.iter().find(|groups| groups.operator == operator);
        let (Some(laid), Some(state)) = (laid, spec.state) else {
            return Err(Error::Plan(format!("operator {} declared no state", spec.name)));
        };
        // State by subtask is one group, whatever the key: each subtask's is whole in itself.
        let is_whole = state.grouping == Grouping::BySubtask;
        let count = if is_whole { 1 } else { laid.groups as u32 };
        let groups = Groups::new(&spec.name, count, state.schema, Rc::clone(&self.gauge));
        for group in held_groups(&plan, laid.operator, laid.groups, self.worker) {
            let number = if is_whole { 0 } else { group as u32 };
            let base = self.arena.at(laid.at + group * stride(laid.bytes));
            // SAFETY: mapped writable by `map_segments`, for this worker alone, for good; the log
            // was rolled back.
            let done = unsafe { groups.attach(&mut self.cx.txn, number, base, laid.bytes) };
            done.map_err(|error| Error::job(&spec.name, error.to_string()))?;
        }
        self.groups.insert(operator, groups.clone());
        Ok(groups)
    }

    /// An operator's table.
    pub(crate) fn table<K: Record, V: Record>(
        &mut self,
        operator: usize,
        name: &str,
    ) -> Result<Table<K, V>, Error> {
        let groups = self.groups(operator)?;
        groups
            .table(&mut self.cx.txn, name)
            .map_err(|error| Error::job(&self.operator_name(operator), error.to_string()))
    }
}

impl Attach {
    /// Header and last words of this worker.
    pub(crate) fn pages(&self) -> (&'static WorkerHeader, &'static LastWords) {
        let at = self.plan.layout.segments[self.worker].at;
        // SAFETY: the front of our segment is mapped for good.
        (unsafe { header::at::<WorkerHeader>(self.arena.at(at)) }, last_words(self.arena, at))
    }

    /// What the producers of the input rings say about cuts; `None` for the supervisor.
    pub(crate) fn producers(&self) -> Vec<Option<&'static CutWords>> {
        let supervisor = self.plan.supervisor();
        let rings = self.plan.layout.rings.iter().filter(|ring| ring.to == self.worker);
        let words = rings.map(|ring| {
            let at = self.arena.at(self.plan.layout.segments[ring.from].at);
            // SAFETY: the fronts of all workers are mapped for good and begin with their header.
            (ring.from != supervisor).then(|| unsafe { &header::at::<WorkerHeader>(at).cut })
        });
        words.collect()
    }

    /// The parts of a group's segment that have pages: [from, to) in bytes of the segment.
    pub(crate) fn resident(&self, at: usize, bytes: usize) -> Vec<(usize, usize)> {
        let Some((_, fd)) = self.files.iter().find(|(of, _)| *of == at) else {
            return vec![(0, bytes)];
        };
        let seek = |from: usize, whence: libc::c_int| {
            // SAFETY: a plain system call on a descriptor that we own.
            let found = unsafe { libc::lseek(fd.as_raw_fd(), from as libc::off_t, whence) };
            usize::try_from(found).unwrap_or(bytes).min(bytes)
        };
        let (mut parts, mut at) = (Vec::new(), 0);
        while at < bytes {
            let from = seek(at, libc::SEEK_DATA);
            let to = if from < bytes { seek(from, libc::SEEK_HOLE) } else { bytes };
            if from < to {
                parts.push((from, to));
            }
            at = to.max(at + 1);
        }
        parts
    }
}

impl Worker {
    /// Tells the supervisor to look at this worker's state.
    pub(crate) fn notice(&self) {
        testudo_shm::wait::wake_event(self.notice);
    }

    /// Wakes every peer, asleep or not.
    pub(crate) fn wake_everyone(&self) {
        for peer in &self.peers {
            if let Some(event) = peer.event {
                testudo_shm::wait::wake_event(event);
            }
        }
    }
}

/// The groups of an operator that a worker holds.
pub(crate) fn held_groups(
    plan: &Plan,
    operator: usize,
    groups: usize,
    worker: usize,
) -> Vec<usize> {
    let spec = &plan.operators[operator];
    let Some(subtask) = plan.subtask(spec.stage, worker) else {
        return Vec::new();
    };
    match spec.state.map(|state| state.grouping) {
        Some(Grouping::BySubtask) => vec![subtask.index],
        _ => (0..groups).filter(|g| owner_of(*g, groups, subtask.count) == subtask.index).collect(),
    }
}

/// Where a ring lies in this process.
pub(crate) fn ring_parts(arena: &Arena, plan: &Plan, ring: &RingPlan) -> RingParts {
    let segments = &plan.layout.segments;
    let (tail, head) =
        (segments[ring.from].at + ring.tail_word, segments[ring.to].at + ring.head_word);
    // SAFETY: all three are in ranges that the caller has mapped: the data mirrored, the words in
    // the fronts.
    unsafe { RingParts::at(arena.base(), ring.at, ring.bytes, tail, head) }
}

/// Stages in an order in which every consumer comes before its producers.
fn downstream_first(plan: &Plan) -> Vec<usize> {
    let mut order = Vec::new();
    let mut placed = vec![false; plan.stages.len()];
    while order.len() < placed.len() {
        for stage in (0..placed.len()).rev() {
            let mut behind = plan.edges.iter().filter(|edge| edge.from == Some(stage));
            let is_free = behind.all(|edge| edge.to.is_none_or(|to| placed[to]));
            if !placed[stage] && is_free {
                placed[stage] = true;
                order.push(stage);
            }
        }
    }
    order
}

pub(crate) fn edge_name(plan: &Plan, ring: &RingPlan) -> String {
    let kind = plan.edges[ring.edge].kind.label();
    format!("{kind}-{}/{}-{}", ring.edge, ring.from_subtask, ring.to_subtask)
}

fn edge_target(plan: &Plan, edge: usize) -> String {
    plan.edges[edge].to.map_or("standard output".into(), |stage| plan.stages[stage].name.clone())
}

/// Maps everything this worker may see, at the places that the plan fixed.
fn map_segments(
    arena: &Arena,
    plan: &Plan,
    description: &Description,
    worker: usize,
    control: &Segment,
) -> Result<Vec<(usize, OwnedFd)>, Error> {
    let layout = &plan.layout;
    let mut groups = Vec::new();
    let supervisor = plan.supervisor();
    let mut files: HashMap<usize, OwnedFd> = HashMap::new();
    for (process, fds) in description.segments.iter().enumerate() {
        let fd = if process == worker { fds.owner } else { fds.peer };
        // SAFETY: the supervisor left these descriptors open for this process; each is taken once.
        files.insert(process, unsafe { OwnedFd::from_raw_fd(fd) });
    }
    for (process, segment) in layout.segments.iter().enumerate() {
        if process == supervisor {
            arena.map(control.fd(), 0, segment.front, segment.at, Access::Peer)?;
        } else if process == worker {
            arena.map(
                files[&process].as_fd(),
                0,
                segment.private_end,
                segment.at,
                Access::Owner,
            )?;
        } else {
            arena.map(files[&process].as_fd(), 0, segment.front, segment.at, Access::Peer)?;
        }
    }
    for ring in layout.rings.iter().filter(|ring| ring.from == worker || ring.to == worker) {
        let access = if ring.from == worker { Access::Owner } else { Access::Peer };
        let fd = if ring.from == supervisor { control.fd() } else { files[&ring.from].as_fd() };
        arena.map_mirrored(fd, ring.data, ring.bytes, ring.at, access)?;
        if description.settings.huge_pages {
            arena.advise_huge(ring.at, 2 * ring.bytes);
        }
    }
    for (laid, fds) in layout.groups.iter().zip(&description.groups) {
        for group in held_groups(plan, laid.operator, laid.groups, worker) {
            // SAFETY: as above; the groups that this worker holds were left open for it.
            let fd = unsafe { OwnedFd::from_raw_fd(fds[group]) };
            let at = laid.at + group * stride(laid.bytes);
            arena.map(fd.as_fd(), 0, laid.bytes, at, Access::Owner)?;
            if description.settings.huge_pages {
                arena.advise_huge(at, laid.bytes);
            }
            if description.checkpoints.is_some() {
                groups.push((at, fd));
            }
        }
    }
    Ok(groups)
}

/// Puts bytes of state where nothing of this worker has been yet.
pub(crate) fn put_pages(arena: &Arena, at: usize, bytes: &[u8]) {
    assert!(at + bytes.len() <= arena.len(), "pages outside the arena");
    // SAFETY: the loader's targets are segments that `map_segments` has mapped writable for this
    // worker, and nothing has been opened in them yet.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), arena.at(at), bytes.len()) };
}

/// Takes a group that lies in private memory, to look at what is in it.
pub(crate) fn attach_private(
    groups: &Groups,
    txn: &mut Txn,
    at: usize,
    bytes: usize,
) -> Result<(), testudo_state::StateError> {
    // SAFETY: the caller's transaction is over private memory that has these bytes behind its log,
    // and outlives the groups.
    unsafe { groups.attach(txn, 0, txn.base().add(at), bytes) }
}

/// The transaction, with what a predecessor left open undone.
fn rolled_back(
    arena: &'static Arena,
    log: usize,
    description: &Description,
    own: &WorkerHeader,
) -> Result<Txn, Error> {
    let mut txn = attach_txn(arena, log);
    if description.checkpoints.is_some() {
        txn.track()?;
    }
    let undone = txn.roll_back_with(|| point(Point::RollingBack)).map_err(|word| {
        Error::Machine(format!("the undo log of this worker is damaged (word {word:#x})"))
    })?;
    own.rolled_back.store(undone, Ordering::Relaxed);
    point(Point::RolledBack);
    Ok(txn)
}

fn attach_txn(arena: &'static Arena, log: usize) -> Txn {
    // SAFETY: the log lies in our own segment, mapped writable for good; the claim makes us its
    // only writer.
    unsafe { Txn::attach(arena.base(), arena.len(), arena.at(log), LOG_BYTES, LOG_SOFT_BYTES) }
}

/// The page of last words in the segment at an arena offset.
pub(crate) fn last_words(arena: &'static Arena, segment: usize) -> &'static LastWords {
    // SAFETY: the front of every worker's segment is mapped for good, and this page of it is one of
    // last words.
    unsafe { header::at::<LastWords>(arena.at(segment + LAST_WORDS_AT)) }
}

/// Writes who we are into the header, right after the claim.
fn announce(header: &WorkerHeader, worker: usize, description: &Description) {
    header.magic.store(header::MAGIC, Ordering::Relaxed);
    header.version.store(header::LAYOUT_VERSION, Ordering::Relaxed);
    header.worker.store(worker as u32, Ordering::Relaxed);
    header.plan.store(description.plan, Ordering::Relaxed);
    header.incarnation.fetch_add(1, Ordering::Relaxed);
    header.pid.store(std::process::id(), Ordering::Relaxed);
    header.first_commit_ns.store(0, Ordering::Relaxed);
    header.attached_ns.store(0, Ordering::Relaxed);
    header.sleeping.store(0, Ordering::Relaxed);
    header.state.store(WorkerState::Attaching as u32, Ordering::Release);
}

fn core_of(settings: &Settings, worker: usize) -> Option<usize> {
    if settings.cores.is_empty() {
        return None;
    }
    Some(settings.cores[worker % settings.cores.len()])
}
