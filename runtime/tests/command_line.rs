//! The command line: every refusal as it is printed, with its exit code; settings from flags, file
//! and defaults; what `--explain`, `--report` and the standard streams show.

mod common;

use common::process::ticks;
use common::program::Cli;
use common::tally::{self, ordered};
use common::{Jobs, folder, text, trials};
use std::fs;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Instant;
use testudo::prelude::*;
use testudo::serde_json::Value;
use testudo::shm::record::Record;
use testudo::sink::file::Lines;
use testudo::testing::{KILL_AT, Point};

const JOBS: Jobs = &[
    ("ordered", ordered),
    ("numbers", numbers),
    ("folder", to_folder),
    ("echo", echo),
    ("words", words),
    ("everything", everything),
    ("endless", endless),
];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            every_bad_number_of_bytes_is_refused_with_what_it_should_be,
            every_bad_value_is_refused_with_what_it_should_be,
            every_bad_configuration_file_is_refused_with_its_place,
            outputs_that_cannot_be_written_are_refused,
            a_job_that_is_refused_leaves_its_outputs_as_they_were,
            a_checkpoint_folder_that_cannot_be_made_is_refused,
            a_configuration_file_stands_between_flags_and_defaults,
            switches_can_be_turned_off_where_the_file_turned_them_on,
            a_switch_takes_no_value_from_the_next_word,
            a_long_name_is_a_name,
            the_plan_is_explained_to_the_byte,
            r24_every_limit_has_a_number_in_the_explanation,
            the_report_is_one_line_of_json,
            the_report_is_for_people_otherwise,
            few_descriptors_mean_fewer_key_groups_and_a_message,
            too_few_descriptors_are_refused,
            too_few_addresses_are_refused_with_the_limit,
            a_printed_stream_reaches_standard_output_whole,
            every_line_of_standard_input_is_taken_once,
            r13_lines_in_and_out_are_exact_across_kills,
            a_line_longer_than_the_ring_is_an_error,
            r8_each_line_is_answered_before_the_next_is_sent,
            r8_a_job_with_nothing_to_do_sleeps,
            a_limit_counts_lines_of_standard_input,
            printing_into_a_closed_pipe_ends_a_job_that_only_prints,
            a_reader_that_stalls_does_not_keep_a_job_that_was_stopped,
            help_says_every_setting,
        ],
    )
}

fn numbers(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(5000, |n| n)).print(|n| *n);
}

fn to_folder(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(5000, |n| n))
        .sink("out", FileSink::folder(output, "txt", Lines(|n: &u64| *n)));
}

type Text = <String as Record>::View;

fn echo(flow: &Flow, _: &str) {
    flow.stdin().round_robin().print(|line: &Text| format!("<{line}>"));
}

fn words(flow: &Flow, output: &str) {
    flow.stdin()
        .flat_map(|line: &Text| line.split(' ').map(str::to_owned).collect::<Vec<_>>())
        .key_by(|word| word.to_string())
        .aggregate(|| 0u64, |count, _| *count += 1, |word, count| format!("{word} {count}"))
        .sink("out", FileSink::new(output, Lines(|line: &Text| line.to_string())));
}

/// Runs the smallest job with some arguments that must be refused.
fn refused(args: &[&str], code: i32, message: &str) {
    let ended = Cli::new("numbers", "").args(args.iter().copied()).run();
    assert_eq!((ended.err.as_str(), ended.code), (message, Some(code)), "{args:?}");
    assert_eq!(ended.out, "", "{args:?}");
}

/// Refused by what the job's settings can be.
fn ours(args: &[&str], message: &str) {
    refused(args, 2, &format!("job: {message}\n"));
}

/// Refused while the arguments are read.
fn parsed(args: &[&str], message: &str) {
    refused(args, 2, &format!("error: {message}\n\nFor more information, try '--help'.\n"));
}

