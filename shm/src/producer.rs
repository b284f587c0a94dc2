//! The producing end of a ring: reserve, write in place, close a frame, publish.
//!
//! Invariants:
//! - `position` is private truth; the published tail follows it, only at `publish` (after commit);
//! - nothing before the published tail is ever patched (R6): frames are closed before the step
//!   commits;
//! - the consumer's head is loaded once into a local and checked before it is believed (R9); a
//!   wrong one latches.
//!
//! Called by the exchange (through `scatter`), by the spill and by the supervisor's stdin.

use crate::cursor;
use crate::fault::Fault;
use crate::frame::{COUNT_MAX, HEAD, Head, Kind, Mark};
use crate::primitive::{AtomicU64, Ordering};
use crate::ring::RingParts;
use std::ptr::NonNull;
use zerocopy::IntoBytes;

/// Payloads of at least this many bytes start on a cache line.
const ALIGN_FROM: usize = 512;

/// What a frame takes besides its payload, at most: its head, and the pad before a large one.
const OVERHEAD: u64 = HEAD + 64;

/// The producing end of one ring.
#[derive(Debug)]
pub struct Producer {
    parts: RingParts,
    position: u64,
    head_seen: u64,
    /// Where the free bytes end: `head_seen + capacity`, or `position` after a fault, so that one
    /// comparison says whether a frame fits.
    free_to: u64,
    fault: Option<Fault>,
    heads: Heads,
}

/// Where the consumer's head is learned from.
#[derive(Debug)]
enum Heads {
    /// Where the consumer publishes it.
    Live,
    /// There as well; what was found is kept for a replica.
    Noted(Vec<u64>),
    /// This is a replica: from what its worker found.
    Told { heads: Vec<u64>, next: usize, is_short: bool },
}

// SAFETY: the pointers lead into shared mappings that live as long as the process; one thread uses
// a producer at a time.
unsafe impl Send for Producer {}

impl Producer {
    /// Takes the producing end at `position` (0 for a new ring, the cell's value after a crash).
    ///
    /// # Safety
    /// The parts stay mapped until the process ends, data and tail writable; no other live
    /// producer writes this ring.
    #[must_use]
    pub unsafe fn attach(parts: RingParts, position: u64) -> Self {
        let head_seen = position.saturating_sub(parts.capacity);
        let (fault, heads) = (None, Heads::Live);
        let mut this = Self { parts, position, head_seen, free_to: position, fault, heads };
        this.refresh();
        this
    }

    /// As [`Producer::attach`], as a replica: the consumer is not looked at, and is never right
    /// here. Nothing fits before [`Producer::tell_heads`].
    ///
    /// # Safety
    /// As [`Producer::attach`].
    #[must_use]
    pub unsafe fn attach_as_replica(parts: RingParts, position: u64) -> Self {
        let head_seen = position.saturating_sub(parts.capacity);
        let heads = Heads::Told { heads: Vec::new(), next: 0, is_short: false };
        Self { parts, position, head_seen, free_to: position, fault: None, heads }
    }

    fn word(&self, at: NonNull<AtomicU64>) -> &AtomicU64 {
        // SAFETY: `attach` promised that the words stay mapped.
        unsafe { at.as_ref() }
    }

