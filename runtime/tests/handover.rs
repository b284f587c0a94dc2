//! The supervisor dies, at any time and in any company: the job goes on, exact, under a successor;
//! and when all must end, all ends.

mod common;

use common::process::{self, Held, children, stat, supervisor_of, workers_of};
use common::program::{Cli, Ended, Started};
use common::tally::{self, ordered};
use common::tool::{said, tool};
use common::{Jobs, Random, folder, text, trials, wait_for};
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use testudo::prelude::*;
use testudo::serde_json::Value;
use testudo::shm::primitive::{AtomicU32, Ordering};
use testudo::shm::record::Record;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[
    ("ordered", ordered),
    ("gated", tally::gated),
    ("unfit", unfit),
    ("slow", slow),
    ("echo", echo),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_job_is_exact_however_often_its_supervisor_is_killed,
            workers_go_on_without_a_supervisor,
            a_supervisor_that_dies_at_any_point_of_adoption_is_followed_by_another,
            r2_workers_that_were_only_being_started_give_way,
            a_worker_that_dies_with_its_supervisor_is_replaced,
            a_supervisor_killed_in_a_checkpoint_leaves_the_job_and_its_checkpoints_exact,
            a_job_is_exact_when_its_supervisor_is_killed_while_it_drains,
            a_supervisor_killed_at_the_start_or_at_the_end_changes_nothing,
            all_killed_at_once_leaves_nothing_and_the_job_goes_on_from_its_checkpoint,
            r3_nobody_outlives_a_killed_keeper,
            signals_and_exit_codes_pass_through_the_keeper,
            a_signal_without_a_supervisor_is_for_the_next_one,
            a_supervisor_that_always_fails_ends_the_job_with_a_reason,
            what_a_supervisor_knew_is_known_to_the_next_one,
            another_program_leads_while_the_workers_go_on,
            a_program_that_cannot_lead_gives_way_to_the_one_before,
            r13_standard_input_and_output_are_exact_when_the_supervisor_is_killed,
            r13_a_supervisor_that_dies_between_a_pipe_and_a_ring_loses_and_doubles_nothing,
            r13_a_reader_that_stalls_gets_all_though_supervisors_die_meanwhile,
            what_is_read_from_a_file_and_appended_to_another_goes_on,
            many_handovers_leave_no_descriptor_behind,
        ],
    )
}

/// Cannot be taken over: a supervisor that follows another gives up.
fn unfit(flow: &Flow, parameters: &str) {
    let (marker, parameters) = parameters.split_once(' ').expect("two");
    let name = fs::read_to_string("/proc/self/comm").unwrap_or_default();
    let own = std::env::current_exe().unwrap_or_default();
    let is_meant = |meant: String| meant.is_empty() || Path::new(&meant) == own;
    let is_unfit = fs::read_to_string(marker).is_ok_and(is_meant);
    if is_unfit && name.trim_end() == "testudo-sup" {
        std::process::abort();
    }
    ordered(flow, parameters);
}

/// Its second worker takes a while to start.
fn slow(flow: &Flow, parameters: &str) {
    let name = fs::read_to_string("/proc/self/comm").unwrap_or_default();
    if name.trim_end() == "testudo-w1" {
        std::thread::sleep(Duration::from_millis(100));
    }
    tally::gated(flow, parameters);
}

type Text = <String as Record>::View;

/// Prints what it reads.
fn echo(flow: &Flow, _: &str) {
    flow.stdin().round_robin().print(|line: &Text| format!("<{line}>"));
}

/// Records a second of the jobs here.
const RATE: &str = "200000";

fn job(name: &str, total: u64, output: &Path) -> Cli {
    let args = ["--rate", RATE, "--report", "json"];
    Cli::new(name, &tally::parameters(total, output)).workers(2).args(args).own_group()
}

/// How many supervisors the job had before the one that it has now.
fn reign(job: &Started) -> Option<u32> {
    let environment = fs::read(format!("/proc/{}/environ", supervisor_of(job.pid())?)).ok()?;
    let mut words = environment.split(|byte| *byte == 0);
    let role = words.find(|word| word.starts_with(b"TESTUDO_SUPERVISOR="))?;
    String::from_utf8_lossy(role).split(':').nth(3)?.parse().ok()
}

