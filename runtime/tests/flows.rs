//! Every operator and every exchange against a model: the same result with one, two and three
//! workers, and when workers are killed at awkward points on the way.

mod common;

use common::program::{Cli, Ended};
use common::{Jobs, folder, run, run_failing, scramble, settings, sorted_lines, text, trials};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::shm::record::Record;
use testudo::sink::file::{Csv, Lines};
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::testing::KILL_AT;

const JOBS: Jobs = &[
    ("stateless", stateless),
    ("refusing", refusing),
    ("sides", sides),
    ("joined", joined),
    ("copied", copied),
    ("forked", forked),
    ("shared", shared),
    ("gathered", gathered),
    ("reduced", reduced),
    ("spelled", spelled),
    ("described", described),
    ("narrow", narrow),
    ("stateful", stateful),
    ("counted", counted),
    ("diamond", diamond),
    ("fickle", fickle),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            map_filter_and_flat_map_do_what_they_say,
            try_map_sends_what_it_refuses_to_the_side_and_counts_it,
            split_feeds_both_outputs,
            union_has_all_of_both,
            broadcast_reaches_every_subtask,
            fork_gives_each_branch_its_copy,
            round_robin_shares_evenly_and_loses_nothing,
            gather_keeps_the_order_of_a_single_producer,
            reduce_emits_every_running_result,
            aggregates_may_have_text_for_keys_and_values,
            archived_records_travel_through_exchanges_whole,
            each_operator_may_have_its_own_parallelism,
            keyed_values_lists_and_maps_are_those_of_a_model,
            user_counters_count_what_was_committed,
            a_stream_that_was_forked_may_be_united_again,
            more_workers_than_key_groups_leave_some_idle,
            one_key_group_is_enough,
            a_limit_is_exact_whatever_the_number_of_workers,
            a_limit_of_nothing_reads_nothing,
            a_limit_is_divided_among_the_readers_of_a_source_that_knows_none,
            r6_records_are_not_held_back_until_more_come,
            settings_for_speed_change_no_result,
            more_processes_than_a_job_may_have_are_refused,
            r13_a_source_of_the_users_goes_on_where_it_stood,
            r9_records_are_taken_unvalidated_where_the_job_trusts_them,
            a_stage_wider_than_the_job_is_refused,
            a_stream_that_goes_nowhere_is_refused,
            two_operators_with_one_uid_are_refused,
            an_empty_flow_is_refused,
            a_flow_that_differs_between_processes_is_refused,
        ],
    )
}

const TOTAL: u64 = 20_000;

/// What a closure sees of a `String`.
type Text = <String as Record>::View;

/// Lives of both workers that end at awkward points, after a few steps each.
const KILLS: &str = "0:12:3:1,0:9:2:3,0:10:1:2,1:11:2:4,1:8:1:3";

/// Where the output files of a job are, as its parameters name them.
fn outputs(parameters: &str) -> Vec<&str> {
    parameters.split(' ').collect()
}

/// Runs a job with one to three workers, then with two that are killed, and has `check` look at the
/// files each time.
fn each_way(job: &str, files: usize, check: impl Fn(&[PathBuf], u64, &Ended)) {
    for (workers, kills) in [(1, None), (2, None), (3, None), (2, Some(KILLS))] {
        let folder = folder();
        let paths: Vec<PathBuf> =
            (0..files).map(|n| folder.path().join(format!("out-{n}"))).collect();
        let parameters: Vec<String> = paths.iter().map(|path| text(path)).collect();
        let mut cli =
            Cli::new(job, &parameters.join(" ")).workers(workers).args(["--report", "json"]);
        if let Some(kills) = kills {
            cli = cli.env(KILL_AT, kills);
        }
        let ended = cli.run();
        let restarts = ended.restarts();
        assert_eq!(kills.is_some(), restarts > 1, "{restarts} deaths: {}", ended.err);
        check(&paths, workers as u64, &ended);
    }
}

/// The numbers from 0 on, and those that `keep` keeps, sorted as text, as the output files are.
fn lines(numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    let mut lines: Vec<String> = numbers.into_iter().map(|n| n.to_string()).collect();
    lines.sort_unstable();
    lines
}

