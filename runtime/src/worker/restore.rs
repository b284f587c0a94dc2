//! Restoring: what the checkpoint that the job goes on from holds for this worker.
//!
//! Two cases. *Same shape*: the same stages on the same workers; each cell means what it meant, and
//! bytes in flight go to the subtask that they were on their way to. *Another shape*: state goes to
//! the owners of its key groups, records in flight are routed again, source parts and sinks'
//! positions are dealt out anew, and everything that only described the old shape begins afresh.
//!
//! Invariants: nothing of a file is believed before its checksum was seen; what was in flight comes
//! before anything new on its channel; all of it is a function of the checkpoint and the plan, so a
//! successor that is killed while it restores does the same again.
//!
//! Called by `attach`.

use crate::checkpoint::notes::{self, Flight, Notes, Part, Spilled};
use crate::config::DiskChoice;
use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::frame::{self, Kind};
use testudo_shm::record::{Batch, Item, Record};
use testudo_shm::zerocopy::IntoBytes;
use testudo_state::checkpoint::{Chain, FileRef, SegmentKey, checksum};
use testudo_state::disk::{self, BLOCK, Disk, DiskKind, Pool};

/// Staging memory for reading.
const STAGING_BYTES: usize = 2 << 20;

/// Records of a spill that are put into one frame.
const FRAME_RECORDS: usize = 1024;

/// What the supervisor says about the checkpoint that the job goes on from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Restore {
    /// Its number.
    pub(crate) id: u64,
    /// The job runs in the shape in which the checkpoint was taken.
    pub(crate) same_shape: bool,
    /// Pages may be brought when they are first touched.
    pub(crate) is_lazy: bool,
    /// Each old worker's newest file.
    pub(crate) files: Vec<(usize, FileRef)>,
    /// Old workers whose spills held records, on their way to any worker.
    pub(crate) spillers: Vec<usize>,
    /// By stage: its number then, and the worker of each of its subtasks.
    pub(crate) stages: Vec<Option<(usize, Vec<usize>)>>,
    /// By edge: the edges then whose records in flight are its own now; first itself, if it was
    /// there.
    pub(crate) edges: Vec<Vec<usize>>,
    /// Parts of sources by source, then by the subtask that reads them now.
    pub(crate) parts: Vec<(String, Vec<Vec<Part>>)>,
}

/// What checkpoints mean to a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Checkpoints {
    /// Where cuts may be written to: the first folder, and the second if there is one.
    pub(crate) folders: Vec<PathBuf>,
    /// Which of them the job goes on from, as the control header's word says it.
    pub(crate) from: u64,
    pub(crate) job: u64,
    pub(crate) restore: Option<Restore>,
}

impl Checkpoints {
    /// The folder that the job goes on from.
    pub(crate) fn folder(&self) -> &Path {
        self.folder_of(self.from)
    }

    /// The folder that a word of the control header means.
    pub(crate) fn folder_of(&self, word: u64) -> &Path {
        let index = (word & 1) as usize;
        self.folders.get(index).or(self.folders.first()).map_or(Path::new(""), PathBuf::as_path)
    }
}

/// A worker of the run that the checkpoint was taken of.
pub(crate) struct OldWorker {
    pub(crate) worker: usize,
    pub(crate) chain: Arc<Chain>,
    pub(crate) notes: Notes,
    pub(crate) cells: HashMap<u64, Vec<u8>>,
}

/// The checkpoint, open.
pub(crate) struct Restored {
    pub(crate) plan: Restore,
    pub(crate) old: Vec<OldWorker>,
    folder: PathBuf,
    disk: Box<dyn Disk>,
    pool: Pool,
}

/// What was in flight on a channel: frames, of whose first one a part was taken.
#[derive(Debug)]
pub(crate) struct Rest {
    /// The producing subtask.
    pub(crate) from: usize,
    pub(crate) frames: Vec<u8>,
    pub(crate) inner: (u64, u64),
    /// Its producer belongs to an earlier shape of the job.
    pub(crate) is_past: bool,
}

/// Opens the disk that the settings ask for.
pub(crate) fn open_disk(choice: DiskChoice) -> Result<(Box<dyn Disk>, Option<String>), Error> {
    let kind = match choice {
        DiskChoice::Auto => DiskKind::Auto,
        DiskChoice::Uring => DiskKind::Uring,
        DiskChoice::Pwrite => DiskKind::Pwrite,
    };
    let opened = disk::open(kind);
    let (disk, why) = opened.map_err(|e| Error::Machine(format!("checkpoints: {e}")))?;
    Ok((crate::testing::gated(disk), why))
}

