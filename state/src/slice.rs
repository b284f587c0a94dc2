//! Window state: one table per slice (pane) of event time, dropped whole when the window has fired.
//!
//! A group's root holds a directory of `{slice id, table header}` pairs; tables are made when a
//! slice's first key reaches the group.
//!
//! Invariants:
//! - a dropped slice is out of all directories in the step that dropped it; its memory is freed by
//!   `sweep`, bounded per call;
//! - the open slices are sorted by id in this process, in no order in the segment;
//! - the slice last used is found without a search.
//!
//! Called by window operators: `update` per record, `scan` and `get` when firing.

use crate::error::StateError;
use crate::group::{Groups, Opened};
use crate::key::KeyHash;
use crate::raw::Seg;
use crate::slots::check::check;
use crate::slots::{Home, sweep};
use crate::table::{DISCARDED_WORD, Table, Typed};
use crate::verify::{Tables, bump, is_block};
use std::rc::Rc;
use testudo_shm::hash::schema;
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::Txn;

/// Root words: the directory's block, its entries, and for how many it has room.
const DIRECTORY_WORD: u64 = 2;
const ENTRIES_WORD: u64 = 3;
const ROOM_WORD: u64 = 4;
const ENTRY_BYTES: u64 = 16;
const ROOM_MIN: u64 = 16;

/// The directory that a root's six words point to, if they are those of slices: offset and bytes.
pub(crate) fn directory(words: [u64; 6]) -> Option<(u64, u64)> {
    let [at, entries, room] = [DIRECTORY_WORD, ENTRIES_WORD, ROOM_WORD].map(|n| words[n as usize]);
    let is_one = entries > 0 && entries <= room && room.is_power_of_two();
    is_one.then_some((at, entries.checked_mul(ENTRY_BYTES)?))
}

/// Tables from `K` to `V`, one per slice.
#[derive(Debug)]
pub struct Slices<K: Record, V: Record> {
    opened: Rc<Opened>,
    /// Sorted by id.
    open: Vec<Slice<K, V>>,
    /// Index of the slice last used.
    current: usize,
}

#[derive(Debug)]
struct Slice<K: Record, V: Record> {
    id: i64,
    table: Table<K, V>,
}

impl Groups {
    /// Opens the slices of that name, in all groups that are held.
    ///
    /// # Errors
    /// When they exist with other types, are open already, or there is no room for another name.
    pub fn slices<K: Record, V: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
    ) -> Result<Slices<K, V>, StateError> {
        let opened = Rc::new(Opened::new(self, txn, name, schema_of::<K, V>())?);
        opened.shared.check_by(name, Tables::Slices, check::<Typed<K, V>>);
        Ok(Slices::over(opened))
    }
}

/// Schema of the root of slices.
pub(crate) fn schema_of<K: Record, V: Record>() -> u64 {
    schema("slices", &[K::schema(), V::schema()])
}

/// Makes the directory of a group that has none, with room for as many slices as another one of its
/// group has.
pub(crate) fn reserve_as(
    opened: &Opened,
    other: &Opened,
    txn: &mut Txn,
    group: u32,
) -> Result<(), StateError> {
    let room = other.read(group, ROOM_WORD);
    if room > 0 && opened.read(group, ROOM_WORD) == 0 {
        let at = opened.shared.alloc(txn, group, room * ENTRY_BYTES)?.at;
        opened.write(txn, group, DIRECTORY_WORD, at);
        opened.write(txn, group, ROOM_WORD, room);
    }
    Ok(())
}

/// The directory of a group without slices goes.
pub(crate) fn drop_directory(opened: &Opened, txn: &mut Txn, group: u32) {
    let (at, room) = (opened.read(group, DIRECTORY_WORD), opened.read(group, ROOM_WORD));
    if room > 0 && opened.read(group, ENTRIES_WORD) == 0 {
        opened.write(txn, group, DIRECTORY_WORD, 0);
        opened.write(txn, group, ROOM_WORD, 0);
        opened.shared.free(txn, group, at, room * ENTRY_BYTES);
    }
}