fn every_bad_number_of_bytes_is_refused_with_what_it_should_be() {
    ours(
        &["--ring-bytes", "5000"],
        "--ring-bytes 5000: a ring is a power of two from 4KiB to 1GiB, such as 8192",
    );
    ours(
        &["--ring-bytes", "2KiB"],
        "--ring-bytes 2048: a ring is a power of two from 4KiB to 1GiB, such as 4096",
    );
    ours(
        &["--ring-bytes", "8GiB"],
        "--ring-bytes 8589934592: a ring is a power of two from 4KiB to 1GiB, such as 1073741824",
    );
    parsed(
        &["--ring-bytes", "12XB"],
        "invalid value '12XB' for '--ring-bytes <BYTES>': unknown unit \"XB\"; write bytes, KiB, \
         MiB or GiB",
    );
    parsed(
        &["--ring-bytes", "MiB"],
        "invalid value 'MiB' for '--ring-bytes <BYTES>': \"MiB\" is not a number of bytes, such \
         as 4MiB",
    );
    parsed(
        &["--ring-bytes", "17179869184GiB"],
        "invalid value '17179869184GiB' for '--ring-bytes <BYTES>': 17179869184GiB is more than \
         this machine can \
         address",
    );
}

fn every_bad_value_is_refused_with_what_it_should_be() {
    let most = testudo::config::usable_cores();
    parsed(
        &["--workers", "x"],
        "invalid value 'x' for '--workers <N>': write a whole number, such as 2",
    );
    parsed(
        &["--workers", "-1"],
        "invalid value '-1' for '--workers <N>': write a whole number, such as 2",
    );
    ours(&["--workers", "0"], "--workers 0: a job has 1 to 120 workers");
    ours(&["--workers", "121"], "--workers 121: a job has 1 to 120 workers");
    for bad in ["1-", "", "1-0", "a", "0,,1", "5000", "-1", "0,-1"] {
        ours(&["--cores", bad], &format!("--cores {bad:?}: write core numbers, such as 0,2-5"));
    }
    ours(
        &["--cores", "4095"],
        &format!("--cores: core 4095 is not among those this process may use {most:?}"),
    );
    ours(&["--cores", "0,0"], "--cores \"0,0\": core 0 is named twice");
    ours(&["--cores", "0-2,1"], "--cores \"0-2,1\": core 1 is named twice");
    let groups = "a keyed operator has 1 to 32768 key groups";
    ours(&["--key-groups", "0"], &format!("--key-groups 0: {groups}"));
    ours(&["--key-groups", "32769"], &format!("--key-groups 32769: {groups}"));
    ours(
        &["--rate", "0"],
        "--rate 0: a job that reads nothing never ends; leave it out for full speed",
    );
    let name = "a name has one letter at least, and no slashes or line ends";
    ours(&["--name", "a/b"], &format!("--name \"a/b\": {name}"));
    ours(&["--name", ""], &format!("--name \"\": {name}"));
    parsed(
        &["--checkpoint-at", "5s"],
        "invalid value '5s' for '--checkpoint-at <PATTERN>': \"5s\" has 1 fields; a clock pattern \
         has five: minute, hour, day, month, day of the week, such as \"0 * * * *\" for each full \
         hour",
    );
    parsed(
        &["--limit", "1.5"],
        "invalid value '1.5' for '--limit <N>': write a whole number, such as 2",
    );
    parsed(
        &["--idle", "never"],
        "invalid value 'never' for '--idle <IDLE>'\n  [possible values: spin, adaptive]",
    );
    parsed(
        &["--report", "xml"],
        "invalid value 'xml' for '--report <REPORT>'\n  [possible values: json, text]",
    );
    parsed(&["--rejects"], "a value is required for '--rejects <FILE>' but none was supplied");
}

