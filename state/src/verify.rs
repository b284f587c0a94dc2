//! Verifying: whether a group's segment can be what this crate wrote. A wild store of the user's
//! code may have gone anywhere in it.
//!
//! Three looks: at each attach, the first page and the headers of tables (`check_header`, and
//! `slots`), which costs as much as attaching; when an offset leads nowhere (`unsound`), at no cost
//! where it does not; and all of it (`Groups::verify_all`), on suspicion, which takes as long as
//! reading it.
//!
//! Invariants: a look writes nothing, reads nothing outside the segment, and ends; values are the
//! user's, and can be anything.
//!
//! Called by `group`, `raw` and `slots`; the last by whoever suspects something.

use crate::error::StateError;
use crate::group::{ClassLists, GroupHeader, Groups, HEAP_AT, Shared, sum_of_roots};
use crate::heap::CLASSES;
use crate::raw::Seg;
use std::cell::RefCell;
use std::mem::offset_of;

/// No segment has more bytes than this.
const GRANTED_MAX: u64 = 1 << 44;

/// Blocks of the heap are multiples of this.
const GRAIN: u64 = 32;

/// A segment that this thread holds: where it begins, its operator and its number.
type Known = (usize, Box<str>, u32);

thread_local! {
    static KNOWN: RefCell<Vec<Known>> = const { RefCell::new(Vec::new()) };
}

/// Remembers whose a segment is, for what may have to be said of it.
pub(crate) fn remember(seg: Seg, operator: &str, group: u32) {
    let base = seg.base().addr();
    KNOWN.with_borrow_mut(|known| {
        known.retain(|(at, ..)| *at != base);
        known.push((base, operator.into(), group));
    });
}

/// The structure at `base` cannot be what this crate wrote: stops the process, since nothing that
/// the step has done can be counted on. The panic's message is the error.
#[cold]
#[inline(never)]
pub(crate) fn unsound(base: *const u8, what: &str) -> ! {
    let found = KNOWN.with_borrow(|known| {
        let own = known.iter().find(|(at, ..)| *at == base.addr());
        own.map(|(_, operator, group)| (operator.clone(), *group))
    });
    let (operator, group) = found.unwrap_or_else(|| ("(unknown)".into(), 0));
    std::panic::panic_any(StateError::Unsound { operator, group, what: what.into() })
}

/// How the tables of a named state are found from its root.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tables {
    /// One, whose header the root's word names.
    Root(u64),
    /// One for each entry of a directory.
    Slices,
}

/// How a named state is looked at.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) name: Box<str>,
    pub(crate) tables: Tables,
    pub(crate) table: TableCheck,
}

/// Looks at the table with this header, of a group of so many.
pub(crate) type TableCheck = fn(Seg, u64, u32, u32) -> Result<(), String>;

/// The words of the first page: what can be known of them without looking any further.
pub(crate) fn check_header(seg: Seg) -> Result<(), String> {
    let word = |at: usize| seg.read::<u64>(at as u64);
    let bump = word(offset_of!(GroupHeader, bump));
    let granted = word(offset_of!(GroupHeader, granted));
    let touched = word(offset_of!(GroupHeader, touched));
    let is_ordered = HEAP_AT <= bump && bump <= touched && bump <= granted;
    // What was granted is of the segment that it was written in: a copy has what was used alone.
    if !is_ordered || touched > seg.len() || granted > GRANTED_MAX {
        return Err(format!(
            "its heap ends at {bump}, granted up to {granted}, touched up to {touched}, \
             in a segment of {} bytes",
            seg.len()
        ));
    }
    let (stated, found) = (word(offset_of!(GroupHeader, roots_sum)), sum_of_roots(seg));
    if stated != found {
        return Err(format!("the sum of its roots is {found:#x} and not {stated:#x}"));
    }
    for class in 0..CLASSES {
        let [free, newest, oldest] = chains(seg, class);
        let sound = |at: u64| at == 0 || is_block(at, GRAIN << class, bump);
        // The oldest one is looked at only while there is a newest.
        let is_chain = newest == 0 || (oldest != 0 && sound(oldest));
        if !sound(free) || !sound(newest) || !is_chain {
            return Err(format!(
                "its free blocks of {} bytes begin at {free}, {newest} and {oldest}",
                GRAIN << class
            ));
        }
    }
    Ok(())
}

/// Heads of a class's chains: free, newest and oldest deferred.
fn chains(seg: Seg, class: usize) -> [u64; 3] {
    let at = offset_of!(GroupHeader, classes) + class * size_of::<ClassLists>();
    let fields = [
        offset_of!(ClassLists, free),
        offset_of!(ClassLists, deferred),
        offset_of!(ClassLists, deferred_end),
    ];
    fields.map(|field| seg.read((at + field) as u64))
}

/// Whether a block of so many bytes may lie here.
pub(crate) fn is_block(at: u64, bytes: u64, bump: u64) -> bool {
    let is_inside = at >= HEAP_AT && bytes <= bump && at <= bump - bytes;
    is_inside && at.is_multiple_of(GRAIN)
}

/// How far the heap was used.
pub(crate) fn bump(seg: Seg) -> u64 {
    seg.read(offset_of!(GroupHeader, bump) as u64)
}

impl Shared {
    /// Notes how a state that was just opened is looked at.
    pub(crate) fn check_by(&self, name: &str, tables: Tables, table: TableCheck) {
        let mut checks = self.checks.borrow_mut();
        checks.retain(|check| &*check.name != name);
        checks.push(Check { name: name.into(), tables, table });
    }

    fn check_group(&self, seg: Seg, group: u32) -> Result<(), String> {
        check_header(seg)?;
        check_free(seg)?;
        for check in self.checks.borrow().iter() {
            let Some(words) = self.find_root(seg, &check.name) else { continue };
            let named = |what: String| format!("{}: {what}", check.name);
            let headers = headers(seg, words, check.tables).map_err(named)?;
            for header in headers.into_iter().filter(|header| *header != 0) {
                (check.table)(seg, header, group, self.groups).map_err(named)?;
            }
        }
        Ok(())
    }
}

/// Follows all chains of free blocks.
fn check_free(seg: Seg) -> Result<(), String> {
    let bump = bump(seg);
    for class in 0..CLASSES {
        let size = GRAIN << class;
        let [free, newest, oldest] = chains(seg, class);
        let mut left = (bump - HEAP_AT) / size;
        for (mut at, end) in [(free, 0), (newest, oldest)] {
            while at != 0 {
                if !is_block(at, size, bump) || left == 0 {
                    return Err(format!("a chain of free blocks of {size} bytes leads to {at}"));
                }
                left -= 1;
                // Behind the oldest deferred block nothing is meant.
                at = if at == end { 0 } else { seg.read(at) };
            }
        }
    }
    Ok(())
}

/// Headers of a state's tables.
fn headers(seg: Seg, words: u64, tables: Tables) -> Result<Vec<u64>, String> {
    match tables {
        Tables::Root(word) => Ok(vec![seg.read(words + word * 8)]),
        Tables::Slices => crate::slice::headers(seg, words),
    }
}

impl Groups {
    /// Looks at everything in the groups that are held. Takes as long as reading all of it; pages
    /// that are missing are brought.
    ///
    /// # Errors
    /// The first thing that cannot be.
    pub fn verify_all(&self) -> Result<(), StateError> {
        for group in self.owned() {
            let Some(seg) = self.shared.try_seg(group) else { continue };
            self.shared.check_group(seg, group).map_err(|what| StateError::Unsound {
                operator: self.shared.operator.clone(),
                group,
                what: what.into(),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
