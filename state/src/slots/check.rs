//! Looking at a table: that its header can be true, and that each key is where lookups find it.
//!
//! Called by `load` (the header) and by `verify` (all of it).

use super::{
    CAPACITY_MIN, Cell, HEADER, Header, Shape, hash_in, home, is_zero, seal, sealed, unsealed,
};
use crate::key::KeyHash;
use crate::raw::Seg;
use crate::verify::{bump, is_block};
use std::mem::offset_of;

/// A header's words.
#[derive(Debug, Clone, Copy)]
struct Words {
    slots: u64,
    capacity: u64,
    old: u64,
    old_capacity: u64,
    start: u64,
    moved: u64,
    len: u64,
    zero_used: u64,
}

impl Words {
    fn read(seg: Seg, header: u64) -> Self {
        let word = |field: usize| seg.read::<u64>(header + field as u64);
        Self {
            slots: word(offset_of!(Header, slots)),
            capacity: word(offset_of!(Header, capacity)),
            old: word(offset_of!(Header, old)),
            old_capacity: word(offset_of!(Header, old_capacity)),
            start: word(offset_of!(Header, start)),
            moved: unsealed(word(offset_of!(Header, moved))),
            len: unsealed(word(offset_of!(Header, len))),
            zero_used: word(offset_of!(Header, zero_used)),
        }
    }
}

/// Whether the table at `header` lies where one can and says what one can say.
pub(crate) fn check_header<S: Shape>(seg: Seg, header: u64) -> Result<(), String> {
    let bump = bump(seg).min(seg.len());
    if !is_block(header, HEADER + S::SLOT as u64, bump) {
        return Err(format!("a table's header lies at {header}"));
    }
    let words = Words::read(seg, header);
    let word = |field: usize| seg.read::<u64>(header + field as u64);
    let is_sealed = word(offset_of!(Header, seal)) == seal(seg, header)
        && word(offset_of!(Header, moved)) == sealed(words.moved)
        && word(offset_of!(Header, len)) == sealed(words.len);
    let is_array = |at: u64, capacity: u64| {
        let bytes = capacity.checked_mul(S::SLOT as u64);
        let is_sized = capacity.is_power_of_two() && capacity >= CAPACITY_MIN;
        is_sized && bytes.is_some_and(|bytes| is_block(at, bytes, bump))
    };
    let Words { slots, capacity, old, old_capacity, start, moved, len, zero_used } = words;
    let is_grown = old == 0
        || is_array(old, old_capacity)
            && old_capacity < capacity
            && start < old_capacity
            && moved <= old_capacity;
    let is_sound = is_array(slots, capacity) && is_grown && len <= capacity && zero_used <= 1;
    if !is_sealed || !is_sound {
        return Err(format!("the table at {header} says of itself {words:?}"));
    }
    Ok(())
}

/// Looks at each slot of a table.
pub(crate) fn check<S: Shape>(
    seg: Seg,
    header: u64,
    group: u32,
    groups: u32,
) -> Result<(), String> {
    check_header::<S>(seg, header)?;
    let words = Words::read(seg, header);
    let mut keys = words.zero_used;
    for index in 0..words.capacity {
        let at = words.slots + index * S::SLOT as u64;
        if let Some(hash) = filled::<S>(seg, at) {
            keys += 1;
            check_slot::<S>(seg, at, hash, group, groups)?;
            check_way::<S>(seg, words, index, hash)?;
        }
    }
    if words.old != 0 {
        for moved in words.moved..words.old_capacity {
            let index = (words.start + moved) & (words.old_capacity - 1);
            let at = words.old + index * S::SLOT as u64;
            if let Some(hash) = filled::<S>(seg, at) {
                keys += 1;
                check_slot::<S>(seg, at, hash, group, groups)?;
            }
        }
    }
    if keys != words.len {
        return Err(format!("the table at {header} has {keys} keys and says {}", words.len));
    }
    Ok(())
}

/// The hash of the key in a slot; `None` where there is none.
fn filled<S: Shape>(seg: Seg, at: u64) -> Option<u64> {
    let slot = seg.bytes(at, S::SLOT).as_ptr();
    // SAFETY: all of the slot lies in the segment, as just checked.
    unsafe { (!is_zero::<S>(slot)).then(|| hash_in::<S>(slot)) }
}

/// Whether a key belongs to its group, and what it refers to lies in the heap.
fn check_slot<S: Shape>(
    seg: Seg,
    at: u64,
    hash: u64,
    group: u32,
    groups: u32,
) -> Result<(), String> {
    let own = KeyHash(hash).group(groups);
    if S::HASH_HAS_GROUP && own != group {
        return Err(format!("the slot at {at} holds a key of group {own}"));
    }
    let bump = bump(seg);
    let cell_is_sound = |at: u64| {
        let cell = Cell::of(seg.read(at));
        cell.room == 0 || cell.bytes <= cell.room && is_block(cell.at, u64::from(cell.room), bump)
    };
    if S::VALUE_IN_HEAP && !cell_is_sound(at + S::VALUE_AT as u64) {
        return Err(format!("the slot at {at} has a value outside the heap"));
    }
    if S::KEY.is_some() {
        return Ok(());
    }
    let block: u64 = seg.read(at + 8);
    let is_here = is_block(block, S::KEY_IN_BLOCK, bump);
    let is_whole = is_here
        && seg
            .read::<u64>(block)
            .checked_add(S::KEY_IN_BLOCK)
            .is_some_and(|bytes| is_block(block, bytes, bump));
    let is_sound =
        is_whole && S::PREFIX_IN_HEAP.is_none_or(|place| cell_is_sound(block + 8 + place as u64));
    if !is_sound {
        return Err(format!("the slot at {at} has a key block at {block}"));
    }
    Ok(())
}

/// Whether a lookup of the key comes to its slot: no empty one on its way.
fn check_way<S: Shape>(seg: Seg, words: Words, index: u64, hash: u64) -> Result<(), String> {
    let mask = words.capacity - 1;
    let mut way = home::<S>(hash) & mask;
    // Where lines are compared at once, an empty slot in the key's own line does not end it.
    let end = if S::IN_LINES { index & !(S::LINE as u64 - 1) } else { index };
    while way != end {
        if filled::<S>(seg, words.slots + way * S::SLOT as u64).is_none() {
            let at = words.slots + index * S::SLOT as u64;
            return Err(format!("the key at {at} cannot be found: slot {way} on its way is empty"));
        }
        way = (way + 1) & mask;
    }
    Ok(())
}
