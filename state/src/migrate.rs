//! Migration: a named state whose values are of another type than they were. A function makes each
//! new value from an old one, once, before anything else is done with the state; keys, timers and
//! whatever else the operator keeps stay as they are.
//!
//! ```text
//! migrate_…      in all held groups whose state has the old type, beside what there is
//! switch_moved   the new values take the old ones' place, with the open transaction
//! (open)         as any state; until it has settled, the old program finds what it had
//! settle_moved   with the first step that may change them
//! leftover_…     the old values are freed, a piece at a time
//! ```
//!
//! Invariants: those of `moving`; a group is moved whole or not at all; where the state has the new
//! type already, or there is none, nothing is done; what does not fit into memory, or into the
//! group's segment, is an error that changes nothing.
//!
//! Called by the worker while it attaches (`migrate_…`, `switch_moved`), and between its steps.

use crate::error::StateError;
use crate::group::{Groups, Opened};
use crate::key::KeyHash;
use crate::list::{self, List};
use crate::map::{self, Map};
use crate::moving::{Behind, beside};
use crate::slice::{self, Slices};
use crate::slots::Home;
use crate::table::{HEADER_WORD, Table, schema_of};
use std::ops::ControlFlow;
use std::rc::Rc;
use testudo_shm::hash::name_hash;
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::Txn;

/// Entries that are looked at together.
const AT_ONCE: usize = 256;

/// What was migrated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Migrated {
    /// Key groups.
    pub groups: u32,
    /// Values, items or entries.
    pub values: u64,
}

/// What a migration has left behind: see [`Leftover::sweep`].
pub struct Leftover(Box<dyn FnMut(&mut Txn, u64) -> Result<bool, StateError>>);

impl std::fmt::Debug for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Leftover")
    }
}

impl Leftover {
    /// Frees some of it, looking at about `budget` slots. True when nothing is left.
    ///
    /// # Errors
    /// When a group is not held any more.
    pub fn sweep(&mut self, txn: &mut Txn, budget: u64) -> Result<bool, StateError> {
        (self.0)(txn, budget)
    }
}

/// A named state, with its schema as it was and as it is to be.
type State<'a> = (&'a str, u64, u64);

/// A move that was begun: its states are read by their old types, and built beside.
struct Move<'a> {
    groups: &'a Groups,
    /// Those that have the old type.
    which: Vec<u32>,
    /// Length of the log before.
    since: u64,
    _behind: Behind<'a>,
}

impl<'a> Move<'a> {
    /// Begins; `None` where the first state has its old type in no group.
    fn begin(
        groups: &'a Groups,
        txn: &mut Txn,
        states: &[State<'_>],
    ) -> Result<Option<Self>, StateError> {
        let shared = &groups.shared;
        let Some((first, old, new)) = states.first().copied() else { return Ok(None) };
        let name = name_hash(first);
        let is_old = |group: &u32| {
            let seg = shared.front(*group);
            seg.and_then(|seg| shared.schema_of(seg, name)) == Some(old)
        };
        let which: Vec<u32> = groups.owned().filter(is_old).collect();
        if which.is_empty() || old == new {
            return Ok(None);
        }
        let since = txn.logged();
        for group in &which {
            for (state, _, schema) in states {
                shared.begin_moving(txn, *group, (state, name_hash(state)), *schema)?;
            }
        }
        Ok(Some(Self { groups, which, since, _behind: Behind::new(shared) }))
    }

    /// What there is of a state, and what is built beside it.
    fn roots(&self, (state, old, new): State<'_>) -> [Rc<Opened>; 2] {
        let over = |name: u64, schema: u64| {
            let words = |group, seg| {
                let is_meant = self.which.contains(&group);
                if is_meant { self.groups.shared.words_of(seg, name, schema) } else { 0 }
            };
            Rc::new(Opened::over(self.groups, schema, words))
        };
        [over(name_hash(state), old), over(beside(name_hash(state)), new)]
    }

    /// The groups, one after the other.
    fn each(
        &self,
        between: &mut dyn FnMut(),
        mut build: impl FnMut(u32) -> Result<u64, StateError>,
    ) -> Result<Migrated, StateError> {
        let mut done = Migrated::default();
        for group in &self.which {
            done.values += build(*group)?;
            done.groups += 1;
            between();
        }
        Ok(done)
    }
}

/// The root beside that of a state, where it still has something of that schema.
fn left(groups: &Groups, state: &str, schema: u64) -> Option<Rc<Opened>> {
    let name = beside(name_hash(state));
    let words = |group, seg: crate::raw::Seg| {
        let front = groups.shared.front(group).unwrap_or(seg);
        let at = groups.shared.words_of(front, name, schema);
        let is_empty = at == 0 || front.read::<[u64; 6]>(at) == [0; 6];
        if is_empty { 0 } else { at }
    };
    let opened = Opened::over(groups, schema, words);
    let is_any = groups.owned().any(|group| opened.has(group));
    is_any.then(|| Rc::new(opened))
}

/// The table behind a root.
fn table<K: Record, V: Record>(opened: Rc<Opened>) -> Table<K, V> {
    let mut table = Table::over(opened, Home::Root(HEADER_WORD));
    table.look();
    table
}

/// Visits a group's entries; `visit` may end it with an error.
fn visit<K: Record, V: Record>(
    table: &Table<K, V>,
    group: u32,
    mut visit: impl FnMut(KeyHash, Item<'_, K>, Item<'_, V>) -> Result<(), StateError>,
) -> Result<(), StateError> {
    let (mut cursor, mut failed) = (Some(0), None);
    while let (Some(at), None) = (cursor, &failed) {
        cursor = table.scan(group, at, AT_ONCE, |hash, key, value| match visit(hash, key, value) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        });
    }
    failed.map_or(Ok(()), Err)
}

