//! Time to live: keys of keyed state that are forgotten when they were not used for a while.
//!
//! Invariants: expired state is never seen, swept or not; what time it is, the clock of the state
//! says ([`Clock`]); what expires and what is swept belongs to the step's transaction, and goes
//! with the key group into checkpoints. States without a time to live pay nothing.
//!
//! Bounded work: each write sweeps at most [`SWEEP_A_WRITE`] keys of the same state. More go than
//! come, so expired keys never are the larger part for long. `aggregate` and `reduce` sweep
//! [`SWEEP_A_STEP`] more a step, with or without input; what expires in a state of `process` that
//! is not written to any more stays where it is.
//!
//! Called by the keyed operators, through [`Push`].

use super::Push;
use super::aggregate::{Aggregate, Reduce};
use crate::error::Error;
use crate::time::step;
use crate::worker::context::Cx;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::record::{Item, Record, Scratch};
use testudo_shm::txn::{Place, Txn};
use testudo_state::{Expiry, KeyHash, StateError};

/// Keys that an aggregate looks at in a step besides, to see whether they have expired.
const SWEEP_A_STEP: usize = 64;

/// Keys that a write looks at. More than one: more go than come.
const SWEEP_A_WRITE: usize = 4;

/// Which time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The machine's clock, also while the job was not running.
    Processing,
    /// The operator's watermark. Before the first one nothing expires; the end of input moves it no
    /// further.
    Event,
}

/// How long state is kept that is not used: for one value, list or map of each key.
///
/// ```
/// use std::time::Duration;
/// use testudo::prelude::*;
///
/// let session = Ttl::processing_time(Duration::from_secs(30 * 60)).renewed_by_reads();
/// let latest = Ttl::event_time(Duration::from_secs(3600));
/// # drop((session, latest));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ttl {
    pub(crate) after_ms: i64,
    pub(crate) clock: Clock,
    pub(crate) is_renewed_by_reads: bool,
}

impl Ttl {
    /// So long after it was last written, by the machine's clock, in whole milliseconds. The time
    /// that passes while the job is stopped counts.
    #[must_use]
    pub fn processing_time(after: Duration) -> Self {
        Self::by(after, Clock::Processing)
    }

    /// So long after it was last written, in event time: once the operator's watermark is so much
    /// later than it was then.
    #[must_use]
    pub fn event_time(after: Duration) -> Self {
        Self::by(after, Clock::Event)
    }

    /// Reading renews it, as writing does.
    #[must_use]
    pub fn renewed_by_reads(self) -> Self {
        Self { is_renewed_by_reads: true, ..self }
    }

    fn by(after: Duration, clock: Clock) -> Self {
        let after_ms = i64::try_from(after.as_millis()).unwrap_or(i64::MAX);
        Self { after_ms, clock, is_renewed_by_reads: false }
    }
}

/// What time it is for an operator's states.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clocks {
    /// The latest watermark before the end of input, milliseconds.
    pub(crate) event: Place<i64>,
}

impl Clocks {
    #[inline]
    pub(crate) fn now(self, txn: &Txn, clock: Clock) -> i64 {
        match clock {
            Clock::Processing => step::ms(),
            Clock::Event => txn.get(self.event),
        }
    }

    /// The watermark has moved.
    #[inline]
    pub(crate) fn advance(self, txn: &mut Txn, watermark: i64) {
        if watermark < i64::MAX && watermark > txn.get(self.event) {
            txn.set(self.event, watermark);
        }
    }
}

/// The expiry of one state of `process`, which its context renews.
#[derive(Debug)]
pub(crate) struct Expires<K: Record> {
    pub(crate) ttl: Ttl,
    pub(crate) expiry: Rc<RefCell<Expiry<K>>>,
}

impl<K: Record> Clone for Expires<K> {
    fn clone(&self) -> Self {
        Self { ttl: self.ttl, expiry: Rc::clone(&self.expiry) }
    }
}

