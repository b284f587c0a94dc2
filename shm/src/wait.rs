//! Sleeping and waking: bells that are bumped by whoever publishes, and waited on by whoever has
//! nothing to do (R8).
//!
//! ```text
//!   sleeper                                  waker
//!   note the bells of all peers              write, publish
//!   sleeping = 1                             fence (SeqCst)
//!   fence (SeqCst)                           read the peer's sleeping flag
//!   look again; nothing?                     set? bump own bell, wake everyone on it
//!   futex_waitv(bells, as noted)
//!   sleeping = 0
//! ```
//!
//! Either the waker's fence comes first and the sleeper's second look sees what was published, or
//! the sleeper's comes first and the waker sees its flag; the bell's value closes the gap before
//! the system call. Each bell lies in the waker's own segment: peers wait on it through a read-only
//! mapping.
//!
//! Where the kernel has no futex_waitv, or there are more than [`FUTEX_WAITV_MAX`] words, an
//! eventfd for each sleeper does the same (`Sleeper::Event`).
//!
//! Called by the worker's loop and the supervisor's ring thread.

use crate::primitive::{AtomicU32, Ordering, fence};
use std::os::fd::RawFd;
use std::time::Duration;

/// Words that one futex_waitv call can wait on.
pub const FUTEX_WAITV_MAX: usize = 128;

const FUTEX2_SIZE_U32: u32 = 2;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct WaitV {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

/// A word to sleep on and the value at which sleeping is right.
#[derive(Debug, Clone, Copy)]
pub struct WaitWord<'a> {
    /// The word.
    pub word: &'a AtomicU32,
    /// Sleep only while it has this value.
    pub value: u32,
}

/// Sleeps until one of the words differs from its value, is woken, or `timeout` passes. May wake
/// early. Where futex_waitv cannot be called, only the first word is waited on.
pub fn wait_any(words: &[WaitWord<'_>], timeout: Option<Duration>) {
    let mut list = [WaitV { value: 0, address: 0, flags: 0, reserved: 0 }; FUTEX_WAITV_MAX];
    let count = words.len().min(FUTEX_WAITV_MAX);
    for (slot, word) in list.iter_mut().zip(words) {
        slot.value = u64::from(word.value);
        slot.address = std::ptr::from_ref(word.word).addr() as u64;
        slot.flags = FUTEX2_SIZE_U32;
    }
    let deadline = timeout.map(|timeout| {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: now is a valid place for the result.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        let nanos = now.tv_nsec + libc::c_long::from(timeout.subsec_nanos() as i32);
        now.tv_sec += timeout.as_secs() as libc::time_t + nanos / 1_000_000_000;
        now.tv_nsec = nanos % 1_000_000_000;
        now
    });
    let limit = deadline.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the list and the deadline live through the call; the words are borrowed, so they stay
    // mapped.
    let done = unsafe {
        libc::syscall(libc::SYS_futex_waitv, list.as_ptr(), count, 0, limit, libc::CLOCK_MONOTONIC)
    };
    // The usual ends of a sleep; anything else is a refusal, which must not become a busy loop.
    let ends = [libc::EAGAIN, libc::ETIMEDOUT, libc::EINTR];
    let error = std::io::Error::last_os_error().raw_os_error();
    if done < 0
        && error.is_some_and(|error| !ends.contains(&error))
        && let Some(first) = words.first()
    {
        wait_one(*first, timeout);
    }
}

/// Sleeps until the word differs from its value, is woken, or `timeout` passes.
#[cold]
fn wait_one(word: WaitWord<'_>, timeout: Option<Duration>) {
    let span = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
    });
    let limit = span.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let address = std::ptr::from_ref(word.word);
    // SAFETY: the word and the timeout live through the call.
    unsafe { libc::syscall(libc::SYS_futex, address, libc::FUTEX_WAIT, word.value, limit) };
}

/// Whether futex_waitv can be called here (Linux 5.16, and no sandbox that refuses it).
#[must_use]
pub fn has_wait_any() -> bool {
    // SAFETY: with a count of zero the call only says whether it exists (EINVAL) or not (ENOSYS).
    let done = unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            std::ptr::null::<WaitV>(),
            0,
            0,
            std::ptr::null::<u8>(),
            0,
        )
    };
    // Sandboxes answer unknown calls with other errors than the kernel does.
    done >= 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// Wakes everyone who sleeps on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE reads nothing but the address.
    unsafe {
        libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// The sleeper's half: announces the sleep. The caller looks again afterwards, and sleeps only if
/// there is nothing.
#[inline]
pub fn announce(sleeping: &AtomicU32) {
    sleeping.store(1, Ordering::Relaxed);
    // SYNC sleep: pairs with the fence in `must_wake`.
    fence(Ordering::SeqCst);
}

/// Takes the announcement back.
#[inline]
pub fn awake(sleeping: &AtomicU32) {
    sleeping.store(0, Ordering::Release);
}

/// The waker's fence, once per step after publishing; then [`must_wake`] for each peer that was
/// published to.
#[inline(always)]
pub fn publish_fence() {
    // SYNC sleep: pairs with the fence in `announce`.
    fence(Ordering::SeqCst);
}

/// Whether a peer has announced that it sleeps. After [`publish_fence`].
#[inline(always)]
#[must_use]
pub fn must_wake(sleeping: &AtomicU32) -> bool {
    sleeping.load(Ordering::Relaxed) != 0
}

/// Bumps one's own bell and wakes everyone on it.
pub fn ring_bell(bell: &AtomicU32) {
    bell.fetch_add(1, Ordering::Release);
    wake_all(bell);
}

/// Sleeps on an eventfd (the fallback): until a peer writes to it or `timeout` passes; then empties
/// it.
pub fn wait_event(event: RawFd, timeout: Option<Duration>) {
    let mut poll = libc::pollfd { fd: event, events: libc::POLLIN, revents: 0 };
    let millis =
        timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
    let mut count = 0u64;
    // SAFETY: poll and count are valid places; the descriptor is ours, non-blocking.
    unsafe {
        libc::poll(&raw mut poll, 1, millis);
        libc::read(event, (&raw mut count).cast(), 8);
    }
}

/// Wakes a sleeper through its eventfd (the fallback).
pub fn wake_event(event: RawFd) {
    let one = 1u64;
    // SAFETY: eight readable bytes; a full counter (EAGAIN) means that it is awake already.
    unsafe { libc::write(event, (&raw const one).cast(), 8) };
}
