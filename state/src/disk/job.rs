//! An operation as a sequence of system calls: the state machine that the kernel's disks share.
//!
//! Short transfers are continued, interrupted calls repeated, a file system without direct
//! transfers is used without them, a folder is opened and synced. Nothing here makes a call: a disk
//! makes the one that [`Job::call`] names and tells [`Job::advance`] its result, as the kernel
//! gives it (negative for an error).
//!
//! Invariants: pointers in a [`Call`] stay valid while the job lives, wherever it is moved; a close
//! is never repeated.
//!
//! Called by `pwrite` and `uring`.

use std::ffi::{CString, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::files::Files;
use super::{BLOCK, Buffer, Done, FileId, Op, Outcome, Ticket, failure};

/// Calls that a job repeats without getting on before it reports why.
const REPEATS_MAX: u32 = 1000;

/// A system call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    Open { path: *const libc::c_char, flags: c_int },
    Reserve { fd: RawFd, bytes: u64 },
    Write { fd: RawFd, from: *const u8, bytes: u32, at: u64 },
    Read { fd: RawFd, into: *mut u8, bytes: u32, at: u64 },
    Sync { fd: RawFd },
    Close { fd: RawFd },
    Rename { from: *const libc::c_char, to: *const libc::c_char },
    Unlink { path: *const libc::c_char },
}

/// What a job needs of the kernel, and how far it is.
#[derive(Debug)]
enum Task {
    Open { path: CString, flags: c_int },
    Reserve { file: FileId, fd: RawFd, bytes: u64 },
    Transfer { file: FileId, fd: RawFd, at: u64, buffer: Buffer, bytes: usize, moved: usize },
    Sync { file: FileId, fd: RawFd },
    SyncFd { fd: OwnedFd },
    Close { fd: RawFd },
    Rename { from: CString, to: CString },
    SyncDir { path: CString, fd: Option<OwnedFd> },
    Unlink { path: CString },
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Job {
    ticket: Ticket,
    doing: &'static str,
    writes: bool,
    path: Arc<Path>,
    task: Task,
    repeats: u32,
}

/// How a job ended.
#[derive(Debug)]
enum End {
    Done,
    Opened(OwnedFd),
    Read(usize),
}

/// A job that needs no further call.
#[derive(Debug)]
pub(super) struct Finished {
    job: Job,
    result: io::Result<End>,
}

/// What follows a call.
#[derive(Debug)]
pub(super) enum Next {
    /// The call that the job now names.
    Call(Job),
    /// Nothing.
    End(Finished),
}

const READ: c_int = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_DIRECT;
const EDIT: c_int = libc::O_RDWR | libc::O_CLOEXEC | libc::O_DIRECT;
const CREATE: c_int =
    libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC | libc::O_DIRECT;
const FOLDER: c_int = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

impl Job {
    /// Begins an operation. A path that no file can have is refused as the kernel would.
    pub(super) fn new(ticket: Ticket, op: Op, files: &mut Files) -> Result<Job, Done> {
        op.check();
        let (doing, writes) = (op.doing(), matches!(op, Op::Write { .. }));
        let no_path = || Arc::from(Path::new("(a file handed over)"));
        let (path, task) = match op {
            Op::Create { path } => on_path(path, |path| Task::Open { path, flags: CREATE }),
            Op::Open { path } => on_path(path, |path| Task::Open { path, flags: READ }),
            Op::Edit { path } => on_path(path, |path| Task::Open { path, flags: EDIT }),
            Op::Remove { path } => on_path(path, |path| Task::Unlink { path }),
            Op::SyncDir { path } => on_path(path, |path| Task::SyncDir { path, fd: None }),
            Op::Rename { from, to } => {
                let to = c_path(&to);
                let (path, task) = on_path(from, |from| (from, to));
                let task = task.and_then(|(from, to)| Ok(Task::Rename { from, to: to? }));
                (path, task)
            }
            Op::Reserve { file, bytes } => {
                let (fd, path) = files.transfer(file);
                (path, Ok(Task::Reserve { file, fd, bytes }))
            }
            Op::Write { file, at, buffer, bytes } | Op::Read { file, at, buffer, bytes } => {
                let (fd, path) = files.transfer(file);
                (path, Ok(Task::Transfer { file, fd, at, buffer, bytes, moved: 0 }))
            }
            Op::Sync { file } => {
                let (fd, path) = files.sync(file);
                (path, Ok(Task::Sync { file, fd }))
            }
            Op::SyncFd { fd } => (no_path(), Ok(Task::SyncFd { fd })),
            Op::Close { file } => {
                let (fd, path) = files.take(file);
                (path, Ok(Task::Close { fd: fd.into_raw_fd() }))
            }
        };
        match task {
            Ok(task) => Ok(Job { ticket, doing, writes, path, task, repeats: 0 }),
            Err(e) => Err(Done { ticket, result: Err(failure(doing, &path, e)), buffer: None }),
        }
    }

