//! Workers die, results stay: SIGKILL at random, at every named point of a step and of attaching,
//! alone and together, during recovery, hundreds of times. Each test compares with what an
//! undisturbed job gives.

mod common;

use common::process::Disturber;
use common::program::Cli;
use common::tally::{self, ordered};
use common::{Build, Jobs, deep, finish, folder, run, settings, sorted_lines, start, text, trials};
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Lines;
use testudo::source::blocking::Blocking;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs =
    &[("ordered", ordered), ("busy", busy), ("winding", winding), ("waiting", waiting)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            an_undisturbed_job_is_exact,
            one_kill_changes_nothing,
            a_job_is_exact_whoever_is_killed_at_random,
            a_job_is_exact_when_workers_are_stopped_and_continued,
            r13_a_source_that_blocks_is_exact_across_kills,
            a_source_that_blocks_for_ever_holds_nothing_up,
            five_hundred_kills_change_nothing,
            two_workers_killed_at_once_both_come_back,
            a_kill_loop_at_full_speed_changes_nothing,
            r11_a_kill_at_any_point_of_a_step_leaves_all_of_it_or_nothing,
            r2_a_kill_at_any_point_of_attaching_is_recovered_from,
            r11_a_kill_in_rollback_repeats_the_rollback,
            a_worker_killed_during_its_own_recovery_recovers,
            two_workers_killed_at_the_same_point_both_come_back,
            r8_a_step_published_by_a_successor_wakes_its_peers,
            an_isolated_stage_dies_alone,
            a_killed_worker_that_had_finished_is_done_again,
            a_worker_that_dies_for_ever_uses_up_the_budget,
            every_death_is_in_the_report_with_its_cause,
            r8_workers_that_sleep_on_eventfds_are_as_exact,
            a_job_of_thousands_of_cells_is_exact_across_kills,
            canary_a_lost_a_doubled_and_a_late_record_are_seen,
        ],
    )
}

