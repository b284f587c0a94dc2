//! Sinks: where results leave. A sink is written by one [`Writer`] for each subtask; what it has
//! written is its position, which lives in a cell and moves in the step's transaction.
//!
//! Contract (R13): `flush` completes the step's output before it moves the position; a writer
//! opened at a position takes back whatever a dead predecessor wrote beyond it. So a step's output
//! is there exactly once, whichever process dies.
//!
//! When the machine dies, the job goes on from a checkpoint, and with it the position. A sink that
//! cannot take back what it has shown (a table, a queue) shows it in two phases: see [`Writer`].
//!
//! A system outside that refuses for a while (a full disk) ends no job: see [`Writer::outage`]. The
//! step's output is kept in the worker's segment (`holding`), the step is committed, and the sink
//! has no room until a later try succeeds; with partial completeness it drops records meanwhile,
//! and counts them.
//!
//! `file` comes with the engine (`append` is one growing file, `parts` a folder of them), as does
//! printing (by ring to the launching process); `ForEach` hands records to a closure.

pub mod append;

pub mod file;

pub(crate) mod parts;

pub(crate) mod holding;

use crate::config::Settings;
use crate::error::Error;
use crate::operator::Push;
use crate::source::Subtask;
use crate::time::now_ns;
use crate::worker::context::{CounterPlace, Cx, SharedFiles};
use holding::Holding;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::rc::Rc;
use testudo_shm::record::{Item, Record};
use testudo_shm::txn::{Place, Plain};

/// A destination of records.
pub trait Sink<T: Record>: 'static {
    /// Everything that must survive a writer.
    type Position: Plain;
    /// Writes one subtask's part.
    type Writer: Writer<T, Self::Position>;

    /// Tells the sink how the job is run, before anything else.
    fn configure(&mut self, settings: &Settings) {
        let _ = settings;
    }

    /// The first position.
    fn start(&self, subtask: Subtask) -> Self::Position;

    /// The first position of a subtask that joins when the job goes on from a checkpoint, whose
    /// last cut was `epoch`, with more subtasks than before.
    fn join(&self, subtask: Subtask, epoch: u64) -> Self::Position {
        let _ = epoch;
        self.start(subtask)
    }

    /// Opens a subtask's part at a position, taking back what lies beyond it.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn open(&self, subtask: Subtask, from: &Self::Position) -> Result<Self::Writer, String>;

    /// Whether what a subtask had written at `position` is there still. Called by the launching
    /// process before a job that goes on from a checkpoint changes anything.
    ///
    /// # Errors
    /// What is missing; the job is refused with this text.
    fn check(&self, subtask: Subtask, position: &Self::Position) -> Result<(), String> {
        let _ = (subtask, position);
        Ok(())
    }

    /// Brings a subtask to its end that was there at the checkpoint with cut `epoch`, and is no
    /// more: the job goes on with fewer, or had come to its end. Called by the launching process;
    /// may be called again.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job does not start.
    fn settle(
        &self,
        subtask: Subtask,
        position: &Self::Position,
        epoch: u64,
    ) -> Result<(), String> {
        let mut writer = self.open(subtask, position)?;
        writer.abort(epoch)?;
        writer.commit(epoch)
    }

    /// Takes back whatever subtasks from number `from` on have begun since cut `epoch`: neither the
    /// checkpoint nor the job that goes on from it knows them, but a run in between did. With 0
    /// when a job with checkpoints begins. Called by the launching process; may be called again.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job does not start.
    fn withdraw(&self, from: usize, epoch: u64) -> Result<(), String> {
        let _ = (from, epoch);
        Ok(())
    }

    /// The parallelism that this sink must have; `None` when any will do.
    fn parallelism(&self) -> Option<usize> {
        None
    }

    /// The file or folder that no other job may write at the same time.
    fn claims(&self) -> Option<crate::plan::Output> {
        None
    }
}

/// A cut of this worker: the moment that a checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Its number: greater than that of any earlier cut, in this run and those before.
    pub epoch: u64,
    /// All input of this worker has ended: nothing is written behind this cut.
    pub is_last: bool,
}

