//! Windows by key: one table per slice and key group; on firing, the slices of a window are merged
//! key by key.
//!
//! Invariants:
//! - a firing window keeps its cursor in a cell and fires only as much as the operators behind have
//!   room for (R7); until it is through, this operator takes no input and hands on no watermark;
//! - windows fire in the order of their ends; slices that no later window needs are dropped whole;
//! - a record is late when the last window that would contain it has fired: it goes to the side, or
//!   is counted.
//!
//! Called through [`Push`], always right behind a hash exchange.

use super::{Bounds, Window};
use crate::operator::Push;
use crate::operator::aggregate::{InRuns, KeyedParts, TURNS, in_runs, pipelined};
use crate::worker::context::{CounterPlace, Cx};
use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::rc::Rc;
use testudo_shm::record::{Batch, Item, Record, Scratch};
use testudo_shm::txn::Place;
use testudo_state::{Ahead, Groups, KeyHash, Slices, Table};

/// Slots of dropped slices looked at for freeing in one call.
const SWEEP: u64 = 512;

/// How far the window that is firing has come: {its end, group, slice of the window, slot cursor +
/// 1 or 0 for the start}.
pub type FireCursor = [i64; 4];

/// Nothing is firing.
pub(crate) const NOT_FIRING: FireCursor = [i64::MIN, 0, 0, 0];

/// What a window operator remembers besides its slices.
#[derive(Debug, Clone, Copy)]
pub struct FireCells {
    /// Watermark that came in.
    pub(crate) watermark: Place<i64>,
    /// Watermark that was handed on.
    pub(crate) passed: Place<i64>,
    /// End of the last window that fired.
    pub(crate) fired: Place<i64>,
    pub(crate) cursor: Place<FireCursor>,
}

/// How far a key group had fired with an earlier owner: all windows up to `upto`, and of the one
/// that ends at `end` what lies before a slot of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fired {
    pub(crate) upto: i64,
    pub(crate) end: i64,
    pub(crate) slice: i64,
    pub(crate) slot: i64,
}

impl Default for Fired {
    fn default() -> Self {
        Self { upto: i64::MIN, end: i64::MIN, slice: 0, slot: 0 }
    }
}

impl Fired {
    pub(crate) fn words(self) -> FireCursor {
        [self.upto, self.end, self.slice, self.slot]
    }

    pub(crate) fn of([upto, end, slice, slot]: FireCursor) -> Self {
        Self { upto, end, slice, slot }
    }
}

pub struct KeyedWindow<T: Record, K: Record, A: Record, U: Record, X: KeyedFns<T, K, A, U>, N, M> {
    pub(crate) keyed: KeyedParts<K, Rc<X::Key>>,
    pub(crate) groups: Groups,
    pub(crate) slices: Slices<K, A>,
    pub(crate) window: Window,
    pub(crate) fns: X,
    pub(crate) cells: FireCells,
    /// By key group; empty unless owners have changed since.
    pub(crate) before: Vec<Fired>,
    /// The slice that was last found not to be late under the present watermark: [from, to). What
    /// is logged must not depend on what it was before the batch: see `begin_batch`.
    pub(crate) good: (i64, i64),
    /// Where the keys of the chunks in work lie.
    pub(crate) ahead: [Ahead; TURNS],
    pub(crate) late_records: CounterPlace,
    pub(crate) late: M,
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T) -> U>,
}

/// The user's functions of a keyed window.
pub trait KeyedFns<T: Record, K: Record, A: Record, U: Record>: 'static {
    type Key: Fn(&T::View) -> K;

    fn time(&self, record: &T::View) -> i64;

    fn init(&self) -> A;

    fn fold(&self, value: &mut A, record: &T::View);

    fn merge(&self, into: &mut A, other: &A);

    fn emit(&self, key: &K::View, window: Bounds, value: &A) -> U;
}

/// Where late records go.
pub trait Late<T: Record>: Push<T> {}
impl<T: Record, M: Push<T>> Late<T> for M {}