/// Runs the self-checking job without an end, disturbs it, drains it and checks it.
fn disturbed(workers: usize, disturb: impl FnOnce(&mut Disturber<'_>)) -> Report {
    disturbed_job(ordered, workers, disturb)
}

/// The same with another job of that form.
fn disturbed_job(build: Build, workers: usize, disturb: impl FnOnce(&mut Disturber<'_>)) -> Report {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let running = start(build, &tally::parameters(u64::MAX, &output), settings(workers));
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, workers as u64);
    disturb(&mut disturber);
    for worker in 0..workers {
        disturber.settle(worker);
    }
    let kills = disturber.kills;
    running.stop();
    let report = finish(running).expect("the job survives");
    let others: Vec<_> =
        report.restarts.iter().filter(|restart| restart.cause != "SIGKILL").collect();
    assert!(others.is_empty(), "deaths that nobody ordered: {others:?}");
    assert_eq!(report.restarts.len(), kills, "deaths in the report");
    tally::check(&output, report.records_in, workers as u64);
    assert_eq!(report.counters["seen"], report.records_in, "the job's own counter");
    report
}

fn an_undisturbed_job_is_exact() {
    for workers in [1, 2, 3] {
        let folder = folder();
        let output = folder.path().join("rows.csv");
        let report = run(ordered, &tally::parameters(100_001, &output), settings(workers));
        assert_eq!(report.records_in, 100_001);
        assert_eq!(report.records_out, tally::KEYS);
        assert_eq!(report.counters["seen"], 100_001);
        assert!(report.restarts.is_empty());
        tally::check(&output, 100_001, workers as u64);
    }
}

fn one_kill_changes_nothing() {
    for worker in [0, 1, 2] {
        let report = disturbed(3, |job| job.kill(worker));
        assert_eq!(report.restarts.len(), 1);
    }
}

fn a_job_is_exact_whoever_is_killed_at_random() {
    for workers in [1, 2, 3] {
        let report = disturbed(workers, |job| job.kill_randomly(deep(300, 40)));
        assert!(report.records_in > 0);
    }
}

fn a_job_is_exact_when_workers_are_stopped_and_continued() {
    for workers in [1, 2, 3] {
        disturbed(workers, |job| job.stop_randomly(deep(300, 30)));
    }
}

/// The numbers of the self-checking job, from a library that blocks now and then, and once it has
/// given `until` of them for ever.
struct Waiting {
    until: u64,
}

struct Library {
    until: u64,
    step: u64,
}

impl Source for Waiting {
    type Out = tally::Numbered;
    type Position = u64;
    type Reader = Library;

    fn start(&self, subtask: Subtask) -> u64 {
        subtask.index as u64
    }

    fn open(&self, subtask: Subtask, _from: &u64) -> Result<Library, String> {
        Ok(Library { until: self.until, step: subtask.count as u64 })
    }
}

impl Reader<tally::Numbered, u64> for Library {
    fn read(
        &mut self,
        next: &mut u64,
        _max: usize,
        out: &mut impl Collect<tally::Numbered>,
    ) -> Result<Progress, String> {
        if *next >= self.until {
            loop {
                std::thread::park();
            }
        }
        if (*next / self.step).is_multiple_of(64) {
            std::thread::sleep(Duration::from_micros(500));
        }
        out.emit(tally::numbered(*next));
        *next += self.step;
        Ok(Progress::More)
    }
}

fn waiting(flow: &Flow, parameters: &str) {
    let (_, output) = parameters.split_once(' ').expect("total and output");
    let numbers = flow.source("library", Blocking::new(Waiting { until: u64::MAX }));
    tally::tallied(flow, numbers.key_by(|record| record.key), output);
}

fn r13_a_source_that_blocks_is_exact_across_kills() {
    for workers in [1, 2] {
        let report = disturbed_job(waiting, workers, |job| job.kill_randomly(deep(200, 25)));
        assert!(report.records_in > 0);
    }
}

/// Two sources into one stream, of which one gives three records and then nothing any more.
fn stuck(flow: &Flow, output: &str) {
    let stuck = flow.source("library", Blocking::new(Waiting { until: 3 }));
    let numbers = flow.source("numbers", Generator::new(50_000, tally::numbered));
    stuck
        .union(numbers)
        .sink("out", FileSink::folder(output, "txt", Lines(|n: &tally::Numbered| n.key)));
}

fn a_source_that_blocks_for_ever_holds_nothing_up() {
    let folder = folder();
    let running = start(stuck, &text(folder.path()), settings(1));
    // All of the other source passes meanwhile, and the job ends when it is asked to.
    common::wait_for("the records of the other source", || {
        let parts = std::fs::read_dir(folder.path()).expect("a folder").flatten();
        let texts = parts.filter_map(|part| std::fs::read(part.path()).ok());
        let lines = texts.map(|text| text.iter().filter(|byte| **byte == b'\n').count());
        (lines.sum::<usize>() >= 50_003).then_some(())
    });
    running.stop();
    let report = finish(running).expect("it drains");
    assert_eq!((report.records_in, report.records_out), (50_003, 50_003));
}

fn five_hundred_kills_change_nothing() {
    let report = disturbed(2, |job| job.kill_randomly(500));
    assert_eq!(report.restarts.len(), 500);
}

fn two_workers_killed_at_once_both_come_back() {
    disturbed(2, |job| {
        for _ in 0..deep(200, 25) {
            for worker in 0..2 {
                job.settle(worker);
            }
            job.kill_now(0);
            job.kill_now(1);
        }
    });
}

/// A job of the speed class: plain records, a hash exchange, counts by key, nothing else.
fn busy(flow: &Flow, output: &str) {
    flow.source(
        "numbers",
        Generator::new(u64::MAX, |n| tally::Numbered { key: n % 100_000, sequence: 1 }),
    )
    .key_by(|record| record.key)
    .reduce(|sum, record| tally::Numbered {
        key: record.key,
        sequence: sum.sequence + record.sequence,
    })
    .key_by(|_| 0u64)
    .process(
        |state| state.value::<[u64; 2]>("all"),
        |all, cx, record| {
            // The running sums of a key add up to n (n + 1) / 2 only when every n was there once.
            let [count, sum] = cx.get(all).copied().unwrap_or_default();
            if count == 0 {
                cx.set_timer(i64::MAX);
            }
            cx.set(all, &[count + 1, sum.wrapping_add(record.sequence)]);
        },
        |all, cx, _| {
            let [count, sum] = cx.get(all).copied().unwrap_or_default();
            cx.emit(tally::Numbered { key: count, sequence: sum });
        },
    )
    .sink(
        "sum",
        FileSink::new(output, Lines(|r: &tally::Numbered| format!("{} {}", r.key, r.sequence))),
    );
}

fn a_kill_loop_at_full_speed_changes_nothing() {
    let folder = folder();
    let output = folder.path().join("sum.txt");
    let big = Settings { ring_bytes: 1 << 20, key_groups: 64, ..settings(2) };
    let running = start(busy, &text(&output), big);
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 7);
    disturber.kill_randomly(deep(300, 30));
    running.stop();
    let report = finish(running).expect("the job survives");
    // Subtask i read i, i + 2, …: from how many there are in all, only a few ways of sharing are
    // possible.
    let lines = sorted_lines(&output);
    let numbers: Vec<u64> = lines[0].split(' ').map(|n| n.parse().expect("a number")).collect();
    assert_eq!(numbers[0], report.records_in, "records that reached the end");
    let half = |read: u64| {
        let (each, more) = (read / 50_000, read % 50_000);
        more * triangle(each + 1) + (50_000 - more) * triangle(each)
    };
    let all = report.records_in;
    let expected = (0..=all).find(|left| half(*left) + half(all - left) == numbers[1]);
    assert!(expected.is_some(), "the sums are those of no run: {numbers:?}");
}

