//! Records that kill their worker: they are found, put aside, and everything else is exact. Workers
//! that hang are killed; what ended a worker is told afterwards.

#![expect(unsafe_code, reason = "user code that does what it must not")]

mod common;

use common::process::{Disturber, workers_of};
use common::program::Cli;
use common::tool::{said, tool};
use common::{Jobs, deep, finish, folder, run, settings, sorted_lines, start, text, trials};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use testudo::config::Tier;
use testudo::prelude::*;
use testudo::serde_json::Value;
use testudo::sink::file::Lines;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[
    ("numbers", numbers),
    ("words", words),
    ("firing", firing),
    ("source", source),
    ("file", file),
];

fn main() -> ExitCode {
    testudo::init();
    common::host_on(
        2,
        JOBS,
        trials![
            r17_a_poisoned_record_is_put_aside_and_the_rest_is_exact,
            r17_ten_poisoned_records_are_put_aside,
            r17_a_poisoned_record_in_every_batch_is_put_aside,
            r17_one_record_among_many_costs_five_restarts,
            r17_what_follows_from_a_record_is_put_aside_alone,
            r17_a_record_that_its_source_cannot_make_is_put_aside,
            r17_a_line_of_a_file_is_put_aside_with_its_offset,
            r17_a_record_is_put_aside_though_standbys_take_over,
            r17_kills_from_outside_convict_nobody,
            r13_a_record_is_put_aside_once_whoever_dies_meanwhile,
            r13_a_resumed_job_has_each_record_in_its_dead_letters_once,
            a_fault_without_a_record_fails_clearly,
            a_hung_worker_is_killed_and_its_record_put_aside,
            a_stopped_worker_is_replaced,
            a_pause_of_all_processes_ends_nobody,
            a_post_mortem_names_signal_operator_and_record,
            a_job_that_lacks_records_says_so_with_its_exit_code,
            a_kill_for_want_of_memory_is_the_workers_own_doing,
        ],
    )
}

/// Dies in the way that `how` says.
#[inline(never)]
fn harm(how: &str, n: u64) {
    match how {
        "panic" => panic!("record {n} is poison"),
        "abort" => std::process::abort(),
        // SAFETY: it is not; that is what is tested.
        "fault" => unsafe { std::ptr::without_provenance::<u64>(16).read_volatile() as usize },
        // SAFETY: as above.
        "wild" => unsafe {
            let constant: &'static str = "a constant";
            constant.as_ptr().cast_mut().write_volatile(1);
            0
        },
        "overflow" => overflow(n) as usize,
        "loop" => loop {
            std::hint::spin_loop();
        },
        "sleep" => loop {
            std::thread::sleep(Duration::from_secs(1000));
        },
        // SAFETY: plain system call.
        "stop" => unsafe { libc::raise(libc::SIGSTOP) as usize },
        "hog" => hog(),
        "memory" => {
            let limit = libc::rlimit { rlim_cur: 192 << 20, rlim_max: 192 << 20 };
            // SAFETY: a valid place.
            unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) };
            hog()
        }
        other => panic!("no harm is called {other}"),
    };
}

/// Takes memory until there is none, 4 GiB at most.
fn hog() -> usize {
    let mut all = Vec::new();
    for _ in 0..64 {
        all.push(std::hint::black_box(vec![1u8; 64 << 20]));
    }
    all.len()
}

#[inline(never)]
fn overflow(n: u64) -> u64 {
    let large = std::hint::black_box([n; 512]);
    if n == u64::MAX { 0 } else { overflow(std::hint::black_box(n + 1)) + large[7] }
}

/// `how every total output`: every record whose number leaves a third of `every` is poison.
struct Poison {
    how: String,
    every: u64,
    total: u64,
    output: String,
}

fn poison(parameters: &str) -> Poison {
    let mut words = parameters.split(' ');
    let mut next = || words.next().expect("four words");
    let (how, every, total) = (next().into(), next(), next());
    let number = |text: &str| text.parse().expect("a number");
    Poison { how, every: number(every), total: number(total), output: next().into() }
}

impl Poison {
    fn is(&self, n: u64) -> bool {
        n % self.every == self.every / 3
    }
}

