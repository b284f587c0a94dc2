//! What `testudo` does to a running job: kills a worker, restarts, pauses, resumes, stops. Each job
//! checks itself: its results are exact whatever was done to it.

mod common;

use common::program::{Cli, Started};
use common::tally::{self, ordered};
use common::tool::{said, tool};
use common::{Jobs, deep, folder, process, trials, wait_for};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::serde_json::{self, Value, json};
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[("ordered", ordered)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_worker_killed_by_the_tool_is_replaced_and_nothing_is_lost,
            a_paused_job_stands_still_whoever_dies_and_goes_on,
            a_paused_job_can_be_stopped,
            a_job_stopped_by_the_tool_has_processed_what_it_took,
            a_job_stopped_at_once_says_so,
            a_worker_that_there_is_not_is_refused,
            a_restarted_worker_goes_on_in_another_process_and_nothing_is_lost,
            a_hundred_restarts_of_each_worker_change_nothing_and_leave_nothing,
            a_paused_job_can_be_restarted,
            a_restart_waits_for_an_open_checkpoint_and_both_are_whole,
            a_second_restart_meanwhile_is_refused,
            r2_a_death_at_any_point_of_a_handover_is_recovered_from,
            a_supervisor_that_dies_while_it_restarts_workers_leaves_none_without_a_successor,
        ],
    )
}

/// A job without an end, and the place where the tool finds it.
struct Steered {
    at: tempfile::TempDir,
    output: PathBuf,
    job: Started,
}

impl Steered {
    fn start() -> Self {
        Self::start_with(|_, job| job)
    }

    fn start_with(more: impl FnOnce(&Path, Cli) -> Cli) -> Self {
        let at = folder();
        let output = at.path().join("rows.csv");
        let place = common::text(at.path());
        let job = Cli::new("ordered", &tally::parameters(u64::MAX, &output))
            .workers(2)
            .args(["--report", "json"])
            .env("XDG_RUNTIME_DIR", &place)
            .env("TMPDIR", &place);
        let job = more(at.path(), job).start();
        let this = Self { at, output, job };
        wait_for("the job's socket", || (this.ask(&["status"]).0 == 0).then_some(()));
        this
    }

    fn place(&self) -> &Path {
        self.at.path()
    }

    /// The tool's exit code and what it says, as JSON; a refusal is in `message`.
    fn ask(&self, words: &[&str]) -> (i32, Value) {
        let words: Vec<&str> =
            [words[0], "job"].iter().chain(&words[1..]).chain(&["--json"]).copied().collect();
        let (code, out, _) = said(&tool(self.place(), &words));
        (code, serde_json::from_str(&out).unwrap_or_default())
    }

    fn status(&self) -> Value {
        self.ask(&["status"]).1
    }

    fn records_in(&self) -> u64 {
        self.status()["records_in"].as_u64().expect("a number")
    }

    /// Waits for the job's end and checks what it has written.
    fn check(self) -> Value {
        let ended = self.job.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let report = ended.err.lines().last().expect("the report");
        let report: Value = serde_json::from_str(report).expect("the report");
        tally::check(&self.output, report["records_in"].as_u64().expect("a number"), 2);
        report
    }
}

fn a_worker_killed_by_the_tool_is_replaced_and_nothing_is_lost() {
    let job = Steered::start();
    for (kills, words) in
        [["kill-worker", "1"].as_slice(), &["kill-worker", "--worker", "0"]].into_iter().enumerate()
    {
        let (code, killed) = job.ask(words);
        assert_eq!((code, &killed["reply"]), (0, &"killed".into()), "{killed}");
        assert_eq!(killed["worker"], 1 - kills);
        wait_for("the death to be counted", || {
            (job.status()["restarts"] == kills + 1).then_some(())
        });
        let before = job.records_in();
        wait_for("records after the kill", || (job.records_in() > before).then_some(()));
    }
    assert_eq!(job.ask(&["stop"]).0, 0);
    let report = job.check();
    assert_eq!(report["restarts"][0]["cause"], "SIGKILL");
}

