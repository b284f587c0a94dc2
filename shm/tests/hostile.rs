//! Words that a peer, or a dead predecessor, may have left in any state: each is set to every value
//! that is known to be taken wrongly, before it is read.
//!
//! Promises: R9 (data or a fault; never a panic, a read out of bounds, an endless loop), R23 (reads
//! of what a dead process left half written end), and that a damaged log or directory is an error.

mod common;

use common::{Memory, Random, TestRing, hostile_words, must};
use testudo_shm::cell::{CellError, Cells, DIRECTORY};
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::cursor;
use testudo_shm::death::{self, ClaimError};
use testudo_shm::fault::Fault;
use testudo_shm::frame::{COUNT_MAX, Head, Kind, Mark};
use testudo_shm::header::WorkerState;
use testudo_shm::last_words::{LastWords, PAGE_BYTES};
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::record::{Batch, Record};
use testudo_shm::txn::Txn;
use testudo_shm::zerocopy::IntoBytes;

const CAPACITY: u64 = 4096;

#[testudo_shm::record(archived, crate = testudo_shm)]
enum Event {
    Tick,
    Text(String),
    Readings { of: Vec<(u32, String)>, by: Option<char>, urgent: bool },
}

fn events() -> Vec<Event> {
    let of = vec![(7, "seven".into()), (8, "a text too long to stand inline".into())];
    vec![
        Event::Readings { of, by: Some('ß'), urgent: true },
        Event::Tick,
        Event::Text("another text that is too long to stand inline".into()),
    ]
}

/// A ring whose published frames lie across the wrap: data, mark, large data, end.
struct Scene {
    ring: TestRing,
    start: u64,
    frames: Vec<u64>,
}

impl Scene {
    fn new(start: u64) -> Self {
        let ring = TestRing::new(CAPACITY as usize);
        ring.scribble(&mut Random::new(start));
        ring.head().store(start, Ordering::Relaxed);
        let mut producer = ring.producer(start);
        let mut scene = Self { start, frames: Vec::new(), ring };
        scene.send(&mut producer, 24);
        assert!(producer.mark(Mark { watermark: -1, sent_ns: 2, routing: 3 }));
        scene.send(&mut producer, 1600);
        scene.send(&mut producer, 8);
        assert!(producer.end());
        producer.publish();
        let mut consumer = scene.consumer();
        while consumer.frame().is_some() {
            scene.frames.push(consumer.position());
            consumer.take();
        }
        assert_eq!((scene.frames.len(), consumer.fault()), (5, None));
        scene
    }

    fn send(&self, producer: &mut Producer, bytes: usize) {
        let mut frame = producer.reserve(bytes).expect("room");
        frame.space().fill(0x5A);
        frame.close(bytes, bytes / 8);
    }

    fn consumer(&self) -> Consumer {
        let mut consumer = self.ring.consumer(self.start);
        consumer.look();
        consumer
    }

