//! Following: takes the steps that a worker has committed, one after the other, on a copy of its
//! state, and compares (R21).
//!
//! What a step depends on besides the state is in the journal: what had arrived, what consumers had
//! taken, the clocks, what sources gave. The code that runs is the worker's own, from the inlet to
//! the outlet; its output goes to rings that nobody reads, and its sinks write nothing.
//!
//! Compared are, after each step, where all rings stand and the newest changes to state, and now
//! and then a piece of the state, all of it in turn. A difference means that code depends on
//! something else than its input and its state, or that memory of one of the two was written by
//! somebody who must not.
//!
//! Invariant: before anything is concluded from what was read, the journal is asked whether it was
//! still written for this replica: a worker that has left it may have given the bytes back.
//!
//! Called by `replica`.

use super::StageRef;
use super::attach::Worker;
use super::context::InRing;
use super::journal::{CHANGES, bits, inputs};
use crate::metrics;
use crate::time::step as clock;
use testudo_shm::follow::{Follower, Journal};
use testudo_shm::primitive::Ordering;

/// What a replica found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// State, positions or output differ after this step; where, as an arena offset, or 0.
    Mismatch { step: u64, at: u64, what: String },
    /// The step cannot be taken here at all.
    Failed(String),
}

/// See the module.
pub(super) struct Following {
    worker: Worker,
    stages: Vec<StageRef>,
    journal: Journal,
    follower: Follower,
    wish: u64,
    /// Words that were read.
    read: u64,
    touched: Vec<u64>,
}

/// Words of an entry, one after the other.
struct Words {
    journal: Journal,
    at: u64,
    end: u64,
}

impl Words {
    /// The next word; 0 behind the entry's end.
    fn next(&mut self) -> u64 {
        let word = if self.at < self.end { self.journal.get(self.at) } else { 0 };
        self.at += 1;
        word
    }

    fn take(&mut self, count: u64) -> Vec<u64> {
        let count = count.min(self.end.saturating_sub(self.at));
        (0..count).map(|_| self.next()).collect()
    }
}

impl Following {
    /// The copy is made, and the worker writes its journal for `wish`.
    pub(super) fn new(
        worker: Worker,
        stages: Vec<StageRef>,
        (journal, follower): (Journal, Follower),
        wish: u64,
        read: u64,
    ) -> Self {
        Self { worker, stages, journal, follower, wish, read, touched: Vec::new() }
    }

    /// Whether the worker still writes for this replica.
    pub(super) fn is_led(&self) -> bool {
        self.journal.is_for(self.wish)
    }

    /// Says how far each input ring was read.
    fn say_heads(&self) {
        for (ring, input) in inputs(&self.worker.cx).enumerate() {
            // SYNC ring-head: what was read before may be written over when the worker says so.
            self.follower.head(ring).store(input.position()[0], Ordering::Release);
        }
    }

    /// Takes the next step, if there is one.
    pub(super) fn step(&mut self) -> Result<bool, Difference> {
        if self.journal.tail() == self.read {
            return Ok(false);
        }
        let taken = self.take();
        if taken.is_err() && !self.is_led() {
            // The worker has gone on without us: what was read may have been anything.
            return Ok(false);
        }
        let (words, checks) = taken?;
        self.read += words;
        let header = self.follower.header();
        self.say_heads();
        header.read.store(self.read, Ordering::Release);
        header.steps.fetch_add(1, Ordering::Relaxed);
        header.checks.fetch_add(checks, Ordering::Relaxed);
        Ok(true)
    }

    /// Takes the entry at `read`: how many words it has, and comparisons it led to.
    fn take(&mut self) -> Result<(u64, u64), Difference> {
        let count = self.journal.get(self.read);
        let mut words =
            Words { journal: self.journal, at: self.read + 1, end: self.read.wrapping_add(count) };
        let step = words.next();
        self.begin(&mut words);
        let Worker { cx, .. } = &mut self.worker;
        // Readings stand at the end of the entry, and are needed first.
        let results = words.at;
        skip_results(&mut words, inputs(cx).count(), cx.out_rings.len());
        let [digest, at, bytes, piece, tape] = [(); 5].map(|()| words.next());
        cx.tape.clear();
        cx.tape.words = words.take(tape);
        clock::tell(words.take(u64::MAX));
        tell_heads(&mut Words { at: results, ..words }, cx, &self.touched);
        self.run(step, digest)?;
        self.compare(&mut Words { journal: self.journal, at: results, end: words.end }, step)?;
        let cx = &self.worker.cx;
        if bytes > 0 && cx.txn.checksum(at, bytes) != piece {
            let what = format!("{bytes} bytes of state differ at {at:#x}");
            return Err(Difference::Mismatch { step, at, what });
        }
        Ok((count, 1 + u64::from(bytes > 0)))
    }

