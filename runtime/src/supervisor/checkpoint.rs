//! Checkpoints, the supervisor's part: carries out what the coordinator says, with the regions'
//! words in the control segment on one side and the folder's store on the other.
//!
//! The store lives in a thread of its own, since a disk may take its time and deaths must not wait
//! for it.
//!
//! Invariants: a worker's word on a cut is read after its epoch (R23: all fields are stored before
//! it), and believed only from the incarnation that runs; `good` is stored before the next epoch,
//! so workers know what became of their last cut when they begin the next.
//!
//! Called by `launch`'s loop at each turn.

mod adopt;

pub(crate) use adopt::Opening;

use super::board::Externals;
use super::folders::{Folders, Moved};
use super::launch::Scene;
use super::recover::Crew;
use super::resume::{self, Chosen, Resumed};
use super::rewind::asked::Asked;
use super::watch::Events;
use crate::checkpoint::Now;
use crate::checkpoint::coordinator::{Action, Coordinator, Limits, Part, Start};
use crate::checkpoint::history::{History, Kind, Measure, State};
use crate::checkpoint::schedule::{Schedule, Timer};
use crate::config::{DiskChoice, Settings};
use crate::error::Error;
use crate::keeper;
use crate::metrics::figures::CheckpointFigures;
use crate::plan::{Grouping, Plan};
use crate::testing::{Point, arm_supervisor, point};
use crate::time::{now_ns, unix_ms};
use crate::worker::restore::{Restore, open_disk};
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use testudo_shm::header::{CutFailure, WorkerState, control};
use testudo_shm::primitive::Ordering;
use testudo_state::checkpoint::manifest::MANIFEST_VERSION;
use testudo_state::checkpoint::{
    self, FileRef, Keep, Manifest, Operator, Outcome, RegionName, Store, WorkerFile,
};

/// The figure of a manifest that says when its run began.
pub(crate) const RUN: &str = "run_began_ms";

/// Pause between the end of a checkpoint and the begin of the next, at least.
const PAUSE: Duration = Duration::from_millis(10);

/// How long the job's end waits for its last checkpoint.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// Work for the store's thread.
type Task = Box<dyn FnOnce(&mut Shop) + Send>;

/// What the store's thread has.
struct Shop {
    folder: PathBuf,
    disk: DiskChoice,
    /// `None` while the folder cannot be opened.
    store: Option<Store>,
}

/// A folder was looked after, and is open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mended {
    /// It was opened anew: nothing of what was there need be there any more.
    pub(crate) is_renewed: bool,
    /// Numbers that were never used there.
    pub(crate) next_id: u64,
    pub(crate) next_epoch: u64,
}

/// Bytes that a folder must take before it counts as mended.
const PROBE_BYTES: usize = 256 << 10;

impl Shop {
    fn open(&mut self) -> Result<(), Error> {
        let (disk, why) = open_disk(self.disk)?;
        if let Some(why) = why {
            crate::say!("testudo: checkpoints: {why}");
        }
        let opened = Store::open_for(&self.folder, disk, keeper::job());
        self.store = Some(opened.map_err(|error| Error::Checkpoint(error.to_string()))?);
        Ok(())
    }

    /// Opens the folder again, unless it is what it was, and sees whether it takes anything.
    fn mend(&mut self) -> Result<Mended, String> {
        let is_renewed = !self.store.as_ref().is_some_and(Store::is_in_place);
        if is_renewed {
            // Its lock goes first.
            self.store = None;
            self.open().map_err(|error| error.to_string())?;
        }
        let Some(store) = &mut self.store else { return Err("the folder is not open".into()) };
        let mended = store.probe(PROBE_BYTES).and_then(|()| {
            let (next_id, next_epoch) = (store.next_id()?, store.next_epoch()?);
            Ok(Mended { is_renewed, next_id, next_epoch })
        });
        mended.map_err(|error| error.to_string())
    }
}

