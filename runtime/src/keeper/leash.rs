//! The leash: what ends a worker when its keeper is gone.
//!
//! A worker's parent is a supervisor, whose death it is to survive, so a parent-death signal cannot
//! be used (R3). Instead it holds the reading end of a pipe whose only writing end is the keeper's,
//! and asks the kernel for SIGKILL when that closes (`O_ASYNC` with `F_SETSIG`). The signal needs
//! no thread of the worker to run: a worker that is stopped, or stuck in a system call or a loop,
//! ends as well.
//!
//! Invariants: each worker opens the pipe anew, since owner and signal belong to the open file,
//! which all that inherit it share; the pipe is read once after that, so that a keeper that was
//! gone before is noticed.
//!
//! Where the kernel refuses (a sandbox without /proc or F_SETSIG), a parent-death signal stands in:
//! workers then end with their supervisor and are replaced by the next one.
//!
//! Called by `entry` in a worker, by the keeper (which makes the pipe) and by the supervisor (which
//! passes it on).

#![expect(unsafe_code, reason = "opens a pipe anew, asks for a signal")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What ties a worker to its keeper, and to the supervisor that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tie {
    /// The reading end of the keeper's pipe.
    pub(crate) leash: i32,
    /// The keeper's process.
    pub(crate) keeper: u32,
    /// The supervisor that started this worker was the keeper's how manyth.
    pub(crate) reign: u32,
}

impl Tie {
    /// As one word of a role: `LEASH/KEEPER/REIGN`, or `-`.
    pub(crate) fn word(tie: Option<Self>) -> String {
        tie.map_or("-".into(), |tie| format!("{}/{}/{}", tie.leash, tie.keeper, tie.reign))
    }

    /// The tie in a word of a role.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        let mut parts = word.split('/');
        Some(Self {
            leash: parts.next()?.parse().ok()?,
            keeper: parts.next()?.parse().ok()?,
            reign: parts.next()?.parse().ok()?,
        })
    }
}

/// Makes the pipe: the end that is handed down, and the keeper's own, which is closed on exec.
pub(super) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: ends has room for the two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just returned by the kernel; the flag of the first is taken back so that
    // supervisors inherit it.
    unsafe {
        libc::fcntl(ends[0], libc::F_SETFD, 0);
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// In a worker: ties this process to the keeper. False when the keeper is gone already.
pub(crate) fn tie(tie: Tie) -> bool {
    // SAFETY: the supervisor left this descriptor open for us; nothing else in this process knows
    // it. It is closed here: only the one that is opened anew is of use.
    let inherited = unsafe { OwnedFd::from_raw_fd(tie.leash) };
    match own_leash(&inherited) {
        Ok(leash) => {
            let is_kept = is_held(&leash);
            // For the rest of this process.
            std::mem::forget(leash);
            is_kept
        }
        Err(_) => {
            // SAFETY: plain system calls.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // Whoever started us is gone already.
                libc::getppid() as u32 != tie.keeper
            }
        }
    }
}

/// Opens the pipe anew, with a signal to this process when its other end closes.
fn own_leash(inherited: &OwnedFd) -> io::Result<OwnedFd> {
    let check = |done: i32| if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) };
    let path = CString::new(format!("/proc/self/fd/{}", inherited.as_raw_fd()))?;
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: the path is a NUL-terminated string; the descriptor that is returned is ours.
    unsafe {
        let leash = OwnedFd::from_raw_fd(check(libc::open(path.as_ptr(), flags))?);
        let fd = leash.as_raw_fd();
        check(libc::fcntl(fd, F_SETSIG, libc::SIGKILL))?;
        check(libc::fcntl(fd, libc::F_SETOWN, libc::getpid()))?;
        check(libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK | libc::O_ASYNC))?;
        Ok(leash)
    }
}

/// `F_SETSIG` of the kernel's fcntl.h, which the libc crate has only for some targets.
const F_SETSIG: libc::c_int = 10;

/// Whether the writing end is open: an empty pipe without one reads as ended.
fn is_held(leash: &OwnedFd) -> bool {
    let mut byte = 0u8;
    // SAFETY: one writable byte. (Not asked with poll: a reader that came after the last writer
    // left sees no hang-up there.)
    unsafe { libc::read(leash.as_raw_fd(), (&raw mut byte).cast(), 1) != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_reads_as_it_was_written() {
        let tie = Tie { leash: 4, keeper: 99, reign: 2 };
        assert_eq!(Tie::parse(&Tie::word(Some(tie))), Some(tie));
        assert_eq!(Tie::parse(&Tie::word(None)), None);
    }

    #[test]
    fn r3_a_leash_is_held_until_its_keeper_lets_go() {
        let (inherited, keeper) = pipe().expect("room");
        // Without the signal, which would end this test.
        let path = format!("/proc/self/fd/{}", inherited.as_raw_fd());
        let open = || {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = std::fs::OpenOptions::new();
            options.read(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("our own").into()
        };
        assert!(is_held(&open()));
        drop(keeper);
        assert!(!is_held(&open()), "a reader that comes later sees it too");
    }
}