fn a_paused_job_stands_still_whoever_dies_and_goes_on() {
    let job = Steered::start();
    assert_eq!(job.ask(&["resume"]).1["was_paused"], false);
    let (code, paused) = job.ask(&["pause"]);
    assert_eq!((code, &paused["still"]), (0, &true.into()), "{paused}");
    // One that had no processor for so long may be in a step yet.
    wait_for("both workers to sleep", || {
        let sleeps = |pid: &u32| process::stat(*pid).is_some_and(|stat| stat.state == 'S');
        pids(&job).iter().all(sleeps).then_some(())
    });
    let status = job.status();
    assert_eq!(status["is_paused"], true);
    let stood = status["records_in"].clone();
    // A successor finds the job paused.
    assert_eq!(job.ask(&["kill-worker", "0"]).0, 0);
    wait_for("the successor", || (job.status()["restarts"] == 1).then_some(()));
    assert_eq!(job.ask(&["pause"]).1["still"], true);
    assert_eq!(job.status()["records_in"], stood);
    assert_eq!(job.ask(&["resume"]).1["was_paused"], true);
    assert_eq!(job.status()["is_paused"], false);
    let stood = stood.as_u64().expect("a number");
    wait_for("records after the pause", || (job.records_in() > stood).then_some(()));
    assert_eq!(job.ask(&["stop"]).0, 0);
    job.check();
}

fn a_paused_job_can_be_stopped() {
    let job = Steered::start();
    assert_eq!(job.ask(&["pause"]).0, 0);
    assert_eq!(job.ask(&["stop"]).1["now"], false);
    job.check();
}

fn a_job_stopped_by_the_tool_has_processed_what_it_took() {
    let job = Steered::start();
    wait_for("records", || (job.records_in() > 10_000).then_some(()));
    let (code, out, _) = said(&tool(job.place(), &["stop", "job"]));
    assert_eq!((code, out.as_str()), (0, "draining\n"));
    assert!(job.check()["records_in"].as_u64() > Some(10_000));
}

fn a_job_stopped_at_once_says_so() {
    let job = Steered::start();
    assert_eq!(job.ask(&["stop", "--now"]).1["now"], true);
    let ended = job.job.wait();
    assert_eq!(ended.code, Some(130), "{}", ended.err);
    assert!(ended.err.contains("stopped before the end, on request"), "{}", ended.err);
}

fn a_worker_that_there_is_not_is_refused() {
    let job = Steered::start();
    let (code, _, err) = said(&tool(job.place(), &["kill-worker", "job", "2"]));
    let expected = "testudo: job: there is no worker 2: the job has workers 0 to 1\n";
    assert_eq!((code, err.as_str()), (1, expected));
    assert_eq!(job.ask(&["stop"]).0, 0);
    job.check();
}

/// The processes of the job's workers, by worker.
fn pids(job: &Steered) -> Vec<u32> {
    let mut workers = job.job.workers(2);
    let name = |pid: &u32| process::stat(*pid).map(|stat| stat.name);
    workers.sort_by_key(name);
    workers
}

fn a_restarted_worker_goes_on_in_another_process_and_nothing_is_lost() {
    let job = Steered::start();
    let before = pids(&job);
    let (code, restarted) = job.ask(&["restart", "--worker", "1"]);
    assert_eq!(code, 0, "{restarted}");
    let new = restarted["workers"][0]["pid"].as_u64().expect("a process") as u32;
    let after = pids(&job);
    assert_eq!((after[0], after[1]), (before[0], new));
    assert_ne!(before[1], new);
    let (code, restarted) = job.ask(&["restart"]);
    assert_eq!((code, restarted["workers"].as_array().map(Vec::len)), (0, Some(2)));
    let seen = job.records_in();
    wait_for("records after it", || (job.records_in() > seen).then_some(()));
    assert_eq!(job.ask(&["restart", "--worker", "2"]).0, 1);
    assert_eq!(job.ask(&["stop"]).0, 0);
    assert_eq!(job.check()["restarts"], json!([]), "giving way is no death");
}

fn a_hundred_restarts_of_each_worker_change_nothing_and_leave_nothing() {
    let job = Steered::start();
    assert_eq!(job.ask(&["restart"]).0, 0);
    let open = process::descriptors(job.job.supervisor());
    for _ in 0..deep(500, 100) {
        let (code, restarted) = job.ask(&["restart"]);
        assert_eq!(code, 0, "{restarted}");
    }
    wait_for("the last ones to have left", || {
        (process::children(job.job.supervisor()).len() == 2).then_some(())
    });
    // One for whoever asks.
    wait_for("descriptors to be closed", || {
        (process::descriptors(job.job.supervisor()) <= open + 1).then_some(())
    });
    assert_eq!(job.ask(&["stop"]).0, 0);
    assert_eq!(job.check()["restarts"], json!([]));
}

