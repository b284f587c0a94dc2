//! The cut: this worker's part of a checkpoint, taken at a step boundary while everything goes on.
//!
//! ```text
//! snapshot   tails of own rings, heads of input rings, cells, list of changed blocks: O(positions)
//! flights    bytes between own head and the sender's tail, both at the cut, are copied; until then
//!            the head that the sender sees stands still (R15)
//! blocks     copied to staging memory a few a step, or by the first store to one (R14)
//! file       header, blocks, flights, cells, notes, index; written, synced; then acknowledged
//! ```
//!
//! Invariants:
//! - sinks prepare before the cells are taken, and commit once a complete checkpoint holds the
//!   cut;
//! - the epoch is loaded after the tails of the same step (R5), and the snapshot is the step's
//!   first act: nothing that was sent after the sender's cut was taken before ours;
//! - nobody waits for this worker, and it waits for no other: what a death leaves open fails;
//! - a cut that failed, or that no complete checkpoint refers to, leaves its blocks changed: the
//!   next file holds them again, and no file ever refers to one that may be removed.
//!
//! Called by the step loop: `boundary` before anything is taken, `advance` after the publication.

use super::context::{Cx, InRing, Origin};
use super::restore::Checkpoints;
use super::save::{Saved, Saver};
use crate::checkpoint::notes::{self, Flight, Notes, Part, Shape, Spilled};
use crate::sink::Cut;
use crate::testing::{Point, point};
use crate::time::{now_ns, thread_ns};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use testudo_shm::cell::Cells;
use testudo_shm::header::{CutFailure, CutWords, RegionWords};
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_shm::txn::{Place, Txn};
use testudo_state::checkpoint::index::{FileRef, SegmentEntry, SegmentKey};
use testudo_state::checkpoint::region::{RegionHeader, RegionWriter, blob_block};
use testudo_state::disk::BLOCK;

/// Blocks that one step copies to staging memory.
const BLOCKS_A_STEP: usize = 32;

/// Ring bytes that one step copies.
const FLIGHT_BYTES_A_STEP: usize = 256 << 10;

/// Files that a worker's state may be spread over before the one with the least left is rewritten.
const FILES_MAX: usize = 24;

/// A segment whose blocks this worker saves.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) key: SegmentKey,
    pub(crate) schema: u64,
    /// Arena offset and reserved bytes.
    pub(crate) at: u64,
    pub(crate) bytes: u64,
    pub(crate) extent: Extent,
}

/// Which part of a segment is state.
#[derive(Debug, Clone)]
pub(crate) enum Extent {
    /// From the begin up to what this word says.
    Group { used: Place<u64> },
    /// What a spill holds between two cells.
    Spill { head: Place<u64>, tail: Place<u64>, from: usize, to: usize },
}

/// What a worker's cuts need to know, fixed at attach.
#[derive(Debug)]
pub(crate) struct CutPlan {
    pub(crate) job: u64,
    pub(crate) worker: usize,
    pub(crate) incarnation: u64,
    pub(crate) shape: u64,
    pub(crate) was: Shape,
    /// Where files go.
    pub(crate) checkpoints: Checkpoints,
    /// Copies of blocks at most, in blocks.
    pub(crate) copies_max: usize,
    pub(crate) cells: Rc<Cells>,
    pub(crate) counters: Vec<(String, Place<u64>)>,
    pub(crate) parts: Vec<Part>,
    /// Schemas of operators' state, by uid.
    pub(crate) states: Vec<(String, u64)>,
    /// By arena offset, ascending.
    pub(crate) held: Vec<Held>,
    /// The words of each input ring's producer; `None` for a process that is no worker.
    pub(crate) producers: Vec<Option<&'static CutWords>>,
}

/// A ring whose bytes in flight are being copied.
#[derive(Debug)]
struct Copying {
    ring: usize,
    /// Position up to which bytes were copied.
    at: u64,
    /// The sender's tail at its cut, once known.
    tail: Option<u64>,
    bytes: Vec<u8>,
    flight: Flight,
}

