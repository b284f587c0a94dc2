//! Files in and out: what cannot be read is refused with its place and reason, what is written is
//! there exactly once, and no output is touched by a job that may not write it.

mod common;

use common::process::Disturber;
use common::program::{Cli, Ended};
use common::{
    Jobs, finish, folder, run, run_failing, settings, sorted_lines, sorted_parts, start, text,
    trials,
};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;
use testudo::prelude::*;
use testudo::serde::{Deserialize, Serialize};
use testudo::shm::record::Record;
use testudo::sink::file::{Csv, Json, Lines};
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[
    ("csv_to_file", csv_to_file),
    ("json_to_file", json_to_file),
    ("lines_to_file", lines_to_file),
    ("csv_to_folder", csv_to_folder),
    ("endless", endless),
    ("two_outputs", two_outputs),
    ("moody", moody),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            csv_lines_that_cannot_be_read_are_refused_with_place_and_reason,
            json_lines_that_cannot_be_read_are_refused_with_place_and_reason,
            text_that_is_no_utf_8_is_refused,
            rejects_without_a_file_are_only_counted,
            more_rejects_than_allowed_end_the_job,
            as_many_rejects_as_allowed_do_not,
            a_limit_of_a_file_is_exact_over_all_workers,
            quoted_line_ends_are_kept_in_files_that_are_not_split,
            r13_a_file_is_the_same_to_the_byte_whoever_was_killed,
            r13_what_an_unfinished_step_wrote_is_taken_back,
            r13_parts_in_a_folder_are_the_same_whoever_was_killed,
            a_folder_of_parts_replaces_the_parts_of_before_and_nothing_else,
            an_existing_output_is_overwritten,
            every_part_begins_with_the_header,
            a_second_job_on_an_output_is_refused_and_told_by_whom,
            a_refused_job_has_touched_none_of_its_outputs,
            one_output_for_two_sinks_is_refused,
            one_output_by_two_names_is_refused_at_once,
            an_output_that_is_an_input_is_refused_and_left_as_it_is,
            every_worker_holds_the_outputs_as_long_as_it_lives,
            an_output_of_a_killed_job_can_be_written_again,
            r13_an_output_cut_short_from_outside_is_an_error,
            r13_an_output_cut_short_before_a_recovery_is_an_error,
            an_output_that_cannot_take_more_is_an_error,
            an_output_at_the_limit_of_file_sizes_is_an_error,
            a_limit_of_file_sizes_below_a_segment_is_refused,
            an_output_without_a_size_is_written_as_it_is,
            an_input_that_shrinks_costs_what_is_gone_and_that_is_counted,
            a_missing_input_is_found_before_any_output_is_touched,
            a_header_without_a_needed_column_is_refused_before_any_output_is_touched,
            inputs_with_different_headers_are_refused,
        ],
    )
}

#[testudo::record(archived)]
#[derive(Debug, Deserialize, Serialize)]
#[serde(crate = "testudo::serde")]
struct Row {
    id: u64,
    name: String,
    share: Option<f64>,
}

type RowView = <Row as Record>::View;

/// What a sink writes of a row.
fn fields(row: &RowView) -> (u64, String, Option<f64>) {
    let row = <Row as Record>::to_owned(row);
    (row.id, row.name, row.share)
}

fn paths(parameters: &str) -> (Vec<PathBuf>, PathBuf) {
    let mut all: Vec<PathBuf> = parameters.split(' ').map(PathBuf::from).collect();
    let output = all.pop().expect("an output");
    (all, output)
}

fn csv_to_file(flow: &Flow, parameters: &str) {
    let (inputs, output) = paths(parameters);
    flow.source("rows", FileSource::<Row>::csv(inputs))
        .sink("out", FileSink::new(output, Csv(fields)));
}

fn csv_to_folder(flow: &Flow, parameters: &str) {
    let (inputs, output) = paths(parameters);
    flow.source("rows", FileSource::<Row>::csv(inputs))
        .key_by(|row| row.id.to_native())
        .stream()
        .sink("out", FileSink::folder(output, ".csv", Csv(fields)).header("id,name,share"));
}

