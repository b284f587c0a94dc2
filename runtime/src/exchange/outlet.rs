//! The outlet: the last operator of a stage, writing records in place into one lane for each
//! consuming subtask.
//!
//! Invariants:
//! - lanes are open only within a batch: `end_batch` closes every frame, so nothing is patched
//!   after commit (R6);
//! - what does not fit is spilled, and a lane that spills takes no record and no watermark before
//!   its spill is out (R7);
//! - a lane's mark follows the records that it covers; `marked` is private and starts empty on
//!   attach, so a mark that a dead process did not get out is sent again (marks are idempotent).
//!
//! Called by the stage's last operator; consumers are an [`Intake`] in this worker or an inlet
//! behind a ring.

use super::account::Sending;
use super::route::Route;
use crate::error::Error;
use crate::operator::{Intake, Push};
use crate::plan::FRAME_BYTES;
use crate::worker::context::Cx;
use std::cell::RefCell;
use std::rc::Rc;
use testudo_shm::frame::Mark;
use testudo_shm::record::{Batch, Item, Record, Scratch};
use testudo_shm::scatter::Scatter;
use testudo_shm::spill::Spill;
use testudo_shm::txn::Place;

/// Records of one batch that an outlet wants room for.
pub(crate) const BATCH: usize = 512;

/// Bytes kept open for archived records, whose size is not known before.
const ARCHIVED_BYTES: usize = 32 << 10;

/// Bytes that an archived record is counted as when room is reported.
const ARCHIVED_GUESS: usize = 256;

/// Where a lane leads.
pub(crate) enum Lane<T: Record> {
    /// To the subtask in this worker, as its input channel number so-and-so.
    Local { intake: Rc<RefCell<dyn Intake<T>>>, channel: usize },
    /// Into the ring at this index of the context.
    Ring(usize),
}

pub struct Outlet<T: Record, R> {
    pub(crate) name: String,
    pub(crate) lanes: Vec<Lane<T>>,
    pub(crate) spills: Vec<Spill>,
    pub(crate) scatter: Scatter<T>,
    pub(crate) route: R,
    pub(crate) is_open: bool,
    pub(crate) watermark: Place<i64>,
    pub(crate) marked: Vec<i64>,
    /// See [`Cx::beginnings`].
    pub(crate) beginnings: u64,
    pub(crate) ended: Place<u64>,
    /// What was sent, dropped and handed over.
    pub(crate) account: Sending,
    /// Lanes whose open batch nobody will take: the consumer is down and its ring is full.
    pub(crate) void: Vec<bool>,
}

impl<T: Record, R: Route<T>> Outlet<T, R> {
    const BYTES: usize = match T::SIZE {
        Some(size) => BATCH * size,
        None => ARCHIVED_BYTES,
    };

    /// A ring with less room than this is full.
    const LEAST: usize = match T::SIZE {
        Some(size) => size,
        None => ARCHIVED_GUESS,
    };

    fn open(&mut self, cx: &mut Cx) {
        for lane in 0..self.lanes.len() {
            self.open_lane(cx, lane);
        }
        self.is_open = true;
    }

    #[inline]
    fn open_lane(&mut self, cx: &mut Cx, lane: usize) {
        match &self.lanes[lane] {
            Lane::Local { .. } => self.scatter.open_local(lane, Self::BYTES),
            Lane::Ring(index) => {
                let out = &mut cx.out_rings[*index];
                if out.consumer.is_some() && out.drops() && out.ring.room(Self::LEAST) < Self::LEAST
                {
                    // As fast as to the living: whoever drops waits for nothing.
                    self.void[lane] = true;
                    return self.scatter.open_local(lane, Self::BYTES);
                }
                self.scatter.open_ring(lane, &mut out.ring, Self::BYTES);
            }
        }
    }

    #[inline]
    fn close_lane(&mut self, cx: &mut Cx, lane: usize) {
        match &self.lanes[lane] {
            Lane::Local { intake, channel } => {
                let batch = self.scatter.take_local(lane);
                let mut intake = intake.borrow_mut();
                if cx.careful.is_some() {
                    intake.hands_over(*channel);
                }
                if batch.is_empty() {
                    return;
                }
                if intake.room(cx) > 0 {
                    self.account.handed_over(batch.len());
                    return intake.take_batch(cx, batch);
                }
                self.account.sent(batch.len());
                // Another way to the same consumer has just made it busy.
                for item in batch {
                    if self.spills[lane].push(&mut cx.txn, item).is_err() {
                        cx.fail(Error::job(&self.name, "the spill of a full consumer is full"));
                    }
                }
            }
            Lane::Ring(_) if std::mem::take(&mut self.void[lane]) => {
                self.account.dropped(self.scatter.take_local(lane).len());
            }
            Lane::Ring(index) => {
                let ring = &mut cx.out_rings[*index].ring;
                self.account.sent(self.scatter.close_ring(lane, ring));
            }
        }
    }

