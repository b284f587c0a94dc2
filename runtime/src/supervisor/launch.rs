//! Launching: from a described job to its report. Creates and maps the segments, starts the
//! workers, then waits and acts until the job is over.
//!
//! Called by `testudo::main` and by programs that embed a job ([`Job`]).

#![expect(unsafe_code, reason = "maps the segments that it created; raises the descriptor limit")]

mod adopt;

use super::board::Board;
use super::checkpoint::{Checkpointer, Opening};
use super::chronicle::{Chronicle, Scribe};
use super::console::{self, Console};
use super::dead_letters::{self, DeadLetters, Held};
use super::description::{Description, FollowFds, Rewound, SegmentFds};
use super::folders::Folders;
use super::orders::{Job as OrdersJob, Orders};
use super::outputs::Outputs;
use super::progress::Progress;
use super::recover::Crew;
use super::replicas::Replicas;
use super::report::Report;
use super::resume::{self, Chosen, Resumed};
use super::rewind::job::JobRung;
use super::rewind::{self, Hands, Rewinds};
use super::spawn::Spawner;
use super::steer::Steer;
use super::update::Past;
use super::watch::{Events, Watch, event_fd};
use crate::config::Settings;
use crate::error::Error;
use crate::flow::Flow;
use crate::keeper::{Line, place};
use crate::metrics::figures::ReplicaFigures;
use crate::metrics::serve::MetricsServer;
use crate::plan::Plan;
use crate::plan::layout::JOURNAL_BYTES;
use crate::sink::SinkHooks;
use crate::testing::{Point, point};
use crate::time::now_ns;
use crate::worker::attach::ring_parts;
use crate::worker::entry::{JobFn, entry_offset};
use crate::worker::inspect;
use crate::worker::restore::Checkpoints;
use std::collections::HashMap;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::consumer::Consumer;
use testudo_shm::counters::Counter;
use testudo_shm::header::{self, ControlHeader, WorkerHeader, control};
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::ring::RingParts;
use testudo_shm::segment::{PAGE, Segment};
use testudo_shm::wait::{self, WaitWord};

/// A job inside another program: the program's main begins with [`init`](crate::init), and the
/// job's function is a plain `fn`, found again in the worker processes.
///
/// ```no_run
/// use testudo::prelude::*;
///
/// fn build(flow: &Flow, upto: &str) {
///     let upto = upto.parse().unwrap_or(0);
///     flow.source("numbers", Generator::new(upto, |n| n)).for_each(|_| ());
/// }
///
/// fn main() -> Result<(), testudo::Error> {
///     testudo::init();
///     let report = Job::new(build).parameters("1000000").run()?;
///     assert_eq!(report.records_in, 1_000_000);
///     Ok(())
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Job {
    build: JobFn,
    parameters: String,
    settings: Settings,
}

impl Job {
    /// A job described by `build`, which gets [`Job::parameters`] in every process.
    #[must_use]
    pub fn new(build: fn(&Flow, &str)) -> Self {
        Self {
            build,
            parameters: String::new(),
            settings: Settings { progress: false, ..Settings::default() },
        }
    }

    /// Text handed to the job's function: what the job is to do, in whatever form it likes.
    #[must_use]
    pub fn parameters(mut self, parameters: impl Into<String>) -> Self {
        self.parameters = parameters.into();
        self
    }

    /// The settings.
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Runs the job to its end in this thread.
    ///
    /// # Errors
    /// Why it could not start or failed.
    pub fn run(self) -> Result<Report, Error> {
        self.run_with(Arc::default(), |_| ())
    }

    /// Runs the job in a thread of its own.
    #[must_use]
    pub fn start(self) -> Running {
        let events = Arc::new(Events::default());
        let shared = Arc::clone(&events);
        let (send, started) = crossbeam::channel::bounded(1);
        let run = move || self.run_with(shared, |pids| drop(send.send(pids)));
        Running { thread: std::thread::spawn(run), events, started }
    }

    fn run_with(self, events: Arc<Events>, started: impl FnOnce(View)) -> Result<Report, Error> {
        if let Some(asked) = inspect::asked() {
            let why = "its jobs are inside another program; only programs of testudo::main can be \
                       updated";
            inspect::refuse(asked, why.into());
        }
        self.settings.check()?;
        let entry = entry_offset(self.build);
        let parameters = self.parameters.clone();
        let build = move |flow: &Flow| (self.build)(flow, &parameters);
        let launch =
            Launch { settings: self.settings, parameters: self.parameters, entry, keeper: None };
        launch.run(build, events, started)
    }
}

/// What a program may look at while its job runs.
#[derive(Debug, Clone)]
pub struct View {
    /// The headers of all workers: process id, commits, gaps.
    pub workers: Vec<&'static WorkerHeader>,
    replicas: Arc<Replicas>,
    board: Arc<Board>,
}

impl View {
    fn new(plan: &Plan, scene: &Scene, board: &Arc<Board>) -> Self {
        let replicas = Arc::new(Replicas::new(plan, scene));
        Self { workers: scene.workers.clone(), replicas, board: Arc::clone(board) }
    }

    /// Records that sources have read.
    #[must_use]
    pub fn records_in(&self) -> u64 {
        self.board.figures().workers.iter().map(|worker| worker.records_in).sum()
    }

