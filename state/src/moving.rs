//! Moving: what a named state becomes is built beside it, and takes its place at once. This is the
//! part of a migration that knows no types; `migrate` has the other.
//!
//! ```text
//! begin    the heap's end is marked; each root that moves gets another one beside it
//! build    by who knows the types: from the old root into the other, behind the mark alone
//! switch   both roots change places; part of the open transaction
//! settle   the mark goes; part of the first transaction that changes what was moved
//! ```
//!
//! Until then, whoever attaches gives all of it up (`give_up_moving`), whatever it knows of the
//! types: roots change back, and the heap ends at the mark again. So the program before finds its
//! state as it was, bit for bit, and the one that moved it begins anew.
//!
//! Invariants:
//! - nothing before the mark is written before the switch: blocks come from behind the heap's end,
//!   no block is freed, and tables are made as large as they must be;
//! - *begin* and *build* are kept piece by piece (`Txn::keep_since`), so that the log stays small;
//!   the transaction has changed nothing of the group before them;
//! - without a mark, a root beside another is empty, or has what was before the last move that
//!   settled, and is still to be freed.
//!
//! Called by `group` at each attach, and by `migrate`.

use crate::error::StateError;
use crate::group::{GroupHeader, Groups, ROOTS_MAX, Root, Shared, add_to_sum, share};
use crate::raw::Seg;
use std::mem::offset_of;
use testudo_shm::txn::Txn;

const BUMP_AT: u64 = offset_of!(GroupHeader, bump) as u64;
const MARK_AT: u64 = offset_of!(GroupHeader, mark) as u64;
const MOVING_AT: u64 = offset_of!(GroupHeader, moving) as u64;
const SCHEMA: u64 = offset_of!(Root, schema) as u64;
const WORDS: u64 = offset_of!(Root, words) as u64;

/// Of the word that says what moves: the roots have changed places. The lower half has a bit for
/// each root.
const SWITCHED: u64 = 1 << 32;

const _: () = assert!(ROOTS_MAX <= 32);

/// The name of the root beside the one of this name.
pub(crate) const fn beside(name: u64) -> u64 {
    name ^ 0x6D6F_7665_6421_0001
}

/// Where a root begins.
fn root_at(index: u64) -> u64 {
    offset_of!(GroupHeader, roots) as u64 + index * size_of::<Root>() as u64
}

/// The place of a root in the directory, or the first free one.
fn place_of(seg: Seg, name: u64) -> Option<(u64, bool)> {
    let found = |index: u64| seg.read::<u64>(root_at(index));
    let index = (0..u64::from(ROOTS_MAX)).find(|index| [0, name].contains(&found(*index)))?;
    Some((index, found(index) == name))
}

/// Writes a word of a root other than its liveliest.
fn write(txn: &mut Txn, seg: Seg, at: u64, new: u64) {
    add_to_sum(txn, seg, share(at, seg.read(at)) ^ share(at, new));
    seg.write(txn, at, new);
}

/// Gives a root this schema and these words.
fn write_root(txn: &mut Txn, seg: Seg, index: u64, schema: u64, words: [u64; 6]) {
    write(txn, seg, root_at(index) + SCHEMA, schema);
    let at = root_at(index) + WORDS;
    let [summed @ .., lively] = words;
    for (word, new) in (0..).zip(summed) {
        write(txn, seg, at + word * 8, new);
    }
    seg.write(txn, at + crate::group::LIVELY_WORD * 8, lively);
}

fn read_root(seg: Seg, index: u64) -> (u64, [u64; 6]) {
    (seg.read(root_at(index) + SCHEMA), seg.read(root_at(index) + WORDS))
}

/// A root and the one beside it change places, but for their names.
fn switch(txn: &mut Txn, seg: Seg, [one, other]: [u64; 2]) {
    let ((schema, words), (its_schema, its_words)) = (read_root(seg, one), read_root(seg, other));
    write_root(txn, seg, one, its_schema, its_words);
    write_root(txn, seg, other, schema, words);
}

/// The roots that move in a group, each with the one beside it.
fn moving(seg: Seg) -> Vec<[u64; 2]> {
    let roots = seg.read::<u64>(MOVING_AT);
    let moving = (0..u64::from(ROOTS_MAX)).filter(|index| roots >> index & 1 != 0);
    let pair = |index: u64| match place_of(seg, beside(seg.read(root_at(index)))) {
        Some((other, true)) => Some([index, other]),
        _ => None,
    };
    moving.filter_map(pair).collect()
}

