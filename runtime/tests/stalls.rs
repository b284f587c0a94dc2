//! A worker whose way is barred: it sleeps while it has no room, wakes when it has, and goes on by
//! itself with work that needs no input.

mod common;

use common::process::{Disturber, Held, cpu_ns};
use common::{Jobs, finish, folder, run, settings, start, text, trials, wait_for};
use std::cell::Cell;
use std::fs;
use std::process::ExitCode;
use testudo::config::Idle;
use testudo::prelude::*;
use testudo::shm::primitive::Ordering;
use testudo::sink::file::Lines;
use testudo::supervisor::launch::{Running, View};

const JOBS: Jobs = &[];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_backpressured_worker_sleeps,
            r8_a_worker_that_slept_behind_a_full_ring_goes_on,
            the_local_hand_over_has_room_again_after_a_full_ring,
            windows_over_everything_fire_on_without_input,
            windows_by_key_fire_on_without_input,
            a_worker_that_spins_does_not_sleep,
        ],
    )
}

/// A source in worker 0, a consumer in a worker of its own.
fn direct(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .round_robin()
        .parallelism(1)
        .isolated()
        .for_each(|_| ());
}

/// The same with a hand-over within worker 0 between source and ring.
fn handed_over(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .round_robin()
        .parallelism(1)
        .flat_map(|n| [2 * n, 2 * n + 1])
        .round_robin()
        .parallelism(1)
        .isolated()
        .sink("out", FileSink::new(output, Lines(|n: &u64| *n)));
}

struct Barred {
    running: Running,
    view: View,
    consumer: Held,
}

impl Barred {
    /// Starts a job and stops its consumer once both its workers have committed.
    fn start(build: common::Build, parameters: &str, settings: Settings) -> Self {
        // Who is stopped here is not to be replaced.
        let settings = Settings { hang_timeout: Duration::ZERO, ..settings };
        let running = start(build, parameters, settings);
        let view = running.workers().expect("the job starts");
        let disturber = Disturber::new(&running, &view, 1);
        assert!(disturber.settle(0) && disturber.settle(1));
        let pid = view.workers[1].pid.load(Ordering::Acquire);
        let consumer = Held::child_of(pid, std::process::id()).expect("the consumer runs");
        assert!(consumer.signal(libc::SIGSTOP));
        Self { running, view, consumer }
    }

    /// The share of a processor that the producer uses, in percent, over a moment.
    fn share(&self) -> u64 {
        let pid = self.view.workers[0].pid.load(Ordering::Acquire);
        let begun = std::time::Instant::now();
        let before = cpu_ns(pid).expect("the producer runs");
        std::thread::sleep(Duration::from_millis(150));
        let spent = cpu_ns(pid).expect("the producer runs") - before;
        spent * 100 / begun.elapsed().as_nanos() as u64
    }

    /// Waits until the producer uses next to nothing of its processor.
    fn wait_for_rest(&self) {
        for _ in 0..40 {
            if self.share() < 5 {
                return;
            }
        }
        panic!("the producer does not sleep though it has no room");
    }

    /// Lets the consumer go on, waits until it has done much more, and drains the job.
    fn go_on(self) -> Report {
        let commits = || self.view.workers[1].commits.load(Ordering::Acquire);
        let before = commits();
        assert!(self.consumer.signal(libc::SIGCONT));
        wait_for("the consumer to be fed again", || (commits() > before + 100).then_some(()));
        self.running.stop();
        finish(self.running).expect("the job survives")
    }
}

fn a_backpressured_worker_sleeps() {
    let job = Barred::start(direct, "", settings(1));
    job.wait_for_rest();
    let report = job.go_on();
    assert_eq!(report.records_out, report.records_in);
}

fn r8_a_worker_that_slept_behind_a_full_ring_goes_on() {
    let small = Settings { ring_bytes: 4096, ..settings(1) };
    for _ in 0..5 {
        let job = Barred::start(direct, "", small.clone());
        job.wait_for_rest();
        let report = job.go_on();
        assert_eq!(report.records_out, report.records_in);
    }
}

fn the_local_hand_over_has_room_again_after_a_full_ring() {
    let folder = folder();
    let output = folder.path().join("out");
    let small = Settings { ring_bytes: 4096, ..settings(1) };
    let job = Barred::start(handed_over, &text(&output), small);
    job.wait_for_rest();
    let report = job.go_on();
    let lines = fs::read_to_string(&output).expect("the output is there");
    let mut expected = 0;
    for line in lines.lines() {
        assert_eq!(line, expected.to_string());
        expected += 1;
    }
    assert_eq!(expected, 2 * report.records_in);
}

/// The measure of the tests above sees a worker that is awake.
fn a_worker_that_spins_does_not_sleep() {
    let spin = Settings { idle: Idle::Spin, ..settings(1) };
    let job = Barred::start(direct, "", spin);
    assert!((0..40).any(|_| job.share() >= 20), "a spinning worker seems to sleep");
    job.go_on();
}

/// How often this process has slept of its own accord.
fn sleeps() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is there");
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|count| count.trim().parse().ok()).expect("a number")
}

/// Windows of a millisecond that all fire at the end of input, a part of them in each step.
const WINDOWS: u64 = 60_000;

/// One window in so many notes how often its worker has slept so far.
const NOTED: i64 = 100;

fn note(window: testudo::window::Bounds) -> u64 {
    thread_local!(static NOTE: Cell<u64> = const { Cell::new(0) });
    if window.start % NOTED == 0 {
        NOTE.set(sleeps());
    }
    NOTE.get()
}

fn overall(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(WINDOWS, |n| n))
        .event_time(Duration::from_secs(1_000_000), |n| *n as i64)
        .window_all(tumbling(Duration::from_millis(1)), |n| *n as i64)
        .aggregate(|| 0u64, |n, _| *n += 1, |n, other| *n += other, |window, _| note(window))
        .sink("out", FileSink::new(output, Lines(|sleeps: &u64| *sleeps)));
}

fn by_key(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(WINDOWS / 20, |n| n))
        .event_time(Duration::from_secs(1_000_000), |n| *n as i64)
        .key_by(|n| n % 3)
        .window(tumbling(Duration::from_millis(1)), |n| *n as i64)
        .aggregate(|| 0u64, |n, _| *n += 1, |n, other| *n += other, |_, window, _| note(window))
        .sink("out", FileSink::new(output, Lines(|sleeps: &u64| *sleeps)));
}

/// Runs a job whose windows fire at the end of its input and checks that its worker hardly slept
/// between the first one and the last: nobody would wake it before its longest sleep is over.
fn fires_on(build: common::Build, windows: u64) {
    // Not on a disk: waiting for one would count as sleep.
    let folder = tempfile::Builder::new().prefix("testudo-test-").tempdir_in("/dev/shm");
    let folder = folder.unwrap_or_else(|_| common::folder());
    let output = folder.path().join("out");
    run(build, &text(&output), settings(1));
    let lines = fs::read_to_string(&output).expect("the output is there");
    let noted: Vec<u64> = lines.lines().map(|line| line.parse().expect("a number")).collect();
    assert_eq!(noted.len() as u64, windows);
    let slept = noted[noted.len() - 1] - noted[0];
    assert!(slept < 5, "the worker slept {slept} times with windows to fire");
}

fn windows_over_everything_fire_on_without_input() {
    fires_on(overall, WINDOWS);
}

fn windows_by_key_fire_on_without_input() {
    fires_on(by_key, WINDOWS / 20);
}
