//! The heap's promises: nothing freed is used again before commit (R12), nothing leaks, and growth
//! that the machine has no memory for is refused with the operator's name.

mod common;

use common::{Random, World, times, with_key};
use testudo_state::memory::GaugePaths;
use testudo_state::{Gauge, Groups, StateError, Table};

fn open(world: &mut World) -> (Groups, Table<u64, String>) {
    let groups = world.attach();
    let table = groups.table(&mut world.txn, "table").unwrap();
    (groups, table)
}

fn set(world: &mut World, table: &mut Table<u64, String>, key: u64, value: &str) {
    let value = value.to_owned();
    with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &value).unwrap());
}

fn get(table: &Table<u64, String>, key: u64) -> String {
    with_key(&key, |hash, item| table.get(hash, item).unwrap().as_str().to_owned())
}

/// Where a key's value lies.
fn address(table: &Table<u64, String>, key: u64) -> usize {
    with_key(&key, |hash, item| table.get(hash, item).unwrap().bytes().as_ptr().addr())
}

fn text(letter: char) -> String {
    letter.to_string().repeat(200)
}

#[test]
fn r12_freed_memory_is_not_reused_before_commit() {
    let mut world = World::new(1, 1 << 20);
    let (groups, mut table) = open(&mut world);
    set(&mut world, &mut table, 1, &text('a'));
    world.commit(&groups);
    let old = address(&table, 1);
    with_key(&1, |hash, item| table.remove(&mut world.txn, hash, item).unwrap());
    for key in 2..20 {
        set(&mut world, &mut table, key, &text('b'));
        assert_ne!(address(&table, key), old, "the freeing is not committed yet");
    }
    drop(table);
    let (_, table) = open(&mut world);
    assert_eq!(get(&table, 1), text('a'), "the rolled-back value is whole");
}

#[test]
fn r12_freed_memory_is_reused_in_the_next_step() {
    let mut world = World::new(1, 1 << 20);
    let (groups, mut table) = open(&mut world);
    set(&mut world, &mut table, 1, &text('a'));
    world.commit(&groups);
    let old = address(&table, 1);
    with_key(&1, |hash, item| table.remove(&mut world.txn, hash, item).unwrap());
    groups.begin_step(&world.txn);
    set(&mut world, &mut table, 2, &text('b'));
    assert_ne!(address(&table, 2), old, "a step does not begin in the middle of a transaction");
    world.commit(&groups);
    set(&mut world, &mut table, 3, &text('c'));
    assert_eq!(address(&table, 3), old);
}

#[test]
fn r12_a_block_reused_in_a_rolled_back_step_is_free_again() {
    let mut world = World::new(1, 1 << 20);
    let (groups, mut table) = open(&mut world);
    for key in 1..10 {
        set(&mut world, &mut table, key, &text('a'));
    }
    world.commit(&groups);
    for key in 1..10 {
        with_key(&key, |hash, item| table.remove(&mut world.txn, hash, item).unwrap());
    }
    world.commit(&groups);
    for round in 0..5 {
        for key in 1..10 {
            set(&mut world, &mut table, key, &text('b'));
        }
        let used = groups.used(0);
        drop(table);
        let (again, found) = open(&mut world);
        assert_eq!(again.used(0), used, "round {round} took new memory");
        assert!(found.is_empty());
        table = found;
        again.begin_step(&world.txn);
    }
}

#[test]
#[cfg_attr(miri, ignore = "a hundred thousand cycles")]
fn a_hundred_thousand_inserts_and_removals_leak_nothing() {
    let mut world = World::new(1, 8 << 20);
    let (groups, mut table) = open(&mut world);
    let mut random = Random::new(1);
    let mut settled = 0;
    for cycle in 0..100_000 {
        let length = random.below(500) as usize;
        set(&mut world, &mut table, cycle, &"v".repeat(length));
        if cycle >= 100 {
            with_key(&(cycle - 100), |hash, item| {
                assert!(table.remove(&mut world.txn, hash, item).unwrap());
            });
        }
        if cycle % 7 == 0 {
            world.commit(&groups);
        }
        if cycle == 5_000 {
            settled = groups.used(0);
        }
    }
    assert_eq!(table.len(), 100);
    let used = groups.used(0);
    assert!(used < settled + settled / 2, "{settled} bytes after 5,000 cycles, {used} at the end");
}

