//! Partial completeness: nobody waits for a dead worker. What does not fit into its rings is
//! dropped and counted, so that what was sent is what was processed, what was dropped and, while
//! the job runs, what is still on its way.

mod common;

use common::process::{Disturber, Held};
use common::{Jobs, finish, folder, settings, sorted_parts, start, text, trials, wait_for};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::config::Completeness;
use testudo::prelude::*;
use testudo::shm::primitive::Ordering;
use testudo::shm::record::Record;
use testudo::sink::file::Lines;
use testudo::supervisor::launch::{Running, View};

const JOBS: Jobs = &[];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            nobody_waits_for_a_dead_worker,
            nobody_waits_for_a_dead_worker_whose_turn_it_is,
            nobody_waits_with_texts_for_a_dead_worker,
            a_spill_toward_a_dead_worker_holds_nobody_up,
            only_the_edge_to_the_dead_worker_drops,
            nothing_is_dropped_while_everybody_lives,
            what_is_not_dropped_is_exact_across_kills,
            full_completeness_waits_for_the_dead,
        ],
    )
}

type Text = <String as Record>::View;

fn partial(workers: usize) -> Settings {
    let rate = Some(400_000);
    Settings {
        completeness: Some(Completeness::Partial),
        ring_bytes: 4096,
        rate,
        // Who is stopped here is not to be replaced.
        hang_timeout: Duration::ZERO,
        ..settings(workers)
    }
}