/// Writes one subtask's part of a sink.
///
/// `write` and `flush` are all that a sink needs that can take back what it has written: it does so
/// in [`Sink::open`]. Others write in two phases, in a job with checkpoints:
///
/// - [`Writer::prepare`], at a cut, between two steps: all that was written so far is held, durably
///   and unseen; the position may move;
/// - [`Writer::commit`], once the checkpoint is complete: all that was prepared up to this cut is
///   shown;
/// - [`Writer::abort`], when the job goes on from a checkpoint: what was prepared after its cut is
///   dropped; when it begins afresh, everything.
///
/// A checkpoint that fails is no call: what was prepared for it is shown with the next one. Any of
/// them may be repeated after a crash and must then do nothing more; `commit` of the checkpoint's
/// cut is always repeated before the first `write` of a resumed job. If only part of the job has
/// taken part in a checkpoint, only the sinks of that part are told to commit. An error ends the
/// job; it can be resumed.
///
/// Batches that are files, shown by a rename:
///
/// ```
/// use std::path::PathBuf;
/// use testudo::prelude::*;
/// use testudo::sink::{Cut, Sink, Writer};
/// use testudo::source::Subtask;
///
/// struct Batches(PathBuf);
///
/// struct BatchWriter {
///     folder: PathBuf,
///     subtask: usize,
///     rows: String,
/// }
///
/// impl Sink<u64> for Batches {
///     type Position = u64; // rows written: nothing else must survive
///     type Writer = BatchWriter;
///
///     fn start(&self, _: Subtask) -> u64 {
///         0
///     }
///
///     // Rows of a step wait in a file of their own. What lies beyond the position is cut off.
///     fn open(&self, subtask: Subtask, from: &u64) -> Result<BatchWriter, String> {
///         let (folder, subtask) = (self.0.clone(), subtask.index);
///         let waiting = std::fs::read_to_string(folder.join(format!("{subtask}.waiting")));
///         let waiting = waiting.unwrap_or_default();
///         let rows = waiting.split_inclusive('\n').take(*from as usize).collect();
///         Ok(BatchWriter { folder, subtask, rows })
///     }
/// }
///
/// impl BatchWriter {
///     fn path(&self, epoch: u64, ending: &str) -> PathBuf {
///         self.folder.join(format!("{}-{epoch:08}.{ending}", self.subtask))
///     }
///
///     fn prepared(&self) -> Vec<u64> {
///         let of = format!("{}-", self.subtask);
///         let names = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
///         let names = names.filter_map(|entry| entry.file_name().into_string().ok());
///         let number = |name: String| {
///             name.strip_prefix(&of)?.strip_suffix(".prepared")?.parse().ok()
///         };
///         names.filter_map(number).collect()
///     }
/// }
///
/// impl Writer<u64, u64> for BatchWriter {
///     fn write(&mut self, record: &u64) -> Result<(), String> {
///         self.rows += &format!("{record}\n");
///         Ok(())
///     }
///
///     fn flush(&mut self, position: &mut u64) -> Result<(), String> {
///         let waiting = self.folder.join(format!("{}.waiting", self.subtask));
///         *position = self.rows.lines().count() as u64;
///         std::fs::write(waiting, &self.rows).map_err(|error| error.to_string())
///     }
///
///     fn prepare(&mut self, cut: Cut, position: &mut u64) -> Result<(), String> {
///         if self.rows.is_empty() {
///             return Ok(());
///         }
///         let path = self.path(cut.epoch, "prepared");
///         std::fs::write(&path, &self.rows).map_err(|error| error.to_string())?;
///         std::fs::File::open(&path).and_then(|f| f.sync_all()).map_err(|e| e.to_string())?;
///         self.rows.clear();
///         *position = 0;
///         Ok(())
///     }
///
///     fn commit(&mut self, epoch: u64) -> Result<(), String> {
///         for cut in self.prepared().into_iter().filter(|cut| *cut <= epoch) {
///             std::fs::rename(self.path(cut, "prepared"), self.path(cut, "rows"))
///                 .map_err(|error| error.to_string())?;
///         }
///         Ok(())
///     }
///
///     fn abort(&mut self, epoch: u64) -> Result<(), String> {
///         for cut in self.prepared().into_iter().filter(|cut| *cut > epoch) {
///             std::fs::remove_file(self.path(cut, "prepared")).map_err(|e| e.to_string())?;
///         }
///         Ok(())
///     }
/// }
///
/// fn build(flow: &Flow, folder: &str) {
///     flow.source("numbers", Generator::new(1_000, |n| n)).sink("rows", Batches(folder.into()));
/// }
///
/// # fn main() -> Result<(), testudo::Error> {
/// testudo::init();
/// let folder = std::env::temp_dir().join(format!("batches-{}", std::process::id()));
/// std::fs::create_dir_all(&folder).expect("a folder");
/// let settings = Settings {
///     workers: 1,
///     checkpoint_dir: Some(folder.join("checkpoints")),
///     ..Settings::default()
/// };
/// Job::new(build).parameters(folder.display().to_string()).settings(settings).run()?;
/// let mut rows = 0;
/// for entry in std::fs::read_dir(&folder).expect("the folder").flatten() {
///     let path = entry.path();
///     assert!(path.extension().is_none_or(|ending| ending != "prepared"));
///     if path.extension().is_some_and(|ending| ending == "rows") {
///         rows += std::fs::read_to_string(path).expect("rows").lines().count();
///     }
/// }
/// assert_eq!(rows, 1_000);
/// # std::fs::remove_dir_all(&folder).expect("the folder");
/// # Ok(())
/// # }
/// ```
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

    /// What the last error was, where it may pass by itself: the operating system's number of it
    /// (a full disk is `ENOSPC`, 28), or 0 for one that has none. `None`: the job fails with the
    /// error's text, as it does in every sink that does not say otherwise.
    ///
    /// After an error of [`Writer::flush`] that may pass, the engine takes the output of the step
    /// with [`Writer::retain`], keeps it where no crash of a worker loses it, gives this sink no
    /// further records, and calls [`Writer::retry`] with growing pauses until it succeeds. After
    /// one of [`Writer::commit`], that is called again.
    fn outage(&self) -> Option<i32> {
        None
    }

    /// Gives the output of the open step away, as bytes that [`Writer::retry`] can write: nothing
    /// of it may be left here, and nothing of it may stay where it goes.
    fn retain(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// Writes what was retained, perhaps by a predecessor of this worker, and moves `position`
    /// behind it.
    ///
    /// # Errors
    /// As [`Writer::flush`].
    fn retry(&mut self, retained: &[u8], position: &mut P) -> Result<(), String> {
        let _ = (retained, position);
        Err("this sink retains nothing".into())
    }

    /// The files that must be on disk, as they are at a cut, before a checkpoint may refer to it.
    fn files(&self) -> Option<SharedFiles> {
        None
    }

    /// At a cut: everything written so far is to be held so that [`Writer::commit`] can show it
    /// whatever happens. If this worker dies before it has taken its next step, the position is
    /// what it was, and this cut belongs to no checkpoint.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn prepare(&mut self, cut: Cut, position: &mut P) -> Result<(), String> {
        let _ = (cut, position);
        Ok(())
    }

    /// A checkpoint that holds cut `epoch` is complete: shows what was prepared at it and before.
    /// Called again, for the last such cut, by each successor of a worker.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn commit(&mut self, epoch: u64) -> Result<(), String> {
        let _ = epoch;
        Ok(())
    }

    /// The job goes on from a checkpoint that holds cut `epoch`: what was prepared after it belongs
    /// to none. 0 when the job begins. Called before `commit`, right after [`Sink::open`].
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn abort(&mut self, epoch: u64) -> Result<(), String> {
        let _ = epoch;
        Ok(())
    }
}

