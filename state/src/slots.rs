//! The transactional open-addressing table under every keyed structure: linear probing, no
//! tombstones, incremental growth. Works on key bytes; `table`, `map`, `slice` and `timer` give it
//! types.
//!
//! A slot is `{key, value}`. A plain key stands in the slot, and all zeros mean that the slot is
//! empty; the key whose bytes really are all zero has a slot of its own behind the table's header.
//! An archived key stands in a heap block `{bytes: u64, prefix, key}`, and its slot begins with
//! `{hash | 1, block}`.
//!
//! Invariants:
//! - **one place**: a key is in exactly one of: the table, the unmoved part of the table that it
//!   grows out of, the zero slot;
//! - **growth**: the old slots are moved in order, beginning at an empty one and stopping after an
//!   empty one, so runs are moved whole: a key whose home lies in the part already moved can only
//!   be in the new table. The old table only shrinks. Each insert, and each update that meets the
//!   old table, moves at least `MOVED_AT_ONCE` slots;
//! - **undo**: filling an empty slot logs its key alone, since an empty slot's value means nothing;
//!   emptying one logs all of it, since the slot may be filled again in the same step;
//! - the descriptors are caches of the headers: a new process builds them with `reload`, which
//!   notes where each header is; it is read when its group is first looked into, since the memory
//!   of a resumed job may be on the disk yet (R16). Until then the descriptor is one empty slot, so
//!   that only who finds nothing must ask whether that is so;
//! - a group without a table (not held, or no key yet) has a descriptor of one empty slot, so that
//!   lookups need no case for it.
//!
//! The pointers here are checked by construction, not at each use: slot index ≤ mask, and the
//! arrays have mask + 1.

pub(crate) mod check;

use crate::error::StateError;
use crate::group::{Opened, Shared};
use crate::key::KeyHash;
use crate::line::find_in_line;
use crate::raw::Seg;
use std::marker::PhantomData;
use std::mem::offset_of;
use std::ops::ControlFlow;
use std::rc::Rc;
use testudo_shm::hash::key_hash;
use testudo_shm::primitive::{self, AtomicUsize, Ordering};
use testudo_shm::txn::Txn;

/// Slots of a group's first table: a multiple of any `LINE`.
const CAPACITY_MIN: u64 = 64;
/// Tables of up to so many slots grow fourfold: each page that a table leaves behind costs as much
/// as hundreds of updates, and small tables leave most.
const GROWS_FAST_TO: u64 = 4096;
/// Old slots moved per insert while growing: growth ends after a sixteenth of the old capacity in
/// inserts.
const MOVED_AT_ONCE: u64 = 16;
/// Slots examined by one call of `scan`, per entry asked for.
const SCANNED_PER_ENTRY: u64 = 64;
const KEY_BYTES_MAX: usize = 4096;

/// A cache line's alignment, as arrays of slots have it: lookups load whole lines at once.
#[repr(C, align(64))]
struct Nothing([u64; KEY_BYTES_MAX / 8]);

/// What every group without a table points to: one line of empty slots.
static NOTHING: Nothing = Nothing([0; KEY_BYTES_MAX / 8]);

/// Form of a table's slots.
pub(crate) trait Shape: 'static {
    /// Bytes of a plain key; `None` puts keys into heap blocks.
    const KEY: Option<usize>;
    /// Alignment of a plain key.
    const KEY_ALIGN: usize;
    /// Bytes of the value in a slot.
    const VALUE: usize;
    /// Alignment of the value.
    const VALUE_ALIGN: usize;
    /// Bytes that the structure keeps in a key block, before the key.
    const PREFIX: usize;
    /// The slot's value is a `Cell` that owns a heap block.
    const VALUE_IN_HEAP: bool;
    /// A `Cell` at this offset of the prefix owns a heap block.
    const PREFIX_IN_HEAP: Option<usize>;
    /// Whether a key's hash tells its group; else who looks it up knows that.
    const HASH_HAS_GROUP: bool = true;

    /// Bytes of a key in a slot.
    const KEY_BYTES: usize = match Self::KEY {
        Some(bytes) => {
            assert!(bytes <= KEY_BYTES_MAX, "a plain key has at most 4096 bytes");
            bytes
        }
        None => 16,
    };
    /// Offset of the value in a slot.
    const VALUE_AT: usize = Self::KEY_BYTES.next_multiple_of(Self::VALUE_ALIGN);
    /// Bytes of a slot.
    const SLOT: usize = {
        let key_align = if Self::KEY.is_some() { Self::KEY_ALIGN } else { 8 };
        let align = if key_align > Self::VALUE_ALIGN { key_align } else { Self::VALUE_ALIGN };
        let bytes = (Self::VALUE_AT + Self::VALUE).next_multiple_of(align);
        if bytes == 0 { 1 } else { bytes }
    };
    /// Heap blocks hang off the slots, so a table cannot be dropped by freeing its array alone.
    const HAS_BLOCKS: bool =
        Self::KEY.is_none() || Self::VALUE_IN_HEAP || Self::PREFIX_IN_HEAP.is_some();
    /// Slots that share a cache line as a key's home; 1 where slots do not divide a line.
    const LINE: usize =
        if Self::SLOT.is_power_of_two() && Self::SLOT < 64 { 64 / Self::SLOT } else { 1 };
    /// Whether a slot may begin in one block and end in the next: not if it lies within a line.
    const CROSSES: bool = !(Self::SLOT.is_power_of_two() && Self::SLOT <= 64);
    /// The line of the byte this far behind the home is asked for too, where slots straddle lines.
    const PREFETCHED_TO: usize = if Self::LINE > 1 { 0 } else { 63 };
    /// Small plain keys, few enough in a line to be compared all at once.
    const IN_LINES: bool =
        Self::KEY.is_some() && Self::KEY_BYTES > 0 && Self::KEY_BYTES <= 16 && Self::LINE <= 8;
    /// Offset of the key's bytes in a key block.
    const KEY_IN_BLOCK: u64 = 8 + Self::PREFIX as u64;
}

/// Where a variable-length value lies.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Cell {
    pub(crate) at: u64,
    pub(crate) bytes: u32,
    pub(crate) room: u32,
}

const _: () = assert!(size_of::<Cell>() == 16);

impl Cell {
    pub(crate) fn words(self) -> [u64; 2] {
        [self.at, u64::from(self.room) << 32 | u64::from(self.bytes)]
    }