/// The thread that has a folder's store.
#[derive(Debug)]
pub(crate) struct StoreThread {
    folder: PathBuf,
    tasks: Option<Sender<Task>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl StoreThread {
    /// Starts the thread and has it open the folder; it may be mended later if that fails.
    pub(crate) fn begin(
        folder: &Path,
        disk: DiskChoice,
    ) -> Result<(Self, Result<(), Error>), Error> {
        let (tasks, received) = unbounded::<Task>();
        let (opened, is_open) = bounded(1);
        let folder = folder.to_owned();
        let own = folder.clone();
        let work = move || {
            arm_supervisor();
            let mut shop = Shop { folder: own, disk, store: None };
            drop(opened.send(shop.open()));
            received.iter().for_each(|task| task(&mut shop));
        };
        let thread = std::thread::Builder::new()
            .name("testudo-store".into())
            .spawn(work)
            .map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
        let opened = is_open.recv().map_err(|_| gone())?;
        Ok((Self { folder, tasks: Some(tasks), thread: Some(thread) }, opened))
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Works on the store and waits for the result.
    pub(crate) fn ask<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Store) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (send, result) = bounded(1);
        self.post(move |store| drop(send.send(store.map(task))));
        let closed = || Error::Checkpoint(format!("{} is not open", self.folder.display()));
        result.recv().map_err(|_| gone())?.ok_or_else(closed)
    }

    /// Has something done, later; with `None` if the folder is not open then.
    fn post(&self, task: impl FnOnce(Option<&mut Store>) + Send + 'static) {
        self.send(Box::new(move |shop| task(shop.store.as_mut())));
    }

    /// Has the folder looked after, later.
    pub(crate) fn mend(&self, answer: impl FnOnce(Result<Mended, String>) + Send + 'static) {
        self.send(Box::new(move |shop| answer(shop.mend())));
    }

    fn send(&self, task: Task) {
        if let Some(tasks) = &self.tasks {
            // A thread that is gone is noticed by who waits for an answer.
            let _ = tasks.send(task);
        }
    }
}

fn gone() -> Error {
    Error::Machine("the thread of the checkpoint folder is gone".into())
}

impl Drop for StoreThread {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // It has said whatever it had to say.
            let _ = thread.join();
        }
    }
}

/// What a worker has saved, by the epoch.
#[derive(Debug, Clone)]
struct Snapshot {
    epoch: u64,
    file: FileRef,
}

/// A message from the store's thread.
type Sealed = (u64, Result<(), String>);

/// The checkpoints of a running job.
#[derive(Debug)]
pub(crate) struct Checkpointer {
    coordinator: Coordinator,
    timer: Timer,
    folders: Folders,
    /// Why the folder is to blame for the open checkpoint's failure, if it is.
    trouble: Option<String>,
    /// When this run began: of two checkpoints, that of the later run counts.
    run: u64,
    job: String,
    job_id: u64,
    sealed: (Sender<Sealed>, Receiver<Sealed>),
    events: Arc<Events>,
    /// Each worker's latest acknowledged snapshot, and the one of the last complete checkpoint.
    acked: Vec<Option<Snapshot>>,
    good: Vec<Option<Snapshot>>,
    /// Each worker's epoch in its words as last seen.
    seen: Vec<u64>,
    skipped: Vec<u64>,
    /// The files of the checkpoint that the job went on from, kept while workers may read them.
    resumed: Vec<FileRef>,
    begun_ms: u64,
    is_last: bool,
    pausing: Option<Pausing>,
    is_draining: bool,
    /// None is to begin until further notice.
    is_held: bool,
    /// When the last checkpoint was begun for the first time, and whether it is complete.
    last_ms: Option<u64>,
    has_said: bool,
    /// Failures that were said lately, and when.
    said: Vec<(String, u64)>,
}

/// Sources are stopped: since when, and how long nothing has moved.
#[derive(Debug)]
struct Pausing {
    since_ns: u64,
    still_ns: u64,
    commits: u64,
}

/// Without a commit for so long, the rings are empty.
const STILL_NS: u64 = 30_000_000;

/// Sources are stopped for so long at most before a savepoint is taken as things are.
const PAUSED_NS: u64 = 10_000_000_000;