    /// What replicas do, by worker of tier 1.
    #[must_use]
    pub fn replicas(&self) -> Vec<ReplicaFigures> {
        self.replicas.figures()
    }
}

/// A job that runs in a thread of this program.
#[derive(Debug)]
pub struct Running {
    thread: std::thread::JoinHandle<Result<Report, Error>>,
    events: Arc<Events>,
    started: crossbeam::channel::Receiver<View>,
}

impl Running {
    /// Waits until the workers are started; `None` when the job could not start.
    #[must_use]
    pub fn workers(&self) -> Option<View> {
        self.started.recv().ok()
    }

    /// Asks the job to end: the first time it drains, the second time it stops at once.
    pub fn stop(&self) {
        self.events.request_stop();
    }

    /// Keeps a worker that dies from being replaced, until it is called again with `false`: for
    /// tests and measurements of what its peers do meanwhile.
    pub fn hold(&self, worker: usize, is_held: bool) {
        self.events.hold(worker, is_held);
    }

    /// True when the job is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the job's end.
    ///
    /// # Errors
    /// Why it could not start or failed.
    pub fn join(self) -> Result<Report, Error> {
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => Err(Error::Machine("the supervisor's thread panicked".into())),
        }
    }
}

/// Everything needed to launch.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) settings: Settings,
    pub(crate) parameters: String,
    pub(crate) entry: isize,
    /// The keeper, where the job has one.
    pub(crate) keeper: Option<&'static Line>,
}

/// What the runs of a job know of those before.
#[derive(Default)]
struct Attempts {
    /// The checkpoint that the present one went on from.
    resumed: Option<u64>,
    /// Checkpoints that turned out to be damaged.
    unusable: Vec<u64>,
    job: JobRung,
}

/// A job that may begin.
struct Prepared {
    surveys: Vec<String>,
    plan: Plan,
    sinks: Vec<SinkHooks>,
    outputs: Outputs,
    folders: Option<Folders>,
    chosen: Option<Resumed>,
    /// The epoch of each worker's cut that the checkpoint to go on from holds.
    held: HashMap<usize, u64>,
    job_id: u64,
}

/// Descriptors kept free for files, sockets and the like.
const SPARE_DESCRIPTORS: usize = 64;

impl Launch {
    /// Plans, launches, waits, reports.
    pub(crate) fn run(
        mut self,
        build: impl Fn(&Flow),
        events: Arc<Events>,
        started: impl FnOnce(View),
    ) -> Result<Report, Error> {
        let mut attempts = Attempts::default();
        let mut started = Some(started);
        let mut is_first = true;
        loop {
            attempts.resumed = None;
            let started = |view: View| {
                if let Some(started) = started.take() {
                    started(view);
                }
            };
            // A supervisor that follows another one leads the job that there is.
            let past = self
                .keeper
                .filter(|line| std::mem::take(&mut is_first) && line.role().job.is_some());
            let result = match past {
                Some(line) => self.adopt(line, &build, &events, &mut attempts),
                None => self.run_once(&build, &events, started, &mut attempts),
            };
            match result {
                // A block that a worker could not read: what it stands for is older now.
                Err(Error::Damaged(damage))
                    if attempts.resumed.is_some() && self.settings.resume =>
                {
                    crate::say!("testudo: {damage}");
                    attempts.unusable.extend(attempts.resumed);
                }
                Err(error) if attempts.job.take_up(&error) => {
                    self.settings.resume = self.settings.checkpoint_dir.is_some();
                    self.settings.resume_from = None;
                }
                Err(error) => return Err(attempts.job.account_for(error)),
                Ok(report) => return Ok(attempts.job.added_to(report)),
            }
        }
    }

    /// As `run`, from the newest checkpoint that is not among the unusable ones.
    fn run_once(
        &mut self,
        build: &impl Fn(&Flow),
        events: &Arc<Events>,
        started: impl FnOnce(View),
        attempts: &mut Attempts,
    ) -> Result<Report, Error> {
        if let Some(line) = self.keeper {
            // What an earlier attempt held: segments, and the locks of outputs.
            line.release()?;
        }
        let prepared = self.prepare(build, &attempts.unusable, &mut attempts.resumed)?;
        let Some(mut prepared) = prepared else {
            let (_, plan) = self.plan(build)?;
            crate::say!("testudo: the job had come to its end; there is nothing to go on with");
            return Ok(Report::nothing(&plan, &self.settings));
        };
        prepared.outputs.place(self.keeper)?;
        let listener = self.listener()?;
        let notice = place(event_fd()?, self.keeper)?;
        let watch = Watch::start(Arc::clone(events), notice, self.keeper)?;
        let (surveys, checkpoints) = (prepared.surveys.clone(), prepared.checkpoints());
        let scene = Scene::build(&prepared.plan, self, surveys, checkpoints, &watch)?;
        prepared.begin(&self.settings)?;
        let Prepared { plan, outputs, folders, chosen, job_id, .. } = prepared;
        let chosen = chosen.as_ref();
        let mut checkpointer = folders
            .map(|all| Checkpointer::new(&plan, &self.settings, all, chosen, job_id, events))
            .transpose()?;
        let board = Board::new(&plan, &self.settings, &scene, now_ns());
        if let Some(checkpointer) = &mut checkpointer {
            checkpointer.announce(&plan, &scene, chosen);
            checkpointer.attend(board.externals.clone());
        }
        let listens = listener.as_ref().map(AsRawFd::as_raw_fd);
        let metrics = listener.map(|listener| board.serve(listener)).transpose()?;
        let chronicle = Chronicle::create(self.keeper)?;
        let console = console::Kept::new(&plan, self.keeper, chronicle.console())?;
        let mut scribe = Scribe::new(chronicle, now_ns());
        let ends = console.as_ref().map(console::Kept::ends);
        scribe.begin(&outputs.locks(), ends, listens);
        if let Some(line) = self.keeper {
            let rest = [outputs.locks(), ends.into_iter().flatten().collect()].concat();
            hand_over(line, &scene, rest.into_iter().chain(listens), &scribe)?;
        }
        let spawner = Spawner::new(self.keeper);
        let crew = Crew::start(&plan, &self.settings, &scene, &watch, spawner, self.entry)?;
        started(View::new(&plan, &scene, &board));
        let mut orders = Orders::open(&self.settings, events, scribe.begun_ns(), self.keeper);
        orders.metrics = metrics.as_ref().map(|metrics| metrics.address());
        scribe.note_socket(orders.kept());
        let play = Play {
            plan: &plan,
            settings: &self.settings,
            scene: &scene,
            watch,
            crew,
            opening: None,
            checkpointer,
            orders,
            rewinds: Rewinds::new(&plan),
            board,
            _metrics: metrics,
            steer: Steer::default(),
            scribe,
            keeper: self.keeper,
        };
        play.lead(events, (outputs, console), &mut attempts.job)
    }
}