fn triangle(n: u64) -> u64 {
    n * (n + 1) / 2
}

/// Runs the self-checking job as a program with kill orders and checks its rows and its deaths.
fn killed_at(orders: &str, deaths: usize) {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let parameters = tally::parameters(150_000, &output);
    let job =
        Cli::new("ordered", &parameters).workers(2).args(["--report", "json"]).env(KILL_AT, orders);
    let ended = job.run();
    assert_eq!(ended.restarts(), deaths, "{orders}: {}", ended.err);
    assert_eq!(ended.report()["records_in"], 150_000, "{orders}");
    tally::check(&output, 150_000, 2);
}

fn index(point: Point) -> usize {
    Point::ALL.iter().position(|other| *other == point).expect("a point of the list")
}

const OF_A_STEP: [Point; 6] = [
    Point::StepBegin,
    Point::Processed,
    Point::Saved,
    Point::BeforeCommit,
    Point::Committed,
    Point::StepPublished,
];

const OF_ATTACHING: [Point; 6] = [
    Point::AttachBegin,
    Point::Mapped,
    Point::Claimed,
    Point::RolledBack,
    Point::Opened,
    Point::Published,
];

fn r11_a_kill_at_any_point_of_a_step_leaves_all_of_it_or_nothing() {
    for point in OF_A_STEP {
        for worker in [0, 1] {
            killed_at(&format!("{worker}:{}:3:{}", index(point), 5 + 7 * worker), 3);
        }
    }
}

fn r2_a_kill_at_any_point_of_attaching_is_recovered_from() {
    for point in OF_ATTACHING {
        for worker in [0, 1] {
            killed_at(&format!("{worker}:{}:2:0", index(point)), 2);
        }
    }
}

fn r11_a_kill_in_rollback_repeats_the_rollback() {
    // The last order that names a life counts: the first life dies in a step, the next ones while
    // they undo it, after more and more entries.
    let (before, rolling) = (index(Point::BeforeCommit), index(Point::RollingBack));
    for worker in [0, 1] {
        let orders = format!(
            "{worker}:{rolling}:4:9,{worker}:{rolling}:3:3,{worker}:{rolling}:2:0,\
             {worker}:{before}:1:6"
        );
        killed_at(&orders, 4);
    }
}

fn a_worker_killed_during_its_own_recovery_recovers() {
    let processed = index(Point::Processed);
    for point in OF_ATTACHING {
        let orders = format!("0:{0}:3:0,0:{processed}:1:9", index(point));
        killed_at(&orders, 3);
    }
}

