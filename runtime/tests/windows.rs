//! Event time against brute force: every window, every timer and every late record is computed a
//! second time from the plain list of inputs, whatever the order in which they came, the number of
//! workers, and who was killed.

mod common;

use common::program::{Cli, Ended};
use common::{Jobs, folder, scramble, sorted_lines, text, trials};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::shm::record::Record;
use testudo::sink::file::{Csv, Lines};
use testudo::testing::KILL_AT;

const JOBS: Jobs = &[
    ("keyed", keyed),
    ("overall", overall),
    ("chained", chained),
    ("texts", texts),
    ("late", late),
    ("passed", passed),
    ("passed_overall", passed_overall),
    ("apart", apart),
    ("timers", timers),
    ("timers_moved", timers_moved),
    ("watermarks", watermarks),
    ("extreme", extreme),
    ("extreme_overall", extreme_overall),
    ("extreme_timers", extreme_timers),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            tumbling_windows_of_disordered_input_are_those_of_brute_force,
            sliding_windows_of_disordered_input_are_those_of_brute_force,
            windows_whose_size_is_no_multiple_of_the_slide_are_those_of_brute_force,
            windows_over_everything_are_those_of_brute_force,
            r7_a_window_of_many_keys_fires_through_a_small_ring,
            the_results_of_a_window_are_in_time_for_the_next_one,
            accumulators_of_windows_may_be_text,
            every_late_record_leaves_by_the_side,
            a_window_that_the_watermark_has_passed_never_fires_again,
            a_window_over_everything_that_the_watermark_has_passed_never_fires_again,
            the_slower_of_two_united_streams_holds_the_watermark,
            timers_fire_once_and_in_the_order_of_their_times,
            a_timer_that_was_taken_back_never_fires,
            watermarks_never_go_back,
            windows_at_both_ends_of_time_are_those_of_brute_force,
            windows_over_everything_reach_both_ends_of_time,
            timers_at_both_ends_of_time_fire_once,
        ],
    )
}

const TOTAL: u64 = 30_000;

/// No event comes more than this after a later one of the same subtask.
const BOUND: i64 = 300;

const KILLS: &str = "0:12:3:1,0:9:2:3,0:10:1:2,1:11:2:4,1:8:1:3";

#[testudo::record]
#[derive(Debug, Default)]
struct Event {
    at: i64,
    key: u64,
    value: u64,
}

/// Event number n: two milliseconds after the one before, give or take the bound; also before 1970.
fn event(n: u64) -> Event {
    let random = scramble(n);
    let at = 2 * n as i64 - (random % BOUND as u64) as i64 - 10_000;
    Event { at, key: random >> 32 & 7, value: random >> 40 & 0xFF }
}

/// One result: bounds, key, number of records, sum of values.
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

fn rows(path: &str) -> FileSink<Lines<fn(&Row) -> String>> {
    FileSink::new(path, Lines(Row::line))
}