    pub(crate) fn of([at, both]: [u64; 2]) -> Self {
        Self { at, bytes: both as u32, room: (both >> 32) as u32 }
    }
}

/// A table's header in the segment; the zero slot follows it. Never instantiated: it gives the
/// offsets.
#[repr(C)]
struct Header {
    slots: u64,
    capacity: u64,
    old: u64,
    old_capacity: u64,
    start: u64,
    /// These two change often, and are sealed each by itself: see [`sealed`].
    moved: u64,
    len: u64,
    zero_used: u64,
    /// Next discarded table of the same state.
    next: u64,
    /// How many slots of a discarded table were swept.
    swept: u64,
    /// Of the words that are not sealed by themselves: see [`seal`].
    seal: u64,
    reserved: u64,
}

const HEADER: u64 = size_of::<Header>() as u64;
const _: () = assert!(HEADER == 96);

/// A number below 2^32 with its product in the upper half: a damaged one is not taken for another.
#[inline(always)]
const fn sealed(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_0000_0001)
}

/// The number in a word that was checked when the header was read.
#[inline(always)]
const fn unsealed(word: u64) -> u64 {
    word & 0xFFFF_FFFF
}

/// The seal that the words of a header have which say where its slots are.
fn seal(seg: Seg, header: u64) -> u64 {
    let fields = [
        offset_of!(Header, slots),
        offset_of!(Header, capacity),
        offset_of!(Header, old),
        offset_of!(Header, old_capacity),
        offset_of!(Header, start),
        offset_of!(Header, zero_used),
    ];
    fields.into_iter().fold(0x7461_626C_6573, |sum: u64, field| {
        let word = seg.read::<u64>(header + field as u64);
        (sum.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    })
}

/// Seals a header some of whose words have changed.
fn seal_again(txn: &mut Txn, seg: Seg, header: u64) {
    seg.write(txn, header + offset_of!(Header, seal) as u64, seal(seg, header));
}

/// What a process remembers of a group's table: all that a lookup needs, in one cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Desc {
    slots: *mut u8,
    mask: u64,
    /// The table that this one grows out of, or null.
    old: *mut u8,
    old_mask: u64,
    start: u32,
    moved: u32,
    len: u64,
    base: *mut u8,
    /// Offset of the header; zero without a table.
    header: u64,
}

const _: () = assert!(size_of::<Desc>() == 64);

impl Desc {
    fn nothing() -> Self {
        Self {
            slots: no_slots(),
            mask: 0,
            old: std::ptr::null_mut(),
            old_mask: 0,
            start: 0,
            moved: 0,
            len: 0,
            base: std::ptr::null_mut(),
            header: 0,
        }
    }

    /// Whether there is a table, and its header is still to be read.
    #[inline(always)]
    fn is_unread(&self) -> bool {
        self.header != 0 && std::ptr::eq(self.slots, no_slots())
    }
}

/// The one empty slot.
fn no_slots() -> *mut u8 {
    NOTHING.0.as_ptr().cast_mut().cast()
}

/// Who keeps the offset of a table's header.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Home {
    /// A word of the named root.
    Root(u64),
    /// The slice directory: filled by `slice`.
    Slice(i64),
}

/// What a lookup found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot<'a> {
    at: *mut u8,
    of: PhantomData<&'a u8>,
}

/// Whether the bytes of a plain key are all zero, or a slot's tag is.
#[inline(always)]
unsafe fn is_zero<S: Shape>(at: *const u8) -> bool {
    // SAFETY: the caller gives a slot or a key, both of KEY_BYTES readable bytes.
    unsafe {
        if S::KEY.is_none() || S::KEY_BYTES == 8 {
            return at.cast::<u64>().read_unaligned() == 0;
        }
        let (words, rest) = (S::KEY_BYTES / 8, S::KEY_BYTES % 8);
        let mut any = 0u64;
        for word in 0..words {
            any |= at.add(word * 8).cast::<u64>().read_unaligned();
        }
        for byte in 0..rest {
            any |= u64::from(at.add(words * 8 + byte).read());
        }
        any == 0
    }
}

/// First slot to look at, before masking: the first one of a cache line, so that a lookup mostly
/// needs that line alone and can compare all of it at once. Archived keys lose the lowest bit of
/// their hash to the tag.
#[inline(always)]
fn home<S: Shape>(hash: u64) -> u64 {
    let hash = if S::KEY.is_some() { hash } else { hash >> 1 };
    hash & !(S::LINE as u64 - 1)
}

/// Whether a filled slot holds this key.
#[inline(always)]
unsafe fn holds<S: Shape>(slot: *const u8, base: *const u8, hash: u64, key: &[u8]) -> bool {
    // SAFETY: `slot` is a slot; its block, if it has one, was written by `fill` and lies in the
    // segment at `base`.
    unsafe {
        if S::KEY.is_some() {
            let own = std::slice::from_raw_parts(slot, S::KEY_BYTES);
            return own == std::slice::from_raw_parts(key.as_ptr(), S::KEY_BYTES);
        }
        slot.cast::<u64>().read() == hash | 1 && {
            let block = base.add(slot.add(8).cast::<u64>().read() as usize);
            let bytes = block.cast::<u64>().read() as usize;
            std::slice::from_raw_parts(block.add(S::KEY_IN_BLOCK as usize), bytes) == key
        }
    }
}

/// The slot of a small plain key in its home line: compares all slots of the line without a branch,
/// since a branch on how far a key lies from its home is mispredicted a third of the time, and
/// without one comparison waiting for another.
#[inline(always)]
unsafe fn in_line<S: Shape>(line: *mut u8, key: &[u8]) -> Option<*mut u8> {
    // SAFETY: the caller gives a line of LINE slots and a key of KEY_BYTES bytes. Empty slots hold
    // zeros, which no key that is found here is.
    unsafe {
        if S::KEY_BYTES == 8 && S::SLOT == 16 && S::KEY_ALIGN == 8 {
            let wanted = key.as_ptr().cast::<u64>().read_unaligned();
            let place = find_in_line(line, wanted);
            return (place < 4 && wanted != 0).then(|| line.add(place as usize * 16));
        }
        let (mut place, mut found) = (0, false);
        for index in 0..S::LINE {
            let slot = line.add(index * S::SLOT);
            let is_here = holds::<S>(slot, slot, 0, key);
            place |= usize::from(is_here) * index;
            found |= is_here;
        }
        (found && !is_zero::<S>(key.as_ptr())).then_some(line.add(place * S::SLOT))
    }
}

