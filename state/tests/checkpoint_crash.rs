//! The machine goes off at every operation of a commit, and whatever was not synced is kept,
//! dropped, torn or reordered: the store opens again, and the newest whole checkpoint is the old
//! one or the new one, complete.

mod checkpoint_common;

use checkpoint_common::{Chance, Job, Snapshot};
use std::collections::BTreeMap;
use testudo_state::checkpoint::Keep;
use testudo_state::disk::{BUFFER_BYTES, Choice, Memory, Pool};

/// What each checkpoint must hold.
type Judge = BTreeMap<u64, Vec<Snapshot>>;

fn pool() -> Pool {
    Pool::new(8 * BUFFER_BYTES)
}

/// Opens what a crash left, and gives the number of its newest whole checkpoint, which was
/// compared with what it must hold.
fn judge(left: &Memory, pool: &Pool, workers: u32, judge: &Judge) -> (Job, Option<u64>) {
    let mut job = Job::in_memory(left, pool, workers);
    let whole = job.store.newest_whole().unwrap_or_else(|e| panic!("{e}"));
    let found = whole.map(|candidate| {
        let manifest = candidate.manifest.expect("it is whole");
        let held = checkpoint_common::contents(&mut job, &manifest);
        assert_eq!(held.as_ref(), Ok(&judge[&manifest.id]), "checkpoint {}", manifest.id);
        job.restore(&manifest).unwrap_or_else(|e| panic!("{e}"));
        manifest.id
    });
    (job, found)
}

/// Two checkpoints and a retirement, of which all but the first may be cut off. Gives what each
/// must hold, the last one that counted, and the last one that was begun.
fn short_script(memory: &Memory, pool: &Pool, off_at: Option<u64>) -> (Judge, u64, u64, u64) {
    let mut chance = Chance(5);
    let mut job = Job::in_memory(memory, pool, 1);
    let mut judge = Judge::new();
    job.work(&mut chance);
    judge.insert(1, job.snapshot());
    job.checkpoint(1).unwrap();
    let safe = memory.operations();
    if let Some(off_at) = off_at {
        memory.stop_before(off_at);
    }
    let mut counted = 1;
    for id in [2, 3] {
        job.workers[0].put(0, id as u32, 7 * id);
        job.workers[0].now.cells = vec![id as u8; 100];
        judge.insert(id, job.snapshot());
        if job.checkpoint(id).is_err() {
            return (judge, counted, id, safe);
        }
        counted = id;
        if job.store.retire(&Keep { running_epoch: id + 1, held: &[] }).is_err() {
            break;
        }
    }
    (judge, counted, counted, safe)
}

#[test]
fn a_crash_at_any_operation_leaves_the_old_checkpoint_or_the_new_one() {
    let pool = pool();
    let memory = Memory::new();
    let (.., safe) = short_script(&memory, &pool, None);
    let operations = memory.operations();
    assert!(operations - safe > 30, "{safe} to {operations}");
    let (mut old, mut new, mut choices) = (0, 0, 0);
    for off_at in safe..=operations {
        let memory = Memory::new();
        let (expected, counted, begun, _) = short_script(&memory, &pool, Some(off_at));
        let seeds = (0..50).map(Choice::Seed);
        for choice in memory.choices(1 << 10).into_iter().chain(seeds) {
            let left = memory.crash(choice);
            let (mut job, found) = judge(&left, &pool, 1, &expected);
            let found = found.unwrap_or_else(|| panic!("none is whole: {off_at} {choice:?}"));
            assert!(found == counted || found == begun, "{off_at} {choice:?}: {found}");
            *(if found == counted { &mut old } else { &mut new }) += 1;
            choices += 1;
            // Life goes on.
            let next = job.store.next_id().unwrap().max(job.store.next_epoch().unwrap());
            assert!(next > found);
            job.workers[0].put(1, 0, next);
            job.checkpoint(next).unwrap_or_else(|e| panic!("{off_at} {choice:?}: {e}"));
            let whole = job.store.newest_whole().unwrap().expect("it was committed");
            assert_eq!(whole.manifest.expect("whole").id, next);
        }
    }
    // The machinery sees both outcomes, so it can see a wrong one.
    assert!(old > 100 && new > 3, "{old} old, {new} new of {choices}");
}

#[test]
fn a_new_folder_that_a_crash_cut_off_can_be_opened_again() {
    let pool = pool();
    let memory = Memory::new();
    drop(Job::in_memory(&memory, &pool, 1));
    for off_at in 0..=memory.operations() {
        let memory = Memory::new();
        memory.stop_before(off_at);
        let disk = || Box::new(memory.clone());
        let _ = Job::open(disk(), disk(), &pool, 1);
        for choice in memory.choices(1 << 10) {
            let (mut job, found) = judge(&memory.crash(choice), &pool, 1, &Judge::new());
            assert_eq!(found, None);
            job.work(&mut Chance(1));
            job.checkpoint(1).unwrap();
        }
    }
}

/// Lives of a job, each ended by a crash somewhere; every one must go on where the judge says.
fn long_story(seed: u64, pool: &Pool) -> u64 {
    let mut chance = Chance(seed);
    let mut memory = Memory::new();
    memory.shuffle(seed);
    let mut expected = Judge::new();
    let (mut counted, mut begun) = (None, None);
    let mut crashes = 0;
    for _ in 0..6 {
        let (mut job, found) = judge(&memory, pool, 2, &expected);
        assert!(
            found == counted || (begun.is_some() && found == begun),
            "seed {seed}: found {found:?}, counted {counted:?}, begun {begun:?}"
        );
        counted = found;
        begun = None;
        memory.stop_before(memory.operations() + chance.below(250));
        let first = job.store.next_id().unwrap().max(job.store.next_epoch().unwrap());
        for id in first..first + 6 {
            job.work(&mut chance);
            expected.insert(id, job.snapshot());
            let failing = chance.below(8) == 0;
            if failing {
                memory.fail_syncs(1 + chance.below(2) as u32);
            }
            begun = Some(id);
            match job.checkpoint(id) {
                Ok(_) => (counted, begun) = (Some(id), None),
                Err(_) if failing => {
                    memory.fail_syncs(0);
                    // What a worker saved for an attempt that failed is not built upon here.
                    let whole = job.store.newest_whole().unwrap();
                    let back = whole.and_then(|candidate| candidate.manifest);
                    let back = back.filter(|m| Some(m.id) == counted);
                    // Or the machine went off as well.
                    if back.is_none_or(|manifest| job.restore(&manifest).is_err()) {
                        break;
                    }
                }
                Err(_) => break,
            }
            if chance.below(3) == 0
                && job.store.retire(&Keep { running_epoch: id + 1, held: &[] }).is_err()
            {
                break;
            }
        }
        let left = memory.crash(Choice::Seed(chance.below(u64::MAX)));
        memory = left;
        memory.shuffle(seed);
        crashes += 1;
    }
    crashes
}

#[test]
fn many_lives_each_ended_by_a_crash_lose_nothing_that_counted() {
    let pool = pool();
    let crashes: u64 = (0..150).map(|seed| long_story(seed, &pool)).sum();
    assert_eq!(crashes, 900);
}
