//! A key group's segment, and the set of groups that one operator holds in this worker.
//!
//! ```text
//! segment  0 ┌ magic, version, group, groups, schema
//!         32 ├ bump, granted, touched            (heap, see `heap`)
//!        128 ├ free lists, deferred lists        (32 size classes)
//!        896 ├ directory of named roots          (32 × 64 bytes)
//!       4096 └ heap blocks …
//! ```
//!
//! Invariants:
//! - a segment whose magic is zero is empty: formatting writes every field and logs only the magic,
//!   last;
//! - every pointer kept in a segment is an offset from its start, so a group can be mapped
//!   anywhere;
//! - a named root, once made, stays at its place in the directory;
//! - nothing in this process is needed to read a segment: all caches are rebuilt by `attach` and
//!   `reload`.
//!
//! Called by the worker: attach after rolling back, `begin_step` at each step, one `Groups` per
//! keyed operator.

use crate::error::StateError;
use crate::heap::{CLASSES, HeapCache};
use crate::memory::Gauge;
use crate::raw::Seg;
use crate::verify::{self, Check};
use std::cell::{Cell, RefCell};
use std::mem::offset_of;
use std::rc::Rc;
use testudo_shm::hash::name_hash;
use testudo_shm::txn::Txn;

/// First word of a formatted key group: "TSTDOGRP" read as little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"TSTDOGRP");
/// Version of everything inside a key group's segment.
pub const LAYOUT_VERSION: u32 = 3;
/// Named roots in a group's directory.
pub const ROOTS_MAX: u32 = 32;
/// Bytes to leave between the segments of successive groups in the arena. Groups that lie a power
/// of two apart have their tables' pages in the same few sets of the TLB (measured: 49 against 68
/// million updates a second).
pub const STAGGER: usize = 67 * 4096;
/// Where the heap begins.
pub const HEAP_AT: u64 = 4096;

/// Offset of the word that says how far the segment was ever used: bytes behind are zeros.
pub const USED_AT: u64 = offset_of!(GroupHeader, touched) as u64;

/// A named state's root, as it stands in a segment.
#[derive(Debug, Clone, Copy)]
pub struct RootWords {
    /// Hash of its name.
    pub name: u64,
    /// Its schema.
    pub schema: u64,
    /// Six words whose meaning is the structure's.
    pub words: [u64; 6],
}

fn word_in(front: &[u8], at: usize) -> u64 {
    let bytes = front.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

/// The named roots in the first page of a group's segment; none in what is no key group.
pub fn roots(front: &[u8]) -> impl Iterator<Item = RootWords> + '_ {
    let count = if word_in(front, 0) == MAGIC { ROOTS_MAX as usize } else { 0 };
    let roots = (0..count).map(|index| {
        let at = offset_of!(GroupHeader, roots) + index * size_of::<Root>();
        let word = |n: usize| word_in(front, at + n * 8);
        let words = [2, 3, 4, 5, 6, 7].map(word);
        RootWords { name: word(0), schema: word(1), words }
    });
    roots.take_while(|root| root.name != 0)
}

/// How many size classes of the heap have free blocks, by a group's first page.
#[must_use]
pub fn free_classes(front: &[u8]) -> usize {
    let class = |n: usize| offset_of!(GroupHeader, classes) + n * size_of::<ClassLists>();
    (0..CLASSES).filter(|n| word_in(front, class(*n)) != 0).count()
}

/// Where a group's states will be looked at first when they are opened, as far as the segment's
/// first page, of which `front` has the bytes, tells: offsets and bytes. Some of them may be none:
/// what a root's words mean is known to its structure alone. Nothing for what is no key group.
#[must_use]
pub fn looked_at_first(front: &[u8]) -> Vec<(u64, u64)> {
    let used = word_in(front, USED_AT as usize);
    let is_inside = |at: u64, bytes: u64| {
        at >= HEAP_AT && at.is_multiple_of(8) && at.checked_add(bytes).is_some_and(|to| to <= used)
    };
    let mut found = Vec::new();
    for RootWords { words, .. } in roots(front) {
        found.extend(words.iter().filter(|at| is_inside(**at, 8)).map(|at| (*at, 8)));
        let directory = crate::slice::directory(words);
        found.extend(directory.filter(|(at, bytes)| is_inside(*at, *bytes)));
    }
    found
}

