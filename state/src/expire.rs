//! Expiry: keys that are forgotten some time after they were last touched. Kept beside a state that
//! holds what the keys stand for; what time it is, the caller says.
//!
//! A table has, for each key, when it was touched and when its timer is due; the timers are those
//! of `timer`. A key has one timer, which stays where it is when the key is touched again: once
//! due, it either moves to the key's present deadline or the key goes. So a touch costs one write
//! and a key's timer is looked at once in the time to live, however often the key is used; what
//! has expired is found without looking at what has not.
//!
//! Invariants:
//! - every key in the table has exactly one timer, at or before its deadline, and no other key has
//!   one;
//! - a key is expired from its deadline on, whether it was swept or not;
//! - touched before any time was known, a key counts as touched when it first is.
//!
//! Called by operators whose states have a time to live.

use crate::error::StateError;
use crate::group::Groups;
use crate::key::KeyHash;
use crate::table::Table;
use crate::timer::{DueTimer, Timers};
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::Txn;

/// The time before any is known.
pub const UNKNOWN: i64 = i64::MIN;

/// The last deadline that there is: beyond it a key stays for ever.
const LAST: i64 = i64::MAX - 1;

/// When a key was touched, and when its timer is due.
type Touched = [i64; 2];

/// When keys of a state expire.
#[derive(Debug)]
pub struct Expiry<K: Record> {
    /// Time to live.
    ttl: i64,
    touched: Table<K, Touched>,
    timers: Timers<K>,
    due: DueTimer<K>,
}

impl Groups {
    /// Opens the expiry of the state of that name: a key expires `ttl` after it was touched.
    ///
    /// # Errors
    /// When it exists with another key type, is open already, or there is no room for other names.
    pub fn expiry<K: Record>(
        &self,
        txn: &mut Txn,
        name: &str,
        ttl: i64,
    ) -> Result<Expiry<K>, StateError> {
        Ok(Expiry {
            ttl: ttl.max(1),
            touched: self.table_as(txn, &format!("{name}/touched"), "touched")?,
            timers: self.timers(txn, &format!("{name}/expiry"))?,
            due: DueTimer::default(),
        })
    }
}

impl<K: Record> Expiry<K> {
    /// See [`Table::reload`].
    ///
    /// # Errors
    /// As [`Table::reload`].
    pub fn reload(&mut self, txn: &mut Txn) -> Result<(), StateError> {
        self.touched.reload(txn)?;
        self.timers.reload(txn)
    }

    fn deadline(&self, touched: i64) -> i64 {
        touched.saturating_add(self.ttl).min(LAST)
    }

    /// Whether a key was touched, and not forgotten since.
    #[must_use]
    pub fn contains(&self, hash: KeyHash, key: Item<'_, K>) -> bool {
        self.touched.contains(hash, key)
    }

    /// Whether a key's time is over. Not that of a key that was never touched.
    #[inline]
    #[must_use]
    pub fn is_expired(&self, hash: KeyHash, key: Item<'_, K>, now: i64) -> bool {
        self.touched.get(hash, key).is_some_and(|entry| {
            let [touched, _] = *entry.view;
            touched != UNKNOWN && self.deadline(touched) <= now
        })
    }

    /// Notes that a key is used now. Its time begins anew.
    ///
    /// # Errors
    /// When the key is new and there is no memory for it.
    #[inline]
    pub fn touch(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
        now: i64,
    ) -> Result<(), StateError> {
        let due = match self.touched.get(hash, key).map(|entry| *entry.view) {
            // Time may stand still, and a clock may go back.
            Some([touched, _]) if touched >= now => return Ok(()),
            Some([_, due]) => due,
            None => {
                let due = self.deadline(now);
                self.timers.register(txn, hash, key, due)?;
                due
            }
        };
        self.touched.set(txn, hash, key, &[now, due]).map(drop)
    }

    /// Forgets a key: it has no value any more that could expire.
    ///
    /// # Errors
    /// When the key's group is not held here.
    pub fn forget(
        &mut self,
        txn: &mut Txn,
        hash: KeyHash,
        key: Item<'_, K>,
    ) -> Result<(), StateError> {
        if let Some([_, due]) = self.touched.get(hash, key).map(|entry| *entry.view) {
            self.timers.delete(txn, hash, key, due)?;
            self.touched.remove(txn, hash, key)?;
        }
        Ok(())
    }

    /// Looks at no more than `max` timers that are due, and forgets the keys whose time is over:
    /// each is handed to `expired`, which drops what it stands for. Returns how many timers it
    /// looked at: fewer than `max` means that no more is due.
    ///
    /// # Errors
    /// The first error of `expired`, or when there is no memory to move a timer.
    #[inline]
    pub fn sweep(
        &mut self,
        txn: &mut Txn,
        now: i64,
        max: usize,
        mut expired: impl FnMut(&mut Txn, KeyHash, Item<'_, K>) -> Result<(), StateError>,
    ) -> Result<usize, StateError> {
        let mut looked = 0;
        while looked < max {
            if !self.timers.pop(txn, now, &mut self.due)? {
                break;
            }
            looked += 1;
            let (hash, key) = (self.due.hash(), self.due.key());
            let Some([touched, _]) = self.touched.get(hash, key).map(|entry| *entry.view) else {
                continue;
            };
            let touched = if touched == UNKNOWN { now } else { touched };
            let deadline = self.deadline(touched);
            if deadline > now {
                self.timers.register(txn, hash, key, deadline)?;
                self.touched.set(txn, hash, key, &[touched, deadline])?;
            } else {
                self.touched.remove(txn, hash, key)?;
                expired(txn, hash, key)?;
            }
        }
        Ok(looked)
    }

    /// Whether a sweep would find something to look at.
    #[inline]
    #[must_use]
    pub fn is_due(&self, now: i64) -> bool {
        self.timers.first().is_some_and(|first| first <= now)
    }

    /// Keys that are kept, those included that have expired and were not swept yet.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.touched.len()
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
