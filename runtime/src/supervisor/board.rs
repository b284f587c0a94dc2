//! The board: everything that the job tells about itself in numbers, put together from the workers'
//! pages and from what the supervisor's loop knows.
//!
//! Invariants:
//! - the loop only leaves what it knows here, and never waits for a reader: where one is at the
//!   board at that moment, it comes back in its next turn;
//! - what is read from workers' pages is single words, each good by itself (R23); sums never go
//!   back: a worker that takes its open step back is seen to stand still;
//! - rates are of the last seconds, sampled once a second.
//!
//! Made by `launch`; asked by `orders` (status) and by the thread of `metrics/serve`.

#![expect(unsafe_code, reason = "reads counters and positions in mapped pages")]

use super::launch::Scene;
use super::replicas::Replicas;
use super::report::Restart;
use crate::config::Settings;
use crate::error::Error;
use crate::exchange::account::{self, EdgeCount};
use crate::metrics::figures::{
    CheckpointFigures, EdgeFigures, External, ExternalState, Figures, OperatorFigures,
    RecoveryFigures, UserFigure, WorkerFigures,
};
use crate::metrics::serve::{MetricsServer, Served};
use crate::plan::layout::COUNTERS_AT;
use crate::plan::{CounterKind, Plan};
use crate::time::now_ns;
use std::collections::{BTreeMap, VecDeque};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use testudo_shm::counters::{Counter, ENTRY};
use testudo_shm::header::{self, OutsideState, WorkerHeader, WorkerState};
use testudo_shm::primitive::{AtomicU64, Ordering};

/// Time between two samples.
const SAMPLE_NS: u64 = 1_000_000_000;

/// Samples that a rate looks back over.
const SAMPLES: usize = 5;

/// A supervisor whose loop has not turned for so long is not at work.
const STUCK_NS: u64 = 10_000_000_000;

/// Numbers of each worker in front of its counters, see [`Pages::read`].
const OF_WORKER: usize = 5;

/// The words in workers' pages.
#[derive(Debug)]
struct Pages {
    workers: Vec<&'static WorkerHeader>,
    /// Tail and head of each ring of the plan.
    rings: Vec<[&'static AtomicU64; 2]>,
    /// By worker.
    counters: Vec<Vec<&'static Counter>>,
}

/// What the loop has told.
#[derive(Debug, Default)]
struct Told {
    restarts: BTreeMap<String, u64>,
    restarts_total: u64,
    /// Restarts that are counted in `restarts` and in `recovery`.
    counted: usize,
    recovered: usize,
    recovery: RecoveryFigures,
    checkpoints: Option<CheckpointFigures>,
}

/// What was read, made so that it does not go back.
#[derive(Debug, Default)]
struct Marks {
    sums: Vec<u64>,
    /// As last read, and what rings had moved before they began anew.
    raw: Vec<u64>,
    base: Vec<u64>,
    samples: VecDeque<(u64, Vec<u64>)>,
}

/// Systems outside of the job that the launching process uses, by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Externals(Arc<Mutex<BTreeMap<String, External>>>);

impl Externals {
    /// A try failed.
    pub(crate) fn failed(&self, name: &str, state: ExternalState, error: impl Into<String>) {
        self.change(name, |external| external.failed(state, error.into()));
    }

    /// It works.
    pub(crate) fn works(&self, name: &str) {
        self.change(name, External::works);
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut External)) {
        let mut all = lock(&self.0);
        change(
            all.entry(name.into())
                .or_insert_with(|| External { name: name.into(), ..External::default() }),
        );
    }

