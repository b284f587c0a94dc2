//! Scatter: one stream of records written in place into several destinations, without a branch per
//! destination.
//!
//! Each lane is a run of reserved bytes: in a ring, or in a private buffer for the destination in
//! the same process. A push writes at the lane's cursor and moves it. Frames are closed at the end
//! of the batch (R6).
//!
//! Invariants: a lane's cursor never passes its end; lanes are only open between `begin` and `end`
//! of one batch, while nothing else touches their producers.
//!
//! Called by the exchange.

use crate::producer::Producer;
use crate::record::{Batch, Item, Record};

#[derive(Debug, Clone, Copy)]
struct Lane {
    cursor: *mut u8,
    end: *mut u8,
    start: *mut u8,
    count: usize,
}

const CLOSED: Lane = Lane {
    cursor: std::ptr::null_mut(),
    end: std::ptr::null_mut(),
    start: std::ptr::null_mut(),
    count: 0,
};

/// The open destinations of one exchange.
#[derive(Debug)]
pub struct Scatter<T: Record> {
    lanes: Vec<Lane>,
    /// Private memory of local lanes; resized only while the lane is closed, so cursors stay valid.
    buffers: Vec<Vec<u64>>,
    of: std::marker::PhantomData<fn() -> T>,
}

impl<T: Record> Scatter<T> {
    /// `lanes` destinations, all closed: nothing fits into them.
    #[must_use]
    pub fn new(lanes: usize) -> Self {
        Self {
            lanes: vec![CLOSED; lanes],
            buffers: vec![Vec::new(); lanes],
            of: std::marker::PhantomData,
        }
    }

    /// Opens a lane on a private buffer of `bytes`, for the destination in this process.
    pub fn open_local(&mut self, lane: usize, bytes: usize) {
        let buffer = &mut self.buffers[lane];
        if buffer.len() * 8 < bytes {
            buffer.resize(bytes.div_ceil(8), 0);
        }
        let start = buffer.as_mut_ptr().cast::<u8>();
        self.lanes[lane] = Lane { cursor: start, start, end: start.wrapping_add(bytes), count: 0 };
    }

    /// Opens a lane in place in a ring, for up to `bytes` (what the ring has, when that is less).
    /// Until [`Scatter::close_ring`] nothing else may be sent on this producer, or the frame is
    /// garbage.
    pub fn open_ring(&mut self, lane: usize, producer: &mut Producer, bytes: usize) {
        let bytes = producer.room(bytes).min(bytes) & !7;
        let start = producer.open(bytes).as_ptr();
        self.lanes[lane] = Lane { cursor: start, start, end: start.wrapping_add(bytes), count: 0 };
    }

    /// Appends an item; false when it does not fit.
    #[inline(always)]
    #[must_use]
    pub fn push(&mut self, lane: usize, item: Item<'_, T>) -> bool {
        push_to(&mut self.lanes[lane], item)
    }

    /// Appends the items of a batch, each to the lane that `lane_of` gives, up to the first that
    /// does not fit. Returns how many were appended.
    #[inline(always)]
    pub fn push_all(
        &mut self,
        batch: Batch<'_, T>,
        mut lane_of: impl FnMut(Item<'_, T>) -> usize,
    ) -> usize {
        let lanes = self.lanes.as_mut_slice();
        for (index, item) in batch.iter().enumerate() {
            if !push_to(&mut lanes[lane_of(item)], item) {
                return index;
            }
        }
        batch.len()
    }

    /// Appends an owned value, encoding it in place; false when it does not fit.
    #[inline(always)]
    #[must_use]
    pub fn push_value(&mut self, lane: usize, value: &T) -> bool {
        let lane = &mut self.lanes[lane];
        let left = lane.end.addr() - lane.cursor.addr();
        // SAFETY: cursor..end was reserved by `open_*` and nothing else touches it while the lane
        // is open.
        let space = unsafe { free_bytes(lane, left) };
        value.put(space).is_some_and(|used| lane.advance(used))
    }

    /// Closes a lane that was opened in a ring: what was pushed becomes a frame. Returns the number
    /// of records.
    pub fn close_ring(&mut self, lane: usize, producer: &mut Producer) -> usize {
        let (bytes, count) = self.lanes[lane].extent::<T>();
        producer.close(bytes, count);
        self.lanes[lane] = CLOSED;
        count
    }

    /// Closes a local lane and gives what was pushed.
    pub fn take_local(&mut self, lane: usize) -> Batch<'_, T> {
        let (bytes, count) = self.lanes[lane].extent::<T>();
        self.lanes[lane] = CLOSED;
        let bytes = &zerocopy::IntoBytes::as_bytes(self.buffers[lane].as_slice())[..bytes];
        // SAFETY: these records were encoded by `push`.
        unsafe { Batch::trusted(bytes, count) }
    }

    /// Records pushed into a lane since it was opened.
    #[must_use]
    pub fn pushed(&self, lane: usize) -> usize {
        self.lanes[lane].extent::<T>().1
    }
}

/// Appends an item at a lane's cursor; false when it does not fit.
#[inline(always)]
fn push_to<T: Record>(lane: &mut Lane, item: Item<'_, T>) -> bool {
    let left = lane.end.addr() - lane.cursor.addr();
    if let Some(size) = T::SIZE {
        if left < size {
            return false;
        }
        let from = std::ptr::from_ref(item.view).cast::<u8>();
        // SAFETY: the lane has room for `size` bytes, and a plain record's view is exactly that
        // many.
        unsafe { std::ptr::copy_nonoverlapping(from, lane.cursor, size) };
        lane.cursor = lane.cursor.wrapping_add(size);
        return true;
    }
    // SAFETY: cursor..end was reserved by `open_*` and nothing else touches it while the lane is
    // open.
    let space = unsafe { free_bytes(lane, left) };
    T::put_item(item, space).is_some_and(|used| lane.advance(used))
}

impl Lane {
    #[inline(always)]
    fn advance(&mut self, used: usize) -> bool {
        self.cursor = self.cursor.wrapping_add(used);
        self.count += 1;
        true
    }

    /// Bytes and records written so far; plain records are counted by their size.
    fn extent<T: Record>(&self) -> (usize, usize) {
        let bytes = self.cursor.addr() - self.start.addr();
        match T::SIZE {
            Some(size) if size > 0 => (bytes, bytes / size),
            _ => (bytes, self.count),
        }
    }
}

/// # Safety
/// `lane.cursor..+left` is writable and reachable through nothing else.
#[inline(always)]
unsafe fn free_bytes(lane: &mut Lane, left: usize) -> &mut [u8] {
    if lane.cursor.is_null() {
        return &mut [];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts_mut(lane.cursor, left) }
}
