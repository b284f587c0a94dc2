//! The inlet: the head of a stage behind an exchange. Takes frames from rings in place, and batches
//! handed over by the producer in the same worker, and keeps the watermark: the lowest of all its
//! channels.
//!
//! Invariants:
//! - a frame is taken whole or up to a record boundary; how much of it is taken is part of the
//!   position cell;
//! - a channel that ended no longer holds the watermark, nor does one whose producer is absent; the
//!   stage ends when all channels have;
//! - nothing is taken while the operators behind it have no room (R7).
//!
//! Called by the step loop (as a [`Stage`]) and by outlets of the same worker (as an [`Intake`]).

use super::absent::Absent;
use super::account::Taking;
use crate::operator::{Intake, Push, Stage};
use crate::worker::careful::Verdict;
use crate::worker::context::{CounterPlace, Cx};
use testudo_shm::consumer::Frame;
use testudo_shm::fault::Fault;
use testudo_shm::frame::HEAD;
use testudo_shm::marker::{Phase, Place as Marked};
use testudo_shm::record::{Batch, Record};
use testudo_shm::txn::Place;

/// One producer of this stage.
#[derive(Debug)]
pub struct Channel {
    /// Its ring, as an index of the context; `None` for the producer in the same worker.
    pub(crate) ring: Option<usize>,
    pub(crate) watermark: Place<i64>,
    pub(crate) ended: Place<u64>,
}

/// What was in flight on a channel when the job was stopped. It is taken before anything new.
#[derive(Debug)]
pub struct Rest {
    pub(crate) channel: Channel,
    /// The present channel that goes on where this ends.
    pub(crate) present: Option<usize>,
}

pub struct Inlet<T, N> {
    pub(crate) next: N,
    pub(crate) stage: u32,
    /// Records that were put aside.
    pub(crate) aside: Aside,
    pub(crate) channels: Vec<Channel>,
    /// Empty unless the job goes on from a checkpoint, and once all of them are taken.
    pub(crate) rests: Vec<Rest>,
    /// 1 when all rests are taken.
    pub(crate) rested: Place<u64>,
    /// Lowest watermark of all channels, as handed on.
    pub(crate) watermark: Place<i64>,
    /// 1 when everything has ended and was passed on.
    pub(crate) done: Place<u64>,
    /// Producers that hold no watermark up while they are down.
    pub(crate) absent: Absent,
    /// The account of each edge.
    pub(crate) takings: Vec<(usize, Taking)>,
    /// What is taken of rests counts as taken: it was counted when it was sent.
    pub(crate) counts_rests: bool,
    pub(crate) of: std::marker::PhantomData<fn(T)>,
}

/// Where an inlet counts what it puts aside.
#[derive(Debug)]
pub struct Aside {
    /// By the operator that it begins with.
    pub(crate) all: CounterPlace,
    /// By edge.
    pub(crate) edges: Vec<(usize, CounterPlace)>,
    /// The edge of each channel.
    pub(crate) channels: Vec<usize>,
    /// The channel that is handed over at the moment.
    pub(crate) local: usize,
}

impl Aside {
    /// Counts a record of an edge.
    fn note(&self, cx: &mut Cx, edge: Option<usize>) {
        let place = self.edges.iter().find(|(of, _)| Some(*of) == edge);
        if let Some((_, place)) = place {
            cx.count(*place, 1);
        }
    }

    /// Counts a record that is handed over.
    fn note_local(&self, cx: &mut Cx) {
        self.note(cx, self.channels.get(self.local).copied());
    }
}

impl<T: Record, N: Push<T>> Inlet<T, N> {
    fn advance_watermark(&mut self, cx: &mut Cx) {
        let (mut lowest, mut any_open) = (i64::MAX, false);
        let channels = self.channels.iter().chain(self.rests.iter().map(|rest| &rest.channel));
        for (number, channel) in channels.enumerate() {
            if cx.txn.get(channel.ended) == 0 && !self.absent.is_away(number) {
                lowest = lowest.min(cx.txn.get(channel.watermark));
                any_open = true;
            }
        }
        // Nobody is left who could say how late it is.
        if !any_open && self.absent.any_away() {
            return;
        }
        if lowest > cx.txn.get(self.watermark) {
            cx.txn.set(self.watermark, lowest);
            let marked = cx.marker.saved();
            cx.marker.set(Phase::Firing, self.stage);
            self.next.watermark(cx, lowest);
            cx.marker.restore(marked);
        }
    }

    /// Looks for producers that have been down for long enough.
    #[inline(never)]
    fn look_for_absent(&mut self, cx: &mut Cx) {
        let (channels, rings) = (&self.channels, &cx.in_rings);
        let is_empty = |channel: usize| {
            let ring = channels[channel].ring.and_then(|ring| rings[ring].ring.as_ref());
            ring.is_none_or(|ring| ring.backlog() == 0)
        };
        if self.absent.look(cx.now_ns, is_empty) {
            self.advance_watermark(cx);
        }
    }

