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
use std::rc::Rc;
use testudo_shm::record::{Batch, Item, Record, Scratch};
use testudo_state::{KeyHash, Table};

/// Records whose slots are asked for ahead of their use: enough to cover a miss to memory, few
/// enough to stay in the nearest cache.
pub(crate) const AHEAD: usize = 32;

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

/// `init`, `fold` and `emit`, over a table of accumulators.
pub struct Aggregate<T: Record, K: Record, A: Record, U, F, I, G, E, N> {
    pub(crate) keyed: KeyedParts<K, Rc<F>>,
    pub(crate) table: Table<K, A>,
    pub(crate) init: I,
    pub(crate) fold: G,
    pub(crate) emit: E,
    /// Where the values of a run lie, while it is applied.
    pub(crate) places: [*mut u8; AHEAD],
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
    fn apply(&mut self, cx: &mut Cx, hash: KeyHash, item: Item<'_, T>) {
        let key = (self.keyed.key)(item.view);
        let key = key.item(&mut self.keyed.scratch);
        let (init, fold) = (&self.init, &self.fold);
        let done = self.table.update(&mut cx.txn, hash, key, init, |value| fold(value, item.view));
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
        self.apply(cx, hash, item);
    }

    #[inline]
    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        if !Table::<K, A>::IN_RUNS {
            let ask = |this: &mut Self, item: Item<'_, T>| {
                let hash = this.keyed.hash(item);
                this.table.prefetch(hash);
                hash
            };
            return pipelined(self, batch, ask, |this, hash, item| this.apply(cx, hash, item));
        }
        let mut hashes = [[KeyHash(0); AHEAD]; 2];
        let (mut chunk, mut rest) = batch.split_at(AHEAD);
        self.ask(chunk, &mut hashes[0]);
        let mut turn = 0;
        while !chunk.is_empty() {
            let (next, after) = rest.split_at(AHEAD);
            self.ask(next, &mut hashes[1 - turn]);
            self.apply_chunk(cx, chunk, &hashes[turn]);
            (chunk, rest, turn) = (next, after, 1 - turn);
        }
    }

    hand_on!(end_batch, watermark, room, pump, save, end);
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
    /// Hashes the keys of a chunk and asks for their slots.
    #[inline(always)]
    fn ask(&mut self, chunk: Batch<'_, T>, hashes: &mut [KeyHash; AHEAD]) {
        for (hash, item) in hashes.iter_mut().zip(chunk) {
            *hash = self.keyed.hash(item);
            self.table.prefetch(*hash);
        }
    }

    /// Applies a chunk: all keys that are quickly found in one run, the others one by one.
    #[inline(always)]
    fn apply_chunk(&mut self, cx: &mut Cx, chunk: Batch<'_, T>, hashes: &[KeyHash; AHEAD]) {
        let mut rest = chunk;
        let mut from = 0;
        while !rest.is_empty() {
            let done = self.apply_run(cx, rest, &hashes[from..]);
            let (slow, after) = rest.split_at(done).1.split_at(1);
            if let Some(item) = slow.iter().next() {
                self.apply(cx, hashes[from + done], item);
            }
            from += done + slow.len();
            rest = after;
        }
    }

    /// Applies the longest run of quickly found keys; returns its length.
    #[inline(always)]
    fn apply_run(&mut self, cx: &mut Cx, batch: Batch<'_, T>, hashes: &[KeyHash]) -> usize {
        let key = &self.keyed.key;
        let keys = hashes.iter().zip(batch).map(|(hash, item)| (*hash, key(item.view)));
        let mut run = self.table.run(&mut cx.txn, keys, &mut self.places[..batch.len()]);
        for (index, item) in batch.iter().enumerate().take(run.len()) {
            let value = run.value(index);
            (self.fold)(value, item.view);
            let mut unused = Scratch::default();
            let mut unused_too = Scratch::default();
            let key = (self.keyed.key)(item.view);
            let out = (self.emit)(key.item(&mut unused).view, value.item(&mut unused_too).view);
            self.next.push_value(cx, &out);
        }
        run.len()
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