fn numbers(flow: &Flow, parameters: &str) {
    let poison = poison(parameters);
    let output = poison.output.clone();
    flow.source("numbers", Generator::new(poison.total, |n| n))
        .key_by(|n| *n)
        .stream()
        .map(move |n| {
            if poison.is(*n) {
                harm(&poison.how, *n);
            }
            *n
        })
        .name("risky")
        .sink("out", FileSink::new(output, Lines(|n: &u64| *n)));
}

/// Ten words of each line go on; one of them may be poison.
fn words(flow: &Flow, parameters: &str) {
    let poison = poison(parameters);
    let output = poison.output.clone();
    flow.source("lines", Generator::new(poison.total / 10, |n| n))
        .flat_map(|line| (*line * 10..*line * 10 + 10).collect::<Vec<u64>>())
        .key_by(|n| *n)
        .stream()
        .map(move |n| {
            if poison.is(*n) {
                harm(&poison.how, *n);
            }
            *n
        })
        .name("risky")
        .sink("out", FileSink::new(output, Lines(|n: &u64| *n)));
}

/// The source itself dies.
fn source(flow: &Flow, parameters: &str) {
    let poison = poison(parameters);
    let output = poison.output.clone();
    let make = move |n| {
        if poison.is(n) {
            harm(&poison.how, n);
        }
        n
    };
    let total = self::poison(parameters).total;
    flow.source("numbers", Generator::new(total, make))
        .sink("out", FileSink::new(output, Lines(|n: &u64| *n)));
}

/// Lines of the file beside the output.
fn file(flow: &Flow, parameters: &str) {
    let poison = poison(parameters);
    let output = poison.output.clone();
    flow.source("lines", FileSource::lines([format!("{output}.in")]))
        .map(move |line| {
            let n = line.parse().expect("a number");
            if poison.is(n) {
                harm(&poison.how, n);
            }
            n
        })
        .sink("out", FileSink::new(output, Lines(|n: &u64| *n)));
}

/// A window that dies when it fires.
fn firing(flow: &Flow, parameters: &str) {
    let poison = poison(parameters);
    let how = poison.how.clone();
    flow.source("numbers", Generator::new(poison.total, |n| n))
        .event_time(Duration::ZERO, |n| *n as i64)
        .key_by(|n| n % 3)
        .window(tumbling(Duration::from_millis(1000)), |n| *n as i64)
        .aggregate(
            || 0u64,
            |count, _| *count += 1,
            |into, other| *into += other,
            move |_, _, count| {
                harm(&how, 0);
                *count
            },
        )
        .name("count")
        .for_each(|_| ());
}

/// A place for outputs, and the settings with dead letters there.
fn place(folder: &Path, workers: usize) -> (String, Settings) {
    let letters = Some(folder.join("letters"));
    (text(&folder.join("out")), Settings { dead_letters: letters, ..settings(workers) })
}

/// The lines of the dead-letter file.
fn letters(folder: &Path) -> Vec<Value> {
    let all = fs::read_to_string(folder.join("letters")).unwrap_or_default();
    all.lines().map(|line| testudo::serde_json::from_str(line).expect("JSON")).collect()
}

/// The number that a letter's bytes are.
fn number(letter: &Value) -> u64 {
    let hex = letter["bytes"].as_str().expect("bytes");
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    u64::from_le_bytes([0, 2, 4, 6, 8, 10, 12, 14].map(byte))
}

/// All but the poisoned ones are out, once each.
fn assert_exact(folder: &Path, every: u64, total: u64) {
    let mut expected: Vec<String> =
        (0..total).filter(|n| n % every != every / 3).map(|n| n.to_string()).collect();
    expected.sort_unstable();
    let found = sorted_lines(&folder.join("out"));
    assert_eq!(found.len(), expected.len());
    assert!(found == expected, "other records than those");
}

/// Each poisoned record has one letter.
fn assert_letters(folder: &Path, every: u64, total: u64) {
    let mut found: Vec<u64> = letters(folder).iter().map(number).collect();
    found.sort_unstable();
    let expected: Vec<u64> = (every / 3..total).step_by(every as usize).collect();
    assert_eq!(found, expected);
}

