//! Latency: w1 at a fixed rate, open loop, from the intended send time of an event to after its
//! count.
//!
//! Each source emits the events that are due, with the time at which each *should* have been sent;
//! if it is late, the delay counts (no coordinated omission). Behind the count, at the black box,
//! the time is taken. All keys are there before the clock starts, and the first seconds are left
//! out. Events that stay in their worker are counted apart: `latency_us_*` are those that crossed
//! to another process, `all_latency_us_*` are all of them.
//!
//! The sink's closure keeps the histograms and writes them to a file when the worker ends.
//!
//! Called by `main`.

use crate::regime::{self, histogram};
use crate::report::{Failure, Line, Lines, Params};
use crate::workloads::{Bid, K1, bid_of};
use crate::{EngineArgs, scratch};
use hdrhistogram::Histogram;
use std::cell::RefCell;
use std::fmt::Write;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use testudo::config::{Idle, Settings};
use testudo::prelude::*;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::time::now_ns;
use testudo_shm::zerocopy;

/// Latency.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Events a second, all sources together
    #[arg(long, default_value_t = 100_000, value_name = "R")]
    rate: u64,
    /// Seconds that count
    #[arg(long, default_value_t = 10, value_name = "S")]
    secs: u64,
    /// Seconds before them that do not
    #[arg(long, default_value_t = 2, value_name = "S")]
    warm: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What every process of the job is told.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Plan {
    keys: u64,
    rate: u64,
    warm_events: u64,
    events: u64,
    folder: PathBuf,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Keys of the count.
    pub keys: u64,
    /// Events a second, all sources together.
    pub rate: u64,
    /// Seconds that count.
    pub secs: u64,
    /// Seconds before them that do not.
    pub warm: u64,
}

/// What a run gave, in nanoseconds.
#[derive(Debug)]
pub struct Latencies {
    /// The regime.
    pub regime: Option<[u64; 2]>,
    /// Events that crossed to another process.
    pub crossed: Histogram<u64>,
    /// All events.
    pub all: Histogram<u64>,
}

/// An event on its way: 32 bytes, as in w1.
#[testudo::record]
struct Sent {
    auction: u64,
    /// The process that sent it; 0 for one that is not measured.
    process: u64,
    price: u64,
    /// When it should have been sent, monotonic nanoseconds.
    due_ns: u64,
}

/// A count, and of the event that made it what the clock needs.
#[testudo::record]
struct Counted {
    count: u64,
    process: u64,
    due_ns: u64,
}

/// Emits every key once, then what is due.
#[derive(Debug)]
struct OpenLoop(Plan);

/// Where an [`OpenLoop`] stands.
#[derive(Debug, Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
#[zerocopy(crate = "testudo_shm::zerocopy")]
#[repr(C)]
struct Place {
    /// Keys that are there already.
    filled: u64,
    /// Number of the next event.
    next: u64,
    /// When event 0 was due; 0 before the first.
    begun_ns: u64,
}

struct OpenLoopReader {
    plan: Plan,
    subtask: Subtask,
    process: u64,
}

/// From the last key to event 0: the other sources fill as well.
const PAUSE_NS: u64 = 300_000_000;

impl Source for OpenLoop {
    type Out = Sent;
    type Position = Place;
    type Reader = OpenLoopReader;

    fn start(&self, subtask: Subtask) -> Place {
        let first = subtask.index as u64;
        Place { filled: first, next: first, begun_ns: 0 }
    }

    fn open(&self, subtask: Subtask, _from: &Place) -> Result<OpenLoopReader, String> {
        Ok(OpenLoopReader { plan: self.0.clone(), subtask, process: std::process::id().into() })
    }
}

impl OpenLoopReader {
    fn due_ns(&self, begun_ns: u64, n: u64) -> u64 {
        begun_ns + (u128::from(n) * 1_000_000_000 / u128::from(self.plan.rate)) as u64
    }

