//! Outages of systems outside of the job: full disks, closed pipes. The job waits or goes on, what
//! it has done is exact afterwards, and everybody can see what is the matter meanwhile.
//!
//! Most refusals are brought about by the engine's own test file of refusals, which needs no
//! rights; a disk that is really full is used where the machine allows a mount.

mod common;

use common::gated::Gated;
use common::program::{Cli, Started};
use common::tool::{said, tool};
use common::{Jobs, folder, sorted_lines, sorted_parts, text, trials, wait_for};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::serde_json::{self, Value};
use testudo::sink::file::Csv;
use testudo::testing::REFUSE;

const JOBS: Jobs = &[
    ("to_file", to_file),
    ("to_folder", to_folder),
    ("printed", printed),
    ("printed_and_written", printed_and_written),
    ("talkative", talkative),
    ("lines", lines),
    ("stateful", stateful),
];

fn main() -> ExitCode {
    testudo::init();
    common::host_on(
        2,
        JOBS,
        trials![
            a_full_output_is_waited_for_and_nothing_is_lost_or_doubled,
            a_worker_that_dies_while_its_output_is_full_loses_nothing,
            a_full_output_sheds_and_counts_with_partial_completeness,
            checkpoints_fail_while_an_output_is_full_and_work_afterwards,
            an_output_on_a_disk_that_is_really_full_goes_on_when_there_is_room,
            standard_output_without_room_is_waited_for,
            a_reader_that_has_seen_enough_ends_a_job_that_only_prints,
            a_job_with_another_output_goes_on_without_its_reader,
            closed_standard_streams_end_no_worker_that_prints_to_them,
            a_terminal_that_goes_away_ends_no_job_that_is_to_outlive_it,
            an_input_that_is_cut_short_costs_what_is_gone_also_after_a_crash,
            an_input_that_is_replaced_is_read_to_its_end,
            an_input_that_grows_is_read_as_far_as_it_was,
            a_checkpoint_folder_that_is_removed_is_made_again_and_whole,
            a_checkpoint_folder_that_fails_is_waited_for,
            a_checkpoint_folder_that_stalls_stops_nobody,
            a_second_checkpoint_folder_is_used_while_the_first_fails,
            the_newest_checkpoint_of_both_folders_is_resumed,
            a_job_resumes_with_one_of_its_folders_gone,
        ],
    )
}

const TOTAL: u64 = 20_000;

/// A line and a row as sinks see them.
type Line = <String as testudo::record::Record>::View;
type Row = <(u64, u64) as testudo::record::Record>::View;

/// Gate, output, and where refusals are said.
fn numbers(parameters: &str) -> (Gated, PathBuf) {
    let (gate, output) = parameters.split_once(' ').expect("gate and output");
    (Gated { total: TOTAL, gate: gate.into() }, output.into())
}

fn to_file(flow: &Flow, parameters: &str) {
    let (source, output) = numbers(parameters);
    flow.source("numbers", source).sink("rows", FileSink::new(output, Csv(|n: &u64| *n)));
}

fn to_folder(flow: &Flow, parameters: &str) {
    let (source, output) = numbers(parameters);
    let rows = FileSink::folder(output, "csv", Csv(|n: &u64| *n)).header("number");
    flow.source("numbers", source).key_by(|n| n % 97).stream().sink("rows", rows);
}

fn printed(flow: &Flow, parameters: &str) {
    let (source, _) = numbers(parameters);
    flow.source("numbers", source).print(|n| *n);
}

fn printed_and_written(flow: &Flow, parameters: &str) {
    let (source, output) = numbers(parameters);
    let (left, right) = flow.source("numbers", source).fork();
    left.print(|n| *n);
    right.sink("rows", FileSink::new(output, Csv(|n: &u64| *n)));
}

fn talkative(flow: &Flow, parameters: &str) {
    let (source, output) = numbers(parameters);
    flow.source("numbers", source)
        .map(|n| {
            if n % 1000 == 0 {
                eprintln!("at {n}");
                println!("at {n}");
            }
            *n
        })
        .sink("rows", FileSink::new(output, Csv(|n: &u64| *n)));
}

