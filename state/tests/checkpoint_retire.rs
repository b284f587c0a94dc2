//! Retirement against a model: whatever the history, nothing that is needed is ever removed, and
//! everything that is not goes.

mod checkpoint_common;

use checkpoint_common::{Chance, Job, Shared, contents, folder, manifest};
use std::collections::{BTreeMap, BTreeSet};
use testudo_state::checkpoint::{
    FileRef, Keep, Kind, Manifest, ManifestName, Outcome, Region, RegionName, WorkerFile,
};
use testudo_state::disk::{BUFFER_BYTES, Memory, Pool, What};

const WORKERS: u32 = 3;

/// What the model knows: which files each file names, and which manifests count.
#[derive(Default)]
struct Model {
    /// For each region file: the older ones that it was written to name.
    names: BTreeMap<String, BTreeSet<String>>,
    /// The manifests of the two slots, newest last.
    rooted: Vec<Manifest>,
    /// A failed attempt may have left these in a slot.
    unsure: Vec<Manifest>,
    savepoints: BTreeMap<u64, Manifest>,
}

impl Model {
    fn reached(&self, held: &[FileRef]) -> BTreeSet<String> {
        let manifests = self.rooted.iter().chain(&self.unsure).chain(self.savepoints.values());
        let manifests: Vec<&Manifest> = manifests.collect();
        let files = manifests.iter().flat_map(|m| m.files()).chain(held);
        let mut reached: BTreeSet<String> =
            manifests.iter().map(|m| m.name().to_string()).collect();
        for file in files {
            reached.insert(file.name.clone());
            reached.extend(self.names[&file.name].iter().cloned());
        }
        reached
    }
}

/// A job whose regions fail now and then, and the model beside it.
struct Story {
    chance: Chance,
    job: Job,
    memory: Memory,
    disk: Shared,
    model: Model,
    /// Each worker's last good snapshot, and its epoch.
    good: Vec<Option<(u64, FileRef)>>,
    epoch: u64,
    removed: usize,
}

impl Story {
    fn new(seed: u64, pool: &Pool) -> Self {
        let memory = Memory::new();
        let disk = Shared::new(memory.clone());
        let boxed = || Box::new(disk.clone());
        let job = Job::open(boxed(), boxed(), pool, WORKERS).unwrap();
        let good = vec![None; WORKERS as usize];
        let (model, chance) = (Model::default(), Chance(seed));
        Self { chance, job, memory, disk, model, good, epoch: 0, removed: 0 }
    }

    /// Each worker saves or fails; those that fail are carried over.
    fn save(&mut self) {
        self.epoch += 1;
        self.job.work(&mut self.chance);
        for worker in 0..WORKERS as usize {
            if self.good[worker].is_some() && self.chance.below(4) == 0 {
                continue;
            }
            let saving = &mut self.job.workers[worker];
            let before: BTreeSet<String> =
                saving.chain.needed().into_iter().map(|file| file.name).collect();
            let file = saving.save(&mut *self.job.disk, &self.job.pool, self.epoch).unwrap();
            // The model believes a worker's list only so far as it can be true.
            let chain = self.job.store.chain(&file).unwrap();
            let opened: BTreeSet<String> = chain.files().map(|(_, f)| f.name.clone()).collect();
            assert!(opened.iter().all(|name| *name == file.name || before.contains(name)));
            let mut memory = self.memory.clone();
            let reader = testudo_state::checkpoint::RegionReader::open(
                &mut memory,
                &self.job.pool,
                folder(),
                &file,
            );
            let listed = reader.unwrap().index.files.into_iter().map(|file| file.name);
            self.model.names.insert(file.name.clone(), listed.collect());
            self.good[worker] = Some((self.epoch, file));
        }
    }

    fn commit(&mut self) {
        let mut next = manifest(self.job.store.next_id().unwrap(), self.epoch, &[]);
        if self.chance.below(4) == 0 {
            next.kind = Kind::Savepoint;
        }
        next.regions = (0_u32..)
            .zip(self.good.iter().flatten())
            .map(|(number, (epoch, file))| Region {
                number,
                epoch: *epoch,
                outcome: if *epoch == self.epoch { Outcome::Ok } else { Outcome::CarriedOver },
                workers: vec![WorkerFile { worker: number, file: file.clone() }],
            })
            .collect();
        let fault = ["write", "sync", "rename", "sync the folder"];
        let fails = self.chance.below(5) == 0;
        if fails {
            let kind = self.chance.below(4) as usize;
            let on = fault[kind];
            // The manifest's write and sync, or those of the roots.
            let nth = if kind < 2 { self.chance.below(2) } else { 0 };
            self.disk.0.borrow_mut().fail(on, nth, What::Error(libc::EIO));
        }
        let before = self.disk.0.borrow().injected();
        let committed = self.job.store.commit(&next);
        let is_new = self.memory.names().contains(&folder().join(next.name().to_string()));
        if next.kind == Kind::Savepoint && is_new {
            self.model.savepoints.insert(next.id, next.clone());
        }
        match committed {
            Ok(_) => {
                self.model.unsure.clear();
                self.model.rooted.push(next);
                if self.model.rooted.len() > 2 {
                    self.model.rooted.remove(0);
                }
            }
            Err(error) => {
                assert!(self.disk.0.borrow().injected() > before, "{error}");
                // Only an attempt that came as far as the roots may have left something there.
                let at_roots = error.to_string().contains("roots");
                self.model.unsure.extend(at_roots.then_some(next));
            }
        }
    }

