//! Sinks across crashes of the machine: a job with checkpoints is killed as a whole, or one worker
//! of it, at random and at each point of a commit, and goes on with other numbers of workers. What
//! has a final name is finished, never changes again, and in the end is exactly the input.

mod common;

use common::program::{Cli, Ended};
use common::{Jobs, Random, deep, folder, text, trials, wait_for};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Csv;
use testudo::sink::{Cut, Sink, Writer};
use testudo::source::Subtask;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[("parts", parts), ("batches", batches)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            r13_parts_are_exact_whenever_the_whole_job_dies,
            r13_batches_are_exact_whenever_the_whole_job_dies,
            r13_parts_are_exact_at_every_point_of_a_commit,
            r13_batches_are_exact_at_every_point_of_a_commit,
            r13_sinks_are_exact_when_one_worker_dies_at_a_point_of_a_commit,
            a_job_that_dies_before_its_last_commit_is_finished_by_a_resume,
            resuming_a_finished_job_changes_no_part,
            a_part_has_about_as_many_bytes_as_asked_for,
            parts_of_a_job_without_checkpoints_are_final_at_its_end,
        ],
    )
}

const TOTAL: u64 = 9_000;
const RATE: &str = "16000";
const HEADER: &str = "number,square";

/// Every number to one of the subtasks, by key.
fn parts(flow: &Flow, output: &str) {
    let square = Csv(|n: &u64| (*n, n * n));
    flow.source("numbers", Generator::new(TOTAL, |n| n))
        .key_by(|n| n % 97)
        .stream()
        .sink("rows", FileSink::folder(output, "csv", square).header(HEADER));
}

fn batches(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(TOTAL, |n| n))
        .key_by(|n| n % 97)
        .stream()
        .sink("rows", Batches { folder: output.into() });
}

/// A sink that takes nothing back that it has shown: rows of the steps since the last cut are a
/// file of their own, prepared under the cut's number and shown by a rename.
struct Batches {
    folder: PathBuf,
}

struct BatchWriter {
    folder: PathBuf,
    subtask: usize,
    /// Rows since the last cut, those of the open step last.
    rows: Vec<u8>,
}

impl Sink<u64> for Batches {
    type Position = u64;
    type Writer = BatchWriter;

    fn start(&self, _subtask: Subtask) -> u64 {
        0
    }

    fn open(&self, subtask: Subtask, from: &u64) -> Result<BatchWriter, String> {
        fs::create_dir_all(&self.folder).map_err(|error| error.to_string())?;
        let mut writer =
            BatchWriter { folder: self.folder.clone(), subtask: subtask.index, rows: Vec::new() };
        writer.rows = fs::read(writer.waiting()).unwrap_or_default();
        if (writer.rows.len() as u64) < *from {
            return Err(format!("{} waiting bytes, not {from}", writer.rows.len()));
        }
        writer.rows.truncate(*from as usize);
        Ok(writer)
    }

    fn withdraw(&self, from: usize, epoch: u64) -> Result<(), String> {
        for subtask in from..8 {
            let (folder, rows) = (self.folder.clone(), Vec::new());
            Writer::abort(&mut BatchWriter { folder, subtask, rows }, epoch)?;
        }
        Ok(())
    }

    /// The rows that waited at the checkpoint are the last of their subtask.
    fn settle(&self, subtask: Subtask, position: &u64, epoch: u64) -> Result<(), String> {
        let mut writer = self.open(subtask, position)?;
        Writer::abort(&mut writer, epoch)?;
        if !writer.rows.is_empty() {
            writer.prepare(Cut { epoch, is_last: true }, &mut 0)?;
        }
        writer.commit(epoch)
    }
}

impl BatchWriter {
    fn waiting(&self) -> PathBuf {
        self.folder.join(format!("waiting-{}", self.subtask))
    }

    fn path(&self, epoch: u64, ending: &str) -> PathBuf {
        let name = format!("part-{:03}-{epoch:06}.csv{ending}", self.subtask);
        self.folder.join(name)
    }

    fn prepared(&self) -> Vec<u64> {
        let prefix = format!("part-{:03}-", self.subtask);
        let number =
            |name: &String| name.strip_prefix(&prefix)?.strip_suffix(".csv.prepared")?.parse().ok();
        names(&self.folder).iter().filter_map(number).collect()
    }
}

impl Writer<u64, u64> for BatchWriter {
    fn write(&mut self, n: &u64) -> Result<(), String> {
        writeln!(self.rows, "{n},{}", n * n).map_err(|error| error.to_string())
    }

