//! Partial completeness while workers are away: every record is accounted for however often they
//! die, their peers' windows go on without them, and nobody needs a supervisor to see a death.

mod common;

use common::process::{Held, signal_worker, stat};
use common::program::Cli;
use common::{Jobs, Random, deep, finish, folder, settings, sorted_parts, start, text, trials};
use common::{scramble, wait_for};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use testudo::config::Completeness;
use testudo::prelude::*;
use testudo::shm::primitive::Ordering;
use testudo::sink::file::Lines;
use testudo::supervisor::launch::View;

const JOBS: Jobs = &[("crossing", crossing)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            every_record_is_accounted_for_at_one_ten_and_a_hundred_kills_a_second,
            windows_go_on_while_a_producer_is_dead_and_what_it_brings_then_is_late,
            a_short_absence_makes_nothing_late,
            r1_peers_see_a_death_without_a_supervisor,
            status_shows_the_account_of_every_edge,
        ],
    )
}

fn partial(workers: usize) -> Settings {
    let rate = Some(300_000);
    Settings {
        completeness: Some(Completeness::Partial),
        ring_bytes: 4096,
        rate,
        // The kills are the test's, not the job's doing.
        restart_budget: u32::MAX,
        ..settings(workers)
    }
}

/// All read, send to all, and send again.
fn crossing(flow: &Flow, folder: &str) {
    let output = Path::new(folder).join("out");
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .key_by(|n| *n)
        .stream()
        .flat_map(|n| [2 * n, 2 * n + 1])
        .key_by(|n| n / 3)
        .stream()
        .sink("out", FileSink::folder(output, "txt", Lines(|n: &u64| *n)));
}

/// Checks the account of the crossing job, edge by edge, against what it wrote.
fn assert_accounted(report: &Report, lines: &[String]) {
    let [first, second] = &report.edges[..] else { panic!("two edges: {:?}", report.edges) };
    assert_eq!(report.unaccounted, 0, "{:?}", report.edges);
    assert_eq!(first.sent, report.records_in);
    assert_eq!(second.sent, 2 * first.processed);
    assert_eq!(second.processed, lines.len() as u64);
    for edge in &report.edges {
        assert_eq!(edge.sent, edge.processed + edge.dropped + edge.dead_lettered, "{edge:?}");
    }
    assert_eq!(first.dropped + second.dropped, report.dropped);
    assert!(lines.windows(2).all(|pair| pair[0] != pair[1]), "a record came twice");
}

fn every_record_is_accounted_for_at_one_ten_and_a_hundred_kills_a_second() {
    for (per_second, secs) in [(1, deep(20.0, 1.2)), (10, deep(20.0, 0.7)), (100, deep(20.0, 0.7))]
    {
        let folder = folder();
        let running = start(crossing, &text(folder.path()), partial(3));
        let view = running.workers().expect("the job starts");
        let mut random = Random::new(per_second);
        let begun = Instant::now();
        let mut kills = 0;
        // The first ones may come before there is anybody.
        while begun.elapsed().as_secs_f64() < secs || kills == 0 {
            // Whatever it does, attaching included.
            let victim = &view.workers[random.below(3) as usize];
            kills += u64::from(signal_worker(victim, libc::SIGKILL));
            let pause = 1_000_000 / per_second;
            std::thread::sleep(Duration::from_micros(pause / 2 + random.below(pause)));
        }
        running.stop();
        let report = finish(running).expect("the job survives");
        assert!(kills > 0 && !report.restarts.is_empty(), "{kills} kills");
        assert_accounted(&report, &sorted_parts(&folder.path().join("out")));
    }
}

#[testudo::record]
#[derive(Debug, Default)]
struct Row {
    start: i64,
    count: u64,
}

/// Milliseconds of event time in a window.
const WINDOW: u64 = 50;

