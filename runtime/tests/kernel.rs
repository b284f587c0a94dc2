//! What the kernel is asked for. Rule R4: no system call is given a segment's address to fill, in
//! no process of a job and in no life of a worker, so that nothing can land in shared memory after
//! the death of whoever asked for it. Watched from outside, by tracing every call.

mod common;

use common::process::{Held, stat};
use common::program::{Cli, Started};
use common::trace::{Call, Tracer, segments_of};
use common::{Jobs, PATIENCE, folder, text, trials};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use testudo::prelude::*;
use testudo::shm::record::Record;
use testudo::sink::file::Lines;

const JOBS: Jobs = &[("reading", reading), ("careless", careless)];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![r4_no_system_call_is_given_a_segment_to_fill, canary_a_read_into_a_segment_is_seen,],
    )
}

type Text = <String as Record>::View;

/// Reads that must have been seen in each process.
const READS: usize = 5;

/// Input files: each is opened, measured and read on its own.
const FILES: usize = 2000;

/// Reads files and standard input, keeps state, writes a file and standard output.
fn reading(flow: &Flow, folder: &str) {
    let folder = Path::new(folder);
    let inputs = (0..FILES).map(|n| folder.join(format!("in-{n}")));
    flow.source("files", FileSource::lines(inputs))
        .key_by(|line: &Text| line.to_string())
        .aggregate(|| 0u64, |count, _| *count += 1, |line, count| format!("{line} {count}"))
        .sink("out", FileSink::new(folder.join("out"), Lines(|line: &Text| line.to_string())));
    flow.stdin().round_robin().print(|line: &Text| line.to_string());
}

/// Asks the kernel for no bytes at all, but to the address of a segment.
fn careless(flow: &Flow, _: &str) {
    flow.source("numbers", Generator::new(u64::MAX, |n| n)).for_each(|n| {
        if n.is_multiple_of(100) {
            common::process::read_nothing_to(segments_of(std::process::id())[0].start);
        }
    });
}

/// A job under observation.
struct Watched {
    job: Started,
    tracer: Tracer,
    /// Reads of each process.
    reads: BTreeMap<u32, usize>,
    /// Calls that were given a segment.
    found: Vec<Call>,
}

impl Watched {
    /// Traces a job and its workers; `None` where this machine does not allow that.
    fn start(job: Started) -> Option<Self> {
        let mut all = job.workers(2);
        all.push(job.supervisor());
        match Tracer::of(&all) {
            Ok(tracer) => Some(Self { job, tracer, reads: BTreeMap::new(), found: Vec::new() }),
            Err(error) => {
                eprintln!("skipped: processes cannot be traced here ({error})");
                None
            }
        }
    }

    /// Lets the job go on until something is true of it.
    fn watch_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            let (reads, found) = (&mut self.reads, &mut self.found);
            let running = self.tracer.go_on(|call| {
                *reads.entry(call.process).or_default() += usize::from(call.is_a_read());
                if call.fills_a_segment() {
                    found.push(call);
                }
            });
            assert!(running, "the job ended before {what}");
            assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}: {:?}", self.reads);
        }
    }

    fn has_read(&self, process: u32, often: usize) -> bool {
        self.reads.get(&process).is_some_and(|reads| *reads >= often)
    }

    /// Ends the job; every traced process is waited for.
    fn end(mut self) -> Vec<Call> {
        self.job.signal(libc::SIGKILL);
        while self.tracer.go_on(|_| ()) {}
        self.found
    }
}

/// Standard input with a line every millisecond, until nobody reads it any more.
fn dripping() -> std::process::Stdio {
    use std::io::Write;
    let (read, mut write) = std::io::pipe().expect("a pipe");
    std::thread::spawn(move || {
        while writeln!(write, "line").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    read.into()
}

fn r4_no_system_call_is_given_a_segment_to_fill() {
    let folder = folder();
    for n in 0..FILES {
        let lines = format!("{n} one\n{n} two\n{n} three\n{n} four\n");
        fs::write(folder.path().join(format!("in-{n}")), lines).expect("room for a file");
    }
    let job = Cli::new("reading", &text(folder.path())).workers(2).args(["--rate", "4000"]);
    let job = job.stdin(dripping()).start();
    let Some(mut watched) = Watched::start(job) else { return };
    let first = watched.job.workers(2);
    let launcher = watched.job.supervisor();
    watched.watch_until("reads in all processes", |all| {
        all.has_read(launcher, READS) && first.iter().all(|pid| all.has_read(*pid, READS))
    });
    // A successor is watched from its first instruction: mapping, rolling back, opening again.
    let name = stat(first[0]).expect("a worker").name;
    let worker = Held::child_of(first[0], launcher).expect("a worker");
    assert!(worker.signal(libc::SIGKILL));
    watched.watch_until("reads in a successor", |all| {
        let is_new = |pid: &u32| !first.contains(pid) && *pid != launcher;
        let is_successor = |pid: &u32| stat(*pid).is_some_and(|stat| stat.name == name);
        all.reads.keys().any(|pid| is_new(pid) && all.has_read(*pid, READS) && is_successor(pid))
    });
    let found = watched.end();
    assert!(found.is_empty(), "given a segment to fill: {found:?}");
}

fn canary_a_read_into_a_segment_is_seen() {
    let job = Cli::new("careless", "").workers(2).args(["--rate", "10000"]).start();
    let Some(mut watched) = Watched::start(job) else { return };
    watched.watch_until("the careless read", |all| !all.found.is_empty());
    watched.end();
}