fn json_to_file(flow: &Flow, parameters: &str) {
    let (inputs, output) = paths(parameters);
    flow.source("rows", FileSource::<Row>::json(inputs))
        .sink("out", FileSink::new(output, Json(|row: &RowView| <Row as Record>::to_owned(row))));
}

fn lines_to_file(flow: &Flow, parameters: &str) {
    let (inputs, output) = paths(parameters);
    flow.source("lines", FileSource::lines(inputs)).sink(
        "out",
        FileSink::new(output, Lines(|line: &<String as Record>::View| line.to_string())),
    );
}

/// A folder with an input file, and where outputs go.
struct Case {
    folder: tempfile::TempDir,
    input: PathBuf,
    output: PathBuf,
    rejects: PathBuf,
}

impl Case {
    fn new(input: impl AsRef<[u8]>) -> Self {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        let case = Self { input: at("in"), output: at("out"), rejects: at("rejects"), folder };
        fs::write(&case.input, input).expect("room for an input file");
        case
    }

    fn parameters(&self) -> String {
        format!("{} {}", text(&self.input), text(&self.output))
    }

    /// Runs a job with one to three workers, then with two that are killed, and checks rows and
    /// rejects each time.
    fn each_way(&self, job: &str, rows: &[String], rejects: &[String]) {
        let kills = "0:12:3:1,0:9:2:2,0:10:1:1,1:11:2:2,1:8:1:1";
        for (workers, kills) in [(1, None), (2, None), (3, None), (2, Some(kills))] {
            let mut cli = Cli::new(job, &self.parameters()).workers(workers);
            cli = cli.args(["--report", "json", "--rejects", &text(&self.rejects)]);
            if let Some(kills) = kills {
                cli = cli.env(KILL_AT, kills);
            }
            let ended = cli.run();
            let report = ended.report();
            assert_eq!(kills.is_some(), ended.restarts() > 1, "{}", ended.err);
            assert_eq!(sorted_lines(&self.output), rows);
            assert_eq!(sorted_lines(&self.rejects), rejects);
            assert_eq!(report["rejected"], rejects.len());
            assert_eq!(report["records_in"], rows.len());
            assert_eq!(report["records_out"], rows.len());
        }
    }
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort_unstable();
    lines
}

const ROWS: u64 = 6000;

/// Rows, of which some cannot be read: the input, and the expected rows and rejects.
fn csv_input(case_input: &Path) -> (String, Vec<String>, Vec<String>) {
    let (mut input, mut rows, mut rejects) = ("id,name,share\n".to_owned(), Vec::new(), Vec::new());
    for n in 0..ROWS {
        let (line, reason) = match n % 40 {
            7 => (format!("x{n},a,1"), Some(format!("field 1 \"id\" is \"x{n}\": "))),
            19 => (format!("{n},a"), Some("the record has 2 fields, the header 3".into())),
            23 => (format!("{n},\"a, b\",0.5"), None),
            31 => (format!("{n},,"), None),
            _ => (format!("{n},name {n},{}", n as f64 / 4.0), None),
        };
        match reason {
            Some(reason) => {
                rejects.push(format!("{}:{}\t{reason}\t{line}", text(case_input), input.len()))
            }
            None => rows.push(row_line(n)),
        }
        writeln!(input, "{line}").expect("a string takes it");
    }
    (input, sorted(rows), sorted(rejects))
}

fn row_line(n: u64) -> String {
    match n % 40 {
        23 => format!("{n},\"a, b\",0.5"),
        31 => format!("{n},,"),
        _ => format!("{n},name {n},{:?}", n as f64 / 4.0),
    }
}

