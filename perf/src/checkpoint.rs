//! Checkpoints: what one every second costs, and how fast it is written.
//!
//! Throughput is w1 at full speed with and without, in turn. While the job with checkpoints runs,
//! this process looks at what each worker says about each of its cuts: CPU time of the snapshot,
//! bytes and time of the file, time spent on copies before stores. The last checkpoint of a job,
//! when its workers have nothing else to do any more, is left out. The bare disk writes as many
//! bytes in new files with as many threads, in the same minute. Latency is the open loop of the
//! `latency` bench, with and without.
//!
//! Called by `main`.

use crate::latency::{self, Load};
use crate::regime;
use crate::report::{Failure, Line, Lines, Params, median, quantile};
use crate::workloads;
use crate::{EngineArgs, raw, scratch};
use hdrhistogram::Histogram;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::checkpoint::history::State;
use testudo::checkpoint::schedule::Schedule;
use testudo::config::{Idle, Settings};
use testudo::prelude::*;
use testudo::supervisor::launch::{Running, View};
use testudo_shm::header::{WorkerHeader, WorkerState};
use testudo_shm::primitive::Ordering;

/// Checkpoints.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Keys of the count
    #[arg(long, default_value_t = 1_000_000, value_name = "K")]
    keys: u64,
    /// Events of each run, all sources together
    #[arg(long, default_value_t = 500_000_000, value_name = "N")]
    events: u64,
    /// Rounds of three runs: without checkpoints, ready for them, with them; medians count
    #[arg(long, default_value_t = 3, value_name = "N")]
    pairs: usize,
    /// Milliseconds between two checkpoints
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    interval_ms: u64,
    /// Events a second of the runs that measure latency; 0 leaves them out
    #[arg(long, default_value_t = 100_000, value_name = "R")]
    rate: u64,
    /// Seconds of the runs that measure latency
    #[arg(long, default_value_t = 10, value_name = "S")]
    secs: u64,
    /// Folder for checkpoints, on a disk [default: the temporary folder, or this one]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What a worker said about a cut.
#[derive(Debug, Clone, Copy)]
struct Said {
    epoch: u64,
    failed: bool,
    pause_ns: u64,
    write_ns: u64,
    bytes: u64,
}

/// What a run with checkpoints gave.
#[derive(Debug, Default)]
struct Cuts {
    said: Vec<Said>,
    cow_us_per_s: f64,
    durations_us: Vec<u64>,
    full: u64,
    incremental: Vec<u64>,
    failed: u64,
}

/// The job, in every process. Parameters: events, keys.
fn job(flow: &Flow, parameters: &str) {
    let mut numbers = parameters.split(' ').filter_map(|number| number.parse().ok());
    let (events, keys) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(1));
    workloads::w1_of(flow, events, keys);
}

/// How often this process looks at the workers: far more often than checkpoints are taken.
const LOOK: Duration = Duration::from_millis(4);

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.keys == 0 || args.events == 0 || args.pairs == 0 || args.interval_ms == 0 {
        return Err(Failure::Usage("--keys, --events, --pairs, --interval-ms: at least 1".into()));
    }
    let folder = scratch::Folder::on_disk(args.folder.as_deref())?;
    let settings = args.engine.settings("perf-checkpoint")?;
    let (regime, measured) = regime::around(|| throughput(args, &settings, folder.path()));
    let (rates, cuts) = measured?;
    let mut params = Params::new();
    params.insert("keys".into(), args.keys.into());
    params.insert("events".into(), args.events.into());
    params.insert("interval_ms".into(), args.interval_ms.into());
    args.engine.describe(&settings, &mut params);
    let mut lines = Lines::new("checkpoint", params, regime);
    let [without, idle, with] = [0, 1, 2].map(|side| median(rates.iter().map(|run| run[side])));
    // Within a round: its runs are seconds apart, the regime may change between rounds.
    let ratio = |side: usize| median(rates.iter().map(|run| run[side] / run[0]));
    lines.add("throughput_ratio", ratio(2), "1");
    lines.add("throughput_ratio_no_cut", ratio(1), "1");
    lines.add("events_per_s_with", with.round(), "1/s");
    lines.add("events_per_s_no_cut", idle.round(), "1/s");
    lines.add("events_per_s_without", without.round(), "1/s");
    add_cuts(&mut lines, &cuts, &settings, folder.path())?;
    if args.rate > 0 {
        add_latency(&mut lines, args, folder.path())?;
    }
    Ok(lines.finish())
}

