//! The program that a worker runs: held by a descriptor, so that a file that is replaced or removed
//! on disk changes nothing for the job.
//!
//! Called by `spawn` through `recover`; `update` opens others than the launched one. A supervisor
//! that takes a job over finds out what its workers run: another program may have been brought
//! since.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An executable file, or another of the same path that stood there once.
#[derive(Debug)]
pub(crate) struct Program {
    /// Where it was found.
    pub(crate) path: PathBuf,
    exec: CString,
    _held: Option<File>,
}

impl Program {
    /// The program of this process.
    pub(crate) fn own() -> Self {
        let path = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
        // It may be executable and not readable.
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC);
        let held = options.open("/proc/self/exe");
        held.and_then(|held| Self::hold(path.clone(), held)).unwrap_or_else(|_| Self {
            path,
            exec: c"/proc/self/exe".into(),
            _held: None,
        })
    }

    /// What a process executes, whatever became of its file; `None` once it has ended.
    pub(crate) fn of_process(pid: i32) -> Option<Self> {
        let exe = format!("/proc/{pid}/exe");
        let path = std::fs::read_link(&exe).ok()?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC);
        Self::hold(path, options.open(&exe).ok()?).ok()
    }

    /// The program in an open file, which was found at this path.
    pub(crate) fn of_file(path: &Path, held: File) -> std::io::Result<Self> {
        Self::hold(path.to_owned(), held)
    }

    fn hold(path: PathBuf, held: File) -> std::io::Result<Self> {
        // The child's descriptors are those of this process until the new program has begun.
        let exec = CString::new(format!("/proc/self/fd/{}", held.as_raw_fd()))?;
        Ok(Self { path, exec, _held: Some(held) })
    }

    /// What a child of this process executes.
    pub(crate) fn exec(&self) -> &CString {
        &self.exec
    }
}
