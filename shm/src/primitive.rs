//! The only door to atomics and fences: the standard library's, or loom's under `--cfg loom`.
//!
//! Everything lock-free in Testudo goes through these names (a test forbids the others), so that
//! the protocols of `ring` and `wait` can be run under a model checker unchanged.

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

pub use std::sync::atomic::{AtomicBool, AtomicUsize, compiler_fence};

/// A hint to the core that this thread is spinning.
#[inline(always)]
pub fn spin_hint() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    std::hint::spin_loop();
}

/// Asks for the cache line at `at` ahead of its use. Any address is allowed: a prefetch never
/// faults.
#[inline(always)]
pub fn prefetch(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch is a hint; it has no effect on memory whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch(at.cast::<i8>(), std::arch::x86_64::_MM_HINT_T0);
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}