fn every_bad_configuration_file_is_refused_with_its_place() {
    let folder = folder();
    let path = folder.path().join("job.toml");
    let file = text(&path);
    let with = |content: &str, message: &str| {
        fs::write(&path, content).expect("room for a file");
        refused(&["--config", &file], 2, &format!("job: {message}\n"));
    };
    with(
        "workers = 2\nwrkers = 3\n",
        &format!(
            "--config {file}: TOML parse error at line 2, column 1\n  |\n2 | wrkers = 3\n  | \
             ^^^^^^\nunknown field \
             `wrkers`, expected one of `name`, `workers`, `cores`, `idle`, `ring-bytes`, \
             `key-groups`, `huge-pages`, \
             `limit`, `rate`, `print-to`, `rejects`, `max-rejects`, `no-split`, `completeness`, \
             `max-latency`, `max-recovery`, `max-restarts`, `restart-budget`, \
             `hang-timeout`, `dead-letters`, `tier`, `standbys`, \
             `trust-records`, `checkpoint-dir`, `checkpoint-dir-2`, `checkpoint-interval`, \
             `checkpoint-at`, \
             `checkpoint-bandwidth`, `checkpoint-memory`, `checkpoint-deadline`, `disk`, \
             `part-bytes`, `resume`, `resume-from`, `load-bandwidth`, `allow-dropped-state`, \
             `listen`, `listen-openly`, `report`, `explain`, `no-progress`"
        ),
    );
    with(
        "workers = \"two\"\n",
        &format!(
            "--config {file}: TOML parse error at line 1, column 11\n{}",
            "  |\n1 | workers = \"two\"\n  |           ^^^^^\n\
             invalid type: string \"two\", expected usize"
        ),
    );
    with("workers = 0\n", "--workers 0: a job has 1 to 120 workers");
    let missing = text(&folder.path().join("missing.toml"));
    refused(
        &["--config", &missing],
        2,
        &format!("job: cannot read --config {missing}: No such file or directory (os error 2)\n"),
    );
}

fn outputs_that_cannot_be_written_are_refused() {
    let folder = folder();
    let file = folder.path().join("file");
    fs::write(&file, "precious\n").expect("room for a file");
    let (file, missing) = (text(&file), text(&folder.path().join("missing/out")));
    let here = text(folder.path());
    let cases = [
        ("folder", file.clone(), format!("cannot write output {file}: File exists (os error 17)")),
        (
            "ordered",
            missing.clone(),
            format!("cannot write output {missing}: No such file or directory (os error 2)"),
        ),
        (
            "ordered",
            here.clone(),
            format!("cannot write output {here}: Is a directory (os error 21)"),
        ),
    ];
    for (job, output, message) in cases {
        let parameters = if job == "ordered" { format!("10 {output}") } else { output };
        let ended = Cli::new(job, &parameters).workers(1).run();
        assert_eq!((ended.err, ended.code), (format!("job: {message}\n"), Some(3)));
    }
    assert_eq!(fs::read_to_string(&file).ok().as_deref(), Some("precious\n"));
}

fn a_job_that_is_refused_leaves_its_outputs_as_they_were() {
    let folder = folder();
    let output = folder.path().join("rows");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("it has one").to_string();
    let (nowhere, other) = (folder.path().join("no/letters"), folder.path().join("printed"));
    let cases: [(&[&str], &str, i32, &str); 5] = [
        (&["--listen", &address], "", 2, "another program has that port"),
        (&["--dead-letters", &text(&nowhere)], "", 2, "name a file in a folder that is there"),
        (&["--dead-letters", &text(&output)], "", 2, "for something else; choose another file"),
        (&["--print-to", &text(&other)], "", 2, "this job prints nothing; leave it out"),
        (&[], "ulimit -v 2000000 && ", 4, "cannot reserve"),
    ];
    for (args, before, code, message) in cases {
        for kept in [Some("what was there\n"), None] {
            match kept {
                Some(kept) => fs::write(&output, kept).expect("room"),
                None => fs::remove_file(&output).expect("it is there"),
            }
            let job =
                Cli::new("ordered", &tally::parameters(6000, &output)).args(["--workers", "2"]);
            let job = job.args(args.iter().copied());
            let ended = job.under(&format!("{before}exec \"$@\"")).run();
            assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.err);
            assert!(ended.err.contains(message), "{args:?}: {}", ended.err);
            assert_eq!(fs::read_to_string(&output).ok().as_deref(), kept, "{args:?}");
        }
    }
    assert!(!other.exists());
}

fn a_checkpoint_folder_that_cannot_be_made_is_refused() {
    let folder = folder();
    let file = folder.path().join("file");
    fs::write(&file, "precious\n").expect("room for a file");
    let inside = text(&file.join("checkpoints"));
    let message = format!(
        "job: checkpoint folder {inside} cannot be made or used: Not a directory (os error 20); \
         give one on a disk that this user may write to\n"
    );
    refused(&["--checkpoint-dir", &inside], 6, &message);
    assert_eq!(fs::read_to_string(&file).ok().as_deref(), Some("precious\n"));
}

