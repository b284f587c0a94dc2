//! Systems outside of the job, as a worker finds them: whether its files and disks work, since when
//! they do not, and when to try again.
//!
//! Invariants:
//! - a worker never waits inside a step: who finds a system out of order says when to try again,
//!   and ends its step;
//! - pauses between tries grow from [`PAUSE_NS`] to [`PAUSE_MAX_NS`], doubled each time, and begin
//!   anew with the first success;
//! - each state is in the worker's header, for the supervisor to show, and so is since when the
//!   worker waits: whoever watches for hung workers leaves it alone;
//! - an outage is told once on standard error, and its end, however often a system comes and goes.
//!
//! Called by sinks and sources of files; made by `attach`.

use crate::plan::Plan;
use crate::time::{now_ns, unix_ms};
use std::rc::Rc;
use testudo_shm::header::{OutsideState, OutsideWords};
use testudo_shm::primitive::{AtomicU64, Ordering};

/// First pause between two tries.
const PAUSE_NS: u64 = 5_000_000;

/// Longest pause.
pub(crate) const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// A system's next outage is told again after so long.
const TOLD_AGAIN_NS: u64 = 10_000_000_000;

/// Errors of the operating system that pass by themselves, or with somebody's help, while whoever
/// has them waits and tries again.
pub(crate) fn may_pass(errno: i32) -> bool {
    matches!(
        errno,
        libc::ENOSPC
            | libc::EDQUOT
            | libc::EIO
            | libc::EROFS
            | libc::ESTALE
            | libc::ETIMEDOUT
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::ENOMEM
            | libc::EMFILE
            | libc::ENFILE
    )
}

/// One system.
#[derive(Debug, Default)]
struct Place {
    operator: usize,
    /// Tries in a row that failed.
    in_a_row: u32,
    next_ns: u64,
    waits: bool,
    /// When its last outage was told, and whether its end is still to be.
    told_ns: Option<u64>,
    is_told: bool,
}

/// All systems of a worker, by the operator that uses them.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    words: Option<(&'static [OutsideWords], &'static AtomicU64)>,
    /// Has the systems' names.
    plan: Option<Rc<Plan>>,
    places: Vec<Place>,
}

impl Outside {
    /// In a worker: nothing is known yet, whatever its predecessor has found.
    pub(crate) fn new(
        words: &'static [OutsideWords],
        since: &'static AtomicU64,
        plan: &Rc<Plan>,
    ) -> Self {
        for slot in words {
            slot.state.store(OutsideState::Ok as u64, Ordering::Release);
        }
        since.store(0, Ordering::Release);
        Self { words: Some((words, since)), plan: Some(Rc::clone(plan)), places: Vec::new() }
    }

    /// Whether some system is waited for.
    pub(crate) fn is_waiting(&self) -> bool {
        self.places.iter().any(|place| place.waits)
    }

    /// Whether it is time for another try.
    pub(crate) fn is_due(&self, operator: usize, now_ns: u64) -> bool {
        let mut known = self.places.iter();
        known.find(|place| place.operator == operator).is_none_or(|place| place.next_ns <= now_ns)
    }

    /// When the next try is due.
    pub(crate) fn due_ns(&self, operator: usize) -> Option<u64> {
        let mut known = self.places.iter().filter(|place| place.in_a_row > 0);
        known.find(|place| place.operator == operator).map(|place| place.next_ns)
    }

    /// A try failed; `waits`: the worker takes nothing more of what goes there.
    #[cold]
    pub(crate) fn failed(&mut self, operator: usize, errno: i32, waits: bool) {
        let now = now_ns();
        let at = self.place(operator);
        let place = &mut self.places[at];
        let pause = (PAUSE_NS << place.in_a_row.min(16)).min(PAUSE_MAX_NS);
        place.in_a_row += 1;
        place.next_ns = now + pause;
        let is_news = place.in_a_row == 1;
        place.waits = waits;
        let state = if waits { OutsideState::Waiting } else { OutsideState::Failing };
        self.note(at, state, errno, is_news);
        self.note_waiting(now);
        if is_news {
            self.tell(at, errno, now);
        }
    }

    /// Says that a system fails.
    fn tell(&mut self, at: usize, errno: i32, now: u64) {
        let (Some(plan), place) = (&self.plan, &mut self.places[at]) else { return };
        if place.told_ns.is_some_and(|told| now < told + TOLD_AGAIN_NS) {
            return;
        }
        (place.told_ns, place.is_told) = (Some(now), true);
        let name = plan.outside_name(place.operator);
        let error = std::io::Error::from_raw_os_error(errno);
        let meanwhile = if place.waits { "the job waits for it" } else { "the job goes on" };
        crate::say!("testudo: {name}: {error}; {meanwhile} and tries again");
    }

    /// A try succeeded.
    #[cold]
    pub(crate) fn works(&mut self, operator: usize) {
        let at = self.place(operator);
        let place = &mut self.places[at];
        (place.in_a_row, place.next_ns, place.waits) = (0, 0, false);
        if std::mem::take(&mut place.is_told)
            && let Some(plan) = &self.plan
        {
            crate::say!("testudo: {}: works again", plan.outside_name(place.operator));
        }
        self.note(at, OutsideState::Ok, 0, true);
        self.note_waiting(now_ns());
    }

    fn place(&mut self, operator: usize) -> usize {
        let known = self.places.iter().position(|place| place.operator == operator);
        known.unwrap_or_else(|| {
            self.places.push(Place { operator, ..Place::default() });
            self.places.len() - 1
        })
    }

    fn note(&self, at: usize, state: OutsideState, errno: i32, is_news: bool) {
        let Some((words, _)) = self.words else { return };
        let slot = &words[at.min(words.len() - 1)];
        slot.operator.store(self.places[at].operator as u64 + 1, Ordering::Relaxed);
        if is_news {
            slot.since_ms.store(unix_ms().unsigned_abs(), Ordering::Relaxed);
        }
        if state != OutsideState::Ok {
            slot.errno.store(u64::from(errno.unsigned_abs()), Ordering::Relaxed);
            slot.retries.fetch_add(1, Ordering::Relaxed);
        }
        slot.state.store(state as u64, Ordering::Release);
    }

    fn note_waiting(&self, now: u64) {
        let Some((_, since)) = self.words else { return };
        let is_noted = since.load(Ordering::Relaxed) != 0;
        if self.is_waiting() != is_noted {
            since.store(if is_noted { 0 } else { now }, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_bound_and_begin_anew_after_a_success() {
        let mut outside = Outside::default();
        for n in 0..12 {
            let before = now_ns();
            outside.failed(3, libc::ENOSPC, true);
            let (due, after) = (outside.due_ns(3).expect("it failed"), now_ns());
            let pause = (PAUSE_NS << n).min(PAUSE_MAX_NS);
            assert!((before + pause..=after + pause).contains(&due), "{n}");
        }
        let due = outside.due_ns(3).expect("it failed");
        assert!(outside.is_waiting() && !outside.is_due(3, due - 1) && outside.is_due(4, 0));
        outside.works(3);
        assert!(!outside.is_waiting() && outside.is_due(3, 0) && outside.due_ns(3).is_none());
    }

    #[test]
    fn errors_of_a_full_disk_pass_and_those_of_a_wrong_program_do_not() {
        assert!([libc::ENOSPC, libc::EDQUOT, libc::EIO].into_iter().all(may_pass));
        assert!(![libc::EBADF, libc::EINVAL, libc::EPIPE, libc::EACCES].into_iter().any(may_pass));
    }
}
