//! Sinks: where results leave. A sink is written by one [`Writer`] for each subtask; what it has
//! written is its position, which lives in a cell and moves in the step's transaction.
//!
//! Contract (R13): `flush` completes the step's output before it moves the position; a writer
//! opened at a position takes back whatever a dead predecessor wrote beyond it. So a step's output
//! is there exactly once.
//!
//! `file` comes with the engine, as does printing (by ring to the launching process); `ForEach`
//! hands records to a closure.

pub mod append;

pub mod file;

use crate::error::Error;
use crate::operator::Push;
use crate::source::Subtask;
use crate::worker::context::{CounterPlace, Cx, SharedFile};
use std::marker::PhantomData;
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::{Place, Plain};

/// A destination of records.
pub trait Sink<T: Record>: 'static {
    /// Everything that must survive a writer.
    type Position: Plain;
    /// Writes one subtask's part.
    type Writer: Writer<T, Self::Position>;

    /// The first position.
    fn start(&self, subtask: Subtask) -> Self::Position;

    /// Opens a subtask's part at a position, taking back what lies beyond it.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn open(&self, subtask: Subtask, from: &Self::Position) -> Result<Self::Writer, String>;

    /// The parallelism that this sink must have; `None` when any will do.
    fn parallelism(&self) -> Option<usize> {
        None
    }

    /// The file or folder that no other job may write at the same time.
    fn claims(&self) -> Option<crate::plan::Output> {
        None
    }
}

/// Writes one subtask's part of a sink.
pub trait Writer<T: Record, P: Plain>: 'static {
    /// Takes a record of the open step.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn write(&mut self, record: &T::View) -> Result<(), String>;

    /// Completes the step's output and moves `position` behind it. Called right before the step
    /// commits.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn flush(&mut self, position: &mut P) -> Result<(), String>;

    /// The file that must be on disk up to the position before a checkpoint may refer to it.
    fn file(&self) -> Option<SharedFile> {
        None
    }
}

/// The operator at the end of a stage that writes to a sink.
pub struct SinkEnd<T, P: Plain, W> {
    pub(crate) name: String,
    pub(crate) writer: W,
    pub(crate) position: Place<P>,
    pub(crate) records: CounterPlace,
    pub(crate) written: u64,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T: Record, P: Plain, W: Writer<T, P>> Push<T> for SinkEnd<T, P, W> {
    #[inline]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        self.written += 1;
        if let Err(message) = self.writer.write(item.view) {
            cx.fail(Error::job(&self.name, message));
        }
    }

    fn end_batch(&mut self, _cx: &mut Cx) {}

    fn watermark(&mut self, _cx: &mut Cx, _watermark: i64) {}

    fn room(&mut self, _cx: &mut Cx) -> usize {
        usize::MAX
    }

    fn pump(&mut self, _cx: &mut Cx) -> bool {
        false
    }

    fn save(&mut self, cx: &mut Cx) {
        if self.written == 0 || cx.failure.is_some() {
            return;
        }
        let mut position = cx.txn.get(self.position);
        match self.writer.flush(&mut position) {
            Ok(()) => {
                cx.txn.set(self.position, position);
                cx.count(self.records, self.written);
            }
            Err(message) => cx.fail(Error::job(&self.name, message)),
        }
        self.written = 0;
    }

    fn end(&mut self, _cx: &mut Cx) -> bool {
        true
    }
}

/// The end of a stage whose records go to a closure: a black box, a counter in memory, a client
/// that repeats harmlessly.
pub struct ForEach<T, F> {
    pub(crate) f: F,
    pub(crate) records: CounterPlace,
    pub(crate) seen: u64,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T: Record, F: Fn(&T::View)> Push<T> for ForEach<T, F> {
    #[inline(always)]
    fn push(&mut self, _cx: &mut Cx, item: Item<'_, T>) {
        self.seen += 1;
        (self.f)(item.view);
    }

    #[inline(always)]
    fn end_batch(&mut self, cx: &mut Cx) {
        if self.seen > 0 {
            cx.count(self.records, self.seen);
            self.seen = 0;
        }
    }

    fn watermark(&mut self, _cx: &mut Cx, _watermark: i64) {}

    #[inline(always)]
    fn room(&mut self, _cx: &mut Cx) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn pump(&mut self, _cx: &mut Cx) -> bool {
        false
    }

    fn save(&mut self, _cx: &mut Cx) {}

    fn end(&mut self, _cx: &mut Cx) -> bool {
        true
    }
}