    /// The call to make; a transfer carries `most` bytes at most.
    pub(super) fn call(&mut self, most: usize) -> Call {
        match &mut self.task {
            Task::Open { path, flags } => Call::Open { path: path.as_ptr(), flags: *flags },
            Task::Reserve { fd, bytes, .. } => Call::Reserve { fd: *fd, bytes: *bytes },
            Task::Transfer { fd, at, buffer, bytes, moved, .. } => {
                let (fd, at) = (*fd, *at + *moved as u64);
                let rest = &mut buffer[*moved..*bytes];
                // A buffer's length fits.
                let bytes = rest.len().min(most) as u32;
                if self.writes {
                    Call::Write { fd, from: rest.as_ptr(), bytes, at }
                } else {
                    Call::Read { fd, into: rest.as_mut_ptr(), bytes, at }
                }
            }
            Task::Sync { fd, .. } => Call::Sync { fd: *fd },
            Task::SyncFd { fd } => Call::Sync { fd: fd.as_raw_fd() },
            Task::Close { fd } => Call::Close { fd: *fd },
            Task::Rename { from, to } => Call::Rename { from: from.as_ptr(), to: to.as_ptr() },
            Task::SyncDir { path, fd: None } => Call::Open { path: path.as_ptr(), flags: FOLDER },
            Task::SyncDir { fd: Some(fd), .. } => Call::Sync { fd: fd.as_raw_fd() },
            Task::Unlink { path } => Call::Unlink { path: path.as_ptr() },
        }
    }

    /// The buffer of a transfer.
    pub(super) fn buffer(&self) -> Option<&Buffer> {
        if let Task::Transfer { buffer, .. } = &self.task { Some(buffer) } else { None }
    }

    /// Whether its call may be made twice without harm, which lets tests interrupt it.
    pub(super) fn is_repeatable(&self) -> bool {
        matches!(self.task, Task::Transfer { .. } | Task::Sync { .. })
    }

    fn end(self, result: io::Result<End>) -> Next {
        Next::End(Finished { job: self, result })
    }

    /// The same call once more, unless it was made too often.
    fn repeat(mut self, why: io::Error) -> Next {
        self.repeats += 1;
        if self.repeats > REPEATS_MAX { self.end(Err(why)) } else { Next::Call(self) }
    }

    /// Takes the result of the call, as the kernel gives it.
    pub(super) fn advance(self, result: i32) -> Next {
        if result < 0 { self.failed(-result) } else { self.succeeded(result) }
    }