impl Play<'_> {
    /// Leads the job to its end, and says how it went.
    fn lead(
        mut self,
        events: &Arc<Events>,
        (outputs, console): (Outputs, Option<console::Kept>),
        rung: &mut JobRung,
    ) -> Result<Report, Error> {
        let begun = std::time::Instant::now();
        let (plan, settings, scene) = (self.plan, self.settings, self.scene);
        let console = if self.is_leaving() {
            Console::none()
        } else {
            Console::start(plan, settings, scene, events, console, &self.board.externals)?
        };
        scene.control_header.led_ns.store(now_ns(), Ordering::Release);
        if let Some(line) = self.keeper {
            line.leads()?;
        }
        point(Point::Adopted);
        let result = self.wait(events, &console);
        rung.hear(&mut self.rewinds, result.is_err(), begun);
        self.crew.end(result.is_err());
        if result.is_err() && self.rewinds.wants_job() {
            console.settle();
        }
        let console_failed = console.has_failed();
        let console = console.join(result.is_err());
        let ended = if result.is_ok() && console.is_ok() { outputs.end(plan) } else { Ok(()) };
        drop(outputs);
        // The console's own error says what happened; the other one then only that it did.
        if !console_failed {
            result?;
            console?;
        } else {
            console?;
            result?;
        }
        ended?;
        let restarts = std::mem::take(&mut self.crew.restarts);
        let elapsed = Duration::from_nanos(now_ns() - self.scribe.begun_ns());
        let mut report = Report::new(plan, settings, scene, restarts, elapsed);
        report.drained = events.signals.load(Ordering::Acquire) > 0;
        Ok(report.with_checkpoints(self.checkpointer.as_ref().map(Checkpointer::history)))
    }
}

impl Launch {
    /// Everything up to the first segment: the folder, the checkpoint to go on from, the plan, the
    /// claim to the outputs. `None` when the job that is to go on had come to its end.
    fn prepare(
        &mut self,
        build: &impl Fn(&Flow),
        unusable: &[u64],
        resumed: &mut Option<u64>,
    ) -> Result<Option<Prepared>, Error> {
        let mut folders = Folders::open(&self.settings)?;
        let chosen = self.choose(folders.as_ref(), unusable)?;
        if let Some(chosen) = &chosen {
            folders.iter_mut().for_each(|folders| folders.choose(chosen.folder));
            *resumed = Some(chosen.manifest.id);
            // State by key group goes on in as many groups as there were.
            let (groups, asked) = (chosen.manifest.groups as usize, self.settings.key_groups);
            if std::mem::replace(&mut self.settings.key_groups, groups) != groups {
                crate::say!(
                    "testudo: going on with the {groups} key groups of checkpoint {}, not with \
                     {asked} (--key-groups counts when a job begins without --resume)",
                    chosen.manifest.id
                );
            }
        }
        let (flow, plan) = self.plan(build)?;
        if let Some(chosen) = &chosen
            && plan.key_groups != chosen.manifest.groups as usize
        {
            return Err(Error::Machine(format!(
                "the {} key groups of checkpoint {} need more descriptors than are allowed; raise \
                 the limit with ulimit -n",
                chosen.manifest.groups, chosen.manifest.id
            )));
        }
        let is_over = chosen.as_ref().is_some_and(|chosen| chosen.manifest.finished);
        let held = chosen.as_ref().map(|chosen| held_epochs(&chosen.manifest)).unwrap_or_default();
        let job_id = chosen.as_ref().map_or_else(job_id, |chosen| chosen.manifest.job_id);
        let is_lazy = chosen.is_some() && can_load_lazily();
        let chosen = chosen.map(|chosen| chosen.fit(&plan, &self.settings, is_lazy)).transpose()?;
        let sinks = std::mem::take(&mut flow.draft.borrow_mut().sinks);
        if let Some(chosen) = chosen.as_ref().filter(|_| !is_over) {
            Outputs::check(&plan, &sinks, chosen)?;
        }
        let outputs = Outputs::claim(&plan, folders.is_some())?;
        dead_letters::check(&plan, &self.settings)?;
        let surveys = flow.draft.borrow().surveys.clone();
        let mut prepared =
            Prepared { surveys, plan, sinks, outputs, folders, chosen, held, job_id };
        if is_over {
            prepared.end_again()?;
            return Ok(None);
        }
        Ok(Some(prepared))
    }

