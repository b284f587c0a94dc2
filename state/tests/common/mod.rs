//! A worker's memory on the heap: undo log and key groups in one vector, so that tests can crash,
//! copy and attach.
//!
//! Invariant: nothing but the transaction and the structures touches the vector while they live.

#![allow(dead_code, reason = "each test file uses a part")]

use std::rc::Rc;
use testudo_shm::record::{Item, Record, Scratch};
use testudo_shm::txn::Txn;
use testudo_state::{Gauge, Groups, KeyHash};

pub(crate) const LOG_WORDS: usize = 32 * 1024;

/// The memory of one worker and its transaction.
pub(crate) struct World {
    memory: Vec<u64>,
    pub(crate) txn: Txn,
    groups: u32,
    group_bytes: usize,
}

impl World {
    pub(crate) fn new(groups: u32, group_bytes: usize) -> Self {
        let mut memory = vec![0u64; LOG_WORDS + groups as usize * group_bytes / 8];
        let txn = Txn::on_heap(&mut memory, LOG_WORDS);
        Self { memory, txn, groups, group_bytes }
    }

    /// What a new process would find, had this one died now.
    pub(crate) fn image(&self) -> Self {
        // SAFETY: base..base + len is the vector's memory, which no one writes meanwhile.
        let now =
            unsafe { std::slice::from_raw_parts(self.txn.base().cast::<u64>(), self.memory.len()) };
        let mut memory = now.to_vec();
        let txn = Txn::on_heap(&mut memory, LOG_WORDS);
        Self { memory, txn, groups: self.groups, group_bytes: self.group_bytes }
    }

    /// Rolls back and attaches to all groups, as a successor does.
    pub(crate) fn attach(&mut self) -> Groups {
        self.attach_with(Gauge::unlimited())
    }

    pub(crate) fn attach_with(&mut self, gauge: Gauge) -> Groups {
        self.txn.roll_back().expect("the log is sound");
        let groups = Groups::new("test", self.groups, 1, Rc::new(gauge));
        for group in 0..self.groups {
            let at = LOG_WORDS * 8 + group as usize * self.group_bytes;
            // SAFETY: the group's part of the vector, which outlives the test's structures.
            unsafe {
                let base = self.txn.base().add(at);
                groups.attach(&mut self.txn, group, base, self.group_bytes).expect("attach");
            }
        }
        groups
    }

    /// Commits, and begins the next step.
    pub(crate) fn commit(&mut self, groups: &Groups) {
        self.txn.commit();
        groups.begin_step(&self.txn);
    }
}

/// Calls `f` with a key's item and hash.
pub(crate) fn with_key<K: Record, R>(key: &K, f: impl FnOnce(KeyHash, Item<'_, K>) -> R) -> R {
    let mut scratch = Scratch::default();
    let item = key.item(&mut scratch);
    f(KeyHash::of(item), item)
}

/// A small generator: tests name their seeds.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// How often tests repeat: less under Miri.
pub(crate) fn times(count: u64) -> u64 {
    if cfg!(miri) { count.div_ceil(50) } else { count }
}
