//! A kill at any instruction changes nothing. One worker of a job is led by a debugger to an
//! instruction of a step (source, exchange, state, firing windows, sink, commit, publishing) or of
//! attaching (mapping, claim, rollback, opening, publishing), killed there, and replaced by its
//! supervisor; what the job writes is compared with what it writes undisturbed.
//!
//! Which instructions there are is found out by single-stepping the worker once; then each of them
//! is a place to die, at its first time in a step or at a later one. By stride in a normal run, all
//! of them with `TESTUDO_SOAK=1`.

#[path = "../common/mod.rs"]
mod common;

#[cfg(target_arch = "x86_64")]
mod places;

#[cfg(target_arch = "x86_64")]
mod campaign;

use common::program::Cli;
use common::{Jobs, text, trials};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use testudo::prelude::*;
use testudo::sink::file::Lines;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::time::now_ns;

const JOBS: Jobs = &[("sipping", sipping)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            r11_a_kill_at_any_instruction_of_a_step_changes_nothing,
            r2_a_kill_at_any_instruction_of_attaching_changes_nothing,
        ],
    )
}

/// Numbers, a few in each step: a step is short enough to be followed instruction by instruction.
/// None before the gate, a file, is there: nobody is to be far ahead of the debugger.
struct Sips {
    total: u64,
    gate: PathBuf,
}

struct SipsReader {
    total: u64,
    step: u64,
    /// What this life still waits for.
    gate: Option<PathBuf>,
}

const SIP: usize = 3;

impl Source for Sips {
    type Out = u64;
    type Position = u64;
    type Reader = SipsReader;

    fn start(&self, subtask: Subtask) -> u64 {
        subtask.index as u64
    }

    fn open(&self, subtask: Subtask, _: &u64) -> Result<SipsReader, String> {
        let gate = (!self.gate.exists()).then(|| self.gate.clone());
        Ok(SipsReader { total: self.total, step: subtask.count as u64, gate })
    }
}

impl Reader<u64, u64> for SipsReader {
    fn read(
        &mut self,
        at: &mut u64,
        max: usize,
        out: &mut impl Collect<u64>,
    ) -> Result<Progress, String> {
        if let Some(gate) = &self.gate {
            if !gate.exists() {
                return Ok(Progress::Idle { until_ns: now_ns() + 1_000_000 });
            }
            self.gate = None;
        }
        for _ in 0..max.min(SIP) {
            if *at >= self.total {
                return Ok(Progress::End);
            }
            out.emit(*at);
            *at += self.step;
        }
        Ok(Progress::More)
    }
}

const KEYS: u64 = 24;

/// Milliseconds of event time, one for each number.
const WINDOW: u64 = 16;

/// What the state of a key says about one of its numbers, or all of a window's.
#[testudo::record]
#[derive(Debug, Default)]
struct Checked {
    number: u64,
    count: u64,
    wrong: u64,
}

impl Checked {
    fn add(&mut self, other: &Self) {
        self.number = self.number.wrapping_add(other.number);
        self.count += other.count;
        self.wrong += other.wrong;
    }
}

#[testudo::record]
#[derive(Debug)]
struct Row {
    start: i64,
    key: u64,
    all: Checked,
}

/// Every number finds the one before it, of the same key, in its state; a timer adds up the latest
/// ones; windows of a few numbers fire in almost every step.
fn sipping(flow: &Flow, parameters: &str) {
    let (total, output) = parameters.split_once(' ').expect("total and output");
    let total = total.parse().expect("a number");
    flow.source("sips", Sips { total, gate: gate(Path::new(output)) })
        .event_time(Duration::ZERO, |n| *n as i64)
        .key_by(|n| n % KEYS)
        .process(
            |state| (state.value::<u64>("next"), state.list::<u64>("latest")),
            |(next, latest), cx, n: &u64| {
                let expected = cx.get(next).copied().unwrap_or(n % KEYS);
                cx.set(next, &(n + KEYS));
                cx.append(latest, n);
                cx.set_timer((n - n % (4 * KEYS)) as i64 + 4 * KEYS as i64);
                cx.emit(Checked { number: *n, count: 1, wrong: u64::from(expected != *n) });
            },
            |(_, latest), cx, at| {
                // Later ones may be there already, or not.
                let all: Vec<u64> = cx.items(latest).copied().collect();
                cx.clear_list(latest);
                all.iter().filter(|n| **n >= at as u64).for_each(|n| cx.append(latest, n));
                let sum: u64 = all.iter().filter(|n| **n < at as u64).sum();
                cx.emit(Checked { number: sum << 32 | at as u64, count: 1, wrong: 0 });
            },
        )
        .key_by(|checked| checked.number % 7)
        .window(tumbling(Duration::from_millis(WINDOW)), |checked| checked.number as u32 as i64)
        .aggregate(Checked::default, Checked::add, Checked::add, |key, window, all| Row {
            start: window.start,
            key: *key,
            all: *all,
        })
        .sink("out", FileSink::folder(output, "txt", Lines(line)));
}

fn line(row: &Row) -> String {
    let Row { start, key, all } = row;
    format!("{start} {key}: {} {} {}", all.number, all.count, all.wrong)
}

/// The file that lets a job begin.
fn gate(output: &Path) -> PathBuf {
    output.with_extension("gate")
}

fn open_gate(output: &Path) {
    std::fs::write(gate(output), "").expect("room for a file");
}

fn job(total: u64, output: &Path) -> Cli {
    Cli::new("sipping", &format!("{total} {}", text(output))).workers(2).args([
        "--report",
        "json",
        "--max-restarts",
        "1000000",
        // A life that is looked at for long ends no step meanwhile.
        "--hang-timeout",
        "never",
    ])
}

#[cfg(not(target_arch = "x86_64"))]
fn r11_a_kill_at_any_instruction_of_a_step_changes_nothing() {
    eprintln!("skipped: written for the registers of x86_64");
}

#[cfg(not(target_arch = "x86_64"))]
fn r2_a_kill_at_any_instruction_of_attaching_changes_nothing() {
    eprintln!("skipped: written for the registers of x86_64");
}

#[cfg(target_arch = "x86_64")]
fn r11_a_kill_at_any_instruction_of_a_step_changes_nothing() {
    campaign::run(places::Phase::Step);
}

#[cfg(target_arch = "x86_64")]
fn r2_a_kill_at_any_instruction_of_attaching_changes_nothing() {
    campaign::run(places::Phase::Attaching);
}
