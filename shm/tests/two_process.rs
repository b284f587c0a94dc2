//! Real processes: SIGKILL between and inside the operations of a ring and of a transaction, death
//! words, claims, and sleeping and waking across processes.
//!
//! The tests run one after the other on the only thread, so each may fork. "At every instruction"
//! means that the dying process is stepped through one by one with ptrace, and what it leaves is
//! looked at after each: a SIGKILL there would leave exactly that. Where ptrace is not allowed
//! these are shown as ignored.
//!
//! Promises: R1 (death is a word), R2 (one successor), R6 (the published prefix), R8 (no wake is
//! lost), R11 (a step is whole or gone, wherever the process dies, in a rollback too).

mod common;

use common::{Memory, Random, TestRing, assert_clean, assert_killed, die, fork, kill, wait_pid};
use libtest_mimic::{Arguments, Trial};
use std::io::Read;
use std::os::fd::FromRawFd;
use testudo_shm::consumer::Frame;
use testudo_shm::death::{self, ClaimError};
use testudo_shm::frame::Mark;
use testudo_shm::header::WorkerHeader;
use testudo_shm::primitive::{AtomicU32, AtomicU64, Ordering, spin_hint};
use testudo_shm::producer::Producer;
use testudo_shm::txn::Txn;
use testudo_shm::wait::{self, WaitWord};

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let stepping = can_step();
    let test = |name: &str, run: fn()| trial(name, run);
    let steps =
        |name: &str, run: fn()| trial(name, move || on_one_core(run)).with_ignored_flag(!stepping);
    let tests = vec![
        test("r6_a_killed_producer_leaves_the_published_prefix", killed_producer),
        steps("r6_a_producer_may_die_at_every_instruction", stepped_producer),
        test("r6_a_killed_consumer_loses_no_frame_and_frees_none", killed_consumer),
        steps("r6_a_consumer_may_die_at_every_instruction", stepped_consumer),
        test("r11_a_killed_step_is_rolled_back_by_the_successor", killed_step),
        steps("r11_a_step_may_die_at_every_instruction", stepped_step),
        steps("r11_a_rollback_may_die_at_every_instruction", stepped_rollback),
        test("r11_a_log_that_overflows_aborts_and_says_why", overflowing_log),
        test("r1_a_sigkill_marks_the_words_and_wakes_every_waiter", death_wakes),
        test("r1_death_does_not_wait_for_the_teardown_of_memory", death_before_teardown),
        test("r1_a_released_segment_is_not_dead", released_segment),
        test("r2_exactly_one_successor_wins_a_dead_segment", one_successor),
        test("r2_a_live_segment_cannot_be_claimed", live_segment),
        test("r2_a_claim_that_dies_right_after_the_swap_is_marked", killed_in_claim),
        steps("r2_a_claim_may_die_at_every_instruction", stepped_claim),
        steps("r2_a_claim_overtaken_at_any_instruction_has_one_winner", overtaken_claim),
        test("r8_no_wake_is_lost_between_processes_on_words", || wakes_on_words(100_000)),
        test("r8_no_wake_is_lost_between_processes_on_eventfds", || wakes_on_events(100_000)),
    ];
    libtest_mimic::run(&arguments, tests).exit();
}

fn trial(name: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        common::limit_seconds(1200);
        run();
        Ok(())
    })
}

/// Keeps this process and its children on one core: handing over to a child that is stepped through
/// takes a tenth of the time there.
fn on_one_core(run: fn()) {
    // SAFETY: both sets are valid places, and all zeros is an empty set.
    unsafe {
        let mut all: libc::cpu_set_t = std::mem::zeroed();
        let size = size_of::<libc::cpu_set_t>();
        assert_eq!(libc::sched_getaffinity(0, size, &raw mut all), 0);
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(usize::try_from(libc::sched_getcpu()).unwrap_or(0), &mut one);
        libc::sched_setaffinity(0, size, &raw const one);
        run();
        libc::sched_setaffinity(0, size, &raw const all);
    }
}

/// Words that parent and child share, to say how far they are.
struct Stage(Memory);

