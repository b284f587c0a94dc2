//! Partial completeness: one worker is killed and held down for a while, and its peers are watched.
//!
//! Each source emits the events that are due by one clock that all share, with the time at which
//! each *should* have been sent (no coordinated omission); at full speed, with the time at which it
//! was. Behind the count, the time is taken. What counts here are the events that a peer of the
//! victim sent and a peer counted: those due in the time before the kill, and those due from the
//! kill to the moment at which a successor may come.
//!
//! The account comes from the engine's own report: sent, processed, dropped, and what neither is.
//!
//! Called by `recovery`.

use super::Args;
use crate::regime::{self, histogram};
use crate::report::{Failure, Line, Lines, Params};
use crate::scratch;
use crate::workloads::splitmix64;
use hdrhistogram::Histogram;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testudo::config::{Completeness, Idle, Settings};
use testudo::prelude::*;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::time::now_ns;
use testudo_shm::primitive::Ordering;

/// Keys of the count.
const KEYS: u64 = 100_000;

/// From the launch to the first event.
const SETTLING: Duration = Duration::from_millis(800);

/// Events before those that count, and behind the time in which the victim is down.
const AROUND: Duration = Duration::from_secs(1);

/// The worker that is held down.
const VICTIM: usize = 1;

/// Events are kept apart by this much of their time.
const SLOT_NS: u64 = 10_000_000;

/// What every process of the job is told.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Plan {
    rate: Option<u64>,
    begun_ns: u64,
    end_ns: u64,
    folder: PathBuf,
}

/// 32 bytes, as in w1.
#[testudo::record]
struct Timed {
    key: u64,
    from: u64,
    due_ns: u64,
    filler: u64,
}

#[testudo::record]
struct Counted {
    count: u64,
    from: u64,
    due_ns: u64,
}

#[derive(Debug)]
struct Due(Plan);

struct DueReader {
    plan: Plan,
    subtask: Subtask,
}

impl Source for Due {
    type Out = Timed;
    type Position = u64;
    type Reader = DueReader;

    fn start(&self, _subtask: Subtask) -> u64 {
        0
    }

    fn open(&self, subtask: Subtask, _from: &u64) -> Result<DueReader, String> {
        Ok(DueReader { plan: self.0.clone(), subtask })
    }
}

impl Reader<Timed, u64> for DueReader {
    fn read(
        &mut self,
        at: &mut u64,
        max: usize,
        out: &mut impl Collect<Timed>,
    ) -> Result<Progress, String> {
        let (now, from) = (now_ns(), self.subtask.index as u64);
        if now < self.plan.begun_ns {
            return Ok(Progress::Idle { until_ns: self.plan.begun_ns });
        }
        let due = |n: u64| match self.plan.rate {
            None => now,
            Some(rate) => {
                let nanos = u128::from(n) * 1_000_000_000 * self.subtask.count as u128;
                self.plan.begun_ns + (nanos / u128::from(rate)) as u64
            }
        };
        for _ in 0..max {
            let due_ns = due(*at);
            if due_ns >= self.plan.end_ns {
                return Ok(Progress::End);
            }
            if due_ns > now {
                return Ok(Progress::Idle { until_ns: due_ns });
            }
            out.emit(Timed { key: splitmix64(*at) % KEYS, from, due_ns, filler: 0 });
            *at += 1;
        }
        Ok(Progress::More)
    }
}

/// Latencies of one worker, by the time at which events were due; they go to a file when it ends.
struct Recorder {
    folder: PathBuf,
    slots: RefCell<BTreeMap<u64, Histogram<u64>>>,
    /// The slot of the latest event.
    open: RefCell<(u64, Histogram<u64>)>,
}

impl Recorder {
    fn new(folder: PathBuf) -> Self {
        Self { folder, slots: RefCell::default(), open: RefCell::new((0, histogram())) }
    }

