//! The checkpoint folders of a job: the first, and a second one that is used while the first fails.
//!
//! A folder may be removed, be full, be taken away with its disk, and come back. None of that ends
//! the job: checkpoints fail meanwhile, or go to the other folder.
//!
//! Invariants:
//! - a checkpoint lies in one folder with everything that it needs: when the folder changes, or is
//!   made again, every region is cut anew and every worker saves all that it has ([`Moved`],
//!   `ControlHeader::folder`);
//! - it changes only while no checkpoint is open;
//! - pauses between tries grow from [`PAUSE_NS`] to [`PAUSE_MAX_NS`], doubled each time, and begin
//!   anew with the first complete checkpoint;
//! - the loop never waits for a disk: each folder has a thread of its own.
//!
//! Called by `checkpoint` and, when a job begins, by `launch`.

use super::board::Externals;
use super::checkpoint::{Mended, StoreThread};
use super::watch::Events;
use crate::config::{DiskChoice, Settings};
use crate::error::Error;
use crate::metrics::figures::ExternalState;
use crossbeam::channel::{Receiver, Sender, unbounded};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use testudo_state::checkpoint::{Store, StoreError};

/// First pause before a folder that failed is tried again, and the longest.
const PAUSE_NS: u64 = 100_000_000;
const PAUSE_MAX_NS: u64 = 5_000_000_000;

/// Checkpoints go elsewhere from now on: no region has anything to carry over, and numbers begin
/// behind all that were ever used there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) next_id: u64,
    pub(crate) next_epoch: u64,
}

/// How a folder is.
#[derive(Debug, Clone, Copy, Default)]
struct Health {
    is_open: bool,
    /// Its thread is looking.
    is_checked: bool,
    /// Failures since the last complete checkpoint there.
    in_a_row: u32,
    next_ns: u64,
    /// Numbers that were never used there, when it was last opened.
    next: (u64, u64),
}

impl Health {
    fn fail(&mut self, now_ns: u64) {
        let pause = (PAUSE_NS << self.in_a_row.min(16)).min(PAUSE_MAX_NS);
        self.in_a_row += 1;
        self.next_ns = now_ns + pause;
    }

    fn is_due(&self, now_ns: u64) -> bool {
        !self.is_checked && self.next_ns <= now_ns
    }

    /// Whether a checkpoint may go there.
    fn is_usable(&self, now_ns: u64) -> bool {
        self.is_open && self.is_due(now_ns)
    }
}

/// What a check of a folder found.
type Checked = (usize, Result<Mended, String>);

/// See the module.
#[derive(Debug)]
pub(crate) struct Folders {
    stores: Vec<StoreThread>,
    health: Vec<Health>,
    current: usize,
    /// How often the place changed.
    changes: u64,
    moved: Option<Moved>,
    checked: (Sender<Checked>, Receiver<Checked>),
    /// Known once the job runs.
    externals: Externals,
    events: Option<Arc<Events>>,
}

impl Folders {
    /// Opens the folders of a job. One that cannot be opened is an error, unless the job goes on
    /// from a checkpoint and the other one can.
    pub(crate) fn open(settings: &Settings) -> Result<Option<Self>, Error> {
        let Some(first) = &settings.checkpoint_dir else { return Ok(None) };
        let (mut stores, mut health, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        for folder in [Some(first), settings.checkpoint_dir_2.as_ref()].into_iter().flatten() {
            let (store, opened) = StoreThread::begin(folder, settings.disk)?;
            health.push(Health { is_open: opened.is_ok(), ..Health::default() });
            errors.extend(opened.err());
            stores.push(store);
        }
        let resumes = settings.resume || settings.resume_from.is_some();
        if !errors.is_empty() && (!resumes || errors.len() == stores.len()) {
            return Err(errors.swap_remove(0));
        }
        for error in errors {
            crate::say!("testudo: {error}; the job goes on with the other checkpoint folder");
        }
        let current = health.iter().position(|health| health.is_open).unwrap_or(0);
        let (checked, externals) = (unbounded(), Externals::default());
        Ok(Some(Self {
            stores,
            health,
            current,
            changes: 0,
            moved: None,
            checked,
            externals,
            events: None,
        }))
    }

    /// The folders of a job whose supervisor died; the one that checkpoints go to must be there.
    pub(crate) fn adopt(paths: &[PathBuf], disk: DiskChoice, word: u64) -> Result<Self, Error> {
        let current = (word & 1) as usize;
        let (mut stores, mut health) = (Vec::new(), Vec::new());
        for (index, path) in paths.iter().enumerate() {
            let (store, opened) = StoreThread::begin(path, disk)?;
            health.push(Health { is_open: opened.is_ok(), ..Health::default() });
            stores.push(store);
            if index == current {
                opened?;
            }
        }
        Ok(Self {
            stores,
            health,
            current,
            changes: word >> 1,
            moved: None,
            checked: unbounded(),
            externals: Externals::default(),
            events: None,
        })
    }

    /// The job runs: where to say how folders are, and whom to wake.
    pub(crate) fn attend(&mut self, externals: Externals, events: &Arc<Events>) {
        (self.externals, self.events) = (externals, Some(Arc::clone(events)));
        for index in 0..self.stores.len() {
            if self.health[index].is_open {
                self.externals.works(&self.name(index));
            } else {
                let error = "it cannot be opened";
                self.externals.failed(&self.name(index), ExternalState::Failing, error);
            }
        }
    }

    /// Paths of all folders.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
        self.stores.iter().map(|store| absolute(store.folder())).collect()
    }

