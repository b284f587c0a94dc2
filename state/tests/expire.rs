//! Expiry against a model, with commits and crashes: a key is gone at its deadline, no earlier and
//! no later, and what it took is given back without looking at keys that live.

mod common;

use common::{Random, World, times, with_key};
use std::collections::BTreeMap;
use testudo_shm::txn::Txn;
use testudo_state::expire::UNKNOWN;
use testudo_state::{Expiry, Groups, Value};

const GROUPS: u32 = 3;
const TTL: i64 = 100;

/// A value with a time to live.
struct Kept {
    value: Value<u64, String>,
    expiry: Expiry<u64>,
}

/// Value and last touch by key.
type Model = BTreeMap<u64, (String, i64)>;

fn is_over(touched: i64, now: i64) -> bool {
    touched != UNKNOWN && touched + TTL <= now
}

impl Kept {
    fn open(groups: &Groups, txn: &mut Txn) -> Self {
        let value = groups.value(txn, "value").expect("open");
        Self { value, expiry: groups.expiry(txn, "value", TTL).expect("open") }
    }

    fn set(&mut self, txn: &mut Txn, key: u64, value: &str, now: i64) {
        with_key(&key, |hash, item| {
            self.value.set(txn, hash, item, &value.to_owned()).expect("room");
            self.expiry.touch(txn, hash, item, now).expect("room");
        });
    }

    fn get(&self, key: u64, now: i64) -> Option<String> {
        with_key(&key, |hash, item| {
            let is_expired = self.expiry.is_expired(hash, item, now);
            self.value.get(hash, item).filter(|_| !is_expired).map(|value| value.view.to_string())
        })
    }

    fn sweep(&mut self, txn: &mut Txn, now: i64, max: usize) -> usize {
        let value = &mut self.value;
        let expired = |txn: &mut Txn, hash, item: testudo_shm::record::Item<'_, u64>| {
            let was_there = value.clear(txn, hash, item)?;
            assert!(was_there, "{} expired without a value", item.view);
            Ok(())
        };
        self.expiry.sweep(txn, now, max, expired).expect("sound")
    }
}

fn operate(kept: &mut Kept, txn: &mut Txn, random: &mut Random, model: &mut Model, now: i64) {
    let key = random.below(60);
    match random.below(10) {
        0 => {
            with_key(&key, |hash, item| {
                kept.value.clear(txn, hash, item).expect("held");
                kept.expiry.forget(txn, hash, item).expect("held");
            });
            model.remove(&key);
        }
        1..=3 => {
            // Seldom enough that some wait long for a sweep.
            kept.sweep(txn, now, 2);
        }
        4 => {
            // A read that counts.
            if kept.get(key, now).is_some() {
                with_key(&key, |hash, item| kept.expiry.touch(txn, hash, item, now)).expect("room");
            }
            if let Some((_, touched)) = model.get_mut(&key).filter(|(_, at)| !is_over(*at, now)) {
                *touched = now.max(*touched);
            }
        }
        _ => {
            let value = format!("{} {}", random.below(1000), "y".repeat(random.below(30) as usize));
            kept.set(txn, key, &value, now);
            model.insert(key, (value, now));
        }
    }
}

fn check(kept: &Kept, model: &Model, now: i64) {
    for key in 0..60 {
        let expected = model.get(&key).filter(|(_, touched)| !is_over(*touched, now));
        assert_eq!(kept.get(key, now), expected.map(|(value, _)| value.clone()), "{key} at {now}");
    }
}

