//! The keyed table: one value per key, over all key groups that an operator holds. The hottest
//! structure there is.
//!
//! Invariants: see `slots`. A plain value stands in its slot and is changed there; an archived one
//! has a heap block, which is written again in place when the new encoding fits and replaced
//! otherwise.
//!
//! How to be fast: `ask` for the keys of a few records, `find_and_log` those of the records before,
//! `run` those before again; memory's latency is hidden behind other records. For types without
//! runs: hash a batch, `prefetch` each hash, then `update` each key.
//!
//! Called by operators (through `value`, `list` and `map`, or directly) and by `slice`.

use crate::error::StateError;
use crate::group::{Groups, Opened};
use crate::key::KeyHash;
use crate::raw::stored;
use crate::slots::check::check;
use crate::slots::{Ahead, Cell, Home, Shape, Slot, Slots, sweep};
use crate::verify::Tables;
use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::rc::Rc;
use testudo_shm::hash::{key_hash, schema};
use testudo_shm::record::{Item, Record, Scratch};
use testudo_shm::txn::Txn;

/// Root words of a table: its header, and the chain of discarded ones.
pub(crate) const HEADER_WORD: u64 = 0;
pub(crate) const DISCARDED_WORD: u64 = 1;

/// Slots of a table from `K` to `V`.
#[derive(Debug)]
pub(crate) struct Typed<K, V>(PhantomData<fn() -> (K, V)>);

impl<K: Record, V: Record> Shape for Typed<K, V> {
    const KEY: Option<usize> = K::SIZE;
    const KEY_ALIGN: usize = align_of::<K::View>();
    const VALUE: usize = match V::SIZE {
        Some(bytes) => bytes,
        None => size_of::<Cell>(),
    };
    const VALUE_ALIGN: usize = if V::SIZE.is_some() { align_of::<V::View>() } else { 8 };
    const PREFIX: usize = 0;
    const VALUE_IN_HEAP: bool = V::SIZE.is_none();
    const PREFIX_IN_HEAP: Option<usize> = None;
}

/// A table from keys `K` to values `V`.
#[derive(Debug)]
pub struct Table<K: Record, V: Record> {
    slots: Slots<Typed<K, V>>,
    opened: Rc<Opened>,
    scratch: Scratch,
}

impl Groups {
    /// Opens the table of that name, in all groups that are held.
    ///
    /// # Errors
    /// When it exists with other types, is open already, or there is no room for another name.
    pub fn table<K: Record, V: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
    ) -> Result<Table<K, V>, StateError> {
        self.table_as(txn, name, "table")
    }

    pub(crate) fn table_as<K: Record, V: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        kind: &str,
    ) -> Result<Table<K, V>, StateError> {
        let opened = Rc::new(Opened::new(self, txn, name, schema_of::<K, V>(kind))?);
        let by = Tables::Root(HEADER_WORD);
        opened.shared.check_by(name, by, check::<Typed<K, V>>);
        let mut table = Table::over(opened, Home::Root(HEADER_WORD));
        table.slots.reload(&table.opened);
        Ok(table)
    }
}

/// Schema of the root of a table of this kind.
pub(crate) fn schema_of<K: Record, V: Record>(kind: &str) -> u64 {
    schema(kind, &[K::schema(), V::schema()])
}

impl<K: Record, V: Record> Table<K, V> {
    /// A table whose headers are kept by `home`, none of them loaded.
    pub(crate) fn over(opened: Rc<Opened>, home: Home) -> Self {
        let slots = Slots::new(Rc::clone(&opened.shared), home);
        Self { slots, opened, scratch: Scratch::default() }
    }

