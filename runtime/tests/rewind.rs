//! Regions that go back: user code scribbles over its worker's own memory, and what does not verify
//! is restored from the last checkpoint while the other regions go on. Each test compares with what
//! an undisturbed job writes.

mod common;

#[path = "rewind/flips.rs"]
mod flips;

#[path = "rewind/scribble.rs"]
mod scribble;

use common::program::{Cli, Ended, Started};
use common::{Jobs, folder, process, sorted_lines, sorted_parts, text, trials, wait_for};
use flips::a_flipped_bit_is_harmless_or_found;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Lines;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[("sums", sums), ("parts", parts), ("apart", apart), ("printed", printed)];

fn main() -> ExitCode {
    testudo::init();
    common::host_on(
        2,
        JOBS,
        trials![
            a_scribbled_undo_log_is_found_and_the_region_restored,
            a_scribbled_cell_directory_is_found_and_the_region_restored,
            a_scribbled_header_is_found_and_the_region_restored,
            a_scribbled_claim_is_found_and_the_region_restored,
            a_scribbled_position_is_found_and_the_region_restored,
            a_scribbled_key_group_is_found_and_the_region_restored,
            an_emptied_key_group_is_found_and_the_region_restored,
            a_scribbled_table_is_found_and_the_region_restored,
            parts_of_a_folder_are_exact_across_a_rewind,
            a_region_without_a_checkpoint_begins_again_and_is_exact,
            what_was_printed_without_a_checkpoint_cannot_be_taken_back,
            a_damaged_checkpoint_is_passed_over_for_an_older_one,
            r18_the_other_region_goes_on_as_if_nothing_had_happened,
            a_job_that_ends_while_a_region_goes_back_is_resumed_and_exact,
            a_supervisor_that_dies_while_a_region_goes_back_is_followed_and_all_is_exact,
            workers_that_die_while_they_go_back_are_replaced,
            when_the_region_does_not_hold_the_job_goes_back,
            when_nothing_holds_the_job_fails_and_says_all_that_was_done,
            a_flipped_bit_is_harmless_or_found,
        ],
    )
}

/// The parameters of the jobs here.
struct Asked {
    total: u64,
    pace: u64,
    /// What a worker does to itself at its two thousandth record or later, and how many do.
    wound: String,
    times: u32,
    folder: PathBuf,
    /// Who is wounded.
    worker: u32,
}

impl Asked {
    fn parse(parameters: &str) -> Self {
        let mut fields = parameters.split(' ');
        let mut next = || fields.next().expect("a field");
        let [total, pace, times] = [(); 3].map(|()| next().parse::<u64>().expect("a number"));
        let (wound, folder) = (next().to_owned(), next().into());
        Self { total, pace, wound, times: times as u32, folder, worker: 1 }
    }
}

/// A multiple of every parallelism used, so that a key has one producer.
const KEYS: u64 = 120;

/// What a closure sees of a `String`.
type Text = <String as testudo::shm::record::Record>::View;

/// Whether there is a checkpoint, if the job takes any.
fn has_past(folder: &Path) -> bool {
    !folder.join("checkpoints").is_dir() || has_checkpoint(folder)
}

fn has_checkpoint(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    paths.any(|path| path.extension().is_some_and(|ending| ending == "manifest"))
}

