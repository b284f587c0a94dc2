//! Keyed map: user keys and values per key.
//!
//! One table per group holds the entries of all its keys, under the pair of key and user key;
//! another holds `{first entry, entries}` per key. An entry is the pair's key block: `{previous,
//! next, value}` and then `{bytes of key, key, user key}`. So get, put and remove are one lookup,
//! and iteration walks the key's entries only.
//!
//! Invariants:
//! - entries live in their key's group, whatever group the hash of the pair would belong to;
//! - the entries of a key form one doubly linked list; a key without entries has no head;
//! - an entry's value is inline when plain and a block of its own otherwise; removing an entry
//!   frees both.
//!
//! Called by user functions that keep several values per key (joins, distinct counts, per-user
//! tables).

use crate::error::StateError;
use crate::group::{Groups, Opened};
use crate::key::KeyHash;
use crate::raw::{Seg, stored};
use crate::slots::check::check;
use crate::slots::{Cell, Home, Shape, Slot, Slots, sweep};
use crate::table::{DISCARDED_WORD, HEADER_WORD, Table};
use crate::verify::Tables;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::rc::Rc;
use testudo_shm::hash::{key_hash, schema};
use testudo_shm::record::{Item, Record, Scratch};
use testudo_shm::txn::Txn;

/// `first entry, entries`.
type Head = [u64; 2];

/// Slots of the pairs: all is in the key block.
#[derive(Debug)]
struct Pairs<V>(PhantomData<fn() -> V>);

impl<V: Record> Shape for Pairs<V> {
    const KEY: Option<usize> = None;
    const KEY_ALIGN: usize = 8;
    const VALUE: usize = 0;
    const VALUE_ALIGN: usize = 8;
    const PREFIX: usize = 16 + value_bytes::<V>();
    const VALUE_IN_HEAP: bool = false;
    const PREFIX_IN_HEAP: Option<usize> = if V::SIZE.is_none() { Some(16) } else { None };
    const HASH_HAS_GROUP: bool = false;
}

const fn value_bytes<V: Record>() -> usize {
    match V::SIZE {
        Some(bytes) => bytes.next_multiple_of(8),
        None => size_of::<Cell>(),
    }
}

/// Offsets in an entry's block, behind its length.
const PREVIOUS_AT: u64 = 8;
const NEXT_AT: u64 = 16;
const VALUE_AT: u64 = 24;

/// A map from `UK` to `UV` per key.
#[derive(Debug)]
pub struct Map<K: Record, UK: Record, UV: Record> {
    heads: Table<K, Head>,
    pairs: Slots<Pairs<UV>>,
    opened: Rc<Opened>,
    /// Buffer for pairs; borrowed within one call only.
    pair: RefCell<Scratch>,
    value: Scratch,
    of: PhantomData<fn() -> UK>,
}

impl Groups {
    /// Opens the map of that name, in all groups that are held. It takes two of the operator's
    /// named states.
    ///
    /// # Errors
    /// When it exists with other types, is open already, or there is no room for another name.
    pub fn map<K: Record, UK: Record, UV: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
    ) -> Result<Map<K, UK, UV>, StateError> {
        let [(entries, expected), _] = states_of::<K, UK, UV>(name);
        let opened = Rc::new(Opened::new(self, txn, &entries, expected)?);
        let by = Tables::Root(HEADER_WORD);
        opened.shared.check_by(&entries, by, check::<Pairs<UV>>);
        Ok(Map::over(opened, self.table_as(txn, name, KIND)?))
    }
}

/// What the table of heads is.
const KIND: &str = "map";

/// The named states that a map takes, with their schemas: entries, and heads.
pub(crate) fn states_of<K: Record, UK: Record, UV: Record>(name: &str) -> [(String, u64); 2] {
    let entries = schema("map", &[K::schema(), UK::schema(), UV::schema()]);
    let heads = crate::table::schema_of::<K, Head>(KIND);
    [(format!("{name}/entries"), entries), (name.to_owned(), heads)]
}

