//! Workers of tier 2: a standby takes over, results stay. Deaths of the worker at any time, of the
//! standby at every point of its take-over, of both, of two workers that share one, of a stopped
//! one; and what all that must not leave behind.

#![expect(unsafe_code, reason = "sets a variable before any thread is there")]

mod common;

use common::process::{
    Disturber, Held, children, signal_worker, stat, status_kib, supervisor_of, workers_of,
};
use common::program::{Cli, Ended, Started};
use common::tally::{self, ordered};
use common::tool::{said, tool};
use common::{Jobs, finish, folder, settings, soak, start, trials, wait_for};
use std::path::Path;
use std::process::ExitCode;
use testudo::config::Tier;
use testudo::prelude::*;
use testudo::serde_json::{self, Value};
use testudo::shm::primitive::Ordering;
use testudo::supervisor::launch::{Running, View};
use testudo::supervisor::report::Restart;
use testudo::testing::{KILL_AT, Point, STANDBY_GRACE};

const JOBS: Jobs = &[("ordered", ordered), ("fickle", fickle)];

fn main() -> ExitCode {
    // These are about who takes over, not about how soon a busy machine lets it.
    // SAFETY: no thread but this one is there yet.
    unsafe { std::env::set_var(STANDBY_GRACE, "5000") };
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_standby_takes_over_and_nothing_is_lost_or_doubled,
            kills_at_random_at_tier_2_change_nothing,
            each_worker_may_have_a_standby_of_its_own,
            two_workers_that_share_a_standby_die_at_once_and_both_come_back,
            a_worker_and_its_standby_die_at_once_and_the_supervisor_mends_it,
            r2_a_stopped_standby_is_ended_before_a_new_process_takes_its_place,
            r2_a_standby_killed_at_any_point_of_its_take_over_is_recovered_from,
            a_take_over_needs_no_supervisor,
            a_worker_and_the_supervisor_die_at_once_and_the_job_is_exact,
            a_standby_that_plans_another_job_stays_out_and_the_job_goes_on,
            a_short_max_recovery_asks_for_standbys,
            an_isolated_stage_alone_has_a_standby,
            a_death_by_a_panic_is_reported_with_its_words_though_a_standby_took_over,
            who_took_over_has_nothing_mapped_of_other_workers_private_parts,
            take_overs_leak_nothing,
        ],
    )
}

fn tier_2(workers: usize) -> Settings {
    Settings { tier: Some(Tier::Standby), ..settings(workers) }
}

/// The standbys of a job that sleep on death words, by number.
fn standbys_of(launched: u32) -> Vec<u32> {
    let is_standby = |pid: &u32| {
        stat(*pid).is_some_and(|stat| {
            let number = stat.name.strip_prefix("testudo-s");
            number.is_some_and(|number| number.parse::<usize>().is_ok())
        })
    };
    let is_ready = |pid: &u32| {
        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        call.split(' ').next() == Some(&libc::SYS_futex_waitv.to_string())
    };
    let parents = supervisor_of(launched).into_iter().chain([launched]);
    parents.flat_map(children).filter(is_standby).filter(is_ready).collect()
}

/// Waits until so many standbys sleep.
fn await_standbys(count: usize) -> Vec<u32> {
    wait_for("standbys that are ready", || {
        let found = standbys_of(std::process::id());
        (found.len() == count).then_some(found)
    })
}