/// The first empty slot of a line, for small plain keys.
#[inline(always)]
unsafe fn empty_in_line<S: Shape>(line: *mut u8) -> Option<*mut u8> {
    // SAFETY: the caller gives a line of LINE slots.
    unsafe {
        if S::KEY_BYTES == 8 && S::SLOT == 16 && S::KEY_ALIGN == 8 {
            let place = find_in_line(line, 0);
            return (place < 4).then(|| line.add(place as usize * 16));
        }
        (0..S::LINE).map(|index| line.add(index * S::SLOT)).find(|slot| is_zero::<S>(*slot))
    }
}

/// Walks from the key's home to its slot (true) or to the empty slot where it would go (false): a
/// line at a time where keys are small.
#[inline(always)]
unsafe fn probe<S: Shape>(
    slots: *mut u8,
    mask: u64,
    base: *const u8,
    hash: u64,
    key: &[u8],
) -> (*mut u8, bool) {
    let mut index = home::<S>(hash) & mask;
    loop {
        // SAFETY: index <= mask and the array has mask + 1 slots, one of them empty; homes begin
        // lines of LINE slots, of which the array is a multiple.
        unsafe {
            let slot = slots.add(index as usize * S::SLOT);
            if S::IN_LINES {
                if let Some(slot) = in_line::<S>(slot, key) {
                    return (slot, true);
                }
                if let Some(slot) = empty_in_line::<S>(slot) {
                    return (slot, false);
                }
                index = (index + S::LINE as u64) & mask;
                continue;
            }
            if is_zero::<S>(slot) {
                return (slot, false);
            }
            if holds::<S>(slot, base, hash, key) {
                return (slot, true);
            }
        }
        index = (index + 1) & mask;
    }
}

/// Hash of the key in a filled slot; for archived keys it may differ in the lowest bit, which
/// `home` ignores.
#[inline(always)]
unsafe fn hash_in<S: Shape>(slot: *const u8) -> u64 {
    // SAFETY: the caller gives a filled slot.
    unsafe {
        if S::KEY.is_some() {
            key_hash(std::slice::from_raw_parts(slot, S::KEY_BYTES))
        } else {
            slot.cast::<u64>().read()
        }
    }
}

/// Tells tables of this process apart, and what a table was from what it is: places found ahead are
/// good as long as it stays the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    table: usize,
    change: u64,
}

/// The next table's number. Zero is no table's.
static TABLES: AtomicUsize = AtomicUsize::new(1);

/// Keys whose places are found ahead together: their lines come from memory at the same time.
pub const AHEAD: usize = 64;

/// Where the keys of some records lie, found out ahead of their use: first the lines where they are
/// looked for, then the values.
#[derive(Debug)]
pub struct Ahead {
    /// Lines, or values (null where the key was not in its line).
    places: [*mut u8; AHEAD],
    /// The records before are done.
    from: usize,
    /// Where the records end.
    to: usize,
    /// The transaction in whose log the values are, once they are found.
    logged_in: Option<u64>,
    stamp: Stamp,
}

impl Default for Ahead {
    fn default() -> Self {
        let stamp = Stamp { table: 0, change: 0 };
        Self { places: [std::ptr::null_mut(); AHEAD], from: 0, to: 0, logged_in: None, stamp }
    }
}

impl Ahead {
    /// Says that so many more records are done.
    #[inline(always)]
    pub fn advance(&mut self, records: usize) {
        self.from = (self.from + records).min(self.to);
    }

    /// Begins with other records.
    #[inline(always)]
    pub fn restart(&mut self) {
        (self.from, self.stamp.table) = (0, 0);
    }
}

/// One table per held group of an operator.
#[derive(Debug)]
pub(crate) struct Slots<S: Shape> {
    shared: Rc<Shared>,
    /// Changed behind a shared reference only by `bring`, while none to the descriptor is in use.
    desc: Box<[std::cell::Cell<Desc>]>,
    home: Home,
    /// Changes with every slot that moves.
    stamp: Stamp,
    /// Groups whose table grows out of another one.
    growing: std::cell::Cell<u32>,
    /// Groups whose header is still to be read.
    unread: std::cell::Cell<u32>,
    /// Slots of the tables that it makes.
    first: u64,
    shape: PhantomData<fn() -> S>,
}

impl<S: Shape> Slots<S> {
    /// No table in any group yet; `reload` or `load` fill in what the segments hold.
    pub(crate) fn new(shared: Rc<Shared>, home: Home) -> Self {
        let desc = (0..shared.groups).map(|_| std::cell::Cell::new(Desc::nothing())).collect();
        let stamp = Stamp { table: TABLES.fetch_add(1, Ordering::Relaxed), change: 0 };
        let (growing, unread, first) = (Default::default(), Default::default(), CAPACITY_MIN);
        Self { shared, desc, home, stamp, growing, unread, first, shape: PhantomData }
    }

    /// Reads all headers again through a word of the named root.
    pub(crate) fn reload(&mut self, opened: &Opened) {
        let Home::Root(word) = self.home else { return };
        for group in 0..self.shared.groups {
            self.expect(group, opened.glance(group, word));
        }
    }

    /// Notes where a group's header is, to be read when it is needed; zero means that the group has
    /// no table.
    pub(crate) fn expect(&mut self, group: u32, header: u64) {
        self.stamp.change += 1;
        let old = self.desc[group as usize].get();
        self.growing.set(self.growing.get() - u32::from(!old.old.is_null()));
        let mut desc = Desc::nothing();
        if let Some(seg) = self.shared.try_seg(group) {
            (desc.base, desc.header) = (seg.base(), header);
        }
        let unread = self.unread.get() + u32::from(desc.is_unread());
        self.unread.set(unread - u32::from(old.is_unread()));
        self.desc[group as usize].set(desc);
    }

    /// Reads one header again; zero means that the group has no table.
    fn load(&mut self, group: u32, header: u64) {
        self.expect(group, header);
        self.bring(group);
    }

    /// Reads a group's header if that was not done yet. True when it was read now: what was not
    /// found before may be there.
    #[inline]
    fn bring(&self, group: u32) -> bool {
        let is_missing = self.desc(group).is_unread();
        if is_missing {
            self.read_header(group);
        }
        is_missing
    }

