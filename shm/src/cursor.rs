//! Positions: monotone 64-bit byte counts. Pure arithmetic, no memory.
//!
//! Called by `producer` (with the consumer's head) and `consumer` (with the producer's tail). Each
//! takes a word that a peer wrote, already loaded once into a local, and says whether it can be
//! true (rule R9).

use crate::fault::Fault;

/// Bytes between two positions; fails when `ahead` is not within `capacity` of `behind`, or not a
/// multiple of eight.
///
/// # Errors
/// [`Fault::Position`] with both positions.
#[inline(always)]
pub fn distance(ahead: u64, behind: u64, capacity: u64) -> Result<u64, Fault> {
    let bytes = ahead.wrapping_sub(behind);
    if bytes > capacity || !ahead.is_multiple_of(8) {
        return Err(Fault::Position { found: ahead, own: behind, capacity });
    }
    Ok(bytes)
}

/// A peer's position that must lie in `low..=high`.
///
/// # Errors
/// [`Fault::Position`] when it does not.
#[inline(always)]
pub fn between(found: u64, low: u64, high: u64, capacity: u64) -> Result<u64, Fault> {
    if found.wrapping_sub(low) > high.wrapping_sub(low) || !found.is_multiple_of(8) {
        return Err(Fault::Position { found, own: low, capacity });
    }
    Ok(found)
}