fn poisoned(build: common::Build, how: &str, every: u64, total: u64, workers: usize) -> Report {
    let folder = folder();
    let (output, mut settings) = place(folder.path(), workers);
    if ["loop", "sleep", "stop"].contains(&how) {
        settings.hang_timeout = Duration::from_millis(400);
    }
    let report = run(build, &format!("{how} {every} {total} {output}"), settings);
    assert_exact(folder.path(), every, total);
    assert_letters(folder.path(), every, total);
    assert_eq!(report.dead_lettered, letters(folder.path()).len() as u64);
    report
}

fn r17_a_poisoned_record_is_put_aside_and_the_rest_is_exact() {
    for how in ["panic", "abort", "fault", "wild", "overflow", "memory"] {
        for workers in [1, 2] {
            let report = poisoned(numbers, how, 30_000, 20_000, workers);
            assert!(report.restarts.len() <= 5, "{how}: {:?}", report.restarts);
        }
    }
}

fn r17_ten_poisoned_records_are_put_aside() {
    let report = poisoned(numbers, "fault", 3_000, 30_000, 2);
    assert_eq!(report.dead_lettered, 10);
}

fn r17_a_poisoned_record_in_every_batch_is_put_aside() {
    poisoned(numbers, "abort", 400, 8_000, 1);
}

fn r17_one_record_among_many_costs_five_restarts() {
    let total = deep(10_000_000, 1_000_000);
    let report = poisoned(numbers, "fault", total, total, 2);
    assert!(report.restarts.len() <= 5, "{:?}", report.restarts);
}

fn r17_what_follows_from_a_record_is_put_aside_alone() {
    for workers in [1, 2] {
        let report = poisoned(words, "panic", 10_000, 20_000, workers);
        assert_eq!(report.dead_lettered, 2);
    }
}

fn r17_a_record_that_its_source_cannot_make_is_put_aside() {
    let folder = folder();
    let (output, settings) = place(folder.path(), 2);
    run(source, &format!("panic 5000 20000 {output}"), settings);
    assert_exact(folder.path(), 5_000, 20_000);
    let origins: BTreeSet<String> = letters(folder.path())
        .iter()
        .map(|letter| letter["origin"].as_str().expect("an origin").to_owned())
        .collect();
    let expected = [1666, 6666, 11_666, 16_666].map(|n| format!("numbers, number {n}"));
    assert_eq!(origins, expected.into_iter().collect());
}

fn r17_a_line_of_a_file_is_put_aside_with_its_offset() {
    let folder = folder();
    let (output, settings) = place(folder.path(), 1);
    let lines: String = (0..10_000).map(|n| format!("{n}\n")).collect();
    let offset = lines.find("\n6666\n").expect("a line") + 1;
    fs::write(format!("{output}.in"), &lines).expect("room for a file");
    run(file, &format!("fault 10000 10000 {output}"), settings.clone());
    assert_exact(folder.path(), 10_000, 10_000);
    run(file, &format!("fault 5000 10000 {output}"), settings);
    assert_exact(folder.path(), 5_000, 10_000);
    let all = letters(folder.path());
    assert_eq!(all.len(), 2, "those of the run before are withdrawn: {all:?}");
    assert_eq!(all[1]["text"], "6666");
    let origin = all[1]["origin"].as_str().expect("an origin");
    assert_eq!(origin, format!("lines, {output}.in at byte {offset}"));
}

fn r17_a_record_is_put_aside_though_standbys_take_over() {
    let cases = [("fault", "SIGSEGV", 2_500), ("loop", "no step finished for", 20_000)];
    for (how, why, every) in cases {
        let folder = folder();
        let (output, settings) = place(folder.path(), 2);
        let hang_timeout = Duration::from_millis(if how == "loop" { 600 } else { 60_000 });
        let settings = Settings { hang_timeout, restart_budget: 50, ..settings };
        // It lasts a while, so that there are standbys.
        let settings = Settings { rate: Some(5_000), tier: Some(Tier::Standby), ..settings };
        let report = run(numbers, &format!("{how} {every} 20000 {output}"), settings);
        assert_exact(folder.path(), every, 20_000);
        assert_letters(folder.path(), every, 20_000);
        let is_told = report.restarts.iter().all(|restart| restart.why.starts_with(why));
        assert!(is_told, "{:?}", report.restarts);
        let by_standby = report.restarts.iter().filter(|restart| restart.tier == Tier::Standby);
        assert!(by_standby.count() > 0, "{:?}", report.restarts);
    }
}

