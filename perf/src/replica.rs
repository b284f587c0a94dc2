//! The replica: what tier 1 costs its worker. w1 at full speed with one worker, without a replica
//! and with one, in turn; the clock runs while the replica follows, from when it was first seen to.
//!
//! In the run with a replica, the share of the job's time in which it followed is part of the
//! result: one that is left behind costs nothing. A difference that it found is a wrong result.
//!
//! Called by `main`.

use crate::EngineArgs;
use crate::regime;
use crate::report::{Failure, Line, Lines, Params, median};
use crate::workloads;
use std::time::Duration;
use testudo::config::Settings;
use testudo::prelude::*;
use testudo::time::now_ns;
use testudo_shm::primitive::Ordering;

/// Replica.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Keys of the count
    #[arg(long, default_value_t = 1_000_000, value_name = "K")]
    keys: u64,
    /// Milliseconds that each run is measured
    #[arg(long, default_value_t = 3000, value_name = "MS")]
    run_ms: u64,
    /// Rounds of two runs: without and with a replica; medians count
    #[arg(long, default_value_t = 3, value_name = "N")]
    pairs: usize,
    #[command(flatten)]
    engine: EngineArgs,
}

/// The job, in every process. Parameters: keys.
fn job(flow: &Flow, parameters: &str) {
    workloads::w1_of(flow, u64::MAX, parameters.parse().unwrap_or(1));
}

/// What one run gave.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    /// Steps a second; with the same number of records each, so as good as records.
    commits_per_s: f64,
    records_per_s: f64,
    followed: f64,
    left_behind: u64,
    stood_us: u64,
    checks: u64,
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.keys == 0 || args.pairs == 0 || args.run_ms == 0 {
        return Err(Failure::Usage("--keys, --pairs, --run-ms: at least 1".into()));
    }
    let engine = args.engine.with_replicas();
    let settings = engine.settings("perf-replica")?;
    let (regime, measured) = regime::around(|| rounds(args, &settings));
    let measured = measured?;
    let mut params = Params::new();
    params.insert("keys".into(), args.keys.into());
    params.insert("run_ms".into(), args.run_ms.into());
    engine.describe(&settings, &mut params);
    let mut lines = Lines::new("replica", params, regime);
    let of = |get: fn(&[Measured; 2]) -> f64| median(measured.iter().map(get));
    lines.add(
        "throughput_ratio",
        of(|[without, with]| with.records_per_s / without.records_per_s),
        "1",
    );
    lines.add("records_per_s_without", of(|[without, _]| without.records_per_s).round(), "1/s");
    lines.add("records_per_s_with", of(|[_, with]| with.records_per_s).round(), "1/s");
    lines.add("commits_per_s_with", of(|[_, with]| with.commits_per_s).round(), "1/s");
    lines.add("followed", of(|[_, with]| with.followed), "1");
    lines.add("stood_us", of(|[_, with]| with.stood_us as f64), "us");
    lines.add("checks", of(|[_, with]| with.checks as f64), "comparisons");
    let left: u64 = measured.iter().map(|[_, with]| with.left_behind).sum();
    lines.add("left_behind", left, "replicas");
    Ok(lines.finish())
}

fn rounds(args: &Args, settings: &Settings) -> Result<Vec<[Measured; 2]>, Failure> {
    let mut all = Vec::new();
    for round in 0..args.pairs {
        let mut both = [Measured::default(); 2];
        // The order within a round changes.
        for side in (0..2).map(|side| (side + round) % 2) {
            let tier = if side == 0 { Tier::Respawn } else { Tier::Replica };
            both[side] = measure(args, Settings { tier: Some(tier), ..settings.clone() })?;
        }
        all.push(both);
    }
    Ok(all)
}

/// One run: from when all keys should be there and the replica follows.
fn measure(args: &Args, settings: Settings) -> Result<Measured, Failure> {
    let running = Job::new(job).parameters(args.keys.to_string()).settings(settings).start();
    let Some(view) = running.workers() else {
        running.join()?;
        return Err(Failure::Run("the job ended before it started".into()));
    };
    let is_followed = || view.replicas().iter().all(|replica| replica.follows);
    let commits = || view.workers.iter().map(|w| w.commits.load(Ordering::Acquire)).sum::<u64>();
    // Every key was seen, and tables grow no more.
    std::thread::sleep(Duration::from_millis(500));
    let until = now_ns() + 20_000_000_000;
    while !is_followed() {
        if now_ns() > until || running.is_over() {
            running.stop();
            running.join()?;
            return Err(Failure::Run("no replica follows".into()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let records = || view.records_in();
    let (begun_ns, before) = (now_ns(), (commits(), records()));
    let (mut looks, mut followed) = (0u64, 0u64);
    let end_ns = begun_ns + args.run_ms * 1_000_000;
    while now_ns() < end_ns {
        std::thread::sleep(Duration::from_millis(5));
        looks += 1;
        followed += u64::from(is_followed());
    }
    let after = (commits(), records());
    let seconds = (now_ns() - begun_ns) as f64 / 1e9;
    let replicas = view.replicas();
    running.stop();
    let report = running.join()?;
    if report.replicas.iter().any(|replica| replica.mismatches > 0) {
        return Err(Failure::Wrong(format!("a replica differs: {:?}", report.replicas)));
    }
    if !report.restarts.is_empty() {
        return Err(Failure::Wrong(format!("{} workers died", report.restarts.len())));
    }
    Ok(Measured {
        commits_per_s: (after.0 - before.0) as f64 / seconds,
        records_per_s: (after.1 - before.1) as f64 / seconds,
        followed: followed as f64 / looks.max(1) as f64,
        left_behind: replicas.iter().map(|replica| replica.left_behind).sum(),
        stood_us: replicas.iter().map(|replica| replica.stood_us).max().unwrap_or(0),
        checks: replicas.iter().map(|replica| replica.checks).sum(),
    })
}