impl Stage {
    fn new() -> Self {
        Self(Memory::new(4096))
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.0.word(index * 128)
    }

    fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    fn wait_for(&self, index: usize, value: u64) {
        while self.get(index) < value {
            std::thread::yield_now();
        }
    }
}

/// A child that is run one instruction at a time.
struct Stepped {
    pid: libc::pid_t,
    status: i32,
}

impl Stepped {
    fn new(run: impl FnOnce()) -> Self {
        let pid = fork(|| {
            // SAFETY: asks to be traced by the parent and stops for it.
            let refused = unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 || libc::raise(libc::SIGSTOP) != 0
            };
            assert!(!refused, "ptrace is not allowed");
            run();
        });
        Self { pid, status: wait_pid(pid) }
    }

    fn is_running(&self) -> bool {
        libc::WIFSTOPPED(self.status)
    }

    fn step(&mut self) {
        // SAFETY: the child is stopped; no memory is passed.
        let refused = unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, self.pid, 0, 0) };
        assert_eq!(refused, 0, "ptrace: {}", std::io::Error::last_os_error());
        self.status = wait_pid(self.pid);
    }

    /// Steps until the child has set word 0 of `stage` to `value`.
    fn step_until(&mut self, stage: &Stage, value: u64) {
        while self.is_running() && stage.get(0) < value {
            self.step();
        }
        assert!(self.is_running(), "the child ended early: {:#x}", self.status);
    }

    /// Calls `look` after each instruction until word 0 of `stage` is `value`. Returns how many.
    fn each(&mut self, stage: &Stage, value: u64, mut look: impl FnMut(u64)) -> u64 {
        let mut instructions = 0;
        while self.is_running() && stage.get(0) < value {
            look(instructions);
            self.step();
            instructions += 1;
        }
        assert!(self.is_running(), "the child ended early: {:#x}", self.status);
        look(instructions);
        instructions
    }

    /// Lets the child run on by itself.
    fn detach(self) -> libc::pid_t {
        // SAFETY: the child is stopped; no memory is passed.
        let refused = unsafe { libc::ptrace(libc::PTRACE_DETACH, self.pid, 0, 0) };
        assert_eq!(refused, 0, "ptrace: {}", std::io::Error::last_os_error());
        self.pid
    }

    fn kill(self) {
        kill(self.pid);
        if self.is_running() {
            assert_killed(wait_pid(self.pid));
        }
    }
}

fn can_step() -> bool {
    let stage = Stage::new();
    let pid = fork(|| {
        // SAFETY: as in `Stepped::new`.
        let done = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        stage.set(0, if done == 0 { 2 } else { 1 });
    });
    assert_clean(wait_pid(pid));
    cfg!(target_arch = "x86_64") && stage.get(0) == 2
}

// ---- rings ------------------------------------------------------------------------------------

/// What a ring holds, as a surviving consumer sees it: a checksum of each frame.
fn seen(ring: &TestRing, head: u64) -> Vec<u64> {
    let mut consumer = ring.consumer(head);
    consumer.look();
    let mut frames = Vec::new();
    loop {
        match consumer.frame() {
            Some(Frame::Data { bytes, count }) => {
                let sum = bytes
                    .iter()
                    .fold(count as u64, |sum, b| sum * 31 % 0xFFFF_FFFB + u64::from(*b));
                frames.push(sum);
            }
            Some(Frame::Mark(mark)) => frames.push(mark.watermark as u64),
            Some(Frame::End) => frames.push(u64::MAX),
            None => break,
        }
        consumer.take();
    }
    assert_eq!(consumer.fault(), None, "the survivor was led to a fault");
    frames
}

fn send(producer: &mut Producer, seed: u64, bytes: usize, point: &mut impl FnMut()) {
    let mut frame = producer.reserve(bytes).expect("room");
    point();
    let (first, second) = frame.space().split_at_mut(bytes / 2);
    Random::new(seed).fill(first);
    point();
    Random::new(!seed).fill(second);
    point();
    frame.close(bytes, 1);
    point();
}

