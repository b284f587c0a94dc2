//! Every interleaving, and every reordering that the memory model allows, of the two protocols that
//! order processes without a lock: a ring's two words, and sleeping and waking.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p testudo-shm --test loom --release
//! ```
//!
//! Ring data is plain memory, which loom cannot see; so each frame has a tracked cell that is
//! written and read as its payload is, and loom reports any two accesses that nothing orders. The
//! kernel's part of a futex is a mutex and a condition variable, which is what it is.
//!
//! How to see these fail: make the store in `Producer::publish` or `Consumer::publish` relaxed
//! ("Causality violation"), or remove the fence in `wait::announce` or `wait::publish_fence`
//! ("deadlock"). The `..._is_noticed` tests do the same to copies of the protocols.

#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::{Condvar, Mutex};
use loom::thread;
use std::ptr::NonNull;
use std::sync::Arc;
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::primitive::{AtomicU32, AtomicU64, Ordering, fence, spin_hint};
use testudo_shm::producer::Producer;
use testudo_shm::ring::RingParts;
use testudo_shm::wait;

const CAPACITY: usize = 4096;

/// Two frames of this many bytes fit into the ring, a third one does not.
const BYTES: usize = 1800;

const SLOTS: usize = 2;

/// Explores with up to `LOOM_MAX_PREEMPTIONS` preemptions (3, where it is not set).
fn explore(run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(3));
    model.check(run);
}

// ---- the ring ---------------------------------------------------------------------------------

struct Shared {
    data: NonNull<u64>,
    tail: AtomicU64,
    head: AtomicU64,
    slots: [UnsafeCell<u64>; SLOTS],
}

// SAFETY: the data is accessed by the ring's protocol, which is what is being checked.
unsafe impl Send for Shared {}
// SAFETY: as above; loom checks the slots.
unsafe impl Sync for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        // Twice the capacity instead of a mirror: no test here reads what ran over the first half.
        let data = Box::leak(vec![0u64; 2 * CAPACITY / 8].into_boxed_slice());
        Arc::new(Self {
            data: NonNull::from(data).cast(),
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            slots: std::array::from_fn(|_| UnsafeCell::new(u64::MAX)),
        })
    }

    fn parts(&self) -> RingParts {
        RingParts {
            data: self.data.cast(),
            capacity: CAPACITY as u64,
            tail: NonNull::from(&self.tail),
            cut: NonNull::dangling(),
            head: NonNull::from(&self.head),
            replica_head: None,
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: leaked by `new`, freed once.
        drop(unsafe { Vec::from_raw_parts(self.data.as_ptr(), 0, 2 * CAPACITY / 8) });
    }
}

fn produce(shared: &Shared, frames: u64) {
    // SAFETY: shared outlives the producer, the only one.
    let mut producer = unsafe { Producer::attach(shared.parts(), 0) };
    for number in 0..frames {
        let mut frame = loop {
            if producer.room(BYTES) >= BYTES {
                break producer.reserve(BYTES).expect("there is room");
            }
            assert_eq!(producer.fault(), None);
            spin_hint();
        };
        // SAFETY: loom checks that nobody else accesses the slot.
        shared.slots[number as usize % SLOTS].with_mut(|slot| unsafe { *slot = number });
        frame.space()[..8].copy_from_slice(&number.to_le_bytes());
        frame.close(BYTES, 1 + number as usize);
        producer.publish();
    }
}

fn consume(shared: &Shared, frames: u64) {
    // SAFETY: shared outlives the consumer, the only one.
    let mut consumer = unsafe { Consumer::attach(shared.parts(), 0) };
    for number in 0..frames {
        while consumer.backlog() == 0 && !consumer.look() {
            assert_eq!(consumer.fault(), None);
            spin_hint();
        }
        let Some(Frame::Data { bytes, count }) = consumer.frame() else {
            panic!("frame {number} is missing: {:?}", consumer.fault());
        };
        assert_eq!((&bytes[..8], count as u64), (number.to_le_bytes().as_slice(), 1 + number));
        // SAFETY: loom checks that nobody writes the slot at the same time.
        shared.slots[number as usize % SLOTS].with(|slot| assert_eq!(unsafe { *slot }, number));
        consumer.take();
        consumer.publish();
    }
    assert!(!consumer.look());
}