    fn failed(mut self, code: i32) -> Next {
        let error = io::Error::from_raw_os_error(code);
        match &mut self.task {
            // Linux has closed the file even when it says so.
            Task::Close { .. } if code == libc::EINTR => self.end(Ok(End::Done)),
            Task::Close { .. } => self.end(Err(error)),
            // The file system cannot: writes make the file longer one by one.
            Task::Reserve { .. } if code == libc::EOPNOTSUPP => self.end(Ok(End::Done)),
            // The file system has no direct transfers. It may have made the name before it said so;
            // had the name been there before, it would have said that.
            Task::Open { flags, .. } if code == libc::EINVAL && *flags & libc::O_DIRECT != 0 => {
                *flags &= !(libc::O_DIRECT | libc::O_EXCL);
                Next::Call(self)
            }
            _ if code == libc::EINTR || code == libc::EAGAIN => self.repeat(error),
            _ => self.end(Err(error)),
        }
    }

    fn succeeded(mut self, result: i32) -> Next {
        match &mut self.task {
            Task::Open { .. } => {
                // SAFETY: the kernel just gave us this descriptor; nobody else knows it.
                let fd = unsafe { OwnedFd::from_raw_fd(result) };
                self.end(Ok(End::Opened(fd)))
            }
            Task::SyncDir { fd: fd @ None, .. } => {
                // SAFETY: as above.
                *fd = Some(unsafe { OwnedFd::from_raw_fd(result) });
                Next::Call(self)
            }
            Task::Transfer { .. } => self.transferred(result as usize),
            _ => self.end(Ok(End::Done)),
        }
    }