/// The cut that is being written.
#[derive(Debug)]
struct OpenCut {
    epoch: u64,
    /// The file's number in the ledger.
    number: u32,
    writer: RegionWriter,
    /// Blocks that the file will have, about.
    blocks: usize,
    /// Pages of each segment that are state.
    pages: Vec<u64>,
    notes: Notes,
    cells: Vec<u8>,
    copying: Vec<Copying>,
    /// Bytes to write behind the blocks, and how many blocks of them are written.
    blobs: VecDeque<Vec<u8>>,
    blob_blocks: usize,
    stage: Stage,
    file: Option<FileRef>,
    flight_bytes: u64,
    is_full: bool,
    failure: Option<CutFailure>,
    begun_ns: u64,
    pause_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Room,
    Blocks,
    Flights,
    Blobs,
    Index,
    Writing,
}

/// Where each page was last saved: which files are still needed, and what for.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// By segment and page: the file, as an index into `files`; [`NOWHERE`] when never saved.
    pages: Vec<Vec<u32>>,
    files: Vec<LedgerFile>,
}

#[derive(Debug)]
struct LedgerFile {
    epoch: u64,
    file: FileRef,
    blocks: u64,
    live: u64,
}

const NOWHERE: u32 = u32::MAX;

impl Ledger {
    pub(crate) fn new(segments: usize) -> Self {
        Self { pages: vec![Vec::new(); segments], files: Vec::new() }
    }

    /// A file with nothing noted in it yet; its number, which another file had that nothing is
    /// needed from.
    pub(crate) fn add_file(&mut self, epoch: u64, file: FileRef) -> u32 {
        let file = LedgerFile { epoch, blocks: file.blocks(), file, live: 0 };
        match self.files.iter_mut().enumerate().find(|(_, old)| old.live == 0) {
            Some((number, old)) => {
                *old = file;
                number as u32
            }
            None => {
                self.files.push(file);
                (self.files.len() - 1) as u32
            }
        }
    }

    /// A segment will have so many pages noted.
    pub(crate) fn make_room(&mut self, segment: usize, pages: u64) {
        self.pages[segment].resize(pages as usize, NOWHERE);
    }

    /// A file that was there before this process: each has a number of its own.
    pub(crate) fn add_first_file(&mut self, epoch: u64, file: FileRef) -> u32 {
        self.files.push(LedgerFile { epoch, blocks: file.blocks(), file, live: 0 });
        (self.files.len() - 1) as u32
    }

    /// The newest bytes of a page are in this file.
    pub(crate) fn note(&mut self, segment: usize, page: u64, file: u32) {
        let pages = &mut self.pages[segment];
        let page = page as usize;
        if pages.len() <= page {
            pages.resize(page + 1, NOWHERE);
        }
        let old = std::mem::replace(&mut pages[page], file);
        if let Some(old) = self.files.get_mut(old as usize) {
            old.live -= 1;
        }
        self.files[file as usize].live += 1;
    }

    /// Files that hold the newest bytes of some page, newest first, without number `but`.
    fn needed(&self, but: u32) -> Vec<FileRef> {
        let others = self.files.iter().enumerate();
        let mut needed: Vec<_> = others
            .filter(|(number, file)| *number as u32 != but && file.live > 0)
            .map(|(_, file)| file)
            .collect();
        needed.sort_unstable_by_key(|file| std::cmp::Reverse(file.epoch));
        needed.into_iter().map(|file| file.file.clone()).collect()
    }

    /// The file that is best written again: more than half of it is outdated, or there are many.
    fn wasteful(&self) -> Option<u32> {
        let live = self.files.iter().enumerate().filter(|(_, file)| file.live > 0);
        let count = live.clone().count();
        let (number, least) = live.min_by_key(|(_, file)| file.live)?;
        let is_wasteful = least.live * 2 < least.blocks || count > FILES_MAX;
        (is_wasteful && count > 1).then_some(number as u32)
    }

    /// All pages whose newest bytes are in some file.
    fn all(&self) -> impl Iterator<Item = (usize, u64)> {
        self.pages.iter().enumerate().flat_map(|(segment, pages)| {
            let saved = pages.iter().enumerate().filter(|(_, at)| **at != NOWHERE);
            saved.map(move |(page, _)| (segment, page as u64))
        })
    }

    /// The pages whose newest bytes are in a file.
    fn live(&self, file: u32) -> impl Iterator<Item = (usize, u64)> {
        self.pages.iter().enumerate().flat_map(move |(segment, pages)| {
            let of_file = pages.iter().enumerate().filter(move |(_, at)| **at == file);
            of_file.map(move |(page, _)| (segment, page as u64))
        })
    }
}