    #[cold]
    #[inline(never)]
    fn read_header(&self, group: u32) {
        let Some(seg) = self.shared.try_seg(group) else { return };
        let mut desc = self.desc[group as usize].get();
        let header = desc.header;
        let place = &mut desc;
        let word = |field: usize| seg.read::<u64>(header + field as u64);
        let capacity = word(offset_of!(Header, capacity));
        let old_capacity = word(offset_of!(Header, old_capacity));
        if let Err(what) = check::check_header::<S>(seg, header) {
            crate::verify::unsound(seg.base(), &what);
        }
        place.slots = array::<S>(seg, word(offset_of!(Header, slots)), capacity);
        place.mask = capacity - 1;
        place.len = unsealed(word(offset_of!(Header, len)));
        let old = word(offset_of!(Header, old));
        if old != 0 {
            self.growing.set(self.growing.get() + 1);
            place.old = array::<S>(seg, old, old_capacity);
            place.old_mask = old_capacity - 1;
            place.start = word(offset_of!(Header, start)) as u32;
            place.moved = unsealed(word(offset_of!(Header, moved))) as u32;
        }
        self.desc[group as usize].set(desc);
        self.unread.set(self.unread.get() - 1);
    }

    /// Keys in all held groups.
    pub(crate) fn len(&self) -> u64 {
        (0..self.shared.groups).map(|group| self.len_of(group)).sum()
    }

    /// Keys in one group.
    pub(crate) fn len_of(&self, group: u32) -> u64 {
        self.bring(group);
        self.desc(group).len
    }

    /// Offset of a group's header, zero without a table.
    pub(crate) fn header(&self, group: u32) -> u64 {
        self.desc(group).header
    }

    #[inline(always)]
    fn desc(&self, group: u32) -> &Desc {
        debug_assert!((group as usize) < self.desc.len());
        // SAFETY: groups come from `group_of`, which stays below the number of groups, or from the
        // set of held ones. Only `bring` and methods that borrow all of this write a descriptor,
        // and nobody calls them while holding what is given out here.
        unsafe { &*self.desc.get_unchecked(group as usize).as_ptr() }
    }

    /// Asks for the memory where a lookup will begin.
    #[inline(always)]
    pub(crate) fn prefetch(&self, group: u32, hash: u64) {
        self.prefetch_line(group, hash);
        self.prefetch_old(group, hash);
    }

    /// Asks for a key's home line, and says where that is.
    #[inline(always)]
    fn prefetch_line(&self, group: u32, hash: u64) -> *mut u8 {
        let desc = self.desc(group);
        let slot = desc.slots.wrapping_add((home::<S>(hash) & desc.mask) as usize * S::SLOT);
        primitive::prefetch(slot);
        if S::PREFETCHED_TO > 0 {
            primitive::prefetch(slot.wrapping_add(S::PREFETCHED_TO));
        }
        slot
    }

    /// Asks for a key's home line in the table that its group's table grows out of.
    #[inline(always)]
    fn prefetch_old(&self, group: u32, hash: u64) {
        let desc = self.desc(group);
        if !desc.old.is_null() {
            let at = (home::<S>(hash) & desc.old_mask) as usize * S::SLOT;
            primitive::prefetch(desc.old.wrapping_add(at));
        }
    }

