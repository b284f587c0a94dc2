//! A manifest: the list of region files that make one checkpoint, and what a restore must know of
//! the job. JSON, so that people and tools can read it.
//!
//! The first member of the object is the checksum of all the bytes behind it: a manifest that no
//! root names (a savepoint, a copy) is checked as well as one whose checksum a root slot holds. The
//! text is padded with spaces to whole blocks.
//!
//! Invariants of a manifest that was decoded: its checksum holds, its version is known, each file's
//! reference fits itself, names no other folder and belongs to the worker that it is listed for.
//!
//! Called by `store`, `retire`, `verify`, and by tools that show checkpoints.

use super::checksum::checksum;
use super::index::FileRef;
use super::reading::Folder;
use super::{Damage, hex};
use crate::disk::{BLOCK, Disk, Pool};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

/// Version of the manifest's members.
pub const MANIFEST_VERSION: u32 = 1;
/// No manifest is longer; five thousand regions take about two megabytes.
pub const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// What stands in front of the checksum's digits.
const PREFIX: &str = "{\n  \"xxh3\": \"";
/// Where the bytes begin that the checksum is of.
const BODY_AT: usize = PREFIX.len() + 16;

/// Why a checkpoint was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// By the clock; replaced by the next ones.
    Checkpoint,
    /// Asked for; kept until it is removed by its name.
    Savepoint,
}

/// An operator of the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// What identifies it over versions of the program.
    pub uid: String,
    /// What people call it.
    pub name: String,
    /// Schema hash of its state.
    #[serde(with = "hex")]
    pub schema: u64,
    /// How its state is divided: by key group, or by subtask.
    pub grouping: String,
}

/// Where a region's part of a checkpoint comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was saved for this checkpoint.
    Ok,
    /// It failed or was late: its last good snapshot stands in.
    CarriedOver,
}

/// A worker's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerFile {
    /// The worker.
    pub worker: u32,
    /// Its newest file.
    pub file: FileRef,
}

/// A region of the execution graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Its number.
    pub number: u32,
    /// The epoch of the snapshot that is used.
    pub epoch: u64,
    /// Whether that is this checkpoint's own.
    pub outcome: Outcome,
    /// The files.
    pub workers: Vec<WorkerFile>,
}

/// The manifest that was the newest when this one was committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Previous {
    /// Its file's name.
    pub name: String,
    /// Checksum of the whole file.
    #[serde(with = "hex")]
    pub checksum: u64,
}

/// One checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// The checkpoint's number. Each attempt has one of its own.
    pub id: u64,
    /// Why it was taken.
    pub kind: Kind,
    /// The job's name.
    pub job: String,
    /// The job.
    #[serde(with = "hex")]
    pub job_id: u64,
    /// Hash of the plan that ran.
    #[serde(with = "hex")]
    pub plan: u64,
    /// When it was begun, in milliseconds since 1970.
    pub started_ms: u64,
    /// When all its files were durable.
    pub finished_ms: u64,
    /// Number of key groups.
    pub groups: u32,
    /// Number of workers.
    pub workers: u32,
    /// The job had come to its end: there is nothing to resume.
    pub finished: bool,
    /// The operators with state.
    pub operators: Vec<Operator>,
    /// The regions.
    pub regions: Vec<Region>,
    /// The manifest before: filled in by [`Store::commit`](super::Store::commit).
    pub previous: Option<Previous>,
    /// Figures for people, which no restore needs: bytes written, largest pause.
    #[serde(default)]
    pub figures: BTreeMap<String, u64>,
}

/// The name of a manifest's file: `c{id}.manifest` for a checkpoint, `s{id}.manifest` for a
/// savepoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ManifestName {
    /// The checkpoint's number.
    pub id: u64,
    /// Whether it is kept until it is removed.
    pub savepoint: bool,
}

impl ManifestName {
    /// Reads a file's name; nothing if it is not exactly what [`fmt::Display`] gives.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let stem = name.strip_suffix(".manifest")?;
        let digits = stem.strip_prefix(['c', 's'])?;
        let parsed = Self { id: digits.parse().ok()?, savepoint: stem.starts_with('s') };
        (parsed.to_string() == name).then_some(parsed)
    }
}

impl fmt::Display for ManifestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}.manifest", if self.savepoint { 's' } else { 'c' }, self.id)
    }
}

