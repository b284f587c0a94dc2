//! Latency: keeps the time that a batch waits between two workers below the job's `max_latency`,
//! and counts the batches that waited longer.
//!
//! A batch waits twice: for the step that makes it to commit, and in the ring until its consumer
//! has taken it. Steps are kept short by halving how much one input may give; rings by letting no
//! more wait than the consumer takes in a part of the limit. Both are measured: a step by the
//! clock, a ring by how long a position that was published took to be released.
//!
//! Called by the step loop, where the job has a limit; without one, nothing of this runs.

use super::context::{CounterPlace, Cx, OutRing, TURN};
use crate::time::now_ns;
use std::time::Duration;

/// The part of the limit that a step may take.
pub(crate) const STEP_SHARE: u32 = 4;

/// The part of the limit that what waits in a ring may take.
pub(crate) const RING_SHARE: u32 = 2;

/// Bytes that a ring may always hold: below that, little batches would cost more than they save.
const LEAST: u64 = 4096;

/// Bytes that it may hold at first.
const START: u64 = 4 * LEAST;

/// A batch on its way.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    /// The position behind it; 0 when none is watched.
    position: u64,
    published_ns: u64,
    /// It was counted as late already.
    is_late: bool,
}

/// What is measured and what follows from it.
#[derive(Debug)]
pub(crate) struct Latency {
    max_ns: u64,
    samples: Vec<Sample>,
    waited: CounterPlace,
    /// Batches that were found late and are not counted yet.
    late: u64,
}

impl Latency {
    /// Begins with rings that hold little: they are given more as soon as that is taken in time.
    pub(crate) fn new(max: Duration, rings: &mut [OutRing], waited: CounterPlace) -> Self {
        for out in &mut *rings {
            out.limit = START;
        }
        let max_ns = (max.as_nanos() as u64).max(1);
        Self { max_ns, samples: vec![Sample::default(); rings.len()], waited, late: 0 }
    }

    /// Before the commit: counts what was found.
    pub(crate) fn save(&mut self, cx: &mut Cx) {
        if self.late > 0 {
            cx.count(self.waited, std::mem::take(&mut self.late));
        }
    }

    /// After a step: how much one input may give in the next one, and how much may wait in rings.
    pub(crate) fn after_step(&mut self, cx: &mut Cx) {
        let now = now_ns();
        let took = now.saturating_sub(cx.now_ns);
        cx.turn = if took > self.max_ns / u64::from(STEP_SHARE) {
            (cx.turn / 2).max(1)
        } else {
            (cx.turn * 2).min(TURN)
        };
        if took > self.max_ns {
            self.late += 1;
        }
        for (sample, out) in self.samples.iter_mut().zip(&mut cx.out_rings) {
            let position = out.committed;
            if sample.position == 0 {
                if out.ring.backlog() > 0 {
                    *sample = Sample { position, published_ns: now, is_late: false };
                }
                continue;
            }
            out.ring.refresh();
            let waited = now.saturating_sub(sample.published_ns);
            let is_taken = position - out.ring.backlog().min(position) >= sample.position;
            if waited > self.max_ns && !sample.is_late {
                (sample.is_late, self.late) = (true, self.late + 1);
            }
            if is_taken {
                out.limit = limit(out.limit, out.ring.capacity(), waited, self.max_ns);
                *sample = Sample::default();
            } else if sample.is_late {
                out.limit = LEAST;
            }
        }
    }
}

/// How many bytes may wait in a ring, after some that were taken so long after they were published.
fn limit(before: u64, capacity: u64, waited_ns: u64, max_ns: u64) -> u64 {
    let aim = (max_ns / u64::from(RING_SHARE)).max(1);
    let before = before.min(capacity);
    // Twice as much at most, half as much at least: one measurement may be odd.
    let fitting = u128::from(before) * u128::from(aim) / u128::from(waited_ns.max(1));
    let fitting = u64::try_from(fitting).unwrap_or(u64::MAX);
    fitting.clamp(before / 2, before * 2).clamp(LEAST.min(capacity), capacity)
}

#[cfg(test)]
mod tests {
    use super::{LEAST, limit};

    #[test]
    fn a_ring_whose_batches_wait_too_long_holds_less_and_then_more_again() {
        let capacity = 4 << 20;
        let mut now = u64::MAX;
        for _ in 0..20 {
            now = limit(now, capacity, 100_000_000, 10_000_000);
        }
        assert_eq!(now, LEAST);
        for _ in 0..20 {
            now = limit(now, capacity, 1000, 10_000_000);
        }
        assert_eq!(now, capacity);
    }

    #[test]
    fn what_waits_as_long_as_it_should_stays() {
        assert_eq!(limit(65536, 4 << 20, 5_000_000, 10_000_000), 65536);
    }
}
