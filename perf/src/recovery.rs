//! Recovery: w1 at full speed or at a rate, while workers are killed.
//!
//! Measured for each SIGKILL: from the kill to the first commit of the victim's successor, and the
//! longest time that any other worker went without a commit in between (a pause that ends later
//! counts whole). The workers themselves note both in their headers; this process only reads them,
//! so its own sleep is not in the figures.
//!
//! Accounting is exact, key by key. Each source first emits every key once (uncounted: so the state
//! is as large as asked for before the first kill), then events until it finds the file `stop`,
//! then a query for every key. A key that has seen the queries of all sources has seen everything
//! before them, since a producer's records stay in order: its count goes to a file. It must equal
//! the number of events with that key that the sources say they emitted; the rest is lost or
//! doubled.
//!
//! Called by `main`.

use crate::regime;
use crate::report::{Failure, Line, Lines, Params, quantile};
use crate::workloads::splitmix64;
use crate::{EngineArgs, scratch};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::metrics::{Counter, GAP_NS};
use testudo::prelude::*;
use testudo::sink::file::Lines as TextLines;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::supervisor::launch::{Running, View};
use testudo::time::now_ns;
use testudo_shm::header::WorkerHeader;
use testudo_shm::primitive::Ordering;
use testudo_shm::zerocopy;

/// Recovery.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// SIGKILLs
    #[arg(long, default_value_t = 20, value_name = "K")]
    kills: usize,
    /// Events a second, all sources together [default: full speed]
    #[arg(long, value_name = "R")]
    rate: Option<u64>,
    /// State of the whole job before the first kill, in MiB [default: a million keys]
    #[arg(long, value_name = "M")]
    state_mib: Option<u64>,
    /// Milliseconds between a recovery and the next kill, at least; up to twice that, at random
    #[arg(long, default_value_t = 30, value_name = "MS")]
    pause_ms: u64,
    /// Seed of the choice of victims and moments
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Keys of w1, and bytes of state that one key takes at least: sixteen for the slot, at most half
/// as much again free.
const KEYS: u64 = 1_000_000;
const BYTES_PER_KEY: u64 = 24;

/// What every process of the job is told.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Plan {
    keys: u64,
    rate: Option<u64>,
    folder: PathBuf,
}

/// 32 bytes, as in w1.
#[testudo::record]
struct Work {
    key: u64,
    what: u64,
    n: u64,
    filler: u64,
}

const FILL: u64 = 0;
const EVENT: u64 = 1;
const QUERY: u64 = 2;

/// Bits of an accumulator that count events; those above count queries.
const COUNT_BITS: u32 = 48;

/// The count of a key that all sources have asked for.
#[testudo::record]
struct Final {
    key: u64,
    value: u64,
}

struct Events {
    plan: Plan,
    /// How many events each subtask has emitted, told when it stops.
    emitted: Vec<Counter>,
}

/// Where a source stands.
#[derive(Debug, Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
#[zerocopy(crate = "testudo_shm::zerocopy")]
#[repr(C)]
struct Place {
    /// `FILL`, `EVENT` or `QUERY`.
    phase: u64,
    /// The next key, or the number of the next event.
    next: u64,
}

struct EventsReader {
    plan: Plan,
    subtask: Subtask,
    emitted: Counter,
    /// When to look for the file `stop` again.
    look_ns: u64,
    /// When event `paced.1` was due: this reader's own schedule, begun when it was opened.
    paced: Option<(u64, u64)>,
}

/// Time between two looks at the file `stop`.
const LOOK_NS: u64 = 1_000_000;

impl Source for Events {
    type Out = Work;
    type Position = Place;
    type Reader = EventsReader;

    fn start(&self, subtask: Subtask) -> Place {
        Place { phase: FILL, next: subtask.index as u64 }
    }

    fn open(&self, subtask: Subtask, _from: &Place) -> Result<EventsReader, String> {
        let emitted = *self.emitted.get(subtask.index).ok_or("more subtasks than workers")?;
        Ok(EventsReader { plan: self.plan.clone(), subtask, emitted, look_ns: 0, paced: None })
    }
}