    /// Builds this process's view again, after groups were attached or released.
    ///
    /// # Errors
    /// When a new group holds the table with other types.
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        if let Some(opened) = Rc::get_mut(&mut self.opened) {
            opened.reload(txn)?;
        }
        self.slots.reload(&self.opened);
        Ok(())
    }

    /// Asks for the memory that a lookup of this hash will touch first.
    #[inline(always)]
    pub fn prefetch(&self, hash: KeyHash) {
        self.slots.prefetch(self.slots.group(hash), hash.0);
    }

    /// The value of a key.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, hash: KeyHash, key: Item<'_, K>) -> Option<Item<'_, V>> {
        let group = self.slots.group(hash);
        let slot = self.slots.find(group, hash.0, key.bytes())?;
        Some(self.value(group, slot))
    }

    /// Whether the key has a value.
    #[inline(always)]
    #[must_use]
    pub fn contains(&self, hash: KeyHash, key: Item<'_, K>) -> bool {
        self.slots.find(self.slots.group(hash), hash.0, key.bytes()).is_some()
    }

    #[inline(always)]
    fn value<'a>(&'a self, group: u32, slot: Slot<'a>) -> Item<'a, V> {
        if V::SIZE.is_some() {
            return stored(slot.value::<Typed<K, V>>());
        }
        let cell = Cell::of(slot.read::<Typed<K, V>, _>());
        let seg = self.slots.seg(group);
        seg.map_or_else(|| stored(&[]), |seg| seg.item(cell.at, cell.bytes as usize))
    }

    /// Changes the value of a key in place, after giving it the value `init()` when it has none.
    /// Returns the new value.
    ///
    /// # Errors
    /// When the key is new, or its value grows, and there is no memory for it; nothing is changed
    /// then.
    #[inline(always)]
    pub fn update(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        init: impl FnOnce() -> V,
        f: impl FnOnce(&mut V),
    ) -> Result<&V::View, StateError> {
        let group = self.slots.group(hash);
        let found = self.slots.find_to_write(txn, group, hash.0, key.bytes());
        if V::SIZE.is_none() {
            return self.update_archived(txn, hash, key, found, init, f);
        }
        let (slot, value, is_new) = match found {
            Some(slot) => {
                let old: Item<'_, V> = stored(slot.value::<Typed<K, V>>());
                let mut value = V::to_owned(old.view);
                f(&mut value);
                (slot, value, false)
            }
            None => {
                let mut value = init();
                f(&mut value);
                (self.slots.insert(txn, &self.opened, group, hash.0, key.bytes())?, value, true)
            }
        };
        slot.write::<Typed<K, V>>(txn, value.item(&mut self.scratch).bytes(), is_new);
        Ok(stored::<V>(slot.value::<Typed<K, V>>()).view)
    }

    /// Whether places can be found ahead for these types: see [`Table::run`].
    pub const IN_RUNS: bool = Slots::<Typed<K, V>>::IN_RUNS;

    /// First of three steps to many updates at once: asks for the memory where the keys of some
    /// records, at most [`AHEAD`](crate::AHEAD), are looked for.
    #[inline(always)]
    pub fn ask(&self, keys: impl ExactSizeIterator<Item = K> + Clone, ahead: &mut Ahead) {
        let hash = |key| key_hash(PlainKey(key).as_ref());
        self.slots.ask(keys.map(|key| KeyHash(hash(key))), ahead);
    }

    /// Second step, when that memory had time to come: finds and logs the values of the keys that
    /// were asked for.
    #[inline(always)]
    pub fn find_and_log(
        &self,
        txn: &mut Txn,
        keys: impl ExactSizeIterator<Item = K>,
        ahead: &mut Ahead,
    ) {
        self.slots.find_and_log(txn, keys.map(PlainKey), ahead);
    }

    /// Third step: the values that were found, to be changed up to the first key whose place was
    /// not; that one goes through [`Table::update`]. `keys` are the same keys again, needed when
    /// the table has changed since they were asked for. Nothing else may be done to this table
    /// while the run is used, which its borrow sees to.
    #[inline(always)]
    pub fn run<'t>(
        &'t mut self,
        txn: &mut Txn,
        keys: impl ExactSizeIterator<Item = K> + Clone,
        ahead: &'t mut Ahead,
    ) -> Run<'t, V> {
        if self.slots.found(txn, ahead).is_none() {
            self.look_again(txn, keys, ahead);
        }
        Run { values: self.slots.found(txn, ahead).unwrap_or_default(), of: PhantomData }
    }

    #[cold]
    #[inline(never)]
    fn look_again(
        &self,
        txn: &mut Txn,
        keys: impl ExactSizeIterator<Item = K> + Clone,
        ahead: &mut Ahead,
    ) {
        self.ask(keys.clone(), ahead);
        self.find_and_log(txn, keys, ahead);
    }

    #[inline(never)]
    fn update_archived(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        found: Option<Slot<'static>>,
        init: impl FnOnce() -> V,
        f: impl FnOnce(&mut V),
    ) -> Result<&V::View, StateError> {
        let group = self.slots.group(hash);
        let mut value = match found {
            Some(slot) => V::to_owned(self.value(group, slot).view),
            None => init(),
        };
        f(&mut value);
        let mut scratch = std::mem::take(&mut self.scratch);
        let put = self.put(txn, hash, key, found, value.item(&mut scratch));
        self.scratch = scratch;
        let slot = put?;
        Ok(self.value(group, slot).view)
    }

    /// Gives a key a value. True when it had none.
    ///
    /// # Errors
    /// When there is no memory for it; the old value stays then.
    #[inline]
    pub fn set(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        value: &V,
    ) -> Result<bool, StateError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let done = self.set_item(txn, hash, key, value.item(&mut scratch));
        self.scratch = scratch;
        done
    }

    /// As `set`, with a value where it lies (not in this table).
    ///
    /// # Errors
    /// As `set`.
    #[inline]
    pub fn set_item(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        value: Item<'_, V>,
    ) -> Result<bool, StateError> {
        let group = self.slots.group(hash);
        let found = self.slots.find_to_write(txn, group, hash.0, key.bytes());
        self.put(txn, hash, key, found, value)?;
        Ok(found.is_none())
    }

    /// Writes a value into the slot that was found, or into a new one.
    #[inline]
    fn put(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        found: Option<Slot<'static>>,
        value: Item<'_, V>,
    ) -> Result<Slot<'static>, StateError> {
        let group = self.slots.group(hash);
        if V::SIZE.is_some() {
            let slot = match found {
                Some(slot) => slot,
                None => self.slots.insert(txn, &self.opened, group, hash.0, key.bytes())?,
            };
            slot.write::<Typed<K, V>>(txn, value.bytes(), found.is_none());
            return Ok(slot);
        }
        let old = found.map(|slot| Cell::of(slot.read::<Typed<K, V>, _>()));
        let new = self.opened.shared.put_bytes(txn, group, old, value.bytes())?;
        let slot = match found {
            Some(slot) => slot,
            None => match self.slots.insert(txn, &self.opened, group, hash.0, key.bytes()) {
                Ok(slot) => slot,
                Err(error) => {
                    self.opened.shared.free(txn, group, new.at, u64::from(new.room));
                    return Err(error);
                }
            },
        };
        let words = new.words();
        slot.write::<Typed<K, V>>(
            txn,
            testudo_shm::zerocopy::IntoBytes::as_bytes(&words),
            found.is_none(),
        );
        Ok(slot)
    }

    /// Takes a key and its value out. False when it was not there.
    ///
    /// # Errors
    /// None at present: removing needs no memory.
    pub fn remove(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
    ) -> Result<bool, StateError> {
        let group = self.slots.group(hash);
        let Some(slot) = self.slots.find(group, hash.0, key.bytes()).map(Slot::forever) else {
            return Ok(false);
        };
        if V::SIZE.is_none() {
            let cell = Cell::of(slot.read::<Typed<K, V>, _>());
            self.opened.shared.free_cell(txn, group, cell);
        }
        self.slots.remove(txn, group, slot);
        Ok(true)
    }

    /// Keys in all held groups.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.slots.len()
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Keys in one group.
    #[must_use]
    pub fn len_of(&self, group: u32) -> u64 {
        self.slots.len_of(group)
    }

    /// Visits the entries of a group, from `cursor` (0 at first) on, about `max` of them or until
    /// `f` breaks (that entry counts as visited). Returns the cursor to go on with, `None` at the
    /// end. The cursor holds, across commits and crashes, as long as no key is added or removed.
    #[inline]
    pub fn scan<'a>(
        &'a self,
        group: u32,
        cursor: u64,
        max: usize,
        mut f: impl FnMut(KeyHash, Item<'a, K>, Item<'a, V>) -> ControlFlow<()>,
    ) -> Option<u64> {
        let base = self.slots.base(group);
        self.slots.scan(group, cursor, max, |slot| {
            let key: Item<'a, K> = stored(slot.key::<Typed<K, V>>(base));
            f(KeyHash::of(key), key, self.value(group, slot))
        })
    }

    /// Empties the table at once. The memory is freed by `sweep`, piece by piece.
    pub fn clear(&mut self, txn: &mut Txn) {
        for group in 0..self.slots.groups() {
            if self.slots.header(group) != 0 {
                self.discard(txn, group);
                self.opened.write(txn, group, HEADER_WORD, 0);
            }
        }
    }

    /// Frees what `clear` left, looking at no more than `budget` slots. True when nothing is left
    /// to free.
    pub fn sweep(&mut self, txn: &mut Txn, budget: u64) -> bool {
        sweep::<Typed<K, V>>(txn, &self.opened, DISCARDED_WORD, budget)
    }

    /// See `Slots::reserve`.
    pub(crate) fn reserve(&mut self, keys: u64) {
        self.slots.reserve(keys);
    }

    /// Reads all headers again.
    pub(crate) fn look(&mut self) {
        self.slots.reload(&self.opened);
    }

    /// Takes one group's table out of use; see `Slots::discard`.
    pub(crate) fn discard(&mut self, txn: &mut Txn, group: u32) {
        self.slots.discard(txn, &self.opened, group, DISCARDED_WORD);
    }

    /// Notes where one group's header is.
    pub(crate) fn expect(&mut self, group: u32, header: u64) {
        self.slots.expect(group, header);
    }

    /// Offset of a group's header, zero without a table.
    pub(crate) fn header(&self, group: u32) -> u64 {
        self.slots.header(group)
    }

    pub(crate) fn opened(&self) -> &Rc<Opened> {
        &self.opened
    }
}

