//! Benchmarks of Testudo: `testudo-perf BENCH --help` says what each one measures.
//!
//! Each figure is one line, with `--json` one JSON object. Exit codes: 1 the run failed, 2 bad
//! usage, 3 a wrong result.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

mod report;

mod clock;

mod regime;

mod scratch;

mod workloads;

mod ring;

mod throughput;

mod latency;

mod recovery;

mod startup;

mod regions;

mod raw;

mod checkpoint;

mod replica;

mod restore;

mod compare;

use clap::{Parser, Subcommand};
use report::{Failure, Line, Params};
use std::io::Write;
use std::process::ExitCode;
use testudo::config::{Bytes, Idle, Settings};

/// Benchmarks of the Testudo stream engine.
#[derive(Debug, Parser)]
#[command(name = "testudo-perf", version)]
struct Cli {
    /// Print each figure as a JSON object on a line of its own
    #[arg(long, global = true)]
    json: bool,
    /// Run the bench so often
    #[arg(long, global = true, default_value_t = 1, value_name = "N")]
    repeat: u32,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Messages between two processes through one ring
    Ring(ring::Args),
    /// Map and exchange, no state
    W0(throughput::Args),
    /// A running count by key
    W1(throughput::Args),
    /// Sliding windows by key, and the largest count of each
    W2(throughput::Args),
    /// The best bid of each tumbling window
    W3(throughput::Args),
    /// w1 at a fixed rate: from the intended send time to after the count
    Latency(latency::Args),
    /// w1 while workers are killed: time to their first commit, others' pauses, records lost or
    /// doubled
    Recovery(recovery::Args),
    /// From the start of a process to the first result on its standard output
    Startup(startup::Args),
    /// How often checkpoints complete while regions fail: the coordinator on simulated tasks
    Regions(regions::Args),
    /// w1 with a checkpoint every second: throughput, pauses, bytes a second, latency
    Checkpoint(checkpoint::Args),
    /// What a live replica costs its worker
    Replica(replica::Args),
    /// Resuming a job with much state: first output, full load, bytes a second
    Restore(restore::Args),
    /// This engine and others in turn, on the same work, by regime
    Compare(compare::Args),
    /// The job that `startup` launches
    #[command(hide = true)]
    StartupJob(startup::JobArgs),
    /// The job that `restore` launches
    #[command(hide = true)]
    RestoreJob(restore::JobArgs),
}

/// What every job of a bench can be told about the engine.
#[derive(Debug, Clone, clap::Args)]
pub struct EngineArgs {
    /// Worker processes [default: 2; 1 where each has a replica, on a core of its own]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// What a worker without input does [default: adaptive; for latency: spin]
    #[arg(long, value_enum)]
    idle: Option<Idle>,
    /// Bytes of each ring, such as 4MiB
    #[arg(long, value_name = "BYTES")]
    ring_bytes: Option<Bytes>,
    /// Key groups of each keyed operator
    #[arg(long, value_name = "N")]
    key_groups: Option<usize>,
    /// Ask for huge pages
    #[arg(long)]
    huge_pages: bool,
}

impl EngineArgs {
    fn workers(&self) -> usize {
        self.workers.unwrap_or(2)
    }

    /// The same for a job whose workers have replicas.
    fn with_replicas(&self) -> Self {
        Self { workers: Some(self.workers.unwrap_or(1)), ..self.clone() }
    }

    /// The settings of a job called `name`.
    fn settings(&self, name: &str) -> Result<Settings, Failure> {
        let base = Settings::default();
        let settings = Settings {
            name: name.into(),
            workers: self.workers(),
            idle: self.idle.unwrap_or(base.idle),
            ring_bytes: self.ring_bytes.map_or(base.ring_bytes, |bytes| bytes.0),
            key_groups: self.key_groups.unwrap_or(base.key_groups),
            huge_pages: self.huge_pages,
            progress: false,
            ..base
        };
        settings.check().map_err(|error| Failure::Usage(error.to_string()))?;
        Ok(settings)
    }

    /// Writes down what differs from one run to another.
    fn describe(&self, settings: &Settings, params: &mut Params) {
        let idle = if settings.idle == Idle::Spin { "spin" } else { "adaptive" };
        params.insert("workers".into(), settings.workers.into());
        params.insert("idle".into(), idle.into());
        params.insert("ring_bytes".into(), settings.ring_bytes.into());
        params.insert("key_groups".into(), settings.key_groups.into());
        if settings.huge_pages {
            params.insert("huge_pages".into(), true.into());
        }
    }
}

/// Runs the bench once.
fn run(bench: &Bench) -> Result<Vec<Line>, Failure> {
    match bench {
        Bench::Ring(args) => ring::run(args),
        Bench::W0(args) => throughput::run("w0", args),
        Bench::W1(args) => throughput::run("w1", args),
        Bench::W2(args) => throughput::run("w2", args),
        Bench::W3(args) => throughput::run("w3", args),
        Bench::Latency(args) => latency::run(args),
        Bench::Recovery(args) => recovery::run(args),
        Bench::Startup(args) => startup::run(args),
        Bench::Regions(args) => regions::run(args),
        Bench::Checkpoint(args) => checkpoint::run(args),
        Bench::Replica(args) => replica::run(args),
        Bench::Restore(args) => restore::run(args),
        Bench::RestoreJob(args) => restore::job_process(args).map(|()| Vec::new()),
        Bench::Compare(args) => compare::run(args).map(|()| Vec::new()),
        Bench::StartupJob(args) => startup::job_process(args).map(|()| Vec::new()),
    }
}

fn print(lines: &[Line], as_json: bool) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in lines {
        writeln!(out, "{}", line.text(as_json))?;
    }
    out.flush()
}

fn main() -> ExitCode {
    testudo::init();
    if std::env::args().nth(1).as_deref() == Some(recovery::supervisor::JOB) {
        return recovery::supervisor::job_process();
    }
    let cli = Cli::parse();
    for _ in 0..cli.repeat {
        match run(&cli.bench) {
            Ok(lines) => {
                if print(&lines, cli.json).is_err() {
                    // Who was to read this has left.
                    return ExitCode::FAILURE;
                }
            }
            Err(failure) => {
                eprintln!("testudo-perf: {failure}");
                return ExitCode::from(failure.code());
            }
        }
    }
    ExitCode::SUCCESS
}
