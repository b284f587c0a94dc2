//! Values of another type: in a job that runs, and in the checkpoint that it is resumed from. What
//! comes out is what the new program alone would have made of the same input, whoever dies when; a
//! new program that fails leaves what the old one had. The programs are this one under other names.

#![expect(unsafe_code, reason = "sets a variable before any thread is there")]

mod common;

use common::program::{Cli, Started};
use common::tool::{said, tool};
use common::{Jobs, deep, folder, sorted_lines, trials, wait_for};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use testudo::prelude::*;
use testudo::serde_json::{self, Value, json};
use testudo::shm::record::Record;
use testudo::sink::file::Csv;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[("kept", kept), ("printing", printing)];

/// Kill points for processes of the first program alone, and of any other.
const KILL_OLD: &str = "TESTUDO_TEST_KILL_OLD";
const KILL_NEW: &str = "TESTUDO_TEST_KILL_NEW";

/// Names the program, where its file does not.
const VARIANT: &str = "TESTUDO_TEST_VARIANT";

const KEYS: u64 = 300;
/// Numbers of a key between two rows, and two items of its list.
const EVERY: u64 = 64;

fn main() -> ExitCode {
    let order = if variant() == "old" { KILL_OLD } else { KILL_NEW };
    // What a process was told is in the environment of those that it starts.
    let order = std::env::var(order).unwrap_or_default();
    // SAFETY: no thread but this one is there yet.
    unsafe { std::env::set_var(KILL_AT, order) };
    testudo::init();
    common::host(
        JOBS,
        trials![
            r22_values_are_migrated_in_a_running_job_and_the_rows_are_the_new_programs,
            r22_another_type_without_a_migration_is_refused_before_anything_stops,
            r22_a_job_that_could_not_go_back_is_refused_before_anything_stops,
            r22_a_death_at_any_point_of_a_migration_changes_nothing,
            r22_a_program_that_fails_before_its_first_step_leaves_the_old_values_as_they_were,
            r22_a_program_that_fails_later_takes_its_region_back_to_the_old_values,
            r22_a_death_on_the_way_back_changes_nothing,
            a_checkpoint_with_the_old_values_is_resumed_through_the_migration,
            a_checkpoint_after_a_migration_knows_the_new_types_alone,
            a_checkpoint_with_the_old_values_is_refused_without_a_migration,
        ],
    )
}

/// Which program this is: "old", or what its file is called.
fn variant() -> String {
    if let Ok(named) = std::env::var(VARIANT) {
        return named;
    }
    let own = std::env::current_exe().expect("our own path");
    let name = own.file_name().expect("a name").to_string_lossy().into_owned();
    let name = name.trim_end_matches(" (deleted)").to_owned();
    if name.starts_with("migrate-") { "old".into() } else { name }
}

#[testudo::record]
#[derive(Debug)]
struct Numbered {
    key: u64,
    sequence: u64,
}

/// What values are in the new programs: all of it follows from the first number.
#[testudo::record]
#[derive(Debug, PartialEq)]
struct Wide {
    number: u64,
    tripled: u64,
    mark: u64,
}

/// A number that is kept, in one form or another.
trait Kept: Record<View = Self> + Copy {
    fn of(number: u64) -> Self;
    /// `None` where it cannot be what was kept.
    fn number(&self) -> Option<u64>;
}

impl Kept for u64 {
    fn of(number: u64) -> Self {
        number
    }

    fn number(&self) -> Option<u64> {
        Some(*self)
    }
}

impl Kept for Wide {
    fn of(number: u64) -> Self {
        Self { number, tripled: number.wrapping_mul(3), mark: 7 }
    }

    fn number(&self) -> Option<u64> {
        (*self == Self::of(self.number)).then_some(self.number)
    }
}

impl Wide {
    /// How an old value becomes a new one.
    fn migrated(number: &u64) -> Self {
        if variant() == "panics-migrating" && *number > 0 {
            panic!("this cannot be migrated");
        }
        Self::of(*number)
    }
}

static STEPS: AtomicU64 = AtomicU64::new(0);