impl<K: Record, UK: Record, UV: Record> Map<K, UK, UV> {
    /// The map whose entries are behind this root, and whose heads are in this table.
    pub(crate) fn over(opened: Rc<Opened>, heads: Table<K, Head>) -> Self {
        let mut pairs = Slots::new(Rc::clone(&opened.shared), Home::Root(HEADER_WORD));
        pairs.reload(&opened);
        let (pair, value) = (RefCell::default(), Scratch::default());
        Self { heads, pairs, opened, pair, value, of: PhantomData }
    }

    /// The keys that have entries.
    pub(crate) fn heads(&self) -> &Table<K, [u64; 2]> {
        &self.heads
    }

    /// Entries of all keys of a group.
    pub(crate) fn entries(&self, group: u32) -> u64 {
        self.pairs.len_of(group)
    }

    /// Tables that are made from here on have room for so many keys, and entries.
    pub(crate) fn reserve(&mut self, keys: u64, entries: u64) {
        self.heads.reserve(keys);
        self.pairs.reserve(entries);
    }

    /// Takes all entries of all keys out at once; `sweep` frees them.
    pub(crate) fn discard(&mut self, txn: &mut Txn) {
        for group in 0..self.pairs.groups() {
            if self.pairs.header(group) != 0 {
                self.pairs.discard(txn, &self.opened, group, DISCARDED_WORD);
                self.opened.write(txn, group, HEADER_WORD, 0);
            }
        }
        self.heads.clear(txn);
    }

    /// Frees what `discard` left, looking at no more than `budget` slots of each table. True when
    /// nothing is left.
    pub(crate) fn sweep(&mut self, txn: &mut Txn, budget: u64) -> bool {
        let are_gone = sweep::<Pairs<UV>>(txn, &self.opened, DISCARDED_WORD, budget);
        self.heads.sweep(txn, budget) && are_gone
    }
}

/// Where a pair lives: its group, its hash and its bytes.
struct Pair<'a> {
    group: u32,
    hash: u64,
    bytes: &'a [u8],
}

