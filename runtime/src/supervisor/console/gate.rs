//! The gate: three pipes between standard streams and rings, so that no byte is lost or doubled
//! when the supervisor dies between a stream and a ring.
//!
//! ```text
//! standard input  --splice-->  outer  --splice-->  inner  --tee, read-->  lines  -->  ring
//! ring  -->  lines  --write-->  out  --splice-->  standard output
//! ```
//!
//! A splice moves bytes from pipe to pipe within one call of the kernel: they are in the one or in
//! the other, never in the memory of a process alone. The pipes belong to the keeper as well, so
//! they outlive a supervisor. What crosses between a pipe and a ring is noted before and settled
//! after ([`Words`]): how much there was in the pipe, how much is taken, where the ring stands
//! then. A successor compares and does what is missing.
//!
//! Where the kernel cannot splice, bytes are read and written: those that are read in one such call
//! are lost if the supervisor dies before it has put them into a pipe (some terminals), those that
//! are written are doubled (files that are only appended to). The same holds for one line, or one
//! frame of output, that is larger than a pipe.
//!
//! Called by `console`.

#![expect(unsafe_code, reason = "pipe2, splice, tee, and what is in a pipe")]

use crate::error::Error;
use crate::keeper::{Line, place};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use testudo_shm::primitive::{AtomicU64, Ordering};

/// Bytes that a pipe is asked to hold; it may be fewer.
const WANTED: libc::c_int = 1 << 20;

/// Bytes that an output pipe takes in one go, whatever the kernel allows.
pub(super) const OUT_BYTES: usize = 32 << 10;

/// A pipe, both ends.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: File,
    write: File,
}

impl Pipe {
    pub(crate) fn new() -> Result<Self, Error> {
        let mut ends = [0; 2];
        // SAFETY: ends has room for the two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            let error = io::Error::last_os_error();
            return Err(Error::Machine(format!("a pipe for the console: {error}")));
        }
        // SAFETY: more room is a wish. Both ends were just returned by the kernel.
        unsafe {
            libc::fcntl(ends[1], libc::F_SETPIPE_SZ, WANTED);
            Ok(Self { read: File::from_raw_fd(ends[0]), write: File::from_raw_fd(ends[1]) })
        }
    }

    /// Bytes in it.
    pub(crate) fn filled(&self) -> usize {
        let mut bytes: libc::c_int = 0;
        // SAFETY: bytes is a valid place for the result.
        unsafe { libc::ioctl(self.read.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        usize::try_from(bytes).unwrap_or(0)
    }

    /// Bytes that it can hold.
    pub(super) fn capacity(&self) -> usize {
        // SAFETY: plain system call.
        let bytes = unsafe { libc::fcntl(self.read.as_raw_fd(), libc::F_GETPIPE_SZ) };
        usize::try_from(bytes).unwrap_or(0)
    }

    /// Takes bytes from its front and forgets them: in one call of the kernel, so that who dies
    /// meanwhile has taken all of them or none.
    pub(super) fn drop_front(&mut self, bytes: usize) -> io::Result<()> {
        self.read.read_exact(&mut vec![0; bytes])
    }

    /// Puts bytes in; there must be room.
    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write.write_all(bytes)
    }

    fn ends(&self) -> [RawFd; 2] {
        [self.read.as_raw_fd(), self.write.as_raw_fd()]
    }

    /// Moves both ends to descriptors that a keeper can hold as well.
    fn place(self, line: Option<&Line>) -> Result<Self, Error> {
        let read = place(OwnedFd::from(self.read), line)?.into();
        let write = place(OwnedFd::from(self.write), line)?.into();
        Ok(Self { read, write })
    }

    fn adopt(ends: &[RawFd]) -> Self {
        let end = |fd: RawFd| {
            crate::keeper::line::close_on_exec(fd);
            // SAFETY: the keeper left these descriptors open for us; nothing else in this process
            // knows them.
            unsafe { File::from_raw_fd(fd) }
        };
        Self { read: end(ends[0]), write: end(ends[1]) }
    }
}

/// Moves bytes from one descriptor to another, one of them a pipe; `None` where the kernel cannot
/// do that with these two. What would have to wait is 0 bytes to who does not want to, and an error
/// to who does: one of the two does not let anybody wait.
pub(super) fn splice(from: RawFd, to: RawFd, most: usize, wait: bool) -> io::Result<Option<usize>> {
    let flags = libc::SPLICE_F_MOVE | if wait { 0 } else { libc::SPLICE_F_NONBLOCK };
    let none = std::ptr::null_mut();
    loop {
        // SAFETY: plain system call without memory of ours.
        let moved = unsafe { libc::splice(from, none, to, none, most, flags) };
        if let Ok(moved) = usize::try_from(moved) {
            return Ok(Some(moved));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) if !wait => return Ok(Some(0)),
            Some(libc::EINVAL | libc::ENOSYS | libc::EPERM | libc::EBADF) => return Ok(None),
            _ => return Err(error),
        }
    }
}

