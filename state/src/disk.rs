//! The disk: everything that touches a file of a checkpoint folder is one [`Op`], submitted and
//! polled, so that the data thread never waits and a crash can be simulated at each operation.
//!
//! Invariants: a write comes only from private staging memory (rule R14), in whole blocks, and goes
//! only to a file that did not exist before (rule R4: [`Op::Create`] refuses an existing name);
//! the slots of the roots are the one exception ([`Op::Edit`]). Nothing is linked or ordered by
//! itself: who needs an order waits for the first operation's [`Done`] before submitting the
//! second. Short transfers are continued and interrupted calls repeated inside.
//!
//! Called by `checkpoint`, and by workers and the supervisor.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod faulty;
mod files;
mod gated;
mod job;
mod memory;
mod pool;
mod pwrite;
mod uring;

pub use faulty::{Faulty, What};
pub use gated::{Gated, Verdict};
pub use memory::{Choice, Memory, SECTOR};
pub use pool::{Buffer, Pool};
pub use pwrite::Threaded;
pub use uring::Uring;

/// The unit of state on disk, and the alignment of every direct transfer.
pub const BLOCK: usize = 4096;

/// The most that one operation carries.
pub const BUFFER_BYTES: usize = 256 << 10;

/// The most operations in flight on one disk.
pub const DEPTH_MAX: usize = 32;

/// How long [`run_now`] sleeps before it looks again.
const PATIENCE: Duration = Duration::from_millis(100);

/// A file that a disk has open. Valid on that disk until [`Op::Close`] is submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u64);

/// Names an operation between its submission and its [`Done`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What can be asked of a disk.
#[derive(Debug)]
pub enum Op {
    /// Creates a file that must not exist, to be written only (rule R4).
    Create {
        /// Its name.
        path: PathBuf,
    },
    /// Opens an existing file, to be read only.
    Open {
        /// Its name.
        path: PathBuf,
    },
    /// Opens an existing file, to be read and written in place: the roots.
    Edit {
        /// Its name.
        path: PathBuf,
    },
    /// Makes room for a file's first `bytes` bytes, so that a full disk is found out early. The
    /// file is that long from then on, with zeros where nothing is written. Writes that do not make
    /// a file longer go on beside each other: 3.6 against 2.0 GB/s on ext4. A file system that
    /// cannot do it does nothing.
    Reserve {
        /// From [`Op::Create`] or [`Op::Edit`].
        file: FileId,
        /// A lower bound of what will be written, not zero.
        bytes: u64,
    },
    /// Writes `bytes` of the buffer. Both `at` and `bytes` are multiples of [`BLOCK`]. All of it
    /// is written, or the operation fails.
    Write {
        /// From [`Op::Create`] or [`Op::Edit`].
        file: FileId,
        /// Where in the file.
        at: u64,
        /// Comes back in [`Done`].
        buffer: Buffer,
        /// How much of the buffer.
        bytes: usize,
    },
    /// Reads up to `bytes` into the buffer; fewer only at the file's end. Both `at` and `bytes` are
    /// multiples of [`BLOCK`].
    Read {
        /// From [`Op::Open`] or [`Op::Edit`].
        file: FileId,
        /// Where in the file.
        at: u64,
        /// Comes back in [`Done`].
        buffer: Buffer,
        /// How much of the buffer.
        bytes: usize,
    },
    /// Makes durable what was written. No write to the file may be in flight: a sync would not
    /// cover it.
    Sync {
        /// From [`Op::Create`] or [`Op::Edit`].
        file: FileId,
    },
    /// Makes durable a file that is not the checkpoint's: a sink's output.
    SyncFd {
        /// Closed afterwards.
        fd: OwnedFd,
    },
    /// Closes a file. Nothing of it may be in flight.
    Close {
        /// Not valid any more once this is submitted.
        file: FileId,
    },
    /// Gives a file another name in the same folder; a file that had the name is gone.
    Rename {
        /// The old name.
        from: PathBuf,
        /// The new name.
        to: PathBuf,
    },
    /// Makes durable the names in a folder.
    SyncDir {
        /// The folder.
        path: PathBuf,
    },
    /// Removes a file's name.
    Remove {
        /// The name.
        path: PathBuf,
    },
}

