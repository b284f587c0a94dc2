//! Cells: whoever asks by name finds what the last commit left, in whatever order it asks.

mod common;

use common::{Memory, must};
use testudo_shm::cell::{CellError, Cells, DIRECTORY, ENTRIES};
use testudo_shm::counters::{self, Counter};
use testudo_shm::txn::Txn;

const AT: u64 = 64 << 10;
const LEN: u64 = DIRECTORY + 1024;

/// Where the counter of its test stands, and the end of it all.
const COUNTER: u64 = (AT + LEN).next_multiple_of(4096);
const ALL: usize = COUNTER as usize + 4096;

fn attach(memory: &Memory) -> (Txn, Cells) {
    let base = memory.base();
    // SAFETY: the log is the first part of the mapping, which lives as long as the test.
    let mut txn = unsafe { Txn::attach(base, ALL, base, AT as usize, 4096) };
    must(txn.roll_back());
    let cells = must(Cells::open(&mut txn, AT, LEN));
    (txn, cells)
}

#[test]
fn a_cell_is_found_by_its_name_in_any_order() {
    let memory = Memory::new(ALL);
    let names = ["head", "tail", "watermark", "offset", "edge-1/spill-0/head"];
    let (mut txn, cells) = attach(&memory);
    let mut places = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let place = must(cells.cell(&mut txn, name, index as u64));
        txn.set(place, 100 + index as u64);
        places.push(place.offset());
    }
    txn.commit();
    let (mut txn, cells) = attach(&memory);
    for (index, name) in names.iter().enumerate().rev() {
        let place = must(cells.cell(&mut txn, name, 0u64));
        assert_eq!(place.offset(), places[index]);
        assert_eq!(txn.get(place), 100 + index as u64, "{name} was made anew");
    }
    assert_eq!(txn.logged(), 0, "looking changed something");
}

#[test]
fn cells_of_all_sizes_do_not_overlap() {
    let memory = Memory::new(ALL);
    let (mut txn, cells) = attach(&memory);
    let byte = must(cells.cell(&mut txn, "byte", 1u8));
    let odd = must(cells.cell(&mut txn, "odd", [2u8; 13]));
    let words = must(cells.cell(&mut txn, "words", [3u64; 3]));
    let last = must(cells.cell(&mut txn, "last", 4u32));
    txn.set(odd, [9; 13]);
    assert_eq!((txn.get(byte), txn.get(words), txn.get(last)), (1, [3; 3], 4));
    assert!(words.offset().is_multiple_of(8) && last.offset().is_multiple_of(8));
}

#[test]
fn a_cell_made_in_a_step_that_was_rolled_back_does_not_exist() {
    let memory = Memory::new(ALL);
    let (mut txn, cells) = attach(&memory);
    must(cells.cell(&mut txn, "kept", 1u64));
    txn.commit();
    must(cells.cell(&mut txn, "lost", 2u64));
    let (mut txn, cells) = attach(&memory);
    let place = must(cells.cell(&mut txn, "lost", [5u8; 16]));
    assert_eq!(txn.get(place), [5; 16], "its size and value are those of the second creation");
    assert_eq!(must(cells.cell(&mut txn, "kept", 9u64)).offset(), AT + DIRECTORY);
}

#[test]
fn another_size_is_an_error_that_names_both() {
    let memory = Memory::new(ALL);
    let (mut txn, cells) = attach(&memory);
    must(cells.cell(&mut txn, "position", 1u64));
    let error = cells.cell(&mut txn, "position", [0u64; 2]).expect_err("another size");
    let wanted = CellError::Size { name: "position".into(), found: 8, wanted: 16 };
    assert_eq!(error, wanted);
    assert_eq!(error.to_string(), "cell position has 8 bytes, this program wants 16");
}

#[test]
fn a_full_area_is_an_error() {
    let memory = Memory::new(ALL);
    let (mut txn, cells) = attach(&memory);
    must(cells.cell(&mut txn, "large", [0u8; 1016]));
    must(cells.cell(&mut txn, "last", 0u8));
    let full = CellError::Full { name: "more".into(), bytes: LEN };
    assert_eq!(cells.cell(&mut txn, "more", 0u8).expect_err("no bytes left"), full);
    assert!(cells.cell(&mut txn, "last", 0u8).is_ok(), "what exists is still found");
}

