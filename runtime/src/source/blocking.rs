//! Sources that block: a client library that waits for its server, say. Each reader runs in a
//! helper thread of its worker, and what it read reaches the data thread by a ring in the process's
//! own memory (`rtrb`); the worker goes on meanwhile with all else that it has to do.
//!
//! Invariants:
//! - the helper touches no segment: each record comes with the position behind it, and the data
//!   thread stores that in the same transaction as what the record led to, so what lies in the ring
//!   when a worker dies is read again by its successor (R6, R13);
//! - the helper reads one record at a time, so that a position lies behind each;
//! - it ends with its reader, at the latest when the library returns to it, and with its process in
//!   any case.
//!
//! Called through [`Source`], around a source of the user's.

use super::{Collect, Progress, Reader, Source, Subtask, Wishes};
use crate::time::now_ns;
use rtrb::{Consumer, Producer, PushError, RingBuffer};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use testudo_shm::record::Record;
use testudo_shm::txn::Plain;

/// Records that a helper reads ahead.
const AHEAD: usize = 1024;
/// How long a helper waits that finds no room.
const FULL: Duration = Duration::from_micros(100);
/// Longest that a helper sleeps before it sees whether it is still wanted.
const NAP: Duration = Duration::from_millis(10);
/// The data thread looks again after so long, doubled each time that it finds nothing.
const LOOK_NS: u64 = 50_000;
const LOOK_MAX_NS: u64 = 1_000_000;

/// A source whose reader may block, see the module. What it wraps is a [`Source`] as any other, but
/// its [`Reader::read`] may take as long as it likes, and its reader need not be [`Send`]: it lives
/// in the helper thread alone.
///
/// ```
/// use testudo::source::blocking::Blocking;
/// use testudo::source::{Collect, Progress, Reader, Source, Subtask};
///
/// /// Asks a slow service for one number after the other.
/// struct Service;
/// struct Connection;
///
/// impl Source for Service {
///     type Out = u64;
///     type Position = u64;
///     type Reader = Connection;
///     fn start(&self, _subtask: Subtask) -> u64 {
///         0
///     }
///     fn open(&self, _subtask: Subtask, _from: &u64) -> Result<Connection, String> {
///         Ok(Connection)
///     }
/// }
///
/// impl Reader<u64, u64> for Connection {
///     fn read(
///         &mut self,
///         next: &mut u64,
///         _max: usize,
///         out: &mut impl Collect<u64>,
///     ) -> Result<Progress, String> {
///         std::thread::sleep(std::time::Duration::from_millis(5));
///         out.emit(*next);
///         *next += 1;
///         Ok(Progress::More)
///     }
/// }
///
/// let source = Blocking::new(Service);
/// # let _ = source;
/// ```
#[derive(Debug)]
pub struct Blocking<S> {
    inner: Arc<S>,
}

impl<S: Source + Send + Sync> Blocking<S>
where
    S::Out: Clone + Send,
    S::Position: Send,
{
    /// Gives each reader of `source` a thread of its own.
    #[must_use]
    pub fn new(source: S) -> Self {
        Self { inner: Arc::new(source) }
    }
}

/// What one read gave.
struct Given<T, P> {
    record: Option<T>,
    rejects: Vec<String>,
    position: P,
    then: Then,
}

/// How the source goes on behind it.
enum Then {
    On,
    Blocked(i32),
    End,
    Failed(String),
}

/// The data thread's side of a reader.
pub struct BlockingReader<T, P> {
    given: Consumer<Given<T, P>>,
    /// Looks in a row that found nothing.
    looks: u32,
    /// What it reads from does not answer.
    errno: Option<i32>,
}

impl<T, P> fmt::Debug for BlockingReader<T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockingReader({} ready)", self.given.slots())
    }
}

impl<S: Source + Send + Sync> Source for Blocking<S>
where
    S::Out: Clone + Send,
    S::Position: Send,
{
    type Out = S::Out;
    type Position = S::Position;
    type Reader = BlockingReader<S::Out, S::Position>;

    fn start(&self, subtask: Subtask) -> S::Position {
        self.inner.start(subtask)
    }

    fn open(&self, subtask: Subtask, from: &S::Position) -> Result<Self::Reader, String> {
        let (give, given) = RingBuffer::new(AHEAD);
        let (source, from) = (Arc::clone(&self.inner), *from);
        let helper = std::thread::Builder::new().name(format!("source-{}", subtask.index));
        helper
            .spawn(move || Helper { give, position: from }.run(&*source, subtask))
            .map_err(|error| format!("cannot start the thread of a blocking source: {error}"))?;
        Ok(BlockingReader { given, looks: 0, errno: None })
    }

    fn survey(&self, wishes: &Wishes) -> Result<String, String> {
        self.inner.survey(wishes)
    }

    fn configure(&mut self, survey: &str, wishes: &Wishes) -> Result<bool, String> {
        match Arc::get_mut(&mut self.inner) {
            Some(inner) => inner.configure(survey, wishes),
            None => Err("a blocking source is configured before it is opened".into()),
        }
    }

    fn inputs(&self) -> Vec<PathBuf> {
        self.inner.inputs()
    }

    fn is_replayable(&self) -> bool {
        self.inner.is_replayable()
    }

    fn may_reject(&self) -> bool {
        self.inner.may_reject()
    }
}