/// Whether a root's words can be a directory's.
fn directory_is_sound(seg: Seg, words: u64) -> Result<(), String> {
    let word = |word: u64| seg.read::<u64>(words + word * 8);
    let [at, entries, room] = [DIRECTORY_WORD, ENTRIES_WORD, ROOM_WORD].map(word);
    let bytes = room.checked_mul(ENTRY_BYTES);
    let is_here = bytes.is_some_and(|bytes| is_block(at, bytes, bump(seg)));
    if entries > room || (room > 0 && !is_here) {
        return Err(format!("its {entries} slices are listed at {at}, with room for {room}"));
    }
    Ok(())
}

/// Headers of all tables of a group's slices.
pub(crate) fn headers(seg: Seg, words: u64) -> Result<Vec<u64>, String> {
    directory_is_sound(seg, words)?;
    let at: u64 = seg.read(words + DIRECTORY_WORD * 8);
    let entries = 0..seg.read::<u64>(words + ENTRIES_WORD * 8);
    Ok(entries.map(|entry| seg.read::<[u64; 2]>(at + entry * ENTRY_BYTES)[1]).collect())
}

impl<K: Record, V: Record> Slices<K, V> {
    /// The slices behind this root.
    pub(crate) fn over(opened: Rc<Opened>) -> Self {
        let mut slices = Self { opened, open: Vec::new(), current: 0 };
        slices.load();
        slices
    }

    pub(crate) fn opened(&self) -> &Rc<Opened> {
        &self.opened
    }

    /// Builds this process's view again, after groups were attached or released.
    ///
    /// # Errors
    /// When a new group holds the slices with other types.
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        self.open.clear();
        if let Some(opened) = Rc::get_mut(&mut self.opened) {
            opened.reload(txn)?;
        }
        self.load();
        Ok(())
    }

    fn load(&mut self) {
        let opened = Rc::clone(&self.opened);
        for group in opened.shared.owned() {
            let Some(seg) = opened.shared.try_seg(group).filter(|_| opened.has(group)) else {
                continue;
            };
            let front = opened.shared.front(group).unwrap_or(seg);
            let directory = opened.glance(group, DIRECTORY_WORD);
            if let Err(what) = directory_is_sound(front, opened.word(group, 0)) {
                crate::verify::unsound(seg.base(), &what);
            }
            for entry in 0..opened.glance(group, ENTRIES_WORD) {
                let [id, header] = seg.read::<[u64; 2]>(directory + entry * ENTRY_BYTES);
                self.slice(id.cast_signed()).expect(group, header);
            }
        }
    }

    /// The table of a slice, opened if it is not.
    #[inline(always)]
    pub fn slice(&mut self, id: i64) -> &mut Table<K, V> {
        let is_current = self.open.get(self.current).is_some_and(|slice| slice.id == id);
        if !is_current {
            self.select(id);
        }
        &mut self.open[self.current].table
    }

    #[cold]
    #[inline(never)]
    fn select(&mut self, id: i64) {
        self.current = match self.open.binary_search_by_key(&id, |slice| slice.id) {
            Ok(index) => index,
            Err(index) => {
                let table = Table::over(Rc::clone(&self.opened), Home::Slice(id));
                self.open.insert(index, Slice { id, table });
                index
            }
        };
    }

    /// The table of a slice that is open.
    #[must_use]
    pub fn get_slice(&self, id: i64) -> Option<&Table<K, V>> {
        let index = self.open.binary_search_by_key(&id, |slice| slice.id).ok()?;
        Some(&self.open[index].table)
    }

    /// Ids of the open slices, oldest first.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = i64> + '_ {
        self.open.iter().map(|slice| slice.id)
    }

    /// The oldest open slice.
    #[must_use]
    pub fn oldest(&self) -> Option<i64> {
        self.open.first().map(|slice| slice.id)
    }

    /// The table of the slice last used, if that is this one.
    #[inline(always)]
    #[must_use]
    pub fn in_use(&self, id: i64) -> Option<&Table<K, V>> {
        self.open.get(self.current).filter(|slice| slice.id == id).map(|slice| &slice.table)
    }

    /// Asks for the memory that an update of this slice and hash will touch first.
    #[inline(always)]
    pub fn prefetch(&self, id: i64, hash: KeyHash) {
        if let Some(slice) = self.open.get(self.current)
            && slice.id == id
        {
            slice.table.prefetch(hash);
        } else if let Some(table) = self.get_slice(id) {
            table.prefetch(hash);
        }
    }

    /// See [`Table::update`].
    ///
    /// # Errors
    /// As [`Table::update`].
    #[inline(always)]
    pub fn update(
        &mut self,
        txn: &mut Txn,
        id: i64,
        hash: KeyHash,
        key: Item<'_, K>,
        init: impl FnOnce() -> V,
        f: impl FnOnce(&mut V),
    ) -> Result<&V::View, StateError> {
        self.slice(id).update(txn, hash, key, init, f)
    }

    /// The value of a key in a slice.
    #[inline]
    #[must_use]
    pub fn get(&self, id: i64, hash: KeyHash, key: Item<'_, K>) -> Option<Item<'_, V>> {
        self.get_slice(id)?.get(hash, key)
    }

    /// Drops a slice whole, in all held groups. Its memory is freed by `sweep`. False when it was
    /// not open.
    pub fn drop_slice(&mut self, txn: &mut Txn, id: i64) -> bool {
        let Ok(index) = self.open.binary_search_by_key(&id, |slice| slice.id) else {
            return false;
        };
        let mut slice = self.open.remove(index);
        self.current = 0;
        for group in 0..self.opened.shared.groups {
            if slice.table.header(group) != 0 {
                remove_from_directory(&self.opened, txn, group, slice.table.header(group));
                slice.table.discard(txn, group);
            }
        }
        true
    }

    /// Frees what dropped slices left, looking at no more than `budget` slots. True when nothing is
    /// left to free.
    pub fn sweep(&mut self, txn: &mut Txn, budget: u64) -> bool {
        sweep::<Typed<K, V>>(txn, &self.opened, DISCARDED_WORD, budget)
    }
}

