//! HotUpdate: another program takes a running job over, or is refused, or rolled back; results are
//! exact in every case. The programs are this one under other names: what it does depends on the
//! name of its file, as it would on its code.

#![expect(unsafe_code, reason = "sets a variable before any thread is there")]

mod common;

use common::program::{Cli, Started};
use common::tally::{self, Numbered, Tally, numbered};
use common::tool::{said, tool};
use common::{Jobs, deep, folder, process, trials, wait_for};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::control::client;
use testudo::control::folder::candidates;
use testudo::control::protocol::{Reply, Request};
use testudo::prelude::*;
use testudo::serde_json::{self, Value, json};
use testudo::sink::file::Csv;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[("varied", varied)];

/// Kill points for processes of the first program alone, and of any other.
const KILL_OLD: &str = "TESTUDO_TEST_KILL_OLD";
const KILL_NEW: &str = "TESTUDO_TEST_KILL_NEW";

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
            r22_an_update_under_load_keeps_state_and_positions,
            an_updated_job_recovers_with_its_new_program_whatever_becomes_of_the_file,
            an_updated_job_keeps_its_program_when_its_supervisor_dies,
            updates_one_after_the_other_leave_nothing_behind,
            r22_operators_that_keep_nothing_come_and_go_with_an_update,
            r22_what_may_not_change_is_refused_before_anything_stops,
            a_file_that_is_no_job_is_refused,
            a_job_inside_another_program_is_refused,
            a_second_update_meanwhile_is_refused,
            r22_a_program_that_fails_is_rolled_back_and_nothing_is_lost,
            a_program_that_is_stuck_is_rolled_back,
            r22_a_death_at_any_point_of_an_update_changes_nothing,
            r22_a_death_at_any_point_of_a_rollback_changes_nothing,
            r17_a_worker_killed_from_outside_convicts_no_program,
        ],
    )
}

/// Which program this is: "old", or what its file is called.
fn variant() -> String {
    let own = std::env::current_exe().expect("our own path");
    let name = own.file_name().expect("a name").to_string_lossy().into_owned();
    let name = name.trim_end_matches(" (deleted)").to_owned();
    if name.starts_with("updates-") { "old".into() } else { name }
}

fn is_worker_1() -> bool {
    fs::read_to_string("/proc/self/comm").is_ok_and(|name| name.trim_end() == "testudo-w1")
}