fn csv_lines_that_cannot_be_read_are_refused_with_place_and_reason() {
    let case = Case::new("");
    let (input, rows, rejects) = csv_input(&case.input);
    fs::write(&case.input, input).expect("room for an input file");
    // What the decoder says of a value is not ours to spell out; place, column and value are.
    let one = Cli::new("csv_to_file", &case.parameters())
        .workers(1)
        .args(["--rejects", &text(&case.rejects)]);
    assert_eq!(one.run().code, Some(0));
    let found = sorted_lines(&case.rejects);
    assert_eq!(found.len(), rejects.len());
    for (found, expected) in found.iter().zip(&rejects) {
        let (found, expected): (Vec<&str>, Vec<&str>) =
            (found.split('\t').collect(), expected.split('\t').collect());
        assert_eq!((found[0], found[2], found.len()), (expected[0], expected[2], 3));
        let value = expected[1].split('"').nth(3).unwrap_or(expected[1]);
        assert!(found[1].contains(value), "{found:?} {expected:?}");
    }
    case.each_way("csv_to_file", &rows, &found);
}

fn json_lines_that_cannot_be_read_are_refused_with_place_and_reason() {
    let case = Case::new("");
    let (mut input, mut rows, mut rejects) = (String::new(), Vec::new(), Vec::new());
    for n in 0..ROWS {
        let line = match n % 50 {
            9 => format!("{{\"id\":{n}"),
            17 => format!("{{\"id\":\"{n}\",\"name\":\"a\"}}"),
            33 => String::new(),
            _ => format!("{{\"id\":{n},\"name\":\"tab\\t{n}\",\"share\":null}}"),
        };
        let end = line.len();
        let reason = match n % 50 {
            9 => Some(format!(
                "not JSON at column {end}, after {line:?}: EOF while parsing an object"
            )),
            17 => {
                let near = &line[..line.find(',').expect("a comma")];
                let at = near.len();
                Some(format!(
                    "column {at}, after {near:?}: invalid type: string \"{n}\", expected u64"
                ))
            }
            _ => None,
        };
        let escaped = |text: &str| text.replace('\\', "\\\\");
        match reason {
            Some(why) => {
                let place = format!("{}:{}", text(&case.input), input.len());
                rejects.push(format!("{place}\t{}\t{}", escaped(&why), escaped(&line)));
            }
            None if line.is_empty() => {}
            None => rows.push(line.clone()),
        }
        writeln!(input, "{line}").expect("a string takes it");
    }
    fs::write(&case.input, input).expect("room for an input file");
    case.each_way("json_to_file", &sorted(rows), &sorted(rejects));
}

fn text_that_is_no_utf_8_is_refused() {
    let (mut input, mut rows, mut rejects) = (Vec::new(), Vec::new(), Vec::new());
    let case = Case::new("");
    for n in 0..ROWS {
        if n % 100 == 50 {
            let place = format!("{}:{}", text(&case.input), input.len());
            rejects.push(format!(
                "{place}\tinvalid utf-8 sequence of 1 bytes from index 1\ta\\xFF{n}"
            ));
            input.extend_from_slice(b"a\xFF");
        } else {
            rows.push(n.to_string());
        }
        input.extend_from_slice(format!("{n}\n").as_bytes());
    }
    fs::write(&case.input, input).expect("room for an input file");
    case.each_way("lines_to_file", &sorted(rows), &sorted(rejects));
}

fn rejects_without_a_file_are_only_counted() {
    let case = Case::new("id,name,share\n1,a,\nx,b,\n2,c,\n");
    let report = run(csv_to_file, &case.parameters(), settings(2));
    assert_eq!((report.records_in, report.rejected), (2, 1));
    assert_eq!(sorted_lines(&case.output), ["1,a,", "2,c,"]);
}

const FIVE_BAD: &str = "id,name,share\n1,a,\nx,b,\nx,b,\nx,b,\n2,c,\nx,b,\nx,bb,\n3,a,\n";

fn more_rejects_than_allowed_end_the_job() {
    let case = Case::new(FIVE_BAD);
    let few = Settings { max_rejects: Some(4), ..settings(1) };
    let (message, code) = run_failing(csv_to_file, &case.parameters(), few);
    assert_eq!(
        message,
        format!(
            "operator rows (worker 0): 5 inputs refused, more than --max-rejects 4 allows; the \
             last one: \
             {}:44\tfield \"id\" (column 1) is \"x\": invalid digit found in string\tx,bb,",
            text(&case.input)
        )
    );
    assert_eq!(code, 1);
}

