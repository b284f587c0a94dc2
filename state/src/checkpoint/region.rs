//! A region file: what one worker wrote at one epoch. A header block, then blocks of 4096 bytes in
//! the order in which their numbers were given out, then the index.
//!
//! Invariants:
//! - the writer is a pure encoder: it touches no file, and per block it computes one checksum and
//!   appends 20 bytes; blocks may be written to the file in any order;
//! - the header names nothing that changes later, and the file's name repeats what it says, so that
//!   a file in the place of another is seen;
//! - a name is used once: it holds the epoch and the incarnation (rule R4: a late write of a dead
//!   worker can only reach a file that nobody refers to).
//!
//! Called by workers to write; by `chain` and `verify` to read.

use super::Damage;
use super::checksum::{Running, checksum};
use super::index::{
    BLOCK_BYTES, Blob, FileRef, Index, NAME_BYTES_MAX, RawBlock, Rest, SegmentEntry, encode_rest,
};
use super::reading::Folder;
use crate::disk::{BLOCK, Disk, Pool};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use zerocopy::IntoBytes;

/// A region file begins with this.
pub const REGION_MAGIC: [u8; 8] = *b"TSTDREGN";
/// Version of the header block's layout.
pub const REGION_VERSION: u32 = 1;

/// Where the header block's own checksum stands.
const HEADER_CHECKSUM_AT: usize = BLOCK - 8;
/// Bytes of entries that are hashed at a time: a few microseconds of the data thread.
const HASH_BYTES: usize = 64 << 10;

/// The name of a region file: `w{worker}-e{epoch}-i{incarnation}.region`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionName {
    /// The worker that wrote it.
    pub worker: u32,
    /// The epoch that it belongs to.
    pub epoch: u64,
    /// The worker's life.
    pub incarnation: u64,
}

impl RegionName {
    /// Reads a file's name; nothing if it is not exactly what [`fmt::Display`] gives.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix('w')?.strip_suffix(".region")?;
        let (worker, rest) = rest.split_once("-e")?;
        let (epoch, incarnation) = rest.split_once("-i")?;
        let parsed = Self {
            worker: worker.parse().ok()?,
            epoch: epoch.parse().ok()?,
            incarnation: incarnation.parse().ok()?,
        };
        (parsed.to_string() == name).then_some(parsed)
    }
}

impl fmt::Display for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}-e{}-i{}.region", self.worker, self.epoch, self.incarnation)
    }
}

/// What a region file's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionHeader {
    /// The job.
    pub job: u64,
    /// The worker that wrote the file.
    pub worker: u32,
    /// The epoch that it belongs to.
    pub epoch: u64,
    /// The worker's life.
    pub incarnation: u64,
}

impl RegionHeader {
    /// The name of the file that has this header.
    #[must_use]
    pub fn name(&self) -> RegionName {
        RegionName { worker: self.worker, epoch: self.epoch, incarnation: self.incarnation }
    }

    /// The header as the file's first block.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..8].copy_from_slice(&REGION_MAGIC);
        block[8..12].copy_from_slice(&REGION_VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&(BLOCK as u32).to_le_bytes());
        block[16..24].copy_from_slice(&self.job.to_le_bytes());
        block[24..28].copy_from_slice(&self.worker.to_le_bytes());
        block[32..40].copy_from_slice(&self.epoch.to_le_bytes());
        block[40..48].copy_from_slice(&self.incarnation.to_le_bytes());
        let sum = checksum(&block[..HEADER_CHECKSUM_AT]);
        block[HEADER_CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
        block
    }