fn with_checkpoints(settings: &Settings, args: &Args, folder: &Path) -> Settings {
    let every = Schedule::Every(Duration::from_millis(args.interval_ms));
    with_folder(settings, folder, every)
}

fn with_folder(settings: &Settings, folder: &Path, checkpoints: Schedule) -> Settings {
    Settings { checkpoint_dir: Some(folder.into()), checkpoints, ..settings.clone() }
}

/// What the runs of one round differ in: no folder for checkpoints; a folder, so that account is
/// kept of changed blocks, but no cut before the end; a cut each interval.
const SIDES: usize = 3;

/// Runs the sides in turn: events a second of each round, and the cuts.
fn throughput(
    args: &Args,
    settings: &Settings,
    folder: &Path,
) -> Result<(Vec<[f64; SIDES]>, Cuts), Failure> {
    let (mut rates, mut cuts) = (Vec::new(), Cuts::default());
    let mut cow = Vec::new();
    for round in 0..args.pairs {
        let mut rate = [0.0; SIDES];
        // The order within a round changes.
        for side in (0..SIDES).map(|side| (side + round) % SIDES) {
            let folder = folder.join(format!("round-{round}-{side}"));
            let settings = match side {
                0 => settings.clone(),
                1 => with_folder(settings, &folder, Schedule::Never),
                _ => with_checkpoints(settings, args, &folder),
            };
            let (elapsed_ns, found) = measure(args, settings)?;
            if side > 0 {
                std::fs::remove_dir_all(&folder)?;
            }
            rate[side] = args.events as f64 * 1e9 / elapsed_ns as f64;
            if side == 2 {
                cow.push(found.cow_us_per_s);
                cuts.add(found);
            }
        }
        rates.push(rate);
    }
    cuts.cow_us_per_s = median(cow);
    Ok((rates, cuts))
}

/// Nanoseconds from the first worker's readiness to the last commit, and what workers said.
fn measure(args: &Args, settings: Settings) -> Result<(u64, Cuts), Failure> {
    let parameters = format!("{} {}", args.events, args.keys);
    let running = Job::new(job).parameters(parameters).settings(settings).start();
    let Some(view) = running.workers() else {
        running.join()?;
        return Err(Failure::Run("the job ended before it started".into()));
    };
    let mut cuts = Cuts { said: listen(&running, &view), ..Cuts::default() };
    let report = running.join()?;
    if report.records_out != args.events || !report.restarts.is_empty() {
        return Err(Failure::Wrong(format!(
            "{} results for {} events, {} workers died",
            report.records_out,
            args.events,
            report.restarts.len()
        )));
    }
    let get = |word: fn(&WorkerHeader) -> u64| view.workers.iter().map(move |w| word(w));
    let begun = get(|w| w.attached_ns.load(Ordering::Acquire)).min().unwrap_or(0);
    let ended = get(|w| w.commit_ns.load(Ordering::Acquire)).max().unwrap_or(0);
    let elapsed_ns = ended.saturating_sub(begun).max(1);
    let copied: u64 = get(|w| w.cut.copied_ns.load(Ordering::Acquire)).sum();
    cuts.cow_us_per_s = copied as f64 * 1e6 / elapsed_ns as f64;
    if let Some(checkpoints) = report.checkpoints {
        let mut latest = checkpoints.latest;
        latest.retain(|record| record.state == State::Complete);
        // The one at the end has the machine for itself.
        latest.pop();
        cuts.failed = checkpoints.failed;
        cuts.durations_us = latest.iter().map(|record| record.duration_us).collect();
        let full = latest.iter().map(|record| record.measure.bytes_full);
        cuts.full = full.max().unwrap_or(0);
        let written = latest.iter().map(|record| record.measure.bytes_incremental);
        cuts.incremental = written.collect();
    }
    Ok((elapsed_ns, cuts))
}

/// What all workers say about their cuts, as long as they have something else to do.
fn listen(running: &Running, view: &View) -> Vec<Said> {
    let mut said = Vec::new();
    let mut known = vec![0; view.workers.len()];
    while !running.is_over() {
        let states = view.workers.iter().map(|worker| worker.state.load(Ordering::Acquire));
        if states.into_iter().any(|state| WorkerState::of(state) == WorkerState::Finished) {
            break;
        }
        for (worker, known) in view.workers.iter().zip(&mut known) {
            let words = &worker.cut;
            let epoch = words.epoch.load(Ordering::Acquire);
            if epoch > *known {
                *known = epoch;
                said.push(Said {
                    epoch,
                    failed: words.failure.load(Ordering::Relaxed) != 0,
                    pause_ns: words.pause_ns.load(Ordering::Relaxed),
                    write_ns: words.write_ns.load(Ordering::Relaxed),
                    bytes: words.file_bytes.load(Ordering::Relaxed),
                });
            }
        }
        std::thread::sleep(LOOK);
    }
    said
}