fn two_workers_killed_at_the_same_point_both_come_back() {
    for point in OF_A_STEP.into_iter().chain(OF_ATTACHING) {
        let skip = if OF_A_STEP.contains(&point) { 6 } else { 0 };
        let index = index(point);
        killed_at(&format!("0:{index}:1:{skip},1:{index}:1:{skip}"), 2);
    }
    let (before, rolling) = (index(Point::BeforeCommit), index(Point::RollingBack));
    let orders = format!("0:{rolling}:2:1,1:{rolling}:2:1,0:{before}:1:6,1:{before}:1:6");
    killed_at(&orders, 4);
}

fn r8_a_step_published_by_a_successor_wakes_its_peers() {
    // Every life dies between its commit and the publishing of it: only attaching moves the job on.
    let committed = index(Point::Committed);
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let job = Cli::new("ordered", &tally::parameters(20_000, &output)).workers(2);
    let job = job.args(["--report", "json", "--restart-budget", "20"]);
    let ended = job.env(KILL_AT, &format!("0:{committed}:12:0")).run();
    assert_eq!(ended.restarts(), 12, "{}", ended.err);
    tally::check(&output, 20_000, 2);
}

fn isolated(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(u64::MAX, tally::numbered))
        .parallelism(1)
        .round_robin()
        .map(|record| record.key + record.sequence * tally::KEYS)
        .parallelism(1)
        .isolated()
        .sink("all", FileSink::new(output, Lines(|n: &u64| *n)));
}

fn an_isolated_stage_dies_alone() {
    let folder = folder();
    let output = folder.path().join("all.txt");
    let running = start(isolated, &text(&output), settings(1));
    let view = running.workers().expect("the job starts");
    assert_eq!(view.workers.len(), 2, "the stage has a process of its own");
    let mut disturber = Disturber::new(&running, &view, 3);
    for _ in 0..deep(100, 15) {
        disturber.kill(1);
    }
    let kills = disturber.kills;
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!(report.restarts.len(), kills);
    assert!(report.restarts.iter().all(|restart| restart.worker == 1), "{:?}", report.restarts);
    counts_up(&output, report.records_in);
}

/// A file has the numbers 0, 1, 2, … in this order.
fn counts_up(path: &Path, count: u64) {
    let text = std::fs::read_to_string(path).expect("the output is there");
    let mut expected = 0;
    for line in text.lines() {
        assert_eq!(line, expected.to_string());
        expected += 1;
    }
    assert_eq!(expected, count, "numbers in the file");
}

