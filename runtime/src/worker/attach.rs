//! Attaching: how a worker process takes its place, the first one and every successor alike. This
//! is recovery.
//!
//! Order (each step has a kill point, see `testing`):
//! 1. map: the control segment and peers' fronts read-only, one's own segment and key groups
//!    writable; a successor of a worker that runs then waits for its turn (`successor`);
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
use super::careful::Careful;
use super::context::{CounterPlace, Cx, InRing, OutRing};
use super::cut::Cutter;
use super::entry::{self, EXIT_ATTACH, Role};
use super::idle::Peer;
use super::journal::{Leading, Pieces};
use super::latency::Latency;
use super::outside::Outside;
use super::restore::Restored;
use super::resume::Resuming;
use super::standby::{self, Leftovers};
use super::tape::Mode;
use super::times::Times;
use super::warm::Fronts;
use super::{step, successor, verify};
use crate::checkpoint::notes::Part;
use crate::config::Settings;
use crate::error::Error;
use crate::exchange::absent::Absent;
use crate::exchange::inlet::Channel;
use crate::exchange::outlet::{Lane, Outlet};
use crate::exchange::route::{Route, owner_of};
use crate::flow::Flow;
use crate::operator::Intake;
use crate::operator::migrate::{Migration, Mover};
use crate::plan::layout::{
    CELLS_BYTES, COUNTERS_AT, HOLDING_BYTES, JOURNAL_BYTES, LAST_WORDS_AT, LETTER_AT, LOG_BYTES,
    LOG_SOFT_BYTES, MARKER_AT, OBITUARY_AT, ORDERS_AT, RingPlan, SPILL_BYTES, SegmentPlan, lanes,
    stride,
};
use crate::plan::{CounterKind, Grouping, Plan, WORKERS_MAX};
use crate::sink::holding::Holding;
use crate::source::Subtask;
use crate::supervisor::description::Description;
use crate::testing::{Point, point};
use std::any::Any;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::cell::Cells;
use testudo_shm::consumer::Consumer;
use testudo_shm::death;
use testudo_shm::follow::{Follower, Journal};
use testudo_shm::header::{self, ControlHeader, CutWords, WorkerHeader, WorkerState};
use testudo_shm::last_words::LastWords;
use testudo_shm::letter::{Letter, Orders};
use testudo_shm::marker::Marker;
use testudo_shm::primitive::Ordering;
use testudo_shm::producer::Producer;
use testudo_shm::record::Record;
use testudo_shm::ring::RingParts;
use testudo_shm::scatter::Scatter;
use testudo_shm::segment::Segment;
use testudo_shm::spill::Spill;
use testudo_shm::txn::{Place, Plain, Txn};
use testudo_state::{Gauge, Groups, StateError, Table};

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
    /// What this process had mapped of other workers while it stood by.
    pub(crate) leftovers: Leftovers,
    /// What its time is spent on.
    pub(crate) times: Times,
    /// Where the job limits how long a batch may wait.
    pub(crate) latency: Option<Latency>,
    /// What was migrated in this life, until it is done with.
    pub(crate) migration: Option<Box<Migration>>,
    /// What it tells its replica, where it is of tier 1.
    pub(crate) leading: Option<Box<Leading>>,
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
    /// How values of operators are migrated, and what was.
    movers: HashMap<usize, Vec<Mover>>,
    pub(crate) migration: Migration,
    gauge: Rc<Gauge>,
    pub(crate) counters: Vec<(String, CounterPlace)>,
    /// Counters that this worker had before this process, by label.
    labelled: OnceCell<HashMap<String, u64>>,
    /// The parts of sources that this worker reads.
    pub(crate) parts: Vec<Part>,
    /// The checkpoint that the job goes on from, while something of it is still to be taken.
    pub(crate) restored: Option<Restored>,
    /// This process brings it back first.
    pub(crate) is_first: bool,
    /// All key groups were laid out by a predecessor.
    is_founded: bool,
    /// Parts of sources by source and subtask, where the job goes on from a checkpoint.
    pub(crate) dealt: Vec<(String, Vec<Vec<Part>>)>,
    /// Descriptors of the group segments, by arena offset: they tell which pages are there.
    pub(crate) files: Vec<(usize, OwnedFd)>,
    /// First pages of groups in a second mapping.
    fronts: Fronts,
    /// This is a replica: it writes nothing that anybody sees.
    pub(crate) follows: bool,
}