#[test]
fn a_full_directory_is_an_error() {
    let mut memory = Memory::new(ALL);
    let (mut txn, cells) = attach(&memory);
    must(cells.cell(&mut txn, "last", 777u64));
    // As if as many had been made as a directory can name, of no size.
    memory.words()[AT as usize / 8 + 1] = (DIRECTORY + 8) << 32 | ENTRIES;
    let full = CellError::Full { name: "more".into(), bytes: LEN };
    let error = cells.cell(&mut txn, "more", 0u8).expect_err("no entry left");
    assert_eq!(error, full);
    assert!(error.to_string().contains("more"), "{error}");
    let place = must(cells.cell(&mut txn, "last", 0u64));
    assert_eq!(txn.get(place), 777, "what exists is still found");
}

#[test]
fn something_else_where_the_directory_should_be_is_an_error() {
    let mut memory = Memory::new(ALL);
    memory.words()[AT as usize / 8] = 0x1234;
    let base = memory.base();
    // SAFETY: as in `attach`.
    let mut txn = unsafe { Txn::attach(base, ALL, base, AT as usize, 4096) };
    assert_eq!(Cells::open(&mut txn, AT, LEN).expect_err("no directory"), CellError::Damaged);
}

#[test]
fn a_directory_that_claims_more_than_its_area_is_an_error() {
    let mut memory = Memory::new(ALL);
    let (mut txn, _) = attach(&memory);
    txn.commit();
    for used in [0, 8, DIRECTORY - 8, DIRECTORY + 4, LEN + 8, u64::from(u32::MAX)] {
        memory.words()[AT as usize / 8 + 1] = used << 32;
        assert_eq!(Cells::open(&mut txn, AT, LEN).err(), Some(CellError::Damaged), "{used} used");
    }
}

#[test]
fn a_counter_is_readable_by_whoever_maps_it_and_rolls_back() {
    let mut memory = Memory::new(ALL);
    let (mut txn, _) = attach(&memory);
    let at = COUNTER;
    let place = counters::open(&mut txn, at, "records in");
    txn.set(place, 41);
    txn.commit();
    txn.set(place, 42);
    // SAFETY: mapped for as long as the test; any bytes are a counter.
    let counter = unsafe { &*memory.base().add(at as usize).cast::<Counter>() };
    assert_eq!(counter.value(), 42, "the open step's share may be seen");
    must(txn.roll_back());
    assert_eq!(counter.value(), 41);
    let again = counters::open(&mut txn, at, &"x".repeat(500));
    assert_eq!(txn.get(again), 41, "a successor does not start anew");
    assert_eq!(memory.words()[(at as usize + 8) / 8], 112, "a label is cut at the entry's end");
    assert_eq!(memory.words()[(at as usize + counters::ENTRY) / 8], 0, "the next one is untouched");
}

#[test]
fn as_many_cells_as_a_directory_can_name_are_made_and_found() {
    const LEN: u64 = DIRECTORY + ENTRIES * 8;
    const ALL: usize = (AT + LEN).next_multiple_of(4096) as usize;
    let log = AT as usize;
    let memory = Memory::new(ALL);
    let open = || {
        let base = memory.base();
        // SAFETY: as in `attach`.
        let mut txn = unsafe { Txn::attach(base, ALL, base, log, 4096) };
        must(txn.roll_back());
        let cells = must(Cells::open(&mut txn, AT, LEN));
        (txn, cells)
    };
    let (mut txn, cells) = open();
    for n in 0..ENTRIES {
        must(cells.cell(&mut txn, &format!("cell-{n}"), n));
        txn.commit();
    }
    let (mut txn, cells) = open();
    for n in (0..ENTRIES).rev() {
        let place = must(cells.cell(&mut txn, &format!("cell-{n}"), 0u64));
        assert_eq!(txn.get(place), n);
    }
    assert_eq!(txn.logged(), 0, "looking changed something");
}

#[test]
fn a_cell_that_this_process_rolled_back_is_made_anew() {
    let memory = Memory::new(ALL);
    let (mut txn, cells) = attach(&memory);
    must(cells.cell(&mut txn, "kept", 1u64));
    txn.commit();
    must(cells.cell(&mut txn, "lost", 2u64));
    must(txn.roll_back());
    must(cells.cell(&mut txn, "other", 3u64));
    let place = must(cells.cell(&mut txn, "lost", 4u64));
    assert_eq!(txn.get(place), 4);
    let other = must(cells.cell(&mut txn, "other", 9u64));
    assert_eq!(txn.get(other), 3);
}