/// A worker's cuts.
#[derive(Debug)]
pub(crate) struct Cutter {
    plan: CutPlan,
    region: &'static RegionWords,
    words: &'static CutWords,
    /// The supervisor's word on where files go, and what it was for the last cut.
    folder: &'static AtomicU64,
    folder_was: u64,
    saver: Saver,
    /// The latest cut that this worker has taken part in, or joined the job at.
    epoch: u64,
    /// The cut up to which this worker's sinks have committed.
    committed: u64,
    /// What it took is not settled yet.
    unsettled: bool,
    ledger: Ledger,
    open: Option<OpenCut>,
}

impl Cutter {
    /// Joins: a cut that is open at this moment is not for this incarnation.
    pub(crate) fn new(
        plan: CutPlan,
        (region, words, folder): (&'static RegionWords, &'static CutWords, &'static AtomicU64),
        saver: Saver,
        ledger: Ledger,
        txn: &mut Txn,
    ) -> Self {
        // Only state is behind the first segment of it: so many blocks a file has at least.
        let first = plan.held.iter().find(|held| held.key.kind != notes::SPILL);
        let first = first.map_or(u64::MAX, |held| held.at / BLOCK as u64);
        txn.with_tracker(|tracker| tracker.count_from(first));
        let epoch = region.epoch.load(Ordering::Acquire);
        words.joined.store(epoch, Ordering::Release);
        let folder_was = plan.checkpoints.from;
        Self {
            plan,
            region,
            words,
            folder,
            folder_was,
            saver,
            epoch,
            committed: 0,
            unsettled: false,
            ledger,
            open: None,
        }
    }

    /// The latest cut that is behind this worker: one that it has taken part in, joined the job at,
    /// or went on from.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.max(self.region.good.load(Ordering::Acquire))
    }

    /// Whether a cut of this worker is open: the worker then must not sleep for long.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Sleeps a moment, while there is nothing else to do.
    pub(crate) fn wait(&mut self) {
        self.saver.wait(std::time::Duration::from_micros(50));
    }

    /// What is noted in the file besides state; nothing of what is in flight is known yet.
    fn notes(&self, txn: &Txn, spills: Vec<Spilled>) -> Notes {
        let counters = self.plan.counters.iter();
        Notes {
            version: notes::VERSION,
            worker: self.plan.worker,
            shape: self.plan.shape,
            was: self.plan.was.clone(),
            counters: counters.map(|(label, at)| (label.clone(), txn.get(*at))).collect(),
            flights: Vec::new(),
            spills,
            parts: self.plan.parts.clone(),
            states: self.plan.states.clone(),
        }
    }

    /// Whether a cut begins with this worker's next step.
    pub(crate) fn is_due(&self) -> bool {
        self.region.epoch.load(Ordering::Acquire) != self.epoch
    }

    /// Whether something waits for this worker's next step: it then must not sleep.
    pub(crate) fn is_called(&self) -> bool {
        let load = |word: &testudo_shm::primitive::AtomicU64| word.load(Ordering::Acquire);
        load(&self.region.epoch) != self.epoch || load(&self.region.good) != self.committed
    }

    /// At a step's boundary, after the tails were looked at: lets sinks commit if a checkpoint has
    /// become complete, and begins a cut if there is a new one. True when sinks have committed.
    #[inline]
    pub(crate) fn boundary(&mut self, cx: &mut Cx, is_done: impl Fn(&Cx) -> bool) -> bool {
        let good = self.region.good.load(Ordering::Acquire);
        let commits = good != self.committed && self.commit(cx, good);
        let epoch = self.region.epoch.load(Ordering::Acquire);
        if epoch != self.epoch && cx.failure.is_none() {
            let is_last = is_done(cx);
            self.begin(cx, Cut { epoch, is_last });
        }
        commits
    }

    /// A complete checkpoint holds the cut `good`. Outside of the step's transaction: a successor
    /// does it again (R13).
    #[cold]
    fn commit(&mut self, cx: &mut Cx, good: u64) -> bool {
        point(Point::Committing);
        let sinks = std::mem::take(&mut cx.sinks);
        let mut is_done = true;
        for sink in &sinks {
            is_done &= sink.commit(cx, good);
        }
        cx.sinks = sinks;
        if cx.failure.is_none() && is_done {
            point(Point::SinksCommitted);
            self.committed = good;
            self.words.committed.store(good, Ordering::Release);
        }
        is_done
    }

