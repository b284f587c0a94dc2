//! Frames: what stands in a ring. One 64-bit head word, then the payload, everything in multiples
//! of eight.
//!
//! ```text
//!   head word:  kind (8 bits) | count (24 bits) | payload bytes (32 bits)
//!   Data        records back to back
//!   Mark        watermark, send time, routing version: valid for what follows, until the next mark
//!   Pad         nothing; brings the next payload to a cache line
//!   End         the producer will never send again (until its end is taken back by a restore)
//! ```
//!
//! Invariants: the head is one aligned word, so it is read once and never torn; kind zero is never
//! valid, since a punched or untouched page reads as zeros. Pure arithmetic, no memory. Called by
//! `producer` and `consumer`.

use crate::fault::Fault;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the head word.
pub const HEAD: u64 = 8;

/// Records in one frame at most.
pub const COUNT_MAX: u64 = (1 << 24) - 1;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Records.
    Data = 1,
    /// Watermark and send time.
    Mark = 2,
    /// Nothing.
    Pad = 3,
    /// End of the stream.
    End = 4,
}

/// A checked head word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What the frame carries.
    pub kind: Kind,
    /// Records in it.
    pub count: u64,
    /// Payload bytes after the head word.
    pub bytes: u64,
}

/// Payload of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mark {
    /// Event time, milliseconds: no record with an earlier time follows (but late ones).
    pub watermark: i64,
    /// Monotonic clock of the machine when the step began, nanoseconds; 0 where it was not taken.
    pub sent_ns: u64,
    /// Routing version under which the following records were sent.
    pub routing: u64,
}

const _: () = assert!(size_of::<Mark>() == 24);

impl Head {
    /// The head word.
    #[inline(always)]
    #[must_use]
    pub fn word(self) -> u64 {
        debug_assert!(self.count <= COUNT_MAX && self.bytes <= u64::from(u32::MAX));
        ((self.kind as u64) << 56) | (self.count << 32) | self.bytes
    }

    /// Checks a head word read at ring position `at`, with `published` bytes from there to the
    /// tail.
    ///
    /// # Errors
    /// What cannot be true about it.
    #[inline(always)]
    pub fn check(word: u64, at: u64, published: u64) -> Result<Self, Fault> {
        let found = (word >> 56) as u8;
        let kind = match found {
            1 => Kind::Data,
            2 => Kind::Mark,
            3 => Kind::Pad,
            4 => Kind::End,
            _ => return Err(Fault::Kind { found, at }),
        };
        let bytes = word & 0xFFFF_FFFF;
        let count = (word >> 32) & COUNT_MAX;
        if !bytes.is_multiple_of(8) || bytes + HEAD > published {
            return Err(Fault::FrameBytes { found: bytes, published, at });
        }
        let sound = match kind {
            Kind::Data => count > 0,
            Kind::Mark => count == 0 && bytes == size_of::<Mark>() as u64,
            Kind::Pad => count == 0,
            Kind::End => count == 0 && bytes == 0,
        };
        if !sound {
            return Err(Fault::Count { found: count, bytes, at });
        }
        Ok(Self { kind, count, bytes })
    }
}

/// Appends a frame to bytes that will be read as a ring's.
///
/// # Panics
/// When the payload is longer than a frame may be.
pub fn append(out: &mut Vec<u8>, kind: Kind, count: usize, payload: &[u8]) {
    let bytes = payload.len().next_multiple_of(8);
    assert!(count as u64 <= COUNT_MAX && u32::try_from(bytes).is_ok(), "a frame of {bytes} bytes");
    let head = Head { kind, count: count as u64, bytes: bytes as u64 };
    out.extend_from_slice(&head.word().to_le_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(8), 0);
}
