//! Launching: from a described job to its report. Creates and maps the segments, starts the
//! workers, then waits and acts until the job is over.
//!
//! Called by `testudo::main` and by programs that embed a job ([`Job`]).

#![expect(unsafe_code, reason = "maps the segments that it created; raises the descriptor limit")]

use super::checkpoint::{Checkpointer, StoreThread};
use super::console::Console;
use super::description::{Description, SegmentFds};
use super::orders::{Job as OrdersJob, Orders};
use super::outputs::Outputs;
use super::progress::Progress;
use super::recover::Crew;
use super::report::Report;
use super::resume::{self, Chosen, Resumed};
use super::spawn::Spawner;
use super::watch::{Events, Watch, event_fd};
use crate::config::Settings;
use crate::error::Error;
use crate::flow::Flow;
use crate::plan::Plan;
use crate::worker::attach::ring_parts;
use crate::worker::entry::{JobFn, entry_offset};
use crate::worker::restore::Checkpoints;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::header::{self, ControlHeader, WorkerHeader, control};
use testudo_shm::primitive::Ordering;
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
        self.settings.check()?;
        let entry = entry_offset(self.build);
        let parameters = self.parameters.clone();
        let build = move |flow: &Flow| (self.build)(flow, &parameters);
        let launch =
            Launch { settings: self.settings, parameters: self.parameters, entry, signals: None };
        launch.run(build, events, started)
    }
}

/// What a program may look at while its job runs.
#[derive(Debug, Clone)]
pub struct View {
    /// The headers of all workers: process id, commits, gaps.
    pub workers: Vec<&'static WorkerHeader>,
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
    /// The descriptor that reads SIGINT and SIGTERM, where they are to end the job.
    pub(crate) signals: Option<OwnedFd>,
}

