//! Hundreds of restarts leave nothing behind: no descriptor, no mapping, no memory, neither in the
//! launching process nor in the workers that lived on. A program of its own, so that no other
//! test's descriptors are counted.

mod common;

use common::process::{Disturber, status_kib, workers_of};
use common::tally::{self, ordered};
use common::{Jobs, Random, finish, folder, settings, soak, start, trials, wait_for};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::checkpoint::schedule::Schedule;
use testudo::prelude::*;
use testudo::shm::primitive::Ordering;

const JOBS: Jobs = &[];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            two_hundred_restarts_leak_nothing_in_the_launcher_and_in_the_peer,
            mixed_failures_leave_nothing_behind,
            a_job_that_ended_has_closed_its_descriptors,
        ],
    )
}

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Holdings {
    descriptors: usize,
    mappings: usize,
    anonymous_kib: u64,
    shared_kib: u64,
}

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).map_or(0, Iterator::count)
}

fn holdings(pid: u32) -> Holdings {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("a living process");
    Holdings {
        descriptors: entries(&format!("/proc/{pid}/fd")),
        mappings: maps.lines().count(),
        anonymous_kib: status_kib(pid, "RssAnon").expect("a living process"),
        shared_kib: status_kib(pid, "RssShmem").expect("a living process"),
    }
}

/// Waits until a process holds no more than before. What the dead held goes once the kernel is done
/// with them, so a moment of more is no leak; what stays is.
fn assert_no_more(what: &str, pid: u32, before: Holdings) {
    // The C library keeps an arena for each thread that ever ran at the same time as others.
    const MAPPINGS: usize = 8;
    const ANONYMOUS_KIB: u64 = 1024;
    let begun = std::time::Instant::now();
    loop {
        let now = holdings(pid);
        let is_same = now.descriptors <= before.descriptors
            && now.mappings <= before.mappings + MAPPINGS
            && now.anonymous_kib <= before.anonymous_kib + ANONYMOUS_KIB
            && now.shared_kib <= before.shared_kib + ANONYMOUS_KIB;
        if is_same {
            return;
        }
        assert!(begun.elapsed() < common::PATIENCE, "{what} has {now:?} and had {before:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn two_hundred_restarts_leak_nothing_in_the_launcher_and_in_the_peer() {
    let folder = folder();
    let output = folder.path().join("rows");
    let running = start(ordered, &tally::parameters(u64::MAX, &output), settings(2));
    let view = running.workers().expect("the job starts");
    let peer = &view.workers[1];
    let pid = |header: &testudo::shm::header::WorkerHeader| header.pid.load(Ordering::Acquire);
    let mut disturber = Disturber::new(&running, &view, 41);
    assert!(disturber.settle(1));
    // The first ones touch pages for the first time.
    for _ in 0..30 {
        disturber.kill(0);
    }
    assert!(disturber.settle(0));
    let steps = || view.workers[0].commits.load(Ordering::Acquire);
    let from = steps();
    wait_for("a worker that is warm", || (steps() > from + 2000).then_some(()));
    let (own, lived_on) = (std::process::id(), pid(peer));
    let (before, peer_before) = (holdings(own), holdings(lived_on));
    let successor_before = holdings(pid(view.workers[0]));
    for _ in 0..common::deep(2000, 200) {
        disturber.kill(0);
    }
    assert!(disturber.settle(0));
    assert_eq!(pid(peer), lived_on, "the peer is the process that it was");
    assert_no_more("the launcher", own, before);
    assert_no_more("the peer", lived_on, peer_before);
    assert_no_more("the successor", pid(view.workers[0]), successor_before);
    let kills = disturber.kills;
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!(report.restarts.len(), kills);
    tally::check(&output, report.records_in, 2);
}

/// Everything in a folder, at any depth.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    entries.flat_map(|entry| below(entry.path())).collect()
}

fn mixed_failures_leave_nothing_behind() {
    let folder = folder();
    let output = folder.path().join("rows");
    // Other programs may come and go meanwhile.
    let shared = || {
        let entries = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains("testudo") || name.starts_with("job")).count()
    };
    let shared_before = shared();
    let job = Settings {
        checkpoint_dir: Some(folder.path().join("checkpoints")),
        checkpoints: Schedule::Every(Duration::from_millis(20)),
        ..settings(3)
    };
    let running = start(ordered, &tally::parameters(u64::MAX, &output), job);
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 47);
    let mut random = Random::new(48);
    let mut fail = |disturber: &mut Disturber<'_>| {
        let worker = random.below(3) as usize;
        assert!(disturber.settle(worker));
        // (The first SIGSEGV from outside is taken by the library's check for stack overflows.)
        match random.below(6) {
            0 => disturber.end_now(worker, libc::SIGILL),
            1 => disturber.end_now(worker, libc::SIGABRT),
            2 => disturber.end_now(worker, libc::SIGFPE),
            3 => disturber.stop_randomly(1),
            4 => (0..3).for_each(|worker| {
                assert!(disturber.settle(worker));
                disturber.kill_now(worker);
            }),
            _ => disturber.kill(worker),
        }
    };
    (0..12).for_each(|_| fail(&mut disturber));
    let before = holdings(std::process::id());
    let kept = files(folder.path()).len();
    (0..soak(1000, 40)).for_each(|_| fail(&mut disturber));
    (0..3).for_each(|worker| assert!(disturber.settle(worker)));
    assert_no_more("the launcher", std::process::id(), before);
    // A few more or less, as checkpoints come and go; not some for each failure.
    wait_for("old checkpoints to be retired", || {
        (files(folder.path()).len() <= kept + 24).then_some(())
    });
    let kills = disturber.kills;
    running.stop();
    let report = finish(running).expect("the job survives");
    assert_eq!(report.restarts.len(), kills, "deaths that nobody ordered");
    tally::check(&output, report.records_in, 3);
    assert!(workers_of(std::process::id()).is_empty(), "processes are left");
    assert_eq!(shared(), shared_before, "shared memory is left");
}

fn a_job_that_ended_has_closed_its_descriptors() {
    let folder = folder();
    let output = folder.path().join("rows");
    let once = || {
        common::run(ordered, &tally::parameters(10_000, &output), settings(2));
    };
    once();
    let before = entries("/proc/self/fd");
    for _ in 0..20 {
        once();
    }
    wait_for("the descriptors to be closed", || (entries("/proc/self/fd") <= before).then_some(()));
    wait_for("the threads of ended jobs to end", || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("our own threads").flatten();
        let name = |task: std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).unwrap_or_default()
        };
        (!tasks.map(name).any(|name| name.starts_with("testudo-"))).then_some(())
    });
}