    fn note(&self, counted: &Counted) {
        if counted.from == VICTIM as u64 {
            return;
        }
        let (slot, taken) = (counted.due_ns / SLOT_NS, now_ns().saturating_sub(counted.due_ns));
        let mut open = self.open.borrow_mut();
        if open.0 != slot {
            let full = std::mem::replace(&mut *open, (slot, histogram()));
            self.close(full);
        }
        open.1.saturating_record(taken.max(1));
    }

    fn close(&self, (slot, of): (u64, Histogram<u64>)) {
        let mut slots = self.slots.borrow_mut();
        // Both have the same bounds.
        let _ = slots.entry(slot).or_insert_with(histogram).add(&of);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // The launching process draws the same flow and drops it: it has nothing to write. The
        // victim's successor is no peer: what it counts has waited for it in a ring.
        if self.open.borrow().1.is_empty() || is_victim() {
            return;
        }
        self.close(self.open.replace((0, histogram())));
        let mut text = String::new();
        for (slot, of) in self.slots.borrow().iter() {
            for bucket in of.iter_recorded() {
                let (value, count) = (bucket.value_iterated_to(), bucket.count_at_value());
                let _ = writeln!(text, "{slot} {value} {count}");
            }
        }
        let path = self.folder.join(format!("slots-{}", std::process::id()));
        if let Err(error) = std::fs::write(&path, text) {
            eprintln!("testudo-perf: cannot write {}: {error}", path.display());
        }
    }
}

/// Whether this process is the worker that is held down, by its name.
fn is_victim() -> bool {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    name.trim_end() == format!("testudo-w{VICTIM}")
}

/// The job, in every process. Parameters: a [`Plan`].
fn job(flow: &Flow, parameters: &str) {
    let Ok(plan) = serde_json::from_str::<Plan>(parameters) else {
        return;
    };
    let recorder = Recorder::new(plan.folder.clone());
    flow.source("events", Due(plan))
        .key_by(|timed| timed.key)
        .aggregate(
            || Counted { count: 0, from: 0, due_ns: 0 },
            |counted, timed| {
                let count = counted.count + 1;
                *counted = Counted { count, from: timed.from, due_ns: timed.due_ns };
            },
            |_, counted| *counted,
        )
        .for_each(move |counted| recorder.note(counted));
}

/// When the victim was down: from its kill to the moment at which a successor might come.
struct Held {
    from_ns: u64,
    to_ns: u64,
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    let hold = Duration::from_millis(args.hold_ms);
    if args.engine.workers() < 2 || args.rate == Some(0) || hold < Duration::from_millis(100) {
        return Err(Failure::Usage(
            "a worker that is held down needs a peer: --workers 2 or more, --rate at least 1, \
             --hold-ms at least 100"
                .into(),
        ));
    }
    let folder = scratch::Folder::new()?;
    let mut engine = args.engine.clone();
    engine.idle = Some(engine.idle.unwrap_or(Idle::Spin));
    let settings =
        Settings { completeness: Some(Completeness::Partial), ..engine.settings("perf-partial")? };
    let begun_ns = now_ns() + SETTLING.as_nanos() as u64;
    let kill_ns = begun_ns + (AROUND + hold).as_nanos() as u64;
    let end_ns = kill_ns + (hold + AROUND).as_nanos() as u64;
    let plan = Plan { rate: args.rate, begun_ns, end_ns, folder: folder.path().into() };
    let parameters = serde_json::to_string(&plan).unwrap_or_default();
    let job = Job::new(job).parameters(parameters).settings(settings.clone());
    let (regime, result) = regime::around(|| play(job, kill_ns, hold));
    let (held, report) = result?;
    let slots = slots(folder.path())?;
    let first = begun_ns + AROUND.as_nanos() as u64;
    let before = between(&slots, first, held.from_ns);
    let during = between(&slots, held.from_ns, held.to_ns);
    if before.is_empty() || during.is_empty() {
        return Err(Failure::Wrong("the peers counted nothing of their own".into()));
    }
    let mut params = Params::new();
    params.insert("completeness".into(), "partial".into());
    params.insert("hold_ms".into(), args.hold_ms.into());
    params.insert("rate".into(), args.rate.into());
    engine.describe(&settings, &mut params);
    let mut lines = Lines::new("recovery", params, regime);
    for (name, q) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)] {
        for (when, of) in [("before", &before), ("during", &during)] {
            let name = format!("peers_latency_us_{name}_{when}");
            lines.add(&name, of.value_at_quantile(q) as f64 / 1e3, "us");
        }
    }
    let per_s =
        |of: &Histogram<u64>, from: u64, to: u64| of.len() as f64 * 1e9 / (to - from) as f64;
    lines.add("peers_rate_before", per_s(&before, first, held.from_ns), "records/s");
    lines.add("peers_rate_during", per_s(&during, held.from_ns, held.to_ns), "records/s");
    let sum = |of: fn(&testudo::supervisor::report::EdgeAccount) -> u64| {
        report.edges.iter().map(of).sum::<u64>()
    };
    lines.add("sent", sum(|edge| edge.sent), "records");
    lines.add("processed", sum(|edge| edge.processed), "records");
    lines.add("dropped", sum(|edge| edge.dropped), "records");
    lines.add("unaccounted", report.unaccounted, "records");
    Ok(lines.finish())
}

