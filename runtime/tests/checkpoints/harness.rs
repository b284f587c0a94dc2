//! A job and its checkpoint folder over several lives, each a program in a process group of its own
//! that is killed as a whole, or runs to its end.

use super::common::program::{Cli, Ended, Started};
use super::common::{Random, folder, sorted_lines, sorted_parts, text, wait_for};
use super::jobs::Asked;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::testing::{KILL_AT, Point};

/// Where a job's input, outputs and checkpoints lie.
pub struct Scene {
    pub folder: tempfile::TempDir,
    pub job: &'static str,
    pub total: u64,
    pub files: Vec<PathBuf>,
    pub random: Random,
    pub ring: &'static str,
    /// More arguments for each life.
    pub args: Vec<String>,
}

impl Scene {
    pub fn new(job: &'static str, total: u64, files: usize, seed: u64) -> Self {
        let folder = folder();
        let files = (0..files).map(|n| folder.path().join(format!("file-{n}"))).collect();
        let random = Random::new(seed);
        Self { folder, job, total, files, random, ring: "16KiB", args: Vec::new() }
    }

    /// The checkpoint folder.
    pub fn checkpoints(&self) -> PathBuf {
        self.folder.path().join("checkpoints")
    }

    /// A life of the job: `pace` nanoseconds for each record, a checkpoint every few milliseconds.
    pub fn life(&self, workers: usize, pace: u64) -> Cli {
        self.life_as(self.job, &Asked::text(self.total, pace, &self.files), workers)
    }

    /// A life under another job's name, with parameters of its own.
    pub fn life_as(&self, job: &str, parameters: &str, workers: usize) -> Cli {
        self.life_without_interval(job, parameters, workers).args(["--checkpoint-interval", "10ms"])
    }

    fn life_without_interval(&self, job: &str, parameters: &str, workers: usize) -> Cli {
        let (workers, checkpoints) = (workers.to_string(), text(&self.checkpoints()));
        Cli::new(job, parameters)
            .own_group()
            .args(["--workers", &workers, "--key-groups", "16", "--ring-bytes", self.ring])
            .args(["--checkpoint-dir", &checkpoints, "--no-progress", "--report", "json"])
            .args(self.args.iter().map(String::as_str))
    }

    /// As [`Scene::resumed`], where the arguments say themselves when checkpoints are taken.
    pub fn resumed_without_interval(&self, workers: usize, pace: u64) -> Cli {
        let parameters = Asked::text(self.total, pace, &self.files);
        self.life_without_interval(self.job, &parameters, workers).args(["--resume"])
    }

    /// The same, going on from the newest checkpoint.
    pub fn resumed(&self, workers: usize, pace: u64) -> Cli {
        self.life(workers, pace).args(["--resume"])
    }

    /// Waits until there are `more` checkpoints than at `before`; false when the job is over.
    pub fn wait_for_checkpoints(&self, life: &mut Started, before: u64, more: u64) -> bool {
        wait_for("a checkpoint", || {
            let over = life.child.try_wait().expect("our own child").is_some();
            (over || self.newest() >= before + more).then_some(!over)
        })
    }

    /// The newest checkpoint's number; 0 when there is none.
    pub fn newest(&self) -> u64 {
        self.manifests().last().copied().unwrap_or(0)
    }

    /// Numbers of all checkpoints that lie there, ascending.
    pub fn manifests(&self) -> Vec<u64> {
        let number = |name: &str| name.strip_prefix('c')?.strip_suffix(".manifest")?.parse().ok();
        let mut numbers: Vec<u64> =
            names(&self.checkpoints()).iter().filter_map(|n| number(n)).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Starts a life and kills all of it some time after its first checkpoint. True if it was
    /// killed before its end.
    pub fn crash(&mut self, workers: usize, pace: u64) -> bool {
        let before = self.newest();
        let mut life = self.resumed(workers, pace).start();
        let more = 1 + self.random.below(3);
        if self.wait_for_checkpoints(&mut life, before, more) {
            std::thread::sleep(Duration::from_micros(self.random.below(12_000)));
            life.signal_group(libc::SIGKILL);
        }
        let ended = life.wait();
        assert!(
            ended.signal == Some(libc::SIGKILL) || ended.code == Some(0),
            "a life ended by itself: {ended:?}"
        );
        ended.code.is_none()
    }

    /// Runs a life that ends at a point of a checkpoint; the job may also come to its end before.
    pub fn crash_at(&self, workers: usize, pace: u64, who: &str, point: Point, skip: u64) -> Ended {
        let order = format!("{who}:{}:1:{skip}:all", index(point));
        let ended = self.resumed(workers, pace).env(KILL_AT, &order).run();
        assert!(
            ended.signal == Some(libc::SIGKILL) || ended.code == Some(0),
            "a life ended by itself: {ended:?}"
        );
        ended
    }

    /// The last life: at full speed to the end.
    pub fn end(&self, workers: usize) -> Ended {
        let ended = self.resumed(workers, 0).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        ended
    }

    /// Rows of output `n`: a file, or a folder of parts.
    pub fn rows(&self, n: usize) -> Vec<String> {
        let path = &self.files[n];
        if path.is_dir() { sorted_parts(path) } else { sorted_lines(path) }
    }

    /// Compares all outputs.
    pub fn check(&self, expected: &[Vec<String>]) {
        for (n, expected) in expected.iter().enumerate() {
            same(&self.rows(n), expected, &format!("output {n} of {}", self.job));
        }
    }
}

/// Compares sorted rows, and says where they differ.
pub fn same(found: &[String], expected: &[String], what: &str) {
    if found == expected {
        return;
    }
    let missing = without(expected, found);
    let more = without(found, expected);
    panic!(
        "{what}: {} rows instead of {}; {} missing, such as {:?}; {} too many, such as {:?}",
        found.len(),
        expected.len(),
        missing.len(),
        &missing[..missing.len().min(4)],
        more.len(),
        &more[..more.len().min(4)]
    );
}

/// Rows of one sorted list that the other one does not have as often.
fn without<'a>(rows: &'a [String], other: &[String]) -> Vec<&'a String> {
    let mut at = 0;
    let mut left = Vec::new();
    for row in rows {
        while other.get(at).is_some_and(|other| other < row) {
            at += 1;
        }
        if other.get(at) == Some(row) { at += 1 } else { left.push(row) }
    }
    left
}

/// A point as a kill order names it.
pub fn index(point: Point) -> usize {
    Point::ALL.iter().position(|other| *other == point).expect("a point of the list")
}

/// The names in a folder; none when it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Bytes of all files of a folder.
pub fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// Changes one byte of a file.
pub fn flip(path: &Path, at: u64) {
    let mut bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes[at as usize] ^= 0x10;
    std::fs::write(path, bytes).expect("our own file");
}