    fn all(&self) -> Vec<External> {
        lock(&self.0).values().cloned().collect()
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Board {
    plan: Plan,
    job: String,
    begun_ns: u64,
    pages: Pages,
    replicas: Replicas,
    told: Mutex<Told>,
    marks: Mutex<Marks>,
    turned_ns: AtomicU64,
    pub(crate) externals: Externals,
}

/// Whoever panicked at the board has left whole values: each is put there at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Pages {
    fn new(plan: &Plan, scene: &Scene) -> Self {
        let segments = &plan.layout.segments;
        let word = |at: usize| {
            // SAFETY: all positions lie in the fronts of segments, which are mapped for good.
            unsafe { header::at::<AtomicU64>(scene.arena.at(at)) }
        };
        let rings = plan.layout.rings.iter().map(|ring| {
            let tail = word(segments[ring.from].at + ring.tail_word);
            [tail, word(segments[ring.to].at + ring.head_word)]
        });
        let counters = segments[..plan.workers].iter().map(|segment| {
            let at = |index: usize| segment.at + COUNTERS_AT + index * ENTRY;
            (0..plan.layout.counters)
                // SAFETY: as above: counters are a part of the fronts.
                .map(|index| unsafe { header::at::<Counter>(scene.arena.at(at(index))) })
                .collect()
        });
        Self {
            workers: scene.workers.clone(),
            rings: rings.collect(),
            counters: counters.collect(),
        }
    }

    /// All numbers that grow: five of each worker, two of each ring, all counters by worker.
    fn read(&self) -> Vec<u64> {
        let get = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let mut all = Vec::new();
        for worker in &self.workers {
            let times = &worker.times;
            let words = [&times.busy_ns, &times.idle_ns, &times.pressed_ns, &times.waiting_ns];
            all.extend(words.map(get));
            all.push(get(&worker.commits));
        }
        all.extend(self.rings.iter().flatten().copied().map(get));
        all.extend(self.counters.iter().flatten().map(|counter| counter.value()));
        all
    }
}

impl Marks {
    /// Takes in what was read; `rings` are the numbers of positions, which begin anew when their
    /// region does.
    fn take(&mut self, read: Vec<u64>, rings: std::ops::Range<usize>) {
        self.sums.resize(read.len(), 0);
        self.raw.resize(read.len(), 0);
        self.base.resize(read.len(), 0);
        for (at, value) in read.iter().enumerate() {
            if rings.contains(&at) && *value < self.raw[at] {
                self.base[at] = self.sums[at];
            }
            self.sums[at] = self.sums[at].max(self.base[at].saturating_add(*value));
        }
        self.raw = read;
    }

    fn sample(&mut self, now: u64) {
        if self.samples.back().is_some_and(|(at, _)| now < at + SAMPLE_NS) {
            return;
        }
        self.samples.push_back((now, self.sums.clone()));
        if self.samples.len() > SAMPLES + 1 {
            self.samples.pop_front();
        }
    }

    /// How much each sum has grown a second.
    fn rates(&self, now: u64) -> Vec<f64> {
        let Some((at, before)) = self.samples.front().filter(|(at, _)| now > at + SAMPLE_NS / 10)
        else {
            return vec![0.0; self.sums.len()];
        };
        let seconds = (now - at) as f64 / 1e9;
        let grown = |(sum, before): (&u64, &u64)| sum.saturating_sub(*before) as f64 / seconds;
        self.sums.iter().zip(before).map(grown).collect()
    }
}

impl Board {
    /// A board for a job whose segments are there.
    pub(crate) fn new(plan: &Plan, settings: &Settings, scene: &Scene, begun_ns: u64) -> Arc<Self> {
        let now = now_ns();
        Arc::new(Self {
            plan: plan.clone(),
            job: settings.name.clone(),
            begun_ns,
            pages: Pages::new(plan, scene),
            replicas: Replicas::new(plan, scene),
            told: Mutex::default(),
            marks: Mutex::default(),
            turned_ns: AtomicU64::new(now),
            externals: Externals::default(),
        })
    }

    /// Serves the numbers, and says where.
    pub(crate) fn serve(self: &Arc<Self>, listener: TcpListener) -> Result<MetricsServer, Error> {
        let server = MetricsServer::start(listener, AtBoard(Arc::clone(self)))?;
        crate::say!("testudo: metrics at http://{}/metrics", server.address());
        Ok(server)
    }

    /// The same in a supervisor that took the job over, with the listener of the one before: nobody
    /// who asked meanwhile was refused. Whoever scrapes does without, if it cannot be, rather than
    /// the job.
    pub(crate) fn serve_again(self: &Arc<Self>, kept: Option<OwnedFd>) -> Option<MetricsServer> {
        MetricsServer::start(TcpListener::from(kept?), AtBoard(Arc::clone(self)))
            .inspect_err(|error| crate::say!("testudo: no metrics any more: {error}"))
            .ok()
    }

    /// The supervisor's loop has come round: what it knows by now.
    pub(crate) fn turn(
        &self,
        restarts: &[Restart],
        checkpoints: impl FnOnce() -> Option<CheckpointFigures>,
    ) {
        let now = now_ns();
        self.turned_ns.store(now, Ordering::Release);
        if let Ok(mut told) = self.told.try_lock() {
            told.note(restarts);
        }
        let Ok(mut marks) = self.marks.try_lock() else { return };
        if marks.samples.back().is_none_or(|(at, _)| now >= at + SAMPLE_NS) {
            marks.take(self.pages.read(), self.rings());
            marks.sample(now);
            drop(marks);
            if let Ok(mut told) = self.told.try_lock() {
                told.checkpoints = checkpoints();
            }
        }
    }