/// The self-checking job, in all its variants.
fn varied(flow: &Flow, parameters: &str) {
    let variant = variant();
    let new = flow.counter("new");
    let is_new = u64::from(variant != "old");
    match variant.as_str() {
        "exits-while-planning" => std::process::exit(9),
        "waits-as-worker-1" if is_worker_1() => {
            let own = std::env::current_exe().expect("our own path");
            let begun = std::time::Instant::now();
            while !own.with_file_name("go").exists() && begun.elapsed() < common::PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        "sleeps-while-planning" => std::thread::sleep(Duration::from_secs(600)),
        "another-stage" => {
            flow.source("more", Generator::new(0, |n| n)).for_each(|_| ());
        }
        "another-name" => return shaped(flow, parameters, ("renamed", false), |n| n, |key| key),
        "another-record" => {
            return shaped(flow, parameters, ("process", false), |n| n as u32, u64::from);
        }
        "another-operator" => {
            let (_, output) = parameters.split_once(' ').expect("total and output");
            let numbers = flow.source("numbers", Generator::new(u64::MAX, numbered));
            let mapped = numbers.map(|record| *record).filter(|_| true).name("everyone");
            return tally::tallied(flow, mapped.key_by(|record| record.key), output);
        }
        "another-counter" => drop(flow.counter("more")),
        "another-state" => return shaped(flow, parameters, ("process", true), |n| n, |key| key),
        _ => {}
    }
    let trap = variant.clone();
    tally::checked(flow, parameters, move |n| {
        new.add(is_new);
        match trap.as_str() {
            "panics" => panic!("this program is broken"),
            "panics-in-worker-1" if n % 2 == 1 && n > 0 => panic!("this program is broken"),
            "panics-soon" if COUNT.fetch_add(1, Relaxed) > 200 => panic!("broken after a while"),
            "exits" => std::process::exit(7),
            "hangs" => loop {
                std::thread::park();
            },
            _ => {}
        }
        numbered(n)
    });
}

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static COUNT: AtomicU64 = AtomicU64::new(0);

/// A flow of the same form with other types or names.
fn shaped<T: testudo::shm::record::Record<View = T> + Copy>(
    flow: &Flow,
    parameters: &str,
    (name, is_narrow): (&str, bool),
    make: impl Fn(u64) -> T + 'static,
    key: impl Fn(T) -> u64 + Copy + 'static,
) {
    let (_, output) = parameters.split_once(' ').expect("total and output");
    flow.counter("seen");
    flow.source("numbers", Generator::new(u64::MAX, make))
        .key_by(move |record: &T| key(*record))
        .process(
            move |state| {
                if is_narrow {
                    drop(state.value::<u32>("next"));
                } else {
                    drop(state.value::<u64>("next"));
                }
            },
            |(), _, _| (),
            |(), cx, _| cx.emit(Tally { key: 0, count: 0, wrong: 0 }),
        )
        .name(name)
        .sink("rows", FileSink::new(output, Csv(|row: &Tally| (row.key, row.count, row.wrong))));
    let _ = numbered as fn(u64) -> Numbered;
}

/// A job without an end, and the place where the tool finds it.
struct Updated {
    at: tempfile::TempDir,
    output: PathBuf,
    job: Started,
}

impl Updated {
    fn start() -> Self {
        Self::start_with(|job| job)
    }

    fn start_with(more: impl FnOnce(Cli) -> Cli) -> Self {
        let at = folder();
        let output = at.path().join("rows.csv");
        let place = common::text(at.path());
        let job = Cli::new("varied", &tally::parameters(u64::MAX, &output))
            .workers(2)
            .args(["--report", "json"])
            .env("XDG_RUNTIME_DIR", &place)
            .env("TMPDIR", &place);
        let this = Self { job: more(job).start(), at, output };
        wait_for("the job's records", || {
            let (code, status) = this.ask(&["status"]);
            (code == 0 && status["records_in"].as_u64() > Some(1000)).then_some(())
        });
        this
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

    fn status(&self) -> Value {
        self.ask(&["status"]).1
    }

    /// Lets some more records pass.
    fn go_on(&self) {
        let records = || self.status()["records_in"].as_u64().expect("a number");
        let seen = records();
        wait_for("more records", || (records() > seen + 5000).then_some(()));
    }

    /// Lets a program go on that waits as worker 1.
    fn let_go(&self) {
        fs::write(self.at.path().join("go"), "").expect("room for a file");
    }

    /// What runs as each worker.
    fn programs(&self) -> Vec<PathBuf> {
        wait_for("two workers that run", || {
            let workers = process::workers_of(self.job.pid()).into_iter();
            // One that has died may not be reaped yet.
            let living =
                workers.filter(|pid| process::stat(*pid).is_some_and(|stat| stat.state != 'Z'));
            let programs = living.map(|pid| fs::read_link(format!("/proc/{pid}/exe")).ok());
            let programs: Option<Vec<PathBuf>> = programs.collect();
            programs.filter(|programs| programs.len() == 2)
        })
    }

    /// Drains the job and checks what it has written.
    fn check(self) -> Value {
        assert_eq!(self.ask(&["stop"]).0, 0);
        let ended = self.job.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let report = ended.err.lines().last().expect("the report");
        let report: Value = serde_json::from_str(report).expect("the report");
        tally::check(&self.output, report["records_in"].as_u64().expect("a number"), 2);
        report
    }
}

fn r22_an_update_under_load_keeps_state_and_positions() {
    let job = Updated::start();
    let (code, updated) = job.update("fine");
    assert_eq!((code, &updated["rolled_back"]), (0, &Value::Null), "{updated}");
    assert_eq!(updated["workers"].as_array().map(Vec::len), Some(2), "{updated}");
    assert_eq!(job.status()["update"]["state"], "done");
    let expected = job.at.path().join("fine");
    assert!(job.programs().iter().all(|program| *program == expected), "{:?}", job.programs());
    job.go_on();
    let report = job.check();
    assert_eq!(report["restarts"], json!([]));
    let new = report["counters"]["new"].as_u64();
    assert!(new > Some(0) && new < report["records_in"].as_u64(), "{report}");
}

fn an_updated_job_recovers_with_its_new_program_whatever_becomes_of_the_file() {
    let job = Updated::start();
    assert_eq!(job.update("fine").0, 0);
    let path = job.at.path().join("fine");
    fs::remove_file(&path).expect("ours");
    fs::write(&path, "something else").expect("room");
    for worker in ["0", "1"] {
        assert_eq!(job.ask(&["kill-worker", worker]).0, 0);
    }
    wait_for("both to be back", || (job.status()["restarts"] == 2).then_some(()));
    assert_eq!(job.ask(&["restart"]).0, 0);
    job.go_on();
    let deleted = format!("{} (deleted)", path.display());
    assert!(job.programs().iter().all(|program| *program == Path::new(&deleted)));
    job.check();
}

fn an_updated_job_keeps_its_program_when_its_supervisor_dies() {
    let job = Updated::start();
    assert_eq!(job.update("fine").0, 0);
    let supervisor = job.job.supervisor();
    let held = process::Held::child_of(supervisor, job.job.pid()).expect("it leads");
    assert!(held.signal(libc::SIGKILL));
    wait_for("another supervisor", || {
        let (code, status) = job.ask(&["status"]);
        (code == 0 && status["supervisor"] != supervisor).then_some(())
    });
    for worker in ["0", "1"] {
        assert_eq!(job.ask(&["kill-worker", worker]).0, 0);
    }
    wait_for("both to be back", || (job.status()["restarts"] == 2).then_some(()));
    job.go_on();
    let expected = job.at.path().join("fine");
    assert!(job.programs().iter().all(|program| *program == expected), "{:?}", job.programs());
    assert_eq!(job.update("fine-again").0, 0);
    job.check();
}

fn updates_one_after_the_other_leave_nothing_behind() {
    let job = Updated::start();
    assert_eq!(job.update("fine-0").0, 0);
    let open = process::descriptors(job.job.supervisor());
    for turn in 1..deep(100, 4) {
        let (code, updated) = job.update(&format!("fine-{turn}"));
        assert_eq!(code, 0, "{updated}");
    }
    wait_for("the last ones to have left", || {
        (process::children(job.job.supervisor()).len() == 2).then_some(())
    });
    let now = process::descriptors(job.job.supervisor());
    assert!(now <= open + 1, "{open} descriptors before, {now} after");
    assert_eq!(job.check()["restarts"], json!([]));
}

fn r22_operators_that_keep_nothing_come_and_go_with_an_update() {
    let job = Updated::start();
    let (code, updated) = job.update("another-operator");
    assert_eq!(code, 0, "{updated}");
    let changes = &updated["changes"];
    assert_eq!((&changes[0]["operator"], &changes[0]["what"]), (&json!("map"), &json!("added")));
    assert_eq!(changes[1]["operator"], "everyone");
    job.go_on();
    let (code, updated) = job.update("fine");
    assert_eq!(code, 0, "{updated}");
    assert_eq!(updated["changes"][0]["what"], "removed", "{updated}");
    job.go_on();
    // Positions, state and counters went with their operators.
    let report = job.check();
    assert_eq!(report["counters"]["seen"], report["records_in"], "{report}");
    assert_eq!(report["unaccounted"], 0, "{report}");
}

fn r22_what_may_not_change_is_refused_before_anything_stops() {
    let job = Updated::start();
    let before = job.job.workers(2);
    let cases = [
        ("another-stage", "stages"),
        ("another-name", "removed [\"process\"], added [\"renamed\"]"),
        ("another-record", "records from numbers to"),
        ("another-state", "state next is a value of u64"),
        ("another-counter", "the job's own counters"),
        ("exits-while-planning", "ended (exit code 9) without describing its plan"),
    ];
    for (program, why) in cases {
        let (code, said) = job.update(program);
        let message = said["message"].as_str().unwrap_or_default();
        assert!(code == 1 && message.contains(why), "{program}: {said}");
        assert!(message.contains("the job goes on as it was"), "{said}");
        assert_eq!(job.status()["update"]["state"], "refused");
    }
    assert_eq!(job.job.workers(2), before, "no worker was touched");
    let report = job.check();
    assert_eq!((&report["restarts"], &report["counters"]["new"]), (&json!([]), &json!(0)));
}

fn a_file_that_is_no_job_is_refused() {
    let job = Updated::start();
    let at = job.at.path();
    fs::write(at.join("script"), "#!/bin/sh\ntouch was-run\n").expect("room");
    fs::write(at.join("text"), "text").expect("room");
    fs::set_permissions(at.join("script"), fs::Permissions::from_mode(0o755)).expect("ours");
    fs::copy("/bin/true", at.join("true")).expect("room");
    let cases = [
        ("script", "no program that runs a Testudo job"),
        ("true", "no program that runs a Testudo job"),
        ("text", "not executable"),
        ("nothing", "No such file"),
        (".", "no file"),
    ];
    for (file, why) in cases {
        let (code, said) = job.ask(&["update", &common::text(&at.join(file))]);
        let message = said["message"].as_str().unwrap_or_default();
        assert!(code == 1 && message.contains(why), "{file}: {said}");
    }
    assert!(!Path::new("was-run").exists());
    job.check();
}

fn a_job_inside_another_program_is_refused() {
    let (folder, name) = (folder(), format!("inside-{}", std::process::id()));
    let settings = Settings { name: name.clone(), ..common::settings(2) };
    let output = folder.path().join("rows.csv");
    let running = common::start(varied, &tally::parameters(u64::MAX, &output), settings);
    running.workers().expect("it starts");
    let program = std::env::current_exe().expect("our own path");
    let reply = wait_for("its socket", || {
        client::ask(&candidates(), &name, &Request::Update { program: program.clone() }).ok()
    });
    match reply {
        Reply::Error { message } => assert!(message.contains("inside another"), "{message}"),
        other => panic!("{other:?}"),
    }
    running.stop();
    common::finish(running).expect("it ends");
}

fn a_second_update_meanwhile_is_refused() {
    let job = Updated::start();
    let waiting = job.program("waits-as-worker-1");
    let asked: Vec<_> = std::thread::scope(|scope| {
        let asks = (0..3).map(|_| scope.spawn(|| job.ask(&["update", &waiting])));
        let asks: Vec<_> = asks.collect();
        wait_for("two refusals", || {
            (asks.iter().filter(|ask| ask.is_finished()).count() == 2).then_some(())
        });
        job.let_go();
        asks.into_iter().map(|ask| ask.join().expect("no panic")).collect()
    });
    assert_eq!(asked.iter().filter(|(code, _)| *code == 0).count(), 1, "{asked:?}");
    for (code, said) in asked.iter().filter(|(code, _)| *code != 0) {
        let why = said["message"].as_str().unwrap_or_default();
        assert!(*code == 1 && why.contains("is being updated"), "{said}");
    }
    job.check();
}

/// Updates a job to a program that fails, and checks that the old one goes on; what is said of it.
fn rolled_back(job: &Updated, program: &str) -> String {
    let (code, updated) = job.update(program);
    assert_eq!(code, 5, "{program}: {updated}");
    let status = job.status();
    assert_eq!(status["update"]["state"], "rolled back", "{status}");
    let old = std::env::current_exe().expect("our own path");
    assert!(job.programs().iter().all(|program| *program == old), "{:?}", job.programs());
    updated["rolled_back"].as_str().expect("a reason").to_owned()
}

fn r22_a_program_that_fails_is_rolled_back_and_nothing_is_lost() {
    let job = Updated::start();
    let cases = [
        ("panics", "this program is broken"),
        ("exits", "exit code 7"),
        ("panics-soon", "broken after a while"),
        ("panics-in-worker-1", "this program is broken"),
    ];
    for (program, expected) in cases {
        let why = rolled_back(&job, program);
        assert!(why.contains(expected), "{program}: {why}");
        job.go_on();
    }
    // Nothing of it is left behind: the next one is taken.
    assert_eq!(job.update("fine").0, 0);
    job.check();
}

fn a_program_that_is_stuck_is_rolled_back() {
    let job = Updated::start();
    let why = rolled_back(&job, "hangs");
    assert!(why.contains("stuck in a step"), "{why}");
    job.go_on();
    job.check();
}

fn r22_a_death_at_any_point_of_an_update_changes_nothing() {
    use Point::{Claimed, Committed, Opened, Published, RolledBack};
    let successors = Point::HANDOVER[..3].iter().chain(&[Claimed, RolledBack, Opened, Published]);
    let successors = successors.chain([&Committed]).map(|point| (KILL_NEW, "n1", *point));
    let own = Point::HANDOVER[3..].iter().map(|point| (KILL_OLD, "1", *point));
    for (variable, who, point) in successors.chain(own) {
        let order = format!("{who}:{}:1", point.number());
        let job = Updated::start_with(|job| job.env(variable, &order));
        let (code, updated) = job.update("fine");
        // A successor that never gets so far is no successor.
        let is_never = [Point::Prepared, Point::Waiting, Point::Turn, Claimed].contains(&point);
        assert_eq!(code, if is_never { 5 } else { 0 }, "{point:?}: {updated}");
        job.go_on();
        job.check();
    }
}

fn r22_a_death_at_any_point_of_a_rollback_changes_nothing() {
    use Point::{Claimed, Opened, Published};
    let successors = Point::HANDOVER[..3].iter().chain(&[Claimed, Opened, Published]);
    let successors = successors.map(|point| (KILL_OLD, "n0", *point));
    let own = Point::HANDOVER[3..].iter().map(|point| (KILL_NEW, "n0", *point));
    for (variable, who, point) in successors.chain(own) {
        let order = format!("{who}:{}:1", point.number());
        let job = Updated::start_with(|job| job.env(variable, &order));
        let why = rolled_back(&job, "panics-in-worker-1");
        assert!(why.contains("this program is broken"), "{point:?}: {why}");
        job.go_on();
        job.check();
    }
}

fn r17_a_worker_killed_from_outside_convicts_no_program() {
    let job = Updated::start();
    let (code, updated) = std::thread::scope(|scope| {
        let update = scope.spawn(|| job.update("waits-as-worker-1"));
        wait_for("the first of the new program", || {
            (job.status()["update"]["replaced"] == 1).then_some(())
        });
        assert_eq!(job.ask(&["kill-worker", "0"]).0, 0);
        wait_for("the death to be counted", || (job.status()["restarts"] == 1).then_some(()));
        job.let_go();
        update.join().expect("no panic")
    });
    assert_eq!(code, 0, "{updated}");
    job.go_on();
    let report = job.check();
    assert_eq!(report["restarts"].as_array().map(Vec::len), Some(1), "{report}");
}
