//! Recovery: w1 at full speed or at a rate, while workers are killed.
//!
//! Measured for each SIGKILL: from the kill to the first commit of the victim's successor, and the
//! longest time that any other worker went without a commit in between (a pause that ends later
//! counts whole). The workers themselves note both in their headers; this process only reads them,
//! so its own sleep is not in the figures.
//!
//! Accounting is exact, key by key. Each source first makes keys of its own, uncounted, until the
//! state is as large as asked for; then it emits events with these keys until it finds the file
//! `stop`; then a query for each of them. Since a producer's records stay in order, the query has
//! seen every event of its key: the count goes to a file. It must equal the number of events with
//! that key that the source says it emitted; the rest is lost or doubled. What the engine itself
//! says it dropped is subtracted from what is missing: the rest is unaccounted for.
//!
//! What is done to a worker, and what brings it back, is the choice of `means`; `partial` is about
//! peers of a worker that stays down.
//!
//! Called by `main`.

mod means;

mod hotupdate;

mod partial;

pub mod supervisor;

use crate::regime;
use crate::report::{Failure, Line, Lines, Params, quantile};
use crate::workloads::splitmix64;
use crate::{EngineArgs, scratch};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::config::Completeness;
use testudo::metrics::{Counter, GAP_NS};
use testudo::prelude::*;
use testudo::sink::file::Lines as TextLines;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::supervisor::launch::{Running, View};
use testudo::supervisor::report::Restart;
use testudo::time::now_ns;
use testudo_shm::header::WorkerHeader;
use testudo_shm::primitive::Ordering;
use testudo_shm::zerocopy;

/// Recovery.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What brings a worker back
    #[arg(long, value_enum, default_value_t = means::Means::Respawn, value_name = "MEANS")]
    tier: means::Means,
    /// SIGKILLs
    #[arg(long, default_value_t = 20, value_name = "K")]
    kills: usize,
    /// Events a second, all sources together [default: full speed]
    #[arg(long, value_name = "R")]
    rate: Option<u64>,
    /// State of the whole job before the first kill, at least, in MiB; the result says how much it
    /// was [default: a million keys]
    #[arg(long, value_name = "M")]
    state_mib: Option<u64>,
    /// Milliseconds between a recovery and the next kill, at least; up to twice that, at random
    #[arg(long, default_value_t = 30, value_name = "MS")]
    pause_ms: u64,
    /// Seed of the choice of victims and moments
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Completeness of the job: with partial, one worker is killed and held down, and its peers are
    /// watched
    #[arg(long, value_enum)]
    completeness: Option<Completeness>,
    /// Milliseconds that it is held down
    #[arg(long, default_value_t = 5000, value_name = "MS")]
    hold_ms: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Keys of w1, when nothing is said about the state.
const KEYS: u64 = 1_000_000;

/// What every process of the job is told.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Plan {
    /// Keys to make, unless the file `full` is there before.
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

/// The count of a key that its source has asked for.
#[testudo::record]
struct Final {
    key: u64,
    value: u64,
}

struct Events {
    plan: Plan,
    /// What each subtask has emitted, told at the end of a phase: keys, events.
    emitted: Vec<(Counter, Counter)>,
}

/// Where a source stands.
#[derive(Debug, Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
#[zerocopy(crate = "testudo_shm::zerocopy")]
#[repr(C)]
struct Place {
    /// `FILL`, `EVENT` or `QUERY`.
    phase: u64,
    /// Keys made, events emitted or keys asked for in this phase.
    next: u64,
    /// Keys made in all.
    keys: u64,
}

struct EventsReader {
    plan: Plan,
    subtask: Subtask,
    emitted: (Counter, Counter),
    /// When to look for a file again.
    look_ns: u64,
    /// When event `paced.1` was due: this reader's own schedule, begun when it was opened.
    paced: Option<(u64, u64)>,
}

/// Time between two looks for a file.
const LOOK_NS: u64 = 1_000_000;

impl Source for Events {
    type Out = Work;
    type Position = Place;
    type Reader = EventsReader;

    fn start(&self, _subtask: Subtask) -> Place {
        Place { phase: FILL, next: 0, keys: 0 }
    }

