//! The hang watch: which worker has finished no turn of its loop for too long. Pure logic: time,
//! turns and what the worker is doing are told to it.
//!
//! Invariants: only time is counted in which the supervisor itself ran, a bounded share for each
//! look, so a pause of the machine or of all processes ends nobody; and in which every look found
//! the worker where it should get on, so one that had nothing to do is not hung when input comes;
//! one that could run must also have used a processor meanwhile, so a busy machine ends nobody.
//!
//! Called by `recover` at each look.

use std::time::Duration;

/// Time that one look accounts for at most: twice the longest sleep between two looks, and some.
const SHARE_MAX_NS: u64 = 250_000_000;

/// This part of the limit must have been spent on a processor by a worker that could run.
const RUN_SHARE: u64 = 8;

/// What the kernel says about a worker's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Doing {
    /// Time on processors.
    pub(crate) run_ns: u64,
    /// Whether it sleeps or is stopped: no processor would help it.
    pub(crate) is_asleep: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Watched {
    pid: i32,
    turns: u64,
    unmoved_ns: u64,
    /// Time on processors when it was first found unmoved.
    run_ns: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct HangWatch {
    /// `None`: nobody is watched.
    limit_ns: Option<u64>,
    looked_ns: u64,
    share_ns: u64,
    workers: Vec<Watched>,
}

impl HangWatch {
    /// Watches so many workers; a limit of zero turns it off.
    pub(crate) fn new(limit: Duration, workers: usize) -> Self {
        let limit_ns = (!limit.is_zero()).then_some(limit.as_nanos() as u64);
        Self { limit_ns, looked_ns: 0, share_ns: 0, workers: vec![Watched::default(); workers] }
    }

    /// Another look at all workers begins.
    pub(crate) fn begin(&mut self, now_ns: u64) {
        let elapsed = if self.looked_ns == 0 { 0 } else { now_ns.saturating_sub(self.looked_ns) };
        (self.share_ns, self.looked_ns) = (elapsed.min(SHARE_MAX_NS), now_ns);
    }

    /// A worker's process has finished so many turns. For how many seconds it has been hung, if it
    /// is: `is_suspect` says whether it should get on, `doing` is asked only of one that should.
    pub(crate) fn look(
        &mut self,
        worker: usize,
        pid: i32,
        turns: u64,
        is_suspect: impl FnOnce() -> bool,
        doing: impl FnOnce() -> Doing,
    ) -> Option<f64> {
        let limit = self.limit_ns?;
        let watched = &mut self.workers[worker];
        if (watched.pid, watched.turns) != (pid, turns) || !is_suspect() {
            *watched = Watched { pid, turns, ..Watched::default() };
            return None;
        }
        let Some(run_ns) = watched.run_ns else {
            watched.run_ns = Some(doing().run_ns);
            return None;
        };
        watched.unmoved_ns += self.share_ns;
        if watched.unmoved_ns < limit {
            return None;
        }
        let Doing { run_ns: now_ns, is_asleep } = doing();
        let is_hung = is_asleep || now_ns.saturating_sub(run_ns) >= limit / RUN_SHARE;
        is_hung.then_some(watched.unmoved_ns as f64 / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn asleep() -> Doing {
        Doing { run_ns: 0, is_asleep: true }
    }

    /// Looks every `every` milliseconds until the worker is hung; how long that took.
    fn until_hung(watch: &mut HangWatch, every: u64) -> Option<u64> {
        (0..10_000 / every).map(|look| 1 + look * every).find(|at| {
            watch.begin(at * MS);
            watch.look(0, 7, 3, || true, asleep).is_some()
        })
    }

    #[test]
    fn a_worker_that_does_not_move_is_hung() {
        let mut watch = HangWatch::new(Duration::from_secs(2), 1);
        assert_eq!(until_hung(&mut watch, 100), Some(2101));
        let mut off = HangWatch::new(Duration::ZERO, 1);
        assert_eq!(until_hung(&mut off, 100), None);
    }

    #[test]
    fn a_pause_of_the_whole_machine_is_no_hang() {
        let mut watch = HangWatch::new(Duration::from_secs(2), 1);
        for look in 0..7u64 {
            watch.begin((1 + look * 3_600_000) * MS);
            assert_eq!(watch.look(0, 7, 3, || true, asleep), None, "hour {look}");
        }
    }

    #[test]
    fn another_process_or_another_turn_begins_anew() {
        let mut watch = HangWatch::new(Duration::from_secs(1), 1);
        for look in 0..1000u64 {
            watch.begin((1 + look * 100) * MS);
            let (pid, turns) = (7 + look as i32 / 9, look / 5);
            assert_eq!(watch.look(0, pid, turns, || true, asleep), None);
        }
    }

    #[test]
    fn one_that_waits_is_not_hung_nor_when_it_has_just_got_input() {
        let mut watch = HangWatch::new(Duration::from_secs(1), 1);
        for look in 0..100u64 {
            watch.begin((1 + look * 100) * MS);
            assert_eq!(watch.look(0, 7, 3, || look % 10 == 9, asleep), None);
        }
    }

    #[test]
    fn one_that_gets_no_processor_is_not_hung_and_one_that_uses_it_is() {
        let mut watch = HangWatch::new(Duration::from_secs(1), 1);
        // It gets a hundredth of a processor, then all of one.
        let run_ns = |look: u64| look * MS + look.saturating_sub(60) * 100 * MS;
        let hung = (0..100u64).find(|look| {
            watch.begin((1 + look * 100) * MS);
            let doing = || Doing { run_ns: run_ns(*look), is_asleep: false };
            watch.look(0, 7, 3, || true, doing).is_some()
        });
        assert_eq!(hung, Some(61));
    }
}