#[test]
fn r9_a_frame_is_whole_when_it_is_seen_and_free_when_it_is_written_again() {
    explore(|| {
        let shared = Shared::new();
        let theirs = Arc::clone(&shared);
        let producer = thread::spawn(move || produce(&theirs, 4));
        consume(&shared, 4);
        producer.join().expect("no panic");
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_ring_word_that_is_published_without_release_is_noticed() {
    explore(|| {
        let shared = Shared::new();
        let theirs = Arc::clone(&shared);
        let producer = thread::spawn(move || {
            // SAFETY: loom checks that nobody else accesses the slot.
            theirs.slots[0].with_mut(|slot| unsafe { *slot = 1 });
            theirs.tail.store(8, Ordering::Relaxed);
        });
        if shared.tail.load(Ordering::Acquire) == 8 {
            // SAFETY: as above.
            shared.slots[0].with(|slot| assert_eq!(unsafe { *slot }, 1));
        }
        producer.join().expect("no panic");
    });
}

// ---- sleeping and waking ----------------------------------------------------------------------

/// The kernel's part of a futex: the word is compared, and the sleep begun, under a lock.
#[derive(Default)]
struct Futex {
    lock: Mutex<()>,
    woken: Condvar,
}

impl Futex {
    fn wait(&self, word: &AtomicU32, value: u32) {
        let held = self.lock.lock().expect("no panic");
        if word.load(Ordering::Relaxed) == value {
            drop(self.woken.wait(held).expect("no panic"));
        }
    }

    fn wake(&self) {
        let _held = self.lock.lock().expect("no panic");
        self.woken.notify_all();
    }
}

/// One of two workers: what it has published, its bell, and whether it sleeps.
#[derive(Default)]
struct Worker {
    published: AtomicU64,
    bell: AtomicU32,
    sleeping: AtomicU32,
    futex: Futex,
}

/// The two functions that hold a fence: the project's own, or copies with one of them missing.
#[derive(Clone, Copy)]
struct Protocol {
    announce: fn(&AtomicU32),
    publish_fence: fn(),
}

const PROTOCOL: Protocol =
    Protocol { announce: wait::announce, publish_fence: wait::publish_fence };

impl Worker {
    fn publish(&self, value: u64, peer: &Worker, protocol: Protocol) {
        self.published.store(value, Ordering::Release);
        (protocol.publish_fence)();
        if wait::must_wake(&peer.sleeping) {
            wait::ring_bell(&self.bell);
            self.futex.wake();
        }
    }

    /// As a worker waits: note the bell, announce, look again, sleep.
    fn wait_for(&self, value: u64, peer: &Worker, protocol: Protocol) {
        while peer.published.load(Ordering::Acquire) < value {
            let noted = peer.bell.load(Ordering::Acquire);
            (protocol.announce)(&self.sleeping);
            if peer.published.load(Ordering::Acquire) < value {
                peer.futex.wait(&peer.bell, noted);
            }
            wait::awake(&self.sleeping);
        }
    }
}

/// Two workers; each publishes and waits for the other's number in turn.
fn answer_each_other(protocol: Protocol) {
    explore(move || {
        let workers = Arc::new([Worker::default(), Worker::default()]);
        let theirs = Arc::clone(&workers);
        let other = thread::spawn(move || {
            let [first, second] = &*theirs;
            second.wait_for(1, first, protocol);
            second.publish(1, first, protocol);
        });
        let [first, second] = &*workers;
        first.publish(1, second, protocol);
        first.wait_for(1, second, protocol);
        other.join().expect("no panic");
    });
}

/// One worker publishes twice, the other one waits for each.
fn publish_twice(protocol: Protocol) {
    explore(move || {
        let workers = Arc::new([Worker::default(), Worker::default()]);
        let theirs = Arc::clone(&workers);
        let sleeper = thread::spawn(move || {
            let [waker, sleeper] = &*theirs;
            sleeper.wait_for(1, waker, protocol);
            sleeper.wait_for(2, waker, protocol);
        });
        let [waker, peer] = &*workers;
        waker.publish(1, peer, protocol);
        waker.publish(2, peer, protocol);
        sleeper.join().expect("no panic");
    });
}

#[test]
fn r8_no_wake_is_lost_when_two_workers_answer_each_other() {
    answer_each_other(PROTOCOL);
}

#[test]
fn r8_no_wake_is_lost_when_a_worker_publishes_twice() {
    publish_twice(PROTOCOL);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_sleeper_without_its_fence_is_noticed() {
    let announce = |sleeping: &AtomicU32| sleeping.store(1, Ordering::Relaxed);
    publish_twice(Protocol { announce, ..PROTOCOL });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_waker_without_its_fence_is_noticed() {
    publish_twice(Protocol { publish_fence: || {}, ..PROTOCOL });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_waker_with_a_weaker_fence_is_noticed() {
    publish_twice(Protocol { publish_fence: || fence(Ordering::AcqRel), ..PROTOCOL });
}
