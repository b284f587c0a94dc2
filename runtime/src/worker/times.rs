//! What a worker's time is spent on: working, waiting for input, waiting for room, waiting for a
//! system outside of the job.
//!
//! The step loop reads the clock once in each step. The time from there to the same place in the
//! next step counts as what the first of the two was: one subtraction, one addition and one store
//! a step, nothing a record.
//!
//! Invariant: the sums only grow, over all incarnations: a successor goes on from its
//! predecessor's.
//!
//! Called by the step loop; read by the supervisor (R23: words of their own, no two of which must
//! fit together).

use super::context::Cx;
use testudo_shm::header::TimeWords;
use testudo_shm::primitive::{AtomicU64, Ordering};

/// What a step was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Was {
    Busy,
    Idle,
    Pressed,
    Waiting,
}

/// The account of one incarnation.
#[derive(Debug)]
pub(crate) struct Times {
    words: &'static TimeWords,
    /// By [`Was`].
    sums: [u64; 4],
    was: Was,
    /// The clock in the last step; 0 before the first.
    last_ns: u64,
}

impl Times {
    pub(crate) fn new(words: &'static TimeWords) -> Self {
        let all = [&words.busy_ns, &words.idle_ns, &words.pressed_ns, &words.waiting_ns];
        let sums = all.map(|word| word.load(Ordering::Relaxed));
        Self { words, sums, was: Was::Idle, last_ns: 0 }
    }

    /// A step begins: the time since the last one began is that one's.
    #[inline]
    pub(crate) fn begin_step(&mut self, now_ns: u64) {
        let since = if self.last_ns == 0 { now_ns } else { self.last_ns };
        self.last_ns = now_ns;
        let sum = &mut self.sums[self.was as usize];
        *sum += now_ns.saturating_sub(since);
        let word: &AtomicU64 = match self.was {
            Was::Busy => &self.words.busy_ns,
            Was::Idle => &self.words.idle_ns,
            Was::Pressed => &self.words.pressed_ns,
            Was::Waiting => &self.words.waiting_ns,
        };
        word.store(*sum, Ordering::Relaxed);
    }

    /// The stages of a step have run.
    #[inline]
    pub(crate) fn end_step(&mut self, has_worked: bool, cx: &Cx) {
        self.was = if has_worked { Was::Busy } else { Self::look(cx) };
    }

    #[cold]
    fn look(cx: &Cx) -> Was {
        if cx.outside.is_waiting() {
            Was::Waiting
        } else if cx.is_pressed() {
            Was::Pressed
        } else {
            Was::Idle
        }
    }
}
