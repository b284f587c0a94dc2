//! The store: a checkpoint folder in the hands of its job. It commits checkpoints, finds the newest
//! whole one, and (`retire`) removes what nothing needs.
//!
//! Order of a commit, each step complete and its result checked before the next: the workers' files
//! are durable → manifest under a temporary name → sync → rename → sync of the folder → the root
//! slot that is not the base → sync. `state/FORMAT.md` says what a crash at each point leaves.
//!
//! Invariants:
//! - the slot of the *base*, the last checkpoint that is known to be whole, is never written;
//! - a file whose sync failed is not written again: a new attempt makes a new one (the kernel may
//!   have forgotten what it failed to write, and report the next sync as good);
//! - what a failed attempt may have left in a slot counts as reached until it is written anew.
//!
//! Called by the supervisor. Each call waits for the disk.

use super::Damage;
use super::chain::Chain;
use super::index::FileRef;
use super::lock::FolderLock;
use super::manifest::{Manifest, ManifestName, Previous, read_in};
use super::presence::Presence;
use super::reading::Folder;
use super::region::{RegionName, RegionReader};
use super::root::{ManifestRef, ROOTS, Root, SLOTS, sum_of};
use crate::disk::{
    BLOCK, BUFFER_BYTES, Disk, FileId, Op, Outcome, Pool, run_now, write_at, write_file,
};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What files are called before they get their name.
pub(crate) const TEMPORARY: &str = ".tmp";
/// Staging buffers of a store.
const BUFFERS: usize = 8;

/// What can go wrong with a checkpoint folder as a whole.
#[derive(Debug)]
#[non_exhaustive]
pub enum StoreError {
    /// The disk refused something.
    Io {
        /// The file or folder.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder cannot be made, or not be used at all.
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not as it was written.
    Damaged(Damage),
    /// Another process works with the folder.
    Locked {
        /// The folder.
        folder: PathBuf,
        /// The process, if it could be found out.
        pid: Option<u32>,
    },
    /// There are checkpoints, but nothing says which of them counts.
    NoRoots {
        /// The folder.
        folder: PathBuf,
        /// One of the manifests there.
        manifest: String,
    },
    /// The folder is not the one that was opened: it was removed, or replaced by another one.
    Gone {
        /// The folder.
        folder: PathBuf,
    },
    /// A manifest must not be committed.
    Refused {
        /// Its checkpoint.
        id: u64,
        /// Why.
        what: String,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { file, source } => write!(
                f,
                "checkpoint folder: {}: {source}; this attempt is given up, the checkpoint before \
                 it still counts: make room or mend the disk, the next attempt uses new files",
                file.display()
            ),
            Self::Unusable { folder, source } => write!(
                f,
                "checkpoint folder {} cannot be made or used: {source}; give one on a disk that \
                 this user may write to",
                folder.display()
            ),
            Self::Damaged(damage) => damage.fmt(f),
            Self::Locked { folder, pid } => {
                let pid = pid.map_or("another process".to_string(), |pid| format!("process {pid}"));
                write!(
                    f,
                    "checkpoint folder {} is in use by {pid}; a folder belongs to one job: stop \
                     that job or give this one another --checkpoint-dir",
                    folder.display()
                )
            }
            Self::NoRoots { folder, manifest } => write!(
                f,
                "checkpoint folder {} has {manifest} but no file \"{ROOTS}\", so nothing says \
                 which checkpoint is the newest; bring the file back from a copy, or name the \
                 checkpoint \
                 with --resume-from and give another --checkpoint-dir",
                folder.display()
            ),
            Self::Gone { folder } => write!(
                f,
                "checkpoint folder {} was removed or replaced while it was in use; it is opened \
                 anew, and the next checkpoint has everything in it",
                folder.display()
            ),
            Self::Refused { id, what } => write!(
                f,
                "checkpoint {id} is not committed: {what}; the checkpoint before it still counts"
            ),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } | Self::Unusable { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<Damage> for StoreError {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage)
    }
}

/// A checkpoint that a root slot names, or a slot that cannot be read.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The slot.
    pub slot: u32,
    /// The slot's sequence number; 0 when it cannot be read.
    pub sequence: u64,
    /// The manifest's file; empty when the slot cannot be read.
    pub name: String,
    /// The manifest, if it can be read.
    pub manifest: Option<Manifest>,
    /// The first damage found in slot, manifest, headers, indexes and sizes; blocks are checked
    /// when they are read.
    pub damage: Option<Damage>,
}

