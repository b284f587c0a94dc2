//! The layout: where every byte of a job lies, in its segment and in the arena.
//!
//! ```text
//! control segment   header page | descriptions | orders | words | rings from the launching process
//! worker segment    header | last words | marker | letter | counters | words || cells | undo log |
//! spills | rings
//!                   `------- front: mapped by all ----------------------------'' `--- the owner's
//!                   alone --------'
//! group segments    one for each key group of each operator with state
//! ```
//!
//! Invariants: whole pages; nothing overlaps; the same in every process; sparse, so what is not
//! touched costs nothing. Called by the plan; used by the supervisor (create) and by attach (map).

use super::{CounterKind, EdgeKind, EdgeSpec, Grouping, OperatorSpec, Process, Stage};
use crate::config::Settings;
use crate::error::Error;
use testudo_shm::follow::follower_bytes;
use testudo_shm::letter::Letter;
use testudo_shm::ring::WORD_STRIDE;
use testudo_shm::segment::PAGE;

/// Bytes for the job's description, of which two slots lie behind the control header.
pub(crate) const DESCRIPTION_BYTES: usize = 1 << 20;

/// Bytes of a worker's cell directory and cells.
pub(crate) const CELLS_BYTES: usize = 1 << 20;

/// Bytes reserved for the undo log.
pub(crate) const LOG_BYTES: usize = 1 << 30;

/// Bytes of undo log after which a step ends at the next record boundary: small enough for the
/// nearest caches.
pub(crate) const LOG_SOFT_BYTES: usize = 64 << 10;

/// Bytes reserved for each lane's spill.
pub(crate) const SPILL_BYTES: usize = 4 << 30;

/// Bytes reserved for what a sink could not write.
pub(crate) const HOLDING_BYTES: usize = 4 << 30;

/// Bytes reserved for a key group, when there are few of them.
const GROUP_BYTES: usize = 8 << 30;

/// Bytes of addresses that all key groups together may reserve.
const GROUPS_TOTAL: usize = 16 << 40;

/// Bytes of a worker's journal: a fifth of a second of the shortest steps.
pub(crate) const JOURNAL_BYTES: usize = PAGE + (1 << 20);

/// A ring's place.
#[derive(Debug, Clone)]
pub(crate) struct RingPlan {
    pub(crate) edge: usize,
    pub(crate) from: Process,
    pub(crate) to: Process,
    pub(crate) from_subtask: usize,
    pub(crate) to_subtask: usize,
    /// Offset of the tail word in the front of `from`.
    pub(crate) tail_word: usize,
    /// Offset of the head word in the front of `to`.
    pub(crate) head_word: usize,
    /// Offset of the data in the segment of `from`.
    pub(crate) data: usize,
    /// Arena offset of the mirrored mapping.
    pub(crate) at: usize,
    pub(crate) bytes: usize,
}

/// A spill's place.
#[derive(Debug, Clone)]
pub(crate) struct SpillPlan {
    pub(crate) edge: usize,
    pub(crate) worker: usize,
    pub(crate) lane: usize,
    /// Offset in the worker's segment.
    pub(crate) offset: usize,
}

/// The place for what a sink could not write.
#[derive(Debug, Clone)]
pub(crate) struct HoldingPlan {
    pub(crate) operator: usize,
    pub(crate) worker: usize,
    /// Offset in the worker's segment.
    pub(crate) offset: usize,
}

/// A process's segment.
#[derive(Debug, Clone, Default)]
pub(crate) struct SegmentPlan {
    /// Bytes that peers map.
    pub(crate) front: usize,
    /// Offsets in the segment; 0 for the control segment, which has none of these.
    pub(crate) words: usize,
    pub(crate) cells: usize,
    pub(crate) log: usize,
    /// End of what its owner maps in one piece; rings follow.
    pub(crate) private_end: usize,
    /// Bytes of the segment.
    pub(crate) bytes: usize,
    /// Arena offset.
    pub(crate) at: usize,
}

/// The key groups of an operator.
#[derive(Debug, Clone)]
pub(crate) struct GroupsPlan {
    pub(crate) operator: usize,
    pub(crate) groups: usize,
    pub(crate) bytes: usize,
    /// Arena offset of the first group; the others follow.
    pub(crate) at: usize,
}

/// The places of what a worker and its replica tell each other, each in a segment of its own.
#[derive(Debug, Clone)]
pub(crate) struct FollowPlan {
    pub(crate) worker: usize,
    /// Input rings of the worker.
    pub(crate) rings: usize,
    /// Arena offset of the worker's journal.
    pub(crate) journal: usize,
    /// Arena offset of what the replica says.
    pub(crate) follower: usize,
}

impl FollowPlan {
    /// Bytes of what the replica says.
    pub(crate) fn follower_bytes(&self) -> usize {
        follower_bytes(self.rings)
    }
}

