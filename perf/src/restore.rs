//! Restoring: a job with much state is stopped by SIGKILL and goes on from its checkpoint.
//!
//! A first process counts by key with large values until the state is there and in a complete
//! checkpoint; then its whole group is killed. Each further process resumes from that checkpoint,
//! and takes none itself. The clock runs from before its start. *First output*: the first result at
//! the sink of any worker. *Loaded*: no worker has anything of the checkpoint left to read. Lazily,
//! pages come when they are touched; eagerly (the system call for it is refused to the process),
//! all of them before the first step. What comes out must continue the counts.
//!
//! Files are dropped from the page cache before each run. The bare disk reads the same files with
//! as many threads.
//!
//! Called by `main`.

use crate::regime;
use crate::report::{Failure, Line, Lines, Params, median};
use crate::workloads::splitmix64;
use crate::{EngineArgs, raw, scratch};
use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use testudo::checkpoint::schedule::Schedule;
use testudo::prelude::*;
use testudo::source::{Collect, Progress, Reader, Source, Subtask};
use testudo::state::checkpoint::{ManifestName, RegionName, Store};
use testudo::state::disk::{self, BLOCK, DiskKind};
use testudo::time::now_ns;
use testudo_shm::header::WorkerState;
use testudo_shm::primitive::Ordering;
use testudo_shm::zerocopy;

/// Restoring.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// State of the whole job, at least, in MiB
    #[arg(long, default_value_t = 1024, value_name = "M")]
    state_mib: u64,
    /// Events a second after resuming, all sources together
    #[arg(long, default_value_t = 1_000, value_name = "R")]
    rate: u64,
    /// Keep the state in so many open windows, of which the first fires after resuming
    #[arg(long, default_value_t = 0, value_name = "N")]
    windows: u64,
    /// Workers after resuming [default: as many as before]
    #[arg(long, value_name = "W")]
    resumed_workers: Option<usize>,
    /// Runs of each kind; medians count
    #[arg(long, default_value_t = 3, value_name = "N")]
    runs: usize,
    /// Leave out the runs that load everything first
    #[arg(long)]
    no_eager: bool,
    /// Folder for checkpoints, on a disk [default: the temporary folder, or this one]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// The job's own process.
#[derive(Debug, Clone, clap::Args)]
pub struct JobArgs {
    #[arg(long)]
    plan: String,
}

/// What every process of the job is told.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Plan {
    keys: u64,
    rate: u64,
    windows: u64,
    /// Where processes say what has happened.
    marks: PathBuf,
    checkpoints: PathBuf,
    workers: usize,
    key_groups: usize,
    interval_ms: u64,
    resumes: bool,
    is_eager: bool,
}

/// Words of a value: with its key it takes a kibibyte.
const WORDS: usize = 127;

/// Values' share of the state: the rest is free slots and what tables leave behind as they grow.
/// Tables have powers of two of slots, so the state may be up to twice as large; the result says
/// how large it was.
const FILLED: f64 = 0.45;

/// An event.
#[testudo::record]
struct Event {
    key: u64,
    number: u64,
    at: i64,
}

impl Event {
    /// An event of the time before the job is stopped.
    fn filling(key: u64, windows: u64) -> Self {
        Self { key, number: 0, at: (key % windows.max(1)) as i64 * WINDOW_MS }
    }

    /// One of the time behind: late enough for the first window to fire.
    fn later(key: u64, number: u64, windows: u64) -> Self {
        Self { key, number, at: (windows as i64 + 1) * WINDOW_MS + 1 }
    }
}

/// Length of a window.
const WINDOW_MS: i64 = 1000;

/// A count, and what makes it large.
#[testudo::record]
struct Wide {
    words: [u64; WORDS],
}

/// Emits every key once, then keys at random at the plan's rate, without an end.
#[derive(Debug)]
struct Events(Plan);

/// Where an [`Events`] stands.
#[derive(Debug, Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
#[zerocopy(crate = "testudo_shm::zerocopy")]
#[repr(C)]
struct Place {
    filled: u64,
    next: u64,
}

struct EventsReader {
    plan: Plan,
    subtask: Subtask,
    /// When event `.1` was due: this reader's own schedule.
    paced: Option<(u64, u64)>,
}

impl Source for Events {
    type Out = Event;
    type Position = Place;
    type Reader = EventsReader;

    fn start(&self, subtask: Subtask) -> Place {
        Place { filled: subtask.index as u64, next: subtask.index as u64 }
    }

