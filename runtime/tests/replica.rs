//! Workers of tier 1: a replica follows every step on a copy of the state, compares, and takes over.
//! Deaths of the worker, of the replica, of both; differences that must be found and some that must
//! not; and what a replica may not do to its worker.

#![expect(unsafe_code, reason = "sets a variable before any thread is there")]

mod common;

use common::process::{Disturber, Held, children, stat, supervisor_of};
use common::program::{Cli, Started};
use common::tally::{self, ordered};
use common::{Jobs, deep, finish, folder, run_failing, settings, start, trials, wait_for};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use testudo::checkpoint::schedule::Schedule;
use testudo::config::{Completeness, ReportForm, Tier};
use testudo::prelude::*;
use testudo::shm::primitive::Ordering;
use testudo::supervisor::launch::{Running, View};
use testudo::supervisor::report::{Report, Restart};
use testudo::testing::{KILL_AT, Point, STANDBY_GRACE};

const JOBS: Jobs = &[
    ("ordered", ordered),
    ("chancy", chancy),
    ("summed", summed),
    ("windowed", windowed),
    ("overwritten", overwritten),
    ("loud", loud),
];

fn main() -> ExitCode {
    // These are about who takes over, not about how soon a busy machine lets it.
    // SAFETY: no thread but this one is there yet.
    unsafe { std::env::set_var(STANDBY_GRACE, "5000") };
    testudo::init();
    common::host(
        JOBS,
        trials![
            r21_a_replica_follows_every_step_and_finds_no_difference,
            r21_timers_of_the_day_fire_in_a_replica_as_in_its_worker,
            r21_windows_of_little_input_are_the_same_in_every_replica_that_follows,
            a_replica_takes_over_and_nothing_is_lost_or_doubled,
            kills_at_random_at_tier_1_change_nothing,
            a_replica_that_dies_is_followed_by_another,
            a_worker_and_its_replica_die_at_once_and_a_new_process_takes_over,
            r2_a_replica_killed_at_any_point_of_its_take_over_is_recovered_from,
            a_worker_killed_around_its_journal_is_taken_over_from,
            a_worker_and_the_supervisor_die_at_once_and_the_replica_goes_on,
            r21_a_replica_that_lags_is_left_behind_and_holds_nobody_up,
            r21_code_that_depends_on_more_than_its_input_is_found_out,
            r21_a_worker_whose_memory_differs_is_found_out,
            a_replica_hands_nothing_out,
            checkpoints_and_replicas_do_not_disturb_each_other,
            tier_1_and_partial_completeness_exclude_each_other,
            forty_take_overs_leak_nothing,
        ],
    )
}

fn tier_1(workers: usize) -> Settings {
    Settings { tier: Some(Tier::Replica), ..settings(workers) }
}

/// Waits until all workers of tier 1 are followed.
fn await_replicas(view: &View) {
    wait_for("replicas that follow", || {
        view.replicas().iter().all(|replica| replica.follows).then_some(())
    });
}

/// Waits until each replica has followed so many steps more.
fn await_steps(view: &View, steps: u64) {
    let before: Vec<u64> = view.replicas().iter().map(|replica| replica.steps).collect();
    wait_for("steps that are followed", || {
        let now = view.replicas();
        now.iter().zip(&before).all(|(now, before)| now.steps > before + steps).then_some(())
    });
}

/// The replicas of a job, by process.
fn replicas_of(launched: u32) -> Vec<u32> {
    let is_one = |pid: &u32| {
        stat(*pid).is_some_and(|stat| {
            let number = stat.name.strip_prefix("testudo-s");
            number.is_some_and(|number| number.parse::<usize>().is_ok())
        })
    };
    let parents = supervisor_of(launched).into_iter().chain([launched]);
    let living = |pid: &u32| stat(*pid).is_some_and(|stat| stat.state != 'Z');
    parents.flat_map(children).filter(is_one).filter(living).collect()
}

