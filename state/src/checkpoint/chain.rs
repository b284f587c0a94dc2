//! A chain: the newest region file of a worker and the older ones that still hold pages of it,
//! merged, so that each page is found in one step.
//!
//! A place takes 16 bytes per page of state, in one array per segment: four gigabytes of state are
//! a million places. A segment of which few pages were ever written is kept in a sorted map
//! instead, so that a page number costs memory in proportion to the bytes that a file really has.
//!
//! Invariants:
//! - of several files that have a page, the newest wins, unless the segment's `since` says that an
//!   older one speaks of an earlier holding of it;
//! - `live` of a file is the number of places that point into it;
//! - only the newest file's segments and blobs exist.
//!
//! Called by workers: opened to restore, then kept up to date by [`Chain::append`] as each new file
//! is acknowledged, to know which older files the next one must name and which to compact.

use super::Damage;
use super::checksum::checksum;
use super::index::{BLOCK_BYTES, Blob, FileRef, Index, SegmentEntry, SegmentKey};
use super::reading::Folder;
use super::region::{RegionName, RegionReader, block_at};
use crate::disk::{Disk, Pool};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Pages of address for each page of content up to which a segment's places are an array. The
/// array then takes at most a quarter of the bytes that its blocks take in the files.
const DENSITY: u64 = 64;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The file's number: see [`Chain::file`].
    pub file: u32,
    /// Where in the file.
    pub at: u64,
    /// Checksum of the 4096 bytes there.
    pub checksum: u64,
}

#[derive(Clone, Copy)]
struct Packed {
    /// One more than the file's number; zero where there is no page.
    file: u32,
    block: u32,
    checksum: u64,
}

const NOWHERE: Packed = Packed { file: 0, block: 0, checksum: 0 };

impl Packed {
    fn place(&self) -> Option<Place> {
        let file = self.file.checked_sub(1)?;
        Some(Place { file, at: block_at(self.block), checksum: self.checksum })
    }
}

enum Places {
    Array(Vec<Packed>),
    Few(BTreeMap<u32, Packed>),
}

/// The places of one segment.
struct Table {
    places: Places,
    /// Pages that have a place.
    set: u64,
}

impl Table {
    fn new() -> Self {
        Self { places: Places::Array(Vec::new()), set: 0 }
    }

    /// Makes room for `incoming` pages up to number `last`.
    fn reserve(&mut self, incoming: u64, last: u32) {
        let pages = u64::from(last) + 1;
        let dense = pages <= DENSITY.saturating_mul(self.set.saturating_add(incoming));
        match &mut self.places {
            Places::Array(array) if (array.len() as u64) < pages => {
                if dense {
                    array.resize(last as usize + 1, NOWHERE);
                } else {
                    let few = (0_u32..).zip(array.iter().copied()).filter(|(_, p)| p.file != 0);
                    self.places = Places::Few(few.collect());
                }
            }
            Places::Few(few) if dense => {
                let last = few.keys().next_back().map_or(last, |l| last.max(*l));
                if u64::from(last) < DENSITY.saturating_mul(self.set.saturating_add(incoming)) {
                    let mut array = vec![NOWHERE; last as usize + 1];
                    few.iter().for_each(|(page, place)| array[*page as usize] = *place);
                    self.places = Places::Array(array);
                }
            }
            _ => {}
        }
    }

    /// Puts a place in, and gives the file number that held it before.
    fn put(&mut self, page: u32, place: Packed) -> Option<u32> {
        let before = match &mut self.places {
            Places::Array(array) => {
                // Reserved for by `reserve`.
                array.get_mut(page as usize).map(|slot| std::mem::replace(slot, place))
            }
            Places::Few(few) => few.insert(page, place),
        };
        let before = before.and_then(|b| b.file.checked_sub(1));
        self.set += u64::from(before.is_none());
        before
    }