/// Builds a group's table from another one.
fn convert<K: Record, Old: Record, New: Record>(
    (txn, since): (&mut Txn, u64),
    group: u32,
    old: &Table<K, Old>,
    new: &mut Table<K, New>,
    f: &impl Fn(&Old::View) -> New,
) -> Result<u64, StateError> {
    new.reserve(old.len_of(group));
    visit(old, group, |hash, key, value| {
        new.set(txn, hash, key, &f(value.view))?;
        txn.keep_since(since);
        Ok(())
    })?;
    Ok(old.len_of(group))
}

impl Groups {
    /// Migrates the table of that name. Calls `between` after each group (a test's kill point).
    ///
    /// Like all of these it comes before anything of the operator is opened in this transaction.
    ///
    /// # Errors
    /// When there is no memory for it, or no room for another named state.
    ///
    /// ```
    /// # use std::rc::Rc;
    /// # use testudo_shm::{record::{Record, Scratch}, txn::Txn};
    /// # use testudo_state::{Gauge, Groups, KeyHash};
    /// # let mut memory = vec![0u64; 32 * 1024];
    /// # let mut txn = Txn::on_heap(&mut memory, 4096);
    /// # let groups = Groups::new("counts", 1, 0, Rc::new(Gauge::unlimited()));
    /// # // SAFETY: the memory behind the log belongs to this example alone.
    /// # unsafe {
    /// #     let base = txn.base().add(4096 * 8);
    /// #     groups.attach(&mut txn, 0, base, 28 * 8192)?;
    /// # }
    /// let mut scratch = Scratch::default();
    /// let key = 7u64.item(&mut scratch);
    /// let mut counts = groups.table::<u64, u32>(&mut txn, "count")?;
    /// counts.set(&mut txn, KeyHash::of(key), key, &41)?;
    /// txn.commit();
    /// drop(counts);
    ///
    /// let widen = |old: &u32| [u64::from(*old), 1];
    /// groups.migrate_table::<u64, u32, [u64; 2]>(&mut txn, "count", widen, &mut || ())?;
    /// groups.switch_moved(&mut txn);
    /// let counts = groups.table::<u64, [u64; 2]>(&mut txn, "count")?;
    /// assert_eq!(*counts.get(KeyHash::of(key), key).unwrap().view, [41, 1]);
    /// # Ok::<(), testudo_state::StateError>(())
    /// ```
    pub fn migrate_table<K: Record, Old: Record, New: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        f: impl Fn(&Old::View) -> New,
        between: &mut dyn FnMut(),
    ) -> Result<Migrated, StateError> {
        self.migrate_table_as::<K, Old, New>(txn, (name, "table"), f, between)
    }

    /// The same for the value of that name.
    ///
    /// # Errors
    /// As [`Groups::migrate_table`].
    pub fn migrate_value<K: Record, Old: Record, New: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        f: impl Fn(&Old::View) -> New,
        between: &mut dyn FnMut(),
    ) -> Result<Migrated, StateError> {
        self.migrate_table_as::<K, Old, New>(txn, (name, "value"), f, between)
    }

    fn migrate_table_as<K: Record, Old: Record, New: Record>(
        &self,
        txn: &mut Txn,
        (name, kind): (&str, &str),
        f: impl Fn(&Old::View) -> New,
        between: &mut dyn FnMut(),
    ) -> Result<Migrated, StateError> {
        let state = (name, schema_of::<K, Old>(kind), schema_of::<K, New>(kind));
        let Some(begun) = Move::begin(self, txn, &[state])? else { return Ok(Migrated::default()) };
        let [old, new] = begun.roots(state);
        let (old, mut new) = (table::<K, Old>(old), table::<K, New>(new));
        begun.each(between, |group| convert((txn, begun.since), group, &old, &mut new, &f))
    }

    /// The same for the items of the list of that name.
    ///
    /// # Errors
    /// As [`Groups::migrate_table`].
    pub fn migrate_list<K: Record, Old: Record, New: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        f: impl Fn(&Old::View) -> New,
        between: &mut dyn FnMut(),
    ) -> Result<Migrated, StateError> {
        let state = (name, list::schema_of::<K, Old>(), list::schema_of::<K, New>());
        let Some(begun) = Move::begin(self, txn, &[state])? else { return Ok(Migrated::default()) };
        let [old, new] = begun.roots(state);
        let (old, mut new) = (List::<K, Old>::over(table(old)), List::<K, New>::over(table(new)));
        begun.each(between, |group| {
            new.reserve(old.heads().len_of(group));
            let mut items = 0;
            visit(old.heads(), group, |hash, key, _| {
                for item in old.iter(hash, key) {
                    new.append(txn, hash, key, &f(item.view))?;
                    txn.keep_since(begun.since);
                    items += 1;
                }
                Ok(())
            })?;
            Ok(items)
        })
    }

    /// The same for the values in the map of that name.
    ///
    /// # Errors
    /// As [`Groups::migrate_table`].
    pub fn migrate_map<K: Record, UK: Record, Old: Record, New: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        f: impl Fn(&Old::View) -> New,
        between: &mut dyn FnMut(),
    ) -> Result<Migrated, StateError> {
        let (was, is) = (map::states_of::<K, UK, Old>(name), map::states_of::<K, UK, New>(name));
        let [entries, heads] =
            [0, 1].map(|index| (was[index].0.as_str(), was[index].1, is[index].1));
        let Some(begun) = Move::begin(self, txn, &[entries, heads])? else {
            return Ok(Migrated::default());
        };
        let ([old, new], [old_heads, new_heads]) = (begun.roots(entries), begun.roots(heads));
        let old = Map::<K, UK, Old>::over(old, table(old_heads));
        let mut new = Map::<K, UK, New>::over(new, table(new_heads));
        begun.each(between, |group| {
            new.reserve(old.heads().len_of(group), old.entries(group));
            visit(old.heads(), group, |hash, key, _| {
                // The newest comes first, and what is put last is the newest.
                let entries: Vec<_> = old.iter(hash, key).collect();
                for (user_key, value) in entries.into_iter().rev() {
                    new.put(txn, hash, key, user_key, &f(value.view))?;
                    txn.keep_since(begun.since);
                }
                Ok(())
            })?;
            Ok(old.entries(group))
        })
    }

    /// The same for the slices of that name.
    ///
    /// # Errors
    /// As [`Groups::migrate_table`].
    pub fn migrate_slices<K: Record, Old: Record, New: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        f: impl Fn(&Old::View) -> New,
        between: &mut dyn FnMut(),
    ) -> Result<Migrated, StateError> {
        let state = (name, slice::schema_of::<K, Old>(), slice::schema_of::<K, New>());
        let Some(begun) = Move::begin(self, txn, &[state])? else { return Ok(Migrated::default()) };
        let [old, new] = begun.roots(state);
        let (old, mut new) = (Slices::<K, Old>::over(old), Slices::<K, New>::over(new));
        begun.each(between, |group| {
            slice::reserve_as(new.opened(), old.opened(), txn, group)?;
            txn.keep_since(begun.since);
            let mut values = 0;
            for id in old.ids() {
                let Some(table) = old.get_slice(id) else { continue };
                values += convert((txn, begun.since), group, table, new.slice(id), &f)?;
            }
            Ok(values)
        })
    }
}