impl Restored {
    /// Opens those files of the checkpoint that worker `own` needs: in another shape, all of them.
    pub(crate) fn open(
        folder: &Path,
        plan: &Restore,
        own: usize,
        choice: DiskChoice,
    ) -> Result<Self, Error> {
        let (mut disk, _) = open_disk(choice)?;
        let pool = Pool::new(STAGING_BYTES);
        let is_needed =
            |worker: usize| !plan.same_shape || worker == own || plan.spillers.contains(&worker);
        let needed = plan.files.iter().filter(|(worker, _)| is_needed(*worker));
        let old = needed.map(|(worker, file)| {
            let chain = Arc::new(Chain::open(&mut *disk, &pool, folder, file)?);
            OldWorker::read(*worker, chain, &mut *disk, &pool, folder)
        });
        let old = old.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { plan: plan.clone(), old, folder: folder.into(), disk, pool })
    }

    /// The old worker that held a segment, and the segment's place in its chain.
    pub(crate) fn holder(&self, key: &SegmentKey) -> Option<(usize, usize)> {
        let found = |(index, old): (usize, &OldWorker)| Some((index, old.chain.segment(key)?));
        self.old.iter().enumerate().find_map(found)
    }

    /// Everything that was on its way to subtask `to` of an edge, in the order in which it is to be
    /// taken. `wanted` says whether a record belongs here, where all must be looked at.
    pub(crate) fn rests<T: Record>(
        &mut self,
        edge: usize,
        to: (usize, usize),
        mut wanted: Option<&mut dyn FnMut(Item<'_, T>) -> bool>,
    ) -> Result<Vec<Rest>, Error> {
        let mut rests = Vec::new();
        let edges = self.plan.edges.get(edge).cloned().unwrap_or_default();
        for old in 0..self.old.len() {
            let is_mine = |target: usize| match &wanted {
                _ if self.plan.same_shape => target == to.0,
                Some(_) => true,
                None => target % to.1 == to.0,
            };
            let notes = &self.old[old].notes;
            let flights = notes.flights.iter().filter(|f| edges.contains(&f.edge) && is_mine(f.to));
            let flights: Vec<Flight> = flights.cloned().collect();
            let spills = notes.spills.iter().filter(|s| edges.contains(&s.edge) && is_mine(s.to));
            let spills: Vec<Spilled> = spills.cloned().collect();
            for flight in flights {
                let frames = self.blob(old, &flight.blob)?;
                let is_past = flight.is_past || !self.plan.same_shape;
                let rest = Rest { from: flight.from, frames, inner: flight.inner, is_past };
                rests.push((1 - usize::from(flight.is_rest), rest));
            }
            for spill in spills {
                let frames = self.spill_frames::<T>(old, &spill)?;
                let is_past = !self.plan.same_shape;
                rests.push((2, Rest { from: spill.from, frames, inner: (0, 0), is_past }));
            }
        }
        // What spilled was emitted after what its producer had got into the ring, and that after
        // what was in flight when the run before was stopped. Of that, each worker has noted first
        // what is to be taken first, whoever sent it.
        rests.sort_by_key(|(order, _)| *order);
        let mut rests: Vec<Rest> = rests.into_iter().map(|(_, rest)| rest).collect();
        if !self.plan.same_shape
            && let Some(wanted) = &mut wanted
        {
            for rest in &mut rests {
                pick(rest, wanted)?;
            }
        }
        Ok(rests)
    }

    fn blob(&mut self, old: usize, name: &str) -> Result<Vec<u8>, Error> {
        self.old[old].blob(name, &mut *self.disk, &self.pool, &self.folder)
    }

    /// The records of a spill as frames.
    fn spill_frames<T: Record>(&mut self, old: usize, spill: &Spilled) -> Result<Vec<u8>, Error> {
        let lanes = self.old[old].chain.segments().iter();
        let key = lanes
            .map(testudo_state::checkpoint::SegmentEntry::key)
            .find(|key| {
                key.kind == notes::SPILL
                    && key.operator == spill.edge as u64
                    && key.group == spill.lane as u32
            })
            .ok_or_else(|| damaged(format!("the spill of edge {} is missing", spill.edge)))?;
        let bytes = self.segment_bytes(old, &key, spill.begin, spill.end)?;
        let mut aligned = vec![0u64; bytes.len().div_ceil(8)];
        aligned.as_mut_bytes()[..bytes.len()].copy_from_slice(&bytes);
        let mut rest = &aligned.as_bytes()[..bytes.len()];
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let (begin, mut count) = (rest, 0);
            while !rest.is_empty() && count < FRAME_RECORDS {
                T::take(&mut rest).map_err(|fault| damaged(format!("a spill: {fault}")))?;
                count += 1;
            }
            let payload = &begin[..begin.len() - rest.len()];
            frame::append(&mut frames, Kind::Data, count, payload);
        }
        Ok(frames)
    }

    /// Bytes [begin, end) of a segment.
    pub(crate) fn segment_bytes(
        &mut self,
        old: usize,
        key: &SegmentKey,
        begin: u64,
        end: u64,
    ) -> Result<Vec<u8>, Error> {
        let chain = &self.old[old].chain;
        let segment = chain.segment(key).unwrap_or(0);
        let block = BLOCK as u64;
        let mut bytes = Vec::new();
        for page in begin / block..end.div_ceil(block) {
            let place = chain.find(segment, page as u32);
            match place {
                None => bytes.extend_from_slice(&[0; BLOCK]),
                Some(place) => {
                    let file = &chain.file(place.file).map_or("", |file| &file.name);
                    let path = self.folder.join(file);
                    let found =
                        disk::read_file(&mut *self.disk, &self.pool, &path, place.at, block, block);
                    let found = found.map_err(|error| damaged(error.to_string()))?;
                    if checksum(&found) != place.checksum {
                        return Err(damaged(format!("{}, byte {}", path.display(), place.at)));
                    }
                    bytes.extend_from_slice(&found);
                }
            }
        }
        let skip = (begin % block) as usize;
        Ok(bytes[skip..skip + (end - begin) as usize].to_vec())
    }
}