    fn get(&self, page: u32) -> Option<Place> {
        match &self.places {
            Places::Array(array) => array.get(page as usize)?.place(),
            Places::Few(few) => few.get(&page)?.place(),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (u32, Place)> + '_ {
        let (array, few) = match &self.places {
            Places::Array(array) => (array.as_slice(), None),
            Places::Few(few) => (&[][..], Some(few)),
        };
        let array = (0_u32..).zip(array.iter().copied());
        let few = few.into_iter().flatten().map(|(page, place)| (*page, *place));
        array.chain(few).filter_map(|(page, packed)| Some((page, packed.place()?)))
    }

    /// Forgets what `keep` refuses, and tells `gone` the file of each.
    fn retain(&mut self, keep: impl Fn(u32, u32) -> bool, mut gone: impl FnMut(u32)) {
        let mut lost = 0;
        let mut check = |page: u32, packed: &Packed| {
            let Some(file) = packed.file.checked_sub(1).filter(|file| !keep(page, *file)) else {
                return true;
            };
            gone(file);
            lost += 1;
            false
        };
        match &mut self.places {
            Places::Array(array) => {
                for (page, packed) in (0_u32..).zip(array.iter_mut()) {
                    if !check(page, packed) {
                        *packed = NOWHERE;
                    }
                }
            }
            Places::Few(few) => few.retain(|page, packed| check(*page, packed)),
        }
        self.set -= lost;
    }
}

struct File {
    reference: FileRef,
    name: RegionName,
    live: u64,
}

/// The state that a worker had at a cut, as places in files.
pub struct Chain {
    /// Files by number. A number is used again once no place points to its file.
    files: Vec<Option<File>>,
    newest: Option<u32>,
    job: Option<u64>,
    segments: Vec<SegmentEntry>,
    tables: Vec<Table>,
    keys: HashMap<SegmentKey, usize>,
    blobs: Vec<Blob>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files: Vec<_> = self.files().map(|(_, file)| file.name.as_str()).collect();
        f.debug_struct("Chain")
            .field("files", &files)
            .field("segments", &self.segments.len())
            .field("blobs", &self.blobs.len())
            .finish_non_exhaustive()
    }
}

impl Default for Chain {
    fn default() -> Self {
        Self::empty()
    }
}

