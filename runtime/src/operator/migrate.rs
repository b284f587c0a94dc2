//! Migration of keyed state: an operator's values are of another type than those that an earlier
//! program left, in a running job (`testudo update`) or in the checkpoint that a job is resumed
//! from. The job's text says how a new value is made from an old one.
//!
//! All of a worker's values are migrated when it attaches, before any record is taken
//! (`testudo_state::migrate`). Invariant: what was migrated settles with the first step that is
//! committed after it; until then the program before would find its state as it was. What it had is
//! freed a piece at a time afterwards.
//!
//! Called by `Attach::groups`, by `Process` for what it declares, and by the step loop.

use super::process::{Declare, ListState, MapState, ValueState};
use crate::error::Error;
use crate::plan::described::Type;
use crate::testing::{Point, point};
use crate::time::now_ns;
use crate::worker::attach::Attach;
use std::rc::Rc;
use testudo_shm::header::WorkerHeader;
use testudo_shm::primitive::Ordering;
use testudo_shm::record::Record;
use testudo_shm::txn::Txn;
use testudo_state::{Groups, Leftover, Migrated, StateError};

/// Slots of what is left behind that a step looks at.
const SWEPT_A_STEP: u64 = 512;

/// Migrates in all groups that are held.
type Build = Rc<dyn Fn(&Groups, &mut Txn) -> Result<Migrated, StateError>>;

/// How a named state that has another type becomes what it is declared to be.
#[derive(Clone)]
pub(crate) struct Mover {
    /// The state's name, where the operator declares it by name.
    pub(crate) state: String,
    /// What it was.
    pub(crate) from: Type,
    build: Build,
    left: Rc<dyn Fn(&Groups) -> Option<Leftover>>,
}

/// What a mover calls after each group.
fn between() {
    point(Point::Migrating);
}

impl Mover {
    /// Of an operator's only values, in the table of that name.
    pub(crate) fn table<K: Record, Old: Record, New: Record>(
        name: &'static str,
        f: impl Fn(&Old::View) -> New + 'static,
    ) -> Self {
        Self {
            state: String::new(),
            from: Type { name: std::any::type_name::<Old>().into(), schema: Old::schema() },
            build: Rc::new(move |groups, txn| {
                groups.migrate_table::<K, Old, New>(txn, name, &f, &mut between)
            }),
            left: Rc::new(move |groups| groups.leftover_table::<K, Old>(name)),
        }
    }

    /// The same, by slices of event time.
    pub(crate) fn slices<K: Record, Old: Record, New: Record>(
        name: &'static str,
        f: impl Fn(&Old::View) -> New + 'static,
    ) -> Self {
        Self {
            state: String::new(),
            from: Type { name: std::any::type_name::<Old>().into(), schema: Old::schema() },
            build: Rc::new(move |groups, txn| {
                groups.migrate_slices::<K, Old, New>(txn, name, &f, &mut between)
            }),
            left: Rc::new(move |groups| groups.leftover_slices::<K, Old>(name)),
        }
    }
}

impl std::fmt::Debug for Mover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mover({} of {})", self.state, self.from.name)
    }
}

/// What was migrated in this life of a worker, until all of it is done with.
#[derive(Debug, Default)]
pub(crate) struct Migration {
    /// Groups whose migration settles with the next step.
    unsettled: Vec<Groups>,
    /// What is to be freed afterwards.
    left: Vec<Leftover>,
}

impl Migration {
    pub(crate) fn is_over(&self) -> bool {
        self.unsettled.is_empty() && self.left.is_empty()
    }

    /// Whether the program before could still go on from what there is.
    pub(crate) fn is_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// What was migrated is final with the open transaction. Said before that is committed, so that
    /// a supervisor never takes for the old values what is the new ones.
    #[cold]
    pub(crate) fn settle(&mut self, txn: &mut Txn, header: &WorkerHeader) {
        for groups in self.unsettled.drain(..) {
            groups.settle_moved(txn);
        }
        header.migrated_ns.store(now_ns(), Ordering::Release);
        point(Point::Settling);
    }