/// Late records are only counted.
pub struct Counted;

impl<T: Record> Push<T> for Counted {
    fn push(&mut self, _cx: &mut Cx, _item: Item<'_, T>) {}

    fn end_batch(&mut self, _cx: &mut Cx) {}

    fn watermark(&mut self, _cx: &mut Cx, _watermark: i64) {}

    fn room(&mut self, _cx: &mut Cx) -> usize {
        usize::MAX
    }

    fn pump(&mut self, _cx: &mut Cx) -> bool {
        false
    }

    fn save(&mut self, _cx: &mut Cx) {}

    fn end(&mut self, _cx: &mut Cx) -> bool {
        true
    }
}

impl<T, K, A, U, X, N, M> KeyedWindow<T, K, A, U, X, N, M>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    X: KeyedFns<T, K, A, U>,
    N: Push<U>,
    M: Late<T>,
{
    #[inline(always)]
    fn apply(&mut self, cx: &mut Cx, hash: KeyHash, item: Item<'_, T>) {
        let time = self.fns.time(item.view);
        let is_good = self.good.0 <= time && time < self.good.1;
        if !is_good && !self.choose_slice(cx, time) {
            cx.count(self.late_records, 1);
            self.late.push(cx, item);
            return;
        }
        let key = (self.keyed.key)(item.view);
        let key = key.item(&mut self.keyed.scratch);
        let fns = &self.fns;
        let fold = |value: &mut A| fns.fold(value, item.view);
        let done = self.slices.update(&mut cx.txn, self.good.0, hash, key, || fns.init(), fold);
        if let Err(error) = done {
            let error = error.to_string();
            cx.fail(crate::error::Error::job(&self.keyed.name, error));
        }
    }

    /// Folds the longest run of quickly found keys of the slice in use; returns its length.
    #[inline(always)]
    fn apply_run(&mut self, cx: &mut Cx, records: &[T::View], turn: usize) -> usize {
        let (key, fns, good) = (&self.keyed.key, &self.fns, self.good);
        if good.0 == good.1 {
            return 0;
        }
        let keys = records.iter().map(|record| key(record));
        let table = self.slices.slice(good.0);
        let run = table.run(&mut cx.txn, keys, &mut self.ahead[turn]);
        run.for_each(records.iter(), |value, record| {
            let time = fns.time(record);
            if time < good.0 || good.1 <= time {
                return ControlFlow::Break(());
            }
            fns.fold(value, record);
            ControlFlow::Continue(())
        })
    }

    #[inline(never)]
    fn apply_slow(&mut self, cx: &mut Cx, record: &T::View) {
        let mut unused = Scratch::default();
        let record = <T as Record>::to_owned(record);
        self.push(cx, record.item(&mut unused));
    }

    /// Finds the slice of a time; false when all its windows have fired.
    #[inline(never)]
    fn choose_slice(&mut self, cx: &Cx, time: i64) -> bool {
        let slice = self.window.slice_of(time);
        if self.window.last_end(slice) <= cx.txn.get(self.cells.watermark) {
            return false;
        }
        self.good = (slice, self.window.slice_end(slice));
        true
    }

    /// Chooses the slice in which the keys of a batch are looked for ahead, and logged, by the
    /// batch alone: a process that has just begun to follow must do what its worker does, which
    /// remembers the slice of the batch before.
    #[inline]
    fn begin_batch(&mut self, cx: &Cx, first: Option<&T::View>) {
        self.good = (0, 0);
        if let Some(record) = first
            && self.choose_slice(cx, self.fns.time(record))
        {
            self.slices.slice(self.good.0);
        }
    }

    /// The slice that is chosen.
    #[inline(always)]
    fn chosen(&self) -> Option<i64> {
        let (from, to) = self.good;
        (from != to).then_some(from)
    }

    /// End of the next window that the watermark makes fire.
    fn due(&self, cx: &Cx) -> Option<i64> {
        let oldest = self.slices.oldest()?;
        let (fired, passed) = (cx.txn.get(self.cells.fired), cx.txn.get(self.cells.passed));
        let end = self.window.next_end(fired, passed, oldest);
        (end <= cx.txn.get(self.cells.watermark)).then_some(end)
    }

    fn is_pending(&self, cx: &Cx) -> bool {
        cx.txn.get(self.cells.passed) < cx.txn.get(self.cells.watermark)
    }

    /// Fires what is due while there is room, then hands the watermark on. True when something was
    /// done.
    fn fire(&mut self, cx: &mut Cx) -> bool {
        if !self.is_pending(cx) {
            return !self.slices.sweep(&mut cx.txn, SWEEP);
        }
        let mut any = false;
        while let Some(end) = self.due(cx) {
            if !self.fire_some(cx, end) {
                return any;
            }
            any = true;
            if cx.txn.get(self.cells.cursor)[0] != i64::MIN || cx.txn.is_nearly_full() {
                return true;
            }
        }
        let watermark = cx.txn.get(self.cells.watermark);
        cx.txn.set(self.cells.passed, watermark);
        self.next.watermark(cx, watermark);
        true
    }

    /// Fires one run of entries of the window that ends at `end`; false when there is no room.
    fn fire_some(&mut self, cx: &mut Cx, end: i64) -> bool {
        let room = self.next.room(cx);
        if room == 0 {
            return false;
        }
        let bounds = self.window.bounds(end);
        let times = bounds.start..=Window::last_of(bounds);
        let slices: Vec<i64> = self.slices.ids().filter(|id| times.contains(id)).collect();
        let cursor = cx.txn.get(self.cells.cursor);
        let (mut group, mut slice, mut slot) = match cursor[0] == end {
            true => (cursor[1], cursor[2], cursor[3]),
            false => self.first_of(0, end),
        };
        let mut left = room;
        while left > 0 && (group as u32) < self.groups.groups() {
            let Some(id) = slices.iter().copied().find(|id| *id >= slice) else {
                (group, slice, slot) = self.first_of(group + 1, end);
                continue;
            };
            if id > slice {
                (slice, slot) = (id, 0);
            }
            let after =
                self.fire_run(cx, bounds, &slices, id, (group as u32, slot as u64), &mut left);
            match after {
                Some(at) => slot = at as i64,
                None => match id.checked_add(1) {
                    Some(next) => (slice, slot) = (next, 0),
                    None => (group, slice, slot) = self.first_of(group + 1, end),
                },
            }
        }
        self.next.end_batch(cx);
        if (group as u32) < self.groups.groups() {
            cx.txn.set(self.cells.cursor, [end, group, slice, slot]);
        } else {
            self.finish(cx, end, &slices);
        }
        true
    }

    /// Where firing a window begins from a group on: group, slice and slot. Groups that had fired
    /// it with an earlier owner are passed over.
    fn first_of(&self, group: i64, end: i64) -> (i64, i64, i64) {
        let mut group = group;
        while self.before.get(group as usize).is_some_and(|before| before.upto >= end) {
            group += 1;
        }
        match self.before.get(group as usize) {
            Some(before) if before.end == end => (group, before.slice, before.slot),
            _ => (group, i64::MIN, 0),
        }
    }

    /// Emits entries of slice `id` from a slot cursor on; each key once, at the first slice that
    /// has it.
    fn fire_run(
        &mut self,
        cx: &mut Cx,
        bounds: Bounds,
        slices: &[i64],
        id: i64,
        (group, slot): (u32, u64),
        left: &mut usize,
    ) -> Option<u64> {
        let table = self.slices.get_slice(id)?;
        let (all, fns, next) = (&self.slices, &self.fns, &mut self.next);
        table.scan(group, slot, *left, |hash, key, value| {
            let earlier = |other: &&i64| **other < id && all.get(**other, hash, key).is_some();
            if slices.iter().find(earlier).is_none() {
                let mut merged = <A as Record>::to_owned(value.view);
                for other in slices.iter().filter(|other| **other > id) {
                    if let Some(value) = all.get(*other, hash, key) {
                        fns.merge(&mut merged, &<A as Record>::to_owned(value.view));
                    }
                }
                let out = fns.emit(key.view, bounds, &merged);
                next.push_value(cx, &out);
            }
            *left -= 1;
            if *left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    }

    /// The window has fired: forgets the cursor and the slices that no later window needs.
    fn finish(&mut self, cx: &mut Cx, end: i64, slices: &[i64]) {
        cx.txn.set(self.cells.cursor, NOT_FIRING);
        cx.txn.set(self.cells.fired, end);
        for &id in slices {
            if self.window.last_end(id) <= end {
                self.slices.drop_slice(&mut cx.txn, id);
            }
        }
    }
}

impl<T, K, A, U, X, N, M> InRuns<T::View> for KeyedWindow<T, K, A, U, X, N, M>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    X: KeyedFns<T, K, A, U>,
    N: Push<U>,
    M: Late<T>,
{
    #[inline(never)]
    fn ask(&mut self, chunk: &[T::View], turn: usize) {
        self.ahead[turn].restart();
        if let Some(table) = self.chosen().and_then(|id| self.slices.in_use(id)) {
            let keys = chunk.iter().map(|record| (self.keyed.key)(record));
            table.ask(keys, &mut self.ahead[turn]);
        }
    }

    #[inline(never)]
    fn find_and_log(&mut self, cx: &mut Cx, chunk: &[T::View], turn: usize) {
        if let Some(table) = self.chosen().and_then(|id| self.slices.in_use(id)) {
            let keys = chunk.iter().map(|record| (self.keyed.key)(record));
            table.find_and_log(&mut cx.txn, keys, &mut self.ahead[turn]);
        }
    }

    #[inline(never)]
    fn apply_chunk(&mut self, cx: &mut Cx, chunk: &[T::View], turn: usize) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let done = self.apply_run(cx, rest, turn);
            if let Some(record) = rest.get(done) {
                self.apply_slow(cx, record);
            }
            self.ahead[turn].advance(done + 1);
            rest = rest.get(done + 1..).unwrap_or_default();
        }
    }
}

impl<T, K, A, U, X, N, M> Push<T> for KeyedWindow<T, K, A, U, X, N, M>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    X: KeyedFns<T, K, A, U>,
    N: Push<U>,
    M: Late<T>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        let key = (self.keyed.key)(item.view);
        let hash = KeyHash::of(key.item(&mut self.keyed.scratch));
        self.apply(cx, hash, item);
    }

    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        if Table::<K, A>::IN_RUNS
            && let Some(records) = batch.as_slice()
        {
            self.begin_batch(cx, records.first());
            return in_runs(self, cx, records);
        }
        let ask = |this: &mut Self, item: Item<'_, T>| {
            let hash = this.keyed.hash(item);
            this.slices.prefetch(this.good.0, hash);
            hash
        };
        pipelined(self, batch, ask, |this, hash, item| this.apply(cx, hash, item));
    }

    fn end_batch(&mut self, cx: &mut Cx) {
        self.late.end_batch(cx);
        self.next.end_batch(cx);
    }

    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        self.late.watermark(cx, watermark);
        if watermark > cx.txn.get(self.cells.watermark) {
            cx.txn.set(self.cells.watermark, watermark);
            if self.good.0 != self.good.1 && self.window.last_end(self.good.0) <= watermark {
                self.good = (0, 0);
            }
            self.fire(cx);
        }
    }

    #[inline]
    fn room(&mut self, cx: &mut Cx) -> usize {
        if self.is_pending(cx) {
            return 0;
        }
        self.next.room(cx).min(self.late.room(cx))
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        let behind = self.next.pump(cx) | self.late.pump(cx);
        self.fire(cx) | behind
    }

    fn save(&mut self, cx: &mut Cx) {
        self.next.save(cx);
        self.late.save(cx);
    }

    fn end(&mut self, cx: &mut Cx) -> bool {
        !self.is_pending(cx) && self.next.end(cx) & self.late.end(cx)
    }
}
