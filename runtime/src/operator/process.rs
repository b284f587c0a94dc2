//! The keyed process operator: user code with declared state, event-time timers and any number of
//! outputs.
//!
//! Invariants: all state goes through the transaction; a timer fires once the watermark has reached
//! its time, in time order, and only as many at once as the operators behind have room for; the
//! watermark is handed on when no timer at or before it is left.
//!
//! Called through [`Push`], always right behind a hash exchange.

use super::aggregate::KeyedParts;
use super::expire::{Clocks, Expires, Ttl};
use super::migrate::{Migrating, Mover};
use super::{Push, hand_on};
use crate::error::Error;
use crate::plan::described::{Declared, Type};
use crate::worker::attach::{Attach, attach_private};
use crate::worker::context::Cx;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::rc::Rc;
use testudo_shm::record::{Batch, Item, Record, Scratch};
use testudo_shm::txn::{Place, Txn};
use testudo_state::{DueTimer, Groups, KeyHash, List, Map, StateError, Timers, Value};

/// Where an operator declares its states, each by a name of its own.
#[derive(Debug)]
pub struct Declare<'a, K> {
    groups: &'a Groups,
    txn: &'a mut Txn,
    error: &'a mut Option<StateError>,
    /// Time to live of what is declared next.
    ttl: Option<Ttl>,
    /// Whether anything has one.
    any_ttl: &'a mut bool,
    /// Where they are written down, when they are only listed.
    listed: Option<&'a mut Vec<(String, Type)>>,
    /// Where it is written down how they are migrated, when none is opened yet.
    moving: Option<&'a mut Vec<Mover>>,
    of: PhantomData<fn() -> K>,
}

/// A declared state; `None` only when it could not be opened, which ends the job before any record
/// is processed.
type Opened<S> = Option<S>;

/// One value for each key.
#[derive(Debug)]
pub struct ValueState<K: Record, V: Record>(Opened<Value<K, V>>, Option<Expires<K>>);

/// A list for each key.
#[derive(Debug)]
pub struct ListState<K: Record, T: Record>(Opened<List<K, T>>, Option<Expires<K>>);

/// A map for each key.
#[derive(Debug)]
pub struct MapState<K: Record, UK: Record, UV: Record>(Opened<Map<K, UK, UV>>, Option<Expires<K>>);

impl<'a, K: Record> Declare<'a, K> {
    fn keep<S>(&mut self, opened: Result<S, StateError>) -> Opened<S> {
        match opened {
            Ok(state) => Some(state),
            Err(error) => {
                self.error.get_or_insert(error);
                None
            }
        }
    }