    /// The slot of a key.
    #[inline(always)]
    pub(crate) fn find(&self, group: u32, hash: u64, key: &[u8]) -> Option<Slot<'_>> {
        assert!(S::KEY.is_none_or(|bytes| bytes == key.len()), "a plain key of another length");
        let desc = self.desc(group);
        // SAFETY: the descriptor's pointers and masks belong together (`load`, `grow`).
        let (at, found) = unsafe { probe::<S>(desc.slots, desc.mask, desc.base, hash, key) };
        if found {
            return Some(Slot { at, of: PhantomData });
        }
        self.find_elsewhere(group, hash, key)
    }

    /// The slot of a key that is not in the table itself: in the one it grows out of, or the zero
    /// slot.
    #[cold]
    #[inline(never)]
    fn find_elsewhere(&self, group: u32, hash: u64, key: &[u8]) -> Option<Slot<'_>> {
        let is_new = self.bring(group);
        let desc = self.desc(group);
        // SAFETY: as in `find`; a header lies in its segment with the zero slot behind it.
        unsafe {
            if is_new && let (at, true) = probe::<S>(desc.slots, desc.mask, desc.base, hash, key) {
                return Some(Slot { at, of: PhantomData });
            }
            if S::KEY.is_some() && is_zero::<S>(key.as_ptr()) {
                let zero = self.zero_slot(group)?;
                return zero.1.then_some(Slot { at: zero.0, of: PhantomData });
            }
            if desc.old.is_null() {
                return None;
            }
            let from_start = (home::<S>(hash).wrapping_sub(u64::from(desc.start))) & desc.old_mask;
            if from_start < u64::from(desc.moved) {
                return None;
            }
            let (at, found) = probe::<S>(desc.old, desc.old_mask, desc.base, hash, key);
            found.then_some(Slot { at, of: PhantomData })
        }
    }

    /// The zero slot of a group, and whether it is used; `None` without a table.
    fn zero_slot(&self, group: u32) -> Option<(*mut u8, bool)> {
        let (seg, header) = (self.shared.try_seg(group)?, self.header(group));
        if header == 0 {
            return None;
        }
        let used = seg.read::<u64>(header + offset_of!(Header, zero_used) as u64) != 0;
        Some((array::<S>(seg, header + HEADER, 1), used))
    }

    /// As `find`, for a caller that may write: moves on what is growing when the key was not in the
    /// table itself.
    #[inline(always)]
    pub(crate) fn find_to_write(
        &mut self,
        txn: &mut Txn,
        group: u32,
        hash: u64,
        key: &[u8],
    ) -> Option<Slot<'static>> {
        assert!(S::KEY.is_none_or(|bytes| bytes == key.len()), "a plain key of another length");
        let desc = self.desc(group);
        // SAFETY: as in `find`.
        let (at, found) = unsafe { probe::<S>(desc.slots, desc.mask, desc.base, hash, key) };
        if found {
            return Some(Slot { at, of: PhantomData });
        }
        self.move_and_find(txn, group, hash, key)
    }

    /// Whether places can be found ahead: keys that are compared by the line, plain values.
    pub(crate) const IN_RUNS: bool =
        S::IN_LINES && !S::VALUE_IN_HEAP && S::VALUE > 0 && S::VALUE <= 256;

    /// Asks for the home lines of some keys.
    #[inline(always)]
    pub(crate) fn ask(
        &self,
        hashes: impl ExactSizeIterator<Item = KeyHash> + Clone,
        ahead: &mut Ahead,
    ) {
        ahead.to = AHEAD.min(ahead.from + hashes.len());
        let lines = &mut ahead.places[ahead.from..ahead.to];
        for (line, hash) in lines.iter_mut().zip(hashes.clone()) {
            *line = self.prefetch_line(self.group(hash), hash.0);
        }
        if self.unread.get() > 0 {
            self.ask_anew(hashes.clone(), &mut ahead.places[ahead.from..ahead.to]);
        }
        if self.growing.get() > 0 {
            hashes.for_each(|hash| self.prefetch_old(self.group(hash), hash.0));
        }
        (ahead.stamp, ahead.logged_in) = (self.stamp, None);
    }

    /// Reads the headers of the groups in which some keys are looked for, where that was not done
    /// yet: what is found ahead, and logged, must not depend on how long this process has been at
    /// it, since a replica does the same to a copy.
    #[cold]
    #[inline(never)]
    fn ask_anew(&self, hashes: impl Iterator<Item = KeyHash>, lines: &mut [*mut u8]) {
        for (line, hash) in lines.iter_mut().zip(hashes) {
            let group = self.group(hash);
            self.bring(group);
            *line = self.prefetch_line(group, hash.0);
        }
    }

    /// Finds and logs the values of the keys that were asked for, where they lie in the keys' home
    /// lines, and asks for the next lines of the others. Does nothing when slots have moved since,
    /// or when the log has no room.
    ///
    /// An entry that says what stands there when it is written is right whenever the value is
    /// changed after it: rollback ends with the oldest.
    #[inline(always)]
    pub(crate) fn find_and_log<K: AsRef<[u8]>>(
        &self,
        txn: &mut Txn,
        keys: impl ExactSizeIterator<Item = K>,
        ahead: &mut Ahead,
    ) {
        if !Self::IN_RUNS || ahead.stamp != self.stamp || ahead.logged_in.is_some() {
            return;
        }
        ahead.to = ahead.to.min(ahead.from + keys.len());
        let places = &mut ahead.places[ahead.from..ahead.to];
        let Some(mut run) = txn.run(places.len(), S::VALUE, S::CROSSES) else {
            return;
        };
        for (place, key) in places.iter_mut().zip(keys) {
            assert!(key.as_ref().len() == S::KEY_BYTES, "a plain key of another length");
            let line = *place;
            // SAFETY: the stamp says that `ask` took the line from this table, which has not
            // changed since; a value lies inside its slot, in a segment that is ours.
            unsafe {
                *place = match in_line::<S>(line, key.as_ref()) {
                    Some(slot) => {
                        let value = slot.add(S::VALUE_AT);
                        run.add(value);
                        value
                    }
                    None => {
                        primitive::prefetch(line.wrapping_add(S::SLOT * S::LINE));
                        std::ptr::null_mut()
                    }
                };
            }
        }
        run.close();
        ahead.logged_in = Some(txn.serial());
    }

    /// The values that `find_and_log` found, null where it did not; they may be changed until
    /// anything is inserted or removed. `None` when that has happened, or when their log was
    /// committed since.
    #[inline(always)]
    pub(crate) fn found<'a>(&self, txn: &Txn, ahead: &'a Ahead) -> Option<&'a [*mut u8]> {
        let is_logged = ahead.logged_in == Some(txn.serial());
        (is_logged && ahead.stamp == self.stamp).then(|| &ahead.places[ahead.from..ahead.to])
    }

    #[cold]
    #[inline(never)]
    fn move_and_find(
        &mut self,
        txn: &mut Txn,
        group: u32,
        hash: u64,
        key: &[u8],
    ) -> Option<Slot<'static>> {
        let look = |this: &Self| {
            let desc = this.desc(group);
            // SAFETY: as in `find`.
            let (at, found) = unsafe { probe::<S>(desc.slots, desc.mask, desc.base, hash, key) };
            found.then_some(Slot { at, of: PhantomData })
        };
        // A key that is found moves nothing on, whether the header was read before or is now: so
        // two processes with equal segments do the same to them, however long either has been at
        // it.
        if self.bring(group)
            && let Some(slot) = look(self)
        {
            return Some(slot);
        }
        if !self.desc(group).old.is_null() {
            self.move_some(txn, group);
            if let Some(slot) = look(self) {
                return Some(slot);
            }
        }
        let slot = self.find_elsewhere(group, hash, key)?;
        Some(Slot { at: slot.at, of: PhantomData })
    }

    /// Adds a key that `find_to_write` did not find. Its slot's value is unspecified and may be
    /// written without undo.
    #[cold]
    #[inline(never)]
    pub(crate) fn insert(
        &mut self,
        txn: &mut Txn,
        opened: &Opened,
        group: u32,
        hash: u64,
        key: &[u8],
    ) -> Result<Slot<'static>, StateError> {
        let seg = self.shared.seg(group)?;
        self.bring(group);
        if self.header(group) == 0 {
            self.create(txn, opened, group)?;
        }
        let (header, len) = (self.header(group), self.desc(group).len);
        // SAFETY: for a plain key, `key` has KEY_BYTES bytes.
        let at = if S::KEY.is_some() && unsafe { is_zero::<S>(key.as_ptr()) } {
            seg.write(txn, header + offset_of!(Header, zero_used) as u64, 1u64);
            seal_again(txn, seg, header);
            let zero = array::<S>(seg, header + HEADER, 1);
            // SAFETY: the zero slot has SLOT bytes.
            unsafe { txn.fresh(zero, S::SLOT) };
            zero
        } else {
            if self.desc(group).old.is_null() && len >= (self.desc(group).mask + 1) / 8 * 5 {
                self.grow(txn, group)?;
            }
            let block = if S::KEY.is_none() { self.key_block(txn, group, key)? } else { 0 };
            let desc = self.desc(group);
            // SAFETY: as in `find`; the key is not there, so the walk ends at an empty slot.
            let (slot, _) = unsafe { probe::<S>(desc.slots, desc.mask, desc.base, hash, key) };
            // SAFETY: `slot` is an empty slot of this table.
            unsafe { fill::<S>(txn, slot, hash, key, block) };
            slot
        };
        seg.write(txn, header + offset_of!(Header, len) as u64, sealed(len + 1));
        self.desc[group as usize].get_mut().len = len + 1;
        Ok(Slot { at, of: PhantomData })
    }

    /// Tables that are made from here on have room for so many keys before they grow.
    pub(crate) fn reserve(&mut self, keys: u64) {
        let slots = keys.saturating_mul(8).div_ceil(5).saturating_add(8);
        self.first = slots.next_power_of_two().max(CAPACITY_MIN);
    }

    /// Makes the first table of a group: a header that stays, and slots that will be replaced as
    /// the table grows.
    fn create(&mut self, txn: &mut Txn, opened: &Opened, group: u32) -> Result<(), StateError> {
        let seg = self.shared.seg(group)?;
        let bytes = self.first.saturating_mul(S::SLOT as u64);
        let header = self.shared.alloc_zeroed(txn, group, HEADER + S::SLOT as u64)?;
        let made = self.shared.alloc_zeroed(txn, group, bytes).and_then(|slots| {
            seg.write_fresh(txn, header + offset_of!(Header, slots) as u64, slots);
            seg.write_fresh(txn, header + offset_of!(Header, capacity) as u64, self.first);
            seal_again(txn, seg, header);
            match self.home {
                Home::Root(word) => opened.write(txn, group, word, header),
                Home::Slice(id) => {
                    let noted = crate::slice::add_to_directory(opened, txn, group, id, header);
                    noted.inspect_err(|_| self.shared.free(txn, group, slots, bytes))?;
                }
            }
            Ok(())
        });
        if let Err(error) = made {
            self.shared.free(txn, group, header, HEADER + S::SLOT as u64);
            return Err(error);
        }
        self.load(group, header);
        Ok(())
    }

    fn key_block(&self, txn: &mut Txn, group: u32, key: &[u8]) -> Result<u64, StateError> {
        let seg = self.shared.seg(group)?;
        let block = self.shared.alloc(txn, group, S::KEY_IN_BLOCK + key.len() as u64)?.at;
        seg.write_fresh(txn, block, key.len() as u64);
        seg.fill(txn, block + S::KEY_IN_BLOCK, key);
        Ok(block)
    }

    /// Begins to move to a table of twice the size.
    fn grow(&mut self, txn: &mut Txn, group: u32) -> Result<(), StateError> {
        let seg = self.shared.seg(group)?;
        let desc = *self.desc(group);
        let (capacity, header) = (desc.mask + 1, desc.header);
        let grown = capacity * if capacity <= GROWS_FAST_TO { 4 } else { 2 };
        let new = self.shared.alloc_zeroed(txn, group, grown * S::SLOT as u64)?;
        let mut start = 0;
        // SAFETY: index <= mask; at most five eighths of the slots are filled, so one is empty.
        while !unsafe { is_zero::<S>(desc.slots.add(start as usize * S::SLOT)) } {
            start += 1;
        }
        let old: u64 = seg.read(header + offset_of!(Header, slots) as u64);
        for (field, value) in [
            (offset_of!(Header, slots), new),
            (offset_of!(Header, capacity), grown),
            (offset_of!(Header, old), old),
            (offset_of!(Header, old_capacity), capacity),
            (offset_of!(Header, start), start),
            (offset_of!(Header, moved), 0),
        ] {
            seg.write(txn, header + field as u64, value);
        }
        seal_again(txn, seg, header);
        self.load(group, header);
        self.move_some(txn, group);
        Ok(())
    }

    /// Moves at least `MOVED_AT_ONCE` slots, and on to the end of a run; frees the old table after
    /// the last.
    fn move_some(&mut self, txn: &mut Txn, group: u32) {
        let Some(seg) = self.shared.try_seg(group) else { return };
        let desc = self.desc[group as usize].get_mut();
        if desc.old.is_null() {
            return;
        }
        let (mut moved, mut steps) = (u64::from(desc.moved), 0);
        while moved <= desc.old_mask {
            let index = (u64::from(desc.start) + moved) & desc.old_mask;
            moved += 1;
            steps += 1;
            // SAFETY: index <= old_mask; the new table has more room than the old one has keys.
            unsafe {
                let from = desc.old.add(index as usize * S::SLOT);
                if is_zero::<S>(from) {
                    if steps >= MOVED_AT_ONCE {
                        break;
                    }
                    continue;
                }
                let mut to = home::<S>(hash_in::<S>(from)) & desc.mask;
                while !is_zero::<S>(desc.slots.add(to as usize * S::SLOT)) {
                    to = (to + 1) & desc.mask;
                }
                let to = desc.slots.add(to as usize * S::SLOT);
                txn.log(to, S::KEY_BYTES);
                txn.fresh(to, S::SLOT);
                std::ptr::copy_nonoverlapping(from, to, S::SLOT);
            }
        }
        let header = desc.header;
        if moved <= desc.old_mask {
            desc.moved = moved as u32;
            seg.write(txn, header + offset_of!(Header, moved) as u64, sealed(moved));
            return;
        }
        let bytes = (desc.old_mask + 1) * S::SLOT as u64;
        let old: u64 = seg.read(header + offset_of!(Header, old) as u64);
        seg.write(txn, header + offset_of!(Header, old) as u64, 0u64);
        seal_again(txn, seg, header);
        self.shared.free(txn, group, old, bytes);
        self.load(group, header);
    }

    /// Removes a key: its slot, and its key block; what the value owns is the caller's to free
    /// first.
    pub(crate) fn remove(&mut self, txn: &mut Txn, group: u32, slot: Slot<'static>) {
        let Some(seg) = self.shared.try_seg(group) else { return };
        self.stamp.change += 1;
        let (header, len) = (self.header(group), self.desc(group).len);
        if S::KEY.is_none() {
            let block = slot.block();
            let bytes: u64 = seg.read(block);
            self.shared.free(txn, group, block, S::KEY_IN_BLOCK + bytes);
        }
        let desc = *self.desc(group);
        let array_at = |slots: *mut u8, mask: u64| {
            let from = (slot.at.addr()).wrapping_sub(slots.addr());
            (from < (mask as usize + 1) * S::SLOT).then_some((slots, mask, (from / S::SLOT) as u64))
        };
        let in_old = || if desc.old.is_null() { None } else { array_at(desc.old, desc.old_mask) };
        // SAFETY: the slot is a filled one of the array that it was found to lie in, or the zero
        // slot.
        unsafe {
            match array_at(desc.slots, desc.mask).or_else(in_old) {
                Some((slots, mask, index)) => close_gap::<S>(txn, slots, mask, index),
                None => {
                    txn.log(slot.at, S::SLOT);
                    slot.at.write_bytes(0, S::SLOT);
                    seg.write(txn, header + offset_of!(Header, zero_used) as u64, 0u64);
                    seal_again(txn, seg, header);
                }
            }
        }
        seg.write(txn, header + offset_of!(Header, len) as u64, sealed(len - 1));
        self.desc[group as usize].get_mut().len = len - 1;
    }

    /// Visits the entries of a group from `cursor` (0 at first) on: about `max` of them, or until
    /// `visit` breaks, which counts the entry as visited. Returns where to go on, `None` at the
    /// end. Nothing may be added or removed between calls.
    pub(crate) fn scan<'a>(
        &'a self,
        group: u32,
        cursor: u64,
        max: usize,
        mut visit: impl FnMut(Slot<'a>) -> ControlFlow<()>,
    ) -> Option<u64> {
        self.bring(group);
        let desc = self.desc(group);
        if desc.header == 0 {
            return None;
        }
        let capacity = desc.mask + 1;
        let old = if desc.old.is_null() { 0 } else { desc.old_mask + 1 - u64::from(desc.moved) };
        let end = capacity + old;
        let examined = (max as u64).saturating_mul(SCANNED_PER_ENTRY).max(MOVED_AT_ONCE);
        let mut left = max;
        let mut at = cursor;
        while at < end {
            if left == 0 || at - cursor >= examined {
                return Some(at);
            }
            // SAFETY: both indices stay within their arrays.
            let slot = unsafe {
                if at < capacity {
                    desc.slots.add(at as usize * S::SLOT)
                } else {
                    let index = u64::from(desc.start) + u64::from(desc.moved) + at - capacity;
                    desc.old.add((index & desc.old_mask) as usize * S::SLOT)
                }
            };
            at += 1;
            // SAFETY: a slot has KEY_BYTES readable bytes.
            if !unsafe { is_zero::<S>(slot) } {
                left -= 1;
                if visit(Slot { at: slot, of: PhantomData }).is_break() {
                    return Some(at);
                }
            }
        }
        if at == end
            && let Some((zero, true)) = self.zero_slot(group)
        {
            if left == 0 {
                return Some(at);
            }
            if visit(Slot { at: zero, of: PhantomData }).is_break() {
                return Some(at + 1);
            }
        }
        None
    }

    /// Takes a group's whole table out of use and hangs it on the chain of discarded ones (`chain`
    /// is a root word), to be freed by `sweep`. Who keeps its header's offset must forget it in the
    /// same step.
    pub(crate) fn discard(&mut self, txn: &mut Txn, opened: &Opened, group: u32, chain: u64) {
        let Some(seg) = self.shared.try_seg(group) else { return };
        let header = self.header(group);
        if header == 0 {
            return;
        }
        let next = opened.read(group, chain);
        seg.write(txn, header + offset_of!(Header, next) as u64, next);
        opened.write(txn, group, chain, header);
        opened.has_discarded.set(true);
        self.load(group, 0);
    }
}

