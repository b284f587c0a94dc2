//! Retirement: removing what no checkpoint needs.
//!
//! Invariants: a file is removed only if no manifest reaches it that a root names, that a failed
//! attempt may have left in a root, or that is a savepoint; if it is not held by the caller; and
//! if it is of an epoch before the running one. If any of these manifests or their indexes, or a
//! root slot, cannot be read, what it reaches is not known and nothing is removed. Names that the
//! store does not know are left alone.
//!
//! Called by the supervisor after a commit, and before the first one of a new life.

use super::Damage;
use super::index::FileRef;
use super::manifest::{ManifestName, read_in};
use super::reading::Folder;
use super::region::{RegionName, RegionReader};
use super::store::{Store, StoreError, TEMPORARY};
use crate::disk::Op;
use std::collections::{HashMap, HashSet};

/// What must stay although no manifest reaches it.
#[derive(Debug, Clone, Default)]
pub struct Keep<'a> {
    /// Files of this epoch and of later ones may still be written.
    pub running_epoch: u64,
    /// Snapshots that were acknowledged and that a later checkpoint may carry over, with the older
    /// files that they name.
    pub held: &'a [FileRef],
}

/// What retirement did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retired {
    /// Names that were removed.
    pub removed: Vec<String>,
    /// Bytes that they had.
    pub bytes: u64,
    /// Why nothing was removed, if that is so.
    pub blocked: Option<Damage>,
}

impl Store {
    /// Removes manifests, region files and temporary files that nothing needs.
    ///
    /// # Errors
    /// If the disk refused. What was removed by then was not needed.
    pub fn retire(&mut self, keep: &Keep<'_>) -> Result<Retired, StoreError> {
        let reached = match self.reached(keep)? {
            Ok(reached) => reached,
            Err(damage) => return Ok(Retired { blocked: Some(damage), ..Retired::default() }),
        };
        self.older.retain(|name, _| reached.contains(name));
        let mut retired = Retired::default();
        let mut garbage = self.list()?;
        garbage.retain(|(name, _)| !reached.contains(name) && is_old(name, keep.running_epoch));
        // Manifests first, so that none is there whose files are gone.
        garbage.sort_by_key(|(name, _)| RegionName::parse(name).is_some());
        for (name, bytes) in garbage {
            let path = self.folder().join(&name);
            self.run(&path, Op::Remove { path: path.clone() })?;
            retired.removed.push(name);
            retired.bytes += bytes;
        }
        Ok(retired)
    }

    /// Names of all that is needed, or why that is not known.
    fn reached(&mut self, keep: &Keep<'_>) -> Result<Result<HashSet<String>, Damage>, StoreError> {
        if let Some(damage) = self.slots().iter().find_map(|slot| slot.root.as_ref().err()) {
            return Ok(Err(damage.clone()));
        }
        let mut names: HashSet<String> = self.rooted().map(str::to_owned).collect();
        for (name, _) in self.list()? {
            if ManifestName::parse(&name).is_some_and(|name| name.savepoint) {
                names.insert(name);
            }
        }
        let mut older = std::mem::take(&mut self.older);
        let path = self.folder().to_owned();
        let (disk, pool) = self.disk();
        let mut folder = Folder::new(disk, pool, &path)?;
        let reached = reach(&mut folder, &mut older, names, keep.held);
        self.older = older;
        Ok(reached)
    }
}

/// Everything that these manifests and held files reach. `older` remembers what was read: a region
/// file never changes.
fn reach(
    folder: &mut Folder<'_>,
    older: &mut HashMap<String, Vec<FileRef>>,
    manifests: HashSet<String>,
    held: &[FileRef],
) -> Result<HashSet<String>, Damage> {
    let mut files = held.to_vec();
    for name in &manifests {
        files.extend(read_in(folder, name)?.0.files().cloned());
    }
    let mut reached = manifests;
    for file in files {
        if !older.contains_key(&file.name) {
            let index = RegionReader::open_in(folder, &file)?.index;
            older.insert(file.name.clone(), index.files);
        }
        let named = older.get(&file.name).into_iter().flatten();
        reached.extend(named.map(|file| file.name.clone()));
        reached.insert(file.name);
    }
    Ok(reached)
}

/// A file of ours that is not being written any more.
fn is_old(name: &str, running_epoch: u64) -> bool {
    // A commit waits for its own temporary files: one that is there was left behind.
    let left_behind = name
        .strip_suffix(TEMPORARY)
        .is_some_and(|stem| stem == super::root::ROOTS || ManifestName::parse(stem).is_some());
    let region = RegionName::parse(name).is_some_and(|name| name.epoch < running_epoch);
    left_behind || region || ManifestName::parse(name).is_some()
}