impl Candidate {
    /// Whether a restore can begin with it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.damage.is_none() && self.manifest.is_some()
    }
}

/// A slot as it was read, or as it was last written.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    pub(crate) bytes: Vec<u8>,
    pub(crate) root: Result<Root, Damage>,
}

/// A checkpoint folder in the hands of its job.
pub struct Store {
    disk: Box<dyn Disk>,
    pool: Pool,
    folder: PathBuf,
    slots: Vec<Slot>,
    /// The slot of the last checkpoint that is known to be whole. Looked for when it is needed.
    base: Option<usize>,
    /// The roots, open to be written; none once a sync of theirs failed.
    roots: Option<FileId>,
    /// Manifests that a failed attempt may have left in the slot that is not the base.
    pub(super) unsure: Vec<String>,
    /// For each region file that was looked at: the older ones that it names.
    pub(super) older: HashMap<String, Vec<FileRef>>,
    presence: Presence,
    _lock: Option<FolderLock>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("folder", &self.folder)
            .field("disk", &self.disk.kind())
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens a folder for a job: makes it and its roots if they are not there, and keeps other
    /// jobs out for as long as the store, or its process, lives.
    ///
    /// # Errors
    /// If another process has the folder, or it cannot be read and written.
    pub fn open(folder: &Path, disk: Box<dyn Disk>) -> Result<Self, StoreError> {
        Self::open_for(folder, disk, std::process::id())
    }