impl Checkpointer {
    /// Checkpoints of a job that is about to start.
    pub(crate) fn new(
        plan: &Plan,
        settings: &Settings,
        folders: Folders,
        resumed: Option<&Resumed>,
        job_id: u64,
        events: &Arc<Events>,
    ) -> Result<Self, Error> {
        let next = folders.in_each(|store| Ok((store.next_id()?, store.next_epoch()?)))?;
        let next_id = next.iter().map(|next| next.0).max().unwrap_or(1);
        let next_epoch = next.iter().map(|next| next.1).max().unwrap_or(1);
        let before = resumed.map_or(0, |resumed| resumed.run + 1);
        let limits = Limits { deadline: settings.checkpoint_deadline, ..Limits::default() };
        let mut good = vec![None; plan.workers];
        if let Some(resumed) = resumed.filter(|resumed| resumed.restore.same_shape) {
            for (worker, file) in &resumed.restore.files {
                let epoch = RegionName::parse(&file.name).map_or(0, |name| name.epoch);
                good[*worker] = Some(Snapshot { epoch, file: file.clone() });
            }
        }
        let region_good = |region: usize| {
            let mut tasks = plan.regions.tasks(region).iter();
            tasks.next().and_then(|worker| good[*worker].as_ref()).map(|good| good.epoch)
        };
        let start = Start {
            last_id: next_id - 1,
            last_epoch: next_epoch - 1,
            good: (0..plan.regions.count()).map(region_good).collect(),
        };
        let schedule = settings.checkpoints.clone();
        Ok(Self {
            coordinator: Coordinator::resume(plan.regions.clone(), limits, &start),
            timer: Timer::new(schedule, PAUSE, now()),
            folders,
            trouble: None,
            run: unix_ms().unsigned_abs().max(before),
            job: settings.name.clone(),
            job_id,
            sealed: unbounded(),
            events: Arc::clone(events),
            acked: vec![None; plan.workers],
            good,
            seen: vec![0; plan.workers],
            skipped: vec![0; plan.workers],
            resumed: resumed
                .map(|r| r.restore.files.iter().map(|(_, f)| f.clone()).collect())
                .unwrap_or_default(),
            begun_ms: 0,
            is_last: false,
            pausing: None,
            is_draining: false,
            is_held: false,
            last_ms: None,
            has_said: false,
            said: Vec::new(),
        })
    }

    /// Tells workers which cuts are good already: those of the checkpoint that the job goes on
    /// from, which sinks commit once more.
    pub(crate) fn announce(&self, plan: &Plan, scene: &Scene, resumed: Option<&Resumed>) {
        let last = resumed.map_or(0, |resumed| resumed.restore.last_epoch());
        for region in 0..plan.regions.count() {
            let mut tasks = plan.regions.tasks(region).iter();
            let own = tasks.next().and_then(|worker| self.good[*worker].as_ref());
            let epoch = own.map_or(last, |good| good.epoch);
            scene.control_header.regions[region].good.store(epoch, Ordering::Release);
        }
    }

    /// Whether all sinks have committed what complete checkpoints hold.
    pub(crate) fn sinks_have_committed(&self, plan: &Plan, scene: &Scene) -> bool {
        scene.workers.iter().enumerate().all(|(worker, header)| {
            let words = &scene.control_header.regions[plan.regions.of_task(worker)];
            let good = words.good.load(Ordering::Acquire);
            header.cut.committed.load(Ordering::Acquire) >= good
        })
    }

    /// What became of the latest checkpoints.
    pub(crate) fn history(&self) -> &History {
        self.coordinator.history()
    }

    /// The folder that checkpoints go to.
    pub(crate) fn folder(&self) -> &Path {
        self.folders.current().folder()
    }

    /// The job runs: where to say how folders are.
    pub(crate) fn attend(&mut self, externals: Externals) {
        let events = Arc::clone(&self.events);
        self.folders.attend(externals, &events);
    }

    /// All of it in numbers.
    pub(crate) fn figures(&self) -> CheckpointFigures {
        let history = self.history();
        let complete = history.records().rev().find(|record| record.state == State::Complete);
        CheckpointFigures {
            completed: history.completed(),
            failed: history.failed(),
            last_id: complete.map(|record| record.id),
            last_duration_us: complete.map_or(0, |record| record.duration_us),
            last_bytes: complete.map_or(0, |record| record.measure.bytes_incremental),
            last_in_flight_bytes: complete.map_or(0, |record| record.measure.in_flight_bytes),
            failures_by_region: self.coordinator.failed_cuts(),
            folder: self.folder().display().to_string(),
        }
    }