/// Kills the supervisor there is, as soon as it is not the one that was killed last.
fn kill_supervisor(job: &Started, last: &mut u32) -> bool {
    let found = wait_for("a supervisor", || {
        let over = stat(job.pid()).is_none_or(|stat| stat.state == 'Z');
        let next = supervisor_of(job.pid()).filter(|pid| pid != last);
        (over || next.is_some()).then_some(next)
    });
    let Some(pid) = found else { return false };
    *last = pid;
    Held::child_of(pid, job.pid()).is_some_and(|held| held.signal(libc::SIGKILL))
}

/// Waits until somebody leads the job: its control socket answers.
fn status(at: &Path) -> Value {
    wait_for("the job's status", || {
        let (code, out, _) = said(&tool(at, &["status", "job", "--json"]));
        let status: Value = testudo::serde_json::from_str(&out).ok()?;
        (code == 0).then_some(status)
    })
}

/// A job whose control socket lies in a folder of the test's.
fn asked(cli: Cli, at: &Path) -> Cli {
    cli.env("XDG_RUNTIME_DIR", &text(at)).env("TMPDIR", &text(at))
}

fn assert_exact(ended: Ended, output: &Path, total: u64) -> Value {
    let report = ended.report();
    assert_eq!(report["records_in"], total);
    tally::check(output, total, 2);
    report
}

fn a_job_is_exact_however_often_its_supervisor_is_killed() {
    for seed in 0..common::deep(20, 1) {
        let folder = folder();
        let output = folder.path().join("rows");
        let total = common::deep(4_000_000, 300_000);
        let started = job("gated", total, &output).start();
        started.working(2);
        let (mut random, mut last) = (Random::new(seed), 0);
        for _ in 0..common::deep(60, 25) {
            assert!(kill_supervisor(&started, &mut last), "it ended before its input did");
            std::thread::sleep(Duration::from_micros(random.below(90_000)));
        }
        tally::open_gate(&output);
        // At its end as well.
        for _ in 0..10 {
            if !kill_supervisor(&started, &mut last) {
                break;
            }
            std::thread::sleep(Duration::from_micros(random.below(90_000)));
        }
        let report = assert_exact(started.wait(), &output, total);
        assert_eq!(report["restarts"].as_array().map(Vec::len), Some(0), "{report}");
    }
}

fn workers_go_on_without_a_supervisor() {
    let folder = folder();
    let output = folder.path().join("rows");
    let started = job("ordered", u64::MAX, &output).start();
    let workers = started.workers(2);
    // The keeper is held up, so that nobody follows.
    started.signal(libc::SIGSTOP);
    kill_supervisor(&started, &mut 0);
    let cpu = || workers.iter().map(|pid| process::cpu_ns(*pid).expect("alive")).sum::<u64>();
    for _ in 0..3 {
        let before = cpu();
        wait_for("work of the workers", || (cpu() > before + 2_000_000).then_some(()));
    }
    started.signal(libc::SIGCONT);
    wait_for("the next supervisor", || supervisor_of(started.pid()));
    started.signal(libc::SIGTERM);
    let ended = started.wait();
    let records = ended.report()["records_in"].as_u64().expect("a number");
    tally::check(&output, records, 2);
}

fn a_supervisor_that_dies_at_any_point_of_adoption_is_followed_by_another() {
    for point in Point::ADOPTION {
        let folder = folder();
        let output = folder.path().join("rows");
        let total = 60_000;
        let order = format!("s:{}:4:0", point.number());
        let started = job("gated", total, &output).env(KILL_AT, &order).start();
        // Workers that have claimed nothing yet are replaced by whoever follows.
        let workers = (point != Point::Adopted).then(|| started.working(2));
        if workers.is_some() {
            kill_supervisor(&started, &mut 0);
        }
        wait_for("five supervisors", || reign(&started).filter(|reign| *reign >= 4));
        if let Some(workers) = workers {
            let now = started.workers(2);
            assert!(workers.iter().all(|pid| now.contains(pid)), "{point:?}: {now:?}");
        }
        tally::open_gate(&output);
        let report = assert_exact(started.wait(), &output, total);
        assert_eq!(report["restarts"].as_array().map(Vec::len), Some(0), "{point:?}: {report}");
    }
}

fn r2_workers_that_were_only_being_started_give_way() {
    for round in 0..common::deep(50, 5) {
        let folder = folder();
        let output = folder.path().join("rows");
        let total = 30_000;
        let started = job("slow", total, &output).start();
        wait_for("a worker that is being started", || {
            (workers_of(started.pid()).len() == 2).then_some(())
        });
        std::thread::sleep(Duration::from_millis(round % 5 * 20));
        kill_supervisor(&started, &mut 0);
        tally::open_gate(&output);
        assert_exact(started.wait(), &output, total);
    }
}

