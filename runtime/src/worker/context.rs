//! The step's context: the transaction, the ring ends, the counters. Handed down through every
//! operator.
//!
//! Invariants:
//! - positions of rings are private here; their cells are written by `save_positions` before
//!   commit, and what peers read is published by `publish` after it, tails before heads (R5's
//!   counterpart);
//! - a failure is noted, not unwound: the step loop ends the step without a commit.
//!
//! Called by every operator; driven by `step`.

use super::careful::Careful;
use super::outside::Outside;
use super::tape::Tape;
use crate::error::Error;
use crate::exchange::absent::is_down;
use crate::sink::AtCut;
use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::consumer::Consumer;
use testudo_shm::header::WorkerHeader;
use testudo_shm::marker::Marker;
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::record::Scratch;
use testudo_shm::txn::{Place, Txn};

/// The files that a sink writes at the moment, shared with the cut that syncs them.
pub type SharedFiles = Rc<RefCell<Vec<File>>>;

/// Records that one ring may give in one step, so that no channel starves the others: enough that a
/// step costs nothing beside them, and no more, since the successor of a worker that dies in a step
/// takes them all back, with a page fault for nearly each.
pub(crate) const TURN: usize = 512;

/// The same in a process's first step; doubled with each that follows.
const FIRST_TURN: usize = 1;

/// Longest sleep: what wakes a worker is a bell; this only bounds the harm of a missed one.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// The same while it may be waiting for a consumer that is dead.
const WAITING_MAX: Duration = Duration::from_millis(1);

/// The same while producers wait for what a replica has still to read.
const REPLICA_MAX: Duration = Duration::from_micros(100);

/// A counter's cell.
pub type CounterPlace = Place<u64>;

/// A ring that this worker fills.
#[derive(Debug)]
pub struct OutRing {
    pub(crate) ring: Producer,
    pub(crate) cell: Place<u64>,
    pub(crate) committed: u64,
    /// Index of the consuming process in the worker's list of peers.
    pub(crate) peer: usize,
    /// The consumer, where records may be dropped while it is down (partial completeness).
    pub(crate) consumer: Option<&'static WorkerHeader>,
    /// Bytes that may wait in the ring, where the job limits how long they do.
    pub(crate) limit: u64,
    /// What errors call this edge.
    pub(crate) name: String,
}

impl OutRing {
    /// Whether records that do not fit are to be dropped: the consumer is down, and the job does
    /// not wait for it. R1: its own header says so, whether there is a supervisor or not.
    #[inline(always)]
    pub(crate) fn drops(&self) -> bool {
        self.consumer.is_some_and(is_down)
    }

    /// Whether as much waits here as may.
    #[inline(always)]
    pub(crate) fn is_at_limit(&mut self) -> bool {
        self.ring.backlog() > self.limit && {
            self.ring.refresh();
            self.ring.backlog() > self.limit
        }
    }
}

/// Where a consumer stands: the frame at its head, and how much of that frame is taken.
pub type InPosition = [u64; 3];

/// A ring that this worker empties.
#[derive(Debug)]
pub struct InRing {
    /// Taken out while a frame of it is being processed.
    pub(crate) ring: Option<Consumer>,
    pub(crate) cell: Place<InPosition>,
    pub(crate) committed: InPosition,
    pub(crate) inner_bytes: u64,
    pub(crate) inner_count: u64,
    pub(crate) peer: usize,
    pub(crate) name: String,
    /// The edge, and the subtasks at its ends.
    pub(crate) edge: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// It holds what was in flight when the job was stopped, in private memory.
    pub(crate) rest: Option<Origin>,
    /// A cut still needs what lies behind the published head: the head stands still (R15).
    pub(crate) is_held: bool,
    /// How far the replica has read, where one follows: what it has not read stays where it is
    /// (R21).
    pub(crate) follower: Option<&'static AtomicU64>,
}

/// Whose frames the rest of an earlier run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The subtask that this job still has as a producer: its later frames follow.
    Present,
    /// A subtask of an earlier shape of the job: nothing follows.
    Past,
}

impl InRing {
    /// Gives back what was taken, as far as a replica has read it too. True when that is something.
    #[inline]
    fn give_back(&mut self) -> bool {
        match (&mut self.ring, self.follower) {
            (Some(ring), None) => ring.publish(),
            (Some(ring), Some(follower)) => {
                return ring.publish_to(follower.load(Ordering::Acquire));
            }
            (None, _) => {}
        }
        true
    }

    /// No cut needs the head to stand still any more.
    pub(crate) fn let_go(&mut self) {
        self.is_held = false;
    }

