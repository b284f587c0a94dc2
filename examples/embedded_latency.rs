//! Embedding: a job inside another program, which measures how long records take.
//!
//!     cargo run --release --example embedded_latency -- [RECORDS_PER_SECOND]
//!
//! Main begins with `testudo::init()`; then a job is a value that this program starts, watches and
//! joins. Records are stamped when they are made and looked at behind an exchange and a keyed
//! count, in whichever worker has their key. All processes share a clock, so the difference is the
//! latency. The workers leave it in files; this program makes histograms of these.

use hdrhistogram::Histogram;
use std::path::Path;
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Lines;
use testudo::time::now_ns;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SECONDS: u64 = 5;
/// The first second is not counted: pages are touched for the first time then.
const WARM_UP: u64 = 1;
const KEYS: u64 = 10_000;

#[testudo::record]
struct Stamped {
    number: u64,
    /// When it was made; behind the count, how long ago that is.
    made_ns: u64,
}

/// What is kept for a key: how many there were, and the latest.
#[testudo::record]
#[derive(Default)]
struct Count {
    records: u64,
    number: u64,
    made_ns: u64,
}

/// The job: parameters are the number of records and the folder for the latencies.
fn build(flow: &Flow, parameters: &str) {
    let (records, folder) = parameters.split_once(' ').unwrap_or(("0", "."));
    let records = records.parse().unwrap_or(0);
    flow.source("stamps", Generator::new(records, |number| Stamped { number, made_ns: now_ns() }))
        .key_by(|stamped| stamped.number % KEYS)
        .aggregate(
            Count::default,
            |count, stamped| {
                let Stamped { number, made_ns } = *stamped;
                *count = Count { records: count.records + 1, number, made_ns };
            },
            |_, count| Stamped { number: count.number, made_ns: now_ns() - count.made_ns },
        )
        .sink(
            "latencies",
            FileSink::folder(
                folder,
                "txt",
                Lines(|m: &Stamped| format!("{} {}", m.number, m.made_ns)),
            ),
        );
}

/// Reads what the workers wrote.
fn histogram(folder: &Path, first: u64) -> Result<Histogram<u64>, Box<dyn std::error::Error>> {
    let mut histogram = Histogram::new(3)?;
    for part in std::fs::read_dir(folder)? {
        for line in std::fs::read_to_string(part?.path())?.lines() {
            let (number, latency) = line.split_once(' ').ok_or("a line is cut off")?;
            if number.parse::<u64>()? >= first {
                histogram.record(latency.parse()?)?;
            }
        }
    }
    Ok(histogram)
}

fn measure(rate: u64, folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let settings =
        Settings { name: "latency".into(), workers: 2, rate: Some(rate), ..Settings::default() };
    let parameters = format!("{} {}", rate * SECONDS, folder.display());
    let running = Job::new(build).parameters(parameters).settings(settings).start();
    // This thread is free for the program's own work; `running.stop()` would end the job early.
    let report = running.join()?;
    let latencies = histogram(folder, rate * WARM_UP)?;
    println!(
        "{} records in {:.1} s, {} measured",
        report.records_in,
        report.elapsed_s,
        latencies.len()
    );
    for quantile in [0.5, 0.9, 0.99, 0.999, 1.0] {
        let micros = latencies.value_at_quantile(quantile) as f64 / 1e3;
        println!("{:>6} % of them within {micros:>9.1} µs", quantile * 100.0);
    }
    Ok(())
}

fn main() -> ExitCode {
    testudo::init();
    let rate = std::env::args().nth(1).map_or(Ok(100_000), |text| text.parse());
    let Ok(rate) = rate else {
        eprintln!("usage: embedded_latency [RECORDS_PER_SECOND]");
        return ExitCode::FAILURE;
    };
    let folder = std::env::temp_dir().join(format!("testudo-latency-{}", std::process::id()));
    let done = measure(rate, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embedded_latency: {error}");
            ExitCode::FAILURE
        }
    }
}