    /// The states that are declared with what this returns have a time to live of their own:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use testudo::prelude::*;
    /// fn build(flow: &Flow, _options: &NoOptions) {
    ///     flow.source("numbers", Generator::new(1_000, |n| n))
    ///         .key_by(|n| n % 10)
    ///         .process(
    ///             |state| state.ttl(Ttl::processing_time(Duration::from_secs(60))).value("last"),
    ///             |last, cx, n: &u64| {
    ///                 if cx.get(last).is_none() {
    ///                     cx.emit(*n); // the first in a minute
    ///                 }
    ///                 cx.set(last, n);
    ///             },
    ///             |_, _, _| (),
    ///         )
    ///         .for_each(|_| ());
    /// }
    /// ```
    ///
    /// What a key has in a state expires as a whole: a list with all its items, a map with all its
    /// entries; any write renews it, but for removing an entry of a map. Expired, it is as if it
    /// was never there; its memory is given back by later writes to the same state, a few keys
    /// each. A state must keep its kind when a job is resumed: with a time to live, or without.
    pub fn ttl(&mut self, ttl: Ttl) -> Declare<'_, K> {
        Declare {
            groups: self.groups,
            txn: self.txn,
            error: self.error,
            ttl: Some(ttl),
            any_ttl: self.any_ttl,
            listed: self.listed.as_deref_mut(),
            moving: self.moving.as_deref_mut(),
            of: PhantomData,
        }
    }

    /// The state that is declared with what this returns may have values of the type `Old`, from a
    /// program before this one: `f` makes a new one from each of them.
    ///
    /// ```
    /// # use testudo::prelude::*;
    /// /// What used to be the count alone.
    /// #[testudo::record]
    /// struct Seen {
    ///     count: u64,
    ///     largest: u64,
    /// }
    ///
    /// fn build(flow: &Flow, _options: &NoOptions) {
    ///     flow.source("numbers", Generator::new(1_000, |n| n))
    ///         .key_by(|n| n % 10)
    ///         .process(
    ///             |state| {
    ///                 state
    ///                     .migrate_from::<u64, _>(|count| Seen { count: *count, largest: 0 })
    ///                     .value("seen")
    ///             },
    ///             |seen, cx, n: &u64| {
    ///                 let (count, largest) =
    ///                     cx.get(seen).map_or((0, 0), |seen| (seen.count, seen.largest));
    ///                 cx.set(seen, &Seen { count: count + 1, largest: largest.max(*n) });
    ///                 cx.emit(count + 1);
    ///             },
    ///             |_, _, _| (),
    ///         )
    ///         .for_each(|_| ());
    /// }
    /// ```
    ///
    /// `testudo update` gives a running job such a program, and a checkpoint of the program before
    /// can be resumed by it. All values of a worker are migrated before it takes its next record;
    /// keys, timers and times to live stay. The state keeps its name and kind (a value, a list, a
    /// map), and one type is migrated from at a time. Once no checkpoint that is still of use has
    /// the old type, the declaration can go.
    pub fn migrate_from<Old: Record, New: Record>(
        &mut self,
        f: impl Fn(&Old::View) -> New + 'static,
    ) -> Migrating<'_, 'a, K, Old, New, impl Fn(&Old::View) -> New + 'static> {
        Migrating::new(self, f)
    }

    /// Writes down how a state is migrated, when that is what is asked for.
    pub(crate) fn moves(&mut self, mover: impl FnOnce(&Self) -> Mover) {
        if self.moving.is_some() {
            let mover = mover(self);
            self.moving.iter_mut().for_each(|moving| moving.push(mover.clone()));
        }
    }

    /// What a state of these types is called where programs are compared.
    pub(crate) fn listed<S>(&self, kind: &str, schemas: &[u64]) -> Type {
        let is_expiring = self.ttl.is_some();
        let schema = testudo_shm::hash::schema(kind, schemas) ^ u64::from(is_expiring);
        let ttl = if is_expiring { " with a time to live" } else { "" };
        let name_of = crate::flow::short_name::<S>();
        Type { name: format!("{kind} of {name_of}{ttl}"), schema }
    }

    fn list_as<S>(&mut self, name: &str, kind: &str, schemas: &[u64]) {
        let listed = self.listed.is_some().then(|| self.listed::<S>(kind, schemas));
        if let (Some(list), Some(listed)) = (&mut self.listed, listed) {
            list.push((name.into(), listed));
        }
    }

    fn expires(&mut self, name: &str) -> Option<Expires<K>> {
        let ttl = self.ttl?;
        *self.any_ttl = true;
        let expiry = self.groups.expiry(self.txn, name, ttl.after_ms);
        let expiry = Rc::new(RefCell::new(self.keep(expiry)?));
        Some(Expires { ttl, expiry })
    }

    /// One value for each key.
    pub fn value<V: Record>(&mut self, name: &str) -> ValueState<K, V> {
        self.list_as::<V>(name, "value", &[V::schema()]);
        if self.moving.is_some() {
            return ValueState(None, None);
        }
        let opened = self.groups.value(self.txn, name);
        ValueState(self.keep(opened), self.expires(name))
    }

    /// A list for each key.
    pub fn list<T: Record>(&mut self, name: &str) -> ListState<K, T> {
        self.list_as::<T>(name, "list", &[T::schema()]);
        if self.moving.is_some() {
            return ListState(None, None);
        }
        let opened = self.groups.list(self.txn, name);
        ListState(self.keep(opened), self.expires(name))
    }

    /// A map for each key.
    pub fn map<UK: Record, UV: Record>(&mut self, name: &str) -> MapState<K, UK, UV> {
        self.list_as::<(UK, UV)>(name, "map", &[UK::schema(), UV::schema()]);
        if self.moving.is_some() {
            return MapState(None, None);
        }
        let opened = self.groups.map(self.txn, name);
        MapState(self.keep(opened), self.expires(name))
    }
}

