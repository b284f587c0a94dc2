//! Benchmarks of Testudo. `testudo-perf BENCH --help` says what each measures.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

mod workloads;

use testudo::prelude::*;

fn job(flow: &Flow, parameters: &str) {
    let (name, events) = parameters.split_once(' ').unwrap_or(("w1", "1000000"));
    let events = events.parse().unwrap_or(1_000_000);
    match name {
        "w0" => workloads::w0(flow, events),
        _ => workloads::w1(flow, events),
    }
}

fn main() {
    testudo::init();
    let name = std::env::args().nth(1).unwrap_or("w1".into());
    let events: u64 = std::env::args().nth(2).and_then(|n| n.parse().ok()).unwrap_or(100_000_000);
    let workers: usize = std::env::args().nth(3).and_then(|n| n.parse().ok()).unwrap_or(2);
    let settings = Settings { workers, progress: false, ..Settings::default() };
    let report = Job::new(job).parameters(format!("{name} {events}")).settings(settings).run();
    match report {
        Ok(report) => println!("{}", report.text(testudo::config::ReportForm::Text)),
        Err(error) => eprintln!("{error}"),
    }
}