impl EventsReader {
    /// How many events may be emitted now, or when the next one is due.
    fn allowance(&mut self, now: u64, next: u64, max: usize) -> Result<usize, u64> {
        let Some(rate) = self.plan.rate else {
            return Ok(max);
        };
        let (begun, first) = *self.paced.get_or_insert((now, next));
        let due =
            |n: u64| begun + (u128::from(n - first) * 1_000_000_000 / u128::from(rate)) as u64;
        if due(next) > now {
            return Err(due(next));
        }
        let behind = u128::from(now - due(next)) * u128::from(rate) / 1_000_000_000;
        let allowed = behind as u64 / self.subtask.count as u64 + 1;
        Ok(max.min(usize::try_from(allowed).unwrap_or(max)))
    }

    fn events(&mut self, at: &mut Place, max: usize, out: &mut impl Collect<Work>) -> Progress {
        let now = now_ns();
        let (index, step) = (self.subtask.index as u64, self.subtask.count as u64);
        if now >= self.look_ns {
            self.look_ns = now + LOOK_NS;
            if self.plan.folder.join("stop").exists() {
                self.emitted.add((at.next - index) / step);
                *at = Place { phase: QUERY, next: 0 };
                return Progress::More;
            }
        }
        let count = match self.allowance(now, at.next, max) {
            Ok(count) => count,
            Err(until_ns) => return Progress::Idle { until_ns },
        };
        for _ in 0..count {
            let key = splitmix64(at.next) % self.plan.keys;
            out.emit(Work { key, what: EVENT, n: at.next, filler: 0 });
            at.next += step;
        }
        Progress::More
    }
}

impl Reader<Work, Place> for EventsReader {
    fn read(
        &mut self,
        at: &mut Place,
        max: usize,
        out: &mut impl Collect<Work>,
    ) -> Result<Progress, String> {
        if at.phase == EVENT {
            return Ok(self.events(at, max, out));
        }
        // Keys are filled by one source each, and asked for by all.
        let (index, count) = (self.subtask.index as u64, self.subtask.count as u64);
        let step = if at.phase == FILL { count } else { 1 };
        for _ in 0..max {
            if at.next >= self.plan.keys {
                break;
            }
            out.emit(Work { key: at.next, what: at.phase, n: 0, filler: 0 });
            at.next += step;
        }
        if at.next < self.plan.keys {
            return Ok(Progress::More);
        }
        if at.phase == QUERY {
            return Ok(Progress::End);
        }
        let done = self.plan.folder.join(format!("filled-{index}"));
        std::fs::write(&done, "")
            .map_err(|error| format!("cannot write {}: {error}", done.display()))?;
        *at = Place { phase: EVENT, next: index };
        Ok(Progress::More)
    }
}

/// The job, in every process. Parameters: a [`Plan`].
fn job(flow: &Flow, parameters: &str) {
    let Ok(plan) = serde_json::from_str::<Plan>(parameters) else {
        return;
    };
    let sources = flow.workers() as u64;
    let emitted = (0..sources).map(|index| flow.counter(&emitted_name(index))).collect();
    let finals = plan.folder.join("finals");
    let fold = |value: &mut u64, work: &Work| {
        *value += match work.what {
            EVENT => 1,
            QUERY => 1 << COUNT_BITS,
            _ => 0,
        };
    };
    let text = |row: &Final| format!("{} {}", row.key, row.value & ((1 << COUNT_BITS) - 1));
    flow.source("events", Events { plan, emitted })
        .key_by(|work| work.key)
        .aggregate(|| 0u64, fold, |key, value| Final { key: *key, value: *value })
        .filter(move |row| row.value >> COUNT_BITS == sources)
        .sink("finals", FileSink::folder(finals, "txt", TextLines(text)));
}

fn emitted_name(index: u64) -> String {
    format!("events-{index}")
}