    fn transferred(mut self, now: usize) -> Next {
        let Task::Transfer { moved, bytes, .. } = &mut self.task else {
            unreachable!("only transfers come here")
        };
        let reached = *moved + now;
        if reached >= *bytes {
            let end = if self.writes { End::Done } else { End::Read(reached) };
            return self.end(Ok(end));
        }
        // A file ends anywhere, a direct transfer goes on at a block only.
        let whole = reached - reached % BLOCK;
        if !self.writes && (now == 0 || whole != reached) {
            return self.end(Ok(End::Read(reached)));
        }
        let gets_on = whole > *moved;
        *moved = whole;
        if gets_on {
            self.repeats = 0;
            return Next::Call(self);
        }
        let why = format!("the kernel takes only {now} bytes at byte {whole} of the transfer");
        self.repeat(io::Error::new(io::ErrorKind::WriteZero, why))
    }
}

/// A task on a path, or why there is none.
fn on_path<T>(
    path: std::path::PathBuf,
    task: impl FnOnce(CString) -> T,
) -> (Arc<Path>, io::Result<T>) {
    let c = c_path(&path);
    (Arc::from(path), c.map(task))
}

impl Finished {
    /// Hands the result out and brings the open files up to date.
    pub(super) fn done(self, files: &mut Files) -> Done {
        let Job { ticket, doing, path, task, .. } = self.job;
        let buffer = match task {
            Task::Transfer { file, buffer, .. } => {
                files.transferred(file);
                Some(buffer)
            }
            Task::Reserve { file, .. } => {
                files.transferred(file);
                None
            }
            Task::Sync { file, .. } => {
                files.synced(file);
                None
            }
            _ => None,
        };
        let result = match self.result {
            Ok(End::Done) => Ok(Outcome::Done),
            Ok(End::Read(bytes)) => Ok(Outcome::Read(bytes)),
            Ok(End::Opened(fd)) => Ok(Outcome::File(files.add(fd, path))),
            Err(e) => Err(failure(doing, &path, e)),
        };
        Done { ticket, result, buffer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Pool;

    const BYTES: usize = 4 * BLOCK;

    fn transfer(writes: bool) -> (Job, Files) {
        let mut files = Files::default();
        let null = std::fs::File::open("/dev/null").unwrap();
        let file = files.add(null.into(), Path::new("/dev/null").into());
        let buffer = Pool::new(1).take().unwrap();
        let op = if writes {
            Op::Write { file, at: 0, buffer, bytes: BYTES }
        } else {
            Op::Read { file, at: 0, buffer, bytes: BYTES }
        };
        (Job::new(Ticket(1), op, &mut files).unwrap(), files)
    }

    /// Where the next call begins and what it carries.
    fn range(job: &mut Job) -> (u64, u32) {
        match job.call(BYTES) {
            Call::Write { at, bytes, .. } | Call::Read { at, bytes, .. } => (at, bytes),
            other => panic!("{other:?}"),
        }
    }

    fn goes_on(next: Next) -> Job {
        match next {
            Next::Call(job) => job,
            Next::End(finished) => panic!("{finished:?}"),
        }
    }

    fn ends(next: Next, mut files: Files) -> io::Result<Outcome> {
        match next {
            Next::End(finished) => finished.done(&mut files).result,
            Next::Call(job) => panic!("{job:?}"),
        }
    }

    #[test]
    fn a_short_write_is_continued_at_a_whole_block() {
        let (mut job, files) = transfer(true);
        assert_eq!(range(&mut job), (0, 4 * 4096));
        job = goes_on(job.advance(2 * 4096));
        assert_eq!(range(&mut job), (2 * 4096, 2 * 4096));
        job = goes_on(job.advance(4096 + 512));
        assert_eq!(range(&mut job), (3 * 4096, 4096));
        assert_eq!(ends(job.advance(4096), files).unwrap(), Outcome::Done);
    }

    #[test]
    fn a_write_that_never_gets_on_ends_with_an_error() {
        for (result, kind) in [
            (0, io::ErrorKind::WriteZero),
            (512, io::ErrorKind::WriteZero),
            (-libc::EAGAIN, io::ErrorKind::WouldBlock),
            (-libc::EINTR, io::ErrorKind::Interrupted),
        ] {
            let (mut job, files) = transfer(true);
            for _ in 0..REPEATS_MAX {
                job = goes_on(job.advance(result));
            }
            assert_eq!(ends(job.advance(result), files).unwrap_err().kind(), kind);
        }
    }

    #[test]
    fn a_read_ends_where_the_file_ends() {
        for (results, read) in [
            (&[4096, 0][..], 4096),
            (&[4096, 100], 4196),
            (&[2 * 4096, 2 * 4096], BYTES),
            (&[-libc::EINTR, 17], 17),
        ] {
            let (mut job, files) = transfer(false);
            let (last, first) = results.split_last().unwrap();
            for result in first {
                job = goes_on(job.advance(*result));
            }
            assert_eq!(ends(job.advance(*last), files).unwrap(), Outcome::Read(read));
        }
    }

    #[test]
    fn a_file_system_without_direct_transfers_is_used_without_them() {
        let mut files = Files::default();
        let op = Op::Create { path: "/x".into() };
        let mut job = Job::new(Ticket(1), op, &mut files).unwrap();
        let flags = |job: &mut Job| match job.call(1) {
            Call::Open { flags, .. } => flags,
            other => panic!("{other:?}"),
        };
        let wanted = libc::O_DIRECT | libc::O_EXCL | libc::O_CREAT;
        assert_eq!(flags(&mut job) & wanted, wanted);
        // The name may have been made by the refused call.
        job = goes_on(job.advance(-libc::EINVAL));
        assert_eq!(flags(&mut job) & wanted, libc::O_CREAT);
        let refused = ends(job.advance(-libc::EINVAL), files).unwrap_err();
        assert_eq!(crate::disk::os_code(&refused), Some(libc::EINVAL));
        assert!(refused.to_string().starts_with("cannot create /x: "), "{refused}");
    }

    #[test]
    fn a_close_is_never_repeated() {
        let (job, files) = (transfer(true).0, Files::default());
        let null = std::fs::File::open("/dev/null").unwrap();
        let closing = Job { task: Task::Close { fd: null.into_raw_fd() }, ..job };
        assert_eq!(ends(closing.advance(-libc::EINTR), files).unwrap(), Outcome::Done);
    }
}
