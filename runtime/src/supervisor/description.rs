//! What the supervisor tells every worker: settings, the plan's hash, and which inherited
//! descriptor is which segment. It stands as JSON behind the control header, in one of two slots.
//!
//! Invariants: the slot that counts is whole, whenever the supervisor dies; a reader that was
//! overtaken reads again, not for ever (R23).
//!
//! Written by `launch`, and again when a region goes back to a checkpoint; read by `entry` in
//! workers, which trust it no further than its checks.

#![expect(unsafe_code, reason = "reads and writes a shared mapping once, before it is in use")]

use crate::checkpoint::notes::Part;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::layout::DESCRIPTION_BYTES;
use crate::worker::restore::{Checkpoints, Restore};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use testudo_shm::arena::{Access, Arena};
use testudo_shm::header::{self, ControlHeader, LAYOUT_VERSION, MAGIC};
use testudo_shm::primitive::{Ordering, fence};
use testudo_shm::segment::{PAGE, Segment};

/// Descriptors of one worker's segment.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct SegmentFds {
    /// Writable: left open for the owner alone.
    pub(crate) owner: i32,
    /// Read-only: left open for everyone else.
    pub(crate) peer: i32,
}

impl SegmentFds {
    pub(crate) fn of((owner, peer): &(Segment, OwnedFd)) -> Self {
        Self { owner: owner.raw_fd(), peer: peer.as_raw_fd() }
    }
}

/// Descriptors of what a worker of tier 1 and its replica tell each other.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct FollowFds {
    pub(crate) worker: usize,
    /// Written by the worker.
    pub(crate) journal: SegmentFds,
    /// Written by the replica.
    pub(crate) follower: SegmentFds,
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
    /// By worker of tier 1.
    #[serde(default)]
    pub(crate) follows: Vec<FollowFds>,
    /// One eventfd for each process, where the kernel cannot wait on several words.
    pub(crate) events: Option<Vec<i32>>,
    /// The eventfd by which workers tell the supervisor to look.
    pub(crate) notice: i32,
    /// Regions that went back to a checkpoint, or to their beginning, while the job ran.
    pub(crate) rewound: Vec<Rewound>,
}

/// What the workers of a region go on from, since it went back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rewound {
    pub(crate) region: usize,
    pub(crate) workers: Vec<usize>,
    /// `None`: from the beginning.
    pub(crate) restore: Option<Restore>,
    /// The folder that this is in, as the control header's word said it then.
    pub(crate) from: u64,
    /// Their segments are still to be emptied: none of them may be started.
    pub(crate) is_emptying: bool,
}

/// How often a reader that was overtaken by the writer looks again.
const LOOKS: usize = 1000;

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
        let front = PAGE + 2 * DESCRIPTION_BYTES;
        let arena = Arena::reserve(front)?;
        arena.map(control.fd().as_fd(), 0, front, 0, Access::Peer)?;
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
        let text = Self::text(&arena, head).ok_or_else(|| {
            Error::Machine("the job's description changes faster than it can be read".into())
        })?;
        let description = serde_json::from_slice(&text).map_err(|error| {
            Error::Machine(format!("the job's description cannot be read: {error}"))
        })?;
        Ok((description, control))
    }

    /// A copy of the slot that counts. A slot is written again only after the other one counted.
    fn text(arena: &Arena, head: &ControlHeader) -> Option<Vec<u8>> {
        (0..LOOKS).find_map(|_| {
            // SYNC description: pairs with the release store in `write`.
            let version = head.description.load(Ordering::Acquire);
            let slot = (version & 1) as usize;
            let length = head.description_bytes[slot].load(Ordering::Relaxed);
            let mut text = vec![0; (length as usize).min(DESCRIPTION_BYTES)];
            // SAFETY: both slots are mapped. The supervisor may write to this one again meanwhile:
            // then the copy is not used.
            unsafe {
                let from = arena.base().add(PAGE + slot * DESCRIPTION_BYTES);
                std::ptr::copy_nonoverlapping(from, text.as_mut_ptr(), text.len());
            }
            fence(Ordering::Acquire);
            (head.description.load(Ordering::Relaxed) == version).then_some(text)
        })
    }

    /// The checkpoint that the job goes on from.
    pub(crate) fn resumed(&self) -> Option<u64> {
        let restore = self.checkpoints.as_ref().and_then(|all| all.restore.as_ref());
        restore.map(|restore| restore.id)
    }

    /// What a worker is told: where its region went back, that is what it goes on from.
    pub(crate) fn of_worker(mut self, worker: usize) -> Self {
        let own = self.rewound.iter_mut().find(|back| back.workers.contains(&worker));
        if let (Some(own), Some(checkpoints)) = (own, &mut self.checkpoints) {
            (checkpoints.restore, checkpoints.from) = (own.restore.take(), own.from);
        }
        self
    }

    /// Writes the description behind the header at the start of the supervisor's mapping, into the
    /// slot that does not count, which then does.
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
        let version = head.description.load(Ordering::Relaxed) + 1;
        let slot = (version & 1) as usize;
        // SAFETY: two slots behind the header are mapped writable; only the supervisor writes, and
        // no reader counts on this one.
        unsafe {
            let place = arena.at(control_at + PAGE + slot * DESCRIPTION_BYTES);
            std::ptr::copy_nonoverlapping(text.as_ptr(), place, text.len());
        }
        head.description_bytes[slot].store(text.len() as u64, Ordering::Relaxed);
        head.plan.store(self.plan, Ordering::Relaxed);
        head.supervisor.store(self.supervisor, Ordering::Relaxed);
        head.version.store(LAYOUT_VERSION, Ordering::Relaxed);
        // SYNC description: pairs with the acquire load in `text`; the slot is complete.
        head.description.store(version, Ordering::Release);
        head.magic.store(MAGIC, Ordering::Release);
        Ok(())
    }
}
