//! A file that grows exactly: everything up to a position is complete, everything beyond it is
//! taken back on opening.
//!
//! Invariants (R13): one writer for each file; bytes are written at the position before it moves; a
//! file shorter than its position is an error, not padding. A file without a size (a pipe,
//! /dev/null) is written as it is.
//!
//! Called by the file sinks.

use crate::testing::refused;
use crate::worker::outside::may_pass;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An exactly growing file.
#[derive(Debug)]
pub struct AppendFile {
    path: PathBuf,
    file: File,
    is_regular: bool,
}

/// Why a file takes nothing, with the operating system's number of the error, if it is one of those
/// that may pass.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) message: String,
    pub(crate) outage: Option<i32>,
}

impl Refusal {
    pub(crate) fn new(message: String, error: &std::io::Error) -> Self {
        let outage = error.raw_os_error().filter(|errno| may_pass(*errno));
        Self { message, outage }
    }
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self { message, outage: None }
    }
}

impl AppendFile {
    /// Opens or creates the file and cuts it at `position`.
    ///
    /// # Errors
    /// What is wrong with the file, as text.
    pub fn open(path: &Path, position: u64) -> Result<Self, String> {
        Self::try_open(path, position).map_err(|refusal| refusal.message)
    }

    pub(crate) fn try_open(path: &Path, position: u64) -> Result<Self, Refusal> {
        let failed = |what: &str, error: std::io::Error| {
            Refusal::new(format!("cannot {what} {}: {error}", path.display()), &error)
        };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|error| failed("open output", error))?;
        let meta = file.metadata().map_err(|error| failed("look at output", error))?;
        let is_regular = meta.is_file();
        if is_regular {
            if meta.len() < position {
                return Err(changed(path, meta.len(), position).into());
            }
            if meta.len() > position {
                file.set_len(position).map_err(|error| failed("truncate output", error))?;
            }
        }
        Ok(Self { path: path.into(), file, is_regular })
    }

    /// Another descriptor of the file, for whoever must see it on disk.
    ///
    /// # Errors
    /// What the system says, as text.
    pub fn handle(&self) -> Result<File, String> {
        let failed = |error| format!("cannot keep {} open: {error}", self.path.display());
        self.file.try_clone().map_err(failed)
    }

    /// Writes bytes at `position` and moves it behind.
    ///
    /// # Errors
    /// What the system says, as text.
    pub fn append(&mut self, bytes: &[u8], position: &mut u64) -> Result<(), String> {
        self.try_append(bytes, position).map_err(|refusal| refusal.message)
    }

    pub(crate) fn try_append(&mut self, bytes: &[u8], position: &mut u64) -> Result<(), Refusal> {
        let failed = |error: std::io::Error| {
            Refusal::new(format!("cannot write to {}: {error}", self.path.display()), &error)
        };
        if !self.is_regular {
            // What a pipe has taken of it cannot be taken back: no second try.
            let done = self.file.write_all(bytes);
            done.map_err(|error| Refusal { outage: None, ..failed(error) })?;
        } else {
            // Writing behind a file that was cut short would fill the gap with zeros.
            let found = self.file.metadata().map_err(failed)?.len();
            if found < *position {
                return Err(changed(&self.path, found, *position).into());
            }
            let done = refused(&self.path).and_then(|()| self.file.write_all_at(bytes, *position));
            if let Err(error) = done {
                // Readers are not to see half a step; what stays is cut off by the next try.
                let _ = self.file.set_len(*position);
                return Err(failed(error));
            }
        }
        *position += bytes.len() as u64;
        Ok(())
    }
}

pub(super) fn changed(path: &Path, found: u64, written: u64) -> String {
    format!(
        "output {} has {found} bytes where {written} were written: \
         it was changed from outside; run the job again",
        path.display()
    )
}