/// Runs the self-checking job without an end, disturbs it, drains it and checks it.
fn disturbed(
    settings: Settings,
    disturb: impl FnOnce(&mut Disturber<'_>, &View, &Running),
) -> Vec<Restart> {
    disturbed_or_not(settings, |disturber, view, running| {
        disturb(disturber, view, running);
        0
    })
}

/// The same, where so many processes more were killed that may have been a worker by then.
fn disturbed_or_not(
    settings: Settings,
    disturb: impl FnOnce(&mut Disturber<'_>, &View, &Running) -> usize,
) -> Vec<Restart> {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let workers = settings.workers;
    let running = start(ordered, &tally::parameters(u64::MAX, &output), settings);
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, workers as u64);
    let unclear = disturb(&mut disturber, &view, &running);
    for worker in 0..workers {
        disturber.settle(worker);
    }
    let kills = disturber.kills..=disturber.kills + unclear;
    running.stop();
    let report = finish(running).expect("the job survives");
    let others: Vec<_> =
        report.restarts.iter().filter(|restart| restart.cause != "SIGKILL").collect();
    assert!(others.is_empty(), "deaths that nobody ordered: {others:?}");
    assert!(kills.contains(&report.restarts.len()), "{kills:?} deaths: {:?}", report.restarts);
    tally::check(&output, report.records_in, workers as u64);
    assert_eq!(report.counters["seen"], report.records_in, "the job's own counter");
    let left = standbys_of(std::process::id());
    assert!(left.is_empty(), "standbys that outlive the job: {left:?}");
    report.restarts
}

fn by_standby(restarts: &[Restart]) -> usize {
    restarts.iter().filter(|restart| restart.tier == Tier::Standby).count()
}

fn a_standby_takes_over_and_nothing_is_lost_or_doubled() {
    for worker in [0, 1, 2] {
        let restarts = disturbed(tier_2(3), |job, view, _| {
            job.settle(worker);
            let standby = await_standbys(1)[0];
            job.kill(worker);
            job.settle(worker);
            let pid = view.workers[worker].pid.load(Ordering::Acquire);
            assert_eq!(pid, standby, "somebody else took over");
            let named = stat(pid).expect("it lives").name;
            assert_eq!(named, format!("testudo-w{worker}"));
        });
        assert_eq!(by_standby(&restarts), 1);
    }
}

fn kills_at_random_at_tier_2_change_nothing() {
    for workers in [1, 2, 3] {
        let restarts = disturbed(tier_2(workers), |job, _, _| job.kill_randomly(soak(500, 20)));
        assert!(by_standby(&restarts) > 0, "nobody stood by");
    }
}

fn each_worker_may_have_a_standby_of_its_own() {
    let restarts = disturbed(Settings { standbys: 2, ..tier_2(2) }, |job, _, _| {
        for _ in 0..5 {
            job.settle(0);
            job.settle(1);
            await_standbys(2);
            job.kill_now(0);
            job.kill_now(1);
        }
    });
    assert_eq!(by_standby(&restarts), 10, "{restarts:?}");
}

fn two_workers_that_share_a_standby_die_at_once_and_both_come_back() {
    let restarts = disturbed(tier_2(2), |job, _, _| {
        for round in 0..soak(200, 5) {
            job.settle(0);
            job.settle(1);
            await_standbys(1);
            job.kill_now(round % 2);
            job.kill_now((round + 1) % 2);
        }
    });
    assert!(by_standby(&restarts) >= restarts.len() / 2, "a standby was ready each time");
}

fn a_worker_and_its_standby_die_at_once_and_the_supervisor_mends_it() {
    let restarts = disturbed_or_not(tier_2(2), |job, _, _| {
        let rounds = soak(100, 4);
        for round in 0..rounds {
            job.settle(0);
            let standby = await_standbys(1)[0];
            let held = Held::child_of(standby, std::process::id()).expect("the standby");
            if round % 2 == 0 {
                held.signal(libc::SIGKILL);
            }
            job.kill_now(0);
            held.signal(libc::SIGKILL);
            wait_for("the end of the standby", || held.has_ended().then_some(()));
        }
        rounds
    });
    assert!(by_standby(&restarts) < restarts.len(), "a new process was needed now and then");
}

fn r2_a_stopped_standby_is_ended_before_a_new_process_takes_its_place() {
    let restarts = disturbed(tier_2(2), |job, _, _| {
        job.settle(0);
        let standby = await_standbys(1)[0];
        let held = Held::child_of(standby, std::process::id()).expect("the standby");
        held.signal(libc::SIGSTOP);
        job.kill_now(0);
        job.settle(0);
        // Otherwise it may wake up any time.
        wait_for("the end of the stopped standby", || held.has_ended().then_some(()));
    });
    assert_eq!(by_standby(&restarts), 0);
}

/// A job without an end that runs as a program at tier 2, with a keeper and a supervisor; its
/// worker 0.
fn started(output: &Path, orders: &str) -> (Started, Held) {
    let place = common::text(output.parent().expect("a folder"));
    let job = Cli::new("ordered", &tally::parameters(u64::MAX, output)).workers(2);
    let job = job.args(["--report", "json", "--tier", "2", "--rate", "60000", "--name", "job"]);
    let job = job.env("XDG_RUNTIME_DIR", &place).env("TMPDIR", &place);
    let started = job.env(KILL_AT, orders).start();
    wait_for("a standby", || standbys_of(started.pid()).pop());
    let is_first = |pid: &u32| stat(*pid).is_some_and(|stat| stat.name == "testudo-w0");
    let worker = started.workers(2).into_iter().find(is_first).expect("worker 0");
    let worker = Held::child_of(worker, started.pid()).expect("worker 0");
    (started, worker)
}

/// Lets such a job go on after so many deaths, drains it and checks its rows.
fn ended(started: Started, output: &Path, deaths: usize) -> Ended {
    let at = output.parent().expect("a folder");
    let number = |name: &str| {
        let (_, out, _) = said(&tool(at, &["status", "job", "--json"]));
        serde_json::from_str::<Value>(&out).unwrap_or_default()[name].as_u64()
    };
    wait_for("the deaths to be counted", || {
        (number("restarts") >= Some(deaths as u64)).then_some(())
    });
    let seen = number("records_in").unwrap_or(0);
    wait_for("records after them", || (number("records_in") > Some(seen)).then_some(()));
    started.signal(libc::SIGTERM);
    let ended = started.wait();
    tally::check(output, ended.report()["records_in"].as_u64().expect("a number"), 2);
    ended
}

/// Runs the self-checking job at tier 2 as a program, kills its worker 0 once a standby is ready,
/// and has the next process that is worker 0 die at a point. Checks rows and deaths; gives the
/// tiers.
fn killed_at(point: Point, deaths: usize) -> Vec<String> {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    // The first process passes some of the points too: it is told one that this job has not.
    let orders = format!("0:{}:2,0:{}:1", point.number(), Point::CutBegun.number());
    let (started, worker) = started(&output, &orders);
    assert!(worker.signal(libc::SIGKILL));
    let ended = ended(started, &output, deaths);
    assert_eq!(ended.restarts(), deaths, "{point:?}: {}", ended.err);
    let restarts = ended.report()["restarts"].as_array().expect("a list").clone();
    restarts.iter().map(|restart| restart["tier"].to_string()).collect()
}

fn r2_a_standby_killed_at_any_point_of_its_take_over_is_recovered_from() {
    let all: [(Point, &[&str]); 9] = [
        // Before its claim a standby is nobody: its end is not the worker's.
        (Point::StandbyWoken, &["3"]),
        (Point::StandbyEnded, &["3"]),
        // A claim that nobody heard of: the new process passes the same point.
        (Point::Claimed, &["3", "3"]),
        (Point::StandbyWritable, &["2", "3"]),
        (Point::RolledBack, &["2", "3"]),
        (Point::Opened, &["2", "3"]),
        (Point::Published, &["2", "3"]),
        (Point::BeforeCommit, &["2", "3"]),
        (Point::Committed, &["2", "3"]),
    ];
    // The jobs wait more than they work.
    std::thread::scope(|scope| {
        for some in all.chunks(3) {
            scope.spawn(move || {
                for (point, tiers) in some {
                    let found = killed_at(*point, tiers.len());
                    // After its first steps another standby may be ready.
                    let is_late = matches!(point, Point::BeforeCommit | Point::Committed);
                    let exact = if is_late { 1 } else { tiers.len() };
                    assert_eq!(found[..exact], tiers[..exact], "{point:?}");
                }
            });
        }
    });
}

fn a_take_over_needs_no_supervisor() {
    let folder = folder();
    let output = folder.path().join("rows.csv");
    let (started, worker) = started(&output, "");
    let standby = wait_for("a standby", || standbys_of(started.pid()).pop());
    let supervisor = started.supervisor();
    let supervisor = Held::child_of(supervisor, started.pid()).expect("the supervisor");
    supervisor.signal(libc::SIGSTOP);
    worker.signal(libc::SIGKILL);
    wait_for("the standby to be the worker", || {
        stat(standby).is_some_and(|stat| stat.name == "testudo-w0").then_some(())
    });
    supervisor.signal(libc::SIGCONT);
    let ended = ended(started, &output, 1);
    let report = ended.report();
    assert_eq!(report["restarts"][0]["tier"], 2, "{report}");
    assert_eq!(ended.restarts(), 1, "{report}");
}

fn a_worker_and_the_supervisor_die_at_once_and_the_job_is_exact() {
    for round in 0..soak(40, 2) {
        let folder = folder();
        let output = folder.path().join("rows.csv");
        let (started, worker) = started(&output, "");
        let supervisor = started.supervisor();
        let supervisor = Held::child_of(supervisor, started.pid()).expect("the supervisor");
        let both = if round % 2 == 0 { [&worker, &supervisor] } else { [&supervisor, &worker] };
        for held in both {
            held.signal(libc::SIGKILL);
        }
        let ended = ended(started, &output, 1);
        assert_eq!(ended.restarts(), 1, "{}", ended.err);
    }
}

/// A job that draws itself otherwise in a standby: what its name in /proc says decides.
fn fickle(flow: &Flow, parameters: &str) {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    let limit = parameters.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0);
    let numbers = flow.source("numbers", Generator::new(limit, |n| n));
    if name.starts_with("testudo-s") && !name.starts_with("testudo-sup") {
        numbers.round_robin().for_each(|_| ());
    } else {
        numbers.for_each(|_| ());
    }
}