    /// Takes a turn: hears workers, the clock and the store, and does what follows.
    pub(crate) fn look(&mut self, plan: &Plan, scene: &Scene, crew: &mut Crew<'_>) {
        let now = now();
        let mut actions = Vec::new();
        for worker in crew.take_deaths() {
            actions.extend(self.coordinator.task_failed(now, worker));
        }
        for worker in 0..plan.workers {
            self.hear(worker, now, scene, crew, &mut actions);
        }
        self.hear_store(now, &mut actions);
        actions.extend(self.coordinator.tick(now));
        self.carry_out(actions, plan, scene);
        if let Some(moved) = self.folders.turn(now.monotonic_ns, self.coordinator.open().is_none())
        {
            self.move_to(moved);
        }
        let mut actions = Vec::new();
        if self.may_begin() && self.timer.is_due(now) {
            self.begin(now, Kind::Regional, &mut actions);
        }
        self.carry_out(actions, plan, scene);
    }

    fn hear_store(&mut self, now: Now, actions: &mut Vec<Action>) {
        while let Ok((id, result)) = self.sealed.1.try_recv() {
            if let Err(why) = &result {
                self.trouble = Some(why.clone());
            }
            actions.extend(self.coordinator.sealed(now, id, result));
        }
    }

    /// A region is to go back: the newest whole checkpoint without the files that turned out to be
    /// damaged. Comes after what is being sealed now.
    pub(crate) fn choose(
        &mut self,
        region: usize,
        damaged: &[String],
        plan: &Plan,
        scene: &Scene,
    ) -> Asked {
        let actions = self.coordinator.rewind(now(), region);
        self.carry_out(actions, plan, scene);
        let asked = self.folders.usable().map(|(folder, store)| {
            let ((send, answer), damaged) = (bounded(1), damaged.to_vec());
            let events = Arc::clone(&self.events);
            store.post(move |store| {
                let _ = send.send(newest_but(store, folder, &damaged));
                events.bump();
            });
            answer
        });
        Asked::new(asked.collect())
    }

    /// The control header's word for a folder in which something of this job is: what is saved
    /// from here on adds to that, if checkpoints go there now.
    pub(crate) fn word_of(&self, folder: usize) -> u64 {
        let word = self.folders.word();
        if word & 1 == folder as u64 { word } else { folder as u64 }
    }

    /// A region, none of whose workers lives, goes on from what it had then, or from its beginning.
    pub(crate) fn rewound(
        &mut self,
        plan: &Plan,
        scene: &Scene,
        region: usize,
        restore: Option<&Restore>,
    ) {
        let mut actions = Vec::new();
        self.hear_store(now(), &mut actions);
        self.carry_out(actions, plan, scene);
        let mut good = None;
        for &worker in plan.regions.tasks(region) {
            let own = restore.filter(|restore| restore.same_shape);
            let mut own = own.into_iter().flat_map(|restore| &restore.files);
            self.acked[worker] = None;
            self.good[worker] = own.find(|(of, _)| *of == worker).map(|(_, file)| {
                let epoch = RegionName::parse(&file.name).map_or(0, |name| name.epoch);
                good = Some(epoch);
                Snapshot { epoch, file: file.clone() }
            });
        }
        self.coordinator.rewound(region, good);
        self.resumed.extend(restore.iter().flat_map(|r| r.files.iter().map(|(_, f)| f.clone())));
    }

    /// Whether a checkpoint is being taken.
    pub(crate) fn is_open(&self) -> bool {
        self.coordinator.open().is_some()
    }

    /// Whether a checkpoint that is due could begin now.
    fn may_begin(&self) -> bool {
        let is_over = self.is_last || self.is_draining || self.is_held;
        let is_possible = self.folders.may_begin(now_ns());
        is_possible
            && !is_over
            && self.coordinator.open().is_none()
            && self.coordinator.all_running()
    }

