//! Crashes: kills its own workers while they work, and proves that the result is exact.
//!
//!     cargo run --release --example crash
//!
//! The job sums numbers by key and window. Meanwhile this program sends SIGKILL to one worker after
//! another: no handler runs, nothing is cleaned up. Each successor attaches to what the dead one
//! left in shared memory, takes the half-done step back and goes on. In the end the sums are
//! compared with those of a plain loop.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use testudo::prelude::*;
use testudo::shm::primitive::Ordering;
use testudo::sink::file::Csv;
use testudo::supervisor::launch::Running;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EVENTS: u64 = 6_000_000;
const RATE: u64 = 1_500_000;
const KEYS: u64 = 1000;
/// Milliseconds of event time; an event comes every one of them.
const WINDOW: u64 = 500_000;
const PAUSE: Duration = Duration::from_millis(100);

#[testudo::record]
struct Event {
    at: u64,
    key: u64,
    value: u64,
}

#[testudo::record]
struct Sum {
    start: i64,
    key: u64,
    sum: u64,
}

fn event(n: u64) -> Event {
    let mixed = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
    Event { at: n, key: mixed % KEYS, value: mixed % 1_000_003 }
}

/// The job. `output` is the parameter that every process gets.
fn build(flow: &Flow, output: &str) {
    flow.source("events", Generator::new(EVENTS, event))
        .event_time(Duration::from_secs(60), |event| event.at as i64)
        .key_by(|event| event.key)
        .window(tumbling(Duration::from_millis(WINDOW)), |event| event.at as i64)
        .aggregate(
            || 0u64,
            |sum, event| *sum += event.value,
            |sum, other| *sum += other,
            |key, window, sum| Sum { start: window.start, key: *key, sum: *sum },
        )
        .sink("sums", FileSink::new(output, Csv(|row: &Sum| (row.start, row.key, row.sum))));
}

/// What must come out, from a plain loop.
fn expected() -> BTreeMap<(i64, u64), u64> {
    let mut sums = BTreeMap::new();
    for event in (0..EVENTS).map(event) {
        *sums.entry(((event.at / WINDOW * WINDOW) as i64, event.key)).or_default() += event.value;
    }
    sums
}

/// What came out. A row that is there twice, or half, is an error.
fn found(output: &Path) -> Result<BTreeMap<(i64, u64), u64>, String> {
    let text = std::fs::read_to_string(output).map_err(|error| error.to_string())?;
    let mut sums = BTreeMap::new();
    for line in text.lines() {
        let mut cells = line.split(',');
        let mut next = || cells.next().ok_or_else(|| format!("the row {line:?} is cut off"));
        let bad = |_| format!("the row {line:?} is damaged");
        let key = (next()?.parse().map_err(bad)?, next()?.parse().map_err(bad)?);
        if sums.insert(key, next()?.parse().map_err(bad)?).is_some() {
            return Err(format!("the row {line:?} is there twice"));
        }
    }
    Ok(sums)
}

/// Kills one worker after another until the job is over.
fn kill_workers(running: &Running) {
    let Some(view) = running.workers() else { return };
    for worker in view.workers.iter().cycle() {
        std::thread::sleep(PAUSE);
        if running.is_over() {
            return;
        }
        // A worker's first page says who it is; 0 before its process has attached.
        let pid = worker.pid.load(Ordering::Acquire);
        if pid > 0 {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).output();
        }
    }
}

fn run(output: &Path) -> Result<(), String> {
    let settings =
        Settings { name: "crash".into(), workers: 2, rate: Some(RATE), ..Settings::default() };
    let job = Job::new(build).parameters(output.to_string_lossy()).settings(settings);
    let running = job.start();
    kill_workers(&running);
    let report = running.join().map_err(|error| error.to_string())?;
    let mut times: Vec<u64> = report.restarts.iter().filter_map(|r| r.recovery_us).collect();
    times.sort_unstable();
    let at = |share: usize| {
        times.get((times.len() * share / 100).min(times.len() - 1)).map_or(0.0, |t| *t as f64 / 1e3)
    };
    println!(
        "{} events in {:.1} s; {} workers killed",
        report.records_in,
        report.elapsed_s,
        report.restarts.len()
    );
    if !times.is_empty() {
        println!("back after {:.1} ms (median), {:.1} ms (slowest)", at(50), at(100));
    }
    let (expected, found) = (expected(), found(output)?);
    if found != expected {
        return Err(format!(
            "{} sums came out, {} were due, and they differ",
            found.len(),
            expected.len()
        ));
    }
    println!("all {} sums are exact", found.len());
    Ok(())
}

fn main() -> ExitCode {
    // Workers are this program again: they begin, and end, here.
    testudo::init();
    let output: PathBuf =
        std::env::temp_dir().join(format!("testudo-crash-{}.csv", std::process::id()));
    let done = run(&output);
    let _ = std::fs::remove_file(&output);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crash: {error}");
            ExitCode::FAILURE
        }
    }
}