/// Frees discarded tables of all held groups, looking at no more than `budget` slots. True when
/// none is left.
pub(crate) fn sweep<S: Shape>(txn: &mut Txn, opened: &Opened, chain: u64, budget: u64) -> bool {
    if !opened.has_discarded.get() {
        return true;
    }
    let shared = &opened.shared;
    let mut budget = budget;
    for group in shared.owned() {
        let Some(seg) = shared.try_seg(group) else { continue };
        loop {
            let header = opened.read(group, chain);
            if header == 0 {
                break;
            }
            if budget == 0 {
                return false;
            }
            budget -= 1;
            if S::HAS_BLOCKS && !sweep_blocks::<S>(txn, shared, seg, group, header, &mut budget) {
                return false;
            }
            let word = |field: usize| seg.read::<u64>(header + field as u64);
            let (slots, capacity) =
                (word(offset_of!(Header, slots)), word(offset_of!(Header, capacity)));
            let (old, old_capacity) =
                (word(offset_of!(Header, old)), word(offset_of!(Header, old_capacity)));
            opened.write(txn, group, chain, word(offset_of!(Header, next)));
            shared.free(txn, group, slots, capacity * S::SLOT as u64);
            if old != 0 {
                shared.free(txn, group, old, old_capacity * S::SLOT as u64);
            }
            shared.free(txn, group, header, HEADER + S::SLOT as u64);
        }
    }
    opened.has_discarded.set(false);
    true
}

