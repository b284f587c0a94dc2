//! One job per checkpoint folder: a file in it that the kernel locks for as long as the process
//! lives.
//!
//! This keeps a second job out. It is no fence against a dead worker's late writes: the names of
//! region files are (rule R4).
//!
//! Called by `store`.

use super::store::StoreError;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// The lock's file.
pub(crate) const LOCK: &str = "lock";
/// The kernel may hold a lock for a moment longer than its process lives.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);

/// Held until it is dropped, or the process is gone.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the folder for this process, in the name of `job`.
    pub(crate) fn take(folder: &Path, job: u32) -> Result<Self, StoreError> {
        let path = folder.join(LOCK);
        let failed = |source| StoreError::Unusable { folder: folder.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&path).map_err(failed)?;
        for attempt in 1.. {
            match try_lock(&file) {
                Ok(()) => break,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(failed(e)),
                Err(_) if attempt < TRIES => sleep(PAUSE),
                Err(_) => {
                    let mut text = String::new();
                    let _ = (&file).take(20).read_to_string(&mut text);
                    let pid = text.trim().parse().ok();
                    return Err(StoreError::Locked { folder: folder.to_owned(), pid });
                }
            }
        }
        // For whoever is kept out.
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        file.write_all(job.to_string().as_bytes()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

fn try_lock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; flock touches no memory.
    let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if locked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
