//! Operators that keep one value for each key, or for each key and slice of time, and whose values
//! may have been of another type: see [`Stream::migrate_from`].
//!
//! Called while a flow is described; what is noted here is carried out by the worker's attach.

use super::chain::{Chain, Link, Then};
use super::keyed::{AggregateLink, ReduceLink, TtlLink, state_schema};
use super::stream::Stream;
use super::windowed::{WindowLateLink, WindowLink};
use crate::operator::migrate::Mover;
use crate::plan::Migrates;
use testudo_shm::record::Record;

/// An operator on a stream of `T` that keeps values of one type.
pub trait KeepsValuesOf<T: Record> {
    /// Of its keys.
    type Key: Record;
    /// Of its values.
    type Value: Record;

    /// How values of another type become those.
    #[doc(hidden)]
    fn mover<Old: Record>(f: impl Fn(&Old::View) -> Self::Value + 'static) -> MoverOf;
}

/// How an operator's values are migrated.
#[derive(Debug, Clone)]
pub struct MoverOf(Mover);

/// An operator whose values are in a table of this name.
macro_rules! in_a_table {
    ($name:literal) => {
        fn mover<Old: Record>(f: impl Fn(&Old::View) -> Self::Value + 'static) -> MoverOf {
            MoverOf(Mover::table::<Self::Key, Old, Self::Value>($name, f))
        }
    };
}

/// The same with slices.
macro_rules! in_slices {
    ($name:literal) => {
        fn mover<Old: Record>(f: impl Fn(&Old::View) -> Self::Value + 'static) -> MoverOf {
            MoverOf(Mover::slices::<Self::Key, Old, Self::Value>($name, f))
        }
    };
}

impl<T: Record, K: Record, A: Record, U, F, I, G, E> KeepsValuesOf<T>
    for AggregateLink<K, A, U, F, I, G, E>
{
    type Key = K;
    type Value = A;
    in_a_table!("values");
}

impl<T: Record, K: Record, F, G> KeepsValuesOf<T> for ReduceLink<K, F, G> {
    type Key = K;
    type Value = T;
    in_a_table!("values");
}

impl<T: Record, K: Record, L: KeepsValuesOf<T>> KeepsValuesOf<T> for TtlLink<K, L> {
    type Key = L::Key;
    type Value = L::Value;

    fn mover<Old: Record>(f: impl Fn(&Old::View) -> Self::Value + 'static) -> MoverOf {
        L::mover::<Old>(f)
    }
}

impl<T: Record, K: Record, A: Record, U, F, X> KeepsValuesOf<T> for WindowLink<K, A, U, F, X> {
    type Key = K;
    type Value = A;
    in_slices!("slices");
}

impl<T: Record, K: Record, A: Record, U, F, X> KeepsValuesOf<T> for WindowLateLink<K, A, U, F, X> {
    type Key = K;
    type Value = A;
    in_slices!("slices");
}

impl<U, C, L> Stream<U, Then<C, L>>
where
    U: Record,
    C: Chain,
    L: Link<C::Out, Out = U> + KeepsValuesOf<C::Out>,
{
    /// The values of the operator before this point (an aggregate's accumulators, those of a keyed
    /// window, a reduce's records) may be of the type `Old`, from a program before this one: `f`
    /// makes a new one from each of them.
    ///
    /// ```
    /// use testudo::prelude::*;
    ///
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
    ///         .aggregate(
    ///             || Seen { count: 0, largest: 0 },
    ///             |seen, n| {
    ///                 seen.count += 1;
    ///                 seen.largest = seen.largest.max(*n);
    ///             },
    ///             |key, seen| (*key, seen.count),
    ///         )
    ///         .migrate_from::<u64>(|count| Seen { count: *count, largest: 0 })
    ///         .for_each(|_| ());
    /// }
    /// ```
    ///
    /// `testudo update` gives a running job such a program, and a checkpoint of the program before
    /// can be resumed by it. All values of a worker are migrated before it takes its next record;
    /// it stands still for that time. Without this, both are refused before anything is touched.
    ///
    /// What a [`process`](crate::flow::keyed::Keyed::process) declares (a value, a list, a map) is
    /// migrated where it is declared:
    ///
    /// ```
    /// # use testudo::prelude::*;
    /// # #[testudo::record]
    /// # struct Seen {
    /// #     count: u64,
    /// #     largest: u64,
    /// # }
    /// # fn build(flow: &Flow, _options: &NoOptions) {
    /// #     flow.source("numbers", Generator::new(1_000, |n| n))
    /// #         .key_by(|n| n % 10)
    /// .process(
    ///     |state| {
    ///         let seen = state.migrate_from::<u64, _>(|count| Seen { count: *count, largest: 0 });
    ///         seen.value("seen")
    ///     },
    ///     # |seen, cx, n: &u64| {
    ///     #     let (count, largest) =
    ///     #         cx.get(seen).map_or((0, 0), |seen| (seen.count, seen.largest));
    ///     #     cx.set(seen, &Seen { count: count + 1, largest: largest.max(*n) });
    ///     #     cx.emit(count + 1);
    ///     # },
    ///     # |_, _, _| (),
    /// # )
    /// # .for_each(|_| ());
    /// # }
    /// ```
    ///
    /// It may be said for several types: each value is of one of them. Once no checkpoint that is
    /// still of use has a type, what is said about it can go.
    pub fn migrate_from<Old: Record>(self, f: impl Fn(&Old::View) -> L::Value + 'static) -> Self {
        let MoverOf(mover) = L::mover::<Old>(f);
        let mut draft = self.flow.draft.borrow_mut();
        let schema = state_schema::<L::Key, Old>();
        let from = mover.from.clone();
        draft.operators[self.operator].migrates.push(Migrates { from, schema });
        draft.movers.push((self.operator, mover));
        drop(draft);
        self
    }
}