fn a_standby_that_plans_another_job_stays_out_and_the_job_goes_on() {
    let job = Cli::new("fickle", "300000").workers(1);
    let ended = job.args(["--report", "json", "--tier", "2", "--rate", "30000"]).run();
    assert_eq!(ended.report()["records_in"], 300_000);
    assert_eq!(ended.restarts(), 0);
    assert!(ended.err.contains("plans another job"), "{}", ended.err);
    assert!(ended.err.contains("standby 0 cannot be had"), "{}", ended.err);
}

fn a_short_max_recovery_asks_for_standbys() {
    let promise = Settings { max_recovery: Some(Duration::from_millis(5)), ..settings(2) };
    assert_eq!(promise.tier, None);
    let restarts = disturbed(promise, |job, _, _| {
        job.settle(0);
        await_standbys(1);
        job.kill(0);
    });
    assert_eq!(by_standby(&restarts), 1);
}

fn isolated(flow: &Flow, parameters: &str) {
    let upto = parameters.parse().unwrap_or(0);
    flow.source("numbers", Generator::new(upto, |n| n))
        .key_by(|n| n % 100)
        .stream()
        .isolated()
        .tier(Tier::Standby)
        .parallelism(1)
        .for_each(|_| ());
}

fn an_isolated_stage_alone_has_a_standby() {
    let running = start(isolated, &u64::MAX.to_string(), settings(2));
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 3);
    for worker in 0..3 {
        disturber.settle(worker);
    }
    let standby = await_standbys(1)[0];
    disturber.kill(0);
    disturber.settle(0);
    assert_ne!(view.workers[0].pid.load(Ordering::Acquire), standby);
    await_standbys(1);
    disturber.kill(2);
    disturber.settle(2);
    running.stop();
    let report = finish(running).expect("the job survives");
    let tiers: Vec<Tier> = report.restarts.iter().map(|restart| restart.tier).collect();
    assert_eq!(tiers, [Tier::Respawn, Tier::Standby]);
}