/// Copies what is in one pipe to another, without taking it.
fn tee(from: &Pipe, to: &Pipe) -> usize {
    let (from, to) = (from.read.as_raw_fd(), to.write.as_raw_fd());
    // SAFETY: plain system call without memory of ours.
    let copied =
        unsafe { libc::tee(from, to, WANTED.cast_unsigned() as usize, libc::SPLICE_F_NONBLOCK) };
    usize::try_from(copied).unwrap_or(0)
}

/// The pipes of a job's console.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(super) outer: Pipe,
    pub(super) inner: Pipe,
    pub(crate) out: Pipe,
    /// What is in `inner`, to be looked at: this process's own.
    copy: Pipe,
}

/// The descriptors of a gate, as its keeper holds them.
pub(crate) type Ends = [RawFd; 6];

impl Gate {
    pub(crate) fn new(line: Option<&Line>) -> Result<Self, Error> {
        let (outer, inner) = (Pipe::new()?.place(line)?, Pipe::new()?.place(line)?);
        Ok(Self { outer, inner, out: Pipe::new()?.place(line)?, copy: Pipe::new()? })
    }

    pub(super) fn adopt(ends: &Ends) -> Result<Self, Error> {
        let (outer, inner) = (Pipe::adopt(&ends[0..2]), Pipe::adopt(&ends[2..4]));
        Ok(Self { outer, inner, out: Pipe::adopt(&ends[4..6]), copy: Pipe::new()? })
    }

    pub(super) fn ends(&self) -> Ends {
        let ([a, b], [c, d], [e, f]) = (self.outer.ends(), self.inner.ends(), self.out.ends());
        [a, b, c, d, e, f]
    }

    /// The end of the outer pipe that input is moved into, for the thread that does it.
    pub(super) fn entrance(&self) -> io::Result<File> {
        self.outer.write.try_clone()
    }

    /// Whether the inner pipe has no room for what is in the outer one. (What has room moves on.)
    pub(super) fn is_full(&mut self) -> io::Result<bool> {
        if self.outer.filled() == 0 {
            return Ok(false);
        }
        let (from, to) = (self.outer.read.as_raw_fd(), self.inner.write.as_raw_fd());
        Ok(splice(from, to, WANTED.cast_unsigned() as usize, false)? == Some(0))
    }

    /// Moves on what has come; then all that is in the inner pipe goes to `bytes`, if it is more
    /// than is there already.
    pub(super) fn look(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let (from, to) = (self.outer.read.as_raw_fd(), self.inner.write.as_raw_fd());
        if self.outer.filled() > 0 {
            splice(from, to, WANTED.cast_unsigned() as usize, false)?;
        }
        if self.inner.filled() > bytes.len() {
            let copied = tee(&self.inner, &self.copy);
            let mut all = vec![0; copied];
            self.copy.read.read_exact(&mut all)?;
            if all.len() > bytes.len() {
                *bytes = all;
            }
        }
        Ok(())
    }

    /// Moves bytes from the output's pipe to where it leads; how many.
    pub(crate) fn move_out(&mut self, to: &mut File) -> io::Result<usize> {
        let left = self.out.filled();
        if let Some(moved) = splice(self.out.read.as_raw_fd(), to.as_raw_fd(), left, true)? {
            return Ok(moved);
        }
        let written = to.write(&self.waiting()?)?;
        self.out.drop_front(written)?;
        Ok(written)
    }

    /// Takes what is in the output's pipe back out: nobody is there to read it.
    pub(crate) fn take_back(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while self.out.filled() > 0 {
            let bytes = self.waiting()?;
            self.out.drop_front(bytes.len())?;
            all.extend(bytes);
        }
        Ok(all)
    }

    /// What is in the output's pipe, or the first part of it.
    fn waiting(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; tee(&self.out, &self.copy)];
        self.copy.read.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Sleeps until standard input has something, where a read of it does not wait.
pub(super) fn wait_for_input() {
    let mut input = libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut input, 1, -1) };
    // It may have something, and the pipe that it goes to no room.
    std::thread::sleep(std::time::Duration::from_millis(1));
}