fn count() -> Generator<u64, impl Fn(u64) -> u64> {
    Generator::new(TOTAL, |n| n)
}

fn to(path: &str) -> FileSink<Lines<fn(&u64) -> u64>> {
    FileSink::new(path, Lines(|n: &u64| *n))
}

fn stateless(flow: &Flow, output: &str) {
    flow.source("numbers", count())
        .map(|n| n * 3)
        .filter(|n| n % 2 == 0)
        .flat_map(|n| vec![*n; (n % 4) as usize])
        .map(|n| n + 1)
        .sink("out", to(output));
}

fn map_filter_and_flat_map_do_what_they_say() {
    let kept = (0..TOTAL).map(|n| n * 3).filter(|n| n % 2 == 0);
    let expected = lines(kept.flat_map(|n| vec![n + 1; (n % 4) as usize]));
    each_way("stateless", 1, |files, _, ended| {
        assert_eq!(sorted_lines(&files[0]), expected);
        assert_eq!(ended.report()["records_in"], TOTAL);
        assert_eq!(ended.report()["records_out"], expected.len());
    });
}

fn refusing(flow: &Flow, parameters: &str) {
    let files = outputs(parameters);
    let (good, bad) = flow.source("numbers", count()).try_map(|n| {
        if n % 7 == 0 { Err(format!("{n} is a multiple of seven")) } else { Ok(n + 1) }
    });
    good.sink("good", to(files[0]));
    bad.sink("bad", FileSink::new(files[1], Lines(|why: &Text| why.to_string())));
}

fn try_map_sends_what_it_refuses_to_the_side_and_counts_it() {
    let refused = TOTAL.div_ceil(7);
    let mut sevens: Vec<String> =
        (0..refused).map(|n| format!("{} is a multiple of seven", n * 7)).collect();
    sevens.sort_unstable();
    each_way("refusing", 2, |files, _, ended| {
        assert_eq!(sorted_lines(&files[0]), lines((0..TOTAL).filter(|n| n % 7 > 0).map(|n| n + 1)));
        assert_eq!(sorted_lines(&files[1]), sevens);
        assert_eq!(ended.report()["rejected"], refused);
        assert_eq!(ended.report()["records_out"], TOTAL);
    });
}

fn sides(flow: &Flow, parameters: &str) {
    let files = outputs(parameters);
    let (main, side) = flow.source("numbers", count()).split(
        |n, main: &mut Emit<'_, u64>, side: &mut Emit<'_, u64>| {
            (0..n % 3).for_each(|_| main.emit(*n));
            (0..n % 5).for_each(|_| side.emit(*n));
        },
    );
    main.sink("main", to(files[0]));
    side.sink("side", to(files[1]));
}

fn split_feeds_both_outputs() {
    let times = |by: u64| lines((0..TOTAL).flat_map(|n| vec![n; (n % by) as usize]));
    each_way("sides", 2, |files, _, _| {
        assert_eq!(sorted_lines(&files[0]), times(3));
        assert_eq!(sorted_lines(&files[1]), times(5));
    });
}

fn joined(flow: &Flow, output: &str) {
    let even = flow.source("even", Generator::new(TOTAL / 2, |n| 2 * n));
    let odd = flow.source("odd", Generator::new(TOTAL / 2, |n| 2 * n + 1)).parallelism(1);
    even.union(odd).sink("out", to(output));
}

fn union_has_all_of_both() {
    each_way("joined", 1, |files, _, ended| {
        assert_eq!(sorted_lines(&files[0]), lines(0..TOTAL));
        assert_eq!(ended.report()["records_in"], TOTAL);
    });
}

fn copied(flow: &Flow, output: &str) {
    flow.source("numbers", count()).broadcast().sink("out", to(output));
}

fn broadcast_reaches_every_subtask() {
    each_way("copied", 1, |files, workers, _| {
        let expected = lines((0..TOTAL).flat_map(|n| vec![n; workers as usize]));
        assert_eq!(sorted_lines(&files[0]), expected);
    });
}

