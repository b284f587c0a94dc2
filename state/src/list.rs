//! Keyed list: a sequence of records per key, appended to and read in order.
//!
//! The key's slot holds `{first chunk, last chunk, items}`; a chunk is `{next, bytes used, room,
//! items}` and then a batch of records as in a ring, so that items are read in place.
//!
//! Invariants:
//! - bytes beyond a chunk's `used` mean nothing, so appending logs the counters only; `used` never
//!   shrinks;
//! - chunks double from 64 bytes to 4 KiB, so short lists are small and long ones are read in long
//!   runs; a longer item has a chunk of its own size;
//! - clearing frees the chunks; a list without items has no slot.
//!
//! Called by user functions and by operators that buffer records per key.

use crate::error::StateError;
use crate::group::Groups;
use crate::heap::size_of_block;
use crate::key::KeyHash;
use crate::raw::Seg;
use crate::table::Table;
use testudo_shm::hash::schema;
use testudo_shm::record::{Batch, Item, Record, Scratch};
use testudo_shm::txn::Txn;

/// `first, last, items`.
type Head = [u64; 3];
const FIRST: usize = 0;
const LAST: usize = 1;
const ITEMS: usize = 2;

/// Offsets in a chunk: next chunk, bytes used, bytes of room, items; then the items.
const NEXT_AT: u64 = 0;
const USED_AT: u64 = 8;
const ROOM_AT: u64 = 16;
const COUNT_AT: u64 = 24;
const ITEMS_AT: u64 = 32;
const CHUNK_MIN: u64 = 64;
const CHUNK_MAX: u64 = 4096;

/// A list of `T` per key.
#[derive(Debug)]
pub struct List<K: Record, T: Record> {
    heads: Table<K, Head>,
    scratch: Scratch,
    of: std::marker::PhantomData<fn() -> T>,
}

impl Groups {
    /// Opens the list of that name, in all groups that are held.
    ///
    /// # Errors
    /// When it exists with other types, is open already, or there is no room for another name.
    pub fn list<K: Record, T: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
    ) -> Result<List<K, T>, StateError> {
        let heads = self.table_as(txn, name, &kind::<T>())?;
        Ok(List { heads, scratch: Scratch::default(), of: std::marker::PhantomData })
    }
}

/// What the table of heads is called: by it, lists of other items are told apart.
fn kind<T: Record>() -> String {
    format!("list {:016x}", schema("items", &[T::schema()]))
}

/// Schema of the root of lists of `T` by `K`.
pub(crate) fn schema_of<K: Record, T: Record>() -> u64 {
    crate::table::schema_of::<K, Head>(&kind::<T>())
}

impl<K: Record, T: Record> List<K, T> {
    /// The lists whose heads are in this table.
    pub(crate) fn over(heads: Table<K, Head>) -> Self {
        Self { heads, scratch: Scratch::default(), of: std::marker::PhantomData }
    }

    /// Tables that are made from here on have room for so many keys.
    pub(crate) fn reserve(&mut self, keys: u64) {
        self.heads.reserve(keys);
    }

    /// Frees what a key's list has, at most `budget` chunks of it, and leaves its head where it is.
    /// True when nothing is left.
    pub(crate) fn empty(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: &K,
        budget: &mut u64,
    ) -> Result<bool, StateError> {
        let mut scratch = Scratch::default();
        let key = key.item(&mut scratch);
        let (group, seg) = self.place(hash)?;
        let mut head = self.head(hash, key);
        while head[FIRST] != 0 && *budget > 0 {
            let (chunk, next) = (head[FIRST], seg.read(head[FIRST] + NEXT_AT));
            self.heads.opened().shared.free(txn, group, chunk, chunk_bytes(seg, chunk));
            head[FIRST] = next;
            *budget -= 1;
        }
        self.heads.set(txn, hash, key, &head)?;
        Ok(head[FIRST] == 0)
    }

    /// Its table.
    pub(crate) fn into_heads(self) -> Table<K, Head> {
        self.heads
    }
}

