//! Beginning and end of a job: signals, the death of the launching process, failures in user code,
//! and what is left behind, which is nothing.

mod common;

use common::process::{Disturber, Held, own_group_and_session, signal_worker, stat, workers_of};
use common::program::{Cli, Started};
use common::tally::{self, ordered};
use common::{
    Jobs, finish, folder, run_failing, settings, sorted_lines, start, text, trials, wait_for,
};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::shm::header::WorkerState;
use testudo::sink::file::Lines;

const JOBS: Jobs = &[
    ("ordered", ordered),
    ("windows", windows),
    ("stuck", stuck),
    ("poisoned", poisoned),
    ("unlucky", unlucky),
    ("leaving", leaving),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            an_interrupt_drains_the_job,
            a_termination_drains_the_job,
            an_interrupt_from_the_terminal_drains_the_job,
            a_second_signal_stops_at_once,
            a_terminals_interrupt_at_any_time_of_the_start_ends_the_job_cleanly,
            an_embedded_job_is_drained_and_stopped_on_request,
            a_job_is_drained_while_its_workers_are_being_replaced,
            a_job_is_drained_before_it_has_read_anything,
            r5_a_drain_takes_in_everything_that_was_sent_before_it,
            r3_workers_do_not_outlive_a_killed_launcher,
            all_workers_are_reaped_before_the_launcher_ends,
            nothing_is_left_in_shared_memory,
            workers_stay_in_the_launchers_session_and_group,
            processes_are_named_after_what_they_do,
            each_segment_is_writable_in_one_process_only,
            a_record_that_always_panics_ends_the_job_with_the_panics_words,
            an_operator_that_panics_once_is_recovered_from,
            last_words_are_those_of_the_life_that_said_them,
            a_worker_that_leaves_by_itself_has_died,
            a_failure_ends_the_job_with_the_operators_name,
            deaths_of_workers_that_lived_long_without_work_do_not_end_the_job,
            a_worker_that_is_stopped_when_all_is_done_does_not_hold_up_the_end,
        ],
    )
}

/// Windows that nothing but the end of input makes fire.
fn windows(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .key_by(|n| n % 100)
        .window(tumbling(Duration::from_secs(1_000_000)), |n| (*n % 1000) as i64)
        .aggregate(
            || 0u64,
            |count, _| *count += 1,
            |into, other| *into += other,
            |_, _, count| *count,
        )
        .sink("counts", FileSink::new(output, Lines(|count: &u64| *count)));
}

/// Starts the job of windows and waits until it has read something.
fn started(output: &Path) -> Started {
    let job = Cli::new("windows", &text(output)).workers(2);
    let job = job.args(["--rate", "100000", "--report", "json"]).own_group().start();
    job.working(2);
    job
}

/// All that was read is in the windows that the drain made fire.
fn assert_drained(job: Started, output: &Path) {
    let ended = job.wait();
    let report = ended.report();
    let counts: u64 =
        sorted_lines(output).iter().map(|line| line.parse::<u64>().expect("a count")).sum();
    assert!(counts > 0);
    assert_eq!(report["records_in"], counts);
    assert_eq!(report["restarts"].as_array().map(Vec::len), Some(0));
}

fn an_interrupt_drains_the_job() {
    let folder = folder();
    let output = folder.path().join("counts");
    let job = started(&output);
    job.signal(libc::SIGINT);
    assert_drained(job, &output);
}

fn a_termination_drains_the_job() {
    let folder = folder();
    let output = folder.path().join("counts");
    let job = started(&output);
    job.signal(libc::SIGTERM);
    assert_drained(job, &output);
}

fn an_interrupt_from_the_terminal_drains_the_job() {
    let folder = folder();
    let output = folder.path().join("counts");
    let job = started(&output);
    job.signal_group(libc::SIGINT);
    assert_drained(job, &output);
}

/// Takes for ever over each record; a file says that it has begun to.
fn stuck(flow: &Flow, marker: &str) {
    let marker = marker.to_owned();
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).round_robin().for_each(move |_| {
        fs::write(&marker, "").expect("room for a file");
        std::thread::sleep(Duration::from_secs(3600));
    });
}

