//! At the limits: records that do not fit, one record that becomes a million, consumers that cannot
//! keep up, rings that are full both ways, memory that is refused. Nothing hangs, nothing grows
//! without bound, and errors say what to do.

mod common;

use common::process::{Disturber, status_kib};
use common::program::Cli;
use common::{
    Jobs, finish, folder, run, run_failing, settings, sorted_lines, start, text, trials, try_run,
    wait_for,
};
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::shm::record::Record;
use testudo::sink::file::Lines;

const JOBS: Jobs =
    &[("growing", growing), ("growing_window", growing_window), ("growing_lists", growing_lists)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_text_larger_than_the_ring_is_an_error_that_says_what_to_do,
            a_plain_record_larger_than_the_ring_is_refused_before_the_job_starts,
            a_record_as_large_as_a_ring_takes_passes_and_a_larger_one_says_so,
            a_large_record_needs_no_ring_within_one_worker,
            r7_one_record_may_become_a_million,
            r7_one_record_may_become_a_million_for_a_single_key,
            r7_a_million_from_one_record_is_exact_across_kills,
            r7_texts_beyond_the_ring_are_spilled_and_exact,
            a_slow_consumer_costs_no_memory,
            r7_two_workers_that_are_full_toward_each_other_go_on,
            r7_two_full_workers_go_on_across_kills,
            r7_a_stream_forked_and_united_through_full_rings_goes_on,
            the_smallest_rings_carry_every_kind_of_exchange,
            r12_growth_beyond_free_memory_names_the_operator,
            r12_a_windows_growth_beyond_free_memory_names_the_operator,
            r12_a_lists_growth_beyond_free_memory_names_the_operator,
        ],
    )
}

const SMALL: usize = 4096;

fn small(workers: usize) -> Settings {
    Settings { ring_bytes: SMALL, ..settings(workers) }
}

type Text = <String as Record>::View;

/// Texts of a given length from one worker to another.
fn long_texts(flow: &Flow, parameters: &str) {
    let length: usize = parameters.parse().expect("a length");
    flow.source("texts", Generator::new(20, move |_| "x".repeat(length)))
        .parallelism(1)
        .round_robin()
        .name("far")
        .isolated()
        .parallelism(1)
        .for_each(move |text: &Text| assert_eq!(text.len(), length));
}

fn a_text_larger_than_the_ring_is_an_error_that_says_what_to_do() {
    let (message, code) = run_failing(long_texts, "10000", small(1));
    let advice = "raise --ring-bytes to at least 32768";
    assert_eq!(
        message,
        format!(
            "operator exchange to far+for_each (worker 0): a record of 10016 bytes does not fit \
             into a ring of 4096; \
             {advice}"
        )
    );
    assert_eq!(code, 1);
    let report = run(long_texts, "10000", Settings { ring_bytes: 32_768, ..settings(1) });
    assert_eq!(report.records_out, 20);
}

fn plain_giants(flow: &Flow, _: &str) {
    flow.source("giants", Generator::new(20, |n| [n; 1000])).round_robin().for_each(|_| ());
}

fn a_plain_record_larger_than_the_ring_is_refused_before_the_job_starts() {
    let (message, code) = run_failing(plain_giants, "", small(2));
    assert_eq!(
        message,
        "a record of 8000 bytes ([u64; 1000]) does not fit into a ring of 4096; raise \
         --ring-bytes to at least 8192"
    );
    assert_eq!(code, 3);
    let report = run(plain_giants, "", Settings { ring_bytes: 8192, ..settings(2) });
    assert_eq!(report.records_out, 20);
}

fn a_record_as_large_as_a_ring_takes_passes_and_a_larger_one_says_so() {
    let (mut passed, mut refused) = (0, 0);
    for length in (SMALL - 400..SMALL + 40).step_by(40) {
        match try_run(long_texts, &length.to_string(), small(1)) {
            Ok(report) => {
                assert_eq!(report.records_out, 20, "of {length} bytes");
                assert_eq!(refused, 0, "{length} bytes fit where less did not");
                passed += 1;
            }
            Err(error) => {
                assert!(
                    error.to_string().contains("raise --ring-bytes to at least 16384"),
                    "{error}"
                );
                refused += 1;
            }
        }
    }
    assert!(passed > 0 && refused > 0);
}