    fn fill(&self, at: &mut Place, max: usize, out: &mut impl Collect<Sent>) {
        for _ in 0..max {
            if at.filled >= self.plan.keys {
                break;
            }
            out.emit(Sent { auction: at.filled, process: 0, price: 0, due_ns: 0 });
            at.filled += self.subtask.count as u64;
        }
    }
}

impl Reader<Sent, Place> for OpenLoopReader {
    #[inline]
    fn read(
        &mut self,
        at: &mut Place,
        max: usize,
        out: &mut impl Collect<Sent>,
    ) -> Result<Progress, String> {
        if at.filled < self.plan.keys {
            self.fill(at, max, out);
            return Ok(Progress::More);
        }
        let now = now_ns();
        if at.begun_ns == 0 {
            at.begun_ns = now + PAUSE_NS;
            return Ok(Progress::More);
        }
        let mut due = self.due_ns(at.begun_ns, at.next);
        let mut left = max;
        while due <= now && left > 0 && at.next < self.plan.events {
            let Bid { auction, price, .. } = bid_of(at.next, self.plan.keys);
            let process = if at.next < self.plan.warm_events { 0 } else { self.process };
            out.emit(Sent { auction, process, price, due_ns: due });
            at.next += self.subtask.count as u64;
            due = self.due_ns(at.begun_ns, at.next);
            left -= 1;
        }
        Ok(match (at.next < self.plan.events, left) {
            (false, _) => Progress::End,
            (true, 0) => Progress::More,
            (true, _) => Progress::Idle { until_ns: due },
        })
    }
}

/// The histograms of one worker; they go to a file when the worker ends.
struct Recorder {
    own: u64,
    folder: PathBuf,
    crossed: RefCell<Histogram<u64>>,
    stayed: RefCell<Histogram<u64>>,
}

impl Recorder {
    fn new(folder: PathBuf) -> Self {
        let own = std::process::id().into();
        let (crossed, stayed) = (RefCell::new(histogram()), RefCell::new(histogram()));
        Self { own, folder, crossed, stayed }
    }