fn a_worker_that_dies_with_its_supervisor_is_replaced() {
    for seed in 0..common::deep(20, 1) {
        let folder = folder();
        let output = folder.path().join("rows");
        let total = 200_000;
        let started = job("gated", total, &output).start();
        let (mut random, mut last, mut kills) = (Random::new(seed), 0, 0);
        for _ in 0..6 {
            let workers = started.workers(2);
            let victims = random.below(3);
            for (_, pid) in workers.iter().enumerate().filter(|(n, _)| victims != *n as u64) {
                let held = Held::child_of(*pid, started.pid());
                kills += usize::from(held.is_some_and(|held| held.signal(libc::SIGKILL)));
            }
            kill_supervisor(&started, &mut last);
            std::thread::sleep(Duration::from_millis(40 + random.below(60)));
        }
        tally::open_gate(&output);
        let report = assert_exact(started.wait(), &output, total);
        // One that was killed before it had claimed anything has not lived.
        let restarts = report["restarts"].as_array().map_or(0, Vec::len);
        assert!((1..=kills).contains(&restarts), "{kills} kills: {report}");
    }
}

/// Points of a checkpoint in a supervisor.
const SEAL: [Point; 4] =
    [Point::BeforeSeal, Point::ManifestWritten, Point::RootWritten, Point::BeforeRetire];

fn newest(folder: &Path) -> u64 {
    let number = |name: &str| name.strip_prefix('c')?.strip_suffix(".manifest")?.parse().ok();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter_map(|name| number(&name)).max().unwrap_or(0)
}

fn a_supervisor_killed_in_a_checkpoint_leaves_the_job_and_its_checkpoints_exact() {
    for point in SEAL {
        let folder = folder();
        let (output, checkpoints) = (folder.path().join("rows"), folder.path().join("ck"));
        // Many times as long as the four supervisors live.
        let total = 1_000_000;
        let args = ["--checkpoint-dir", &text(&checkpoints), "--checkpoint-interval", "10ms"];
        let order = format!("s:{}:3:2", point.number());
        let started = job("gated", total, &output).args(args).env(KILL_AT, &order).start();
        // Three are killed at the point, each after it has taken two checkpoints.
        wait_for("the last supervisor", || reign(&started).filter(|reign| *reign >= 3));
        let before = newest(&checkpoints);
        wait_for("checkpoints of the last one", || (newest(&checkpoints) > before).then_some(()));
        process::signal_group(started.pid(), libc::SIGKILL);
        started.wait();
        tally::open_gate(&output);
        let resumed = Cli::new("gated", &tally::parameters(total, &output)).workers(2);
        let resumed = resumed.args(args).args(["--resume"]).run();
        assert_eq!(resumed.code, Some(0), "{point:?}: {}", resumed.err);
        tally::check(&output, total, 2);
    }
}

fn a_job_is_exact_when_its_supervisor_is_killed_while_it_drains() {
    for seed in 0..common::deep(30, 5) {
        let folder = folder();
        let output = folder.path().join("rows");
        let started = job("ordered", u64::MAX, &output).start();
        started.workers(2);
        let (mut random, mut last) = (Random::new(seed), 0);
        std::thread::sleep(Duration::from_millis(random.below(50)));
        started.signal(libc::SIGTERM);
        // None drains if none lives long enough to see it through.
        for _ in 0..1 + random.below(8) {
            if !kill_supervisor(&started, &mut last) {
                break;
            }
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
        }
        let ended = started.wait();
        let records = ended.report()["records_in"].as_u64().expect("a number");
        tally::check(&output, records, 2);
    }
}

fn a_supervisor_killed_at_the_start_or_at_the_end_changes_nothing() {
    for seed in 0..common::deep(400, 20) {
        let folder = folder();
        let output = folder.path().join("rows");
        let total = 600;
        let started = job("ordered", total, &output).start();
        let mut last = 0;
        // The whole job takes some milliseconds: this is its start, its end, or both.
        std::thread::sleep(Duration::from_micros(Random::new(seed).below(25_000)));
        kill_supervisor(&started, &mut last);
        let ended = started.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        tally::check(&output, total, 2);
        assert!(ended.err.contains("records_in"), "there is a report: {}", ended.err);
    }
}

