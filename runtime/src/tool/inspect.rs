//! Shows what is in one file, without anything around it: a root, a manifest, a region file, or a
//! segment of a running job.
//!
//! Invariants: bytes of files are never believed: sizes are checked before anything is allocated,
//! and what does not fit is said with its place. A segment is read, never mapped: words of a
//! running job, each whole, not all of one moment (R23); `segment` reads what is behind its first
//! page.
//!
//! Called by `tool`.

use super::files::full;
use super::segment;
use super::show::{bytes, table};
use super::{Ended, Out, disk};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::Path;
use testudo_shm::header::{self, ControlHeader, WorkerHeader, WorkerState};
use testudo_state::checkpoint::root::{Root, SLOTS};
use testudo_state::checkpoint::{Manifest, RegionReader};
use testudo_state::disk::{BLOCK, read_file};
use testudo_state::group;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum What {
    /// A segment of a running job: control, worker or key group
    Segment,
    /// A checkpoint's list of files
    Manifest,
    /// The two root slots of a checkpoint folder
    Root,
    /// What a worker saved at one epoch
    Region,
}

pub(super) fn run(out: &mut Out, what: What, path: &Path) -> Result<(), Ended> {
    match std::fs::metadata(path) {
        Err(error) => return Err(Ended::machine(format!("{}: {error}", path.display()))),
        Ok(at) if !at.is_file() => {
            return Err(Ended::usage(format!("{} is not a file", path.display())));
        }
        Ok(_) => {}
    }
    match what {
        What::Segment => show_segment(out, path),
        What::Manifest => manifest(out, path),
        What::Root => root(out, path),
        What::Region => region(out, path),
    }
}

/// A file's folder and name, as readers of folders want them.
fn split(path: &Path) -> Result<(&Path, &str), Ended> {
    let name = path.file_name().and_then(|name| name.to_str());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let name = name.ok_or_else(|| Ended::usage(format!("{} has no plain name", path.display())))?;
    Ok((folder.unwrap_or(Path::new(".")), name))
}

fn manifest(out: &mut Out, path: &Path) -> Result<(), Ended> {
    let (mut disk, pool) = disk()?;
    let (folder, name) = split(path)?;
    let manifest = Manifest::read(&mut *disk, &pool, folder, name)?;
    if out.as_json { out.json(&manifest) } else { out.print(&full(&manifest)) }
}

fn root(out: &mut Out, path: &Path) -> Result<(), Ended> {
    let (mut disk, pool) = disk()?;
    let (mut slots, mut text, mut damaged) = (Vec::new(), String::new(), 0);
    for slot in 0..SLOTS {
        let at = (slot * BLOCK) as u64;
        let read = read_file(&mut *disk, &pool, path, at, BLOCK as u64, BLOCK as u64);
        let decoded = match read {
            Ok(block) => Root::decode(&block, u32::try_from(slot).unwrap_or(u32::MAX)),
            Err(error) => Err((0, error.to_string())),
        };
        match decoded {
            Ok(root) => {
                let names = match &root.manifest {
                    None => "no manifest: the folder was begun anew".into(),
                    Some(named) => {
                        format!("{}, {} bytes, {:016x}", named.name, named.bytes, named.checksum)
                    }
                };
                text += &format!(
                    "slot {slot}: sequence {}, job {:016x}: {names}\n",
                    root.sequence, root.job
                );
                slots.push(json!({
                    "slot": slot, "sequence": root.sequence, "job": hex(root.job),
                    "previous": hex(root.previous),
                    "manifest": root.manifest.map(|named| json!({
                        "name": named.name, "bytes": named.bytes, "checksum": hex(named.checksum),
                    })),
                }));
            }
            Err((offset, what)) => {
                damaged += 1;
                text += &format!("slot {slot}: damaged at byte {}: {what}\n", at + offset);
                slots.push(json!({ "slot": slot, "damage": what, "at": at + offset }));
            }
        }
    }
    if out.as_json {
        slots.iter().try_for_each(|slot| out.json(slot))?
    } else {
        out.print(&text)?
    }
    match damaged {
        0 => Ok(()),
        _ => Err(Ended::refused(format!(
            "{}: {damaged} of {SLOTS} slots are damaged",
            path.display()
        ))),
    }
}

fn hex(value: u64) -> String {
    format!("{value:016x}")
}