#[test]
fn an_expired_key_is_gone_at_its_deadline_whoever_was_killed() {
    let mut random = Random::new(3);
    let mut world = World::new(GROUPS, 1 << 20);
    let mut groups = world.attach();
    let mut kept = Kept::open(&groups, &mut world.txn);
    world.commit(&groups);
    let (mut model, mut now) = (Model::new(), UNKNOWN);
    let mut committed = model.clone();
    for step in 0..times(6000) {
        match step {
            0..20 => {}
            20 => {
                // The first time that is known is that of all that was touched before.
                now = 0;
                kept.sweep(&mut world.txn, now, usize::MAX);
                model.values_mut().for_each(|(_, touched)| *touched = 0);
            }
            _ => now += random.below(12).cast_signed(),
        }
        for _ in 0..random.below(8) {
            operate(&mut kept, &mut world.txn, &mut random, &mut model, now);
        }
        check(&kept, &model, now);
        if step == 20 || random.chance(70) {
            world.commit(&groups);
            committed.clone_from(&model);
        } else {
            drop(kept);
            groups = world.attach();
            kept = Kept::open(&groups, &mut world.txn);
            model.clone_from(&committed);
            check(&kept, &model, now);
        }
    }
    while kept.sweep(&mut world.txn, now, 10) == 10 {}
    let alive = model.values().filter(|(_, touched)| !is_over(*touched, now)).count() as u64;
    assert_eq!((kept.expiry.len(), kept.value.table().len()), (alive, alive));
    kept.sweep(&mut world.txn, now + TTL, usize::MAX);
    assert!(kept.expiry.is_empty() && kept.value.table().is_empty());
}

#[test]
#[cfg_attr(miri, ignore = "about memory in use over many steps")]
fn memory_of_expired_keys_is_used_again() {
    let used = |keys: u64| {
        let mut world = World::new(1, 8 << 20);
        let groups = world.attach();
        let mut kept = Kept::open(&groups, &mut world.txn);
        for key in 0..keys {
            let now = key.cast_signed();
            kept.set(&mut world.txn, key, "a value of some length", now);
            // Two for each new one: whatever the past was, it is worked off.
            kept.sweep(&mut world.txn, now, 2);
            world.commit(&groups);
            assert!(kept.value.table().len() <= TTL as u64 + 1);
        }
        groups.used(0)
    };
    let (short, long) = (used(2_000), used(20_000));
    assert!(long <= short + short / 2, "{short} bytes after 2000 keys, then {long}");
}

#[test]
fn a_sweep_looks_at_keys_that_are_due_only_and_no_more_than_asked_for() {
    let mut world = World::new(GROUPS, 1 << 20);
    let groups = world.attach();
    let mut kept = Kept::open(&groups, &mut world.txn);
    for key in 0..1000 {
        let (value, now) = if key < 200 { ("old", 0) } else { ("new", 50) };
        kept.set(&mut world.txn, key, value, now);
        world.commit(&groups);
    }
    assert!(!kept.expiry.is_due(TTL - 1));
    assert_eq!(kept.sweep(&mut world.txn, TTL - 1, usize::MAX), 0);
    assert_eq!(kept.sweep(&mut world.txn, TTL, 150), 150);
    world.commit(&groups);
    assert_eq!(kept.expiry.len(), 850);
    assert_eq!(kept.sweep(&mut world.txn, TTL, 150), 50);
    assert_eq!(kept.expiry.len(), 800);
}

#[test]
fn a_key_that_is_used_often_has_one_timer() {
    let mut world = World::new(1, 1 << 20);
    let groups = world.attach();
    let mut kept = Kept::open(&groups, &mut world.txn);
    let mut looked = 0;
    for now in 0..50 * TTL {
        kept.set(&mut world.txn, 7, "again", now);
        looked += kept.sweep(&mut world.txn, now, 10);
        world.commit(&groups);
    }
    assert!(looked <= 50, "its timer was looked at {looked} times in 50 times to live");
    assert_eq!(kept.get(7, 51 * TTL - 2).as_deref(), Some("again"));
    assert_eq!(kept.get(7, 51 * TTL - 1), None);
}

#[test]
fn a_clock_that_goes_back_takes_no_time_away() {
    let mut world = World::new(1, 1 << 20);
    let groups = world.attach();
    let mut kept = Kept::open(&groups, &mut world.txn);
    kept.set(&mut world.txn, 7, "first", 1000);
    kept.set(&mut world.txn, 7, "second", 10);
    assert_eq!(kept.sweep(&mut world.txn, 1000 + TTL - 1, 10), 0);
    assert_eq!(kept.get(7, 1000 + TTL - 1).as_deref(), Some("second"));
    assert_eq!(kept.get(7, 1000 + TTL), None);
}
