//! Counts the records that pass, for the report.

use super::{Push, hand_on};
use crate::worker::context::{CounterPlace, Cx};
use testudo_shm::record::{Batch, Item, Record};

pub struct Count<N> {
    pub(crate) records: CounterPlace,
    pub(crate) seen: u64,
    pub(crate) next: N,
}

impl<T: Record, N: Push<T>> Push<T> for Count<N> {
    #[inline]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        self.seen += 1;
        self.next.push(cx, item);
    }

    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        self.seen += batch.len() as u64;
        self.next.push_batch(cx, batch);
    }

    #[inline]
    fn push_value(&mut self, cx: &mut Cx, value: &T) {
        self.seen += 1;
        self.next.push_value(cx, value);
    }

    fn end_batch(&mut self, cx: &mut Cx) {
        if self.seen > 0 {
            cx.count(self.records, self.seen);
            self.seen = 0;
        }
        self.next.end_batch(cx);
    }

    hand_on!(watermark, room, pump, save, end);
}