    /// As [`Store::open`], for a job that is known by another process than this one: whoever is
    /// kept out is told of that.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_for(folder: &Path, disk: Box<dyn Disk>, job: u32) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Unusable { folder: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(failed)?;
        // The folder's own name must survive as well.
        let real = folder.canonicalize().map_err(failed)?;
        let lock = FolderLock::take(folder, job)?;
        let mut store = Self::attach(folder, disk, Pool::new(BUFFERS * BUFFER_BYTES))?;
        if let Some(parent) = real.parent() {
            store.run(&real, Op::SyncDir { path: parent.to_owned() })?;
        }
        store._lock = Some(lock);
        Ok(store)
    }

    /// Opens a folder that is there and that the caller keeps others out of. `pool` is what the
    /// store stages with.
    ///
    /// # Errors
    /// If it cannot be read and written, or has manifests but no roots.
    pub fn attach(folder: &Path, disk: Box<dyn Disk>, pool: Pool) -> Result<Self, StoreError> {
        let mut store = Self {
            disk,
            pool,
            folder: folder.to_owned(),
            slots: Vec::new(),
            base: None,
            roots: None,
            unsure: Vec::new(),
            older: HashMap::new(),
            presence: Presence::default(),
            _lock: None,
        };
        let listed = store.list()?;
        if !listed.iter().any(|(name, _)| name == ROOTS) {
            let manifest = listed.iter().find(|(name, _)| ManifestName::parse(name).is_some());
            if let Some((manifest, _)) = manifest {
                let (folder, manifest) = (store.folder, manifest.clone());
                return Err(StoreError::NoRoots { folder, manifest });
            }
            store.slots = (0..SLOTS).map(|slot| begun(slot, 0)).collect();
            store.renew_roots()?;
        }
        let mut view = Folder::new(&mut *store.disk, &store.pool, &store.folder)?;
        store.slots = read_slots(&mut view);
        // What decisions are made on was perhaps read from memory only.
        store.edit_roots()?;
        if let Some(file) = store.roots {
            store.run(&store.folder.join(ROOTS), Op::Sync { file })?;
        }
        store.sync_folder()?;
        store.presence = Presence::of(folder, ROOTS);
        Ok(store)
    }

    /// Whether the folder is still the one that was opened.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.presence == Presence::of(&self.folder, ROOTS)
    }

    /// Writes so many bytes to a file of its own, durably, and removes it: whether the folder takes
    /// anything at all.
    ///
    /// # Errors
    /// If it does not.
    pub fn probe(&mut self, bytes: usize) -> Result<(), StoreError> {
        let path = self.folder.join(format!("probe{TEMPORARY}"));
        let written = write_file(&mut *self.disk, &self.pool, &path, &vec![0; bytes]);
        let removed = self.run(&path, Op::Remove { path: path.clone() });
        written.map_err(|source| StoreError::Io { file: path, source })?;
        removed.map(|_| ())
    }

    fn check_in_place(&self) -> Result<(), StoreError> {
        if self.is_in_place() {
            return Ok(());
        }
        Err(StoreError::Gone { folder: self.folder.clone() })
    }

    /// The disk, for the caller's own files. Nothing may be in flight when the store is called.
    pub fn disk(&mut self) -> (&mut dyn Disk, &Pool) {
        (&mut *self.disk, &self.pool)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The first checkpoint number that was never used here.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn next_id(&self) -> Result<u64, StoreError> {
        let names = self.list()?;
        let ids = names.iter().filter_map(|(name, _)| {
            ManifestName::parse(name.strip_suffix(TEMPORARY).unwrap_or(name))
        });
        let named = self.slots.iter().filter_map(|slot| {
            ManifestName::parse(&slot.root.as_ref().ok()?.manifest.as_ref()?.name)
        });
        Ok(ids.chain(named).map(|name| name.id).max().map_or(1, |id| id.saturating_add(1)))
    }

    /// The first epoch of which no file was ever left here: a new life of the job begins there.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn next_epoch(&self) -> Result<u64, StoreError> {
        let names = self.list()?;
        let epochs = names.iter().filter_map(|(name, _)| RegionName::parse(name));
        Ok(epochs.map(|name| name.epoch).max().map_or(1, |epoch| epoch.saturating_add(1)))
    }

    /// The checkpoints that the roots name, newest first, each with its damage.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn candidates(&mut self) -> Result<Vec<Candidate>, StoreError> {
        let mut view = Folder::new(&mut *self.disk, &self.pool, &self.folder)?;
        Ok(candidates_in(&mut view, &self.slots))
    }

    /// As [`Store::candidates`], but only the manifests are read: damage of the files that they
    /// name is for those to find who read them.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn named(&mut self) -> Result<Vec<Candidate>, StoreError> {
        let mut view = Folder::new(&mut *self.disk, &self.pool, &self.folder)?;
        Ok(named_in(&mut view, &self.slots))
    }

    /// The newest checkpoint that is whole. Later commits do not touch it before there is a newer.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn newest_whole(&mut self) -> Result<Option<Candidate>, StoreError> {
        let whole = self.candidates()?.into_iter().find(Candidate::is_whole);
        if let Some(candidate) = &whole {
            self.base = Some(candidate.slot as usize);
        }
        Ok(whole)
    }

    /// Opens the state of one worker as a checkpoint has it.
    ///
    /// # Errors
    /// The first damage in its files' headers and indexes.
    pub fn chain(&mut self, file: &FileRef) -> Result<Chain, Damage> {
        Chain::open(&mut *self.disk, &self.pool, &self.folder, file)
    }

    /// What one worker had besides pages of state: see [`Chain::open_end`].
    ///
    /// # Errors
    /// The first damage that is met.
    pub fn chain_end(&mut self, file: &FileRef) -> Result<Chain, Damage> {
        Chain::open_end(&mut *self.disk, &self.pool, &self.folder, file)
    }

    /// Makes a checkpoint count. All files that it names are durable already. When this returns,
    /// the checkpoint survives any crash; after an error the one before it still counts, and a
    /// new attempt takes a new number.
    ///
    /// # Errors
    /// If the manifest cannot be true (a file is missing, a number used), or the disk refused.
    pub fn commit(&mut self, manifest: &Manifest) -> Result<Previous, StoreError> {
        self.commit_with(manifest, || ())
    }

    /// As [`Store::commit`], calling `named` once the manifest is durable and no root names it yet.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub fn commit_with(
        &mut self,
        manifest: &Manifest,
        named: impl FnOnce(),
    ) -> Result<Previous, StoreError> {
        self.check_in_place()?;
        let base = self.find_base()?;
        let mut manifest = manifest.clone();
        let below = self.slots[base].root.as_ref().ok().and_then(|root| root.manifest.clone());
        manifest.previous = below.map(|m| Previous { name: m.name, checksum: m.checksum });
        self.check(&manifest, base)?;
        let bytes = manifest.encode();
        let name = manifest.name().to_string();
        let temporary = self.folder.join(format!("{name}{TEMPORARY}"));
        if let Err(error) = self.write_new(&temporary, &bytes, &self.folder.join(&name)) {
            // Best effort: what stays is removed when the store retires.
            let _ = run_now(&mut *self.disk, Op::Remove { path: temporary });
            return Err(error);
        }
        named();
        self.check_in_place()?;
        let committed = Previous { name: name.clone(), checksum: super::checksum(&bytes) };
        let checksum = committed.checksum;
        let root = ManifestRef { name, bytes: bytes.len() as u64, checksum };
        self.write_root(base, manifest.job_id, Some(root))?;
        Ok(committed)
    }

    /// Makes an older checkpoint the newest one, before anything outside the folder (an output) is
    /// taken back to it: a crash must not find the newer one again.
    ///
    /// # Errors
    /// If it is not whole, or the disk refused.
    pub fn adopt(&mut self, name: &str) -> Result<(), StoreError> {
        let mut view = Folder::new(&mut *self.disk, &self.pool, &self.folder)?;
        let bytes = view.size(name).unwrap_or(0);
        let (manifest, checksum) = read_in(&mut view, name)?;
        check_files(&mut view, &manifest)?;
        let slots = self.slots.iter().position(|slot| {
            let root = slot.root.as_ref().ok();
            root.and_then(|root| root.manifest.as_ref()).is_some_and(|m| m.name == name)
        });
        let base = match slots {
            Some(slot) => slot,
            None => self.find_base()?,
        };
        let named = ManifestRef { name: name.to_string(), bytes, checksum };
        self.write_root(base, manifest.job_id, Some(named))
    }

    /// Begins the folder anew for a job: no checkpoint that is there counts any more. Savepoints
    /// stay, for who names them.
    ///
    /// # Errors
    /// If the disk refused.
    pub fn reset(&mut self, job: u64) -> Result<(), StoreError> {
        for _ in 0..SLOTS {
            let base = self.find_base()?;
            self.write_root(base, job, None)?;
        }
        Ok(())
    }

    /// Removes a savepoint's manifest, so that its files are retired like others.
    ///
    /// # Errors
    /// If a root names it, or the disk refused.
    pub fn remove_savepoint(&mut self, id: u64) -> Result<(), StoreError> {
        let name = ManifestName { id, savepoint: true }.to_string();
        if self.rooted().any(|rooted| rooted == name) {
            let what = "it is the newest checkpoint, or the one before".into();
            return Err(StoreError::Refused { id, what });
        }
        let path = self.folder.join(&name);
        self.run(&path, Op::Remove { path: path.clone() })?;
        self.sync_folder()
    }

    /// Manifests that roots name, or may name.
    pub(super) fn rooted(&self) -> impl Iterator<Item = &str> {
        let named = self
            .slots
            .iter()
            .filter_map(|slot| Some(slot.root.as_ref().ok()?.manifest.as_ref()?.name.as_str()));
        named.chain(self.unsure.iter().map(String::as_str))
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(super) fn list(&self) -> Result<Vec<(String, u64)>, StoreError> {
        let listed = self.disk.list(&self.folder);
        listed.map_err(|source| StoreError::Io { file: self.folder.clone(), source })
    }

    pub(super) fn run(&mut self, file: &Path, op: Op) -> Result<Outcome, StoreError> {
        let done = run_now(&mut *self.disk, op);
        done.map(|done| done.0).map_err(|source| StoreError::Io { file: file.to_owned(), source })
    }

    fn sync_folder(&mut self) -> Result<(), StoreError> {
        let path = self.folder.clone();
        self.run(&path, Op::SyncDir { path: path.clone() }).map(|_| ())
    }

    /// The slot that must not be written now: that of the newest whole checkpoint, or where there
    /// is none the newer slot that can be read.
    fn find_base(&mut self) -> Result<usize, StoreError> {
        if let Some(base) = self.base {
            return Ok(base);
        }
        let whole = self.newest_whole()?.map(|candidate| candidate.slot as usize);
        let newest = || {
            let read = self.slots.iter().enumerate();
            read.max_by_key(|(_, slot)| slot.root.as_ref().map_or(0, |root| root.sequence))
                .map_or(0, |(slot, _)| slot)
        };
        Ok(whole.unwrap_or_else(newest))
    }

    /// What a manifest must be to be committed on top of `base`.
    fn check(&self, manifest: &Manifest, base: usize) -> Result<(), StoreError> {
        let refused = |what| Err(StoreError::Refused { id: manifest.id, what });
        if let Err(what) = manifest.check() {
            return refused(what);
        }
        let root = self.slots[base].root.as_ref().ok();
        if let Some(root) = root.filter(|root| root.manifest.is_some())
            && root.job != manifest.job_id
        {
            let (theirs, ours) = (root.job, manifest.job_id);
            return refused(format!("the folder belongs to job {theirs:016x}, not {ours:016x}"));
        }
        let next = self.next_id()?;
        if manifest.id < next {
            return refused(format!("numbers below {next} were used in this folder"));
        }
        let listed: HashMap<String, u64> = self.list()?.into_iter().collect();
        for file in manifest.files() {
            match listed.get(&file.name) {
                Some(bytes) if *bytes == file.bytes => {}
                Some(bytes) => {
                    let name = &file.name;
                    return refused(format!("{name} has {bytes} bytes instead of {}", file.bytes));
                }
                None => return refused(format!("{} is not there", file.name)),
            }
        }
        Ok(())
    }

    /// Writes a new file under a temporary name, and gives it its own once it is durable.
    fn write_new(&mut self, temporary: &Path, bytes: &[u8], path: &Path) -> Result<(), StoreError> {
        write_file(&mut *self.disk, &self.pool, temporary, bytes)
            .map_err(|source| StoreError::Io { file: temporary.to_owned(), source })?;
        let (from, to) = (temporary.to_owned(), path.to_owned());
        self.run(path, Op::Rename { from, to })?;
        self.sync_folder()
    }

    /// Writes the slot that is not `base`, and makes it the base.
    fn write_root(
        &mut self,
        base: usize,
        job: u64,
        manifest: Option<ManifestRef>,
    ) -> Result<(), StoreError> {
        let slot = (base + 1) % SLOTS;
        let sequences =
            self.slots.iter().filter_map(|slot| Some(slot.root.as_ref().ok()?.sequence));
        let sequence = sequences.max().unwrap_or(0) + 1;
        let previous = sum_of(&self.slots[base].bytes);
        let root = Root { sequence, job, manifest, previous };
        let bytes = root.encode(u32::try_from(slot).unwrap_or(0)).to_vec();
        let before = std::mem::replace(&mut self.slots[slot], Slot { bytes, root: Ok(root) });
        let written = match self.roots {
            Some(file) => self.write_slot(file, slot),
            None => self.renew_roots(),
        };
        if let Err(error) = written {
            // Either may be found there after a crash. The next attempt writes the same slot.
            let attempted = std::mem::replace(&mut self.slots[slot], before);
            for slot in [&attempted, &self.slots[slot]] {
                let manifest = slot.root.as_ref().ok().and_then(|root| root.manifest.as_ref());
                self.unsure.extend(manifest.map(|manifest| manifest.name.clone()));
            }
            return Err(error);
        }
        self.unsure.clear();
        self.base = Some(slot);
        Ok(())
    }

    fn write_slot(&mut self, file: FileId, slot: usize) -> Result<(), StoreError> {
        let path = self.folder.join(ROOTS);
        let (at, bytes) = ((slot * BLOCK) as u64, &self.slots[slot].bytes);
        let written = write_at(&mut *self.disk, &self.pool, file, at, bytes)
            .and_then(|()| run_now(&mut *self.disk, Op::Sync { file }));
        written.map(|_| ()).map_err(|source| {
            self.roots = None;
            let _ = run_now(&mut *self.disk, Op::Close { file });
            StoreError::Io { file: path, source }
        })
    }

    /// Puts a new file of roots, with the slots as they are in memory, in the place of the old one.
    fn renew_roots(&mut self) -> Result<(), StoreError> {
        let temporary = self.folder.join(format!("{ROOTS}{TEMPORARY}"));
        if self.list()?.iter().any(|(name, _)| temporary.ends_with(name)) {
            self.run(&temporary, Op::Remove { path: temporary.clone() })?;
        }
        let bytes: Vec<u8> =
            self.slots.iter().flat_map(|slot| slot.bytes.iter().copied()).collect();
        self.write_new(&temporary, &bytes, &self.folder.join(ROOTS))?;
        self.presence = Presence::of(&self.folder, ROOTS);
        // Durable already. If it cannot be opened, the next commit makes a new one again.
        let _ = self.edit_roots();
        Ok(())
    }

    fn edit_roots(&mut self) -> Result<(), StoreError> {
        let path = self.folder.join(ROOTS);
        let whole = (ROOTS.to_string(), (SLOTS * BLOCK) as u64);
        if !self.list()?.contains(&whole) {
            // Not two slots long: the next commit makes a new one.
            return Ok(());
        }
        if let Some(file) = self.roots.take() {
            let _ = run_now(&mut *self.disk, Op::Close { file });
        }
        match self.run(&path, Op::Edit { path: path.clone() })? {
            Outcome::File(file) => self.roots = Some(file),
            other => unreachable!("opening a file gave {other:?}"),
        }
        Ok(())
    }
}

