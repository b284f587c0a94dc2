//! What a job that goes on owes to what it finds: copies of a broadcast and lines of standard input
//! when there are other subtasks now, bytes in flight, outputs and options that do not fit.

use super::common::{Random, text};
use super::harness::{Scene, names};
use super::jobs::{self, Asked};
use super::live;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;
use testudo::testing::Point;

/// How many subtasks a record was copied to is that of the life in which it was read: a copy in
/// flight is taken by one of those that there are then, and by one only.
pub fn each_copy_of_a_broadcast_is_taken_once_when_resumed_with_other_workers() {
    for (seed, lives) in [&[1, 2, 3, 1][..], &[3, 1, 2], &[2, 3, 2]].into_iter().enumerate() {
        let mut scene = Scene::new("copied", 12_000, 1, seed as u64);
        live(&mut scene, lives, 80_000);
        let mut copies: BTreeMap<u64, usize> = BTreeMap::new();
        for row in scene.rows(0) {
            *copies.entry(row.parse().expect("a number")).or_default() += 1;
        }
        assert_eq!(copies.len() as u64, scene.total, "records are missing in {lives:?}");
        // Each part of the source is read in order, and the parts are those of the first life.
        for part in 0..lives[0] as u64 {
            let of_part = copies.iter().filter(|(n, _)| *n % lives[0] as u64 == part);
            let mut found: Vec<usize> = of_part.map(|(_, count)| *count).collect();
            found.dedup();
            let mut left = lives.iter();
            let is_in_turn = found.iter().all(|count| left.any(|workers| workers == count));
            assert!(is_in_turn, "{lives:?}: part {part} was copied to {found:?}");
        }
    }
}

/// What is read from a pipe is gone when all processes die, but for what a checkpoint holds: each
/// life's lines are there up to one of them, once, and the last life's are all there.
pub fn lines_of_standard_input_that_a_checkpoint_holds_come_once() {
    const LINES: usize = 20_000;
    for (seed, lives) in [[1, 2, 3, 1], [2, 1, 3, 2]].into_iter().enumerate() {
        let scene = Scene::new("typed", 0, 1, seed as u64);
        let mut random = Random::new(seed as u64);
        for (number, workers) in lives.into_iter().enumerate() {
            let is_last = number + 1 == lives.len();
            let (before, pace) = (scene.newest(), if is_last { 0 } else { 20_000 });
            let mut life = scene.resumed(workers, pace).stdin(Stdio::piped()).start();
            let mut pipe = life.child.stdin.take().expect("a pipe");
            let feeder = std::thread::spawn(move || {
                let lines: String = (0..LINES).map(|n| format!("{number}:{n}\n")).collect();
                // A job that is killed reads no more.
                let _ = pipe.write_all(lines.as_bytes());
            });
            if !is_last && scene.wait_for_checkpoints(&mut life, before, 2) {
                std::thread::sleep(Duration::from_micros(random.below(12_000)));
                life.signal_group(libc::SIGKILL);
            }
            let ended = life.wait();
            feeder.join().expect("the feeder");
            assert!(ended.signal == Some(libc::SIGKILL) || ended.code == Some(0), "{ended:?}");
        }
        let mut found: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for row in scene.rows(0) {
            let (life, line) = row.split_once(':').expect("a row");
            let number = |text: &str| text.parse::<usize>().expect("a number");
            found.entry(number(life)).or_default().push(number(line));
        }
        for (life, mut lines) in found {
            lines.sort_unstable();
            let whole: Vec<usize> = (0..lines.len()).collect();
            assert!(lines == whole, "life {life} of {lives:?} has holes, or lines twice");
            assert!(life + 1 < lives.len() || lines.len() == LINES, "the last life lacks lines");
        }
    }
}

/// The sender overwrites a ring behind its head: were that to move before the bytes between the two
/// cuts are copied, others would be taken in their place.
pub fn r15_what_is_in_flight_stays_in_its_ring_until_it_is_copied() {
    let mut scene = Scene::new("bursts", 100_000, 1, 15);
    scene.ring = "4KiB";
    let crash = |skip| scene.crash_at(2, 20_000, "s", Point::BeforeRetire, skip).signal.is_some();
    let killed = [1, 2, 3, 1, 2, 3, 1].into_iter().filter(|skip| crash(*skip)).count();
    assert!(killed >= 4, "the job is too short: it was killed {killed} times");
    scene.end(2);
    scene.check(&jobs::bursts_rows(scene.total));
}

/// A job that was killed behind its second checkpoint.
fn killed(job: &'static str, seed: u64) -> Scene {
    let scene = Scene::new(job, 90_000, 1, seed);
    let ended = scene.crash_at(2, 40_000, "s", Point::BeforeRetire, 2);
    assert_eq!(ended.signal, Some(libc::SIGKILL), "{ended:?}");
    scene
}

