//! What an operator is: something that takes records from the one before it and pushes into the one
//! behind it.
//!
//! All operators between two exchanges are one type, built inside out, so that a whole stage
//! compiles to one loop over a batch: no dynamic call per record. A stage's first part (an inlet or
//! a source) is a [`Stage`], called once a step.
//!
//! Contract of [`Push`], in the order of a step:
//! 1. `pump` goes on with what an earlier step left (a firing window, a spill);
//! 2. `room` says how many records may be pushed now; 0 while something is pending;
//! 3. `push`, `push_batch`, `push_value`: the records; what goes beyond the room is spilled, never
//!    waited for (R7);
//! 4. `end_batch` closes what was opened: nothing sits in private buffers across a commit (R6);
//! 5. `watermark`, any time between batches; it never goes back;
//! 6. `save` right before commit: the last writes to cells and files (R13);
//! 7. `end` after the last watermark, until it says true.

pub(crate) mod stateless;

pub(crate) mod count;

pub(crate) mod fork;

pub(crate) mod aggregate;

pub(crate) mod process;

pub(crate) mod expire;

pub(crate) mod migrate;

use crate::worker::context::Cx;
use testudo_shm::record::{Batch, Item, Record, Scratch};

/// The receiving side of an operator. See the module's contract.
pub trait Push<T: Record> {
    /// Takes one record.
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>);

    /// Takes a batch; operators on keyed state prefetch over it.
    #[inline(always)]
    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        for item in batch {
            self.push(cx, item);
        }
    }

    /// Takes an owned record. Plain ones are passed by reference; archived ones are encoded first.
    #[inline(always)]
    fn push_value(&mut self, cx: &mut Cx, value: &T) {
        if T::SIZE.is_some() {
            let mut unused = Scratch::default();
            self.push(cx, value.item(&mut unused));
        } else {
            let mut scratch = cx.take_scratch();
            self.push(cx, value.item(&mut scratch));
            cx.give_scratch(scratch);
        }
    }

    /// Closes the batch.
    fn end_batch(&mut self, cx: &mut Cx);

    /// Takes a watermark: no record with an earlier time follows, but late ones.
    fn watermark(&mut self, cx: &mut Cx, watermark: i64);

    /// Records that may be pushed now.
    fn room(&mut self, cx: &mut Cx) -> usize;

    /// Goes on with pending work; true when something was done.
    fn pump(&mut self, cx: &mut Cx) -> bool;

    /// Last writes before the commit.
    fn save(&mut self, cx: &mut Cx);

    /// Nothing follows. True once that has been passed on completely.
    fn end(&mut self, cx: &mut Cx) -> bool;
}

/// Methods of [`Push`] that only hand on to `self.next`.
macro_rules! hand_on {
    ($($method:ident),*) => { $( crate::operator::hand_on!(@ $method); )* };
    (@ end_batch) => {
        #[inline(always)]
        fn end_batch(&mut self, cx: &mut Cx) { self.next.end_batch(cx); }
    };
    (@ watermark) => {
        #[inline]
        fn watermark(&mut self, cx: &mut Cx, watermark: i64) { self.next.watermark(cx, watermark); }
    };
    (@ room) => {
        #[inline(always)]
        fn room(&mut self, cx: &mut Cx) -> usize { self.next.room(cx) }
    };
    (@ pump) => {
        #[inline]
        fn pump(&mut self, cx: &mut Cx) -> bool { self.next.pump(cx) }
    };
    (@ save) => {
        #[inline]
        fn save(&mut self, cx: &mut Cx) { self.next.save(cx); }
    };
    (@ end) => {
        #[inline]
        fn end(&mut self, cx: &mut Cx) -> bool { self.next.end(cx) }
    };
}
pub(crate) use hand_on;

/// The head of a fused stage, as the worker's loop sees it: one dynamic call a step.
pub trait Stage {
    /// Goes on with pending work and takes some input. Returns what was done, in records (at least
    /// 1 if anything).
    fn run(&mut self, cx: &mut Cx) -> usize;

    /// Last writes before the commit.
    fn save(&mut self, cx: &mut Cx);

    /// True when all input has ended and everything is passed on.
    fn is_done(&self, cx: &Cx) -> bool;

    /// Monotonic nanoseconds at which this stage wants to run again although nothing arrives.
    fn wake_ns(&self) -> Option<u64> {
        None
    }
}

/// The input side of a stage for a producer in the same worker: one dynamic call a batch.
pub trait Intake<T: Record> {
    /// Records that may be handed over now.
    fn room(&mut self, cx: &mut Cx) -> usize;

    /// With care: what is taken next comes from the local producer on `channel`.
    fn hands_over(&mut self, channel: usize);

    /// Takes a batch from the local producer.
    fn take_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>);

    /// Takes the local producer's watermark on `channel`.
    fn take_watermark(&mut self, cx: &mut Cx, channel: usize, watermark: i64);

    /// The local producer on `channel` has ended.
    fn take_end(&mut self, cx: &mut Cx, channel: usize);
}

/// Methods of [`Push`] for an operator with `self.next` and `self.side`: both take part in
/// everything.
macro_rules! both_sides {
    () => {
        #[inline(always)]
        fn end_batch(&mut self, cx: &mut Cx) {
            self.next.end_batch(cx);
            self.side.end_batch(cx);
        }

        fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
            self.next.watermark(cx, watermark);
            self.side.watermark(cx, watermark);
        }

        #[inline(always)]
        fn room(&mut self, cx: &mut Cx) -> usize {
            self.next.room(cx).min(self.side.room(cx))
        }

        fn pump(&mut self, cx: &mut Cx) -> bool {
            // Both, always: neither may starve the other.
            self.next.pump(cx) | self.side.pump(cx)
        }

        fn save(&mut self, cx: &mut Cx) {
            self.next.save(cx);
            self.side.save(cx);
        }

        fn end(&mut self, cx: &mut Cx) -> bool {
            self.next.end(cx) & self.side.end(cx)
        }
    };
}
pub(crate) use both_sides;