/// A job that may begin.
struct Prepared {
    surveys: Vec<String>,
    plan: Plan,
    outputs: Outputs,
    store: Option<StoreThread>,
    chosen: Option<Resumed>,
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
        let mut unusable = Vec::new();
        let mut started = Some(started);
        loop {
            let mut resumed = None;
            let started = |view: View| {
                if let Some(started) = started.take() {
                    started(view);
                }
            };
            match self.run_once(&build, &events, started, &unusable, &mut resumed) {
                // A block that a worker could not read: what it stands for is older now.
                Err(Error::Damaged(damage)) if resumed.is_some() && self.settings.resume => {
                    crate::say!("testudo: {damage}");
                    unusable.extend(resumed);
                }
                result => return result,
            }
        }
    }

    /// As `run`, from the newest checkpoint that is not among the unusable ones; which one it was
    /// goes to `resumed`.
    fn run_once(
        &mut self,
        build: &impl Fn(&Flow),
        events: &Arc<Events>,
        started: impl FnOnce(View),
        unusable: &[u64],
        resumed: &mut Option<u64>,
    ) -> Result<Report, Error> {
        let Some(prepared) = self.prepare(build, unusable, resumed)? else {
            let (_, plan) = self.plan(build)?;
            crate::say!("testudo: the job had come to its end; there is nothing to go on with");
            return Ok(Report::nothing(&plan, &self.settings));
        };
        let Prepared { surveys, plan, outputs, store, chosen, job_id } = prepared;
        let watch = Watch::start(Arc::clone(events), self.take_signals()?)?;
        let checkpoints = self.settings.checkpoint_dir.as_ref().map(|folder| Checkpoints {
            folder: std::path::absolute(folder).unwrap_or_else(|_| folder.clone()),
            job: job_id,
            restore: chosen.as_ref().map(|chosen| chosen.restore.clone()),
        });
        let scene = Scene::build(&plan, self, surveys, checkpoints, &watch)?;
        let chosen = chosen.as_ref();
        let checkpointer = store
            .map(|store| Checkpointer::new(&plan, &self.settings, store, chosen, job_id, events))
            .transpose()?;
        if let Some(checkpointer) = &checkpointer {
            checkpointer.announce(&plan, &scene, chosen);
        }
        let begun = std::time::Instant::now();
        let crew = Crew::start(&plan, &self.settings, &scene, &watch, Spawner::new(), self.entry)?;
        started(View { workers: scene.workers.clone() });
        let orders = Orders::open(&self.settings, events);
        let (settings, scene) = (&self.settings, &scene);
        let mut running = Play { plan: &plan, settings, scene, watch, crew, checkpointer, orders };
        let console = Console::start(&plan, settings, scene, events)?;
        let result = running.wait(events, &console);
        running.crew.end(result.is_err());
        let console_failed = console.has_failed();
        let console = console.join(result.is_err());
        let ended = if result.is_ok() && console.is_ok() { outputs.end(&plan) } else { Ok(()) };
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
        let restarts = std::mem::take(&mut running.crew.restarts);
        let report = Report::new(&plan, settings, scene, restarts, begun.elapsed());
        Ok(report.with_checkpoints(running.checkpointer.as_ref().map(Checkpointer::history)))
    }

    /// Everything up to the first segment: the folder, the checkpoint to go on from, the plan, the
    /// outputs. `None` when the job that is to go on had come to its end.
    fn prepare(
        &mut self,
        build: &impl Fn(&Flow),
        unusable: &[u64],
        resumed: &mut Option<u64>,
    ) -> Result<Option<Prepared>, Error> {
        let store = match &self.settings.checkpoint_dir {
            Some(folder) => Some(StoreThread::open(folder, self.settings.disk)?),
            None => None,
        };
        let chosen = self.choose(store.as_ref(), unusable)?;
        if let Some(chosen) = &chosen {
            *resumed = Some(chosen.manifest.id);
            // State by key group goes on in as many groups as there were.
            self.settings.key_groups = chosen.manifest.groups as usize;
        }
        let (flow, plan) = self.plan(build)?;
        let is_over = chosen.as_ref().is_some_and(|chosen| chosen.manifest.finished);
        let job_id = chosen.as_ref().map_or_else(job_id, |chosen| chosen.manifest.job_id);
        let is_lazy = chosen.is_some() && can_load_lazily();
        let chosen = chosen.map(|chosen| chosen.fit(&plan, &self.settings, is_lazy)).transpose()?;
        let outputs = Outputs::claim(&plan, store.is_some())?;
        let sinks = std::mem::take(&mut flow.draft.borrow_mut().sinks);
        if let (Some(store), Some(past)) = (&store, chosen.as_ref().and_then(|c| c.past.clone())) {
            // Nothing was changed before; from here on the newer checkpoint must not count.
            let adopted = store.ask(move |store| store.adopt(&past))?;
            adopted.map_err(|error| Error::Checkpoint(error.to_string()))?;
        }
        match (&store, &chosen) {
            (_, Some(chosen)) if is_over => {
                Outputs::end_again(&plan, &sinks, chosen)?;
                return Ok(None);
            }
            (_, Some(chosen)) => Outputs::go_on(&plan, &sinks, chosen)?,
            (Some(store), None) => {
                // Before outputs are emptied: a crash must not go on with what they had.
                let reset = store.ask(move |store| store.reset(job_id))?;
                reset.map_err(|error| Error::Checkpoint(error.to_string()))?;
                outputs.empty(&plan)?;
                Outputs::begin(&plan, &sinks)?;
            }
            (None, None) => outputs.empty(&plan)?,
        }
        let surveys = flow.draft.borrow().surveys.clone();
        Ok(Some(Prepared { surveys, plan, outputs, store, chosen, job_id }))
    }

    /// The checkpoint to go on from, if the settings ask for one and there is one.
    fn choose(
        &self,
        store: Option<&StoreThread>,
        unusable: &[u64],
    ) -> Result<Option<Chosen>, Error> {
        let Some(store) = store else { return Ok(None) };
        if !self.settings.resume && self.settings.resume_from.is_none() {
            return Ok(None);
        }
        let chosen = resume::choose(store, &self.settings, unusable)?;
        if chosen.is_none() {
            let folder = self.settings.checkpoint_dir.as_deref().unwrap_or(Path::new(""));
            crate::say!(
                "testudo: no checkpoint in {} yet: the job begins afresh, its outputs are emptied",
                folder.display()
            );
        }
        Ok(chosen)
    }

    /// The descriptor of signals, again for each run.
    fn take_signals(&self) -> Result<Option<OwnedFd>, Error> {
        let again = self.signals.as_ref().map(OwnedFd::try_clone).transpose();
        again.map_err(|error| Error::Machine(format!("signals: {error}")))
    }

    /// Draws and plans, with fewer key groups where the descriptor limit asks for it.
    fn plan(&mut self, build: &impl Fn(&Flow)) -> Result<(Flow, Plan), Error> {
        let limit = raise_descriptor_limit();
        let asked = self.settings.key_groups;
        loop {
            let flow = Flow::new(Rc::new(self.settings.clone()));
            build(&flow);
            let plan = Plan::new(&flow.draft.borrow(), &self.settings)?;
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

/// A number that no other job has.
fn job_id() -> u64 {
    let now = crate::time::now_ns() ^ (crate::time::unix_ms() as u64) << 20;
    testudo_shm::hash::name_hash(&format!("{now}-{}", std::process::id()))
}

/// Whether missing pages may be brought when they are touched; says so once where they may not.
fn can_load_lazily() -> bool {
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
fn raise_descriptor_limit() -> usize {
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
    pub(crate) control_header: &'static ControlHeader,
    pub(crate) workers: Vec<&'static WorkerHeader>,
    pub(crate) arena: &'static Arena,
    pub(crate) description: Description,
    segments: Vec<(Segment, OwnedFd)>,
    groups: Vec<Vec<Segment>>,
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
        let control = segment(&format!("{name}-control"), layout.segments[supervisor].bytes)?;
        let mut segments = Vec::new();
        for (worker, segment) in layout.segments[..supervisor].iter().enumerate() {
            let segment = self::segment(&format!("{name}-w{worker}"), segment.bytes)?;
            let peer = segment.read_only()?;
            segments.push((segment, peer));
        }
        let mut groups = Vec::new();
        for laid in &layout.groups {
            let uid = plan.operators[laid.operator].uid();
            let create = |group| segment(&format!("{name}-g{group}-{uid}"), laid.bytes);
            groups.push((0..laid.groups).map(create).collect::<Result<Vec<_>, _>>()?);
        }
        let events = if wait::has_wait_any() && plan.workers + 1 < wait::FUTEX_WAITV_MAX {
            Vec::new()
        } else {
            crate::say!(
                "testudo: this kernel cannot wait on several futexes; workers sleep on eventfds"
            );
            (0..=plan.workers).map(|_| event_fd()).collect::<Result<Vec<_>, _>>()?
        };
        let arena = supervisor_arena(plan, &control, &segments)?;
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
            segments: segments
                .iter()
                .map(|(owner, peer)| SegmentFds { owner: owner.raw_fd(), peer: peer.as_raw_fd() })
                .collect(),
            groups: groups.iter().map(|all| all.iter().map(Segment::raw_fd).collect()).collect(),
            events: (!events.is_empty()).then(|| events.iter().map(AsRawFd::as_raw_fd).collect()),
            notice: watch.notice_fd(),
        };
        description.write(arena, layout.segments[supervisor].at, control_header)?;
        Ok(Self { control, control_header, workers, arena, description, segments, groups, events })
    }

    /// The descriptors that a worker inherits: its own segments writable, the others read-only.
    pub(crate) fn inherited(&self, plan: &Plan, worker: usize) -> Vec<i32> {
        let mut fds = vec![self.control.raw_fd(), self.description.notice];
        for (index, (owner, peer)) in self.segments.iter().enumerate() {
            fds.push(if index == worker { owner.raw_fd() } else { peer.as_raw_fd() });
        }
        for (laid, segments) in plan.layout.groups.iter().zip(&self.groups) {
            let held = crate::worker::attach::held_groups(plan, laid.operator, laid.groups, worker);
            fds.extend(held.into_iter().map(|group| segments[group].raw_fd()));
        }
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

    /// The parts of a ring, in the supervisor's address space.
    pub(crate) fn ring_parts(
        &self,
        plan: &Plan,
        ring: &crate::plan::layout::RingPlan,
    ) -> testudo_shm::ring::RingParts {
        ring_parts(self.arena, plan, ring)
    }
}

/// Creates a segment. Its name is for people who look at /proc; the kernel takes no more than 249
/// bytes of it.
fn segment(name: &str, bytes: usize) -> Result<Segment, Error> {
    const LONGEST: usize = 200;
    let mut end = name.len().min(LONGEST);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    Ok(Segment::create(&name[..end], bytes)?)
}

/// Maps the control segment writable, the workers' fronts and the rings to the supervisor
/// read-only.
fn supervisor_arena(
    plan: &Plan,
    control: &Segment,
    segments: &[(Segment, OwnedFd)],
) -> Result<&'static Arena, Error> {
    let layout = &plan.layout;
    let supervisor = plan.supervisor();
    // Kept for the rest of the process: rings and headers point into it. It reserves addresses, not
    // memory.
    let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(layout.arena_bytes)?));
    let own = &layout.segments[supervisor];
    arena.map(control.fd(), 0, own.front, own.at, Access::Owner)?;
    for (segment, laid) in segments.iter().zip(&layout.segments) {
        arena.map(segment.0.fd(), 0, laid.front, laid.at, Access::Peer)?;
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
    checkpointer: Option<Checkpointer>,
    orders: Orders,
}