/// One of a job's replicas, of which there are so many.
fn replica(of: usize) -> Held {
    let pid = wait_for("a replica", || {
        let all = replicas_of(std::process::id());
        (all.len() == of).then(|| all[0])
    });
    Held::child_of(pid, std::process::id()).expect("the replica")
}

/// Runs the self-checking job without an end, disturbs it, drains it and checks it.
fn disturbed(
    settings: Settings,
    disturb: impl FnOnce(&mut Disturber<'_>, &View, &Running),
) -> Report {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let workers = settings.workers;
    let running = start(ordered, &tally::parameters(u64::MAX, &output), settings);
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, workers as u64);
    disturb(&mut disturber, &view, &running);
    for worker in 0..workers {
        disturber.settle(worker);
    }
    running.stop();
    let report = finish(running).expect("the job survives");
    tally::check(&output, report.records_in, workers as u64);
    assert_eq!(report.counters["seen"], report.records_in, "the job's own counter");
    assert_eq!(differences(&report), 0, "{:?}", report.replicas);
    assert!(replicas_of(std::process::id()).is_empty(), "replicas that outlive the job");
    report
}

fn differences(report: &Report) -> u64 {
    report.replicas.iter().map(|replica| replica.mismatches).sum()
}

fn by_replica(restarts: &[Restart]) -> usize {
    restarts.iter().filter(|restart| restart.tier == Tier::Replica).count()
}

fn r21_a_replica_follows_every_step_and_finds_no_difference() {
    for workers in [1, 2] {
        disturbed(tier_1(workers), |_, view, _| {
            await_replicas(view);
            await_steps(view, 2000);
        });
    }
}

/// Sums by key, each of which is forgotten some milliseconds after it was last seen.
fn summed(flow: &Flow, parameters: &str) {
    let total = parameters.parse().expect("a number");
    flow.source("numbers", Generator::new(total, |n| n))
        .key_by(|n| n.wrapping_mul(*n) % 4099)
        .process(
            |state| state.ttl(Ttl::processing_time(Duration::from_millis(3))).value::<u64>("sum"),
            |sum, cx, n: &u64| {
                let next = cx.get(sum).copied().unwrap_or(0u64).wrapping_add(*n);
                cx.set(sum, &next);
            },
            |_, cx, _| cx.emit(0u64),
        )
        .for_each(|_| ());
}

fn r21_timers_of_the_day_fire_in_a_replica_as_in_its_worker() {
    let running = start(summed, &u64::MAX.to_string(), tier_1(1));
    let view = running.workers().expect("the job starts");
    await_replicas(&view);
    await_steps(&view, 2000);
    running.stop();
    let report = finish(running).expect("the job ends");
    assert_eq!(differences(&report), 0, "{:?}", report.replicas);
}

/// Sums by key and window of time: some hundred records fall into each.
fn windowed(flow: &Flow, parameters: &str) {
    let total = parameters.parse().expect("a number");
    flow.source("numbers", Generator::new(total, |n| n))
        .event_time(Duration::from_millis(20), |n| *n as i64 - (*n * 7 % 20) as i64)
        .key_by(|n| n.wrapping_mul(*n) % 61)
        .window(sliding(Duration::from_millis(400), Duration::from_millis(200)), |n| *n as i64)
        .aggregate(|| 0u64, |sum, n| *sum += *n, |sum, other| *sum += *other, |_, _, sum| *sum)
        .for_each(|_| ());
}

/// A step of little input is compared whole: what a process only remembers must not show in it.
fn r21_windows_of_little_input_are_the_same_in_every_replica_that_follows() {
    let settings = Settings { rate: Some(5000), ..tier_1(1) };
    let running = start(windowed, &u64::MAX.to_string(), settings);
    let view = running.workers().expect("the job starts");
    let mut job = Disturber::new(&running, &view, 1);
    for _ in 0..deep(40, 8) {
        job.settle(0);
        await_replicas(&view);
        await_steps(&view, 20);
        job.kill(0);
    }
    job.settle(0);
    running.stop();
    let report = finish(running).expect("the job ends");
    assert!(by_replica(&report.restarts) > 0, "{:?}", report.restarts);
    assert_eq!(differences(&report), 0, "{:?}", report.replicas);
}

