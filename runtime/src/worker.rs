//! A worker: one process, one pinned thread, one loop. It attaches to the job's segments (the first
//! time and after every crash alike), then takes steps until all its stages are done.
//!
//! `entry` is where the process begins (`inspect` where it is only to describe its plan), `attach`
//! maps and recovers, `successor` waits for its turn before it does, `context` is what a step works
//! on, `step` is the loop, `idle` is how it waits, `latency` bounds how long others wait for it;
//! `verify` looks at what a predecessor has left; `standby` is a process that waits to become one,
//! `warm` what it does meanwhile; `times` is what its time was spent on, `outside` how the files
//! and disks are that it needs; `journal` is what it tells its replica (`tape`: of its sources),
//! `replica` the process that `follow`s on a `copy` of its state; `cut` is its part of a
//! checkpoint, which `save` writes; `restore` and `load` are the way back.

pub(crate) mod entry;

pub(crate) mod dying;

pub(crate) mod careful;
pub(crate) mod inspect;

pub(crate) mod attach;

mod verify;

pub(crate) mod warm;

pub(crate) mod tape;

pub(crate) mod journal;

pub(crate) mod copy;

pub(crate) mod follow;

pub(crate) mod replica;

pub(crate) mod standby;

pub(crate) mod successor;

pub(crate) mod context;

pub(crate) mod step;

pub(crate) mod idle;

pub(crate) mod times;

pub(crate) mod outside;

pub(crate) mod latency;

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