/// One step of a producer, with a kill point after each thing that it does.
fn producing_step(ring: &TestRing, committed: &AtomicU64, mut point: impl FnMut()) {
    let mut producer = ring.producer(committed.load(Ordering::Acquire));
    point();
    send(&mut producer, 1, 100, &mut point);
    assert!(producer.mark(Mark { watermark: 77, sent_ns: 0, routing: 0 }));
    point();
    send(&mut producer, 2, 700, &mut point);
    assert!(producer.end());
    point();
    committed.store(producer.position(), Ordering::Release);
    point();
    producer.publish();
    point();
}

struct RingScene {
    ring: TestRing,
    cells: Memory,
    before: Vec<u64>,
    after: Vec<u64>,
}

impl RingScene {
    /// A ring with something in it, just before its wrap; and what it should hold after the step.
    fn new() -> Self {
        let start = 3 * 4096 - 600;
        let make = || {
            let ring = TestRing::new(4096);
            ring.scribble(&mut Random::new(9));
            ring.head().store(start, Ordering::Release);
            let mut producer = ring.producer(start);
            send(&mut producer, 3, 400, &mut || {});
            producer.publish();
            let cells = Memory::new(4096);
            cells.word(0).store(producer.position(), Ordering::Release);
            (ring, cells)
        };
        let (ring, cells) = make();
        let before = seen(&ring, start);
        producing_step(&ring, cells.word(0), || {});
        let after = seen(&ring, start);
        assert_eq!((before.len(), after.len()), (1, 5));
        let (ring, cells) = make();
        Self { ring, cells, before, after }
    }

    fn head(&self) -> u64 {
        self.ring.head().load(Ordering::Acquire)
    }

    /// What the survivor sees is a whole number of steps; and a successor publishes what was
    /// committed, or takes the step again.
    fn assert_whole(&self, at: u64) -> bool {
        let seen_now = seen(&self.ring, self.head());
        let is_after = seen_now == self.after;
        assert!(is_after || seen_now == self.before, "at {at}: {seen_now:?}");
        is_after
    }

    fn recover(&self, at: u64) {
        let was_after = self.assert_whole(at);
        let position = self.cells.word(0).load(Ordering::Acquire);
        let mut producer = self.ring.producer(position);
        assert_eq!(producer.fault(), None);
        producer.publish();
        if self.assert_whole(at) {
            return;
        }
        assert!(!was_after, "at {at}: a published step was withdrawn");
        producing_step(&self.ring, self.cells.word(0), || {});
        assert!(self.assert_whole(at), "at {at}: the step taken again is not the same");
    }
}

fn killed_producer() {
    let mut points = 0;
    producing_step(&RingScene::new().ring, RingScene::new().cells.word(0), || points += 1);
    assert!(points >= 13);
    for target in 1..=points {
        let scene = RingScene::new();
        let pid = fork(|| {
            let mut passed = 0;
            producing_step(&scene.ring, scene.cells.word(0), || {
                passed += 1;
                if passed == target {
                    die();
                }
            });
        });
        assert_killed(wait_pid(pid));
        assert_eq!(scene.assert_whole(target), target == points, "only the publish publishes");
        scene.recover(target);
    }
}

fn stepped_producer() {
    let (scene, stage) = (RingScene::new(), Stage::new());
    let mut child = Stepped::new(|| {
        stage.set(0, 1);
        producing_step(&scene.ring, scene.cells.word(0), || {});
        stage.set(0, 2);
    });
    child.step_until(&stage, 1);
    let mut published = false;
    let instructions = child.each(&stage, 2, |at| {
        let now = scene.assert_whole(at);
        assert!(now || !published, "at {at}: a published step vanished");
        published = now;
    });
    assert!(published && instructions > 200, "{instructions} instructions");
    child.kill();
    // And truly killed, at a few of them.
    for at in (0..instructions).step_by(1 + instructions as usize / 40) {
        let (scene, stage) = (RingScene::new(), Stage::new());
        let mut child = Stepped::new(|| {
            stage.set(0, 1);
            producing_step(&scene.ring, scene.cells.word(0), || {});
        });
        child.step_until(&stage, 1);
        (0..at).for_each(|_| child.step());
        child.kill();
        scene.recover(at);
    }
}