impl Chain {
    /// A chain without a file: that of a worker that has not saved anything yet.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            files: Vec::new(),
            newest: None,
            job: None,
            segments: Vec::new(),
            tables: Vec::new(),
            keys: HashMap::new(),
            blobs: Vec::new(),
        }
    }

    /// Opens the file that `newest` refers to and the older ones that it names. Their headers and
    /// indexes are checked; blocks are checked when they are read.
    ///
    /// # Errors
    /// The first damage that is met.
    pub fn open(
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
        newest: &FileRef,
    ) -> Result<Self, Damage> {
        Self::open_in(&mut Folder::new(disk, pool, folder)?, newest)
    }

    /// Opens the newest file alone, for its segments and blobs: no page has a place. Takes the same
    /// time whatever the size of the state, and finds no damage in the list of blocks, which
    /// [`Chain::open`] will.
    ///
    /// # Errors
    /// The first damage that is met; a file that is missing or too short.
    pub fn open_end(
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
        newest: &FileRef,
    ) -> Result<Self, Damage> {
        let mut folder = Folder::new(disk, pool, folder)?;
        let reader = RegionReader::open_end_in(&mut folder, newest)?;
        for older in &reader.index.files {
            folder.check_size(&older.name, older.bytes)?;
        }
        let mut chain = Self::empty();
        let job = reader.header.job;
        chain.append_file(job, reader.file, &reader.index, folder.folder())?;
        Ok(chain)
    }

    pub(crate) fn open_in(folder: &mut Folder<'_>, newest: &FileRef) -> Result<Self, Damage> {
        let path = folder.path(&newest.name);
        let first = RegionReader::open_in(folder, newest)?;
        let mut chain = Self::empty();
        let mut epoch = first.header.epoch;
        for older in &first.index.files {
            let named = RegionName::parse(&older.name).filter(|name| name.epoch < epoch);
            let Some(name) = named else {
                let what = format!("{} is listed as older, and is not", older.name);
                return Err(Damage::new(&path, newest.index_at, what));
            };
            epoch = name.epoch;
        }
        for older in first.index.files.iter().rev() {
            let reader = RegionReader::open_in(folder, older)?;
            chain.append_file(reader.header.job, reader.file, &reader.index, folder.folder())?;
        }
        chain.append_file(first.header.job, first.file, &first.index, folder.folder())?;
        Ok(chain)
    }

    /// Puts a file on top that was just written: `index` is what
    /// [`RegionWriter::finish`](super::RegionWriter::finish) gave. After an error the chain is not
    /// to be used any more.
    ///
    /// # Errors
    /// If the index is not whole, has a page twice, or is not of a newer epoch than the chain.
    pub fn append(&mut self, job: u64, file: FileRef, index: Vec<u8>) -> Result<(), Damage> {
        let path = Path::new(&file.name);
        file.check().map_err(|what| Damage::new(path, 0, what))?;
        if checksum(&index) != file.index_checksum {
            let what = "the index does not have the checksum that was referred to";
            return Err(Damage::new(path, file.index_at, what));
        }
        let index = Index::decode(index, path, &file)?;
        self.append_file(job, file, &index, Path::new(""))
    }

    fn append_file(
        &mut self,
        job: u64,
        file: FileRef,
        index: &Index,
        folder: &Path,
    ) -> Result<(), Damage> {
        let path = folder.join(&file.name);
        let name = file.check().map_err(|what| Damage::new(&path, 0, what))?;
        if self.job.is_some_and(|known| known != job) {
            return Err(Damage::new(&path, 16, "the file belongs to another job"));
        }
        if self.newest_file().is_some_and(|newest| newest.name.epoch >= name.epoch) {
            return Err(Damage::new(&path, 32, "the file is not newer than those below it"));
        }
        self.job = Some(job);
        let number = self.free_number();
        let index_at = file.index_at;
        self.files[number as usize] = Some(File { reference: file, name, live: 0 });
        self.newest = Some(number);
        self.take_segments(index);
        self.blobs = index.blobs.clone();
        if let Some(twice) = self.take_blocks(number, index) {
            let what = format!("page {} of segment {} twice in one file", twice.1, twice.0);
            return Err(Damage::new(&path, index_at, what));
        }
        for (other, slot) in (0_u32..).zip(self.files.iter_mut()) {
            if other != number && slot.as_ref().is_some_and(|file| file.live == 0) {
                *slot = None;
            }
        }
        Ok(())
    }

    fn newest_file(&self) -> Option<&File> {
        self.files.get(self.newest? as usize)?.as_ref()
    }

    fn free_number(&mut self) -> u32 {
        let free = self.files.iter().position(Option::is_none).unwrap_or_else(|| {
            self.files.push(None);
            self.files.len() - 1
        });
        u32::try_from(free).expect("fewer than 4 Gi files, each of which was opened")
    }

    /// The new file's segments take over the tables of those that were held before.
    fn take_segments(&mut self, index: &Index) {
        let mut old: Vec<Option<Table>> = self.tables.drain(..).map(Some).collect();
        let files = &mut self.files;
        let mut forget = |table: &mut Table, since: u64, pages: u64| {
            let epochs: Vec<u64> =
                files.iter().map(|f| f.as_ref().map_or(0, |f| f.name.epoch)).collect();
            let keep =
                |page: u32, file: u32| u64::from(page) < pages && epochs[file as usize] >= since;
            table.retain(keep, |file| {
                if let Some(file) = &mut files[file as usize] {
                    file.live -= 1;
                }
            });
        };
        for segment in &index.segments {
            let before = self.keys.get(&segment.key()).copied();
            let table = before.and_then(|n| Some((self.segments[n], old[n].take()?)));
            let table = table.map_or_else(Table::new, |(was, mut table)| {
                if was.since != segment.since || segment.pages() < was.pages() {
                    forget(&mut table, segment.since, segment.pages());
                }
                table
            });
            self.tables.push(table);
        }
        for table in old.iter_mut().flatten() {
            forget(table, 0, 0);
        }
        self.keys = index.segments.iter().enumerate().map(|(n, s)| (s.key(), n)).collect();
        self.segments.clone_from(&index.segments);
    }

    /// Points the places at the new file's blocks. Gives (segment, page) of one that comes twice.
    fn take_blocks(&mut self, number: u32, index: &Index) -> Option<(u32, u32)> {
        let mut sizes = vec![(0_u64, 0_u32); index.segments.len()];
        for entry in index.blocks() {
            let (count, last) = &mut sizes[entry.segment as usize];
            *count += 1;
            *last = (*last).max(entry.page);
        }
        for (table, (count, last)) in self.tables.iter_mut().zip(sizes) {
            if count > 0 {
                table.reserve(count, last);
            }
        }
        let mut live = 0;
        for entry in index.blocks() {
            let place = Packed { file: number + 1, block: entry.block, checksum: entry.checksum };
            match self.tables[entry.segment as usize].put(entry.page, place) {
                Some(before) if before == number => return Some((entry.segment, entry.page)),
                Some(before) => {
                    if let Some(file) = &mut self.files[before as usize] {
                        file.live -= 1;
                    }
                }
                None => {}
            }
            live += 1;
        }
        if let Some(file) = &mut self.files[number as usize] {
            file.live = live;
        }
        None
    }

    /// The job that the files belong to, if there is one.
    #[must_use]
    pub fn job(&self) -> Option<u64> {
        self.job
    }

    /// The segments that the worker held at the cut. A page of theirs without a place is zeros.
    #[must_use]
    pub fn segments(&self) -> &[SegmentEntry] {
        &self.segments
    }

    /// The place of a segment in [`Chain::segments`].
    #[must_use]
    pub fn segment(&self, key: &SegmentKey) -> Option<usize> {
        self.keys.get(key).copied()
    }

    /// Where a page of a segment is, if it was ever written.
    #[must_use]
    #[inline]
    pub fn find(&self, segment: usize, page: u32) -> Option<Place> {
        self.tables.get(segment)?.get(page)
    }

    /// All pages of a segment that have a place, in order.
    pub fn pages(&self, segment: usize) -> impl Iterator<Item = (u32, Place)> + '_ {
        self.tables.get(segment).into_iter().flat_map(Table::iter)
    }

    /// All pages that are in one file, as (segment, page, place): what compaction writes again.
    pub fn pages_in(&self, file: u32) -> impl Iterator<Item = (usize, u32, Place)> + '_ {
        let all = self.tables.iter().enumerate();
        all.flat_map(|(segment, table)| table.iter().map(move |(page, at)| (segment, page, at)))
            .filter(move |(_, _, place)| place.file == file)
    }

    /// The newest file's named bytes.
    #[must_use]
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// One of them, by its name.
    #[must_use]
    pub fn blob(&self, name: &str) -> Option<&Blob> {
        self.blobs.iter().find(|blob| blob.name == name)
    }

    /// Reads a blob and checks it.
    ///
    /// # Errors
    /// If it does not have its checksum, or cannot be read.
    pub fn read_blob(
        &self,
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
        blob: &Blob,
    ) -> Result<Vec<u8>, Damage> {
        let mut folder = Folder::new(disk, pool, folder)?;
        let Some(newest) = self.newest_file() else {
            return Err(Damage::new(folder.folder(), 0, "a chain without files has no blobs"));
        };
        let name = &newest.reference.name;
        let at = block_at(blob.first_block);
        let mut bytes = folder.read(name, at, blob.blocks().saturating_mul(BLOCK_BYTES))?;
        if checksum(&bytes) != blob.checksum {
            let what = format!("blob {} does not have its checksum", blob.name);
            return Err(Damage::new(&folder.path(name), at, what));
        }
        bytes.truncate(usize::try_from(blob.bytes).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    /// The files by number, those only that are still needed and the newest.
    pub fn files(&self) -> impl Iterator<Item = (u32, &FileRef)> + '_ {
        (0_u32..).zip(&self.files).filter_map(|(n, file)| Some((n, &file.as_ref()?.reference)))
    }

    /// The file that a [`Place`] names.
    #[must_use]
    pub fn file(&self, number: u32) -> Option<&FileRef> {
        Some(&self.files.get(number as usize)?.as_ref()?.reference)
    }

    /// The newest file.
    #[must_use]
    pub fn newest(&self) -> Option<&FileRef> {
        self.newest_file().map(|file| &file.reference)
    }

    /// Blocks of a file that pages still need. (Blobs of the newest file are not counted.)
    #[must_use]
    pub fn live(&self, file: u32) -> u64 {
        let file = self.files.get(file as usize).and_then(Option::as_ref);
        file.map_or(0, |file| file.live)
    }

    /// What the next file must name with [`RegionWriter::add_file`](super::RegionWriter::add_file),
    /// in that order: files that pages still need, the newest first.
    #[must_use]
    pub fn needed(&self) -> Vec<FileRef> {
        let mut needed: Vec<&File> =
            self.files.iter().flatten().filter(|file| file.live > 0).collect();
        needed.sort_by_key(|file| std::cmp::Reverse(file.name.epoch));
        needed.into_iter().map(|file| file.reference.clone()).collect()
    }
}
