//! Loading: the state of a checkpoint comes back into its segments, at once or when it is touched.
//!
//! *At once*: the data thread reads everything before the first step. *Lazily* (R16): processing
//! begins at once; who touches a page that is not there waits for just that page, which one helper
//! thread brings, while another reads all pages in the background, in the order in which they lie
//! on the disk. Of the two, the kernel lets only the first to bring a page do it.
//!
//! Invariants:
//! - a page is verified before it is put in place, and put in place whole; one that is there is
//!   never overwritten, so a successor goes on where its predecessor died (what is there is right);
//! - reads land in private memory (R4);
//! - a damaged page ends the process with a word that makes the job go on from an older checkpoint.
//!
//! Called by `attach`.

use super::restore::open_disk;
use crate::config::DiskChoice;
use crate::error::Error;
use crate::testing::{Point, point};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testudo_shm::arena::Arena;
use testudo_shm::missing::Missing;
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_state::checkpoint::{Chain, Place, checksum};
use testudo_state::disk::run_now;
use testudo_state::disk::{BLOCK, BUFFER_BYTES, Buffer, Disk, FileId, Op, Outcome, Pool, Ticket};
use testudo_state::group::looked_at_first;

/// Reads in flight.
const READS: usize = 16;

/// A segment to be loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    /// Which of the chains has it, and where in that.
    pub(crate) chain: usize,
    pub(crate) segment: usize,
    /// Arena offset, and bytes that are state.
    pub(crate) at: usize,
    pub(crate) bytes: usize,
}

/// Everything to be loaded by one worker.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) folder: PathBuf,
    pub(crate) disk: DiskChoice,
    pub(crate) chains: Vec<Arc<Chain>>,
    pub(crate) targets: Vec<Target>,
    pub(crate) bytes_per_s: Option<u64>,
}

/// A page on its way: where it lies and where it goes.
#[derive(Debug, Clone, Copy)]
struct Page {
    /// Chain and number of the file.
    file: (usize, u32),
    place: Place,
    to: usize,
}

/// Where a page goes once it was read.
type Put<'a> = dyn FnMut(usize, &[u8]) -> Result<(), Error> + 'a;

impl Load {
    /// Loads everything now, into memory that nobody uses yet.
    pub(crate) fn at_once(&self, put: &mut Put<'_>) -> Result<(), Error> {
        let (disk, _) = open_disk(self.disk)?;
        let mut stream = Stream::new(disk, self.pages(usize::MAX));
        while stream.advance(self, true, put)? {
            point(Point::Loading);
        }
        Ok(())
    }

    /// These pages, given by arena offset, in the order of the disk: those that are in a file.
    fn pages_at(&self, mut wanted: Vec<usize>) -> Vec<Page> {
        wanted.sort_unstable();
        wanted.dedup();
        let mut pages: Vec<Page> = wanted.into_iter().filter_map(|at| self.find(at)).collect();
        pages.sort_by_key(|page| (page.file, page.place.at));
        pages
    }

    /// All pages among the first bytes of each target, in the order of the disk.
    fn pages(&self, front: usize) -> Vec<Page> {
        let mut pages = Vec::new();
        for target in &self.targets {
            let found = self.chains[target.chain].pages(target.segment);
            let found = found.take_while(|(page, _)| (*page as usize) < front / BLOCK);
            pages.extend(found.map(|(page, place)| Page {
                file: (target.chain, place.file),
                place,
                to: target.at + page as usize * BLOCK,
            }));
        }
        // Mostly in order: a file's blocks lie as they do in memory. This sort makes use of it.
        pages.sort_by_key(|page| (page.file, page.place.at));
        pages
    }

    fn path(&self, (chain, file): (usize, u32)) -> PathBuf {
        self.folder.join(self.chains[chain].file(file).map_or("", |file| &file.name))
    }

    /// The target that an arena offset lies in, or behind.
    fn target(&self, at: usize) -> Option<&Target> {
        let after = self.targets.partition_point(|target| target.at <= at);
        self.targets.get(after.checked_sub(1)?)
    }