    /// Takes everything there is; every byte given out is read. Returns the frames taken.
    fn drain(&self, consumer: &mut Consumer) -> u64 {
        let mut frames = 0;
        loop {
            let at = consumer.position();
            let Some(frame) = consumer.frame() else { break };
            if let Frame::Data { bytes, count } = frame {
                assert!(self.ring.offset(bytes) < self.ring.capacity, "starts outside the ring");
                assert!(bytes.len() as u64 <= CAPACITY && count > 0);
                std::hint::black_box(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
                let _ = Batch::<u64>::check(bytes, count, at);
                let _ = Batch::<String>::check(bytes, count, at).map(|b| b.iter().count());
            }
            consumer.take();
            frames += 1;
            let moved = consumer.position() - self.start;
            assert!(moved <= CAPACITY && frames <= CAPACITY / 8, "more frames than bytes");
            assert!(consumer.position() > at || consumer.fault().is_some(), "stands still");
        }
        frames
    }
}

const STARTS: [u64; 5] = [0, 8, CAPACITY - 8, 3 * CAPACITY - 200, (1 << 40) + 2048];

#[test]
fn r9_no_tail_makes_a_consumer_leave_its_ring() {
    common::limit_seconds(120);
    let mut random = Random::new(1);
    for start in STARTS {
        let scene = Scene::new(start);
        let tail = scene.ring.tail().load(Ordering::Relaxed);
        for word in hostile_words(tail, &mut random).into_iter().chain([start, start + CAPACITY]) {
            // Seen before anything was looked at, and after an honest look.
            for looked in [false, true] {
                scene.ring.tail().store(tail, Ordering::Relaxed);
                let mut consumer = scene.ring.consumer(start);
                if looked {
                    assert!(consumer.look());
                }
                scene.ring.tail().store(word, Ordering::Relaxed);
                consumer.look();
                let low = if looked { tail } else { start };
                let possible = word.is_multiple_of(8) && word >= low && word <= start + CAPACITY;
                assert_eq!(consumer.fault().is_none(), possible, "tail {word} at {start}");
                if !possible {
                    let own = low;
                    let wanted = Fault::Position { found: word, own, capacity: CAPACITY };
                    assert_eq!(consumer.fault(), Some(wanted));
                    assert!(consumer.frame().is_none(), "a poisoned ring gives nothing more");
                    scene.ring.tail().store(tail, Ordering::Relaxed);
                    assert!(!consumer.look(), "the first fault latches");
                }
                scene.drain(&mut consumer);
            }
        }
    }
}

#[test]
fn r9_no_head_makes_a_producer_overwrite_what_is_not_released() {
    let mut random = Random::new(2);
    for start in STARTS {
        let scene = Scene::new(start);
        let position = scene.ring.tail().load(Ordering::Relaxed);
        for word in hostile_words(start, &mut random).into_iter().chain([position]) {
            scene.ring.head().store(start, Ordering::Relaxed);
            let mut producer = scene.ring.producer(position);
            scene.ring.head().store(word, Ordering::Relaxed);
            producer.refresh();
            let possible = word.is_multiple_of(8) && word >= start && word <= position;
            assert_eq!(producer.fault().is_none(), possible, "head {word} at {start}");
            if !possible {
                assert_eq!(producer.room(8), 0);
                assert!(producer.reserve(1).is_none() && !producer.mark(zero_mark()));
                assert!(!producer.end());
                scene.ring.head().store(start, Ordering::Relaxed);
                producer.refresh();
                assert_eq!(producer.room(8), 0, "the first fault latches");
            }
            assert_eq!(producer.position(), position);
            assert!(producer.backlog() <= CAPACITY);
        }
    }
}

fn zero_mark() -> Mark {
    Mark { watermark: 0, sent_ns: 0, routing: 0 }
}

#[test]
fn r9_a_head_that_was_impossible_when_attaching_is_a_fault() {
    let ring = TestRing::new(CAPACITY as usize);
    for (head, sound) in [(80, true), (0, true), (88, false), (79, false), (u64::MAX, false)] {
        ring.head().store(head, Ordering::Relaxed);
        assert_eq!(ring.producer(80).fault().is_none(), sound, "head {head}");
    }
}

/// Head words: every kind with the interesting counts and lengths, and every single changed bit.
fn hostile_heads(old: u64, random: &mut Random) -> Vec<u64> {
    let mut words = hostile_words(old, random);
    for kind in 0..=255u64 {
        let counts = [0, 1, 2, COUNT_MAX, 1 << 23];
        let lengths = [0, 1, 8, 16, 24, 1600, CAPACITY - 8, CAPACITY, CAPACITY + 8, 0xFFFF_FFF8];
        for count in counts {
            words.extend(lengths.map(|bytes| (kind << 56) | (count << 32) | bytes));
        }
    }
    words
}

#[test]
fn r9_no_frame_head_makes_a_consumer_panic_loop_or_leave_the_ring() {
    common::limit_seconds(120);
    let mut random = Random::new(3);
    for start in STARTS {
        let scene = Scene::new(start);
        let mut faults = 0;
        for &frame in &scene.frames {
            let old = scene.ring.data(frame).load(Ordering::Relaxed);
            for word in hostile_heads(old, &mut random) {
                scene.ring.data(frame).store(word, Ordering::Relaxed);
                let mut consumer = scene.consumer();
                scene.drain(&mut consumer);
                faults += usize::from(consumer.fault().is_some());
            }
            scene.ring.data(frame).store(old, Ordering::Relaxed);
            let mut consumer = scene.consumer();
            assert_eq!((scene.drain(&mut consumer), consumer.fault()), (5, None));
        }
        assert!(faults > 50_000, "only {faults} faults");
    }
}

#[test]
fn r9_a_head_word_is_accepted_only_if_every_part_of_it_can_be_true() {
    let mut random = Random::new(4);
    let good = Head { kind: Kind::Data, count: 3, bytes: 24 };
    assert_eq!(Head::check(good.word(), 0, 32), Ok(good));
    for kind in (0..=255u64).filter(|kind| !(1..=4).contains(kind)) {
        let fault = Fault::Kind { found: kind as u8, at: 40 };
        assert_eq!(Head::check((kind << 56) | (1 << 32) | 8, 40, 4096), Err(fault));
    }
    for published in [0, 8, 16, 24, 31] {
        let fault = Fault::FrameBytes { found: 24, published, at: 8 };
        assert_eq!(Head::check(good.word(), 8, published), Err(fault));
    }
    let refused = [
        Head { kind: Kind::Data, count: 0, bytes: 24 },
        Head { kind: Kind::Mark, count: 1, bytes: 24 },
        Head { kind: Kind::Mark, count: 0, bytes: 16 },
        Head { kind: Kind::Pad, count: 1, bytes: 8 },
        Head { kind: Kind::End, count: 0, bytes: 8 },
        Head { kind: Kind::End, count: 1, bytes: 0 },
    ];
    for head in refused {
        let fault = Fault::Count { found: head.count, bytes: head.bytes, at: 0 };
        assert_eq!(Head::check(head.word(), 0, 4096), Err(fault));
    }
    for _ in 0..100_000 {
        let (word, published) = (random.next(), random.next() >> random.below(64));
        if let Ok(head) = Head::check(word, 0, published) {
            assert!(head.bytes.is_multiple_of(8) && head.bytes + 8 <= published);
            assert_eq!(head.word(), word, "nothing in an accepted word is ignored");
        }
    }
}

#[test]
fn r9_memory_that_was_never_written_is_no_frame() {
    let ring = TestRing::new(CAPACITY as usize);
    ring.tail().store(64, Ordering::Relaxed);
    let mut consumer = ring.consumer(0);
    assert!(consumer.look());
    assert!(consumer.frame().is_none());
    assert_eq!(consumer.fault(), Some(Fault::Kind { found: 0, at: 0 }));
}

#[test]
fn r9_positions_are_compared_without_overflow() {
    for base in [0, 8, u64::MAX - 4095, u64::MAX - 7] {
        for bytes in [0, 8, 4088, 4096] {
            let ahead = base.wrapping_add(bytes);
            if ahead.is_multiple_of(8) {
                assert_eq!(cursor::distance(ahead, base, 4096), Ok(bytes));
                assert_eq!(cursor::between(ahead, base, base.wrapping_add(4096), 4096), Ok(ahead));
            }
            assert!(
                cursor::distance(ahead.wrapping_add(4096 + 8), base, 4096).is_err() || bytes > 0
            );
            assert!(cursor::distance(base.wrapping_sub(8), base, 4096).is_err());
        }
    }
}

/// Reads every byte that a view leads to; an out-of-bounds one hits a guard page.
fn read_all(view: &<Event as Record>::View) {
    std::hint::black_box(format!("{view:?}"));
    drop(std::hint::black_box(<Event as Record>::to_owned(view)));
}

/// Puts `values` as one frame at `start` and returns its payload's position and length.
fn archived_scene(ring: &TestRing, start: u64) -> (u64, u64) {
    ring.scribble(&mut Random::new(start));
    ring.head().store(start, Ordering::Relaxed);
    let mut producer = ring.producer(start);
    let mut frame = producer.reserve(400).expect("room");
    let mut used = 0;
    for event in events() {
        used += event.put(&mut frame.space()[used..]).expect("400 bytes are enough");
    }
    frame.close(used, events().len());
    producer.publish();
    (start + 8, used as u64)
}

/// Validates what stands in the ring, and a copy that ends at an unmapped page, and reads all that
/// is accepted. True when it was.
fn survives(ring: &TestRing, guard: &mut Memory, start: u64) -> bool {
    let mut consumer = ring.consumer(start);
    consumer.look();
    let Some(Frame::Data { bytes, count }) = consumer.frame() else {
        return false;
    };
    let words = guard.words();
    let copy = words.len() - bytes.len() / 8;
    words[copy..].as_mut_bytes().copy_from_slice(bytes);
    let [here, there] = [bytes, words[copy..].as_bytes()].map(|bytes| {
        let batch = Batch::<Event>::check(bytes, count, start);
        batch.map(|batch| batch.iter().for_each(|item| read_all(item.view))).is_ok()
    });
    assert_eq!(here, there, "what is valid depends on where it stands");
    here
}

#[test]
fn r9_no_byte_of_an_archived_record_makes_a_reader_leave_the_ring() {
    common::limit_seconds(120);
    let mut guard = Memory::new(4096);
    for start in [0, CAPACITY - 16, CAPACITY - 128] {
        let ring = TestRing::new(CAPACITY as usize);
        let (payload, len) = archived_scene(&ring, start);
        assert!(survives(&ring, &mut guard, start));
        let mut refused = 0;
        for at in 0..len {
            let word = ring.data((payload + at) & !7);
            let (old, shift) = (word.load(Ordering::Relaxed), 8 * (at % 8));
            let byte = (old >> shift) as u8;
            for new in [0, 1, 7, 8, 0x7F, 0x80, 0xF8, 0xFF, !byte, byte ^ 0x80]
                .into_iter()
                .chain([byte.wrapping_add(1), byte.wrapping_sub(1)])
            {
                let changed = (old & !(0xFF << shift)) | (u64::from(new) << shift);
                word.store(changed, Ordering::Relaxed);
                refused += u64::from(!survives(&ring, &mut guard, start));
            }
            word.store(old, Ordering::Relaxed);
        }
        assert!(refused > len / 2, "only {refused} changes were refused");
    }
}

#[test]
fn r9_no_word_of_an_archived_record_makes_a_reader_leave_the_ring() {
    common::limit_seconds(120);
    let (mut random, mut guard) = (Random::new(5), Memory::new(4096));
    let ring = TestRing::new(CAPACITY as usize);
    let start = CAPACITY - 128;
    let (payload, len) = archived_scene(&ring, start);
    for at in (0..len).step_by(8) {
        let word = ring.data(payload + at);
        let old = word.load(Ordering::Relaxed);
        for new in hostile_words(old, &mut random) {
            word.store(new, Ordering::Relaxed);
            survives(&ring, &mut guard, start);
        }
        word.store(old, Ordering::Relaxed);
    }
    assert!(survives(&ring, &mut guard, start));
}

#[test]
fn a_damaged_cell_directory_is_an_error_and_never_a_panic() {
    let (area, len) = (4096usize, DIRECTORY as usize + 256);
    let mut memory = vec![0u64; (area + len) / 8 + 8];
    {
        let mut txn = Txn::on_heap(&mut memory, 128);
        let cells = must(Cells::open(&mut txn, area as u64, len as u64));
        for name in ["a", "b", "c"] {
            must(cells.cell(&mut txn, name, 7u64));
        }
        txn.commit();
    }
    let mut random = Random::new(6);
    let (mut damaged, clean) = (0, memory.clone());
    let first = area / 8;
    for at in [first, first + 1, first + 8, first + 9, first + 10, first + 11, first + 12] {
        for word in hostile_words(clean[at], &mut random) {
            memory.copy_from_slice(&clean);
            memory[at] = word;
            let mut txn = Txn::on_heap(&mut memory, 128);
            let found = Cells::open(&mut txn, area as u64, len as u64).and_then(|cells| {
                for name in ["c", "b", "a", "new"] {
                    let place = cells.cell(&mut txn, name, 1u64)?.offset();
                    let low = area as u64 + DIRECTORY;
                    assert!(place >= low && place + 8 <= (area + len) as u64, "outside the area");
                }
                Ok(())
            });
            damaged += usize::from(matches!(found, Err(CellError::Damaged)));
        }
    }
    assert!(damaged > 200, "only {damaged} found");
}

#[test]
fn r11_a_damaged_log_is_an_error_and_rolls_back_in_bounds() {
    let mut memory = Memory::new(2 * 4096);
    let mut random = Random::new(7);
    let attach = |memory: &Memory| {
        // SAFETY: the first page is the log, the second the data; both live as long as the test.
        unsafe { Txn::attach(memory.base(), 2 * 4096, memory.base(), 4096, 2048) }
    };
    let mut txn = attach(&memory);
    for index in 0..8 {
        txn.set(txn.place::<u64>(4096 + index * 64), index);
        txn.set(txn.place::<[u8; 3]>(4096 + 8 + index * 64), [1; 3]);
    }
    let clean = memory.words().to_vec();
    let end = 8 + 16 * 16 / 8;
    let (mut refused, mut repeated) = (0, 0);
    for at in (0..1).chain(8..end) {
        for word in hostile_words(clean[at], &mut random) {
            memory.words().copy_from_slice(&clean);
            memory.words()[at] = word;
            let mut txn = attach(&memory);
            let done = txn.roll_back();
            if let Err(found) = done {
                refused += 1;
                assert_eq!(attach(&memory).roll_back(), Err(found), "the log was consumed");
                repeated += 1;
            } else {
                assert_eq!(memory.words()[0], 0);
            }
        }
    }
    assert!(refused > 500 && refused == repeated, "only {refused} refused");
}

#[test]
fn r9_a_position_between_two_frames_is_no_position() {
    for start in STARTS {
        let scene = Scene::new(start);
        let parts = scene.ring.parts();
        let end = scene.ring.tail().load(Ordering::Relaxed);
        for to in start..=end + 64 {
            // SAFETY: the ring is mapped, and nobody writes.
            let is_way = unsafe { parts.walk(start, to) }.is_ok();
            // Pads have no reader, but a producer may end behind one.
            let is_known = scene.frames.contains(&to) || [start, end].contains(&to);
            assert!(is_way || !is_known, "{to} is a frame's position");
            assert!(!is_way || to <= end, "{to} is behind all frames");
        }
        // SAFETY: as above.
        let is_way = |to: &u64| unsafe { parts.walk(start, *to) }.is_ok();
        let ways = (start..=end).filter(is_way).count();
        assert!(ways <= 10, "{ways} positions in five frames");
    }
}

#[test]
fn r11_a_flipped_bit_of_the_length_undoes_nothing() {
    let mut memory = Memory::new(2 * 4096);
    let attach = |memory: &Memory| {
        // SAFETY: as above.
        unsafe { Txn::attach(memory.base(), 2 * 4096, memory.base(), 4096, 2048) }
    };
    let mut txn = attach(&memory);
    for index in 0..64 {
        txn.set(txn.place::<u64>(4096 + index * 8), index + 1);
    }
    // The entries stand where they stood: their lengths are those that a rollback would believe.
    txn.commit();
    let clean = memory.words().to_vec();
    for bit in 0..64 {
        memory.words()[0] = clean[0] ^ (1 << bit);
        let mut txn = attach(&memory);
        assert_eq!(txn.roll_back(), Err(1 << bit));
        assert_eq!(memory.words()[1..], clean[1..], "bit {bit} undid something");
    }
}

#[test]
fn r23_last_words_of_any_state_are_read_in_bounds_and_in_the_end() {
    common::limit_seconds(60);
    let memory = Memory::new(PAGE_BYTES);
    // SAFETY: a page of its own; zeros are empty last words. The page ends at an unmapped one.
    let words = unsafe { testudo_shm::header::at::<LastWords>(memory.base()) };
    words.write("the reason");
    assert_eq!(words.read(), "the reason");
    let head = memory.word(0).load(Ordering::Relaxed);
    let mut random = Random::new(8);
    for word in hostile_words(head, &mut random) {
        memory.word(0).store(word, Ordering::Relaxed);
        let text = words.read();
        assert!(text.len() <= 3 * PAGE_BYTES, "{} bytes", text.len());
    }
    // Torn: the version stayed odd. Bytes that are no text do not matter either.
    memory.word(0).store((head & !0xFFFF_FFFF) | 1, Ordering::Relaxed);
    assert_eq!(words.read(), "the reason");
    memory.word(8).store(u64::MAX, Ordering::Relaxed);
    assert!(words.read().starts_with('\u{FFFD}'));
    // A successor of a torn writer is read whole again.
    words.write("second");
    assert_eq!(words.read(), "second");
    assert_eq!(memory.word(0).load(Ordering::Relaxed) & 1, 0);
    words.clear();
    assert_eq!(words.read(), "");
}

#[test]
fn r23_last_words_are_cut_at_the_end_of_their_page() {
    let memory = Memory::new(PAGE_BYTES);
    // SAFETY: as above.
    let words = unsafe { testudo_shm::header::at::<LastWords>(memory.base()) };
    words.write(&"x".repeat(3 * PAGE_BYTES));
    assert_eq!(words.read(), "x".repeat(PAGE_BYTES - 8));
    words.write(&"ß".repeat(PAGE_BYTES));
    assert!(words.read().starts_with("ßß"));
}

#[test]
fn r2_any_claim_word_is_free_dead_or_owned() {
    let memory = Memory::new(4096);
    let header = memory.header();
    let mut random = Random::new(9);
    for word in hostile_words(1234, &mut random).into_iter().map(|word| word as u32) {
        let word = if word == 0 { 5 } else { word };
        header.claim.word.store(word, Ordering::Relaxed);
        let dead = word & 0x4000_0000 != 0;
        assert_eq!(death::is_dead(&header.claim.word), dead);
        let claimed = death::claim(header, || {});
        match claimed {
            Ok(()) => assert!(dead, "word {word:#x} of a living thread was taken over"),
            Err(error) => {
                assert_eq!(error, ClaimError::Owned(word & 0x3FFF_FFFF));
                assert!(!dead, "word {word:#x} of a dead thread was not taken over");
            }
        }
        death::release(header);
    }
    assert_eq!(death::owner(&AtomicU32::new(0xC000_0007)), 7);
}

#[test]
fn a_worker_state_that_is_unknown_reads_as_attaching() {
    for state in [WorkerState::Attaching, WorkerState::Running, WorkerState::Finished] {
        assert_eq!(WorkerState::of(state as u32), state);
    }
    assert_eq!(WorkerState::of(3), WorkerState::Failed);
    for word in [4, 5, 255, 1 << 31, u32::MAX] {
        assert_eq!(WorkerState::of(word), WorkerState::Attaching);
    }
}
