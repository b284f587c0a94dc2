//! The consuming end of a ring: look at the tail once, take frames in place, release them.
//!
//! Invariants:
//! - the tail is loaded once per step into a private copy (R5), checked, and only the copy is used
//!   (R9);
//! - a frame is checked before its payload is given out, in one pass that ends: no frame is shorter
//!   than its head;
//! - the first fault latches: a poisoned ring gives nothing more and costs nothing;
//! - payload borrows end before the head is published, since they borrow the consumer.
//!
//! The concurrent scribbler is excluded: a peer that changes bytes *after* they were checked breaks
//! the protocol, which the MMU cannot prevent in its own segment. Plain records stay memory-safe
//! even then (any bit pattern is valid).
//!
//! Called by a stage's inlet and by the supervisor's stdout.

use crate::cursor;
use crate::fault::Fault;
use crate::frame::{HEAD, Head, Kind, Mark};
use crate::primitive::{AtomicU64, Ordering, prefetch};
use crate::ring::{CutTail, RingParts};
use crate::segment::PAGE;
use std::ptr::NonNull;
use zerocopy::FromBytes;

/// Bytes of a cache line.
const LINE: usize = 64;

/// New bytes that are asked for at once; beyond that the processor has seen where it goes.
const PREFETCH_MAX: u64 = 1024;

/// Looks in vain after which the consumer waits for the producer, rather than running after it. Who
/// waits wants all lines at once; who runs after would take lines that the producer is still
/// writing.
const VAIN_MIN: u32 = 4;

/// The consuming end of one ring.
#[derive(Debug)]
pub struct Consumer {
    parts: RingParts,
    head: u64,
    tail_seen: u64,
    /// Where the frame at the head ends, once it was checked; not above the head before.
    next: u64,
    published: u64,
    /// The last head word that was sound, and what it said; the first has no frame that is so
    /// short.
    last_word: u64,
    last: Head,
    /// Looks in a row that found nothing new.
    vain: u32,
    fault: Option<Fault>,
}

// SAFETY: the pointers lead into shared mappings that live as long as the process; one thread uses
// a consumer at a time.
unsafe impl Send for Consumer {}

/// A frame at the head of a ring.
#[derive(Debug, Clone, Copy)]
pub enum Frame<'a> {
    /// `count` records in `bytes`.
    Data {
        /// Records, unchecked but for their frame.
        bytes: &'a [u8],
        /// How many there must be.
        count: usize,
    },
    /// A mark.
    Mark(Mark),
    /// The producer is done.
    End,
}

impl Consumer {
    /// Takes the consuming end at `head` (0 for a new ring, the cell's value after a crash).
    ///
    /// # Safety
    /// The parts are mapped as long as `self` lives, the head word writable; no other live
    /// consumer takes this ring.
    #[must_use]
    pub unsafe fn attach(parts: RingParts, head: u64) -> Self {
        let last = Head { kind: Kind::Pad, count: 0, bytes: u64::MAX - HEAD };
        Self {
            parts,
            head,
            tail_seen: head,
            next: head,
            published: head,
            last_word: 0,
            last,
            vain: 0,
            fault: None,
        }
    }

    fn word(&self, at: NonNull<AtomicU64>) -> &AtomicU64 {
        // SAFETY: `attach` promised that the words stay mapped.
        unsafe { at.as_ref() }
    }

    /// Position of the next frame: what the step's cell must say at commit.
    #[inline(always)]
    #[must_use]
    pub fn position(&self) -> u64 {
        self.head
    }

    /// What was found wrong with this ring, once anything was.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// Latches a fault that was found in a payload.
    pub fn quarantine(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
        self.tail_seen = self.head;
        self.next = self.head;
    }

    /// Loads the producer's tail: true when there is something to take. Once per step, before the
    /// control word (R5).
    #[inline(always)]
    pub fn look(&mut self) -> bool {
        // SYNC ring-tail: pairs with the release store in Producer::publish; bytes before it are
        // readable.
        let tail = self.word(self.parts.tail).load(Ordering::Acquire);
        if tail == self.tail_seen {
            self.vain = self.vain.saturating_add(1);
        } else {
            self.moved_to(tail);
            self.vain = 0;
        }
        self.tail_seen != self.head
    }