fn as_many_rejects_as_allowed_do_not() {
    let case = Case::new(FIVE_BAD);
    let enough = Settings { max_rejects: Some(5), ..settings(1) };
    assert_eq!(run(csv_to_file, &case.parameters(), enough).rejected, 5);
}

fn a_limit_of_a_file_is_exact_over_all_workers() {
    let lines: Vec<String> = (0..3000).map(|n| format!("line {n}")).collect();
    let case = Case::new(lines[..1000].join("\n"));
    let second = case.folder.path().join("second");
    fs::write(&second, lines[1000..].join("\n") + "\n").expect("room for an input file");
    let parameters = format!("{} {} {}", text(&case.input), text(&second), text(&case.output));
    for workers in [1, 2, 3] {
        for limit in [0, 1, 999, 1000, 1001, 2500, 3000, 9999] {
            let settings = Settings { limit: Some(limit), ..settings(workers) };
            let report = run(lines_to_file, &parameters, settings);
            let first = &lines[..(limit as usize).min(3000)];
            assert_eq!(report.records_in, first.len() as u64);
            assert_eq!(
                sorted_lines(&case.output),
                sorted(first.to_vec()),
                "{workers} workers, {limit}"
            );
        }
    }
}

fn quoted_line_ends_are_kept_in_files_that_are_not_split() {
    let input: String = (0..2000).map(|n| format!("{n},\"line\n{n}\",\n")).collect();
    let case = Case::new(format!("id,name,share\n{input}"));
    let whole = Settings { no_split: true, ..settings(3) };
    let report = run(csv_to_file, &case.parameters(), whole);
    assert_eq!((report.records_in, report.rejected), (2000, 0));
    assert_eq!(fs::read_to_string(&case.output).expect("the output is there"), input);
    let split = run(csv_to_file, &case.parameters(), settings(3));
    assert_eq!(
        (split.records_in, split.rejected),
        (0, 4000),
        "without it each line stands for itself"
    );
}

/// A source of one subtask, so that the order is one, too; through another process and back.
fn endless(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n))
        .parallelism(1)
        .round_robin()
        .map(|n| "x".repeat((n % 30) as usize))
        .parallelism(1)
        .isolated()
        .sink(
            "out",
            FileSink::new(output, Lines(|line: &<String as Record>::View| line.to_string())),
        );
}

fn r13_a_file_is_the_same_to_the_byte_whoever_was_killed() {
    let case = Case::new("");
    let running = start(endless, &text(&case.output), settings(1));
    let view = running.workers().expect("the job starts");
    let mut disturber = Disturber::new(&running, &view, 17);
    disturber.kill_randomly(common::deep(300, 40));
    running.stop();
    let report = finish(running).expect("the job survives");
    let expected: String =
        (0..report.records_in).map(|n| "x".repeat((n % 30) as usize) + "\n").collect();
    let found = fs::read_to_string(&case.output).expect("the output is there");
    assert!(found == expected, "{} bytes instead of {}", found.len(), expected.len());
    assert_eq!(report.records_out, report.records_in);
}

/// Writes long lines in its first life and short ones afterwards: user code may do that.
fn moody(flow: &Flow, parameters: &str) {
    let (marker, output) = parameters.split_once(' ').expect("marker and output");
    let marker = PathBuf::from(marker);
    let is_first = std::cell::OnceCell::new();
    flow.source("numbers", Generator::new(50, |n| n))
        .map(move |n| {
            let is_first = *is_first.get_or_init(|| {
                let is_first = !marker.exists();
                fs::write(&marker, "").expect("room for a file");
                is_first
            });
            if is_first { format!("{n} and a lot more") } else { n.to_string() }
        })
        .sink(
            "out",
            FileSink::new(output, Lines(|line: &<String as Record>::View| line.to_string())),
        );
}

fn r13_what_an_unfinished_step_wrote_is_taken_back() {
    let case = Case::new("");
    let marker = case.folder.path().join("marker");
    let saved = Point::ALL.iter().position(|point| *point == Point::Saved).expect("a point");
    let parameters = format!("{} {}", text(&marker), text(&case.output));
    let job = Cli::new("moody", &parameters).workers(1).args(["--report", "json"]);
    let ended = job.env(KILL_AT, &format!("0:{saved}:1:0")).run();
    assert_eq!(ended.restarts(), 1, "{}", ended.err);
    let expected: String = (0..50).map(|n| format!("{n}\n")).collect();
    assert_eq!(fs::read_to_string(&case.output).expect("the output is there"), expected);
}