fn forked(flow: &Flow, parameters: &str) {
    let files = outputs(parameters);
    let (left, right) = flow.source("numbers", count()).fork();
    left.filter(|n| n % 2 == 0).sink("left", to(files[0]));
    right.map(|n| n + 1).sink("right", to(files[1]));
}

fn fork_gives_each_branch_its_copy() {
    each_way("forked", 2, |files, _, _| {
        assert_eq!(sorted_lines(&files[0]), lines((0..TOTAL).step_by(2)));
        assert_eq!(sorted_lines(&files[1]), lines(1..=TOTAL));
    });
}

fn shared(flow: &Flow, parameters: &str) {
    let files = outputs(parameters);
    flow.source("numbers", count())
        .parallelism(1)
        .round_robin()
        .sink("parts", FileSink::folder(files[0], "txt", Lines(|n: &u64| *n)));
}

fn round_robin_shares_evenly_and_loses_nothing() {
    each_way("shared", 1, |files, workers, ended| {
        assert_eq!(common::sorted_parts(&files[0]), lines(0..TOTAL));
        if ended.restarts() == 0 {
            for part in 0..workers {
                let rows = sorted_lines(&files[0].join(format!("part-{part:03}.txt"))).len() as u64;
                assert!(rows.abs_diff(TOTAL / workers) <= 1, "{rows} rows in part {part}");
            }
        }
    });
}

fn gathered(flow: &Flow, output: &str) {
    flow.source("numbers", count())
        .parallelism(1)
        .round_robin()
        .parallelism(1)
        .gather()
        .sink("out", to(output));
}

fn gather_keeps_the_order_of_a_single_producer() {
    each_way("gathered", 1, |files, _, _| {
        let text = std::fs::read_to_string(&files[0]).expect("the output is there");
        assert!(text.lines().map(|line| line.parse::<u64>().expect("a number")).eq(0..TOTAL));
    });
}

#[testudo::record]
#[derive(Debug)]
struct Sum {
    key: u64,
    sum: u64,
}

fn reduced(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(TOTAL, |n| Sum { key: n % 300, sum: n }))
        .key_by(|record| record.key)
        .reduce(|sum, record| Sum { key: record.key, sum: sum.sum + record.sum })
        .sink("out", FileSink::new(output, Csv(|record: &Sum| (record.key, record.sum))));
}

fn reduce_emits_every_running_result() {
    let mut sums = HashMap::new();
    let running = (0..TOTAL).map(|n| {
        let sum: &mut u64 = sums.entry(n % 300).or_default();
        *sum += n;
        format!("{},{sum}", n % 300)
    });
    let mut expected: Vec<String> = running.collect();
    expected.sort_unstable();
    each_way("reduced", 1, |files, _, _| assert_eq!(sorted_lines(&files[0]), expected));
}

const WORDS: [&str; 6] =
    ["", "a", "söt", "a longer word than fits into a slot of a table", "\u{1F422}", "z"];

fn spelled(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(TOTAL / 4, |n| n))
        .key_by(|n| format!("{}{}", WORDS[(n % 6) as usize], n % 60))
        .aggregate(
            String::new,
            |word, n| {
                // Grows, shrinks and starts again, so that its place in memory has to change.
                if word.chars().count() > 40 {
                    word.clear();
                }
                word.push_str(WORDS[(n / 60 % 6) as usize]);
            },
            |key, word| format!("{key}|{word}"),
        )
        .sink("out", FileSink::new(output, Lines(|line: &Text| line.to_string())));
}

fn aggregates_may_have_text_for_keys_and_values() {
    let mut words: HashMap<String, String> = HashMap::new();
    let mut expected = Vec::new();
    for n in 0..TOTAL / 4 {
        let key = format!("{}{}", WORDS[(n % 6) as usize], n % 60);
        let word = words.entry(key.clone()).or_default();
        if word.chars().count() > 40 {
            word.clear();
        }
        word.push_str(WORDS[(n / 60 % 6) as usize]);
        expected.push(format!("{key}|{word}"));
    }
    expected.sort_unstable();
    each_way("spelled", 1, |files, _, _| assert_eq!(sorted_lines(&files[0]), expected));
}