fn all_killed_at_once_leaves_nothing_and_the_job_goes_on_from_its_checkpoint() {
    let shared = || {
        let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains("testudo") || name.starts_with("job")).collect::<Vec<_>>()
    };
    let before = shared();
    let folder = folder();
    let (output, checkpoints) = (folder.path().join("rows"), folder.path().join("ck"));
    let total = 120_000;
    let args = ["--checkpoint-dir", &text(&checkpoints), "--checkpoint-interval", "10ms"];
    let cli = || asked(job("gated", total, &output), folder.path()).args(args);
    for round in 0..3 {
        let old = newest(&checkpoints);
        let started = if round == 0 { cli().start() } else { cli().args(["--resume"]).start() };
        wait_for("a checkpoint", || (newest(&checkpoints) > old).then_some(()));
        let held: Vec<Held> = started
            .workers(2)
            .into_iter()
            .chain(supervisor_of(started.pid()))
            .filter_map(|pid| Held::child_of(pid, started.pid()))
            .collect();
        process::signal_group(started.pid(), libc::SIGKILL);
        let ended = started.wait();
        assert_eq!(ended.signal, Some(libc::SIGKILL));
        wait_for("the end of all", || held.iter().all(Held::has_ended).then_some(()));
        assert_eq!(shared(), before, "in shared memory");
    }
    tally::open_gate(&output);
    // Neither the output, the folder nor the name is taken.
    let ended = cli().args(["--resume"]).run();
    assert_exact_after_resume(&ended, &output, total);
    let sockets = folder.path().join("testudo");
    let names = fs::read_dir(sockets).expect("the sockets' folder").flatten();
    let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
    assert!(names.iter().all(|name| name == ".lock"), "{names:?}");
}

fn assert_exact_after_resume(ended: &Ended, output: &Path, total: u64) {
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    tally::check(output, total, 2);
}

fn r3_nobody_outlives_a_killed_keeper() {
    let folder = folder();
    let output = folder.path().join("rows");
    // With workers of the first supervisor, with adopted ones, with some that are stopped.
    for (handovers, stopped) in [(0, false), (2, false), (0, true), (2, true)] {
        let started = job("ordered", u64::MAX, &output).start();
        let workers = started.working(2);
        let mut last = 0;
        for _ in 0..handovers {
            kill_supervisor(&started, &mut last);
        }
        let supervisor =
            wait_for("a supervisor", || supervisor_of(started.pid()).filter(|pid| *pid != last));
        let held: Vec<Held> = workers
            .into_iter()
            .chain([supervisor])
            .map(|pid| Held::child_of(pid, started.pid()).expect("it runs"))
            .collect();
        if stopped {
            assert!(held[0].signal(libc::SIGSTOP) && held[1].signal(libc::SIGSTOP));
        }
        started.signal(libc::SIGKILL);
        wait_for("the end of all", || held.iter().all(Held::has_ended).then_some(()));
        assert_eq!(started.wait().signal, Some(libc::SIGKILL));
    }
}

fn signals_and_exit_codes_pass_through_the_keeper() {
    let folder = folder();
    let output = folder.path().join("rows");
    for handovers in [0, 2] {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            let started = job("ordered", u64::MAX, &output).start();
            started.workers(2);
            let mut last = 0;
            for _ in 0..handovers {
                kill_supervisor(&started, &mut last);
            }
            started.signal(signal);
            let records = started.wait().report()["records_in"].as_u64().expect("a number");
            tally::check(&output, records, 2);
        }
    }
    let refused = Cli::new("ordered", "1 /nowhere/rows").workers(1).run();
    assert_eq!(refused.code, Some(3), "{}", refused.err);
    assert!(refused.err.starts_with("job: cannot write output /nowhere/rows"), "{}", refused.err);
    let wrong = Cli::new("ordered", "").args(["--workers", "0"]).run();
    assert_eq!(wrong.code, Some(2), "{}", wrong.err);
}

