//! Windowed streams: by key, or over everything.

pub use crate::window::{Bounds, Window};

use super::chain::{Chain, InletChain, Link, Then};
use super::keyed::{KeyFn, Keyed, declare_state, keyed_parts};
use super::stream::{Exchanged, Next, Stream, inlet_stream};
use crate::error::Error;
use crate::exchange::outlet::Outlet;
use crate::exchange::route::Only;
use crate::operator::Push;
use crate::plan::{CounterKind, EdgeKind, Grouping};
use crate::window::all::{MergeWindows, Partial, PreAggregate, SliceStore};
use crate::window::keyed::{Counted, FireCells, KeyedFns, KeyedWindow, Late, NOT_FIRING};
use crate::worker::attach::Attach;
use std::marker::PhantomData;
use testudo_shm::record::Record;

/// A keyed stream cut into windows.
#[must_use = "a window does nothing until it is aggregated"]
pub struct Windowed<T: Record, K, F, G> {
    pub(crate) keyed: Keyed<T, K, F>,
    pub(crate) window: Window,
    pub(crate) time: G,
}

impl<T: Record, K, F, G> std::fmt::Debug for Windowed<T, K, F, G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Windowed({:?}, {:?})", self.keyed, self.window)
    }
}

impl<T, K, F, G> Windowed<T, K, F, G>
where
    T: Record,
    K: Record,
    F: Fn(&T::View) -> K + 'static,
    G: Fn(&T::View) -> i64 + 'static,
{
    /// Folds the records of each key and window; `emit` says what comes out when the window fires.
    /// `merge` puts the accumulators of two slices together (sliding windows consist of several).
    /// Late records are counted and dropped.
    pub fn aggregate<A, U, I, P, M, E>(
        self,
        init: I,
        fold: P,
        merge: M,
        emit: E,
    ) -> Next<T, InletChain<T>, WindowLink<K, A, U, F, (G, I, P, M, E)>>
    where
        A: Record,
        U: Record,
        I: Fn() -> A + 'static,
        P: Fn(&mut A, &T::View) + 'static,
        M: Fn(&mut A, &A) + 'static,
        E: Fn(&K::View, Bounds, &A) -> U + 'static,
    {
        self.link((init, fold, merge, emit))
    }

    /// As [`Windowed::aggregate`]; the second stream has the late records.
    pub fn aggregate_with_late<A, U, I, P, M, E>(
        self,
        init: I,
        fold: P,
        merge: M,
        emit: E,
    ) -> (Next<T, InletChain<T>, WindowLateLink<K, A, U, F, (G, I, P, M, E)>>, Exchanged<T>)
    where
        A: Record,
        U: Record,
        I: Fn() -> A + 'static,
        P: Fn(&mut A, &T::View) + 'static,
        M: Fn(&mut A, &A) + 'static,
        E: Fn(&K::View, Bounds, &A) -> U + 'static,
    {
        let flow = self.keyed.stream.flow.clone();
        let edge = flow.add_edge::<T>(Some(self.keyed.stage()), None, EdgeKind::Forward);
        let (key, window, time) = (self.keyed.key, self.window, self.time);
        let fns = (time, init, fold, merge, emit);
        let main = self.keyed.stream.then("window", |operator| {
            declare_state::<K, A>(&flow, operator, Grouping::ByKey);
            declare_window(&flow, operator, window);
            WindowLateLink {
                inner: WindowLink { key, window, fns, operator, of: PhantomData },
                edge,
            }
        });
        (main, inlet_stream(&flow, vec![edge], "late"))
    }

    fn link<A, U, I, P, M, E>(
        self,
        (init, fold, merge, emit): (I, P, M, E),
    ) -> Next<T, InletChain<T>, WindowLink<K, A, U, F, (G, I, P, M, E)>>
    where
        A: Record,
        U: Record,
        I: Fn() -> A + 'static,
        P: Fn(&mut A, &T::View) + 'static,
        M: Fn(&mut A, &A) + 'static,
        E: Fn(&K::View, Bounds, &A) -> U + 'static,
    {
        let flow = self.keyed.stream.flow.clone();
        let (key, window, time) = (self.keyed.key, self.window, self.time);
        self.keyed.stream.then("window", |operator| {
            declare_state::<K, A>(&flow, operator, Grouping::ByKey);
            declare_window(&flow, operator, window);
            let fns = (time, init, fold, merge, emit);
            WindowLink { key, window, fns, operator, of: PhantomData }
        })
    }
}

/// Says by which window an operator's state is cut.
fn declare_window(flow: &super::Flow, operator: usize, window: Window) {
    flow.draft.borrow_mut().operators[operator].detail = format!("{window:?}");
}