#[testudo::record(archived)]
#[derive(Debug, PartialEq)]
struct Parcel {
    id: u64,
    to: String,
    tags: Vec<String>,
    weight: Option<u64>,
}

fn parcel(n: u64) -> Parcel {
    let tags = (0..n % 4).map(|tag| format!("tag {tag} of {n}")).collect();
    let weight = n.is_multiple_of(3).then_some(scramble(n));
    Parcel { id: n, to: "x".repeat((scramble(n) % 200) as usize), tags, weight }
}

fn parcel_line(parcel: &Parcel) -> String {
    format!("{} {} {:?} {:?}", parcel.id, parcel.to, parcel.tags, parcel.weight)
}

/// Through every kind of exchange, and state, as an archive.
fn described(flow: &Flow, output: &str) {
    flow.source("parcels", Generator::new(TOTAL / 4, parcel))
        .round_robin()
        .key_by(|parcel| parcel.to.to_string())
        .reduce(|_, new| <Parcel as Record>::to_owned(new))
        .union(flow.source("none", Generator::new(0, parcel)))
        .sink(
            "out",
            FileSink::new(
                output,
                Lines(|view: &<Parcel as Record>::View| {
                    parcel_line(&<Parcel as Record>::to_owned(view))
                }),
            ),
        );
}

fn archived_records_travel_through_exchanges_whole() {
    let mut expected: Vec<String> = (0..TOTAL / 4).map(|n| parcel_line(&parcel(n))).collect();
    expected.sort_unstable();
    each_way("described", 1, |files, _, _| assert_eq!(sorted_lines(&files[0]), expected));
}

fn narrow(flow: &Flow, output: &str) {
    let wide = flow.workers();
    flow.source("numbers", count())
        .parallelism(1)
        .round_robin()
        .map(|n| n + 1)
        .parallelism(wide)
        .key_by(|n| *n)
        .stream()
        .map(|n| n * 2)
        .parallelism(wide.div_ceil(2))
        .round_robin()
        .sink("out", to(output));
}

fn each_operator_may_have_its_own_parallelism() {
    each_way("narrow", 1, |files, _, _| {
        assert_eq!(sorted_lines(&files[0]), lines((1..=TOTAL).map(|n| n * 2)));
    });
}

const STATEFUL_KEYS: u64 = 30;

/// What a record does to its key's state, from its number alone.
#[derive(Debug, Clone, Copy)]
enum Act {
    Set(u64),
    Clear,
    Append(u64),
    ClearList,
    Put(u64, u64),
    Remove(u64),
    Tell,
}

fn act(n: u64) -> Act {
    let random = scramble(n);
    match random % 64 {
        0..10 => Act::Set(n),
        10..12 => Act::Clear,
        12..30 => Act::Append(n),
        30 => Act::ClearList,
        31..48 => Act::Put(random >> 8 & 15, n),
        48..56 => Act::Remove(random >> 8 & 15),
        _ => Act::Tell,
    }
}

fn told(key: u64, value: Option<u64>, list: &[u64], map: &BTreeMap<u64, String>) -> String {
    format!("{key} {value:?} {list:?} {map:?}")
}

fn stateful(flow: &Flow, output: &str) {
    flow.source("numbers", count())
        .key_by(|n| n % STATEFUL_KEYS)
        .process(
            |state| {
                (
                    state.value::<u64>("value"),
                    state.list::<u64>("list"),
                    state.map::<u64, String>("map"),
                )
            },
            |(value, list, map), cx, n| match act(*n) {
                Act::Set(to) => cx.set(value, &to),
                Act::Clear => cx.clear(value),
                Act::Append(item) => cx.append(list, &item),
                Act::ClearList => cx.clear_list(list),
                Act::Put(key, to) => cx.map_put(map, &key, &"v".repeat((to % 50) as usize)),
                Act::Remove(key) => cx.map_remove(map, &key),
                Act::Tell => {
                    let items: Vec<u64> = cx.items(list).copied().collect();
                    let entries: BTreeMap<u64, String> =
                        cx.map_iter(map).map(|(key, text)| (*key, text.to_string())).collect();
                    for (key, text) in &entries {
                        let found = cx.map_get(map, key).map(ToString::to_string);
                        assert_eq!(found.as_ref(), Some(text));
                    }
                    cx.emit(told(*cx.key(), cx.get(value).copied(), &items, &entries));
                }
            },
            |_, _, _| (),
        )
        .sink("out", FileSink::new(output, Lines(|line: &Text| line.to_string())));
}

