//! What the tool does with checkpoint folders: lists, shows and verifies what is in them.
//!
//! Invariant: takes no lock and writes nothing, so that the folder of a running job can be looked
//! at. Such a job may retire files meanwhile, which are then missing and no longer needed.
//!
//! Called by `tool`.

use super::show::{bytes, table};
use super::{Ended, Out, disk};
use crate::time::utc;
use clap::Subcommand;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use testudo_state::checkpoint::store::{candidates, manifests};
use testudo_state::checkpoint::{
    Candidate, Damage, Kind, Manifest, ManifestName, Outcome, VerifyReport, verify,
};

/// Commands about checkpoint folders.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// The checkpoints and savepoints in a folder
    List {
        /// The folder
        dir: PathBuf,
    },
    /// One checkpoint in full: the newest whole one, or the one of this number
    Show {
        /// The folder
        dir: PathBuf,
        /// The checkpoint's number
        id: Option<u64>,
    },
    /// Read every byte that the folder's checkpoints need, and compare it with its checksum
    Verify {
        /// The folder
        dir: PathBuf,
    },
}

pub(super) fn run(out: &mut Out, command: &Command) -> Result<(), Ended> {
    match command {
        Command::List { dir } => list(out, dir),
        Command::Show { dir, id } => show(out, dir, *id),
        Command::Verify { dir } => check(out, dir),
    }
}

/// A manifest in a folder.
struct Found {
    name: ManifestName,
    manifest: Result<Manifest, Damage>,
    standing: Standing,
}

/// What a manifest is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// A resume begins here.
    Newest,
    /// A root names it: what a resume falls back to.
    Named,
    /// Kept until it is removed by name.
    Kept,
    /// No root names it: it may go at any time.
    Unnamed,
}

impl Standing {
    fn text(self) -> &'static str {
        match self {
            Self::Newest => "newest",
            Self::Named => "named",
            Self::Kept => "kept",
            Self::Unnamed => "unnamed",
        }
    }
}

/// All manifests of a folder, and the damage of its roots.
struct Folder {
    found: Vec<Found>,
    damages: Vec<Damage>,
}

impl Folder {
    fn read(dir: &Path) -> Result<Self, Ended> {
        let (mut disk, pool) = disk()?;
        check_folder(dir)?;
        let named = candidates(&mut *disk, &pool, dir)?;
        let newest = named.iter().find(|candidate| candidate.is_whole());
        let standing = |name: ManifestName| {
            let text = name.to_string();
            if newest.is_some_and(|newest| newest.name == text) {
                Standing::Newest
            } else if named.iter().any(|candidate| candidate.name == text) {
                Standing::Named
            } else if name.savepoint {
                Standing::Kept
            } else {
                Standing::Unnamed
            }
        };
        let found = manifests(&mut *disk, &pool, dir)?;
        let found = found
            .into_iter()
            .map(|(name, manifest)| Found { name, standing: standing(name), manifest })
            .map(|found| found.with_damage_of(&named))
            .collect();
        let damages = named.into_iter().filter_map(|candidate| candidate.damage).collect();
        Ok(Self { found, damages })
    }
}

impl Found {
    /// A manifest that reads well may name files that do not.
    fn with_damage_of(mut self, named: &[Candidate]) -> Self {
        let name = self.name.to_string();
        let damage = named.iter().find(|candidate| candidate.name == name);
        if let (Ok(_), Some(damage)) = (&self.manifest, damage.and_then(|c| c.damage.clone())) {
            self.manifest = Err(damage);
        }
        self
    }

    fn json(&self) -> Value {
        let (name, standing) = (self.name.to_string(), self.standing.text());
        match &self.manifest {
            Ok(manifest) => json!({ "file": name, "standing": standing, "manifest": manifest }),
            Err(damage) => json!({
                "file": name, "standing": standing, "damage": damage_json(damage),
            }),
        }
    }
}