    fn open(&self, subtask: Subtask, _from: &Place) -> Result<EventsReader, String> {
        Ok(EventsReader { plan: self.0.clone(), subtask, paced: None })
    }
}

impl Reader<Event, Place> for EventsReader {
    fn read(
        &mut self,
        at: &mut Place,
        max: usize,
        out: &mut impl Collect<Event>,
    ) -> Result<Progress, String> {
        let step = self.subtask.count as u64;
        if at.filled < self.plan.keys {
            for _ in 0..max.min(((self.plan.keys - at.filled) / step + 1) as usize) {
                if at.filled < self.plan.keys {
                    out.emit(Event::filling(at.filled, self.plan.windows));
                    at.filled += step;
                }
            }
            return Ok(Progress::More);
        }
        if self.paced.is_none() && !self.plan.resumes {
            mark(&self.plan.marks, &format!("filled-{}", self.subtask.index));
        }
        let now = now_ns();
        let (begun, first) = *self.paced.get_or_insert((now, at.next));
        let due = |next: u64| {
            begun + (u128::from(next - first) * 1_000_000_000 / u128::from(self.plan.rate)) as u64
        };
        let mut left = max;
        while due(at.next) <= now && left > 0 {
            let key = splitmix64(at.next) % self.plan.keys;
            // Before the job is stopped, no window fires.
            out.emit(match self.plan.resumes {
                true => Event::later(key, at.next, self.plan.windows),
                false => Event::filling(key, self.plan.windows),
            });
            at.next += step;
            left -= 1;
        }
        Ok(if left == 0 { Progress::More } else { Progress::Idle { until_ns: due(at.next) } })
    }
}

/// Leaves a file with the time in it.
fn mark(folder: &Path, name: &str) {
    let text = now_ns().to_string();
    let (new, path) = (folder.join(format!(".{name}")), folder.join(name));
    if let Err(error) = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)) {
        eprintln!("testudo-perf: cannot write {}: {error}", path.display());
    }
}

/// The times in the files whose name begins so.
fn marks(folder: &Path, begin: &str) -> Result<Vec<u64>, Failure> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(begin) {
            found.push(std::fs::read_to_string(entry.path())?.parse().unwrap_or(0));
        }
    }
    Ok(found)
}

/// The job, in every process. Parameters: a [`Plan`].
fn job(flow: &Flow, parameters: &str) {
    let Ok(plan) = serde_json::from_str::<Plan>(parameters) else {
        return;
    };
    let (folder, resumes, is_first) = (plan.marks.clone(), plan.resumes, Cell::new(true));
    let (windows, least) = (plan.windows, if plan.windows > 0 { 1 } else { 2 });
    let see = move |[key, count, last]: &[u64; 3]| {
        if resumes && is_first.replace(false) {
            mark(&folder, &format!("first-{}", std::process::id()));
            if *count < least || key != last {
                mark(&folder, "wrong");
            }
        }
    };
    let (init, emit) = (
        || Wide { words: [0; WORDS] },
        |key: &u64, wide: &Wide| [*key, wide.words[0], wide.words[WORDS - 1]],
    );
    let fold = |wide: &mut Wide, event: &Event| {
        wide.words[0] += 1;
        wide.words[WORDS - 1] = event.key;
    };
    let events = flow.source("events", Events(plan));
    if windows == 0 {
        return events.key_by(|event| event.key).aggregate(init, fold, emit).for_each(see);
    }
    let merge = |wide: &mut Wide, other: &Wide| wide.words[0] += other.words[0];
    events
        .event_time(Duration::from_millis(WINDOW_MS as u64 * windows), |event| event.at)
        .key_by(|event| event.key)
        .window(tumbling(Duration::from_millis(WINDOW_MS as u64)), |event| event.at)
        .aggregate(init, fold, merge, move |key, _, wide| emit(key, wide))
        .for_each(see);
}