fn a_second_signal_stops_at_once() {
    for second in [libc::SIGINT, libc::SIGTERM] {
        let folder = folder();
        let marker = folder.path().join("marker");
        let job = Cli::new("stuck", &text(&marker)).workers(2).start();
        let workers = job.workers(2);
        // A drain before anything is read would end the job at once.
        wait_for("a record that takes for ever", || marker.exists().then_some(()));
        job.signal(libc::SIGINT);
        // Two signals of one number that come together are one to the kernel: the first must have
        // been read.
        wait_for("the first signal to be taken", || {
            let pending = common::process::pending_signals(job.pid())?;
            (pending & (1 << (libc::SIGINT - 1)) == 0).then_some(())
        });
        job.signal(second);
        let ended = job.wait();
        assert_eq!(ended.code, Some(130));
        assert_eq!(ended.err, "job: stopped before the end, on request\n");
        assert!(workers.iter().all(|pid| stat(*pid).is_none()), "workers are left");
    }
}

/// Interrupts a job's whole group at another moment of its start each time: before it minds
/// signals, between its workers, while they plan and attach.
fn a_terminals_interrupt_at_any_time_of_the_start_ends_the_job_cleanly() {
    let folder = folder();
    let output = folder.path().join("counts");
    let (mut drained, mut ended_by_signal) = (0, 0);
    for round in 0..common::deep(400, 40) {
        let _ = fs::remove_file(&output);
        let job = Cli::new("windows", &text(&output)).workers(3);
        let job = job.args(["--rate", "1000", "--report", "json"]).own_group().start();
        let started = || held(&job).len() as u64;
        wait_for("some of its workers", || (started() >= round % 4).then_some(()));
        // Not proof of anything: it only spreads the signals over the start.
        std::thread::sleep(Duration::from_micros(round % 13 * 300));
        let seen = held(&job);
        job.signal_group(libc::SIGINT);
        let pid = job.pid();
        let ended = job.wait();
        if ended.signal == Some(libc::SIGINT) {
            // It did not mind signals yet, and so had no workers.
            ended_by_signal += 1;
        } else {
            assert_eq!(ended.restarts(), 0, "a worker died of the group's signal: {}", ended.err);
            drained += 1;
        }
        wait_for("the workers to end", || seen.iter().all(Held::has_ended).then_some(()));
        assert!(workers_of(pid).is_empty());
    }
    assert!(drained >= 3 * ended_by_signal, "{drained} drained, {ended_by_signal} ended by it");
}

/// Whoever is started by a job by now.
fn held(job: &Started) -> Vec<Held> {
    let own = common::process::children(job.pid());
    let theirs = own.iter().flat_map(|pid| common::process::children(*pid)).collect::<Vec<_>>();
    own.into_iter().chain(theirs).filter_map(|pid| Held::child_of(pid, job.pid())).collect()
}

fn an_embedded_job_is_drained_and_stopped_on_request() {
    let folder = folder();
    let output = folder.path().join("counts");
    let running = start(windows, &text(&output), settings(2));
    let view = running.workers().expect("the job starts");
    let disturber = Disturber::new(&running, &view, 1);
    assert!(disturber.settle(0) && disturber.settle(1));
    running.stop();
    let report = finish(running).expect("a drained job ended well");
    let counts: u64 =
        sorted_lines(&output).iter().map(|line| line.parse::<u64>().expect("a count")).sum();
    assert_eq!(report.records_in, counts);

    let marker = folder.path().join("marker");
    let running = start(stuck, &text(&marker), settings(2));
    let _view = running.workers().expect("the job starts");
    wait_for("a record that takes for ever", || marker.exists().then_some(()));
    running.stop();
    running.stop();
    let error = finish(running).expect_err("it was stopped");
    assert_eq!(
        (error.to_string().as_str(), error.exit_code()),
        ("stopped before the end, on request", 130)
    );
}

