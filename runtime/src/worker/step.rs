//! The step loop. One step is one transaction; this file is its protocol.
//!
//! ```text
//! 1  tails of all input rings, then the control word (R5)
//! 2  stages, the last ones first: a full ring behind never keeps a stage from draining (R7)
//! 3  save: files to their offsets (R13), positions to their cells
//! 4  commit: one store (R11)
//! 5  publish tails, then heads; wake who sleeps (R8)
//! ```
//!
//! A process that dies before 4 leaves a step that its successor rolls back; after 4, one that the
//! successor publishes again. Every number above is a kill point of the tests.
//!
//! Called by `entry`.

use super::StageRef;
use super::attach::Worker;
use super::careful;
use super::context::{Cx, TURN};
use super::cut::Cutter;
use super::entry::{EXIT_FAILED, Streams, allow_huge_pages};
use super::idle::{Waiter, wake_sleepers};
use super::resume::Resuming;
use crate::config::Idle;
use crate::error::Error;
use crate::metrics;
use crate::operator::migrate::Migration;
use crate::supervisor::recover::DAMAGED;
use crate::supervisor::recover::stop::UNSOUND;
use crate::testing::{Point, point};
use crate::time::now_ns;
use testudo_shm::death;
use testudo_shm::follow::Parting;
use testudo_shm::header::{WorkerHeader, WorkerState, control};
use testudo_shm::last_words::LastWords;
use testudo_shm::marker::Phase;
use testudo_shm::primitive::Ordering;
use testudo_shm::wait;

/// Steps after which the worker pins itself: a successor does not share its first microseconds with
/// the teardown of its predecessor, which still runs on that core.
const STEPS_BEFORE_PINNING: u64 = 64;

/// What a worker without input sleeps while its state is being loaded, instead of spinning.
const LOADING_NAP: std::time::Duration = std::time::Duration::from_micros(50);

/// Runs steps until the job is over.
pub(crate) fn run(mut worker: Worker, stages: Vec<StageRef>, in_haste: bool) -> Result<(), Error> {
    let own = worker.header.worker.load(Ordering::Relaxed) as usize;
    let shares_core = worker.peers.len() > worker.settings.cores.len().max(1) + 1;
    let mut waiter = Waiter::new(worker.settings.idle, own, shares_core);
    let mut touched = Vec::with_capacity(worker.peers.len());
    let mut streams = Streams::default();
    let mut steps = 0u64;
    // When the step before this one began, unless there was a wait in between.
    let mut before_ns = 0;
    // A predecessor may have put a record aside.
    careful::end_step(&mut worker);
    let pid = std::process::id();
    let called_away = &worker.control.give_way[own];
    loop {
        attend_replica(&mut worker, &mut touched);
        if called_away.load(Ordering::Acquire) == pid && may_give_way(&worker) {
            give_way(&worker);
        }
        let mut work = step(&mut worker, &stages, &mut touched);
        if let Some(error) = worker.cx.failure.take() {
            fail(&worker, &error);
        }
        if worker.resuming.is_under_way {
            note_resumed(&mut worker);
        }
        if worker.cutter.as_ref().is_some_and(Cutter::is_open) {
            work = go_on_cutting(&mut worker, &mut touched, work);
        }
        streams.look(worker.cx.now_ns);
        steps += 1;
        worker.header.turns.store(steps, Ordering::Relaxed);
        if steps == 1 && in_haste {
            crate::haste::end();
        }
        size_next_step(&mut worker, before_ns);
        before_ns = if work > 0 { worker.cx.now_ns } else { 0 };
        if steps == STEPS_BEFORE_PINNING || !worker.leftovers.is_empty() {
            settle_in(&mut worker, steps);
        }
        if work > 0 {
            waiter.reset();
            continue;
        }
        if let Some(error) = worker.cx.ring_fault() {
            fail(&worker, &error);
        }
        let word = worker.control.control.load(Ordering::Acquire);
        if word & control::LEAVE != 0 {
            death::release(worker.header);
            return Ok(());
        }
        if stages.iter().all(|stage| stage.borrow().is_done(&worker.cx)) {
            finish(&worker);
        }
        if worker.resuming.is_under_way && worker.resuming.is_loading() {
            std::thread::sleep(LOADING_NAP);
            continue;
        }
        let due = stages.iter().filter_map(|stage| stage.borrow().wake_ns()).min();
        let (header, control) = (worker.header, worker.control);
        let cutter = &worker.cutter;
        let changed = || {
            let is_called = cutter.as_ref().is_some_and(Cutter::is_called);
            let is_called = is_called || called_away.load(Ordering::Acquire) == pid;
            is_called || control.control.load(Ordering::Acquire) != word
        };
        waiter.wait(&mut worker.cx, &worker.peers, &header.sleeping, worker.event, due, changed);
    }
}

