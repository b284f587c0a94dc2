//! What can be wrong with memory that another process wrote, or with what the kernel gave us.
//!
//! A fault is a value, never a panic: the edge that shows it is quarantined by the caller (rule
//! R9).

use std::fmt;

/// A word, a header or a record of a peer that cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The tail is further from the head than the ring is long, or went back.
    Position {
        /// What the peer's word said.
        found: u64,
        /// The position on this side that it was compared with.
        own: u64,
        /// Bytes that the ring holds.
        capacity: u64,
    },
    /// A frame header has an unknown kind (zero included).
    Kind {
        /// The kind byte found.
        found: u8,
        /// Ring position of the frame.
        at: u64,
    },
    /// A frame is longer than what was published, or not a multiple of eight.
    FrameBytes {
        /// The length found, in bytes.
        found: u64,
        /// The bytes published from this position on.
        published: u64,
        /// Ring position of the frame.
        at: u64,
    },
    /// A data frame's count does not agree with its bytes.
    Count {
        /// The record count found.
        found: u64,
        /// The payload's bytes.
        bytes: u64,
        /// Ring position of the frame.
        at: u64,
    },
    /// A record's length prefix leads out of its frame.
    RecordBytes {
        /// The length found.
        found: u64,
        /// Bytes left in the frame.
        left: u64,
    },
    /// An archived record does not validate.
    Archive,
    /// A payload is not aligned for its record type.
    Alignment {
        /// Ring position of the payload.
        at: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Fault::Position { found, own, capacity } => {
                write!(f, "position {found} cannot follow {own} in a ring of {capacity} bytes")
            }
            Fault::Kind { found, at } => write!(f, "frame at {at} has unknown kind {found}"),
            Fault::FrameBytes { found, published, at } => {
                write!(f, "frame at {at} claims {found} bytes where {published} are published")
            }
            Fault::Count { found, bytes, at } => {
                write!(f, "frame at {at} claims {found} records in {bytes} bytes")
            }
            Fault::RecordBytes { found, left } => {
                write!(f, "a record claims {found} bytes where {left} are left in its frame")
            }
            Fault::Archive => write!(f, "an archived record does not validate"),
            Fault::Alignment { at } => write!(f, "payload at {at} is not aligned for its records"),
        }
    }
}

impl std::error::Error for Fault {}

/// A system call that failed while setting shared memory up.
#[derive(Debug)]
pub struct SetupError {
    /// What was being done, with the offending value.
    pub what: String,
    /// What the kernel said.
    pub source: std::io::Error,
}

impl SetupError {
    /// Takes the calling thread's last OS error.
    pub fn last(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: std::io::Error::last_os_error() }
    }

    /// An error of our own making, `kind` telling its class.
    pub fn other(what: impl Into<String>, kind: std::io::ErrorKind) -> Self {
        Self { what: what.into(), source: std::io::Error::from(kind) }
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.source)
    }
}

impl std::error::Error for SetupError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