fn r17_kills_from_outside_convict_nobody() {
    let folder = folder();
    let (output, settings) = place(folder.path(), 2);
    // It lasts long enough to be killed many times.
    let settings = Settings { restart_budget: 1000, rate: Some(200_000), ..settings };
    let total = 400_000;
    let running = start(numbers, &format!("fault 300000 {total} {output}"), settings);
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 5);
    let mut kills = 0;
    while !running.is_over() && kills < 60 {
        disturber.kill(kills % 2);
        kills += 1;
    }
    let report = finish(running).expect("the job survives");
    assert_exact(folder.path(), 300_000, total);
    assert_letters(folder.path(), 300_000, total);
    assert!(report.restarts.len() > 2 * 5, "{kills} kills");
}

fn r13_a_record_is_put_aside_once_whoever_dies_meanwhile() {
    for point in Point::CAREFUL {
        for skip in [0, 1] {
            let folder = folder();
            let output = text(&folder.path().join("out"));
            let letters = text(&folder.path().join("letters"));
            // The third life is the first with care; the sixth puts the record aside. One of the
            // points is the supervisor's.
            let (who, lives) = if point == Point::LetterTaken { ("s", 1) } else { ("0", 9) };
            let order = format!("{who}:{}:{lives}:{skip}", point.number());
            let ended = Cli::new("numbers", &format!("fault 700 1500 {output}"))
                .workers(1)
                .args(["--report", "json", "--dead-letters", &letters, "--max-restarts", "50"])
                .env(KILL_AT, &order)
                .run();
            assert_eq!(ended.code, Some(7), "{point:?}: {}", ended.err);
            assert_exact(folder.path(), 700, 1500);
            assert_letters(folder.path(), 700, 1500);
        }
    }
}

fn r13_a_resumed_job_has_each_record_in_its_dead_letters_once() {
    let folder = folder();
    let output = text(&folder.path().join("out"));
    let (letters, checkpoints) =
        (text(&folder.path().join("letters")), text(&folder.path().join("checkpoints")));
    let job = |resume: &str| {
        Cli::new("numbers", &format!("fault 4000 40000 {output}")).workers(2).own_group().args([
            "--dead-letters",
            &letters,
            "--checkpoint-dir",
            &checkpoints,
            "--checkpoint-interval",
            "20ms",
            resume,
        ])
    };
    // The whole job dies with a letter in the file that no checkpoint holds, or some do.
    let order = |skip| format!("s:{}:1:{skip}:all", Point::LetterTaken.number());
    let first = job("--no-progress").env(KILL_AT, &order(2)).run();
    assert_eq!(first.signal, Some(libc::SIGKILL), "{}", first.err);
    assert_eq!(self::letters(folder.path()).len(), 3);
    let second = job("--resume").env(KILL_AT, &order(3)).run();
    assert_eq!(second.signal, Some(libc::SIGKILL), "{}", second.err);
    let last = job("--resume").run();
    assert_eq!(last.code, Some(7), "{}", last.err);
    assert_exact(folder.path(), 4_000, 40_000);
    assert_letters(folder.path(), 4_000, 40_000);
}

fn a_fault_without_a_record_fails_clearly() {
    let ended =
        Cli::new("firing", "fault 1 10000 -").workers(1).args(["--max-restarts", "5"]).run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert!(ended.err.contains("without a record"), "{}", ended.err);
    assert!(ended.err.contains("count"), "the operator is named: {}", ended.err);
}

fn a_hung_worker_is_killed_and_its_record_put_aside() {
    for how in ["loop", "sleep", "stop"] {
        let report = poisoned(numbers, how, 30_000, 20_000, 2);
        assert!(report.restarts.iter().all(|restart| restart.why.contains("no step finished")));
    }
}