fn keyed_values_lists_and_maps_are_those_of_a_model() {
    let mut expected = Vec::new();
    for key in 0..STATEFUL_KEYS {
        let (mut value, mut list, mut map) = (None, Vec::new(), BTreeMap::new());
        for n in (key..TOTAL).step_by(STATEFUL_KEYS as usize) {
            match act(n) {
                Act::Set(to) => value = Some(to),
                Act::Clear => value = None,
                Act::Append(item) => list.push(item),
                Act::ClearList => list.clear(),
                Act::Put(key, to) => drop(map.insert(key, "v".repeat((to % 50) as usize))),
                Act::Remove(key) => drop(map.remove(&key)),
                Act::Tell => expected.push(told(key, value, &list, &map)),
            }
        }
    }
    expected.sort_unstable();
    each_way("stateful", 1, |files, _, _| assert_eq!(sorted_lines(&files[0]), expected));
}

fn counted(flow: &Flow, output: &str) {
    let (read, kept, sum) = (flow.counter("read"), flow.counter("kept"), flow.counter("sum"));
    flow.source("numbers", count())
        .map(move |n| {
            read.add(1);
            *n
        })
        .key_by(|n| *n)
        .stream()
        .filter(move |n| {
            let is_kept = n % 3 == 0;
            kept.add(u64::from(is_kept));
            is_kept
        })
        .map(move |n| {
            sum.add(*n);
            *n
        })
        .sink("out", to(output));
}

fn user_counters_count_what_was_committed() {
    each_way("counted", 1, |_, _, ended| {
        let counters = &ended.report()["counters"];
        assert_eq!(counters["read"], TOTAL);
        assert_eq!(counters["kept"], TOTAL.div_ceil(3));
        assert_eq!(counters["sum"], (0..TOTAL).step_by(3).sum::<u64>());
    });
}

fn diamond(flow: &Flow, output: &str) {
    let (left, right) = flow.source("numbers", count()).fork();
    left.map(|n| 2 * n).union(right.round_robin().map(|n| 2 * n + 1)).sink("out", to(output));
}

fn a_stream_that_was_forked_may_be_united_again() {
    each_way("diamond", 1, |files, _, _| {
        assert_eq!(sorted_lines(&files[0]), lines(0..2 * TOTAL));
    });
}

fn more_workers_than_key_groups_leave_some_idle() {
    let folder = folder();
    let output = folder.path().join("out");
    let few = Settings { key_groups: 2, ..settings(5) };
    run(reduced, &text(&output), few);
    assert_eq!(sorted_lines(&output).len() as u64, TOTAL);
}

fn one_key_group_is_enough() {
    let folder = folder();
    let output = folder.path().join("out");
    run(reduced, &text(&output), Settings { key_groups: 1, ..settings(3) });
    assert_eq!(sorted_lines(&output).len() as u64, TOTAL);
}

fn endless(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).sink("out", to(output));
}

fn a_limit_is_exact_whatever_the_number_of_workers() {
    let folder = folder();
    let output = folder.path().join("out");
    for workers in 1..=4 {
        for limit in [1, 2, 3, 1000, 12_345] {
            let report =
                run(endless, &text(&output), Settings { limit: Some(limit), ..settings(workers) });
            assert_eq!(report.records_in, limit);
            assert_eq!(sorted_lines(&output), lines(0..limit), "{workers} workers");
        }
    }
}