    fn open(&self, subtask: Subtask, _from: &Place) -> Result<EventsReader, String> {
        let emitted = *self.emitted.get(subtask.index).ok_or("more subtasks than workers")?;
        Ok(EventsReader { plan: self.plan.clone(), subtask, emitted, look_ns: 0, paced: None })
    }
}

impl EventsReader {
    /// The subtask's own key number `n`.
    fn key(&self, n: u64) -> u64 {
        own_key(self.subtask.index as u64, self.subtask.count as u64, n)
    }

    /// Whether the launching process has made a file, looking for it now and then.
    fn finds(&mut self, file: &str, now: u64) -> bool {
        let is_time = now >= self.look_ns;
        if is_time {
            self.look_ns = now + LOOK_NS;
        }
        is_time && self.plan.folder.join(file).exists()
    }

    /// How many events may be emitted now, or when the next one is due.
    fn allowance(&mut self, now: u64, next: u64, max: usize) -> Result<usize, u64> {
        let Some(rate) = self.plan.rate else {
            return Ok(max);
        };
        let (begun, first) = *self.paced.get_or_insert((now, next));
        let own_rate = rate as f64 / self.subtask.count as f64;
        let due = begun + ((next - first) as f64 * 1e9 / own_rate) as u64;
        if due > now {
            return Err(due);
        }
        Ok(max.min(((now - due) as f64 * own_rate / 1e9) as usize + 1))
    }

    /// Makes keys; true when there are enough.
    fn fill(&mut self, at: &mut Place, max: usize, out: &mut impl Collect<Work>) -> bool {
        let own = self.plan.keys.div_ceil(self.subtask.count as u64);
        let count = (max as u64).min(own - at.next);
        for n in at.next..at.next + count {
            out.emit(Work { key: self.key(n), what: FILL, n, filler: 0 });
        }
        at.next += count;
        at.next == own || (at.next > 0 && self.finds("full", now_ns()))
    }

    fn events(&mut self, at: &mut Place, max: usize, out: &mut impl Collect<Work>) -> Progress {
        let now = now_ns();
        if self.finds("stop", now) {
            self.emitted.1.add(at.next);
            *at = Place { phase: QUERY, next: 0, ..*at };
            return Progress::More;
        }
        let count = match self.allowance(now, at.next, max) {
            Ok(count) => count as u64,
            Err(until_ns) => return Progress::Idle { until_ns },
        };
        for n in at.next..at.next + count {
            let key = self.key(splitmix64(n) % at.keys);
            out.emit(Work { key, what: EVENT, n, filler: 0 });
        }
        at.next += count;
        Progress::More
    }

    fn query(&self, at: &mut Place, max: usize, out: &mut impl Collect<Work>) -> Progress {
        let count = (max as u64).min(at.keys - at.next);
        for n in at.next..at.next + count {
            out.emit(Work { key: self.key(n), what: QUERY, n, filler: 0 });
        }
        at.next += count;
        if at.next == at.keys { Progress::End } else { Progress::More }
    }
}

impl Reader<Work, Place> for EventsReader {
    fn read(
        &mut self,
        at: &mut Place,
        max: usize,
        out: &mut impl Collect<Work>,
    ) -> Result<Progress, String> {
        match at.phase {
            FILL => {
                if self.fill(at, max, out) {
                    let done = self.plan.folder.join(format!("filled-{}", self.subtask.index));
                    std::fs::write(&done, "")
                        .map_err(|error| format!("cannot write {}: {error}", done.display()))?;
                    self.emitted.0.add(at.next);
                    *at = Place { phase: EVENT, next: 0, keys: at.next };
                }
                Ok(Progress::More)
            }
            EVENT => Ok(self.events(at, max, out)),
            _ => Ok(self.query(at, max, out)),
        }
    }
}

/// Key number `n` of subtask `index` of `count`.
fn own_key(index: u64, count: u64, n: u64) -> u64 {
    index + n * count
}

