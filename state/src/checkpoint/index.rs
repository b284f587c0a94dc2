//! The index at the end of a region file: which page of which segment each block is, and the
//! checksums of all of them. `state/FORMAT.md` draws it.
//!
//! Everything that grows comes first and the counts come last, in a tail of 64 bytes, so that a
//! writer appends an entry per block and is nearly done when the last one was added.
//!
//! Invariants of an index that was decoded:
//! - every block of the file belongs to exactly one entry or one blob;
//! - an entry's segment exists, and its page lies within the segment's bytes;
//! - segments, names of files and names of blobs are each unique;
//! - memory is in proportion to the bytes that were given: no count is believed before the bytes
//!   that it counts were seen.
//!
//! Called by `region` (writing), `chain` and `verify` (reading).

use super::Damage;
use super::region::RegionName;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::disk::BLOCK;

/// Last 64 bytes of an index begin with this.
pub const INDEX_MAGIC: [u8; 8] = *b"TSTDINDX";
/// Version of the index's layout.
pub const INDEX_VERSION: u32 = 1;
/// Longest name of a file or blob.
pub const NAME_BYTES_MAX: usize = 255;

pub(crate) const BLOCK_BYTES: u64 = BLOCK as u64;

/// How a file is referred to: whoever holds this can tell whether the file is the one that was
/// meant, whole and undamaged.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// The file's name in the checkpoint folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Where its index begins.
    pub index_at: u64,
    /// Size of its index.
    pub index_bytes: u64,
    /// Checksum of its index.
    #[serde(with = "super::hex")]
    pub index_checksum: u64,
}

impl FileRef {
    /// Checks that the numbers fit each other, so that later arithmetic on them cannot overflow.
    pub(crate) fn check(&self) -> Result<RegionName, String> {
        let name = RegionName::parse(&self.name)
            .ok_or_else(|| format!("{:?} is no name of a region file", self.name))?;
        let aligned = [self.bytes, self.index_at, self.index_bytes]
            .iter()
            .all(|n| n.is_multiple_of(BLOCK_BYTES) && *n >= BLOCK_BYTES);
        let blocks = self.index_at / BLOCK_BYTES;
        if !aligned
            || self.index_at.checked_add(self.index_bytes) != Some(self.bytes)
            || blocks > u64::from(u32::MAX)
        {
            return Err(format!(
                "the reference to {} does not fit itself: {} bytes, index of {} bytes at {}",
                self.name, self.bytes, self.index_bytes, self.index_at
            ));
        }
        Ok(name)
    }

    /// Blocks of state and blobs in the file.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        (self.index_at / BLOCK_BYTES).saturating_sub(1)
    }
}

/// What a segment is, whoever holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentKey {
    /// Hash of the operator's uid.
    pub operator: u64,
    /// What kind of state it is.
    pub kind: u32,
    /// The key group.
    pub group: u32,
    /// Number of key groups.
    pub groups: u32,
}

/// A segment that the worker held at the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Hash of the operator's uid.
    pub operator: u64,
    /// What kind of state it is.
    pub kind: u32,
    /// The key group.
    pub group: u32,
    /// Number of key groups.
    pub groups: u32,
    /// Schema hash of what it holds.
    pub schema: u64,
    /// Bytes used: pages beyond are not part of the state.
    pub bytes: u64,
    /// Files of earlier epochs say nothing about this segment, even if they name it: the epoch in
    /// which this worker took the segment and wrote all of it. 0: there was no such moment.
    pub since: u64,
}

impl SegmentEntry {
    /// What the segment is.
    #[must_use]
    pub fn key(&self) -> SegmentKey {
        SegmentKey {
            operator: self.operator,
            kind: self.kind,
            group: self.group,
            groups: self.groups,
        }
    }

    /// Number of pages that `bytes` fill.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes.div_ceil(BLOCK_BYTES)
    }
}

/// A page of a segment, as one block of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockEntry {
    /// Place of the segment in this index.
    pub segment: u32,
    /// Page of the segment.
    pub page: u32,
    /// The block, at byte `4096 × (1 + block)` of the file.
    pub block: u32,
    /// Checksum of its 4096 bytes.
    pub checksum: u64,
}

