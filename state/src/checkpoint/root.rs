//! The roots: a file of two slots of one block each, of which the newer valid one says which
//! manifest is the checkpoint. Only these two blocks are ever written in place.
//!
//! Invariants:
//! - a slot is believed only with its checksum, its own number and its own size of name: a torn
//!   write, a write to the other slot and bytes of another file are all seen;
//! - sequence numbers only grow; a slot without a manifest says that the folder was begun anew, so
//!   that what older slots name does not count.
//!
//! Called by `store` and `verify`.

use super::checksum::checksum;
use super::manifest::ManifestName;
use super::region::{u32_at, u64_at};
use crate::disk::BLOCK;

/// The roots' file.
pub const ROOTS: &str = "roots";
/// A slot begins with this.
pub const ROOT_MAGIC: [u8; 8] = *b"TSTDROOT";
/// Version of a slot's layout.
pub const ROOT_VERSION: u32 = 1;
/// Slots in the file.
pub const SLOTS: usize = 2;

const NAME_AT: usize = 64;
const NAME_MAX: usize = 64;
const CHECKSUM_AT: usize = BLOCK - 8;

/// The manifest that a slot names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestRef {
    /// Its file.
    pub name: String,
    /// The file's size.
    pub bytes: u64,
    /// The file's checksum.
    pub checksum: u64,
}

/// One slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// The newer of two slots has the greater one.
    pub sequence: u64,
    /// The job.
    pub job: u64,
    /// The checkpoint; none when the folder was begun anew.
    pub manifest: Option<ManifestRef>,
    /// Checksum of the slot that was the newest when this one was written.
    pub previous: u64,
}

impl Root {
    /// The slot's bytes, for slot number `slot`.
    #[must_use]
    pub fn encode(&self, slot: u32) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..8].copy_from_slice(&ROOT_MAGIC);
        block[8..12].copy_from_slice(&ROOT_VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&slot.to_le_bytes());
        block[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        block[24..32].copy_from_slice(&self.job.to_le_bytes());
        block[56..64].copy_from_slice(&self.previous.to_le_bytes());
        if let Some(manifest) = &self.manifest {
            let name = manifest.name.as_bytes();
            block[32..40].copy_from_slice(&manifest.bytes.to_le_bytes());
            block[40..48].copy_from_slice(&manifest.checksum.to_le_bytes());
            block[48] = u8::try_from(name.len()).expect("c, at most 20 digits, .manifest");
            block[NAME_AT..NAME_AT + name.len()].copy_from_slice(name);
        }
        let sum = checksum(&block[..CHECKSUM_AT]);
        block[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
        block
    }

    /// Reads slot number `slot`.
    ///
    /// # Errors
    /// What is wrong, and where in the slot.
    pub fn decode(block: &[u8], slot: u32) -> Result<Self, (u64, String)> {
        if block.len() != BLOCK || block[..8] != ROOT_MAGIC {
            return Err((0, format!("no root slot begins here (slot {slot})")));
        }
        if u64_at(block, CHECKSUM_AT) != checksum(&block[..CHECKSUM_AT]) {
            let what = "the root slot does not have its checksum: a commit that a crash cut off, \
                        or damage";
            return Err((0, what.into()));
        }
        let version = u32_at(block, 8);
        if version != ROOT_VERSION {
            return Err((8, format!("version {version}, this program reads {ROOT_VERSION}")));
        }
        if u32_at(block, 12) != slot {
            let what =
                format!("this is slot {}, put in the place of slot {slot}", u32_at(block, 12));
            return Err((12, what));
        }
        let name_bytes = u32_at(block, 48) as usize;
        let name = block.get(NAME_AT..NAME_AT + name_bytes.min(NAME_MAX)).unwrap_or(&[]);
        let name = std::str::from_utf8(name).unwrap_or_default();
        if name_bytes > NAME_MAX || (name_bytes > 0 && ManifestName::parse(name).is_none()) {
            return Err((48, format!("{name:?} is no name of a manifest")));
        }
        let manifest = (name_bytes > 0).then(|| ManifestRef {
            name: name.to_string(),
            bytes: u64_at(block, 32),
            checksum: u64_at(block, 40),
        });
        Ok(Self {
            sequence: u64_at(block, 16),
            job: u64_at(block, 24),
            manifest,
            previous: u64_at(block, 56),
        })
    }
}

/// The checksum in a slot's bytes.
pub(crate) fn sum_of(block: &[u8]) -> u64 {
    u64_at(block, CHECKSUM_AT)
}
