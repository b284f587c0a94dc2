//! The process behind tier 1: a standby that does not sleep but follows its worker, with state of
//! its own, and takes over from it like any standby (R1, R2).
//!
//! ```text
//! map as a standby does ── copy what there is ── wish to be let in
//!   the worker stands still: copy what there is now ── say so ── the worker goes on
//!   take step after step from the journal, compare (follow)
//!   a death word says died: take over (standby)
//! ```
//!
//! What a successor goes on with is the worker's own segment, rolled back: it outlives its process,
//! has every committed step in it, and was compared with the copy up to a step shortly before. So a
//! take-over is exact whatever the code does, and there is one way to recover. What the copy is
//! for: to find memory and code that cannot be trusted, while it can still be told from which step
//! on.
//!
//! Whatever ends the following (the worker was too fast, the state is too large to be copied in the
//! time that the worker gives, a difference), this process stands by as one of tier 2 does, for
//! [`REST`]; then it leaves, for another one to begin with a copy of its own.
//!
//! Called by `standby`.

use super::attach::{Attach, follow_words};
use super::copy::{Copy, Originals};
use super::follow::{Difference, Following};
use super::standby::Stand;
use crate::config::Idle;
use crate::error::Error;
use crate::flow::Flow;
use crate::supervisor::description::Description;
use crate::time::now_ns;
use std::time::Duration;
use testudo_shm::follow::{Follower, Journal, Parting};
use testudo_shm::primitive::{Ordering, spin_hint};
use testudo_shm::wait::{WaitWord, wait_any};

/// How long a replica that does not follow any more stands by before it leaves.
pub(super) const REST: Duration = Duration::from_secs(2);

/// The same after a difference: the next one would find another soon.
pub(super) const REST_AFTER_MISMATCH: Duration = Duration::from_secs(10);

/// Time after which a wish that was not granted is made again.
const AGAIN_NS: u64 = 500_000_000;

/// Looks without a step after which the processor is offered to others.
const SPINS: u32 = 1000;

/// Time without a step after which the replica sleeps between two looks.
const SLEEP_AFTER_NS: u64 = 2_000_000;

/// Such a sleep, which a death ends.
const NAP: Duration = Duration::from_micros(200);

/// Follows until the worker has died, or for as long as it can. Returns how long it stands by
/// without following; `None` when the worker died.
pub(super) fn follow(
    stand: &mut Stand<'_>,
    description: &Description,
    flow: &Flow,
    is_over: &dyn Fn() -> bool,
) -> Result<Option<Duration>, Error> {
    let Some((journal, follower)) = follow_words(stand.arena, stand.plan, stand.worker()) else {
        return Ok(Some(REST));
    };
    let this = Replica { stand: &*stand, journal, follower, is_over };
    let from = stand.originals();
    let mut copy = Copy::new(stand.plan, stand.worker(), &from)?;
    let outcome = this.copied(description, flow, &mut copy, &from);
    follower.header().follows.store(0, Ordering::Release);
    // The worker need not wait to find out.
    follower.header().copied.store(0, Ordering::Release);
    if stand.must_take() {
        stand.note_death();
        // Given back when the worker has settled in.
        stand.copy = Some(copy);
        return Ok(None);
    }
    let rest = match outcome {
        Ok(Some(rest)) => rest,
        Ok(None) => REST,
        Err(difference) => this.report(difference),
    };
    Ok(Some(rest))
}

struct Replica<'a> {
    stand: &'a Stand<'a>,
    journal: Journal,
    follower: Follower,
    is_over: &'a dyn Fn() -> bool,
}