/// What the broken programs do with each record.
fn spring(trap: &str) {
    match trap {
        "panics-first" => panic!("this program is broken"),
        "panics-soon" if STEPS.fetch_add(1, Relaxed) > 3000 => panic!("broken after a while"),
        "hangs-soon" if STEPS.fetch_add(1, Relaxed) > 3000 => loop {
            std::thread::park();
        },
        _ => {}
    }
}

/// A row of output.
#[testudo::record]
struct Row {
    key: u64,
    one: u64,
    other: u64,
}

/// What no program writes that has what was kept.
const WRONG: Row = Row { key: u64::MAX, one: u64::MAX, other: u64::MAX };

fn row(key: u64, one: u64, other: u64) -> Row {
    Row { key, one, other }
}

fn fields(row: &Row) -> (u64, u64, u64) {
    (row.key, row.one, row.other)
}

/// Declares a value, a list and a map for `process`, as new types that are migrated or not.
macro_rules! declared {
    (old) => {
        |state| (state.value::<u64>("next"), state.list::<u64>("some"), state.map("by"))
    };
    (bare) => {
        |state| (state.value::<Wide>("next"), state.list::<Wide>("some"), state.map("by"))
    };
    (migrated) => {
        |state| {
            (
                state.migrate_from::<u64, _>(Wide::migrated).value("next"),
                state.migrate_from::<u64, _>(Wide::migrated).list("some"),
                state.migrate_from::<u64, _>(Wide::migrated).map("by"),
            )
        }
    };
}

/// A job of three operators that keep things: a process, an aggregate, windows. `$migrated` says
/// how the values of the last two are migrated.
macro_rules! keeping {
    ($flow:expr, $parameters:expr, $kept:ty, $declare:expr, |$stream:ident| $migrated:expr) => {{
        let files: Vec<&str> = $parameters.split(' ').collect();
        let total: u64 = files[0].parse().expect("a number");
        let numbers = $flow
            .source("numbers", Generator::new(total, numbered))
            .event_time(Duration::ZERO, |record| (record.sequence * 10) as i64)
            .parallelism(1);
        let (first, rest) = numbers.fork();
        let (second, third) = rest.fork();
        let trap = variant();
        first
            .key_by(|record| record.key)
            .process(
                $declare,
                move |(next, some, by), cx, record: &Numbered| {
                    spring(&trap);
                    let is_first = cx.get(next).is_none();
                    let expected = cx.get(next).map_or(Some(0), <$kept>::number);
                    if is_first {
                        cx.set_timer(i64::MAX);
                    }
                    if expected != Some(record.sequence) {
                        cx.emit(WRONG);
                    }
                    cx.set(next, &<$kept>::of(record.sequence + 1));
                    if record.sequence.is_multiple_of(EVERY) {
                        cx.append(some, &<$kept>::of(record.sequence));
                    }
                    let part = record.sequence % 3;
                    let before = cx.map_get(by, &part).map_or(Some(0), <$kept>::number);
                    cx.map_put(by, &part, &<$kept>::of(before.unwrap_or(u64::MAX) + 1));
                },
                |(next, some, by), cx, _| {
                    let count = cx.get(next).and_then(<$kept>::number).unwrap_or(u64::MAX);
                    let items: Vec<Option<u64>> = cx.items(some).map(<$kept>::number).collect();
                    let expected: Vec<_> = (0..count).step_by(EVERY as usize).map(Some).collect();
                    let parts = cx.map_iter(by).map(|(_, part)| part.number());
                    let sum = parts.sum::<Option<u64>>();
                    let is_right = items == expected && sum == Some(count);
                    let key = *cx.key();
                    cx.emit(if is_right { row(key, count, items.len() as u64) } else { WRONG });
                },
            )
            .sink("totals", FileSink::new(files[1], Csv(fields)));
        let $stream = second.key_by(|record| record.key).aggregate(
            || <$kept>::of(0),
            |count, _: &Numbered| {
                *count = <$kept>::of(count.number().unwrap_or(u64::MAX / 2) + 1);
            },
            |key, count| row(*key, count.number().unwrap_or(u64::MAX), 0),
        );
        let $stream = {
            let windows = third
                .key_by(|record| record.key)
                .window(tumbling(Duration::from_secs(2)), |record| (record.sequence * 10) as i64)
                .aggregate(
                    || <$kept>::of(0),
                    |sum, record: &Numbered| {
                        let before = sum.number().unwrap_or(u64::MAX / 2);
                        *sum = <$kept>::of(before + record.sequence);
                    },
                    |sum, other| {
                        let both = (sum.number(), other.number());
                        *sum = <$kept>::of(both.0.unwrap_or(1) + both.1.unwrap_or(1));
                    },
                    |key, window, sum| {
                        row(*key, window.start as u64, sum.number().unwrap_or(u64::MAX))
                    },
                );
            ($stream, windows)
        };
        let (counts, windows) = $migrated;
        counts
            .filter(|row| row.one.is_multiple_of(EVERY))
            .sink("counts", FileSink::new(files[2], Csv(fields)));
        windows.sink("windows", FileSink::new(files[3], Csv(fields)));
    }};
}