    /// The same, waiting for readers: for who asks right now.
    pub(crate) fn tell(&self, restarts: &[Restart], checkpoints: Option<CheckpointFigures>) {
        let mut told = lock(&self.told);
        told.note(restarts);
        told.checkpoints = checkpoints;
    }

    fn rings(&self) -> std::ops::Range<usize> {
        let first = self.plan.workers * OF_WORKER;
        first..first + 2 * self.plan.layout.rings.len()
    }

    /// All numbers, as they are now.
    pub(crate) fn figures(&self) -> Figures {
        let now = now_ns();
        let (sums, raw, rates) = {
            let mut marks = lock(&self.marks);
            marks.take(self.pages.read(), self.rings());
            (marks.sums.clone(), marks.raw.clone(), marks.rates(now))
        };
        let values = Values { plan: &self.plan, sums, raw, rates };
        let told = lock(&self.told);
        Figures {
            job: self.job.clone(),
            uptime_s: now.saturating_sub(self.begun_ns) as f64 / 1e9,
            workers: (0..self.plan.workers)
                .map(|worker| values.worker(worker, self.pages.workers[worker]))
                .collect(),
            operators: values.operators(),
            edges: values.edges(),
            counters: values.user_counters(),
            restarts: told.restarts.clone(),
            restarts_total: told.restarts_total,
            recovery: told.recovery.clone(),
            checkpoints: told.checkpoints.clone(),
            external: self.external(),
            replicas: self.replicas.figures(),
        }
    }

    /// How the systems outside of the job are.
    pub(crate) fn external(&self) -> Vec<External> {
        let workers = self.pages.workers.iter().enumerate();
        let slots = workers.flat_map(|(worker, header)| {
            header.outside.iter().filter_map(move |slot| self.slot(worker, slot))
        });
        self.externals.all().into_iter().chain(slots).collect()
    }

    fn slot(&self, worker: usize, slot: &header::OutsideWords) -> Option<External> {
        let get = |word: &AtomicU64| word.load(Ordering::Acquire);
        let state = OutsideState::of(get(&slot.state));
        // What a dead worker has left there need not be true: only its own words are shown.
        let index = usize::try_from(get(&slot.operator)).ok()?.checked_sub(1)?;
        self.plan.operators.get(index)?;
        let errno = i32::try_from(get(&slot.errno)).unwrap_or(0);
        Some(External {
            name: self.plan.outside_name(index),
            worker: Some(worker),
            state: match state {
                OutsideState::Ok => ExternalState::Ok,
                OutsideState::Failing => ExternalState::Failing,
                OutsideState::Waiting => ExternalState::Waiting,
            },
            since_ms: get(&slot.since_ms),
            last_error: if errno == 0 {
                String::new()
            } else {
                std::io::Error::from_raw_os_error(errno).to_string()
            },
            retries: get(&slot.retries),
        })
    }
}

impl Told {
    /// Counts what became known of restarts since the last turn. Of each the cause is known once
    /// the process is reaped, the time once its successor has attached.
    fn note(&mut self, restarts: &[Restart]) {
        self.restarts_total = self.restarts_total.max(restarts.len() as u64);
        while let Some(restart) = restarts.get(self.counted).filter(|r| !r.cause.is_empty()) {
            *self.restarts.entry(restart.cause.clone()).or_default() += 1;
            self.counted += 1;
        }
        while let Some(restart) = restarts.get(self.recovered) {
            let died_again = |other: &Restart| other.worker == restart.worker;
            match restart.recovery_us {
                Some(us) => {
                    self.recovery.count += 1;
                    self.recovery.sum_us += us;
                    self.recovery.last_us = Some(us);
                }
                None if restarts[self.recovered + 1..].iter().any(died_again) => {}
                None => return,
            }
            self.recovered += 1;
        }
    }
}

/// What was read, with what it means.
struct Values<'a> {
    plan: &'a Plan,
    sums: Vec<u64>,
    raw: Vec<u64>,
    rates: Vec<f64>,
}

