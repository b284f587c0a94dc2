//! A ring against a queue that cannot be wrong: millions of random steps, both encodings, sizes
//! from one byte to the whole ring, wraps, pads, marks, ends, partial takes and reattached ends.
//!
//! Promises: R6 (only what was published is seen, and it is never patched), R10 (every access
//! starts in the first half of the mirrored data).

mod common;

use common::{Random, TestRing};
use std::collections::VecDeque;
use std::fmt::Debug;
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::frame::Mark;
use testudo_shm::producer::Producer;
use testudo_shm::record::{Batch, Record};
use testudo_shm::scatter::Scatter;

/// Bytes that a frame may need beyond its payload: head and alignment.
const OVERHEAD: u64 = 72;

#[derive(Debug, Clone, PartialEq)]
enum Sent {
    /// Payload bytes come from this seed.
    Data {
        seed: u64,
        bytes: usize,
        count: usize,
    },
    Mark(Mark),
    End,
}

struct Model<'a> {
    ring: &'a TestRing,
    random: Random,
    producer: Producer,
    consumer: Consumer,
    /// Sent and not yet taken, oldest first; those beyond `published` are not published, and those
    /// beyond `visible` not looked at.
    sent: VecDeque<Sent>,
    published: usize,
    visible: usize,
    published_tail: u64,
    published_head: u64,
    /// Taken since the last publish of the head: they come again when the consumer is reattached.
    taken: Vec<Sent>,
    frames: u64,
}