fn a_paused_job_can_be_restarted() {
    let job = Steered::start();
    assert_eq!(job.ask(&["pause"]).1["still"], true);
    assert_eq!(job.ask(&["restart"]).0, 0);
    assert_eq!(job.status()["is_paused"], true);
    assert_eq!(job.ask(&["resume"]).0, 0);
    assert_eq!(job.ask(&["stop"]).0, 0);
    job.check();
}

fn a_restart_waits_for_an_open_checkpoint_and_both_are_whole() {
    let job = Steered::start_with(|at, job| {
        let folder = common::text(&at.join("ck"));
        job.args(["--checkpoint-dir", &folder, "--checkpoint-interval", "20ms"])
    });
    for _ in 0..10 {
        let (code, restarted) = job.ask(&["restart"]);
        assert_eq!(code, 0, "{restarted}");
    }
    // One of the schedule's may be open.
    wait_for("another checkpoint", || (job.ask(&["checkpoint", "now"]).0 == 0).then_some(()));
    assert_eq!(job.ask(&["stop"]).0, 0);
    let report = job.check();
    assert_eq!(report["restarts"], json!([]));
    assert!(report["checkpoints"]["completed"].as_u64() > Some(0), "{report}");
}

fn a_second_restart_meanwhile_is_refused() {
    let job = Steered::start();
    let asked: Vec<_> = std::thread::scope(|scope| {
        let asks = (0..4).map(|_| scope.spawn(|| job.ask(&["restart"])));
        let asks: Vec<_> = asks.collect();
        asks.into_iter().map(|ask| ask.join().expect("no panic")).collect()
    });
    assert!(asked.iter().any(|(code, _)| *code == 0), "{asked:?}");
    for (code, said) in asked.iter().filter(|(code, _)| *code != 0) {
        let why = said["message"].as_str().unwrap_or_default();
        assert!(*code == 1 && why.contains("are being restarted"), "{said}");
    }
    assert_eq!(job.ask(&["stop"]).0, 0);
    job.check();
}

fn r2_a_death_at_any_point_of_a_handover_is_recovered_from() {
    use Point::{Claimed, Opened, Published, RolledBack, StepPublished};
    let successors = Point::HANDOVER[..3].iter().chain(&[Claimed, RolledBack, Opened, Published]);
    let successors = successors.chain([&StepPublished]).map(|point| ("n1", *point));
    let own = Point::HANDOVER[3..].iter().map(|point| ("1", *point));
    for (who, point) in successors.chain(own) {
        let order = format!("{who}:{}:1", point.number());
        let job = Steered::start_with(|_, job| job.env(KILL_AT, &order));
        // Whether it is done or says why not, the job goes on.
        let (_, said) = job.ask(&["restart", "--worker", "1"]);
        let seen = job.records_in();
        wait_for("records after it", || (job.records_in() > seen + 5_000).then_some(()));
        // Who gave way is no dead worker, and neither is a successor that has not taken over.
        let without = [Point::GaveWay, Point::Prepared, Point::Waiting, Point::Turn, Claimed];
        let is_none = without.contains(&point);
        if !is_none {
            wait_for("the death to be counted", || {
                (job.status()["restarts"].as_u64() > Some(0)).then_some(())
            });
        }
        assert_eq!(job.ask(&["stop"]).0, 0);
        let report = job.check();
        assert_eq!(report["restarts"] == json!([]), is_none, "{point:?}: {said}: {report}");
    }
}

fn a_supervisor_that_dies_while_it_restarts_workers_leaves_none_without_a_successor() {
    let job = Steered::start();
    for round in 0..deep(100, 6) {
        let supervisor = job.job.supervisor();
        let held = process::Held::child_of(supervisor, job.job.pid()).expect("it leads");
        std::thread::scope(|scope| {
            let restart = scope.spawn(|| job.ask(&["restart"]));
            std::thread::sleep(std::time::Duration::from_millis(round * 5 % 32));
            assert!(held.signal(libc::SIGKILL));
            // Whether it was done before, or nobody answers any more.
            restart.join().expect("no panic");
        });
        wait_for("another supervisor", || (job.ask(&["status"]).0 == 0).then_some(()));
        let seen = job.records_in();
        wait_for("records after it", || (job.records_in() > seen + 1000).then_some(()));
        job.job.workers(2);
    }
    assert_eq!(job.ask(&["restart"]).0, 0);
    assert_eq!(job.ask(&["stop"]).0, 0);
    job.check();
}
