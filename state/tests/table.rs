//! The table against a `BTreeMap`, with commits, crashes and attaching, for plain and archived keys
//! and values.

mod common;

use common::{Random, World, times, with_key};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::ControlFlow;
use testudo_shm::record::Record;
use testudo_state::{AHEAD, Ahead, Groups, Table};

type Model<K, V> = BTreeMap<K, V>;

fn check<K, V>(table: &Table<K, V>, model: &Model<K, V>, groups: u32)
where
    K: Record + Ord + Clone + Debug,
    V: Record + PartialEq + Clone + Debug,
{
    assert_eq!(table.len(), model.len() as u64);
    for (key, value) in model {
        let found =
            with_key(key, |hash, item| table.get(hash, item).map(|found| V::to_owned(found.view)));
        assert_eq!(found.as_ref(), Some(value), "value of {key:?}");
    }
    let mut scanned = Model::new();
    for group in 0..groups {
        let mut cursor = Some(0);
        while let Some(at) = cursor {
            cursor = table.scan(group, at, 3, |hash, key, value| {
                assert_eq!(hash.group(groups), group);
                let old = scanned.insert(K::to_owned(key.view), V::to_owned(value.view));
                assert!(old.is_none(), "an entry was scanned twice");
                if scanned.len() % 5 == 0 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        }
    }
    assert_eq!(&scanned, model);
}

struct Case<K, V> {
    seed: u64,
    keys: u64,
    steps: u64,
    key: fn(u64) -> K,
    value: fn(u64) -> V,
    /// Check a copy of the memory as a successor would find it, after every operation.
    images: bool,
}

/// Runs random operations, with commits and crashes, against the model.
fn run<K, V>(case: &Case<K, V>)
where
    K: Record + Ord + Clone + Debug,
    V: Record + PartialEq + Clone + Debug,
{
    const GROUPS: u32 = 2;
    let mut random = Random::new(case.seed);
    let mut world = World::new(GROUPS, 1 << 20);
    let open = |world: &mut World| -> (Groups, Table<K, V>) {
        let groups = world.attach();
        let table = groups.table(&mut world.txn, "table").expect("open");
        (groups, table)
    };
    let (mut groups, mut table) = open(&mut world);
    world.commit(&groups);
    let mut committed = Model::new();
    let mut model = Model::new();
    for _ in 0..times(case.steps) {
        for _ in 0..random.below(12) {
            let key = (case.key)(random.below(case.keys));
            operate(&mut random, &mut world, &mut table, &mut model, &key, case.value);
            if case.images {
                let mut image = world.image();
                let (_, found) = open(&mut image);
                check(&found, &committed, GROUPS);
            }
        }
        if random.chance(70) {
            world.commit(&groups);
            committed.clone_from(&model);
        } else {
            drop(table);
            (groups, table) = open(&mut world);
            model.clone_from(&committed);
        }
    }
    check(&table, &model, GROUPS);
}

fn operate<K, V>(
    random: &mut Random,
    world: &mut World,
    table: &mut Table<K, V>,
    model: &mut Model<K, V>,
    key: &K,
    value: fn(u64) -> V,
) where
    K: Record + Ord + Clone + Debug,
    V: Record + PartialEq + Clone + Debug,
{
    let new = value(random.below(1000));
    let txn = &mut world.txn;
    match random.below(8) {
        0 | 1 => with_key(key, |hash, item| {
            let was_new = table.set(txn, hash, item, &new).expect("set");
            assert_eq!(was_new, model.insert(key.clone(), new).is_none());
        }),
        2..=4 => with_key(key, |hash, item| {
            table.prefetch(hash);
            let first = value(7);
            let after = table
                .update(txn, hash, item, || first.clone(), |old| *old = new.clone())
                .expect("update");
            assert_eq!(V::to_owned(after), new);
            model.insert(key.clone(), new.clone());
        }),
        5 | 6 => with_key(key, |hash, item| {
            let was_there = table.remove(txn, hash, item).expect("remove");
            assert_eq!(was_there, model.remove(key).is_some());
            assert!(table.get(hash, item).is_none());
        }),
        _ => with_key(key, |hash, item| {
            let found = table.get(hash, item).map(|found| V::to_owned(found.view));
            assert_eq!(found.as_ref(), model.get(key));
            assert_eq!(table.contains(hash, item), model.contains_key(key));
        }),
    }
}

fn string(n: u64) -> String {
    let long = if n.is_multiple_of(7) { 90 } else { 3 };
    format!("key {n} {}", "x".repeat((n % long) as usize))
}

fn strings(n: u64) -> Vec<String> {
    (0..n % 4).map(string).collect()
}

#[test]
fn plain_keys_and_values_survive_crashes() {
    for (seed, keys) in [(1, 20), (2, 200), (3, 3000)] {
        let case = Case { seed, keys, steps: 1500, key: |n| n, value: |n| n * 3, images: false };
        run(&case);
    }
}

#[test]
fn a_crash_after_any_operation_leaves_the_last_commit() {
    for seed in 10..13 {
        run(&Case { seed, keys: 60, steps: 60, key: |n| n, value: |n| n as u32, images: true });
    }
    run(&Case { seed: 13, keys: 40, steps: 40, key: string, value: string, images: true });
}

#[test]
fn plain_keys_of_other_sizes_survive_crashes() {
    run(&Case {
        seed: 20,
        keys: 200,
        steps: 400,
        key: |n| n as u8,
        value: |n| n as u16,
        images: false,
    });
    run(&Case {
        seed: 21,
        keys: 500,
        steps: 400,
        key: |n| [n / 100, n % 3, n],
        value: |n| [n as u32; 5],
        images: false,
    });
    run(&Case {
        seed: 22,
        keys: 500,
        steps: 400,
        key: |n| [n as u8, (n >> 8) as u8, 0],
        value: |n| n as u8,
        images: false,
    });
}

#[test]
fn archived_keys_and_values_survive_crashes() {
    run(&Case { seed: 30, keys: 30, steps: 500, key: string, value: |n| n, images: false });
    run(&Case { seed: 31, keys: 800, steps: 800, key: string, value: string, images: false });
    run(&Case { seed: 32, keys: 300, steps: 800, key: |n| n, value: strings, images: false });
}

#[test]
fn a_removed_key_is_gone_and_its_neighbours_stay() {
    let mut world = World::new(1, 1 << 20);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").unwrap();
    for key in 0..times(2000) {
        with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &key).unwrap());
        world.commit(&groups);
    }
    for key in (0..times(2000)).step_by(2) {
        with_key(&key, |hash, item| table.remove(&mut world.txn, hash, item).unwrap());
    }
    for key in 0..times(2000) {
        let found = with_key(&key, |hash, item| table.get(hash, item).map(|value| *value.view));
        assert_eq!(found, (key % 2 == 1).then_some(key));
    }
}