fn region(out: &mut Out, path: &Path) -> Result<(), Ended> {
    let (mut disk, pool) = disk()?;
    let (folder, name) = split(path)?;
    let file = RegionReader::refer(&mut *disk, &pool, folder, name)?;
    let reader = RegionReader::open(&mut *disk, &pool, folder, &file)?;
    if out.as_json { out.json(&region_json(&reader)) } else { out.print(&region_text(&reader)) }
}

/// Blocks that the file has of each of its segments.
fn blocks_by_segment(reader: &RegionReader) -> Vec<u64> {
    let mut blocks = vec![0; reader.index.segments.len()];
    for block in reader.index.blocks() {
        if let Some(count) = blocks.get_mut(block.segment as usize) {
            *count += 1;
        }
    }
    blocks
}

fn region_json(reader: &RegionReader) -> Value {
    let (header, index) = (&reader.header, &reader.index);
    let blocks = blocks_by_segment(reader);
    let segments = index.segments.iter().zip(blocks).map(|(segment, blocks)| {
        json!({
            "operator": hex(segment.operator), "kind": segment.kind, "group": segment.group,
            "groups": segment.groups, "schema": hex(segment.schema), "bytes": segment.bytes,
            "since": segment.since, "blocks": blocks,
        })
    });
    let blobs = index.blobs.iter().map(
        |blob| json!({ "name": blob.name, "bytes": blob.bytes, "checksum": hex(blob.checksum) }),
    );
    json!({
        "job": hex(header.job), "worker": header.worker, "epoch": header.epoch,
        "incarnation": header.incarnation, "file": reader.file, "data_blocks": index.data_blocks,
        "older_files": index.files, "segments": segments.collect::<Vec<_>>(),
        "blobs": blobs.collect::<Vec<_>>(),
    })
}

fn region_text(reader: &RegionReader) -> String {
    let (header, index) = (&reader.header, &reader.index);
    let mut text = format!(
        "worker {}, epoch {}, incarnation {}, job {:016x}\n{}: {} blocks, index {}, in all {}\n",
        header.worker,
        header.epoch,
        header.incarnation,
        header.job,
        reader.file.name,
        index.data_blocks,
        bytes(reader.file.index_bytes),
        bytes(reader.file.bytes),
    );
    for file in &index.files {
        text += &format!("needs blocks of {} ({:016x})\n", file.name, file.index_checksum);
    }
    let head = ["OPERATOR", "KIND", "GROUP", "SCHEMA", "BYTES", "BLOCKS HERE", "SINCE"];
    let mut rows = vec![head.map(String::from)];
    let blocks = blocks_by_segment(reader);
    rows.extend(index.segments.iter().zip(blocks).map(|(segment, blocks)| {
        [
            hex(segment.operator),
            segment.kind.to_string(),
            format!("{} of {}", segment.group, segment.groups),
            hex(segment.schema),
            bytes(segment.bytes),
            blocks.to_string(),
            segment.since.to_string(),
        ]
    }));
    text += &table(&rows);
    let mut rows = vec![["BLOB", "BYTES", "CHECKSUM"].map(String::from)];
    rows.extend(
        index.blobs.iter().map(|blob| [blob.name.clone(), bytes(blob.bytes), hex(blob.checksum)]),
    );
    text + &table(&rows)
}

/// The first page of a segment.
struct Page {
    bytes: [u8; 4096],
    /// Bytes of the whole segment.
    length: u64,
    /// What the segment is called, where the kernel says so.
    name: Option<String>,
    file: File,
}