impl Op {
    /// What it does, for messages.
    pub fn doing(&self) -> &'static str {
        match self {
            Op::Create { .. } => "create",
            Op::Open { .. } => "open",
            Op::Edit { .. } => "open for writing",
            Op::Reserve { .. } => "reserve room in",
            Op::Write { .. } => "write",
            Op::Read { .. } => "read",
            Op::Sync { .. } => "sync",
            Op::SyncFd { .. } => "sync the output",
            Op::Close { .. } => "close",
            Op::Rename { .. } => "rename",
            Op::SyncDir { .. } => "sync the folder",
            Op::Remove { .. } => "remove",
        }
    }

    /// The rules that can be seen without knowing the file. Some kernels forgive what others
    /// refuse, which would hide errors.
    fn check(&self) {
        match self {
            Op::Write { at, buffer, bytes, .. } | Op::Read { at, buffer, bytes, .. } => {
                let whole = at.is_multiple_of(BLOCK as u64) && bytes.is_multiple_of(BLOCK);
                assert!(whole, "{} of {bytes} bytes at {at}: not whole blocks", self.doing());
                assert!((1..=BUFFER_BYTES).contains(bytes), "{} of {bytes} bytes", self.doing());
                assert!(buffer.as_ptr().addr().is_multiple_of(BLOCK), "a buffer is aligned");
            }
            Op::Reserve { bytes, .. } => assert_ne!(*bytes, 0, "a reserve of nothing"),
            Op::Rename { from, to } => {
                assert_eq!(from.parent(), to.parent(), "a file stays in its folder");
            }
            _ => {}
        }
    }

    /// Whether it moves bytes of this file or makes room for them.
    fn transfers(&self, of: FileId) -> bool {
        match self {
            Op::Reserve { file, .. } | Op::Write { file, .. } | Op::Read { file, .. } => {
                *file == of
            }
            _ => false,
        }
    }

    /// The buffer, when the operation carries one.
    fn into_buffer(self) -> Option<Buffer> {
        match self {
            Op::Write { buffer, .. } | Op::Read { buffer, .. } => Some(buffer),
            _ => None,
        }
    }
}

/// What a successful operation gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The file that was created or opened.
    File(FileId),
    /// So many bytes were read.
    Read(usize),
}

/// A completed operation.
#[derive(Debug)]
pub struct Done {
    /// What [`Disk::submit`] gave.
    pub ticket: Ticket,
    /// Errors say what was done to which file; [`os_code`] has the kernel's number.
    pub result: io::Result<Outcome>,
    /// The buffer of a read or write.
    pub buffer: Option<Buffer>,
}

/// A place for files, driven by one thread.
pub trait Disk {
    /// Begins an operation. Gives it back when too many are in flight: poll first.
    ///
    /// # Panics
    ///
    /// When the operation breaks a rule of [`Op`]: these are errors of the caller.
    fn submit(&mut self, op: Op) -> Result<Ticket, Op>;

    /// Appends what has completed. Never waits; costs one comparison when nothing is in flight.
    fn poll(&mut self, done: &mut Vec<Done>);

    /// Sleeps until [`Disk::poll`] has something to do or the time is over. Returns at once when
    /// nothing is in flight.
    fn wait(&mut self, patience: Duration);

    /// Operations submitted and not yet given out by [`Disk::poll`].
    fn in_flight(&self) -> usize;

    /// Names and sizes of the plain files in a folder, sorted by name. Waits for the disk.
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>>;

    /// What it is, for messages: "io_uring", "pwrite", "memory".
    fn kind(&self) -> &'static str;

    /// Tells the kernel once where the staging memory lies, so that each transfer costs less. False
    /// when it was refused (a small limit of locked memory): transfers then work as before. What is
    /// registered counts for all processes of a user together, and an exhausted limit refuses the
    /// next process its ring: worth it only where `ulimit -l` is far above the workers' pools.
    fn register(&mut self, _pool: &Pool) -> bool {
        false
    }
}