/// Runs the job; kills the victim at a time and holds its successor back.
fn play(job: Job, kill_ns: u64, hold: Duration) -> Result<(Held, Report), Failure> {
    let running = job.start();
    let Some(view) = running.workers() else {
        running.join()?;
        return Err(Failure::Run("the job ended before it started".into()));
    };
    std::thread::sleep(Duration::from_nanos(kill_ns.saturating_sub(now_ns())));
    running.hold(VICTIM, true);
    let header = view.workers[VICTIM];
    let pid = header.pid.load(Ordering::Acquire).cast_signed();
    let commits = header.commits.load(Ordering::Acquire);
    let from_ns = now_ns();
    // SAFETY: plain system call; the process is a worker of our own job.
    if commits == 0 || unsafe { libc::kill(pid, libc::SIGKILL) } != 0 {
        running.stop();
        running.stop();
        return Err(running.join().map_or_else(Failure::from, |_| {
            Failure::Run(format!("worker {VICTIM} (process {pid}) is not there to be killed"))
        }));
    }
    std::thread::sleep(hold);
    let to_ns = now_ns();
    running.hold(VICTIM, false);
    let report = running.join()?;
    Ok((Held { from_ns, to_ns }, report))
}

/// What the workers have written: latencies by slot.
fn slots(folder: &Path) -> Result<BTreeMap<u64, Histogram<u64>>, Failure> {
    let mut slots = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        for line in std::fs::read_to_string(entry?.path())?.lines() {
            let mut fields = line.split(' ').map(str::parse::<u64>);
            let mut next = || fields.next()?.ok();
            let (Some(slot), Some(value), Some(count)) = (next(), next(), next()) else {
                return Err(Failure::Run(format!("a worker's latencies are damaged: {line}")));
            };
            slots.entry(slot).or_insert_with(histogram).saturating_record_n(value, count);
        }
    }
    Ok(slots)
}

/// The slots that lie between two times, whole.
fn between(slots: &BTreeMap<u64, Histogram<u64>>, from_ns: u64, to_ns: u64) -> Histogram<u64> {
    let mut all = histogram();
    for (_, of) in slots.range(from_ns.div_ceil(SLOT_NS)..to_ns / SLOT_NS) {
        // Both have the same bounds.
        let _ = all.add(of);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_lie_between_two_times_whole() {
        let mut slots = BTreeMap::new();
        for slot in 0..10 {
            slots.entry(slot).or_insert_with(histogram).saturating_record(slot + 1);
        }
        let some = between(&slots, 2 * SLOT_NS, 5 * SLOT_NS - 1);
        assert_eq!((some.len(), some.min(), some.max()), (2, 3, 4));
    }
}