fn at_home(flow: &Flow, _: &str) {
    flow.source("texts", Generator::new(20, |_| "x".repeat(1_000_000)))
        .round_robin()
        .for_each(|text: &Text| assert_eq!(text.len(), 1_000_000));
}

fn a_large_record_needs_no_ring_within_one_worker() {
    let report = run(at_home, "", small(1));
    assert_eq!(report.records_out, 20);
}

const MILLION: u64 = 1_000_000;

/// Few records, each of which becomes `fan` ones; behind the exchange, their number and sum by key,
/// and how many came out of turn: what one producer sends for a key stays in order, spilled or not.
fn fanned(flow: &Flow, parameters: &str) {
    let fields: Vec<&str> = parameters.split(' ').collect();
    let number = |field: &str| field.parse::<u64>().expect("a number");
    let (fan, keys) = (number(fields[1]), number(fields[2]));
    flow.source("seeds", Generator::new(4, |n| n))
        .flat_map(move |seed| seed * fan..(seed + 1) * fan)
        .key_by(move |n| n % keys)
        .process(
            |state| state.value::<[u64; 5]>("sum"),
            move |sum, cx, n| {
                let mut row = cx.get(sum).copied().unwrap_or_default();
                if row[0] == 0 {
                    cx.set_timer(i64::MAX);
                }
                // Seeds are shared out in turn among one or two producers.
                let latest = 3 + (n / fan % 2) as usize;
                row[2] += u64::from(*n < row[latest]);
                row[latest] = *n;
                (row[0], row[1]) = (row[0] + 1, row[1] + n);
                cx.set(sum, &row);
            },
            |sum, cx, _| {
                let row = cx.get(sum).copied().unwrap_or_default();
                let key = *cx.key();
                cx.emit([key, row[0], row[1], row[2]]);
            },
        )
        .sink("out", FileSink::new(fields[0], Lines(|row: &[u64; 4]| format!("{row:?}"))));
}

/// The rows of `fanned`: for each key the numbers below four times `fan` that belong to it.
fn fanned_rows(fan: u64, keys: u64) -> Vec<String> {
    let row = |key: u64| {
        let numbers = (key..4 * fan).step_by(keys as usize);
        format!("{:?}", [key, numbers.clone().count() as u64, numbers.sum(), 0])
    };
    let mut rows: Vec<String> = (0..keys).map(row).collect();
    rows.sort_unstable();
    rows
}

fn r7_one_record_may_become_a_million() {
    let folder = folder();
    let output = folder.path().join("out");
    for workers in [1, 2] {
        let report = run(fanned, &format!("{} {MILLION} 1000", text(&output)), settings(workers));
        assert_eq!(report.records_in, 4);
        assert_eq!(sorted_lines(&output), fanned_rows(MILLION, 1000));
    }
}

fn r7_one_record_may_become_a_million_for_a_single_key() {
    let folder = folder();
    let output = folder.path().join("out");
    run(fanned, &format!("{} {MILLION} 1", text(&output)), small(2));
    assert_eq!(sorted_lines(&output), fanned_rows(MILLION, 1));
}

fn r7_a_million_from_one_record_is_exact_across_kills() {
    let folder = folder();
    let output = folder.path().join("out");
    let running = start(fanned, &format!("{} {MILLION} 300", text(&output)), small(2));
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 29);
    disturber.kill_randomly(12);
    let kills = disturber.kills;
    let report = finish(running).expect("the job survives");
    assert!(kills > 2 && report.restarts.len() <= kills, "{kills} kills");
    assert_eq!(sorted_lines(&output), fanned_rows(MILLION, 300));
}

fn fanned_texts(flow: &Flow, output: &str) {
    flow.source("seeds", Generator::new(6, |n| n))
        .flat_map(|seed| (0..20_000).map(|n| spelled(seed * 20_000 + n)).collect::<Vec<_>>())
        .round_robin()
        .sink("out", FileSink::new(output, Lines(|text: &Text| text.to_string())));
}

fn spelled(n: u64) -> String {
    format!("{n}{}", "-".repeat((n % 90) as usize))
}

