//! The tool's answers for people: aligned columns and a few lines.
//!
//! Called by `jobs`, `files` and `inspect`.

use super::jobs::{Answer, Listed};
use crate::checkpoint::history::{Record, State};
use crate::control::history::{Event, PostMortem};
use crate::control::protocol::{Change, Checkpoints, Replaced, Reply, Status};
use crate::metrics::figures::ExternalState;
use crate::slo::Promise;
use crate::time::utc;
use std::fmt::Write;

/// The list of jobs.
pub(super) fn list(jobs: &[Listed]) -> String {
    if jobs.is_empty() {
        return "no job is running\n".into();
    }
    let mut rows =
        vec![["NAME", "PID", "WORKERS", "UP", "RECORDS IN", "RESTARTS"].map(String::from)];
    let mut silent = String::new();
    for job in jobs {
        match &job.answer {
            Answer::Status(status) => rows.push([
                job.name.clone(),
                status.pid.to_string(),
                status.workers.to_string(),
                seconds(status.elapsed_s),
                status.records_in.to_string(),
                status.restarts.to_string(),
            ]),
            Answer::Error(message) => {
                let _ = writeln!(silent, "{}: {message}", job.name);
            }
        }
    }
    if rows.len() == 1 { silent } else { table(&rows) + &silent }
}

/// A job's answer.
pub(super) fn reply(reply: &Reply) -> String {
    match reply {
        Reply::Status(status) => self::status(status),
        Reply::Taken { checkpoint, path } => {
            let mut text = history(std::slice::from_ref(checkpoint));
            if let Some(path) = path {
                let _ = writeln!(text, "resume with --resume-from {}", path.display());
            }
            text
        }
        Reply::Schedule { schedule, next_in_ms } => {
            format!("checkpoints: {schedule}{}\n", next(*next_in_ms))
        }
        Reply::History { schedule, checkpoints } if checkpoints.is_empty() => {
            format!("no checkpoint yet; schedule: {schedule}\n")
        }
        Reply::History { schedule, checkpoints } => {
            format!("{}schedule: {schedule}\n", history(checkpoints))
        }
        Reply::Postmortem { deaths, events } => post_mortems(deaths, events),
        Reply::Killed { worker, pid } => format!("worker {worker}: killed process {pid}\n"),
        Reply::Restarted { workers } => replaced(workers),
        Reply::Updated { changes, workers, .. } => self::changes(changes) + &replaced(workers),
        Reply::Paused { still: true } => "paused: nothing moves any more\n".into(),
        Reply::Paused { still: false } => "paused: something is still being processed\n".into(),
        Reply::Resumed { was_paused: true } => "running again\n".into(),
        Reply::Resumed { was_paused: false } => "running: it was not paused\n".into(),
        Reply::Stopping { now: true } => "ending at once\n".into(),
        Reply::Stopping { now: false } => "draining\n".into(),
        Reply::Upgrading { program, .. } => format!("{} leads\n", program.display()),
        Reply::Error { message } => format!("{message}\n"),
    }
}

/// Deaths, each with its stack, and what followed.
fn post_mortems(deaths: &[PostMortem], events: &[Event]) -> String {
    if deaths.is_empty() && events.is_empty() {
        return "no worker has died\n".into();
    }
    let mut text = String::new();
    for death in deaths {
        let (when, cause) = (utc(death.unix_ms), &death.cause);
        let PostMortem { worker, life, pid, commits, since_commit_ms, .. } = death;
        let _ = writeln!(text, "{when}  worker {worker}, life {life}, process {pid}: {cause}");
        let counters: Vec<String> =
            death.counters.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let last =
            format!("{commits}, the last {}", micros((since_commit_ms * 1e3).max(0.0) as u64));
        let lines = [
            ("said", &death.message),
            ("operator", &death.operator),
            ("doing", &death.doing),
            ("record", &death.record),
            ("bytes", &death.bytes),
            ("exit", &death.exit),
            ("commits", &format!("{last} before")),
            ("counters", &counters.join(", ")),
            ("then", &death.rung),
        ];
        for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
            let _ = writeln!(text, "  {name:9} {}", value.replace('\n', "\n            "));
        }
        for (depth, frame) in death.backtrace.iter().enumerate() {
            let _ = writeln!(text, "  {depth:4}: {frame}");
        }
    }
    for Event { unix_ms, kind, worker, cause } in events {
        let _ = writeln!(text, "{}  worker {worker}: {kind}: {cause}", utc(*unix_ms));
    }
    text
}

