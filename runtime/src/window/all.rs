//! Windows over everything, in two stages: each subtask folds its own records into one accumulator
//! per slice and sends that once the watermark has passed the slice; one subtask merges them and
//! fires the windows.
//!
//! Invariants:
//! - the accumulator in use is a private copy only within a batch: `end_batch` writes it back (R6);
//! - a slice is sent when the watermark is at or past its end, before that watermark is handed on.
//!
//! Called through [`Push`].

use super::keyed::{FireCells, Late};
use super::{Bounds, Window};
use crate::error::Error;
use crate::operator::Push;
use crate::worker::context::{CounterPlace, Cx};
use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::ops::ControlFlow;
use testudo_shm::record::{Item, Record, Scratch};
use testudo_shm::txn::Place;
use testudo_state::{Groups, KeyHash, StateError, Table};

/// What travels from the first stage to the second: slice and accumulator.
pub type Partial<A> = (i64, A);

/// One accumulator per open slice, in a segment of this subtask's own.
pub struct SliceStore<A: Record> {
    table: Table<i64, A>,
    open: BTreeSet<i64>,
    scratch: Scratch,
    name: String,
}

impl<A: Record> SliceStore<A> {
    pub(crate) fn open(name: &str, groups: &Groups, table: Table<i64, A>) -> Self {
        let mut open = BTreeSet::new();
        for group in groups.owned() {
            let mut cursor = Some(0);
            while let Some(at) = cursor {
                cursor = table.scan(group, at, 1024, |_, slice, _| {
                    open.insert(*slice.view);
                    ControlFlow::Continue(())
                });
            }
        }
        Self { table, open, scratch: Scratch::default(), name: name.into() }
    }

    /// Merges what another table has by slice.
    pub(crate) fn merge_all(
        &mut self,
        cx: &mut Cx,
        other: &Table<i64, A>,
        merge: &impl Fn(&mut A, &A),
    ) {
        let mut found = Vec::new();
        let mut cursor = Some(0);
        while let Some(at) = cursor {
            cursor = other.scan(0, at, 1024, |_, slice, value| {
                found.push((*slice.view, <A as Record>::to_owned(value.view)));
                ControlFlow::Continue(())
            });
        }
        for (slice, value) in found {
            let merged = match self.get(slice) {
                None => value,
                Some(mut old) => {
                    merge(&mut old, &value);
                    old
                }
            };
            self.set(cx, slice, &merged);
        }
    }

    fn get(&mut self, slice: i64) -> Option<A> {
        let key = slice.item(&mut self.scratch);
        self.table.get(KeyHash::of(key), key).map(|value| <A as Record>::to_owned(value.view))
    }

    fn set(&mut self, cx: &mut Cx, slice: i64, value: &A) {
        let key = slice.item(&mut self.scratch);
        self.open.insert(slice);
        let done = self.table.set(&mut cx.txn, KeyHash::of(key), key, value);
        self.check(cx, done.map(|_| ()));
    }

    fn remove(&mut self, cx: &mut Cx, slice: i64) {
        let key = slice.item(&mut self.scratch);
        self.open.remove(&slice);
        let done = self.table.remove(&mut cx.txn, KeyHash::of(key), key);
        self.check(cx, done.map(|_| ()));
    }

    fn check(&self, cx: &mut Cx, done: Result<(), StateError>) {
        if let Err(error) = done {
            cx.fail(Error::job(&self.name, error.to_string()));
        }
    }
}

/// The first stage.
pub struct PreAggregate<T, A: Record, F, I, G, N, M> {
    pub(crate) store: SliceStore<A>,
    pub(crate) window: Window,
    pub(crate) time: F,
    pub(crate) init: I,
    pub(crate) fold: G,
    /// The slice in use, [from, to), and its accumulator; empty when from = to.
    pub(crate) current: (i64, i64),
    pub(crate) value: Option<A>,
    pub(crate) watermark: Place<i64>,
    pub(crate) late_records: CounterPlace,
    pub(crate) late: M,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T, A, F, I, G, N, M> PreAggregate<T, A, F, I, G, N, M>
where
    T: Record,
    A: Record,
    F: Fn(&T::View) -> i64,
    I: Fn() -> A,
    G: Fn(&mut A, &T::View),
    N: Push<Partial<A>>,
    M: Late<T>,
{
    /// Changes to the slice of `time`; false when all its windows have fired.
    #[inline(never)]
    fn choose_slice(&mut self, cx: &mut Cx, time: i64) -> bool {
        self.write_back(cx);
        let slice = self.window.slice_of(time);
        if self.window.last_end(slice) <= cx.txn.get(self.watermark) {
            return false;
        }
        self.current = (slice, self.window.slice_end(slice));
        self.value = Some(self.store.get(slice).unwrap_or_else(&self.init));
        true
    }

    fn write_back(&mut self, cx: &mut Cx) {
        if let Some(value) = self.value.take() {
            self.store.set(cx, self.current.0, &value);
        }
        self.current = (0, 0);
    }

    /// Sends every slice that the watermark has passed.
    fn send_passed(&mut self, cx: &mut Cx, watermark: i64) {
        while let Some(&slice) = self.store.open.first() {
            if self.window.slice_end(slice) > watermark {
                break;
            }
            if let Some(value) = self.store.get(slice) {
                self.next.push_value(cx, &(slice, value));
            }
            self.store.remove(cx, slice);
        }
        self.next.end_batch(cx);
    }
}

impl<T, A, F, I, G, N, M> Push<T> for PreAggregate<T, A, F, I, G, N, M>
where
    T: Record,
    A: Record,
    F: Fn(&T::View) -> i64,
    I: Fn() -> A,
    G: Fn(&mut A, &T::View),
    N: Push<Partial<A>>,
    M: Late<T>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        let time = (self.time)(item.view);
        let is_current = self.current.0 <= time && time < self.current.1;
        if !is_current && !self.choose_slice(cx, time) {
            cx.count(self.late_records, 1);
            self.late.push(cx, item);
            return;
        }
        if let Some(value) = &mut self.value {
            (self.fold)(value, item.view);
        }
    }

    #[inline(always)]
    fn end_batch(&mut self, cx: &mut Cx) {
        self.write_back(cx);
        self.late.end_batch(cx);
        self.next.end_batch(cx);
    }

    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        self.write_back(cx);
        self.late.watermark(cx, watermark);
        if watermark > cx.txn.get(self.watermark) {
            cx.txn.set(self.watermark, watermark);
            self.send_passed(cx, watermark);
            self.next.watermark(cx, watermark);
        }
    }

    #[inline(always)]
    fn room(&mut self, cx: &mut Cx) -> usize {
        // A batch of records becomes a few partials at most; room for one is room for all.
        if self.next.room(cx) == 0 { 0 } else { self.late.room(cx).min(BATCH) }
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        self.next.pump(cx) | self.late.pump(cx)
    }

    fn save(&mut self, cx: &mut Cx) {
        self.next.save(cx);
        self.late.save(cx);
    }

    fn end(&mut self, cx: &mut Cx) -> bool {
        self.next.end(cx) & self.late.end(cx)
    }
}