/// A step that takes longer is made shorter: others wait for what it does, and the supervisor for a
/// sign that it gets on.
const SLOW_NS: u64 = 100_000_000;

/// How many records of one input the next step takes: fewer after a step that others wait for too
/// long, or, where nothing bounds that, if the step before this one began long ago; else more.
#[inline]
fn size_next_step(worker: &mut Worker, before_ns: u64) {
    let cx = &mut worker.cx;
    if let Some(latency) = &mut worker.latency {
        return latency.after_step(cx);
    }
    let is_slow = before_ns > 0 && cx.now_ns.saturating_sub(before_ns) > SLOW_NS;
    cx.turn = if is_slow { (cx.turn / 2).max(1) } else { (cx.turn * 2).min(TURN) };
}

/// What a process does to be a worker like any other, once its peers have heard of it: it takes the
/// core that was chosen for it, and gives back what it had while it stood by.
#[cold]
fn settle_in(worker: &mut Worker, steps: u64) {
    if steps == STEPS_BEFORE_PINNING {
        pin(worker);
        allow_huge_pages();
    } else if steps > STEPS_BEFORE_PINNING {
        worker.leftovers.give_back();
    }
}

/// Takes one step. Returns what was done; 0 when there was nothing to do.
#[inline]
fn step(worker: &mut Worker, stages: &[StageRef], touched: &mut Vec<usize>) -> usize {
    point(Point::StepBegin);
    let gives_back = !worker.cx.txn.is_cutting();
    begin_step(worker, stages);
    let cx = &mut worker.cx;
    if cx.failure.is_some() {
        return 1;
    }
    let word = worker.control.control.load(Ordering::Acquire);
    cx.draining = word & control::DRAIN != 0;
    cx.pausing = word & (control::PAUSE | control::HOLD) != 0;
    cx.now_ns = now_ns();
    cx.is_pressed = false;
    cx.rotation = cx.rotation.wrapping_add(1);
    cx.txn.begin_stages();
    worker.times.begin_step(cx.now_ns);
    let mut leading = worker.leading.as_mut().filter(|leading| leading.is_followed());
    if let Some(leading) = &mut leading {
        leading.begin(cx, gives_back);
    }
    let mut work = 0;
    if cx.careful.is_some() {
        careful::begin_step(cx, worker.cutter.as_ref());
    }
    for stage in stages {
        work += stage.borrow_mut().run(cx);
        if cx.failure.is_some() {
            return 1;
        }
    }
    cx.marker.clear();
    if let Some(migration) = &mut worker.migration {
        go_on_migrating(cx, migration, worker.header, work);
    }
    point(Point::Processed);
    if let Some(leading) = &mut leading {
        leading.processed(cx);
    }
    worker.times.end_step(work > 0, cx);
    if work == 0 && cx.txn.logged() == 0 && !cx.has_moved() {
        return 0;
    }
    cx.marker.set(Phase::Saving, 0);
    for stage in stages {
        stage.borrow_mut().save(cx);
    }
    cx.marker.clear();
    if cx.failure.is_some() {
        return 1;
    }
    point(Point::Saved);
    cx.save_positions();
    metrics::save_user_counters(cx, &worker.user_counters);
    if let Some(latency) = &mut worker.latency {
        latency.save(cx);
    }
    point(Point::BeforeCommit);
    cx.txn.commit();
    point(Point::Committed);
    if let Some(leading) = leading {
        leading.end(cx, worker.header.commits.load(Ordering::Relaxed) + 1);
        point(Point::JournalWritten);
    }
    committed(worker, touched, work)
}

/// Loads the tails of all inputs; then what belongs between two steps.
#[inline]
fn begin_step(worker: &mut Worker, stages: &[StageRef]) {
    worker.migration.take_if(|migration| migration.is_over());
    let cx = &mut worker.cx;
    for groups in &worker.groups {
        groups.begin_step(&cx.txn);
        groups.give_back(&cx.txn);
    }
    cx.look();
    if let Some(migration) = &mut worker.migration {
        settle_before_cut(cx, migration, worker.header, worker.cutter.as_ref());
    }
    // R5: epoch and control word after the tails; nothing is loaded again within the step.
    if let Some(cutter) = &mut worker.cutter {
        boundary(cx, cutter, stages, worker.notice);
    }
}