/// Files that say how much memory is free.
fn fake(test: &str, limit: u64, used: u64) -> GaugePaths {
    let root = std::env::temp_dir().join(format!("testudo-heap-{test}-{}", std::process::id()));
    std::fs::create_dir_all(root.join("sys/job")).unwrap();
    std::fs::write(root.join("cgroup"), "0::/job\n").unwrap();
    std::fs::write(root.join("sys/job/memory.max"), limit.to_string()).unwrap();
    std::fs::write(root.join("sys/job/memory.current"), used.to_string()).unwrap();
    GaugePaths { own: root.join("cgroup"), mount: root.join("sys"), meminfo: root.join("none") }
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn r12_growth_beyond_the_limit_is_refused_by_name_and_harms_nothing() {
    let mut world = World::new(1, 8 << 20);
    let paths = fake("limit", 4 << 20, 2 << 20);
    let groups = world.attach_with(Gauge::new(paths.clone(), None));
    let mut table = groups.table::<u64, [u64; 8]>(&mut world.txn, "table").unwrap();
    let mut refused = None;
    let mut stored = 0u64;
    while refused.is_none() && stored < 100_000 {
        let value = [stored; 8];
        let done = with_key(&stored, |hash, item| table.set(&mut world.txn, hash, item, &value));
        match done {
            Ok(_) => stored += 1,
            Err(error) => refused = Some(error),
        }
        world.commit(&groups);
    }
    let error = refused.expect("two megabytes do not hold a hundred thousand values");
    assert!(matches!(error, StateError::OutOfMemory { .. }));
    let text = error.to_string();
    assert!(text.contains("operator test") && text.contains("job/memory.max"), "{text}");
    assert!(text.contains("raise the memory limit"), "{text}");
    assert_eq!(table.len(), stored);
    for key in 0..stored {
        with_key(&key, |hash, item| assert_eq!(*table.get(hash, item).unwrap(), [key; 8]));
    }
    std::fs::write(paths.mount.join("job/memory.max"), (1u64 << 30).to_string()).unwrap();
    with_key(&stored, |hash, item| table.set(&mut world.txn, hash, item, &[1; 8]).unwrap());
}

#[test]
fn a_full_segment_says_so() {
    let mut world = World::new(1, 64 << 10);
    let (groups, mut table) = open(&mut world);
    let mut error = None;
    for key in 0..1000 {
        let value = text('x');
        let done = with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &value));
        world.commit(&groups);
        if let Err(found) = done {
            error = Some(found);
            break;
        }
    }
    let error = error.expect("64 KiB do not hold a thousand values").to_string();
    assert!(error.contains("operator test") && error.contains("group 0"), "{error}");
}

#[test]
#[cfg_attr(miri, ignore = "megabytes of memory")]
fn pages_of_big_freed_blocks_are_offered_once_and_only_after_commit() {
    let mut world = World::new(1, 32 << 20);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").unwrap();
    let mut offered = Vec::new();
    for key in 0..times(120_000) {
        with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &key).unwrap());
        groups.punch(&world.txn, |_, _, _| panic!("the freeing is not committed"));
        world.commit(&groups);
        groups.punch(&world.txn, |group, at, len| offered.push((group, at, len)));
    }
    let sizes: Vec<u64> = offered.iter().map(|range| range.2 + 4096).collect();
    assert_eq!(sizes, [1 << 20, 2 << 20]);
}
