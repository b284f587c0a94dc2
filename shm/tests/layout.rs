//! The layout of everything that two processes share is the one that LAYOUT.md states, byte for
//! byte: a process of another build attaches to the same memory.
//!
//! Where fields are private, the bytes themselves are looked at.

mod common;

use common::{Memory, must};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::mem::offset_of;
use testudo_shm::cell::{Cells, DIRECTORY, ENTRIES};
use testudo_shm::counters::{self, Counter};
use testudo_shm::follow::{FollowerHeader, JournalHeader};
use testudo_shm::frame::{COUNT_MAX, Head, Kind, Mark};
use testudo_shm::header::{
    ControlHeader, CutWords, Gap, LAYOUT_VERSION, MAGIC, OutsideWords, RegionWords, TimeWords,
    WorkerHeader,
};
use testudo_shm::last_words::LastWords;
use testudo_shm::ring::CutTail;
use testudo_shm::standby::StandbyHeader;
use testudo_shm::txn::Txn;

/// Size of a structure, and (name, offset, bytes) of its fields.
type Layout = (usize, Vec<(String, usize, usize)>);

fn field_bytes<T, F>(_: impl Fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layouts {
    ($($type:ident { $($field:ident),* })*) => {
        BTreeMap::from([$((
            stringify!($type).to_owned(),
            (size_of::<$type>(), vec![$((
                stringify!($field).to_owned(),
                offset_of!($type, $field),
                field_bytes(|value: &$type| &value.$field),
            )),*]),
        )),*])
    };
}

fn compiled() -> BTreeMap<String, Layout> {
    layouts! {
        WorkerHeader {
            magic, version, worker, plan, incarnation, pid, state, bell, sleeping, commits,
            commit_ns, first_commit_ns, attached_ns, rolled_back, watermark, gave_way_ns,
            before_ns, turns, gave_way, migrated_ns, death, claim,
            gap_count, gaps, cut, restoring, founded, times, outside
        }
        ControlHeader {
            magic, version, plan, supervisor, reign, led_ns, description, description_bytes,
            control, folder, bell, sleeping, regions, give_way
        }
        StandbyHeader { magic, version, state, woken_ns, copied }
        JournalHeader { granted, active, parting, begin, stood_ns, left_behind, tail }
        FollowerHeader {
            wish, copied, pid, state_bytes, follows, mismatches, mismatch_step, mismatch_at,
            read, steps, checks
        }
        RegionWords { epoch, good, aborted }
        TimeWords { busy_ns, idle_ns, pressed_ns, waiting_ns, waiting_since_ns }
        OutsideWords { operator, state, since_ms, errno, retries }
        CutWords {
            epoch, incarnation, failure, errno, file_bytes, index_at, index_bytes, index_checksum,
            flight_bytes, is_full, pause_ns, duration_ns, write_ns, copied_blocks, copied_ns,
            joined, committed
        }
        CutTail { epoch, tail }
        Gap { from_ns, to_ns }
        Mark { watermark, sent_ns, routing }
    }
}

/// The tables under headings of the form "### `Name`: 1234 bytes".
fn stated() -> BTreeMap<String, Layout> {
    let mut layouts = BTreeMap::new();
    let mut current: Option<String> = None;
    for line in include_str!("../LAYOUT.md").lines() {
        if line.starts_with('#') {
            current = None;
            let heading = line.strip_prefix("### `").and_then(|rest| rest.split_once("`: "));
            if let Some((name, rest)) = heading {
                let bytes = rest.strip_suffix(" bytes").expect("### `Name`: n bytes");
                let bytes = bytes.parse().expect("a number of bytes");
                layouts.insert(name.to_owned(), (bytes, Vec::new()));
                current = Some(name.to_owned());
            }
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let (Some(name), [_, field, offset, bytes, ..]) = (&current, cells.as_slice()) else {
            continue;
        };
        if let (Ok(offset), Ok(bytes)) = (offset.parse(), bytes.parse()) {
            let field = field.trim_matches('`').to_owned();
            layouts.get_mut(name).expect("inserted").1.push((field, offset, bytes));
        }
    }
    layouts
}

fn as_table(layouts: &BTreeMap<String, Layout>) -> String {
    let mut text = String::new();
    for (name, (bytes, fields)) in layouts {
        let _ = writeln!(text, "### `{name}`: {bytes} bytes");
        for (field, offset, bytes) in fields {
            let _ = writeln!(text, "| `{field}` | {offset} | {bytes} |");
        }
    }
    text
}

#[test]
fn the_layout_of_shared_structures_is_the_one_that_is_documented() {
    let compiled = compiled();
    let mut stated = stated();
    // These have private fields: see the tests below.
    let private = ["LastWords", "Counter", "DirectoryHead", "Entry"];
    let sizes = private.map(|name| stated.remove(name).expect(name).0);
    assert_eq!(sizes, [size_of::<LastWords>(), size_of::<Counter>(), 24, 16]);
    assert_eq!(
        as_table(&stated),
        as_table(&compiled),
        "LAYOUT.md differs: a changed layout needs a new LAYOUT_VERSION and the table below\n{}",
        as_table(&compiled)
    );
}

#[test]
fn a_layout_cannot_change_without_its_version() {
    let line = format!("Version {LAYOUT_VERSION}, magic `{MAGIC:#018x}`.");
    assert!(include_str!("../LAYOUT.md").contains(&line), "LAYOUT.md lacks: {line}");
}

/// Offset and bytes that LAYOUT.md states for a field of a structure with private fields.
fn place(structure: &str, field: &str) -> (usize, usize) {
    let (_, fields) = &stated()[structure];
    let found = fields.iter().find(|(name, ..)| name == field);
    let (_, offset, bytes) = found.unwrap_or_else(|| panic!("no {structure}.{field}"));
    (*offset, *bytes)
}

fn read(memory: &mut Memory, base: usize, structure: &str, field: &str) -> u64 {
    let (offset, bytes) = place(structure, field);
    let all = testudo_shm::zerocopy::IntoBytes::as_bytes(&*memory.words());
    let mut word = [0; 8];
    word[..bytes].copy_from_slice(&all[base + offset..base + offset + bytes]);
    u64::from_le_bytes(word)
}

#[test]
fn last_words_lie_where_the_document_says() {
    let mut memory = Memory::new(4096);
    // SAFETY: a page of zeros, mapped as long as the test.
    unsafe { testudo_shm::header::at::<LastWords>(memory.base()) }.write("abc");
    assert_eq!(read(&mut memory, 0, "LastWords", "version"), 2);
    assert_eq!(read(&mut memory, 0, "LastWords", "bytes"), 3);
    let (offset, bytes) = place("LastWords", "text");
    assert_eq!(offset + bytes, size_of::<LastWords>());
    assert_eq!(memory.words()[offset / 8].to_le_bytes(), *b"abc\0\0\0\0\0");
}

fn txn(memory: &Memory, len: usize) -> Txn {
    // SAFETY: the log is the first page of the mapping, which lives as long as the test.
    unsafe { Txn::attach(memory.base(), len, memory.base(), 4096, 2048) }
}

#[test]
fn counters_lie_where_the_document_says() {
    let mut memory = Memory::new(8192);
    let mut txn = txn(&memory, 8192);
    let value = counters::open(&mut txn, 4096, "records");
    txn.set(value, 77);
    assert_eq!(read(&mut memory, 4096, "Counter", "value"), 77);
    assert_eq!(read(&mut memory, 4096, "Counter", "label_bytes"), 7);
    let (offset, bytes) = place("Counter", "label");
    assert_eq!(offset + bytes, counters::ENTRY);
    assert_eq!(memory.words()[(4096 + offset) / 8].to_le_bytes(), *b"records\0");
}

#[test]
fn the_cell_directory_lies_where_the_document_says() {
    let len = DIRECTORY as usize + 4096;
    let all = (4096 + len).next_multiple_of(4096);
    let mut memory = Memory::new(all);
    let mut txn = txn(&memory, all);
    let cells = must(Cells::open(&mut txn, 4096, len as u64));
    must(cells.cell(&mut txn, "first", [1u8; 3]));
    must(cells.cell(&mut txn, "second", 5u32));
    assert_eq!(read(&mut memory, 4096, "DirectoryHead", "magic"), 0x7465_7374_6365_6c31);
    assert_eq!(read(&mut memory, 4096, "DirectoryHead", "count"), 2);
    assert_eq!(read(&mut memory, 4096, "DirectoryHead", "used"), DIRECTORY + 16);
    let second = 4096 + 64 + 16;
    let name = testudo_shm::hash::name_hash("second");
    assert_eq!(read(&mut memory, second, "Entry", "name"), name);
    assert_eq!(read(&mut memory, second, "Entry", "offset"), DIRECTORY + 8);
    assert_eq!(read(&mut memory, second, "Entry", "bytes"), 4);
    assert_eq!(memory.words()[(4096 + DIRECTORY as usize) / 8 + 1], 5);
    let line =
        format!("A directory of {ENTRIES} entries, then the cells from byte {DIRECTORY} on.");
    assert!(include_str!("../LAYOUT.md").contains(&line), "LAYOUT.md lacks: {line}");
}

#[test]
fn the_undo_log_lies_where_the_document_says() {
    let mut memory = Memory::new(8192);
    let mut txn = txn(&memory, 8192);
    memory.words()[514] = 0xABCD;
    txn.set(txn.place::<u64>(514 * 8), 1);
    txn.set(txn.place::<[u8; 3]>(4096 + 5), [9; 3]);
    let words = memory.words();
    assert_eq!(words[0] & 0xFFFF_FFFF, 32, "root: bytes of log in use");
    assert_eq!(words[0] >> 32, (32 * 0x9E37_79B9) & 0xFFFF_FFFF, "and above them their product");
    assert!(words[1..8].iter().all(|word| *word == 0), "the rest of the root line is reserved");
    assert_eq!(words[8], 0xABCD, "old bytes");
    assert_eq!(words[9], (514 * 8) << 16 | 8, "offset and length");
    assert_eq!(words[10] & 0xFF_FFFF, 0, "old bytes, padded to eight");
    assert_eq!(words[11], (4096 + 5) << 16 | 3);
}

#[test]
fn a_frame_head_has_the_bits_that_the_document_says() {
    let head = Head { kind: Kind::Data, count: 5, bytes: 24 };
    assert_eq!(head.word(), 1 << 56 | 5 << 32 | 24);
    assert_eq!(Head { kind: Kind::Mark, count: 0, bytes: 24 }.word() >> 56, 2);
    assert_eq!(Head { kind: Kind::Pad, count: 0, bytes: 0 }.word() >> 56, 3);
    assert_eq!(Head { kind: Kind::End, count: 0, bytes: 0 }.word() >> 56, 4);
    assert_eq!(COUNT_MAX, (1 << 24) - 1);
}