/// A job, its output, and the file that says what is refused.
struct Scene {
    folder: tempfile::TempDir,
    job: &'static str,
}

impl Scene {
    fn new(job: &'static str) -> Self {
        Self { folder: folder(), job }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn output(&self) -> PathBuf {
        self.path("out")
    }

    fn life(&self) -> Cli {
        let parameters = format!("{} {}", text(&self.path("gate")), text(&self.output()));
        Cli::new(self.job, &parameters)
            .workers(2)
            .env("XDG_RUNTIME_DIR", &text(self.folder.path()))
            .env(REFUSE, &text(&self.path("refused")))
            .args(["--no-progress", "--report", "json"])
    }

    /// From now on this path is refused with an error.
    fn refuse(&self, path: &Path, errno: i32) {
        let new = self.path("refused.new");
        fs::write(&new, format!("{} {errno}\n", text(path))).expect("room for a line");
        fs::rename(new, self.path("refused")).expect("our own file");
    }

    fn allow(&self) {
        fs::remove_file(self.path("refused")).expect("our own file");
    }

    fn open_gate(&self) {
        fs::write(self.path("gate"), "").expect("room for an empty file");
    }

    fn status(&self) -> Option<Value> {
        let (code, out, _) = said(&tool(self.folder.path(), &["status", "job", "--json"]));
        (code == 0).then(|| serde_json::from_str(&out).expect("JSON"))
    }

    /// Waits until some system is in a state, and gives what is said about it.
    fn external(&self, state: &str) -> Value {
        wait_for(&format!("something outside to be {state}"), || {
            let status = self.status()?;
            let all = status["figures"]["external"].as_array()?.clone();
            all.into_iter().find(|external| external["state"] == state)
        })
    }

    fn rows(&self) -> Vec<String> {
        let output = self.output();
        if output.is_dir() { sorted_parts(&output) } else { sorted_lines(&output) }
    }

    fn check(&self) {
        let mut expected: Vec<String> = (0..TOTAL).map(|n| n.to_string()).collect();
        let mut rows = self.rows();
        rows.retain(|row| row != "number");
        expected.sort_unstable();
        assert!(rows == expected, "{} rows instead of {TOTAL}, or others", rows.len());
    }
}

fn kill_worker(job: &Started, number: usize) {
    let name = format!("testudo-w{number}");
    let is_it = |pid: &u32| {
        common::process::stat(*pid).is_some_and(|stat| stat.name == name && stat.state != 'Z')
    };
    let own = || common::process::workers_of(job.pid()).into_iter().find(is_it);
    let worker = wait_for("that worker", own);
    let held = common::process::Held::child_of(worker, job.pid()).expect("a worker of the job");
    assert!(held.signal(libc::SIGKILL));
    // Whoever is killed next is another one.
    wait_for("its end", || held.has_ended().then_some(()));
}

fn a_full_output_is_waited_for_and_nothing_is_lost_or_doubled() {
    for (job, errno) in
        [("to_file", libc::ENOSPC), ("to_folder", libc::EDQUOT), ("to_folder", libc::EIO)]
    {
        let scene = Scene::new(job);
        scene.refuse(&scene.output(), errno);
        let life = scene.life().start();
        let external = scene.external("waiting");
        assert_eq!(external["name"], format!("output {}", text(&scene.output())));
        let error = std::io::Error::from_raw_os_error(errno).to_string();
        assert_eq!(external["last_error"], error);
        assert!(external["since_ms"].as_u64() > Some(1_600_000_000_000));
        // It tries again, and the worker is not idle: it waits.
        wait_for("more tries", || {
            (scene.external("waiting")["retries"].as_u64() > Some(3)).then_some(())
        });
        let status = scene.status().expect("it runs");
        let workers = status["figures"]["workers"].as_array().expect("a list").clone();
        assert!(workers.iter().any(|worker| worker["state"] == "waiting"), "{workers:?}");
        assert!(workers.iter().any(|worker| worker["waiting_ms"].as_u64() > Some(0)));
        let people = said(&tool(scene.folder.path(), &["status", "job"])).1;
        assert!(people.contains("waited for since"), "{people}");
        scene.allow();
        scene.external("ok");
        scene.open_gate();
        let report = life.wait().report();
        assert_eq!(report["records_out"], TOTAL);
        assert_eq!(report["restarts"].as_array().map(Vec::len), Some(0));
        scene.check();
    }
}

fn a_worker_that_dies_while_its_output_is_full_loses_nothing() {
    for job in ["to_file", "to_folder"] {
        let scene = Scene::new(job);
        scene.refuse(&scene.output(), libc::ENOSPC);
        let life = scene.life().start();
        for _ in 0..3 {
            scene.external("waiting");
            kill_worker(&life, 0);
        }
        scene.external("waiting");
        scene.allow();
        scene.open_gate();
        let report = life.wait().report();
        assert_eq!(report["records_out"], TOTAL);
        assert_eq!(report["restarts"].as_array().map(Vec::len), Some(3));
        scene.check();
    }
}

fn a_full_output_sheds_and_counts_with_partial_completeness() {
    let scene = Scene::new("to_file");
    scene.refuse(&scene.output(), libc::ENOSPC);
    let life = scene.life().args(["--completeness", "partial", "--rate", "20000"]).start();
    scene.external("failing");
    wait_for("records to be dropped", || {
        (scene.status()?["dropped"].as_u64() > Some(500)).then_some(())
    });
    scene.allow();
    scene.external("ok");
    scene.open_gate();
    let report = life.wait().report();
    let number = |name: &str| report[name].as_u64().expect("a number");
    assert_eq!(number("records_in"), TOTAL);
    assert_eq!(number("records_out") + number("dropped"), TOTAL);
    let rows = scene.rows();
    assert_eq!(rows.len() as u64, number("records_out"));
    assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "a row is there twice");
    assert!(rows.iter().all(|row| row.parse::<u64>().is_ok_and(|n| n < TOTAL)));
}