/// Keeps a successor of worker 1 from taking its place while the test's file `hold` is there: the
/// job's function runs in every process before it claims anything, so that the worker stays dead.
fn wait_while_held(folder: &Path) {
    let name = fs::read_to_string("/proc/self/comm").unwrap_or_default();
    while name.trim_end() == "testudo-w1" && folder.join("hold").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A job whose worker 1 can be held down.
struct Holdable {
    folder: tempfile::TempDir,
    running: Running,
    view: View,
}

impl Holdable {
    fn start(build: common::Build, settings: Settings) -> Self {
        let folder = folder();
        let running = start(build, &text(folder.path()), settings);
        let view = running.workers().expect("the job starts");
        let disturber = Disturber::new(&running, &view, 1);
        assert!(disturber.settle(0) && disturber.settle(1));
        Self { folder, running, view }
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn worker_1(&self) -> Held {
        let pid = self.view.workers[1].pid.load(Ordering::Acquire);
        Held::child_of(pid, std::process::id()).expect("worker 1 runs")
    }

    /// Kills worker 1 and holds its successors back.
    fn hold_down(&self) {
        fs::write(self.folder.path().join("hold"), "").expect("room for a file");
        let held = self.worker_1();
        assert!(held.signal(libc::SIGKILL));
        wait_for("the end of worker 1", || held.has_ended().then_some(()));
    }

    /// Commits of a worker so far.
    fn commits(&self, worker: usize) -> u64 {
        self.view.workers[worker].commits.load(Ordering::Acquire)
    }

    /// Waits until worker 0 has written far more than any ring holds, worker 1 being dead
    /// throughout.
    fn wait_for_progress(&self) {
        let dead_at = self.commits(1);
        // A part has its final name once it is complete.
        let part = self.output().join("part-000.txt.open");
        let lines = || {
            let text = fs::read(&part).unwrap_or_default();
            text.iter().filter(|byte| **byte == b'\n').count()
        };
        let before = lines();
        let moved = || (lines() > before + 20_000).then_some(());
        wait_for("worker 0 to go on without its peer", moved);
        assert_eq!(self.commits(1), dead_at, "worker 1 was not held down");
    }

    /// Waits until worker 0 gets nothing more done, however often it looks.
    fn wait_until_stuck(&self) {
        let turns = || self.view.workers[0].turns.load(Ordering::Acquire);
        wait_for("worker 0 to have no room left", || {
            let (before, begun) = (self.commits(0), std::time::Instant::now());
            let (mut looks, mut last) = (0, turns());
            // One that only waits for a processor takes no turns.
            while looks < 20 {
                std::thread::sleep(Duration::from_millis(2));
                let now = turns();
                looks += u32::from(now != last);
                last = now;
                if self.commits(0) != before || begun.elapsed() > common::PATIENCE {
                    return None;
                }
            }
            Some(())
        });
    }

    /// Lets worker 1 come back, drains the job, and gives its report and the lines of all parts.
    fn release(self) -> (Report, Vec<String>) {
        // It may never have been held.
        let _ = fs::remove_file(self.folder.path().join("hold"));
        self.running.stop();
        let report = finish(self.running).expect("the job survives");
        (report, sorted_parts(&self.folder.path().join("out")))
    }
}

/// Checks that every record that was sent is in the output once or was dropped, and gives how many
/// were dropped.
fn assert_conserved(report: &Report, lines: &[String], sent: u64) -> u64 {
    assert_eq!(report.records_out, lines.len() as u64, "records that the sinks counted");
    assert_eq!(sent, lines.len() as u64 + report.dropped, "sent = processed + dropped");
    assert_accounted(report);
    assert!(lines.windows(2).all(|pair| pair[0] != pair[1]), "a record came twice");
    report.dropped
}

/// Checks the accounts of all edges: nothing is on its way any more, and workers add up to the
/// whole.
fn assert_accounted(report: &Report) {
    assert_eq!(report.unaccounted, 0, "{:?}", report.edges);
    for edge in &report.edges {
        assert_eq!(edge.sent, edge.processed + edge.dropped + edge.dead_lettered, "{edge:?}");
        let sent: u64 = edge.workers.iter().map(|worker| worker.sent).sum();
        let dropped: u64 = edge.workers.iter().map(|worker| worker.dropped).sum();
        assert_eq!((edge.sent, edge.dropped), (sent, dropped), "{edge:?}");
    }
    let dropped: u64 = report.edges.iter().map(|edge| edge.dropped).sum();
    assert_eq!(report.dropped, dropped, "{:?}", report.edges);
}

fn to_parts<T: Record, R: std::fmt::Display>(
    folder: &Path,
    line: impl Fn(&T::View) -> R + Send + Sync + 'static,
) -> FileSink<Lines<impl Fn(&T::View) -> R + Send + Sync + 'static>> {
    FileSink::folder(folder.join("out"), "txt", Lines(line))
}

/// One reader in worker 0; each worker takes its share of the keys.
fn shared_out(flow: &Flow, folder: &str) {
    let folder = Path::new(folder);
    wait_while_held(folder);
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .key_by(|n| *n)
        .stream()
        .sink("out", to_parts::<u64, _>(folder, |n| *n));
}

/// The same, in turn.
fn in_turn(flow: &Flow, folder: &str) {
    let folder = Path::new(folder);
    wait_while_held(folder);
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .round_robin()
        .sink("out", to_parts::<u64, _>(folder, |n| *n));
}

fn nobody_waits_for_a_dead_worker() {
    let job = Holdable::start(shared_out, partial(2));
    job.hold_down();
    job.wait_for_progress();
    let (report, lines) = job.release();
    assert_eq!(report.restarts.len(), 1);
    let dropped = assert_conserved(&report, &lines, report.records_in);
    assert!(dropped > 10_000 && dropped < report.records_in, "{dropped} dropped");
}

fn nobody_waits_for_a_dead_worker_whose_turn_it_is() {
    let job = Holdable::start(in_turn, partial(2));
    job.hold_down();
    job.wait_for_progress();
    let (report, lines) = job.release();
    // Where any worker will do, the living one may take what does not fit.
    assert_conserved(&report, &lines, report.records_in);
}

fn texts(flow: &Flow, folder: &str) {
    let folder = Path::new(folder);
    wait_while_held(folder);
    flow.source("texts", Generator::new(u64::MAX, |n| format!("text {n}")))
        .parallelism(1)
        .key_by(|text| text.to_string())
        .stream()
        .sink("out", to_parts::<String, _>(folder, |text: &Text| text.to_string()));
}

fn nobody_waits_with_texts_for_a_dead_worker() {
    let job = Holdable::start(texts, partial(2));
    job.hold_down();
    job.wait_for_progress();
    let (report, lines) = job.release();
    let dropped = assert_conserved(&report, &lines, report.records_in);
    assert!(dropped > 10_000 && dropped < report.records_in, "{dropped} dropped");
}

/// Each record becomes some times what a ring holds.
const FAN: u64 = 5000;

fn spilling(flow: &Flow, folder: &str) {
    let folder = Path::new(folder);
    wait_while_held(folder);
    flow.source("seeds", Generator::new(u64::MAX / FAN, |n| n))
        .parallelism(1)
        .flat_map(|seed| seed * FAN..(seed + 1) * FAN)
        .key_by(|n| *n)
        .stream()
        .sink("out", to_parts::<u64, _>(folder, |n| *n));
}

fn a_spill_toward_a_dead_worker_holds_nobody_up() {
    // A ring may be full to the byte just when the spill is empty: not each time.
    for _ in 0..3 {
        let job = Holdable::start(spilling, Settings { rate: Some(100), ..partial(2) });
        assert!(job.worker_1().signal(libc::SIGSTOP));
        // A stopped worker is no dead one: it is waited for, with its ring full and more in the
        // spill.
        job.wait_until_stuck();
        job.hold_down();
        job.wait_for_progress();
        let (report, lines) = job.release();
        let sent = FAN * report.records_in;
        let dropped = assert_conserved(&report, &lines, sent);
        assert!(dropped > 10_000 && dropped < sent, "{dropped} dropped");
    }
}

/// Two edges: one from worker 0 to both, one from both to worker 0 alone.
fn two_edges(flow: &Flow, folder: &str) {
    let folder = Path::new(folder);
    wait_while_held(folder);
    let seen = flow.counter("seen");
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .key_by(|n| *n)
        .stream()
        .map(move |n| {
            seen.add(1);
            *n
        })
        .gather()
        .sink("out", to_parts::<u64, _>(folder, |n| *n));
}

fn only_the_edge_to_the_dead_worker_drops() {
    let job = Holdable::start(two_edges, partial(2));
    job.hold_down();
    job.wait_for_progress();
    let (report, lines) = job.release();
    // What came through the first edge came through the second one too, whole.
    assert_eq!(report.counters["seen"], lines.len() as u64);
    assert!(assert_conserved(&report, &lines, report.records_in) > 0);
}

fn nothing_is_dropped_while_everybody_lives() {
    let job = Holdable::start(shared_out, partial(2));
    // The slowest consumer there is, but a living one.
    let held = job.worker_1();
    assert!(held.signal(libc::SIGSTOP));
    job.wait_until_stuck();
    assert!(held.signal(libc::SIGCONT));
    let (report, lines) = job.release();
    assert_eq!(assert_conserved(&report, &lines, report.records_in), 0);
}

/// Both workers read, send to both, and count.
fn crossing(flow: &Flow, folder: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .key_by(|n| *n)
        .stream()
        .flat_map(|n| [2 * n, 2 * n + 1])
        .key_by(|n| n / 3)
        .stream()
        .sink("out", to_parts::<u64, _>(Path::new(folder), |n| *n));
}

fn what_is_not_dropped_is_exact_across_kills() {
    let folder = folder();
    let running = start(crossing, &text(folder.path()), partial(2));
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 43);
    disturber.kill_randomly(common::deep(200, 30));
    let kills = disturber.kills;
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!(report.restarts.len(), kills);
    let lines = sorted_parts(&folder.path().join("out"));
    assert_eq!(report.records_out, lines.len() as u64);
    assert_accounted(&report);
    assert_eq!(report.edges.len(), 2);
    assert_eq!(report.edges[0].sent, report.records_in);
    assert_eq!(report.edges[1].sent, 2 * report.edges[0].processed);
    assert_eq!(report.edges[1].processed, report.records_out);
    assert!(lines.windows(2).all(|pair| pair[0] != pair[1]), "a record came twice");
    // A record that the first edge dropped would have become two.
    let lost = 2 * report.records_in - lines.len() as u64;
    assert!(
        (report.dropped..=2 * report.dropped).contains(&lost),
        "{lost} are missing, {} were dropped",
        report.dropped
    );
}

fn full_completeness_waits_for_the_dead() {
    let full = Settings { completeness: Some(Completeness::Full), ..partial(2) };
    let job = Holdable::start(shared_out, full);
    job.hold_down();
    job.wait_until_stuck();
    let (report, lines) = job.release();
    assert_eq!(assert_conserved(&report, &lines, report.records_in), 0);
}