    #[inline]
    fn note(&self, counted: &Counted) {
        black_box(counted.count);
        if counted.process != 0 {
            let taken = now_ns().saturating_sub(counted.due_ns).max(1);
            let to = if counted.process == self.own { &self.stayed } else { &self.crossed };
            to.borrow_mut().saturating_record(taken);
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // The launching process draws the same flow and drops it: it has nothing to write.
        if self.crossed.borrow().is_empty() && self.stayed.borrow().is_empty() {
            return;
        }
        let text = dump(&self.crossed.borrow()) + "\n" + &dump(&self.stayed.borrow()) + "\n";
        let path = self.folder.join(format!("histogram-{}", self.own));
        if let Err(error) = std::fs::write(&path, text) {
            eprintln!("testudo-perf: cannot write {}: {error}", path.display());
        }
    }
}

fn dump(histogram: &Histogram<u64>) -> String {
    let mut text = String::new();
    for bucket in histogram.iter_recorded() {
        let _ = write!(text, "{}:{} ", bucket.value_iterated_to(), bucket.count_at_value());
    }
    text
}

fn load(line: &str, into: &mut Histogram<u64>) -> Option<()> {
    for bucket in line.split_whitespace() {
        let (value, count) = bucket.split_once(':')?;
        into.saturating_record_n(value.parse().ok()?, count.parse().ok()?);
    }
    Some(())
}

/// The job, in every process. Parameters: a [`Plan`].
fn job(flow: &Flow, parameters: &str) {
    let Ok(plan) = serde_json::from_str::<Plan>(parameters) else {
        return;
    };
    let recorder = Recorder::new(plan.folder.clone());
    let none = Counted { count: 0, process: 0, due_ns: 0 };
    flow.source("events", OpenLoop(plan))
        .key_by(|sent| sent.auction)
        .aggregate(
            move || none,
            |counted, sent| {
                let count = counted.count + u64::from(sent.due_ns > 0);
                *counted = Counted { count, process: sent.process, due_ns: sent.due_ns };
            },
            |_, counted| *counted,
        )
        .for_each(move |counted| recorder.note(counted));
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    let mut engine = args.engine.clone();
    // As the others do: a worker that sleeps adds the time of waking it up.
    engine.idle = Some(engine.idle.unwrap_or(Idle::Spin));
    let settings = engine.settings("perf-latency")?;
    let load = Load { keys: K1, rate: args.rate, secs: args.secs, warm: args.warm };
    let measured = measure(load, settings.clone())?;
    let mut params = Params::new();
    params.insert("rate".into(), args.rate.into());
    params.insert("secs".into(), args.secs.into());
    args.engine.describe(&settings, &mut params);
    let mut lines = Lines::new("latency", params, measured.regime);
    add(&mut lines, "latency_us", &measured.crossed);
    add(&mut lines, "all_latency_us", &measured.all);
    Ok(lines.finish())
}

/// Runs the job once with these settings.
pub fn measure(load: Load, settings: Settings) -> Result<Latencies, Failure> {
    if load.rate == 0 || load.secs == 0 || load.keys == 0 {
        return Err(Failure::Usage("the rate, the seconds and the keys must be at least 1".into()));
    }
    let folder = scratch::Folder::new()?;
    let plan = Plan {
        keys: load.keys,
        rate: load.rate,
        warm_events: load.warm * load.rate,
        events: (load.warm + load.secs) * load.rate,
        folder: folder.path().into(),
    };
    let parameters = serde_json::to_string(&plan).unwrap_or_default();
    let job = Job::new(job).parameters(parameters).settings(settings);
    let (regime, report) = regime::around(|| job.run());
    let report = report?;
    if report.records_out != plan.events + load.keys || !report.restarts.is_empty() {
        return Err(Failure::Wrong(format!(
            "{} of {} events were counted, {} workers died",
            report.records_out.saturating_sub(load.keys),
            plan.events,
            report.restarts.len()
        )));
    }
    let (crossed, all) = collect(folder.path())?;
    let measured = load.secs * load.rate;
    if all.len() != measured {
        let (found, measured) = (all.len(), measured);
        return Err(Failure::Wrong(format!("{found} of {measured} events were timed")));
    }
    Ok(Latencies { regime, crossed, all })
}

/// Puts the workers' histograms together: of what crossed, and of everything.
fn collect(folder: &Path) -> Result<(Histogram<u64>, Histogram<u64>), Failure> {
    let (mut crossed, mut stayed) = (histogram(), histogram());
    for entry in std::fs::read_dir(folder)? {
        let text = std::fs::read_to_string(entry?.path())?;
        let mut lines = text.lines();
        let both = lines.next().zip(lines.next());
        both.and_then(|(first, second)| load(first, &mut crossed).and(load(second, &mut stayed)))
            .ok_or_else(|| Failure::Run("a worker's histogram is damaged".into()))?;
    }
    stayed.add(&crossed).map_err(|error| Failure::Run(error.to_string()))?;
    Ok((crossed, stayed))
}

fn add(lines: &mut Lines, name: &str, of: &Histogram<u64>) {
    let quantiles = [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("p9999", 0.9999)];
    for (suffix, q) in quantiles {
        lines.add(&format!("{name}_{suffix}"), of.value_at_quantile(q) as f64 / 1e3, "us");
    }
    lines.add(&format!("{name}_max"), of.max() as f64 / 1e3, "us");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_survives_its_file() {
        let mut before = histogram();
        for value in [1, 1000, 1000, 123_456_789] {
            before.saturating_record(value);
        }
        let mut after = histogram();
        assert_eq!(load(&dump(&before), &mut after), Some(()));
        assert_eq!(before.len(), after.len());
        assert_eq!(before.value_at_quantile(0.5), after.value_at_quantile(0.5));
        assert_eq!(load("12:", &mut after), None);
    }
}