    /// The page at an arena offset: `None` where the checkpoint has zeros.
    fn find(&self, at: usize) -> Option<Page> {
        let target = self.target(at)?;
        let page = (at - target.at) / BLOCK;
        if page >= target.bytes / BLOCK {
            return None;
        }
        let place = self.chains[target.chain].find(target.segment, page as u32)?;
        Some(Page { file: (target.chain, place.file), place, to: at })
    }
}

/// Reads pages in the order of the disk, several at a time.
struct Stream {
    disk: Box<dyn Disk>,
    pool: Pool,
    pages: Vec<Page>,
    /// Pages before this one were asked for.
    next: usize,
    open: Option<((usize, u32), FileId)>,
    reading: Vec<(Ticket, usize, usize)>,
    done: Vec<testudo_state::disk::Done>,
    begun: Instant,
    bytes: u64,
}

impl Stream {
    fn new(disk: Box<dyn Disk>, pages: Vec<Page>) -> Self {
        Self {
            disk,
            pool: Pool::new(READS * BUFFER_BYTES),
            pages,
            next: 0,
            open: None,
            reading: Vec::new(),
            done: Vec::new(),
            begun: Instant::now(),
            bytes: 0,
        }
    }

    /// Goes on: false when everything is in place.
    fn advance(&mut self, load: &Load, wait: bool, put: &mut Put<'_>) -> Result<bool, Error> {
        while self.next < self.pages.len() && !self.is_too_fast(load) {
            let file = self.pages[self.next].file;
            if self.open.is_none_or(|(open, _)| open != file) {
                if !self.reading.is_empty() {
                    break;
                }
                self.open_file(load, file)?;
            }
            let Some(buffer) = self.pool.take() else { break };
            if !self.read(buffer)? {
                break;
            }
        }
        if self.reading.is_empty() && self.next == self.pages.len() {
            return Ok(false);
        }
        self.disk.poll(&mut self.done);
        if self.done.is_empty() && wait {
            self.disk.wait(Duration::from_millis(10));
            self.disk.poll(&mut self.done);
        }
        for done in std::mem::take(&mut self.done) {
            let Some(at) = self.reading.iter().position(|(ticket, ..)| *ticket == done.ticket)
            else {
                continue;
            };
            let (_, from, to) = self.reading.swap_remove(at);
            let pages = &self.pages[from..to];
            let path = load.path(pages[0].file);
            let wanted = (to - from) * BLOCK;
            match (done.result, done.buffer) {
                (Ok(Outcome::Read(bytes)), Some(buffer)) if bytes >= wanted => {
                    verify(&path, pages, &buffer[..wanted])?;
                    place_runs(pages, &buffer[..wanted], put)?;
                    self.bytes += wanted as u64;
                }
                (Err(error), _) => {
                    return Err(damaged(&path, pages[0].place.at, &error.to_string()));
                }
                _ => return Err(damaged(&path, pages[0].place.at, "it ends before this page")),
            }
        }
        Ok(true)
    }

    fn is_too_fast(&self, load: &Load) -> bool {
        load.bytes_per_s.is_some_and(|limit| {
            self.bytes as f64 > self.begun.elapsed().as_secs_f64() * limit as f64
        })
    }

    fn open_file(&mut self, load: &Load, file: (usize, u32)) -> Result<(), Error> {
        let failed = |path: &Path, error: std::io::Error| damaged(path, 0, &error.to_string());
        if let Some((of, id)) = self.open.take() {
            run_now(&mut *self.disk, Op::Close { file: id })
                .map_err(|error| failed(&load.path(of), error))?;
        }
        let path = load.path(file);
        match run_now(&mut *self.disk, Op::Open { path: path.clone() }) {
            Ok((Outcome::File(id), _)) => self.open = Some((file, id)),
            Ok(_) => return Err(damaged(&path, 0, "it cannot be opened")),
            Err(error) => return Err(failed(&path, error)),
        }
        Ok(())
    }