/// What a job says of its settings when it explains itself.
fn explained(args: &[&str]) -> String {
    let ended =
        Cli::new("ordered", "10 /dev/null").args(args.iter().copied()).args(["--explain"]).run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    ended.out
}

fn a_configuration_file_stands_between_flags_and_defaults() {
    let folder = folder();
    let path = folder.path().join("job.toml");
    fs::write(&path, "name = \"from-file\"\nworkers = 3\nring-bytes = \"8KiB\"\nkey-groups = 7\n")
        .expect("room for a file");
    let file = text(&path);
    let plan = explained(&["--config", &file, "--workers", "2", "--key-groups", "9"]);
    assert!(plan.starts_with("job from-file (plan "), "{plan}");
    for line in [
        "  workers                    2 of 120",
        "  bytes of a ring            8192",
        "  restart budget             8 deaths in a row without a commit",
    ] {
        assert!(plan.contains(line), "{plan}");
    }
    assert!(plan.contains("state in 9 key groups"), "{plan}");
    let plan = explained(&["--config", &file]);
    assert!(plan.contains("  workers                    3 of 120"), "{plan}");
    assert!(plan.contains("state in 7 key groups"), "{plan}");
}

fn switches_can_be_turned_off_where_the_file_turned_them_on() {
    let folder = folder();
    let path = folder.path().join("job.toml");
    fs::write(&path, "explain = true\nworkers = 1\n").expect("room for a file");
    let on = Cli::new("numbers", "").args(["--config", &text(&path)]).run();
    assert!(on.out.starts_with("job job (plan "), "{}", on.out);
    let off = Cli::new("numbers", "").args(["--config", &text(&path), "--explain=false"]).run();
    assert_eq!(off.out.lines().count(), 5000);
}

fn a_switch_takes_no_value_from_the_next_word() {
    let message = "error: unexpected argument 'file.csv' found\n\nUsage: job [OPTIONS]\n\nFor \
    more information, try \
                   '--help'.\n";
    refused(&["--explain", "file.csv"], 2, message);
}

fn a_long_name_is_a_name() {
    let name = "ü".repeat(300);
    let ended = Cli::new("numbers", "").workers(2).args(["--name", &name]).run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.starts_with(&format!("{name}: 5000 records in")), "{}", ended.err);
}

/// A flow with an operator and an edge of every kind.
fn everything(flow: &Flow, output: &str) {
    let (lines, others) = flow
        .stdin()
        .name("lines")
        .try_map(|line: &Text| line.parse::<u64>().map_err(|error| error.to_string()));
    others.print(|line: &Text| line.to_string());
    let numbers = flow.source("numbers", Generator::new(10, |n| n)).uid("the-numbers");
    let (left, right) =
        lines.union(numbers).event_time(Duration::ZERO, |n| *n as i64).broadcast().fork();
    left.key_by(|n| *n)
        .window(tumbling(Duration::from_secs(1)), |n| *n as i64)
        .aggregate(
            || 0u64,
            |count, _| *count += 1,
            |into, other| *into += other,
            |_, _, count| *count,
        )
        .sink("windows", FileSink::folder(output, "txt", Lines(|n: &u64| *n)));
    right
        .round_robin()
        .name("spread")
        .isolated()
        .parallelism(1)
        .window_all(tumbling(Duration::from_secs(1)), |n| *n as i64)
        .aggregate(|| 0u64, |count, _| *count += 1, |into, other| *into += other, |_, count| *count)
        .for_each(|_| ());
}

/// The explanation of `everything`, without the hash of its plan.
fn explanation() -> String {
    let core = testudo::config::usable_cores()[0].to_string();
    let args = ["--workers", "2", "--cores", &core, "--key-groups", "8", "--ring-bytes", "1MiB"];
    let ended = Cli::new("everything", "/tmp").args(args).args(["--explain"]).run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let (first, rest) = ended.out.split_once('\n').expect("several lines");
    assert!(
        first.starts_with("job job (plan ") && first.len() == "job job (plan )".len() + 16,
        "{first}"
    );
    rest.replace(&format!(": core {core},"), ": core 0,")
}