impl<T: Record, P: Plain> Reader<T, P> for BlockingReader<T, P> {
    fn read(
        &mut self,
        position: &mut P,
        max: usize,
        out: &mut impl Collect<T>,
    ) -> Result<Progress, String> {
        for _ in 0..max {
            let Ok(given) = self.given.pop() else {
                return self.wait();
            };
            (self.looks, self.errno) = (0, None);
            given.rejects.into_iter().for_each(|description| out.reject(description));
            if let Some(record) = given.record {
                out.emit(record);
            }
            *position = given.position;
            match given.then {
                Then::On => {}
                Then::Blocked(errno) => self.errno = Some(errno),
                Then::End => return Ok(Progress::End),
                Then::Failed(message) => return Err(message),
            }
        }
        Ok(Progress::More)
    }
}

impl<T, P> BlockingReader<T, P> {
    /// Nothing is there: when to look again.
    fn wait(&mut self) -> Result<Progress, String> {
        // What was pushed before it left can still be there.
        if self.given.is_abandoned() && self.given.is_empty() {
            return Err("the thread of a blocking source ended without a word".into());
        }
        let until_ns = now_ns() + (LOOK_NS << self.looks.min(16)).min(LOOK_MAX_NS);
        self.looks += 1;
        Ok(match self.errno {
            Some(errno) => Progress::Blocked { until_ns, errno },
            None => Progress::Idle { until_ns },
        })
    }
}

/// The helper thread's side.
struct Helper<T, P> {
    give: Producer<Given<T, P>>,
    position: P,
}

impl<T: Record + Clone, P: Plain> Helper<T, P> {
    /// Reads until the source ends, or nobody wants it any more.
    fn run<S: Source<Out = T, Position = P>>(mut self, source: &S, subtask: Subtask) {
        let mut reader = match source.open(subtask, &self.position) {
            Ok(reader) => reader,
            Err(message) => {
                self.push(One::default(), Then::Failed(message));
                return;
            }
        };
        let mut is_blocked = false;
        while !self.give.is_abandoned() {
            let mut out = One::default();
            let progress = reader.read(&mut self.position, 1, &mut out);
            let is_empty = out.record.is_none() && out.rejects.is_empty();
            let was_blocked = std::mem::replace(&mut is_blocked, false);
            let (then, until_ns) = match progress {
                _ if out.surplus > 0 => {
                    let message = "the source emitted more records than it was asked for";
                    (Some(Then::Failed(message.into())), None)
                }
                Ok(Progress::More) => (Some(Then::On), None),
                Ok(Progress::Idle { until_ns }) => {
                    let is_news = !is_empty || was_blocked;
                    (is_news.then_some(Then::On), Some(until_ns))
                }
                Ok(Progress::Blocked { until_ns, errno }) => {
                    is_blocked = true;
                    let is_news = !is_empty || !was_blocked;
                    (is_news.then_some(Then::Blocked(errno)), Some(until_ns))
                }
                Ok(Progress::End) => (Some(Then::End), None),
                Err(message) => (Some(Then::Failed(message)), None),
            };
            let is_last = matches!(then, Some(Then::End | Then::Failed(_)));
            let is_taken = then.is_none_or(|then| self.push(out, then));
            if is_last || !is_taken || !until_ns.is_none_or(|until_ns| self.nap(until_ns)) {
                return;
            }
        }
    }

    /// Hands over what a read gave; false when nobody wants it any more.
    fn push(&mut self, out: One<T>, then: Then) -> bool {
        let One { record, rejects, .. } = out;
        let mut given = Given { record, rejects, position: self.position, then };
        while let Err(PushError::Full(back)) = self.give.push(given) {
            if self.give.is_abandoned() {
                return false;
            }
            given = back;
            std::thread::sleep(FULL);
        }
        true
    }

