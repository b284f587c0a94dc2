//! Keyed value: one record per key. A table by another name, so that a job's text says what it
//! means.
//!
//! Invariants: those of `table`; a value and a table of one name are different states.
//! Called by user functions that keep one value per key, of any record type.

use crate::error::StateError;
use crate::group::Groups;
use crate::key::KeyHash;
use crate::table::Table;
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::Txn;

/// One value of type `V` per key.
#[derive(Debug)]
pub struct Value<K: Record, V: Record> {
    table: Table<K, V>,
}

impl Groups {
    /// Opens the value of that name, in all groups that are held.
    ///
    /// # Errors
    /// When it exists with other types, is open already, or there is no room for another name.
    pub fn value<K: Record, V: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
    ) -> Result<Value<K, V>, StateError> {
        Ok(Value { table: self.table_as(txn, name, "value")? })
    }
}

impl<K: Record, V: Record> Value<K, V> {
    /// See [`Table::reload`].
    ///
    /// # Errors
    /// As [`Table::reload`].
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        self.table.reload(txn)
    }

    /// See [`Table::prefetch`].
    #[inline(always)]
    pub fn prefetch(&self, hash: KeyHash) {
        self.table.prefetch(hash);
    }

    /// The key's value.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, hash: KeyHash, key: Item<'_, K>) -> Option<Item<'_, V>> {
        self.table.get(hash, key)
    }

    /// See [`Table::update`].
    ///
    /// # Errors
    /// As [`Table::update`].
    #[inline(always)]
    pub fn update(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        init: impl FnOnce() -> V,
        f: impl FnOnce(&mut V),
    ) -> Result<&V::View, StateError> {
        self.table.update(txn, hash, key, init, f)
    }

    /// Gives the key a value.
    ///
    /// # Errors
    /// As [`Table::set`].
    #[inline]
    pub fn set(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        value: &V,
    ) -> Result<(), StateError> {
        self.table.set(txn, hash, key, value).map(|_| ())
    }

    /// Takes the key's value away. False when it had none.
    ///
    /// # Errors
    /// As [`Table::remove`].
    pub fn clear(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
    ) -> Result<bool, StateError> {
        self.table.remove(txn, hash, key)
    }

    /// The table underneath, for scans.
    #[must_use]
    pub fn table(&self) -> &Table<K, V> {
        &self.table
    }
}