/// A job that panics once, at a file that is there only once.
fn panicky(flow: &Flow, folder: &str) {
    let once = std::path::PathBuf::from(folder).join("once");
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).for_each(move |_| {
        let is_there = std::fs::remove_file(&once).is_ok();
        assert!(!is_there, "the file was there");
    });
}

fn a_death_by_a_panic_is_reported_with_its_words_though_a_standby_took_over() {
    let folder = folder();
    let settings = Settings { rate: Some(2000), ..tier_2(1) };
    let running = start(panicky, &common::text(folder.path()), settings);
    let view = running.workers().expect("the job starts");
    await_standbys(1);
    std::fs::write(folder.path().join("once"), "").expect("room for a file");
    let disturber = Disturber::new(&running, &view, 1);
    wait_for("the death", || {
        (view.workers[0].incarnation.load(Ordering::Acquire) == 2).then_some(())
    });
    disturber.settle(0);
    running.stop();
    let report = finish(running).expect("the job survives");
    let [restart] = &report.restarts[..] else { panic!("{:?}", report.restarts) };
    assert_eq!((restart.tier, &*restart.cause), (Tier::Standby, "SIGABRT"));
    assert!(restart.last_words.contains("the file was there"), "{restart:?}");
}

fn who_took_over_has_nothing_mapped_of_other_workers_private_parts() {
    disturbed(tier_2(2), |job, view, _| {
        job.settle(0);
        await_standbys(1);
        job.kill(0);
        job.settle(0);
        let pid = view.workers[0].pid.load(Ordering::Acquire);
        // The other worker's groups are the upper half of them.
        wait_for("the rest to be given back", || {
            let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
            let is_foreign = |line: &str| {
                let group = line.split("-g").nth(1).and_then(|rest| rest.split('-').next());
                group.and_then(|group| group.parse::<u32>().ok()).is_some_and(|group| group >= 8)
            };
            (!maps.lines().any(is_foreign)).then_some(())
        });
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
        let of_other = maps.lines().filter(|line| line.contains("-w1"));
        let writable: Vec<&str> = of_other.filter(|line| line.contains(" rw")).collect();
        assert!(writable.is_empty(), "writable memory of a peer: {writable:?}");
    });
}

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).map_or(0, Iterator::count)
}

