//! Streams: the operators on single records, the exchanges, and the ends.

use super::chain::{Chain, InletChain, KeyOf, Link, Then};
use super::keyed::Keyed;
use super::windowed::{Window, WindowedAll};
use super::{Factory, Flow};
use crate::config::Tier;
use crate::error::Error;
use crate::exchange::route::{Everyone, Only, RoundRobin, Route};
use crate::operator::Push;
use crate::operator::count::Count;
use crate::operator::stateless::{Emit, EventTime, Filter, FlatMap, Map, Split, TryMap};
use crate::plan::{CounterKind, EdgeKind};
use crate::sink::file::{FileSink, Lines};
use crate::sink::{ForEach, Prepared, Sink, SinkEnd, SinkHooks, Writer};
use crate::worker::attach::Attach;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::rc::Rc;
use std::time::Duration;
use testudo_shm::record::Record;

/// Records of one type, in flight. Each operator takes the stream and gives a new one.
#[must_use = "a stream that goes nowhere is an error: end it with sink, for_each or print"]
pub struct Stream<T: Record, C: Chain<Out = T>> {
    pub(crate) flow: Flow,
    pub(crate) stage: usize,
    pub(crate) operator: usize,
    pub(crate) chain: C,
}

impl<T: Record, C: Chain<Out = T>> std::fmt::Debug for Stream<T, C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream(stage {}, operator {})", self.stage, self.operator)
    }
}

/// A stream right behind an exchange.
pub type Exchanged<T> = Stream<T, InletChain<T>>;

/// A stream with one more operator.
pub type Next<T, C, L> = Stream<<L as Link<T>>::Out, Then<C, L>>;

impl<T: Record, C: Chain<Out = T>> Stream<T, C> {
    pub(crate) fn new(flow: &Flow, stage: usize, operator: usize, chain: C) -> Self {
        Self { flow: flow.clone(), stage, operator, chain }
    }

    /// Names the operator before this point: in the plan, in reports and in errors.
    pub fn name(self, name: &str) -> Self {
        self.flow.draft.borrow_mut().operators[self.operator].name = name.into();
        self
    }

    /// Gives the operator before this point a stable identity: its state is found by it, whatever
    /// its name or place.
    pub fn uid(self, uid: &str) -> Self {
        self.flow.draft.borrow_mut().operators[self.operator].uid = Some(uid.into());
        self
    }

    /// Sets how many subtasks the stage of this stream has: everything from the exchange (or
    /// source) before it to the next one. Default: one for each worker.
    pub fn parallelism(self, subtasks: usize) -> Self {
        self.flow.draft.borrow_mut().stages[self.stage].parallelism = Some(subtasks);
        self
    }

    /// Gives the stage of this stream worker processes of its own, so that what crashes in it takes
    /// nothing else down.
    pub fn isolated(self) -> Self {
        self.flow.draft.borrow_mut().stages[self.stage].isolated = true;
        self
    }

    /// Says what takes over when a worker process of this stage dies; the stage must be
    /// [isolated](Self::isolated). Default: what the job says (`--tier`).
    pub fn tier(self, tier: Tier) -> Self {
        self.flow.draft.borrow_mut().stages[self.stage].tier = Some(tier);
        self
    }

    pub(crate) fn then<L: Link<T>>(
        self,
        kind: &'static str,
        link: impl FnOnce(usize) -> L,
    ) -> Next<T, C, L> {
        let operator = self.flow.add_operator(self.stage, kind, kind);
        let chain = Then { chain: self.chain, link: link(operator) };
        Stream { flow: self.flow, stage: self.stage, operator, chain }
    }

