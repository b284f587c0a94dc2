//! Startup: from the start of a job's process to its first result, printed.
//!
//! Another process of this program is started with a small job of two workers; the clock runs from
//! before the start to the first byte on its standard output. So it has in it: loading the program,
//! planning, creating and mapping the segments, starting the workers, attaching, the exchange, and
//! the way back to the printing process.
//!
//! Called by `main`.

use crate::regime;
use crate::report::{Failure, Line, Lines, Params, quantile};
use std::io::Read;
use std::process::{Command, Stdio};
use testudo::prelude::*;
use testudo::time::now_ns;

/// Startup.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Starts; the median counts
    #[arg(long, default_value_t = 15, value_name = "N")]
    starts: usize,
    /// Worker processes
    #[arg(long, default_value_t = 2, value_name = "N")]
    workers: usize,
}

/// The job's own process.
#[derive(Debug, Clone, clap::Args)]
pub struct JobArgs {
    /// Worker processes
    #[arg(long)]
    workers: usize,
}

/// Counts a few numbers by their last digit and prints the counts.
fn job(flow: &Flow, _parameters: &str) {
    flow.source("numbers", Generator::new(1_000, |n| n))
        .key_by(|n| n % 10)
        .aggregate(|| 0u64, |count, _| *count += 1, |digit, count| digit * 1000 + count)
        .print(|line| *line);
}

/// What the started process does.
pub fn job_process(args: &JobArgs) -> Result<(), Failure> {
    let settings = Settings { workers: args.workers, progress: false, ..Settings::default() };
    Job::new(job).settings(settings).run()?;
    Ok(())
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.starts == 0 {
        return Err(Failure::Usage("--starts 0: there is nothing to measure".into()));
    }
    let starts = || (0..args.starts).map(|_| start(args.workers)).collect::<Result<Vec<_>, _>>();
    let (regime, times) = regime::around(starts);
    let mut times = times?;
    times.sort_unstable();
    let mut params = Params::new();
    params.insert("starts".into(), args.starts.into());
    params.insert("workers".into(), args.workers.into());
    let mut lines = Lines::new("startup", params, regime);
    lines.add("first_output_ms", quantile(&times, 0.5) as f64 / 1e6, "ms");
    lines.add("first_output_ms_min", times[0] as f64 / 1e6, "ms");
    lines.add("first_output_ms_max", times[times.len() - 1] as f64 / 1e6, "ms");
    Ok(lines.finish())
}

#[expect(clippy::disallowed_methods, reason = "starts a whole job, as a user would")]
fn start(workers: usize) -> Result<u64, Failure> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["startup-job", "--workers", &workers.to_string()]).stdout(Stdio::piped());
    let begun = now_ns();
    let mut child = command.spawn()?;
    let mut stdout = child.stdout.take().ok_or_else(|| Failure::Run("no pipe".into()))?;
    let mut first = [0u8];
    let got = stdout.read(&mut first)?;
    let elapsed = now_ns() - begun;
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest)?;
    let status = child.wait()?;
    let lines = rest.iter().filter(|byte| **byte == b'\n').count();
    if got == 0 || !status.success() {
        return Err(Failure::Run(format!("the started job ended with {status} before any output")));
    }
    if lines != 1_000 {
        return Err(Failure::Wrong(format!(
            "the started job printed {lines} lines instead of 1000"
        )));
    }
    Ok(elapsed)
}
