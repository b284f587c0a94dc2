//! The jobs whose checkpoints are tested, each with the rows that it must write. What a job writes
//! depends on its input alone: not on the number of workers, nor on who died.
//!
//! Every job has parameters `total pace output...`: how many records, and for how many nanoseconds
//! each is held up behind the first exchange, so that rings and spills are full while it runs.

use super::common::{scramble, text};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::prelude::*;
use testudo::serde::{Deserialize, Serialize};
use testudo::shm::record::Record;
use testudo::sink::file::{Csv, Lines};

/// What a closure sees of a `String`.
type Text = <String as Record>::View;

/// The parameters of a job.
pub struct Asked {
    pub total: u64,
    pub pace: u64,
    pub files: Vec<String>,
}

impl Asked {
    pub fn text(total: u64, pace: u64, files: &[PathBuf]) -> String {
        let files: Vec<String> = files.iter().map(|path| text(path)).collect();
        format!("{total} {pace} {}", files.join(" "))
    }

    fn parse(parameters: &str) -> Self {
        let mut fields = parameters.split(' ');
        let mut number = || fields.next().and_then(|field| field.parse().ok()).expect("a number");
        let (total, pace) = (number(), number());
        Self { total, pace, files: fields.map(str::to_owned).collect() }
    }
}

thread_local! {
    static OWED: Cell<u64> = const { Cell::new(0) };
}

/// Holds a record up. Sleeps are at least a millisecond, so they are owed until then.
fn hold_up(pace: u64) {
    let owed = OWED.get() + pace;
    if owed < 1_000_000 {
        OWED.set(owed);
    } else {
        OWED.set(0);
        std::thread::sleep(Duration::from_nanos(owed));
    }
}

fn sorted(lines: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut lines: Vec<String> = lines.into_iter().collect();
    lines.sort_unstable();
    lines
}

/// Keys of [`ordered`]: a multiple of every parallelism used, so that a key has one producer.
const KEYS: u64 = 120;

#[testudo::record(archived)]
#[derive(Debug)]
struct Numbered {
    key: String,
    sequence: u64,
}

/// Each key checks that its records come in turn, and says so now and then; text for keys, and a
/// value, a list and a map for state. Its rows: key, sequence, how many came out of turn, and sums
/// of what the list and the map hold.
pub fn ordered(flow: &Flow, parameters: &str) {
    let Asked { total, pace, files } = Asked::parse(parameters);
    let seen = flow.counter("seen");
    let number = |n| Numbered { key: format!("key {}", n % KEYS), sequence: n / KEYS };
    flow.source("numbers", Generator::new(total, number))
        .key_by(|record| record.key.to_string())
        .process(
            |state| {
                let (next, wrong) = (state.value::<u64>("next"), state.value::<u64>("wrong"));
                (next, wrong, state.list::<u64>("list"), state.map::<u64, String>("map"))
            },
            move |(next, wrong, list, map), cx, record| {
                hold_up(pace);
                seen.add(1);
                let sequence = record.sequence.to_native();
                if sequence != cx.get(next).copied().unwrap_or(0) {
                    let before = cx.get(wrong).copied().unwrap_or(0);
                    cx.set(wrong, &(before + 1));
                }
                cx.set(next, &(sequence + 1));
                cx.append(list, &sequence);
                cx.map_put(map, &(sequence % 7), &"v".repeat((sequence % 50) as usize));
                if sequence % 16 == 15 {
                    let wrong = cx.get(wrong).copied().unwrap_or(0);
                    let items: u64 = cx.items(list).sum();
                    let texts: u64 = cx.map_iter(map).map(|(_, text)| text.len() as u64).sum();
                    let key = cx.key().to_string();
                    cx.clear_list(list);
                    cx.emit(format!("{key},{sequence},{wrong},{items},{texts}"));
                }
            },
            |_, _, _| (),
        )
        .sink("rows", FileSink::new(&files[0], Lines(|row: &Text| row.to_string())));
}

pub fn ordered_rows(total: u64) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for key in 0..KEYS {
        let count = (total + KEYS - 1 - key) / KEYS;
        for sequence in (15..count).step_by(16) {
            let items: u64 = (sequence - 15..=sequence).sum();
            let texts: u64 = (sequence - 6..=sequence).map(|sequence| sequence % 50).sum();
            rows.push(format!("key {key},{sequence},0,{items},{texts}"));
        }
    }
    vec![sorted(rows)]
}

/// No event comes more than this after a later one of the same part of the source.
const BOUND: u64 = 300;

#[testudo::record]
#[derive(Debug, Default)]
struct Event {
    at: i64,
    key: u64,
    value: u64,
}

fn event(n: u64) -> Event {
    let random = scramble(n);
    let at = 2 * n as i64 - (random % BOUND) as i64 - 10_000;
    Event { at, key: random >> 32 & 31, value: random >> 40 & 0xFF }
}

