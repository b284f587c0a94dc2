//! Verifying: whether what a predecessor left in this worker's memory can be what the engine wrote.
//! A wild store of the user's code may have gone anywhere in what its worker may write.
//!
//! At each attach, as much as costs no more than attaching: the header, the log's framing, the
//! directory of cells, positions against what was published, each key group's first page and its
//! tables' headers. Everything else is found when it is used, or looked at on suspicion.
//!
//! Called by `attach`. What does not verify is [`Error::Unsound`]: the worker gives up, and its
//! region goes back to a checkpoint.

use super::attach::held_groups;
use crate::error::Error;
use crate::plan::Plan;
use crate::plan::layout::stride;
use std::path::Path;
use testudo_shm::death::ClaimError;
use testudo_shm::fault::Fault;
use testudo_shm::frame::{Head, Kind};
use testudo_shm::header::{ControlHeader, LAYOUT_VERSION, MAGIC, RegionWords, WorkerHeader};
use testudo_shm::primitive::Ordering;
use testudo_state::StateError;

/// More lives than that are none. (The supervisor believes no more than half as many, and counts on
/// from there.)
const LIVES_MAX: u64 = 1 << 32;

/// The first page, before this process writes who it is. True where nobody has lived yet.
pub(super) fn header(
    own: &WorkerHeader,
    control: &ControlHeader,
    plan: &Plan,
    worker: usize,
) -> Result<bool, Error> {
    let (magic, version) = (own.magic.load(Ordering::Relaxed), own.version.load(Ordering::Relaxed));
    let (says, lives) =
        (own.worker.load(Ordering::Relaxed), own.incarnation.load(Ordering::Relaxed));
    let hash = own.plan.load(Ordering::Relaxed);
    let said = [magic, u64::from(version), u64::from(says), hash];
    let known = [MAGIC, u64::from(LAYOUT_VERSION), worker as u64, plan.hash];
    // The first life counts itself last: whoever died before that has said only some of it.
    let is_begun = lives == 0 && said.iter().zip(known).all(|(said, is)| [0, is].contains(said));
    if is_begun || (said == known && (1..LIVES_MAX).contains(&lives)) {
        return cuts(own, &control.regions[plan.regions.of_task(worker)]).map(|()| is_begun);
    }
    Err(Error::Unsound(format!(
        "the header of its segment does not verify: \
         magic {magic:#x}, version {version}, worker {says}, plan {hash:#x}, {lives} lives"
    )))
}

/// What it says about cuts: of none that was never begun. (The supervisor believes that a later
/// incarnation repeats nothing older.)
fn cuts(own: &WorkerHeader, region: &RegionWords) -> Result<(), Error> {
    let words = &own.cut;
    let said = [&words.epoch, &words.joined, &words.committed];
    let [epoch, joined, committed] = said.map(|word| word.load(Ordering::Relaxed));
    let (begun, good) = (region.epoch.load(Ordering::Acquire), region.good.load(Ordering::Acquire));
    if epoch <= begun && joined <= begun && committed <= good.max(begun) {
        return Ok(());
    }
    Err(Error::Unsound(format!(
        "the header of its segment does not verify: it knows of cuts {epoch}, {joined} and \
         {committed}, of {begun} that were begun"
    )))
}

/// Whether the cells are there exactly if they were made: memory that somebody has filled with
/// zeros looks like new. A worker that died before it was done with it has `founded` nothing.
pub(super) fn founded(
    own: &WorkerHeader,
    is_unborn: bool,
    are_cells_unmade: bool,
) -> Result<(), Error> {
    let was_founded = own.founded.load(Ordering::Relaxed) != 0;
    if was_founded && are_cells_unmade {
        return Err(Error::Unsound("the cell directory of its segment is gone".into()));
    }
    if is_unborn && (was_founded || !are_cells_unmade) {
        return Err(Error::Unsound("the header of its segment is empty, its cells are not".into()));
    }
    Ok(())
}

/// Whether a claim failed for a thread that there is none of.
pub(super) fn is_gone(error: &ClaimError) -> bool {
    matches!(error, ClaimError::Owned(tid) if !Path::new(&format!("/proc/{tid}")).exists())
}

/// Why a segment cannot be claimed: the word was overwritten, if it names a thread that is no
/// process of this worker's. `None` if it is one. (Whoever claims is a worker or a standby by its
/// name before that.)
pub(super) fn claim(worker: usize, error: ClaimError) -> Option<Error> {
    let ClaimError::Owned(tid) = error else { return Some(Error::Machine(error.to_string())) };
    let name = std::fs::read_to_string(format!("/proc/{tid}/comm")).unwrap_or_default();
    let name = name.trim_end();
    let standby = name.strip_prefix("testudo-s").is_some_and(|seat| seat.parse::<u32>().is_ok());
    if standby || name == format!("testudo-w{worker}") {
        return None;
    }
    Some(Error::Unsound(format!(
        "the claim word of its segment does not verify: it names thread {tid}, \
         which is no process of this worker"
    )))
}