    /// A cut begins while the last one, which was given up, is not closed yet: what this worker
    /// takes until it is may be sent after its sender's cut, so it takes no part. Nor does it while
    /// output of a committed step is not written yet.
    fn miss(&mut self, cx: &mut Cx, epoch: u64) {
        self.give_up(cx, CutFailure::Peer);
        self.epoch = epoch;
        self.words.joined.store(epoch, Ordering::Release);
    }

    #[cold]
    fn begin(&mut self, cx: &mut Cx, cut: Cut) {
        let epoch = cut.epoch;
        if self.open.is_some() || cx.sinks.iter().any(|sink| sink.holds_output()) {
            return self.miss(cx, epoch);
        }
        let begun_cpu = thread_ns();
        self.settle(&mut cx.txn);
        self.epoch = epoch;
        // Before the cells are taken: positions of sinks may move.
        prepare(cx, cut);
        for out in &mut cx.out_rings {
            out.ring.note_cut(epoch);
        }
        let copying = self.hold_rings(cx);
        let header = RegionHeader {
            job: self.plan.job,
            worker: self.plan.worker as u32,
            epoch,
            incarnation: self.plan.incarnation,
        };
        let mut writer = RegionWriter::new(header);
        let least = cx.txn.with_tracker(|tracker| tracker.counted()).unwrap_or(0) as u64;
        let (spills, pages, mut also) = self.list_segments(&cx.txn, &mut writer);
        let folder = self.folder.load(Ordering::Acquire);
        if folder != self.folder_was {
            self.move_to(folder, &mut also);
        }
        let (wanted, copies) = (self.wanted(&cx.txn), self.plan.copies_max);
        let taken = cx.txn.with_tracker(|tracker| tracker.begin(also.into_iter(), wanted, copies));
        let cells = self.plan.cells.export(&cx.txn).unwrap_or_default();
        let notes = self.notes(&cx.txn, spills);
        let path = self.plan.checkpoints.folder_of(folder).join(writer.name());
        self.saver.begin(&path, (least + 1) * BLOCK as u64, outputs(cx));
        self.add_header(&writer);
        let index_at = (taken.unwrap_or(0) as u64 + 1) * BLOCK as u64;
        let (name, bytes) = (writer.name(), 0);
        let file = FileRef { name, bytes, index_at, index_bytes: 0, index_checksum: 0 };
        let number = self.ledger.add_file(epoch, file);
        self.unsettled = true;
        self.open = Some(OpenCut {
            epoch,
            number,
            writer,
            blocks: taken.unwrap_or(0),
            pages,
            notes,
            cells: notes::pack_cells(&cells),
            copying,
            blobs: VecDeque::new(),
            blob_blocks: 0,
            stage: Stage::Room,
            file: None,
            flight_bytes: 0,
            is_full: false,
            failure: None,
            begun_ns: now_ns(),
            pause_ns: thread_ns() - begun_cpu,
        });
        point(Point::CutBegun);
    }

    /// Files go to another folder from here on, or to a new one in the same place: what earlier
    /// files hold is not there, so all of it is saved once more. (If this cut fails, its blocks
    /// count as changed, and the next one has them.)
    #[cold]
    fn move_to(&mut self, folder: u64, also: &mut Vec<u64>) {
        self.folder_was = folder;
        let place =
            |(segment, page): (usize, u64)| self.plan.held[segment].at / BLOCK as u64 + page;
        also.extend(self.ledger.all().map(place));
    }

    fn add_header(&mut self, writer: &RegionWriter) {
        if let Some(place) = self.saver.place() {
            *place = writer.header_block();
            self.saver.placed();
        } else {
            self.saver.abandon("no staging memory is free");
        }
    }

    /// What became of the last cut decides whether its blocks count as saved.
    fn settle(&mut self, txn: &mut Txn) {
        if std::mem::take(&mut self.unsettled) {
            let is_good = self.region.good.load(Ordering::Acquire) >= self.epoch;
            txn.with_tracker(|tracker| tracker.settle(is_good));
        }
    }