/// Brute force: what windows of `size`, one every `slide`, make of some events.
fn model(events: impl Iterator<Item = Event>, size: i64, slide: i64, by_key: bool) -> Vec<String> {
    let mut windows: BTreeMap<(i64, u64), Row> = BTreeMap::new();
    for event in events {
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
    let mut lines: Vec<String> = windows.iter().map(line).collect();
    lines.sort_unstable();
    lines
}

/// Runs a job with one to three workers, then with two that are killed.
fn each_way(job: &str, more: &str, files: usize, check: impl Fn(&[PathBuf], &Ended)) {
    for (workers, kills) in [(1, None), (2, None), (3, None), (2, Some(KILLS))] {
        let folder = folder();
        let paths: Vec<PathBuf> =
            (0..files).map(|n| folder.path().join(format!("out-{n}"))).collect();
        let parameters: Vec<String> = paths.iter().map(|path| text(path)).collect();
        let parameters = format!("{} {more}", parameters.join(" "));
        let mut cli = Cli::new(job, parameters.trim()).workers(workers).args(["--report", "json"]);
        if let Some(kills) = kills {
            cli = cli.env(KILL_AT, kills);
        }
        let ended = cli.run();
        let restarts = ended.restarts();
        assert_eq!(kills.is_some(), restarts > 1, "{restarts} deaths: {}", ended.err);
        check(&paths, &ended);
    }
}

fn millis(text: &str) -> Duration {
    Duration::from_millis(text.parse().expect("milliseconds"))
}

fn keyed(flow: &Flow, parameters: &str) {
    let fields: Vec<&str> = parameters.split(' ').collect();
    flow.source("events", Generator::new(TOTAL, event))
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .key_by(|event| event.key)
        .window(sliding(millis(fields[1]), millis(fields[2])), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .sink("rows", rows(fields[0]));
}

fn check_keyed(size: i64, slide: i64) {
    let expected = model((0..TOTAL).map(event), size, slide, true);
    each_way("keyed", &format!("{size} {slide}"), 1, |files, ended| {
        assert_eq!(sorted_lines(&files[0]), expected);
        assert_eq!(ended.report()["late"], 0);
    });
}

fn tumbling_windows_of_disordered_input_are_those_of_brute_force() {
    check_keyed(1000, 1000);
    check_keyed(50, 50);
}

fn sliding_windows_of_disordered_input_are_those_of_brute_force() {
    check_keyed(1000, 250);
}

fn windows_whose_size_is_no_multiple_of_the_slide_are_those_of_brute_force() {
    check_keyed(700, 300);
    check_keyed(90, 84);
}

fn overall(flow: &Flow, parameters: &str) {
    let fields: Vec<&str> = parameters.split(' ').collect();
    flow.source("events", Generator::new(TOTAL, event))
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .window_all(sliding(millis(fields[1]), millis(fields[2])), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |window, row| Row {
            start: window.start,
            end: window.end,
            ..*row
        })
        .sink("rows", rows(fields[0]));
}

fn windows_over_everything_are_those_of_brute_force() {
    for (size, slide) in [(1000, 1000), (1000, 250), (700, 300)] {
        let expected = model((0..TOTAL).map(event), size, slide, false);
        each_way("overall", &format!("{size} {slide}"), 1, |files, ended| {
            assert_eq!(sorted_lines(&files[0]), expected);
            assert_eq!(ended.report()["late"], 0);
        });
    }
}

/// Windows of all keys at once, behind them a ring of one page: each fires in many steps.
fn wide(flow: &Flow, output: &str) {
    flow.source("events", Generator::new(TOTAL, |n| Event { key: n % 5000, ..event(n) }))
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .key_by(|event| event.key)
        .window(sliding(Duration::from_secs(20), Duration::from_secs(10)), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .sink("rows", rows(output));
}

fn r7_a_window_of_many_keys_fires_through_a_small_ring() {
    let events = (0..TOTAL).map(|n| Event { key: n % 5000, ..event(n) });
    let expected = model(events, 20_000, 10_000, true);
    let folder = folder();
    let output = folder.path().join("rows");
    for kills in [0, 8] {
        let small = Settings { ring_bytes: 4096, ..common::settings(2) };
        let running = common::start(wide, &text(&output), small);
        let view = running.workers().expect("the job starts");
        let mut disturber = common::process::Disturber::new(&running, &view, 5);
        disturber.kill_randomly(kills);
        let report = common::finish(running).expect("the job survives");
        assert_eq!(sorted_lines(&output), expected);
        assert_eq!(report.late, 0);
    }
}

/// Counts by key, then all of these counts once more by their windows.
fn chained(flow: &Flow, output: &str) {
    let second = Duration::from_secs(1);
    flow.source("events", Generator::new(TOTAL, event))
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .key_by(|event| event.key)
        .window(tumbling(second), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .window_all(tumbling(second), |row| row.start)
        .aggregate(Row::default, Row::merge, Row::merge, |window, row| Row {
            start: window.start,
            end: window.end,
            ..*row
        })
        .sink("rows", rows(output));
}

fn the_results_of_a_window_are_in_time_for_the_next_one() {
    let expected = model((0..TOTAL).map(event), 1000, 1000, false);
    each_way("chained", "", 1, |files, ended| {
        assert_eq!(ended.report()["late"], 0);
        assert_eq!(sorted_lines(&files[0]), expected);
    });
}

fn name_of(event: &Event) -> String {
    format!("{}-{}", "x".repeat(event.value as usize / 4), event.value)
}

/// The greatest name of each window.
fn texts(flow: &Flow, output: &str) {
    let keep = |greatest: &mut String, other: &str| {
        if other > greatest.as_str() {
            other.clone_into(greatest);
        }
    };
    flow.source("events", Generator::new(TOTAL, event))
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .key_by(|event| format!("key {}", event.key))
        .window(sliding(Duration::from_secs(2), Duration::from_secs(1)), |event| event.at)
        .aggregate(
            String::new,
            move |greatest, event| keep(greatest, &name_of(event)),
            move |into, other: &String| keep(into, other),
            |key, window, greatest| format!("{key}|{}|{greatest}", window.end),
        )
        .sink(
            "lines",
            FileSink::new(output, Lines(|line: &<String as Record>::View| line.to_string())),
        );
}

fn accumulators_of_windows_may_be_text() {
    let mut greatest: BTreeMap<(u64, i64), String> = BTreeMap::new();
    for event in (0..TOTAL).map(event) {
        let first = event.at - event.at.rem_euclid(1000) + 1000;
        for end in [first, first + 1000] {
            let kept = greatest.entry((event.key, end)).or_default();
            *kept = name_of(&event).max(std::mem::take(kept));
        }
    }
    let line = |((key, end), name): (&(u64, i64), &String)| format!("key {key}|{end}|{name}");
    let mut expected: Vec<String> = greatest.iter().map(line).collect();
    expected.sort_unstable();
    each_way("texts", "", 1, |files, _| assert_eq!(sorted_lines(&files[0]), expected));
}

/// Some events come from long before everything else. The first of these come when the watermark
/// must have passed them, however the input was cut into batches.
fn event_or_straggler(n: u64) -> Event {
    let is_straggler = n > 10_000 && scramble(n).is_multiple_of(50);
    let event = event(n);
    if is_straggler { Event { at: event.at - 15_000, ..event } } else { event }
}

fn late(flow: &Flow, parameters: &str) {
    let fields: Vec<&str> = parameters.split(' ').collect();
    let (main, side) = flow
        .source("events", Generator::new(TOTAL, event_or_straggler))
        .parallelism(1)
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .key_by(|event| event.key)
        .window(sliding(Duration::from_millis(400), Duration::from_millis(200)), |event| event.at)
        .aggregate_with_late(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        });
    main.sink("rows", rows(fields[0]));
    side.sink(
        "late",
        FileSink::new(fields[1], Csv(|event: &Event| (event.at, event.key, event.value))),
    );
}

fn every_late_record_leaves_by_the_side() {
    let all = (0..TOTAL).map(event_or_straggler);
    let is_late = |n: &u64| event_or_straggler(*n).at != event(*n).at;
    let stragglers: Vec<Event> = (0..TOTAL).filter(is_late).map(event_or_straggler).collect();
    let expected =
        model(all.zip(0..).filter(|(_, n)| !is_late(n)).map(|(event, _)| event), 400, 200, true);
    let mut side: Vec<String> =
        stragglers.iter().map(|e| format!("{},{},{}", e.at, e.key, e.value)).collect();
    side.sort_unstable();
    assert!(side.len() > 200);
    each_way("late", "", 2, |files, ended| {
        assert_eq!(ended.report()["late"], side.len());
        assert_eq!(sorted_lines(&files[1]), side);
        assert_eq!(sorted_lines(&files[0]), expected);
    });
}

/// Long silence, then a burst at one time, then stragglers for which some windows are over and
/// others not.
fn gap(n: u64) -> Event {
    let at = match n {
        0..5000 => n as i64 / 100,
        5000..15_000 => 1_000_000,
        _ => 999_995,
    };
    Event { at, key: n % 3, value: 1 }
}

const GAP_TOTAL: u64 = 15_100;

/// A window holds what came before the watermark passed its end, and nothing else.
fn gap_model(by_key: bool) -> Vec<String> {
    let expected = model((0..GAP_TOTAL).map(gap), 10, 2, by_key);
    // Of the stragglers' five windows three were over, and these had nothing else in them.
    let is_over = |line: &String| {
        [999_996, 999_998, 1_000_000].iter().any(|end| line.contains(&format!(",{end},")))
    };
    expected.into_iter().filter(|line| !is_over(line)).collect()
}

fn passed(flow: &Flow, output: &str) {
    flow.source("events", Generator::new(GAP_TOTAL, gap))
        .parallelism(1)
        .event_time(Duration::ZERO, |event| event.at)
        .key_by(|event| event.key)
        .window(sliding(Duration::from_millis(10), Duration::from_millis(2)), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .sink("rows", rows(output));
}

fn a_window_that_the_watermark_has_passed_never_fires_again() {
    each_way("passed", "", 1, |files, ended| {
        assert_eq!(sorted_lines(&files[0]), gap_model(true));
        assert_eq!(ended.report()["late"], 0);
    });
}

fn passed_overall(flow: &Flow, output: &str) {
    flow.source("events", Generator::new(GAP_TOTAL, |n| Event { key: 0, ..gap(n) }))
        .parallelism(1)
        .event_time(Duration::ZERO, |event| event.at)
        .window_all(sliding(Duration::from_millis(10), Duration::from_millis(2)), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |window, row| Row {
            start: window.start,
            end: window.end,
            ..*row
        })
        .sink("rows", rows(output));
}

fn a_window_over_everything_that_the_watermark_has_passed_never_fires_again() {
    each_way("passed_overall", "", 1, |files, ended| {
        assert_eq!(sorted_lines(&files[0]), gap_model(false));
        assert_eq!(ended.report()["late"], 0);
    });
}

/// Two streams, one hours ahead of the other.
fn apart(flow: &Flow, output: &str) {
    let ahead = |n| Event { at: event(n).at + 10_000_000, ..event(n) };
    let bound = Duration::from_millis(BOUND as u64);
    let left =
        flow.source("ahead", Generator::new(TOTAL / 2, ahead)).event_time(bound, |event| event.at);
    let right =
        flow.source("behind", Generator::new(TOTAL / 2, event)).event_time(bound, |event| event.at);
    left.union(right)
        .key_by(|event| event.key)
        .window(tumbling(Duration::from_secs(1)), |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .sink("rows", rows(output));
}

fn the_slower_of_two_united_streams_holds_the_watermark() {
    let ahead = (0..TOTAL / 2).map(|n| Event { at: event(n).at + 10_000_000, ..event(n) });
    let expected = model(ahead.chain((0..TOTAL / 2).map(event)), 1000, 1000, true);
    each_way("apart", "", 1, |files, ended| {
        assert_eq!(ended.report()["late"], 0);
        assert_eq!(sorted_lines(&files[0]), expected);
    });
}

/// The time that event number n asks to be called at: always ahead of the watermark.
fn wanted(n: u64) -> i64 {
    event(n).at + (scramble(n ^ 0xABCD) % 700) as i64 + 1
}

fn timers(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(TOTAL, |n| n))
        .event_time(Duration::from_millis(BOUND as u64), |n| event(*n).at)
        .key_by(|n| event(*n).key)
        .process(
            |_| (),
            |(), cx, n| cx.set_timer(wanted(*n)),
            |(), cx, time| {
                assert!(time <= cx.watermark(), "a timer before its time");
                cx.emit(Event { at: time, key: *cx.key(), value: 0 });
            },
        )
        .sink("fired", FileSink::folder(output, "csv", Csv(|event: &Event| (event.at, event.key))));
}

fn timers_fire_once_and_in_the_order_of_their_times() {
    let set: std::collections::BTreeSet<(i64, u64)> =
        (0..TOTAL).map(|n| (wanted(n), event(n).key)).collect();
    let mut expected: Vec<String> = set.iter().map(|(at, key)| format!("{at},{key}")).collect();
    expected.sort_unstable();
    each_way("timers", "", 1, |files, _| {
        assert_eq!(common::sorted_parts(&files[0]), expected);
        for part in std::fs::read_dir(&files[0]).expect("the output is there").flatten() {
            let text = std::fs::read_to_string(part.path()).expect("a part");
            let time = |line: &str| line.split(',').next().and_then(|at| at.parse::<i64>().ok());
            let times: Vec<Option<i64>> = text.lines().map(time).collect();
            assert!(times.is_sorted(), "{} is not in the order of time", part.path().display());
        }
    });
}

/// Every event moves its key's one timer on: it fires only behind a silence, which comes once in a
/// thousand events.
fn silent(n: u64) -> Event {
    Event { at: n as i64 + (n / 1000) as i64 * 100_000, key: n % 5, value: n }
}

fn timers_moved(flow: &Flow, output: &str) {
    flow.source("events", Generator::new(TOTAL, silent))
        .parallelism(1)
        .event_time(Duration::ZERO, |event| event.at)
        .key_by(|event| event.key)
        .process(
            |state| state.value::<i64>("timer"),
            |timer, cx, event| {
                if let Some(before) = cx.get(timer).copied() {
                    cx.delete_timer(before);
                }
                cx.set(timer, &(event.at + 50_000));
                cx.set_timer(event.at + 50_000);
            },
            |timer, cx, time| {
                assert_eq!(cx.get(timer), Some(&time), "an old timer fired");
                cx.clear(timer);
                cx.emit(Event { at: time, key: *cx.key(), value: 0 });
            },
        )
        .sink("fired", FileSink::new(output, Csv(|event: &Event| (event.at, event.key))));
}

fn a_timer_that_was_taken_back_never_fires() {
    let lasts = (0..TOTAL).filter(|n| n % 1000 >= 995).map(silent);
    let mut expected: Vec<String> = lasts.map(|e| format!("{},{}", e.at + 50_000, e.key)).collect();
    expected.sort_unstable();
    each_way("timers_moved", "", 1, |files, _| {
        // A silence that ends in the batch in which it began is none: the watermark is that of the
        // batch.
        let fired = sorted_lines(&files[0]);
        assert!(fired.iter().all(|line| expected.contains(line)), "{fired:?}");
        assert!(fired.windows(2).all(|pair| pair[0] != pair[1]), "a timer fired twice");
        let last = silent(TOTAL - 1).at + 50_000;
        assert!(fired.iter().any(|line| line.starts_with(&last.to_string())), "{fired:?}");
    });
}

fn watermarks(flow: &Flow, output: &str) {
    let latest = Cell::new(i64::MIN);
    flow.source("events", Generator::new(TOTAL, event))
        .event_time(Duration::from_millis(BOUND as u64), |event| event.at)
        .round_robin()
        .key_by(|event| event.key)
        .process(
            |_| (),
            move |(), cx, event| {
                let now = cx.watermark();
                assert!(now >= latest.replace(now), "the watermark went back");
                assert!(now <= event.at, "an event behind the watermark");
                cx.emit(*event);
            },
            |(), _, _| (),
        )
        .sink("events", FileSink::new(output, Csv(|event: &Event| event.at)));
}

fn watermarks_never_go_back() {
    let mut expected: Vec<String> = (0..TOTAL).map(|n| event(n).at.to_string()).collect();
    expected.sort_unstable();
    each_way("watermarks", "", 1, |files, _| assert_eq!(sorted_lines(&files[0]), expected));
}

/// Times next to both ends of what can be written, and around zero.
fn extreme_times() -> Vec<i64> {
    let last = i64::MAX - 40;
    (i64::MIN..i64::MIN + 40).chain(-40..40).chain(last..=i64::MAX).collect()
}

/// All extreme times in order, five keys at each.
fn extreme_event(n: u64) -> Event {
    Event { at: extreme_times()[n as usize / 5], key: n % 5, value: n }
}

/// How many of them there are before a time.
fn extreme_total(until: i64) -> u64 {
    5 * extreme_times().iter().filter(|at| **at <= until).count() as u64
}

/// Brute force in wider arithmetic, clipped: what would end beyond time itself is one window.
fn extreme_model(until: i64, size: i64, slide: i64, by_key: bool) -> Vec<String> {
    let (size, slide) = (i128::from(size), i128::from(slide));
    let clip = |time: i128| time.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
    let last = -(-i128::from(i64::MAX)).div_euclid(slide) * slide;
    let mut windows: BTreeMap<(i64, u64), Row> = BTreeMap::new();
    for event in (0..extreme_total(until)).map(extreme_event) {
        let at = i128::from(event.at);
        let mut end = at - at.rem_euclid(slide) + slide;
        let mut counted = None;
        while end - size <= at {
            let start = clip(end.min(last) - size);
            let key = if by_key { event.key } else { 0 };
            let row = windows.entry((clip(end), key)).or_default();
            *row = Row { start, end: clip(end), key, ..*row };
            if counted.replace(clip(end)) != Some(clip(end)) {
                row.add(&event);
            }
            end += slide;
        }
    }
    let mut lines: Vec<String> = windows.values().map(Row::line).collect();
    lines.sort_unstable();
    lines
}

/// The parameters of a job of extreme times: output, last time, size, slide, bound in milliseconds.
struct Extreme<'a> {
    output: &'a str,
    total: u64,
    window: testudo::window::Window,
    bound: Duration,
}

impl<'a> Extreme<'a> {
    fn of(parameters: &'a str) -> Self {
        let fields: Vec<&str> = parameters.split(' ').collect();
        Self {
            output: fields[0],
            total: extreme_total(fields[1].parse().expect("a time")),
            window: sliding(millis(fields[2]), millis(fields[3])),
            bound: millis(fields[4]),
        }
    }
}

fn extreme(flow: &Flow, parameters: &str) {
    let job = Extreme::of(parameters);
    flow.source("events", Generator::new(job.total, extreme_event))
        .parallelism(1)
        .event_time(job.bound, |event| event.at)
        .key_by(|event| event.key)
        .window(job.window, |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |key, window, row| Row {
            start: window.start,
            end: window.end,
            key: *key,
            ..*row
        })
        .sink("rows", rows(job.output));
}

fn extreme_overall(flow: &Flow, parameters: &str) {
    let job = Extreme::of(parameters);
    flow.source("events", Generator::new(job.total, extreme_event))
        .parallelism(1)
        .event_time(job.bound, |event| event.at)
        .window_all(job.window, |event| event.at)
        .aggregate(Row::default, Row::add, Row::merge, |window, row| Row {
            start: window.start,
            end: window.end,
            ..*row
        })
        .sink("rows", rows(job.output));
}

fn check_extremes(job: &str, by_key: bool) {
    for (size, slide) in [(10, 10), (1, 1), (7, 7), (10, 4), (9, 3), (1_000_000, 1_000_000)] {
        // With no bound the watermark is at the latest time, and what comes at the end of time
        // itself would be late; with the widest one, nothing fires before the end of input.
        for (until, bound) in [(i64::MAX - 1, 0), (i64::MAX, i64::MAX as u64)] {
            let folder = folder();
            let output = folder.path().join("rows");
            let parameters = format!("{} {until} {size} {slide} {bound}", text(&output));
            let cli = Cli::new(job, &parameters).workers(2).args(["--report", "json"]);
            let ended = cli.run();
            assert_eq!(ended.report()["late"], 0, "{size} {slide} {bound}");
            let expected = extreme_model(until, size, slide, by_key);
            assert!(sorted_lines(&output) == expected, "{size} {slide} {bound}");
        }
    }
}

fn windows_at_both_ends_of_time_are_those_of_brute_force() {
    check_extremes("extreme", true);
}

fn windows_over_everything_reach_both_ends_of_time() {
    check_extremes("extreme_overall", false);
}

fn extreme_timers(flow: &Flow, parameters: &str) {
    let job = Extreme::of(parameters);
    flow.source("events", Generator::new(job.total, extreme_event))
        .parallelism(1)
        .event_time(job.bound, |event| event.at)
        .key_by(|event| event.key)
        .process(
            |_| (),
            |(), cx, event| cx.set_timer(event.at),
            |(), cx, time| {
                let key = *cx.key();
                cx.emit(Event { at: time, key, value: 0 });
            },
        )
        .sink("fired", FileSink::new(job.output, Csv(|event: &Event| (event.at, event.key))));
}

fn timers_at_both_ends_of_time_fire_once() {
    let events = (0..extreme_total(i64::MAX)).map(extreme_event);
    // The last time of all is that of the end of input.
    let fired = |e: Event| format!("{},{}", e.at.min(i64::MAX - 1), e.key);
    let mut expected: Vec<String> = events.map(fired).collect();
    expected.sort_unstable();
    expected.dedup();
    for bound in [0, i64::MAX as u64] {
        let folder = folder();
        let output = folder.path().join("rows");
        let parameters = format!("{} {} 1 1 {bound}", text(&output), i64::MAX);
        let ended = Cli::new("extreme_timers", &parameters).workers(2).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert!(sorted_lines(&output) == expected, "{bound}");
    }
}