impl Replica<'_> {
    /// Makes the copy and follows on it.
    fn copied(
        &self,
        description: &Description,
        flow: &Flow,
        copy: &mut Copy,
        from: &Originals<'_>,
    ) -> Result<Option<Duration>, Difference> {
        let failed = |error: Error| Difference::Failed(error.to_string());
        let plan = self.stand.plan;
        let header = self.follower.header();
        header.pid.store(u64::from(std::process::id()), Ordering::Relaxed);
        // The pages are made now, not while the worker waits for them.
        copy.fill(plan, from).map_err(failed)?;
        let Some(wish) = self.wish() else { return Ok(None) };
        let bytes = copy.fill(plan, from).map_err(failed)?;
        header.state_bytes.store(bytes, Ordering::Relaxed);
        let begin = self.journal.header().begin.load(Ordering::Acquire);
        for (ring, head) in copy.heads(plan).enumerate() {
            self.follower.head(ring).store(head, Ordering::Relaxed);
        }
        header.read.store(begin, Ordering::Relaxed);
        header.copied.store(wish, Ordering::Release);
        let is_let_in = || self.journal.header().granted.load(Ordering::Acquire) != wish;
        if !self.await_word(is_let_in) {
            return Ok(None);
        }
        if !self.journal.is_for(wish) {
            return Ok(self.was_left(bytes));
        }
        let worker = self.stand.worker();
        let (worker, stages) =
            Attach::replica(worker, description, flow, copy.arena).map_err(failed)?;
        let pair = (self.journal, self.follower);
        let mut following = Following::new(worker, stages, pair, wish, begin);
        header.follows.store(1, Ordering::Release);
        let done = self.run(&mut following);
        // What it points to is given back; its own memory is the process's to the end.
        std::mem::forget(following);
        match done {
            Ok(()) if self.stand.must_take() || (self.is_over)() => Ok(None),
            Ok(()) => Ok(self.was_left(bytes)),
            Err(difference) => Err(difference),
        }
    }

    /// Wishes to be let in until that is granted; `None` when the worker has died or all is over. A
    /// worker that begins does not know of wishes that were made before.
    fn wish(&self) -> Option<u64> {
        let header = self.follower.header();
        loop {
            let wish = header.wish.load(Ordering::Relaxed) + 1;
            header.wish.store(wish, Ordering::Release);
            let until_ns = now_ns() + AGAIN_NS;
            let is_granted = || self.journal.header().granted.load(Ordering::Acquire) == wish;
            if !self.await_word(|| is_granted() || now_ns() > until_ns) {
                return None;
            }
            if is_granted() {
                return Some(wish);
            }
        }
    }

    /// Waits until something holds; false when the worker has died or all is over.
    fn await_word(&self, holds: impl Fn() -> bool) -> bool {
        while !holds() {
            if self.stand.must_take() || (self.is_over)() {
                return false;
            }
            self.nap(Duration::from_micros(50));
        }
        true
    }

    /// Sleeps, unless the worker dies.
    fn nap(&self, patience: Duration) {
        let word = self.stand.death_word();
        let value = word.load(Ordering::Acquire);
        if !self.stand.must_take() {
            wait_any(&[WaitWord { word, value }], Some(patience));
        }
    }

    /// Takes steps until the worker has died, or goes on without this replica.
    fn run(&self, following: &mut Following) -> Result<(), Difference> {
        let (mut looks, mut since_ns) = (0u32, 0);
        loop {
            let is_new = following.step()?;
            if self.stand.must_take() || !following.is_led() {
                return Ok(());
            }
            looks = if is_new { 0 } else { looks + 1 };
            if looks < SPINS {
                spin_hint();
                since_ns = if is_new { 0 } else { since_ns };
                continue;
            }
            looks = 1;
            if (self.is_over)() {
                return Ok(());
            }
            since_ns = if since_ns == 0 { now_ns() } else { since_ns };
            if self.stand.idle == Idle::Adaptive && now_ns() - since_ns > SLEEP_AFTER_NS {
                self.nap(NAP);
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// The worker goes on alone.
    fn was_left(&self, bytes: u64) -> Option<Duration> {
        let worker = self.stand.worker();
        let header = self.journal.header();
        match Parting::of(header.parting.load(Ordering::Relaxed)) {
            Parting::None => {}
            Parting::Behind => crate::say!(
                "testudo: the replica of worker {worker} could not keep up and was left behind; \
                 it stands by, and another one begins in {REST:?}"
            ),
            Parting::Large => crate::say!(
                "testudo: the state of worker {worker} ({} MiB) takes too long to be copied for a \
                 replica; what there is stands by as in tier 2",
                bytes >> 20
            ),
            Parting::Apart => crate::say!(
                "testudo: worker {worker} goes on without its replica while it waits for an output \
                 or takes records one by one"
            ),
        }
        Some(REST)
    }

    /// Says what was found.
    fn report(&self, difference: Difference) -> Duration {
        let worker = self.stand.worker();
        match difference {
            Difference::Mismatch { step, at, what } => {
                let header = self.follower.header();
                header.mismatch_step.store(step, Ordering::Relaxed);
                header.mismatch_at.store(at, Ordering::Relaxed);
                header.mismatches.fetch_add(1, Ordering::Release);
                let place = self.place(at);
                crate::say!(
                    "testudo: worker {worker} and its replica differ after step {step}: {what}\
                     {place}; either code depends on more than its input and state (a clock, \
                     chance, a file), or memory was overwritten"
                );
                REST_AFTER_MISMATCH
            }
            Difference::Failed(what) => {
                crate::say!("testudo: the replica of worker {worker} cannot follow: {what}");
                REST_AFTER_MISMATCH
            }
        }
    }

    /// What lies at an arena offset.
    fn place(&self, at: u64) -> String {
        let plan = self.stand.plan;
        let found = plan.layout.groups.iter().find_map(|laid| {
            let stride = crate::plan::layout::stride(laid.bytes);
            let group = (at as usize).checked_sub(laid.at)? / stride;
            (group < laid.groups).then(|| (plan.operators[laid.operator].uid(), group))
        });
        found.map_or_else(String::new, |(uid, group)| format!(" (operator {uid}, group {group})"))
    }
}