/// How a record is held up, and who is wounded at it.
fn disturbance(uid: &'static str, asked: Asked) -> impl Fn() {
    let Asked { pace, wound, times, folder, worker, .. } = asked;
    let seen = std::cell::Cell::new(0u64);
    // Who is to be wounded goes slowly until there is a checkpoint, however slow the disk is.
    let hurries = std::cell::Cell::new(times == 0);
    move || {
        scribble::hold_up(pace);
        seen.set(seen.get() + 1);
        if seen.get() >= 2_000 && !hurries.get() {
            hurries.set(!scribble::is_worker(worker) || has_past(&folder));
            if !hurries.get() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        let is_time = seen.get() >= 2_000 && seen.get().is_multiple_of(250) && has_past(&folder);
        // One at a time: each wound is one fall.
        if is_time && scribble::is_worker(worker) && scribble::is_among_first(times, &folder) {
            scribble::wound(&wound, uid);
        }
    }
}

/// Sums of a stream of numbers by key, and a row at every tenth number of a key.
macro_rules! rows_of {
    ($numbers:expr, $uid:literal, $asked:expr) => {{
        let disturb = disturbance($uid, $asked);
        $numbers
            .key_by(|n| n % KEYS)
            .process(
                |state| (state.value::<u64>("count"), state.value::<u64>("sum")),
                move |(count, sum), cx, n| {
                    disturb();
                    let many = cx.get(count).copied().unwrap_or(0) + 1;
                    let all = cx.get(sum).copied().unwrap_or(0) + *n;
                    cx.set(count, &many);
                    cx.set(sum, &all);
                    if many % 10 == 0 {
                        let key = *cx.key();
                        cx.emit(format!("{key},{many},{all}"));
                    }
                },
                |_, _, _| (),
            )
            .uid($uid)
    }};
}

fn lines() -> Lines<fn(&Text) -> String> {
    Lines(|row: &Text| row.to_string())
}

fn sums(flow: &Flow, parameters: &str) {
    let asked = Asked::parse(parameters);
    let rows = asked.folder.join("rows");
    let numbers = flow.source("numbers", Generator::new(asked.total, |n| n));
    rows_of!(numbers, "sums", asked).sink("rows", FileSink::new(rows, lines()));
}

/// The same into a folder of parts.
fn parts(flow: &Flow, parameters: &str) {
    let asked = Asked::parse(parameters);
    let rows = asked.folder.join("rows");
    let numbers = flow.source("numbers", Generator::new(asked.total, |n| n));
    rows_of!(numbers, "sums", asked).sink("rows", FileSink::folder(rows, "txt", lines()));
}

fn printed(flow: &Flow, parameters: &str) {
    let asked = Asked::parse(parameters);
    let numbers = flow.source("numbers", Generator::new(asked.total, |n| n));
    rows_of!(numbers, "sums", asked).print(|row: &Text| row.to_string());
}

/// Two flows that share nothing: worker 0 runs one of them, workers 1 and 2 the other, which is
/// wounded.
fn apart(flow: &Flow, parameters: &str) {
    let asked = Asked { worker: 2, ..Asked::parse(parameters) };
    let own = Asked { times: 0, ..Asked::parse(parameters) };
    let (sound, rows) = (asked.folder.join("sound"), asked.folder.join("rows"));
    let numbers = flow.source("sound numbers", Generator::new(own.total, |n| n));
    rows_of!(numbers, "sound", own).sink("sound", FileSink::new(sound, lines()));
    let numbers = flow.source("numbers", Generator::new(asked.total, |n| n)).isolated();
    let folder = FileSink::folder(rows, "txt", lines());
    rows_of!(numbers, "sums", asked).isolated().sink("rows", folder);
}

fn sums_rows(total: u64) -> Vec<String> {
    let mut rows = Vec::new();
    for key in 0..KEYS {
        let (mut many, mut all) = (0, 0);
        for n in (key..total).step_by(KEYS as usize) {
            many += 1;
            all += n;
            if many % 10 == 0 {
                rows.push(format!("{key},{many},{all}"));
            }
        }
    }
    rows.sort_unstable();
    rows
}

struct Life {
    folder: tempfile::TempDir,
    total: u64,
}

impl Life {
    fn new(total: u64) -> Self {
        Self { folder: folder(), total }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A job that is wounded so often, at `pace` nanoseconds for each record.
    fn cli(&self, job: &str, wound: &str, times: u32, pace: u64) -> Cli {
        let folder = text(self.folder.path());
        let parameters = format!("{} {pace} {times} {wound} {folder}", self.total);
        let workers = if job == "apart" { "1" } else { "2" };
        Cli::new(job, &parameters)
            .own_group()
            .args(["--workers", workers, "--key-groups", "8", "--ring-bytes", "16KiB"])
            .args(["--no-progress", "--report", "json"])
    }

    fn with_checkpoints(&self, job: &str, wound: &str, times: u32, pace: u64) -> Cli {
        let folder = text(&self.path("checkpoints"));
        std::fs::create_dir_all(&folder).expect("a folder");
        let cli = self.cli(job, wound, times, pace);
        cli.args(["--checkpoint-dir", &folder, "--checkpoint-interval", "10ms"])
    }

    /// All is as it should be, and what was done is said.
    fn is_healed(&self, ended: &Ended, says: &str) {
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert!(scribble::wounded(self.folder.path()) > 0, "nobody was wounded: {}", ended.err);
        let path = self.path("rows");
        let rows = if path.is_dir() { sorted_parts(&path) } else { sorted_lines(&path) };
        assert_eq!(rows, sums_rows(self.total), "{}", ended.err);
        assert!(ended.err.contains(says), "{says:?} is not said: {}", ended.err);
    }

    fn wounds_heal(job: &str, wound: &str, says: &str) {
        let life = Self::new(20_000);
        let ended = life.with_checkpoints(job, wound, 1, 30_000).run();
        life.is_healed(&ended, says);
        assert!(ended.err.contains("region 0 (workers 0, 1) went back to "), "{}", ended.err);
        let report = &ended.report();
        assert_eq!(report["went_back"][0]["region"], 0, "{report}");
        assert_eq!(report["records_in"], life.total, "{report}");
    }
}

fn a_scribbled_undo_log_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "log-length", "the undo log does not verify");
    Life::wounds_heal("sums", "log-entry", "the undo log does not verify");
}