fn a_stopped_worker_is_replaced() {
    let folder = folder();
    let (output, settings) = place(folder.path(), 2);
    // Longer than a busy machine keeps a worker waiting that sleeps; the job lasts longer still.
    let hang_timeout = Duration::from_secs(3);
    let settings = Settings { rate: Some(10_000), hang_timeout, ..settings };
    let running = start(numbers, &format!("fault 300000 40000 {output}"), settings);
    let view = running.workers().expect("the job starts");
    common::wait_for("some work", || {
        let commits = &view.workers[1].commits;
        (commits.load(testudo::shm::primitive::Ordering::Acquire) > 10).then_some(())
    });
    assert!(common::process::signal_worker(view.workers[1], libc::SIGSTOP));
    let report = finish(running).expect("the job survives");
    assert_exact(folder.path(), 300_000, 40_000);
    assert_eq!(report.restarts.len(), 1, "{:?}", report.restarts);
    assert_eq!(report.dead_lettered, 0);
}

fn a_pause_of_all_processes_ends_nobody() {
    let folder = folder();
    let output = text(&folder.path().join("out"));
    let job = Cli::new("numbers", &format!("fault 90000 30000 {output}")).workers(2).own_group();
    let args = ["--rate", "40000", "--report", "json", "--hang-timeout", "3s"];
    let job = job.args(args).args(["--dead-letters", &text(&folder.path().join("l"))]).start();
    let workers = job.workers(2);
    for _ in 0..2 {
        job.signal_group(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(3500));
        job.signal_group(libc::SIGCONT);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(workers_of(job.pid()).iter().all(|worker| workers.contains(worker)));
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert_eq!(ended.restarts(), 0, "{}", ended.err);
}

/// Runs a job that has a record of this kind of poison, and asks for its post-mortems while it
/// still runs.
fn post_mortems(how: &str) -> Vec<Value> {
    let folder = folder();
    let output = text(&folder.path().join("out"));
    let letters = text(&folder.path().join("letters"));
    let job = Cli::new("numbers", &format!("{how} 30000 1000000 {output}")).workers(1);
    // Telling a panic's stack takes a while on a busy machine.
    let hang_timeout = if how == "loop" { "2s" } else { "1m" };
    let args = ["--rate", "50000", "--hang-timeout", hang_timeout, "--dead-letters", &letters];
    let at = text(folder.path());
    let job = job.args(args).args(["--name", "sick"]).env("XDG_RUNTIME_DIR", &at).start();
    common::wait_for("a letter", || (!self::letters(folder.path()).is_empty()).then_some(()));
    let (code, out, err) = said(&tool(folder.path(), &["postmortem", "sick", "--json"]));
    assert_eq!(code, 0, "{err}");
    let (code, shown, err) = said(&tool(folder.path(), &["postmortem", "sick"]));
    assert_eq!(code, 0, "{err}");
    assert!(shown.contains("operator  risky"), "{shown}");
    job.signal(libc::SIGINT);
    job.wait();
    let answer: Value = testudo::serde_json::from_str(&out).expect("JSON");
    let kinds = answer["events"].as_array().expect("events").iter();
    let kinds: BTreeSet<&str> = kinds.filter_map(|event| event["kind"].as_str()).collect();
    assert!(
        kinds.is_superset(&["warm", "careful", "convicted", "dead-letter"].into()),
        "{kinds:?}"
    );
    answer["deaths"].as_array().expect("deaths").clone()
}

fn a_post_mortem_names_signal_operator_and_record() {
    let cases = [
        ("panic", "panic", "harm"),
        ("abort", "abort", "harm"),
        ("fault", "SIGSEGV at 0x10", "harm"),
        ("overflow", "SIGSEGV: the stack overflowed", "overflow"),
        ("loop", "no step finished for ", "harm"),
    ];
    for (how, cause, frame) in cases {
        let deaths = post_mortems(how);
        for death in &deaths {
            assert!(death["cause"].as_str().expect("a cause").starts_with(cause), "{death}");
            assert_eq!(death["own_doing"], true);
            assert_eq!(death["operator"], "risky", "{death}");
            let stack = death["backtrace"].as_array().expect("a stack");
            let names = |line: &Value| line.as_str().is_some_and(|line| line.contains(frame));
            // One that hangs is killed when it does not tell soon, as on a busy machine.
            let is_silent = how == "loop" && stack.is_empty();
            assert!(is_silent || stack.iter().any(names), "{how}: {stack:#?}");
        }
        let told = |d: &Value| d["backtrace"].as_array().is_some_and(|stack| !stack.is_empty());
        assert!(deaths.iter().any(told), "{how}: nobody told");
        // The next record of that kind may have come meanwhile.
        let is_first = |d: &Value| {
            d["record"].as_str().is_some_and(|r| r.split(',').nth(1) == Some(" number 10000"))
        };
        let alone: Vec<&Value> = deaths
            .iter()
            .filter(|d| d["doing"] == "processing one record" && is_first(d))
            .collect();
        assert_eq!(alone.len(), 3, "{how}");
        let record = alone[0]["record"].as_str().expect("a record");
        assert!(record.starts_with("numbers, number 10000"), "{record}");
        if how == "panic" {
            let message = deaths[0]["message"].as_str().expect("a message");
            assert!(message.contains("record 10000 is poison"), "{message}");
        }
    }
}

fn a_job_that_lacks_records_says_so_with_its_exit_code() {
    let folder = folder();
    let output = text(&folder.path().join("out"));
    let job = |more: &'static [&'static str]| {
        let job = Cli::new("numbers", &format!("fault 3000 9000 {output}")).workers(2);
        job.args(["--name", "lacking"]).args(more.iter().copied()).run()
    };
    let ended = job(&["--report", "json"]);
    assert_eq!(ended.code, Some(7), "{}", ended.err);
    let beside = folder.path().join("lacking.dead-letters.jsonl");
    assert_eq!(fs::read_to_string(&beside).expect("beside the output").lines().count(), 3);
    assert!(ended.err.contains("the results lack 3 records"), "{}", ended.err);
    let line = ended.err.lines().find(|line| line.starts_with('{')).expect("a report");
    let report: Value = testudo::serde_json::from_str(line).expect("JSON");
    assert_eq!(report["dead_lettered"], 3);
    assert_eq!(report["dead_letters"], text(&beside));
    let ended = job(&["--completeness", "partial"]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("  3 records put aside: "), "{}", ended.err);
}

