//! Values, lists, maps, slices and timers against models of the standard library, with commits and
//! crashes.

mod common;

use common::{LOG_WORDS, Random, World, times, with_key};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::ops::ControlFlow;
use testudo_shm::record::{Record, Scratch};
use testudo_shm::txn::Txn;
use testudo_state::group::{looked_at_first, roots};
use testudo_state::{Groups, List, Map, Slices, StateError, Timers, Value};

const GROUPS: u32 = 3;

/// A structure under test and the model that it must agree with.
trait Subject: Sized {
    type Model: Default + Clone;
    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError>;
    fn operate(&mut self, txn: &mut Txn, random: &mut Random, model: &mut Self::Model);
    fn check(&mut self, model: &Self::Model);
}

/// Random steps; three in ten end in a crash and a new process. Returns the bytes used at the end.
fn run<S: Subject>(seed: u64, steps: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut world = World::new(GROUPS, 1 << 20);
    let mut groups = world.attach();
    let mut subject = S::open(&groups, &mut world.txn).expect("open");
    world.commit(&groups);
    let mut model = S::Model::default();
    let mut committed = model.clone();
    for step in 0..times(steps) {
        for _ in 0..random.below(10) {
            subject.operate(&mut world.txn, &mut random, &mut model);
        }
        if random.chance(70) {
            world.commit(&groups);
            committed.clone_from(&model);
        } else {
            drop(subject);
            groups = world.attach();
            subject = S::open(&groups, &mut world.txn).expect("open");
            model.clone_from(&committed);
        }
        if step % 16 == 0 {
            subject.check(&model);
        }
    }
    subject.check(&model);
    (0..GROUPS).map(|group| groups.used(group)).sum()
}

fn string(n: u64) -> String {
    format!("{n} {}", "y".repeat((n % 40) as usize))
}

/// Keys and items that a test makes from numbers.
trait Sample: Record + Ord + Clone + Debug {
    fn sample(n: u64) -> Self;
}

impl Sample for u64 {
    fn sample(n: u64) -> Self {
        n
    }
}

impl Sample for String {
    fn sample(n: u64) -> Self {
        string(n)
    }
}

impl Subject for Value<u64, String> {
    type Model = BTreeMap<u64, String>;

    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError> {
        groups.value(txn, "value")
    }

    fn operate(&mut self, txn: &mut Txn, random: &mut Random, model: &mut Self::Model) {
        let (key, value) = (random.below(40), string(random.below(200)));
        with_key(&key, |hash, item| match random.below(3) {
            0 => {
                self.set(txn, hash, item, &value).unwrap();
                model.insert(key, value);
            }
            1 => {
                let after = self.update(txn, hash, item, String::new, |old| old.push('z')).unwrap();
                let expected = model.entry(key).or_default();
                expected.push('z');
                assert_eq!(after.as_str(), expected);
            }
            _ => {
                let was_there = self.clear(txn, hash, item).unwrap();
                assert_eq!(was_there, model.remove(&key).is_some());
            }
        });
    }

    fn check(&mut self, model: &Self::Model) {
        assert_eq!(self.table().len(), model.len() as u64);
        for (key, value) in model {
            with_key(key, |hash, item| {
                self.prefetch(hash);
                assert_eq!(self.get(hash, item).unwrap().as_str(), value);
            });
        }
    }
}

impl<K: Sample, T: Sample> Subject for List<K, T> {
    type Model = BTreeMap<K, Vec<T>>;

    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError> {
        groups.list(txn, "list")
    }

    fn operate(&mut self, txn: &mut Txn, random: &mut Random, model: &mut Self::Model) {
        let key = K::sample(random.below(12));
        with_key(&key, |hash, item| match random.below(20) {
            0 => {
                let had_items = self.clear(txn, hash, item).unwrap();
                assert_eq!(had_items, model.remove(&key).is_some());
            }
            1 => {
                let items: Vec<T> = (0..random.below(5)).map(T::sample).collect();
                self.replace(txn, hash, item, &items).unwrap();
                model.remove(&key);
                if !items.is_empty() {
                    model.insert(key.clone(), items);
                }
            }
            _ => {
                let new = T::sample(random.below(5000));
                self.append(txn, hash, item, &new).unwrap();
                model.entry(key.clone()).or_default().push(new);
            }
        });
    }

