//! Deaths at the named points of a checkpoint, of loading and of taking what was in flight: of the
//! whole job, and of one worker while the job goes on.

use super::common::process::{self, Disturber};
use super::common::{finish, settings, start, wait_for};
use super::harness::{Scene, index};
use super::jobs::{self, Asked};
use std::time::Duration;
use testudo::checkpoint::schedule::Schedule;
use testudo::config::Settings;
use testudo::testing::{KILL_AT, Point};

/// Points of a cut, in a worker.
const CUT: [Point; 6] = [
    Point::CutBegun,
    Point::CutCopied,
    Point::CutReleased,
    Point::CutWritten,
    Point::CutSynced,
    Point::CutAcknowledged,
];

/// Points of a checkpoint, in the launching process.
const SEAL: [Point; 4] =
    [Point::BeforeSeal, Point::ManifestWritten, Point::RootWritten, Point::BeforeRetire];

fn scene(seed: u64) -> Scene {
    Scene::new("ordered", 200_000, 1, seed)
}

/// The whole job dies at each of some points, in the first checkpoint and in a later one, and goes
/// on each time.
fn dies_at(points: &[Point], who: &str) {
    for (first, point) in points.iter().enumerate() {
        let scene = scene(first as u64);
        for skip in [0, 3] {
            let ended = scene.crash_at(2, 16_000, who, *point, skip);
            assert_eq!(ended.signal, Some(libc::SIGKILL), "{point:?} was not reached: {ended:?}");
        }
        scene.end(2);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

pub fn a_job_that_dies_at_any_point_of_a_cut_is_exact() {
    dies_at(&CUT, "1");
}

pub fn a_job_that_dies_at_any_point_of_sealing_is_exact() {
    dies_at(&SEAL, "s");
}

/// A worker dies at each point of a cut; the job goes on, and so do its checkpoints.
pub fn a_worker_that_dies_at_any_point_of_a_cut_stops_no_checkpoint() {
    for (first, point) in CUT.into_iter().enumerate() {
        let mut scene = Scene::new("ordered", 300_000, 1, first as u64);
        let order = format!("1:{0}:2:1,0:{0}:1:3", index(point));
        let mut life = scene.life(2, 16_000).env(KILL_AT, &order).start();
        wait_for("three deaths in cuts, and a checkpoint after them", || {
            let over = life.child.try_wait().expect("our own child").is_some();
            (over || scene.newest() >= 8).then_some(())
        });
        life.signal_group(libc::SIGKILL);
        let ended = life.wait();
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{point:?}: {ended:?}");
        assert!(scene.crash(2, 40_000), "{point:?}: the job was too short");
        scene.end(2);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

/// Workers are killed at random for a while as the job takes checkpoints and in each of its lives.
pub fn workers_killed_at_random_during_checkpoints_change_nothing() {
    let scene = scene(5);
    for life in 0..3 {
        let settings = Settings {
            checkpoint_dir: Some(scene.checkpoints()),
            checkpoints: Schedule::Every(Duration::from_millis(10)),
            resume: true,
            ..settings(2)
        };
        let pace = if life < 2 { 4_000 } else { 0 };
        let parameters = Asked::text(scene.total, pace, &scene.files);
        let running = start(jobs::ordered, &parameters, settings);
        let view = running.workers().expect("the job starts");
        let mut disturber = Disturber::new(&running, &view, life);
        disturber.kill_randomly(8);
        let before = scene.newest();
        wait_for("a checkpoint after the deaths", || {
            (running.is_over() || scene.newest() > before + 1).then_some(())
        });
        if life < 2 {
            running.stop();
            running.stop();
            drop(finish(running));
        } else {
            finish(running).expect("the job survives");
        }
    }
    scene.check(&jobs::ordered_rows(scene.total));
}

/// A job that was stopped with much state: its checkpoint takes a while to load.
fn stopped(seed: u64) -> Scene {
    let mut scene = Scene::new("ordered", 200_000, 1, seed);
    assert!(scene.crash(2, 10_000), "the job was too short");
    // Then slowly: the pages that nobody asks for take longer than the job.
    scene.args = vec!["--load-bandwidth".into(), "200KiB".into()];
    scene
}

pub fn a_job_that_dies_while_it_loads_is_exact() {
    for (seed, point) in [Point::Imported, Point::Loading].into_iter().enumerate() {
        for workers in [2, 3] {
            let scene = stopped(seed as u64);
            let ended = scene.crash_at(workers, 4_000, "1", point, 0);
            assert_eq!(ended.signal, Some(libc::SIGKILL), "{point:?} was not reached: {ended:?}");
            let ended = scene.crash_at(workers, 4_000, "0", Point::StepBegin, 20);
            assert_eq!(ended.signal, Some(libc::SIGKILL), "no step was taken: {ended:?}");
            scene.end(workers);
            scene.check(&jobs::ordered_rows(scene.total));
        }
    }
}

pub fn a_worker_that_dies_while_it_loads_goes_on_loading() {
    for workers in [2, 3] {
        let scene = stopped(workers as u64);
        let order = format!(
            "0:{}:2:0,1:{}:1:0,1:{}:3:5",
            index(Point::Loading),
            index(Point::Imported),
            index(Point::Committed)
        );
        let ended = scene.resumed(workers, 0).env(KILL_AT, &order).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert!(ended.restarts() >= 3, "{} deaths", ended.restarts());
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

/// Checkpoints are taken while the state of the one before is still coming in, the job dies, and
/// goes on from these.
pub fn a_checkpoint_taken_while_loading_is_whole() {
    for lives in [[2, 2, 2], [2, 3, 2]] {
        let mut scene = stopped(7);
        for workers in lives {
            scene.crash(workers, 4_000);
        }
        scene.end(2);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

/// What was in flight is taken slowly, and the job dies before it is all taken, again and again.
pub fn a_job_that_dies_before_it_took_what_was_in_flight_is_exact() {
    for workers in [2, 3] {
        let scene = Scene::new("plumbing", 60_000, 2, workers as u64);
        let ended = scene.crash_at(2, 20_000, "s", Point::BeforeRetire, 2);
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
        for _ in 0..3 {
            let ended = scene.crash_at(workers, 20_000, "s", Point::BeforeRetire, 0);
            assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
        }
        scene.end(workers);
        scene.check(&jobs::plumbing_rows(scene.total));
    }
}

/// Thousands of records of one producer are in flight, twice over: those from before the first
/// crash, and behind them those from before the second.
pub fn what_was_in_flight_is_taken_in_the_order_in_which_it_was_sent() {
    for workers in [2, 3] {
        let mut scene = Scene::new("ordered", 240_000, 1, workers as u64);
        scene.ring = "256KiB";
        for skip in [2, 0, 0] {
            let ended = scene.crash_at(workers, 20_000, "s", Point::BeforeRetire, skip);
            assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
        }
        let ended = scene.crash_at(5 - workers, 20_000, "s", Point::BeforeRetire, 0);
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
        scene.end(workers);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

pub fn a_resume_that_always_fails_uses_up_the_budget() {
    let scene = stopped(9);
    let before = scene.rows(0);
    let order = format!("1:{}:1000:0", index(Point::Opened));
    let ended = scene.resumed(2, 0).env(KILL_AT, &order).run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert!(scene.rows(0).len() <= before.len());
    scene.end(2);
    scene.check(&jobs::ordered_rows(scene.total));
}

/// Stopped in the middle of its input, a job writes what its sources have read; going on takes that
/// back.
pub fn a_drained_job_goes_on_as_if_it_had_been_killed() {
    for workers in [1, 2] {
        let scene = Scene::new("windows", 200_000, 3, 1);
        let mut life = scene.life(workers, 12_000).start();
        assert!(scene.wait_for_checkpoints(&mut life, 0, 2), "the job was too short");
        life.signal(libc::SIGTERM);
        let ended = life.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        scene.end(workers);
        scene.check(&jobs::windows_rows(scene.total));
    }
}

/// No process of a job outlives it, whoever dies.
pub fn nothing_is_left_of_a_killed_job() {
    let shared = || super::harness::names("/dev/shm".as_ref());
    let before = shared();
    let scene = scene(3);
    let mut life = scene.life(3, 40_000).start();
    assert!(scene.wait_for_checkpoints(&mut life, 0, 2), "the job was too short");
    let workers = life.workers(3);
    life.signal(libc::SIGKILL);
    life.wait();
    for pid in workers {
        wait_for("the end of a worker", || {
            process::stat(pid).is_none_or(|stat| stat.state == 'Z').then_some(())
        });
    }
    // Other programs may have come and gone.
    wait_for("shared memory to be gone", || {
        shared().iter().all(|name| before.contains(name)).then_some(())
    });
    // Neither the folder nor the output is locked.
    scene.end(1);
    scene.check(&jobs::ordered_rows(scene.total));
}
