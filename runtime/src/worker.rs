//! A worker: one process, one pinned thread, one loop. It attaches to the job's segments (the first
//! time and after every crash alike), then takes steps until all its stages are done.
//!
//! `entry` is where the process begins, `attach` maps and recovers, `context` is what a step works
//! on, `step` is the loop, `idle` is how it waits;
//! `cut` is its part of a checkpoint, which `save` writes; `restore` and `load` are the way back.

pub(crate) mod entry;

pub(crate) mod attach;

pub(crate) mod context;

pub(crate) mod step;

pub(crate) mod idle;

pub(crate) mod restore;

pub(crate) mod load;

pub(crate) mod resume;

pub(crate) mod reshape;

pub(crate) mod cut;

pub(crate) mod save;

use crate::operator::Stage;
use std::cell::RefCell;
use std::rc::Rc;
use testudo_shm::fault::Fault;
use testudo_shm::record::{Batch, Record};

/// A stage as the loop holds it.
pub type StageRef = Rc<RefCell<dyn Stage>>;

/// A batch from another worker of this job, taken without validating its archived records: the job
/// asked for it.
#[expect(unsafe_code, reason = "the one switch that trusts other workers' memory")]
pub(crate) fn trusted_batch<T: Record>(bytes: &[u8], count: usize) -> Result<Batch<'_, T>, Fault> {
    // SAFETY: the job's owner promised with --trust-records that its workers write whole records;
    // segments are single-writer, and every one of them is encoded by this program.
    unsafe { Batch::unvalidated(bytes, count, 0) }
}
