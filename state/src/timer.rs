//! Event-time timers: a set of (time, key) per group, popped in time order.
//!
//! A table finds the timer of a time and key; a binary heap orders them. A timer is the table's key
//! block: `{place in the heap}` and then `{time, key}`; a heap entry is `{time, block}`. The heap's
//! array is a list of chunks that double in size and never move.
//!
//! Invariants:
//! - entry *i* of the heap points to a block whose place is *i*; every block of the table is in the
//!   heap once;
//! - no entry is earlier than its parent; entries of the same time come in no promised order;
//! - the smallest time of each group, and of all, is cached in this process, so that a watermark
//!   that makes nothing due costs one comparison.
//!
//! Called by operators with timers: `register` and `delete` from user code, `pop` or `due` when the
//! watermark moves.

use crate::error::StateError;
use crate::group::{Groups, LIVELY_WORD, Opened};
use crate::key::KeyHash;
use crate::raw::{Seg, stored};
use crate::slots::check::check;
use crate::slots::{Home, Shape, Slot, Slots};
use crate::table::HEADER_WORD;
use crate::verify::Tables;
use std::marker::PhantomData;
use testudo_shm::hash::{key_hash, schema};
use testudo_shm::record::{Item, Record, Scratch};
use testudo_shm::txn::Txn;

/// Root words: the heap's length, and the block that lists its chunks.
const LEN_WORD: u64 = LIVELY_WORD;
const CHUNKS_WORD: u64 = 3;
/// Offsets in a timer's block, behind its length.
const PLACE_AT: u64 = 8;
const TIME_AT: u64 = 16;
const KEY_AT: usize = 8;
const ENTRY_BYTES: u64 = 16;
/// Entries in the first chunk; the next ones double.
const CHUNK_LOG2: u32 = 4;
const CHUNKS_MAX: u64 = 32;
/// No timer.
const NEVER: i64 = i64::MAX;

/// Slots of the timers: all is in the key block.
#[derive(Debug)]
struct Timed;

impl Shape for Timed {
    const KEY: Option<usize> = None;
    const KEY_ALIGN: usize = 8;
    const VALUE: usize = 0;
    const VALUE_ALIGN: usize = 8;
    const PREFIX: usize = 8;
    const VALUE_IN_HEAP: bool = false;
    const PREFIX_IN_HEAP: Option<usize> = None;
}

/// Timers of one operator.
#[derive(Debug)]
pub struct Timers<K: Record> {
    blocks: Slots<Timed>,
    opened: Opened,
    /// Time of each group's first timer.
    firsts: Box<[i64]>,
    /// The least of them.
    first: i64,
    scratch: Scratch,
    of: PhantomData<fn() -> K>,
}

/// A timer that was popped: its time, and a copy of its key.
#[derive(Debug)]
pub struct DueTimer<K: Record> {
    time: i64,
    hash: KeyHash,
    bytes: usize,
    scratch: Scratch,
    of: PhantomData<fn() -> K>,
}

impl<K: Record> Default for DueTimer<K> {
    fn default() -> Self {
        Self {
            time: NEVER,
            hash: KeyHash(0),
            bytes: 0,
            scratch: Scratch::default(),
            of: PhantomData,
        }
    }
}

impl<K: Record> DueTimer<K> {
    /// When it was due.
    #[must_use]
    pub fn time(&self) -> i64 {
        self.time
    }

    /// Hash of its key.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        self.hash
    }

    /// Its key.
    ///
    /// # Panics
    /// Before anything was popped into it.
    #[must_use]
    pub fn key(&self) -> Item<'_, K> {
        assert!(self.time != NEVER, "no timer was popped yet");
        stored(&self.scratch.bytes()[..self.bytes])
    }
}

/// One group's heap, as offsets.
#[derive(Debug, Clone, Copy)]
struct Heap {
    seg: Seg,
    chunks: u64,
}

impl Heap {
    /// Offset of an entry.
    fn at(self, index: u64) -> u64 {
        let (chunk, within) = place(index);
        self.seg.read::<u64>(self.chunks + chunk * 8) + within * ENTRY_BYTES
    }

    /// Time and block of an entry.
    fn entry(self, index: u64) -> (i64, u64) {
        let [time, block] = self.seg.read::<[u64; 2]>(self.at(index));
        (time.cast_signed(), block)
    }

    /// Puts an entry at an index. Logged, even at the end: an entry removed in this step may have
    /// stood there.
    fn put(self, txn: &mut Txn, index: u64, (time, block): (i64, u64)) {
        self.seg.write(txn, self.at(index), [time.cast_unsigned(), block]);
        self.seg.write(txn, block + PLACE_AT, index);
    }

    /// Moves an entry that belongs at or above `index` to its place.
    fn rise(self, txn: &mut Txn, mut index: u64, entry: (i64, u64)) {
        while index > 0 {
            let parent = (index - 1) / 2;
            let above = self.entry(parent);
            if above.0 <= entry.0 {
                break;
            }
            self.put(txn, index, above);
            index = parent;
        }
        self.put(txn, index, entry);
    }