/// A slot of a folder that holds no checkpoint.
fn begun(slot: usize, job: u64) -> Slot {
    let root = Root { sequence: slot as u64 + 1, job, manifest: None, previous: 0 };
    let bytes = root.encode(u32::try_from(slot).unwrap_or(0)).to_vec();
    Slot { bytes, root: Ok(root) }
}

/// Reads both slots; what cannot be read is a slot with its damage.
pub(crate) fn read_slots(folder: &mut Folder<'_>) -> Vec<Slot> {
    let path = folder.path(ROOTS);
    let bytes = folder.size(ROOTS).unwrap_or(0);
    let mut slot = |slot: usize| {
        let at = (slot * BLOCK) as u64;
        let read = if at + BLOCK as u64 <= bytes {
            folder.read(ROOTS, at, BLOCK as u64)
        } else {
            Err(Damage::new(&path, bytes, format!("{bytes} bytes are no two root slots")))
        };
        match read {
            Err(damage) => Slot { bytes: vec![0; BLOCK], root: Err(damage) },
            Ok(bytes) => {
                let root = Root::decode(&bytes, u32::try_from(slot).unwrap_or(0));
                let root = root.map_err(|(offset, what)| Damage::new(&path, at + offset, what));
                Slot { bytes, root }
            }
        }
    };
    (0..SLOTS).map(&mut slot).collect()
}