#[test]
fn rolling_back_can_itself_be_interrupted_anywhere() {
    let mut world = World::new(1, 128 << 10);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").unwrap();
    let mut model = Model::new();
    for key in 0..9 {
        with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &key).unwrap());
        model.insert(key, key);
    }
    world.commit(&groups);
    for key in 5..14 {
        with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &77).unwrap());
        with_key(&(key - 5), |hash, item| table.remove(&mut world.txn, hash, item).unwrap());
    }
    let entries = world.image().txn.roll_back().unwrap();
    assert!(entries > 20);
    for stop in 0..entries {
        let mut dying = world.image();
        let mut done = 0;
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            dying.txn.roll_back_with(
                |_, _| true,
                || {
                    assert!(done < stop, "killed");
                    done += 1;
                },
            )
        }));
        assert!(killed.is_err());
        let mut next = dying.image();
        let groups = next.attach();
        let found = groups.table(&mut next.txn, "table").unwrap();
        check(&found, &model, 1);
    }
}

#[test]
fn a_key_of_a_group_not_held_is_refused_by_name() {
    let mut world = World::new(2, 128 << 10);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").unwrap();
    groups.release(1);
    table.reload(&mut world.txn).unwrap();
    let of =
        |group: u32| (0u64..).find(|key| with_key(key, |hash, _| hash.group(2)) == group).unwrap();
    with_key(&of(0), |hash, item| table.set(&mut world.txn, hash, item, &1).unwrap());
    let error = with_key(&of(1), |hash, item| {
        assert!(table.get(hash, item).is_none());
        table.set(&mut world.txn, hash, item, &1).unwrap_err().to_string()
    });
    assert!(error.contains("operator test") && error.contains("group 1"), "{error}");
}

#[test]
fn a_cleared_table_is_empty_at_once_and_freed_in_pieces() {
    let mut world = World::new(2, 1 << 20);
    let groups = world.attach();
    let mut table = groups.table::<String, String>(&mut world.txn, "table").unwrap();
    let mut used = 0;
    for round in 0..4 {
        for n in 0..300 {
            let key = string(n);
            with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &key).unwrap());
            if n % 20 == 0 {
                world.commit(&groups);
            }
        }
        table.clear(&mut world.txn);
        assert!(table.is_empty());
        let mut calls = 1;
        while !table.sweep(&mut world.txn, 50) {
            world.commit(&groups);
            calls += 1;
        }
        assert!(calls > 3, "the budget bounds each call");
        world.commit(&groups);
        let now = groups.used(0) + groups.used(1);
        assert!(round < 2 || now == used, "round {round}: {now} bytes after {used}");
        used = now;
    }
}