impl<T: Record, K, F> Keyed<T, K, F> {
    fn stage(&self) -> usize {
        self.stream.stage
    }
}

/// The user's functions of a keyed window, as a tuple: time, init, fold, merge, emit.
pub struct TupleFns<F, X> {
    fns: X,
    of: PhantomData<fn() -> F>,
}

impl<T, K, A, U, F, G, I, P, M, E> KeyedFns<T, K, A, U> for TupleFns<F, (G, I, P, M, E)>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K + 'static,
    G: Fn(&T::View) -> i64 + 'static,
    I: Fn() -> A + 'static,
    P: Fn(&mut A, &T::View) + 'static,
    M: Fn(&mut A, &A) + 'static,
    E: Fn(&K::View, Bounds, &A) -> U + 'static,
{
    type Key = F;

    #[inline(always)]
    fn time(&self, record: &T::View) -> i64 {
        (self.fns.0)(record)
    }

    #[inline(always)]
    fn init(&self) -> A {
        (self.fns.1)()
    }

    #[inline(always)]
    fn fold(&self, value: &mut A, record: &T::View) {
        (self.fns.2)(value, record);
    }

    #[inline(always)]
    fn merge(&self, into: &mut A, other: &A) {
        (self.fns.3)(into, other);
    }

    #[inline(always)]
    fn emit(&self, key: &K::View, window: Bounds, value: &A) -> U {
        (self.fns.4)(key, window, value)
    }
}

/// See [`Windowed::aggregate`].
#[derive(Debug)]
pub struct WindowLink<K, A, U, F, X> {
    key: KeyFn<F>,
    window: Window,
    fns: X,
    operator: usize,
    of: PhantomData<fn() -> (K, A, U)>,
}

/// See [`Windowed::aggregate_with_late`].
#[derive(Debug)]
pub struct WindowLateLink<K, A, U, F, X> {
    inner: WindowLink<K, A, U, F, X>,
    edge: usize,
}

impl<K, A, U, F, X> WindowLink<K, A, U, F, X> {
    fn open<T, N, M>(
        self,
        at: &mut Attach,
        next: N,
        late: M,
    ) -> Result<KeyedWindow<T, K, A, U, TupleFns<F, X>, N, M>, Error>
    where
        T: Record,
        K: Record,
        A: Record,
        U: Record,
        TupleFns<F, X>: KeyedFns<T, K, A, U, Key = F>,
        N: Push<U>,
        M: Late<T>,
    {
        let groups = at.groups(self.operator)?;
        let slices = groups.slices(&mut at.cx.txn, "slices");
        let slices = slices.map_err(|error| at.unopened(self.operator, &error))?;
        let (cells, before) = at.fire_cells_by_group(self.operator, groups.groups())?;
        Ok(KeyedWindow {
            keyed: keyed_parts(at, self.operator, self.key),
            groups,
            slices,
            window: self.window,
            fns: TupleFns { fns: self.fns, of: PhantomData },
            cells,
            before,
            good: (0, 0),
            ahead: Default::default(),
            late_records: at.counter(self.operator, CounterKind::Late),
            late,
            next,
            of: PhantomData,
        })
    }
}

fn fire_cells(at: &mut Attach, operator: usize) -> Result<FireCells, Error> {
    Ok(FireCells {
        watermark: at.cell(operator, "watermark", i64::MIN)?,
        passed: at.cell(operator, "passed", i64::MIN)?,
        fired: at.cell(operator, "fired", i64::MIN)?,
        cursor: at.cell(operator, "cursor", NOT_FIRING)?,
    })
}

impl<T, K, A, U, F, X> Link<T> for WindowLink<K, A, U, F, X>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K + 'static,
    X: 'static,
    TupleFns<F, X>: KeyedFns<T, K, A, U, Key = F>,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = KeyedWindow<T, K, A, U, TupleFns<F, X>, N, Counted>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        self.open(at, next, Counted)
    }
}

impl<T, K, A, U, F, X> Link<T> for WindowLateLink<K, A, U, F, X>
where
    T: Record,
    K: Record,
    A: Record,
    U: Record,
    F: Fn(&T::View) -> K + 'static,
    X: 'static,
    TupleFns<F, X>: KeyedFns<T, K, A, U, Key = F>,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = KeyedWindow<T, K, A, U, TupleFns<F, X>, N, Outlet<T, Only>>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let late = at.outlet::<T, _>(self.edge, Only)?;
        self.inner.open(at, next, late)
    }
}

/// A stream cut into windows over everything.
#[must_use = "a window does nothing until it is aggregated"]
pub struct WindowedAll<T: Record, C: Chain<Out = T>, F> {
    pub(crate) stream: Stream<T, C>,
    pub(crate) window: Window,
    pub(crate) time: F,
}