    /// Position behind the last closed frame: what the step's cell must say at commit.
    #[inline(always)]
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of ring.
    #[inline(always)]
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.parts.capacity
    }

    /// What was found wrong with the consumer's words, once anything was.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// Looks at the consumer's head again.
    #[inline(never)]
    pub fn refresh(&mut self) {
        if self.fault.is_some() {
            return;
        }
        let head = match &mut self.heads {
            Heads::Live => self.load_head(),
            Heads::Noted(_) => {
                let head = self.load_head();
                if let Heads::Noted(heads) = &mut self.heads {
                    heads.push(head);
                }
                head
            }
            Heads::Told { heads, next, is_short } => {
                let told = heads.get(*next).copied();
                *next += 1;
                *is_short |= told.is_none();
                told.unwrap_or(self.head_seen)
            }
        };
        self.believe(head);
    }

    fn load_head(&self) -> u64 {
        // SYNC ring-head: pairs with the release store in Consumer::publish; the space behind it is
        // free.
        let head = self.word(self.parts.head).load(Ordering::Acquire);
        let Some(replica) = self.parts.replica_head else {
            return head;
        };
        let other = self.word(replica).load(Ordering::Acquire);
        let is_behind = self.position.wrapping_sub(other) > self.position.wrapping_sub(head);
        if is_behind { other } else { head }
    }

    fn believe(&mut self, head: u64) {
        match cursor::between(head, self.head_seen, self.position, self.parts.capacity) {
            Ok(head) => {
                self.head_seen = head;
                self.free_to = head + self.parts.capacity;
            }
            Err(fault) => {
                self.fault = Some(fault);
                self.free_to = self.position;
            }
        }
    }

    /// Begins to keep what is learned of the consumer's head, or begins again: gives what is known
    /// at this moment.
    #[inline]
    pub fn note_heads(&mut self) -> u64 {
        match &mut self.heads {
            Heads::Noted(heads) => heads.clear(),
            other => *other = Heads::Noted(Vec::new()),
        }
        self.head_seen
    }

    /// What was learned since [`Producer::note_heads`], in order.
    #[must_use]
    pub fn noted_heads(&self) -> &[u64] {
        if let Heads::Noted(heads) = &self.heads { heads } else { &[] }
    }

    /// Keeps nothing any more.
    pub fn forget_heads(&mut self) {
        self.heads = Heads::Live;
    }

    /// As a replica: the consumer's head as the worker knew it when a step began, and what it
    /// learned in it. The consumer itself is not asked from here on.
    pub fn tell_heads(&mut self, seen: u64, learned: impl Iterator<Item = u64>) {
        let mut heads = match std::mem::replace(&mut self.heads, Heads::Live) {
            Heads::Told { heads, .. } => heads,
            _ => Vec::new(),
        };
        heads.clear();
        heads.extend(learned);
        self.heads = Heads::Told { heads, next: 0, is_short: false };
        if self.fault.is_none() && self.position.wrapping_sub(seen) <= self.parts.capacity {
            self.head_seen = seen;
            self.free_to = seen + self.parts.capacity;
        }
    }

    /// As a replica: whether exactly what was told was asked for.
    #[must_use]
    pub fn has_asked_for_all(&self) -> bool {
        match &self.heads {
            Heads::Told { heads, next, is_short } => *next == heads.len() && !is_short,
            _ => true,
        }
    }

    /// Says where the tail stands at a cut. Between steps, when everything committed is published.
    pub fn note_cut(&mut self, epoch: u64) {
        // SAFETY: beside the tail word, which `attach` promised to stay mapped writable.
        let cut = unsafe { self.parts.cut.as_ref() };
        cut.tail.store(self.position, Ordering::Relaxed);
        // SYNC cut-tail: pairs with the acquire load in Consumer::cut_tail.
        cut.epoch.store(epoch, Ordering::Release);
    }

    /// Bytes that the consumer has not released, as last seen.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.position - self.head_seen
    }

    #[inline(always)]
    fn free(&self) -> u64 {
        self.free_to - self.position
    }

    /// Whether a frame with so much payload fits, asking the consumer only when it does not seem
    /// to.
    #[inline(always)]
    fn fits(&mut self, bytes: usize) -> bool {
        let need = bytes as u64 + OVERHEAD;
        self.free() >= need || {
            self.refresh();
            self.free() >= need
        }
    }

    /// Payload bytes that one data frame can take now: at least `want` if the ring has them. 0
    /// after a fault.
    #[inline(always)]
    pub fn room(&mut self, want: usize) -> usize {
        self.fits(want);
        self.free().saturating_sub(OVERHEAD) as usize
    }

    /// The place of the next data frame's payload, for up to `bytes` bytes; `bytes <= room(bytes)`
    /// was checked before. Large payloads are brought to a cache line by a pad frame.
    #[inline(always)]
    pub(crate) fn open(&mut self, bytes: usize) -> NonNull<u8> {
        if bytes >= ALIGN_FROM {
            self.pad();
        }
        let at = (self.position + HEAD) & (self.parts.capacity - 1);
        // SAFETY: masked positions lie in the first half of the mirrored data.
        unsafe { NonNull::new_unchecked(self.data_at(at)) }
    }

    #[inline(always)]
    fn data_at(&self, masked: u64) -> *mut u8 {
        // SAFETY: callers mask with capacity - 1.
        unsafe { self.parts.data.as_ptr().add(masked as usize) }
    }

    fn pad(&mut self) {
        let payload = (self.position + HEAD) % 64;
        if payload != 0 {
            let bytes = (64 - (payload + HEAD) % 64) % 64;
            self.head_word(Head { kind: Kind::Pad, count: 0, bytes });
            self.position += HEAD + bytes;
        }
    }

    #[inline(always)]
    fn head_word(&mut self, head: Head) {
        let at = self.data_at(self.position & (self.parts.capacity - 1));
        // SAFETY: positions are multiples of eight, and the space was reserved.
        unsafe { at.cast::<u64>().write(head.word()) };
    }

    /// Closes the open data frame: `bytes` (a multiple of eight after padding) and `count` records.
    /// Nothing if empty.
    #[inline(always)]
    pub(crate) fn close(&mut self, bytes: usize, count: usize) {
        if count == 0 {
            return;
        }
        assert!(count as u64 <= COUNT_MAX, "a frame of {count} records");
        debug_assert!(
            self.fault.is_some() || bytes as u64 + HEAD <= self.free(),
            "frame past its room"
        );
        let padded = (bytes as u64 + 7) & !7;
        self.head_word(Head { kind: Kind::Data, count: count as u64, bytes: padded });
        self.position += HEAD + padded;
    }

    /// Reserves `bytes` of payload in place; `None` when the ring has no room for them.
    ///
    /// ```text
    /// if let Some(mut frame) = producer.reserve(4096) {
    ///     let n = value.put(frame.space());
    ///     frame.close(n, 1);
    /// }
    /// ```
    pub fn reserve(&mut self, bytes: usize) -> Option<Reserved<'_>> {
        if !self.fits(bytes) {
            return None;
        }
        let at = self.open(bytes);
        Some(Reserved { producer: self, at, bytes })
    }

    /// Sends a mark; false when the ring has no room.
    pub fn mark(&mut self, mark: Mark) -> bool {
        let bytes = size_of::<Mark>() as u64;
        if !self.fits(bytes as usize) {
            return false;
        }
        self.head_word(Head { kind: Kind::Mark, count: 0, bytes });
        let at = self.data_at((self.position + HEAD) & (self.parts.capacity - 1));
        // SAFETY: `room` says that the bytes are free; the mirrored mapping makes them contiguous.
        unsafe { std::ptr::copy_nonoverlapping(mark.as_bytes().as_ptr(), at, bytes as usize) };
        self.position += HEAD + bytes;
        true
    }

    /// Says that nothing follows; false when the ring has no room.
    pub fn end(&mut self) -> bool {
        if !self.fits(8) {
            return false;
        }
        self.head_word(Head { kind: Kind::End, count: 0, bytes: 0 });
        self.position += HEAD;
        true
    }

    /// Makes everything up to `position` visible. Only after the step has committed.
    #[inline(always)]
    pub fn publish(&mut self) {
        // SYNC ring-tail: pairs with the acquire load in Consumer::look; all bytes before it are
        // written.
        self.word(self.parts.tail).store(self.position, Ordering::Release);
    }
}

/// Reserved payload of a frame that is being written.
#[derive(Debug)]
pub struct Reserved<'a> {
    producer: &'a mut Producer,
    at: NonNull<u8>,
    bytes: usize,
}

impl Reserved<'_> {
    /// The place to write to.
    #[inline(always)]
    pub fn space(&mut self) -> &mut [u8] {
        // SAFETY: reserved bytes are free, contiguous through the mirror, and only this borrow can
        // reach them.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }

    /// Closes the frame: the first `bytes` hold `count` records.
    #[inline(always)]
    pub fn close(self, bytes: usize, count: usize) {
        assert!(bytes <= self.bytes, "closed {bytes} of {} reserved bytes", self.bytes);
        self.producer.close(bytes, count);
    }
}