    /// Counts what was taken from a ring.
    #[inline]
    fn note_taken(&mut self, cx: &Cx, ring: usize, records: usize) {
        let ring = &cx.in_rings[ring];
        if ring.rest.is_none() || self.counts_rests {
            let taking = self.takings.iter_mut().find(|(edge, _)| *edge == ring.edge);
            if let Some((_, taking)) = taking {
                taking.taken(records);
            }
        }
    }

    fn note_watermark(&mut self, cx: &mut Cx, channel: usize, watermark: i64) {
        let mut is_news = false;
        for place in [Some(channel), self.present(channel)].into_iter().flatten() {
            let place = self.channel(place).watermark;
            if watermark > cx.txn.get(place) {
                cx.txn.set(place, watermark);
                is_news = true;
            }
        }
        if is_news {
            self.advance_watermark(cx);
        }
    }

    fn note_end(&mut self, cx: &mut Cx, channel: usize) {
        for place in [Some(channel), self.present(channel)].into_iter().flatten() {
            cx.txn.set(self.channel(place).ended, 1);
        }
        self.advance_watermark(cx);
    }

    /// The present channel of a rest. What a rest says is noted there at once: a checkpoint knows
    /// nothing of a rest that was taken.
    fn present(&self, number: usize) -> Option<usize> {
        self.rests.get(number.checked_sub(self.channels.len())?)?.present
    }

    /// A channel by number; those of rests follow the present ones.
    fn channel(&self, number: usize) -> &Channel {
        let rest = || &self.rests[number - self.channels.len()].channel;
        self.channels.get(number).unwrap_or_else(rest)
    }

    /// Takes from rests, one after the other: a later one may go on where an earlier one ends.
    #[cold]
    fn take_rests(&mut self, cx: &mut Cx) -> usize {
        let mut work = 0;
        for number in 0..self.rests.len() {
            let Some(ring) = self.rests[number].channel.ring else { continue };
            work += self.take_ring(cx, ring, self.channels.len() + number);
            let left = cx.in_rings[ring].ring.as_ref().map_or(0, |ring| ring.backlog());
            if left > 0 || cx.failure.is_some() {
                return work;
            }
        }
        self.rests.clear();
        cx.txn.set(self.rested, 1);
        self.advance_watermark(cx);
        work + 1
    }

    fn try_end(&mut self, cx: &mut Cx) -> usize {
        let all = self.channels.iter().all(|channel| cx.txn.get(channel.ended) != 0);
        if !all || !self.rests.is_empty() || cx.txn.get(self.done) != 0 || self.next.room(cx) == 0 {
            return 0;
        }
        cx.marker.set(Phase::Firing, self.stage);
        if self.next.end(cx) {
            cx.txn.set(self.done, 1);
            return 1;
        }
        0
    }

    /// Takes frames from one ring while there is room. Returns the records taken.
    fn take_ring(&mut self, cx: &mut Cx, index: usize, channel: usize) -> usize {
        if cx.has_taken_one() {
            return 0;
        }
        let Some(mut ring) = cx.in_rings[index].ring.take() else {
            return 0;
        };
        let (mut taken, mut records_taken) = (0, 0);
        while taken < cx.turn && cx.failure.is_none() && !cx.txn.is_nearly_full() {
            let room = self.next.room(cx).min(cx.turn);
            if room == 0 {
                break;
            }
            let at = ring.position();
            let done = match ring.frame() {
                None => break,
                Some(Frame::Data { bytes, count }) => {
                    let inner = (cx.in_rings[index].inner_bytes, cx.in_rings[index].inner_count);
                    let place = Marked {
                        stage: self.stage,
                        input: index as u32,
                        from: [at, inner.1],
                        to: [at + HEAD + bytes.len() as u64, 0],
                    };
                    match self.take_data(cx, bytes, count, inner, room, &place) {
                        Ok((whole, records, inner)) => {
                            cx.in_rings[index].inner_bytes = inner.0;
                            cx.in_rings[index].inner_count = inner.1;
                            taken += records;
                            records_taken += records;
                            whole
                        }
                        Err(fault) => {
                            ring.quarantine(fault);
                            break;
                        }
                    }
                }
                Some(Frame::Mark(mark)) => {
                    self.note_watermark(cx, channel, mark.watermark);
                    taken += 1;
                    true
                }
                Some(Frame::End) => {
                    self.note_end(cx, channel);
                    taken += 1;
                    true
                }
            };
            if done {
                ring.take();
            }
        }
        cx.in_rings[index].ring = Some(ring);
        self.note_taken(cx, index, records_taken);
        taken
    }