/// The checkpoints that slots name, newest first. Slots that cannot be read come first: what they
/// named may have been newer.
pub(crate) fn candidates_in(folder: &mut Folder<'_>, slots: &[Slot]) -> Vec<Candidate> {
    let mut candidates = named_in(folder, slots);
    for candidate in &mut candidates {
        if let Some(manifest) = &candidate.manifest {
            candidate.damage = check_files(folder, manifest).err();
        }
    }
    candidates
}

/// The same, by their manifests alone.
fn named_in(folder: &mut Folder<'_>, slots: &[Slot]) -> Vec<Candidate> {
    let begun_at = slots.iter().filter_map(|slot| slot.root.as_ref().ok());
    let begun_at = begun_at.filter(|root| root.manifest.is_none()).map(|root| root.sequence).max();
    let mut candidates = Vec::new();
    for (slot, found) in (0_u32..).zip(slots) {
        let mut candidate =
            Candidate { slot, sequence: 0, name: String::new(), manifest: None, damage: None };
        match &found.root {
            Err(damage) => candidate.damage = Some(damage.clone()),
            Ok(root) => {
                let counts = begun_at.is_none_or(|begun| root.sequence > begun);
                let Some(named) = root.manifest.as_ref().filter(|_| counts) else { continue };
                candidate.sequence = root.sequence;
                candidate.name.clone_from(&named.name);
                match read_named(folder, named, root.job) {
                    Err(damage) => candidate.damage = Some(damage),
                    Ok(manifest) => candidate.manifest = Some(manifest),
                }
            }
        }
        candidates.push(candidate);
    }
    candidates.sort_by_key(|c| (c.sequence != 0, std::cmp::Reverse(c.sequence)));
    candidates
}