    /// Where it stands.
    pub(crate) fn position(&self) -> InPosition {
        let head = self.ring.as_ref().map_or(self.committed[0], Consumer::position);
        [head, self.inner_bytes, self.inner_count]
    }
}

/// The context of a step.
#[derive(Debug)]
pub struct Cx {
    pub(crate) txn: Txn,
    pub(crate) out_rings: Vec<OutRing>,
    pub(crate) in_rings: Vec<InRing>,
    pub(crate) failure: Option<Error>,
    /// Monotonic clock at the step's begin, nanoseconds.
    pub(crate) now_ns: u64,
    /// Sources stop: the job is being drained.
    pub(crate) draining: bool,
    /// Sources do not read for the moment: a savepoint is about to be taken.
    pub(crate) pausing: bool,
    /// Records that one input may give in this step: few in the first steps of a process, whose
    /// every access to state is a page fault, so that its peers hear of it soon.
    pub(crate) turn: usize,
    /// Archived records are validated when taken.
    pub(crate) validate: bool,
    /// The part of its source that the running stage reads, and which parts have ended.
    pub(crate) part: usize,
    pub(crate) ended_parts: Vec<bool>,
    /// The files that this worker's sinks write to.
    pub(crate) outputs: Vec<SharedFiles>,
    /// This worker's sinks, for its cuts.
    pub(crate) sinks: Vec<Rc<dyn AtCut>>,
    /// Latest watermark that an event-time operator or an inlet noted: for people, not for
    /// decisions.
    pub(crate) watermark: i64,
    /// A source has no room for what it could read in this step.
    pub(crate) is_pressed: bool,
    /// How the systems are that this worker reads from and writes to.
    pub(crate) outside: Outside,
    /// Says what this worker is doing.
    pub(crate) marker: &'static Marker,
    /// While each transaction takes one record (R17).
    pub(crate) careful: Option<Box<Careful>>,
    /// What sources gave in this step, for a replica.
    pub(crate) tape: Tape,
    /// Turns of the loop: whose turn it is among the inputs of a stage.
    pub(crate) rotation: usize,
    /// How often this process was to go on as if it had just attached: what it remembers besides
    /// its state (marks that were sent, whose turn it is) is forgotten.
    pub(crate) beginnings: u64,
    scratch: Vec<Scratch>,
}

impl Cx {
    pub(crate) fn new(txn: Txn, validate: bool, marker: &'static Marker) -> Self {
        Self {
            marker,
            careful: None,
            txn,
            out_rings: Vec::new(),
            in_rings: Vec::new(),
            failure: None,
            now_ns: 0,
            draining: false,
            pausing: false,
            part: 0,
            ended_parts: Vec::new(),
            outputs: Vec::new(),
            turn: FIRST_TURN,
            sinks: Vec::new(),
            validate,
            watermark: 0,
            is_pressed: false,
            outside: Outside::default(),
            tape: Tape::default(),
            rotation: 0,
            beginnings: 0,
            scratch: Vec::new(),
        }
    }

    /// Whether more may come of a part of the running stage's source. A stage without one has a
    /// single part that never ends.
    #[inline]
    pub(crate) fn is_part_open(&self, part: usize) -> bool {
        self.ended_parts.get(part) != Some(&true)
    }

    /// A buffer to encode into; given back with `give_scratch`.
    pub(crate) fn take_scratch(&mut self) -> Scratch {
        self.scratch.pop().unwrap_or_default()
    }

    pub(crate) fn give_scratch(&mut self, scratch: Scratch) {
        self.scratch.push(scratch);
    }

    /// Adds to a counter, inside the transaction.
    #[inline(always)]
    pub(crate) fn count(&mut self, counter: CounterPlace, by: u64) {
        let value = self.txn.get(counter);
        self.txn.set(counter, value + by);
    }

    /// Notes a failure; the first one counts.
    #[cold]
    pub(crate) fn fail(&mut self, error: Error) {
        self.failure.get_or_insert(error);
    }

    /// Loads the tails of all input rings: true when any has something (R5: before the control
    /// word).
    #[inline]
    pub(crate) fn look(&mut self) -> bool {
        let mut any = false;
        for input in &mut self.in_rings {
            if let Some(ring) = &mut input.ring {
                any |= ring.look();
            }
        }
        any
    }

    /// True when a producer has published something since the step looked. What lies there unread
    /// because what is behind has no room is no reason to stay awake.
    pub(crate) fn has_new_input(&mut self) -> bool {
        self.in_rings.iter_mut().filter_map(|input| input.ring.as_mut()).any(|ring| {
            let before = ring.backlog();
            ring.look();
            ring.backlog() != before
        })
    }