fn numbered(n: u64) -> Numbered {
    Numbered { key: n % KEYS, sequence: n / KEYS }
}

fn kept(flow: &Flow, parameters: &str) {
    match variant().as_str() {
        "old" => keeping!(flow, parameters, u64, declared!(old), |both| both),
        "bare" => keeping!(flow, parameters, Wide, declared!(bare), |both| both),
        "bare-process" => keeping!(flow, parameters, Wide, declared!(bare), |both| (
            both.0.migrate_from::<u64>(Wide::migrated),
            both.1.migrate_from::<u64>(Wide::migrated)
        )),
        _ => keeping!(flow, parameters, Wide, declared!(migrated), |both| (
            both.0.migrate_from::<u64>(Wide::migrated),
            both.1.migrate_from::<u64>(Wide::migrated)
        )),
    }
}

/// A job whose output cannot be taken back.
fn printing(flow: &Flow, _: &str) {
    let numbers = flow.source("numbers", Generator::new(u64::MAX, numbered));
    let numbers = numbers.key_by(|record| record.key);
    let rare = |row: &Row| row.one.is_multiple_of(10_000);
    let line = |row: &Row| format!("{:?}", fields(row));
    if variant() == "old" {
        let counts = numbers.aggregate(|| 0u64, |n, _| *n += 1, |key, n| row(*key, *n, 0));
        counts.filter(rare).print(line);
    } else {
        let more = |n: &mut Wide, _: &Numbered| *n = Wide::of(n.number + 1);
        let counts = numbers.aggregate(|| Wide::of(0), more, |key, n| row(*key, n.number, 0));
        counts.migrate_from::<u64>(Wide::migrated).filter(rare).print(line);
    }
}

/// The job's three outputs.
fn outputs(at: &Path) -> [PathBuf; 3] {
    ["totals", "counts", "windows"].map(|name| at.join(format!("{name}.csv")))
}

fn parameters(total: u64, at: &Path) -> String {
    let files = outputs(at).map(|file| common::text(&file));
    format!("{total} {}", files.join(" "))
}

/// Everything that a job has written.
fn rows(at: &Path) -> [Vec<String>; 3] {
    outputs(at).map(|file| sorted_lines(&file))
}

/// What the new program alone makes of so many records.
fn expected(total: u64) -> [Vec<String>; 3] {
    let at = folder();
    let job = Cli::new("kept", &parameters(total, at.path())).env(VARIANT, "wide");
    let ended = job.workers(2).args(["--report", "json"]).run();
    assert_eq!(ended.report()["records_in"], total);
    rows(at.path())
}

/// A job without an end, and the place where the tool finds it.
struct Life {
    at: tempfile::TempDir,
    job: Started,
}

impl Life {
    fn start() -> Self {
        Self::start_with(|job| job)
    }

    /// With checkpoints to go back to; at least one of them is there.
    fn start_saving(more: impl FnOnce(Cli) -> Cli) -> Self {
        let at = folder();
        let job = more(Self::life(at.path(), "").workers(2)).own_group().start();
        let job = Self { job, at }.under_way();
        job.saves();
        job
    }

    fn start_with(more: impl FnOnce(Cli) -> Cli) -> Self {
        let at = folder();
        let job = more(Self::plain(at.path(), "").workers(2)).start();
        Self { job, at }.under_way()
    }