/// Named bytes that are no pages: cells, ring bytes in flight, offsets of sinks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name.
    pub name: String,
    /// Its bytes; the last block is padded with zeros.
    pub bytes: u64,
    /// The first of its blocks, which follow each other.
    pub first_block: u32,
    /// Checksum of all its blocks, padding included.
    pub checksum: u64,
}

impl Blob {
    /// Number of its blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK_BYTES)
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawBlock {
    pub(crate) segment: U32,
    pub(crate) page: U32,
    pub(crate) block: U32,
    pub(crate) checksum: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSegment {
    operator: U64,
    kind: U32,
    group: U32,
    groups: U32,
    reserved: U32,
    schema: U64,
    bytes: U64,
    since: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawFile {
    name_bytes: U32,
    reserved: U32,
    bytes: U64,
    index_at: U64,
    index_bytes: U64,
    index_checksum: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawBlob {
    name_bytes: U32,
    first_block: U32,
    bytes: U64,
    checksum: U64,
}

/// The last bytes of an index.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawTail {
    magic: [u8; 8],
    version: U32,
    data_blocks: U32,
    blocks: U32,
    segments: U32,
    files: U32,
    blobs: U32,
    names_bytes: U32,
    reserved: U32,
    header_checksum: U64,
    reserved_words: [U64; 2],
}

const RAW_BLOCK: usize = size_of::<RawBlock>();
const RAW_TAIL: usize = size_of::<RawTail>();

const _: () = {
    assert!(RAW_BLOCK == 20);
    assert!(size_of::<RawSegment>() == 48);
    assert!(size_of::<RawFile>() == 40);
    assert!(size_of::<RawBlob>() == 24);
    assert!(RAW_TAIL == 64);
};

/// What stands behind the entries of blocks.
pub(crate) struct Rest<'a> {
    pub(crate) files: &'a [FileRef],
    pub(crate) segments: &'a [SegmentEntry],
    pub(crate) blobs: &'a [Blob],
    pub(crate) data_blocks: u32,
    pub(crate) header_checksum: u64,
}

/// Appends the rest to `bytes`, which holds `blocks` entries, and pads it to whole blocks.
pub(crate) fn encode_rest(bytes: &mut Vec<u8>, blocks: u32, rest: &Rest<'_>) {
    for s in rest.segments {
        let raw = RawSegment {
            operator: s.operator.into(),
            kind: s.kind.into(),
            group: s.group.into(),
            groups: s.groups.into(),
            reserved: 0.into(),
            schema: s.schema.into(),
            bytes: s.bytes.into(),
            since: s.since.into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    for f in rest.files {
        let raw = RawFile {
            name_bytes: count(f.name.len()),
            reserved: 0.into(),
            bytes: f.bytes.into(),
            index_at: f.index_at.into(),
            index_bytes: f.index_bytes.into(),
            index_checksum: f.index_checksum.into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    for b in rest.blobs {
        let raw = RawBlob {
            name_bytes: count(b.name.len()),
            first_block: b.first_block.into(),
            bytes: b.bytes.into(),
            checksum: b.checksum.into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    let names_at = bytes.len();
    let names = rest.files.iter().map(|f| &f.name).chain(rest.blobs.iter().map(|b| &b.name));
    names.for_each(|name| bytes.extend_from_slice(name.as_bytes()));
    let names_bytes = count(bytes.len() - names_at);
    let whole = (bytes.len() + RAW_TAIL).next_multiple_of(BLOCK);
    bytes.resize(whole - RAW_TAIL, 0);
    let tail = RawTail {
        magic: INDEX_MAGIC,
        version: INDEX_VERSION.into(),
        data_blocks: rest.data_blocks.into(),
        blocks: blocks.into(),
        segments: count(rest.segments.len()),
        files: count(rest.files.len()),
        blobs: count(rest.blobs.len()),
        names_bytes,
        reserved: 0.into(),
        header_checksum: rest.header_checksum.into(),
        reserved_words: [0.into(); 2],
    };
    bytes.extend_from_slice(tail.as_bytes());
}

/// A number of our own making as the format holds it.
fn count(n: usize) -> U32 {
    U32::new(u32::try_from(n).expect("an index has fewer than 4 Gi entries"))
}

/// An index, decoded and checked. Entries of blocks stay as they are in the file: a state of 4 GiB
/// has a million of them.
pub struct Index {
    raw: Vec<u8>,
    blocks: usize,
    /// Older files that blocks are still needed from, newest first.
    pub files: Vec<FileRef>,
    /// The segments that the worker held.
    pub segments: Vec<SegmentEntry>,
    /// Named bytes of this file.
    pub blobs: Vec<Blob>,
    /// Blocks in the file, those of blobs included.
    pub data_blocks: u32,
    /// Checksum that the file's header block must have.
    pub header_checksum: u64,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index")
            .field("blocks", &self.blocks)
            .field("segments", &self.segments.len())
            .field("files", &self.files)
            .field("blobs", &self.blobs)
            .finish_non_exhaustive()
    }
}

impl Index {
    /// Decodes the index `raw` of the file that `reference` refers to and that lies at `path`.
    ///
    /// # Errors
    /// With the place of the first thing that is not as it must be.
    pub fn decode(raw: Vec<u8>, path: &Path, reference: &FileRef) -> Result<Self, Damage> {
        let damage = |offset: usize, what: String| {
            Damage::new(path, reference.index_at.saturating_add(offset as u64), what)
        };
        let tail = read_tail(&raw).map_err(|what| damage(0, what))?;
        let blocks = tail.blocks.get() as usize;
        let tail_at = raw.len() - RAW_TAIL;
        let rest_at = blocks.checked_mul(RAW_BLOCK).filter(|at| *at <= tail_at);
        let Some(rest_at) = rest_at else {
            return Err(damage(tail_at, too_many("blocks", blocks)));
        };
        let mut index = Self::decode_rest(raw, rest_at, path, reference)?;
        index.blocks = blocks;
        index.check_blocks().map_err(|(offset, what)| damage(offset, what))?;
        Ok(index)
    }

    /// As [`Index::decode`], of the end of an index alone: it knows no blocks. What stands behind
    /// the blocks begins at `rest_at` of `raw`. Nothing has a checksum here but the blobs.
    pub(crate) fn decode_rest(
        raw: Vec<u8>,
        rest_at: usize,
        path: &Path,
        reference: &FileRef,
    ) -> Result<Self, Damage> {
        let damage = |offset: usize, what: String| {
            Damage::new(path, reference.index_at.saturating_add(offset as u64), what)
        };
        let tail = read_tail(&raw).map_err(|what| damage(0, what))?;
        let tail_at = raw.len() - RAW_TAIL;
        let mut cut = Cut { raw: &raw[..tail_at], at: rest_at.min(tail_at) };
        let segments_at = cut.at;
        let count = tail.segments.get() as usize;
        let segments = cut
            .take::<RawSegment>(count)
            .map_err(|()| damage(tail_at, too_many("segments", count)))?
            .iter()
            .map(decode_segment)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|what| damage(segments_at, what))?;
        let files_at = cut.at;
        let count = tail.files.get() as usize;
        let raw_files =
            cut.take::<RawFile>(count).map_err(|()| damage(tail_at, too_many("files", count)))?;
        let count = tail.blobs.get() as usize;
        let raw_blobs =
            cut.take::<RawBlob>(count).map_err(|()| damage(tail_at, too_many("blobs", count)))?;
        let names_at = cut.at;
        let count = tail.names_bytes.get() as usize;
        let mut names = cut
            .take::<u8>(count)
            .map_err(|()| damage(tail_at, too_many("bytes of names", count)))?;
        let files = raw_files
            .iter()
            .map(|f| decode_file(f, &mut names))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|what| damage(files_at, what))?;
        let blobs = raw_blobs
            .iter()
            .map(|b| decode_blob(b, &mut names))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|what| damage(names_at, what))?;
        let padding = &cut.raw[cut.at..];
        if !names.is_empty() || padding.len() >= BLOCK || padding.iter().any(|b| *b != 0) {
            return Err(damage(cut.at, "bytes behind the names that nothing accounts for".into()));
        }
        let index = Self {
            blocks: 0,
            files,
            segments,
            blobs,
            data_blocks: tail.data_blocks.get(),
            header_checksum: tail.header_checksum.get(),
            raw,
        };
        if u64::from(index.data_blocks) != reference.blocks() {
            let what = format!("{} blocks in a file of {}", index.data_blocks, reference.blocks());
            return Err(damage(index.raw.len() - RAW_TAIL, what));
        }
        index.check_unique().map_err(|what| damage(segments_at, what))?;
        Ok(index)
    }

    /// The blocks, in the order in which they were added.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = BlockEntry> + '_ {
        self.raw_blocks().iter().map(|raw| BlockEntry {
            segment: raw.segment.get(),
            page: raw.page.get(),
            block: raw.block.get(),
            checksum: raw.checksum.get(),
        })
    }

    /// Finds a blob by its name.
    #[must_use]
    pub fn blob(&self, name: &str) -> Option<&Blob> {
        self.blobs.iter().find(|blob| blob.name == name)
    }

    fn raw_blocks(&self) -> &[RawBlock] {
        // The length was checked when the index was decoded.
        <[RawBlock]>::ref_from_bytes(&self.raw[..self.blocks * RAW_BLOCK]).unwrap_or(&[])
    }

    fn check_unique(&self) -> Result<(), String> {
        let mut keys = HashSet::with_capacity(self.segments.len());
        if let Some(twice) = self.segments.iter().find(|s| !keys.insert(s.key())) {
            return Err(format!("segment {:?} is listed twice", twice.key()));
        }
        let mut names = HashSet::with_capacity(self.files.len() + self.blobs.len());
        if let Some(twice) = self.files.iter().find(|f| !names.insert(f.name.as_str())) {
            return Err(format!("file {} is listed twice", twice.name));
        }
        names.clear();
        if let Some(twice) = self.blobs.iter().find(|b| !names.insert(b.name.as_str())) {
            return Err(format!("blob {} is listed twice", twice.name));
        }
        Ok(())
    }

    /// Each block of the file is claimed once, by an entry or a blob.
    fn check_blocks(&self) -> Result<(), (usize, String)> {
        let blob_blocks =
            self.blobs.iter().try_fold(0_u64, |sum, blob| sum.checked_add(blob.blocks()));
        let claimed = blob_blocks.and_then(|sum| sum.checked_add(self.blocks as u64));
        if claimed != Some(u64::from(self.data_blocks)) {
            return Err((
                self.raw.len() - RAW_TAIL,
                format!("{} blocks, but entries and blobs claim {claimed:?}", self.data_blocks),
            ));
        }
        let mut claims = Claims::new(self.data_blocks);
        for (number, raw) in self.raw_blocks().iter().enumerate() {
            let Some(segment) = self.segments.get(raw.segment.get() as usize) else {
                return Err((
                    number * RAW_BLOCK,
                    format!("block {number} is of segment {}, which is not listed", raw.segment),
                ));
            };
            if u64::from(raw.page.get()) >= segment.pages() {
                return Err((
                    number * RAW_BLOCK,
                    format!("page {} of a segment of {} bytes", raw.page, segment.bytes),
                ));
            }
            if !claims.take(raw.block.get()) {
                return Err((
                    number * RAW_BLOCK,
                    format!("block {} is not in the file, or claimed twice", raw.block),
                ));
            }
        }
        for blob in &self.blobs {
            // Not more than data_blocks in all, as was checked above.
            let blocks = u32::try_from(blob.blocks()).unwrap_or(u32::MAX);
            let mut numbers = (0..blocks).map(|n| blob.first_block.checked_add(n));
            if !numbers.all(|number| number.is_some_and(|number| claims.take(number))) {
                return Err((
                    self.blocks * RAW_BLOCK,
                    format!(
                        "blob {} has blocks that are not in the file, or not its own",
                        blob.name
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn too_many(what: &str, count: usize) -> String {
    format!("it claims {count} {what}, more than it has room for")
}

fn check_tail(tail: &RawTail) -> Result<(), String> {
    if tail.magic != INDEX_MAGIC {
        return Err("no index ends here".into());
    }
    if tail.version.get() != INDEX_VERSION {
        return Err(format!(
            "the index has version {}, this program reads {INDEX_VERSION}",
            tail.version
        ));
    }
    if tail.reserved.get() != 0 || tail.reserved_words.iter().any(|word| word.get() != 0) {
        return Err("reserved bytes of the index are not zero".into());
    }
    Ok(())
}

fn decode_segment(raw: &RawSegment) -> Result<SegmentEntry, String> {
    let entry = SegmentEntry {
        operator: raw.operator.get(),
        kind: raw.kind.get(),
        group: raw.group.get(),
        groups: raw.groups.get(),
        schema: raw.schema.get(),
        bytes: raw.bytes.get(),
        since: raw.since.get(),
    };
    if raw.reserved.get() != 0 || entry.group >= entry.groups {
        return Err(format!("a segment of group {} of {}", entry.group, entry.groups));
    }
    Ok(entry)
}

fn decode_file(raw: &RawFile, names: &mut &[u8]) -> Result<FileRef, String> {
    let file = FileRef {
        name: decode_name(raw.name_bytes.get(), names)?,
        bytes: raw.bytes.get(),
        index_at: raw.index_at.get(),
        index_bytes: raw.index_bytes.get(),
        index_checksum: raw.index_checksum.get(),
    };
    file.check()?;
    if raw.reserved.get() != 0 {
        return Err("reserved bytes of a file's entry are not zero".into());
    }
    Ok(file)
}

fn decode_blob(raw: &RawBlob, names: &mut &[u8]) -> Result<Blob, String> {
    Ok(Blob {
        name: decode_name(raw.name_bytes.get(), names)?,
        bytes: raw.bytes.get(),
        first_block: raw.first_block.get(),
        checksum: raw.checksum.get(),
    })
}

fn decode_name(bytes: u32, names: &mut &[u8]) -> Result<String, String> {
    let bytes = bytes as usize;
    let name = names
        .split_off(..bytes)
        .filter(|_| bytes <= NAME_BYTES_MAX)
        .ok_or_else(|| format!("a name of {bytes} bytes"))?;
    let name = std::str::from_utf8(name).map_err(|_| "a name that is not UTF-8".to_string())?;
    Ok(name.to_string())
}

/// Takes arrays off the front of the index.
struct Cut<'a> {
    raw: &'a [u8],
    at: usize,
}

impl<'a> Cut<'a> {
    fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &mut self,
        count: usize,
    ) -> Result<&'a [T], ()> {
        let (items, rest) =
            <[T]>::ref_from_prefix_with_elems(&self.raw[self.at..], count).map_err(|_| ())?;
        self.at = self.raw.len() - rest.len();
        Ok(items)
    }
}

/// Which blocks of a file are spoken for.
struct Claims {
    bits: Vec<u64>,
    blocks: u32,
}

impl Claims {
    /// `blocks` was compared with the size of the file.
    fn new(blocks: u32) -> Self {
        Self { bits: vec![0; (blocks as usize).div_ceil(64)], blocks }
    }

    /// Claims a block: false if it is not there or was claimed before.
    fn take(&mut self, block: u32) -> bool {
        if block >= self.blocks {
            return false;
        }
        let (word, bit) = (block as usize / 64, 1_u64 << (block % 64));
        let free = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        free
    }
}

fn read_tail(raw: &[u8]) -> Result<RawTail, String> {
    let Ok((_, tail)) = RawTail::read_from_suffix(raw) else {
        return Err(format!("an index of {} bytes is too short", raw.len()));
    };
    check_tail(&tail)?;
    Ok(tail)
}

/// How far behind its beginning the index that ends with `end` has something else than blocks.
pub(crate) fn rest_at_of(end: &[u8]) -> Option<u64> {
    Some(u64::from(read_tail(end).ok()?.blocks.get()) * RAW_BLOCK as u64)
}

/// The number of blocks in front of the index that ends with `end`, if one does.
pub(crate) fn data_blocks_of(end: &[u8]) -> Option<u32> {
    let (_, tail) = RawTail::read_from_suffix(end).ok()?;
    check_tail(&tail).ok()?;
    Some(tail.data_blocks.get())
}