impl<K: Record> Expires<K> {
    /// Writes to a state: what has expired of this key is dropped before, what has of a few others
    /// afterwards.
    pub(crate) fn write<S>(
        &self,
        txn: &mut Txn,
        (hash, key, now): (KeyHash, Item<'_, K>, i64),
        state: &mut S,
        drop: impl Fn(&mut S, &mut Txn, KeyHash, Item<'_, K>) -> Result<(), StateError>,
        write: impl FnOnce(&mut S, &mut Txn) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let mut expiry = self.expiry.borrow_mut();
        if expiry.is_expired(hash, key, now) {
            drop(state, txn, hash, key)?;
        }
        write(state, txn)?;
        expiry.touch(txn, hash, key, now)?;
        expiry.sweep(txn, now, SWEEP_A_WRITE, |txn, hash, key| drop(state, txn, hash, key))?;
        Ok(())
    }
}

/// An operator that keeps one value for each key in a table of its own.
pub trait KeepsValues<T: Record, K: Record> {
    /// The record's key.
    fn key_of(&self, record: &T::View) -> K;

    /// Takes the key's value out.
    ///
    /// # Errors
    /// When the key's group is not held here.
    fn forget(&mut self, txn: &mut Txn, hash: KeyHash, key: Item<'_, K>) -> Result<(), StateError>;

    /// What errors call it.
    fn name(&self) -> &str;
}

impl<T, K, A, U, F, I, G, E, N> KeepsValues<T, K> for Aggregate<T, K, A, U, F, I, G, E, N>
where
    T: Record,
    K: Record,
    A: Record,
    F: Fn(&T::View) -> K,
{
    fn key_of(&self, record: &T::View) -> K {
        (self.keyed.key)(record)
    }

    fn forget(&mut self, txn: &mut Txn, hash: KeyHash, key: Item<'_, K>) -> Result<(), StateError> {
        self.table.remove(txn, hash, key).map(drop)
    }

    fn name(&self) -> &str {
        &self.keyed.name
    }
}

impl<T, K, F, G, N> KeepsValues<T, K> for Reduce<T, K, F, G, N>
where
    T: Record,
    K: Record,
    F: Fn(&T::View) -> K,
{
    fn key_of(&self, record: &T::View) -> K {
        (self.keyed.key)(record)
    }

    fn forget(&mut self, txn: &mut Txn, hash: KeyHash, key: Item<'_, K>) -> Result<(), StateError> {
        self.table.remove(txn, hash, key).map(drop)
    }

    fn name(&self) -> &str {
        &self.keyed.name
    }
}

/// An `aggregate` or `reduce` whose values have a time to live.
pub struct Expiring<K: Record, O> {
    pub(crate) operator: O,
    pub(crate) expiry: Expiry<K>,
    pub(crate) clock: Clock,
    pub(crate) clocks: Clocks,
    pub(crate) scratch: Scratch,
}

impl<K: Record, O> Expiring<K, O> {
    /// Drops what of the record's key has expired, and begins its time anew.
    fn renew<T: Record>(&mut self, cx: &mut Cx, record: &T::View) -> Result<(), StateError>
    where
        O: KeepsValues<T, K>,
    {
        let now = self.clocks.now(&cx.txn, self.clock);
        let key = self.operator.key_of(record);
        let key = key.item(&mut self.scratch);
        let hash = KeyHash::of(key);
        if self.expiry.is_expired(hash, key, now) {
            self.operator.forget(&mut cx.txn, hash, key)?;
        }
        self.expiry.touch(&mut cx.txn, hash, key, now)?;
        self.forget_some::<T>(cx, now, SWEEP_A_WRITE).map(drop)
    }

    fn forget_some<T: Record>(
        &mut self,
        cx: &mut Cx,
        now: i64,
        max: usize,
    ) -> Result<usize, StateError>
    where
        O: KeepsValues<T, K>,
    {
        let operator = &mut self.operator;
        let forget = |txn: &mut Txn, hash, key: Item<'_, K>| operator.forget(txn, hash, key);
        self.expiry.sweep(&mut cx.txn, now, max, forget)
    }

    /// Forgets some keys that have expired; true when there were any.
    fn sweep<T: Record>(&mut self, cx: &mut Cx) -> bool
    where
        O: KeepsValues<T, K>,
    {
        let now = self.clocks.now(&cx.txn, self.clock);
        if !self.expiry.is_due(now) || cx.txn.is_nearly_full() {
            return false;
        }
        match self.forget_some::<T>(cx, now, SWEEP_A_STEP) {
            Ok(looked) => looked > 0,
            Err(error) => {
                cx.fail(Error::job(self.operator.name(), error.to_string()));
                false
            }
        }
    }
}

impl<T: Record, K: Record, O: KeepsValues<T, K> + Push<T>> Push<T> for Expiring<K, O> {
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        match self.renew::<T>(cx, item.view) {
            Ok(()) => self.operator.push(cx, item),
            Err(error) => cx.fail(Error::job(self.operator.name(), error.to_string())),
        }
    }

    fn end_batch(&mut self, cx: &mut Cx) {
        self.operator.end_batch(cx);
    }

    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        self.clocks.advance(&mut cx.txn, watermark);
        self.operator.watermark(cx, watermark);
    }

    fn room(&mut self, cx: &mut Cx) -> usize {
        self.operator.room(cx)
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        self.operator.pump(cx) | self.sweep::<T>(cx)
    }

    fn save(&mut self, cx: &mut Cx) {
        self.operator.save(cx);
    }

    fn end(&mut self, cx: &mut Cx) -> bool {
        self.operator.end(cx)
    }
}