fn a_job_is_drained_while_its_workers_are_being_replaced() {
    for round in 0..common::deep(50, 8) {
        let folder = folder();
        let output = folder.path().join("rows");
        let running = start(ordered, &tally::parameters(u64::MAX, &output), settings(2));
        let view = running.workers().expect("the job starts");
        let mut disturber = Disturber::new(&running, &view, round);
        assert!(disturber.settle(0) && disturber.settle(1));
        if round % 2 == 0 {
            running.stop();
        }
        disturber.kill_now(0);
        disturber.kill_now(1);
        if round % 2 == 1 {
            running.stop();
        }
        let report = finish(running).expect("the job survives");
        tally::check(&output, report.records_in, 2);
    }
}

fn a_job_is_drained_before_it_has_read_anything() {
    let folder = folder();
    let output = folder.path().join("rows");
    for _ in 0..10 {
        let running = start(ordered, &tally::parameters(u64::MAX, &output), settings(2));
        running.stop();
        let report = finish(running).expect("a drained job ended well");
        tally::check(&output, report.records_in, 2);
    }
}

fn r5_a_drain_takes_in_everything_that_was_sent_before_it() {
    let folder = folder();
    let output = folder.path().join("rows");
    for round in 0..common::deep(300, 30) {
        let running = start(ordered, &tally::parameters(u64::MAX, &output), settings(3));
        let view = running.workers().expect("the job starts");
        assert!(Disturber::new(&running, &view, round).settle(round as usize % 3));
        running.stop();
        let report = finish(running).expect("a drained job ended well");
        tally::check(&output, report.records_in, 3);
    }
}

fn held_workers(job: &Started, count: usize) -> Vec<Held> {
    let hold = |pid: &u32| Held::child_of(*pid, job.pid()).expect("a worker of the job");
    job.workers(count).iter().map(hold).collect()
}

fn r3_workers_do_not_outlive_a_killed_launcher() {
    let folder = folder();
    let output = folder.path().join("rows");
    for stopped in [false, true] {
        let parameters = tally::parameters(u64::MAX, &output);
        let job = Cli::new("ordered", &parameters).workers(3).args(["--rate", "10000"]).start();
        job.working(3);
        let workers = held_workers(&job, 3);
        if stopped {
            assert!(workers[1].signal(libc::SIGSTOP));
        }
        job.signal(libc::SIGKILL);
        wait_for("the workers to end", || workers.iter().all(Held::has_ended).then_some(()));
        assert_eq!(job.wait().signal, Some(libc::SIGKILL));
    }
}

fn all_workers_are_reaped_before_the_launcher_ends() {
    let folder = folder();
    let output = folder.path().join("rows");
    for kill in [false, true] {
        let parameters = tally::parameters(u64::MAX, &output);
        let job = Cli::new("ordered", &parameters).workers(3).args(["--rate", "10000"]).start();
        let before = job.workers(3);
        if kill {
            for worker in held_workers(&job, 3) {
                worker.signal(libc::SIGKILL);
            }
        }
        job.signal(libc::SIGINT);
        let ended = job.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert!(before.iter().all(|pid| stat(*pid).is_none()), "workers are left: {before:?}");
    }
    run_failing(poisoned, "", Settings { restart_budget: 1, ..settings(2) });
    assert!(workers_of(std::process::id()).is_empty(), "workers are left after a failure");
}

fn nothing_is_left_in_shared_memory() {
    let ours = || {
        let names = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter(|name| name.contains("testudo") || name.contains("trace-me"))
            .collect::<Vec<_>>()
    };
    let before = ours();
    let folder = folder();
    let output = folder.path().join("rows");
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let parameters = tally::parameters(u64::MAX, &output);
        let job = Cli::new("ordered", &parameters).workers(2).args(["--name", "trace-me"]).start();
        let workers = held_workers(&job, 2);
        assert_eq!(ours(), before, "while it runs");
        job.signal(signal);
        job.wait();
        wait_for("the workers to end", || workers.iter().all(Held::has_ended).then_some(()));
        assert_eq!(ours(), before, "after signal {signal}");
    }
}

fn workers_stay_in_the_launchers_session_and_group() {
    let own = own_group_and_session();
    let job = Cli::new("stuck", "").workers(2).start();
    for pid in job.workers(2) {
        let stat = stat(pid).expect("a worker");
        assert_eq!((stat.group, stat.session), own);
    }
    job.signal(libc::SIGKILL);
    job.wait();
}

