//! Saving: the stream of blocks that becomes one region file, through a few staging buffers.
//!
//! The file is written from front to back: header, blocks, index. Each buffer holds a run of its
//! blocks and goes to the disk when it is full; the data thread never waits for one.
//!
//! Invariants: only staging memory is handed to the disk (R14); the file is new, its name holds the
//! incarnation (R4); the sync begins after every write has completed; a failure abandons the file,
//! which is removed, and is never repaired.
//!
//! Called by `cut`.

use crate::testing::{Point, point};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use testudo_state::disk::{BLOCK, BUFFER_BYTES, Buffer, Disk, Done, FileId, Op, Outcome, Pool};

/// Staging memory of a worker.
pub(crate) const STAGING_BYTES: usize = 4 << 20;

/// Writes region files, one at a time.
pub(crate) struct Saver {
    disk: Box<dyn Disk>,
    pool: Pool,
    /// Nanoseconds that a byte takes at the bandwidth that is allowed; 0 without a limit.
    nanos_per_byte: f64,
    /// When the next write may begin.
    next_ns: f64,
    file: Option<Open>,
    done: Vec<Done>,
}

/// The file that is being written.
struct Open {
    path: PathBuf,
    id: Option<FileId>,
    /// Bytes to reserve once the file is there: writes that lengthen a file are slow.
    reserve: u64,
    /// Buffers that are full and whose writes have not completed.
    writes: usize,
    filling: Option<(Buffer, usize)>,
    /// Bytes given out so far: where the next block goes.
    bytes: u64,
    ready: VecDeque<(u64, Buffer, usize)>,
    phase: Phase,
    failed: Option<io::Error>,
    first_write_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Blocks are added.
    Filling,
    /// All blocks were added; writes are in flight.
    Writing,
    /// The file is being synced.
    Syncing,
    /// It is being closed, and removed if it failed.
    Closing,
    /// Nothing is left to do.
    Over,
}

/// A file that is over: durable, or not.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) result: Result<(), io::Error>,
    /// Monotonic clock at the first write.
    pub(crate) first_write_ns: u64,
}

impl std::fmt::Debug for Saver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open = self.file.as_ref().map(|file| (&file.path, file.phase));
        write!(f, "Saver({}, {open:?})", self.disk.kind())
    }
}

impl Saver {
    /// A saver that writes at most so many bytes a second.
    pub(crate) fn new(disk: Box<dyn Disk>, bytes_per_s: Option<u64>) -> Self {
        // Not registered with the kernel: a few workers' pools are more than the usual limit of
        // locked memory, and it gained nothing that could be measured.
        let pool = Pool::new(STAGING_BYTES);
        let nanos_per_byte = bytes_per_s.map_or(0.0, |bytes| 1e9 / bytes as f64);
        Self { disk, pool, nanos_per_byte, next_ns: 0.0, file: None, done: Vec::new() }
    }

    /// Begins a file that will have at least so many bytes; the last one must be over. `outputs`
    /// are synced along with it.
    pub(crate) fn begin(&mut self, path: &Path, bytes: u64, outputs: Vec<OwnedFd>) {
        debug_assert!(self.file.is_none());
        let mut file = Open {
            path: path.into(),
            id: None,
            reserve: bytes,
            writes: 0,
            filling: None,
            bytes: 0,
            ready: VecDeque::new(),
            phase: Phase::Filling,
            failed: None,
            first_write_ns: 0,
        };
        let create = Op::Create { path: path.into() };
        if self.disk.submit(create).is_err() {
            file.fail(io::Error::other("the disk has no room for another operation"));
        }
        for fd in outputs {
            if self.disk.submit(Op::SyncFd { fd }).is_err() {
                file.fail(io::Error::other("too many outputs to sync at once"));
            }
        }
        self.file = Some(file);
    }

    /// The place of the file's next block; `None` while no staging buffer is free.
    pub(crate) fn place(&mut self) -> Option<&mut [u8; BLOCK]> {
        let file = self.file.as_mut()?;
        if file.phase != Phase::Filling || file.failed.is_some() {
            return None;
        }
        if file.filling.is_none() {
            file.filling = Some((self.pool.take()?, 0));
        }
        let (buffer, used) = file.filling.as_mut()?;
        (&mut buffer[*used..*used + BLOCK]).try_into().ok()
    }

    /// The block at [`Saver::place`] was filled.
    pub(crate) fn placed(&mut self) {
        let Some(file) = &mut self.file else { return };
        if let Some((_, used)) = &mut file.filling {
            *used += BLOCK;
            file.bytes += BLOCK as u64;
            if *used == BUFFER_BYTES {
                file.flush();
            }
        }
    }