fn r7_texts_beyond_the_ring_are_spilled_and_exact() {
    let folder = folder();
    let output = folder.path().join("out");
    let mut expected: Vec<String> = (0..120_000).map(spelled).collect();
    expected.sort_unstable();
    for kills in [0, 6] {
        let running = start(fanned_texts, &text(&output), small(2));
        let view = running.workers().expect("the job starts");
        Disturber::new(&running, &view, 31).kill_randomly(kills);
        finish(running).expect("the job survives");
        assert_eq!(sorted_lines(&output), expected);
    }
}

#[testudo::record]
struct Heavy {
    number: u64,
    load: [u64; 31],
}

/// The producer makes a record in some nanoseconds, the consumer takes some microseconds for it.
fn unequal(flow: &Flow, parameters: &str) {
    let total: u64 = parameters.parse().expect("a number");
    flow.source("fast", Generator::new(total, |n| Heavy { number: n, load: [n; 31] }))
        .parallelism(1)
        .round_robin()
        .parallelism(1)
        .isolated()
        .for_each(|record| {
            let until = testudo::time::now_ns() + 5000;
            while testudo::time::now_ns() < until {
                std::hint::black_box(record.number);
            }
        });
}

fn a_slow_consumer_costs_no_memory() {
    use testudo::shm::primitive::Ordering;
    let total = common::deep(2_000_000, 150_000);
    let running = start(unequal, &total.to_string(), settings(1));
    let view = running.workers().expect("the job starts");
    let mut highest = 0;
    while !running.is_over() {
        for header in &view.workers {
            let pid = header.pid.load(Ordering::Acquire);
            let resident = status_kib(pid, "VmRSS").unwrap_or(0);
            highest = highest.max(resident);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let report = finish(running).expect("the job ends well");
    assert_eq!(report.records_out, total);
    // All records together have 37 MiB or more; on the way are never more than a ring and a batch.
    assert!(highest > 0 && highest < 20 << 10, "a worker had {highest} KiB");
}

/// Records that cross before each becomes ten: with rings of a page every few of them are a wait.
const CROSSING: u64 = 20_000;

/// Both workers send everything to each other, twice, and each record becomes several on the way.
fn crossing(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(CROSSING, |n| n))
        .flat_map(|n| n * 10..(n + 1) * 10)
        .key_by(|n| *n)
        .stream()
        .map(|n| n + 1)
        .broadcast()
        .key_by(|n| n / 2)
        .reduce(|_, new| *new)
        .round_robin()
        .sink("out", FileSink::folder(output, "txt", Lines(|n: &u64| *n)));
}

fn crossed(workers: u64) -> Vec<String> {
    let mut rows: Vec<String> =
        (1..=10 * CROSSING).flat_map(|n| vec![n.to_string(); workers as usize]).collect();
    rows.sort_unstable();
    rows
}

fn r7_two_workers_that_are_full_toward_each_other_go_on() {
    let folder = folder();
    let output = folder.path().join("out");
    for workers in [2, 3] {
        run(crossing, &text(&output), small(workers));
        assert!(common::sorted_parts(&output) == crossed(workers as u64), "{workers} workers");
    }
}

fn r7_two_full_workers_go_on_across_kills() {
    let folder = folder();
    let output = folder.path().join("out");
    let running = start(crossing, &text(&output), small(2));
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 37);
    disturber.kill_randomly(10);
    assert!(disturber.kills > 2);
    finish(running).expect("the job survives");
    assert!(common::sorted_parts(&output) == crossed(2));
}

/// One branch is held up by an exchange, the other is not.
fn around(flow: &Flow, output: &str) {
    let (left, right) = flow.source("numbers", Generator::new(50_000, |n| n)).fork();
    let slow = left.broadcast().flat_map(|n| vec![2 * n; 2]);
    slow.union(right.map(|n| 2 * n + 1))
        .key_by(|n| *n)
        .stream()
        .sink("out", FileSink::folder(output, "txt", Lines(|n: &u64| *n)));
}

fn r7_a_stream_forked_and_united_through_full_rings_goes_on() {
    let folder = folder();
    let output = folder.path().join("out");
    run(around, &text(&output), small(2));
    let row = |n: u64| vec![n.to_string(); if n.is_multiple_of(2) { 4 } else { 1 }];
    let mut expected: Vec<String> = (0..100_000).flat_map(row).collect();
    expected.sort_unstable();
    assert!(common::sorted_parts(&output) == expected);
}