/// A worker's sink, as its cuts see it.
pub(crate) trait AtCut: std::fmt::Debug {
    /// A cut begins; a part of the step that follows.
    fn prepare(&self, cx: &mut Cx, cut: Cut);

    /// A complete checkpoint holds the cut. False when that is to be said again later.
    fn commit(&self, cx: &mut Cx, epoch: u64) -> bool;

    /// It has output that is not written: no checkpoint can hold what this worker has done.
    fn holds_output(&self) -> bool;
}

/// See [`AtCut`]: the writer that [`SinkEnd`] writes with.
pub(crate) struct Prepared<T, P: Plain, W> {
    pub(crate) name: String,
    pub(crate) writer: Rc<RefCell<W>>,
    pub(crate) position: Place<P>,
    pub(crate) operator: usize,
    /// Shared with the [`SinkEnd`].
    pub(crate) holds: Rc<Cell<bool>>,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T, P: Plain, W> std::fmt::Debug for Prepared<T, P, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Prepared({})", self.name)
    }
}

impl<T: Record, P: Plain, W: Writer<T, P>> AtCut for Prepared<T, P, W> {
    fn prepare(&self, cx: &mut Cx, cut: Cut) {
        let mut position = cx.txn.get(self.position);
        match self.writer.borrow_mut().prepare(cut, &mut position) {
            Ok(()) => cx.txn.set(self.position, position),
            Err(message) => cx.fail(Error::job(&self.name, message)),
        }
    }