pub fn other_key_groups_than_the_checkpoints_are_said_and_not_used() {
    let scene = killed("ordered", 1);
    let parameters = Asked::text(scene.total, 0, &scene.files);
    let checkpoints = text(&scene.checkpoints());
    let cli = super::common::program::Cli::new("ordered", &parameters);
    let ended = cli
        .args(["--workers", "3", "--key-groups", "64", "--ring-bytes", "16KiB", "--resume"])
        .args(["--checkpoint-dir", &checkpoints, "--no-progress"])
        .run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let said = "going on with the 16 key groups of checkpoint";
    assert!(ended.err.contains(said) && ended.err.contains("not with 64"), "{}", ended.err);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn a_resume_without_its_output_is_refused_and_makes_none() {
    let scene = killed("ordered", 2);
    let (output, put_away) = (&scene.files[0], scene.folder.path().join("put-away"));
    fs::rename(output, &put_away).expect("our own file");
    for workers in [2, 3] {
        let ended = scene.resumed(workers, 0).run();
        assert_eq!(ended.code, Some(6), "{}", ended.err);
        let says = ["is gone", "without --resume"].iter().all(|said| ended.err.contains(said));
        assert!(says, "{}", ended.err);
        assert!(!output.exists(), "an empty output was made");
    }
    // Shorter than it was: also refused, and not touched.
    let bytes = fs::read(&put_away).expect("our own file");
    fs::write(output, &bytes[..10]).expect("our own file");
    let ended = scene.resumed(2, 0).run();
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains("changed from outside"), "{}", ended.err);
    assert_eq!(fs::read(output).expect("our own file"), &bytes[..10]);
    fs::rename(&put_away, output).expect("our own file");
    scene.end(2);
    scene.check(&jobs::ordered_rows(scene.total));
}

pub fn resuming_a_finished_job_makes_no_output() {
    let scene = Scene::new("ordered", 5_000, 1, 3);
    scene.end(2);
    fs::remove_file(&scene.files[0]).expect("our own file");
    let ended = scene.end(2);
    assert!(ended.err.contains("had come to its end"), "{}", ended.err);
    assert!(!scene.files[0].exists(), "an empty output was made");
}

/// The report of the last life counts what all lives have done.
pub fn counters_go_on_when_resumed_with_other_workers() {
    for (seed, lives) in [&[3, 1, 2][..], &[1, 3, 2]].into_iter().enumerate() {
        let mut scene = Scene::new("ordered", 90_000, 1, seed as u64);
        for workers in &lives[..2] {
            assert!(scene.crash(*workers, 30_000 * *workers as u64), "the job was too short");
        }
        let report = scene.end(lives[2]).report();
        let seen = (&report["records_in"], &report["counters"]["seen"]);
        assert_eq!(seen, (&scene.total.into(), &scene.total.into()), "{lives:?}: {report}");
    }
}

/// However the source's parts are dealt out, all of them together read as many as were asked for.
pub fn a_limit_is_kept_when_resumed_with_other_workers() {
    for (seed, lives) in [&[1, 3][..], &[3, 2], &[2, 1, 3]].into_iter().enumerate() {
        let mut scene = Scene::new("bursts", 1_000_000, 1, seed as u64);
        scene.args = vec!["--limit".into(), "12000".into()];
        live(&mut scene, lives, 40_000);
        assert_eq!(scene.rows(0).len(), 12_000, "{lives:?}");
    }
}

/// Names of parts that are not final.
fn open_parts(scene: &Scene) -> Vec<String> {
    names(&scene.files[0]).into_iter().filter(|name| name.ends_with(".open")).collect()
}

/// Stopped at once or drained in the middle of its input, a job leaves what no checkpoint holds in
/// parts whose names say so; going on writes that again. At the end of all input every part is
/// final.
pub fn parts_are_final_at_the_end_and_withdrawn_after_a_stop() {
    for (seed, signals) in [1, 2].into_iter().enumerate() {
        let scene = Scene::new("bursts", 200_000, 1, seed as u64);
        let mut life = scene.life(2, 20_000).start();
        assert!(scene.wait_for_checkpoints(&mut life, 0, 2), "the job was too short");
        for _ in 0..signals {
            life.signal(libc::SIGTERM);
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(life.wait());
        if signals == 2 {
            assert!(!open_parts(&scene).is_empty(), "all is final, though no checkpoint holds it");
        }
        scene.end(if signals == 1 { 2 } else { 1 });
        assert_eq!(open_parts(&scene), Vec::<String>::new());
        scene.check(&jobs::bursts_rows(scene.total));
    }
}
