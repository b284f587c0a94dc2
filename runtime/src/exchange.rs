//! The exchange: records from every subtask of one stage to the subtasks of the next.
//!
//! Between two workers there is a ring; to the consumer in the same worker a batch is handed over
//! directly, in the same step and the same transaction, from a buffer that stays in the first-level
//! cache. (A ring from a worker to itself would only move the bytes through memory, and would make
//! every cut larger.)
//!
//! `route` decides which lane, `outlet` writes the lanes, `inlet` takes rings and hand-overs on the
//! other side; `account` counts both, `absent` knows which producers hold nobody up.

pub(crate) mod route;

pub(crate) mod outlet;

pub(crate) mod inlet;

pub(crate) mod account;

pub(crate) mod absent;
