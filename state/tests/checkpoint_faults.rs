//! A disk that refuses: a commit that fails says so, the store stays usable, and the next commit
//! works.

mod checkpoint_common;

use checkpoint_common::{Chance, Job, Shared, contents, folder};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use testudo_state::checkpoint::{Keep, Store, StoreError, verify};
use testudo_state::disk::{
    BUFFER_BYTES, Choice, Disk, Done, FileId, Memory, Op, Pool, Ticket, What,
};

fn pool() -> Pool {
    Pool::new(8 * BUFFER_BYTES)
}

/// Retires, with what the workers build upon held.
fn retire(job: &mut Job, running_epoch: u64) -> Result<(), StoreError> {
    let held: Vec<_> = job.workers.iter().filter_map(|w| w.chain.newest().cloned()).collect();
    job.store.retire(&Keep { running_epoch, held: &held }).map(|_| ())
}

/// Checkpoint 2 meets a fault at operation `n`; checkpoint 3 must work. False: there were not so
/// many operations.
fn one_fault(pool: &Pool, n: u64, what: What) -> bool {
    let memory = Memory::new();
    let disk = Shared::new(memory.clone());
    let boxed = || Box::new(disk.clone());
    let mut job = Job::open(boxed(), boxed(), pool, 2).unwrap();
    let mut chance = Chance(n);
    job.work(&mut chance);
    job.checkpoint(1).unwrap();
    let first = job.snapshot();

    disk.0.borrow_mut().fail("any", n, what);
    job.work(&mut chance);
    let second = job.snapshot();
    let committed = job.checkpoint(2);
    let retired = retire(&mut job, 3);
    let met = disk.0.borrow().injected() > 0;
    if !met {
        return false;
    }
    if let Err(error) = &retired {
        assert!(error.to_string().contains("/ck"), "{error}");
    }
    // Whatever happened, a crash now finds one of the two.
    for choice in [Choice::Bits(0), Choice::Bits(u64::MAX), Choice::Seed(n)] {
        let mut after = Job::in_memory(&memory.crash(choice), pool, 2);
        let whole = after.store.newest_whole().unwrap().expect("one is whole");
        let manifest = whole.manifest.expect("it is whole");
        assert!(committed.is_err() || manifest.id == 2, "{n} {what:?} {choice:?}");
        let expected = if manifest.id == 2 { &second } else { &first };
        assert_eq!(contents(&mut after, &manifest).as_ref(), Ok(expected));
    }
    job.work(&mut chance);
    let manifest = job.checkpoint(3).unwrap_or_else(|e| panic!("{n} {what:?}: {e}"));
    retire(&mut job, 4).unwrap();
    assert_eq!(contents(&mut job, &manifest), Ok(job.snapshot()));
    let mut after = Job::in_memory(&memory.crash(Choice::Bits(0)), pool, 2);
    let whole = after.store.newest_whole().unwrap().expect("3 is whole");
    assert_eq!(whole.manifest.expect("it is whole").id, 3);
    let report = verify(&mut memory.clone(), pool, folder()).unwrap();
    assert!(report.is_whole(), "{n} {what:?}: {report:?}");
    true
}

#[test]
fn an_error_at_any_operation_fails_that_attempt_alone() {
    let pool = pool();
    let faults =
        [What::Error(libc::EIO), What::Error(libc::ENOSPC), What::Short(0), What::Short(1)];
    for what in faults {
        let met = (0..).take_while(|n| one_fault(&pool, *n, what)).count();
        assert!(met > 40, "only {met} operations met {what:?}");
    }
}

#[test]
fn a_disk_with_a_bad_day_never_loses_what_counted() {
    let pool = pool();
    for seed in 0..60 {
        let memory = Memory::new();
        let disk = Shared::new(memory.clone());
        let boxed = || Box::new(disk.clone());
        let mut job = Job::open(boxed(), boxed(), &pool, 2).unwrap();
        disk.0.borrow_mut().fail_by_chance(seed, 30);
        let (mut counted, mut last) = (0, None);
        for id in 1..30 {
            job.work(&mut Chance(seed * 100 + id));
            if job.checkpoint(id).is_ok() {
                (counted, last) = (counted + 1, Some((id, job.snapshot())));
            }
            let _ = retire(&mut job, id + 1);
        }
        assert!(disk.0.borrow().injected() > 10 && counted > 1, "seed {seed}: {counted}");
        let mut after = Job::in_memory(&memory.crash(Choice::Bits(0)), &pool, 2);
        let whole = after.store.newest_whole().unwrap().and_then(|whole| whole.manifest);
        let whole = whole.expect("something counted");
        let (id, snapshot) = last.expect("something counted");
        assert!(whole.id >= id, "seed {seed}: {} instead of {id}", whole.id);
        if whole.id == id {
            assert_eq!(contents(&mut after, &whole), Ok(snapshot), "seed {seed}");
        }
    }
}

/// Fails the sync that comes after `left` others, as a kernel does that drops what it could not
/// write; and refuses to see such a file written or synced again.
#[derive(Clone)]
struct OneBadSync {
    memory: Memory,
    left: Rc<Cell<i64>>,
    bad: Rc<RefCell<BTreeSet<FileId>>>,
}

