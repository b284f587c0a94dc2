//! The transaction against a copy of memory that is kept by hand: random writes, commits,
//! rollbacks and deaths, in rollbacks too.
//!
//! Promise: R11 (after a rollback memory is what the last commit left; a rollback that dies is
//! repeated; only a commit commits).

mod common;

use common::{Memory, Random, must};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use testudo_shm::txn::{Plain, Txn};

/// Miri takes a thousand times as long.
const STEPS: usize = if cfg!(miri) { 60 } else { 8_000 };
const SEEDS: u64 = if cfg!(miri) { 1 } else { 4 };

const LOG: usize = 4 << 20;
const STATE: usize = if cfg!(miri) { 220 << 10 } else { 512 << 10 };
const SOFT: usize = 64 << 10;

struct Model {
    memory: Memory,
    txn: Txn,
    random: Random,
    committed: Vec<u8>,
    now: Vec<u8>,
    entries: u64,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut memory = Memory::new(LOG + STATE);
        let mut random = Random::new(seed);
        memory.words()[LOG / 8..].fill_with(|| random.next());
        let txn = attach(&memory);
        let mut this =
            Self { memory, txn, random, committed: Vec::new(), now: Vec::new(), entries: 0 };
        this.committed = this.state().to_vec();
        this.now = this.committed.clone();
        this
    }

    fn state(&self) -> &[u8] {
        // SAFETY: mapped, and nothing writes while the slice lives.
        unsafe { std::slice::from_raw_parts(self.memory.base().add(LOG), STATE) }
    }

    fn set<T: Plain>(&mut self, new: T) {
        let room = (STATE - size_of::<T>()) / align_of::<T>();
        let offset = self.random.below(room) * align_of::<T>();
        let place = self.txn.place::<T>((LOG + offset) as u64);
        self.txn.set(place, new);
        let bytes = testudo_shm::zerocopy::IntoBytes::as_bytes(&new);
        self.now[offset..offset + bytes.len()].copy_from_slice(bytes);
        assert!(self.now[offset..].starts_with(&self.state()[offset..offset + bytes.len()]));
        self.entries += 1;
    }

    /// Logs a range of up to 200 KiB, so of several entries, and changes some of it in place.
    fn change_in_place(&mut self) {
        let bytes = self.random.size(200 << 10);
        let offset = self.random.below(STATE - bytes);
        let at = self.memory.base().wrapping_add(LOG + offset);
        let part = 1 + self.random.below(bytes);
        let mut new = vec![0; part];
        self.random.fill(&mut new);
        // SAFETY: the range lies in the state, which is mapped and ours.
        unsafe {
            self.txn.log(at, bytes);
            std::ptr::copy_nonoverlapping(new.as_ptr(), at, part);
        }
        self.now[offset..offset + part].copy_from_slice(&new);
        self.entries += bytes.div_ceil(0xFF00) as u64;
    }

    fn commit(&mut self) {
        self.txn.commit();
        assert_eq!(self.txn.logged(), 0);
        self.committed.copy_from_slice(&self.now);
        self.entries = 0;
    }

    fn roll_back(&mut self) {
        assert_eq!(self.txn.roll_back(), Ok(self.entries));
        self.is_as_committed();
    }

    fn is_as_committed(&mut self) {
        assert!(self.state() == self.committed, "memory is not what the last commit left");
        assert_eq!(self.txn.logged(), 0);
        self.now.copy_from_slice(&self.committed);
        self.entries = 0;
    }

    /// The process dies; its successor dies in its rollback a few times before one gets through.
    fn die(&mut self) {
        while self.random.below(3) > 0 {
            self.txn = attach(&self.memory);
            let mut left = self.random.below(self.entries as usize + 2);
            let stopped = catch_unwind(AssertUnwindSafe(|| {
                self.txn.roll_back_with(
                    |_, _| true,
                    || {
                        if left == 0 {
                            resume_unwind(Box::new(()));
                        }
                        left -= 1;
                    },
                )
            }));
            if stopped.is_ok() {
                self.entries = 0;
            }
        }
        self.txn = attach(&self.memory);
        self.roll_back();
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..20 => self.set(7u8),
            20..30 => self.set(0xABCDu16),
            30..60 => {
                let word = self.random.next();
                self.set(word);
            }
            60..70 => self.set([1u8; 13]),
            70..80 => self.set([2u64; 9]),
            80..84 => self.change_in_place(),
            84..92 => self.commit(),
            92..96 => self.roll_back(),
            _ => self.die(),
        }
        if self.txn.logged() > LOG as u64 / 2 {
            self.commit();
        }
    }
}