    /// The heads of all input rings stand still from here on.
    fn hold_rings(&mut self, cx: &mut Cx) -> Vec<Copying> {
        let mut copying = Vec::new();
        for index in 0..cx.in_rings.len() {
            let InRing { ring: Some(ring), edge, from, to, committed, is_held, rest, .. } =
                &mut cx.in_rings[index]
            else {
                continue;
            };
            // A sender that takes no part in cuts has sent what is there.
            let is_worker = self.plan.producers.get(index).is_some_and(Option::is_some);
            let tail = (!is_worker).then(|| ring.seen());
            *is_held = true;
            copying.push(Copying {
                ring: index,
                at: committed[0],
                tail,
                bytes: Vec::new(),
                flight: Flight {
                    blob: String::new(),
                    edge: *edge,
                    from: *from,
                    to: *to,
                    inner: (committed[1], committed[2]),
                    is_rest: rest.is_some(),
                    is_past: *rest == Some(Origin::Past),
                },
            });
        }
        copying
    }

    /// Lists all segments in the file; gives what spills hold, each segment's pages, and the blocks
    /// that must be saved though they did not change.
    fn list_segments(
        &self,
        txn: &Txn,
        writer: &mut RegionWriter,
    ) -> (Vec<Spilled>, Vec<u64>, Vec<u64>) {
        let (mut spills, mut pages, mut also) = (Vec::new(), Vec::new(), Vec::new());
        for held in &self.plan.held {
            let (begin, end) = extent(txn, held);
            let SegmentKey { operator, kind, group, groups } = held.key;
            let bytes = end.next_multiple_of(BLOCK as u64);
            let schema = held.schema;
            let entry = SegmentEntry { operator, kind, group, groups, schema, bytes, since: 0 };
            writer.add_segment(entry);
            pages.push(entry.pages());
            if let Extent::Spill { from, to, .. } = held.extent
                && end > begin
            {
                let blocks = (held.at + begin) / BLOCK as u64..(held.at + bytes) / BLOCK as u64;
                also.extend(blocks);
                let (edge, lane) = (operator as usize, group as usize);
                spills.push(Spilled { edge, lane, from, to, begin, end });
            }
        }
        if let Some(file) = self.ledger.wasteful() {
            let place =
                |(segment, page): (usize, u64)| self.plan.held[segment].at / BLOCK as u64 + page;
            also.extend(self.ledger.live(file).map(place));
        }
        (spills, pages, also)
    }

    /// The blocks that are state, segment by segment: a restore puts those in place together that
    /// lie behind each other both in the file and in memory.
    fn wanted(&self, txn: &Txn) -> Vec<Range<u64>> {
        let blocks = |held: &Held| {
            let (begin, end) = extent(txn, held);
            let block = BLOCK as u64;
            (held.at + begin) / block..(held.at + end).div_ceil(block)
        };
        self.plan.held.iter().map(blocks).collect()
    }

    /// After a step's publication: goes on with the open cut. True when it is over.
    pub(crate) fn advance(&mut self, cx: &mut Cx, now_ns: u64) -> bool {
        let Some(open) = &self.open else { return true };
        if self.region.aborted.load(Ordering::Acquire) >= open.epoch {
            self.give_up(cx, CutFailure::Peer);
        }
        if self.saver.has_failed() {
            self.give_up(cx, CutFailure::Disk);
        } else {
            self.copy_flights(cx);
            self.fill(cx);
        }
        if let Some(saved) = self.saver.pump(now_ns) {
            point(Point::CutSynced);
            self.acknowledge(cx, saved);
            point(Point::CutAcknowledged);
            return true;
        }
        false
    }

    /// Copies a share of what is in flight, and lets go of rings that are done.
    fn copy_flights(&mut self, cx: &mut Cx) {
        let Some(open) = &mut self.open else { return };
        let mut budget = FLIGHT_BYTES_A_STEP;
        let (epoch, producers) = (open.epoch, &self.plan.producers);
        let mut is_orphaned = false;
        open.copying.retain_mut(|copying| {
            let input = &mut cx.in_rings[copying.ring];
            let Some(ring) = &mut input.ring else { return true };
            if copying.tail.is_none() {
                copying.tail = ring.cut_tail(epoch);
                let joined = |words: &&CutWords| words.joined.load(Ordering::Acquire) >= epoch;
                is_orphaned |=
                    producers.get(copying.ring).and_then(Option::as_ref).is_some_and(joined);
            }
            let Some(tail) = copying.tail else { return true };
            // A sender whose cut lies before ours has taken no part in it, whatever it says.
            let Some(left) = tail.checked_sub(copying.at) else {
                is_orphaned = true;
                return true;
            };
            let bytes = (left as usize).min(budget);
            copying.bytes.extend_from_slice(ring.held(copying.at, bytes));
            copying.at += bytes as u64;
            budget -= bytes;
            if copying.at < tail {
                return true;
            }
            input.let_go();
            if !copying.bytes.is_empty() {
                open.flight_bytes += copying.bytes.len() as u64;
                copying.flight.blob = notes::flight_name(open.notes.flights.len());
                open.notes.flights.push(copying.flight.clone());
                open.blobs.push_back(std::mem::take(&mut copying.bytes));
            }
            false
        });
        if is_orphaned {
            self.give_up(cx, CutFailure::Peer);
        }
    }

