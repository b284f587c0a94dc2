//! Running aggregates by key: for each record the key's accumulator changes, and the result goes
//! on.
//!
//! Invariants: the accumulator is keyed state, changed through the transaction; over a batch, the
//! slots of all keys are prefetched before the first is touched, which hides the latency of memory.
//!
//! Called through [`Push`], always right behind a hash exchange.

use super::{Push, hand_on};
use crate::error::Error;
use crate::worker::context::Cx;
use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::rc::Rc;
use testudo_shm::record::{Batch, Item, Record, Scratch};
use testudo_state::{AHEAD, Ahead, KeyHash, Table};

/// The parts of a keyed operator that do not depend on what it does.
pub struct KeyedParts<K, F> {
    pub(crate) name: String,
    pub(crate) key: F,
    pub(crate) scratch: Scratch,
    pub(crate) of: PhantomData<fn() -> K>,
}

impl<K: Record, F> KeyedParts<K, Rc<F>> {
    /// The hash of a record's key.
    #[inline(always)]
    pub(crate) fn hash<T: Record>(&mut self, item: Item<'_, T>) -> KeyHash
    where
        F: Fn(&T::View) -> K,
    {
        let key = (self.key)(item.view);
        KeyHash::of(key.item(&mut self.scratch))
    }

    #[cold]
    pub(crate) fn fail(&self, cx: &mut Cx, error: &testudo_state::StateError) {
        cx.fail(Error::job(&self.name, error.to_string()));
    }
}

/// Calls `apply` for each record of a batch, `ask` (which hashes the key and prefetches its slot)
/// running `AHEAD` records before it: memory is waited for while earlier records are processed.
#[inline(always)]
pub(crate) fn pipelined<T: Record, O>(
    operator: &mut O,
    batch: Batch<'_, T>,
    mut ask: impl FnMut(&mut O, Item<'_, T>) -> KeyHash,
    mut apply: impl FnMut(&mut O, KeyHash, Item<'_, T>),
) {
    let mut hashes = [KeyHash(0); AHEAD];
    let mut ahead = batch.iter();
    for (hash, item) in hashes.iter_mut().zip(ahead.by_ref()) {
        *hash = ask(operator, item);
    }
    for (index, item) in batch.iter().enumerate() {
        let place = &mut hashes[index % AHEAD];
        let hash = *place;
        if let Some(later) = ahead.next() {
            *place = ask(operator, later);
        }
        apply(operator, hash, item);
    }
}

/// An operator on plain records that changes the values of plain keys, many at once, in three steps
/// (see [`Table::run`]). Chunks have at most `AHEAD` records; each has its own `turn` while it is
/// in work.
pub(crate) trait InRuns<V> {
    /// Asks for the memory where the keys of a chunk are looked for.
    fn ask(&mut self, chunk: &[V], turn: usize);

    /// Finds and logs the values of a chunk's keys.
    fn find_and_log(&mut self, cx: &mut Cx, chunk: &[V], turn: usize);

    /// Applies a chunk.
    fn apply_chunk(&mut self, cx: &mut Cx, chunk: &[V], turn: usize);
}

/// Chunks in work at the same time: one for each step.
pub(crate) const TURNS: usize = 3;

/// Takes a batch through the three steps, each one chunk behind the step before it. The steps are
/// functions of their own, each with all registers for its loop.
#[inline(always)]
pub(crate) fn in_runs<V>(operator: &mut impl InRuns<V>, cx: &mut Cx, batch: &[V]) {
    let mut chunks = batch.chunks(AHEAD);
    let mut first = chunks.next().unwrap_or_default();
    let mut second = chunks.next().unwrap_or_default();
    operator.ask(first, 0);
    operator.ask(second, 1);
    operator.find_and_log(cx, first, 0);
    let mut turn = 0;
    while !first.is_empty() {
        let third = chunks.next().unwrap_or_default();
        let (next, last) = ((turn + 1) % TURNS, (turn + 2) % TURNS);
        operator.ask(third, last);
        operator.find_and_log(cx, second, next);
        operator.apply_chunk(cx, first, turn);
        (first, second, turn) = (second, third, next);
    }
}

/// `init`, `fold` and `emit`, over a table of accumulators.
pub struct Aggregate<T: Record, K: Record, A: Record, U, F, I, G, E, N> {
    pub(crate) keyed: KeyedParts<K, Rc<F>>,
    pub(crate) table: Table<K, A>,
    pub(crate) init: I,
    pub(crate) fold: G,
    pub(crate) emit: E,
    /// Where the keys of the chunks in work lie.
    pub(crate) ahead: [Ahead; TURNS],
    pub(crate) next: N,
    pub(crate) of: PhantomData<fn(T) -> U>,
}

impl<T, K, A, U, F, I, G, E, N> Aggregate<T, K, A, U, F, I, G, E, N>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K,
    I: Fn() -> A,
    G: Fn(&mut A, &T::View),
    E: Fn(&K::View, &A::View) -> U,
    N: Push<U>,
{
    #[inline(always)]
    fn apply(&mut self, cx: &mut Cx, hash: KeyHash, record: &T::View) {
        let key = (self.keyed.key)(record);
        let key = key.item(&mut self.keyed.scratch);
        let (init, fold) = (&self.init, &self.fold);
        let done = self.table.update(&mut cx.txn, hash, key, init, |value| fold(value, record));
        match done {
            Ok(value) => {
                let out = (self.emit)(key.view, value);
                self.next.push_value(cx, &out);
            }
            Err(error) => cx.fail(Error::job(&self.keyed.name, error.to_string())),
        }
    }
}

impl<T, K, A, U, F, I, G, E, N> Push<T> for Aggregate<T, K, A, U, F, I, G, E, N>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K,
    I: Fn() -> A,
    G: Fn(&mut A, &T::View),
    E: Fn(&K::View, &A::View) -> U,
    N: Push<U>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        let key = (self.keyed.key)(item.view);
        let hash = KeyHash::of(key.item(&mut self.keyed.scratch));
        self.apply(cx, hash, item.view);
    }

    #[inline]
    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        if Table::<K, A>::IN_RUNS
            && let Some(records) = batch.as_slice()
        {
            return in_runs(self, cx, records);
        }
        let ask = |this: &mut Self, item: Item<'_, T>| {
            let hash = this.keyed.hash(item);
            this.table.prefetch(hash);
            hash
        };
        pipelined(self, batch, ask, |this, hash, item| this.apply(cx, hash, item.view));
    }

    hand_on!(end_batch, watermark, room, pump, save, end);
}