/// One step of a consumer: takes two frames, commits, releases.
fn consuming_step(scene: &RingScene, mut point: impl FnMut()) {
    let mut consumer = scene.ring.consumer(scene.head());
    point();
    consumer.look();
    point();
    for _ in 0..2 {
        assert!(consumer.frame().is_some());
        point();
        consumer.take();
        point();
    }
    scene.cells.word(0).store(consumer.position(), Ordering::Release);
    point();
    consumer.publish();
    point();
}

fn full_scene() -> RingScene {
    let scene = RingScene::new();
    producing_step(&scene.ring, scene.cells.word(0), || {});
    scene.cells.word(0).store(scene.head(), Ordering::Release);
    scene
}

/// The producer's view: nothing that was not released can be overwritten. True when it was.
fn assert_kept(scene: &RingScene, at: u64) -> bool {
    let tail = scene.ring.tail().load(Ordering::Acquire);
    let producer = scene.ring.producer(tail);
    assert_eq!(producer.fault(), None, "at {at}");
    let left = seen(&scene.ring, scene.head());
    let is_released = left == scene.after[2..];
    assert!(is_released || left == scene.after, "at {at}: {left:?}");
    assert_eq!(producer.backlog(), tail - scene.head());
    is_released
}

fn killed_consumer() {
    let mut points = 0;
    consuming_step(&full_scene(), || points += 1);
    for target in 1..=points {
        let scene = full_scene();
        let pid = fork(|| {
            let mut passed = 0;
            consuming_step(&scene, || {
                passed += 1;
                if passed == target {
                    die();
                }
            });
        });
        assert_killed(wait_pid(pid));
        assert_eq!(assert_kept(&scene, target), target == points, "only the publish releases");
        // The successor goes on from the cell: the frames again, or the ones behind them.
        let committed = scene.cells.word(0).load(Ordering::Acquire);
        let left = seen(&scene.ring, committed);
        let is_committed = target + 1 >= points;
        assert_eq!(left, scene.after[if is_committed { 2 } else { 0 }..], "killed at {target}");
    }
}

fn stepped_consumer() {
    let (scene, stage) = (full_scene(), Stage::new());
    let mut child = Stepped::new(|| {
        stage.set(0, 1);
        consuming_step(&scene, || {});
        stage.set(0, 2);
    });
    child.step_until(&stage, 1);
    let mut released = false;
    let instructions = child.each(&stage, 2, |at| {
        let now = assert_kept(&scene, at);
        assert!(now || !released, "at {at}: released frames came back");
        released = now;
    });
    assert!(released && instructions > 50, "{instructions} instructions");
    child.kill();
}

// ---- transactions -----------------------------------------------------------------------------

const LOG_WORDS: usize = 128;
const STATE_WORDS: usize = 64;

/// A log and some state, as committed before the step.
fn state_scene() -> Memory {
    let mut memory = Memory::new(4096);
    let mut random = Random::new(11);
    memory.words()[LOG_WORDS..].fill_with(|| random.next());
    memory
}

fn txn(memory: &mut Memory) -> Txn {
    Txn::on_heap(&mut memory.words()[..LOG_WORDS + STATE_WORDS], LOG_WORDS)
}

/// Writes of every size, twice to the same place, in place after `log`.
fn writes(txn: &mut Txn, point: &mut impl FnMut()) {
    let state = LOG_WORDS as u64 * 8;
    for round in 0..2u64 {
        txn.set(txn.place::<u64>(state), round);
        point();
        txn.set(txn.place::<[u8; 5]>(state + 11), [round as u8; 5]);
        point();
        txn.set(txn.place::<[u64; 7]>(state + 64), [round; 7]);
        point();
    }
    let at = txn.base().wrapping_add(state as usize + 200);
    // SAFETY: 100 bytes within the state.
    unsafe { txn.log(at, 100) };
    point();
    for byte in 0..100 {
        // SAFETY: as above.
        unsafe { at.add(byte).write_volatile(byte as u8) };
    }
    point();
}

fn writing_step(txn: &mut Txn, mut point: impl FnMut()) {
    writes(txn, &mut point);
    txn.commit();
    point();
}

