//! Counts per random u64 key, in millions of updates per second on one core: the table against a
//! std `HashMap`.
//!
//! `cargo bench -p testudo-state --bench updates [-- <keys>]`. The table lies in real segments;
//! each batch of 256 keys is hashed and prefetched, then updated; two batches are one transaction.

use std::collections::HashMap;
use std::hint::black_box;
use std::rc::Rc;
use std::time::Instant;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::record::{Record, Scratch};
use testudo_shm::segment::Segment;
use testudo_shm::txn::Txn;
use testudo_state::group::STAGGER;
use testudo_state::{Gauge, Groups, KeyHash, Slices, Table};

const BATCH: usize = 256;
const GROUPS: u32 = 128;
const GROUP_BYTES: usize = 1 << 30;
const STRIDE: usize = GROUP_BYTES + STAGGER;
const LOG_BYTES: usize = 1 << 20;
const UPDATES: usize = 64 << 20;

struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Segments and transaction of one operator; the fields keep the memory mapped.
struct World {
    _segments: Vec<Segment>,
    _arena: Arena,
    txn: Txn,
    groups: Groups,
}

fn world() -> Result<World, Box<dyn std::error::Error>> {
    let arena = Arena::reserve(LOG_BYTES + GROUPS as usize * STRIDE)?;
    let log = Segment::create("log", LOG_BYTES)?;
    arena.map(log.fd(), 0, LOG_BYTES, 0, Access::Owner)?;
    // SAFETY: the log was just mapped, and lives as long as the arena in the result.
    let mut txn =
        unsafe { Txn::attach(arena.base(), arena.len(), arena.base(), LOG_BYTES, LOG_BYTES / 2) };
    let groups = Groups::new("bench", GROUPS, 0, Rc::new(Gauge::default()));
    let mut segments = vec![log];
    for group in 0..GROUPS {
        let segment = Segment::create("group", GROUP_BYTES)?;
        let at = LOG_BYTES + group as usize * STRIDE;
        arena.map(segment.fd(), 0, GROUP_BYTES, at, Access::Owner)?;
        // SAFETY: just mapped by this process alone, inside the arena.
        unsafe { groups.attach(&mut txn, group, arena.at(at), GROUP_BYTES)? };
        segments.push(segment);
    }
    txn.commit();
    Ok(World { _segments: segments, _arena: arena, txn, groups })
}

fn report(what: &str, updates: usize, start: Instant) {
    let rate = updates as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("{what:<44} {rate:8.1} M updates/s");
}

fn run_table(world: &mut World, table: &mut Table<u64, u64>, keys: u64, updates: usize) -> u64 {
    let mut random = Xorshift(0x1234_5678_9ABC_DEF1);
    let mut scratch = Scratch::default();
    let (mut batch, mut hashes) = ([0u64; BATCH], [KeyHash(0); BATCH]);
    let mut sum = 0u64;
    for round in 0..updates / BATCH {
        for (key, hash) in batch.iter_mut().zip(&mut hashes) {
            *key = random.next() % keys + 1;
            *hash = KeyHash::of(key.item(&mut scratch));
            table.prefetch(*hash);
        }
        for (key, hash) in batch.iter().zip(&hashes) {
            let key = key.item(&mut scratch);
            let count = table.update(&mut world.txn, *hash, key, || 0, |count| *count += 1);
            sum = sum.wrapping_add(*count.expect("memory for a million keys"));
        }
        if round % 2 == 1 {
            world.txn.commit();
            world.groups.begin_step(&world.txn);
        }
    }
    world.txn.commit();
    sum
}

fn run_slices(world: &mut World, slices: &mut Slices<u64, u64>, keys: u64, updates: usize) {
    let mut random = Xorshift(0x1234_5678_9ABC_DEF1);
    let mut scratch = Scratch::default();
    let (mut batch, mut hashes) = ([0u64; BATCH], [KeyHash(0); BATCH]);
    for round in 0..updates / BATCH {
        for (key, hash) in batch.iter_mut().zip(&mut hashes) {
            *key = random.next() % keys + 1;
            *hash = KeyHash::of(key.item(&mut scratch));
            slices.prefetch(7, *hash);
        }
        for (key, hash) in batch.iter().zip(&hashes) {
            let key = key.item(&mut scratch);
            let done = slices.update(&mut world.txn, 7, *hash, key, || 0, |count| *count += 1);
            done.expect("memory for a million keys");
        }
        if round % 2 == 1 {
            world.txn.commit();
            world.groups.begin_step(&world.txn);
        }
    }
    world.txn.commit();
}

fn run_map(map: &mut HashMap<u64, u64>, keys: u64, updates: usize) {
    let mut random = Xorshift(0x1234_5678_9ABC_DEF1);
    for _ in 0..updates {
        *map.entry(random.next() % keys + 1).or_insert(0) += 1;
    }
}

fn run_generator(keys: u64, updates: usize) {
    let mut random = Xorshift(0x1234_5678_9ABC_DEF1);
    for _ in 0..updates {
        black_box(random.next() % keys + 1);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let keys = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(1 << 20);
    println!("{keys} keys, batches of {BATCH}, one commit per {} updates", BATCH * 2);
    let start = Instant::now();
    run_generator(keys, UPDATES);
    report("key generator alone", UPDATES, start);

    let mut world = world()?;
    let mut table = world.groups.table::<u64, u64>(&mut world.txn, "count")?;
    let first = keys as usize * 4;
    let start = Instant::now();
    run_table(&mut world, &mut table, keys, first);
    report("table, growing from empty", first, start);
    for _ in 0..3 {
        let start = Instant::now();
        black_box(run_table(&mut world, &mut table, keys, UPDATES));
        report("table, built", UPDATES, start);
    }

    let mut slices = world.groups.slices::<u64, u64>(&mut world.txn, "windows")?;
    run_slices(&mut world, &mut slices, keys, first);
    let start = Instant::now();
    run_slices(&mut world, &mut slices, keys, UPDATES);
    report("slice, built", UPDATES, start);

    let mut map = HashMap::new();
    let start = Instant::now();
    run_map(&mut map, keys, first);
    report("std HashMap, growing from empty", first, start);
    let start = Instant::now();
    run_map(&mut map, keys, UPDATES);
    report("std HashMap, built", UPDATES, start);
    let mut sized = HashMap::with_capacity(keys as usize);
    let start = Instant::now();
    run_map(&mut sized, keys, first);
    report("std HashMap, presized, filling", first, start);
    Ok(())
}
