//! What replicas say: how far they follow, what they compared, what they found. Their processes are
//! standbys as any (`standby`).
//!
//! Invariants: words that a replica wrote are read one by one and taken for no more than numbers
//! (R23); a difference is told once, by whichever supervisor there is.
//!
//! Called by `recover`, `board` and `report`.

use super::annals::Annals;
use super::launch::Scene;
use crate::metrics::figures::ReplicaFigures;
use crate::plan::Plan;
use crate::worker::attach::follow_words;
use testudo_shm::follow::{Follower, Journal};
use testudo_shm::primitive::Ordering;

/// The words of one worker and its replica.
#[derive(Debug, Clone, Copy)]
struct Words {
    worker: usize,
    journal: Journal,
    follower: Follower,
}

/// All workers of tier 1 of a job.
#[derive(Debug)]
pub(crate) struct Replicas {
    all: Vec<Words>,
    /// Differences that were told.
    told: Vec<u64>,
}

impl Replicas {
    /// Those of a plan, as they are mapped by the supervisor.
    pub(crate) fn new(plan: &Plan, scene: &Scene) -> Self {
        let of = |worker| {
            let (journal, follower) = follow_words(scene.arena, plan, worker)?;
            Some(Words { worker, journal, follower })
        };
        let all: Vec<Words> = (0..plan.workers).filter_map(of).collect();
        let told = all.iter().map(Words::mismatches).collect();
        Self { all, told }
    }

    /// Tells of differences that were found since.
    pub(crate) fn look(&mut self, annals: &mut Annals) {
        for (words, told) in self.all.iter().zip(&mut self.told) {
            let now = words.mismatches();
            if now > *told {
                let step = words.follower.header().mismatch_step.load(Ordering::Relaxed);
                let cause = format!("the replica differs after step {step}");
                annals.note("mismatch", words.worker, cause);
                *told = now;
            }
        }
    }

    /// In numbers.
    pub(crate) fn figures(&self) -> Vec<ReplicaFigures> {
        self.all.iter().map(Words::figures).collect()
    }
}

impl Words {
    fn mismatches(&self) -> u64 {
        self.follower.header().mismatches.load(Ordering::Acquire)
    }

    fn figures(&self) -> ReplicaFigures {
        let (journal, follower) = (self.journal.header(), self.follower.header());
        let read = follower.read.load(Ordering::Relaxed);
        let is_led = journal.active.load(Ordering::Relaxed) != 0;
        let tail = journal.tail.load(Ordering::Relaxed);
        ReplicaFigures {
            worker: self.worker,
            follows: is_led && follower.follows.load(Ordering::Relaxed) != 0,
            steps: follower.steps.load(Ordering::Relaxed),
            checks: follower.checks.load(Ordering::Relaxed),
            mismatches: self.mismatches(),
            left_behind: journal.left_behind.load(Ordering::Relaxed),
            behind_bytes: if is_led { tail.saturating_sub(read) * 8 } else { 0 },
            state_bytes: follower.state_bytes.load(Ordering::Relaxed),
            stood_us: journal.stood_ns.load(Ordering::Relaxed) / 1000,
        }
    }
}