/// The whole layout.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) segments: Vec<SegmentPlan>,
    pub(crate) rings: Vec<RingPlan>,
    pub(crate) spills: Vec<SpillPlan>,
    pub(crate) holdings: Vec<HoldingPlan>,
    pub(crate) groups: Vec<GroupsPlan>,
    pub(crate) counters: usize,
    /// The first counter of an edge.
    pub(crate) edge_counters: usize,
    pub(crate) arena_bytes: usize,
    /// Workers of tier 1. They change no place of anything else.
    pub(crate) follows: Vec<FollowPlan>,
    /// All addresses, those of `follows` included.
    pub(crate) reserved_bytes: usize,
}

/// Counters that a worker has room for at least; what is not used costs no memory.
const COUNTERS_MIN: usize = 1024;

/// Offset of the last words in a worker's segment.
pub(crate) const LAST_WORDS_AT: usize = PAGE;

/// Offset of what a worker says about what it is doing.
pub(crate) const MARKER_AT: usize = 2 * PAGE;

/// Offset of what it says of its death in numbers.
pub(crate) const OBITUARY_AT: usize = MARKER_AT + 2048;

/// Offset of the records that it puts aside.
pub(crate) const LETTER_AT: usize = 3 * PAGE;

/// Offset of a worker's counters in its segment.
pub(crate) const COUNTERS_AT: usize = LETTER_AT + size_of::<Letter>().next_multiple_of(PAGE);

/// Offset of the orders to workers in the supervisor's segment.
pub(crate) const ORDERS_AT: usize = PAGE + 2 * DESCRIPTION_BYTES;

/// Bytes of them: one for each worker.
const ORDERS_BYTES: usize =
    (super::WORKERS_MAX * size_of::<testudo_shm::letter::Orders>()).next_multiple_of(PAGE);

impl Layout {
    pub(crate) fn new(
        workers: usize,
        stages: &[Stage],
        edges: &[EdgeSpec],
        operators: &[OperatorSpec],
        user_counters: usize,
        settings: &Settings,
    ) -> Result<Self, Error> {
        let edge_counters = operators.len() * CounterKind::ALL.len() + user_counters;
        // There is room for those of another program with more operators (HotUpdate).
        let counters = edge_counters + crate::exchange::account::counters(edges.len());
        let counters = (2 * counters).next_power_of_two().max(COUNTERS_MIN);
        let mut layout = Self {
            segments: vec![SegmentPlan::default(); workers + 1],
            rings: Vec::new(),
            spills: Vec::new(),
            holdings: Vec::new(),
            groups: Vec::new(),
            counters,
            edge_counters,
            arena_bytes: 0,
            follows: Vec::new(),
            reserved_bytes: 0,
        };
        let mut words = vec![0; workers + 1];
        for (edge, spec) in edges.iter().enumerate() {
            layout.add_edge(edge, spec, stages, settings, &mut words);
        }
        for (operator, spec) in operators.iter().enumerate().filter(|(_, o)| o.kind == "sink") {
            let workers = stages[spec.stage].workers.iter();
            let own = workers.map(|&worker| HoldingPlan { operator, worker, offset: 0 });
            layout.holdings.extend(own);
        }
        layout.place_segments(&words);
        layout.place_groups(operators, stages, settings);
        layout.reserved_bytes = layout.arena_bytes;
        layout.check_cells(operators, edges, stages)?;
        if layout.arena_bytes > 1 << 46 {
            return Err(Error::Plan(format!(
                "the job needs {} TiB of addresses; use fewer workers, edges or key groups",
                layout.arena_bytes >> 40
            )));
        }
        Ok(layout)
    }

    /// Cells that a worker may need: two for each of its spills, one for each ring end, two for
    /// each channel, and a handful for each operator, stage and edge.
    pub(crate) fn cells(
        &self,
        operators: usize,
        edges: usize,
        stages: usize,
        worker: usize,
    ) -> usize {
        let spills = self.spills.iter().filter(|spill| spill.worker == worker).count();
        let ends = self.rings.iter().filter(|ring| ring.from == worker || ring.to == worker);
        2 * spills + 3 * ends.count() + 8 * operators + 4 * edges + 2 * stages
    }

    fn check_cells(
        &self,
        operators: &[OperatorSpec],
        edges: &[EdgeSpec],
        stages: &[Stage],
    ) -> Result<(), Error> {
        let need = |worker| self.cells(operators.len(), edges.len(), stages.len(), worker);
        let most = (0..self.segments.len()).map(need).max().unwrap_or(0);
        if most as u64 > testudo_shm::cell::ENTRIES {
            return Err(Error::Plan(format!(
                "a worker of this job needs {most} cells, more than {}; use fewer workers or exchanges",
                testudo_shm::cell::ENTRIES
            )));
        }
        Ok(())
    }