/// The state as a successor finds it: rolled back, in a copy.
fn recovered(memory: &mut Memory) -> Vec<u64> {
    let mut copy = memory.words()[..LOG_WORDS + STATE_WORDS].to_vec();
    Txn::on_heap(&mut copy, LOG_WORDS).roll_back().expect("a log that can be walked");
    assert_eq!(copy[0], 0);
    copy.split_off(LOG_WORDS)
}

/// The state before and after the step.
fn before_and_after() -> [Vec<u64>; 2] {
    let mut memory = state_scene();
    let before = recovered(&mut memory);
    writing_step(&mut txn(&mut memory), || {});
    let after = recovered(&mut memory);
    assert_ne!(before, after);
    [before, after]
}

fn killed_step() {
    let [before, after] = before_and_after();
    let mut points = 0;
    writing_step(&mut txn(&mut state_scene()), || points += 1);
    for target in 1..=points {
        let mut memory = state_scene();
        let mut txn = txn(&mut memory);
        let pid = fork(|| {
            let mut passed = 0;
            writing_step(&mut txn, || {
                passed += 1;
                if passed == target {
                    die();
                }
            });
        });
        assert_killed(wait_pid(pid));
        let wanted = if target == points { &after } else { &before };
        assert_eq!(&recovered(&mut memory), wanted, "killed at {target}");
    }
}

fn stepped_step() {
    let [before, after] = before_and_after();
    let (mut memory, stage) = (state_scene(), Stage::new());
    let mut txn = txn(&mut memory);
    let mut child = Stepped::new(|| {
        stage.set(0, 1);
        writing_step(&mut txn, || {});
        stage.set(0, 2);
    });
    child.step_until(&stage, 1);
    let mut committed = false;
    let instructions = child.each(&stage, 2, |at| {
        let found = recovered(&mut memory);
        let is_after = found == after;
        assert!(is_after || found == before, "at {at}: half a step");
        assert!(is_after || !committed, "at {at}: a commit was taken back");
        committed = is_after;
    });
    assert!(committed && instructions > 300, "{instructions} instructions");
    child.kill();
}

fn stepped_rollback() {
    let [before, after] = before_and_after();
    let (mut memory, stage) = (state_scene(), Stage::new());
    writes(&mut txn(&mut memory), &mut || {});
    assert_eq!(memory.words()[LOG_WORDS..LOG_WORDS + STATE_WORDS], after, "all is written");
    let mut successor = txn(&mut memory);
    let mut child = Stepped::new(|| {
        stage.set(0, 1);
        assert_eq!(successor.roll_back(), Ok(7));
        stage.set(0, 2);
    });
    child.step_until(&stage, 1);
    let instructions = child.each(&stage, 2, |at| {
        assert_eq!(recovered(&mut memory), before, "died at {at} of a rollback");
    });
    assert!(instructions > 100, "{instructions} instructions");
    child.kill();
    assert_eq!(memory.words()[0], 0, "rolled back");
    assert_eq!(memory.words()[LOG_WORDS..LOG_WORDS + STATE_WORDS], before);
}

fn overflowing_log() {
    let mut memory = state_scene();
    let mut open = txn(&mut memory);
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let pid = fork(|| {
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: valid descriptors and a valid limit.
        unsafe {
            libc::dup2(ends[1], 2);
            libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
        }
        for index in 0..1000u64 {
            open.set(open.place::<u64>(LOG_WORDS as u64 * 8 + index % 8 * 8), index);
        }
    });
    // SAFETY: the descriptors are this function's own.
    let (mut said, mut reader) = unsafe {
        libc::close(ends[1]);
        (String::new(), std::fs::File::from_raw_fd(ends[0]))
    };
    reader.read_to_string(&mut said).expect("text");
    let status = wait_pid(pid);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
    assert!(said.contains("undo log") && said.contains("960"), "said: {said}");
    let mut random = Random::new(11);
    let wanted: Vec<u64> = (0..STATE_WORDS).map(|_| random.next()).collect();
    assert_eq!(recovered(&mut memory), wanted, "an aborted step is rolled back");
}