    /// Believes a new tail, if it can be true: not before the last one, at most a capacity from the
    /// head.
    #[inline(always)]
    fn moved_to(&mut self, tail: u64) {
        if self.fault.is_some() {
            return;
        }
        let (seen, capacity) = (self.tail_seen, self.parts.capacity);
        match cursor::between(tail, seen, self.head.wrapping_add(capacity), capacity) {
            Ok(tail) => {
                self.tail_seen = tail;
                if self.vain >= VAIN_MIN {
                    self.prefetch(seen, tail - seen);
                }
            }
            Err(_) => self.quarantine(Fault::Position { found: tail, own: seen, capacity }),
        }
    }

    /// As [`Consumer::look`], as a replica: the tail as its worker found it.
    pub fn look_to(&mut self, tail: u64) {
        self.moved_to(tail);
    }

    /// Asks for what is new, all lines at once: a load at a time would wait for one after the
    /// other.
    #[inline(always)]
    fn prefetch(&self, from: u64, bytes: u64) {
        let first = (from & (self.parts.capacity - 1)) as usize;
        let bytes = bytes.min(PREFETCH_MAX) as usize;
        for offset in (0..bytes + LINE - 1).step_by(LINE) {
            prefetch(self.parts.data.as_ptr().wrapping_add(first + offset));
        }
    }