/// Numbers are milliseconds of event time; both workers read, and count by window.
fn windows(flow: &Flow, folder: &str) {
    let output = Path::new(folder).join("out");
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .event_time(Duration::ZERO, |n| (*n / 16) as i64)
        .key_by(|n| scramble(*n) % 64)
        .window(tumbling(Duration::from_millis(WINDOW)), |n| (*n / 16) as i64)
        .aggregate(
            || 0u64,
            |count, _| *count += 1,
            |count, more| *count += more,
            |_, window, count| Row { start: window.start, count: *count },
        )
        .sink("out", FileSink::folder(output, "txt", Lines(row)));
}

fn row(row: &Row) -> String {
    format!("{} {}", row.start, row.count)
}

/// The lines that worker 0 has written so far.
fn lines_of_worker_0(output: &Path) -> usize {
    let part = |name: &str| std::fs::read(output.join(name)).ok();
    let text = part("part-000.txt.open").or_else(|| part("part-000.txt")).unwrap_or_default();
    text.iter().filter(|byte| **byte == b'\n').count()
}

fn pid_of(view: &View, worker: usize) -> u32 {
    view.workers[worker].pid.load(Ordering::Acquire)
}

/// Every number is in a window that fired, or late, or dropped.
fn assert_windows_conserved(report: &Report, output: &Path) {
    let lines = sorted_parts(output);
    let counted: u64 = lines
        .iter()
        .map(|line| line.rsplit_once(' ').expect("two fields").1.parse::<u64>().expect("a number"))
        .sum();
    assert_eq!(report.unaccounted, 0, "{:?}", report.edges);
    assert_eq!(counted + report.late + report.dropped, report.records_in);
}

fn windows_go_on_while_a_producer_is_dead_and_what_it_brings_then_is_late() {
    let folder = folder();
    let output = folder.path().join("out");
    let limit = Duration::from_millis(30);
    let rate = Some(100_000);
    let job = Settings { max_recovery: Some(limit), rate, ring_bytes: 64 << 10, ..partial(2) };
    let running = start(windows, &text(folder.path()), job);
    let view = running.workers().expect("the job starts");
    wait_for("the first windows", || (lines_of_worker_0(&output) > 200).then_some(()));
    let worker = Held::child_of(pid_of(&view, 1), std::process::id()).expect("it runs");
    running.hold(1, true);
    assert!(worker.signal(libc::SIGKILL));
    let dead = worker.pid;
    // The promise counts from when the supervisor has seen it: it then waits for the dead.
    wait_for("the supervisor to see it", || (!worker.signal(0)).then_some(()));
    std::thread::sleep(2 * limit);
    let before = lines_of_worker_0(&output);
    // Far more than was on its way when the producer died.
    wait_for("windows without the dead", || {
        (lines_of_worker_0(&output) > before + 2000).then_some(())
    });
    assert_eq!(pid_of(&view, 1), dead, "it was held down");
    running.hold(1, false);
    wait_for("its successor", || (pid_of(&view, 1) != dead).then_some(()));
    let commits = view.workers[1].commits.load(Ordering::Acquire);
    wait_for("a hundred steps of it", || {
        (view.workers[1].commits.load(Ordering::Acquire) > commits + 100).then_some(())
    });
    running.stop();
    let report = finish(running).expect("the job survives");
    assert!(report.late > 0, "it stood at windows that had fired meanwhile");
    assert_eq!(report.slo.violations.recovery, 1, "it was away for longer than promised");
    assert_windows_conserved(&report, &output);
}

fn a_short_absence_makes_nothing_late() {
    let folder = folder();
    let output = folder.path().join("out");
    // Rings that hold all that is sent meanwhile.
    let limit = Some(Duration::from_secs(100));
    let rate = Some(50_000);
    let job = Settings { max_recovery: limit, rate, ring_bytes: 4 << 20, ..partial(2) };
    let running = start(windows, &text(folder.path()), job);
    let view = running.workers().expect("the job starts");
    for life in 0..3 {
        let lines = lines_of_worker_0(&output);
        wait_for("windows", || (lines_of_worker_0(&output) > lines + 100).then_some(()));
        assert!(signal_worker(view.workers[life % 2], libc::SIGKILL));
    }
    let lines = lines_of_worker_0(&output);
    wait_for("windows", || (lines_of_worker_0(&output) > lines + 100).then_some(()));
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!((report.late, report.dropped), (0, 0));
    assert_windows_conserved(&report, &output);
}