/// The first page of a key group's segment. Never instantiated: it gives the offsets.
#[repr(C)]
pub(crate) struct GroupHeader {
    magic: u64,
    version: u32,
    group: u32,
    groups: u32,
    reserved: u32,
    schema: u64,
    pub(crate) bump: u64,
    pub(crate) granted: u64,
    pub(crate) touched: u64,
    /// Of all roots: see [`share`].
    pub(crate) roots_sum: u64,
    /// Where the heap ended when what is being moved began; 0 while nothing is: see `moving`.
    pub(crate) mark: u64,
    /// Which roots are being moved.
    pub(crate) moving: u64,
    reserved_words: [u64; 6],
    pub(crate) classes: [ClassLists; CLASSES],
    pub(crate) roots: [Root; ROOTS_MAX as usize],
}

/// The chains of one size class.
#[repr(C)]
pub(crate) struct ClassLists {
    /// Blocks that were free at the last commit.
    pub(crate) free: u64,
    /// Blocks freed since, newest first.
    pub(crate) deferred: u64,
    /// The oldest deferred block.
    pub(crate) deferred_end: u64,
}

/// The word of a root that is not summed up: it changes too often.
pub(crate) const LIVELY_WORD: u64 = 5;

/// What a word of a root adds to the sum of its group: nothing where it is zero. What is looked at
/// when a worker attaches leads to everything else; a damaged word there must not look like a state
/// that has nothing yet.
pub(crate) fn share(at: u64, word: u64) -> u64 {
    let mixed = (word ^ at.rotate_left(40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    if word == 0 { 0 } else { mixed ^ (mixed >> 29) }
}

pub(crate) fn add_to_sum(txn: &mut Txn, seg: Seg, change: u64) {
    let at = offset_of!(GroupHeader, roots_sum) as u64;
    seg.write(txn, at, seg.read::<u64>(at) ^ change);
}

/// The sum that a group's roots have.
pub(crate) fn sum_of_roots(seg: Seg) -> u64 {
    let first = offset_of!(GroupHeader, roots) as u64;
    let roots = (0..u64::from(ROOTS_MAX)).map(|index| first + index * size_of::<Root>() as u64);
    let named = roots.take_while(|root| seg.read::<u64>(*root) != 0);
    let words = named.flat_map(|root| (0..2 + LIVELY_WORD).map(move |word| root + word * 8));
    words.fold(0, |sum, at| sum ^ share(at, seg.read(at)))
}

/// A named root: six words whose meaning is the structure's.
#[repr(C)]
pub(crate) struct Root {
    name: u64,
    pub(crate) schema: u64,
    pub(crate) words: [u64; 6],
}

const _: () = {
    assert!(offset_of!(GroupHeader, bump) == 32);
    assert!(offset_of!(GroupHeader, classes) == 128);
    assert!(size_of::<ClassLists>() == 24);
    assert!(offset_of!(GroupHeader, roots) == 896);
    assert!(size_of::<Root>() == 64 && offset_of!(Root, words) == 16);
    assert!(size_of::<GroupHeader>() == 896 + 64 * ROOTS_MAX as usize);
    assert!(size_of::<GroupHeader>() as u64 <= HEAP_AT);
};

/// What all structures of one operator share in this process.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) operator: Box<str>,
    pub(crate) groups: u32,
    schema: u64,
    pub(crate) gauge: Rc<Gauge>,
    segs: Box<[Cell<Option<Seg>>]>,
    /// Where the first pages can be read as well, if they are mapped a second time.
    pub(crate) views: Box<[Cell<Option<Seg>>]>,
    pub(crate) heaps: Box<[HeapCache]>,
    /// Counts steps: what was freed in an earlier one is committed.
    pub(crate) step: Cell<u64>,
    /// Big blocks freed by the last step, whose pages may be given back.
    pub(crate) punchable: RefCell<Vec<(u32, u64, u64)>>,
    open: RefCell<Vec<Box<str>>>,
    /// How each open state is looked at.
    pub(crate) checks: RefCell<Vec<Check>>,
    /// Something is being moved: blocks come from behind the heap's end alone, and none is freed.
    pub(crate) is_moving: Cell<bool>,
}

impl Shared {
    /// The segment of a group, if it is held here.
    #[inline]
    pub(crate) fn try_seg(&self, group: u32) -> Option<Seg> {
        self.segs.get(group as usize).and_then(Cell::get)
    }

    /// The segment of a group that is held here.
    #[inline]
    pub(crate) fn seg(&self, group: u32) -> Result<Seg, StateError> {
        self.try_seg(group)
            .ok_or_else(|| StateError::NotOwned { operator: self.operator.clone(), group })
    }

    /// A held group's first page, to be read while attaching: in its second mapping, where there is
    /// one.
    pub(crate) fn front(&self, group: u32) -> Option<Seg> {
        self.views.get(group as usize).and_then(Cell::get).or_else(|| self.try_seg(group))
    }

    /// The groups held here, ascending.
    pub(crate) fn owned(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.groups).filter(|&group| self.try_seg(group).is_some())
    }

    /// The words of a named root, if there is one.
    pub(crate) fn find_root(&self, seg: Seg, name: &str) -> Option<u64> {
        let (hash, first) = (name_hash(name), offset_of!(GroupHeader, roots));
        let mut roots = (0..ROOTS_MAX as usize).map(|index| first + index * size_of::<Root>());
        let found = roots.find(|at| seg.read::<u64>(*at as u64) == hash);
        found.map(|at| (at + offset_of!(Root, words)) as u64)
    }

    /// Finds or makes the named root of a group: offset of its six words.
    fn root(&self, txn: &mut Txn, group: u32, name: &str, schema: u64) -> Result<u64, StateError> {
        let seg = self.seg(group)?;
        let front = self.front(group).unwrap_or(seg);
        let hash = name_hash(name);
        for index in 0..u64::from(ROOTS_MAX) {
            let at = offset_of!(GroupHeader, roots) as u64 + index * size_of::<Root>() as u64;
            let words = at + offset_of!(Root, words) as u64;
            let schema_at = at + offset_of!(Root, schema) as u64;
            let found: u64 = front.read(at);
            if found == 0 {
                seg.write_fresh(txn, schema_at, schema);
                seg.write_fresh(txn, words, [0u64; 6]);
                seg.write(txn, at, hash);
                add_to_sum(txn, seg, share(at, hash) ^ share(schema_at, schema));
                return Ok(words);
            }
            if found == hash {
                let found: u64 = front.read(schema_at);
                if found == schema {
                    return Ok(words);
                }
                let (operator, state) = (self.operator.clone(), name.into());
                return Err(StateError::StateSchema {
                    operator,
                    state,
                    group,
                    found,
                    expected: schema,
                });
            }
        }
        let (operator, state) = (self.operator.clone(), name.into());
        Err(StateError::TooManyStates { operator, state, limit: ROOTS_MAX })
    }
}