/// An operation that failed: what was done, to which file, and why.
#[derive(Debug)]
struct Failure {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}: {}", self.doing, self.path.display(), self.source)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Says in an error what was done to which file. Keeps its kind; [`os_code`] keeps its number.
fn failure(doing: &'static str, path: &Path, source: io::Error) -> io::Error {
    io::Error::new(source.kind(), Failure { doing, path: path.to_owned(), source })
}

/// The kernel's number in an error of a [`Disk`]: `ENOSPC`, `EIO`.
pub fn os_code(error: &io::Error) -> Option<i32> {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Failure>());
    error.raw_os_error().or_else(|| inner.and_then(|failure| os_code(&failure.source)))
}

/// Which way to the disk a user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskKind {
    /// io_uring where it is allowed, else pwrite.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// A helper thread and ordinary calls.
    Pwrite,
}

/// Opens a disk for the calling thread. With [`DiskKind::Auto`] the second part says, when it is
/// there, why it is not io_uring and what to do: the caller prints it once.
pub fn open(kind: DiskKind) -> io::Result<(Box<dyn Disk>, Option<String>)> {
    let refusal = match kind {
        DiskKind::Pwrite => None,
        DiskKind::Auto | DiskKind::Uring => match Uring::new(DEPTH_MAX) {
            Ok(disk) => return Ok((Box::new(disk), None)),
            Err(e) if kind == DiskKind::Uring => return Err(e),
            Err(e) => Some(format!("{e}. Files are written by a helper thread instead (pwrite).")),
        },
    };
    Ok((Box::new(Threaded::new()?), refusal))
}

/// A kernel that makes difficulties which it is allowed to make: for tests of the disks that use
/// one. The default makes none.
#[derive(Debug, Clone, Default)]
pub struct Disturbance {
    /// A transfer carries so many bytes at most, a multiple of [`BLOCK`]; 0 is as many as asked.
    pub bytes_at_most: usize,
    /// Each so many-th transfer or sync is interrupted by a signal; 0 is none, 1 is all of them.
    pub interrupt_each: u64,
    /// Transfers and syncs so far.
    pub calls: u64,
}

impl Disturbance {
    /// What a transfer may carry.
    fn most(&self) -> usize {
        if self.bytes_at_most == 0 { BUFFER_BYTES } else { self.bytes_at_most }
    }

    /// The result of a call, or an interruption instead.
    fn result(&mut self, is_repeatable: bool, result: i32) -> i32 {
        if self.interrupt_each == 0 || !is_repeatable {
            return result;
        }
        self.calls += 1;
        if self.calls.is_multiple_of(self.interrupt_each) { -libc::EINTR } else { result }
    }
}

/// The plain files of a folder of the kernel's.
fn list_folder(folder: &Path) -> io::Result<Vec<(String, u64)>> {
    let read = || -> io::Result<Vec<(String, u64)>> {
        let mut listed = Vec::new();
        let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        for entry in fs::read_dir(here)? {
            let entry = entry?;
            let about = match entry.metadata() {
                Ok(about) => about,
                // Removed meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            if about.is_file() {
                listed.push((entry.file_name().to_string_lossy().into_owned(), about.len()));
            }
        }
        listed.sort();
        Ok(listed)
    };
    read().map_err(|e| failure("list", folder, e))
}

/// Submits one operation and waits for it: for the supervisor's small files and for tools.
///
/// # Panics
///
/// When something else is in flight: its completion would be lost.
pub fn run_now(disk: &mut dyn Disk, op: Op) -> io::Result<(Outcome, Option<Buffer>)> {
    assert_eq!(disk.in_flight(), 0, "run_now needs the disk for itself");
    let submitted = disk.submit(op);
    let ticket = submitted.unwrap_or_else(|op| panic!("an idle disk refused to {}", op.doing()));
    let mut done = Vec::with_capacity(1);
    loop {
        disk.poll(&mut done);
        if let Some(done) = done.pop() {
            assert_eq!(done.ticket, ticket, "one operation was in flight");
            return done.result.map(|outcome| (outcome, done.buffer));
        }
        disk.wait(PATIENCE);
    }
}

fn run_for_file(disk: &mut dyn Disk, op: Op) -> io::Result<FileId> {
    match run_now(disk, op)?.0 {
        Outcome::File(file) => Ok(file),
        other => unreachable!("opening a file gave {other:?}"),
    }
}