impl Cuts {
    fn add(&mut self, other: Self) {
        // Epochs of different runs are kept apart.
        let base = self.said.iter().map(|said| said.epoch).max().unwrap_or(0);
        let renumbered =
            other.said.into_iter().map(|said| Said { epoch: said.epoch + base, ..said });
        self.said.extend(renumbered);
        self.durations_us.extend(other.durations_us);
        self.full = self.full.max(other.full);
        self.incremental.extend(other.incremental);
        self.failed += other.failed;
    }

    /// Bytes a second of each cut of all workers together.
    fn speeds(&self) -> Vec<f64> {
        let mut epochs: Vec<u64> = self.said.iter().map(|said| said.epoch).collect();
        epochs.dedup();
        epochs.sort_unstable();
        epochs.dedup();
        let speed = |epoch: &u64| {
            let said: Vec<_> = self.said.iter().filter(|said| said.epoch == *epoch).collect();
            let bytes: u64 = said.iter().map(|said| said.bytes).sum();
            let longest = said.iter().map(|said| said.write_ns).max().unwrap_or(0).max(1);
            (!said.iter().any(|said| said.failed)).then_some(bytes as f64 * 1e9 / longest as f64)
        };
        epochs.iter().filter_map(speed).collect()
    }
}

fn add_cuts(
    lines: &mut Lines,
    cuts: &Cuts,
    settings: &Settings,
    folder: &Path,
) -> Result<(), Failure> {
    let mut pauses: Vec<u64> = cuts.said.iter().map(|said| said.pause_ns).collect();
    pauses.sort_unstable();
    if pauses.is_empty() || cuts.durations_us.is_empty() {
        return Err(Failure::Run(
            "no checkpoint was complete before the end; more --events".into(),
        ));
    }
    lines.add("step_pause_us_p50", quantile(&pauses, 0.5) as f64 / 1e3, "us");
    lines.add("step_pause_us_max", quantile(&pauses, 1.0) as f64 / 1e3, "us");
    lines.add("cow_us_per_s", cuts.cow_us_per_s, "us/s");
    let written = median(cuts.said.iter().map(|said| said.bytes as f64)) as u64;
    let write = median(cuts.speeds());
    let tries = (0..5).map(|_| raw::write(folder, settings.workers, written));
    let raw = median(tries.collect::<Result<Vec<_>, _>>()?);
    lines.add("write_mb_per_s", write / 1e6, "MB/s");
    lines.add("raw_write_mb_per_s", raw / 1e6, "MB/s");
    let mut durations = cuts.durations_us.clone();
    durations.sort_unstable();
    lines.add("duration_ms_p50", quantile(&durations, 0.5) as f64 / 1e3, "ms");
    lines.add("duration_ms_max", quantile(&durations, 1.0) as f64 / 1e3, "ms");
    lines.add("bytes_full", cuts.full, "bytes");
    let incremental = median(cuts.incremental.iter().map(|bytes| *bytes as f64));
    lines.add("bytes_incremental", incremental, "bytes");
    lines.add("checkpoints", cuts.durations_us.len(), "checkpoints");
    lines.add("checkpoints_failed", cuts.failed, "checkpoints");
    Ok(())
}

fn add_latency(lines: &mut Lines, args: &Args, folder: &Path) -> Result<(), Failure> {
    let mut engine = args.engine.clone();
    engine.idle = Some(engine.idle.unwrap_or(Idle::Spin));
    let settings = engine.settings("perf-checkpoint-latency")?;
    let load = Load { keys: args.keys, rate: args.rate, secs: args.secs, warm: 2 };
    let without = latency::measure(load, settings.clone())?.crossed;
    let folder = folder.join("latency");
    let with = latency::measure(load, with_checkpoints(&settings, args, &folder))?.crossed;
    let at = |of: &Histogram<u64>, q| of.value_at_quantile(q) as f64 / 1e3;
    for (name, q) in [("p50", 0.5), ("p999", 0.999)] {
        let ratio = at(&with, q) / at(&without, q).max(0.001);
        lines.add(&format!("latency_{name}_ratio"), ratio, "1");
        lines.add(&format!("latency_us_{name}_with"), at(&with, q), "us");
        lines.add(&format!("latency_us_{name}_without"), at(&without, q), "us");
    }
    Ok(())
}
