//! The autopsy: what ended a worker, and where it was. From what it left in its own segment, what
//! the kernel counts, and what the supervisor itself did; nothing that it left is trusted further
//! than that (R23).
//!
//! Called by `recover` at each death.

#![expect(unsafe_code, reason = "views the pages that a dead worker left")]

use super::hang::Doing;
use super::ladder::{Cause, Where};
use super::launch::Scene;
use super::remains::Remains;
use super::spawn::Exit;
use crate::control::history::PostMortem;
use crate::plan::layout::{LETTER_AT, ORDERS_AT, RingPlan};
use crate::plan::{CounterKind, Plan, WORKERS_MAX};
use crate::time::unix_ms;
use crate::worker::careful::NO_INPUT;
use std::collections::BTreeMap;
use testudo_shm::header::{self, WorkerHeader};
use testudo_shm::letter::{Letter, Orders};
use testudo_shm::marker::{Marker, Phase, Place, SOURCE, Seen};
use testudo_shm::obituary::{Kind, Told};
use testudo_shm::primitive::{AtomicU64, Ordering};

/// Bytes of a record that a post-mortem shows.
const SHOWN: usize = 128;

impl Scene {
    /// What a worker says about what it is doing.
    pub(crate) fn marker(&self, plan: &Plan, worker: usize) -> &'static Marker {
        crate::worker::attach::marker(self.arena, plan.layout.segments[worker].at)
    }

    /// What a worker has put aside.
    pub(crate) fn letter(&self, plan: &Plan, worker: usize) -> &'static Letter {
        let at = plan.layout.segments[worker].at + LETTER_AT;
        // SAFETY: the fronts of all workers are mapped for good; the plan gives this range to the
        // letter.
        unsafe { header::at(self.arena.at(at)) }
    }

    /// What is ordered of a worker.
    pub(crate) fn orders(&self, plan: &Plan, worker: usize) -> &'static Orders {
        let at = plan.layout.segments[plan.supervisor()].at + ORDERS_AT;
        // SAFETY: as above, of the supervisor's own front.
        let all = unsafe { header::at::<[Orders; WORKERS_MAX]>(self.arena.at(at)) };
        &all[worker]
    }

    /// Whether there is anything for a worker to take: in a ring, or from a source.
    pub(crate) fn has_input(&self, plan: &Plan, worker: usize) -> bool {
        let word = |process: usize, offset: usize| {
            let at = self.arena.at(plan.layout.segments[process].at + offset);
            // SAFETY: as above; the plan gives these places to the words of rings.
            unsafe { header::at::<AtomicU64>(at) }.load(Ordering::Acquire)
        };
        let mut rings = plan.layout.rings.iter().filter(|ring| ring.to == worker);
        let mut sources = plan.operators.iter().filter(|operator| operator.kind == "source");
        rings.any(|ring| word(ring.from, ring.tail_word) != word(worker, ring.head_word))
            || sources.any(|source| plan.subtask(source.stage, worker).is_some())
    }
}

/// A worker's counters that are not zero, by operator.
fn counters(plan: &Plan, left: &Remains) -> BTreeMap<String, u64> {
    let kinds = CounterKind::ALL.len();
    let of_operator = |index: usize| {
        let operator = &plan.operators[index / kinds];
        format!("{}/{}", operator.name, CounterKind::ALL[index % kinds].label())
    };
    let first = plan.operators.len() * kinds;
    let all = (0..first + plan.user_counters.len()).map(|index| {
        let user = || plan.user_counters[index - first].clone();
        (if index < first { of_operator(index) } else { user() }, left.counter(index))
    });
    all.filter(|(_, value)| *value > 0).collect()
}

/// Whether a worker that has finished no turn of its loop for a while should have: it is in the
/// middle of a step, or has input, and does not wait for a disk or another system outside.
pub(crate) fn is_stuck(plan: &Plan, scene: &Scene, worker: usize, pid: i32) -> bool {
    let (header, marker) = (scene.workers[worker], scene.marker(plan, worker));
    let phase = marker.read().phase;
    let is_outside = header.times.waiting_since_ns.load(Ordering::Relaxed) > 0;
    let is_waiting = marker.waiting.load(Ordering::Relaxed) > 0 || is_outside;
    let is_loading = header.restoring.load(Ordering::Acquire) > 0;
    let waits = is_waiting || is_loading || phase == Phase::Saving;
    let is_busy = phase != Phase::Engine || waits || scene.has_input(plan, worker);
    is_busy && (!waits || is_stopped(pid))
}