    /// Where metrics will be asked for, if the settings say so.
    fn listener(&self) -> Result<Option<TcpListener>, Error> {
        let Some(address) = self.settings.listen else { return Ok(None) };
        let listener = place(MetricsServer::bind(address)?.into(), self.keeper)?;
        Ok(Some(TcpListener::from(listener)))
    }

    /// The checkpoint to go on from, if the settings ask for one and there is one.
    fn choose(&self, folders: Option<&Folders>, unusable: &[u64]) -> Result<Option<Chosen>, Error> {
        let Some(folders) = folders else { return Ok(None) };
        if !self.settings.resume && self.settings.resume_from.is_none() {
            return Ok(None);
        }
        let chosen = resume::choose(folders, &self.settings, unusable)?;
        if chosen.is_none() {
            let folder = self.settings.checkpoint_dir.as_deref().unwrap_or(Path::new(""));
            crate::say!(
                "testudo: no checkpoint in {} yet: the job begins afresh, its outputs are emptied",
                folder.display()
            );
        }
        Ok(chosen)
    }

    /// Draws and plans, with fewer key groups where the descriptor limit asks for it.
    fn plan(&mut self, build: &impl Fn(&Flow)) -> Result<(Flow, Plan), Error> {
        let limit = raise_descriptor_limit();
        let asked = self.settings.key_groups;
        loop {
            let flow = Flow::new(Rc::new(self.settings.clone()));
            build(&flow);
            let plan = Plan::new(&flow.draft.borrow(), &self.settings)?;
            if let (Some(path), 0) = (&self.settings.print_to, flow.draft.borrow().prints) {
                let path = path.display();
                return Err(Error::Usage(format!(
                    "--print-to {path}: this job prints nothing; leave it out"
                )));
            }
            let need = plan.layout.descriptors() + SPARE_DESCRIPTORS;
            if need <= limit {
                if self.settings.key_groups < asked {
                    crate::say!(
                        "testudo: {asked} key groups need more than the {limit} descriptors \
                         allowed (ulimit -n); \
                         using {}",
                        self.settings.key_groups
                    );
                }
                return Ok((flow, plan));
            }
            if self.settings.key_groups == 1 {
                return Err(Error::Machine(format!(
                    "the job needs {need} descriptors, the limit is {limit}; \
                     raise it with ulimit -n"
                )));
            }
            self.settings.key_groups /= 2;
        }
    }

    /// Draws and plans for `--explain`.
    pub(crate) fn explain(mut self, build: impl Fn(&Flow)) -> Result<String, Error> {
        let (_, plan) = self.plan(&build)?;
        Ok(crate::plan::explain::text(&plan, &self.settings))
    }
}

impl Prepared {
    /// What workers need to know of checkpoints.
    fn checkpoints(&self) -> Option<Checkpoints> {
        self.folders.as_ref().map(|folders| Checkpoints {
            folders: folders.paths(),
            from: folders.word(),
            job: self.job_id,
            restore: self.chosen.as_ref().map(|chosen| chosen.restore.clone()),
        })
    }

    /// From here on the checkpoint that was chosen is the newest.
    fn adopt_past(&self) -> Result<(), Error> {
        let past = self.chosen.as_ref().and_then(|chosen| chosen.past.clone());
        if let (Some(folders), Some(past)) = (&self.folders, past) {
            let adopted = folders.current().ask(move |store| store.adopt(&past))?;
            adopted.map_err(|error| Error::Checkpoint(error.to_string()))?;
        }
        Ok(())
    }

    /// The job that is to go on had come to its end.
    fn end_again(&mut self) -> Result<(), Error> {
        self.adopt_past()?;
        if let Some(chosen) = &self.chosen {
            Outputs::end_again(&self.plan, &self.sinks, chosen)?;
        }
        Ok(())
    }

    /// The job begins: outputs are emptied, or brought to where the checkpoint knows them. What may
    /// refuse a job has been asked before; nothing that is on the disk was changed so far.
    fn begin(&mut self, settings: &Settings) -> Result<(), Error> {
        let job_id = self.job_id;
        self.adopt_past()?;
        match (&self.folders, &self.chosen) {
            (_, Some(chosen)) => Outputs::go_on(&self.plan, &self.sinks, chosen)?,
            (Some(folders), None) => {
                // Before outputs are emptied: a crash must not go on with what they had.
                folders.in_each(move |store| store.reset(job_id))?;
                self.outputs.empty(&self.plan)?;
                Outputs::begin(&self.plan, &self.sinks)?;
            }
            (None, None) => self.outputs.empty(&self.plan)?,
        }
        let mut letters =
            DeadLetters::new(dead_letters::path(&self.plan, settings), &settings.name);
        letters.withdraw(|worker, epoch| Held::by(self.held.get(&worker), epoch))?;
        self.outputs.keep();
        Ok(())
    }
}

