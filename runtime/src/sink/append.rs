//! A file that grows exactly: everything up to a position is complete, everything beyond it is
//! taken back on opening.
//!
//! Invariants (R13): one writer for each file; bytes are written at the position before it moves; a
//! file shorter than its position is an error, not padding. A file without a size (a pipe,
//! /dev/null) is written as it is.
//!
//! Called by the file sinks.

use crate::worker::context::SharedFile;
use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// An exactly growing file with a buffer of one step.
#[derive(Debug)]
pub struct AppendFile {
    path: PathBuf,
    file: SharedFile,
    is_regular: bool,
    buffer: Vec<u8>,
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
        let file = Rc::new(RefCell::new(file));
        Ok(Self { path: path.into(), file, is_regular, buffer: Vec::new() })
    }

    /// The file, for whoever must see it on disk.
    pub fn file(&self) -> SharedFile {
        Rc::clone(&self.file)
    }

    /// The buffer of the open step.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Writes the buffer at `position` and moves it behind.
    ///
    /// # Errors
    /// What the system says, as text.
    pub fn flush(&mut self, position: &mut u64) -> Result<(), String> {
        let mut file = self.file.borrow_mut();
        let done = if self.is_regular {
            // Writing behind a file that was cut short would fill the gap with zeros.
            match file.metadata() {
                Ok(meta) if meta.len() < *position => {
                    return Err(changed(&self.path, meta.len(), *position));
                }
                Ok(_) => file.write_all_at(&self.buffer, *position),
                Err(error) => Err(error),
            }
        } else {
            file.write_all(&self.buffer)
        };
        done.map_err(|error| format!("cannot write to {}: {error}", self.path.display()))?;
        *position += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

fn changed(path: &Path, found: u64, written: u64) -> String {
    format!(
        "output {} has {found} bytes where {written} were written: \
         it was changed from outside; run the job again",
        path.display()
    )
}