impl<K: Record, T: Record> List<K, T> {
    /// See [`Table::reload`].
    ///
    /// # Errors
    /// As [`Table::reload`].
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        self.heads.reload(txn)
    }

    /// See [`Table::prefetch`].
    #[inline(always)]
    pub fn prefetch(&self, hash: KeyHash) {
        self.heads.prefetch(hash);
    }

    fn place(&self, hash: KeyHash) -> Result<(u32, Seg), StateError> {
        let shared = &self.heads.opened().shared;
        let group = hash.group(shared.groups);
        Ok((group, shared.seg(group)?))
    }

    /// Appends an item to the key's list.
    ///
    /// # Errors
    /// When there is no memory for it; the list is as before then.
    pub fn append(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        item: &T,
    ) -> Result<(), StateError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let done = self.append_item(txn, hash, key, item.item(&mut scratch));
        self.scratch = scratch;
        done
    }

    /// As `append`, with an item where it lies.
    ///
    /// # Errors
    /// As `append`.
    pub fn append_item(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        item: Item<'_, T>,
    ) -> Result<(), StateError> {
        let (group, seg) = self.place(hash)?;
        let len = T::item_len(item) as u64;
        let mut head = self.head(hash, key);
        let last = head[LAST];
        let fits = last != 0 && {
            let (used, room): (u64, u64) = (seg.read(last + USED_AT), seg.read(last + ROOM_AT));
            room - used >= len
        };
        if !fits {
            let chunk = self.chunk(txn, group, seg, last, len)?;
            head[if last == 0 { FIRST } else { LAST }] = chunk;
            head[LAST] = chunk;
        }
        head[ITEMS] += 1;
        let chunk = head[LAST];
        let noted = self.heads.set(txn, hash, key, &head);
        if let (Err(error), false) = (&noted, fits) {
            self.heads.opened().shared.free(txn, group, chunk, chunk_bytes(seg, chunk));
            return Err(error.clone());
        }
        noted?;
        if !fits && last != 0 {
            seg.write(txn, last + NEXT_AT, chunk);
        }
        let used: u64 = seg.read(chunk + USED_AT);
        let into = seg.fresh_slice(txn, chunk + ITEMS_AT + used, len as usize);
        let put = T::put_item(item, into);
        debug_assert_eq!(put, Some(len as usize));
        seg.write(txn, chunk + USED_AT, used + len);
        let count: u64 = seg.read(chunk + COUNT_AT);
        seg.write(txn, chunk + COUNT_AT, count + 1);
        Ok(())
    }

    /// A new chunk for at least `len` bytes, twice as long as the one before.
    fn chunk(
        &self,
        txn: &mut Txn,
        group: u32,
        seg: Seg,
        last: u64,
        len: u64,
    ) -> Result<u64, StateError> {
        let before = if last == 0 { CHUNK_MIN / 2 } else { chunk_bytes(seg, last) };
        let bytes = size_of_block((before * 2).min(CHUNK_MAX).max(ITEMS_AT + len));
        let chunk = self.heads.opened().shared.alloc(txn, group, bytes)?.at;
        seg.write_fresh(txn, chunk, [0u64, 0, bytes - ITEMS_AT, 0]);
        Ok(chunk)
    }

    fn head(&self, hash: KeyHash, key: Item<'_, K>) -> Head {
        self.heads.get(hash, key).map_or([0; 3], |head| *head.view)
    }

    /// The key's items, oldest first.
    #[must_use]
    pub fn iter(&self, hash: KeyHash, key: Item<'_, K>) -> ListIter<'_, T> {
        let head = self.head(hash, key);
        let seg = self.place(hash).ok().map(|(_, seg)| seg);
        let items = batch(&[], 0).into_iter();
        ListIter { seg, next: head[FIRST], left: head[ITEMS], items }
    }

    /// How many items the key has.
    #[must_use]
    pub fn len(&self, hash: KeyHash, key: Item<'_, K>) -> u64 {
        self.head(hash, key)[ITEMS]
    }

    /// True when the key has no item.
    #[must_use]
    pub fn is_empty(&self, hash: KeyHash, key: Item<'_, K>) -> bool {
        self.len(hash, key) == 0
    }

    /// Takes all items of the key away. False when there was none.
    ///
    /// # Errors
    /// When the key's group is not held here.
    pub fn clear(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
    ) -> Result<bool, StateError> {
        let (group, seg) = self.place(hash)?;
        let mut chunk = self.head(hash, key)[FIRST];
        while chunk != 0 {
            let (next, bytes) = (seg.read(chunk + NEXT_AT), chunk_bytes(seg, chunk));
            self.heads.opened().shared.free(txn, group, chunk, bytes);
            chunk = next;
        }
        self.heads.remove(txn, hash, key)
    }

    /// Gives the key these items instead of those that it has.
    ///
    /// # Errors
    /// When there is no memory for them: then only a part was appended, and the step must not be
    /// committed.
    pub fn replace<'a>(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        items: impl IntoIterator<Item = &'a T>,
    ) -> Result<(), StateError> {
        self.clear(txn, hash, key)?;
        for item in items {
            self.append(txn, hash, key, item)?;
        }
        Ok(())
    }

    /// The keys that have items, with how many: for scans.
    #[must_use]
    pub fn heads(&self) -> &Table<K, [u64; 3]> {
        &self.heads
    }
}

fn chunk_bytes(seg: Seg, chunk: u64) -> u64 {
    seg.read::<u64>(chunk + ROOM_AT) + ITEMS_AT
}

/// The records that a chunk holds.
fn batch<'a, T: Record>(bytes: &'a [u8], items: u64) -> Batch<'a, T> {
    crate::raw::stored_batch(bytes, items as usize)
}

/// The items of one list, in order.
#[derive(Debug)]
pub struct ListIter<'a, T: Record> {
    seg: Option<Seg>,
    next: u64,
    left: u64,
    items: testudo_shm::record::Items<'a, T>,
}

impl<'a, T: Record> Iterator for ListIter<'a, T> {
    type Item = Item<'a, T>;

    fn next(&mut self) -> Option<Item<'a, T>> {
        loop {
            if let Some(item) = self.items.next() {
                self.left -= 1;
                return Some(item);
            }
            let seg = self.seg?;
            if self.next == 0 {
                return None;
            }
            let used: u64 = seg.read(self.next + USED_AT);
            let count: u64 = seg.read(self.next + COUNT_AT);
            self.items = batch(seg.bytes(self.next + ITEMS_AT, used as usize), count).into_iter();
            self.next = seg.read(self.next + NEXT_AT);
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}