/// The job, in every process. Parameters: a [`Plan`].
fn job(flow: &Flow, parameters: &str) {
    let Ok(plan) = serde_json::from_str::<Plan>(parameters) else {
        return;
    };
    let counters = |index| (flow.counter(&keys_name(index)), flow.counter(&events_name(index)));
    let emitted = (0..flow.workers() as u64).map(counters).collect();
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
        .filter(|row| row.value >> COUNT_BITS > 0)
        .sink("finals", FileSink::folder(finals, "txt", TextLines(text)));
}

fn keys_name(index: u64) -> String {
    format!("keys-{index}")
}

fn events_name(index: u64) -> String {
    format!("events-{index}")
}

/// What one kill led to, nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Recovery {
    killed_ns: u64,
    to_attached: u64,
    to_first_commit: u64,
    others_gap: u64,
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.completeness == Some(Completeness::Partial) {
        return partial::run(args);
    }
    if args.tier == means::Means::Supervisor {
        return supervisor::run(args);
    }
    if args.kills == 0 || args.rate == Some(0) || args.state_mib == Some(0) {
        return Err(Failure::Usage("--kills, --rate and --state-mib must be at least 1".into()));
    }
    let folder = scratch::Folder::new()?;
    let keys = if args.state_mib.is_some() { u64::MAX } else { KEYS };
    let plan = Plan { keys, rate: args.rate, folder: folder.path().into() };
    let engine = match args.tier {
        means::Means::Replica => args.engine.with_replicas(),
        _ => args.engine.clone(),
    };
    let settings = args.tier.settings(engine.settings("perf-recovery")?);
    let parameters = serde_json::to_string(&plan).unwrap_or_default();
    let job = Job::new(job).parameters(parameters).settings(settings.clone());
    let (regime, result) = regime::around(|| args.tier.play(job, args, folder.path()));
    let Played { recoveries, state_bytes, report } = result?;
    let Account { keys, events, found, lost, doubled } =
        account(report.workers as u64, &report.counters, &folder.path().join("finals"))?;
    let mut params = Params::new();
    params.insert("tier".into(), args.tier.label().into());
    params.insert("kills".into(), args.kills.into());
    params.insert("rate".into(), args.rate.into());
    params.insert("state_mib".into(), (state_bytes >> 20).into());
    params.insert("keys".into(), keys.into());
    params.insert("events".into(), events.into());
    engine.describe(&settings, &mut params);
    let mut lines = Lines::new("recovery", params, regime);
    let by = |tier| report.restarts.iter().filter(|restart| restart.tier == tier).count();
    lines.add("by_standby", by(Tier::Standby), "restarts");
    lines.add("by_replica", by(Tier::Replica), "restarts");
    let differences: u64 = report.replicas.iter().map(|replica| replica.mismatches).sum();
    lines.add("replica_mismatches", differences, "comparisons");
    if report.restarts.len() == recoveries.len() {
        let seen = report.restarts.iter().zip(&recoveries);
        let to_seen = |(restart, recovery): (&Restart, &Recovery)| {
            restart.seen_ns.saturating_sub(recovery.killed_ns)
        };
        add(&mut lines, "kill_to_seen_us", seen.map(to_seen));
    }
    add(&mut lines, "kill_to_attached_us", recoveries.iter().map(|r| r.to_attached));
    add(&mut lines, "kill_to_first_commit_us", recoveries.iter().map(|r| r.to_first_commit));
    if settings.workers > 1 {
        add(&mut lines, "others_gap_us", recoveries.iter().map(|r| r.others_gap));
    }
    lines.add("lost", lost, "records");
    lines.add("doubled", doubled, "records");
    lines.add("dropped", report.dropped, "records");
    // The job ran to its end, so nothing is left in a ring.
    let accounted = i128::from(found) + i128::from(report.dropped);
    let unaccounted = i64::try_from(i128::from(events) - accounted).unwrap_or(i64::MAX);
    lines.add("unaccounted", unaccounted, "records");
    Ok(lines.finish())
}

fn add(lines: &mut Lines, name: &str, nanos: impl Iterator<Item = u64>) {
    let mut sorted: Vec<u64> = nanos.collect();
    sorted.sort_unstable();
    for (suffix, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
        lines.add(&format!("{name}_{suffix}"), quantile(&sorted, q) as f64 / 1e3, "us");
    }
}