impl<'a> Model<'a> {
    fn new(ring: &'a TestRing, seed: u64) -> Self {
        let mut random = Random::new(seed);
        ring.scribble(&mut random);
        Self {
            ring,
            random,
            producer: ring.producer(0),
            consumer: ring.consumer(0),
            sent: VecDeque::new(),
            published: 0,
            visible: 0,
            published_tail: 0,
            published_head: 0,
            taken: Vec::new(),
            frames: 0,
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        let used = self.producer.position() - self.published_head;
        self.ring.capacity as u64 - used >= bytes as u64 + OVERHEAD
    }

    fn send_data(&mut self) {
        let most = if self.random.below(64) == 0 { self.ring.capacity } else { 2048 };
        let bytes = self.random.size(most);
        let room = self.has_room(bytes);
        let Some(mut frame) = self.producer.reserve(bytes) else {
            assert!(!room, "{bytes} bytes refused although they fit");
            return;
        };
        assert!(room, "{bytes} bytes reserved beyond the room");
        assert_eq!(frame.space().len(), bytes);
        let used = if self.random.below(4) == 0 { 1 + self.random.below(bytes) } else { bytes };
        let (seed, count) = (self.random.next(), 1 + self.random.below(1000));
        Random::new(seed).fill(&mut frame.space()[..used]);
        if self.random.below(16) == 0 {
            return; // Reserved, written to, and never closed.
        }
        frame.close(used, count);
        self.sent.push_back(Sent::Data { seed, bytes: used, count });
    }

    fn send_mark(&mut self) {
        let [watermark, sent_ns, routing] = std::array::from_fn(|_| self.random.next());
        let mark = Mark { watermark: watermark as i64, sent_ns, routing };
        let room = self.has_room(size_of::<Mark>());
        assert_eq!(self.producer.mark(mark), room);
        if room {
            self.sent.push_back(Sent::Mark(mark));
        }
    }

    fn send_end(&mut self) {
        let room = self.has_room(8);
        assert_eq!(self.producer.end(), room);
        if room {
            self.sent.push_back(Sent::End);
        }
    }

    fn publish_tail(&mut self) {
        self.producer.publish();
        self.published = self.sent.len();
        self.published_tail = self.producer.position();
    }

    fn look(&mut self) {
        let any = self.consumer.look();
        self.visible = self.published;
        assert_eq!(self.consumer.backlog() == 0, !any);
        assert!(any || self.visible == 0, "published frames are not seen");
    }

    fn peek(&mut self) {
        let position = self.consumer.position();
        let Some(frame) = self.consumer.frame() else {
            assert_eq!(self.visible, 0, "a frame is missing at {position}");
            assert_eq!(self.consumer.fault(), None);
            return;
        };
        assert!(self.visible > 0, "a frame that was not published, at {position}");
        match (&self.sent[0], frame) {
            (&Sent::Data { seed, bytes, count }, Frame::Data { bytes: found, count: counted }) => {
                assert_eq!((found.len(), counted), (bytes.next_multiple_of(8), count));
                assert!(self.ring.offset(found) < self.ring.capacity, "starts in the second half");
                let line = found.as_ptr().addr() % 64;
                assert!(line == 0 || bytes < 512, "{bytes} bytes at {line} of their line");
                let mut wanted = vec![0; bytes];
                Random::new(seed).fill(&mut wanted);
                assert!(found[..bytes] == wanted, "other bytes at {position}");
            }
            (Sent::Mark(mark), Frame::Mark(found)) => assert_eq!(*mark, found),
            (Sent::End, Frame::End) => {}
            (sent, found) => panic!("sent {sent:?}, found {found:?}"),
        }
    }

    fn take(&mut self) {
        self.peek();
        self.consumer.take();
        if self.visible > 0 {
            self.taken.extend(self.sent.pop_front());
            self.published -= 1;
            self.visible -= 1;
            self.frames += 1;
        }
        assert_eq!(self.consumer.is_unpublished(), self.consumer.position() != self.published_head);
    }

    fn publish_head(&mut self) {
        self.consumer.publish();
        self.published_head = self.consumer.position();
        self.taken.clear();
        assert!(!self.consumer.is_unpublished());
    }

    /// The producer dies; its successor goes on from what was committed and published.
    fn reattach_producer(&mut self) {
        self.producer = self.ring.producer(self.published_tail);
        assert_eq!(self.producer.fault(), None);
        self.sent.truncate(self.published);
    }

    /// The consumer dies; its successor takes again what had not been released.
    fn reattach_consumer(&mut self) {
        self.consumer = self.ring.consumer(self.published_head);
        let again = self.taken.len();
        for sent in self.taken.drain(..).rev() {
            self.sent.push_front(sent);
        }
        self.published += again;
        self.visible = 0;
    }

    fn step(&mut self) {
        match self.random.below(400) {
            0..100 => self.send_data(),
            100..120 => self.send_mark(),
            120..125 => self.send_end(),
            125..190 => self.publish_tail(),
            190..240 => self.look(),
            240..260 => self.peek(),
            260..360 => self.take(),
            360..395 => self.publish_head(),
            395..398 => self.reattach_producer(),
            _ => self.reattach_consumer(),
        }
        let used = self.producer.position() - self.published_head;
        assert!(used <= self.ring.capacity as u64, "the producer overtook the consumer");
    }
}

#[test]
fn r6_a_ring_gives_what_was_published_in_order_and_nothing_else() {
    common::limit_seconds(300);
    for (seed, capacity) in [(1, 4096), (2, 8192), (3, 16 << 10), (4, 64 << 10)] {
        let ring = TestRing::new(capacity);
        let mut model = Model::new(&ring, seed);
        for _ in 0..700_000 {
            model.step();
        }
        let laps = model.published_tail / capacity as u64;
        assert!(laps > 100 && model.frames > 10_000, "{laps} laps, {} frames", model.frames);
        assert_eq!(model.consumer.fault(), None);
    }
}

/// Records through the typed layer: scatter into the ring, batches out of it, taken in part.
fn records_come_back<T>(seed: u64, capacity: usize, steps: usize, value: fn(&mut Random) -> T)
where
    T: Record + PartialEq + Debug,
{
    let ring = TestRing::new(capacity);
    let mut random = Random::new(seed);
    ring.scribble(&mut random);
    let (mut producer, mut consumer) = (ring.producer(0), ring.consumer(0));
    let mut scatter = Scatter::<T>::new(1);
    let mut sent: VecDeque<T> = VecDeque::new();
    let (mut inner, mut received, mut refused) = (0, 0u64, 0u64);
    for _ in 0..steps {
        match random.below(3) {
            0 => {
                scatter.open_ring(0, &mut producer, 1 + random.below(4000));
                let before = sent.len();
                for _ in 0..random.below(200) {
                    let value = value(&mut random);
                    if !scatter.push_value(0, &value) {
                        refused += 1;
                        break;
                    }
                    sent.push_back(value);
                }
                assert_eq!(scatter.close_ring(0, &mut producer), sent.len() - before);
                producer.publish();
            }
            1 => {
                consumer.look();
                let Some(Frame::Data { bytes, count }) = consumer.frame() else { continue };
                assert!(ring.offset(bytes) < capacity, "an access starts in the second half");
                let (_, rest) = Batch::<T>::check(bytes, count, 0).expect("sound").split_at(inner);
                let (now, later) = rest.split_at(1 + random.below(100));
                for item in now {
                    let wanted = sent.pop_front().expect("nothing beyond what was sent");
                    assert_eq!(<T as Record>::to_owned(item.view), wanted);
                    received += 1;
                }
                inner += now.len();
                if later.is_empty() {
                    inner = 0;
                    consumer.take();
                }
            }
            _ => consumer.publish(),
        }
    }
    assert_eq!((consumer.fault(), producer.fault()), (None, None));
    assert!(producer.position() > 5 * capacity as u64, "{} bytes sent", producer.position());
    assert!(received > 1000 && refused > 0, "{received} received, {refused} refused");
}

fn text(random: &mut Random) -> String {
    let len = random.below(80);
    (0..len).map(|_| char::from(b'a' + random.below(26) as u8)).collect()
}

#[test]
fn r10_plain_records_of_any_size_come_back_across_the_wrap() {
    common::limit_seconds(300);
    records_come_back::<u8>(10, 4096, 40_000, |r| r.next() as u8);
    records_come_back::<[u8; 3]>(11, 4096, 20_000, |r| {
        r.next().to_le_bytes()[..3].try_into().expect("3")
    });
    records_come_back::<u16>(12, 8192, 40_000, |r| r.next() as u16);
    records_come_back::<u32>(13, 4096, 20_000, |r| r.next() as u32);
    records_come_back::<u64>(14, 64 << 10, 50_000, Random::next);
    records_come_back::<[u64; 5]>(15, 16 << 10, 20_000, |r| std::array::from_fn(|_| r.next()));
}

#[test]
fn r10_archived_records_of_any_size_come_back_across_the_wrap() {
    common::limit_seconds(300);
    records_come_back::<String>(20, 4096, 20_000, text);
    records_come_back::<Option<u64>>(21, 8192, 20_000, |r| (r.below(2) == 0).then(|| r.next()));
    records_come_back::<(u64, String, Vec<u32>)>(22, 16 << 10, 20_000, |r| {
        let list = (0..r.below(20)).map(|_| r.next() as u32).collect();
        (r.next(), text(r), list)
    });
    records_come_back::<Vec<String>>(23, 64 << 10, 20_000, |r| {
        (0..r.below(8)).map(|_| text(r)).collect()
    });
}

#[test]
fn r6_a_frame_that_was_reserved_and_not_closed_is_never_seen() {
    let ring = TestRing::new(4096);
    let (mut producer, mut consumer) = (ring.producer(0), ring.consumer(0));
    producer.reserve(1000).expect("room").space().fill(0xAB);
    producer.publish();
    consumer.look();
    assert!(consumer.frame().is_none(), "an open frame became visible");
    assert_eq!(consumer.fault(), None);
}

#[test]
fn r5_what_is_published_after_the_look_waits_for_the_next_one() {
    let ring = TestRing::new(4096);
    let (mut producer, mut consumer) = (ring.producer(0), ring.consumer(0));
    assert!(!consumer.look());
    assert!(producer.end());
    producer.publish();
    assert!(consumer.frame().is_none(), "the tail was loaded again within the step");
    assert!(consumer.look() && consumer.frame().is_some());
}

#[test]
fn a_producer_respects_the_slower_of_consumer_and_replica() {
    let ring = TestRing::new(4096);
    let words = common::Memory::new(4096);
    let mut parts = ring.parts();
    parts.replica_head = Some(std::ptr::NonNull::from(words.word(0)));
    // SAFETY: both live to the end of the test; this is the only producer.
    let mut producer = unsafe { Producer::attach(parts, 0) };
    let frame = producer.reserve(3000).expect("an empty ring");
    frame.close(3000, 1);
    producer.publish();
    let mut consumer = ring.consumer(0);
    consumer.look();
    while consumer.frame().is_some() {
        consumer.take();
    }
    consumer.publish();
    assert!(producer.reserve(3000).is_none(), "the replica has not seen these bytes");
    words.word(0).store(consumer.position(), testudo_shm::primitive::Ordering::Release);
    assert!(producer.reserve(3000).is_some());
}

#[test]
fn r9_threads_at_both_ends_of_a_ring_see_every_frame_once_and_whole() {
    const FRAMES: u64 = 300_000;
    common::limit_seconds(300);
    let ring = TestRing::new(4096);
    let (mut producer, mut consumer) = (ring.producer(0), ring.consumer(0));
    let send = move || {
        let mut random = Random::new(7);
        for number in 0..FRAMES {
            let bytes = random.size(1024);
            let mut frame = loop {
                if producer.room(bytes) >= bytes {
                    break producer.reserve(bytes).expect("there is room");
                }
                std::thread::yield_now();
            };
            frame.space().fill(number as u8);
            frame.close(bytes, 1 + (number % 1000) as usize);
            producer.publish();
        }
        assert_eq!(producer.fault(), None);
    };
    let sender = std::thread::spawn(send);
    let mut random = Random::new(7);
    for number in 0..FRAMES {
        while consumer.backlog() == 0 && !consumer.look() {
            assert_eq!(consumer.fault(), None);
            std::thread::yield_now();
        }
        let bytes = random.size(1024);
        let Some(Frame::Data { bytes: found, count }) = consumer.frame() else {
            panic!("frame {number} is missing: {:?}", consumer.fault());
        };
        assert_eq!((found.len(), count as u64), (bytes.next_multiple_of(8), 1 + number % 1000));
        assert!(found[..bytes].iter().all(|byte| *byte == number as u8), "frame {number} is torn");
        consumer.take();
        consumer.publish();
    }
    sender.join().expect("no panic");
}