fn attach(memory: &Memory) -> Txn {
    let base = memory.base();
    // SAFETY: the log is the first part of the mapping, which lives as long as the test.
    unsafe { Txn::attach(base, LOG + STATE, base, LOG, SOFT) }
}

#[test]
fn r11_memory_after_a_rollback_is_what_the_last_commit_left() {
    common::limit_seconds(120);
    for seed in 0..SEEDS {
        let mut model = Model::new(seed);
        for _ in 0..STEPS {
            model.step();
        }
        model.die();
    }
}

#[test]
fn r11_a_rollback_that_dies_after_any_entry_is_repeated() {
    let mut memory = Memory::new(LOG + STATE);
    memory.words()[LOG / 8..].fill(5);
    let mut txn = attach(&memory);
    for index in 0..40 {
        // Each place several times: the oldest value must win.
        txn.set(txn.place::<u64>(LOG as u64 + index % 7 * 8), index);
    }
    let at = memory.base().wrapping_add(LOG);
    // SAFETY: inside the state.
    unsafe {
        txn.log(at, 150 << 10);
        at.write_bytes(9, 150 << 10);
    }
    for stop in (0..=43).step_by(if cfg!(miri) { 14 } else { 1 }) {
        let mut left = stop;
        let stopped = catch_unwind(AssertUnwindSafe(|| {
            attach(&memory).roll_back_with(
                |_, _| true,
                || {
                    left -= 1;
                    if left <= 0 {
                        resume_unwind(Box::new(()));
                    }
                },
            )
        }));
        assert!(stopped.is_err(), "stopped at {stop}");
        assert_ne!(memory.words()[0], 0, "a rollback that did not end emptied the log");
    }
    assert_eq!(attach(&memory).roll_back(), Ok(40 + 3));
    assert!(memory.words()[LOG / 8..].iter().all(|word| *word == 5));
    assert_eq!(attach(&memory).roll_back(), Ok(0));
}

#[test]
fn r11_dropping_a_transaction_commits_nothing() {
    let mut memory = Memory::new(LOG + STATE);
    {
        let mut txn = attach(&memory);
        txn.set(txn.place::<u64>(LOG as u64), 1);
    }
    assert_eq!(memory.words()[LOG / 8], 1);
    assert_eq!(must(attach(&memory).roll_back()), 1);
    assert_eq!(memory.words()[LOG / 8], 0);
}

#[test]
fn r11_fresh_memory_is_not_brought_back() {
    let mut memory = Memory::new(LOG + STATE);
    let mut txn = attach(&memory);
    let at = memory.base().wrapping_add(LOG);
    // SAFETY: inside the state.
    unsafe {
        txn.fresh(at, 8);
        at.write(3);
    }
    assert_eq!(txn.roll_back(), Ok(0));
    assert_eq!(memory.words()[LOG / 8], 3);
}

#[test]
fn a_step_is_told_to_end_when_three_quarters_of_its_log_are_used() {
    let memory = Memory::new(LOG + STATE);
    let mut txn = attach(&memory);
    let place = txn.place::<u64>(LOG as u64);
    let mut writes = 0;
    while !txn.is_nearly_full() {
        txn.set(place, writes);
        writes += 1;
    }
    assert_eq!(writes, (SOFT as u64 * 3 / 4) / 16 + 1);
    assert_eq!(txn.logged(), writes * 16);
    txn.commit();
    assert!(!txn.is_nearly_full());
}

#[test]
fn each_transaction_has_a_number_of_its_own() {
    let memory = Memory::new(LOG + STATE);
    let mut txn = attach(&memory);
    let first = txn.serial();
    txn.set(txn.place::<u64>(LOG as u64), 1);
    assert_eq!(txn.serial(), first);
    txn.commit();
    let second = txn.serial();
    must(txn.roll_back());
    assert!(first < second && second < txn.serial());
}

#[test]
#[should_panic(expected = "outside the arena")]
fn a_place_outside_the_arena_is_refused() {
    let memory = Memory::new(LOG + STATE);
    let _ = attach(&memory).place::<u64>((LOG + STATE - 7) as u64);
}