    /// Turns each record into another one.
    pub fn map<U: Record, F: Fn(&T::View) -> U + 'static>(self, f: F) -> Next<T, C, MapLink<U, F>> {
        self.then("map", |_| MapLink { f, of: PhantomData })
    }

    /// Keeps the records for which `f` is true.
    pub fn filter<F: Fn(&T::View) -> bool + 'static>(self, f: F) -> Next<T, C, FilterLink<F>> {
        self.then("filter", |_| FilterLink { f })
    }

    /// Turns each record into any number of others.
    pub fn flat_map<U, I, F>(self, f: F) -> Next<T, C, FlatMapLink<U, I, F>>
    where
        U: Record,
        I: IntoIterator<Item = U> + 'static,
        F: Fn(&T::View) -> I + 'static,
    {
        self.then("flat_map", |_| FlatMapLink { f, of: PhantomData })
    }

    /// Turns each record into another one, or refuses it: what is refused is counted and leaves by
    /// the second stream.
    pub fn try_map<U, S, F>(self, f: F) -> (Next<T, C, TryMapLink<U, S, F>>, Exchanged<S>)
    where
        U: Record,
        S: Record,
        F: Fn(&T::View) -> Result<U, S> + 'static,
    {
        let (flow, stage) = (self.flow.clone(), self.stage);
        let edge = flow.add_edge::<S>(Some(stage), None, EdgeKind::Forward);
        let main =
            self.then("try_map", |operator| TryMapLink { f, edge, operator, of: PhantomData });
        let side = inlet_stream(&flow, vec![edge], "rejected");
        (main, side)
    }

    /// A flat map with a side output: the closure emits into either, any number of records.
    pub fn split<U, S, F>(self, f: F) -> (Next<T, C, SplitLink<U, S, F>>, Exchanged<S>)
    where
        U: Record,
        S: Record,
        F: Fn(&T::View, &mut Emit<'_, U>, &mut Emit<'_, S>) + 'static,
    {
        let (flow, stage) = (self.flow.clone(), self.stage);
        let edge = flow.add_edge::<S>(Some(stage), None, EdgeKind::Forward);
        let main = self.then("split", |_| SplitLink { f, edge, of: PhantomData });
        let side = inlet_stream(&flow, vec![edge], "side");
        (main, side)
    }

    /// Derives event time from the records: `time` gives each one's time in milliseconds, and no
    /// record comes more than `bound` after one that is later. (The watermark is the latest time
    /// seen, less the bound.)
    pub fn event_time<F>(self, bound: Duration, time: F) -> Next<T, C, EventTimeLink<F>>
    where
        F: Fn(&T::View) -> i64 + 'static,
    {
        let bound = i64::try_from(bound.as_millis()).unwrap_or(i64::MAX);
        self.then("event_time", |operator| EventTimeLink { time, bound, operator })
    }

    /// Routes by key: all records of a key go to the same subtask, in the order in which each
    /// producer sent them.
    pub fn key_by<K: Record, F: Fn(&T::View) -> K + 'static>(self, key: F) -> Keyed<T, K, F> {
        Keyed::new(self, key)
    }

    /// Spreads records evenly over the next stage's subtasks.
    pub fn round_robin(self) -> Exchanged<T> {
        self.exchange(EdgeKind::RoundRobin, |lanes| RoundRobin { lanes, next: 0 })
    }

    /// Sends every record to all subtasks of the next stage.
    pub fn broadcast(self) -> Exchanged<T> {
        self.exchange(EdgeKind::Broadcast, |_| Everyone)
    }

    /// Sends every record to the first subtask of a stage with parallelism 1.
    pub fn gather(self) -> Exchanged<T> {
        let next = self.exchange(EdgeKind::Gather, |_| Only);
        next.parallelism(1)
    }

    /// Puts two streams of the same type together. The watermark is the lower of the two.
    pub fn union<D: Chain<Out = T>>(self, other: Stream<T, D>) -> Exchanged<T> {
        let flow = self.flow.clone();
        let edges = vec![self.forward_edge(), other.forward_edge()];
        inlet_stream(&flow, edges, "union")
    }

    /// Gives the stream to several consumers: each `branches` call gets its own copy of every
    /// record.
    pub fn fork(self) -> (Exchanged<T>, Exchanged<T>) {
        let flow = self.flow.clone();
        let stage = self.stage;
        let left = flow.add_edge::<T>(Some(stage), None, EdgeKind::Forward);
        let right = flow.add_edge::<T>(Some(stage), None, EdgeKind::Forward);
        self.finish(Box::new(move |attach, chain: C| {
            let next = attach.outlet::<T, _>(left, Only)?;
            let side = attach.outlet::<T, _>(right, Only)?;
            chain.build(attach, crate::operator::fork::Fork { next, side })
        }));
        (inlet_stream(&flow, vec![left], "left"), inlet_stream(&flow, vec![right], "right"))
    }

    /// Windows over all records, whatever their key: aggregated in each subtask first, then merged
    /// in one.
    pub fn window_all<W, F>(self, window: W, time: F) -> WindowedAll<T, C, F>
    where
        W: Into<Window>,
        F: Fn(&T::View) -> i64 + 'static,
    {
        WindowedAll { stream: self, window: window.into(), time }
    }

    /// Ends the stream in a sink.
    pub fn sink<S: Sink<T>>(self, name: &str, sink: S) {
        let needed = sink.parallelism();
        match needed {
            Some(subtasks) => self.gather().parallelism(subtasks).sink_here(name, sink),
            None => self.sink_here(name, sink),
        }
    }

    fn sink_here<S: Sink<T>>(self, name: &str, mut sink: S) {
        let stage = self.stage;
        let operator = self.flow.add_operator(stage, name, "sink");
        sink.configure(&self.flow.settings);
        let sink = Rc::new(sink);
        {
            let mut draft = self.flow.draft.borrow_mut();
            draft.outputs.extend(sink.claims().map(|output| (output, operator)));
            draft.sinks.push(SinkHooks::of::<T, S>(stage, operator, &sink));
        }
        self.finish(Box::new(move |attach, chain: C| {
            let subtask = attach.subtask(stage);
            let name = attach.operator_name(operator);
            let uid = attach.plan.operators[operator].uid().to_owned();
            let cell = format!("{uid}/position");
            let start = match attach.joined_at(stage) {
                Some(epoch) => sink.join(subtask, epoch),
                None => sink.start(subtask),
            };
            let start = attach.inherited_by_number(stage, &cell, start);
            let position = attach.named_cell(&cell, start)?;
            let from = attach.cx.txn.get(position);
            let failed = |message| Error::job(&name, message);
            let begun = attach.named_cell(&format!("{uid}/begun"), 0u64)?;
            let holding = attach.holding(operator)?;
            let holds = Rc::new(Cell::new(!holding.is_empty(&attach.cx)));
            let mut writer = None;
            // Opening takes back what lies beyond the position: that is the worker's, not its
            // replica's.
            if !attach.follows {
                let mut opened = sink.open(subtask, &from).map_err(failed)?;
                // What a run before this one has prepared, and no checkpoint holds, counts no more.
                let is_new = attach.cx.txn.get(begun) == 0;
                if let Some(epoch) = attach.resumed_at(stage).or(is_new.then_some(0)) {
                    Writer::<T, _>::abort(&mut opened, epoch).map_err(failed)?;
                    attach.cx.txn.set(begun, 1);
                }
                attach.cx.outputs.extend(Writer::<T, _>::files(&opened));
                let opened = Rc::new(RefCell::new(opened));
                attach.cx.sinks.push(Rc::new(Prepared {
                    name: name.clone(),
                    writer: Rc::clone(&opened),
                    position,
                    operator,
                    holds: Rc::clone(&holds),
                    of: PhantomData::<fn(T)>,
                }));
                writer = Some(opened);
            }
            let sheds = attach.plan.slo.is_partial();
            let end = SinkEnd {
                name,
                operator,
                writer,
                position,
                records: attach.counter(operator, CounterKind::In),
                dropped: attach.counter(operator, CounterKind::Dropped),
                written: 0,
                holding,
                holds,
                sheds,
                shed: 0,
                of: PhantomData,
            };
            chain.build(attach, end)
        }));
    }

    /// Ends the stream in a closure. What it does outside may be done twice for the step that a
    /// crash interrupts.
    pub fn for_each<F: Fn(&T::View) + 'static>(self, f: F) {
        let operator = self.flow.add_operator(self.stage, "for_each", "sink");
        self.finish(Box::new(move |attach, chain: C| {
            let records = attach.counter(operator, CounterKind::In);
            chain.build(
                attach,
                ForEach { f, records, seen: 0, is_silent: attach.follows, of: PhantomData },
            )
        }));
    }

    /// Ends the stream on standard output: one line for each record, as `f` writes it. The records
    /// reach the launching process through rings, and it prints them. What was printed cannot be
    /// taken back when all processes are killed and the job is resumed: with `--print-to FILE` the
    /// lines go to a file instead, as to a [`FileSink`].
    pub fn print<D: std::fmt::Display, F: Fn(&T::View) -> D + 'static>(self, f: F) {
        let lines = self.map(move |record| f(record).to_string()).name("to_line");
        if let Some(path) = lines.flow.next_print() {
            let line = |line: &<String as Record>::View| line.to_string();
            return lines.sink("print", FileSink::new(path, Lines(line)));
        }
        let lines = lines.counted("print", "sink", CounterKind::In);
        let edge = lines.flow.add_edge::<String>(Some(lines.stage), None, EdgeKind::Stdout);
        lines.finish(Box::new(move |attach, chain| {
            let next = attach.outlet::<String, _>(edge, Only)?;
            chain.build(attach, next)
        }));
    }

    /// Counts what passes here, under the name and kind of an operator.
    pub(crate) fn counted(
        self,
        name: &str,
        kind: &'static str,
        counter: CounterKind,
    ) -> Next<T, C, CountLink> {
        self.then(kind, |operator| CountLink { operator, counter }).name(name)
    }

    /// Ends this stage with an exchange and begins the next one.
    pub(crate) fn exchange<R: Route<T> + 'static>(
        self,
        kind: EdgeKind,
        route: impl FnOnce(usize) -> R + 'static,
    ) -> Exchanged<T> {
        let flow = self.flow.clone();
        let edge = flow.add_edge::<T>(Some(self.stage), None, kind);
        self.finish(Box::new(move |attach, chain: C| {
            let lanes = attach.lanes(edge);
            let next = attach.outlet::<T, _>(edge, route(lanes))?;
            chain.build(attach, next)
        }));
        inlet_stream(&flow, vec![edge], kind.label())
    }

    fn forward_edge(self) -> usize {
        let edge = self.flow.add_edge::<T>(Some(self.stage), None, EdgeKind::Forward);
        self.finish(Box::new(move |attach, chain: C| {
            let next = attach.outlet::<T, _>(edge, Only)?;
            chain.build(attach, next)
        }));
        edge
    }

    /// The stage is complete: says how to build it.
    pub(crate) fn finish(
        self,
        end: Box<dyn FnOnce(&mut Attach, C) -> Result<crate::worker::StageRef, Error>>,
    ) {
        let chain = self.chain;
        let factory: Factory = Box::new(move |attach| end(attach, chain));
        self.flow.set_factory(self.stage, factory);
    }
}