    fn check(&mut self, model: &Self::Model) {
        assert_eq!(self.heads().len(), model.len() as u64);
        for (key, items) in model {
            with_key(key, |hash, item| {
                let found: Vec<T> =
                    self.iter(hash, item).map(|item| T::to_owned(item.view)).collect();
                assert_eq!(&found, items);
                assert_eq!(self.len(hash, item), items.len() as u64);
            });
        }
    }
}

impl<K: Sample, UK: Sample, UV: Sample> Subject for Map<K, UK, UV> {
    type Model = BTreeMap<K, BTreeMap<UK, UV>>;

    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError> {
        groups.map(txn, "map")
    }

    fn operate(&mut self, txn: &mut Txn, random: &mut Random, model: &mut Self::Model) {
        let (key, user_key) = (K::sample(random.below(8)), UK::sample(random.below(50)));
        let mut scratch = Scratch::default();
        let user_item = user_key.item(&mut scratch);
        with_key(&key, |hash, item| match random.below(24) {
            0 => {
                let entries = self.clear(txn, hash, item).unwrap();
                assert_eq!(entries, model.remove(&key).map_or(0, |map| map.len() as u64));
            }
            1..=10 => {
                let was_there = self.remove(txn, hash, item, user_item).unwrap();
                let map = model.entry(key.clone()).or_default();
                assert_eq!(was_there, map.remove(&user_key).is_some());
                if map.is_empty() {
                    model.remove(&key);
                }
            }
            _ => {
                let value = UV::sample(random.below(3000));
                let was_new = self.put(txn, hash, item, user_item, &value).unwrap();
                let map = model.entry(key.clone()).or_default();
                assert_eq!(was_new, map.insert(user_key.clone(), value).is_none());
            }
        });
    }

    fn check(&mut self, model: &Self::Model) {
        for n in 0..8 {
            let key = K::sample(n);
            let expected = model.get(&key).cloned().unwrap_or_default();
            with_key(&key, |hash, item| {
                assert_eq!(self.len(hash, item), expected.len() as u64);
                let found: BTreeMap<UK, UV> = self
                    .iter(hash, item)
                    .map(|(key, value)| (UK::to_owned(key.view), UV::to_owned(value.view)))
                    .collect();
                assert_eq!(found, expected);
                for (user_key, value) in &expected {
                    let mut scratch = Scratch::default();
                    let user_item = user_key.item(&mut scratch);
                    let found = self.get(hash, item, user_item).expect("entry");
                    assert_eq!(&UV::to_owned(found.view), value);
                }
            });
        }
    }
}

impl<K: Sample, V: Sample> Subject for Slices<K, V> {
    type Model = BTreeMap<i64, BTreeMap<K, V>>;

    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError> {
        groups.slices(txn, "slices")
    }

    fn operate(&mut self, txn: &mut Txn, random: &mut Random, model: &mut Self::Model) {
        let id = random.below(30).cast_signed() * 1000 - 5000;
        let key = K::sample(random.below(50));
        match random.below(40) {
            0 => {
                let was_open = self.drop_slice(txn, id);
                assert!(was_open || !model.contains_key(&id));
                model.remove(&id);
            }
            1..=5 => {
                self.sweep(txn, 100);
            }
            _ => with_key(&key, |hash, item| {
                self.prefetch(id, hash);
                let value = V::sample(random.below(99));
                self.update(txn, id, hash, item, || V::sample(0), |old| *old = value.clone())
                    .unwrap();
                model.entry(id).or_default().insert(key.clone(), value);
            }),
        }
    }

    fn check(&mut self, model: &Self::Model) {
        let open: Vec<i64> = self.ids().collect();
        assert!(open.is_sorted());
        let filled: Vec<i64> = open
            .iter()
            .copied()
            .filter(|&id| self.get_slice(id).is_some_and(|table| !table.is_empty()))
            .collect();
        assert_eq!(filled, model.keys().copied().collect::<Vec<_>>());
        for (&id, expected) in model {
            let table = self.get_slice(id).expect("slice");
            let mut found = BTreeMap::new();
            for group in 0..GROUPS {
                let end = table.scan(group, 0, usize::MAX, |_, key, value| {
                    found.insert(K::to_owned(key.view), V::to_owned(value.view));
                    ControlFlow::Continue(())
                });
                assert_eq!(end, None);
            }
            assert_eq!(&found, expected);
        }
    }
}