fn buffer_of(pool: &Pool) -> io::Result<Buffer> {
    pool.take().ok_or_else(|| {
        let why = "no staging buffer is free: the disk is slower than what is written to it";
        io::Error::new(io::ErrorKind::WouldBlock, why)
    })
}

/// Creates a small file with these bytes, padded with zeros to whole blocks, and makes its bytes
/// durable. Its name is durable after [`Op::SyncDir`].
pub fn write_file(disk: &mut dyn Disk, pool: &Pool, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = run_for_file(disk, Op::Create { path: path.to_owned() })?;
    let written = write_at(disk, pool, file, 0, bytes)
        .and_then(|()| run_now(disk, Op::Sync { file }).map(|_| ()));
    let closed = run_now(disk, Op::Close { file }).map(|_| ());
    written.and(closed)
}

/// Writes bytes, padded with zeros to whole blocks, at a multiple of [`BLOCK`] of an open file.
pub fn write_at(
    disk: &mut dyn Disk,
    pool: &Pool,
    file: FileId,
    at: u64,
    bytes: &[u8],
) -> io::Result<()> {
    let mut position = at;
    for part in bytes.chunks(BUFFER_BYTES) {
        let mut buffer = buffer_of(pool)?;
        let padded = part.len().next_multiple_of(BLOCK);
        buffer[..part.len()].copy_from_slice(part);
        buffer[part.len()..padded].fill(0);
        run_now(disk, Op::Write { file, at: position, buffer, bytes: padded })?;
        position += padded as u64;
    }
    Ok(())
}

/// Reads `bytes` bytes at any position of a file. More than `limit`, or more than the file has, is
/// an error, found before anything is allocated.
pub fn read_file(
    disk: &mut dyn Disk,
    pool: &Pool,
    path: &Path,
    at: u64,
    bytes: u64,
    limit: u64,
) -> io::Result<Vec<u8>> {
    let size = size_of(disk, path)?;
    let end = at.checked_add(bytes).filter(|end| *end <= size);
    let Some(end) = end.filter(|_| bytes <= limit) else {
        let why = format!("{bytes} bytes at {at} of a file of {size} bytes (limit {limit})");
        return Err(failure("read", path, io::Error::new(io::ErrorKind::InvalidData, why)));
    };
    let file = run_for_file(disk, Op::Open { path: path.to_owned() })?;
    let read = read_range(disk, pool, file, at, end);
    let closed = run_now(disk, Op::Close { file }).map(|_| ());
    let read = read.and_then(|read| closed.map(|()| read));
    read.map_err(|e| if os_code(&e).is_some() { e } else { failure("read", path, e) })
}

/// The size of a file that is there.
pub fn size_of(disk: &dyn Disk, path: &Path) -> io::Result<u64> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let listed = disk.list(folder)?;
    let found = listed.into_iter().find(|(listed, _)| listed == name);
    let missing = || failure("open", path, io::Error::from_raw_os_error(libc::ENOENT));
    found.map(|(_, size)| size).ok_or_else(missing)
}

/// The bytes from `at` to `end` of an open file that has them.
fn read_range(
    disk: &mut dyn Disk,
    pool: &Pool,
    file: FileId,
    at: u64,
    end: u64,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(end - at).map_err(io::Error::other)?);
    let mut from = at - at % BLOCK as u64;
    while from < end {
        let wanted = usize::try_from(end - from).map_or(BUFFER_BYTES, |all| all.min(BUFFER_BYTES));
        let (buffer, length) = (buffer_of(pool)?, wanted.next_multiple_of(BLOCK));
        let (outcome, buffer) = run_now(disk, Op::Read { file, at: from, buffer, bytes: length })?;
        let enough = matches!(outcome, Outcome::Read(read) if read >= wanted);
        let Some(buffer) = buffer.filter(|_| enough) else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
        };
        // Only the first part may begin inside its block; a small file is less than a block.
        let skip = usize::try_from(at.saturating_sub(from)).map_err(io::Error::other)?;
        bytes.extend_from_slice(&buffer[skip..wanted]);
        from += wanted as u64;
    }
    Ok(bytes)
}