    /// Fills staging buffers: blocks first, then everything else, the index last.
    fn fill(&mut self, cx: &mut Cx) {
        let Some(open) = &mut self.open else { return };
        let mut budget = BLOCKS_A_STEP;
        while budget > 0 {
            budget -= 1;
            let Some(place) = self.saver.place() else { return };
            let placed = match open.stage {
                Stage::Room => {
                    // Not in the snapshot: fresh memory for a list of many blocks takes its time.
                    open.writer.reserve(open.blocks);
                    open.stage = Stage::Blocks;
                    false
                }
                Stage::Blocks => {
                    let (held, ledger) = (&self.plan.held, &mut self.ledger);
                    let save = |block, bytes: &_| open.add_block(held, ledger, block, bytes, place);
                    match cx.txn.save_next(save) {
                        None => {
                            open.stage = Stage::Flights;
                            false
                        }
                        Some(is_state) => {
                            point(Point::CutCopied);
                            is_state.unwrap_or(false)
                        }
                    }
                }
                Stage::Flights => {
                    let overflowed = cx.txn.with_tracker(|tracker| {
                        tracker.close();
                        tracker.has_overflowed()
                    });
                    if overflowed == Some(true) {
                        self.give_up(cx, CutFailure::Copies);
                        return;
                    }
                    if !open.copying.is_empty() {
                        return;
                    }
                    point(Point::CutReleased);
                    open.add_notes();
                    open.stage = Stage::Blobs;
                    false
                }
                Stage::Blobs => open.next_blob_block(place).unwrap_or_else(|| {
                    open.finish(&mut self.ledger);
                    false
                }),
                Stage::Index => match open.next_blob_block(place) {
                    Some(placed) => placed,
                    None => {
                        open.stage = Stage::Writing;
                        self.saver.complete();
                        return;
                    }
                },
                Stage::Writing => return,
            };
            if placed {
                self.saver.placed();
            }
        }
    }

    /// The cut fails: nothing more is saved, and all rings go on.
    fn give_up(&mut self, cx: &mut Cx, why: CutFailure) {
        let Some(open) = &mut self.open else { return };
        if open.failure.is_some() {
            return;
        }
        open.failure = Some(why);
        open.copying.clear();
        cx.in_rings.iter_mut().for_each(InRing::let_go);
        cx.txn.with_tracker(testudo_shm::blocks::Tracker::close);
        self.saver.abandon("the cut was given up");
    }

    /// The file is over: says so in the header.
    fn acknowledge(&mut self, cx: &mut Cx, saved: Saved) {
        let Some(open) = self.open.take() else { return };
        let failure = match (&saved.result, open.failure) {
            (_, Some(failure)) => Some(failure),
            (Err(_), None) => Some(CutFailure::Disk),
            (Ok(()), None) => None,
        };
        let errno = saved.result.as_ref().err().and_then(testudo_state::disk::os_code).unwrap_or(0);
        let cost = cx.txn.with_tracker(|tracker| tracker.cost()).unwrap_or_default();
        let (words, now) = (self.words, now_ns());
        let set = |word: &testudo_shm::primitive::AtomicU64, value: u64| {
            word.store(value, Ordering::Relaxed);
        };
        set(&words.incarnation, self.plan.incarnation);
        set(&words.failure, failure.map_or(0, |failure| failure as u64));
        set(&words.errno, u64::from(errno.unsigned_abs()));
        if let Some(file) = &open.file {
            set(&words.file_bytes, file.bytes);
            set(&words.index_at, file.index_at);
            set(&words.index_bytes, file.index_bytes);
            set(&words.index_checksum, file.index_checksum);
        }
        set(&words.flight_bytes, open.flight_bytes);
        set(&words.is_full, u64::from(open.is_full));
        set(&words.pause_ns, open.pause_ns);
        set(&words.duration_ns, now.saturating_sub(open.begun_ns));
        set(&words.write_ns, now.saturating_sub(saved.first_write_ns.max(open.begun_ns)));
        set(&words.copied_blocks, cost.blocks);
        set(&words.copied_ns, cost.nanos);
        words.epoch.store(open.epoch, Ordering::Release);
    }
}