    /// Checkpoints go to another folder: there is nothing there to carry over.
    fn move_to(&mut self, moved: Moved) {
        let before = |next: u64| next.saturating_sub(1);
        self.coordinator.move_on(before(moved.next_id), before(moved.next_epoch));
        let workers = self.good.len();
        (self.good, self.acked) = (vec![None; workers], vec![None; workers]);
    }

    fn begin(&mut self, now: Now, kind: Kind, actions: &mut Vec<Action>) {
        self.timer.begun(now);
        self.begun_ms = u64::try_from(now.unix_ms).unwrap_or(0);
        if let Ok((_, more)) = self.coordinator.begin(now, kind) {
            actions.extend(more);
        }
    }

    /// Hears what a worker says: that it runs, and how its part of a cut went.
    fn hear(
        &mut self,
        worker: usize,
        now: Now,
        scene: &Scene,
        crew: &Crew<'_>,
        actions: &mut Vec<Action>,
    ) {
        let header = scene.workers[worker];
        let state = WorkerState::of(header.state.load(Ordering::Acquire));
        let is_running = matches!(state, WorkerState::Running | WorkerState::Finished);
        if !is_running || !crew.is_alive(worker) {
            return;
        }
        let incarnation = header.incarnation.load(Ordering::Acquire);
        actions.extend(self.coordinator.worker_began(now, worker, incarnation));
        let words = &header.cut;
        let joined = words.joined.load(Ordering::Acquire);
        if joined > self.skipped[worker] {
            self.skipped[worker] = joined;
            let why =
                Err(match scene.workers[worker].times.waiting_since_ns.load(Ordering::Acquire) {
                    0 => "it was not ready for another cut".to_owned(),
                    _ => "it waits for an output that cannot be written".to_owned(),
                });
            actions.extend(self.coordinator.acknowledged(now, worker, joined, incarnation, why));
        }
        let epoch = words.epoch.load(Ordering::Acquire);
        if epoch <= self.seen[worker] {
            return;
        }
        self.seen[worker] = epoch;
        let said_by = words.incarnation.load(Ordering::Relaxed);
        let result = self.answer(worker, epoch, said_by, scene);
        actions.extend(self.coordinator.acknowledged(now, worker, epoch, said_by, result));
    }

    /// A worker's answer to a cut.
    fn answer(
        &mut self,
        worker: usize,
        epoch: u64,
        incarnation: u64,
        scene: &Scene,
    ) -> Result<Measure, String> {
        let words = &scene.workers[worker].cut;
        let get = |word: &testudo_shm::primitive::AtomicU64| word.load(Ordering::Relaxed);
        let failure = get(&words.failure);
        if failure != 0 {
            let why = explain(failure, get(&words.errno));
            if failure == CutFailure::Disk as u64 {
                self.trouble = Some(why.clone());
            }
            return Err(why);
        }
        let name = RegionName { worker: worker as u32, epoch, incarnation };
        let file = FileRef {
            name: name.to_string(),
            bytes: get(&words.file_bytes),
            index_at: get(&words.index_at),
            index_bytes: get(&words.index_bytes),
            index_checksum: get(&words.index_checksum),
        };
        let (bytes, flight_bytes) = (file.bytes, get(&words.flight_bytes));
        self.acked[worker] = Some(Snapshot { epoch, file });
        Ok(Measure {
            bytes_full: if get(&words.is_full) != 0 { bytes } else { 0 },
            bytes_incremental: bytes,
            in_flight_bytes: flight_bytes,
            pause_ns: get(&words.pause_ns),
        })
    }

    fn carry_out(&mut self, actions: Vec<Action>, plan: &Plan, scene: &Scene) {
        let mut wake = false;
        for action in actions {
            match action {
                Action::BeginCut { region, epoch } => {
                    let words = &scene.control_header.regions[region];
                    scene.control_header.folder.store(self.folders.word(), Ordering::Release);
                    words.epoch.store(epoch, Ordering::Release);
                    wake = true;
                }
                Action::AbortCut { region, epoch } => {
                    let words = &scene.control_header.regions[region];
                    words.aborted.store(epoch, Ordering::Release);
                    wake = true;
                }
                Action::Seal { id, kind, parts } => self.seal(id, kind, &parts, plan),
                Action::Complete { parts, .. } => {
                    self.timer.ended(now());
                    self.trouble = None;
                    self.folders.completed();
                    self.complete(&parts, plan, scene);
                    self.has_said = self.is_last;
                }
                Action::Fail { id, why } => {
                    self.timer.ended(now());
                    self.say(id, why);
                    if let Some(why) = self.trouble.take() {
                        self.folders.failed(now_ns(), &why);
                    }
                }
            }
        }
        if wake {
            scene.wake_workers();
        }
    }