/// One worker's stage ends long before the other's.
fn uneven(flow: &Flow, output: &str) {
    flow.source("short", Generator::new(10, |n| n)).parallelism(1).isolated().for_each(|_| ());
    flow.source("long", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .sink("all", FileSink::new(output, Lines(|n: &u64| *n)));
}

fn a_killed_worker_that_had_finished_is_done_again() {
    use testudo::shm::header::WorkerState;
    use testudo::shm::primitive::Ordering;
    let folder = folder();
    let output = folder.path().join("all.txt");
    let running = start(uneven, &text(&output), Settings { rate: Some(20_000), ..settings(1) });
    let view = running.workers().expect("the job starts");
    let short = view.workers[1];
    for _ in 0..3 {
        common::wait_for("the short stage to be done", || {
            (short.state.load(Ordering::Acquire) == WorkerState::Finished as u32).then_some(())
        });
        let pid = short.pid.load(Ordering::Acquire);
        assert!(common::process::signal_worker(short, libc::SIGKILL));
        common::wait_for("its successor", || {
            (short.pid.load(Ordering::Acquire) != pid).then_some(())
        });
    }
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!(report.restarts.len(), 3);
    counts_up(&output, report.records_in - 10);
}

fn a_worker_that_dies_for_ever_uses_up_the_budget() {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let orders = format!("1:{}:1000:0", index(Point::BeforeCommit));
    let job = Cli::new("ordered", &tally::parameters(10_000, &output)).workers(2);
    let ended = job.args(["--restart-budget", "3"]).env(KILL_AT, &orders).run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert_eq!(
        ended.err,
        "job: worker 1 died 4 times in a row without finishing a step (SIGKILL); mend the cause, \
         or raise \
         --max-restarts\n"
    );
}

fn every_death_is_in_the_report_with_its_cause() {
    let report = disturbed(2, |job| job.kill_randomly(5));
    for restart in &report.restarts {
        assert_eq!(restart.cause, "SIGKILL");
        assert_eq!(restart.last_words, "");
        assert!(restart.recovery_us.is_some(), "{restart:?}");
    }
    let text = report.text(testudo::config::ReportForm::Text);
    assert_eq!(text.matches("died (SIGKILL), back after ").count(), 5, "{text}");
}

fn r8_workers_that_sleep_on_eventfds_are_as_exact() {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    for error in [libc::ENOSYS, libc::EPERM] {
        let job = Cli::new("ordered", &tally::parameters(150_000, &output)).workers(3);
        let orders = format!("0:{0}:3:5,1:{0}:2:9", index(Point::StepPublished));
        let job = job.args(["--report", "json"]).env(KILL_AT, &orders);
        let ended = job.without_futex_waitv(error).run();
        assert_eq!(
            ended.err.lines().next(),
            Some("testudo: this kernel cannot wait on several futexes; workers sleep on eventfds")
        );
        assert_eq!(ended.restarts(), 5, "{}", ended.err);
        tally::check(&output, 150_000, 3);
    }
}

/// Exchanges in a row: with three workers, some thirty cells for each.
const EXCHANGES: u64 = 80;

/// A record visits every worker many times; each exchange has rings, spills and watermarks.
fn winding(flow: &Flow, output: &str) {
    let mut stream = flow.source("numbers", Generator::new(40_000, |n| n)).round_robin();
    for _ in 1..EXCHANGES {
        stream = stream.map(|n| n + 1).key_by(|n| *n).stream();
    }
    stream.sink("out", FileSink::folder(output, "txt", Lines(|n: &u64| *n)));
}

fn a_job_of_thousands_of_cells_is_exact_across_kills() {
    let folder = folder();
    let output = folder.path().join("out");
    let (saved, committed) = (index(Point::Saved), index(Point::Committed));
    let orders = format!("0:{saved}:3:4,1:{committed}:3:5,2:{saved}:2:9");
    let job = Cli::new("winding", &text(&output)).workers(3).args(["--report", "json"]);
    let ended = job.env(KILL_AT, &orders).run();
    assert_eq!(ended.restarts(), 8, "{}", ended.err);
    let mut expected: Vec<String> = (0..40_000).map(|n| (n + EXCHANGES - 1).to_string()).collect();
    expected.sort_unstable();
    assert!(common::sorted_parts(&output) == expected, "not all numbers came through once");
}

/// The self-checking job with one fault: a record that is left out, one that comes twice, two that
/// change places.
fn faulty(flow: &Flow, parameters: &str) {
    let (fault, parameters) = parameters.split_once(' ').expect("a fault");
    let fault = fault.to_owned();
    let at = 1234 * tally::KEYS + 5;
    let numbers = move |n: u64| match fault.as_str() {
        "lost" if n >= at && n % tally::KEYS == 5 => n + tally::KEYS,
        "doubled" if n >= at && n % tally::KEYS == 5 => n - tally::KEYS,
        "late" if n == at => n + tally::KEYS,
        "late" if n == at + tally::KEYS => n - tally::KEYS,
        _ => n,
    };
    tally::checked(flow, parameters, move |n| tally::numbered(numbers(n)));
}

fn canary_a_lost_a_doubled_and_a_late_record_are_seen() {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let sees = |fault: &str| {
        let parameters = format!("{fault} {}", tally::parameters(1_000_000, &output));
        let report = run(faulty, &parameters, settings(2));
        tally::look(&output, report.records_in, 2).is_err()
    };
    assert!(sees("lost") && sees("doubled") && sees("late"));
    assert!(!sees("none"), "the canary sings without a reason");
}