fn processes_are_named_after_what_they_do() {
    let job = Cli::new("stuck", "").workers(3).start();
    let mut names: Vec<String> =
        job.workers(3).into_iter().map(|pid| stat(pid).expect("a worker").name).collect();
    names.sort_unstable();
    assert_eq!(names, ["testudo-w0", "testudo-w1", "testudo-w2"]);
    assert_eq!(stat(job.supervisor()).expect("the supervisor").name, "testudo-sup");
    // The launched process is found by the name that it was launched under.
    let launched = stat(job.pid()).expect("the keeper").name;
    assert_eq!(launched, stat(std::process::id()).expect("this program").name);
    for pid in job.workers(3).into_iter().chain([job.supervisor()]) {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("a worker");
        assert!(line.starts_with("testudo-w") || line.starts_with("testudo-sup"), "{line:?}");
    }
    job.signal(libc::SIGKILL);
    job.wait();
}

/// Segments of a job that a process has mapped, by name, with whether it may write them.
fn segments(pid: u32) -> Vec<(String, bool)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a living process");
    let mut found = Vec::new();
    for line in maps.lines() {
        if let Some((head, name)) = line.split_once("/memfd:") {
            let rights = head.split_whitespace().nth(1).unwrap_or_default();
            assert!(!rights.contains('x'), "executable: {line}");
            found.push((name.replace(" (deleted)", ""), rights.contains('w')));
        }
    }
    found
}

fn each_segment_is_writable_in_one_process_only() {
    let folder = folder();
    let job = started(&folder.path().join("counts"));
    let mut writers: std::collections::BTreeMap<String, Vec<u32>> =
        std::collections::BTreeMap::new();
    let workers = job.workers(2);
    let supervisor = job.supervisor();
    assert!(segments(job.pid()).is_empty(), "the keeper looks into no segment");
    for pid in workers.iter().copied().chain([supervisor]) {
        for (name, is_writable) in segments(pid) {
            let pids = writers.entry(name).or_default();
            if is_writable && !pids.contains(&pid) {
                pids.push(pid);
            }
        }
    }
    // Control, two workers, sixteen groups of the one operator with state, the chronicle.
    assert_eq!(writers.len(), 3 + 16 + 1, "{writers:?}");
    assert!(writers.values().all(|pids| pids.len() == 1), "{writers:?}");
    assert_eq!(writers["job-control"], [supervisor]);
    for worker in workers {
        // What was mapped needs no descriptor any more; what is kept must not be writable
        // elsewhere.
        let own = stat(worker).expect("a worker").name.replace("testudo-", "job-");
        for entry in fs::read_dir(format!("/proc/{worker}/fd")).expect("a worker").flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let target = target.to_string_lossy().replace(" (deleted)", "");
            let name = target.strip_prefix("/memfd:").unwrap_or("");
            let info = format!("/proc/{worker}/fdinfo/{}", entry.file_name().to_string_lossy());
            let info = fs::read_to_string(info).unwrap_or_default();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0");
            let is_writable =
                u32::from_str_radix(flags.trim(), 8).is_ok_and(|flags| flags & 3 != 0);
            let is_foreign = name.starts_with("job-w") && name != own;
            assert!(!(is_foreign && is_writable), "worker {worker} may write {name}");
        }
    }
    job.signal(libc::SIGKILL);
    job.wait();
}

fn poisoned(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(100_000, |n| n))
        .key_by(|n| *n)
        .stream()
        .for_each(|n| assert!(*n != 77_777, "record {n} is poison"));
}

fn a_record_that_always_panics_ends_the_job_with_the_panics_words() {
    let ended = Cli::new("poisoned", "").workers(2).args(["--restart-budget", "2"]).run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    let words = "died 3 times in a row without finishing a step (SIGABRT in for_each, processing \
                 one record, ";
    assert!(ended.err.contains(words), "{}", ended.err);
    assert!(ended.err.contains("; its last words: panicked at "), "{}", ended.err);
    assert!(ended.err.contains("record 77777 is poison"), "{}", ended.err);
    assert!(
        ended.err.trim_end().ends_with("; mend the cause, or raise --max-restarts"),
        "{}",
        ended.err
    );
}