/// Says that a step was committed, and what was done in it.
#[inline]
fn committed(worker: &mut Worker, touched: &mut Vec<usize>, work: usize) -> usize {
    publish(worker, touched);
    note_commit(worker, work);
    if worker.cx.careful.is_some() {
        careful::end_step(worker);
    }
    // What was committed without a record (a part of the windows that fire) goes on at once.
    work.max(1)
}

/// A cut that begins holds what this program alone can go on from, and says so.
#[cold]
fn settle_before_cut(
    cx: &mut Cx,
    migration: &mut Migration,
    header: &WorkerHeader,
    cutter: Option<&Cutter>,
) {
    if migration.is_unsettled() && cutter.is_some_and(Cutter::is_due) {
        migration.settle(&mut cx.txn, header);
        cx.txn.commit();
    }
}

/// What was migrated settles with the first step that is committed; then what is left is freed.
#[cold]
fn go_on_migrating(cx: &mut Cx, migration: &mut Migration, header: &WorkerHeader, work: usize) {
    if !migration.is_unsettled() {
        if let Err(error) = migration.sweep(&mut cx.txn) {
            cx.fail(Error::job("(migration)", error.to_string()));
        }
    } else if work > 0 || cx.txn.logged() > 0 || cx.has_moved() {
        migration.settle(&mut cx.txn, header);
    }
}

/// Between two steps: a cut may begin here, or another part of one end.
#[inline]
fn boundary(cx: &mut Cx, cutter: &mut Cutter, stages: &[StageRef], notice: i32) {
    let is_done = |cx: &Cx| stages.iter().all(|stage| stage.borrow().is_done(cx));
    cx.marker.waiting.store(1, Ordering::Relaxed);
    if cutter.boundary(cx, is_done) {
        wait::wake_event(notice);
    }
    cx.marker.waiting.store(0, Ordering::Relaxed);
}

/// Between two steps of a worker of tier 1: lets a replica in, looks whether it still follows, and
/// gives back what it has read.
#[inline]
fn attend_replica(worker: &mut Worker, touched: &mut Vec<usize>) {
    let Some(leading) = &mut worker.leading else { return };
    // What is still to be freed, it would not free.
    let is_settled = worker.migration.as_ref().is_none_or(|migration| migration.is_over());
    if leading.is_asked()
        && is_settled
        && may_be_copied(&worker.cx, worker.cutter.as_ref(), &worker.resuming)
    {
        let control = worker.control;
        let is_over = || control.control.load(Ordering::Acquire) & control::LEAVE != 0;
        point(Point::JournalGranted);
        // The replica does not know what was freed before.
        worker.groups.iter().for_each(|groups| groups.give_back(&worker.cx.txn));
        leading.stand_still(&mut worker.cx, is_over);
    }
    if leading.is_followed() {
        leading.look(&mut worker.cx);
        if worker.cx.careful.is_some() || worker.cx.outside.is_waiting() {
            leading.part(&mut worker.cx, Parting::Apart);
        }
    }
    if leading.settles() || worker.cx.waits_for_replica() {
        touched.clear();
        worker.cx.publish_held(|peer| touched.push(peer));
        if !touched.is_empty() {
            wait::publish_fence();
            wake_sleepers(&worker.peers, touched, &worker.header.bell);
        }
    }
}

/// Whether a copy of the state is all that a replica needs to do as this worker does.
#[cold]
fn may_be_copied(cx: &Cx, cutter: Option<&Cutter>, resuming: &Resuming) -> bool {
    !cutter.is_some_and(Cutter::is_open)
        && !resuming.is_under_way
        && cx.careful.is_none()
        && !cx.outside.is_waiting()
}

/// Whether the worker may leave its place to a successor between these two steps: its part of an
/// open cut is finished first, and so is what it loads of a checkpoint.
#[cold]
fn may_give_way(worker: &Worker) -> bool {
    !worker.cutter.as_ref().is_some_and(Cutter::is_open) && !worker.resuming.is_under_way
}

/// Leaves its place to a successor. Nothing is open: the last step is committed and published. As
/// after a death no destructor of the user's runs; the successor may be at work before this process
/// has ended.
#[cold]
fn give_way(worker: &Worker) -> ! {
    point(Point::GivingWay);
    crate::haste::give_way();
    worker.header.gave_way.fetch_add(1, Ordering::Relaxed);
    worker.header.gave_way_ns.store(now_ns(), Ordering::Relaxed);
    death::give_way(worker.header, || point(Point::Releasing));
    point(Point::GaveWay);
    std::process::exit(0)
}

