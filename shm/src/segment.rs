//! A segment: one sealed, anonymous memfd. One process maps it writable, its peers map it
//! read-only.
//!
//! Invariants:
//! - sealed against shrinking, growing and further sealing, and not executable, before anyone else
//!   sees it; a receiver checks the seals and the size (`Segment::adopt`), so no peer can make it
//!   take SIGBUS by truncation;
//! - no name in the file system: nothing is left behind by any crash;
//! - `read_only()` gives a descriptor that cannot be mapped writable.
//!
//! Called by the supervisor (create), by every worker (adopt) and by `arena` (map).

use crate::fault::SetupError;
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
const MFD_NOEXEC_SEAL: libc::c_uint = 0x0008;

/// Bytes of a page; segments and everything mapped from them are multiples of it.
pub const PAGE: usize = 4096;

/// A sealed memfd of fixed size.
///
/// ```
/// let segment = testudo_shm::segment::Segment::create("demo", 8192)?;
/// assert_eq!(segment.len(), 8192);
/// # Ok::<(), testudo_shm::fault::SetupError>(())
/// ```
#[derive(Debug)]
pub struct Segment {
    fd: OwnedFd,
    len: usize,
}

impl Segment {
    /// Creates a sparse segment of `len` bytes (a multiple of [`PAGE`]). Untouched pages cost
    /// nothing.
    ///
    /// # Errors
    /// When the kernel refuses the memfd, its size or its seals.
    pub fn create(name: &str, len: usize) -> Result<Self, SetupError> {
        assert!(len > 0 && len.is_multiple_of(PAGE), "a segment's size is whole pages");
        let c_name = CString::new(name.replace('\0', "_")).unwrap_or_default();
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: c_name is a NUL-terminated string that outlives the call.
        let mut raw = unsafe { libc::memfd_create(c_name.as_ptr(), flags | MFD_NOEXEC_SEAL) };
        if raw < 0 {
            // Kernels before 6.3 do not know the flag.
            // SAFETY: as above.
            raw = unsafe { libc::memfd_create(c_name.as_ptr(), flags) };
        }
        if raw < 0 {
            return Err(SetupError::last(format!("cannot create segment {name} (memfd_create)")));
        }
        // SAFETY: raw was just returned by the kernel and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let size = libc::off_t::try_from(len).map_err(|_| {
            SetupError::other("segment too large", std::io::ErrorKind::InvalidInput)
        })?;
        // SAFETY: plain system call on our own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } != 0 {
            let error = SetupError::last(format!("cannot give segment {name} {len} bytes"));
            // The limit on the size of files is meant for files, but segments are some to it.
            let is_limit = error.source.raw_os_error() == Some(libc::EFBIG);
            let advice = if is_limit { "; raise the limit on file sizes (ulimit -f)" } else { "" };
            return Err(SetupError { what: error.what + advice, ..error });
        }
        // SAFETY: plain system call on our own descriptor.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } != 0 {
            return Err(SetupError::last(format!("cannot seal segment {name}")));
        }
        Ok(Self { fd, len })
    }

    /// Takes over an inherited descriptor after checking its seals and its size.
    ///
    /// # Errors
    /// When the descriptor is not a sealed memfd of at least `len` bytes.
    pub fn adopt(fd: OwnedFd, len: usize) -> Result<Self, SetupError> {
        let raw = fd.as_raw_fd();
        // SAFETY: plain system call on an owned descriptor.
        let seals = unsafe { libc::fcntl(raw, libc::F_GET_SEALS) };
        if seals < 0 || seals & SEALS != SEALS {
            let what = format!("descriptor {raw} is no sealed segment (seals {seals:#x})");
            return Err(SetupError::other(what, std::io::ErrorKind::InvalidData));
        }
        // SAFETY: an all-zero stat is a valid value to be overwritten by fstat.
        let mut st: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: st is a valid place for the result.
        if unsafe { libc::fstat(raw, &raw mut st) } != 0 {
            return Err(SetupError::last(format!("cannot stat descriptor {raw}")));
        }
        if usize::try_from(st.st_size).unwrap_or(0) < len {
            let what = format!("segment on descriptor {raw} has {} bytes, need {len}", st.st_size);
            return Err(SetupError::other(what, std::io::ErrorKind::InvalidData));
        }
        Ok(Self { fd, len })
    }

    /// A second descriptor of the same memory that cannot be mapped writable.
    ///
    /// # Errors
    /// When `/proc` is not mounted or the descriptor limit is reached.
    pub fn read_only(&self) -> Result<OwnedFd, SetupError> {
        let path =
            CString::new(format!("/proc/self/fd/{}", self.fd.as_raw_fd())).unwrap_or_default();
        // SAFETY: path is a NUL-terminated string that outlives the call.
        let raw = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if raw < 0 {
            return Err(SetupError::last("cannot reopen a segment read-only (is /proc mounted?)"));
        }
        // SAFETY: raw was just returned by the kernel and is owned by nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }

    /// Gives all pages back: from here on every mapping of it reads zeros, as when it was created.
    /// Nobody may use it at this moment.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn empty(&self) -> Result<(), SetupError> {
        let bytes = libc::off_t::try_from(self.len).unwrap_or(libc::off_t::MAX);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        loop {
            // SAFETY: plain system call on our own descriptor; the seals allow it.
            if unsafe { libc::fallocate(self.fd.as_raw_fd(), mode, 0, bytes) } == 0 {
                return Ok(());
            }
            let error = SetupError::last("cannot empty a segment (fallocate)");
            if error.source.kind() != std::io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a segment has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor's number, for inheritance by a worker.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The descriptor, borrowed.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// Gives the pages of `[from, from + len)` back to the kernel; they read as zeros afterwards.
    /// Only for memory that no committed state refers to (rule R12).
    pub fn punch(&self, from: usize, len: usize) {
        let (Ok(from), Ok(len)) = (libc::off_t::try_from(from), libc::off_t::try_from(len)) else {
            return;
        };
        // SAFETY: plain system call; a failure only means that the memory stays in use.
        unsafe {
            libc::fallocate(
                self.fd.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                from,
                len,
            );
        }
    }
}