fn checkpoints_fail_while_an_output_is_full_and_work_afterwards() {
    let scene = Scene::new("to_folder");
    let checkpoints = text(&scene.path("ck"));
    let args =
        ["--checkpoint-dir", &checkpoints, "--checkpoint-interval", "20ms", "--part-bytes", "1KiB"];
    let life = scene.life().args(args).args(["--rate", "4000"]).start();
    let count = |what: &str| scene.status()?["checkpoints"][what].as_u64();
    wait_for("a checkpoint", || (count("completed") > Some(1)).then_some(()));
    scene.refuse(&scene.output(), libc::ENOSPC);
    scene.external("waiting");
    let failed = count("failed");
    wait_for("a checkpoint to fail", || (count("failed") > failed).then_some(()));
    scene.allow();
    scene.external("ok");
    let completed = count("completed").expect("it runs") + 2;
    wait_for("checkpoints to work again", || (count("completed") > Some(completed)).then_some(()));
    scene.open_gate();
    let ended = life.wait();
    assert_eq!(ended.report()["records_out"], TOTAL);
    assert!(ended.err.contains("waits for an output that cannot be written"), "{}", ended.err);
    let open = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().ends_with(".open");
    let left = fs::read_dir(scene.output()).expect("the output").flatten().filter(open).count();
    assert_eq!(left, 0, "parts that are not final");
    scene.check();
}

