//! Throughput: a workload from its first event to its last result, at full speed.
//!
//! The clock runs from the moment the first worker has attached to the last commit of any worker,
//! so the growth of tables and the results are inside, the start of processes is not. Results of w2
//! and w3 are written to a file and checked against the published sums; w0 and w1 must have handed
//! every record to the black box.
//!
//! Called by `main`.

use crate::regime;
use crate::report::{Failure, Line, Lines, Params};
use crate::workloads;
use crate::{EngineArgs, scratch};
use testudo::config::Settings;
use testudo::prelude::*;
use testudo::supervisor::launch::View;
use testudo_shm::primitive::Ordering;

/// w0 to w3.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Events, all sources together
    #[arg(long, default_value_t = 50_000_000, value_name = "N")]
    events: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// The job, in every process. Parameters: workload, events, file for rows.
fn job(flow: &Flow, parameters: &str) {
    let mut words = parameters.splitn(3, ' ');
    let workload = words.next().unwrap_or_default();
    let events = words.next().and_then(|events| events.parse().ok()).unwrap_or(0);
    let rows = words.next().unwrap_or_default();
    match workload {
        "w0" => workloads::w0(flow, events),
        "w1" => workloads::w1(flow, events),
        "w2" => workloads::w2(flow, events, rows),
        _ => workloads::w3(flow, events, rows),
    }
}

/// Nanoseconds from the first worker's readiness to the last commit.
fn elapsed_ns(view: &View) -> u64 {
    let ready = view.workers.iter().map(|header| header.attached_ns.load(Ordering::Acquire));
    let last = view.workers.iter().map(|header| header.commit_ns.load(Ordering::Acquire));
    last.max().unwrap_or(0).saturating_sub(ready.min().unwrap_or(0)).max(1)
}

/// Runs one workload once.
pub fn run(workload: &str, args: &Args) -> Result<Vec<Line>, Failure> {
    if args.events == 0 {
        return Err(Failure::Usage("--events 0: there is nothing to measure".into()));
    }
    let folder = scratch::Folder::new()?;
    let rows = folder.path().join("rows");
    let settings = args.engine.settings("perf")?;
    let parameters = format!("{workload} {} {}", args.events, rows.display());
    let (regime, result) = regime::around(|| measure(parameters, settings.clone()));
    let (elapsed_ns, report) = result?;
    if report.records_in != args.events || !report.restarts.is_empty() {
        return Err(Failure::Wrong(format!(
            "{workload} read {} of {} events, {} workers died",
            report.records_in,
            args.events,
            report.restarts.len()
        )));
    }
    let mut params = Params::new();
    params.insert("events".into(), args.events.into());
    args.engine.describe(&settings, &mut params);
    let mut lines = Lines::new(workload, params, regime);
    lines.add("events_per_s", (args.events as f64 * 1e9 / elapsed_ns as f64).round(), "1/s");
    match workload {
        "w2" | "w3" => {
            let rows = std::fs::read_to_string(&rows)?;
            check_rows(workload, args.events, &rows, &mut lines)?;
        }
        // One result for each event: the increments that were made.
        _ if report.records_out == args.events => {
            lines.add("checksum", report.records_out, "records");
        }
        _ => {
            let (out, events) = (report.records_out, args.events);
            return Err(Failure::Wrong(format!(
                "{workload} gave {out} results for {events} events"
            )));
        }
    }
    Ok(lines.finish())
}

fn measure(parameters: String, settings: Settings) -> Result<(u64, Report), Failure> {
    let running = Job::new(job).parameters(parameters).settings(settings).start();
    let view = running.workers();
    let report = running.join()?;
    let view = view.ok_or_else(|| Failure::Run("the job ended before it started".into()))?;
    Ok((elapsed_ns(&view), report))
}

fn check_rows(workload: &str, events: u64, rows: &str, lines: &mut Lines) -> Result<(), Failure> {
    let sum = workloads::checksum(workload, rows).map_err(Failure::Wrong)?;
    let count = rows.lines().count();
    if let Some((known_count, known_sum)) = workloads::known(workload, events)
        && (known_count, known_sum) != (count, sum)
    {
        return Err(Failure::Wrong(format!(
            "{workload} over {events} events gave {count} rows with checksum {sum:016x}; \
             {known_count} rows with {known_sum:016x} are right:\n{rows}"
        )));
    }
    lines.add("rows", count, "rows");
    lines.add("checksum", format!("{sum:016x}"), "hash");
    Ok(())
}