/// Frees the blocks that hang off a discarded table's slots. False when the budget ended first.
fn sweep_blocks<S: Shape>(
    txn: &mut Txn,
    shared: &Shared,
    seg: Seg,
    group: u32,
    header: u64,
    budget: &mut u64,
) -> bool {
    let word = |field: usize| seg.read::<u64>(header + field as u64);
    let (slots, capacity) = (word(offset_of!(Header, slots)), word(offset_of!(Header, capacity)));
    let (old, old_capacity) =
        (word(offset_of!(Header, old)), word(offset_of!(Header, old_capacity)));
    let (start, moved) =
        (word(offset_of!(Header, start)), unsealed(word(offset_of!(Header, moved))));
    let unmoved = if old == 0 { 0 } else { old_capacity - moved };
    let end = capacity + unmoved + 1;
    let swept_at = header + offset_of!(Header, swept) as u64;
    let mut at: u64 = seg.read(swept_at);
    while at < end {
        if *budget == 0 {
            seg.write(txn, swept_at, at);
            return false;
        }
        *budget -= 1;
        let slot = if at < capacity {
            slots + at * S::SLOT as u64
        } else if at < capacity + unmoved {
            old + ((start + moved + at - capacity) & (old_capacity - 1)) * S::SLOT as u64
        } else {
            header + HEADER
        };
        at += 1;
        let slot = array::<S>(seg, slot, 1);
        // The zero slot, last, is used only by plain keys; its flag tells.
        let used = if at == end {
            word(offset_of!(Header, zero_used)) != 0
        } else {
            // SAFETY: `array` checked that a whole slot lies there.
            !unsafe { is_zero::<S>(slot) }
        };
        if used {
            free_blocks::<S>(txn, shared, seg, group, Slot { at: slot, of: PhantomData });
        }
    }
    true
}