impl Values<'_> {
    fn ring(&self, ring: usize) -> usize {
        self.plan.workers * OF_WORKER + 2 * ring
    }

    fn counter(&self, worker: usize, index: usize) -> usize {
        self.ring(self.plan.layout.rings.len()) + worker * self.plan.layout.counters + index
    }

    /// Sum and rate of a counter of all operators of a kind in one worker.
    fn of_kind(&self, worker: usize, kind: &str, counter: CounterKind) -> (u64, f64) {
        let position = CounterKind::ALL.iter().position(|other| *other == counter).unwrap_or(0);
        let operators = self.plan.operators.iter().enumerate();
        let own = operators.filter(|(_, o)| o.kind == kind && o.name != "rejects");
        own.fold((0, 0.0), |(sum, rate), (operator, _)| {
            let at = self.counter(worker, operator * CounterKind::ALL.len() + position);
            (sum + self.sums[at], rate + self.rates[at])
        })
    }

    fn worker(&self, worker: usize, header: &WorkerHeader) -> WorkerFigures {
        let at = worker * OF_WORKER;
        let (ms, rate) =
            (|i: usize| self.sums[at + i] / 1_000_000, |i: usize| self.rates[at + i] / 1e6);
        let (records_in, records_in_per_s) = self.of_kind(worker, "source", CounterKind::Out);
        let (records_out, records_out_per_s) = self.of_kind(worker, "sink", CounterKind::In);
        let ((bytes_out, bytes_out_per_s), (bytes_in, bytes_in_per_s)) = self.bytes(worker, None);
        let waits = header.times.waiting_since_ns.load(Ordering::Relaxed) != 0;
        let state = match WorkerState::of(header.state.load(Ordering::Acquire)) {
            WorkerState::Attaching => "attaching",
            WorkerState::Running if waits => "waiting",
            WorkerState::Running => "running",
            WorkerState::Finished => "finished",
            WorkerState::Failed => "failed",
        };
        let watermark = header.watermark.load(Ordering::Relaxed).cast_signed();
        let is_known = watermark != 0 && watermark != i64::MAX && watermark != i64::MIN;
        WorkerFigures {
            worker,
            state: state.into(),
            pid: header.pid.load(Ordering::Relaxed),
            life: header.incarnation.load(Ordering::Relaxed),
            commits: self.sums[at + 4],
            busy_ms_per_s: rate(0),
            idle_ms_per_s: rate(1),
            back_pressured_ms_per_s: rate(2),
            waiting_ms_per_s: rate(3),
            busy_ms: ms(0),
            idle_ms: ms(1),
            back_pressured_ms: ms(2),
            waiting_ms: ms(3),
            watermark_ms: is_known.then_some(watermark),
            records_in,
            records_out,
            records_in_per_s,
            records_out_per_s,
            bytes_in,
            bytes_out,
            bytes_in_per_s,
            bytes_out_per_s,
        }
    }

    /// Bytes that a process has put into rings and taken from them, of one edge or of all: each
    /// with its rate.
    fn bytes(&self, process: usize, edge: Option<usize>) -> ((u64, f64), (u64, f64)) {
        let (mut out, mut taken) = ((0, 0.0), (0, 0.0));
        for (index, ring) in self.plan.layout.rings.iter().enumerate() {
            if edge.is_some_and(|edge| edge != ring.edge) {
                continue;
            }
            let at = self.ring(index);
            if ring.from == process {
                out = (out.0 + self.sums[at], out.1 + self.rates[at]);
            }
            if ring.to == process {
                taken = (taken.0 + self.sums[at + 1], taken.1 + self.rates[at + 1]);
            }
        }
        (out, taken)
    }

    /// What is counted of each operator: sources give, sinks take, and whatever else is not zero.
    fn operators(&self) -> Vec<OperatorFigures> {
        let mut all = Vec::new();
        for (index, operator) in self.plan.operators.iter().enumerate() {
            for &worker in &self.plan.stages[operator.stage].workers {
                let (mut counts, mut per_s) = (BTreeMap::new(), BTreeMap::new());
                for (position, kind) in CounterKind::ALL.iter().enumerate() {
                    let at = self.counter(worker, index * CounterKind::ALL.len() + position);
                    let is_its_own = match kind {
                        CounterKind::In => operator.kind == "sink",
                        CounterKind::Out => operator.kind == "source",
                        _ => false,
                    };
                    if is_its_own || self.sums[at] > 0 {
                        counts.insert(kind.label().to_owned(), self.sums[at]);
                        per_s.insert(kind.label().to_owned(), self.rates[at]);
                    }
                }
                all.push(OperatorFigures {
                    operator: operator.name.clone(),
                    uid: operator.uid().into(),
                    kind: operator.kind.into(),
                    worker,
                    counts,
                    per_s,
                });
            }
        }
        all
    }

    fn edges(&self) -> Vec<EdgeFigures> {
        let mut all = Vec::new();
        for (edge, spec) in self.plan.edges.iter().enumerate() {
            let rings = self.plan.layout.rings.iter().filter(|ring| ring.edge == edge);
            let ends: std::collections::BTreeSet<usize> =
                rings.flat_map(|ring| [ring.from, ring.to]).collect();
            for process in ends {
                let ((bytes_out, _), (bytes_in, _)) = self.bytes(process, Some(edge));
                let (backlog_bytes, fill) = self.backlog(process, edge);
                let is_worker = process < self.plan.workers;
                let count = |count| {
                    let at = account::index(&self.plan.layout, edge, count);
                    if is_worker { self.sums[self.counter(process, at)] } else { 0 }
                };
                all.push(EdgeFigures {
                    edge: format!("{}-{edge}", spec.kind.label()),
                    worker: is_worker.then_some(process),
                    sent: count(EdgeCount::Sent),
                    taken: count(EdgeCount::Taken),
                    dropped: count(EdgeCount::Dropped),
                    dead_lettered: count(EdgeCount::Lettered),
                    bytes_out,
                    bytes_in,
                    backlog_bytes,
                    fill,
                });
            }
        }
        all
    }

    /// What lies in a process's rings from others on an edge, and how full the fullest is. Heads
    /// and tails were not read at the same moment: no more is believed than fits.
    fn backlog(&self, process: usize, edge: usize) -> (u64, f64) {
        let rings = self.plan.layout.rings.iter().enumerate();
        let own = rings.filter(|(_, ring)| ring.edge == edge && ring.to == process);
        own.fold((0, 0.0), |(sum, fill), (index, ring)| {
            let at = self.ring(index);
            let bytes = self.raw[at].saturating_sub(self.raw[at + 1]).min(ring.bytes as u64);
            (sum + bytes, f64::max(fill, bytes as f64 / ring.bytes as f64))
        })
    }

    fn user_counters(&self) -> Vec<UserFigure> {
        let first = self.plan.operators.len() * CounterKind::ALL.len();
        let names = self.plan.user_counters.iter().enumerate();
        let each = names.flat_map(|(index, name)| {
            (0..self.plan.workers).map(move |worker| UserFigure {
                name: name.clone(),
                worker,
                value: self.sums[self.counter(worker, first + index)],
            })
        });
        each.collect()
    }
}