    /// Goes on with the newest checkpoint as another program.
    fn resume(
        at: tempfile::TempDir,
        program: &str,
        workers: usize,
        more: impl FnOnce(Cli) -> Cli,
    ) -> Self {
        let job = Self::life(at.path(), program).workers(workers).args(["--resume"]);
        let job = more(job).own_group().start();
        Self { job, at }.under_way()
    }

    fn plain(at: &Path, program: &str) -> Cli {
        let place = common::text(at);
        let job = Cli::new("kept", &parameters(u64::MAX, at));
        let job = job.args(["--report", "json", "--no-progress"]);
        let job = job.env("XDG_RUNTIME_DIR", &place).env("TMPDIR", &place);
        if program.is_empty() { job } else { job.env(VARIANT, program) }
    }

    fn life(at: &Path, program: &str) -> Cli {
        let checkpoints = common::text(&at.join("checkpoints"));
        let job = Self::plain(at, program).args(["--checkpoint-dir", &checkpoints]);
        job.args(["--checkpoint-interval", "50ms"])
    }

    fn under_way(self) -> Self {
        wait_for("the job's records", || {
            let (code, status) = self.ask(&["status"]);
            (code == 0 && status["records_in"].as_u64() > Some(50_000)).then_some(())
        });
        self
    }

    /// Waits for two checkpoints: the second began after this.
    fn saves(&self) {
        let complete = || self.ask(&["status"]).1["checkpoints"]["completed"].as_u64();
        let seen = complete().unwrap_or(0);
        wait_for("checkpoints", || (complete() >= Some(seen + 2)).then_some(()));
    }

    /// Kills all of it.
    fn crash(self) -> tempfile::TempDir {
        self.job.signal_group(libc::SIGKILL);
        let ended = self.job.wait();
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{}", ended.err);
        self.at
    }

    /// A program of this name.
    fn program(&self, name: &str) -> String {
        let path = self.at.path().join(name);
        if !path.exists() {
            let own = std::env::current_exe().expect("our own path");
            if fs::hard_link(&own, &path).is_err() {
                fs::copy(&own, &path).expect("room for a program");
            }
        }
        common::text(&path)
    }

    /// The tool's exit code and what it says, as JSON.
    fn ask(&self, words: &[&str]) -> (i32, Value) {
        let words: Vec<&str> =
            [words[0], "job"].iter().chain(&words[1..]).chain(&["--json"]).copied().collect();
        let (code, out, _) = said(&tool(self.at.path(), &words));
        (code, serde_json::from_str(&out).unwrap_or_default())
    }

    fn update(&self, program: &str) -> (i32, Value) {
        self.ask(&["update", &self.program(program)])
    }

    /// Updates it to a program that fails; what is said of it.
    fn rolled_back(&self, program: &str) -> String {
        let (code, updated) = self.update(program);
        assert_eq!(code, 5, "{program}: {updated}");
        let old = std::env::current_exe().expect("our own path");
        for pid in self.job.workers(2) {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).expect("it runs");
            assert_eq!(exe, old);
        }
        updated["rolled_back"].as_str().expect("a reason").to_owned()
    }

    /// Lets some more records pass.
    fn go_on(&self) {
        let records = || {
            let status = self.ask(&["status"]).1;
            status["records_in"].as_u64().unwrap_or(0)
        };
        let seen = records();
        wait_for("more records", || (records() > seen + 30_000).then_some(()));
    }

    /// Drains the job and compares what it has written with what the new program would have.
    fn check(self) -> Value {
        assert_eq!(self.ask(&["stop"]).0, 0);
        let ended = self.job.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let report = ended.err.lines().last().expect("the report");
        let report: Value = serde_json::from_str(report).expect("the report");
        let total = report["records_in"].as_u64().expect("a number");
        let (found, expected) = (rows(self.at.path()), expected(total));
        for (name, (found, expected)) in
            ["totals", "counts", "windows"].iter().zip(found.iter().zip(&expected))
        {
            let place = found.iter().zip(expected).position(|(one, other)| one != other);
            let place = place.map(|at| (&found[at], &expected[at]));
            assert!(
                found == expected,
                "{name}: {} and {} rows, {place:?}",
                found.len(),
                expected.len()
            );
        }
        assert_eq!(report["late"], 0);
        report
    }
}

