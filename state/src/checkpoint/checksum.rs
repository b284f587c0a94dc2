//! The checksum of everything in a checkpoint folder: xxh3-64, seed 0.
//!
//! It finds damage (a flipped bit, a torn, lost or misdirected write), not malice: it is no
//! signature. Its value for given bytes is part of the file format; `state/FORMAT.md` has vectors.
//!
//! Called by every encoder and decoder beside this file, and by whoever reads a block to restore
//! it.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// xxh3-64 of `bytes`.
#[must_use]
#[inline]
pub fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// The same checksum, of bytes that come in pieces.
#[derive(Clone, Default)]
pub(crate) struct Running(Xxh3);

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Running").field(&self.0.digest()).finish()
    }
}

impl Running {
    /// Adds the bytes that follow.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all that was added.
    pub(crate) fn value(&self) -> u64 {
        self.0.digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_frozen() {
        assert_eq!(checksum(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(checksum(&[0; 4096]), checksum(&vec![0; 4096]));
        let mut running = Running::default();
        running.update(b"tes");
        running.update(b"tudo");
        assert_eq!(running.value(), checksum(b"testudo"));
    }
}