impl Page {
    fn read(path: &Path) -> Result<Self, Ended> {
        let failed = |error| Ended::machine(format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length < 4096 {
            let message = format!("{}: no segment has {length} bytes", path.display());
            return Err(Ended::refused(message));
        }
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        // A memfd shows as "/memfd:NAME (deleted)".
        let link = std::fs::read_link(path).ok();
        let name = link.and_then(|link| {
            let name = link.to_str()?.strip_prefix("/memfd:")?;
            Some(name.strip_suffix(" (deleted)").unwrap_or(name).to_owned())
        });
        Ok(Self { bytes, length, name, file })
    }

    fn u32_at(&self, at: usize) -> u32 {
        self.bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    fn u64_at(&self, at: usize) -> u64 {
        self.bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
}

fn show_segment(out: &mut Out, path: &Path) -> Result<(), Ended> {
    let page = Page::read(path)?;
    let mut shown = match page.u64_at(0) {
        header::MAGIC if is_control(&page) => control(&page),
        header::MAGIC => worker(&page),
        group::MAGIC => key_group(&page),
        0 => json!({ "segment": "empty: nobody has attached to it yet" }),
        other => {
            let message = format!("{}: no segment begins with {other:016x}", path.display());
            return Err(Ended::refused(message));
        }
    };
    let details = match shown["segment"].as_str() {
        Some("worker") => Some(segment::worker(&page.file, page.length)),
        Some("key group") => Some(segment::key_group(&page.bytes)),
        _ => None,
    };
    if let (Some(shown), Some(Value::Object(details))) = (shown.as_object_mut(), details) {
        shown.extend(details);
    }
    shown["bytes"] = page.length.into();
    if let Some(name) = &page.name {
        shown["name"] = name.as_str().into();
    }
    let known = [header::LAYOUT_VERSION, group::LAYOUT_VERSION];
    if out.as_json {
        out.json(&shown)?;
    } else {
        out.print(&lines(&shown))?;
    }
    match page.u32_at(8) {
        version if page.u64_at(0) == 0 || known.contains(&version) => Ok(()),
        version => Err(Ended::refused(format!(
            "{}: layout version {version}, this program reads {}",
            path.display(),
            header::LAYOUT_VERSION
        ))),
    }
}

/// One line for each member.
fn lines(value: &Value) -> String {
    let members = value.as_object().into_iter().flatten();
    members
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}: {text}\n"),
            None => match value.as_array() {
                Some(all) => {
                    let all = all.iter().map(|one| format!("  {one}\n"));
                    format!("{name}:\n{}", all.collect::<String>())
                }
                None => format!("{name}: {value}\n"),
            },
        })
        .collect()
}

/// Both headers begin alike; where a worker has its process, the control segment has zeros.
fn is_control(page: &Page) -> bool {
    page.u32_at(offset_of!(ControlHeader, supervisor)) != 0
        && page.u32_at(offset_of!(WorkerHeader, pid)) == 0
}

fn control(page: &Page) -> Value {
    let word = page.u64_at(offset_of!(ControlHeader, control));
    json!({
        "segment": "control",
        "version": page.u32_at(offset_of!(ControlHeader, version)),
        "plan": hex(page.u64_at(offset_of!(ControlHeader, plan))),
        "supervisor": page.u32_at(offset_of!(ControlHeader, supervisor)),
        "description_bytes": description_bytes(page),
        "control": hex(word),
        "draining": word & header::control::DRAIN != 0,
        "leaving": word & header::control::LEAVE != 0,
    })
}

/// Of the slot that counts.
fn description_bytes(page: &Page) -> u64 {
    let slot = page.u64_at(offset_of!(ControlHeader, description)) & 1;
    page.u64_at(offset_of!(ControlHeader, description_bytes) + 8 * slot as usize)
}

fn worker(page: &Page) -> Value {
    let state = WorkerState::of(page.u32_at(offset_of!(WorkerHeader, state)));
    let watermark = page.u64_at(offset_of!(WorkerHeader, watermark)).cast_signed();
    json!({
        "segment": "worker",
        "version": page.u32_at(offset_of!(WorkerHeader, version)),
        "worker": page.u32_at(offset_of!(WorkerHeader, worker)),
        "plan": hex(page.u64_at(offset_of!(WorkerHeader, plan))),
        "incarnation": page.u64_at(offset_of!(WorkerHeader, incarnation)),
        "pid": page.u32_at(offset_of!(WorkerHeader, pid)),
        "state": format!("{state:?}").to_lowercase(),
        "commits": page.u64_at(offset_of!(WorkerHeader, commits)),
        "commit_ns": page.u64_at(offset_of!(WorkerHeader, commit_ns)),
        "rolled_back": page.u64_at(offset_of!(WorkerHeader, rolled_back)),
        "watermark_ms": watermark,
        "death_word": format!("{:08x}", page.u32_at(offset_of!(WorkerHeader, death))),
        "claim": format!("{:08x}", page.u32_at(offset_of!(WorkerHeader, claim))),
        "long_gaps": page.u64_at(offset_of!(WorkerHeader, gap_count)),
    })
}

/// The front of a key group's segment, as `testudo_state::group` draws it.
fn key_group(page: &Page) -> Value {
    json!({
        "segment": "key group",
        "version": page.u32_at(8),
        "group": page.u32_at(12),
        "groups": page.u32_at(16),
        "schema": hex(page.u64_at(24)),
        "used_bytes": page.u64_at(32),
    })
}