    /// The folder that checkpoints go to.
    pub(crate) fn current(&self) -> &StoreThread {
        &self.stores[self.current]
    }

    /// The same as workers read it.
    pub(crate) fn word(&self) -> u64 {
        self.changes * 2 + self.current as u64
    }

    /// All folders that are open, by number.
    pub(crate) fn usable(&self) -> impl Iterator<Item = (usize, &StoreThread)> {
        self.stores.iter().enumerate().filter(|(index, _)| self.health[*index].is_open)
    }

    /// The job goes on from a checkpoint in this folder.
    pub(crate) fn choose(&mut self, index: usize) {
        self.current = index;
    }

    /// Has something done in each folder that is open, and waits for it.
    pub(crate) fn in_each<R: Send + 'static>(
        &self,
        task: impl Fn(&mut Store) -> Result<R, StoreError> + Clone + Send + 'static,
    ) -> Result<Vec<R>, Error> {
        let each = self.usable().map(|(_, store)| {
            let done = store.ask(task.clone())?;
            done.map_err(|error| Error::Checkpoint(error.to_string()))
        });
        each.collect()
    }

    fn name(&self, index: usize) -> String {
        format!("checkpoint folder {}", self.stores[index].folder().display())
    }

    /// A checkpoint failed for the folder's sake.
    pub(crate) fn failed(&mut self, now_ns: u64, error: &str) {
        let name = self.name(self.current);
        self.externals.failed(&name, ExternalState::Failing, error);
        self.health[self.current].fail(now_ns);
        self.check(self.current);
        if let Some(other) = self.other(now_ns) {
            crate::say!(
                "testudo: checkpoints go to {} while {} fails",
                self.stores[other].folder().display(),
                self.stores[self.current].folder().display()
            );
            self.move_to(other);
        }
    }

    /// The other folder, if a checkpoint may go there.
    fn other(&self, now_ns: u64) -> Option<usize> {
        let other = 1 - self.current;
        self.health.get(other).filter(|health| health.is_usable(now_ns)).map(|_| other)
    }

    /// A checkpoint is complete.
    pub(crate) fn completed(&mut self) {
        let current = self.current;
        if self.health[current].in_a_row > 0 {
            self.externals.works(&self.name(current));
        }
        (self.health[current].in_a_row, self.health[current].next_ns) = (0, 0);
    }

    /// Whether a checkpoint may begin as far as folders go.
    pub(crate) fn may_begin(&self, now_ns: u64) -> bool {
        self.moved.is_none() && self.health[self.current].is_usable(now_ns)
    }

    /// When something is to be done by itself.
    pub(crate) fn due_ns(&self) -> Option<u64> {
        let ill = self.health.iter().enumerate().filter(|(index, health)| {
            !health.is_checked && (!health.is_open || *index < self.current)
        });
        ill.map(|(_, health)| health.next_ns).min()
    }

    /// Takes a turn; `is_idle` when no checkpoint is open. What is given is to be taken in before
    /// the next one begins.
    pub(crate) fn turn(&mut self, now_ns: u64, is_idle: bool) -> Option<Moved> {
        while let Ok((index, found)) = self.checked.1.try_recv() {
            self.heard(now_ns, index, found);
        }
        for index in 0..self.stores.len() {
            let health = &self.health[index];
            // The first folder is gone back to as soon as it takes something.
            if health.is_due(now_ns) && (!health.is_open || index < self.current) {
                self.check(index);
            }
        }
        if is_idle { self.moved.take() } else { None }
    }

    /// Has a folder's thread look after it: opened again if it is not what it was, and written to.
    fn check(&mut self, index: usize) {
        let Some(events) = self.events.clone() else { return };
        if std::mem::replace(&mut self.health[index].is_checked, true) {
            return;
        }
        let send = self.checked.0.clone();
        self.stores[index].mend(move |found| {
            let _ = send.send((index, found));
            events.bump();
        });
    }

    fn heard(&mut self, now_ns: u64, index: usize, found: Result<Mended, String>) {
        let name = self.name(index);
        self.health[index].is_checked = false;
        match found {
            Ok(mended) => {
                let health = &mut self.health[index];
                (health.is_open, health.next) = (true, (mended.next_id, mended.next_epoch));
                if index < self.current {
                    crate::say!(
                        "testudo: checkpoints go to {} again",
                        self.stores[index].folder().display()
                    );
                    self.move_to(index);
                } else if index == self.current && mended.is_renewed {
                    self.move_to(index);
                }
            }
            Err(error) => {
                self.externals.failed(&name, ExternalState::Failing, error);
                let health = &mut self.health[index];
                health.is_open = false;
                health.fail(now_ns);
                if index == self.current
                    && let Some(other) = self.other(now_ns)
                {
                    self.move_to(other);
                }
            }
        }
    }

    fn move_to(&mut self, index: usize) {
        self.current = index;
        self.changes += 1;
        let (next_id, next_epoch) = self.health[index].next;
        self.moved = Some(Moved { next_id, next_epoch });
    }
}
