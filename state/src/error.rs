//! What can go wrong with keyed state. Every message names the operator, the offending value and
//! what to do.
//!
//! Invariants: an error leaves the state consistent; what the step changed before it is undone by
//! rolling back. Called by every module of this crate; the worker turns these into its last words.

use std::fmt;

/// An operation on keyed state that could not be done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StateError {
    /// Growing would take memory that the machine or the control group does not have (rule R12).
    OutOfMemory {
        /// The operator whose state wanted to grow.
        operator: Box<str>,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes free before the reserve is taken off.
        free: u64,
        /// Bytes kept free for everything that is not state.
        reserve: u64,
        /// Bytes that the limit allows in all.
        limit: u64,
        /// The file that gave the limit.
        limited_by: Box<str>,
    },
    /// A key group has used all the addresses reserved for its segment.
    SegmentFull {
        /// The operator.
        operator: Box<str>,
        /// The key group.
        group: u32,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes that the segment has.
        len: u64,
    },
    /// A key belongs to a group that this worker does not hold.
    NotOwned {
        /// The operator.
        operator: Box<str>,
        /// The key group.
        group: u32,
    },
    /// A segment is neither empty nor a key group.
    Magic {
        /// The operator.
        operator: Box<str>,
        /// The key group that it was to be.
        group: u32,
        /// The first word found.
        found: u64,
    },
    /// A segment was written by another layout version.
    Version {
        /// The operator.
        operator: Box<str>,
        /// The key group.
        group: u32,
        /// The version found.
        found: u32,
        /// The version that this program writes.
        expected: u32,
    },
    /// A segment holds another key group, or a group of another split.
    WrongGroup {
        /// The operator.
        operator: Box<str>,
        /// The key group expected.
        group: u32,
        /// Number of groups expected.
        groups: u32,
        /// The key group found.
        found_group: u32,
        /// Number of groups found.
        found_groups: u32,
    },
    /// What is in a segment cannot be what was written there.
    Unsound {
        /// The operator.
        operator: Box<str>,
        /// The key group.
        group: u32,
        /// What cannot be.
        what: Box<str>,
    },
    /// The operator's key or state types are not those that the segment was written with.
    Schema {
        /// The operator.
        operator: Box<str>,
        /// The key group.
        group: u32,
        /// The schema hash found.
        found: u64,
        /// The schema hash of this program.
        expected: u64,
    },
    /// A named state exists with other types, or as another kind of state.
    StateSchema {
        /// The operator.
        operator: Box<str>,
        /// Name of the state.
        state: Box<str>,
        /// The key group.
        group: u32,
        /// The schema hash found.
        found: u64,
        /// The schema hash of this program.
        expected: u64,
    },
    /// The directory of named states is full.
    TooManyStates {
        /// The operator.
        operator: Box<str>,
        /// Name of the state that found no room.
        state: Box<str>,
        /// How many named states an operator may have.
        limit: u32,
    },
    /// The same named state was opened twice at a time.
    AlreadyOpen {
        /// The operator.
        operator: Box<str>,
        /// Name of the state.
        state: Box<str>,
    },
    /// A key or value is longer than state can hold.
    TooLong {
        /// The operator.
        operator: Box<str>,
        /// Its bytes.
        bytes: u64,
        /// The longest that is allowed.
        limit: u64,
    },
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory { operator, wanted, free, reserve, limit, limited_by } => write!(
                f,
                "operator {operator}: its state wants {wanted} bytes more, but of {limit} bytes \
                 ({limited_by}) only {free} are free and {reserve} of these are kept in reserve; \
                 raise the memory limit, run with fewer keys or let state expire"
            ),
            Self::SegmentFull { operator, group, wanted, len } => write!(
                f,
                "operator {operator}: key group {group} wants {wanted} bytes more, but its segment \
                 ends at {len}; raise the segment size or use more key groups"
            ),
            Self::Unsound { operator, group, what } => {
                write!(
                    f,
                    "state of operator {operator} in key group {group} does not verify: {what}"
                )
            }
            Self::NotOwned { operator, group } => write!(
                f,
                "operator {operator}: a key of group {group} arrived, which this worker does not \
                 hold; records must be routed by key hash before they reach keyed state"
            ),
            Self::Magic { operator, group, found } => write!(
                f,
                "operator {operator}: the segment of key group {group} begins with {found:#018x}, \
                 so it holds no key group; restore it from a checkpoint"
            ),
            Self::Version { operator, group, found, expected } => write!(
                f,
                "operator {operator}: key group {group} has layout version {found}, this program \
                 writes {expected}; take a savepoint with the old program and start from it"
            ),
            Self::WrongGroup { operator, group, groups, found_group, found_groups } => write!(
                f,
                "operator {operator}: expected key group {group} of {groups}, found group \
                 {found_group} of {found_groups}; the number of key groups cannot change while \
                 segments live"
            ),
            Self::Schema { operator, group, found, expected } => write!(
                f,
                "operator {operator}: key group {group} was written with schema {found:#018x}, \
                 this program has {expected:#018x}; give a migration or restore the old types"
            ),
            Self::StateSchema { operator, state, group, found, expected } => write!(
                f,
                "operator {operator}: state {state} in key group {group} was written with schema \
                 {found:#018x}, this program has {expected:#018x}; give a migration, or a new \
                 name to the new state"
            ),
            Self::TooManyStates { operator, state, limit } => write!(
                f,
                "operator {operator}: no room for state {state}, an operator has at most {limit} \
                 named states; put several fields into one record"
            ),
            Self::AlreadyOpen { operator, state } => write!(
                f,
                "operator {operator}: state {state} is open already; give each state its own name"
            ),
            Self::TooLong { operator, bytes, limit } => write!(
                f,
                "operator {operator}: a key or value of {bytes} bytes is longer than {limit}; \
                 split it over several keys"
            ),
        }
    }
}

impl std::error::Error for StateError {}
