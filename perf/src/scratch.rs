//! A folder of a bench's own, for what its workers hand back; removed when the bench is over.
//!
//! Called by the benches whose results leave the job through files.

use std::path::{Path, PathBuf};

/// A folder that goes when this value does.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Makes an empty folder.
    ///
    /// # Errors
    /// When the temporary folder is not writable.
    pub fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!(
            "testudo-perf-{}-{}",
            std::process::id(),
            testudo::time::now_ns()
        ));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to the system's cleaning of its temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
