//! Death is a word: robust futexes that the kernel marks when the data thread dies, within
//! microseconds and whatever the size of its memory; and the claim, by which exactly one successor
//! takes the segment over (R1, R2).
//!
//! Invariants:
//! - the list of robust words lies in private memory; only the words are shared, so no pointer is
//!   in a segment;
//! - the claim is robust from the moment of the compare-and-swap on (`list_op_pending` covers the
//!   gap);
//! - the kernel wakes one waiter for each word, so each waiter has a word of its own;
//! - `set_robust_list` replaces the C library's list for this thread: no robust pthread mutex is
//!   used on it.
//!
//! A worker that gives way to its successor in good order releases the claim instead of dying; the
//! successor, which waits for nothing else, then claims.
//!
//! Called by the worker while attaching and when it leaves, by the supervisor while watching, by
//! producers that ask whether a peer lives.

use crate::header::{DEATH_WORDS, LineWord, WorkerHeader};
use crate::primitive::{AtomicU32, Ordering};

const OWNER_DIED: u32 = 0x4000_0000;
const WAITERS: u32 = 0x8000_0000;
const TID_MASK: u32 = 0x3FFF_FFFF;
const WORDS: usize = DEATH_WORDS + 1;

/// The order in which the kernel marks the words of the dead. The claim comes first: whoever sees a
/// death word marked finds the claim free, however long the dying thread is kept from going on
/// between the two. Then the standby is woken, who takes over, and those who only hear of it.
const ORDER: [usize; WORDS] = {
    let mut order = [0; WORDS];
    (order[0], order[1]) = (DEATH_WORDS, STANDBY);
    let (mut at, mut word) = (2, 0);
    while word < DEATH_WORDS {
        if word != STANDBY {
            order[at] = word;
            at += 1;
        }
        word += 1;
    }
    order
};

/// Whether the process behind a death word has died.
#[must_use]
pub fn is_dead(word: &AtomicU32) -> bool {
    word.load(Ordering::Acquire) & OWNER_DIED != 0
}

/// The thread that a word belongs to; 0 when nobody's.
#[must_use]
pub fn owner(word: &AtomicU32) -> u32 {
    word.load(Ordering::Acquire) & TID_MASK
}

/// The place of the standby among the death words; the supervisor's is 0.
pub const STANDBY: usize = 1;

/// Says to the waiters on a worker's death words, but for the supervisor, who started it, that
/// there is a new process behind them.
pub fn tell(header: &WorkerHeader) {
    for word in &header.death[STANDBY..] {
        crate::wait::wake_all(&word.word);
    }
}

/// One node of the kernel's list, at the same stride as the shared words.
#[repr(C, align(64))]
struct Node {
    next: *mut Node,
}

#[repr(C)]
struct ListHead {
    next: *mut Node,
    futex_offset: libc::c_long,
    pending: *mut Node,
}

/// Why a segment could not be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimError {
    /// Another process owns it: its thread id. The loser exits (R2).
    Owned(u32),
    /// The kernel has no robust futexes for this thread.
    NotSupported,
}

impl std::fmt::Display for ClaimError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Owned(tid) => write!(f, "the segment is owned by live thread {tid}"),
            Self::NotSupported => write!(f, "the kernel refused set_robust_list"),
        }
    }
}

impl std::error::Error for ClaimError {}

/// Takes a worker's segment over: claims it, and from then on the calling thread's death marks all
/// its words. `between` is called right after the compare-and-swap (a test's kill point).
///
/// # Errors
/// When another process owns the segment or the kernel has no robust futexes.
pub fn claim(header: &'static WorkerHeader, between: impl FnOnce()) -> Result<(), ClaimError> {
    // SAFETY: gettid has no arguments and cannot fail.
    let tid = unsafe { libc::gettid() } as u32;
    // The list must outlive the thread's last instruction: it is leaked.
    let nodes: &'static mut [Node; WORDS] =
        Box::leak(Box::new(std::array::from_fn(|_| Node { next: std::ptr::null_mut() })));
    let first = nodes.as_mut_ptr();
    let first_word: *const LineWord = header.death.as_ptr();
    let head: &'static mut ListHead = Box::leak(Box::new(ListHead {
        next: std::ptr::null_mut(),
        futex_offset: first_word.addr().wrapping_sub(first.addr()) as libc::c_long,
        pending: first.wrapping_add(DEATH_WORDS),
    }));
    head.next = std::ptr::from_mut(head).cast();
    let at = std::ptr::from_mut(head);
    // SAFETY: the list is well formed (empty, pending the claim's node) and leaked.
    let done = unsafe { libc::syscall(libc::SYS_set_robust_list, at, size_of::<ListHead>()) };
    if done != 0 {
        return Err(ClaimError::NotSupported);
    }
    let claim = &header.claim.word;
    let now = claim.load(Ordering::Acquire);
    let free = now == 0 || now & OWNER_DIED != 0;
    let won = free
        && claim.compare_exchange(now, tid | WAITERS, Ordering::AcqRel, Ordering::Acquire).is_ok();
    if !won {
        // SAFETY: the kernel reads this field at thread exit only.
        unsafe { (&raw mut (*at).pending).write_volatile(std::ptr::null_mut()) };
        return Err(ClaimError::Owned(claim.load(Ordering::Acquire) & TID_MASK));
    }
    between();
    // Linked first: the kernel passes over words that do not name this thread, and no word that
    // does is ever unlinked.
    for (position, &index) in ORDER.iter().enumerate() {
        let next = ORDER.get(position + 1).map_or(at.cast(), |&next| first.wrapping_add(next));
        // SAFETY: index is inside the leaked array.
        unsafe { (&raw mut (*first.add(index)).next).write_volatile(next) };
    }
    // SAFETY: as above: volatile, since only the kernel reads them.
    unsafe {
        (&raw mut (*at).next).write_volatile(first.wrapping_add(ORDER[0]));
        (&raw mut (*at).pending).write_volatile(std::ptr::null_mut());
    }
    for word in &header.death {
        word.word.store(tid | WAITERS, Ordering::Release);
    }
    Ok(())
}

/// Gives the segment up in good order, so that a waiter does not take the thread's exit for a
/// death.
pub fn release(header: &WorkerHeader) {
    for word in &header.death {
        word.word.store(0, Ordering::Release);
    }
    header.claim.word.store(0, Ordering::Release);
}

/// As [`release`], for a successor that waits on the claim: wakes it. `between` is called when the
/// death words are cleared and the claim is not (a test's kill point).
pub fn give_way(header: &WorkerHeader, between: impl FnOnce()) {
    for word in &header.death {
        word.word.store(0, Ordering::Release);
    }
    between();
    header.claim.word.store(0, Ordering::Release);
    crate::wait::wake_all(&header.claim.word);
}

// The claim first, then who takes over, and each word once.
const _: () = {
    assert!(ORDER[0] == DEATH_WORDS && ORDER[1] == STANDBY);
    let (mut at, mut seen) = (0, 0);
    while at < WORDS {
        seen |= 1u32 << ORDER[at];
        at += 1;
    }
    assert!(seen == (1 << WORDS) - 1);
};

// Loom's atomics have other sizes; nothing is shared with another process there.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Node>() == size_of::<LineWord>());
#[cfg(not(loom))]
const _: () = assert!(
    std::mem::offset_of!(WorkerHeader, claim)
        == std::mem::offset_of!(WorkerHeader, death) + DEATH_WORDS * size_of::<LineWord>()
);