/// Says so once all of the checkpoint has been loaded and what was in flight is taken: nobody needs
/// its files any more.
#[cold]
fn note_resumed(worker: &mut Worker) {
    let (resuming, cx) = (&mut worker.resuming, &mut worker.cx);
    let is_loaded = !resuming.is_loading();
    if is_loaded {
        // The list of all pages goes with it, in one of its threads.
        resuming.loading = None;
    }
    if is_loaded && let Some(loaded) = resuming.loaded.take() {
        // A part of the next step's transaction.
        cx.txn.set(loaded, 1);
    }
    if is_loaded && cx.rests_are_taken() {
        resuming.is_under_way = false;
        worker.header.restoring.store(0, Ordering::Release);
    }
}

/// Goes on with the open cut, after a step that did so much. While there is nothing else to do, the
/// processor is left to others. Returns whether there is something to do at once.
#[cold]
fn go_on_cutting(worker: &mut Worker, touched: &mut Vec<usize>, work: usize) -> usize {
    let Some(cutter) = &mut worker.cutter else { return work };
    worker.cx.marker.waiting.store(1, Ordering::Relaxed);
    let is_over = cutter.advance(&mut worker.cx, now_ns());
    touched.clear();
    worker.cx.publish_held(|peer| touched.push(peer));
    if is_over {
        worker.notice();
    } else if work == 0
        && let Some(cutter) = &mut worker.cutter
    {
        cutter.wait();
    }
    worker.cx.marker.waiting.store(0, Ordering::Relaxed);
    if !touched.is_empty() {
        wait::publish_fence();
        wake_sleepers(&worker.peers, touched, &worker.header.bell);
    }
    // Who is told to leave does not wait for a slow disk.
    let is_told = worker.control.control.load(Ordering::Acquire) & control::LEAVE != 0;
    work.max(usize::from(!is_told))
}

/// Publishes what the step moved and wakes who waits for it.
#[inline]
fn publish(worker: &mut Worker, touched: &mut Vec<usize>) {
    touched.clear();
    worker.cx.publish(|peer| {
        if !touched.contains(&peer) {
            touched.push(peer);
        }
    });
    point(Point::StepPublished);
    // Even a spinning worker fences: the supervisor's ring thread sleeps in any case.
    if !touched.is_empty() && (worker.settings.idle == Idle::Adaptive || worker.feeds_supervisor) {
        wait::publish_fence();
        wake_sleepers(&worker.peers, touched, &worker.header.bell);
    }
}

/// Says in the header that a step was committed; a successor's first one ends its recovery.
#[inline]
fn note_commit(worker: &Worker, work: usize) {
    let header = worker.header;
    let now = worker.cx.now_ns;
    metrics::note_gap(header, now);
    header.watermark.store(worker.cx.watermark.cast_unsigned(), Ordering::Relaxed);
    header.commit_ns.store(now, Ordering::Relaxed);
    header.commits.store(header.commits.load(Ordering::Relaxed) + 1, Ordering::Release);
    if work > 0 && header.first_commit_ns.load(Ordering::Relaxed) == 0 {
        header.first_commit_ns.store(now_ns(), Ordering::Release);
    }
}

/// All stages are done: tells the supervisor, once.
fn finish(worker: &Worker) {
    let state = &worker.header.state;
    if state.load(Ordering::Relaxed) != WorkerState::Finished as u32 {
        state.store(WorkerState::Finished as u32, Ordering::Release);
        worker.notice();
    }
}

/// Gives up: the reason becomes the last words, and the process leaves without committing.
fn fail(worker: &Worker, error: &Error) -> ! {
    give_up(worker.header, worker.last_words, error)
}

/// As [`fail`], also while attaching.
pub(crate) fn give_up(header: &WorkerHeader, last_words: &LastWords, error: &Error) -> ! {
    let words = match error {
        Error::Damaged(_) => format!("{DAMAGED}{error}"),
        Error::Unsound(_) => format!("{UNSOUND}{error}"),
        _ => error.to_string(),
    };
    last_words.write(&words);
    header.state.store(WorkerState::Failed as u32, Ordering::Release);
    std::process::exit(EXIT_FAILED)
}

fn pin(worker: &Worker) {
    if let Some(core) = worker.core {
        core_affinity::set_for_current(core_affinity::CoreId { id: core });
    }
}
