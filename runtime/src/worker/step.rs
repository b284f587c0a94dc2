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
use super::context::{Cx, TURN};
use super::cut::Cutter;
use super::entry::EXIT_FAILED;
use super::idle::{Waiter, wake_sleepers};
use crate::config::Idle;
use crate::error::Error;
use crate::metrics;
use crate::supervisor::recover::DAMAGED;
use crate::testing::{Point, point};
use crate::time::now_ns;
use testudo_shm::death;
use testudo_shm::header::{WorkerHeader, WorkerState, control};
use testudo_shm::last_words::LastWords;
use testudo_shm::primitive::Ordering;
use testudo_shm::wait;

/// Steps after which the worker pins itself: a successor does not share its first microseconds with
/// the teardown of its predecessor, which still runs on that core.
const STEPS_BEFORE_PINNING: u64 = 64;

/// What a worker without input sleeps while its state is being loaded, instead of spinning.
const LOADING_NAP: std::time::Duration = std::time::Duration::from_micros(50);

/// Runs steps until the job is over.
pub(crate) fn run(mut worker: Worker, stages: Vec<StageRef>, in_haste: bool) -> Result<(), Error> {
    metrics::set_panic_page(worker.last_words);
    let own = worker.header.worker.load(Ordering::Relaxed) as usize;
    let cores = worker.settings.cores.len().max(1);
    let shares_core = worker.peers.len() > cores + 1;
    let mut waiter = Waiter::new(worker.settings.idle, own, shares_core);
    let mut touched = Vec::with_capacity(worker.peers.len());
    let mut steps = 0u64;
    loop {
        let mut work = step(&mut worker, &stages, &mut touched);
        if let Some(error) = worker.cx.failure.take() {
            fail(&worker, &error);
        }
        if worker.resuming.is_under_way {
            note_resumed(&mut worker);
        }
        if worker.cutter.as_ref().is_some_and(Cutter::is_open) {
            go_on_cutting(&mut worker, &mut touched, work > 0);
            // Who is told to leave does not wait for a slow disk.
            let is_told = worker.control.control.load(Ordering::Acquire) & control::LEAVE != 0;
            work = work.max(usize::from(!is_told));
        }
        steps += 1;
        if steps == 1 && in_haste {
            crate::haste::end();
        }
        worker.cx.turn = (worker.cx.turn * 2).min(TURN);
        if steps == STEPS_BEFORE_PINNING {
            pin(&worker);
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
            is_called || control.control.load(Ordering::Acquire) != word
        };
        waiter.wait(&mut worker.cx, &worker.peers, &header.sleeping, worker.event, due, changed);
    }
}

/// Takes one step. Returns what was done; 0 when there was nothing to do.
#[inline]
fn step(worker: &mut Worker, stages: &[StageRef], touched: &mut Vec<usize>) -> usize {
    point(Point::StepBegin);
    let cx = &mut worker.cx;
    for groups in &worker.groups {
        groups.begin_step(&cx.txn);
        groups.give_back(&cx.txn);
    }
    cx.look();
    // R5: epoch and control word after the tails; nothing is loaded again within the step.
    if let Some(cutter) = &mut worker.cutter {
        let is_done = |cx: &Cx| stages.iter().all(|stage| stage.borrow().is_done(cx));
        if cutter.boundary(cx, is_done) {
            wait::wake_event(worker.notice);
        }
        if cx.failure.is_some() {
            return 1;
        }
    }
    let word = worker.control.control.load(Ordering::Acquire);
    cx.draining = word & control::DRAIN != 0;
    cx.pausing = word & control::PAUSE != 0;
    cx.now_ns = now_ns();
    let mut work = 0;
    for stage in stages {
        work += stage.borrow_mut().run(cx);
        if cx.failure.is_some() {
            return 1;
        }
    }
    point(Point::Processed);
    if work == 0 && cx.txn.logged() == 0 {
        return 0;
    }
    for stage in stages {
        stage.borrow_mut().save(cx);
    }
    if cx.failure.is_some() {
        return 1;
    }
    point(Point::Saved);
    cx.save_positions();
    metrics::save_user_counters(cx, &worker.user_counters);
    point(Point::BeforeCommit);
    cx.txn.commit();
    point(Point::Committed);
    publish(worker, touched);
    note_commit(worker, work);
    // What was committed without a record (a part of the windows that fire) goes on at once.
    work.max(1)
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

/// Goes on with the open cut. While there is nothing else to do, the processor is left to others.
#[cold]
fn go_on_cutting(worker: &mut Worker, touched: &mut Vec<usize>, is_busy: bool) {
    let Some(cutter) = &mut worker.cutter else { return };
    let is_over = cutter.advance(&mut worker.cx, now_ns());
    touched.clear();
    worker.cx.publish_held(|peer| touched.push(peer));
    if is_over {
        worker.notice();
    } else if !is_busy && let Some(cutter) = &mut worker.cutter {
        cutter.wait();
    }
    if !touched.is_empty() {
        wait::publish_fence();
        wake_sleepers(&worker.peers, touched, &worker.header.bell);
    }
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
    let damaged = matches!(error, Error::Damaged(_)).then_some(DAMAGED).unwrap_or_default();
    last_words.write(&format!("{damaged}{error}"));
    header.state.store(WorkerState::Failed as u32, Ordering::Release);
    std::process::exit(EXIT_FAILED)
}

fn pin(worker: &Worker) {
    if let Some(core) = worker.core {
        core_affinity::set_for_current(core_affinity::CoreId { id: core });
    }
}