    /// Moves an entry that belongs at or below `index` to its place, in a heap of `len` entries.
    fn sink(self, txn: &mut Txn, mut index: u64, len: u64, entry: (i64, u64)) {
        loop {
            let mut child = 2 * index + 1;
            if child >= len {
                break;
            }
            let mut below = self.entry(child);
            if child + 1 < len {
                let right = self.entry(child + 1);
                if right.0 < below.0 {
                    (child, below) = (child + 1, right);
                }
            }
            if below.0 >= entry.0 {
                break;
            }
            self.put(txn, index, below);
            index = child;
        }
        self.put(txn, index, entry);
    }
}

/// Chunk of a heap index, and place in it.
fn place(index: u64) -> (u64, u64) {
    let shifted = index + (1 << CHUNK_LOG2);
    let log2 = shifted.ilog2();
    (u64::from(log2 - CHUNK_LOG2), shifted - (1 << log2))
}

impl Groups {
    /// Opens the timers of that name, in all groups that are held.
    ///
    /// # Errors
    /// When they exist with another key type, are open already, or there is no room for another
    /// name.
    pub fn timers<K: Record>(&self, txn: &mut Txn, name: &str) -> Result<Timers<K>, StateError> {
        let opened = Opened::new(self, txn, name, schema("timers", &[K::schema()]))?;
        let shared = &opened.shared;
        shared.check_by(name, Tables::Root(HEADER_WORD), check_blocks);
        let blocks = Slots::new(std::rc::Rc::clone(shared), Home::Root(HEADER_WORD));
        let firsts = vec![NEVER; shared.groups as usize].into_boxed_slice();
        let scratch = Scratch::default();
        let of = PhantomData;
        let mut timers = Timers { blocks, opened, firsts, first: NEVER, scratch, of };
        timers.load();
        Ok(timers)
    }
}

