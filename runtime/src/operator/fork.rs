//! The fork: every record to two outputs.

use super::Push;
use crate::worker::context::Cx;
use testudo_shm::record::{Batch, Item, Record};

pub struct Fork<N, M> {
    pub(crate) next: N,
    pub(crate) side: M,
}

impl<T: Record, N: Push<T>, M: Push<T>> Push<T> for Fork<N, M> {
    #[inline(always)]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        self.next.push(cx, item);
        self.side.push(cx, item);
    }

    fn push_batch(&mut self, cx: &mut Cx, batch: Batch<'_, T>) {
        self.next.push_batch(cx, batch);
        self.side.push_batch(cx, batch);
    }

    super::both_sides!();
}
