//! Counters in shared pages: any tool can read a live or a crashed run without asking it anything.
//!
//! Each counter is one 128-byte entry {value, label}. Values are cells: changed through the owner's
//! transaction, so a count never contains what was rolled back (a reader may see the open step's
//! share for a moment).
//!
//! Called by the worker (own page) and by the supervisor (read-only).

use crate::primitive::{AtomicU64, Ordering};
use crate::txn::{Place, Txn};

/// Bytes of one counter.
pub const ENTRY: usize = 128;

const LABEL: usize = ENTRY - 16;

/// One counter.
#[derive(Debug)]
#[repr(C)]
pub struct Counter {
    value: AtomicU64,
    label_bytes: AtomicU64,
    label: [u8; LABEL],
}

// Loom's atomics have other sizes; nothing is shared with another process there.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Counter>() == ENTRY);

/// Names the counter at arena offset `at` and gives the place of its value.
pub fn open(txn: &mut Txn, at: u64, label: &str) -> Place<u64> {
    let bytes = label.len().min(LABEL);
    let mut text = [0u8; LABEL];
    text[..bytes].copy_from_slice(&label.as_bytes()[..bytes]);
    let place = txn.place::<[u8; LABEL]>(at + 16);
    txn.set(place, text);
    let place = txn.place::<u64>(at + 8);
    txn.set(place, bytes as u64);
    txn.place(at)
}

impl Counter {
    /// The value.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}