fn is_switched(seg: Seg) -> bool {
    seg.read::<u64>(MOVING_AT) & SWITCHED != 0
}

impl Shared {
    /// The schema that a group's root of this name has.
    pub(crate) fn schema_of(&self, seg: Seg, name: u64) -> Option<u64> {
        let (index, is_there) = place_of(seg, name)?;
        is_there.then(|| read_root(seg, index).0)
    }

    /// The words of a group's root of this name and schema; zero without one.
    pub(crate) fn words_of(&self, seg: Seg, name: u64, schema: u64) -> u64 {
        match place_of(seg, name) {
            Some((index, true)) if read_root(seg, index).0 == schema => root_at(index) + WORDS,
            _ => 0,
        }
    }

    /// Begins to move a root: gives the one beside it the schema that it is to have.
    pub(crate) fn begin_moving(
        &self,
        txn: &mut Txn,
        group: u32,
        (state, name): (&str, u64),
        schema: u64,
    ) -> Result<(), StateError> {
        let (seg, since) = (self.seg(group)?, txn.logged());
        // From here on, what is read there was written here.
        self.views[group as usize].set(None);
        let Some((index, true)) = place_of(seg, name) else { return Ok(()) };
        let Some((other, is_there)) = place_of(seg, beside(name)) else {
            let (operator, state, limit) = (self.operator.clone(), state.into(), ROOTS_MAX);
            return Err(StateError::TooManyStates { operator, state, limit });
        };
        if seg.read::<u64>(MARK_AT) == 0 {
            seg.write(txn, MARK_AT, seg.read::<u64>(BUMP_AT));
        }
        if !is_there {
            write(txn, seg, root_at(other), beside(name));
        }
        // What was there before the last move, and was never freed, is lost to the heap.
        write_root(txn, seg, other, schema, [0; 6]);
        seg.write(txn, MOVING_AT, seg.read::<u64>(MOVING_AT) | 1 << index);
        txn.keep_since(since);
        Ok(())
    }

    /// Gives up what was moved and has not settled; `front` shows the first page of the group.
    pub(crate) fn give_up_moving(&self, txn: &mut Txn, group: u32, (front, seg): (Seg, Seg)) {
        let (mark, since) = (front.read::<u64>(MARK_AT), txn.logged());
        if mark == 0 {
            return;
        }
        self.views[group as usize].set(None);
        for [index, other] in moving(seg) {
            if is_switched(seg) {
                switch(txn, seg, [index, other]);
            }
            let schema = read_root(seg, other).0;
            write_root(txn, seg, other, schema, [0; 6]);
        }
        seg.write(txn, BUMP_AT, mark.min(seg.read(BUMP_AT)));
        seg.write(txn, MOVING_AT, 0u64);
        seg.write(txn, MARK_AT, 0u64);
        txn.keep_since(since);
    }
}

/// While it lives, blocks come from behind the heap's end.
#[derive(Debug)]
pub(crate) struct Behind<'a>(&'a Shared);

impl<'a> Behind<'a> {
    pub(crate) fn new(shared: &'a Shared) -> Self {
        shared.is_moving.set(true);
        Self(shared)
    }
}

impl Drop for Behind<'_> {
    fn drop(&mut self) {
        self.0.is_moving.set(false);
    }
}

impl Groups {
    /// What was built takes the place of what it was built from: with the open transaction, in all
    /// groups that are held. True when there was anything.
    pub fn switch_moved(&self, txn: &mut Txn) -> bool {
        let mut any = false;
        for seg in self.owned().filter_map(|group| self.shared.front(group)) {
            if seg.read::<u64>(MARK_AT) == 0 || is_switched(seg) {
                continue;
            }
            moving(seg).into_iter().for_each(|pair| switch(txn, seg, pair));
            seg.write(txn, MOVING_AT, seg.read::<u64>(MOVING_AT) | SWITCHED);
            any = true;
        }
        any
    }

    /// What was moved is final with the open transaction: from then on, who does not know its types
    /// cannot go on from it.
    pub fn settle_moved(&self, txn: &mut Txn) {
        for seg in self.owned().filter_map(|group| self.shared.front(group)) {
            if seg.read::<u64>(MARK_AT) != 0 {
                seg.write(txn, MOVING_AT, 0u64);
                seg.write(txn, MARK_AT, 0u64);
            }
        }
    }

    /// Whether anything was moved and has not settled.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        let mut held = self.owned().filter_map(|group| self.shared.front(group));
        held.any(|seg| seg.read::<u64>(MARK_AT) != 0)
    }
}