/// Reads the manifest that a root names.
pub(crate) fn read_named(
    folder: &mut Folder<'_>,
    named: &ManifestRef,
    job: u64,
) -> Result<Manifest, Damage> {
    folder.check_size(&named.name, named.bytes)?;
    let (manifest, checksum) = read_in(folder, &named.name)?;
    let path = folder.path(&named.name);
    if checksum != named.checksum || manifest.job_id != job {
        return Err(Damage::new(&path, 0, "the manifest is not the one that the root names"));
    }
    Ok(manifest)
}

/// Headers, indexes and sizes of all files that a manifest reaches.
pub(crate) fn check_files(folder: &mut Folder<'_>, manifest: &Manifest) -> Result<(), Damage> {
    for file in manifest.files() {
        let newest = RegionReader::open_in(folder, file)?;
        if newest.header.job != manifest.job_id {
            let what = "the file belongs to another job";
            return Err(Damage::new(&folder.path(&file.name), 16, what));
        }
        for older in &newest.index.files {
            RegionReader::open_in(folder, older)?;
        }
    }
    Ok(())
}

/// The checkpoints that the roots of a folder name, for tools: takes no lock and writes nothing.
///
/// # Errors
/// If the folder cannot be listed.
pub fn candidates(
    disk: &mut dyn Disk,
    pool: &Pool,
    folder: &Path,
) -> Result<Vec<Candidate>, Damage> {
    let mut view = Folder::new(disk, pool, folder)?;
    let slots = read_slots(&mut view);
    Ok(candidates_in(&mut view, &slots))
}

/// All manifests in a folder, oldest first, whether or not a root names them: savepoints, and what
/// was not retired yet.
///
/// # Errors
/// If the folder cannot be listed.
pub fn manifests(
    disk: &mut dyn Disk,
    pool: &Pool,
    folder: &Path,
) -> Result<Vec<(ManifestName, Result<Manifest, Damage>)>, Damage> {
    let mut view = Folder::new(disk, pool, folder)?;
    let mut names: Vec<_> = view.names().filter_map(ManifestName::parse).collect();
    names.sort();
    Ok(names.into_iter().map(|n| (n, read_in(&mut view, &n.to_string()).map(|m| m.0))).collect())
}