fn a_replica_takes_over_and_nothing_is_lost_or_doubled() {
    for worker in [0, 1] {
        let report = disturbed(tier_1(2), |job, view, _| {
            job.settle(worker);
            await_replicas(view);
            job.kill(worker);
            job.settle(worker);
            await_replicas(view);
        });
        assert_eq!(by_replica(&report.restarts), 1, "{:?}", report.restarts);
    }
}

fn kills_at_random_at_tier_1_change_nothing() {
    for workers in [1, 2] {
        let report = disturbed(tier_1(workers), |job, view, _| {
            for round in 0..deep(40, 6) {
                await_replicas(view);
                // Some while it follows, some while the next one begins.
                job.kill_randomly(1 + round % 2);
            }
        });
        assert!(by_replica(&report.restarts) > 0, "{:?}", report.restarts);
    }
}

fn a_replica_that_dies_is_followed_by_another() {
    let report = disturbed(tier_1(1), |_, view, _| {
        for _ in 0..3 {
            await_replicas(view);
            let held = replica(1);
            held.signal(libc::SIGKILL);
            wait_for("the end of the replica", || held.has_ended().then_some(()));
            await_steps(view, 50);
        }
    });
    assert!(report.restarts.is_empty(), "{:?}", report.restarts);
}

fn a_worker_and_its_replica_die_at_once_and_a_new_process_takes_over() {
    let report = disturbed(tier_1(1), |job, view, _| {
        for round in 0..deep(20, 4) {
            job.settle(0);
            await_replicas(view);
            let held = replica(1);
            if round % 2 == 0 {
                held.signal(libc::SIGKILL);
                job.kill_now(0);
            } else {
                // It may have become the worker, and is then killed as that.
                held.signal(libc::SIGSTOP);
                job.kill_now(0);
                held.signal(libc::SIGKILL);
            }
        }
    });
    // Where the replica dies first, the next one may be there before the worker dies as well.
    let stopped = report.restarts.iter().skip(1).step_by(2).cloned().collect::<Vec<_>>();
    assert_eq!(by_replica(&stopped), 0, "{:?}", report.restarts);
    assert_eq!(report.restarts.len(), deep(20, 4));
}

/// The job as a program at tier 1, with a keeper and a supervisor; its worker 0, once it is followed.
fn started(total: u64, output: &Path, orders: &str) -> (Started, Held) {
    let job = Cli::new("ordered", &tally::parameters(total, output)).workers(1);
    let job = job.args(["--report", "json", "--tier", "1", "--rate", "60000"]);
    let started = job.env(KILL_AT, orders).start();
    wait_for("a replica", || replicas_of(started.pid()).pop());
    let worker = started.workers(1)[0];
    let worker = Held::child_of(worker, started.pid()).expect("worker 0");
    (started, worker)
}

fn r2_a_replica_killed_at_any_point_of_its_take_over_is_recovered_from() {
    let points = [
        Point::StandbyWoken,
        Point::StandbyEnded,
        Point::StandbyWritable,
        Point::RolledBack,
        Point::Published,
        Point::Committed,
    ];
    for point in points {
        let folder = folder();
        let output = folder.path().join("rows.csv");
        // The first process is told a point that it does not pass.
        let orders = format!("0:{}:2,0:{}:1", point.number(), Point::CutBegun.number());
        let (started, worker) = started(60_000, &output, &orders);
        assert!(worker.signal(libc::SIGKILL));
        let ended = started.wait();
        assert!((1..=2).contains(&ended.restarts()), "{point:?}: {}", ended.err);
        assert_eq!(ended.report()["records_in"], 60_000, "{point:?}");
        tally::check(&output, 60_000, 1);
    }
}