// ---- death and claims -------------------------------------------------------------------------

fn header() -> &'static WorkerHeader {
    Memory::new(4096).header()
}

fn words(header: &WorkerHeader) -> impl Iterator<Item = &AtomicU32> {
    header.death.iter().map(|line| &line.word).chain([&header.claim.word])
}

/// Starts a process that claims a segment and stays.
fn owner(header: &'static WorkerHeader, stage: &Stage, before: impl FnOnce()) -> libc::pid_t {
    stage.set(0, 0);
    let pid = fork(|| {
        before();
        death::claim(header, || {}).expect("a free segment");
        stage.set(0, 1);
        loop {
            // SAFETY: sleeps until killed.
            unsafe { libc::pause() };
        }
    });
    stage.wait_for(0, 1);
    pid
}

/// Sleeps on a word until its owner is dead. No time-out: what is not woken hangs, and fails.
fn sleep_until_dead(word: &AtomicU32) {
    loop {
        let value = word.load(Ordering::Acquire);
        if death::is_dead(word) {
            return;
        }
        wait::wait_any(&[WaitWord { word, value }], None);
    }
}

fn death_wakes() {
    for _ in 0..20 {
        let (header, stage) = (header(), Stage::new());
        assert!(words(header).all(|word| !death::is_dead(word) && death::owner(word) == 0));
        let pid = owner(header, &stage, || {});
        assert!(words(header).all(|word| death::owner(word) == pid as u32));
        let waiters = header.death.each_ref().map(|line| {
            fork(|| {
                stage.word(1).fetch_add(1, Ordering::AcqRel);
                sleep_until_dead(&line.word);
            })
        });
        stage.wait_for(1, waiters.len() as u64);
        assert!(words(header).all(|word| !death::is_dead(word)), "marked while it lives");
        kill(pid);
        waiters.into_iter().for_each(|waiter| assert_clean(wait_pid(waiter)));
        assert_killed(wait_pid(pid));
        assert!(words(header).all(|word| death::is_dead(word) && death::owner(word) == 0));
    }
}

fn death_before_teardown() {
    const BYTES: usize = 64 << 20;
    let (header, stage) = (header(), Stage::new());
    let pid = owner(header, &stage, || {
        std::mem::forget(std::hint::black_box(vec![1u8; BYTES]));
    });
    // SAFETY: plain system call on a child that was not waited for.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    assert!(pidfd >= 0);
    kill(pid);
    sleep_until_dead(&header.death[0].word);
    // The word does not come after the end of the process, which waits for its memory: whoever has
    // seen the end finds every word marked.
    let mut poll = libc::pollfd { fd: pidfd, events: libc::POLLIN, revents: 0 };
    // SAFETY: a valid place; the descriptor is closed once.
    unsafe {
        assert_eq!(libc::poll(&raw mut poll, 1, -1), 1);
        libc::close(pidfd);
    }
    assert!(words(header).all(death::is_dead));
    assert_killed(wait_pid(pid));
}

fn released_segment() {
    let header = header();
    for _ in 0..3 {
        let pid = fork(|| {
            death::claim(header, || {}).expect("a free segment");
            death::release(header);
        });
        assert_clean(wait_pid(pid));
        assert!(words(header).all(|word| word.load(Ordering::Acquire) == 0));
    }
}

fn one_successor() {
    const SUCCESSORS: usize = 3;
    for round in 0..100 {
        let (header, stage) = (header(), Stage::new());
        // The first round is for a segment that was never owned.
        if round > 0 {
            let pid = owner(header, &stage, || {});
            kill(pid);
            assert_killed(wait_pid(pid));
        }
        stage.set(0, 0);
        let pids: [_; SUCCESSORS] = std::array::from_fn(|index| {
            fork(|| {
                stage.word(1).fetch_add(1, Ordering::AcqRel);
                stage.wait_for(0, 1);
                let won = death::claim(header, || {}).is_ok();
                stage.set(2 + index, if won { 2 } else { 1 });
                stage.wait_for(0, 2);
            })
        });
        stage.wait_for(1, SUCCESSORS as u64);
        stage.set(0, 1);
        (0..SUCCESSORS).for_each(|index| stage.wait_for(2 + index, 1));
        let winners: Vec<usize> = (0..SUCCESSORS).filter(|i| stage.get(2 + i) == 2).collect();
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(death::owner(&header.claim.word), pids[winners[0]] as u32);
        stage.set(0, 2);
        pids.into_iter().for_each(|pid| assert_clean(wait_pid(pid)));
        // The losers' ends marked nothing of the winner's, whose own end did.
        assert!(words(header).all(death::is_dead));
    }
}