    /// Pushes up to `room` records of a frame, of which `inner` (bytes, records) were taken before.
    /// Returns whether the frame is finished, the records pushed, and the new inner position.
    #[inline(always)]
    fn take_data(
        &mut self,
        cx: &mut Cx,
        bytes: &[u8],
        count: usize,
        inner: (u64, u64),
        room: usize,
        place: &Marked,
    ) -> Result<(bool, usize, (u64, u64)), Fault> {
        let skip = inner.0 as usize;
        let left = count.saturating_sub(inner.1 as usize);
        let rest = bytes.get(skip..).unwrap_or_default();
        let batch = checked_batch::<T>(rest, left, cx.validate)?;
        if left <= room && cx.careful.is_none() {
            cx.marker.enter(Phase::Batch, place);
            self.next.push_batch(cx, batch);
            self.next.end_batch(cx);
            return Ok((true, left, (0, 0)));
        }
        let part = first_records(batch, room);
        let used = part.bytes().len() as u64;
        let after = (inner.0 + used, inner.1 + room as u64);
        let (is_whole, after) = if left <= room { (true, (0, 0)) } else { (false, after) };
        if cx.careful.is_none() {
            cx.marker.enter(Phase::Batch, place);
        } else if self.begin_alone(cx, place, part.bytes()) == Verdict::PutAside {
            return Ok((is_whole, room.min(left), after));
        }
        self.next.push_batch(cx, part);
        if cx.careful.is_some() {
            cx.end_alone(self.stage);
        }
        self.next.end_batch(cx);
        Ok((is_whole, room.min(left), after))
    }
}

impl<T: Record, N> Inlet<T, N> {
    /// The only record of a careful step: taken, or put aside.
    #[cold]
    fn begin_alone(&self, cx: &mut Cx, place: &Marked, bytes: &[u8]) -> Verdict {
        let name = usize::try_from(place.input).ok().and_then(|ring| cx.in_rings.get(ring));
        let name = name.map_or("", |ring| &ring.name);
        let origin = format!("{name} at {}, record {}", place.from[0], place.from[1]);
        let verdict = cx.begin_alone(Phase::Record, place, origin, bytes);
        if verdict == Verdict::PutAside {
            cx.put_aside(&cx.outer_spot(), bytes, self.aside.all);
            let ring = usize::try_from(place.input).ok().and_then(|ring| cx.in_rings.get(ring));
            let edge = ring.map(|ring| ring.edge);
            self.aside.note(cx, edge);
        }
        verdict
    }
}

/// The records of a frame, validated unless the job switched that off for archived ones.
#[inline(always)]
fn checked_batch<T: Record>(
    bytes: &[u8],
    count: usize,
    validate: bool,
) -> Result<Batch<'_, T>, Fault> {
    if T::SIZE.is_some() || validate {
        Batch::check(bytes, count, 0)
    } else {
        crate::worker::trusted_batch(bytes, count)
    }
}

/// The first `count` records of a batch.
fn first_records<T: Record>(batch: Batch<'_, T>, count: usize) -> Batch<'_, T> {
    batch.split_at(count).0
}

impl<T: Record, N: Push<T>> Stage for Inlet<T, N> {
    fn run(&mut self, cx: &mut Cx) -> usize {
        cx.marker.set(Phase::Firing, self.stage);
        let mut work = usize::from(self.next.pump(cx));
        if !self.rests.is_empty() {
            return work + self.take_rests(cx);
        }
        if self.absent.is_watching() {
            self.look_for_absent(cx);
        }
        let count = self.channels.len();
        for turn in 0..count {
            let channel = (cx.rotation + turn) % count;
            if let Some(ring) = self.channels[channel].ring
                && cx.in_rings[ring].ring.as_ref().is_some_and(|ring| ring.backlog() > 0)
            {
                work += self.take_ring(cx, ring, channel);
            }
        }
        work + self.try_end(cx)
    }

    fn save(&mut self, cx: &mut Cx) {
        for (_, taking) in &mut self.takings {
            taking.save(cx);
        }
        self.next.save(cx);
    }

    fn is_done(&self, cx: &Cx) -> bool {
        cx.txn.get(self.done) != 0
    }

    fn wake_ns(&self) -> Option<u64> {
        self.absent.wake_ns()
    }
}

impl<T: Record, N: Push<T>> Intake<T> for Inlet<T, N> {
    fn room(&mut self, cx: &mut Cx) -> usize {
        if self.rests.is_empty() { self.next.room(cx) } else { 0 }
    }

    fn hands_over(&mut self, channel: usize) {
        self.aside.local = channel;
    }

    fn take_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        let marked = cx.marker.saved();
        cx.marker.within(self.stage);
        let mut part = batch;
        loop {
            let mut rest = None;
            if cx.careful.is_some() {
                let (one, others) = part.split_at(1);
                let verdict = cx.begin_inner(self.stage, one.bytes(), self.aside.all);
                if verdict == Verdict::PutAside {
                    self.aside.note_local(cx);
                }
                part = first_records(one, usize::from(verdict == Verdict::Take));
                rest = Some(others);
            }
            self.next.push_batch(cx, part);
            match rest {
                Some(others) if !others.is_empty() => part = others,
                _ => break,
            }
        }
        if cx.careful.is_some() {
            cx.end_inner(self.stage);
        }
        self.next.end_batch(cx);
        cx.marker.restore(marked);
    }

    fn take_watermark(&mut self, cx: &mut Cx, channel: usize, watermark: i64) {
        self.note_watermark(cx, channel, watermark);
    }

    fn take_end(&mut self, cx: &mut Cx, channel: usize) {
        self.note_end(cx, channel);
    }
}