    /// Reads a header block. The second value is its checksum.
    ///
    /// # Errors
    /// What is wrong, and where in the block.
    pub fn decode(block: &[u8]) -> Result<(Self, u64), (u64, String)> {
        if block.len() != BLOCK {
            return Err((0, format!("a header of {} bytes", block.len())));
        }
        if block[..8] != REGION_MAGIC {
            return Err((0, "no region file begins here".into()));
        }
        let version = u32_at(block, 8);
        if version != REGION_VERSION {
            return Err((8, format!("version {version}, this program reads {REGION_VERSION}")));
        }
        let sum = u64_at(block, HEADER_CHECKSUM_AT);
        if sum != checksum(&block[..HEADER_CHECKSUM_AT]) {
            return Err((0, "the header block does not have its checksum".into()));
        }
        let unused = block[28..32].iter().chain(&block[48..HEADER_CHECKSUM_AT]);
        if u32_at(block, 12) as usize != BLOCK || unused.into_iter().any(|b| *b != 0) {
            return Err((12, "another size of blocks, or reserved bytes that are not zero".into()));
        }
        let header = Self {
            job: u64_at(block, 16),
            worker: u32_at(block, 24),
            epoch: u64_at(block, 32),
            incarnation: u64_at(block, 40),
        };
        Ok((header, sum))
    }
}