/// The states that an operator declares, found out in memory of this process alone.
pub(crate) fn declared<K: Record, S>(
    declare: &impl Fn(&mut Declare<'_, K>) -> S,
    ttl: Option<Ttl>,
) -> Declared {
    const LOG_WORDS: usize = 16 << 10;
    const GROUP_BYTES: usize = 1 << 20;
    let mut memory = vec![0u64; LOG_WORDS + GROUP_BYTES / 8];
    let mut txn = Txn::on_heap(&mut memory, LOG_WORDS);
    let groups = Groups::new("declared", 1, 0, Rc::new(testudo_state::Gauge::unlimited()));
    let mut listed = Vec::new();
    let moved = movers(declare, (&groups, &mut txn), ttl);
    // States that do not fit here say so where they are used.
    if attach_private(&groups, &mut txn, LOG_WORDS * 8, GROUP_BYTES).is_ok() {
        declare(&mut Declare {
            groups: &groups,
            txn: &mut txn,
            error: &mut None,
            ttl,
            any_ttl: &mut false,
            listed: Some(&mut listed),
            moving: None,
            of: PhantomData,
        });
    }
    let migrates = moved.into_iter().map(|mover| (mover.state, mover.from)).collect();
    Declared { states: listed, migrates }
}

/// How the states that an operator declares are migrated. None of them is opened.
pub(crate) fn movers<K: Record, S>(
    declare: &impl Fn(&mut Declare<'_, K>) -> S,
    (groups, txn): (&Groups, &mut Txn),
    ttl: Option<Ttl>,
) -> Vec<Mover> {
    let mut movers = Vec::new();
    declare(&mut Declare {
        groups,
        txn,
        error: &mut None,
        ttl,
        any_ttl: &mut false,
        listed: None,
        moving: Some(&mut movers),
        of: PhantomData,
    });
    movers
}

/// The last time a timer can have: `i64::MAX` itself stands for "no timer" in state.
pub const LAST_TIME: i64 = i64::MAX - 1;

/// What user code sees besides the record: the key, its state and timers, the time, the output.
pub struct ProcessContext<'a, K: Record, U> {
    cx: &'a mut Cx,
    name: &'a str,
    hash: KeyHash,
    key: Item<'a, K>,
    timers: &'a mut Timers<K>,
    out: &'a mut Vec<U>,
    watermark: i64,
    clocks: Clocks,
    /// What was read and is renewed by that, with the time.
    reads: &'a RefCell<Vec<(Expires<K>, i64)>>,
}

impl<K: Record, U> std::fmt::Debug for ProcessContext<'_, K, U> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ProcessContext({}, watermark {})", self.name, self.watermark)
    }
}

