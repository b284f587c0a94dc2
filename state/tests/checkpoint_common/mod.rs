//! A job that saves and restores on a disk in memory, and a judge outside it who knows what each
//! checkpoint must hold.
//!
//! Invariant: the judge looks only at what a restore would look at.

#![allow(dead_code, reason = "each test file uses a part")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use testudo_state::checkpoint::{
    Chain, Damage, FileRef, Kind, Manifest, Operator, Outcome as Part, Region, RegionHeader,
    RegionWriter, SegmentEntry, Store, WorkerFile, checksum,
};
use testudo_state::disk::{
    self, BLOCK, Disk, Done, Faulty, Memory, Op, Outcome, Pool, Ticket, run_now,
};

pub(crate) const JOB: u64 = 0x07e5_70d0;

/// The folder of all tests in memory.
pub(crate) fn folder() -> &'static Path {
    Path::new("/ck")
}

/// Small, reproducible chance.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// A disk that several hold.
#[derive(Clone)]
pub(crate) struct Shared(pub(crate) Rc<RefCell<Faulty<Memory>>>);

impl Shared {
    pub(crate) fn new(memory: Memory) -> Self {
        Self(Rc::new(RefCell::new(Faulty::new(memory))))
    }
}

impl Disk for Shared {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        self.0.borrow_mut().submit(op)
    }
    fn poll(&mut self, done: &mut Vec<Done>) {
        self.0.borrow_mut().poll(done);
    }
    fn wait(&mut self, patience: Duration) {
        self.0.borrow_mut().wait(patience);
    }
    fn in_flight(&self) -> usize {
        self.0.borrow().in_flight()
    }
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        self.0.borrow().list(folder)
    }
    fn kind(&self) -> &'static str {
        self.0.borrow().kind()
    }
}

/// A block that only this value has.
pub(crate) fn block_of(value: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    for (n, word) in block.chunks_mut(8).enumerate() {
        word.copy_from_slice(&value.wrapping_mul(n as u64 + 1).to_le_bytes());
    }
    block
}

pub(crate) fn segment(group: u32, pages: u64) -> SegmentEntry {
    let bytes = pages * BLOCK as u64;
    SegmentEntry { operator: 77, kind: 1, group, groups: 8, schema: 5, bytes, since: 0 }
}

/// Bytes that differ with `value` and are `length` long.
pub(crate) fn blob_of(value: u64, length: usize) -> Vec<u8> {
    block_of(value).iter().cycle().take(length).copied().collect()
}

/// What a worker holds: (segment, page) → value.
pub(crate) type Pages = BTreeMap<(u32, u32), u64>;

/// One worker at one cut.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Snapshot {
    pub(crate) pages: Pages,
    pub(crate) cells: Vec<u8>,
}

pub(crate) const PAGES: u64 = 16;

/// A worker that saves what changed.
pub(crate) struct Worker {
    pub(crate) number: u32,
    pub(crate) segments: u32,
    pub(crate) chain: Chain,
    pub(crate) now: Snapshot,
    pub(crate) dirty: BTreeSet<(u32, u32)>,
}

impl Worker {
    pub(crate) fn new(number: u32, segments: u32) -> Self {
        let (chain, now) = (Chain::empty(), Snapshot::default());
        Self { number, segments, chain, now, dirty: BTreeSet::new() }
    }

    pub(crate) fn put(&mut self, segment: u32, page: u32, value: u64) {
        self.now.pages.insert((segment, page), value);
        self.dirty.insert((segment, page));
    }