/// Says what is wrong with a folder before the disk does, which only sees files.
fn check_folder(dir: &Path) -> Result<(), Ended> {
    match std::fs::metadata(dir) {
        Err(error) => Err(Ended::machine(format!("{}: {error}", dir.display()))),
        Ok(at) if !at.is_dir() => Err(Ended::usage(format!("{} is not a folder", dir.display()))),
        Ok(_) => Ok(()),
    }
}

pub(super) fn damage_json(damage: &Damage) -> Value {
    json!({ "file": damage.file, "at": damage.at, "what": damage.what })
}

fn list(out: &mut Out, dir: &Path) -> Result<(), Ended> {
    let folder = Folder::read(dir)?;
    if out.as_json {
        for found in &folder.found {
            out.json(&found.json())?;
        }
    } else if folder.found.is_empty() {
        out.print("no checkpoint\n")?;
    } else {
        let head = ["ID", "KIND", "JOB", "BEGUN", "REGIONS", "WORKERS", "NEW", "STANDING"];
        let mut rows = vec![head.map(String::from)];
        rows.extend(folder.found.iter().map(row));
        out.print(&table(&rows))?;
    }
    ended(&folder.damages)
}

/// Damage ends the command, after all that can be shown was shown.
fn ended(damages: &[Damage]) -> Result<(), Ended> {
    match damages {
        [] => Ok(()),
        [damage] => Err(Ended::refused(damage.to_string())),
        [damage, rest @ ..] => {
            Err(Ended::refused(format!("{damage} (and {} more places)", rest.len())))
        }
    }
}

fn row(found: &Found) -> [String; 8] {
    let id = found.name.id.to_string();
    let standing = found.standing.text();
    let Ok(manifest) = &found.manifest else {
        let kind = if found.name.savepoint { "savepoint" } else { "checkpoint" };
        let dash = || "-".to_owned();
        let damaged = format!("{standing}, damaged");
        return [id, kind.into(), dash(), dash(), dash(), dash(), dash(), damaged];
    };
    let carried = manifest.regions.iter().filter(|r| r.outcome == Outcome::CarriedOver).count();
    let regions = match carried {
        0 => manifest.regions.len().to_string(),
        carried => format!("{}, {carried} carried over", manifest.regions.len()),
    };
    let finished = if manifest.finished { ", job finished" } else { "" };
    [
        id,
        kind(manifest).into(),
        manifest.job.clone(),
        utc(manifest.started_ms.cast_signed()),
        regions,
        manifest.workers.to_string(),
        bytes(manifest.files().map(|file| file.bytes).sum()),
        format!("{standing}{finished}"),
    ]
}

fn kind(manifest: &Manifest) -> &'static str {
    match manifest.kind {
        Kind::Checkpoint => "checkpoint",
        Kind::Savepoint => "savepoint",
    }
}

fn show(out: &mut Out, dir: &Path, id: Option<u64>) -> Result<(), Ended> {
    let folder = Folder::read(dir)?;
    let is_asked_for = |found: &&Found| match id {
        Some(id) => found.name.id == id,
        None => found.standing == Standing::Newest,
    };
    let Some(found) = folder.found.iter().find(is_asked_for) else {
        let which = id.map_or("whole checkpoint".into(), |id| format!("checkpoint {id}"));
        let all: Vec<_> = folder.found.iter().map(|found| found.name.id.to_string()).collect();
        let all = if all.is_empty() { "none".into() } else { all.join(", ") };
        let message = format!("{} has no {which}; there are: {all}", dir.display());
        return Err(Ended::refused(message));
    };
    if out.as_json {
        out.json(&found.json())?;
    }
    match &found.manifest {
        Err(damage) => Err(damage.clone().into()),
        Ok(_) if out.as_json => Ok(()),
        Ok(manifest) => {
            out.print(&format!("{}: {}\n", found.name, found.standing.text()))?;
            out.print(&full(manifest))
        }
    }
}