fn live_segment() {
    let (header, stage) = (header(), Stage::new());
    let pid = owner(header, &stage, || {});
    let loser = fork(|| {
        assert_eq!(death::claim(header, || {}), Err(ClaimError::Owned(pid as u32)));
    });
    assert_clean(wait_pid(loser));
    assert!(words(header).all(|word| death::owner(word) == pid as u32), "a loser's end marked it");
    kill(pid);
    assert_killed(wait_pid(pid));
}

fn killed_in_claim() {
    let header = header();
    for _ in 0..10 {
        let pid = fork(|| {
            let _ = death::claim(header, || die());
        });
        assert_killed(wait_pid(pid));
        assert!(death::is_dead(&header.claim.word), "the segment is lost for ever");
    }
    let pid = fork(|| death::claim(header, || {}).expect("the dead one's segment"));
    assert_clean(wait_pid(pid));
    assert!(words(header).all(death::is_dead));
}

/// Kills a claim after `before` instructions, or after `after` more behind its swap. True when it
/// had not finished by then.
fn kill_claim(before: Option<u64>, after: u64) -> bool {
    let (header, stage) = (header(), Stage::new());
    let mut child = Stepped::new(|| {
        stage.set(0, 1);
        death::claim(header, || stage.set(0, 2)).expect("a free segment");
        stage.set(0, 3);
        loop {
            spin_hint();
        }
    });
    child.step_until(&stage, 1);
    match before {
        Some(count) => (0..count).for_each(|_| child.step()),
        None => child.step_until(&stage, 2),
    }
    (0..after).for_each(|_| child.step());
    let is_open = stage.get(0) < 3 && before.is_none_or(|_| stage.get(0) < 2);
    child.kill();
    for (index, word) in words(header).enumerate() {
        let value = word.load(Ordering::Acquire);
        let is_settled = value == 0 || (death::is_dead(word) && death::owner(word) == 0);
        assert!(is_settled, "word {index} names a dead thread that nobody marks: {value:#x}");
    }
    let claimed = death::is_dead(&header.claim.word);
    assert!(claimed || before.is_some(), "killed {after} behind the swap, and not marked");
    is_open
}

fn stepped_claim() {
    let (mut before, mut after) = (0, 0);
    while kill_claim(Some(before), 0) {
        before += 101;
    }
    while kill_claim(None, after) {
        after += 1;
    }
    assert!(before > 100 && after > 10, "{before} before the swap, {after} behind it");
}

/// A claim that is stopped after so many instructions, while another process claims and stays. True
/// when it had won before.
fn overtake(instructions: Option<u64>) -> (bool, u64) {
    let (header, stage) = (header(), Stage::new());
    let claim = |index: usize| {
        let won = death::claim(header, || stage.set(0, 2)).is_ok();
        stage.set(index, if won { 2 } else { 1 });
        stage.wait_for(3, 1);
    };
    let mut first = Stepped::new(|| {
        stage.set(0, 1);
        claim(1);
    });
    first.step_until(&stage, 1);
    let mut done = 0;
    while stage.get(0) < 2 && instructions.is_none_or(|limit| done < limit) {
        first.step();
        done += 1;
    }
    let was_first = stage.get(0) == 2;
    let second = fork(|| claim(2));
    stage.wait_for(2, 1);
    let first = first.detach();
    stage.wait_for(1, 1);
    let won = [stage.get(1) == 2, stage.get(2) == 2];
    assert!(won[0] != won[1], "after {done} instructions both won, or none: {won:?}");
    assert_eq!(death::owner(&header.claim.word), if won[0] { first } else { second } as u32);
    stage.set(3, 1);
    [first, second].into_iter().for_each(|pid| assert_clean(wait_pid(pid)));
    (was_first, done)
}