/// The epoch of each worker's cut that a checkpoint holds.
fn held_epochs(manifest: &testudo_state::checkpoint::Manifest) -> HashMap<usize, u64> {
    let regions = manifest.regions.iter();
    let of_region = |region: &testudo_state::checkpoint::manifest::Region| {
        let epoch = region.epoch;
        region.workers.iter().map(move |file| (file.worker as usize, epoch)).collect::<Vec<_>>()
    };
    regions.flat_map(of_region).collect()
}

/// A number that no other job has.
fn job_id() -> u64 {
    let now = crate::time::now_ns() ^ (crate::time::unix_ms() as u64) << 20;
    testudo_shm::hash::name_hash(&format!("{now}-{}", std::process::id()))
}

/// Whether missing pages may be brought when they are touched; says so once where they may not.
pub(crate) fn can_load_lazily() -> bool {
    let probe: Result<(), testudo_shm::fault::SetupError> = (|| {
        let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(PAGE)?));
        testudo_shm::missing::Missing::new(arena).map(|_| ())
    })();
    if let Err(error) = &probe {
        crate::say!("testudo: {error}; the state is loaded before the job goes on");
    }
    probe.is_ok()
}

/// Raises the soft limit on descriptors to the hard one and returns it.
pub(crate) fn raise_descriptor_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is a valid place; raising a soft limit to the hard one needs no privilege.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        let wanted = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const wanted) == 0 {
            limit = wanted;
        }
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

/// The segments of a job, as the supervisor holds and maps them.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) control: Segment,
    /// The same for workers: it cannot be mapped writable.
    pub(crate) control_peer: OwnedFd,
    pub(crate) control_header: &'static ControlHeader,
    pub(crate) workers: Vec<&'static WorkerHeader>,
    pub(crate) arena: &'static Arena,
    pub(crate) description: Description,
    segments: Vec<(Segment, OwnedFd)>,
    groups: Vec<Vec<Segment>>,
    /// By worker of tier 1: its journal, and what its replica says.
    follows: Vec<[(Segment, OwnedFd); 2]>,
    events: Vec<OwnedFd>,
}

impl Scene {
    fn build(
        plan: &Plan,
        launch: &Launch,
        surveys: Vec<String>,
        checkpoints: Option<Checkpoints>,
        watch: &Watch,
    ) -> Result<Self, Error> {
        let layout = &plan.layout;
        let supervisor = plan.supervisor();
        let name = &launch.settings.name;
        let line = launch.keeper;
        let control = segment(&format!("{name}-control"), layout.segments[supervisor].bytes, line)?;
        let control_peer = control.read_only()?;
        let mut segments = Vec::new();
        for (worker, segment) in layout.segments[..supervisor].iter().enumerate() {
            let segment = self::segment(&format!("{name}-w{worker}"), segment.bytes, line)?;
            let peer = place(segment.read_only()?, line)?;
            segments.push((segment, peer));
        }
        let mut groups = Vec::new();
        for laid in &layout.groups {
            let uid = plan.operators[laid.operator].uid();
            let create = |group| segment(&format!("{name}-g{group}-{uid}"), laid.bytes, line);
            groups.push((0..laid.groups).map(create).collect::<Result<Vec<_>, _>>()?);
        }
        let follows = follow_segments(plan, name, line)?;
        let events = events_to_sleep_on(plan, line)?;
        let arena = supervisor_arena(plan, &control, &segments, &follows)?;
        // SAFETY: the fronts of all segments are mapped for good.
        let control_header =
            unsafe { header::at::<ControlHeader>(arena.at(layout.segments[supervisor].at)) };
        let workers = layout.segments[..supervisor]
            .iter()
            // SAFETY: as above.
            .map(|segment| unsafe { header::at::<WorkerHeader>(arena.at(segment.at)) })
            .collect();
        let description = Description {
            settings: launch.settings.clone(),
            parameters: launch.parameters.clone(),
            surveys,
            plan: plan.hash,
            checkpoints,
            supervisor: std::process::id(),
            segments: segments.iter().map(SegmentFds::of).collect(),
            follows: follow_fds(plan, &follows),
            groups: groups.iter().map(|all| all.iter().map(Segment::raw_fd).collect()).collect(),
            events: (!events.is_empty()).then(|| events.iter().map(AsRawFd::as_raw_fd).collect()),
            notice: watch.notice_fd(),
            rewound: Vec::new(),
        };
        description.write(arena, layout.segments[supervisor].at, control_header)?;
        Ok(Self {
            control,
            control_peer,
            control_header,
            workers,
            arena,
            description,
            segments,
            groups,
            follows,
            events,
        })
    }

    /// The descriptors that a worker inherits: its own segments writable, the others read-only.
    pub(crate) fn inherited(&self, plan: &Plan, worker: usize) -> Vec<i32> {
        let mut fds = vec![self.control_peer.as_raw_fd(), self.description.notice];
        for (index, (owner, peer)) in self.segments.iter().enumerate() {
            fds.push(if index == worker { owner.raw_fd() } else { peer.as_raw_fd() });
        }
        for (laid, segments) in plan.layout.groups.iter().zip(&self.groups) {
            let held = crate::worker::attach::held_groups(plan, laid.operator, laid.groups, worker);
            fds.extend(held.into_iter().map(|group| segments[group].raw_fd()));
        }
        if let Some([journal, follower]) = self.follow(worker) {
            fds.extend([journal.0.raw_fd(), follower.1.as_raw_fd()]);
        }
        fds.extend(self.events.iter().map(AsRawFd::as_raw_fd));
        fds
    }