/// The board as the small server sees it.
struct AtBoard(Arc<Board>);

impl Served for AtBoard {
    fn metrics(&self) -> String {
        crate::metrics::text::text(&self.0.figures())
    }

    fn health(&self) -> (bool, String) {
        let since = now_ns().saturating_sub(self.0.turned_ns.load(Ordering::Acquire));
        if since > STUCK_NS {
            let text = format!("the supervisor has not turned for {} s\n", since / 1_000_000_000);
            return (false, text);
        }
        let ill = self.0.external().into_iter().filter(|e| e.state != ExternalState::Ok);
        let lines = ill.map(|external| format!("{}: {}\n", external.name, external.last_error));
        (true, "ok\n".to_owned() + &lines.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_never_go_back_and_rings_that_begin_anew_are_counted_on() {
        let mut marks = Marks::default();
        marks.take(vec![10, 100], 1..2);
        marks.take(vec![7, 40], 1..2);
        assert_eq!(marks.sums, [10, 140], "the first was taken back, the second began anew");
        marks.take(vec![12, 60], 1..2);
        assert_eq!(marks.sums, [12, 160]);
    }

    #[test]
    fn a_rate_is_of_the_last_seconds() {
        let mut marks = Marks::default();
        for second in 0..10u64 {
            marks.take(vec![second * second], 0..0);
            marks.sample(second * SAMPLE_NS);
        }
        marks.take(vec![100], 0..0);
        // Samples of seconds 4 to 9 are kept.
        assert_eq!(marks.rates(10 * SAMPLE_NS), [(100.0 - 16.0) / 6.0]);
    }

    #[test]
    fn restarts_are_counted_once_their_cause_is_known() {
        let restart = |worker, cause: &str, recovery_us| Restart {
            worker,
            pid: 1,
            life: 1,
            cause: cause.into(),
            why: String::new(),
            operator: String::new(),
            record: String::new(),
            rung: String::new(),
            last_words: String::new(),
            seen_ns: 0,
            recovery_us,
            tier: crate::config::Tier::default(),
        };
        let mut told = Told::default();
        told.note(&[restart(0, "", None)]);
        assert_eq!((told.restarts_total, told.restarts.len(), told.recovery.count), (1, 0, 0));
        let all = [restart(0, "SIGKILL", None), restart(0, "SIGKILL", Some(5))];
        told.note(&all);
        told.note(&all);
        assert_eq!(told.restarts["SIGKILL"], 2);
        assert_eq!((told.recovery.count, told.recovery.last_us), (1, Some(5)));
    }
}