/// Dies of a record the first time that it sees it: a file remembers that.
fn unlucky(flow: &Flow, parameters: &str) {
    let (marker, output) = parameters.split_once(' ').expect("marker and output");
    let marker = marker.to_owned();
    flow.source("numbers", Generator::new(50_000, |n| n))
        .map(move |n| {
            if *n == 333 && !Path::new(&marker).exists() {
                let new = format!("{marker}.new");
                fs::write(&new, std::process::id().to_string()).expect("room for a file");
                fs::rename(new, &marker).expect("our own file");
                panic!("bad luck");
            }
            *n
        })
        .sink("out", FileSink::new(output, Lines(|n: &u64| *n)));
}

fn unlucky_parameters(folder: &Path) -> String {
    format!("{} {}", text(&folder.join("marker")), text(&folder.join("out")))
}

fn assert_all_out(folder: &Path) {
    let mut expected: Vec<String> = (0..50_000).map(|n| n.to_string()).collect();
    expected.sort_unstable();
    assert_eq!(sorted_lines(&folder.join("out")), expected);
}

fn an_operator_that_panics_once_is_recovered_from() {
    let folder = folder();
    let report = common::run(unlucky, &unlucky_parameters(folder.path()), settings(2));
    assert_all_out(folder.path());
    assert_eq!(report.restarts.len(), 1, "{:?}", report.restarts);
    let restart = &report.restarts[0];
    assert_eq!(restart.cause, "SIGABRT");
    assert!(restart.last_words.contains("bad luck"), "{}", restart.last_words);
    assert!(restart.last_words.contains("lifetime.rs:"), "{}", restart.last_words);
    assert!(restart.recovery_us.is_some());
    let text = report.text(testudo::config::ReportForm::Text);
    assert!(text.contains("died (SIGABRT), back after "), "{text}");
}

fn last_words_are_those_of_the_life_that_said_them() {
    let folder = folder();
    let slow = Settings { rate: Some(12_500), ..settings(1) };
    let running = start(unlucky, &unlucky_parameters(folder.path()), slow);
    let view = running.workers().expect("the job starts");
    let marker = folder.path().join("marker");
    let first: u32 = wait_for("the panic", || fs::read_to_string(&marker).ok()?.parse().ok());
    wait_for("the successor", || {
        let pid = view.workers[0].pid.load(testudo::shm::primitive::Ordering::Acquire);
        (pid != first || running.is_over()).then_some(())
    });
    let mut disturber = Disturber::new(&running, &view, 3);
    disturber.kill(0);
    let report = finish(running).expect("the job survives");
    assert_all_out(folder.path());
    let causes: Vec<&str> = report.restarts.iter().map(|restart| restart.cause.as_str()).collect();
    assert_eq!(causes, ["SIGABRT", "SIGKILL"]);
    assert!(report.restarts[0].last_words.contains("bad luck"), "{:?}", report.restarts);
    assert_eq!(report.restarts[1].last_words, "");
}

/// User code that ends the process as if all were well.
fn leaving(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(10_000, |n| n)).for_each(|n| {
        if *n == 5000 {
            std::process::exit(0);
        }
    });
}

fn a_worker_that_leaves_by_itself_has_died() {
    let ended = Cli::new("leaving", "").workers(1).args(["--restart-budget", "2"]).run();
    assert_eq!(ended.code, Some(5));
    assert_eq!(
        ended.err,
        "job: worker 0 died 3 times in a row without finishing a step (exit code 0); mend the \
         cause, or raise \
         --max-restarts\n"
    );
}

/// A source that gives up.
struct Failing;

impl testudo::source::Source for Failing {
    type Out = u64;
    type Position = u64;
    type Reader = Self;

    fn start(&self, _: testudo::source::Subtask) -> u64 {
        0
    }

    fn open(&self, _: testudo::source::Subtask, _: &u64) -> Result<Self, String> {
        Ok(Self)
    }
}