fn overtaken_claim() {
    let (_, whole) = overtake(None);
    let mut overtaken = 0;
    for instructions in whole.saturating_sub(80)..=whole {
        let (was_first, _) = overtake(Some(instructions));
        overtaken += u64::from(!was_first);
    }
    assert!(overtaken > 20, "only {overtaken} were overtaken");
}

// ---- sleeping and waking ----------------------------------------------------------------------

/// One side of a game in which two processes answer each other's numbers: each sleeps until the
/// other has published the next one. `sleep` and `wake` are what is under test.
struct Side<'a> {
    mine: &'a AtomicU64,
    theirs: &'a AtomicU64,
    sleeping: &'a AtomicU32,
    theirs_sleeping: &'a AtomicU32,
}

impl Side<'_> {
    fn play(
        &self,
        rounds: u64,
        first: bool,
        note: impl Fn() -> u32,
        sleep: impl Fn(u32),
        wake: impl Fn(),
    ) {
        let mut random = Random::new(u64::from(first));
        for round in 1..=rounds {
            if first {
                self.publish(round, &wake);
            }
            // Sometimes the answer is there before the sleep is announced, sometimes after.
            for _ in 0..random.below(64) {
                spin_hint();
            }
            while self.theirs.load(Ordering::Acquire) < round {
                let noted = note();
                wait::announce(self.sleeping);
                if self.theirs.load(Ordering::Acquire) < round {
                    sleep(noted);
                }
                wait::awake(self.sleeping);
            }
            if !first {
                self.publish(round, &wake);
            }
        }
    }

    fn publish(&self, round: u64, wake: &impl Fn()) {
        self.mine.store(round, Ordering::Release);
        wait::publish_fence();
        if wait::must_wake(self.theirs_sleeping) {
            wake();
        }
    }
}

fn sides<'a>(stage: &'a Stage, headers: [&'a WorkerHeader; 2]) -> [Side<'a>; 2] {
    [0, 1].map(|own| Side {
        mine: stage.word(own),
        theirs: stage.word(1 - own),
        sleeping: &headers[own].sleeping,
        theirs_sleeping: &headers[1 - own].sleeping,
    })
}

fn wakes_on_words(rounds: u64) {
    if !wait::has_wait_any() {
        return; // Such a kernel uses eventfds, which the next test is about.
    }
    let (stage, headers) = (Stage::new(), [header(), header()]);
    let play = |own: usize| {
        let theirs = &headers[1 - own].bell;
        sides(&stage, headers)[own].play(
            rounds,
            own == 0,
            || theirs.load(Ordering::Acquire),
            |value| wait::wait_any(&[WaitWord { word: theirs, value }], None),
            || wait::ring_bell(&headers[own].bell),
        );
    };
    let pid = fork(|| play(1));
    play(0);
    assert_clean(wait_pid(pid));
    let rung = headers.map(|header| header.bell.load(Ordering::Relaxed));
    assert!(rung.iter().all(|rung| *rung > 0), "nobody ever slept: {rung:?}");
}

fn wakes_on_events(rounds: u64) {
    let (stage, headers) = (Stage::new(), [header(), header()]);
    // SAFETY: plain system calls.
    let events = [0, 1].map(|_| unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) });
    assert!(events.iter().all(|event| *event >= 0));
    let play = |own: usize| {
        let wake = || {
            stage.word(2 + own).fetch_add(1, Ordering::Relaxed);
            wait::wake_event(events[1 - own]);
        };
        let sleep = |_| wait::wait_event(events[own], None);
        sides(&stage, headers)[own].play(rounds, own == 0, || 0, sleep, wake);
    };
    let pid = fork(|| play(1));
    play(0);
    assert_clean(wait_pid(pid));
    assert!(stage.get(2) > 0 && stage.get(3) > 0, "nobody ever slept");
    // SAFETY: opened above, closed once.
    events.into_iter().for_each(|event| unsafe {
        libc::close(event);
    });
}