impl<K: Sample> Subject for Timers<K> {
    type Model = BTreeSet<(i64, K)>;

    fn open(groups: &Groups, txn: &mut Txn) -> Result<Self, StateError> {
        groups.timers(txn, "timers")
    }

    fn operate(&mut self, txn: &mut Txn, random: &mut Random, model: &mut Self::Model) {
        let key = K::sample(random.below(20));
        let time = random.below(200).cast_signed() - 100;
        with_key(&key, |hash, item| match random.below(10) {
            0 => {
                let mut fired = Vec::new();
                let count = self.due(txn, time, 5, |_, _, due| {
                    fired.push((due.time(), K::to_owned(due.key().view)));
                    Ok(())
                });
                assert_eq!(count.unwrap(), fired.len());
                let expected = model.iter().take_while(|timer| timer.0 <= time).count().min(5);
                assert_eq!(fired.len(), expected);
                assert!(fired.is_sorted_by_key(|timer| timer.0));
                for timer in fired {
                    assert!(timer.0 <= model.first().unwrap().0, "an earlier one was left");
                    assert!(model.remove(&timer), "{timer:?} was not set");
                }
            }
            1..=3 => {
                let was_set = self.delete(txn, hash, item, time).unwrap();
                assert_eq!(was_set, model.remove(&(time, key.clone())));
            }
            _ => {
                let is_new = self.register(txn, hash, item, time).unwrap();
                assert_eq!(is_new, model.insert((time, key.clone())));
            }
        });
        assert_eq!(self.first(), model.first().map(|timer| timer.0));
    }

    fn check(&mut self, model: &Self::Model) {
        assert_eq!(self.len(), model.len() as u64);
        assert_eq!(self.first(), model.first().map(|timer| timer.0));
    }
}

#[test]
fn values_survive_crashes() {
    run::<Value<u64, String>>(1, 1500);
}

#[test]
fn lists_survive_crashes() {
    run::<List<u64, u64>>(1, 1000);
    run::<List<String, String>>(2, 1000);
}

#[test]
fn maps_survive_crashes() {
    run::<Map<u64, u64, u64>>(1, 1000);
    run::<Map<String, String, String>>(2, 1000);
    run::<Map<u64, String, u64>>(3, 1000);
}

#[test]
fn slices_survive_crashes() {
    run::<Slices<u64, u64>>(1, 1000);
    run::<Slices<String, String>>(2, 1000);
}

#[test]
fn timers_survive_crashes() {
    run::<Timers<u64>>(1, 3000);
    run::<Timers<String>>(2, 1000);
}

#[test]
#[cfg_attr(miri, ignore = "about memory in use over many steps")]
fn memory_in_use_does_not_grow_with_the_number_of_steps() {
    fn settles<S: Subject>() {
        let (short, long) = (run::<S>(5, 3000), run::<S>(5, 12_000));
        let what = std::any::type_name::<S>();
        assert!(long <= short + short / 2, "{what}: {short} bytes after 3000 steps, then {long}");
    }
    settles::<Value<u64, String>>();
    settles::<List<String, String>>();
    settles::<Map<String, String, String>>();
    settles::<Slices<String, String>>();
    settles::<Timers<String>>();
}

#[test]
fn all_kinds_of_state_share_a_group() {
    let mut world = World::new(1, 1 << 20);
    let groups = world.attach();
    let txn = &mut world.txn;
    let mut value = groups.value::<u64, u64>(txn, "a").unwrap();
    let mut list = groups.list::<u64, u64>(txn, "b").unwrap();
    let mut map = groups.map::<u64, u64, u64>(txn, "c").unwrap();
    let mut slices = groups.slices::<u64, u64>(txn, "d").unwrap();
    let mut timers = groups.timers::<u64>(txn, "e").unwrap();
    for key in 0..times(500) {
        with_key(&key, |hash, item| {
            value.set(txn, hash, item, &key).unwrap();
            list.append(txn, hash, item, &key).unwrap();
            map.put(txn, hash, item, item, &key).unwrap();
            slices.update(txn, 4, hash, item, || key, |_| ()).unwrap();
            timers.register(txn, hash, item, key.cast_signed()).unwrap();
        });
        txn.commit();
    }
    for key in 0..times(500) {
        with_key(&key, |hash, item| {
            assert_eq!(*value.get(hash, item).unwrap(), key);
            assert_eq!(*list.iter(hash, item).next().unwrap(), key);
            assert_eq!(*map.get(hash, item, item).unwrap(), key);
            assert_eq!(*slices.get(4, hash, item).unwrap(), key);
        });
    }
    let count = timers.due(txn, i64::MAX - 1, 10_000, |_, _, _| Ok(())).unwrap();
    assert_eq!(count as u64, times(500));
}

