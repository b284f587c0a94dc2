//! A file that grows exactly: everything up to a position is complete, everything beyond it is
//! taken back on opening.
//!
//! Invariants (R13): one writer for each file; bytes are written at the position before it moves; a
//! file shorter than its position is an error, not padding. A file without a size (a pipe,
//! /dev/null) is written as it is.
//!
//! Called by the file sinks.

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

impl AppendFile {
    /// Opens or creates the file and cuts it at `position`.
    ///
    /// # Errors
    /// What is wrong with the file, as text.
    pub fn open(path: &Path, position: u64) -> Result<Self, String> {
        let failed = |what: &str, error: std::io::Error| {
            format!("cannot {what} {}: {error}", path.display())
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
                return Err(changed(path, meta.len(), position));
            }
            file.set_len(position).map_err(|error| failed("truncate output", error))?;
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
        let done = if self.is_regular {
            // Writing behind a file that was cut short would fill the gap with zeros.
            match self.file.metadata() {
                Ok(meta) if meta.len() < *position => {
                    return Err(changed(&self.path, meta.len(), *position));
                }
                Ok(_) => self.file.write_all_at(bytes, *position),
                Err(error) => Err(error),
            }
        } else {
            self.file.write_all(bytes)
        };
        done.map_err(|error| format!("cannot write to {}: {error}", self.path.display()))?;
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
