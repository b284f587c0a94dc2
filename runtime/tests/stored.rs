//! A job under a service manager that keeps descriptors: killed as a whole and started again, it
//! goes on with its state, without any checkpoint.

mod common;

use common::manager::Manager;
use common::process::{self, Held, supervisor_of};
use common::program::{Cli, Started};
use common::tally;
use common::tool::{said, tool};
use common::{Jobs, Random, deep, folder, trials, wait_for};
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::serde_json::{self, Value};

const JOBS: Jobs = &[("gated", tally::gated), ("another", another)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_killed_job_is_taken_up_by_the_next_keeper_with_its_state,
            a_job_of_which_a_part_is_lost_begins_afresh,
            another_job_is_not_taken_up_in_silence,
            a_service_manager_that_keeps_nothing_changes_nothing,
        ],
    )
}

fn job(total: u64, output: &Path) -> Cli {
    let place = common::text(output.parent().expect("a folder"));
    // Under a shell the program has another name.
    let args = ["--rate", "200000", "--report", "json", "--name", "job"];
    Cli::new("gated", &tally::parameters(total, output))
        .workers(2)
        .args(args)
        .env("XDG_RUNTIME_DIR", &place)
        .env("TMPDIR", &place)
}

/// Waits until both workers of this life have claimed: only then does their end count.
fn await_claims(at: &Path, job: &Started) {
    wait_for("both workers at work", || {
        let (_, out, _) = said(&tool(at, &["status", "job", "--json"]));
        let status: Value = serde_json::from_str(&out).ok()?;
        let living = process::workers_of(job.pid());
        let workers = status["figures"]["workers"].as_array()?;
        let is_here = |worker: &Value| {
            worker["pid"].as_u64().is_some_and(|pid| living.contains(&(pid as u32)))
        };
        (workers.len() == 2 && workers.iter().all(is_here)).then_some(())
    });
}

/// Kills all processes of a job, as a service manager sees to when the first one is killed.
fn kill_all(job: Started) {
    let held: Vec<Held> = job
        .workers(2)
        .into_iter()
        .chain(supervisor_of(job.pid()))
        .filter_map(|pid| Held::child_of(pid, job.pid()))
        .collect();
    process::signal_group(job.pid(), libc::SIGKILL);
    assert_eq!(job.wait().signal, Some(libc::SIGKILL));
    wait_for("the end of all", || held.iter().all(Held::has_ended).then_some(()));
}

fn a_killed_job_is_taken_up_by_the_next_keeper_with_its_state() {
    for seed in 0..deep(20, 2) {
        let folder = folder();
        let output = folder.path().join("rows");
        let (total, manager) = (deep(2_000_000, 200_000), Manager::start(folder.path()));
        let (mut random, mut claimed) = (Random::new(seed), 0);
        for life in 0..deep(10, 3) {
            let started = manager.serve(job(total, &output)).start();
            wait_for("all to be kept", || manager.has_a_job().then_some(()));
            // The others may be killed before their workers have claimed.
            if life % 2 == 0 {
                await_claims(folder.path(), &started);
                claimed += 1;
            }
            std::thread::sleep(Duration::from_micros(random.below(150_000)));
            kill_all(started);
        }
        tally::open_gate(&output);
        let ended = manager.serve(job(total, &output)).run();
        let report = ended.report();
        assert_eq!(report["records_in"], total, "{report}");
        tally::check(&output, total, 2);
        // Each worker died with its job and was replaced.
        assert!(ended.restarts() >= 2 * claimed, "{report}");
        wait_for("nothing to be kept", || (manager.count() == 0).then_some(()));
    }
}

fn a_job_of_which_a_part_is_lost_begins_afresh() {
    let folder = folder();
    let output = folder.path().join("rows");
    let (total, manager) = (50_000, Manager::start(folder.path()));
    let started = manager.serve(job(total, &output)).start();
    wait_for("all to be kept", || manager.has_a_job().then_some(()));
    kill_all(started);
    manager.lose_one();
    tally::open_gate(&output);
    let ended = manager.serve(job(total, &output)).run();
    assert_eq!(ended.restarts(), 0, "{}", ended.err);
    tally::check(&output, total, 2);
    wait_for("nothing to be kept", || (manager.count() == 0).then_some(()));
}

fn another_job_is_not_taken_up_in_silence() {
    let folder = folder();
    let output = folder.path().join("rows");
    let manager = Manager::start(folder.path());
    let started = manager.serve(job(u64::MAX, &output)).start();
    wait_for("all to be kept", || manager.has_a_job().then_some(()));
    kill_all(started);
    let ended = manager.serve(Cli::new("another", "")).run();
    assert!(ended.code.is_some_and(|code| code != 0), "{ended:?}");
    assert!(ended.err.contains("plans another job"), "{}", ended.err);
    // Once that was said, the next start begins afresh.
    wait_for("nothing to be kept", || (manager.count() == 0).then_some(()));
    assert_eq!(
        manager.serve(Cli::new("another", "").args(["--report", "json"])).run().restarts(),
        0
    );
}

/// Another flow than the one that is kept.
fn another(flow: &Flow, _: &str) {
    flow.source("more", Generator::new(10, |n| n)).for_each(|_| ());
}

fn a_service_manager_that_keeps_nothing_changes_nothing() {
    let folder = folder();
    let output = folder.path().join("rows");
    let gone = folder.path().join("nobody").display().to_string();
    tally::open_gate(&output);
    let ended = job(1000, &output).env("NOTIFY_SOCKET", &gone).run();
    assert_eq!(ended.restarts(), 0, "{}", ended.err);
    tally::check(&output, 1000, 2);
}