impl Groups {
    /// What a migration of the table of that name has left; `None` without anything.
    #[must_use]
    pub fn leftover_table<K: Record, Old: Record>(&self, name: &str) -> Option<Leftover> {
        self.leftover_of::<K, Old>(name, "table")
    }

    /// The same for a value.
    #[must_use]
    pub fn leftover_value<K: Record, Old: Record>(&self, name: &str) -> Option<Leftover> {
        self.leftover_of::<K, Old>(name, "value")
    }

    fn leftover_of<K: Record, Old: Record>(&self, name: &str, kind: &str) -> Option<Leftover> {
        let opened = left(self, name, schema_of::<K, Old>(kind))?;
        let mut table = table::<K, Old>(opened);
        Some(Leftover(Box::new(move |txn, budget| {
            table.clear(txn);
            Ok(table.sweep(txn, budget))
        })))
    }

    /// The same for a list.
    #[must_use]
    pub fn leftover_list<K: Record, Old: Record>(&self, name: &str) -> Option<Leftover> {
        let opened = left(self, name, list::schema_of::<K, Old>())?;
        let mut list = Some(List::<K, Old>::over(table(opened)));
        let mut heads = None;
        let mut left: Vec<u32> = self.owned().collect();
        let mut cursor = 0;
        Some(Leftover(Box::new(move |txn, budget| {
            let mut budget = budget;
            if let Some(list) = &mut list {
                while let (Some(group), true) = (left.last().copied(), budget > 0) {
                    match empty_one(txn, list, (group, cursor), &mut budget)? {
                        Some(next) => cursor = next,
                        None => {
                            left.pop();
                            cursor = 0;
                        }
                    }
                }
            }
            if !left.is_empty() {
                return Ok(false);
            }
            let heads = heads.get_or_insert_with(|| list.take().map(List::into_heads));
            Ok(heads.as_mut().is_none_or(|heads| {
                heads.clear(txn);
                heads.sweep(txn, budget)
            }))
        })))
    }

