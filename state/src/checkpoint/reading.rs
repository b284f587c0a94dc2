//! Reading files of a checkpoint folder: several reads in flight, results in order.
//!
//! Invariants: nothing is allocated for bytes that the folder's listing does not show; whatever
//! goes wrong, no read is left in flight and the file is closed.
//!
//! Called by `region`, `chain`, `store` and `verify`. The disk has nothing else in flight then.

use super::Damage;
use super::index::BLOCK_BYTES;
use crate::disk::{BUFFER_BYTES, Buffer, Disk, FileId, Op, Outcome, Pool, Ticket, run_now};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reads in flight: enough to keep a fast disk busy.
const READS: usize = 8;
/// How long to sleep before looking at the disk again.
const PATIENCE: Duration = Duration::from_millis(100);

/// A checkpoint folder, its disk, and the names and sizes that were there when it was opened.
pub(crate) struct Folder<'a> {
    pub(crate) disk: &'a mut dyn Disk,
    pool: &'a Pool,
    folder: &'a Path,
    sizes: BTreeMap<String, u64>,
}

/// A file of the folder, open to be read.
pub(crate) struct Opened {
    id: FileId,
    path: PathBuf,
    bytes: u64,
}

struct Pending {
    ticket: Ticket,
    at: u64,
    bytes: usize,
    done: Option<io::Result<Buffer>>,
}

impl<'a> Folder<'a> {
    pub(crate) fn new(
        disk: &'a mut dyn Disk,
        pool: &'a Pool,
        folder: &'a Path,
    ) -> Result<Self, Damage> {
        let listed = disk.list(folder);
        let listed = listed.map_err(|e| Damage::new(folder, 0, format!("cannot list: {e}")))?;
        Ok(Self { disk, pool, folder, sizes: listed.into_iter().collect() })
    }

    pub(crate) fn folder(&self) -> &'a Path {
        self.folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn size(&self, name: &str) -> Option<u64> {
        self.sizes.get(name).copied()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.sizes.keys().map(String::as_str)
    }

    /// The file is there and has this size.
    pub(crate) fn check_size(&self, name: &str, bytes: u64) -> Result<(), Damage> {
        match self.size(name) {
            None => Err(Damage::new(&self.path(name), 0, "the file is missing")),
            Some(found) if found != bytes => {
                let what = format!("it has {found} bytes instead of {bytes}");
                Err(Damage::new(&self.path(name), found.min(bytes), what))
            }
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn open(&mut self, name: &str) -> Result<Opened, Damage> {
        let path = self.path(name);
        let Some(bytes) = self.size(name) else {
            return Err(Damage::new(&path, 0, "the file is missing"));
        };
        match run_now(self.disk, Op::Open { path: path.clone() }) {
            Ok((Outcome::File(id), _)) => Ok(Opened { id, path, bytes }),
            Ok(other) => Err(Damage::new(&path, 0, format!("opening it gave {:?}", other.0))),
            Err(e) => Err(Damage::new(&path, 0, e.to_string())),
        }
    }

    /// Nothing can be lost by an error here: the file was only read.
    pub(crate) fn close(&mut self, opened: Opened) {
        let _ = run_now(self.disk, Op::Close { file: opened.id });
    }

    /// Opens, reads and closes.
    pub(crate) fn read(&mut self, name: &str, at: u64, bytes: u64) -> Result<Vec<u8>, Damage> {
        let opened = self.open(name)?;
        let read = self.read_open(&opened, at, bytes);
        self.close(opened);
        read
    }

    /// Reads whole blocks of an open file.
    pub(crate) fn read_open(
        &mut self,
        opened: &Opened,
        at: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, Damage> {
        let mut all = Vec::new();
        // Asked of the listing, not of whoever gave the numbers.
        if at.checked_add(bytes).is_some_and(|end| end <= opened.bytes) {
            all.reserve_exact(usize::try_from(bytes).unwrap_or(0));
        }
        self.scan(opened, at, bytes, |_, part| all.extend_from_slice(part))?;
        Ok(all)
    }

    /// Gives whole blocks of an open file to `each`, in order, with the place of each part.
    pub(crate) fn scan(
        &mut self,
        opened: &Opened,
        at: u64,
        bytes: u64,
        mut each: impl FnMut(u64, &[u8]),
    ) -> Result<(), Damage> {
        let end = at.checked_add(bytes).filter(|end| *end <= opened.bytes);
        let aligned = at.is_multiple_of(BLOCK_BYTES) && bytes.is_multiple_of(BLOCK_BYTES);
        let Some(end) = end.filter(|_| aligned) else {
            let what = format!("{bytes} bytes were to be read of {}", opened.bytes);
            return Err(Damage::new(&opened.path, at, what));
        };
        let mut next = at;
        let mut pending: VecDeque<Pending> = VecDeque::with_capacity(READS);
        let mut failed = None;
        loop {
            while failed.is_none() && next < end && pending.len() < READS {
                let Some(read) = self.submit(opened, next, end) else { break };
                next += read.bytes as u64;
                pending.push_back(read);
            }
            if pending.is_empty() {
                break;
            }
            self.await_front(&mut pending);
            let Some(first) = pending.pop_front() else { break };
            match first.done {
                Some(Ok(buffer)) if failed.is_none() => each(first.at, &buffer[..first.bytes]),
                Some(Err(e)) => {
                    failed
                        .get_or_insert_with(|| Damage::new(&opened.path, first.at, e.to_string()));
                }
                _ => {}
            }
        }
        match failed {
            Some(damage) => Err(damage),
            None if next < end => {
                let what = "no staging buffer is free to read with";
                Err(Damage::new(&opened.path, next, what))
            }
            None => Ok(()),
        }
    }

    fn submit(&mut self, opened: &Opened, at: u64, end: u64) -> Option<Pending> {
        let bytes = usize::try_from(end - at).map_or(BUFFER_BYTES, |n| n.min(BUFFER_BYTES));
        let buffer = self.pool.take()?;
        let ticket = self.disk.submit(Op::Read { file: opened.id, at, buffer, bytes }).ok()?;
        Some(Pending { ticket, at, bytes, done: None })
    }

    /// Waits until the first of `pending` is done.
    fn await_front(&mut self, pending: &mut VecDeque<Pending>) {
        let mut done = Vec::with_capacity(READS);
        while pending.front().is_some_and(|first| first.done.is_none()) {
            self.disk.poll(&mut done);
            if done.is_empty() {
                self.disk.wait(PATIENCE);
            }
            for done in done.drain(..) {
                let Some(read) = pending.iter_mut().find(|read| read.ticket == done.ticket) else {
                    continue;
                };
                read.done = Some(match (done.result, done.buffer) {
                    (Ok(Outcome::Read(n)), Some(buffer)) if n >= read.bytes => Ok(buffer),
                    (Err(e), _) => Err(e),
                    _ => Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the file became shorter while it was read",
                    )),
                });
            }
        }
    }
}