/// With a mount of its own, where that is allowed.
fn an_output_on_a_disk_that_is_really_full_goes_on_when_there_is_room() {
    let scene = Scene::new("to_file");
    let disk = scene.path("disk");
    fs::create_dir(&disk).expect("room for a folder");
    let probe = format!("mount -t tmpfs -o size=64k none {}", text(&disk));
    let probe =
        std::process::Command::new("unshare").args(["--mount", "sh", "-c", &probe]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        eprintln!("skipped: nothing can be mounted here");
        return;
    }
    let parameters = format!("{} {}", text(&scene.path("gate")), text(&disk.join("out")));
    let mount = format!("mount -t tmpfs -o size=256k none {} && exec \"$@\"", text(&disk));
    let life = Cli::new("to_file", &parameters)
        .workers(2)
        .env("XDG_RUNTIME_DIR", &text(scene.folder.path()))
        .args(["--name", "job", "--no-progress", "--report", "json", "--rate", "5000"])
        .under_unshared(&mount)
        .start();
    let seen = PathBuf::from(format!("/proc/{}/root{}", life.pid(), text(&disk)));
    wait_for("some output", || (fs::metadata(seen.join("out")).ok()?.len() > 1000).then_some(()));
    let filler = seen.join("filler");
    let full = fs::File::create(&filler).map(|mut file| {
        std::io::copy(&mut std::io::repeat(7), &mut file).expect_err("the disk becomes full")
    });
    assert_eq!(full.expect("a file").raw_os_error(), Some(libc::ENOSPC));
    let external = scene.external("waiting");
    assert_eq!(external["last_error"], "No space left on device (os error 28)");
    fs::remove_file(&filler).expect("our own file");
    scene.external("ok");
    let rows = wait_for("all rows", || {
        let text = fs::read_to_string(seen.join("out")).ok()?;
        let rows: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        (rows.len() as u64 >= TOTAL).then_some(rows)
    });
    scene.open_gate();
    assert_eq!(life.wait().report()["records_out"], TOTAL);
    let mut rows = rows;
    rows.sort_unstable();
    assert!(rows.into_iter().eq(0..TOTAL));
}

fn standard_output_without_room_is_waited_for() {
    let scene = Scene::new("printed");
    scene.refuse(Path::new("/dev/stdout"), libc::ENOSPC);
    let life = scene.life().start();
    assert_eq!(scene.external("waiting")["name"], "standard output");
    scene.allow();
    scene.external("ok");
    scene.open_gate();
    let ended = life.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let mut found: Vec<u64> = ended.out.lines().map(|l| l.parse().expect("a number")).collect();
    found.sort_unstable();
    assert!(found.into_iter().eq(0..TOTAL));
}

/// The first lines of what a job prints; then its reader is gone.
fn read_some(life: &mut Started, lines: usize) {
    let out = life.child.stdout.take().expect("a pipe");
    let read = BufReader::new(out).lines().take(lines).filter_map(Result::ok).count();
    assert_eq!(read, lines);
}

fn a_reader_that_has_seen_enough_ends_a_job_that_only_prints() {
    let scene = Scene::new("printed");
    let mut life = scene.life().start_for_reading();
    read_some(&mut life, 10);
    // The gate stays closed: the job would not end by itself.
    let ended = life.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("has no reader any more: the job ends"), "{}", ended.err);
}

fn a_job_with_another_output_goes_on_without_its_reader() {
    let scene = Scene::new("printed_and_written");
    let mut life = scene.life().start_for_reading();
    read_some(&mut life, 10);
    assert_eq!(scene.external("failing")["name"], "standard output");
    scene.open_gate();
    let ended = life.wait();
    assert_eq!(ended.report()["records_in"], TOTAL);
    assert!(ended.err.contains("the job goes on"), "{}", ended.err);
    scene.check();
}

fn closed_standard_streams_end_no_worker_that_prints_to_them() {
    let scene = Scene::new("talkative");
    let mut life = scene.life().args(["--rate", "20000"]).start_deaf();
    scene.open_gate();
    let status = wait_for("the job's end", || life.try_wait().expect("our own child"));
    assert_eq!(status.code(), Some(0));
    scene.check();
}

fn a_terminal_that_goes_away_ends_no_job_that_is_to_outlive_it() {
    let scene = Scene::new("to_file");
    // As nohup does it.
    let life = scene.life().args(["--name", "job"]).under("trap '' HUP; exec \"$@\"").start();
    wait_for("the job to run", || scene.status());
    life.signal(libc::SIGHUP);
    assert!(scene.status().is_some());
    scene.open_gate();
    assert_eq!(life.wait().report()["records_out"], TOTAL);
    scene.check();
}

const LINES: usize = 30_000;