impl<K: Record, U: Record> ProcessContext<'_, K, U> {
    /// The record's (or timer's) key.
    #[must_use]
    pub fn key(&self) -> &K::View {
        self.key.view
    }

    /// The operator's watermark, milliseconds; `i64::MIN` before the first.
    #[must_use]
    pub fn watermark(&self) -> i64 {
        self.watermark
    }

    /// Emits a record.
    pub fn emit(&mut self, value: U) {
        self.out.push(value);
    }

    fn check<R>(&mut self, done: Result<R, StateError>) -> Option<R> {
        done.map_err(|error| self.cx.fail(Error::job(self.name, error.to_string()))).ok()
    }

    /// Whether what the key has in a state has not expired; renews it where reads do.
    #[inline]
    fn is_alive(&self, expires: Option<&Expires<K>>) -> bool {
        expires.is_none_or(|expires| self.is_alive_now(expires))
    }

    fn is_alive_now(&self, expires: &Expires<K>) -> bool {
        let now = self.clocks.now(&self.cx.txn, expires.ttl.clock);
        let expiry = expires.expiry.borrow();
        let is_expired = expiry.is_expired(self.hash, self.key, now);
        if !is_expired && expires.ttl.is_renewed_by_reads && expiry.contains(self.hash, self.key) {
            self.reads.borrow_mut().push((expires.clone(), now));
        }
        !is_expired
    }

    /// Renews what user code has read, unless it was forgotten since.
    #[inline]
    fn renew(self) {
        for (expires, now) in self.reads.borrow_mut().drain(..) {
            let mut expiry = expires.expiry.borrow_mut();
            let is_kept = expiry.contains(self.hash, self.key);
            let done = if is_kept {
                expiry.touch(&mut self.cx.txn, self.hash, self.key, now)
            } else {
                Ok(())
            };
            if let Err(error) = done {
                self.cx.fail(Error::job(self.name, error.to_string()));
            }
        }
    }

    /// Writes to a state.
    #[inline]
    fn write<S>(
        &mut self,
        (state, expires): (&mut Opened<S>, Option<&Expires<K>>),
        drop: impl Fn(&mut S, &mut Txn, KeyHash, Item<'_, K>) -> Result<(), StateError>,
        write: impl FnOnce(&mut S, &mut Txn, KeyHash, Item<'_, K>) -> Result<(), StateError>,
    ) {
        let Some(state) = state else { return };
        let (hash, key, txn) = (self.hash, self.key, &mut self.cx.txn);
        let done = match expires {
            None => write(state, txn, hash, key),
            Some(expires) => {
                let now = self.clocks.now(txn, expires.ttl.clock);
                expires.write(txn, (hash, key, now), state, drop, |state, txn| {
                    write(state, txn, hash, key)
                })
            }
        };
        self.check(done);
    }

    /// Forgets what the key has in a state.
    fn forget<S>(
        &mut self,
        (state, expires): (&mut Opened<S>, Option<&Expires<K>>),
        drop: impl Fn(&mut S, &mut Txn, KeyHash, Item<'_, K>) -> Result<(), StateError>,
    ) {
        let Some(state) = state else { return };
        let (hash, key, txn) = (self.hash, self.key, &mut self.cx.txn);
        let done = drop(state, txn, hash, key).and_then(|()| {
            let expiry = expires.map(|expires| expires.expiry.borrow_mut());
            expiry.map_or(Ok(()), |mut expiry| expiry.forget(txn, hash, key))
        });
        self.check(done);
    }

    /// The key's value.
    #[must_use]
    pub fn get<'s, V: Record>(&self, state: &'s ValueState<K, V>) -> Option<&'s V::View> {
        let found = state.0.as_ref()?.get(self.hash, self.key)?;
        self.is_alive(state.1.as_ref()).then_some(found.view)
    }

    /// Sets the key's value.
    pub fn set<V: Record>(&mut self, state: &mut ValueState<K, V>, value: &V) {
        let ValueState(opened, expires) = state;
        self.write((opened, expires.as_ref()), drop_value, |state, txn, hash, key| {
            state.set(txn, hash, key, value).map(drop)
        });
    }

    /// Forgets the key's value.
    pub fn clear<V: Record>(&mut self, state: &mut ValueState<K, V>) {
        self.forget((&mut state.0, state.1.as_ref()), drop_value);
    }

    /// Appends to the key's list.
    pub fn append<T: Record>(&mut self, state: &mut ListState<K, T>, item: &T) {
        let ListState(opened, expires) = state;
        self.write((opened, expires.as_ref()), drop_list, |state, txn, hash, key| {
            state.append(txn, hash, key, item)
        });
    }

    /// The key's list, oldest first.
    pub fn items<'s, T: Record>(
        &self,
        state: &'s ListState<K, T>,
    ) -> impl Iterator<Item = &'s T::View> + use<'s, K, U, T> {
        let alive = state.0.as_ref().filter(|_| self.is_alive(state.1.as_ref()));
        let items = alive.map(|state| state.iter(self.hash, self.key));
        items.into_iter().flatten().map(|item| item.view)
    }

    /// Forgets the key's list.
    pub fn clear_list<T: Record>(&mut self, state: &mut ListState<K, T>) {
        self.forget((&mut state.0, state.1.as_ref()), drop_list);
    }

    /// An entry of the key's map.
    #[must_use]
    pub fn map_get<'s, UK: Record, UV: Record>(
        &self,
        state: &'s MapState<K, UK, UV>,
        user_key: &UK,
    ) -> Option<&'s UV::View> {
        let mut scratch = Scratch::default();
        let user_key = user_key.item(&mut scratch);
        let found = state.0.as_ref()?.get(self.hash, self.key, user_key)?;
        self.is_alive(state.1.as_ref()).then_some(found.view)
    }

    /// Puts an entry into the key's map.
    pub fn map_put<UK: Record, UV: Record>(
        &mut self,
        state: &mut MapState<K, UK, UV>,
        user_key: &UK,
        value: &UV,
    ) {
        let MapState(opened, expires) = state;
        self.write((opened, expires.as_ref()), drop_map, |state, txn, hash, key| {
            let mut scratch = Scratch::default();
            state.put(txn, hash, key, user_key.item(&mut scratch), value).map(drop)
        });
    }

    /// Removes an entry of the key's map.
    pub fn map_remove<UK: Record, UV: Record>(
        &mut self,
        state: &mut MapState<K, UK, UV>,
        user_key: &UK,
    ) {
        if let Some(state) = &mut state.0 {
            let mut scratch = Scratch::default();
            let user_key = user_key.item(&mut scratch);
            let done = state.remove(&mut self.cx.txn, self.hash, self.key, user_key);
            self.check(done);
        }
    }

    /// The entries of the key's map, in no order.
    pub fn map_iter<'s, UK: Record, UV: Record>(
        &self,
        state: &'s MapState<K, UK, UV>,
    ) -> impl Iterator<Item = (&'s UK::View, &'s UV::View)> + use<'s, K, U, UK, UV> {
        let alive = state.0.as_ref().filter(|_| self.is_alive(state.1.as_ref()));
        let items = alive.map(|state| state.iter(self.hash, self.key));
        items.into_iter().flatten().map(|(key, value)| (key.view, value.view))
    }

    /// Sets a timer for the key: `on_timer` is called with this time once the watermark has reached
    /// it. The same time twice is one timer. [`LAST_TIME`] and anything later fires at the end of
    /// input, with that time.
    pub fn set_timer(&mut self, time: i64) {
        let time = time.min(LAST_TIME);
        let done = self.timers.register(&mut self.cx.txn, self.hash, self.key, time);
        self.check(done);
    }

    /// Takes a timer back.
    pub fn delete_timer(&mut self, time: i64) {
        let time = time.min(LAST_TIME);
        let done = self.timers.delete(&mut self.cx.txn, self.hash, self.key, time);
        self.check(done);
    }
}