fn the_plan_is_explained_to_the_byte() {
    let expected = include_str!("explained.txt");
    let found = explanation();
    if std::env::var_os("TESTUDO_BLESS").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/explained.txt");
        fs::write(path, &found).expect("the snapshot can be written");
    }
    assert_eq!(found, expected, "after a change on purpose: TESTUDO_BLESS=1 writes the new one");
}

fn r24_every_limit_has_a_number_in_the_explanation() {
    let found = explanation();
    let (_, limits) = found.split_once("\nlimits\n").expect("a part on limits");
    let (limits, _) = limits.split_once("\n\n").expect("something behind it");
    let names = [
        "workers",
        "edges, rings",
        "bytes of a ring",
        "words a worker sleeps on",
        "undo log",
        "cells of a worker",
        "spill of a lane",
        "key groups",
        "descriptors",
        "addresses",
        "restart budget",
    ];
    for (line, name) in limits.lines().zip(names) {
        let value = line
            .trim_start()
            .strip_prefix(name)
            .unwrap_or_else(|| panic!("{line:?} is not {name}"));
        assert!(value.contains(|c: char| c.is_ascii_digit()), "{line:?} has no number");
    }
    assert_eq!(limits.lines().count(), names.len(), "{limits}");
}

fn the_report_is_one_line_of_json() {
    let folder = folder();
    let parameters = tally::parameters(6000, &folder.path().join("rows"));
    let ended = Cli::new("ordered", &parameters).workers(2).args(["--report", "json"]).run();
    assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
    let report = ended.report();
    let fields: Vec<&str> =
        report.as_object().expect("an object").keys().map(String::as_str).collect();
    let mut expected = vec![
        "name",
        "workers",
        "records_in",
        "records_out",
        "late",
        "rejected",
        "dropped",
        "unaccounted",
        "edges",
        "slo",
        "drained",
        "elapsed_s",
        "rate_per_s",
        "counters",
        "dead_lettered",
        "restarts",
    ];
    expected.sort_unstable();
    let mut sorted = fields;
    sorted.sort_unstable();
    assert_eq!(sorted, expected);
    assert_eq!(report["name"], "job");
    assert_eq!(report["workers"], 2);
    assert_eq!(report["drained"], false);
    assert_eq!(report["records_in"], 6000);
    assert_eq!(report["records_out"], tally::KEYS);
    assert_eq!(report["counters"]["seen"], 6000);
    assert_eq!(report["restarts"], Value::Array(Vec::new()));
    assert_eq!(report["edges"][0]["sent"], 6000);
    assert_eq!(report["edges"][0]["processed"], 6000);
    assert_eq!(report["slo"]["completeness"], "full");
    assert!(report["elapsed_s"].as_f64().is_some_and(|seconds| seconds > 0.0));
}

fn the_report_is_for_people_otherwise() {
    let folder = folder();
    let parameters = tally::parameters(6000, &folder.path().join("rows"));
    let ended = Cli::new("ordered", &parameters).workers(2).run();
    let lines: Vec<&str> = ended.err.lines().collect();
    assert!(
        lines[0].starts_with("job: 6000 records in, 600 out, 0 late, 0 rejected, 0 dropped; "),
        "{lines:?}"
    );
    assert!(lines[0].ends_with(" records/s, 2 workers"), "{lines:?}");
    assert_eq!(lines[1..], ["  seen: 6000"]);
    assert_eq!(ended.out, "");
}

fn few_descriptors_mean_fewer_key_groups_and_a_message() {
    let folder = folder();
    let output = folder.path().join("rows");
    let job = Cli::new("ordered", &tally::parameters(6000, &output)).args(["--workers", "2"]);
    let ended = job.under("ulimit -n 110 && exec \"$@\"").run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let first = ended.err.lines().next();
    assert_eq!(
        first,
        Some(
            "testudo: 128 key groups need more than the 110 descriptors allowed (ulimit -n); \
             using 32"
        )
    );
    tally::check(&output, 6000, 2);
}

fn too_few_descriptors_are_refused() {
    let folder = folder();
    let output = folder.path().join("rows");
    let job = Cli::new("ordered", &tally::parameters(6000, &output)).args(["--workers", "2"]);
    let ended = job.under("ulimit -n 40 && exec \"$@\"").run();
    assert_eq!(ended.code, Some(4));
    let (_, message) = ended.err.split_once(": ").expect("a message");
    assert_eq!(message, "the job needs 71 descriptors, the limit is 40; raise it with ulimit -n\n");
}