    /// What the step saw when it began.
    fn begin(&mut self, words: &mut Words) {
        let Worker { cx, groups, .. } = &mut self.worker;
        let [now_ns, bits, rotation] = [(); 3].map(|()| words.next());
        for groups in &*groups {
            groups.begin_step(&cx.txn);
            if bits & bits::GAVE_BACK != 0 {
                groups.give_back(&cx.txn);
            }
        }
        cx.now_ns = now_ns;
        cx.draining = bits & bits::DRAINING != 0;
        cx.pausing = bits & bits::PAUSING != 0;
        cx.turn = (bits >> bits::TURN_SHIFT) as usize;
        cx.rotation = rotation as usize;
        cx.is_pressed = false;
        for input in cx.in_rings.iter_mut().filter(|input| input.rest.is_none()) {
            let tail = words.next();
            if let Some(ring) = &mut input.ring {
                ring.look_to(tail);
            }
        }
        self.touched.clear();
        for out in &mut cx.out_rings {
            self.touched.push(words.next());
            out.limit = words.next();
        }
    }

    /// The step itself, as in `step`, without anything that others see.
    fn run(&mut self, step: u64, digest: u64) -> Result<(), Difference> {
        let Worker { cx, user_counters, header, .. } = &mut self.worker;
        cx.txn.begin_stages();
        for stage in &self.stages {
            stage.borrow_mut().run(cx);
        }
        let (found, newest) = (cx.txn.digest(CHANGES), cx.txn.newest());
        for stage in &self.stages {
            stage.borrow_mut().save(cx);
        }
        if let Some(error) = cx.failure.take() {
            return Err(Difference::Failed(error.to_string()));
        }
        cx.save_positions();
        metrics::save_user_counters(cx, user_counters);
        cx.txn.commit();
        // Into words of our own copy, which nobody else has.
        cx.publish(|_| ());
        header.commits.store(step, Ordering::Relaxed);
        if found != digest {
            let what = format!("the newest changes to state differ, the last one at {newest:#x}");
            return Err(Difference::Mismatch { step, at: newest, what });
        }
        Ok(())
    }

    /// Compares where everything stands now with where it stood after the worker's step.
    fn compare(&self, words: &mut Words, step: u64) -> Result<(), Difference> {
        let cx = &self.worker.cx;
        let mismatch = |what: String| Err(Difference::Mismatch { step, at: 0, what });
        for input in inputs(cx) {
            let wanted = [(); 3].map(|()| words.next());
            let found = InRing::position(input);
            if found != wanted {
                return mismatch(format!("{} was read to {found:?}, not {wanted:?}", input.name));
            }
        }
        for out in &cx.out_rings {
            let heads = words.next();
            words.at += heads;
            let (wanted, found) = (words.next(), out.ring.position());
            if found != wanted {
                return mismatch(format!("{} was written to {found}, not {wanted}", out.name));
            }
            if !out.ring.has_asked_for_all() {
                return mismatch(format!("{} was written in another way", out.name));
            }
        }
        if !cx.tape.is_over() {
            return mismatch("a source was read in another way".into());
        }
        if !clock::is_over() {
            return mismatch("the clock was looked at in another way".into());
        }
        Ok(())
    }
}

/// Passes over where rings stood after the step.
fn skip_results(words: &mut Words, inputs: usize, outputs: usize) {
    words.at += 3 * inputs as u64;
    for _ in 0..outputs {
        let heads = words.next();
        words.at += heads.saturating_add(1);
    }
}

/// Tells the output rings what the worker learned of its consumers: before the step, and in it.
fn tell_heads(words: &mut Words, cx: &mut super::context::Cx, seen: &[u64]) {
    words.at += 3 * inputs(cx).count() as u64;
    for (out, seen) in cx.out_rings.iter_mut().zip(seen) {
        let heads = words.next();
        let learned = words.take(heads);
        words.next();
        out.ring.tell_heads(*seen, learned.into_iter());
    }
}