    /// Encodes a file of this epoch: (index, reference, blocks by number).
    pub(crate) fn encode(&mut self, epoch: u64) -> (Vec<u8>, FileRef, Vec<[u8; BLOCK]>) {
        let header = RegionHeader { job: JOB, worker: self.number, epoch, incarnation: epoch };
        let mut writer = RegionWriter::new(header);
        for group in 0..self.segments {
            writer.add_segment(segment(group, PAGES));
        }
        // A file of which little is left is written again and not named any more.
        let mut pages = self.dirty.clone();
        for file in self.chain.needed() {
            let number = self.chain.files().find(|(_, f)| **f == file).expect("it is needed").0;
            if self.chain.live(number) * 3 < file.blocks() {
                pages.extend(self.chain.pages_in(number).map(|(s, p, _)| (s as u32, p)));
            } else {
                writer.add_file(file);
            }
        }
        let mut blocks = vec![writer.header_block()];
        for key in pages {
            let block = block_of(self.now.pages[&key]);
            let number = writer.add_block(key.0, key.1, &block);
            assert_eq!(number as usize + 1, blocks.len());
            blocks.push(block);
        }
        let numbers = writer.add_blob("cells", &self.now.cells);
        for n in 0..numbers.len() {
            let mut block = [0; BLOCK];
            testudo_state::checkpoint::region::blob_block(&self.now.cells, n, &mut block);
            blocks.push(block);
        }
        writer.add_blob("nothing", &[]);
        let (index, file) = writer.finish();
        (index, file, blocks)
    }

    /// Writes what changed since the last save; all of it is durable when this returns.
    pub(crate) fn save(
        &mut self,
        disk: &mut dyn Disk,
        pool: &Pool,
        epoch: u64,
    ) -> io::Result<FileRef> {
        let (index, file, blocks) = self.encode(epoch);
        write_region(disk, pool, &file, &blocks, &index)?;
        self.chain.append(JOB, file.clone(), index).expect("it was just encoded");
        self.dirty.clear();
        Ok(file)
    }
}

/// Creates a region file, last blocks first.
pub(crate) fn write_region(
    disk: &mut dyn Disk,
    pool: &Pool,
    file: &FileRef,
    blocks: &[[u8; BLOCK]],
    index: &[u8],
) -> io::Result<()> {
    let (outcome, _) = run_now(disk, Op::Create { path: folder().join(&file.name) })?;
    let Outcome::File(id) = outcome else { panic!("creating gave {outcome:?}") };
    let mut write = || {
        disk::write_at(disk, pool, id, file.index_at, index)?;
        for (n, block) in blocks.iter().enumerate().rev() {
            disk::write_at(disk, pool, id, (n * BLOCK) as u64, block)?;
        }
        run_now(disk, Op::Sync { file: id }).map(|_| ())
    };
    let written = write();
    let closed = run_now(disk, Op::Close { file: id });
    written.and(closed.map(|_| ()))
}

pub(crate) fn manifest(id: u64, epoch: u64, files: &[FileRef]) -> Manifest {
    let regions = files.iter().zip(0..).map(|(file, worker)| Region {
        number: worker,
        epoch,
        outcome: Part::Ok,
        workers: vec![WorkerFile { worker, file: file.clone() }],
    });
    Manifest {
        version: 1,
        id,
        kind: Kind::Checkpoint,
        job: "counts".into(),
        job_id: JOB,
        plan: 0x91a4,
        started_ms: 1_763_628_000_000,
        finished_ms: 1_763_628_000_150,
        groups: 8,
        workers: files.len() as u32,
        finished: false,
        operators: vec![Operator {
            uid: "count".into(),
            name: "Count \"words\" – all".into(),
            schema: u64::MAX,
            grouping: "key".into(),
        }],
        regions: regions.collect(),
        previous: None,
        figures: BTreeMap::from([("bytes".to_string(), 12345)]),
    }
}

/// A job of several workers and its store.
pub(crate) struct Job {
    pub(crate) pool: Pool,
    pub(crate) store: Store,
    pub(crate) workers: Vec<Worker>,
    pub(crate) disk: Box<dyn Disk>,
}

impl Job {
    /// Opens a folder that is on `disk`; `second` is the same disk, for the workers.
    pub(crate) fn open(
        disk: Box<dyn Disk>,
        second: Box<dyn Disk>,
        pool: &Pool,
        workers: u32,
    ) -> Result<Self, testudo_state::checkpoint::StoreError> {
        let store = Store::attach(folder(), disk, pool.clone())?;
        let workers = (0..workers).map(|number| Worker::new(number, 2)).collect();
        Ok(Self { pool: pool.clone(), store, workers, disk: second })
    }