fn a_signal_without_a_supervisor_is_for_the_next_one() {
    let folder = folder();
    let output = folder.path().join("rows");
    for signals in [1, 2] {
        let started = job("ordered", u64::MAX, &output).start();
        started.workers(2);
        let supervisor = started.supervisor();
        let held = Held::child_of(supervisor, started.pid()).expect("it runs");
        assert!(held.signal(libc::SIGSTOP));
        for signal in &[libc::SIGTERM, libc::SIGINT][..signals] {
            started.signal(*signal);
            wait_for("the keeper to take it", || {
                let pending = process::pending_signals(started.pid())?;
                (pending & (1 << (signal - 1)) == 0).then_some(())
            });
        }
        held.signal(libc::SIGKILL);
        let ended = started.wait();
        if signals == 1 {
            let records = ended.report()["records_in"].as_u64().expect("a number");
            tally::check(&output, records, 2);
        } else {
            assert_eq!(ended.code, Some(130), "{}", ended.err);
        }
    }
}

fn a_supervisor_that_always_fails_ends_the_job_with_a_reason() {
    let folder = folder();
    let (output, marker) = (folder.path().join("rows"), folder.path().join("marker"));
    let parameters = format!("{} {}", text(&marker), tally::parameters(u64::MAX, &output));
    let started = Cli::new("unfit", &parameters).workers(2).args(["--rate", RATE]).start();
    let workers: Vec<Held> = started
        .workers(2)
        .into_iter()
        .map(|pid| Held::child_of(pid, started.pid()).expect("it runs"))
        .collect();
    fs::write(&marker, "").expect("room");
    kill_supervisor(&started, &mut 0);
    let ended = started.wait();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert!(ended.err.contains("the supervisor died"), "{}", ended.err);
    assert!(workers.iter().all(Held::has_ended), "a worker is left");
}