fn too_few_addresses_are_refused_with_the_limit() {
    let folder = folder();
    let output = folder.path().join("rows");
    let job = Cli::new("ordered", &tally::parameters(6000, &output)).args(["--workers", "2"]);
    let ended = job.under("ulimit -v 4000000 && exec \"$@\"").run();
    assert_eq!(ended.code, Some(4), "{}", ended.err);
    for part in ["this process may have 3906 MiB in all (ulimit -v 4000000)", "ulimit -v unlimited"]
    {
        assert!(ended.err.contains(part), "{}", ended.err);
    }
}

fn a_printed_stream_reaches_standard_output_whole() {
    for workers in [1, 3] {
        let ended = Cli::new("numbers", "").workers(workers).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let mut found: Vec<u64> =
            ended.out.lines().map(|line| line.parse().expect("a number")).collect();
        found.sort_unstable();
        assert!(found.into_iter().eq(0..5000));
        assert!(ended.err.starts_with("job: 5000 records in, 5000 out, "), "{}", ended.err);
    }
}

/// A pipe with something in it, and its other end closed behind.
fn piped(content: String) -> Stdio {
    let (read, mut write) = std::io::pipe().expect("a pipe");
    std::thread::spawn(move || {
        use std::io::Write;
        // A job that stopped reading is the test's business.
        let _ = write.write_all(content.as_bytes());
    });
    read.into()
}

fn every_line_of_standard_input_is_taken_once() {
    let folder = folder();
    let output = folder.path().join("counts");
    let lines: Vec<String> = (0..20_000).map(|n| format!("w{} common", n % 100)).collect();
    for workers in [1, 2] {
        let input = piped(lines.join("\n"));
        let ended = Cli::new("words", &text(&output)).workers(workers).stdin(input).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let rows = common::sorted_lines(&output);
        assert_eq!(rows.len(), 40_000);
        assert!(rows.contains(&"common 20000".to_owned()) && rows.contains(&"w99 200".to_owned()));
    }
}

fn r13_lines_in_and_out_are_exact_across_kills() {
    let index =
        |point: Point| Point::ALL.iter().position(|other| *other == point).expect("a point");
    for point in [
        Point::Processed,
        Point::Saved,
        Point::BeforeCommit,
        Point::Committed,
        Point::StepPublished,
    ] {
        let lines: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
        let orders = format!("0:{0}:3:2,1:{0}:2:3", index(point));
        let job = Cli::new("echo", "").workers(2).args(["--report", "json"]).env(KILL_AT, &orders);
        let ended = job.stdin(piped(lines)).run();
        assert_eq!(ended.restarts(), 5, "{}", ended.err);
        let mut found: Vec<&str> = ended.out.lines().collect();
        let mut expected: Vec<String> = (0..20_000).map(|n| format!("<line {n}>")).collect();
        found.sort_unstable();
        expected.sort_unstable();
        assert!(found == expected, "{} lines, killed at {point:?}", found.len());
    }
}

fn a_line_longer_than_the_ring_is_an_error() {
    let input = piped(format!("short\n{}\n", "x".repeat(100_000)));
    let ended = Cli::new("echo", "").workers(1).stdin(input).run();
    assert_eq!(ended.code, Some(1));
    assert_eq!(
        ended.err,
        "job: operator standard input: a line of 100016 bytes does not fit into a ring of 65536; \
         raise \
         --ring-bytes\n"
    );
}

fn r8_each_line_is_answered_before_the_next_is_sent() {
    use std::io::{BufRead, BufReader, Write};
    let (input, mut write) = std::io::pipe().expect("a pipe");
    let mut job = Cli::new("echo", "").workers(3).stdin(input.into()).start_bare();
    let mut answers = BufReader::new(job.stdout.take().expect("its output"));
    // Everyone sleeps between two lines: a line that wakes nobody would never be answered.
    for n in 0..common::deep(5000, 300) {
        writeln!(write, "line {n}").expect("the job reads");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("the job answers");
        assert_eq!(answer, format!("<line {n}>\n"));
    }
    drop(write);
    assert!(job.wait().expect("our own child").success());
}