impl OldWorker {
    /// Reads notes and cells.
    pub(crate) fn read(
        worker: usize,
        chain: Arc<Chain>,
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
    ) -> Result<Self, Error> {
        let (notes, cells) = (Notes::default(), HashMap::new());
        let mut old = Self { worker, chain, notes, cells };
        let text = old.blob(notes::NOTES, disk, pool, folder)?;
        old.notes = serde_json::from_slice(&text)
            .map_err(|error| damaged(format!("the notes of worker {worker}: {error}")))?;
        if old.notes.version != notes::VERSION {
            return Err(damaged(format!(
                "the notes of worker {worker} have version {}, this program reads {}",
                old.notes.version,
                notes::VERSION
            )));
        }
        let cells = old.blob(notes::CELLS, disk, pool, folder)?;
        let cells = notes::unpack_cells(&cells).ok_or_else(|| {
            damaged(format!("the cells of worker {worker} do not fit themselves"))
        })?;
        old.cells = cells.into_iter().collect();
        Ok(old)
    }

    fn blob(
        &self,
        name: &str,
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
    ) -> Result<Vec<u8>, Error> {
        let blob = self.chain.blob(name);
        let blob = blob.ok_or_else(|| damaged(format!("blob {name} is missing")))?;
        Ok(self.chain.read_blob(disk, pool, folder, blob)?)
    }
}

fn damaged(what: String) -> Error {
    Error::Damaged(format!("the checkpoint is damaged: {what}; resume from an older one"))
}

/// Keeps the records of a channel that belong here, and all marks.
fn pick<T: Record>(
    rest: &mut Rest,
    wanted: &mut &mut dyn FnMut(Item<'_, T>) -> bool,
) -> Result<(), Error> {
    let faulty = |fault| damaged(format!("bytes in flight: {fault}"));
    let mut frames = Consumer::over(&rest.frames, 0);
    let (mut out, mut skip) = (Vec::new(), rest.inner);
    frames.look();
    while let Some(frame) = frames.frame() {
        match frame {
            Frame::Data { bytes, count } => {
                let (from, taken) = std::mem::take(&mut skip);
                let bytes = bytes.get(from as usize..).unwrap_or_default();
                let left = count.saturating_sub(taken as usize);
                let batch: Batch<'_, T> = Batch::check(bytes, left, 0).map_err(faulty)?;
                let (mut payload, mut kept) = (Vec::new(), 0);
                for item in batch.iter().filter(|item| wanted(*item)) {
                    let at = payload.len();
                    payload.resize(at + T::item_len(item), 0);
                    T::put_item(item, &mut payload[at..]);
                    kept += 1;
                }
                if kept > 0 {
                    frame::append(&mut out, Kind::Data, kept, &payload);
                }
            }
            Frame::Mark(mark) => frame::append(&mut out, Kind::Mark, 0, mark.as_bytes()),
            Frame::End => frame::append(&mut out, Kind::End, 0, &[]),
        }
        frames.take();
    }
    if let Some(fault) = frames.fault() {
        return Err(faulty(fault));
    }
    (rest.frames, rest.inner) = (out, (0, 0));
    Ok(())
}