fn many_rows() -> (String, Vec<String>) {
    let lines: Vec<String> = (0..40_000).map(|n| format!("{n},name {n},{}.5", n % 9)).collect();
    (format!("id,name,share\n{}\n", lines.join("\n")), sorted(lines))
}

fn r13_parts_in_a_folder_are_the_same_whoever_was_killed() {
    let (input, mut rows) = many_rows();
    let case = Case::new(input);
    rows.extend(["id,name,share".to_owned(), "id,name,share".to_owned()]);
    let rows = sorted(rows);
    // On a machine that is busy elsewhere the job may be over before anybody is killed.
    common::wait_for("a job of which somebody is killed", || {
        let paced = Settings { rate: Some(80_000), ..settings(2) };
        let running = start(csv_to_folder, &case.parameters(), paced);
        let view = running.workers().expect("the job starts");
        let mut disturber = Disturber::new(&running, &view, 23);
        disturber.kill_randomly(10);
        let kills = disturber.kills;
        let report = finish(running).expect("the job survives");
        assert!(report.restarts.len() <= kills);
        assert_eq!(sorted_parts(&case.output), rows);
        (kills > 0).then_some(())
    });
}

fn a_folder_of_parts_replaces_the_parts_of_before_and_nothing_else() {
    let case = Case::new("id,name,share\n1,a,\n2,b,\n");
    fs::create_dir(&case.output).expect("room for a folder");
    for name in ["part-000.csv", "part-007.csv", "part-001.json", "notes.txt"] {
        fs::write(case.output.join(name), "of before\n").expect("room for a file");
    }
    run(csv_to_folder, &case.parameters(), settings(2));
    let rows = sorted_parts(&case.output);
    assert_eq!(rows, ["1,a,", "2,b,", "id,name,share", "id,name,share"]);
    assert_eq!(
        fs::read_to_string(case.output.join("notes.txt")).ok().as_deref(),
        Some("of before\n")
    );
    assert!(
        !case.output.join("part-007.csv").exists() && !case.output.join("part-001.json").exists()
    );
}

fn an_existing_output_is_overwritten() {
    let case = Case::new("id,name,share\n1,a,\n");
    fs::write(&case.output, "much longer than what comes\n".repeat(1000)).expect("room for a file");
    run(csv_to_file, &case.parameters(), settings(1));
    assert_eq!(fs::read_to_string(&case.output).expect("the output is there"), "1,a,\n");
}

fn every_part_begins_with_the_header() {
    let (input, _) = many_rows();
    let case = Case::new(input);
    run(csv_to_folder, &case.parameters(), settings(3));
    for part in 0..3 {
        let path = case.output.join(format!("part-{part:03}.csv"));
        let text = fs::read_to_string(path).expect("a part");
        assert!(text.starts_with("id,name,share\n"));
        assert_eq!(text.matches("id,name,share").count(), 1);
    }
}

/// Starts a job that writes slowly and for ever, and waits until it has written in several steps.
fn writing(output: &Path, workers: usize) -> common::program::Started {
    let job = Cli::new("endless", &text(output)).workers(workers).args(["--rate", "5000"]).start();
    common::wait_for("the first steps' bytes", || {
        fs::metadata(output).is_ok_and(|meta| meta.len() > 20_000).then_some(())
    });
    job
}

fn a_second_job_on_an_output_is_refused_and_told_by_whom() {
    let case = Case::new("id,name,share\n1,a,\n");
    let first = writing(&case.output, 2);
    let second = Cli::new("csv_to_file", &case.parameters()).workers(1).run();
    assert_eq!(second.code, Some(3));
    assert_eq!(
        second.err,
        format!(
            "job: output {} is being written by process {}; wait for it, stop it, or choose \
             another output\n",
            text(&case.output),
            first.pid()
        )
    );
    first.signal(libc::SIGTERM);
    let ended = first.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let text = fs::read_to_string(&case.output).expect("the output is there");
    let lines = text.lines().enumerate();
    lines.for_each(|(n, line)| assert_eq!(line.len(), n % 30, "line {n} of the first job"));
}