fn a_scribbled_cell_directory_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "cell-count", "the cell directory is damaged");
    Life::wounds_heal("sums", "cell-name", "the cell directory is damaged");
}

fn a_scribbled_header_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "header", "the header of its segment does not verify");
}

fn a_scribbled_claim_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "claim", "the claim word of its segment");
}

fn a_scribbled_position_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "tail", "its position does not verify");
}

fn a_scribbled_key_group_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "group-magic", "state of operator ");
    Life::wounds_heal("sums", "group-heap", "does not verify: its heap ends at");
}

fn an_emptied_key_group_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "group-empty", "does not verify: its first page is empty");
}

fn a_scribbled_table_is_found_and_the_region_restored() {
    Life::wounds_heal("sums", "root", "does not verify: the sum of its roots is");
    Life::wounds_heal("sums", "table", "does not verify: the table at");
}

fn parts_of_a_folder_are_exact_across_a_rewind() {
    Life::wounds_heal("parts", "group-magic", "state of operator ");
}

fn a_region_without_a_checkpoint_begins_again_and_is_exact() {
    for job in ["sums", "parts"] {
        let life = Life::new(20_000);
        let ended = life.cli(job, "group-magic", 1, 20_000).run();
        life.is_healed(&ended, "region 0 (workers 0, 1) went back to its beginning");
        assert_eq!(ended.report()["records_in"], life.total);
    }
}

fn what_was_printed_without_a_checkpoint_cannot_be_taken_back() {
    let life = Life::new(20_000);
    let ended = life.cli("printed", "group-magic", 1, 20_000).run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert!(ended.err.contains("what it printed cannot be taken back"), "{}", ended.err);
    // With one, lines since then may come twice, and none is missing.
    let life = Life::new(20_000);
    let ended = life.with_checkpoints("printed", "group-magic", 1, 30_000).run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let mut rows: Vec<String> = ended.out.lines().map(str::to_owned).collect();
    rows.sort_unstable();
    rows.dedup();
    assert_eq!(rows, sums_rows(life.total));
}

/// The name of worker 1's file in the newest manifest.
fn newest_file(life: &Life) -> Option<PathBuf> {
    let folder = life.path("checkpoints");
    let names = std::fs::read_dir(&folder).ok()?.flatten().map(|entry| entry.path());
    let number = |path: &PathBuf| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix('c')?.strip_suffix(".manifest")?.parse::<u64>().ok()
    };
    let newest = names.filter(|path| number(path).is_some()).max_by_key(number)?;
    let bytes = std::fs::read(newest).ok()?;
    let manifest = String::from_utf8_lossy(&bytes).into_owned();
    let from = manifest.find("w1-e")?;
    let to = from + manifest[from..].find(".region")? + ".region".len();
    Some(folder.join(&manifest[from..to]))
}

fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let life = Life::new(40_000);
    let folder = text(&life.path("checkpoints"));
    let cli = life.cli("sums", "group-magic", 0, 100_000);
    let mut job = cli.args(["--checkpoint-dir", &folder, "--checkpoint-interval", "150ms"]).start();
    let mut seen = Vec::new();
    wait_for("two checkpoints", || {
        assert!(job.child.try_wait().expect("our own child").is_none(), "the job is too short");
        seen.extend(newest_file(&life).filter(|file| !seen.contains(file)));
        (seen.len() >= 2).then_some(())
    });
    // The newest file's data begins at its second block; its first one is not looked at.
    let newest = seen.last().expect("a file");
    let mut bytes = std::fs::read(newest).expect("a file of the checkpoint");
    bytes[4096..].fill(0xA5);
    std::fs::write(newest, bytes).expect("our own file");
    let worker = worker_of(&job, "testudo-w1");
    scribble::Memory::of(worker).wound("group-magic", "sums");
    process::Held::child_of(worker, job.pid()).expect("a worker").signal(libc::SIGKILL);
    std::fs::write(life.path("wounded-0"), "").expect("a file");
    let ended = job.wait();
    life.is_healed(&ended, "going on from checkpoint ");
}

