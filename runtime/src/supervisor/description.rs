//! What the supervisor tells every worker: settings, the plan's hash, and which inherited
//! descriptor is which segment. It stands as JSON behind the control header.
//!
//! Written by `launch`, read by `entry` in workers, which trust it no further than its checks.

#![expect(unsafe_code, reason = "reads and writes a shared mapping once, before it is in use")]

use crate::checkpoint::notes::Part;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::layout::DESCRIPTION_BYTES;
use crate::worker::restore::Checkpoints;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use testudo_shm::arena::{Access, Arena};
use testudo_shm::header::{self, ControlHeader, LAYOUT_VERSION, MAGIC};
use testudo_shm::primitive::Ordering;
use testudo_shm::segment::{PAGE, Segment};

/// Descriptors of one worker's segment.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct SegmentFds {
    /// Writable: left open for the owner alone.
    pub(crate) owner: i32,
    /// Read-only: left open for everyone else.
    pub(crate) peer: i32,
}

/// The description.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) settings: Settings,
    /// The job's own parameters, for jobs that were not started through the command line.
    pub(crate) parameters: String,
    /// What the sources' surveys found.
    pub(crate) surveys: Vec<String>,
    pub(crate) plan: u64,
    pub(crate) checkpoints: Option<Checkpoints>,
    pub(crate) supervisor: u32,
    pub(crate) segments: Vec<SegmentFds>,
    /// For each operator with state, the descriptor of each of its groups.
    pub(crate) groups: Vec<Vec<i32>>,
    /// One eventfd for each process, where the kernel cannot wait on several words.
    pub(crate) events: Option<Vec<i32>>,
    /// The eventfd by which workers tell the supervisor to look.
    pub(crate) notice: i32,
}

impl Description {
    /// The parts of sources by source and subtask, where the job goes on from a checkpoint.
    pub(crate) fn dealt(&self) -> Vec<(String, Vec<Vec<Part>>)> {
        let restore =
            self.checkpoints.as_ref().and_then(|checkpoints| checkpoints.restore.as_ref());
        restore.map(|restore| restore.parts.clone()).unwrap_or_default()
    }

    /// Reads the description out of the control segment.
    pub(crate) fn read(control: OwnedFd, bytes: usize) -> Result<(Self, Segment), Error> {
        let control = Segment::adopt(control, bytes)?;
        let arena = Arena::reserve(PAGE + DESCRIPTION_BYTES)?;
        arena.map(control.fd().as_fd(), 0, PAGE + DESCRIPTION_BYTES, 0, Access::Peer)?;
        // SAFETY: the page is mapped; the header does not outlive this function, and neither does
        // the arena.
        let head = unsafe { header::at::<ControlHeader>(arena.base()) };
        let (magic, version) =
            (head.magic.load(Ordering::Acquire), head.version.load(Ordering::Relaxed));
        if magic != MAGIC || version != LAYOUT_VERSION {
            return Err(Error::Machine(format!(
                "the control segment has layout {version}, this program {LAYOUT_VERSION}"
            )));
        }
        let length =
            (head.description_bytes.load(Ordering::Relaxed) as usize).min(DESCRIPTION_BYTES);
        // SAFETY: the description pages are mapped, and complete since before this process was
        // spawned.
        let text = unsafe { std::slice::from_raw_parts(arena.base().add(PAGE), length) };
        let description = serde_json::from_slice(text).map_err(|error| {
            Error::Machine(format!("the job's description cannot be read: {error}"))
        })?;
        Ok((description, control))
    }

    /// Writes the description behind the header at the start of the supervisor's mapping.
    pub(crate) fn write(
        &self,
        arena: &Arena,
        control_at: usize,
        head: &ControlHeader,
    ) -> Result<(), Error> {
        let text = serde_json::to_vec(self).map_err(|error| Error::Plan(error.to_string()))?;
        if text.len() > DESCRIPTION_BYTES {
            return Err(Error::Plan(format!(
                "the job's description has {} bytes, more than {DESCRIPTION_BYTES}; \
                 use fewer key groups",
                text.len()
            )));
        }
        // SAFETY: DESCRIPTION_BYTES behind the header are mapped writable, and nobody else runs
        // yet.
        unsafe {
            let place = arena.at(control_at + PAGE);
            std::ptr::copy_nonoverlapping(text.as_ptr(), place, text.len());
        }
        head.description_bytes.store(text.len() as u32, Ordering::Relaxed);
        head.plan.store(self.plan, Ordering::Relaxed);
        head.supervisor.store(self.supervisor, Ordering::Relaxed);
        head.version.store(LAYOUT_VERSION, Ordering::Relaxed);
        head.magic.store(MAGIC, Ordering::Release);
        Ok(())
    }
}
