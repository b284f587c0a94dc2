//! Checkpoints of a job whose supervisor died: they go on with the numbers, the schedule and the
//! history that there are.
//!
//! What counts is in the folder: a checkpoint whose root is written is complete, and is told to the
//! workers if they were not told; every cut that no complete checkpoint has is given up. The folder
//! is opened in a thread, and again and again where it is not there at the moment: the job goes on
//! meanwhile.
//!
//! Called by `launch::adopt` and by the loop.

use super::{Checkpointer, Folders, PAUSE, Snapshot, now};
use crate::checkpoint::Now;
use crate::checkpoint::coordinator::{Coordinator, Limits, Start};
use crate::checkpoint::history::{Record, State};
use crate::checkpoint::schedule::Timer;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::Plan;
use crate::supervisor::chronicle::Past;
use crate::supervisor::launch::Scene;
use crate::supervisor::watch::Events;
use crate::worker::restore::{Checkpoints, Restore};
use crossbeam::channel::{Receiver, bounded};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testudo_shm::primitive::Ordering;
use testudo_state::checkpoint::{Manifest, RegionName};

/// Pause before a folder that cannot be opened is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long the end of the job waits for the folder.
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder that is being opened.
#[derive(Debug)]
pub(crate) struct Opening {
    found: Receiver<(Folders, Folder)>,
    checkpoints: Checkpoints,
    past: Option<Past>,
    since: Instant,
}

/// What a folder has of the job.
#[derive(Debug)]
struct Folder {
    next_id: u64,
    next_epoch: u64,
    newest: Option<Manifest>,
}

/// A folder that is open, and what else is known.
#[derive(Debug)]
pub(crate) struct Found {
    folders: Folders,
    folder: Folder,
    checkpoints: Checkpoints,
    past: Past,
}

impl Opening {
    /// Begins to open the folder.
    pub(crate) fn begin(
        settings: &Settings,
        checkpoints: Checkpoints,
        past: Past,
        (events, word): (&Arc<Events>, u64),
    ) -> Result<Self, Error> {
        let (send, found) = bounded(1);
        let (paths, disk, job) = (checkpoints.folders.clone(), settings.disk, checkpoints.job);
        let events = Arc::clone(events);
        let work = move || {
            let mut has_said = false;
            let opened = loop {
                let opened = Folders::adopt(&paths, disk, word).and_then(|folders| {
                    let folder = look(&folders, job)?;
                    Ok((folders, folder))
                });
                match opened {
                    Ok(opened) => break opened,
                    Err(error) if !has_said => {
                        crate::say!("testudo: no checkpoints for the moment: {error}");
                        has_said = true;
                    }
                    Err(_) => {}
                }
                std::thread::sleep(AGAIN);
            };
            drop(send.send(opened));
            events.bump();
        };
        std::thread::Builder::new()
            .name("testudo-folder".into())
            .spawn(work)
            .map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
        Ok(Self { found, checkpoints, past: Some(past), since: Instant::now() })
    }

    /// The folder, once it is open.
    pub(crate) fn take(&mut self) -> Option<Found> {
        let (folders, folder) = self.found.try_recv().ok()?;
        let (checkpoints, past) = (self.checkpoints.clone(), self.past.take()?);
        Some(Found { folders, folder, checkpoints, past })
    }

    /// The job is done, and has waited for its last checkpoint for long enough.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.since.elapsed() > PATIENCE
    }
}

/// Reads what the folder that checkpoints go to has of the job, and which numbers were never used
/// in any.
fn look(folders: &Folders, job: u64) -> Result<Folder, Error> {
    let next = folders.in_each(|store| Ok((store.next_id()?, store.next_epoch()?)))?;
    let next_id = next.iter().map(|next| next.0).max().unwrap_or(1);
    let next_epoch = next.iter().map(|next| next.1).max().unwrap_or(1);
    let folder = folders.current().ask(move |store| {
        let mut named = store.named()?.into_iter().filter_map(|candidate| candidate.manifest);
        let newest = named.next().filter(|manifest| manifest.job_id == job);
        Ok::<_, testudo_state::checkpoint::StoreError>(Folder { next_id, next_epoch, newest })
    })?;
    folder.map_err(|error| Error::Checkpoint(error.to_string()))
}