    /// As `overflow`, for a plain record. It takes a copy, so that the hot path never needs the
    /// record's address and the compiler can keep its fields in registers from the operator before
    /// to the ring.
    #[cold]
    #[inline(never)]
    fn overflow_plain(&mut self, cx: &mut Cx, lane: usize, value: T) {
        let mut unused = Scratch::default();
        self.overflow(cx, lane, value.item(&mut unused));
    }

    /// What did not fit: close the frame, try the rest of the ring, else spill.
    #[cold]
    #[inline(never)]
    fn overflow(&mut self, cx: &mut Cx, lane: usize, item: Item<'_, T>) {
        if let Lane::Ring(index) = self.lanes[lane] {
            let bytes = T::item_len(item);
            if (bytes + FRAME_BYTES) as u64 > cx.out_rings[index].ring.capacity() {
                return self.too_large(cx, bytes, index);
            }
        }
        if self.spills[lane].is_empty(&cx.txn) {
            let full = match &self.lanes[lane] {
                Lane::Local { .. } if self.scatter.pushed(lane) == 0 => true,
                Lane::Local { intake, channel } => {
                    let batch = self.scatter.take_local(lane);
                    self.account.handed_over(batch.len());
                    let mut intake = intake.borrow_mut();
                    if cx.careful.is_some() {
                        intake.hands_over(*channel);
                    }
                    intake.take_batch(cx, batch);
                    intake.room(cx) == 0
                }
                Lane::Ring(index) => {
                    let index = *index;
                    self.close_lane(cx, lane);
                    let (out, bytes) = (&mut cx.out_rings[index], T::item_len(item));
                    out.ring.room(bytes) < bytes && !out.drops()
                }
            };
            if !full {
                self.open_lane(cx, lane);
                if self.scatter.push(lane, item) {
                    return;
                }
                self.close_lane(cx, lane);
            }
        }
        if self.drops(cx, lane) {
            return self.account.dropped(1);
        }
        self.account.sent(1);
        if let Err(full) = self.spills[lane].push(&mut cx.txn, item) {
            cx.fail(Error::job(
                &self.name,
                format!(
                    "one record led to more than {} bytes for a single consumer; \
                     emit less from one record",
                    full.bytes
                ),
            ));
        }
    }

    /// Whether what does not fit into a lane is dropped.
    fn drops(&self, cx: &Cx, lane: usize) -> bool {
        match self.lanes[lane] {
            Lane::Ring(index) => cx.out_rings[index].drops(),
            Lane::Local { .. } => false,
        }
    }

    fn too_large(&self, cx: &mut Cx, bytes: usize, ring: usize) {
        let capacity = cx.out_rings[ring].ring.capacity();
        cx.fail(Error::job(
            &self.name,
            format!(
                "a record of {bytes} bytes does not fit into a ring of {capacity}; \
                 raise --ring-bytes to at least {}",
                (bytes * 2 + 256).next_power_of_two()
            ),
        ));
    }

    #[inline(always)]
    fn push_lane(&mut self, cx: &mut Cx, lane: usize, item: Item<'_, T>) {
        if !self.scatter.push(lane, item) {
            if T::SIZE.is_some() {
                self.overflow_plain(cx, lane, <T as Record>::to_owned(item.view));
            } else {
                self.overflow(cx, lane, item);
            }
        }
    }

    /// Sends marks on every lane that has none for the present watermark; true when one went out.
    fn send_marks(&mut self, cx: &mut Cx) -> bool {
        let watermark = cx.txn.get(self.watermark);
        let mut any = false;
        for lane in 0..self.lanes.len() {
            if self.marked[lane] >= watermark || !self.spills[lane].is_empty(&cx.txn) {
                continue;
            }
            match &self.lanes[lane] {
                Lane::Local { intake, channel } => {
                    intake.borrow_mut().take_watermark(cx, *channel, watermark);
                }
                Lane::Ring(index) => {
                    let mark = Mark { watermark, sent_ns: cx.now_ns, routing: 0 };
                    if !cx.out_rings[*index].ring.mark(mark) {
                        continue;
                    }
                }
            }
            self.marked[lane] = watermark;
            any = true;
        }
        any
    }