/// How a run went.
struct Played {
    recoveries: Vec<Recovery>,
    /// Bytes of state before the first strike.
    state_bytes: u64,
    report: Report,
}

/// Does something to a worker and waits until all is as before.
type Strike = fn(&Running, &View, usize) -> Result<Recovery, Failure>;

/// Runs the job, strikes, stops it.
fn play(job: Job, args: &Args, folder: &Path, strike: Strike) -> Result<Played, Failure> {
    let running = job.start();
    let Some(view) = running.workers() else {
        running.join()?;
        return Err(Failure::Run("the job ended before it started".into()));
    };
    let is_filled = || {
        if args.state_mib.is_some_and(|mib| group_bytes() >= mib << 20) {
            // If it cannot be written, the state grows until the time is over, which says so.
            let _ = std::fs::write(folder.join("full"), "");
        }
        (0..view.workers.len()).all(|index| folder.join(format!("filled-{index}")).exists())
    };
    wait_until(&running, "all keys are there", Duration::from_secs(100), is_filled)?;
    std::thread::sleep(Duration::from_millis(200));
    let state_bytes = group_bytes();
    let mut random = args.seed;
    let mut recoveries = Vec::new();
    for _ in 0..args.kills {
        random = splitmix64(random);
        let pause = args.pause_ms * 1000 + random % (args.pause_ms * 1000).max(1);
        std::thread::sleep(Duration::from_micros(pause));
        let victim = (random >> 32) as usize % view.workers.len();
        let is_followed = || view.replicas().iter().all(|replica| replica.follows);
        wait_until(&running, "the replicas follow", Duration::from_secs(20), is_followed)?;
        match strike(&running, &view, victim) {
            Ok(recovery) => recoveries.push(recovery),
            // The job's own error says more than ours.
            Err(failure) if running.is_over() => {
                return Err(running.join().map_or_else(Failure::from, |_| failure));
            }
            Err(failure) => return Err(failure),
        }
    }
    std::fs::write(folder.join("stop"), "")?;
    Ok(Played { recoveries, state_bytes, report: running.join()? })
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
        killed_ns,
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

/// What became of the events.
#[derive(Debug, Default)]
struct Account {
    keys: u64,
    events: u64,
    /// Events that were counted.
    found: u64,
    lost: u64,
    doubled: u64,
}

/// Compares every key's count with the events that its source emitted.
fn account(
    sources: u64,
    counters: &BTreeMap<String, u64>,
    finals: &Path,
) -> Result<Account, Failure> {
    let mut found = read_finals(finals)?;
    let mut account = Account::default();
    for index in 0..sources {
        let counter = |name: String| counters.get(&name).copied().unwrap_or(0);
        let (keys, events) = (counter(keys_name(index)), counter(events_name(index)));
        let mut wanted = vec![0u64; usize::try_from(keys).unwrap_or(0)];
        for n in 0..events {
            wanted[(splitmix64(n) % keys) as usize] += 1;
        }
        for (n, wanted) in wanted.into_iter().enumerate() {
            let found = found.remove(&own_key(index, sources, n as u64)).unwrap_or(0);
            account.found += found;
            account.lost += wanted.saturating_sub(found);
            account.doubled += found.saturating_sub(wanted);
        }
        account.keys += keys;
        account.events += events;
    }
    match found.into_iter().next() {
        Some((key, count)) => {
            Err(Failure::Wrong(format!("key {key} has {count} events, nobody sent any")))
        }
        None => Ok(account),
    }
}

/// The final count of each key.
fn read_finals(folder: &Path) -> Result<HashMap<u64, u64>, Failure> {
    let mut found = HashMap::new();
    for entry in std::fs::read_dir(folder)? {
        for line in std::fs::read_to_string(entry?.path())?.lines() {
            let numbers = line.split_once(' ');
            let parsed = numbers.and_then(|(key, count)| {
                Some((key.parse::<u64>().ok()?, count.parse::<u64>().ok()?))
            });
            match parsed {
                Some((key, count)) if found.insert(key, count).is_none() => {}
                _ => return Err(Failure::Wrong(format!("the row {line:?} is damaged or doubled"))),
            }
        }
    }
    Ok(found)
}