    /// Frees some of what is left.
    #[cold]
    pub(crate) fn sweep(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        if let Some(leftover) = self.left.last_mut()
            && leftover.sweep(txn, SWEPT_A_STEP)?
        {
            self.left.pop();
        }
        Ok(())
    }
}

impl Attach {
    /// Migrates what of an operator's state has another type. Comes before any of it is opened.
    pub(crate) fn migrate(
        &mut self,
        operator: usize,
        groups: &Groups,
        movers: &[Mover],
    ) -> Result<(), Error> {
        let failed = |state: &str, error: StateError| {
            let what = if state.is_empty() { "its values" } else { state };
            Error::job(&self.plan.operators[operator].name, format!("{what}: {error}"))
        };
        let txn = &mut self.cx.txn;
        for mover in movers {
            (mover.build)(groups, txn).map_err(|error| failed(&mover.state, error))?;
        }
        if !movers.is_empty() && groups.switch_moved(txn) {
            point(Point::Migrated);
            if self.restored.is_some() {
                // The checkpoint is still there to go back to.
                groups.settle_moved(txn);
            } else {
                self.migration.unsettled.push(groups.clone());
            }
        }
        let left = movers.iter().filter_map(|mover| (mover.left)(groups));
        self.migration.left.extend(left);
        Ok(())
    }
}

/// States whose values an earlier program left as `Old`: made by [`Declare::migrate_from`].
pub struct Migrating<'d, 'a, K: Record, Old: Record, New: Record, F> {
    declare: &'d mut Declare<'a, K>,
    f: F,
    of: std::marker::PhantomData<fn(Old) -> New>,
}

impl<K: Record, Old: Record, New: Record, F> std::fmt::Debug for Migrating<'_, '_, K, Old, New, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Migrating")
    }
}

impl<'d, 'a, K, Old, New, F> Migrating<'d, 'a, K, Old, New, F>
where
    K: Record,
    Old: Record,
    New: Record,
    F: Fn(&Old::View) -> New + 'static,
{
    pub(crate) fn new(declare: &'d mut Declare<'a, K>, f: F) -> Self {
        Self { declare, f, of: std::marker::PhantomData }
    }

    /// One value for each key.
    pub fn value(self, name: &str) -> ValueState<K, New> {
        let Self { declare, f, .. } = self;
        declare.moves(|of| {
            let (state, again) = (name.to_owned(), name.to_owned());
            Mover {
                state: state.clone(),
                from: of.listed::<Old>("value", &[Old::schema()]),
                build: Rc::new(move |groups, txn| {
                    groups.migrate_value::<K, Old, New>(txn, &state, &f, &mut between)
                }),
                left: Rc::new(move |groups| groups.leftover_value::<K, Old>(&again)),
            }
        });
        declare.value(name)
    }

    /// A list for each key: each of its items is migrated.
    pub fn list(self, name: &str) -> ListState<K, New> {
        let Self { declare, f, .. } = self;
        declare.moves(|of| {
            let (state, again) = (name.to_owned(), name.to_owned());
            Mover {
                state: state.clone(),
                from: of.listed::<Old>("list", &[Old::schema()]),
                build: Rc::new(move |groups, txn| {
                    groups.migrate_list::<K, Old, New>(txn, &state, &f, &mut between)
                }),
                left: Rc::new(move |groups| groups.leftover_list::<K, Old>(&again)),
            }
        });
        declare.list(name)
    }

    /// A map for each key: each of its values is migrated; the keys within keep their type.
    pub fn map<UK: Record>(self, name: &str) -> MapState<K, UK, New> {
        let Self { declare, f, .. } = self;
        declare.moves(|of| {
            let (state, again) = (name.to_owned(), name.to_owned());
            Mover {
                state: state.clone(),
                from: of.listed::<(UK, Old)>("map", &[UK::schema(), Old::schema()]),
                build: Rc::new(move |groups, txn| {
                    groups.migrate_map::<K, UK, Old, New>(txn, &state, &f, &mut between)
                }),
                left: Rc::new(move |groups| groups.leftover_map::<K, UK, Old>(&again)),
            }
        });
        declare.map(name)
    }
}