/// A new stage behind some edges.
pub(crate) fn inlet_stream<T: Record>(flow: &Flow, edges: Vec<usize>, name: &str) -> Exchanged<T> {
    keyed_inlet_stream(flow, edges, name, None)
}

/// As [`inlet_stream`], behind edges that route by key.
pub(crate) fn keyed_inlet_stream<T: Record>(
    flow: &Flow,
    edges: Vec<usize>,
    name: &str,
    key: Option<KeyOf<T>>,
) -> Exchanged<T> {
    let stage = flow.add_stage(name);
    let operator = flow.add_operator(stage, name, "inlet");
    for &edge in &edges {
        flow.draft.borrow_mut().edges[edge].to = Some(stage);
    }
    let chain = InletChain { edges, stage, key };
    Stream::new(flow, stage, operator, chain)
}

/// See [`Stream::map`].
#[derive(Debug)]
pub struct MapLink<U, F> {
    f: F,
    of: PhantomData<fn() -> U>,
}

impl<T: Record, U: Record, F: Fn(&T::View) -> U + 'static> Link<T> for MapLink<U, F> {
    type Out = U;
    type Op<N: Push<U> + 'static> = Map<T, U, F, N>;

    fn link<N: Push<U> + 'static>(self, _: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        Ok(Map { f: self.f, next, of: PhantomData })
    }
}

