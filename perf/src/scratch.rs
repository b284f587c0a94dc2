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

    /// Makes an empty folder on a disk: the temporary folder may be memory, the fallback is where
    /// this is run.
    ///
    /// # Errors
    /// When neither is a disk.
    pub fn on_disk(wanted: Option<&Path>) -> std::io::Result<Self> {
        let temporary = std::env::temp_dir();
        let here = std::env::current_dir()?;
        let places = wanted.map_or_else(|| vec![temporary, here], |wanted| vec![wanted.into()]);
        for place in &places {
            if !is_memory(place)? {
                let name =
                    format!("testudo-perf-{}-{}", std::process::id(), testudo::time::now_ns());
                let path = place.join(name);
                std::fs::create_dir(&path)?;
                return Ok(Self(path));
            }
        }
        Err(std::io::Error::other(format!("no disk: {places:?} are memory; give --folder")))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Whether a folder's files are only in memory.
fn is_memory(folder: &Path) -> std::io::Result<bool> {
    let path = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes())?;
    // SAFETY: all zeros are a valid value of the structure.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a NUL-terminated path and a valid place for the result.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut about) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(about.f_type == libc::TMPFS_MAGIC)
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to the system's cleaning of its temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