/// What is mapped once a process has found its place.
pub(super) struct Mapped {
    pub(super) arena: &'static Arena,
    pub(super) own: &'static WorkerHeader,
    pub(super) control: &'static ControlHeader,
    pub(super) files: Vec<(usize, OwnedFd)>,
    /// What a standby had mapped of other workers.
    pub(super) leftovers: Leftovers,
    /// What it has brought in of the groups.
    pub(super) fronts: Fronts,
}

impl Attach {
    /// Attaches this process as the worker of its role and builds its stages.
    pub(crate) fn worker(
        role: Role,
        description: &Description,
        control: Segment,
        flow: &Flow,
        again: &dyn Fn() -> Flow,
    ) -> Result<(Worker, Vec<StageRef>), Error> {
        let plan = Rc::new(Plan::new(&flow.draft.borrow(), &flow.settings)?);
        if plan.hash != description.plan {
            return Err(Error::Plan(format!(
                "this process plans another job ({:016x}) than its supervisor ({:016x}): \
                 the flow must depend on the options alone",
                plan.hash, description.plan
            )));
        }
        if let Some(seat) = role.standby {
            let (role, mapped) = standby::inherit(seat, role, description, control, &plan, again)?;
            return Self::begin(role, description, flow, plan, mapped);
        }
        point(Point::AttachBegin);
        let worker = role.worker;
        // The arena lives as long as the process: ring ends and places point into it.
        let arena: &'static Arena =
            Box::leak(Box::new(Arena::reserve(plan.layout.reserved_bytes)?));
        let files = map_segments(arena, &plan, description, role, &control)?;
        map_follow(arena, &plan, description, worker)?;
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
        if let Some(fd) = role.succession {
            successor::await_turn(fd, own, role.in_haste)?;
        }
        let claim = || death::claim(own, || point(Point::Claimed));
        // An owner that is gone by now has marked the word meanwhile.
        let claimed = claim().or_else(|error| match verify::is_gone(&error) {
            true => claim(),
            false => Err(error),
        });
        match claimed {
            Ok(()) => {}
            Err(error) => match verify::claim(worker, error) {
                // A standby was first. It is the worker, and nothing is wrong (R2).
                None => std::process::exit(EXIT_ATTACH),
                Some(error) => return Err(error),
            },
        }
        let (leftovers, fronts) = Default::default();
        let mapped = Mapped { arena, own, control, files, leftovers, fronts };
        Self::begin(role, description, flow, plan, mapped)
    }

    /// The segment was claimed: this process is the worker from here on.
    fn begin(
        role: Role,
        description: &Description,
        flow: &Flow,
        plan: Rc<Plan>,
        mapped: Mapped,
    ) -> Result<(Worker, Vec<StageRef>), Error> {
        let (arena, own) = (mapped.arena, mapped.own);
        entry::give_way(&role, own, mapped.control);
        let at = plan.layout.segments[role.worker].at;
        let words = last_words(arena, at);
        // Before this process says who it is: nothing of what speaks against the segment is
        // overwritten.
        let found = verify::header(own, mapped.control, &plan, role.worker);
        let is_unborn = found.unwrap_or_else(|error| {
            name_process(own);
            step::give_up(own, words, &error)
        });
        announce(own, role, description);
        death::tell(own);
        words.clear();
        marker(arena, at).begin();
        // SAFETY: the front of our own segment is mapped writable for good.
        super::dying::watch(unsafe { header::at(arena.at(at + OBITUARY_AT)) }, words);
        // A successor would fail in the same way: the job ends, and these are the words that it
        // ends with.
        let mapped = (mapped, is_unborn);
        Self::take_over(role, description, flow, plan, mapped)
            .or_else(|error| step::give_up(own, words, &error))
    }