impl<T, K, A, U, F, I, G, E, N> InRuns<T::View> for Aggregate<T, K, A, U, F, I, G, E, N>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K,
    I: Fn() -> A,
    G: Fn(&mut A, &T::View),
    E: Fn(&K::View, &A::View) -> U,
    N: Push<U>,
{
    #[inline(never)]
    fn ask(&mut self, chunk: &[T::View], turn: usize) {
        self.ahead[turn].restart();
        self.table.ask(chunk.iter().map(|record| (self.keyed.key)(record)), &mut self.ahead[turn]);
    }

    #[inline(never)]
    fn find_and_log(&mut self, cx: &mut Cx, chunk: &[T::View], turn: usize) {
        let keys = chunk.iter().map(|record| (self.keyed.key)(record));
        self.table.find_and_log(&mut cx.txn, keys, &mut self.ahead[turn]);
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

impl<T, K, A, U, F, I, G, E, N> Aggregate<T, K, A, U, F, I, G, E, N>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K,
    I: Fn() -> A,
    G: Fn(&mut A, &T::View),
    E: Fn(&K::View, &A::View) -> U,
    N: Push<U>,
{
    /// Applies the longest run of quickly found keys; returns its length.
    #[inline(always)]
    fn apply_run(&mut self, cx: &mut Cx, records: &[T::View], turn: usize) -> usize {
        let (key, fold, emit, next) = (&self.keyed.key, &self.fold, &self.emit, &mut self.next);
        let keys = records.iter().map(|record| key(record));
        let run = self.table.run(&mut cx.txn, keys, &mut self.ahead[turn]);
        run.for_each(records.iter(), |value, record| {
            fold(value, record);
            let mut unused = Scratch::default();
            let mut unused_too = Scratch::default();
            let out = emit(key(record).item(&mut unused).view, value.item(&mut unused_too).view);
            next.push_value(cx, &out);
            ControlFlow::Continue(())
        })
    }

    #[inline(never)]
    fn apply_slow(&mut self, cx: &mut Cx, record: &T::View) {
        let mut unused = Scratch::default();
        let key = (self.keyed.key)(record);
        let hash = KeyHash::of(key.item(&mut unused));
        self.apply(cx, hash, record);
    }
}

/// `reduce`: the accumulator is a record of the stream's own type.
pub struct Reduce<T: Record, K: Record, F, G, N> {
    pub(crate) keyed: KeyedParts<K, Rc<F>>,
    pub(crate) table: Table<K, T>,
    pub(crate) combine: G,
    pub(crate) next: N,
}

impl<T, K, F, G, N> Reduce<T, K, F, G, N>
where
    T: Record,
    K: Record,
    F: Fn(&T::View) -> K,
    G: Fn(&T::View, &T::View) -> T,
    N: Push<T>,
{
    #[inline(always)]
    fn apply(&mut self, cx: &mut Cx, hash: KeyHash, item: Item<'_, T>) {
        let key = (self.keyed.key)(item.view);
        let key = key.item(&mut self.keyed.scratch);
        let done = match self.table.get(hash, key) {
            None => self.table.set_item(&mut cx.txn, hash, key, item).map(|_| None),
            Some(old) => {
                let new = (self.combine)(old.view, item.view);
                self.table.set(&mut cx.txn, hash, key, &new).map(|_| Some(new))
            }
        };
        match done {
            Ok(Some(new)) => self.next.push_value(cx, &new),
            Ok(None) => self.next.push(cx, item),
            Err(error) => self.keyed.fail(cx, &error),
        }
    }
}

impl<T, K, F, G, N> Push<T> for Reduce<T, K, F, G, N>
where
    T: Record,
    K: Record,
    F: Fn(&T::View) -> K,
    G: Fn(&T::View, &T::View) -> T,
    N: Push<T>,
{
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        let key = (self.keyed.key)(item.view);
        let hash = KeyHash::of(key.item(&mut self.keyed.scratch));
        self.apply(cx, hash, item);
    }

    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        let ask = |this: &mut Self, item: Item<'_, T>| {
            let hash = this.keyed.hash(item);
            this.table.prefetch(hash);
            hash
        };
        pipelined(self, batch, ask, |this, hash, item| this.apply(cx, hash, item));
    }

    hand_on!(end_batch, watermark, room, pump, save, end);
}