fn lines(flow: &Flow, parameters: &str) {
    let (input, output) = parameters.split_once(' ').expect("input and output");
    flow.source("lines", FileSource::lines([input])).sink(
        "rows",
        FileSink::new(output, testudo::sink::file::Lines(|line: &Line| line.as_str().to_owned())),
    );
}

/// A job that reads lines, slowly.
struct Reading {
    folder: tempfile::TempDir,
}

impl Reading {
    fn new() -> Self {
        let reading = Self { folder: folder() };
        let text: String = (0..LINES).map(|n| format!("{n:07}\n")).collect();
        fs::write(reading.input(), text).expect("room for an input");
        reading
    }

    fn input(&self) -> PathBuf {
        self.folder.path().join("in")
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn start(&self) -> Started {
        let parameters = format!("{} {}", text(&self.input()), text(&self.output()));
        let args = ["--no-progress", "--report", "json", "--rate", "8000"];
        let life = Cli::new("lines", &parameters).workers(2).args(args).start();
        // Of both halves: each worker has opened its own.
        wait_for("the first rows", || {
            let rows = fs::read_to_string(self.output()).unwrap_or_default();
            let is_there = |n: usize| rows.contains(&format!("{n:07}\n"));
            (is_there(0) && is_there(LINES / 2 + 1)).then_some(())
        });
        life
    }
}

fn an_input_that_is_cut_short_costs_what_is_gone_also_after_a_crash() {
    let reading = Reading::new();
    let life = reading.start();
    // In the middle of a line of the first half.
    let left = LINES * 8 * 2 / 5 + 3;
    let file = fs::File::options().write(true).open(reading.input()).expect("the input");
    file.set_len(left as u64).expect("our own file");
    kill_worker(&life, 0);
    kill_worker(&life, 1);
    let ended = life.wait();
    let report = ended.report();
    // Half of the file belongs to each worker; a worker may have had more in memory than is left.
    let rejected = report["rejected"].as_u64().expect("a number");
    assert!((1..=2).contains(&rejected), "{}", ended.err);
    assert!(ended.err.contains("bytes are lost, the job goes on"), "{}", ended.err);
    let rows = sorted_lines(&reading.output());
    assert_eq!(report["records_out"], rows.len());
    assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "a row is there twice");
    assert!(rows.iter().all(|row| row.len() == 7), "a row that is no line of the input");
    let first = rows.iter().take_while(|row| row.parse::<usize>().is_ok_and(|n| n < left / 8));
    assert_eq!(first.count(), left / 8, "all that is left was read");
}

fn an_input_that_is_replaced_is_read_to_its_end() {
    let reading = Reading::new();
    let life = reading.start();
    // As a log is rotated: who has it open goes on.
    fs::rename(reading.input(), reading.folder.path().join("in.1")).expect("our own file");
    fs::write(reading.input(), "another\n".repeat(LINES)).expect("room for an input");
    let report = life.wait().report();
    assert_eq!(
        (report["rejected"].as_u64(), report["records_in"].as_u64()),
        (Some(0), Some(30_000))
    );
    assert!(!sorted_lines(&reading.output()).iter().any(|row| row == "another"));
    // A successor finds another file there, and does not take it for the one that it was.
    let reading = Reading::new();
    let life = reading.start();
    fs::write(reading.folder.path().join("new"), "another\n".repeat(LINES)).expect("room");
    fs::rename(reading.folder.path().join("new"), reading.input()).expect("our own file");
    kill_worker(&life, 0);
    kill_worker(&life, 1);
    let ended = life.wait();
    assert_eq!(ended.report()["rejected"], 2, "{}", ended.err);
    assert!(ended.err.contains("replaced by another one"), "{}", ended.err);
    assert!(!sorted_lines(&reading.output()).iter().any(|row| row == "another"));
}

fn an_input_that_grows_is_read_as_far_as_it_was() {
    use std::io::Write;
    let reading = Reading::new();
    let life = reading.start();
    let mut file = fs::File::options().append(true).open(reading.input()).expect("the input");
    file.write_all("another\n".repeat(1000).as_bytes()).expect("room for an input");
    kill_worker(&life, 0);
    let report = life.wait().report();
    assert_eq!(report["records_in"], LINES);
    assert_eq!(report["rejected"], 0);
    let expected: Vec<String> = (0..LINES).map(|n| format!("{n:07}")).collect();
    assert!(sorted_lines(&reading.output()) == expected);
}

