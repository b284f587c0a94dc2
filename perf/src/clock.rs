//! A clock for times of a few tens of nanoseconds: the processor's tick counter, where reading the
//! system's clock would take as long as what is measured.
//!
//! Called by `regime` and `ring`.

use testudo::time::now_ns;

/// The tick counter, calibrated.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    ns_per_tick: f64,
}

/// Time that a calibration takes, nanoseconds.
const CALIBRATION_NS: u64 = 20_000_000;

impl Clock {
    /// Compares the counter with the system's clock for a moment.
    pub fn new() -> Self {
        let (begun_ns, begun) = (now_ns(), ticks());
        while now_ns() - begun_ns < CALIBRATION_NS {
            std::hint::spin_loop();
        }
        let (ended_ns, ended) = (now_ns(), ticks());
        let passed = ended.wrapping_sub(begun).max(1);
        Self { ns_per_tick: (ended_ns - begun_ns) as f64 / passed as f64 }
    }

    /// Nanoseconds between two readings, at least 1.
    #[inline(always)]
    pub fn ns(self, from: u64, to: u64) -> u64 {
        ((to.wrapping_sub(from) as f64 * self.ns_per_tick) as u64).max(1)
    }
}

/// Reads the counter.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction; it only reads a counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Reads the counter: elsewhere, the system's clock.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn ticks() -> u64 {
    now_ns()
}