/// Whether somebody has stopped a process (SIGSTOP).
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with(['T', 't']))
}

/// Nanoseconds of a clock tick in /proc (`USER_HZ` is 100 everywhere).
const TICK_NS: u64 = 10_000_000;

/// What a process does, by /proc/PID/stat. One that waits for a disk (`D`) is not asleep: a signal
/// would not end it either.
pub(crate) fn activity(pid: i32) -> Doing {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let mut fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ');
    let is_asleep = fields.next().is_some_and(|state| ["S", "T", "t"].contains(&state));
    // User and system time.
    let ticks = fields.skip(10).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>();
    Doing { run_ns: ticks * TICK_NS, is_asleep }
}

/// Whose death is looked at, and what is known of it besides what it left.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject {
    pub(crate) worker: usize,
    pub(crate) pid: i32,
    pub(crate) life: u64,
    pub(crate) exit: Option<Exit>,
    /// The hang watch killed it, after so many seconds.
    pub(crate) hung_s: Option<f64>,
    pub(crate) seen_ns: u64,
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) cause: Cause,
    pub(crate) place: Where,
    pub(crate) post_mortem: PostMortem,
    pub(crate) base: u64,
    pub(crate) frames: Vec<u64>,
}

/// Looks at what a dead worker left. `is_out_of_memory` is asked only when nothing else explains
/// it: whether the kernel has counted a kill for want of memory.
pub(crate) fn perform(
    plan: &Plan,
    left: &Remains,
    subject: &Subject,
    is_out_of_memory: impl FnMut() -> bool,
) -> Finding {
    let Subject { worker, pid, .. } = *subject;
    let word = |word: fn(&WorkerHeader) -> &AtomicU64| {
        left.header().map_or(0, |header| word(header).load(Ordering::Relaxed))
    };
    let told = left.obituary(pid as u32);
    let cause = cause(&told, subject, is_out_of_memory);
    // Who dies before the claim has done nothing yet; what is marked is its predecessor's.
    let own = left.header().map(|header| header.pid.load(Ordering::Relaxed));
    let seen = left.marker().filter(|_| own == Some(pid as u32)).map(Marker::read);
    let seen = seen.filter(|seen| (seen.stage as usize) < plan.stages.len());
    let words = left.last_words();
    let since = subject.seen_ns.saturating_sub(word(|header| &header.commit_ns));
    let place = seen.as_ref().map_or(Where::Elsewhere, place);
    let seen = seen.filter(|_| place != Where::Elsewhere);
    let post_mortem = PostMortem {
        unix_ms: unix_ms(),
        worker,
        life: subject.life,
        pid,
        cause: describe(cause, &told, subject),
        own_doing: cause.is_own_doing(),
        exit: subject.exit.map_or(String::new(), |exit| exit.to_string()),
        message: message(&words).into(),
        operator: seen.as_ref().map_or(String::new(), |seen| operators(plan, seen.stage as usize)),
        doing: seen.as_ref().map_or("", |seen| doing(seen.phase)).into(),
        record: seen.as_ref().map_or(String::new(), |seen| record(plan, worker, seen)),
        bytes: seen.as_ref().map_or(String::new(), |seen| shown(&seen.shown)),
        commits: word(|header| &header.commits),
        since_commit_ms: since as f64 / 1e6,
        counters: counters(plan, left),
        rung: String::new(),
        backtrace: if told.frames.is_empty() { backtrace_text(&words) } else { Vec::new() },
    };
    Finding { cause, place, post_mortem, base: told.base, frames: told.frames }
}

fn cause(told: &Told, subject: &Subject, mut is_out_of_memory: impl FnMut() -> bool) -> Cause {
    if subject.hung_s.is_some() {
        return Cause::Hang;
    }
    match (told.kind, subject.exit) {
        (Kind::Panic, _) => Cause::Panic,
        (Kind::Signal, _) if told.signal == libc::SIGABRT => Cause::Abort,
        (Kind::Signal, _) => Cause::Fault(told.signal),
        (Kind::Sent, _) => Cause::Killed,
        (Kind::None, None | Some(Exit::Signal(libc::SIGKILL))) if is_out_of_memory() => {
            Cause::OutOfMemory
        }
        (Kind::None, Some(Exit::Signal(_))) => Cause::Killed,
        (Kind::Exit | Kind::None, Some(Exit::Code(code))) => Cause::Exit(code),
        (Kind::Exit | Kind::None, _) => Cause::Unknown,
    }
}