    fn commit(&self, cx: &mut Cx, epoch: u64) -> bool {
        if !cx.outside.is_due(self.operator, now_ns()) {
            return false;
        }
        let mut writer = self.writer.borrow_mut();
        let Err(message) = writer.commit(epoch) else {
            if cx.outside.due_ns(self.operator).is_some() && !self.holds.get() {
                cx.outside.works(self.operator);
            }
            return true;
        };
        match writer.outage() {
            Some(errno) => cx.outside.failed(self.operator, errno, self.holds.get()),
            None => cx.fail(Error::job(&self.name, message)),
        }
        false
    }

    fn holds_output(&self) -> bool {
        self.holds.get()
    }
}

/// What the launching process needs of a sink, when the job goes on from a checkpoint.
pub(crate) struct SinkHooks {
    pub(crate) stage: usize,
    pub(crate) operator: usize,
    /// See [`Sink::settle`]; the position as the bytes of its cell.
    pub(crate) settle: Settle,
    /// See [`Sink::check`].
    pub(crate) check: Box<dyn Fn(Subtask, &[u8]) -> Result<(), String>>,
    /// See [`Sink::withdraw`].
    pub(crate) withdraw: Box<dyn Fn(usize, u64) -> Result<(), String>>,
}

type Settle = Box<dyn Fn(Subtask, &[u8], u64) -> Result<(), String>>;

impl SinkHooks {
    pub(crate) fn of<T: Record, S: Sink<T>>(stage: usize, operator: usize, sink: &Rc<S>) -> Self {
        use testudo_shm::zerocopy::FromBytes;
        let (settled, checked, withdrawn) = (Rc::clone(sink), Rc::clone(sink), Rc::clone(sink));
        let read = |position: &[u8]| {
            S::Position::read_from_bytes(position).map_err(|_| {
                format!("its position has {} bytes, not those of this sink", position.len())
            })
        };
        Self {
            stage,
            operator,
            settle: Box::new(move |subtask, position, epoch| {
                settled.settle(subtask, &read(position)?, epoch)
            }),
            check: Box::new(move |subtask, position| checked.check(subtask, &read(position)?)),
            withdraw: Box::new(move |from, epoch| withdrawn.withdraw(from, epoch)),
        }
    }
}