/// A manifest for people.
pub(super) fn full(manifest: &Manifest) -> String {
    let mut text = format!(
        "{} {} of job {} ({:016x}), plan {:016x}\nbegun {}, on disk {}{}\n{} workers, {} key groups\n",
        kind(manifest),
        manifest.id,
        manifest.job,
        manifest.job_id,
        manifest.plan,
        utc(manifest.started_ms.cast_signed()),
        utc(manifest.finished_ms.cast_signed()),
        if manifest.finished { "; the job had come to its end" } else { "" },
        manifest.workers,
        manifest.groups,
    );
    if let Some(previous) = &manifest.previous {
        let _ = writeln!(text, "after {} ({:016x})", previous.name, previous.checksum);
    }
    for (name, value) in &manifest.figures {
        let _ = writeln!(text, "{name}: {value}");
    }
    let mut rows = vec![["OPERATOR", "UID", "SCHEMA", "STATE BY"].map(String::from)];
    rows.extend(manifest.operators.iter().map(|operator| {
        let schema = format!("{:016x}", operator.schema);
        [operator.name.clone(), operator.uid.clone(), schema, operator.grouping.clone()]
    }));
    text += &table(&rows);
    let mut rows =
        vec![["REGION", "EPOCH", "SNAPSHOT", "WORKER", "FILE", "BYTES"].map(String::from)];
    for region in &manifest.regions {
        let snapshot = match region.outcome {
            Outcome::Ok => "fresh",
            Outcome::CarriedOver => "carried over",
        };
        rows.extend(region.workers.iter().map(|worker| {
            [
                region.number.to_string(),
                region.epoch.to_string(),
                snapshot.into(),
                worker.worker.to_string(),
                worker.file.name.clone(),
                bytes(worker.file.bytes),
            ]
        }));
    }
    text + &table(&rows)
}

/// How often a folder is verified again whose job replaces checkpoints meanwhile.
const PASSES: usize = 10;

/// Verifies a folder, also under the hands of its job. What a pass finds is damage if the next pass
/// finds it again: the job may have retired a file that is missed, or committed a manifest after
/// the folder was listed.
fn settled(dir: &Path) -> Result<VerifyReport, Ended> {
    let (mut disk, pool) = disk()?;
    let mut earlier: HashSet<(PathBuf, u64)> = HashSet::new();
    for _ in 0..PASSES {
        let report = verify(&mut *disk, &pool, dir)?;
        let places = report.damages.iter().map(|damage| (damage.file.clone(), damage.at));
        let places: HashSet<_> = places.collect();
        if places.is_subset(&earlier) {
            return Ok(report);
        }
        earlier = places;
    }
    Err(Ended::machine(format!(
        "{}: checkpoints are replaced faster than they can be read; verify a savepoint, or the \
         folder when its job rests",
        dir.display()
    )))
}

fn check(out: &mut Out, dir: &Path) -> Result<(), Ended> {
    check_folder(dir)?;
    let report = settled(dir)?;
    if out.as_json {
        out.json(&report_json(&report))?;
    } else {
        for damage in &report.damages {
            let (file, at, what) = (damage.file.display(), damage.at, &damage.what);
            out.print(&format!("{file}: at byte {at}: {what}\n"))?;
        }
        out.print(&format!(
            "{} checkpoints, {} region files, {} blocks, {} compared\n",
            report.checkpoints,
            report.files,
            report.blocks,
            bytes(report.bytes)
        ))?;
    }
    match report.damages.len() {
        0 => Ok(()),
        1 => Err(Ended::refused(format!("{}: one place is damaged", dir.display()))),
        many => Err(Ended::refused(format!("{}: {many} places are damaged", dir.display()))),
    }
}

fn report_json(report: &VerifyReport) -> Value {
    json!({
        "whole": report.is_whole(),
        "checkpoints": report.checkpoints,
        "files": report.files,
        "blocks": report.blocks,
        "bytes": report.bytes,
        "damages": report.damages.iter().map(damage_json).collect::<Vec<_>>(),
    })
}