    /// Sleeps until then; false when nobody wants more.
    fn nap(&self, until_ns: u64) -> bool {
        loop {
            let left = until_ns.saturating_sub(now_ns());
            if left == 0 || self.give.is_abandoned() {
                return !self.give.is_abandoned();
            }
            std::thread::sleep(Duration::from_nanos(left).min(NAP));
        }
    }
}

/// Takes what one read gives.
struct One<T> {
    record: Option<T>,
    rejects: Vec<String>,
    /// Records beyond the one that was asked for.
    surplus: usize,
}

impl<T> Default for One<T> {
    fn default() -> Self {
        Self { record: None, rejects: Vec::new(), surplus: 0 }
    }
}

impl<T: Record + Clone> Collect<T> for One<T> {
    fn emit(&mut self, value: T) {
        self.surplus += usize::from(self.record.is_some());
        self.record = Some(value);
    }

    fn emit_all(&mut self, values: &[T]) {
        values.iter().cloned().for_each(|value| self.emit(value));
    }

    fn reject(&mut self, description: String) {
        self.rejects.push(description);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, channel};

    /// Blocks on a channel for each record.
    struct Slow {
        from: Mutex<Option<Receiver<Result<u64, String>>>>,
    }

    struct SlowReader(Receiver<Result<u64, String>>);

    impl Source for Slow {
        type Out = u64;
        type Position = u64;
        type Reader = SlowReader;
        fn start(&self, _subtask: Subtask) -> u64 {
            0
        }
        fn open(&self, _subtask: Subtask, _from: &u64) -> Result<SlowReader, String> {
            let from = self.from.lock().map_err(|error| error.to_string())?.take();
            from.map(SlowReader).ok_or_else(|| "nobody answers".into())
        }
    }

    impl Reader<u64, u64> for SlowReader {
        fn read(
            &mut self,
            position: &mut u64,
            _max: usize,
            out: &mut impl Collect<u64>,
        ) -> Result<Progress, String> {
            match self.0.recv() {
                Err(_) => return Ok(Progress::End),
                Ok(Ok(value)) => out.emit(value),
                Ok(Err(refused)) => out.reject(refused),
            }
            *position += 1;
            Ok(Progress::More)
        }
    }

    const ALONE: Subtask = Subtask { index: 0, count: 1 };

    /// What a reader gives until it has nothing for the moment.
    fn read_all(
        reader: &mut BlockingReader<u64, u64>,
        position: &mut u64,
        until: u64,
    ) -> (Vec<u64>, Result<Progress, String>) {
        let mut all = Vec::new();
        loop {
            let mut out = One::default();
            let progress = reader.read(position, 1, &mut out);
            all.extend(out.record);
            let is_over = !matches!(progress, Ok(Progress::More | Progress::Idle { .. }));
            if is_over || *position >= until {
                return (all, progress);
            }
        }
    }

    #[test]
    fn a_reader_that_blocks_gives_each_record_with_the_position_behind_it() {
        let (send, from) = channel();
        let source = Blocking::new(Slow { from: Mutex::new(Some(from)) });
        let mut position = source.start(ALONE);
        let mut reader = source.open(ALONE, &position).expect("a thread");
        let mut out = One::default();
        // It blocks; the data thread does not.
        let progress = reader.read(&mut position, 8, &mut out);
        assert!(matches!(progress, Ok(Progress::Idle { until_ns }) if until_ns > 0));
        for value in [Ok(7), Err("bad".into()), Ok(9)] {
            send.send(value).expect("the helper reads");
        }
        let (all, _) = read_all(&mut reader, &mut position, 3);
        assert_eq!((all, position), (vec![7, 9], 3));
        drop(send);
        let (rest, progress) = read_all(&mut reader, &mut position, u64::MAX);
        assert_eq!((rest, progress), (vec![], Ok(Progress::End)));
    }

    #[test]
    fn a_source_that_cannot_be_opened_fails_with_its_own_words() {
        let source = Blocking::new(Slow { from: Mutex::new(None) });
        let mut reader = source.open(ALONE, &0).expect("a thread");
        let (_, progress) = read_all(&mut reader, &mut 0, u64::MAX);
        assert_eq!(progress, Err("nobody answers".into()));
    }

    #[test]
    fn a_helper_ends_when_its_reader_is_gone() {
        let (send, from) = channel();
        let source = Blocking::new(Slow { from: Mutex::new(Some(from)) });
        drop(source.open(ALONE, &0).expect("a thread"));
        // Whoever ends drops the channel's other end.
        while send.send(Ok(1)).is_ok() {
            std::thread::yield_now();
        }
    }
}