impl testudo::source::Reader<u64, u64> for Failing {
    fn read(
        &mut self,
        at: &mut u64,
        _: usize,
        out: &mut impl testudo::source::Collect<u64>,
    ) -> Result<testudo::source::Progress, String> {
        if *at > 1000 {
            return Err("the tap is dry".into());
        }
        out.emit(*at);
        *at += 1;
        Ok(testudo::source::Progress::More)
    }
}

fn failing(flow: &Flow, _: &str) {
    flow.source("tap", Failing).for_each(|_| ());
}

fn a_failure_ends_the_job_with_the_operators_name() {
    let (message, code) = run_failing(failing, "", settings(1));
    assert_eq!((message.as_str(), code), ("operator tap (worker 0): the tap is dry", 1));
}

/// One worker reads, the others have nothing to do.
fn lonely(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).parallelism(1).for_each(|_| ());
}

/// Ten seconds are a long life, so the lives themselves are for deep runs; that lives are told
/// apart by their length has a test next to the code.
fn deaths_of_workers_that_lived_long_without_work_do_not_end_the_job() {
    let budget = 1;
    let slow = Settings { restart_budget: budget, rate: Some(1000), ..settings(2) };
    let running = start(lonely, "", slow);
    let view = running.workers().expect("the job starts");
    let idle = view.workers[1];
    let rounds = common::deep(3, 1);
    for _ in 0..rounds {
        let pid = wait_for("the worker that has nothing to do", || {
            use testudo::shm::header::WorkerState;
            use testudo::shm::primitive::Ordering;
            let state = WorkerState::of(idle.state.load(Ordering::Acquire));
            let runs = [WorkerState::Running, WorkerState::Finished].contains(&state);
            let pid = idle.pid.load(Ordering::Acquire);
            let held = Held::child_of(pid, std::process::id());
            (runs && held.is_some_and(|held| !held.has_ended())).then_some(pid)
        });
        std::thread::sleep(Duration::from_millis(common::deep(10_500, 0)));
        assert!(common::process::signal_worker(idle, libc::SIGKILL));
        wait_for("its successor", || {
            let now = idle.pid.load(testudo::shm::primitive::Ordering::Acquire);
            (now != pid || running.is_over()).then_some(())
        });
    }
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!(report.restarts.len(), rounds);
}

/// Subtask 0 is done at once, the others when the file is there.
struct Waiting(String);

impl testudo::source::Source for Waiting {
    type Out = u64;
    type Position = u64;
    type Reader = Waited;

    fn start(&self, _: testudo::source::Subtask) -> u64 {
        0
    }

    fn open(&self, subtask: testudo::source::Subtask, _: &u64) -> Result<Waited, String> {
        Ok(Waited { file: (subtask.index > 0).then(|| self.0.clone()) })
    }
}

struct Waited {
    file: Option<String>,
}

impl testudo::source::Reader<u64, u64> for Waited {
    fn read(
        &mut self,
        at: &mut u64,
        _: usize,
        out: &mut impl testudo::source::Collect<u64>,
    ) -> Result<testudo::source::Progress, String> {
        if self.file.as_ref().is_some_and(|file| !Path::new(file).exists()) {
            let until_ns = testudo::time::now_ns() + 1_000_000;
            return Ok(testudo::source::Progress::Idle { until_ns });
        }
        out.emit(*at);
        *at += 1;
        Ok(testudo::source::Progress::End)
    }
}

fn waiting(flow: &Flow, file: &str) {
    flow.source("patience", Waiting(file.into())).for_each(|_| ());
}

fn a_worker_that_is_stopped_when_all_is_done_does_not_hold_up_the_end() {
    let folder = folder();
    let file = folder.path().join("now");
    let running = start(waiting, &text(&file), settings(2));
    let view = running.workers().expect("the job starts");
    let done = view.workers[0];
    wait_for("a worker that is done", || {
        let state = done.state.load(testudo::shm::primitive::Ordering::Acquire);
        (WorkerState::of(state) == WorkerState::Finished).then_some(())
    });
    assert!(signal_worker(done, libc::SIGSTOP));
    fs::write(&file, "").expect("room for a file");
    let report = finish(running).expect("all was done");
    assert_eq!((report.records_in, report.restarts.len()), (2, 0));
    assert!(workers_of(std::process::id()).is_empty(), "processes are left");
}
