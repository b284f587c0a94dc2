//! Keyed streams: what can be done once records are routed by key.

use super::chain::{Link, Then};
use super::stream::{Exchanged, Next, Stream};
use super::windowed::{Window, Windowed};
use super::{Flow, chain::Chain, chain::InletChain};
use crate::error::Error;
use crate::exchange::route::ByKey;
use crate::operator::Push;
use crate::operator::aggregate::{Aggregate, KeyedParts, Reduce};
use crate::operator::expire::{Clocks, Expiring, Ttl};
use crate::operator::process::{Declare, Process, ProcessContext};
use crate::plan::{EdgeKind, Grouping, StateSpec};
use crate::worker::attach::Attach;
use std::marker::PhantomData;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::record::{Record, Scratch};
use testudo_state::KeyHash;

/// A user's key function, shared by the router before the exchange and the operator behind it.
pub type KeyFn<F> = Rc<F>;

/// A stream routed by key. All records of a key reach the same subtask, in the order in which each
/// producer sent them.
#[must_use = "a keyed stream does nothing until it is aggregated, reduced, windowed or processed"]
pub struct Keyed<T: Record, K, F> {
    pub(crate) stream: Exchanged<T>,
    pub(crate) key: KeyFn<F>,
    pub(crate) of: PhantomData<fn() -> K>,
}

/// A keyed stream whose state is forgotten when a key was not used for a while: see [`Keyed::ttl`].
#[must_use = "a keyed stream does nothing until it is aggregated, reduced or processed"]
pub struct KeyedTtl<T: Record, K, F> {
    keyed: Keyed<T, K, F>,
    ttl: Ttl,
}

impl<T: Record, K, F> std::fmt::Debug for KeyedTtl<T, K, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyedTtl({:?}, {:?})", self.keyed, self.ttl)
    }
}

impl<T: Record, K, F> std::fmt::Debug for Keyed<T, K, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keyed({:?})", self.stream)
    }
}

