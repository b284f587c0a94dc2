//! The supervisor is killed, not a worker: how soon another one leads the job, and whether anybody
//! notices in the output.
//!
//! The job is a program of its own, since one inside this process has no keeper. Its workers'
//! headers are read through the descriptors that its keeper holds. Each kill is followed by a look
//! at the pauses of all workers for a while; before the first kill there are as many looks of the
//! same length without one, for comparison.
//!
//! Called by `recovery`.

use super::{Args, Plan, account, add, longest_gap};
use crate::report::{Failure, Line, Lines, Params};
use crate::workloads::splitmix64;
use crate::{regime, scratch};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use testudo::prelude::*;
use testudo::time::now_ns;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::header::{self, ControlHeader, WorkerHeader};
use testudo_shm::primitive::Ordering;
use testudo_shm::segment::PAGE;

/// The word that makes a process of this program the job.
pub const JOB: &str = "recovery-job";

/// How long a look takes.
const LOOK: Duration = Duration::from_millis(150);

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(100);

/// The job's name.
const NAME: &str = "perf-recovery-kept";

#[derive(Debug, clap::Args)]
struct JobOptions {
    /// Always `recovery-job`
    word: String,
    /// What the job is told
    #[arg(long)]
    plan: String,
}

/// The main of a process of the job.
pub fn job_process() -> ExitCode {
    testudo::main(|flow: &Flow, options: &JobOptions| super::job(flow, &options.plan))
}

/// The job, ended with this value.
struct Running {
    child: Child,
    control: &'static ControlHeader,
    workers: Vec<&'static WorkerHeader>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that was waited for is gone, and the library knows that.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[expect(clippy::disallowed_methods, reason = "starts a whole job, as a user would")]
fn launch(args: &Args, plan: &Plan) -> Result<Running, Failure> {
    let settings = args.engine.settings(NAME)?;
    let text = |number: usize| number.to_string();
    let plan_text = serde_json::to_string(plan).unwrap_or_default();
    let mut command = Command::new("/proc/self/exe");
    command.args([JOB, "--plan", &plan_text, "--name", NAME, "--report", "json"]);
    command.args(["--no-progress", "--workers", &text(settings.workers)]);
    command.args(["--ring-bytes", &text(settings.ring_bytes)]);
    command.args(["--key-groups", &text(settings.key_groups)]);
    if args.engine.idle == Some(testudo::config::Idle::Spin) {
        command.args(["--idle", "spin"]);
    }
    let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let filled = |n: usize| plan.folder.join(format!("filled-{n}")).exists();
    let begun = Instant::now();
    while !(0..settings.workers).all(filled) {
        if begun.elapsed() > PATIENCE {
            return Err(Failure::Run("the job did not fill its state in time".into()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let control = page(&child, &format!("{NAME}-control"))?;
    // SAFETY: the first page of that segment, mapped for good.
    let control = unsafe { header::at::<ControlHeader>(control) };
    let mut workers = Vec::new();
    for worker in 0..settings.workers {
        let at = page(&child, &format!("{NAME}-w{worker}"))?;
        // SAFETY: as above.
        workers.push(unsafe { header::at::<WorkerHeader>(at) });
    }
    Ok(Running { child, control, workers })
}

/// Maps the first page of a segment that the job's keeper holds.
fn page(child: &Child, name: &str) -> Result<*mut u8, Failure> {
    let wanted = format!("/memfd:{name} (deleted)");
    for entry in std::fs::read_dir(format!("/proc/{}/fd", child.id()))?.flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy() == wanted) {
            let file = std::fs::File::open(entry.path())?;
            let failed = |error: testudo_shm::fault::SetupError| Failure::Run(error.to_string());
            let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(PAGE).map_err(failed)?));
            arena.map(file.as_fd(), 0, PAGE, 0, Access::Peer).map_err(failed)?;
            return Ok(arena.base());
        }
    }
    Err(Failure::Run(format!("the keeper has no segment {name}")))
}

impl Running {
    /// Looks at all workers' pauses from `since` for a while; the longest.
    fn look(&self, since: u64, seen: &[u64]) -> u64 {
        let until = since + u64::try_from(LOOK.as_nanos()).unwrap_or(u64::MAX);
        while now_ns() < until {
            std::thread::sleep(Duration::from_nanos(until - now_ns().min(until)));
        }
        let gap = |(worker, seen): (&&WorkerHeader, &u64)| longest_gap(worker, *seen, since, until);
        self.workers.iter().zip(seen).map(gap).max().unwrap_or(0)
    }