impl Disk for OneBadSync {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        if let Op::Write { file, .. } | Op::Sync { file } = &op {
            assert!(!self.bad.borrow().contains(file), "a bad file meets {}", op.doing());
        }
        if let Op::Sync { file } = &op {
            self.left.set(self.left.get() - 1);
            if self.left.get() == -1 {
                self.memory.fail_syncs(1);
                self.bad.borrow_mut().insert(*file);
            }
        }
        self.memory.submit(op)
    }
    fn poll(&mut self, done: &mut Vec<Done>) {
        self.memory.poll(done);
    }
    fn wait(&mut self, patience: Duration) {
        self.memory.wait(patience);
    }
    fn in_flight(&self) -> usize {
        self.memory.in_flight()
    }
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        self.memory.list(folder)
    }
    fn kind(&self) -> &'static str {
        "memory"
    }
}

#[test]
fn a_failed_sync_abandons_its_attempt_and_its_file() {
    let pool = pool();
    // Two region files, the manifest, the roots.
    for n in 0..4 {
        let memory = Memory::new();
        let disk = OneBadSync {
            memory: memory.clone(),
            left: Rc::new(Cell::new(1000)),
            bad: Rc::default(),
        };
        let boxed = || Box::new(disk.clone());
        let mut job = Job::open(boxed(), boxed(), &pool, 2).unwrap();
        job.work(&mut Chance(n));
        job.checkpoint(1).unwrap();
        disk.left.set(n as i64);
        job.work(&mut Chance(n + 1));
        let error = job.checkpoint(2).expect_err("a sync failed");
        assert!(error.contains("error 5") && (n < 2 || error.contains("/ck/")), "{error}");
        retire(&mut job, 3).unwrap();
        for choice in memory.choices(64) {
            let mut after = Job::in_memory(&memory.crash(choice), &pool, 2);
            let whole = after.store.newest_whole().unwrap().expect("1 is whole");
            let id = whole.manifest.expect("it is whole").id;
            assert!(id == 1 || (n == 3 && id == 2), "sync {n}: {id}");
        }
        for id in 3..6 {
            job.work(&mut Chance(n + id));
            let manifest = job.checkpoint(id).unwrap_or_else(|e| panic!("sync {n}: {e}"));
            retire(&mut job, id + 1).unwrap();
            let mut after = Job::in_memory(&memory.crash(Choice::Bits(0)), &pool, 2);
            assert_eq!(contents(&mut after, &manifest), Ok(job.snapshot()), "sync {n}");
            let whole = after.store.newest_whole().unwrap().expect("it is whole");
            assert_eq!(whole.manifest, Some(expected(&manifest, &whole.manifest)));
        }
    }
}

/// A manifest as it was given, with the link to its predecessor that the store filled in.
fn expected(
    given: &testudo_state::checkpoint::Manifest,
    read: &Option<testudo_state::checkpoint::Manifest>,
) -> testudo_state::checkpoint::Manifest {
    let mut expected = given.clone();
    expected.previous = read.as_ref().and_then(|read| read.previous.clone());
    assert!(expected.previous.is_some(), "every checkpoint but the first has one before it");
    expected
}

#[test]
fn a_manifest_that_cannot_be_true_is_refused() {
    let pool = pool();
    let memory = Memory::new();
    let mut job = Job::in_memory(&memory, &pool, 2);
    job.work(&mut Chance(1));
    job.checkpoint(4).unwrap();
    job.work(&mut Chance(2));
    let files = job.save(5).unwrap();
    let good = checkpoint_common::manifest(5, 5, &files);
    let mut refuse = |change: &dyn Fn(&mut testudo_state::checkpoint::Manifest), says: &str| {
        let mut manifest = good.clone();
        change(&mut manifest);
        let error = job.store.commit(&manifest).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    };
    refuse(&|m| m.id = 4, "numbers below 5");
    refuse(&|m| m.job_id = 3, "belongs to job");
    refuse(&|m| m.regions[0].workers[0].file.bytes += 8192, "does not fit itself");
    refuse(&|m| m.regions[0].workers[0].file.name = "w0-e9-i9.region".into(), "epoch 5");
    refuse(&|m| m.regions[0].workers[0].file.name = "../roots".into(), "no name of a region");
    refuse(&|m| m.regions[1].workers[0] = m.regions[0].workers[0].clone(), "two files");
    refuse(&|m| m.regions[0].workers[0].file.name = "w0-e5-i9.region".into(), "not there");
    job.store.commit(&good).unwrap();
}

#[test]
fn a_folder_with_checkpoints_and_no_roots_is_refused() {
    let pool = pool();
    let memory = Memory::new();
    memory.put(&folder().join("c7.manifest"), &[b' '; 4096]);
    let error = Store::attach(folder(), Box::new(memory), pool.clone()).expect_err("no roots");
    assert!(error.to_string().contains("c7.manifest"), "{error}");
}

#[test]
fn one_job_has_a_folder_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b");
    let open = || {
        let (disk, _) = testudo_state::disk::open(testudo_state::disk::DiskKind::Pwrite).unwrap();
        Store::open(&path, disk)
    };
    let first = open().unwrap();
    let error = open().expect_err("the folder is taken").to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    drop(first);
    let mut again = open().unwrap();
    assert!(again.newest_whole().unwrap().is_none());
}