    /// Drains what was spilled; true when something moved.
    fn drain_spills(&mut self, cx: &mut Cx) -> bool {
        let mut any = false;
        for lane in 0..self.lanes.len() {
            let spill = &mut self.spills[lane];
            if spill.is_empty(&cx.txn) {
                spill.trim(&cx.txn);
                continue;
            }
            match &self.lanes[lane] {
                Lane::Ring(index) => {
                    let out = &mut cx.out_rings[*index];
                    let moved = spill.drain_into::<T>(&mut cx.txn, &mut out.ring) > 0;
                    any |= moved;
                    // What was spilled while the consumer lived holds nobody up once it is dead.
                    if !moved && out.drops() {
                        self.account.dropped_later(spill.discard::<T>(&mut cx.txn));
                        any = true;
                    }
                }
                Lane::Local { intake, channel } => {
                    let mut intake = intake.borrow_mut();
                    if cx.careful.is_some() {
                        intake.hands_over(*channel);
                    }
                    let room = intake.room(cx).min(BATCH);
                    if room > 0 {
                        let batch = spill.front::<T>(&cx.txn, room);
                        let bytes = batch.bytes().len();
                        self.account.handed_over_later(batch.len());
                        intake.take_batch(cx, batch);
                        spill.drained(&mut cx.txn, bytes);
                        any = true;
                    }
                }
            }
        }
        any
    }

    fn is_spilling(&self, cx: &Cx) -> bool {
        self.spills.iter().any(|spill| !spill.is_empty(&cx.txn))
    }
}

impl<T: Record, R: Route<T>> Push<T> for Outlet<T, R> {
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        if !self.is_open {
            self.open(cx);
        }
        if R::BROADCAST {
            for lane in 0..self.lanes.len() {
                self.push_lane(cx, lane, item);
            }
        } else {
            let lane = self.route.lane(item);
            self.push_lane(cx, lane, item);
        }
    }

    #[inline(always)]
    fn push_value(&mut self, cx: &mut Cx, value: &T) {
        if T::SIZE.is_some() {
            let mut unused = Scratch::default();
            return self.push(cx, value.item(&mut unused));
        }
        if !self.is_open {
            self.open(cx);
        }
        let lane = self.route.lane_unseen();
        if lane.is_some_and(|lane| self.scatter.push_value(lane, value)) {
            return;
        }
        let mut scratch = cx.take_scratch();
        let item = value.item(&mut scratch);
        match lane {
            Some(lane) => self.overflow(cx, lane, item),
            None => self.push(cx, item),
        }
        cx.give_scratch(scratch);
    }

    #[inline]
    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        if R::BROADCAST || T::SIZE.is_none() {
            return batch.iter().for_each(|item| self.push(cx, item));
        }
        if !self.is_open {
            self.open(cx);
        }
        let mut rest = batch;
        loop {
            let (scatter, route) = (&mut self.scatter, &mut self.route);
            let pushed = scatter.push_all(rest, |item| route.lane(item));
            let (refused, after) = rest.split_at(pushed).1.split_at(1);
            let Some(item) = refused.iter().next() else {
                return;
            };
            self.push(cx, item);
            rest = after;
        }
    }

    fn end_batch(&mut self, cx: &mut Cx) {
        if self.is_open {
            self.is_open = false;
            for lane in 0..self.lanes.len() {
                self.close_lane(cx, lane);
            }
        }
    }

    fn watermark(&mut self, cx: &mut Cx, watermark: i64) {
        if watermark > cx.txn.get(self.watermark) {
            self.end_batch(cx);
            cx.txn.set(self.watermark, watermark);
            self.send_marks(cx);
        }
    }

    fn room(&mut self, cx: &mut Cx) -> usize {
        let mut room = BATCH.min(cx.turn);
        for (lane, spill) in self.lanes.iter().zip(&self.spills) {
            if !spill.is_empty(&cx.txn) {
                return 0;
            }
            room = room.min(match lane {
                Lane::Local { intake, .. } => intake.borrow_mut().room(cx),
                Lane::Ring(index) => {
                    let out = &mut cx.out_rings[*index];
                    let room = match out.is_at_limit() {
                        true => 0,
                        false => out.ring.room(Self::BYTES) / Self::LEAST.max(1),
                    };
                    if room == 0 && out.drops() { BATCH } else { room }
                }
            });
        }
        room
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        if self.beginnings != cx.beginnings {
            self.beginnings = cx.beginnings;
            self.marked.fill(i64::MIN);
            self.route.begin_anew();
        }
        let drained = self.drain_spills(cx);
        self.send_marks(cx) | drained
    }

    fn save(&mut self, cx: &mut Cx) {
        self.account.save(cx);
    }

    fn end(&mut self, cx: &mut Cx) -> bool {
        self.end_batch(cx);
        self.send_marks(cx);
        if self.is_spilling(cx) {
            return false;
        }
        let watermark = cx.txn.get(self.watermark);
        let mut ended = cx.txn.get(self.ended) as usize;
        while ended < self.lanes.len() {
            if self.marked[ended] < watermark {
                return false;
            }
            match &self.lanes[ended] {
                Lane::Local { intake, channel } => intake.borrow_mut().take_end(cx, *channel),
                Lane::Ring(index) => {
                    if !cx.out_rings[*index].ring.end() {
                        return false;
                    }
                }
            }
            ended += 1;
            cx.txn.set(self.ended, ended as u64);
        }
        true
    }
}