    /// Asks for the next run of pages that lie behind each other in the open file.
    fn read(&mut self, buffer: Buffer) -> Result<bool, Error> {
        let Some((file, id)) = self.open else { return Ok(false) };
        let first = self.pages[self.next];
        let rest = self.pages[self.next..].iter().zip(0u64..);
        let run = rest.take_while(|(page, number)| {
            let at = first.place.at + number * BLOCK as u64;
            page.file == file && page.place.at == at && *number < (BUFFER_BYTES / BLOCK) as u64
        });
        let count = run.count();
        let op = Op::Read { file: id, at: first.place.at, buffer, bytes: count * BLOCK };
        let Ok(ticket) = self.disk.submit(op) else { return Ok(false) };
        self.reading.push((ticket, self.next, self.next + count));
        self.next += count;
        Ok(true)
    }
}

fn verify(path: &Path, pages: &[Page], bytes: &[u8]) -> Result<(), Error> {
    for (page, bytes) in pages.iter().zip(bytes.chunks_exact(BLOCK)) {
        if checksum(bytes) != page.place.checksum {
            return Err(damaged(path, page.place.at, "a block does not have its checksum"));
        }
    }
    Ok(())
}

/// Puts pages that also lie behind each other in memory in place together.
fn place_runs(pages: &[Page], bytes: &[u8], put: &mut Put<'_>) -> Result<(), Error> {
    let mut from = 0;
    while from < pages.len() {
        let run = pages[from..].iter().zip(0..);
        let count = run.take_while(|(page, n)| page.to == pages[from].to + n * BLOCK).count();
        put(pages[from].to, &bytes[from * BLOCK..(from + count) * BLOCK])?;
        from += count;
    }
    Ok(())
}

fn damaged(path: &Path, at: u64, what: &str) -> Error {
    Error::Damaged(format!(
        "{} is damaged at byte {at}: {what}; the checkpoint before it is used if there is one",
        path.display()
    ))
}

/// Brings missing pages, with two threads of their own.
#[derive(Debug)]
pub(crate) struct Loader {
    load: Load,
    missing: Missing,
    /// Bytes that are still to come, for the data thread to see; 0 at the end.
    left: AtomicU64,
}

/// What attaching looks at of a segment.
const FRONT_BYTES: usize = 2 * BLOCK;

/// How long the thread that answers waits before it looks whether all is there.
const PATIENCE: Duration = Duration::from_millis(50);

impl Drop for Loader {
    /// Pages that are not there yet would be zeros from here on: rather no process than that.
    fn drop(&mut self) {
        if !self.is_done() {
            std::process::abort();
        }
    }
}

impl Loader {
    /// Watches all targets. From here on touching them waits for [`Loader::answer`].
    pub(crate) fn new(load: Load, arena: &'static Arena) -> Result<Self, Error> {
        let missing = Missing::new(arena)?;
        for target in load.targets.iter().filter(|target| target.bytes > 0) {
            missing.register(target.at, target.bytes)?;
        }
        let bytes = load.targets.iter().map(|target| target.bytes as u64).sum::<u64>().max(1);
        Ok(Self { load, missing, left: AtomicU64::new(bytes) })
    }