/// Counts what passes.
#[derive(Debug)]
pub struct CountLink {
    operator: usize,
    counter: CounterKind,
}

impl<T: Record> Link<T> for CountLink {
    type Out = T;
    type Op<N: Push<T> + 'static> = Count<N>;

    fn link<N: Push<T> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        Ok(Count { records: at.counter(self.operator, self.counter), seen: 0, next })
    }
}

/// See [`Stream::filter`].
#[derive(Debug)]
pub struct FilterLink<F> {
    f: F,
}

impl<T: Record, F: Fn(&T::View) -> bool + 'static> Link<T> for FilterLink<F> {
    type Out = T;
    type Op<N: Push<T> + 'static> = Filter<T, F, N>;

    fn link<N: Push<T> + 'static>(self, _: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        Ok(Filter { f: self.f, next, of: PhantomData })
    }
}

/// See [`Stream::flat_map`].
#[derive(Debug)]
pub struct FlatMapLink<U, I, F> {
    f: F,
    of: PhantomData<fn() -> (U, I)>,
}

impl<T, U, I, F> Link<T> for FlatMapLink<U, I, F>
where
    T: Record,
    U: Record,
    I: IntoIterator<Item = U> + 'static,
    F: Fn(&T::View) -> I + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = FlatMap<T, U, I, F, N>;

    fn link<N: Push<U> + 'static>(self, _: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        Ok(FlatMap { f: self.f, next, of: PhantomData })
    }
}