/// A named state that is open in this process, with its root in each held group.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) shared: Rc<Shared>,
    name: Box<str>,
    schema: u64,
    /// Offset of the root's words by group; zero where the group is not held.
    roots: Box<[u64]>,
    /// Some group may have discarded tables to sweep.
    pub(crate) has_discarded: Cell<bool>,
}

impl Opened {
    pub(crate) fn new(
        groups: &Groups,
        txn: &mut Txn,
        name: &str,
        schema: u64,
    ) -> Result<Self, StateError> {
        let shared = Rc::clone(&groups.shared);
        if shared.open.borrow().iter().any(|open| &**open == name) {
            let operator = shared.operator.clone();
            return Err(StateError::AlreadyOpen { operator, state: name.into() });
        }
        shared.open.borrow_mut().push(name.into());
        let roots = vec![0; shared.groups as usize].into_boxed_slice();
        let has_discarded = Cell::new(true);
        let mut opened = Self { shared, name: name.into(), schema, roots, has_discarded };
        opened.reload(txn)?;
        Ok(opened)
    }

    /// A view of roots that `root` finds in each held group, of no name: not to be reloaded.
    pub(crate) fn over(groups: &Groups, schema: u64, root: impl Fn(u32, Seg) -> u64) -> Self {
        let shared = Rc::clone(&groups.shared);
        let of = |group| shared.try_seg(group).map_or(0, |seg| root(group, seg));
        let roots = (0..shared.groups).map(of).collect();
        let has_discarded = Cell::new(true);
        Self { shared, name: "".into(), schema, roots, has_discarded }
    }

