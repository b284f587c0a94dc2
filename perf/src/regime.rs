//! The regime: how far apart the two cores are right now.
//!
//! Virtual cores move between one shared cache ("near", about 100 ns round trip) and two ("far",
//! about 450 ns), and every figure that involves two cores moves with them. So each line carries
//! the round trip before and after its run, and figures are compared only within a regime.
//!
//! Called by every bench.

use crate::clock::{Clock, ticks};
use hdrhistogram::Histogram;
use std::sync::Arc;
use testudo::config::usable_cores;
use testudo_shm::primitive::{AtomicU64, Ordering, spin_hint};

/// Round trips of one measurement.
const ROUNDS: u64 = 30_000;

/// Round trips below this are "near", nanoseconds.
pub const NEAR_NS: u64 = 250;

#[repr(align(128))]
struct Line(AtomicU64);

/// Which regime a run was in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Regime {
    /// One cache, before and after.
    Near,
    /// Two caches, before and after.
    Far,
    /// It changed in between.
    Mixed,
}

impl Regime {
    /// The regime of a pair of round trips.
    pub fn of([before, after]: [u64; 2]) -> Self {
        match (before < NEAR_NS, after < NEAR_NS) {
            (true, true) => Self::Near,
            (false, false) => Self::Far,
            _ => Self::Mixed,
        }
    }
}

impl std::fmt::Display for Regime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Near => "near",
            Self::Far => "far",
            Self::Mixed => "mixed",
        })
    }
}

/// The first two cores that this process may use.
pub fn two_cores() -> Option<(usize, usize)> {
    match usable_cores()[..] {
        [first, second, ..] => Some((first, second)),
        _ => None,
    }
}

/// Pins the calling thread.
pub fn pin(core: usize) {
    // SAFETY: an all-zero set is a valid value; the call only reads it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

/// A histogram of nanoseconds up to a minute, three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are in order")
}

/// The median round trip of a cache line between the two cores, nanoseconds; `None` with one core.
pub fn measure() -> Option<u64> {
    let (first, second) = two_cores()?;
    let lines = Arc::new((Line(AtomicU64::new(0)), Line(AtomicU64::new(0))));
    let there = Arc::clone(&lines);
    let echo = std::thread::spawn(move || {
        pin(second);
        for round in 1..=ROUNDS {
            wait_for(&there.0.0, round);
            there.1.0.store(round, Ordering::Release);
        }
    });
    let caller = std::thread::spawn(move || {
        pin(first);
        let clock = Clock::new();
        let mut times = histogram();
        let mut last = ticks();
        for round in 1..=ROUNDS {
            lines.0.0.store(round, Ordering::Release);
            wait_for(&lines.1.0, round);
            let now = ticks();
            times.saturating_record(clock.ns(last, now));
            last = now;
        }
        times.value_at_quantile(0.5)
    });
    echo.join().ok()?;
    caller.join().ok()
}

fn wait_for(word: &AtomicU64, value: u64) {
    while word.load(Ordering::Acquire) != value {
        spin_hint();
    }
}

/// Runs something between two measurements of the regime.
pub fn around<T>(run: impl FnOnce() -> T) -> (Option<[u64; 2]>, T) {
    let before = measure();
    let result = run();
    (before.zip(measure()).map(|(before, after)| [before, after]), result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_changed_regime_is_neither() {
        assert_eq!(Regime::of([100, 110]), Regime::Near);
        assert_eq!(Regime::of([450, 250]), Regime::Far);
        assert_eq!(Regime::of([100, 450]), Regime::Mixed);
        assert_eq!(Regime::of([450, 100]), Regime::Mixed);
    }
}