/// What one kill led to, nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Recovery {
    to_attached: u64,
    to_first_commit: u64,
    others_gap: u64,
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.kills == 0 || args.rate == Some(0) || args.state_mib == Some(0) {
        return Err(Failure::Usage("--kills, --rate and --state-mib must be at least 1".into()));
    }
    let folder = scratch::Folder::new()?;
    let keys = args.state_mib.map_or(KEYS, |mib| (mib << 20) / BYTES_PER_KEY);
    let plan = Plan { keys, rate: args.rate, folder: folder.path().into() };
    let settings = args.engine.settings("perf-recovery")?;
    let parameters = serde_json::to_string(&plan).unwrap_or_default();
    let job = Job::new(job).parameters(parameters).settings(settings.clone());
    let (regime, result) = regime::around(|| play(job, args, folder.path()));
    let (recoveries, state_bytes, report) = result?;
    let (lost, doubled, events) = account(&report, keys, &folder.path().join("finals"))?;
    let mut params = Params::new();
    params.insert("kills".into(), args.kills.into());
    params.insert("rate".into(), args.rate.into());
    params.insert("state_mib".into(), (state_bytes >> 20).into());
    params.insert("keys".into(), keys.into());
    params.insert("events".into(), events.into());
    args.engine.describe(&settings, &mut params);
    let mut lines = Lines::new("recovery", params, regime);
    add(&mut lines, "kill_to_attached_us", recoveries.iter().map(|r| r.to_attached));
    add(&mut lines, "kill_to_first_commit_us", recoveries.iter().map(|r| r.to_first_commit));
    if settings.workers > 1 {
        add(&mut lines, "others_gap_us", recoveries.iter().map(|r| r.others_gap));
    }
    lines.add("lost", lost, "records");
    lines.add("doubled", doubled, "records");
    Ok(lines.finish())
}

fn add(lines: &mut Lines, name: &str, nanos: impl Iterator<Item = u64>) {
    let mut sorted: Vec<u64> = nanos.collect();
    sorted.sort_unstable();
    for (suffix, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
        lines.add(&format!("{name}_{suffix}"), quantile(&sorted, q) as f64 / 1e3, "us");
    }
}

/// Runs the job, kills, stops it. Gives the recoveries, the bytes of state before the first kill,
/// and the report.
fn play(job: Job, args: &Args, folder: &Path) -> Result<(Vec<Recovery>, u64, Report), Failure> {
    let running = job.start();
    let Some(view) = running.workers() else {
        running.join()?;
        return Err(Failure::Run("the job ended before it started".into()));
    };
    let is_filled =
        || (0..args.engine.workers).all(|i| folder.join(format!("filled-{i}")).exists());
    wait_until(&running, "all keys are there", Duration::from_secs(300), is_filled)?;
    std::thread::sleep(Duration::from_millis(200));
    let state_bytes = group_bytes();
    let mut random = args.seed;
    let mut recoveries = Vec::new();
    for _ in 0..args.kills {
        random = splitmix64(random);
        let pause = args.pause_ms * 1000 + random % (args.pause_ms * 1000).max(1);
        std::thread::sleep(Duration::from_micros(pause));
        let victim = (random >> 32) as usize % view.workers.len();
        match kill(&running, &view, victim) {
            Ok(recovery) => recoveries.push(recovery),
            // The job's own error says more than ours.
            Err(failure) if running.is_over() => {
                return Err(running.join().map_or_else(Failure::from, |_| failure));
            }
            Err(failure) => return Err(failure),
        }
    }
    std::fs::write(folder.join("stop"), "")?;
    Ok((recoveries, state_bytes, running.join()?))
}