/// Frees all that a slot owns in the heap.
fn free_blocks<S: Shape>(txn: &mut Txn, shared: &Shared, seg: Seg, group: u32, slot: Slot<'_>) {
    let mut cells = [None, None];
    if S::VALUE_IN_HEAP {
        cells[0] = Some(Cell::of(slot.read::<S, [u64; 2]>()));
    }
    if S::KEY.is_none() {
        let block = slot.block();
        if let Some(at) = S::PREFIX_IN_HEAP {
            cells[1] = Some(Cell::of(seg.read(block + 8 + at as u64)));
        }
        let bytes: u64 = seg.read(block);
        shared.free(txn, group, block, S::KEY_IN_BLOCK + bytes);
    }
    for cell in cells.into_iter().flatten() {
        if cell.room != 0 {
            shared.free(txn, group, cell.at, u64::from(cell.room));
        }
    }
}

/// Address of an array of slots, checked once against its segment.
fn array<S: Shape>(seg: Seg, at: u64, slots: u64) -> *mut u8 {
    let end = slots.checked_mul(S::SLOT as u64).and_then(|bytes| bytes.checked_add(at));
    let inside = end.is_some_and(|end| end <= seg.len());
    if !inside {
        let what = format!("a table of {slots} slots at {at} leads out of it");
        crate::verify::unsound(seg.base(), &what);
    }
    // SAFETY: inside the segment, as just checked.
    unsafe { seg.base().add(at as usize) }
}

/// Writes a key into an empty slot.
///
/// # Safety
/// `slot` is an empty slot; a plain `key` has KEY_BYTES bytes.
unsafe fn fill<S: Shape>(txn: &mut Txn, slot: *mut u8, hash: u64, key: &[u8], block: u64) {
    // SAFETY: passed on.
    unsafe {
        txn.log(slot, S::KEY_BYTES);
        txn.fresh(slot, S::SLOT);
        if S::KEY.is_some() {
            std::ptr::copy_nonoverlapping(key.as_ptr(), slot, S::KEY_BYTES);
        } else {
            slot.cast::<u64>().write(hash | 1);
            slot.add(8).cast::<u64>().write(block);
        }
    }
}

/// Empties a slot and moves the rest of its run up, so that no run has a hole before a key's place.
///
/// # Safety
/// `slots` is an array of `mask + 1` slots with an empty one, and slot `hole` is filled.
unsafe fn close_gap<S: Shape>(txn: &mut Txn, slots: *mut u8, mask: u64, mut hole: u64) {
    let mut next = hole;
    loop {
        next = (next + 1) & mask;
        // SAFETY: both indices are masked.
        unsafe {
            let from = slots.add(next as usize * S::SLOT);
            let to = slots.add(hole as usize * S::SLOT);
            if is_zero::<S>(from) {
                txn.log(to, S::SLOT);
                to.write_bytes(0, S::SLOT);
                return;
            }
            let wanted = home::<S>(hash_in::<S>(from)) & mask;
            if (next.wrapping_sub(wanted) & mask) >= (next.wrapping_sub(hole) & mask) {
                txn.log(to, S::SLOT);
                std::ptr::copy_nonoverlapping(from, to, S::SLOT);
                hole = next;
            }
        }
    }
}

impl<'a> Slot<'a> {
    /// The key's bytes.
    #[inline(always)]
    pub(crate) fn key<S: Shape>(self, base: *const u8) -> &'a [u8] {
        // SAFETY: a filled slot holds a plain key or the offset of a block in the segment at
        // `base`.
        unsafe {
            if S::KEY.is_some() {
                return std::slice::from_raw_parts(self.at, S::KEY_BYTES);
            }
            let block = base.add(self.block() as usize);
            let bytes = block.cast::<u64>().read() as usize;
            std::slice::from_raw_parts(block.add(S::KEY_IN_BLOCK as usize), bytes)
        }
    }

    /// Offset of the key block, for archived keys.
    #[inline(always)]
    pub(crate) fn block(self) -> u64 {
        // SAFETY: slots of archived keys begin with two words.
        unsafe { self.at.add(8).cast::<u64>().read() }
    }

    /// The value's bytes.
    #[inline(always)]
    pub(crate) fn value<S: Shape>(self) -> &'a [u8] {
        // SAFETY: the value lies inside the slot.
        unsafe { std::slice::from_raw_parts(self.at.add(S::VALUE_AT), S::VALUE) }
    }

    /// The value, or its cell, by value.
    #[inline(always)]
    pub(crate) fn read<S: Shape, T: testudo_shm::txn::Plain>(self) -> T {
        debug_assert!(size_of::<T>() == S::VALUE);
        // SAFETY: the value lies inside the slot and any bit pattern is a T.
        unsafe { self.at.add(S::VALUE_AT).cast::<T>().read_unaligned() }
    }

    /// Replaces the value of a slot: `is_new` when the slot was just inserted, so that no undo is
    /// needed.
    #[inline(always)]
    pub(crate) fn write<S: Shape>(self, txn: &mut Txn, bytes: &[u8], is_new: bool) {
        debug_assert!(bytes.len() == S::VALUE);
        // SAFETY: the value lies inside the slot; `bytes` has VALUE bytes, in no table of ours that
        // we write.
        unsafe {
            let at = self.at.add(S::VALUE_AT);
            if is_new {
                txn.fresh(at, S::VALUE);
            } else {
                txn.log(at, S::VALUE);
            }
            std::ptr::copy(bytes.as_ptr(), at, S::VALUE);
        }
    }

    /// The same slot, for a borrow that the caller vouches for.
    #[inline(always)]
    pub(crate) fn forever(self) -> Slot<'static> {
        Slot { at: self.at, of: PhantomData }
    }
}

impl<S: Shape> Slots<S> {
    /// Address of offset 0 of a group, for `Slot::key`.
    #[inline(always)]
    pub(crate) fn base(&self, group: u32) -> *const u8 {
        self.desc(group).base
    }

    /// The segment of a group, if it is held.
    #[inline(always)]
    pub(crate) fn seg(&self, group: u32) -> Option<Seg> {
        self.shared.try_seg(group)
    }

    /// Number of key groups.
    #[inline(always)]
    pub(crate) fn groups(&self) -> u32 {
        self.desc.len() as u32
    }

    /// The key's group.
    #[inline(always)]
    pub(crate) fn group(&self, hash: KeyHash) -> u32 {
        hash.group(self.groups())
    }
}