    pub(crate) fn in_memory(memory: &Memory, pool: &Pool, workers: u32) -> Self {
        Self::open(Box::new(memory.clone()), Box::new(memory.clone()), pool, workers)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Changes a few pages of each worker.
    pub(crate) fn work(&mut self, chance: &mut Chance) {
        for worker in &mut self.workers {
            for _ in 0..1 + chance.below(4) {
                let (segment, page) = (chance.below(2) as u32, chance.below(PAGES) as u32);
                worker.put(segment, page, chance.below(u64::MAX));
            }
            let length = chance.below(9000) as usize;
            worker.now.cells = blob_of(chance.below(u64::MAX), length);
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<Snapshot> {
        self.workers.iter().map(|worker| worker.now.clone()).collect()
    }

    /// Saves all workers, and gives their files.
    pub(crate) fn save(&mut self, epoch: u64) -> io::Result<Vec<FileRef>> {
        let (disk, pool) = (&mut *self.disk, &self.pool);
        self.workers.iter_mut().map(|worker| worker.save(disk, pool, epoch)).collect()
    }

    /// A whole checkpoint; its number and epoch are the same.
    pub(crate) fn checkpoint(&mut self, id: u64) -> Result<Manifest, String> {
        let files = self.save(id).map_err(|e| e.to_string())?;
        let manifest = manifest(id, id, &files);
        self.store.commit(&manifest).map_err(|e| e.to_string())?;
        Ok(manifest)
    }

    /// Goes back to a checkpoint.
    pub(crate) fn restore(&mut self, manifest: &Manifest) -> Result<(), Damage> {
        for (worker, file) in self.workers.iter_mut().zip(manifest.files()) {
            worker.chain = self.store.chain(file)?;
            worker.now = read_back(&mut *self.disk, &self.pool, &worker.chain)?;
            worker.dirty.clear();
        }
        Ok(())
    }
}

/// Reads all that a chain holds, as a restore does.
pub(crate) fn read_back(
    disk: &mut dyn Disk,
    pool: &Pool,
    chain: &Chain,
) -> Result<Snapshot, Damage> {
    let mut pages = Pages::new();
    let mut files: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for (number, file) in chain.files() {
        let path = folder().join(&file.name);
        let read = disk::read_file(disk, pool, &path, 0, file.bytes, u64::MAX);
        let read = read.map_err(|e| Damage { file: path, at: 0, what: e.to_string() })?;
        files.insert(number, read);
    }
    for (n, segment) in chain.segments().iter().enumerate() {
        for (page, place) in chain.pages(n) {
            let at = place.at as usize;
            let block = &files[&place.file][at..at + BLOCK];
            if checksum(block) != place.checksum {
                let name = &chain.file(place.file).expect("a place's file").name;
                let (file, what) = (PathBuf::from(name), "a block".into());
                return Err(Damage { file, at: place.at, what });
            }
            assert_eq!(chain.find(n, page), Some(place));
            let value = u64::from_le_bytes(block[..8].try_into().unwrap());
            assert_eq!(block, block_of(value), "not what anybody wrote");
            pages.insert((segment.group, page), value);
        }
    }
    let blob = chain.blob("cells").expect("every file has one").clone();
    let cells = chain.read_blob(disk, pool, folder(), &blob)?;
    Ok(Snapshot { pages, cells })
}

/// What a checkpoint holds, read through a store.
pub(crate) fn contents(job: &mut Job, manifest: &Manifest) -> Result<Vec<Snapshot>, Damage> {
    let files: Vec<FileRef> = manifest.files().cloned().collect();
    files
        .iter()
        .map(|file| {
            let chain = job.store.chain(file)?;
            read_back(&mut *job.disk, &job.pool, &chain)
        })
        .collect()
}