    /// Empties all segments of some workers, none of which has a process (R18): both ends of each
    /// ring between them begin anew.
    pub(crate) fn empty(&self, plan: &Plan, workers: &[usize]) -> Result<(), Error> {
        for &worker in workers {
            self.segments[worker].0.empty()?;
            for (laid, segments) in plan.layout.groups.iter().zip(&self.groups) {
                let (operator, groups) = (laid.operator, laid.groups);
                for group in crate::worker::attach::held_groups(plan, operator, groups, worker) {
                    segments[group].empty()?;
                }
            }
        }
        Ok(())
    }

    /// Tells workers that begin from now on which regions went back, and to what.
    pub(crate) fn tell(&self, plan: &Plan, rewound: &[Rewound]) -> Result<(), Error> {
        let description = Description { rewound: rewound.to_vec(), ..self.description.clone() };
        let at = plan.layout.segments[plan.supervisor()].at;
        description.write(self.arena, at, self.control_header)
    }

    /// The descriptors that a standby of these workers inherits: theirs writable, those of all
    /// segments read-only.
    pub(crate) fn inherited_by_standby(&self, plan: &Plan, workers: &[usize]) -> Vec<i32> {
        let mut fds = vec![self.control_peer.as_raw_fd(), self.description.notice];
        for (index, (owner, peer)) in self.segments.iter().enumerate() {
            fds.push(peer.as_raw_fd());
            fds.extend(workers.contains(&index).then(|| owner.raw_fd()));
        }
        for (laid, segments) in plan.layout.groups.iter().zip(&self.groups) {
            let held = workers.iter().flat_map(|worker| {
                crate::worker::attach::held_groups(plan, laid.operator, laid.groups, *worker)
            });
            fds.extend(held.map(|group| segments[group].raw_fd()));
        }
        if let [worker] = workers
            && let Some([journal, follower]) = self.follow(*worker)
        {
            fds.extend([journal.0.raw_fd(), follower.0.raw_fd()]);
        }
        fds.extend(self.events.iter().map(AsRawFd::as_raw_fd));
        fds
    }

    /// What a worker of tier 1 and its replica share.
    fn follow(&self, worker: usize) -> Option<&[(Segment, OwnedFd); 2]> {
        let index = self.description.follows.iter().position(|fds| fds.worker == worker)?;
        self.follows.get(index)
    }

    /// All descriptors of the job.
    fn descriptors(&self) -> Vec<i32> {
        let mut fds = vec![self.control.raw_fd(), self.description.notice];
        fds.extend(
            self.segments.iter().flat_map(|(owner, peer)| [owner.raw_fd(), peer.as_raw_fd()]),
        );
        fds.extend(self.groups.iter().flatten().map(Segment::raw_fd));
        let follows = self.follows.iter().flatten();
        fds.extend(follows.flat_map(|(owner, peer)| [owner.raw_fd(), peer.as_raw_fd()]));
        fds.extend(self.events.iter().map(AsRawFd::as_raw_fd));
        fds
    }

    /// Changes the control word and wakes everyone (R8).
    pub(crate) fn set_control(&self, bits: u64) {
        self.control_header.control.fetch_or(bits, Ordering::AcqRel);
        self.wake_workers();
    }

    /// Takes bits of the control word back.
    pub(crate) fn clear_control(&self, bits: u64) {
        self.control_header.control.fetch_and(!bits, Ordering::AcqRel);
        self.wake_workers();
    }

    /// Rings the supervisor's bell, for all sleepers.
    pub(crate) fn wake_workers(&self) {
        wait::ring_bell(&self.control_header.bell);
        for event in &self.events {
            wait::wake_event(event.as_raw_fd());
        }
    }

    /// The value of a worker's counter, by its arena offset.
    pub(crate) fn counter(&self, at: usize) -> u64 {
        // SAFETY: the fronts of all workers, counters included, are mapped for good.
        unsafe { header::at::<Counter>(self.arena.at(at)) }.value()
    }

    /// The label of a worker's counter, by its arena offset; empty while there is none.
    pub(crate) fn counter_label(&self, at: usize) -> String {
        // SAFETY: as above.
        unsafe { header::at::<Counter>(self.arena.at(at)) }.label()
    }

    /// The parts of a ring, in the supervisor's address space.
    pub(crate) fn ring_parts(
        &self,
        plan: &Plan,
        ring: &crate::plan::layout::RingPlan,
    ) -> testudo_shm::ring::RingParts {
        ring_parts(self.arena, plan, ring)
    }
}

fn follow_fds(plan: &Plan, follows: &[[(Segment, OwnedFd); 2]]) -> Vec<FollowFds> {
    let all = plan.layout.follows.iter().zip(follows);
    let fds = all.map(|(laid, [journal, follower])| FollowFds {
        worker: laid.worker,
        journal: SegmentFds::of(journal),
        follower: SegmentFds::of(follower),
    });
    fds.collect()
}