/// What an update changes besides code, one line each.
fn changes(changes: &[Change]) -> String {
    if changes.is_empty() {
        return "the plan is the same; code may differ\n".into();
    }
    let line = |of: &Change| match of.what.as_str() {
        "added" => format!("operator {}: added, in {}\n", of.operator, of.to),
        "removed" => format!("operator {}: removed from {}\n", of.operator, of.from),
        what => format!("operator {}: {what} {} becomes {}\n", of.operator, of.from, of.to),
    };
    changes.iter().map(line).collect()
}

/// Workers that were replaced, one line each.
fn replaced(workers: &[Replaced]) -> String {
    let line = |of: &Replaced| {
        format!(
            "worker {}: process {}, after a pause of {}\n",
            of.worker,
            of.pid,
            micros(of.pause_us)
        )
    };
    workers.iter().map(line).collect()
}

fn next(next_in_ms: Option<u64>) -> String {
    next_in_ms.map_or(String::new(), |ms| format!(", the next in {}", seconds(ms as f64 / 1e3)))
}

/// How the replicas of workers are.
fn replicas(text: &mut String, status: &Status) {
    for replica in status.figures.iter().flat_map(|figures| &figures.replicas) {
        let how = if replica.follows { "follows" } else { "does not follow" };
        let _ = writeln!(
            text,
            "  the replica of worker {} {how}: {} steps, {} comparisons, {} differences, left \
             behind {} times",
            replica.worker, replica.steps, replica.checks, replica.mismatches, replica.left_behind
        );
    }
}

fn status(status: &Status) -> String {
    let state = match (status.is_draining, status.is_paused) {
        (true, _) => "draining",
        (_, true) => "paused, up",
        _ => "running",
    };
    let mut text = format!(
        "{}: {state} for {}, process {}, {} workers, {} restarts\n  {} records in, {} out, {} late, \
         {} rejected, {} dropped\n",
        status.name,
        seconds(status.elapsed_s),
        status.pid,
        status.workers,
        status.restarts,
        status.records_in,
        status.records_out,
        status.late,
        status.rejected,
        status.dropped,
    );
    if status.dead_lettered > 0 {
        let _ = writeln!(text, "  {} records were put aside", status.dead_lettered);
    }
    if status.standbys > 0 {
        let _ = writeln!(text, "  {} of {} standbys ready", status.standbys_ready, status.standbys);
    }
    replicas(&mut text, status);
    if let Some(update) = &status.update {
        let why = update.why.as_ref().map_or(String::new(), |why| format!(": {why}"));
        let _ = writeln!(text, "  update to {}: {}{why}", update.program.display(), update.state);
    }
    for edge in status.edges.iter().filter(|edge| edge.dropped + edge.dead_lettered > 0) {
        let _ = writeln!(
            text,
            "  {} -> {}: {} sent, {} processed, {} dropped, {} dead-lettered, {} in rings",
            edge.from,
            edge.to,
            edge.sent,
            edge.processed,
            edge.dropped,
            edge.dead_lettered,
            edge.in_rings
        );
    }
    text += &status.slo.as_ref().map_or_else(String::new, Promise::text);
    if let Some(ms) = status.watermark_ms {
        let _ = writeln!(text, "  watermark {}", utc(ms));
    }
    if let Some(metrics) = &status.metrics {
        let _ = writeln!(text, "  metrics at {metrics}");
    }
    let external = status.figures.iter().flat_map(|figures| &figures.external);
    for external in external.filter(|external| external.state != ExternalState::Ok) {
        let since = utc(external.since_ms.cast_signed());
        let state = match external.state {
            ExternalState::Waiting => "waited for",
            _ => "failing",
        };
        let _ = writeln!(
            text,
            "  {}: {state} since {since}, {} tries: {}",
            external.name, external.retries, external.last_error
        );
    }
    match &status.checkpoints {
        Some(checkpoints) => text + &self::checkpoints(checkpoints),
        None => text + "  no checkpoints: the job has no --checkpoint-dir\n",
    }
}