fn take_overs_leak_nothing() {
    let rounds = soak(500, 40);
    let own = std::process::id();
    let mappings = |pid: u32| {
        std::fs::read_to_string(format!("/proc/{pid}/maps")).map_or(0, |maps| maps.lines().count())
    };
    let restarts = disturbed(tier_2(2), |job, view, _| {
        let mut round = || {
            await_standbys(1);
            job.kill(0);
        };
        for _ in 0..10 {
            round();
        }
        await_standbys(1);
        let before = (entries("/proc/self/fd"), mappings(own), workers_of(own).len());
        let anonymous = status_kib(own, "RssAnon").expect("our own status");
        for _ in 0..rounds {
            round();
        }
        await_standbys(1);
        wait_for("everything of the dead to be gone", || {
            let now = (entries("/proc/self/fd"), mappings(own), workers_of(own).len());
            let grown = status_kib(own, "RssAnon").expect("our own status");
            let is_same = now.0 <= before.0 && now.1 <= before.1 + 8 && now.2 <= before.2;
            (is_same && grown <= anonymous + 1024).then_some(())
        });
        assert!(signal_worker(view.workers[1], 0), "the peer lives");
    });
    assert!(by_standby(&restarts) >= rounds, "{} of {}", by_standby(&restarts), restarts.len());
}