fn r22_values_are_migrated_in_a_running_job_and_the_rows_are_the_new_programs() {
    let job = Life::start();
    let (code, updated) = job.update("wide");
    assert_eq!((code, &updated["rolled_back"]), (0, &Value::Null), "{updated}");
    let changes: Vec<String> = updated["changes"]
        .as_array()
        .expect("changes")
        .iter()
        .map(|of| {
            let text = |field: &str| of[field].as_str().expect("text").to_owned();
            format!(
                "{}: {} {} becomes {}",
                text("operator"),
                text("what"),
                text("from"),
                text("to")
            )
        })
        .collect();
    let own = std::any::type_name::<Wide>();
    assert_eq!(
        changes,
        [
            "process: state next, by migration, value of u64 becomes value of Wide".to_owned(),
            "process: state some, by migration, list of u64 becomes list of Wide".to_owned(),
            "process: state by, by migration, map of (u64, u64) becomes map of (u64, Wide)"
                .to_owned(),
            format!("aggregate: values, by migration, u64 becomes {own}"),
            format!("window: values, by migration, u64 becomes {own}"),
        ]
    );
    job.go_on();
    for worker in ["0", "1"] {
        assert_eq!(job.ask(&["kill-worker", worker]).0, 0);
    }
    wait_for("both to be back", || (job.ask(&["status"]).1["restarts"] == 2).then_some(()));
    job.go_on();
    // The types are the program's own now: nothing has to be said about the old ones any more.
    let (code, updated) = job.update("bare");
    assert_eq!((code, &updated["changes"]), (0, &json!([])), "{updated}");
    job.go_on();
    job.check();
}

fn r22_another_type_without_a_migration_is_refused_before_anything_stops() {
    let job = Life::start();
    let before = job.job.workers(2);
    let cases = [
        (
            "bare",
            "operator process: state next is a value of u64, in the new program a value of Wide",
        ),
        ("bare-process", "operator process: state next is a value of u64"),
    ];
    for (program, why) in cases {
        let (code, said) = job.update(program);
        let message = said["message"].as_str().unwrap_or_default();
        assert!(code == 1 && message.contains(why), "{program}: {said}");
        assert!(message.contains(".migrate_from"), "{said}");
    }
    assert_eq!(job.job.workers(2), before, "no worker was touched");
    let report = job.check();
    assert_eq!(report["restarts"], json!([]));
}

fn r22_a_job_that_could_not_go_back_is_refused_before_anything_stops() {
    let at = folder();
    let place = common::text(at.path());
    let job = Cli::new("printing", "").workers(2).env("XDG_RUNTIME_DIR", &place);
    let job = Life { job: job.env("TMPDIR", &place).start(), at };
    wait_for("the job", || (job.ask(&["status"]).0 == 0).then_some(()));
    let (code, said) = job.update("wide");
    let message = said["message"].as_str().unwrap_or_default();
    assert!(code == 1 && message.contains("it migrates values, and if it failed"), "{said}");
    assert!(message.contains("what it printed cannot be taken back"), "{said}");
    assert_eq!(job.ask(&["stop", "--now"]).0, 0);
}

fn r22_a_death_at_any_point_of_a_migration_changes_nothing() {
    use Point::{Committed, Migrated, Migrating, Opened, Settling};
    let some = [(Migrating, 20), (Migrated, 0), (Settling, 0)];
    let all = [
        (Migrating, 0),
        (Migrating, 20),
        (Migrated, 0),
        (Migrated, 2),
        (Opened, 0),
        (Settling, 0),
        (Committed, 0),
        (Committed, 30),
    ];
    for (point, skip) in deep(&all[..], &some[..]).iter().copied() {
        let order = format!("n1:{}:1:{skip}", point.number());
        let job = Life::start_with(|job| job.env(KILL_NEW, &order));
        let (code, updated) = job.update("wide");
        assert_eq!(code, 0, "{point:?}: {updated}");
        job.go_on();
        let report = job.check();
        assert_eq!(report["restarts"].as_array().map(Vec::len), Some(1), "{point:?}: {report}");
    }
}