/// A count of each of many keys, so that a checkpoint holds something.
fn stateful(flow: &Flow, parameters: &str) {
    let (source, output) = numbers(parameters);
    flow.source("numbers", source)
        .key_by(|n| n % 5000)
        .aggregate(|| 0u64, |count, _| *count += 1, |key, count| (*key, *count))
        .sink(
            "rows",
            FileSink::new(output, Csv(|row: &Row| (row.0.to_native(), row.1.to_native()))),
        );
}

impl Scene {
    /// The job with checkpoints in `one`, and in `two` if there are two.
    fn saving(&self, folders: usize) -> Cli {
        self.saving_at(folders, "10000")
    }

    /// The same, at so many records a second.
    fn saving_at(&self, folders: usize, rate: &str) -> Cli {
        let (one, two) = (text(&self.path("one")), text(&self.path("two")));
        let mut args = vec!["--checkpoint-interval", "20ms", "--rate", rate];
        args.extend(["--checkpoint-dir", &one]);
        if folders > 1 {
            args.extend(["--checkpoint-dir-2", &two]);
        }
        self.life().own_group().args(args)
    }

    fn completed(&self) -> u64 {
        let status = self.status().unwrap_or_default();
        status["checkpoints"]["completed"].as_u64().unwrap_or(0)
    }

    /// Waits for so many more complete checkpoints.
    fn wait_for_more(&self, more: u64) {
        let before = self.completed();
        wait_for("more checkpoints", || (self.completed() >= before + more).then_some(()));
    }

    /// Where checkpoints go at the moment.
    fn folder_in_use(&self) -> String {
        let status = self.status().unwrap_or_default();
        let folder = status["checkpoints"]["folder"].as_str().unwrap_or("").to_owned();
        folder.rsplit('/').next().unwrap_or("").to_owned()
    }

    /// Kills the whole job and has it go on from its checkpoints; its rows are exact.
    fn crash_and_end(&self, life: Started, folders: usize) -> String {
        life.signal_group(libc::SIGKILL);
        life.wait();
        self.open_gate();
        let ended = self.saving(folders).args(["--resume"]).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert!(!ended.err.contains("begins afresh"), "{}", ended.err);
        // A row for each update: every count of every key, once.
        let pairs = (0..5000).flat_map(|key| (1..=4).map(move |count| format!("{key},{count}")));
        let mut expected: Vec<String> = pairs.collect();
        expected.sort_unstable();
        let rows = self.rows();
        assert!(rows == expected, "{} rows, or others", rows.len());
        ended.err
    }
}

/// Every block of every checkpoint that the folder's roots name.
fn assert_whole(folder: &Path) {
    let at = folder.parent().expect("a folder above");
    let (code, out, err) = said(&tool(at, &["checkpoint", "verify", &text(folder)]));
    assert_eq!(code, 0, "{out}{err}");
}

fn a_checkpoint_folder_that_is_removed_is_made_again_and_whole() {
    let scene = Scene::new("stateful");
    let life = scene.saving(1).start();
    scene.wait_for_more(3);
    for _ in 0..2 {
        fs::rename(scene.path("one"), scene.path("away")).expect("our own folder");
        fs::remove_dir_all(scene.path("away")).expect("our own folder");
        wait_for("the folder to be made again", || scene.path("one").exists().then_some(()));
        scene.wait_for_more(3);
    }
    scene.external("ok");
    let err = scene.crash_and_end(life, 1);
    assert!(!err.contains("damaged"), "{err}");
    assert_whole(&scene.path("one"));
}