#[test]
fn a_timer_may_set_the_next_one_while_it_fires() {
    let mut world = World::new(1, 1 << 20);
    let groups = world.attach();
    let mut timers = groups.timers::<u64>(&mut world.txn, "timers").unwrap();
    with_key(&7, |hash, item| timers.register(&mut world.txn, hash, item, 10).unwrap());
    let mut times = Vec::new();
    let count = timers.due(&mut world.txn, 45, 100, |timers, txn, due| {
        times.push(due.time());
        timers.register(txn, due.hash(), due.key(), due.time() + 10).map(|_| ())
    });
    assert_eq!((count.unwrap(), times), (4, vec![10, 20, 30, 40]));
    assert_eq!(timers.first(), Some(50));
}

#[test]
fn a_group_can_be_released_and_taken_again() {
    let mut world = World::new(2, 1 << 20);
    let groups = world.attach();
    let txn = &mut world.txn;
    let mut timers = groups.timers::<u64>(txn, "timers").unwrap();
    let mut slices = groups.slices::<u64, u64>(txn, "slices").unwrap();
    for key in 0..50 {
        with_key(&key, |hash, item| {
            timers.register(txn, hash, item, key.cast_signed()).unwrap();
            slices.update(txn, 1, hash, item, || 0, |_| ()).unwrap();
        });
    }
    let all = slices.slice(1).len();
    groups.release(1);
    timers.reload(txn).unwrap();
    slices.reload(txn).unwrap();
    let left = slices.slice(1).len();
    assert!(left > 0 && left < all && timers.len() == left);
    drop((timers, slices));
    txn.commit();
    let groups = world.attach();
    assert_eq!(groups.timers::<u64>(&mut world.txn, "timers").unwrap().len(), all);
}

/// A resumed job's state comes from the disk when it is touched: what opening touches is bounded by
/// the groups, not by the slices (R16).
#[test]
fn r16_opening_slices_looks_at_no_slice() {
    let mut world = World::new(1, 1 << 20);
    let groups = world.attach();
    let mut slices = groups.slices::<u64, u64>(&mut world.txn, "slices").unwrap();
    for id in 0..40 {
        with_key(&7u64, |hash, item| {
            slices.update(&mut world.txn, id, hash, item, || id as u64, |_| ()).unwrap();
        });
    }
    world.commit(&groups);
    drop((slices, groups));
    let base = LOG_WORDS * 8;
    // SAFETY: the test's own vector, which nobody writes meanwhile.
    let front = unsafe { std::slice::from_raw_parts(world.txn.base().add(base), 4096) };
    let [directory, entries] = [2, 3].map(|n| roots(front).next().unwrap().words[n]);
    assert_eq!(entries, 40);
    let hints = looked_at_first(front);
    assert!(hints.contains(&(directory, 40 * 16)), "{hints:?}");
    // All tables but that of slice 39 are made such that looking at one is noticed.
    for entry in 0..39 {
        // SAFETY: as above; the directory's entries are {id, header}, and the second word of a
        // header is the table's capacity.
        unsafe {
            let at = world.txn.base().add(base + directory as usize + entry * 16 + 8);
            let header = at.cast::<u64>().read() as usize;
            world.txn.base().add(base + header + 8).cast::<u64>().write(3);
        }
    }
    let groups = world.attach();
    let slices = groups.slices::<u64, u64>(&mut world.txn, "slices").unwrap();
    assert_eq!((slices.ids().count(), slices.oldest()), (40, Some(0)));
    with_key(&7u64, |hash, item| {
        assert_eq!(slices.get(39, hash, item).map(|value| *value.view), Some(39));
    });
    let looked = std::panic::AssertUnwindSafe(|| {
        with_key(&7u64, |hash, item| slices.get(3, hash, item).is_some())
    });
    assert!(std::panic::catch_unwind(looked).is_err(), "a damaged table was believed");
}
