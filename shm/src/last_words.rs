//! Last words: a page in which a dying worker says why, readable after its death.
//!
//! Invariants (R23): the writer makes the version odd, writes, makes it even; a reader tries a
//! limited number of times and then takes what is there, since the writer may have died in the
//! middle. Text is made valid UTF-8 on reading.
//!
//! Written by the panic hook and by failing workers; read by the supervisor.

use crate::primitive::{AtomicU32, Ordering, fence};

/// Bytes of the page.
pub const PAGE_BYTES: usize = 4096;

const TEXT: usize = PAGE_BYTES - 8;
const TRIES: usize = 8;

/// The page.
#[derive(Debug)]
#[repr(C)]
pub struct LastWords {
    version: AtomicU32,
    bytes: AtomicU32,
    text: [std::cell::UnsafeCell<u8>; TEXT],
}

// Loom's atomics have other sizes; nothing is shared with another process there.
#[cfg(not(loom))]
const _: () = assert!(size_of::<LastWords>() == PAGE_BYTES);

// SAFETY: one thread of one process writes; readers copy bytes that may be torn and treat them as
// such.
unsafe impl Sync for LastWords {}

impl LastWords {
    /// Writes `text`, cut at the page's end.
    pub fn write(&self, text: &str) {
        let length = text.len().min(TEXT);
        let version = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(version, Ordering::Relaxed);
        // SYNC last-words: no byte is changed before the version is odd.
        fence(Ordering::Release);
        for (place, byte) in self.text.iter().zip(&text.as_bytes()[..length]) {
            // SAFETY: this process owns the page and one thread writes it; volatile, for a reader
            // in another process.
            unsafe { place.get().write_volatile(*byte) };
        }
        self.bytes.store(length as u32, Ordering::Release);
        self.version.store(version.wrapping_add(1), Ordering::Release);
    }

    /// Forgets what a predecessor wrote.
    pub fn clear(&self) {
        self.bytes.store(0, Ordering::Release);
    }

    /// Reads what is there; torn text is possible after a death in the middle of writing, an
    /// endless loop is not.
    #[must_use]
    pub fn read(&self) -> String {
        let mut copy = Vec::new();
        for _ in 0..TRIES {
            let before = self.version.load(Ordering::Acquire);
            let length = (self.bytes.load(Ordering::Acquire) as usize).min(TEXT);
            copy.clear();
            // SAFETY: the page is mapped; volatile, since another process may be writing.
            copy.extend(
                self.text[..length].iter().map(|byte| unsafe { byte.get().read_volatile() }),
            );
            // SYNC last-words: the version is looked at again after the last byte.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                break;
            }
        }
        String::from_utf8_lossy(&copy).into_owned()
    }
}