    /// A failed checkpoint is said, but not the same failure every time.
    fn say(&mut self, id: u64, why: String) {
        const AGAIN_NS: u64 = 10_000_000_000;
        let now = now_ns();
        self.said.retain(|(_, at)| now < at + AGAIN_NS);
        if !self.said.iter().any(|(known, _)| *known == why) {
            crate::say!("testudo: checkpoint {id} failed: {why}; the job goes on");
            self.said.push((why, now));
        }
    }

    fn snapshot(&self, worker: usize, epoch: u64) -> Option<&Snapshot> {
        let known = [&self.acked[worker], &self.good[worker]];
        known.into_iter().flatten().find(|snapshot| snapshot.epoch == epoch)
    }

    /// Has the manifest and the root written.
    fn seal(&mut self, id: u64, kind: Kind, parts: &[Part], plan: &Plan) {
        let manifest = self.manifest(id, kind, parts, plan);
        let (send, events) = (self.sealed.0.clone(), Arc::clone(&self.events));
        self.folders.current().post(move |store| {
            point(Point::BeforeSeal);
            let result = match store {
                Some(store) => {
                    let done = store.commit_with(&manifest, || point(Point::ManifestWritten));
                    done.map(|_| ()).map_err(|error| error.to_string())
                }
                None => Err("the checkpoint folder is not open".into()),
            };
            point(Point::RootWritten);
            let _ = send.send((id, result));
            events.bump();
        });
    }

    fn manifest(&self, id: u64, kind: Kind, parts: &[Part], plan: &Plan) -> Manifest {
        let regions = parts.iter().map(|part| {
            let workers = plan.regions.tasks(part.region).iter().filter_map(|&worker| {
                let file = self.snapshot(worker, part.epoch)?.file.clone();
                Some(WorkerFile { worker: worker as u32, file })
            });
            checkpoint::Region {
                number: part.region as u32,
                epoch: part.epoch,
                outcome: if part.is_fresh { Outcome::Ok } else { Outcome::CarriedOver },
                workers: workers.collect(),
            }
        });
        let operators = plan.operators.iter().filter_map(|operator| {
            let state = operator.state?;
            let grouping = match state.grouping {
                Grouping::ByKey => "key",
                Grouping::BySubtask => "subtask",
            };
            Some(Operator {
                uid: operator.uid().into(),
                name: operator.name.clone(),
                schema: state.schema,
                grouping: grouping.into(),
            })
        });
        Manifest {
            version: MANIFEST_VERSION,
            id,
            kind: match kind {
                Kind::Savepoint => checkpoint::Kind::Savepoint,
                _ => checkpoint::Kind::Checkpoint,
            },
            job: self.job.clone(),
            job_id: self.job_id,
            plan: plan.hash,
            started_ms: self.begun_ms,
            finished_ms: u64::try_from(unix_ms()).unwrap_or(0),
            groups: plan.key_groups as u32,
            workers: plan.workers as u32,
            finished: self.is_last,
            operators: operators.collect(),
            regions: regions.collect(),
            previous: None,
            figures: BTreeMap::from([(RUN.to_owned(), self.run)]),
        }
    }

