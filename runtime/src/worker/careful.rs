//! Careful steps (R17): while a worker is ordered to take care, each transaction takes one record
//! of one input, so that the place of a death is exact; a record that was convicted is put aside.
//!
//! Invariants:
//! - a record is passed over, counted and handed to the supervisor as a letter in one transaction,
//!   so each of the three happens exactly once, whenever a process dies;
//! - no step follows a letter before the supervisor says that it is written down: a checkpoint that
//!   holds what follows finds it in the file;
//! - without an order all of this costs one comparison a step and one a batch.
//!
//! The context has it ([`Cx::careful`]); the heads of stages ask, the step loop begins and ends it.

use super::attach::Worker;
use super::context::{CounterPlace, Cx};
use super::cut::Cutter;
use crate::testing::{Point, point};
use std::time::Duration;
use testudo_shm::letter::{Letter, Orders};
use testudo_shm::marker::{Phase, Place, Spot};
use testudo_shm::primitive::Ordering;
use testudo_shm::txn;

/// The input of what a worker goes on with by itself: a spill, a window that fires. Such places
/// have no positions; care ends after [`RECORDS_MAX`].
pub(crate) const NO_INPUT: u32 = u32::MAX;

/// Transactions with care after which the place is taken to be behind the worker, wherever its
/// input stands: another input may be all that has anything.
const RECORDS_MAX: u64 = 1 << 16;

/// The same for a place without an input.
const FIRED_MAX: u64 = 1 << 12;

/// Pause between two looks at whether a letter is written down.
const NAP: Duration = Duration::from_micros(50);

/// What is to be done with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is taken.
    Take,
    /// It is put aside.
    PutAside,
}

/// A worker's care.
#[derive(Debug)]
pub(crate) struct Careful {
    orders: &'static Orders,
    letter: &'static Letter,
    number: txn::Place<u64>,
    order: Option<(u64, Place)>,
    convicted: Option<Spot>,
    /// The latest cut that this worker has taken part in.
    epoch: u64,
    /// The record that this transaction takes.
    outer: Option<Place>,
    origin: String,
    /// Records that were handed on within this worker in this transaction.
    handed: u64,
    taken: u64,
}

impl Careful {
    /// What was ordered of this worker, if anything was.
    pub(crate) fn new(
        orders: &'static Orders,
        letter: &'static Letter,
        number: txn::Place<u64>,
    ) -> Option<Box<Self>> {
        let order = orders.careful();
        // SYNC letter: the supervisor's store follows the line in its file.
        let is_pending = letter.number() > orders.taken.load(Ordering::Acquire);
        let careful = Self {
            orders,
            letter,
            number,
            order,
            convicted: orders.convicted().filter(|_| !is_pending),
            epoch: 0,
            outer: None,
            origin: String::new(),
            handed: 0,
            taken: 0,
        };
        (order.is_some() || is_pending).then(|| Box::new(careful))
    }

    /// Whether the place that asked for care is behind this worker.
    fn is_over(&self, cx: &Cx) -> bool {
        let Some((_, place)) = self.order else { return true };
        if place.input == NO_INPUT {
            return self.taken > FIRED_MAX;
        }
        let ring = cx.in_rings.get(place.input as usize).map(|input| input.committed);
        let is_behind = ring.is_some_and(|[head, _, count]| [head, count] >= place.to);
        let outer = self.outer.filter(|outer| {
            (outer.stage, outer.input) == (place.stage, place.input) && outer.from >= place.to
        });
        is_behind || outer.is_some() || self.taken > RECORDS_MAX
    }
}

impl Cx {
    /// True when this transaction has taken its only record.
    #[inline(always)]
    pub(crate) fn has_taken_one(&self) -> bool {
        self.careful.as_ref().is_some_and(|careful| careful.outer.is_some())
    }

    /// A record of an input is about to be taken, alone.
    #[cold]
    pub(crate) fn begin_alone(
        &mut self,
        phase: Phase,
        place: &Place,
        origin: String,
        bytes: &[u8],
    ) -> Verdict {
        let Some(careful) = &mut self.careful else { return Verdict::Take };
        let Place { stage, input, from, .. } = *place;
        careful.outer = Some(*place);
        careful.taken += 1;
        self.marker.enter(Phase::Engine, place);
        self.marker.alone(0, 0, &origin, bytes);
        careful.origin = origin;
        let spot = Spot { stage, input, at: from, inner: 0, index: 0 };
        if careful.convicted == Some(spot) {
            return Verdict::PutAside;
        }
        self.marker.set(phase, stage);
        point(Point::Alone);
        Verdict::Take
    }

