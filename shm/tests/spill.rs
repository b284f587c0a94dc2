//! The spill: what does not fit into a ring waits in order, survives the process, and is neither
//! overwritten nor given back before its emptying is committed.
//!
//! Promises: R7 (order; full is an error), R12 (reuse and punching only after commit).

mod common;

use common::{Memory, Random, TestRing, must};
use testudo_shm::cell::{Cells, DIRECTORY};
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::producer::Producer;
use testudo_shm::record::{Batch, Record, Scratch};
use testudo_shm::spill::{Spill, SpillFull};
use testudo_shm::txn::{Place, Txn};

const LOG: usize = 64 << 10;
const AREA: usize = 8 << 20;
const CELLS: u64 = DIRECTORY + 1024;
const AREA_AT: usize = (LOG + CELLS as usize).next_multiple_of(4096);
const ALL: usize = AREA_AT + AREA;

struct Worker {
    txn: Txn,
    spill: Spill,
    next: Place<u64>,
    tail: Place<u64>,
}

/// Attaches as every process does: rolls back, then opens what is there.
fn attach(memory: &Memory, area: usize) -> Worker {
    let base = memory.base();
    // SAFETY: log, cells and area are disjoint parts of a mapping that outlives the test's worker.
    unsafe {
        let mut txn = Txn::attach(base, ALL, base, LOG, LOG / 2);
        must(txn.roll_back());
        let cells = must(Cells::open(&mut txn, LOG as u64, CELLS));
        let spill = must(Spill::attach(&mut txn, &cells, "spill", base.add(AREA_AT), area));
        let next = must(cells.cell(&mut txn, "next", 0u64));
        let tail = must(cells.cell(&mut txn, "tail", 0u64));
        txn.commit();
        Worker { txn, spill, next, tail }
    }
}

fn push<T: Record>(worker: &mut Worker, value: &T) -> Result<(), SpillFull> {
    let mut scratch = Scratch::default();
    worker.spill.push(&mut worker.txn, value.item(&mut scratch))
}

fn waiting<T: Record>(worker: &Worker) -> Vec<T> {
    let batch = worker.spill.front::<T>(&worker.txn, usize::MAX);
    batch.iter().map(|item| <T as Record>::to_owned(item.view)).collect()
}

/// A worker that emits numbered records into a small ring, spills what does not fit, and dies.
struct Game<T: Record> {
    memory: Memory,
    ring: TestRing,
    worker: Worker,
    producer: Producer,
    consumer: Consumer,
    random: Random,
    received: u64,
    make: fn(u64) -> T,
    number: fn(&T) -> u64,
    spilled: u64,
    refilled: u64,
    deaths: u64,
}

impl<T: Record> Game<T> {
    fn new(seed: u64, make: fn(u64) -> T, number: fn(&T) -> u64) -> Self {
        let (memory, ring) = (Memory::new(ALL), TestRing::new(4096));
        let worker = attach(&memory, AREA);
        let (producer, consumer) = (ring.producer(0), ring.consumer(0));
        let random = Random::new(seed);
        let (received, spilled, refilled, deaths) = (0, 0, 0, 0);
        Self {
            memory,
            ring,
            worker,
            producer,
            consumer,
            random,
            received,
            make,
            number,
            spilled,
            refilled,
            deaths,
        }
    }

    fn emit(&mut self, was_drained: bool) {
        let number = self.worker.txn.get(self.worker.next);
        let value = (self.make)(number);
        let mut scratch = Scratch::default();
        let item = value.item(&mut scratch);
        let bytes = T::item_len(item);
        let into_ring = self.worker.spill.is_empty(&self.worker.txn);
        if let Some(mut frame) = into_ring.then(|| self.producer.reserve(bytes)).flatten() {
            let used = T::put_item(item, frame.space()).expect("reserved");
            frame.close(used, 1);
        } else {
            self.worker.spill.push(&mut self.worker.txn, item).expect("a large area");
            self.spilled += 1;
            self.refilled += u64::from(was_drained && into_ring);
        }
        self.worker.txn.set(self.worker.next, number + 1);
    }