/// Longest sleep of the supervisor's loop.
const TICK: Duration = Duration::from_millis(100);

impl Play<'_> {
    /// Waits and acts until all stages are done.
    fn wait(&mut self, events: &Events, console: &Console) -> Result<(), Error> {
        let mut progress = Progress::new(self.plan, self.settings, self.scene);
        loop {
            let seen = events.word.load(Ordering::Acquire);
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
            }
            let job = OrdersJob {
                plan: self.plan,
                settings: self.settings,
                scene: self.scene,
                events,
                restarts: self.crew.restarts.len(),
            };
            self.orders.look(&job, self.checkpointer.as_mut());
            if self.crew.all_finished() && console.is_drained() && self.has_said_so(events) {
                self.scene.set_control(control::LEAVE);
                return Ok(());
            }
            progress.show(self.crew.restarts.len());
            let mut words = Vec::with_capacity(values.len() + 1);
            words.push(WaitWord { word: &events.word, value: seen });
            for (worker, value) in values {
                let word = &self.scene.workers[worker].death[0].word;
                words.push(WaitWord { word, value });
            }
            let checkpoints = self.checkpointer.as_ref().and_then(Checkpointer::patience);
            let patience = self.crew.patience().into_iter().chain(checkpoints).min();
            wait::wait_any(&words, Some(patience.unwrap_or(TICK).min(TICK)));
        }
    }

    /// All input is processed: the last checkpoint says so, unless the job was drained before the
    /// end of its input. What complete checkpoints hold is shown before anybody leaves.
    fn has_said_so(&mut self, events: &Events) -> bool {
        let is_drained = events.signals.load(Ordering::Acquire) > 0;
        let Some(checkpointer) = &mut self.checkpointer else { return true };
        let is_said = is_drained || checkpointer.finish(self.plan, self.scene);
        is_said && checkpointer.sinks_have_committed(self.plan, self.scene)
    }
}

/// The supervisor's ends of the rings from standard input and to standard output.
pub(crate) fn console_ends(
    plan: &Plan,
    scene: &Scene,
    supervisor: usize,
) -> (Vec<testudo_shm::producer::Producer>, Vec<testudo_shm::consumer::Consumer>) {
    let rings = &plan.layout.rings;
    let inputs = rings.iter().filter(|ring| ring.from == supervisor);
    let outputs = rings.iter().filter(|ring| ring.to == supervisor);
    // SAFETY: mapped by `supervisor_arena` for good; the console's thread is the only one that uses
    // these ends.
    unsafe {
        let producer =
            |ring| testudo_shm::producer::Producer::attach(scene.ring_parts(plan, ring), 0);
        let consumer =
            |ring| testudo_shm::consumer::Consumer::attach(scene.ring_parts(plan, ring), 0);
        (inputs.map(producer).collect(), outputs.map(consumer).collect())
    }
}

/// Names this process as the supervisor, for ps and top.
pub(crate) fn name_supervisor() {
    // SAFETY: a NUL-terminated literal.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"testudo-sup".as_ptr());
        // A file that may not grow is then an error with a text.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