    /// The segment is ours: rolls back, opens what is there and publishes it again.
    fn take_over(
        role: Role,
        description: &Description,
        flow: &Flow,
        plan: Rc<Plan>,
        mapped: (Mapped, bool),
    ) -> Result<(Worker, Vec<StageRef>), Error> {
        let (Mapped { arena, own, control, files, leftovers, fronts }, is_unborn) = mapped;
        let worker = role.worker;
        let segment = &plan.layout.segments[worker];
        let mut txn = rolled_back(arena, &plan, worker, description, own)?;
        let cells = opened_cells(&mut txn, segment, own, is_unborn)?;
        let mut attach = Self::over((txn, cells), &plan, arena, worker, (description, flow));
        (attach.files, attach.fronts) = (files, fronts);
        let resuming = attach.resume(description)?;
        attach.open_rings()?;
        let stages = attach.build_stages(flow)?;
        let user_counters = attach.open_counters();
        let cutter = attach.cutter(description, own, control)?;
        attach.cx.careful = attach.careful();
        let latency = attach.latency();
        let leading = attach.leading();
        attach.cx.txn.commit();
        own.founded.store(1, Ordering::Release);
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
            feeds_supervisor: feeds_supervisor(&plan, worker),
            event: description.events.as_ref().map(|events| events[worker]),
            cutter,
            resuming,
            leftovers,
            times: Times::new(&own.times),
            latency,
            migration: (!attach.migration.is_over()).then(|| Box::new(attach.migration)),
            leading,
        };
        this.come_back();
        Ok((this, stages))
    }

    /// Attaching to what lies in an arena, rolled back.
    fn over(
        (txn, cells): (Txn, Cells),
        plan: &Rc<Plan>,
        arena: &'static Arena,
        worker: usize,
        (description, flow): (&Description, &Flow),
    ) -> Self {
        let segment = &plan.layout.segments[worker];
        let mut this = Self {
            cx: Cx::new(txn, !flow.settings.trust_records, marker(arena, segment.at)),
            cells: Rc::new(cells),
            plan: Rc::clone(plan),
            settings: Rc::clone(&flow.settings),
            worker,
            arena,
            intakes: HashMap::new(),
            groups: HashMap::new(),
            movers: movers(flow),
            migration: Migration::default(),
            gauge: Rc::new(Gauge::new(testudo_state::memory::GaugePaths::default(), None)),
            counters: Vec::new(),
            labelled: OnceCell::new(),
            parts: Vec::new(),
            restored: None,
            is_first: false,
            is_founded: false,
            dealt: description.dealt(),
            files: Vec::new(),
            fronts: Fronts::default(),
            follows: false,
        };
        let (own, _) = this.pages();
        this.is_founded = own.founded.load(Ordering::Relaxed) != 0;
        this.cx.outside = Outside::new(&own.outside, &own.times.waiting_since_ns, plan);
        this
    }

    /// Builds a worker over a copy of its segment and its groups: a replica, which claims nothing
    /// and is seen by nobody.
    pub(super) fn replica(
        worker: usize,
        description: &Description,
        flow: &Flow,
        arena: &'static Arena,
    ) -> Result<(Worker, Vec<StageRef>), Error> {
        let plan = Rc::new(Plan::new(&flow.draft.borrow(), &flow.settings)?);
        let segment = &plan.layout.segments[worker];
        let mut txn = attach_txn(arena, segment.at + segment.log);
        let cells = (segment.at + segment.cells) as u64;
        let cells = Cells::open(&mut txn, cells, CELLS_BYTES as u64)?;
        let mut attach = Self::over((txn, cells), &plan, arena, worker, (description, flow));
        attach.follows = true;
        attach.cx.tape.mode = Mode::Tell;
        let resuming = attach.resume(description)?;
        if resuming.is_under_way {
            return Err(Error::Machine("its worker has still to be loaded".into()));
        }
        attach.open_rings()?;
        let stages = attach.build_stages(flow)?;
        let user_counters = attach.open_counters();
        attach.waited_counter();
        attach.cx.txn.commit();
        let supervisor = plan.layout.segments[plan.supervisor()].at;
        let (header, last_words) = attach.pages();
        let this = Worker {
            // SAFETY: the fronts of all processes are mapped in this arena as in any other.
            control: unsafe { header::at::<ControlHeader>(arena.at(supervisor)) },
            peers: attach.peers(description),
            cx: attach.cx,
            header,
            last_words,
            groups: attach.groups.into_values().collect(),
            core: None,
            settings: Rc::clone(&flow.settings),
            user_counters,
            notice: description.notice,
            feeds_supervisor: false,
            event: None,
            cutter: None,
            resuming,
            leftovers: Leftovers::default(),
            times: Times::new(&header.times),
            latency: None,
            migration: None,
            leading: None,
        };
        Ok((this, stages))
    }

    /// What this worker tells its replica, where it is of tier 1.
    fn leading(&self) -> Option<Box<Leading>> {
        let (journal, follower) = follow_words(self.arena, &self.plan, self.worker)?;
        let layout = &self.plan.layout;
        let groups = layout.groups.iter().flat_map(|laid| {
            let held = held_groups(&self.plan, laid.operator, laid.groups, self.worker);
            held.into_iter().map(|group| (laid.at + group * stride(laid.bytes)) as u64)
        });
        Some(Box::new(Leading::new(journal, follower, Pieces::new(groups.collect()))))
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
            let parts = self.parts(ring);
            if !self.follows {
                check_tail(&name, &parts, position)?;
            }
            // SAFETY: mapped by `map_segments` for good; the claim makes this the only live
            // producer, and a replica fills a ring of its own.
            let end = unsafe {
                match self.follows {
                    false => Producer::attach(parts, position),
                    true => Producer::attach_as_replica(parts, position),
                }
            };
            self.cx.out_rings.push(OutRing {
                ring: end,
                cell,
                committed: position,
                peer: ring.to,
                consumer: self.may_be_absent(ring.to),
                limit: u64::MAX,
                name,
            });
        }
        for ring in plan.layout.rings.iter().filter(|ring| ring.to == worker) {
            let name = edge_name(&plan, ring);
            let cell = self.named_cell(&format!("{name}/head"), [0u64; 3])?;
            let position = self.cx.txn.get(cell);
            let parts = self.parts(ring);
            // A replica's worker did: what is there now may be another's already.
            if !self.follows {
                check_head(&name, &parts, position)?;
            }
            // SAFETY: as above, for the consumer.
            let end = unsafe { Consumer::attach(parts, position[0]) };
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
                follower: None,
            });
        }
        Ok(())
    }

    /// Another worker that the job does not wait for while it is down.
    fn may_be_absent(&self, process: usize) -> Option<&'static WorkerHeader> {
        if !self.plan.slo.is_partial() || [self.plan.supervisor(), self.worker].contains(&process) {
            return None;
        }
        let at = self.arena.at(self.plan.layout.segments[process].at);
        // SAFETY: the fronts of all workers are mapped for good and begin with their header.
        Some(unsafe { header::at::<WorkerHeader>(at) })
    }

    /// The producers of an inlet's channels that hold nothing up while they are absent.
    pub(crate) fn absent(&self, channels: &[Channel]) -> Absent {
        let producer = |(number, channel): (usize, &Channel)| {
            let process = self.cx.in_rings[channel.ring?].peer;
            Some((number, self.may_be_absent(process)?))
        };
        let producers: Vec<_> = channels.iter().enumerate().filter_map(producer).collect();
        Absent::new(self.plan.slo.absent_after(), channels.len(), producers)
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

    /// How long batches may wait, where the job says so.
    fn latency(&mut self) -> Option<Latency> {
        let waited = self.waited_counter();
        let max = self.plan.slo.max_latency?;
        Some(Latency::new(max, &mut self.cx.out_rings, waited))
    }

    /// What the supervisor has ordered of this worker (R17).
    fn careful(&self) -> Option<Box<Careful>> {
        let layout = &self.plan.layout;
        let orders = layout.segments[self.plan.supervisor()].at + ORDERS_AT;
        let letter = layout.segments[self.worker].at + LETTER_AT;
        // SAFETY: both fronts are mapped for good, and the plan gives these ranges to the orders
        // and to the letter.
        let (orders, page) = unsafe {
            let orders = header::at::<[Orders; WORKERS_MAX]>(self.arena.at(orders));
            (&orders[self.worker], header::at::<Letter>(self.arena.at(letter)))
        };
        Careful::new(orders, page, self.cx.txn.place(letter as u64))
    }

    /// The first operator of a stage: what it puts aside is counted there.
    pub(crate) fn aside(&mut self, stage: usize) -> CounterPlace {
        let first = self.plan.operators.iter().position(|operator| operator.stage == stage);
        self.counter(first.unwrap_or(0), CounterKind::DeadLettered)
    }

    /// Counters of operators and of the user, all of them, so that a reader finds every label.
    fn open_counters(&mut self) -> Vec<CounterPlace> {
        for operator in 0..self.plan.operators.len() {
            for kind in CounterKind::ALL {
                self.counter(operator, kind);
            }
        }
        self.open_edge_counts();
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
    pub(crate) fn edge_counter(&mut self, edge: usize, kind: CounterKind) -> CounterPlace {
        let from = self.plan.edges[edge].from;
        let before = self.plan.operators.iter().rposition(|operator| Some(operator.stage) == from);
        self.counter(before.unwrap_or(0), kind)
    }

    /// Where the counter of that label is, or is to be: at its place in this plan, unless another
    /// program that ran before had it elsewhere, or something else there.
    fn counter_slot(&self, index: usize, label: &str) -> u64 {
        let at = self.plan.layout.segments[self.worker].at + COUNTERS_AT;
        let slot = |index: usize| (at + index * testudo_shm::counters::ENTRY) as u64;
        let found = |index: usize| testudo_shm::counters::label(&self.cx.txn, slot(index));
        let label = testudo_shm::counters::kept(label);
        if found(index).as_deref() == Some(label) {
            return slot(index);
        }
        // Places are taken from the front by plan, and from the back where that was not possible.
        let all = 0..self.plan.layout.counters;
        let moved = all.clone().rev().map_while(|index| Some((found(index)?, slot(index))));
        let before = self.labelled.get_or_init(|| {
            let used = all.map_while(|index| Some((found(index)?, slot(index))));
            // Long labels may be alike as far as they are kept: only what was there before is
            // moved.
            let is_new = |at: u64| self.counters.iter().any(|(_, place)| place.offset() == at);
            used.chain(moved.clone()).filter(|(_, at)| !is_new(*at)).collect()
        });
        if let Some(known) = before.get(label) {
            return *known;
        }
        let last = self.plan.layout.counters - 1;
        if found(index).is_none() { slot(index) } else { slot(last - moved.count()) }
    }

    pub(crate) fn counter_at(&mut self, index: usize, label: &str) -> CounterPlace {
        let at = self.counter_slot(index, label);
        let place = testudo_shm::counters::open(&mut self.cx.txn, at, label);
        if self.counters.iter().all(|(_, known)| known.offset() != place.offset()) {
            self.counters.push((label.to_owned(), place));
        }
        place
    }

    pub(crate) fn settings(&self) -> Rc<Settings> {
        Rc::clone(&self.settings)
    }

    pub(crate) fn source_subtasks(&self) -> usize {
        match self.dealt.iter().map(|(_, subtasks)| readers(subtasks)).sum() {
            0 => self.plan.source_subtasks(),
            readers => readers,
        }
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
            beginnings: self.cx.beginnings,
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
            account: self.sending(edge),
            void: vec![false; targets.len()],
            name: format!("exchange to {}", edge_target(&plan, edge)),
        })
    }

    /// Where a sink's output is kept while it cannot be written.
    pub(crate) fn holding(&mut self, operator: usize) -> Result<Holding, Error> {
        let plan = Rc::clone(&self.plan);
        let mut own = plan.layout.holdings.iter().filter(|holding| holding.worker == self.worker);
        let Some(laid) = own.find(|holding| holding.operator == operator) else {
            return Err(Error::Plan(format!("operator {operator} is no sink of this worker")));
        };
        let base = self.arena.at(plan.layout.segments[self.worker].at + laid.offset);
        let name = format!("{}/held", plan.operators[operator].uid());
        // SAFETY: the plan gives this range of our own segment to this sink alone.
        let spill =
            unsafe { Spill::attach(&mut self.cx.txn, &self.cells, &name, base, HOLDING_BYTES) };
        Ok(Holding::new(spill?))
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
        let groups = Groups::new(&spec.name, count, state.of_groups(), Rc::clone(&self.gauge));
        for group in held_groups(&plan, laid.operator, laid.groups, self.worker) {
            let number = if is_whole { 0 } else { group as u32 };
            let base = self.arena.at(laid.at + group * stride(laid.bytes));
            // SAFETY: mapped writable by `map_segments`, for this worker alone, for good; the log
            // was rolled back.
            let done = unsafe {
                let txn = &mut self.cx.txn;
                if self.is_founded {
                    let at = laid.at + group * stride(laid.bytes);
                    groups.attach_again(txn, number, (base, laid.bytes), self.fronts.of(at))
                } else {
                    groups.attach(txn, number, base, laid.bytes)
                }
            };
            done.map_err(|error| verify::group(&spec.name, &error))?;
        }
        self.groups.insert(operator, groups.clone());
        let movers = self.movers.remove(&operator).unwrap_or_default();
        self.migrate(operator, &groups, &movers)?;
        Ok(groups)
    }

    /// An operator's table.
    pub(crate) fn table<K: Record, V: Record>(
        &mut self,
        operator: usize,
        name: &str,
    ) -> Result<Table<K, V>, Error> {
        let groups = self.groups(operator)?;
        let table = groups.table(&mut self.cx.txn, name);
        table.map_err(|error| self.unopened(operator, &error))
    }

    /// A state that cannot be opened. What a worker has left in other types than this program's,
    /// which its supervisor found to fit, is as good as damaged: perhaps nobody is left who knows
    /// that an update is being rolled back.
    pub(crate) fn unopened(&self, operator: usize, error: &StateError) -> Error {
        let is_left = self.is_founded && self.restored.is_none();
        match error {
            StateError::StateSchema { .. } if is_left => Error::Unsound(error.to_string()),
            _ => Error::job(&self.operator_name(operator), error.to_string()),
        }
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
    /// All is open: peers hear of it.
    fn come_back(&mut self) {
        self.publish_again();
        self.header.attached_ns.store(crate::time::now_ns(), Ordering::Relaxed);
        self.header.state.store(WorkerState::Running as u32, Ordering::Release);
        // A checkpoint may be due and waiting for this.
        if self.cutter.is_some() {
            self.notice();
        }
        self.resuming.begin_loading(self.header, self.last_words);
    }

    /// Tells the supervisor to look at this worker's state.
    pub(crate) fn notice(&self) {
        testudo_shm::wait::wake_event(self.notice);
    }

    /// Publishes every position again and rings every bell: the dead may have committed without
    /// doing so.
    fn publish_again(&mut self) {
        self.cx.publish_all();
        point(Point::Published);
        testudo_shm::wait::ring_bell(&self.header.bell);
        self.wake_everyone();
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

/// How values are migrated, by operator.
fn movers(flow: &Flow) -> HashMap<usize, Vec<Mover>> {
    let mut movers = HashMap::<usize, Vec<Mover>>::new();
    for (operator, mover) in flow.draft.borrow_mut().movers.drain(..) {
        movers.entry(operator).or_default().push(mover);
    }
    movers
}

/// Whether a ring leads from a worker to the supervisor, or back.
fn feeds_supervisor(plan: &Plan, worker: usize) -> bool {
    plan.layout.rings.iter().any(|ring| {
        let ends = [ring.from, ring.to];
        ends.contains(&worker) && ends.contains(&plan.supervisor())
    })
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

/// Subtasks that have a part of their source to read.
pub(crate) fn readers(subtasks: &[Vec<Part>]) -> usize {
    subtasks.iter().filter(|parts| !parts.is_empty()).count()
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
    role: Role,
    control: &Segment,
) -> Result<Vec<(usize, OwnedFd)>, Error> {
    let (layout, worker) = (&plan.layout, role.worker);
    let warm = |fd: BorrowedFd<'_>, from, len, at| {
        if role.succession.is_some() {
            successor::warm(arena, fd, from, len, at);
        }
    };
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
            let fd = files[&process].as_fd();
            arena.map(fd, 0, segment.private_end, segment.at, Access::Owner)?;
            warm(fd, 0, segment.private_end, segment.at);
        } else {
            arena.map(files[&process].as_fd(), 0, segment.front, segment.at, Access::Peer)?;
            warm(files[&process].as_fd(), 0, segment.front, segment.at);
        }
    }
    for ring in layout.rings.iter().filter(|ring| ring.from == worker || ring.to == worker) {
        let access = if ring.from == worker { Access::Owner } else { Access::Peer };
        let fd = if ring.from == supervisor { control.fd() } else { files[&ring.from].as_fd() };
        arena.map_mirrored(fd, ring.data, ring.bytes, ring.at, access)?;
        if description.settings.huge_pages {
            arena.advise_huge(ring.at, 2 * ring.bytes);
        }
        warm(fd, ring.data, ring.bytes, ring.at);
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
            warm(fd.as_fd(), 0, laid.bytes, at);
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

/// Verifies where this worker's end of a ring stands that it fills: what lies between what it had
/// published and what it had committed are frames.
fn check_tail(edge: &str, parts: &RingParts, position: u64) -> Result<(), Error> {
    // SAFETY: the word is in our own front, and the data mapped by `map_segments` for good; nobody
    // writes there but us.
    let (published, walked) = unsafe {
        let published = parts.tail.as_ref().load(Ordering::Relaxed);
        (published, parts.walk(published, position))
    };
    verify::position(edge, position, published, walked)
}

/// The same for a ring that it empties; also how far it is in the frame there.
fn check_head(edge: &str, parts: &RingParts, position: [u64; 3]) -> Result<(), Error> {
    let [at, bytes, count] = position;
    // SAFETY: as above; the producer writes nothing before this head is published.
    let (published, walked, frame) = unsafe {
        let published = parts.head.as_ref().load(Ordering::Relaxed);
        let tail = parts.tail.as_ref().load(Ordering::Acquire);
        (published, parts.walk(published, at), parts.frame_at(at, tail))
    };
    verify::position(edge, at, published, walked)?;
    verify::inner(edge, (bytes, count), frame)
}

/// The directory of cells; an empty one in a segment that was never in use.
fn opened_cells(
    txn: &mut Txn,
    segment: &SegmentPlan,
    own: &WorkerHeader,
    is_unborn: bool,
) -> Result<Cells, Error> {
    let at = (segment.at + segment.cells) as u64;
    verify::founded(own, is_unborn, Cells::is_unmade(txn, at))?;
    Ok(Cells::open(txn, at, CELLS_BYTES as u64)?)
}

/// The transaction, with what a predecessor left open undone.
fn rolled_back(
    arena: &'static Arena,
    plan: &Plan,
    worker: usize,
    description: &Description,
    own: &WorkerHeader,
) -> Result<Txn, Error> {
    let segment = &plan.layout.segments[worker];
    let mut txn = attach_txn(arena, segment.at + segment.log);
    let writes = verify::Own::new(plan, worker);
    if description.checkpoints.is_some() {
        txn.track()?;
    }
    let is_own = |offset, bytes| writes.holds(offset, bytes);
    let undone = txn.roll_back_with(is_own, || point(Point::RollingBack));
    let undone = undone.map_err(verify::log)?;
    own.rolled_back.store(undone, Ordering::Relaxed);
    point(Point::RolledBack);
    Ok(txn)
}

fn attach_txn(arena: &'static Arena, log: usize) -> Txn {
    // SAFETY: the log lies in our own segment, mapped writable for good; the claim makes us its
    // only writer.
    unsafe { Txn::attach(arena.base(), arena.len(), arena.at(log), LOG_BYTES, LOG_SOFT_BYTES) }
}

/// What a worker of tier 1 and its replica tell each other; `None` for a worker of another tier.
pub(crate) fn follow_words(
    arena: &'static Arena,
    plan: &Plan,
    worker: usize,
) -> Option<(Journal, Follower)> {
    let laid = plan.layout.follow(worker)?;
    // SAFETY: workers and replicas map both for good, where the plan has them.
    unsafe {
        let journal = Journal::at(arena.at(laid.journal), JOURNAL_BYTES);
        Some((journal, Follower::at(arena.at(laid.follower), laid.rings)))
    }
}

/// Maps what a worker of tier 1 and its replica tell each other, as the worker has it.
fn map_follow(
    arena: &Arena,
    plan: &Plan,
    description: &Description,
    worker: usize,
) -> Result<(), Error> {
    let Some(laid) = plan.layout.follow(worker) else { return Ok(()) };
    let found = description.follows.iter().find(|fds| fds.worker == worker);
    let fds = found.ok_or_else(|| {
        Error::Plan(format!("worker {worker} is of tier 1, and was not when the job was started"))
    })?;
    // SAFETY: the supervisor left both open for this process; each is taken once.
    let (journal, follower) = unsafe {
        (OwnedFd::from_raw_fd(fds.journal.owner), OwnedFd::from_raw_fd(fds.follower.peer))
    };
    arena.map(journal.as_fd(), 0, JOURNAL_BYTES, laid.journal, Access::Owner)?;
    arena.map(follower.as_fd(), 0, laid.follower_bytes(), laid.follower, Access::Peer)?;
    Ok(())
}

/// What the worker whose segment is at an arena offset says about what it is doing.
pub(crate) fn marker(arena: &'static Arena, segment: usize) -> &'static Marker {
    // SAFETY: the front of every worker's segment is mapped for good, and the plan gives this range
    // of it to the marker.
    unsafe { header::at::<Marker>(arena.at(segment + MARKER_AT)) }
}

/// The page of last words in the segment at an arena offset.
pub(crate) fn last_words(arena: &'static Arena, segment: usize) -> &'static LastWords {
    // SAFETY: the front of every worker's segment is mapped for good, and this page of it is one of
    // last words.
    unsafe { header::at::<LastWords>(arena.at(segment + LAST_WORDS_AT)) }
}

/// Writes which process this is.
fn name_process(header: &WorkerHeader) {
    header.started.store(crate::keeper::own_start(), Ordering::Relaxed);
    header.pid.store(std::process::id(), Ordering::Release);
}

/// Writes who we are into the header, right after the claim.
fn announce(header: &WorkerHeader, role: Role, description: &Description) {
    header.magic.store(header::MAGIC, Ordering::Relaxed);
    header.version.store(header::LAYOUT_VERSION, Ordering::Relaxed);
    header.worker.store(role.worker as u32, Ordering::Relaxed);
    header.plan.store(description.plan, Ordering::Relaxed);
    // Also where the segment was emptied, a life has a number that none before it had.
    let lives = header.incarnation.load(Ordering::Relaxed).max(role.life);
    header.incarnation.store(lives + 1, Ordering::Release);
    header.before_ns.store(header.commit_ns.load(Ordering::Relaxed), Ordering::Relaxed);
    header.first_commit_ns.store(0, Ordering::Relaxed);
    header.attached_ns.store(0, Ordering::Relaxed);
    header.sleeping.store(0, Ordering::Relaxed);
    header.state.store(WorkerState::Attaching as u32, Ordering::Release);
    // Last: whoever finds this process's number finds nothing of its predecessor's life beside it.
    name_process(header);
}

fn core_of(settings: &Settings, worker: usize) -> Option<usize> {
    if settings.cores.is_empty() {
        return None;
    }
    Some(settings.cores[worker % settings.cores.len()])
}
