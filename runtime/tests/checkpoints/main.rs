//! Checkpoints end to end: jobs are killed as a whole, at random and at each named point, and go on
//! from their checkpoint folder with the same or another number of workers. Each test compares with
//! what an undisturbed job writes.

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod jobs;

use common::{Jobs, trials};
use harness::Scene;
use std::process::ExitCode;

const JOBS: Jobs = &[
    ("ordered", jobs::ordered),
    ("windows", jobs::windows),
    ("plumbing", jobs::plumbing),
    ("copied", jobs::copied),
    ("files", jobs::files),
    ("counted", jobs::counted),
    ("recounted", jobs::recounted),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            keyed_state_is_exact_after_crashes_of_everything,
            windows_and_timers_are_exact_after_crashes_of_everything,
            records_without_keys_are_exact_after_crashes_of_everything,
            broadcast_records_are_exact_after_crashes_of_everything,
            files_are_exact_after_crashes_of_everything,
            keyed_state_is_exact_when_resumed_with_other_workers,
            windows_and_timers_are_exact_when_resumed_with_other_workers,
            records_without_keys_are_exact_when_resumed_with_other_workers,
            files_are_exact_when_resumed_with_other_workers,
        ],
    )
}

/// Workers of each life, and the last one's.
type Lives = &'static [usize];

const SAME: [Lives; 3] = [&[1, 1, 1], &[2, 2, 2, 2], &[3, 3, 3]];
const OTHERS: [Lives; 3] = [&[2, 1], &[2, 3], &[3, 1, 2]];

/// Goes through lives that are killed, and one that ends.
fn live(scene: &mut Scene, lives: Lives, pace: u64) {
    let (last, killed) = lives.split_last().expect("a life");
    let mut crashes = 0;
    for workers in killed {
        crashes += usize::from(scene.crash(*workers, pace * *workers as u64));
    }
    assert!(crashes > 0, "every life came to its end: the job is too short");
    scene.end(*last);
}

fn keyed(all: [Lives; 3]) {
    for (seed, lives) in (1..).zip(all) {
        let mut scene = Scene::new("ordered", 60_000, 1, seed);
        live(&mut scene, lives, 8_000);
        scene.check(&jobs::ordered_rows(scene.total));
    }
}

fn keyed_state_is_exact_after_crashes_of_everything() {
    keyed(SAME);
}

fn keyed_state_is_exact_when_resumed_with_other_workers() {
    keyed(OTHERS);
}

fn windowed(all: [Lives; 3]) {
    for (seed, lives) in (1..).zip(all) {
        let mut scene = Scene::new("windows", 40_000, 3, seed);
        live(&mut scene, lives, 12_000);
        scene.check(&jobs::windows_rows(scene.total));
    }
}

fn windows_and_timers_are_exact_after_crashes_of_everything() {
    windowed(SAME);
}

fn windows_and_timers_are_exact_when_resumed_with_other_workers() {
    windowed(OTHERS);
}

fn keyless(all: [Lives; 3]) {
    for (seed, lives) in (1..).zip(all) {
        let mut scene = Scene::new("plumbing", 20_000, 2, seed);
        live(&mut scene, lives, 5_000);
        scene.check(&jobs::plumbing_rows(scene.total));
    }
}

fn records_without_keys_are_exact_after_crashes_of_everything() {
    keyless(SAME);
}

fn records_without_keys_are_exact_when_resumed_with_other_workers() {
    keyless(OTHERS);
}

fn broadcast_records_are_exact_after_crashes_of_everything() {
    for (seed, lives) in (1..).zip(SAME) {
        let mut scene = Scene::new("copied", 40_000, 1, seed);
        live(&mut scene, lives, 10_000);
        scene.check(&jobs::copied_rows(scene.total, lives[0]));
    }
}

fn filed(all: [Lives; 3]) {
    for (seed, lives) in (1..).zip(all) {
        let mut scene = Scene::new("files", 40_000, 2, seed);
        let rejects = scene.folder.path().join("rejects");
        scene.args = vec!["--rejects".into(), common::text(&rejects)];
        jobs::write_input(&scene.files[0], scene.total);
        live(&mut scene, lives, 12_000);
        let mut rows = scene.rows(1);
        rows.retain(|row| row != "id,name");
        harness::same(&rows, &jobs::files_rows(scene.total), "rows of a file");
        let refused = common::sorted_lines(&rejects).len() as u64;
        assert_eq!(refused, (0..scene.total).filter(|n| n % 40 == 7).count() as u64, "rejects");
    }
}

fn files_are_exact_after_crashes_of_everything() {
    filed(SAME);
}

fn files_are_exact_when_resumed_with_other_workers() {
    filed(OTHERS);
}