/// What this worker may write, by arena offset: its segment but for its rings, and its key groups.
pub(super) struct Own {
    ranges: Vec<Row>,
}

/// Pieces of the same size at the same distance.
struct Row {
    from: u64,
    to: u64,
    stride: u64,
    bytes: u64,
}

impl Row {
    fn holds(&self, offset: u64, bytes: u64) -> bool {
        (self.from..self.to).contains(&offset)
            && (offset - self.from) % self.stride + bytes <= self.bytes
    }
}

impl Own {
    pub(super) fn new(plan: &Plan, worker: usize) -> Self {
        let segment = &plan.layout.segments[worker];
        let (from, bytes) = (segment.at as u64, segment.private_end as u64);
        let mut ranges = vec![Row { from, to: from + bytes, stride: bytes, bytes }];
        for laid in &plan.layout.groups {
            let (bytes, stride) = (laid.bytes as u64, stride(laid.bytes) as u64);
            for group in held_groups(plan, laid.operator, laid.groups, worker) {
                let from = laid.at as u64 + group as u64 * stride;
                match ranges.last_mut() {
                    // A worker's groups are neighbours: one row for each operator.
                    Some(row) if row.to == from && row.stride == stride => row.to += stride,
                    _ => ranges.push(Row { from, to: from + stride, stride, bytes }),
                }
            }
        }
        Self { ranges }
    }

    /// Whether all of a range is.
    pub(super) fn holds(&self, offset: u64, bytes: u64) -> bool {
        self.ranges.iter().any(|row| row.holds(offset, bytes))
    }
}

/// The undo log is not one.
pub(super) fn log(word: u64) -> Error {
    Error::Unsound(format!("the undo log does not verify: its length, or an entry, says {word:#x}"))
}

/// A position, against what of it was published before the last commit, or at it: frames lead from
/// there to here.
pub(super) fn position(
    edge: &str,
    position: u64,
    published: u64,
    walked: Result<(), Fault>,
) -> Result<(), Error> {
    walked.map_err(|fault| {
        Error::Unsound(format!(
            "exchange {edge}: its position does not verify: {position}, {published} was \
             published ({fault})"
        ))
    })
}

/// How far an inlet is in the frame at its position: bytes and records.
pub(super) fn inner(
    edge: &str,
    (bytes, count): (u64, u64),
    frame: Result<Head, Fault>,
) -> Result<(), Error> {
    let is_inside = frame.is_ok_and(|frame| {
        frame.kind == Kind::Data && (1..frame.bytes).contains(&bytes) && count < frame.count
    });
    if (bytes, count) == (0, 0) || (is_inside && count > 0) {
        return Ok(());
    }
    Err(Error::Unsound(format!(
        "exchange {edge}: its position does not verify: {count} records and {bytes} bytes into a \
         frame that has not so many"
    )))
}

/// What a key group's segment is not.
pub(super) fn group(operator: &str, error: &StateError) -> Error {
    match error {
        StateError::Unsound { .. } => Error::Unsound(error.to_string()),
        _ => Error::job(operator, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_own_as_a_whole_or_not() {
        let row = |from, to, stride, bytes| Row { from, to, stride, bytes };
        let own = Own { ranges: vec![row(100, 200, 100, 100), row(300, 600, 150, 100)] };
        for (offset, bytes, is_own) in [
            (100, 100, true),
            (99, 1, false),
            (199, 1, true),
            (199, 2, false),
            (250, 10, false),
            (300, 0, true),
            (350, 51, false),
            (440, 10, false),
            (450, 100, true),
            (500, 51, false),
            (600, 1, false),
            (u64::from(u32::MAX) << 16, 8, false),
        ] {
            assert_eq!(own.holds(offset, bytes), is_own, "{bytes} bytes at {offset}");
        }
    }

    #[test]
    fn a_place_in_a_frame_is_inside_it_or_at_its_begin() {
        let frame = |kind| Ok(Head { kind, count: 4, bytes: 32 });
        assert!(inner("e", (0, 0), Err(Fault::Archive)).is_ok());
        assert!(inner("e", (8, 1), frame(Kind::Data)).is_ok());
        for (wrong, kind) in [
            ((8, 0), Kind::Data),
            ((0, 1), Kind::Data),
            ((32, 3), Kind::Data),
            ((24, 4), Kind::Data),
            ((8, 1), Kind::Mark),
        ] {
            assert!(inner("e", wrong, frame(kind)).is_err(), "{wrong:?}");
        }
        assert!(inner("e", (8, 1), Err(Fault::Archive)).is_err());
    }
}
