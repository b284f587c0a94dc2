//! Verification: reads every byte that a checkpoint of a folder needs, and compares.
//!
//! Invariant: a changed byte in a root slot, in a manifest that counts, or in a region file that
//! one reaches (header, blocks, padding, index) is reported with its place: its block, or the blob
//! that it belongs to. All damage is collected, not only the first.
//!
//! Called by tools. Takes no lock and writes nothing: a job may work with the folder meanwhile, and
//! retire files while they are read; they are then missing, and no longer needed.

use super::Damage;
use super::chain::Chain;
use super::checksum::{Running, checksum};
use super::index::{BLOCK_BYTES, Blob, FileRef};
use super::manifest::{Manifest, ManifestName, read_in};
use super::reading::Folder;
use super::region::{RegionReader, block_at};
use super::root::{ROOTS, SLOTS};
use super::store::{candidates_in, read_slots};
use crate::disk::{BLOCK, Disk, Pool};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// What a verification looked at and found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Checkpoints and savepoints that count.
    pub checkpoints: u64,
    /// Region files that they reach.
    pub files: u64,
    /// Blocks of these.
    pub blocks: u64,
    /// Bytes that were read and compared.
    pub bytes: u64,
    /// All that is not as it was written.
    pub damages: Vec<Damage>,
}

impl VerifyReport {
    /// Whether everything is as it was written.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.damages.is_empty()
    }
}

/// Verifies the roots of a folder, its savepoints, and all that these reach.
///
/// # Errors
/// Only if the folder cannot be listed; all else is in the report.
pub fn verify(disk: &mut dyn Disk, pool: &Pool, folder: &Path) -> Result<VerifyReport, Damage> {
    let mut folder = Folder::new(disk, pool, folder)?;
    let mut report = VerifyReport::default();
    let manifests = verify_manifests(&mut folder, &mut report);
    let mut seen: HashSet<FileRef> = HashSet::new();
    for file in manifests.iter().flat_map(Manifest::files) {
        if !seen.contains(file) {
            // What only shows when a file and its older ones are put together.
            let chain = Chain::open_in(&mut folder, file);
            report.damages.extend(chain.err());
            verify_files(&mut folder, file, &mut seen, &mut report);
        }
    }
    let mut known = HashSet::new();
    report.damages.retain(|damage| known.insert((damage.file.clone(), damage.at)));
    Ok(report)
}

/// Roots and manifests; gives the manifests that can be read.
fn verify_manifests(folder: &mut Folder<'_>, report: &mut VerifyReport) -> Vec<Manifest> {
    let slots = read_slots(folder);
    let size = folder.size(ROOTS).unwrap_or(0);
    report.bytes += size;
    if size > (SLOTS * BLOCK) as u64 {
        let what = format!("{size} bytes are more than two root slots");
        report.damages.push(Damage::new(&folder.path(ROOTS), (SLOTS * BLOCK) as u64, what));
    }
    let mut manifests = Vec::new();
    let mut names = HashSet::new();
    for candidate in candidates_in(folder, &slots) {
        report.checkpoints += u64::from(names.insert(candidate.name.clone()));
        report.bytes += folder.size(&candidate.name).unwrap_or(0);
        report.damages.extend(candidate.damage);
        manifests.extend(candidate.manifest);
    }
    let savepoints: Vec<String> = folder
        .names()
        .filter(|name| ManifestName::parse(name).is_some_and(|name| name.savepoint))
        .filter(|name| !names.contains(*name))
        .map(str::to_owned)
        .collect();
    for name in savepoints {
        report.checkpoints += 1;
        report.bytes += folder.size(&name).unwrap_or(0);
        match read_in(folder, &name) {
            Ok((manifest, _)) => manifests.push(manifest),
            Err(damage) => report.damages.push(damage),
        }
    }
    manifests
}

/// A file and the older ones that it names.
fn verify_files(
    folder: &mut Folder<'_>,
    newest: &FileRef,
    seen: &mut HashSet<FileRef>,
    report: &mut VerifyReport,
) {
    let mut files = vec![newest.clone()];
    while let Some(file) = files.pop() {
        if !seen.insert(file.clone()) {
            continue;
        }
        report.files += 1;
        match RegionReader::open_in(folder, &file) {
            Err(damage) => report.damages.push(damage),
            Ok(reader) => {
                if file == *newest {
                    files.extend(reader.index.files.iter().cloned());
                }
                report.bytes += file.bytes;
                report.blocks += u64::from(reader.index.data_blocks);
                verify_blocks(folder, &reader, report);
            }
        }
    }
}

/// Every block of a file.
fn verify_blocks(folder: &mut Folder<'_>, reader: &RegionReader, report: &mut VerifyReport) {
    let name = &reader.file.name;
    let opened = match folder.open(name) {
        Ok(opened) => opened,
        Err(damage) => return report.damages.push(damage),
    };
    let mut scan = Scan::new(folder.path(name), reader);
    let bytes = BLOCK_BYTES * u64::from(reader.index.data_blocks);
    let read = folder.scan(&opened, block_at(0), bytes, |at, part| {
        for (number, block) in (at / BLOCK_BYTES - 1..).zip(part.chunks(BLOCK)) {
            scan.block(number, block);
        }
    });
    folder.close(opened);
    report.damages.extend(read.err());
    report.damages.append(&mut scan.damages);
}

/// What each block of a file must be, compared in the order of the file.
struct Scan<'a> {
    path: PathBuf,
    /// Checksums by number; a blob's blocks have none.
    expected: Vec<Option<u64>>,
    /// By first block, the last one first: those that were passed are taken off.
    blobs: Vec<&'a Blob>,
    running: Running,
    damages: Vec<Damage>,
}

impl<'a> Scan<'a> {
    fn new(path: PathBuf, reader: &'a RegionReader) -> Self {
        // The index was checked: numbers are below data_blocks, which is what the file has.
        let mut expected = vec![None; reader.index.data_blocks as usize];
        for entry in reader.index.blocks() {
            expected[entry.block as usize] = Some(entry.checksum);
        }
        let mut blobs: Vec<&Blob> = reader.index.blobs.iter().filter(|b| b.bytes > 0).collect();
        blobs.sort_by_key(|blob| std::cmp::Reverse(blob.first_block));
        let mut damages = Vec::new();
        for blob in reader.index.blobs.iter().filter(|blob| blob.bytes == 0) {
            if blob.checksum != checksum(&[]) {
                let what = format!("blob {} is empty and has a checksum of bytes", blob.name);
                damages.push(Damage::new(&path, reader.file.index_at, what));
            }
        }
        Self { path, expected, blobs, running: Running::default(), damages }
    }

    fn block(&mut self, number: u64, block: &[u8]) {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        match self.expected.get(index) {
            Some(Some(sum)) => {
                if *sum != checksum(block) {
                    let what = format!("block {number} does not have its checksum");
                    self.damages.push(Damage::new(&self.path, BLOCK_BYTES * (1 + number), what));
                }
            }
            _ => self.blob_block(number, block),
        }
    }

    fn blob_block(&mut self, number: u64, block: &[u8]) {
        let Some(blob) = self.blobs.last() else { return };
        self.running.update(block);
        if number + 1 < u64::from(blob.first_block) + blob.blocks() {
            return;
        }
        let at = block_at(blob.first_block);
        if self.running.value() != blob.checksum {
            let what = format!(
                "blob {} (bytes {at} to {}) does not have its checksum",
                blob.name,
                at + blob.blocks() * BLOCK_BYTES
            );
            self.damages.push(Damage::new(&self.path, at, what));
        }
        self.running = Running::default();
        self.blobs.pop();
    }
}
