//! What the tests of shared memory have in common: a ring between guard pages, random numbers, a
//! limit on time, and child processes.
//!
//! Invariant: nothing is mapped around a ring's data, so a read or write outside of it kills the
//! test instead of passing by luck.

#![allow(dead_code, reason = "each test takes what it needs")]

use std::fmt::Debug;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::consumer::Consumer;
use testudo_shm::header::WorkerHeader;
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::ring::{RingParts, WORD_STRIDE};
use testudo_shm::segment::{PAGE, Segment};

/// Pseudo-random numbers (splitmix64): the same for the same seed, on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Mostly small, sometimes anything up to `most`.
    pub fn size(&mut self, most: usize) -> usize {
        let limit = match self.below(16) {
            0 => most,
            1 | 2 => most.min(1024),
            _ => most.min(64),
        };
        1 + self.below(limit)
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_le_bytes()[..part.len()]);
        }
    }
}

/// Every value that a 64-bit word is known to be taken wrongly for, given what it should be.
pub fn hostile_words(old: u64, random: &mut Random) -> Vec<u64> {
    let mut words = vec![0, 1, 7, 8, 9, 4096, u64::MAX, u64::MAX - 7, i64::MAX as u64, 1 << 63];
    words.extend([u64::from(u32::MAX), 1 << 31, 1 << 32, 1 << 48]);
    words.extend([1, 4, 7, 8, 16, 64, 4096, 1 << 20].map(|off| old.wrapping_add(off)));
    words.extend([1, 4, 7, 8, 16, 64, 4096, 1 << 20].map(|off| old.wrapping_sub(off)));
    words.extend([!old, old.wrapping_neg(), old.swap_bytes(), old << 32, old >> 32]);
    words.extend((0..64).map(|bit| old ^ (1 << bit)));
    words.extend((0..16).map(|_| random.next()));
    words.extend((0..16).map(|_| random.next() & 0x0000_FFFF));
    words.retain(|word| *word != old);
    words
}

/// Ends the whole process when a test takes this long: what hangs has failed.
pub fn limit_seconds(seconds: u32) {
    #[cfg(not(miri))]
    // SAFETY: alarm has no memory arguments.
    unsafe {
        libc::alarm(seconds);
    }
    #[cfg(miri)]
    let _ = seconds;
}

const AT: usize = 16 * PAGE;

/// A segment mapped in an arena of its own, with unmapped pages around it.
#[cfg(not(miri))]
pub struct Memory {
    pub segment: Segment,
    arena: Arena,
}

#[cfg(not(miri))]
impl Memory {
    pub fn new(len: usize) -> Self {
        let segment = Segment::create("test", len).expect("memfd");
        let arena = Arena::reserve(AT + len + AT).expect("addresses");
        arena.map(segment.fd(), 0, len, AT, Access::Owner).expect("mapping");
        Self { segment, arena }
    }

    pub fn base(&self) -> *mut u8 {
        self.arena.at(AT)
    }

    fn len(&self) -> usize {
        self.segment.len()
    }
}

/// The same from the heap, since Miri maps no files.
#[cfg(miri)]
pub struct Memory {
    base: *mut u64,
    len: usize,
}

#[cfg(miri)]
impl Memory {
    pub fn new(len: usize) -> Self {
        let words = Box::leak(vec![0u64; len / 8].into_boxed_slice());
        Self { base: words.as_mut_ptr(), len }
    }

    pub fn base(&self) -> *mut u8 {
        self.base.cast()
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Memory {
    /// The memory as words. One process or thread at a time changes them.
    pub fn words(&mut self) -> &mut [u64] {
        // SAFETY: mapped for as long as self, 8-aligned, any bytes are words.
        unsafe { std::slice::from_raw_parts_mut(self.base().cast(), self.len() / 8) }
    }

    /// A shared word at a byte offset.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < self.len());
        // SAFETY: inside the mapping, aligned, and zeros are a valid atomic.
        unsafe { &*self.base().add(offset).cast::<AtomicU64>() }
    }

    /// The header of a worker at its start. The mapping is kept until the process ends.
    pub fn header(self) -> &'static WorkerHeader {
        let this = Box::leak(Box::new(self));
        // SAFETY: a page of zeros is a header; it is never unmapped.
        unsafe { testudo_shm::header::at::<WorkerHeader>(this.base()) }
    }
}

