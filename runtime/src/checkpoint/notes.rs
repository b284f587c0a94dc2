//! Notes: what a worker writes into its region file besides blocks of state. Cells, counters, and
//! what each run of bytes in flight is.
//!
//! Invariants: versioned; a reader refuses what it does not know; operators are named by uid, edges
//! by number, kind and schema, so that a changed job can be told from the same one.
//!
//! Written by the worker's cut, read by the restore.

use serde::{Deserialize, Serialize};

/// Version of these notes.
pub(crate) const VERSION: u32 = 1;

/// Name of the blob that holds the [`Notes`], as JSON.
pub(crate) const NOTES: &str = "notes";

/// Name of the blob that holds the cells: see [`pack_cells`].
pub(crate) const CELLS: &str = "cells";

/// Segments of state by key group.
pub(crate) const BY_KEY: u32 = 0;
/// Segments of state by subtask.
pub(crate) const BY_SUBTASK: u32 = 1;
/// Segments of spills: `operator` is the edge, `group` the lane.
pub(crate) const SPILL: u32 = 2;

/// A worker's notes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Notes {
    pub(crate) version: u32,
    pub(crate) worker: usize,
    /// What cells and edges mean: see `Plan::shape`.
    pub(crate) shape: u64,
    /// The same, so that another plan can be compared with it.
    pub(crate) was: Shape,
    /// Counters by label.
    pub(crate) counters: Vec<(String, u64)>,
    /// Ring bytes that this worker had not taken yet.
    pub(crate) flights: Vec<Flight>,
    /// Records that this worker had not got into a ring yet.
    pub(crate) spills: Vec<Spilled>,
    /// What this worker's source subtasks were reading.
    pub(crate) parts: Vec<Part>,
    /// Schema of keys and values of each operator with state, by uid: those of the program that
    /// this worker ran, which may be another one than the supervisor's.
    #[serde(default)]
    pub(crate) states: Vec<(String, u64)>,
}

impl Notes {
    /// What a counter of that worker said.
    pub(crate) fn counter(&self, label: &str) -> u64 {
        let found = self.counters.iter().find(|(known, _)| known == label);
        found.map_or(0, |(_, value)| *value)
    }
}

/// The job as it was when the cut was taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shape {
    /// The worker of each subtask, by stage.
    pub(crate) stages: Vec<Vec<usize>>,
    /// Each operator's uid and stage; those that only take records from an exchange come last.
    pub(crate) operators: Vec<(String, usize)>,
    pub(crate) edges: Vec<Edge>,
}

/// An exchange.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Edge {
    /// The stages at its ends; none for the launching process.
    pub(crate) from: Option<usize>,
    pub(crate) to: Option<usize>,
    pub(crate) kind: String,
    /// What travels on it.
    pub(crate) schema: u64,
}

/// Bytes in flight on an edge: frames, in a blob of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Flight {
    pub(crate) blob: String,
    pub(crate) edge: usize,
    /// The producing subtask.
    pub(crate) from: usize,
    /// The consuming subtask.
    pub(crate) to: usize,
    /// How much of the first frame was taken: bytes and records.
    pub(crate) inner: (u64, u64),
    /// It comes before what was in the ring: it was in flight at an earlier cut already.
    pub(crate) is_rest: bool,
    /// Its producer belongs to an earlier shape of the job: nothing follows on its channel.
    pub(crate) is_past: bool,
}

/// Records of a spill: [from, to) of a segment of kind [`SPILL`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spilled {
    pub(crate) edge: usize,
    pub(crate) lane: usize,
    /// The producing and the consuming subtask.
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) begin: u64,
    pub(crate) end: u64,
}

/// A part of a source: subtask `index` of `count`, as the source divided itself when the job began.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    /// The source's uid.
    pub(crate) operator: String,
    pub(crate) index: usize,
    pub(crate) count: usize,
}

/// The blob's name for a ring's bytes in flight.
pub(crate) fn flight_name(number: usize) -> String {
    format!("flight-{number}")
}

/// Cells as bytes: for each the hash of its name, its length, and its bytes, in multiples of eight.
pub(crate) fn pack_cells(cells: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut packed = Vec::new();
    for (name, bytes) in cells {
        packed.extend_from_slice(&name.to_le_bytes());
        packed.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        packed.extend_from_slice(bytes);
        packed.resize(packed.len().next_multiple_of(8), 0);
    }
    packed
}

/// The cells in such bytes; `None` when they do not fit themselves.
pub(crate) fn unpack_cells(mut packed: &[u8]) -> Option<Vec<(u64, Vec<u8>)>> {
    let mut cells = Vec::new();
    while !packed.is_empty() {
        let (head, rest) = packed.split_at_checked(16)?;
        let name = u64::from_le_bytes(head[..8].try_into().ok()?);
        let bytes = usize::try_from(u64::from_le_bytes(head[8..].try_into().ok()?)).ok()?;
        let (cell, rest) = rest.split_at_checked(bytes.checked_next_multiple_of(8)?)?;
        cells.push((name, cell[..bytes].to_vec()));
        packed = rest;
    }
    Some(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_come_out_as_they_went_in() {
        let cells = vec![(1, vec![1, 2, 3]), (u64::MAX, Vec::new()), (7, vec![9; 24])];
        assert_eq!(unpack_cells(&pack_cells(&cells)), Some(cells));
    }

    #[test]
    fn damaged_cells_are_refused() {
        let packed = pack_cells(&[(1, vec![1; 10])]);
        for length in 1..packed.len() {
            assert_eq!(unpack_cells(&packed[..length]), None, "{length}");
        }
        let mut long = packed;
        long[8..16].fill(0xFF);
        assert_eq!(unpack_cells(&long), None);
    }
}
