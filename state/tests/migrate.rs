//! Migrations of every structure: what there was is there in its new type, whoever dies before it
//! has settled finds the old one as it was, and what was left behind is freed.

mod common;

use common::{World, times, with_key};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use testudo_shm::record::{Record, Scratch};
use testudo_shm::txn::Txn;
use testudo_state::{Gauge, Groups, Leftover, List, Map, Slices, StateError, Table, Value};

const GROUPS: u32 = 3;
const GROUP_BYTES: usize = 4 << 20;

/// What is kept by key 0, 1, … of the program before, and of the one after it.
type Wide = [u64; 3];

fn widened(old: u64) -> Wide {
    [old, old + 1, 7]
}

fn named(old: u64) -> String {
    format!("{old} {}", "z".repeat((old % 50) as usize))
}

/// Five states of one operator, with values `V` and texts `T`.
struct States<V: Record, T: Record> {
    table: Table<u64, V>,
    value: Value<String, T>,
    list: List<u64, T>,
    map: Map<u64, u64, T>,
    slices: Slices<u64, V>,
}

impl<V: Record, T: Record> States<V, T> {
    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError> {
        Ok(Self {
            table: groups.table(txn, "table")?,
            value: groups.value(txn, "value")?,
            list: groups.list(txn, "list")?,
            map: groups.map(txn, "map")?,
            slices: groups.slices(txn, "slices")?,
        })
    }

    /// Key `n` gets what `v` and `t` make of numbers.
    fn put(&mut self, txn: &mut Txn, n: u64, v: impl Fn(u64) -> V, t: impl Fn(u64) -> T) {
        let mut scratch = Scratch::default();
        with_key(&n, |hash, key| {
            self.table.set(txn, hash, key, &v(n)).expect("room");
            for item in 0..n % 7 {
                self.list.append(txn, hash, key, &t(n + item)).expect("room");
                let user_key = item.item(&mut scratch);
                self.map.put(txn, hash, key, user_key, &t(n * item)).expect("room");
            }
            let slice = (n % 40) as i64 - 3;
            self.slices.slice(slice).set(txn, hash, key, &v(n)).expect("room");
        });
        with_key(&named(n), |hash, key| {
            self.value.set(txn, hash, key, &t(n)).expect("room");
        });
    }

    /// Checks that the first `keys` keys have that, and no other key anything.
    fn check(&self, keys: u64, v: impl Fn(u64) -> V, t: impl Fn(u64) -> T)
    where
        V: PartialEq + std::fmt::Debug,
        T: PartialEq + std::fmt::Debug,
    {
        assert_eq!((self.table.len(), self.value.table().len()), (keys, keys));
        let mut by_slice = BTreeMap::<i64, u64>::new();
        for n in 0..keys {
            with_key(&n, |hash, key| {
                let found = self.table.get(hash, key).map(|value| V::to_owned(value.view));
                assert_eq!(found, Some(v(n)), "table {n}");
                let found: Vec<T> =
                    self.list.iter(hash, key).map(|item| T::to_owned(item.view)).collect();
                let expected: Vec<T> = (0..n % 7).map(|item| t(n + item)).collect();
                assert_eq!(found, expected, "list {n}");
                let entries = self.map.iter(hash, key);
                let found: Vec<(u64, T)> =
                    entries.map(|(key, value)| (*key.view, T::to_owned(value.view))).collect();
                let expected: Vec<(u64, T)> =
                    (0..n % 7).rev().map(|item| (item, t(n * item))).collect();
                assert_eq!(found, expected, "map {n}");
                let slice = (n % 40) as i64 - 3;
                *by_slice.entry(slice).or_default() += 1;
                let found = self.slices.get(slice, hash, key).map(|value| V::to_owned(value.view));
                assert_eq!(found, Some(v(n)), "slices {n}");
            });
            with_key(&named(n), |hash, key| {
                let found = self.value.get(hash, key).map(|value| T::to_owned(value.view));
                assert_eq!(found, Some(t(n)), "value {n}");
            });
        }
        for (slice, keys) in by_slice {
            assert_eq!(self.slices.get_slice(slice).expect("it is open").len(), keys);
        }
    }
}

type Old = States<u64, u64>;
type New = States<Wide, String>;

fn number(n: u64) -> u64 {
    n
}

/// A world in which the old program has filled its states.
fn filled(keys: u64) -> World {
    let mut world = World::new(GROUPS, GROUP_BYTES);
    let groups = world.attach();
    let mut states = Old::open(&groups, &mut world.txn).expect("open");
    world.commit(&groups);
    for n in 0..keys {
        states.put(&mut world.txn, n, number, number);
        world.commit(&groups);
    }
    world
}