#[test]
fn a_crash_while_formatting_leaves_no_ghosts() {
    let mut world = World::new(1, 128 << 10);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").unwrap();
    for key in 0..16 {
        with_key(&key, |hash, item| table.set(&mut world.txn, hash, item, &5).unwrap());
    }
    drop(table);
    let groups = world.attach();
    let mut table = groups.table(&mut world.txn, "table").unwrap();
    let model = Model::from([(3u64, 8u64)]);
    with_key(&3, |hash, item| table.set(&mut world.txn, hash, item, &8).unwrap());
    check(&table, &model, 1);
}

/// Counts each key of a random stream in the three steps, one chunk behind the other, with other
/// changes of the table, commits and crashes in between.
fn count_in_runs<K: Record + Ord + Copy + Debug>(seed: u64, keys: u64, key: fn(u64) -> K) {
    const GROUPS: u32 = 3;
    assert!(Table::<K, u64>::IN_RUNS);
    let mut random = Random::new(seed);
    let mut world = World::new(GROUPS, 1 << 20);
    let mut groups = world.attach();
    let mut table = groups.table::<K, u64>(&mut world.txn, "table").expect("open");
    world.commit(&groups);
    let (mut committed, mut model) = (Model::new(), Model::new());
    let mut aheads: [Ahead; 3] = Default::default();
    for _ in 0..times(200) {
        let chunks: Vec<Vec<K>> = (0..3)
            .map(|_| (0..random.below(AHEAD as u64)).map(|_| key(random.below(keys))).collect())
            .collect();
        for (chunk, ahead) in chunks.iter().zip(&mut aheads) {
            ahead.restart();
            table.ask(chunk.iter().copied(), ahead);
        }
        for (chunk, ahead) in chunks.iter().zip(&mut aheads) {
            if random.chance(20) {
                let key = key(random.below(keys));
                with_key(&key, |hash, item| table.remove(&mut world.txn, hash, item))
                    .expect("there");
                model.remove(&key);
            }
            table.find_and_log(&mut world.txn, chunk.iter().copied(), ahead);
        }
        for (chunk, ahead) in chunks.iter().zip(&mut aheads) {
            apply(&mut world, &mut table, &mut model, chunk, ahead);
        }
        if random.chance(70) {
            world.commit(&groups);
            committed.clone_from(&model);
        } else {
            drop(table);
            groups = world.attach();
            table = groups.table(&mut world.txn, "table").expect("open");
            model.clone_from(&committed);
        }
        check(&table, &model, GROUPS);
    }
}

/// The third step: adds one to each key, in the order of the chunk.
fn apply<K: Record + Ord + Copy + Debug>(
    world: &mut World,
    table: &mut Table<K, u64>,
    model: &mut Model<K, u64>,
    chunk: &[K],
    ahead: &mut Ahead,
) {
    let mut rest = chunk;
    while !rest.is_empty() {
        let run = table.run(&mut world.txn, rest.iter().copied(), ahead);
        let done = run.for_each(rest.iter(), |count, key| {
            *count += 1;
            let expected = model.entry(*key).or_insert(0);
            *expected += 1;
            assert_eq!(count, expected, "count of {key:?}");
            ControlFlow::Continue(())
        });
        if let Some(key) = rest.get(done) {
            with_key(key, |hash, item| {
                table.update(&mut world.txn, hash, item, || 0, |count| *count += 1).expect("room");
            });
            *model.entry(*key).or_insert(0) += 1;
        }
        ahead.advance(done + 1);
        rest = rest.get(done + 1..).unwrap_or_default();
    }
}

#[test]
fn values_found_ahead_are_their_keys_own_whatever_happens_to_the_table() {
    for (seed, keys) in [(21, 10), (22, 300), (23, 20_000)] {
        count_in_runs(seed, keys, |n| n);
        count_in_runs(seed, keys, |n| n as u32);
        count_in_runs(seed, keys, |n| [n, n / 7]);
    }
}

#[test]
fn what_was_found_ahead_in_another_table_is_not_used() {
    let mut world = World::new(2, 1 << 20);
    let groups = world.attach();
    let mut one = groups.table::<u64, u64>(&mut world.txn, "one").expect("open");
    let mut two = groups.table::<u64, u64>(&mut world.txn, "two").expect("open");
    for (table, value) in [(&mut one, 1), (&mut two, 2)] {
        with_key(&7, |hash, item| table.set(&mut world.txn, hash, item, &value)).expect("room");
    }
    let mut ahead = Ahead::default();
    one.ask([7].into_iter(), &mut ahead);
    one.find_and_log(&mut world.txn, [7].into_iter(), &mut ahead);
    let run = two.run(&mut world.txn, [7].into_iter(), &mut ahead);
    let mut seen = Vec::new();
    run.for_each([7].iter(), |value, _| {
        seen.push(*value);
        ControlFlow::Continue(())
    });
    assert_eq!(seen, [2]);
}