/// One for each process, where the kernel cannot wait on words.
fn events_to_sleep_on(plan: &Plan, line: Option<&Line>) -> Result<Vec<OwnedFd>, Error> {
    if wait::has_wait_any() && plan.workers + 1 < wait::FUTEX_WAITV_MAX {
        return Ok(Vec::new());
    }
    crate::say!("testudo: this kernel cannot wait on several futexes; workers sleep on eventfds");
    (0..=plan.workers).map(|_| place(event_fd()?, line)).collect()
}

/// What workers of tier 1 and their replicas tell each other.
fn follow_segments(
    plan: &Plan,
    name: &str,
    line: Option<&Line>,
) -> Result<Vec<[(Segment, OwnedFd); 2]>, Error> {
    let create = |name: String, bytes| {
        let owner = segment(&name, bytes, line)?;
        let peer = place(owner.read_only()?, line)?;
        Ok::<_, Error>((owner, peer))
    };
    let follows = plan.layout.follows.iter().map(|laid| {
        let worker = laid.worker;
        let journal = create(format!("{name}-journal{worker}"), JOURNAL_BYTES)?;
        let follower = create(format!("{name}-follower{worker}"), laid.follower_bytes())?;
        Ok([journal, follower])
    });
    follows.collect()
}

/// Creates a segment. Its name is for people who look at /proc.
fn segment(name: &str, bytes: usize, line: Option<&Line>) -> Result<Segment, Error> {
    let segment = Segment::create(short(name), bytes)?;
    if line.is_none() {
        return Ok(segment);
    }
    let again = segment.fd().try_clone_to_owned();
    let again = again.map_err(|error| Error::Machine(format!("segment {name}: {error}")))?;
    Ok(Segment::adopt(place(again, line)?, bytes)?)
}

/// As much of a segment's name as the kernel takes, which is 249 bytes.
pub(crate) fn short(name: &str) -> &str {
    const LONGEST: usize = 200;
    let mut end = name.len().min(LONGEST);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// Maps the control segment writable, the workers' fronts and the rings to the supervisor
/// read-only.
fn supervisor_arena(
    plan: &Plan,
    control: &Segment,
    segments: &[(Segment, OwnedFd)],
    follows: &[[(Segment, OwnedFd); 2]],
) -> Result<&'static Arena, Error> {
    let layout = &plan.layout;
    let supervisor = plan.supervisor();
    // Kept for the rest of the process: rings and headers point into it. It reserves addresses, not
    // memory.
    let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(layout.reserved_bytes)?));
    let own = &layout.segments[supervisor];
    arena.map(control.fd(), 0, own.front, own.at, Access::Owner)?;
    for (segment, laid) in segments.iter().zip(&layout.segments) {
        arena.map(segment.0.fd(), 0, laid.front, laid.at, Access::Peer)?;
    }
    for (laid, [journal, follower]) in layout.follows.iter().zip(follows) {
        arena.map(journal.0.fd(), 0, PAGE, laid.journal, Access::Peer)?;
        let bytes = laid.follower_bytes();
        arena.map(follower.0.fd(), 0, bytes, laid.follower, Access::Peer)?;
    }
    for ring in &layout.rings {
        if ring.from == supervisor {
            arena.map_mirrored(control.fd(), ring.data, ring.bytes, ring.at, Access::Owner)?;
        } else if ring.to == supervisor {
            let fd = segments[ring.from].0.fd();
            arena.map_mirrored(fd, ring.data, ring.bytes, ring.at, Access::Peer)?;
        }
    }
    Ok(arena)
}

/// A running job, as the supervisor's loop sees it.
struct Play<'a> {
    plan: &'a Plan,
    settings: &'a Settings,
    scene: &'a Scene,
    watch: Watch,
    crew: Crew<'a>,
    /// The checkpoint folder, while it is being opened once more.
    opening: Option<Opening>,
    checkpointer: Option<Checkpointer>,
    orders: Orders,
    rewinds: Rewinds,
    board: Arc<Board>,
    /// Ends with the job.
    _metrics: Option<MetricsServer>,
    steer: Steer,
    scribe: Scribe,
    keeper: Option<&'static Line>,
}

/// Longest sleep of the supervisor's loop.
const TICK: Duration = Duration::from_millis(100);