fn a_limit_of_nothing_reads_nothing() {
    let folder = folder();
    let output = folder.path().join("out");
    let report = run(endless, &text(&output), Settings { limit: Some(0), ..settings(2) });
    assert_eq!((report.records_in, report.records_out), (0, 0));
    assert_eq!(sorted_lines(&output), Vec::<String>::new());
}

/// Counts up from its subtask's index; pauses now and then; knows nothing of limits.
struct Ticks {
    end: u64,
}

struct TickReader {
    end: u64,
    step: u64,
    calls: u64,
}

impl Source for Ticks {
    type Out = u64;
    type Position = u64;
    type Reader = TickReader;

    fn start(&self, subtask: Subtask) -> u64 {
        subtask.index as u64
    }

    fn open(&self, subtask: Subtask, from: &u64) -> Result<TickReader, String> {
        assert_eq!(from % subtask.count as u64, subtask.index as u64);
        Ok(TickReader { end: self.end, step: subtask.count as u64, calls: 0 })
    }
}

impl Reader<u64, u64> for TickReader {
    fn read(
        &mut self,
        at: &mut u64,
        max: usize,
        out: &mut impl Collect<u64>,
    ) -> Result<Progress, String> {
        self.calls += 1;
        if self.calls.is_multiple_of(5) {
            return Ok(Progress::Idle { until_ns: testudo::time::now_ns() + 100_000 });
        }
        for _ in 0..max.min(100) {
            if *at >= self.end {
                return Ok(Progress::End);
            }
            out.emit(*at);
            *at += self.step;
        }
        Ok(Progress::More)
    }
}

fn ticking(flow: &Flow, output: &str) {
    flow.source("ticks", Ticks { end: 50_000 }).sink("out", to(output));
}

fn a_limit_is_divided_among_the_readers_of_a_source_that_knows_none() {
    let folder = folder();
    let output = folder.path().join("out");
    for (workers, limit) in [(1, 777), (2, 777), (3, 1000), (3, 2)] {
        let report =
            run(ticking, &text(&output), Settings { limit: Some(limit), ..settings(workers) });
        assert_eq!(report.records_in, limit);
        assert_eq!(sorted_lines(&output), lines(0..limit), "{workers} workers");
    }
}

/// Three records, and then nothing for ever.
struct Three;

impl Source for Three {
    type Out = u64;
    type Position = u64;
    type Reader = Self;

    fn start(&self, _: Subtask) -> u64 {
        0
    }

    fn open(&self, _: Subtask, _: &u64) -> Result<Self, String> {
        Ok(Self)
    }
}

impl Reader<u64, u64> for Three {
    fn read(
        &mut self,
        at: &mut u64,
        _: usize,
        out: &mut impl Collect<u64>,
    ) -> Result<Progress, String> {
        while *at < 3 {
            out.emit(*at);
            *at += 1;
        }
        Ok(Progress::Idle { until_ns: u64::MAX })
    }
}

fn silent(flow: &Flow, output: &str) {
    flow.source("three", Three)
        .parallelism(1)
        .key_by(|n| *n)
        .aggregate(|| 0u64, |count, _| *count += 1, |n, _| *n)
        .round_robin()
        .map(|n| *n)
        .sink("out", to(output));
}

fn r6_records_are_not_held_back_until_more_come() {
    let folder = folder();
    let output = folder.path().join("out");
    let running = common::start(silent, &text(&output), settings(3));
    common::wait_for("all three records", || {
        let found = std::fs::read_to_string(&output).unwrap_or_default();
        (found.lines().count() == 3).then_some(())
    });
    running.stop();
    let report = common::finish(running).expect("a drained job ended well");
    assert_eq!(report.records_in, 3);
    assert_eq!(sorted_lines(&output), lines(0..3));
}