impl<K: Record, UK: Record, UV: Record> Map<K, UK, UV> {
    /// Builds this process's view again, after groups were attached or released.
    ///
    /// # Errors
    /// As [`Table::reload`].
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        if let Some(opened) = Rc::get_mut(&mut self.opened) {
            opened.reload(txn)?;
        }
        self.pairs.reload(&self.opened);
        self.heads.reload(txn)
    }

    /// See [`Table::prefetch`].
    #[inline(always)]
    pub fn prefetch(&self, hash: KeyHash) {
        self.heads.prefetch(hash);
    }

    /// The value under a user key.
    #[must_use]
    pub fn get(
        &self,
        hash: KeyHash,
        key: Item<'_, K>,
        user_key: Item<'_, UK>,
    ) -> Option<Item<'_, UV>> {
        let mut scratch = self.pair.borrow_mut();
        let pair = pair(self.pairs.groups(), hash, key, user_key, &mut scratch);
        let slot = self.pairs.find(pair.group, pair.hash, pair.bytes)?;
        let seg = self.pairs.seg(pair.group)?;
        Some(value_of(seg, slot.block()))
    }

    /// Puts a value under a user key. True when there was none.
    ///
    /// # Errors
    /// When there is no memory for it; the map is as before then.
    pub fn put(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        user_key: Item<'_, UK>,
        value: &UV,
    ) -> Result<bool, StateError> {
        let mut scratch = std::mem::take(&mut self.value);
        let done = self.put_item(txn, hash, key, user_key, value.item(&mut scratch));
        self.value = scratch;
        done
    }

    /// As `put`, with a value where it lies.
    ///
    /// # Errors
    /// As `put`.
    pub fn put_item(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        user_key: Item<'_, UK>,
        value: Item<'_, UV>,
    ) -> Result<bool, StateError> {
        let pair = pair(self.pairs.groups(), hash, key, user_key, self.pair.get_mut());
        let group = pair.group;
        let (shared, seg) = (&self.opened.shared, self.opened.shared.seg(group)?);
        let found = self.pairs.find_to_write(txn, group, pair.hash, pair.bytes);
        if let Some(slot) = found {
            let at = slot.block() + VALUE_AT;
            if UV::SIZE.is_some() {
                seg.log(txn, at, value.bytes().len());
                seg.fill(txn, at, value.bytes());
            } else {
                let old = Cell::of(seg.read(at));
                let new = shared.put_bytes(txn, group, Some(old), value.bytes())?;
                seg.write(txn, at, new.words());
            }
            return Ok(false);
        }
        let cell = match UV::SIZE {
            Some(_) => None,
            None => Some(shared.put_bytes(txn, group, None, value.bytes())?),
        };
        let slot = match self.pairs.insert(txn, &self.opened, group, pair.hash, pair.bytes) {
            Ok(slot) => slot,
            Err(error) => {
                if let Some(cell) = cell {
                    shared.free_cell(txn, group, cell);
                }
                return Err(error);
            }
        };
        match cell {
            Some(cell) => seg.write_fresh(txn, slot.block() + VALUE_AT, cell.words()),
            None => seg.fill(txn, slot.block() + VALUE_AT, value.bytes()),
        }
        if let Err(error) = self.link(txn, hash, key, seg, slot.block()) {
            if let Some(cell) = cell {
                self.opened.shared.free_cell(txn, group, cell);
            }
            self.pairs.remove(txn, group, slot);
            return Err(error);
        }
        Ok(true)
    }

    /// Puts a new entry at the front of its key's list.
    fn link(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        seg: Seg,
        entry: u64,
    ) -> Result<(), StateError> {
        let [first, entries] = self.head(hash, key);
        self.heads.set(txn, hash, key, &[entry, entries + 1])?;
        seg.write_fresh(txn, entry + PREVIOUS_AT, [0, first]);
        if first != 0 {
            seg.write(txn, first + PREVIOUS_AT, entry);
        }
        Ok(())
    }

    fn head(&self, hash: KeyHash, key: Item<'_, K>) -> Head {
        self.heads.get(hash, key).map_or([0; 2], |head| *head.view)
    }

    /// Takes a user key and its value out. False when it was not there.
    ///
    /// # Errors
    /// When the key's group is not held here.
    pub fn remove(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        user_key: Item<'_, UK>,
    ) -> Result<bool, StateError> {
        let pair = pair(self.pairs.groups(), hash, key, user_key, self.pair.get_mut());
        let group = pair.group;
        let seg = self.opened.shared.seg(group)?;
        let found = self.pairs.find(group, pair.hash, pair.bytes).map(Slot::forever);
        let Some(slot) = found else { return Ok(false) };
        let entry = slot.block();
        let [previous, next]: [u64; 2] = seg.read(entry + PREVIOUS_AT);
        if next != 0 {
            seg.write(txn, next + PREVIOUS_AT, previous);
        }
        if previous != 0 {
            seg.write(txn, previous + NEXT_AT, next);
        }
        let [first, entries] = self.head(hash, key);
        if entries == 1 {
            self.heads.remove(txn, hash, key)?;
        } else {
            let first = if previous == 0 { next } else { first };
            self.heads.set(txn, hash, key, &[first, entries - 1])?;
        }
        self.drop_entry(txn, group, seg, slot);
        Ok(true)
    }

    fn drop_entry(&mut self, txn: &mut Txn, group: u32, seg: Seg, slot: Slot<'static>) {
        if UV::SIZE.is_none() {
            let cell = Cell::of(seg.read(slot.block() + VALUE_AT));
            self.opened.shared.free_cell(txn, group, cell);
        }
        self.pairs.remove(txn, group, slot);
    }

    /// Takes all entries of the key out; how many there were.
    ///
    /// # Errors
    /// When the key's group is not held here.
    pub fn clear(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
    ) -> Result<u64, StateError> {
        let [mut entry, entries] = self.head(hash, key);
        let group = hash.group(self.pairs.groups());
        let seg = self.opened.shared.seg(group)?;
        while entry != 0 {
            let next = seg.read(entry + NEXT_AT);
            let (pair, _) = pair_in::<UV>(seg, entry);
            let hash = pair_hash(hash, user_key_in(pair));
            if let Some(slot) = self.pairs.find(group, hash, pair).map(Slot::forever) {
                self.drop_entry(txn, group, seg, slot);
            }
            entry = next;
        }
        self.heads.remove(txn, hash, key)?;
        Ok(entries)
    }

    /// The key's user keys and values, newest key first.
    #[must_use]
    pub fn iter(&self, hash: KeyHash, key: Item<'_, K>) -> MapIter<'_, UK, UV> {
        let [next, left] = self.head(hash, key);
        let seg = self.pairs.seg(hash.group(self.pairs.groups()));
        MapIter { seg, next, left, of: PhantomData }
    }

    /// How many entries the key has.
    #[must_use]
    pub fn len(&self, hash: KeyHash, key: Item<'_, K>) -> u64 {
        self.head(hash, key)[1]
    }

    /// True when the key has no entry.
    #[must_use]
    pub fn is_empty(&self, hash: KeyHash, key: Item<'_, K>) -> bool {
        self.len(hash, key) == 0
    }
}