    /// Rings and spills of an edge, and the words that they need at either end.
    fn add_edge(
        &mut self,
        edge: usize,
        spec: &EdgeSpec,
        stages: &[Stage],
        settings: &Settings,
        words: &mut [usize],
    ) {
        let supervisor = words.len() - 1;
        let ends = |end: Option<usize>| {
            end.map_or_else(|| vec![supervisor], |s| stages[s].workers.clone())
        };
        let (from, to) = (ends(spec.from), ends(spec.to));
        for (from_subtask, &producer) in from.iter().enumerate() {
            for (lane, &(to_subtask, consumer)) in
                lanes(spec.kind, from_subtask, &to).iter().enumerate()
            {
                if producer != supervisor {
                    self.spills.push(SpillPlan { edge, worker: producer, lane, offset: 0 });
                }
                if producer == consumer {
                    continue;
                }
                let (tail, head) = (words[producer], words[consumer]);
                words[producer] += 1;
                // A word of its own for the consumer, and the next one for its replica.
                words[consumer] += 2;
                self.rings.push(RingPlan {
                    edge,
                    from: producer,
                    to: consumer,
                    from_subtask,
                    to_subtask,
                    tail_word: tail * WORD_STRIDE,
                    head_word: head * WORD_STRIDE,
                    data: 0,
                    at: 0,
                    bytes: settings.ring_bytes,
                });
            }
        }
    }

    fn place_segments(&mut self, words: &[usize]) {
        let supervisor = words.len() - 1;
        let mut arena = 0;
        for (process, words) in words.iter().enumerate() {
            let mut segment = SegmentPlan::default();
            segment.words = if process == supervisor {
                ORDERS_AT + ORDERS_BYTES
            } else {
                pages(COUNTERS_AT + self.counters * testudo_shm::counters::ENTRY)
            };
            segment.front = pages(segment.words + words * WORD_STRIDE);
            let mut offset = segment.front;
            if process != supervisor {
                segment.cells = offset;
                segment.log = offset + CELLS_BYTES;
                offset = segment.log + LOG_BYTES;
                for spill in self.spills.iter_mut().filter(|spill| spill.worker == process) {
                    spill.offset = offset;
                    offset += SPILL_BYTES;
                }
                for holding in self.holdings.iter_mut().filter(|h| h.worker == process) {
                    holding.offset = offset;
                    offset += HOLDING_BYTES;
                }
            }
            segment.private_end = offset;
            segment.at = arena;
            arena += offset;
            for ring in self.rings.iter_mut().filter(|ring| ring.from == process) {
                ring.data = offset;
                ring.at = arena;
                offset += ring.bytes;
                arena += 2 * ring.bytes;
            }
            segment.bytes = offset;
            self.segments[process] = segment;
        }
        for ring in &mut self.rings {
            ring.tail_word += self.segments[ring.from].words;
            ring.head_word += self.segments[ring.to].words;
        }
        self.arena_bytes = arena;
    }

    fn place_groups(&mut self, operators: &[OperatorSpec], stages: &[Stage], settings: &Settings) {
        let count = |operator: &OperatorSpec| match operator.state?.grouping {
            Grouping::ByKey => Some(settings.key_groups),
            Grouping::BySubtask => Some(stages[operator.stage].workers.len()),
        };
        let total: usize = operators.iter().filter_map(count).sum();
        let bytes = pages((GROUPS_TOTAL / total.max(1)).min(GROUP_BYTES));
        for (index, operator) in operators.iter().enumerate() {
            if let Some(groups) = count(operator) {
                self.groups.push(GroupsPlan {
                    operator: index,
                    groups,
                    bytes,
                    at: self.arena_bytes,
                });
                self.arena_bytes += groups * stride(bytes);
            }
        }
    }

    /// Places what the workers of tier 1 and their replicas tell each other, behind all else.
    pub(crate) fn place_follows(&mut self, workers: impl Iterator<Item = Process>) {
        for worker in workers {
            let rings = self.rings.iter().filter(|ring| ring.to == worker).count();
            let journal = self.reserved_bytes;
            let follower = journal + JOURNAL_BYTES;
            self.reserved_bytes = follower + follower_bytes(rings);
            self.follows.push(FollowPlan { worker, rings, journal, follower });
        }
    }

    /// What a worker of tier 1 and its replica share.
    pub(crate) fn follow(&self, worker: Process) -> Option<&FollowPlan> {
        self.follows.iter().find(|follow| follow.worker == worker)
    }

    /// Descriptors that the launching process needs for all segments.
    pub(crate) fn descriptors(&self) -> usize {
        self.segments.len() * 2
            + self.follows.len() * 4
            + self.groups.iter().map(|groups| groups.groups).sum::<usize>()
    }
}

/// The consumers of one producer's lanes: (subtask, process).
pub(crate) fn lanes(kind: EdgeKind, from_subtask: usize, to: &[Process]) -> Vec<(usize, Process)> {
    match kind {
        EdgeKind::Forward => {
            let subtask = from_subtask % to.len();
            vec![(subtask, to[subtask])]
        }
        _ => to.iter().copied().enumerate().collect(),
    }
}

/// Distance of two groups in the arena: not a power of two, or all their headers would compete for
/// the same cache sets.
pub(crate) fn stride(bytes: usize) -> usize {
    bytes + testudo_state::group::STAGGER
}

fn pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}