fn a_worker_killed_around_its_journal_is_taken_over_from() {
    for point in [Point::JournalGranted, Point::JournalWritten] {
        let folder = folder();
        let output = folder.path().join("rows.csv");
        let job = Cli::new("ordered", &tally::parameters(300_000, &output)).workers(1);
        let job = job.args(["--report", "json", "--tier", "1", "--rate", "60000"]);
        let ended = job.env(KILL_AT, &format!("0:{}:1", point.number())).run();
        assert_eq!(ended.restarts(), 1, "{point:?}: {}", ended.err);
        assert_eq!(ended.report()["records_in"], 300_000, "{point:?}");
        tally::check(&output, 300_000, 1);
    }
}

fn a_worker_and_the_supervisor_die_at_once_and_the_replica_goes_on() {
    for _ in 0..deep(10, 2) {
        let folder = folder();
        let output = folder.path().join("rows.csv");
        let (started, worker) = started(180_000, &output, "");
        let supervisor = Held::child_of(started.supervisor(), started.pid()).expect("a supervisor");
        supervisor.signal(libc::SIGKILL);
        worker.signal(libc::SIGKILL);
        let ended = started.wait();
        assert_eq!(ended.report()["records_in"], 180_000, "{}", ended.err);
        assert_eq!(ended.restarts(), 1, "{}", ended.err);
        tally::check(&output, 180_000, 1);
    }
}

fn r21_a_replica_that_lags_is_left_behind_and_holds_nobody_up() {
    let report = disturbed(tier_1(2), |_, view, _| {
        await_replicas(view);
        let held = replica(2);
        held.signal(libc::SIGSTOP);
        wait_for("a replica that is left behind", || {
            view.replicas().iter().any(|replica| replica.left_behind > 0).then_some(())
        });
        let commits = || view.workers.iter().map(|w| w.commits.load(Ordering::Acquire)).min();
        let before = commits();
        wait_for("workers that go on", || (commits() > before.map(|n| n + 500)).then_some(()));
        held.signal(libc::SIGCONT);
        wait_for("the end of the one that lagged", || held.has_ended().then_some(()));
        await_replicas(view);
    });
    assert!(report.restarts.is_empty(), "{:?}", report.restarts);
}

/// State that says which process made it.
fn chancy(flow: &Flow, parameters: &str) {
    let total = parameters.parse().expect("a number");
    flow.source("numbers", Generator::new(total, |n| n))
        .key_by(|n| n % 64)
        .aggregate(
            || 0u64,
            |sum, n| *sum = sum.wrapping_add(*n ^ u64::from(std::process::id())),
            |_, sum| *sum,
        )
        .for_each(|_| ());
}

/// Whether this process is the worker, not its replica.
fn is_worker() -> bool {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    name.starts_with("testudo-w")
}

/// A sum is another one in the worker's memory, once; the replica's is what it should be.
fn overwritten(flow: &Flow, parameters: &str) {
    let order = std::path::PathBuf::from(parameters);
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .key_by(|n| n % 64)
        .aggregate(
            || 0u64,
            move |sum, n| {
                // Whoever takes the order away does it.
                if n % 65_536 == 0 && is_worker() && std::fs::remove_file(&order).is_ok() {
                    *sum ^= 1 << 40;
                }
                *sum = sum.wrapping_add(*n);
            },
            |_, sum| *sum,
        )
        .for_each(|_| ());
}