/// What a started process does.
pub fn job_process(args: &JobArgs) -> Result<(), Failure> {
    let plan: Plan = serde_json::from_str(&args.plan)
        .map_err(|error| Failure::Usage(format!("--plan: {error}")))?;
    if plan.is_eager {
        refuse_missing_pages()?;
    }
    let settings = Settings {
        name: "perf-restore".into(),
        workers: plan.workers,
        key_groups: plan.key_groups,
        progress: false,
        checkpoint_dir: Some(plan.checkpoints.clone()),
        checkpoints: match plan.interval_ms {
            0 => Schedule::Never,
            ms => Schedule::Every(Duration::from_millis(ms)),
        },
        resume: plan.resumes,
        ..Settings::default()
    };
    let running = Job::new(job).parameters(&args.plan).settings(settings).start();
    let view = running.workers();
    while let Some(view) = &view
        && !running.is_over()
    {
        let is_loaded = |worker: &&testudo_shm::header::WorkerHeader| {
            WorkerState::of(worker.state.load(Ordering::Acquire)) == WorkerState::Running
                && worker.restoring.load(Ordering::Acquire) == 0
        };
        if view.workers.iter().all(is_loaded) {
            mark(&plan.marks, "loaded");
            let attached = view.workers.iter().map(|w| w.attached_ns.load(Ordering::Acquire));
            let attached = attached.min().unwrap_or(0).to_string();
            std::fs::write(plan.marks.join("attached"), attached)?;
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    running.join()?;
    Ok(())
}

/// From here on, this process and its children are not allowed to use userfaultfd.
fn refuse_missing_pages() -> Result<(), Failure> {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let line = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut lines = [
        line(LOAD_NUMBER, 0, 0),
        line(IF_EQUAL, libc::SYS_userfaultfd as u32, 1),
        line(RETURN, refused, 0),
        line(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: lines.len() as u16, filter: lines.as_mut_ptr() };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the filter is valid for the call, which copies it.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// A started job; its whole group is killed when this is dropped.
struct Group(Child);

impl Group {
    #[expect(clippy::disallowed_methods, reason = "starts a whole job, as a user would")]
    fn start(plan: &Plan) -> Result<(Self, u64), Failure> {
        let text = serde_json::to_string(plan).unwrap_or_default();
        let mut command = Command::new("/proc/self/exe");
        command.args(["restore-job", "--plan", &text]).stdout(Stdio::null()).process_group(0);
        let begun = now_ns();
        Ok((Self(command.spawn()?), begun))
    }

    /// Waits until `look` gives something.
    fn wait<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut() -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        const PATIENCE: Duration = Duration::from_secs(300);
        let begun = Instant::now();
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if let Some(status) = self.0.try_wait()? {
                return Err(Failure::Run(format!("the job ended with {status} before {what}")));
            }
            if begun.elapsed() > PATIENCE {
                return Err(Failure::Run(format!("{what}: nothing in {PATIENCE:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the group was made for the child, which is not waited for yet.
        unsafe { libc::kill(-(self.0.id() as i32), libc::SIGKILL) };
        let _ = self.0.wait();
        // The workers' memory goes with them, which takes its time.
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// Measures.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    let then = args.resumed_workers;
    if args.state_mib == 0 || then == Some(0) || args.rate == 0 || args.runs == 0 {
        return Err(Failure::Usage(
            "--state-mib, --rate, --runs and --resumed-workers must be at least 1".into(),
        ));
    }
    let folder = scratch::Folder::on_disk(args.folder.as_deref())?;
    let settings = args.engine.settings("perf-restore")?;
    let plan = Plan {
        keys: ((args.state_mib << 10) as f64 * FILLED) as u64,
        rate: args.rate,
        windows: args.windows,
        marks: folder.path().join("marks"),
        checkpoints: folder.path().join("checkpoints"),
        workers: settings.workers,
        key_groups: settings.key_groups,
        interval_ms: 2_000 + 10 * args.state_mib,
        resumes: false,
        is_eager: false,
    };
    fill(&plan)?;
    let (bytes, files) = what_is_there(&plan)?;
    let mut params = Params::new();
    params.insert("state_mib".into(), (bytes >> 20).into());
    params.insert("keys".into(), plan.keys.into());
    params.insert("rate".into(), args.rate.into());
    params.insert("windows".into(), args.windows.into());
    params.insert("resumed_workers".into(), then.unwrap_or(plan.workers).into());
    args.engine.describe(&settings, &mut params);
    let (regime, measured) = regime::around(|| {
        let then = Plan { workers: then.unwrap_or(plan.workers), ..plan.clone() };
        let lazy = several(&then, args.runs, false)?;
        let eager = if args.no_eager { Vec::new() } else { several(&then, args.runs, true)? };
        let raw = (0..args.runs).map(|_| {
            forget(&plan.checkpoints)?;
            raw::read(&files)
        });
        Ok::<_, Failure>((lazy, eager, raw.collect::<Result<Vec<_>, Failure>>()?))
    });
    let (lazy, eager, raw) = measured?;
    let mut lines = Lines::new("restore", params, regime);
    let of = |runs: &[Run], of: fn(&Run) -> f64| median(runs.iter().map(of));
    lines.add("first_output_ms", of(&lazy, |run| run.first_ms), "ms");
    lines.add("loaded_ms", of(&lazy, |run| run.loaded_ms), "ms");
    let load_s = of(&lazy, |run| run.load_ms) / 1e3;
    lines.add("read_mb_per_s", bytes as f64 / 1e6 / load_s, "MB/s");
    lines.add("raw_read_mb_per_s", median(raw) / 1e6, "MB/s");
    if !eager.is_empty() {
        lines.add("first_output_eager_ms", of(&eager, |run| run.first_ms), "ms");
    }
    Ok(lines.finish())
}

/// Runs the job until its state is in a checkpoint, then kills it.
fn fill(plan: &Plan) -> Result<(), Failure> {
    std::fs::create_dir(&plan.marks)?;
    let (mut job, _) = Group::start(plan)?;
    job.wait("its state was there", || {
        Ok((marks(&plan.marks, "filled")?.len() == plan.workers).then_some(()))
    })?;
    let newest = || -> Result<u64, Failure> {
        let mut newest = 0;
        for entry in std::fs::read_dir(&plan.checkpoints)? {
            let name = ManifestName::parse(&entry?.file_name().to_string_lossy());
            newest = newest.max(name.map_or(0, |name| name.id));
        }
        Ok(newest)
    };
    // The one that is open now may have begun before.
    let wanted = newest()? + 2;
    job.wait("its checkpoint was complete", || Ok((newest()? >= wanted).then_some(())))
}

/// Bytes of state in the newest checkpoint, and each worker's files.
fn what_is_there(plan: &Plan) -> Result<(u64, Vec<Vec<PathBuf>>), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::Run(error.to_string());
    let (disk, _) = disk::open(DiskKind::Auto)?;
    let mut store = Store::open(&plan.checkpoints, disk).map_err(|error| failed(&error))?;
    let candidates = store.candidates().map_err(|error| failed(&error))?;
    let manifest = candidates.into_iter().find_map(|candidate| candidate.manifest);
    let manifest = manifest.ok_or_else(|| Failure::Run("there is no checkpoint".into()))?;
    let (mut pages, mut files) = (0, vec![Vec::new(); plan.workers]);
    for worker in manifest.regions.iter().flat_map(|region| &region.workers) {
        let chain = store.chain(&worker.file).map_err(|error| failed(&error))?;
        pages += (0..chain.segments().len()).map(|n| chain.pages(n).count()).sum::<usize>();
        for (_, file) in chain.files() {
            let name = RegionName::parse(&file.name).map_or(0, |name| name.worker as usize);
            files[name % plan.workers].push(plan.checkpoints.join(&file.name));
        }
    }
    Ok(((pages * BLOCK) as u64, files))
}

/// One resumed run.
#[derive(Debug)]
struct Run {
    first_ms: f64,
    loaded_ms: f64,
    /// From the first worker's readiness to the end of loading.
    load_ms: f64,
}

fn several(plan: &Plan, runs: usize, is_eager: bool) -> Result<Vec<Run>, Failure> {
    let plan = Plan { resumes: true, interval_ms: 0, is_eager, ..plan.clone() };
    (0..runs).map(|_| resume(&plan)).collect()
}

fn resume(plan: &Plan) -> Result<Run, Failure> {
    forget(&plan.checkpoints)?;
    std::fs::remove_dir_all(&plan.marks)?;
    std::fs::create_dir(&plan.marks)?;
    let (mut job, begun) = Group::start(plan)?;
    let times = job.wait("all was loaded", || {
        let firsts = marks(&plan.marks, "first")?.into_iter().min();
        let loaded = marks(&plan.marks, "loaded")?.into_iter().min();
        let attached = marks(&plan.marks, "attached")?.into_iter().min().filter(|ns| *ns > 0);
        Ok(firsts.zip(loaded).zip(attached))
    })?;
    if !marks(&plan.marks, "wrong")?.is_empty() {
        return Err(Failure::Wrong("a count did not go on from the checkpoint".into()));
    }
    let ((first, loaded), attached) = times;
    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    Ok(Run {
        first_ms: ms(begun, first),
        loaded_ms: ms(begun, loaded),
        load_ms: ms(attached, loaded).max(0.001),
    })
}

/// Drops a folder's files from the page cache.
fn forget(folder: &Path) -> Result<(), Failure> {
    for entry in std::fs::read_dir(folder)? {
        let file = std::fs::File::open(entry?.path())?;
        file.sync_all()?;
        // SAFETY: a plain system call on an open file.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
    Ok(())
}