impl<T: Record, C: Chain<Out = T>, F> std::fmt::Debug for WindowedAll<T, C, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WindowedAll({:?}, {:?})", self.stream, self.window)
    }
}

impl<T: Record, C: Chain<Out = T>, F: Fn(&T::View) -> i64 + 'static> WindowedAll<T, C, F> {
    /// Folds the records of each window: in every subtask first, then merged in one; `emit` says
    /// what comes out when the window fires. Late records are counted and dropped.
    pub fn aggregate<A, U, I, P, M, E>(
        self,
        init: I,
        fold: P,
        merge: M,
        emit: E,
    ) -> Next<Partial<A>, InletChain<Partial<A>>, MergeLink<A, U, M, E>>
    where
        A: Record,
        U: Record,
        I: Fn() -> A + 'static,
        P: Fn(&mut A, &T::View) + 'static,
        M: Fn(&mut A, &A) + 'static,
        E: Fn(Bounds, &A) -> U + 'static,
    {
        let (window, time) = (self.window, self.time);
        let flow = self.stream.flow.clone();
        let partial: Stream<Partial<A>, Then<C, PreLink<A, F, I, P>>> =
            self.stream.then("pre_aggregate", |operator| {
                declare_state::<i64, A>(&flow, operator, Grouping::BySubtask);
                declare_window(&flow, operator, window);
                PreLink { window, time, init, fold, operator, of: PhantomData }
            });
        let pre = partial.operator;
        partial.gather().then("window_all", |operator| {
            declare_state::<i64, A>(&flow, operator, Grouping::BySubtask);
            declare_window(&flow, operator, window);
            MergeLink { window, merge, emit, pre, operator, of: PhantomData }
        })
    }
}

/// The first stage of [`WindowedAll::aggregate`].
#[derive(Debug)]
pub struct PreLink<A, F, I, P> {
    window: Window,
    time: F,
    init: I,
    fold: P,
    operator: usize,
    of: PhantomData<fn() -> A>,
}

impl<T, A, F, I, P> Link<T> for PreLink<A, F, I, P>
where
    T: Record,
    A: Record,
    F: Fn(&T::View) -> i64 + 'static,
    I: Fn() -> A + 'static,
    P: Fn(&mut A, &T::View) + 'static,
{
    type Out = Partial<A>;
    type Op<N: Push<Partial<A>> + 'static> = PreAggregate<T, A, F, I, P, N, Counted>;

    fn link<N: Push<Partial<A>> + 'static>(
        self,
        at: &mut Attach,
        next: N,
    ) -> Result<Self::Op<N>, Error> {
        Ok(PreAggregate {
            store: slice_store(at, self.operator)?,
            window: self.window,
            time: self.time,
            init: self.init,
            fold: self.fold,
            current: (0, 0),
            value: None,
            watermark: at.operator_watermark(self.operator, "watermark")?,
            late_records: at.counter(self.operator, CounterKind::Late),
            late: Counted,
            next,
            of: PhantomData,
        })
    }
}

fn slice_store<A: Record>(at: &mut Attach, operator: usize) -> Result<SliceStore<A>, Error> {
    let groups = at.groups(operator)?;
    let table = at.table(operator, "slices")?;
    Ok(SliceStore::open(&at.operator_name(operator), &groups, table))
}

/// The second stage of [`WindowedAll::aggregate`].
#[derive(Debug)]
pub struct MergeLink<A, U, M, E> {
    window: Window,
    merge: M,
    emit: E,
    /// The operator that sends the partials.
    pre: usize,
    operator: usize,
    of: PhantomData<fn() -> (A, U)>,
}

impl<A, U, M, E> Link<Partial<A>> for MergeLink<A, U, M, E>
where
    A: Record,
    U: Record,
    M: Fn(&mut A, &A) + 'static,
    E: Fn(Bounds, &A) -> U + 'static,
{
    type Out = U;
    type Op<N: Push<U> + 'static> = MergeWindows<A, U, M, E, N>;

    fn link<N: Push<U> + 'static>(self, at: &mut Attach, next: N) -> Result<Self::Op<N>, Error> {
        let mut store = slice_store(at, self.operator)?;
        // Partials of another number of subtasks are taken over: theirs begin anew.
        at.visit_subtasks(self.pre, |txn, groups, at| {
            let table = groups.table::<i64, A>(txn, "slices")?;
            store.merge_all(&mut at.cx, &table, &self.merge);
            Ok(())
        })?;
        Ok(MergeWindows {
            store,
            window: self.window,
            merge: self.merge,
            emit: self.emit,
            cells: fire_cells(at, self.operator)?,
            late_records: at.counter(self.operator, CounterKind::Late),
            next,
            of: PhantomData,
        })
    }
}