fn two_outputs(flow: &Flow, parameters: &str) {
    let (first, second) = parameters.split_once(' ').expect("two outputs");
    let (left, right) = flow.source("numbers", Generator::new(10, |n| n)).fork();
    left.sink("left", FileSink::new(first, Lines(|n: &u64| *n)));
    right.sink("right", FileSink::new(second, Lines(|n: &u64| *n)));
}

fn a_refused_job_has_touched_none_of_its_outputs() {
    let case = Case::new("precious\n");
    let first = writing(&case.output, 2);
    let second = Cli::new("two_outputs", &case.parameters()).workers(1).run();
    assert_eq!(second.code, Some(3), "{}", second.err);
    assert_eq!(fs::read_to_string(&case.input).ok().as_deref(), Some("precious\n"));
    first.signal(libc::SIGTERM);
    assert_eq!(first.wait().code, Some(0));
}

fn one_output_for_two_sinks_is_refused() {
    let case = Case::new("");
    let twice = format!("{} {}", text(&case.output), text(&case.output));
    let ended = Cli::new("two_outputs", &twice).workers(1).run();
    assert_eq!(ended.code, Some(3));
    assert_eq!(
        ended.err,
        format!(
            "job: sinks left and right both write to {}; give each an output of its own\n",
            text(&case.output)
        )
    );
}

fn one_output_by_two_names_is_refused_at_once() {
    let case = Case::new("");
    let folder = case.output.parent().expect("an output has a folder");
    let (symbolic, hard) = (folder.join("symbolic"), folder.join("hard"));
    fs::write(&case.output, "precious").expect("room for an output");
    std::os::unix::fs::symlink(&case.output, &symbolic).expect("room for a link");
    fs::hard_link(&case.output, &hard).expect("room for a link");
    let name = case.output.file_name().expect("an output has a name");
    for other in [folder.join(".").join(name), symbolic, hard] {
        let both = format!("{} {}", text(&case.output), text(&other));
        let (message, code) = run_failing(two_outputs, &both, settings(2));
        assert_eq!(code, 3);
        assert_eq!(
            message,
            format!(
                "sinks left and right both write to {}, which is also {}; \
                 give each an output of its own",
                text(&case.output),
                text(&other)
            )
        );
    }
    assert_eq!(fs::read_to_string(&case.output).expect("the output is there"), "precious");
}

fn an_output_that_is_an_input_is_refused_and_left_as_it_is() {
    let rows = "id,name,share\n1,a,\n";
    let case = Case::new(rows);
    std::os::unix::fs::symlink(&case.input, &case.output).expect("room for a link");
    let (message, code) = run_failing(csv_to_file, &case.parameters(), settings(1));
    assert_eq!(code, 3);
    assert!(message.contains("it would be emptied before it is read"), "{message}");
    assert_eq!(fs::read_to_string(&case.input).expect("the input is there"), rows);
}

fn every_worker_holds_the_outputs_as_long_as_it_lives() {
    let case = Case::new("");
    let job = writing(&case.output, 2);
    for worker in job.workers(3) {
        // Also those that write nothing: a killed launcher's workers may outlive it for a moment.
        let open = fs::read_dir(format!("/proc/{worker}/fd")).expect("a living worker").flatten();
        let mut targets = open.filter_map(|entry| fs::read_link(entry.path()).ok());
        assert!(targets.any(|target| target == case.output), "worker {worker} lets go of it");
    }
    job.signal(libc::SIGTERM);
    assert_eq!(job.wait().code, Some(0));
}

fn an_output_of_a_killed_job_can_be_written_again() {
    let case = Case::new("id,name,share\n1,a,\n");
    for _ in 0..3 {
        let first = writing(&case.output, 2);
        first.signal(libc::SIGKILL);
        let second = run(csv_to_file, &case.parameters(), settings(2));
        assert_eq!(second.records_out, 1);
        assert_eq!(fs::read_to_string(&case.output).expect("the output is there"), "1,a,\n");
        assert_eq!(first.wait().signal, Some(libc::SIGKILL));
    }
}