/// A plain key seen as its bytes.
struct PlainKey<K>(K);

impl<K: Record> AsRef<[u8]> for PlainKey<K> {
    #[inline(always)]
    fn as_ref(&self) -> &[u8] {
        K::bytes_of(std::slice::from_ref(&self.0)).unwrap_or_default()
    }
}

/// Values found and logged ahead, in the order of their keys: see [`Table::run`].
#[derive(Debug)]
pub struct Run<'t, V> {
    values: &'t [*mut u8],
    of: PhantomData<&'t mut V>,
}

impl<V: Record> Run<'_, V> {
    /// Hands each value, with the item of its key, to `f`: up to the first that was not found, or
    /// for which `f` breaks. Returns how many came before that one. The same key twice has the
    /// same value twice.
    #[inline(always)]
    pub fn for_each<T>(
        self,
        items: impl Iterator<Item = T>,
        mut f: impl FnMut(&mut V, T) -> ControlFlow<()>,
    ) -> usize {
        const { assert!(!(V::SIZE.is_some() && size_of::<V>() == 0), "a record has bytes") };
        let mut done = 0;
        for (value, item) in self.values.iter().zip(items) {
            // SAFETY: runs exist for plain values only: any bit pattern is a V, of just the slot's
            // bytes, aligned in the slot; the table is borrowed as long as this run, and one value
            // is borrowed at a time.
            let Some(value) = (unsafe { value.cast::<V>().as_mut() }) else { break };
            if f(value, item).is_break() {
                break;
            }
            done += 1;
        }
        done
    }
}