/// A little-endian word of a block whose length was checked.
pub(crate) fn u32_at(block: &[u8], at: usize) -> u32 {
    block.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// A little-endian word of a block whose length was checked.
pub(crate) fn u64_at(block: &[u8], at: usize) -> u64 {
    block.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Where a block of a region file lies.
#[must_use]
pub fn block_at(block: u32) -> u64 {
    BLOCK_BYTES * (1 + u64::from(block))
}

/// One block of a blob, padded with zeros: what the writer puts at each number that
/// [`RegionWriter::add_blob`] gave out. Blocks behind the blob's end are zeros.
pub fn blob_block(blob: &[u8], number: usize, block: &mut [u8; BLOCK]) {
    let from = number.saturating_mul(BLOCK).min(blob.len());
    let part = &blob[from..blob.len().min(from.saturating_add(BLOCK))];
    block[..part.len()].copy_from_slice(part);
    block[part.len()..].fill(0);
}

/// Encodes a region file. Does no I/O: it gives out block numbers and, at the end, the index.
#[derive(Debug)]
pub struct RegionWriter {
    header: RegionHeader,
    segments: Vec<SegmentEntry>,
    files: Vec<FileRef>,
    blobs: Vec<Blob>,
    /// The index as it will be written: so far, entries of blocks.
    bytes: Vec<u8>,
    entries: u32,
    blocks: u32,
    running: Running,
    hashed: usize,
}

impl RegionWriter {
    /// Begins a file.
    #[must_use]
    pub fn new(header: RegionHeader) -> Self {
        Self::with_capacity(header, 0)
    }

    /// Begins a file of about `blocks` blocks: no entry is moved while others are added.
    #[must_use]
    pub fn with_capacity(header: RegionHeader, blocks: usize) -> Self {
        Self {
            header,
            segments: Vec::new(),
            files: Vec::new(),
            blobs: Vec::new(),
            bytes: Vec::with_capacity(blocks.saturating_mul(size_of::<RawBlock>())),
            entries: 0,
            blocks: 0,
            running: Running::default(),
            hashed: 0,
        }
    }

    /// The first block of the file.
    #[must_use]
    pub fn header_block(&self) -> [u8; BLOCK] {
        self.header.encode()
    }

    /// The file's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.header.name().to_string()
    }

    /// Makes room for so many blocks more.
    pub fn reserve(&mut self, blocks: usize) {
        self.bytes.reserve(blocks.saturating_mul(size_of::<RawBlock>()));
    }

    /// Lists a segment that the worker holds, and gives the number by which its blocks name it.
    /// A restore finds exactly the segments that were listed.
    ///
    /// # Panics
    /// If the group is not one of `groups`.
    pub fn add_segment(&mut self, segment: SegmentEntry) -> u32 {
        assert!(segment.group < segment.groups, "group {} of {}", segment.group, segment.groups);
        self.segments.push(segment);
        u32::try_from(self.segments.len() - 1).expect("fewer than 4 Gi segments")
    }

    /// Lists an older file that blocks are still needed from. The newest comes first.
    pub fn add_file(&mut self, file: FileRef) {
        self.files.push(file);
    }

    /// Adds a page; its bytes go to [`block_at`] the number that is returned. A page is added once.
    ///
    /// # Panics
    /// If the segment was not listed, or has fewer bytes.
    pub fn add_block(&mut self, segment: u32, page: u32, bytes: &[u8; BLOCK]) -> u32 {
        let pages = self.segments[segment as usize].pages();
        assert!(u64::from(page) < pages, "page {page} of a segment of {pages} pages");
        let block = self.next_blocks(1).start;
        let entry = RawBlock {
            segment: segment.into(),
            page: page.into(),
            block: block.into(),
            checksum: checksum(bytes).into(),
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self.entries += 1;
        if self.bytes.len() - self.hashed >= HASH_BYTES {
            self.running.update(&self.bytes[self.hashed..]);
            self.hashed = self.bytes.len();
        }
        block
    }

    /// Adds named bytes, whole; each of the blocks that are returned holds 4096 of them
    /// ([`blob_block`] gives them with their padding).
    ///
    /// # Panics
    /// If the name is longer than 255 bytes or was used before.
    pub fn add_blob(&mut self, name: &str, bytes: &[u8]) -> Range<u32> {
        assert!(name.len() <= NAME_BYTES_MAX, "a blob's name of {} bytes", name.len());
        assert!(self.blobs.iter().all(|blob| blob.name != name), "two blobs have the name {name}");
        let count = u32::try_from(bytes.len().div_ceil(BLOCK)).expect("a blob below 16 TiB");
        let numbers = self.next_blocks(count);
        let mut running = Running::default();
        running.update(bytes);
        running.update(&[0; BLOCK][..bytes.len().next_multiple_of(BLOCK) - bytes.len()]);
        self.blobs.push(Blob {
            name: name.to_string(),
            bytes: bytes.len() as u64,
            first_block: numbers.start,
            checksum: running.value(),
        });
        numbers
    }

    /// Blocks given out so far.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Ends the file: the index, in whole blocks, to be written at `index_at` of the reference.
    #[must_use]
    pub fn finish(mut self) -> (Vec<u8>, FileRef) {
        let (_, header_checksum) =
            RegionHeader::decode(&self.header.encode()).expect("a header that was just encoded");
        let rest = Rest {
            files: &self.files,
            segments: &self.segments,
            blobs: &self.blobs,
            data_blocks: self.blocks,
            header_checksum,
        };
        encode_rest(&mut self.bytes, self.entries, &rest);
        self.running.update(&self.bytes[self.hashed..]);
        let index_at = block_at(self.blocks);
        let index_bytes = self.bytes.len() as u64;
        let file = FileRef {
            name: self.name(),
            bytes: index_at + index_bytes,
            index_at,
            index_bytes,
            index_checksum: self.running.value(),
        };
        (self.bytes, file)
    }

    fn next_blocks(&mut self, count: u32) -> Range<u32> {
        let first = self.blocks;
        self.blocks = first.checked_add(count).expect("a region file below 16 TiB");
        first..self.blocks
    }
}

/// A region file whose header and index were read and found whole. Its blocks are checked by
/// whoever reads them.
#[derive(Debug)]
pub struct RegionReader {
    /// What the header says.
    pub header: RegionHeader,
    /// What the file holds.
    pub index: Index,
    /// How the file was referred to.
    pub file: FileRef,
}

impl RegionReader {
    /// Opens the file that `file` refers to.
    ///
    /// # Errors
    /// If its size, header or index is not what was referred to, or it cannot be read.
    pub fn open(
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
        file: &FileRef,
    ) -> Result<Self, Damage> {
        Self::open_in(&mut Folder::new(disk, pool, folder)?, file)
    }

    /// Makes a reference to a file from what its own end says: for tools that look at a file of
    /// which no manifest is known. It proves nothing about the index's checksum.
    ///
    /// # Errors
    /// If no index ends there, or the file cannot be read.
    pub fn refer(
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
        name: &str,
    ) -> Result<FileRef, Damage> {
        let mut folder = Folder::new(disk, pool, folder)?;
        let path = folder.path(name);
        let bytes = folder.size(name).unwrap_or(0);
        if bytes < 2 * BLOCK_BYTES || !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(Damage::new(&path, bytes, "no region file has this size"));
        }
        let last = folder.read(name, bytes - BLOCK_BYTES, BLOCK_BYTES)?;
        let index_at = super::index::data_blocks_of(&last).map(block_at);
        let Some(index_at) = index_at.filter(|at| *at < bytes) else {
            return Err(Damage::new(&path, bytes - BLOCK_BYTES, "no index ends here"));
        };
        let index_bytes = bytes - index_at;
        let index_checksum = checksum(&folder.read(name, index_at, index_bytes)?);
        Ok(FileRef { name: name.to_string(), bytes, index_at, index_bytes, index_checksum })
    }

    pub(crate) fn open_in(folder: &mut Folder<'_>, file: &FileRef) -> Result<Self, Damage> {
        let path = folder.path(&file.name);
        let (block, raw) = Self::read(folder, file, |_| file.index_at)?;
        if checksum(&raw) != file.index_checksum {
            let what = "the index does not have the checksum that was referred to";
            return Err(Damage::new(&path, file.index_at, what));
        }
        let index = Index::decode(raw, &path, file)?;
        Self::new(&path, &block, index, file)
    }

    /// As `open_in`, but for the blocks, of which there may be millions: the index knows none, and
    /// its checksum is not verified.
    pub(crate) fn open_end_in(folder: &mut Folder<'_>, file: &FileRef) -> Result<Self, Damage> {
        let path = folder.path(&file.name);
        let mut rest_at = 0;
        let (block, raw) = Self::read(folder, file, |last| {
            let rest = super::index::rest_at_of(last).unwrap_or(0).min(file.index_bytes);
            rest_at = rest % BLOCK_BYTES;
            file.index_at + rest.min(file.index_bytes - BLOCK_BYTES) / BLOCK_BYTES * BLOCK_BYTES
        })?;
        let index = Index::decode_rest(raw, rest_at as usize, &path, file)?;
        Self::new(&path, &block, index, file)
    }

    /// Reads the header block, and the index from where `from` says, which is given its last block.
    fn read(
        folder: &mut Folder<'_>,
        file: &FileRef,
        from: impl FnOnce(&[u8]) -> u64,
    ) -> Result<(Vec<u8>, Vec<u8>), Damage> {
        file.check().map_err(|what| Damage::new(&folder.path(&file.name), 0, what))?;
        folder.check_size(&file.name, file.bytes)?;
        let opened = folder.open(&file.name)?;
        let read = folder.read_open(&opened, 0, BLOCK_BYTES).and_then(|block| {
            let last = folder.read_open(&opened, file.bytes - BLOCK_BYTES, BLOCK_BYTES)?;
            let from = from(&last);
            Ok((block, folder.read_open(&opened, from, file.bytes - from)?))
        });
        folder.close(opened);
        read
    }

    fn new(path: &Path, block: &[u8], index: Index, file: &FileRef) -> Result<Self, Damage> {
        let (header, sum) =
            RegionHeader::decode(block).map_err(|(at, what)| Damage::new(path, at, what))?;
        if header.name().to_string() != file.name {
            let what = format!("this is {}, put in the place of another file", header.name());
            return Err(Damage::new(path, 24, what));
        }
        if index.header_checksum != sum {
            return Err(Damage::new(path, 0, "the header is not the one that the index knows"));
        }
        Ok(Self { header, index, file: file.clone() })
    }
}
