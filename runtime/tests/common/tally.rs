//! The self-checking job: every record carries its key's sequence number, and keyed state checks
//! that it is the last one and one more. Nothing can be lost, doubled or reordered without being
//! counted as wrong.
//!
//! Keys are numbers modulo [`KEYS`], a multiple of every parallelism used, so that each key has one
//! producer and its records one order.

use super::gated::Gated;
use super::{sorted_lines, text};
use std::path::{Path, PathBuf};
use testudo::flow::keyed::Keyed;
use testudo::prelude::*;
use testudo::sink::file::Csv;

pub const KEYS: u64 = 600;

#[testudo::record]
#[derive(Debug)]
pub struct Numbered {
    pub key: u64,
    pub sequence: u64,
}

#[testudo::record]
#[derive(Debug)]
pub struct Tally {
    pub key: u64,
    pub count: u64,
    pub wrong: u64,
}

/// Parameters of the job: how many records, and where its rows go.
pub fn parameters(total: u64, output: &Path) -> String {
    format!("{total} {}", text(output))
}

/// The job: one row for each key at the end of input, with its count and how many records came out
/// of turn.
pub fn ordered(flow: &Flow, parameters: &str) {
    checked(flow, parameters, numbered);
}

/// As [`ordered`], with numbers of the caller's.
pub fn checked(flow: &Flow, parameters: &str, numbers: impl Fn(u64) -> Numbered + 'static) {
    let (total, output) = parameters.split_once(' ').expect("total and output");
    let total = total.parse().expect("a number");
    let numbers = flow.source("numbers", Generator::new(total, numbers));
    tallied(flow, numbers.key_by(|record| record.key), output);
}

/// As [`ordered`], with an input that ends once its gate is there.
pub fn gated(flow: &Flow, parameters: &str) {
    let (total, output) = parameters.split_once(' ').expect("total and output");
    let total = total.parse().expect("a number");
    let source = Gated { total, gate: gate(Path::new(output)) };
    let numbers = flow.source("numbers", source).map(|n| numbered(*n));
    tallied(flow, numbers.key_by(|record| record.key), output);
}

fn gate(output: &Path) -> PathBuf {
    output.with_extension("gate")
}

/// Lets the input of a job of [`gated`] end.
pub fn open_gate(output: &Path) {
    std::fs::write(gate(output), "").expect("room for a file");
}

/// What is behind the exchange.
pub fn tallied<F: Fn(&Numbered) -> u64 + 'static>(
    flow: &Flow,
    numbers: Keyed<Numbered, u64, F>,
    output: &str,
) {
    let seen = flow.counter("seen");
    numbers
        .process(
            |state| (state.value::<u64>("next"), state.value::<u64>("wrong")),
            move |(next, wrong), cx, record: &Numbered| {
                seen.add(1);
                let expected = cx.get(next).copied();
                if expected.is_none() {
                    cx.set_timer(i64::MAX);
                }
                if record.sequence != expected.unwrap_or(0) {
                    let before = cx.get(wrong).copied().unwrap_or(0);
                    cx.set(wrong, &(before + 1));
                }
                cx.set(next, &(record.sequence + 1));
            },
            |(next, wrong), cx, _| {
                let (key, count) = (*cx.key(), cx.get(next).copied().unwrap_or(0));
                let wrong = cx.get(wrong).copied().unwrap_or(0);
                cx.emit(Tally { key, count, wrong });
            },
        )
        .sink("rows", FileSink::new(output, Csv(|row: &Tally| (row.key, row.count, row.wrong))));
}

pub fn numbered(n: u64) -> Numbered {
    Numbered { key: n % KEYS, sequence: n / KEYS }
}

/// Checks the rows of a job that read `records` in `subtasks` subtasks: exactly those that the
/// sources say they have read, each once and in turn. Sources that were stopped may stand at
/// different numbers.
pub fn check(output: &Path, records: u64, subtasks: u64) {
    if let Err(what) = look(output, records, subtasks) {
        panic!("{what}");
    }
}

/// The same, for who expects that something is wrong.
pub fn look(output: &Path, records: u64, subtasks: u64) -> Result<(), String> {
    let rows: Vec<(u64, u64, u64)> = sorted_lines(output).iter().map(|line| row(line)).collect();
    let sum: u64 = rows.iter().map(|row| row.1).sum();
    ensure(sum == records, || format!("the sources counted {records} records, the keys {sum}"))?;
    for subtask in 0..subtasks {
        let mut own: Vec<_> = rows.iter().filter(|row| row.0 % subtasks == subtask).collect();
        own.sort_unstable();
        let (first, last) = (own.first().map_or(0, |row| row.1), own.last().map_or(0, |row| row.1));
        for pair in own.windows(2) {
            ensure(pair[0].0 < pair[1].0, || format!("key {} has two rows", pair[0].0))?;
            let more = || format!("key {} has more than the one before", pair[1].0);
            ensure(pair[0].1 >= pair[1].1, more)?;
        }
        let uneven = || format!("keys of subtask {subtask} have {first} to {last} records");
        ensure(first - last <= 1, uneven)?;
        let read: u64 = own.iter().map(|row| row.1).sum();
        let missing = || format!("{} keys of subtask {subtask}, which read {read}", own.len());
        ensure(own.len() as u64 == read.min(KEYS / subtasks), missing)?;
    }
    let wrong: u64 = rows.iter().map(|row| row.2).sum();
    ensure(wrong == 0, || format!("{wrong} records came out of turn"))
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

fn row(line: &str) -> (u64, u64, u64) {
    let mut fields = line.split(',').map(|field| field.parse().expect("a number"));
    let mut next = || fields.next().expect("three fields");
    (next(), next(), next())
}