/// Only as much as must be read to say that the rest cannot be.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl Manifest {
    /// The name of its file.
    #[must_use]
    pub fn name(&self) -> ManifestName {
        ManifestName { id: self.id, savepoint: self.kind == Kind::Savepoint }
    }

    /// All its files: the newest of each worker, without the older ones that these name.
    pub fn files(&self) -> impl Iterator<Item = &FileRef> + '_ {
        self.regions.iter().flat_map(|region| region.workers.iter().map(|worker| &worker.file))
    }

    /// The bytes of its file: whole blocks.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_string_pretty(self).expect("names, numbers and strings");
        let body = json.strip_prefix('{').unwrap_or(&json);
        let mut bytes = format!("{PREFIX}0000000000000000\",{body}").into_bytes();
        bytes.resize((bytes.len() + 1).next_multiple_of(BLOCK) - 1, b' ');
        bytes.push(b'\n');
        let sum = hex::text(checksum(&bytes[BODY_AT..]));
        bytes[PREFIX.len()..BODY_AT].copy_from_slice(sum.as_bytes());
        bytes
    }

    /// Reads the bytes of a manifest's file, whose name is `name`.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn decode(bytes: &[u8], name: &str) -> Result<Self, (u64, String)> {
        let sum = bytes
            .strip_prefix(PREFIX.as_bytes())
            .and_then(|rest| rest.get(..16))
            .and_then(|digits| hex::parse(std::str::from_utf8(digits).ok()?));
        if bytes.len() as u64 > MANIFEST_BYTES_MAX || !bytes.len().is_multiple_of(BLOCK) {
            return Err((0, format!("no manifest has {} bytes", bytes.len())));
        }
        let Some(sum) = sum else {
            return Err((0, "no manifest begins here".into()));
        };
        if checksum(&bytes[BODY_AT..]) != sum {
            return Err((0, "the manifest does not have its checksum".into()));
        }
        // The object without its first member.
        let mut body = bytes[BODY_AT..].to_vec();
        if !body.starts_with(b"\",") {
            return Err((BODY_AT as u64, "the checksum is not followed by members".into()));
        }
        body[..2].copy_from_slice(b" {");
        let json = |e: serde_json::Error| (0, format!("line {}: {e}", e.line()));
        let version: Version = serde_json::from_slice(&body).map_err(json)?;
        if version.version != MANIFEST_VERSION {
            let what = format!(
                "the manifest has version {}, this program reads {MANIFEST_VERSION}",
                version.version
            );
            return Err((0, what));
        }
        let manifest: Self = serde_json::from_slice(&body).map_err(json)?;
        manifest.check().map_err(|what| (0, what))?;
        if manifest.name().to_string() != name {
            return Err((0, format!("this is {}, put in the place of {name}", manifest.name())));
        }
        Ok(manifest)
    }

    /// Reads a manifest that no root needs to name: a savepoint, or one that a tool was given.
    ///
    /// # Errors
    /// If it cannot be read or is not whole.
    pub fn read(
        disk: &mut dyn Disk,
        pool: &Pool,
        folder: &Path,
        name: &str,
    ) -> Result<Self, Damage> {
        read_in(&mut Folder::new(disk, pool, folder)?, name).map(|(manifest, _)| manifest)
    }

    /// What must hold before it is written, and after it was read.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.version != MANIFEST_VERSION {
            return Err(format!("version {} of a manifest", self.version));
        }
        let mut workers = HashSet::new();
        for region in &self.regions {
            for worker in &region.workers {
                let name = worker.file.check()?;
                if name.worker != worker.worker || name.epoch != region.epoch {
                    return Err(format!(
                        "region {}: {} is not of worker {} and epoch {}",
                        region.number, worker.file.name, worker.worker, region.epoch
                    ));
                }
                if !workers.insert(worker.worker) {
                    return Err(format!("worker {} has two files", worker.worker));
                }
            }
        }
        Ok(())
    }
}

/// Reads a manifest and its checksum as a root slot holds it.
pub(crate) fn read_in(folder: &mut Folder<'_>, name: &str) -> Result<(Manifest, u64), Damage> {
    let path = folder.path(name);
    if ManifestName::parse(name).is_none() {
        return Err(Damage::new(&path, 0, format!("{name:?} is no name of a manifest")));
    }
    let Some(bytes) = folder.size(name) else {
        return Err(Damage::new(&path, 0, "the file is missing"));
    };
    if bytes > MANIFEST_BYTES_MAX || bytes % BLOCK as u64 != 0 {
        return Err(Damage::new(&path, bytes, format!("no manifest has {bytes} bytes")));
    }
    let bytes = folder.read(name, 0, bytes)?;
    let manifest =
        Manifest::decode(&bytes, name).map_err(|(at, what)| Damage::new(&path, at, what))?;
    Ok((manifest, checksum(&bytes)))
}