fn drop_value<K: Record, V: Record>(
    state: &mut Value<K, V>,
    txn: &mut Txn,
    hash: KeyHash,
    key: Item<'_, K>,
) -> Result<(), StateError> {
    state.clear(txn, hash, key).map(drop)
}

fn drop_list<K: Record, T: Record>(
    state: &mut List<K, T>,
    txn: &mut Txn,
    hash: KeyHash,
    key: Item<'_, K>,
) -> Result<(), StateError> {
    state.clear(txn, hash, key).map(drop)
}

fn drop_map<K: Record, UK: Record, UV: Record>(
    state: &mut Map<K, UK, UV>,
    txn: &mut Txn,
    hash: KeyHash,
    key: Item<'_, K>,
) -> Result<(), StateError> {
    state.clear(txn, hash, key).map(drop)
}

/// The operator.
pub struct Process<T: Record, K: Record, S, U, F, P, Q, N> {
    keyed: KeyedParts<K, Rc<F>>,
    state: S,
    timers: Timers<K>,
    due: DueTimer<K>,
    on_record: P,
    on_timer: Q,
    out: Vec<U>,
    watermark: Place<i64>,
    passed: Place<i64>,
    clocks: Clocks,
    /// Some state has a time to live.
    any_ttl: bool,
    reads: RefCell<Vec<(Expires<K>, i64)>>,
    next: N,
    of: PhantomData<fn(T)>,
}