    /// True when a consumer has released something that this worker had not seen yet.
    pub(crate) fn has_room_again(&mut self) -> bool {
        self.out_rings.iter_mut().any(|out| {
            let before = out.ring.backlog();
            out.ring.refresh();
            out.ring.backlog() != before
        })
    }

    /// How long this worker may sleep without looking: what it waits for may have died, and a dead
    /// consumer rings no bell (partial completeness).
    pub(crate) fn patience(&self) -> Duration {
        let waits =
            |out: &OutRing| out.consumer.is_some() && 2 * out.ring.backlog() > out.ring.capacity();
        if self.waits_for_replica() {
            return REPLICA_MAX;
        }
        if self.out_rings.iter().any(waits) { WAITING_MAX } else { SLEEP_MAX }
    }

    /// Writes the cells of every ring position that moved.
    #[inline]
    pub(crate) fn save_positions(&mut self) {
        for out in &mut self.out_rings {
            let position = out.ring.position();
            if position != out.committed {
                self.txn.set(out.cell, position);
            }
        }
        for input in &mut self.in_rings {
            let position = input.position();
            if position != input.committed {
                self.txn.set(input.cell, position);
            }
        }
    }

    /// After the commit: makes tails visible, then heads. Calls `touched` with the peer of each
    /// that moved.
    #[inline]
    pub(crate) fn publish(&mut self, mut touched: impl FnMut(usize)) {
        for out in &mut self.out_rings {
            let position = out.ring.position();
            if position != out.committed {
                out.committed = position;
                out.ring.publish();
                touched(out.peer);
            }
        }
        for input in &mut self.in_rings {
            let position = input.position();
            if position != input.committed {
                if position[0] != input.committed[0] && !input.is_held && input.give_back() {
                    touched(input.peer);
                }
                input.committed = position;
            }
        }
    }

    /// Whether a position is another than the committed one, be it by a mark that changed nothing
    /// else: whatever is published outside a step was committed (R6).
    pub(crate) fn has_moved(&self) -> bool {
        self.out_rings.iter().any(|out| out.ring.position() != out.committed)
            || self.in_rings.iter().any(|input| input.position() != input.committed)
    }

    /// Whether something is there to be taken, and was not in a step that did nothing else: what is
    /// behind has no room.
    pub(crate) fn is_pressed(&self) -> bool {
        let rings = self.in_rings.iter().filter_map(|input| input.ring.as_ref());
        self.is_pressed || rings.map(Consumer::backlog).any(|bytes| bytes > 0)
    }

    /// Whether all that was in flight when the job was stopped is taken.
    pub(crate) fn rests_are_taken(&self) -> bool {
        let mut rests = self.in_rings.iter().filter(|input| input.rest.is_some());
        rests.all(|input| input.ring.as_ref().is_some_and(|ring| ring.backlog() == 0))
    }

    /// Between steps: gives back what was taken while a cut needed the head to stand still.
    pub(crate) fn publish_held(&mut self, mut touched: impl FnMut(usize)) {
        for input in self.in_rings.iter_mut().filter(|input| !input.is_held) {
            if input.ring.as_ref().is_some_and(Consumer::is_unpublished) && input.give_back() {
                touched(input.peer);
            }
        }
    }

    /// Whether something waits to be given back until a replica has read it.
    pub(crate) fn waits_for_replica(&self) -> bool {
        self.in_rings.iter().any(|input| {
            input.follower.is_some() && input.ring.as_ref().is_some_and(Consumer::is_unpublished)
        })
    }

    /// Publishes everything again: on attach, since the dead may have committed without publishing.
    pub(crate) fn publish_all(&mut self) {
        for out in &mut self.out_rings {
            out.ring.publish();
        }
        for input in &mut self.in_rings {
            if let Some(ring) = &mut input.ring {
                ring.publish();
            }
        }
    }

    /// The first ring found to hold what cannot be true: it is quarantined, and the job says so
    /// (R9).
    pub(crate) fn ring_fault(&self) -> Option<Error> {
        let outs =
            self.out_rings.iter().filter_map(|r| r.ring.fault().map(|fault| (&r.name, fault)));
        let ins = self.in_rings.iter().filter_map(|r| {
            r.ring.as_ref().and_then(Consumer::fault).map(|fault| (&r.name, fault))
        });
        outs.chain(ins).next().map(|(name, fault)| {
            let what = format!("the ring is damaged and was quarantined: {fault}");
            Error::Unsound(format!("exchange {name}: {what}"))
        })
    }
}