    /// The same for a map.
    #[must_use]
    pub fn leftover_map<K: Record, UK: Record, Old: Record>(&self, name: &str) -> Option<Leftover> {
        let states = map::states_of::<K, UK, Old>(name);
        let [entries, heads] = states.map(|(state, schema)| left(self, &state, schema));
        let none = || Rc::new(Opened::over(self, 0, |_, _| 0));
        if entries.is_none() && heads.is_none() {
            return None;
        }
        let heads = table(heads.unwrap_or_else(none));
        let mut map = Map::<K, UK, Old>::over(entries.unwrap_or_else(none), heads);
        Some(Leftover(Box::new(move |txn, budget| {
            map.discard(txn);
            Ok(map.sweep(txn, budget))
        })))
    }

    /// The same for slices.
    #[must_use]
    pub fn leftover_slices<K: Record, Old: Record>(&self, name: &str) -> Option<Leftover> {
        let opened = left(self, name, slice::schema_of::<K, Old>())?;
        let mut slices = Slices::<K, Old>::over(opened);
        let groups: Vec<u32> = self.owned().collect();
        Some(Leftover(Box::new(move |txn, budget| {
            while let Some(id) = slices.oldest() {
                slices.drop_slice(txn, id);
            }
            for group in &groups {
                slice::drop_directory(slices.opened(), txn, *group);
            }
            Ok(slices.sweep(txn, budget))
        })))
    }
}

/// Frees what the list at a cursor has: where to go on, `None` at the group's end.
fn empty_one<K: Record, T: Record>(
    txn: &mut Txn,
    list: &mut List<K, T>,
    (group, cursor): (u32, u64),
    budget: &mut u64,
) -> Result<Option<u64>, StateError> {
    let mut found = None;
    let next = list.heads().scan(group, cursor, 1, |hash, key, _| {
        found = Some((hash, K::to_owned(key.view)));
        ControlFlow::Break(())
    });
    *budget = budget.saturating_sub(1);
    let Some((hash, key)) = found else { return Ok(next) };
    let is_empty = list.empty(txn, hash, &key, budget)?;
    Ok(if is_empty { next } else { Some(cursor) })
}
