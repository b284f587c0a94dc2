//! Which lane a record takes: hash by key group, round-robin, forward, broadcast.
//!
//! Pure functions of the record and a little private state; called by the outlet for each record.

use testudo_shm::record::{Item, Record, Scratch};
use testudo_state::key::{KeyHash, group_of};

/// Chooses a lane for each record.
pub trait Route<T: Record> {
    /// True when every record goes to all lanes.
    const BROADCAST: bool = false;

    /// The lane of this record.
    fn lane(&mut self, item: Item<'_, T>) -> usize;

    /// The lane of the next record, where it does not depend on what is in it: an archived record
    /// can then be encoded right where it goes.
    #[inline(always)]
    fn lane_unseen(&mut self) -> Option<usize> {
        None
    }

    /// Goes on as a process would that has just attached: as a replica does that begins here.
    fn begin_anew(&mut self) {}
}

/// By key: the key's hash decides the group, the routing table the lane.
pub struct ByKey<K, F> {
    pub(crate) key: F,
    pub(crate) lane_of_group: Vec<u16>,
    pub(crate) scratch: Scratch,
    pub(crate) of: std::marker::PhantomData<fn() -> K>,
}

impl<T: Record, K: Record, F: Fn(&T::View) -> K> Route<T> for ByKey<K, F> {
    #[inline(always)]
    fn lane(&mut self, item: Item<'_, T>) -> usize {
        let key = (self.key)(item.view);
        let hash = KeyHash::of(key.item(&mut self.scratch));
        let group = group_of(hash, self.lane_of_group.len() as u32);
        usize::from(self.lane_of_group[group as usize])
    }
}

/// The key group's owner among `parallelism` subtasks: contiguous runs of groups.
pub(crate) fn owner_of(group: usize, groups: usize, parallelism: usize) -> usize {
    group * parallelism / groups
}

/// Each in turn.
pub struct RoundRobin {
    pub(crate) lanes: usize,
    pub(crate) next: usize,
}

impl<T: Record> Route<T> for RoundRobin {
    #[inline(always)]
    fn lane(&mut self, _item: Item<'_, T>) -> usize {
        let lane = self.next;
        self.next = if lane + 1 == self.lanes { 0 } else { lane + 1 };
        lane
    }

    #[inline(always)]
    fn lane_unseen(&mut self) -> Option<usize> {
        let lane = self.next;
        self.next = if lane + 1 == self.lanes { 0 } else { lane + 1 };
        Some(lane)
    }

    fn begin_anew(&mut self) {
        self.next = 0;
    }
}

/// Always the same: forward, and gather into one subtask.
pub struct Only;

impl<T: Record> Route<T> for Only {
    #[inline(always)]
    fn lane(&mut self, _item: Item<'_, T>) -> usize {
        0
    }

    #[inline(always)]
    fn lane_unseen(&mut self) -> Option<usize> {
        Some(0)
    }
}

/// All of them.
pub struct Everyone;

impl<T: Record> Route<T> for Everyone {
    const BROADCAST: bool = true;

    #[inline(always)]
    fn lane(&mut self, _item: Item<'_, T>) -> usize {
        0
    }
}