/// Hash of a pair, of both hashes.
fn pair_hash(hash: KeyHash, user_key: &[u8]) -> u64 {
    let mixed = (hash.0.rotate_left(32) ^ key_hash(user_key)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 32)
}

/// Encodes `{bytes of key, key, user key}`.
fn pair<'a, K: Record, UK: Record>(
    groups: u32,
    hash: KeyHash,
    key: Item<'_, K>,
    user_key: Item<'_, UK>,
    scratch: &'a mut Scratch,
) -> Pair<'a> {
    let (key, user_key) = (key.bytes(), user_key.bytes());
    let user_at = 8 + key.len().next_multiple_of(8);
    let len = user_at + user_key.len();
    let buffer = &mut scratch.buffer(len)[..len];
    buffer[..8].copy_from_slice(&(key.len() as u64).to_le_bytes());
    buffer[8..8 + key.len()].copy_from_slice(key);
    buffer[8 + key.len()..user_at].fill(0);
    buffer[user_at..].copy_from_slice(user_key);
    Pair { group: hash.group(groups), hash: pair_hash(hash, user_key), bytes: buffer }
}

/// The pair's bytes in an entry, and where they begin.
fn pair_in<'a, UV: Record>(seg: Seg, entry: u64) -> (&'a [u8], u64) {
    let at = entry + Pairs::<UV>::KEY_IN_BLOCK;
    (seg.bytes(at, seg.read::<u64>(entry) as usize), at)
}

/// The user key in a pair's bytes.
fn user_key_in(pair: &[u8]) -> &[u8] {
    let bytes = pair.first_chunk().map_or(0, |first| u64::from_le_bytes(*first)) as usize;
    pair.get(8 + bytes.next_multiple_of(8)..).unwrap_or(&[])
}

fn value_of<'a, UV: Record>(seg: Seg, entry: u64) -> Item<'a, UV> {
    match UV::SIZE {
        Some(bytes) => seg.item(entry + VALUE_AT, bytes),
        None => {
            let cell = Cell::of(seg.read(entry + VALUE_AT));
            seg.item(cell.at, cell.bytes as usize)
        }
    }
}

/// The entries of one key.
#[derive(Debug)]
pub struct MapIter<'a, UK: Record, UV: Record> {
    seg: Option<Seg>,
    next: u64,
    left: u64,
    of: PhantomData<&'a (UK, UV)>,
}

impl<'a, UK: Record, UV: Record> Iterator for MapIter<'a, UK, UV> {
    type Item = (Item<'a, UK>, Item<'a, UV>);

    fn next(&mut self) -> Option<Self::Item> {
        let (seg, entry) = (self.seg?, self.next);
        if entry == 0 {
            return None;
        }
        self.next = seg.read(entry + NEXT_AT);
        self.left -= 1;
        let (pair, _) = pair_in::<UV>(seg, entry);
        Some((stored(user_key_in(pair)), value_of(seg, entry)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}