fn r22_a_program_that_fails_before_its_first_step_leaves_the_old_values_as_they_were() {
    let job = Life::start();
    let why = job.rolled_back("panics-migrating");
    assert!(why.contains("this cannot be migrated"), "{why}");
    job.go_on();
    // Nothing of it is left behind: the next one is taken.
    let (code, updated) = job.update("wide");
    assert_eq!(code, 0, "{updated}");
    job.go_on();
    let report = job.check();
    assert!(report["went_back"].is_null(), "the old values were still there: {report}");
    let job = Life::start();
    let why = job.rolled_back("panics-first");
    assert!(why.contains("this program is broken"), "{why}");
    job.go_on();
    job.check();
}

fn r22_a_program_that_fails_later_takes_its_region_back_to_the_old_values() {
    let all = [
        ("panics-soon", "broken after a while", true),
        ("panics-soon", "broken after a while", false),
        ("hangs-soon", "stuck in a step", true),
    ];
    for (program, expected, saves) in all.into_iter().take(deep(3, 2)) {
        let job = if saves { Life::start_saving(|job| job) } else { Life::start() };
        let why = job.rolled_back(program);
        assert!(why.contains(expected), "{program}: {why}");
        job.go_on();
        if saves {
            job.saves();
        }
        let report = job.check();
        let back = report["went_back"].as_array().expect("an array");
        assert_eq!(back.len(), 1, "{report}");
        assert_eq!(back[0]["checkpoint"].is_null(), !saves, "{report}");
        assert!(back[0]["cause"].as_str().is_some_and(|why| why.contains(expected)), "{report}");
    }
}

fn r22_a_death_on_the_way_back_changes_nothing() {
    for point in Point::REWIND.into_iter().skip(deep(0, 1)).take(deep(3, 1)) {
        let order = format!("s:{}:1", point.number());
        let job = Life::start_saving(|job| job.env(KILL_OLD, &order));
        let before = job.job.supervisor();
        // Who is asked does not live to answer.
        let (code, said) = job.update("panics-soon");
        assert!(code != 0, "{point:?}: {said}");
        wait_for("another supervisor", || {
            let (code, status) = job.ask(&["status"]);
            (code == 0 && status["supervisor"] != before).then_some(())
        });
        job.go_on();
        job.check();
    }
}

fn a_checkpoint_with_the_old_values_is_resumed_through_the_migration() {
    use Point::{Migrated, Migrating, Opened};
    let some = [(None, 3), (Some((Migrated, 1)), 2)];
    let all =
        [(None, 3), (Some((Migrating, 3)), 2), (Some((Migrated, 1)), 2), (Some((Opened, 0)), 3)];
    for (kill, workers) in deep(&all[..], &some[..]).iter().copied() {
        let at = Life::start_saving(|job| job).crash();
        let order = kill.map(|(point, skip)| format!("0:{}:1:{skip}", point.number()));
        let job =
            Life::resume(at, "wide", workers, |job| job.env(KILL_NEW, &order.unwrap_or_default()));
        job.go_on();
        let report = job.check();
        let restarts = report["restarts"].as_array().map(Vec::len);
        assert_eq!(restarts, Some(usize::from(kill.is_some())), "{kill:?}: {report}");
    }
}

fn a_checkpoint_after_a_migration_knows_the_new_types_alone() {
    let job = Life::start_saving(|job| job);
    assert_eq!(job.update("wide").0, 0);
    job.saves();
    let at = job.crash();
    // Without a word about the old types, which nothing has any more.
    let job = Life::resume(at, "bare", 2, |job| job);
    job.go_on();
    job.saves();
    let at = job.crash();
    let ended = Life::life(at.path(), "old").workers(2).args(["--resume"]).run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains("has keys or values of another type"), "{}", ended.err);
    Life::resume(at, "wide", 2, |job| job).check();
}

fn a_checkpoint_with_the_old_values_is_refused_without_a_migration() {
    let at = Life::start_saving(|job| job).crash();
    let ended = Life::life(at.path(), "bare").workers(2).args(["--resume"]).run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains("operator aggregate (uid aggregate)"), "{}", ended.err);
    assert!(ended.err.contains(".migrate_from"), "{}", ended.err);
    // States that are declared by name are looked at by who opens them.
    let ended = Life::life(at.path(), "bare-process").workers(2).args(["--resume"]).run();
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.contains("state next in key group"), "{}", ended.err);
    Life::resume(at, "wide", 2, |job| job).check();
}