/// The operator at the end of a stage that writes to a sink.
pub struct SinkEnd<T, P: Plain, W> {
    pub(crate) name: String,
    pub(crate) operator: usize,
    /// None in a replica, which writes nothing.
    pub(crate) writer: Option<Rc<RefCell<W>>>,
    pub(crate) position: Place<P>,
    pub(crate) records: CounterPlace,
    pub(crate) dropped: CounterPlace,
    pub(crate) written: u64,
    /// Output that was refused, and whether there is any.
    pub(crate) holding: Holding,
    pub(crate) holds: Rc<Cell<bool>>,
    /// Records are dropped while that is so (partial completeness), and so many were in this step.
    pub(crate) sheds: bool,
    pub(crate) shed: u64,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T: Record, P: Plain, W: Writer<T, P>> SinkEnd<T, P, W> {
    /// The step's output is refused: keeps it, if that may pass.
    #[cold]
    fn hold(&mut self, cx: &mut Cx, message: String) {
        let Some(writer) = &self.writer else { return };
        let mut writer = writer.borrow_mut();
        let Some(errno) = writer.outage() else {
            return cx.fail(Error::job(&self.name, message));
        };
        let kept = writer.retain();
        if !self.holding.keep(cx, &kept) {
            let message = format!("{message}, and there is no room to keep what was to be written");
            return cx.fail(Error::job(&self.name, message));
        }
        self.holds.set(true);
        cx.count(self.records, self.written);
        cx.outside.failed(self.operator, errno, !self.sheds);
    }

    /// Records came although there was no room: they follow what is kept.
    #[cold]
    fn hold_more(&mut self, cx: &mut Cx) {
        let Some(writer) = &self.writer else { return };
        let kept = writer.borrow_mut().retain();
        if self.holding.keep(cx, &kept) {
            cx.count(self.records, self.written);
        } else {
            cx.fail(Error::job(&self.name, "there is no room to keep what cannot be written"));
        }
    }

    /// Tries once more to write what is kept; true when it is written.
    #[cold]
    fn retry(&mut self, cx: &mut Cx) -> bool {
        if !cx.outside.is_due(self.operator, cx.now_ns) {
            return false;
        }
        let kept = self.holding.kept(cx);
        let mut position = cx.txn.get(self.position);
        let Some(writer) = &self.writer else { return false };
        let mut writer = writer.borrow_mut();
        match writer.retry(&kept, &mut position) {
            Ok(()) => {
                cx.txn.set(self.position, position);
                self.holding.release(cx);
                self.holds.set(false);
                cx.outside.works(self.operator);
                true
            }
            Err(message) => {
                match writer.outage() {
                    Some(errno) => cx.outside.failed(self.operator, errno, !self.sheds),
                    None => cx.fail(Error::job(&self.name, message)),
                }
                false
            }
        }
    }
}

impl<T: Record, P: Plain, W: Writer<T, P>> Push<T> for SinkEnd<T, P, W> {
    #[inline]
    fn push(&mut self, cx: &mut Cx, item: Item<'_, T>) {
        if self.sheds && self.holds.get() {
            self.shed += 1;
            return;
        }
        self.written += 1;
        if let Some(writer) = &self.writer
            && let Err(message) = writer.borrow_mut().write(item.view)
        {
            cx.fail(Error::job(&self.name, message));
        }
    }

    fn end_batch(&mut self, _cx: &mut Cx) {}

    fn watermark(&mut self, _cx: &mut Cx, _watermark: i64) {}

    fn room(&mut self, _cx: &mut Cx) -> usize {
        if self.holds.get() && !self.sheds { 0 } else { usize::MAX }
    }

    fn pump(&mut self, cx: &mut Cx) -> bool {
        if self.holds.get() { self.retry(cx) } else { false }
    }

    fn save(&mut self, cx: &mut Cx) {
        if self.shed > 0 {
            cx.count(self.dropped, std::mem::take(&mut self.shed));
        }
        if self.written == 0 || cx.failure.is_some() {
            return;
        }
        if self.holds.get() {
            self.hold_more(cx);
        } else if let Some(writer) = &self.writer {
            self.holding.trim(cx);
            let mut position = cx.txn.get(self.position);
            let flushed = writer.borrow_mut().flush(&mut position);
            match flushed {
                Ok(()) => {
                    cx.txn.set(self.position, position);
                    cx.count(self.records, self.written);
                }
                Err(message) => self.hold(cx, message),
            }
        }
        self.written = 0;
    }

    /// What is kept is written first.
    fn end(&mut self, _cx: &mut Cx) -> bool {
        !self.holds.get()
    }
}

/// The end of a stage whose records go to a closure: a black box, a counter in memory, a client
/// that repeats harmlessly.
pub struct ForEach<T, F> {
    pub(crate) f: F,
    pub(crate) records: CounterPlace,
    pub(crate) seen: u64,
    /// This is a replica: nothing is handed out.
    pub(crate) is_silent: bool,
    pub(crate) of: PhantomData<fn(T)>,
}

impl<T: Record, F: Fn(&T::View)> Push<T> for ForEach<T, F> {
    #[inline(always)]
    fn push(&mut self, _cx: &mut Cx, item: Item<'_, T>) {
        self.seen += 1;
        if !self.is_silent {
            (self.f)(item.view);
        }
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