    /// A checkpoint is on disk: workers may count on it, older files may go.
    fn complete(&mut self, parts: &[Part], plan: &Plan, scene: &Scene) {
        for part in parts.iter().filter(|part| part.is_fresh) {
            let words = &scene.control_header.regions[part.region];
            words.good.store(part.epoch, Ordering::Release);
            for &worker in plan.regions.tasks(part.region) {
                self.good[worker] = self.snapshot(worker, part.epoch).cloned();
            }
        }
        // Sinks commit: also those of workers that have nothing else to do.
        scene.wake_workers();
        let mut restoring = scene.workers.iter().map(|worker| &worker.restoring);
        if restoring.all(|restoring| restoring.load(Ordering::Acquire) == 0) {
            self.resumed.clear();
        }
        let running_epoch = self.coordinator.running_epoch();
        let known = self.good.iter().chain(&self.acked).flatten();
        let mut held: Vec<FileRef> = known.map(|snapshot| snapshot.file.clone()).collect();
        held.extend(self.resumed.iter().cloned());
        self.folders.current().post(move |store| {
            point(Point::BeforeRetire);
            // What stays is removed another time: nothing depends on it.
            let _ = store.map(|store| store.retire(&Keep { running_epoch, held: &held }));
        });
    }

    /// The job is to end before its input does: what it does from here on, such as firing windows
    /// that are not full, no checkpoint may hold. To be called before the workers know.
    pub(crate) fn drain(&mut self, plan: &Plan, scene: &Scene) {
        if !std::mem::replace(&mut self.is_draining, true) {
            let actions = self.coordinator.abandon(now(), "the job is being drained");
            let is_quiet = |action: &Action| !matches!(action, Action::Fail { .. });
            self.carry_out(actions.into_iter().filter(is_quiet).collect(), plan, scene);
        }
    }

    /// The job has come to its end: one more checkpoint says so. True once it is complete, or
    /// cannot be.
    pub(crate) fn finish(&mut self, plan: &Plan, scene: &Scene) -> bool {
        let now = now();
        if !self.is_last {
            if self.coordinator.open().is_some() {
                return false;
            }
            self.is_last = true;
            let mut actions = Vec::new();
            self.begin(now, Kind::Global, &mut actions);
            self.carry_out(actions, plan, scene);
            return false;
        }
        if self.has_said {
            return true;
        }
        let patience = u64::try_from(LAST_PATIENCE.as_millis()).unwrap_or(0);
        let since = *self.last_ms.get_or_insert(self.begun_ms);
        let waited = u64::try_from(now.unix_ms).unwrap_or(0).saturating_sub(since);
        let may_begin = self.coordinator.open().is_none() && self.coordinator.all_running();
        if waited <= patience && may_begin && self.folders.may_begin(now.monotonic_ns) {
            // The last one failed: a worker has died in it, say. Its successor is done as well.
            let mut actions = Vec::new();
            self.begin(now, Kind::Global, &mut actions);
            self.carry_out(actions, plan, scene);
        }
        waited > patience
    }

