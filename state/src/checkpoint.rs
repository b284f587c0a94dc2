//! Checkpoint files: what a worker saves at a cut, how it is found again, and what happens to it
//! when a machine stops in the middle. `state/FORMAT.md` is the specification.
//!
//! A checkpoint is a tree of checksums, each held by whoever refers to the bytes: a root slot holds
//! that of a manifest, a manifest those of the indexes of its region files, an index those of its
//! blocks. Nothing is overwritten but the older of two root slots, and nothing is removed before a
//! root that does not need it is durable.
//!
//! Invariants:
//! - bytes of files never cause a panic, an allocation beyond the file's size, or a read outside
//!   the folder: they give a [`Damage`] with its place;
//! - after a crash at any operation, the newest whole checkpoint is the last one whose commit
//!   returned, or the one whose commit was under way.
//!
//! Called by workers ([`RegionWriter`], [`Chain`]), by the supervisor ([`Store`]), and by tools
//! ([`verify()`]).

use std::fmt;
use std::path::{Path, PathBuf};

mod checksum;

pub mod index;

pub mod region;

mod reading;

pub mod chain;

pub mod manifest;

pub mod root;

mod lock;

mod presence;

pub mod store;

pub mod retire;

pub mod verify;

pub use chain::{Chain, Place};
pub use checksum::checksum;
pub use index::{Blob, BlockEntry, FileRef, Index, SegmentEntry, SegmentKey};
pub use manifest::{Kind, Manifest, ManifestName, Operator, Outcome, Previous, Region, WorkerFile};
pub use region::{RegionHeader, RegionName, RegionReader, RegionWriter};
pub use retire::{Keep, Retired};
pub use store::{Candidate, Store, StoreError};
pub use verify::{VerifyReport, verify};

/// Something in a checkpoint folder that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub file: PathBuf,
    /// Where in it.
    pub at: u64,
    /// What is wrong there.
    pub what: String,
}

impl Damage {
    pub(crate) fn new(file: &Path, at: u64, what: impl Into<String>) -> Self {
        Self { file: file.to_owned(), at, what: what.into() }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is damaged at byte {}: {}; a checkpoint that needs it cannot be restored: resume \
             from an older one, or bring the file back from a copy, and check the disk",
            self.file.display(),
            self.at,
            self.what
        )
    }
}

impl std::error::Error for Damage {}

/// Checksums as people read them: 16 hexadecimal digits in a string, since a JSON number of 64
/// bits does not survive every reader.
pub(crate) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn text(value: u64) -> String {
        format!("{value:016x}")
    }

    pub(crate) fn parse(text: &str) -> Option<u64> {
        let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (text.len() == 16 && digits).then(|| u64::from_str_radix(text, 16).ok())?
    }

    pub(crate) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&text(*value))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        parse(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no 64-bit number in hex")))
    }
}
