//! Self-healing: three records kill whoever processes them, each in its own way, and the job goes
//! on without them.
//!
//!     cargo run --release --example self_healing
//!
//! One record leads to a wild read, as a mistake in native code does; one to a loop without an end;
//! one takes memory until there is none. A worker that dies is replaced at once. When its own doing
//! has ended it twice at the same place, its successor takes one record a transaction; a record
//! that has killed it three times alone is written to the dead-letter file and passed over.
//! Everything else is exact: the sums are compared with those of a plain loop.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Csv;
use testudo::supervisor::report::Restart;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EVENTS: u64 = 3_000_000;
const RATE: u64 = 1_000_000;
const KEYS: u64 = 10;

const POISON: u64 = 700_000;
const ENDLESS: u64 = 1_400_000;
const HOG: u64 = 2_100_000;

#[testudo::record]
struct Sum {
    key: u64,
    sum: u64,
}

/// What user code does with a number; with three of them it is wrong.
fn worth(n: u64) -> u64 {
    match n {
        // SAFETY: it is not. Native code has such mistakes, and only a process of its own contains
        // them.
        POISON => unsafe { std::ptr::without_provenance::<u64>(8).read_volatile() },
        ENDLESS => loop {
            std::hint::spin_loop();
        },
        HOG => memory_without_end(),
        _ => n % 1_000_003,
    }
}

/// Takes memory until there is none. A limit stands in for a cgroup's, so that your machine is
/// safe.
fn memory_without_end() -> u64 {
    let limit = libc::rlimit { rlim_cur: 256 << 20, rlim_max: 256 << 20 };
    // SAFETY: a valid place.
    unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) };
    let mut all: Vec<Vec<u8>> = Vec::new();
    while all.len() < 64 {
        all.push(std::hint::black_box(vec![1; 64 << 20]));
    }
    all.len() as u64
}

/// The job: sums by key. `output` is the parameter that every process gets.
fn build(flow: &Flow, output: &str) {
    flow.source("numbers", Generator::new(EVENTS, |n| n))
        .key_by(|n| n % KEYS)
        .process(
            |state| state.value::<u64>("sum"),
            |sum, cx, n: &u64| {
                let before = cx.get(sum).copied();
                if before.is_none() {
                    cx.set_timer(i64::MAX);
                }
                cx.set(sum, &(before.unwrap_or(0) + worth(*n)));
            },
            |sum, cx, _| {
                let (key, sum) = (*cx.key(), cx.get(sum).copied().unwrap_or(0));
                cx.emit(Sum { key, sum });
            },
        )
        .name("sums")
        .sink("rows", FileSink::new(output, Csv(|row: &Sum| (row.key, row.sum))));
}

/// What must come out, from a plain loop.
fn expected() -> BTreeMap<u64, u64> {
    let mut sums = BTreeMap::new();
    for n in (0..EVENTS).filter(|n| ![POISON, ENDLESS, HOG].contains(n)) {
        *sums.entry(n % KEYS).or_default() += worth(n);
    }
    sums
}

fn found(output: &Path) -> Result<BTreeMap<u64, u64>, String> {
    let text = std::fs::read_to_string(output).map_err(|error| error.to_string())?;
    let rows = text.lines().map(|line| {
        let (key, sum) = line.split_once(',').ok_or("a row that is cut off")?;
        let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
        Ok((number(key)?, number(sum)?))
    });
    rows.collect()
}

/// What happened, a line for each death.
fn show(restarts: &[Restart]) {
    println!("{:6} {:32} {:8} {:>9}  record", "worker", "what ended it", "then", "back in");
    for restart in restarts {
        let back = restart.recovery_us.map_or(0.0, |us| us as f64 / 1e3);
        let Restart { worker, why, record, rung, .. } = restart;
        println!("{worker:6} {why:32} {rung:8} {back:6.1} ms  {record}");
    }
}

fn run(folder: &Path) -> Result<(), String> {
    let (output, letters) = (folder.join("sums.csv"), folder.join("dead-letters.jsonl"));
    let settings = Settings {
        name: "self_healing".into(),
        workers: 2,
        rate: Some(RATE),
        hang_timeout: Duration::from_secs(1),
        dead_letters: Some(letters.clone()),
        ..Settings::default()
    };
    let job = Job::new(build).parameters(output.to_string_lossy()).settings(settings);
    let report = job.run().map_err(|error| error.to_string())?;
    println!("{} numbers in {:.1} s", report.records_in, report.elapsed_s);
    show(&report.restarts);
    println!("\ndead letters:");
    let text = std::fs::read_to_string(&letters).map_err(|error| error.to_string())?;
    text.lines().for_each(|line| println!("  {line}"));
    let (expected, found) = (expected(), found(&output)?);
    if found != expected || report.dead_lettered != 3 {
        return Err(format!("{found:?} came out, {expected:?} were due"));
    }
    println!("\nthree records put aside, all {} sums of the others are exact", found.len());
    Ok(())
}

fn main() -> ExitCode {
    // Workers are this program again: they begin, and end, here.
    testudo::init();
    let folder = std::env::temp_dir().join(format!("testudo-healing-{}", std::process::id()));
    let done = std::fs::create_dir_all(&folder).map_err(|error| error.to_string());
    let done = done.and_then(|()| run(&folder));
    let _ = std::fs::remove_dir_all(&folder);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("self_healing: {error}");
            ExitCode::FAILURE
        }
    }
}