fn what_a_supervisor_knew_is_known_to_the_next_one() {
    let folder = folder();
    let at = folder.path();
    let (output, checkpoints) = (at.join("rows"), at.join("ck"));
    let args = ["--checkpoint-dir", &text(&checkpoints), "--checkpoint-interval", "10ms"];
    let started = asked(job("ordered", u64::MAX, &output), at).args(args).start();
    let workers = started.workers(2);
    let first = wait_for("two checkpoints", || {
        let status = status(at);
        (status["checkpoints"]["completed"].as_u64() >= Some(2)).then_some(status)
    });
    assert_eq!(first["pid"], started.pid(), "{first}");
    let held = Held::child_of(workers[0], started.pid()).expect("it runs");
    held.signal(libc::SIGKILL);
    wait_for("the restart", || (status(at)["restarts"] == 1).then_some(()));
    let (code, _, err) = said(&tool(at, &["checkpoint", "job", "every", "1h"]));
    assert_eq!(code, 0, "{err}");
    let before = wait_for("the end of what had begun", || {
        let status = status(at);
        (status["checkpoints"]["newest"]["state"] != "open").then_some(status)
    });
    // What a turn of its loop has told is written down at that turn's end.
    status(at);
    kill_supervisor(&started, &mut 0);
    let after = wait_for("its checkpoints", || {
        let now = status(at);
        (!now["checkpoints"].is_null()).then_some(now)
    });
    assert_ne!(after["supervisor"], before["supervisor"]);
    assert_eq!(after["pid"], before["pid"]);
    assert_eq!(after["restarts"], 1);
    assert_eq!(after["checkpoints"]["schedule"], before["checkpoints"]["schedule"]);
    assert_eq!(after["checkpoints"]["completed"], before["checkpoints"]["completed"]);
    assert!(after["elapsed_s"].as_f64() >= before["elapsed_s"].as_f64());
    let (code, out, err) = said(&tool(at, &["checkpoint", "job", "now", "--json"]));
    assert_eq!(code, 0, "{err}");
    let taken: Value = testudo::serde_json::from_str(&out).expect("JSON");
    let newest = before["checkpoints"]["newest"]["id"].as_u64();
    assert!(taken["checkpoint"]["id"].as_u64() > newest, "{taken} after {before}");
    started.signal(libc::SIGTERM);
    let report = started.wait().report();
    assert_eq!(report["restarts"].as_array().map(Vec::len), Some(1), "{report}");
    tally::check(&output, report["records_in"].as_u64().expect("a number"), 2);
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn many_handovers_leave_no_descriptor_behind() {
    let folder = folder();
    let output = folder.path().join("rows");
    let started = asked(job("ordered", u64::MAX, &output), folder.path()).start();
    started.workers(2);
    let mut last = 0;
    let mut first = None;
    for round in 0..common::deep(1000, 25) {
        status(folder.path());
        if round > 1 {
            let count = || (descriptors(started.pid()), descriptors(started.supervisor()));
            let (keeper, supervisor) = *first.get_or_insert_with(count);
            // A client may be connected, or a file of /proc be read, at the moment of the count.
            wait_for("as many descriptors as at first", || {
                let now = count();
                (now.0 <= keeper + 1 && now.1 <= supervisor + 1).then_some(())
            });
        }
        assert!(kill_supervisor(&started, &mut last));
    }
    wait_for("a supervisor and two workers, and nobody else", || {
        (children(started.pid()).len() == 3).then_some(())
    });
    started.signal(libc::SIGTERM);
    let records = started.wait().report()["records_in"].as_u64().expect("a number");
    tally::check(&output, records, 2);
}

/// Writes numbered lines, a few at a time and in odd pieces, until it is told that they are enough;
/// how many there were.
struct Feed {
    is_enough: Arc<AtomicU32>,
    writer: std::thread::JoinHandle<u64>,
}

impl Feed {
    fn start(least: u64, pause: Duration) -> (std::io::PipeReader, Self) {
        let (read, mut write) = std::io::pipe().expect("a pipe");
        let is_enough = Arc::new(AtomicU32::new(0));
        let told = Arc::clone(&is_enough);
        let writer = std::thread::spawn(move || {
            let mut lines = 0;
            while lines < least || told.load(Ordering::Acquire) == 0 {
                let text: String = (lines..lines + 20).map(|n| format!("line {n}\n")).collect();
                let (head, tail) = text.split_at(text.len() / 3);
                for part in [head, tail] {
                    // A job that ended early is the test's to notice.
                    if write.write_all(part.as_bytes()).is_err() {
                        return lines;
                    }
                }
                lines += 20;
                std::thread::sleep(pause);
            }
            lines
        });
        (read, Self { is_enough, writer })
    }

    /// No more than these.
    fn end(self) -> u64 {
        self.is_enough.store(1, Ordering::Release);
        self.writer.join().expect("it only writes")
    }
}

fn assert_echoed(ended: &Ended, lines: u64) {
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let mut found: Vec<&str> = ended.out.lines().collect();
    found.sort_unstable();
    let mut expected: Vec<String> = (0..lines).map(|n| format!("<line {n}>")).collect();
    expected.sort_unstable();
    assert_eq!(found.len(), expected.len(), "lines");
    let differing = found.iter().zip(&expected).find(|(found, expected)| *found != expected);
    assert_eq!(differing, None);
}

fn r13_standard_input_and_output_are_exact_when_the_supervisor_is_killed() {
    for seed in 0..common::deep(20, 1) {
        let (input, feed) = Feed::start(0, Duration::from_micros(500));
        let started = Cli::new("echo", "").workers(2).stdin(input.into()).start();
        let (mut random, mut last) = (Random::new(seed), 0);
        for _ in 0..common::deep(200, 25) {
            assert!(kill_supervisor(&started, &mut last), "it ended before its input did");
            std::thread::sleep(Duration::from_micros(random.below(80_000)));
        }
        let lines = feed.end();
        for _ in 0..5 {
            if !kill_supervisor(&started, &mut last) {
                break;
            }
            std::thread::sleep(Duration::from_micros(random.below(80_000)));
        }
        assert_echoed(&started.wait(), lines);
    }
}

fn r13_a_supervisor_that_dies_between_a_pipe_and_a_ring_loses_and_doubles_nothing() {
    for point in Point::CONSOLE {
        for skip in [0, 3] {
            let (input, feed) = Feed::start(0, Duration::from_millis(2));
            let order = format!("s:{}:5:{skip}", point.number());
            let job = Cli::new("echo", "").workers(2).stdin(input.into()).env(KILL_AT, &order);
            let started = job.start();
            wait_for("another supervisor", || reign(&started).filter(|reign| *reign > 0));
            let lines = feed.end();
            assert_echoed(&started.wait(), lines);
        }
    }
}

fn r13_a_reader_that_stalls_gets_all_though_supervisors_die_meanwhile() {
    let folder = folder();
    let input = folder.path().join("in");
    let lines = 60_000;
    let text: String = (0..lines).map(|n| format!("line {n}\n")).collect();
    fs::write(&input, text).expect("room");
    let from = fs::File::open(&input).expect("just written");
    let (mut read, write) = std::io::pipe().expect("a pipe");
    let started = Cli::new("echo", "").workers(2).stdin(from.into()).start_into(write.into());
    let mut last = 0;
    for _ in 0..4 {
        assert!(kill_supervisor(&started, &mut last), "it ended before anybody had read");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut out = String::new();
    read.read_to_string(&mut out).expect("what was printed");
    let ended = started.wait();
    assert_echoed(&Ended { out, ..ended }, lines);
}

fn what_is_read_from_a_file_and_appended_to_another_goes_on() {
    let folder = folder();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    let lines = 20_000;
    let text: String = (0..lines).map(|n| format!("line {n}\n")).collect();
    fs::write(&input, text).expect("room");
    let from = fs::File::open(&input).expect("just written");
    let to = fs::OpenOptions::new().create(true).append(true).open(&output).expect("room");
    let job = Cli::new("echo", "").workers(2).args(["--rate", "20000"]).stdin(from.into());
    let started = job.start_into(to.into());
    let mut last = 0;
    let written = || fs::metadata(&output).map_or(0, |meta| meta.len());
    loop {
        let before = written();
        // Who is killed before it leads is followed by a longer pause, and so on: each prints.
        let is_over = wait_for("lines of this supervisor", || {
            let is_over = stat(started.pid()).is_none_or(|stat| stat.state == 'Z');
            (is_over || written() > before).then_some(is_over)
        });
        // A write to a file that is only appended to cannot be noted exactly: not killed there.
        if is_over || !kill_supervisor(&started, &mut last) {
            break;
        }
        std::thread::sleep(Duration::from_millis(60));
    }
    let ended = started.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let found = fs::read_to_string(&output).expect("its output");
    let found: std::collections::BTreeSet<&str> = found.lines().collect();
    let lost = (0..lines).find(|n| !found.contains(&*format!("<line {n}>")));
    assert_eq!(lost, None, "no line is lost");
}

/// A copy of this program: another file that plans the same.
fn copy_of_us(at: &Path) -> std::path::PathBuf {
    let copy = at.join("copy");
    fs::copy(std::env::current_exe().expect("our own path"), &copy).expect("room");
    copy
}

fn another_program_leads_while_the_workers_go_on() {
    let folder = folder();
    let at = folder.path();
    let output = at.join("rows");
    let copy = copy_of_us(at);
    let started = asked(job("ordered", u64::MAX, &output), at).start();
    let workers = started.working(2);
    status(at);
    let refused = |program: &str, why: &str| {
        let (code, _, err) = said(&tool(at, &["upgrade-supervisor", "job", program]));
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(why), "{err}");
    };
    refused("/bin/true", "no program that runs a Testudo job");
    refused("/nowhere", "No such file");
    let (code, out, err) = said(&tool(at, &["upgrade-supervisor", "job", &text(&copy)]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let led = || fs::read_link(format!("/proc/{}/exe", started.supervisor())).expect("it runs");
    assert_eq!(led(), copy);
    assert_eq!(started.workers(2), workers);
    // A later one is the new program too, wherever its file is by then.
    fs::remove_file(&copy).expect("our own");
    kill_supervisor(&started, &mut 0);
    status(at);
    assert!(led().to_string_lossy().contains("copy"), "{:?}", led());
    started.signal(libc::SIGTERM);
    let report = started.wait().report();
    assert_eq!(report["restarts"].as_array().map(Vec::len), Some(0), "{report}");
    tally::check(&output, report["records_in"].as_u64().expect("a number"), 2);
}

fn a_program_that_cannot_lead_gives_way_to_the_one_before() {
    let folder = folder();
    let at = folder.path();
    let (output, marker, copy) = (at.join("rows"), at.join("marker"), copy_of_us(at));
    let parameters = format!("{} {}", text(&marker), tally::parameters(u64::MAX, &output));
    let args = ["--rate", RATE, "--report", "json"];
    let started = asked(Cli::new("unfit", &parameters).workers(2).args(args), at).start();
    let workers = started.working(2);
    status(at);
    fs::write(&marker, text(&copy)).expect("room");
    let (code, _, err) = said(&tool(at, &["upgrade-supervisor", "job", &text(&copy)]));
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("did not take the job over"), "{err}");
    assert_eq!(started.workers(2), workers);
    started.signal(libc::SIGTERM);
    let ended = started.wait();
    assert!(ended.err.contains("the new program did not take the job over"), "{}", ended.err);
    let records = ended.report()["records_in"].as_u64().expect("a number");
    tally::check(&output, records, 2);
}