impl<K: Record> Timers<K> {
    /// Builds this process's view again, after groups were attached or released.
    ///
    /// # Errors
    /// When a new group holds the timers with another key type.
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        self.opened.reload(txn)?;
        self.load();
        Ok(())
    }

    fn load(&mut self) {
        self.blocks.reload(&self.opened);
        self.firsts.fill(NEVER);
        self.first = NEVER;
        for group in 0..self.opened.shared.groups {
            if self.opened.glance(group, LEN_WORD) > 0 {
                self.note_first(group);
            }
        }
    }

    /// Caches a group's first time again, and the first of all.
    fn note_first(&mut self, group: u32) {
        let held = self.opened.shared.try_seg(group);
        let first = match held {
            Some(seg) if self.opened.read(group, LEN_WORD) > 0 => {
                Heap { seg, chunks: self.opened.read(group, CHUNKS_WORD) }.entry(0).0
            }
            _ => NEVER,
        };
        self.firsts[group as usize] = first;
        self.first = self.firsts.iter().copied().min().unwrap_or(NEVER);
    }

    fn heap(&self, group: u32) -> Result<Heap, StateError> {
        let seg = self.opened.shared.seg(group)?;
        Ok(Heap { seg, chunks: self.opened.read(group, CHUNKS_WORD) })
    }

    /// Sets a timer for a key. False when the same one was set already. A time of `i64::MAX` is
    /// never due and not kept.
    ///
    /// # Errors
    /// When there is no memory for it; nothing is changed then.
    pub fn register(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        time: i64,
    ) -> Result<bool, StateError> {
        if time == NEVER {
            return Ok(false);
        }
        let group = self.blocks.group(hash);
        let slot_hash = slot_hash(hash, time);
        let wanted = timer_bytes(key.bytes(), time, &mut self.scratch);
        if self.blocks.find_to_write(txn, group, slot_hash, wanted).is_some() {
            return Ok(false);
        }
        let len = self.opened.read(group, LEN_WORD);
        make_room(&self.opened, txn, group, len)?;
        let slot = self.blocks.insert(txn, &self.opened, group, slot_hash, wanted)?;
        self.heap(group)?.rise(txn, len, (time, slot.block()));
        self.opened.write(txn, group, LEN_WORD, len + 1);
        if time < self.firsts[group as usize] {
            self.firsts[group as usize] = time;
            self.first = self.first.min(time);
        }
        Ok(true)
    }

    /// Takes a timer back. False when it was not set.
    ///
    /// # Errors
    /// When the key's group is not held here.
    pub fn delete(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        time: i64,
    ) -> Result<bool, StateError> {
        let group = self.blocks.group(hash);
        let wanted = timer_bytes(key.bytes(), time, &mut self.scratch);
        let found = self.blocks.find(group, slot_hash(hash, time), wanted).map(Slot::forever);
        let Some(slot) = found else { return Ok(false) };
        self.take_out(txn, group, slot)?;
        Ok(true)
    }

    /// Takes a timer out of heap and table.
    fn take_out(
        &mut self,
        txn: &mut Txn,
        group: u32,
        slot: Slot<'static>,
    ) -> Result<(), StateError> {
        let heap = self.heap(group)?;
        let index: u64 = heap.seg.read(slot.block() + PLACE_AT);
        let last = self.opened.read(group, LEN_WORD) - 1;
        self.opened.write(txn, group, LEN_WORD, last);
        if index != last {
            let moved = heap.entry(last);
            if index > 0 && heap.entry((index - 1) / 2).0 > moved.0 {
                heap.rise(txn, index, moved);
            } else {
                heap.sink(txn, index, last, moved);
            }
        }
        self.blocks.remove(txn, group, slot);
        if index == 0 {
            self.note_first(group);
        }
        Ok(())
    }

    /// Time of the first timer of all; `None` without one.
    #[inline]
    #[must_use]
    pub fn first(&self) -> Option<i64> {
        (self.first != NEVER).then_some(self.first)
    }

    /// Takes the earliest timer at or before `watermark` out, into `due`. False when there is none.
    ///
    /// # Errors
    /// None on timers that are sound.
    #[inline]
    pub fn pop(
        &mut self,
        txn: &mut Txn,
        watermark: i64,
        due: &mut DueTimer<K>,
    ) -> Result<bool, StateError> {
        if self.first > watermark || self.first == NEVER {
            return Ok(false);
        }
        self.pop_first(txn, due)
    }

    #[inline(never)]
    fn pop_first(&mut self, txn: &mut Txn, due: &mut DueTimer<K>) -> Result<bool, StateError> {
        let Some(group) = self.firsts.iter().position(|&first| first == self.first) else {
            return Ok(false);
        };
        let group = group as u32;
        let heap = self.heap(group)?;
        let (time, block) = heap.entry(0);
        let bytes = heap.seg.read::<u64>(block) as usize;
        let own = heap.seg.bytes(block + TIME_AT, bytes);
        let key = &own[KEY_AT..];
        due.time = time;
        due.hash = KeyHash(key_hash(key));
        due.bytes = key.len();
        due.scratch.buffer(key.len())[..key.len()].copy_from_slice(key);
        let found = self.blocks.find(group, slot_hash(due.hash, time), own).map(Slot::forever);
        let Some(slot) = found else { return Ok(false) };
        self.take_out(txn, group, slot)?;
        Ok(true)
    }

    /// Pops timers at or before `watermark` in time order, `max` at most, and hands each to `f`,
    /// which may set and delete timers. Returns how many there were: less than `max` means that no
    /// more is due.
    ///
    /// # Errors
    /// The first error of `f`; its timer is popped.
    pub fn due(
        &mut self,
        txn: &mut Txn,
        watermark: i64,
        max: usize,
        mut f: impl FnMut(&mut Self, &mut Txn, &DueTimer<K>) -> Result<(), StateError>,
    ) -> Result<usize, StateError> {
        let mut due = DueTimer::default();
        let mut count = 0;
        while count < max && self.pop(txn, watermark, &mut due)? {
            count += 1;
            f(self, txn, &due)?;
        }
        Ok(count)
    }

    /// How many timers are set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.blocks.len()
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Makes sure that a group's heap has a place for entry `len`.
fn make_room(opened: &Opened, txn: &mut Txn, group: u32, len: u64) -> Result<(), StateError> {
    let (shared, seg) = (&opened.shared, opened.shared.seg(group)?);
    let mut chunks = opened.read(group, CHUNKS_WORD);
    if chunks == 0 {
        chunks = shared.alloc_zeroed(txn, group, CHUNKS_MAX * 8)?;
        opened.write(txn, group, CHUNKS_WORD, chunks);
    }
    let (chunk, within) = place(len);
    let at = chunks + chunk * 8;
    if within == 0 && seg.read::<u64>(at) == 0 {
        let bytes = ENTRY_BYTES << (CHUNK_LOG2 + chunk as u32);
        let new = shared.alloc(txn, group, bytes)?.at;
        seg.write(txn, at, new);
    }
    Ok(())
}

/// Encodes `{time, key}`.
fn timer_bytes<'a>(key: &[u8], time: i64, scratch: &'a mut Scratch) -> &'a [u8] {
    let len = KEY_AT + key.len();
    let buffer = &mut scratch.buffer(len)[..len];
    buffer[..KEY_AT].copy_from_slice(&time.to_le_bytes());
    buffer[KEY_AT..].copy_from_slice(key);
    buffer
}

/// Hash of a timer, for its slot.
/// A timer's hash does not tell its key's group.
fn check_blocks(seg: Seg, header: u64, _: u32, _: u32) -> Result<(), String> {
    check::<Timed>(seg, header, 0, 1)
}

fn slot_hash(hash: KeyHash, time: i64) -> u64 {
    let mixed = (hash.0.rotate_left(32) ^ time.cast_unsigned()).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 32)
}