    fn step(&mut self) {
        let worker = &mut self.worker;
        let backlog = worker.spill.backlog(&worker.txn);
        if backlog > 0 {
            worker.spill.drain_into::<T>(&mut worker.txn, &mut self.producer);
        }
        let was_drained = backlog > 0 && worker.spill.is_empty(&worker.txn);
        if self.random.below(8) == 0 {
            worker.spill.trim(&worker.txn);
        }
        for _ in 0..self.random.size(300) {
            if !self.worker.spill.is_empty(&self.worker.txn) && self.random.below(3) == 0 {
                break;
            }
            self.emit(was_drained);
        }
        let position = self.producer.position();
        self.worker.txn.set(self.worker.tail, position);
        if self.random.below(4) == 0 {
            self.die();
            return;
        }
        self.worker.txn.commit();
        self.producer.publish();
    }

    fn die(&mut self) {
        self.deaths += 1;
        self.worker = attach(&self.memory, AREA);
        let position = self.worker.txn.get(self.worker.tail);
        self.producer = self.ring.producer(position);
    }

    fn receive(&mut self) {
        self.consumer.look();
        let most = self.random.below(30);
        for _ in 0..most {
            let Some(frame) = self.consumer.frame() else { break };
            let Frame::Data { bytes, count } = frame else { panic!("only records were sent") };
            let batch = must(Batch::<T>::check(bytes, count, 0));
            for item in batch {
                let number = (self.number)(&<T as Record>::to_owned(item.view));
                assert_eq!(number, self.received, "lost, repeated or out of order");
                self.received += 1;
            }
            self.consumer.take();
        }
        assert_eq!(self.consumer.fault(), None);
        self.consumer.publish();
    }

    fn play(mut self, steps: usize) {
        for _ in 0..steps {
            match self.random.below(2) {
                0 => self.step(),
                _ => self.receive(),
            }
        }
        let played = (self.received, self.spilled, self.refilled, self.deaths);
        assert!(self.received > 1000 && self.spilled > 500, "{played:?}");
        assert!(self.refilled > 20 && self.deaths > 100, "{played:?}");
    }
}

#[test]
fn r7_records_arrive_in_order_through_ring_and_spill_and_deaths() {
    common::limit_seconds(120);
    Game::<u64>::new(1, |n| n, |n| *n).play(20_000);
    Game::<[u64; 4]>::new(2, |n| [n; 4], |n| n[3]).play(20_000);
    let make = |n: u64| (n, "x".repeat((n % 97) as usize));
    Game::<(u64, String)>::new(3, make, |(n, text)| {
        assert_eq!(text.len() as u64, n % 97);
        *n
    })
    .play(20_000);
}

#[test]
fn r12_a_spill_emptied_and_filled_in_one_step_is_whole_after_its_death() {
    let memory = Memory::new(ALL);
    let mut worker = attach(&memory, AREA);
    for value in 0..100u64 {
        must(push(&mut worker, &value));
    }
    worker.txn.commit();
    for _ in 0..3 {
        let all = worker.spill.backlog(&worker.txn) as usize;
        worker.spill.drained(&mut worker.txn, all);
        assert!(worker.spill.is_empty(&worker.txn));
        for value in 1000..1050u64 {
            must(push(&mut worker, &value));
        }
        assert_eq!(waiting::<u64>(&worker), (1000..1050).collect::<Vec<_>>());
    }
    let mut worker = attach(&memory, AREA);
    assert_eq!(waiting::<u64>(&worker), (0..100).collect::<Vec<_>>(), "committed bytes are gone");
    // Once the emptying is committed, the area is used from its start again.
    worker.spill.drained(&mut worker.txn, 800);
    worker.txn.commit();
    must(push(&mut worker, &7u64));
    let front = worker.spill.front::<u64>(&worker.txn, 1).bytes().as_ptr();
    assert_eq!(front.addr(), memory.base().addr() + AREA_AT);
}

#[test]
fn r12_a_spill_gives_its_pages_back_only_after_the_commit_that_emptied_it() {
    let memory = Memory::new(ALL);
    let mut worker = attach(&memory, AREA);
    let value = "y".repeat(1000);
    while worker.spill.backlog(&worker.txn) < 4 << 20 {
        must(push(&mut worker, &value));
        worker.txn.commit();
    }
    let all = worker.spill.backlog(&worker.txn) as usize;
    let sent = waiting::<String>(&worker);
    worker.spill.drained(&mut worker.txn, all);
    worker.spill.trim(&worker.txn);
    assert!(worker.spill.is_empty(&worker.txn));
    let mut worker = attach(&memory, AREA);
    assert!(waiting::<String>(&worker) == sent, "the pages of an uncommitted step were dropped");
    worker.spill.drained(&mut worker.txn, all);
    worker.txn.commit();
    worker.spill.trim(&worker.txn);
    for at in [0, 1 << 20, (4 << 20) - 8] {
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { memory.base().add(AREA_AT + at).read_volatile() }, 0, "kept {at}");
    }
}