/// A cgroup with little memory, gone afterwards; `None` where this user may make none.
struct Group(std::path::PathBuf);

impl Group {
    fn new(bytes: u64) -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let of = |controllers: &str| {
            let line = groups.lines().find(|line| line.split(':').nth(1) == Some(controllers))?;
            Some(line.rsplit(':').next()?.trim_matches('/').to_owned())
        };
        let (root, limit) = match of("memory") {
            Some(path) => (format!("/sys/fs/cgroup/memory/{path}"), "memory.limit_in_bytes"),
            None => (format!("/sys/fs/cgroup/{}", of("")?), "memory.max"),
        };
        let group = Self(Path::new(&root).join(format!("testudo-test-{}", std::process::id())));
        fs::create_dir(&group.0).ok()?;
        fs::write(group.0.join(limit), bytes.to_string()).ok()?;
        // Swap would only make it slower, where there is any.
        let _ = fs::write(group.0.join("memory.swap.max"), "0");
        Some(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process may take a moment to leave it.
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn a_kill_for_want_of_memory_is_the_workers_own_doing() {
    let Some(group) = Group::new(256 << 20) else {
        eprintln!("skipped: this user may make no cgroup with a memory limit");
        return;
    };
    let folder = folder();
    let (output, letters) =
        (text(&folder.path().join("out")), text(&folder.path().join("letters")));
    let enter = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.0.display());
    let job = Cli::new("numbers", &format!("hog 3000 2000 {output}")).workers(1);
    let job = job.args(["--report", "json", "--dead-letters", &letters]).under(&enter);
    let ended = job.run();
    assert_eq!(ended.code, Some(7), "{}", ended.err);
    assert_exact(folder.path(), 3_000, 2_000);
    assert_letters(folder.path(), 3_000, 2_000);
    assert!(ended.err.contains("out of memory"), "{}", ended.err);
}