/// Records taken between two looks at the room behind.
const BATCH: usize = crate::exchange::outlet::BATCH;

/// The second stage.
pub struct MergeWindows<A: Record, U, G, E, N> {
    pub(crate) store: SliceStore<A>,
    pub(crate) window: Window,
    pub(crate) merge: G,
    pub(crate) emit: E,
    pub(crate) cells: FireCells,
    pub(crate) late_records: CounterPlace,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn() -> U>,
}

impl<A, U, G, E, N> MergeWindows<A, U, G, E, N>
where
    A: Record,
    U: Record,
    G: Fn(&mut A, &A),
    E: Fn(Bounds, &A) -> U,
    N: Push<U>,
{
    fn is_pending(&self, cx: &Cx) -> bool {
        cx.txn.get(self.cells.passed) < cx.txn.get(self.cells.watermark)
    }

    fn fire(&mut self, cx: &mut Cx) -> bool {
        if !self.is_pending(cx) {
            return false;
        }
        let watermark = cx.txn.get(self.cells.watermark);
        while let Some(&oldest) = self.store.open.first() {
            let (fired, passed) = (cx.txn.get(self.cells.fired), cx.txn.get(self.cells.passed));
            let end = self.window.next_end(fired, passed, oldest);
            if end > watermark {
                break;
            }
            if self.next.room(cx) == 0 || cx.txn.is_nearly_full() {
                return false;
            }
            self.fire_one(cx, end);
        }
        cx.txn.set(self.cells.passed, watermark);
        self.next.watermark(cx, watermark);
        true
    }

    fn fire_one(&mut self, cx: &mut Cx, end: i64) {
        let bounds = self.window.bounds(end);
        let times = bounds.start..=Window::last_of(bounds);
        let slices: Vec<i64> = self.store.open.range(times).copied().collect();
        let mut merged: Option<A> = None;
        for &slice in &slices {
            let Some(value) = self.store.get(slice) else {
                continue;
            };
            match &mut merged {
                None => merged = Some(value),
                Some(merged) => (self.merge)(merged, &value),
            }
        }
        if let Some(merged) = merged {
            let out = (self.emit)(bounds, &merged);
            self.next.push_value(cx, &out);
            self.next.end_batch(cx);
        }
        cx.txn.set(self.cells.fired, end);
        for slice in slices {
            if self.window.last_end(slice) <= end {
                self.store.remove(cx, slice);
            }
        }
    }
}

impl<A, U, G, E, N> Push<Partial<A>> for MergeWindows<A, U, G, E, N>
where
    A: Record,
    U: Record,
    G: Fn(&mut A, &A),
    E: Fn(Bounds, &A) -> U,
    N: Push<U>,
{
    fn push(&mut self, cx: &mut Cx, item: Item<'_, Partial<A>>) {
        let (slice, value) = <Partial<A> as Record>::to_owned(item.view);
        if self.window.last_end(slice) <= cx.txn.get(self.cells.watermark) {
            cx.count(self.late_records, 1);
            return;
        }
        match self.store.get(slice) {
            None => self.store.set(cx, slice, &value),
            Some(mut old) => {
                (self.merge)(&mut old, &value);
                self.store.set(cx, slice, &old);
            }
        }
    }

    fn end_batch(&mut self, cx: &mut Cx) {
        self.next.end_batch(cx);
    }

    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        if watermark > cx.txn.get(self.cells.watermark) {
            cx.txn.set(self.cells.watermark, watermark);
            self.fire(cx);
        }
    }

    fn room(&mut self, cx: &mut Cx) -> usize {
        if self.is_pending(cx) { 0 } else { self.next.room(cx) }
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        self.next.pump(cx) | self.fire(cx)
    }

    fn save(&mut self, cx: &mut Cx) {
        self.next.save(cx);
    }

    fn end(&mut self, cx: &mut Cx) -> bool {
        !self.is_pending(cx) && self.next.end(cx)
    }
}