/// A ring: `[unmapped][words][unmapped][data][data again][unmapped]`.
pub struct TestRing {
    arena: Arena,
    /// One page of words, then the data.
    pub segment: Segment,
    pub capacity: usize,
}

const WORDS_AT: usize = AT;
const DATA_AT: usize = WORDS_AT + PAGE + AT;

impl TestRing {
    pub fn new(capacity: usize) -> Self {
        let segment = Segment::create("ring", PAGE + capacity).expect("memfd");
        let arena = Arena::reserve(DATA_AT + 2 * capacity + AT).expect("addresses");
        let fd = segment.fd();
        arena.map(fd, 0, PAGE, WORDS_AT, Access::Owner).expect("words");
        arena.map_mirrored(fd, PAGE, capacity, DATA_AT, Access::Owner).expect("data");
        Self { arena, segment, capacity }
    }

    pub fn parts(&self) -> RingParts {
        let (tail, head) = (WORDS_AT, WORDS_AT + WORD_STRIDE);
        // SAFETY: these are the mappings made above.
        unsafe { RingParts::at(self.arena.base(), DATA_AT, self.capacity, tail, head) }
    }

    /// A producing end. The ring outlives it in every test.
    pub fn producer(&self, position: u64) -> Producer {
        // SAFETY: mapped as long as self, and tests keep one live producer.
        unsafe { Producer::attach(self.parts(), position) }
    }

    /// A consuming end. The ring outlives it in every test.
    pub fn consumer(&self, position: u64) -> Consumer {
        // SAFETY: mapped as long as self, and tests keep one live consumer.
        unsafe { Consumer::attach(self.parts(), position) }
    }

    pub fn tail(&self) -> &AtomicU64 {
        // SAFETY: mapped as long as self.
        unsafe { &*self.arena.at(WORDS_AT).cast() }
    }

    pub fn head(&self) -> &AtomicU64 {
        // SAFETY: mapped as long as self.
        unsafe { &*self.arena.at(WORDS_AT + WORD_STRIDE).cast() }
    }

    /// The word of data at a position (a multiple of eight).
    pub fn data(&self, position: u64) -> &AtomicU64 {
        assert!(position.is_multiple_of(8));
        let at = DATA_AT + position as usize % self.capacity;
        // SAFETY: inside the first half of the data, aligned.
        unsafe { &*self.arena.at(at).cast() }
    }

    /// Offset of a payload from the first byte of data.
    pub fn offset(&self, bytes: &[u8]) -> usize {
        bytes.as_ptr().addr() - self.arena.at(DATA_AT).addr()
    }

    /// Fills the data with a pattern: what was never written must not look like zeros.
    pub fn scribble(&self, random: &mut Random) {
        for at in (0..self.capacity as u64).step_by(8) {
            self.data(at).store(random.next(), Ordering::Relaxed);
        }
    }
}

/// Runs `run` in a forked child. Only for tests whose process has one thread.
///
/// The child's exit status is 0 when `run` returns, 101 when it panics.
pub fn fork(run: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the process has one thread, so the child may do whatever the parent could.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid > 0 {
        return pid;
    }
    // A failed test leaves no process behind.
    // SAFETY: plain system call.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    // SAFETY: leaves without the parent's exit handlers.
    unsafe { libc::_exit(if done.is_ok() { 0 } else { 101 }) }
}

/// Waits for a child to end or stop; its status.
pub fn wait_pid(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: status is a valid place.
    let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(got, pid, "waitpid: {}", std::io::Error::last_os_error());
    status
}

/// SIGKILLs a process.
pub fn kill(pid: libc::pid_t) {
    // SAFETY: plain system call; the process is a child not yet waited for, or this one.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// SIGKILLs the calling process.
pub fn die() -> ! {
    // SAFETY: as above.
    kill(unsafe { libc::getpid() });
    unreachable!("SIGKILL cannot be survived")
}

/// Checks that a child ended by itself and without a panic.
pub fn assert_clean(status: i32) {
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "child status {status:#x}");
}

/// Checks that a child was SIGKILLed.
pub fn assert_killed(status: i32) {
    assert!(libc::WIFSIGNALED(status), "child status {status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGKILL);
}

/// Unwraps without a bound on the value's type.
pub fn must<T, E: Debug>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("{error:?}"))
}