    /// Finds the roots again, after groups were attached or released.
    pub(crate) fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        self.has_discarded.set(true);
        for group in 0..self.shared.groups {
            self.roots[group as usize] = match self.shared.try_seg(group) {
                Some(_) => self.shared.root(txn, group, &self.name, self.schema)?,
                None => 0,
            };
        }
        Ok(())
    }

    /// Offset of a root word of a held group.
    #[inline]
    pub(crate) fn word(&self, group: u32, word: u64) -> u64 {
        let words = self.roots[group as usize];
        debug_assert!(words != 0 && word < 6, "root of a group that is not held");
        words + word * 8
    }

    /// Whether it has a root in this group.
    pub(crate) fn has(&self, group: u32) -> bool {
        self.roots[group as usize] != 0
    }

    /// Reads a root word; zero where the group is not held.
    pub(crate) fn read(&self, group: u32, word: u64) -> u64 {
        match self.shared.try_seg(group) {
            Some(seg) if self.roots[group as usize] != 0 => seg.read(self.word(group, word)),
            _ => 0,
        }
    }

    /// As [`Opened::read`], while attaching: of all groups, most of which are not needed soon.
    pub(crate) fn glance(&self, group: u32, word: u64) -> u64 {
        match self.shared.front(group) {
            Some(front) if self.roots[group as usize] != 0 => front.read(self.word(group, word)),
            _ => 0,
        }
    }

    /// Writes a root word of a held group.
    pub(crate) fn write(&self, txn: &mut Txn, group: u32, word: u64, new: u64) {
        let Some(seg) = self.shared.try_seg(group) else { return };
        let at = self.word(group, word);
        if word != LIVELY_WORD {
            add_to_sum(txn, seg, share(at, seg.read(at)) ^ share(at, new));
        }
        seg.write(txn, at, new);
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.shared.open.borrow_mut().retain(|open| *open != self.name);
    }
}

/// The key groups of one operator that this worker holds.
///
/// It and what is opened from it are caches of the segments: after a rollback they are made anew.
///
/// ```
/// use std::rc::Rc;
/// use testudo_shm::{record::{Record, Scratch}, txn::Txn};
/// use testudo_state::{Gauge, Groups, KeyHash};
/// let mut memory = vec![0u64; 32 * 1024];
/// let mut txn = Txn::on_heap(&mut memory, 4096);
/// let groups = Groups::new("counts", 1, 0, Rc::new(Gauge::unlimited()));
/// // SAFETY: the memory behind the log belongs to this example alone.
/// unsafe {
///     let base = txn.base().add(4096 * 8);
///     groups.attach(&mut txn, 0, base, 28 * 8192)?;
/// }
/// let mut counts = groups.table::<u64, u64>(&mut txn, "count")?;
/// txn.commit();
/// groups.begin_step(&txn);
/// let mut scratch = Scratch::default();
/// let key = 7u64.item(&mut scratch);
/// counts.update(&mut txn, KeyHash::of(key), key, || 0, |count| *count += 1)?;
/// txn.commit();
/// assert_eq!(*counts.get(KeyHash::of(key), key).unwrap().view, 1);
/// # Ok::<(), testudo_state::StateError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Groups {
    pub(crate) shared: Rc<Shared>,
}