/// What is noted of bytes that cross between a pipe and a ring. All words but the first of each
/// group are stored before it, and hold while it is not zero.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Words {
    /// Bytes that are taken from the inner pipe; 0 when none are.
    pub(super) taken: AtomicU64,
    /// Bytes that were in it before.
    pub(super) filled: AtomicU64,
    /// Where the ring's tail stands once their lines are handed over.
    pub(super) tail: AtomicU64,
    /// Lines handed over by then.
    pub(super) lines_then: AtomicU64,
    /// Lines handed over.
    pub(super) lines: AtomicU64,
    /// 1 once standard input has ended, or was ended.
    pub(super) is_over: AtomicU64,
    /// Rings that were told so.
    pub(super) ended: AtomicU64,
    /// Where the next one's tail stands once it is told; 0 when it is not being told.
    pub(super) end_tail: AtomicU64,
    /// Bytes that are put into the output's pipe; 0 when none are.
    pub(super) put: AtomicU64,
    /// The ring that they come from, by its place among the outputs.
    pub(super) ring: AtomicU64,
    /// Where its head stands once they are in the pipe.
    pub(super) head: AtomicU64,
}

impl Words {
    /// Reads a word.
    pub(super) fn get(word: &AtomicU64) -> u64 {
        word.load(Ordering::Acquire)
    }

    /// Stores a word, after all that was stored before.
    pub(super) fn set(word: &AtomicU64, value: u64) {
        word.store(value, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_is_seen_before_it_is_taken() {
        let mut gate = Gate::new(None).expect("room");
        let mut bytes = Vec::new();
        gate.entrance().and_then(|mut entrance| entrance.write_all(b"one\ntw")).expect("room");
        gate.look(&mut bytes).expect("pipes of ours");
        assert_eq!(bytes, b"one\ntw");
        assert_eq!(gate.inner.filled(), 6, "it is still there");
        gate.inner.drop_front(4).expect("as much is there");
        bytes.drain(..4);
        gate.entrance().and_then(|mut entrance| entrance.write_all(b"o\n")).expect("room");
        gate.look(&mut bytes).expect("pipes of ours");
        assert_eq!(bytes, b"two\n");
    }

    #[test]
    fn a_descriptor_that_cannot_be_spliced_is_said_to_be_so() {
        let pipe = Pipe::new().expect("room");
        let file = tempfile::NamedTempFile::new().expect("room");
        let appended = std::fs::OpenOptions::new().append(true).open(file.path()).expect("ours");
        (&pipe.write).write_all(b"x").expect("room");
        let moved = splice(pipe.read.as_raw_fd(), appended.as_raw_fd(), 1, true);
        assert_eq!(moved.expect("no other error"), None);
        assert_eq!(pipe.filled(), 1, "nothing was taken");
    }

    #[test]
    fn what_goes_out_is_in_the_pipe_until_it_is_out() {
        let mut gate = Gate::new(None).expect("room");
        let file = tempfile::NamedTempFile::new().expect("room");
        let mut appended =
            std::fs::OpenOptions::new().append(true).open(file.path()).expect("ours");
        gate.out.put(b"one\n").expect("room");
        assert_eq!(gate.move_out(&mut appended).expect("copied"), 4);
        gate.out.put(b"two\n").expect("room");
        let mut written = std::fs::OpenOptions::new().write(true).open(file.path()).expect("ours");
        io::Seek::seek(&mut written, io::SeekFrom::End(0)).expect("ours");
        assert_eq!(gate.move_out(&mut written).expect("spliced"), 4);
        assert_eq!(std::fs::read(file.path()).expect("ours"), b"one\ntwo\n");
        gate.out.put(b"three\n").expect("room");
        let mut refusing = File::open(file.path()).expect("ours");
        gate.move_out(&mut refusing).expect_err("it was opened to be read");
        assert_eq!(gate.take_back().expect("ours"), b"three\n");
        assert_eq!(gate.out.filled(), 0);
    }

    #[test]
    fn a_descriptor_that_lets_nobody_wait_says_so() {
        let (from, to) = (Pipe::new().expect("room"), Pipe::new().expect("room"));
        // SAFETY: plain system call on a descriptor of ours.
        unsafe { libc::fcntl(from.read.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let ends = [from.read.as_raw_fd(), to.write.as_raw_fd()];
        assert_eq!(splice(ends[0], ends[1], 1, false).expect("nothing to move"), Some(0));
        let error = splice(ends[0], ends[1], 1, true).expect_err("no end of input");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