/// The side output of an operator: always forwarded within the worker.
type Side<S> = crate::exchange::outlet::Outlet<S, Only>;

/// See [`Stream::try_map`].
#[derive(Debug)]
pub struct TryMapLink<U, S, F> {
    f: F,
    edge: usize,
    operator: usize,
    of: PhantomData<fn() -> (U, S)>,
}

impl<T, U, S, F> Link<T> for TryMapLink<U, S, F>
where
    T: Record,
    U: Record,
    S: Record,
    F: Fn(&T::View) -> Result<U, S> + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = TryMap<T, U, S, F, N, Side<S>>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let side = at.outlet::<S, _>(self.edge, Only)?;
        let rejected = at.counter(self.operator, CounterKind::Rejected);
        Ok(TryMap { f: self.f, next, side, rejected, of: PhantomData })
    }
}

/// See [`Stream::split`].
#[derive(Debug)]
pub struct SplitLink<U, S, F> {
    f: F,
    edge: usize,
    of: PhantomData<fn() -> (U, S)>,
}

impl<T, U, S, F> Link<T> for SplitLink<U, S, F>
where
    T: Record,
    U: Record,
    S: Record,
    F: Fn(&T::View, &mut Emit<'_, U>, &mut Emit<'_, S>) + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = Split<T, U, S, F, N, Side<S>>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let side = at.outlet::<S, _>(self.edge, Only)?;
        let (main_out, side_out) = (Vec::new(), Vec::new());
        Ok(Split { f: self.f, next, side, main_out, side_out, of: PhantomData })
    }
}

/// See [`Stream::event_time`].
#[derive(Debug)]
pub struct EventTimeLink<F> {
    time: F,
    bound: i64,
    operator: usize,
}

impl<T: Record, F: Fn(&T::View) -> i64 + 'static> Link<T> for EventTimeLink<F> {
    type Out = T;
    type Op<N: Push<T> + 'static> = EventTime<T, F, N>;

    fn link<N: Push<T> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let stage = at.plan.operators[self.operator].stage;
        let mut parts = Vec::new();
        for part in at.parts_of(stage) {
            let latest = at.part_cell(self.operator, part, "latest", i64::MIN)?;
            parts.push((latest, at.cx.txn.get(latest)));
        }
        let is_behind_source = !parts.is_empty();
        if !is_behind_source {
            let latest = at.operator_watermark(self.operator, "latest")?;
            parts.push((latest, at.cx.txn.get(latest)));
        }
        let (time, bound) = (self.time, self.bound);
        let (batch, sent) = (i64::MIN, i64::MIN);
        Ok(EventTime { time, bound, parts, is_behind_source, batch, sent, next, of: PhantomData })
    }
}
