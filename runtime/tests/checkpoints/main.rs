//! Checkpoints end to end: jobs are killed as a whole, at random and at each named point, and go on
//! from their checkpoint folder with the same or another number of workers. Each test compares with
//! what an undisturbed job writes.

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod jobs;
mod points;
mod reshape;
mod trouble;

use common::{Jobs, trials};
use harness::Scene;
use points::*;
use reshape::*;
use std::process::ExitCode;
use trouble::*;

const JOBS: Jobs = &[
    ("ordered", jobs::ordered),
    ("windows", jobs::windows),
    ("plumbing", jobs::plumbing),
    ("copied", jobs::copied),
    ("bursts", jobs::bursts),
    ("typed", jobs::typed),
    ("files", jobs::files),
    ("counted", jobs::counted),
    ("recounted", jobs::recounted),
];

fn main() -> ExitCode {
    testudo::init();
    // Most of the time they wait: for a checkpoint, or for records that are held up.
    common::host_on(
        2,
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
            each_copy_of_a_broadcast_is_taken_once_when_resumed_with_other_workers,
            lines_of_standard_input_that_a_checkpoint_holds_come_once,
            r15_what_is_in_flight_stays_in_its_ring_until_it_is_copied,
            other_key_groups_than_the_checkpoints_are_said_and_not_used,
            a_resume_without_its_output_is_refused_and_makes_none,
            resuming_a_finished_job_makes_no_output,
            counters_go_on_when_resumed_with_other_workers,
            a_limit_is_kept_when_resumed_with_other_workers,
            parts_are_final_at_the_end_and_withdrawn_after_a_stop,
            a_job_that_dies_at_any_point_of_a_cut_is_exact,
            a_job_that_dies_at_any_point_of_sealing_is_exact,
            a_worker_that_dies_at_any_point_of_a_cut_stops_no_checkpoint,
            workers_killed_at_random_during_checkpoints_change_nothing,
            a_job_that_dies_while_it_loads_is_exact,
            a_worker_that_dies_while_it_loads_goes_on_loading,
            a_checkpoint_taken_while_loading_is_whole,
            a_job_that_dies_before_it_took_what_was_in_flight_is_exact,
            what_was_in_flight_is_taken_in_the_order_in_which_it_was_sent,
            a_resume_that_always_fails_uses_up_the_budget,
            a_drained_job_goes_on_as_if_it_had_been_killed,
            nothing_is_left_of_a_killed_job,
            a_job_without_io_uring_writes_its_checkpoints_otherwise_and_says_so_once,
            a_job_without_userfaultfd_loads_at_once_and_says_so_once,
            a_full_disk_fails_checkpoints_until_there_is_room,
            a_job_whose_checkpoint_folder_is_removed_goes_on_and_says_so,
            a_checkpoint_folder_that_cannot_be_is_refused_before_anything_is_touched,
            a_damaged_manifest_is_reported_and_the_checkpoint_before_is_used,
            a_damaged_root_slot_is_reported_and_the_checkpoint_before_is_used,
            a_damaged_index_is_reported_and_the_checkpoint_before_is_used,
            a_damaged_block_is_reported_and_the_checkpoint_before_is_used,
            a_job_that_dies_after_it_went_back_does_not_find_the_damaged_checkpoint_again,
            when_all_is_damaged_nothing_is_touched,
            checkpoints_of_something_else_are_refused_and_nothing_is_touched,
            an_added_operator_begins_empty,
            a_removed_operator_is_refused_unless_its_state_may_go,
            a_second_job_on_a_folder_is_refused,
            resuming_without_a_folder_is_a_usage_error,
            resuming_where_there_is_nothing_begins_afresh_and_says_so,
            resuming_a_finished_job_changes_nothing,
            a_checkpoint_may_be_named_by_number_and_by_path,
            a_job_that_begins_again_does_not_go_back_to_an_older_run,
            a_folder_does_not_grow_without_bound,
        ],
    )
}

/// Workers of each life, and the last one's.
type Lives = &'static [usize];

const SAME: [Lives; 3] = [&[1, 1, 1], &[2, 2, 2, 2], &[3, 3, 3]];
const OTHERS: [Lives; 3] = [&[2, 1], &[1, 2, 3, 1], &[3, 1, 2]];

/// Among them one in which a subtask that had a part comes back.
const OTHERS_OF_FOLDERS: [Lives; 3] = [&[2, 1], &[3, 1, 2], &[1, 2, 3]];

/// Goes through lives that are killed, and one that ends.
fn live(scene: &mut Scene, lives: &[usize], pace: u64) {
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
        let mut scene = Scene::new("ordered", 180_000, 1, seed);
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
        let mut scene = Scene::new("windows", 120_000, 3, seed);
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
        let mut scene = Scene::new("plumbing", 60_000, 2, seed);
        live(&mut scene, lives, 5_000);
        scene.check(&jobs::plumbing_rows(scene.total));
    }
}

fn records_without_keys_are_exact_after_crashes_of_everything() {
    keyless(SAME);
}

fn records_without_keys_are_exact_when_resumed_with_other_workers() {
    keyless(OTHERS_OF_FOLDERS);
}

fn broadcast_records_are_exact_after_crashes_of_everything() {
    for (seed, lives) in (1..).zip(SAME) {
        let mut scene = Scene::new("copied", 120_000, 1, seed);
        live(&mut scene, lives, 10_000);
        scene.check(&jobs::copied_rows(scene.total, lives[0]));
    }
}

fn filed(all: [Lives; 3]) {
    for (seed, lives) in (1..).zip(all) {
        let mut scene = Scene::new("files", 120_000, 2, seed);
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
    filed(OTHERS_OF_FOLDERS);
}