    /// All blocks were added.
    pub(crate) fn complete(&mut self) {
        if let Some(file) = &mut self.file {
            file.flush();
            if file.phase == Phase::Filling {
                file.phase = Phase::Writing;
            }
        }
    }

    /// The file is not wanted any more.
    pub(crate) fn abandon(&mut self, why: &str) {
        if let Some(file) = &mut self.file {
            file.fail(io::Error::other(why));
        }
    }

    /// Whether the file has failed, and nothing need be added any more.
    pub(crate) fn has_failed(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.failed.is_some())
    }

    /// Goes on without waiting. Returns the file once it is over.
    pub(crate) fn pump(&mut self, now_ns: u64) -> Option<Saved> {
        self.collect();
        let file = self.file.as_mut()?;
        if file.failed.is_some() {
            file.drop_rest();
        }
        if let (Some(id), 1..) = (file.id, file.reserve) {
            // Without effect where it is refused for lack of a slot: writes work as well.
            let bytes = std::mem::take(&mut file.reserve);
            let _ = self.disk.submit(Op::Reserve { file: id, bytes });
        }
        while let Some(id) = file.id {
            if self.next_ns > now_ns as f64 {
                break;
            }
            let Some((at, buffer, bytes)) = file.ready.pop_front() else { break };
            match self.disk.submit(Op::Write { file: id, at, buffer, bytes }) {
                Ok(_) => {
                    let takes = bytes as f64 * self.nanos_per_byte;
                    self.next_ns = self.next_ns.max(now_ns as f64) + takes;
                    if file.first_write_ns == 0 {
                        file.first_write_ns = now_ns;
                    }
                }
                Err(Op::Write { buffer, .. }) => {
                    file.ready.push_front((at, buffer, bytes));
                    break;
                }
                Err(_) => break,
            }
        }
        self.advance()
    }

    /// Sleeps until the disk has something to say, or a bounded write may begin.
    pub(crate) fn wait(&mut self, patience: std::time::Duration) {
        if self.disk.in_flight() > 0 {
            self.disk.wait(patience);
        } else {
            std::thread::sleep(patience);
        }
    }

    fn collect(&mut self) {
        self.disk.poll(&mut self.done);
        let Some(file) = &mut self.file else {
            self.done.clear();
            return;
        };
        for done in self.done.drain(..) {
            match (done.result, done.buffer) {
                (Err(error), buffer) => {
                    file.writes -= usize::from(buffer.is_some());
                    file.fail(error);
                }
                (Ok(Outcome::File(id)), _) => file.id = Some(id),
                (Ok(_), Some(_)) => file.writes -= 1,
                (Ok(_), None) => {}
            }
        }
    }

    /// From one phase to the next, as far as it goes.
    fn advance(&mut self) -> Option<Saved> {
        let file = self.file.as_mut()?;
        let is_quiet = file.writes == 0 && self.disk.in_flight() == 0;
        match file.phase {
            Phase::Filling if file.failed.is_none() => return None,
            Phase::Writing if file.failed.is_none() => {
                if is_quiet && let Some(id) = file.id {
                    point(Point::CutWritten);
                    file.phase = Phase::Syncing;
                    if self.disk.submit(Op::Sync { file: id }).is_err() {
                        file.fail(io::Error::other("the disk has no room for a sync"));
                    }
                }
                return None;
            }
            Phase::Filling | Phase::Writing | Phase::Syncing => {
                if is_quiet {
                    let path = file.path.clone();
                    let remove = file.failed.is_some() && file.id.is_some();
                    // A close that is refused only leaves a descriptor open until the next try.
                    if let Some(file) = file.id {
                        let _ = self.disk.submit(Op::Close { file });
                    }
                    if remove {
                        let _ = self.disk.submit(Op::Remove { path });
                    }
                    file.phase = Phase::Closing;
                }
                return None;
            }
            Phase::Closing if is_quiet => file.phase = Phase::Over,
            Phase::Closing => return None,
            Phase::Over => {}
        }
        let file = self.file.take()?;
        let result = file.failed.map_or(Ok(()), Err);
        Some(Saved { result, first_write_ns: file.first_write_ns })
    }
}

impl Open {
    fn flush(&mut self) {
        if let Some((buffer, used)) = self.filling.take()
            && used > 0
        {
            self.writes += 1;
            self.ready.push_back((self.bytes - used as u64, buffer, used));
        }
    }

    /// The first failure counts.
    fn fail(&mut self, error: io::Error) {
        self.failed.get_or_insert(error);
    }

    /// What was not submitted yet is not written any more.
    fn drop_rest(&mut self) {
        self.filling = None;
        self.writes -= self.ready.len();
        self.ready.clear();
    }
}