/// Notes a slice's new table in its group.
pub(crate) fn add_to_directory(
    opened: &Opened,
    txn: &mut Txn,
    group: u32,
    id: i64,
    header: u64,
) -> Result<(), StateError> {
    let seg = opened.shared.seg(group)?;
    let mut directory = opened.read(group, DIRECTORY_WORD);
    let (entries, room) = (opened.read(group, ENTRIES_WORD), opened.read(group, ROOM_WORD));
    if entries == room {
        let wider = (room * 2).max(ROOM_MIN);
        let new = opened.shared.alloc(txn, group, wider * ENTRY_BYTES)?.at;
        if room != 0 {
            let bytes = seg.bytes(directory, (entries * ENTRY_BYTES) as usize);
            seg.fill(txn, new, bytes);
            opened.shared.free(txn, group, directory, room * ENTRY_BYTES);
        }
        opened.write(txn, group, DIRECTORY_WORD, new);
        opened.write(txn, group, ROOM_WORD, wider);
        directory = new;
    }
    // Logged: an entry removed in this step may have stood here.
    seg.write(txn, directory + entries * ENTRY_BYTES, [id.cast_unsigned(), header]);
    opened.write(txn, group, ENTRIES_WORD, entries + 1);
    Ok(())
}

fn remove_from_directory(opened: &Opened, txn: &mut Txn, group: u32, header: u64) {
    let Some(seg) = opened.shared.try_seg(group) else { return };
    let directory = opened.read(group, DIRECTORY_WORD);
    let entries = opened.read(group, ENTRIES_WORD);
    for entry in 0..entries {
        let at = directory + entry * ENTRY_BYTES;
        if seg.read::<[u64; 2]>(at)[1] == header {
            let last: [u64; 2] = seg.read(directory + (entries - 1) * ENTRY_BYTES);
            seg.write(txn, at, last);
            opened.write(txn, group, ENTRIES_WORD, entries - 1);
            return;
        }
    }
}
