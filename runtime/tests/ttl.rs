//! Time to live of keyed state: what was not used for so long is gone, what was used is there, and
//! neither a killed worker nor a resumed job changes that.

mod common;

use common::process::Disturber;
use common::program::Cli;
use common::{Jobs, finish, folder, run, settings, start, text, trials, wait_for};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Csv;

const JOBS: Jobs = &[("sessions", sessions)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            in_event_time_unused_keys_expire_and_used_ones_stay,
            a_killed_worker_brings_nothing_back_and_loses_nothing,
            a_resumed_job_keeps_all_deadlines,
            an_aggregate_begins_anew_after_its_time_to_live,
            a_reduce_begins_anew_after_its_time_to_live,
            nothing_expires_before_its_time,
            expired_keys_of_an_aggregate_give_their_memory_back,
        ],
    )
}

/// Records of a key at the begin and at the end, and much time in between.
const ENDS: u64 = 2_000;
const BETWEEN: u64 = 100_000;
const TOTAL: u64 = ENDS + BETWEEN + ENDS;
const KEYS: u64 = 500;
/// Keys that are written in between, and those that are read.
const WRITTEN: u64 = 10;
const READ: u64 = 20;
/// A record in between is 100 ms later than the one before: this is less than half of them, and far
/// more than a watermark can be behind.
const TTL: Duration = Duration::from_secs(4_000);

#[testudo::record]
#[derive(Debug)]
struct Use {
    key: u64,
    time: i64,
    is_write: u64,
}

fn one_use(n: u64) -> Use {
    let late = (ENDS + BETWEEN * 100).cast_signed();
    if n < ENDS {
        return Use { key: n % KEYS, time: n.cast_signed(), is_write: 1 };
    }
    let n = n - ENDS;
    if n >= BETWEEN {
        let n = n - BETWEEN;
        return Use { key: n % KEYS, time: late + n.cast_signed(), is_write: 1 };
    }
    let time = (ENDS + n * 100).cast_signed();
    if !n.is_multiple_of(50) {
        // Keys that come once.
        return Use { key: 1_000 + n, time, is_write: 1 };
    }
    let key = n / 50 % READ;
    Use { key, time, is_write: u64::from(key < WRITTEN) }
}

/// What a record finds of its key: in a value, a list, a map, and a value that reads renew.
#[testudo::record]
#[derive(Debug, PartialEq, Eq)]
struct Found {
    key: u64,
    value: u64,
    items: u64,
    entries: u64,
    renewed: u64,
}

/// Every write adds one to all states of its key, and says what it has found.
fn sessions(flow: &Flow, output: &str) {
    flow.source("uses", Generator::new(TOTAL, one_use))
        .parallelism(1)
        .event_time(Duration::ZERO, |one| one.time)
        .key_by(|one| one.key)
        .ttl_event_time(TTL)
        .process(
            |state| {
                let renewed = state.ttl(Ttl::event_time(TTL).renewed_by_reads()).value("renewed");
                (state.value("value"), state.list("list"), state.map("map"), renewed)
            },
            |(value, list, map, renewed), cx, one: &Use| {
                let found = Found {
                    key: one.key,
                    value: cx.get(value).copied().unwrap_or(0),
                    items: cx.items(list).count() as u64,
                    entries: cx.map_iter(map).count() as u64,
                    renewed: cx.get(renewed).copied().unwrap_or(0),
                };
                if one.is_write == 1 {
                    cx.set(value, &(found.value + 1));
                    cx.append(list, &found.items);
                    cx.map_put(map, &found.entries, &found.entries);
                    cx.set(renewed, &(found.renewed + 1));
                    if one.key < 1_000 {
                        cx.emit(found);
                    }
                }
            },
            |_, _, _| (),
        )
        .sink(
            "found",
            FileSink::new(
                output,
                Csv(|row: &Found| (row.key, row.value, row.items, row.entries, row.renewed)),
            ),
        );
}

/// What each key must find, in order: of a value, and of one that reads renew.
fn expected(key: u64) -> Vec<(u64, u64)> {
    let written = BETWEEN / 50 / READ;
    let anew = || (0..4).map(|n| (n, n));
    match key {
        0..WRITTEN => (0..8 + written).map(|n| (n, n)).collect(),
        WRITTEN..READ => anew().chain((0..4).map(|n| (n, n + 4))).collect(),
        _ => anew().chain(anew()).collect(),
    }
}

fn check(output: &Path) {
    let rows = std::fs::read_to_string(output).expect("the output is there");
    let mut found: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
    for line in rows.lines() {
        let fields: Vec<u64> = line.split(',').map(|n| n.parse().expect("a number")).collect();
        let [key, value, items, entries, renewed] = fields[..] else { panic!("{line:?}") };
        assert_eq!((items, entries), (value, value), "list and map of key {key}");
        found.entry(key).or_default().push((value, renewed));
    }
    assert_eq!(found.len() as u64, KEYS);
    for (key, values) in found {
        assert_eq!(values, expected(key), "key {key}");
    }
}