    /// Whether everything is there.
    pub(crate) fn is_done(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Brings what attaching looks at of all targets, several pages at a time: their first pages,
    /// what the roots in these point to, and what begins there points to. What is missed comes when
    /// it is touched, one page after the other.
    pub(crate) fn bring_fronts(&self) -> Result<(), Error> {
        let (mut fronts, mut behind) = (Vec::new(), Vec::new());
        self.bring_now(self.load.pages(FRONT_BYTES), &mut |at, bytes| {
            let Some(target) = self.load.target(at).filter(|target| target.at == at) else {
                return;
            };
            for (from, len) in looked_at_first(bytes) {
                match word_at(bytes, from as usize) {
                    Some(to) => behind.extend(page_behind(target, to)),
                    None => fronts.push((at + from as usize, len as usize, *target)),
                }
            }
        })?;
        fronts.sort_unstable_by_key(|(at, ..)| *at);
        let pages = |(at, len, _): &(usize, usize, Target)| {
            (at / BLOCK..(at + len).div_ceil(BLOCK)).map(|page| page * BLOCK)
        };
        let wanted = self.load.pages_at(fronts.iter().flat_map(pages).collect());
        self.bring_now(wanted, &mut |at, bytes| {
            let first = fronts.partition_point(|(front, ..)| *front < at);
            for (front, _, target) in &fronts[first..] {
                let Some(to) = word_at(bytes, front - at) else { break };
                behind.extend(page_behind(target, to));
            }
        })?;
        self.bring_now(self.load.pages_at(behind), &mut |_, _| ())
    }

    /// Brings these pages, and shows each run of them.
    fn bring_now(&self, pages: Vec<Page>, look: &mut dyn FnMut(usize, &[u8])) -> Result<(), Error> {
        let (disk, _) = open_disk(self.load.disk)?;
        let mut stream = Stream::new(disk, pages);
        let mut put = |at: usize, bytes: &[u8]| {
            look(at, bytes);
            bring(&self.missing, at, bytes)
        };
        while stream.advance(&self.load, true, &mut put)? {}
        Ok(())
    }

    /// Brings everything, in the order of the disk. Returns when all is there.
    pub(crate) fn stream(&self) -> Result<(), Error> {
        let (disk, _) = open_disk(self.load.disk)?;
        let mut stream = Stream::new(disk, self.load.pages(usize::MAX));
        let mut put = |at: usize, bytes: &[u8]| bring(&self.missing, at, bytes);
        while stream.advance(&self.load, true, &mut put)? {
            if stream.bytes > 0 {
                point(Point::Loading);
            }
            if stream.is_too_fast(&self.load) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // First: who answers then knows why a page cannot be brought any more.
        self.left.store(0, Ordering::Release);
        for target in self.load.targets.iter().filter(|target| target.bytes > 0) {
            self.missing.unregister(target.at, target.bytes);
        }
        Ok(())
    }

    /// Brings the pages that someone waits for, until all is there.
    pub(crate) fn answer(&self) -> Result<(), Error> {
        let mut files = HashMap::new();
        while !self.is_done() {
            if let Some(at) = self.missing.next(PATIENCE) {
                match self.answer_one(at, &mut files) {
                    // Nobody waits any more, and all is there.
                    Err(_) if self.is_done() => {}
                    answered => answered?,
                }
            }
        }
        Ok(())
    }

    fn answer_one(&self, at: usize, files: &mut Files) -> Result<(), Error> {
        let Some(page) = self.load.find(at) else {
            return self.missing.bring_zeros(at, BLOCK).map_err(no_memory);
        };
        let path = self.load.path(page.file);
        let unreadable = |error: std::io::Error| damaged(&path, page.place.at, &error.to_string());
        let Aligned(bytes) = &mut Aligned([0; BLOCK]);
        let file = match files.entry(page.file) {
            Entry::Occupied(file) => file.into_mut(),
            Entry::Vacant(place) => place.insert(open_direct(&path).map_err(unreadable)?),
        };
        file.read_exact_at(bytes, page.place.at).map_err(unreadable)?;
        verify(&path, &[page], bytes)?;
        bring(&self.missing, at, bytes)
    }
}

fn word_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The page that a word points to, if it can be an offset in its target: a guess, which may be
/// wrong.
fn page_behind(target: &Target, to: u64) -> Option<usize> {
    let is_inside = to >= FRONT_BYTES as u64 && to < target.bytes as u64;
    is_inside.then(|| (target.at + to as usize) / BLOCK * BLOCK)
}

/// Files from which single pages are read, opened when first needed.
type Files = HashMap<(usize, u32), File>;

/// A page as direct transfers want it.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

/// Past the page cache, which would read more than the page that is wanted.
fn open_direct(path: &Path) -> std::io::Result<File> {
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
    match direct {
        // The file system has no direct transfers.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(path),
        opened => opened,
    }
}

fn no_memory(error: std::io::Error) -> Error {
    Error::Machine(format!("no memory for state that is being loaded: {error}"))
}

/// Puts pages in place, but for those that are there.
fn bring(missing: &Missing, at: usize, bytes: &[u8]) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes.len() {
        let put = missing.bring(at + done, &bytes[done..]).map_err(no_memory)?;
        if put == 0 {
            missing.wake(at + done, BLOCK);
            done += BLOCK;
        } else {
            done += put;
        }
    }
    Ok(())
}