impl Groups {
    /// An operator of `groups` key groups, none of them held yet. `schema` is a hash of the
    /// operator's key type and whatever else must not change while its segments live; the named
    /// states check their own types besides.
    #[must_use]
    pub fn new(operator: &str, groups: u32, schema: u64, gauge: Rc<Gauge>) -> Self {
        assert!(groups > 0, "operator {operator} needs at least one key group");
        let shared = Shared {
            operator: operator.into(),
            groups,
            schema,
            gauge,
            segs: (0..groups).map(|_| Cell::new(None)).collect(),
            views: (0..groups).map(|_| Cell::new(None)).collect(),
            heaps: (0..groups).map(|_| HeapCache::default()).collect(),
            step: Cell::new(1),
            punchable: RefCell::new(Vec::new()),
            open: RefCell::new(Vec::new()),
            checks: RefCell::new(Vec::new()),
            is_moving: Cell::new(false),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Takes a group that is mapped at `base..base + len`: formats it when it is empty, checks it
    /// otherwise. Structures that are open already see it after their `reload`.
    ///
    /// # Errors
    /// When the segment is something else than this group of this operator, in this layout.
    ///
    /// # Safety
    /// The range is mapped writable by this process alone, inside the arena of the one transaction
    /// that is given to all calls on this operator's state, 4096-aligned, and stays so until
    /// `release`; the transaction was rolled back.
    pub unsafe fn attach(
        &self,
        txn: &mut Txn,
        group: u32,
        base: *mut u8,
        len: usize,
    ) -> Result<(), StateError> {
        let shared = &self.shared;
        assert!(group < shared.groups && len as u64 > HEAP_AT, "group {group} of {len} bytes");
        // SAFETY: passed on.
        let seg = unsafe { Seg::new(base, len as u64) };
        let seg = seg.expect("a mapping is never at address zero");
        verify::remember(seg, &shared.operator, group);
        let front = shared.views[group as usize].get().unwrap_or(seg);
        match front.read(0) {
            0 => self.format(txn, seg, group),
            MAGIC => {
                self.verify(front, group)?;
                shared.give_up_moving(txn, group, (front, seg));
            }
            found => {
                return Err(StateError::Magic { operator: shared.operator.clone(), group, found });
            }
        }
        shared.segs[group as usize].set(Some(seg));
        Ok(())
    }

    /// As [`Groups::attach`], a group that was there before. `view` may be a second mapping of its
    /// first page, whose bytes are at hand while those at `base` cost a page fault.
    ///
    /// # Errors
    /// [`StateError::Unsound`] when it is not what it was.
    ///
    /// # Safety
    /// As there; and what is at `view` is the page at `base`, for good.
    pub unsafe fn attach_again(
        &self,
        txn: &mut Txn,
        group: u32,
        (base, len): (*mut u8, usize),
        view: Option<*mut u8>,
    ) -> Result<(), StateError> {
        let unsound = |what: String| {
            let own = format!("operator {}: ", self.shared.operator);
            let what = what.strip_prefix(&own).unwrap_or(&what).into();
            StateError::Unsound { operator: self.shared.operator.clone(), group, what }
        };
        // SAFETY: passed on; a view is only read, and nothing behind the first page of it.
        let front = unsafe { view.and_then(|view| Seg::new(view, len as u64)) };
        self.shared.views[group as usize].set(front);
        // SAFETY: passed on.
        if unsafe { view.unwrap_or(base).cast::<u64>().read() } == 0 {
            return Err(unsound("its first page is empty".into()));
        }
        // SAFETY: passed on.
        unsafe { self.attach(txn, group, base, len) }.map_err(|error| match error {
            StateError::Unsound { .. } => error,
            other => unsound(other.to_string()),
        })
    }

    fn format(&self, txn: &mut Txn, seg: Seg, group: u32) {
        let shared = &self.shared;
        // `touched` survives a rolled-back formatting: what lies below it may hold the remains of
        // that step.
        let touched_at = offset_of!(GroupHeader, touched);
        let touched = seg.read::<u64>(touched_at as u64).max(HEAP_AT);
        seg.write_fresh(txn, touched_at as u64, touched);
        seg.zero(txn, 8, touched_at - 8);
        seg.zero(txn, touched_at as u64 + 8, size_of::<GroupHeader>() - touched_at - 8);
        seg.write_fresh(txn, offset_of!(GroupHeader, version) as u64, LAYOUT_VERSION);
        seg.write_fresh(txn, offset_of!(GroupHeader, group) as u64, group);
        seg.write_fresh(txn, offset_of!(GroupHeader, groups) as u64, shared.groups);
        seg.write_fresh(txn, offset_of!(GroupHeader, schema) as u64, shared.schema);
        seg.write_fresh(txn, offset_of!(GroupHeader, bump) as u64, HEAP_AT);
        seg.write_fresh(txn, offset_of!(GroupHeader, granted) as u64, HEAP_AT);
        seg.write(txn, offset_of!(GroupHeader, magic) as u64, MAGIC);
    }

    fn verify(&self, seg: Seg, group: u32) -> Result<(), StateError> {
        let shared = &self.shared;
        let operator = || shared.operator.clone();
        let found: u32 = seg.read(offset_of!(GroupHeader, version) as u64);
        if found != LAYOUT_VERSION {
            let expected = LAYOUT_VERSION;
            return Err(StateError::Version { operator: operator(), group, found, expected });
        }
        let found_group: u32 = seg.read(offset_of!(GroupHeader, group) as u64);
        let found_groups: u32 = seg.read(offset_of!(GroupHeader, groups) as u64);
        let groups = shared.groups;
        if (found_group, found_groups) != (group, groups) {
            return Err(StateError::WrongGroup {
                operator: operator(),
                group,
                groups,
                found_group,
                found_groups,
            });
        }
        let found: u64 = seg.read(offset_of!(GroupHeader, schema) as u64);
        let expected = shared.schema;
        if found != expected {
            return Err(StateError::Schema { operator: operator(), group, found, expected });
        }
        let unsound =
            |what: String| StateError::Unsound { operator: operator(), group, what: what.into() };
        verify::check_header(seg).map_err(unsound)
    }

    /// Lets a group go. Open structures forget it at their `reload`, which must come before the
    /// group is unmapped.
    pub fn release(&self, group: u32) {
        self.shared.segs[group as usize].set(None);
        self.shared.views[group as usize].set(None);
        self.shared.punchable.borrow_mut().retain(|&(of, ..)| of != group);
    }

    /// Name of the operator.
    #[must_use]
    pub fn operator(&self) -> &str {
        &self.shared.operator
    }

    /// How many key groups the operator has in all.
    #[must_use]
    pub fn groups(&self) -> u32 {
        self.shared.groups
    }

    /// The groups held here, ascending.
    pub fn owned(&self) -> impl Iterator<Item = u32> + '_ {
        self.shared.owned()
    }

    /// Says that a step begins: what earlier ones freed may be used again (rule R12). Call it after
    /// each commit, before anything of the new step is logged; at any other time it does nothing,
    /// which is safe but keeps freed memory waiting.
    #[inline]
    pub fn begin_step(&self, txn: &Txn) {
        if txn.logged() == 0 {
            self.shared.step.set(self.shared.step.get() + 1);
        }
    }

    /// Gives the pages of big blocks that are free, and committed so, back to the system (rule
    /// R12). To be called right after `begin_step`. Costs nothing when there are none.
    pub fn give_back(&self, txn: &Txn) {
        self.punch(txn, |group, at, bytes| {
            if let Some(seg) = self.shared.try_seg(group) {
                seg.give_back(at, bytes);
            }
        });
    }

    /// Names the pages (group, offset, bytes) of big blocks that are free and committed so, for
    /// punching. To be called right after `begin_step`. Costs nothing when there are none.
    pub fn punch(&self, txn: &Txn, mut punch: impl FnMut(u32, u64, u64)) {
        // A cut that is open may still have to save what they held.
        if txn.logged() != 0 || txn.is_cutting() {
            return;
        }
        for (group, at, len) in self.shared.punchable.borrow_mut().drain(..) {
            punch(group, at, len);
        }
    }

    /// Bytes of a held group's segment that were ever handed out: the segment's size in memory is
    /// about this.
    #[must_use]
    pub fn used(&self, group: u32) -> u64 {
        let at = offset_of!(GroupHeader, bump) as u64;
        self.shared.try_seg(group).map_or(0, |seg| seg.read(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG_WORDS: usize = 2048;
    const GROUP_WORDS: usize = 8192;
    /// Where the first root of a group begins.
    const HEADER_END: usize = offset_of!(GroupHeader, roots);

    fn with_group(test: impl FnOnce(&mut Txn, *mut u8)) {
        let mut memory = vec![0u64; LOG_WORDS + GROUP_WORDS];
        let mut txn = Txn::on_heap(&mut memory, LOG_WORDS);
        // SAFETY: the group lies behind the log in the same vector.
        let base = unsafe { txn.base().add(LOG_WORDS * 8) };
        test(&mut txn, base);
    }

    fn attach(
        txn: &mut Txn,
        base: *mut u8,
        groups: u32,
        group: u32,
        schema: u64,
    ) -> Result<Groups, StateError> {
        let held = Groups::new("sessions", groups, schema, Rc::new(Gauge::unlimited()));
        // SAFETY: the memory belongs to the test and outlives the result.
        unsafe { held.attach(txn, group, base, GROUP_WORDS * 8) }.map(|()| held)
    }

    #[test]
    fn a_zeroed_segment_is_formatted_and_found_again() {
        with_group(|txn, base| {
            attach(txn, base, 4, 2, 9).unwrap();
            txn.commit();
            let again = attach(txn, base, 4, 2, 9).unwrap();
            assert_eq!(txn.logged(), 0, "attaching to a formatted group changes nothing");
            assert_eq!(again.owned().collect::<Vec<_>>(), [2]);
        });
    }

    #[test]
    fn a_group_is_opened_from_the_second_mapping_of_its_first_page() {
        with_group(|txn, base| {
            let groups = attach(txn, base, 4, 2, 9).unwrap();
            groups.table::<u64, u64>(txn, "count").unwrap();
            txn.commit();
            let mut view = vec![0u64; HEAP_AT as usize / 8];
            // SAFETY: both have a page.
            unsafe { view.as_mut_ptr().cast::<u8>().copy_from(base, HEAP_AT as usize) };
            let mut again = |view: &mut [u64]| {
                let groups = Groups::new("sessions", 4, 9, Rc::new(Gauge::unlimited()));
                let (len, view) = (GROUP_WORDS * 8, view.as_mut_ptr().cast());
                // SAFETY: the memory belongs to the test and outlives the groups.
                unsafe { groups.attach_again(txn, 2, (base, len), Some(view)) }?;
                // SAFETY: inside the test's memory; nothing has been opened there.
                unsafe { base.add(HEADER_END).write_bytes(1, 8) };
                groups.table::<u64, u64>(txn, "count")?;
                assert_eq!(txn.logged(), 0, "its root was found");
                Ok(())
            };
            again(&mut view).expect("the page itself is not looked at");
            view[0] = 0;
            assert!(matches!(again(&mut view).unwrap_err(), StateError::Unsound { .. }));
        });
    }

    #[test]
    fn formatting_is_undone_by_rolling_back() {
        with_group(|txn, base| {
            let groups = attach(txn, base, 4, 2, 9).unwrap();
            groups.table::<u64, u64>(txn, "count").unwrap();
            txn.roll_back().unwrap();
            attach(txn, base, 8, 3, 1).unwrap();
        });
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        with_group(|txn, base| {
            attach(txn, base, 4, 2, 9).unwrap();
            let other = attach(txn, base, 4, 3, 9).unwrap_err().to_string();
            assert!(other.contains("operator sessions") && other.contains("group 3 of 4"));
            let other = attach(txn, base, 4, 2, 8).unwrap_err().to_string();
            assert!(other.contains("schema 0x0000000000000009"), "{other}");
            // SAFETY: inside the test's memory.
            unsafe { base.add(8).cast::<u32>().write(77) };
            let other = attach(txn, base, 4, 2, 9).unwrap_err().to_string();
            assert!(other.contains("version 77"), "{other}");
            // SAFETY: inside the test's memory.
            unsafe { base.cast::<u64>().write(77) };
            assert!(matches!(
                attach(txn, base, 4, 2, 9).unwrap_err(),
                StateError::Magic { found: 77, .. }
            ));
        });
    }

    #[test]
    fn a_state_keeps_its_types_and_is_open_once() {
        with_group(|txn, base| {
            let groups = attach(txn, base, 4, 2, 9).unwrap();
            let table = groups.table::<u64, u64>(txn, "count").unwrap();
            let twice = groups.table::<u64, u64>(txn, "count").unwrap_err();
            assert!(matches!(twice, StateError::AlreadyOpen { .. }));
            drop(table);
            let other = groups.table::<u64, u32>(txn, "count").unwrap_err();
            assert!(other.to_string().contains("state count"), "{other}");
            for index in 1..ROOTS_MAX {
                groups.table::<u64, u64>(txn, &format!("state {index}")).unwrap();
            }
            let full = groups.table::<u64, u64>(txn, "one more").unwrap_err();
            assert!(full.to_string().contains("at most 32"), "{full}");
        });
    }
}