    /// When the loop should look again by itself.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let now = now();
        // What is due and cannot begin waits for something else to happen: no reason to wake.
        let may_begin = self.may_begin();
        let due = self.timer.due_in(now).filter(|_| may_begin);
        let deadline = self.coordinator.deadline_ns();
        let deadline = deadline.map(|at| Duration::from_nanos(at.saturating_sub(now.monotonic_ns)));
        let still = self.pausing.as_ref().map(|_| Duration::from_millis(5));
        let folder = self.folders.due_ns();
        let folder = folder.map(|at| Duration::from_nanos(at.saturating_sub(now.monotonic_ns)));
        let due = due.into_iter().chain(folder).min();
        due.into_iter().chain(deadline).chain(still).min()
    }

    /// Says whether no checkpoint may begin: values are being migrated.
    pub(crate) fn hold(&mut self, is_held: bool) {
        self.is_held = is_held;
    }

    /// Why a checkpoint that was asked for cannot begin now.
    pub(crate) fn held(&self) -> Option<&'static str> {
        let why = "the job is given a program that migrates values; ask again when that is done";
        self.is_held.then_some(why)
    }

    /// Begins the last one before all others are held; its number.
    pub(crate) fn take_held(&mut self, plan: &Plan, scene: &Scene) -> Result<u64, String> {
        self.is_held = false;
        let taken = self.take(Kind::Global, plan, scene);
        self.is_held = true;
        taken
    }

    /// Begins a checkpoint that was asked for; its number.
    pub(crate) fn take(&mut self, kind: Kind, plan: &Plan, scene: &Scene) -> Result<u64, String> {
        if let Some(why) = self.held() {
            return Err(why.into());
        }
        if self.is_last || self.is_draining {
            return Err("the job is coming to its end".into());
        }
        let now = now();
        self.timer.begun(now);
        self.begun_ms = u64::try_from(now.unix_ms).unwrap_or(0);
        let (id, actions) = self.coordinator.begin(now, kind).map_err(|busy| busy.to_string())?;
        self.carry_out(actions, plan, scene);
        Ok(id)
    }

    /// Sources stop for a while, so that the rings run empty: a savepoint has nothing in flight,
    /// and fits a job whose exchanges are others.
    pub(crate) fn pause_sources(&mut self, scene: &Scene) {
        scene.set_control(control::PAUSE);
        self.pausing = Some(Pausing { since_ns: now_ns(), still_ns: now_ns(), commits: 0 });
    }

    /// Sources go on.
    pub(crate) fn resume_sources(&mut self, scene: &Scene) {
        scene.clear_control(control::PAUSE);
        self.pausing = None;
    }

    /// Whether sources are stopped for a savepoint.
    pub(crate) fn is_pausing(&self) -> bool {
        self.pausing.is_some()
    }

    /// Whether nothing has moved for a while since sources were stopped, or they have been stopped
    /// for long enough: what is then in flight belongs to the savepoint.
    pub(crate) fn is_still(&mut self, scene: &Scene) -> bool {
        let Some(pausing) = &mut self.pausing else { return false };
        let now = now_ns();
        let commits =
            scene.workers.iter().map(|worker| worker.commits.load(Ordering::Acquire)).sum();
        if commits != pausing.commits {
            (pausing.commits, pausing.still_ns) = (commits, now);
        }
        now - pausing.still_ns > STILL_NS || now - pausing.since_ns > PAUSED_NS
    }

    /// When checkpoints are taken.
    pub(crate) fn schedule(&self) -> &Schedule {
        self.timer.schedule()
    }

    /// Milliseconds until the next one.
    pub(crate) fn next_in_ms(&self) -> Option<u64> {
        self.timer.due_in(now()).map(|due| u64::try_from(due.as_millis()).unwrap_or(u64::MAX))
    }

    /// When checkpoints are taken, from now on.
    pub(crate) fn set_schedule(&mut self, schedule: Schedule) {
        self.timer.set(schedule, now());
    }
}

/// The newest whole checkpoint in a folder that has none of these files.
fn newest_but(
    store: Option<&mut Store>,
    folder: usize,
    damaged: &[String],
) -> Result<Option<Chosen>, Error> {
    let Some(store) = store else {
        return Err(Error::Checkpoint("a checkpoint folder is not open".into()));
    };
    let has_damaged = |manifest: &Manifest| {
        let mut files = manifest.regions.iter().flat_map(|region| &region.workers);
        files.any(|file| damaged.contains(&file.file.name))
    };
    let Some(chosen) = resume::open_newest(store, |manifest| !has_damaged(manifest))? else {
        return Ok(None);
    };
    if let Some(past) = &chosen.past {
        // Before any output is taken back: a crash must not find the newer one again.
        store.adopt(past).map_err(|error| Error::Checkpoint(error.to_string()))?;
    }
    Ok(Some(Chosen { folder, ..chosen }))
}

fn now() -> Now {
    Now { monotonic_ns: now_ns(), unix_ms: unix_ms() }
}

/// A worker's failure in words.
fn explain(failure: u64, errno: u64) -> String {
    const DISK: u64 = CutFailure::Disk as u64;
    const COPIES: u64 = CutFailure::Copies as u64;
    const PEER: u64 = CutFailure::Peer as u64;
    match failure {
        DISK if errno > 0 => {
            let error = std::io::Error::from_raw_os_error(errno as i32);
            format!("its file cannot be written: {error}")
        }
        DISK => "its file cannot be written".into(),
        COPIES => "its state changed faster than the disk took it; \
                   raise --checkpoint-memory, or take checkpoints less often"
            .into(),
        PEER => "a worker that it gets records from died, or the cut was given up".into(),
        _ => "it began after the cut had".into(),
    }
}