/// The worker of a job that runs as a program, by number.
fn worker_of(pids: &[u32], worker: usize) -> u32 {
    let name = format!("testudo-w{worker}");
    let is_it = |pid: &&u32| stat(**pid).is_some_and(|stat| stat.name == name);
    *pids.iter().find(is_it).expect("a worker that runs")
}

fn r1_peers_see_a_death_without_a_supervisor() {
    let folder = folder();
    let output: PathBuf = folder.path().join("out");
    let job = Cli::new("crossing", &text(folder.path()))
        .workers(2)
        .args(["--completeness", "partial", "--rate", "300000", "--report", "json"])
        .start();
    let pids = job.workers(2);
    wait_for("output", || (lines_of_worker_0(&output) > 1000).then_some(()));
    let victim = worker_of(&pids, 1);
    let supervisor = stat(victim).expect("it runs").parent;
    let Some(supervisor) = Held::child_of(supervisor, stat(supervisor).expect("it runs").parent)
    else {
        panic!("the supervisor runs")
    };
    // It does nothing any more, and does not die either: nobody replaces anybody.
    assert!(supervisor.signal(libc::SIGSTOP));
    let victim = Held::child_of(victim, supervisor.pid).expect("it runs");
    assert!(victim.signal(libc::SIGKILL));
    wait_for("its end", || victim.has_ended().then_some(()));
    let before = lines_of_worker_0(&output);
    // More than a ring holds.
    wait_for("the peer to go on", || (lines_of_worker_0(&output) > before + 100_000).then_some(()));
    assert!(supervisor.signal(libc::SIGCONT));
    let commits = lines_of_worker_0(&output);
    wait_for("the peer to go on", || (lines_of_worker_0(&output) > commits + 10_000).then_some(()));
    job.signal(libc::SIGTERM);
    let report = job.wait().report();
    assert!(report["dropped"].as_u64().expect("a number") > 0, "{report}");
    assert_eq!(report["unaccounted"], 0, "{report}");
    assert_eq!(report["records_out"], sorted_parts(&output).len(), "{report}");
}

fn status_shows_the_account_of_every_edge() {
    let folder = folder();
    let at = common::folder();
    let job = Cli::new("crossing", &text(folder.path()))
        .workers(2)
        .env("XDG_RUNTIME_DIR", &text(at.path()))
        .args(["--completeness", "partial", "--rate", "100000", "--name", "accounted"])
        .start();
    let status = wait_for("an account", || {
        let said = common::tool::tool(at.path(), &["status", "accounted", "--json"]);
        let status: testudo::serde_json::Value =
            testudo::serde_json::from_slice(&said.stdout).ok()?;
        // Taken and sent are read one after the other: who had no processor in between sees more
        // on its way. Two rings of 64 KiB, and a step's worth.
        let fits = |edge: &testudo::serde_json::Value| {
            edge["in_rings"].as_u64().is_some_and(|n| n < 2 * (64 << 10) / 8)
        };
        let is_sound = status["edges"].as_array()?.iter().all(fits);
        (is_sound && status["edges"][1]["processed"].as_u64()? > 1000).then_some(status)
    });
    assert_eq!(status["slo"]["completeness"], "partial", "{status}");
    for edge in status["edges"].as_array().expect("a list") {
        let number = |name: &str| edge[name].as_u64().expect("a number");
        let known = number("processed") + number("dropped") + number("dead_lettered");
        assert_eq!(number("sent"), known + number("in_rings"), "{edge}");
    }
    job.signal(libc::SIGTERM);
    assert_eq!(job.wait().code, Some(0));
}