    /// A record that was handed on within this worker is about to be taken.
    #[cold]
    pub(crate) fn begin_inner(&mut self, stage: u32, bytes: &[u8], aside: CounterPlace) -> Verdict {
        let Some(careful) = &mut self.careful else { return Verdict::Take };
        let place = careful.outer.unwrap_or_else(|| {
            // Nothing was taken: it waited in a spill. Its bytes say which it is.
            let hash = testudo_shm::hash::key_hash(bytes);
            careful.taken += 1;
            Place { stage, input: NO_INPUT, from: [hash, 0], to: [hash, 1] }
        });
        let (inner, index) = (stage + 1, careful.handed);
        careful.handed += 1;
        self.marker.enter(Phase::Engine, &place);
        self.marker.alone(inner, index, &careful.origin, bytes);
        let spot = Spot { stage: place.stage, input: place.input, at: place.from, inner, index };
        if careful.convicted == Some(spot) {
            self.put_aside(&spot, bytes, aside);
            return Verdict::PutAside;
        }
        self.marker.set(Phase::Record, stage);
        point(Point::Alone);
        Verdict::Take
    }

    /// Hands a record over to the supervisor, as a part of the open transaction.
    #[cold]
    pub(crate) fn put_aside(&mut self, spot: &Spot, bytes: &[u8], aside: CounterPlace) {
        self.count(aside, 1);
        let Some(careful) = &mut self.careful else { return };
        careful.letter.write(spot, careful.epoch, &careful.origin, bytes);
        point(Point::LetterWritten);
        let number = self.txn.get(careful.number);
        self.txn.set(careful.number, number + 1);
        careful.convicted = None;
        point(Point::LetterCounted);
    }

    /// What the record that was begun looks like.
    #[cold]
    pub(crate) fn show_alone(&self, bytes: &[u8]) {
        if let Some(careful) = &self.careful {
            self.marker.alone(0, 0, &careful.origin, bytes);
        }
    }

    /// The spot of the record that was begun last.
    pub(crate) fn outer_spot(&self) -> Spot {
        let outer = self.careful.as_ref().and_then(|careful| careful.outer).unwrap_or_default();
        Spot { stage: outer.stage, input: outer.input, at: outer.from, inner: 0, index: 0 }
    }

    /// Records that were handed on are taken: what comes now is of the record that they followed
    /// from, or of none.
    #[cold]
    pub(crate) fn end_inner(&self, stage: u32) {
        let origin = self.careful.as_ref().map_or("", |careful| &careful.origin);
        self.marker.alone(0, 0, origin, &[]);
        self.marker.set(Phase::Closing, stage);
    }

    /// There was no record: others may be taken in this transaction.
    #[inline]
    pub(crate) fn release_alone(&mut self) {
        if let Some(careful) = &mut self.careful {
            careful.outer = None;
        }
    }

    /// What follows the record is done: operators end their batch.
    #[cold]
    pub(crate) fn end_alone(&self, stage: u32) {
        self.marker.set(Phase::Closing, stage);
    }
}

/// A step begins: nothing is taken yet.
#[cold]
pub(crate) fn begin_step(cx: &mut Cx, cutter: Option<&Cutter>) {
    if let Some(careful) = &mut cx.careful {
        careful.epoch = cutter.map_or(0, Cutter::epoch);
        (careful.outer, careful.handed) = (None, 0);
        careful.origin.clear();
        cx.turn = 1;
    }
}

/// A step has been committed and published: its letter is waited for, and care ends once it may.
#[cold]
pub(crate) fn end_step(worker: &mut Worker) {
    let Some(careful) = worker.cx.careful.take() else { return };
    point(Point::LetterCommitted);
    // SYNC letter: pairs with the release store in Care::look; its line is on disk.
    let is_written_down =
        || careful.orders.taken.load(Ordering::Acquire) >= careful.letter.number();
    if !is_written_down() {
        worker.cx.marker.waiting.store(1, Ordering::Relaxed);
        worker.notice();
        while !is_written_down() {
            std::thread::sleep(NAP);
        }
        worker.cx.marker.waiting.store(0, Ordering::Relaxed);
    }
    if careful.is_over(&worker.cx) {
        if let Some((number, _)) = careful.order {
            worker.cx.marker.passed.store(number, Ordering::Release);
            point(Point::CarePassed);
            worker.notice();
        }
    } else {
        worker.cx.careful = Some(careful);
    }
}