impl Found {
    /// Takes checkpoints from here on.
    pub(crate) fn lead(
        self,
        plan: &Plan,
        settings: &Settings,
        scene: &Scene,
        events: &Arc<Events>,
    ) -> Result<Checkpointer, Error> {
        let Self { folders, folder, checkpoints, mut past } = self;
        let mut this = Checkpointer::new(plan, settings, folders, None, checkpoints.job, events)?;
        let restore = checkpoints.restore.as_ref();
        this.good = good(plan, folder.newest.as_ref(), restore);
        if scene.workers.iter().any(|worker| worker.restoring.load(Ordering::Acquire) != 0) {
            let rewound = scene.description.rewound.iter().filter_map(|own| own.restore.as_ref());
            let files = restore.into_iter().chain(rewound).flat_map(|restore| &restore.files);
            this.resumed = files.map(|(_, file)| file.clone()).collect();
        }
        this.settle_cuts(plan, scene, restore);
        for worker in 0..plan.workers {
            // What was said to the earlier supervisor is about cuts that are settled now; the files
            // are kept from being removed all the same.
            let words = &scene.workers[worker].cut;
            this.skipped[worker] = words.joined.load(Ordering::Acquire);
            let epoch = words.epoch.load(Ordering::Acquire);
            this.seen[worker] = epoch;
            if epoch > 0 {
                let by = words.incarnation.load(Ordering::Relaxed);
                let _ = this.answer(worker, epoch, by, scene);
            }
        }
        let records = settled(std::mem::take(&mut past.records), folder.newest.as_ref());
        let epochs = scene.control_header.regions[..plan.regions.count()].iter();
        let last_epoch = epochs.map(|words| words.epoch.load(Ordering::Acquire)).max();
        let region_good = |region: usize| this.region_good(plan, region);
        let start = Start {
            last_id: (folder.next_id - 1).max(records.last().map_or(0, |record| record.id)),
            last_epoch: (folder.next_epoch - 1).max(last_epoch.unwrap_or(0)),
            good: (0..plan.regions.count()).map(region_good).collect(),
        };
        let limits = Limits { deadline: settings.checkpoint_deadline, ..Limits::default() };
        let mut coordinator = Coordinator::resume(plan.regions.clone(), limits, &start);
        let begun = last_begin(&records, &past);
        coordinator.remember(records);
        this.coordinator = coordinator;
        let schedule = past.schedule.unwrap_or_else(|| settings.checkpoints.clone());
        this.timer = Timer::new(schedule, PAUSE, begun);
        Ok(this)
    }
}

/// Each worker's snapshot in the newest complete checkpoint, as far as the workers are the same.
fn good(
    plan: &Plan,
    newest: Option<&Manifest>,
    restore: Option<&Restore>,
) -> Vec<Option<Snapshot>> {
    let mut good = vec![None; plan.workers];
    let Some(newest) = newest else { return good };
    let is_past = restore.is_some_and(|restore| restore.id == newest.id && !restore.same_shape);
    if is_past {
        return good;
    }
    for file in newest.regions.iter().flat_map(|region| &region.workers) {
        if let Some(good) = good.get_mut(file.worker as usize) {
            let epoch = RegionName::parse(&file.file.name).map_or(0, |name| name.epoch);
            *good = Some(Snapshot { epoch, file: file.file.clone() });
        }
    }
    good
}

impl Checkpointer {
    /// The epoch of a region's good snapshot.
    fn region_good(&self, plan: &Plan, region: usize) -> Option<u64> {
        let mut tasks = plan.regions.tasks(region).iter();
        tasks.next().and_then(|worker| self.good[*worker].as_ref()).map(|good| good.epoch)
    }

    /// Tells the workers what became of their latest cuts: those of complete checkpoints are good,
    /// the others are given up.
    fn settle_cuts(&self, plan: &Plan, scene: &Scene, restore: Option<&Restore>) {
        let last = restore.map_or(0, Restore::last_epoch);
        for region in 0..plan.regions.count() {
            let words = &scene.control_header.regions[region];
            let good = self.region_good(plan, region).unwrap_or(last);
            let good = good.max(words.good.load(Ordering::Acquire));
            words.good.store(good, Ordering::Release);
            let epoch = words.epoch.load(Ordering::Acquire);
            if epoch > good && epoch > words.aborted.load(Ordering::Acquire) {
                words.aborted.store(epoch, Ordering::Release);
            }
        }
        scene.wake_workers();
    }
}

/// The records of the earlier supervisor; the one that was open has ended in one way or the other.
fn settled(mut records: Vec<Record>, newest: Option<&Manifest>) -> Vec<Record> {
    for record in records.iter_mut().filter(|record| record.state == State::Open) {
        let is_complete = newest.is_some_and(|newest| newest.id == record.id);
        record.state = if is_complete {
            State::Complete
        } else {
            State::Failed("the supervisor died while it was taken".into())
        };
    }
    records
}

/// When the latest checkpoint was begun, or the job: the schedule goes on from there.
fn last_begin(records: &[Record], past: &Past) -> Now {
    let now = now();
    let passed_ms = match records.last() {
        Some(record) => u64::try_from(now.unix_ms - record.begun_unix_ms).unwrap_or(0),
        None => now.monotonic_ns.saturating_sub(past.begun_ns) / 1_000_000,
    };
    let passed_ns = passed_ms.saturating_mul(1_000_000);
    Now {
        monotonic_ns: now.monotonic_ns.saturating_sub(passed_ns),
        unix_ms: now.unix_ms - i64::try_from(passed_ms).unwrap_or(0),
    }
}
