//! What is counted and noted besides the records themselves: user counters, gaps between commits,
//! last words.
//!
//! User counters are added to in thread-local memory by the user's closures and written into cells
//! before each commit, so they count exactly what was committed.
//!
//! `figures` is all that a running job can tell in numbers, `text` its form for Prometheus, `serve`
//! the small server for that.
//!
//! Called by user code ([`Counter`]) and by the step loop.

pub mod figures;

pub(crate) mod text;

pub(crate) mod serve;

use crate::supervisor::recover::stop::UNSOUND;
use crate::worker::context::{CounterPlace, Cx};
use std::cell::RefCell;
use testudo_shm::header::WorkerHeader;
use testudo_shm::last_words::LastWords;
use testudo_shm::obituary::{Kind, Obituary};
use testudo_shm::primitive::Ordering;
use testudo_state::StateError;

thread_local! {
    static PENDING: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// A counter of the job's own, made by [`Flow::counter`](crate::flow::Flow::counter). Copy it into
/// closures.
#[derive(Debug, Clone, Copy)]
pub struct Counter {
    index: usize,
}

impl Counter {
    pub(crate) fn new(index: usize) -> Self {
        Self { index }
    }

    /// Adds to the counter; counted when the step commits.
    pub fn add(self, by: u64) {
        PENDING.with_borrow_mut(|pending| {
            if pending.len() <= self.index {
                pending.resize(self.index + 1, 0);
            }
            pending[self.index] += by;
        });
    }
}

/// Writes what was added in this step into the counters' cells.
#[inline]
pub(crate) fn save_user_counters(cx: &mut Cx, places: &[CounterPlace]) {
    if places.is_empty() {
        return;
    }
    PENDING.with_borrow_mut(|pending| {
        for (value, place) in pending.iter_mut().zip(places) {
            if *value > 0 {
                cx.count(*place, std::mem::take(value));
            }
        }
    });
}

/// Pauses between commits shorter than this are not noted, nanoseconds.
pub const GAP_NS: u64 = 100_000;

/// Notes the time since the last commit when it was long, in a ring of the latest ones.
#[inline]
pub(crate) fn note_gap(header: &WorkerHeader, now: u64) {
    let before = header.commit_ns.load(Ordering::Relaxed);
    if now.saturating_sub(before) > GAP_NS && before > 0 {
        let count = header.gap_count.load(Ordering::Relaxed);
        let gap = &header.gaps[count as usize % header.gaps.len()];
        gap.from_ns.store(before, Ordering::Relaxed);
        gap.to_ns.store(now, Ordering::Relaxed);
        header.gap_count.store(count + 1, Ordering::Release);
    }
}

/// Makes panics write their message, place and backtrace to the page before the process aborts.
pub(crate) fn set_panic_page(page: &'static LastWords, obituary: &'static Obituary) {
    std::panic::set_hook(Box::new(move |info| {
        obituary.say(Kind::Panic);
        let backtrace = std::backtrace::Backtrace::force_capture();
        let text = match info.payload().downcast_ref::<StateError>() {
            Some(found) => format!("{UNSOUND}{found}\n{backtrace}"),
            None => format!("{info}\n{backtrace}"),
        };
        page.write(&text);
        // A panic must not unwind through a half-done step, whatever the profile says (R11).
        std::process::abort();
    }));
}