/// The process of a worker by its name.
fn worker_of(job: &Started, name: &str) -> u32 {
    wait_for("a worker", || {
        let own = process::workers_of(job.pid()).into_iter();
        let is_named = |pid: &u32| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            comm.is_ok_and(|comm| comm.trim() == name)
        };
        own.into_iter().find(is_named)
    })
}

fn r18_the_other_region_goes_on_as_if_nothing_had_happened() {
    let life = Life::new(20_000);
    let mut job = life.with_checkpoints("apart", "group-magic", 1, 40_000).start();
    let sound = worker_of(&job, "testudo-w0");
    let (mut length, mut shrank) = (0, false);
    wait_for("the end", || {
        // The other region's file never shrinks.
        let now = std::fs::metadata(life.path("sound")).map_or(0, |meta| meta.len());
        shrank |= now < length;
        length = now;
        job.child.try_wait().expect("our own child").is_some().then_some(())
    });
    let ended = job.wait();
    life.is_healed(&ended, "region 1 (workers 1, 2) went back to checkpoint ");
    assert!(!shrank, "output of the other region was taken back");
    assert_eq!(sorted_lines(&life.path("sound")), sums_rows(life.total));
    let report = ended.report();
    assert_eq!(report["records_in"], 2 * life.total, "{report}");
    let of_sound = |restart: &testudo::serde_json::Value| restart["worker"] == 0;
    assert!(!report["restarts"].as_array().expect("a list").iter().any(of_sound), "{report}");
    assert!(sound > 0);
}

fn a_job_that_ends_while_a_region_goes_back_is_resumed_and_exact() {
    for point in Point::REWIND {
        let life = Life::new(20_000);
        let order = format!("s:{}:1:0:all", point.number());
        let cli = life.with_checkpoints("sums", "group-magic", 1, 30_000);
        let ended = cli.env(KILL_AT, &order).run();
        assert_eq!(ended.signal, Some(libc::SIGKILL), "{point:?} was not reached: {ended:?}");
        let ended = life.with_checkpoints("sums", "none", 0, 0).args(["--resume"]).run();
        life.is_healed(&ended, "");
    }
}

fn a_supervisor_that_dies_while_a_region_goes_back_is_followed_and_all_is_exact() {
    for point in Point::REWIND {
        let life = Life::new(20_000);
        let order = format!("s:{}:1", point.number());
        let cli = life.with_checkpoints("sums", "group-magic", 1, 30_000);
        let ended = cli.env(KILL_AT, &order).run();
        life.is_healed(&ended, "");
        let report = ended.report();
        assert_eq!(report["records_in"], life.total, "{point:?}: {report}");
    }
}

fn workers_that_die_while_they_go_back_are_replaced() {
    for point in [Point::Imported, Point::Loading] {
        let life = Life::new(20_000);
        // In the first life nothing is brought back.
        let order = format!("1:{0}:3,0:{0}:2", point.number());
        let cli = life.with_checkpoints("sums", "group-magic", 1, 30_000);
        let ended = cli.env(KILL_AT, &order).run();
        life.is_healed(&ended, "went back to checkpoint ");
        assert!(ended.restarts() >= 2, "{point:?}: {}", ended.err);
    }
}

fn when_the_region_does_not_hold_the_job_goes_back() {
    let life = Life::new(20_000);
    let ended = life.with_checkpoints("sums", "group-magic", 4, 10_000).run();
    life.is_healed(&ended, "; the job goes back");
    let report = ended.report();
    assert_eq!(report["job_went_back"], 1, "{report}");
    assert_eq!(report["went_back"].as_array().map(Vec::len), Some(3), "{report}");
}

fn when_nothing_holds_the_job_fails_and_says_all_that_was_done() {
    let life = Life::new(200_000);
    let ended = life.with_checkpoints("sums", "group-magic", 1_000, 0).run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    let last = ended.err.lines().last().unwrap_or_default();
    assert!(last.contains("state of operator "), "{}", ended.err);
    assert_eq!(last.matches("went back to ").count(), 9, "{}", ended.err);
    assert_eq!(last.matches("the job went back").count(), 2, "{}", ended.err);
}