fn checkpoints(checkpoints: &Checkpoints) -> String {
    let mut text = format!(
        "  checkpoints in {}: {}{}; {} complete, {} failed, {} regions\n",
        checkpoints.folder.display(),
        checkpoints.schedule,
        next(checkpoints.next_in_ms),
        checkpoints.completed,
        checkpoints.failed,
        checkpoints.regions,
    );
    if let Some(record) = &checkpoints.newest {
        let state = match &record.state {
            State::Open => "open".into(),
            State::Complete => format!("complete after {}", micros(record.duration_us)),
            State::Failed(why) => format!("failed: {why}"),
        };
        let begun = utc(record.begun_unix_ms);
        let _ = writeln!(text, "  newest: {} {}, begun {begun}, {state}", record.kind, record.id);
    }
    text
}

/// Checkpoints, one line each.
fn history(records: &[Record]) -> String {
    let head =
        ["ID", "KIND", "BEGUN", "TOOK", "REGIONS", "BYTES", "OF", "IN FLIGHT", "PAUSE", "STATE"];
    let mut rows = vec![head.map(String::from)];
    rows.extend(records.iter().map(|record| {
        let (took, state) = match &record.state {
            State::Open => ("-".into(), "open".into()),
            State::Complete => (micros(record.duration_us), "complete".into()),
            State::Failed(why) => (micros(record.duration_us), format!("failed: {why}")),
        };
        let regions = match record.regions_failed {
            0 => record.regions_ok.to_string(),
            failed => format!("{}, {failed} failed", record.regions_ok),
        };
        [
            record.id.to_string(),
            record.kind.to_string(),
            utc(record.begun_unix_ms),
            took,
            regions,
            bytes(record.measure.bytes_incremental),
            bytes(record.measure.bytes_full),
            bytes(record.measure.in_flight_bytes),
            micros(record.measure.pause_ns / 1000),
            state,
        ]
    }));
    table(&rows)
}

/// Rows with aligned columns; the last column is as wide as it likes.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn seconds(seconds: f64) -> String {
    let whole = seconds as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
    }
}

fn micros(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => seconds(us as f64 / 1e6),
    }
}

pub(super) fn bytes(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::history::{Kind, Measure};

    #[test]
    fn a_history_is_a_table() {
        let record = Record {
            id: 12,
            kind: Kind::Regional,
            begun_unix_ms: 0,
            regions_ok: 3,
            regions_failed: 1,
            duration_us: 12_300,
            measure: Measure {
                bytes_full: 5 << 30,
                bytes_incremental: 1536,
                in_flight_bytes: 7,
                pause_ns: 20_000,
            },
            state: State::Failed("region 2: late".into()),
        };
        let text = history(&[record]);
        let expected = "\
ID  KIND      BEGUN                 TOOK     REGIONS      BYTES    OF       IN FLIGHT  PAUSE  STATE
12  regional  1970-01-01T00:00:00Z  12.3 ms  3, 1 failed  1.5 KiB  5.0 GiB  7 B        20 µs  \
        failed: region 2: late
";
        assert_eq!(text, expected);
    }

    #[test]
    fn an_empty_list_says_so() {
        assert_eq!(list(&[]), "no job is running\n");
        let answer = Answer::Error("the job does not answer".into());
        let job = Listed { name: "a".into(), socket: "/a".into(), answer };
        assert_eq!(list(&[job]), "a: the job does not answer\n");
    }

    #[test]
    fn times_and_sizes_are_short() {
        assert_eq!(seconds(0.24), "0.2 s");
        assert_eq!(seconds(61.0), "1m01s");
        assert_eq!(seconds(7300.0), "2h01m");
        assert_eq!(
            (micros(999), micros(1500), bytes(1023)),
            ("999 µs".into(), "1.5 ms".into(), "1023 B".into())
        );
    }
}