    /// Published bytes not yet taken, as of the last look.
    #[inline(always)]
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.tail_seen - self.head
    }

    /// The frame at the head, skipping pads; `None` when everything looked at is taken (or the ring
    /// is quarantined).
    #[inline(always)]
    pub fn frame(&mut self) -> Option<Frame<'_>> {
        loop {
            if self.tail_seen == self.head {
                return None;
            }
            if !self.check_head() {
                return None;
            }
            let head = self.last;
            self.next = self.head + HEAD + head.bytes;
            let at = (self.head + HEAD) & (self.parts.capacity - 1);
            // SAFETY: the check says that bytes..tail are published and at most a capacity long:
            // contiguous through the mirror, and not written again before the head passes them.
            let bytes = unsafe {
                std::slice::from_raw_parts(
                    self.parts.data.as_ptr().add(at as usize),
                    head.bytes as usize,
                )
            };
            match head.kind {
                Kind::Pad => self.head = self.next,
                Kind::Data => return Some(Frame::Data { bytes, count: head.count as usize }),
                Kind::End => return Some(Frame::End),
                Kind::Mark => match Mark::read_from_bytes(bytes) {
                    Ok(mark) => return Some(Frame::Mark(mark)),
                    Err(_) => return None,
                },
            }
        }
    }

    /// Reads the head word of the next frame, once, and checks it; what it says is in `last` then.
    /// A word that equals the last one was checked with that, but for its length: so frame follows
    /// frame without waiting for the words in between. False after a fault.
    #[inline(always)]
    fn check_head(&mut self) -> bool {
        let at = self.head & (self.parts.capacity - 1);
        // SAFETY: masked, 8-aligned, inside the mirrored data; published bytes are no longer
        // written by the producer.
        let word = unsafe { self.parts.data.as_ptr().add(at as usize).cast::<u64>().read() };
        let published = self.tail_seen - self.head;
        (word == self.last_word && self.last.bytes + HEAD <= published)
            || self.check_new(word, published)
    }

    #[inline(never)]
    fn check_new(&mut self, word: u64, published: u64) -> bool {
        match Head::check(word, self.head, published) {
            Ok(head) => (self.last_word, self.last) = (word, head),
            Err(fault) => self.quarantine(fault),
        }
        self.fault.is_none()
    }

    /// Takes the frame at the head: it must be released by `publish` before the producer reuses it.
    #[inline(always)]
    pub fn take(&mut self) {
        // What `frame` has checked is not read again (R9).
        if self.next > self.head {
            self.head = self.next;
        } else if self.tail_seen != self.head && self.check_head() {
            self.head += HEAD + self.last.bytes;
        }
    }

    /// Gives everything before `position` back to the producer. Only after the step has committed.
    #[inline(always)]
    pub fn publish(&mut self) {
        // SYNC ring-head: pairs with the acquire load in Producer::refresh; we no longer read
        // before it.
        self.word(self.parts.head).store(self.head, Ordering::Release);
        self.published = self.head;
    }

    /// As [`Consumer::publish`], as far as `limit`: somebody else has not read what follows. True
    /// when that is further than before.
    #[inline]
    pub fn publish_to(&mut self, limit: u64) -> bool {
        let to = self.head.min(limit);
        let is_news = to > self.published;
        if is_news {
            // SYNC ring-head: as in `publish`.
            self.word(self.parts.head).store(to, Ordering::Release);
            self.published = to;
        }
        is_news
    }

    /// Where the producer's tail stood at its cut `epoch`; `None` before it has made that cut. What
    /// cannot be true quarantines the ring (R9).
    pub fn cut_tail(&mut self, epoch: u64) -> Option<u64> {
        // SAFETY: beside the tail word, which `attach` promised to stay mapped.
        let cut = unsafe { self.parts.cut.as_ref() };
        // SYNC cut-tail: pairs with the release store in Producer::note_cut.
        if cut.epoch.load(Ordering::Acquire) != epoch {
            return None;
        }
        let tail = cut.tail.load(Ordering::Relaxed);
        let (own, capacity) = (self.published, self.parts.capacity);
        if tail < own || tail - own > capacity {
            self.quarantine(Fault::Position { found: tail, own, capacity });
            return None;
        }
        Some(tail)
    }

    /// Position up to which the producer has published, as of the last look.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.tail_seen
    }

    /// Position that was last given back to the producer: bytes from there on stand still.
    #[must_use]
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Bytes of the ring that stand still: published by the producer and not given back. Contents
    /// are the producer's word.
    ///
    /// # Panics
    /// When the range begins before what was given back or is longer than the ring.
    #[must_use]
    pub fn held(&self, from: u64, bytes: usize) -> &[u8] {
        let (own, capacity) = (self.published, self.parts.capacity);
        assert!(from >= own && from - own + bytes as u64 <= capacity, "bytes that were given back");
        let at = (from & (capacity - 1)) as usize;
        // SAFETY: masked, contiguous through the mirror; the producer does not write here before
        // the head is published.
        unsafe { std::slice::from_raw_parts(self.parts.data.as_ptr().add(at), bytes) }
    }

    /// A consumer of frames that lie in private memory: what was in flight at a cut. The memory
    /// stays for the rest of the process.
    #[must_use]
    pub fn over(frames: &[u8], head: u64) -> Self {
        let capacity = frames.len().max(PAGE).next_power_of_two();
        let data = NonNull::from(Box::leak(vec![0u64; capacity / 8].into_boxed_slice())).cast();
        // SAFETY: capacity >= frames.len(); the memory was allocated just now.
        unsafe { std::ptr::copy_nonoverlapping(frames.as_ptr(), data.as_ptr(), frames.len()) };
        let word = |value: u64| NonNull::from(Box::leak(Box::new(AtomicU64::new(value))));
        let cut = CutTail { epoch: AtomicU64::new(0), tail: AtomicU64::new(0) };
        let parts = RingParts {
            data,
            capacity: capacity as u64,
            tail: word(frames.len() as u64),
            head: word(head),
            cut: NonNull::from(Box::leak(Box::new(cut))),
            replica_head: None,
        };
        // SAFETY: all parts live for the rest of the process, and nobody else has them. Frames end
        // within the data, so no access runs over its end.
        unsafe { Self::attach(parts, head) }
    }

    /// True when something was taken since the last publish.
    #[inline(always)]
    #[must_use]
    pub fn is_unpublished(&self) -> bool {
        self.published != self.head
    }
}