impl<T: Record, K: Record, F: Fn(&T::View) -> K + 'static> Keyed<T, K, F> {
    pub(crate) fn new<C: Chain<Out = T>>(stream: Stream<T, C>, key: F) -> Self {
        let key = Rc::new(key);
        let router = Rc::clone(&key);
        let flow = stream.flow.clone();
        let edge = flow.add_edge::<T>(Some(stream.stage), None, EdgeKind::Hash);
        stream.finish(Box::new(move |attach, chain: C| {
            let lane_of_group = attach.lane_of_group(edge);
            let key = move |view: &T::View| router(view);
            let route = ByKey { key, lane_of_group, scratch: Scratch::default(), of: PhantomData };
            let next = attach.outlet::<T, _>(edge, route)?;
            chain.build(attach, next)
        }));
        let again = Rc::clone(&key);
        let hash: super::chain::KeyOf<T> =
            Rc::new(move |view| KeyHash::of(again(view).item(&mut Scratch::default())));
        let stream = super::stream::keyed_inlet_stream(&flow, vec![edge], "keyed", Some(hash));
        Self { stream, key, of: PhantomData }
    }

    /// Keeps an accumulator for each key: `init` makes it, `fold` adds a record, `emit` says what
    /// goes on after each one.
    pub fn aggregate<A, U, I, G, E>(
        self,
        init: I,
        fold: G,
        emit: E,
    ) -> Next<T, InletChain<T>, AggregateLink<K, A, U, F, I, G, E>>
    where
        A: Record,
        U: Record,
        I: Fn() -> A + 'static,
        G: Fn(&mut A, &T::View) + 'static,
        E: Fn(&K::View, &A::View) -> U + 'static,
    {
        let key = self.key;
        let flow = self.stream.flow.clone();
        self.stream.then("aggregate", |operator| {
            declare_state::<K, A>(&flow, operator, Grouping::ByKey);
            AggregateLink { key, init, fold, emit, operator, of: PhantomData }
        })
    }

    /// Combines each record with what came before for its key, and emits the result.
    pub fn reduce<G>(self, combine: G) -> Next<T, InletChain<T>, ReduceLink<K, F, G>>
    where
        G: Fn(&T::View, &T::View) -> T + 'static,
    {
        let key = self.key;
        let flow = self.stream.flow.clone();
        self.stream.then("reduce", |operator| {
            declare_state::<K, T>(&flow, operator, Grouping::ByKey);
            ReduceLink { key, combine, operator, of: PhantomData }
        })
    }

    /// Ends the stream in a closure behind the exchange.
    pub fn for_each<P: Fn(&T::View) + 'static>(self, f: P) {
        self.stream.for_each(f);
    }

    /// The stream as it comes out of the exchange, for operators that need no state.
    pub fn stream(self) -> Exchanged<T> {
        self.stream
    }

    /// Forgets the state of a key `after` it was last written, by the machine's clock: the next
    /// record of that key finds nothing. Expired state is never seen; its memory is given back
    /// piece by piece, and what passes between is bounded by the number of keys in that time.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use testudo::prelude::*;
    /// fn build(flow: &Flow, _options: &NoOptions) {
    ///     flow.source("numbers", Generator::new(1_000, |n| n))
    ///         .key_by(|n| n % 10)
    ///         .ttl(Duration::from_secs(3600))
    ///         .aggregate(|| 0u64, |count, _| *count += 1, |key, count| (*key, *count))
    ///         .for_each(|_| ());
    /// }
    /// ```
    ///
    /// Each state of [`KeyedTtl::process`] has this time to live, unless it is declared with a time
    /// of its own.
    pub fn ttl(self, after: Duration) -> KeyedTtl<T, K, F> {
        KeyedTtl { keyed: self, ttl: Ttl::processing_time(after) }
    }

    /// As [`Keyed::ttl`], in event time: a key's state is forgotten once the watermark is `after`
    /// later than it was when the key was last written. Before the first watermark nothing is, and
    /// at the end of input no more.
    pub fn ttl_event_time(self, after: Duration) -> KeyedTtl<T, K, F> {
        KeyedTtl { keyed: self, ttl: Ttl::event_time(after) }
    }

    /// Full control: `declare` names the states, `on_record` is called for each record and
    /// `on_timer` for each timer that the watermark has passed, with the key's state, timers and
    /// outputs in their context.
    pub fn process<S, U, D, P, Q>(
        self,
        declare: D,
        on_record: P,
        on_timer: Q,
    ) -> Next<T, InletChain<T>, ProcessLink<K, S, U, F, D, P, Q>>
    where
        S: 'static,
        U: Record,
        D: Fn(&mut Declare<'_, K>) -> S + 'static,
        P: Fn(&mut S, &mut ProcessContext<'_, K, U>, &T::View) + 'static,
        Q: Fn(&mut S, &mut ProcessContext<'_, K, U>, i64) + 'static,
    {
        self.process_with(None, declare, on_record, on_timer)
    }

    fn process_with<S, U, D, P, Q>(
        self,
        ttl: Option<Ttl>,
        declare: D,
        on_record: P,
        on_timer: Q,
    ) -> Next<T, InletChain<T>, ProcessLink<K, S, U, F, D, P, Q>>
    where
        S: 'static,
        U: Record,
        D: Fn(&mut Declare<'_, K>) -> S + 'static,
        P: Fn(&mut S, &mut ProcessContext<'_, K, U>, &T::View) + 'static,
        Q: Fn(&mut S, &mut ProcessContext<'_, K, U>, i64) + 'static,
    {
        let key = self.key;
        let flow = self.stream.flow.clone();
        self.stream.then("process", |operator| {
            // What it keeps is declared in the workers, which check each state by its name.
            declare_state::<K, K>(&flow, operator, Grouping::ByKey);
            let declare = Rc::new(declare);
            let again = Rc::clone(&declare);
            let list = Box::new(move || crate::operator::process::declared(&*again, ttl));
            flow.draft.borrow_mut().declared.push((operator, list));
            ProcessLink { key, ttl, declare, on_record, on_timer, operator, of: PhantomData }
        })
    }

    /// Windows by key; `time` gives a record's event time in milliseconds.
    pub fn window<W, G>(self, window: W, time: G) -> Windowed<T, K, F, G>
    where
        W: Into<Window>,
        G: Fn(&T::View) -> i64 + 'static,
    {
        Windowed { keyed: self, window: window.into(), time }
    }
}

impl<T: Record, K: Record, F: Fn(&T::View) -> K + 'static> KeyedTtl<T, K, F> {
    /// See [`Keyed::aggregate`].
    pub fn aggregate<A, U, I, G, E>(
        self,
        init: I,
        fold: G,
        emit: E,
    ) -> Next<T, InletChain<T>, TtlLink<K, AggregateLink<K, A, U, F, I, G, E>>>
    where
        A: Record,
        U: Record,
        I: Fn() -> A + 'static,
        G: Fn(&mut A, &T::View) + 'static,
        E: Fn(&K::View, &A::View) -> U + 'static,
    {
        let values = self.keyed.aggregate(init, fold, emit);
        lasting(values, self.ttl)
    }

    /// See [`Keyed::reduce`].
    pub fn reduce<G>(self, combine: G) -> Next<T, InletChain<T>, TtlLink<K, ReduceLink<K, F, G>>>
    where
        G: Fn(&T::View, &T::View) -> T + 'static,
    {
        let values = self.keyed.reduce(combine);
        lasting(values, self.ttl)
    }

    /// See [`Keyed::process`].
    pub fn process<S, U, D, P, Q>(
        self,
        declare: D,
        on_record: P,
        on_timer: Q,
    ) -> Next<T, InletChain<T>, ProcessLink<K, S, U, F, D, P, Q>>
    where
        S: 'static,
        U: Record,
        D: Fn(&mut Declare<'_, K>) -> S + 'static,
        P: Fn(&mut S, &mut ProcessContext<'_, K, U>, &T::View) + 'static,
        Q: Fn(&mut S, &mut ProcessContext<'_, K, U>, i64) + 'static,
    {
        self.keyed.process_with(Some(self.ttl), declare, on_record, on_timer)
    }
}

/// Gives the values of the stream's last operator a time to live.
fn lasting<T, K, C, L>(stream: Next<T, C, L>, ttl: Ttl) -> Next<T, C, TtlLink<K, L>>
where
    T: Record,
    C: Chain<Out = T>,
    L: Link<T>,
    TtlLink<K, L>: Link<T>,
{
    let Stream { flow, stage, operator, chain: Then { chain, link } } = stream;
    let link = TtlLink { link, ttl, operator, of: PhantomData };
    Stream { flow, stage, operator, chain: Then { chain, link } }
}

/// See [`Keyed::ttl`]: an operator on keyed values, with a time to live.
#[derive(Debug)]
pub struct TtlLink<K, L> {
    link: L,
    ttl: Ttl,
    operator: usize,
    of: PhantomData<fn() -> K>,
}

impl<T, K, A, U, F, I, G, E> Link<T> for TtlLink<K, AggregateLink<K, A, U, F, I, G, E>>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K + 'static,
    I: Fn() -> A + 'static,
    G: Fn(&mut A, &T::View) + 'static,
    E: Fn(&K::View, &A::View) -> U + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = Expiring<K, Aggregate<T, K, A, U, F, I, G, E, N>>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let operator = self.link.link(at, next)?;
        expiring(at, self.operator, self.ttl, operator)
    }
}

impl<T, K, F, G> Link<T> for TtlLink<K, ReduceLink<K, F, G>>
where
    T: Record,
    K: Record,
    F: Fn(&T::View) -> K + 'static,
    G: Fn(&T::View, &T::View) -> T + 'static,
{
    type Out = T;
    type Op<N: Push<T> + 'static> = Expiring<K, Reduce<T, K, F, G, N>>;

    fn link<N: Push<T> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let operator = self.link.link(at, next)?;
        expiring(at, self.operator, self.ttl, operator)
    }
}

/// Puts a time to live on an operator's values.
fn expiring<K: Record, O>(
    at: &mut Attach,
    number: usize,
    ttl: Ttl,
    operator: O,
) -> Result<Expiring<K, O>, Error> {
    let clocks = Clocks { event: at.operator_watermark(number, "latest")? };
    let groups = at.groups(number)?;
    let expiry = groups
        .expiry(&mut at.cx.txn, "values", ttl.after_ms)
        .map_err(|error| Error::job(&at.operator_name(number), error.to_string()))?;
    Ok(Expiring { operator, expiry, clock: ttl.clock, clocks, scratch: Scratch::default() })
}

/// Says that an operator has state, of values `A` by key `K`, so that the plan makes its groups.
pub(crate) fn declare_state<K: Record, A: Record>(
    flow: &Flow,
    operator: usize,
    grouping: Grouping,
) {
    let schema = state_schema::<K, A>();
    let key = (std::any::type_name::<K>(), K::schema());
    let value = (std::any::type_name::<A>(), A::schema());
    let state = StateSpec { grouping, schema, key, value };
    flow.draft.borrow_mut().operators[operator].state = Some(state);
}

/// Of the keys and values of an operator together.
pub(crate) fn state_schema<K: Record, A: Record>() -> u64 {
    testudo_shm::hash::schema("state", &[K::schema(), A::schema()])
}

/// The user's key function behind an exchange.
pub(crate) fn keyed_parts<K: Record, F>(
    at: &Attach,
    operator: usize,
    key: KeyFn<F>,
) -> KeyedParts<K, KeyFn<F>> {
    KeyedParts {
        name: at.operator_name(operator),
        key,
        scratch: Scratch::default(),
        of: PhantomData,
    }
}

/// See [`Keyed::aggregate`].
#[derive(Debug)]
pub struct AggregateLink<K, A, U, F, I, G, E> {
    key: KeyFn<F>,
    init: I,
    fold: G,
    emit: E,
    operator: usize,
    of: PhantomData<fn() -> (K, A, U)>,
}

impl<T, K, A, U, F, I, G, E> Link<T> for AggregateLink<K, A, U, F, I, G, E>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K + 'static,
    I: Fn() -> A + 'static,
    G: Fn(&mut A, &T::View) + 'static,
    E: Fn(&K::View, &A::View) -> U + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = Aggregate<T, K, A, U, F, I, G, E, N>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let keyed = keyed_parts(at, self.operator, self.key);
        let table = at.table(self.operator, "values")?;
        let (init, fold, emit) = (self.init, self.fold, self.emit);
        let ahead = Default::default();
        Ok(Aggregate { keyed, table, init, fold, emit, ahead, next, of: PhantomData })
    }
}

/// See [`Keyed::reduce`].
#[derive(Debug)]
pub struct ReduceLink<K, F, G> {
    key: KeyFn<F>,
    combine: G,
    operator: usize,
    of: PhantomData<fn() -> K>,
}

impl<T, K, F, G> Link<T> for ReduceLink<K, F, G>
where
    T: Record,
    K: Record,
    F: Fn(&T::View) -> K + 'static,
    G: Fn(&T::View, &T::View) -> T + 'static,
{
    type Out = T;
    type Op<N: Push<T> + 'static> = Reduce<T, K, F, G, N>;

    fn link<N: Push<T> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let keyed = keyed_parts(at, self.operator, self.key);
        let table = at.table(self.operator, "values")?;
        Ok(Reduce { keyed, table, combine: self.combine, next })
    }
}

/// See [`Keyed::process`].
#[derive(Debug)]
pub struct ProcessLink<K, S, U, F, D, P, Q> {
    key: KeyFn<F>,
    ttl: Option<Ttl>,
    declare: Rc<D>,
    on_record: P,
    on_timer: Q,
    operator: usize,
    of: PhantomData<fn() -> (K, S, U)>,
}

impl<T, K, S, U, F, D, P, Q> Link<T> for ProcessLink<K, S, U, F, D, P, Q>
where
    T: Record,
    K: Record,
    S: 'static,
    U: Record,
    F: Fn(&T::View) -> K + 'static,
    D: Fn(&mut Declare<'_, K>) -> S + 'static,
    P: Fn(&mut S, &mut ProcessContext<'_, K, U>, &T::View) + 'static,
    Q: Fn(&mut S, &mut ProcessContext<'_, K, U>, i64) + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = Process<T, K, S, U, F, P, Q, N>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let keyed = keyed_parts(at, self.operator, self.key);
        let fns = (self.on_record, self.on_timer);
        Process::open(at, self.operator, keyed, (&*self.declare, self.ttl), fns, next)
    }
}