fn many_kinds(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(20_000, |n| n))
        .round_robin()
        .map(|n| n.to_string())
        .key_by(|text| text.len() as u64)
        .stream()
        .round_robin()
        .gather()
        .round_robin()
        .sink("out", FileSink::new(output, Lines(|text: &Text| text.to_string())));
}

fn the_smallest_rings_carry_every_kind_of_exchange() {
    let folder = folder();
    let output = folder.path().join("out");
    let mut expected: Vec<String> = (0..20_000).map(|n: u64| n.to_string()).collect();
    expected.sort_unstable();
    for workers in [1, 2, 4] {
        run(many_kinds, &text(&output), small(workers));
        assert_eq!(sorted_lines(&output), expected, "{workers} workers");
    }
}

/// Records of the jobs that grow, at half a KiB each: a job that nobody refuses ends by itself, far
/// below what a test may take (its memory is held by its launching process, so that no end of a
/// worker would free it), and far above what makes the gauge look again.
const GROWTH: u64 = 400_000;

/// State that grows with every record.
fn growing(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(GROWTH, |n| n))
        .key_by(|n| *n)
        .aggregate(|| [0u64; 64], |sums, n| sums[0] += n, |key, _| *key)
        .name("hoard")
        .for_each(|_| ());
}

fn growing_window(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(GROWTH, |n| n))
        .key_by(|n| *n)
        .window(tumbling(Duration::from_secs(1)), |_| 0)
        .aggregate(|| [0u64; 64], |sums, n| sums[0] += n, |_, _| (), |key, _, _| *key)
        .name("hoard")
        .for_each(|_| ());
}

fn growing_lists(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(GROWTH, |n| n))
        .key_by(|n| n % 50)
        .process(
            |state| state.list::<[u64; 64]>("all"),
            |all, cx, n| {
                cx.append(all, &[*n; 64]);
                cx.emit(*n);
            },
            |_, _, _| (),
        )
        .name("hoard")
        .for_each(|_| ());
}

/// Runs a job that grows under a control group that is full: in a mount namespace of its own, the
/// control groups that it sees are files of ours. A real group would need rights over the
/// machine's, and would answer a mistake here by killing; whether the figures of real ones are read
/// well is for the state crate's tests.
fn refused_growth(job: &str) {
    let folder = folder();
    let write = |name: &str, bytes: u64| {
        // Never half written: a worker would take it for no limit.
        let new = folder.path().join("new");
        std::fs::write(&new, format!("{bytes}\n")).expect("room for a file");
        std::fs::rename(new, folder.path().join(name)).expect("our own file");
    };
    // A worker budgets a sixteenth of what is free beyond the reserve, 6 MiB; then it looks again.
    write("memory.max", 256 << 20);
    write("memory.current", 100 << 20);
    let mount =
        format!("mount --bind {} /sys/fs/cgroup || exit 99; exec \"$@\"", text(folder.path()));
    let cli = Cli::new(job, "").workers(2).args(["--rate", "50000"]).under_unshared(&mount);
    let mut started = cli.start();
    let begun = wait_for("state, or an end", || {
        let is_over = started.child.try_wait().expect("our own child").is_some();
        let grown = |pid: u32| status_kib(pid, "RssShmem").is_some_and(|kib| kib > 2048);
        let has_grown = common::process::workers_of(started.pid()).into_iter().any(grown);
        (is_over || has_grown).then_some(has_grown)
    });
    write("memory.current", 256 << 20);
    let ended = started.wait();
    if !begun && (ended.code == Some(99) || ended.err.contains("unshare")) {
        eprintln!("skipped: no mount namespace can be had here ({})", ended.err.trim());
        return;
    }
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    let (_, message) = ended.err.split_once(": ").expect("a message");
    assert!(message.starts_with("operator hoard (worker "), "{message}");
    assert!(message.contains("): its state wants "), "{message}");
    assert!(message.contains("/sys/fs/cgroup/") && message.contains("memory.max"), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

fn r12_growth_beyond_free_memory_names_the_operator() {
    refused_growth("growing");
}

fn r12_a_windows_growth_beyond_free_memory_names_the_operator() {
    refused_growth("growing_window");
}

fn r12_a_lists_growth_beyond_free_memory_names_the_operator() {
    refused_growth("growing_lists");
}