fn r8_a_job_with_nothing_to_do_sleeps() {
    for refused in [None, Some(libc::ENOSYS)] {
        let (input, write) = std::io::pipe().expect("a pipe");
        let mut job = Cli::new("echo", "").workers(2).stdin(input.into());
        if let Some(error) = refused {
            job = job.without_futex_waitv(error);
        }
        let job = job.start();
        let mut all = job.workers(2);
        all.extend([job.pid(), job.supervisor()]);
        let spent = || all.iter().map(|pid| ticks(*pid).expect("it runs")).sum::<u64>();
        // A start, or a processor that the host takes away from who has it, is charged too: one
        // quiet second is proof, and one that spins has none.
        common::wait_for("a second of sleep", || {
            let (begun, before) = (Instant::now(), spent());
            std::thread::sleep(Duration::from_secs(1));
            let rate = (spent() - before) as f64 / begun.elapsed().as_secs_f64();
            (rate < 40.0).then_some(())
        });
        drop(write);
        assert_eq!(job.wait().code, Some(0));
    }
}

fn a_limit_counts_lines_of_standard_input() {
    for limit in ["0", "1", "700"] {
        let lines: String = (0..1000).map(|n| format!("{n}\n")).collect();
        let ended =
            Cli::new("echo", "").workers(2).args(["--limit", limit]).stdin(piped(lines)).run();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert_eq!(ended.out.lines().count().to_string(), limit);
    }
}

fn printing_into_a_closed_pipe_ends_a_job_that_only_prints() {
    let (read, write) = std::io::pipe().expect("a pipe");
    drop(read);
    let ended = Cli::new("numbers", "").workers(1).run_into(write.into());
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("standard output has no reader any more"), "{}", ended.err);
}

fn endless(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).print(|n| *n);
}

/// Nobody reads what it prints: a write that cannot be interrupted must not hold up its end.
fn a_reader_that_stalls_does_not_keep_a_job_that_was_stopped() {
    use std::os::unix::process::ExitStatusExt;
    let mut job = Cli::new("endless", "").workers(2).start_bare();
    let pid = job.id();
    let output = job.stdout.take().expect("its output");
    // The pipe is full, and the thread that prints is inside a write to it.
    let console = common::wait_for("the console's thread", || {
        let supervisor = common::process::supervisor_of(pid)?;
        let threads = common::process::threads(supervisor);
        let console = threads.into_iter().find(|(_, name)| name == "testudo-console");
        console.map(|(thread, _)| format!("/proc/{supervisor}/task/{thread}/syscall"))
    });
    common::wait_for("a write that waits", || {
        let call = fs::read_to_string(&console).ok()?;
        let number = call.split(' ').next()?.parse::<libc::c_long>().ok()?;
        [libc::SYS_write, libc::SYS_writev, libc::SYS_splice].contains(&number).then_some(())
    });
    let workers = common::process::workers_of(pid);
    for _ in 0..2 {
        let held = common::process::Held::child_of(pid, std::process::id()).expect("it runs");
        assert!(held.signal(libc::SIGINT));
        common::wait_for("the signal to be taken", || {
            common::process::pending_signals(pid).is_none_or(|all| all == 0).then_some(())
        });
    }
    let status = common::wait_for("the end", || job.try_wait().expect("our own child"));
    assert_eq!((status.code(), status.signal()), (Some(130), None));
    assert!(workers.iter().all(|pid| common::process::stat(*pid).is_none()), "workers are left");
    drop(output);
}

fn help_says_every_setting() {
    let ended = Cli::new("numbers", "").args(["--help"]).run();
    assert_eq!(ended.code, Some(0));
    for name in [
        "name",
        "workers",
        "cores",
        "idle",
        "ring-bytes",
        "key-groups",
        "huge-pages",
        "limit",
        "rate",
        "print-to",
        "rejects",
        "max-rejects",
        "no-split",
        "completeness",
        "max-latency",
        "max-recovery",
        "restart-budget",
        "hang-timeout",
        "dead-letters",
        "tier",
        "standbys",
        "trust-records",
        "report",
        "explain",
        "no-progress",
        "config",
    ] {
        assert!(ended.out.contains(&format!("--{name}")), "{name} is missing:\n{}", ended.out);
    }
}