fn shorten(path: &Path) {
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(3))
        .expect("the output is there");
}

/// The end of a job whose output was cut to three bytes.
fn assert_was_cut(ended: &Ended, output: &Path) {
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    let head = format!("): output {} has ", text(output));
    let tail = " were written: it was changed from outside; run the job again\n";
    let (Some(at), Some(end)) = (ended.err.find(&head), ended.err.find(tail)) else {
        panic!("{}", ended.err);
    };
    assert!(ended.err.starts_with("job: operator out (worker "), "{}", ended.err);
    assert!(ended.err[at + head.len()..end].starts_with("3 bytes where "), "{}", ended.err);
    assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
}

fn r13_an_output_cut_short_from_outside_is_an_error() {
    let case = Case::new("");
    let job = writing(&case.output, 2);
    // A step may have looked at the file just before: it is cut until somebody notices.
    let (over, is_over) = std::sync::mpsc::channel::<()>();
    let ended = std::thread::scope(|scope| {
        let output = &case.output;
        scope.spawn(move || {
            let mut waits = Err(RecvTimeoutError::Timeout);
            while waits == Err(RecvTimeoutError::Timeout) {
                shorten(output);
                waits = is_over.recv_timeout(Duration::from_millis(20));
            }
        });
        let ended = job.wait();
        drop(over);
        ended
    });
    assert_was_cut(&ended, &case.output);
}

fn r13_an_output_cut_short_before_a_recovery_is_an_error() {
    let case = Case::new("");
    let job = writing(&case.output, 1);
    let workers = job.workers(2);
    let first =
        |pid: &&u32| common::process::stat(**pid).is_some_and(|stat| stat.name == "testudo-w0");
    let worker = *workers.iter().find(first).expect("the sink's worker");
    let worker = common::process::Held::child_of(worker, job.pid()).expect("its worker");
    // Stopped, it cannot see the cut itself; its successor must.
    assert!(worker.signal(libc::SIGSTOP));
    common::wait_for("it to stand still", || {
        common::process::stat(worker.pid).is_some_and(|stat| stat.state == 'T').then_some(())
    });
    shorten(&case.output);
    assert!(worker.signal(libc::SIGKILL));
    assert_was_cut(&job.wait(), &case.output);
}

fn an_output_that_cannot_take_more_is_an_error() {
    let (message, code) = run_failing(endless, "/dev/full", settings(1));
    assert_eq!(
        message,
        "operator out (worker 0): cannot write to /dev/full: No space left on device (os error 28)"
    );
    assert_eq!(code, 1);
}

fn an_output_at_the_limit_of_file_sizes_is_an_error() {
    let case = Case::new("");
    let job = writing(&case.output, 2);
    let workers = job.workers(3);
    let written = fs::metadata(&case.output).expect("the output is there").len();
    for worker in workers {
        // Segments are larger, so the limit can only come once they are there.
        common::process::limit_file_size(worker, written + 20_000);
    }
    let ended = job.wait();
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert_eq!(
        ended.err,
        format!(
            "job: operator out (worker 0): cannot write to {}: File too large (os error 27)\n",
            text(&case.output)
        )
    );
}

fn a_limit_of_file_sizes_below_a_segment_is_refused() {
    let case = Case::new("id,name,share\n1,a,\n");
    let job = Cli::new("csv_to_file", &case.parameters()).workers(2);
    let ended = job.under("ulimit -f 100 && exec \"$@\"").run();
    assert_eq!((ended.code, ended.signal), (Some(4), None), "{}", ended.err);
    assert!(ended.err.contains("File too large"), "{}", ended.err);
    assert!(ended.err.contains("ulimit -f"), "{}", ended.err);
    assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
}

fn an_output_without_a_size_is_written_as_it_is() {
    let case = Case::new(many_rows().0);
    let report = run(csv_to_file, &format!("{} /dev/null", text(&case.input)), settings(2));
    assert_eq!(report.records_out, 40_000);
}