fn describe(cause: Cause, told: &Told, subject: &Subject) -> String {
    let name = Exit::Signal(told.signal);
    match cause {
        Cause::Fault(_) if told.is_overflow => format!("{name}: the stack overflowed"),
        Cause::Fault(_) => format!("{name} at {:#x}", told.address),
        Cause::Abort => "abort".into(),
        Cause::Panic => "panic".into(),
        Cause::OutOfMemory => "killed by the kernel: out of memory".into(),
        Cause::Hang => {
            format!("no step finished for {:.1} s: killed", subject.hung_s.unwrap_or_default())
        }
        Cause::Exit(code) => format!("exit code {code}"),
        Cause::Killed if told.kind == Kind::Sent && told.sender != u32::MAX => {
            format!("{name} from process {}", told.sender)
        }
        Cause::Killed if told.kind == Kind::Sent => format!("{name} from outside"),
        Cause::Unknown if told.kind == Kind::Exit => "it called exit".into(),
        // The kernel will say how the process ended.
        Cause::Killed | Cause::Unknown => String::new(),
    }
}

/// Where a mark is, in the ladder's terms.
fn place(seen: &Seen) -> Where {
    let fired = Place { stage: seen.stage, input: NO_INPUT, from: [0, 0], to: [1, 0] };
    match seen.phase {
        Phase::Batch | Phase::Reading => Where::Batch(seen.place),
        Phase::Record | Phase::ReadingOne => Where::Record(seen.spot),
        Phase::Closing | Phase::Firing => Where::Fired(fired),
        Phase::Saving | Phase::Engine => Where::Elsewhere,
    }
}

fn doing(phase: Phase) -> &'static str {
    match phase {
        Phase::Batch => "processing a batch",
        Phase::Record => "processing one record",
        Phase::Closing => "ending a batch, without a record",
        Phase::Firing => "firing windows and timers, without a record",
        Phase::Reading => "reading a batch and what follows from it",
        Phase::ReadingOne => "reading one record and what follows from it",
        Phase::Saving => "writing outputs",
        Phase::Engine => "",
    }
}

/// The operators of a stage, in order: they are one loop.
pub(crate) fn operators(plan: &Plan, stage: usize) -> String {
    let own = plan.operators.iter().filter(|operator| operator.stage == stage);
    let names: Vec<&str> = own
        .filter(|operator| operator.kind != "inlet")
        .map(|operator| operator.name.as_str())
        .collect();
    if names.is_empty() { plan.stages[stage].name.clone() } else { names.join(" -> ") }
}

/// The input of a worker that a mark names.
pub(crate) fn input_name(plan: &Plan, worker: usize, stage: usize, input: u32) -> String {
    if input == NO_INPUT {
        return "what waited in this worker".into();
    }
    if input & SOURCE != 0 {
        return format!("source {}", plan.stages.get(stage).map_or("", |stage| &stage.name));
    }
    let mut own = plan.layout.rings.iter().filter(|ring| ring.to == worker);
    let ring = own.nth(input as usize);
    ring.map_or("what was in flight at a checkpoint".into(), |ring| ring_name(plan, ring))
}

fn ring_name(plan: &Plan, ring: &RingPlan) -> String {
    format!("exchange {}", crate::worker::attach::edge_name(plan, ring))
}

/// Which record it was, or which part of an input.
fn record(plan: &Plan, worker: usize, seen: &Seen) -> String {
    let Seen { phase, place, spot, .. } = seen;
    let name = || input_name(plan, worker, place.stage as usize, place.input);
    match phase {
        Phase::Closing | Phase::Firing => String::new(),
        Phase::Reading => {
            format!("{}, its records {} to {}", name(), place.from[0], place.to[0])
        }
        Phase::Batch => format!(
            "{}, bytes {} to {}, from record {}",
            name(),
            place.from[0],
            place.to[0],
            place.from[1]
        ),
        _ if spot.inner > 0 => format!("{}, handed on as number {}", from(seen), spot.index),
        _ => from(seen),
    }
}

fn from(seen: &Seen) -> String {
    if seen.origin.is_empty() { "what waited in this worker".into() } else { seen.origin.clone() }
}

/// Bytes for people.
fn shown(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(SHOWN)];
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(|c: char| c.is_control()) => text.into(),
        _ => hex(bytes),
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The last words without their backtrace.
fn message(words: &str) -> &str {
    words.find("\n   0: ").map_or(words, |at| &words[..at]).trim_end()
}

/// The backtrace in the last words.
fn backtrace_text(words: &str) -> Vec<String> {
    let at = words.find("\n   0: ").map_or(words.len(), |at| at + 1);
    words[at..].lines().map(|line| line.trim().to_owned()).collect()
}