#[test]
fn r7_a_full_spill_is_an_error_and_keeps_what_it_holds() {
    let memory = Memory::new(ALL);
    let mut worker = attach(&memory, 4096);
    let mut pushed = 0u64;
    let full = loop {
        match push(&mut worker, &pushed) {
            Ok(()) => pushed += 1,
            Err(full) => break full,
        }
    };
    assert_eq!((full, pushed), (SpillFull { bytes: 4096 }, 512));
    assert_eq!(waiting::<u64>(&worker), (0..512).collect::<Vec<_>>());
    // Emptied in this step: the old bytes are still needed, so there is no room yet.
    worker.txn.commit();
    worker.spill.drained(&mut worker.txn, 4096);
    assert_eq!(push(&mut worker, &1u64), Err(full));
    assert!(worker.spill.is_empty(&worker.txn), "a refused record left something behind");
    worker.txn.commit();
    must(push(&mut worker, &1u64));
}

#[test]
fn r7_a_part_of_a_spill_is_drained_from_its_front() {
    let memory = Memory::new(ALL);
    let mut worker = attach(&memory, AREA);
    for value in 0..10u32 {
        must(push(&mut worker, &value));
    }
    assert_eq!(worker.spill.front::<u32>(&worker.txn, 3).as_slice(), Some([0, 1, 2].as_slice()));
    assert_eq!(worker.spill.front::<u32>(&worker.txn, 0).len(), 1, "at least one");
    worker.spill.drained(&mut worker.txn, 12);
    assert_eq!(waiting::<u32>(&worker), (3..10).collect::<Vec<_>>());
    assert_eq!(worker.spill.backlog(&worker.txn), 28);
}

#[test]
fn a_forgotten_spill_is_counted_and_comes_back_with_a_rollback() {
    let memory = Memory::new(ALL);
    let mut worker = attach(&memory, AREA);
    let texts: Vec<String> = (0..100).map(|n| "x".repeat(n)).collect();
    texts.iter().for_each(|text| must(push(&mut worker, text)));
    worker.txn.commit();
    assert_eq!(worker.spill.discard::<String>(&mut worker.txn), 100);
    assert!(worker.spill.is_empty(&worker.txn));
    // What is written in the same step must not lie where a rollback would read.
    must(push(&mut worker, &"later".to_owned()));
    let mut worker = attach(&memory, AREA);
    assert_eq!(waiting::<String>(&worker), texts);
    assert_eq!(worker.spill.discard::<String>(&mut worker.txn), 100);
    worker.txn.commit();
    assert!(attach(&memory, AREA).spill.is_empty(&worker.txn));
}

#[test]
fn r12_pages_of_a_spill_that_its_predecessor_emptied_are_given_back() {
    let memory = Memory::new(ALL);
    let mut worker = attach(&memory, AREA);
    let value = "z".repeat(1000);
    while worker.spill.backlog(&worker.txn) < 4 << 20 {
        must(push(&mut worker, &value));
        worker.txn.commit();
    }
    let all = worker.spill.backlog(&worker.txn) as usize;
    worker.spill.drained(&mut worker.txn, all);
    worker.txn.commit();
    // It dies before it gave anything back; so does one that held a little since.
    let mut worker = attach(&memory, AREA);
    must(push(&mut worker, &value));
    worker.txn.commit();
    let mut worker = attach(&memory, AREA);
    worker.spill.trim(&worker.txn);
    assert_eq!(waiting::<String>(&worker), [value], "what waits was dropped");
    let all = worker.spill.backlog(&worker.txn) as usize;
    worker.spill.drained(&mut worker.txn, all);
    worker.txn.commit();
    worker.spill.trim(&worker.txn);
    for at in [0, 1 << 20, (4 << 20) - 8] {
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { memory.base().add(AREA_AT + at).read_volatile() }, 0, "kept {at}");
    }
}