impl<T, K, S, U, F, P, Q, N> Process<T, K, S, U, F, P, Q, N>
where
    T: Record,
    K: Record,
    U: Record,
    F: Fn(&T::View) -> K,
    P: Fn(&mut S, &mut ProcessContext<'_, K, U>, &T::View),
    Q: Fn(&mut S, &mut ProcessContext<'_, K, U>, i64),
    N: Push<U>,
{
    pub(crate) fn open(
        at: &mut Attach,
        operator: usize,
        keyed: KeyedParts<K, Rc<F>>,
        (declare, ttl): (&impl Fn(&mut Declare<'_, K>) -> S, Option<Ttl>),
        (on_record, on_timer): (P, Q),
        next: N,
    ) -> Result<Self, Error> {
        let groups = at.groups(operator)?;
        let movers = movers(declare, (&groups, &mut at.cx.txn), ttl);
        at.migrate(operator, &groups, &movers)?;
        let clocks = Clocks { event: at.operator_watermark(operator, "latest")? };
        let failed = |error: StateError| Error::job(&keyed.name, error.to_string());
        let (mut error, mut any_ttl) = (None, false);
        let state = declare(&mut Declare {
            groups: &groups,
            txn: &mut at.cx.txn,
            error: &mut error,
            ttl,
            any_ttl: &mut any_ttl,
            listed: None,
            moving: None,
            of: PhantomData,
        });
        if let Some(error) = error {
            return Err(at.unopened(operator, &error));
        }
        let timers = groups.timers(&mut at.cx.txn, "timers").map_err(failed)?;
        let watermark = at.operator_watermark(operator, "watermark")?;
        let passed = at.operator_watermark(operator, "passed")?;
        let (out, due) = (Vec::new(), DueTimer::default());
        let of = PhantomData;
        Ok(Self {
            keyed,
            state,
            timers,
            due,
            on_record,
            on_timer,
            out,
            watermark,
            passed,
            clocks,
            any_ttl,
            reads: RefCell::default(),
            next,
            of,
        })
    }

    #[inline]
    fn apply(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        let key = (self.keyed.key)(item.view);
        let key = key.item(&mut self.keyed.scratch);
        let watermark = cx.txn.get(self.watermark);
        let mut context = ProcessContext {
            cx,
            name: &self.keyed.name,
            hash: KeyHash::of(key),
            key,
            timers: &mut self.timers,
            out: &mut self.out,
            watermark,
            clocks: self.clocks,
            reads: &self.reads,
        };
        (self.on_record)(&mut self.state, &mut context, item.view);
        context.renew();
        self.hand_on(cx);
    }

    fn hand_on(&mut self, cx: &mut Cx) {
        for value in self.out.drain(..) {
            self.next.push_value(cx, &value);
        }
    }

    fn is_pending(&self, cx: &Cx) -> bool {
        cx.txn.get(self.passed) < cx.txn.get(self.watermark)
    }

    /// Fires timers while there is room, then hands the watermark on; true when something was done.
    fn fire(&mut self, cx: &mut Cx) -> bool {
        if !self.is_pending(cx) {
            return false;
        }
        let watermark = cx.txn.get(self.watermark);
        let mut left = self.next.room(cx);
        let mut any = false;
        while left > 0 && !cx.txn.is_nearly_full() && cx.failure.is_none() {
            match self.timers.pop(&mut cx.txn, watermark, &mut self.due) {
                Ok(true) => self.fire_one(cx, watermark),
                Ok(false) => {
                    self.next.end_batch(cx);
                    cx.txn.set(self.passed, watermark);
                    self.next.watermark(cx, watermark);
                    return true;
                }
                Err(error) => self.keyed.fail(cx, &error),
            }
            any = true;
            left -= 1;
        }
        self.next.end_batch(cx);
        any
    }

    fn fire_one(&mut self, cx: &mut Cx, watermark: i64) {
        let mut context = ProcessContext {
            cx,
            name: &self.keyed.name,
            hash: self.due.hash(),
            key: self.due.key(),
            timers: &mut self.timers,
            out: &mut self.out,
            watermark,
            clocks: self.clocks,
            reads: &self.reads,
        };
        (self.on_timer)(&mut self.state, &mut context, self.due.time());
        context.renew();
        self.hand_on(cx);
    }
}

impl<T, K, S, U, F, P, Q, N> Push<T> for Process<T, K, S, U, F, P, Q, N>
where
    T: Record,
    K: Record,
    U: Record,
    F: Fn(&T::View) -> K,
    P: Fn(&mut S, &mut ProcessContext<'_, K, U>, &T::View),
    Q: Fn(&mut S, &mut ProcessContext<'_, K, U>, i64),
    N: Push<U>,
{
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        self.apply(cx, item);
    }

    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        for item in batch {
            self.apply(cx, item);
        }
    }

    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        if watermark > cx.txn.get(self.watermark) {
            cx.txn.set(self.watermark, watermark);
            if self.any_ttl {
                self.clocks.advance(&mut cx.txn, watermark);
            }
            self.fire(cx);
        }
    }

    fn room(&mut self, cx: &mut Cx) -> usize {
        if self.is_pending(cx) { 0 } else { self.next.room(cx) }
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        self.next.pump(cx) | self.fire(cx)
    }

    fn end(&mut self, cx: &mut Cx) -> bool {
        !self.is_pending(cx) && self.next.end(cx)
    }

    hand_on!(end_batch, save);
}