fn a_checkpoint_folder_that_fails_is_waited_for() {
    for errno in [libc::ENOSPC, libc::EROFS, libc::EIO] {
        let scene = Scene::new("stateful");
        let life = scene.saving(1).start();
        scene.wait_for_more(2);
        scene.refuse(&scene.path("one"), errno);
        let external = wait_for("more tries", || {
            let external = scene.external("failing");
            (external["retries"].as_u64() > Some(3)).then_some(external)
        });
        assert_eq!(external["name"], format!("checkpoint folder {}", text(&scene.path("one"))));
        let status = scene.status().expect("it runs");
        assert!(status["checkpoints"]["failed"].as_u64() > Some(0), "{status}");
        scene.allow();
        scene.wait_for_more(2);
        scene.external("ok");
        scene.crash_and_end(life, 1);
    }
}

fn a_checkpoint_folder_that_stalls_stops_nobody() {
    let scene = Scene::new("stateful");
    let life = scene.saving_at(1, "2000").start();
    scene.wait_for_more(2);
    let line = format!("{} wait\n", text(&scene.path("one")));
    fs::write(scene.path("refused"), line).expect("room for a line");
    let records = || scene.status().unwrap_or_default()["records_in"].as_u64().unwrap_or(0);
    let before = records();
    wait_for("records to go on", || (records() > before + 1000).then_some(()));
    let completed = scene.completed();
    wait_for("more records", || (records() > before + 2000).then_some(()));
    assert!(scene.completed() <= completed + 1, "a checkpoint went past the stall");
    kill_worker(&life, 0);
    scene.allow();
    scene.wait_for_more(2);
    scene.crash_and_end(life, 1);
}

fn a_second_checkpoint_folder_is_used_while_the_first_fails() {
    let scene = Scene::new("stateful");
    let life = scene.saving(2).start();
    scene.wait_for_more(2);
    assert_eq!(scene.folder_in_use(), "one");
    for _ in 0..2 {
        scene.refuse(&scene.path("one"), libc::ENOSPC);
        wait_for("the second folder", || (scene.folder_in_use() == "two").then_some(()));
        scene.wait_for_more(3);
        assert_whole(&scene.path("two"));
        scene.allow();
        wait_for("the first folder again", || (scene.folder_in_use() == "one").then_some(()));
        scene.wait_for_more(3);
        assert_whole(&scene.path("one"));
    }
    scene.crash_and_end(life, 2);
}

fn the_newest_checkpoint_of_both_folders_is_resumed() {
    // In the second folder when the whole machine dies.
    let scene = Scene::new("stateful");
    let life = scene.saving(2).start();
    scene.wait_for_more(3);
    scene.refuse(&scene.path("one"), libc::ENOSPC);
    wait_for("the second folder", || (scene.folder_in_use() == "two").then_some(()));
    scene.wait_for_more(3);
    life.signal_group(libc::SIGKILL);
    life.wait();
    scene.allow();
    let life = scene.saving(2).args(["--resume"]).start();
    scene.wait_for_more(2);
    let records = scene.status().unwrap_or_default()["records_in"].as_u64().unwrap_or(0);
    assert!(records > 0);
    wait_for("the first folder again", || (scene.folder_in_use() == "one").then_some(()));
    scene.wait_for_more(2);
    // And in the first one now.
    scene.crash_and_end(life, 2);
}

fn a_job_resumes_with_one_of_its_folders_gone() {
    let scene = Scene::new("stateful");
    let life = scene.saving(2).start();
    scene.wait_for_more(2);
    scene.refuse(&scene.path("one"), libc::ENOSPC);
    wait_for("the second folder", || (scene.folder_in_use() == "two").then_some(()));
    scene.wait_for_more(3);
    life.signal_group(libc::SIGKILL);
    life.wait();
    fs::remove_dir_all(scene.path("one")).expect("our own folder");
    fs::write(scene.path("one"), "no folder").expect("room for a file");
    scene.allow();
    let life = scene.saving(2).args(["--resume"]).start();
    scene.wait_for_more(2);
    assert_eq!(scene.folder_in_use(), "two");
    // A file in the folder's place, until somebody mends it.
    fs::remove_file(scene.path("one")).expect("our own file");
    wait_for("the first folder again", || (scene.folder_in_use() == "one").then_some(()));
    scene.wait_for_more(2);
    let err = scene.crash_and_end(life, 2);
    assert!(!err.contains("damaged"), "{err}");
}