impl OpenCut {
    /// Notes and cells follow the flights.
    fn add_notes(&mut self) {
        let mut blobs: Vec<(String, Vec<u8>)> = self
            .notes
            .flights
            .iter()
            .zip(std::mem::take(&mut self.blobs))
            .map(|(flight, bytes)| (flight.blob.clone(), bytes))
            .collect();
        blobs.push((notes::CELLS.into(), std::mem::take(&mut self.cells)));
        let text = serde_json::to_vec(&self.notes).unwrap_or_default();
        blobs.push((notes::NOTES.into(), text));
        for (name, bytes) in blobs {
            self.writer.add_blob(&name, &bytes);
            self.blobs.push_back(bytes);
        }
    }

    fn next_blob_block(&mut self, place: &mut [u8; BLOCK]) -> Option<bool> {
        loop {
            let blob = self.blobs.front()?;
            if self.blob_blocks * BLOCK < blob.len() {
                blob_block(blob, self.blob_blocks, place);
                self.blob_blocks += 1;
                return Some(true);
            }
            self.blobs.pop_front();
            self.blob_blocks = 0;
        }
    }

    /// The index is next: it names the older files that are still needed.
    fn finish(&mut self, ledger: &mut Ledger) {
        let older = ledger.needed(self.number);
        self.is_full = older.is_empty();
        older.into_iter().for_each(|file| self.writer.add_file(file));
        let nothing = RegionHeader { job: 0, worker: 0, epoch: 0, incarnation: 0 };
        let writer = std::mem::replace(&mut self.writer, RegionWriter::new(nothing));
        let (index, file) = writer.finish();
        let own = &mut ledger.files[self.number as usize];
        own.blocks = file.blocks();
        own.file = file.clone();
        self.file = Some(file);
        self.blobs.push_back(index);
        self.stage = Stage::Index;
    }

    /// Puts a block where it goes in the file. False when it is no state: a cell, a log.
    fn add_block(
        &mut self,
        held: &[Held],
        ledger: &mut Ledger,
        block: u64,
        bytes: &[u8; BLOCK],
        place: &mut [u8; BLOCK],
    ) -> bool {
        let at = block * BLOCK as u64;
        let after = held.partition_point(|held| held.at <= at);
        let Some(index) = after.checked_sub(1) else { return false };
        let page = (at - held[index].at) / BLOCK as u64;
        if page >= self.pages[index] {
            return false;
        }
        place.copy_from_slice(bytes);
        self.writer.add_block(index as u32, page as u32, place);
        // What spills is written whole by each cut: no file is needed for it later.
        if matches!(held[index].extent, Extent::Group { .. }) {
            ledger.note(index, page, self.number);
        }
        true
    }
}

/// Has all sinks of this worker prepared for a cut.
fn prepare(cx: &mut Cx, cut: Cut) {
    let sinks = std::mem::take(&mut cx.sinks);
    sinks.iter().for_each(|sink| sink.prepare(cx, cut));
    cx.sinks = sinks;
    point(Point::SinksPrepared);
}

/// The bytes of a segment that are state: [begin, end).
fn extent(txn: &Txn, held: &Held) -> (u64, u64) {
    match held.extent {
        Extent::Group { used } => (0, txn.get(used).min(held.bytes)),
        Extent::Spill { head, tail, .. } => (txn.get(head), txn.get(tail).min(held.bytes)),
    }
}

/// Descriptors of all outputs of this worker, to be synced before a cut is acknowledged (R13).
fn outputs(cx: &Cx) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    for files in &cx.outputs {
        fds.extend(
            files.borrow().iter().filter_map(|file| file.try_clone().ok()).map(OwnedFd::from),
        );
    }
    fds
}