    fn retire(&mut self) {
        let held: Vec<FileRef> = self.good.iter().flatten().map(|(_, file)| file.clone()).collect();
        let ahead = self.chance.below(2);
        let keep = Keep { running_epoch: self.epoch + ahead, held: &held };
        let Ok(retired) = self.job.store.retire(&keep) else { return };
        assert_eq!(retired.blocked, None);
        self.removed += retired.removed.len();
        let reached = self.model.reached(&held);
        let names = self.memory.names();
        let there: BTreeSet<String> = names
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
            .collect();
        for name in &reached {
            assert!(there.contains(name), "{name} is needed and gone");
        }
        for name in there {
            let running =
                RegionName::parse(&name).is_some_and(|name| name.epoch >= keep.running_epoch);
            let ours = name == "roots" || name == "notes.txt";
            assert!(ours || running || reached.contains(&name), "{name} is not needed and there");
        }
    }

    fn remove_savepoint(&mut self) {
        let Some(id) = self.model.savepoints.keys().next().copied() else { return };
        let rooted = self.model.rooted.iter().chain(&self.model.unsure).any(|m| m.id == id);
        let removed = self.job.store.remove_savepoint(id);
        assert_eq!(removed.is_err(), rooted, "savepoint {id}");
        if removed.is_ok() {
            self.model.savepoints.remove(&id);
        }
    }

    /// Everything that counts can be read.
    fn check(&mut self) {
        let manifests: Vec<Manifest> =
            self.model.rooted.iter().chain(self.model.savepoints.values()).cloned().collect();
        for manifest in manifests {
            let read = contents(&mut self.job, &manifest);
            assert!(read.is_ok(), "{:?}: {read:?}", manifest.name());
        }
    }
}

#[test]
fn nothing_needed_is_removed_and_everything_else_goes() {
    let pool = Pool::new(8 * BUFFER_BYTES);
    let mut removed = 0;
    for seed in 0..60 {
        let mut story = Story::new(seed, &pool);
        story.memory.put(&folder().join("notes.txt"), b"not ours");
        for _ in 0..40 {
            story.save();
            // Some checkpoints are given up by the coordinator after the workers saved.
            if story.chance.below(4) > 0 {
                story.commit();
            }
            match story.chance.below(4) {
                0 | 1 => story.retire(),
                2 => story.remove_savepoint(),
                _ => {}
            }
        }
        story.retire();
        story.check();
        removed += story.removed;
    }
    assert!(removed > 2000, "{removed}");
}

#[test]
fn nothing_is_removed_while_it_is_not_known_what_is_needed() {
    let pool = Pool::new(8 * BUFFER_BYTES);
    let whole = || {
        let mut story = Story::new(3, &pool);
        for _ in 0..6 {
            story.save();
            story.commit();
        }
        story
    };
    let story = whole();
    let names: Vec<_> = story.memory.names();
    let rooted: Vec<String> = story.model.rooted.iter().map(|m| m.name().to_string()).collect();
    for path in &names {
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let is_needed = rooted.contains(&name)
            || name == "roots"
            || ManifestName::parse(&name).is_some_and(|name| name.savepoint)
            || story.model.rooted.iter().any(|m| m.files().any(|f| f.name == name));
        if !is_needed {
            continue;
        }
        let memory = Memory::new();
        for path in &names {
            let mut bytes = story.memory.content(path).unwrap();
            if path.ends_with(&name) {
                // In a slot, a manifest's text, or a header.
                bytes[40] ^= 1;
            }
            memory.put(path, &bytes);
        }
        let mut job = Job::in_memory(&memory, &pool, WORKERS);
        let keep = Keep { running_epoch: 100, held: &[] };
        let retired = job.store.retire(&keep).unwrap();
        assert_eq!(retired.removed, [] as [String; 0], "{name}");
        assert!(retired.blocked.is_some_and(|d| d.file.ends_with(&name)), "{name}");
    }
}
