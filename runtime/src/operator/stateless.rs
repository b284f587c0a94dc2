//! Operators without state: map, try_map, filter, flat_map, inspect, and the watermark generator.
//!
//! Called through [`Push`]; each is a thin shell around a user's closure, so that stages fuse into
//! one loop.

use super::{Push, hand_on};
use crate::worker::context::{CounterPlace, Cx};
use std::marker::PhantomData;
use testudo_shm::record::{Batch, Item, Record};
use testudo_shm::txn::Place;

pub struct Map<T, U, F, N> {
    pub(crate) f: F,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T) -> U>,
}

impl<T: Record, U: Record, F: Fn(&T::View) -> U, N: Push<U>> Push<T> for Map<T, U, F, N> {
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        let out = (self.f)(item.view);
        self.next.push_value(cx, &out);
    }

    hand_on!(end_batch, watermark, room, pump, save, end);
}

pub struct Filter<T, F, N> {
    pub(crate) f: F,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T: Record, F: Fn(&T::View) -> bool, N: Push<T>> Push<T> for Filter<T, F, N> {
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        if (self.f)(item.view) {
            self.next.push(cx, item);
        }
    }

    #[inline(always)]
    fn push_value(&mut self, cx: &mut Cx, value: &T) {
        if T::SIZE.is_some() {
            let mut unused = testudo_shm::record::Scratch::default();
            if (self.f)(value.item(&mut unused).view) {
                self.next.push_value(cx, value);
            }
        } else {
            let mut scratch = cx.take_scratch();
            self.push(cx, value.item(&mut scratch));
            cx.give_scratch(scratch);
        }
    }

    hand_on!(end_batch, watermark, room, pump, save, end);
}

/// Where an operator with several results for one record puts them.
#[derive(Debug)]
pub struct Emit<'a, U> {
    out: &'a mut Vec<U>,
}

impl<'a, U> Emit<'a, U> {
    pub(crate) fn new(out: &'a mut Vec<U>) -> Self {
        Self { out }
    }

    /// Emits one record.
    #[inline(always)]
    pub fn emit(&mut self, value: U) {
        self.out.push(value);
    }
}

pub struct FlatMap<T, U, I, F, N> {
    pub(crate) f: F,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T) -> (U, I)>,
}

impl<T, U, I, F, N> Push<T> for FlatMap<T, U, I, F, N>
where
    T: Record,
    U: Record,
    I: IntoIterator<Item = U>,
    F: Fn(&T::View) -> I,
    N: Push<U>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        for out in (self.f)(item.view) {
            self.next.push_value(cx, &out);
        }
    }

    hand_on!(end_batch, watermark, room, pump, save, end);
}

/// A map that may refuse: refused records go to the side with the reason, counted.
pub struct TryMap<T, U, S, F, N, M> {
    pub(crate) f: F,
    pub(crate) next: N,
    pub(crate) side: M,
    pub(crate) rejected: CounterPlace,
    pub(crate) of: PhantomData<fn(T) -> (U, S)>,
}

impl<T, U, S, F, N, M> Push<T> for TryMap<T, U, S, F, N, M>
where
    T: Record,
    U: Record,
    S: Record,
    F: Fn(&T::View) -> Result<U, S>,
    N: Push<U>,
    M: Push<S>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        match (self.f)(item.view) {
            Ok(out) => self.next.push_value(cx, &out),
            Err(reject) => {
                cx.count(self.rejected, 1);
                self.side.push_value(cx, &reject);
            }
        }
    }

    super::both_sides!();
}

/// A flat map with a second output.
pub struct Split<T, U, S, F, N, M> {
    pub(crate) f: F,
    pub(crate) next: N,
    pub(crate) side: M,
    pub(crate) main_out: Vec<U>,
    pub(crate) side_out: Vec<S>,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T, U, S, F, N, M> Push<T> for Split<T, U, S, F, N, M>
where
    T: Record,
    U: Record,
    S: Record,
    F: Fn(&T::View, &mut Emit<'_, U>, &mut Emit<'_, S>),
    N: Push<U>,
    M: Push<S>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        (self.f)(item.view, &mut Emit::new(&mut self.main_out), &mut Emit::new(&mut self.side_out));
        for value in self.main_out.drain(..) {
            self.next.push_value(cx, &value);
        }
        for value in self.side_out.drain(..) {
            self.side.push_value(cx, &value);
        }
    }

    super::both_sides!();
}

/// Derives watermarks from the records that pass: the latest time seen, less the bound. Where a
/// source reads several parts in turn, each has a time of its own, and the lowest counts.
pub struct EventTime<T, F, N> {
    pub(crate) time: F,
    pub(crate) bound: i64,
    /// The latest time of each part: its cell and its value.
    pub(crate) parts: Vec<(Place<i64>, i64)>,
    /// This stage begins with a source; others have one part, whatever source is being read.
    pub(crate) is_behind_source: bool,
    /// The latest time in the open batch.
    pub(crate) batch: i64,
    pub(crate) sent: i64,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T: Record, F: Fn(&T::View) -> i64, N: Push<T>> Push<T> for EventTime<T, F, N> {
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        self.batch = self.batch.max((self.time)(item.view));
        self.next.push(cx, item);
    }

    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        for item in batch {
            self.batch = self.batch.max((self.time)(item.view));
        }
        self.next.push_batch(cx, batch);
    }

    #[inline(always)]
    fn end_batch(&mut self, cx: &mut Cx) {
        self.next.end_batch(cx);
        let part = if self.is_behind_source { cx.part } else { 0 };
        if let Some((cell, latest)) = self.parts.get_mut(part)
            && self.batch > *latest
        {
            *latest = self.batch;
            cx.txn.set(*cell, *latest);
        }
        self.batch = i64::MIN;
        let is_open = |part: usize| !self.is_behind_source || cx.is_part_open(part);
        let open = self.parts.iter().zip(0..).filter(|(_, part)| is_open(*part));
        let lowest = open.map(|((_, latest), _)| *latest).min().unwrap_or(i64::MIN);
        let watermark = lowest.saturating_sub(self.bound);
        if watermark > self.sent && lowest != i64::MIN {
            self.sent = watermark;
            cx.watermark = watermark;
            self.next.watermark(cx, watermark);
        }
    }

    /// A watermark from before this operator is replaced by its own, but for the last one.
    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        if watermark == i64::MAX {
            self.sent = watermark;
            self.next.watermark(cx, watermark);
        }
    }

    hand_on!(room, pump, save, end);
}