/// All five, from the old types to the new ones; `passed` is called with each old value.
fn migrate(groups: &Groups, txn: &mut Txn, passed: &dyn Fn()) -> Result<u64, StateError> {
    let wide = |old: &u64| {
        passed();
        widened(*old)
    };
    let text = |old: &u64| {
        passed();
        named(*old)
    };
    let nothing = &mut || ();
    let table = groups.migrate_table::<u64, u64, Wide>(txn, "table", wide, nothing)?;
    groups.migrate_value::<String, u64, String>(txn, "value", text, nothing)?;
    groups.migrate_list::<u64, u64, String>(txn, "list", text, nothing)?;
    groups.migrate_map::<u64, u64, u64, String>(txn, "map", text, nothing)?;
    groups.migrate_slices::<u64, u64, Wide>(txn, "slices", wide, nothing)?;
    groups.switch_moved(txn);
    Ok(table.values)
}

fn leftovers(groups: &Groups) -> Vec<Leftover> {
    let found = [
        groups.leftover_table::<u64, u64>("table"),
        groups.leftover_value::<String, u64>("value"),
        groups.leftover_list::<u64, u64>("list"),
        groups.leftover_map::<u64, u64, u64>("map"),
        groups.leftover_slices::<u64, u64>("slices"),
    ];
    found.into_iter().flatten().collect()
}

/// And back.
fn migrate_back(groups: &Groups, txn: &mut Txn) -> Result<(), StateError> {
    let narrow = |wide: &Wide| wide[0];
    let parsed = |text: &<String as Record>::View| {
        let text = <String as Record>::to_owned(text);
        text.split(' ').next().and_then(|n| n.parse().ok()).expect("a number")
    };
    let nothing = &mut || ();
    groups.migrate_table::<u64, Wide, u64>(txn, "table", narrow, nothing)?;
    groups.migrate_value::<String, String, u64>(txn, "value", parsed, nothing)?;
    groups.migrate_list::<u64, String, u64>(txn, "list", parsed, nothing)?;
    groups.migrate_map::<u64, u64, String, u64>(txn, "map", parsed, nothing)?;
    groups.migrate_slices::<u64, Wide, u64>(txn, "slices", narrow, nothing)?;
    groups.switch_moved(txn);
    Ok(())
}

fn leftovers_back(groups: &Groups) -> Vec<Leftover> {
    let found = [
        groups.leftover_table::<u64, Wide>("table"),
        groups.leftover_value::<String, String>("value"),
        groups.leftover_list::<u64, String>("list"),
        groups.leftover_map::<u64, u64, String>("map"),
        groups.leftover_slices::<u64, Wide>("slices"),
    ];
    found.into_iter().flatten().collect()
}

fn settle(world: &mut World, groups: &Groups) {
    world.commit(groups);
    groups.settle_moved(&mut world.txn);
    world.commit(groups);
}

fn sweep(world: &mut World, groups: &Groups, leftovers: Vec<Leftover>) -> u64 {
    let mut calls = 0;
    for mut leftover in leftovers {
        while !leftover.sweep(&mut world.txn, 100).expect("held") {
            world.commit(groups);
            calls += 1;
        }
        world.commit(groups);
    }
    calls
}

fn used(groups: &Groups) -> u64 {
    (0..GROUPS).map(|group| groups.used(group)).sum()
}

#[test]
fn every_structure_has_what_it_had_in_its_new_type() {
    let keys = times(1500);
    let mut world = filled(keys);
    let groups = world.attach();
    let logged = world.txn.logged();
    assert_eq!(migrate(&groups, &mut world.txn, &|| ()), Ok(keys));
    assert!(world.txn.logged() - logged < 16 << 10, "the log does not grow with the state");
    let mut states = New::open(&groups, &mut world.txn).expect("open");
    states.check(keys, widened, named);
    settle(&mut world, &groups);
    // As any other state from here on.
    for n in keys..keys + times(300) {
        states.put(&mut world.txn, n, widened, named);
        world.commit(&groups);
    }
    drop(states);
    let groups = world.attach();
    let states = New::open(&groups, &mut world.txn).expect("open");
    states.check(keys + times(300), widened, named);
    groups.verify_all().expect("sound");
    assert!(Old::open(&world.attach(), &mut world.txn).is_err());
}

#[test]
fn what_has_the_new_type_or_is_not_there_is_left_alone() {
    let mut world = filled(10);
    let groups = world.attach();
    migrate(&groups, &mut world.txn, &|| ()).expect("room");
    settle(&mut world, &groups);
    let groups = world.attach();
    let passed = || panic!("nothing is migrated twice");
    assert_eq!(migrate(&groups, &mut world.txn, &passed), Ok(0));
    assert_eq!(world.txn.logged(), 0);
    let mut empty = World::new(GROUPS, GROUP_BYTES);
    let groups = empty.attach();
    assert_eq!(migrate(&groups, &mut empty.txn, &passed), Ok(0));
    New::open(&groups, &mut empty.txn).expect("open").check(0, widened, named);
}

