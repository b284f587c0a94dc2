//! The system calls that the standard library has no safe form for.
//!
//! Called by the other files of `control`, and by the server of metrics.

#![expect(unsafe_code, reason = "poll, flock, access, the user's id and the peer's")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The user that this process acts as.
pub(super) fn user() -> u32 {
    // SAFETY: a call without arguments that cannot fail.
    unsafe { libc::geteuid() }
}

/// The user at the other end, as the kernel noted it when the connection was made.
pub(super) fn peer_user(stream: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: peer and length are valid places, and length says how large peer is.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(peer.uid) } else { Err(io::Error::last_os_error()) }
}

/// True when files can be made in a folder.
pub(super) fn is_writable(folder: &Path) -> bool {
    let Ok(path) = CString::new(folder.as_os_str().as_bytes()) else { return false };
    // SAFETY: a NUL-terminated path.
    unsafe {
        libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK | libc::X_OK, libc::AT_EACCESS)
            == 0
    }
}

/// Waits for the lock on an open file; it goes with the descriptor.
pub(super) fn lock(file: &std::fs::File) -> io::Result<()> {
    loop {
        // SAFETY: an open descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What to wait for on a descriptor, and what has come.
pub(crate) type Polled = libc::pollfd;

/// A descriptor to wait for.
pub(crate) fn polled(fd: RawFd, reads: bool, writes: bool) -> Polled {
    let wanted = |is: bool, event: i16| if is { event } else { 0 };
    let events = wanted(reads, libc::POLLIN) | wanted(writes, libc::POLLOUT);
    Polled { fd, events, revents: 0 }
}

/// Waits until something comes on a descriptor, at most so long.
pub(crate) fn poll(all: &mut [Polled], timeout: Duration) {
    // Up to the next millisecond: a wait that ends too early only makes another one.
    let ms = i32::try_from(timeout.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
    // SAFETY: the slice is valid for as many entries as it has.
    let count = unsafe { libc::poll(all.as_mut_ptr(), all.len() as libc::nfds_t, ms) };
    if count < 0 {
        // A signal; nothing has come.
        all.iter_mut().for_each(|polled| polled.revents = 0);
    }
}

/// Takes an event descriptor's count, so that it can be waited for again.
pub(super) fn take_event(fd: RawFd) {
    let mut count = 0u64;
    // SAFETY: count has the eight bytes that an event descriptor gives. Nothing to take is fine.
    unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
}

/// The end of a connection is gone, whatever else.
pub(super) fn has_hung_up(polled: &Polled) -> bool {
    polled.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
}
