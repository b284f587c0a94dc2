//! What a job promises: where it is said, what follows when nothing is said, and that what was not
//! kept is counted.

mod common;

use common::process::Disturber;
use common::program::Cli;
use common::tool::tool;
use common::{Jobs, finish, folder, settings, start, text, trials, wait_for};
use std::process::ExitCode;
use testudo::config::Completeness;
use testudo::prelude::*;
use testudo::serde_json::Value;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};

const JOBS: Jobs = &[
    ("replayable", replayable),
    ("read_once", read_once),
    ("promising", promising),
    ("slow", slow),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            completeness_follows_from_the_sources_unless_it_is_said,
            flags_win_over_the_file_and_the_file_over_the_job,
            a_limit_that_is_no_time_is_refused,
            little_waits_in_a_ring_where_a_batch_may_not_wait_long,
            a_recovery_that_took_longer_than_promised_is_counted,
        ],
    )
}

fn replayable(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(1000, |n| n)).for_each(|_| ());
}

/// Numbers as from a socket: nobody gives them twice.
struct Socket;

struct SocketReader;

impl Source for Socket {
    type Out = u64;
    type Position = u64;
    type Reader = SocketReader;

    fn start(&self, _: Subtask) -> u64 {
        0
    }

    fn open(&self, _: Subtask, _: &u64) -> Result<SocketReader, String> {
        Ok(SocketReader)
    }

    fn is_replayable(&self) -> bool {
        false
    }
}

impl Reader<u64, u64> for SocketReader {
    fn read(
        &mut self,
        _: &mut u64,
        _: usize,
        _: &mut impl Collect<u64>,
    ) -> Result<Progress, String> {
        Ok(Progress::End)
    }
}

fn read_once(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(1000, |n| n)).for_each(|_| ());
    flow.source("socket", Socket).for_each(|_| ());
}

fn promising(flow: &Flow, _: &str) {
    flow.completeness(Completeness::Partial);
    flow.max_latency(Duration::from_millis(8));
    flow.max_recovery(Duration::from_micros(700));
    replayable(flow, "");
}

/// The three lines of an explanation that are about the promise.
fn promise(job: &str, args: &[&str]) -> String {
    let ended = Cli::new(job, "").workers(2).args(args.iter().copied()).args(["--explain"]).run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let is_one =
        |line: &&str| ["complete", "max late", "max reco"].contains(&&line[..8.min(line.len())]);
    ended.out.lines().filter(is_one).map(|line| format!("{line}\n")).collect()
}

fn completeness_follows_from_the_sources_unless_it_is_said() {
    let told = promise("replayable", &[]);
    assert!(told.starts_with("completeness full (every source can be read again): "), "{told}");
    let told = promise("read_once", &[]);
    assert!(
        told.starts_with("completeness partial (source socket cannot be read again): "),
        "{told}"
    );
    let told = promise("read_once", &["--completeness", "full"]);
    assert!(told.starts_with("completeness full (asked for): "), "{told}");
    let told = promise("replayable", &["--completeness", "partial"]);
    assert!(told.starts_with("completeness partial (asked for): "), "{told}");
}

fn flags_win_over_the_file_and_the_file_over_the_job() {
    let folder = folder();
    let file = folder.path().join("job.toml");
    std::fs::write(&file, "max-latency = \"9ms\"\nmax-recovery = \"10ms\"\n").expect("room");
    let file = text(&file);
    let has = |args: &[&str], latency: &str, recovery: &str| {
        let told = promise("promising", args);
        assert!(told.starts_with("completeness partial (asked for): "), "{told}");
        assert!(told.contains(&format!("max latency  {latency}: ")), "{told}");
        assert!(told.contains(&format!("max recovery {recovery}: ")), "{told}");
    };
    has(&[], "8ms", "700µs");
    has(&["--config", &file], "9ms", "10ms");
    has(&["--config", &file, "--max-recovery", "300us"], "9ms", "300µs");
    let told = promise("promising", &["--completeness", "full"]);
    assert!(told.starts_with("completeness full (asked for): "), "{told}");
}

fn a_limit_that_is_no_time_is_refused() {
    for (flag, value) in [("--max-latency", "0ms"), ("--max-recovery", "soon")] {
        let ended = Cli::new("replayable", "").args([flag, value]).run();
        assert_eq!(ended.code, Some(2), "{}", ended.err);
        assert!(ended.err.contains(flag) && ended.err.contains(value), "{}", ended.err);
    }
}

/// One reader as fast as it can, in worker 0, and a consumer in worker 1 that takes a tenth of a
/// millisecond for each record.
fn slow(flow: &Flow, _: &str) {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    let is_slow = name.trim_end() == "testudo-w1";
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .key_by(|n| *n)
        .stream()
        .for_each(move |_| {
            if is_slow {
                std::thread::sleep(Duration::from_micros(100));
            }
        });
}

/// What the slow job says of itself when much has been processed and `as_hoped` holds.
fn slow_job(limit: &[&str], as_hoped: impl Fn(&Value) -> bool) -> Value {
    let at = folder();
    let job = Cli::new("slow", "")
        .workers(2)
        .env("XDG_RUNTIME_DIR", &text(at.path()))
        .args(["--name", "slow"])
        .args(limit.iter().copied())
        .start();
    // What a status says is of one moment: the consumer may just have made room.
    let status = wait_for("the slow job to be as it should", || {
        let said = tool(at.path(), &["status", "slow", "--json"]);
        let status: Value = testudo::serde_json::from_slice(&said.stdout).ok()?;
        let much = status["edges"][0]["workers"][1]["processed"].as_u64()? > 4000;
        (much && as_hoped(&status)).then_some(status)
    });
    job.signal(libc::SIGTERM);
    job.signal(libc::SIGTERM);
    drop(job);
    status
}

fn little_waits_in_a_ring_where_a_batch_may_not_wait_long() {
    let waits = |status: &Value| status["edges"][0]["in_rings"].as_u64().expect("a number");
    // Without a limit a ring of 64 KiB is full, but for what the last step took out of it.
    let without = slow_job(&[], |status| waits(status) > 7000);
    assert_eq!(without["slo"]["max_latency_us"], Value::Null);
    let with = slow_job(&["--max-latency", "20ms"], |status| {
        waits(status) < 2000 && status["slo"]["violations"]["latency"].as_u64() > Some(0)
    });
    assert_eq!(with["slo"]["max_latency_us"], 20_000);
}

fn endless(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .key_by(|n| *n)
        .stream()
        .for_each(|_| ());
}

fn a_recovery_that_took_longer_than_promised_is_counted() {
    for (limit, violations) in [(Duration::from_micros(1), 3), (Duration::from_secs(100), 0)] {
        let job = Settings { max_recovery: Some(limit), ..settings(2) };
        let running = start(endless, "", job);
        let view = running.workers().expect("the job starts");
        let mut disturber = Disturber::new(&running, &view, 5);
        disturber.kill_randomly(3);
        (0..2).for_each(|worker| assert!(disturber.settle(worker)));
        running.stop();
        let report = finish(running).expect("the job survives");
        assert_eq!(report.slo.violations.recovery, violations, "{:?}", report.slo);
        assert_eq!(report.slo.violations.completeness, 0);
    }
}
