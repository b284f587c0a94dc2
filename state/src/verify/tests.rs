//! Groups that were scribbled on are found out; those that were not are not.

use crate::key::KeyHash;
use crate::memory::Gauge;
use crate::{Groups, StateError};
use std::rc::Rc;
use testudo_shm::record::{Record, Scratch};
use testudo_shm::txn::Txn;

const LOG_WORDS: usize = 1 << 17;
const WORDS: usize = 1 << 20;

/// A group with a bit of everything.
fn with_group(work: impl FnOnce(&Groups, &mut [u64])) {
    let mut memory = vec![0u64; WORDS];
    let mut txn = Txn::on_heap(&mut memory, LOG_WORDS);
    let groups = Groups::new("sums", 1, 9, Rc::new(Gauge::unlimited()));
    let bytes = (WORDS - LOG_WORDS) * 8;
    // SAFETY: the memory behind the log belongs to this test alone.
    unsafe {
        let base = txn.base().add(LOG_WORDS * 8);
        groups.attach(&mut txn, 0, base, bytes).expect("an empty group");
    }
    let mut plain = groups.table::<u64, u64>(&mut txn, "plain").expect("a table");
    let mut texts = groups.table::<String, String>(&mut txn, "texts").expect("a table");
    let mut list = groups.list::<u64, u64>(&mut txn, "list").expect("a list");
    let mut map = groups.map::<u64, u64, String>(&mut txn, "map").expect("a map");
    let mut timers = groups.timers::<u64>(&mut txn, "timers").expect("timers");
    let mut slices = groups.slices::<u64, u64>(&mut txn, "slices").expect("slices");
    txn.commit();
    let (mut own, mut other, mut third) =
        (Scratch::default(), Scratch::default(), Scratch::default());
    for key in 0..3000u64 {
        groups.begin_step(&txn);
        let item = key.item(&mut own);
        let hash = KeyHash::of(item);
        plain.update(&mut txn, hash, item, || 0, |sum| *sum += key).expect("room");
        list.append(&mut txn, hash, item, &key).expect("room");
        let (fifth, value) = (key % 5, "v".repeat(key as usize % 70));
        map.put(&mut txn, hash, item, fifth.item(&mut third), &value).expect("room");
        timers.register(&mut txn, hash, item, key as i64 % 100).expect("room");
        let slice = slices.slice(key as i64 % 7);
        slice.update(&mut txn, hash, item, || 0, |sum| *sum += 1).expect("room");
        let text = format!("key {key}");
        let item = text.item(&mut other);
        let long = "text".repeat(key as usize % 30);
        texts.set(&mut txn, KeyHash::of(item), item, &long).expect("room");
        if key % 3 == 0 {
            let item = key.item(&mut own);
            plain.remove(&mut txn, hash, item).expect("a key that is there");
        }
        txn.commit();
    }
    drop((plain, texts, list, map, timers, slices));
    work(&groups, &mut memory[LOG_WORDS..]);
}

#[test]
fn what_was_written_verifies() {
    with_group(|groups, _| groups.verify_all().expect("nobody scribbled"));
}

/// Counts in how many of some places a word of garbage is found out.
fn found(garbage: u64, places: impl Iterator<Item = usize>) -> (usize, usize) {
    let (mut found, mut all) = (0, 0);
    with_group(|groups, memory| {
        for place in places {
            let old = std::mem::replace(&mut memory[place], garbage);
            if old == garbage {
                continue;
            }
            all += 1;
            match groups.verify_all() {
                Err(StateError::Unsound { group: 0, .. }) => found += 1,
                Err(other) => panic!("{other}"),
                Ok(()) => {}
            }
            memory[place] = old;
        }
        groups.verify_all().expect("all is as it was");
    });
    (found, all)
}

#[test]
fn garbage_anywhere_ends_no_look_in_a_panic() {
    for garbage in [0, 1, 0x20, u64::MAX, 1 << 40, 0x00AA_00AA_00AA_00AA] {
        let (found, all) = found(garbage, (4..WORDS / 8).step_by(499));
        assert!(all > 50 && found > 0, "{found} of {all}");
    }
}

#[test]
fn the_heap_and_the_roots_are_looked_at() {
    // Bump, granted and touched; then the chains of free blocks and the roots' words.
    for garbage in [7, u64::MAX] {
        assert_eq!(found(garbage, 4..7), (3, 3), "{garbage}");
    }
}