/// Runs a job until its replica has found a difference; how it went after that. `followed`: a replica
/// follows.
fn found_out(job: common::Build, parameters: &str, followed: impl Fn()) -> Report {
    let running = start(job, parameters, tier_1(1));
    let view = running.workers().expect("the job starts");
    // One that has found a difference follows no more.
    wait_for("a replica that follows", || {
        let replica = view.replicas()[0].clone();
        (replica.follows || replica.mismatches > 0).then_some(())
    });
    let mut told: Option<std::time::Instant> = None;
    wait_for("a difference", || {
        let replica = view.replicas()[0].clone();
        let is_time = told.is_none_or(|at| at.elapsed() > Duration::from_secs(5));
        // One that was left behind meanwhile has begun anew with a copy of what was changed.
        if replica.follows && replica.mismatches == 0 && is_time {
            followed();
            told = Some(std::time::Instant::now());
        }
        (replica.mismatches > 0).then_some(())
    });
    // A difference ends nothing.
    let commits = || view.workers[0].commits.load(Ordering::Acquire);
    let before = commits();
    wait_for("a worker that goes on", || (commits() > before + 100).then_some(()));
    running.stop();
    finish(running).expect("the job ends")
}

fn r21_code_that_depends_on_more_than_its_input_is_found_out() {
    let report = found_out(chancy, &u64::MAX.to_string(), || ());
    assert!(differences(&report) > 0 && report.restarts.is_empty(), "{report:?}");
    let text = report.text(ReportForm::Text);
    assert!(text.contains("its replica differed"), "{text}");
}

fn r21_a_worker_whose_memory_differs_is_found_out() {
    let folder = folder();
    let order = folder.path().join("order");
    let report = found_out(overwritten, &common::text(&order), || {
        std::fs::write(&order, "").expect("a file");
    });
    assert_eq!(differences(&report), 1, "{:?}", report.replicas);
}

/// Leaves a file for each process that is handed something.
fn loud(flow: &Flow, parameters: &str) {
    let folder = std::path::PathBuf::from(parameters);
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).for_each(move |n| {
        if n % 1000 == 0 {
            let _ = std::fs::write(folder.join(std::process::id().to_string()), "");
        }
    });
}

fn a_replica_hands_nothing_out() {
    let folder = folder();
    let running = start(loud, &common::text(folder.path()), tier_1(1));
    let view = running.workers().expect("the job starts");
    await_replicas(&view);
    await_steps(&view, 200);
    running.stop();
    finish(running).expect("the job ends");
    let left = std::fs::read_dir(folder.path()).expect("the folder").count();
    assert_eq!(left, 1, "processes that were handed something");
}

fn checkpoints_and_replicas_do_not_disturb_each_other() {
    let checkpoints = folder();
    let settings = Settings {
        checkpoint_dir: Some(checkpoints.path().into()),
        checkpoints: Schedule::Every(Duration::from_millis(20)),
        ..tier_1(2)
    };
    let report = disturbed(settings, |job, view, _| {
        await_replicas(view);
        wait_for("a checkpoint", || {
            let committed = |w: &&testudo::shm::header::WorkerHeader| {
                w.cut.committed.load(Ordering::Acquire) > 0
            };
            view.workers.iter().any(committed).then_some(())
        });
        for round in 0..deep(20, 4) {
            await_replicas(view);
            await_steps(view, 200);
            job.kill(round % 2);
        }
    });
    assert!(by_replica(&report.restarts) > 0, "{:?}", report.restarts);
    assert!(report.checkpoints.is_some_and(|checkpoints| checkpoints.completed > 0));
}

fn tier_1_and_partial_completeness_exclude_each_other() {
    let partial = Settings { completeness: Some(Completeness::Partial), ..tier_1(1) };
    let (message, _) = run_failing(chancy, "10", partial);
    assert!(message.contains("tier 1 needs --completeness full"), "{message}");
}

fn forty_take_overs_leak_nothing() {
    let descriptors = || common::process::descriptors(std::process::id());
    disturbed(tier_1(1), |job, view, _| {
        let mut settled = 0usize;
        for round in 0..deep(400, 40) {
            job.settle(0);
            await_replicas(view);
            job.kill_now(0);
            if round == 5 {
                job.settle(0);
                await_replicas(view);
                settled = descriptors();
            }
        }
        job.settle(0);
        await_replicas(view);
        let now = descriptors();
        assert!(now <= settled + 4, "{settled} descriptors became {now}");
    });
}