#[testudo::record]
#[derive(Debug, Default)]
struct Row {
    start: i64,
    end: i64,
    key: u64,
    count: u64,
    sum: u64,
}

impl Row {
    fn add(&mut self, event: &Event) {
        self.count += 1;
        self.sum += event.value;
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
    }

    fn line(&self) -> String {
        format!("{},{},{},{},{}", self.start, self.end, self.key, self.count, self.sum)
    }
}

/// Sliding windows by key, tumbling ones over everything, and a timer for each key and second that
/// sums what its list holds of that second.
pub fn windows(flow: &Flow, parameters: &str) {
    let Asked { total, pace, files } = Asked::parse(parameters);
    let rows = |path: &str| FileSink::new(path, Lines(Row::line));
    let (left, rest) = flow
        .source("events", Generator::new(total, event))
        .event_time(Duration::from_millis(BOUND), |event| event.at)
        .fork();
    let (middle, right) = rest.fork();
    left.key_by(|event| event.key)
        .window(sliding(Duration::from_secs(1), Duration::from_millis(250)), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .sink("by-key", rows(&files[0]));
    middle
        .window_all(tumbling(Duration::from_millis(500)), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |window, row| Row {
            start: window.start,
            end: window.end,
            ..*row
        })
        .sink("of-all", rows(&files[1]));
    right
        .key_by(|event| event.key)
        .process(
            |state| state.list::<Event>("events"),
            move |events, cx, event: &Event| {
                hold_up(pace);
                cx.append(events, event);
                cx.set_timer(second_of(event.at) + 1000);
            },
            |events, cx, time| {
                let all: Vec<Event> = cx.items(events).map(|e| Event { ..*e }).collect();
                cx.clear_list(events);
                let mut row =
                    Row { start: time - 1000, end: time, key: *cx.key(), count: 0, sum: 0 };
                for event in all {
                    if event.at < time { row.add(&event) } else { cx.append(events, &event) }
                }
                cx.emit(row);
            },
        )
        .sink("timed", rows(&files[2]));
}

fn second_of(at: i64) -> i64 {
    at - at.rem_euclid(1000)
}

fn model(total: u64, size: i64, slide: i64, by_key: bool) -> Vec<String> {
    let mut windows: BTreeMap<(i64, u64), Row> = BTreeMap::new();
    for event in (0..total).map(event) {
        let mut end = event.at - event.at.rem_euclid(slide) + slide;
        while end - size <= event.at {
            let key = if by_key { event.key } else { 0 };
            windows.entry((end, key)).or_default().add(&event);
            end += slide;
        }
    }
    let line = |((end, key), row): (&(i64, u64), &Row)| {
        Row { start: end - size, end: *end, key: *key, ..*row }.line()
    };
    sorted(windows.iter().map(line))
}

pub fn windows_rows(total: u64) -> Vec<Vec<String>> {
    vec![
        model(total, 1000, 250, true),
        model(total, 500, 500, false),
        model(total, 1000, 1000, true),
    ]
}

/// Records without keys: two sources united, one record in a hundred becomes five hundred, some are
/// refused, the rest goes to a folder of parts by a stage of its own.
pub fn plumbing(flow: &Flow, parameters: &str) {
    let Asked { total, pace, files } = Asked::parse(parameters);
    let even = flow.source("even", Generator::new(total / 2, |n| 2 * n));
    let odd = flow.source("odd", Generator::new(total / 2, |n| 2 * n + 1)).parallelism(1);
    let (good, bad) = even
        .union(odd)
        .flat_map(|n| vec![*n; fan_out(*n)])
        .try_map(|n| if n % 7 == 0 { Err(format!("{n} is a multiple of seven")) } else { Ok(*n) });
    good.round_robin()
        .map(move |n| {
            hold_up(pace);
            n + 1
        })
        .sink("parts", FileSink::folder(&files[0], "txt", Lines(|n: &u64| *n)));
    bad.map(|why| why.to_string())
        .parallelism(1)
        .isolated()
        .sink("bad", FileSink::new(&files[1], Lines(|why: &Text| why.to_string())));
}

fn fan_out(n: u64) -> usize {
    if n % 100 == 50 { 500 } else { 1 }
}

pub fn plumbing_rows(total: u64) -> Vec<Vec<String>> {
    let all = || (0..total / 2 * 2).flat_map(|n| vec![n; fan_out(n)]);
    let good = all().filter(|n| n % 7 > 0).map(|n| (n + 1).to_string());
    let bad = all().filter(|n| n % 7 == 0).map(|n| format!("{n} is a multiple of seven"));
    vec![sorted(good), sorted(bad)]
}

/// Every record to every subtask.
pub fn copied(flow: &Flow, parameters: &str) {
    let Asked { total, pace, files } = Asked::parse(parameters);
    flow.source("numbers", Generator::new(total, |n| n))
        .broadcast()
        .map(move |n| {
            hold_up(pace);
            *n
        })
        .sink("parts", FileSink::folder(&files[0], "txt", Lines(|n: &u64| *n)));
}

pub fn copied_rows(total: u64, workers: usize) -> Vec<Vec<String>> {
    vec![sorted((0..total).flat_map(|n| vec![n.to_string(); workers]))]
}

/// Both ends of an exchange take their time, by turns: a worker is in the middle of a step when the
/// other one has cut.
pub fn bursts(flow: &Flow, parameters: &str) {
    let Asked { total, pace, files } = Asked::parse(parameters);
    let slow = move |n: &u64| {
        hold_up(pace);
        *n
    };
    flow.source("numbers", Generator::new(total, |n| n))
        .map(slow)
        .key_by(|n| scramble(*n))
        .stream()
        .map(slow)
        .sink("parts", FileSink::folder(&files[0], "txt", Lines(|n: &u64| *n)));
}

pub fn bursts_rows(total: u64) -> Vec<Vec<String>> {
    vec![sorted((0..total).map(|n| n.to_string()))]
}

/// Lines of standard input, to a folder of parts.
pub fn typed(flow: &Flow, parameters: &str) {
    let Asked { pace, files, .. } = Asked::parse(parameters);
    flow.stdin()
        .round_robin()
        .map(move |line| {
            hold_up(pace);
            line.to_string()
        })
        .sink("parts", FileSink::folder(&files[0], "txt", Lines(|row: &Text| row.to_string())));
}

#[testudo::record(archived)]
#[derive(Debug, Deserialize, Serialize)]
#[serde(crate = "testudo::serde")]
struct Line {
    id: u64,
    name: String,
}

/// A file's rows by key, to a folder whose parts have headers; what cannot be read is refused.
/// The first file of the parameters is the input.
pub fn files(flow: &Flow, parameters: &str) {
    let Asked { pace, files, .. } = Asked::parse(parameters);
    flow.source("rows", FileSource::<Line>::csv([&files[0]]))
        .key_by(|row| row.id.to_native() % 50)
        .stream()
        .map(move |row| {
            hold_up(pace);
            format!("{},{}", row.id.to_native(), row.name)
        })
        .sink(
            "out",
            FileSink::folder(&files[1], "csv", Lines(|row: &Text| row.to_string()))
                .header("id,name"),
        );
}

/// The input of [`files`], with some rows that cannot be read.
pub fn write_input(path: &Path, total: u64) {
    let line = |n| if n % 40 == 7 { format!("x{n},bad\n") } else { format!("{n},name {n}\n") };
    let lines: String = (0..total).map(line).collect();
    std::fs::write(path, format!("id,name\n{lines}")).expect("room for an input");
}

/// Rows without the parts' headers.
pub fn files_rows(total: u64) -> Vec<String> {
    sorted((0..total).filter(|n| n % 40 != 7).map(|n| format!("{n},name {n}")))
}

/// Counts by key; a second operator has state where the parameters end in `+`.
pub fn counted(flow: &Flow, parameters: &str) {
    let (parameters, is_more) = match parameters.strip_suffix(" +") {
        Some(rest) => (rest, true),
        None => (parameters, false),
    };
    let Asked { total, pace, files } = Asked::parse(parameters);
    let sink = FileSink::new(&files[0], Csv(|row: &Row| (row.key, row.count)));
    let source =
        flow.source("numbers", Generator::new(total, |n| Row { key: n, ..Row::default() }));
    let keyed = source.key_by(|row| row.key % KEYS);
    let counting = keyed.aggregate(
        || 0u64,
        move |count, _| {
            hold_up(pace);
            *count += 1;
        },
        |key, count| Row { key: *key, count: *count, ..Row::default() },
    );
    let counting = counting.uid("count");
    if is_more {
        let again = counting.key_by(|row| row.key).reduce(|_, row| Row { ..*row });
        again.uid("again").sink("rows", sink);
    } else {
        counting.sink("rows", sink);
    }
}

pub fn counted_rows(total: u64) -> Vec<Vec<String>> {
    vec![sorted((0..total).map(|n| format!("{},{}", n % KEYS, n / KEYS + 1)))]
}

/// As [`counted`], with counts of another type.
pub fn recounted(flow: &Flow, parameters: &str) {
    let Asked { total, files, .. } = Asked::parse(parameters);
    flow.source("numbers", Generator::new(total, |n| Row { key: n, ..Row::default() }))
        .key_by(|row| row.key % KEYS)
        .aggregate(
            || 0u32,
            |count, _| *count += 1,
            |key, count| Row { key: *key, count: u64::from(*count), ..Row::default() },
        )
        .uid("count")
        .sink("rows", FileSink::new(&files[0], Csv(|row: &Row| (row.key, row.count))));
}
