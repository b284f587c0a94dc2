//! From a key to its place: hash, key group, slot.
//!
//! Invariants: the group comes from the top bits of the hash and the slot from the low ones, so
//! that the keys of one group fill its table evenly; both are frozen, since they decide where state
//! lives on disk too (golden vectors).
//!
//! Called by the exchange (routing) and by every table.

use testudo_shm::hash::key_hash;
use testudo_shm::record::{Item, Record};

/// Key groups per keyed operator when nothing else is said.
pub const GROUPS_DEFAULT: u32 = 128;

/// The frozen hash of a key's canonical bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash(pub u64);

impl KeyHash {
    /// Hash of a key where it lies.
    ///
    /// ```
    /// use testudo_shm::record::{Record, Scratch};
    /// use testudo_state::KeyHash;
    /// let mut scratch = Scratch::default();
    /// let hash = KeyHash::of(7u64.item(&mut scratch));
    /// assert!(hash.group(128) < 128);
    /// ```
    #[inline(always)]
    #[must_use]
    pub fn of<K: Record>(key: Item<'_, K>) -> Self {
        Self(key_hash(key.bytes()))
    }

    /// The key group, of `groups`, that the key belongs to.
    #[inline(always)]
    #[must_use]
    pub fn group(self, groups: u32) -> u32 {
        group_of(self, groups)
    }
}

/// The key group, of `groups`, that a key with this hash belongs to: always below `groups`.
#[inline(always)]
#[must_use]
pub fn group_of(hash: KeyHash, groups: u32) -> u32 {
    (((hash.0 >> 32) * u64::from(groups)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use testudo_shm::record::Scratch;

    #[test]
    fn every_hash_has_a_group_in_range() {
        for groups in [1, 2, 7, 128, 4096] {
            assert_eq!(group_of(KeyHash(0), groups), 0);
            assert_eq!(group_of(KeyHash(u64::MAX), groups), groups - 1);
        }
    }

    #[test]
    fn groups_share_sequential_keys_evenly() {
        let mut counts = [0u32; 128];
        let mut scratch = Scratch::default();
        for key in 0u64..128_000 {
            counts[KeyHash::of(key.item(&mut scratch)).group(128) as usize] += 1;
        }
        assert!(counts.iter().all(|&count| (800..1200).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_place_of_a_key_is_frozen() {
        let golden: [(u64, u64, u32); 4] = [
            (0, 0xA54B_A69B_D99C_4D78, 82),
            (1, 0x323D_9F09_5B32_920A, 25),
            (42, 0xF680_2561_461A_9A87, 123),
            (u64::MAX, 0xF47D_E04E_7FD4_568D, 122),
        ];
        let mut scratch = Scratch::default();
        for (key, hash, group) in golden {
            let found = KeyHash::of(key.item(&mut scratch));
            assert_eq!((found.0, found.group(128)), (hash, group), "key {key} moved");
        }
    }
}