#[test]
fn r11_a_death_anywhere_before_it_has_settled_leaves_the_old_state_as_it_was() {
    let keys = 60;
    let fresh = filled(keys);
    let mut calls = 0;
    let count = std::cell::Cell::new(0u64);
    let mut world = fresh.image();
    let groups = world.attach();
    let before = used(&groups);
    migrate(&groups, &mut world.txn, &|| count.set(count.get() + 1)).expect("room");
    let all = count.get();
    let step = (all / times(60)).max(1);
    // The same memory over and over: what an earlier try has left is in the next one's way.
    let mut world = fresh.image();
    while calls <= all + step {
        count.set(0);
        let groups = world.attach();
        let died = catch_unwind(AssertUnwindSafe(|| {
            let passed = || {
                count.set(count.get() + 1);
                assert!(count.get() <= calls, "a death in the middle");
            };
            migrate(&groups, &mut world.txn, &passed)
        }));
        if let Ok(done) = died {
            done.expect("room");
            New::open(&groups, &mut world.txn).expect("open").check(keys, widened, named);
            if calls % 2 == 0 {
                // It was committed, and no step after it was.
                world.txn.commit();
                assert!(groups.is_unsettled());
            }
        }
        let mut other = world.image();
        let groups = other.attach();
        Old::open(&groups, &mut other.txn).expect("open").check(keys, number, number);
        assert_eq!(used(&groups), before);
        groups.verify_all().expect("sound");
        calls += step;
    }
    let groups = world.attach();
    migrate(&groups, &mut world.txn, &|| ()).expect("room");
    New::open(&groups, &mut world.txn).expect("open").check(keys, widened, named);
    groups.verify_all().expect("sound");
}

#[test]
fn r12_what_is_left_behind_is_freed_piece_by_piece_to_the_last_block() {
    let keys = times(600);
    let mut world = filled(keys);
    let groups = world.attach();
    migrate(&groups, &mut world.txn, &|| ()).expect("room");
    settle(&mut world, &groups);
    let mut left = leftovers(&groups);
    assert_eq!(left.len(), 5);
    // Who sweeps dies in the middle: the next one goes on.
    for leftover in &mut left {
        leftover.sweep(&mut world.txn, 50).expect("held");
    }
    world.commit(&groups);
    let groups = world.attach();
    let left = leftovers(&groups);
    sweep(&mut world, &groups, left);
    assert!(leftovers(&groups).is_empty());
    groups.verify_all().expect("sound");
    New::open(&groups, &mut world.txn).expect("open").check(keys, widened, named);
    // And back, with texts that have blocks of their own.
    let groups = world.attach();
    migrate_back(&groups, &mut world.txn).expect("room");
    settle(&mut world, &groups);
    let left = leftovers_back(&groups);
    assert!(sweep(&mut world, &groups, left) > 5 || cfg!(miri));
    assert!(leftovers_back(&groups).is_empty());
    let mut states = Old::open(&groups, &mut world.txn).expect("open");
    states.check(keys, number, number);
    // What was freed is used again: new blocks are taken for what is moved alone.
    let before = used(&groups);
    for n in 0..times(200) {
        states.put(&mut world.txn, n, number, number);
        world.commit(&groups);
    }
    assert_eq!(used(&groups), before);
}

#[test]
fn r12_what_does_not_fit_is_refused_and_changes_nothing() {
    let keys = 3000;
    let mut world = World::new(GROUPS, 600 << 10);
    let groups = world.attach();
    let mut table = groups.table::<u64, u64>(&mut world.txn, "table").expect("open");
    for n in 0..keys {
        with_key(&n, |hash, key| table.set(&mut world.txn, hash, key, &n)).expect("room");
        world.commit(&groups);
    }
    drop(table);
    let groups = world.attach_with(Gauge::unlimited());
    let wide = |old: &u64| [*old; 64];
    let error = groups
        .migrate_table::<u64, u64, [u64; 64]>(&mut world.txn, "table", wide, &mut || ())
        .expect_err("there is no room");
    assert!(matches!(error, StateError::SegmentFull { .. }), "{error}");
    let groups = world.attach();
    let table = groups.table::<u64, u64>(&mut world.txn, "table").expect("open");
    assert_eq!(table.len(), keys);
    for n in 0..keys {
        with_key(&n, |hash, key| assert_eq!(table.get(hash, key).map(|v| *v.view), Some(n)));
    }
}

#[test]
fn a_state_of_a_third_type_is_not_touched() {
    let mut world = World::new(GROUPS, GROUP_BYTES);
    let groups = world.attach();
    drop(groups.value::<u64, u32>(&mut world.txn, "value").expect("open"));
    world.commit(&groups);
    let groups = world.attach();
    let from = |old: &u64| widened(*old);
    let done = groups.migrate_value::<u64, u64, Wide>(&mut world.txn, "value", from, &mut || ());
    assert_eq!(done.expect("nothing to do").groups, 0);
    let error = groups.value::<u64, Wide>(&mut world.txn, "value").expect_err("another type");
    assert!(matches!(error, StateError::StateSchema { .. }), "{error}");
}