    fn seen(&self) -> Vec<u64> {
        let count = |worker: &&WorkerHeader| worker.gap_count.load(Ordering::Acquire);
        self.workers.iter().map(count).collect()
    }

    /// Kills the supervisor; how long until the next one leads, and the longest pause.
    fn strike(&self) -> Result<(u64, u64), Failure> {
        let seen = self.seen();
        let pid = self.control.supervisor.load(Ordering::Acquire).cast_signed();
        let killed_ns = now_ns();
        // SAFETY: plain system call; the process leads our own job.
        if unsafe { libc::kill(pid, libc::SIGKILL) } != 0 {
            return Err(Failure::Run(format!("supervisor {pid} is not there to be killed")));
        }
        let gap = self.look(killed_ns, &seen);
        let led = || self.control.led_ns.load(Ordering::Acquire);
        let begun = Instant::now();
        while led() <= killed_ns {
            if begun.elapsed() > PATIENCE {
                return Err(Failure::Run("no supervisor followed".into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok((led() - killed_ns, gap))
    }
}

/// What the job says at its end.
#[derive(Debug, serde::Deserialize)]
struct Report {
    workers: u64,
    dropped: u64,
    counters: BTreeMap<String, u64>,
    restarts: Vec<serde_json::Value>,
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    if args.kills == 0 || args.rate == Some(0) {
        return Err(Failure::Usage("--kills and --rate must be at least 1".into()));
    }
    let folder = scratch::Folder::new()?;
    let plan = Plan { keys: super::KEYS, rate: args.rate, folder: folder.path().into() };
    let (regime, result) = regime::around(|| play(args, &plan));
    let (calm, struck, report) = result?;
    let account = account(report.workers, &report.counters, &folder.path().join("finals"))?;
    let mut params = Params::new();
    params.insert("tier".into(), "supervisor".into());
    params.insert("kills".into(), args.kills.into());
    params.insert("rate".into(), args.rate.into());
    params.insert("keys".into(), account.keys.into());
    params.insert("events".into(), account.events.into());
    args.engine.describe(&args.engine.settings(NAME)?, &mut params);
    let mut lines = Lines::new("recovery", params, regime);
    let mut adopted: Vec<u64> = struck.iter().map(|(adopted, _)| *adopted).collect();
    adopted.sort_unstable();
    for (suffix, q) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
        let nanos = crate::report::quantile(&adopted, q);
        lines.add(&format!("adopted_ms_{suffix}"), nanos as f64 / 1e6, "ms");
    }
    add(&mut lines, "gap_us", struck.iter().map(|(_, gap)| *gap));
    add(&mut lines, "calm_gap_us", calm.iter().copied());
    lines.add("restarts", report.restarts.len(), "workers");
    lines.add("lost", account.lost, "records");
    lines.add("doubled", account.doubled, "records");
    lines.add("dropped", report.dropped, "records");
    let accounted = i128::from(account.found) + i128::from(report.dropped);
    let unaccounted = i64::try_from(i128::from(account.events) - accounted).unwrap_or(i64::MAX);
    lines.add("unaccounted", unaccounted, "records");
    Ok(lines.finish())
}

/// Pauses without a kill; for each kill, how long until somebody led, and the longest pause.
type Played = (Vec<u64>, Vec<(u64, u64)>, Report);

fn play(args: &Args, plan: &Plan) -> Result<Played, Failure> {
    let mut running = launch(args, plan)?;
    let mut random = args.seed;
    let mut pause = || {
        random = splitmix64(random);
        let micros = args.pause_ms * 1000;
        std::thread::sleep(Duration::from_micros(micros + random % micros.max(1)));
    };
    let (mut calm, mut struck) = (Vec::new(), Vec::new());
    for _ in 0..args.kills {
        pause();
        let seen = running.seen();
        calm.push(running.look(now_ns(), &seen));
    }
    for _ in 0..args.kills {
        pause();
        struck.push(running.strike()?);
    }
    std::fs::write(plan.folder.join("stop"), "")?;
    let mut said = String::new();
    if let Some(mut stderr) = running.child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    let status = running.child.wait()?;
    let report = said.lines().find(|line| line.starts_with('{'));
    match report.and_then(|line| serde_json::from_str(line).ok()) {
        Some(report) if status.success() => Ok((calm, struck, report)),
        _ => Err(Failure::Run(format!("the job ended with {status}: {said}"))),
    }
}