    fn flush(&mut self, position: &mut u64) -> Result<(), String> {
        *position = self.rows.len() as u64;
        fs::write(self.waiting(), &self.rows).map_err(|error| error.to_string())
    }

    fn prepare(&mut self, cut: Cut, position: &mut u64) -> Result<(), String> {
        if !self.rows.is_empty() {
            let rows = [format!("{HEADER}\n").as_bytes(), &self.rows].concat();
            fs::write(self.path(cut.epoch, ".prepared"), rows)
                .map_err(|error| error.to_string())?;
            self.rows.clear();
            *position = 0;
        }
        Ok(())
    }

    fn commit(&mut self, epoch: u64) -> Result<(), String> {
        for cut in self.prepared().into_iter().filter(|cut| *cut <= epoch) {
            fs::rename(self.path(cut, ".prepared"), self.path(cut, ""))
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn abort(&mut self, epoch: u64) -> Result<(), String> {
        for cut in self.prepared().into_iter().filter(|cut| *cut > epoch) {
            fs::remove_file(self.path(cut, ".prepared")).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// The names in a folder; none where there is no folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A job, its output folder, and what was seen there under final names.
struct Case {
    folder: tempfile::TempDir,
    job: &'static str,
    rate: &'static str,
    seen: BTreeMap<String, Vec<u8>>,
}

impl Case {
    fn new(job: &'static str) -> Self {
        Self { folder: folder(), job, rate: RATE, seen: BTreeMap::new() }
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// The job with frequent checkpoints, as it is run the first time and again.
    fn cli(&self, workers: usize, interval: &str) -> Cli {
        let checkpoints = text(&self.folder.path().join("checkpoints"));
        Cli::new(self.job, &text(&self.output())).workers(workers).own_group().args([
            "--checkpoint-dir",
            &checkpoints,
            "--checkpoint-interval",
            interval,
            "--part-bytes",
            "2KiB",
            "--rate",
            self.rate,
            "--report",
            "json",
            "--resume",
        ])
    }

    /// Looks at all files with a final name: those that were there before are as they were, and
    /// every one is whole.
    fn look(&mut self) {
        let output = self.output();
        let is_final = |name: &String| name.starts_with("part-") && name.ends_with(".csv");
        let now: Vec<String> = names(&output).into_iter().filter(is_final).collect();
        for name in self.seen.keys() {
            assert!(now.contains(name), "{name} is gone");
        }
        for name in now {
            let bytes = fs::read(output.join(&name)).expect("a final file");
            assert!(bytes.starts_with(format!("{HEADER}\n").as_bytes()), "{name} has no header");
            assert!(bytes.ends_with(b"\n"), "{name} ends in half a line");
            let before = self.seen.insert(name.clone(), bytes.clone());
            assert!(before.is_none_or(|before| before == bytes), "{name} has changed");
        }
    }

    /// Starts the job and kills all of it once there are `more` final files.
    fn kill_all(&mut self, workers: usize, more: usize, random: &mut Random) {
        let before = self.seen.len();
        let mut started = self.cli(workers, "20ms").start();
        wait_for("some final files, or the end", || {
            self.look();
            let is_over = started.child.try_wait().expect("our own child").is_some();
            (is_over || self.seen.len() >= before + more).then_some(())
        });
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        if started.child.try_wait().expect("our own child").is_none() {
            started.signal_group(libc::SIGKILL);
        }
        let ended = started.wait();
        assert!(ended.signal.is_some() || ended.code == Some(0), "{}", ended.err);
        self.look();
    }

    /// Lets the job come to its end, and checks everything.
    fn finish(&mut self, workers: usize) -> Ended {
        let ended = self.cli(workers, "20ms").run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        self.check();
        ended
    }

    fn check(&mut self) {
        self.look();
        let left: Vec<String> = names(&self.output())
            .into_iter()
            .filter(|name| name.ends_with(".open") || name.ends_with(".prepared"))
            .collect();
        assert_eq!(left, [""; 0], "files that were never finished");
        let (rows, count) = (self.rows(), TOTAL as usize);
        let wrong = (0..count.max(rows.len())).find(|n| rows.get(*n) != Some(&(*n as u64)));
        assert_eq!((wrong, rows.len()), (None, count), "rows of {:?}", self.seen.keys());
    }

    /// All rows under final names, as numbers in order.
    fn rows(&self) -> Vec<u64> {
        let mut rows = Vec::new();
        let texts = self.seen.values().map(|bytes| str::from_utf8(bytes).expect("text"));
        for line in texts.flat_map(str::lines).filter(|line| *line != HEADER) {
            let (n, square) = line.split_once(',').expect("two fields");
            let [n, square] = [n, square].map(|field| field.parse::<u64>().expect("a number"));
            assert_eq!(square, n * n);
            rows.push(n);
        }
        rows.sort_unstable();
        rows
    }
}

fn exact_whenever_the_whole_job_dies(job: &'static str, seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..deep(20, 2) {
        let mut case = Case::new(job);
        for _ in 0..3 {
            let workers = 1 + random.below(3) as usize;
            let more = random.below(4) as usize;
            case.kill_all(workers, more, &mut random);
        }
        case.finish(1 + random.below(3) as usize);
    }
}

fn r13_parts_are_exact_whenever_the_whole_job_dies() {
    exact_whenever_the_whole_job_dies("parts", 1);
}

fn r13_batches_are_exact_whenever_the_whole_job_dies() {
    exact_whenever_the_whole_job_dies("batches", 2);
}

/// The whole job dies at each point of a commit, in one worker of two, and goes on with 1, 2 and 3.
fn exact_at_every_point(job: &'static str) {
    for (point, workers) in Point::SINKS.into_iter().zip([1, 2, 3]) {
        let mut case = Case::new(job);
        for skip in [0, 1] {
            let order = format!("1:{}:1:{skip}:all", point.number());
            let ended = case.cli(2, "20ms").env(KILL_AT, &order).run();
            assert_eq!(ended.signal, Some(libc::SIGKILL), "{point:?} was not met: {}", ended.err);
            case.look();
        }
        case.finish(workers);
    }
}

fn r13_parts_are_exact_at_every_point_of_a_commit() {
    exact_at_every_point("parts");
}

fn r13_batches_are_exact_at_every_point_of_a_commit() {
    exact_at_every_point("batches");
}

fn r13_sinks_are_exact_when_one_worker_dies_at_a_point_of_a_commit() {
    for (point, job) in Point::SINKS.into_iter().zip(["parts", "batches", "parts"]) {
        let mut case = Case::new(job);
        let order = format!("0:{}:2:1", point.number());
        let ended = case.cli(2, "20ms").env(KILL_AT, &order).run();
        assert!(ended.restarts() > 0, "{point:?}: {}", ended.err);
        case.check();
    }
}

fn a_job_that_dies_before_its_last_commit_is_finished_by_a_resume() {
    for job in ["parts", "batches"] {
        let mut case = Case::new(job);
        // The only checkpoint is the one that says that the job is over.
        let order = format!("0:{}:1:0:all", Point::Committing.number());
        let ended = case.cli(2, "never").env(KILL_AT, &order).run();
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{}", ended.err);
        case.look();
        assert!(case.rows().len() < TOTAL as usize, "everything was final already");
        case.finish(3);
    }
}

fn resuming_a_finished_job_changes_no_part() {
    let mut case = Case::new("parts");
    case.finish(2);
    // A reader has taken one away.
    let (taken, _) = case.seen.pop_first().expect("a part");
    fs::remove_file(case.output().join(taken)).expect("a part");
    let before = case.seen.clone();
    let ended = case.cli(1, "20ms").run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    case.look();
    assert_eq!(case.seen, before);
}

fn a_part_has_about_as_many_bytes_as_asked_for() {
    let mut case = Case { rate: "3000", ..Case::new("parts") };
    case.finish(2);
    assert!(case.seen.len() > 4, "{:?}", case.seen.keys());
    let mut small = BTreeMap::new();
    for (name, bytes) in &case.seen {
        if bytes.len() <= 2048 {
            *small.entry(&name[..8]).or_insert(0) += 1;
        }
    }
    assert!(small.values().all(|count| *count <= 1), "only the last one is smaller: {small:?}");
}

fn parts_of_a_job_without_checkpoints_are_final_at_its_end() {
    let mut case = Case::new("parts");
    let job = Cli::new("parts", &text(&case.output())).workers(2).args(["--rate", "3000"]).start();
    wait_for("rows", || {
        let names = names(&case.output());
        assert!(names.iter().all(|name| !name.ends_with(".csv")), "{names:?}");
        let open = fs::read(case.output().join("part-001.csv.open")).unwrap_or_default();
        (open.len() > 100).then_some(())
    });
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let mut names = names(&case.output());
    names.sort_unstable();
    assert_eq!(names, [".testudo-lock", "part-000.csv", "part-001.csv"]);
    case.check();
}