fn in_event_time_unused_keys_expire_and_used_ones_stay() {
    let folder = folder();
    let output = folder.path().join("out.csv");
    for workers in [1, 3] {
        run(sessions, &text(&output), settings(workers));
        check(&output);
    }
}

fn a_killed_worker_brings_nothing_back_and_loses_nothing() {
    let folder = folder();
    let output = folder.path().join("out.csv");
    let paced = Settings { rate: Some(20_000), ..settings(2) };
    let running = start(sessions, &text(&output), paced);
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 5);
    disturber.kill_randomly(12);
    assert!(disturber.kills > 0);
    finish(running).expect("the job survives");
    check(&output);
}

fn a_resumed_job_keeps_all_deadlines() {
    let folder = folder();
    let (output, checkpoints) = (folder.path().join("out.csv"), folder.path().join("checkpoints"));
    let job = |workers| {
        let dir = text(&checkpoints);
        let often = ["--checkpoint-interval", "20ms", "--rate", "70000", "--resume"];
        Cli::new("sessions", &text(&output))
            .workers(workers)
            .own_group()
            .args(["--checkpoint-dir", &dir])
            .args(often)
    };
    for (workers, bytes) in [(2, 1_000), (1, 25_000), (3, 30_000)] {
        let mut started = job(workers).start();
        wait_for("rows, or the end", || {
            let length = std::fs::metadata(&output).map_or(0, |meta| meta.len());
            let is_over = started.child.try_wait().expect("our own child").is_some();
            (is_over || length > bytes).then_some(())
        });
        std::thread::sleep(Duration::from_millis(50));
        if started.child.try_wait().expect("our own child").is_none() {
            started.signal_group(libc::SIGKILL);
        }
        started.wait();
    }
    let ended = job(2).run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    check(&output);
}

/// Forty numbers of two keys, each of which takes three milliseconds to look at.
fn slowly(flow: &Flow, parameters: &str) {
    let (what, output) = parameters.split_once(' ').expect("what, and an output");
    let hour = Duration::from_secs(3600);
    let (kind, ttl) = match what {
        "aggregate" => ("aggregate", Duration::from_millis(1)),
        "reduce" => ("reduce", Duration::from_millis(1)),
        _ => ("aggregate", hour),
    };
    let keyed = flow
        .source("numbers", Generator::new(40, |n| n))
        .key_by(|n| {
            std::thread::sleep(Duration::from_millis(3));
            n % 2
        })
        .ttl(ttl);
    let sink = FileSink::new(output, Csv(|n: &u64| (*n, 0)));
    match kind {
        "aggregate" => {
            keyed.aggregate(|| 0u64, |count, _| *count += 1, |_, count| *count).sink("out", sink);
        }
        _ => keyed.reduce(|a, b| a + b + 1_000).sink("out", sink),
    }
}

fn slow_rows(what: &str) -> Vec<u64> {
    let folder = folder();
    let output = folder.path().join("out.csv");
    run(slowly, &format!("{what} {}", text(&output)), settings(1));
    let rows = std::fs::read_to_string(output).expect("the output is there");
    let number = |line: &str| line.split_once(',').and_then(|(n, _)| n.parse().ok());
    let mut rows: Vec<u64> = rows.lines().map(|line| number(line).expect("a number")).collect();
    rows.sort_unstable();
    rows
}

fn an_aggregate_begins_anew_after_its_time_to_live() {
    assert_eq!(slow_rows("aggregate"), [1; 40]);
}

fn a_reduce_begins_anew_after_its_time_to_live() {
    assert_eq!(slow_rows("reduce"), (0..40).collect::<Vec<_>>());
}

fn nothing_expires_before_its_time() {
    let expected: Vec<u64> = (1..=20).flat_map(|n| [n, n]).collect();
    assert_eq!(slow_rows("for-an-hour"), expected);
}

/// A new key with every record, each of which lives for a short time.
fn fleeting(flow: &Flow, total: &str) {
    let total = total.parse().expect("a number");
    flow.source("numbers", Generator::new(total, |n| n))
        .parallelism(1)
        .event_time(Duration::ZERO, |n| n.cast_signed())
        .key_by(|n| *n)
        .ttl_event_time(Duration::from_secs(1))
        .aggregate(|| [0u64; 8], |sums, n| sums[0] += n, |_, sums| sums[0])
        .for_each(|_| ());
}

fn expired_keys_of_an_aggregate_give_their_memory_back() {
    let peak = |total: u64| {
        let running = start(fleeting, &total.to_string(), settings(1));
        let view = running.workers().expect("the job starts");
        let pid = view.workers[0].pid.load(testudo::shm::primitive::Ordering::Acquire);
        let mut most = 0;
        while !running.is_over() {
            most = most.max(common::process::status_kib(pid, "RssShmem").unwrap_or(0));
            std::thread::sleep(Duration::from_millis(2));
        }
        finish(running).expect("the job ends well");
        most
    };
    let kib = peak(300_000);
    // All keys at once are 64 bytes of value each, with much besides.
    assert!(kib < 30_000, "{kib} KiB of shared memory for keys that live for 1000 records");
}
