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
    let label = kept(label);
    let bytes = label.len();
    let mut text = [0u8; LABEL];
    text[..bytes].copy_from_slice(label.as_bytes());
    let place = txn.place::<[u8; LABEL]>(at + 16);
    txn.set(place, text);
    let place = txn.place::<u64>(at + 8);
    txn.set(place, bytes as u64);
    txn.place(at)
}

/// The label of the counter at arena offset `at`; `None` while it has none.
#[must_use]
pub fn label(txn: &Txn, at: u64) -> Option<String> {
    let bytes = usize::try_from(txn.get(txn.place::<u64>(at + 8))).ok()?;
    let text = txn.get(txn.place::<[u8; LABEL]>(at + 16));
    (bytes > 0).then(|| String::from_utf8_lossy(&text[..bytes.min(LABEL)]).into_owned())
}

/// A label as far as a counter keeps it.
#[must_use]
pub fn kept(label: &str) -> &str {
    let mut end = label.len().min(LABEL);
    while !label.is_char_boundary(end) {
        end -= 1;
    }
    &label[..end]
}

impl Counter {
    /// The label, empty while there is none. For readers: it is written once, before its length.
    #[must_use]
    pub fn label(&self) -> String {
        let bytes = self.label_bytes.load(Ordering::Acquire).min(LABEL as u64) as usize;
        String::from_utf8_lossy(&self.label[..bytes]).into_owned()
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}