fn settings_for_speed_change_no_result() {
    let folder = folder();
    let output = folder.path().join("out");
    let core = testudo::config::usable_cores()[0];
    let all = [
        Settings { idle: testudo::config::Idle::Spin, ..settings(2) },
        Settings { huge_pages: true, ..settings(2) },
        Settings { cores: vec![core], ..settings(2) },
        Settings { key_groups: 128, ring_bytes: 4 << 20, ..settings(2) },
        Settings { key_groups: 1000, ring_bytes: 4096, ..settings(2) },
    ];
    let mut first = None;
    for settings in all {
        run(reduced, &text(&output), settings);
        let rows = sorted_lines(&output);
        assert!(*first.get_or_insert_with(|| rows.clone()) == rows);
    }
}

fn crowded(flow: &Flow, _: &str) {
    flow.source("numbers", count()).isolated().parallelism(100).for_each(|_| ());
}

fn more_processes_than_a_job_may_have_are_refused() {
    let (message, code) = run_failing(crowded, "", settings(21));
    assert_eq!(
        message,
        "121 worker processes are more than the 120 that a job may have; lower --workers"
    );
    assert_eq!(code, 3);
}

fn r13_a_source_of_the_users_goes_on_where_it_stood() {
    let folder = folder();
    let output = folder.path().join("out");
    let running = common::start(ticking, &text(&output), settings(2));
    let view = running.workers().expect("the job starts");
    let mut disturber = common::process::Disturber::new(&running, &view, 11);
    disturber.kill_randomly(6);
    let report = common::finish(running).expect("the job survives");
    assert_eq!(report.records_in, 50_000);
    assert_eq!(sorted_lines(&output), lines(0..50_000));
}

fn r9_records_are_taken_unvalidated_where_the_job_trusts_them() {
    let folder = folder();
    let output = folder.path().join("out");
    run(described, &text(&output), Settings { trust_records: true, ..settings(2) });
    let mut expected: Vec<String> = (0..TOTAL / 4).map(|n| parcel_line(&parcel(n))).collect();
    expected.sort_unstable();
    assert_eq!(sorted_lines(&output), expected);
}

fn too_wide(flow: &Flow, _: &str) {
    flow.source("numbers", count()).map(|n| *n).name("widen").parallelism(3).for_each(|_| ());
}

fn a_stage_wider_than_the_job_is_refused() {
    let (message, code) = run_failing(too_wide, "", settings(2));
    assert_eq!(
        message,
        "stage numbers+widen+for_each has parallelism 3, but the job has 2 workers: lower it, \
         isolate the stage, or \
         raise --workers"
    );
    assert_eq!(code, 3);
}

fn nowhere(flow: &Flow, _: &str) {
    let _ = flow.source("numbers", count()).map(|n| *n);
}

fn a_stream_that_goes_nowhere_is_refused() {
    let (message, code) = run_failing(nowhere, "", settings(1));
    assert_eq!(
        message,
        "the stream behind numbers+map goes nowhere: end it with sink, for_each or print"
    );
    assert_eq!(code, 3);
}

fn twins(flow: &Flow, _: &str) {
    flow.source("one", count()).uid("same").for_each(|_| ());
    flow.source("two", count()).uid("same").for_each(|_| ());
}

fn two_operators_with_one_uid_are_refused() {
    let (message, code) = run_failing(twins, "", settings(1));
    assert_eq!((message.as_str(), code), ("two operators have the uid same", 3));
}

fn an_empty_flow_is_refused() {
    let (message, code) = run_failing(|_, _| (), "", settings(1));
    assert_eq!((message.as_str(), code), ("the flow is empty: add a source", 3));
}

/// Depends on more than its options.
fn fickle(flow: &Flow, _: &str) {
    flow.source(&format!("source-{}", std::process::id()), count()).for_each(|_| ());
}

fn a_flow_that_differs_between_processes_is_refused() {
    let ended = Cli::new("fickle", "").workers(1).run();
    assert_eq!(ended.code, Some(3), "{}", ended.err);
    let lines: Vec<&str> = ended.err.lines().collect();
    assert_eq!(lines.len(), 2, "{}", ended.err);
    assert!(lines[0].starts_with("testudo-w0: this process plans another job ("), "{}", ended.err);
    assert!(lines[0].ends_with("): the flow must depend on the options alone"), "{}", ended.err);
    assert_eq!(lines[1], "job: worker 0 could not begin; it says why above");
}