fn an_input_that_shrinks_costs_what_is_gone_and_that_is_counted() {
    let (input, _) = many_rows();
    let bytes = input.len();
    let case = Case::new(input);
    let slow = Settings { rate: Some(2_000), ..settings(1) };
    let running = start(csv_to_file, &case.parameters(), slow);
    let _view = running.workers().expect("the job starts");
    common::wait_for("the first rows", || {
        fs::metadata(&case.output).is_ok_and(|meta| meta.len() > 0).then_some(())
    });
    File::options()
        .write(true)
        .open(&case.input)
        .and_then(|file| file.set_len(1000))
        .expect("a file");
    let report = finish(running).expect("the job goes on");
    assert_eq!(report.rejected, 1, "one refused input says what is gone");
    let rows = fs::read_to_string(&case.output).expect("the output").lines().count() as u64;
    assert_eq!(rows, report.records_in);
    assert!(rows < 40_000, "{rows} rows of a file of {bytes} bytes that was cut short");
}

fn a_missing_input_is_found_before_any_output_is_touched() {
    let case = Case::new("");
    fs::remove_file(&case.input).expect("it was there");
    fs::write(&case.output, "precious\n").expect("room for a file");
    let (message, code) = run_failing(csv_to_file, &case.parameters(), settings(2));
    assert_eq!(
        message,
        format!(
            "source rows: cannot open input file {}: No such file or directory (os error 2)",
            text(&case.input)
        )
    );
    assert_eq!(code, 3);
    assert_eq!(fs::read_to_string(&case.output).ok().as_deref(), Some("precious\n"));
}

fn a_header_without_a_needed_column_is_refused_before_any_output_is_touched() {
    let case = Case::new("id,share\n1,2\n");
    fs::write(&case.output, "precious\n").expect("room for a file");
    let (message, code) = run_failing(csv_to_file, &case.parameters(), settings(2));
    assert_eq!(
        message,
        format!(
            "source rows: input file {}: missing field `name`; the columns are id, share",
            text(&case.input)
        )
    );
    assert_eq!(code, 3);
    assert_eq!(fs::read_to_string(&case.output).ok().as_deref(), Some("precious\n"));

    let blank = "the first line, which names the columns, is blank";
    for (content, why) in [
        (&b"id,share\n"[..], "missing field `name`; the columns are id, share"),
        (b"\nid,name,share\n1,a,2\n", &format!("missing field `id`; {blank}")),
        (b" \t \r\nid,name,share\n1,a,2\n", &format!("missing field `id`; {blank}")),
        (b"\"\"\n1,a,2\n", &format!("missing field `id`; {blank}")),
        (b"\0\x01,\0\n1,2\n", "missing field `id`; the columns are \\0\\u{1}, \\0"),
    ] {
        fs::write(&case.input, content).expect("room for a file");
        let (message, _) = run_failing(csv_to_file, &case.parameters(), settings(2));
        let input = text(&case.input);
        assert_eq!(message, format!("source rows: input file {input}: {why}"), "{content:?}");
        assert_eq!(fs::read_to_string(&case.output).ok().as_deref(), Some("precious\n"));
    }

    fs::write(&case.input, "id,name,id\n").expect("room for a file");
    let (message, _) = run_failing(csv_to_file, &case.parameters(), settings(2));
    assert_eq!(
        message,
        format!(
            "source rows: input file {}: the CSV header names column \"id\" twice",
            text(&case.input)
        )
    );
    assert_eq!(fs::read_to_string(&case.output).ok().as_deref(), Some("precious\n"));
}

fn inputs_with_different_headers_are_refused() {
    let case = Case::new("id,name,share\n1,a,\n");
    let second = case.folder.path().join("second");
    fs::write(&second, "id,share,name\n1,,a\n").expect("room for an input file");
    let parameters = format!("{} {} {}", text(&case.input), text(&second), text(&case.output));
    let (message, _) = run_failing(csv_to_file, &parameters, settings(1));
    assert!(
        message.ends_with("all files of a source need the same header")
            && message.contains(&text(&second))
            && message.contains("\"id,share,name\""),
        "{message}"
    );
}