#[test]
fn what_was_found_ahead_before_a_commit_is_logged_again() {
    let mut world = World::new(2, 1 << 20);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").expect("open");
    with_key(&7, |hash, item| table.set(&mut world.txn, hash, item, &1)).expect("room");
    let mut ahead = Ahead::default();
    table.ask([7].into_iter(), &mut ahead);
    table.find_and_log(&mut world.txn, [7].into_iter(), &mut ahead);
    world.commit(&groups);
    let run = table.run(&mut world.txn, [7].into_iter(), &mut ahead);
    let done = run.for_each([7].iter(), |value, _| {
        *value = 2;
        ControlFlow::Continue(())
    });
    assert_eq!(done, 1);
    let groups = world.attach();
    let table = groups.table::<u64, u64>(&mut world.txn, "table").expect("open");
    let found = with_key(&7, |hash, item| table.get(hash, item).map(|found| *found.view));
    assert_eq!(found, Some(1));
}

/// Takes three chunks of keys through the three steps, and gives what was logged.
fn counted(world: &mut World, table: &mut Table<u64, u64>, chunks: &[Vec<u64>]) -> u64 {
    let mut aheads: [Ahead; 3] = Default::default();
    world.txn.begin_stages();
    for (chunk, ahead) in chunks.iter().zip(&mut aheads) {
        ahead.restart();
        table.ask(chunk.iter().copied(), ahead);
    }
    for (chunk, ahead) in chunks.iter().zip(&mut aheads) {
        table.find_and_log(&mut world.txn, chunk.iter().copied(), ahead);
    }
    let mut model = Model::new();
    for (chunk, ahead) in chunks.iter().zip(&mut aheads) {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let run = table.run(&mut world.txn, rest.iter().copied(), ahead);
            let done = run.for_each(rest.iter(), |count, key| {
                *count += 1;
                model.insert(*key, *count);
                ControlFlow::Continue(())
            });
            if let Some(key) = rest.get(done) {
                with_key(key, |hash, item| {
                    let count = table.update(&mut world.txn, hash, item, || 0, |count| *count += 1);
                    model.insert(*key, *count.expect("room"));
                });
            }
            ahead.advance(done + 1);
            rest = rest.get(done + 1..).unwrap_or_default();
        }
    }
    let all = model.values().fold(0, |sum: u64, count| sum.wrapping_mul(31).wrapping_add(*count));
    world.txn.digest(usize::MAX) ^ all
}

#[test]
fn r21_what_is_logged_does_not_depend_on_how_long_a_process_has_been_at_it() {
    const GROUPS: u32 = 64;
    let mut random = Random::new(31);
    let mut world = World::new(GROUPS, 1 << 16);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").expect("open");
    world.commit(&groups);
    for round in 0..times(300) {
        let chunk = |random: &mut Random| {
            (0..AHEAD).map(|_| random.below(300 + round * 50)).collect::<Vec<_>>()
        };
        let chunks: Vec<_> = (0..3).map(|_| chunk(&mut random)).collect();
        // One that has just attached to an equal segment: it has read no header yet.
        let mut image = world.image();
        let its_groups = image.attach();
        let mut its_table = its_groups.table::<u64, u64>(&mut image.txn, "table").expect("open");
        image.commit(&its_groups);
        let logged = counted(&mut world, &mut table, &chunks);
        assert_eq!(logged, counted(&mut image, &mut its_table, &chunks), "round {round}");
        assert!(world.txn.logged() > 0, "round {round}: nothing was logged");
        world.commit(&groups);
    }
}

#[test]
fn r21_the_same_holds_for_keys_that_are_looked_up_one_by_one() {
    const GROUPS: u32 = 32;
    let mut random = Random::new(32);
    let mut world = World::new(GROUPS, 1 << 18);
    let groups = world.attach();
    let mut table = groups.table::<String, u64>(&mut world.txn, "table").expect("open");
    world.commit(&groups);
    for round in 0..times(200) {
        let keys: Vec<u64> = (0..60).map(|_| random.below(100 + round * 40)).collect();
        let count = |world: &mut World, table: &mut Table<String, u64>| {
            world.txn.begin_stages();
            for key in &keys {
                with_key(&string(*key), |hash, item| {
                    let done = table.update(&mut world.txn, hash, item, || 0, |count| *count += 1);
                    done.map(|_| ()).expect("room");
                });
            }
            world.txn.digest(usize::MAX)
        };
        let mut image = world.image();
        let its_groups = image.attach();
        let mut its_table = its_groups.table::<String, u64>(&mut image.txn, "table").expect("open");
        image.commit(&its_groups);
        let logged = count(&mut world, &mut table);
        assert_eq!(logged, count(&mut image, &mut its_table), "round {round}");
        world.commit(&groups);
    }
}