impl Play<'_> {
    /// Waits and acts until all stages are done.
    fn wait(&mut self, events: &Arc<Events>, console: &Console) -> Result<(), Error> {
        let mut progress = Progress::new(self.plan, self.settings, self.scene);
        if self.is_leaving() {
            return Ok(());
        }
        loop {
            let seen = events.word.load(Ordering::Acquire);
            if let Some(line) = self.keeper {
                events.signals.fetch_add(line.take_stops(), Ordering::Release);
            }
            self.look_for_folder(events)?;
            match events.signals.load(Ordering::Acquire) {
                0 => {}
                1 => {
                    if let Some(checkpointer) = &mut self.checkpointer {
                        checkpointer.drain(self.plan, self.scene);
                    }
                    console.drain();
                    self.scene.set_control(control::DRAIN);
                }
                _ => return Err(Error::Stopped),
            }
            console.check()?;
            let values = self.crew.look(&self.watch)?;
            if let Some(checkpointer) = &mut self.checkpointer {
                checkpointer.look(self.plan, self.scene, &mut self.crew);
                self.crew.is_cutting = checkpointer.is_open();
            }
            let fallen = self.crew.take_fallen();
            let job = rewind::Job { plan: self.plan, settings: self.settings, scene: self.scene };
            let mut hands =
                Hands { crew: &mut self.crew, checkpoints: self.checkpointer.as_mut(), console };
            self.rewinds.look(&job, &mut hands, fallen)?;
            let job = OrdersJob {
                plan: self.plan,
                scene: self.scene,
                events,
                annals: &self.crew.annals,
                is_program: self.crew.is_program(),
                update: self.steer.update_status(),
                restarts: &self.crew.restarts,
                standbys: self.crew.standbys(),
                board: &self.board,
            };
            self.orders.look(&job, &mut self.steer, self.checkpointer.as_mut());
            let has_folder = self.settings.checkpoint_dir.is_some();
            let past = Past { checkpoints: self.checkpointer.as_mut(), has_folder };
            self.steer.look(&mut self.crew, &self.watch, past);
            if self.crew.all_finished() && console.is_drained() && self.has_said_so(events) {
                self.scene.set_control(control::LEAVE);
                return Ok(());
            }
            progress.show(self.crew.restarts.len());
            let checkpointer = self.checkpointer.as_ref();
            self.board.turn(&self.crew.restarts, || checkpointer.map(Checkpointer::figures));
            self.scribe.look(&self.crew, self.checkpointer.as_ref());
            let mut words = Vec::with_capacity(values.len() + 1);
            words.push(WaitWord { word: &events.word, value: seen });
            for (worker, value) in values {
                let word = &self.scene.workers[worker].death[0].word;
                words.push(WaitWord { word, value });
            }
            let checkpoints = self.checkpointer.as_ref().and_then(Checkpointer::patience);
            let patience = self.crew.patience().into_iter().chain(checkpoints);
            let patience = patience.chain(self.rewinds.patience());
            let patience = patience.chain(self.steer.patience()).min();
            wait::wait_any(&words, Some(patience.unwrap_or(TICK).min(TICK)));
        }
    }

    /// All workers were told to leave, perhaps by an earlier supervisor.
    fn is_leaving(&self) -> bool {
        self.scene.control_header.control.load(Ordering::Acquire) & control::LEAVE != 0
    }

    /// All input is processed: the last checkpoint says so, unless the job was drained before the
    /// end of its input. What complete checkpoints hold is shown before anybody leaves.
    fn has_said_so(&mut self, events: &Events) -> bool {
        let is_drained = events.signals.load(Ordering::Acquire) > 0;
        if let Some(opening) = &self.opening {
            return opening.is_hopeless();
        }
        let Some(checkpointer) = &mut self.checkpointer else { return true };
        let is_said = is_drained || checkpointer.finish(self.plan, self.scene);
        is_said && checkpointer.sinks_have_committed(self.plan, self.scene)
    }
}

/// The supervisor's ends of the rings from standard input and to standard output, where they were
/// published last; each with the worker that it comes from.
pub(crate) fn console_ends(
    inputs: &[(RingParts, usize)],
    outputs: &[(RingParts, usize)],
) -> (Vec<Producer>, Vec<(Consumer, usize)>) {
    // SAFETY: mapped by `supervisor_arena` for good; the console's thread is the only one that uses
    // these ends, and no earlier supervisor lives.
    unsafe {
        let at = |word: NonNull<AtomicU64>| word.as_ref().load(Ordering::Acquire);
        let producer = |(ring, _): &(RingParts, usize)| Producer::attach(*ring, at(ring.tail));
        let consumer =
            |(ring, worker): &(RingParts, usize)| (Consumer::attach(*ring, at(ring.head)), *worker);
        (inputs.iter().map(producer).collect(), outputs.iter().map(consumer).collect())
    }
}

/// New ends of the rings from some workers to standard output, by their place among all of these.
/// The rings are empty, and so say their heads from here on.
pub(crate) fn renewed_ends(
    plan: &Plan,
    scene: &Scene,
    workers: &[usize],
) -> Vec<(usize, testudo_shm::consumer::Consumer)> {
    let rings = plan.layout.rings.iter().filter(|ring| ring.to == plan.supervisor());
    let renewed = rings.enumerate().filter(|(_, ring)| workers.contains(&ring.from));
    let ends = renewed.map(|(place, ring)| {
        let parts = scene.ring_parts(plan, ring);
        // SAFETY: mapped for good; the console's thread stands still, and drops its old end for
        // this one.
        let mut end = unsafe { testudo_shm::consumer::Consumer::attach(parts, 0) };
        end.publish();
        (place, end)
    });
    ends.collect()
}

/// Names this process as the supervisor, for ps and top.
pub(crate) fn name_supervisor() {
    // SAFETY: a NUL-terminated literal.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"testudo-sup".as_ptr()) };
}

/// Has the keeper hold all that a later supervisor needs, before the first worker is started.
fn hand_over(
    line: &Line,
    scene: &Scene,
    rest: impl Iterator<Item = RawFd>,
    scribe: &Scribe,
) -> Result<(), Error> {
    let chronicle = scribe.fd().unwrap_or(-1);
    // It may have had supervisors before that came to nothing.
    scene.control_header.reign.store(line.role().reign, Ordering::Release);
    let mut fds = scene.descriptors();
    fds.extend(rest);
    fds.push(chronicle);
    line.hold(&fds)?;
    line.begun(scene.control.raw_fd(), scene.control.len(), chronicle)
}
