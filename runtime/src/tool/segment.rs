//! What lies behind the first page of a segment, as far as the segment itself says: counters, ring
//! positions, cells and the undo log of a worker; the named states and the heap of a key group.
//!
//! A segment is read, never mapped: through `/proc/PID/fd/N` while its job lives, or from a copy of
//! it that somebody has kept. What is read are words of a running job, each whole, not all of one
//! moment (R23): counts are bounded, and what cannot be true is said, not followed.
//!
//! Called by `inspect`.

use crate::plan::layout::{CELLS_BYTES, COUNTERS_AT};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use testudo_shm::cell::{self, DIRECTORY};
use testudo_shm::counters;
use testudo_shm::ring::WORD_STRIDE;
use testudo_state::group;

const PAGE: usize = 4096;

/// Counters of a worker that are looked at, and lines of ring positions: far more than any job has.
const COUNTERS_MAX: usize = 1 << 16;
const WORDS_MAX: usize = 1 << 16;

/// Bytes of a cell that are shown.
const SHOWN_BYTES: usize = 64;

/// Reads at any place; zeros where there is nothing.
struct Bytes<'a>(&'a File);

impl Bytes<'_> {
    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match self.0.read_at(&mut bytes[done..], (at + done) as u64) {
                Ok(0) | Err(_) => break,
                Ok(read) => done += read,
            }
        }
        bytes
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    found.map_or(0, u64::from_le_bytes)
}

fn half(bytes: &[u8], at: usize) -> u32 {
    word(bytes, at & !7).checked_shr(8 * (at as u32 & 4)).unwrap_or(0) as u32
}

fn hex(value: u64) -> String {
    format!("{value:016x}")
}

/// What a worker's segment of so many bytes says of itself.
pub(super) fn worker(file: &File, length: u64) -> Value {
    let bytes = Bytes(file);
    let (counters, end) = counters_of(&bytes);
    let mut at = end.next_multiple_of(PAGE);
    let (mut rings, mut offset) = (Vec::new(), 0);
    while (at as u64) < length && offset < WORDS_MAX * WORD_STRIDE {
        let page = bytes.read(at, PAGE);
        if word(&page, 0) == cell::MAGIC {
            return json!({
                "counters": counters,
                "ring_positions": rings,
                "cells": cells(&bytes, at),
                "undo_log": log(&bytes, at + CELLS_BYTES),
            });
        }
        for line in (0..PAGE).step_by(WORD_STRIDE) {
            let [position, epoch, tail] = [0, 64, 72].map(|field| word(&page, line + field));
            if position != 0 || epoch != 0 {
                rings.push(json!({
                    "word": (offset + line) / WORD_STRIDE, "position": position,
                    "cut_epoch": epoch, "cut_tail": tail,
                }));
            }
        }
        (at, offset) = (at + PAGE, offset + PAGE);
    }
    json!({ "counters": counters, "cells": "none yet, or not where this version has them" })
}

/// Values by label, and where the counters end.
fn counters_of(bytes: &Bytes<'_>) -> (Vec<Value>, usize) {
    let mut found = Vec::new();
    let mut at = COUNTERS_AT;
    while found.len() < COUNTERS_MAX {
        let entry = bytes.read(at, counters::ENTRY);
        let label = entry.get(16..16 + word(&entry, 8) as usize).unwrap_or_default();
        match std::str::from_utf8(label) {
            Ok(label) if !label.is_empty() => {
                found.push(json!({ "counter": label, "value": word(&entry, 0) }));
            }
            _ => break,
        }
        at += counters::ENTRY;
    }
    (found, at)
}

/// The directory at `at`: names are kept as hashes; values of eight bytes are shown as numbers.
fn cells(bytes: &Bytes<'_>, at: usize) -> Vec<Value> {
    let head = bytes.read(at, 64);
    let (count, used) = (half(&head, 8), half(&head, 12));
    if u64::from(count) > cell::ENTRIES || used as usize > CELLS_BYTES {
        return vec![json!({ "damaged": format!("{count} cells, {used} bytes") })];
    }
    let entries = bytes.read(at + 64, count as usize * 16);
    let area = bytes.read(at, used as usize);
    let shown = entries.chunks_exact(16).map(|entry| {
        let (name, offset, len) = (word(entry, 0), half(entry, 8), half(entry, 12));
        let all = area.get(offset as usize..offset as usize + len as usize);
        match all.filter(|_| u64::from(offset) >= DIRECTORY) {
            None => json!({ "cell": hex(name), "damaged": format!("{len} bytes at {offset}") }),
            Some(all) if len == 8 => json!({ "cell": hex(name), "value": word(all, 0) }),
            Some(all) => {
                let head = &all[..all.len().min(SHOWN_BYTES)];
                let text: String = head.iter().map(|byte| format!("{byte:02x}")).collect();
                json!({ "cell": hex(name), "bytes": len, "value": text })
            }
        }
    });
    shown.collect()
}

/// The log's first word: how much an open step, or one that a death has left open, has logged.
fn log(bytes: &Bytes<'_>, at: usize) -> Value {
    match word(&bytes.read(at, 8), 0) {
        0 => "empty: no step is open".into(),
        length => format!("{length} bytes: a step is open").into(),
    }
}

/// The states and the heap of a key group, of whose first page there are the bytes.
pub(super) fn key_group(front: &[u8]) -> Value {
    let roots = group::roots(front).map(
        |root| json!({ "state": hex(root.name), "schema": hex(root.schema), "words": root.words }),
    );
    json!({
        "states": roots.collect::<Vec<_>>(),
        "granted_bytes": word(front, 40),
        "touched_bytes": word(front, group::USED_AT as usize),
        "size_classes_with_free_blocks": group::free_classes(front),
    })
}