fn wait_until(
    running: &Running,
    what: &str,
    limit: Duration,
    is_so: impl Fn() -> bool,
) -> Result<(), Failure> {
    let begun = now_ns();
    while !is_so() {
        if running.is_over() {
            return Err(Failure::Run(format!("the job ended before {what}")));
        }
        if Duration::from_nanos(now_ns() - begun) > limit {
            return Err(Failure::Run(format!("waited {limit:?} until {what}, in vain")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Kills one worker and waits until all is as before.
fn kill(running: &Running, view: &View, victim: usize) -> Result<Recovery, Failure> {
    let header = view.workers[victim];
    let others: Vec<&WorkerHeader> = view
        .workers
        .iter()
        .enumerate()
        .filter(|(i, _)| *i != victim)
        .map(|(_, other)| *other)
        .collect();
    let counts: Vec<u64> =
        others.iter().map(|other| other.gap_count.load(Ordering::Acquire)).collect();
    let pid = header.pid.load(Ordering::Acquire).cast_signed();
    let killed_ns = now_ns();
    // SAFETY: plain system call; the process is a worker of our own job.
    if unsafe { libc::kill(pid, libc::SIGKILL) } != 0 {
        return Err(Failure::Run(format!(
            "worker {victim} (process {pid}) is not there to be killed"
        )));
    }
    let limit = Duration::from_secs(20);
    let first_commit = || header.first_commit_ns.load(Ordering::Acquire);
    wait_until(running, "the victim's successor commits", limit, || first_commit() > killed_ns)?;
    let back_ns = first_commit();
    let attached_ns = header.attached_ns.load(Ordering::Acquire);
    // A pause that is still open ends with a commit after `back_ns`; without one, it counts as it
    // stands.
    let goes_on = |other: &&WorkerHeader| other.commit_ns.load(Ordering::Acquire) > back_ns;
    let all_go_on = || others.iter().all(goes_on);
    let _ = wait_until(running, "the others commit", Duration::from_millis(500), all_go_on);
    let gap =
        |(other, count): (&&WorkerHeader, &u64)| longest_gap(other, *count, killed_ns, back_ns);
    Ok(Recovery {
        to_attached: attached_ns.saturating_sub(killed_ns),
        to_first_commit: back_ns - killed_ns,
        others_gap: others.iter().zip(&counts).map(gap).max().unwrap_or(0),
    })
}

/// The longest pause of a worker that overlaps `[from, to]`, of those noted since `seen`; the least
/// that is noted when there is none.
fn longest_gap(header: &WorkerHeader, seen: u64, from: u64, to: u64) -> u64 {
    let count = header.gap_count.load(Ordering::Acquire);
    let kept = header.gaps.len() as u64;
    let mut longest = GAP_NS;
    for index in seen.max(count.saturating_sub(kept))..count {
        let gap = &header.gaps[(index % kept) as usize];
        let (begun, ended) =
            (gap.from_ns.load(Ordering::Relaxed), gap.to_ns.load(Ordering::Relaxed));
        if begun < to && ended > from {
            longest = longest.max(ended.saturating_sub(begun));
        }
    }
    let last = header.commit_ns.load(Ordering::Acquire);
    if last < to {
        longest = longest.max(now_ns().saturating_sub(last));
    }
    longest
}

/// Memory that the key groups of all jobs of this process take: it holds their segments.
fn group_bytes() -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        let name = std::fs::read_link(entry.path()).unwrap_or_default();
        let name = name.to_string_lossy();
        let is_group = name.contains("memfd:perf-recovery-") && name.contains("-g");
        if let (true, Ok(data)) = (is_group, std::fs::metadata(entry.path())) {
            files.insert(data.ino(), data.blocks() * 512);
        }
    }
    files.values().sum()
}

/// Compares every key's count with the events that the sources emitted: lost, doubled, events.
fn account(report: &Report, keys: u64, finals: &Path) -> Result<(u64, u64, u64), Failure> {
    let (step, mut events) = (report.workers as u64, 0);
    let mut wanted = vec![0u64; usize::try_from(keys).unwrap_or(0)];
    for index in 0..step {
        let emitted = report.counters.get(&emitted_name(index)).copied().unwrap_or(0);
        for n in (0..emitted).map(|i| index + i * step) {
            wanted[(splitmix64(n) % keys) as usize] += 1;
        }
        events += emitted;
    }
    let mut found = vec![None; wanted.len()];
    for entry in std::fs::read_dir(finals)? {
        for line in std::fs::read_to_string(entry?.path())?.lines() {
            let numbers =
                line.split_once(' ').and_then(|(k, v)| k.parse().ok().zip(v.parse::<u64>().ok()));
            let place =
                numbers.and_then(|(key, value): (usize, _)| Some((found.get_mut(key)?, value)));
            match place {
                Some((place @ None, value)) => *place = Some(value),
                _ => {
                    return Err(Failure::Wrong(format!(
                        "the final count {line:?} is damaged or doubled"
                    )));
                }
            }
        }
    }
    let (mut lost, mut doubled) = (0, 0);
    for (wanted, found) in wanted.iter().zip(&found) {
        let found = found.unwrap_or(0);
        lost += wanted.saturating_sub(found);
        doubled += found.saturating_sub(*wanted);
    }
    Ok((lost, doubled, events))
}
